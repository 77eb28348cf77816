/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Between os_freeze and os_thaw nothing here may allocate or take a lock: a stopped thread may hold it.
 * Hence system calls alone.
 */
#include "os/os.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define THREADS 2048
#define POLL_NS 50000
#define SPARED 16
#define IO_WORKER 0x10u
#define USER_WORKER 0x4000u

static struct {
	_Atomic uint32_t frozen; /* 1: who gets the signal stops until it is 0 */
	_Atomic uint32_t parked;
	pid_t threads[THREADS]; /* that got the signal */
	uint32_t count;
	_Atomic pid_t spared[SPARED]; /* of os_never_freeze; 0: free */
} freezing;

/* getdents64(2) */
struct dirent64_raw {
	uint64_t ino;
	int64_t off;
	unsigned short bytes;
	unsigned char type;
	char name[];
};

static void park(int signal)
{
	int error = errno;

	(void)signal;
	freezing.parked++;
	while (freezing.frozen)
		syscall(SYS_futex, &freezing.frozen, FUTEX_WAIT_PRIVATE, 1, NULL, NULL, 0);
	freezing.parked--;
	errno = error;
}

static unsigned long number(const char *text)
{
	unsigned long n = 0;

	while (*text >= '0' && *text <= '9')
		n = n * 10 + (unsigned long)(*text++ - '0');
	return n;
}

void os_never_freeze(pid_t tid)
{
	for (size_t i = 0; i < SPARED; i++) {
		pid_t none = 0;

		if (atomic_compare_exchange_strong(&freezing.spared[i], &none, tid))
			return;
	}
}

void os_may_freeze(pid_t tid)
{
	for (size_t i = 0; i < SPARED; i++) {
		pid_t its = tid;

		(void)atomic_compare_exchange_strong(&freezing.spared[i], &its, 0);
	}
}

static bool is_spared(pid_t tid)
{
	for (size_t i = 0; i < SPARED; i++)
		if (freezing.spared[i] == tid)
			return true;
	return false;
}

/* proc_pid_stat(5): behind the name, which may contain anything, the seventh. */
static unsigned long flags_of(const char *stat)
{
	const char *at = strrchr(stat, ')');

	for (unsigned field = 0; at && field < 7; field++)
		at = strchr(at + 1, ' ');
	return at ? number(at + 1) : 0;
}

/*
 * A thread of the kernel's that works for this process (vhost, io_uring, since Linux 6.13 KVM's recovery of huge
 * pages): it is listed among ours, and takes no signal. include/linux/sched.h: PF_IO_WORKER, PF_USER_WORKER.
 */
static bool is_kernel_worker(int tasks, const char *name, pid_t tid)
{
	char path[32], stat[256];
	void *robust = NULL;
	size_t bytes;
	long n;
	int fd;

	/* The C library gives each thread such a list before anything else: a cheap question, that most end with. */
	if (!syscall(SYS_get_robust_list, tid, &robust, &bytes) && robust)
		return false;
	stpcpy(stpncpy(path, name, sizeof path - sizeof "/stat"), "/stat");
	fd = (int)syscall(SYS_openat, tasks, path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	n = syscall(SYS_read, fd, stat, sizeof stat - 1);
	syscall(SYS_close, fd);
	stat[n > 0 ? n : 0] = '\0';
	return flags_of(stat) & (IO_WORKER | USER_WORKER);
}

static bool has_signal(pid_t tid)
{
	for (uint32_t i = 0; i < freezing.count; i++)
		if (freezing.threads[i] == tid)
			return true;
	return false;
}

struct round {
	uint32_t alive; /* threads that have the signal, and live */
	uint32_t fresh; /* threads that had not got it before */
};

static int visit(pid_t tid, int signal, struct round *round)
{
	if (has_signal(tid)) {
		round->alive++;
		return 0;
	}
	if (freezing.count == THREADS)
		return -EAGAIN;
	if (syscall(SYS_tgkill, getpid(), tid, signal))
		return errno == ESRCH ? 0 : -errno;
	freezing.threads[freezing.count++] = tid;
	round->fresh++;
	return 0;
}

/* One look at all threads; the signal to those that have not had it. */
static int look_round(int tasks, int signal, struct round *round)
{
	char entries[4096] __attribute__((aligned(8)));
	pid_t self = (pid_t)syscall(SYS_gettid);
	long n;

	*round = (struct round){ 0 };
	if (lseek(tasks, 0, SEEK_SET))
		return -errno;
	while ((n = syscall(SYS_getdents64, tasks, entries, sizeof entries)) > 0) {
		for (long at = 0; at < n;) {
			const struct dirent64_raw *entry = (const void *)(entries + at);
			pid_t tid = (pid_t)number(entry->name);
			int r = 0;

			if (tid && tid != self && !is_spared(tid) &&
			    (has_signal(tid) || !is_kernel_worker(tasks, entry->name, tid)))
				r = visit(tid, signal, round);
			if (r)
				return r;
			at += entry->bytes;
		}
	}
	return n ? -errno : 0;
}

static int stop_all(int tasks, int signal, unsigned timeout_ms)
{
	uint64_t until_ms = os_now_us() / 1000 + timeout_ms;
	struct timespec pause = { 0, POLL_NS };
	struct round round;

	for (;;) {
		int r = look_round(tasks, signal, &round);

		if (r)
			return r;
		if (!round.fresh && freezing.parked == round.alive)
			return 0;
		if (os_now_us() / 1000 > until_ms)
			return -ETIMEDOUT;
		syscall(SYS_nanosleep, &pause, NULL);
	}
}

int os_freeze(int signal, unsigned timeout_ms)
{
	struct sigaction action = { .sa_handler = park, .sa_flags = SA_RESTART };
	int tasks = (int)syscall(SYS_openat, AT_FDCWD, "/proc/self/task", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	int r = tasks < 0 ? -errno : 0;

	sigfillset(&action.sa_mask);
	sigdelset(&action.sa_mask, SIGBUS);
	if (!r && sigaction(signal, &action, NULL))
		r = -errno;
	freezing.count = 0;
	freezing.frozen = 1;
	if (!r)
		r = stop_all(tasks, signal, timeout_ms);
	if (tasks >= 0)
		syscall(SYS_close, tasks);
	if (r)
		os_thaw();
	return r;
}

void os_thaw(void)
{
	struct timespec pause = { 0, POLL_NS };

	freezing.frozen = 0;
	syscall(SYS_futex, &freezing.frozen, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
	while (freezing.parked) /* the next freeze must not meet those of this one */
		syscall(SYS_nanosleep, &pause, NULL);
}
