/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "cli/overlay.h"

#include "cli/capture.h"
#include "cli/qcow2.h"
#include "os/os.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define TEMPLATE_MAX (16u << 20)
#define BLOCK 4096u
#define QEMU_IMG_S 30

/* qemu-img is not to open what lies beneath: QEMU is told on its command line where that is. */
static int make_by_qemu_img(const char *path, const char *backing, const char *format, uint64_t bytes)
{
	char size[24];
	const char *argv[] = { "qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", format, path, size,
			       NULL };
	char *output;

	snprintf(size, sizeof size, "%ju", (uintmax_t)bytes);
	output = capture(argv, -1, BLOCK, QEMU_IMG_S, 0);
	free(output);
	return output ? 0 : -EIO;
}

/* The longest name that there can be keeps the place for every other. */
static int make_template(const char *path, const char *format, uint64_t bytes)
{
	char partial[PATH_MAX], backing[QCOW2_BACKING_MAX + 1];
	int r;

	memset(backing, 'x', QCOW2_BACKING_MAX);
	backing[QCOW2_BACKING_MAX] = '\0';
	snprintf(partial, sizeof partial, "%.4000s.%d", path, (int)getpid());
	r = make_by_qemu_img(partial, backing, format, bytes);
	if (!r && rename(partial, path))
		r = -errno;
	if (r)
		(void)unlink(partial);
	return r;
}

/* All of it; NULL: it is not there, or not what a template is. */
static uint8_t *read_template(const char *path, uint64_t bytes, size_t *ret_bytes)
{
	int fd = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
	struct qcow2_header header;
	uint8_t *image = NULL;
	struct stat st;
	bool good;

	if (fd < 0)
		return NULL;
	if (!fstat(fd, &st) && S_ISREG(st.st_mode) && st.st_size >= (off_t)sizeof header &&
	    st.st_size <= (off_t)TEMPLATE_MAX)
		image = malloc((size_t)st.st_size);
	good = image && pread(fd, image, (size_t)st.st_size, 0) == st.st_size;
	close(fd);
	if (good) {
		memcpy(&header, image, sizeof header);
		good = header.magic == htobe32(QCOW2_MAGIC) && be64toh(header.bytes) == bytes &&
		       be32toh(header.backing_bytes) == QCOW2_BACKING_MAX &&
		       be64toh(header.backing_offset) <= (uint64_t)st.st_size - QCOW2_BACKING_MAX;
	}
	if (!good) {
		free(image);
		return NULL;
	}
	*ret_bytes = (size_t)st.st_size;
	return image;
}

static void name_backing(uint8_t *image, const char *backing)
{
	size_t bytes = strnlen(backing, QCOW2_BACKING_MAX);
	struct qcow2_header header;
	uint8_t *name;

	memcpy(&header, image, sizeof header);
	name = image + be64toh(header.backing_offset);
	memset(name, 0, QCOW2_BACKING_MAX);
	memcpy(name, backing, bytes);
	header.backing_bytes = htobe32((uint32_t)bytes);
	memcpy(image, &header, sizeof header);
}

/* Blocks of zeros stay holes. */
static int write_sparse(int fd, const uint8_t *image, size_t bytes)
{
	static const uint8_t zeros[BLOCK];
	int r = ftruncate(fd, (off_t)bytes) ? -errno : 0;

	for (size_t at = 0; !r && at < bytes; at += BLOCK) {
		size_t n = bytes - at < BLOCK ? bytes - at : BLOCK;

		if (memcmp(image + at, zeros, n))
			r = os_write_all(fd, image + at, n, at);
	}
	return r;
}

static int write_overlay(const char *path, const uint8_t *image, size_t bytes)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
	int r = fd < 0 ? -errno : write_sparse(fd, image, bytes);

	if (fd >= 0)
		close(fd);
	if (r && fd >= 0)
		(void)unlink(path);
	return r;
}

int overlay_make(const char *root, const char *path, const char *backing, const char *format, uint64_t bytes)
{
	char template[PATH_MAX];
	uint8_t *image;
	size_t size;
	int r;

	if (strlen(backing) > QCOW2_BACKING_MAX)
		return -ENAMETOOLONG;
	snprintf(template, sizeof template, "%.3900s/.overlay-%ju-%.15s", root, (uintmax_t)bytes, format);
	image = read_template(template, bytes, &size);
	if (!image) {
		r = make_template(template, format, bytes);
		image = r ? NULL : read_template(template, bytes, &size);
		if (!image)
			return r ? r : -EIO;
	}
	name_backing(image, backing);
	r = write_overlay(path, image, size);
	free(image);
	return r;
}
