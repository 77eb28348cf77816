/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* latent info, latent verify: what a snapshot is, and whether it is whole. */
#include "cli/cli.h"
#include "snapshot/manifest.h"
#include "snapshot/packed.h"

#include <fcntl.h>
#include <json-c/json.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define PAGE_BYTES 4096

enum { OPT_JSON };

static const struct cli_option no_options[] = { { NULL, CLI_FLAG, NULL, NULL } };

static const struct cli_option options[] = {
	[OPT_JSON] = { "json", CLI_FLAG, NULL, "print a JSON object" },
	{ NULL, CLI_FLAG, NULL, NULL },
};

static int run_info(const struct cli_command *command, int argc, char **argv);
static int run_verify(const struct cli_command *command, int argc, char **argv);

const struct cli_command cli_info = {
	.name = "info",
	.arguments = "[OPTIONS] DIR",
	.summary = "Show what a snapshot holds",
	.options = options,
	.run = run_info,
};

const struct cli_command cli_verify = {
	.name = "verify",
	.arguments = "DIR",
	.summary = "Check that a snapshot is whole, and that what it refers to is still the same",
	.options = no_options,
	.run = run_verify,
};

struct opened {
	int dir_fd;
	struct manifest manifest;
	struct snapshot_image image;
	bool json;
};

static int open_pages(struct opened *o, const char *dir);

/* Prints the sentence and returns an exit status on failure. */
static int open_snapshot(const struct cli_command *command, int argc, char **argv, struct opened *o)
{
	struct cli_parser parser = { .command = command, .argc = argc, .argv = argv };
	char why[SNAPSHOT_WHY_BYTES];
	int option;

	o->dir_fd = -1;
	while ((option = cli_next_option(&parser)) >= 0)
		o->json = true;
	if (option != CLI_END)
		return cli_end_status(option);
	if (parser.operands != 1)
		return cli_fail(CLI_USAGE, "%s: give the directory of a snapshot", command->name);
	o->dir_fd = open(argv[1], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (o->dir_fd < 0)
		return cli_fail(CLI_NO_IMAGE, "%s cannot be opened as a directory", argv[1]);
	if (manifest_read(o->dir_fd, &o->manifest, why))
		return cli_fail(CLI_NO_IMAGE, "%s: %s", argv[1], why);
	return open_pages(o, argv[1]);
}

static int open_pages(struct opened *o, const char *dir)
{
	char why[SNAPSHOT_WHY_BYTES] = SNAPSHOT_PAGES " cannot be opened";
	int fd = openat(o->dir_fd, SNAPSHOT_PAGES, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
	int r = fd < 0 ? -1 : snapshot_image_read(fd, &o->image, why);

	if (fd >= 0)
		close(fd);
	return r ? cli_fail(CLI_NO_IMAGE, "%s: %s", dir, why) : CLI_OK;
}

static void close_snapshot(struct opened *o)
{
	snapshot_image_free(&o->image);
	if (o->dir_fd >= 0)
		close(o->dir_fd);
}

/* ---- info ------------------------------------------------------------------------------------ */

static void print_disk(const struct manifest_disk *disk)
{
	char size[CLI_SIZE_TEXT];

	printf("disk %-14s %9s\n", disk->drive, cli_size(disk->bytes, size));
	for (uint32_t i = 0; i < disk->layers; i++)
		printf("  %-17s %9s  was %s\n", disk->layer[i].file[0] ? disk->layer[i].file : "(elsewhere)",
		       cli_size(disk->layer[i].volume.bytes, size), disk->layer[i].volume.path);
}

static void print_text(const struct opened *o)
{
	const struct manifest *m = &o->manifest;
	char a[CLI_SIZE_TEXT], b[CLI_SIZE_TEXT];
	struct snapshot_counts c;

	snapshot_image_count(&o->image, &c);
	printf("%s, saved %s ago under QEMU %s\n", m->name, cli_age(m->created_unix_s, a), m->qemu_version);
	printf("RAM %s\n", cli_size(c.pages * PAGE_BYTES, a));
	printf("  stored            %9s\n", cli_size(c.data * PAGE_BYTES, a));
	if (m->packed_bytes)
		printf("    packed into     %9s\n", cli_size(m->packed_bytes, a));
	printf("  in other files    %9s\n", cli_size(c.volume * PAGE_BYTES, a));
	printf("  zero              %9s\n", cli_size(c.zero * PAGE_BYTES, a));
	printf("  of one word       %9s\n", cli_size((c.word - c.zero) * PAGE_BYTES, a));
	printf("device state        %9s\n", cli_size(m->state_bytes, a));
	for (uint32_t i = 0; i < m->disks; i++)
		print_disk(&m->disk[i]);
	for (uint32_t i = 0; i < m->volumes; i++)
		printf("needs               %9s  %s\n", cli_size(m->volume[i].bytes, b), m->volume[i].path);
}

static void print_json(const struct opened *o)
{
	struct json_object *json = json_object_new_object(), *disks = json_object_new_array(),
			   *volumes = json_object_new_array();
	const struct manifest *m = &o->manifest;
	struct snapshot_counts c;

	snapshot_image_count(&o->image, &c);
	json_object_object_add(json, "name", json_object_new_string(m->name));
	json_object_object_add(json, "qemu_version", json_object_new_string(m->qemu_version));
	json_object_object_add(json, "created_unix_s", json_object_new_uint64(m->created_unix_s));
	json_object_object_add(json, "state_bytes", json_object_new_uint64(m->state_bytes));
	json_object_object_add(json, "packed_bytes", json_object_new_uint64(m->packed_bytes));
	json_object_object_add(json, "pages", json_object_new_uint64(c.pages));
	json_object_object_add(json, "pages_stored", json_object_new_uint64(c.data));
	json_object_object_add(json, "pages_on_volumes", json_object_new_uint64(c.volume));
	json_object_object_add(json, "pages_zero", json_object_new_uint64(c.zero));
	json_object_object_add(json, "pages_of_one_word", json_object_new_uint64(c.word));
	for (uint32_t i = 0; i < m->disks; i++)
		json_object_array_add(disks, json_object_new_string(m->disk[i].drive));
	for (uint32_t i = 0; i < m->volumes; i++)
		json_object_array_add(volumes, json_object_new_string(m->volume[i].path));
	json_object_object_add(json, "disks", disks);
	json_object_object_add(json, "volumes", volumes);
	printf("%s\n", json_object_to_json_string_ext(json, JSON_C_TO_STRING_PLAIN));
	json_object_put(json);
}

static int run_info(const struct cli_command *command, int argc, char **argv)
{
	struct opened o = { 0 };
	int status = open_snapshot(command, argc, argv, &o);

	if (!status && o.dir_fd >= 0 && o.image.memory)
		(o.json ? print_json : print_text)(&o);
	close_snapshot(&o);
	return status;
}

/* ---- verify ---------------------------------------------------------------------------------- */

static int verify_file(const struct manifest_volume *v, int fd, const char *name)
{
	struct manifest_volume now;

	if (fd < 0)
		return cli_fail(CLI_NO_IMAGE, "%s cannot be opened", name);
	if (manifest_identify(fd, &now)) /* all of it, also if nobody seems to have touched it */
		return cli_fail(CLI_NO_IMAGE, "%s cannot be read", name);
	if (now.bytes != v->bytes || now.fingerprint != v->fingerprint)
		return cli_fail(CLI_NO_IMAGE, "%s is not the file that it was: fingerprint %016jx of %ju bytes, expected "
				"%016jx of %ju", name, (uintmax_t)now.fingerprint, (uintmax_t)now.bytes,
				(uintmax_t)v->fingerprint, (uintmax_t)v->bytes);
	return CLI_OK;
}

static int verify_packed(struct opened *o, int fd, uint64_t *ret_bad, char *why)
{
	struct packed packed;
	int r = packed_open(fd, &o->image, &packed, why);

	if (r)
		return r;
	r = packed_verify(&packed, fd, ret_bad, why);
	packed_free(&packed);
	return r;
}

static int verify_ram(struct opened *o)
{
	const char *name = o->manifest.packed_bytes ? SNAPSHOT_PACKED : SNAPSHOT_RAM;
	int fd = openat(o->dir_fd, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC), r = -1;
	char why[SNAPSHOT_WHY_BYTES];
	uint64_t bad = 0;

	snprintf(why, sizeof why, "%s cannot be opened", name);
	if (fd >= 0)
		r = o->manifest.packed_bytes ? verify_packed(o, fd, &bad, why)
					     : snapshot_image_verify(&o->image, fd, &bad, why);
	if (fd >= 0)
		close(fd);
	if (r || bad)
		return cli_fail(CLI_NO_IMAGE, "%s (%ju bad pages)", why, (uintmax_t)bad);
	return CLI_OK;
}

static int verify_state(struct opened *o)
{
	struct stat st;

	if (fstatat(o->dir_fd, SNAPSHOT_STATE, &st, AT_SYMLINK_NOFOLLOW) ||
	    (uint64_t)st.st_size != o->manifest.state_bytes)
		return cli_fail(CLI_NO_IMAGE, SNAPSHOT_STATE " is missing, or not of %ju bytes",
				(uintmax_t)o->manifest.state_bytes);
	return CLI_OK;
}

static int verify_layer(struct opened *o, const struct manifest_layer *layer)
{
	char path[MANIFEST_PATH_BYTES + 16];
	int fd, status;

	if (layer->file[0]) {
		snprintf(path, sizeof path, SNAPSHOT_DISKS "/%s", layer->file);
		fd = openat(o->dir_fd, path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
	} else {
		snprintf(path, sizeof path, "%s", layer->volume.path);
		fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	}
	status = verify_file(&layer->volume, fd, path);
	if (fd >= 0)
		close(fd);
	return status;
}

static int verify_files(struct opened *o)
{
	const struct manifest *m = &o->manifest;
	int status = CLI_OK;

	for (uint32_t i = 0; i < m->volumes; i++) {
		int fd = open(m->volume[i].path, O_RDONLY | O_CLOEXEC), one;

		one = verify_file(&m->volume[i], fd, m->volume[i].path);
		status = status ? status : one;
		if (fd >= 0)
			close(fd);
	}
	for (uint32_t i = 0; i < m->disks; i++) {
		for (uint32_t j = 0; j < m->disk[i].layers; j++) {
			int one = verify_layer(o, &m->disk[i].layer[j]);

			status = status ? status : one;
		}
	}
	return status;
}

static int run_verify(const struct cli_command *command, int argc, char **argv)
{
	struct opened o = { 0 };
	int status = open_snapshot(command, argc, argv, &o), one;

	if (!status && o.image.memory) {
		status = verify_state(&o);
		one = verify_ram(&o);
		status = status ? status : one;
		one = verify_files(&o);
		status = status ? status : one;
		if (!status)
			printf("%s is whole\n", argv[1]);
	}
	close_snapshot(&o);
	return status;
}
