/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * blk_io SOCKET {seq128k|rand4k} {read|write} MILLISECONDS DEPTH: requests to a vhost-user-blk device by a driver of
 * its own, with no guest in between. Sectors hold the number of the sector in their first eight bytes (which is what
 * it writes, too); each sector that is read is compared.
 *
 * Prints a JSON object: requests, bytes, seconds, mismatches. Exit status: 0, 1 a request failed or contents were
 * wrong, 2 usage.
 */
#include "blk_front.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define RAM_BYTES (64ull << 20)
#define SECTOR_BYTES 512u
#define WAIT_MS 20000

struct bench {
	struct front front;
	bool random, writes;
	uint32_t bytes, depth;
	uint64_t next_sector, sectors, random_state;
	uint64_t requests, mismatches, failures;
	uint64_t sector_of[FRONT_QUEUE_SIZE];
};

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static uint64_t random_number(struct bench *b)
{
	b->random_state ^= b->random_state << 13;
	b->random_state ^= b->random_state >> 7;
	b->random_state ^= b->random_state << 17;
	return b->random_state;
}

static uint64_t choose_sector(struct bench *b)
{
	uint64_t step = b->bytes / SECTOR_BYTES, at = b->next_sector;

	if (b->random)
		return random_number(b) % (b->sectors / step) * step;
	b->next_sector = at + 2 * step <= b->sectors ? at + step : 0;
	return at;
}

static uint8_t *data_of(struct bench *b, uint16_t head)
{
	return b->front.ram + FRONT_DATA + head * (uint64_t)b->bytes;
}

static void offer(struct bench *b, uint16_t head)
{
	struct front_segment segment = { FRONT_DATA + head * (uint64_t)b->bytes, b->bytes };
	uint64_t sector = choose_sector(b);

	b->sector_of[head] = sector;
	for (uint32_t at = 0; at < b->bytes; at += SECTOR_BYTES) {
		uint64_t number = b->writes ? sector + at / SECTOR_BYTES : UINT64_MAX;

		memcpy(data_of(b, head) + at, &number, sizeof number);
	}
	front_request(&b->front, 0, head, b->writes ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN, sector,
		      &segment, 1);
	front_offer(&b->front, 0, head);
}

static void look_at(struct bench *b, uint16_t head)
{
	b->requests++;
	b->failures += *front_status(&b->front, 0, head) != VIRTIO_BLK_S_OK;
	for (uint32_t at = 0; at < b->bytes; at += SECTOR_BYTES) {
		uint64_t number;

		memcpy(&number, data_of(b, head) + at, sizeof number);
		b->mismatches += number != b->sector_of[head] + at / SECTOR_BYTES;
	}
}

/* As a guest does: it kicks when the device wants that. */
static void kick(struct bench *b, uint16_t before)
{
	struct front_queue *q = &b->front.queue[0];
	uint16_t event;

	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	memcpy(&event, &q->used->ring[FRONT_QUEUE_SIZE], sizeof event);
	if (vring_need_event(event, q->next, before))
		front_kick(&b->front, 0);
}

static int run(struct bench *b, uint64_t end_ns)
{
	uint32_t under_way = 0;
	uint16_t head, before = b->front.queue[0].next;
	int r;

	for (; under_way < b->depth; under_way++)
		offer(b, (uint16_t)under_way);
	kick(b, before);
	while (under_way) {
		r = front_wait(&b->front, 0, WAIT_MS, &head, NULL);
		if (r)
			return r;
		before = b->front.queue[0].next;
		do {
			look_at(b, head);
			under_way--;
			if (now_ns() < end_ns) {
				offer(b, head);
				under_way++;
			}
		} while (!front_wait(&b->front, 0, 0, &head, NULL));
		if (b->front.queue[0].next != before)
			kick(b, before);
	}
	return 0;
}

int main(int argc, char **argv)
{
	struct bench b = { .random_state = 88172645463325252 };
	uint64_t start;
	int r;

	if (argc != 6) {
		fprintf(stderr,
			"usage: blk_io SOCKET {seq128k|rand4k} {read|write} MILLISECONDS DEPTH\n");
		return 2;
	}
	b.random = !strcmp(argv[2], "rand4k");
	b.bytes = b.random ? 4096 : 128u << 10;
	b.writes = !strcmp(argv[3], "write");
	b.depth = (uint32_t)strtoul(argv[5], NULL, 10);
	if (!b.depth || b.depth > FRONT_QUEUE_SIZE)
		return 2;
	r = front_init(&b.front, RAM_BYTES, 1);
	if (!r)
		r = front_connect(&b.front, argv[1], false);
	b.sectors = b.front.config.capacity;
	start = now_ns();
	if (!r)
		r = run(&b, start + strtoull(argv[4], NULL, 10) * 1000000);
	printf("{\"requests\": %llu, \"bytes\": %llu, \"seconds\": %.6f, \"mismatches\": %llu, "
	       "\"failures\": %llu}\n",
	       (unsigned long long)b.requests, (unsigned long long)(b.requests * b.bytes),
	       (double)(now_ns() - start) / 1e9, (unsigned long long)b.mismatches,
	       (unsigned long long)b.failures);
	if (r)
		fprintf(stderr, "blk_io: %s\n", strerror(-r));
	return r || b.mismatches || b.failures;
}
