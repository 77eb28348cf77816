/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The programs that the bare vCPUs run, at CPL 3. They are copied into each vCPU's code page,
 * so they are position independent and refer to nothing outside this file.
 *
 * Registers, the same in all programs:
 *	rdi	this vCPU's mailbox (parameters, live counters)
 *	rsi	page index			rcx	pages or touches still to do
 *	rbx	address of the page: after -EFAULT the host reads the faulting page from here
 *	rbp	the page's entry		r12	the entry's state word as first seen
 *	r8	seed	r9	step	r11	stamp	of the page's contents
 *	r10	random state			r13	index of the word in the page
 *	rax, rdx, r14, r15	scratch; when a word is wrong: rax got, rdx expected
 *
 * Any vCPU may check any page. It reads the state word, then the contents, then the state
 * word again (a seqlock: generations only grow, and x86 keeps loads in order and stores in
 * order), so a mismatch counts as wrong only if nobody wrote in between. Only the owner
 * writes, and only pages that are not handed over to the host.
 */
#include "layout.h"

	.intel_syntax noprefix
	.section .rodata.guest, "a", @progbits
	.balign 64

	.macro program name
	.globl \name
	.hidden \name
\name:
	.endm

program guest_code_begin

/* Sums the first word of rcx pages from page rsi on; checks nothing and polls nothing. */
program guest_read_sum
	mov	rbx, rsi
	shl	rbx, GUEST_PAGE_SHIFT
	movabs	rax, RAM_GPA
	add	rbx, rax
	xor	eax, eax
1:	add	rax, [rbx]
	add	rbx, GUEST_PAGE_BYTES
	inc	qword ptr [rdi + BOX_TOUCHES]
	dec	rcx
	jnz	1b
	jmp	say_done

/* Checks rcx pages from page rsi on, in order. */
program guest_verify
1:	test	rcx, rcx
	jz	say_done
	call	poll
	call	step_random
	call	locate
	test	al, FLAG_WRITING | FLAG_HOST
	jnz	2f
	call	load_contents
	call	check_page
	inc	qword ptr [rdi + BOX_TOUCHES]
	jmp	3f
2:	inc	qword ptr [rdi + BOX_SKIPPED]
3:	inc	rsi
	dec	rcx
	jmp	1b

/* Writes new contents into every own page of rcx pages from page rsi on, in order. */
program guest_write
1:	test	rcx, rcx
	jz	say_done
	call	poll
	call	locate
	test	al, FLAG_WRITING | FLAG_HOST
	jnz	2f
	cmp	ah, [rdi + BOX_OWNER]
	jne	2f
	call	write_page
	inc	qword ptr [rdi + BOX_TOUCHES]
	jmp	3f
2:	inc	qword ptr [rdi + BOX_SKIPPED]
3:	inc	rsi
	dec	rcx
	jmp	1b

/* Makes rcx touches of random pages of the mailbox's range: reads and, of own pages, writes. */
program guest_touch
1:	test	rcx, rcx
	jz	say_done
	call	poll
	call	step_random
	mov	rsi, r10
	shr	rsi, 32
	imul	rsi, [rdi + BOX_RANGE_PAGES]
	shr	rsi, 32
	add	rsi, [rdi + BOX_RANGE_FIRST]
	call	locate
	test	al, FLAG_WRITING | FLAG_HOST
	jnz	5f
	call	load_contents
	cmp	ah, [rdi + BOX_OWNER]
	jne	4f
	mov	edx, r10d
	shr	edx, 24
	cmp	edx, [rdi + BOX_WRITE_BELOW]
	jb	2f
	cmp	edx, [rdi + BOX_POKE_BELOW]
	jb	3f
	jmp	4f
2:	call	write_page
	jmp	6f
3:	call	poke_page
	jmp	6f
4:	call	check_page
	jmp	6f
5:	inc	qword ptr [rdi + BOX_SKIPPED]	/* no touch: go on to another page */
	pause
	jmp	1b
6:	inc	qword ptr [rdi + BOX_TOUCHES]
	dec	rcx
	jmp	1b

/* Obeys the host: stops, or hands over the run of own pages that it asks for. */
poll:
	cmp	dword ptr [rdi + BOX_STOP], 0
	jne	say_stopped
	cmp	qword ptr [rdi + BOX_REQUEST_PAGES], 0
	je	2f
	xor	edx, edx
	xchg	rdx, [rdi + BOX_REQUEST_PAGES]	/* claims it: the host may withdraw until here */
	test	rdx, rdx
	jz	2f
	mov	rbp, [rdi + BOX_REQUEST_FIRST]
	shl	rbp, ENTRY_SHIFT
	add	rbp, TABLE_GPA
	movabs	rax, FLAG_HOST << STATE_FLAGS_SHIFT
1:	or	[rbp], rax
	add	rbp, 1 << ENTRY_SHIFT
	dec	rdx
	jnz	1b
	inc	qword ptr [rdi + BOX_HANDOVERS]	/* last: from here on the host owns the run */
2:	ret

step_random:
	movabs	rax, 6364136223846793005
	imul	r10, rax
	movabs	rax, 1442695040888963407
	add	r10, rax
	ret

/* rsi: page -> rbp: entry, rbx: address, r12: state, al: its flags, ah: its owner */
locate:
	mov	rbp, rsi
	shl	rbp, ENTRY_SHIFT
	add	rbp, TABLE_GPA
	mov	rbx, rsi
	shl	rbx, GUEST_PAGE_SHIFT
	movabs	rax, RAM_GPA
	add	rbx, rax
	mov	r12, [rbp + ENTRY_STATE]
	mov	rax, r12
	shr	rax, STATE_FLAGS_SHIFT
	ret

/* al: flags -> r8: seed, r9: step, r11: stamp */
load_contents:
	mov	r8, [rbp + ENTRY_SEED]
	mov	r11, [rbp + ENTRY_STAMP]
	movabs	r9, CONTENTS_STEP
	test	al, FLAG_ZERO
	jz	1f
	xor	r9d, r9d
1:	ret

/* Checks all words, or the first, a random one and the last. */
check_page:
	mov	edx, r10d
	shr	edx, 16
	and	edx, 255
	cmp	edx, [rdi + BOX_FULL_BELOW]
	jb	check_all_words

	xor	r13d, r13d
	lea	rdx, [r8 + r11]
	mov	rax, [rbx]
	cmp	rax, rdx
	jne	mismatch
	mov	r13, r10
	shr	r13, 40
	and	r13d, GUEST_PAGE_WORDS - 1
	lea	eax, [r13 - 1]
	cmp	eax, GUEST_PAGE_WORDS - 2
	jb	1f
	mov	r13d, 1			/* the stamped words are checked anyway */
1:	mov	rdx, r13
	imul	rdx, r9
	add	rdx, r8
	mov	rax, [rbx + r13 * 8]
	cmp	rax, rdx
	jne	mismatch
	mov	r13d, GUEST_PAGE_WORDS - 1
	imul	rdx, r9, GUEST_PAGE_WORDS - 1
	add	rdx, r8
	add	rdx, r11
	mov	rax, [rbx + r13 * 8]
	cmp	rax, rdx
	jne	mismatch
	mov	edx, 3
	jmp	count_words

check_all_words:
	xor	r13d, r13d
	lea	rdx, [r8 + r11]
	mov	rax, [rbx]
	cmp	rax, rdx
	jne	mismatch
	mov	rdx, r8
1:	inc	r13d
	add	rdx, r9
	mov	rax, [rbx + r13 * 8]
	cmp	r13d, GUEST_PAGE_WORDS - 1
	je	2f
	cmp	rax, rdx
	je	1b
	jmp	mismatch
2:	add	rdx, r11
	cmp	rax, rdx
	jne	mismatch
	mov	edx, GUEST_PAGE_WORDS

count_words:
	cmp	[rbp + ENTRY_STATE], r12
	jne	raced
	add	[rdi + BOX_WORDS], rdx
	inc	qword ptr [rdi + BOX_READS]
	ret

mismatch:
	cmp	[rbp + ENTRY_STATE], r12
	je	say_wrong
raced:
	inc	qword ptr [rdi + BOX_RACED]
	ret

/* New contents for all words of an own page. */
write_page:
	movabs	rax, FLAG_WRITING << STATE_FLAGS_SHIFT
	or	[rbp + ENTRY_STATE], rax
	call	next_generation
	lea	rdx, [rsi + 1]
	movabs	r8, CONTENTS_BY_PAGE
	imul	rdx, r8
	add	rdx, rax
	mov	r8, rdx
	movabs	r9, CONTENTS_STEP
	xor	r13d, r13d
1:	mov	[rbx + r13 * 8], rdx
	add	rdx, r9
	inc	r13d
	cmp	r13d, GUEST_PAGE_WORDS
	jb	1b
	mov	[rbp + ENTRY_SEED], r8
	mov	qword ptr [rbp + ENTRY_STAMP], 0
	btr	r14, STATE_FLAGS_SHIFT + FLAG_ZERO_BIT
	mov	[rbp + ENTRY_STATE], r14
	inc	qword ptr [rdi + BOX_WRITES]
	ret

/*
 * Changes only the first and the last word of an own page, so that a copy on write has to keep
 * the rest. The exchange sees the value that the write itself replaces.
 */
poke_page:
	movabs	rax, FLAG_WRITING << STATE_FLAGS_SHIFT
	or	[rbp + ENTRY_STATE], rax
	call	next_generation
	mov	r15, rax		/* the new stamp */
	xor	r13d, r13d
	lea	rdx, [r8 + r11]
	lea	rax, [r8 + r15]
	xchg	[rbx], rax
	cmp	rax, rdx
	jne	say_wrong
	mov	r13d, GUEST_PAGE_WORDS - 1
	imul	rdx, r9, GUEST_PAGE_WORDS - 1
	add	r8, rdx
	lea	rdx, [r8 + r11]
	mov	rax, [rbx + r13 * 8]
	cmp	rax, rdx
	jne	say_wrong
	add	r8, r15
	mov	[rbx + r13 * 8], r8
	mov	[rbp + ENTRY_STAMP], r15
	mov	[rbp + ENTRY_STATE], r14
	add	qword ptr [rdi + BOX_WORDS], 2
	inc	qword ptr [rdi + BOX_POKES]
	ret

/* r12: state -> r14: state of the next generation, rax: what that generation adds to contents */
next_generation:
	lea	r14, [r12 + 1]
	mov	rax, r14
	shl	rax, 64 - STATE_FLAGS_SHIFT
	shr	rax, 64 - STATE_FLAGS_SHIFT
	movabs	rdx, CONTENTS_BY_GENERATION
	imul	rax, rdx
	ret

say_done:
	mov	r15d, SAYS_DONE
	jmp	say
say_stopped:
	mov	r15d, SAYS_STOPPED
	jmp	say
say_wrong:
	mov	r15d, SAYS_WRONG
say:	mov	r14d, MMIO_GPA
	mov	[r14], r15
	jmp	say

program guest_code_end

	.section .note.GNU-stack, "", @progbits
