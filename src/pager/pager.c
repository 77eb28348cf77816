/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * One thread, one loop: connections, faults of all VMs, answers of the store. What somebody waits for goes first;
 * beside it the active set and then the rest are loaded, a little at a time, so that the store and the line are
 * never full of what nobody waits for.
 */
#include "pager/pager.h"

#include "os/os.h"
#include "pager/cache.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define CLIENTS 258u /* as many clones as `latent restore` starts, and that */
#define LINGER_US 5000000
#define REPORT_US 200000
#define FAULTS_A_TURN 64
#define DEMANDS 24u /* requests for what is waited for, at a time */
#define WINDOW_BYTES (512u << 10) /* of a demand that goes on where the last one ended, at the most */
/* And for the rest. At 2 ms and 1 Gbit/s that much keeps the line busy, and a demand behind it waits for 8 ms. */
#define AHEAD 8u
#define AHEAD_BYTES (1024u << 10)
#define AHEAD_WAITED_BYTES (512u << 10) /* while somebody waits */
#define PIECE_BYTES (512u << 10)
#define RETRY_US 50000 /* after a failure; twice as long after each other one, up to */
#define RETRY_MAX_US 2000000
#define IDLE_MS 200
#define RETRY_MS 20

_Static_assert(2 * CLIENTS + 1 <= STORE_POLLED, "each may be waited for");

/* What is loaded before somebody waits for it. */
enum load { LOAD_NOTHING, LOAD_ACTIVE, LOAD_REST, LOAD_ALL };

struct client {
	int fd, uffd; /* -1: free; not watched yet */
	struct cache *cache;
	struct pager_request ram; /* where guest RAM is */
	struct waiter {
		uintptr_t addr;
		uint64_t chunk;
	} *waiters;
	size_t waiting, room;
	uint64_t faults;
	enum load load;
	bool opening; /* the manifest is being read again for it */
	struct pager_report told;
};

/* Chunks that follow each other in the file, in one request. */
struct fetch {
	struct store_read read; /* first: it is found by it */
	struct pager *pager;
	struct cache *cache;
	uint64_t chunk, chunks;
	unsigned tries;
	bool ahead;
};

/* A chunk that somebody waits for. */
struct want {
	struct want *next;
	struct cache *cache;
	uint64_t chunk, not_before_us;
	unsigned tries;
};

/* The manifest, read again for a VM that wants a snapshot which is known. */
struct recheck {
	struct store_read read; /* first */
	struct pager *pager;
	int client_fd;
};

struct pager {
	const char *source;
	bool on_demand_only;
	bool failed; /* to open it: whoever tries again may have changed what this process has inherited */
	int listener;
	struct store *store;
	struct cache *caches;
	struct client clients[CLIENTS];
	struct want *wants;
	unsigned demands, ahead; /* requests under way */
	uint64_t ahead_bytes;
	unsigned ahead_tries;
	uint64_t ahead_not_before_us, report_us, alone_since_us;
	uint64_t bytes_fetched, wrong;
	char trouble[STORE_WHY_BYTES]; /* of the last failure */
};

/* ---- caches and clients ------------------------------------------------------------------------ */

static struct cache *use_cache(struct cache *cache)
{
	cache->users++;
	return cache;
}

/* The one that was loaded stays until the end: the next clone wants it. */
static void release_cache(struct pager *p, struct cache *cache)
{
	struct cache **at = &p->caches;

	if (!cache || --cache->users || cache->own)
		return;
	while (*at != cache)
		at = &(*at)->next;
	*at = cache->next;
	cache_free(cache);
}

static void add_cache(struct pager *p, struct cache *cache)
{
	cache->next = p->caches;
	p->caches = cache;
}

static void unwatch(struct client *c)
{
	if (c->uffd >= 0)
		close(c->uffd);
	c->uffd = -1;
	c->waiting = 0;
}

static void drop_client(struct pager *p, struct client *c)
{
	close(c->fd);
	unwatch(c);
	release_cache(p, c->cache);
	free(c->waiters);
	*c = (struct client){ .fd = -1, .uffd = -1 };
}

/* ---- who waits for what ------------------------------------------------------------------------ */

static bool is_waited_for(const struct pager *p, const struct cache *cache, uint64_t chunk)
{
	for (size_t i = 0; i < CLIENTS; i++) {
		const struct client *c = &p->clients[i];

		for (size_t n = 0; c->cache == cache && n < c->waiting; n++)
			if (c->waiters[n].chunk == chunk)
				return true;
	}
	return false;
}

static uint64_t count_waiting(const struct pager *p)
{
	uint64_t count = 0;

	for (size_t i = 0; i < CLIENTS; i++)
		count += p->clients[i].waiting;
	return count;
}

static void wake(struct pager *p, const struct cache *cache, uint64_t chunk)
{
	for (size_t i = 0; i < CLIENTS; i++) {
		struct client *c = &p->clients[i];

		for (size_t n = 0; c->cache == cache && n < c->waiting;) {
			if (c->waiters[n].chunk != chunk) {
				n++;
				continue;
			}
			os_uffd_wake(c->uffd, (void *)c->waiters[n].addr, OS_PAGE_BYTES);
			c->waiters[n] = c->waiters[--c->waiting];
		}
	}
}

static void want(struct pager *p, struct cache *cache, uint64_t chunk, unsigned tries)
{
	uint64_t pause_us = tries < 7 ? RETRY_US << (tries ? tries - 1 : 0) : RETRY_MAX_US;
	struct want *w = os_fault(OS_FAULT_PAGER_MEMORY) ? NULL : malloc(sizeof *w), **at = &p->wants;

	if (!w) { /* who waits faults again, and so says it again; else nobody might ever fetch it */
		cache->state[chunk] = CHUNK_ABSENT;
		wake(p, cache, chunk);
		return;
	}
	*w = (struct want){ .cache = use_cache(cache), .chunk = chunk, .tries = tries };
	w->not_before_us = tries ? os_now_us() + (pause_us < RETRY_MAX_US ? pause_us : RETRY_MAX_US) : 0;
	cache->state[chunk] = CHUNK_WANTED;
	while (*at)
		at = &(*at)->next;
	*at = w;
}

/* ---- fetching ---------------------------------------------------------------------------------- */

static void end_fetch(struct fetch *f)
{
	struct pager *p = f->pager;

	if (f->ahead) {
		p->ahead--;
		p->ahead_bytes -= f->read.bytes;
	} else {
		p->demands--;
	}
	release_cache(p, f->cache);
	free(f->read.to);
	free(f);
}

static void note_failure(struct pager *p, struct fetch *f, uint64_t chunk, int r)
{
	if (r == -EBADMSG) {
		p->wrong++;
		snprintf(p->trouble, sizeof p->trouble, "what the store gives for pages from %ju on is not what was saved; it is "
			 "asked again", (uintmax_t)f->cache->packed.chunk[chunk].first);
	} else {
		snprintf(p->trouble, sizeof p->trouble, "%s", r == -ENOSPC || r == -ENOMEM ? "no memory for the snapshot's pages"
			 : store_trouble(p->store));
	}
	if (is_waited_for(p, f->cache, chunk)) {
		want(p, f->cache, chunk, f->tries + 1);
		return;
	}
	f->cache->state[chunk] = CHUNK_ABSENT;
	if (os_now_us() < p->ahead_not_before_us) /* of one request, several */
		return;
	p->ahead_tries++;
	p->ahead_not_before_us = os_now_us() + (p->ahead_tries < 6 ? RETRY_US << p->ahead_tries : RETRY_MAX_US);
}

/* What a pager may be killed after, by tests. */
static void step(void) { (void)os_fault(OS_FAULT_PAGER_STEP); }

static void on_fetched(struct store_read *read, int r)
{
	struct fetch *f = (struct fetch *)(void *)read;
	const struct packed_chunk *first = &f->cache->packed.chunk[f->chunk];
	struct pager *p = f->pager;

	step();
	if (!r)
		p->bytes_fetched += read->bytes;
	for (uint64_t i = f->chunk; i < f->chunk + f->chunks; i++) {
		const struct packed_chunk *c = &f->cache->packed.chunk[i];
		int one = r ? r : cache_put(f->cache, i, read->to + (c->offset - first->offset), c->bytes);

		if (one) {
			note_failure(p, f, i, one);
			continue;
		}
		step();
		p->ahead_tries = 0;
		wake(p, f->cache, i);
	}
	end_fetch(f);
}

/* False: no memory, or no handle; it is tried again later. */
static bool fetch(struct pager *p, struct cache *cache, uint64_t chunk, uint64_t chunks, unsigned tries, bool ahead)
{
	const struct packed_chunk *first = &cache->packed.chunk[chunk], *last = first + chunks - 1;
	struct fetch *f = calloc(1, sizeof *f);

	if (!f)
		return false;
	*f = (struct fetch){ .pager = p, .cache = use_cache(cache), .chunk = chunk, .chunks = chunks, .tries = tries,
			     .ahead = ahead };
	f->read.object = cache->object;
	f->read.offset = first->offset;
	f->read.bytes = (size_t)(last->offset + last->bytes - first->offset);
	f->read.done = on_fetched;
	f->read.to = malloc(f->read.bytes);
	p->ahead += ahead;
	p->ahead_bytes += ahead ? f->read.bytes : 0;
	p->demands += !ahead;
	if (!f->read.to || store_start(p->store, &f->read)) {
		end_fetch(f);
		return false;
	}
	for (uint64_t i = 0; i < chunks; i++)
		cache->state[chunk + i] = CHUNK_COMES;
	step();
	return true;
}

/* The chunk, and as many absent ones as follow it in the file and fit in a piece. */
static uint64_t piece_of(const struct cache *cache, uint64_t chunk, uint64_t max_bytes)
{
	const struct packed_chunk *c = &cache->packed.chunk[chunk];
	uint64_t bytes = c->bytes, n = 1;

	while (chunk + n < cache->packed.chunks && cache->state[chunk + n] == CHUNK_ABSENT &&
	       c[n].offset == c[n - 1].offset + c[n - 1].bytes && bytes + c[n].bytes <= max_bytes)
		bytes += c[n++].bytes;
	return n;
}

/* Who goes on where the last demand ended gets more at a time, and more again. */
static uint64_t window_of(const struct pager *p, struct cache *cache, uint64_t chunk)
{
	bool goes_on = !p->on_demand_only && cache->window_bytes && chunk >= cache->window_end &&
		       chunk <= cache->window_end + 1;
	uint64_t n;

	cache->window_bytes = goes_on ? 2 * cache->window_bytes : cache->packed.chunk[chunk].bytes;
	if (cache->window_bytes > WINDOW_BYTES)
		cache->window_bytes = WINDOW_BYTES;
	n = piece_of(cache, chunk, cache->window_bytes);
	cache->window_end = chunk + n;
	cache->next_chunk = chunk + n; /* the background goes on from there */
	return n;
}

static void fetch_wanted(struct pager *p)
{
	uint64_t now_us = os_now_us();

	for (struct want **at = &p->wants; *at && p->demands < DEMANDS;) {
		struct want *w = *at;

		if (w->not_before_us > now_us ||
		    !fetch(p, w->cache, w->chunk, w->tries ? 1 : window_of(p, w->cache, w->chunk), w->tries, false)) {
			at = &w->next;
			continue;
		}
		*at = w->next;
		release_cache(p, w->cache);
		free(w);
	}
}

/* Who wants most of it gets it. */
static enum load load_of(const struct pager *p, const struct cache *cache)
{
	enum load most = LOAD_NOTHING;

	for (size_t i = 0; i < CLIENTS; i++) {
		const struct client *c = &p->clients[i];
		enum load load = p->on_demand_only && c->load < LOAD_ALL ? LOAD_NOTHING : c->load;

		if (c->cache == cache && load > most)
			most = load;
	}
	return most;
}

static bool may_fetch_ahead(const struct pager *p)
{
	uint64_t most = count_waiting(p) ? AHEAD_WAITED_BYTES : AHEAD_BYTES;

	/* A directory answers at once: one piece, and then faults are looked for. */
	return p->ahead < (store_is_far(p->store) ? AHEAD : 1) && p->ahead_bytes < most &&
	       os_now_us() >= p->ahead_not_before_us;
}

/* In the order of the active set, one by one; then in pieces. */
static uint64_t piece_bytes(const struct cache *cache)
{
	return cache->first_at < cache->first_count ? 0 : PIECE_BYTES;
}

static void fetch_ahead(struct pager *p)
{
	uint64_t chunk;

	for (struct cache *c = p->caches; c; c = c->next) {
		enum load load = load_of(p, c);

		while (load && may_fetch_ahead(p) && cache_next(c, load > LOAD_ACTIVE, &chunk))
			if (!fetch(p, c, chunk, piece_of(c, chunk, piece_bytes(c)), 0, true))
				return;
	}
}

/* ---- faults ------------------------------------------------------------------------------------ */

static bool find_page(const struct client *c, uintptr_t addr, uint64_t *ret_page)
{
	for (uint32_t i = 0; i < c->ram.blocks; i++) {
		const struct pager_block *b = &c->ram.block[i];

		if (addr >= b->hva && addr - b->hva < os_bytes(b->pages)) {
			*ret_page = b->first + ((addr - b->hva) >> OS_PAGE_SHIFT);
			return true;
		}
	}
	return false;
}

static bool add_waiter(struct client *c, uintptr_t addr, uint64_t chunk)
{
	if (c->waiting == c->room) {
		size_t room = c->room ? 2 * c->room : 64;
		struct waiter *longer = realloc(c->waiters, room * sizeof *longer);

		if (!longer)
			return false;
		c->waiters = longer;
		c->room = room;
	}
	c->waiters[c->waiting++] = (struct waiter){ addr, chunk };
	return true;
}

static void on_fault(struct pager *p, struct client *c, uintptr_t addr)
{
	uint64_t page, chunk;
	bool known = find_page(c, addr, &page);

	c->faults++;
	/* Who cannot be served here and now is woken, and faults again. */
	if (!known || !cache_chunk_of(c->cache, page, &chunk)) {
		if (known)
			(void)cache_make_page(c->cache, page);
		os_uffd_wake(c->uffd, (void *)addr, OS_PAGE_BYTES);
		return;
	}
	if (c->cache->state[chunk] == CHUNK_PRESENT || !add_waiter(c, addr, chunk)) {
		os_uffd_wake(c->uffd, (void *)addr, OS_PAGE_BYTES);
		return;
	}
	if (c->cache->state[chunk] == CHUNK_ABSENT)
		want(p, c->cache, chunk, 0);
}

static void on_faults(struct pager *p, struct client *c)
{
	uintptr_t addr;
	int r = 1;

	for (int i = 0; i < FAULTS_A_TURN && (r = os_uffd_next_fault(c->uffd, &addr)) == 1; i++)
		on_fault(p, c, addr);
	if (r < 0)
		unwatch(c);
}

/* ---- requests ---------------------------------------------------------------------------------- */

static void fill_report(const struct pager *p, const struct client *c, struct pager_report *report)
{
	bool failing = p->ahead_tries > 0;

	for (const struct want *w = p->wants; w; w = w->next)
		failing = failing || w->tries;
	*report = (struct pager_report){ .magic = PAGER_MAGIC, .version = PAGER_VERSION, .op = PAGER_REPORT };
	report->pages_all = c->cache ? c->cache->pages_all : 0;
	report->pages_present = c->cache ? c->cache->pages_present : 0;
	report->bytes_fetched = p->bytes_fetched;
	report->faults = c->faults;
	report->waiting = c->waiting;
	report->silent_ms = store_silent_ms(p->store);
	report->wrong = p->wrong;
	if (failing)
		snprintf(report->text, sizeof report->text, "%s", p->trouble);
}

/* Who does not read its answers gets none. */
static void answer(struct pager *p, struct client *c, enum pager_op op, int error, const char *text, const int *fds)
{
	struct pager_report report;

	fill_report(p, c, &report);
	report.op = op;
	report.error = error;
	if (error)
		snprintf(report.text, sizeof report.text, "%s", text);
	(void)pager_send(c->fd, &report, sizeof report, fds, fds ? PAGER_FDS : 0);
}

/* For reading only: nobody but a pager writes to the cache, not even by mistake. */
static int read_only(int fd)
{
	char path[32];

	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	return open(path, O_RDONLY | O_CLOEXEC);
}

static void hand_over(struct pager *p, struct client *c, struct cache *cache)
{
	int fds[PAGER_FDS] = { read_only(cache->fd), cache->pages_fd, cache->index_fd, cache->manifest_fd, cache->state_fd };

	c->cache = use_cache(cache);
	if (fds[PAGER_FD_CACHE] < 0)
		answer(p, c, PAGER_OPEN, -errno, "the cache cannot be opened: too many files?", NULL);
	else
		answer(p, c, PAGER_OPEN, 0, "", fds);
	if (fds[PAGER_FD_CACHE] >= 0)
		close(fds[PAGER_FD_CACHE]);
}

static struct cache *loaded_cache(struct pager *p)
{
	struct cache *cache = p->caches;

	while (cache && !cache->own)
		cache = cache->next;
	return cache;
}

static void on_rechecked(struct store_read *read, int r)
{
	struct recheck *re = (struct recheck *)(void *)read;
	struct cache *cache = loaded_cache(re->pager);
	struct client *c = NULL;

	for (size_t i = 0; i < CLIENTS; i++)
		if (re->pager->clients[i].fd == re->client_fd && re->pager->clients[i].opening)
			c = &re->pager->clients[i];
	if (c && !c->cache) {
		c->opening = false;
		if (r)
			answer(re->pager, c, PAGER_OPEN, r, store_trouble(re->pager->store), NULL);
		else if (cache_has_manifest(cache, read->to, read->bytes))
			hand_over(re->pager, c, cache);
		else
			answer(re->pager, c, PAGER_OPEN, -ESTALE, "the snapshot was replaced by another one, and VMs of the old one "
			       "still run; give the new one another name", NULL);
	}
	free(read->to);
	free(re);
}

/* A snapshot does not change; another one of the same name must not be taken for it. */
static void recheck(struct pager *p, struct client *c, const struct cache *cache)
{
	struct recheck *re = calloc(1, sizeof *re);
	size_t bytes = cache_manifest_bytes(cache);

	if (re) {
		*re = (struct recheck){ .pager = p, .client_fd = c->fd };
		re->read = (struct store_read){ .object = CACHE_MANIFEST, .bytes = bytes, .to = malloc(bytes),
						.done = on_rechecked };
	}
	c->opening = true;
	if (re && re->read.to && !store_start(p->store, &re->read))
		return;
	c->opening = false;
	answer(p, c, PAGER_OPEN, -ENOMEM, "no memory", NULL);
	if (re)
		free(re->read.to);
	free(re);
}

/* The store is waited for: at the start nobody else is there. After the death of another pager there may be others,
 * whose faults wait as long. */
static void do_open(struct pager *p, struct client *c)
{
	struct cache *cache = loaded_cache(p), *other = p->caches;
	char why[STORE_WHY_BYTES];
	int r;

	if (cache) {
		recheck(p, c, cache);
		return;
	}
	r = cache_load(p->store, p->on_demand_only, &cache, why);
	p->failed = r;
	if (r) {
		answer(p, c, PAGER_OPEN, r, why, NULL);
		return;
	}
	while (other && !cache_merge(other, cache))
		other = other->next;
	if (!other)
		add_cache(p, cache);
	hand_over(p, c, other ? other : cache);
}

/* Takes the descriptors. */
static void do_adopt(struct pager *p, struct client *c, const int fds[PAGER_FDS_ADOPT])
{
	struct cache *cache = p->caches;
	char why[STORE_WHY_BYTES] = "";
	int r = 0;

	while (cache && !cache_is_file(cache, fds[PAGER_FD_CACHE]))
		cache = cache->next;
	if (cache) {
		for (size_t i = 0; i < PAGER_FDS_ADOPT; i++)
			close(fds[i]);
	} else {
		r = cache_adopt(fds[PAGER_FD_CACHE], fds[PAGER_FD_PAGES], fds[PAGER_FD_INDEX], p->on_demand_only, &cache, why);
		if (!r)
			add_cache(p, cache);
	}
	if (!r)
		c->cache = use_cache(cache);
	answer(p, c, PAGER_ADOPT, r, why, NULL);
}

static bool is_userfaultfd(int fd)
{
	char path[32], name[64] = "";

	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	return readlink(path, name, sizeof name - 1) > 0 && !strcmp(name, "anon_inode:[userfaultfd]") &&
	       fcntl(fd, F_GETFL) & O_NONBLOCK;
}

static bool is_ram(const struct pager_request *q, uint64_t pages)
{
	for (uint32_t i = 0; i < q->blocks; i++) {
		const struct pager_block *b = &q->block[i];

		if (!b->pages || b->hva % OS_PAGE_BYTES || b->pages > UINTPTR_MAX >> OS_PAGE_SHIFT ||
		    os_bytes(b->pages) > UINTPTR_MAX - b->hva || b->first > pages || b->pages > pages - b->first)
			return false;
	}
	return q->blocks;
}

/* Takes the descriptor. */
static void do_watch(struct pager *p, struct client *c, const struct pager_request *q, int uffd)
{
	if (!is_ram(q, c->cache->image.pages) || !is_userfaultfd(uffd)) {
		close(uffd);
		answer(p, c, PAGER_WATCH, -EINVAL, "this is not guest RAM with a userfaultfd", NULL);
		return;
	}
	unwatch(c);
	c->uffd = uffd;
	c->ram = *q;
	answer(p, c, PAGER_WATCH, 0, "", NULL);
}

static bool is_valid(const struct pager *p, const struct client *c, const struct pager_request *q, int bytes, unsigned fds)
{
	static const unsigned wanted_fds[PAGER_REPORT] = { [PAGER_ADOPT] = PAGER_FDS_ADOPT, [PAGER_WATCH] = 1 };
	bool needs_cache = q->op >= PAGER_WATCH;

	return bytes == (int)sizeof *q && q->magic == PAGER_MAGIC && q->version == PAGER_VERSION && q->op < PAGER_REPORT &&
	       memchr(q->source, '\0', sizeof q->source) && !strcmp(q->source, p->source) && q->blocks <= PAGER_BLOCKS &&
	       fds == wanted_fds[q->op] && !c->cache == !needs_cache;
}

static void on_client(struct pager *p, struct client *c)
{
	static struct pager_request q; /* one thread */
	int fds[PAGER_FDS];
	unsigned count = PAGER_FDS;
	int n = pager_receive(c->fd, &q, sizeof q, fds, &count);

	if (n == -EAGAIN)
		return;
	if (n <= 0 || !is_valid(p, c, &q, n, count)) {
		while (count)
			close(fds[--count]);
		if (n > 0)
			answer(p, c, PAGER_REPORT, -EPROTO, "the request is not of this version of Latent, or for another snapshot",
			       NULL);
		drop_client(p, c);
		return;
	}
	step();
	if (q.op == PAGER_OPEN)
		do_open(p, c);
	else if (q.op == PAGER_ADOPT)
		do_adopt(p, c, fds);
	else if (q.op == PAGER_WATCH)
		do_watch(p, c, &q, fds[0]);
	else
		c->load = q.op == PAGER_LOAD ? LOAD_ALL : q.op == PAGER_LOAD_REST ? LOAD_REST : LOAD_ACTIVE;
	step();
}

static bool may_ask(int fd)
{
	struct ucred peer;
	socklen_t bytes = sizeof peer;

	return !getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &bytes) && (peer.uid == geteuid() || !peer.uid);
}

static void on_connect(struct pager *p)
{
	int fd = accept4(p->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	size_t i = 0;

	while (i < CLIENTS && p->clients[i].fd >= 0)
		i++;
	if (fd >= 0 && i < CLIENTS && may_ask(fd))
		p->clients[i] = (struct client){ .fd = fd, .uffd = -1, .load = LOAD_ACTIVE };
	else if (fd >= 0)
		close(fd);
}

static void report_all(struct pager *p)
{
	struct pager_report report;

	if (os_now_us() < p->report_us)
		return;
	p->report_us = os_now_us() + REPORT_US;
	for (size_t i = 0; i < CLIENTS; i++) {
		struct client *c = &p->clients[i];

		if (c->fd < 0 || !c->cache)
			continue;
		fill_report(p, c, &report);
		if (memcmp(&report, &c->told, sizeof report) && !pager_send(c->fd, &report, sizeof report, NULL, 0))
			c->told = report;
	}
}

/* ---- the loop ---------------------------------------------------------------------------------- */

static void wait_and_answer(struct pager *p)
{
	struct pollfd polled[2 * CLIENTS + 1] = { { .fd = p->listener, .events = POLLIN } };
	struct client *whose[2 * CLIENTS + 1];
	unsigned count = 1;

	for (size_t i = 0; i < CLIENTS; i++) {
		struct client *c = &p->clients[i];

		if (c->uffd >= 0) {
			whose[count] = c;
			polled[count++] = (struct pollfd){ .fd = c->uffd, .events = POLLIN };
		}
		if (c->fd >= 0) {
			whose[count] = c;
			polled[count++] = (struct pollfd){ .fd = c->fd, .events = POLLIN };
		}
	}
	store_wait(p->store, polled, count, p->wants || p->ahead_tries ? RETRY_MS : IDLE_MS);
	for (unsigned i = 1; i < count; i++) {
		if (!polled[i].revents)
			continue;
		if (polled[i].fd == whose[i]->uffd)
			on_faults(p, whose[i]);
		else if (polled[i].fd == whose[i]->fd)
			on_client(p, whose[i]);
	}
	if (polled[0].revents)
		on_connect(p);
}

static bool is_needed(struct pager *p)
{
	bool alone = true;

	for (size_t i = 0; i < CLIENTS; i++)
		alone = alone && p->clients[i].fd < 0;
	if (!alone)
		p->alone_since_us = os_now_us();
	return !alone || (!p->failed && os_now_us() - p->alone_since_us < LINGER_US);
}

void pager_serve(int listener, const char *source, bool on_demand_only)
{
	static struct pager p;
	char why[STORE_WHY_BYTES];

	p = (struct pager){ .source = source, .on_demand_only = on_demand_only, .listener = listener,
			    .alone_since_us = os_now_us() };
	for (size_t i = 0; i < CLIENTS; i++)
		p.clients[i].fd = p.clients[i].uffd = -1;
	if (store_open(source, &p.store, why))
		return;
	while (is_needed(&p)) {
		fetch_wanted(&p);
		fetch_ahead(&p);
		wait_and_answer(&p);
		report_all(&p);
	}
	store_close(p.store);
}
