/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* Leases: fcntl(2), "Leases"; fs-verity: Documentation/filesystems/fsverity.rst. */
#include "os/os.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/statvfs.h>
#include <sys/vfs.h>

int os_lease_take(int fd, int signal, pid_t tid)
{
	struct f_owner_ex owner = { .type = F_OWNER_TID, .pid = tid };

	/* The receiver first: a lease that breaks at once must already find it. */
	if (fcntl(fd, F_SETSIG, signal) || fcntl(fd, F_SETOWN_EX, &owner))
		return -errno;
	return fcntl(fd, F_SETLEASE, F_RDLCK) ? -errno : 0;
}

int os_lease_release(int fd)
{
	return fcntl(fd, F_SETLEASE, F_UNLCK) ? -errno : 0;
}

bool os_lease_intact(int fd)
{
	/* During a break it tells what the lease will become: F_UNLCK. */
	return fcntl(fd, F_GETLEASE) == F_RDLCK;
}

/* Documentation/filesystems/proc.rst: "lock:	1: LEASE  BREAKING  READ  1234 fe:01:5678 0 EOF" */
bool os_lease_is_held(int fd)
{
	char path[48], line[256];
	bool held = false;
	FILE *f;

	snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
	f = fopen(path, "re");
	while (f && !held && fgets(line, sizeof line, f))
		held = !strncmp(line, "lock:", 5) && strstr(line, " LEASE ");
	if (f)
		fclose(f);
	return held;
}

/* The mount that the descriptor was opened by, as in /proc/self/mountinfo; -1 if unknown. */
static long mount_id(int fd)
{
	char path[48], line[128];
	long id = -1;
	FILE *f;

	snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
	f = fopen(path, "re");
	while (f && id < 0 && fgets(line, sizeof line, f))
		if (sscanf(line, "mnt_id: %ld", &id) != 1)
			id = -1;
	if (f)
		fclose(f);
	return id;
}

/* "ID … - TYPE SOURCE ro,…": the last field is the file system's, those before are the mount's. */
static bool line_says_read_only(const char *line)
{
	const char *options = strstr(line, " - ");

	for (int fields = 0; options && fields < 3; fields++)
		options = strchr(options + 1, ' ');
	return options && !strncmp(options, " ro", 3) && strchr(",\n", options[3]);
}

/* Read-only itself, not only by this mount: by another one a file of it could still be written. */
static bool file_system_is_read_only(int fd)
{
	long wanted = mount_id(fd);
	FILE *f = wanted < 0 ? NULL : fopen("/proc/self/mountinfo", "re");
	bool found = false, read_only = false;
	size_t line_bytes = 0;
	char *line = NULL;

	while (f && !found && getline(&line, &line_bytes, f) > 0) {
		found = strtol(line, NULL, 10) == wanted;
		read_only = found && line_says_read_only(line);
	}
	free(line);
	if (f)
		fclose(f);
	return read_only;
}

#define TMPFS 0x01021994
#define RAMFS 0x858458f6

bool os_file_is_local(int fd)
{
	static const unsigned long types[] = {
		0xef53,     /* ext2, ext3, ext4 */
		0x58465342, /* XFS */
		0x9123683e, /* Btrfs */
		TMPFS,
		0x794c7630, /* overlayfs */
		0xf2f52010, /* F2FS */
		0x2fc12fc1, /* ZFS */
		0xca451a4e, /* bcachefs */
		0x3153464a, /* JFS */
		RAMFS,
		0x4d44,     /* FAT */
		0x2011bab0, /* exFAT */
		0x7366746e, /* NTFS3 */
		0x73717368, /* SquashFS */
		0xe0f5e1e2, /* EROFS */
		0x9660,     /* ISO 9660 */
		0x15013346, /* UDF */
	};
	struct statfs fs;

	if (fstatfs(fd, &fs))
		return false;
	for (size_t i = 0; i < sizeof types / sizeof types[0]; i++)
		if ((unsigned long)fs.f_type == types[i])
			return true;
	return false;
}

bool os_file_is_in_memory(int fd)
{
	struct statfs fs;

	return !fstatfs(fd, &fs) && ((unsigned long)fs.f_type == TMPFS || (unsigned long)fs.f_type == RAMFS);
}

enum os_protection os_file_protection(int fd)
{
	struct statvfs fs;
	int flags = 0; /* the kernel writes an int, whatever the ioctl's number says */

	if (!os_file_is_local(fd))
		return OS_PROTECT_NONE;
	if (!ioctl(fd, FS_IOC_GETFLAGS, &flags)) {
		if (flags & FS_VERITY_FL)
			return OS_PROTECT_VERITY;
		if (flags & FS_IMMUTABLE_FL)
			return OS_PROTECT_IMMUTABLE;
	}
	if (!fstatvfs(fd, &fs) && (fs.f_flag & ST_RDONLY) && file_system_is_read_only(fd))
		return OS_PROTECT_READONLY;
	return OS_PROTECT_NONE;
}
