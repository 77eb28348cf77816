/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The tracking structure of one volume, shared by all VMs of one user on this host: for every page
 * of the volume ("location"), by how many guest pages of which VM it is mapped, whether a VM has
 * read it, and whether a read of it is in flight. After US9032181: locations mapped by one guest
 * page and by at least two form two groups, and the likelihood that a location will be shared comes
 * from what has been shared so far.
 *
 * Layout of the file DEV-INO-PAGES.vVERSION in the volumes directory, all in host byte order:
 *
 *   page 0            struct track_header: TRACK_SLOTS struct track_slot
 *   row 0             one 32-bit word a location, for the VM in slot 0; rows are whole pages long
 *   row 1 ...
 *
 * A row is written by its VM alone; the others read it. A slot is alive while its VM holds an
 * open-file-description lock on byte `slot` of the file, so the death of a VM, however sudden, takes
 * its counts away.
 *
 * The structure is advice. It may be lost, be wrong or be written by somebody hostile: it decides
 * how cheap a read is, never what it returns. A file that is cut while it is mapped raises SIGBUS;
 * the host's handler calls os_absorb_fault, which puts private memory in its place.
 *
 * Threading: any thread; words are atomics.
 */
#ifndef LATENT_VOLUME_TRACK_H
#define LATENT_VOLUME_TRACK_H

#include <stdbool.h>
#include <stdint.h>

#define TRACK_SLOTS 60

struct track;

/* Attaches to the structure of a volume, made if there is none. -EUSERS: all slots are taken. */
int track_open(const char *dir, uint64_t dev, uint64_t ino, uint64_t pages, struct track **ret_track);
/* The last one removes the file. NULL is allowed. */
void track_close(struct track *track);
/* The process ends, and other threads may still use it: removes the file if nobody else is attached. */
void track_abandon(struct track *track);
/* Removes the structures in `dir` that nobody is attached to: VMs that are killed leave theirs. */
void track_sweep(const char *dir);

/* Looks again which VMs live; otherwise that is known to be at most 100 ms old where it is used. */
void track_refresh(struct track *track);
uint32_t track_readers(struct track *track);

/*
 * The likelihood, 0..1, that locations will be mapped by two guest pages or more; the mean over the
 * run. For a location that another VM has read, or that this VM maps already: 1. For any other, with
 * fewer than two VMs attached: 0; else
 *
 *     (hits + 1) / (follower_reads + 2)
 *
 * where a hit is a location that a VM was not the first to read, and follower_reads is the number
 * of locations read by all attached VMs but the one that has read most. (Laplace's rule of
 * succession: of the reads that could have been hits, how many were.)
 */
double track_likelihood(struct track *track, uint64_t page, uint64_t pages);

/* This VM has read the locations. */
void track_note_read(struct track *track, uint64_t page, uint64_t pages);

/* A read of the locations begins and ends; begin returns how many of them another VM has in flight. */
uint64_t track_begin_flight(struct track *track, uint64_t page, uint64_t pages);
void track_end_flight(struct track *track, uint64_t page, uint64_t pages);

/* Guest pages of this VM begin or end to map the locations. */
void track_add_maps(struct track *track, uint64_t page, uint64_t pages);
void track_drop_maps(struct track *track, uint64_t page, uint64_t pages);

/* Guest pages of all living VMs that map a location. */
uint64_t track_maps(struct track *track, uint64_t page);

/* The two groups: locations mapped by exactly one guest page, and by at least two. */
void track_groups(struct track *track, uint64_t *ret_one, uint64_t *ret_many);

#endif
