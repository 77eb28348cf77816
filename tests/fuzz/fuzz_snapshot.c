/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * A snapshot's files that somebody hostile has made. What is believed of them is within bounds, and what is
 * refused is refused with a sentence.
 *
 * Input: the first byte chooses the manifest (2: its text follows), the list of pages in use (4; 8: contents follow in the
 * file) or the metadata of pages. Of the latter two a valid file is patched: place (2 bytes), length (1 byte), contents;
 * a place behind its end cuts the file; with an odd first byte the checksum is made right.
 */
#include "fuzz.h"

#include "os/os.h"
#include "snapshot/active.h"
#include "snapshot/image.h"
#include "snapshot/manifest.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <xxhash.h>

#define FILE_BYTES (40 + 2 * 72 + 48 * 16)
#define ACTIVE_PAGES 3u
#define ACTIVE_BYTES (sizeof(struct active_header) + ACTIVE_PAGES * sizeof(struct active_page))

static const struct fuzz_token tokens[] = {
	FUZZ_TEXT("\xff\xff\xff\xff\xff\xff\xff\xff"),
	FUZZ_TEXT("\x00\x00\x00\x80"),
	FUZZ_TEXT("\"format\": \"latent-snapshot\", \"version\": 3,"),
	FUZZ_TEXT("\"volumes\": ["),
	FUZZ_TEXT("\"role\": \"ram\","),
	FUZZ_TEXT("\"parent\": {\"path\": \"/a\", \"name\": \"a\", \"created_unix_s\": 1},"),
	FUZZ_TEXT("\"disks\": [{\"drive\": \"d\", \"bytes\": 1, \"layers\": [{"),
	FUZZ_TEXT("\"file\": \"../x\""),
	FUZZ_TEXT("\"fingerprint\": \"0123456789abcdef\""),
	FUZZ_TEXT("9223372036854775808"),
	FUZZ_TEXT("\\u0000"),
	FUZZ_TEXT("[[[[[[[[[[[[[[[["),
	{ NULL, 0 },
};

const struct fuzz_target fuzz_target = { "snapshot", 4096, tokens, false };

static bool ends(const char *text, size_t room)
{
	return memchr(text, '\0', room);
}

static void check_manifest(const uint8_t *text, size_t bytes)
{
	int dir = open(fuzz_directory(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	int fd = openat(dir, SNAPSHOT_MANIFEST, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	char why[SNAPSHOT_WHY_BYTES] = "";
	static struct manifest m;
	int r;

	fuzz_require(write(fd, text, bytes) == (ssize_t)bytes);
	close(fd);
	r = manifest_read(dir, &m, why);
	close(dir);
	if (r) {
		fuzz_require(why[0] && ends(why, sizeof why));
		return;
	}
	fuzz_require(m.volumes <= SNAPSHOT_VOLUMES && m.disks <= MANIFEST_DISKS);
	fuzz_require(ends(m.name, sizeof m.name) && ends(m.qemu_version, sizeof m.qemu_version));
	fuzz_require(ends(m.parent.path, sizeof m.parent.path) && ends(m.parent.name, sizeof m.parent.name));
	for (uint32_t i = 0; i < m.volumes; i++) {
		fuzz_require(ends(m.volume[i].path, sizeof m.volume[i].path));
		fuzz_require(m.volume[i].role == MANIFEST_IMAGE || m.volume[i].role == MANIFEST_RAM);
	}
	machine_free(m.machine); /* fuzz_machine.c looks into it */
	fuzz_require(!strchr(m.name, '/')); /* names of new overlays are made of both */
	for (uint32_t i = 0; i < m.disks; i++) {
		fuzz_require(!strchr(m.disk[i].drive, '/'));
		fuzz_require(m.disk[i].layers && m.disk[i].layers <= MANIFEST_LAYERS);
		for (uint32_t j = 0; j < m.disk[i].layers; j++) {
			const struct manifest_layer *layer = &m.disk[i].layer[j];

			fuzz_require(ends(layer->file, sizeof layer->file) && !strchr(layer->file, '/') &&
				     layer->file[0] != '.');
			fuzz_require(layer->format[0] && !strchr(layer->format, '/'));
		}
	}
}

static void make_pages(uint8_t file[FILE_BYTES])
{
	struct snapshot_image layout = { .blocks = 2, .volumes = 3, .block = { { "pc.ram", 40, 0, NULL }, { "vga", 8, 0, NULL } } };
	struct snapshot_image image;
	int fd = os_memfd_create("pages", 0, false);

	fuzz_require(!snapshot_image_create(&layout, &image));
	/* By fours: a word, one that is stored, one on a volume, one that equals the second. */
	for (uint32_t i = 0; i < 40; i++)
		image.block[0].table[i] = (struct snapshot_page){ i % 4, i % 4 == 2 ? i % 3 : 0, i % 4 == 3 ? i - 2 : i };
	fuzz_require(!snapshot_image_write(&image, fd));
	fuzz_require(pread(fd, file, FILE_BYTES, 0) == FILE_BYTES);
	snapshot_image_free(&image);
	close(fd);
}

/* The length that the file has then. */
static size_t patch(struct fuzz_reader *in, uint8_t *file, size_t file_bytes)
{
	size_t length = file_bytes;

	while (in->at < in->end) {
		size_t at = fuzz_number(in, 2) % (file_bytes + 64), n = fuzz_byte(in);
		const uint8_t *bytes = fuzz_bytes(in, &n);

		if (at >= file_bytes)
			length = file_bytes - (at - file_bytes);
		else
			memcpy(file + at, bytes, n < file_bytes - at ? n : file_bytes - at);
	}
	return length;
}

static void check_active(struct fuzz_reader *in, bool repair, bool contents)
{
	struct active_page list[ACTIVE_PAGES] = { { 7, ACTIVE_WRITTEN, 1 }, { 47, 0, 1 }, { 0, 0, 2 } };
	struct snapshot_image image = { .pages = 48 };
	struct active_set set = { 0 };
	char why[SNAPSHOT_WHY_BYTES] = "";
	uint8_t file[ACTIVE_BYTES];
	uint64_t seen = 0;
	int fd = os_memfd_create("active", 0, false);
	size_t length;

	fuzz_require(!active_write(fd, list, ACTIVE_PAGES, &image, -1, NULL) && pread(fd, file, sizeof file, 0) == sizeof file);
	length = patch(in, file, sizeof file);
	if (repair) {
		uint64_t sum = XXH3_64bits(file + sizeof(struct active_header), sizeof file - sizeof(struct active_header));

		memcpy(file + 24, &sum, sizeof sum);
	}
	fuzz_require(!ftruncate(fd, 0) && !os_write_all(fd, file, length, 0));
	if (contents)
		fuzz_require(!ftruncate(fd, (off_t)os_bytes(1 + ACTIVE_PAGES)));
	if (active_read(fd, &image, &set, why)) {
		fuzz_require(!set.list && !set.digest);
		close(fd);
		return;
	}
	fuzz_require(set.count <= image.pages && !set.digest == !contents);
	for (uint64_t i = 0; i < set.count; i++) {
		fuzz_require(set.list[i].page < image.pages && !(seen & 1ull << set.list[i].page));
		seen |= 1ull << set.list[i].page;
	}
	active_free(&set);
	close(fd);
}

static void check_pages(struct fuzz_reader *in, bool repair)
{
	char why[SNAPSHOT_WHY_BYTES] = "";
	struct snapshot_image image = { 0 };
	struct snapshot_counts counts;
	uint8_t file[FILE_BYTES];
	uint64_t bad, pages = 0;
	size_t length;
	int fd;

	make_pages(file);
	length = patch(in, file, FILE_BYTES);
	if (repair) {
		uint64_t sum = XXH3_64bits(file + 40, FILE_BYTES - 40);

		memcpy(file + 32, &sum, sizeof sum);
	}
	fd = os_memfd_create("pages", 0, false);
	fuzz_require(!os_write_all(fd, file, length, 0));
	if (snapshot_image_read(fd, &image, why)) {
		fuzz_require(why[0] && ends(why, sizeof why));
		fuzz_require(!image.memory);
		close(fd);
		return;
	}
	for (uint32_t i = 0; i < image.blocks; i++) {
		fuzz_require(ends(image.block[i].name, sizeof image.block[i].name));
		fuzz_require(image.block[i].ram_page == pages);
		pages += image.block[i].pages;
	}
	fuzz_require(pages == image.pages);
	for (uint64_t i = 0; i < image.pages; i++) {
		const struct snapshot_page *page = (struct snapshot_page *)image.memory + i;

		fuzz_require(page->kind < SNAPSHOT_KINDS);
		fuzz_require(page->kind != SNAPSHOT_VOLUME || page->volume < image.volumes);
		fuzz_require(page->kind != SNAPSHOT_EQUAL ||
			     (page->value < image.pages && snapshot_page_at(&image, page->value)->kind == SNAPSHOT_DATA));
	}
	snapshot_image_count(&image, &counts);
	fuzz_require(counts.word + counts.data + counts.equal + counts.volume == counts.pages && counts.zero <= counts.word);
	(void)snapshot_image_verify(&image, fd, &bad, why);
	snapshot_image_free(&image);
	close(fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	struct fuzz_reader in = { data + 1, data + bytes };

	if (!bytes)
		return 0;
	if (data[0] & 2)
		check_manifest(data + 1, bytes - 1);
	else if (data[0] & 4)
		check_active(&in, data[0] & 1, data[0] & 8);
	else
		check_pages(&in, data[0] & 1);
	return 0;
}
