/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * One read: cut into areas that are contiguous in guest RAM, each area into whole pages that may be
 * mapped and the rest that is copied. What is copied is gathered and read with as few calls as
 * possible, in the order of the file, so that a short read or an error looks as it always did.
 */
#include "volume/internal.h"

#include "core/origin.h"
#include "os/os.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SCRATCH_BYTES (64u << 10)
#define SHORT_PAGES 8u
#define AHEAD_PAGES 256u     /* read ahead of a sequential reader at most */
#define AHEAD_FROM_PAGES 32u /* that has read so much in one go */

struct reader {
	struct volumes *all;
	struct volume *v; /* NULL: not a volume, all is copied */
	int fd;
	off_t offset;         /* in the file, of the first byte that is neither mapped nor gathered */
	size_t done;          /* bytes that are in place */
	struct iovec *gathered; /* IOV_MAX of them, in the caller's frame: never all set */
	int gathered_count;
	size_t gathered_bytes;
};

/* Guest pages, and the pages of the file that the read puts there. */
struct run {
	struct ram_block *block;
	uint64_t page, pages, file_page;
};

static void note_miss(struct reader *r, enum miss_reason why, size_t bytes)
{
	if (!r->v || !bytes)
		return;
	stat_add(&r->v->stats->miss_reads[why], 1);
	stat_add(&r->v->stats->miss_bytes[why], bytes);
}

/* ---- storage -------------------------------------------------------------------------------- */

/* Bytes that are there from `page` on, at most SCRATCH_BYTES; read without waiting. */
static size_t bytes_at_hand(struct volume *v, uint64_t page, uint64_t pages)
{
	uint8_t scratch[SCRATCH_BYTES];
	struct iovec iov = { scratch, os_bytes(pages) < sizeof scratch ? os_bytes(pages) : sizeof scratch };
	ssize_t got = preadv2(v->fd, &iov, 1, (off_t)os_bytes(page), RWF_NOWAIT);

	return got > 0 ? (size_t)got : 0;
}

/* Pages that storage has to deliver; asked without waiting. */
static uint64_t missing_pages(struct volume *v, uint64_t page, uint64_t pages)
{
	uint64_t done = 0;

	/* To copy a few is cheaper than to ask. */
	if (pages <= SHORT_PAGES && bytes_at_hand(v, page, pages) == os_bytes(pages))
		return 0;
	if (v->view)
		return pages - os_resident_pages(v->view, os_bytes(page), pages);
	while (done < pages) {
		uint64_t got = bytes_at_hand(v, page + done, pages - done) >> OS_PAGE_SHIFT;

		if (!got)
			break;
		done += got;
	}
	return pages - done;
}

/* `joined`: pages that another VM had in flight already. */
static void note_storage(struct volume *v, uint64_t missing, uint64_t joined)
{
	if (joined > missing)
		joined = missing;
	if (joined)
		stat_add(&v->stats->reads_joined, 1);
	stat_add(&v->stats->pages_joined, joined);
	stat_add(&v->stats->bytes_from_storage, os_bytes(missing - joined));
}

/* ---- origins -------------------------------------------------------------------------------- */

/* Whole pages of guest RAM at `hva` have what the file has there. */
static void note_origin(struct volume *v, const uint8_t *hva, size_t bytes, uint64_t offset)
{
	unsigned number = (unsigned)(v->stats - v->all->stats->volumes);
	size_t head = -(uintptr_t)hva & (OS_PAGE_BYTES - 1);
	struct ram_block *b;
	uint64_t page, file_page;

	if (((uintptr_t)hva ^ offset) & (OS_PAGE_BYTES - 1) || head + OS_PAGE_BYTES > bytes)
		return;
	b = ram_find(v->all->ram, hva, bytes);
	if (!b)
		return;
	hva += head;
	page = (uint64_t)(hva - b->hva) >> OS_PAGE_SHIFT;
	file_page = (offset + head) >> OS_PAGE_SHIFT;
	for (size_t left = bytes - head; left >= OS_PAGE_BYTES && file_page < ORIGIN_FILE_PAGES; left -= OS_PAGE_BYTES) {
		atomic_store_explicit(&b->origins[page++], origin_make(number, file_page++, hva), memory_order_relaxed);
		hva += OS_PAGE_BYTES;
	}
}

/* Of a read or a write that has got so far. */
static void note_origins(struct volume *v, const struct iovec *iov, int count, uint64_t offset, size_t bytes)
{
	for (int i = 0; i < count && bytes; i++) {
		size_t n = iov[i].iov_len < bytes ? iov[i].iov_len : bytes;

		note_origin(v, iov[i].iov_base, n, offset);
		offset += n;
		bytes -= n;
	}
}

void volumes_note_write(struct volumes *all, int fd, const struct iovec *iov, int count, off_t offset, size_t bytes)
{
	struct volume *v = offset >= 0 ? volumes_attach(all, fd) : NULL;

	if (!v)
		return;
	note_origins(v, iov, count, (uint64_t)offset, bytes);
	volume_put(v);
}

/* ---- copying -------------------------------------------------------------------------------- */

/* Overlays that the read overwrites as a whole go back to base, where that saves mappings. */
static void return_to_base(struct reader *r, const struct iovec *to)
{
	struct ram *ram = r->all->ram;
	uintptr_t first = ((uintptr_t)to->iov_base + OS_PAGE_BYTES - 1) & ~(OS_PAGE_BYTES - 1);
	uintptr_t last = ((uintptr_t)to->iov_base + to->iov_len) & ~(OS_PAGE_BYTES - 1);
	struct ram_block *b;
	uint64_t page, pages;

	if (first >= last)
		return;
	b = ram_find(ram, (void *)first, last - first);
	if (!b)
		return;
	page = (first - (uintptr_t)b->hva) >> OS_PAGE_SHIFT;
	pages = (last - first) >> OS_PAGE_SHIFT;
	if (!ram_has_overlay(b, page, pages))
		return;
	ram_lock(ram);
	if (ram_return_saves_maps(b, page, pages))
		(void)ram_return_base(ram, b, page, pages);
	ram_unlock(ram);
}

/* Pages of the file that an ordinary read of what was gathered touches, while it is under way. */
struct flight {
	uint64_t page, pages;
	bool told; /* the tracking structure has it as in flight */
};

/* Storage is asked for what is not resident, and other VMs may wait for it. */
static struct flight begin_flight(struct reader *r)
{
	uint64_t begin = (uint64_t)r->offset - r->gathered_bytes, end = (uint64_t)r->offset;
	struct volume *v = r->v;
	struct flight f = { .page = begin >> OS_PAGE_SHIFT };
	uint64_t missing, joined;

	if (!v || !state_maps(v->state))
		return f;
	end = (end + OS_PAGE_BYTES - 1) >> OS_PAGE_SHIFT;
	f.pages = f.page >= v->pages ? 0 : (end < v->pages ? end : v->pages) - f.page;
	/* O_DIRECT (cache=none) asks storage in any case, and nobody can wait for it in the page cache. */
	if (f.pages && fcntl(r->fd, F_GETFL) & O_DIRECT) {
		note_storage(v, f.pages, 0);
		return f;
	}
	missing = f.pages ? missing_pages(v, f.page, f.pages) : 0;
	if (!missing)
		return f;
	f.told = v->track;
	joined = v->track ? track_begin_flight(v->track, f.page, f.pages) : 0;
	note_storage(v, missing, joined);
	return f;
}

/* Reads what was gathered. 0, or 1 when the read as a whole is over: an error or the file's end. */
static int flush(struct reader *r, ssize_t *ret_error)
{
	struct flight f;
	long n;

	if (!r->gathered_count)
		return 0;
	for (int i = 0; i < r->gathered_count; i++)
		return_to_base(r, &r->gathered[i]);
	f = begin_flight(r);
	n = f.told ? os_fault(OS_FAULT_STORAGE_READ) : 0;
	if (n)
		errno = (int)-n;
	n = n ? -1 : syscall(SYS_preadv, r->fd, r->gathered, r->gathered_count,
		    (unsigned long)(r->offset - (off_t)r->gathered_bytes), 0ul);
	if (f.told)
		track_end_flight(r->v->track, f.page, f.pages);
	if (n < 0) {
		*ret_error = -errno;
		return 1;
	}
	if (r->v)
		note_origins(r->v, r->gathered, r->gathered_count, (uint64_t)r->offset - r->gathered_bytes, (size_t)n);
	r->done += (size_t)n;
	n = (size_t)n < r->gathered_bytes;
	r->gathered_count = 0;
	r->gathered_bytes = 0;
	return (int)n;
}

static int gather(struct reader *r, uint8_t *hva, size_t bytes, ssize_t *ret_error)
{
	if (!bytes)
		return 0;
	if (r->gathered_count == IOV_MAX && flush(r, ret_error))
		return 1;
	r->gathered[r->gathered_count++] = (struct iovec){ hva, bytes };
	r->gathered_bytes += bytes;
	r->offset += (off_t)bytes;
	return 0;
}

/* ---- bringing blocks in --------------------------------------------------------------------- */

/*
 * Reads blocks into the page cache. Another VM that has one of them in flight holds its page locked,
 * and so this read waits for that one: storage is asked once.
 */
static int bring_in(struct volume *v, uint64_t page, uint64_t pages, uint64_t missing)
{
	uint8_t scratch[SCRATCH_BYTES];
	uint64_t joined = v->track ? track_begin_flight(v->track, page, pages) : 0;
	int r = os_fault(OS_FAULT_STORAGE_READ);

	note_storage(v, missing, joined);
	for (uint64_t done = 0; !r && done < os_bytes(pages);) {
		size_t want = os_bytes(pages) - done < sizeof scratch ? os_bytes(pages) - done : sizeof scratch;
		long n = syscall(SYS_pread64, v->fd, scratch, want, os_bytes(page) + done);

		if (n <= 0)
			r = n ? -errno : -EIO;
		else
			done += (uint64_t)n;
	}
	if (v->track)
		track_end_flight(v->track, page, pages);
	return r;
}

/* The kernel reads ahead of reads, but sees none where everything is mapped. Ahead goes as far as the
 * reader has come in one go; it is looked at again when half of that has been read. */
static void read_ahead(struct volume *v, uint64_t page, uint64_t pages)
{
	uint64_t next = page + pages, streak = v->next_page == page ? v->streak_pages + pages : pages;
	uint64_t window = streak < AHEAD_PAGES ? streak : AHEAD_PAGES;

	if (v->next_page != page)
		v->ahead_page = 0;
	v->next_page = next;
	v->streak_pages = streak;
	if (window > v->pages - next)
		window = v->pages - next;
	if (!v->view || streak < AHEAD_FROM_PAGES || !window || next + window / 2 < v->ahead_page)
		return;
	v->ahead_page = next + window;
	if (os_resident_pages(v->view, os_bytes(next), window) < window)
		(void)posix_fadvise(v->fd, (off_t)os_bytes(next), (off_t)os_bytes(window), POSIX_FADV_WILLNEED);
}

/* ---- the decision --------------------------------------------------------------------------- */

static double likelihood(struct volume *v, const struct run *run)
{
	double p;

	if (v->all->options.share_threshold <= 0)
		return 1;
	p = v->track ? track_likelihood(v->track, run->file_page, run->pages) : 0;
	v->stats->likelihood_permille_now = (uint32_t)(p * 1000);
	return p;
}

static uint32_t min_run_pages(struct volume *v, double p)
{
	uint32_t min = v->all->options.min_run_pages;
	struct ram_counts c;

	if (min)
		return min;
	ram_get_counts(v->all->ram, &c);
	min = cost_under_pressure(cost_min_run_pages(cost_model_get(), p), c.maps + c.other_maps, c.budget_maps);
	v->stats->min_run_pages_now = min;
	return min;
}

/* MISS_REASONS: map it. */
static enum miss_reason decide(struct volume *v, const struct run *run)
{
	double p = likelihood(v, run);

	if (p < v->all->options.share_threshold)
		return MISS_UNLIKELY;
	return run->pages < min_run_pages(v, p) ? MISS_SHORT_RUN : MISS_REASONS;
}

static enum miss_reason reason_of_state(uint32_t state)
{
	return state == VOLUME_WRITABLE ? MISS_WRITABLE : state == VOLUME_DETACHED ? MISS_DETACHED : MISS_NO_LEASE;
}

static enum miss_reason map_run(struct volume *v, const struct run *run)
{
	struct ram *ram = v->all->ram;
	enum miss_reason why = MISS_REASONS;
	int r = 0;

	ram_lock(ram);
	if (!state_maps(v->state))
		why = reason_of_state(v->state);
	else if (!v->all->allowed)
		why = MISS_EXCLUDED;
	else
		r = ram_map_overlay(ram, run->block, run->page, run->pages, v->file, run->file_page);
	ram_unlock(ram);
	if (r)
		why = r == -EDQUOT ? MISS_BUDGET : r == -EBUSY ? MISS_SAVING : MISS_FAILED;
	return why;
}

static enum miss_reason shortcut(struct volume *v, const struct run *run)
{
	enum miss_reason why = decide(v, run);
	uint64_t missing;

	if (v->track)
		track_note_read(v->track, run->file_page, run->pages);
	if (why != MISS_REASONS) /* the ordinary read brings it in, and the kernel reads ahead of it */
		return why;
	missing = missing_pages(v, run->file_page, run->pages);
	if (missing && bring_in(v, run->file_page, run->pages, missing))
		return MISS_FAILED; /* the ordinary read will say how */
	read_ahead(v, run->file_page, run->pages);
	return map_run(v, run);
}

/* ---- one read ------------------------------------------------------------------------------- */

/* Whole pages of the file into whole pages of guest RAM. */
static int read_pages(struct reader *r, struct ram_block *b, uint8_t *hva, uint64_t pages, ssize_t *ret_error)
{
	struct run run = { b, (uint64_t)(hva - b->hva) >> OS_PAGE_SHIFT, pages,
			   (uint64_t)r->offset >> OS_PAGE_SHIFT };
	uint64_t in_file = run.file_page < r->v->pages ? r->v->pages - run.file_page : 0;
	enum miss_reason why;

	if (run.pages > in_file) {
		note_miss(r, MISS_END_OF_FILE, os_bytes(run.pages - in_file));
		run.pages = in_file;
	}
	if (run.pages) {
		why = shortcut(r->v, &run);
		if (why != MISS_REASONS) {
			note_miss(r, why, os_bytes(run.pages));
			return gather(r, hva, os_bytes(pages), ret_error);
		}
		if (flush(r, ret_error))
			return 1;
		stat_add(&r->v->stats->maps, 1);
		stat_add(&r->v->stats->bytes_shortcut, os_bytes(run.pages));
		r->offset += (off_t)os_bytes(run.pages);
		r->done += os_bytes(run.pages);
	}
	return gather(r, hva + os_bytes(run.pages), os_bytes(pages - run.pages), ret_error);
}

/* An area: contiguous in memory and in the file. */
static int read_area(struct reader *r, uint8_t *hva, size_t bytes, ssize_t *ret_error)
{
	struct ram_block *b = ram_find(r->all->ram, hva, bytes);
	size_t head = -(uintptr_t)hva & (OS_PAGE_BYTES - 1), body;
	enum miss_reason why = MISS_REASONS;

	if (!b)
		why = MISS_BUFFER;
	else if (!r->v || !state_maps(r->v->state))
		why = reason_of_state(r->v ? r->v->state : VOLUME_NO_LEASE);
	else if (!r->all->allowed)
		why = MISS_EXCLUDED;
	else if (((uintptr_t)hva ^ (uintptr_t)r->offset) & (OS_PAGE_BYTES - 1) || head + OS_PAGE_BYTES > bytes)
		why = MISS_MISALIGNED;
	if (why != MISS_REASONS) {
		note_miss(r, why, bytes);
		return gather(r, hva, bytes, ret_error);
	}
	body = (bytes - head) & ~(OS_PAGE_BYTES - 1);
	note_miss(r, MISS_MISALIGNED, bytes - body);
	return gather(r, hva, head, ret_error) || read_pages(r, b, hva + head, body >> OS_PAGE_SHIFT, ret_error) ||
	       gather(r, hva + head + body, bytes - head - body, ret_error);
}

static int read_all(struct reader *r, const struct iovec *iov, int count, ssize_t *ret_error)
{
	for (int i = 0; i < count;) {
		uint8_t *hva = iov[i].iov_base;
		size_t bytes = iov[i].iov_len;

		for (i++; i < count && iov[i].iov_base == hva + bytes; i++)
			bytes += iov[i].iov_len;
		if (bytes && read_area(r, hva, bytes, ret_error))
			return 1;
	}
	return flush(r, ret_error);
}

static size_t bytes_of(const struct iovec *iov, int count)
{
	size_t bytes = 0;

	for (int i = 0; i < count; i++)
		bytes += iov[i].iov_len;
	return bytes;
}

static void note_read(struct volume *v, size_t bytes)
{
	stat_add(&v->stats->reads, 1);
	stat_add(&v->stats->bytes_asked, bytes);
}

ssize_t volumes_read(struct volumes *all, int fd, const struct iovec *iov, int count, off_t offset)
{
	struct iovec gathered[IOV_MAX];
	struct reader r = { .all = all, .fd = fd, .offset = offset, .gathered = gathered };
	ssize_t error = 0;

	r.v = offset >= 0 ? volumes_attach(all, fd) : NULL;
	if (r.v)
		note_read(r.v, bytes_of(iov, count));
	(void)read_all(&r, iov, count, &error);
	if (r.v)
		volume_put(r.v);
	return r.done ? (ssize_t)r.done : error;
}

void volumes_note_kernel_read(struct volumes *all, int fd, const struct iovec *iov, int count)
{
	struct reader r = { .all = all, .v = volumes_attach(all, fd) };

	if (!r.v)
		return;
	note_read(r.v, bytes_of(iov, count));
	note_miss(&r, MISS_KERNEL_IO, bytes_of(iov, count));
	volume_put(r.v);
}

void volumes_note_other(struct volumes *all, int fd, uint64_t bytes)
{
	struct reader r = { .all = all };
	struct stat st;

	if (!all->count || fstat(fd, &st))
		return;
	r.v = volume_get(all, &st);
	if (!r.v)
		return;
	note_miss(&r, MISS_BUFFER, bytes);
	volume_put(r.v);
}
