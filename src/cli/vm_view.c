/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "cli/vm_view.h"

#include "cli/cli.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

static int open_stats(const char *path);
static void check_stats(struct vm_stats *stats);

#define ERRNO_MAX 4095

int vm_view_open(const char *root, const char *name, struct vm_view *ret_view)
{
	struct vm_view view = { .stats_fd = -1 };
	char path[VMDIR_PATH_BYTES];
	int r;

	if (!vmdir_name_ok(name) || !vmdir_is_live(root, name))
		return -ENOENT;
	r = vmdir_path(root, name, VMDIR_STATS, path);
	if (!r)
		r = view.stats_fd = open_stats(path);
	if (r >= 0)
		r = vm_view_update(&view);
	if (r) {
		vm_view_close(&view);
		return r;
	}
	snprintf(view.root, sizeof view.root, "%s", root);
	snprintf(view.name, sizeof view.name, "%s", name);
	*ret_view = view;
	return 0;
}

void vm_view_close(struct vm_view *view)
{
	if (view->stats_fd >= 0)
		close(view->stats_fd);
	view->stats_fd = -1;
}

/* Another VM has its name: the file that is open here has none any more. */
static bool is_replaced(const struct vm_view *view)
{
	struct stat st;

	return fstat(view->stats_fd, &st) || !st.st_nlink;
}

bool vm_view_is_live(const struct vm_view *view)
{
	return vmdir_is_live(view->root, view->name) && !is_replaced(view);
}

/* Not mapped: who writes the file may cut it at any moment. */
int vm_view_update(struct vm_view *view)
{
	struct vm_stats stats;
	ssize_t n = pread(view->stats_fd, &stats, sizeof stats, 0);

	if (n < 0)
		return -errno;
	/* Zeros: the VM is being started this moment. */
	if (n != sizeof stats ||
	    (stats.magic && (stats.magic != VM_STATS_MAGIC || stats.version != VM_STATS_VERSION)))
		return -EPROTO;
	check_stats(&stats);
	memcpy(&view->stats, &stats, sizeof stats);
	return 0;
}

int vm_view_find(const char *name, struct vm_view *ret_view)
{
	char root[VMDIR_PATH_BYTES], why[VMDIR_WHY_BYTES];
	int r = vmdir_root(false, root, why);

	if (r && r != -ENOENT)
		return cli_fail(CLI_RUN_DIR, "%s", why);
	if (!r)
		r = vm_view_open(root, name, ret_view);
	if (r == -ENOENT)
		return cli_fail(CLI_NO_VM, "no VM named '%.80s' is running (see latent ps)", name);
	if (r == -EPROTO)
		return cli_fail(CLI_NO_ANSWER, "%s was started by another version of Latent", name);
	return r ? cli_fail(CLI_RUN_DIR, "the statistics of %s cannot be read: %s", name, strerror(-r))
		 : 0;
}

static int ask_over(int control, enum control_op op, const char *path, int fd,
		    struct control_reply *ret_reply);

int vm_view_ask(const struct vm_view *view, enum control_op op, const char *path, unsigned timeout_ms,
		struct control_reply *ret_reply)
{
	return vm_view_give(view, op, path, -1, timeout_ms, ret_reply);
}

int vm_view_give(const struct vm_view *view, enum control_op op, const char *path, int fd,
		 unsigned timeout_ms, struct control_reply *ret_reply)
{
	int control = vm_view_connect(view, timeout_ms), r;

	if (control < 0)
		return control;
	r = ask_over(control, op, path, fd, ret_reply);
	close(control);
	return r;
}

int vm_view_status(const struct vm_view *view, int asked, const struct control_reply *reply)
{
	if (asked)
		return cli_fail(CLI_NO_ANSWER, "%s: the agent does not answer: %s", view->name,
				strerror(-asked));
	if (reply->error)
		return cli_fail(CLI_NO_ANSWER, "%s: %s", view->name,
				reply->text[0] ? reply->text : strerror(-reply->error));
	return CLI_OK;
}

int vm_view_connect(const struct vm_view *view, unsigned timeout_ms)
{
	char path[VMDIR_PATH_BYTES];
	int r = vmdir_path(view->root, view->name, VMDIR_CONTROL, path);

	return r ? r : vmdir_connect(path, SOCK_SEQPACKET, timeout_ms);
}

int vm_view_ask_over(int control, enum control_op op, const char *path, struct control_reply *ret_reply)
{
	return ask_over(control, op, path, -1, ret_reply);
}

/* With the descriptor, if it is one. */
static ssize_t send_request(int control, struct control_request *request, int fd)
{
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof fd)];
	} rights = { .header = { .cmsg_len = CMSG_LEN(sizeof fd),
				 .cmsg_level = SOL_SOCKET,
				 .cmsg_type = SCM_RIGHTS } };
	struct iovec iov = { request, sizeof *request };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1 };

	if (fd >= 0) {
		memcpy(CMSG_DATA(&rights.header), &fd, sizeof fd);
		message.msg_control = &rights;
		message.msg_controllen = sizeof rights;
	}
	return sendmsg(control, &message, MSG_NOSIGNAL);
}

static int ask_over(int control, enum control_op op, const char *path, int fd,
		    struct control_reply *ret_reply)
{
	struct control_request request = {
		.magic = CONTROL_MAGIC,
		.version = CONTROL_VERSION,
		.op = (uint32_t)op,
	};
	struct control_reply reply;
	ssize_t n;

	if (path && snprintf(request.path, sizeof request.path, "%s", path) >= (int)sizeof request.path)
		return -ENAMETOOLONG;
	n = send_request(control, &request, fd);
	if (n >= 0)
		n = recv(control, &reply, sizeof reply, 0);
	if (n < 0)
		return errno == EAGAIN ? -ETIMEDOUT : -errno;
	if (n != sizeof reply || reply.magic != CONTROL_MAGIC || reply.version != CONTROL_VERSION)
		return n ? -EPROTO : -ECONNRESET;
	reply.text[sizeof reply.text - 1] = 0;
	cli_make_plain(reply.text);
	if (reply.error > 0 || reply.error < -ERRNO_MAX)
		reply.error = -EPROTO;
	*ret_reply = reply;
	return 0;
}

uint64_t vm_view_clean_pages(const struct vm_stats *stats)
{
	uint64_t overlay = stat_get(&stats->pages_overlay_now),
		 copied = stat_get(&stats->pages_private_now);

	/* Read at two moments. */
	return overlay > copied ? overlay - copied : 0;
}

static int open_stats(const char *path)
{
	struct stat st;
	int fd = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC); /* it may be a pipe */

	if (fd < 0)
		return -errno;
	if (!fstat(fd, &st) && S_ISREG(st.st_mode) && st.st_size == sizeof(struct vm_stats))
		return fd;
	close(fd);
	return -EPROTO;
}

static void make_text(char *text, size_t bytes)
{
	text[bytes - 1] = 0;
	cli_make_plain(text);
}

static void check_stats(struct vm_stats *stats)
{
	make_text(stats->name, sizeof stats->name);
	make_text(stats->agent_version, sizeof stats->agent_version);
	make_text(stats->excluded_by, sizeof stats->excluded_by);
	make_text(stats->message, sizeof stats->message);
	make_text(stats->source, sizeof stats->source);
	make_text(stats->source_trouble, sizeof stats->source_trouble);
	make_text(stats->cwd, sizeof stats->cwd);
	if (stats->rest_state >= REST_STATES)
		stats->rest_state = REST_FAILED;
	if (stats->volume_count > VM_STATS_VOLUMES)
		stats->volume_count = VM_STATS_VOLUMES;
	for (uint32_t i = 0; i < VM_STATS_VOLUMES; i++) {
		struct volume_stats *volume = &stats->volumes[i];

		make_text(volume->path, sizeof volume->path);
		if (volume->state >= VOLUME_STATES)
			volume->state = VOLUME_NO_LEASE;
	}
}
