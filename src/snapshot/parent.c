/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "snapshot/parent.h"

#include "snapshot/reader.h"
#include "snapshot/store.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NOWHERE UINT32_MAX

struct parent {
	struct reader reader;
	struct manifest_volume ram;
	struct equal equal; /* pages of its own `ram` */
	uint32_t volume_of_ram, volume[SNAPSHOT_VOLUMES]; /* in the new snapshot; NOWHERE: there was no room */
	/* Blocks of the new snapshot, in the order of its pages, and where the parent has them. */
	struct {
		uint64_t page, pages, parent_page;
	} block[SNAPSHOT_BLOCKS];
	uint32_t blocks;
};

static void index_pages(struct parent *p)
{
	for (uint64_t page = 0; page < p->reader.image.pages; page++)
		if (snapshot_page_at(&p->reader.image, page)->kind == SNAPSHOT_DATA)
			equal_add(&p->equal, page);
}

static int open_all(struct parent *p, const char *dir, char *why)
{
	int r = reader_open(dir, &p->reader, why);

	if (!r)
		r = reader_need_ram(&p->reader, why);
	if (!r)
		r = reader_open_files(&p->reader, why);
	if (r)
		return r;
	p->ram.role = MANIFEST_RAM;
	if (snprintf(p->ram.path, sizeof p->ram.path, "%s/" SNAPSHOT_RAM, p->reader.path) >= (int)sizeof p->ram.path)
		r = -ENAMETOOLONG;
	if (!r)
		r = manifest_identify(p->reader.ram_fd, &p->ram);
	if (!r)
		r = equal_create(&p->reader.image, &p->equal);
	if (r)
		snprintf(why, SNAPSHOT_WHY_BYTES, SNAPSHOT_RAM " cannot be used: %s", strerror(-r));
	else
		index_pages(p);
	return r;
}

int parent_open(const char *dir, struct parent **ret_parent, char why[SNAPSHOT_WHY_BYTES])
{
	struct parent *p = calloc(1, sizeof *p);
	char words[SNAPSHOT_WHY_BYTES] = "";
	int r;

	if (!p) {
		snprintf(why, SNAPSHOT_WHY_BYTES, "no memory");
		return -ENOMEM;
	}
	r = open_all(p, dir, words);
	if (r) {
		snprintf(why, SNAPSHOT_WHY_BYTES, "the parent %.80s: %.160s", dir, words);
		parent_close(p);
	} else {
		*ret_parent = p;
	}
	return r;
}

void parent_close(struct parent *p)
{
	if (!p)
		return;
	equal_free(&p->equal);
	reader_close(&p->reader);
	free(p);
}

void parent_describe(const struct parent *p, struct manifest_parent *ret_parent)
{
	*ret_parent = (struct manifest_parent){ .created_unix_s = p->reader.manifest.created_unix_s };
	snprintf(ret_parent->path, sizeof ret_parent->path, "%.255s", p->reader.path);
	snprintf(ret_parent->name, sizeof ret_parent->name, "%s", p->reader.manifest.name);
}

/* ---- where it fits ------------------------------------------------------------------------------ */

static uint32_t join_volume(const struct manifest_volume *file, struct manifest_volume *volume, uint32_t *volumes)
{
	for (uint32_t i = 0; i < *volumes; i++)
		if (volume[i].dev == file->dev && volume[i].ino == file->ino)
			return i;
	if (*volumes == SNAPSHOT_VOLUMES)
		return NOWHERE;
	volume[*volumes] = *file;
	return (*volumes)++;
}

void parent_join_volumes(struct parent *p, struct manifest_volume volume[SNAPSHOT_VOLUMES], uint32_t *volumes)
{
	p->volume_of_ram = join_volume(&p->ram, volume, volumes);
	for (uint32_t i = 0; i < p->reader.manifest.volumes; i++) {
		struct manifest_volume file = p->reader.manifest.volume[i];
		struct manifest_volume now;

		/* It may be a copy, with that fingerprint: what was opened counts. */
		if (!manifest_identify(p->reader.file[i].fd, &now)) {
			file.dev = now.dev;
			file.ino = now.ino;
			file.mtime_ns = now.mtime_ns;
		}
		p->volume[i] = join_volume(&file, volume, volumes);
	}
}

void parent_join_blocks(struct parent *p, const struct snapshot_image *image)
{
	const struct snapshot_image *old = &p->reader.image;

	p->blocks = 0;
	for (uint32_t i = 0; i < image->blocks; i++) {
		for (uint32_t j = 0; j < old->blocks; j++) {
			if (strcmp(image->block[i].name, old->block[j].name))
				continue;
			p->block[p->blocks].page = image->block[i].ram_page;
			p->block[p->blocks].parent_page = old->block[j].ram_page;
			p->block[p->blocks++].pages = image->block[i].pages < old->block[j].pages ? image->block[i].pages
												  : old->block[j].pages;
			break;
		}
	}
}

/* ---- looking for a page ------------------------------------------------------------------------- */

static bool refer(const struct parent *p, int file, uint64_t file_page, const uint8_t *bytes,
		  struct snapshot_page *ret_page)
{
	uint32_t volume = file < 0 ? p->volume_of_ram : p->volume[file];

	if (volume == NOWHERE || !store_proves(reader_fd(&p->reader, file), file_page, bytes))
		return false;
	*ret_page = (struct snapshot_page){ SNAPSHOT_VOLUME, volume, file_page };
	return true;
}

/* Where the parent has the page of this number; false: it has none, or one of one word. */
static bool same_place(const struct parent *p, uint64_t page, int *ret_file, uint64_t *ret_file_page)
{
	for (uint32_t i = 0; i < p->blocks; i++)
		if (page >= p->block[i].page && page - p->block[i].page < p->block[i].pages)
			return reader_locate(&p->reader, p->block[i].parent_page + page - p->block[i].page, ret_file,
					     ret_file_page);
	return false;
}

bool parent_find(const struct parent *p, uint64_t page, uint64_t digest, const uint8_t *bytes,
		 struct snapshot_page *ret_page)
{
	uint64_t file_page;
	int file;

	/* Of what the parent itself stores the digest is known: a page that has changed need not be read. */
	if (same_place(p, page, &file, &file_page) &&
	    (file >= 0 || snapshot_page_at(&p->reader.image, file_page)->value == digest) &&
	    refer(p, file, file_page, bytes, ret_page))
		return true;
	for (uint64_t at = 0; equal_next(&p->equal, digest, &at, &file_page);)
		if (refer(p, -1, file_page, bytes, ret_page))
			return true;
	return false;
}
