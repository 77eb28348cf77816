/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * After a restore. The guest runs, or stands as it was asked to, or it is a spare: all is done but the resume, and
 * a keeper holds the other end of a socket. A spare that is taken gets its name, tells the keeper so, and depends
 * on him no more; one whose keeper is gone quits.
 */
#include "qemu/agent.h"

#include "os/os.h"
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

static void report(struct agent *a, enum agent_report_kind kind)
{
	struct agent_report report = { .kind = kind, .pid = (uint32_t)getpid() };
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

static int resume(struct agent *a, struct pause *p)
{
	int r = pause_resume(p);

	if (r)
		agent_say("the restored guest could not be continued (%s): use `cont`", strerror(-r));
	resume_note(a, p);
	return r;
}

void resume_restored(struct agent *a, struct pause *p)
{
	if (!p || !pause_is_loaded(p))
		return; /* it has been said; QEMU ends by itself */
	set_step(a, RESTORE_STATE, os_now_us());
	if (a->config.restore.then == RESTORE_THEN_WAIT) {
		prefault(a);
		a->stats->is_spare = 1;
		report(a, REPORT_READY);
		return;
	}
	if (a->config.restore.then == RESTORE_THEN_RUN && resume(a, p))
		return;
	report(a, REPORT_READY);
	end_reports(a);
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
	a->stats->is_spare = 0;
	reply->error = resume(a, p);
	if (reply->error)
		snprintf(reply->text, sizeof reply->text, "QEMU could not let it run");
	report(a, REPORT_TAKEN);
	end_reports(a);
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
