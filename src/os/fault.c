/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "os/os.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* No errno values: the process is to be killed; from now on nothing can be written. */
enum { DEATH = 0x10000, FULL };

static struct {
	_Atomic uint32_t calls, nth;
	_Atomic int error;
	_Atomic uint32_t delay_ms;
} points[OS_FAULT_POINTS];

static _Atomic bool any_armed; /* the only thing looked at when no test runs */
static _Atomic bool full;      /* every OS_FAULT_WRITE fails */

static const char *const point_names[OS_FAULT_POINTS] = {
	[OS_FAULT_MAP_FILE] = "map_file",
	[OS_FAULT_MAP_BASE] = "map_base",
	[OS_FAULT_MARK] = "mark",
	[OS_FAULT_PUNCH] = "punch",
	[OS_FAULT_POPULATE] = "populate",
	[OS_FAULT_SETTLE_WRITE] = "settle_write",
	[OS_FAULT_UFFD] = "uffd",
	[OS_FAULT_REGISTER] = "register",
	[OS_FAULT_STORAGE_READ] = "storage_read",
	[OS_FAULT_WRITE] = "write",
	[OS_FAULT_FLUSH] = "flush",
	[OS_FAULT_SPARE_MEMORY] = "spare_memory",
	[OS_FAULT_WINDOW] = "window",
	[OS_FAULT_SAVE_STEP] = "save_step",
	[OS_FAULT_RESTORE_STEP] = "restore_step",
	[OS_FAULT_AGENT_STEP] = "agent_step",
	[OS_FAULT_PAGER_STEP] = "pager_step",
	[OS_FAULT_PAGER_MEMORY] = "pager_memory",
};

void os_fault_arm(enum os_fault_point point, uint32_t nth, int error)
{
	points[point].calls = 0;
	points[point].error = error;
	points[point].nth = nth;
	any_armed = true;
}

uint32_t os_fault_calls(enum os_fault_point point)
{
	return points[point].calls;
}

int os_fault(enum os_fault_point point)
{
	uint32_t delay_ms, call;

	if (!atomic_load_explicit(&any_armed, memory_order_relaxed))
		return 0;
	delay_ms = points[point].delay_ms;
	if (delay_ms) {
		struct timespec t = { delay_ms / 1000, (long)(delay_ms % 1000) * 1000000 };

		nanosleep(&t, NULL);
	}
	call = atomic_fetch_add(&points[point].calls, 1) + 1;
	if (point == OS_FAULT_WRITE && full)
		return -ENOSPC;
	if (call != points[point].nth)
		return 0;
	if (points[point].error == DEATH)
		raise(SIGKILL);
	if (points[point].error != FULL)
		return -points[point].error;
	full = true;
	return 0;
}

static int error_by_name(const char *name)
{
	static const struct {
		const char *name;
		int error;
	} errors[] = { { "ENOMEM", ENOMEM }, { "EAGAIN", EAGAIN }, { "EIO", EIO }, { "ENOSPC", ENOSPC }, { "EPERM", EPERM },
		      { "KILL", DEATH }, { "FULL", FULL } };

	for (size_t i = 0; i < sizeof errors / sizeof errors[0]; i++)
		if (!strcmp(errors[i].name, name))
			return errors[i].error;
	return 0;
}

/* False for anything but decimal digits: a mistyped fault must not be a test that tests nothing. */
static bool parse_number(const char *text, uint32_t *ret_number)
{
	unsigned long number;
	char *end;

	if (*text < '0' || *text > '9')
		return false;
	errno = 0;
	number = strtoul(text, &end, 10);
	if (errno || *end || number > UINT32_MAX)
		return false;
	*ret_number = (uint32_t)number;
	return true;
}

static int parse_one(char *text)
{
	char *what = strchr(text, ':'), *value = what ? strchr(what + 1, ':') : NULL;
	unsigned point = 0;
	uint32_t number;

	if (!value)
		return -EINVAL;
	*what++ = *value++ = '\0';
	while (point < OS_FAULT_POINTS && strcmp(point_names[point], text))
		point++;
	if (point == OS_FAULT_POINTS)
		return -EINVAL;
	if (!strcmp(what, "delay")) {
		if (!parse_number(value, &number))
			return -EINVAL;
		points[point].delay_ms = number;
		any_armed = true;
		return 0;
	}
	if (!error_by_name(value) || !parse_number(what, &number) || !number)
		return -EINVAL;
	os_fault_arm((enum os_fault_point)point, number, error_by_name(value));
	return 0;
}

int os_fault_parse(const char *text)
{
	char *copy = strdup(text), *save = NULL;
	int r = copy ? 0 : -ENOMEM;

	for (char *one = r ? NULL : strtok_r(copy, ",", &save); !r && one; one = strtok_r(NULL, ",", &save))
		r = parse_one(one);
	free(copy);
	return r;
}
