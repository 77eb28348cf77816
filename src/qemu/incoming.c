/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The agent's end of a migration to this host: does what the mover asks for (vmdir/incoming.h), and tells it which
 * pages are waited for. The thread touches no guest RAM by its address, takes no lock that somebody may hold who waits
 * for a page, and is never stopped with the others: it is what ends their waiting.
 */
#include "qemu/agent.h"

#include "os/os.h"
#include "vmdir/incoming.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define END_US 5000000 /* from SIGTERM on; QEMU may be waiting for a page that nobody brings */
#define CHANNEL_BYTES (1 << 20)
#define NEAR_PAGES 256u /* between two expected runs: 1 MiB */

static struct {
	struct agent *agent;
	_Atomic int channel; /* -1: there is no mover (any more) */
	int closed;  /* the last one's: the thread that serves faults may just be using it */
	bool began;
	_Atomic bool may_run; /* the guest */
	_Atomic bool complete; /* the mover has said that all is there */
	struct volume *volume[AGENT_RESTORE_VOLUMES]; /* NULL: it cannot be mapped */
} incoming = { .channel = -1, .closed = -1 };

/* ---- what the mover asks for ---------------------------------------------------------------------- */

static struct ram_block *block_of(const struct incoming_run *run)
{
	struct ram_block *b = run->block < RAM_BLOCKS ? ram_block_at(incoming.agent->ram, run->block) : NULL;

	return b && run->page < b->pages && run->pages && run->pages <= b->pages - run->page ? b : NULL;
}

static int map_run(const struct incoming_run *run)
{
	struct ram *ram = incoming.agent->ram;
	struct ram_block *b = block_of(run);
	struct volume *v = run->volume < AGENT_RESTORE_VOLUMES ? incoming.volume[run->volume] : NULL;
	int r;

	if (!b)
		return -EINVAL;
	r = v ? volume_map(v, b, run->page, run->pages, run->file_page) : -ENOTSUP;
	if (r)
		return r;
	ram_lock(ram);
	if (block_of(run) == b)
		ram_set_source_bits(ram, b, run->page, run->pages);
	ram_unlock(ram);
	return 0;
}

static int change_run(enum incoming_op op, const struct incoming_run *run)
{
	struct ram *ram = incoming.agent->ram;
	struct ram_block *b;
	int r;

	if (op == INCOMING_MAP)
		return map_run(run);
	ram_lock(ram);
	b = block_of(run);
	if (!b)
		r = -EINVAL;
	else if (op == INCOMING_BASE)
		r = ram_return_base(ram, b, run->page, run->pages);
	else
		r = ram_expect(ram, b, run->page, run->pages);
	ram_unlock(ram);
	return r;
}

/* Runs from `first` on that lie near each other in one block become one mapping. Returns the first one that does not. */
static uint32_t watch_near(const struct incoming_request *q, uint32_t first)
{
	struct ram *ram = incoming.agent->ram;
	uint64_t begin = q->run[first].page, end = begin + q->run[first].pages;
	uint32_t i = first + 1;
	struct ram_block *b;

	ram_lock(ram);
	b = block_of(&q->run[first]);
	for (; b && i < q->count && block_of(&q->run[i]) == b; i++) {
		const struct incoming_run *next = &q->run[i];

		if (next->page < end || next->page - end > NEAR_PAGES)
			break;
		end = next->page + next->pages;
	}
	if (i > first + 1)
		(void)ram_watch_base(ram, b, begin, end - begin); /* it does without */
	ram_unlock(ram);
	return i;
}

static void watch_all_near(const struct incoming_request *q)
{
	for (uint32_t i = 0; i < q->count;)
		i = watch_near(q, i);
}

static void put_pages(const struct incoming_put *put)
{
	struct agent *a = incoming.agent;

	for (uint32_t i = 0; i < put->count; i++) {
		const struct incoming_place *place = &put->place[i];
		const struct ram_block *b = place->block < RAM_BLOCKS ? ram_block_at(a->ram, place->block) : NULL;
		bool done;
		int r = b && place->page < b->pages ? ram_put(a->ram, b->hva + os_bytes(place->page), put->contents[i], &done)
						    : -EINVAL;

		if (r)
			agent_say("a page that has come cannot be put in place: %s", strerror(-r));
	}
}

static int answer(enum incoming_op op, int error)
{
	struct incoming_reply reply = { .magic = INCOMING_MAGIC, .op = (uint32_t)op, .error = error,
					.expected = ram_expected(incoming.agent->ram) };
	struct iovec iov = { &reply, sizeof reply };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1 };

	return agent_send(incoming.channel, &message) == (ssize_t)sizeof reply ? 0 : -EPIPE;
}

static int end(void)
{
	int r = ram_unmask(incoming.agent->ram);

	if (!r)
		incoming.complete = true;
	return r;
}

static int obey(const struct incoming_request *q)
{
	int r = 0;

	switch ((enum incoming_op)q->op) {
	case INCOMING_LAYOUT:
		r = answer(q->op, 0);
		return r ? r : layout_send_tables(incoming.agent, incoming.channel, true);
	case INCOMING_EXPECT:
		watch_all_near(q);
		__attribute__((fallthrough));
	case INCOMING_MAP:
	case INCOMING_BASE:
		for (uint32_t i = 0; !r && i < q->count; i++)
			r = change_run((enum incoming_op)q->op, &q->run[i]);
		return answer(q->op, r);
	case INCOMING_RUN:
		incoming.may_run = true;
		return answer(q->op, 0);
	case INCOMING_END:
		return answer(q->op, end());
	default:
		return -EPROTO;
	}
}

/* ---- the thread ----------------------------------------------------------------------------------- */

/* 0, or the mover is gone, or talks nonsense. */
static int receive(void)
{
	static union {
		struct incoming_request request;
		struct incoming_put put;
	} in; /* only this thread */
	const size_t request = sizeof in.request - sizeof in.request.run, put = sizeof in.put - sizeof in.put.contents;
	ssize_t n = recv(incoming.channel, &in, sizeof in, 0);

	if (n < 0 && errno == EINTR)
		return 0;
	if (n < (ssize_t)request)
		return -ECONNRESET;
	if (in.request.magic != INCOMING_MAGIC)
		return -EPROTO;
	if (in.request.op == INCOMING_PUT) {
		if (n < (ssize_t)put || in.put.count > INCOMING_PAGES ||
		    (size_t)n != put + in.put.count * sizeof in.put.contents[0])
			return -EPROTO;
		put_pages(&in.put);
		return 0;
	}
	if (in.request.count > INCOMING_RUNS || (size_t)n != request + in.request.count * sizeof in.request.run[0])
		return -EPROTO;
	return obey(&in.request);
}

/* Nobody else will ever let the guest run here: the source goes on with it. */
static void end_vmm(void)
{
	agent_say("the mover of the migration is gone before the guest has run here: QEMU ends");
	(void)kill(getpid(), SIGTERM);
	usleep(END_US);
	_exit(1);
}

static void *incoming_main(void *arg)
{
	uint64_t expected;

	(void)arg;
	os_never_freeze((pid_t)syscall(SYS_gettid));
	while (!receive())
		;
	(void)shutdown(incoming.channel, SHUT_RDWR);
	incoming.closed = incoming.channel;
	if (!incoming.may_run)
		end_vmm();
	expected = ram_expected(incoming.agent->ram);
	if (expected)
		agent_say("the mover that brings pages of the migration is gone, and %llu are still to come: run `latent receive "
			  "--resume`", (unsigned long long)expected);
	incoming.channel = -1;
	return NULL;
}

static const char *why_not_later(int r)
{
	const char *large = agent_explain_large();

	if (r == -EPERM)
		return "there is no userfaultfd for it (run as root, allow /dev/userfaultfd, or set "
		       "vm.unprivileged_userfaultfd=1)";
	return large ? large : strerror(-r);
}

bool incoming_may_run(const struct agent *a) { return !a->config.incoming.active || incoming.may_run; }

/* A mover that is gone has said nothing of the end, but nothing is missing, and another one is not to be expected. */
bool incoming_is_complete(const struct agent *a)
{
	if (!a->config.incoming.active || incoming.complete)
		return true;
	return incoming.may_run && incoming.channel < 0 && !ram_expected(a->ram);
}

int incoming_begin(struct agent *a)
{
	const struct agent_incoming *config = &a->config.incoming;
	int r;

	if (incoming.began)
		return 0;
	r = faults_make_pages(a);
	if (r)
		agent_say("pages cannot come later: %s", why_not_later(r));
	incoming.agent = a;
	incoming.channel = config->channel_fd;
	for (uint32_t i = 0; i < config->volumes && i < AGENT_RESTORE_VOLUMES; i++)
		if (config->volume_fd[i] >= 0 && a->overlays_allowed)
			incoming.volume[i] = volumes_attach(a->volumes, config->volume_fd[i]);
	r = agent_start_thread("latent-incoming", incoming_main, NULL, false);
	incoming.began = !r;
	return r;
}

static int make_channel(int *ret_theirs)
{
	int pair[2], bytes = CHANNEL_BYTES;

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
		return -errno;
	for (int i = 0; i < 2; i++)
		(void)setsockopt(pair[i], SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
	*ret_theirs = pair[1];
	return pair[0];
}

int incoming_attach(int *ret_channel)
{
	int theirs = -1, ours, r;

	if (!incoming.began)
		return -ENOENT;
	if (incoming.channel >= 0)
		return -EALREADY;
	ours = make_channel(&theirs);
	if (ours < 0)
		return ours;
	if (incoming.closed >= 0)
		close(incoming.closed);
	incoming.closed = -1;
	incoming.channel = ours;
	r = agent_start_thread("latent-incoming", incoming_main, NULL, false);
	if (r) {
		incoming.channel = -1;
		incoming.closed = ours;
		close(theirs);
		return r;
	}
	*ret_channel = theirs;
	return 0;
}

/* From the thread that serves faults, again and again as long as somebody waits: it must not wait for the mover. */
void incoming_want(struct agent *a, uintptr_t hva)
{
	struct incoming_reply wanted = { .magic = INCOMING_MAGIC, .op = INCOMING_WANTED };
	int channel = incoming.channel;

	for (uint32_t i = 0; channel >= 0 && i < RAM_BLOCKS; i++) {
		const struct ram_block *b = ram_block_at(a->ram, i);

		if (!b || hva < (uintptr_t)b->hva || hva - (uintptr_t)b->hva >= os_bytes(b->pages))
			continue;
		wanted.block = i;
		wanted.page = (hva - (uintptr_t)b->hva) >> OS_PAGE_SHIFT;
		(void)syscall(SYS_sendto, channel, &wanted, sizeof wanted, MSG_DONTWAIT | MSG_NOSIGNAL, NULL, 0);
		return;
	}
}
