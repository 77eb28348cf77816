/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Messages of a hostile peer. What is accepted refers to nothing beyond RAM, a volume, or the message itself.
 *
 * Input: who has sent it (1 byte: the source if it is odd), the type (1), and the payload.
 */
#include "fuzz.h"

#include "migrate/wire.h"
#include "os/os.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define RAM_PAGES 1000u
#define FILES 2u

static const struct fuzz_token tokens[] = {
	FUZZ_TEXT("LTMIGRAT"),
	FUZZ_TEXT("\xff\xff\xff\xff\xff\xff\xff\xff"),
	FUZZ_TEXT("\xe7\x03\x00\x00\x00\x00\x00\x00"), /* the last page */
	FUZZ_TEXT("\x28\xb5\x2f\xfd"),                 /* a zstd frame begins */
	FUZZ_TEXT("pc.ram\x00"),
	{ NULL, 0 },
};

const struct fuzz_target fuzz_target = { "wire", 8192, tokens, false };

static const struct wire_limits limits = { .pages = RAM_PAGES, .volumes = 3, .volume_pages = { 100, 0, 1 }, .disks = 5 };

static void check_runs(const struct wire_message *m, const struct wire_pages *pages)
{
	const uint8_t *end = m->payload + m->bytes;
	uint64_t data_pages = 0;

	fuzz_require((const uint8_t *)(pages->run + pages->runs) <= end && pages->data <= end);
	for (uint32_t i = 0; i < pages->runs; i++) {
		const struct wire_run *run = &pages->run[i];

		fuzz_require(run->pages && run->page < RAM_PAGES && run->pages <= RAM_PAGES - run->page);
		data_pages += run->kind == WIRE_DATA ? run->pages : 0;
		if (run->kind == WIRE_VOLUME)
			fuzz_require(run->volume < limits.volumes && run->pages <= limits.volume_pages[run->volume] &&
				     run->value <= limits.volume_pages[run->volume] - run->pages);
	}
	fuzz_require(data_pages == pages->data_pages && data_pages <= WIRE_DATA_PAGES_MAX);
	if (!pages->packed_bytes)
		fuzz_require((size_t)(end - pages->data) == data_pages << OS_PAGE_SHIFT);
}

static void check_pages(const struct wire_message *m)
{
	static uint8_t room[WIRE_DATA_PAGES_MAX << OS_PAGE_SHIFT];
	char why[SNAPSHOT_WHY_BYTES] = "";
	struct wire_pages pages;
	const uint8_t *data;
	int r = wire_read_pages(m, &limits, &pages, why);

	fuzz_require(!r || (r == -EPROTO && why[0]));
	if (r)
		return;
	check_runs(m, &pages);
	r = wire_unpack(&pages, room, &data, why);
	fuzz_require(!r || (r == -EPROTO && why[0]));
}

static void check_others(const struct wire_message *m)
{
	char why[SNAPSHOT_WHY_BYTES] = "", text[WIRE_TEXT_MAX];
	struct snapshot_image layout;
	struct wire_hello hello;
	const struct digest *digests;
	const struct wire_owed *owed;
	const struct wire_same *same;
	const struct wire_hint *hint;
	const uint64_t *wanted;
	bool ballot;
	size_t count;

	if (m->type == WIRE_BLOCKS && !wire_read_blocks(m, &layout, why)) {
		uint64_t pages = 0;

		for (uint32_t i = 0; i < layout.blocks; i++) {
			fuzz_require(layout.block[i].pages && layout.block[i].ram_page == pages && layout.block[i].name[0]);
			pages += layout.block[i].pages;
		}
		fuzz_require(pages == layout.pages);
	}
	if (m->type == WIRE_HAVE && !wire_read_have(m, &wanted, &count, why))
		fuzz_require(count && (const uint8_t *)(wanted + count) <= m->payload + m->bytes);
	if (m->type == WIRE_SAME && !wire_read_same(m, RAM_PAGES, &same, &count, why))
		for (size_t i = 0; i < count; i++)
			fuzz_require((const uint8_t *)(same + i + 1) <= m->payload + m->bytes && same[i].page < RAM_PAGES);
	if (m->type == WIRE_HINT && !wire_read_hints(m, &limits, &hint, &count, why))
		for (size_t i = 0; i < count; i++)
			fuzz_require((const uint8_t *)(hint + i + 1) <= m->payload + m->bytes && hint[i].page < RAM_PAGES &&
				     hint[i].file < WIRE_HINT_FILES && limits.disks >> hint[i].file & 1 &&
				     hint[i].file_page < WIRE_HINT_PAGES);
	if ((m->type == WIRE_WANT || m->type == WIRE_LACK || m->type == WIRE_STALE) &&
	    !wire_read_wanted(m, RAM_PAGES, &wanted, &count, why))
		for (size_t i = 0; i < count; i++)
			fuzz_require(wanted[i] < RAM_PAGES);
	if (m->type == WIRE_OWED && !wire_read_owed(m, RAM_PAGES, &owed, &count, why))
		for (size_t i = 0; i < count; i++)
			fuzz_require(owed[i].pages && owed[i].page < RAM_PAGES && owed[i].pages <= RAM_PAGES - owed[i].page);
	if (m->type == WIRE_FILES && !wire_read_files(m, FILES, &ballot, &digests, why))
		fuzz_require((const uint8_t *)(digests + FILES) <= m->payload + m->bytes);
	if ((m->type == WIRE_REFUSE || m->type == WIRE_FAILED) && !wire_read_text(m, text, why))
		for (size_t i = 0; text[i]; i++)
			fuzz_require((uint8_t)text[i] >= 0x20);
	if (m->type == WIRE_HELLO && !wire_read_hello(m, &hello, why))
		fuzz_require(hello.version == WIRE_VERSION && hello.page_bytes == OS_PAGE_BYTES);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	char why[SNAPSHOT_WHY_BYTES] = "";
	struct wire_header header;
	struct wire_message m;
	uint8_t *payload;

	if (bytes < 2)
		return 0;
	header = (struct wire_header){ .type = data[1], .bytes = (uint32_t)(bytes - 2) };
	if (wire_check_header(&header, data[0] & 1, why)) {
		fuzz_require(why[0]);
		return 0;
	}
	payload = malloc(bytes); /* as long as it is: what lies behind it is not the message's */
	fuzz_require(payload);
	memcpy(payload, data + 2, bytes - 2);
	m = (struct wire_message){ (enum wire_type)header.type, payload, bytes - 2 };
	if (m.type == WIRE_PAGES)
		check_pages(&m);
	else
		check_others(&m);
	free(payload);
	return 0;
}
