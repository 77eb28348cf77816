/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "window/window.h"

#include "os/os.h"

#include <assert.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TABLE_BYTES ((size_t)2 << 20) /* what one page table maps */
#define SLOT_BYTES (TABLE_BYTES - OS_PAGE_BYTES)
#define BOUNCE_KEPT_BYTES ((size_t)64 << 10) /* of a slot's bounce buffer, while nothing is to be done */
#define SEGMENTS_MAX 1024u
#define ANY_CPU (-1)

_Static_assert(SLOT_BYTES == (size_t)LATENT_SLOT_PAGES << OS_PAGE_SHIFT,
	       "a slot and the page that keeps its table");

enum slot_state { SLOT_EMPTY, SLOT_WAITING, SLOT_IN_USE, SLOT_LOST };

struct slot {
	uint8_t *hva;        /* behind the page that keeps the table: SLOT_BYTES */
	uint8_t *bounce;     /* as many */
	size_t mapped_bytes; /* from hva on */
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

static bool is_mapped(const struct window *w, const struct run *run)
{
	return run->bytes >= w->stats.min_window_bytes;
}

/* Everything that a caller can get wrong, before anything is done. Sums cannot overflow: each term is
 * bounded. */
static int check_request(const struct window *w, const struct latent_request *r, size_t *ret_to_map)
{
	size_t to_map = 0, to_copy = 0;
	struct run run = { 0 };

	if (r->size != sizeof *r || !r->count || r->count > SEGMENTS_MAX)
		return -EINVAL;
	for (uint32_t i = 0; i < r->count; i++) {
		const struct latent_segment *s = &r->segments[i];

		if (s->fd < 0 || !s->bytes || s->offset > INT64_MAX - SLOT_BYTES)
			return -EINVAL;
		if (s->bytes > SLOT_BYTES)
			return -E2BIG;
	}
	while (next_run(r, &run)) {
		if (is_mapped(w, &run))
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
	s->state = r ? SLOT_LOST : SLOT_EMPTY;
	if (!r) {
		push(w, &w->empty, s);
		w->stats.emptied++;
	}
	return r;
}

/* What is to be mapped goes where something is mapped; what is copied, where nothing is. */
static struct slot *take_slot(struct window *w, bool to_map)
{
	struct slot *s = pop(w, to_map ? &w->waiting : &w->empty);

	if (!s)
		s = pop(w, to_map ? &w->empty : &w->waiting);
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
	/* Reads bring 16 pages with a fault, writes one: those are brought by one call, in half the time. */
	if (r->writes_guest)
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

static int fill_slot(struct window *w, struct slot *s, const struct latent_request *r)
{
	struct run run = { 0 };
	size_t mapped = 0;
	int error = 0;

	s->bounce_bytes = 0;
	while (!error && next_run(r, &run)) {
		if (is_mapped(w, &run)) {
			error = map_run(w, s, r, &run, mapped);
			mapped += span_bytes(&run);
		} else {
			error = copy_run(w, s, r, &run);
		}
	}
	return error ? error : cut_slot(w, s, mapped);
}

int window_map(struct window *w, struct latent_request *r, int flush)
{
	bool local = flush == LATENT_LOCAL_FLUSH;
	struct slot *s;
	size_t to_map;
	int error;

	if (!local && flush != LATENT_GLOBAL_FLUSH)
		return -EINVAL;
	if (slot_of(w, r))
		return -EBUSY;
	error = local && w->cpu == ANY_CPU ? -EOPNOTSUPP : check_request(w, r, &to_map);
	if (!error && local)
		error = check_cpu(w);
	if (!error && r->lane && r->lane != w->lane)
		error = window_recycle(w);
	if (error)
		return error;
	s = take_slot(w, to_map);
	if (!s)
		return -EAGAIN;
	w->stats.reused += s->state == SLOT_WAITING && s->mapped_bytes && to_map;
	error = fill_slot(w, s, r);
	if (error) {
		(void)empty_slot(w, s);
		return error;
	}
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

static int copy_back(const struct window *w, const struct latent_request *r)
{
	struct run run = { 0 };
	int error = 0;

	while (next_run(r, &run)) {
		int one = is_mapped(w, &run) ? 0
					     : os_write_all(run.fd, r->iov[run.first].iov_base,
							    run.bytes, run.offset);

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
	error = r->writes_guest && succeeded ? copy_back(w, r) : 0;
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
