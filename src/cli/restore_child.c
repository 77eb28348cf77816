/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* VMs that are restored in the background: a child becomes QEMU, and its agent reports. */
#include "cli/cli.h"
#include "cli/restore.h"
#include "cli/restore_steps.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define END_MS 5000
#define LOG "log"

static _Noreturn void become(const struct restore_request *request, int log_fd)
{
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);

	signal(SIGINT, SIG_DFL);
	signal(SIGTERM, SIG_DFL);
	if (setsid() < 0 || null < 0 || dup2(null, STDIN_FILENO) < 0 || dup2(log_fd, STDOUT_FILENO) < 0 ||
	    dup2(log_fd, STDERR_FILENO) < 0)
		_exit(CLI_SYSTEM);
	_exit(restore_become(request));
}

/* It has no name yet: the VM's directory is not there. */
static int open_log(const char *root)
{
	int fd = open(root, O_TMPFILE | O_RDWR | O_APPEND | O_CLOEXEC, 0600);

	return fd >= 0 ? fd : open("/dev/null", O_RDWR | O_CLOEXEC);
}

int restored_start(struct restore_request *request, const char *root, struct restored *ret_vm)
{
	struct restored vm = { .attempt = request->attempt, .log_fd = open_log(root) };
	int pair[2];

	snprintf(vm.name, sizeof vm.name, "%s", request->name);
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
		return cli_fail(CLI_SYSTEM, "no socket: %s", strerror(errno));
	vm.report_fd = pair[0];
	request->report_fd = pair[1];
	vm.child = fork();
	if (!vm.child) {
		(void)fcntl(pair[1], F_SETFD, 0);
		become(request, vm.log_fd);
	}
	close(pair[1]);
	if (vm.child < 0) {
		restored_forget(&vm);
		return cli_fail(CLI_SYSTEM, "no process: %s", strerror(errno));
	}
	*ret_vm = vm;
	return CLI_OK;
}

int restored_read(struct restored *vm)
{
	struct agent_report report;
	ssize_t n = recv(vm->report_fd, &report, sizeof report, MSG_DONTWAIT);

	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return -EAGAIN;
	if (n != sizeof report)
		return -EPIPE;
	report.name[sizeof report.name - 1] = '\0';
	cli_make_plain(report.name);
	vm->vmm = report.pid > 1 && report.pid <= INT_MAX ? (pid_t)report.pid : 0; /* it will be killed if others fail */
	vm->report = report;
	vm->ready = true;
	return (int)report.kind;
}

void restored_keep_log(const struct restored *vm, const char *root)
{
	char path[VMDIR_PATH_BYTES], from[32];

	snprintf(from, sizeof from, "/proc/self/fd/%d", vm->log_fd);
	if (!vmdir_path(root, vm->name, LOG, path))
		(void)linkat(AT_FDCWD, from, AT_FDCWD, path, AT_SYMLINK_FOLLOW);
}

void restored_last_words(const struct restored *vm, char *text, size_t bytes)
{
	off_t end = lseek(vm->log_fd, 0, SEEK_END);
	off_t from = end > (off_t)bytes - 1 ? end - (off_t)bytes + 1 : 0;
	ssize_t n = pread(vm->log_fd, text, bytes - 1, from);
	char *line;

	text[n > 0 ? n : 0] = '\0';
	while (n > 0 && text[n - 1] == '\n')
		text[--n] = '\0';
	line = strrchr(text, '\n');
	if (line)
		memmove(text, line + 1, strlen(line));
	if (!text[0])
		snprintf(text, bytes, "it ended without a word");
}

static bool has_ended(pid_t pid)
{
	return waitpid(pid, NULL, WNOHANG) == pid || (kill(pid, 0) && errno == ESRCH);
}

void restored_end(struct restored *vm, const struct manifest *m, const char *disks_dir)
{
	pid_t pid = vm->vmm ? vm->vmm : vm->child;
	int waited_ms = 0;

	(void)kill(pid, SIGTERM);
	while (!has_ended(pid) && waited_ms++ < END_MS)
		usleep(1000);
	if (waited_ms > END_MS)
		(void)kill(pid, SIGKILL);
	(void)waitpid(vm->child, NULL, 0);
	restore_remove_overlays(m, disks_dir, vm->name, vm->attempt);
	restored_forget(vm);
}

void restored_forget(struct restored *vm)
{
	if (vm->report_fd >= 0)
		close(vm->report_fd);
	if (vm->log_fd >= 0)
		close(vm->log_fd);
	*vm = (struct restored){ .report_fd = -1, .log_fd = -1 };
}

struct json_object *restored_to_json(const struct agent_report *report)
{
	struct json_object *json = json_object_new_object();

	json_object_object_add(json, "name", json_object_new_string(report->name));
	json_object_object_add(json, "pid", json_object_new_uint64(report->pid));
	json_object_object_add(json, "steps", restore_steps_to_json(report->step_us));
	return json;
}
