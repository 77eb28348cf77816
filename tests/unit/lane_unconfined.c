/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* For trees with sanitizers, which do not live with a filter of system calls: only what confine() does besides. */
#include "blkd/confine.h"

#include <errno.h>
#include <liburing.h>
#include <sys/syscall.h>
#include <unistd.h>

int confine(struct io_uring *ring)
{
	return syscall(SYS_io_uring_register, ring->ring_fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0) < 0 ? -errno
													: 0;
}
