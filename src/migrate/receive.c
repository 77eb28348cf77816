/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "migrate/receive.h"

#include "migrate/guest.h"
#include "os/os.h"
#include "snapshot/vmm.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>
#include <unistd.h>
#include <xxhash.h>

#define HELLO_MS 10000
#define SOURCE_MS 120000 /* between two messages that bring it on */
#define TURN_MS 200

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
	uint8_t *room; /* for contents that are unpacked */
	bool runs;
};

/* ---- messages --------------------------------------------------------------------------------------- */

static int check_alive(struct receive *c)
{
	struct pollfd p = { c->vm.pid_fd, POLLIN, 0 };

	if (c->progress->stop && !c->runs)
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
	c->progress->bytes_received = link_bytes_received(c->link);
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
	int r = link_send(c->link, type, payload, bytes, true);

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
	c->limits.pages = c->progress->pages_all = c->layout.pages;
	return 0;
}

/* One that is missing, or another one, is no failure: its pages are sent. */
static void open_volume(struct receive *c, uint32_t i)
{
	const struct manifest_volume *v = &c->manifest.volume[i];
	const char *path = c->options->find(c->options->ctx, v->path);
	int fd = open(path, O_RDONLY | O_NONBLOCK);
	struct manifest_volume now;
	struct stat st;

	c->incoming.volume_fd[i] = -1;
	if (fd >= 0 && !fstat(fd, &st) && S_ISREG(st.st_mode) && !manifest_compare(fd, v, &now)) {
		c->incoming.volume_fd[i] = fd;
		c->limits.volume_pages[i] = ((uint64_t)st.st_size + OS_PAGE_BYTES - 1) >> OS_PAGE_SHIFT;
	} else if (fd >= 0) {
		close(fd);
	}
}

static void open_volumes(struct receive *c)
{
	c->limits.volumes = c->incoming.volumes = c->manifest.volumes;
	for (uint32_t i = 0; i < c->manifest.volumes; i++)
		open_volume(c, i);
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
		r = vmm_prepare_load(&c->vmm);
	if (r) {
		close(options.channel);
		return r;
	}
	return guest_open(&options, &c->guest, c->why);
}

static int prepare(struct receive *c)
{
	struct wire_ready ready = { 0 };
	int r = take_manifest(c);

	if (!r)
		r = take_blocks(c);
	if (r)
		return r;
	open_volumes(c);
	r = start_vmm(c);
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
	return r;
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
	c->progress->bytes_received = link_bytes_received(c->link);
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
		r = load_devices(c);
	return r ? r : say(c, WIRE_LOADED, NULL, 0);
}

/* Until the switch is made. */
static int take_passes(struct receive *c)
{
	struct wire_message m;
	int r;

	while (!(r = next(c, SOURCE_MS, &m))) {
		if (m.type == WIRE_PAGES)
			r = take_pages(c, &m);
		else if (m.type == WIRE_PASS && !(r = guest_finish_passes(c->guest, c->why)))
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

/* From here on it is ours, unless we say that it does not run, and see to it that it never will. */
static int run_guest(struct receive *c)
{
	int r = await_token(c);

	if (!r)
		r = guest_keep(c->guest, c->why);
	if (r)
		return r;
	if (!c->manifest.stood) {
		r = vmm_start_guest(&c->vmm);
		if (!r)
			r = serve_until(c, is_running, "letting the guest run");
	}
	if (r) {
		c->options->end(c->options->ctx, &c->vm);
		c->started = false;
		link_send_last(c->link, WIRE_FAILED, c->why);
		return r;
	}
	c->runs = c->result->runs = true;
	c->result->load_us = os_now_us() - c->switched_us;
	return say(c, WIRE_RUNNING, NULL, 0);
}

/* ---- what was missing ------------------------------------------------------------------------------------ */

static int take_rest(struct receive *c)
{
	struct wire_message m;
	int r = 0;

	while (!r && guest_missing(c->guest)) {
		r = serve_turn(c, &m);
		if (r > 0)
			r = unexpected(c, &m);
	}
	if (!r)
		r = guest_end(c->guest, c->why);
	if (!r)
		r = say(c, WIRE_DONE, NULL, 0);
	/* Pages that were wanted may come twice. */
	while (!r && !(r = next(c, SOURCE_MS, &m)) && m.type == WIRE_PAGES)
		;
	return r ? r : m.type == WIRE_DONE ? 0 : unexpected(c, &m);
}

/* ---- all of it ------------------------------------------------------------------------------------------- */

static int receive(struct receive *c)
{
	int r;

	c->progress->phase = RECEIVE_LISTENING;
	r = accept_source(c);
	c->progress->phase = RECEIVE_PREPARING;
	if (!r)
		r = prepare(c);
	c->progress->phase = RECEIVE_PASSES;
	if (!r)
		r = take_passes(c);
	c->progress->phase = RECEIVE_SWITCHING;
	if (!r)
		r = run_guest(c);
	c->progress->phase = RECEIVE_REST;
	if (!r)
		r = take_rest(c);
	c->progress->phase = RECEIVE_DONE;
	return r;
}

static void give_up(struct receive *c, int r)
{
	if (c->link && r != -EREMOTEIO)
		link_send_last(c->link, WIRE_REFUSE, c->why);
	if (c->started)
		c->options->end(c->options->ctx, &c->vm);
}

int migrate_receive(const struct receive_options *options, struct receive_progress *progress,
		    struct receive_result *ret_result, char why[SNAPSHOT_WHY_BYTES])
{
	struct receive *c = calloc(1, sizeof *c);
	uint64_t begin_us = os_now_us();
	int r;

	*ret_result = (struct receive_result){ 0 };
	if (!c)
		return snapshot_fail(why, -ENOMEM, "no memory");
	c->options = options;
	c->progress = progress;
	c->result = ret_result;
	c->why = why;
	c->vm.pid_fd = -1;
	c->vmm.state_fd = -1;
	c->state_fd = os_memfd_create("latent-state", 0, false);
	c->room = malloc((size_t)WIRE_DATA_PAGES_MAX << OS_PAGE_SHIFT);
	r = c->state_fd < 0 || !c->room ? snapshot_fail(why, -ENOMEM, "no memory") : receive(c);
	if (r && !c->runs)
		give_up(c, r);
	snprintf(ret_result->name, sizeof ret_result->name, "%s", c->manifest.name);
	ret_result->pid = c->vm.pid;
	ret_result->total_us = os_now_us() - begin_us;
	ret_result->bytes_received = c->link ? link_bytes_received(c->link) : 0;
	guest_close(c->guest);
	vmm_close(&c->vmm);
	link_close(c->link);
	for (uint32_t i = 0; i < c->incoming.volumes; i++)
		if (c->incoming.volume_fd[i] >= 0)
			close(c->incoming.volume_fd[i]);
	if (c->state_fd >= 0)
		close(c->state_fd);
	if (c->vm.pid_fd >= 0)
		close(c->vm.pid_fd);
	machine_free(c->manifest.machine);
	free(c->room);
	free(c);
	return r;
}
