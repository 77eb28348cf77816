/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* QEMU: softmmu/vl.c (qemu_init, lookup_opt, parse_memory_options), util/cutils.c (do_strtosz). */
#include "cli/qemu_args.h"

#include "cli/qcow2.h"
#include "vmdir/compat.h"
#include "vmdir/props.h"

#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#define DEFAULT_RAM_BYTES (128ull << 20)
#define RAM_ALIGN_BYTES 8192ull
#define DEFAULT_BLOCK "pc.ram"
#define MICROVM_BLOCK "microvm.ram"
#define KEY_TEXT 64
#define VALUE_TEXT 1024
#define LAYERS_MAX 64 /* of a chain of images that are looked at */

struct scan {
	struct qemu_plan plan;
	qemu_args_read read;
	void *ctx;
	char *why;
	char machine_type[64];
	uint64_t m_bytes, machine_bytes; /* -m wins over -machine memory.size; 0: not said */
};

/* A group of options, by its name as a section of a -readconfig file. */
struct group {
	const char *name;
	const char *implied; /* the key of a first word without '=' */
	int (*take)(struct scan *scan, const struct props *props);
};

static int take_memory(struct scan *scan, const struct props *props);
static int take_machine(struct scan *scan, const struct props *props);
static int take_object(struct scan *scan, const struct props *props);
static int take_device(struct scan *scan, const struct props *props);
static int take_netdev(struct scan *scan, const struct props *props);
static int take_fsdev(struct scan *scan, const struct props *props);
static int take_numa(struct scan *scan, const struct props *props);
static int take_overcommit(struct scan *scan, const struct props *props);
static int take_block(struct scan *scan, const struct props *props);
static int take_drive(struct scan *scan, const struct props *props);
static int take_name(struct scan *scan, const struct props *props);
static int take_global(struct scan *scan, const struct props *props);

static const struct group groups[] = {
	{ "memory", "size", take_memory },       { "machine", "type", take_machine },
	{ "object", "qom-type", take_object },   { "device", "driver", take_device },
	{ "netdev", "type", take_netdev },       { "nic", "type", take_netdev },
	{ "net", "type", take_netdev },          { "numa", "type", take_numa },
	{ "fsdev", "fsdriver", take_fsdev },     { "virtfs", "fsdriver", take_fsdev },
	{ "overcommit", NULL, take_overcommit }, { "drive", NULL, take_drive },
	{ "blockdev", "driver", take_block },    { "name", "guest", take_name },
	{ "global", NULL, take_global },
};
#define GROUPS (sizeof groups / sizeof groups[0])

static int scan_words(struct scan *scan, int argc, const char *const *argv);
static int take_option(struct scan *scan, const char *option, const char *value);
static int take_config(struct scan *scan, const char *path);
static int take_config_text(struct scan *scan, const char *text, const char *path);
static int take_file(struct scan *scan, const char *path);
static int take_image(struct scan *scan, const char *path, bool layered);
static int take_incoming(struct scan *scan, const char *uri);
static bool is_layered(const struct props *props);
static const struct group *find_group(const char *name);
static int parse_size(struct scan *scan, const char *text, bool legacy, uint64_t *ret_bytes);
static void look_up(struct scan *scan, enum compat_subject subject, const char *name,
		    const struct props *props);
static int refuse(struct scan *scan, const char *format, ...) __attribute__((format(printf, 2, 3)));

int qemu_args_plan(int argc, const char *const *argv, qemu_args_read read, void *ctx,
		   struct qemu_plan *ret_plan, char why[QEMU_ARGS_WHY_BYTES])
{
	struct scan scan = { .read = read, .ctx = ctx, .why = why };
	uint64_t bytes;
	int r = scan_words(&scan, argc, argv);

	if (r)
		return r;
	bytes = scan.m_bytes ? scan.m_bytes : scan.machine_bytes;
	if (!bytes)
		bytes = DEFAULT_RAM_BYTES;
	if (bytes > INT64_MAX - RAM_ALIGN_BYTES)
		return refuse(&scan, "more guest RAM is asked for than a machine can have");
	scan.plan.ram_bytes = (bytes + RAM_ALIGN_BYTES - 1) / RAM_ALIGN_BYTES * RAM_ALIGN_BYTES;
	snprintf(scan.plan.block_name, sizeof scan.plan.block_name, "%s",
		 !strcmp(scan.machine_type, "microvm") ? MICROVM_BLOCK : DEFAULT_BLOCK);
	*ret_plan = scan.plan;
	return 0;
}

static int scan_words(struct scan *scan, int argc, const char *const *argv)
{
	int r = 0;

	for (int i = 1; !r && i < argc; i++) {
		const char *option = argv[i], *value = "";

		if (option[0] != '-') {
			r = take_image(scan, option, true);
			continue;
		}
		option += option[1] == '-' ? 2 : 1;
		if (props_option_has_value(option)) {
			if (++i == argc)
				break; /* QEMU will say so */
			value = argv[i];
		}
		r = take_option(scan, option, value);
	}
	return r;
}

static int take_option(struct scan *scan, const char *option, const char *value)
{
	static const char *const disks[] = { "hda", "hdb", "hdc", "hdd",      "cdrom",
					     "fda", "fdb", "sd",  "mtdblock", "pflash" };
	const struct group *group;
	struct props props = { 0 };
	int r;

	if (!strcmp(option, "mem-prealloc"))
		return refuse(scan, "-mem-prealloc fills all of guest RAM before the guest starts, and "
				    "Latent fills it on demand: leave it out");
	if (!strcmp(option, "mem-path"))
		return refuse(scan, "-mem-path puts guest RAM into a file, and Latent needs it in its "
				    "own: leave it out");
	if (!strcmp(option, "readconfig"))
		return take_config(scan, value);
	if (!strcmp(option, "incoming"))
		return take_incoming(scan, value);
	for (size_t i = 0; i < sizeof disks / sizeof disks[0]; i++)
		if (!strcmp(option, disks[i]))
			return take_image(scan, value, true);

	group = find_group(!strcmp(option, "m") ? "memory" : !strcmp(option, "M") ? "machine" : option);
	if (!group)
		return 0;
	r = props_parse(&props, value, group->implied);
	if (!r)
		r = group->take(scan, &props);
	else if (r == -EINVAL)
		r = 0; /* QEMU will say what is wrong */
	props_clear(&props);
	return r;
}

static int take_memory(struct scan *scan, const struct props *props)
{
	const char *size = props_get(props, "size");

	return size && *size ? parse_size(scan, size, true, &scan->m_bytes) : 0;
}

static int take_machine(struct scan *scan, const struct props *props)
{
	const char *type = props_get(props, "type"), *size = props_get(props, "memory.size");
	const char *backend = props_get(props, "memory-backend");

	if (backend)
		return refuse(scan,
			      "-machine memory-backend=%.64s puts guest RAM into a memory backend of "
			      "yours, and Latent needs it in its own: leave it and its -object out, "
			      "and give the size with -m",
			      backend);
	if (type) {
		snprintf(scan->machine_type, sizeof scan->machine_type, "%s", type);
		look_up(scan, COMPAT_MACHINE, type, props);
	} else {
		look_up(scan, COMPAT_MACHINE, "", props);
	}
	return size ? parse_size(scan, size, false, &scan->machine_bytes) : 0;
}

static int take_object(struct scan *scan, const struct props *props)
{
	const char *type = props_get(props, "qom-type"), *id = props_get(props, "id");

	if (id && (!strcmp(id, DEFAULT_BLOCK) || !strcmp(id, MICROVM_BLOCK)))
		return refuse(scan,
			      "-object id=%s is a name that Latent gives to guest RAM: choose "
			      "another one",
			      id);
	if (type)
		look_up(scan, COMPAT_OBJECT, type, props);
	return 0;
}

static int take_device(struct scan *scan, const struct props *props)
{
	const char *driver = props_get(props, "driver");

	if (driver)
		look_up(scan, COMPAT_DEVICE, driver, props);
	return 0;
}

static int take_netdev(struct scan *scan, const struct props *props)
{
	const char *type = props_get(props, "type");

	if (type)
		look_up(scan, COMPAT_NETDEV, type, props);
	return 0;
}

static int take_fsdev(struct scan *scan, const struct props *props)
{
	(void)props;
	look_up(scan, COMPAT_FSDEV, "virtio-9p", NULL);
	return 0;
}

static int take_numa(struct scan *scan, const struct props *props)
{
	const char *backend = props_get(props, "memdev");

	if (!backend)
		return 0;
	return refuse(scan,
		      "-numa memdev=%.64s puts guest RAM into a memory backend of yours, and Latent "
		      "needs it in its own: leave memdev out, and give the size with -m",
		      backend);
}

static int take_overcommit(struct scan *scan, const struct props *props)
{
	look_up(scan, COMPAT_OVERCOMMIT, "", props);
	return 0;
}

/* Does QEMU look for what the image itself names as lying beneath it? */
static bool is_layered(const struct props *props)
{
	const char *format = props_get(props, "format");

	if (!format)
		format = props_get(props, "driver");
	for (size_t i = 0; i < props->count; i++)
		if (!strncmp(props->items[i].key, "backing", strlen("backing")))
			return false;
	return !format || !strcmp(format, "qcow2");
}

/* Drivers nest: driver=qcow2,file.driver=nvme. A file may be a URI: nvme://0000:01:00.0/1. */
static int take_block(struct scan *scan, const struct props *props)
{
	for (size_t i = 0; i < props->count; i++) {
		const char *dot = strrchr(props->items[i].key, '.');
		const char *key = dot ? dot + 1 : props->items[i].key;

		if (!strcmp(key, "aio") && strcmp(props->items[i].value, "threads"))
			snprintf(scan->plan.aio, sizeof scan->plan.aio, "%s", props->items[i].value);
		else if (!strcmp(key, "driver"))
			look_up(scan, COMPAT_BLOCKDEV, props->items[i].value, NULL);
		else if (!strcmp(key, "file"))
			take_file(scan, props->items[i].value);
		else if (!strcmp(key, "filename"))
			take_image(scan, props->items[i].value, is_layered(props));
	}
	return 0;
}

static int take_drive(struct scan *scan, const struct props *props)
{
	const char *path = props_get(props, "file");

	if (path)
		(void)take_image(scan, path, is_layered(props));
	return take_block(scan, props);
}

static int take_name(struct scan *scan, const struct props *props)
{
	const char *guest = props_get(props, "guest");

	if (guest)
		snprintf(scan->plan.guest_name, sizeof scan->plan.guest_name, "%s", guest);
	return 0;
}

/* -global virtio-gpu-pci.blob=on, or driver=,property=,value= */
static int take_global(struct scan *scan, const struct props *props)
{
	const char *driver = props_get(props, "driver"), *property = props_get(props, "property");
	const char *value = props_get(props, "value");
	char name[KEY_TEXT];
	struct props one = { 0 };
	const char *dot = props->count ? strchr(props->items[0].key, '.') : NULL;
	int r;

	if (!driver && dot) {
		snprintf(name, sizeof name, "%.*s", (int)(dot - props->items[0].key),
			 props->items[0].key);
		driver = name;
		property = dot + 1;
		value = props->items[0].value;
	}
	if (!driver || !property || !value)
		return 0;
	r = props_add(&one, property, value);
	if (!r)
		look_up(scan, COMPAT_DEVICE, driver, &one);
	props_clear(&one);
	return r;
}

static int take_config(struct scan *scan, const char *path)
{
	char *text = scan->read(scan->ctx, path);
	int r;

	if (!text)
		return refuse(scan,
			      "-readconfig %.200s cannot be read, or is no ordinary file that can be "
			      "read twice",
			      path);
	r = take_config_text(scan, text, path);
	free(text);
	return r;
}

/* Sections as QEMU's qemu_config_foreach reads them; a section ends where the next begins. */
static int take_config_text(struct scan *scan, const char *text, const char *path)
{
	const struct group *group = NULL;
	struct props props = { 0 };
	char line[VALUE_TEXT + KEY_TEXT], key[KEY_TEXT], value[VALUE_TEXT];
	int r = 0;

	while (!r && *text) {
		size_t length = strcspn(text, "\n");

		snprintf(line, sizeof line, "%.*s", (int)(length < sizeof line ? length : sizeof line),
			 text);
		text += length + (text[length] == '\n');
		value[0] = 0;
		if (line[0] == '[') {
			r = group ? group->take(scan, &props) : 0;
			props_clear(&props);
			group = sscanf(line, "[%63[^] \"]", key) == 1 ? find_group(key) : NULL;
			if (!r && sscanf(line, "[%*63s \"%1023[^\"]\"]", value) == 1)
				r = props_add(&props, "id", value);
		} else if (sscanf(line, " %63s = \"%1023[^\"]\"", key, value) >= 1 && key[0] != '#') {
			if (length >= sizeof line)
				r = refuse(scan, "-readconfig %.200s has a line that is too long", path);
			else
				r = props_add(&props, key, value);
		}
	}
	if (!r && group)
		r = group->take(scan, &props);
	props_clear(&props);
	return r;
}

static int take_file(struct scan *scan, const char *path)
{
	char protocol[KEY_TEXT];

	/* The protocol's name is the driver's: nvme://… */
	if (sscanf(path, "%63[a-z0-9+_-]:", protocol) == 1 && path[strlen(protocol)] == ':')
		look_up(scan, COMPAT_BLOCKDEV, protocol, NULL);
	return 0;
}

static bool is_missing(const char *path)
{
	return access(path, F_OK) && errno == ENOENT;
}

/* Something lies beneath the image, by what the image says, that is not there. */
static void find_missing_layer(struct scan *scan, const char *path)
{
	char layers[2][PATH_MAX];

	snprintf(layers[0], PATH_MAX, "%s", path);
	for (unsigned depth = 0; depth < LAYERS_MAX; depth++) {
		const char *image = layers[depth % 2];
		char *beneath = layers[(depth + 1) % 2];

		if (!qcow2_backing(image, beneath))
			return;
		if (!is_missing(beneath))
			continue;
		snprintf(scan->plan.missing, sizeof scan->plan.missing, "%s", beneath);
		snprintf(scan->plan.missing_of, sizeof scan->plan.missing_of, "%s", image);
		return;
	}
}

/* A file by its path, not by a protocol or a descriptor's number: it should be there, and so what lies beneath it. */
static int take_image(struct scan *scan, const char *path, bool layered)
{
	static const char fdset[] = "/dev/fdset/";

	if (*path && !path[strcspn(path, ":")] && strncmp(path, fdset, sizeof fdset - 1) && !scan->plan.missing[0]) {
		if (is_missing(path))
			snprintf(scan->plan.missing, sizeof scan->plan.missing, "%s", path);
		else if (layered)
			find_missing_layer(scan, path);
	}
	return take_file(scan, path);
}

static int take_incoming(struct scan *scan, const char *uri)
{
	char protocol[KEY_TEXT];

	if (sscanf(uri, "%63[a-z]:", protocol) == 1)
		look_up(scan, COMPAT_MIGRATION, protocol, NULL);
	return 0;
}

static const struct group *find_group(const char *name)
{
	for (size_t i = 0; i < GROUPS; i++)
		if (!strcmp(groups[i].name, name))
			return &groups[i];
	return NULL;
}

/*
 * A size as QEMU takes it: digits with or without a fraction, or hexadecimal, and a suffix. Without
 * one it is bytes; or, `legacy` (-m), MiB if it ends in a decimal digit; a fraction must then be
 * zero. A size of zero is "not said".
 */
static int parse_size(struct scan *scan, const char *text, bool legacy, uint64_t *ret_bytes)
{
	static const char suffixes[] = "bkmgtpe";
	const char *suffix;
	bool hexadecimal;
	uint64_t value;
	double fraction = 0;
	unsigned shift = 0;
	char *end;

	errno = 0;
	value = strtoull(text, &end, 10);
	hexadecimal = !value && (*end == 'x' || *end == 'X');
	if (hexadecimal)
		value = strtoull(text, &end, 16);
	else if (end != text && *end == '.')
		for (double digit = 0.1; *++end >= '0' && *end <= '9'; digit /= 10)
			fraction += digit * (*end - '0');
	if (errno || end == text || strchr(text, '-'))
		goto wrong;
	suffix = *end ? strchr(suffixes, *end | 0x20) : NULL;
	if (suffix)
		shift = (unsigned)(suffix - suffixes) * 10;
	else if (legacy && end[-1] >= '0' && end[-1] <= '9')
		shift = 20;
	if (*end && (!suffix || end[1]))
		goto wrong;
	if (fraction > 0 && (!suffix || !shift))
		goto wrong;
	if (value > (UINT64_MAX >> shift) - 1)
		goto wrong;
	*ret_bytes = (value << shift) + (uint64_t)(fraction * (double)(1ull << shift));
	return 0;
wrong:
	return refuse(scan, "'%.64s' is no size of guest RAM", text);
}

static const char *get_property(void *ctx, const char *property) { return props_get(ctx, property); }

/* The first thing that excludes anything is the one that the user is told of. */
static void look_up(struct scan *scan, enum compat_subject subject, const char *name,
		    const struct props *props)
{
	const struct compat_rule *rule =
		compat_find(subject, name, props ? get_property : NULL, (void *)props);

	if (!rule)
		return;
	if (!scan->plan.excludes)
		compat_sentence(rule, name, scan->plan.excluded_by, sizeof scan->plan.excluded_by);
	scan->plan.excludes |= rule->excludes;
}

static int refuse(struct scan *scan, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(scan->why, QEMU_ARGS_WHY_BYTES, format, args);
	va_end(args);
	return -EINVAL;
}
