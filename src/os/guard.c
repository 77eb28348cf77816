/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "os/os.h"

#include <errno.h>
#include <stdatomic.h>

/* Looked through in a signal handler, so without a lock. */
static struct {
	_Atomic uintptr_t from, to;
} guarded[4096];
#define GUARDED (sizeof guarded / sizeof guarded[0])

int os_guard_view(void *view, size_t bytes)
{
	for (size_t i = 0; i < GUARDED; i++) {
		uintptr_t empty = 0;

		if (!atomic_compare_exchange_strong(&guarded[i].from, &empty, (uintptr_t)view))
			continue;
		guarded[i].to = (uintptr_t)view + bytes;
		return 0;
	}
	return -ENOSPC;
}

void os_unguard_view(void *view)
{
	for (size_t i = 0; i < GUARDED; i++) {
		if (guarded[i].from != (uintptr_t)view)
			continue;
		guarded[i].to = 0;
		guarded[i].from = 0;
		return;
	}
}

bool os_absorb_fault(const void *addr)
{
	uintptr_t at = (uintptr_t)addr;

	for (size_t i = 0; i < GUARDED; i++) {
		uintptr_t from = guarded[i].from, to = guarded[i].to;

		if (from && at >= from && at < to)
			return os_replace_view((void *)from, to - from);
	}
	return false;
}
