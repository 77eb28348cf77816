/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* Where guest pages were read from or written to, and how the other host of a migration reads it there. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "core/origin.h"
#include "migrate/hint.h"
#include "os/os.h"
#include "volume/volume.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define RAM_PAGES 64u
#define FILE_PAGES 200u
#define ODD_BYTES 100u /* behind the last whole page of the file */

struct rig {
	char dir[64], path[96];
	int fd, memfd;
	uint8_t *hva;
	struct ram *ram;
	struct ram_block *block;
	struct volumes *volumes;
	struct vm_stats stats;
	struct manifest manifest;
};

static uint8_t byte_of(uint64_t page, size_t at)
{
	return (uint8_t)(page * 37 + at * 11 + at / 251 + 1);
}

static void make_page(uint8_t *to, uint64_t page)
{
	for (size_t i = 0; i < OS_PAGE_BYTES; i++)
		to[i] = byte_of(page, i);
}

static void make_file(struct rig *rig)
{
	uint8_t page[OS_PAGE_BYTES];

	for (uint64_t i = 0; i <= FILE_PAGES; i++) {
		make_page(page, i);
		assert_int_equal(os_write_all(rig->fd, page, i < FILE_PAGES ? OS_PAGE_BYTES : ODD_BYTES, os_bytes(i)), 0);
	}
}

static int setup(void **state)
{
	const struct volume_options options = { .share_threshold = 0.1 };
	struct rig *rig = calloc(1, sizeof *rig);

	assert_non_null(rig);
	*state = rig;
	snprintf(rig->dir, sizeof rig->dir, "/var/tmp/latent-hint-XXXXXX");
	assert_non_null(mkdtemp(rig->dir));
	snprintf(rig->path, sizeof rig->path, "%s/disk", rig->dir);
	rig->fd = open(rig->path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	assert_true(rig->fd >= 0);
	make_file(rig);
	rig->memfd = os_memfd_create("ram", os_bytes(RAM_PAGES), false);
	rig->hva = mmap(NULL, os_bytes(RAM_PAGES), PROT_READ | PROT_WRITE, MAP_SHARED, rig->memfd, 0);
	assert_ptr_not_equal(rig->hva, MAP_FAILED);
	assert_int_equal(ram_create(1000, &rig->ram), 0);
	ram_lock(rig->ram);
	assert_int_equal(ram_add_block(rig->ram, "ram", rig->hva, RAM_PAGES, rig->memfd, 0, &rig->block), 0);
	ram_unlock(rig->ram);
	assert_int_equal(volumes_create(rig->ram, &options, &rig->stats, &rig->volumes), 0);
	rig->manifest.disks = 2;
	rig->manifest.disk[0].layers = 3;
	rig->manifest.disk[1].layers = 1;
	snprintf(rig->manifest.disk[0].layer[0].volume.path, MANIFEST_PATH_BYTES, "%s", rig->path);
	snprintf(rig->manifest.disk[0].layer[1].volume.path, MANIFEST_PATH_BYTES, "%s", rig->dir); /* no file */
	snprintf(rig->manifest.disk[0].layer[2].volume.path, MANIFEST_PATH_BYTES, "%s/nowhere", rig->dir);
	snprintf(rig->manifest.disk[1].layer[0].volume.path, MANIFEST_PATH_BYTES, "%s", rig->path);
	return 0;
}

static int teardown(void **state)
{
	struct rig *rig = *state;

	volumes_destroy(rig->volumes);
	ram_destroy(rig->ram);
	munmap(rig->hva, os_bytes(RAM_PAGES));
	close(rig->memfd);
	close(rig->fd);
	unlink(rig->path);
	rmdir(rig->dir);
	free(rig);
	return 0;
}

/* ---- origins ------------------------------------------------------------------------------------ */

static void test_words(void **state)
{
	uint8_t page[OS_PAGE_BYTES], other[OS_PAGE_BYTES];
	uint64_t origin;

	(void)state;
	make_page(page, 1);
	make_page(other, 2);
	origin = origin_make(ORIGIN_FILES - 1, ORIGIN_FILE_PAGES - 1, page);
	assert_int_equal(origin_file(origin), ORIGIN_FILES - 1);
	assert_int_equal(origin_file_page(origin), ORIGIN_FILE_PAGES - 1);
	assert_true(origin_fits(origin, page));
	assert_false(origin_fits(origin, other));
	memset(other, 0, sizeof other);
	assert_false(origin_fits(origin, other));
	assert_false(origin_fits(0, other));
	origin = origin_make(0, 0, other);
	assert_true(origin_fits(origin, other)); /* the first page of the first file, of zeros, is known */
	assert_int_equal(origin_file(origin), 0);
	assert_int_equal(origin_file_page(origin), 0);
}

static void check_origins(struct rig *rig, uint64_t page, uint64_t pages, uint64_t file_page)
{
	for (uint64_t i = 0; i < RAM_PAGES; i++) {
		uint64_t origin = rig->block->origins[i];

		if (i < page || i >= page + pages) {
			assert_int_equal(origin, 0);
			continue;
		}
		assert_true(origin_fits(origin, rig->hva + os_bytes(i)));
		assert_int_equal(origin_file_page(origin), file_page + i - page);
		assert_int_equal(origin_file(origin), 0);
	}
}

static void forget(struct rig *rig)
{
	for (uint64_t i = 0; i < RAM_PAGES; i++)
		rig->block->origins[i] = 0;
}

static ssize_t read_into(struct rig *rig, size_t at, size_t bytes, uint64_t offset)
{
	struct iovec iov = { rig->hva + at, bytes };

	return volumes_read(rig->volumes, rig->fd, &iov, 1, (off_t)offset);
}

static void test_reads_are_noted(void **state)
{
	struct rig *rig = *state;
	uint8_t outside[OS_PAGE_BYTES];
	struct iovec iov[4];

	assert_int_equal(read_into(rig, os_bytes(3), os_bytes(5), os_bytes(100)), os_bytes(5));
	check_origins(rig, 3, 5, 100);
	rig->hva[os_bytes(4)] ^= 1;
	assert_false(origin_fits(rig->block->origins[4], rig->hva + os_bytes(4)));
	forget(rig);

	/* Whole pages only: the middle of what begins and ends within one. */
	assert_int_equal(read_into(rig, os_bytes(3) + 512, os_bytes(2), os_bytes(7) + 512), os_bytes(2));
	check_origins(rig, 4, 1, 8);
	forget(rig);
	/* At another place of the page than in the file. */
	assert_int_equal(read_into(rig, os_bytes(3), os_bytes(2), os_bytes(7) + 512), os_bytes(2));
	check_origins(rig, 0, 0, 0);
	/* Short, at the end: the odd bytes are no page. */
	assert_int_equal(read_into(rig, os_bytes(8), os_bytes(4), os_bytes(FILE_PAGES - 2)), os_bytes(2) + ODD_BYTES);
	check_origins(rig, 8, 2, FILE_PAGES - 2);
	forget(rig);
	/* In pieces, one of them not in guest RAM. */
	iov[0] = (struct iovec){ rig->hva + os_bytes(20), 1024 };
	iov[1] = (struct iovec){ rig->hva + os_bytes(20) + 1024, OS_PAGE_BYTES - 1024 };
	iov[2] = (struct iovec){ outside, sizeof outside };
	iov[3] = (struct iovec){ rig->hva + os_bytes(30), OS_PAGE_BYTES };
	assert_int_equal(volumes_read(rig->volumes, rig->fd, iov, 4, (off_t)os_bytes(50)), os_bytes(3));
	assert_int_equal(origin_file_page(rig->block->origins[20]), 50);
	assert_int_equal(origin_file_page(rig->block->origins[30]), 52);
}

static void test_writes_are_noted(void **state)
{
	struct rig *rig = *state;
	struct iovec iov[2] = { { rig->hva + os_bytes(10), os_bytes(2) }, { rig->hva + os_bytes(12), os_bytes(2) } };

	memset(rig->hva + os_bytes(10), 7, os_bytes(4));
	volumes_note_write(rig->volumes, rig->fd, iov, 2, (off_t)os_bytes(60), os_bytes(3) + 5); /* it came no further */
	check_origins(rig, 10, 3, 60);
	forget(rig);
	volumes_note_write(rig->volumes, rig->fd, iov, 2, -1, os_bytes(4));
	volumes_note_write(rig->volumes, rig->fd, iov, 2, 0, 0);
	check_origins(rig, 0, 0, 0);
}

/* ---- files ------------------------------------------------------------------------------------------ */

static const char *find(void *ctx, const char *path)
{
	(void)ctx;
	return path;
}

static void test_numbers(void **state)
{
	struct control_layout *layout = calloc(1, sizeof *layout);
	struct rig *rig = *state;
	struct hint_numbers numbers;
	struct stat st;
	bool own;

	assert_non_null(layout);
	assert_ptr_equal(hint_layer(&rig->manifest, 0, &own), &rig->manifest.disk[0].layer[0]);
	assert_true(own);
	assert_ptr_equal(hint_layer(&rig->manifest, 2, &own), &rig->manifest.disk[0].layer[2]);
	assert_false(own);
	assert_ptr_equal(hint_layer(&rig->manifest, 3, &own), &rig->manifest.disk[1].layer[0]);
	assert_true(own);
	assert_null(hint_layer(&rig->manifest, 4, NULL));
	assert_null(hint_layer(&rig->manifest, UINT32_MAX, NULL));

	assert_int_equal(fstat(rig->fd, &st), 0);
	layout->origins = 2;
	layout->origin[1] = layout->origin[2] = (struct control_origin){ st.st_dev, st.st_ino };
	hint_number(&rig->manifest, layout, 1, &numbers);
	assert_int_equal(numbers.file[0], -1); /* no disk's */
	assert_int_equal(numbers.file[1], 0);
	assert_int_equal(numbers.file[2], -1); /* not told of */
	hint_number(&rig->manifest, layout, 2, &numbers);
	assert_int_equal(numbers.file[1], -1); /* not there */
	free(layout);
}

/* The pages of hints that one read has brought are the file's. */
static size_t read_hints(struct hint_files *files, const uint64_t *file_pages, size_t count, size_t *got)
{
	struct wire_hint hint[100] = { 0 };
	const uint8_t *contents;
	uint8_t page[OS_PAGE_BYTES];
	size_t n;

	for (size_t i = 0; i < count; i++)
		hint[i].file_page = file_pages[i];
	n = hint_read(files, hint, count, &contents, got);
	assert_in_range(n, 1, count);
	assert_in_range(*got, 0, n);
	for (size_t i = 0; i < *got; i++) {
		make_page(page, file_pages[i]);
		assert_memory_equal(contents + os_bytes(i), page, sizeof page);
	}
	return n;
}

static void check_reads(struct rig *rig, struct hint_files *files)
{
	uint64_t pages[100];
	uint8_t page[OS_PAGE_BYTES];
	size_t got;

	assert_int_equal(read_hints(files, (uint64_t[]){ 5, 6, 7, 9 }, 4, &got), 3);
	assert_int_equal(got, 3);
	assert_int_equal(read_hints(files, (uint64_t[]){ 9, 5 }, 2, &got), 1);
	assert_int_equal(got, 1);
	for (uint64_t i = 0; i < 100; i++)
		pages[i] = i + 50;
	assert_int_equal(read_hints(files, pages, 100, &got), 64);
	assert_int_equal(got, 64);
	/* The file's end, and beyond it. */
	assert_int_equal(read_hints(files, (uint64_t[]){ FILE_PAGES - 1, FILE_PAGES, FILE_PAGES + 1 }, 3, &got), 3);
	assert_int_equal(got, 1);
	assert_int_equal(read_hints(files, (uint64_t[]){ WIRE_HINT_PAGES - 1 }, 1, &got), 1);
	assert_int_equal(got, 0);
	/* What is written after it was read once is what is read. */
	make_page(page, 1234);
	assert_int_equal(os_write_all(rig->fd, page, sizeof page, os_bytes(20)), 0);
	assert_int_equal(fdatasync(rig->fd), 0);
	{
		const struct wire_hint hint = { .file_page = 20 };
		const uint8_t *contents;

		assert_int_equal(hint_read(files, &hint, 1, &contents, &got), 1);
		assert_int_equal(got, 1);
		assert_memory_equal(contents, page, sizeof page);
	}
	make_file(rig);
	os_fault_arm(OS_FAULT_STORAGE_READ, 1, EIO);
	assert_int_equal(read_hints(files, (uint64_t[]){ 5, 6, 7 }, 3, &got), 3);
	assert_int_equal(got, 0);
	os_fault_arm(OS_FAULT_STORAGE_READ, 0, 0);
	assert_int_equal(read_hints(files, (uint64_t[]){ 5, 6, 7 }, 3, &got), 3);
	assert_int_equal(got, 3);
}

static void test_files_are_read(void **state)
{
	struct rig *rig = *state;
	struct hint_files files = { 0 };

	rig->manifest.disk[1].layers = 2;
	snprintf(rig->manifest.disk[1].layer[1].volume.path, MANIFEST_PATH_BYTES, "/proc/self/status"); /* nobody has it open */
	assert_int_equal(hint_open(&rig->manifest, getpid(), find, NULL, &files), 0);
	assert_int_equal(hint_there(&files), 1 | 1 << 3); /* neither a directory nor what is not there */
	assert_true(files.file[0].own);
	check_reads(rig, &files);
	files.file[0].direct = false; /* as where O_DIRECT is refused */
	(void)fcntl(files.file[0].fd, F_SETFL, 0);
	check_reads(rig, &files);
	hint_close(&files);
	hint_close(&files);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_words),
		cmocka_unit_test_setup_teardown(test_reads_are_noted, setup, teardown),
		cmocka_unit_test_setup_teardown(test_writes_are_noted, setup, teardown),
		cmocka_unit_test_setup_teardown(test_numbers, setup, teardown),
		cmocka_unit_test_setup_teardown(test_files_are_read, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
