/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "migrate/send.h"

#include "migrate/files.h"
#include "migrate/link.h"
#include "migrate/record.h"
#include "os/os.h"
#include "snapshot/describe.h"
#include "snapshot/disks.h"
#include "snapshot/vmm.h"
#include "vmdir/vmdir.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>
#include <xxhash.h>

#define ANSWER_MS 120000 /* the destination starts a VMM, or loads the state */
#define TURN_MS 100
#define PASSES_MAX 30
#define REST_MS 250             /* so long the guest may wait for pages behind the switch, in place of another pass */
#define ENOUGH_PAGES 256u      /* not worth another pass */
#define FAST_BYTES (256u << 10) /* less than that waits to be sent: the link is faster than packing */
#define PACK_LEVEL 1
#define AGAIN_US 500000 /* between two tries to reach the destination */

struct send {
	const struct send_options *options;
	struct send_progress *progress;
	struct send_result *result;
	char *why;
	struct manifest manifest;
	struct {
		struct wire_files header;
		struct digest digest[WIRE_FILES_MAX];
	} files;
	struct disk_names names;
	struct vmm vmm;
	struct source *source;
	struct link_keys *keys;
	struct link *link;
	struct teller *teller;
	struct wire_batch *batch;
	uint8_t *payload;
	uint64_t *had; /* by the destination, until the teller has them */
	uint64_t had_count;
	uint64_t begin_us, phase_us, first_pass_us, step_us;
	struct record record;
	uint64_t bytes_before; /* sent over links that were cut */
	bool told;   /* all, at the switch: pages may be wanted */
	bool given;  /* the token has been sent */
	bool runs;   /* the destination has said so */
	bool cut;    /* the link was, after the token */
	bool over;   /* the destination has all, as the ballot says */
};

/* Where tests let it be killed. */
static int step(int r)
{
	if (!r)
		(void)os_fault(OS_FAULT_MIGRATE_STEP);
	return r;
}

/* ---- messages --------------------------------------------------------------------------------------- */

static int check_stop(struct send *s)
{
	if (!s->progress->stop || s->progress->phase >= SEND_SWITCHING)
		return 0;
	return snapshot_fail(s->why, -EINTR, "a signal ended it");
}

static int take_refusal(struct send *s, const struct wire_message *m)
{
	char text[WIRE_TEXT_MAX];
	int r = wire_read_text(m, text, s->why);

	return r ? r : snapshot_fail(s->why, -EREMOTEIO, "the destination: %.230s", text);
}

static int add_wanted(struct send *s, const struct wire_message *m);

/* No more than guest RAM has pages. */
static int add_had(struct send *s, const struct wire_message *m)
{
	const uint64_t *digests;
	uint64_t *longer;
	size_t count;
	int r = wire_read_have(m, &digests, &count, s->why);

	if (!r && count > s->progress->pages_all - s->had_count)
		r = snapshot_fail(s->why, -EPROTO, "the destination has more pages than the VM");
	if (r)
		return r;
	longer = realloc(s->had, (s->had_count + count) * sizeof *longer);
	if (!longer)
		return snapshot_fail(s->why, -ENOMEM, "no memory for what the destination has");
	memcpy(longer + s->had_count, digests, count * sizeof *longer);
	s->had = longer;
	s->had_count += count;
	return 0;
}

/* `most`: pages that it may speak of. */
static int take_not_found(struct send *s, const struct wire_message *m, uint64_t most,
			  void (*tell_again)(struct teller *, uint64_t))
{
	const uint64_t *pages;
	size_t count;
	int r = wire_read_wanted(m, s->progress->pages_all, &pages, &count, s->why);

	if (!r && count > most)
		r = snapshot_fail(s->why, -EPROTO, "the destination has not found more pages than it was to look for");
	for (size_t i = 0; !r && i < count; i++)
		tell_again(s->teller, pages[i]);
	return r;
}

static int take_lacked(struct send *s, const struct wire_message *m)
{
	struct teller_counts told;

	teller_get_counts(s->teller, &told);
	return m->type == WIRE_LACK ? take_not_found(s, m, told.same - told.lacked, teller_lack)
				    : take_not_found(s, m, told.hints - told.stale, teller_stale);
}

/* What may come at any time; the others are the caller's. 1: it was none of them. */
static int take_any(struct send *s, const struct wire_message *m)
{
	s->given = s->given && (m->type != WIRE_FAILED || s->runs);
	if (m->type == WIRE_REFUSE || m->type == WIRE_FAILED)
		return take_refusal(s, m);
	if (m->type == WIRE_HAVE && !s->teller)
		return add_had(s, m);
	if ((m->type == WIRE_LACK || m->type == WIRE_STALE) && s->teller && !s->told)
		return take_lacked(s, m);
	return m->type == WIRE_WANT && s->told ? add_wanted(s, m) : 1;
}

static int unexpected(struct send *s, const struct wire_message *m)
{
	return snapshot_fail(s->why, -EPROTO, "the destination says something else than it should (%d)", (int)m->type);
}

/* A pass is over when the destination has read what it names, however long that takes: it is the link that tells whether
 * somebody is there. */
static int await(struct send *s, enum wire_type type, struct wire_message *m)
{
	uint64_t until_us = type == WIRE_PASS ? UINT64_MAX : os_now_us() + ANSWER_MS * 1000ull;
	int r;

	for (;;) {
		r = check_stop(s);
		if (!r && os_now_us() >= until_us)
			r = snapshot_fail(s->why, -ETIMEDOUT, "the destination does not answer");
		if (!r)
			r = link_receive(s->link, m, s->why);
		if (r == -EAGAIN) {
			r = link_wait(s->link, false, NULL, 0, TURN_MS, s->why);
			if (r)
				return r;
			continue;
		}
		if (r || m->type == type)
			return r;
		r = take_any(s, m);
		if (r)
			return r < 0 ? r : unexpected(s, m);
	}
}

/* In a pass: what waits is sent as far as it can be, and what has come is heard. A destination that nobody listens to for long
 * is cut off (TCP_USER_TIMEOUT). */
static int turn(struct send *s)
{
	struct wire_message m;
	int r = link_wait(s->link, false, NULL, 0, 0, s->why);

	if (r)
		return r;
	while (!(r = link_receive(s->link, &m, s->why))) {
		r = take_any(s, &m);
		if (r)
			return r < 0 ? r : unexpected(s, &m);
	}
	return r == -EAGAIN ? 0 : r;
}

/* Room for it is waited for. */
static int put(struct send *s, enum wire_type type, const void *payload, size_t bytes)
{
	int r;

	while ((r = link_send(s->link, type, payload, bytes, false)) == -EAGAIN) {
		r = check_stop(s);
		if (!r)
			r = link_wait(s->link, true, NULL, 0, TURN_MS, s->why);
		if (r)
			return r;
	}
	s->progress->bytes_sent = s->bytes_before + link_bytes_sent(s->link);
	return r ? snapshot_fail(s->why, r, "no memory for a message") : 0;
}

/* ---- who is there ------------------------------------------------------------------------------------- */

static int greet(struct send *s)
{
	struct wire_hello ours = { .magic = WIRE_MAGIC, .version = WIRE_VERSION, .page_bytes = OS_PAGE_BYTES,
				   .resume = s->given }, theirs;
	struct wire_message m;
	int r;

	memcpy(ours.session, s->record.session, sizeof ours.session);
	r = put(s, WIRE_HELLO, &ours, sizeof ours);
	if (!r)
		r = await(s, WIRE_HELLO, &m);
	if (!r)
		r = wire_read_hello(&m, &theirs, s->why);
	if (!r && memcmp(theirs.session, ours.session, sizeof ours.session))
		r = snapshot_fail(s->why, -EPROTO, "the destination takes us for another one");
	return r;
}

static int connect_destination(struct send *s)
{
	const struct send_options *o = s->options;
	int r = o->keys_dir && !s->keys ? link_keys_load(o->keys_dir, false, &s->keys, s->why) : 0;

	if (!r)
		r = link_connect(o->address, s->keys, o->host, true, &s->link, s->why);
	return r ? r : greet(s);
}

/* ---- what it is ---------------------------------------------------------------------------------------- */

/* The volumes that page entries name, numbered as in the layout. */
static int list_volumes(struct send *s)
{
	const struct control_layout *layout = source_layout(s->source);
	int r = 0;

	s->manifest.volumes = layout->volumes;
	for (uint32_t i = 0; !r && i < layout->volumes; i++) {
		struct manifest_volume *v = &s->manifest.volume[i];
		int fd = open(layout->volume[i].path, O_RDONLY | O_CLOEXEC);

		memcpy(v->path, layout->volume[i].path, sizeof v->path);
		r = fd < 0 ? -errno : manifest_identify(fd, v);
		if (fd >= 0)
			close(fd);
		if (r)
			snapshot_fail(s->why, r, "%.200s cannot be read: %s", v->path, strerror(-r));
	}
	return r;
}

static int describe(struct send *s)
{
	struct source_view view;
	int r;

	snprintf(s->manifest.name, sizeof s->manifest.name, "%s", s->options->name);
	memcpy(s->manifest.qemu_version, s->vmm.version, sizeof s->manifest.qemu_version);
	s->manifest.stood = !s->vmm.ran;
	source_get_view(s->source, &view);
	s->manifest.ram_bytes = os_bytes(view.pages);
	r = list_volumes(s);
	if (r)
		return r;
	describe_nodes(s->vmm.qmp, &s->manifest);
	describe_machine(s->vmm.qmp, s->options->run_dir, &s->manifest);
	describe_generation(s->vmm.qmp, &s->manifest);
	return 0;
}

static int tick(void *ctx)
{
	return check_stop(ctx);
}

static int digest_files(struct send *s)
{
	const struct digest_reading reading = { .known_dir = s->options->known_dir, .tick = tick, .ctx = s };

	s->files.header.count = files_of(&s->manifest);
	return files_digest(&s->manifest, &reading, s->files.digest, s->why);
}

/* Where it cannot be made, or the disk is no file, only a user can say who has the guest when both sides cannot talk. */
static void make_ballot(struct send *s)
{
	const char *disk = s->manifest.disk[0].layer[0].volume.path;
	struct stat st;

	if (!s->manifest.disks || stat(disk, &st) || !S_ISREG(st.st_mode) ||
	    ballot_name(disk, s->record.session, &s->record.ballot) || ballot_make(&s->record.ballot))
		s->record.ballot.path[0] = '\0';
	s->files.header.ballot = s->record.ballot.path[0] != '\0';
}

static int put_manifest(struct send *s)
{
	char *text = manifest_to_text(&s->manifest);
	int r = text ? put(s, WIRE_MANIFEST, text, strlen(text)) : snapshot_fail(s->why, -ENOMEM, "no memory for the manifest");

	free(text);
	return r;
}

static int put_blocks(struct send *s)
{
	const struct control_layout *layout = source_layout(s->source);
	struct snapshot_block blocks[SNAPSHOT_BLOCKS] = { 0 };

	for (uint32_t i = 0; i < layout->blocks; i++) {
		snprintf(blocks[i].name, sizeof blocks[i].name, "%s", layout->block[i].name);
		blocks[i].pages = layout->block[i].pages;
	}
	return put(s, WIRE_BLOCKS, blocks, layout->blocks * sizeof blocks[0]);
}

/* The destination has a VMM that waits, and has said which volumes it has. */
static int introduce(struct send *s)
{
	struct wire_message m;
	struct wire_ready ready = { 0 };
	struct hint_numbers numbers;
	int r = put_manifest(s);

	if (!r)
		r = put_blocks(s);
	if (!r)
		r = put(s, WIRE_FILES, &s->files, sizeof s->files.header + s->files.header.count * sizeof s->files.digest[0]);
	if (!r)
		r = await(s, WIRE_READY, &m);
	if (r)
		return r;
	memcpy(&ready, m.payload, sizeof ready);
	r = teller_create(s->source, ready.volumes, &s->teller, s->why);
	if (r)
		return r;
	teller_had(s->teller, s->had, s->had_count);
	s->had = NULL;
	hint_number(&s->manifest, source_layout(s->source), ready.disks, &numbers);
	teller_may_hint(s->teller, &numbers);
	return 0;
}

/* ---- pages -------------------------------------------------------------------------------------------- */

static void note_progress(struct send *s)
{
	struct teller_counts told;

	teller_get_counts(s->teller, &told);
	s->progress->words = told.words;
	s->progress->volume = told.volume;
	s->progress->same = told.same - told.lacked;
	s->progress->disks = told.hints - told.stale;
	s->progress->data = told.data;
	s->progress->pages_left = teller_left(s->teller);
	s->progress->wanted = s->result->pages_wanted;
}

static int put_batch(struct send *s, bool urgent)
{
	int level = link_waiting(s->link) < FAST_BYTES ? 0 : PACK_LEVEL, r;
	size_t bytes = wire_close(s->batch, level, s->payload);

	note_progress(s);
	if (!urgent)
		return put(s, WIRE_PAGES, s->payload, bytes);
	r = link_send(s->link, WIRE_PAGES, s->payload, bytes, true);
	return r ? snapshot_fail(s->why, r, "no memory for a message") : 0;
}

static int add_wanted(struct send *s, const struct wire_message *m)
{
	const uint64_t *pages;
	size_t count;
	bool full = false;
	int r = wire_read_wanted(m, s->progress->pages_all, &pages, &count, s->why);

	for (size_t i = 0; !r && i < count; i += !full) {
		r = teller_add(s->teller, pages[i], s->batch, &full, s->why);
		if (!r && full)
			r = put_batch(s, true);
	}
	s->result->pages_wanted += r ? 0 : count;
	return r || !s->batch->runs ? r : put_batch(s, true);
}

/* Until more may be sent. */
static uint64_t us_to_wait(const struct send *s)
{
	uint64_t now_us = os_now_us(), due_us;

	if (!s->options->max_bytes_s)
		return 0;
	due_us = s->first_pass_us + link_bytes_sent(s->link) * 1000000 / s->options->max_bytes_s;
	return now_us < due_us ? due_us - now_us : 0;
}

static int keep_rate(struct send *s)
{
	uint64_t us;
	int r = 0;

	while (!r && (us = us_to_wait(s))) {
		r = link_wait(s->link, false, NULL, 0, us < TURN_MS * 1000 ? (int)(us / 1000) + 1 : TURN_MS, s->why);
		if (!r)
			r = check_stop(s);
	}
	return r;
}

/* `teller_fill` or `teller_fill_missing`, until it has no more. */
static int put_all(struct send *s, int (*fill)(struct teller *, struct wire_batch *, char *))
{
	const struct wire_same *same;
	const struct wire_hint *hint;
	size_t count, hints;
	int r;

	for (;;) {
		r = fill(s->teller, s->batch, s->why);
		same = teller_same(s->teller, &count);
		hint = teller_hints(s->teller, &hints);
		if (r || (!s->batch->runs && !count && !hints))
			return r;
		r = count ? put(s, WIRE_SAME, same, count * sizeof *same) : 0;
		if (!r && hints)
			r = put(s, WIRE_HINT, hint, hints * sizeof *hint);
		if (!r && s->batch->runs)
			r = put_batch(s, false);
		if (!r)
			r = turn(s);
		if (!r)
			r = check_stop(s);
		if (!r)
			r = keep_rate(s);
		if (r)
			return r;
	}
}

/* The destination has put in place all that it was told. */
static int end_pass(struct send *s)
{
	struct wire_message m;
	int r = put(s, WIRE_PASS, NULL, 0);

	return r ? r : await(s, WIRE_PASS, &m);
}

/* By what was sent until now. */
static uint64_t bytes_a_second(const struct send *s)
{
	uint64_t us = os_now_us() - s->first_pass_us, bytes_s = link_bytes_sent(s->link) * 1000000 / (us ? us : 1);

	return s->options->max_bytes_s && s->options->max_bytes_s < bytes_s ? s->options->max_bytes_s : bytes_s;
}

/* Pages that can be sent in so long. */
static uint64_t pages_in(const struct send *s, unsigned ms)
{
	return bytes_a_second(s) * ms / 1000 / OS_PAGE_BYTES;
}

/* That a pass over so many pages takes; 0: the link is not known yet. */
static uint64_t us_for(const struct send *s, unsigned pass, uint64_t pages)
{
	uint64_t bytes_s = pass > 1 ? bytes_a_second(s) : s->options->max_bytes_s;

	return bytes_s ? os_bytes(pages) * 1000000 / bytes_s : 0;
}

static uint64_t pages_in_downtime(const struct send *s)
{
	return pages_in(s, s->options->max_downtime_ms);
}

/* That can still be sent when the guest stands: its devices take as long to load, about, as to save. */
static uint64_t pages_in_pause(const struct send *s)
{
	uint64_t ms = (os_now_us() - s->vmm.stopped_us + s->result->saved_us) / 1000, max_ms = s->options->max_downtime_ms;

	return ms < max_ms ? pages_in(s, (unsigned)(max_ms - ms)) : 0;
}

/* What the guest has written since is as much as there was to tell, or most of what is left: it will be as much again. What
 * the destination has not found is told once more, and that is all of it. */
static bool is_written_as_fast(const struct send *s, uint64_t left, uint64_t before)
{
	uint64_t written = left - teller_lacked(s->teller);

	return written > before / 4 * 3 && written > left / 4 * 3;
}

/* Another pass costs more than it brings: what is left fits into the downtime, or comes soon enough behind the switch, or
 * does not become less. */
static bool is_enough(const struct send *s, uint64_t left, uint64_t before)
{
	return left <= ENOUGH_PAGES || left <= pages_in_downtime(s) || is_written_as_fast(s, left, before) ||
	       (!s->options->no_postcopy && left <= pages_in(s, REST_MS));
}

/* The destination hears something meanwhile: with much to settle it takes longer than the link may be silent. */
static int settle(struct send *s)
{
	uint64_t settled, left;
	int r;

	do {
		r = source_settle(s->source, &settled, &left, s->why);
		s->result->settled_pages += settled;
		if (!r)
			r = link_wait(s->link, false, NULL, 0, 0, s->why);
		if (!r)
			r = check_stop(s);
	} while (!r && left);
	return r;
}

/* While the guest runs: until another pass would be no good. */
static int put_passes(struct send *s)
{
	uint64_t before = UINT64_MAX;
	int r = 0;

	s->first_pass_us = os_now_us();
	for (unsigned pass = 1; !r && pass <= PASSES_MAX; pass++) {
		uint64_t left;

		r = settle(s);
		if (!r)
			r = source_arm(s->source, s->why);
		if (r)
			return r;
		left = teller_collect(s->teller);
		if (pass > 1 && is_enough(s, left, before))
			return 0;
		before = left;
		s->result->passes = pass;
		s->progress->pass = pass;
		r = source_pass(s->source, us_for(s, pass, left), s->why);
		if (!r)
			r = put_all(s, teller_fill);
		if (!r)
			r = step(end_pass(s));
	}
	return r;
}

/* ---- the switch --------------------------------------------------------------------------------------- */

static int put_state(struct send *s, struct wire_switch *sw)
{
	uint64_t bytes = s->result->state_bytes;
	uint8_t *state = mmap(NULL, bytes ? bytes : 1, PROT_READ, MAP_SHARED, s->vmm.state_fd, 0);
	int r = 0;

	if (state == MAP_FAILED)
		return snapshot_fail(s->why, -errno, "the device state cannot be read");
	sw->state_bytes = bytes;
	sw->checksum = XXH3_64bits(state, bytes);
	for (uint64_t at = 0, n; !r && at < bytes; at += n) {
		n = bytes - at < WIRE_STATE_MAX ? bytes - at : WIRE_STATE_MAX;
		r = put(s, WIRE_STATE, state + at, n);
	}
	munmap(state, bytes ? bytes : 1);
	return r;
}

/* One part of the downtime is over. */
static void note_step(struct send *s, uint64_t *ret_us)
{
	uint64_t now_us = os_now_us();

	*ret_us = now_us - s->step_us;
	s->step_us = now_us;
}

static int stop_guest(struct send *s)
{
	uint64_t paused_us;
	int r = vmm_begin_pause(&s->vmm);

	if (!r)
		r = vmm_wait_stopped(&s->vmm);
	s->step_us = s->vmm.stopped_us;
	if (!r)
		r = vmm_save_devices(&s->vmm, &s->result->state_bytes);
	note_step(s, &s->result->saved_us);
	if (!r)
		r = source_point(s->source, &paused_us, s->why);
	if (!r)
		r = teller_collect_last(s->teller, s->source, s->why);
	note_step(s, &s->result->point_us);
	return r;
}

static int give(struct send *s)
{
	int r = source_give(s->source, s->why);

	s->record.phase = RECORD_GIVEN;
	s->record.stood = s->manifest.stood;
	return r ? r : record_write(s->options->run_dir, &s->record, s->why);
}

/* From the stop of the guest to the word that it runs there. */
static int switch_over(struct send *s)
{
	bool all = s->options->no_postcopy;
	struct wire_switch sw = { 0 };
	struct wire_message m;
	int r = step(stop_guest(s));

	if (!r && (all || teller_left(s->teller) <= pages_in_pause(s)))
		r = put_all(s, teller_fill);
	else if (!r)
		r = put_all(s, teller_fill_missing);
	if (!r)
		r = put_state(s, &sw);
	sw.missing = s->result->pages_missing = teller_left(s->teller);
	s->told = true;
	if (!r)
		r = put(s, WIRE_SWITCH, &sw, sizeof sw);
	note_step(s, &s->result->told_us);
	if (!r)
		r = step(await(s, WIRE_LOADED, &m));
	note_step(s, &s->result->loaded_us);
	if (!r)
		r = step(give(s));
	if (!r)
		r = link_send(s->link, WIRE_TOKEN, NULL, 0, false);
	if (r)
		return r;
	s->given = true;
	link_flush(s->link);
	r = step(await(s, WIRE_RUNNING, &m));
	s->runs = !r;
	note_step(s, &s->result->started_us);
	if (!r)
		s->result->downtime_us = os_now_us() - s->vmm.stopped_us;
	return r;
}

/* ---- what was missing --------------------------------------------------------------------------------- */

/* Pages that nobody asks for, hottest first, as long as the link takes them. */
static int put_rest(struct send *s)
{
	int r = 0;

	while (!r && link_waiting(s->link) < LINK_ROOM && !us_to_wait(s)) {
		r = teller_fill(s->teller, s->batch, s->why);
		if (r || !s->batch->runs)
			break;
		r = put_batch(s, false);
	}
	return r;
}

static int end_serving(struct send *s)
{
	int r = step(put(s, WIRE_DONE, NULL, 0));

	link_flush(s->link);
	return step(r);
}

/* What the destination says first after a cut. */
static int add_owed(struct send *s, const struct wire_message *m)
{
	const struct wire_owed *owed;
	size_t count;
	int r = wire_read_owed(m, s->progress->pages_all, &owed, &count, s->why);

	for (size_t i = 0; !r && i < count; i++)
		teller_owe(s->teller, owed[i].page, owed[i].pages);
	return r;
}

static int take_in_the_end(struct send *s, const struct wire_message *m)
{
	if (m->type == WIRE_OWED && s->cut)
		return add_owed(s, m);
	if (m->type != WIRE_RUNNING || !s->cut)
		return take_any(s, m);
	if (!s->runs && s->vmm.stopped_us)
		s->result->downtime_us = os_now_us() - s->vmm.stopped_us;
	s->runs = true;
	return 0;
}

/* Until there is something to do. */
static int rest(struct send *s)
{
	uint64_t us = us_to_wait(s);
	int ms = us && us < TURN_MS * 1000 ? (int)((us + 999) / 1000) : TURN_MS;

	return link_wait(s->link, teller_left(s->teller) && !us, NULL, 0, ms, s->why);
}

/* Until the destination has all. */
static int serve(struct send *s)
{
	struct wire_message m;
	int r = 0;

	while (!r) {
		r = link_receive(s->link, &m, s->why);
		if (!r && m.type == WIRE_DONE)
			return end_serving(s);
		if (!r)
			r = take_in_the_end(s, &m);
		else if (r == -EAGAIN)
			r = put_rest(s);
		if (!r)
			r = rest(s);
		if (r > 0)
			r = unexpected(s, &m);
	}
	return r;
}

/* ---- after a cut -------------------------------------------------------------------------------------- */

static void drop_link(struct send *s)
{
	s->bytes_before += s->link ? link_bytes_sent(s->link) : 0;
	link_close(s->link);
	s->link = NULL;
}

/* Either the destination is there again, or it can never have the guest any more. */
static int come_together(struct send *s)
{
	int r;

	for (;;) {
		drop_link(s);
		if (s->progress->stop)
			return snapshot_fail(s->why, -EINTR, "a signal ended it, after the link was cut");
		if (!s->runs && s->record.ballot.path[0] && !ballot_take(&s->record.ballot, BALLOT_SOURCE)) {
			s->given = false;
			return snapshot_fail(s->why, -ECANCELED, "the link was cut before the guest ran there, and it never will");
		}
		s->over = ballot_is_over(&s->record.ballot);
		if (s->over)
			return 0;
		r = connect_destination(s);
		if (!r || r == -EREMOTEIO || r == -EACCES)
			return r;
		usleep(AGAIN_US);
	}
}

static int go_on(struct send *s)
{
	int r;

	s->cut = true;
	s->progress->cut = true;
	r = come_together(s);
	s->progress->cut = false;
	if (r || s->over)
		return r;
	s->batch->runs = s->batch->data_pages = 0;
	s->first_pass_us = os_now_us();
	teller_forget(s->teller);
	return serve(s);
}

/* ---- all of it ---------------------------------------------------------------------------------------- */

static int make_room(struct send *s)
{
	s->batch = calloc(1, sizeof *s->batch);
	s->payload = aligned_alloc(8, WIRE_PAYLOAD_MAX);
	return s->batch && s->payload ? 0 : snapshot_fail(s->why, -ENOMEM, "no memory for messages");
}

static int begin_source(struct send *s)
{
	struct source_progress loading = { 0 };
	char control[VMDIR_PATH_BYTES];
	struct source_view view;
	int r;

	snprintf(control, sizeof control, "%.230s/" VMDIR_CONTROL, s->options->run_dir);
	r = source_open(control, &loading, &s->source, s->why);
	if (!r)
		r = source_begin(s->source, s->why);
	if (r)
		return r;
	source_get_view(s->source, &view);
	s->progress->pages_all = view.pages;
	return 0;
}

/* Of a migration that was before this one. */
static int clear_record(struct send *s)
{
	char ignored[SNAPSHOT_WHY_BYTES];
	struct record old;

	if (record_read(s->options->run_dir, &old, ignored))
		return 0;
	if (old.phase > RECORD_GIVEN)
		return snapshot_fail(s->why, -EBUSY, "not all of its memory has come from where it was: `latent receive --resume` "
				     "brings it");
	ballot_remove(&old.ballot); /* its mover was killed; the VM is here */
	return 0;
}

static int prepare(struct send *s)
{
	int r = make_room(s);

	if (!r)
		r = vmm_open(s->options->run_dir, &s->progress->stop, s->why, &s->vmm);
	if (!r)
		r = clear_record(s);
	if (!r)
		r = disks_list(&s->vmm, s->options->cwd, &s->manifest, &s->names);
	if (!r) { /* the other host finds it on shared storage, and QEMU has less to do in the pause; nothing is held yet */
		disks_sync(&s->manifest, &s->progress->stop);
		r = check_stop(s);
	}
	if (!r)
		r = begin_source(s);
	if (!r)
		r = describe(s);
	if (!r)
		r = digest_files(s);
	if (!r && getrandom(s->record.session, sizeof s->record.session, 0) != sizeof s->record.session)
		r = snapshot_fail(s->why, -EIO, "no random numbers");
	if (!r)
		make_ballot(s);
	s->record.phase = RECORD_BEGUN;
	return r ? r : record_write(s->options->run_dir, &s->record, s->why);
}

/* The VM stands, and was given away by one that is gone. */
static int take_over(struct send *s)
{
	uint64_t paused_us;
	int r = make_room(s);

	if (!r)
		r = record_read(s->options->run_dir, &s->record, s->why);
	if (!r && s->record.phase != RECORD_GIVEN)
		r = snapshot_fail(s->why, -EINVAL, "the VM is on its way to here: that is for `latent receive --resume`");
	if (!r)
		r = vmm_open_waiting(s->options->run_dir, -1, s->why, &s->vmm);
	if (!r)
		r = begin_source(s);
	if (!r)
		r = source_arm(s->source, s->why);
	if (!r)
		r = source_point(s->source, &paused_us, s->why);
	if (!r)
		r = teller_create(s->source, 0, &s->teller, s->why);
	if (!r)
		r = teller_collect_last(s->teller, s->source, s->why);
	s->vmm.stopped = true;
	s->vmm.ran = !s->record.stood;
	snprintf(s->vmm.migration, sizeof s->vmm.migration, "completed");
	s->told = s->given = true;
	return r;
}

static int set_phase(struct send *s, enum send_phase phase)
{
	uint64_t now_us = os_now_us();
	int r = check_stop(s);

	s->result->phase_us[s->progress->phase] = now_us - s->phase_us;
	s->phase_us = now_us;
	s->progress->phase = phase;
	return r;
}

static int migrate(struct send *s)
{
	int r = step(prepare(s));

	if (!r)
		r = set_phase(s, SEND_CONNECTING);
	if (!r)
		r = step(connect_destination(s));
	if (!r)
		r = step(introduce(s));
	if (!r)
		r = set_phase(s, SEND_PASSES);
	if (!r)
		r = put_passes(s);
	if (!r)
		r = set_phase(s, SEND_SWITCHING);
	if (!r)
		r = switch_over(s);
	(void)set_phase(s, SEND_REST);
	return r ? r : serve(s);
}

static int migrate_again(struct send *s)
{
	int r = take_over(s);

	s->progress->phase = SEND_REST;
	return r ? r : go_on(s);
}

static int run(struct send *s)
{
	int r = s->options->again ? migrate_again(s) : migrate(s);

	while (r && s->given && s->link && link_is_over(s->link))
		r = go_on(s);
	(void)set_phase(s, SEND_DONE);
	return r;
}

/* The VM is elsewhere, for good. */
static void end_vmm(struct send *s)
{
	char ignored[SNAPSHOT_WHY_BYTES];

	source_end(s->source);
	s->source = NULL;
	s->vmm.why = ignored;
	(void)vmm_run(&s->vmm, "quit", NULL, NULL);
}

/* The destination hears why, unless it is it that has said so. */
static void take_back(struct send *s, int r)
{
	if (s->link && r != -EREMOTEIO)
		link_send_last(s->link, WIRE_REFUSE, s->why);
	source_end(s->source);
	s->source = NULL;
	vmm_undo(&s->vmm);
	record_remove(s->options->run_dir);
}

int migrate_send(const struct send_options *options, struct send_progress *progress, struct send_result *ret_result,
		 enum send_end *ret_end, char why[SNAPSHOT_WHY_BYTES])
{
	struct send *s = calloc(1, sizeof *s);
	int r;

	*ret_result = (struct send_result){ 0 };
	*ret_end = SEND_HERE;
	if (!s)
		return snapshot_fail(why, -ENOMEM, "no memory");
	s->options = options;
	s->progress = progress;
	s->result = ret_result;
	s->why = why;
	s->vmm.state_fd = -1;
	s->begin_us = s->phase_us = os_now_us();
	r = run(s);
	*ret_end = !r ? SEND_THERE : s->given ? SEND_UNKNOWN : SEND_HERE;
	if (!r)
		end_vmm(s);
	else if (!s->given)
		take_back(s, r);
	if (*ret_end != SEND_UNKNOWN)
		ballot_remove(&s->record.ballot);
	ret_result->total_us = os_now_us() - s->begin_us;
	ret_result->bytes_sent = s->bytes_before + (s->link ? link_bytes_sent(s->link) : 0);
	if (s->teller)
		teller_get_counts(s->teller, &ret_result->told);
	teller_destroy(s->teller);
	source_end(s->source);
	vmm_close(&s->vmm);
	link_close(s->link);
	link_keys_free(s->keys);
	machine_free(s->manifest.machine);
	free(s->had);
	free(s->batch);
	free(s->payload);
	free(s);
	return r;
}
