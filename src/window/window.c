/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "window/window.h"

#include "os/os.h"

#include <assert.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TABLE_BYTES ((size_t)2 << 20) /* what one page table maps */
#define SLOT_BYTES (TABLE_BYTES - OS_PAGE_BYTES)
#define BOUNCE_KEPT_BYTES ((size_t)64 << 10) /* of a slot's bounce buffer, while nothing is to be done */
#define SEGMENTS_MAX 1024u
#define AGAIN_BYTES ((size_t)16 << 10) /* runs as long as this are mapped when they come again */
#define SEEN_RUNS 256u                 /* that are remembered, to know that they do */
#define CREDIT_MAX 128u                /* what may be mapped in the hope that it comes again: that costs MAP_CREDIT; */
#define MAP_CREDIT 2u                  /* each time that it does come brings one */
#define REFUSED_MAX 64u                /* once in so many times there is hope again */
#define FAULT_PAGES 16u                /* that come with one fault of a read */
#define ANY_CPU (-1)

_Static_assert(SLOT_BYTES == (size_t)LATENT_SLOT_PAGES << OS_PAGE_SHIFT,
	       "a slot and the page that keeps its table");

enum slot_state { SLOT_EMPTY, SLOT_WAITING, SLOT_IN_USE, SLOT_LOST };

/* Guest memory by what no descriptor's number says: which file it is. */
struct place {
	dev_t dev;
	ino_t ino;
	uint64_t offset; /* of the first page */
	size_t bytes;    /* whole pages; 0: none */
	bool writable;
	bool known; /* dev and ino are: that takes a system call */
};

struct slot {
	uint8_t *hva;        /* behind the page that keeps the table: SLOT_BYTES */
	uint8_t *bounce;     /* as many */
	size_t mapped_bytes; /* from hva on */
	struct place place;  /* what these are, where they are one run */
	size_t bounce_bytes; /* from bounce on, of this request */
	size_t bounce_touched;
	uint64_t use; /* of the request that is in it */
	enum slot_state state;
	bool local;
};

struct stack {
	uint16_t *slots; /* the last one is taken first: its page table is in the CPU's caches */
	uint32_t count;
};

struct window {
	uint64_t lane;
	int cpu;
	pid_t tid;
	uint32_t n_slots;
	struct slot *slots;
	struct stack empty, waiting;
	uint8_t *area, *bounce; /* n_slots * TABLE_BYTES each */
	uint64_t uses;
	uint64_t seen[SEEN_RUNS]; /* keys of runs; a hint, no more */
	uint32_t credit, refused;
	struct latent_window_stats stats;
};

/* Segments that continue each other in one file. */
struct run {
	uint32_t first, count;
	int fd;
	uint64_t offset;
	size_t bytes;
};

/* ---- registration ----------------------------------------------------------------------------- */

static uint64_t new_lane(void)
{
	static _Atomic uint32_t windows;

	return (uint64_t)getpid() << 32 | ++windows;
}

static int make_slots(struct window *w)
{
	size_t bytes = w->n_slots * TABLE_BYTES;
	int r;

	w->area = os_reserve(bytes, TABLE_BYTES);
	w->bounce = os_reserve(bytes, TABLE_BYTES);
	if (!w->area || !w->bounce)
		return -ENOMEM;
	r = os_window_memory(w->bounce, bytes);
	if (!r) /* a huge page for each slot would be too much; a kernel without them says EINVAL */
		(void)os_set_marks(w->bounce, bytes, OS_MARK_NOHUGEPAGE, true);
	for (uint32_t i = 0; !r && i < w->n_slots; i++) {
		uint8_t *keeper = w->area + i * TABLE_BYTES;

		r = os_window_memory(keeper, OS_PAGE_BYTES);
		if (!r)
			r = os_populate_write(keeper, OS_PAGE_BYTES);
		w->slots[i] = (struct slot){ .hva = keeper + OS_PAGE_BYTES,
					     .bounce = w->bounce + i * TABLE_BYTES };
	}
	return r;
}

static int bind_to(struct window *w, int cpu)
{
	int r = cpu == ANY_CPU ? 0 : os_bind_to_cpu(cpu);

	if (!r)
		w->cpu = cpu;
	return r;
}

int window_register(int cpu, uint32_t slots, struct window **ret_window)
{
	struct window *w;
	int r;

	if (!slots || slots > LATENT_SLOTS_MAX || cpu < ANY_CPU)
		return -EINVAL;
	w = calloc(1, sizeof *w);
	if (!w)
		return -ENOMEM;
	w->lane = new_lane();
	w->tid = (pid_t)syscall(SYS_gettid);
	w->n_slots = slots;
	w->credit = CREDIT_MAX;
	w->slots = calloc(slots, sizeof *w->slots);
	w->empty.slots = calloc(slots, sizeof *w->empty.slots);
	w->waiting.slots = calloc(slots, sizeof *w->waiting.slots);
	r = w->slots && w->empty.slots && w->waiting.slots ? bind_to(w, cpu) : -ENOMEM;
	if (!r)
		r = window_check(w);
	if (!r)
		r = make_slots(w);
	if (r) {
		window_unregister(w);
		return r;
	}
	while (w->empty.count < slots) {
		w->empty.slots[w->empty.count] = (uint16_t)(slots - 1 - w->empty.count);
		w->empty.count++;
	}
	w->stats.min_window_bytes = window_measure_threshold(w->slots[0].hva, w->slots[0].bounce);
	w->slots[0].bounce_touched = SLOT_BYTES;
	*ret_window = w;
	return 0;
}

void window_unregister(struct window *w)
{
	if (!w)
		return;
	os_unreserve(w->area, w->n_slots * TABLE_BYTES);
	os_unreserve(w->bounce, w->n_slots * TABLE_BYTES);
	free(w->slots);
	free(w->empty.slots);
	free(w->waiting.slots);
	free(w);
}

int window_move(struct window *w, int cpu) { return bind_to(w, cpu); }

int window_check(const struct window *w) { return w->cpu == ANY_CPU ? 0 : os_all_bound_to_cpu(w->cpu); }

void window_set_threshold(struct window *w, uint32_t bytes) { w->stats.min_window_bytes = bytes; }

void window_stats(const struct window *w, struct latent_window_stats *stats)
{
	*stats = w->stats;
	stats->size = sizeof *stats;
}

/* ---- where it runs ---------------------------------------------------------------------------- */

/*
 * Off its CPU a local window is no danger: the kernel loads this address space elsewhere only with a
 * look at what was flushed meanwhile. But it costs what windows are there to save. Nobody but the
 * registered thread may use it, so if that is here, somebody else has moved it.
 */
static int check_cpu(struct window *w)
{
	if (os_cpu() == w->cpu)
		return 0;
	w->stats.off_cpu++;
	assert((pid_t)syscall(SYS_gettid) == w->tid);
	return -EXDEV;
}

/* ---- requests --------------------------------------------------------------------------------- */

static size_t round_up(size_t bytes) { return (bytes + OS_PAGE_BYTES - 1) & ~(OS_PAGE_BYTES - 1); }

/* Where in its first page a run begins, and the whole pages that it is in. */
static size_t within_page(const struct run *run) { return (size_t)run->offset & (OS_PAGE_BYTES - 1); }

static size_t span_bytes(const struct run *run) { return round_up(within_page(run) + run->bytes); }

static bool next_run(const struct latent_request *r, struct run *run)
{
	uint32_t i = run->first + run->count;

	if (i >= r->count)
		return false;
	*run = (struct run){ i, 1, r->segments[i].fd, r->segments[i].offset, r->segments[i].bytes };
	while (++i < r->count && r->segments[i].fd == run->fd &&
	       r->segments[i].offset == run->offset + run->bytes) {
		run->bytes += r->segments[i].bytes;
		run->count++;
	}
	return true;
}

/* Everything in one run. */
static bool is_one_run(const struct latent_request *r, struct run *run)
{
	*run = (struct run){ 0 };
	return next_run(r, run) && run->count == r->count;
}

/* Everything that a caller can get wrong, before anything is done. */
static int check_segments(const struct latent_request *r)
{
	if (r->size != sizeof *r || !r->count || r->count > SEGMENTS_MAX)
		return -EINVAL;
	for (uint32_t i = 0; i < r->count; i++) {
		const struct latent_segment *s = &r->segments[i];

		if (s->fd < 0 || !s->bytes || s->offset > INT64_MAX - SLOT_BYTES)
			return -EINVAL;
		if (s->bytes > SLOT_BYTES)
			return -E2BIG;
	}
	return 0;
}

/* Runs of at least `least` bytes are mapped. Sums cannot overflow: each term is bounded. */
static int check_size(const struct latent_request *r, size_t least, size_t *ret_to_map)
{
	size_t to_map = 0, to_copy = 0;
	struct run run = { 0 };

	while (next_run(r, &run)) {
		if (run.bytes >= least)
			to_map += span_bytes(&run);
		else
			to_copy += run.bytes;
	}
	if (to_map > SLOT_BYTES || to_copy > SLOT_BYTES)
		return -E2BIG;
	*ret_to_map = to_map;
	return 0;
}

static void place_segments(const struct latent_request *r, const struct run *run, uint8_t *at)
{
	for (uint32_t i = run->first; i < run->first + run->count; i++) {
		r->iov[i] = (struct iovec){ at, r->segments[i].bytes };
		at += r->segments[i].bytes;
	}
}

/* ---- what comes again ------------------------------------------------------------------------- */

/*
 * To map pages costs about as much as to copy them; to find them mapped costs nothing. Drivers use their buffers
 * again and again, so a run that comes a second time gets a slot that keeps it; as long as that brings something. A
 * driver whose buffers are more than the slots, in turn, would have them mapped and never found.
 */
static bool has_credit(struct window *w)
{
	if (w->credit < MAP_CREDIT && ++w->refused % REFUSED_MAX == 0)
		w->credit = MAP_CREDIT;
	return w->credit >= MAP_CREDIT;
}

static bool was_seen(struct window *w, const struct latent_request *r, const struct run *run)
{
	uint64_t key = ((uint64_t)run->fd << 1 | r->writes_guest) * 0x9e3779b97f4a7c15 ^
		       run->offset * 0xbf58476d1ce4e5b9 ^ run->bytes * 0x94d049bb133111eb;
	uint64_t *seen = &w->seen[(key ^ key >> 32) % SEEN_RUNS];

	if (*seen == key)
		return true;
	*seen = key;
	return false;
}

static bool may_come_again(const struct window *w, const struct latent_request *r, struct run *run)
{
	return is_one_run(r, run) && run->bytes >= AGAIN_BYTES &&
	       w->stats.min_window_bytes <= SLOT_BYTES;
}

static struct place place_of(const struct latent_request *r, const struct run *run)
{
	return (struct place){ .offset = run->offset - within_page(run),
			       .bytes = span_bytes(run),
			       .writable = r->writes_guest };
}

/* The descriptor may have been closed, and its number be another file's: what is mapped is that file. */
static bool identify(struct place *place, int fd)
{
	struct stat st;

	if (!place->known && fstat(fd, &st))
		return false;
	if (!place->known) {
		place->dev = st.st_dev;
		place->ino = st.st_ino;
		place->known = true;
	}
	return true;
}

/* Which of the slots that wait maps it still, as its number in their stack; -1: none. */
static int find_kept(const struct window *w, struct place *place, int fd)
{
	for (uint32_t i = w->waiting.count; i--;) {
		const struct place *kept = &w->slots[w->waiting.slots[i]].place;

		if (kept->offset == place->offset && kept->bytes == place->bytes &&
		    kept->writable == place->writable && identify(place, fd) && kept->ino == place->ino &&
		    kept->dev == place->dev)
			return (int)i;
	}
	return -1;
}

static struct slot *take_kept(struct window *w, int at)
{
	struct slot *s = &w->slots[w->waiting.slots[at]];

	w->waiting.count--;
	for (uint32_t i = (uint32_t)at; i < w->waiting.count; i++)
		w->waiting.slots[i] = w->waiting.slots[i + 1];
	return s;
}

bool window_comes_again(struct window *w, const struct latent_request *r)
{
	struct place place;
	struct run run;

	if (check_segments(r) || !may_come_again(w, r, &run))
		return false;
	place = place_of(r, &run);
	return find_kept(w, &place, run.fd) >= 0 || (was_seen(w, r, &run) && has_credit(w));
}

/* ---- slots ------------------------------------------------------------------------------------ */

static void set_mapped(struct window *w, struct slot *s, size_t bytes)
{
	w->stats.mapped_pages += bytes >> OS_PAGE_SHIFT;
	w->stats.mapped_pages -= s->mapped_bytes >> OS_PAGE_SHIFT;
	s->mapped_bytes = bytes;
	if (w->stats.mapped_pages > w->stats.peak_pages)
		w->stats.peak_pages = w->stats.mapped_pages;
}

/* Nothing of guest memory from `keep` on. */
static int cut_slot(struct window *w, struct slot *s, size_t keep)
{
	int r = 0;

	if (s->mapped_bytes > keep)
		r = os_window_clear(s->hva + keep, s->mapped_bytes - keep);
	if (!r && s->mapped_bytes > keep)
		set_mapped(w, s, keep);
	return r;
}

static void push(struct window *w, struct stack *stack, const struct slot *s)
{
	stack->slots[stack->count++] = (uint16_t)(s - w->slots);
}

static struct slot *pop(struct window *w, struct stack *stack)
{
	return stack->count ? &w->slots[stack->slots[--stack->count]] : NULL;
}

/* The slot is on no stack. */
static int empty_slot(struct window *w, struct slot *s)
{
	int r = cut_slot(w, s, 0);

	s->use = 0;
	s->place.bytes = 0;
	s->state = r ? SLOT_LOST : SLOT_EMPTY;
	if (!r) {
		push(w, &w->empty, s);
		w->stats.emptied++;
	}
	return r;
}

/* What is to be mapped goes where something is mapped, as few pages shall be; what is copied, and what shall be kept,
 * where nothing is. */
static struct slot *take_slot(struct window *w, bool replaces)
{
	struct slot *s = pop(w, replaces ? &w->waiting : &w->empty);

	if (!s)
		s = pop(w, replaces ? &w->empty : &w->waiting);
	return s;
}

static struct slot *slot_of(const struct window *w, const struct latent_request *r)
{
	struct slot *s = &w->slots[r->use % w->n_slots];

	return r->use && r->lane == w->lane && s->state == SLOT_IN_USE && s->use == r->use ? s : NULL;
}

static uint64_t new_use(struct window *w, const struct slot *s)
{
	return ++w->uses * w->n_slots + (uint64_t)(s - w->slots);
}

/* ---- bringing a request in -------------------------------------------------------------------- */

static int map_run(struct window *w, struct slot *s, const struct latent_request *r,
		   const struct run *run, size_t at)
{
	size_t bytes = span_bytes(run);
	int error;

	/* Counted first: should it fail, what is there is emptied as far as this. */
	if (at + bytes > s->mapped_bytes)
		set_mapped(w, s, at + bytes);
	error = os_window_map(s->hva + at, bytes, run->fd, run->offset - within_page(run),
			      r->writes_guest);
	if (error)
		return error;
	/* By one call: what is read comes with few faults, what is written would take one for each page. */
	if (r->writes_guest || bytes > os_bytes(FAULT_PAGES))
		os_populate_read(s->hva + at, bytes);
	place_segments(r, run, s->hva + at + within_page(run));
	w->stats.maps++;
	w->stats.window_bytes += run->bytes;
	return 0;
}

static int copy_run(struct window *w, struct slot *s, const struct latent_request *r,
		    const struct run *run)
{
	uint8_t *at = s->bounce + s->bounce_bytes;
	int error = r->writes_guest ? 0 : os_read_all(run->fd, at, run->bytes, run->offset);

	if (error)
		return error == -ENODATA ? -EFAULT : error;
	place_segments(r, run, at);
	s->bounce_bytes += run->bytes;
	if (s->bounce_bytes > s->bounce_touched)
		s->bounce_touched = s->bounce_bytes;
	w->stats.bounce_bytes += run->bytes;
	return 0;
}

static int fill_slot(struct window *w, struct slot *s, const struct latent_request *r, size_t least)
{
	struct run run = { 0 };
	size_t mapped = 0;
	int error = 0;

	s->bounce_bytes = s->place.bytes = 0;
	while (!error && next_run(r, &run)) {
		if (run.bytes >= least) {
			error = map_run(w, s, r, &run, mapped);
			mapped += span_bytes(&run);
		} else {
			error = copy_run(w, s, r, &run);
		}
	}
	return error ? error : cut_slot(w, s, mapped);
}

/* A request of one run whose pages a slot still has. NULL: there is none. */
static struct slot *use_kept(struct window *w, const struct latent_request *r, const struct run *run,
			     struct place *place)
{
	int at = find_kept(w, place, run->fd);
	struct slot *s;

	if (at < 0)
		return NULL;
	s = take_kept(w, at);
	s->bounce_bytes = 0;
	place_segments(r, run, s->hva + within_page(run));
	w->stats.kept++;
	w->stats.window_bytes += run->bytes;
	w->credit += w->credit < CREDIT_MAX;
	return s;
}

/* The slot has nothing of the request before but what it maps. */
static int fill_another(struct window *w, const struct latent_request *r, size_t least, bool keep,
			struct slot **ret_slot)
{
	size_t to_map;
	int error = check_size(r, least, &to_map);
	struct slot *s = error ? NULL : take_slot(w, to_map && !keep);

	if (!s)
		return error ? error : -EAGAIN;
	w->stats.reused += s->state == SLOT_WAITING && s->mapped_bytes && to_map;
	error = fill_slot(w, s, r, least);
	if (error)
		(void)empty_slot(w, s);
	else
		*ret_slot = s;
	return error;
}

static int give_slot(struct window *w, const struct latent_request *r, struct slot **ret_slot)
{
	size_t least = w->stats.min_window_bytes;
	struct place place = { 0 };
	bool keep = false;
	struct run run;
	int error;

	if (may_come_again(w, r, &run)) {
		place = place_of(r, &run);
		*ret_slot = use_kept(w, r, &run, &place);
		if (*ret_slot)
			return 0;
		keep = was_seen(w, r, &run) && has_credit(w);
		if (keep && run.bytes < least) {
			least = AGAIN_BYTES;
			w->credit -= MAP_CREDIT;
		}
	}
	error = fill_another(w, r, least, keep, ret_slot);
	if (!error && place.bytes && (*ret_slot)->mapped_bytes && identify(&place, run.fd))
		(*ret_slot)->place = place;
	return error;
}

int window_map(struct window *w, struct latent_request *r, int flush)
{
	bool local = flush == LATENT_LOCAL_FLUSH;
	struct slot *s;
	int error;

	if (!local && flush != LATENT_GLOBAL_FLUSH)
		return -EINVAL;
	if (slot_of(w, r))
		return -EBUSY;
	error = local && w->cpu == ANY_CPU ? -EOPNOTSUPP : check_segments(r);
	if (!error && local)
		error = check_cpu(w);
	if (!error && r->lane && r->lane != w->lane)
		error = window_recycle(w);
	if (!error)
		error = give_slot(w, r, &s);
	if (error)
		return error;
	s->state = SLOT_IN_USE;
	s->local = local;
	s->use = new_use(w, s);
	r->lane = w->lane;
	r->use = s->use;
	w->stats.requests++;
	return 0;
}

int window_use(struct window *w, const struct latent_request *r)
{
	const struct slot *s = slot_of(w, r);

	if (!s)
		return -ESTALE;
	return s->local ? check_cpu(w) : 0;
}

/* ---- taking it out ---------------------------------------------------------------------------- */

static bool is_copy(const struct slot *s, const struct latent_request *r, const struct run *run)
{
	return (uintptr_t)r->iov[run->first].iov_base - (uintptr_t)s->bounce < SLOT_BYTES;
}

static int copy_back(const struct slot *s, const struct latent_request *r)
{
	struct run run = { 0 };
	int error = 0;

	while (next_run(r, &run)) {
		int one = is_copy(s, r, &run) ? os_write_all(run.fd, r->iov[run.first].iov_base,
							     run.bytes, run.offset)
					      : 0;

		error = error ? error : one;
	}
	return error;
}

int window_done(struct window *w, struct latent_request *r, bool succeeded)
{
	struct slot *s = slot_of(w, r);
	int error;

	if (!s)
		return -ESTALE;
	error = r->writes_guest && succeeded ? copy_back(s, r) : 0;
	r->lane = r->use = s->use = 0;
	s->state = s->mapped_bytes ? SLOT_WAITING : SLOT_EMPTY;
	push(w, s->mapped_bytes ? &w->waiting : &w->empty, s);
	return error;
}

int window_hand_over(struct window *w, struct latent_request *r)
{
	struct slot *s = slot_of(w, r);

	if (!s)
		return -ESTALE;
	r->use = 0; /* but it keeps the lane's name: who takes it sees that it was another's */
	w->stats.handed_over++;
	return empty_slot(w, s);
}

static void trim_bounce(struct slot *s)
{
	if (s->state == SLOT_EMPTY && s->bounce_touched > BOUNCE_KEPT_BYTES &&
	    !os_zap(s->bounce + BOUNCE_KEPT_BYTES, round_up(s->bounce_touched - BOUNCE_KEPT_BYTES)))
		s->bounce_touched = BOUNCE_KEPT_BYTES;
}

int window_recycle(struct window *w)
{
	struct slot *s;
	int r = 0;

	while ((s = pop(w, &w->waiting))) {
		int one = empty_slot(w, s);

		r = r ? r : one;
	}
	for (uint32_t i = 0; i < w->n_slots; i++)
		trim_bounce(&w->slots[i]);
	return r;
}
