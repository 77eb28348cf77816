/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The agent's thread. It has all signals blocked, so QEMU's handlers never run here; the leases'
 * signal is queued to this thread alone and read from a signalfd.
 */
#include "qemu/agent.h"

#include "activity/states.h"
#include "os/os.h"
#include "os/probe.h"
#include "vmdir/control.h"
#include "vmdir/vmdir.h"
#include "volume/cost.h"

#include <errno.h>
#include <poll.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#define TICK_MS 1000
#define DEEP_US 5000000  /* copies on write are counted that often, */
#define DEEP_SHARE 100   /* and seldom enough to take no more than this part of a processor */
#define RECOUNT_TICKS 60 /* and the process's mappings; */
#define FEW_MAPS 4000    /* below that, every few seconds */
#define TIDY_TICKS 5     /* files that were closed, or whose writer has gone, are looked for */
#define TRY_AFTER_US 1000000
#define TRY_AFTER_MAX_US 60000000
#define FREEZE_MS 1000
#define CLIENTS 16

struct service {
	struct agent *agent;
	struct pause *pause;
	int listen_fd, signal_fd;
	int clients[CLIENTS]; /* -1: free */
	int passed_fd; /* that has come with the request, -1: none; closed after it unless it is taken */
	pid_t tid;
	uint64_t next_deep_us;
	uint64_t lease_break_us; /* how long the kernel makes a writer wait */
	uint64_t next_try_us, try_after_us; /* of give_way, after a failure */
	int last_error; /* of give_way: said once */
	int halt_error; /* of stop_overtaken: said once */
	int channel; /* to be sent, behind the reply to CONTROL_INCOMING; -1: none */
	sem_t ready;
};

/* ---- giving files up -------------------------------------------------------------------------- */

/*
 * Settling needs every writer of guest RAM stopped. Where nothing but QEMU's threads writes it, they are stopped
 * by a signal (agent_settle_frozen). With vhost, io_uring or Linux AIO it takes QMP's `stop`, which halts vCPUs
 * and drains block I/O, but QEMU's main loop goes on: a serial port or a `cont` from a user may come just
 * then. So the main loop itself settles: the hook of sendmsg sees it send the reply to our `stop`, and
 * nothing else of QEMU runs meanwhile. Where the reply is not sent by the main thread, the service thread
 * settles after it.
 */
enum settle_stage { SETTLE_IDLE, SETTLE_ARMED, SETTLE_RUNS, SETTLE_DONE };

static struct {
	_Atomic uint32_t stage;
	_Atomic uint32_t stop_id;
	uint64_t pages; /* written by who took the stage to SETTLE_RUNS, read after SETTLE_DONE */
	int error;
} settling;

/* What is mapped no more, and still has overlays. */
static void settle_now(struct agent *a)
{
	struct volume *v;

	settling.pages = 0;
	settling.error = 0;
	ram_lock(a->ram);
	for (uint32_t i = 0; (v = volumes_nth(a->volumes, i)); i++) {
		int r = volume_is_mapped(v) ? 0 : volume_settle(v, &settling.pages);

		settling.error = settling.error ? settling.error : r;
	}
	ram_unlock(a->ram);
	settling.stage = SETTLE_DONE;
}

static bool take_stage(void)
{
	uint32_t armed = SETTLE_ARMED;

	return atomic_compare_exchange_strong(&settling.stage, &armed, SETTLE_RUNS);
}

/* {"return": {}, "id": 7} */
static bool is_reply(const struct iovec *iov, size_t count, unsigned id)
{
	char want[32];
	int n = snprintf(want, sizeof want, "\"id\": %u}", id);

	for (size_t i = 0; i < count; i++)
		if (memmem(iov[i].iov_base, iov[i].iov_len, want, (size_t)n))
			return true;
	return false;
}

void service_before_send(int fd, const struct iovec *iov, size_t count)
{
	struct agent *a = agent_get();

	if (settling.stage != SETTLE_ARMED || !a || fd != a->config.qmp_vmm_fd || getpid() != syscall(SYS_gettid))
		return;
	if (is_reply(iov, count, settling.stop_id) && take_stage())
		settle_now(a);
}

static int stop_and_settle(struct service *s, bool *ret_stopped)
{
	unsigned stop_id;
	int r = s->pause ? pause_prepare(s->pause, &stop_id) : -ENOTCONN;

	if (r)
		return r;
	settling.stop_id = stop_id;
	settling.stage = SETTLE_ARMED;
	r = pause_stop(s->pause, ret_stopped);
	if (take_stage()) { /* the main thread has not */
		if (!r)
			settle_now(s->agent);
		else
			settling.stage = SETTLE_IDLE;
	}
	while (settling.stage == SETTLE_RUNS)
		usleep(1000);
	if (settling.stage == SETTLE_DONE)
		r = settling.error;
	return r;
}

static int settle_by_qmp(struct service *s, struct settled *d)
{
	bool stopped = false;
	uint64_t since_us = os_now_us();
	int r, cont;

	settling.pages = 0;
	r = stop_and_settle(s, &stopped);
	cont = stopped ? pause_end(s->pause) : 0;
	if (cont)
		agent_say("the guest was stopped and could not be continued (%s): use `cont`", strerror(-cont));
	if (settling.stage == SETTLE_DONE)
		d->pages += settling.pages;
	if (stopped)
		d->paused_us += os_now_us() - since_us;
	settling.stage = SETTLE_IDLE;
	return r;
}

static bool is_late(struct service *s, struct volume *v)
{
	return os_now_us() - volume_broken_us(v) > s->lease_break_us / 8 * 7;
}

static int settle(struct service *s, struct settled *d)
{
	uint64_t before = d->pages;
	int r = agent_settle_frozen(s->agent, false, FREEZE_MS, d);

	if (r == -EBUSY || r == -ETIMEDOUT)
		r = settle_by_qmp(s, d);
	stat_add(&s->agent->stats->pages_settled, d->pages - before);
	return r;
}

/* The kernel has let the writer in: what it writes may show in pages that were not copied in time. */
static void tell_expired(struct service *s, struct volume *v)
{
	if (!volume_showing_pages(v) || os_now_us() - volume_broken_us(v) < s->lease_break_us)
		return;
	agent_say("%s: fs.lease-break-time is over and %llu pages of guest RAM still show the file; if it is "
		  "changed now, the guest sees it", volume_path(v), (unsigned long long)volume_showing_pages(v));
	volume_release(v);
}

/* A lease goes back when nothing shows the file any more, and if it may be cut: nothing refers to it. */
static void release_clear(struct service *s)
{
	struct volume *v;

	for (uint32_t i = 0; (v = volumes_nth(s->agent->volumes, i)); i++) {
		if (volume_is_mapped(v) || !volume_is_leased(v))
			continue;
		tell_expired(s, v);
		if (volume_overlay_pages(v) && (volume_showing_pages(v) || !is_late(s, v)))
			continue;
		if (volume_overlay_pages(v))
			agent_say("%s is given back though the guest could not be stopped: it may be rewritten, but if "
				  "it is cut, %llu pages of guest RAM are lost", volume_path(v),
				  (unsigned long long)volume_overlay_pages(v));
		volume_release(v);
	}
}

/* Something of a file that is mapped no more is still there. */
static bool is_left(struct volume *v)
{
	return !volume_is_mapped(v) && (volume_overlay_pages(v) || volume_is_leased(v));
}

/* Only then has the guest to stand still. */
static bool has_overlays(struct volume *v)
{
	return !volume_is_mapped(v) && volume_overlay_pages(v);
}

static bool any_volume(struct service *s, bool (*is)(struct volume *v))
{
	struct volume *v;

	for (uint32_t i = 0; (v = volumes_nth(s->agent->volumes, i)); i++)
		if (is(v))
			return true;
	return false;
}

/* Finishes what was begun with volume_break, for all volumes; to be tried again after a failure. */
static int finish(struct service *s, struct settled *d)
{
	struct volume *v;
	int r = 0;

	for (uint32_t i = 0; (v = volumes_nth(s->agent->volumes, i)); i++)
		if (is_left(v) && volume_showing_pages(v))
			r = volume_break(v, VOLUME_WRITABLE); /* settling does without, too */
	if (any_volume(s, has_overlays)) {
		for (uint32_t i = 0; (v = volumes_nth(s->agent->volumes, i)); i++)
			if (has_overlays(v))
				volume_swap_in(v);
		r = settle(s, d);
	}
	release_clear(s);
	return r;
}

/* One volume, or all, and those to come. */
static int detach(struct service *s, struct volume *only, struct settled *d)
{
	if (only)
		(void)volume_break(only, VOLUME_DETACHED);
	else
		volumes_detach(s->agent->volumes);
	return finish(s, d);
}

/*
 * QEMU stood still for longer than the kernel makes a writer wait, or a file that nothing protects was cut. The guest must
 * not go on as if nothing was: what it
 * does with such pages may reach its disks. Tried again until it stands.
 */
static void stop_overtaken(struct service *s)
{
	struct volume *v;

	for (uint32_t i = 0; (v = volumes_nth(s->agent->volumes, i)); i++) {
		int r;

		if (!volume_is_overtaken(v))
			continue;
		r = s->pause ? pause_halt(s->pause) : -ENOTCONN;
		if (!r)
			volume_tell_overtaken(v);
		if (!r || r != s->halt_error)
			agent_say("%s was %s: %s%s. Reset it (`system_reset`, `cont`), or start it anew", volume_path(v),
				  volume_is_leased(v) ? "changed while QEMU stood still for longer than fs.lease-break-time, and "
							"the guest may have pages of both" :
							"cut while it was mapped, and the guest has lost pages",
				  r ? "it should be stopped, and cannot be yet: " : "it is stopped", r ? strerror(-r) : "");
		s->halt_error = r;
	}
}

/* Files that somebody waits to write, and what is left from earlier. Acts first, then talks. */
static void give_way(struct service *s)
{
	struct settled d = { 0 };
	struct volume *v;
	int r;

	stop_overtaken(s); /* before the guest can read on */
	for (uint32_t i = 0; (v = volumes_nth(s->agent->volumes, i)); i++)
		if (volume_lease_breaks(v))
			(void)volume_break(v, VOLUME_WRITABLE);
	stop_overtaken(s);
	if (!any_volume(s, is_left))
		return;
	r = finish(s, &d);
	if (r && r != s->last_error)
		agent_say("a file is wanted for writing, and pages that were mapped from it could not be moved to "
			  "plain RAM yet: %s", strerror(-r));
	else if (!r)
		agent_say("a file is wanted for writing: %llu pages that were mapped from it are plain RAM now; the "
			  "guest stood for %.1f ms", (unsigned long long)d.pages, (double)d.paused_us / 1000);
	s->last_error = r;
	/* What cannot be moved does not get better by stopping the guest for it every second. */
	s->try_after_us = r ? (s->try_after_us ? s->try_after_us * 2 : TRY_AFTER_US) : 0;
	if (s->try_after_us > TRY_AFTER_MAX_US)
		s->try_after_us = TRY_AFTER_MAX_US;
	s->next_try_us = os_now_us() + s->try_after_us;
}

static void on_signal(struct service *s)
{
	struct signalfd_siginfo info;

	while (read(s->signal_fd, &info, sizeof info) == (ssize_t)sizeof info)
		; /* which lease it was is asked for all: a queued signal may have been lost */
	give_way(s);
}

/* A hook has given a file up in haste. */
static void on_wake(struct service *s)
{
	uint64_t count;

	if (read(s->agent->wake_fd, &count, sizeof count) > 0)
		give_way(s);
}

/* ---- requests --------------------------------------------------------------------------------- */

static void do_detach(struct service *s, const struct control_request *q, struct control_reply *p)
{
	struct volume *v = q->path[0] ? volumes_by_path(s->agent->volumes, q->path) : NULL;
	struct settled d = { 0 };

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
	else if (p->error == -EBUSY)
		snprintf(p->text, sizeof p->text, "QEMU is migrating, saving or suspended; run it again afterwards");
	else if (p->error)
		snprintf(p->text, sizeof p->text, "the pages could not be moved to base: %s", strerror(-p->error));
}

/* The decimal at `text`; returns what follows it, NULL: there is none. */
static const char *parse_number(const char *text, uint64_t *ret_number)
{
	char *end;

	if (*text < '0' || *text > '9')
		return NULL;
	errno = 0;
	*ret_number = strtoull(text, &end, 10);
	return errno ? NULL : end;
}

static void do_reclaim(struct service *s, const struct control_request *q, struct control_reply *p)
{
	struct reclaim_order order = { 0 };
	const char *next = parse_number(q->path, &order.unused_us);

	if (next && *next == ' ')
		next = parse_number(next + 1, &order.until_bytes);
	if (!next || *next) {
		p->error = -EINVAL;
		snprintf(p->text, sizeof p->text,
			 "say for how many microseconds pages have not been used");
	} else if (order.unused_us) {
		reclaimer_begin(s->agent, &order, p);
	} else {
		reclaimer_end();
	}
}

static void do_reclaim_store(struct service *s, const struct control_request *q, struct control_reply *p)
{
	uint64_t most_bytes;
	const char *end = parse_number(q->path, &most_bytes);

	if (!end || *end || s->passed_fd < 0) {
		p->error = -EINVAL;
		snprintf(p->text, sizeof p->text, "give a file, and say how many bytes it may take");
		return;
	}
	reclaimer_store(s->agent, s->passed_fd, most_bytes, p);
	if (!p->error)
		s->passed_fd = -1;
}

static void do_scan(struct service *s, const struct control_request *q, struct control_reply *p)
{
	uint64_t period_us;
	const char *end = parse_number(q->path, &period_us);

	p->error = end && !*end ? scanner_set(s->agent, period_us) : -EINVAL;
	if (p->error == -EINVAL)
		snprintf(p->text, sizeof p->text, "a scan period is from %llu to %llu microseconds, or 0", SCAN_PERIOD_MIN_US,
			 SCAN_PERIOD_MAX_US);
	else if (p->error == -EBUSY)
		snprintf(p->text, sizeof p->text, "QEMU's post-copy or background snapshot watches guest RAM: what the guest "
			 "uses cannot be seen");
	else if (p->error)
		snprintf(p->text, sizeof p->text, "the scan could not be started: %s", strerror(-p->error));
}

static void do_pass(int client, const struct control_request *q, struct control_reply *p)
{
	uint64_t pass_us;
	const char *end = parse_number(q->path, &pass_us);

	if (end && !*end)
		saver_pass(client, pass_us, p);
	else
		p->error = -EINVAL;
}

static void answer(struct service *s, int client, const struct control_request *q, struct control_reply *p)
{
	switch (q->op) {
	case CONTROL_REFRESH:
		p->error = volumes_refresh(s->agent->volumes, true);
		(void)reclaimer_publish(s->agent);
		break;
	case CONTROL_DETACH:
		do_detach(s, q, p);
		break;
	case CONTROL_SAVE_LOAD:
		saver_load(s->agent, client, p);
		break;
	case CONTROL_SAVE_BEGIN:
		saver_begin(s->agent, client, p);
		if (!p->error && s->pause)
			pause_save_begins(s->pause);
		break;
	case CONTROL_SAVE_WATCH:
		saver_watch(client, p);
		break;
	case CONTROL_SAVE_SETTLE:
		saver_settle(s->agent, client, p);
		break;
	case CONTROL_SAVE_ARM:
		saver_arm(s->agent, client, p);
		break;
	case CONTROL_SAVE_PASS:
		do_pass(client, q, p);
		break;
	case CONTROL_SAVE_POINT:
		saver_point(s->agent, client, p);
		break;
	case CONTROL_SAVE_GIVE:
		p->error = s->pause && saver_is_client(client) ? 0 : -EPROTO;
		if (!p->error)
			pause_give(s->pause);
		break;
	case CONTROL_SAVE_END:
		saver_end(s->agent, client, p);
		break;
	case CONTROL_TAKE:
		resume_take(s->agent, s->pause, q->path, p);
		break;
	case CONTROL_STOP_REST:
		resume_stop_rest(s->agent, p);
		break;
	case CONTROL_SCAN:
		do_scan(s, q, p);
		break;
	case CONTROL_RECLAIM:
		do_reclaim(s, q, p);
		break;
	case CONTROL_INCOMING:
		p->error = incoming_attach(&s->channel);
		if (p->error)
			snprintf(p->text, sizeof p->text, p->error == -EALREADY
				 ? "a mover is at work (`latent receive`): end that one first"
				 : p->error == -ENOENT ? "the VM has not come from another host"
						       : "there can be no other mover now");
		break;
	case CONTROL_RECLAIM_STORE:
		do_reclaim_store(s, q, p);
		break;
	case CONTROL_ENTRIES:
		break; /* follow_up */
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

static int send_channel(struct service *s, int client)
{
	static const struct control_layout empty;
	int r = layout_send(client, &empty, &s->channel, 1);

	return r;
}

static void close_channel(struct service *s)
{
	if (s->channel >= 0)
		close(s->channel);
	s->channel = -1;
}

/* What comes after the reply to a request that was granted. */
static int follow_up(struct service *s, int client, uint32_t op)
{
	if (op == CONTROL_SAVE_BEGIN)
		saver_began(s->agent, client);
	if (op == CONTROL_INCOMING)
		return send_channel(s, client);
	return op == CONTROL_ENTRIES ? layout_send_tables(s->agent, client, false) : 0;
}

static void undo_save(struct service *s)
{
	int r = s->pause ? pause_undo_save(s->pause) : 0;

	if (r)
		agent_say("what it has begun in QEMU could not be taken back (%s): see `query-status`", strerror(-r));
}

static void close_passed(struct service *s)
{
	if (s->passed_fd >= 0)
		close(s->passed_fd);
	s->passed_fd = -1;
}

/* A request, and a descriptor that may come with it; the kernel has no room for more (of CMSG_SPACE it would use the
 * padding). */
static ssize_t receive(struct service *s, int client, struct control_request *q)
{
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof(int))];
	} rights;
	struct iovec iov = { q, sizeof *q };
	struct msghdr message = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = &rights,
		.msg_controllen = CMSG_LEN(sizeof(int)), /* its padding would have room for another one */
	};
	ssize_t n = recvmsg(client, &message, MSG_DONTWAIT | MSG_TRUNC | MSG_CMSG_CLOEXEC); /* a longer one is none */
	const struct cmsghdr *c = n >= 0 ? CMSG_FIRSTHDR(&message) : NULL;

	if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS && c->cmsg_len == CMSG_LEN(sizeof(int)))
		memcpy(&s->passed_fd, CMSG_DATA(c), sizeof s->passed_fd);
	if (n <= 0)
		close_passed(s); /* of an empty request */
	return n;
}

static void on_client(struct service *s, int *client)
{
	struct control_reply p = { .magic = CONTROL_MAGIC, .version = CONTROL_VERSION };
	static struct control_request q; /* only this thread */
	ssize_t n = receive(s, *client, &q);
	bool done = false;

	if (n > 0 && is_valid(&q, n)) {
		answer(s, *client, &q, &p);
	} else {
		p.error = -EPROTO;
		snprintf(p.text, sizeof p.text, "the request is not of this version of Latent");
	}
	close_passed(s); /* an empty packet may have brought one, too */
	done = n > 0 && send(*client, &p, sizeof p, MSG_DONTWAIT | MSG_NOSIGNAL) == (ssize_t)sizeof p &&
	       (p.error || !follow_up(s, *client, q.op));
	close_channel(s); /* the client's by now, or nobody's */
	if (done)
		return;
	if (saver_client_gone(s->agent, *client))
		undo_save(s);
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

	static size_t next; /* whose place is taken when none is free */
	size_t place = 0;

	if (client < 0 || !may_ask(client)) {
		if (client >= 0)
			close(client);
		return;
	}
	while (place < CLIENTS && s->clients[place] >= 0)
		place++;
	if (place == CLIENTS) {
		do
			place = next++ % CLIENTS;
		while (saver_is_client(s->clients[place])); /* at most two */
		close(s->clients[place]);
	}
	s->clients[place] = client;
}

/* ---- the loop --------------------------------------------------------------------------------- */

/* Copies on write are found by a walk through the page tables, whose length grows with RAM. */
static void refresh(struct service *s)
{
	uint64_t begin_us = os_now_us();
	bool deep = begin_us >= s->next_deep_us;

	(void)volumes_refresh(s->agent->volumes, deep);
	(void)reclaimer_publish(s->agent);
	if (deep) {
		uint64_t took_us = os_now_us() - begin_us;

		s->next_deep_us = begin_us + (took_us * DEEP_SHARE > DEEP_US ? took_us * DEEP_SHARE : DEEP_US);
	}
}

/* The process's mappings are listed as text: often while they are few. */
static uint64_t recount_ticks(struct service *s)
{
	struct ram_counts c;

	ram_get_counts(s->agent->ram, &c);
	return c.maps + c.other_maps < FEW_MAPS ? 3 : RECOUNT_TICKS;
}

static void tick(struct service *s, uint64_t ticks)
{
	(void)cost_model_get(); /* measured now after a restore: its first second is the guest's */
	stop_overtaken(s);
	if (os_now_us() >= s->next_try_us)
		give_way(s);
	release_clear(s);
	if (ticks % recount_ticks(s) == 1)
		(void)ram_recount_maps(s->agent->ram);
	if (ticks % TIDY_TICKS == 0)
		volumes_tidy(s->agent->volumes);
	refresh(s);
}

enum { POLL_LISTEN, POLL_SIGNAL, POLL_WAKE, POLL_QMP, POLL_KEEPER, POLL_REST, POLL_CLIENTS };

static void serve(struct service *s)
{
	uint64_t ticks = 0, next_us = os_now_us() + TICK_MS * 1000;

	if (s->agent->config.scan_period_us && scanner_set(s->agent, s->agent->config.scan_period_us))
		agent_say("what the guest uses is not looked at: the scan could not be started");
	for (;;) {
		struct pollfd p[POLL_CLIENTS + CLIENTS] = {
			[POLL_LISTEN] = { .fd = s->listen_fd, .events = POLLIN },
			[POLL_SIGNAL] = { .fd = s->signal_fd, .events = POLLIN },
			[POLL_WAKE] = { .fd = s->agent->wake_fd, .events = POLLIN },
			[POLL_QMP] = { .fd = s->pause ? pause_poll_fd(s->pause) : -1, .events = POLLIN },
			[POLL_KEEPER] = { .fd = resume_poll_fd(s->agent), .events = POLLIN },
			[POLL_REST] = { .fd = resume_rest_fd(s->agent), .events = POLLIN },
		};
		uint64_t saver_us = saver_tick(s->agent), learner_us = learner_tick(s->agent), now = os_now_us();
		uint64_t wait_us = now < next_us ? next_us - now + 1000 : 0;

		if (wait_us > saver_us)
			wait_us = saver_us;
		if (wait_us > learner_us)
			wait_us = learner_us;
		for (size_t i = 0; i < CLIENTS; i++)
			p[POLL_CLIENTS + i] = (struct pollfd){ .fd = s->clients[i], .events = POLLIN };
		(void)poll(p, POLL_CLIENTS + CLIENTS, (int)(wait_us / 1000));
		if (!agent_get())
			continue; /* still starting: no volumes yet */
		if (p[POLL_SIGNAL].revents)
			on_signal(s);
		if (p[POLL_WAKE].revents)
			on_wake(s);
		if (p[POLL_QMP].revents & POLLIN)
			pause_drain(s->pause); /* events: QEMU would keep them all */
		resume_note(s->agent, s->pause);
		if (p[POLL_LISTEN].revents)
			on_connect(s);
		if (p[POLL_KEEPER].revents)
			resume_keeper_gone(s->agent, s->pause);
		if (p[POLL_REST].revents)
			resume_rest_said(s->agent);
		for (size_t i = 0; i < CLIENTS; i++)
			if (s->clients[i] >= 0 && p[POLL_CLIENTS + i].revents)
				on_client(s, &s->clients[i]);
		if (os_now_us() >= next_us) {
			tick(s, ++ticks);
			next_us = os_now_us() + TICK_MS * 1000;
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
	os_never_freeze(s->tid); /* one of QEMU's may be inside a system call that waits for a page */
	sigemptyset(&lease);
	sigaddset(&lease, SERVICE_LEASE_SIGNAL);
	s->signal_fd = signalfd(-1, &lease, SFD_CLOEXEC | SFD_NONBLOCK);
	sem_post(&s->ready);
	if (s->agent->config.restore.active) {
		restorer_load_state(s->agent, s->pause);
		resume_restored(s->agent, s->pause);
	} else {
		(void)cost_model_get(); /* measured here, while QEMU makes its machine: nobody waits for it */
	}
	serve(s);
	return NULL;
}

static int start_thread(struct service *s)
{
	int r = agent_start_thread("latent", service_main, s, true);

	if (r)
		return r;
	while (sem_wait(&s->ready) && errno == EINTR)
		;
	return 0;
}

static uint64_t lease_break_us(void)
{
	int seconds = os_features_get()->lease_break_s;

	return (seconds > 0 ? (uint64_t)seconds : 45) * 1000000;
}

int service_start(struct agent *agent, pid_t *ret_tid)
{
	struct service *s = calloc(1, sizeof *s);
	int r;

	if (!s)
		return -ENOMEM;
	s->agent = agent;
	s->passed_fd = -1;
	s->lease_break_us = lease_break_us();
	s->channel = -1;
	for (size_t i = 0; i < CLIENTS; i++)
		s->clients[i] = -1;
	sem_init(&s->ready, 0, 0);
	r = s->listen_fd = listen_at(agent->config.run_dir);
	if (r >= 0)
		r = agent->config.qmp_fd >= 0 ? pause_open(agent->config.qmp_fd, &s->pause) : 0;
	if (!r)
		r = start_thread(s);
	if (r) {
		if (s->listen_fd >= 0)
			close(s->listen_fd);
		free(s);
		return r;
	}
	*ret_tid = s->tid;
	return 0;
}
