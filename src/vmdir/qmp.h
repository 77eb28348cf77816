/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * A QMP client (docs/interop/qmp-spec.rst of QEMU): one command at a time, from one thread.
 * Errors are negative errno values: -ETIMEDOUT, -EPIPE (QEMU is gone), -EREMOTEIO (QEMU refuses).
 */
#ifndef LATENT_VMDIR_QMP_H
#define LATENT_VMDIR_QMP_H

#include <json-c/json.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define QMP_WHY_BYTES 256

struct qmp;

/* Called for every event, while another function of this client runs. `data` may be NULL. */
typedef void (*qmp_event)(void *ctx, const char *name, struct json_object *data);

/* Takes the descriptor, also on failure. Nothing is sent or waited for. */
int qmp_open(int fd, qmp_event on_event, void *ctx, struct qmp **ret_qmp);
/* Connects to a monitor's socket. */
int qmp_connect(const char *path, qmp_event on_event, void *ctx, struct qmp **ret_qmp);
/* Waiting ends with -EINTR when `*stop` is set (by a signal handler without SA_RESTART); NULL: never. */
void qmp_stop_when(struct qmp *qmp, const _Atomic bool *stop);
void qmp_close(struct qmp *qmp); /* NULL is allowed */

/* To be called once before other commands; again after -ETIMEDOUT. */
int qmp_greet(struct qmp *qmp, unsigned timeout_ms);

struct qmp_command {
	const char *name;
	struct json_object *arguments; /* NULL: none; put by qmp_run */
	int fd;                        /* sent along, if greater than 0 */
	unsigned timeout_ms;
};

/* `*ret_value` (may be NULL) is the caller's to put; `why` (may be NULL) gets QEMU's words for a refusal. */
int qmp_run(struct qmp *qmp, const struct qmp_command *command, struct json_object **ret_value,
	    char why[QMP_WHY_BYTES]);
/* Sends it and waits for nothing. */
int qmp_send(struct qmp *qmp, const struct qmp_command *command);
/* The id that the next command will have. */
unsigned qmp_next_id(const struct qmp *qmp);

/* Handles at least one message, unless the time is over first: -ETIMEDOUT. */
int qmp_wait(struct qmp *qmp, unsigned timeout_ms);
int qmp_poll_fd(const struct qmp *qmp);
void qmp_drain(struct qmp *qmp); /* handles what has come */

#endif
