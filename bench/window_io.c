/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * window_io WAY PAGES {contiguous|scattered} OPERATIONS [--all-bytes] [--uring]: what it costs a process
 * beside a VMM to get at PAGES pages of guest memory (32 MiB of a memfd), look at them, and let go of
 * them again. WAY:
 *
 *   lane        a window of a lane: one thread on one CPU, an address space of its own, local flushes
 *   lane-map    the same, with every segment mapped; without it short ones are copied
 *   shared      the same windows, all mapped, with global flushes, in a process whose other thread is
 *               busy on another CPU; operations during which it did not run there (the machine has
 *               other work) do not count
 *   process-vm  process_vm_readv from the VMM
 *   permanent   guest memory is mapped for good; the control run of what is counted
 *
 * A look is one word of each page, or all of them; it is compared with what was written there.
 * "--uring": the process has reads of an io_uring under way in workers, which are bound to its CPU.
 *
 * Prints a JSON object: the median of the operations in ns; flushes of other CPUs that this process has
 * sent for (the kernel's tracepoint tlb:tlb_flush, with its own threads and io_uring's workers; null
 * without the right to see it) and the host's TLB shootdowns meanwhile (/proc/interrupts: everybody's),
 * for each operation; whether all threads, io_uring's workers among them, are bound to one CPU;
 * mismatches.
 *
 * Exit status: 0, 1 contents wrong or a call failed, 2 usage, 77 fewer than two CPUs.
 */
#include "latent/latent.h"
#include "os/os.h"
#include "window/window.h"

#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/perf_event.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define GUEST_PAGES 8192u
#define MAX_PAGES 256u
#define WORDS (OS_PAGE_BYTES / sizeof(uint64_t))
#define SLOTS 8u
#define SCATTER 37u /* pages between two of a scattered request: no two are neighbours */
#define RUN_MAX_NS UINT64_C(20000000000)
#define READS 4u /* of io_uring under way, each so long that its worker is busy during an operation */
#define READ_BYTES (1u << 20)
#define TLB_FLUSH_ID "/sys/kernel/tracing/events/tlb/tlb_flush/id"
#define REMOTE_SEND "reason == 4" /* TLB_REMOTE_SEND_IPI of include/linux/mm_types.h */

enum way { LANE, LANE_MAP, SHARED, PROCESS_VM, PERMANENT, WAYS };
static const char *const way_names[WAYS] = { "lane", "lane-map", "shared", "process-vm", "permanent" };

struct bench {
	enum way way;
	uint32_t pages, operations;
	bool scattered, all_bytes, uring;
	int cpu, other_cpu;
	int memfd;
	const uint64_t *guest; /* the VMM's mapping: its address there; of `permanent`, one of our own */
	pid_t vmm;
	struct window *window;
	uint8_t *buffer; /* where process_vm_readv copies to */
	struct io_uring ring;
	uint64_t mismatches, uring_reads;
	_Atomic uint64_t beats; /* of the busy thread */
};

static _Noreturn void fail(const char *what, int error)
{
	fprintf(stderr, "window_io: %s: %s\n", what, strerror(error));
	exit(1);
}

static void require(bool holds, const char *what)
{
	if (!holds)
		fail(what, errno);
}

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

/* ---- guest memory ----------------------------------------------------------------------------- */

static uint64_t word_of(uint64_t page, size_t i) { return page * 1000003 + i; }

static void make_guest(struct bench *b)
{
	uint64_t *words;

	b->memfd = os_memfd_create("guest", os_bytes(GUEST_PAGES), false);
	require(b->memfd >= 0, "memfd_create");
	words = os_view_file(b->memfd, os_bytes(GUEST_PAGES), true);
	require(words, "mmap");
	for (uint64_t page = 0; page < GUEST_PAGES; page++)
		for (size_t i = 0; i < WORDS; i++)
			words[page * WORDS + i] = word_of(page, i);
	b->guest = words;
}

/* The pages of an operation: each takes others. */
static uint64_t page_of(const struct bench *b, uint64_t operation, uint32_t i)
{
	uint64_t first = operation * MAX_PAGES % (GUEST_PAGES - MAX_PAGES);

	return b->scattered ? (operation * 5 + i * SCATTER) % GUEST_PAGES : first + i;
}

static void look(struct bench *b, const void *at, uint64_t page)
{
	const uint64_t *words = at;
	uint64_t sum = 0, expected = WORDS * page * 1000003 + WORDS * (WORDS - 1) / 2;

	if (!b->all_bytes) {
		b->mismatches += *(const volatile uint64_t *)words != word_of(page, 0);
		return;
	}
	for (size_t i = 0; i < WORDS; i++)
		sum += words[i];
	b->mismatches += sum != expected;
}

/* ---- the ways --------------------------------------------------------------------------------- */

static void by_window(struct bench *b, uint64_t operation)
{
	static struct latent_segment segments[MAX_PAGES];
	static struct iovec iov[MAX_PAGES];
	struct latent_request r = { .size = sizeof r, .segments = segments, .iov = iov };
	int error;

	r.count = b->scattered ? b->pages : 1;
	for (uint32_t i = 0; i < r.count; i++)
		segments[i] = (struct latent_segment){ b->memfd, os_bytes(page_of(b, operation, i)),
						       os_bytes(b->scattered ? 1 : b->pages) };
	error = window_map(b->window, &r, b->way == SHARED ? LATENT_GLOBAL_FLUSH : LATENT_LOCAL_FLUSH);
	if (error || window_use(b->window, &r))
		fail("latent_window_map", -error);
	for (uint32_t i = 0; i < b->pages; i++)
		look(b, b->scattered ? iov[i].iov_base : (uint8_t *)iov[0].iov_base + os_bytes(i),
		     page_of(b, operation, i));
	window_done(b->window, &r, true);
}

static void by_process_vm(struct bench *b, uint64_t operation)
{
	struct iovec to = { b->buffer, os_bytes(b->pages) }, from[MAX_PAGES];
	uint32_t count = b->scattered ? b->pages : 1;

	for (uint32_t i = 0; i < count; i++)
		from[i] = (struct iovec){ (uint8_t *)b->guest + os_bytes(page_of(b, operation, i)),
					  os_bytes(b->scattered ? 1 : b->pages) };
	require(process_vm_readv(b->vmm, &to, 1, from, count, 0) == (ssize_t)to.iov_len,
		"process_vm_readv");
	for (uint32_t i = 0; i < b->pages; i++)
		look(b, b->buffer + os_bytes(i), page_of(b, operation, i));
}

static void by_permanent(struct bench *b, uint64_t operation)
{
	for (uint32_t i = 0; i < b->pages; i++)
		look(b, b->guest + page_of(b, operation, i) * WORDS, page_of(b, operation, i));
}

static void *be_busy(void *ctx)
{
	struct bench *b = ctx;

	require(!os_bind_to_cpu(b->other_cpu), "sched_setaffinity");
	for (;;)
		atomic_store_explicit(&b->beats, b->beats + 1, memory_order_relaxed);
	return NULL;
}

static void prepare(struct bench *b)
{
	pthread_t thread;
	int error = 0;

	if (b->way == SHARED)
		require(!pthread_create(&thread, NULL, be_busy, b), "pthread_create");
	if (b->way <= SHARED)
		error = window_register(b->way == SHARED ? -1 : b->cpu, SLOTS, &b->window);
	if (error)
		fail("latent_window_register", -error);
	if (b->way == LANE_MAP || b->way == SHARED)
		window_set_threshold(b->window, 1);
	b->buffer = os_view_file(os_memfd_create("buffer", os_bytes(MAX_PAGES), false),
				 os_bytes(MAX_PAGES), true);
	require(b->buffer, "mmap");
	memset(b->buffer, 1, os_bytes(MAX_PAGES));
	if (b->way == PERMANENT) {
		b->guest = os_view_file(b->memfd, os_bytes(GUEST_PAGES), false);
		require(b->guest, "mmap");
		os_populate_read((void *)b->guest, os_bytes(GUEST_PAGES));
	}
}

/* ---- io_uring in the background ---------------------------------------------------------------- */

static void submit_read(struct bench *b, uint8_t *to)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&b->ring);

	io_uring_prep_read(sqe, b->memfd, to, READ_BYTES, 0);
	io_uring_sqe_set_flags(sqe, IOSQE_ASYNC); /* by a worker, always */
	io_uring_sqe_set_data(sqe, to);
}

static void start_uring(struct bench *b)
{
	uint8_t *buffers = aligned_alloc(OS_PAGE_BYTES, READS * READ_BYTES);
	cpu_set_t mine;
	int r = io_uring_queue_init(READS, &b->ring, 0);

	if (r || !buffers)
		fail("io_uring", -r);
	CPU_ZERO(&mine);
	CPU_SET(b->cpu, &mine);
	r = io_uring_register_iowq_aff(&b->ring, sizeof mine, &mine);
	if (r)
		fail("IORING_REGISTER_IOWQ_AFF", -r);
	for (uint32_t i = 0; i < READS; i++)
		submit_read(b, buffers + i * READ_BYTES);
	io_uring_submit(&b->ring);
}

/* Waits for one, so that workers on the same CPU have their turn; what has ended begins again. */
static void go_on_with_uring(struct bench *b)
{
	struct io_uring_cqe *cqe;
	int r = io_uring_wait_cqe(&b->ring, &cqe);

	for (; !r; r = io_uring_peek_cqe(&b->ring, &cqe)) {
		uint8_t *to = io_uring_cqe_get_data(cqe);

		b->mismatches += cqe->res != (int)READ_BYTES || *(uint64_t *)to != word_of(0, 0);
		b->uring_reads++;
		io_uring_cqe_seen(&b->ring, cqe);
		submit_read(b, to);
	}
	io_uring_submit(&b->ring);
}

/* ---- counting --------------------------------------------------------------------------------- */

/* Counts in this process and the threads that it will have; -1: not allowed, or no such tracepoint. */
static int open_flush_counter(void)
{
	struct perf_event_attr attr = { .type = PERF_TYPE_TRACEPOINT,
					.size = sizeof attr,
					.inherit = 1 };
	FILE *f = fopen(TLB_FLUSH_ID, "re");
	unsigned long long id = 0;
	int fd;

	if (!f || fscanf(f, "%llu", &id) != 1)
		id = 0;
	if (f)
		fclose(f);
	attr.config = id;
	fd = id ? (int)syscall(SYS_perf_event_open, &attr, 0, -1, -1, PERF_FLAG_FD_CLOEXEC) : -1;
	if (fd >= 0 && ioctl(fd, PERF_EVENT_IOC_SET_FILTER, REMOTE_SEND)) {
		close(fd);
		fd = -1;
	}
	return fd;
}

static uint64_t read_counter(int fd)
{
	uint64_t count = 0;

	require(fd < 0 || read(fd, &count, sizeof count) == sizeof count, "perf event");
	return count;
}

/* Of all CPUs, everybody's. */
static uint64_t host_shootdowns(void)
{
	FILE *f = fopen("/proc/interrupts", "re");
	char line[8192];
	uint64_t sum = 0;

	while (f && fgets(line, sizeof line, f)) {
		char *at = strstr(line, "TLB:"), *end;

		if (!at)
			continue;
		for (at += 4;; at = end) {
			unsigned long long n = strtoull(at, &end, 10);

			if (end == at)
				break;
			sum += n;
		}
	}
	if (f)
		fclose(f);
	return sum;
}

/* ---- the run ---------------------------------------------------------------------------------- */

static int by_size(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

static void operate(struct bench *b, uint64_t operation)
{
	if (b->way == PROCESS_VM)
		by_process_vm(b, operation);
	else if (b->way == PERMANENT)
		by_permanent(b, operation);
	else
		by_window(b, operation);
}

/* The time of one operation; 0: it does not count. */
static uint64_t time_one(struct bench *b, uint64_t operation)
{
	uint64_t beats = b->beats, t = now_ns();

	operate(b, operation);
	t = now_ns() - t;
	return b->way == SHARED && b->beats == beats ? 0 : t;
}

/* How many were done for the `operations` that count. */
static uint64_t run(struct bench *b, uint64_t *times_ns)
{
	uint64_t done = 0, end_ns = now_ns() + RUN_MAX_NS;

	for (uint32_t i = 0; i < b->operations; done++) {
		times_ns[i] = time_one(b, done);
		i += times_ns[i] != 0;
		if (b->uring)
			go_on_with_uring(b);
		if (now_ns() > end_ns) {
			fprintf(stderr, "window_io: the other thread has not run enough\n");
			exit(1);
		}
	}
	return done;
}

static int measure(struct bench *b)
{
	uint64_t *times_ns = calloc(b->operations, sizeof *times_ns), flushes, shootdowns, done;
	struct latent_window_stats stats = { 0 };
	int counter = open_flush_counter();

	require(times_ns, "calloc");
	prepare(b);
	if (b->uring)
		start_uring(b);
	for (uint32_t i = 0; i < b->operations / 10 + 10; i++)
		operate(b, i);
	flushes = read_counter(counter);
	shootdowns = host_shootdowns();
	done = run(b, times_ns);
	shootdowns = host_shootdowns() - shootdowns;
	flushes = read_counter(counter) - flushes;
	qsort(times_ns, b->operations, sizeof *times_ns, by_size);
	if (b->window)
		window_stats(b->window, &stats);
	printf("{\"way\": \"%s\", \"pages\": %u, \"median_ns\": %ju, \"flushes\": ", way_names[b->way],
	       b->pages, (uintmax_t)times_ns[b->operations / 2]);
	if (counter < 0)
		printf("null");
	else
		printf("%.4f", (double)flushes / (double)done);
	printf(", \"host_shootdowns\": %.4f, \"bound\": %s, \"uring_reads\": %ju, \"off_cpu\": %ju, "
	       "\"min_window_bytes\": %u, "
	       "\"mismatches\": %ju}\n",
	       (double)shootdowns / (double)done, os_all_bound_to_cpu(b->cpu) ? "false" : "true",
	       (uintmax_t)b->uring_reads, (uintmax_t)stats.off_cpu, stats.min_window_bytes,
	       (uintmax_t)b->mismatches);
	fflush(stdout);
	return b->mismatches ? 1 : 0;
}

static bool parse(int argc, char **argv, struct bench *b)
{
	if (argc < 5)
		return false;
	while (b->way < WAYS && strcmp(argv[1], way_names[b->way]))
		b->way++;
	b->pages = (uint32_t)strtoul(argv[2], NULL, 10);
	b->scattered = !strcmp(argv[3], "scattered");
	b->operations = (uint32_t)strtoul(argv[4], NULL, 10);
	for (int i = 5; i < argc; i++) {
		if (!strcmp(argv[i], "--all-bytes"))
			b->all_bytes = true;
		else if (!strcmp(argv[i], "--uring"))
			b->uring = true;
		else
			return false;
	}
	return b->way < WAYS && b->pages && b->pages <= MAX_PAGES && b->operations &&
	       b->operations <= 1000000;
}

static bool choose_cpus(struct bench *b, cpu_set_t *ret_allowed)
{
	int found[2], n = 0;

	if (sched_getaffinity(0, sizeof *ret_allowed, ret_allowed))
		return false;
	for (int cpu = 0; cpu < CPU_SETSIZE && n < 2; cpu++)
		if (CPU_ISSET(cpu, ret_allowed))
			found[n++] = cpu;
	if (n < 2)
		return false;
	b->cpu = found[0];
	b->other_cpu = found[1];
	return true;
}

int main(int argc, char **argv)
{
	struct bench b = { 0 };
	cpu_set_t allowed;
	int status = 0;
	pid_t child;

	if (!parse(argc, argv, &b)) {
		fprintf(stderr, "usage: window_io {lane|lane-map|shared|process-vm|permanent} PAGES "
				"{contiguous|scattered} OPERATIONS [--all-bytes] [--uring]\n");
		return 2;
	}
	if (!choose_cpus(&b, &allowed))
		return 77;
	make_guest(&b);
	b.vmm = getpid();
	prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY); /* where Yama forbids a child to read its parent */
	require(!os_bind_to_cpu(b.cpu), "sched_setaffinity"); /* so is the child, before it exists */
	child = fork();
	if (!child) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		exit(measure(&b));
	}
	require(child > 0, "fork");
	sched_setaffinity(0, sizeof allowed, &allowed);
	require(waitpid(child, &status, 0) == child, "waitpid");
	return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}
