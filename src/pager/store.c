/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "pager/store.h"

#include "os/os.h"
#include "pager/http.h"
#include "snapshot/format.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct store {
	char source[1024];
	struct http *http; /* NULL: a directory */
	int ram_fd;        /* of a directory: `ram` or `ram.zst`, once it was needed */
	struct store_read *ended; /* of a directory: not told yet */
	unsigned under_way;
	uint64_t heard_us; /* when it said something, or was asked after a pause */
	char trouble[STORE_WHY_BYTES];
};

int store_open(const char *source, struct store **ret_store, char why[STORE_WHY_BYTES])
{
	struct store *s = calloc(1, sizeof *s);
	int r = 0;

	if (!s)
		return -ENOMEM;
	s->ram_fd = -1;
	snprintf(s->source, sizeof s->source, "%s", source);
	if (http_is_url(source))
		r = http_open(source, &s->http, why);
	if (r)
		free(s);
	else
		*ret_store = s;
	return r;
}

void store_close(struct store *s)
{
	if (!s)
		return;
	http_close(s->http);
	if (s->ram_fd >= 0)
		close(s->ram_fd);
	free(s);
}

bool store_is_far(const struct store *s)
{
	return s->http;
}

static int fail(struct store *s, int r, const char *format, ...) __attribute__((format(printf, 3, 4)));

static int fail(struct store *s, int r, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(s->trouble, sizeof s->trouble, format, args);
	va_end(args);
	return r;
}

/* ---- a directory ------------------------------------------------------------------------------ */

static int open_object(struct store *s, const char *object)
{
	char path[1100];
	struct stat st;
	int fd;

	snprintf(path, sizeof path, "%s/%s", s->source, object);
	fd = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
	if (fd < 0)
		return fail(s, -errno, "%.150s cannot be opened: %s", path, strerror(errno));
	if (!fstat(fd, &st) && S_ISREG(st.st_mode))
		return fd;
	close(fd);
	return fail(s, -EPROTO, "%.200s is no file", path);
}

/* The file stays open: the snapshot may be deleted while VMs run from it. */
static int descriptor_of(struct store *s, const char *object, bool *ret_kept)
{
	*ret_kept = !strncmp(object, SNAPSHOT_RAM, strlen(SNAPSHOT_RAM));
	if (!*ret_kept)
		return open_object(s, object);
	if (s->ram_fd < 0)
		s->ram_fd = open_object(s, object);
	return s->ram_fd;
}

static int read_part(struct store *s, struct store_read *read)
{
	bool kept;
	int fd = descriptor_of(s, read->object, &kept), r = fd < 0 ? fd : 0;

	while (!r && read->got < read->bytes) {
		ssize_t n = pread(fd, read->to + read->got, read->bytes - read->got, (off_t)(read->offset + read->got));

		if (n <= 0)
			r = fail(s, n ? -errno : -EPROTO, "%s of %.150s cannot be read: %s", read->object, s->source,
				 n ? strerror(errno) : "it ends too early");
		else
			read->got += (size_t)n;
	}
	if (!kept && fd >= 0)
		close(fd);
	return r;
}

/* ---- both ------------------------------------------------------------------------------------- */

int store_get(struct store *s, const char *object, uint64_t max_bytes, int *ret_fd)
{
	struct stat st;
	int fd;

	if (s->http)
		return http_get(s->http, object, max_bytes, ret_fd, s->trouble);
	fd = open_object(s, object);
	if (fd < 0)
		return fd;
	if (!fstat(fd, &st) && (uint64_t)st.st_size <= max_bytes) {
		*ret_fd = fd;
		return 0;
	}
	close(fd);
	return fail(s, -EPROTO, "%s of %.150s is larger than %ju bytes, which is the most", object, s->source,
		    (uintmax_t)max_bytes);
}

int store_start(struct store *s, struct store_read *read)
{
	int r = 0;

	if (!s->under_way && !s->trouble[0])
		s->heard_us = os_now_us();
	read->store = s;
	read->got = 0;
	read->error = 0;
	if (s->http) {
		r = http_start(s->http, read);
	} else {
		read->error = read_part(s, read);
		read->next = s->ended;
		s->ended = read;
	}
	s->under_way += !r;
	return r;
}

void store_ended(struct store *s, struct store_read *read, int r, const char *why)
{
	s->under_way--;
	if (r && why)
		fail(s, r, "%s", why);
	else if (!r)
		s->trouble[0] = '\0';
	read->done(read, r);
}

void store_heard(struct store *s)
{
	s->heard_us = os_now_us();
}

void store_wait(struct store *s, struct pollfd *polled, unsigned count, int timeout_ms)
{
	struct store_read *ended = s->ended, *next;

	if (s->http) {
		http_wait(s->http, polled, count, timeout_ms);
		return;
	}
	s->ended = NULL;
	(void)poll(polled, count, ended ? 0 : timeout_ms);
	for (; ended; ended = next) {
		next = ended->next;
		if (!ended->error)
			store_heard(s);
		store_ended(s, ended, ended->error, NULL);
	}
}

const char *store_trouble(const struct store *s)
{
	return s->trouble;
}

void store_forgive(struct store *s)
{
	s->trouble[0] = '\0';
}

uint64_t store_silent_ms(const struct store *s)
{
	return s->under_way || s->trouble[0] ? (os_now_us() - s->heard_us) / 1000 : 0;
}
