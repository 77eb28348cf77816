/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The VMM of a running VM, over its monitor for movers: the pause in which its devices are saved, and the way back. What
 * a save and a migration have in common.
 *
 * Functions return 0 or a negative errno, with a sentence in the `why` that vmm_open was given. One thread.
 */
#ifndef LATENT_SNAPSHOT_VMM_H
#define LATENT_SNAPSHOT_VMM_H

#include "snapshot/image.h"
#include "vmdir/qmp.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct vmm {
	struct qmp *qmp;
	char *why;
	char version[64];       /* of QEMU */
	char migration[32];     /* the last status that QEMU has told of its `migrate` */
	int state_fd;           /* a memfd with the device state; -1: not begun */
	uint64_t stopped_us, continued_us; /* 0: not yet */
	bool ran, stopped;      /* ran: before anything was begun; stopped: it stands, or will by the `migrate` begun */
	bool prepared;          /* QEMU's capabilities for migrating are ours */
	int64_t max_bandwidth;  /* of QEMU's `migrate`, bytes a second, as the user has it; -1: untouched */
};

/* `run_dir`: the VM's. Waiting ends with -EINTR when `*stop` is set, until vmm_begin_pause. -EBUSY: the VM is in no state
 * for it, or a user's `migrate` is under way. Must be closed also after a failure. */
int vmm_open(const char *run_dir, const _Atomic bool *stop, char why[SNAPSHOT_WHY_BYTES], struct vmm *ret_vmm);
/* The same of one that is starting, and waits with -incoming defer; `end_fd` is readable when it has ended (-1: not
 * known). */
int vmm_open_waiting(const char *run_dir, int end_fd, char why[SNAPSHOT_WHY_BYTES], struct vmm *ret_vmm);
/* Whether the guest runs now. */
int vmm_query_running(struct vmm *vmm, bool *ret_runs);
/* What vmm_start_load would else take the guest's time for; before it, once. `runs`: the guest will be let run; until then
 * images are not locked, nor looked at. (Of one that stands they must be: QEMU 7.2 dies when it shall migrate such a VM.) */
int vmm_prepare_load(struct vmm *vmm, bool runs);
/*
 * Its devices get the state that the file holds; then the guest runs. Both are begun, and are over when `migration` is
 * "completed" (or "failed"), and when `continued_us` is set: QEMU may be waiting for a page of guest RAM meanwhile,
 * which the caller has to bring. vmm_drain, when vmm_poll_fd is readable, hears of it.
 */
int vmm_start_load(struct vmm *vmm, int state_fd);
int vmm_start_guest(struct vmm *vmm);
int vmm_poll_fd(const struct vmm *vmm); /* -1: it is not open */
void vmm_drain(struct vmm *vmm);
/* Lets the guest be; QEMU's bandwidth for migrating is as it was before, and the capabilities are off. */
void vmm_close(struct vmm *vmm);

/* `*ret_value` may be NULL; `arguments` are put. */
int vmm_run(struct vmm *vmm, const char *name, struct json_object *arguments, struct json_object **ret_value);

/* From here on, also after a failure, the guest stands sooner or later, and must be let go on by one of the last two. RAM
 * that is no file is sent while it still runs; then it is stopped. */
int vmm_begin_pause(struct vmm *vmm);
int vmm_wait_stopped(struct vmm *vmm);
/* The guest is stopped: its devices are saved, and the locks of its images dropped. */
int vmm_save_devices(struct vmm *vmm, uint64_t *ret_bytes);
/* If it ran before. (The images' locks are taken again.) */
int vmm_go_on(struct vmm *vmm);
/* After a failure: the guest shall run, whatever state QEMU is in. `why` stays. */
void vmm_undo(struct vmm *vmm);

#endif
