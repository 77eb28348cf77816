/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The manifest of a snapshot: what it was taken of, and what has to be there to restore it. It may come from
 * anywhere, so whatever is read from it is checked: names are plain, sizes are in bounds, files within the
 * directory are plain names, and volumes are known by their contents, not by where they were.
 */
#ifndef LATENT_SNAPSHOT_MANIFEST_H
#define LATENT_SNAPSHOT_MANIFEST_H

#include "snapshot/image.h"
#include "snapshot/machine.h"

#define MANIFEST_PATH_BYTES 256
#define MANIFEST_DISKS 16
#define MANIFEST_LAYERS 24
#define MANIFEST_MAX_BYTES (1 << 20)
#define MANIFEST_GUID_BYTES 37

/* What a file that RAM refers to is; of a snapshot's `ram` each page can be checked. */
enum manifest_role { MANIFEST_IMAGE, MANIFEST_RAM };

/* A file that RAM refers to, or a disk. */
struct manifest_volume {
	char path[MANIFEST_PATH_BYTES]; /* where it was; a hint */
	uint64_t bytes;
	uint64_t fingerprint; /* of the contents, see manifest_identify */
	uint64_t dev, ino, mtime_ns; /* the same file, untouched, if they are the same */
	enum manifest_role role;     /* files that RAM refers to */
};

/* For a sentence that says what a file should be: its bytes and its fingerprint, both uintmax_t. */
#define MANIFEST_EXPECTED "%ju bytes with the fingerprint %016jx, and not written since"

/* A disk is a chain of files, the guest's own first; each lies over the next one. */
struct manifest_layer {
	char file[64]; /* within disks/; empty: it is where it was */
	char format[16];
	struct manifest_volume volume; /* path: what it was called when the VM ran */
};

struct manifest_disk {
	char drive[64]; /* QEMU's name of it: of the drive, or of the block node */
	uint64_t bytes; /* as the guest sees it */
	uint32_t layers;
	struct manifest_layer layer[MANIFEST_LAYERS];
};

/* The snapshot that this one was compared with. Nothing is looked for there: what is needed is a volume. */
struct manifest_parent {
	char path[MANIFEST_PATH_BYTES]; /* empty: none */
	char name[64];
	uint64_t created_unix_s;
};

struct manifest {
	char name[64], qemu_version[64];
	uint64_t created_unix_s, ram_bytes, state_bytes;
	uint64_t state_digest; /* XXH3-64 of `state` */
	uint64_t pages_digest; /* the checksum in the header of `pages`, which has the digests of what is in `ram` */
	uint64_t packed_bytes; /* of `ram.zst`; 0: there is a plain `ram` */
	struct manifest_parent parent;
	uint32_t volumes, disks;
	struct manifest_volume volume[SNAPSHOT_VOLUMES];
	struct manifest_disk disk[MANIFEST_DISKS];
	bool stood;              /* the guest did not run when it was saved */
	char generation_id[MANIFEST_GUID_BYTES]; /* of a vmgenid device, for a migration; empty: none, or a snapshot */
	struct machine *machine; /* freed by whoever has read it (machine_free); NULL: */
	char machine_missing[MACHINE_WHY_BYTES]; /* why it could not be described; empty: by an older Latent */
};

const char *manifest_role_name(enum manifest_role role);

/* As it is in the file; the caller frees it. NULL: no memory. */
char *manifest_to_text(const struct manifest *manifest);
/* Into `dir` (an open directory), with fsync. */
int manifest_write(const struct manifest *manifest, int dir_fd);
/* -EBADMSG: `why` says what is wrong with it. */
int manifest_read(int dir_fd, struct manifest *ret_manifest, char why[SNAPSHOT_WHY_BYTES]);
/* The same of the file itself. */
int manifest_read_file(int fd, struct manifest *ret_manifest, char why[SNAPSHOT_WHY_BYTES]);

/* `state`, all of it. -EBADMSG: `why` says what is wrong with it. */
int manifest_check_state(const struct manifest *manifest, int fd, char why[SNAPSHOT_WHY_BYTES]);

/* `pages`, by its header alone: the checksum there is that of the rest, with which whoever reads the file compares it.
 * -EBADMSG: `why` says what is wrong with it. */
int manifest_check_pages(const struct manifest *manifest, int fd, char why[SNAPSHOT_WHY_BYTES]);

/*
 * What a file is known by, but for its path. The fingerprint is the XXH3-64 over the size and up to 1,024 pages,
 * evenly spread, the first and the last among them: it tells one image from another, and one that was replaced;
 * not every change of a few bytes.
 */
int manifest_identify(int fd, struct manifest_volume *volume);

/* 0: it is that file, untouched since (which costs nothing to see), or another one with that fingerprint, a copy.
 * -ESTALE: it is neither, and `*ret_now` says what it is; the same file is refused when it was written since, whatever
 * its fingerprint, which would not see every write. */
int manifest_compare(int fd, const struct manifest_volume *volume, struct manifest_volume *ret_now);

#endif
