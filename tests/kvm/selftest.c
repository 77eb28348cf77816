/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The harness tested by itself, with plain mmap, madvise and fallocate in the place of the core
 * library: what changes under running vCPUs is right, and what is made wrong is found.
 *
 *	selftest [touches [changes]]
 *
 * The vCPUs together make at least so many page touches (default 3,000,000) while the host makes
 * at least so many changes (default 3,000).
 */
#include "vcpu.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
	VCPUS = 3, /* more than the cores of a small machine: they get preempted, too */
	RAM_PAGES = 16384,
	IMAGE_PAGES = 8192,
	RUN_PAGES_MAX = 64,
	CHUNK_PAGES = 128, /* owners change this often, so some runs have two */
	WAIT_MS = 120000,
	TAKE_MS = 20000,
};

/* The page modes of the design: the memfd itself, or a private mapping of the image over it. */
enum mode { BASE, OVERLAY };

struct bench {
	struct vcpus *vcpus;
	int base_fd, image_fd;
	uint8_t *ram;
	uint8_t mode[RAM_PAGES];
	uint64_t random;
};

static struct bench b;

static void require_at(bool ok, const char *what, int line)
{
	if (ok)
		return;
	fprintf(stderr, "selftest.c:%d: failed: %s (errno %s)\n", line, what, strerror(errno));
	exit(1);
}
#define REQUIRE(condition) require_at(condition, #condition, __LINE__)

static uint64_t now_us(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static uint64_t random_below(uint64_t limit)
{
	b.random = b.random * 6364136223846793005u + 1442695040888963407u;
	return (b.random >> 33) % limit;
}

static uint8_t *hva(uint64_t page) { return b.ram + page * GUEST_PAGE_BYTES; }

/* ---- What a host does to guest RAM ---- */

static uint64_t image_seed(uint64_t block) { return contents_seed(1, block); }

static void map_base(uint64_t page, uint64_t pages)
{
	REQUIRE(mmap(hva(page), pages * GUEST_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
		     b.base_fd, (off_t)(page * GUEST_PAGE_BYTES)) == hva(page));
	memset(&b.mode[page], BASE, pages);
}

static void map_image(uint64_t page, uint64_t pages, uint64_t block)
{
	REQUIRE(mmap(hva(page), pages * GUEST_PAGE_BYTES, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_FIXED, b.image_fd,
		     (off_t)(block * GUEST_PAGE_BYTES)) == hva(page));
	memset(&b.mode[page], OVERLAY, pages);
}

static void punch(uint64_t page, uint64_t pages)
{
	REQUIRE(!fallocate(b.base_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			   (off_t)(page * GUEST_PAGE_BYTES), (off_t)(pages * GUEST_PAGE_BYTES)));
}

static void take(uint64_t page, uint64_t pages)
{
	int r = vcpus_take(b.vcpus, page, pages, TAKE_MS);
	if (r)
		fprintf(stderr, "take of %" PRIu64 "+%" PRIu64 ": %s\n", page, pages, strerror(-r));
	REQUIRE(r == 0);
}

static void give_image(uint64_t page, uint64_t pages, uint64_t block)
{
	uint64_t seeds[RUN_PAGES_MAX];
	for (uint64_t i = 0; i < pages; i++)
		seeds[i] = image_seed(block + i);
	vcpus_give_patterned(b.vcpus, page, pages, seeds);
}

/* A disk read that is shortcut: the image is mapped over the buffer. */
static void read_by_mapping(uint64_t page, uint64_t pages)
{
	uint64_t block = random_below(IMAGE_PAGES - pages);
	take(page, pages);
	map_image(page, pages, block);
	punch(page, pages);
	give_image(page, pages, block);
}

/* A disk read that is not: the data are written through the mapping that is there. */
static void read_by_copying(uint64_t page, uint64_t pages)
{
	uint64_t block = random_below(IMAGE_PAGES - pages);
	take(page, pages);
	REQUIRE(pread(b.image_fd, hva(page), pages * GUEST_PAGE_BYTES,
		      (off_t)(block * GUEST_PAGE_BYTES)) == (ssize_t)(pages * GUEST_PAGE_BYTES));
	give_image(page, pages, block);
}

static void discard(uint64_t page, uint64_t pages)
{
	take(page, pages);
	map_base(page, pages);
	punch(page, pages);
	REQUIRE(!madvise(hva(page), pages * GUEST_PAGE_BYTES, MADV_DONTNEED));
	vcpus_give_zeroed(b.vcpus, page, pages);
}

/* Loses page-table entries, never contents: allowed on base only, under running writers. */
static void zap(uint64_t page, uint64_t pages)
{
	for (uint64_t p = page; p < page + pages; p++)
		if (b.mode[p] == BASE)
			REQUIRE(!madvise(hva(p), GUEST_PAGE_BYTES, MADV_DONTNEED));
}

static uint64_t overlay_run(uint64_t page, uint64_t limit)
{
	uint64_t n = 0;
	while (page + n < limit && b.mode[page + n] == OVERLAY)
		n++;
	return n;
}

/* While the vCPUs are paused. */
static void settle(uint64_t page, uint64_t pages)
{
	for (uint64_t p = page; p < page + pages;) {
		uint64_t n = overlay_run(p, page + pages);
		if (n) {
			REQUIRE(pwrite(b.base_fd, hva(p), n * GUEST_PAGE_BYTES,
				       (off_t)(p * GUEST_PAGE_BYTES)) ==
				(ssize_t)(n * GUEST_PAGE_BYTES));
			map_base(p, n);
		}
		p += n + 1;
	}
}

static void check_in_pause(uint64_t page, uint64_t pages)
{
	struct vcpu_report report;
	bool ok = vcpus_check(b.vcpus, page, pages, &report);
	if (!ok)
		vcpu_report_print(stderr, VCPUS, &report);
	REQUIRE(ok);
}

static void pause_and_settle(uint64_t page, uint64_t pages)
{
	vcpus_pause(b.vcpus);
	settle(page, pages);
	check_in_pause(page, pages);
	vcpus_resume(b.vcpus);
}

/* ---- Running programs ---- */

static struct vcpu_report wait_for(unsigned cpu)
{
	struct vcpu_report report;
	REQUIRE(vcpu_wait(b.vcpus, cpu, WAIT_MS, &report) == 0);
	return report;
}

static struct vcpu_report run(unsigned cpu, enum vcpu_program program, uint64_t first, uint64_t pages)
{
	const struct vcpu_job job = {
		.program = program, .first_page = first, .pages = pages, .full_per_256 = 256
	};
	REQUIRE(vcpu_start(b.vcpus, cpu, &job) == 0);
	return wait_for(cpu);
}

static void require_good(unsigned cpu, const struct vcpu_report *report)
{
	bool good = report->outcome == VCPU_DONE || report->outcome == VCPU_STOPPED;
	if (!good)
		vcpu_report_print(stderr, cpu, report);
	REQUIRE(good);
}

static void start_touching(unsigned cpu, uint64_t touches)
{
	const struct vcpu_job job = {
		.program = VCPU_TOUCH,
		.first_page = 0,
		.pages = RAM_PAGES,
		.touches = touches,
		.random_seed = cpu + 1,
		.full_per_256 = 32,
		.write_per_256 = 16,
		.poke_per_256 = 64,
	};
	REQUIRE(vcpu_start(b.vcpus, cpu, &job) == 0);
}

static void stop_all(void)
{
	for (unsigned cpu = 0; cpu < VCPUS; cpu++)
		vcpu_stop(b.vcpus, cpu);
	for (unsigned cpu = 0; cpu < VCPUS; cpu++) {
		struct vcpu_report report = wait_for(cpu);
		require_good(cpu, &report);
	}
}

static void verify_all(void)
{
	struct vcpu_report report = run(0, VCPU_VERIFY, 0, RAM_PAGES);
	require_good(0, &report);
	REQUIRE(report.counts.words == (uint64_t)RAM_PAGES * GUEST_PAGE_WORDS);
}

/* ---- The tests ---- */

static void test_sum_and_verify(void)
{
	uint64_t sum = 0, seeds[RUN_PAGES_MAX];
	for (uint64_t i = 0; i < RUN_PAGES_MAX; i++) {
		seeds[i] = contents_seed(7, i);
		contents_fill(hva(i), seeds[i]);
		sum += seeds[i];
	}
	take(0, RUN_PAGES_MAX);
	vcpus_give_patterned(b.vcpus, 0, RUN_PAGES_MAX, seeds);
	struct vcpu_report report = run(1, VCPU_READ_SUM, 0, RUN_PAGES_MAX);
	require_good(1, &report);
	REQUIRE(report.sum == sum && report.counts.touches == RUN_PAGES_MAX);
	verify_all();
	puts("sum and verify: right");
}

static void test_writers(void)
{
	uint64_t written = 0;
	for (unsigned cpu = 0; cpu < VCPUS; cpu++) {
		struct vcpu_report report = run(cpu, VCPU_WRITE, 0, RAM_PAGES);
		require_good(cpu, &report);
		REQUIRE(report.counts.skipped + report.counts.writes == RAM_PAGES);
		written += report.counts.writes;
	}
	REQUIRE(written == RAM_PAGES);
	verify_all();
	check_in_pause(0, RAM_PAGES);
	puts("writers: every page written by its owner, right from guest and host");
}

static void require_wrong(const struct vcpu_report *report, uint64_t page, unsigned word, uint64_t got)
{
	if (report->outcome != VCPU_WRONG)
		vcpu_report_print(stderr, 0, report);
	REQUIRE(report->outcome == VCPU_WRONG && report->page == page && report->word == word &&
		report->got == got && report->hva == hva(page));
}

static void test_one_wrong_word(void)
{
	static const unsigned words[] = { 0, 1, 255, 510, 511 };
	for (size_t i = 0; i < sizeof words / sizeof words[0]; i++) {
		uint64_t *at = (uint64_t *)(void *)hva(1234) + words[i];
		*at ^= 1u << i;
		struct vcpu_report report = run(0, VCPU_VERIFY, 0, RAM_PAGES), host;
		require_wrong(&report, 1234, words[i], *at);
		REQUIRE(report.expected == (*at ^ 1u << i));
		REQUIRE(!vcpus_check(b.vcpus, 0, RAM_PAGES, &host) && host.page == 1234 &&
			host.word == words[i] && host.expected == report.expected);
		*at ^= 1u << i;
	}
	verify_all();
	puts("one wrong bit: found, page and word named");
}

/* The bugs that the harness is there for, each made on purpose under running vCPUs. */
static void lose_private_copies(uint64_t page)
{
	REQUIRE(!madvise(hva(page), GUEST_PAGE_BYTES, MADV_DONTNEED)); /* of an overlay! */
}

static void map_neighbour_block(uint64_t page)
{
	take(page, 1);
	map_image(page, 1, 101);
	give_image(page, 1, 100);
}

static void settle_under_a_writer(uint64_t page)
{
	uint8_t copy[GUEST_PAGE_BYTES];
	memcpy(copy, hva(page), sizeof copy);
	usleep(20000); /* the owner goes on writing: what it writes now is lost */
	REQUIRE(pwrite(b.base_fd, copy, sizeof copy, (off_t)(page * GUEST_PAGE_BYTES)) > 0);
	map_base(page, 1);
}

static void forget_a_discard(uint64_t page)
{
	take(page, 1);
	vcpus_give_zeroed(b.vcpus, page, 1);
}

static void test_bug_is_found(const char *name, void (*bug)(uint64_t page))
{
	enum { PAGE = 4000, PAGES = 8 };
	struct vcpu_job job = { .program = VCPU_TOUCH,
				.first_page = PAGE,
				.pages = PAGES,
				.touches = UINT64_MAX,
				.random_seed = 3,
				.poke_per_256 = 128,
				.full_per_256 = 128 };
	vcpus_set_owner(b.vcpus, PAGE, PAGES, 0);
	take(PAGE, PAGES);
	map_image(PAGE, PAGES, 100);
	give_image(PAGE, PAGES, 100);
	REQUIRE(vcpu_start(b.vcpus, 0, &job) == 0);
	struct vcpu_counts counts = { 0 };
	while (counts.pokes < 1000)
		vcpu_peek(b.vcpus, 0, &counts);
	bug(PAGE + 3);
	struct vcpu_report report;
	int r = vcpu_wait(b.vcpus, 0, WAIT_MS, &report);
	REQUIRE(r == 0 && report.outcome == VCPU_WRONG && report.page == PAGE + 3);
	printf("bug made on purpose, found: %s\n", name);
	discard(PAGE, PAGES); /* also ends the write that was given up */
	verify_all();
}

static void test_fault_is_reported(void)
{
	enum { PAGE = 5000, PAGES = 4 };
	char name[] = "/var/tmp/latent-selftest-XXXXXX";
	int fd = mkstemp(name);
	uint64_t seeds[PAGES], words[GUEST_PAGE_WORDS];

	REQUIRE(fd >= 0 && !unlink(name));
	for (uint64_t i = 0; i < PAGES; i++) {
		contents_fill(words, seeds[i] = contents_seed(9, i));
		REQUIRE(pwrite(fd, words, sizeof words, (off_t)(i * sizeof words)) > 0);
	}
	take(PAGE, PAGES);
	REQUIRE(mmap(hva(PAGE), PAGES * GUEST_PAGE_BYTES, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_FIXED, fd, 0) == hva(PAGE));
	vcpus_give_patterned(b.vcpus, PAGE, PAGES, seeds);
	REQUIRE(!ftruncate(fd, 2 * GUEST_PAGE_BYTES));

	struct vcpu_report report = run(0, VCPU_VERIFY, 0, RAM_PAGES);
	if (report.outcome != VCPU_FAULT)
		vcpu_report_print(stderr, 0, &report);
	REQUIRE(report.outcome == VCPU_FAULT && report.error == -EFAULT);
	REQUIRE(report.page == PAGE + 2 && report.hva == hva(PAGE + 2) &&
		report.gpa == RAM_GPA + (PAGE + 2) * (uint64_t)GUEST_PAGE_BYTES);
	REQUIRE(vcpus_take(b.vcpus, PAGE, 1, TAKE_MS) == -EBUSY ||
		vcpus_entry(b.vcpus, PAGE)->state >> STATE_OWNER_SHIFT != 0);

	for (uint64_t i = 2; i < PAGES; i++) {
		contents_fill(words, seeds[i]);
		REQUIRE(pwrite(fd, words, sizeof words, (off_t)(i * sizeof words)) > 0);
	}
	REQUIRE(vcpu_continue(b.vcpus, 0) == 0);
	report = wait_for(0);
	require_good(0, &report);
	REQUIRE(report.counts.touches == RAM_PAGES);
	REQUIRE(vcpu_continue(b.vcpus, 0) == -EINVAL);
	discard(PAGE, PAGES);
	close(fd);
	puts("file truncated under a mapping: -EFAULT reported with page and address, continued");
}

static uint64_t touches_of_all(void)
{
	uint64_t sum = 0;
	struct vcpu_counts counts;
	for (unsigned cpu = 0; cpu < VCPUS; cpu++) {
		vcpu_peek(b.vcpus, cpu, &counts);
		sum += counts.touches;
	}
	return sum;
}

static void test_pause(void)
{
	enum { PAUSES = 300 };
	uint64_t before_us, longest_us = 0;
	for (unsigned cpu = 0; cpu < VCPUS; cpu++)
		start_touching(cpu, UINT64_MAX);
	for (unsigned i = 0; i < PAUSES; i++) {
		usleep((useconds_t)random_below(1000));
		before_us = now_us();
		vcpus_pause(b.vcpus);
		if (now_us() - before_us > longest_us)
			longest_us = now_us() - before_us;
		uint64_t touches = touches_of_all();
		usleep((useconds_t)random_below(300));
		REQUIRE(touches_of_all() == touches);
		REQUIRE(vcpus_take(b.vcpus, 0, 1, TAKE_MS) == -EBUSY);
		vcpus_resume(b.vcpus);
	}
	stop_all();
	verify_all();
	printf("pause: %d times, nothing moved meanwhile, longest took %" PRIu64 " us\n", PAUSES,
	       longest_us);
}

static void test_bad_arguments(void)
{
	const struct vcpu_job beyond = { .program = VCPU_VERIFY, .first_page = 1, .pages = RAM_PAGES };
	const struct vcpu_job long_job = { .program = VCPU_TOUCH,
					   .pages = RAM_PAGES,
					   .touches = UINT64_MAX };
	struct vcpu_report report;
	REQUIRE(vcpu_start(b.vcpus, 0, &beyond) == -EINVAL);
	REQUIRE(vcpu_start(b.vcpus, VCPUS, &long_job) == -EINVAL);
	REQUIRE(vcpu_wait(b.vcpus, VCPUS - 1, 0, &report) == -ESRCH);
	REQUIRE(vcpu_start(b.vcpus, 0, &long_job) == 0);
	REQUIRE(vcpu_start(b.vcpus, 0, &long_job) == -EBUSY);
	REQUIRE(vcpu_wait(b.vcpus, 0, 1, &report) == -ETIMEDOUT);
	vcpu_stop(b.vcpus, 0);
	REQUIRE(wait_for(0).outcome == VCPU_STOPPED);
	take(10, 5);
	REQUIRE(vcpus_take(b.vcpus, 14, 1, TAKE_MS) == -EBUSY);
	vcpus_give_unchanged(b.vcpus, 10, 5);
	puts("wrong use: refused");
}

/* ---- Everything at once ---- */

struct churn {
	const char *name;
	void (*operation)(uint64_t page, uint64_t pages);
	unsigned per_64;
	uint64_t count, us;
};

static struct churn churns[] = {
	{ .name = "read by mapping", .operation = read_by_mapping, .per_64 = 22 },
	{ .name = "read by copying", .operation = read_by_copying, .per_64 = 6 },
	{ .name = "zap", .operation = zap, .per_64 = 20 },
	{ .name = "discard", .operation = discard, .per_64 = 10 },
	{ .name = "pause and settle", .operation = pause_and_settle, .per_64 = 6 },
};

static struct churn *pick_churn(void)
{
	uint64_t at = random_below(64);
	struct churn *c = churns;
	while (at >= c->per_64)
		at -= c++->per_64;
	return c;
}

static bool any_ended(void)
{
	struct vcpu_report report;
	for (unsigned cpu = 0; cpu < VCPUS; cpu++)
		if (vcpu_wait(b.vcpus, cpu, 0, &report) != -ETIMEDOUT)
			return true;
	return false;
}

static void churn_once(void)
{
	struct churn *c = pick_churn();
	uint64_t pages = 1 + random_below(RUN_PAGES_MAX), page = random_below(RAM_PAGES - pages);
	uint64_t start_us = now_us();
	c->operation(page, pages);
	c->us += now_us() - start_us;
	c->count++;
}

static void test_churn(uint64_t touches, uint64_t changes)
{
	uint64_t start_us = now_us(), words = 0, touched = 0, changed = 0;
	for (unsigned cpu = 0; cpu < VCPUS; cpu++)
		start_touching(cpu, UINT64_MAX);
	while ((changed < changes || touches_of_all() < touches) && !any_ended()) {
		churn_once();
		changed++;
	}
	for (unsigned cpu = 0; cpu < VCPUS; cpu++) {
		vcpu_stop(b.vcpus, cpu);
		struct vcpu_report report = wait_for(cpu);
		vcpu_report_print(stdout, cpu, &report);
		require_good(cpu, &report);
		words += report.counts.words;
		touched += report.counts.touches;
	}
	verify_all();
	check_in_pause(0, RAM_PAGES);
	for (size_t i = 0; i < sizeof churns / sizeof churns[0]; i++) {
		REQUIRE(churns[i].count > 0 || changed < 1000);
		printf("  %-18s %8" PRIu64 " times, %6" PRIu64 " us each\n", churns[i].name,
		       churns[i].count, churns[i].us / churns[i].count);
	}
	printf("churn: %" PRIu64 " changes, %" PRIu64 " touches, %" PRIu64
	       " words checked, 0 wrong, %.1f s\n",
	       changed, touched, words, (double)(now_us() - start_us) / 1e6);
}

/* ---- Set up ---- */

static void make_image(void)
{
	char name[] = "/var/tmp/latent-selftest-XXXXXX";
	uint64_t words[GUEST_PAGE_WORDS];

	b.image_fd = mkstemp(name);
	REQUIRE(b.image_fd >= 0 && !unlink(name));
	for (uint64_t block = 0; block < IMAGE_PAGES; block++) {
		contents_fill(words, image_seed(block));
		REQUIRE(write(b.image_fd, words, sizeof words) == (ssize_t)sizeof words);
	}
}

static void make_ram(void)
{
	b.base_fd = memfd_create("selftest-ram", MFD_CLOEXEC);
	REQUIRE(b.base_fd >= 0 && !ftruncate(b.base_fd, (off_t)RAM_PAGES * GUEST_PAGE_BYTES));
	b.ram = mmap(NULL, (size_t)RAM_PAGES * GUEST_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED,
		     b.base_fd, 0);
	REQUIRE(b.ram != MAP_FAILED);
	REQUIRE(vcpus_attach(b.vcpus, 0, b.ram, RAM_PAGES) == 0);
	for (uint64_t page = 0; page < RAM_PAGES; page += CHUNK_PAGES)
		vcpus_set_owner(b.vcpus, page, CHUNK_PAGES, (unsigned)(page / CHUNK_PAGES % VCPUS));
}

static bool cannot_run(int error)
{
	return error == -ENOENT || error == -EACCES || error == -EPERM || error == -ENODEV ||
	       error == -ENXIO || error == -ENOTSUP;
}

int main(int argc, char **argv)
{
	uint64_t touches = argc > 1 ? strtoull(argv[1], NULL, 10) : 3000000;
	uint64_t changes = argc > 2 ? strtoull(argv[2], NULL, 10) : 3000;
	int r = vcpus_create(VCPUS, RAM_PAGES, &b.vcpus);
	if (cannot_run(r)) {
		printf("skipped: no bare vCPU can run here: %s\n", strerror(-r));
		return 77;
	}
	REQUIRE(r == 0);
	setvbuf(stdout, NULL, _IOLBF, 0);
	b.random = 42;
	make_image();
	make_ram();

	test_bad_arguments();
	test_sum_and_verify();
	test_writers();
	test_one_wrong_word();
	test_fault_is_reported();
	test_pause();
	test_churn(touches, changes);
	test_bug_is_found("private copies of an overlay dropped", lose_private_copies);
	test_bug_is_found("the neighbour's block mapped", map_neighbour_block);
	test_bug_is_found("settled without stopping the writer", settle_under_a_writer);
	test_bug_is_found("pages reported as discarded that were not", forget_a_discard);

	vcpus_destroy(b.vcpus);
	return 0;
}
