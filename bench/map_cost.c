/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * map_cost [--json] FILE [ROUNDS]: what shortcut reads and the engine's transitions cost by the length
 * of the run, beside a read of the same pages; FILE (at least 64 MiB) is brought into the page cache
 * first.
 *
 *   shortcut         volumes_read into base pages that hold nothing, with the options that VMs have:
 *                    likelihood (another VM has read it all), cost model, residency, mapping, tracking
 *   map, untouched   the mapping alone, with all its accounting (volume_map: range lock, entries, marks,
 *                    tracking), over base pages that hold nothing
 *   map, touched     the same over base pages that the guest has written: they are given back
 *   map, overlay     the same over an overlay of other pages
 *   first look       the guest's first access to each page of such a mapping
 *   read, untouched  pread of the pages from the page cache into base pages that hold nothing
 *   read, touched    the same into pages that the guest has written
 *
 * Every page that was mapped or read is compared with the file. Figures are microseconds for a run:
 * the median of all operations, with the 10th and 90th percentile beside it. Of the shortcut reads it
 * also says how many were mapped: the cost model decides, by what it has measured.
 *
 * Exit status: 0, 1 contents wrong or a call failed, 2 usage.
 */
#include "core/ram.h"
#include "os/os.h"
#include "volume/track.h"
#include "volume/volume.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define OPERATIONS 200u   /* of one kind and length in a round */
#define STRIDE_PAGES 80u  /* runs are apart, in RAM and in the file: no two mappings join */
#define RAM_PAGES (OPERATIONS * STRIDE_PAGES)
#define MIN_FILE_PAGES 16384u
#define DEFAULT_ROUNDS 9u
#define MAX_ROUNDS 1000u
#define SHARE_THRESHOLD 0.1 /* as of `latent run` */

static const unsigned lengths[] = { 1, 2, 4, 8, 12, 16, 32, 64 };
#define LENGTHS (sizeof lengths / sizeof lengths[0])

enum kind {
	SHORTCUT,
	MAP_UNTOUCHED,
	MAP_TOUCHED,
	MAP_OVERLAY,
	FIRST_LOOK,
	READ_UNTOUCHED,
	READ_TOUCHED,
	KINDS
};

static const struct {
	const char *key, *title;
} kinds[KINDS] = {
	[SHORTCUT] = { "shortcut", "shortcut" },
	[MAP_UNTOUCHED] = { "map_untouched", "map, untouched" },
	[MAP_TOUCHED] = { "map_touched", "map, touched" },
	[MAP_OVERLAY] = { "map_overlay", "map, overlay" },
	[FIRST_LOOK] = { "first_look", "first look" },
	[READ_UNTOUCHED] = { "read_untouched", "read, untouched" },
	[READ_TOUCHED] = { "read_touched", "read, touched" },
};

struct rig {
	int file_fd, memfd;
	uint64_t file_pages;
	const uint8_t *file; /* a view of it, to compare with */
	uint8_t *hva;
	struct ram *ram;
	struct ram_block *block;
	char tracks_dir[40];
	struct vm_stats stats;
	struct volumes *volumes;
	struct volume *volume;
	uint64_t maps; /* by volume_map */
	struct track *other_vm; /* that has read the whole file */
	unsigned shift;      /* moves the file's pages from one use to the next */
	unsigned rounds;
	uint64_t checked_pages, wrong_pages;
	uint64_t shortcut_reads;
	double *samples[KINDS][LENGTHS];
	size_t counts[KINDS][LENGTHS];
};

static int set_up(struct rig *rig, const char *path);
static void tear_down(struct rig *rig);
static int measure(struct rig *rig);
static int measure_length(struct rig *rig, size_t length);
static int map_all(struct rig *rig, size_t length, enum kind kind);
static int read_all(struct rig *rig, size_t length, enum kind kind);
static ssize_t read_run(struct rig *rig, enum kind kind, void *hva, size_t bytes, uint64_t file_page);
static void look_at_all(struct rig *rig, size_t length);
static void compare_all(struct rig *rig, unsigned pages);
static void touch_base(struct rig *rig);
static int clear(struct rig *rig);
static uint64_t mapped_reads(const struct rig *rig);
static void sort(struct rig *rig);
static void print_table(const struct rig *rig);
static void print_json(const struct rig *rig);

int main(int argc, char **argv)
{
	bool json = argc > 1 && !strcmp(argv[1], "--json");
	static struct rig rig = { .rounds = DEFAULT_ROUNDS };
	int r;

	argv += json;
	argc -= json;
	if (argc == 3)
		rig.rounds = (unsigned)strtoul(argv[2], NULL, 10);
	if (argc < 2 || argc > 3 || rig.rounds < 1 || rig.rounds > MAX_ROUNDS) {
		fprintf(stderr, "usage: map_cost [--json] FILE [ROUNDS]\n");
		return 2;
	}
	r = set_up(&rig, argv[1]);
	if (!r)
		r = measure(&rig);
	tear_down(&rig);
	if (r) {
		fprintf(stderr, "map_cost: %s: %s\n", argv[1], strerror(-r));
		return 1;
	}
	sort(&rig);
	if (json)
		print_json(&rig);
	else
		print_table(&rig);
	return rig.wrong_pages ? 1 : 0;
}

/* ---- guest RAM and a file, as the agent has them --------------------------------------------- */

static int open_file(struct rig *rig, const char *path)
{
	struct stat st;

	rig->file_fd = open(path, O_RDONLY | O_CLOEXEC);
	if (rig->file_fd < 0 || fstat(rig->file_fd, &st))
		return -errno;
	rig->file_pages = (uint64_t)st.st_size >> OS_PAGE_SHIFT;
	if (rig->file_pages < MIN_FILE_PAGES)
		return -EFBIG;
	rig->file = os_view_file(rig->file_fd, os_bytes(rig->file_pages), false);
	return rig->file ? 0 : -ENOMEM;
}

static int fill_page_cache(const struct rig *rig)
{
	size_t chunk_bytes = 1u << 20;
	void *chunk = malloc(chunk_bytes);
	ssize_t n = chunk ? 1 : -1;

	for (off_t at = 0; n > 0; at += n)
		n = pread(rig->file_fd, chunk, chunk_bytes, at);
	n = n < 0 ? -errno : 0;
	free(chunk);
	return (int)n;
}

static int add_ram(struct rig *rig)
{
	int r;

	rig->memfd = os_memfd_create("map_cost", os_bytes(RAM_PAGES), false);
	if (rig->memfd < 0)
		return rig->memfd;
	rig->hva = mmap(NULL, os_bytes(RAM_PAGES), PROT_READ | PROT_WRITE, MAP_SHARED, rig->memfd, 0);
	if (rig->hva == MAP_FAILED)
		return -errno;
	r = ram_create(os_max_maps(), &rig->ram);
	if (r)
		return r;
	ram_lock(rig->ram);
	r = ram_add_block(rig->ram, "map_cost", rig->hva, RAM_PAGES, rig->memfd, 0, &rig->block);
	if (!r) /* QEMU's own mark: each new mapping has to get it. */
		ram_remember_advice(rig->ram, rig->hva, os_bytes(RAM_PAGES), MADV_DONTFORK);
	ram_unlock(rig->ram);
	return r;
}

/* Tracking structures are where those of VMs are: in memory. */
static int add_volumes(struct rig *rig)
{
	struct volume_options options = {
		.share_threshold = SHARE_THRESHOLD,
		.trust_images = true, /* wherever the file is */
		.tracks_dir = rig->tracks_dir,
		.lease_signal = SIGURG,
		.lease_tid = gettid(),
	};
	struct stat st;
	int r;

	strcpy(rig->tracks_dir, "/dev/shm/latent-map-cost-XXXXXX");
	if (!mkdtemp(rig->tracks_dir)) {
		rig->tracks_dir[0] = 0;
		return -errno;
	}
	if (fstat(rig->file_fd, &st))
		return -errno;
	r = track_open(rig->tracks_dir, st.st_dev, st.st_ino, rig->file_pages, &rig->other_vm);
	if (r)
		return r;
	track_note_read(rig->other_vm, 0, rig->file_pages);
	r = volumes_create(rig->ram, &options, &rig->stats, &rig->volumes);
	if (r)
		return r;
	rig->volume = volumes_attach(rig->volumes, rig->file_fd);
	return rig->volume ? 0 : -ENOMEM;
}

/* Whatever of it has been set up; the rest goes with the process. */
static void tear_down(struct rig *rig)
{
	if (rig->volume)
		volume_put(rig->volume);
	if (rig->volumes && !clear(rig))
		volumes_destroy(rig->volumes);
	track_close(rig->other_vm);
	if (rig->tracks_dir[0])
		rmdir(rig->tracks_dir);
}

static int add_samples(struct rig *rig)
{
	for (size_t k = 0; k < KINDS; k++) {
		for (size_t i = 0; i < LENGTHS; i++) {
			rig->samples[k][i] = calloc((size_t)rig->rounds * OPERATIONS, sizeof(double));
			if (!rig->samples[k][i])
				return -ENOMEM;
		}
	}
	return 0;
}

static int set_up(struct rig *rig, const char *path)
{
	int r = open_file(rig, path);

	if (!r)
		r = fill_page_cache(rig);
	if (!r)
		r = add_ram(rig);
	if (!r)
		r = add_volumes(rig);
	return r ? r : add_samples(rig);
}

/* ---- measuring -------------------------------------------------------------------------------- */

static int measure(struct rig *rig)
{
	int r = 0;

	/* The first round warms up and is thrown away. */
	for (unsigned round = 0; !r && round <= rig->rounds; round++) {
		for (size_t i = 0; !r && i < LENGTHS; i++)
			r = measure_length(rig, i);
		if (round == 0)
			memset(rig->counts, 0, sizeof rig->counts);
	}
	return r;
}

/* All kinds in turn, so that what disturbs the machine disturbs them all. */
static int measure_length(struct rig *rig, size_t length)
{
	int r = clear(rig);

	if (!r)
		r = read_all(rig, length, SHORTCUT);
	if (r)
		return r;
	compare_all(rig, lengths[length]);
	r = clear(rig);
	if (!r)
		r = map_all(rig, length, MAP_UNTOUCHED);
	if (r)
		return r;
	look_at_all(rig, length);
	compare_all(rig, lengths[length]);
	r = map_all(rig, length, MAP_OVERLAY);
	compare_all(rig, lengths[length]);
	if (!r)
		r = clear(rig);
	if (!r)
		r = read_all(rig, length, READ_UNTOUCHED);
	compare_all(rig, lengths[length]);
	touch_base(rig);
	if (!r)
		r = read_all(rig, length, READ_TOUCHED);
	compare_all(rig, lengths[length]);
	touch_base(rig);
	if (!r)
		r = map_all(rig, length, MAP_TOUCHED);
	compare_all(rig, lengths[length]);
	return r;
}

static double now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static void add_sample(struct rig *rig, enum kind kind, size_t length, double us)
{
	rig->samples[kind][length][rig->counts[kind][length]++] = us;
}

static uint64_t file_page_of(const struct rig *rig, unsigned operation)
{
	return ((uint64_t)operation * STRIDE_PAGES + rig->shift) % (rig->file_pages - STRIDE_PAGES);
}

static int map_all(struct rig *rig, size_t length, enum kind kind)
{
	rig->shift += 1 + STRIDE_PAGES / 2;
	for (unsigned i = 0; i < OPERATIONS; i++) {
		double start_us = now_us();
		int r;

		r = volume_map(rig->volume, rig->block, (uint64_t)i * STRIDE_PAGES, lengths[length],
			       file_page_of(rig, i));
		add_sample(rig, kind, length, now_us() - start_us);
		if (r)
			return r;
		rig->maps++;
	}
	return 0;
}

static int read_all(struct rig *rig, size_t length, enum kind kind)
{
	rig->shift += 1 + STRIDE_PAGES / 2;
	for (unsigned i = 0; i < OPERATIONS; i++) {
		void *hva = rig->hva + os_bytes((uint64_t)i * STRIDE_PAGES);
		size_t bytes = os_bytes(lengths[length]);
		double start_us = now_us();
		ssize_t n = read_run(rig, kind, hva, bytes, file_page_of(rig, i));

		add_sample(rig, kind, length, now_us() - start_us);
		if (n != (ssize_t)bytes)
			return n < 0 ? (int)n : -EIO;
	}
	return 0;
}

static ssize_t read_run(struct rig *rig, enum kind kind, void *hva, size_t bytes, uint64_t file_page)
{
	off_t offset = (off_t)os_bytes(file_page);

	if (kind != SHORTCUT) {
		ssize_t n = pread(rig->file_fd, hva, bytes, offset);

		return n < 0 ? -errno : n;
	}
	rig->shortcut_reads++;
	return volumes_read(rig->volumes, rig->file_fd, &(struct iovec){ hva, bytes }, 1, offset);
}

static void look_at_all(struct rig *rig, size_t length)
{
	for (unsigned i = 0; i < OPERATIONS; i++) {
		const volatile uint8_t *hva = rig->hva + os_bytes((uint64_t)i * STRIDE_PAGES);
		double start_us = now_us();

		for (unsigned page = 0; page < lengths[length]; page++)
			(void)hva[os_bytes(page)];
		add_sample(rig, FIRST_LOOK, length, now_us() - start_us);
	}
}

static void compare_all(struct rig *rig, unsigned pages)
{
	for (unsigned i = 0; i < OPERATIONS; i++) {
		const uint8_t *hva = rig->hva + os_bytes((uint64_t)i * STRIDE_PAGES);
		const uint8_t *wanted = rig->file + os_bytes(file_page_of(rig, i));

		for (unsigned page = 0; page < pages; page++)
			rig->wrong_pages += memcmp(hva + os_bytes(page), wanted + os_bytes(page),
						   OS_PAGE_BYTES) != 0;
		rig->checked_pages += pages;
	}
}

/* ---- between ---------------------------------------------------------------------------------- */

/* The guest has written all of base. */
static void touch_base(struct rig *rig)
{
	memset(rig->hva, 0xa5, os_bytes(RAM_PAGES));
}

/* All is base and holds nothing. */
static int clear(struct rig *rig)
{
	int r;

	ram_lock(rig->ram);
	r = ram_discard(rig->ram, rig->block, 0, RAM_PAGES);
	ram_unlock(rig->ram);
	return r;
}

static uint64_t mapped_reads(const struct rig *rig) { return stat_get(&rig->stats.volumes[0].maps) - rig->maps; }

/* ---- telling ---------------------------------------------------------------------------------- */

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static void sort(struct rig *rig)
{
	for (size_t k = 0; k < KINDS; k++)
		for (size_t i = 0; i < LENGTHS; i++)
			qsort(rig->samples[k][i], rig->counts[k][i], sizeof(double), by_value);
}

static double quantile(const struct rig *rig, size_t kind, size_t length, unsigned percent)
{
	return rig->samples[kind][length][rig->counts[kind][length] * percent / 100];
}

static void print_table(const struct rig *rig)
{
	printf("%5s", "pages");
	for (size_t k = 0; k < KINDS; k++)
		printf("  %21s", kinds[k].title);
	printf("   us: median (10 %%-90 %%)\n");
	for (size_t i = 0; i < LENGTHS; i++) {
		printf("%5u", lengths[i]);
		for (size_t k = 0; k < KINDS; k++)
			printf("  %7.2f (%5.1f-%5.1f)", quantile(rig, k, i, 50), quantile(rig, k, i, 10),
			       quantile(rig, k, i, 90));
		printf("\n");
	}
	printf("%ju of %ju shortcut reads were mapped\n", (uintmax_t)mapped_reads(rig),
	       (uintmax_t)rig->shortcut_reads);
	printf("%ju pages compared, %ju wrong\n", (uintmax_t)rig->checked_pages, (uintmax_t)rig->wrong_pages);
}

static void print_json(const struct rig *rig)
{
	printf("{\"checked_pages\": %ju, \"wrong_pages\": %ju, \"shortcut_reads\": %ju, "
	       "\"mapped_reads\": %ju, "
	       "\"lengths_pages\": [",
	       (uintmax_t)rig->checked_pages, (uintmax_t)rig->wrong_pages,
	       (uintmax_t)rig->shortcut_reads, (uintmax_t)mapped_reads(rig));
	for (size_t i = 0; i < LENGTHS; i++)
		printf("%s%u", i ? ", " : "", lengths[i]);
	printf("]");
	for (size_t k = 0; k < KINDS; k++) {
		printf(", \"%s_us\": [", kinds[k].key);
		for (size_t i = 0; i < LENGTHS; i++)
			printf("%s[%.3f, %.3f, %.3f]", i ? ", " : "", quantile(rig, k, i, 10),
			       quantile(rig, k, i, 50), quantile(rig, k, i, 90));
		printf("]");
	}
	printf("}\n");
}
