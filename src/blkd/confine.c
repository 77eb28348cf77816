/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "blkd/confine.h"

#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/capability.h>
#include <sched.h>
#include <seccomp.h>
#include <stddef.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* ---- what it can see ------------------------------------------------------------------------------- */

/* An empty file system, and nothing else. */
static int leave_files(void)
{
	if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
	    mount("none", "/proc", "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=4k") ||
	    chdir("/proc") || syscall(SYS_pivot_root, ".", ".") || umount2(".", MNT_DETACH))
		return -errno;
	return chdir("/") ? -errno : 0;
}

/* Who may not have namespaces (a container, a sysctl) still has all the rest. */
static void leave_namespaces(void)
{
	if (!unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS) ||
	    !unshare(CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS))
		(void)leave_files();
}

/* ---- what it may do -------------------------------------------------------------------------------- */

static int drop_capabilities(void)
{
	struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct none[2] = { 0 };

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		return -errno;
	for (int cap = 0; cap <= CAP_LAST_CAP; cap++)
		(void)prctl(PR_CAPBSET_DROP, cap, 0, 0, 0); /* who may not has none to drop */
	(void)prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
	return syscall(SYS_capset, &header, none) ? -errno : 0;
}

/* liburing 2.3 has these calls in its header, but not in its library. */
static int ring_register(struct io_uring *ring, unsigned op, void *argument, unsigned count)
{
	return syscall(SYS_io_uring_register, ring->ring_fd, op, argument, count) < 0 ? -errno : 0;
}

static int restrict_ring(struct io_uring *ring)
{
	static const uint8_t ops[] = { IORING_OP_READV,     IORING_OP_WRITEV,   IORING_OP_FSYNC,
				       IORING_OP_FALLOCATE, IORING_OP_POLL_ADD, IORING_OP_ASYNC_CANCEL };
	enum { OPS = sizeof ops };
	struct io_uring_restriction r[OPS + 3];

	memset(r, 0, sizeof r);
	for (size_t i = 0; i < OPS; i++) {
		r[i].opcode = IORING_RESTRICTION_SQE_OP;
		r[i].sqe_op = ops[i];
	}
	r[OPS].opcode = IORING_RESTRICTION_REGISTER_OP;
	r[OPS].register_op = IORING_REGISTER_IOWQ_AFF;
	r[OPS + 1].opcode = IORING_RESTRICTION_REGISTER_OP;
	r[OPS + 1].register_op = IORING_REGISTER_ENABLE_RINGS;
	r[OPS + 2].opcode = IORING_RESTRICTION_SQE_FLAGS_ALLOWED;
	return ring_register(ring, IORING_REGISTER_RESTRICTIONS, r, OPS + 3);
}

static const int allowed[] = {
	SCMP_SYS(io_uring_enter),
	SCMP_SYS(io_uring_register),
	/* windows */
	SCMP_SYS(mmap),
	SCMP_SYS(munmap),
	SCMP_SYS(mprotect),
	SCMP_SYS(madvise),
	SCMP_SYS(mremap),
	SCMP_SYS(brk),
	SCMP_SYS(getcpu),
	SCMP_SYS(gettid),
	SCMP_SYS(getpid),
	SCMP_SYS(sched_setaffinity),
	SCMP_SYS(sched_getaffinity),
	SCMP_SYS(clock_gettime),
	/* guest memory, kicks, messages */
	SCMP_SYS(pread64),
	SCMP_SYS(pwrite64),
	SCMP_SYS(preadv2),
	SCMP_SYS(pwritev2),
	SCMP_SYS(read),
	SCMP_SYS(write),
	SCMP_SYS(recvmsg),
	SCMP_SYS(sendmsg),
	SCMP_SYS(close),
	SCMP_SYS(fstat),
	SCMP_SYS(newfstatat), /* fstat(3), as glibc makes it */
	SCMP_SYS(fstatfs),
	SCMP_SYS(memfd_create),
	SCMP_SYS(ftruncate),
	/* the process itself */
	SCMP_SYS(sysinfo), /* qsort(3) asks how much memory there is */
	SCMP_SYS(futex),
	SCMP_SYS(restart_syscall),
	SCMP_SYS(rt_sigaction),
	SCMP_SYS(rt_sigprocmask),
	SCMP_SYS(rt_sigreturn),
	SCMP_SYS(tgkill),
	SCMP_SYS(exit),
	SCMP_SYS(exit_group),
};

static const unsigned fcntls[] = { F_GETFL, F_SETFL, F_ADD_SEALS };

static int filter_calls(void)
{
	scmp_filter_ctx filter = seccomp_init(SCMP_ACT_KILL_PROCESS);
	int r = filter ? 0 : -ENOMEM;

	for (size_t i = 0; !r && i < sizeof allowed / sizeof allowed[0]; i++)
		r = seccomp_rule_add(filter, SCMP_ACT_ALLOW, allowed[i], 0);
	for (size_t i = 0; !r && i < sizeof fcntls / sizeof fcntls[0]; i++)
		r = seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(fcntl), 1,
				     SCMP_A1(SCMP_CMP_EQ, fcntls[i], 0));
	if (!r)
		r = seccomp_load(filter);
	seccomp_release(filter);
	return r;
}

int confine(struct io_uring *ring)
{
	int r;

	leave_namespaces();
	r = drop_capabilities();
	if (!r)
		r = restrict_ring(ring);
	if (!r)
		r = ring_register(ring, IORING_REGISTER_ENABLE_RINGS, NULL, 0);
	return r ? r : filter_calls();
}
