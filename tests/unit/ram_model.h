/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * A model of guest RAM, simple enough to be right by reading: for each page its entry, its contents
 * (a tag), whether it is a private copy, and what lies beneath an overlay. Each operation is done on
 * a rig (ram_rig.h); then the ram, the kernel and the model are compared, page by page.
 *
 * Without a failure, the state after an operation is exactly the one that the rules in core/ram.h
 * give. With one, each page may be in its old state or in its new one (or, where contents are free
 * and the failed call left a hole, base), but nothing else; the model then adopts what is there.
 *
 * Used by the fuzz target and by the fault tests. For one include per executable.
 */
#ifndef LATENT_TESTS_RAM_MODEL_H
#define LATENT_TESTS_RAM_MODEL_H

#include "ram_rig.h"

#include <dlfcn.h>
#include <sys/syscall.h>

#define MODEL_MAX_PAGES 64
#define MODEL_TAGS 4

struct model_page {
	uint64_t entry;   /* without the private flag */
	uint64_t tag;     /* contents */
	uint64_t beneath; /* of an overlay: contents of the memfd there */
	bool written;     /* of an overlay: the kernel must show a private copy */
};

/* What an operation that succeeds makes of a page. */
struct model_goal {
	bool changes;
	uint64_t entry;
	uint64_t tags[MODEL_TAGS]; /* allowed contents */
	unsigned tag_count;
	bool written, written_unknown;
};

struct model {
	struct rig rig;
	uint64_t block_pages[RIG_BLOCKS], file_pages;
	struct model_page pages[RIG_BLOCKS][MODEL_MAX_PAGES];
	struct model_goal goals[RIG_BLOCKS][MODEL_MAX_PAGES];
	uint64_t next_tag;
	uint32_t armed_nth[OS_FAULT_POINTS];
	unsigned fired;      /* bit p: point p failed during this operation */
	bool hole_fired;     /* a simulated failure that left a hole */
	bool real_failures;  /* the kernel itself may fail: mappings are used up */
	bool punch_fails;    /* … also to punch out memory */
	bool zero_on_keep;   /* discard: a page that stays as it was is made zero */
	bool keep_allowed;   /* discard: pages may stay, for want of mappings */
	bool touch_all;      /* contents are read through the mapping, also where nothing is there yet */
	bool splits_allowed; /* something was written in an overlay, or a mark failed */
	uint64_t failures_seen;
};

/* ---- kernels that leave holes --------------------------------------------------------------- */

/*
 * Before Linux 6.12 every mapping call with MAP_FIXED that fails late leaves a hole, on later ones
 * some do. os/ makes all of them by syscall(2); this one stands before the C library's, and lets the
 * call number `hole_at` (from 1) unmap and fail.
 */
static uint32_t hole_at, hole_calls;
static bool hole_done;

/* Called once, when pages are about to be made private copies: what else may happen just then. */
static void (*before_populate)(void);

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

static inline void call_before_populate(void)
{
	void (*call)(void) = before_populate;

	before_populate = NULL;
	if (call)
		call();
}

static inline bool hole_is_due(void)
{
	hole_done = ++hole_calls == hole_at;
	if (hole_done)
		hole_at = 0;
	return hole_done;
}

/* It reads six arguments, however many there are: the address sanitizer must not look. */
__attribute__((no_sanitize_address)) long syscall(long number, ...)
{
	static long (*real)(long, ...);
	long a[6];
	va_list args;

	va_start(args, number);
	for (int i = 0; i < 6; i++)
		a[i] = va_arg(args, long);
	va_end(args);
	if (!real)
		real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
	if (number == SYS_madvise && (int)a[2] == MADV_POPULATE_WRITE)
		call_before_populate();
	if (number == SYS_mmap && (a[3] & MAP_FIXED) && hole_at && hole_is_due()) {
		real(SYS_munmap, a[0], a[1]);
		errno = ENOMEM;
		return -1;
	}
	return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

static RIG_UNUSED void model_arm_hole(uint32_t nth)
{
	hole_calls = 0;
	hole_at = nth;
	hole_done = false;
}

/* ---- life ----------------------------------------------------------------------------------- */

static RIG_UNUSED void model_open(struct model *m, const uint64_t block_pages[RIG_BLOCKS], uint64_t file_pages,
				  uint64_t budget_maps)
{
	memset(m, 0, sizeof *m);
	rig_open(&m->rig, block_pages, file_pages, budget_maps);
	memcpy(m->block_pages, block_pages, sizeof m->block_pages);
	m->file_pages = file_pages;
	m->next_tag = UINT64_C(0x6e57) << 48;
	model_arm_hole(0);
}

static RIG_UNUSED void model_disarm(struct model *m)
{
	for (unsigned p = 0; p < OS_FAULT_POINTS; p++)
		os_fault_arm((enum os_fault_point)p, m->armed_nth[p] = 0, 0);
	model_arm_hole(0);
}

static RIG_UNUSED void model_close(struct model *m)
{
	model_disarm(m);
	rig_close(&m->rig);
}

static RIG_UNUSED void model_arm(struct model *m, enum os_fault_point point, uint32_t nth, int error)
{
	os_fault_arm(point, nth, error);
	m->armed_nth[point] = nth;
}

/* ---- goals ---------------------------------------------------------------------------------- */

static inline bool model_is_overlay(const struct model_page *p) { return entry_source(p->entry) == ENTRY_OVERLAY; }

static inline bool model_of_file(const struct model *m, const struct model_page *p, unsigned file)
{
	return model_is_overlay(p) && entry_file(p->entry) == m->rig.files[file].index;
}

static inline void model_keep_all(struct model *m)
{
	memset(m->goals, 0, sizeof m->goals);
	m->zero_on_keep = false;
	m->keep_allowed = false;
	m->fired = 0;
	hole_done = false;
}

static inline struct model_goal *model_goal(struct model *m, unsigned block, uint64_t page, uint64_t entry)
{
	struct model_goal *g = &m->goals[block][page];

	g->changes = true;
	g->entry = entry;
	return g;
}

static inline void model_allow(struct model_goal *g, uint64_t tag) { g->tags[g->tag_count++] = tag; }

/* ---- comparing ------------------------------------------------------------------------------ */

static inline void model_note_fired(struct model *m)
{
	m->hole_fired = hole_done;
	hole_done = false;
	for (unsigned p = 0; p < OS_FAULT_POINTS; p++) {
		enum os_fault_point point = (enum os_fault_point)p;

		if (m->armed_nth[p] && os_fault_calls(point) >= m->armed_nth[p]) {
			m->fired |= 1u << p;
			os_fault_arm(point, m->armed_nth[p] = 0, 0);
		}
	}
	/* Marks that differ; zeros written into an overlay; a split that the failed call left. */
	if (m->fired || m->hole_fired || m->real_failures)
		m->splits_allowed = true;
}

static inline bool model_may_fail(const struct model *m) { return m->fired || m->hole_fired || m->real_failures; }

/* A page's contents without touching what is not there yet: it is what its source has. */
static inline bool model_contents(struct model *m, unsigned block, uint64_t page, uint8_t flags, uint64_t entry,
				  uint64_t *ret_tag)
{
	const uint64_t *words = (const uint64_t *)(const void *)rig_hva(&m->rig, block, page);
	const struct rig_file *f;

	if (m->touch_all || flags & (OS_PAGE_PRESENT | OS_PAGE_SWAPPED))
		return rig_tag_of_words(words, ret_tag);
	if (entry_source(entry) == ENTRY_BASE)
		return rig_beneath(&m->rig, block, page, ret_tag);
	f = rig_file_of(&m->rig, entry);
	*ret_tag = rig_file_tag(f->number, f->version, entry_file_page(entry));
	return true;
}

static inline bool model_tag_is_one_of(const struct model_goal *g, uint64_t tag)
{
	for (unsigned i = 0; i < g->tag_count; i++)
		if (g->tags[i] == tag)
			return true;
	return false;
}

/* Beneath an overlay there is nothing, unless a punch failed: then something that the guest had. */
static inline const char *model_check_beneath(struct model *m, unsigned block, uint64_t page,
					      const struct model_page *old)
{
	struct model_page *p = &m->pages[block][page];
	bool punch_failed = m->punch_fails || m->fired & 1u << OS_FAULT_PUNCH;

	if (!model_is_overlay(p))
		return NULL;
	if (!rig_has_memory_beneath(&m->rig, block, page)) {
		p->beneath = 0;
		return NULL;
	}
	if (!rig_beneath(&m->rig, block, page, &p->beneath) ||
	    (p->beneath && p->beneath != old->tag && p->beneath != old->beneath && p->beneath != p->tag))
		return rig_wrong(&m->rig, "block %u page %" PRIu64 ": %" PRIx64 " beneath the overlay", block, page,
				 p->beneath);
	/* It may stay where it was, but not come anew. */
	if (!punch_failed && !(model_is_overlay(old) && old->beneath == p->beneath))
		return rig_wrong(&m->rig, "block %u page %" PRIu64 ": memory beneath a new overlay", block, page);
	return NULL;
}

/* Puts the page into the state that it must be in, judging by its entry. NULL goal: unchanged. */
static inline const char *model_adopt(struct model *m, unsigned block, uint64_t page, uint64_t entry, uint64_t tag,
				      bool private_now)
{
	struct model_page *p = &m->pages[block][page];
	const struct model_goal *g = &m->goals[block][page];
	struct model_goal keep = { .entry = p->entry, .tags = { p->tag }, .tag_count = 1, .written = p->written };
	struct model_goal base = { .entry = ENTRY_BASE, .tags = { 0, p->beneath, p->tag }, .tag_count = 3 };
	bool reached = g->changes && entry == g->entry && model_tag_is_one_of(g, tag);

	/* Old and new state may have one entry (an overlay mapped anew, a base page discarded). */
	if (reached && !g->written_unknown && private_now != g->written && model_may_fail(m))
		reached = false;
	if (g->changes && !reached && !model_may_fail(m) && !m->keep_allowed)
		return rig_wrong(&m->rig,
				 "block %u page %" PRIu64 ": entry %" PRIx64 " contents %" PRIx64
				 " instead of entry %" PRIx64 " contents %" PRIx64,
				 block, page, entry, tag, g->entry, g->tags[0]);
	if (g->changes && m->zero_on_keep) {
		keep.tags[0] = 0;
		keep.written = model_is_overlay(p);
	}
	if (!reached)
		g = m->hole_fired && g->changes && entry == ENTRY_BASE && model_is_overlay(p) ? &base : &keep;
	if (entry != g->entry || !model_tag_is_one_of(g, tag))
		return rig_wrong(&m->rig,
				 "block %u page %" PRIu64 ": entry %" PRIx64 " contents %" PRIx64
				 ", neither old (%" PRIx64 " %" PRIx64 ") nor new",
				 block, page, entry, tag, p->entry, p->tag);
	if (!g->written_unknown && private_now != g->written)
		return rig_wrong(&m->rig, "block %u page %" PRIu64 ": private copy %d, expected %d", block, page,
				 private_now, g->written);
	if (p->written && !private_now && entry == p->entry && g->written_unknown)
		return rig_wrong(&m->rig, "block %u page %" PRIu64 ": a private copy is lost", block, page);
	*p = (struct model_page){ .entry = entry, .tag = tag, .beneath = p->beneath, .written = private_now };
	return NULL;
}

static inline const char *model_compare_block(struct model *m, unsigned block)
{
	uint8_t flags[MODEL_MAX_PAGES];
	const char *why = NULL;

	if (os_pagemap_flags(m->rig.pagemap, m->rig.blocks[block].hva, m->block_pages[block], flags))
		abort();
	for (uint64_t i = 0; !why && i < m->block_pages[block]; i++) {
		uint64_t entry = rig_entry(&m->rig, block, i) & ~ENTRY_PRIVATE, tag = 0;
		bool overlay = entry_source(entry) == ENTRY_OVERLAY;
		struct model_page old = m->pages[block][i];

		if (!model_contents(m, block, i, flags[i], entry, &tag))
			return rig_wrong(&m->rig, "block %u page %" PRIu64 ": contents are torn", block, i);
		why = model_adopt(m, block, i, entry, tag, overlay && rig_flags_private(flags[i]));
		if (!why)
			why = model_check_beneath(m, block, i, &old);
	}
	return why;
}

/* Compares everything after an operation. */
static inline const char *model_compare(struct model *m, bool reconciled)
{
	struct rig_sums sums;
	const char *why;

	model_note_fired(m);
	why = rig_check(&m->rig, reconciled, &sums);
	for (unsigned b = 0; !why && b < RIG_BLOCKS; b++)
		why = model_compare_block(m, b);
	if (!why && sums.splits && !m->splits_allowed)
		why = rig_wrong(&m->rig, "%" PRIu64 " mappings too many", sums.splits);
	m->failures_seen += model_may_fail(m);
	return why;
}

static inline const char *model_compare_result(struct model *m, int got, int expected)
{
	const char *why = model_compare(m, false);

	if (!why && got != expected && !(got < 0 && model_may_fail(m)))
		why = rig_wrong(&m->rig, "returned %d instead of %d", got, expected);
	return why;
}

/* If it said that all went well, all must have. */
static inline const char *model_check_reached(struct model *m, int got)
{
	for (unsigned b = 0; !got && b < RIG_BLOCKS; b++)
		for (uint64_t i = 0; i < m->block_pages[b]; i++)
			if (m->goals[b][i].changes && m->pages[b][i].entry != m->goals[b][i].entry)
				return rig_wrong(&m->rig, "returned 0, but block %u page %" PRIu64 " is as before", b, i);
	return NULL;
}

/* ---- operations: NULL, or what went wrong ---------------------------------------------------- */

static inline uint64_t model_starts(const uint64_t *entries, uint64_t pages)
{
	uint64_t starts = 0;

	for (uint64_t i = 1; i < pages; i++)
		starts += !entry_joins(entries[i - 1], entries[i]);
	return starts;
}

/* 0, -ERANGE or -EDQUOT: what mapping an overlay must say when nothing fails. */
static inline int model_overlay_verdict(struct model *m, unsigned block, uint64_t page, uint64_t pages,
					unsigned file, uint64_t file_page)
{
	uint64_t entries[MODEL_MAX_PAGES], before, after;
	struct ram_counts c;

	if (!pages || page + pages > m->block_pages[block] || file_page + pages > m->file_pages)
		return -ERANGE;
	for (uint64_t i = 0; i < m->block_pages[block]; i++)
		entries[i] = m->pages[block][i].entry;
	before = model_starts(entries, m->block_pages[block]);
	for (uint64_t i = 0; i < pages; i++)
		entries[page + i] = entry_overlay(m->rig.files[file].index, file_page + i);
	after = model_starts(entries, m->block_pages[block]);
	ram_get_counts(m->rig.ram, &c);
	return after > before && c.maps + c.other_maps + after - before > c.budget_maps ? -EDQUOT : 0;
}

static RIG_UNUSED const char *model_map_overlay(struct model *m, unsigned block, uint64_t page, uint64_t pages,
						unsigned file, uint64_t file_page)
{
	const struct rig_file *f = &m->rig.files[file];
	int verdict = model_overlay_verdict(m, block, page, pages, file, file_page), r;
	const char *why;

	model_keep_all(m);
	for (uint64_t i = 0; !verdict && i < pages; i++)
		model_allow(model_goal(m, block, page + i, entry_overlay(f->index, file_page + i)),
			    rig_file_tag(file, f->version, file_page + i));
	ram_lock(m->rig.ram);
	r = ram_map_overlay(m->rig.ram, m->rig.blocks[block].ram, page, pages, f->index, file_page);
	ram_unlock(m->rig.ram);
	why = model_compare_result(m, r, verdict);
	return why ? why : model_check_reached(m, r);
}

static RIG_UNUSED const char *model_return_base(struct model *m, unsigned block, uint64_t page, uint64_t pages)
{
	const char *why;
	int r;

	model_keep_all(m);
	for (uint64_t i = page; i < page + pages; i++)
		if (model_is_overlay(&m->pages[block][i]))
			model_allow(model_goal(m, block, i, ENTRY_BASE), m->pages[block][i].beneath);
	ram_lock(m->rig.ram);
	r = ram_return_base(m->rig.ram, m->rig.blocks[block].ram, page, pages);
	ram_unlock(m->rig.ram);
	why = model_compare_result(m, r, 0);
	return why ? why : model_check_reached(m, r);
}

static inline const char *model_check_discarded(struct model *m, unsigned block, uint64_t page, uint64_t pages)
{
	for (uint64_t i = page; i < page + pages; i++) {
		if (m->pages[block][i].tag)
			return rig_wrong(&m->rig, "block %u page %" PRIu64 ": not zero after a discard", block, i);
		if (rig_has_memory_beneath(&m->rig, block, i) && !model_may_fail(m) && !m->touch_all)
			return rig_wrong(&m->rig, "block %u page %" PRIu64 ": memory after a discard", block, i);
	}
	return NULL;
}

static RIG_UNUSED const char *model_discard(struct model *m, unsigned block, uint64_t page, uint64_t pages)
{
	struct ram_counts c;
	const char *why;
	int r;

	model_keep_all(m);
	for (uint64_t i = page; i < page + pages; i++)
		model_allow(model_goal(m, block, i, ENTRY_BASE), 0);
	m->zero_on_keep = true;
	ram_get_counts(m->rig.ram, &c);
	m->keep_allowed = c.maps + c.other_maps + 2 > c.budget_maps; /* a hole in an overlay makes two more */
	ram_lock(m->rig.ram);
	r = ram_discard(m->rig.ram, m->rig.blocks[block].ram, page, pages);
	ram_unlock(m->rig.ram);
	why = model_compare_result(m, r, 0);
	if (!why && r)
		why = rig_wrong(&m->rig, "a discard returned %d", r);
	return why ? why : model_check_discarded(m, block, page, pages);
}

/* Contents and mapping stay; `file`'s overlays become private copies. */
static RIG_UNUSED const char *model_privatize(struct model *m, unsigned file)
{
	const char *why;
	int r;

	model_keep_all(m);
	for (unsigned b = 0; b < RIG_BLOCKS; b++)
		for (uint64_t i = 0; i < m->block_pages[b]; i++)
			if (model_of_file(m, &m->pages[b][i], file)) {
				struct model_goal *g = model_goal(m, b, i, m->pages[b][i].entry);

				model_allow(g, m->pages[b][i].tag);
				g->written = true;
				g->written_unknown = m->real_failures || m->armed_nth[OS_FAULT_POPULATE];
				m->splits_allowed = true;
			}
	r = ram_privatize(m->rig.ram, m->rig.files[file].index);
	why = model_compare_result(m, r, 0);
	for (unsigned b = 0; !r && !why && b < RIG_BLOCKS; b++)
		for (uint64_t i = 0; i < m->block_pages[b]; i++)
			if (m->goals[b][i].changes &&
			    (!m->pages[b][i].written || !entry_is_private(rig_entry(&m->rig, b, i))))
				return rig_wrong(&m->rig, "privatize returned 0, block %u page %" PRIu64 " is clean", b, i);
	return why;
}

static inline void model_goal_settle(struct model *m, unsigned block, uint64_t page)
{
	if (model_is_overlay(&m->pages[block][page]))
		model_allow(model_goal(m, block, page, ENTRY_BASE), m->pages[block][page].tag);
}

/* `settled` must be the pages that were to change and are base now. */
static inline const char *model_check_settled(struct model *m, uint64_t settled)
{
	uint64_t now_base = 0;

	for (unsigned b = 0; b < RIG_BLOCKS; b++)
		for (uint64_t i = 0; i < m->block_pages[b]; i++)
			now_base += m->goals[b][i].changes && !model_is_overlay(&m->pages[b][i]);
	return now_base == settled ? NULL : rig_wrong(&m->rig, "settled %" PRIu64 " pages, says %" PRIu64, now_base,
						      settled);
}

static inline const char *model_finish_settle(struct model *m, int r, uint64_t settled)
{
	const char *why = model_compare_result(m, r, 0);

	if (!why)
		why = model_check_reached(m, r);
	return why ? why : model_check_settled(m, settled);
}

static RIG_UNUSED const char *model_settle(struct model *m, unsigned block, uint64_t page, uint64_t pages)
{
	uint64_t settled = 0;
	int r;

	model_keep_all(m);
	for (uint64_t i = page; i < page + pages; i++)
		model_goal_settle(m, block, i);
	ram_lock(m->rig.ram);
	r = ram_settle(m->rig.ram, m->rig.blocks[block].ram, page, pages, &settled);
	ram_unlock(m->rig.ram);
	return model_finish_settle(m, r, settled);
}

/* Of overlays only what the guest has written; where mappings are short, less of it. */
static RIG_UNUSED const char *model_settle_copies(struct model *m, unsigned block, uint64_t page, uint64_t pages)
{
	uint64_t settled = 0;
	struct ram_counts c;
	const char *why;
	int r;

	model_keep_all(m);
	for (uint64_t i = page; i < page + pages; i++)
		if (m->pages[block][i].written)
			model_goal_settle(m, block, i);
	ram_get_counts(m->rig.ram, &c);
	m->keep_allowed = c.maps + c.other_maps + 2 * pages > c.budget_maps; /* each copy may need two more */
	ram_lock(m->rig.ram);
	r = ram_settle_copies(m->rig.ram, m->rig.blocks[block].ram, page, pages, &settled);
	ram_unlock(m->rig.ram);
	why = model_compare_result(m, r, 0);
	if (!why && !m->keep_allowed)
		why = model_check_reached(m, r);
	return why ? why : model_check_settled(m, settled);
}

static RIG_UNUSED const char *model_detach(struct model *m, unsigned file)
{
	uint64_t settled = 0;
	int r;

	model_keep_all(m);
	for (unsigned b = 0; b < RIG_BLOCKS; b++)
		for (uint64_t i = 0; i < m->block_pages[b]; i++)
			if (model_of_file(m, &m->pages[b][i], file))
				model_goal_settle(m, b, i);
	ram_lock(m->rig.ram);
	r = ram_detach(m->rig.ram, m->rig.files[file].index, &settled);
	ram_unlock(m->rig.ram);
	return model_finish_settle(m, r, settled);
}

static RIG_UNUSED const char *model_reconcile(struct model *m)
{
	int r;

	model_keep_all(m);
	r = ram_reconcile(m->rig.ram);
	if (r)
		return rig_wrong(&m->rig, "reconcile returned %d", r);
	return model_compare(m, true);
}

static RIG_UNUSED const char *model_guest_writes(struct model *m, unsigned block, uint64_t page, uint64_t pages)
{
	model_keep_all(m);
	for (uint64_t i = page; i < page + pages; i++) {
		struct model_page *p = &m->pages[block][i];

		p->tag = ++m->next_tag;
		p->written = model_is_overlay(p);
		m->splits_allowed |= p->written;
		rig_write(rig_hva(&m->rig, block, i), p->tag);
	}
	return model_compare(m, false);
}

static RIG_UNUSED const char *model_guest_reads(struct model *m, unsigned block, uint64_t page)
{
	model_keep_all(m);
	if (!rig_holds(rig_hva(&m->rig, block, page), m->pages[block][page].tag))
		return rig_wrong(&m->rig, "block %u page %" PRIu64 ": the guest reads something else", block, page);
	return model_compare(m, false);
}

/* What the activity scan does: drops page-table entries of base. */
static RIG_UNUSED const char *model_zap(struct model *m, unsigned block, uint64_t page, uint64_t pages)
{
	model_keep_all(m);
	for (uint64_t i = page; i < page + pages; i++)
		if (!model_is_overlay(&m->pages[block][i]) &&
		    madvise(rig_hva(&m->rig, block, i), OS_PAGE_BYTES, MADV_DONTNEED))
			return rig_wrong(&m->rig, "zap failed: %d", errno);
	return model_compare(m, false);
}

/* The same of overlays: private copies stay. */
static RIG_UNUSED const char *model_zap_clean(struct model *m, unsigned block, uint64_t page, uint64_t pages)
{
	struct ram_block *b = m->rig.blocks[block].ram;
	int r;

	model_keep_all(m);
	ram_lock(m->rig.ram);
	r = ram_update_private(m->rig.ram, b, page, pages);
	if (!r)
		r = ram_zap_clean(m->rig.ram, b, page, pages);
	ram_unlock(m->rig.ram);
	return model_compare_result(m, r, 0);
}

/* Somebody rewrites a file, which is allowed once nobody maps its pages. */
static RIG_UNUSED const char *model_rewrite_file(struct model *m, unsigned file)
{
	struct rig_file *f = &m->rig.files[file];

	model_keep_all(m);
	for (unsigned b = 0; b < RIG_BLOCKS; b++)
		for (uint64_t i = 0; i < m->block_pages[b]; i++)
			if (model_of_file(m, &m->pages[b][i], file) && !m->pages[b][i].written)
				return NULL;
	rig_write_file(f, (f->version + 1) & 0xffff);
	return model_compare(m, false);
}

/* The RAM block is unplugged, and one of the same memory plugged in. */
static RIG_UNUSED const char *model_replug(struct model *m, unsigned block)
{
	struct rig_block *b = &m->rig.blocks[block];

	model_keep_all(m);
	ram_lock(m->rig.ram);
	ram_remove_block(m->rig.ram, b->ram);
	ram_unlock(m->rig.ram);
	rig_map_block(b);
	b->ram = NULL;
	if (rig_add_block(&m->rig, block))
		return rig_wrong(&m->rig, "the block cannot be added again");
	for (uint64_t i = 0; i < m->block_pages[block]; i++) {
		struct model_page *p = &m->pages[block][i];

		if (model_is_overlay(p))
			*p = (struct model_page){ .entry = ENTRY_BASE, .tag = p->beneath };
	}
	return model_compare(m, false);
}

static RIG_UNUSED const char *model_advise(struct model *m, unsigned block, int advice)
{
	struct rig_block *b = &m->rig.blocks[block];

	model_keep_all(m);
	if (madvise(b->hva, os_bytes(b->pages), advice))
		return rig_wrong(&m->rig, "madvise %d failed: %d", advice, errno);
	ram_lock(m->rig.ram);
	ram_remember_advice(m->rig.ram, b->hva, os_bytes(b->pages), advice);
	ram_unlock(m->rig.ram);
	return model_compare(m, false);
}

#endif
