/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "cli/vm_tables.h"

#include "cli/cli.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define ANSWER_TIMEOUT_MS 5000

struct received {
	struct control_layout layout;
	int fds[RAM_BLOCKS];
	unsigned fd_count;
};

static void take_descriptors(struct msghdr *message, struct received *got)
{
	for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c; c = CMSG_NXTHDR(message, c)) {
		size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);

		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		for (size_t i = 0; i < count && got->fd_count < RAM_BLOCKS; i++)
			memcpy(&got->fds[got->fd_count++], CMSG_DATA(c) + i * sizeof(int), sizeof(int));
	}
}

/* More descriptors than there is room for the kernel closes. */
static int receive(int control, struct received *got)
{
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(RAM_BLOCKS * sizeof(int))];
	} rights;
	struct iovec iov = { &got->layout, sizeof got->layout };
	struct msghdr message = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &rights, .msg_controllen = sizeof rights
	};
	ssize_t n = recvmsg(control, &message, MSG_CMSG_CLOEXEC);

	if (n < 0)
		return errno == EAGAIN ? -ETIMEDOUT : -errno;
	take_descriptors(&message, got);
	if (n == 0)
		return -ECONNRESET;
	return n == (ssize_t)sizeof got->layout ? 0 : -EPROTO;
}

/* Not mapped, and never waited for: who has made it may cut it, or have made something else. */
static bool is_table(int fd, uint64_t pages)
{
	struct stat st;

	return pages && pages <= ENTRY_FILE_PAGES && !fstat(fd, &st) && S_ISREG(st.st_mode) &&
	       (uint64_t)st.st_size >= pages * sizeof(uint64_t);
}

static int check(struct received *got, struct vm_tables *tables)
{
	if (!got->layout.blocks || got->layout.blocks > RAM_BLOCKS ||
	    got->fd_count != got->layout.blocks)
		return -EPROTO;
	for (unsigned i = 0; i < got->fd_count; i++) {
		struct control_block *from = &got->layout.block[i];

		if (!is_table(got->fds[i], from->pages))
			return -EPROTO;
		from->name[sizeof from->name - 1] = '\0';
		cli_make_plain(from->name);
		tables->block[i] = (struct vm_table){ .pages = from->pages, .fd = got->fds[i] };
		memcpy(tables->block[i].name, from->name, sizeof from->name);
	}
	tables->blocks = got->fd_count;
	return 0;
}

static int take_tables(int control, struct vm_tables *ret_tables)
{
	struct received got = { .fd_count = 0 };
	struct vm_tables tables = { .blocks = 0 };
	int r = receive(control, &got);

	if (!r)
		r = check(&got, &tables);
	if (!r)
		*ret_tables = tables;
	else
		while (got.fd_count)
			close(got.fds[--got.fd_count]);
	return r;
}

int vm_tables_open(const struct vm_view *view, struct vm_tables *ret_tables)
{
	struct control_reply reply;
	int control = vm_view_connect(view, ANSWER_TIMEOUT_MS), r = control < 0 ? control : 0;

	if (!r)
		r = vm_view_ask_over(control, CONTROL_ENTRIES, NULL, &reply);
	if (!r && reply.error) {
		close(control);
		return cli_fail(CLI_NO_ANSWER, "%s: %s", view->name,
				reply.text[0] ? reply.text : strerror(-reply.error));
	}
	if (!r)
		r = take_tables(control, ret_tables);
	if (control >= 0)
		close(control);
	return r ? cli_fail(CLI_NO_ANSWER, "%s: the agent does not answer: %s", view->name, strerror(-r))
		 : CLI_OK;
}

void vm_tables_close(struct vm_tables *tables)
{
	while (tables->blocks)
		close(tables->block[--tables->blocks].fd);
}
