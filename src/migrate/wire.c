/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "migrate/wire.h"

#include "os/os.h"

#include <ctype.h>
#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <zlib.h>
#include <zstd.h>

_Static_assert(sizeof(struct wire_run) == 24 && sizeof(struct wire_hello) == 40 &&
	       sizeof(struct wire_header) == 16 && sizeof(struct wire_same) == 48 &&
	       sizeof(struct wire_hint) == 56, "as it is on the wire");
_Static_assert(sizeof(struct wire_pages_header) + WIRE_RUNS_MAX * sizeof(struct wire_run) +
	       (WIRE_DATA_PAGES_MAX << OS_PAGE_SHIFT) <= WIRE_PAYLOAD_MAX, "a batch fits");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "structures are sent as they are");

enum sender { SOURCE = 1, DESTINATION = 2, BOTH = 3 };

static const struct {
	const char *name;
	unsigned sender;
	uint32_t min, max; /* bytes of the payload */
} types[WIRE_TYPES] = {
	[WIRE_HELLO] = { "hello", BOTH, sizeof(struct wire_hello), sizeof(struct wire_hello) },
	[WIRE_REFUSE] = { "refuse", BOTH, 1, WIRE_TEXT_MAX - 1 },
	[WIRE_MANIFEST] = { "manifest", SOURCE, 2, 1u << 20 },
	[WIRE_BLOCKS] = { "blocks", SOURCE, sizeof(struct snapshot_block), SNAPSHOT_BLOCKS * sizeof(struct snapshot_block) },
	[WIRE_READY] = { "ready", DESTINATION, sizeof(struct wire_ready), sizeof(struct wire_ready) },
	[WIRE_PAGES] = { "pages", SOURCE, sizeof(struct wire_pages_header) + sizeof(struct wire_run), WIRE_PAYLOAD_MAX },
	[WIRE_PASS] = { "pass", BOTH, 0, 0 },
	[WIRE_STATE] = { "state", SOURCE, 1, WIRE_STATE_MAX },
	[WIRE_SWITCH] = { "switch", SOURCE, sizeof(struct wire_switch), sizeof(struct wire_switch) },
	[WIRE_LOADED] = { "loaded", DESTINATION, 0, 0 },
	[WIRE_TOKEN] = { "token", SOURCE, 0, 0 },
	[WIRE_RUNNING] = { "running", DESTINATION, 0, 0 },
	[WIRE_FAILED] = { "failed", DESTINATION, 1, WIRE_TEXT_MAX - 1 },
	[WIRE_WANT] = { "want", DESTINATION, 8, WIRE_WANTED_MAX * 8 },
	[WIRE_DONE] = { "done", BOTH, 0, 0 },
	[WIRE_PING] = { "ping", BOTH, 0, 0 },
	[WIRE_FILES] = { "files", SOURCE, sizeof(struct wire_files), sizeof(struct wire_files) + WIRE_FILES_MAX * DIGEST_BYTES },
	[WIRE_OWED] = { "owed", DESTINATION, sizeof(struct wire_owed), WIRE_OWED_MAX * sizeof(struct wire_owed) },
	[WIRE_HAVE] = { "have", DESTINATION, 8, WIRE_HAVE_MAX * 8 },
	[WIRE_SAME] = { "same", SOURCE, sizeof(struct wire_same), WIRE_SAME_MAX * sizeof(struct wire_same) },
	[WIRE_LACK] = { "lack", DESTINATION, 8, WIRE_SAME_MAX * 8 },
	[WIRE_HINT] = { "hint", SOURCE, sizeof(struct wire_hint), WIRE_HINTS_MAX * sizeof(struct wire_hint) },
	[WIRE_STALE] = { "stale", DESTINATION, 8, WIRE_HINTS_MAX * 8 },
};

static int wrong(char why[SNAPSHOT_WHY_BYTES], const char *what, uint64_t number)
{
	return snapshot_fail(why, -EPROTO, "the peer's message is wrong: %s (%ju)", what, (uintmax_t)number);
}

int wire_check_header(const struct wire_header *header, bool from_source, char why[SNAPSHOT_WHY_BYTES])
{
	if (header->type >= WIRE_TYPES)
		return wrong(why, "of no known type", header->type);
	if (header->reserved)
		return wrong(why, "a header with more than it should have", header->reserved);
	if (!(types[header->type].sender & (from_source ? SOURCE : DESTINATION)))
		return snapshot_fail(why, -EPROTO, "the peer sends \"%s\", which is ours to send", types[header->type].name);
	if (header->bytes < types[header->type].min || header->bytes > types[header->type].max)
		return snapshot_fail(why, -EPROTO, "the peer's message \"%s\" has %u bytes, and not %u to %u",
				     types[header->type].name, header->bytes, types[header->type].min,
				     types[header->type].max);
	return 0;
}

uint32_t wire_checksum(const struct wire_header *header, const void *payload)
{
	uLong crc = crc32(0, (const Bytef *)header, offsetof(struct wire_header, checksum));

	return (uint32_t)(header->bytes ? crc32(crc, payload, header->bytes) : crc);
}

int wire_read_hello(const struct wire_message *message, struct wire_hello *ret_hello, char why[SNAPSHOT_WHY_BYTES])
{
	if (message->type != WIRE_HELLO || message->bytes != sizeof *ret_hello)
		return snapshot_fail(why, -EPROTO, "the peer does not begin with a hello: it is no Latent");
	memcpy(ret_hello, message->payload, sizeof *ret_hello);
	if (ret_hello->magic != WIRE_MAGIC)
		return snapshot_fail(why, -EPROTO, "the peer is no Latent that migrates");
	if (ret_hello->version != WIRE_VERSION)
		return snapshot_fail(why, -EPROTO, "the peer speaks version %u, and this is %u: use the same Latent on both hosts",
				     ret_hello->version, WIRE_VERSION);
	if (ret_hello->page_bytes != OS_PAGE_BYTES)
		return snapshot_fail(why, -EPROTO, "the peer's pages have %u bytes, and not %u", ret_hello->page_bytes,
				     (unsigned)OS_PAGE_BYTES);
	return ret_hello->resume > 1 || ret_hello->reserved ? wrong(why, "the hello's flags", ret_hello->resume) : 0;
}

/* It is shown to a user: no control characters. */
int wire_read_text(const struct wire_message *message, char ret_text[WIRE_TEXT_MAX], char why[SNAPSHOT_WHY_BYTES])
{
	if (!message->bytes || message->bytes >= WIRE_TEXT_MAX)
		return wrong(why, "a sentence of such a length", message->bytes);
	for (size_t i = 0; i < message->bytes; i++) {
		char c = (char)message->payload[i];

		ret_text[i] = iscntrl((unsigned char)c) ? '?' : c;
	}
	ret_text[message->bytes] = '\0';
	return 0;
}

/* ---- RAM blocks, the switch ----------------------------------------------------------------------- */

static bool is_name(const char name[SNAPSHOT_NAME_BYTES])
{
	size_t length = strnlen(name, SNAPSHOT_NAME_BYTES);

	for (size_t i = 0; i < length; i++)
		if (name[i] < 0x21 || name[i] > 0x7e)
			return false;
	return length && length < SNAPSHOT_NAME_BYTES;
}

int wire_read_blocks(const struct wire_message *message, struct snapshot_image *ret_layout,
		     char why[SNAPSHOT_WHY_BYTES])
{
	size_t count = message->bytes / sizeof(struct snapshot_block);

	*ret_layout = (struct snapshot_image){ 0 };
	if (!count || count > SNAPSHOT_BLOCKS || message->bytes % sizeof(struct snapshot_block))
		return wrong(why, "RAM blocks of such a length", message->bytes);
	for (size_t i = 0; i < count; i++) {
		struct snapshot_block b;

		memcpy(&b, message->payload + i * sizeof b, sizeof b);
		if (!is_name(b.name))
			return wrong(why, "the name of a RAM block", i);
		for (size_t n = 0; n < i; n++)
			if (!strcmp(ret_layout->block[n].name, b.name))
				return wrong(why, "two RAM blocks of one name", i);
		if (!b.pages || b.pages > UINT64_MAX / OS_PAGE_BYTES / SNAPSHOT_BLOCKS)
			return wrong(why, "the pages of a RAM block", b.pages);
		memcpy(ret_layout->block[i].name, b.name, sizeof b.name);
		ret_layout->block[i].pages = b.pages;
		ret_layout->block[i].ram_page = ret_layout->pages;
		ret_layout->pages += b.pages;
	}
	ret_layout->blocks = (uint32_t)count;
	return 0;
}

int wire_read_switch(const struct wire_message *message, struct wire_switch *ret_switch, char why[SNAPSHOT_WHY_BYTES])
{
	if (message->bytes != sizeof *ret_switch)
		return wrong(why, "a switch of such a length", message->bytes);
	memcpy(ret_switch, message->payload, sizeof *ret_switch);
	return 0;
}

/* ---- pages ------------------------------------------------------------------------------------------ */

/* 0, and what of the contents is the run's in `*data_pages`. */
static int check_run(const struct wire_run *run, const struct wire_limits *limits, uint64_t *data_pages,
		     char why[SNAPSHOT_WHY_BYTES])
{
	if (run->kind >= WIRE_KINDS)
		return wrong(why, "pages of no known kind", run->kind);
	if (!run->pages || run->page >= limits->pages || run->pages > limits->pages - run->page)
		return wrong(why, "pages beyond RAM", run->page);
	if (run->kind != WIRE_VOLUME && run->volume)
		return wrong(why, "a volume where there is none", run->volume);
	if ((run->kind == WIRE_MISSING || run->kind == WIRE_DATA) && run->value)
		return wrong(why, "a value where there is none", run->value);
	if (run->kind == WIRE_DATA)
		*data_pages += run->pages;
	if (run->kind != WIRE_VOLUME)
		return 0;
	if (run->volume >= limits->volumes || !limits->volume_pages[run->volume])
		return wrong(why, "pages of a volume that is not there", run->volume);
	if (run->value >= limits->volume_pages[run->volume] ||
	    run->pages > limits->volume_pages[run->volume] - run->value)
		return wrong(why, "pages beyond the end of a volume", run->value);
	return 0;
}

int wire_read_pages(const struct wire_message *message, const struct wire_limits *limits,
		    struct wire_pages *ret_pages, char why[SNAPSHOT_WHY_BYTES])
{
	struct wire_pages_header h;
	uint64_t data_pages = 0;
	size_t rest;

	if (message->bytes < sizeof h)
		return wrong(why, "pages of such a length", message->bytes);
	memcpy(&h, message->payload, sizeof h);
	rest = message->bytes - sizeof h;
	if (!h.runs || h.runs > WIRE_RUNS_MAX || h.runs > rest / sizeof(struct wire_run))
		return wrong(why, "so many runs of pages", h.runs);
	rest -= h.runs * sizeof(struct wire_run);
	if (h.reserved || h.data_pages > WIRE_DATA_PAGES_MAX)
		return wrong(why, "so much contents", h.data_pages);
	if (rest != (h.packed_bytes ? h.packed_bytes : (size_t)h.data_pages << OS_PAGE_SHIFT) ||
	    (h.packed_bytes && !h.data_pages))
		return wrong(why, "contents of such a length", rest);
	*ret_pages = (struct wire_pages){
		.runs = h.runs, .data_pages = h.data_pages, .packed_bytes = h.packed_bytes,
		.run = (const struct wire_run *)(const void *)(message->payload + sizeof h),
		.data = message->payload + sizeof h + h.runs * sizeof(struct wire_run),
	};
	for (uint32_t i = 0; i < h.runs; i++) {
		int r = check_run(&ret_pages->run[i], limits, &data_pages, why);

		if (r)
			return r;
	}
	return data_pages != h.data_pages ? wrong(why, "runs that do not agree with the contents", data_pages) : 0;
}

int wire_unpack(const struct wire_pages *pages, uint8_t *room, const uint8_t **ret_data, char why[SNAPSHOT_WHY_BYTES])
{
	size_t bytes = (size_t)pages->data_pages << OS_PAGE_SHIFT;

	*ret_data = pages->data;
	if (!pages->packed_bytes)
		return 0;
	*ret_data = room;
	if (ZSTD_decompress(room, bytes, pages->data, pages->packed_bytes) != bytes)
		return wrong(why, "contents that cannot be unpacked", pages->packed_bytes);
	return 0;
}

int wire_read_wanted(const struct wire_message *message, uint64_t pages, const uint64_t **ret_pages,
		     size_t *ret_count, char why[SNAPSHOT_WHY_BYTES])
{
	*ret_pages = (const uint64_t *)(const void *)message->payload;
	*ret_count = message->bytes / sizeof **ret_pages;
	if (!*ret_count || *ret_count > WIRE_WANTED_MAX || message->bytes % sizeof **ret_pages)
		return wrong(why, "wanted pages of such a length", message->bytes);
	for (size_t i = 0; i < *ret_count; i++)
		if ((*ret_pages)[i] >= pages)
			return wrong(why, "a wanted page beyond RAM", (*ret_pages)[i]);
	return 0;
}

int wire_read_files(const struct wire_message *message, uint32_t count, bool *ret_ballot,
		    const struct digest **ret_digests, char why[SNAPSHOT_WHY_BYTES])
{
	struct wire_files files;

	if (message->bytes < sizeof files)
		return wrong(why, "files of such a length", message->bytes);
	memcpy(&files, message->payload, sizeof files);
	if (files.count != count || message->bytes != sizeof files + (size_t)count * DIGEST_BYTES)
		return wrong(why, "so many files", files.count);
	if (files.ballot > 1)
		return wrong(why, "the flags of files", files.ballot);
	*ret_ballot = files.ballot;
	*ret_digests = (const struct digest *)(const void *)(message->payload + sizeof files);
	return 0;
}

int wire_read_owed(const struct wire_message *message, uint64_t pages, const struct wire_owed **ret_owed,
		   size_t *ret_count, char why[SNAPSHOT_WHY_BYTES])
{
	*ret_owed = (const struct wire_owed *)(const void *)message->payload;
	*ret_count = message->bytes / sizeof **ret_owed;
	if (!*ret_count || *ret_count > WIRE_OWED_MAX || message->bytes % sizeof **ret_owed)
		return wrong(why, "missing pages of such a length", message->bytes);
	for (size_t i = 0; i < *ret_count; i++) {
		const struct wire_owed *owed = &(*ret_owed)[i];

		if (!owed->pages || owed->page >= pages || owed->pages > pages - owed->page)
			return wrong(why, "missing pages beyond RAM", owed->page);
	}
	return 0;
}

int wire_read_have(const struct wire_message *message, const uint64_t **ret_digests, size_t *ret_count,
		   char why[SNAPSHOT_WHY_BYTES])
{
	*ret_digests = (const uint64_t *)(const void *)message->payload;
	*ret_count = message->bytes / sizeof **ret_digests;
	return !*ret_count || *ret_count > WIRE_HAVE_MAX || message->bytes % sizeof **ret_digests
		       ? wrong(why, "digests of such a length", message->bytes) : 0;
}

int wire_read_same(const struct wire_message *message, uint64_t pages, const struct wire_same **ret_same,
		   size_t *ret_count, char why[SNAPSHOT_WHY_BYTES])
{
	*ret_same = (const struct wire_same *)(const void *)message->payload;
	*ret_count = message->bytes / sizeof **ret_same;
	if (!*ret_count || *ret_count > WIRE_SAME_MAX || message->bytes % sizeof **ret_same)
		return wrong(why, "equal pages of such a length", message->bytes);
	for (size_t i = 0; i < *ret_count; i++)
		if ((*ret_same)[i].page >= pages)
			return wrong(why, "an equal page beyond RAM", (*ret_same)[i].page);
	return 0;
}

int wire_read_hints(const struct wire_message *message, const struct wire_limits *limits,
		    const struct wire_hint **ret_hints, size_t *ret_count, char why[SNAPSHOT_WHY_BYTES])
{
	*ret_hints = (const struct wire_hint *)(const void *)message->payload;
	*ret_count = message->bytes / sizeof **ret_hints;
	if (!*ret_count || *ret_count > WIRE_HINTS_MAX || message->bytes % sizeof **ret_hints)
		return wrong(why, "hints of such a length", message->bytes);
	for (size_t i = 0; i < *ret_count; i++) {
		const struct wire_hint *hint = &(*ret_hints)[i];

		if (hint->page >= limits->pages)
			return wrong(why, "a hint for a page beyond RAM", hint->page);
		if (hint->file >= WIRE_HINT_FILES || !(limits->disks >> hint->file & 1))
			return wrong(why, "a hint at a disk that is not there", hint->file);
		if (hint->file_page >= WIRE_HINT_PAGES || hint->reserved)
			return wrong(why, "a hint at a place that no disk has", hint->file_page);
	}
	return 0;
}

/* ---- making them ------------------------------------------------------------------------------------- */

static bool continues(const struct wire_run *last, const struct wire_run *run)
{
	if (last->kind != run->kind || last->volume != run->volume || last->page + last->pages != run->page)
		return false;
	if (last->pages > UINT32_MAX - run->pages)
		return false;
	return run->value == (run->kind == WIRE_VOLUME ? last->value + last->pages : last->value);
}

bool wire_add(struct wire_batch *batch, const struct wire_run *run, const uint8_t *contents)
{
	struct wire_run *last = batch->runs ? &batch->run[batch->runs - 1] : NULL;

	if (run->kind == WIRE_DATA && batch->data_pages == WIRE_DATA_PAGES_MAX)
		return false;
	if (last && continues(last, run))
		last->pages += run->pages;
	else if (batch->runs == WIRE_RUNS_MAX)
		return false;
	else
		batch->run[batch->runs++] = *run;
	if (run->kind == WIRE_DATA)
		memcpy(batch->data + ((size_t)batch->data_pages++ << OS_PAGE_SHIFT), contents, OS_PAGE_BYTES);
	return true;
}

size_t wire_close(struct wire_batch *batch, int level, uint8_t *room)
{
	struct wire_pages_header h = { .runs = batch->runs, .data_pages = batch->data_pages };
	size_t runs = batch->runs * sizeof batch->run[0], bytes = (size_t)batch->data_pages << OS_PAGE_SHIFT, packed;
	uint8_t *to = room + sizeof h + runs;

	memcpy(room + sizeof h, batch->run, runs);
	/* (No more room than the contents have as they are: else it does not make them smaller.) */
	packed = level && bytes ? ZSTD_compress(to, bytes - 1, batch->data, bytes, level) : 0;
	if (packed && !ZSTD_isError(packed))
		h.packed_bytes = (uint32_t)(bytes = packed);
	else
		memcpy(to, batch->data, bytes);
	memcpy(room, &h, sizeof h);
	batch->runs = batch->data_pages = 0;
	return sizeof h + runs + bytes;
}
