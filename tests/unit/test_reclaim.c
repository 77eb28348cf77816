/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* Memory of base that is given back (core/reclaim.c, core/spill.c): nothing is lost, whatever runs
 * beside. */
#include "mask_server.h"

#include "activity/cold.h"
#include "activity/states.h"
#include "core/spill.h"

#include <setjmp.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <sys/uio.h>

#include <cmocka.h>

#define PAGES 1200 /* three units, the last one short */
#define FILE_PAGES 512
#define SLAB 65536
#define STORE_BYTES (64 << 20)
#define AROUND 16 /* pages that the kernel maps together */

static struct {
	struct rig rig;
	struct mask_server server;
	int store;
} t;

#define RAM (t.rig.ram)
#define BLOCK (t.rig.blocks[0].ram)

static int setup(void **state)
{
	static const uint64_t block_pages[RIG_BLOCKS] = { PAGES, 8 };

	(void)state;
	rig_open(&t.rig, block_pages, FILE_PAGES, 1000);
	t.store = os_memfd_create("store", 0, false);
	return mask_server_start(&t.server, RAM);
}

static int teardown(void **state)
{
	(void)state;
	assert_int_equal(os_fault_parse("write:delay:0"), 0);
	for (unsigned p = 0; p < OS_FAULT_POINTS; p++)
		os_fault_arm((enum os_fault_point)p, 0, 0);
	mask_server_stop(&t.server);
	rig_close(&t.rig);
	close(t.server.uffd); /* after the mappings that it watches */
	close(t.store);
	return 0;
}

/* ---- help --------------------------------------------------------------------------------------- */

static uint8_t *hva(uint64_t page) { return rig_hva(&t.rig, 0, page); }

static uint64_t random_word(uint64_t *state)
{
	uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);

	z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
	z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
	return z ^ z >> 31;
}

/* Contents that follow from a seed; with `words` of noise, which does not pack, and the rest repeated. */
static void fill(uint64_t *page, uint64_t seed, size_t noise)
{
	uint64_t state = seed;

	for (size_t i = 0; i < RIG_PAGE_WORDS; i++)
		page[i] = i < noise ? random_word(&state) : seed + i % 4;
}

#define SMALL 8
#define NOISE RIG_PAGE_WORDS

static void put_at(uint8_t *at, uint64_t seed, size_t noise)
{
	uint64_t words[RIG_PAGE_WORDS];

	fill(words, seed, noise);
	memcpy(at, words, sizeof words);
}

static bool has_at(const uint8_t *at, uint64_t seed, size_t noise)
{
	uint64_t words[RIG_PAGE_WORDS];

	fill(words, seed, noise);
	return !memcmp(at, words, sizeof words);
}

static void put(uint64_t page, uint64_t seed, size_t noise) { put_at(hva(page), seed, noise); }
static bool has(uint64_t page, uint64_t seed, size_t noise) { return has_at(hva(page), seed, noise); }

static void open_store(uint64_t bytes, bool in_memory)
{
	assert_int_equal(ram_reclaim_open(RAM, t.store, bytes, in_memory), 0);
}

static bool all(void *ctx, uint64_t entry)
{
	(void)ctx;
	(void)entry;
	return true;
}

static bool by_activity(void *ctx, uint64_t entry) { return entry_short(entry) == *(unsigned *)ctx; }

/* The first failure; goes on behind it. */
static int reclaim_if(ram_wanted wanted, void *ctx)
{
	int r = 0, one;

	for (uint64_t page = 0, pages = 0;
	     (one = ram_reclaim(RAM, 0, page, UINT64_MAX, wanted, ctx, &pages)) != -ENOENT;
	     page += pages)
		r = r ? r : one;
	return r;
}

static int reclaim(void) { return reclaim_if(all, NULL); }

static struct ram_reclaim_counts counts(void)
{
	struct ram_reclaim_counts c;

	ram_get_reclaim_counts(RAM, &c);
	return c;
}

static enum entry_source source(uint64_t page)
{
	(void)counts(); /* the mask lock: whoever has made a page wakes us before he writes its entry */
	return entry_source(rig_entry(&t.rig, 0, page));
}

static bool in_memory(uint64_t page) { return rig_has_memory_beneath(&t.rig, 0, page); }

static void check_maps(void)
{
	struct ram_counts c;
	uint64_t maps, splits;
	const char *why;

	ram_get_counts(RAM, &c);
	rig_read_maps(&t.rig);
	why = rig_check_block_maps(&t.rig, 0, &maps, &splits);
	if (why)
		fail_msg("%s", why);
	assert_int_equal(splits, 0);
	assert_int_equal(maps + 1, c.maps); /* and the other block */
}

static off_t store_bytes(void)
{
	struct stat st;

	assert_int_equal(fstat(t.store, &st), 0);
	return (off_t)st.st_blocks * 512;
}

/* ---- tests --------------------------------------------------------------------------------------- */

static void test_all_kinds(void **state)
{
	enum { ZERO, WORD, SMALL_ONE, NOISY, KINDS };
	struct ram_reclaim_counts c;

	(void)state;
	open_store(STORE_BYTES, true);
	for (uint64_t i = 0; i < PAGES; i++) {
		if (i % KINDS <= WORD)
			rig_write(hva(i), i % KINDS == ZERO ? 0 : 1000 + i % 3);
		else
			put(i, i, i % KINDS == NOISY ? NOISE : SMALL);
	}
	assert_int_equal(reclaim(), 0);
	check_maps();
	c = counts();
	assert_int_equal(c.zeros, PAGES / KINDS);
	assert_int_equal(c.words, PAGES / KINDS);
	assert_int_equal(c.spilled, PAGES / KINDS);
	assert_int_equal(c.spilled_now, PAGES / KINDS);
	assert_int_equal(c.left_unpacked, PAGES / KINDS);
	assert_int_equal(c.left_touched + c.left_reads + c.left_failed, 0);
	for (uint64_t i = 0; i < PAGES; i++)
		assert_int_equal(in_memory(i), i % KINDS == NOISY);
	assert_true(store_bytes() > 0);
	for (uint64_t i = 0; i < PAGES; i++) {
		if (i % KINDS <= WORD)
			assert_true(rig_holds(hva(i), i % KINDS == ZERO ? 0 : 1000 + i % 3));
		else
			assert_true(has(i, i, i % KINDS == NOISY ? NOISE : SMALL));
	}
	c = counts();
	assert_int_equal(c.returned, PAGES / KINDS);
	assert_int_equal(c.spilled_now, 0);
	assert_int_equal(c.spill_bytes_now, 0);
	assert_int_equal(store_bytes(), 0); /* the store gives memory back, too */
	assert_int_equal(t.server.error, 0);
	check_maps();
}

static bool is_file_system_with_cache(int fd, const void *view)
{
	uint8_t byte;

	assert_int_equal(pread(fd, &byte, 1, 0), 1);
	os_drop_cached(fd, 0, os_bytes(1));
	return os_residency_is_told(fd) && !os_resident_pages(view, 0, 1);
}

/* What a write-protected page is, and an untouched one beside it, after the unit is over. */
static void test_writable_after(void **state)
{
	(void)state;
	open_store(STORE_BYTES, true);
	for (uint64_t i = 0; i < PAGES; i++)
		put(i, i, NOISE); /* stays */
	assert_int_equal(reclaim(), 0);
	mask_server_stop(&t.server); /* nobody serves a fault any more: there must be none */
	for (uint64_t i = 0; i < PAGES; i++)
		put(i, i + 1, NOISE);
	for (uint64_t i = 0; i < PAGES; i++)
		assert_true(has(i, i + 1, NOISE));
	assert_int_equal(mask_server_start(&t.server, RAM), 0);
}

/* QEMU does it after a memory error: with MAP_FIXED, in the middle of what is watched. */
static void test_mapped_anew(void **state)
{
	enum { FIRST = 100, COUNT = 450 };

	(void)state;
	open_store(STORE_BYTES, true);
	for (uint64_t i = 0; i < PAGES; i++)
		put(i, i, SMALL);
	assert_int_equal(reclaim(), 0);
	ram_lock(RAM);
	os_fault_arm(OS_FAULT_STORAGE_READ, 1, EIO);
	assert_int_not_equal(ram_unmask_part(RAM, BLOCK, FIRST, COUNT), 0);
	os_fault_arm(OS_FAULT_STORAGE_READ, 0, 0);
	assert_int_equal(ram_unmask_part(RAM, BLOCK, FIRST, COUNT), 0);
	assert_ptr_equal(mmap(hva(FIRST), os_bytes(COUNT), PROT_READ | PROT_WRITE,
			      MAP_SHARED | MAP_FIXED, BLOCK->memfd,
			      (off_t)(BLOCK->memfd_offset + os_bytes(FIRST))),
			 hva(FIRST));
	ram_unlock(RAM);
	check_maps();
	assert_int_equal(counts().spilled_now, PAGES - COUNT);
	for (uint64_t i = 0; i < PAGES; i++)
		assert_true(has(i, i, SMALL));
	assert_int_equal(reclaim(), 0); /* it can be taken again */
	assert_int_equal(counts().spilled_now, PAGES);
	for (uint64_t i = 0; i < PAGES; i++)
		assert_true(has(i, i, SMALL));
}

/* The file system of the rig's files must have a page cache that can be dropped. */
static void test_overlays(void **state)
{
	struct rig_file *f = &t.rig.files[0];
	enum { FIRST = 40, COUNT = 300, ZAPPED = 128, WRITTEN = 250, COPIES = 5 };
	uint64_t left;
	void *view;

	(void)state;
	open_store(STORE_BYTES, true);
	ram_lock(RAM);
	assert_int_equal(ram_map_overlay(RAM, BLOCK, FIRST, COUNT, f->index, 0), 0);
	ram_unlock(RAM);
	for (uint64_t i = WRITTEN; i < COUNT; i += 10) /* and nobody has looked at that yet */
		put(FIRST + i, i, SMALL);
	assert_int_equal(fdatasync(f->fd_rw), 0);
	view = os_view_file(f->fd, os_bytes(COUNT), false);
	if (!is_file_system_with_cache(f->fd, view)) {
		os_unview_file(view, os_bytes(COUNT));
		skip();
	}
	for (uint64_t i = 0; i < WRITTEN; i++) /* in the page cache, and in the page table */
		assert_true(rig_holds(hva(FIRST + i), rig_file_tag(0, 0, i)));
	assert_int_equal(os_resident_pages(view, 0, COUNT), COUNT);
	ram_lock(RAM);
	assert_int_equal(ram_update_private(RAM, BLOCK, FIRST, ZAPPED), 0);
	assert_int_equal(ram_zap_clean(RAM, BLOCK, FIRST, ZAPPED), 0); /* as the scan does */
	ram_unlock(RAM);
	assert_int_equal(reclaim(), 0);
	assert_in_range(counts().clean, ZAPPED / 2, COUNT - 1); /* large folios go as a whole, or stay */
	left = COUNT - counts().clean;
	assert_in_range(os_resident_pages(view, 0, COUNT), left - COPIES,
			left); /* what is beneath a copy is not counted */
	for (uint64_t i = 0; i < COUNT; i++)
		assert_true(i >= WRITTEN && i % 10 == 0
				    ? has(FIRST + i, i, SMALL)
				    : rig_holds(hva(FIRST + i), rig_file_tag(0, 0, i)));
	os_unview_file(view, os_bytes(COUNT));
	check_maps();
}

/* Of a whole file goes what nobody shows, and what is wanted of that which is shown and in no page table. */
static void test_cache_of_a_file(void **state)
{
	struct rig_file *f = &t.rig.files[0];
	enum { FIRST = 40, COUNT = 128, HOT = 64 };
	unsigned cold = ACTIVITY_COLD;
	void *view;

	(void)state;
	assert_int_equal(ram_reclaim_cache(RAM, f->index, all, NULL), -EBUSY); /* no store yet */
	open_store(STORE_BYTES, true);
	assert_int_equal(ram_reclaim_cache(RAM, ENTRY_FILES, all, NULL), -ENOENT);
	assert_int_equal(fdatasync(f->fd_rw), 0);
	view = os_view_file(f->fd, os_bytes(FILE_PAGES), false);
	if (!is_file_system_with_cache(f->fd, view)) {
		os_unview_file(view, os_bytes(FILE_PAGES));
		skip();
	}
	os_expect_random(f->fd); /* single pages in the cache */
	os_drop_cached(f->fd, 0, os_bytes(FILE_PAGES));
	for (uint64_t i = 0; i < FILE_PAGES; i++) {
		uint64_t word;

		assert_int_equal(pread(f->fd, &word, sizeof word, (off_t)os_bytes(i)), sizeof word);
	}
	ram_lock(RAM);
	assert_int_equal(ram_map_overlay(RAM, BLOCK, FIRST, COUNT, f->index, 0), 0);
	for (uint64_t i = 0; i < PAGES; i++)
		ram_set_activity(RAM, BLOCK, i, entry_activity(i < FIRST + HOT ? ACTIVITY_HOT : ACTIVITY_COLD, 1));
	ram_unlock(RAM);
	assert_true(rig_holds(hva(FIRST + COUNT - 1), rig_file_tag(0, 0, COUNT - 1))); /* in the page table, and cold */
	assert_int_equal(os_resident_pages(view, 0, FILE_PAGES), FILE_PAGES);
	assert_int_equal(ram_reclaim_cache(RAM, f->index, by_activity, &cold), 0);
	assert_int_equal(os_resident_pages(view, 0, HOT), HOT);
	assert_in_range(os_resident_pages(view, 0, FILE_PAGES), HOT + 1, HOT + AROUND); /* mapped around it, too */
	if (os_cached_pages(f->fd, 0, os_bytes(1)) != UINT64_MAX)
		assert_int_equal(counts().clean, FILE_PAGES - os_resident_pages(view, 0, FILE_PAGES));
	for (uint64_t i = 0; i < COUNT; i++)
		assert_true(rig_holds(hva(FIRST + i), rig_file_tag(0, 0, i)));
	os_unview_file(view, os_bytes(FILE_PAGES));
	check_maps();
}

static void test_only_what_is_wanted(void **state)
{
	unsigned cold = ACTIVITY_COLD;

	(void)state;
	open_store(STORE_BYTES, true);
	ram_lock(RAM);
	for (uint64_t i = 0; i < PAGES; i++)
		ram_set_activity(RAM, BLOCK, i, entry_activity(i % 7 ? ACTIVITY_HOT : ACTIVITY_COLD, 1));
	ram_unlock(RAM);
	for (uint64_t i = 0; i < PAGES; i++)
		put(i, i, SMALL);
	assert_int_equal(reclaim_if(by_activity, &cold), 0);
	for (uint64_t i = 0; i < PAGES; i++)
		assert_int_equal(in_memory(i), i % 7 != 0);
	for (uint64_t i = 0; i < PAGES; i++)
		assert_true(has(i, i, SMALL));
	check_maps();
}

static void test_a_walk(void **state)
{
	struct cold_walk walk = { .unused_us = 3000000, .shortest_us = 1000000 };
	int r;

	(void)state;
	open_store(STORE_BYTES, true);
	ram_lock(RAM);
	for (uint64_t i = 0; i < PAGES; i++)
		ram_set_activity(RAM, BLOCK, i,
				 entry_activity(i < 500 ? ACTIVITY_COLDER : ACTIVITY_WARM, 1));
	ram_unlock(RAM);
	for (uint64_t i = 0; i < PAGES; i++)
		put(i, i, SMALL);
	while ((r = cold_step(RAM, &walk)) == 1)
		;
	assert_int_equal(r, 0);
	assert_int_equal(counts().spilled, 500);
	assert_int_equal(walk.slot + walk.page, 0);
	for (uint64_t i = 0; i < PAGES; i++)
		assert_int_equal(in_memory(i), i >= 500);
	while ((r = cold_step(RAM, &walk)) == 1) /* nothing is there to be taken again */
		;
	assert_int_equal(counts().spilled, 500);
	for (uint64_t i = 0; i < PAGES; i++)
		assert_true(has(i, i, SMALL));
}

static void test_full_store(void **state)
{
	struct ram_reclaim_counts c;

	(void)state;
	open_store(2 * SLAB, false);
	for (uint64_t i = 0; i < PAGES; i++)
		put(i, i, NOISE);
	assert_int_equal(reclaim(), -ENOSPC);
	c = counts();
	assert_int_equal(c.spilled, 2 * SLAB / OS_PAGE_BYTES);
	assert_true(c.left_failed > 0);
	for (uint64_t i = 0; i < PAGES; i++)
		assert_true(has(i, i, NOISE));
	assert_int_equal(counts().spill_file_bytes_now, 0);
	assert_int_equal(reclaim(), -ENOSPC); /* there was room again */
	assert_int_equal(counts().spilled, 4 * SLAB / OS_PAGE_BYTES);
	for (uint64_t i = 0; i < PAGES; i++)
		assert_true(has(i, i, NOISE));
	check_maps();
}

static void test_failures(void **state)
{
	static const enum os_fault_point points[] = { OS_FAULT_WRITE, OS_FAULT_PUNCH,
						      OS_FAULT_REGISTER };

	(void)state;
	open_store(STORE_BYTES, true);
	for (size_t p = 0; p < sizeof points / sizeof points[0]; p++) {
		struct ram_reclaim_counts before = counts(), c;

		for (uint64_t i = 0; i < PAGES; i++)
			put(i, i + p, SMALL);
		os_fault_arm(points[p], points[p] == OS_FAULT_WRITE ? 100 : 2, EIO);
		assert_int_equal(reclaim(), -EIO);
		c = counts();
		assert_true(c.spilled > before.spilled && c.spilled - before.spilled < PAGES);
		assert_int_equal(c.spilled - c.returned, c.spilled_now);
		for (uint64_t i = 0; i < PAGES; i++)
			assert_true(has(i, i + p, SMALL));
		assert_int_equal(counts().spill_bytes_now, 0); /* no slot is left behind */
		check_maps();
	}
}

/* Who waits for the page goes on waiting; it is tried again, and comes when it can be read. */
static void storage_fails_for_a_while(bool in_memory)
{
	open_store(STORE_BYTES, in_memory);
	put(7, 7, SMALL);
	assert_int_equal(reclaim(), 0);
	os_fault_arm(OS_FAULT_STORAGE_READ, 1, EIO);
	assert_true(has(7, 7, SMALL));
	assert_int_equal(t.server.error, -EIO);
	assert_int_equal(counts().spilled_now, 0);
}

static void test_storage_fails_for_a_while(void **state)
{
	(void)state;
	storage_fails_for_a_while(true);
}

static void test_file_fails_for_a_while(void **state)
{
	(void)state;
	storage_fails_for_a_while(false);
}

static void test_read_in_flight(void **state)
{
	struct iovec iov[2] = { { hva(10) + 100, 3 * OS_PAGE_BYTES }, { hva(600), 1 } };
	struct ram_read read = { .iov = iov, .count = 2 };

	(void)state;
	open_store(STORE_BYTES, true);
	for (uint64_t i = 0; i < PAGES; i++)
		put(i, i, SMALL);
	ram_read_begins(RAM, &read);
	assert_int_equal(reclaim(), 0);
	for (uint64_t i = 0; i < PAGES; i++)
		assert_int_equal(in_memory(i), (i >= 10 && i < 14) || i == 600);
	assert_int_equal(counts().left_reads, 5);
	ram_read_ends(RAM, &read);
	assert_int_equal(reclaim(), 0);
	assert_int_equal(counts().spilled, PAGES);
	for (uint64_t i = 0; i < PAGES; i++)
		assert_true(has(i, i, SMALL));
}

/* A device that has the page pinned writes it with no page table: here through the memfd. */
static _Atomic bool over;
static _Atomic uint64_t wrong;

static void *device(void *arg)
{
	uint64_t page = 20 + 3 * (uint64_t)(uintptr_t)arg, words[RIG_PAGE_WORDS], state = page;
	struct iovec iov = { hva(page), OS_PAGE_BYTES };
	struct ram_read read = { .iov = &iov, .count = 1 };

	for (uint64_t n = 1; !over; n++) {
		/* The system call begins, and finds the page in the page table, as a write does. */
		ram_read_begins(RAM, &read);
		*(volatile uint8_t *)hva(page) = (uint8_t)n;
		for (uint64_t spin = random_word(&state) % 20000; spin; spin--)
			__asm__ volatile("pause");
		fill(words, n, SMALL);
		if (pwrite(t.rig.blocks[0].memfd, words, sizeof words, (off_t)os_bytes(page)) !=
		    sizeof words)
			abort();
		ram_read_ends(RAM, &read);
		usleep(4000); /* until it is taken, if it shall be */
		wrong += !has(page, n, SMALL);
	}
	return NULL;
}

/* For so long at least, and until so many pages have come back; a busy machine gets its time. */
static void reclaim_for(uint64_t us, uint64_t returned)
{
	uint64_t begin_us = os_now_us();
	int r = 0;

	while (!r && (os_now_us() - begin_us < us || counts().returned < returned) &&
	       os_now_us() - begin_us < 60000000)
		r = reclaim();
	over = true;
	assert_int_equal(r, 0);
}

static void test_devices_beside(void **state)
{
	pthread_t threads[2];

	(void)state;
	over = false;
	wrong = 0;
	open_store(STORE_BYTES, true);
	for (uintptr_t i = 0; i < 2; i++)
		assert_int_equal(pthread_create(&threads[i], NULL, device, (void *)i), 0);
	assert_int_equal(os_fault_parse("write:delay:1"),
			 0); /* what the device writes meanwhile was not packed */
	reclaim_for(1000000, 20);
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	assert_int_equal(wrong, 0);
	assert_true(counts().returned >= 20);
}

/* Writers that know what they wrote last: by stores, or by system calls that copy into the page. */
static void *writer(void *arg)
{
	uint64_t first = (uint64_t)(uintptr_t)arg, seed[64] = { 0 }, state = first;
	int pipes[2];

	if (pipe(pipes))
		abort();
	for (uint64_t n = 1; !over; n++) {
		uint64_t i = random_word(&state) % 64, page = first + 16 * i, words[RIG_PAGE_WORDS];

		if (seed[i] && !has(page, seed[i], SMALL))
			wrong++;
		seed[i] = n;
		fill(words, n, SMALL);
		if (n % 2)
			memcpy(hva(page), words, sizeof words);
		else if (write(pipes[1], words, sizeof words) != sizeof words ||
			 read(pipes[0], hva(page), sizeof words) != sizeof words)
			abort();
		if (n % 97 == 0)
			usleep(500);
	}
	for (uint64_t i = 0; i < 64; i++)
		wrong += seed[i] && !has(first + 16 * i, seed[i], SMALL);
	close(pipes[0]);
	close(pipes[1]);
	return NULL;
}

static void test_writers_beside(void **state)
{
	struct ram_reclaim_counts c;
	pthread_t threads[3];

	(void)state;
	over = false;
	wrong = 0;
	open_store(STORE_BYTES, true);
	for (uintptr_t i = 0; i < 3; i++)
		assert_int_equal(pthread_create(&threads[i], NULL, writer, (void *)(i + 1)), 0);
	reclaim_for(2000000, 500);
	for (int i = 0; i < 3; i++)
		pthread_join(threads[i], NULL);
	c = counts();
	assert_int_equal(wrong, 0);
	assert_true(c.returned >= 500);
	assert_true(c.left_touched > 0); /* the race did happen */
	assert_int_equal(c.spilled_now, c.spilled - c.returned);
	check_maps();
}

/* ---- what happens while a unit is packed: every page of it takes some milliseconds -------------------- */

static pthread_t slow;
static int slow_result;
static _Atomic bool slow_over;

static void *reclaim_slowly(void *arg)
{
	(void)arg;
	slow_result = reclaim();
	slow_over = true;
	return NULL;
}

static void begin_slowly(const char *delay)
{
	slow_over = false;
	for (uint64_t i = 0; i < 64; i++)
		put(i, i, SMALL);
	assert_int_equal(os_fault_parse(delay), 0);
	assert_int_equal(pthread_create(&slow, NULL, reclaim_slowly, NULL), 0);
	while (!counts().spilled_now && !slow_over) /* slots that are reserved count */
		usleep(100);
	assert_false(slow_over);
}

static int end_slowly(void)
{
	pthread_join(slow, NULL);
	assert_int_equal(os_fault_parse("write:delay:0"), 0);
	return slow_result;
}

static void test_written_meanwhile(void **state)
{
	(void)state;
	open_store(STORE_BYTES, true);
	begin_slowly("write:delay:5");
	put(0, 4711, SMALL);
	put(50, 4712, SMALL);
	assert_int_equal(end_slowly(), 0);
	assert_int_equal(source(0), ENTRY_WATCHED);
	assert_int_equal(source(50), ENTRY_WATCHED);
	assert_int_equal(source(51), ENTRY_MASKED);
	assert_int_equal(counts().left_touched, 2);
	assert_int_equal(counts().spilled_now, 62);
	assert_true(has(0, 4711, SMALL) && has(50, 4712, SMALL) && has(1, 1, SMALL));
}

/* Left because of a read, and still protected: who writes it does not wait for the end of the unit. */
static void test_left_page_is_written(void **state)
{
	struct iovec iov = { hva(40), OS_PAGE_BYTES };
	struct ram_read read = { .iov = &iov, .count = 1 };

	(void)state;
	open_store(STORE_BYTES, true);
	ram_read_begins(RAM, &read);
	begin_slowly("write:delay:20"); /* more than a second */
	put(40, 4711, SMALL);
	assert_int_equal(counts().spilled, 0); /* nothing was taken yet */
	assert_int_equal(end_slowly(), 0);
	ram_read_ends(RAM, &read);
	assert_int_equal(counts().left_reads, 1);
	assert_true(has(40, 4711, SMALL));
}

static void test_discarded_meanwhile(void **state)
{
	(void)state;
	open_store(STORE_BYTES, true);
	begin_slowly("write:delay:5");
	ram_lock(RAM);
	assert_int_equal(ram_discard(RAM, BLOCK, 0, 32), 0);
	ram_unlock(RAM);
	assert_int_equal(end_slowly(), 0);
	for (uint64_t i = 0; i < 64; i++)
		assert_true(i < 32 ? rig_holds(hva(i), 0) : has(i, i, SMALL));
	assert_int_equal(counts().spill_bytes_now, 0);
}

static void test_mapped_over_meanwhile(void **state)
{
	(void)state;
	open_store(STORE_BYTES, true);
	begin_slowly("write:delay:5");
	ram_lock(RAM);
	assert_int_equal(ram_map_overlay(RAM, BLOCK, 0, 32, t.rig.files[0].index, 5), 0);
	assert_int_equal(ram_return_base(RAM, BLOCK, 0, 16), 0);
	ram_unlock(RAM);
	assert_int_equal(end_slowly(), 0);
	for (uint64_t i = 0; i < 16; i++)
		rig_write(hva(i), i);
	for (uint64_t i = 0; i < 64; i++)
		assert_true(i < 16   ? rig_holds(hva(i), i)
			    : i < 32 ? rig_holds(hva(i), rig_file_tag(0, 0, 5 + i))
				     : has(i, i, SMALL));
	assert_int_equal(counts().spill_bytes_now, 0);
	check_maps();
}

static void test_unmasked_meanwhile(void **state)
{
	(void)state;
	open_store(STORE_BYTES, true);
	begin_slowly("write:delay:5");
	assert_int_equal(ram_unmask(RAM), 0); /* nobody watches any more */
	for (uint64_t i = 0; i < 64; i++)
		put(i, i + 9000, SMALL);
	assert_int_equal(end_slowly(), 0);
	for (uint64_t i = 0; i < 64; i++)
		assert_true(has(i, i + 9000, SMALL));
	assert_int_equal(counts().spilled, 0);
	assert_int_equal(counts().spill_bytes_now, 0);
	check_maps();
}

static void test_forbidden_meanwhile(void **state)
{
	(void)state;
	open_store(STORE_BYTES, true);
	begin_slowly("write:delay:5");
	ram_reclaim_allow(RAM, false);
	assert_int_equal(ram_unmask(RAM), 0);
	ram_lock(RAM);
	ram_hold(RAM, true);
	ram_unlock(RAM);
	assert_int_equal(end_slowly(), -EBUSY); /* of the second unit */
	assert_int_equal(counts().spilled, 0);
	for (uint64_t i = 0; i < 64; i++)
		assert_int_equal(source(i), ENTRY_BASE);
	ram_reclaim_allow(RAM, true);
	assert_int_equal(reclaim(), -EBUSY); /* held */
	ram_lock(RAM);
	ram_hold(RAM, false);
	ram_unlock(RAM);
	assert_int_equal(reclaim(), 0);
	assert_int_equal(counts().spilled, 64);
	for (uint64_t i = 0; i < 64; i++)
		assert_true(has(i, i, SMALL));
}

static void test_unplugged_meanwhile(void **state)
{
	(void)state;
	open_store(STORE_BYTES, true);
	begin_slowly("write:delay:5");
	ram_lock(RAM);
	ram_remove_block(RAM, BLOCK);
	ram_unlock(RAM);
	assert_int_equal(munmap(hva(0), os_bytes(PAGES)), 0);
	assert_int_equal(end_slowly(), 0);
	assert_int_equal(counts().spill_bytes_now, 0);
	rig_map_block(&t.rig.blocks[0]);
	for (uint64_t i = 0; i < 64; i++)
		assert_true(has(i, i, SMALL)); /* nothing was punched */
}

/* ---- with masks, and refused ------------------------------------------------------------------------- */

static void test_beside_masks(void **state)
{
	uint64_t entries[20];

	(void)state;
	for (uint64_t i = 0; i < 20; i++)
		entries[i] = entry_masked(t.rig.files[0].index, 3 * i);
	ram_lock(RAM);
	assert_int_equal(ram_mask(RAM, BLOCK, 100, 20, entries), 0);
	ram_unlock(RAM);
	open_store(STORE_BYTES, true);
	for (uint64_t i = 0; i < PAGES; i++)
		if (i < 105 || i >= 120)
			put(i, i, SMALL);
	assert_int_equal(reclaim(), 0);
	check_maps();
	for (uint64_t i = 0; i < PAGES; i++)
		assert_false(in_memory(i));
	assert_int_equal(ram_unmask(RAM), 0);
	for (uint64_t i = 0; i < PAGES; i++)
		assert_true(i >= 105 && i < 120 ? rig_holds(hva(i), rig_file_tag(0, 0, 3 * (i - 100)))
						: has(i, i, SMALL));
	assert_int_equal(counts().spill_bytes_now, 0);
	check_maps();
}

static void test_refused(void **state)
{
	uint64_t pages = 0;

	(void)state;
	assert_int_equal(ram_reclaim(RAM, 0, 0, 1, all, NULL, &pages), -EBUSY); /* no store yet */
	assert_int_equal(ram_reclaim_open(RAM, t.store, SLAB - 1, true), -EINVAL);
	open_store(SLAB, true);
	assert_int_equal(ram_reclaim_open(RAM, t.store, SLAB, true), -EALREADY);
	assert_int_equal(ram_reclaim(RAM, 0, PAGES, 1, all, NULL, &pages), -ENOENT);
	assert_int_equal(ram_reclaim(RAM, RIG_BLOCKS, 0, 1, all, NULL, &pages), -ENOENT);
	ram_reclaim_allow(RAM, false);
	assert_int_equal(ram_reclaim(RAM, 0, 0, 1, all, NULL, &pages), -EBUSY);
	ram_lock(RAM);
	ram_watch(RAM, -1);
	ram_unlock(RAM);
}

/* ---- a store in a file -------------------------------------------------------------------------------- */

/* On a file system with a page cache, as the rig's own files. */
static int open_disk_file(void)
{
	char path[] = "test-reclaim-store.XXXXXX"; /* where the tests run is the build directory */
	int fd = mkstemp(path);

	assert_true(fd >= 0);
	assert_int_equal(unlink(path), 0);
	return fd;
}

static void check_none_cached(int fd)
{
	struct stat st;
	void *view;

	assert_int_equal(fstat(fd, &st), 0);
	assert_true(st.st_size > 0);
	view = os_view_file(fd, (size_t)st.st_size, false);
	assert_non_null(view);
	if (os_residency_is_told(fd))
		assert_int_equal(os_resident_pages(view, 0, ((uint64_t)st.st_size + OS_PAGE_BYTES - 1) >> OS_PAGE_SHIFT), 0);
	os_unview_file(view, (size_t)st.st_size);
}

/* What went to memory comes back from there also when there is a file; all that comes then goes there, also what packs
 * badly. And the host has none of it in memory. */
static void test_file_beside_memory(void **state)
{
	int fd = open_disk_file();
	const uint64_t half = PAGES / 2;

	(void)state;
	open_store(STORE_BYTES, true);
	for (uint64_t i = 0; i < half; i++)
		put(i, i, SMALL);
	assert_int_equal(reclaim(), 0);
	assert_int_equal(counts().spilled_now, half);
	assert_int_equal(counts().spill_file_bytes_now, 0);
	assert_int_equal(ram_reclaim_open(RAM, fd, STORE_BYTES, false), 0);
	assert_int_equal(ram_reclaim_open(RAM, fd, STORE_BYTES, false), -EALREADY);
	for (uint64_t i = half; i < PAGES; i++)
		put(i, i, i % 2 ? NOISE : SMALL);
	assert_int_equal(reclaim(), 0);
	assert_int_equal(counts().spilled_now, PAGES);
	assert_int_equal(counts().left_unpacked, 0);
	assert_true(counts().spill_bytes_now > 0);
	assert_in_range(counts().spill_file_bytes_now, os_bytes(half / 2), counts().spill_file_most_bytes);
	check_none_cached(fd);
	for (uint64_t i = 0; i < PAGES; i++)
		assert_true(has(i, i, i >= half && i % 2 ? NOISE : SMALL));
	check_none_cached(fd);
	assert_int_equal(counts().spilled_now, 0);
	assert_int_equal(counts().spill_bytes_now, 0);
	assert_int_equal(counts().spill_file_bytes_now, 0);
	for (uint64_t i = 0; i < PAGES; i++)
		put(i, PAGES + i, i % 3 ? NOISE : SMALL);
	assert_int_equal(reclaim(), 0);
	assert_int_equal(counts().spill_bytes_now, 0);
	for (uint64_t i = 0; i < PAGES; i++)
		assert_true(has(i, PAGES + i, i % 3 ? NOISE : SMALL));
	check_maps();
	assert_int_equal(t.server.error, 0);
	ram_reclaim_allow(RAM, false);
	close(fd);
}

/* What cannot be brought to the disk stays in memory, whatever becomes of it there; zeros need no disk. */
static void test_flush_fails(void **state)
{
	static const int errors[] = { EIO, ENOSPC };

	(void)state;
	open_store(STORE_BYTES, false);
	for (size_t n = 0; n < sizeof errors / sizeof errors[0]; n++) {
		struct ram_reclaim_counts before = counts(), c;

		for (uint64_t i = 0; i < PAGES; i++)
			put(i, i + n, NOISE);
		rig_write(hva(3), 0);
		os_fault_arm(OS_FAULT_FLUSH, 1, errors[n]);
		assert_int_equal(reclaim(), -errors[n]);
		c = counts();
		assert_int_equal(c.left_failed - before.left_failed, RAM_RECLAIM_PAGES - 1);
		assert_int_equal(c.spilled_now, PAGES - RAM_RECLAIM_PAGES);
		assert_int_equal(c.spill_file_bytes_now, (os_bytes(c.spilled_now) + SLAB - 1) / SLAB * SLAB);
		assert_false(in_memory(3));
		for (uint64_t i = 0; i < RAM_RECLAIM_PAGES; i++)
			assert_true(i == 3 || in_memory(i));
		for (uint64_t i = 0; i < PAGES; i++)
			assert_true(i == 3 ? rig_holds(hva(i), 0) : has(i, i + n, NOISE));
		assert_int_equal(counts().spill_file_bytes_now, 0);
		check_maps();
	}
}

/* A disk that is full, and one that fails, while it is written: what was not written stays. */
static void test_file_cannot_be_written(void **state)
{
	static const int errors[] = { EIO, ENOSPC };

	(void)state;
	open_store(STORE_BYTES, false);
	for (size_t n = 0; n < sizeof errors / sizeof errors[0]; n++) {
		for (uint64_t i = 0; i < PAGES; i++)
			put(i, i + n, NOISE);
		os_fault_arm(OS_FAULT_WRITE, 100, errors[n]);
		assert_int_equal(reclaim(), -errors[n]);
		assert_int_equal(counts().spilled_now, 99 + PAGES - RAM_RECLAIM_PAGES);
		assert_true(in_memory(99));
		for (uint64_t i = 0; i < PAGES; i++)
			assert_true(has(i, i + n, NOISE));
		assert_int_equal(counts().spill_file_bytes_now, 0);
	}
}

/* In parts, for who has not the time; what cannot be read stays, and comes later. */
static void test_returned_in_parts(void **state)
{
	const uint64_t part = 256;
	uint64_t left = 1;

	(void)state;
	assert_int_equal(ram_return_reclaimed(RAM, part, &left), 0); /* no store */
	assert_int_equal(left, 0);
	open_store(STORE_BYTES, false);
	for (uint64_t i = 0; i < PAGES; i++)
		put(i, i, i % 2 ? NOISE : SMALL);
	assert_int_equal(reclaim(), 0);
	assert_int_equal(ram_return_reclaimed(RAM, part, &left), 0);
	assert_int_equal(left, PAGES - part);
	os_fault_arm(OS_FAULT_STORAGE_READ, 3, EIO);
	assert_int_equal(ram_return_reclaimed(RAM, part, &left), -EIO);
	assert_int_equal(left, PAGES - 2 * part + 1);
	while (left)
		assert_int_equal(ram_return_reclaimed(RAM, part, &left), 0);
	assert_int_equal(counts().spill_file_bytes_now, 0);
	for (uint64_t i = 0; i < PAGES; i++) {
		assert_true(in_memory(i));
		assert_true(has(i, i, i % 2 ? NOISE : SMALL));
	}
	assert_int_equal(t.server.error, 0); /* nobody had to wait for one */
	check_maps();
}

/* ---- the store ---------------------------------------------------------------------------------------- */

static struct spill *open_spill(enum spill_kind kind)
{
	struct spill *s;

	assert_int_equal(spill_open(&s), 0);
	assert_int_equal(spill_add(s, kind, t.store, 2 * SLAB), 0);
	return s;
}

static void test_pinned_slot_stays(void **state)
{
	uint64_t page[RIG_PAGE_WORDS], got[RIG_PAGE_WORDS], slot, other;
	uint8_t packed[OS_PAGE_BYTES];
	struct spill_counts c;
	struct spill *s;
	size_t bytes;

	(void)state;
	s = open_spill(SPILL_MEMORY);
	memset(page, 1, sizeof page);
	bytes = spill_pack(s, page, packed);
	assert_true(bytes > 0 && bytes <= 256);
	assert_int_equal(spill_reserve(s, bytes, &slot), 0);
	assert_int_equal(spill_write(s, slot, packed, bytes), 0);
	spill_pin(s, slot);
	spill_free(s, slot);
	for (int i = 0; i < 2 * SLAB / 256 - 1; i++) {
		assert_int_equal(spill_reserve(s, bytes, &other), 0);
		assert_int_not_equal(other, slot);
	}
	assert_int_equal(spill_reserve(s, bytes, &other), -ENOSPC);
	assert_int_equal(spill_read(s, slot, got), 0);
	assert_memory_equal(got, page, sizeof page);
	spill_unpin(s, slot);
	assert_int_equal(spill_reserve(s, bytes, &other), 0);
	assert_int_equal(other, slot);
	spill_count(s, SPILL_MEMORY, &c);
	assert_int_equal(c.slots_now, 2 * SLAB / 256);
	assert_int_equal(c.bytes_now, 2 * SLAB);
	spill_close(s);
}

static void test_damaged_slot(void **state)
{
	uint64_t page[RIG_PAGE_WORDS], slot;
	uint8_t packed[OS_PAGE_BYTES];
	struct spill *s;
	size_t bytes;

	(void)state;
	s = open_spill(SPILL_MEMORY);
	fill(page, 1, SMALL);
	bytes = spill_pack(s, page, packed);
	assert_int_equal(spill_reserve(s, bytes, &slot), 0);
	memset(packed, 0xff, bytes); /* a length that does not fit */
	assert_int_equal(spill_write(s, slot, packed, bytes), 0);
	assert_int_equal(spill_read(s, slot, page), -EBADMSG);
	memset(packed, 0, bytes);
	assert_int_equal(spill_write(s, slot, packed, bytes), 0);
	assert_int_equal(spill_read(s, slot, page), -EBADMSG);
	spill_close(s);
}

/* What is not what was written there is an error, never contents: packed, or a page as it is. */
static void test_changed_slot(void **state)
{
	uint64_t page[RIG_PAGE_WORDS], slot;
	uint8_t packed[OS_PAGE_BYTES];
	struct spill *s;

	(void)state;
	s = open_spill(SPILL_FILE);
	for (size_t noise = SMALL; noise <= NOISE; noise += NOISE - SMALL) {
		size_t bytes;
		uint8_t last;
		off_t at;

		fill(page, 1, noise);
		bytes = spill_pack(s, page, packed);
		at = noise == NOISE ? SLAB : 0; /* another slab */
		assert_int_equal(bytes == OS_PAGE_BYTES, noise == NOISE);
		assert_int_equal(spill_reserve(s, bytes, &slot), 0);
		assert_int_equal(spill_write(s, slot, packed, bytes), 0);
		assert_int_equal(spill_flush(s), 0);
		assert_int_equal(spill_read(s, slot, page), 0);
		assert_int_equal(pread(t.store, &last, 1, at + (off_t)bytes - 1), 1);
		last ^= 4;
		assert_int_equal(pwrite(t.store, &last, 1, at + (off_t)bytes - 1), 1);
		assert_int_equal(spill_read(s, slot, page), -EBADMSG);
	}
	spill_close(s);
}

/* ---- large folios --------------------------------------------------------------------------------- */

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* Linux 6.1 */
#endif
#define LARGE_PAGES 512

/* Guest RAM in one large folio, of which somebody holds a page, so that it cannot be split. */
struct large {
	int memfd, pipe[2];
	uint8_t *area, *hva;
	struct ram *ram;
	struct ram_block *block;
	struct mask_server server;
};

static bool collapse(struct large *l)
{
	const size_t bytes = os_bytes(LARGE_PAGES);

	l->area = mmap(NULL, 2 * bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	l->hva = (uint8_t *)(((uintptr_t)l->area + bytes - 1) & ~(bytes - 1));
	assert_ptr_equal(mmap(l->hva, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, l->memfd, 0), l->hva);
	for (uint64_t i = 0; i < LARGE_PAGES; i++)
		rig_write(l->hva + os_bytes(i), 1000 + i);
	return !madvise(l->hva, bytes, MADV_COLLAPSE);
}

static void hold_page(struct large *l, uint64_t page)
{
	struct iovec iov = { l->hva + os_bytes(page), OS_PAGE_BYTES };

	assert_int_equal(pipe(l->pipe), 0);
	assert_int_equal(vmsplice(l->pipe[1], &iov, 1, 0), OS_PAGE_BYTES);
}

static void watch_large(struct large *l)
{
	assert_int_equal(ram_create(1000, &l->ram), 0);
	ram_lock(l->ram);
	assert_int_equal(ram_add_block(l->ram, "large", l->hva, LARGE_PAGES, l->memfd, 0, &l->block), 0);
	ram_unlock(l->ram);
	assert_int_equal(mask_server_start(&l->server, l->ram), 0);
	assert_int_equal(ram_reclaim_open(l->ram, t.store, STORE_BYTES, true), 0);
}

static void close_large(struct large *l)
{
	mask_server_stop(&l->server);
	ram_remove_blocks(l->ram);
	ram_destroy(l->ram);
	munmap(l->area, 2 * os_bytes(LARGE_PAGES));
	close(l->server.uffd);
	close(l->pipe[0]);
	close(l->pipe[1]);
	close(l->memfd);
}

/* The punch makes zeros of a part of such a folio, and leaves it there. */
static void test_part_of_a_large_folio(void **state)
{
	enum { HELD = 7 };
	static const uint64_t cold_pages[] = { 3, 50, 51, 300 };
	struct large l = { .memfd = os_memfd_create("large", os_bytes(LARGE_PAGES), false), .pipe = { -1, -1 } };
	unsigned cold = ACTIVITY_COLD;
	uint64_t pages;

	(void)state;
	if (!collapse(&l)) {
		print_message("SKIP: this kernel makes no large folios of shared memory (%s)\n", strerror(errno));
		munmap(l.area, 2 * os_bytes(LARGE_PAGES));
		close(l.memfd);
		skip();
	}
	hold_page(&l, HELD);
	watch_large(&l);
	put_at(l.hva + os_bytes(51), 51, SMALL); /* to the store, the others are of one word */
	ram_lock(l.ram);
	for (size_t i = 0; i < sizeof cold_pages / sizeof cold_pages[0]; i++)
		ram_set_activity(l.ram, l.block, cold_pages[i], entry_activity(ACTIVITY_COLD, 1));
	ram_unlock(l.ram);
	assert_int_equal(ram_reclaim(l.ram, 0, 0, LARGE_PAGES, by_activity, &cold, &pages), 0);
	for (uint64_t i = 0; i < LARGE_PAGES; i++)
		assert_true(i == 51 ? has_at(l.hva + os_bytes(i), 51, SMALL) : rig_holds(l.hva + os_bytes(i), 1000 + i));
	for (uint64_t i = 0; i < LARGE_PAGES; i++)
		rig_write(l.hva + os_bytes(i), 2000 + i); /* nothing stays protected */
	for (uint64_t i = 0; i < LARGE_PAGES; i++)
		assert_true(rig_holds(l.hva + os_bytes(i), 2000 + i));
	assert_int_equal(l.server.error, 0);
	close_large(&l);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(test_all_kinds),
		TEST(test_writable_after),
		TEST(test_mapped_anew),
		TEST(test_overlays),
		TEST(test_cache_of_a_file),
		TEST(test_only_what_is_wanted),
		TEST(test_a_walk),
		TEST(test_full_store),
		TEST(test_failures),
		TEST(test_storage_fails_for_a_while),
		TEST(test_read_in_flight),
		TEST(test_devices_beside),
		TEST(test_writers_beside),
		TEST(test_written_meanwhile),
		TEST(test_left_page_is_written),
		TEST(test_discarded_meanwhile),
		TEST(test_mapped_over_meanwhile),
		TEST(test_unmasked_meanwhile),
		TEST(test_forbidden_meanwhile),
		TEST(test_unplugged_meanwhile),
		TEST(test_beside_masks),
		TEST(test_refused),
		TEST(test_file_beside_memory),
		TEST(test_flush_fails),
		TEST(test_file_cannot_be_written),
		TEST(test_file_fails_for_a_while),
		TEST(test_returned_in_parts),
		TEST(test_pinned_slot_stays),
		TEST(test_damaged_slot),
		TEST(test_changed_slot),
		TEST(test_part_of_a_large_folio),
	};
	int uffd = os_uffd_open(OS_UFFD_MISSING_SHMEM | OS_UFFD_WP_HUGETLBFS_SHMEM);

	if (uffd < 0) {
		printf("skipped: no userfaultfd for the kernel's faults, or none that protects shared "
		       "memory (%s)\n",
		       strerror(-uffd));
		return 77;
	}
	close(uffd);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
