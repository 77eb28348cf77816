/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "vcpu.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* One page per vCPU, read and written by both sides. */
struct vcpu_mailbox {
	uint32_t stop;
	uint32_t owner;
	uint32_t write_below, poke_below, full_below; /* compared with 8 random bits */
	uint32_t unused;
	uint64_t request_first, request_pages; /* the host asks by making request_pages not 0 */
	uint64_t range_first, range_pages;
	uint64_t unused2;
	struct vcpu_counts counts;
};

#define SAME_OFFSET(type, field, offset)                                                                \
	_Static_assert(offsetof(type, field) == (offset), #field " is elsewhere in guest.S")
SAME_OFFSET(struct page_entry, state, ENTRY_STATE);
SAME_OFFSET(struct page_entry, seed, ENTRY_SEED);
SAME_OFFSET(struct page_entry, stamp, ENTRY_STAMP);
SAME_OFFSET(struct vcpu_mailbox, stop, BOX_STOP);
SAME_OFFSET(struct vcpu_mailbox, owner, BOX_OWNER);
SAME_OFFSET(struct vcpu_mailbox, write_below, BOX_WRITE_BELOW);
SAME_OFFSET(struct vcpu_mailbox, poke_below, BOX_POKE_BELOW);
SAME_OFFSET(struct vcpu_mailbox, full_below, BOX_FULL_BELOW);
SAME_OFFSET(struct vcpu_mailbox, request_first, BOX_REQUEST_FIRST);
SAME_OFFSET(struct vcpu_mailbox, request_pages, BOX_REQUEST_PAGES);
SAME_OFFSET(struct vcpu_mailbox, range_first, BOX_RANGE_FIRST);
SAME_OFFSET(struct vcpu_mailbox, range_pages, BOX_RANGE_PAGES);
SAME_OFFSET(struct vcpu_mailbox, counts.touches, BOX_TOUCHES);
SAME_OFFSET(struct vcpu_mailbox, counts.reads, BOX_READS);
SAME_OFFSET(struct vcpu_mailbox, counts.words, BOX_WORDS);
SAME_OFFSET(struct vcpu_mailbox, counts.writes, BOX_WRITES);
SAME_OFFSET(struct vcpu_mailbox, counts.pokes, BOX_POKES);
SAME_OFFSET(struct vcpu_mailbox, counts.skipped, BOX_SKIPPED);
SAME_OFFSET(struct vcpu_mailbox, counts.raced, BOX_RACED);
SAME_OFFSET(struct vcpu_mailbox, counts.handovers, BOX_HANDOVERS);
_Static_assert(sizeof(struct page_entry) == 1u << ENTRY_SHIFT, "entry size");
_Static_assert(FLAG_ZERO == 1 << FLAG_ZERO_BIT, "flag");

/* guest.S */
extern const uint8_t guest_code_begin[], guest_code_end[];
extern const uint8_t guest_read_sum[], guest_verify[], guest_write[], guest_touch[];

enum { SLOTS_MAX = 16, FIRST_RAM_SLOT = 2 };

struct slot {
	uint64_t first_page, pages;
	uint8_t *hva;
};

struct vcpu {
	struct vcpus *machine;
	unsigned index;
	int fd;
	struct kvm_run *run;
	size_t run_bytes;
	struct vcpu_mailbox *box;
	pthread_t thread;
	bool has_thread;
	/* Under the machine's lock: */
	bool started; /* a program was started at some time */
	bool running; /* it has not ended */
	bool in_guest;
	enum vcpu_program program;
	struct vcpu_report report; /* valid when started and not running */
};

struct vcpus {
	int kvm_fd, vm_fd;
	uint8_t *low; /* LOW_BYTES */
	struct page_entry *table;
	uint64_t ram_pages;
	struct slot slots[SLOTS_MAX];
	unsigned slot_count;
	unsigned count;
	struct vcpu cpus[VCPUS_MAX];
	pthread_mutex_t take_lock; /* held by one vcpus_take at a time; before `lock` */
	pthread_mutex_t lock;
	pthread_cond_t changed; /* any of: running, in_guest, pauses, quit */
	unsigned pauses;
	bool quit;
};

static uint64_t now_ms(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

/* ---- The vCPU threads ---- */

static int kick_signal(void) { return SIGRTMIN + 7; }

static void ignore_kick(int signal) { (void)signal; /* its only use is to make KVM_RUN return */ }

static void *hva_of(const struct vcpus *m, uint64_t page)
{
	for (unsigned i = 0; i < m->slot_count; i++) {
		const struct slot *s = &m->slots[i];
		if (page >= s->first_page && page - s->first_page < s->pages)
			return s->hva + ((page - s->first_page) << GUEST_PAGE_SHIFT);
	}
	return NULL;
}

/* Fills in where the program stood. */
static void locate_stop(struct vcpu *c, struct vcpu_report *report)
{
	struct kvm_regs regs;
	if (ioctl(c->fd, KVM_GET_REGS, &regs) < 0)
		return;
	report->code_offset = regs.rip - CODE_GPA - c->index * GUEST_PAGE_BYTES;
	report->sum = regs.rax;
	report->got = regs.rax;
	report->expected = regs.rdx;
	report->state = regs.r12;
	report->word = (unsigned)regs.r13;
	if (regs.rbx < RAM_GPA)
		return;
	report->gpa = regs.rbx;
	report->page = (regs.rbx - RAM_GPA) >> GUEST_PAGE_SHIFT;
	report->hva = hva_of(c->machine, report->page);
}

static enum vcpu_outcome outcome_of_exit(const struct kvm_run *run)
{
	uint64_t says;
	if (run->exit_reason != KVM_EXIT_MMIO || !run->mmio.is_write ||
	    run->mmio.phys_addr != MMIO_GPA || run->mmio.len != sizeof says)
		return VCPU_BROKEN;
	memcpy(&says, run->mmio.data, sizeof says);
	return says == SAYS_DONE      ? VCPU_DONE
	       : says == SAYS_STOPPED ? VCPU_STOPPED
	       : says == SAYS_WRONG   ? VCPU_WRONG
				      : VCPU_BROKEN;
}

/* `error` is what KVM_RUN returned. Returns whether the program ended. */
static bool program_ended(struct vcpu *c, int error)
{
	struct vcpu_report report = { .exit_reason = c->run->exit_reason, .error = error };

	if (error == -EINTR || (!error && c->run->exit_reason == KVM_EXIT_INTR))
		return false;
	report.outcome = error == -EFAULT ? VCPU_FAULT : error ? VCPU_BROKEN : outcome_of_exit(c->run);
	locate_stop(c, &report);
	report.counts = c->box->counts;
	c->report = report;
	return true;
}

static int run_guest(struct vcpu *c) { return ioctl(c->fd, KVM_RUN, 0) < 0 ? -errno : 0; }

static void *vcpu_main(void *arg)
{
	struct vcpu *c = arg;
	struct vcpus *m = c->machine;

	pthread_mutex_lock(&m->lock);
	for (;;) {
		while (!m->quit && (!c->running || m->pauses))
			pthread_cond_wait(&m->changed, &m->lock);
		if (m->quit)
			break;
		/* Whoever pauses from here on sets it again, so no kick is lost. */
		__atomic_store_n(&c->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
		c->in_guest = true;
		pthread_mutex_unlock(&m->lock);
		int error = run_guest(c);
		pthread_mutex_lock(&m->lock);
		c->in_guest = false;
		if (program_ended(c, error))
			c->running = false;
		pthread_cond_broadcast(&m->changed);
	}
	pthread_mutex_unlock(&m->lock);
	return NULL;
}

/* Under the lock: makes every KVM_RUN return soon. */
static void kick_all(struct vcpus *m)
{
	for (unsigned i = 0; i < m->count; i++) {
		struct vcpu *c = &m->cpus[i];
		if (!c->in_guest)
			continue;
		__atomic_store_n(&c->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
		pthread_kill(c->thread, kick_signal());
	}
}

static bool any_in_guest(const struct vcpus *m)
{
	for (unsigned i = 0; i < m->count; i++)
		if (m->cpus[i].in_guest)
			return true;
	return false;
}

void vcpus_pause(struct vcpus *m)
{
	pthread_mutex_lock(&m->lock);
	m->pauses++;
	kick_all(m);
	while (any_in_guest(m))
		pthread_cond_wait(&m->changed, &m->lock);
	pthread_mutex_unlock(&m->lock);
}

void vcpus_resume(struct vcpus *m)
{
	pthread_mutex_lock(&m->lock);
	m->pauses--;
	pthread_cond_broadcast(&m->changed);
	pthread_mutex_unlock(&m->lock);
}

/* ---- Programs ---- */

static bool job_is_valid(const struct vcpus *m, const struct vcpu_job *job)
{
	return job->first_page <= m->ram_pages && job->pages <= m->ram_pages - job->first_page &&
	       job->full_per_256 <= 256 && job->write_per_256 <= 256 &&
	       job->poke_per_256 <= 256 - job->write_per_256 &&
	       (job->program == VCPU_READ_SUM || job->program == VCPU_VERIFY ||
		job->program == VCPU_WRITE || job->program == VCPU_TOUCH) &&
	       (job->pages || (job->program != VCPU_READ_SUM && !job->touches));
}

static const uint8_t *program_start(enum vcpu_program program)
{
	return program == VCPU_READ_SUM ? guest_read_sum
	       : program == VCPU_VERIFY ? guest_verify
	       : program == VCPU_WRITE  ? guest_write
					: guest_touch;
}

static int set_registers(struct vcpu *c, const struct vcpu_job *job)
{
	uint64_t own_page_offset = c->index * (uint64_t)GUEST_PAGE_BYTES;
	struct kvm_regs regs = {
		.rip = CODE_GPA + own_page_offset +
		       (uint64_t)(program_start(job->program) - guest_code_begin),
		.rsp = STACK_GPA + own_page_offset + GUEST_PAGE_BYTES,
		.rdi = MAILBOX_GPA + own_page_offset,
		.rsi = job->first_page,
		.rcx = job->program == VCPU_TOUCH ? job->touches : job->pages,
		.r10 = job->random_seed * CONTENTS_STEP + c->index,
		.rflags = 0x2,
	};
	return ioctl(c->fd, KVM_SET_REGS, &regs) < 0 ? -errno : 0;
}

static void fill_mailbox(struct vcpu *c, const struct vcpu_job *job)
{
	struct vcpu_mailbox *box = c->box;
	/* A request may be waiting already (vcpus_take): it stays. */
	box->stop = 0;
	box->owner = c->index;
	box->write_below = job->write_per_256;
	box->poke_below = job->write_per_256 + job->poke_per_256;
	box->full_below = job->full_per_256;
	box->range_first = job->first_page;
	box->range_pages = job->pages;
	box->counts = (struct vcpu_counts){ 0 };
}

int vcpu_start(struct vcpus *m, unsigned cpu, const struct vcpu_job *job)
{
	if (cpu >= m->count || !job_is_valid(m, job))
		return -EINVAL;

	struct vcpu *c = &m->cpus[cpu];
	int r = -EBUSY;
	pthread_mutex_lock(&m->lock);
	if (!c->running) {
		fill_mailbox(c, job);
		r = set_registers(c, job);
	}
	if (!r) {
		c->program = job->program;
		c->started = c->running = true;
		pthread_cond_broadcast(&m->changed);
	}
	pthread_mutex_unlock(&m->lock);
	return r;
}

void vcpu_stop(struct vcpus *m, unsigned cpu)
{
	__atomic_store_n(&m->cpus[cpu].box->stop, 1, __ATOMIC_SEQ_CST);
}

int vcpu_wait(struct vcpus *m, unsigned cpu, unsigned timeout_ms, struct vcpu_report *ret)
{
	struct vcpu *c = &m->cpus[cpu];
	struct timespec until;
	int r = 0;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += timeout_ms / 1000;
	until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
	if (until.tv_nsec >= 1000000000) {
		until.tv_sec++;
		until.tv_nsec -= 1000000000;
	}

	pthread_mutex_lock(&m->lock);
	while (c->running && !r)
		r = pthread_cond_timedwait(&m->changed, &m->lock, &until);
	r = !c->started ? -ESRCH : c->running ? -r : 0;
	if (!r)
		*ret = c->report;
	pthread_mutex_unlock(&m->lock);
	return r;
}

int vcpu_continue(struct vcpus *m, unsigned cpu)
{
	struct vcpu *c = &m->cpus[cpu];
	int r = -EINVAL;

	pthread_mutex_lock(&m->lock);
	if (c->started && !c->running && c->report.outcome == VCPU_FAULT) {
		c->running = true;
		pthread_cond_broadcast(&m->changed);
		r = 0;
	}
	pthread_mutex_unlock(&m->lock);
	return r;
}

void vcpu_peek(struct vcpus *m, unsigned cpu, struct vcpu_counts *ret)
{
	const uint64_t *from = (const uint64_t *)&m->cpus[cpu].box->counts;
	uint64_t *to = (uint64_t *)ret;
	for (size_t i = 0; i < sizeof *ret / sizeof *to; i++)
		to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
}

/* ---- Owners and contents ---- */

static const uint64_t GENERATION_MASK = ((uint64_t)1 << STATE_FLAGS_SHIFT) - 1;

static uint64_t load_state(const struct page_entry *e)
{
	return __atomic_load_n(&e->state, __ATOMIC_ACQUIRE);
}

static void store_state(struct page_entry *e, unsigned owner, unsigned flags, uint64_t generation)
{
	uint64_t state = (uint64_t)owner << STATE_OWNER_SHIFT | (uint64_t)flags << STATE_FLAGS_SHIFT |
			 (generation & GENERATION_MASK);
	__atomic_store_n(&e->state, state, __ATOMIC_RELEASE);
}

static unsigned owner_of(uint64_t state) { return (unsigned)(state >> STATE_OWNER_SHIFT); }

static unsigned flags_of(uint64_t state) { return (unsigned)(state >> STATE_FLAGS_SHIFT) & 0xff; }

void vcpus_set_owner(struct vcpus *m, uint64_t first_page, uint64_t pages, unsigned owner)
{
	for (uint64_t p = first_page; p < first_page + pages; p++) {
		uint64_t state = load_state(&m->table[p]);
		store_state(&m->table[p], owner, flags_of(state), state);
	}
}

static void set_host_flag(struct vcpus *m, uint64_t first_page, uint64_t pages)
{
	for (uint64_t p = first_page; p < first_page + pages; p++)
		__atomic_fetch_or(&m->table[p].state, (uint64_t)FLAG_HOST << STATE_FLAGS_SHIFT,
				  __ATOMIC_SEQ_CST);
}

/* Under the lock, for a vCPU that runs nothing: its pages are nobody's to write. */
static int take_from_idle(struct vcpu *c, uint64_t first_page, uint64_t pages)
{
	if (c->started && c->report.outcome == VCPU_FAULT)
		return -EBUSY; /* it may go on in the middle of a write */
	set_host_flag(c->machine, first_page, pages);
	return 0;
}

/* Under the lock. Returns 1 when the vCPU was asked, 0 when the pages are taken already. */
static int ask_for_pages(struct vcpu *c, uint64_t first_page, uint64_t pages)
{
	if (!c->running)
		return take_from_idle(c, first_page, pages);
	if (c->machine->pauses || c->program == VCPU_READ_SUM)
		return -EBUSY;
	c->box->request_first = first_page;
	__atomic_store_n(&c->box->request_pages, pages, __ATOMIC_SEQ_CST);
	return 1;
}

/* Returns whether the request was still unclaimed; if not, its handover will complete. */
static bool withdraw_request(struct vcpu *c)
{
	return __atomic_exchange_n(&c->box->request_pages, 0, __ATOMIC_SEQ_CST) != 0;
}

/* Under the lock, after asking. Returns 1 to wait on. */
static int check_answer(struct vcpu *c, uint64_t first_page, uint64_t pages, uint64_t before, bool late)
{
	if (__atomic_load_n(&c->box->counts.handovers, __ATOMIC_ACQUIRE) != before)
		return 0;
	if (!c->running) /* it ended before it saw the request */
		return withdraw_request(c) ? take_from_idle(c, first_page, pages) : -EIO;
	return late && withdraw_request(c) ? -ETIMEDOUT : 1;
}

static int take_from_vcpu(struct vcpu *c, uint64_t first_page, uint64_t pages, unsigned timeout_ms)
{
	uint64_t deadline_ms = now_ms() + timeout_ms;

	pthread_mutex_lock(&c->machine->lock);
	uint64_t before = c->box->counts.handovers;
	int r = ask_for_pages(c, first_page, pages);
	pthread_mutex_unlock(&c->machine->lock);

	for (unsigned tries = 0; r == 1; tries++) {
		if (tries > 100)
			usleep(20);
		pthread_mutex_lock(&c->machine->lock);
		r = check_answer(c, first_page, pages, before, now_ms() > deadline_ms);
		pthread_mutex_unlock(&c->machine->lock);
	}
	return r;
}

static bool any_taken(struct vcpus *m, uint64_t first_page, uint64_t pages)
{
	for (uint64_t p = first_page; p < first_page + pages; p++)
		if (flags_of(load_state(&m->table[p])) & FLAG_HOST)
			return true;
	return false;
}

static uint64_t run_of_one_owner(struct vcpus *m, uint64_t first_page, uint64_t pages)
{
	unsigned owner = owner_of(load_state(&m->table[first_page]));
	uint64_t n = 1;
	while (n < pages && owner_of(load_state(&m->table[first_page + n])) == owner)
		n++;
	return n;
}

static int take_run(struct vcpus *m, uint64_t first_page, uint64_t pages, unsigned timeout_ms)
{
	unsigned owner = owner_of(load_state(&m->table[first_page]));
	if (owner < m->count)
		return take_from_vcpu(&m->cpus[owner], first_page, pages, timeout_ms);
	set_host_flag(m, first_page, pages);
	return 0;
}

int vcpus_take(struct vcpus *m, uint64_t first_page, uint64_t pages, unsigned timeout_ms)
{
	int r = 0;
	pthread_mutex_lock(&m->take_lock);
	if (any_taken(m, first_page, pages))
		r = -EBUSY;
	for (uint64_t done = 0; done < pages && !r;) {
		uint64_t run = run_of_one_owner(m, first_page + done, pages - done);
		r = take_run(m, first_page + done, run, timeout_ms);
		if (r)
			vcpus_give_unchanged(m, first_page, done);
		done += run;
	}
	pthread_mutex_unlock(&m->take_lock);
	return r;
}

static void give(struct page_entry *e, uint64_t seed, unsigned flags)
{
	e->seed = seed;
	e->stamp = 0;
	store_state(e, owner_of(e->state), flags, e->state + 1);
}

void vcpus_give_patterned(struct vcpus *m, uint64_t first_page, uint64_t pages, const uint64_t *seeds)
{
	for (uint64_t i = 0; i < pages; i++)
		give(&m->table[first_page + i], seeds[i], 0);
}

void vcpus_give_zeroed(struct vcpus *m, uint64_t first_page, uint64_t pages)
{
	for (uint64_t i = 0; i < pages; i++)
		give(&m->table[first_page + i], 0, FLAG_ZERO);
}

void vcpus_give_unchanged(struct vcpus *m, uint64_t first_page, uint64_t pages)
{
	/* A new generation all the same: a check that began before the take must not be believed. */
	for (uint64_t i = 0; i < pages; i++) {
		struct page_entry *e = &m->table[first_page + i];
		store_state(e, owner_of(e->state), flags_of(e->state) & ~(unsigned)FLAG_HOST,
			    e->state + 1);
	}
}

/* What the guest writes at a generation; the host's seeds live beyond all guest generations. */
static uint64_t guest_seed(uint64_t page, uint64_t generation)
{
	return (page + 1) * CONTENTS_BY_PAGE + (generation & GENERATION_MASK) * CONTENTS_BY_GENERATION;
}

uint64_t contents_seed(uint64_t kind, uint64_t index)
{
	return (index + 1) * CONTENTS_BY_PAGE + (kind + GENERATION_MASK + 1) * CONTENTS_BY_GENERATION;
}

void contents_fill(void *page, uint64_t seed)
{
	uint64_t *words = page;
	for (unsigned w = 0; w < GUEST_PAGE_WORDS; w++)
		words[w] = seed + w * CONTENTS_STEP;
}

static bool is_stamped(unsigned word) { return word == 0 || word == GUEST_PAGE_WORDS - 1; }

static uint64_t expected_word(const struct page_entry *e, unsigned word)
{
	uint64_t step = flags_of(e->state) & FLAG_ZERO ? 0 : CONTENTS_STEP;
	return e->seed + word * step + (is_stamped(word) ? e->stamp : 0);
}

/* A write that was interrupted: the word may be the new one of a write or of a poke already. */
static bool is_half_written(const struct page_entry *e, uint64_t page, unsigned word, uint64_t got)
{
	uint64_t generation = (e->state + 1) & GENERATION_MASK;
	uint64_t stamp = generation * CONTENTS_BY_GENERATION;
	if (!(flags_of(e->state) & FLAG_WRITING))
		return false;
	return got == guest_seed(page, generation) + word * CONTENTS_STEP ||
	       (is_stamped(word) && got == expected_word(e, word) - e->stamp + stamp);
}

static bool check_one(struct vcpus *m, uint64_t page, struct vcpu_report *ret)
{
	const struct page_entry *e = &m->table[page];
	volatile uint64_t *words = hva_of(m, page);

	if (!words || (flags_of(load_state(e)) & FLAG_HOST))
		return true;
	for (unsigned w = 0; w < GUEST_PAGE_WORDS; w++) {
		uint64_t got = words[w];
		if (got == expected_word(e, w) || is_half_written(e, page, w, got))
			continue;
		*ret = (struct vcpu_report){
			.outcome = VCPU_WRONG,
			.page = page,
			.word = w,
			.got = got,
			.gpa = RAM_GPA + (page << GUEST_PAGE_SHIFT),
			.hva = hva_of(m, page),
			.expected = expected_word(e, w),
			.state = e->state,
		};
		return false;
	}
	return true;
}

bool vcpus_check(struct vcpus *m, uint64_t first_page, uint64_t pages, struct vcpu_report *ret)
{
	for (uint64_t p = first_page; p < first_page + pages; p++)
		if (!check_one(m, p, ret))
			return false;
	return true;
}

const struct page_entry *vcpus_entry(struct vcpus *m, uint64_t page) { return &m->table[page]; }

void vcpu_report_print(FILE *out, unsigned cpu, const struct vcpu_report *r)
{
	static const char *const names[] = { "done", "stopped", "WRONG", "FAULT", "BROKEN" };
	fprintf(out,
		"vcpu %u: %s, %" PRIu64 " touches, %" PRIu64 " words checked, %" PRIu64
		" writes, %" PRIu64 " pokes, %" PRIu64 " skipped, %" PRIu64 " raced, %" PRIu64
		" handovers",
		cpu, names[r->outcome], r->counts.touches, r->counts.words, r->counts.writes,
		r->counts.pokes, r->counts.skipped, r->counts.raced, r->counts.handovers);
	if (r->outcome == VCPU_WRONG)
		fprintf(out,
			"; page %" PRIu64 " word %u: got %#" PRIx64 ", expected %#" PRIx64
			", state %#" PRIx64,
			r->page, r->word, r->got, r->expected, r->state);
	if (r->outcome == VCPU_FAULT || r->outcome == VCPU_BROKEN)
		fprintf(out,
			"; page %" PRIu64 " gpa %#" PRIx64 " hva %p: KVM_RUN %d (%s), exit %u"
			", code offset %#" PRIx64,
			r->page, r->gpa, r->hva, r->error, strerror(-r->error), r->exit_reason,
			r->code_offset);
	fputc('\n', out);
}

/* ---- Making a machine ---- */

enum { PAGE_PRESENT = 1, PAGE_WRITE = 2, PAGE_USER = 4, PAGE_USED = 0x60, PAGE_2M = 0x80 };
static const uint64_t LEAF_BYTES = 2u << 20, GIB = 1u << 30;

static uint64_t *low_table(struct vcpus *m, uint64_t gpa) { return (uint64_t *)(void *)(m->low + gpa); }

static void map_leaf(uint64_t *directory, uint64_t gpa)
{
	directory[gpa % GIB / LEAF_BYTES] =
		gpa | PAGE_2M | PAGE_USED | PAGE_USER | PAGE_WRITE | PAGE_PRESENT;
}

static void link_table(uint64_t *table, unsigned index, uint64_t gpa)
{
	table[index] = gpa | PAGE_USER | PAGE_WRITE | PAGE_PRESENT;
}

static void build_page_tables(struct vcpus *m)
{
	uint64_t table_bytes = m->ram_pages * sizeof *m->table;
	uint64_t ram_bytes = m->ram_pages << GUEST_PAGE_SHIFT;

	link_table(low_table(m, PML4_GPA), 0, PDPT_GPA);
	link_table(low_table(m, PDPT_GPA), 0, PD_LOW_GPA);
	link_table(low_table(m, PDPT_GPA), TABLE_GPA / GIB, PD_TABLE_GPA);
	map_leaf(low_table(m, PD_LOW_GPA), LOW_GPA);
	map_leaf(low_table(m, PD_LOW_GPA), MMIO_GPA);
	for (uint64_t at = 0; at < table_bytes; at += LEAF_BYTES)
		map_leaf(low_table(m, PD_TABLE_GPA), TABLE_GPA + at);
	for (uint64_t at = 0; at < ram_bytes; at += LEAF_BYTES) {
		uint64_t gib = at / GIB, directory = PD_RAM_GPA + gib * GUEST_PAGE_BYTES;
		link_table(low_table(m, PDPT_GPA), (unsigned)(RAM_GPA / GIB + gib), directory);
		map_leaf(low_table(m, directory), RAM_GPA + at);
	}
}

/* Flat segments of ring 3, and the TSS that a CPU in long mode must have. */
static void build_gdt(struct vcpus *m)
{
	uint64_t *gdt = low_table(m, GDT_GPA);
	gdt[3] = 0x00cff3000000ffff;
	gdt[4] = 0x00affb000000ffff;
	gdt[5] = 0x67 | ((uint64_t)TSS_GPA << 16) | ((uint64_t)0x8b << 40);
}

static int enter_user_mode(struct vcpu *c)
{
	const struct kvm_segment code = { .limit = ~0u,
					  .selector = 4 * 8 + 3,
					  .type = 11,
					  .present = 1,
					  .dpl = 3,
					  .s = 1,
					  .l = 1,
					  .g = 1 };
	const struct kvm_segment data = { .limit = ~0u,
					  .selector = 3 * 8 + 3,
					  .type = 3,
					  .present = 1,
					  .dpl = 3,
					  .db = 1,
					  .s = 1,
					  .g = 1 };
	struct kvm_sregs s;

	if (ioctl(c->fd, KVM_GET_SREGS, &s) < 0)
		return -errno;
	s.cs = code;
	s.ds = s.es = s.fs = s.gs = s.ss = data;
	s.tr = (struct kvm_segment){
		.base = TSS_GPA, .limit = 0x67, .selector = 5 * 8, .type = 11, .present = 1
	};
	s.gdt.base = GDT_GPA;
	s.gdt.limit = 6 * 8 - 1;
	s.idt.limit = 0; /* an exception ends in a triple fault, which KVM reports */
	s.cr0 = 0x80050033;
	s.cr3 = PML4_GPA;
	s.cr4 = 0x6a0;
	s.efer = 0xd01;
	return ioctl(c->fd, KVM_SET_SREGS, &s) < 0 ? -errno : 0;
}

static int set_cpuid(struct vcpus *m, struct vcpu *c)
{
	enum { ENTRIES = 256 };
	struct kvm_cpuid2 *cpuid = calloc(1, sizeof *cpuid + ENTRIES * sizeof cpuid->entries[0]);
	int r = 0;

	if (!cpuid)
		return -ENOMEM;
	cpuid->nent = ENTRIES;
	if (ioctl(m->kvm_fd, KVM_GET_SUPPORTED_CPUID, cpuid) < 0 ||
	    ioctl(c->fd, KVM_SET_CPUID2, cpuid) < 0)
		r = -errno;
	free(cpuid);
	return r;
}

static int map_run(struct vcpus *m, struct vcpu *c)
{
	int bytes = ioctl(m->kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);
	if (bytes < 0)
		return -errno;
	void *run = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_SHARED, c->fd, 0);
	if (run == MAP_FAILED)
		return -errno;
	c->run = run;
	c->run_bytes = (size_t)bytes;
	return 0;
}

/* Signals of the program are for its own threads: only the kick and os_freeze's are let through here. */
static int start_thread(struct vcpu *c)
{
	sigset_t all_but_these, old;
	sigfillset(&all_but_these);
	sigdelset(&all_but_these, kick_signal());
	sigdelset(&all_but_these, VCPU_FREEZE_SIGNAL);
	pthread_sigmask(SIG_SETMASK, &all_but_these, &old);
	int r = -pthread_create(&c->thread, NULL, vcpu_main, c);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	c->has_thread = !r;
	return r;
}

static int make_vcpu(struct vcpus *m, unsigned index)
{
	struct vcpu *c = &m->cpus[index];
	uint64_t own_page_offset = index * (uint64_t)GUEST_PAGE_BYTES;
	int r;

	c->machine = m;
	c->index = index;
	c->box = (struct vcpu_mailbox *)(void *)(m->low + MAILBOX_GPA + own_page_offset);
	memcpy(m->low + CODE_GPA + own_page_offset, guest_code_begin,
	       (size_t)(guest_code_end - guest_code_begin));
	c->fd = ioctl(m->vm_fd, KVM_CREATE_VCPU, index);
	if (c->fd < 0)
		return -errno;
	if ((r = set_cpuid(m, c)) < 0 || (r = map_run(m, c)) < 0 || (r = enter_user_mode(c)) < 0)
		return r;
	return start_thread(c);
}

static int add_slot(struct vcpus *m, unsigned slot, uint64_t gpa, void *hva, uint64_t bytes)
{
	struct kvm_userspace_memory_region region = { .slot = slot,
						      .guest_phys_addr = gpa,
						      .memory_size = bytes,
						      .userspace_addr = (uintptr_t)hva };
	return ioctl(m->vm_fd, KVM_SET_USER_MEMORY_REGION, &region) < 0 ? -errno : 0;
}

static uint64_t table_bytes(const struct vcpus *m)
{
	uint64_t bytes = m->ram_pages * sizeof *m->table;
	return (bytes + GUEST_PAGE_BYTES - 1) / GUEST_PAGE_BYTES * GUEST_PAGE_BYTES;
}

static void *map_shared(uint64_t bytes)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	return at == MAP_FAILED ? NULL : at;
}

static int make_memory(struct vcpus *m)
{
	int r;
	m->low = map_shared(LOW_BYTES);
	m->table = map_shared(table_bytes(m));
	if (!m->low || !m->table)
		return -ENOMEM;
	for (uint64_t p = 0; p < m->ram_pages; p++)
		store_state(&m->table[p], OWNER_NOBODY, FLAG_ZERO, 0);
	build_page_tables(m);
	build_gdt(m);
	if ((r = add_slot(m, 0, LOW_GPA, m->low, LOW_BYTES)) < 0)
		return r;
	return add_slot(m, 1, TABLE_GPA, m->table, table_bytes(m));
}

static int open_kvm(struct vcpus *m)
{
	m->kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (m->kvm_fd < 0)
		return -errno;
	if (ioctl(m->kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_IMMEDIATE_EXIT) <= 0)
		return -ENOTSUP;
	m->vm_fd = ioctl(m->kvm_fd, KVM_CREATE_VM, 0);
	if (m->vm_fd < 0)
		return -errno;
	/* Intel needs three pages of guest-physical space of its own: any that we do not use. */
	ioctl(m->vm_fd, KVM_SET_TSS_ADDR, 0xfffbd000);
	return 0;
}

/* A program that ends at once: tells whether this KVM runs user mode at all. */
static int try_vcpu(struct vcpus *m)
{
	const struct vcpu_job nothing = { .program = VCPU_TOUCH };
	struct vcpu_report report;
	int r = vcpu_start(m, 0, &nothing);
	if (!r)
		r = vcpu_wait(m, 0, 5000, &report);
	return r || report.outcome != VCPU_DONE ? -ENOTSUP : 0;
}

static void init_locks(struct vcpus *m)
{
	pthread_condattr_t attr;
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&m->changed, &attr);
	pthread_condattr_destroy(&attr);
	pthread_mutex_init(&m->lock, NULL);
	pthread_mutex_init(&m->take_lock, NULL);
}

static int install_kick(void)
{
	struct sigaction action = { .sa_handler = ignore_kick };
	sigemptyset(&action.sa_mask);
	return sigaction(kick_signal(), &action, NULL) < 0 ? -errno : 0;
}

int vcpus_create(unsigned vcpus, uint64_t ram_pages, struct vcpus **ret)
{
	if (!vcpus || vcpus > VCPUS_MAX || !ram_pages ||
	    ram_pages > RAM_GIB_MAX * (GIB >> GUEST_PAGE_SHIFT))
		return -EINVAL;
	struct vcpus *m = calloc(1, sizeof *m);
	if (!m)
		return -ENOMEM;
	m->kvm_fd = m->vm_fd = -1;
	m->ram_pages = ram_pages;
	for (unsigned i = 0; i < VCPUS_MAX; i++)
		m->cpus[i].fd = -1;
	init_locks(m);

	int r = install_kick();
	if (!r)
		r = open_kvm(m);
	if (!r)
		r = make_memory(m);
	while (!r && m->count < vcpus)
		r = make_vcpu(m, m->count++);
	if (!r)
		r = try_vcpu(m);
	if (r) {
		vcpus_destroy(m);
		return r;
	}
	*ret = m;
	return 0;
}

int vcpus_attach(struct vcpus *m, uint64_t first_page, void *hva, uint64_t pages)
{
	if (m->slot_count == SLOTS_MAX)
		return -ENOSPC;
	if (first_page > m->ram_pages || pages > m->ram_pages - first_page)
		return -EINVAL;
	int r = add_slot(m, FIRST_RAM_SLOT + m->slot_count, RAM_GPA + (first_page << GUEST_PAGE_SHIFT),
			 hva, pages << GUEST_PAGE_SHIFT);
	if (!r)
		m->slots[m->slot_count++] = (struct slot){ first_page, pages, hva };
	return r;
}

static void destroy_vcpu(struct vcpu *c)
{
	if (c->has_thread)
		pthread_join(c->thread, NULL);
	if (c->run)
		munmap(c->run, c->run_bytes);
	if (c->fd >= 0)
		close(c->fd);
}

void vcpus_destroy(struct vcpus *m)
{
	if (!m)
		return;
	pthread_mutex_lock(&m->lock);
	m->quit = true;
	kick_all(m);
	pthread_cond_broadcast(&m->changed);
	pthread_mutex_unlock(&m->lock);
	for (unsigned i = 0; i < m->count; i++)
		destroy_vcpu(&m->cpus[i]);
	if (m->vm_fd >= 0)
		close(m->vm_fd);
	if (m->kvm_fd >= 0)
		close(m->kvm_fd);
	if (m->table)
		munmap(m->table, table_bytes(m));
	if (m->low)
		munmap(m->low, LOW_BYTES);
	pthread_cond_destroy(&m->changed);
	pthread_mutex_destroy(&m->take_lock);
	pthread_mutex_destroy(&m->lock);
	free(m);
}
