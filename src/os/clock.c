/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "os/os.h"

#include <time.h>

uint64_t os_now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}
