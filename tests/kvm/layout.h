/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Guest-physical layout and shared structures, as numbers: read by both C and assembler.
 * vcpu.c asserts that the structures in vcpu.h agree with the offsets here.
 */
#ifndef TESTS_KVM_LAYOUT_H
#define TESTS_KVM_LAYOUT_H

/* Guest-physical = guest-virtual everywhere: the page tables map identity in 2 MiB leaves. */
#define LOW_GPA 0x0 /* slot 0: page tables, code, stacks, mailboxes */
#define LOW_BYTES 0x200000
#define PML4_GPA 0x1000
#define PDPT_GPA 0x2000
#define PD_LOW_GPA 0x3000
#define PD_TABLE_GPA 0x4000
#define GDT_GPA 0x5000
#define TSS_GPA 0x6000
#define PD_RAM_GPA 0x10000   /* one page of it per GiB of RAM */
#define CODE_GPA 0x80000     /* one page per vCPU */
#define STACK_GPA 0xc0000    /* one page per vCPU */
#define MAILBOX_GPA 0x100000 /* one page per vCPU */
#define MMIO_GPA 0x200000    /* mapped by the guest, but no slot: a store exits to the host */
#define TABLE_GPA 0x40000000 /* slot 1: one entry per page of RAM */
#define RAM_GPA 0x100000000  /* slots 2 and up: the RAM under test */

#define VCPUS_MAX 64
#define RAM_GIB_MAX 64
#define GUEST_PAGE_SHIFT 12
#define GUEST_PAGE_BYTES 4096
#define GUEST_PAGE_WORDS 512

/* struct page_entry */
#define ENTRY_SHIFT 5
#define ENTRY_STATE 0
#define ENTRY_SEED 8
#define ENTRY_STAMP 16

/* The state word: generation in bits 0..47, flags in 48..55, owner in 56..63. */
#define STATE_FLAGS_SHIFT 48
#define STATE_OWNER_SHIFT 56
#define FLAG_WRITING 1 /* the owner is in the middle of a write */
#define FLAG_HOST 2    /* handed over to the host, as a buffer under DMA is */
#define FLAG_ZERO 4    /* the contents have no pattern: all words but the stamped ones are 0 */
#define FLAG_ZERO_BIT 2
#define OWNER_NOBODY 255

/* struct vcpu_mailbox */
#define BOX_STOP 0
#define BOX_OWNER 4
#define BOX_WRITE_BELOW 8
#define BOX_POKE_BELOW 12
#define BOX_FULL_BELOW 16
#define BOX_REQUEST_FIRST 24
#define BOX_REQUEST_PAGES 32
#define BOX_RANGE_FIRST 40
#define BOX_RANGE_PAGES 48
#define BOX_TOUCHES 64
#define BOX_READS 72
#define BOX_WORDS 80
#define BOX_WRITES 88
#define BOX_POKES 96
#define BOX_SKIPPED 104
#define BOX_RACED 112
#define BOX_HANDOVERS 120

/* What a guest program stores at MMIO_GPA. */
#define SAYS_DONE 1
#define SAYS_STOPPED 2
#define SAYS_WRONG 3

/* Contents: word w of a page is seed + w * STEP (+ stamp in the first and the last word). */
#define CONTENTS_STEP 0x9e3779b97f4a7c15
#define CONTENTS_BY_PAGE 0xbf58476d1ce4e5b9
#define CONTENTS_BY_GENERATION 0x94d049bb133111eb

#endif
