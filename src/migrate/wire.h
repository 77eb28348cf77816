/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * What the two sides of a migration say to each other: docs/migration.md has it in full. A message is a header and
 * a payload. Here they are made, and checked before anything is believed, allocated or written by them; link.h
 * carries them. Numbers are little-endian. No state, no I/O; any thread.
 *
 * Errors are negative errno values; -EPROTO: `why` says in a sentence what is wrong with the message.
 */
#ifndef LATENT_MIGRATE_WIRE_H
#define LATENT_MIGRATE_WIRE_H

#include "migrate/digest.h"
#include "snapshot/image.h"

#define WIRE_MAGIC 0x54415247494d544cull /* "LTMIGRAT" */
#define WIRE_VERSION 3u
#define WIRE_SESSION_BYTES 16
#define WIRE_PAYLOAD_MAX (2u << 20)
#define WIRE_RUNS_MAX 4096u
#define WIRE_DATA_PAGES_MAX 256u  /* contents in one message */
#define WIRE_STATE_MAX (1u << 20) /* of one message */
#define WIRE_WANTED_MAX 1024u
#define WIRE_TEXT_MAX 512u
#define WIRE_FILES_MAX 512u
#define WIRE_OWED_MAX 4096u
#define WIRE_HAVE_MAX 65536u /* digests in one message */
#define WIRE_SAME_MAX WIRE_WANTED_MAX
#define WIRE_HINTS_MAX WIRE_WANTED_MAX
#define WIRE_HINT_FILES 64u /* of disks, that hints may name */
#define WIRE_HINT_PAGES (1ull << 50) /* no file has more */
#define WIRE_SHA256_BYTES 32u

enum wire_type {
	WIRE_HELLO,    /* both: struct wire_hello. The first message of a connection */
	WIRE_REFUSE,   /* both: a sentence. The last message of a connection */
	WIRE_MANIFEST, /* source: a manifest as of a snapshot (snapshot/manifest.h) */
	WIRE_BLOCKS,   /* source: an array of struct snapshot_block */
	WIRE_READY,    /* destination: struct wire_ready. It has started its VMM, which waits */
	WIRE_PAGES,    /* source: see struct wire_pages */
	WIRE_PASS,     /* source: a pass is over; destination: it has taken all of the pass. No payload */
	WIRE_STATE,    /* source: the next part of the device state */
	WIRE_SWITCH,   /* source: its guest stands, and all has been told. struct wire_switch */
	WIRE_LOADED,   /* destination: could run now. No payload */
	WIRE_TOKEN,    /* source: run. After this the source's guest never runs again, unless WIRE_FAILED comes. No payload */
	WIRE_RUNNING,  /* destination: the guest runs. No payload */
	WIRE_FAILED,   /* destination: a sentence. It does not run, and never will */
	WIRE_WANT,     /* destination: pages that somebody waits for, an array of u64 */
	WIRE_DONE,     /* destination: has all pages; source: has let go of its own. No payload */
	WIRE_PING,     /* both, when there has been nothing to say for a second. No payload */
	WIRE_FILES,    /* source: struct wire_files, and a digest for each file (digest.h) */
	WIRE_OWED,     /* destination, when a migration goes on: an array of struct wire_owed, pages that are missing */
	WIRE_HAVE,   /* destination, before WIRE_READY, any number of times: an array of u64, XXH3-64 of pages of its snapshots */
	WIRE_SAME,   /* source, while its guest runs: an array of struct wire_same, pages that the destination may have */
	WIRE_LACK,   /* destination, before its WIRE_PASS: pages of WIRE_SAME that it has not, an array of u64 */
	WIRE_HINT,   /* source, while its guest runs: an array of struct wire_hint, pages that a disk may have */
	WIRE_STALE,  /* destination, before its WIRE_PASS: pages of WIRE_HINT that it has not found there, an array of u64 */
	WIRE_TYPES
};

struct wire_header {
	uint32_t type, bytes; /* bytes: of the payload */
	uint32_t checksum;    /* wire_checksum */
	uint32_t reserved;    /* 0 */
};

struct wire_message {
	enum wire_type type;
	const uint8_t *payload; /* the receiver's buffer */
	size_t bytes;
};

struct wire_hello {
	uint64_t magic;
	uint32_t version, page_bytes;
	uint8_t session[WIRE_SESSION_BYTES]; /* random, of the source; the destination repeats it */
	uint32_t resume;                     /* 1: the link was cut after the switch, and goes on */
	uint32_t reserved;
};

struct wire_ready {
	uint64_t volumes; /* bit n: volume n of the manifest is there, and is the same */
	uint64_t disks;   /* bit n: file n of its disks (disk by disk, from the top) can be read, and hints may name it */
};

/* Digests follow: of the manifest's volumes, then of what its disks lie over, disk by disk, from the top. */
struct wire_files {
	uint32_t count;
	uint32_t ballot; /* 1: beside the first disk there is one (ballot.h) */
};

struct wire_owed {
	uint64_t page, pages;
};

/* The page's contents are those with this SHA-256. `digest`: their XXH3-64, to find them by. */
struct wire_same {
	uint64_t page, digest;
	uint8_t sha256[WIRE_SHA256_BYTES];
};

/* The page's contents have this SHA-256, and may be those of page `file_page` of file `file` of the disks. */
struct wire_hint {
	uint64_t page, file_page;
	uint32_t file, reserved; /* reserved: 0 */
	uint8_t sha256[WIRE_SHA256_BYTES];
};

struct wire_switch {
	uint64_t state_bytes; /* of all WIRE_STATE */
	uint64_t missing;     /* pages that the destination has not got in their last state */
	uint64_t checksum;    /* XXH3-64 of the device state */
};

/* What is said of pages, a run at a time. What was said last of a page counts. */
enum wire_kind {
	WIRE_MISSING, /* has changed, or was never told: it comes when it is wanted, or by itself */
	WIRE_WORD,    /* one 8-byte word, repeated: `value` */
	WIRE_VOLUME,  /* pages of volume `volume` from `value` on */
	WIRE_DATA,    /* contents follow, page after page, in the order of the runs */
	WIRE_KINDS
};

struct wire_run {
	uint64_t page; /* the first; numbered through all blocks */
	uint32_t pages;
	uint16_t kind, volume;
	uint64_t value;
};

/* The payload of WIRE_PAGES: this, the runs, and the contents of all that are WIRE_DATA. */
struct wire_pages_header {
	uint32_t runs, data_pages;
	uint32_t packed_bytes; /* contents are one zstd frame of so many bytes; 0: they are as they are */
	uint32_t reserved;
};

struct wire_pages {
	uint32_t runs, data_pages, packed_bytes;
	const struct wire_run *run;
	const uint8_t *data; /* packed, or not */
};

/* A header, before its payload is received. `from_source`: who has sent it. */
int wire_check_header(const struct wire_header *header, bool from_source, char why[SNAPSHOT_WHY_BYTES]);

/* The CRC-32 of the header's first 8 bytes and the payload: what a link without TLS spoils is seen. */
uint32_t wire_checksum(const struct wire_header *header, const void *payload);

int wire_read_hello(const struct wire_message *message, struct wire_hello *ret_hello, char why[SNAPSHOT_WHY_BYTES]);
int wire_read_text(const struct wire_message *message, char ret_text[WIRE_TEXT_MAX], char why[SNAPSHOT_WHY_BYTES]);
/* Blocks into a layout for snapshot_image_create; nothing is allocated. */
int wire_read_blocks(const struct wire_message *message, struct snapshot_image *ret_layout,
		     char why[SNAPSHOT_WHY_BYTES]);
int wire_read_switch(const struct wire_message *message, struct wire_switch *ret_switch, char why[SNAPSHOT_WHY_BYTES]);

/* What pages may be and refer to. */
struct wire_limits {
	uint64_t pages; /* of RAM */
	uint32_t volumes;
	uint64_t volume_pages[SNAPSHOT_VOLUMES]; /* 0: not to be had */
	uint64_t disks; /* bit n: hints may name file n */
};

/* Every run lies in RAM and in its volume, and the contents are as long as they must be. The payload must be
 * aligned to 8 bytes, and stays the caller's. */
int wire_read_pages(const struct wire_message *message, const struct wire_limits *limits,
		    struct wire_pages *ret_pages, char why[SNAPSHOT_WHY_BYTES]);
/* The contents of all WIRE_DATA, page after page: where they lie, or unpacked into `room`, for data_pages. */
int wire_unpack(const struct wire_pages *pages, uint8_t *room, const uint8_t **ret_data,
		char why[SNAPSHOT_WHY_BYTES]);
/* `ret_digests` points into the payload; there are `count` of them, and not another number. */
int wire_read_files(const struct wire_message *message, uint32_t count, bool *ret_ballot,
		    const struct digest **ret_digests, char why[SNAPSHOT_WHY_BYTES]);
/* The same of pages that are missing. */
int wire_read_owed(const struct wire_message *message, uint64_t pages, const struct wire_owed **ret_owed,
		   size_t *ret_count, char why[SNAPSHOT_WHY_BYTES]);
int wire_read_have(const struct wire_message *message, const uint64_t **ret_digests, size_t *ret_count,
		   char why[SNAPSHOT_WHY_BYTES]);
int wire_read_same(const struct wire_message *message, uint64_t pages, const struct wire_same **ret_same,
		   size_t *ret_count, char why[SNAPSHOT_WHY_BYTES]);
int wire_read_hints(const struct wire_message *message, const struct wire_limits *limits,
		    const struct wire_hint **ret_hints, size_t *ret_count, char why[SNAPSHOT_WHY_BYTES]);
/* Of WIRE_WANT, WIRE_LACK and WIRE_STALE. `ret_pages` points into the payload. */
int wire_read_wanted(const struct wire_message *message, uint64_t pages, const uint64_t **ret_pages,
		     size_t *ret_count, char why[SNAPSHOT_WHY_BYTES]);

/* A WIRE_PAGES that is being made. Runs that continue each other are one. */
struct wire_batch {
	uint32_t runs, data_pages;
	struct wire_run run[WIRE_RUNS_MAX];
	uint8_t data[WIRE_DATA_PAGES_MAX << 12];
};

/* False: there is no room, and nothing was added. Of WIRE_DATA `contents` has one page; `pages` is 1. */
bool wire_add(struct wire_batch *batch, const struct wire_run *run, const uint8_t *contents);
/* The payload, into `room` of WIRE_PAYLOAD_MAX bytes; packed by zstd at `level`, if that makes it smaller. 0: not
 * packed. Returns its bytes. The batch is empty afterwards. */
size_t wire_close(struct wire_batch *batch, int level, uint8_t *room);

#endif
