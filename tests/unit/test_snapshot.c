/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* What a snapshot stores: equal pages once, what a parent has not at all; and chains joined. */
#include "migrate/have.h"
#include "os/os.h"
#include "snapshot/active.h"
#include "snapshot/flatten.h"
#include "snapshot/parent.h"
#include "snapshot/reader.h"
#include "snapshot/rest.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#define PAGES 24u

typedef uint8_t page_bytes[OS_PAGE_BYTES];

static char root[64], why[SNAPSHOT_WHY_BYTES];
static struct source_progress progress;

static const char *in_root(const char *name)
{
	static char path[4][192];
	static unsigned next;
	char *at = path[next++ % 4];

	snprintf(at, sizeof path[0], "%s/%s", root, name);
	return at;
}

static void run_command(const char *format, const char *name)
{
	char command[256];

	snprintf(command, sizeof command, format, in_root(name));
	assert_int_equal(system(command), 0);
}

static int set_up(void **state)
{
	(void)state;
	snprintf(root, sizeof root, "/tmp/test_snapshot.XXXXXX");
	memset(&progress, 0, sizeof progress);
	return mkdtemp(root) ? 0 : -1;
}

static int tear_down(void **state)
{
	(void)state;
	os_fault_arm(OS_FAULT_WRITE, 0, 0);
	os_fault_arm(OS_FAULT_SAVE_STEP, 0, 0);
	os_fault_arm(OS_FAULT_SPARE_MEMORY, 0, 0);
	os_fault_arm(OS_FAULT_STORAGE_READ, 0, 0);
	run_command("rm -rf %s", "");
	return 0;
}

/* Contents that follow from a number; no two numbers have the same. */
static const uint8_t *contents(uint64_t number)
{
	static page_bytes page[4];
	static unsigned next;
	uint64_t *words = (uint64_t *)(void *)page[next++ % 4];

	for (size_t i = 0; i < OS_PAGE_BYTES / sizeof *words; i++)
		words[i] = (number * 1000 + i) * 0x9e3779b97f4a7c15u;
	return (const uint8_t *)words;
}

static uint64_t digest_of(uint64_t number)
{
	return XXH3_64bits(contents(number), OS_PAGE_BYTES);
}

/* ---- snapshots to try it with ------------------------------------------------------------------ */

static struct snapshot_image new_image(void)
{
	struct snapshot_image layout = { .blocks = 1, .block = { { .name = "pc.ram", .pages = PAGES } } }, image;

	assert_int_equal(snapshot_image_create(&layout, &image), 0);
	return image;
}

static int new_file(const char *name)
{
	int fd = open(in_root(name), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);

	assert_true(fd >= 0);
	return fd;
}

static void write_file(const char *name, const char *text)
{
	int fd = new_file(name);

	assert_int_equal(os_write_all(fd, text, strlen(text), 0), 0);
	close(fd);
}

static void identify(const char *name, enum manifest_role role, struct manifest_volume *v)
{
	int fd = open(in_root(name), O_RDONLY | O_CLOEXEC);

	assert_true(fd >= 0);
	snprintf(v->path, sizeof v->path, "%s", in_root(name));
	assert_int_equal(manifest_identify(fd, v), 0);
	v->role = role;
	close(fd);
}

/* An image whose pages have the contents of 100, 101, ... */
static void make_disk_image(void)
{
	int fd = new_file("image");

	for (uint64_t i = 0; i < 8; i++)
		assert_int_equal(os_write_all(fd, contents(100 + i), OS_PAGE_BYTES, os_bytes(i)), 0);
	close(fd);
}

/* The rest of a snapshot whose `ram` is there. */
static void finish_snapshot(const char *name, struct snapshot_image *image, struct manifest *m)
{
	char path[96];
	int fd, dir_fd = open(in_root(name), O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	image->volumes = m->volumes;
	snprintf(path, sizeof path, "%s/pages", name);
	fd = new_file(path);
	assert_int_equal(snapshot_image_write(image, fd), 0);
	close(fd);
	snprintf(path, sizeof path, "%s/state", name);
	write_file(path, "the devices");
	snprintf(path, sizeof path, "%s/disks", name);
	assert_int_equal(mkdir(in_root(path), 0700), 0);
	snprintf(path, sizeof path, "%s/disks/disk0.0.raw", name);
	write_file(path, "the disk");
	m->disks = 1;
	strcpy(m->disk[0].drive, "root");
	m->disk[0].layers = 1;
	identify(path, MANIFEST_IMAGE, &m->disk[0].layer[0].volume);
	strcpy(m->disk[0].layer[0].file, "disk0.0.raw");
	strcpy(m->disk[0].layer[0].format, "raw");
	strcpy(m->name, name);
	m->ram_bytes = os_bytes(PAGES);
	m->state_bytes = strlen("the devices");
	m->state_digest = XXH3_64bits("the devices", strlen("the devices"));
	m->pages_digest = image->checksum;
	assert_int_equal(manifest_write(m, dir_fd), 0);
	close(dir_fd);
	snapshot_image_free(image);
}

static int new_ram(const char *name)
{
	char path[96];

	assert_int_equal(mkdir(in_root(name), 0700), 0);
	snprintf(path, sizeof path, "%s/ram", name);
	return new_file(path);
}

/* Pages 0..7: contents 0..7; 8: as 3; 9: one word; 10, 11: on the image, its pages 4 and 5; the rest: zeros. */
static void make_first(const char *name)
{
	struct manifest *m = calloc(1, sizeof *m);
	struct snapshot_image image = new_image();
	struct store store;
	int ram = new_ram(name);
	page_bytes word;

	memset(word, 0x55, sizeof word);
	m->created_unix_s = 77;
	m->volumes = 1;
	identify("image", MANIFEST_IMAGE, &m->volume[0]);
	assert_int_equal(store_begin(&image, ram, NULL, &progress, &store), 0);
	for (uint64_t i = 0; i < 8; i++)
		assert_int_equal(store_pages(&store, i, contents(i), 1), 0);
	assert_int_equal(store_pages(&store, 8, contents(3), 1), 0);
	assert_int_equal(store_pages(&store, 9, word, 1), 0);
	store_end(&store);
	assert_int_equal(snapshot_page_at(&image, 8)->kind, SNAPSHOT_EQUAL);
	assert_int_equal(snapshot_page_at(&image, 8)->value, 3);
	assert_int_equal(snapshot_page_at(&image, 9)->kind, SNAPSHOT_WORD);
	*snapshot_page_at(&image, 10) = (struct snapshot_page){ SNAPSHOT_VOLUME, 0, 4 };
	*snapshot_page_at(&image, 11) = (struct snapshot_page){ SNAPSHOT_VOLUME, 0, 5 };
	assert_int_equal(ftruncate(ram, (off_t)os_bytes(PAGES)), 0);
	close(ram);
	finish_snapshot(name, &image, m);
	free(m);
}

/* What page `page` of a snapshot holds, wherever that is. */
static const uint8_t *read_page(const struct reader *r, uint64_t page)
{
	const struct snapshot_page *p = snapshot_page_at(&r->image, page);
	static page_bytes bytes;
	uint64_t at;
	int file;

	if (reader_locate(r, page, &file, &at))
		assert_int_equal(os_read_all(reader_fd(r, file), bytes, sizeof bytes, os_bytes(at)), 0);
	else
		for (size_t i = 0; i < sizeof bytes; i += 8)
			memcpy(bytes + i, &p->value, 8);
	return bytes;
}

static struct reader *open_snapshot(const char *name)
{
	struct reader *r = malloc(sizeof *r);
	int e = reader_open(in_root(name), r, why);

	if (!e)
		e = reader_open_files(r, why);
	if (!e)
		e = reader_open_origins(r, why);
	if (e)
		print_error("%s: %s\n", name, why);
	assert_int_equal(e, 0);
	return r;
}

static void close_snapshot(struct reader *r)
{
	reader_close(r);
	free(r);
}

/* ---- equal pages ------------------------------------------------------------------------------- */

static void test_equal_pages_once(void **state)
{
	struct snapshot_image image = new_image();
	static uint8_t batch[6 * OS_PAGE_BYTES];
	struct snapshot_counts counts;
	int ram = new_file("ram");
	struct store store;

	(void)state;
	assert_int_equal(store_begin(&image, ram, NULL, &progress, &store), 0);
	/* Within what is not written yet, and with what is. */
	for (size_t i = 0; i < 6; i++)
		memcpy(batch + i * OS_PAGE_BYTES, contents((const uint64_t[]){ 1, 2, 1, 2, 3, 1 }[i]), OS_PAGE_BYTES);
	assert_int_equal(store_pages(&store, 4, batch, 6), 0);
	assert_int_equal(store_pages(&store, 0, contents(3), 1), 0);
	assert_int_equal(store_pages(&store, 20, contents(4), 1), 0);
	store_end(&store);
	snapshot_image_count(&image, &counts);
	assert_int_equal(counts.data, 4);
	assert_int_equal(counts.equal, 4);
	assert_int_equal(progress.bytes_written, os_bytes(4));
	for (uint64_t page = 0; page < PAGES; page++) {
		const struct snapshot_page *p = snapshot_page_at(&image, page);

		if (p->kind == SNAPSHOT_EQUAL)
			assert_int_equal(snapshot_page_at(&image, p->value)->kind, SNAPSHOT_DATA);
	}
	assert_int_equal(snapshot_page_at(&image, 0)->value, 8);
	assert_int_equal(snapshot_page_at(&image, 9)->value, 4);
	assert_true(store_proves(ram, 8, contents(3)));
	snapshot_image_free(&image);
	close(ram);
}

/* One digest for two contents is not one page. */
static void test_digests_only_propose(void **state)
{
	struct snapshot_image image = new_image();
	int ram = new_file("ram");
	struct store store;
	uint64_t at = 0, page;

	(void)state;
	assert_int_equal(store_begin(&image, ram, NULL, &progress, &store), 0);
	assert_int_equal(store_pages(&store, 0, contents(1), 1), 0);
	*snapshot_page_at(&image, 1) = (struct snapshot_page){ SNAPSHOT_DATA, 0, digest_of(2) };
	assert_int_equal(os_write_all(ram, contents(3), OS_PAGE_BYTES, os_bytes(1)), 0);
	equal_add(&store.equal, 1); /* says that it is contents 2, and is not */
	assert_true(equal_next(&store.equal, digest_of(2), &at, &page));
	assert_int_equal(page, 1);
	assert_int_equal(store_pages(&store, 2, contents(2), 1), 0);
	assert_int_equal(snapshot_page_at(&image, 2)->kind, SNAPSHOT_DATA);
	assert_true(store_proves(ram, 2, contents(2)));
	/* Both are proposed from now on, and the right one is found. */
	assert_int_equal(store_pages(&store, 3, contents(2), 1), 0);
	assert_int_equal(snapshot_page_at(&image, 3)->kind, SNAPSHOT_EQUAL);
	assert_int_equal(snapshot_page_at(&image, 3)->value, 2);
	store_end(&store);
	snapshot_image_free(&image);
	close(ram);
}

/* A guest that makes many pages with one digest makes nothing slow. */
static void test_few_pages_of_one_digest(void **state)
{
	struct snapshot_image image = new_image();
	struct equal equal;
	uint64_t at = 0, page, found = 0;

	(void)state;
	assert_int_equal(equal_create(&image, &equal), 0);
	for (uint64_t i = 0; i < PAGES; i++) {
		*snapshot_page_at(&image, i) = (struct snapshot_page){ SNAPSHOT_DATA, 0, i < 20 ? 42 : i };
		equal_add(&equal, i);
	}
	while (equal_next(&equal, 42, &at, &page))
		assert_int_equal(page, found++);
	assert_int_equal(found, EQUAL_SAME_DIGEST);
	for (uint64_t i = 20; i < PAGES; i++) {
		at = 0;
		assert_true(equal_next(&equal, i, &at, &page));
		assert_int_equal(page, i);
		assert_false(equal_next(&equal, i, &at, &page));
	}
	equal_free(&equal);
	snapshot_image_free(&image);
}

/* Writes a table and reads it; 0 or -EBADMSG. */
static int read_back(struct snapshot_image *image)
{
	struct snapshot_image read;
	int fd = os_memfd_create("pages", 0, false), r;

	assert_int_equal(snapshot_image_write(image, fd), 0);
	r = snapshot_image_read(fd, &read, why);
	if (!r)
		snapshot_image_free(&read);
	close(fd);
	return r;
}

static void test_equal_leads_to_stored(void **state)
{
	struct snapshot_image image = new_image();
	struct snapshot_page *equal = snapshot_page_at(&image, 1);

	(void)state;
	*snapshot_page_at(&image, 0) = (struct snapshot_page){ SNAPSHOT_DATA, 0, 1 };
	*equal = (struct snapshot_page){ SNAPSHOT_EQUAL, 0, 0 };
	assert_int_equal(read_back(&image), 0);
	for (uint64_t value = 1; value < PAGES + 2; value++) { /* itself, zeros, beyond the end */
		equal->value = value;
		assert_int_equal(read_back(&image), -EBADMSG);
		assert_non_null(strstr(why, "page 1 "));
	}
	equal->value = UINT64_MAX;
	assert_int_equal(read_back(&image), -EBADMSG);
	*equal = (struct snapshot_page){ SNAPSHOT_EQUAL, 1, 0 };
	assert_int_equal(read_back(&image), -EBADMSG);
	snapshot_image_free(&image);
}

/* ---- parents ----------------------------------------------------------------------------------- */

static struct parent *open_parent(const char *name)
{
	struct parent *parent = NULL;
	int r = parent_open(in_root(name), &parent, why);

	if (r)
		print_error("%s\n", why);
	assert_int_equal(r, 0);
	return parent;
}

static void assert_place(struct parent *parent, uint64_t page, uint64_t number, uint32_t volume, uint64_t value)
{
	struct snapshot_page found;

	assert_true(parent_find(parent, page, digest_of(number), contents(number), &found));
	assert_int_equal(found.kind, SNAPSHOT_VOLUME);
	assert_int_equal(found.volume, volume);
	assert_int_equal(found.value, value);
}

static void test_parent_finds(void **state)
{
	struct manifest_volume volume[SNAPSHOT_VOLUMES] = { { .dev = 1, .ino = 1 } };
	struct snapshot_image image = new_image();
	struct manifest_parent about;
	struct snapshot_page found;
	struct parent *parent;
	uint32_t volumes = 1;

	(void)state;
	make_disk_image();
	make_first("a");
	parent = open_parent("a");
	parent_describe(parent, &about);
	assert_string_equal(about.path, in_root("a"));
	assert_string_equal(about.name, "a");
	assert_int_equal(about.created_unix_s, 77);
	parent_join_volumes(parent, volume, &volumes);
	parent_join_blocks(parent, &image);
	assert_int_equal(volumes, 3); /* one that was there, its ram, its image */
	assert_int_equal(volume[1].role, MANIFEST_RAM);
	assert_string_equal(volume[1].path, in_root("a/ram"));
	assert_int_equal(volume[2].role, MANIFEST_IMAGE);
	assert_string_equal(volume[2].path, in_root("image"));
	assert_place(parent, 5, 5, 1, 5);
	assert_place(parent, 8, 3, 1, 3);    /* equal to another one there */
	assert_place(parent, 10, 104, 2, 4); /* on the image */
	assert_place(parent, 20, 6, 1, 6);   /* moved */
	assert_false(parent_find(parent, 5, digest_of(50), contents(50), &found));
	assert_false(parent_find(parent, 20, digest_of(104), contents(104), &found)); /* images are not searched */
	parent_close(parent);
	snapshot_image_free(&image);
}

static void test_parent_proves(void **state)
{
	struct manifest_volume volume[SNAPSHOT_VOLUMES] = { 0 };
	struct snapshot_image image = new_image(), lying = new_image();
	struct manifest *m = calloc(1, sizeof *m);
	struct snapshot_page found;
	struct parent *parent;
	uint32_t volumes = 0;
	int ram = new_ram("liar");

	(void)state;
	/* Says of contents 1 that they have the digest of contents 2. */
	assert_int_equal(os_write_all(ram, contents(1), OS_PAGE_BYTES, 0), 0);
	assert_int_equal(ftruncate(ram, (off_t)os_bytes(PAGES)), 0);
	close(ram);
	*snapshot_page_at(&lying, 0) = (struct snapshot_page){ SNAPSHOT_DATA, 0, digest_of(2) };
	finish_snapshot("liar", &lying, m);
	parent = open_parent("liar");
	parent_join_volumes(parent, volume, &volumes);
	parent_join_blocks(parent, &image);
	assert_false(parent_find(parent, 0, digest_of(2), contents(2), &found));
	assert_false(parent_find(parent, 9, digest_of(2), contents(2), &found));
	parent_close(parent);
	snapshot_image_free(&image);
	free(m);
}

/* Pages correspond by blocks; what is in a file without a number is not found. */
static void test_parent_joins(void **state)
{
	struct snapshot_image layout = { .blocks = 2 };
	struct manifest_volume volume[SNAPSHOT_VOLUMES] = { 0 };
	struct snapshot_image image;
	struct snapshot_page found;
	struct parent *parent;
	uint32_t volumes = SNAPSHOT_VOLUMES - 1;

	(void)state;
	make_disk_image();
	make_first("a");
	strcpy(layout.block[0].name, "other");
	layout.block[0].pages = 3;
	strcpy(layout.block[1].name, "pc.ram");
	layout.block[1].pages = 4;
	assert_int_equal(snapshot_image_create(&layout, &image), 0);
	parent = open_parent("a");
	for (uint32_t i = 0; i < volumes; i++)
		volume[i].ino = 1000000 + i;
	parent_join_volumes(parent, volume, &volumes);
	parent_join_blocks(parent, &image);
	assert_int_equal(volumes, SNAPSHOT_VOLUMES); /* room for its ram, none for its image */
	assert_place(parent, 3 + 2, 2, SNAPSHOT_VOLUMES - 1, 2);
	snapshot_image_free(&image);
	image = new_image();
	parent_join_blocks(parent, &image);
	assert_false(parent_find(parent, 10, digest_of(104), contents(104), &found));
	snapshot_image_free(&image);
	parent_close(parent);
	/* What the VM has mapped itself keeps its number. */
	image = new_image();
	parent = open_parent("a");
	identify("image", MANIFEST_IMAGE, &volume[0]);
	identify("a/ram", MANIFEST_RAM, &volume[1]);
	volumes = 2;
	parent_join_volumes(parent, volume, &volumes);
	parent_join_blocks(parent, &image);
	assert_int_equal(volumes, 2);
	assert_place(parent, 10, 104, 0, 4);
	assert_place(parent, 4, 4, 1, 4);
	parent_close(parent);
	snapshot_image_free(&image);
}

static void assert_no_parent(const char *name, const char *words)
{
	struct parent *parent;

	assert_true(parent_open(in_root(name), &parent, why) < 0);
	if (!strstr(why, words))
		print_error("%s\n", why);
	assert_non_null(strstr(why, words));
}

/* ---- chains ------------------------------------------------------------------------------------ */

/* Of "a": page 2 changed to contents 50, page 20 as a's page 1, page 11 still on the image. */
static void make_second(const char *name)
{
	struct manifest *m = calloc(1, sizeof *m);
	struct snapshot_image image = new_image();
	struct parent *parent = open_parent("a");
	struct snapshot_counts counts;
	struct store store;
	int ram = new_ram(name);

	parent_describe(parent, &m->parent);
	parent_join_volumes(parent, m->volume, &m->volumes);
	parent_join_blocks(parent, &image);
	assert_int_equal(store_begin(&image, ram, parent, &progress, &store), 0);
	for (uint64_t i = 0; i < 8; i++)
		assert_int_equal(store_pages(&store, i, contents(i == 2 ? 50 : i), 1), 0);
	assert_int_equal(store_pages(&store, 8, contents(3), 1), 0);
	assert_int_equal(store_pages(&store, 11, contents(105), 1), 0);
	assert_int_equal(store_pages(&store, 20, contents(1), 1), 0);
	assert_int_equal(store_pages(&store, 21, contents(50), 1), 0);
	store_end(&store);
	snapshot_image_count(&image, &counts);
	assert_int_equal(counts.data, 1);
	assert_int_equal(counts.equal, 1);
	assert_int_equal(counts.volume, 10);
	assert_int_equal(ftruncate(ram, (off_t)os_bytes(PAGES)), 0);
	close(ram);
	parent_close(parent);
	finish_snapshot(name, &image, m);
	free(m);
}

static void assert_second(const char *name)
{
	struct reader *r = open_snapshot(name);
	uint64_t bad;

	for (uint64_t i = 0; i < PAGES; i++) {
		static const page_bytes zeros;
		const uint8_t *want = i == 2 || i == 21 ? contents(50) : i < 8 ? contents(i) : i == 8 ? contents(3) :
				      i == 11 ? contents(105) : i == 20 ? contents(1) : zeros;

		assert_memory_equal(read_page(r, i), want, OS_PAGE_BYTES);
	}
	assert_int_equal(snapshot_image_verify(&r->image, r->ram_fd, &bad, why), 0);
	assert_int_equal(bad, 0);
	assert_int_equal(reader_verify_origins(r, &bad, why), 0);
	assert_int_equal(bad, 0);
	close_snapshot(r);
}

static unsigned count_names(void)
{
	DIR *dir = opendir(root);
	unsigned count = 0;

	while (readdir(dir))
		count++;
	closedir(dir);
	return count;
}

static int flatten(const char *from, const char *to)
{
	struct flatten_result result;

	why[0] = '\0';
	memset(&progress, 0, sizeof progress);
	return snapshot_flatten(in_root(from), in_root(to), &progress, &result, why);
}

static void make_chain(void)
{
	make_disk_image();
	make_first("a");
	make_second("b");
}

static void test_flatten(void **state)
{
	struct flatten_result result;
	struct reader *r;

	(void)state;
	make_chain();
	assert_second("b");
	assert_int_equal(snapshot_flatten(in_root("b"), in_root("c"), &progress, &result, why), 0);
	assert_int_equal(result.pages.data, 8);
	assert_int_equal(result.pages.equal, 3);
	assert_int_equal(result.pages.volume, 1);
	assert_int_equal(result.pages_copied_in, 9);
	run_command("rm -r %s", "a");
	assert_second("c");
	r = open_snapshot("c");
	assert_int_equal(r->manifest.volumes, 1);
	assert_string_equal(r->manifest.volume[0].path, in_root("image"));
	assert_string_equal(r->manifest.parent.path, "");
	assert_int_equal(r->manifest.disks, 1);
	close_snapshot(r);
	run_command("cd %s && cmp b/state c/state && cmp b/disks/disk0.0.raw c/disks/disk0.0.raw", "");
}

/* Whatever fails, and wherever: a sentence, nothing is left, and what was there is whole. */
static void fail_everywhere(enum os_fault_point point, unsigned least)
{
	unsigned names = count_names(), nth = 0;
	int r;

	do {
		os_fault_arm(point, ++nth, ENOSPC);
		r = flatten("b", "c");
		if (r) {
			assert_int_equal(r, -ENOSPC);
			assert_non_null(strstr(why, "No space left"));
			assert_int_equal(count_names(), names);
		}
	} while (r);
	assert_true(nth > least);
	assert_second("b");
	assert_second("c");
}

static void test_flatten_no_space(void **state)
{
	(void)state;
	make_chain();
	fail_everywhere(OS_FAULT_WRITE, 6);
}

static void test_flatten_fails_between(void **state)
{
	(void)state;
	make_chain();
	fail_everywhere(OS_FAULT_SAVE_STEP, 6);
}

static void test_flatten_ended(void **state)
{
	struct flatten_result result;
	unsigned names;

	(void)state;
	make_chain();
	names = count_names();
	progress.stop = true;
	assert_int_equal(snapshot_flatten(in_root("b"), in_root("c"), &progress, &result, why), -EINTR);
	assert_int_equal(count_names(), names);
	assert_int_equal(flatten("b", "b"), -EEXIST);
}

static void change_byte(const char *name, uint64_t at)
{
	int fd = open(in_root(name), O_RDWR | O_CLOEXEC);
	uint8_t byte;

	assert_int_equal(pread(fd, &byte, 1, (off_t)at), 1);
	byte ^= 1;
	assert_int_equal(pwrite(fd, &byte, 1, (off_t)at), 1);
	close(fd);
}

/* The file was written: that is seen, whatever the fingerprint says; a copy of it is as good as it. */
static void test_chain_refused(void **state)
{
	struct reader *r;
	uint64_t bad;

	(void)state;
	make_chain();
	assert_int_equal(rename(in_root("a/ram"), in_root("moved")), 0);
	assert_int_equal(flatten("b", "c"), -ENOENT);
	assert_non_null(strstr(why, "a/ram"));
	run_command("cd %s && cp moved a/ram", ""); /* another file with the same contents */
	assert_second("b");
	assert_no_parent("nothing", "cannot be found");
	change_byte("a/ram", os_bytes(1) + 7);
	r = malloc(sizeof *r);
	assert_int_equal(reader_open(in_root("b"), r, why), 0);
	assert_int_equal(reader_open_files(r, why), -ESTALE);
	assert_non_null(strstr(why, "a/ram"));
	/* Were it not seen, the page itself would be. */
	assert_int_equal(reader_open_origins(r, why), 0);
	assert_int_equal(reader_verify_origins(r, &bad, why), 0);
	assert_int_equal(bad, 2);
	assert_non_null(strstr(why, "page 1 "));
	close_snapshot(r);
	assert_no_parent("b", "a/ram");
}

/* Another time of change, as whoever writes it leaves. */
static void touch(const char *name)
{
	const struct timespec times[] = { { 0, UTIME_OMIT }, { 1000, 0 } };

	assert_int_equal(utimensat(AT_FDCWD, in_root(name), times, 0), 0);
}

/* Pages on an image have no digests: the same file, written since, may hold anything. A copy is known by its fingerprint. */
static void test_image_written(void **state)
{
	struct manifest_volume v = { .role = MANIFEST_IMAGE }, now;
	struct reader *r = malloc(sizeof *r);
	int fd;

	(void)state;
	fd = new_file("large");
	assert_int_equal(ftruncate(fd, (off_t)os_bytes(2048)), 0);
	identify("large", MANIFEST_IMAGE, &v);
	assert_int_equal(manifest_compare(fd, &v, &now), 0);
	assert_int_equal(os_write_all(fd, "x", 1, os_bytes(1)), 0); /* of which the fingerprint knows nothing */
	touch("large");
	assert_int_equal(manifest_compare(fd, &v, &now), -ESTALE);
	close(fd);
	make_chain();
	touch("image");
	assert_int_equal(reader_open(in_root("b"), r, why), 0);
	assert_int_equal(reader_open_files(r, why), -ESTALE);
	assert_non_null(strstr(why, "/image"));
	reader_close(r);
	free(r);
	assert_no_parent("a", "/image");
	assert_int_equal(flatten("b", "c"), -ESTALE);
	run_command("cd %s && cp image copy && mv copy image", "");
	assert_second("b");
	touch("b/disks/disk0.0.raw");
	assert_int_equal(flatten("b", "c"), -ESTALE);
	assert_non_null(strstr(why, "disk0.0.raw"));
}

/* Metadata and RAM of another snapshot of the same VM, each whole: nobody takes them for this one's. */
static void test_mixed_refused(void **state)
{
	const char *dirs[] = { NULL };
	struct have *have;
	struct rest *rest;
	struct reader r;

	(void)state;
	make_chain();
	run_command("cd %s && cp a/pages a/ram b", "");
	assert_int_equal(reader_open(in_root("b"), &r, why), -EBADMSG);
	assert_non_null(strstr(why, "pages is not what was saved"));
	reader_close(&r);
	assert_no_parent("b", "pages is not what was saved");
	assert_int_equal(flatten("b", "c"), -EBADMSG);
	assert_int_not_equal(access(in_root("c"), F_OK), 0);
	assert_int_equal(rest_open(in_root("b"), &rest, why), -EBADMSG);
	dirs[0] = in_root("b");
	assert_int_equal(have_open(dirs, 1, &have, why), -EBADMSG);
	assert_non_null(strstr(why, "pages is not what was saved"));
}

static void test_flatten_finds_damage(void **state)
{
	(void)state;
	make_chain();
	change_byte("b/state", 3);
	assert_int_equal(flatten("b", "c"), -EBADMSG);
	assert_non_null(strstr(why, "state is not what was saved"));
	assert_int_equal(progress.bytes_written, 0); /* RAM comes first */
	run_command("rm %s", "b/state");
	assert_int_equal(flatten("b", "c"), -ENOENT);
	assert_non_null(strstr(why, "state"));
	assert_int_equal(progress.bytes_written, 0);
	write_file("b/state", "the devices");
	change_byte("b/ram", os_bytes(2) + 9);
	assert_int_equal(flatten("b", "c"), -EBADMSG);
	assert_non_null(strstr(why, "page 2 "));
	change_byte("b/ram", os_bytes(2) + 9);
	change_byte("b/disks/disk0.0.raw", 1);
	assert_int_equal(flatten("b", "c"), -ESTALE);
	assert_non_null(strstr(why, "disk0.0.raw"));
	assert_int_not_equal(access(in_root("c"), F_OK), 0);
}

/* ---- the rest ----------------------------------------------------------------------------------- */

static uint64_t in_memory(const char *name, uint64_t page, uint64_t pages)
{
	int fd = open(in_root(name), O_RDONLY | O_CLOEXEC);
	void *view = os_view_file(fd, os_bytes(page + pages), false);
	uint64_t resident;

	assert_non_null(view);
	resident = os_resident_pages(view, os_bytes(page), pages);
	os_unview_file(view, os_bytes(page + pages));
	close(fd);
	return resident;
}

/* False: its file system has it nowhere else. */
static bool forget(const char *name)
{
	int fd = open(in_root(name), O_RDONLY | O_CLOEXEC);

	fsync(fd);
	posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
	close(fd);
	return !in_memory(name, 0, 1);
}

/* Page 11, which is on the image, was touched first. */
static void make_active(const char *name)
{
	const struct active_page list[] = { { .page = 11, .order = 1 }, { .page = 2, .order = 2 } };
	const int none[SNAPSHOT_VOLUMES] = { 0 };
	struct reader *r = open_snapshot(name);
	char path[64];
	int fd;

	snprintf(path, sizeof path, "%s/" SNAPSHOT_ACTIVE, name);
	fd = open(in_root(path), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	assert_int_equal(active_write(fd, list, 2, &r->image, -1, none), 0);
	close(fd);
	close_snapshot(r);
}

/* With copies of the contents of three pages: one on the image, one that is stored, and one that equals that. */
static int write_copies(const struct reader *r)
{
	const struct active_page list[] = { { .page = 11, .order = 1 }, { .page = 2, .order = 2 }, { .page = 21, .order = 3 } };
	int fd = os_memfd_create("active", 0, false), fds[SNAPSHOT_VOLUMES];

	for (uint32_t i = 0; i < SNAPSHOT_VOLUMES; i++)
		fds[i] = r->file[i].fd;
	assert_int_equal(active_write(fd, list, 3, &r->image, r->ram_fd, fds), 0);
	return fd;
}

/* Copies of another snapshot's pages are nobody's, and a digest beside a copy proves nothing where `pages` knows better. */
static void test_active_belongs(void **state)
{
	uint64_t forged[] = { digest_of(1), digest_of(3), digest_of(4) };
	struct reader *a, *b;
	struct active_set set;
	int fd;

	(void)state;
	make_chain();
	a = open_snapshot("a");
	b = open_snapshot("b");
	fd = write_copies(b);
	assert_int_equal(active_read(fd, &a->image, &set, why), -EBADMSG);
	assert_non_null(strstr(why, "another snapshot"));
	assert_int_equal(os_write_all(fd, forged, sizeof forged, sizeof(struct active_header) + 3 * sizeof(struct active_page)), 0);
	assert_int_equal(active_read(fd, &b->image, &set, why), 0);
	assert_int_equal(active_digest(&set, 0, &b->image), digest_of(1)); /* nothing else is known */
	assert_int_equal(active_digest(&set, 1, &b->image), digest_of(50));
	assert_int_equal(active_digest(&set, 2, &b->image), digest_of(50));
	active_free(&set);
	close(fd);
	close_snapshot(a);
	close_snapshot(b);
}

/* The copy belongs to the new one; what is not the old one's does not become so. */
static void test_flatten_active(void **state)
{
	struct active_set set;
	struct reader *r;
	int fd;

	(void)state;
	make_chain();
	make_active("b");
	assert_int_equal(flatten("b", "c"), 0);
	r = open_snapshot("c");
	fd = open(in_root("c/" SNAPSHOT_ACTIVE), O_RDONLY | O_CLOEXEC);
	assert_int_equal(active_read(fd, &r->image, &set, why), 0);
	assert_int_equal(set.count, 2);
	active_free(&set);
	close(fd);
	close_snapshot(r);
	run_command("cd %s && cp c/active b/active", "");
	assert_int_equal(flatten("b", "d"), -EBADMSG);
	assert_non_null(strstr(why, "another snapshot"));
	assert_int_not_equal(access(in_root("d"), F_OK), 0);
}

static struct rest *open_rest(void)
{
	struct rest *rest;

	make_chain();
	make_active("b");
	assert_int_equal(rest_open(in_root("b"), &rest, why), 0); /* looks at contents of what it refers to */
	if (!forget("a/ram") || !forget("b/ram") || !forget("image"))
		skip();
	return rest;
}

static struct {
	unsigned asked, stop_at; /* 0: never */
	bool in_order;
} going;

static bool go_on(void *ctx)
{
	assert_ptr_equal(ctx, &going);
	going.asked++;
	if (going.asked == 2)
		going.in_order = in_memory("image", 5, 1) == 1 && !in_memory("b/ram", 2, 1) && !in_memory("a/ram", 0, 8);
	if (going.asked == 3)
		going.in_order = going.in_order && in_memory("b/ram", 2, 1) == 1 && !in_memory("a/ram", 0, 8);
	return going.asked != going.stop_at;
}

static int load(struct rest *rest, unsigned stop_at, struct rest_progress *p)
{
	memset(&going, 0, sizeof going);
	going.stop_at = stop_at;
	return rest_load(rest, go_on, &going, p);
}

static void test_rest_is_loaded(void **state)
{
	struct rest *rest = open_rest();
	struct rest_progress p;

	(void)state;
	assert_int_equal(load(rest, 0, &p), 0);
	assert_int_equal(p.pages_all, 12);
	assert_int_equal(p.pages_now, 12);
	assert_true(going.in_order);
	assert_int_equal(in_memory("a/ram", 0, 2) + in_memory("a/ram", 3, 5), 7);
	assert_int_equal(in_memory("b/ram", 2, 1), 1);
	os_fault_arm(OS_FAULT_STORAGE_READ, 1, EIO); /* what is there is not read again */
	assert_int_equal(load(rest, 0, &p), 0);
	rest_close(rest);
}

static void test_rest_ends_early(void **state)
{
	struct rest *rest = open_rest();
	struct rest_progress p;

	(void)state;
	assert_int_equal(load(rest, 1, &p), -EINTR);
	assert_int_equal(p.pages_now, 0);
	os_fault_arm(OS_FAULT_SPARE_MEMORY, 1, ENOMEM);
	assert_int_equal(load(rest, 0, &p), -ENOMEM);
	assert_int_equal(p.pages_now, 0);
	os_fault_arm(OS_FAULT_STORAGE_READ, 2, EIO);
	assert_int_equal(load(rest, 0, &p), -EIO);
	assert_int_equal(p.pages_all, 12);
	assert_int_equal(p.pages_now, 1);
	os_fault_arm(OS_FAULT_STORAGE_READ, 0, 0);
	assert_int_equal(load(rest, 0, &p), 0);
	rest_close(rest);
	change_byte("a/ram", 1);
	assert_int_equal(rest_open(in_root("b"), &rest, why), -ESTALE);
	assert_int_equal(rest_open(in_root("nothing"), &rest, why), -ENOENT);
}

/* ---- what a migration need not send ---------------------------------------------------------------- */

static struct have *open_have(const char *one, const char *other)
{
	const char *dirs[] = { in_root(one), other ? in_root(other) : NULL };
	struct have *have = NULL;

	assert_int_equal(have_open(dirs, other ? 2 : 1, &have, why), 0);
	return have;
}

/* Is a page with these contents found, by a source that tells the truth? */
static bool finds(const struct have *have, uint64_t number)
{
	struct wire_same same = { .digest = digest_of(number) };
	page_bytes found;

	assert_true(have_digest(contents(number), same.sha256));
	if (!have_find(have, &same, found))
		return false;
	assert_memory_equal(found, contents(number), OS_PAGE_BYTES);
	return true;
}

/* All digests, asked for a few at a time, each once. */
static uint64_t count_have(const struct have *have)
{
	uint64_t digests[3], at = 0, last = 0, all = 0;
	size_t count;

	while ((count = have_list(have, &at, digests, 3)))
		for (size_t i = 0; i < count; i++, last = digests[i - 1])
			assert_true(!all++ || digests[i] > last);
	return all;
}

/* Pages that are stored in the snapshot, and in those that it refers to. */
static void test_have(void **state)
{
	struct have *have;

	(void)state;
	make_chain();
	have = open_have("a", NULL);
	assert_int_equal(count_have(have), 8);
	for (uint64_t i = 0; i < 8; i++)
		assert_true(finds(have, i));
	assert_false(finds(have, 50));
	assert_false(finds(have, 105)); /* on the image: nothing is known of it */
	have_close(have);
	have = open_have("b", NULL);
	assert_int_equal(count_have(have), 8);
	for (uint64_t i = 0; i < 8; i++)
		assert_true(finds(have, i) == (i != 2));
	assert_true(finds(have, 50));
	have_close(have);
	have = open_have("a", "b");
	assert_int_equal(count_have(have), 9);
	assert_true(finds(have, 2) && finds(have, 50));
	have_close(have);
	have_close(NULL);
}

/* Quick digests only propose: what is read decides. */
static void test_have_proves(void **state)
{
	struct wire_same same = { .digest = digest_of(3) };
	page_bytes found;
	struct have *have;
	int ram;

	(void)state;
	make_chain();
	have = open_have("a", NULL);
	assert_false(have_find(have, &same, found));
	assert_true(have_digest(contents(4), same.sha256)); /* the other page of a collision */
	assert_false(have_find(have, &same, found));
	ram = open(in_root("a/ram"), O_WRONLY | O_CLOEXEC);
	assert_int_equal(os_write_all(ram, "x", 1, os_bytes(3) + 1000), 0);
	assert_false(finds(have, 3));
	assert_true(finds(have, 4));
	assert_int_equal(ftruncate(ram, (off_t)os_bytes(4)), 0);
	assert_false(finds(have, 4));
	close(ram);
	have_close(have);
}

static void test_have_refused(void **state)
{
	const char *dirs[2];
	struct have *have;

	(void)state;
	make_chain();
	dirs[0] = in_root("a");
	dirs[1] = in_root("nowhere");
	assert_true(have_open(dirs, 2, &have, why) < 0);
	assert_non_null(strstr(why, "nowhere"));
	run_command("rm %s", "a/pages");
	dirs[0] = in_root("b");
	assert_true(have_open(dirs, 1, &have, why) < 0);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
	const struct CMUnitTest tests[] = {
		TEST(test_equal_pages_once),
		TEST(test_digests_only_propose),
		TEST(test_few_pages_of_one_digest),
		TEST(test_equal_leads_to_stored),
		TEST(test_parent_finds),
		TEST(test_parent_proves),
		TEST(test_parent_joins),
		TEST(test_flatten),
		TEST(test_flatten_no_space),
		TEST(test_flatten_fails_between),
		TEST(test_flatten_ended),
		TEST(test_chain_refused),
		TEST(test_image_written),
		TEST(test_mixed_refused),
		TEST(test_flatten_finds_damage),
		TEST(test_active_belongs),
		TEST(test_flatten_active),
		TEST(test_rest_is_loaded),
		TEST(test_rest_ends_early),
		TEST(test_have),
		TEST(test_have_proves),
		TEST(test_have_refused),
	};

	alarm(60);
	return cmocka_run_group_tests_name("snapshot", tests, NULL, NULL) ? 1 : 0;
}
