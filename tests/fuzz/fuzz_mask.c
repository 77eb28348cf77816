/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Bytes as a sequence of transitions on guest RAM with masked pages, while a thread makes what is touched. What a page
 * has to hold is known at any time; each operation is followed by reads of some pages, the last one by reads of all,
 * and by a comparison of the entries with the mappings that the kernel has. A page whose contents are free (an
 * overlay or a mask that failed over it) is written before it is read. In the end nothing may be left in the store.
 *
 * Input: operations of one to five bytes (see `operations`). With FUZZ_TRACE=1 it says what each input does.
 */
#include "../unit/mask_server.h"

#include "fuzz.h"

#define PAGES 64
#define FILE_PAGES 96
#define MAX_OPERATIONS 48
#define WORDS 255 /* known beforehand: reclaim masks one more, and packs what comes then */
#define STORE_BYTES (2u * 65536)

const struct fuzz_target fuzz_target = { "mask", 256, NULL, false };

static struct {
	struct rig rig;
	struct fuzz_reader bytes;
	uint64_t tag[PAGES];
	uint64_t next_tag;
	struct mask_server server;
	int store, store_file;
	bool trace;
} f;

/* ---- guest RAM ------------------------------------------------------------------------------------- */

static void open_store(void)
{
	uint64_t number;

	f.store = os_memfd_create("store", 0, false);
	f.store_file = os_memfd_create("store-file", 0, false);
	if (f.store < 0 || f.store_file < 0 || ram_reclaim_open(f.rig.ram, f.store, STORE_BYTES, true))
		abort();
	ram_lock(f.rig.ram);
	for (uint64_t i = 1; i <= WORDS; i++)
		if (ram_add_word(f.rig.ram, i, &number))
			abort();
	ram_unlock(f.rig.ram);
}

static void open_all(void)
{
	static const uint64_t block_pages[RIG_BLOCKS] = { PAGES, 1 };
	int r;

	rig_open(&f.rig, block_pages, FILE_PAGES, UINT64_C(1) << 40);
	r = mask_server_start(&f.server, f.rig.ram);
	if (r) {
		printf("skipped: no userfaultfd for the kernel's faults (%s)\n", strerror(-r));
		exit(77);
	}
	open_store();
	memset(f.tag, 0, sizeof f.tag);
	f.next_tag = UINT64_C(0x6e57) << 48;
}

static void close_all(void)
{
	for (unsigned p = 0; p < OS_FAULT_POINTS; p++)
		os_fault_arm((enum os_fault_point)p, 0, 0);
	mask_server_stop(&f.server);
	rig_close(&f.rig);
	close(f.server.uffd); /* after the mappings that it watches */
	close(f.store);
	close(f.store_file);
}

/* ---- operations ------------------------------------------------------------------------------------ */

static uint8_t next(void) { return fuzz_byte(&f.bytes); }

static struct ram_block *block(void) { return f.rig.blocks[0].ram; }

struct part {
	uint64_t page, pages;
};

static struct part next_part(const char *what)
{
	struct part p = { .page = next() % PAGES };

	p.pages = 1 + next() % (PAGES - p.page);
	if (f.trace)
		fprintf(stderr, "%s page %" PRIu64 " +%" PRIu64 "\n", what, p.page, p.pages);
	return p;
}

static uint64_t file_tag(unsigned file, uint64_t file_page)
{
	return rig_file_tag(file, f.rig.files[file].version, file_page);
}

static void guest_writes(uint64_t page)
{
	f.tag[page] = ++f.next_tag;
	rig_write(rig_hva(&f.rig, 0, page), f.tag[page]);
}

static void do_write(void)
{
	guest_writes(next_part("write").page);
}

static void do_discard(void)
{
	struct part p = next_part("discard");

	ram_lock(f.rig.ram);
	(void)ram_discard(f.rig.ram, block(), p.page, p.pages);
	ram_unlock(f.rig.ram);
	for (uint64_t i = 0; i < p.pages; i++)
		f.tag[p.page + i] = 0;
}

static void do_overlay(void)
{
	struct part p = next_part("overlay");
	unsigned file = next() % RIG_FILES;
	uint64_t file_page = next() % (FILE_PAGES - PAGES);
	int r;

	ram_lock(f.rig.ram);
	r = ram_map_overlay(f.rig.ram, block(), p.page, p.pages, f.rig.files[file].index, file_page);
	ram_unlock(f.rig.ram);
	for (uint64_t i = 0; i < p.pages; i++) {
		if (r)
			guest_writes(p.page + i);
		else
			f.tag[p.page + i] = file_tag(file, file_page + i);
	}
}

/* Back to base by a settle: contents stay. */
static void do_settle(void)
{
	struct part p = next_part("settle");

	ram_lock(f.rig.ram);
	(void)ram_settle(f.rig.ram, block(), p.page, p.pages, NULL);
	ram_unlock(f.rig.ram);
}

/* One page in four stays as it is, if base holds it. */
static uint64_t mask_entry(unsigned how, uint64_t page, uint64_t at, uint64_t *ret_tag)
{
	uint64_t number;

	*ret_tag = 0;
	switch (how % 4) {
	case 0:
		return ENTRY_WATCHED;
	case 1:
		*ret_tag = UINT64_C(0x1717) << 48 | (at & 3);
		if (ram_add_word(f.rig.ram, *ret_tag, &number))
			abort();
		return entry_masked(ENTRY_WORDS, number);
	default:
		*ret_tag = file_tag(how & 1, (at + page) % FILE_PAGES);
		return entry_masked(f.rig.files[how & 1].index, (at + page) % FILE_PAGES);
	}
}

/* Masks want base with nothing in it: a discard makes it. */
static void do_mask(void)
{
	struct part p = next_part("mask");
	uint64_t entries[PAGES], tags[PAGES];
	uint8_t how = next(), at = next();
	int r;

	os_fault_arm(OS_FAULT_PUNCH, 0, 0); /* or the discard leaves zeros there */
	ram_lock(f.rig.ram);
	(void)ram_discard(f.rig.ram, block(), p.page, p.pages);
	r = ram_has_overlay(block(), p.page, p.pages) ? -EBUSY : 0; /* a discard that could not map */
	for (uint64_t i = 0; i < p.pages; i++)
		entries[i] = mask_entry(how >> (i & 3), p.page + i, at, &tags[i]);
	if (!r)
		r = ram_mask(f.rig.ram, block(), p.page, p.pages, entries);
	ram_unlock(f.rig.ram);
	for (uint64_t i = 0; i < p.pages; i++)
		f.tag[p.page + i] = r ? 0 : tags[i];
}

static void do_unmask(void)
{
	if (f.trace)
		fprintf(stderr, "unmask\n");
	(void)ram_unmask(f.rig.ram);
}

/* Given up and rewritten, unless something of it could not be copied. */
static void do_rewrite(void)
{
	struct rig_file *file = &f.rig.files[next() % RIG_FILES];

	if (f.trace)
		fprintf(stderr, "rewrite\n");
	if (!ram_privatize(f.rig.ram, file->index))
		rig_write_file(file, (file->version + 1) & 0xffff);
}

/* The range lock is held: what is touched must be copied. */
static void do_read_locked(void)
{
	uint64_t page = next_part("read, locked").page;

	ram_lock(f.rig.ram);
	if (!rig_holds(rig_hva(&f.rig, 0, page), f.tag[page]))
		abort();
	ram_unlock(f.rig.ram);
}

static void do_zap(void)
{
	struct part p = next_part("zap");

	ram_lock(f.rig.ram);
	(void)ram_zap_base(f.rig.ram, block(), p.page, p.pages);
	ram_unlock(f.rig.ram);
}

/* What was picked is taken out of memory, or stays; either way it holds what it held. */
static bool is_picked(void *ctx, uint64_t entry)
{
	uint8_t *picks = ctx;

	(void)entry;
	*picks = (uint8_t)(*picks << 1 | *picks >> 7);
	return *picks & 1;
}

static void do_reclaim(void)
{
	struct part p = next_part("reclaim");
	uint8_t picks = next();

	for (uint64_t done = 0, pages = 0; done < p.pages; done += pages) {
		pages = p.pages;
		(void)ram_reclaim(f.rig.ram, 0, p.page + done, p.pages - done, is_picked, &picks, &pages);
	}
}

/* A page that a device is writing is not taken. */
static void do_read_in_flight(void)
{
	struct part p = next_part("read in flight");
	struct iovec iov = { rig_hva(&f.rig, 0, p.page), os_bytes(p.pages) };
	struct ram_read read = { .iov = &iov, .count = 1 };
	uint8_t picks = 0xff;
	uint64_t pages;

	ram_read_begins(f.rig.ram, &read);
	guest_writes(p.page); /* the device, through what it has pinned */
	(void)ram_reclaim(f.rig.ram, 0, p.page, 1, is_picked, &picks, &pages);
	if (!rig_has_memory_beneath(&f.rig, 0, p.page) && entry_source(rig_entry(&f.rig, 0, p.page)) != ENTRY_OVERLAY)
		abort();
	ram_read_ends(f.rig.ram, &read);
}

/* From the first time on what is packed goes there, and nowhere else. */
static void do_file(void)
{
	int r = ram_reclaim_open(f.rig.ram, f.store_file, STORE_BYTES, false);

	if (r && r != -EALREADY)
		abort();
}

static void do_allow(void)
{
	ram_reclaim_allow(f.rig.ram, next() & 1);
}

static void do_arm(void)
{
	static const enum os_fault_point points[] = { OS_FAULT_MAP_FILE, OS_FAULT_MAP_BASE, OS_FAULT_REGISTER,
						      OS_FAULT_STORAGE_READ, OS_FAULT_MARK, OS_FAULT_WRITE,
						      OS_FAULT_PUNCH, OS_FAULT_FLUSH };
	enum os_fault_point point = points[next() % 8];

	os_fault_arm(point, 1 + next() % 4, ENOMEM);
	if (f.trace)
		fprintf(stderr, "arm %u\n", point);
}

static void (*const operations[])(void) = {
	do_mask, do_write, do_discard, do_overlay, do_settle, do_unmask, do_rewrite, do_read_locked, do_zap, do_arm, do_mask,
	do_reclaim, do_read_in_flight, do_reclaim, do_allow, do_file,
};
#define OPERATIONS (sizeof operations / sizeof operations[0])

/* ---- one input ------------------------------------------------------------------------------------- */

static void report(const uint8_t *data, const char *why)
{
	fprintf(stderr, "fuzz_mask: after %zu bytes: %s\ninput:", (size_t)(f.bytes.at - data), why);
	for (const uint8_t *at = data; at < f.bytes.end; at++)
		fprintf(stderr, " %02x", *at);
	fprintf(stderr, "\n");
	abort();
}

static const char *check_page(uint64_t page)
{
	uint64_t got = 0;

	if (!rig_tag_of_words((const uint64_t *)(const void *)rig_hva(&f.rig, 0, page), &got) || got != f.tag[page])
		return rig_wrong(&f.rig, "page %" PRIu64 " holds %" PRIx64 " instead of %" PRIx64, page, got, f.tag[page]);
	return NULL;
}

static const char *check_maps(void)
{
	uint64_t maps, splits;

	rig_read_maps(&f.rig);
	return rig_check_block_maps(&f.rig, 0, &maps, &splits);
}

/* All pages have been read. */
static const char *check_store(void)
{
	struct ram_reclaim_counts c;

	ram_get_reclaim_counts(f.rig.ram, &c);
	if (f.trace)
		fprintf(stderr, "%" PRIu64 " spilled, %" PRIu64 " words, %" PRIu64 " returned\n", c.spilled, c.words, c.returned);
	return c.spilled_now || c.spill_bytes_now || c.spill_file_bytes_now ? "a slot of the store is left" : NULL;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	const char *why = NULL;

	f.bytes = (struct fuzz_reader){ data, data + bytes };
	f.trace = getenv("FUZZ_TRACE");
	open_all();
	for (unsigned n = 0; !why && f.bytes.at < f.bytes.end && n < MAX_OPERATIONS; n++) {
		uint8_t operation = next();

		operations[operation % OPERATIONS]();
		why = check_page((operation / OPERATIONS * 7 + n) % PAGES);
	}
	for (uint64_t i = 0; !why && i < PAGES; i++)
		why = check_page(i);
	if (!why)
		why = check_maps();
	if (!why)
		why = check_store();
	if (why)
		report(data, why);
	close_all();
	return 0;
}
