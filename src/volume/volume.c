/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "volume/internal.h"

#include "os/log.h"
#include "os/os.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

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

static void detach_volume(struct volume *v)
{
	if (v->has_file) {
		ram_lock(v->all->ram);
		ram_drop_file(v->all->ram, v->file);
		ram_unlock(v->all->ram);
	}
	volume_release(v);
	track_close(v->track);
	os_unview_file(v->view, os_bytes(v->pages));
	if (v->fd >= 0)
		close(v->fd);
	free(v);
}

void volumes_destroy(struct volumes *all)
{
	if (!all)
		return;
	for (uint32_t i = 0; i < all->count; i++)
		detach_volume(all->list[i]);
	pthread_mutex_destroy(&all->attach_lock);
	free(all);
}

void volumes_allow(struct volumes *all, bool allowed)
{
	all->allowed = allowed;
}

struct volume *volumes_nth(struct volumes *all, uint32_t n)
{
	return n < all->count ? all->list[n] : NULL;
}

struct volume *volumes_by_file(struct volumes *all, const struct stat *st)
{
	uint32_t count = all->count;

	for (uint32_t i = 0; i < count; i++)
		if (all->list[i]->ino == st->st_ino && all->list[i]->dev == st->st_dev)
			return all->list[i];
	return NULL;
}

struct volume *volumes_by_path(struct volumes *all, const char *path)
{
	struct stat st;

	return stat(path, &st) ? NULL : volumes_by_file(all, &st);
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

/* File systems whose leases do not bind other machines, or a server behind them. */
static bool is_remote(int fd)
{
	static const unsigned long types[] = {
		0x6969,     /* NFS */
		0xff534d42, /* CIFS */
		0xfe534d42, /* SMB2 */
		0x65735546, /* FUSE */
		0x01021997, /* 9p */
		0x00c36400, /* Ceph */
		0x7461636f, /* OCFS2 */
		0x01161970, /* GFS2 */
		0x0bd00bd0, /* Lustre */
		0x47504653, /* GPFS */
		0x5346414f, /* AFS */
	};
	struct statfs fs;

	if (fstatfs(fd, &fs))
		return true;
	for (size_t i = 0; i < sizeof types / sizeof types[0]; i++)
		if ((unsigned long)fs.f_type == types[i])
			return true;
	return false;
}

/* What keeps the file from changing; takes the lease if that is what does. */
static enum volume_state protect(struct volume *v, int vmm_fd)
{
	const struct volume_options *o = &v->all->options;
	int r = -EINVAL;

	if ((fcntl(vmm_fd, F_GETFL) & O_ACCMODE) != O_RDONLY)
		return VOLUME_WRITABLE;
	if (v->fd < 0)
		return VOLUME_NO_LEASE;
	/* The lease first: it notices when the immutable attribute or the read-only mount goes away. */
	if (!is_remote(v->fd))
		r = os_lease_take(v->fd, o->lease_signal, o->lease_tid);
	if (!r) {
		v->leased = true;
		return VOLUME_LEASED;
	}
	if (r == -EAGAIN)
		return VOLUME_WRITABLE;
	if (os_file_protection(v->fd) != OS_PROTECT_NONE)
		return VOLUME_SEALED;
	return o->trust_images ? VOLUME_TRUSTED : VOLUME_NO_LEASE;
}

/* A descriptor of our own: the VMM may close its one, and use O_DIRECT on it. */
static int reopen(int vmm_fd)
{
	char path[32];

	snprintf(path, sizeof path, "/proc/self/fd/%d", vmm_fd);
	return (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
}

static bool residency_is_told(int fd, const struct stat *st)
{
	char path[32];

	/* mincore(2) since Linux 5.2: for the owner, or who may write the file. */
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	return geteuid() == st->st_uid || !access(path, W_OK);
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
	v->pages = (uint64_t)st.st_size >> OS_PAGE_SHIFT;
	v->stats->pages = v->pages;
	r = add_to_core(v);
	if (r) {
		os_log("%s cannot be mapped: %s", volume_path(v), strerror(-r));
		set_state(v, VOLUME_NO_LEASE);
		return;
	}
	if (v->pages && residency_is_told(v->fd, &st))
		v->view = os_view_file(v->fd, os_bytes(v->pages), false);
	r = track_open(v->all->options.tracks_dir, v->dev, v->ino, v->pages, &v->track);
	if (r)
		os_log("%s is not tracked, and so not shared: %s", volume_path(v), strerror(-r));
	(void)cost_model_get();
}

static struct volume *new_volume(struct volumes *all, int vmm_fd, const struct stat *st)
{
	struct volume *v = calloc(1, sizeof *v);

	if (!v)
		return NULL;
	v->all = all;
	v->stats = &all->stats->volumes[all->count];
	v->dev = st->st_dev;
	v->ino = st->st_ino;
	v->fd = reopen(vmm_fd);
	name_volume(v, vmm_fd);
	set_state(v, protect(v, vmm_fd));
	if (state_maps(v->state)) {
		prepare_mapping(v);
	} else if (v->fd >= 0) { /* only counted */
		close(v->fd);
		v->fd = -1;
	}
	return v;
}

struct volume *volumes_attach(struct volumes *all, int fd)
{
	struct volume *v;
	struct stat st;

	if (fstat(fd, &st) || !S_ISREG(st.st_mode))
		return NULL;
	v = volumes_by_file(all, &st);
	if (v)
		return v;
	pthread_mutex_lock(&all->attach_lock);
	v = volumes_by_file(all, &st);
	if (!v && all->count < VM_STATS_VOLUMES) {
		v = new_volume(all, fd, &st);
		if (v) {
			all->list[all->count] = v;
			all->stats->volume_count = ++all->count;
		}
	}
	pthread_mutex_unlock(&all->attach_lock);
	return v;
}

/* ---- giving a file up ----------------------------------------------------------------------- */

static uint64_t now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

int volume_break(struct volume *v, enum volume_state why)
{
	struct ram *ram = v->all->ram;
	uint64_t showing;

	if (!v->has_file)
		return 0;
	ram_lock(ram); /* whoever maps looks at the state under the lock: from here on nobody does */
	if (state_maps(v->state)) {
		set_state(v, why);
		v->broken_us = now_us();
	}
	showing = ram_mapped_pages(ram, v->file);
	ram_unlock(ram);
	return showing ? ram_privatize(ram, v->file) : 0;
}

int volume_settle(struct volume *v, uint64_t *ret_settled)
{
	int r = 0;

	if (!v->has_file)
		return 0;
	ram_lock(v->all->ram);
	r = ram_detach(v->all->ram, v->file, ret_settled);
	ram_unlock(v->all->ram);
	return r;
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

int volumes_refresh(struct volumes *all, bool deep)
{
	struct vm_stats *s = all->stats;
	struct ram_counts c;
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
	stat_set(&s->map_failures, c.failures);
	if (deep && !r) {
		clock_gettime(CLOCK_REALTIME, &now);
		stat_set(&s->reconciled_unix_ms, (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000);
	}
	return r;
}
