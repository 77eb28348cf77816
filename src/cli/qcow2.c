/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* QEMU: block.c (path_combine, path_has_protocol). */
#include "cli/qcow2.h"

#include <endian.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static bool read_name(int fd, char name[QCOW2_BACKING_MAX + 1])
{
	struct qcow2_header header;
	uint32_t bytes;

	if (pread(fd, &header, sizeof header, 0) != sizeof header || header.magic != htobe32(QCOW2_MAGIC))
		return false;
	bytes = be32toh(header.backing_bytes);
	if (!header.backing_offset || !bytes || bytes > QCOW2_BACKING_MAX ||
	    be64toh(header.backing_offset) > INT64_MAX - QCOW2_BACKING_MAX)
		return false;
	name[bytes] = '\0';
	return pread(fd, name, bytes, (off_t)be64toh(header.backing_offset)) == (ssize_t)bytes && strlen(name) == bytes;
}

/* A relative name begins where the image is. */
static bool combine(const char *image, const char *name, char path[PATH_MAX])
{
	const char *slash = strrchr(image, '/');
	int directory = slash && name[0] != '/' ? (int)(slash - image) + 1 : 0;

	return snprintf(path, PATH_MAX, "%.*s%s", directory, image, name) < PATH_MAX;
}

bool qcow2_backing(const char *image, char ret_path[PATH_MAX])
{
	char name[QCOW2_BACKING_MAX + 1];
	struct stat st;
	bool named;
	int fd;

	if (stat(image, &st) || !S_ISREG(st.st_mode)) /* to open a device or a pipe may do something */
		return false;
	fd = open(image, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	if (fd < 0)
		return false;
	named = read_name(fd, name);
	close(fd);
	/* A protocol has a colon before any slash. */
	return named && name[strcspn(name, ":/")] != ':' && combine(image, name, ret_path);
}
