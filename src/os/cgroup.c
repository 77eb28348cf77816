/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "os/os.h"

#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* What the two versions of cgroups call the same things; version 1 says "no limit" by a number of almost 2^63. */
static const struct names {
	const char *controller, *mount, *limit, *used;
} names[] = {
	{ "", "", "memory.max", "memory.current" },
	{ "memory", "/memory", "memory.limit_in_bytes", "memory.usage_in_bytes" },
};

static bool read_text(const char *path, char *text, size_t bytes)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, bytes - 1);

	if (fd >= 0)
		close(fd);
	text[n > 0 ? n : 0] = '\0';
	return n > 0;
}

/* A file with one number; "max", or none at all: no limit. */
static uint64_t read_number(const char *directory, const char *file)
{
	char path[PATH_MAX], text[64], *end;
	unsigned long long number;

	if (snprintf(path, sizeof path, "%s/%s", directory, file) >= (int)sizeof path || !read_text(path, text, sizeof text))
		return UINT64_MAX;
	number = strtoull(text, &end, 10);
	return end == text || number >= INT64_MAX / 2 ? UINT64_MAX : number;
}

/* Page cache, but for shared memory, which the kernel counts with anonymous pages. */
static uint64_t reclaimable(const char *directory)
{
	static const char *const keys[] = { "\ninactive_file ", "\nactive_file " };
	char path[PATH_MAX], text[8192] = "\n";
	uint64_t bytes = 0;

	if (snprintf(path, sizeof path, "%s/memory.stat", directory) >= (int)sizeof path ||
	    !read_text(path, text + 1, sizeof text - 1))
		return 0;
	for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
		const char *at = strstr(text, keys[i]);

		bytes += at ? strtoull(at + strlen(keys[i]), NULL, 10) : 0;
	}
	return bytes;
}

static uint64_t room_in(const char *directory, const struct names *n)
{
	uint64_t limit = read_number(directory, n->limit), used = read_number(directory, n->used), cache;

	if (limit == UINT64_MAX || used == UINT64_MAX)
		return UINT64_MAX;
	cache = reclaimable(directory);
	used -= cache < used ? cache : used;
	return limit > used ? limit - used : 0;
}

/* Every limit up to the root counts. */
static uint64_t room_above(const char *root, const char *group, const struct names *n)
{
	char path[PATH_MAX];
	size_t shortest = strlen(root) + strlen(n->mount);
	uint64_t least = UINT64_MAX;

	if (snprintf(path, sizeof path, "%s%s%s", root, n->mount, group) >= (int)sizeof path)
		return UINT64_MAX;
	while (strlen(path) > shortest) {
		uint64_t room = room_in(path, n);

		least = room < least ? room : least;
		*strrchr(path, '/') = '\0';
	}
	return least;
}

/* A line is "number:controllers:/path"; version 2 has no controllers there. */
static uint64_t room_of_line(char *line, const char *root)
{
	char *controllers = strchr(line, ':'), *group = controllers ? strchr(controllers + 1, ':') : NULL;

	if (!group || group[1] != '/' || strstr(group, "/.."))
		return UINT64_MAX;
	controllers++;
	*group++ = '\0';
	for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
		if (!strcmp(controllers, names[i].controller))
			return room_above(root, group, &names[i]);
	return UINT64_MAX;
}

static uint64_t kib_of(const char *text, const char *key)
{
	const char *at = strstr(text, key);

	return at ? strtoull(at + strlen(key), NULL, 10) : UINT64_MAX;
}

uint64_t os_memory_spare(const char *meminfo)
{
	char text[8192];
	uint64_t all, available;

	if (!read_text(meminfo, text, sizeof text))
		return UINT64_MAX;
	all = kib_of(text, "MemTotal:");
	available = kib_of(text, "MemAvailable:");
	if (all > UINT64_MAX >> 10 || available > UINT64_MAX >> 10)
		return UINT64_MAX;
	return available > all / 8 ? (available - all / 8) << 10 : 0;
}

uint64_t os_memory_room(const char *cgroups, const char *root)
{
	char text[8192], *save = NULL;
	uint64_t least = UINT64_MAX;

	if (!read_text(cgroups, text, sizeof text))
		return UINT64_MAX;
	for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
		uint64_t room = room_of_line(line, root);

		least = room < least ? room : least;
	}
	return least;
}
