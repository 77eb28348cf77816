/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* Windows: what a lane sees is what guest memory holds, whatever its slots held before. */
#include "os/os.h"
#include "window/window.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE ((size_t)LATENT_PAGE_BYTES)
#define RAM_PAGES 2048u
#define SLOTS 8u
#define SEGMENTS 24u
#define PRIME 251 /* no divisor of a page: neighbours differ */

/*
 * Lanes are children: what they do with CPUs must not stay. A child in which something does not hold
 * says so, and leaves with 1.
 */
#define CHECK(condition)                                                                                \
	do {                                                                                            \
		if (!(condition)) {                                                                     \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                 \
			_exit(1);                                                                       \
		}                                                                                       \
	} while (0)

static int ram_fd;
static uint8_t *ram; /* how the VMM sees guest memory */
static int cpus[2], n_cpus;

static uint8_t byte_at(size_t at) { return (uint8_t)(at % PRIME + at / PAGE); }

static void fill_ram(void)
{
	for (size_t i = 0; i < RAM_PAGES * PAGE; i++)
		ram[i] = byte_at(i);
}

static int set_up(void **state)
{
	cpu_set_t allowed;

	(void)state;
	sched_getaffinity(0, sizeof allowed, &allowed);
	for (int cpu = 0; cpu < CPU_SETSIZE && n_cpus < 2; cpu++)
		if (CPU_ISSET(cpu, &allowed))
			cpus[n_cpus++] = cpu;
	ram_fd = os_memfd_create("guest", RAM_PAGES * PAGE, false);
	ram = mmap(NULL, RAM_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, ram_fd, 0);
	return ram_fd < 0 || ram == MAP_FAILED;
}

static pid_t start_lane(void (*body)(void))
{
	pid_t pid = fork();

	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		body();
		_exit(0);
	}
	return pid;
}

static int status_of(pid_t pid)
{
	int status = -1;

	assert_int_equal(waitpid(pid, &status, 0), pid);
	return status;
}

static void run_lane(void (*body)(void))
{
	fill_ram();
	assert_int_equal(status_of(start_lane(body)), 0);
}

static struct window *lane_on(int cpu)
{
	struct window *w = NULL;

	CHECK(!window_register(cpu, SLOTS, &w));
	return w;
}

struct io {
	struct latent_request request;
	struct latent_segment segments[SEGMENTS];
	struct iovec iov[SEGMENTS];
};

static void new_io(struct io *io, bool writes_guest)
{
	*io = (struct io){ .request = { .size = sizeof io->request, .writes_guest = writes_guest } };
	io->request.segments = io->segments;
	io->request.iov = io->iov;
}

static void add_segment(struct io *io, size_t offset, size_t bytes)
{
	io->segments[io->request.count++] = (struct latent_segment){ ram_fd, offset, bytes };
}

static void one_segment(struct io *io, bool writes_guest, size_t offset, size_t bytes)
{
	new_io(io, writes_guest);
	add_segment(io, offset, bytes);
}

/* What the lane sees is what guest memory holds at this moment. */
static void check_contents(const struct io *io)
{
	for (uint32_t i = 0; i < io->request.count; i++) {
		CHECK(io->iov[i].iov_len == io->segments[i].bytes);
		CHECK(!memcmp(io->iov[i].iov_base, ram + io->segments[i].offset, io->iov[i].iov_len));
	}
}

static struct latent_window_stats stats_of(const struct window *w)
{
	struct latent_window_stats stats;

	window_stats(w, &stats);
	return stats;
}

/* ---- contents --------------------------------------------------------------------------------- */

static const size_t places[] = { 0, 1, 4095, 4096, 5000 };
static const size_t lengths[] = { 1, 512, 4095, 4096, 4097, 65536, 300000 };
static const uint32_t thresholds[] = { 1, 5000, 1u << 30 }; /* all mapped, some, none */

static void read_every_way(void)
{
	struct window *w = lane_on(cpus[0]);
	struct io io;

	for (size_t t = 0; t < 3; t++) {
		window_set_threshold(w, thresholds[t]);
		for (size_t i = 0; i < 5; i++) {
			for (size_t j = 0; j < 7; j++) {
				one_segment(&io, false, 7 * PAGE + places[i], lengths[j]);
				CHECK(!window_map(w, &io.request, LATENT_LOCAL_FLUSH));
				CHECK(!window_use(w, &io.request));
				check_contents(&io);
				CHECK(!window_done(w, &io.request, true));
			}
		}
	}
	CHECK(stats_of(w).window_bytes && stats_of(w).bounce_bytes && !stats_of(w).off_cpu);
	window_unregister(w);
}

static void guest_memory_is_read(void **state)
{
	(void)state;
	run_lane(read_every_way);
}

static void write_one(struct window *w, size_t offset, size_t bytes, bool succeeded)
{
	uint8_t *before = malloc(bytes + 2);
	struct io io;

	CHECK(before);
	memcpy(before, ram + offset - 1, bytes + 2);
	one_segment(&io, true, offset, bytes);
	CHECK(!window_map(w, &io.request, LATENT_LOCAL_FLUSH));
	memset(io.iov[0].iov_base, 0xa5, bytes);
	CHECK(!window_done(w, &io.request, succeeded));
	CHECK(ram[offset - 1] == before[0] && ram[offset + bytes] == before[bytes + 1]);
	for (size_t i = 0; i < bytes; i++)
		CHECK(ram[offset + i] == 0xa5 || (!succeeded && ram[offset + i] == before[i + 1]));
	free(before);
	fill_ram();
}

static void write_every_way(void)
{
	struct window *w = lane_on(cpus[0]);

	for (size_t t = 0; t < 3; t++) {
		window_set_threshold(w, thresholds[t]);
		for (size_t i = 0; i < 5; i++)
			for (size_t j = 0; j < 7; j++)
				write_one(w, 3 * PAGE + places[i], lengths[j], true);
		write_one(w, 3 * PAGE, 5 * PAGE, false);
	}
	window_unregister(w);
}

static void guest_memory_is_written_where_it_should(void **state)
{
	(void)state;
	run_lane(write_every_way);
}

static void bounce_of_a_failed_read(void)
{
	struct window *w = lane_on(cpus[0]);
	struct io io;

	window_set_threshold(w, 1u << 30);
	one_segment(&io, true, 5, 1000);
	CHECK(!window_map(w, &io.request, LATENT_LOCAL_FLUSH));
	memset(io.iov[0].iov_base, 1, 1000);
	CHECK(!window_done(w, &io.request, false));
	for (size_t i = 0; i < PAGE; i++)
		CHECK(ram[i] == byte_at(i));
}

static void a_failed_read_is_not_copied_to_the_guest(void **state)
{
	(void)state;
	run_lane(bounce_of_a_failed_read);
}

static void read_only(void)
{
	struct window *w = lane_on(cpus[0]);
	int zero = open("/dev/zero", O_RDONLY | O_CLOEXEC);
	struct io io;

	one_segment(&io, false, 0, 64 * PAGE);
	CHECK(!window_map(w, &io.request, LATENT_LOCAL_FLUSH));
	CHECK(stats_of(w).mapped_pages == 64);
	CHECK(read(zero, io.iov[0].iov_base, 1) == -1 && errno == EFAULT);
	CHECK(ram[0] == byte_at(0));
	window_done(w, &io.request, true);
	one_segment(&io, true, 0, 64 * PAGE); /* into the same slot */
	CHECK(!window_map(w, &io.request, LATENT_LOCAL_FLUSH));
	CHECK(read(zero, io.iov[0].iov_base, 1) == 1 && ram[0] == 0);
}

static void what_the_guest_sends_is_not_writable(void **state)
{
	(void)state;
	run_lane(read_only);
}

/* ---- slots ------------------------------------------------------------------------------------ */

static uint64_t page_table_kib(void)
{
	FILE *f = fopen("/proc/self/status", "re");
	unsigned long kib = 0;
	char line[256];

	while (f && fgets(line, sizeof line, f))
		sscanf(line, "VmPTE: %lu", &kib);
	if (f)
		fclose(f);
	CHECK(kib);
	return kib;
}

/* Each slot has a table of 4 KiB. What else this process (or a sanitizer) maps meanwhile is less. */
static bool no_slot_has_other_tables(uint64_t more_kib)
{
	return llabs((int64_t)more_kib) <= 4 * (int)SLOTS / 2;
}

static void recycle(void)
{
	struct window *w = lane_on(cpus[0]);
	struct io io[SLOTS], small, more;
	uint8_t *at[SLOTS];
	uint64_t tables_kib;

	page_table_kib(); /* what stdio, and a look at all of guest memory, need */
	os_populate_read(ram, RAM_PAGES * PAGE);
	tables_kib = page_table_kib();
	for (uint32_t i = 0; i < SLOTS; i++) {
		one_segment(&io[i], false, i * 100 * PAGE, 200 * PAGE);
		CHECK(!window_map(w, &io[i].request, LATENT_LOCAL_FLUSH));
		at[i] = io[i].iov[0].iov_base;
	}
	one_segment(&more, false, 0, PAGE);
	CHECK(window_map(w, &more.request, LATENT_LOCAL_FLUSH) == -EAGAIN);
	CHECK(window_map(w, &io[3].request, LATENT_LOCAL_FLUSH) == -EBUSY);
	CHECK(stats_of(w).mapped_pages == SLOTS * 200);
	for (uint32_t i = 0; i < SLOTS; i++)
		check_contents(&io[i]);
	CHECK(no_slot_has_other_tables(page_table_kib() - tables_kib)); /* made beforehand */
	for (uint32_t i = 1; i < SLOTS; i++)
		CHECK(!window_done(w, &io[i].request, true));
	CHECK(window_done(w, &io[1].request, true) == -ESTALE &&
	      window_use(w, &io[1].request) == -ESTALE);
	CHECK(stats_of(w).mapped_pages == SLOTS * 200); /* they wait */

	/* A smaller one in the place of a larger: nothing of the latter is left. */
	one_segment(&small, false, 1000 * PAGE, 64 * PAGE);
	CHECK(!window_map(w, &small.request, LATENT_LOCAL_FLUSH));
	CHECK(small.iov[0].iov_base == at[SLOTS - 1] && stats_of(w).reused == 1);
	CHECK(os_readable_pages(at[SLOTS - 1], 200) == 64);
	check_contents(&small);

	CHECK(!window_recycle(w));
	CHECK(stats_of(w).mapped_pages == 264 && stats_of(w).emptied == SLOTS - 2);
	for (uint32_t i = 1; i < SLOTS - 1; i++)
		CHECK(os_readable_pages(at[i], 1) == 0);
	check_contents(&io[0]); /* in use: left alone */
	check_contents(&small);
	window_done(w, &io[0].request, true);
	window_done(w, &small.request, true);
	CHECK(!window_recycle(w) && !stats_of(w).mapped_pages && stats_of(w).peak_pages == SLOTS * 200);
	CHECK(no_slot_has_other_tables(page_table_kib() - tables_kib)); /* and never given back */
	window_unregister(w);
}

static void slots_are_recycled_and_keep_their_page_tables(void **state)
{
	(void)state;
	run_lane(recycle);
}

static uint32_t random_below(uint32_t limit)
{
	static uint64_t x = 88172645463325252u;

	x ^= x << 13;
	x ^= x >> 7;
	x ^= x << 17;
	return (uint32_t)(x >> 11) % limit;
}

static void random_io(struct io *io)
{
	uint32_t n = 1 + random_below(SEGMENTS - 1);
	size_t at = random_below(RAM_PAGES / 2) * PAGE + (random_below(2) ? random_below(4096) : 0);

	new_io(io, false);
	while (n--) {
		size_t bytes =
			random_below(3) ? 1 + random_below(3 * 4096) : PAGE * (1 + random_below(60));

		if (at + bytes > RAM_PAGES * PAGE)
			break;
		add_segment(io, at, bytes);
		at = random_below(2) ? at + bytes : random_below(RAM_PAGES - 64) * PAGE;
	}
}

/* The guest writes; then a request is made, used and done, and the next takes its slot. */
static void use_at_random(struct window *w, uint32_t rounds)
{
	static struct io io[SLOTS];
	static bool in_use[SLOTS];

	for (uint32_t round = 0; round < rounds; round++) {
		uint32_t i = random_below(SLOTS);

		ram[random_below(RAM_PAGES * 4096)]++;
		if (in_use[i]) {
			CHECK(!window_use(w, &io[i].request));
			CHECK(!window_done(w, &io[i].request, true));
			in_use[i] = false;
		} else {
			int r;

			random_io(&io[i]);
			r = window_map(w, &io[i].request, LATENT_LOCAL_FLUSH);
			CHECK(!r || r == -E2BIG);
			in_use[i] = !r;
			if (!r)
				check_contents(&io[i]);
		}
		if (!random_below(50))
			CHECK(!window_recycle(w));
	}
	for (uint32_t i = 0; i < SLOTS; i++) {
		if (in_use[i])
			CHECK(!window_done(w, &io[i].request, true));
		in_use[i] = false;
	}
}

static void reuse(void)
{
	struct window *w = lane_on(cpus[0]);

	for (size_t t = 0; t < 3; t++) {
		window_set_threshold(w, thresholds[t]);
		use_at_random(w, 4000);
	}
	CHECK(stats_of(w).reused > 1000 && stats_of(w).emptied > 100);
	CHECK(!window_recycle(w) && !stats_of(w).mapped_pages);
}

static void a_reused_slot_never_shows_what_was_there(void **state)
{
	(void)state;
	run_lane(reuse);
}

/* One request from map to done; returns the mapping calls that it took. */
static uint64_t once(struct window *w, bool writes_guest, size_t offset, size_t bytes)
{
	uint64_t maps = stats_of(w).maps;
	static uint8_t byte;
	struct io io;

	one_segment(&io, writes_guest, offset, bytes);
	CHECK(!window_map(w, &io.request, LATENT_LOCAL_FLUSH));
	if (writes_guest)
		memset(io.iov[0].iov_base, ++byte, bytes);
	else
		check_contents(&io);
	CHECK(!window_done(w, &io.request, true));
	for (size_t i = 0; writes_guest && i < bytes; i++)
		CHECK(ram[offset + i] == byte);
	return stats_of(w).maps - maps;
}

/* The number is another file's, and so are the contents. */
static void put_another_file(uint8_t byte)
{
	int other = os_memfd_create("another", RAM_PAGES * PAGE, false), here = ram_fd;

	ram = mmap(NULL, RAM_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, other, 0);
	CHECK(other >= 0 && ram != MAP_FAILED);
	memset(ram, byte, RAM_PAGES * PAGE);
	CHECK(dup2(other, here) == here);
	close(other);
}

static void come_again(void)
{
	struct window *w = lane_on(cpus[0]);
	struct io two;

	window_set_threshold(w, 100 * PAGE);
	for (size_t i = 0; i < 3; i++) { /* two buffers in turn: each has a slot of its own */
		CHECK(once(w, true, 10 * PAGE + 512, 8 * PAGE) == (i == 1));
		CHECK(once(w, true, 40 * PAGE, 8 * PAGE) == (i == 1));
		ram[11 * PAGE]++;
		ram[41 * PAGE]++;
	}
	CHECK(stats_of(w).kept == 2 && stats_of(w).mapped_pages == 9 + 8);
	CHECK(once(w, false, 40 * PAGE, 8 * PAGE) == 0); /* what is writable is not for who only reads: copied, */
	CHECK(once(w, false, 40 * PAGE, 8 * PAGE) == 1); /* then mapped for itself */
	CHECK(once(w, true, 40 * PAGE, 7 * PAGE) == 0 && stats_of(w).kept == 2); /* another run */

	new_io(&two, true); /* in use is not waiting */
	add_segment(&two, 40 * PAGE, 8 * PAGE);
	CHECK(!window_map(w, &two.request, LATENT_LOCAL_FLUSH) && stats_of(w).kept == 3);
	CHECK(once(w, true, 40 * PAGE, 8 * PAGE) == 1);
	CHECK(!window_done(w, &two.request, true));

	CHECK(once(w, true, 40 * PAGE, 8 * PAGE) == 0 && stats_of(w).kept == 4);
	put_another_file(0x77);
	CHECK(once(w, true, 40 * PAGE, 8 * PAGE) == 1 && stats_of(w).kept == 4);
	CHECK(once(w, true, 40 * PAGE, 8 * PAGE) == 0 && stats_of(w).kept == 5);
	CHECK(!window_recycle(w) && !stats_of(w).mapped_pages);
	CHECK(once(w, true, 40 * PAGE, 8 * PAGE) == 1 && stats_of(w).kept == 5);

	CHECK(once(w, true, 60 * PAGE, 3 * PAGE) == 0 && once(w, true, 60 * PAGE, 3 * PAGE) == 0); /* short */
	window_set_threshold(w, 1u << 30);
	CHECK(once(w, true, 80 * PAGE, 8 * PAGE) == 0 && once(w, true, 80 * PAGE, 8 * PAGE) == 0); /* none */
	CHECK(!window_comes_again(w, &two.request));
	window_unregister(w);
}

/* In turn, and more than there are slots: soon nearly all is copied. */
static void come_too_seldom(void)
{
	struct window *w = lane_on(cpus[0]);
	uint32_t mapped = 0, rounds = 40, buffers = 64;

	window_set_threshold(w, 100 * PAGE);
	for (uint32_t i = 0; i < rounds * buffers; i++) {
		uint64_t maps = once(w, false, i % buffers * 16 * PAGE, 8 * PAGE);

		mapped += i / buffers < rounds / 2 ? 0 : (uint32_t)maps;
	}
	CHECK(mapped < rounds / 2 * buffers / 4);
	for (uint32_t i = 0; i < 200 * SLOTS; i++) /* and then it pays */
		once(w, false, i % (SLOTS / 2) * 16 * PAGE, 8 * PAGE);
	for (uint32_t i = 0; i < SLOTS; i++)
		CHECK(!once(w, false, i % (SLOTS / 2) * 16 * PAGE, 8 * PAGE));
	CHECK(stats_of(w).kept > 100 * SLOTS);
	window_unregister(w);
}

static void what_comes_too_seldom_is_copied(void **state)
{
	(void)state;
	run_lane(come_too_seldom);
}

static void what_comes_again_is_still_mapped(void **state)
{
	(void)state;
	run_lane(come_again);
}

/* A map that fails at any step hands nothing out; what follows is right, and nothing stays mapped. */
static void map_with_failures(void)
{
	struct window *w = lane_on(cpus[0]);
	uint32_t failed = 0;
	struct io io;

	window_set_threshold(w, 2 * PAGE);
	for (uint32_t nth = 1; nth <= 6; nth++) {
		for (uint32_t pages = 100; pages; pages -= 50) {
			int r;

			new_io(&io, false);
			for (uint32_t i = 0; i < 3; i++)
				add_segment(&io, (nth + 10 * i) * PAGE, (pages / 20) * PAGE);
			add_segment(&io, 500 * PAGE + 3, 700);
			os_fault_arm(OS_FAULT_WINDOW, nth, ENOMEM);
			r = window_map(w, &io.request, LATENT_LOCAL_FLUSH);
			os_fault_arm(OS_FAULT_WINDOW, 0, 0);
			CHECK(!r || r == -ENOMEM);
			failed += r != 0;
			if (r)
				CHECK(window_use(w, &io.request) == -ESTALE &&
				      !stats_of(w).mapped_pages);
			else
				check_contents(&io);
			CHECK(r || !window_done(w, &io.request, true));
			use_at_random(w, 40);
			CHECK(!window_recycle(w) && !stats_of(w).mapped_pages);
		}
	}
	CHECK(failed >= 6);
}

static void a_map_that_fails_hands_nothing_out(void **state)
{
	(void)state;
	run_lane(map_with_failures);
}

/* What cannot be emptied is never used again. */
static void lose_slots(void)
{
	struct window *w = lane_on(cpus[0]);
	struct io io;

	for (uint32_t i = 0; i < SLOTS; i++) {
		one_segment(&io, false, 0, 100 * PAGE);
		CHECK(!window_map(w, &io.request, LATENT_LOCAL_FLUSH) &&
		      !window_done(w, &io.request, true));
		os_fault_arm(OS_FAULT_WINDOW, 1, ENOMEM);
		CHECK(window_recycle(w) == -ENOMEM);
		CHECK(stats_of(w).mapped_pages == (i + 1) * 100);
	}
	os_fault_arm(OS_FAULT_WINDOW, 0, 0);
	CHECK(window_map(w, &io.request, LATENT_LOCAL_FLUSH) == -EAGAIN);
}

static void a_slot_that_cannot_be_emptied_is_lost(void **state)
{
	(void)state;
	run_lane(lose_slots);
}

static int map_one(struct window *w, int fd, uint64_t offset, size_t bytes)
{
	struct io io;

	new_io(&io, false);
	io.segments[io.request.count++] = (struct latent_segment){ fd, offset, bytes };
	return window_map(w, &io.request, LATENT_LOCAL_FLUSH);
}

static void wrong_requests(void)
{
	struct window *w = lane_on(cpus[0]), *other = NULL;
	int pipes[2];
	struct io io;

	CHECK(window_register(cpus[0], 0, &other) == -EINVAL &&
	      window_register(-2, 1, &other) == -EINVAL);
	CHECK(window_register(cpus[0], LATENT_SLOTS_MAX + 1, &other) == -EINVAL && !other);
	CHECK(window_register(CPU_SETSIZE + 1, 1, &other) == -EINVAL && !other);
	CHECK(map_one(w, ram_fd, 0, 0) == -EINVAL);
	CHECK(map_one(w, -1, 0, PAGE) == -EINVAL);
	CHECK(map_one(w, ram_fd, UINT64_MAX, PAGE) == -EINVAL);
	CHECK(map_one(w, ram_fd, INT64_MAX, PAGE) == -EINVAL);
	CHECK(map_one(w, ram_fd, 0, SIZE_MAX) == -E2BIG);
	CHECK(map_one(w, ram_fd, 1, 511 * PAGE) == -E2BIG);
	CHECK(map_one(w, ram_fd, RAM_PAGES * PAGE - 10, 20) == -EFAULT);
	CHECK(!pipe(pipes) && map_one(w, pipes[0], 0, 300 * PAGE) == -ENODEV);
	CHECK(map_one(w, 1000, 0, 300 * PAGE) == -EBADF);
	one_segment(&io, false, 0, PAGE);
	CHECK(window_map(w, &io.request, 0) == -EINVAL && window_map(w, &io.request, 3) == -EINVAL);
	io.request.count = 0;
	CHECK(window_map(w, &io.request, LATENT_LOCAL_FLUSH) == -EINVAL);
	io.request.use = 77; /* no such use */
	CHECK(window_use(w, &io.request) == -ESTALE && window_done(w, &io.request, true) == -ESTALE);
	CHECK(window_hand_over(w, &io.request) == -ESTALE);
	CHECK(!stats_of(w).mapped_pages && !stats_of(w).requests);
	CHECK(!map_one(w, ram_fd, 0, 511 * PAGE));
	window_unregister(NULL);
}

static void what_is_wrong_is_refused(void **state)
{
	(void)state;
	run_lane(wrong_requests);
}

/* ---- CPUs ------------------------------------------------------------------------------------- */

static void *wait_for_ever(void *unused)
{
	(void)unused;
	pause();
	return NULL;
}

static void many_threads(void)
{
	struct window *w = NULL;
	cpu_set_t one;
	pthread_t thread;

	CHECK(!pthread_create(&thread, NULL, wait_for_ever, NULL));
	CHECK(window_register(cpus[0], SLOTS, &w) == -EXDEV && !w);
	CPU_ZERO(&one);
	CPU_SET(cpus[0], &one);
	CHECK(!pthread_setaffinity_np(thread, sizeof one, &one));
	w = lane_on(cpus[0]);
	CHECK(!window_check(w));
	CPU_SET(cpus[1], &one);
	CHECK(!pthread_setaffinity_np(thread, sizeof one, &one));
	CHECK(window_check(w) == -EXDEV);
}

static void a_thread_that_may_run_elsewhere_is_seen(void **state)
{
	(void)state;
	if (n_cpus < 2)
		skip();
	run_lane(many_threads);
}

static struct io shared_io;
static struct window *shared_window;

static void *use_elsewhere(void *unused)
{
	(void)unused;
	CHECK(!os_bind_to_cpu(cpus[1]));
	return (void *)(intptr_t)window_use(shared_window, &shared_io.request);
}

static void use_from_another_cpu(void)
{
	pthread_t thread;
	void *result;

	prctl(PR_SET_DUMPABLE, 0);
	shared_window = lane_on(cpus[0]);
	one_segment(&shared_io, false, 0, 64 * PAGE);
	CHECK(!window_map(shared_window, &shared_io.request, LATENT_LOCAL_FLUSH));
	CHECK(!pthread_create(&thread, NULL, use_elsewhere, NULL) && !pthread_join(thread, &result));
	CHECK((intptr_t)result == -EXDEV && stats_of(shared_window).off_cpu == 1);
}

static void use_off_the_registered_cpu_is_caught(void **state)
{
	int status;

	(void)state;
	if (n_cpus < 2)
		skip();
	fill_ram();
	status = status_of(start_lane(use_from_another_cpu));
#ifdef NDEBUG
	assert_int_equal(status, 0);
#else
	assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
#endif
}

static void use_globally(void)
{
	pthread_t thread;
	void *result;

	CHECK(!window_register(-1, SLOTS, &shared_window));
	one_segment(&shared_io, false, 0, 64 * PAGE);
	CHECK(window_map(shared_window, &shared_io.request, LATENT_LOCAL_FLUSH) == -EOPNOTSUPP);
	CHECK(!window_map(shared_window, &shared_io.request, LATENT_GLOBAL_FLUSH));
	check_contents(&shared_io);
	CHECK(!pthread_create(&thread, NULL, use_elsewhere, NULL) && !pthread_join(thread, &result));
	CHECK(!result && !stats_of(shared_window).off_cpu);
}

static void a_global_window_is_used_anywhere(void **state)
{
	(void)state;
	if (n_cpus < 2)
		skip();
	run_lane(use_globally);
}

/* ---- moved lanes ------------------------------------------------------------------------------ */

/* Between parent and lane: a byte each way. */
static int to_lane[2], from_lane[2];

static void open_pipes(void) { assert_true(!pipe(to_lane) && !pipe(from_lane)); }

static void close_pipes(void)
{
	for (int i = 0; i < 2; i++) {
		close(to_lane[i]);
		close(from_lane[i]);
	}
}

static void tell_parent(void)
{
	char c = 0;

	CHECK(write(from_lane[1], &c, 1) == 1 && read(to_lane[0], &c, 1) == 1);
}

static bool hear_lane(void)
{
	char c;

	return read(from_lane[0], &c, 1) == 1;
}

static void answer_lane(void)
{
	char c = 0;

	assert_int_equal(write(to_lane[1], &c, 1), 1);
}

/* Somebody else moves the lane while requests are in flight and slots wait. */
static void be_moved(void)
{
	struct window *w = lane_on(cpus[0]);
	struct io waiting, flying, next;

	use_at_random(w, 500);
	one_segment(&waiting, false, 0, 100 * PAGE);
	one_segment(&flying, false, 50 * PAGE, 100 * PAGE);
	CHECK(!window_map(w, &waiting.request, LATENT_LOCAL_FLUSH) &&
	      !window_map(w, &flying.request, LATENT_LOCAL_FLUSH));
	CHECK(!window_done(w, &waiting.request, true));
	tell_parent(); /* which moves us, and writes guest memory */
	CHECK(os_cpu() == cpus[1]);
	CHECK(window_use(w, &flying.request) == -EXDEV);
	one_segment(&next, false, 100 * PAGE, 100 * PAGE);
	CHECK(window_map(w, &next.request, LATENT_LOCAL_FLUSH) == -EXDEV && window_check(w) == -EXDEV);
	CHECK(stats_of(w).off_cpu == 2);
	CHECK(!window_move(w, cpus[1]) && !window_check(w));
	CHECK(!window_use(w, &flying.request));
	check_contents(&flying);
	CHECK(!window_map(w, &next.request, LATENT_LOCAL_FLUSH));
	check_contents(&next);
	CHECK(!window_done(w, &next.request, true) && !window_done(w, &flying.request, true));
	use_at_random(w, 2000);
	CHECK(stats_of(w).off_cpu == 2);
}

static void move_lane(void (*move)(pid_t lane))
{
	pid_t lane;

	fill_ram();
	open_pipes();
	lane = start_lane(be_moved);
	close(from_lane[1]);
	from_lane[1] = -1;
	if (hear_lane()) {
		move(lane);
		for (size_t i = 0; i < 300 * PAGE; i++)
			ram[i] ^= 0xff;
		answer_lane();
	}
	assert_int_equal(status_of(lane), 0);
	close_pipes();
}

static void move_by_affinity(pid_t lane)
{
	cpu_set_t other;

	CPU_ZERO(&other);
	CPU_SET(cpus[1], &other);
	assert_int_equal(sched_setaffinity(lane, sizeof other, &other), 0);
}

static void a_lane_that_was_moved_is_told_and_reads_right(void **state)
{
	(void)state;
	if (n_cpus < 2)
		skip();
	move_lane(move_by_affinity);
}

#define CPUSET "/sys/fs/cgroup/cpuset/latent-test-window"

static bool write_text(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	bool written = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);

	if (fd >= 0)
		close(fd);
	return written;
}

static bool set_cpuset(const char *cpu_list)
{
	return write_text(CPUSET "/cpuset.cpus", cpu_list) && write_text(CPUSET "/cpuset.mems", "0");
}

static void move_by_cpuset(pid_t lane)
{
	char number[16], cpu[16];

	snprintf(number, sizeof number, "%d", lane);
	snprintf(cpu, sizeof cpu, "%d", cpus[1]);
	assert_true(write_text(CPUSET "/tasks", number)); /* and then its CPU is taken away */
	assert_true(set_cpuset(cpu));
}

static void a_cpuset_that_changes_does_no_harm(void **state)
{
	char both[32];

	(void)state;
	snprintf(both, sizeof both, "%d,%d", cpus[0], cpus[1]);
	if (n_cpus < 2 || mkdir(CPUSET, 0755) || !set_cpuset(both)) {
		printf("no cpuset (version 1) to be had\n");
		rmdir(CPUSET);
		skip();
	}
	move_lane(move_by_cpuset);
	rmdir(CPUSET);
}

/* ---- hand-over -------------------------------------------------------------------------------- */

struct ball {
	struct io io;
	uint32_t turns, emptied_first;
};
static struct ball *ball; /* memory that both lanes have; addresses within are the same in both */

/* A lane has the request, changes guest memory through it, and hands it over in the middle of it. */
static void take_turn(struct window *w, struct io *waiting)
{
	uint64_t emptied = stats_of(w).emptied;
	uint8_t *first;

	CHECK(!window_map(w, &ball->io.request, LATENT_LOCAL_FLUSH));
	ball->emptied_first += ball->turns && stats_of(w).emptied == emptied + 1;
	check_contents(&ball->io);
	first = ball->io.iov[0].iov_base;
	first[ball->turns % (100 * PAGE)] = (uint8_t)ball->turns;
	CHECK(!window_hand_over(w, &ball->io.request));
	CHECK(os_readable_pages(first, 1) == 0);
	one_segment(waiting, false, (ball->turns % 50) * PAGE,
		    30 * PAGE); /* so that a slot waits, with other pages */
	CHECK(!window_map(w, &waiting->request, LATENT_LOCAL_FLUSH));
	check_contents(waiting);
	CHECK(!window_done(w, &waiting->request, true));
	ball->io.segments[0].offset = (ball->turns * 7 % 40) * PAGE;
	ball->turns++;
}

static void play(struct window *w, int hear, int say, uint32_t turns)
{
	struct io waiting;
	char c;

	while (turns--) {
		CHECK(read(hear, &c, 1) == 1);
		take_turn(w, &waiting);
		CHECK(write(say, &c, 1) == 1);
	}
}

static void second_lane(void)
{
	struct window *w = lane_on(cpus[n_cpus - 1]);

	window_set_threshold(w, 1);
	play(w, from_lane[0], to_lane[1], 300);
	CHECK(stats_of(w).handed_over == 300);
}

static void first_lane(void)
{
	struct window *w = lane_on(cpus[0]);

	window_set_threshold(w, 1);
	CHECK(write(to_lane[1], "", 1) == 1); /* the first turn is mine */
	play(w, to_lane[0], from_lane[1], 300);
	CHECK(stats_of(w).handed_over == 300);
}

static void a_request_is_handed_over(void **state)
{
	pid_t lanes[2];

	(void)state;
	fill_ram();
	open_pipes();
	ball = mmap(NULL, sizeof *ball, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	one_segment(&ball->io, true, 0, 100 * PAGE);
	lanes[0] = start_lane(first_lane);
	lanes[1] = start_lane(second_lane);
	assert_int_equal(status_of(lanes[0]), 0);
	assert_int_equal(status_of(lanes[1]), 0);
	assert_int_equal(ball->turns, 600);
	/* But for each lane's first: what waited was emptied before anything was mapped. */
	assert_int_equal(ball->emptied_first, 598);
	munmap(ball, sizeof *ball);
	close_pipes();
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(guest_memory_is_read),
		cmocka_unit_test(guest_memory_is_written_where_it_should),
		cmocka_unit_test(a_failed_read_is_not_copied_to_the_guest),
		cmocka_unit_test(what_the_guest_sends_is_not_writable),
		cmocka_unit_test(slots_are_recycled_and_keep_their_page_tables),
		cmocka_unit_test(a_reused_slot_never_shows_what_was_there),
		cmocka_unit_test(what_comes_again_is_still_mapped),
		cmocka_unit_test(what_comes_too_seldom_is_copied),
		cmocka_unit_test(a_map_that_fails_hands_nothing_out),
		cmocka_unit_test(a_slot_that_cannot_be_emptied_is_lost),
		cmocka_unit_test(what_is_wrong_is_refused),
		cmocka_unit_test(a_thread_that_may_run_elsewhere_is_seen),
		cmocka_unit_test(use_off_the_registered_cpu_is_caught),
		cmocka_unit_test(a_global_window_is_used_anywhere),
		cmocka_unit_test(a_lane_that_was_moved_is_told_and_reads_right),
		cmocka_unit_test(a_cpuset_that_changes_does_no_harm),
		cmocka_unit_test(a_request_is_handed_over),
	};

	return cmocka_run_group_tests(tests, set_up, NULL);
}
