/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "vmdir/qmp.h"

#include "os/os.h"
#include "vmdir/vmdir.h"

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define CONNECT_MS 5000
#define LINE_BYTES (256u << 10)

struct qmp {
	int fd;
	unsigned last_id;
	bool greeted; /* qmp_capabilities has been accepted */
	qmp_event on_event;
	void *ctx;
	const _Atomic bool *stop;
	size_t used; /* bytes in `line` that are not consumed yet */
	char line[LINE_BYTES];
};

int qmp_open(int fd, qmp_event on_event, void *ctx, struct qmp **ret_qmp)
{
	struct qmp *q = calloc(1, sizeof *q);

	if (!q) {
		close(fd);
		return -ENOMEM;
	}
	q->fd = fd;
	q->on_event = on_event;
	q->ctx = ctx;
	*ret_qmp = q;
	return 0;
}

int qmp_connect(const char *path, qmp_event on_event, void *ctx, struct qmp **ret_qmp)
{
	/* connect(2) waits where the backlog is full: another client has the monitor, or QEMU hangs. */
	int fd = vmdir_connect(path, SOCK_STREAM, CONNECT_MS);

	return fd < 0 ? fd : qmp_open(fd, on_event, ctx, ret_qmp);
}

void qmp_stop_when(struct qmp *q, const _Atomic bool *stop)
{
	q->stop = stop;
}

void qmp_close(struct qmp *q)
{
	if (!q)
		return;
	close(q->fd);
	free(q);
}

static int fill(struct qmp *q, int64_t deadline_ms)
{
	struct pollfd p = { .fd = q->fd, .events = POLLIN };
	int64_t left = deadline_ms - (int64_t)(os_now_us() / 1000);
	ssize_t n;
	int ready;

	if (q->used == sizeof q->line - 1)
		return -EMSGSIZE;
	if (q->stop && *q->stop)
		return -EINTR;
	ready = poll(&p, 1, left > 0 ? (int)left : 0);
	if (ready <= 0)
		return ready ? (errno == EINTR ? 0 : -errno) : -ETIMEDOUT;
	n = read(q->fd, q->line + q->used, sizeof q->line - 1 - q->used);
	if (n > 0) {
		q->used += (size_t)n;
		return 0;
	}
	if (n < 0 && (errno == EINTR || errno == EAGAIN))
		return 0;
	return n ? -errno : -EPIPE;
}

static void tell_event(struct qmp *q, struct json_object *message)
{
	struct json_object *event, *data = NULL;

	if (!q->on_event || !json_object_object_get_ex(message, "event", &event))
		return;
	json_object_object_get_ex(message, "data", &data);
	q->on_event(q->ctx, json_object_get_string(event), data);
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
	if (*ret_message)
		tell_event(q, *ret_message);
	return 0;
}

/* The descriptor goes with the first byte (unix(7), SCM_RIGHTS). */
static int send_text(struct qmp *q, const char *text, size_t bytes, int fd)
{
	union {
		struct cmsghdr header;
		char room[CMSG_SPACE(sizeof(int))];
	} control = { .header = { CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS } };
	struct iovec iov = { (char *)text, bytes };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1 };

	if (fd > 0) {
		memcpy(CMSG_DATA(&control.header), &fd, sizeof fd);
		message.msg_control = &control;
		message.msg_controllen = sizeof control.room;
	}
	return sendmsg(q->fd, &message, MSG_NOSIGNAL) == (ssize_t)bytes ? 0 : -EIO;
}

int qmp_send(struct qmp *q, const struct qmp_command *c)
{
	struct json_object *json = json_object_new_object();
	const char *text;
	size_t bytes;
	char *line;
	int r;

	json_object_object_add(json, "execute", json_object_new_string(c->name));
	json_object_object_add(json, "id", json_object_new_int64(++q->last_id));
	if (c->arguments)
		json_object_object_add(json, "arguments", c->arguments);
	text = json_object_to_json_string_length(json, JSON_C_TO_STRING_PLAIN, &bytes);
	line = malloc(bytes + 1);
	r = line ? 0 : -ENOMEM;
	if (!r) {
		memcpy(line, text, bytes);
		line[bytes] = '\n';
		r = send_text(q, line, bytes + 1, c->fd);
	}
	free(line);
	json_object_put(json);
	return r;
}

static int take_reply(struct json_object *message, struct json_object **ret_value,
	    char why[QMP_WHY_BYTES])
{
	struct json_object *value, *description;

	if (json_object_object_get_ex(message, "return", &value)) {
		if (ret_value)
			*ret_value = json_object_get(value);
		return 0;
	}
	if (why && json_object_object_get_ex(message, "error", &value) &&
	    json_object_object_get_ex(value, "desc", &description))
		snprintf(why, QMP_WHY_BYTES, "%s", json_object_get_string(description));
	return -EREMOTEIO;
}

int qmp_run(struct qmp *q, const struct qmp_command *c, struct json_object **ret_value,
	    char why[QMP_WHY_BYTES])
{
	int64_t deadline_ms = (int64_t)(os_now_us() / 1000) + c->timeout_ms;
	int r = qmp_send(q, c);

	if (why)
		snprintf(why, QMP_WHY_BYTES, "%s", r ? strerror(-r) : "");
	for (bool ours = false; !r && !ours;) {
		struct json_object *message = NULL, *id;

		r = next_message(q, deadline_ms, &message);
		/* Others are events, the greeting, or the late reply to a command given up. */
		ours = message && json_object_object_get_ex(message, "id", &id) &&
		       json_object_get_int64(id) == (int64_t)q->last_id;
		if (r && why)
			snprintf(why, QMP_WHY_BYTES, "%s: %s", c->name, strerror(-r));
		if (ours)
			r = take_reply(message, ret_value, why);
		json_object_put(message);
	}
	return r;
}

int qmp_greet(struct qmp *q, unsigned timeout_ms)
{
	const struct qmp_command command = { .name = "qmp_capabilities", .timeout_ms = timeout_ms };
	int r = q->greeted ? 0 : qmp_run(q, &command, NULL, NULL);

	/* Refused: an earlier try, given up, was accepted late. */
	q->greeted = !r || r == -EREMOTEIO;
	return q->greeted ? 0 : r;
}

unsigned qmp_next_id(const struct qmp *q)
{
	return q->last_id + 1;
}

int qmp_wait(struct qmp *q, unsigned timeout_ms)
{
	struct json_object *message = NULL;
	int r = next_message(q, (int64_t)(os_now_us() / 1000) + timeout_ms, &message);

	json_object_put(message);
	return r;
}

int qmp_poll_fd(const struct qmp *q)
{
	return q->fd;
}

void qmp_drain(struct qmp *q)
{
	while (qmp_wait(q, 0) == 0)
		;
}
