/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "pager/cache.h"

#include "os/os.h"
#include "snapshot/active.h"
#include "snapshot/manifest.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define INDEX_MAX_BYTES (1ull << 32)

#define ACTIVE_READ_RECORDS 4096u

static int fail(char *why, int r, const char *what)
{
	snprintf(why, STORE_WHY_BYTES, "%s: %s", what, strerror(-r));
	return r;
}

static const struct snapshot_page *page_at(const struct cache *c, uint64_t page)
{
	return (const struct snapshot_page *)c->image.memory + page;
}

/* ---- what is known of the snapshot ------------------------------------------------------------ */

static int read_whole(int fd, void *to, size_t bytes, uint64_t offset)
{
	ssize_t n = pread(fd, to, bytes, (off_t)offset);

	return n == (ssize_t)bytes ? 0 : n < 0 ? -errno : -EBADMSG;
}

static int take_index(struct cache *c, uint64_t index_bytes, char *why)
{
	struct packed_header header;
	struct packed_entry *entries;
	uint64_t file_bytes, expected = 0;
	int r;

	snprintf(why, STORE_WHY_BYTES, "the index of " SNAPSHOT_PACKED " is not whole");
	if (index_bytes < sizeof file_bytes + sizeof header)
		return -EBADMSG;
	r = read_whole(c->index_fd, &file_bytes, sizeof file_bytes, 0);
	if (!r)
		r = read_whole(c->index_fd, &header, sizeof header, sizeof file_bytes);
	if (!r)
		r = packed_check_header(&header, &c->image, file_bytes, &expected, why);
	if (!r && expected != index_bytes - sizeof file_bytes - sizeof header)
		r = -EBADMSG;
	entries = r ? NULL : malloc(expected ? (size_t)expected : 1);
	if (entries)
		r = read_whole(c->index_fd, entries, (size_t)expected, sizeof file_bytes + sizeof header);
	if (entries && !r)
		r = packed_take_index(&header, entries, &c->image, &c->packed, why);
	free(entries);
	return r ? r : c->packed.chunk ? 0 : -ENOMEM;
}

/* Pages and index are there: the chunks, and what has become of them. */
static int describe(struct cache *c, bool single_pages, char *why)
{
	struct stat st;
	int r = snapshot_image_read(c->pages_fd, &c->image, why);

	if (r)
		return r;
	if (fstat(c->index_fd, &st))
		return fail(why, -errno, "the index");
	c->object = st.st_size ? SNAPSHOT_PACKED : SNAPSHOT_RAM;
	r = st.st_size ? take_index(c, (uint64_t)st.st_size, why)
		       : packed_of_plain(&c->image, single_pages ? 1 : PACKED_CHUNK_PAGES, &c->packed);
	if (r)
		return r;
	for (uint64_t i = 0; i < c->packed.chunks; i++)
		c->pages_all += c->packed.chunk[i].pages;
	c->state = calloc(c->packed.chunks ? (size_t)c->packed.chunks : 1, 1);
	return c->state ? 0 : fail(why, -ENOMEM, "the chunks");
}

static struct cache *new_cache(void)
{
	struct cache *c = calloc(1, sizeof *c);

	if (c)
		c->fd = c->pages_fd = c->index_fd = c->manifest_fd = c->state_fd = -1;
	return c;
}

void cache_free(struct cache *c)
{
	const int fds[] = { c ? c->fd : -1, c ? c->pages_fd : -1, c ? c->index_fd : -1, c ? c->manifest_fd : -1,
			    c ? c->state_fd : -1 };

	if (!c)
		return;
	for (size_t i = 0; i < sizeof fds / sizeof fds[0]; i++)
		if (fds[i] >= 0)
			close(fds[i]);
	packed_free(&c->packed);
	snapshot_image_free(&c->image);
	free(c->first_wanted);
	free(c->state);
	free(c);
}

/* ---- from the store --------------------------------------------------------------------------- */

struct awaited {
	struct store_read read;
	bool done;
	int r;
};

static void note_end(struct store_read *read, int r)
{
	struct awaited *a = (struct awaited *)(void *)read; /* its first member */

	a->done = true;
	a->r = r;
}

static int get_part(struct store *store, const char *object, uint64_t offset, void *to, size_t bytes)
{
	struct awaited a = { .read = { .object = object, .offset = offset, .bytes = bytes, .to = to, .done = note_end } };
	int r = store_start(store, &a.read);

	while (!r && !a.done)
		store_wait(store, NULL, 0, 1000);
	return r ? r : a.r;
}

static int get_index(struct cache *c, struct store *store, uint64_t file_bytes, char *why)
{
	struct packed_header header;
	uint64_t bytes = 0;
	uint8_t *index = NULL;
	int r;

	why[0] = '\0'; /* what was read before was all right */
	r = file_bytes < sizeof header ? -EBADMSG : get_part(store, SNAPSHOT_PACKED, 0, &header, sizeof header);
	c->index_fd = os_memfd_create("latent-index", 0, false);
	if (!r && c->index_fd < 0)
		r = c->index_fd;
	if (!r)
		r = packed_check_header(&header, &c->image, file_bytes, &bytes, why);
	if (!r && bytes > INDEX_MAX_BYTES)
		r = -E2BIG;
	if (!r && bytes) {
		index = malloc((size_t)bytes);
		r = index ? get_part(store, SNAPSHOT_PACKED, header.index_offset, index, (size_t)bytes) : -ENOMEM;
	}
	if (!r)
		r = os_write_all(c->index_fd, &file_bytes, sizeof file_bytes, 0);
	if (!r)
		r = os_write_all(c->index_fd, &header, sizeof header, sizeof file_bytes);
	if (!r)
		r = os_write_all(c->index_fd, index, (size_t)bytes, sizeof file_bytes + sizeof header);
	free(index);
	return r;
}

/* Sizes first: `pages` can be no longer than what the manifest's RAM needs. */
static int get_metadata(struct cache *c, struct store *store, char *why)
{
	struct manifest *m = calloc(1, sizeof *m);
	uint64_t pages_max;
	int r = m ? store_get(store, SNAPSHOT_MANIFEST, MANIFEST_MAX_BYTES, &c->manifest_fd) : -ENOMEM;

	if (!r) {
		r = manifest_read_file(c->manifest_fd, m, why);
		if (!r) {
			pages_max = sizeof(struct snapshot_header) + SNAPSHOT_BLOCKS * sizeof(struct snapshot_block) +
				    (m->ram_bytes >> OS_PAGE_SHIFT) * sizeof(struct snapshot_page);
			r = store_get(store, SNAPSHOT_PAGES, pages_max, &c->pages_fd);
		}
		if (!r)
			r = store_get(store, SNAPSHOT_STATE, m->state_bytes, &c->state_fd);
		/* The image is read again with the index; here only the count of stored pages is needed. */
		if (!r && m->packed_bytes)
			r = snapshot_image_read(c->pages_fd, &c->image, why);
		if (!r && m->packed_bytes)
			r = get_index(c, store, m->packed_bytes, why);
		else if (!r)
			r = c->index_fd = os_memfd_create("latent-index", 0, false);
		snapshot_image_free(&c->image);
	}
	if (r < 0 && !why[0])
		snprintf(why, STORE_WHY_BYTES, "%s", store_trouble(store)[0] ? store_trouble(store) : strerror(-r));
	free(m);
	return r < 0 ? r : 0;
}

static void want_first(struct cache *c, const struct active_page *record, uint8_t *seen)
{
	uint64_t chunk;

	if (record->page >= c->image.pages || !cache_chunk_of(c, record->page, &chunk) || seen[chunk])
		return;
	seen[chunk] = 1;
	c->first_wanted[c->first_count++] = chunk;
}

/* Advice: a file that is missing, or not what it should be, changes the order and nothing else. */
static void take_active(struct cache *c, struct store *store)
{
	static struct active_page records[ACTIVE_READ_RECORDS];
	uint8_t *seen = calloc(c->packed.chunks ? (size_t)c->packed.chunks : 1, 1);
	struct active_header header;
	int r = get_part(store, SNAPSHOT_ACTIVE, 0, &header, sizeof header);

	c->first_wanted = calloc(c->packed.chunks ? (size_t)c->packed.chunks : 1, sizeof *c->first_wanted);
	if (!r && (!seen || !c->first_wanted || header.magic != ACTIVE_MAGIC || header.version != ACTIVE_VERSION ||
		   header.page_bytes != OS_PAGE_BYTES || header.pages_checksum != c->image.checksum ||
		   header.pages > c->image.pages))
		r = -EBADMSG;
	for (uint64_t at = 0, n; !r && at < header.pages; at += n) {
		n = header.pages - at < ACTIVE_READ_RECORDS ? header.pages - at : ACTIVE_READ_RECORDS;
		r = get_part(store, SNAPSHOT_ACTIVE, sizeof header + at * sizeof records[0], records, (size_t)n * sizeof records[0]);
		for (uint64_t i = 0; !r && i < n; i++)
			want_first(c, &records[i], seen);
	}
	free(seen);
	store_forgive(store);
}

int cache_load(struct store *store, bool single_pages, struct cache **ret_cache, char why[STORE_WHY_BYTES])
{
	struct cache *c = new_cache();
	int r = c ? 0 : -ENOMEM;

	why[0] = '\0';
	if (!r)
		r = get_metadata(c, store, why);
	if (!r)
		r = describe(c, single_pages, why);
	if (!r)
		r = c->fd = os_memfd_create("latent-cache", os_bytes(c->image.pages), false);
	if (r < 0) {
		if (!why[0])
			snprintf(why, STORE_WHY_BYTES, "%s", strerror(-r));
		cache_free(c);
		return r;
	}
	take_active(c, store);
	c->own = true;
	*ret_cache = c;
	return 0;
}

/* ---- from an agent ---------------------------------------------------------------------------- */

static bool is_there(const struct cache *c, const struct packed_chunk *chunk, uint64_t *from, uint64_t *to)
{
	uint64_t page = chunk->first;

	for (uint32_t i = 0; i < chunk->pages; i++) {
		if (os_bytes(page) >= *to && !os_next_data(c->fd, os_bytes(page), os_bytes(c->image.pages), from, to))
			return false;
		if (os_bytes(page) < *from)
			return false;
		page = packed_next_stored(&c->image, page + 1);
	}
	return true;
}

static void find_present(struct cache *c)
{
	uint64_t from = 0, to = 0; /* a run of data */

	for (uint64_t i = 0; i < c->packed.chunks; i++) {
		if (!is_there(c, &c->packed.chunk[i], &from, &to))
			continue;
		c->state[i] = CHUNK_PRESENT;
		c->chunks_present++;
		c->pages_present += c->packed.chunk[i].pages;
	}
}

int cache_adopt(int fd, int pages_fd, int index_fd, bool single_pages, struct cache **ret_cache,
		char why[STORE_WHY_BYTES])
{
	struct cache *c = new_cache();
	char path[32];
	struct stat st;
	int r;

	if (!c)
		return fail(why, -ENOMEM, "the cache");
	c->pages_fd = pages_fd;
	c->index_fd = index_fd;
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd); /* the agent has it for reading only */
	c->fd = open(path, O_RDWR | O_CLOEXEC);
	r = c->fd < 0 ? fail(why, -errno, "the cache") : describe(c, single_pages, why);
	close(fd);
	if (!r && (fstat(c->fd, &st) || (uint64_t)st.st_size != os_bytes(c->image.pages))) {
		snprintf(why, STORE_WHY_BYTES, "the cache is not as long as the snapshot's RAM");
		r = -EBADMSG;
	}
	if (r) {
		cache_free(c);
		return r;
	}
	find_present(c);
	*ret_cache = c;
	return 0;
}

bool cache_is_file(const struct cache *c, int fd)
{
	struct stat mine, other;

	return !fstat(c->fd, &mine) && !fstat(fd, &other) && mine.st_ino == other.st_ino && mine.st_dev == other.st_dev;
}

static bool is_right(const struct cache *c, uint64_t page)
{
	uint8_t bytes[OS_PAGE_BYTES];
	struct snapshot_page found;

	if (read_whole(c->fd, bytes, sizeof bytes, os_bytes(page)))
		return false;
	found = snapshot_classify(bytes);
	return found.kind == page_at(c, page)->kind && found.value == page_at(c, page)->value;
}

/* Every page that it holds, those between stored ones too. */
static bool all_is_right(const struct cache *c)
{
	uint64_t from, to = 0, end = os_bytes(c->image.pages);

	while (os_next_data(c->fd, to, end, &from, &to))
		for (uint64_t page = from >> OS_PAGE_SHIFT; page < to >> OS_PAGE_SHIFT; page++)
			if (!is_right(c, page))
				return false;
	return true;
}

bool cache_merge(struct cache *a, struct cache *loaded)
{
	if (a->own || a->image.pages != loaded->image.pages || a->packed.chunks != loaded->packed.chunks ||
	    memcmp(a->image.memory, loaded->image.memory, a->image.memory_bytes) ||
	    memcmp(a->packed.chunk, loaded->packed.chunk, (size_t)a->packed.chunks * sizeof *a->packed.chunk) || !all_is_right(a))
		return false;
	a->own = true;
	a->manifest_fd = loaded->manifest_fd;
	a->state_fd = loaded->state_fd;
	a->first_wanted = loaded->first_wanted;
	a->first_count = loaded->first_count;
	loaded->manifest_fd = loaded->state_fd = -1;
	loaded->first_wanted = NULL;
	cache_free(loaded);
	return true;
}

size_t cache_manifest_bytes(const struct cache *c)
{
	struct stat st;

	return fstat(c->manifest_fd, &st) || st.st_size < 1 ? 1 : (size_t)st.st_size;
}

bool cache_has_manifest(const struct cache *c, const void *text, size_t bytes)
{
	char *mine = malloc(bytes);
	bool same = mine && bytes == cache_manifest_bytes(c) && !read_whole(c->manifest_fd, mine, bytes, 0) &&
		    !memcmp(mine, text, bytes);

	free(mine);
	return same;
}

/* ---- pages ------------------------------------------------------------------------------------ */

bool cache_chunk_of(const struct cache *c, uint64_t page, uint64_t *ret_chunk)
{
	if (page < c->image.pages && page_at(c, page)->kind == SNAPSHOT_EQUAL)
		page = page_at(c, page)->value; /* which is mapped in its place */
	if (page >= c->image.pages || page_at(c, page)->kind != SNAPSHOT_DATA)
		return false;
	*ret_chunk = packed_find(&c->packed, page);
	return true;
}

int cache_make_page(struct cache *c, uint64_t page)
{
	uint64_t words[OS_PAGE_BYTES / sizeof(uint64_t)], word = 0;

	if (page >= c->image.pages)
		return -ERANGE;
	if (page_at(c, page)->kind == SNAPSHOT_WORD)
		word = page_at(c, page)->value;
	for (size_t i = 0; i < OS_PAGE_BYTES / sizeof word; i++)
		words[i] = word;
	return os_write_all(c->fd, words, sizeof words, os_bytes(page));
}

int cache_put(struct cache *c, uint64_t chunk, const void *from, size_t bytes)
{
	static uint8_t pages[PACKED_CHUNK_MAX_PAGES << OS_PAGE_SHIFT];
	const struct packed_chunk *k = &c->packed.chunk[chunk];
	uint64_t page = k->first;
	int r = packed_unpack(&c->packed, chunk, from, bytes, pages);

	for (uint32_t i = 0, run; !r && i < k->pages; i += run) {
		uint64_t next = packed_next_stored(&c->image, page + 1);

		for (run = 1; i + run < k->pages && next == page + run; run++)
			next = packed_next_stored(&c->image, next + 1);
		r = os_write_all(c->fd, pages + os_bytes(i), os_bytes(run), os_bytes(page));
		page = next;
	}
	if (r)
		return r;
	c->state[chunk] = CHUNK_PRESENT;
	c->chunks_present++;
	c->pages_present += k->pages;
	return 0;
}

bool cache_next(struct cache *c, bool rest, uint64_t *ret_chunk)
{
	while (c->first_at < c->first_count) {
		uint64_t chunk = c->first_wanted[c->first_at];

		if (c->state[chunk] == CHUNK_ABSENT) {
			*ret_chunk = chunk;
			return true;
		}
		c->first_at++;
	}
	for (uint64_t i = 0; rest && i < c->packed.chunks; i++) {
		if (c->next_chunk >= c->packed.chunks)
			c->next_chunk = 0;
		if (c->state[c->next_chunk] == CHUNK_ABSENT) {
			*ret_chunk = c->next_chunk;
			return true;
		}
		c->next_chunk++;
	}
	return false;
}
