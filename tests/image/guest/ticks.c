/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* What a guest notices of stalls. `ticks` measures by the guest's clock, which
 * stands still while the VM is stopped; `beat` lets the host measure by its own. */
#include "guest.h"

#include <stdio.h>
#include <time.h>
#include <unistd.h>

struct tick_args {
	uint64_t end_ns;
	uint64_t period_ns;
};

static int parse_args(int argc, char **argv, struct tick_args *ret_args)
{
	uint64_t seconds, period_ms;

	if (argc != 3 || parse_u64(argv[1], &seconds) != 0 || parse_u64(argv[2], &period_ms) != 0 ||
	    period_ms == 0)
		return -1;
	ret_args->end_ns = now_ns() + seconds * 1000000000u;
	ret_args->period_ns = period_ms * 1000000u;
	return 0;
}

static void sleep_ns(uint64_t ns)
{
	struct timespec time = { (time_t)(ns / 1000000000u), (long)(ns % 1000000000u) };

	nanosleep(&time, NULL);
}

int cmd_ticks(int argc, char **argv)
{
	struct tick_args args;
	uint64_t count = 0, late = 0, worst_ns = 0;

	if (parse_args(argc, argv, &args) != 0)
		return 2;
	for (uint64_t last_ns = now_ns(); last_ns < args.end_ns; count++) {
		sleep_ns(args.period_ns);
		uint64_t this_ns = now_ns();
		uint64_t gap_ns = this_ns - last_ns;
		if (gap_ns > worst_ns)
			worst_ns = gap_ns;
		if (gap_ns > 2 * args.period_ns)
			late++;
		last_ns = this_ns;
	}
	printf("ticks=%llu late=%llu worst_us=%llu\n", (unsigned long long)count,
	       (unsigned long long)late, (unsigned long long)(worst_ns / 1000));
	return 0;
}

int cmd_beat(int argc, char **argv)
{
	struct tick_args args;

	if (parse_args(argc, argv, &args) != 0)
		return 2;
	for (uint64_t count = 0; now_ns() < args.end_ns; count++) {
		dprintf(1, "%llu\n", (unsigned long long)count);
		sleep_ns(args.period_ns);
	}
	return 0;
}
