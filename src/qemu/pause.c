/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* The guest stopped and continued over the agent's own QMP connection. */
#include "qemu/agent.h"

#include "os/os.h"
#include "vmdir/qmp.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define REPLY_MS 5000
#define UNDO_MS 10000
#define SWITCHOVER_MS 3000
#define START_MS 60000 /* QEMU answers when its machine is made */

struct pause {
	struct qmp *qmp;
	uint64_t stops; /* STOP events seen */
	bool ran;       /* the guest, when pause_prepare looked */
	bool ran_before_save;
	int64_t bandwidth_before_save; /* of QEMU's `migrate`, bytes a second; -1: not known */
	bool loaded;    /* the device state */
	uint64_t resumed_us; /* the guest has run, since then; 0: not yet */
};

static void on_event(void *ctx, const char *name, struct json_object *data)
{
	struct pause *p = ctx;
	struct json_object *status;

	p->stops += !strcmp(name, "STOP");
	if (!strcmp(name, "RESUME") && !p->resumed_us)
		p->resumed_us = os_now_us();
	if (!strcmp(name, "MIGRATION") && data && json_object_object_get_ex(data, "status", &status) &&
	    !strcmp(json_object_get_string(status), "completed"))
		p->loaded = true;
}

int pause_open(int fd, struct pause **ret_pause)
{
	struct pause *p = calloc(1, sizeof *p);
	int r = p ? qmp_open(fd, on_event, p, &p->qmp) : -ENOMEM;

	if (r)
		free(p);
	else
		*ret_pause = p;
	return r;
}

static int run(struct pause *p, const char *name, struct json_object **ret_value)
{
	const struct qmp_command command = { .name = name, .timeout_ms = REPLY_MS };

	return qmp_run(p->qmp, &command, ret_value, NULL);
}

/* States in which nothing but a command of a user makes the guest run. */
static bool is_still(const char *status)
{
	static const char *const still[] = { "paused", "prelaunch", "shutdown", "io-error", "guest-panicked",
					     "internal-error", "watchdog" };

	for (size_t i = 0; i < sizeof still / sizeof still[0]; i++)
		if (!strcmp(status, still[i]))
			return true;
	return false;
}

static int query_status(struct pause *p, char ret_status[32])
{
	struct json_object *value = NULL, *status;
	int r = run(p, "query-status", &value);

	if (!r && !json_object_object_get_ex(value, "status", &status))
		r = -EPROTO;
	if (!r)
		snprintf(ret_status, 32, "%s", json_object_get_string(status));
	json_object_put(value);
	return r;
}

int pause_prepare(struct pause *p, unsigned *ret_stop_id)
{
	char status[32];
	int r = qmp_greet(p->qmp, REPLY_MS);

	if (!r)
		r = query_status(p, status);
	if (!r && strcmp(status, "running") && !is_still(status))
		r = -EBUSY;
	if (r)
		return r;
	p->ran = !strcmp(status, "running");
	*ret_stop_id = qmp_next_id(p->qmp);
	return 0;
}

int pause_stop(struct pause *p, bool *ret_stopped)
{
	const struct qmp_command undo = { .name = "cont" };
	uint64_t stops_before = p->stops;
	int r = run(p, "stop", NULL);

	if (r == -ETIMEDOUT && p->ran)
		(void)qmp_send(p->qmp, &undo); /* commands run in order: a late stop is undone */
	if (!r)
		*ret_stopped = p->stops != stops_before; /* else somebody else had stopped it */
	return r;
}

int pause_halt(struct pause *p)
{
	unsigned stop_id;
	int r = pause_prepare(p, &stop_id);

	return r ? r : run(p, "stop", NULL);
}

int pause_end(struct pause *p)
{
	char status[32];
	int r = query_status(p, status);

	if (!r && strcmp(status, "paused")) /* something else has happened to it meanwhile */
		return 0;
	return r ? r : run(p, "cont", NULL);
}

int pause_load_state(struct pause *p, int fd, char *why, size_t why_bytes)
{
	struct qmp_command capability = { .name = "migrate-set-capabilities", .timeout_ms = START_MS };
	struct qmp_command incoming = { .name = "migrate-incoming", .timeout_ms = START_MS };
	char words[QMP_WHY_BYTES] = "QEMU does not answer", text[64];
	int r = qmp_greet(p->qmp, START_MS);

	if (!r) {
		capability.arguments = json_tokener_parse(
			"{\"capabilities\": [{\"capability\": \"x-ignore-shared\", \"state\": true},"
			"{\"capability\": \"events\", \"state\": true}]}");
		r = qmp_run(p->qmp, &capability, NULL, words);
	}
	if (!r) {
		restorer_wait(); /* the main loop has answered: all of guest RAM is mapped, and being filled */
		snprintf(text, sizeof text, "{\"uri\": \"fd:%d\"}", fd);
		incoming.arguments = json_tokener_parse(text);
		r = qmp_run(p->qmp, &incoming, NULL, words);
	}
	while (!r && !p->loaded) { /* QEMU ends itself if it fails */
		r = qmp_wait(p->qmp, START_MS);
		snprintf(words, sizeof words, "it did not come to its end");
	}
	snprintf(why, why_bytes, "%s", words);
	return r;
}

/* ---- a save that was broken off ---------------------------------------------------------------- */

static int64_t query_bandwidth(struct pause *p)
{
	struct json_object *value = NULL, *number;
	int64_t bytes_s = -1;

	if (!run(p, "query-migrate-parameters", &value) && json_object_object_get_ex(value, "max-bandwidth", &number))
		bytes_s = json_object_get_int64(number);
	json_object_put(value);
	return bytes_s;
}

void pause_save_begins(struct pause *p)
{
	char status[32];

	p->ran_before_save = !qmp_greet(p->qmp, REPLY_MS) && !query_status(p, status) && !strcmp(status, "running");
	p->bandwidth_before_save = query_bandwidth(p);
}

void pause_give(struct pause *p)
{
	p->ran_before_save = false;
}

/* What QEMU says of its migration; "" when it does not. */
static void query_migration(struct pause *p, char status[32])
{
	struct json_object *value = NULL, *text;

	status[0] = '\0';
	if (!run(p, "query-migrate", &value) && json_object_object_get_ex(value, "status", &text))
		snprintf(status, 32, "%s", json_object_get_string(text));
	json_object_put(value);
}

/* Something is still on its way: a migration that is cancelled ends by itself, a moment later. */
static bool is_migrating(struct pause *p)
{
	static const char *const ended[] = { "", "none", "cancelled", "completed", "failed" };
	char status[32];
	bool is = true;

	query_migration(p, status);
	for (size_t i = 0; i < sizeof ended / sizeof ended[0]; i++)
		is = is && strcmp(status, ended[i]);
	return is;
}

/*
 * QEMU 7.2 loses a cancel that comes just before it waits in "pre-switchover": it then waits for good. It gets there
 * by itself within milliseconds, as there is nothing to send.
 */
static void await_switchover(struct pause *p)
{
	uint64_t until_us = os_now_us() + SWITCHOVER_MS * 1000ull;
	char status[32];

	for (query_migration(p, status); (!strcmp(status, "setup") || !strcmp(status, "active")) && os_now_us() < until_us;
	     query_migration(p, status))
		usleep(1000);
}

static void reset_capabilities(struct pause *p)
{
	struct qmp_command reset = { .name = "migrate-set-capabilities", .timeout_ms = REPLY_MS };

	reset.arguments = json_tokener_parse(
		"{\"capabilities\": [{\"capability\": \"x-ignore-shared\", \"state\": false},"
		"{\"capability\": \"pause-before-switchover\", \"state\": false}]}");
	(void)qmp_run(p->qmp, &reset, NULL, NULL);
}

static void reset_bandwidth(struct pause *p)
{
	struct qmp_command reset = { .name = "migrate-set-parameters", .timeout_ms = REPLY_MS };

	if (p->bandwidth_before_save < 0)
		return;
	reset.arguments = json_object_new_object();
	json_object_object_add(reset.arguments, "max-bandwidth", json_object_new_int64(p->bandwidth_before_save));
	(void)qmp_run(p->qmp, &reset, NULL, NULL);
}

/* Stopped by a migration, and not by a user since. */
static bool is_left_stopped(struct pause *p)
{
	char status[32];

	return !query_status(p, status) && (!strcmp(status, "postmigrate") || !strcmp(status, "finish-migrate"));
}

int pause_undo_save(struct pause *p)
{
	uint64_t until_us = os_now_us() + UNDO_MS * 1000ull;
	int r = qmp_greet(p->qmp, REPLY_MS);

	if (r)
		return r;
	await_switchover(p);
	if (is_migrating(p))
		(void)run(p, "migrate_cancel", NULL);
	while (is_migrating(p) && os_now_us() < until_us)
		usleep(1000);
	reset_capabilities(p);
	reset_bandwidth(p);
	/* QEMU tells that a migration is complete a moment before it lets the guest go on. */
	while (p->ran_before_save && is_left_stopped(p)) {
		r = run(p, "cont", NULL);
		if (!r || os_now_us() >= until_us)
			break;
		usleep(1000);
	}
	return r;
}

int pause_resume(struct pause *p)
{
	return run(p, "cont", NULL);
}

void pause_quit(struct pause *p)
{
	const struct qmp_command quit = { .name = "quit" };

	(void)qmp_send(p->qmp, &quit);
}

bool pause_is_loaded(const struct pause *p)
{
	return p->loaded;
}

uint64_t pause_resumed_us(const struct pause *p)
{
	return p->resumed_us;
}

int pause_poll_fd(const struct pause *p)
{
	return qmp_poll_fd(p->qmp);
}

void pause_drain(struct pause *p)
{
	qmp_drain(p->qmp);
}
