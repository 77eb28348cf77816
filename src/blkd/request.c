/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "blkd/lane.h"

#include "os/os.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/virtio_blk.h>
#include <string.h>
#include <sys/uio.h>

/* So much is worth waking the driver for, though more is coming: it goes on beside us, and does not wait for the last. */
#define TELL_BYTES (256u << 10)
#define TELL_REQUESTS 4u

static uint8_t zeros[LANE_PART_BYTES];

static struct lane *lane_of(const struct request *r) { return r->virtqueue->connection->lane; }

/* ---- guest memory beside data ------------------------------------------------------------------ */

/* Of descriptors and headers. The table of descriptors is part of the rings. */
static int read_guest(void *ctx, uint64_t gpa, void *to, size_t bytes)
{
	struct virtqueue *v = ctx;
	struct peek *peek = &v->connection->lane->peek;
	uint64_t table_bytes = v->queue.size * sizeof(struct vring_desc), in_page;
	int r;

	if (gpa >= v->desc_gpa && gpa - v->desc_gpa < table_bytes &&
	    bytes <= table_bytes - (gpa - v->desc_gpa)) {
		memcpy(to, v->desc.at + (gpa - v->desc_gpa), bytes);
		return 0;
	}
	if (gpa < peek->gpa || gpa - peek->gpa >= peek->bytes ||
	    bytes > peek->bytes - (gpa - peek->gpa)) {
		in_page = OS_PAGE_BYTES - (gpa & (OS_PAGE_BYTES - 1));
		if (bytes > in_page || bytes > LANE_PEEK_BYTES)
			return connection_read(v->connection, gpa, to, bytes);
		peek->bytes = 0;
		peek->gpa = gpa;
		r = connection_read(v->connection, gpa, peek->data,
				    in_page < LANE_PEEK_BYTES ? in_page : LANE_PEEK_BYTES);
		if (r)
			return r;
		peek->bytes = (uint32_t)(in_page < LANE_PEEK_BYTES ? in_page : LANE_PEEK_BYTES);
	}
	memcpy(to, peek->data + (gpa - peek->gpa), bytes);
	return 0;
}

/* ---- the end ------------------------------------------------------------------------------------ */

static bool writes_guest(const struct request *r)
{
	return r->blk.op == VIRTIO_BLK_READ || r->blk.op == VIRTIO_BLK_ID;
}

static void free_request(struct request *r)
{
	struct connection *c = r->virtqueue->connection;
	struct lane *lane = c->lane;

	r->next = lane->free;
	lane->free = r;
	lane->under_way--;
	c->under_way--;
	connection_settle(c);
}

/* The ring is as the driver sees it whatever comes after: also what was under way when a connection is
 * closed is given back. */
static void finish(struct request *r, uint8_t status)
{
	struct virtqueue *v = r->virtqueue;
	uint32_t written = writes_guest(r) ? (uint32_t)r->at + 1 : 1;

	if (connection_write(v->connection, r->blk.status_gpa, &status, sizeof status)) {
		virtqueue_break(v, "a status is not in guest memory");
	} else if (v->runs) {
		queue_give_back(&v->queue, r->head, written);
		v->connection->served++;
		v->untold_bytes += r->blk.bytes;
		if (++v->untold >= TELL_REQUESTS || v->untold_bytes >= TELL_BYTES)
			virtqueue_tell(v);
	}
	free_request(r);
}

/* ---- data --------------------------------------------------------------------------------------- */

/* The chain's segments from `r->at` on, as far as a part goes, by where they are in files. */
static int find_part(struct request *r)
{
	const struct connection *c = r->virtqueue->connection;
	uint64_t skip = r->at, left = r->blk.bytes - r->at;
	uint32_t n = 0;

	r->part = 0;
	left = left < r->limit ? left : r->limit;
	for (uint32_t i = r->blk.first; i < r->blk.first + r->blk.count && left && n < LANE_SEGMENTS;
	     i++) {
		uint64_t gpa = r->chain.segments[i].gpa, bytes = r->chain.segments[i].bytes;

		if (skip >= bytes) {
			skip -= bytes;
			continue;
		}
		gpa += skip;
		bytes = bytes - skip < left ? bytes - skip : left;
		skip = 0;
		while (bytes && n < LANE_SEGMENTS) {
			uint32_t region;
			uint64_t offset, found = memory_find(&c->table, gpa, bytes, &region, &offset);

			if (!found)
				return -EFAULT;
			r->segments[n++] =
				(struct latent_segment){ c->fds[region], offset, (size_t)found };
			gpa += found;
			bytes -= found;
			left -= found;
			r->part += (uint32_t)found;
		}
	}
	r->window = (struct latent_request){ .size = sizeof r->window,
					     .segments = r->segments,
					     .count = n,
					     .writes_guest = writes_guest(r),
					     .iov = r->iov };
	return n ? 0 : -EFAULT;
}

/* Somebody may change where the lane may run (a cpuset): then it moves its windows there. */
static int map_part(struct request *r)
{
	struct lane *lane = lane_of(r);
	int error = find_part(r);

	if (!error)
		error = window_map(lane->window, &r->window, LATENT_LOCAL_FLUSH);
	if (error == -EXDEV && !lane_move(lane))
		error = window_map(lane->window, &r->window, LATENT_LOCAL_FLUSH);
	r->mapped = !error;
	return error;
}

static void unmap_part(struct request *r, bool succeeded, int *error)
{
	int one = r->mapped ? window_done(lane_of(r)->window, &r->window, succeeded) : 0;

	r->mapped = false;
	if (one && !*error)
		*error = one;
}

/* A driver that has not agreed on flushes is told of a write when it is on the disk. */
static int write_flags(const struct request *r)
{
	return r->virtqueue->connection->features & 1ull << VIRTIO_BLK_F_FLUSH ? 0 : RWF_DSYNC;
}

static void submit_data(struct request *r)
{
	struct lane *lane = lane_of(r);
	struct io_uring_sqe *sqe = lane_sqe(lane);
	uint64_t offset = (r->blk.sector << VIRTIO_SECTOR_SHIFT) + r->at;

	if (r->blk.op == VIRTIO_BLK_READ)
		io_uring_prep_readv(sqe, lane->image->fd, r->iov, r->window.count, offset);
	else
		io_uring_prep_writev2(sqe, lane->image->fd, r->iov, r->window.count, offset,
				      write_flags(r));
	io_uring_sqe_set_data(sqe, &r->done);
}

/*
 * What is in the host's page cache is copied at once, while the bounce buffer is in the processor's; -EAGAIN: it is
 * not there, and takes the io_uring. Never waits.
 */
static int try_now(struct request *r)
{
	struct lane *lane = lane_of(r);
	bool reads = r->blk.op == VIRTIO_BLK_READ;
	off_t offset = (off_t)((r->blk.sector << VIRTIO_SECTOR_SHIFT) + r->at);
	int count = (int)r->window.count, flags = lane->image->in_memory ? 0 : RWF_NOWAIT;
	ssize_t n;

	if (lane->waits_always[reads] || (!lane->image->in_memory && !reads && write_flags(r)))
		return -EAGAIN;
	n = reads ? preadv2(lane->image->fd, r->iov, count, offset, flags)
		  : pwritev2(lane->image->fd, r->iov, count, offset, flags);
	if (n >= 0)
		return (int)n;
	lane->waits_always[reads] = errno == EOPNOTSUPP; /* such a file system */
	return errno == EOPNOTSUPP || errno == EINTR ? -EAGAIN : -errno;
}

/*
 * Fewer bytes than asked for are no error unless there are none. What a short read has left in a bounce
 * buffer is somebody else's: the part is read anew, and shorter.
 */
static int data_done(struct request *r, int res)
{
	bool is_short = res >= 0 && (uint32_t)res < r->part;
	int error = res < 0 ? res : res ? 0 : -EIO;

	if (is_short && r->blk.op == VIRTIO_BLK_READ) {
		unmap_part(r, false, &error);
		r->limit = (uint32_t)res;
		return error;
	}
	unmap_part(r, !error, &error);
	r->limit = LANE_PART_BYTES;
	if (!error)
		r->at += (uint32_t)res;
	return error;
}

static void give_id(struct request *r)
{
	char id[20] = { 0 };
	int error = map_part(r);
	size_t at = 0;

	memcpy(id, lane_of(r)->image->id, sizeof id);
	for (uint32_t i = 0; !error && i < r->window.count; i++) {
		memcpy(r->iov[i].iov_base, id + at, r->iov[i].iov_len);
		at += r->iov[i].iov_len;
	}
	unmap_part(r, !error, &error);
	r->at = error ? 0 : at;
	finish(r, error ? VIRTIO_BLK_S_IOERR : VIRTIO_BLK_S_OK);
}

/* ---- ranges ------------------------------------------------------------------------------------- */

static void submit_zeros(struct request *r, const struct virtio_range *range)
{
	struct lane *lane = lane_of(r);
	struct io_uring_sqe *sqe = lane_sqe(lane);
	uint64_t left = ((uint64_t)range->sectors << VIRTIO_SECTOR_SHIFT) - r->at;

	r->part = left < sizeof zeros ? (uint32_t)left : (uint32_t)sizeof zeros;
	r->iov[0] = (struct iovec){ zeros, r->part };
	io_uring_prep_writev2(sqe, lane->image->fd, r->iov, 1,
			      (range->sector << VIRTIO_SECTOR_SHIFT) + r->at, write_flags(r));
	io_uring_sqe_set_data(sqe, &r->done);
}

static void submit_range(struct request *r)
{
	const struct virtio_range *range = &r->blk.range[r->range];
	int mode = r->blk.op == VIRTIO_BLK_PUNCH || range->may_unmap ? FALLOC_FL_PUNCH_HOLE
								     : FALLOC_FL_ZERO_RANGE;
	struct lane *lane = lane_of(r);
	struct io_uring_sqe *sqe;

	if (r->by_writing) {
		submit_zeros(r, range);
		return;
	}
	sqe = lane_sqe(lane);
	io_uring_prep_fallocate(sqe, lane->image->fd, mode | FALLOC_FL_KEEP_SIZE,
				(off_t)(range->sector << VIRTIO_SECTOR_SHIFT),
				(off_t)range->sectors << VIRTIO_SECTOR_SHIFT);
	io_uring_sqe_set_data(sqe, &r->done);
}

/* ---- flushes ------------------------------------------------------------------------------------ */

static void sync_image(struct request *r)
{
	struct lane *lane = lane_of(r);
	struct io_uring_sqe *sqe = lane_sqe(lane);

	io_uring_prep_fsync(sqe, lane->image->fd, IORING_FSYNC_DATASYNC);
	io_uring_sqe_set_data(sqe, &r->done);
}

static int sync_done(struct request *r, int res)
{
	r->at = 1;
	return res;
}

/* ---- step by step ------------------------------------------------------------------------------- */

static bool is_over(const struct request *r)
{
	switch (r->blk.op) {
	case VIRTIO_BLK_READ:
	case VIRTIO_BLK_WRITE:
		return r->at == r->blk.bytes;
	case VIRTIO_BLK_PUNCH:
	case VIRTIO_BLK_ZERO:
		return r->range == r->blk.ranges;
	default:
		return r->at;
	}
}

/* Of an image in memory: from there to the guest, with no copy between. -EAGAIN: not so, or that has failed; the way
 * by a slot says why. */
static int read_view(struct request *r)
{
	const uint8_t *from = lane_of(r)->image_view;
	int error;

	if (!from || r->blk.op != VIRTIO_BLK_READ)
		return -EAGAIN;
	from += (r->blk.sector << VIRTIO_SECTOR_SHIFT) + r->at;
	error = find_part(r);
	if (!error && window_comes_again(lane_of(r)->window, &r->window))
		return -EAGAIN; /* sooner done where it is mapped already */
	for (uint32_t i = 0; !error && i < r->window.count; i++) {
		const struct latent_segment *s = &r->segments[i];

		error = os_write_all(s->fd, from, s->bytes, s->offset);
		from += s->bytes;
	}
	if (error)
		return -EAGAIN;
	r->at += r->part;
	lane_of(r)->view_bytes += r->part;
	return 0;
}

/* A part; 0: it is done; 1: it is under way. */
static int do_part(struct request *r)
{
	int error = read_view(r), res;

	if (error != -EAGAIN)
		return error;
	error = map_part(r);
	if (error)
		return error;
	res = try_now(r);
	if (res != -EAGAIN)
		return data_done(r, res);
	submit_data(r);
	return 1;
}

static void go_on(struct request *r)
{
	int done = 0;

	while (!done && !is_over(r)) {
		switch (r->blk.op) {
		case VIRTIO_BLK_SYNC:
			sync_image(r);
			return;
		case VIRTIO_BLK_PUNCH:
		case VIRTIO_BLK_ZERO:
			submit_range(r);
			return;
		default:
			done = do_part(r);
		}
	}
	if (done <= 0)
		finish(r, done ? VIRTIO_BLK_S_IOERR : VIRTIO_BLK_S_OK);
}

static void skip_empty_ranges(struct request *r)
{
	while (r->range < r->blk.ranges && !r->blk.range[r->range].sectors)
		r->range++;
}

/* Discards are a wish. Zeros are not: where the file system cannot, they are written. */
static int range_done(struct request *r, int res)
{
	const struct virtio_range *range = &r->blk.range[r->range];

	if (r->by_writing && res > 0) {
		r->at += (uint32_t)res;
		if (r->at < (uint64_t)range->sectors << VIRTIO_SECTOR_SHIFT)
			return 0;
		r->by_writing = false;
	} else if (res == -EOPNOTSUPP && r->blk.op == VIRTIO_BLK_ZERO && !r->by_writing) {
		r->by_writing = true;
		r->at = 0;
		return 0;
	} else if (res < 0 && !(res == -EOPNOTSUPP && r->blk.op == VIRTIO_BLK_PUNCH)) {
		return res;
	} else if (r->by_writing) {
		return -EIO; /* nothing was written, and no error said */
	}
	r->at = 0;
	r->range++;
	skip_empty_ranges(r);
	return 0;
}

static void io_done(struct lane *lane, struct event *event, int res)
{
	struct request *r = (struct request *)event;
	int error = 0;

	(void)lane;
	if (res == -EINTR || res == -EAGAIN) /* once more, from where it was */
		unmap_part(r, false, &error);
	else if (r->blk.op == VIRTIO_BLK_PUNCH || r->blk.op == VIRTIO_BLK_ZERO)
		error = range_done(r, res);
	else if (r->blk.op == VIRTIO_BLK_SYNC)
		error = sync_done(r, res);
	else
		error = data_done(r, res);
	if (error)
		finish(r, VIRTIO_BLK_S_IOERR);
	else
		go_on(r);
}

/* ---- the beginning ------------------------------------------------------------------------------ */

static int read_request(struct request *r, const char **ret_why)
{
	struct virtqueue *v = r->virtqueue;
	struct lane *lane = lane_of(r);
	uint64_t features = v->connection->features;
	const struct virtio_memory memory = { read_guest, v };
	const struct virtio_disk disk = {
		.sectors = lane->image->bytes >> VIRTIO_SECTOR_SHIFT,
		.readonly = lane->image->readonly,
		.discard = features & 1ull << VIRTIO_BLK_F_DISCARD,
		.write_zeroes = features & 1ull << VIRTIO_BLK_F_WRITE_ZEROES,
		.range_sectors_max = LANE_RANGE_SECTORS_MAX,
	};
	int error;

	lane->peek.bytes = 0; /* what was there belongs to the request before */
	error = virtio_read_chain(&memory, v->desc_gpa, v->queue.size, r->head, &r->chain, ret_why);
	return error ? error : virtio_blk_parse(&memory, &disk, &r->chain, &r->blk, ret_why);
}

void request_start(struct request *r, struct virtqueue *v, uint16_t head)
{
	const char *why = NULL;

	v->connection->under_way++;
	v->connection->lane->under_way++;
	r->done.happened = io_done;
	r->virtqueue = v;
	r->head = head;
	r->at = r->range = 0;
	r->limit = LANE_PART_BYTES;
	r->by_writing = r->mapped = false;
	if (read_request(r, &why)) {
		virtqueue_break(v, why);
		free_request(r);
		return;
	}
	switch (r->blk.op) {
	case VIRTIO_BLK_REFUSE:
		finish(r, r->blk.status);
		return;
	case VIRTIO_BLK_ID:
		give_id(r);
		return;
	default:
		skip_empty_ranges(r);
		go_on(r);
	}
}
