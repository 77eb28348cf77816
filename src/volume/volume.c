/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "volume/internal.h"

#include "os/log.h"
#include "os/os.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#define TRY_AFTER_US 5000000 /* how long a file without a lease is left alone, at first */
#define TRY_AFTER_MAX_US 600000000

static void set_state(struct volume *v, enum volume_state state)
{
	v->state = state;
	v->stats->state = state;
}

/* ---- all volumes of a VM -------------------------------------------------------------------- */

int volumes_create(struct ram *ram, const struct volume_options *options, struct vm_stats *stats,
		   struct volumes **ret_volumes)
{
	struct volumes *all = calloc(1, sizeof *all);

	if (!all)
		return -ENOMEM;
	all->ram = ram;
	all->options = *options;
	all->stats = stats;
	all->allowed = true;
	pthread_mutex_init(&all->attach_lock, NULL);
	*ret_volumes = all;
	return 0;
}

/* Gives up all that belongs to the file; nobody else may use the volume now. */
static void let_go(struct volume *v)
{
	if (v->has_file) {
		ram_lock(v->all->ram);
		ram_drop_file(v->all->ram, v->file);
		ram_unlock(v->all->ram);
	}
	v->has_file = false;
	volume_release(v);
	track_close(v->track);
	v->track = NULL;
	os_unview_file(v->view, os_bytes(v->pages));
	v->view = NULL;
	if (v->fd >= 0)
		close(v->fd);
	v->fd = -1;
}

void volumes_destroy(struct volumes *all)
{
	if (!all)
		return;
	for (uint32_t i = 0; i < all->count; i++) {
		let_go(all->list[i]);
		free(all->list[i]);
	}
	pthread_mutex_destroy(&all->attach_lock);
	free(all);
}

void volumes_abandon(struct volumes *all)
{
	for (uint32_t i = 0; i < all->count; i++)
		if (!all->list[i]->closed && all->list[i]->track)
			track_abandon(all->list[i]->track);
}

void volumes_lease_to(struct volumes *all, pid_t tid)
{
	all->options.lease_tid = tid;
}

void volumes_allow(struct volumes *all, bool allowed)
{
	all->allowed = allowed;
}

struct volume *volumes_nth(struct volumes *all, uint32_t n)
{
	return n < all->count ? all->list[n] : NULL;
}

static bool is_file(const struct volume *v, const struct stat *st)
{
	return v->ino == st->st_ino && v->dev == st->st_dev;
}

struct volume *volume_get(struct volumes *all, const struct stat *st)
{
	uint32_t count = all->count;

	for (uint32_t i = 0; i < count; i++) {
		struct volume *v = all->list[i];

		if (v->closed)
			continue;
		v->users++; /* from here on it changes no more, unless it was just closed */
		if (!v->closed && is_file(v, st))
			return v;
		v->users--;
	}
	return NULL;
}

void volume_put(struct volume *v)
{
	v->users--;
}

bool volumes_is_mapped(struct volumes *all, int fd)
{
	struct volume *v;
	struct stat st;
	bool mapped;

	if (fstat(fd, &st))
		return false;
	v = volume_get(all, &st);
	mapped = v && volume_is_mapped(v);
	if (v)
		volume_put(v);
	return mapped;
}

/* Closes it for the moment; false: somebody uses it. Under the attach lock. */
static bool take_alone(struct volume *v)
{
	v->closed = true;
	if (!v->users)
		return true;
	v->closed = false;
	return false;
}

struct volume *volumes_by_path(struct volumes *all, const char *path)
{
	struct volume *v;
	struct stat st;

	if (stat(path, &st))
		return NULL;
	for (uint32_t i = 0; (v = volumes_nth(all, i)); i++)
		if (!v->closed && is_file(v, &st))
			return v;
	return NULL;
}

struct volume *volumes_by_index(struct volumes *all, unsigned file)
{
	uint32_t count = all->count;

	for (uint32_t i = 0; i < count; i++)
		if (all->list[i]->has_file && all->list[i]->file == file)
			return all->list[i];
	return NULL;
}

struct volume *volumes_broken_lease(struct volumes *all)
{
	uint32_t count = all->count;

	for (uint32_t i = 0; i < count; i++)
		if (volume_lease_breaks(all->list[i]))
			return all->list[i];
	return NULL;
}

const char *volume_path(const struct volume *v)
{
	return v->stats->path;
}

bool volume_describe(const struct volume *v, uint64_t *ret_dev, uint64_t *ret_ino, uint64_t *ret_pages,
		     uint32_t *ret_file)
{
	*ret_dev = v->dev;
	*ret_ino = v->ino;
	*ret_pages = v->pages;
	*ret_file = v->file;
	return v->has_file;
}

unsigned volume_index(const struct volume *v)
{
	return v->file;
}

struct ram *volume_ram(const struct volume *v)
{
	return v->all->ram;
}

/* ---- attaching ------------------------------------------------------------------------------ */

static void gained(void *ctx, uint64_t page, uint64_t pages)
{
	struct volume *v = ctx;

	stat_add(&v->stats->pages_mapped_now, pages);
	if (v->track)
		track_add_maps(v->track, page, pages);
}

static void lost(void *ctx, uint64_t page, uint64_t pages, enum ram_loss why)
{
	struct volume *v = ctx;

	stat_sub(&v->stats->pages_mapped_now, pages);
	if (why == RAM_LOST_COPIED)
		for (uint64_t i = 0; i < pages; i++)
			stat_add(v->track && track_maps(v->track, page + i) > 1 ? &v->stats->copied_many
										: &v->stats->copied_one,
				 1);
	if (why == RAM_LOST_DROPPED)
		stat_add(&v->stats->pages_dropped, pages);
	if (v->track)
		track_drop_maps(v->track, page, pages);
}

/* What keeps the file from changing; takes the lease if that is what does. */
static enum volume_state protect(struct volume *v, int vmm_fd)
{
	const struct volume_options *o = &v->all->options;
	bool local = v->fd >= 0 && os_file_is_local(v->fd);
	int r = -EINVAL;

	if (v->fd < 0)
		return VOLUME_NO_LEASE;
	if (v->is_cache)
		return VOLUME_CACHED;
	if ((fcntl(vmm_fd, F_GETFL) & O_ACCMODE) != O_RDONLY)
		return VOLUME_WRITABLE;
	/* The lease first: it notices when the immutable attribute or the read-only mount goes away. */
	if (local)
		r = os_lease_take(v->fd, o->lease_signal, o->lease_tid);
	if (!r) {
		v->leased = true;
		return VOLUME_LEASED;
	}
	if (r == -EAGAIN)
		return VOLUME_WRITABLE;
	if (os_file_protection(v->fd) != OS_PROTECT_NONE)
		return VOLUME_SEALED;
	return o->trust_images && v->is_regular ? VOLUME_TRUSTED : VOLUME_NO_LEASE;
}

/* A descriptor of our own: the VMM may close its one, and use O_DIRECT on it. */
static int reopen(int vmm_fd)
{
	char path[32];

	snprintf(path, sizeof path, "/proc/self/fd/%d", vmm_fd);
	return (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
}

static void name_volume(struct volume *v, int vmm_fd)
{
	char link[32];
	ssize_t n;

	snprintf(link, sizeof link, "/proc/self/fd/%d", vmm_fd);
	n = readlink(link, v->stats->path, sizeof v->stats->path - 1);
	v->stats->path[n > 0 ? n : 0] = '\0';
	v->stats->dev = v->dev;
	v->stats->ino = v->ino;
}

static int add_to_core(struct volume *v)
{
	struct ram_observer observer = { gained, lost, v };
	int r;

	ram_lock(v->all->ram);
	r = ram_add_file(v->all->ram, v->fd, v->pages, &observer);
	if (r >= 0 && volume_is_cache(v))
		ram_file_is_watched(v->all->ram, (unsigned)r);
	ram_unlock(v->all->ram);
	if (r < 0)
		return r;
	v->file = (unsigned)r;
	v->has_file = true;
	return 0;
}

static void prepare_mapping(struct volume *v)
{
	struct stat st;
	int r;

	if (fstat(v->fd, &st)) /* again: the size as it is now that it cannot change */
		return;
	v->changed = st.st_ctim;
	v->overtaken = OVERTAKEN_NO;
	v->pages = (uint64_t)st.st_size >> OS_PAGE_SHIFT;
	v->stats->pages = v->pages;
	r = add_to_core(v);
	if (r) {
		os_log("%s cannot be mapped: %s", volume_path(v), strerror(-r));
		volume_release(v);
		set_state(v, VOLUME_NO_LEASE);
		return;
	}
	if (v->pages && os_residency_is_told(v->fd))
		v->view = os_view_file(v->fd, os_bytes(v->pages), false);
	r = track_open(v->all->options.tracks_dir, v->dev, v->ino, v->pages, &v->track);
	if (r)
		os_log("%s is not tracked, and so not shared: %s", volume_path(v), strerror(-r));
}

/* `v` is closed; afterwards it is open, mapped or not. */
static void open_volume(struct volume *v, int vmm_fd)
{
	struct stat st;

	v->fd = reopen(vmm_fd);
	/* The VMM may have closed its descriptor, and have another file under that number. */
	if (v->fd >= 0 && (fstat(v->fd, &st) || !is_file(v, &st))) {
		close(v->fd);
		v->fd = -1;
	}
	name_volume(v, vmm_fd);
	set_state(v, v->detached || v->all->detached ? VOLUME_DETACHED : protect(v, vmm_fd));
	if (state_maps(v->state)) {
		prepare_mapping(v);
	} else if (v->fd >= 0) { /* only counted */
		close(v->fd);
		v->fd = -1;
	}
	v->closed = false;
}

/* A place for the file: its old one, a new one, or that of another file that is closed. */
static struct volume *take_place(struct volumes *all, const struct stat *st)
{
	struct volume *v, *other = NULL;

	for (uint32_t i = 0; i < all->count; i++) {
		v = all->list[i];
		if (!v->closed)
			continue;
		if (is_file(v, st))
			return v;
		other = v;
	}
	if (all->count == VM_STATS_VOLUMES) {
		if (other)
			memset(other->stats, 0, sizeof *other->stats);
		v = other;
	} else {
		v = calloc(1, sizeof *v);
	}
	if (!v)
		return NULL;
	v->all = all;
	v->closed = true;
	v->fd = -1;
	v->dev = st->st_dev;
	v->ino = st->st_ino;
	v->is_regular = S_ISREG(st->st_mode); /* a block device has no lease, and is only counted */
	v->detached = false;
	v->try_after_us = TRY_AFTER_US;
	v->next_try_us = 0;
	v->broken_us = 0;
	return v;
}

static struct volume *attach(struct volumes *all, int fd, const struct stat *st, bool is_cache)
{
	struct volume *v = take_place(all, st);

	if (!v) {
		os_log("an image more than Latent keeps account of (%d): its reads are copied, and not counted",
		       VM_STATS_VOLUMES);
		return NULL;
	}
	v->is_cache = is_cache;
	if (!v->stats)
		v->stats = &all->stats->volumes[all->count];
	v->users++;
	open_volume(v, fd);
	if (v->state == VOLUME_WRITABLE && (fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDONLY)
		os_log("%s is open for writing elsewhere: reads of it are copied until that ends", volume_path(v));
	if (v->stats == &all->stats->volumes[all->count]) {
		all->list[all->count] = v;
		all->stats->volume_count = ++all->count;
	}
	return v;
}

static struct volume *find_or_attach(struct volumes *all, int fd, bool is_cache)
{
	struct volume *v;
	struct stat st;

	if (fstat(fd, &st) || !(S_ISREG(st.st_mode) || S_ISBLK(st.st_mode)))
		return NULL;
	v = volume_get(all, &st);
	if (v)
		return v;
	pthread_mutex_lock(&all->attach_lock);
	v = volume_get(all, &st);
	if (!v)
		v = attach(all, fd, &st, is_cache);
	pthread_mutex_unlock(&all->attach_lock);
	return v;
}

struct volume *volumes_attach(struct volumes *all, int fd)
{
	return find_or_attach(all, fd, false);
}

struct volume *volumes_attach_cache(struct volumes *all, int fd)
{
	return find_or_attach(all, fd, true);
}

/* ---- housekeeping --------------------------------------------------------------------------- */

/* Asks no server: a network file system that hangs is not waited for. */
static bool is_descriptor_of(struct volume *v, int fd)
{
	struct statx st;

	return !statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_INO, &st) && st.stx_ino == v->ino &&
	       makedev(st.stx_dev_major, st.stx_dev_minor) == v->dev;
}

/* A descriptor of the file that is the VMM's, not ours: one that may write before others; -1: none. */
static int vmm_descriptor(struct volume *v, DIR *fds)
{
	struct dirent *entry;
	int found = -1;

	rewinddir(fds);
	while ((entry = readdir(fds))) {
		int fd = atoi(entry->d_name);

		if (entry->d_name[0] == '.' || fd == v->fd || !is_descriptor_of(v, fd))
			continue;
		if (found < 0 || (fcntl(fd, F_GETFL) & O_ACCMODE) != O_RDONLY)
			found = fd;
	}
	return found;
}

/* The same, of a volume of which nothing is mapped. */
static bool take_unmapped(struct volume *v)
{
	if (!take_alone(v))
		return false;
	if (!volume_overlay_pages(v))
		return true;
	v->closed = false;
	return false;
}

/* Each failure makes it look half as often: a file that is written time and again is not worth a stop of
 * the guest each time. */
static void try_again(struct volume *v, int vmm_fd)
{
	if (os_now_us() < v->next_try_us || !take_unmapped(v))
		return;
	let_go(v);
	open_volume(v, vmm_fd);
	if (v->try_after_us < TRY_AFTER_MAX_US)
		v->try_after_us *= 2;
	v->next_try_us = os_now_us() + v->try_after_us;
}

static void tidy(struct volume *v, DIR *fds)
{
	int vmm_fd;

	/* Of a lease the kernel tells; what else protects a file may just be taken away. */
	if (!v->closed && v->state == VOLUME_SEALED && os_file_protection(v->fd) == OS_PROTECT_NONE)
		(void)volume_break(v, VOLUME_NO_LEASE);
	if (v->closed || volume_overlay_pages(v))
		return;
	vmm_fd = vmm_descriptor(v, fds);
	if (vmm_fd < 0 && take_unmapped(v)) {
		let_go(v);
		set_state(v, VOLUME_CLOSED);
		v->next_try_us = 0;
	} else if (vmm_fd >= 0 && !v->leased && (v->state == VOLUME_WRITABLE || v->state == VOLUME_NO_LEASE)) {
		try_again(v, vmm_fd);
	}
}

void volumes_tidy(struct volumes *all)
{
	DIR *fds = opendir("/proc/self/fd");

	if (!fds)
		return;
	pthread_mutex_lock(&all->attach_lock);
	for (uint32_t i = 0; i < all->count; i++)
		tidy(all->list[i], fds);
	pthread_mutex_unlock(&all->attach_lock);
	closedir(fds);
}

int volume_map(struct volume *v, struct ram_block *block, uint64_t page, uint64_t pages, uint64_t file_page)
{
	int r = -EACCES;

	ram_lock(v->all->ram);
	if (state_maps(v->state) && v->all->allowed)
		r = ram_map_overlay(v->all->ram, block, page, pages, v->file, file_page);
	ram_unlock(v->all->ram);
	if (!r)
		stat_add(&v->stats->maps, 1);
	return r;
}

/* ---- giving a file up ----------------------------------------------------------------------- */

/* The kernel lets a writer in when fs.lease-break-time is over. What was written shows in the file's times. Of a file that is
 * mapped without a lease it shows only that it was cut; of what was written there somebody has said that nobody would. */
static void look_overtaken(struct volume *v)
{
	struct stat st;

	if (v->overtaken != OVERTAKEN_NO || v->fd < 0 || !v->has_file || os_lease_is_held(v->fd) || fstat(v->fd, &st))
		return;
	if (v->leased ? st.st_ctim.tv_sec != v->changed.tv_sec || st.st_ctim.tv_nsec != v->changed.tv_nsec
		      : (uint64_t)st.st_size < os_bytes(v->pages))
		v->overtaken = volume_overlay_pages(v) ? OVERTAKEN_NOW : OVERTAKEN_NO;
}

bool volume_is_overtaken(struct volume *v)
{
	if (!v->closed && (v->leased ? volume_lease_breaks(v) : state_maps(v->state) && !v->is_cache))
		look_overtaken(v);
	return v->overtaken == OVERTAKEN_NOW;
}

void volume_tell_overtaken(struct volume *v)
{
	v->overtaken = OVERTAKEN_TOLD;
}

int volume_break(struct volume *v, enum volume_state why)
{
	struct ram *ram = v->all->ram;
	uint64_t overlays;
	int r = 0;

	if (why == VOLUME_DETACHED)
		v->detached = true;
	if (!v->has_file)
		return 0;
	ram_lock(ram); /* whoever maps looks at the state under the lock: from here on nobody does */
	if (state_maps(v->state)) {
		v->broken_us = os_now_us();
		v->next_try_us = v->broken_us + v->try_after_us;
		set_state(v, why);
	} else if (why == VOLUME_DETACHED) {
		set_state(v, why);
	}
	overlays = ram_overlay_pages(ram, v->file); /* all: the private flags may be wrong */
	ram_unlock(ram);
	if (overlays)
		r = ram_privatize(ram, v->file);
	look_overtaken(v);
	return r;
}

void volumes_detach(struct volumes *all)
{
	all->detached = true;
	for (uint32_t i = 0; i < all->count; i++)
		(void)volume_break(all->list[i], VOLUME_DETACHED);
}

int volume_settle(struct volume *v, uint64_t *ret_settled)
{
	return v->has_file ? ram_detach(v->all->ram, v->file, ret_settled) : 0;
}

void volume_swap_in(struct volume *v)
{
	if (v->has_file)
		ram_swap_in(v->all->ram, v->file);
}

void volume_release(struct volume *v)
{
	if (atomic_exchange(&v->leased, false))
		(void)os_lease_release(v->fd);
}

bool volume_is_mapped(struct volume *v)
{
	return state_maps(v->state);
}

bool volume_is_cache(struct volume *v)
{
	return v->is_cache;
}

bool volume_is_leased(struct volume *v)
{
	return v->leased;
}

bool volume_lease_breaks(struct volume *v)
{
	return v->leased && !os_lease_intact(v->fd);
}

static uint64_t count_pages(struct volume *v, uint64_t (*count)(struct ram *ram, unsigned file))
{
	uint64_t pages;

	if (!v->has_file)
		return 0;
	ram_lock(v->all->ram);
	pages = count(v->all->ram, v->file);
	ram_unlock(v->all->ram);
	return pages;
}

uint64_t volume_overlay_pages(struct volume *v)
{
	return count_pages(v, ram_overlay_pages);
}

uint64_t volume_showing_pages(struct volume *v)
{
	return count_pages(v, ram_mapped_pages);
}

bool volume_is_read_alone(struct volume *v)
{
	if (!v->track)
		return false;
	track_refresh(v->track);
	return track_readers(v->track) == 1;
}

uint64_t volume_broken_us(struct volume *v)
{
	return v->broken_us;
}

/* ---- statistics ----------------------------------------------------------------------------- */

static void refresh_volume(struct volume *v, bool deep)
{
	uint64_t one, many;

	if (!v->track)
		return;
	track_refresh(v->track);
	v->stats->readers_now = track_readers(v->track);
	if (!deep)
		return;
	track_groups(v->track, &one, &many);
	stat_set(&v->stats->pages_one_now, one);
	stat_set(&v->stats->pages_many_now, many);
}

static void refresh_source_bits(struct volumes *all, bool deep)
{
	struct ram_source_counts c;

	if (deep)
		(void)ram_update_source_bits(all->ram); /* else they are what they were */
	ram_get_source_counts(all->ram, &c);
	stat_set(&all->stats->source_bits_set, c.set);
	stat_set(&all->stats->source_bits_fetched, c.fetched);
	stat_set(&all->stats->source_bits_now, c.now);
}

int volumes_refresh(struct volumes *all, bool deep)
{
	struct vm_stats *s = all->stats;
	struct ram_counts c;
	struct ram_mask_counts m;
	struct timespec now;
	int r = deep ? ram_reconcile(all->ram) : 0;

	for (uint32_t i = 0; i < all->count; i++)
		refresh_volume(all->list[i], deep);
	ram_get_counts(all->ram, &c);
	stat_set(&s->maps_ram_now, c.maps);
	stat_set(&s->maps_other_now, c.other_maps);
	stat_set(&s->maps_budget_now, c.budget_maps);
	stat_set(&s->maps_limit_now, os_max_maps());
	stat_set(&s->pages_base_now, c.pages - c.overlay_pages);
	stat_set(&s->pages_overlay_now, c.overlay_pages);
	stat_set(&s->pages_private_now, c.private_pages);
	stat_set(&s->pages_copied_on_write, c.copied_pages);
	stat_set(&s->map_failures, c.failures);
	refresh_source_bits(all, deep);
	ram_get_mask_counts(all->ram, &m);
	stat_set(&s->pages_masked_now, m.masked_now);
	stat_set(&s->pages_masked, m.masked);
	stat_set(&s->masked_made, m.made);
	stat_set(&s->masked_copied, m.copied);
	stat_set(&s->masked_mapped, m.mapped);
	stat_set(&s->masked_dropped, m.dropped);
	if (deep && !r) {
		clock_gettime(CLOCK_REALTIME, &now);
		stat_set(&s->reconciled_unix_ms, (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000);
	}
	return r;
}
