/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Bare vCPUs: KVM guests without an operating system, to test memory under a running guest.
 *
 * Each vCPU is put straight into 64-bit user mode (CPL 3) with page tables prepared in guest
 * memory and runs one small assembled program (guest.S). It executes no privileged instruction,
 * so it touches guest RAM at native speed even where /dev/kvm can only emulate guest kernels,
 * and every touch takes KVM's real fault path and MMU notifiers.
 *
 * The page table of the *test* (not of the CPU) has one `struct page_entry` per page of guest
 * RAM, in memory that guest and host share. It says what the page must contain, who may write
 * it, and its generation, which grows with every change of contents:
 *
 *	word w = seed + w * CONTENTS_STEP (+ stamp if w is the first or the last word),
 *	and with FLAG_ZERO: 0 (+ stamp if w is the first or the last word).
 *
 * Who may do what:
 *  - A page has one owner, a vCPU or nobody. Only the owner writes it.
 *  - Any vCPU checks any page at any time; the generation tells a race from a wrong word.
 *  - To change *contents* (a disk read arrives, a discard), the host takes the pages first
 *    (vcpus_take: "the guest starts a DMA"), does what it likes, and gives them back with the
 *    new contents written down (vcpus_give_*: "the DMA is complete").
 *  - To change *mappings* and keep contents (zap, overlay of equal contents), the host needs
 *    nothing; if it copies (settle), it must stop the writers: vcpus_pause.
 *
 * Threads: the calls below may come from any host thread, several at once, except create,
 * attach and destroy. Each vCPU runs in a thread of its own. Errors are negative errno values;
 * outputs are untouched then.
 */
#ifndef TESTS_KVM_VCPU_H
#define TESTS_KVM_VCPU_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "layout.h"

struct page_entry {
	uint64_t state; /* generation, flags, owner: see layout.h; stored last */
	uint64_t seed;
	uint64_t stamp;
	uint64_t unused;
};

struct vcpus; /* one machine: its vCPUs, memory slots and page entries */

/*
 * Makes a machine with `vcpus` idle vCPUs and room for `ram_pages` pages of guest RAM. All pages
 * belong to nobody and are expected to contain zeros.
 *
 * -ENOENT, -EACCES, -ENODEV: no /dev/kvm, no permission, nothing behind it.
 * -ENOTSUP: a vCPU was made, but a first program in user mode did not run. All of these mean
 * "skip the test"; -EINVAL and -ENOMEM do not.
 */
int vcpus_create(unsigned vcpus, uint64_t ram_pages, struct vcpus **ret);
void vcpus_destroy(struct vcpus *m);

/* Makes host memory appear as guest pages first_page and up. -ENOSPC after 16 calls. */
int vcpus_attach(struct vcpus *m, uint64_t first_page, void *hva, uint64_t pages);

/* ---- Running programs ---- */

enum vcpu_program {
	VCPU_READ_SUM, /* sum of the first words; checks nothing, cannot be stopped or taken from */
	VCPU_VERIFY,   /* check every page of the range in order */
	VCPU_WRITE,    /* write new contents into every own page of the range in order */
	VCPU_TOUCH,    /* touch random pages of the range: check them, write some of the own ones */
};

struct vcpu_job {
	enum vcpu_program program;
	uint64_t first_page, pages;
	uint64_t touches;       /* VCPU_TOUCH: how many; UINT64_MAX: until stopped */
	uint64_t random_seed;   /* VCPU_TOUCH, and the choice of sampled words */
	unsigned full_per_256;  /* checks that read all 512 words; others read 3: first, any, last */
	unsigned write_per_256; /* VCPU_TOUCH on own pages: new contents for all words */
	unsigned poke_per_256;  /* VCPU_TOUCH on own pages: change only first and last word */
};

enum vcpu_outcome {
	VCPU_DONE,
	VCPU_STOPPED, /* because vcpu_stop asked */
	VCPU_WRONG,   /* a word had wrong contents: page, word, got, expected */
	VCPU_FAULT,   /* KVM_RUN failed with -EFAULT: page, hva; vcpu_continue tries again */
	VCPU_BROKEN,  /* KVM left the program in another way: exit_reason, error */
};

struct vcpu_counts {
	uint64_t touches; /* pages accessed */
	uint64_t reads;   /* checks that completed */
	uint64_t words;   /* words compared in them */
	uint64_t writes;
	uint64_t pokes;
	uint64_t skipped; /* pages passed over: host's, or being written by another vCPU */
	uint64_t raced;   /* checks dropped because the page was written meanwhile */
	uint64_t handovers;
};

struct vcpu_report {
	enum vcpu_outcome outcome;
	struct vcpu_counts counts; /* since vcpu_start */
	uint64_t sum;              /* VCPU_READ_SUM */
	uint64_t page;             /* WRONG, FAULT: index in guest RAM */
	uint64_t gpa;
	void *hva;              /* WRONG, FAULT: of the page; NULL where nothing is attached */
	unsigned word;          /* WRONG: index in the page */
	uint64_t got, expected; /* WRONG */
	uint64_t state;         /* WRONG: the entry's state word when the check began */
	unsigned exit_reason;   /* FAULT, BROKEN: of struct kvm_run */
	int error;              /* FAULT, BROKEN: negative errno of KVM_RUN, or 0 */
	uint64_t code_offset;   /* FAULT, BROKEN: in guest.S's code */
};

/* -EBUSY: the vCPU is running. -EINVAL: a range or ratio out of bounds. */
int vcpu_start(struct vcpus *m, unsigned cpu, const struct vcpu_job *job);

/* Asks the program to end at its next page; then vcpu_wait. No error if it has ended. */
void vcpu_stop(struct vcpus *m, unsigned cpu);

/* Waits until the program ends. -ETIMEDOUT: it still runs (or is paused). -ESRCH: none started. */
int vcpu_wait(struct vcpus *m, unsigned cpu, unsigned timeout_ms, struct vcpu_report *ret);

/*
 * Goes on where a program stopped with VCPU_FAULT: the access is tried again. The harness never
 * does this by itself. -EINVAL: the last outcome was another one.
 */
int vcpu_continue(struct vcpus *m, unsigned cpu);

/* The counters of a program while it runs. */
void vcpu_peek(struct vcpus *m, unsigned cpu, struct vcpu_counts *ret);

/*
 * Takes every vCPU out of the guest and keeps it out until as many resumes as pauses. On return
 * no vCPU thread is inside KVM_RUN. Programs go on afterwards as if nothing had been.
 * A vCPU that waits for a page which somebody has to deliver (userfaultfd) comes out at once where
 * KVM's faults can be interrupted, else when the page arrives: keep serving faults meanwhile.
 */
void vcpus_pause(struct vcpus *m);
/* vCPU threads do not block it: os_freeze may stop them with it, wherever they are. */
#define VCPU_FREEZE_SIGNAL (SIGRTMAX - 4)
void vcpus_resume(struct vcpus *m);

/* ---- Who owns pages, and what they contain ---- */

/* While no program runs. owner: a vCPU, or OWNER_NOBODY. */
void vcpus_set_owner(struct vcpus *m, uint64_t first_page, uint64_t pages, unsigned owner);

/*
 * Takes pages from their owners: no vCPU writes them until they are given back. All or nothing.
 * -EBUSY: an owner is paused, stopped at a fault, or runs VCPU_READ_SUM, or a page is taken.
 * -ETIMEDOUT: an owner did not answer; nothing is taken then.
 */
int vcpus_take(struct vcpus *m, uint64_t first_page, uint64_t pages, unsigned timeout_ms);

/* Gives taken pages back: contents now of seeds[i], all zeros, or as before. */
void vcpus_give_patterned(struct vcpus *m, uint64_t first_page, uint64_t pages, const uint64_t *seeds);
void vcpus_give_zeroed(struct vcpus *m, uint64_t first_page, uint64_t pages);
void vcpus_give_unchanged(struct vcpus *m, uint64_t first_page, uint64_t pages);

/* A seed of the host's choosing: different (kind, index) give different contents. */
uint64_t contents_seed(uint64_t kind, uint64_t index);

/* Fills one page in memory (or a buffer on its way to a file) with the contents of a seed. */
void contents_fill(void *page, uint64_t seed);

/*
 * Checks pages through the host's mapping, all words: exact while the vCPUs are idle or paused
 * (a write that was interrupted may show old or new words). Returns false and fills *ret
 * (outcome VCPU_WRONG) at the first wrong word.
 */
bool vcpus_check(struct vcpus *m, uint64_t first_page, uint64_t pages, struct vcpu_report *ret);

const struct page_entry *vcpus_entry(struct vcpus *m, uint64_t page);

/* One line for people. */
void vcpu_report_print(FILE *out, unsigned cpu, const struct vcpu_report *report);

#endif
