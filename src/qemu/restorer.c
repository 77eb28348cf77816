/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The agent's part of a restore: guest RAM begins as a snapshot says, before QEMU has made its machine. What the
 * snapshot stores is mapped from it, what it refers to from the disk image; nothing is read. See "Restore" in
 * ARCHITECTURE.md.
 */
#include "qemu/agent.h"

#include "os/os.h"
#include "snapshot/image.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define GAP_PAGES 32u /* zeros between stored pages that are mapped along, as the snapshot's holes */

struct fill {
	struct agent *agent;
	struct ram_block *block;
	const struct snapshot_page *table;
	uint64_t pages, ram_page;
	struct volume *ram, *volume[AGENT_RESTORE_VOLUMES]; /* NULL: it cannot be mapped, and is read */
};

/* Pages that come from one place of one file. */
struct stretch {
	struct volume *volume;
	int fd;
	uint64_t page, pages, file_page;
};

static bool is_zero(const struct snapshot_page *p)
{
	return p->kind == SNAPSHOT_WORD && !p->value;
}

static bool follows(const struct fill *f, uint64_t page, const struct snapshot_page *first, uint64_t distance)
{
	const struct snapshot_page *p = &f->table[page];

	if (p->kind != first->kind)
		return false;
	return p->kind == SNAPSHOT_DATA || (p->volume == first->volume && p->value == first->value + distance);
}

/* The stretch that begins at `page`, which is no SNAPSHOT_WORD. */
static struct stretch stretch_at(const struct fill *f, uint64_t page)
{
	const struct agent_restore *restore = &f->agent->config.restore;
	const struct snapshot_page *first = &f->table[page];
	struct stretch s = { .page = page, .pages = 1 };
	uint64_t end = page + 1, last = page;

	if (first->kind == SNAPSHOT_DATA) {
		s.volume = f->ram;
		s.fd = restore->ram_fd;
		s.file_page = f->ram_page + page;
	} else {
		s.volume = f->volume[first->volume];
		s.fd = restore->volume_fd[first->volume];
		s.file_page = first->value;
	}
	for (; end < f->pages; end++) {
		if (follows(f, end, first, end - page))
			last = end;
		else if (first->kind != SNAPSHOT_DATA || !is_zero(&f->table[end]) || end - last >= GAP_PAGES)
			break;
	}
	s.pages = last + 1 - page;
	return s;
}

static int read_stretch(struct fill *f, const struct stretch *s)
{
	uint8_t *to = f->block->hva + os_bytes(s->page);
	size_t bytes = os_bytes(s->pages);

	for (size_t done = 0; done < bytes;) {
		/* Not pread(2): the agent stands in front of that. */
		long n = syscall(SYS_pread64, s->fd, to + done, bytes - done, os_bytes(s->file_page) + done);

		if (n <= 0)
			return n ? -errno : -EIO;
		done += (size_t)n;
	}
	return 0;
}

static bool is_lazy(const struct fill *f, const struct stretch *s)
{
	const struct agent_restore *restore = &f->agent->config.restore;

	return restore->pager.active && s->fd == restore->ram_fd;
}

/* The cache is filled while it is mapped. What cannot be mapped so is read when it is whole. */
static int bring_lazily(struct fill *f, const struct stretch *s)
{
	int r = s->volume && lazy_may_map() ? volume_map(s->volume, f->block, s->page, s->pages, s->file_page) : -ENOTSUP;

	if (!r && !lazy_mapped(f->block->hva + os_bytes(s->page), os_bytes(s->pages)))
		return 0;
	lazy_load_all();
	return r ? read_stretch(f, s) : 0;
}

static int bring(struct fill *f, const struct stretch *s)
{
	int r = -ENOTSUP;

	if (is_lazy(f, s))
		return bring_lazily(f, s);
	if (s->volume)
		r = volume_map(s->volume, f->block, s->page, s->pages, s->file_page);
	return r ? read_stretch(f, s) : 0;
}

static void write_words(struct fill *f, uint64_t page)
{
	uint64_t *at = (uint64_t *)(void *)(f->block->hva + os_bytes(page));

	for (size_t i = 0; i < OS_PAGE_BYTES / sizeof *at; i++)
		at[i] = f->table[page].value;
}

static int fill(struct fill *f)
{
	int r = 0;

	for (uint64_t page = 0; !r && page < f->pages;) {
		struct stretch s;

		if (f->table[page].kind == SNAPSHOT_WORD) {
			if (f->table[page].value)
				write_words(f, page);
			page++;
			continue;
		}
		s = stretch_at(f, page);
		r = bring(f, &s);
		page += s.pages;
	}
	return r;
}

static void attach(struct fill *f)
{
	const struct agent_restore *restore = &f->agent->config.restore;

	f->ram = restore->pager.active ? volumes_attach_cache(f->agent->volumes, restore->ram_fd)
				       : volumes_attach(f->agent->volumes, restore->ram_fd);
	for (uint32_t i = 0; i < restore->volumes; i++)
		f->volume[i] = volumes_attach(f->agent->volumes, restore->volume_fd[i]);
}

static void detach(struct fill *f)
{
	if (f->ram)
		volume_put(f->ram);
	for (uint32_t i = 0; i < f->agent->config.restore.volumes; i++)
		if (f->volume[i])
			volume_put(f->volume[i]);
}

static int find_block(struct fill *f, const struct snapshot_image *image)
{
	for (uint32_t i = 0; i < image->blocks; i++) {
		if (strcmp(image->block[i].name, f->block->name))
			continue;
		if (image->block[i].pages != f->block->pages) {
			agent_say("the snapshot has %llu MiB of %s, and this VM %llu MiB: give it the same -m",
				  (unsigned long long)image->block[i].pages >> 8, f->block->name,
				  (unsigned long long)f->block->pages >> 8);
			return -EINVAL;
		}
		f->table = image->block[i].table;
		f->pages = image->block[i].pages;
		f->ram_page = image->block[i].ram_page;
		return 0;
	}
	agent_say("the snapshot has no RAM called %s: give it the same machine", f->block->name);
	return -EINVAL;
}

int restorer_fill(struct agent *a, struct ram_block *block)
{
	struct fill f = { .agent = a, .block = block };
	char why[SNAPSHOT_WHY_BYTES] = "";
	struct snapshot_image image = { 0 };
	int r = snapshot_image_read(a->config.restore.pages_fd, &image, why);

	if (!r && image.volumes > a->config.restore.volumes)
		r = -EBADMSG;
	if (r) {
		agent_say("the snapshot cannot be used: %s", why[0] ? why : "its manifest does not fit its pages");
		return r;
	}
	r = find_block(&f, &image);
	if (!r && a->config.restore.pager.active)
		r = lazy_begin(a);
	if (!r) {
		attach(&f);
		r = fill(&f);
		if (!r && a->config.restore.pager.active)
			r = lazy_watch(block, f.ram_page);
		if (r)
			agent_say("guest RAM cannot be filled from the snapshot: %s", strerror(-r));
		detach(&f);
	}
	snapshot_image_free(&image);
	return r;
}

void restorer_load_state(struct agent *a, struct pause *pause)
{
	char why[256] = "the agent has no monitor";
	int r = pause ? pause_load_state(pause, a->config.restore.state_fd, why, sizeof why) : -ENOTCONN;

	if (r)
		agent_say("the device state cannot be loaded: %s", why);
}
