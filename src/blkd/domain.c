/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "blkd/domain.h"

#include "blkd/lane.h"
#include "os/os.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define PATIENCE_US 5000000u  /* of a front end that comes while another one is there */
#define LANE_LIFE_US 1000000u /* lanes that die sooner are replaced no faster than this */

struct child {
	pid_t pid;
	int control; /* -1: it is dead */
	uint32_t connections;
	uint64_t started_us;
};

struct domain {
	int listener, owner, signals;
	const struct image *image;
	unsigned lanes;
	struct child child[DOMAIN_LANES_MAX];
	int waiting; /* a front end; -1 */
	uint64_t waiting_since_us;
};

/* ---- lanes ---------------------------------------------------------------------------------------------- */

static int nth_cpu(unsigned n)
{
	cpu_set_t set;
	int cpu = -1;

	if (sched_getaffinity(0, sizeof set, &set) || !CPU_COUNT(&set))
		return 0;
	for (n = n % (unsigned)CPU_COUNT(&set) + 1; n; n--)
		do
			cpu++;
		while (!CPU_ISSET(cpu, &set));
	return cpu;
}

/* All that the domain has but the image, the socket to it, and standard streams. */
static void close_all_but(int a, int b)
{
	unsigned low = (unsigned)(a < b ? a : b), high = (unsigned)(a < b ? b : a);

	if (low > STDERR_FILENO + 1)
		close_range(STDERR_FILENO + 1, low - 1, 0);
	if (high > low + 1)
		close_range(low + 1, high - 1, 0);
	close_range(high + 1, ~0u, 0);
}

static _Noreturn void be_lane(struct domain *d, unsigned n, int control, pid_t parent)
{
	sigset_t none;

	prctl(PR_SET_PDEATHSIG,
	      SIGKILL); /* no lane outlives its domain: the image's lock is all of theirs */
	prctl(PR_SET_NAME, "latent-lane");
	if (getppid() != parent)
		_exit(0);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	close_all_but(control, d->image->fd);
	lane_main(nth_cpu(n), control, d->image);
}

static int start_lane(struct domain *d, unsigned n)
{
	struct child *child = &d->child[n];
	pid_t parent = getpid();
	int pair[2];

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
		return -errno;
	child->control = pair[0];
	child->pid = fork();
	if (!child->pid)
		be_lane(d, n, pair[1], parent);
	close(pair[1]);
	child->connections = 0;
	child->started_us = os_now_us();
	if (child->pid > 0)
		return 0;
	close(child->control);
	child->control = -1;
	return -EAGAIN; /* as fork(2) has it: too many processes, or no memory */
}

/* Each lane says so when it can serve; one that cannot has said why. */
static int wait_for_lanes(struct domain *d)
{
	for (unsigned n = 0; n < d->lanes; n++) {
		char byte;

		if (recv(d->child[n].control, &byte, sizeof byte, 0) != sizeof byte)
			return -ECHILD;
	}
	return 0;
}

static void lane_died(struct domain *d, unsigned n)
{
	struct child *child = &d->child[n];
	int status = 0;

	close(child->control);
	child->control = -1;
	waitpid(child->pid, &status, 0);
	if (WIFSIGNALED(status))
		lane_say("lane %u was ended by signal %d (%s); another one takes its place, and its "
			 "front ends may come back",
			 n, WTERMSIG(status), strsignal(WTERMSIG(status)));
}

static void start_missing_lanes(struct domain *d)
{
	for (unsigned n = 0; n < d->lanes; n++)
		if (d->child[n].control < 0 && os_now_us() - d->child[n].started_us > LANE_LIFE_US)
			(void)start_lane(d, n);
}

/* A byte for each connection that has ended; or the end. */
static void lane_speaks(struct domain *d, unsigned n)
{
	char byte;
	ssize_t got = recv(d->child[n].control, &byte, sizeof byte, MSG_DONTWAIT);

	if (got > 0 && byte == LANE_ENDED && d->child[n].connections)
		d->child[n].connections--;
	else if (!got || (got < 0 && errno != EAGAIN && errno != EINTR))
		lane_died(d, n);
}

/* ---- front ends ----------------------------------------------------------------------------------------- */

static int send_fd(int control, int fd)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int))];
	} data = { .align = { CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS } };
	char byte = 0;
	struct iovec iov = { &byte, 1 };
	struct msghdr message = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &data, .msg_controllen = sizeof data
	};

	memcpy(CMSG_DATA(&data.align), &fd, sizeof fd);
	return sendmsg(control, &message, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 ? -errno : 0;
}

static struct child *least_busy(struct domain *d)
{
	struct child *best = NULL;

	for (unsigned i = 0; i < d->lanes; i++) {
		struct child *child = &d->child[i];

		if (child->control >= 0 && child->connections < LANE_CONNECTIONS &&
		    (!best || child->connections < best->connections))
			best = child;
	}
	return best;
}

static bool is_served(const struct domain *d)
{
	uint32_t connections = 0;

	for (unsigned i = 0; i < d->lanes; i++)
		connections += d->child[i].control >= 0 ? d->child[i].connections : 0;
	return connections;
}

static void drop_waiting(struct domain *d)
{
	close(d->waiting);
	d->waiting = -1;
}

static bool has_left(int fd)
{
	char byte;

	return !recv(fd, &byte, sizeof byte, MSG_PEEK | MSG_DONTWAIT);
}

static void place_waiting(struct domain *d)
{
	struct child *child;

	if (d->waiting >= 0 && has_left(d->waiting))
		drop_waiting(d);
	if (d->waiting < 0)
		return;
	child = is_served(d) && !d->image->readonly ? NULL : least_busy(d);
	if (child && !send_fd(child->control, d->waiting)) {
		child->connections++;
		drop_waiting(d);
	} else if (os_now_us() - d->waiting_since_us > PATIENCE_US) {
		lane_say("a front end is sent away: %s",
			 is_served(d) ? "another one has the image, and only one may write it "
					"(--readonly serves many)"
				      : "no lane is there to serve it");
		drop_waiting(d);
	}
}

static void accept_one(struct domain *d)
{
	d->waiting = accept4(d->listener, NULL, NULL, SOCK_CLOEXEC);
	d->waiting_since_us = os_now_us();
}

/* ---- the loop ------------------------------------------------------------------------------------------- */

/* False: it is time to end. */
static bool wait_for_something(struct domain *d)
{
	struct pollfd polls[DOMAIN_LANES_MAX + 3] = { { d->signals, POLLIN, 0 },
						      { d->owner, POLLIN, 0 },
						      { d->waiting < 0 ? d->listener : -1, POLLIN, 0 } };
	bool incomplete = d->waiting >= 0;

	for (unsigned i = 0; i < d->lanes; i++) {
		polls[3 + i] = (struct pollfd){ d->child[i].control, POLLIN, 0 };
		incomplete |= d->child[i].control < 0;
	}
	if (poll(polls, 3 + d->lanes, incomplete ? 100 : -1) < 0)
		return errno == EINTR;
	if (polls[0].revents || polls[1].revents)
		return false;
	for (unsigned i = 0; i < d->lanes; i++)
		if (polls[3 + i].revents)
			lane_speaks(d, i);
	if (polls[2].revents)
		accept_one(d);
	return true;
}

static void end_lanes(struct domain *d)
{
	for (unsigned i = 0; i < d->lanes; i++) {
		if (d->child[i].control < 0)
			continue;
		kill(d->child[i].pid, SIGKILL);
		waitpid(d->child[i].pid, NULL, 0);
		close(d->child[i].control);
	}
}

int domain_serve(int listener, int owner, const struct image *image, unsigned lanes,
		 domain_ready_fn ready, void *ctx)
{
	struct domain d = {
		.listener = listener, .owner = owner, .image = image, .lanes = lanes, .waiting = -1
	};
	sigset_t signals;
	int r = 0;

	sigemptyset(&signals);
	sigaddset(&signals, SIGTERM);
	sigaddset(&signals, SIGINT);
	sigaddset(&signals, SIGHUP);
	sigprocmask(SIG_BLOCK, &signals, NULL);
	d.signals = signalfd(-1, &signals, SFD_CLOEXEC);
	for (unsigned i = 0; i < lanes; i++)
		d.child[i].control = -1;
	for (unsigned i = 0; !r && i < lanes; i++)
		r = start_lane(&d, i);
	if (!r)
		r = wait_for_lanes(&d);
	if (!r && ready)
		ready(ctx);
	while (!r && wait_for_something(&d)) {
		start_missing_lanes(&d);
		place_waiting(&d);
	}
	if (d.waiting >= 0)
		drop_waiting(&d);
	end_lanes(&d);
	close(d.signals);
	return r;
}
