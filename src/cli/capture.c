/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "cli/capture.h"

#include "os/os.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

static _Noreturn void become(const char *const *argv, int inherit_fd, int output);
static char *read_until(int fd, size_t max_bytes, unsigned timeout_s);

char *capture(const char *const *argv, int inherit_fd, size_t max_bytes, unsigned timeout_s,
	      int max_status)
{
	int ends[2], status = -1;
	char *text = NULL;
	pid_t child;

	if (pipe2(ends, O_CLOEXEC))
		return NULL;
	child = fork();
	if (!child)
		become(argv, inherit_fd, ends[1]);
	close(ends[1]);
	if (child > 0) {
		text = read_until(ends[0], max_bytes, timeout_s);
		if (!text)
			kill(child, SIGKILL);
		while (waitpid(child, &status, 0) < 0 && errno == EINTR)
			;
	}
	close(ends[0]);
	if (text && WIFEXITED(status) && WEXITSTATUS(status) <= max_status)
		return text;
	free(text);
	return NULL;
}

static _Noreturn void become(const char *const *argv, int inherit_fd, int output)
{
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);

	if (null >= 0 && dup2(null, STDIN_FILENO) >= 0 && dup2(null, STDERR_FILENO) >= 0 &&
	    dup2(output, STDOUT_FILENO) >= 0 && (inherit_fd < 0 || !fcntl(inherit_fd, F_SETFD, 0)))
		execvp(argv[0], (char *const *)argv);
	_exit(127);
}

static char *read_until(int fd, size_t max_bytes, unsigned timeout_s)
{
	int64_t deadline_ms = (int64_t)(os_now_us() / 1000) + (int64_t)timeout_s * 1000;
	char *text = malloc(max_bytes + 1);
	size_t used = 0;

	while (text && used < max_bytes) {
		struct pollfd end = { .fd = fd, .events = POLLIN };
		int64_t left_ms = deadline_ms - (int64_t)(os_now_us() / 1000);
		ssize_t n = 0;

		if (left_ms <= 0 || poll(&end, 1, (int)left_ms) <= 0)
			break;
		n = read(fd, text + used, max_bytes - used);
		if (!n) {
			text[used] = 0;
			return text;
		}
		if (n > 0)
			used += (size_t)n;
		else if (errno != EINTR)
			break;
	}
	free(text);
	return NULL;
}
