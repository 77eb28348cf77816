/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "snapshot/rest.h"

#include "os/os.h"
#include "snapshot/active.h"
#include "snapshot/reader.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

/* Under way at a time: who waits for a page of his own waits behind no more. */
#define PIECE_PAGES 32u
/* And then nothing for this many times as long as it took: not all storage heeds priorities. */
#define PAUSES 3u
#define PAUSE_MAX_US 100000u
#define CHECKED_PAGES 1024u /* before it is looked for room again */

/* A file that pages are in. */
struct part {
	int fd; /* the reader's; -1: none of it is loaded */
	uint64_t pages;
	void *view; /* NULL: the kernel does not tell what is in memory, and all of it is read */
};

struct rest {
	struct reader reader;
	struct active_set active;
	struct part part[1 + SNAPSHOT_VOLUMES]; /* `ram`, and the volumes */
	uint64_t room_bytes;                    /* may be read, */
	uint64_t checked_bytes;                 /* and of that, before it is looked again */
	uint8_t bytes[PIECE_PAGES << OS_PAGE_SHIFT];
	bool (*go_on)(void *ctx);
	void *ctx;
	struct rest_progress *progress;
};

/* Pages that follow each other in a file. */
struct run {
	struct part *part;
	uint64_t page, pages;
};

static void open_part(struct part *part, int fd)
{
	struct stat st;

	*part = (struct part){ .fd = fd };
	if (fd < 0 || fstat(fd, &st))
		return;
	part->pages = (uint64_t)st.st_size >> OS_PAGE_SHIFT;
	(void)posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM); /* what is read, and nothing behind it */
	if (part->pages && os_residency_is_told(fd))
		part->view = os_view_file(fd, os_bytes(part->pages), false);
}

int rest_open(const char *dir, struct rest **ret_rest, char why[SNAPSHOT_WHY_BYTES])
{
	struct rest *r = calloc(1, sizeof *r);
	char ignored[SNAPSHOT_WHY_BYTES];
	int e = r ? reader_open(dir, &r->reader, why) : -ENOMEM, fd;

	if (!e)
		e = reader_open_files(&r->reader, why);
	if (e) {
		rest_close(r);
		return e;
	}
	for (uint32_t i = 0; i <= r->reader.manifest.volumes; i++)
		open_part(&r->part[i], reader_fd(&r->reader, (int)i - 1));
	/* It is a help: without it the order is another one. */
	fd = openat(r->reader.dir_fd, SNAPSHOT_ACTIVE, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
	if (fd >= 0) {
		(void)active_read(fd, &r->reader.image, &r->active, ignored);
		close(fd);
	}
	*ret_rest = r;
	return 0;
}

void rest_close(struct rest *r)
{
	if (!r)
		return;
	for (size_t i = 0; i < sizeof r->part / sizeof r->part[0]; i++)
		os_unview_file(r->part[i].view, os_bytes(r->part[i].pages));
	active_free(&r->active);
	reader_close(&r->reader);
	free(r);
}

/* ---- which pages ------------------------------------------------------------------------------- */

static bool locate(struct rest *r, uint64_t page, struct part **ret_part, uint64_t *ret_page)
{
	int file;

	if (!reader_locate(&r->reader, page, &file, ret_page))
		return false;
	*ret_part = &r->part[file + 1];
	return (*ret_part)->fd >= 0 && *ret_page < (*ret_part)->pages;
}

/* True: `run` has grown by the page, or `page` has no contents. */
static bool join(struct rest *r, uint64_t page, struct run *run)
{
	struct part *part;
	uint64_t at;

	if (!locate(r, page, &part, &at))
		return true;
	if (!run->pages)
		*run = (struct run){ part, at, 0 };
	if (run->part != part || run->page + run->pages != at || run->pages == PIECE_PAGES)
		return false;
	run->pages++;
	return true;
}

/* The n-th page of the active set, or of RAM. */
static uint64_t nth(const struct rest *r, bool active, uint64_t n)
{
	return active ? r->active.list[n].page : n;
}

static int for_each_run(struct rest *r, bool active, int (*visit)(struct rest *, const struct run *))
{
	uint64_t count = active ? r->active.count : r->reader.image.pages;
	struct run run = { 0 };
	int e = 0;

	for (uint64_t n = 0; !e && n < count; n++) {
		if (join(r, nth(r, active, n), &run))
			continue;
		e = visit(r, &run);
		run.pages = 0;
		(void)join(r, nth(r, active, n), &run);
	}
	return e || !run.pages ? e : visit(r, &run);
}

/* ---- loading ----------------------------------------------------------------------------------- */

static uint64_t resident(const struct run *run)
{
	return run->part->view ? os_resident_pages(run->part->view, os_bytes(run->page), run->pages) : 0;
}

static int count(struct rest *r, const struct run *run)
{
	r->progress->pages_all += run->pages;
	r->progress->pages_now += resident(run);
	return 0;
}

static void count_all(struct rest *r)
{
	*r->progress = (struct rest_progress){ 0 };
	(void)for_each_run(r, false, count);
}

static uint64_t room_now(void)
{
	uint64_t host = os_memory_spare("/proc/meminfo"),
		 group = os_memory_room("/proc/self/cgroup", "/sys/fs/cgroup");

	if (os_fault(OS_FAULT_SPARE_MEMORY))
		return 0;
	return host < group ? host : group;
}

static bool take_room(struct rest *r, uint64_t bytes)
{
	if (r->checked_bytes < bytes) {
		r->checked_bytes = os_bytes(CHECKED_PAGES);
		if (room_now() < r->checked_bytes || r->room_bytes < r->checked_bytes)
			return false;
		r->room_bytes -= r->checked_bytes;
	}
	r->checked_bytes -= bytes;
	return true;
}

static void pause_after(uint64_t begin_us)
{
	uint64_t pause_us = (os_now_us() - begin_us) * PAUSES;

	usleep((useconds_t)(pause_us < PAUSE_MAX_US ? pause_us : PAUSE_MAX_US));
}

static int read_piece(struct rest *r, const struct run *run)
{
	int e = os_fault(OS_FAULT_STORAGE_READ);
	uint64_t begin_us = os_now_us();

	if (!e)
		e = os_read_all(run->part->fd, r->bytes, os_bytes(run->pages), os_bytes(run->page));
	pause_after(begin_us);
	return e;
}

static int load(struct rest *r, const struct run *run)
{
	uint64_t there = resident(run);
	int e;

	if (!r->go_on(r->ctx))
		return -EINTR;
	if (there == run->pages)
		return 0;
	if (!take_room(r, os_bytes(run->pages - there)))
		return -ENOMEM;
	e = read_piece(r, run);
	r->progress->pages_now += e ? 0 : run->pages - there;
	/* Where nothing is told, some were read twice. */
	if (r->progress->pages_now > r->progress->pages_all)
		r->progress->pages_now = r->progress->pages_all;
	return e;
}

static bool residency_is_told(const struct rest *r)
{
	bool told = true;

	for (uint32_t i = 0; i <= r->reader.manifest.volumes; i++)
		told = told && (!r->part[i].pages || r->part[i].view);
	return told;
}

int rest_load(struct rest *r, bool (*go_on)(void *ctx), void *ctx, struct rest_progress *progress)
{
	int e;

	r->go_on = go_on;
	r->ctx = ctx;
	r->progress = progress;
	r->room_bytes = room_now() / 2; /* what was read first must not go again for what is read last */
	count_all(r);
	e = for_each_run(r, true, load);
	if (!e)
		e = for_each_run(r, false, load);
	if (residency_is_told(r))
		count_all(r);
	return e;
}
