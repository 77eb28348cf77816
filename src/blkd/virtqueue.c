/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "blkd/lane.h"

#include "os/os.h"

#include <errno.h>
#include <linux/virtio_ring.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

#define TURN_REQUESTS 32u /* of one queue, before it is the next one's turn */

/* ---- rings -------------------------------------------------------------------------------------- */

static void unmap_view(struct ring_view *view)
{
	if (view->area)
		os_unguard_view(view->area);
	os_unreserve(view->area, view->bytes);
	*view = (struct ring_view){ 0 };
}

/* A front end that cuts its memory finds zeros in the rings; nobody dies of it. */
static int map_view(const struct connection *c, uint64_t uva, uint64_t bytes, struct ring_view *view)
{
	uint64_t offset, in_page;
	uint32_t region;
	int r;

	if (!memory_find_uva(&c->table, uva, bytes, &region, &offset))
		return -EFAULT;
	in_page = offset & (OS_PAGE_BYTES - 1);
	view->bytes = (in_page + bytes + OS_PAGE_BYTES - 1) & ~(OS_PAGE_BYTES - 1);
	view->area = os_reserve(view->bytes, OS_PAGE_BYTES);
	if (!view->area)
		return -ENOMEM;
	r = os_guard_view(view->area, view->bytes);
	if (!r)
		r = os_window_map(view->area, view->bytes, c->fds[region], offset - in_page, true);
	view->at = (uint8_t *)view->area + in_page;
	return r;
}

static void unmap_rings(struct virtqueue *v)
{
	unmap_view(&v->desc);
	unmap_view(&v->used);
	unmap_view(&v->avail);
}

static int map_rings(struct virtqueue *v)
{
	const struct connection *c = v->connection;
	uint16_t size = v->queue.size;
	uint64_t offset;
	uint32_t region;
	int r = map_view(c, v->desc_uva, size * sizeof(struct vring_desc), &v->desc);

	if (!r)
		r = map_view(c, v->used_uva, queue_used_bytes(size), &v->used);
	if (!r)
		r = map_view(c, v->avail_uva, queue_avail_bytes(size), &v->avail);
	if (r) {
		unmap_rings(v);
		return r;
	}
	if (memory_find_uva(&c->table, v->desc_uva, 1, &region, &offset))
		v->desc_gpa =
			c->table.regions[region].gpa + (v->desc_uva - c->table.regions[region].uva);
	v->queue.avail = (struct vring_avail *)v->avail.at;
	v->queue.used = (struct vring_used *)v->used.at;
	return 0;
}

static int find_record(struct virtqueue *v)
{
	const struct connection *c = v->connection;
	struct queue_record *record;

	v->queue.record = NULL;
	if (!c->record)
		return 0;
	if (v->index >= c->record_queues || queue_record_bytes(v->queue.size) > c->record_stride)
		return -EPROTO;
	record = (struct queue_record *)((uint8_t *)c->record + v->index * c->record_stride);
	if (!record->version)
		queue_record_init(record, v->queue.size);
	v->queue.record = record;
	return 0;
}

/* ---- from start to stop -------------------------------------------------------------------------- */

static bool may_run(const struct virtqueue *v)
{
	return v->has_size && v->has_rings && v->enabled && v->kick >= 0 && !v->broken;
}

int virtqueue_start(struct virtqueue *v, const char **ret_why)
{
	int n, r;

	if (v->runs || !may_run(v))
		return 0;
	*ret_why = "a ring is not in guest memory that is shared (memory-backend-memfd,share=on)";
	r = map_rings(v);
	if (r == -ENOSPC)
		*ret_why = "this lane has as many rings as it can have (more --lanes)";
	if (r)
		return r;
	*ret_why = "the record of requests in flight is of other queues";
	v->queue.event_index = v->connection->features & 1ull << VIRTIO_RING_F_EVENT_IDX;
	r = find_record(v);
	n = r ? r : queue_start(&v->queue, v->base, v->redo);
	if (n < 0) {
		unmap_rings(v);
		return n;
	}
	v->redo_count = (uint16_t)n;
	v->redo_next = 0;
	v->runs = true;
	if (n)
		lane_say("queue %u: %d requests that were under way are done again", v->index, n);
	virtqueue_poll(v);
	return 0;
}

void virtqueue_stop(struct virtqueue *v)
{
	if (v->runs || v->desc.area)
		v->base = v->queue.next_avail;
	v->runs = false;
	unmap_rings(v);
}

void virtqueue_break(struct virtqueue *v, const char *why)
{
	uint64_t one = 1;

	if (v->broken)
		return;
	lane_say("queue %u is stopped: %s", v->index, why);
	v->broken = true;
	v->runs = false;
	if (v->error >= 0 && write(v->error, &one, sizeof one) < 0)
		return; /* nobody wants to know */
}

/* ---- while it runs ------------------------------------------------------------------------------- */

static int take(struct virtqueue *v, uint16_t *ret_head)
{
	if (v->redo_next < v->redo_count) {
		*ret_head = v->redo[v->redo_next++];
		return 1;
	}
	return queue_take(&v->queue, ret_head);
}

static bool take_one(struct virtqueue *v)
{
	struct lane *lane = v->connection->lane;
	struct request *r = lane->free;
	uint16_t head;
	int n = take(v, &head);

	if (n < 0)
		virtqueue_break(v, "the driver offers requests that cannot be");
	if (n <= 0)
		return false;
	lane->free = r->next;
	request_start(r, v, head);
	return true;
}

bool virtqueue_take(struct virtqueue *v)
{
	uint32_t left = TURN_REQUESTS;

	while (left && v->runs && v->connection->lane->free && take_one(v))
		left--;
	return !left;
}

void virtqueue_tell(struct virtqueue *v)
{
	uint64_t one = 1;

	v->untold_bytes = v->untold = 0;
	if (v->runs && v->call >= 0 && queue_must_tell(&v->queue) &&
	    write(v->call, &one, sizeof one) < 0)
		return; /* it has been told already, or is gone */
}

static void kicked(struct lane *lane, struct event *event, int res)
{
	struct virtqueue *v = (struct virtqueue *)event;
	uint64_t kicks;

	(void)lane;
	v->polls = false;
	if (res > 0 && v->kick >= 0 && read(v->kick, &kicks, sizeof kicks) < 0)
		res = 0; /* somebody has taken it: look all the same */
	if (v->runs && !v->connection->closing &&
	    (res >= 0 || res == -ECANCELED)) /* canceled: for another one */
		virtqueue_poll(v);
	connection_settle(v->connection);
}

void virtqueue_poll(struct virtqueue *v)
{
	struct io_uring_sqe *sqe;

	if (v->polls || v->kick < 0)
		return;
	v->kicked.happened = kicked;
	v->polls = true;
	sqe = lane_sqe(v->connection->lane);
	io_uring_prep_poll_add(sqe, v->kick, POLLIN);
	io_uring_sqe_set_data(sqe, &v->kicked);
}

void virtqueue_unpoll(struct virtqueue *v)
{
	if (v->polls)
		lane_cancel(v->connection->lane, &v->kicked);
}
