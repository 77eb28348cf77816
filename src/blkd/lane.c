/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "blkd/lane.h"

#include "blkd/confine.h"
#include "os/os.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define RING_ENTRIES 256u
#define IDLE_NS 2000000 /* after so long with nothing to do, nothing of any guest stays mapped */

void lane_say(const char *format, ...)
{
	char line[512];
	int at = snprintf(line, sizeof line, "latent blkd: ");
	size_t end = sizeof line - 2;
	va_list args;

	va_start(args, format);
	at += vsnprintf(line + at, end - (size_t)at, format, args);
	va_end(args);
	end = (size_t)at < end ? (size_t)at : end - 1; /* cut, if it is too long */
	line[end] = '\n';
	if (write(STDERR_FILENO, line, end + 1) < 0)
		return; /* nobody listens */
}

/* ---- what waits in the ring ----------------------------------------------------------------------- */

struct io_uring_sqe *lane_sqe(struct lane *lane)
{
	struct io_uring_sqe *sqe;

	while (!(sqe = io_uring_get_sqe(&lane->ring)))
		io_uring_submit(&lane->ring); /* the queue is full: now it is not */
	return sqe;
}

void lane_cancel(struct lane *lane, struct event *event)
{
	struct io_uring_sqe *sqe = lane_sqe(lane);

	io_uring_prep_cancel(sqe, event, 0);
	io_uring_sqe_set_data(sqe, NULL);
}

static void dispatch(struct lane *lane, struct io_uring_cqe *cqe)
{
	struct event *event = io_uring_cqe_get_data(cqe);
	int res = cqe->res;

	io_uring_cqe_seen(&lane->ring, cqe);
	if (event)
		event->happened(lane, event, res);
}

static int bind_workers(struct lane *lane)
{
	cpu_set_t mine;

	CPU_ZERO(&mine);
	CPU_SET(lane->cpu, &mine);
	return io_uring_register_iowq_aff(&lane->ring, sizeof mine, &mine);
}

int lane_move(struct lane *lane)
{
	int cpu = os_cpu(), r = window_move(lane->window, cpu);

	if (r)
		return r;
	lane->cpu = cpu;
	return bind_workers(lane);
}

/* ---- the domain -------------------------------------------------------------------------------------- */

static void poll_domain(struct lane *lane)
{
	struct io_uring_sqe *sqe = lane_sqe(lane);

	io_uring_prep_poll_add(sqe, lane->control, POLLIN);
	io_uring_sqe_set_data(sqe, &lane->from_domain);
}

/* -EPIPE: there is no domain any more; -EMFILE: there was no room for the descriptor. */
static int receive_fd(int control)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int))];
	} data;
	char byte;
	struct iovec iov = { &byte, 1 };
	struct msghdr message = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &data, .msg_controllen = sizeof data
	};
	struct cmsghdr *m;
	int fd = -EMFILE;

	if (recvmsg(control, &message, MSG_CMSG_CLOEXEC) <= 0)
		return -EPIPE;
	m = CMSG_FIRSTHDR(&message);
	if (m && m->cmsg_type == SCM_RIGHTS)
		memcpy(&fd, CMSG_DATA(m), sizeof fd);
	return fd;
}

static void tell_domain(struct lane *lane, char byte)
{
	if (write(lane->control, &byte, sizeof byte) < 0)
		lane->domain_is_gone = true;
}

static void domain_speaks(struct lane *lane, struct event *event, int res)
{
	int fd = res < 0 ? -EPIPE : receive_fd(lane->control);
	int r = fd < 0 ? fd : connection_new(lane, fd);

	(void)event;
	if (r == -EPIPE) {
		lane->domain_is_gone = true;
		return;
	}
	if (r) {
		lane_say("a front end cannot be served: %s", strerror(-r));
		tell_domain(lane, LANE_ENDED);
	}
	if (r && fd >= 0)
		close(fd);
	poll_domain(lane);
}

void lane_forget(struct lane *lane, struct connection *c)
{
	struct connection **at = &lane->connections;
	struct latent_window_stats stats;

	while (*at != c)
		at = &(*at)->next;
	*at = c->next;
	window_stats(lane->window, &stats);
	lane_say("a connection has ended: %llu requests; this lane has moved %llu KiB through windows, %llu KiB by "
		 "copies, at most %llu guest pages mapped at once",
		 (unsigned long long)c->served, (unsigned long long)stats.window_bytes >> 10,
		 (unsigned long long)(stats.bounce_bytes + lane->view_bytes) >> 10,
		 (unsigned long long)stats.peak_pages);
	free(c);
	tell_domain(lane, LANE_ENDED);
}

/* ---- the loop ------------------------------------------------------------------------------------------ */

typedef bool (*virtqueue_fn)(struct virtqueue *v);

static bool for_queues(struct lane *lane, virtqueue_fn work)
{
	bool any = false;

	for (struct connection *c = lane->connections; c; c = c->next) {
		if (c->message_waits || c->closing)
			continue;
		for (uint32_t i = 0; i < c->queue_end; i++)
			if (c->queues[i].runs)
				any |= work(&c->queues[i]);
	}
	return any;
}

static bool want_kicks(struct virtqueue *v)
{
	queue_want_kicks(&v->queue, true);
	return false;
}

static bool tell(struct virtqueue *v)
{
	virtqueue_tell(v);
	return false;
}

/* Before it sleeps, it asks to be kicked, and looks once more. True: there is more to take. */
static bool take_all(struct lane *lane)
{
	if (for_queues(lane, virtqueue_take))
		return true;
	for_queues(lane, want_kicks);
	return for_queues(lane, virtqueue_take);
}

static void wait(struct lane *lane)
{
	struct __kernel_timespec idle = { 0, IDLE_NS };
	struct latent_window_stats stats;
	struct io_uring_cqe *cqe;

	window_stats(lane->window, &stats);
	if (lane->under_way || !stats.mapped_pages)
		io_uring_submit_and_wait(&lane->ring, 1);
	else if (io_uring_submit_and_wait_timeout(&lane->ring, &cqe, 1, &idle, NULL) == -ETIME)
		(void)window_recycle(lane->window);
}

static void serve(struct lane *lane)
{
	struct io_uring_cqe *cqe;

	poll_domain(lane);
	while (!lane->domain_is_gone) {
		bool more = take_all(lane);

		for_queues(lane, tell);
		if (more || io_uring_cq_ready(&lane->ring))
			io_uring_submit(&lane->ring);
		else
			wait(lane);
		while (!io_uring_peek_cqe(&lane->ring, &cqe))
			dispatch(lane, cqe);
		for_queues(lane, tell);
	}
}

/* ---- the beginning --------------------------------------------------------------------------------------- */

static _Noreturn void fail(const char *what, int error)
{
	lane_say("%s: %s", what, strerror(-error));
	_exit(1);
}

/* What the kernel has of these spares interrupts; an older one does without. */
static int make_ring(struct io_uring *ring)
{
	static const unsigned flags[] = { IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN,
					  IORING_SETUP_COOP_TASKRUN, 0 };
	int r = -EINVAL;

	for (size_t i = 0; r == -EINVAL && i < sizeof flags / sizeof flags[0]; i++)
		r = io_uring_queue_init(RING_ENTRIES, ring, flags[i] | IORING_SETUP_R_DISABLED);
	return r;
}

static void absorb(int signal, siginfo_t *info, void *context)
{
	(void)context;
	if (os_absorb_fault(info->si_addr))
		return;
	(void)sigaction(signal, &(struct sigaction){ .sa_handler = SIG_DFL }, NULL);
}

static void handle_signals(void)
{
	struct sigaction action = { .sa_sigaction = absorb, .sa_flags = SA_SIGINFO };

	sigaction(SIGBUS, &action, NULL); /* a front end has cut its memory */
	signal(SIGPIPE, SIG_IGN);
	signal(SIGINT, SIG_IGN); /* of a terminal: the domain ends us */
}

static void make_requests(struct lane *lane)
{
	lane->requests = calloc(LANE_REQUESTS, sizeof *lane->requests);
	if (!lane->requests)
		fail("a lane has no memory", -ENOMEM);
	for (uint32_t i = 0; i < LANE_REQUESTS; i++) {
		lane->requests[i].next = lane->free;
		lane->free = &lane->requests[i];
	}
}

_Noreturn void lane_main(int cpu, int control, const struct image *image)
{
	struct lane lane = { .cpu = cpu, .control = control, .image = image };
	int r;

	lane.from_domain.happened = domain_speaks;
	handle_signals();
	r = window_register(cpu, LANE_REQUESTS, &lane.window);
	if (r)
		fail("a lane cannot have its windows", r);
	make_requests(&lane);
	if (image->in_memory)
		lane.image_view = os_view_file(image->fd, image->bytes, false);
	r = make_ring(&lane.ring);
	if (r)
		fail("a lane cannot have an io_uring (io_uring_disabled?)", r);
	r = bind_workers(&lane);
	if (r)
		fail("workers of io_uring cannot be bound to a CPU (Linux 5.14)", r);
	r = confine(&lane.ring);
	if (r)
		fail("a lane cannot be confined", r);
	tell_domain(&lane, LANE_READY);
	serve(&lane);
	_exit(0);
}
