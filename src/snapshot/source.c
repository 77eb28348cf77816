/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "snapshot/source.h"

#include "activity/seen.h"
#include "core/entry.h"
#include "os/os.h"
#include "snapshot/parent.h"
#include "vmdir/vmdir.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define ANSWER_MS 20000
#define LOAD_AGAIN_US 50000
#define TURN_US 100000 /* so often it is seen that the user ends it */
#define CHUNK_PAGES 128u
#define ENTRIES_CHUNK 512u
#define AHEAD_PAGES 32u /* of the guest's writes, at most: 128 KiB */
#define MAX_FDS (CONTROL_FD_BLOCKS + CONTROL_FDS_PER_BLOCK * SNAPSHOT_BLOCKS + 2)

/* What has become of a page that was write-protected. */
enum page_state { PAGE_FREE, PAGE_PENDING, PAGE_BUSY, PAGE_SAVED };

/* A page that the guest wrote before the writer came to it. */
struct early {
	struct early *next;
	uint64_t page; /* of the image */
	uint8_t bytes[OS_PAGE_BYTES];
};

struct source {
	int control;
	struct control_layout layout;
	int fds[MAX_FDS];
	unsigned fd_count;
	struct {
		const uint8_t *view;      /* base, as this process sees it */
		const uint64_t *entries;  /* the agent's table, */
		const uint64_t *origins;  /* and another one */
		uint64_t *point;          /* the entries as they were at the instant */
		_Atomic uint8_t *state;   /* enum page_state */
		uint8_t *written;         /* since the instant, as far as it is known */
		uint64_t first;           /* the block's first page in the image */
	} block[SNAPSHOT_BLOCKS];
	struct control_run *runs; /* private copies */
	struct control_run *base; /* what base holds; found while the guest runs again */
	const uint8_t *copies;    /* of each page of the image: what is there if it is in one of these runs */
	const uint16_t *seen; /* the agent's table */
	uint8_t *changed;     /* the agent's table, which is ours to clear */
	struct snapshot_image origin; /* with a cache: the snapshot that it is of */
	uint64_t cache_pages;
	uint64_t total_pages, base_runs, base_room, private_runs, private_pages, base_pages;

	pthread_t server;
	bool serving;
	int end_fd; /* eventfd: the server shall end */
	pthread_mutex_t lock; /* protects the next four */
	pthread_cond_t room;
	bool written; /* or given up: nobody takes copies any more */
	struct early *early;
	uint64_t early_count;
	bool draining; /* they are being written, and there will be room */
	_Atomic uint64_t faults;
};

static int say(char *why, int r, const char *what)
{
	snprintf(why, SNAPSHOT_WHY_BYTES, "%s: %s", what, strerror(-r));
	return r;
}

/* ---- talking to the agent -------------------------------------------------------------------- */

static int ask_about(struct source *s, enum control_op op, uint64_t number, struct control_reply *reply, char *why)
{
	struct control_request request = { .magic = CONTROL_MAGIC, .version = CONTROL_VERSION, .op = (uint32_t)op };
	ssize_t n;

	snprintf(request.path, sizeof request.path, "%ju", (uintmax_t)number);
	n = send(s->control, &request, sizeof request, MSG_NOSIGNAL);
	if (n >= 0)
		n = recv(s->control, reply, sizeof *reply, 0);
	if (n < 0)
		return say(why, -errno, "the VM's agent does not answer");
	if (n != (ssize_t)sizeof *reply || reply->magic != CONTROL_MAGIC || reply->version != CONTROL_VERSION)
		return say(why, -EPROTO, "the VM's agent is of another version");
	reply->text[sizeof reply->text - 1] = '\0';
	if (reply->error)
		snprintf(why, SNAPSHOT_WHY_BYTES, "%.255s", reply->text[0] ? reply->text : "the VM's agent refuses");
	return reply->error > 0 ? -EPROTO : reply->error;
}

static int ask(struct source *s, enum control_op op, struct control_reply *reply, char *why)
{
	return ask_about(s, op, 0, reply, why);
}

/* Of each block, as the agent sends them. */
enum { FD_BASE, FD_ENTRIES, FD_ORIGINS };

static const int *block_fds(const struct source *s, uint32_t block)
{
	return &s->fds[CONTROL_FD_BLOCKS + CONTROL_FDS_PER_BLOCK * block];
}

/* Of the pager's cache, which come last: that, and the `pages` of the snapshot that it is of. */
static const int *cache_fds(const struct source *s)
{
	return block_fds(s, s->layout.blocks);
}

static void take_descriptors(struct source *s, struct msghdr *message)
{
	for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c; c = CMSG_NXTHDR(message, c)) {
		size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);

		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		for (size_t i = 0; i < count && s->fd_count < MAX_FDS; i++)
			memcpy(&s->fds[s->fd_count++], CMSG_DATA(c) + i * sizeof(int), sizeof(int));
	}
}

/* The agent lives in the VMM, which is what a guest breaks out into: nothing it says is believed unchecked. */
static int check_layout(struct source *s)
{
	struct control_layout *l = &s->layout;

	if (!l->blocks || l->blocks > SNAPSHOT_BLOCKS || l->volumes > SNAPSHOT_VOLUMES ||
	    l->has_cache > 1 || l->origins > sizeof l->origin / sizeof l->origin[0] ||
	    s->fd_count != CONTROL_FD_BLOCKS + CONTROL_FDS_PER_BLOCK * l->blocks + 2 * l->has_cache)
		return -EPROTO;
	for (uint32_t i = 0; i < l->blocks; i++) {
		struct control_block *b = &l->block[i];

		b->name[sizeof b->name - 1] = '\0';
		if (!b->pages || b->pages > (1ull << 32) || b->hva % OS_PAGE_BYTES || b->memfd_offset % OS_PAGE_BYTES)
			return -EPROTO;
		s->block[i].first = s->total_pages;
		s->total_pages += b->pages;
	}
	for (uint32_t i = 0; i < l->volumes; i++)
		l->volume[i].path[sizeof l->volume[i].path - 1] = '\0';
	return 0;
}

static int receive_layout(struct source *s)
{
	char control[CMSG_SPACE(MAX_FDS * sizeof(int))];
	struct iovec iov = { &s->layout, sizeof s->layout };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
				  .msg_controllen = sizeof control };
	ssize_t n = recvmsg(s->control, &message, MSG_CMSG_CLOEXEC);

	if (n < 0)
		return -errno;
	take_descriptors(s, &message);
	return n == (ssize_t)sizeof s->layout ? check_layout(s) : -EPROTO;
}

/* A view of `pages` pages; reading past the end of a file that somebody has cut raises SIGBUS, and ends this
 * process, not the VM. */
static const void *view(int fd, uint64_t offset, size_t bytes)
{
	void *at = mmap(NULL, bytes, PROT_READ, MAP_SHARED | MAP_NORESERVE, fd, (off_t)offset);

	return at == MAP_FAILED ? NULL : at;
}

static void take_entries_of(struct source *s, uint32_t block, uint64_t page, uint64_t pages)
{
	uint64_t *point = s->block[block].point + page;

	memcpy(point, s->block[block].entries + page, (size_t)pages * sizeof *point);
	for (uint64_t i = 0; i < pages; i++)
		s->block[block].state[page + i] = entry_source(point[i]) == ENTRY_BASE ? PAGE_PENDING : PAGE_FREE;
}

static int map_blocks(struct source *s)
{
	for (uint32_t i = 0; i < s->layout.blocks; i++) {
		const struct control_block *b = &s->layout.block[i];
		const int *fds = block_fds(s, i);

		s->block[i].view = view(fds[FD_BASE], b->memfd_offset, os_bytes(b->pages));
		s->block[i].entries = view(fds[FD_ENTRIES], 0, (size_t)b->pages * sizeof(uint64_t));
		s->block[i].origins = view(fds[FD_ORIGINS], 0, (size_t)b->pages * sizeof(uint64_t));
		s->block[i].point = malloc((size_t)b->pages * sizeof(uint64_t));
		s->block[i].state = calloc((size_t)b->pages, 1);
		s->block[i].written = calloc((size_t)b->pages, 1);
		if (!s->block[i].view || !s->block[i].entries || !s->block[i].origins || !s->block[i].point || !s->block[i].state || !s->block[i].written)
			return -ENOMEM;
		/* Touched now, not while the guest waits. */
		for (uint64_t page = 0; page < b->pages; page += ENTRIES_CHUNK)
			take_entries_of(s, i, page, b->pages - page < ENTRIES_CHUNK ? b->pages - page : ENTRIES_CHUNK);
	}
	s->seen = view(s->fds[CONTROL_FD_SEEN], 0, s->total_pages * sizeof *s->seen);
	s->changed = os_view_file(s->fds[CONTROL_FD_CHANGED], s->total_pages, true);
	return s->seen && s->changed ? 0 : -ENOMEM;
}

/* What this process takes of memory for each page of guest RAM, and beside. */
#define BYTES_PER_PAGE \
	(sizeof(uint64_t) + 2 + sizeof(struct control_run) + sizeof(struct snapshot_page) + sizeof(struct active_page) + \
	 EQUAL_BYTES_PER_PAGE)
#define BYTES_BESIDE (CONTROL_SAVE_EARLY_PAGES * sizeof(struct early))

/* The kernel would kill it for a cgroup's limit, in the midst of its work. */
static int check_memory(const struct source *s, char *why)
{
	uint64_t origin = s->layout.has_cache ? sizeof(struct snapshot_page) : 0;
	uint64_t bytes = BYTES_BESIDE + s->total_pages * (BYTES_PER_PAGE + origin);
	uint64_t room = os_memory_room("/proc/self/cgroup", "/sys/fs/cgroup");

	if (bytes <= room)
		return 0;
	snprintf(why, SNAPSHOT_WHY_BYTES, "this command's cgroup has %ju MiB of memory left, and it may need %ju MiB: raise "
		 "its memory limit, or save from elsewhere", (uintmax_t)room >> 20, (uintmax_t)bytes >> 20);
	return -ENOMEM;
}

static int take_layout(struct source *s, char *why)
{
	int r = receive_layout(s);

	if (!r) {
		r = check_memory(s, why);
		if (r)
			return r;
		r = map_blocks(s);
	}
	if (!r && s->layout.has_cache) {
		r = snapshot_image_read(cache_fds(s)[1], &s->origin, why);
		if (r)
			return r;
	}
	return r ? say(why, r, "what the VM's agent says of guest RAM cannot be used") : 0;
}

static int wait_loaded(struct source *s, struct source_progress *progress, char *why)
{
	struct control_reply reply = { 0 };
	int r;

	while (!(r = ask(s, CONTROL_SAVE_LOAD, &reply, why)) && reply.pages < reply.pages_all) {
		progress->load_now = reply.pages;
		progress->load_all = reply.pages_all;
		if (progress->stop) {
			snprintf(why, SNAPSHOT_WHY_BYTES, "a signal ended it, while what the VM runs from was loaded");
			return -EINTR;
		}
		usleep(LOAD_AGAIN_US);
	}
	progress->load_all = 0;
	return r;
}

int source_open(const char *path, struct source_progress *progress, struct source **ret_source,
		char why[SNAPSHOT_WHY_BYTES])
{
	struct source *s = calloc(1, sizeof *s);
	int r;

	if (!s)
		return say(why, -ENOMEM, "no memory");
	s->end_fd = -1;
	pthread_mutex_init(&s->lock, NULL);
	pthread_cond_init(&s->room, NULL);
	r = s->control = vmdir_connect(path, SOCK_SEQPACKET, ANSWER_MS);
	if (r < 0)
		say(why, r, "the VM's agent cannot be reached");
	else
		r = wait_loaded(s, progress, why);
	if (r)
		source_end(s);
	else
		*ret_source = s;
	return r;
}

int source_begin(struct source *s, char why[SNAPSHOT_WHY_BYTES])
{
	struct control_reply reply = { 0 };
	int r = ask(s, CONTROL_SAVE_BEGIN, &reply, why);

	return r ? r : take_layout(s, why);
}

const struct control_layout *source_layout(const struct source *s)
{
	return &s->layout;
}

/* ---- faults ---------------------------------------------------------------------------------- */

static bool find_page(struct source *s, uintptr_t addr, uint32_t *ret_block, uint64_t *ret_page)
{
	for (uint32_t i = 0; i < s->layout.blocks; i++) {
		const struct control_block *b = &s->layout.block[i];

		if (addr >= b->hva && addr - b->hva < os_bytes(b->pages)) {
			*ret_block = i;
			*ret_page = (addr - b->hva) >> OS_PAGE_SHIFT;
			return true;
		}
	}
	return false;
}

static void unprotect(struct source *s, uint32_t block, uint64_t page, uint64_t pages)
{
	void *hva = (void *)(uintptr_t)(s->layout.block[block].hva + os_bytes(page));

	(void)os_uffd_protect(s->fds[CONTROL_FD_UFFD], hva, os_bytes(pages), false);
}

/* Memory stays bounded: with too many copies waiting to be written, the guest waits. Not before anybody writes them: who
 * looks for what there is to write (give_hole) may himself wait for the page of this copy. */
static void keep_early(struct source *s, struct early *e)
{
	pthread_mutex_lock(&s->lock);
	while (s->draining && s->early_count >= CONTROL_SAVE_EARLY_PAGES && !s->written)
		pthread_cond_wait(&s->room, &s->lock);
	if (s->written) {
		free(e);
	} else {
		e->next = s->early;
		s->early = e;
		s->early_count++;
	}
	pthread_mutex_unlock(&s->lock);
}

static void take_page(struct source *s, uint32_t block, uint64_t page)
{
	_Atomic uint8_t *state = &s->block[block].state[page];
	uint8_t pending = PAGE_PENDING;
	struct early *e = NULL;

	s->block[block].written[page] = 1;
	while (*state == PAGE_PENDING && !(e = malloc(sizeof *e)))
		usleep(1000); /* the writer frees some, or takes the page itself */
	if (e && atomic_compare_exchange_strong(state, &pending, PAGE_BUSY)) {
		e->page = s->block[block].first + page;
		memcpy(e->bytes, s->block[block].view + os_bytes(page), OS_PAGE_BYTES);
		keep_early(s, e);
		*state = PAGE_SAVED;
	} else {
		free(e);
		while (*state == PAGE_BUSY)
			sched_yield();
	}
}

/* A guest that writes page after page will write the next ones, too: as many as are taken before it, each of which
 * would be a fault for which it waits. */
static uint64_t pages_ahead(struct source *s, uint32_t block, uint64_t page)
{
	const uint8_t *written = s->block[block].written;
	uint64_t left = s->layout.block[block].pages - page - 1, before = 0, n = 0;

	while (before < AHEAD_PAGES && before < page && written[page - 1 - before])
		before++;
	while (n < before && n < left && s->block[block].state[page + 1 + n] == PAGE_PENDING)
		n++;
	return n;
}

static void serve_page(struct source *s, uint32_t block, uint64_t page)
{
	uint64_t pages = 1 + pages_ahead(s, block, page);

	s->faults++;
	for (uint64_t i = 0; i < pages; i++)
		take_page(s, block, page + i);
	unprotect(s, block, page, pages);
}

static void *serve(void *arg)
{
	struct source *s = arg;
	struct pollfd p[] = { { .fd = s->fds[CONTROL_FD_UFFD], .events = POLLIN }, { .fd = s->end_fd, .events = POLLIN } };
	uintptr_t addr;
	uint32_t block;
	uint64_t page;

	for (;;) {
		if (poll(p, 2, -1) < 0 && errno != EINTR)
			break;
		if (p[1].revents || p[0].revents & (POLLERR | POLLHUP | POLLNVAL))
			break;
		while (os_uffd_next_fault(s->fds[CONTROL_FD_UFFD], &addr) == 1)
			if (find_page(s, addr, &block, &page))
				serve_page(s, block, page);
	}
	return NULL;
}

static int start_server(struct source *s)
{
	s->end_fd = eventfd(0, EFD_CLOEXEC);
	if (s->end_fd < 0)
		return -errno;
	s->serving = true;
	if (pthread_create(&s->server, NULL, serve, s)) {
		s->serving = false;
		return -EAGAIN;
	}
	return 0;
}

/* ---- the instant ----------------------------------------------------------------------------- */

static int check_runs(struct source *s)
{
	uint64_t private_pages = 0;

	for (uint64_t i = 0; i < s->private_runs; i++) {
		const struct control_run *run = &s->runs[i];

		if (run->block >= s->layout.blocks || run->page >= s->layout.block[run->block].pages ||
		    run->pages > s->layout.block[run->block].pages - run->page)
			return -EPROTO;
		private_pages += run->pages;
	}
	return private_pages == s->private_pages ? 0 : -EPROTO;
}

static int take_runs(struct source *s, const struct control_reply *reply)
{
	size_t bytes;

	s->private_runs = reply->private_runs;
	s->private_pages = reply->pages;
	if (s->private_runs > s->total_pages || s->private_pages > s->total_pages)
		return -EPROTO;
	/* Copied: the agent must not change it after it was checked. */
	bytes = (size_t)s->private_runs * sizeof *s->runs;
	s->runs = malloc(bytes ? bytes : 1);
	if (!s->runs)
		return -ENOMEM;
	if (pread(s->fds[CONTROL_FD_RUNS], s->runs, bytes, 0) != (ssize_t)bytes)
		return -EPROTO;
	s->copies = view(s->fds[CONTROL_FD_COPIES], 0, os_bytes(s->total_pages));
	return s->copies ? check_runs(s) : -ENOMEM;
}

/* The entries as they are now; all of base is pending. Cheap the second time, for little has changed. */
static void take_entries(struct source *s)
{
	for (uint32_t i = 0; i < s->layout.blocks; i++) {
		uint64_t all = s->layout.block[i].pages;

		for (uint64_t page = 0; page < all; page += ENTRIES_CHUNK) {
			uint64_t n = all - page < ENTRIES_CHUNK ? all - page : ENTRIES_CHUNK;

			if (memcmp(s->block[i].point + page, s->block[i].entries + page, (size_t)n * sizeof(uint64_t)))
				take_entries_of(s, i, page, n);
		}
	}
	for (uint64_t i = 0; i < s->private_runs; i++)
		memset((void *)&s->block[s->runs[i].block].state[s->runs[i].page], PAGE_SAVED, s->runs[i].pages);
}

/* Copies that the guest has made in overlays are pages that it writes. */
static void note_private(struct source *s)
{
	for (uint64_t i = 0; i < s->private_runs; i++)
		memset(&s->block[s->runs[i].block].written[s->runs[i].page], 1, s->runs[i].pages);
}

int source_watch(struct source *s, char why[SNAPSHOT_WHY_BYTES])
{
	struct control_reply reply = { 0 };

	return ask(s, CONTROL_SAVE_WATCH, &reply, why);
}

int source_settle(struct source *s, uint64_t *ret_pages, uint64_t *ret_left, char why[SNAPSHOT_WHY_BYTES])
{
	struct control_reply reply = { 0 };
	int r = ask(s, CONTROL_SAVE_SETTLE, &reply, why);

	*ret_pages = r ? 0 : reply.pages;
	*ret_left = r ? 0 : reply.pages_all;
	return r;
}

int source_arm(struct source *s, char why[SNAPSHOT_WHY_BYTES])
{
	struct control_reply reply = { 0 };
	int r = ask(s, CONTROL_SAVE_ARM, &reply, why);

	if (!r)
		take_entries(s);
	return r;
}

int source_pass(struct source *s, uint64_t pass_us, char why[SNAPSHOT_WHY_BYTES])
{
	struct control_reply reply = { 0 };

	return ask_about(s, CONTROL_SAVE_PASS, pass_us, &reply, why);
}

int source_point(struct source *s, uint64_t *ret_paused_us, char why[SNAPSHOT_WHY_BYTES])
{
	struct control_reply reply = { 0 };
	int r = ask(s, CONTROL_SAVE_POINT, &reply, why);

	if (r)
		return r;
	r = take_runs(s, &reply);
	if (r)
		return say(why, r, "what the VM's agent says of guest RAM cannot be used");
	take_entries(s);
	note_private(s);
	*ret_paused_us = reply.paused_us;
	r = start_server(s);
	return r ? say(why, r, "no thread to serve write faults") : 0;
}

int source_give(struct source *s, char why[SNAPSHOT_WHY_BYTES])
{
	struct control_reply reply = { 0 };

	return ask(s, CONTROL_SAVE_GIVE, &reply, why);
}

/* ---- writing --------------------------------------------------------------------------------- */

struct writer {
	struct source *source;
	struct snapshot_image *image;
	struct store store;
	struct source_progress *progress;
	uint64_t limit_bytes_s, begin_us;
};

/* Until as much may have been written as is; what the user ends does not wait. */
static void keep_rate(const struct writer *w)
{
	uint64_t due_us, now_us;

	if (!w->limit_bytes_s)
		return;
	due_us = w->begin_us + w->progress->bytes_written * 1000000 / w->limit_bytes_s;
	while (!w->progress->stop && (now_us = os_now_us()) < due_us)
		usleep((useconds_t)(due_us - now_us < TURN_US ? due_us - now_us : TURN_US));
}

/* Some of the copies that wait; NULL: there are none. */
static struct early *take_early(struct source *s)
{
	struct early *first, **end = &first;
	unsigned n = 0;

	pthread_mutex_lock(&s->lock);
	first = s->early;
	for (; *end && n < CHUNK_PAGES; n++)
		end = &(*end)->next;
	s->early = *end;
	*end = NULL;
	s->early_count -= n;
	pthread_cond_signal(&s->room);
	pthread_mutex_unlock(&s->lock);
	return first;
}

/* A few at a time: with a limit the guest, which may be waiting for room, has some after each of them. */
static int drain_early(struct writer *w)
{
	struct early *e;
	int r = 0;

	while (!r && (e = take_early(w->source))) {
		while (e) {
			struct early *next = e->next;

			r = r ? r : store_pages(&w->store, e->page, e->bytes, 1);
			free(e);
			e = next;
		}
		if (!r && w->progress->stop)
			r = -EINTR;
		keep_rate(w);
	}
	return r;
}

/* Takes what is still pending of a chunk; the rest the server has. */
static int write_chunk(struct writer *w, uint32_t block, uint64_t page, uint64_t pages)
{
	static uint8_t copy[CHUNK_PAGES * OS_PAGE_BYTES]; /* one writer */
	struct source *s = w->source;
	int r = 0;

	for (uint64_t i = 0; !r && i < pages;) {
		uint64_t n = 0;
		uint8_t pending = PAGE_PENDING;

		while (i + n < pages &&
		       atomic_compare_exchange_strong(&s->block[block].state[page + i + n], &pending, PAGE_BUSY))
			n++;
		if (!n) {
			i++;
			continue;
		}
		memcpy(copy, s->block[block].view + os_bytes(page + i), os_bytes(n));
		memset((void *)&s->block[block].state[page + i], PAGE_SAVED, n);
		unprotect(s, block, page + i, n);
		r = store_pages(&w->store, s->block[block].first + page + i, copy, n);
		i += n;
	}
	return r;
}

/* Until every page that the server has taken is among those to be written. */
static void wait_for_server(struct source *s)
{
	for (uint32_t i = 0; i < s->layout.blocks; i++)
		for (uint64_t page = 0; page < s->layout.block[i].pages; page++)
			while (s->block[i].state[page] == PAGE_BUSY)
				sched_yield();
}

static int note_base(struct source *s, uint32_t block, uint64_t page, uint64_t pages)
{
	if (s->base_runs == s->base_room) {
		uint64_t room = s->base_room ? s->base_room * 2 : 1024;
		struct control_run *base = realloc(s->base, room * sizeof *base);

		if (!base)
			return -ENOMEM;
		s->base = base;
		s->base_room = room;
	}
	s->base[s->base_runs++] = (struct control_run){ block, page, pages };
	s->base_pages += pages;
	return 0;
}

/* Where base held nothing at the instant there is nothing to save. Only then may it be written: the server would take
 * what is being written for what was there. */
static void give_hole(struct source *s, uint32_t block, uint64_t page, uint64_t pages)
{
	for (uint64_t i = page; i < page + pages; i++) {
		_Atomic uint8_t *state = &s->block[block].state[i];
		uint8_t pending = PAGE_PENDING;

		if (!atomic_compare_exchange_strong(state, &pending, PAGE_SAVED))
			while (*state == PAGE_BUSY)
				sched_yield();
	}
	unprotect(s, block, page, pages);
}

/*
 * What base holds now, and so all that it held at the instant: since then every write has had to wait for us. Where
 * it holds nothing it was zero, whatever is written there from now on.
 */
static int find_base(struct source *s, uint32_t block, uint64_t page, uint64_t end)
{
	const struct control_block *b = &s->layout.block[block];
	int memfd = block_fds(s, block)[FD_BASE], r = 0;

	while (!r && page < end) {
		uint64_t from, to, first = end, last = end;

		if (os_next_data(memfd, b->memfd_offset + os_bytes(page), b->memfd_offset + os_bytes(end), &from, &to)) {
			first = (from - b->memfd_offset) >> OS_PAGE_SHIFT;
			last = (to - b->memfd_offset) >> OS_PAGE_SHIFT;
		}
		if (first > page)
			give_hole(s, block, page, first - page);
		r = last > first ? note_base(s, block, first, last - first) : 0;
		page = last;
	}
	return r;
}

static int find_all_base(struct source *s)
{
	int r = 0;

	for (uint32_t i = 0; !r && i < s->layout.blocks; i++) {
		const uint64_t *point = s->block[i].point;
		uint64_t pages = s->layout.block[i].pages;

		for (uint64_t page = 0, end; !r && page < pages; page = end) {
			for (end = page + 1; end < pages && entry_joins(point[end - 1], point[end]); end++)
				;
			if (entry_source(point[page]) == ENTRY_BASE)
				r = find_base(s, i, page, end);
		}
	}
	return r;
}

static int write_base(struct writer *w)
{
	struct source *s = w->source;
	int r = 0;

	for (uint64_t i = 0; !r && i < s->base_runs; i++) {
		const struct control_run *run = &s->base[i];

		for (uint64_t done = 0; !r && done < run->pages; done += CHUNK_PAGES) {
			uint64_t n = run->pages - done < CHUNK_PAGES ? run->pages - done : CHUNK_PAGES;

			r = write_chunk(w, (uint32_t)run->block, run->page + done, n);
			if (!r)
				r = drain_early(w);
			if (!r && w->progress->stop)
				r = -EINTR;
			keep_rate(w);
		}
	}
	wait_for_server(w->source);
	return r ? r : drain_early(w);
}

static int write_private_run(struct writer *w, const struct control_run *run)
{
	const struct source *s = w->source;
	int r = 0;

	for (uint64_t done = 0; !r && done < run->pages; done += CHUNK_PAGES) {
		uint64_t page = s->block[run->block].first + run->page + done;
		uint64_t n = run->pages - done < CHUNK_PAGES ? run->pages - done : CHUNK_PAGES;

		r = store_pages(&w->store, page, s->copies + os_bytes(page), n);
		if (!r)
			r = drain_early(w);
		if (!r && w->progress->stop)
			r = -EINTR;
		keep_rate(w);
	}
	return r;
}

static int write_private(struct writer *w)
{
	struct source *s = w->source;
	int r = 0;

	for (uint64_t i = 0; !r && i < s->private_runs; i++)
		r = write_private_run(w, &s->runs[i]);
	return r;
}

static int volume_of(const struct source *s, unsigned file)
{
	for (uint32_t i = 0; i < s->layout.volumes; i++)
		if (s->layout.volume[i].file == file)
			return (int)i;
	return -1;
}

static bool is_of_cache(const struct source *s, uint64_t entry)
{
	return s->layout.has_cache && entry_source(entry) == ENTRY_OVERLAY && entry_file(entry) == s->layout.cache_file;
}

/* Unmodified copies of pages of an image: nothing is stored but the place. */
static int refer_to_volumes(struct writer *w)
{
	struct source *s = w->source;

	for (uint32_t i = 0; i < s->layout.blocks; i++) {
		for (uint64_t page = 0; page < s->layout.block[i].pages; page++) {
			uint64_t entry = s->block[i].point[page];
			int volume;

			if (entry_source(entry) != ENTRY_OVERLAY || s->block[i].state[page] == PAGE_SAVED)
				continue;
			if (entry_is_private(entry)) /* and yet the agent has no copy of it */
				return -EPROTO;
			if (is_of_cache(s, entry)) {
				s->cache_pages++;
				continue;
			}
			volume = volume_of(s, entry_file(entry));
			if (volume < 0)
				return -EPROTO;
			*snapshot_page_at(w->image, s->block[i].first + page) = (struct snapshot_page){
				SNAPSHOT_VOLUME, (uint32_t)volume, entry_file_page(entry) };
		}
	}
	return 0;
}

/* A cache that is whole has each page as its snapshot says. */
static bool is_as_saved(const struct source *s, uint64_t page, const uint8_t *bytes)
{
	struct snapshot_page is = snapshot_classify(bytes), *was = snapshot_page_at(&s->origin, page);

	return is.kind == was->kind && is.value == was->value;
}

/* From there on, at most a chunk, unmodified pages that follow each other in the cache, too. */
static uint64_t cache_run(const struct source *s, uint32_t block, uint64_t page)
{
	const uint64_t *point = s->block[block].point;
	uint64_t n = 0, pages = s->layout.block[block].pages;

	while (n < CHUNK_PAGES && page + n < pages && is_of_cache(s, point[page + n]) &&
	       s->block[block].state[page + n] != PAGE_SAVED && entry_file_page(point[page + n]) == entry_file_page(point[page]) + n)
		n++;
	return n;
}

static int write_cache_run(struct writer *w, uint32_t block, uint64_t page, uint64_t pages)
{
	static uint8_t copy[CHUNK_PAGES * OS_PAGE_BYTES]; /* one writer */
	struct source *s = w->source;
	uint64_t from = entry_file_page(s->block[block].point[page]);
	int r;

	if (from >= s->origin.pages || pages > s->origin.pages - from)
		return -EPROTO;
	r = os_read_all(cache_fds(s)[0], copy, os_bytes(pages), os_bytes(from));
	for (uint64_t i = 0; !r && i < pages; i++)
		r = is_as_saved(s, from + i, copy + os_bytes(i)) ? 0 : -EBADMSG;
	return r ? r : store_pages(&w->store, s->block[block].first + page, copy, pages);
}

/* What the guest has not written of a pager's cache: that only grows, and is whole. */
static int write_cache(struct writer *w)
{
	struct source *s = w->source;
	int r = 0;

	for (uint32_t i = 0; i < s->layout.blocks && s->cache_pages; i++) {
		for (uint64_t page = 0, n; !r && page < s->layout.block[i].pages; page += n ? n : 1) {
			n = cache_run(s, i, page);
			if (n)
				r = write_cache_run(w, i, page, n);
			if (!r && w->progress->stop)
				r = -EINTR;
			if (n)
				keep_rate(w);
		}
	}
	return r;
}

static int make_image(struct source *s, struct snapshot_image *image)
{
	struct snapshot_image layout = { .blocks = s->layout.blocks, .volumes = s->layout.volumes };

	for (uint32_t i = 0; i < layout.blocks; i++) {
		snprintf(layout.block[i].name, sizeof layout.block[i].name, "%s", s->layout.block[i].name);
		layout.block[i].pages = s->layout.block[i].pages;
	}
	return snapshot_image_create(&layout, image);
}

static int write_all(struct writer *w)
{
	int r = refer_to_volumes(w);

	w->progress->pages_all += w->source->cache_pages;
	if (!r)
		r = write_base(w);
	if (!r)
		r = write_private(w);
	return r ? r : write_cache(w);
}

int source_write(struct source *s, int ram_fd, struct parent *parent, uint64_t limit_bytes_s,
		 struct source_progress *progress, struct snapshot_image *ret_image, char why[SNAPSHOT_WHY_BYTES])
{
	struct snapshot_image image;
	struct writer w = { .source = s, .image = &image, .progress = progress, .limit_bytes_s = limit_bytes_s };
	int r = make_image(s, &image);

	if (r)
		return say(why, r, "no memory for the metadata");
	r = find_all_base(s);
	if (parent)
		parent_join_blocks(parent, &image);
	w.begin_us = os_now_us();
	progress->pages_all = s->base_pages + s->private_pages;
	if (!r)
		r = store_begin(&image, ram_fd, parent, progress, &w.store);
	if (!r) {
		pthread_mutex_lock(&s->lock);
		s->draining = true;
		pthread_mutex_unlock(&s->lock);
		r = write_all(&w);
		store_end(&w.store);
	}
	if (!r && ftruncate(ram_fd, (off_t)os_bytes(image.pages)))
		r = -errno;
	if (r) {
		snapshot_image_free(&image);
		snprintf(why, SNAPSHOT_WHY_BYTES, r == -EINTR ? "a signal ended it" : r == -EBADMSG ?
			 "what the VM has mapped of the snapshot that it runs from is not what was saved there" :
			 "the contents of RAM cannot be written: %s", strerror(-r));
		return r;
	}
	*ret_image = image;
	return 0;
}

/* ---- what the guest uses ---------------------------------------------------------------------- */

static int by_first_touch(const void *a, const void *b)
{
	const struct active_page *x = a, *y = b;

	if (x->order != y->order)
		return x->order < y->order ? -1 : 1;
	return x->page < y->page ? -1 : x->page > y->page;
}

int source_list_active(const struct source *s, const struct snapshot_image *image, struct active_page **ret_list,
		       uint64_t *ret_count)
{
	const struct snapshot_page *table = image->memory;
	struct active_page *list = malloc(s->total_pages * sizeof *list);
	uint64_t count = 0;

	if (!list)
		return -ENOMEM;
	for (uint32_t b = 0; b < s->layout.blocks; b++) {
		for (uint64_t i = 0; i < s->layout.block[b].pages; i++) {
			uint64_t page = s->block[b].first + i;
			uint16_t order = s->seen[page];

			if (order && table[page].kind != SNAPSHOT_WORD)
				list[count++] = (struct active_page){ page, s->block[b].written[i] ? ACTIVE_WRITTEN : 0, order };
		}
	}
	qsort(list, count, sizeof *list, by_first_touch);
	*ret_list = list;
	*ret_count = count < ACTIVE_MAX_PAGES ? count : ACTIVE_MAX_PAGES;
	return 0;
}

void source_get_view(const struct source *s, struct source_view *v)
{
	*v = (struct source_view){ .blocks = s->layout.blocks, .pages = s->total_pages, .cache_fd = -1,
				   .runs = s->runs, .run_count = s->private_runs, .copies = s->copies };
	for (uint32_t i = 0; i < v->blocks; i++)
		v->block[i] = (struct source_block){
			.first = s->block[i].first, .pages = s->layout.block[i].pages,
			.memfd = block_fds(s, i)[FD_BASE], .memfd_offset = s->layout.block[i].memfd_offset,
			.base = s->block[i].view, .entries = s->block[i].entries, .origins = s->block[i].origins,
			.changed = s->changed + s->block[i].first,
		};
	if (s->layout.has_cache)
		v->cache_fd = cache_fds(s)[0];
}

void source_get_counts(const struct source *s, struct source_counts *c)
{
	*c = (struct source_counts){ s->base_pages, s->private_pages, s->faults };
}

/* ---- the end --------------------------------------------------------------------------------- */

/* From here on faults are answered, and nothing is kept. */
static void end_writing(struct source *s)
{
	pthread_mutex_lock(&s->lock);
	s->written = true;
	pthread_cond_signal(&s->room);
	pthread_mutex_unlock(&s->lock);
}

static void stop_server(struct source *s)
{
	uint64_t one = 1;

	if (!s->serving)
		return;
	end_writing(s);
	s->serving = false;
	if (write(s->end_fd, &one, sizeof one) == (ssize_t)sizeof one)
		pthread_join(s->server, NULL);
}

void source_end(struct source *s)
{
	struct control_reply reply = { 0 };
	char why[SNAPSHOT_WHY_BYTES];

	if (!s)
		return;
	stop_server(s);
	/* The agent takes protection away when nobody else has the descriptor: whoever waits then waits no more. */
	if (s->fd_count)
		close(s->fds[CONTROL_FD_UFFD]);
	if (s->control >= 0) {
		if (s->fd_count)
			(void)ask(s, CONTROL_SAVE_END, &reply, why);
		close(s->control);
	}
	for (struct early *e = s->early, *next; e; e = next) {
		next = e->next;
		free(e);
	}
	for (uint32_t i = 0; i < s->layout.blocks && i < SNAPSHOT_BLOCKS; i++) {
		uint64_t pages = s->layout.block[i].pages;

		if (s->block[i].view)
			munmap((void *)(uintptr_t)s->block[i].view, os_bytes(pages));
		if (s->block[i].entries)
			munmap((void *)(uintptr_t)s->block[i].entries, (size_t)pages * sizeof(uint64_t));
		if (s->block[i].origins)
			munmap((void *)(uintptr_t)s->block[i].origins, (size_t)pages * sizeof(uint64_t));
		free(s->block[i].point);
		free(s->block[i].written);
		free((void *)s->block[i].state);
	}
	if (s->seen)
		munmap((void *)(uintptr_t)s->seen, s->total_pages * sizeof *s->seen);
	if (s->changed)
		os_unview_file(s->changed, s->total_pages);
	if (s->copies)
		munmap((void *)(uintptr_t)s->copies, os_bytes(s->total_pages));
	for (unsigned i = CONTROL_FD_UFFD + 1; i < s->fd_count; i++)
		close(s->fds[i]);
	if (s->end_fd >= 0)
		close(s->end_fd);
	pthread_cond_destroy(&s->room);
	pthread_mutex_destroy(&s->lock);
	snapshot_image_free(&s->origin);
	free(s->runs);
	free(s->base);
	free(s);
}
