/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "os/os.h"

#include <dirent.h>
#include <errno.h>
#include <sched.h>
#include <stdlib.h>

int os_cpu(void) { return sched_getcpu(); }

int os_bind_to_cpu(int cpu)
{
	cpu_set_t set;

	if (cpu < 0 || cpu >= CPU_SETSIZE)
		return -EINVAL;
	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	return sched_setaffinity(0, sizeof set, &set) ? -errno : 0;
}

static bool is_bound(pid_t tid, int cpu)
{
	cpu_set_t set;

	if (sched_getaffinity(tid, sizeof set, &set))
		return errno == ESRCH; /* it has ended */
	return CPU_COUNT(&set) == 1 && CPU_ISSET(cpu, &set);
}

int os_all_bound_to_cpu(int cpu)
{
	DIR *tasks = opendir("/proc/self/task");
	struct dirent *task;
	bool all = true;

	if (!tasks)
		return -errno;
	while (all && (task = readdir(tasks)))
		all = task->d_name[0] == '.' || is_bound((pid_t)strtol(task->d_name, NULL, 10), cpu);
	closedir(tasks);
	return all ? 0 : -EXDEV;
}
