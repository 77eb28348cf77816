/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The rules about the kernel that everything in core/ stands on, tried on the running kernel with a
 * few pages of its own: a few milliseconds, no thread, nothing left behind, nothing printed.
 */
#ifndef LATENT_OS_SELFTEST_H
#define LATENT_OS_SELFTEST_H

#include <stdbool.h>
#include <stdint.h>

/* What a mapping call with MAP_FIXED that fails leaves of the mapping that was there. */
enum os_after_failure {
	OS_AFTER_UNKNOWN,
	OS_AFTER_OLD_MAPPING,
	OS_AFTER_HOLE,
};

struct os_selftest_result {
	/* In a private file mapping: private = not FILE and (PRESENT or SWAPPED). */
	bool untouched_is_clean;
	bool read_is_clean;
	bool written_is_private;
	bool written_then_paged_out_is_private; /* also true where there is no swap to page out to */
	/* PAGEMAP_SCAN says what the classic file says; true also where there is only the latter. */
	bool scan_agrees;

	bool seek_finds_data;  /* SEEK_DATA on a memfd: what was written, nothing else */
	bool punched_is_zero;  /* a punched memfd reads as zeros through a mapping made before */
	bool punched_is_hole;  /* … and holds no data until then */
	bool populate_copies;  /* MADV_POPULATE_WRITE makes private copies without changing a byte */
	bool populated_survives_rewrite; /* … which the file's rewrite does not reach */
	bool rewrite_shows_in_clean;     /* that it reaches clean pages is why files are leased */

	/* The call is refused before the kernel touches mappings (the limit of mappings, permissions). */
	enum os_after_failure early_failure_leaves;
	/* It fails while the new mapping is being made (the file's own mmap; no memory). */
	enum os_after_failure late_failure_leaves;

	/* Read leases; false where the temporary directory's file system has none. */
	bool lease_taken;
	bool lease_refused_while_written; /* taking it fails while a writer has the file open */
	bool lease_broken_by_open;        /* a writer's open waits, and the holder can see it */

	bool ran_on_disk_file; /* false: no file could be made; a memfd was the file under the overlay */
};

/* Runs all checks. Negative errno if the means could not be had; `*ret` is untouched then. Sends no
 * signal but SIGURG to the calling thread (its default: ignored). Any thread, one at a time. */
int os_selftest(struct os_selftest_result *ret);

/* True if everything holds that guest contents depend on. (The failures' aftermath and leases are
 * not among them: core/ asks after each failure, and without a lease no file is mapped.) */
bool os_selftest_sound(const struct os_selftest_result *result);

#endif
