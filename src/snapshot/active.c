/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "snapshot/active.h"

#include "os/os.h"

#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#define CHUNK_PAGES 256u

_Static_assert(sizeof(struct active_header) == 40, "the layout is the format");
_Static_assert(sizeof(struct active_page) == 16, "the layout is the format");

/* Where the list ends. */
static uint64_t list_end(uint64_t count)
{
	return sizeof(struct active_header) + count * sizeof(struct active_page);
}

static uint64_t contents_offset(uint64_t count)
{
	return (list_end(count) + count * sizeof(uint64_t) + OS_PAGE_BYTES - 1) & ~(uint64_t)(OS_PAGE_BYTES - 1);
}

static int write_list(int fd, const struct active_page *list, uint64_t count, uint64_t pages_checksum)
{
	struct active_header header = {
		.magic = ACTIVE_MAGIC,
		.version = ACTIVE_VERSION,
		.page_bytes = OS_PAGE_BYTES,
		.pages = count,
		.checksum = XXH3_64bits(list, count * sizeof *list),
		.pages_checksum = pages_checksum,
	};
	int r = os_write_all(fd, &header, sizeof header, 0);

	return r ? r : os_write_all(fd, list, count * sizeof *list, sizeof header);
}

static int read_page(const struct snapshot_image *image, uint64_t page, int ram_fd, const int volume_fd[SNAPSHOT_VOLUMES],
		     void *contents)
{
	const struct snapshot_page *p = (const struct snapshot_page *)image->memory + page;

	if (p->kind == SNAPSHOT_VOLUME)
		return os_read_all(volume_fd[p->volume], contents, OS_PAGE_BYTES, os_bytes(p->value));
	return os_read_all(ram_fd, contents, OS_PAGE_BYTES, os_bytes(p->kind == SNAPSHOT_EQUAL ? p->value : page));
}

static int write_contents(int fd, const struct active_page *list, uint64_t count, const struct snapshot_image *image,
			  int ram_fd, const int volume_fd[SNAPSHOT_VOLUMES])
{
	uint8_t *chunk = malloc(os_bytes(CHUNK_PAGES));
	uint64_t digest[CHUNK_PAGES];
	int r = chunk ? 0 : -ENOMEM;

	for (uint64_t at = 0; !r && at < count; at += CHUNK_PAGES) {
		uint64_t n = count - at < CHUNK_PAGES ? count - at : CHUNK_PAGES;

		for (uint64_t i = 0; !r && i < n; i++) {
			r = read_page(image, list[at + i].page, ram_fd, volume_fd, chunk + os_bytes(i));
			digest[i] = XXH3_64bits(chunk + os_bytes(i), OS_PAGE_BYTES);
		}
		if (!r)
			r = os_write_all(fd, digest, n * sizeof digest[0], list_end(count) + at * sizeof digest[0]);
		if (!r)
			r = os_write_all(fd, chunk, os_bytes(n), contents_offset(count) + os_bytes(at));
	}
	free(chunk);
	return r;
}

int active_write(int fd, const struct active_page *list, uint64_t count, const struct snapshot_image *image, int ram_fd,
		 const int volume_fd[SNAPSHOT_VOLUMES])
{
	int r = write_list(fd, list, count, image->checksum);

	if (ram_fd < 0)
		return r;
	if (!r) /* without contents, too, it is as long as it says */
		r = ftruncate(fd, (off_t)(contents_offset(count) + os_bytes(count))) ? -errno : 0;
	return r ? r : write_contents(fd, list, count, image, ram_fd, volume_fd);
}

static int refuse(char *why, const char *text)
{
	snprintf(why, SNAPSHOT_WHY_BYTES, SNAPSHOT_ACTIVE ": %s", text);
	return -EBADMSG;
}

static int check_header(const struct active_header *h, uint64_t file_bytes, const struct snapshot_image *image, char *why)
{
	if (h->magic != ACTIVE_MAGIC || h->version != ACTIVE_VERSION || h->page_bytes != OS_PAGE_BYTES)
		return refuse(why, "not of this version of the format");
	if (h->pages_checksum != image->checksum)
		return refuse(why, "it belongs to another snapshot");
	if (h->pages > image->pages || (file_bytes != contents_offset(h->pages) + os_bytes(h->pages) &&
					file_bytes != list_end(h->pages)))
		return refuse(why, "its length is not what its pages need");
	return 0;
}

/* Each page at most once: `order` only grows, and no page has two places. */
static int check_list(const struct active_set *set, const struct snapshot_image *image, char *why)
{
	uint8_t *seen = calloc(1, image->pages / 8 + 1);
	int r = seen ? 0 : -ENOMEM;

	for (uint64_t i = 0; !r && i < set->count; i++) {
		uint64_t page = set->list[i].page;

		if (page >= image->pages || seen[page / 8] & 1u << page % 8 || set->list[i].flags > ACTIVE_WRITTEN)
			r = refuse(why, "a page of it is none of this snapshot's, or there twice");
		else
			seen[page / 8] = (uint8_t)(seen[page / 8] | 1u << page % 8);
	}
	free(seen);
	return r;
}

static int read_digests(int fd, struct active_set *set)
{
	set->contents_offset = contents_offset(set->count);
	set->digest = malloc(set->count * sizeof *set->digest + 1);
	return set->digest ? os_read_all(fd, set->digest, set->count * sizeof *set->digest, list_end(set->count)) : -ENOMEM;
}

int active_read(int fd, const struct snapshot_image *image, struct active_set *ret_set, char why[SNAPSHOT_WHY_BYTES])
{
	struct active_set set = { 0 };
	struct active_header h = { 0 };
	struct stat st;
	int r = fstat(fd, &st) ? -errno : os_read_all(fd, &h, sizeof h, 0);

	if (r)
		return refuse(why, "cannot be read");
	r = check_header(&h, (uint64_t)st.st_size, image, why);
	if (r)
		return r;
	set.count = h.pages;
	set.list = malloc(h.pages * sizeof *set.list + 1);
	r = set.list ? os_read_all(fd, set.list, h.pages * sizeof *set.list, sizeof h) : -ENOMEM;
	if (!r && (uint64_t)st.st_size != list_end(h.pages))
		r = read_digests(fd, &set);
	if (!r && XXH3_64bits(set.list, h.pages * sizeof *set.list) != h.checksum)
		r = refuse(why, "the checksum is wrong: the file is damaged");
	if (!r)
		r = check_list(&set, image, why);
	if (r)
		active_free(&set);
	else
		*ret_set = set;
	return r;
}

uint64_t active_digest(const struct active_set *set, uint64_t i, const struct snapshot_image *image)
{
	const struct snapshot_page *p = snapshot_page_at(image, set->list[i].page);

	if (p->kind == SNAPSHOT_EQUAL)
		p = snapshot_page_at(image, p->value);
	return p->kind == SNAPSHOT_DATA ? p->value : set->digest[i];
}

int active_rebind(int fd, const struct snapshot_image *image)
{
	return os_write_all(fd, &image->checksum, sizeof image->checksum, offsetof(struct active_header, pages_checksum));
}

int active_id(const int *fds, uint32_t count, char ret_id[ACTIVE_ID_BYTES])
{
	uint64_t words[7 * (SNAPSHOT_VOLUMES + 2)] = { 0 };
	XXH128_hash_t sum;

	if (count > SNAPSHOT_VOLUMES + 2)
		return -EINVAL;
	for (uint32_t i = 0; i < count; i++) {
		uint64_t *w = words + (size_t)7 * i;
		struct stat st;

		if (fstat(fds[i], &st))
			return -errno;
		w[0] = st.st_dev;
		w[1] = st.st_ino;
		w[2] = (uint64_t)st.st_size;
		w[3] = (uint64_t)st.st_mtim.tv_sec;
		w[4] = (uint64_t)st.st_mtim.tv_nsec;
		w[5] = (uint64_t)st.st_ctim.tv_sec; /* an old time of writing can be set; this one cannot */
		w[6] = (uint64_t)st.st_ctim.tv_nsec;
	}
	sum = XXH3_128bits(words, (size_t)7 * count * sizeof words[0]);
	snprintf(ret_id, ACTIVE_ID_BYTES, "%016llx%016llx", (unsigned long long)sum.high64, (unsigned long long)sum.low64);
	return 0;
}

void active_free(struct active_set *set)
{
	free(set->list);
	free(set->digest);
	*set = (struct active_set){ 0 };
}
