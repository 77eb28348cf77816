/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* latent info, latent verify: what a snapshot is, and whether it is whole. */
#include "cli/cli.h"
#include "os/os.h"
#include "snapshot/active.h"
#include "snapshot/packed.h"
#include "snapshot/reader.h"

#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

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
	struct reader reader;
	bool json;
};

/* Prints the sentence and returns an exit status on failure. `*ret_dir`: NULL when nothing is to be done. */
static int open_snapshot(const struct cli_command *command, int argc, char **argv, struct opened *o,
			 const char **ret_dir)
{
	struct cli_parser parser = { .command = command, .argc = argc, .argv = argv };
	char why[SNAPSHOT_WHY_BYTES];
	int option;

	while ((option = cli_next_option(&parser)) >= 0)
		o->json = true;
	if (option != CLI_END)
		return cli_end_status(option);
	if (parser.operands != 1)
		return cli_fail(CLI_USAGE, "%s: give the directory of a snapshot", command->name);
	if (reader_open(argv[1], &o->reader, why)) {
		reader_close(&o->reader);
		return cli_fail(CLI_NO_IMAGE, "%s: %s", argv[1], why);
	}
	*ret_dir = argv[1];
	return CLI_OK;
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

static void print_volumes(const struct manifest *m, const struct snapshot_counts *c)
{
	char size[CLI_SIZE_TEXT];

	for (uint32_t i = 0; i < m->volumes; i++)
		printf("needs               %9s  of %s%s\n", cli_size(c->in_volume[i] * PAGE_BYTES, size), m->volume[i].path,
		       m->volume[i].role == MANIFEST_RAM ? " (another snapshot)" : "");
}

static void print_text(const struct reader *r)
{
	const struct manifest *m = &r->manifest;
	char a[CLI_SIZE_TEXT];
	struct snapshot_counts c;

	snapshot_image_count(&r->image, &c);
	printf("%s, saved %s ago under QEMU %s\n", m->name, cli_age(m->created_unix_s, a), m->qemu_version);
	printf("RAM %s\n", cli_size(c.pages * PAGE_BYTES, a));
	printf("  stored            %9s\n", cli_size(c.data * PAGE_BYTES, a));
	if (m->packed_bytes)
		printf("    packed into     %9s\n", cli_size(m->packed_bytes, a));
	printf("  equal to stored   %9s\n", cli_size(c.equal * PAGE_BYTES, a));
	printf("  in other files    %9s\n", cli_size(c.volume * PAGE_BYTES, a));
	printf("  zero              %9s\n", cli_size(c.zero * PAGE_BYTES, a));
	printf("  of one word       %9s\n", cli_size((c.word - c.zero) * PAGE_BYTES, a));
	printf("device state        %9s\n", cli_size(m->state_bytes, a));
	printf("machine             %s%s\n", m->machine ? m->machine->type : "not described: ",
	       m->machine ? "" : m->machine_missing);
	for (uint32_t i = 0; i < m->disks; i++)
		print_disk(&m->disk[i]);
	print_volumes(m, &c);
	if (m->parent.path[0])
		printf("parent              %s of %s\n", m->parent.path, m->parent.name);
}

static struct json_object *volume_to_json(const struct manifest_volume *v, uint64_t pages)
{
	struct json_object *json = json_object_new_object();

	json_object_object_add(json, "path", json_object_new_string(v->path));
	json_object_object_add(json, "role", json_object_new_string(manifest_role_name(v->role)));
	json_object_object_add(json, "bytes", json_object_new_uint64(v->bytes));
	json_object_object_add(json, "pages", json_object_new_uint64(pages));
	return json;
}

static struct json_object *parent_to_json(const struct manifest_parent *p)
{
	struct json_object *json;

	if (!p->path[0])
		return NULL;
	json = json_object_new_object();
	json_object_object_add(json, "path", json_object_new_string(p->path));
	json_object_object_add(json, "name", json_object_new_string(p->name));
	json_object_object_add(json, "created_unix_s", json_object_new_uint64(p->created_unix_s));
	return json;
}

static void print_json(const struct reader *r)
{
	struct json_object *json = json_object_new_object(), *disks = json_object_new_array(),
			   *volumes = json_object_new_array();
	const struct manifest *m = &r->manifest;
	struct snapshot_counts c;

	snapshot_image_count(&r->image, &c);
	json_object_object_add(json, "name", json_object_new_string(m->name));
	json_object_object_add(json, "qemu_version", json_object_new_string(m->qemu_version));
	json_object_object_add(json, "created_unix_s", json_object_new_uint64(m->created_unix_s));
	json_object_object_add(json, "parent", parent_to_json(&m->parent));
	if (m->machine)
		json_object_object_add(json, "machine", json_object_new_string(m->machine->type));
	else
		json_object_object_add(json, "machine_missing", json_object_new_string(m->machine_missing));
	json_object_object_add(json, "state_bytes", json_object_new_uint64(m->state_bytes));
	json_object_object_add(json, "packed_bytes", json_object_new_uint64(m->packed_bytes));
	json_object_object_add(json, "pages", json_object_new_uint64(c.pages));
	json_object_object_add(json, "pages_stored", json_object_new_uint64(c.data));
	json_object_object_add(json, "pages_equal", json_object_new_uint64(c.equal));
	json_object_object_add(json, "pages_on_volumes", json_object_new_uint64(c.volume));
	json_object_object_add(json, "pages_zero", json_object_new_uint64(c.zero));
	json_object_object_add(json, "pages_of_one_word", json_object_new_uint64(c.word));
	for (uint32_t i = 0; i < m->disks; i++)
		json_object_array_add(disks, json_object_new_string(m->disk[i].drive));
	for (uint32_t i = 0; i < m->volumes; i++)
		json_object_array_add(volumes, volume_to_json(&m->volume[i], c.in_volume[i]));
	json_object_object_add(json, "disks", disks);
	json_object_object_add(json, "volumes", volumes);
	printf("%s\n", json_object_to_json_string_ext(json, JSON_C_TO_STRING_PLAIN));
	json_object_put(json);
}

static int run_info(const struct cli_command *command, int argc, char **argv)
{
	static struct opened o;
	const char *dir = NULL;
	int status = open_snapshot(command, argc, argv, &o, &dir);

	if (dir) {
		(o.json ? print_json : print_text)(&o.reader);
		reader_close(&o.reader);
	}
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
	if (manifest_compare(fd, v, &now))
		return cli_fail(CLI_NO_IMAGE, "%s has been written since, which its fingerprint does not show, as it is made of a "
				"part of it", name);
	return CLI_OK;
}

static int verify_packed(struct reader *r, uint64_t *ret_bad, char *why)
{
	struct packed packed;
	int e = packed_open(r->packed_fd, &r->image, &packed, why);

	if (e)
		return e;
	e = packed_verify(&packed, r->packed_fd, ret_bad, why);
	packed_free(&packed);
	return e;
}

static int verify_ram(struct reader *r)
{
	char why[SNAPSHOT_WHY_BYTES];
	uint64_t bad = 0;
	int e = r->packed_fd >= 0 ? verify_packed(r, &bad, why) : snapshot_image_verify(&r->image, r->ram_fd, &bad, why);

	if (e || bad)
		return cli_fail(CLI_NO_IMAGE, "%s (%ju bad pages)", why, (uintmax_t)bad);
	return CLI_OK;
}

static int verify_state(struct reader *r)
{
	int fd = openat(r->dir_fd, SNAPSHOT_STATE, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC), result;
	char why[SNAPSHOT_WHY_BYTES];

	if (fd < 0)
		return cli_fail(CLI_NO_IMAGE, SNAPSHOT_STATE " cannot be opened: %s", strerror(errno));
	result = manifest_check_state(&r->manifest, fd, why);
	close(fd);
	return result ? cli_fail(CLI_NO_IMAGE, "%s", why) : CLI_OK;
}

static int verify_layer(struct reader *r, const struct manifest_layer *layer)
{
	char path[MANIFEST_PATH_BYTES + 16];
	int fd, status;

	if (layer->file[0]) {
		snprintf(path, sizeof path, SNAPSHOT_DISKS "/%s", layer->file);
		fd = openat(r->dir_fd, path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
	} else {
		snprintf(path, sizeof path, "%s", layer->volume.path);
		fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	}
	status = verify_file(&layer->volume, fd, path);
	if (fd >= 0)
		close(fd);
	return status;
}

static int verify_disks(struct reader *r)
{
	const struct manifest *m = &r->manifest;
	int status = CLI_OK;

	for (uint32_t i = 0; i < m->disks; i++) {
		for (uint32_t j = 0; j < m->disk[i].layers; j++) {
			int one = verify_layer(r, &m->disk[i].layer[j]);

			status = status ? status : one;
		}
	}
	return status;
}

/* Images by their fingerprints; of what is in other snapshots every page, by the digest that is there. */
static int verify_volumes(struct reader *r)
{
	const struct manifest *m = &r->manifest;
	char why[SNAPSHOT_WHY_BYTES];
	int status = CLI_OK;
	uint64_t bad = 0;

	if (reader_open_files(r, why) || reader_open_origins(r, why))
		return cli_fail(CLI_NO_IMAGE, "%s", why);
	for (uint32_t i = 0; i < m->volumes; i++) {
		int one = verify_file(&m->volume[i], r->file[i].fd, m->volume[i].path);

		status = status ? status : one;
	}
	if (reader_verify_origins(r, &bad, why) || bad)
		status = cli_fail(CLI_NO_IMAGE, "%s (%ju bad pages)", why, (uintmax_t)bad);
	return status;
}

/* The packed copies of pages in use must be what the pages are. -EBADMSG. */
static int compare_active(struct reader *r, int fd, char why[SNAPSHOT_WHY_BYTES])
{
	uint8_t copy[PAGE_BYTES], page[PAGE_BYTES];
	struct active_set set = { 0 };
	int result = active_read(fd, &r->image, &set, why), file;

	for (uint64_t i = 0; !result && set.digest && i < set.count; i++) {
		uint64_t number = set.list[i].page, at;

		if (!reader_locate(r, number, &file, &at) || reader_fd(r, file) < 0)
			continue; /* no contents, or a file of which it was said that it is missing */
		if (os_read_all(fd, copy, sizeof copy, set.contents_offset + i * PAGE_BYTES) ||
		    os_read_all(reader_fd(r, file), page, sizeof page, at * PAGE_BYTES) || memcmp(copy, page, sizeof page) ||
		    XXH3_64bits(copy, sizeof copy) != set.digest[i] || set.digest[i] != active_digest(&set, i, &r->image)) {
			snprintf(why, SNAPSHOT_WHY_BYTES, SNAPSHOT_ACTIVE ": the copy of page %ju is not what the page is",
				 (uintmax_t)number);
			result = -EBADMSG;
		}
	}
	active_free(&set);
	return result;
}

static int verify_active(struct reader *r)
{
	int fd = openat(r->dir_fd, SNAPSHOT_ACTIVE, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC), result;
	char why[SNAPSHOT_WHY_BYTES] = SNAPSHOT_ACTIVE " cannot be opened";

	if (fd < 0 && errno == ENOENT)
		return CLI_OK; /* a restore does without */
	result = fd < 0 ? -errno : compare_active(r, fd, why);
	if (fd >= 0)
		close(fd);
	return result ? cli_fail(CLI_NO_IMAGE, "%s", why) : CLI_OK;
}

static int run_verify(const struct cli_command *command, int argc, char **argv)
{
	static int (*const parts[])(struct reader *) = { verify_state, verify_ram, verify_volumes, verify_active,
							 verify_disks };
	static struct opened o;
	const char *dir = NULL;
	int status = open_snapshot(command, argc, argv, &o, &dir);

	if (!dir)
		return status;
	for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
		int one = parts[i](&o.reader);

		status = status ? status : one;
	}
	if (!status)
		printf("%s is whole\n", dir);
	reader_close(&o.reader);
	return status;
}
