/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * What of an image can be mapped. An image's bytes are anybody's: every number from it is checked
 * where it is read, and nothing is allocated by it. What formats hold is left to qemu-img.
 */
#include "cli/capture.h"
#include "cli/doctor.h"
#include "os/os.h"
#include "vmdir/props.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define QEMU_IMG "qemu-img"
#define INFO_MAX_BYTES (1u << 20)
#define INFO_TIMEOUT_S 30
#define CHECK_TIMEOUT_S 120
#define CHECK_MAX_STATUS 3 /* qemu-img check: leaks and errors; its numbers are there all the same */
#define LAYERS_MAX 64
#define HEAD_BYTES 65536u
#define SECTOR_BYTES 512u
#define PARTITIONS_MAX 32u
#define EXT_AT_BYTES 1024u /* the superblock, from the beginning of the file system */

struct image {
	struct check_list *list;
	const char *path; /* absolute */
	char format[32];
	struct json_object *chain; /* qemu-img info --backing-chain; NULL: no qemu-img */
	bool unreadable;           /* by qemu-img, which is asked no more */
};

static int refuse_type(const char *path);
static void check_format(struct image *image);
static void check_encryption(struct image *image, struct json_object *data);
static void check_compression(struct image *image);
static void check_layers(struct image *image);
static void check_layer(struct image *image, const char *path, bool top);
static void find_writers(const char *path, char *text, size_t bytes);
static void check_alignment(struct image *image);
static void check_file_system(struct image *image, uint64_t start_byte, bool *found);
static size_t list_partitions(const uint8_t head[HEAD_BYTES], uint64_t starts[PARTITIONS_MAX]);
static bool read_guest(struct image *image, uint64_t offset, void *to, size_t bytes);
static bool extract(const struct image *image, uint64_t offset, size_t bytes, int fd);
static struct json_object *ask_qemu_img(const char *const *argv, enum json_type type, unsigned timeout_s,
					int max_status);
static bool has_qemu_img(void);
static const char *text_of(struct json_object *json, const char *key);

int doctor_check_image(struct check_list *list, const char *path)
{
	char *absolute = realpath(path, NULL);
	struct image image = { .list = list, .path = absolute };
	int r = absolute ? refuse_type(absolute) : -errno;

	if (absolute && !r) {
		const char *const argv[] = { QEMU_IMG,        "info",   "-U", "--backing-chain",
					     "--output=json", absolute, NULL };

		image.chain = ask_qemu_img(argv, json_type_array, INFO_TIMEOUT_S, 0);
		image.unreadable = !image.chain; /* whatever the reason: nothing more of it is tried */
		check_format(&image);
		check_layers(&image);
		check_alignment(&image);
		json_object_put(image.chain);
	}
	free(absolute);
	return r;
}

/* A device may hold an image; nothing else but a file does. */
static int refuse_type(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK), r;
	struct stat st;

	if (fd < 0)
		return -errno;
	r = fstat(fd, &st) ? -errno : 0;
	close(fd);
	if (!r && S_ISDIR(st.st_mode))
		return -EISDIR;
	if (!r && !S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
		return -ENOTBLK;
	return r;
}

static void check_format(struct image *image)
{
	struct check *check = check_add(image->list, "format", "mapping what the guest reads");
	struct json_object *top = image->chain ? json_object_array_get_idx(image->chain, 0) : NULL;
	struct json_object *specific = NULL, *data = NULL;
	const char *format = text_of(top, "format");
	char magic[4] = { 0 };
	int fd = open(image->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);

	if (fd >= 0 && pread(fd, magic, sizeof magic, 0) < 0)
		magic[0] = 0;
	if (fd >= 0)
		close(fd);
	snprintf(image->format, sizeof image->format, "%s",
		 format                        ? format
		 : memcmp(magic, "QFI\xfb", 4) ? "raw"
					       : "qcow2");
	if (strcmp(image->format, "raw") && strcmp(image->format, "qcow2")) {
		check_found(check, CHECK_LIMITED, "%s: nobody has tried it", image->format);
		check_remedy(check, "qemu-img convert -O qcow2, for a format that is known to do");
		return;
	}
	if (!image->chain && has_qemu_img()) {
		check_found(check, CHECK_MISSING, "%s, and qemu-img cannot open it", image->format);
		check_remedy(check, "qemu-img info --backing-chain says what is wrong");
		return;
	}
	check_found(check, CHECK_OK, "%s%s", image->format,
		    image->chain ? "" : "; install qemu-utils to learn more of it");
	if (!top || strcmp(image->format, "qcow2"))
		return;
	if (json_object_object_get_ex(top, "format-specific", &specific))
		json_object_object_get_ex(specific, "data", &data);
	check_encryption(image, data);
	check_compression(image);
}

static void check_encryption(struct image *image, struct json_object *data)
{
	struct json_object *encryption;
	struct check *check;

	if (!data || !json_object_object_get_ex(data, "encrypt", &encryption))
		return;
	check = check_add(image->list, "encryption", "mapping what the guest reads");
	check_found(check, CHECK_LIMITED, "encrypted: what is read from it is copied");
	check_remedy(check, "encrypt the storage below the image (dm-crypt), or within the guest");
}

static void check_compression(struct image *image)
{
	const char *const argv[] = { QEMU_IMG, "check",         "-U",        "-f",
				     "qcow2",  "--output=json", image->path, NULL };
	struct json_object *json =
		ask_qemu_img(argv, json_type_object, CHECK_TIMEOUT_S, CHECK_MAX_STATUS);
	struct json_object *clusters;
	int64_t all, compressed = 0;
	struct check *check;

	if (!json || !json_object_object_get_ex(json, "allocated-clusters", &clusters))
		goto out;
	all = json_object_get_int64(clusters);
	if (json_object_object_get_ex(json, "compressed-clusters", &clusters))
		compressed = json_object_get_int64(clusters);
	check = check_add(image->list, "compression", "mapping what the guest reads");
	if (compressed > 0 && all > 0) {
		check_found(check, CHECK_LIMITED,
			    "%.0f %% of the clusters are compressed: reads of them are "
			    "copied",
			    100 * (double)compressed / (double)all);
		check_remedy(check, "qemu-img convert -O qcow2 without -c");
	} else {
		check_found(check, CHECK_OK, "no compressed clusters");
	}
out:
	json_object_put(json);
}

/* The first layer is what a guest would write to; the others are what guests share. */
static void check_layers(struct image *image)
{
	size_t count = image->chain ? json_object_array_length(image->chain) : 0;

	if (!count)
		check_layer(image, image->path, true);
	if (count > 1)
		check_found(check_add(image->list, "this file", "the guest's own blocks"), CHECK_OK,
			    "an overlay: the guest writes it, and what it reads from it is copied");
	for (size_t i = count > 1; i < count && i < LAYERS_MAX; i++) {
		const char *path = text_of(json_object_array_get_idx(image->chain, i), "filename");

		if (path)
			check_layer(image, path, !i);
	}
}

static void check_layer(struct image *image, const char *path, bool top)
{
	struct check *check = check_add(image->list, top ? "this file" : "backing file",
					"mapping it: nothing may change it unnoticed");
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK), r;
	struct stat st;
	enum os_protection protection = fd < 0 ? OS_PROTECT_NONE : os_file_protection(fd);
	bool is_file = fd >= 0 && !fstat(fd, &st) && S_ISREG(st.st_mode);
	bool local = fd >= 0 && os_file_is_local(fd);
	char writers[160];

	r = fd < 0 ? -errno : os_lease_take(fd, SIGURG, gettid());
	if (!r)
		os_lease_release(fd);
	if (fd >= 0)
		close(fd);
	if (fd < 0) {
		check_found(check, CHECK_MISSING, "%.200s cannot be opened: %s", path, strerror(-r));
	} else if (!is_file) {
		check_found(check, CHECK_LIMITED, "%.200s is no file: what is read from it is copied",
			    path);
		check_remedy(check, "put the image into a file");
	} else if (!local) {
		check_found(check, CHECK_LIMITED,
			    "%.200s is not on a file system that is known to be this machine's alone: reads are copied",
			    path);
		check_remedy(check, "keep it on a local disk, or vouch for it with --trust-image");
	} else if (protection != OS_PROTECT_NONE) {
		check_found(check, CHECK_OK, "%.200s cannot change", path);
	} else if (!r) {
		check_found(check, CHECK_OK, "%.200s can be leased", path);
	} else if (r == -EAGAIN) {
		find_writers(path, writers, sizeof writers);
		check_found(check, CHECK_LIMITED, "open for writing by %s", writers);
		check_remedy(check,
			     "share it as a backing file or with readonly=on, and end who writes it");
	} else {
		check_found(check, CHECK_LIMITED, "no lease to be had on %.150s: %s", path,
			    r == -EACCES ? "it is another user's" : "its file system has none");
		check_remedy(check,
			     "own it, chattr +i it, or put it on a read-only mount; or vouch for it "
			     "with --trust-image");
	}
}

/* Of other users' processes only root sees the descriptors. */
static bool writes(const char *pid, const struct stat *file)
{
	char path[300], line[64] = "";
	bool found = false;
	struct dirent *entry;
	DIR *dir;

	snprintf(path, sizeof path, "/proc/%.16s/fd", pid);
	dir = opendir(path);
	while (dir && !found && (entry = readdir(dir))) {
		unsigned flags = 0;
		struct stat st;
		FILE *info;

		snprintf(path, sizeof path, "/proc/%.16s/fd/%.16s", pid, entry->d_name);
		if (stat(path, &st) || st.st_ino != file->st_ino || st.st_dev != file->st_dev)
			continue;
		snprintf(path, sizeof path, "/proc/%.16s/fdinfo/%.16s", pid, entry->d_name);
		info = fopen(path, "re");
		while (info && fgets(line, sizeof line, info))
			if (sscanf(line, "flags: %o", &flags) == 1)
				break;
		if (info)
			fclose(info);
		found = (flags & O_ACCMODE) != O_RDONLY;
	}
	if (dir)
		closedir(dir);
	return found;
}

static void find_writers(const char *path, char *text, size_t bytes)
{
	DIR *proc = opendir("/proc");
	struct dirent *entry;
	struct stat file;
	size_t used = 0;

	snprintf(text, bytes, "a process that is not yours to see");
	if (stat(path, &file)) {
		if (proc)
			closedir(proc);
		return;
	}
	while (proc && used < bytes && (entry = readdir(proc))) {
		if (entry->d_name[0] < '0' || entry->d_name[0] > '9' || !writes(entry->d_name, &file))
			continue;
		used += (size_t)snprintf(text + used, bytes - used, "%sprocess %.16s", used ? ", " : "",
					 entry->d_name);
	}
	if (proc)
		closedir(proc);
}

static void check_alignment(struct image *image)
{
	static uint8_t head[HEAD_BYTES];
	uint64_t starts[PARTITIONS_MAX];
	bool found = false;
	struct stat st;
	size_t count;

	if (!strcmp(image->format, "raw") && !stat(image->path, &st) &&
	    (uint64_t)st.st_size % OS_PAGE_BYTES) {
		struct check *check = check_add(image->list, "length", "mapping the last page");

		check_found(check, CHECK_LIMITED,
			    "not a multiple of 4096 bytes: the last part is copied");
		check_remedy(check, "truncate -s %%4096 it");
	}
	memset(head, 0, sizeof head);
	if (!read_guest(image, 0, head, sizeof head))
		return;
	check_file_system(image, 0, &found);
	count = list_partitions(head, starts);
	for (size_t i = 0; i < count; i++) {
		if (starts[i] % OS_PAGE_BYTES) {
			struct check *check =
				check_add(image->list, "partition", "mapping what the guest reads");

			check_found(check, CHECK_LIMITED,
				    "partition %zu begins at byte %ju, within a page: all "
				    "reads from it are copied",
				    i + 1, (uintmax_t)starts[i]);
			check_remedy(check, "make partitions begin at multiples of 1 MiB");
			continue;
		}
		check_file_system(image, starts[i], &found);
	}
}

static uint32_t le32(const uint8_t *at)
{
	return at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

static uint64_t le64(const uint8_t *at) { return le32(at) | (uint64_t)le32(at + 4) << 32; }

/* ext2 to ext4: the block size is 1024 << s_log_block_size. Of others nothing is said. */
static void check_file_system(struct image *image, uint64_t start_byte, bool *found)
{
	uint8_t super[SECTOR_BYTES] = { 0 };
	struct check *check;

	if (*found || !read_guest(image, start_byte + EXT_AT_BYTES, super, sizeof super))
		return;
	if (super[56] != 0x53 || super[57] != 0xef || le32(super + 24) > 6)
		return;
	*found = true;
	check = check_add(image->list, "block size", "mapping what the guest reads");
	if (le32(super + 24) < 2) {
		check_found(check, CHECK_LIMITED,
			    "ext4 with blocks of %u bytes: most of what is read is not "
			    "aligned to pages (of 1024 bytes: only about 21 %% is)",
			    1024u << le32(super + 24));
		check_remedy(check, "make the file system again with mkfs.ext4 -b 4096");
	} else {
		check_found(check, CHECK_OK, "ext4 with blocks of %u bytes", 1024u << le32(super + 24));
	}
}

/* MBR or GPT, primary partitions. Starts are in bytes. */
static size_t list_partitions(const uint8_t head[HEAD_BYTES], uint64_t starts[PARTITIONS_MAX])
{
	const uint8_t *mbr = head + 446, *gpt = head + SECTOR_BYTES;
	uint64_t table = le64(gpt + 72);
	uint32_t entries = le32(gpt + 80), entry_bytes = le32(gpt + 84);
	size_t count = 0;

	if (head[510] != 0x55 || head[511] != 0xaa)
		return 0;
	if (memcmp(gpt, "EFI PART", 8)) {
		for (size_t i = 0; i < 4; i++)
			if (mbr[i * 16 + 4] && le32(mbr + i * 16 + 8))
				starts[count++] = (uint64_t)le32(mbr + i * 16 + 8) * SECTOR_BYTES;
		return count;
	}
	if (table > HEAD_BYTES / SECTOR_BYTES || entry_bytes < 128 || entry_bytes > 4096)
		return 0;
	for (uint64_t i = 0; i < entries && count < PARTITIONS_MAX; i++) {
		uint64_t at = table * SECTOR_BYTES + i * entry_bytes;
		static const uint8_t unused[16];

		if (at + 128 > HEAD_BYTES)
			break;
		if (memcmp(head + at, unused, sizeof unused) && le64(head + at + 32) < (1ull << 50))
			starts[count++] = le64(head + at + 32) * SECTOR_BYTES;
	}
	return count;
}

/* What a guest finds there: the file's own bytes, or what qemu-img makes of them. Whole sectors; beyond the
 * end `to` stays as it is. */
static bool read_guest(struct image *image, uint64_t offset, void *to, size_t bytes)
{
	bool raw = !strcmp(image->format, "raw");
	int fd = raw ? open(image->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)
		     : os_memfd_create("latent-doctor", 0, false);
	bool done;

	if (fd < 0)
		return false;
	done = raw || (!image->unreadable && extract(image, offset, bytes, fd));
	image->unreadable = !done;
	if (done)
		done = offset < INT64_MAX && pread(fd, to, bytes, raw ? (off_t)offset : 0) > 0;
	close(fd);
	return done;
}

/* (qemu-img dd would do, but its versions disagree on what "count" counts from.) */
static bool extract(const struct image *image, uint64_t offset, size_t bytes, int fd)
{
	char *path = props_escape(image->path), *source = NULL, *output = NULL;
	char target[40];
	const char *argv[] = {
		QEMU_IMG, "convert", "-U", "--image-opts", "-O", "raw", NULL, target, NULL
	};

	snprintf(target, sizeof target, "/proc/self/fd/%d", fd);
	if (path && asprintf(&source,
			     "driver=raw,offset=%ju,size=%zu,file.driver=%s,file.file.driver=file,"
			     "file.file.filename=%s",
			     (uintmax_t)offset, bytes, image->format, path) < 0)
		source = NULL;
	argv[6] = source;
	if (source)
		output = capture(argv, fd, INFO_MAX_BYTES, INFO_TIMEOUT_S, 0);
	free(path);
	free(source);
	if (!output)
		return false;
	free(output);
	return true;
}

/* NULL: no answer, or none of this type. */
static struct json_object *ask_qemu_img(const char *const *argv, enum json_type type, unsigned timeout_s,
					int max_status)
{
	char *text = capture(argv, -1, INFO_MAX_BYTES, timeout_s, max_status);
	struct json_object *json = text ? json_tokener_parse(text) : NULL;

	free(text);
	if (json_object_is_type(json, type))
		return json;
	json_object_put(json);
	return NULL;
}

static bool has_qemu_img(void)
{
	const char *const argv[] = { QEMU_IMG, "--version", NULL };
	char *text = capture(argv, -1, INFO_MAX_BYTES, INFO_TIMEOUT_S, 0);
	bool has = text != NULL;

	free(text);
	return has;
}

static const char *text_of(struct json_object *json, const char *key)
{
	struct json_object *value;

	if (!json || !json_object_object_get_ex(json, key, &value))
		return NULL;
	return json_object_get_string(value);
}
