/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* latent reclaim --store: a file that takes what is given back, and that nobody finds afterwards. */
#include "cli/cli.h"
#include "cli/reclaim.h"
#include "os/os.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define ANSWER_TIMEOUT_MS 10000

/* A descriptor of a file that has no name any more, or an exit status below zero. */
static int make_file(const char *path)
{
	int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);

	if (fd < 0)
		return -cli_fail(CLI_SYSTEM, "the store %.300s cannot be made: %s", path,
				 errno == EEXIST ? "there is a file already, and it has to be a new one"
						 : strerror(errno));
	if (unlink(path)) {
		int error = errno;

		close(fd);
		return -cli_fail(CLI_SYSTEM, "the store %.300s cannot be removed: %s", path,
				 strerror(error));
	}
	if (os_file_is_in_memory(fd)) {
		close(fd);
		return -cli_fail(CLI_SYSTEM,
				 "%.300s would be in the host's memory: choose a place on a disk", path);
	}
	return fd;
}

static int give(const struct vm_view *view, int fd, uint64_t most_bytes)
{
	struct control_reply reply;
	char text[24];
	int r;

	snprintf(text, sizeof text, "%" PRIu64, most_bytes);
	r = vm_view_give(view, CONTROL_RECLAIM_STORE, text, fd, ANSWER_TIMEOUT_MS, &reply);
	return vm_view_status(view, r, &reply);
}

int reclaim_give_store(const struct vm_view *view, const char *path, uint64_t most_bytes)
{
	int fd = make_file(path), status;

	if (fd < 0)
		return -fd;
	status = give(view, fd, most_bytes ? most_bytes : view->stats.ram_bytes);
	close(fd);
	return status;
}
