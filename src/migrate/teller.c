/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "migrate/teller.h"

#include "activity/order.h"
#include "core/entry.h"
#include "core/origin.h"
#include "migrate/have.h"
#include "os/os.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* LACKED: to be told, and not as one that the destination has or that is on a disk. OWED: told as missing; its contents are still to come. */
enum state { TOLD, TO_TELL, LACKED, OWED };

/* Private copies of pages of an overlay, in the order of pages. */
struct copies {
	uint64_t page, pages;
	const uint8_t *contents;
};

struct teller {
	struct source_view view;
	const struct control_layout *layout;
	uint64_t there;
	int volume_fd[SNAPSHOT_VOLUMES]; /* of those that are not there; -1: not opened yet */
	uint8_t *state;                  /* of each page */
	bool *stale;                     /* of each page: a hint was; there is no other */
	uint64_t left, lacked;           /* lacked: those of them that are LACKED */
	bool stands;                     /* the guest, and for good */
	struct activity_order *order;    /* of what is to be told; NULL: the next one to be told is the first */
	struct activity_run run;         /* of the order; the first of it is the next one. A table is a block */
	struct copies *copies;
	uint64_t copies_count;
	struct {
		uint64_t from, to; /* pages of all blocks; empty: not known */
		bool data;
	} extent; /* of base */
	uint64_t *had; /* digests, in their order */
	uint64_t had_count;
	struct wire_same same[WIRE_SAME_MAX];
	size_t same_count;
	struct hint_numbers numbers;
	struct wire_hint hint[WIRE_HINTS_MAX];
	size_t hint_count;
	struct teller_counts counts;
};

int teller_create(struct source *source, uint64_t there, struct teller **ret_teller, char why[SNAPSHOT_WHY_BYTES])
{
	struct teller *t = calloc(1, sizeof *t);

	if (t) {
		source_get_view(source, &t->view);
		t->layout = source_layout(source);
		t->there = there;
		memset(t->volume_fd, -1, sizeof t->volume_fd);
		memset(&t->numbers, -1, sizeof t->numbers);
		t->state = malloc((size_t)t->view.pages);
		t->stale = calloc((size_t)t->view.pages, sizeof *t->stale);
	}
	if (!t || !t->state || !t->stale) {
		teller_destroy(t);
		return snapshot_fail(why, -ENOMEM, "no memory to keep account of the pages");
	}
	memset(t->state, TO_TELL, (size_t)t->view.pages);
	t->left = t->view.pages;
	*ret_teller = t;
	return 0;
}

void teller_destroy(struct teller *t)
{
	if (!t)
		return;
	for (uint32_t i = 0; i < SNAPSHOT_VOLUMES; i++)
		if (t->volume_fd[i] >= 0)
			close(t->volume_fd[i]);
	activity_order_destroy(t->order);
	free(t->had);
	free(t->copies);
	free(t->stale);
	free(t->state);
	free(t);
}

/* ---- passes ----------------------------------------------------------------------------------------- */

static uint64_t entry_of(const struct source_block *b, uint64_t page)
{
	return __atomic_load_n(&b->entries[page - b->first], __ATOMIC_RELAXED);
}

static void rewind_order(struct teller *t)
{
	activity_order_destroy(t->order);
	t->order = NULL;
	t->run.pages = 0;
}

static void set_state(struct teller *t, uint64_t page, enum state state)
{
	t->left += state != TOLD;
	t->left -= t->state[page] != TOLD;
	t->lacked += state == LACKED;
	t->lacked -= t->state[page] == LACKED;
	t->state[page] = (uint8_t)state;
}

/* Most pages have not changed. */
static void begin_pass(struct teller *t)
{
	rewind_order(t);
	t->extent.from = t->extent.to = 0;
	for (uint32_t i = 0; i < t->view.blocks; i++) {
		const struct source_block *b = &t->view.block[i];

		for (uint8_t *at = b->changed; (at = memchr(at, 1, (size_t)(b->changed + b->pages - at))); *at = 0)
			set_state(t, b->first + (uint64_t)(at - b->changed), TO_TELL);
	}
}

uint64_t teller_collect(struct teller *t)
{
	begin_pass(t);
	return t->left;
}

static int by_page(const void *a, const void *b)
{
	const struct copies *x = a, *y = b;

	return x->page < y->page ? -1 : x->page > y->page;
}

/* -ENOMEM. */
static int take_copies(struct teller *t)
{
	t->copies = malloc((t->view.run_count ? t->view.run_count : 1) * sizeof *t->copies);
	if (!t->copies)
		return -ENOMEM;
	for (uint64_t i = 0; i < t->view.run_count; i++) {
		const struct control_run *run = &t->view.runs[i];
		uint64_t page = t->view.block[run->block].first + run->page;

		t->copies[i] = (struct copies){ page, run->pages, t->view.copies + os_bytes(page) };
		for (uint64_t n = 0; n < run->pages; n++)
			set_state(t, page + n, TO_TELL);
	}
	t->copies_count = t->view.run_count;
	qsort(t->copies, (size_t)t->copies_count, sizeof *t->copies, by_page);
	return 0;
}

int teller_collect_last(struct teller *t, struct source *source, char why[SNAPSHOT_WHY_BYTES])
{
	source_get_view(source, &t->view);
	t->stands = true;
	if (take_copies(t))
		return snapshot_fail(why, -ENOMEM, "no memory for the list of copied pages");
	begin_pass(t);
	return 0;
}

/* ---- what a page holds -------------------------------------------------------------------------------- */

static const uint8_t *copy_of(const struct teller *t, uint64_t page)
{
	uint64_t low = 0, high = t->copies_count;

	while (low < high) {
		uint64_t middle = (low + high) / 2;
		const struct copies *c = &t->copies[middle];

		if (page < c->page)
			high = middle;
		else if (page - c->page < c->pages)
			return c->contents + os_bytes(page - c->page);
		else
			low = middle + 1;
	}
	return NULL;
}

static bool base_has_data(struct teller *t, const struct source_block *b, uint64_t page)
{
	uint64_t from, to, at = b->memfd_offset + os_bytes(page - b->first), end = b->memfd_offset + os_bytes(b->pages);

	if (page >= t->extent.from && page < t->extent.to)
		return t->extent.data;
	t->extent.from = page;
	t->extent.data = false;
	t->extent.to = b->first + b->pages;
	if (!os_next_data(b->memfd, at, end, &from, &to))
		return false;
	t->extent.data = from <= at;
	t->extent.to = b->first + (((t->extent.data ? to : from) - b->memfd_offset) >> OS_PAGE_SHIFT);
	return t->extent.data;
}

static int volume_of(const struct teller *t, unsigned file)
{
	for (uint32_t i = 0; i < t->layout->volumes; i++)
		if (t->layout->volume[i].file == file)
			return (int)i;
	return -1;
}

/* The file must be the one that the VMM maps. */
static int open_volume(struct teller *t, int volume, char why[SNAPSHOT_WHY_BYTES])
{
	const struct control_volume *v = &t->layout->volume[volume];
	struct stat st;
	int fd = open(v->path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return snapshot_fail(why, -errno, "%.200s cannot be read: %s", v->path, strerror(errno));
	if (fstat(fd, &st) || st.st_dev != v->dev || st.st_ino != v->ino) {
		close(fd);
		return snapshot_fail(why, -ESTALE, "%.150s has been replaced, and RAM maps the file that was there: put that back",
				     v->path);
	}
	t->volume_fd[volume] = fd;
	return 0;
}

static int read_volume(struct teller *t, int volume, uint64_t page, uint8_t *contents, char why[SNAPSHOT_WHY_BYTES])
{
	int r = t->volume_fd[volume] < 0 ? open_volume(t, volume, why) : 0;

	if (r)
		return r;
	r = os_read_all(t->volume_fd[volume], contents, OS_PAGE_BYTES, os_bytes(page));
	t->counts.contents_instead += !r;
	return r ? snapshot_fail(why, r, "%.200s cannot be read: %s", t->layout->volume[volume].path, strerror(-r)) : 0;
}

/* What is to be said of a page. */
struct saying {
	struct wire_run run;
	uint64_t digest;         /* and the quick one of that. */
	const uint8_t *contents; /* of WIRE_DATA; NULL: not read, if only the kind was asked for */
	bool later;              /* nobody can know it before the guest stands */
};

static void say_contents(struct saying *s, const uint8_t *contents)
{
	struct snapshot_page class = snapshot_classify(contents);

	s->run.kind = class.kind == SNAPSHOT_WORD ? WIRE_WORD : WIRE_DATA;
	s->run.value = class.kind == SNAPSHOT_WORD ? class.value : 0;
	s->digest = class.value;
	s->contents = contents;
}

/* A page of an overlay that is no private copy. */
static int say_overlay(struct teller *t, uint64_t entry, bool cheaply, uint8_t *room, struct saying *s,
		       char why[SNAPSHOT_WHY_BYTES])
{
	bool cached = t->view.cache_fd >= 0 && entry_file(entry) == t->layout->cache_file;
	int volume = cached ? -1 : volume_of(t, entry_file(entry)), r;

	if (!cached && volume < 0)
		return snapshot_fail(why, -EPROTO, "the VM's agent names a file that it has not told of");
	if (!cached && t->there >> volume & 1) {
		s->run.kind = WIRE_VOLUME;
		s->run.volume = (uint16_t)volume;
		s->run.value = entry_file_page(entry);
		return 0;
	}
	s->run.kind = WIRE_DATA;
	if (cheaply)
		return 0;
	r = cached ? os_read_all(t->view.cache_fd, room, OS_PAGE_BYTES, os_bytes(entry_file_page(entry)))
		   : read_volume(t, volume, entry_file_page(entry), room, why);
	if (r)
		return cached ? snapshot_fail(why, r, "the pager's cache cannot be read: %s", strerror(-r)) : r;
	say_contents(s, room);
	return 0;
}

/* `cheaply`: contents are not looked at. `room`: for a page. */
static int say(struct teller *t, const struct source_block *b, uint64_t page, bool cheaply, uint8_t *room,
	       struct saying *s, char why[SNAPSHOT_WHY_BYTES])
{
	uint64_t entry = entry_of(b, page);
	const uint8_t *copy = t->copies_count ? copy_of(t, page) : NULL;

	*s = (struct saying){ .run = { .page = page, .pages = 1, .kind = WIRE_DATA } };
	if (copy) {
		if (!cheaply)
			say_contents(s, copy);
		return 0;
	}
	if (entry_source(entry) == ENTRY_OVERLAY && entry_is_private(entry)) {
		s->later = !t->stands;
		return t->stands ? snapshot_fail(why, -EPROTO, "the VM's agent has no copy of a page that the guest wrote") : 0;
	}
	if (entry_source(entry) == ENTRY_OVERLAY)
		return say_overlay(t, entry, cheaply, room, s, why);
	if (!base_has_data(t, b, page))
		s->run.kind = WIRE_WORD;
	else if (!cheaply)
		say_contents(s, b->base + os_bytes(page - b->first));
	return 0;
}

/* ---- what the destination has already ----------------------------------------------------------------- */

static int by_number(const void *a, const void *b)
{
	const uint64_t *x = a, *y = b;

	return (*x > *y) - (*x < *y);
}

void teller_had(struct teller *t, uint64_t *digests, uint64_t count)
{
	if (count)
		qsort(digests, (size_t)count, sizeof *digests, by_number);
	t->had = digests;
	t->had_count = count;
}

/* Behind the pause there is no time to be told that it is not so. */
static bool may_have(const struct teller *t, uint64_t page, const struct saying *s)
{
	return t->had_count && !t->stands && t->state[page] == TO_TELL && s->run.kind == WIRE_DATA &&
	       bsearch(&s->digest, t->had, (size_t)t->had_count, sizeof s->digest, by_number);
}

/* If the guest writes it meanwhile, the digests may be of two contents, or of none: it is told again. */
static bool add_same(struct teller *t, uint64_t page, const struct saying *s)
{
	struct wire_same *same = &t->same[t->same_count];

	*same = (struct wire_same){ .page = page, .digest = s->digest };
	if (!have_digest(s->contents, same->sha256))
		return false;
	t->same_count++;
	t->counts.same++;
	return true;
}

const struct wire_same *teller_same(struct teller *t, size_t *ret_count)
{
	*ret_count = t->same_count;
	t->same_count = 0;
	return t->same;
}

/* ---- what is on a disk -------------------------------------------------------------------------------- */

void teller_may_hint(struct teller *t, const struct hint_numbers *numbers)
{
	t->numbers = *numbers;
}

/* The place that the page was read from, or written to, if it has not become something else since. -1: there is none. What was
 * stale once would be so again: where its sample sees nothing of what the guest writes, in each pass. */
static int32_t find_hint(const struct teller *t, const struct source_block *b, uint64_t page, const struct saying *s,
			 uint64_t *file_page)
{
	uint64_t origin;

	if (t->stands || t->state[page] != TO_TELL || t->stale[page] || s->run.kind != WIRE_DATA)
		return -1;
	origin = __atomic_load_n(&b->origins[page - b->first], __ATOMIC_RELAXED);
	*file_page = origin_file_page(origin);
	if (!origin || origin_file(origin) >= t->layout->origins || !origin_fits(origin, s->contents))
		return -1;
	return t->numbers.file[origin_file(origin)];
}

/* As add_same. */
static bool add_hint(struct teller *t, const struct source_block *b, uint64_t page, const struct saying *s)
{
	struct wire_hint *hint = &t->hint[t->hint_count];
	uint64_t file_page;
	int32_t file = find_hint(t, b, page, s, &file_page);

	if (file < 0)
		return false;
	*hint = (struct wire_hint){ .page = page, .file_page = file_page, .file = (uint32_t)file };
	if (!have_digest(s->contents, hint->sha256))
		return false;
	t->hint_count++;
	t->counts.hints++;
	return true;
}

static int by_place(const void *a, const void *b)
{
	const struct wire_hint *x = a, *y = b;

	if (x->file != y->file)
		return x->file < y->file ? -1 : 1;
	return (x->file_page > y->file_page) - (x->file_page < y->file_page);
}

const struct wire_hint *teller_hints(struct teller *t, size_t *ret_count)
{
	qsort(t->hint, t->hint_count, sizeof t->hint[0], by_place);
	*ret_count = t->hint_count;
	t->hint_count = 0;
	return t->hint;
}

/* ---- telling ------------------------------------------------------------------------------------------- */

static void count(struct teller *t, const struct saying *s)
{
	t->counts.words += s->run.kind == WIRE_WORD;
	t->counts.volume += s->run.kind == WIRE_VOLUME;
	t->counts.data += s->run.kind == WIRE_DATA;
}

/* While the guest runs, what it will write again comes last; when it waits, what it will touch comes first. */
static int make_order(struct teller *t)
{
	struct activity_table tables[SNAPSHOT_BLOCKS];

	for (uint32_t i = 0; i < t->view.blocks; i++) {
		const struct source_block *b = &t->view.block[i];

		tables[i] = (struct activity_table){ b->entries, b->pages, t->state + b->first };
	}
	return activity_order_create(tables, t->view.blocks, t->stands ? ACTIVITY_HOTTEST_FIRST : ACTIVITY_COLDEST_FIRST,
				     &t->order);
}

/* Is there one more, in one of these states (bits)? It is the first of the run. Else the order is over. */
static bool next_page(struct teller *t, unsigned states)
{
	do {
		for (; t->run.pages; t->run.page++, t->run.pages--)
			if (1u << t->state[t->view.block[t->run.table].first + t->run.page] & states)
				return true;
	} while (activity_order_next(t->order, &t->run));
	rewind_order(t);
	return false;
}

/* What others write meanwhile is told again: the page is changed then. */
static int tell(struct teller *t, const struct source_block *b, uint64_t page, bool missing, struct wire_batch *batch,
		bool *ret_full, char why[SNAPSHOT_WHY_BYTES])
{
	static uint8_t room[OS_PAGE_BYTES]; /* one thread */
	struct saying s;
	int r = say(t, b, page, missing, room, &s, why);

	if (r || s.later)
		return r;
	if (may_have(t, page, &s) && add_same(t, page, &s)) {
		set_state(t, page, TOLD);
		*ret_full = t->same_count == WIRE_SAME_MAX;
		return 0;
	}
	if (!missing && add_hint(t, b, page, &s)) {
		set_state(t, page, TOLD);
		*ret_full = t->hint_count == WIRE_HINTS_MAX;
		return 0;
	}
	if (missing && s.run.kind == WIRE_DATA)
		s.run.kind = WIRE_MISSING;
	*ret_full = !wire_add(batch, &s.run, s.contents);
	if (!*ret_full) {
		set_state(t, page, s.run.kind == WIRE_MISSING ? OWED : TOLD);
		count(t, &s);
	}
	return 0;
}

static int fill(struct teller *t, struct wire_batch *batch, unsigned states, bool missing, char why[SNAPSHOT_WHY_BYTES])
{
	bool full = false;
	int r = 0;

	if (!t->left)
		return 0;
	if (!t->order && make_order(t))
		return snapshot_fail(why, -ENOMEM, "no memory for the order of the pages");
	while (!r && next_page(t, states)) {
		const struct source_block *b = &t->view.block[t->run.table];

		r = tell(t, b, b->first + t->run.page, missing, batch, &full, why);
		if (r || full)
			break;
		t->run.page++;
		t->run.pages--;
	}
	return r;
}

int teller_fill(struct teller *t, struct wire_batch *batch, char why[SNAPSHOT_WHY_BYTES])
{
	return fill(t, batch, 1u << TO_TELL | 1u << LACKED | 1u << OWED, false, why);
}

int teller_fill_missing(struct teller *t, struct wire_batch *batch, char why[SNAPSHOT_WHY_BYTES])
{
	return fill(t, batch, 1u << TO_TELL | 1u << LACKED, true, why);
}

int teller_add(struct teller *t, uint64_t page, struct wire_batch *batch, bool *ret_full, char why[SNAPSHOT_WHY_BYTES])
{
	const struct source_block *b = &t->view.block[0];

	while (page >= b->first + b->pages)
		b++;
	return tell(t, b, page, false, batch, ret_full, why);
}

void teller_lack(struct teller *t, uint64_t page)
{
	t->counts.lacked++;
	set_state(t, page, LACKED);
}

void teller_stale(struct teller *t, uint64_t page)
{
	t->counts.stale++;
	t->stale[page] = true;
	set_state(t, page, LACKED);
}

void teller_forget(struct teller *t)
{
	rewind_order(t);
	memset(t->state, TOLD, (size_t)t->view.pages);
	t->left = t->lacked = 0;
	t->there = 0;
}

void teller_owe(struct teller *t, uint64_t page, uint64_t pages)
{
	rewind_order(t);
	for (uint64_t i = page; i < page + pages; i++)
		set_state(t, i, OWED);
}

uint64_t teller_left(const struct teller *t)
{
	return t->left;
}

uint64_t teller_lacked(const struct teller *t)
{
	return t->lacked;
}

void teller_get_counts(const struct teller *t, struct teller_counts *counts)
{
	*counts = t->counts;
}
