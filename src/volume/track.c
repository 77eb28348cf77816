/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "volume/track.h"

#include "os/os.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define TRACK_VERSION 1u
#define TRACK_PATH_BYTES 512
#define OPEN_TRIES 20
#define PAGES_MAX (1ull << 40) /* no sum of bytes overflows */
#define ALIVE_MAX_AGE_NS 100000000ull

#define WORD_COUNT 0x00ffffffu /* guest pages of the VM that map the location */
#define WORD_READ (1u << 30)
#define WORD_FLIGHT (1u << 31)

typedef _Atomic uint32_t track_word;

struct track_slot {
	_Atomic uint64_t first_reads, hits;
	uint64_t reserved[6];
};

struct track_header {
	struct track_slot slots[TRACK_SLOTS];
};

_Static_assert(sizeof(struct track_header) <= OS_PAGE_BYTES, "the header is one page");

struct track {
	char path[TRACK_PATH_BYTES];
	int fd;
	unsigned slot;
	uint64_t pages;
	size_t row_bytes, bytes;
	struct track_header *header;
	uint8_t *rows;
	_Atomic uint64_t alive; /* bit n: slot n has a living VM; this VM's own is always set */
	_Atomic uint64_t alive_since_ns;
};

/* ---- slots ---------------------------------------------------------------------------------- */

static struct flock slot_lock(unsigned slot)
{
	return (struct flock){ .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = slot, .l_len = 1 };
}

static bool slot_is_alive(struct track *t, unsigned slot)
{
	struct flock lock = slot_lock(slot);

	return slot == t->slot || (!fcntl(t->fd, F_OFD_GETLK, &lock) && lock.l_type != F_UNLCK);
}

static struct flock all_slots_lock(void)
{
	return (struct flock){ .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = TRACK_SLOTS };
}

/* Removes the file if it is still the one of that name and nobody else is attached. Who opens it just now
 * finds no slot, or that its file has no name any more, and tries again. */
static void unlink_if_last(int fd, const char *path)
{
	struct flock lock = all_slots_lock();
	struct stat ours, named;

	if (!fcntl(fd, F_OFD_SETLK, &lock) && !fstat(fd, &ours) && !lstat(path, &named) &&
	    ours.st_ino == named.st_ino && ours.st_dev == named.st_dev)
		unlink(path);
}

static int claim_slot(struct track *t)
{
	for (unsigned slot = 0; slot < TRACK_SLOTS; slot++) {
		struct flock lock = slot_lock(slot);

		if (fcntl(t->fd, F_OFD_SETLK, &lock))
			continue;
		t->slot = slot;
		/* What a dead VM left there. */
		(void)os_punch_hole(t->fd, OS_PAGE_BYTES + slot * t->row_bytes, t->row_bytes);
		return 0;
	}
	return -EUSERS;
}

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

void track_refresh(struct track *t)
{
	uint64_t alive = 0;

	for (unsigned slot = 0; slot < TRACK_SLOTS; slot++)
		if (slot_is_alive(t, slot))
			alive |= 1ull << slot;
	t->alive = alive;
	t->alive_since_ns = now_ns();
}

static uint64_t alive_slots(struct track *t)
{
	if (now_ns() - t->alive_since_ns > ALIVE_MAX_AGE_NS)
		track_refresh(t);
	return t->alive;
}

#define FOR_SLOTS(slot, set) \
	for (uint64_t left_ = (set), slot; left_ && (slot = (uint64_t)__builtin_ctzll(left_), 1); \
	     left_ &= left_ - 1)

static track_word *word_of(struct track *t, uint64_t slot, uint64_t page)
{
	return (track_word *)(void *)(t->rows + slot * t->row_bytes) + page;
}

static uint32_t word_get(struct track *t, uint64_t slot, uint64_t page)
{
	return atomic_load_explicit(word_of(t, slot, page), memory_order_relaxed);
}

static uint64_t other_slots(struct track *t)
{
	return alive_slots(t) & ~(1ull << t->slot);
}

/* ---- life ----------------------------------------------------------------------------------- */

static int name_file(const char *dir, uint64_t dev, uint64_t ino, uint64_t pages, char path[TRACK_PATH_BYTES])
{
	int n = snprintf(path, TRACK_PATH_BYTES, "%s/%llx-%llx-%llu.v%u", dir, (unsigned long long)dev,
			 (unsigned long long)ino, (unsigned long long)pages, TRACK_VERSION);

	return n < TRACK_PATH_BYTES ? 0 : -ENAMETOOLONG;
}

static int open_file(const char *path)
{
	int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);

	return fd < 0 ? -errno : fd;
}

/* Ours, an ordinary file, and as long as rows for all slots need. */
static int check_file(int fd, size_t bytes)
{
	struct stat st;

	if (fstat(fd, &st))
		return -errno;
	if (!S_ISREG(st.st_mode) || st.st_uid != geteuid() || (st.st_mode & 022))
		return -EPERM;
	if ((uint64_t)st.st_size < bytes && ftruncate(fd, (off_t)bytes))
		return -errno;
	return 0;
}

static int map_file(struct track *t)
{
	void *at = os_view_file(t->fd, t->bytes, true);

	if (!at)
		return -ENOMEM;
	t->header = at;
	t->rows = (uint8_t *)at + OS_PAGE_BYTES;
	return os_guard_view(at, t->bytes);
}

/* A slot in the file of that name; -EAGAIN: it has just been removed. */
static int attach(struct track *t)
{
	struct stat st;
	int r = t->fd = open_file(t->path);

	if (r >= 0)
		r = check_file(t->fd, t->bytes);
	if (!r)
		r = claim_slot(t);
	if (!r && (fstat(t->fd, &st) || !st.st_nlink))
		r = -EAGAIN;
	return r;
}

int track_open(const char *dir, uint64_t dev, uint64_t ino, uint64_t pages, struct track **ret_track)
{
	struct track *t;
	int r;

	if (pages > PAGES_MAX)
		return -EFBIG;
	t = calloc(1, sizeof *t);
	if (!t)
		return -ENOMEM;
	t->pages = pages;
	t->row_bytes = (pages * sizeof(track_word) + OS_PAGE_BYTES - 1) & ~(OS_PAGE_BYTES - 1);
	t->bytes = OS_PAGE_BYTES + TRACK_SLOTS * t->row_bytes;
	t->fd = -1;
	r = name_file(dir, dev, ino, pages, t->path);
	if (!r)
		r = attach(t);
	for (int tries = 0; (r == -EAGAIN || r == -EUSERS) && tries < OPEN_TRIES; tries++) {
		close(t->fd);
		usleep(1000);
		r = attach(t);
	}
	if (!r)
		r = map_file(t);
	if (r < 0) {
		track_close(t);
		return r;
	}
	t->header->slots[t->slot].first_reads = 0;
	t->header->slots[t->slot].hits = 0;
	track_refresh(t);
	*ret_track = t;
	return 0;
}

void track_close(struct track *t)
{
	if (!t)
		return;
	if (t->header) {
		os_unguard_view(t->header);
		os_unview_file(t->header, t->bytes);
	}
	if (t->fd >= 0) {
		unlink_if_last(t->fd, t->path);
		close(t->fd); /* lets the slot's lock go */
	}
	free(t);
}

void track_abandon(struct track *t)
{
	unlink_if_last(t->fd, t->path);
}

void track_sweep(const char *dir)
{
	DIR *files = opendir(dir);
	struct dirent *entry;

	while (files && (entry = readdir(files))) {
		char path[TRACK_PATH_BYTES];
		int fd;

		if (entry->d_name[0] == '.' ||
		    snprintf(path, sizeof path, "%s/%s", dir, entry->d_name) >= TRACK_PATH_BYTES)
			continue;
		fd = open(path, O_RDWR | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
		if (fd < 0)
			continue;
		unlink_if_last(fd, path);
		close(fd);
	}
	if (files)
		closedir(files);
}

/* ---- likelihood ----------------------------------------------------------------------------- */

uint32_t track_readers(struct track *t)
{
	return (uint32_t)__builtin_popcountll(alive_slots(t));
}

static double prior(struct track *t)
{
	uint64_t alive = alive_slots(t), reads = 0, most = 0, hits = 0;

	if (__builtin_popcountll(alive) < 2)
		return 0;
	FOR_SLOTS(slot, alive) {
		uint64_t n = t->header->slots[slot].first_reads;

		reads += n;
		most = n > most ? n : most;
		hits += t->header->slots[slot].hits;
	}
	/* The slots of others may hold anything: keep to what can be. */
	if (hits > reads - most)
		hits = reads - most;
	return ((double)hits + 1) / ((double)(reads - most) + 2);
}

static bool known_elsewhere(struct track *t, uint64_t others, uint64_t page)
{
	FOR_SLOTS(slot, others)
		if (word_get(t, slot, page))
			return true;
	return false;
}

double track_likelihood(struct track *t, uint64_t page, uint64_t pages)
{
	uint64_t others = other_slots(t), known = 0;

	for (uint64_t i = 0; i < pages; i++)
		known += (word_get(t, t->slot, page + i) & WORD_COUNT) || known_elsewhere(t, others, page + i);
	if (known == pages)
		return 1;
	return ((double)known + (double)(pages - known) * prior(t)) / (double)pages;
}

void track_note_read(struct track *t, uint64_t page, uint64_t pages)
{
	struct track_slot *mine = &t->header->slots[t->slot];
	uint64_t others = other_slots(t);

	for (uint64_t i = 0; i < pages; i++) {
		if (word_get(t, t->slot, page + i) & WORD_READ)
			continue;
		atomic_fetch_or_explicit(word_of(t, t->slot, page + i), WORD_READ, memory_order_relaxed);
		mine->first_reads++;
		FOR_SLOTS(slot, others) {
			if (word_get(t, slot, page + i) & WORD_READ) {
				mine->hits++;
				break;
			}
		}
	}
}

/* ---- counts --------------------------------------------------------------------------------- */

uint64_t track_begin_flight(struct track *t, uint64_t page, uint64_t pages)
{
	uint64_t others = other_slots(t), joined = 0;

	for (uint64_t i = 0; i < pages; i++) {
		atomic_fetch_or_explicit(word_of(t, t->slot, page + i), WORD_FLIGHT, memory_order_relaxed);
		FOR_SLOTS(slot, others) {
			if (word_get(t, slot, page + i) & WORD_FLIGHT) {
				joined++;
				break;
			}
		}
	}
	return joined;
}

void track_end_flight(struct track *t, uint64_t page, uint64_t pages)
{
	for (uint64_t i = 0; i < pages; i++)
		atomic_fetch_and_explicit(word_of(t, t->slot, page + i), ~WORD_FLIGHT, memory_order_relaxed);
}

void track_add_maps(struct track *t, uint64_t page, uint64_t pages)
{
	for (uint64_t i = 0; i < pages; i++)
		atomic_fetch_add_explicit(word_of(t, t->slot, page + i), 1, memory_order_relaxed);
}

void track_drop_maps(struct track *t, uint64_t page, uint64_t pages)
{
	for (uint64_t i = 0; i < pages; i++)
		if (word_get(t, t->slot, page + i) & WORD_COUNT) /* it may have been tampered with */
			atomic_fetch_sub_explicit(word_of(t, t->slot, page + i), 1, memory_order_relaxed);
}

static uint64_t count_maps(struct track *t, uint64_t slots, uint64_t page)
{
	uint64_t maps = 0;

	FOR_SLOTS(slot, slots)
		maps += word_get(t, slot, page) & WORD_COUNT;
	return maps;
}

uint64_t track_maps(struct track *t, uint64_t page)
{
	return count_maps(t, alive_slots(t), page);
}

/* Those of `slots` whose rows hold something in the page of words that begins at location `first`.
 * Reading a hole of the file through the mapping would allocate memory for it. */
static uint64_t slots_with_data(struct track *t, uint64_t slots, uint64_t first)
{
	uint64_t with_data = 0;

	FOR_SLOTS(slot, slots) {
		uint64_t at = OS_PAGE_BYTES + slot * t->row_bytes + first * sizeof(track_word);

		if (os_has_data(t->fd, at, OS_PAGE_BYTES))
			with_data |= 1ull << slot;
	}
	return with_data;
}

void track_groups(struct track *t, uint64_t *ret_one, uint64_t *ret_many)
{
	uint64_t one = 0, many = 0, alive = alive_slots(t);

	for (uint64_t first = 0; first < t->pages; first += OS_PAGE_BYTES / sizeof(track_word)) {
		uint64_t slots = slots_with_data(t, alive, first);
		uint64_t end = first + OS_PAGE_BYTES / sizeof(track_word);

		for (uint64_t page = first; slots && page < end && page < t->pages; page++) {
			uint64_t maps = count_maps(t, slots, page);

			one += maps == 1;
			many += maps > 1;
		}
	}
	*ret_one = one;
	*ret_many = many;
}
