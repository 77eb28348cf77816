/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "migrate/guest.h"

#include "core/entry.h"
#include "os/os.h"
#include "vmdir/control.h"
#include "vmdir/incoming.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#define ANSWER_S 60
#define CHANNEL_BYTES (1 << 20)

/* What a page has here, beside what it was told to be. */
#define MAPPED 1u /* a volume's page is mapped there */
#define FILLED 2u /* base has contents */
#define ASKED 4u  /* somebody waits for it, and the source knows */

struct guest {
	struct guest_options options;
	struct {
		uint64_t first, pages, memfd_offset;
		int memfd;
	} block[SNAPSHOT_BLOCKS];
	uint32_t blocks;
	uint64_t pages;
	struct told {
		uint8_t kind, flags; /* enum wire_kind */
		uint16_t volume;
		uint32_t reserved;
		uint64_t value;
	} *told; /* of each page */
	bool runs;
	uint64_t missing; /* if it runs */
	struct incoming_request request; /* being gathered */
	struct incoming_put put;
	uint64_t wanted[WIRE_WANTED_MAX];
	size_t wanted_count;
};

int guest_pair(int *ret_ours, int *ret_agents)
{
	const struct timeval patience = { ANSWER_S, 0 };
	int pair[2], bytes = CHANNEL_BYTES;

	if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair))
		return -errno;
	(void)fcntl(pair[0], F_SETFD, FD_CLOEXEC);
	for (int i = 0; i < 2; i++)
		(void)setsockopt(pair[i], SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
	(void)setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
	*ret_ours = pair[0];
	*ret_agents = pair[1];
	return 0;
}

/* ---- talking to the agent --------------------------------------------------------------------------- */

static bool is_ours(const struct guest *g, uint32_t block, uint64_t page)
{
	return block < g->blocks && page < g->block[block].pages;
}

static void note_wanted(struct guest *g, const struct incoming_reply *reply)
{
	struct told *t;
	uint64_t page;

	if (!is_ours(g, reply->block, reply->page))
		return;
	page = g->block[reply->block].first + reply->page;
	t = &g->told[page];
	if (t->kind != WIRE_MISSING || t->flags & ASKED || g->wanted_count == WIRE_WANTED_MAX)
		return; /* the agent says it again */
	t->flags |= ASKED;
	g->wanted[g->wanted_count++] = page;
}

/* The next answer; wishes that come before it are noted. */
static int await(struct guest *g, enum incoming_op op, char why[SNAPSHOT_WHY_BYTES])
{
	struct incoming_reply reply;
	ssize_t n;

	do {
		n = recv(g->options.channel, &reply, sizeof reply, 0);
		if (n < 0 && errno == EINTR)
			continue;
		if (n != (ssize_t)sizeof reply || reply.magic != INCOMING_MAGIC)
			return snapshot_fail(why, n ? -EPROTO : -EPIPE, "the VM's agent does not answer");
		if (reply.op == INCOMING_WANTED)
			note_wanted(g, &reply);
	} while (n < 0 || reply.op != (uint32_t)op);
	return reply.error > 0 ? -EPROTO : reply.error;
}

static int ask(struct guest *g, enum incoming_op op, char why[SNAPSHOT_WHY_BYTES])
{
	struct incoming_request *q = &g->request;
	size_t bytes = sizeof *q - sizeof q->run + q->count * sizeof q->run[0];

	q->magic = INCOMING_MAGIC;
	q->op = (uint32_t)op;
	if (send(g->options.channel, q, bytes, MSG_NOSIGNAL) != (ssize_t)bytes)
		return snapshot_fail(why, -EPIPE, "the VM's agent is gone");
	return await(g, op, why);
}

static int receive_layout(struct guest *g, struct control_layout *layout, int *fds, size_t *ret_count)
{
	char control[CMSG_SPACE(2 * SNAPSHOT_BLOCKS * sizeof(int))];
	struct iovec iov = { layout, sizeof *layout };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
	ssize_t n = recvmsg(g->options.channel, &message, MSG_CMSG_CLOEXEC);

	*ret_count = 0;
	for (struct cmsghdr *c = n > 0 ? CMSG_FIRSTHDR(&message) : NULL; c; c = CMSG_NXTHDR(&message, c)) {
		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		*ret_count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		memcpy(fds, CMSG_DATA(c), *ret_count * sizeof(int));
	}
	return n == (ssize_t)sizeof *layout && layout->blocks <= SNAPSHOT_BLOCKS && *ret_count == 2 * layout->blocks ? 0
																: -EPROTO;
}

/* Both sides' blocks are the same, in the same order. */
static int compare_layout(struct guest *g, const struct control_layout *layout, char why[SNAPSHOT_WHY_BYTES])
{
	const struct snapshot_image *wanted = g->options.layout;

	if (layout->blocks != wanted->blocks)
		return snapshot_fail(why, -EINVAL, "the source has %u RAM blocks, and this VM %u: give it the same machine",
				     wanted->blocks, layout->blocks);
	for (uint32_t i = 0; i < layout->blocks; i++) {
		const struct control_block *b = &layout->block[i];

		if (strncmp(b->name, wanted->block[i].name, sizeof wanted->block[i].name) || b->pages != wanted->block[i].pages)
			return snapshot_fail(why, -EINVAL, "the source has %ju KiB of %.60s, and this VM %ju KiB of %.60s: give it "
					     "the same machine and -m", (uintmax_t)wanted->block[i].pages << 2,
					     wanted->block[i].name, (uintmax_t)b->pages << 2, b->name);
	}
	return 0;
}

static int take_layout(struct guest *g, const struct control_layout *layout, const int *fds, char why[SNAPSHOT_WHY_BYTES])
{
	g->blocks = layout->blocks;
	for (uint32_t i = 0; i < layout->blocks; i++)
		g->block[i].memfd = fds[2 * i];
	for (uint32_t i = 0; i < layout->blocks; i++) {
		g->block[i].first = g->pages;
		g->block[i].pages = layout->block[i].pages;
		g->block[i].memfd_offset = layout->block[i].memfd_offset;
		if (layout->block[i].pages > UINT64_MAX / OS_PAGE_BYTES / SNAPSHOT_BLOCKS)
			return snapshot_fail(why, -EPROTO, "the VM's agent says nonsense of guest RAM");
		g->pages += layout->block[i].pages;
	}
	g->told = calloc((size_t)g->pages, sizeof *g->told);
	return g->told ? 0 : snapshot_fail(why, -ENOMEM, "no memory to keep account of the pages");
}

/* Of an entry that names the other host nothing has come yet; of the others it does not matter what they are. */
static int read_entries(struct guest *g, uint32_t block, int fd, char why[SNAPSHOT_WHY_BYTES])
{
	size_t bytes = (size_t)g->block[block].pages * sizeof(uint64_t);
	const uint64_t *entries = mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, 0);

	if (entries == MAP_FAILED)
		return snapshot_fail(why, -errno, "the page entries cannot be read: %s", strerror(errno));
	for (uint64_t i = 0; i < g->block[block].pages; i++) {
		bool owed = entry_source(entries[i]) == ENTRY_MASKED && entry_file(entries[i]) == ENTRY_PEER;

		g->told[g->block[block].first + i].kind = owed ? WIRE_MISSING : WIRE_DATA;
		g->missing += owed;
	}
	munmap((void *)(uintptr_t)entries, bytes);
	return 0;
}

static int open_guest(const struct guest_options *options, bool again, struct guest **ret_guest,
		      char why[SNAPSHOT_WHY_BYTES])
{
	static struct control_layout layout; /* one thread */
	struct guest *g = calloc(1, sizeof *g);
	int fds[2 * SNAPSHOT_BLOCKS] = { 0 }, r;
	size_t count = 0;

	if (!g) {
		close(options->channel);
		return snapshot_fail(why, -ENOMEM, "no memory");
	}
	g->options = *options;
	r = ask(g, INCOMING_LAYOUT, why);
	if (!r && receive_layout(g, &layout, fds, &count))
		r = snapshot_fail(why, -EPROTO, "the VM's agent says nothing of guest RAM");
	if (!r && !again)
		r = compare_layout(g, &layout, why);
	if (!r)
		r = take_layout(g, &layout, fds, why);
	for (uint32_t i = 0; !r && again && i < g->blocks; i++)
		r = read_entries(g, i, fds[2 * i + 1], why);
	for (size_t i = 1; i < count; i += 2)
		close(fds[i]); /* entries are the agent's business */
	for (size_t i = 0; !g->blocks && i < count; i += 2)
		close(fds[i]);
	g->runs = again;
	if (r)
		guest_close(g);
	else
		*ret_guest = g;
	return r;
}

int guest_open(const struct guest_options *options, struct guest **ret_guest, char why[SNAPSHOT_WHY_BYTES])
{
	return open_guest(options, false, ret_guest, why);
}

int guest_open_again(const struct guest_options *options, struct guest **ret_guest, char why[SNAPSHOT_WHY_BYTES])
{
	return open_guest(options, true, ret_guest, why);
}

uint64_t guest_pages(const struct guest *g)
{
	return g->pages;
}

void guest_close(struct guest *g)
{
	if (!g)
		return;
	for (uint32_t i = 0; i < g->blocks; i++)
		close(g->block[i].memfd);
	close(g->options.channel);
	free(g->told);
	free(g);
}

/* ---- requests, many runs at a time -------------------------------------------------------------------- */

static uint32_t block_of(const struct guest *g, uint64_t page)
{
	uint32_t i = 0;

	while (page >= g->block[i].first + g->block[i].pages)
		i++;
	return i;
}

static int flush(struct guest *g, enum incoming_op op, char why[SNAPSHOT_WHY_BYTES])
{
	int r = g->request.count ? ask(g, op, why) : 0;

	g->request.count = 0;
	if (r && r != -EPIPE && r != -EPROTO)
		snapshot_fail(why, r, "the VM's agent cannot change guest RAM: %s", strerror(-r));
	return r;
}

static int add(struct guest *g, enum incoming_op op, const struct incoming_run *run, char why[SNAPSHOT_WHY_BYTES])
{
	g->request.run[g->request.count++] = *run;
	return g->request.count == INCOMING_RUNS ? flush(g, op, why) : 0;
}

/* ---- before the guest runs ------------------------------------------------------------------------------ */

static int write_page(struct guest *g, uint64_t page, const uint8_t *contents, char why[SNAPSHOT_WHY_BYTES])
{
	uint32_t i = block_of(g, page);
	uint64_t at = g->block[i].memfd_offset + os_bytes(page - g->block[i].first);
	int r = os_write_all(g->block[i].memfd, contents, OS_PAGE_BYTES, at);

	g->told[page].flags |= FILLED;
	return r ? snapshot_fail(why, r, "no memory for guest RAM: %s", strerror(-r)) : 0;
}

/* What was there goes: zero, as far as base is concerned. */
static int clear_page(struct guest *g, uint64_t page, char why[SNAPSHOT_WHY_BYTES])
{
	struct told *t = &g->told[page];
	uint32_t i = block_of(g, page);
	int r = 0;

	if (t->flags & MAPPED) {
		const struct incoming_run run = { .page = page - g->block[i].first, .block = i, .pages = 1 };

		r = add(g, INCOMING_BASE, &run, why);
		if (!r)
			r = flush(g, INCOMING_BASE, why);
	} else if (t->flags & FILLED) {
		r = os_punch_hole(g->block[i].memfd, g->block[i].memfd_offset + os_bytes(page - g->block[i].first), OS_PAGE_BYTES);
		if (r)
			snapshot_fail(why, r, "guest RAM cannot be given back: %s", strerror(-r));
	}
	t->flags = 0;
	return r;
}

static void make_word(uint64_t word, uint8_t page[OS_PAGE_BYTES])
{
	for (size_t i = 0; i < OS_PAGE_BYTES; i += sizeof word)
		memcpy(page + i, &word, sizeof word);
}

static int fill_page(struct guest *g, uint64_t page, const uint8_t *data, char why[SNAPSHOT_WHY_BYTES])
{
	uint8_t words[OS_PAGE_BYTES];
	const struct told *t = &g->told[page];
	int r;

	if (t->kind == WIRE_MISSING)
		return 0; /* guest_expect takes away what is there */
	r = t->flags & MAPPED || (t->kind != WIRE_DATA && t->flags) ? clear_page(g, page, why) : 0;
	if (r || (t->kind == WIRE_WORD && !t->value) || t->kind == WIRE_VOLUME)
		return r;
	if (t->kind == WIRE_WORD)
		make_word(t->value, words);
	return write_page(g, page, t->kind == WIRE_WORD ? words : data, why);
}

/* ---- while it runs ------------------------------------------------------------------------------------------ */

static int flush_put(struct guest *g, char why[SNAPSHOT_WHY_BYTES])
{
	size_t bytes = sizeof g->put - sizeof g->put.contents + g->put.count * sizeof g->put.contents[0];

	if (!g->put.count)
		return 0;
	g->put.magic = INCOMING_MAGIC;
	g->put.op = INCOMING_PUT;
	if (send(g->options.channel, &g->put, bytes, MSG_NOSIGNAL) != (ssize_t)bytes)
		return snapshot_fail(why, -EPIPE, "the VM's agent is gone");
	g->put.count = 0;
	return 0;
}

static int put_page(struct guest *g, uint64_t page, const uint8_t *contents, char why[SNAPSHOT_WHY_BYTES])
{
	uint32_t i = block_of(g, page);

	g->put.place[g->put.count] = (struct incoming_place){ .page = page - g->block[i].first, .block = i };
	memcpy(g->put.contents[g->put.count++], contents, OS_PAGE_BYTES);
	g->missing--;
	return g->put.count == INCOMING_PAGES ? flush_put(g, why) : 0;
}

static int read_volume(const struct guest *g, const struct told *t, uint8_t page[OS_PAGE_BYTES], char why[SNAPSHOT_WHY_BYTES])
{
	int r = os_read_all(g->options.volume_fd[t->volume], page, OS_PAGE_BYTES, os_bytes(t->value));

	return r ? snapshot_fail(why, r, "volume %u of the VM cannot be read: %s", t->volume, strerror(-r)) : 0;
}

/* A missing page has come; one that was told before is the guest's own by now. */
static int bring_page(struct guest *g, uint64_t page, const struct told *now, const uint8_t *data,
		      char why[SNAPSHOT_WHY_BYTES])
{
	uint8_t contents[OS_PAGE_BYTES];
	int r = 0;

	if (g->told[page].kind != WIRE_MISSING || now->kind == WIRE_MISSING)
		return 0;
	if (now->kind == WIRE_DATA && !data)
		return snapshot_fail(why, -EINVAL, "a page without contents");
	g->told[page] = *now;
	if (now->kind == WIRE_WORD)
		make_word(now->value, contents);
	else if (now->kind == WIRE_VOLUME)
		r = read_volume(g, now, contents, why);
	return r ? r : put_page(g, page, now->kind == WIRE_DATA ? data : contents, why);
}

/* ---- runs ------------------------------------------------------------------------------------------------- */

int guest_take(struct guest *g, const struct wire_run *run, const uint8_t *data, char why[SNAPSHOT_WHY_BYTES])
{
	int r = 0;

	for (uint32_t i = 0; !r && i < run->pages; i++) {
		struct told now = { .kind = (uint8_t)run->kind, .volume = run->volume,
				    .value = run->value + (run->kind == WIRE_VOLUME ? i : 0) };
		struct told *t = &g->told[run->page + i];

		if (g->runs) {
			r = bring_page(g, run->page + i, &now, data, why);
		} else if (t->kind != now.kind || t->volume != now.volume || t->value != now.value || now.kind == WIRE_DATA) {
			now.flags = t->flags;
			*t = now;
			r = fill_page(g, run->page + i, data, why);
		}
		data += data ? OS_PAGE_BYTES : 0;
	}
	return !r && g->runs ? flush_put(g, why) : r;
}

/* The longest run from `page` on that one mapping holds. */
static uint32_t volume_run(const struct guest *g, uint64_t page, uint64_t end)
{
	const struct told *first = &g->told[page];
	uint32_t n = 1;

	while (page + n < end && g->told[page + n].kind == WIRE_VOLUME && !(g->told[page + n].flags & MAPPED) &&
	       g->told[page + n].volume == first->volume && g->told[page + n].value == first->value + n)
		n++;
	return n;
}

static int read_run(struct guest *g, uint64_t page, uint32_t pages, char why[SNAPSHOT_WHY_BYTES])
{
	uint8_t contents[OS_PAGE_BYTES];
	int r = 0;

	for (uint32_t i = 0; !r && i < pages; i++) {
		if (g->told[page + i].flags & FILLED)
			continue;
		r = read_volume(g, &g->told[page + i], contents, why);
		if (!r)
			r = write_page(g, page + i, contents, why);
	}
	return r;
}

static void note_mapped(struct guest *g, uint64_t page, uint32_t pages)
{
	for (uint32_t i = 0; i < pages; i++)
		g->told[page + i].flags |= MAPPED;
}

/* What cannot be mapped (a lease, the budget of mappings, devices) is read. */
static int bring_run(struct guest *g, const struct incoming_run *run, char why[SNAPSHOT_WHY_BYTES])
{
	uint64_t page = g->block[run->block].first + run->page;
	int r;

	g->request.run[0] = *run;
	g->request.count = 1;
	r = ask(g, INCOMING_MAP, why);
	if (!r)
		note_mapped(g, page, run->pages);
	else if (r != -EPIPE && r != -EPROTO)
		r = ask(g, INCOMING_BASE, why); /* it may have been mapped before, with others */
	g->request.count = 0;
	return r || g->told[page].flags & MAPPED ? r : read_run(g, page, run->pages, why);
}

/* All runs of the request, at once if all can be mapped. */
static int bring_runs(struct guest *g, char why[SNAPSHOT_WHY_BYTES])
{
	struct incoming_run run[INCOMING_RUNS];
	uint32_t count = g->request.count;
	int r = count ? ask(g, INCOMING_MAP, why) : 0;

	g->request.count = 0;
	if (r == -EPIPE || r == -EPROTO)
		return r;
	memcpy(run, g->request.run, count * sizeof run[0]);
	for (uint32_t i = 0; !r && i < count; i++)
		note_mapped(g, g->block[run[i].block].first + run[i].page, run[i].pages);
	if (!r)
		return 0;
	r = 0;
	for (uint32_t i = 0; !r && i < count; i++)
		r = bring_run(g, &run[i], why);
	return r;
}

int guest_finish_passes(struct guest *g, char why[SNAPSHOT_WHY_BYTES])
{
	int r = 0;

	for (uint32_t b = 0; !r && b < g->blocks; b++) {
		uint64_t end = g->block[b].first + g->block[b].pages;

		for (uint64_t page = g->block[b].first, n; !r && page < end; page += n) {
			const struct told *t = &g->told[page];

			n = 1;
			if (t->kind != WIRE_VOLUME || t->flags)
				continue;
			n = volume_run(g, page, end);
			g->request.run[g->request.count++] = (struct incoming_run){ .page = page - g->block[b].first,
				.file_page = t->value, .block = b, .pages = (uint32_t)n, .volume = t->volume };
			r = g->request.count == INCOMING_RUNS ? bring_runs(g, why) : 0;
		}
	}
	return r ? r : bring_runs(g, why);
}

int guest_expect(struct guest *g, uint64_t *ret_missing, char why[SNAPSHOT_WHY_BYTES])
{
	int r = 0;

	g->missing = 0;
	for (uint32_t b = 0; !r && b < g->blocks; b++) {
		uint64_t end = g->block[b].first + g->block[b].pages;

		for (uint64_t page = g->block[b].first, n; !r && page < end; page += n) {
			struct incoming_run run = { .page = page - g->block[b].first, .block = b };

			for (n = 0; page + n < end && g->told[page + n].kind == WIRE_MISSING; n++)
				g->told[page + n].flags = 0;
			run.pages = (uint32_t)n;
			g->missing += n;
			r = n ? add(g, INCOMING_EXPECT, &run, why) : 0;
			n += !n;
		}
	}
	if (!r)
		r = flush(g, INCOMING_EXPECT, why);
	*ret_missing = g->missing;
	g->runs = !r;
	return r;
}

int guest_keep(struct guest *g, char why[SNAPSHOT_WHY_BYTES])
{
	return ask(g, INCOMING_RUN, why);
}

/* ---- wishes ------------------------------------------------------------------------------------------------- */

int guest_poll_fd(const struct guest *g)
{
	return g->options.channel;
}

size_t guest_wanted(struct guest *g, uint64_t *pages, size_t most)
{
	struct incoming_reply reply;
	size_t count;

	while (recv(g->options.channel, &reply, sizeof reply, MSG_DONTWAIT) == (ssize_t)sizeof reply)
		if (reply.magic == INCOMING_MAGIC && reply.op == INCOMING_WANTED)
			note_wanted(g, &reply);
	count = g->wanted_count < most ? g->wanted_count : most;
	memcpy(pages, g->wanted, count * sizeof *pages);
	g->wanted_count -= count;
	memmove(g->wanted, g->wanted + count, g->wanted_count * sizeof *pages);
	return count;
}

void guest_forget_wishes(struct guest *g)
{
	g->wanted_count = 0;
	for (uint64_t i = 0; i < g->pages; i++)
		g->told[i].flags &= (uint8_t)~ASKED;
}

uint64_t guest_missing_run(const struct guest *g, uint64_t *page)
{
	uint64_t pages = 0;

	while (*page < g->pages && g->told[*page].kind != WIRE_MISSING)
		++*page;
	while (*page + pages < g->pages && g->told[*page + pages].kind == WIRE_MISSING)
		pages++;
	return pages;
}

uint64_t guest_missing(const struct guest *g)
{
	return g->missing;
}

int guest_end(struct guest *g, char why[SNAPSHOT_WHY_BYTES])
{
	int r = ask(g, INCOMING_END, why);

	if (r && r != -EPIPE && r != -EPROTO)
		snapshot_fail(why, r, "pages are still expected: %s", strerror(-r));
	return r;
}
