/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* Guest RAM as it is told to other processes: a struct control_layout and descriptors, over the control
 * socket. */
#include "qemu/agent.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

void layout_describe(const struct ram_block *block, struct control_block *to)
{
	snprintf(to->name, sizeof to->name, "%s", block->name);
	to->pages = block->pages;
	to->hva = (uintptr_t)block->hva;
	to->memfd_offset = block->memfd_offset;
}

int layout_send(int client, const struct control_layout *layout, const int *fds, size_t count)
{
	char control[CMSG_SPACE(LAYOUT_FDS * sizeof fds[0])] = { 0 };
	struct iovec iov = { (void *)(uintptr_t)layout, sizeof *layout };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control };
	struct cmsghdr *c;

	message.msg_controllen = CMSG_SPACE(count * sizeof fds[0]);
	c = CMSG_FIRSTHDR(&message);
	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(count * sizeof fds[0]);
	memcpy(CMSG_DATA(c), fds, count * sizeof fds[0]);
	/* Not the hooked one: this is the agent's own socket. */
	return agent_send(client, &message) == (ssize_t)sizeof *layout ? 0 : -EPIPE;
}

int layout_send_tables(struct agent *a, int client, bool with_memory)
{
	static struct control_layout layout; /* [range lock] */
	int fds[2 * RAM_BLOCKS], r;
	size_t count = 0;

	ram_lock(a->ram); /* until they are sent no block goes, and its descriptors with it */
	memset(&layout, 0, sizeof layout);
	for (unsigned i = 0; i < RAM_BLOCKS; i++) {
		const struct ram_block *b = ram_block_at(a->ram, i);

		if (!b)
			continue;
		layout_describe(b, &layout.block[layout.blocks++]);
		if (with_memory)
			fds[count++] = b->memfd;
		fds[count++] = b->entries_fd;
	}
	r = layout.blocks ? layout_send(client, &layout, fds, count) : -ENODEV;
	ram_unlock(a->ram);
	return r;
}
