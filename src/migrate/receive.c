/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "migrate/receive.h"

#include "migrate/files.h"
#include "migrate/guest.h"
#include "migrate/hint.h"
#include "migrate/record.h"
#include "os/os.h"
#include "snapshot/vmm.h"
#include "vmdir/control.h"
#include "vmdir/vmdir.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>
#include <unistd.h>
#include <xxhash.h>

#define HELLO_MS 10000
#define SOURCE_MS 120000 /* between two messages that bring it on */
#define TURN_MS 200
#define STORAGE_MS 60000 /* for the ballot */
#define AGENT_MS 20000
#define SAME_AT_ONCE 16u /* pages that are read before the source hears something */
/* What one message names, 4 MiB of pages at the most, may take so long to be read: longer than most links take to bring it. */
#define READ_US 2000000u
#define READ_LEAST_US 100000u

struct receive {
	const struct receive_options *options;
	struct receive_progress *progress;
	struct receive_result *result;
	char *why;
	struct link *link;
	struct manifest manifest;
	struct snapshot_image layout;
	struct wire_limits limits;
	struct agent_incoming incoming;
	struct receive_vm vm;
	bool started;
	struct vmm vmm;
	struct guest *guest;
	int state_fd;
	uint64_t state_bytes, switched_us;
	uint64_t bytes_before; /* over links that were cut */
	uint8_t *room; /* for contents that are unpacked */
	struct patience {
		uint64_t us;       /* so long what a message names may be read; */
		uint64_t until_us; /* what this one does */
	} with_snapshots, with_disks;
	uint8_t session[WIRE_SESSION_BYTES];
	struct digest digest[WIRE_FILES_MAX];
	struct files files;
	struct hint_files hints;
	struct record record;
	bool has_token; /* the guest is not ended any more because the link is */
	bool lost;      /* but the source has it again */
	bool let;       /* QEMU has been told to let it run */
	bool runs;
	bool in_doubt;  /* it may run: the mover before was about to let it. QEMU can be asked when no page is missing */
};

/* Where tests let it be killed. */
static int step(int r)
{
	if (!r)
		(void)os_fault(OS_FAULT_MIGRATE_STEP);
	return r;
}

/* ---- messages --------------------------------------------------------------------------------------- */

static int check_alive(struct receive *c)
{
	struct pollfd p = { c->vm.pid_fd, POLLIN, 0 };

	if (c->progress->stop && !c->has_token)
		return snapshot_fail(c->why, -EINTR, "a signal ended it");
	if (c->started && p.fd >= 0 && poll(&p, 1, 0) > 0)
		return snapshot_fail(c->why, -EPIPE, "the VMM has ended (see its log)");
	return 0;
}

static int take_refusal(struct receive *c, const struct wire_message *m)
{
	char text[WIRE_TEXT_MAX];
	int r = wire_read_text(m, text, c->why);

	return r ? r : snapshot_fail(c->why, -EREMOTEIO, "the source: %.230s", text);
}

/* Any message but a refusal. */
static int next(struct receive *c, unsigned within_ms, struct wire_message *m)
{
	uint64_t until_us = os_now_us() + within_ms * 1000ull;
	int r;

	while ((r = link_receive(c->link, m, c->why)) == -EAGAIN) {
		r = check_alive(c);
		if (!r && os_now_us() >= until_us)
			r = snapshot_fail(c->why, -ETIMEDOUT, "the source does not go on");
		if (!r)
			r = link_wait(c->link, false, NULL, 0, TURN_MS, c->why);
		if (r)
			return r;
	}
	c->progress->bytes_received = c->bytes_before + link_bytes_received(c->link);
	return !r && m->type == WIRE_REFUSE ? take_refusal(c, m) : r;
}

static int unexpected(struct receive *c, const struct wire_message *m)
{
	return snapshot_fail(c->why, -EPROTO, "the source says something else than it should (%d)", (int)m->type);
}

static int await(struct receive *c, enum wire_type type, unsigned within_ms, struct wire_message *m)
{
	int r = next(c, within_ms, m);

	return !r && m->type != type ? unexpected(c, m) : r;
}

static int say(struct receive *c, enum wire_type type, const void *payload, size_t bytes)
{
	int r;

	/* No source leaves so much unread: each page is lacked, or stale, once. Room cannot be waited for, as it may do so itself. */
	if (link_waiting(c->link) > LINK_ROOM + c->limits.pages * sizeof(uint64_t))
		return snapshot_fail(c->why, -EPROTO, "the source does not listen");
	r = link_send(c->link, type, payload, bytes, true);
	if (r)
		return snapshot_fail(c->why, r, "no memory for a message");
	return link_wait(c->link, false, NULL, 0, 0, c->why);
}

/* ---- who is there ------------------------------------------------------------------------------------- */

static int greet(struct receive *c)
{
	struct wire_hello theirs, ours = { .magic = WIRE_MAGIC, .version = WIRE_VERSION, .page_bytes = OS_PAGE_BYTES };
	struct wire_message m;
	int r = await(c, WIRE_HELLO, HELLO_MS, &m);

	if (!r)
		r = wire_read_hello(&m, &theirs, c->why);
	if (r)
		return r;
	if (theirs.resume)
		return snapshot_fail(c->why, -EPROTO, "there is no migration that was cut");
	memcpy(c->session, theirs.session, sizeof c->session);
	memcpy(ours.session, theirs.session, sizeof ours.session);
	return say(c, WIRE_HELLO, &ours, sizeof ours);
}

static int accept_source(struct receive *c)
{
	struct pollfd p = { c->options->listener, POLLIN, 0 };
	int r;

	while (poll(&p, 1, TURN_MS) <= 0)
		if (c->progress->stop)
			return snapshot_fail(c->why, -EINTR, "a signal ended it");
	r = link_accept(c->options->listener, c->options->keys, false, &c->link, c->why);
	return r ? r : greet(c);
}

static int take_manifest(struct receive *c)
{
	struct wire_message m;
	int fd = -1, r = await(c, WIRE_MANIFEST, HELLO_MS, &m);

	if (r)
		return r;
	fd = os_memfd_create("latent-manifest", 0, false);
	r = fd < 0 ? fd : os_write_all(fd, m.payload, m.bytes, 0);
	if (r)
		snapshot_fail(c->why, r, "no memory for the manifest");
	else
		r = manifest_read_file(fd, &c->manifest, c->why);
	if (fd >= 0)
		close(fd);
	return r;
}

static int take_blocks(struct receive *c)
{
	struct wire_message m;
	struct sysinfo info;
	int r = await(c, WIRE_BLOCKS, HELLO_MS, &m);

	if (!r)
		r = wire_read_blocks(&m, &c->layout, c->why);
	if (r)
		return r;
	if (os_bytes(c->layout.pages) != c->manifest.ram_bytes)
		return snapshot_fail(c->why, -EPROTO, "the source's RAM blocks and its manifest do not agree");
	if (sysinfo(&info) || c->manifest.ram_bytes / info.mem_unit > info.totalram)
		return snapshot_fail(c->why, -ENOMEM, "the VM has %ju MiB of RAM, which is more than this host",
				     (uintmax_t)c->manifest.ram_bytes >> 20);
	c->limits.pages = c->layout.pages;
	c->progress->pages_all = c->layout.pages;
	return 0;
}

/* The source keeps nobody waiting who talks. */
static int tick(void *ctx)
{
	struct receive *c = ctx;
	int r = check_alive(c);

	return r ? r : link_wait(c->link, false, NULL, 0, 0, c->why);
}

static struct files_options files_options(struct receive *c)
{
	return (struct files_options){ .manifest = &c->manifest, .digests = c->digest, .find = c->options->find,
				       .reading = { .known_dir = c->options->known_dir, .tick = tick, .ctx = c },
				       .find_ctx = c->options->ctx };
}

static int open_files(struct receive *c)
{
	const struct files_options options = files_options(c);
	int r = files_open(&options, &c->files, c->why);

	c->limits.volumes = c->incoming.volumes = c->manifest.volumes;
	memcpy(c->incoming.volume_fd, c->files.volume_fd, sizeof c->incoming.volume_fd);
	memcpy(c->limits.volume_pages, c->files.pages, sizeof c->limits.volume_pages);
	return r ? r : files_check_disks(&options, c->why);
}

static int check_volumes(struct receive *c)
{
	const struct files_options options = files_options(c);

	return files_check_volumes(&options, &c->files, c->why);
}

/* It is there if the disk here is the disk there. */
static int find_ballot(struct receive *c)
{
	const char *disk = c->options->find(c->options->ctx, c->manifest.disk[0].layer[0].volume.path);
	int r = ballot_name(disk, c->session, &c->record.ballot);

	if (r)
		return snapshot_fail(c->why, r, "the path of %.200s is too long", disk);
	return ballot_is_there(&c->record.ballot) ? 0
	       : snapshot_fail(c->why, -EXDEV, "the disk %.40s is not on storage that both hosts share: nothing of this migration "
			       "is beside %.150s here (--volume says where a file is)", c->manifest.disk[0].drive, disk);
}

static int take_files(struct receive *c)
{
	const struct digest *digests;
	struct wire_message m;
	bool ballot = false;
	uint32_t count = files_of(&c->manifest);
	int r = await(c, WIRE_FILES, HELLO_MS, &m);

	if (!r && count > WIRE_FILES_MAX)
		r = snapshot_fail(c->why, -E2BIG, "the VM has more than %u images", WIRE_FILES_MAX);
	if (!r)
		r = wire_read_files(&m, count, &ballot, &digests, c->why);
	if (r)
		return r;
	memcpy(c->digest, digests, count * sizeof *digests);
	if (ballot && !c->manifest.disks)
		return snapshot_fail(c->why, -EPROTO, "the source has a ballot beside no disk");
	if (ballot)
		r = find_ballot(c);
	return r ? r : open_files(c);
}

static int start_vmm(struct receive *c)
{
	struct guest_options options = { .layout = &c->layout, .limits = &c->limits, .volume_fd = c->incoming.volume_fd };
	int r = guest_pair(&options.channel, &c->incoming.channel_fd);

	if (r)
		return snapshot_fail(c->why, r, "no socket for the VM's agent");
	c->incoming.active = 1;
	r = c->options->start(c->options->ctx, &c->manifest, &c->incoming, &c->vm, c->why);
	close(c->incoming.channel_fd);
	c->started = !r;
	if (!r)
		r = vmm_open_waiting(c->vm.run_dir, c->vm.pid_fd, c->why, &c->vmm);
	if (!r && strcmp(c->vmm.version, c->manifest.qemu_version))
		r = snapshot_fail(c->why, -ENOTSUP, "the source runs QEMU %.40s, and this is %.40s", c->manifest.qemu_version,
				  c->vmm.version);
	if (!r)
		r = vmm_prepare_load(&c->vmm, !c->manifest.stood);
	if (r) {
		close(options.channel);
		return r;
	}
	return guest_open(&options, &c->guest, c->why);
}

/* No more of them than guest RAM has pages. */
static int say_have(struct receive *c)
{
	uint64_t *digests, at = 0, left = c->layout.pages;
	size_t count;
	int r = 0;

	if (!c->options->have)
		return 0;
	digests = malloc(WIRE_HAVE_MAX * sizeof *digests);
	if (!digests)
		return snapshot_fail(c->why, -ENOMEM, "no memory for a message");
	while (!r && (count = have_list(c->options->have, &at, digests, left < WIRE_HAVE_MAX ? left : WIRE_HAVE_MAX))) {
		r = say(c, WIRE_HAVE, digests, count * sizeof *digests);
		left -= count;
	}
	free(digests);
	return r;
}

/* After the VMM, which has them open. */
static int open_hints(struct receive *c)
{
	int r = hint_open(&c->manifest, c->vm.pid, c->options->find, c->options->ctx, &c->hints);

	if (r)
		return snapshot_fail(c->why, r, "no memory to read disks");
	c->limits.disks = hint_there(&c->hints);
	return 0;
}

static int prepare(struct receive *c)
{
	struct wire_ready ready = { 0 };
	int r = take_manifest(c);

	if (!r)
		r = take_blocks(c);
	if (!r)
		r = step(take_files(c));
	if (!r)
		r = step(start_vmm(c));
	if (!r)
		r = check_volumes(c);
	if (!r)
		r = open_hints(c);
	if (!r)
		r = say_have(c);
	ready.disks = c->limits.disks;
	for (uint32_t i = 0; i < c->manifest.volumes; i++)
		ready.volumes |= (uint64_t)(c->incoming.volume_fd[i] >= 0) << i;
	return r ? r : say(c, WIRE_READY, &ready, sizeof ready);
}

/* ---- passes --------------------------------------------------------------------------------------------- */

static int take_pages(struct receive *c, const struct wire_message *m)
{
	struct wire_pages pages;
	const uint8_t *data;
	int r = wire_read_pages(m, &c->limits, &pages, c->why);

	if (!r)
		r = wire_unpack(&pages, c->room, &data, c->why);
	for (uint32_t i = 0; !r && i < pages.runs; i++) {
		const struct wire_run *run = &pages.run[i];

		r = guest_take(c->guest, run, run->kind == WIRE_DATA ? data : NULL, c->why);
		data += run->kind == WIRE_DATA ? os_bytes(run->pages) : 0;
		c->result->words += run->kind == WIRE_WORD ? run->pages : 0;
		c->result->volume += run->kind == WIRE_VOLUME ? run->pages : 0;
		c->result->data += run->kind == WIRE_DATA ? run->pages : 0;
	}
	c->progress->words = c->result->words;
	c->progress->volume = c->result->volume;
	c->progress->data = c->result->data;
	return r;
}

/* ---- pages that are read here ------------------------------------------------------------------------------ */

/* Reading is to cost no more than sending: what of a message has not been read in time is not read, and the next one has half
 * the time. So storage that stays slow is hardly asked any more. */
static void begin_reading(struct patience *p)
{
	p->until_us = os_now_us() + p->us;
}

static bool is_time_left(const struct patience *p)
{
	return os_now_us() < p->until_us;
}

static void end_reading(struct patience *p, bool all)
{
	p->us = all ? READ_US : p->us / 2 > READ_LEAST_US ? p->us / 2 : READ_LEAST_US;
}

/* What is here is put in place as if it had been received; of the others the source is told. */
static int take_same(struct receive *c, const struct wire_message *m)
{
	uint8_t contents[OS_PAGE_BYTES];
	uint64_t lacked[WIRE_SAME_MAX];
	const struct wire_same *same;
	size_t count, i, lacks = 0;
	int r = wire_read_same(m, c->limits.pages, &same, &count, c->why);

	if (r)
		return r;
	same = memcpy(c->room, same, count * sizeof *same); /* a tick ends the message */
	begin_reading(&c->with_snapshots);
	for (i = 0; !r && i < count && is_time_left(&c->with_snapshots); i++) {
		const struct wire_run run = { .page = same[i].page, .pages = 1, .kind = WIRE_DATA };

		r = i % SAME_AT_ONCE ? 0 : tick(c);
		if (r)
			break;
		if (c->options->have && have_find(c->options->have, &same[i], contents))
			r = guest_take(c->guest, &run, contents, c->why);
		else
			lacked[lacks++] = same[i].page;
	}
	if (r)
		return r;
	end_reading(&c->with_snapshots, i == count);
	for (; i < count; i++)
		lacked[lacks++] = same[i].page;
	c->progress->same = c->result->same += count - lacks;
	return lacks ? say(c, WIRE_LACK, lacked, lacks * sizeof lacked[0]) : 0;
}

static bool has_digest(const uint8_t *page, const uint8_t wanted[WIRE_SHA256_BYTES])
{
	uint8_t sha256[WIRE_SHA256_BYTES];

	return have_digest(page, sha256) && !memcmp(sha256, wanted, sizeof sha256);
}

/* Of pages that one read has brought, as far as it came. */
static int take_hinted(struct receive *c, const struct wire_hint *hint, size_t count, const uint8_t *contents, size_t got,
		       uint64_t *stale, size_t *stales)
{
	int r = 0;

	for (size_t i = 0; !r && i < count; i++, contents += OS_PAGE_BYTES) {
		const struct wire_run run = { .page = hint[i].page, .pages = 1, .kind = WIRE_DATA };

		if (i < got && has_digest(contents, hint[i].sha256))
			r = guest_take(c->guest, &run, contents, c->why);
		else
			stale[(*stales)++] = hint[i].page;
	}
	return r;
}

/* What the disk has is put in place as if it had been received, before anything else of the guest's happens here; of the
 * others the source is told. */
static int take_hints(struct receive *c, const struct wire_message *m)
{
	uint64_t stale[WIRE_HINTS_MAX];
	const struct wire_hint *hint;
	const uint8_t *contents;
	size_t count, got, i = 0, stales = 0;
	int r = wire_read_hints(m, &c->limits, &hint, &count, c->why);

	if (r)
		return r;
	hint = memcpy(c->room, hint, count * sizeof *hint); /* a tick ends the message */
	begin_reading(&c->with_disks);
	while (!r && i < count && is_time_left(&c->with_disks)) {
		size_t n = hint_read(&c->hints, hint + i, count - i, &contents, &got);

		r = take_hinted(c, hint + i, n, contents, got, stale, &stales);
		if (!r)
			r = tick(c);
		i += n;
	}
	if (r)
		return r;
	end_reading(&c->with_disks, i == count);
	for (; i < count; i++)
		stale[stales++] = hint[i].page;
	c->progress->disks = c->result->disks += count - stales;
	return stales ? say(c, WIRE_STALE, stale, stales * sizeof stale[0]) : 0;
}

static int take_state(struct receive *c, const struct wire_message *m)
{
	int r = os_write_all(c->state_fd, m->payload, m->bytes, c->state_bytes);

	c->state_bytes += m->bytes;
	if (c->state_bytes > c->manifest.ram_bytes + (64u << 20))
		return snapshot_fail(c->why, -EPROTO, "the source's device state is larger than its RAM");
	return r ? snapshot_fail(c->why, r, "no memory for the device state") : 0;
}

static int check_state(struct receive *c, const struct wire_switch *sw)
{
	void *state = mmap(NULL, c->state_bytes ? c->state_bytes : 1, PROT_READ, MAP_SHARED, c->state_fd, 0);
	bool right = state != MAP_FAILED && sw->state_bytes == c->state_bytes &&
		     XXH3_64bits(state, c->state_bytes) == sw->checksum;

	if (state != MAP_FAILED)
		munmap(state, c->state_bytes ? c->state_bytes : 1);
	return right ? 0 : snapshot_fail(c->why, -EBADMSG, "the device state did not arrive as it was sent");
}

/* ---- serving ---------------------------------------------------------------------------------------------- */

/* The guest's wishes, or its devices', go to the source. */
static int pass_wishes(struct receive *c)
{
	uint64_t wanted[WIRE_WANTED_MAX];
	size_t count = guest_wanted(c->guest, wanted, WIRE_WANTED_MAX);

	c->result->pages_wanted += count;
	c->progress->wanted = c->result->pages_wanted;
	return count ? say(c, WIRE_WANT, wanted, count * sizeof wanted[0]) : 0;
}

/* What comes from the source, from the VM's agent and from the VMM, for a moment. 1: a message that is not of pages. */
static int serve_turn(struct receive *c, struct wire_message *m)
{
	struct pollfd p[] = { { guest_poll_fd(c->guest), POLLIN, 0 }, { vmm_poll_fd(&c->vmm), POLLIN, 0 } };
	int r = link_receive(c->link, m, c->why);

	if (!r)
		r = m->type == WIRE_PAGES ? take_pages(c, m) : m->type == WIRE_REFUSE ? take_refusal(c, m) : 1;
	else if (r == -EAGAIN)
		r = link_wait(c->link, false, p, 2, TURN_MS, c->why);
	if (p[1].revents)
		vmm_drain(&c->vmm);
	c->progress->bytes_received = c->bytes_before + link_bytes_received(c->link);
	c->progress->pages_missing = guest_missing(c->guest);
	if (r)
		return r;
	r = check_alive(c);
	return r ? r : pass_wishes(c);
}

/* Until the VMM has done it: it may be waiting for a page. */
static int serve_until(struct receive *c, bool (*done)(const struct vmm *), const char *what)
{
	uint64_t until_us = os_now_us() + SOURCE_MS * 1000ull;
	struct wire_message m;
	int r = 0;

	while (!r && !done(&c->vmm)) {
		r = serve_turn(c, &m);
		if (r > 0)
			r = unexpected(c, &m);
		if (!r && os_now_us() >= until_us)
			r = snapshot_fail(c->why, -ETIMEDOUT, "QEMU does not come to an end of %s", what);
	}
	return r;
}

static bool is_loaded(const struct vmm *vmm)
{
	return !strcmp(vmm->migration, "completed") || !strcmp(vmm->migration, "failed");
}

static bool is_running(const struct vmm *vmm)
{
	return vmm->continued_us;
}

static int load_devices(struct receive *c)
{
	int r = vmm_start_load(&c->vmm, c->state_fd);

	if (!r)
		r = serve_until(c, is_loaded, "loading the devices' state");
	if (!r && strcmp(c->vmm.migration, "completed"))
		r = snapshot_fail(c->why, -EIO, "QEMU cannot load the devices' state (see its log)");
	return r;
}

/* All that the guest needs to run is here, or known to be missing. */
static int take_switch(struct receive *c, const struct wire_message *m)
{
	struct wire_switch sw;
	int r = wire_read_switch(m, &sw, c->why);

	c->switched_us = os_now_us();
	if (!r)
		r = check_state(c, &sw);
	if (!r)
		r = guest_finish_passes(c->guest, c->why);
	if (!r)
		r = guest_expect(c->guest, &c->result->pages_missing, c->why);
	if (!r && c->result->pages_missing != sw.missing)
		r = snapshot_fail(c->why, -EPROTO, "%ju pages are missing, and the source says %ju",
				  (uintmax_t)c->result->pages_missing, (uintmax_t)sw.missing);
	if (!r)
		r = step(load_devices(c));
	return r ? r : step(say(c, WIRE_LOADED, NULL, 0));
}

/* Until the switch is made. */
static int take_passes(struct receive *c)
{
	struct wire_message m;
	int r;

	while (!(r = next(c, SOURCE_MS, &m))) {
		if (m.type == WIRE_PAGES)
			r = take_pages(c, &m);
		else if (m.type == WIRE_SAME)
			r = take_same(c, &m);
		else if (m.type == WIRE_HINT)
			r = take_hints(c, &m);
		else if (m.type == WIRE_PASS && !(r = step(guest_finish_passes(c->guest, c->why))))
			r = say(c, WIRE_PASS, NULL, 0);
		else if (m.type == WIRE_STATE)
			r = take_state(c, &m);
		else if (m.type == WIRE_SWITCH)
			return take_switch(c, &m);
		else if (m.type != WIRE_PASS)
			r = unexpected(c, &m);
		if (r)
			break;
	}
	return r;
}

static int await_token(struct receive *c)
{
	uint64_t until_us = os_now_us() + SOURCE_MS * 1000ull;
	struct wire_message m;
	int r = 0;

	while (!r && os_now_us() < until_us)
		r = serve_turn(c, &m);
	if (r > 0)
		return m.type == WIRE_TOKEN ? 0 : unexpected(c, &m);
	return r ? r : snapshot_fail(c->why, -ETIMEDOUT, "the source does not go on");
}

/* ---- the guest is given to this host --------------------------------------------------------------------- */

static int note_phase(struct receive *c, enum record_phase phase)
{
	c->record.phase = phase;
	return record_write(c->vm.run_dir, &c->record, c->why);
}

/* From now on only a word of ours lets the source go on, or the ballot. */
static int take_token(struct receive *c)
{
	int r = await_token(c);

	if (!r)
		r = guest_keep(c->guest, c->why);
	memcpy(c->record.session, c->session, sizeof c->session);
	c->record.stood = c->manifest.stood;
	if (!r)
		r = step(note_phase(c, RECORD_TOKEN));
	c->has_token = !r;
	return r;
}

/* The guest is ours, for good, or never. */
static int commit(struct receive *c)
{
	uint64_t until_us = os_now_us() + STORAGE_MS * 1000ull;
	int r = 0;

	if (c->record.phase >= RECORD_COMMITTED)
		return 0;
	while (c->record.ballot.path[0] && (r = ballot_take(&c->record.ballot, BALLOT_DESTINATION))) {
		c->lost = r == -EALREADY || r == -ENOENT;
		if (c->lost)
			return snapshot_fail(c->why, -ECANCELED, "the source had lost sight of this host, and goes on with the guest");
		if (os_now_us() >= until_us)
			return snapshot_fail(c->why, r, "%.200s: %s", c->record.ballot.path, strerror(-r));
		r = c->link ? link_wait(c->link, false, NULL, 0, TURN_MS, c->why) : -usleep(TURN_MS * 1000);
		if (r)
			return r;
	}
	return note_phase(c, RECORD_COMMITTED);
}

static int let_run(struct receive *c)
{
	int r = 0;

	if (!c->record.stood && !c->let) {
		r = vmm_start_guest(&c->vmm);
		c->let = !step(r);
	}
	if (!r && !c->record.stood)
		r = serve_until(c, is_running, "letting the guest run");
	if (!r)
		r = note_phase(c, RECORD_RUNNING);
	if (r)
		return r;
	c->runs = c->result->runs = true;
	c->result->load_us = c->switched_us ? os_now_us() - c->switched_us : 0;
	return 0;
}

/* The mover before us has let it run, or was about to. */
static int end_doubt(struct receive *c)
{
	bool runs = false;
	int r = vmm_open_waiting(c->vm.run_dir, c->vm.pid_fd, c->why, &c->vmm);

	if (!r)
		r = vmm_query_running(&c->vmm, &runs);
	if (!r && !runs)
		return let_run(c);
	c->runs = c->result->runs = !r;
	return r ? r : note_phase(c, RECORD_RUNNING);
}

/* The source has seen in the ballot that we have all, or can; it may have removed it by now. */
static bool source_knows(const struct receive *c)
{
	return c->record.ballot.path[0] && ballot_take(&c->record.ballot, BALLOT_DESTINATION) == -ENOENT;
}

static int take_rest(struct receive *c)
{
	struct wire_message m;
	int r = 0;

	c->progress->phase = RECEIVE_REST;
	while (!r && guest_missing(c->guest)) {
		r = serve_turn(c, &m);
		if (r > 0)
			r = unexpected(c, &m);
	}
	if (!r && !c->runs)
		r = end_doubt(c);
	if (!r)
		r = step(guest_end(c->guest, c->why));
	if (r)
		return r;
	ballot_note_over(&c->record.ballot);
	r = say(c, WIRE_DONE, NULL, 0);
	/* Pages that were wanted may come twice. */
	while (!r && !(r = next(c, SOURCE_MS, &m)) && m.type == WIRE_PAGES)
		;
	if (r)
		return source_knows(c) ? 0 : r;
	return m.type == WIRE_DONE ? 0 : unexpected(c, &m);
}

/* From the token, or the source's return, on. */
static int finish(struct receive *c)
{
	int r = step(commit(c));

	if (!r && !c->runs && !c->in_doubt)
		r = step(let_run(c));
	if (!r && c->runs)
		r = step(say(c, WIRE_RUNNING, NULL, 0));
	return r ? r : take_rest(c);
}

/* ---- after a cut ----------------------------------------------------------------------------------------- */

static int greet_again(struct receive *c)
{
	struct wire_hello theirs, ours = { .magic = WIRE_MAGIC, .version = WIRE_VERSION, .page_bytes = OS_PAGE_BYTES,
					   .resume = 1 };
	struct wire_message m;
	int r = await(c, WIRE_HELLO, HELLO_MS, &m);

	if (!r)
		r = wire_read_hello(&m, &theirs, c->why);
	if (!r && (!theirs.resume || memcmp(theirs.session, c->record.session, sizeof theirs.session)))
		r = snapshot_fail(c->why, -EPROTO, "another migration is waited for here");
	memcpy(ours.session, c->record.session, sizeof ours.session);
	return r ? r : say(c, WIRE_HELLO, &ours, sizeof ours);
}

static int say_owed(struct receive *c)
{
	struct wire_owed owed[WIRE_OWED_MAX];
	uint64_t page = 0, pages;
	size_t count = 0;
	int r = 0;

	while (!r && (pages = guest_missing_run(c->guest, &page))) {
		owed[count++] = (struct wire_owed){ page, pages };
		page += pages;
		if (count == WIRE_OWED_MAX) {
			r = say(c, WIRE_OWED, owed, count * sizeof owed[0]);
			count = 0;
		}
	}
	return r || !count ? r : say(c, WIRE_OWED, owed, count * sizeof owed[0]);
}

/* The guest runs meanwhile, and what it waits for is asked for again. 1: somebody is there. */
static int wait_for_source(struct receive *c)
{
	struct pollfd p[] = { { c->options->listener, POLLIN, 0 }, { guest_poll_fd(c->guest), POLLIN, 0 },
			      { vmm_poll_fd(&c->vmm), POLLIN, 0 } };
	uint64_t ignored[WIRE_WANTED_MAX];

	if (c->progress->stop)
		return snapshot_fail(c->why, -EINTR, "a signal ended it");
	(void)poll(p, 3, TURN_MS);
	if (p[1].revents)
		(void)guest_wanted(c->guest, ignored, WIRE_WANTED_MAX);
	if (p[2].revents)
		vmm_drain(&c->vmm);
	return p[0].revents ? 1 : check_alive(c);
}

/* Whoever it is, and whatever he wants: only the source of this guest ends the waiting. */
static int come_together(struct receive *c)
{
	int r;

	c->progress->cut = true;
	for (;;) {
		c->bytes_before = c->progress->bytes_received;
		link_close(c->link);
		c->link = NULL;
		do
			r = wait_for_source(c);
		while (!r);
		if (r < 0)
			return r;
		r = link_accept(c->options->listener, c->options->keys, false, &c->link, c->why);
		if (!r)
			r = greet_again(c);
		if (!r)
			break;
		if (c->link && r != -EREMOTEIO)
			link_send_last(c->link, WIRE_REFUSE, c->why);
	}
	c->progress->cut = false;
	guest_forget_wishes(c->guest);
	return say_owed(c);
}

static int go_on(struct receive *c, int r)
{
	while (r && !c->lost && (!c->link || link_is_over(c->link))) {
		r = come_together(c);
		if (!r)
			r = finish(c);
		else if (!c->link)
			break; /* not the link's fault */
	}
	return r;
}

/* ---- all of it ------------------------------------------------------------------------------------------- */

static int receive(struct receive *c)
{
	int r;

	c->progress->phase = RECEIVE_LISTENING;
	r = step(accept_source(c));
	c->progress->phase = RECEIVE_PREPARING;
	if (!r)
		r = prepare(c);
	c->progress->phase = RECEIVE_PASSES;
	if (!r)
		r = take_passes(c);
	c->progress->phase = RECEIVE_SWITCHING;
	if (!r)
		r = take_token(c);
	if (!r) {
		r = finish(c);
		r = r ? go_on(c, r) : 0;
	}
	c->progress->phase = RECEIVE_DONE;
	return r;
}

static bool is_kept(const struct receive *c, int r)
{
	return c->runs || c->in_doubt || (c->has_token && !c->lost && (r == -EINTR || !c->link || link_is_over(c->link)));
}

/* It does not run, and never will: the source hears it, or finds the ballot as it was. */
static void give_up(struct receive *c, int r)
{
	if (c->started)
		c->options->end(c->options->ctx, &c->vm);
	if (c->let)
		vmm_drain(&c->vmm);
	if (c->let && c->vmm.continued_us)
		return; /* it has run */
	if (c->record.phase == RECORD_COMMITTED && c->has_token)
		ballot_return(&c->record.ballot);
	if (c->link && r != -EREMOTEIO)
		link_send_last(c->link, c->has_token ? WIRE_FAILED : WIRE_REFUSE, c->why);
}

static void free_receive(struct receive *c)
{
	guest_close(c->guest);
	vmm_close(&c->vmm);
	link_close(c->link);
	files_close(&c->files);
	hint_close(&c->hints);
	if (c->state_fd >= 0)
		close(c->state_fd);
	if (c->vm.pid_fd >= 0)
		close(c->vm.pid_fd);
	machine_free(c->manifest.machine);
	free(c->room);
	free(c);
}

static int end(struct receive *c, int r, uint64_t begin_us)
{
	struct receive_result *result = c->result;

	result->kept = r && is_kept(c, r);
	if (r && !result->kept)
		give_up(c, r);
	else if (!r)
		record_remove(c->vm.run_dir);
	result->pid = c->vm.pid;
	result->total_us = os_now_us() - begin_us;
	result->bytes_received = c->progress->bytes_received;
	free_receive(c);
	return r;
}

static struct receive *create(const struct receive_options *options, struct receive_progress *progress,
			      struct receive_result *ret_result, char why[SNAPSHOT_WHY_BYTES])
{
	struct receive *c = calloc(1, sizeof *c);

	*ret_result = (struct receive_result){ 0 };
	if (!c)
		return NULL;
	c->options = options;
	c->progress = progress;
	c->result = ret_result;
	c->why = why;
	c->vm.pid_fd = -1;
	c->vmm.state_fd = -1;
	c->with_snapshots.us = c->with_disks.us = READ_US;
	memset(c->files.volume_fd, -1, sizeof c->files.volume_fd);
	c->state_fd = os_memfd_create("latent-state", 0, false);
	c->room = malloc((size_t)WIRE_DATA_PAGES_MAX << OS_PAGE_SHIFT);
	if (c->state_fd < 0 || !c->room) {
		free_receive(c);
		return NULL;
	}
	return c;
}

int migrate_receive(const struct receive_options *options, struct receive_progress *progress,
		    struct receive_result *ret_result, char why[SNAPSHOT_WHY_BYTES])
{
	uint64_t begin_us = os_now_us();
	struct receive *c = create(options, progress, ret_result, why);
	int r;

	if (!c)
		return snapshot_fail(why, -ENOMEM, "no memory");
	r = receive(c);
	snprintf(ret_result->name, sizeof ret_result->name, "%s", c->manifest.name);
	return end(c, r, begin_us);
}

/* ---- in the place of another mover ------------------------------------------------------------------------ */

/* Its end of a channel to the agent. */
static int ask_channel(struct receive *c)
{
	struct control_request request = { .magic = CONTROL_MAGIC, .version = CONTROL_VERSION, .op = CONTROL_INCOMING };
	struct control_layout empty;
	struct control_reply reply;
	char path[VMDIR_PATH_BYTES], control[CMSG_SPACE(sizeof(int))];
	struct iovec iov = { &empty, sizeof empty };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
	int agent, fd = -1;

	snprintf(path, sizeof path, "%.230s/" VMDIR_CONTROL, c->vm.run_dir);
	agent = vmdir_connect(path, SOCK_SEQPACKET, AGENT_MS);
	if (agent < 0)
		return snapshot_fail(c->why, agent, "the VM's agent cannot be reached: %s", strerror(-agent));
	if (send(agent, &request, sizeof request, MSG_NOSIGNAL) != (ssize_t)sizeof request ||
	    recv(agent, &reply, sizeof reply, 0) != (ssize_t)sizeof reply || reply.version != CONTROL_VERSION) {
		fd = snapshot_fail(c->why, -EPROTO, "the VM's agent is of another version, or does not answer");
	} else if (reply.error) {
		reply.text[sizeof reply.text - 1] = '\0';
		fd = snapshot_fail(c->why, reply.error < 0 ? reply.error : -EPROTO, "%.255s", reply.text);
	} else if (recvmsg(agent, &message, MSG_CMSG_CLOEXEC) > 0 && CMSG_FIRSTHDR(&message)) {
		memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
	}
	close(agent);
	return fd != -1 ? fd : snapshot_fail(c->why, -EPROTO, "the VM's agent gives no channel");
}

static int take_over(struct receive *c)
{
	struct guest_options options = { .limits = &c->limits, .volume_fd = c->incoming.volume_fd };
	int r = record_read(c->vm.run_dir, &c->record, c->why);

	if (!r && c->record.phase == RECORD_GIVEN)
		r = snapshot_fail(c->why, -EINVAL, "the VM is on its way from here: that is for `latent migrate --resume`");
	c->vmm.why = c->why;
	c->in_doubt = c->record.phase == RECORD_COMMITTED && !c->record.stood;
	/* (Of one that may run nobody asks QEMU anything: its main loop may be waiting for a page.) */
	if (!r && c->record.phase == RECORD_TOKEN)
		r = vmm_open_waiting(c->vm.run_dir, c->vm.pid_fd, c->why, &c->vmm);
	if (!r)
		r = options.channel = ask_channel(c);
	if (r < 0)
		return r;
	r = guest_open_again(&options, &c->guest, c->why);
	if (r)
		return r;
	c->limits.pages = guest_pages(c->guest);
	c->progress->pages_all = c->limits.pages;
	c->result->pages_missing = guest_missing(c->guest);
	c->started = c->has_token = true;
	c->runs = c->result->runs = c->record.phase == RECORD_RUNNING;
	return commit(c); /* if it was not known yet whose the guest is */
}

int migrate_receive_again(const struct receive_options *options, const struct receive_vm *vm, const char *name,
			  struct receive_progress *progress, struct receive_result *ret_result,
			  char why[SNAPSHOT_WHY_BYTES])
{
	uint64_t begin_us = os_now_us();
	struct receive *c = create(options, progress, ret_result, why);
	int r;

	if (!c)
		return snapshot_fail(why, -ENOMEM, "no memory");
	c->vm = *vm;
	snprintf(ret_result->name, sizeof ret_result->name, "%s", name);
	r = take_over(c);
	if (r && !c->lost) {
		ret_result->kept = true; /* as it was */
		free_receive(c);
		return r;
	}
	return end(c, r ? r : go_on(c, -ECONNRESET), begin_us);
}
