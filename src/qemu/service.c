/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The agent's thread. It has all signals blocked, so QEMU's handlers never run here; the leases'
 * signal is queued to this thread alone and read from a signalfd.
 */
#include "qemu/agent.h"

#include "os/os.h"
#include "vmdir/control.h"
#include "vmdir/vmdir.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define TICK_MS 1000
#define DEEP_US 5000000  /* copies on write are counted that often, */
#define DEEP_SHARE 100   /* and seldom enough to take no more than this part of a processor */
#define RECOUNT_TICKS 60 /* and the process's mappings */
#define CLIENTS 16

struct service {
	struct agent *agent;
	struct qmp *qmp;
	int listen_fd, signal_fd;
	int clients[CLIENTS]; /* -1: free */
	pid_t tid;
	uint64_t next_deep_us;
	sem_t ready;
};

static uint64_t now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

/* ---- giving files up -------------------------------------------------------------------------- */

struct detached {
	uint64_t pages, paused_us;
};

static bool is_detached(struct volume *v, struct volume *only)
{
	return (!only || v == only) && !volume_is_mapped(v);
}

/* Moves to base what is left of volumes that are mapped no more; the guest is stopped meanwhile. */
static int settle(struct service *s, struct volume *only, struct detached *d)
{
	bool was_running = false;
	uint64_t since_us, pages = 0;
	struct volume *v;
	int r = s->qmp ? qmp_stop(s->qmp, &was_running) : -ENOTCONN;

	if (r)
		return r;
	since_us = now_us();
	for (uint32_t i = 0; (v = volumes_nth(s->agent->volumes, i)); i++) {
		int one = is_detached(v, only) ? volume_settle(v, &pages) : 0;

		r = r ? r : one;
	}
	if (was_running)
		(void)qmp_cont(s->qmp);
	d->paused_us += now_us() - since_us;
	d->pages += pages;
	stat_add(&s->agent->stats->pages_settled, pages);
	return r;
}

/* One volume, or all. */
static int detach(struct service *s, struct volume *only, struct detached *d)
{
	struct volume *v;
	int r = 0;

	for (uint32_t i = 0; !r && (v = volumes_nth(s->agent->volumes, i)); i++)
		if (!only || v == only)
			r = volume_break(v, VOLUME_DETACHED);
	if (!r)
		r = settle(s, only, d);
	for (uint32_t i = 0; (v = volumes_nth(s->agent->volumes, i)); i++)
		if (is_detached(v, only))
			volume_release(v);
	return r;
}

static void give_way(struct service *s, struct volume *v)
{
	struct detached d = { 0 };
	int r;

	agent_say("%s is wanted for writing: giving it up", volume_path(v));
	r = detach(s, v, &d);
	if (r)
		agent_say("%s: the guest could not be stopped to settle its pages (%s); they are private copies, "
			  "safe while the file is rewritten but not when it is cut",
			  volume_path(v), strerror(-r));
	else
		agent_say("%s: %llu pages settled, the guest stood for %.1f ms", volume_path(v),
			  (unsigned long long)d.pages, (double)d.paused_us / 1000);
}

static void on_signal(struct service *s)
{
	struct signalfd_siginfo info;
	struct volume *v;

	while (read(s->signal_fd, &info, sizeof info) == (ssize_t)sizeof info)
		; /* which lease it was is asked below: a queued signal may have been lost */
	while ((v = volumes_broken_lease(s->agent->volumes)))
		give_way(s, v);
}

/* A hook has given a file up in haste. */
static void on_wake(struct service *s)
{
	struct detached d = { 0 };
	uint64_t count;
	int r;

	if (read(s->agent->wake_fd, &count, sizeof count) < 0)
		return;
	r = settle(s, NULL, &d);
	if (r)
		agent_say("pages of a file that is written now could not be settled: %s", strerror(-r));
}

/* ---- requests --------------------------------------------------------------------------------- */

static void do_detach(struct service *s, const struct control_request *q, struct control_reply *p)
{
	struct volume *v = q->path[0] ? volumes_by_path(s->agent->volumes, q->path) : NULL;
	struct detached d = { 0 };

	if (q->path[0] && !v) {
		p->error = -ENOENT;
		snprintf(p->text, sizeof p->text, "nothing of %.400s is mapped; `latent stat` lists the drives", q->path);
		return;
	}
	p->error = detach(s, v, &d);
	p->pages = d.pages;
	p->paused_us = d.paused_us;
	if (p->error == -ETIMEDOUT)
		snprintf(p->text, sizeof p->text, "QEMU's main loop did not answer in time; the pages are private "
			 "copies now: run it again to move them to base");
	else if (p->error)
		snprintf(p->text, sizeof p->text, "the pages could not be moved to base: %s", strerror(-p->error));
}

static void answer(struct service *s, const struct control_request *q, struct control_reply *p)
{
	switch (q->op) {
	case CONTROL_PING:
		break;
	case CONTROL_REFRESH:
		p->error = volumes_refresh(s->agent->volumes, true);
		break;
	case CONTROL_DETACH:
		do_detach(s, q, p);
		break;
	default:
		p->error = -EOPNOTSUPP;
		snprintf(p->text, sizeof p->text, "the VM's agent does not know this request");
	}
}

static bool is_valid(const struct control_request *q, ssize_t bytes)
{
	return bytes == (ssize_t)sizeof *q && q->magic == CONTROL_MAGIC && q->version == CONTROL_VERSION &&
	       memchr(q->path, '\0', sizeof q->path);
}

static void on_client(struct service *s, int *client)
{
	struct control_reply p = { .magic = CONTROL_MAGIC, .version = CONTROL_VERSION };
	static struct control_request q; /* only this thread */
	ssize_t n = recv(*client, &q, sizeof q, MSG_DONTWAIT);

	if (n > 0) {
		if (is_valid(&q, n)) {
			answer(s, &q, &p);
		} else {
			p.error = -EPROTO;
			snprintf(p.text, sizeof p.text, "the request is not of this version of Latent");
		}
		if (send(*client, &p, sizeof p, MSG_DONTWAIT | MSG_NOSIGNAL) == (ssize_t)sizeof p)
			return;
	}
	close(*client);
	*client = -1;
}

static bool may_ask(int client)
{
	struct ucred peer;
	socklen_t bytes = sizeof peer;

	return !getsockopt(client, SOL_SOCKET, SO_PEERCRED, &peer, &bytes) &&
	       (peer.uid == geteuid() || peer.uid == 0);
}

static void on_connect(struct service *s)
{
	int client = accept4(s->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

	for (size_t i = 0; client >= 0 && may_ask(client) && i < CLIENTS; i++) {
		if (s->clients[i] < 0) {
			s->clients[i] = client;
			return;
		}
	}
	if (client >= 0)
		close(client);
}

/* ---- the loop --------------------------------------------------------------------------------- */

/* Copies on write are found by a walk through the page tables, whose length grows with RAM. */
static void refresh(struct service *s)
{
	uint64_t begin_us = now_us();
	bool deep = begin_us >= s->next_deep_us;

	(void)volumes_refresh(s->agent->volumes, deep);
	if (deep) {
		uint64_t took_us = now_us() - begin_us;

		s->next_deep_us = begin_us + (took_us * DEEP_SHARE > DEEP_US ? took_us * DEEP_SHARE : DEEP_US);
	}
}

static void tick(struct service *s, uint64_t ticks)
{
	struct volume *v;

	while ((v = volumes_broken_lease(s->agent->volumes)))
		give_way(s, v);
	if (ticks % RECOUNT_TICKS == 1)
		(void)ram_recount_maps(s->agent->ram);
	refresh(s);
}

enum { POLL_LISTEN, POLL_SIGNAL, POLL_WAKE, POLL_CLIENTS };

static void serve(struct service *s)
{
	uint64_t ticks = 0, next_us = now_us() + TICK_MS * 1000;

	for (;;) {
		struct pollfd p[POLL_CLIENTS + CLIENTS] = {
			[POLL_LISTEN] = { .fd = s->listen_fd, .events = POLLIN },
			[POLL_SIGNAL] = { .fd = s->signal_fd, .events = POLLIN },
			[POLL_WAKE] = { .fd = s->agent->wake_fd, .events = POLLIN },
		};
		uint64_t now = now_us();

		for (size_t i = 0; i < CLIENTS; i++)
			p[POLL_CLIENTS + i] = (struct pollfd){ .fd = s->clients[i], .events = POLLIN };
		(void)poll(p, POLL_CLIENTS + CLIENTS, now < next_us ? (int)((next_us - now) / 1000 + 1) : 0);
		if (!agent_get())
			continue; /* still starting: no volumes yet */
		if (p[POLL_SIGNAL].revents)
			on_signal(s);
		if (p[POLL_WAKE].revents)
			on_wake(s);
		if (p[POLL_LISTEN].revents)
			on_connect(s);
		for (size_t i = 0; i < CLIENTS; i++)
			if (s->clients[i] >= 0 && p[POLL_CLIENTS + i].revents)
				on_client(s, &s->clients[i]);
		if (now_us() >= next_us) {
			tick(s, ++ticks);
			next_us = now_us() + TICK_MS * 1000;
		}
	}
}

static int listen_at(const char *run_dir)
{
	struct sockaddr_un at = { .sun_family = AF_UNIX };
	int fd;

	if ((size_t)snprintf(at.sun_path, sizeof at.sun_path, "%s/" VMDIR_CONTROL, run_dir) >= sizeof at.sun_path)
		return -ENAMETOOLONG;
	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return -errno;
	if (bind(fd, (struct sockaddr *)&at, sizeof at) || listen(fd, CLIENTS)) {
		int r = -errno;

		close(fd);
		return r;
	}
	return fd;
}

static void *service_main(void *arg)
{
	struct service *s = arg;
	sigset_t lease;

	s->tid = (pid_t)syscall(SYS_gettid);
	sigemptyset(&lease);
	sigaddset(&lease, SERVICE_LEASE_SIGNAL);
	s->signal_fd = signalfd(-1, &lease, SFD_CLOEXEC | SFD_NONBLOCK);
	sem_post(&s->ready);
	serve(s);
	return NULL;
}

static int start_thread(struct service *s)
{
	sigset_t all, old;
	pthread_t thread;
	int r;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	r = -pthread_create(&thread, NULL, service_main, s);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (r)
		return r;
	pthread_setname_np(thread, "latent");
	pthread_detach(thread);
	while (sem_wait(&s->ready) && errno == EINTR)
		;
	return 0;
}

int service_start(struct agent *agent, pid_t *ret_tid)
{
	struct service *s = calloc(1, sizeof *s);
	int r;

	if (!s)
		return -ENOMEM;
	s->agent = agent;
	for (size_t i = 0; i < CLIENTS; i++)
		s->clients[i] = -1;
	sem_init(&s->ready, 0, 0);
	r = s->listen_fd = listen_at(agent->config.run_dir);
	if (r >= 0)
		r = agent->config.qmp_fd >= 0 ? qmp_open(agent->config.qmp_fd, &s->qmp) : 0;
	if (!r)
		r = start_thread(s);
	if (!r)
		*ret_tid = s->tid;
	return r;
}
