/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "latent/latent.h"

#include "core/ram.h"
#include "os/log.h"
#include "os/os.h"
#include "volume/volume.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PUBLIC __attribute__((visibility("default")))

_Static_assert(LATENT_PAGE_BYTES == OS_PAGE_BYTES, "one page size");

struct latent_vm {
	struct ram *ram;
	struct volumes *volumes;
	struct vm_stats stats;
	char *tracks_dir;
};

PUBLIC const char *latent_version(void)
{
	return LATENT_VERSION_TEXT;
}

PUBLIC void latent_options_init(struct latent_options *options)
{
	*options = (struct latent_options){ .size = sizeof *options, .share_threshold = 0.1 };
}

PUBLIC int latent_vm_create(const struct latent_options *o, struct latent_vm **ret_vm)
{
	struct volume_options v;
	struct latent_vm *vm;
	int r;

	if (o->size != sizeof *o || !(o->share_threshold >= 0 && o->share_threshold <= 1) || !o->tracks_dir ||
	    o->max_maps > os_max_maps() / 2)
		return -EINVAL;
	vm = calloc(1, sizeof *vm);
	if (!vm)
		return -ENOMEM;
	vm->tracks_dir = strdup(o->tracks_dir);
	v = (struct volume_options){
		.share_threshold = o->share_threshold,
		.min_run_pages = o->min_run_pages,
		.trust_images = o->trust_images,
		.tracks_dir = vm->tracks_dir,
		.lease_signal = o->lease_signal,
		.lease_tid = o->lease_tid,
	};
	os_log_to(o->log, o->log_ctx);
	r = vm->tracks_dir ? ram_create(o->max_maps, &vm->ram) : -ENOMEM;
	if (!r)
		r = volumes_create(vm->ram, &v, &vm->stats, &vm->volumes);
	if (r) {
		latent_vm_destroy(vm);
		return r;
	}
	*ret_vm = vm;
	return 0;
}

PUBLIC void latent_vm_destroy(struct latent_vm *vm)
{
	if (!vm)
		return;
	if (vm->ram)
		ram_remove_blocks(vm->ram);
	volumes_destroy(vm->volumes);
	ram_destroy(vm->ram);
	free(vm->tracks_dir);
	free(vm);
}

/* ---- guest RAM -------------------------------------------------------------------------------- */

static bool is_aligned(uint64_t n)
{
	return !(n & (OS_PAGE_BYTES - 1));
}

PUBLIC int latent_ram_add(struct latent_vm *vm, const char *name, void *hva, size_t bytes, int memfd,
			  uint64_t offset)
{
	int r;

	if (!bytes || !is_aligned((uintptr_t)hva) || !is_aligned(bytes) || !is_aligned(offset) ||
	    strlen(name) >= RAM_NAME_BYTES)
		return -EINVAL;
	ram_lock(vm->ram);
	r = ram_add_block(vm->ram, name, hva, bytes >> OS_PAGE_SHIFT, memfd, offset, NULL);
	ram_unlock(vm->ram);
	return r;
}

PUBLIC int latent_ram_remove(struct latent_vm *vm, void *hva)
{
	struct ram_block *b;
	int r = -ENOENT;

	ram_lock(vm->ram);
	b = ram_find(vm->ram, hva, OS_PAGE_BYTES);
	if (b && b->hva == hva) {
		ram_remove_block(vm->ram, b);
		r = 0;
	}
	ram_unlock(vm->ram);
	return r;
}

PUBLIC int latent_ram_discard(struct latent_vm *vm, void *hva, size_t bytes)
{
	struct ram_block *b;
	int r = -ENOENT;

	if (!is_aligned((uintptr_t)hva) || !is_aligned(bytes))
		return -EINVAL;
	ram_lock(vm->ram);
	b = ram_find(vm->ram, hva, bytes);
	if (b)
		r = ram_discard(vm->ram, b, ((uintptr_t)hva - (uintptr_t)b->hva) >> OS_PAGE_SHIFT,
				bytes >> OS_PAGE_SHIFT);
	ram_unlock(vm->ram);
	return r;
}

PUBLIC void latent_ram_marked(struct latent_vm *vm, void *hva, size_t bytes, int advice)
{
	ram_lock(vm->ram);
	ram_remember_advice(vm->ram, hva, bytes, advice);
	ram_unlock(vm->ram);
}

PUBLIC ssize_t latent_preadv(struct latent_vm *vm, int fd, const struct iovec *iov, int count, off_t offset)
{
	return volumes_read(vm->volumes, fd, iov, count, offset);
}

/* ---- images ----------------------------------------------------------------------------------- */

static int do_privatize(struct volume *v)
{
	return volume_break(v, volume_lease_breaks(v) ? VOLUME_WRITABLE : VOLUME_DETACHED);
}

static int do_settle(struct volume *v)
{
	struct ram *ram = volume_ram(v);
	int r = -EBUSY;

	ram_lock(ram);
	if (!volume_is_mapped(v))
		r = volume_settle(v, NULL);
	ram_unlock(ram);
	return r;
}

static int do_release(struct volume *v)
{
	volume_release(v);
	return 0;
}

static int for_images(struct latent_vm *vm, const char *path, int (*step)(struct volume *v))
{
	struct volume *v;
	int r = 0;

	if (path) {
		v = volumes_by_path(vm->volumes, path);
		return v ? step(v) : -ENOENT;
	}
	for (uint32_t i = 0; (v = volumes_nth(vm->volumes, i)); i++) {
		int one = step(v);

		r = r ? r : one;
	}
	return r;
}

PUBLIC int latent_image_privatize(struct latent_vm *vm, const char *path)
{
	return for_images(vm, path, do_privatize);
}

PUBLIC int latent_image_settle(struct latent_vm *vm, const char *path)
{
	return for_images(vm, path, do_settle);
}

PUBLIC int latent_image_release(struct latent_vm *vm, const char *path)
{
	return for_images(vm, path, do_release);
}

PUBLIC int latent_image_broken(struct latent_vm *vm, char *path, size_t room)
{
	struct volume *v = volumes_broken_lease(vm->volumes);

	if (!v)
		return 0;
	snprintf(path, room, "%s", volume_path(v));
	return 1;
}

PUBLIC void latent_images_tidy(struct latent_vm *vm)
{
	volumes_tidy(vm->volumes);
}

PUBLIC int latent_absorb_fault(const void *addr)
{
	return os_absorb_fault(addr);
}

/* ---- statistics ------------------------------------------------------------------------------- */

PUBLIC int latent_stats_get(struct latent_vm *vm, struct latent_stats *stats)
{
	struct vm_stats *s = &vm->stats;
	int r;

	if (stats->size != sizeof *stats)
		return -EINVAL;
	r = volumes_refresh(vm->volumes, true);
	if (r)
		return r;
	*stats = (struct latent_stats){
		.size = sizeof *stats,
		.ram_pages = stat_get(&s->pages_base_now) + stat_get(&s->pages_overlay_now),
		.overlay_pages = stat_get(&s->pages_overlay_now),
		.private_pages = stat_get(&s->pages_private_now),
		.maps = stat_get(&s->maps_ram_now),
		.other_maps = stat_get(&s->maps_other_now),
		.budget_maps = stat_get(&s->maps_budget_now),
	};
	for (uint32_t i = 0; i < s->volume_count; i++) {
		stats->bytes_asked += stat_get(&s->volumes[i].bytes_asked);
		stats->bytes_shortcut += stat_get(&s->volumes[i].bytes_shortcut);
		stats->bytes_from_storage += stat_get(&s->volumes[i].bytes_from_storage);
	}
	return 0;
}
