/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "vmdir/vmdir.h"

#include "vmdir/stats.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#define CLAIM_TRIES 16

static int root_path(char path[VMDIR_PATH_BYTES], char *why);
static int check_private_dir(const char *path, char *why);
static int make_private_dir(const char *path, char *why);
static int lock_root(const char *root, bool wait, char *why);
static int claim_locked(const char *root, struct vmdir *dir, char *why);
static int take_lock(const char *path, int *ret_fd);
static int create_stats(struct vmdir *dir);
static int remove_if_dead(const char *root, const char *name);
static void clean_up_after(const char *root, const char *name);
static int dead_end(int error, char *why, const char *format, ...) __attribute__((format(printf, 3, 4)));

bool vmdir_name_ok(const char *name)
{
	static const char first[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
	size_t length = strlen(name);

	if (!length || length >= VMDIR_NAME_BYTES || !strcmp(name, VMDIR_VOLUMES))
		return false;
	if (!strchr(first, name[0]))
		return false;
	for (size_t i = 1; i < length; i++)
		if (!strchr(first, name[i]) && !strchr("_.-", name[i]))
			return false;
	return true;
}

int vmdir_root(bool create, char ret_root[VMDIR_PATH_BYTES], char why[VMDIR_WHY_BYTES])
{
	char root[VMDIR_PATH_BYTES], volumes[VMDIR_PATH_BYTES];
	int r = root_path(root, why);

	if (r)
		return r;
	if (snprintf(volumes, sizeof volumes, "%s/" VMDIR_VOLUMES, root) >= (int)sizeof volumes)
		return dead_end(-ENAMETOOLONG, why, "the run directory's path %s is too long", root);
	r = create ? make_private_dir(root, why) : check_private_dir(root, why);
	if (!r && create)
		r = make_private_dir(volumes, why);
	if (!r)
		memcpy(ret_root, root, sizeof root);
	return r;
}

int vmdir_claim(const char *root, const char *name, struct vmdir *ret_dir, char why[VMDIR_WHY_BYTES])
{
	struct vmdir dir = { .lock_fd = -1, .stats_fd = -1 };
	char socket_path[VMDIR_PATH_BYTES];
	int root_lock, r;

	if (!vmdir_name_ok(name))
		return dead_end(
			-EINVAL, why,
			"'%.80s' is no name for a VM: use up to 63 letters, digits, '_', '.' and "
			"'-', the first a letter or digit, and not '" VMDIR_VOLUMES "'",
			name);
	snprintf(dir.name, sizeof dir.name, "%s", name);
	if (vmdir_path(root, name, "", dir.path) || vmdir_path(root, name, VMDIR_CONTROL, socket_path) ||
	    strlen(socket_path) >= sizeof((struct sockaddr_un *)0)->sun_path)
		return dead_end(-ENAMETOOLONG, why,
				"the run directory %s/%s is too long a path for a socket: use a shorter "
				"name, or a shorter LATENT_RUNTIME_DIR",
				root, name);
	dir.path[strlen(dir.path) - 1] = 0; /* the slash */

	root_lock = lock_root(root, true, why);
	if (root_lock < 0)
		return root_lock;
	r = claim_locked(root, &dir, why);
	close(root_lock);
	if (!r)
		*ret_dir = dir;
	return r;
}

void vmdir_abandon(struct vmdir *dir)
{
	if (dir->lock_fd < 0)
		return;
	vmdir_remove(dir->path);
	close(dir->lock_fd);
	if (dir->stats_fd >= 0)
		close(dir->stats_fd);
	dir->lock_fd = dir->stats_fd = -1;
}

int vmdir_remove(const char *path)
{
	int fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	DIR *dir = fd >= 0 ? fdopendir(fd) : NULL;
	struct dirent *entry;
	int r;

	if (!dir) {
		r = -errno;
		if (fd >= 0)
			close(fd);
		return r;
	}
	while ((entry = readdir(dir)))
		if (strcmp(entry->d_name, VMDIR_LOCK))
			unlinkat(fd, entry->d_name, 0); /* fails for . and .. */
	/* From here on somebody else may claim the directory; a file in it keeps it. */
	unlinkat(fd, VMDIR_LOCK, 0);
	closedir(dir);
	return rmdir(path) ? -errno : 0;
}

int vmdir_rename(const char *root, const char *from, const char *to, char why[VMDIR_WHY_BYTES])
{
	char old[VMDIR_PATH_BYTES], new[VMDIR_PATH_BYTES];
	int root_lock, r;

	if (!vmdir_name_ok(to))
		return dead_end(-EINVAL, why, "'%.80s' is no name for a VM", to);
	if (vmdir_path(root, from, "", old) || vmdir_path(root, to, VMDIR_CONTROL, new) ||
	    strlen(new) >= sizeof((struct sockaddr_un *)0)->sun_path)
		return dead_end(-ENAMETOOLONG, why, "%s/%s is too long a path for a socket: use a shorter name", root, to);
	(void)vmdir_path(root, to, "", new);
	root_lock = lock_root(root, true, why);
	if (root_lock < 0)
		return root_lock;
	(void)remove_if_dead(root, to);
	r = rename(old, new) ? -errno : 0; /* onto an empty directory at most */
	close(root_lock);
	if (r == -ENOTEMPTY || r == -EEXIST)
		return dead_end(-EEXIST, why, "a VM named %s is running already: give another --name", to);
	return r ? dead_end(r, why, "%s cannot be renamed: %s", from, strerror(-r)) : 0;
}

int vmdir_path(const char *root, const char *name, const char *file, char ret_path[VMDIR_PATH_BYTES])
{
	char path[VMDIR_PATH_BYTES];

	if (snprintf(path, sizeof path, "%s/%s/%s", root, name, file) >= (int)sizeof path)
		return -ENAMETOOLONG;
	memcpy(ret_path, path, sizeof path);
	return 0;
}

bool vmdir_is_live(const char *root, const char *name)
{
	struct flock held = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
	char path[VMDIR_PATH_BYTES];
	int fd;
	bool live;

	if (vmdir_path(root, name, VMDIR_LOCK, path))
		return false;
	fd = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC); /* it may be a pipe */
	if (fd < 0)
		return false;
	live = !fcntl(fd, F_OFD_GETLK, &held) && held.l_type != F_UNLCK;
	close(fd);
	return live;
}

static int is_vm_name(const struct dirent *entry) { return vmdir_name_ok(entry->d_name); }

int vmdir_for_each(const char *root, int (*each)(void *ctx, const char *name), void *ctx)
{
	struct dirent **entries;
	int count = scandir(root, &entries, is_vm_name, alphasort);
	int r = 0;

	if (count < 0)
		return -errno;
	for (int i = 0; i < count; i++) {
		const char *name = entries[i]->d_name;

		if (!r && vmdir_is_live(root, name))
			r = each(ctx, name);
		else if (!r)
			clean_up_after(root, name);
		free(entries[i]);
	}
	free(entries);
	return r;
}

static int root_path(char path[VMDIR_PATH_BYTES], char *why)
{
	const char *chosen = getenv("LATENT_RUNTIME_DIR"), *xdg = getenv("XDG_RUNTIME_DIR");
	int length;

	if (chosen && *chosen)
		length = snprintf(path, VMDIR_PATH_BYTES, "%s", chosen);
	else if (!geteuid())
		length = snprintf(path, VMDIR_PATH_BYTES, "/run/latent");
	else if (xdg && *xdg)
		length = snprintf(path, VMDIR_PATH_BYTES, "%s/latent", xdg);
	else
		length = snprintf(path, VMDIR_PATH_BYTES, "/tmp/latent-%u", (unsigned)geteuid());
	if (length >= VMDIR_PATH_BYTES)
		return dead_end(-ENAMETOOLONG, why, "the run directory's path %.80s… is too long", path);
	if (path[0] != '/')
		return dead_end(-EINVAL, why, "the run directory %s is not an absolute path", path);
	while (length > 1 && path[length - 1] == '/')
		path[--length] = 0;
	return 0;
}

static int make_private_dir(const char *path, char *why)
{
	if (!mkdir(path, 0700) || errno == EEXIST)
		return check_private_dir(path, why);
	if (errno == ENOENT)
		return dead_end(-ENOENT, why,
				"the run directory %s cannot be created: the directory "
				"above it does not exist",
				path);
	return dead_end(-errno, why, "the run directory %s cannot be created: %s", path,
			strerror(errno));
}

static int check_private_dir(const char *path, char *why)
{
	struct stat st;

	if (lstat(path, &st))
		return dead_end(-errno, why, "the run directory %s cannot be used: %s", path,
				strerror(errno));
	if (!S_ISDIR(st.st_mode))
		return dead_end(-ENOTDIR, why, "the run directory %s is %s and not a directory", path,
				S_ISLNK(st.st_mode) ? "a symbolic link" : "a file");
	if (st.st_uid != geteuid())
		return dead_end(-EPERM, why, "the run directory %s belongs to user %u and not to you",
				path, (unsigned)st.st_uid);
	if (st.st_mode & S_ISVTX)
		return dead_end(-EPERM, why, "the run directory %s is everybody's (mode %04o): make a directory of your own, "
				"with mode 0700", path, st.st_mode & 07777u);
	if (st.st_mode & 077)
		return dead_end(-EPERM, why,
				"the run directory %s is open to others (mode %04o): "
				"chmod 700 it",
				path, st.st_mode & 07777u);
	return 0;
}

/* Claiming and cleaning exclude each other. The lock ends with the descriptor. */
static int lock_root(const char *root, bool wait, char *why)
{
	struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
	char path[VMDIR_PATH_BYTES + 8];
	int fd, r;

	snprintf(path, sizeof path, "%s/.lock", root);
	fd = open(path, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (fd < 0)
		return dead_end(-errno, why, "%s cannot be opened: %s", path, strerror(errno));
	do
		r = fcntl(fd, wait ? F_OFD_SETLKW : F_OFD_SETLK, &lock) ? -errno : 0;
	while (r == -EINTR);
	if (!r)
		return fd;
	close(fd);
	return dead_end(r, why, "%s cannot be locked: %s", path, strerror(-r));
}

static int claim_locked(const char *root, struct vmdir *dir, char *why)
{
	int r = -EAGAIN;

	/* A VM that ends removes its directory without the root's lock: try again then. */
	for (int i = 0; r == -EAGAIN && i < CLAIM_TRIES; i++) {
		remove_if_dead(root, dir->name);
		if (mkdir(dir->path, 0700) && errno != EEXIST)
			return dead_end(-errno, why, "the run directory %s cannot be created: %s",
					dir->path, strerror(errno));
		r = check_private_dir(dir->path, why);
		if (r == -ENOENT)
			r = -EAGAIN;
		else if (r)
			return r;
		else
			r = take_lock(dir->path, &dir->lock_fd);
	}
	if (r == -EEXIST)
		return dead_end(r, why, "a VM named %s is running already: give another --name", dir->name);
	if (!r)
		r = create_stats(dir);
	if (!r)
		return 0;
	if (dir->lock_fd >= 0)
		vmdir_abandon(dir);
	else
		rmdir(dir->path); /* stays if it is anybody else's */
	return dead_end(r, why, "the run directory %s cannot be used: %s", dir->path, strerror(-r));
}

/* -EEXIST: somebody has it. -EAGAIN: it went away under our hands. */
static int take_lock(const char *path, int *ret_fd)
{
	struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
	char file[VMDIR_PATH_BYTES + 8];
	struct stat mine, there;
	int fd, r = 0;

	snprintf(file, sizeof file, "%s/" VMDIR_LOCK, path);
	fd = open(file, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (fd < 0)
		return errno == ENOENT ? -EAGAIN : -errno;
	if (fcntl(fd, F_OFD_SETLK, &lock))
		r = errno == EAGAIN || errno == EACCES ? -EEXIST : -errno;
	else if (fstat(fd, &mine) || stat(file, &there) || mine.st_ino != there.st_ino)
		r = -EAGAIN;
	if (r)
		close(fd);
	else
		*ret_fd = fd;
	return r;
}

/* All of it is allocated: a full file system must not become a SIGBUS in the VMM. */
static int create_stats(struct vmdir *dir)
{
	char path[VMDIR_PATH_BYTES + 8];
	int fd, r;

	snprintf(path, sizeof path, "%s/" VMDIR_STATS, dir->path);
	fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (fd < 0)
		return -errno;
	r = -posix_fallocate(fd, 0, sizeof(struct vm_stats));
	if (r)
		close(fd);
	else
		dir->stats_fd = fd;
	return r;
}

static void clean_up_after(const char *root, const char *name)
{
	char why[VMDIR_WHY_BYTES];
	int root_lock = lock_root(root, false, why); /* busy: the next `latent ps` cleans up */

	if (root_lock < 0)
		return;
	remove_if_dead(root, name);
	close(root_lock);
}

/* The root is locked. */
static int remove_if_dead(const char *root, const char *name)
{
	char path[VMDIR_PATH_BYTES];
	int r = vmdir_path(root, name, "", path);

	if (r)
		return r;
	path[strlen(path) - 1] = 0;
	return vmdir_remove_if_dead(path);
}

int vmdir_remove_if_dead(const char *path)
{
	struct stat st;
	int fd = -1, r;

	if (lstat(path, &st) || !S_ISDIR(st.st_mode))
		return -ENOENT;
	r = take_lock(path, &fd);
	if (r)
		return r;
	r = vmdir_remove(path);
	close(fd);
	return r;
}

static int dead_end(int error, char *why, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(why, VMDIR_WHY_BYTES, format, args);
	va_end(args);
	return error;
}

int vmdir_connect(const char *path, int type, unsigned timeout_ms)
{
	struct timeval timeout = { .tv_sec = timeout_ms / 1000, .tv_usec = timeout_ms % 1000 * 1000 };
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int fd, r = 0;

	if (snprintf(address.sun_path, sizeof address.sun_path, "%s", path) >=
	    (int)sizeof address.sun_path)
		return -ENAMETOOLONG;
	fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -errno;
	if (setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout) ||
	    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout) ||
	    connect(fd, (struct sockaddr *)&address, sizeof address))
		r = errno == EAGAIN ? -ETIMEDOUT : -errno;
	if (!r)
		return fd;
	close(fd);
	return r;
}
