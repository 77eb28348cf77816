/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* QMP: docs/interop/qmp-spec.rst of QEMU. Lines of JSON; replies carry the request's id. */
#include "qemu/agent.h"

#include <errno.h>
#include <json-c/json.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define REPLY_MS 5000
#define LINE_BYTES (256u << 10)

struct qmp {
	int fd;
	unsigned last_id;
	bool greeted; /* qmp_capabilities has been accepted */
	uint64_t stops; /* STOP events seen */
	bool ran;       /* the guest, when qmp_prepare looked */
	size_t used;  /* bytes in `line` that are not consumed yet */
	char line[LINE_BYTES];
};

int qmp_open(int fd, struct qmp **ret_qmp)
{
	struct qmp *q = calloc(1, sizeof *q);

	if (!q)
		return -ENOMEM;
	q->fd = fd;
	*ret_qmp = q;
	return 0;
}

static int64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static int fill(struct qmp *q, int64_t deadline_ms)
{
	struct pollfd p = { .fd = q->fd, .events = POLLIN };
	int64_t left = deadline_ms - now_ms();
	ssize_t n;

	if (q->used == sizeof q->line - 1)
		return -EMSGSIZE;
	if (poll(&p, 1, left > 0 ? (int)left : 0) == 0)
		return -ETIMEDOUT;
	n = read(q->fd, q->line + q->used, sizeof q->line - 1 - q->used);
	if (n > 0) {
		q->used += (size_t)n;
		return 0;
	}
	if (n < 0 && (errno == EINTR || errno == EAGAIN))
		return 0;
	return n ? -errno : -EPIPE;
}

static void count_stops(struct qmp *q, struct json_object *message)
{
	struct json_object *event;

	if (message && json_object_object_get_ex(message, "event", &event) &&
	    !strcmp(json_object_get_string(event), "STOP"))
		q->stops++;
}

/* The next line as an object, which the caller puts; NULL object for a line that is no JSON. */
static int next_message(struct qmp *q, int64_t deadline_ms, struct json_object **ret_message)
{
	char *end;
	int r;

	while (!(end = memchr(q->line, '\n', q->used))) {
		r = fill(q, deadline_ms);
		if (r)
			return r;
	}
	*end = '\0';
	*ret_message = json_tokener_parse(q->line);
	q->used -= (size_t)(end + 1 - q->line);
	memmove(q->line, end + 1, q->used);
	count_stops(q, *ret_message);
	return 0;
}

static int send_command(struct qmp *q, const char *command)
{
	char text[128];
	int n = snprintf(text, sizeof text, "{\"execute\": \"%s\", \"id\": %u}\n", command, ++q->last_id);

	return write(q->fd, text, (size_t)n) == n ? 0 : -EIO;
}

/* Runs a command; the reply's "return" is the caller's to put, if asked for. */
static int run(struct qmp *q, const char *command, struct json_object **ret_value)
{
	int64_t deadline_ms = now_ms() + REPLY_MS;
	int r = send_command(q, command);

	while (!r) {
		struct json_object *message = NULL, *id, *value;
		bool ours;

		r = next_message(q, deadline_ms, &message);
		if (r)
			break;
		ours = message && json_object_object_get_ex(message, "id", &id) &&
		       json_object_get_int64(id) == (int64_t)q->last_id;
		if (!ours) { /* an event, the greeting, or the late reply to a command given up */
			json_object_put(message);
			continue;
		}
		r = json_object_object_get_ex(message, "return", &value) ? 0 : -EPROTO;
		if (!r && ret_value)
			*ret_value = json_object_get(value);
		json_object_put(message);
		break;
	}
	return r;
}

static int greet(struct qmp *q)
{
	int r = q->greeted ? 0 : run(q, "qmp_capabilities", NULL);

	/* Refused: an earlier try, given up, was accepted late. */
	q->greeted = !r || r == -EPROTO;
	return q->greeted ? 0 : r;
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

static int query_status(struct qmp *q, char ret_status[32])
{
	struct json_object *value = NULL, *status;
	int r = run(q, "query-status", &value);

	if (!r && !json_object_object_get_ex(value, "status", &status))
		r = -EPROTO;
	if (!r)
		snprintf(ret_status, 32, "%s", json_object_get_string(status));
	json_object_put(value);
	return r;
}

int qmp_prepare(struct qmp *q, unsigned *ret_stop_id)
{
	char status[32];
	int r = greet(q);

	if (!r)
		r = query_status(q, status);
	if (!r && strcmp(status, "running") && !is_still(status))
		r = -EBUSY;
	if (r)
		return r;
	q->ran = !strcmp(status, "running");
	*ret_stop_id = q->last_id + 1;
	return 0;
}

int qmp_stop(struct qmp *q, bool *ret_stopped)
{
	uint64_t stops_before = q->stops;
	int r = run(q, "stop", NULL);

	if (r == -ETIMEDOUT && q->ran)
		(void)send_command(q, "cont"); /* commands run in order: a late stop is undone */
	if (!r)
		*ret_stopped = q->stops != stops_before; /* else somebody else had stopped it */
	return r;
}

int qmp_cont(struct qmp *q)
{
	char status[32];
	int r = query_status(q, status);

	if (!r && strcmp(status, "paused")) /* something else has happened to it meanwhile */
		return 0;
	return r ? r : run(q, "cont", NULL);
}

int qmp_poll_fd(const struct qmp *q)
{
	return q->fd;
}

void qmp_drain(struct qmp *q)
{
	struct json_object *message;

	while (next_message(q, 0, &message) == 0)
		json_object_put(message);
}
