/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "cli/rest.h"

#include "cli/cli.h"
#include "cli/progress.h"
#include "os/os.h"
#include "snapshot/rest.h"
#include "vmdir/agent_config.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/ioprio.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define REPORT_US 200000
#define OWN_FDS 3u /* 0, 1 and 2; the sockets come next */

static struct {
	struct pollfd vm[REST_VMS]; /* fd -1: gone, or it does not want to wait for more */
	unsigned count;
	uint64_t begun_us, report_us;
	struct rest_progress progress;
} to;

/* ---- who is told ------------------------------------------------------------------------------- */

static void tell(enum rest_state state)
{
	struct rest_report report = { .magic = REST_MAGIC,
				      .state = state,
				      .begun_us = to.begun_us,
				      .pages_all = to.progress.pages_all,
				      .pages_now = to.progress.pages_now };

	for (unsigned i = 0; i < to.count; i++)
		if (to.vm[i].fd >= 0)
			(void)send(to.vm[i].fd, &report, sizeof report, MSG_DONTWAIT | MSG_NOSIGNAL);
	to.report_us = os_now_us() + REPORT_US;
}

/* Nobody says anything any more: what can be read there is the end. */
static bool is_wanted(void)
{
	bool wanted = false;

	(void)poll(to.vm, to.count, 0);
	for (unsigned i = 0; i < to.count; i++) {
		if (to.vm[i].fd >= 0 && to.vm[i].revents) {
			close(to.vm[i].fd);
			to.vm[i].fd = -1;
		}
		wanted = wanted || to.vm[i].fd >= 0;
	}
	return wanted;
}

static bool go_on(void *ctx)
{
	(void)ctx;
	if (os_now_us() >= to.report_us)
		tell(REST_LOADING);
	return is_wanted();
}

/* ---- the process ------------------------------------------------------------------------------- */

static void write_text(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);

	if (fd < 0)
		return;
	(void)!write(fd, text, strlen(text));
	close(fd);
}

/* Whatever is wanted by anybody else comes first: processor, storage, and memory. */
static void give_way(void)
{
	const struct sched_param param = { 0 };

	(void)setpriority(PRIO_PROCESS, 0, 19);
	(void)sched_setscheduler(0, SCHED_IDLE, &param);
	(void)syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_PRIO_VALUE(IOPRIO_CLASS_IDLE, 0));
	write_text("/proc/self/oom_score_adj", "1000");
}

/* Nobody's file, terminal or directory is kept in use. */
static bool let_go(const int *sockets, unsigned count)
{
	int null = open("/dev/null", O_RDWR | O_CLOEXEC), kept[REST_VMS];
	unsigned lowest = OWN_FDS + count;

	if (null < 0 || count > REST_VMS || chdir("/"))
		return false;
	for (unsigned i = 0; i < count; i++) { /* out of the way of the next step */
		kept[i] = fcntl(sockets[i], F_DUPFD_CLOEXEC, (int)lowest);
		if (kept[i] < 0)
			return false;
	}
	for (unsigned fd = 0; fd < OWN_FDS + count; fd++)
		if (dup2(fd < OWN_FDS ? null : kept[fd - OWN_FDS], (int)fd) < 0)
			return false;
	(void)close_range(lowest, UINT_MAX, 0);
	for (unsigned i = 0; i < count; i++)
		to.vm[i] = (struct pollfd){ .fd = (int)(OWN_FDS + i), .events = POLLIN };
	to.count = count;
	return true;
}

static enum rest_state load(const char *dir)
{
	char why[SNAPSHOT_WHY_BYTES];
	struct rest *rest;
	int r = rest_open(dir, &rest, why);

	if (r)
		return REST_FAILED;
	r = rest_load(rest, go_on, NULL, &to.progress);
	rest_close(rest);
	return !r ? REST_LOADED : r == -EINTR ? REST_STOPPED : r == -ENOMEM ? REST_NO_ROOM : REST_FAILED;
}

_Noreturn void rest_become(const char *dir, const int *sockets, unsigned count, uint64_t begun_us)
{
	char path[PATH_MAX];

	(void)signal(SIGINT, SIG_DFL);
	(void)signal(SIGTERM, SIG_DFL);
	(void)prctl(PR_SET_NAME, "latent-rest");
	to.begun_us = begun_us;
	if (progress_take_faults() || !realpath(dir, path) || !let_go(sockets, count))
		_exit(CLI_SYSTEM);
	give_way();
	tell(REST_LOADING);
	tell(load(path));
	_exit(CLI_OK);
}

void rest_start(const char *dir, const int *sockets, unsigned count, uint64_t begun_us)
{
	pid_t child = count ? fork() : 0;

	if (!count)
		return;
	if (!child) {
		(void)setsid();
		if (!fork())
			rest_become(dir, sockets, count, begun_us);
		_exit(CLI_OK);
	}
	if (child < 0)
		cli_say("the rest is not loaded before it is touched: no process (%s)", strerror(errno));
	else
		(void)waitpid(child, NULL, 0);
}
