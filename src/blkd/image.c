/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "blkd/image.h"

#include "os/os.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#define SECTOR_BYTES 512u
#define LOCK_HELD 100u   /* QEMU, block/file-posix.c: a byte for each permission that somebody has, */
#define LOCK_DENIED 200u /* and for each that he does not leave to others */

enum { CAN_READ = 1 << 0, CAN_WRITE = 1 << 1, CAN_RESIZE = 1 << 3 };

static int refuse(int error, const char *path, const char *format, char why[IMAGE_WHY_BYTES])
{
	snprintf(why, IMAGE_WHY_BYTES, format, path);
	return error;
}

static struct flock lock_at(short type, unsigned byte)
{
	return (struct flock){ .l_type = type, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1 };
}

static int lock_bytes(int fd, unsigned base, unsigned set)
{
	for (unsigned bit = 0; 1u << bit <= set; bit++) {
		struct flock lock = lock_at(F_RDLCK, base + bit);

		if (set & 1u << bit && fcntl(fd, F_OFD_SETLK, &lock))
			return -errno;
	}
	return 0;
}

static int check_bytes(int fd, unsigned base, unsigned set)
{
	for (unsigned bit = 0; 1u << bit <= set; bit++) {
		struct flock lock = lock_at(F_WRLCK, base + bit);

		if (set & 1u << bit && fcntl(fd, F_OFD_GETLK, &lock))
			return -errno;
		if (set & 1u << bit && lock.l_type != F_UNLCK)
			return -EAGAIN;
	}
	return 0;
}

/* First one's own locks, then a look at the others': two that come at once both see each other. */
static int lock_image(int fd, bool readonly)
{
	unsigned held = readonly ? CAN_READ : CAN_READ | CAN_WRITE, denied = CAN_WRITE | CAN_RESIZE;
	int r = lock_bytes(fd, LOCK_HELD, held);

	if (!r)
		r = lock_bytes(fd, LOCK_DENIED, denied);
	if (!r)
		r = check_bytes(fd, LOCK_HELD, denied);
	return r ? r : check_bytes(fd, LOCK_DENIED, held);
}

static bool is_qcow2(int fd)
{
	char magic[4];

	return !os_read_all(fd, magic, sizeof magic, 0) && !memcmp(magic, "QFI\xfb", sizeof magic);
}

static int look_at(struct image *image, const char *path, const char *format, char *why)
{
	struct statfs fs;
	struct stat st;
	off_t end = lseek(image->fd, 0, SEEK_END);
	int r;

	if (fstat(image->fd, &st) || (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode)))
		return refuse(-EINVAL, path, "%.300s is neither a file nor a block device", why);
	if (format ? !strcmp(format, "qcow2") : is_qcow2(image->fd))
		return refuse(
			-EOPNOTSUPP, path,
			"%.200s: latent blkd serves raw images, not qcow2: convert it (qemu-img convert "
			"-O raw), or leave it to QEMU (-drive)",
			why);
	if (end < (off_t)SECTOR_BYTES || end % SECTOR_BYTES)
		return refuse(
			-EINVAL, path,
			"%.300s is not made of sectors of 512 bytes (truncate -s %%512 makes it so)",
			why);
	image->bytes = (uint64_t)end;
	image->in_memory = !fstatfs(image->fd, &fs) && fs.f_type == TMPFS_MAGIC;
	r = lock_image(image->fd, image->readonly);
	if (r == -EAGAIN || r == -EACCES)
		return refuse(-EAGAIN, path, "%.300s is in use: somebody else has locked it", why);
	return r ? refuse(r, path, "%.300s cannot be locked", why) : 0;
}

int image_open(const char *path, const char *format, bool readonly, struct image *ret_image,
	       char why[IMAGE_WHY_BYTES])
{
	struct image image = { .readonly = readonly };
	const char *name = strrchr(path, '/');
	int r;

	image.fd = open(path, (readonly ? O_RDONLY : O_RDWR) | O_CLOEXEC | O_NONBLOCK);
	if (image.fd < 0) {
		r = -errno;
		snprintf(why, IMAGE_WHY_BYTES, "%.300s cannot be opened: %s", path, strerror(-r));
		return r;
	}
	snprintf(image.id, sizeof image.id, "%s", name ? name + 1 : path);
	/* Without it the open of a pipe would wait; with it io_uring would not wait where it has to. */
	fcntl(image.fd, F_SETFL, fcntl(image.fd, F_GETFL) & ~O_NONBLOCK);
	r = look_at(&image, path, format, why);
	if (r)
		close(image.fd);
	else
		*ret_image = image;
	return r;
}
