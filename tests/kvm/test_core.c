/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The core library, and the scan for what is in use, under running vCPUs: they read and write guest RAM at native speed, through
 * KVM's own faults, and check what they read (three words of most pages, each word of one in eight), while reads are shortcut, overlays mapped, privatized and
 * settled, pages discarded, zapped and given back beneath them. Before that, what they use is told from what they do not,
 * and what they write from what they read.
 *
 *	test_core [touches [changes]]        default 10,000,000 page touches, 10,000 changes
 */
#include "vcpu.h"

#include "../unit/mask_server.h"

#include "activity/scan.h"
#include "core/ram.h"
#include "volume/volume.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
	VCPUS = 3, /* more than the cores of a small machine: they get preempted, too */
	RAM_PAGES = 16384,
	IMAGE_PAGES = 8192,
	RUN_PAGES_MAX = 64,
	CHUNK_PAGES = 128,
	WAIT_MS = 120000,
	TAKE_MS = 20000,
	BUDGET_MAPS = 600,  /* low enough that it is met */
	HOT_PAGES = 2048,
	LOOK_US = 400000,   /* a scan period in which each hot page is touched for sure, and all can be sampled, */
	CHURN_LOOK_US = 1000, /* and one in which there is always something to do */
};

struct image {
	char path[64];
	int fd;
	uint64_t kind; /* of its contents */
};

static struct {
	struct vcpus *vcpus;
	int memfd;
	uint8_t *hva;
	struct ram *ram;
	struct ram_block *block;
	struct volumes *volumes;
	struct vm_stats stats;
	struct image read_image;   /* read through src/volume, as the agent does */
	struct image mapped_image; /* mapped by the core's own calls */
	unsigned mapped_file;
	char dir[64];
	uint64_t random, settled;
	struct scan *scan;
	struct mask_server server;
	bool reclaims; /* there is a userfaultfd for it */
} b;

static void require_at(bool ok, const char *what, int line)
{
	if (ok)
		return;
	fprintf(stderr, "test_core.c:%d: failed: %s (errno %s)\n", line, what, strerror(errno));
	exit(1);
}
#define REQUIRE(condition) require_at(condition, #condition, __LINE__)

static uint64_t random_below(uint64_t limit)
{
	b.random = b.random * 6364136223846793005u + 1442695040888963407u;
	return (b.random >> 33) % limit;
}

static uint8_t *hva_of(uint64_t page) { return b.hva + page * GUEST_PAGE_BYTES; }

/* ---- what a host does ------------------------------------------------------------------------- */

static void take(uint64_t page, uint64_t pages)
{
	REQUIRE(vcpus_take(b.vcpus, page, pages, TAKE_MS) == 0);
}

static void give(uint64_t page, uint64_t pages, const struct image *image, uint64_t block)
{
	uint64_t seeds[RUN_PAGES_MAX];

	for (uint64_t i = 0; i < pages; i++)
		seeds[i] = contents_seed(image->kind, block + i);
	vcpus_give_patterned(b.vcpus, page, pages, seeds);
}

/* A disk read into pages: mapped, or copied over whatever is there, as volumes_read decides. */
static void read_image(uint64_t page, uint64_t pages)
{
	uint64_t block = random_below(IMAGE_PAGES - pages);
	struct iovec iov[2] = { { hva_of(page), GUEST_PAGE_BYTES }, { hva_of(page + 1), (pages - 1) * GUEST_PAGE_BYTES } };

	take(page, pages);
	REQUIRE(volumes_read(b.volumes, b.read_image.fd, iov, 2, (off_t)(block * GUEST_PAGE_BYTES)) ==
		(ssize_t)(pages * GUEST_PAGE_BYTES));
	give(page, pages, &b.read_image, block);
}

static void map_overlay(uint64_t page, uint64_t pages)
{
	uint64_t block = random_below(IMAGE_PAGES - pages);
	int r;

	take(page, pages);
	ram_lock(b.ram);
	r = ram_map_overlay(b.ram, b.block, page, pages, b.mapped_file, block);
	ram_unlock(b.ram);
	if (r == 0)
		give(page, pages, &b.mapped_image, block);
	else
		vcpus_give_unchanged(b.vcpus, page, pages);
	REQUIRE(r == 0 || r == -EDQUOT);
}

static void discard(uint64_t page, uint64_t pages)
{
	take(page, pages);
	ram_lock(b.ram);
	REQUIRE(ram_discard(b.ram, b.block, page, pages) == 0);
	ram_unlock(b.ram);
	vcpus_give_zeroed(b.vcpus, page, pages);
}

/* Loses page-table entries and no contents: base only, under running writers. */
static void zap(uint64_t page, uint64_t pages)
{
	ram_lock(b.ram);
	for (uint64_t end = page + pages; page < end;) {
		struct ram_range range = ram_range_at(b.block, page, end);

		if (range.source == ENTRY_BASE)
			REQUIRE(!madvise(hva_of(range.page), range.pages * GUEST_PAGE_BYTES, MADV_DONTNEED));
		page += range.pages;
	}
	ram_unlock(b.ram);
}

/* Contents stay, writers run. */
static void privatize(uint64_t page, uint64_t pages)
{
	(void)page;
	(void)pages;
	REQUIRE(ram_privatize(b.ram, b.mapped_file) == 0);
}

static void reconcile(uint64_t page, uint64_t pages)
{
	(void)page;
	(void)pages;
	REQUIRE(ram_reconcile(b.ram) == 0);
}

static void check_in_pause(uint64_t page, uint64_t pages)
{
	struct vcpu_report report;
	bool ok = vcpus_check(b.vcpus, page, pages, &report);

	if (!ok)
		vcpu_report_print(stderr, VCPUS, &report);
	REQUIRE(ok);
}

static void settle(uint64_t page, uint64_t pages)
{
	vcpus_pause(b.vcpus);
	ram_lock(b.ram);
	REQUIRE(ram_settle(b.ram, b.block, page, pages, &b.settled) == 0);
	ram_unlock(b.ram);
	check_in_pause(page, pages);
	vcpus_resume(b.vcpus);
}

/* The vCPU threads are stopped by a signal, as the agent stops QEMU's. */
static void settle_frozen(uint64_t page, uint64_t pages)
{
	int r;

	ram_lock(b.ram); /* before they stop: one of them may have it */
	r = os_freeze(VCPU_FREEZE_SIGNAL, TAKE_MS);
	REQUIRE(r == 0);
	r = ram_settle(b.ram, b.block, page, pages, &b.settled);
	os_thaw();
	ram_unlock(b.ram);
	REQUIRE(r == 0);
}

static void detach(uint64_t page, uint64_t pages)
{
	(void)page;
	(void)pages;
	vcpus_pause(b.vcpus);
	ram_lock(b.ram);
	REQUIRE(ram_detach(b.ram, b.mapped_file, &b.settled) == 0);
	ram_unlock(b.ram);
	check_in_pause(0, RAM_PAGES);
	vcpus_resume(b.vcpus);
}

static void look(uint64_t page, uint64_t pages)
{
	(void)page;
	(void)pages;
	(void)scan_step(b.scan);
}

static bool any(void *ctx, uint64_t entry)
{
	(void)ctx;
	(void)entry;
	return true;
}

/* Contents stay, and writers run: who touches a page gets it back. */
static void reclaim(uint64_t page, uint64_t pages)
{
	uint64_t looked;
	int r = b.reclaims ? ram_reclaim(b.ram, 0, page, pages, any, NULL, &looked) : 0;

	REQUIRE(r == 0 || r == -EDQUOT);
}

/* ---- the churn -------------------------------------------------------------------------------- */

static struct churn {
	const char *name;
	void (*operation)(uint64_t page, uint64_t pages);
	unsigned per_1024;
	uint64_t count;
} churns[] = {
	{ "disk read", read_image, 280, 0 }, { "overlay", map_overlay, 260, 0 }, { "zap", zap, 160, 0 },
	{ "look", look, 80, 0 },	     { "reclaim", reclaim, 40, 0 },
	{ "discard", discard, 120, 0 },	     { "settle", settle, 40, 0 },	 { "frozen", settle_frozen, 30, 0 },
	{ "privatize", privatize, 4, 0 },
	{ "reconcile", reconcile, 6, 0 },    { "detach", detach, 4, 0 },
};
#define CHURNS (sizeof churns / sizeof churns[0])

static void churn_once(void)
{
	uint64_t at = random_below(1024), pages = 2 + random_below(RUN_PAGES_MAX - 1);
	uint64_t page = random_below(RAM_PAGES - pages);

	for (size_t i = 0; i < CHURNS; i++) {
		if (at < churns[i].per_1024) {
			churns[i].operation(page, pages);
			churns[i].count++;
			return;
		}
		at -= churns[i].per_1024;
	}
}

static void start_touching(void)
{
	for (unsigned cpu = 0; cpu < VCPUS; cpu++) {
		const struct vcpu_job job = { .program = VCPU_TOUCH,
					      .pages = RAM_PAGES,
					      .touches = UINT64_MAX,
					      .random_seed = cpu + 1,
					      .full_per_256 = 32,
					      .write_per_256 = 16,
					      .poke_per_256 = 64 };

		REQUIRE(vcpu_start(b.vcpus, cpu, &job) == 0);
	}
}

static uint64_t count_touches(bool *ret_ended)
{
	uint64_t touches = 0;

	for (unsigned cpu = 0; cpu < VCPUS; cpu++) {
		struct vcpu_counts counts;
		struct vcpu_report report;

		vcpu_peek(b.vcpus, cpu, &counts);
		touches += counts.touches;
		*ret_ended |= vcpu_wait(b.vcpus, cpu, 0, &report) != -ETIMEDOUT;
	}
	return touches;
}

static void stop_touching(void)
{
	uint64_t words = 0, touches = 0;
	bool good = true;

	for (unsigned cpu = 0; cpu < VCPUS; cpu++)
		vcpu_stop(b.vcpus, cpu);
	for (unsigned cpu = 0; cpu < VCPUS; cpu++) {
		struct vcpu_report report;

		REQUIRE(vcpu_wait(b.vcpus, cpu, WAIT_MS, &report) == 0);
		vcpu_report_print(stdout, cpu, &report);
		good &= report.outcome == VCPU_STOPPED || report.outcome == VCPU_DONE;
		words += report.counts.words;
		touches += report.counts.touches;
	}
	REQUIRE(good);
	printf("%" PRIu64 " touches, %" PRIu64 " words checked, 0 wrong\n", touches, words);
}

static void report_changes(void)
{
	struct ram_counts c;

	for (size_t i = 0; i < CHURNS; i++) {
		REQUIRE(churns[i].count > 0);
		printf("  %-10s %8" PRIu64 " times\n", churns[i].name, churns[i].count);
	}
	ram_get_counts(b.ram, &c);
	printf("  %" PRIu64 " pages settled, %" PRIu64 " mappings of %" PRIu64 " allowed, %" PRIu64
	       " bytes shortcut of %" PRIu64 "\n",
	       b.settled, c.maps + c.other_maps, c.budget_maps, stat_get(&b.stats.volumes[0].bytes_shortcut),
	       stat_get(&b.stats.volumes[0].bytes_asked));
	REQUIRE(b.settled > 0 && stat_get(&b.stats.volumes[0].bytes_shortcut) > 0);
	REQUIRE(c.maps + c.other_maps <= c.budget_maps);
}

/* ---- what the vCPUs use ------------------------------------------------------------------------- */

static int stop_vcpus(void *ctx)
{
	(void)ctx;
	vcpus_pause(b.vcpus);
	return 0;
}

static void resume_vcpus(void *ctx)
{
	(void)ctx;
	vcpus_resume(b.vcpus);
}

static void scan_passes(uint64_t passes)
{
	struct scan_report report;

	do {
		usleep((useconds_t)scan_step(b.scan));
		scan_get_report(b.scan, &report);
	} while (report.passes < passes);
}

/* A vCPU uses the hot pages for so many passes at this period. Returns the pages that were found written. */
static uint64_t use_hot(uint64_t period_us, uint64_t passes, uint8_t write_per_256)
{
	const struct vcpu_job job = { .program = VCPU_TOUCH, .pages = HOT_PAGES, .touches = UINT64_MAX, .random_seed = 7,
				      .full_per_256 = 1, .write_per_256 = write_per_256 };
	struct vcpu_report report;
	struct scan_report before, after;

	scan_get_report(b.scan, &before);
	scan_set_period(b.scan, period_us); /* another one: all is new */
	REQUIRE(vcpu_start(b.vcpus, 0, &job) == 0);
	scan_passes(before.passes + passes);
	vcpu_stop(b.vcpus, 0);
	REQUIRE(vcpu_wait(b.vcpus, 0, WAIT_MS, &report) == 0 && report.outcome == VCPU_STOPPED);
	scan_get_report(b.scan, &after);
	return after.written - before.written;
}

/* Accesses that no page table of this process has seen: they fault through it all the same. */
static void classify(void)
{
	const struct scan_freezer freezer = { stop_vcpus, resume_vcpus, NULL };
	bool sees_writes = os_features_get()->uffd_features & OS_UFFD_WP_ASYNC && os_features_get()->pagemap_scan;
	uint64_t hot = 0, cold = 0, read, written;

	for (uint64_t page = 0; page < RAM_PAGES; page++) /* all of it has been used once */
		*(volatile uint8_t *)hva_of(page) = 0;
	REQUIRE(scan_create(b.ram, &freezer, &b.scan) == 0);
	read = use_hot(LOOK_US + 1, 3, 0);
	written = use_hot(LOOK_US, 4, 128);
	printf("of %d pages %" PRIu64 " were found written while a vCPU read them, and %" PRIu64 " while it wrote its own\n",
	       HOT_PAGES, read, written);
	REQUIRE(read == 0 && (written >= HOT_PAGES / 4) == sees_writes); /* a third is its own */
	for (uint64_t page = 0; page < RAM_PAGES; page++) {
		enum activity_class is = activity_class_of(ram_activity(b.block, page));

		hot += page < HOT_PAGES && is == CLASS_HOT;
		cold += page >= HOT_PAGES && is >= CLASS_COLD;
	}
	printf("%" PRIu64 " of %d pages that a vCPU uses are hot, %" PRIu64 " of %d others cold\n", hot, HOT_PAGES, cold,
	       RAM_PAGES - HOT_PAGES);
	REQUIRE(hot * 100 >= HOT_PAGES * 95 && cold * 100 >= (RAM_PAGES - HOT_PAGES) * 95);
	scan_set_period(b.scan, CHURN_LOOK_US);
}

static void report_scan(void)
{
	struct scan_report report;

	scan_get_report(b.scan, &report);
	printf("  %" PRIu64 " passes of the scan, %" PRIu64 " pages zapped, %" PRIu64 " came, %" PRIu64 " copies settled\n",
	       report.passes, report.sampled, report.refaults, report.settled);
	REQUIRE(report.passes > 4 && report.refaults > 1000 && report.settled > 0);
	scan_destroy(b.scan);
}

/* ---- set-up ----------------------------------------------------------------------------------- */

static void make_image(struct image *image, const char *name, uint64_t kind)
{
	uint64_t words[GUEST_PAGE_WORDS];
	int fd;

	snprintf(image->path, sizeof image->path, "%.40s/%s", b.dir, name);
	image->kind = kind;
	fd = open(image->path, O_CREAT | O_WRONLY | O_EXCL, 0600);
	for (uint64_t block = 0; block < IMAGE_PAGES; block++) {
		contents_fill(words, contents_seed(kind, block));
		REQUIRE(write(fd, words, sizeof words) == (ssize_t)sizeof words);
	}
	close(fd);
	image->fd = open(image->path, O_RDONLY | O_CLOEXEC);
	REQUIRE(image->fd >= 0);
}

static void make_ram(void)
{
	b.memfd = memfd_create("test-core", MFD_CLOEXEC);
	REQUIRE(b.memfd >= 0 && !ftruncate(b.memfd, (off_t)RAM_PAGES * GUEST_PAGE_BYTES));
	b.hva = mmap(NULL, (size_t)RAM_PAGES * GUEST_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, b.memfd, 0);
	REQUIRE(b.hva != MAP_FAILED && !madvise(b.hva, (size_t)RAM_PAGES * GUEST_PAGE_BYTES, MADV_DONTFORK));
	REQUIRE(vcpus_attach(b.vcpus, 0, b.hva, RAM_PAGES) == 0);
	for (uint64_t page = 0; page < RAM_PAGES; page += CHUNK_PAGES)
		vcpus_set_owner(b.vcpus, page, CHUNK_PAGES, (unsigned)(page / CHUNK_PAGES % VCPUS));
}

static void make_engine(void)
{
	struct volume_options options = { .tracks_dir = b.dir, .lease_signal = SIGRTMIN + 1,
					  .lease_tid = (pid_t)syscall(SYS_gettid) };
	int file;

	REQUIRE(ram_create(BUDGET_MAPS, &b.ram) == 0);
	REQUIRE(volumes_create(b.ram, &options, &b.stats, &b.volumes) == 0);
	ram_lock(b.ram);
	REQUIRE(ram_add_block(b.ram, "ram", b.hva, RAM_PAGES, b.memfd, 0, &b.block) == 0);
	ram_remember_advice(b.ram, b.hva, (size_t)RAM_PAGES * GUEST_PAGE_BYTES, MADV_DONTFORK);
	file = ram_add_file(b.ram, b.mapped_image.fd, IMAGE_PAGES, NULL);
	ram_unlock(b.ram);
	REQUIRE(file >= 0);
	b.mapped_file = (unsigned)file;
}

/* A page that packs badly goes there as it is. */
static void make_store(void)
{
	int fd = os_memfd_create("test-core-store", 0, false);

	b.reclaims = mask_server_start(&b.server, b.ram) == 0;
	if (b.reclaims)
		REQUIRE(ram_reclaim_open(b.ram, fd, (uint64_t)RAM_PAGES * GUEST_PAGE_BYTES, false) == 0);
	else
		printf("no memory is given back: no userfaultfd for the kernel's faults\n");
}

static void report_reclaim(void)
{
	struct ram_reclaim_counts c;

	ram_get_reclaim_counts(b.ram, &c);
	printf("  %" PRIu64 " pages given back to a store, %" PRIu64 " came back; zeros %" PRIu64 ", used meanwhile %" PRIu64
	       "\n", c.spilled, c.returned, c.zeros, c.left_touched);
	REQUIRE(!b.reclaims || (c.spilled > 100 && c.returned > 0));
	REQUIRE(!b.server.error);
	if (b.reclaims)
		mask_server_stop(&b.server);
}

static void remove_files(void)
{
	char command[128];

	snprintf(command, sizeof command, "rm -rf '%s'", b.dir);
	(void)!system(command);
}

int main(int argc, char **argv)
{
	uint64_t touches = argc > 1 ? strtoull(argv[1], NULL, 10) : 10000000;
	int r = vcpus_create(VCPUS, RAM_PAGES, &b.vcpus);
	uint64_t changes = argc > 2 ? strtoull(argv[2], NULL, 10) : 10000, changed = 0;
	bool ended = false;

	if (r && r != -EINVAL && r != -ENOMEM) {
		printf("skipped: no bare vCPU can run here: %s\n", strerror(-r));
		return 77;
	}
	REQUIRE(r == 0);
	setvbuf(stdout, NULL, _IOLBF, 0);
	b.random = 42;
	strcpy(b.dir, "/var/tmp/latent-core-XXXXXX");
	REQUIRE(mkdtemp(b.dir));
	atexit(remove_files);
	make_image(&b.read_image, "read", 1);
	make_image(&b.mapped_image, "mapped", 2);
	make_ram();
	make_engine();

	classify();
	make_store();
	start_touching();
	for (; !ended && (count_touches(&ended) < touches || changed < changes); changed++)
		churn_once();
	stop_touching();
	check_in_pause(0, RAM_PAGES);
	report_changes();
	report_scan();
	report_reclaim();
	vcpus_destroy(b.vcpus);
	return 0;
}
