/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * A block domain and its lanes as front ends see them: data in all shapes, drivers and front ends that break the
 * rules, lanes that are killed.
 */
#include "blk_front.h"

#include "blk/queue.h"
#include "blk/vhost_user.h"
#include "blkd/domain.h"
#include "os/os.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define RAM_BYTES (32ull << 20)
#define IMAGE_BYTES (16u << 20)
#define SECTOR 512u
#define WAIT_MS 20000

/* ---- a domain, in a process of its own ----------------------------------------------------------------- */

struct rig {
	char dir[64], socket[80], path[80];
	struct image image;
	int listener;
	unsigned lanes;
	pid_t domain;
	struct front front;
};

static void fill_image(const struct rig *r)
{
	uint64_t *sectors = calloc(1, IMAGE_BYTES);
	int fd = open(r->path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	for (size_t i = 0; i < IMAGE_BYTES / sizeof *sectors; i++)
		sectors[i] = i;
	assert_true(fd >= 0);
	assert_int_equal(os_write_all(fd, sectors, IMAGE_BYTES, 0), 0);
	close(fd);
	free(sectors);
}

/* The process id of a lane, the oldest first; 0: there is none. */
static pid_t nth_lane(const struct rig *r, unsigned n)
{
	char path[64];
	int pid = 0;
	FILE *f;

	snprintf(path, sizeof path, "/proc/%d/task/%d/children", r->domain, r->domain);
	f = fopen(path, "re");
	assert_non_null(f);
	for (unsigned i = 0; i <= n; i++)
		if (fscanf(f, "%d", &pid) != 1)
			pid = 0;
	fclose(f);
	return pid;
}

static pid_t lane_of(const struct rig *r) { return nth_lane(r, 0); }

static void start_domain(struct rig *r, bool readonly)
{
	struct sockaddr_un at = { .sun_family = AF_UNIX };
	char why[IMAGE_WHY_BYTES];

	assert_int_equal(image_open(r->path, NULL, readonly, &r->image, why), 0);
	snprintf(at.sun_path, sizeof at.sun_path, "%s", r->socket);
	unlink(r->socket);
	r->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	assert_int_equal(bind(r->listener, (struct sockaddr *)&at, sizeof at), 0);
	assert_int_equal(listen(r->listener, 8), 0);
	r->domain = fork();
	if (!r->domain) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		_exit(domain_serve(r->listener, -1, &r->image, r->lanes, NULL, NULL) ? 1 : 0);
	}
	close(r->listener);
	close(r->image.fd); /* the lock is the domain's */
	while (!nth_lane(r, r->lanes - 1))
		usleep(1000);
}

static void end_domain(struct rig *r)
{
	int status;

	kill(r->domain, SIGTERM);
	assert_int_equal(waitpid(r->domain, &status, 0), r->domain);
	assert_true(WIFEXITED(status) && !WEXITSTATUS(status));
}

static int set_up_image(void **state, const char *parent, bool readonly, unsigned lanes)
{
	struct rig *r = calloc(1, sizeof *r);

	r->lanes = lanes;
	snprintf(r->dir, sizeof r->dir, "%s/test-lane-XXXXXX", parent);
	assert_non_null(mkdtemp(r->dir));
	snprintf(r->socket, sizeof r->socket, "%s/socket", r->dir);
	snprintf(r->path, sizeof r->path, "%s/image", r->dir);
	fill_image(r);
	start_domain(r, readonly);
	assert_int_equal(front_init(&r->front, RAM_BYTES, 2), 0);
	*state = r;
	return 0;
}

static int set_up(void **state) { return set_up_image(state, "/tmp", false, 1); }

static int set_up_in_memory(void **state) { return set_up_image(state, "/dev/shm", false, 1); }

static int set_up_readonly(void **state) { return set_up_image(state, "/tmp", true, 1); }

static int set_up_two_lanes(void **state) { return set_up_image(state, "/tmp", true, 2); }

static int tear_down(void **state)
{
	struct rig *r = *state;

	front_free(&r->front);
	end_domain(r);
	unlink(r->socket);
	unlink(r->path);
	rmdir(r->dir);
	free(r);
	return 0;
}

static void connect_front(struct rig *r, bool with_record)
{
	assert_int_equal(front_connect(&r->front, r->socket, with_record), 0);
}

/* ---- what it must do ------------------------------------------------------------------------------------- */

static uint64_t word_on_disk(uint64_t byte) { return byte / sizeof(uint64_t); }

static void assert_sectors(const struct rig *r, uint64_t gpa, uint64_t sector, uint32_t bytes)
{
	const uint64_t *words = (const uint64_t *)(r->front.ram + gpa);

	for (uint32_t i = 0; i < bytes / sizeof *words; i++)
		assert_int_equal(words[i], word_on_disk(sector * SECTOR) + i);
}

/* A domain that works serves this, whatever was done to it before. */
static void assert_serves(struct rig *r)
{
	struct front other;
	struct front_segment segment = { FRONT_DATA, 64 << 10 };

	assert_int_equal(front_init(&other, RAM_BYTES, 1), 0);
	assert_int_equal(front_connect(&other, r->socket, false), 0);
	assert_int_equal(front_do(&other, 0, VIRTIO_BLK_T_IN, 77, &segment, 1), VIRTIO_BLK_S_OK);
	for (uint32_t i = 0; i < segment.bytes / 8; i++)
		assert_int_equal(((uint64_t *)(other.ram + FRONT_DATA))[i],
				 word_on_disk(77 * SECTOR) + i);
	front_free(&other);
}

static void configuration_says_what_the_image_is(void **state)
{
	struct rig *r = *state;
	struct front_segment segment = { FRONT_DATA + 5, 20 };

	connect_front(r, false);
	assert_int_equal(r->front.config.capacity, IMAGE_BYTES / SECTOR);
	assert_true(r->front.features & 1ull << VIRTIO_BLK_F_FLUSH);
	assert_false(r->front.features & 1ull << VIRTIO_BLK_F_RO);
	assert_int_equal(front_do(&r->front, 0, VIRTIO_BLK_T_GET_ID, 0, &segment, 1), VIRTIO_BLK_S_OK);
	assert_string_equal((char *)r->front.ram + FRONT_DATA + 5, "image");
	assert_int_equal(front_do(&r->front, 0, 99, 0, &segment, 1), VIRTIO_BLK_S_UNSUPP);
}

/* Long and short, page by page and across, in order and scattered. */
static void reads_of_all_shapes_are_right(void **state)
{
	static const uint32_t lengths[] = { 512, 4096, 8192, 65536, 131072, 1u << 20, 3u << 20 };
	struct rig *r = *state;

	connect_front(r, false);
	for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
		for (uint32_t within = 0; within <= 1024; within += 512) {
			struct front_segment one = { FRONT_DATA + within, lengths[i] };

			memset(r->front.ram + FRONT_DATA, 0xee, lengths[i] + 8192);
			assert_int_equal(front_do(&r->front, i & 1, VIRTIO_BLK_T_IN, 5 + i, &one, 1), 0);
			assert_sectors(r, one.gpa, 5 + i, one.bytes);
			assert_int_equal(r->front.ram[one.gpa + one.bytes],
					 0xee); /* and not a byte more */
		}
	}
}

static void scattered_data_goes_where_it_belongs(void **state)
{
	struct front_segment segments[FRONT_SEGMENTS];
	struct rig *r = *state;
	uint64_t sector = 100;
	uint32_t bytes = 0;

	connect_front(r, false);
	for (uint32_t i = 0; i < FRONT_SEGMENTS; i++) {
		/* From the end to the beginning; every eighth is long. */
		segments[i].bytes = i % 8 == 7 ? 128u << 10 : 512u * (1 + i % 3);
		segments[i].gpa = FRONT_DATA + (FRONT_SEGMENTS - i) * (256ull << 10) + 512 * (i % 7);
		bytes += segments[i].bytes;
	}
	assert_int_equal(front_do(&r->front, 0, VIRTIO_BLK_T_IN, sector, segments, FRONT_SEGMENTS), 0);
	for (uint32_t i = 0; i < FRONT_SEGMENTS; i++) {
		assert_sectors(r, segments[i].gpa, sector, segments[i].bytes);
		sector += segments[i].bytes / SECTOR;
	}
	/* Written elsewhere, and read back in one piece. */
	assert_int_equal(front_do(&r->front, 0, VIRTIO_BLK_T_OUT, 9000, segments, FRONT_SEGMENTS), 0);
	segments[0] = (struct front_segment){ FRONT_DATA, bytes };
	memset(r->front.ram + FRONT_DATA, 0, bytes);
	assert_int_equal(front_do(&r->front, 1, VIRTIO_BLK_T_IN, 9000, segments, 1), 0);
	assert_sectors(r, FRONT_DATA, 100, bytes);
}

static void discards_zeroes_and_flushes_are_done(void **state)
{
	struct rig *r = *state;
	struct virtio_blk_discard_write_zeroes *ranges = (void *)(r->front.ram + FRONT_DATA);
	struct front_segment two = { FRONT_DATA, 2 * sizeof *ranges },
			     data = { FRONT_DATA + 8192, 32 * SECTOR };
	const uint8_t *bytes = r->front.ram + data.gpa;

	connect_front(r, false);
	for (uint32_t unmap = 0; unmap < 2; unmap++) {
		ranges[0] = (struct virtio_blk_discard_write_zeroes){ 201 + 100 * unmap, 3, unmap };
		ranges[1] = (struct virtio_blk_discard_write_zeroes){ 210 + 100 * unmap, 9, unmap };
		assert_int_equal(front_do(&r->front, 0, VIRTIO_BLK_T_WRITE_ZEROES, 0, &two, 1), 0);
		assert_int_equal(front_do(&r->front, 0, VIRTIO_BLK_T_IN, 200 + 100 * unmap, &data, 1),
				 0);
		assert_sectors(r, data.gpa, 200 + 100 * unmap, SECTOR);
		for (uint32_t i = 0; i < 3 * SECTOR; i++)
			assert_int_equal(bytes[SECTOR + i], 0);
		assert_sectors(r, data.gpa + 4 * SECTOR, 204 + 100 * unmap, 6 * SECTOR);
		for (uint32_t i = 0; i < 9 * SECTOR; i++)
			assert_int_equal(bytes[10 * SECTOR + i], 0);
		assert_sectors(r, data.gpa + 19 * SECTOR, 219 + 100 * unmap, 13 * SECTOR);
	}
	ranges[0] = (struct virtio_blk_discard_write_zeroes){ 400, 8, 0 };
	ranges[1] = (struct virtio_blk_discard_write_zeroes){ 500, 0, 0 };
	assert_int_equal(front_do(&r->front, 0, VIRTIO_BLK_T_DISCARD, 0, &two, 1), 0);
	assert_int_equal(front_do(&r->front, 0, VIRTIO_BLK_T_IN, 408, &data, 1), 0);
	assert_sectors(r, data.gpa, 408, data.bytes);
	assert_int_equal(front_do(&r->front, 0, VIRTIO_BLK_T_FLUSH, 0, NULL, 0), 0);
	ranges[1] = (struct virtio_blk_discard_write_zeroes){ IMAGE_BYTES / SECTOR - 1, 2, 0 };
	assert_int_equal(front_do(&r->front, 0, VIRTIO_BLK_T_DISCARD, 0, &two, 1), VIRTIO_BLK_S_IOERR);
}

static void a_readonly_image_is_served_to_many(void **state)
{
	struct rig *r = *state;
	struct front_segment segment = { FRONT_DATA, 4096 };

	connect_front(r, false);
	assert_true(r->front.features & 1ull << VIRTIO_BLK_F_RO);
	assert_int_equal(front_do(&r->front, 0, VIRTIO_BLK_T_OUT, 0, &segment, 1), VIRTIO_BLK_S_IOERR);
	assert_int_equal(front_do(&r->front, 0, VIRTIO_BLK_T_DISCARD, 0, &segment, 1),
			 VIRTIO_BLK_S_UNSUPP);
	assert_serves(r); /* beside it */
	assert_int_equal(front_do(&r->front, 0, VIRTIO_BLK_T_IN, 3, &segment, 1), VIRTIO_BLK_S_OK);
	assert_sectors(r, FRONT_DATA, 3, 4096);
}

/* More rings than a handful: each is guarded against a front end that cuts its memory. */
static void many_front_ends_are_served(void **state)
{
	enum { FRONTS = 24 };
	struct rig *r = *state;
	struct front *fronts = calloc(FRONTS, sizeof *fronts);
	struct front_segment segment = { FRONT_DATA, 4096 };

	for (uint32_t i = 0; i < FRONTS; i++) {
		assert_int_equal(front_init(&fronts[i], FRONT_DATA + (1 << 20), 4), 0);
		assert_int_equal(front_connect(&fronts[i], r->socket, true), 0);
	}
	for (uint32_t i = 0; i < 4 * FRONTS; i++) {
		struct front *f = &fronts[i / 4];

		assert_int_equal(front_do(f, i % 4, VIRTIO_BLK_T_IN, i, &segment, 1), VIRTIO_BLK_S_OK);
		assert_int_equal(*(uint64_t *)(f->ram + FRONT_DATA), word_on_disk(i * SECTOR));
	}
	for (uint32_t i = 0; i < FRONTS; i++)
		front_free(&fronts[i]);
	free(fronts);
}

/* Of guest RAM, in the lane's address space. */
static uint64_t mapped_bytes(const struct rig *r)
{
	unsigned long long from, to;
	char path[64], line[512];
	uint64_t sum = 0;
	FILE *f;

	snprintf(path, sizeof path, "/proc/%d/maps", lane_of(r));
	f = fopen(path, "re");
	assert_non_null(f);
	while (fgets(line, sizeof line, f))
		if (strstr(line, "/memfd:front-ram") && sscanf(line, "%llx-%llx", &from, &to) == 2)
			sum += to - from;
	fclose(f);
	return sum;
}

static void nothing_stays_mapped_but_the_rings(void **state)
{
	struct rig *r = *state;
	struct front_segment segment = { FRONT_DATA + 512, 1 << 20 }, id = { FRONT_DATA, 20 };
	uint64_t rings;

	connect_front(r, false);
	for (uint32_t queue = 0; queue < 2; queue++) /* both have been started */
		assert_int_equal(front_do(&r->front, queue, VIRTIO_BLK_T_GET_ID, 0, &id, 1), 0);
	rings = mapped_bytes(r);
	assert_in_range(rings, 2 * 3 * 4096, 2 * 3 * 8192); /* of two queues */
	for (int i = 0; i < 10; i++)
		assert_int_equal(front_do(&r->front, 0, VIRTIO_BLK_T_IN, 0, &segment, 1), 0);
	for (int ms = 0; mapped_bytes(r) > rings; ms += 10) {
		assert_in_range(ms, 0, WAIT_MS);
		usleep(10000);
	}
	assert_int_equal(mapped_bytes(r), rings);
}

/* Somebody else says where the lane runs: it goes there with its windows. */
static void a_lane_that_is_moved_goes_on(void **state)
{
	struct rig *r = *state;
	pid_t lane = lane_of(r);
	cpu_set_t all, one;

	sched_getaffinity(0, sizeof all, &all);
	if (CPU_COUNT(&all) < 2) {
		print_message("SKIP: this takes two CPUs\n");
		skip();
	}
	connect_front(r, false);
	for (int cpu = 0, moves = 0; moves < 40; cpu = (cpu + 1) % CPU_SETSIZE) {
		struct front_segment segment = { FRONT_DATA, 1 << 20 };

		if (!CPU_ISSET(cpu, &all))
			continue;
		CPU_ZERO(&one);
		CPU_SET(cpu, &one);
		assert_int_equal(sched_setaffinity(lane, sizeof one, &one), 0);
		memset(r->front.ram + FRONT_DATA, 0xee, segment.bytes);
		assert_int_equal(
			front_do(&r->front, 0, VIRTIO_BLK_T_IN, 100u * (unsigned)moves, &segment, 1), 0);
		assert_sectors(r, FRONT_DATA, 100u * (unsigned)moves, segment.bytes);
		sched_getaffinity(lane, sizeof all, &one);
		assert_true(CPU_COUNT(&one) == 1 && CPU_ISSET(cpu, &one));
		moves++;
	}
	assert_int_equal(lane_of(r), lane);
}

/* ---- reads of several machines --------------------------------------------------------------------------- */

static uint64_t bytes_from_storage(const struct rig *r)
{
	uint64_t sum = 0;

	for (unsigned n = 0; n < r->lanes; n++) {
		char path[64], line[64];
		unsigned long long bytes;
		FILE *f;

		snprintf(path, sizeof path, "/proc/%d/io", nth_lane(r, n));
		f = fopen(path, "re");
		assert_non_null(f);
		while (fgets(line, sizeof line, f))
			if (sscanf(line, "read_bytes: %llu", &bytes) == 1)
				sum += bytes;
		fclose(f);
	}
	return sum;
}

/* Nothing of the image is in memory; false: this file system does not let go of it. */
static bool forget_image(const struct rig *r)
{
	int fd = open(r->path, O_RDONLY | O_CLOEXEC);
	void *view = os_view_file(fd, IMAGE_BYTES, false);
	uint64_t resident;

	assert_non_null(view);
	fsync(fd);
	os_drop_cached(fd, 0, IMAGE_BYTES);
	resident = os_resident_pages(view, 0, IMAGE_BYTES / OS_PAGE_BYTES);
	os_unview_file(view, IMAGE_BYTES);
	close(fd);
	return !resident;
}

#define READ_BYTES (128u << 10)
#define READS 64u

static void ask_for(struct front *f, uint64_t from)
{
	for (uint16_t i = 0; i < READS; i++) {
		struct front_segment segment = { FRONT_DATA + i * READ_BYTES, READ_BYTES };

		front_request(f, 0, i, VIRTIO_BLK_T_IN, (from + i * READ_BYTES) / SECTOR, &segment, 1);
		front_offer(f, 0, i);
	}
	front_kick(f, 0);
}

/* Two machines, each with a lane of its own, ask for the same at the same time: storage is asked once. */
static void what_is_being_read_for_one_is_not_read_for_another(void **state)
{
	struct rig *r = *state;
	struct front other, *fronts[2] = { &r->front, &other };
	uint64_t before;
	uint16_t head;

	if (!forget_image(r)) {
		print_message("SKIP: the file system of /tmp keeps all of a file in memory\n");
		skip();
	}
	assert_int_equal(front_init(&other, RAM_BYTES, 1), 0);
	for (int i = 0; i < 2; i++)
		assert_int_equal(front_connect(fronts[i], r->socket, false), 0);
	before = bytes_from_storage(r);
	for (uint64_t from = 0; from < IMAGE_BYTES; from += READS * READ_BYTES) {
		for (int i = 0; i < 2; i++)
			ask_for(fronts[i], from);
		for (uint32_t i = 0; i < 2 * READS; i++) {
			assert_int_equal(front_wait(fronts[i & 1], 0, WAIT_MS, &head, NULL), 0);
			assert_int_equal(*front_status(fronts[i & 1], 0, head), VIRTIO_BLK_S_OK);
		}
		for (int i = 0; i < 2; i++)
			assert_int_equal(
				((uint64_t *)(fronts[i]->ram + FRONT_DATA))[READS * READ_BYTES / 8 - 1],
				word_on_disk(from + READS * READ_BYTES) - 1);
	}
	assert_in_range(bytes_from_storage(r) - before, IMAGE_BYTES, IMAGE_BYTES + IMAGE_BYTES / 16);
	front_free(&other);
}

/* ---- reconnecting ------------------------------------------------------------------------------------------ */

#define LEFT 100u /* more than a lane does at once */

/* Requests that a device had taken when it died, and one that it had not seen: each is done, once. */
static void what_a_predecessor_left_is_done_again(void **state)
{
	struct rig *r = *state;
	struct queue_record *record;
	bool seen[FRONT_QUEUE_SIZE] = { false };
	uint16_t head;

	connect_front(r, true);
	record = mmap(NULL, r->front.record_bytes, PROT_READ | PROT_WRITE, MAP_SHARED,
		      r->front.record_fd, 0);
	assert_ptr_not_equal(record, MAP_FAILED);
	front_disconnect(&r->front);
	queue_record_init(record, FRONT_QUEUE_SIZE);
	for (uint16_t i = 0; i <= LEFT; i++) {
		struct front_segment segment = { FRONT_DATA + i * 65536u, 4096 };

		head = (uint16_t)(LEFT - i); /* not in the order of their descriptors */
		front_request(&r->front, 0, head, VIRTIO_BLK_T_IN, 50u * i, &segment, 1);
		front_offer(&r->front, 0, head);
		record->entries[head].in_flight = i < LEFT; /* the last one was not taken yet */
		record->entries[head].counter = i;
	}
	connect_front(r, true);
	for (uint16_t i = 0; i <= LEFT; i++) {
		assert_int_equal(front_wait(&r->front, 0, WAIT_MS, &head, NULL), 0);
		assert_in_range(head, 0, LEFT);
		assert_false(seen[head]);
		seen[head] = true;
	}
	for (uint16_t i = 0; i <= LEFT; i++) {
		head = (uint16_t)(LEFT - i);
		assert_int_equal(*front_status(&r->front, 0, head), VIRTIO_BLK_S_OK);
		assert_sectors(r, FRONT_DATA + i * 65536u, 50u * i, 4096);
		assert_int_equal(record->entries[head].in_flight, 0);
	}
	assert_int_equal(front_wait(&r->front, 0, 200, &head, NULL), -ETIMEDOUT);
	munmap(record, r->front.record_bytes);
}

/* A driver that keeps its queue full writes numbers that only grow; lanes are killed under it. */
static void a_killed_lane_loses_nothing(void **state)
{
	enum { DEPTH = 32, KILLS = 5, BETWEEN = 500 };
	struct rig *r = *state;
	uint64_t *number[DEPTH], done = 0;
	struct front_segment segment[DEPTH];
	uint16_t head;

	connect_front(r, true);
	for (uint16_t i = 0; i < DEPTH; i++) {
		segment[i] = (struct front_segment){ FRONT_DATA + i * 131072ull, i % 2 ? 512 : 131072 };
		number[i] = (uint64_t *)(r->front.ram + segment[i].gpa);
		*number[i] = 1;
		front_request(&r->front, 0, i, VIRTIO_BLK_T_OUT, i * 256u, &segment[i], 1);
		front_offer(&r->front, 0, i);
	}
	front_kick(&r->front, 0);
	for (int kills = 0; kills <= KILLS; kills++) {
		pid_t lane = lane_of(r);

		for (uint32_t i = 0; i < BETWEEN; i++) {
			assert_int_equal(front_wait(&r->front, 0, WAIT_MS, &head, NULL), 0);
			assert_true(head < DEPTH);
			assert_int_equal(*front_status(&r->front, 0, head), VIRTIO_BLK_S_OK);
			++*number[head];
			done++;
			front_request(&r->front, 0, head, VIRTIO_BLK_T_OUT, head * 256u, &segment[head],
				      1);
			front_offer(&r->front, 0, head);
			front_kick(&r->front, 0);
		}
		if (kills == KILLS)
			break;
		assert_true(lane > 0);
		kill(lane, SIGKILL);
		front_disconnect(&r->front);
		while (lane_of(r) == lane || !lane_of(r))
			usleep(10000);
		connect_front(r, true);
	}
	for (uint16_t i = 0; i < DEPTH; i++) { /* what is still under way */
		assert_int_equal(front_wait(&r->front, 0, WAIT_MS, &head, NULL), 0);
		assert_int_equal(*front_status(&r->front, 0, head), VIRTIO_BLK_S_OK);
	}
	assert_int_equal(front_wait(&r->front, 0, 200, &head, NULL), -ETIMEDOUT); /* none twice */
	assert_int_equal(done, (KILLS + 1) * BETWEEN);
	for (uint16_t i = 0; i < DEPTH; i++) {
		struct front_segment back = { FRONT_DATA + (24ull << 20), 512 };

		assert_int_equal(front_do(&r->front, 1, VIRTIO_BLK_T_IN, i * 256u, &back, 1), 0);
		assert_int_equal(*(uint64_t *)(r->front.ram + back.gpa), *number[i]);
	}
}

/* ---- bad drivers -------------------------------------------------------------------------------------------- */

static struct vring_desc *desc_of(struct rig *r, uint16_t i) { return &r->front.queue[0].desc[i]; }

static void assert_stopped(struct rig *r)
{
	uint16_t head;

	assert_int_equal(front_wait(&r->front, 0, 200, &head, NULL), -ETIMEDOUT);
	front_disconnect(&r->front);
	assert_serves(r);
}

static void offer_and_stop(struct rig *r, uint16_t head)
{
	front_offer(&r->front, 0, head);
	front_kick(&r->front, 0);
	assert_stopped(r);
}

static void a_loop_stops_the_queue(void **state)
{
	struct rig *r = *state;

	connect_front(r, false);
	for (uint16_t i = 0; i < 3; i++)
		*desc_of(r, i) = (struct vring_desc){ FRONT_DATA, 16, VRING_DESC_F_NEXT,
						      (uint16_t)((i + 1) % 3) };
	offer_and_stop(r, 0);
}

static void a_head_that_is_not_there_stops_the_queue(void **state)
{
	connect_front(*state, false);
	offer_and_stop(*state, FRONT_QUEUE_SIZE);
}

static void more_requests_than_a_ring_holds_stop_the_queue(void **state)
{
	struct rig *r = *state;

	connect_front(r, false);
	r->front.queue[0].avail->idx = FRONT_QUEUE_SIZE + 1;
	front_kick(&r->front, 0);
	assert_stopped(r);
}

static void a_header_outside_memory_stops_the_queue(void **state)
{
	struct rig *r = *state;

	connect_front(r, false);
	*desc_of(r, 0) = (struct vring_desc){ RAM_BYTES - 8, 16, VRING_DESC_F_NEXT, 1 };
	*desc_of(r, 1) = (struct vring_desc){ FRONT_DATA, 513, VRING_DESC_F_WRITE, 0 };
	offer_and_stop(r, 0);
}

static void a_status_outside_memory_stops_the_queue(void **state)
{
	struct rig *r = *state;

	connect_front(r, false);
	memset(r->front.ram + FRONT_DATA, 0, 16);
	*desc_of(r, 0) = (struct vring_desc){ FRONT_DATA, 16, VRING_DESC_F_NEXT, 1 };
	*desc_of(r, 1) = (struct vring_desc){ RAM_BYTES - 512, 513, VRING_DESC_F_WRITE, 0 };
	offer_and_stop(r, 0);
}

static void an_indirect_table_outside_memory_stops_the_queue(void **state)
{
	struct rig *r = *state;

	connect_front(r, false);
	*desc_of(r, 0) = (struct vring_desc){ UINT64_MAX - 15, 32, VRING_DESC_F_INDIRECT, 0 };
	offer_and_stop(r, 0);
}

/* What the rings are sound for fails alone. */
static void data_outside_memory_or_disk_is_an_error(void **state)
{
	static const struct {
		uint64_t sector, gpa;
		uint32_t bytes;
	} wrong[] = {
		{ 0, RAM_BYTES - 512, 1024 },
		{ 0, 1ull << 40, 512 },
		{ 0, FRONT_DATA, 0xfffffe00 },
		{ IMAGE_BYTES / SECTOR, FRONT_DATA, 512 },
		{ IMAGE_BYTES / SECTOR - 1, FRONT_DATA, 1024 },
		{ UINT64_MAX, FRONT_DATA, 512 },
		{ 0, FRONT_DATA, 100 },
	};
	struct rig *r = *state;
	struct front_segment right = { FRONT_DATA, 4096 };

	connect_front(r, false);
	for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
		struct front_segment segment = { wrong[i].gpa, wrong[i].bytes };

		assert_int_equal(front_do(&r->front, 0, VIRTIO_BLK_T_IN, wrong[i].sector, &segment, 1),
				 VIRTIO_BLK_S_IOERR);
		assert_int_equal(front_do(&r->front, 0, VIRTIO_BLK_T_OUT, wrong[i].sector, &segment, 1),
				 VIRTIO_BLK_S_IOERR);
		assert_int_equal(front_do(&r->front, 0, VIRTIO_BLK_T_IN, 11, &right, 1),
				 VIRTIO_BLK_S_OK);
		assert_sectors(r, FRONT_DATA, 11, 4096);
	}
}

struct scribbler {
	struct rig *rig;
	_Atomic bool stop;
};

static uint64_t random_number(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

/* Rings, tables and headers change at any time, to what is nearly right and to what is not. */
static void *scribble(void *ctx)
{
	struct scribbler *s = ctx;
	uint64_t random = 88172645463325252;

	while (!s->stop) {
		uint64_t n = random_number(&random);
		struct front_queue *q = &s->rig->front.queue[0];

		switch (n % 4) {
		case 0:
			((volatile uint8_t *)q->desc)[n / 4 % (FRONT_QUEUE_SIZE * sizeof *q->desc)] =
				(uint8_t)(n >> 32);
			break;
		case 1:
			((volatile uint16_t *)q->avail->ring)[n / 4 % FRONT_QUEUE_SIZE] =
				(uint16_t)(n >> 32) % (FRONT_QUEUE_SIZE + 1);
			break;
		case 2:
			((volatile uint8_t *)
				 s->rig->front.ram)[(1u << 20) + n / 4 % (FRONT_QUEUE_SIZE * 1024)] =
				(uint8_t)(n >> 32);
			break;
		default:
			__atomic_store_n(&q->used->idx, (uint16_t)(n >> 32), __ATOMIC_RELEASE);
		}
	}
	return NULL;
}

static void rings_that_change_under_its_feet_harm_nobody(void **state)
{
	struct rig *r = *state;
	pid_t lane = 0;

	for (uint32_t round = 0; round < 60; round++) {
		struct scribbler s = { .rig = r };
		pthread_t thread;

		for (uint16_t i = 0; i < FRONT_QUEUE_SIZE; i++) {
			struct front_segment segments[3] = { { FRONT_DATA + i * 65536u, 512 },
							     { FRONT_DATA + i * 65536u + 8192, 16384 },
							     { FRONT_DATA + i * 65536u + 40960, 512 } };

			front_request(&r->front, 0, i, VIRTIO_BLK_T_IN, i, segments, 3);
		}
		r->front.queue[0].used->idx = r->front.queue[0].seen = 0;
		r->front.queue[0].avail->idx = r->front.queue[0].next = 0;
		connect_front(r, round % 2);
		lane = lane ? lane : lane_of(r);
		assert_int_equal(pthread_create(&thread, NULL, scribble, &s), 0);
		for (uint16_t i = 0; i < 4 * FRONT_QUEUE_SIZE; i++) {
			front_offer(&r->front, 0, i % FRONT_QUEUE_SIZE);
			front_kick(&r->front, 0);
		}
		usleep(5000);
		s.stop = true;
		pthread_join(thread, NULL);
		front_disconnect(&r->front);
		if (r->front.record_fd >= 0)
			close(r->front.record_fd); /* no guest comes back with that */
		r->front.record_fd = -1;
	}
	assert_serves(r);
	assert_int_equal(lane_of(r), lane); /* the same one all the time */
}

/* ---- bad front ends -------------------------------------------------------------------------------------------- */

static void memory_that_is_cut_harms_nobody(void **state)
{
	struct rig *r = *state;
	struct front_segment segment = { FRONT_DATA, 1 << 20 };
	pid_t lane;
	uint16_t head;

	connect_front(r, true);
	assert_int_equal(front_do(&r->front, 0, VIRTIO_BLK_T_IN, 0, &segment, 1), 0);
	lane = lane_of(r);
	front_request(&r->front, 0, 1, VIRTIO_BLK_T_IN, 0, &segment, 1);
	front_offer(&r->front, 0, 1);
	assert_int_equal(ftruncate(r->front.ram_fd, FRONT_DATA), 0); /* no data, */
	front_kick(&r->front, 0);
	assert_int_equal(front_wait(&r->front, 0, WAIT_MS, &head, NULL), 0);
	assert_int_equal(*front_status(&r->front, 0, 1), VIRTIO_BLK_S_IOERR);
	assert_int_equal(ftruncate(r->front.ram_fd, 0), 0); /* and no rings */
	front_kick(&r->front, 0);
	usleep(100000);
	front_disconnect(&r->front);
	assert_serves(r);
	assert_int_equal(lane_of(r), lane);
	assert_int_equal(ftruncate(r->front.ram_fd, RAM_BYTES), 0);
}

static void messages_of_no_sense_end_their_connection_only(void **state)
{
	static const uint8_t noise[64] = { 0xff, 0x17, 0x99, 3,    0xff, 0xff,
					   0xff, 0xff, 0xff, 0xff, 0xff, 0xff };
	struct rig *r = *state;
	char byte;

	connect_front(r, false);
	for (int i = 0; i < 2; i++) {
		struct sockaddr_un at = { .sun_family = AF_UNIX };
		int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
		struct front_segment segment = { FRONT_DATA, 4096 };

		snprintf(at.sun_path, sizeof at.sun_path, "%s", r->socket);
		assert_int_equal(connect(fd, (struct sockaddr *)&at, sizeof at), 0);
		assert_true(write(fd, noise, i ? sizeof noise : 7) >
			    0); /* all of it; the beginning of one */
		if (i)
			assert_true(recv(fd, &byte, 1, 0) <=
				    0); /* the end, or a reset: not all was read */
		assert_int_equal(front_do(&r->front, 0, VIRTIO_BLK_T_IN, 0, &segment, 1), 0);
		close(fd);
	}
	assert_serves(r);
}

static void rings_outside_memory_are_refused(void **state)
{
	struct rig *r = *state;
	uint64_t rings[5] = { 0, FRONT_UVA + RAM_BYTES, FRONT_UVA + RAM_BYTES, FRONT_UVA + RAM_BYTES,
			      0 };
	char byte;

	connect_front(r, false);
	assert_int_equal(front_send(&r->front, VHU_SET_VRING_ADDR, rings, sizeof rings, -1), 0);
	assert_int_equal(recv(r->front.fd, &byte, 1, 0), 0);
	front_disconnect(&r->front);
	assert_serves(r);
}

/* It has given 32 requests, and is gone before they are done. */
static void a_front_end_that_vanishes_harms_nobody(void **state)
{
	struct rig *r = *state;

	for (int round = 0; round < 20; round++) {
		connect_front(r, false);
		for (uint16_t i = 0; i < 32; i++) {
			struct front_segment segment = { FRONT_DATA + i * 131072u, 131072 };

			front_request(&r->front, 0, i, VIRTIO_BLK_T_OUT, 16384 + i * 256u, &segment, 1);
			front_offer(&r->front, 0, i);
		}
		front_kick(&r->front, 0);
		usleep(100 * (unsigned)round); /* sometimes they are under way, sometimes done */
		front_disconnect(&r->front);
		r->front.queue[0].seen = r->front.queue[0].next = 0;
		memset(r->front.ram, 0, 1 << 20);
	}
	assert_serves(r);
}

static void an_image_that_is_cut_fails_what_is_gone(void **state)
{
	struct rig *r = *state;
	struct front_segment segment = { FRONT_DATA, 128u << 10 };
	uint64_t half = IMAGE_BYTES / 2;

	connect_front(r, false);
	assert_int_equal(front_do(&r->front, 0, VIRTIO_BLK_T_IN, half / SECTOR, &segment, 1), 0);
	assert_int_equal(truncate(r->path, (off_t)half), 0);
	assert_int_equal(front_do(&r->front, 0, VIRTIO_BLK_T_IN, half / SECTOR, &segment, 1),
			 VIRTIO_BLK_S_IOERR);
	assert_int_equal(front_do(&r->front, 0, VIRTIO_BLK_T_IN, half / SECTOR - 16, &segment, 1),
			 VIRTIO_BLK_S_IOERR);
	front_disconnect(&r->front);
	assert_serves(r);
}

static void an_image_is_locked_as_qemu_does(void **state)
{
	struct rig *r = *state;
	struct image other;
	char why[IMAGE_WHY_BYTES];

	assert_int_equal(image_open(r->path, NULL, false, &other, why), -EAGAIN);
	assert_non_null(strstr(why, "in use"));
	assert_int_equal(image_open(r->path, NULL, true, &other, why), -EAGAIN);
	assert_int_equal(image_open(r->dir, NULL, true, &other, why), -EINVAL);
	assert_int_equal(image_open("/nonexistent", NULL, true, &other, why), -ENOENT);
	assert_int_equal(image_open(r->path, "qcow2", true, &other, why), -EOPNOTSUPP);
	assert_non_null(strstr(why, "qemu-img convert"));
}

#define WRITABLE(test) cmocka_unit_test_setup_teardown(test, set_up, tear_down)
#define IN_MEMORY(test) { #test ", of an image in memory", test, set_up_in_memory, tear_down, NULL }
#define READONLY(test) cmocka_unit_test_setup_teardown(test, set_up_readonly, tear_down)

int main(void)
{
	const struct CMUnitTest tests[] = {
		WRITABLE(configuration_says_what_the_image_is),
		WRITABLE(reads_of_all_shapes_are_right),
		WRITABLE(scattered_data_goes_where_it_belongs),
		WRITABLE(discards_zeroes_and_flushes_are_done),
		READONLY(a_readonly_image_is_served_to_many),
		READONLY(many_front_ends_are_served),
		READONLY(nothing_stays_mapped_but_the_rings),
		READONLY(a_lane_that_is_moved_goes_on),
		cmocka_unit_test_setup_teardown(what_is_being_read_for_one_is_not_read_for_another,
						set_up_two_lanes, tear_down),
		WRITABLE(what_a_predecessor_left_is_done_again),
		WRITABLE(a_killed_lane_loses_nothing),
		READONLY(a_loop_stops_the_queue),
		READONLY(a_head_that_is_not_there_stops_the_queue),
		READONLY(more_requests_than_a_ring_holds_stop_the_queue),
		READONLY(a_header_outside_memory_stops_the_queue),
		READONLY(a_status_outside_memory_stops_the_queue),
		READONLY(an_indirect_table_outside_memory_stops_the_queue),
		READONLY(data_outside_memory_or_disk_is_an_error),
		READONLY(rings_that_change_under_its_feet_harm_nobody),
		READONLY(memory_that_is_cut_harms_nobody),
		READONLY(messages_of_no_sense_end_their_connection_only),
		READONLY(rings_outside_memory_are_refused),
		WRITABLE(a_front_end_that_vanishes_harms_nobody),
		WRITABLE(an_image_that_is_cut_fails_what_is_gone),
		WRITABLE(an_image_is_locked_as_qemu_does),
		IN_MEMORY(reads_of_all_shapes_are_right),
		IN_MEMORY(scattered_data_goes_where_it_belongs),
		IN_MEMORY(discards_zeroes_and_flushes_are_done),
		IN_MEMORY(a_killed_lane_loses_nothing),
		IN_MEMORY(data_outside_memory_or_disk_is_an_error),
		IN_MEMORY(an_image_that_is_cut_fails_what_is_gone),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
