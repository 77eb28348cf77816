/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* What the source of a migration says of pages that the destination does not find where it was told to look. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "core/origin.h"
#include "migrate/have.h"
#include "migrate/teller.h"
#include "os/os.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define RAM_PAGES 32u
#define NOT_SAMPLED 100u /* a byte of a page that origin_sample does not look at */

struct rig {
	struct source_view view;
	struct control_layout layout;
	uint8_t *ram;
	uint64_t entries[RAM_PAGES], origins[RAM_PAGES];
	uint8_t changed[RAM_PAGES];
	struct teller *teller;
	struct wire_batch batch;
	char why[SNAPSHOT_WHY_BYTES];
};

/* ---- in the place of the VM's agent, and of gnutls ----------------------------------------------------- */

static struct rig *the_rig;

void source_get_view(const struct source *source, struct source_view *view)
{
	(void)source;
	*view = the_rig->view;
}

const struct control_layout *source_layout(const struct source *source)
{
	(void)source;
	return &the_rig->layout;
}

bool have_digest(const uint8_t *page, uint8_t sha256[WIRE_SHA256_BYTES])
{
	memcpy(sha256, page, WIRE_SHA256_BYTES);
	return true;
}

/* ---- the rig --------------------------------------------------------------------------------------------- */

static int setup(void **state)
{
	struct rig *rig = calloc(1, sizeof *rig);
	struct hint_numbers numbers;

	assert_non_null(rig);
	*state = the_rig = rig;
	rig->view.blocks = 1;
	rig->view.pages = RAM_PAGES;
	rig->view.cache_fd = -1;
	rig->view.block[0] = (struct source_block){ .pages = RAM_PAGES, .entries = rig->entries, .origins = rig->origins,
						    .changed = rig->changed };
	rig->view.block[0].memfd = os_memfd_create("ram", os_bytes(RAM_PAGES), false);
	rig->ram = mmap(NULL, os_bytes(RAM_PAGES), PROT_READ | PROT_WRITE, MAP_SHARED, rig->view.block[0].memfd, 0);
	assert_ptr_not_equal(rig->ram, MAP_FAILED);
	rig->view.block[0].base = rig->ram;
	for (size_t i = 0; i < os_bytes(RAM_PAGES); i++)
		rig->ram[i] = (uint8_t)(i * 7 + i / 251 + i / 4096);
	for (unsigned i = 0; i < RAM_PAGES; i++)
		rig->origins[i] = origin_make(0, i, rig->ram + os_bytes(i));
	rig->layout.origins = 1;
	memset(&numbers, -1, sizeof numbers);
	numbers.file[0] = 0;
	assert_int_equal(teller_create(NULL, 0, &rig->teller, rig->why), 0);
	teller_may_hint(rig->teller, &numbers);
	return 0;
}

static int teardown(void **state)
{
	struct rig *rig = *state;

	teller_destroy(rig->teller);
	munmap(rig->ram, os_bytes(RAM_PAGES));
	close(rig->view.block[0].memfd);
	free(rig);
	return 0;
}

/* As put_all: all that there is to tell. Returns the hints; `*ret_data`: pages that were told by their contents. */
static size_t tell_all(struct rig *rig, size_t *ret_data)
{
	size_t hints = 0, count;

	for (*ret_data = 0;; *ret_data += rig->batch.data_pages, rig->batch.runs = rig->batch.data_pages = 0) {
		assert_int_equal(teller_fill(rig->teller, &rig->batch, rig->why), 0);
		(void)teller_hints(rig->teller, &count);
		if (!count && !rig->batch.runs)
			return hints;
		hints += count;
	}
}

static void write_page(struct rig *rig, uint64_t page)
{
	rig->ram[os_bytes(page) + NOT_SAMPLED]++;
	rig->changed[page] = 1;
}

/* ---- tests -------------------------------------------------------------------------------------------------- */

static void test_what_is_stale_is_told_by_its_contents(void **state)
{
	struct rig *rig = *state;
	size_t data;

	assert_int_equal(teller_collect(rig->teller), RAM_PAGES);
	assert_int_equal(tell_all(rig, &data), RAM_PAGES);
	assert_int_equal(data, 0);
	assert_int_equal(teller_left(rig->teller), 0);
	teller_stale(rig->teller, 3);
	teller_stale(rig->teller, 5);
	assert_int_equal(teller_lacked(rig->teller), 2);
	assert_int_equal(tell_all(rig, &data), 0); /* in the same pass */
	assert_int_equal(data, 2);
	assert_int_equal(teller_lacked(rig->teller), 0);
	assert_int_equal(teller_left(rig->teller), 0);
}

/* Its sample sees nothing of what the guest writes, pass after pass. */
static void test_a_page_is_stale_once(void **state)
{
	struct rig *rig = *state;
	size_t data;

	assert_int_equal(tell_all(rig, &data), RAM_PAGES);
	teller_stale(rig->teller, 3);
	for (unsigned pass = 2; pass < 5; pass++) {
		write_page(rig, 3);
		write_page(rig, 4);
		assert_int_equal(teller_collect(rig->teller), 2);
		assert_int_equal(tell_all(rig, &data), 1); /* page 4, which may have been written to the disk, too */
		assert_int_equal(data, 1);
	}
}

/* What the guest has written, and only that, says how fast it writes. */
static void test_what_is_lacked_is_not_what_was_written(void **state)
{
	struct rig *rig = *state;
	size_t data;

	assert_int_equal(tell_all(rig, &data), RAM_PAGES);
	for (uint64_t page = 0; page < 10; page++)
		teller_stale(rig->teller, page);
	teller_lack(rig->teller, 10);
	write_page(rig, 9);
	write_page(rig, 20);
	assert_int_equal(teller_collect(rig->teller), 12);
	assert_int_equal(teller_lacked(rig->teller), 10); /* page 9 was written, as page 20 was */
	teller_stale(rig->teller, 0);
	assert_int_equal(teller_lacked(rig->teller), 10);
	teller_forget(rig->teller);
	assert_int_equal(teller_lacked(rig->teller), 0);
	teller_owe(rig->teller, 0, 5);
	assert_int_equal(teller_left(rig->teller), 5);
	assert_int_equal(teller_lacked(rig->teller), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_what_is_stale_is_told_by_its_contents, setup, teardown),
		cmocka_unit_test_setup_teardown(test_a_page_is_stale_once, setup, teardown),
		cmocka_unit_test_setup_teardown(test_what_is_lacked_is_not_what_was_written, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
