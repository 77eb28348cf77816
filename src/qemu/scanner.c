/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The thread that looks at what the guest uses (activity/scan.h). There is none until somebody asks for
 * it; then it stays, and sleeps while the scan is off. It touches no guest RAM, and is never stopped
 * with the others.
 */
#include "qemu/agent.h"

#include "activity/scan.h"
#include "os/os.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define FREEZE_MS                                                                                       \
	5 /* a thread that does not stop sooner is not worth waiting for: the guest stands meanwhile */
#define ARRIVING_US 100000u /* how often is looked whether the guest has come */

_Static_assert(ACTIVITY_CLASSES == VM_STATS_CLASSES && SCAN_SOURCES == VM_STATS_SCAN_SOURCES &&
		       SCAN_WINDOWS == VM_STATS_WINDOWS && SCAN_UNKNOWN == UINT64_MAX,
	       "the layout of the statistics");

static struct {
	struct agent *agent;
	struct scan *_Atomic scan; /* set once */
	_Atomic bool left;         /* scanner_leave */
	pthread_mutex_t lock;      /* protects the next */
	pthread_cond_t woken;
	bool wake;
} scanner = { .lock = PTHREAD_MUTEX_INITIALIZER };

/* The kernel's own I/O to guest RAM nobody can stop; it ends with the VM at the earliest. */
static int freeze(void *ctx)
{
	return agent_freeze_writers(ctx, FREEZE_MS);
}

static void thaw(void *ctx)
{
	(void)ctx;
	os_thaw();
}

static void publish(struct scan_stats *to, const struct scan_report *r)
{
	stat_set(&to->period_us_now, r->period_us);
	stat_set(&to->shortest_us_now, r->shortest_us);
	stat_set(&to->paused_now, r->paused);
	stat_set(&to->passes, r->passes);
	stat_set(&to->sampled, r->sampled);
	stat_set(&to->refaults, r->refaults);
	stat_set(&to->thin_now, r->thin);
	stat_set(&to->writes_seen_now, r->writes_seen);
	stat_set(&to->written, r->written);
	stat_set(&to->settled, r->settled);
	stat_set(&to->frozen_us, r->frozen_us);
	stat_set(&to->cpu_ns, r->cpu_ns);
	stat_set(&to->pass_cpu_ns_now, r->pass_cpu_ns);
	stat_set(&to->hold_max_us, r->hold_max_us);
	stat_set(&to->hold_max_cpu_us, r->hold_max_cpu_us);
	stat_set(&to->holds, r->holds);
	stat_set(&to->long_holds, r->long_holds);
	stat_set(&to->long_cpu_holds, r->long_cpu_holds);
	for (size_t i = 0; i < VM_STATS_CLASSES; i++)
		stat_set(&to->pages_now[i], r->pages[i]);
	for (size_t i = 0; i < VM_STATS_SCAN_SOURCES; i++) {
		stat_set(&to->by_source_now[i], r->by_source[i]);
		stat_set(&to->granularity_now[i], r->granularity_pages[i]);
	}
	for (size_t i = 0; i < VM_STATS_WINDOWS; i++)
		stat_set(&to->in_use_now[i], r->in_use[i]);
}

/* Until it is time, or somebody wakes us. */
static void rest(uint64_t us)
{
	struct timespec until;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += (time_t)(us / 1000000);
	until.tv_nsec += (long)(us % 1000000) * 1000;
	if (until.tv_nsec >= 1000000000) {
		until.tv_sec++;
		until.tv_nsec -= 1000000000;
	}
	pthread_mutex_lock(&scanner.lock);
	if (us == UINT64_MAX)
		while (!scanner.wake)
			pthread_cond_wait(&scanner.woken, &scanner.lock);
	else
		while (!scanner.wake && !pthread_cond_timedwait(&scanner.woken, &scanner.lock, &until))
			;
	scanner.wake = false;
	pthread_mutex_unlock(&scanner.lock);
}

static void *look(void *arg)
{
	struct scan *scan = arg;
	struct scan_report report;

	os_never_freeze((pid_t)syscall(SYS_gettid));
	for (;;) {
		/* Before it has run here nothing is in use, whatever the mover writes. */
		uint64_t us = incoming_may_run(scanner.agent) ? scan_step(scan) : ARRIVING_US;

		scan_get_report(scan, &report);
		publish(&scanner.agent->stats->scan, &report);
		rest(us);
	}
	return NULL;
}

static int start_thread(struct scan *scan)
{
	pthread_condattr_t attributes;

	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(&scanner.woken, &attributes);
	pthread_condattr_destroy(&attributes);
	return agent_start_thread("latent-scan", look, scan, true);
}

static int start(struct agent *a)
{
	struct scan_freezer freezer = { freeze, thaw, a };
	struct scan *scan;
	int r = scan_create(a->ram, &freezer, &scan);

	if (r)
		return r;
	scanner.agent = a;
	r = start_thread(scan);
	if (r)
		scan_destroy(scan);
	else
		scanner.scan = scan;
	return r;
}

static void wake(void)
{
	pthread_mutex_lock(&scanner.lock);
	scanner.wake = true;
	pthread_cond_signal(&scanner.woken);
	pthread_mutex_unlock(&scanner.lock);
}

int scanner_set(struct agent *a, uint64_t period_us)
{
	int r;

	if (period_us && (period_us < SCAN_PERIOD_MIN_US || period_us > SCAN_PERIOD_MAX_US))
		return -EINVAL;
	if (scanner.left)
		return period_us ? -EBUSY : 0;
	r = scanner.scan || !period_us ? 0 : start(a);
	if (r || !scanner.scan)
		return r;
	scan_set_period(scanner.scan, period_us);
	stat_set(&a->stats->scan.period_us_now, period_us);
	wake();
	return 0;
}

uint64_t scanner_shortest_us(void)
{
	struct scan_report report;

	if (!scanner.scan || scanner.left)
		return 0;
	scan_get_report(scanner.scan, &report);
	return report.period_us ? report.shortest_us : 0;
}

static void stand_by(enum scan_other other, uint64_t pass_us)
{
	if (!scanner.scan || scanner.left)
		return;
	scan_set_migration_pass(scanner.scan, pass_us);
	scan_yield(scanner.scan, other);
	wake();
}

void scanner_yield(bool yield)
{
	stand_by(yield ? SCAN_YIELDS : SCAN_ALONE, 0);
}

void scanner_accompany(uint64_t pass_us)
{
	stand_by(SCAN_BESIDE, pass_us);
}

void scanner_leave(void)
{
	if (scanner.left)
		return;
	scanner.left = true;
	if (!scanner.scan)
		return;
	scan_yield(scanner.scan, SCAN_YIELDS);
	scan_set_period(scanner.scan, 0);
	agent_say("what the guest uses is not looked at any more: QEMU watches guest RAM by itself");
}
