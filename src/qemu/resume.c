/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * After a restore. The guest runs, or stands as it was asked to, or it is a spare: all is done but the resume, and
 * a keeper holds the other end of a socket. A spare that is taken gets its name, tells the keeper so, and depends
 * on him no more; one whose keeper is gone quits.
 */
#include "qemu/agent.h"

#include "os/os.h"
#include "os/probe.h"
#include "vmdir/vmdir.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void set_step(struct agent *a, enum restore_step step, uint64_t us)
{
	stat_set(&a->stats->restore_us[step], us);
}

/* Another process shall load the rest, and say so. */
static bool rest_is_told(const struct agent *a)
{
	return a->config.restore.rest && !a->config.restore.pager.active && !a->stats->is_spare;
}

static void report(struct agent *a, enum agent_report_kind kind)
{
	struct agent_report report = { .kind = kind, .pid = (uint32_t)getpid(), .rest = rest_is_told(a) };
	struct iovec iov = { &report, sizeof report };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1 };

	if (a->config.restore.report_fd < 0)
		return;
	snprintf(report.name, sizeof report.name, "%s", a->config.name);
	for (int i = 0; i < RESTORE_STEPS; i++)
		report.step_us[i] = stat_get(&a->stats->restore_us[i]);
	(void)agent_send(a->config.restore.report_fd, &message); /* nobody has to be there */
}

static void end_reports(struct agent *a)
{
	if (a->config.restore.report_fd >= 0)
		close(a->config.restore.report_fd);
	a->config.restore.report_fd = -1;
}

/* The guest's first reads find their pages in the page table. Copies for its writes would cost memory. What a pager
 * is loading is not waited for. */
static void prefault(struct agent *a)
{
	if (a->config.restore.pager.active)
		return;
	for (unsigned i = 0; i < RAM_BLOCKS; i++) {
		struct ram_block *b = ram_block_at(a->ram, i);

		for (uint64_t page = 0; b && page < b->pages;) {
			struct ram_range range;

			ram_lock(a->ram);
			range = ram_range_at(b, page, b->pages);
			ram_unlock(a->ram);
			if (range.source == ENTRY_OVERLAY)
				os_populate_read(b->hva + os_bytes(page), os_bytes(range.pages));
			page += range.pages;
		}
	}
}

void resume_note(struct agent *a, struct pause *p)
{
	if (p && a->config.restore.active && !stat_get(&a->stats->restore_us[RESTORE_RESUMED]) && pause_resumed_us(p))
		set_step(a, RESTORE_RESUMED, pause_resumed_us(p));
}

/* Leases are looked after as soon as the restore is done. One that somebody waited for so long that the kernel may
 * have let him write: what is mapped from that file may no longer be what was saved. */
static const char *file_that_changed(struct agent *a)
{
	int seconds = os_features_get()->lease_break_s;
	uint64_t lasts_us = (uint64_t)(seconds > 0 ? seconds : 45) * 1000000;
	struct volume *v;

	if (os_now_us() - stat_get(&a->stats->restore_us[RESTORE_EXEC]) < lasts_us / 8 * 7)
		return NULL;
	for (uint32_t i = 0; (v = volumes_nth(a->volumes, i)); i++)
		if (volume_lease_breaks(v) && volume_showing_pages(v))
			return volume_path(v);
	return NULL;
}

static int resume(struct agent *a, struct pause *p)
{
	int r = pause_resume(p);

	(void)os_fault(OS_FAULT_AGENT_STEP);
	if (r)
		agent_say("the restored guest could not be continued (%s): use `cont`", strerror(-r));
	resume_note(a, p);
	return r;
}

/* Who has asked for the restore knows now that all is done but the rest. */
static void tell(struct agent *a, enum agent_report_kind kind)
{
	if (!a->overlays_allowed)
		a->config.restore.rest = 0; /* nothing is mapped: all was read */
	if (a->config.restore.rest && a->config.restore.pager.active) {
		lazy_load_rest();
		if (!stat_get(&a->stats->restore_us[RESTORE_REST])) /* of a spare, when it began to wait */
			set_step(a, RESTORE_REST, os_now_us());
	}
	report(a, kind);
	if (!a->stats->is_spare && !rest_is_told(a))
		end_reports(a);
}

void resume_restored(struct agent *a, struct pause *p)
{
	const char *changed = NULL;

	if (!p || !pause_is_loaded(p))
		return; /* it has been said, and QEMU ends */
	changed = file_that_changed(a);
	if (changed) {
		agent_say("%s was opened for writing while the guest was restored, and the guest cannot run with it: restore it again",
			  changed);
		pause_quit(p);
		return;
	}
	if (os_fault(OS_FAULT_AGENT_STEP)) {
		pause_quit(p);
		return;
	}
	set_step(a, RESTORE_STATE, os_now_us());
	if (a->config.restore.then == RESTORE_THEN_WAIT) {
		prefault(a);
		a->stats->is_spare = 1;
		tell(a, REPORT_READY);
		return;
	}
	if (a->config.restore.then == RESTORE_THEN_RUN && resume(a, p)) {
		report(a, REPORT_FAILED); /* it stands, and its disks are still its own */
		return;
	}
	tell(a, REPORT_READY);
}

/* ---- the rest ------------------------------------------------------------------------------------ */

void resume_note_rest(struct agent *a, enum rest_state state, uint64_t pages_all, uint64_t pages_now)
{
	struct vm_stats *s = a->stats;

	stat_set(&s->rest_pages_all_now, pages_all);
	stat_set(&s->rest_pages_now, pages_now);
	if (state != REST_LOADING && (s->rest_state == REST_LOADING || s->rest_state == REST_NONE))
		stat_set(&s->rest_end_us, os_now_us());
	s->rest_state = state;
}

static void note_stopped(struct agent *a)
{
	struct vm_stats *s = a->stats;

	if (s->rest_state == REST_LOADING)
		resume_note_rest(a, REST_STOPPED, stat_get(&s->rest_pages_all_now), stat_get(&s->rest_pages_now));
}

int resume_rest_fd(const struct agent *a)
{
	return a->config.restore.active && rest_is_told(a) ? a->config.restore.report_fd : -1;
}

static bool is_valid(const struct rest_report *r, ssize_t bytes)
{
	return bytes == (ssize_t)sizeof *r && r->magic == REST_MAGIC && r->state > REST_NONE && r->state < REST_STATES;
}

void resume_rest_said(struct agent *a)
{
	struct rest_report r;
	ssize_t n = recv(resume_rest_fd(a), &r, sizeof r, MSG_DONTWAIT | MSG_TRUNC);

	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (!is_valid(&r, n)) {
		note_stopped(a);
		end_reports(a);
		return;
	}
	if (!stat_get(&a->stats->restore_us[RESTORE_REST]))
		set_step(a, RESTORE_REST, r.begun_us);
	resume_note_rest(a, (enum rest_state)r.state, r.pages_all, r.pages_now);
}

void resume_stop_rest(struct agent *a, struct control_reply *reply)
{
	if (a->stats->rest_state != REST_LOADING) {
		reply->error = -EALREADY;
		snprintf(reply->text, sizeof reply->text, "nothing of a snapshot is being loaded for it");
		return;
	}
	if (a->config.restore.pager.active)
		lazy_stop_rest();
	else
		end_reports(a); /* which the other side sees */
	note_stopped(a);
}

/* ---- spares ------------------------------------------------------------------------------------- */

int resume_poll_fd(const struct agent *a)
{
	return a->config.restore.active && a->stats->is_spare ? a->config.restore.report_fd : -1;
}

void resume_keeper_gone(struct agent *a, struct pause *p)
{
	a->stats->is_spare = 0;
	end_reports(a);
	pause_quit(p);
}

static int rename_vm(struct agent *a, const char *name, char why[VMDIR_WHY_BYTES])
{
	char root[VMDIR_PATH_BYTES], path[VMDIR_PATH_BYTES];
	char *slash;
	int r;

	snprintf(root, sizeof root, "%s", a->config.run_dir);
	slash = strrchr(root, '/');
	*slash = '\0';
	r = vmdir_rename(root, a->config.name, name, why);
	if (r)
		return r;
	(void)vmdir_path(root, name, "", path);
	path[strlen(path) - 1] = '\0';
	memcpy(a->config.run_dir, path, sizeof path);
	snprintf(a->config.name, sizeof a->config.name, "%s", name);
	snprintf(a->stats->name, sizeof a->stats->name, "%s", name);
	return 0;
}

void resume_take(struct agent *a, struct pause *p, const char *name, struct control_reply *reply)
{
	char why[VMDIR_WHY_BYTES] = "it is no spare, or was taken already";

	reply->error = resume_poll_fd(a) < 0 ? -EALREADY : rename_vm(a, name, why);
	if (reply->error) {
		snprintf(reply->text, sizeof reply->text, "%s", why);
		return;
	}
	(void)os_fault(OS_FAULT_AGENT_STEP);
	a->stats->is_spare = 0;
	reply->error = resume(a, p);
	if (reply->error)
		snprintf(reply->text, sizeof reply->text, "QEMU could not let it run");
	tell(a, REPORT_TAKEN);
}

/* ---- a restore that came to nothing --------------------------------------------------------------- */

/* One that stands may have been let run by a `cont` that the agent has not heard of yet. The statistics are asked
 * through their file: they may not be mapped, or by another process (-daemonize). */
static bool may_have_run(const struct agent *a)
{
	enum restore_step step = a->config.restore.then == RESTORE_THEN_STAND ? RESTORE_STATE : RESTORE_RESUMED;
	struct vm_stats stats;

	return pread(a->config.stats_fd, &stats, sizeof stats, 0) == (ssize_t)sizeof stats &&
	       stat_get(&stats.restore_us[step]);
}

void resume_drop_disks(const struct agent *a)
{
	const struct agent_restore *restore = &a->config.restore;

	if (restore->overlays_fd < 0 || may_have_run(a))
		return;
	for (uint32_t i = 0; i < restore->overlays && i < AGENT_RESTORE_OVERLAYS; i++)
		(void)unlinkat(restore->overlays_fd, restore->overlay[i], 0);
}
