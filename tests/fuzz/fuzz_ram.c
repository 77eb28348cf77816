/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Bytes as a sequence of transitions, guest accesses and failures on a small guest RAM, compared with
 * the model of tests/unit/ram_model.h after each. With FUZZ_TRACE=1 it says what each input does.
 *
 * Input: a byte of settings, then operations of one to six bytes (see `operations`).
 */
#include "../unit/ram_model.h"

#include "fuzz.h"

#define FILE_PAGES 96
#define MAX_OPERATIONS 64

static const uint64_t block_pages[RIG_BLOCKS] = { 40, 24 };

const struct fuzz_target fuzz_target = { "ram", 256, NULL, false };

/* ---- reading the input ---------------------------------------------------------------------- */

struct input {
	struct fuzz_reader bytes;
	struct model *m;
	bool trace;
};

static uint8_t next(struct input *in) { return fuzz_byte(&in->bytes); }

struct part {
	unsigned block;
	uint64_t page, pages;
};

/* Three bytes; always inside the block. */
static struct part next_part(struct input *in)
{
	struct part p = { .block = next(in) % RIG_BLOCKS };

	p.page = next(in) % block_pages[p.block];
	p.pages = 1 + next(in) % (block_pages[p.block] - p.page);
	return p;
}

static void trace(const struct input *in, const char *what, const struct part *p)
{
	if (!in->trace)
		return;
	if (p)
		fprintf(stderr, "%s block %u page %" PRIu64 " +%" PRIu64 "\n", what, p->block, p->page, p->pages);
	else
		fprintf(stderr, "%s\n", what);
}

/* ---- operations ----------------------------------------------------------------------------- */

/* The last byte: 0xff: somewhere in the file; else as near to block offset = file offset as to merge. */
static const char *do_overlay(struct input *in)
{
	struct part p = next_part(in);
	unsigned file = next(in) % RIG_FILES;
	uint8_t shift = next(in);
	uint64_t file_page = shift & 0x80 ? shift % FILE_PAGES : p.page + shift % 4;

	trace(in, "overlay", &p);
	return model_map_overlay(in->m, p.block, p.page, p.pages, file, file_page);
}

/* Not cut to what is there. */
static const char *do_wild_overlay(struct input *in)
{
	struct part p = { .block = next(in) % RIG_BLOCKS, .page = next(in), .pages = next(in) };

	trace(in, "wild overlay", &p);
	return model_map_overlay(in->m, p.block, p.page, p.pages, next(in) % RIG_FILES, next(in));
}

static const char *do_return(struct input *in)
{
	struct part p = next_part(in);

	trace(in, "return", &p);
	return model_return_base(in->m, p.block, p.page, p.pages);
}

static const char *do_discard(struct input *in)
{
	struct part p = next_part(in);

	trace(in, "discard", &p);
	return model_discard(in->m, p.block, p.page, p.pages);
}

static const char *do_settle(struct input *in)
{
	struct part p = next_part(in);

	trace(in, "settle", &p);
	return model_settle(in->m, p.block, p.page, p.pages);
}

static const char *do_privatize(struct input *in)
{
	trace(in, "privatize", NULL);
	return model_privatize(in->m, next(in) % RIG_FILES);
}

static const char *do_detach(struct input *in)
{
	trace(in, "detach", NULL);
	return model_detach(in->m, next(in) % RIG_FILES);
}

static const char *do_reconcile(struct input *in)
{
	trace(in, "reconcile", NULL);
	return model_reconcile(in->m);
}

static const char *do_write(struct input *in)
{
	struct part p = { .block = next(in) % RIG_BLOCKS, .pages = 1 };

	p.page = next(in) % block_pages[p.block];
	trace(in, "write", &p);
	return model_guest_writes(in->m, p.block, p.page, 1);
}

static const char *do_read(struct input *in)
{
	struct part p = { .block = next(in) % RIG_BLOCKS, .pages = 1 };

	p.page = next(in) % block_pages[p.block];
	trace(in, "read", &p);
	return model_guest_reads(in->m, p.block, p.page);
}

static const char *do_zap(struct input *in)
{
	struct part p = next_part(in);

	trace(in, "zap", &p);
	return model_zap(in->m, p.block, p.page, p.pages);
}

static const char *do_zap_clean(struct input *in)
{
	struct part p = next_part(in);

	trace(in, "zap clean", &p);
	return model_zap_clean(in->m, p.block, p.page, p.pages);
}

static const char *do_settle_copies(struct input *in)
{
	struct part p = next_part(in);

	trace(in, "settle copies", &p);
	return model_settle_copies(in->m, p.block, p.page, p.pages);
}

static const char *do_rewrite(struct input *in)
{
	trace(in, "rewrite", NULL);
	return model_rewrite_file(in->m, next(in) % RIG_FILES);
}

static const char *do_replug(struct input *in)
{
	trace(in, "replug", NULL);
	return model_replug(in->m, next(in) % RIG_BLOCKS);
}

static const char *do_advise(struct input *in)
{
	static const int advices[] = { MADV_DONTFORK, MADV_DOFORK, MADV_DONTDUMP, MADV_DODUMP };

	trace(in, "advise", NULL);
	return model_advise(in->m, next(in) % RIG_BLOCKS, advices[next(in) % 4]);
}

static const char *do_arm(struct input *in)
{
	static const int errors[] = { ENOMEM, EAGAIN, EACCES, ENODEV };
	enum os_fault_point point = (enum os_fault_point)(next(in) % OS_FAULT_STORAGE_READ);
	uint8_t how = next(in);

	if (in->trace)
		fprintf(stderr, "arm point %u, call %u\n", point, 1 + how % 4);
	model_arm(in->m, point, 1 + how % 4, errors[how / 4 % 4]);
	return NULL;
}

static const char *do_arm_hole(struct input *in)
{
	trace(in, "arm hole", NULL);
	model_arm_hole(1 + next(in) % 4);
	return NULL;
}

/* The number of an operation in an input is its place here, modulo the number of places. (What comes later takes the place
 * of a second mention, so that old inputs say what they said.) */
static const char *(*const operations[])(struct input *) = {
	do_overlay, do_return, do_discard, do_settle, do_privatize, do_detach, do_reconcile, do_write,
	do_read, do_zap, do_rewrite, do_replug, do_advise, do_arm, do_arm_hole, do_wild_overlay,
	do_overlay, do_return, do_discard, do_settle_copies, do_privatize, do_detach, do_reconcile, do_write,
	do_read, do_zap_clean, do_rewrite, do_replug, do_settle_copies, do_arm, do_arm_hole, do_zap_clean,
};
#define OPERATIONS (sizeof operations / sizeof operations[0])

/* ---- one input ------------------------------------------------------------------------------ */

/* Mappings that the rig adds to the process: measured once. */
static uint64_t rig_maps(void)
{
	static uint64_t added;
	static struct model m;
	uint64_t before;
	struct ram_counts c;

	if (added)
		return added;
	if (os_count_maps(&before))
		abort();
	model_open(&m, block_pages, FILE_PAGES, 1);
	ram_get_counts(m.rig.ram, &c);
	model_close(&m);
	return added = c.maps + c.other_maps - before;
}

/* Bits 1 and 2 of the settings: as many as one likes, or room for few more. */
static uint64_t budget_of(uint8_t settings)
{
	static const uint64_t room[] = { 0, 2, 5, 12 };
	uint64_t now;

	if (!(settings & 6))
		return UINT64_C(1) << 40;
	(void)rig_maps();
	if (os_count_maps(&now))
		abort();
	return now + rig_maps() + room[settings >> 1 & 3];
}

static void report(const struct input *in, const uint8_t *data, const char *why)
{
	fprintf(stderr, "fuzz_ram: after %zu bytes: %s\ninput:", (size_t)(in->bytes.at - data), why);
	for (const uint8_t *at = data; at < in->bytes.end; at++)
		fprintf(stderr, " %02x", *at);
	fprintf(stderr, "\n");
	abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	static struct model m;
	struct input in = { .bytes = { data, data + bytes }, .m = &m, .trace = getenv("FUZZ_TRACE") };
	uint8_t settings = next(&in);
	const char *why = NULL;

	model_open(&m, block_pages, FILE_PAGES, budget_of(settings));
	m.touch_all = settings & 1;
	for (unsigned n = 0; !why && in.bytes.at < in.bytes.end && n < MAX_OPERATIONS; n++)
		why = operations[next(&in) % OPERATIONS](&in);
	if (!why)
		why = model_reconcile(&m);
	if (why)
		report(&in, data, why);
	model_close(&m);
	return 0;
}
