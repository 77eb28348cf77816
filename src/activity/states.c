/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "activity/states.h"

#define CHANGING_SHARE 50u /* 1 in so many pages: much happens; */
#define QUIET_SHARE 200u   /* little */
#define LONGEST_FACTOR 4u
#define SAMPLING_SHARE 10u /* of one processor */

const struct activity_state activity_states[ACTIVITIES] = {
	/*                     name        class         unused  sample    unused             used             written */
	[ACTIVITY_NEW] =     { "new",      CLASS_NEW,    0,      1, { ACTIVITY_COOLING, ACTIVITY_WARM,   ACTIVITY_WARMER } },
	[ACTIVITY_HOT] =     { "hot",      CLASS_HOT,    0,      8, { ACTIVITY_SLACK,   ACTIVITY_HOT,    ACTIVITY_HOT } },
	[ACTIVITY_WARMER] =  { "warmer",   CLASS_WARM,   0,      1, { ACTIVITY_COOLING, ACTIVITY_HOT,    ACTIVITY_HOT } },
	[ACTIVITY_WARM] =    { "warm",     CLASS_WARM,   0,      1, { ACTIVITY_COOLING, ACTIVITY_WARMER, ACTIVITY_HOT } },
	[ACTIVITY_SLACK] =   { "slack",    CLASS_WARM,   1,      1, { ACTIVITY_COOL,    ACTIVITY_HOT,    ACTIVITY_HOT } },
	[ACTIVITY_COOLING] = { "cooling",  CLASS_COOL,   1,      1, { ACTIVITY_COOL,    ACTIVITY_WARM,   ACTIVITY_WARMER } },
	[ACTIVITY_COOL] =    { "cool",     CLASS_COOL,   2,      1, { ACTIVITY_COLD,    ACTIVITY_WARM,   ACTIVITY_WARMER } },
	[ACTIVITY_COLD] =    { "cold",     CLASS_COLD,   3,      1, { ACTIVITY_COLDER,  ACTIVITY_WARM,   ACTIVITY_WARMER } },
	[ACTIVITY_COLDER] =  { "colder",   CLASS_COLD,   4,      1, { ACTIVITY_COLDEST, ACTIVITY_WARM,   ACTIVITY_WARMER } },
	[ACTIVITY_COLDEST] = { "coldest",  CLASS_COLD,   5,      1, { ACTIVITY_FROZEN,  ACTIVITY_WARM,   ACTIVITY_WARMER } },
	[ACTIVITY_FROZEN] =  { "frozen",   CLASS_FROZEN, 6,      1, { ACTIVITY_FROZEN,  ACTIVITY_WARM,   ACTIVITY_WARMER } },
};

const char *const activity_class_names[ACTIVITY_CLASSES] = {
	[CLASS_NEW] = "new",   [CLASS_HOT] = "hot",   [CLASS_WARM] = "warm",
	[CLASS_COOL] = "cool", [CLASS_COLD] = "cold", [CLASS_FROZEN] = "frozen",
};

unsigned activity_long_next(unsigned long_state, enum activity now, unsigned units)
{
	if (now == ACTIVITY_NEW)
		return long_state;
	if (!long_state || !activity_states[now].unused_looks)
		return 1;
	return units < LONG_STATES - 1 - long_state ? long_state + units : LONG_STATES - 1;
}

uint64_t activity_next(uint64_t entry, enum seen_use seen, unsigned units)
{
	enum activity now = activity_of(entry);

	if (seen < SEEN_USES)
		now = activity_states[now].next[seen];
	return entry_activity(now, activity_long_next(entry_long(entry), now, units));
}

static uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }

uint64_t activity_unused_us(uint64_t entry, uint64_t shortest_us)
{
	unsigned looks = activity_states[activity_of(entry)].unused_looks, units = entry_long(entry);

	/* Between the first of n looks and the last lie n - 1 periods; between the first of n minutes' beginnings and
	 * the last n - 1 minutes. */
	return larger(looks ? (looks - 1) * shortest_us : 0, units > 2 ? (units - 2) * LONG_UNIT_US : 0);
}

uint64_t activity_longest_us(uint64_t shortest_us)
{
	return activity_unused_us(entry_activity(ACTIVITY_FROZEN, LONG_STATES - 1), shortest_us);
}

bool activity_used_within(uint64_t entry, uint64_t window_us, uint64_t period_us)
{
	enum activity now = activity_of(entry);
	uint64_t looks = larger((window_us + period_us / 2) / period_us, 1);

	if (now == ACTIVITY_NEW)
		return false;
	if (looks <= activity_states[ACTIVITY_FROZEN].unused_looks)
		return activity_states[now].unused_looks < looks;
	return entry_long(entry) <= larger(window_us / LONG_UNIT_US, 1);
}

bool activity_is_sampled(enum activity state, uint64_t page, uint64_t pass, unsigned thin)
{
	uint64_t turns = (uint64_t)activity_states[state].looks_per_sample << thin;
	/* Neighbours at different passes, and in no pattern that a guest's own might meet. */
	uint64_t group = (page / SAMPLE_GROUP_PAGES + 1) * 0x9e3779b97f4a7c15ull >> 32;

	return !((pass + group) & (turns - 1));
}

uint64_t scan_next_period_us(const struct scan_activity *a)
{
	uint64_t next = a->period_us;

	if (a->migration_pass_us) {
		next = larger(a->migration_pass_us, SCAN_PERIOD_MIN_US);
		return next < a->shortest_us ? next : a->shortest_us;
	}
	if (a->changed > a->looked / CHANGING_SHARE)
		next = a->shortest_us;
	else if (a->changed < a->looked / QUIET_SHARE)
		next += next / 2;
	next = larger(next, a->shortest_us);
	return next < a->shortest_us * LONGEST_FACTOR ? next : a->shortest_us * LONGEST_FACTOR;
}

unsigned scan_thin(const uint64_t present[ACTIVITIES], uint64_t period_us)
{
	uint64_t allowed_ns = period_us * 1000 / SAMPLING_SHARE, ns = 0;
	unsigned thin = 0;

	for (unsigned i = 0; i < ACTIVITIES; i++)
		ns += present[i] / activity_states[i].looks_per_sample * REFAULT_NS;
	while (thin < THIN_MAX && ns >> thin > allowed_ns)
		thin++;
	return thin;
}
