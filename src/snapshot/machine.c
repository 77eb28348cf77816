/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* QEMU: qemu-options.hx for the options, `-device NAME,help` for properties. */
#include "snapshot/machine.h"

#include "snapshot/drives.h"

#include <errno.h>
#include <fnmatch.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define VMM "qemu-system-x86_64"
#define RAW "value" /* the key of an option whose value has no properties */
#define LETTERS "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
#define DIGITS "0123456789"

/* ---- what a value may look like ---------------------------------------------------------------- */

/* None of them holds a slash where a file could be meant, and those with a name name nothing of the host. */
enum form { NAME, NUMBER, SWITCH, LIST, MAC, GUID, NET, NOTHING, DEVICE, NETDEV, NIC, OBJECT, CHARDEV, PORT, NO_NET,
	    GLOBAL_DRIVER };

static const char *const devices[] = {
	"virtio-blk-pci", "virtio-net-pci", "virtio-serial-pci", "virtio-rng-pci", "virtio-balloon-pci",
	"virtio-scsi-pci", "virtio-gpu-pci", "virtio-vga", "virtio-keyboard-pci", "virtio-mouse-pci",
	"virtio-tablet-pci", "virtio-blk-device", "virtio-net-device", "virtio-serial-device", "virtio-rng-device",
	"virtio-balloon-device", "virtio-scsi-device", "virtio-blk-pci-transitional", "virtio-net-pci-transitional",
	"virtio-serial-pci-transitional", "virtio-rng-pci-transitional", "virtio-balloon-pci-transitional",
	"virtio-scsi-pci-transitional", "virtio-blk-pci-non-transitional", "virtio-net-pci-non-transitional",
	"virtio-serial-pci-non-transitional", "virtio-rng-pci-non-transitional",
	"virtio-balloon-pci-non-transitional", "virtio-scsi-pci-non-transitional", "virtserialport", "virtconsole",
	"scsi-hd", "scsi-cd", "ide-hd", "ide-cd", "ahci", "lsi53c895a", "pvpanic", "pvpanic-pci", "vmgenid",
	"usb-tablet", "usb-kbd", "usb-mouse", "usb-hub", "qemu-xhci", "nec-usb-xhci", "piix3-usb-uhci", "usb-ehci",
	"ich9-usb-ehci1", "ich9-usb-uhci1", "ich9-usb-uhci2", "ich9-usb-uhci3", "pcie-root-port", "ioh3420",
	"pcie-pci-bridge", "pci-bridge", "i82801b11-bridge", "e1000", "e1000e", "rtl8139", "VGA", "bochs-display",
	"cirrus-vga", "isa-serial", "pci-serial", "i6300esb", "isa-debug-exit",
};
static const char *const netdevs[] = { "user" };
static const char *const nics[] = { "user", "none" };
static const char *const objects[] = { "rng-random", "rng-builtin", "iothread" };
static const char *const chardevs[] = { "null", "stdio", "socket" };
static const char *const ports[] = { "null", "none", "stdio", "mon:stdio" };
static const char *const global_drivers[] = { "ICH9-LPC", "PIIX4_PM", "kvm-pit", "kvm-pit-common", "mc146818rtc" };
static const char *const switches[] = { "on", "off", "auto", "yes", "no", "true", "false", "split" };

#define IN(list, text) is_one_of(text, list, sizeof(list) / sizeof(list)[0])

static bool is_one_of(const char *text, const char *const *list, size_t count)
{
	for (size_t i = 0; i < count; i++)
		if (!strcmp(text, list[i]))
			return true;
	return false;
}

/* The first is a letter or a digit: no dash that makes an option of it, no dot of a path. */
static bool is_made_of(const char *text, const char *letters, size_t max)
{
	size_t bytes = strlen(text);

	return bytes && bytes <= max && strchr(LETTERS DIGITS, text[0]) && strspn(text, letters) == bytes;
}

static bool has_form(const char *text, enum form form)
{
	switch (form) {
	case NAME:
		return is_made_of(text, LETTERS DIGITS "_.-", 63);
	case NUMBER:
		return is_made_of(text, DIGITS "ABCDEFabcdefxKMGTkmgt.", 32) && strchr(DIGITS "abcdefABCDEF", text[0]);
	case SWITCH:
		return IN(switches, text);
	case LIST:
		return is_made_of(text, LETTERS DIGITS "_.:+=,-", 1023);
	case MAC:
		return is_made_of(text, DIGITS "ABCDEFabcdef:", 17) && strlen(text) == 17;
	case GUID:
		return is_made_of(text, DIGITS "ABCDEFabcdef-", 36) && strlen(text) == 36;
	case NET: /* 10.0.2.0/24: an address or QEMU refuses it */
		return is_made_of(text, DIGITS "ABCDEFabcdef.:/", 63) && strpbrk(text, ".:");
	case NOTHING:
		return !*text;
	case DEVICE:
		return IN(devices, text);
	case NETDEV:
		return IN(netdevs, text);
	case NIC:
		return IN(nics, text);
	case OBJECT:
		return IN(objects, text);
	case CHARDEV:
		return IN(chardevs, text);
	case PORT:
		return IN(ports, text) || (!strncmp(text, "chardev:", 8) && has_form(text + 8, NAME));
	case NO_NET:
		return !strcmp(text, "none");
	case GLOBAL_DRIVER:
		return IN(global_drivers, text);
	}
	return false;
}

/* ---- options and their properties --------------------------------------------------------------- */

struct key {
	const char *names; /* patterns as in fnmatch(3), with blanks between them; NULL: the last */
	enum form form;
};

struct rule {
	const char *option;
	const char *implied; /* the key of a first word without '='; RAW: all of the value; NULL: none */
	const struct key *keys; /* NULL: a flag, without a value */
};

static const struct key machine_keys[] = {
	{ "usb vmport hpet smm acpi graphics pit pic sata smbus i8042 nvdimm mem-merge dump-guest-core "
	  "kernel_irqchip kernel-irqchip rtc isa-serial auto-kernel-cmdline pcie ioapic2 default_bus_bypass_iommu",
	  SWITCH },
	{ "accel", LIST },
	{ NULL, NAME },
};
static const struct key accel_keys[] = {
	{ "accel thread", NAME },
	{ "kernel-irqchip split-wx one-insn-per-tb", SWITCH },
	{ "tb-size dirty-ring-size", NUMBER },
	{ NULL, NAME },
};
static const struct key memory_keys[] = { { "size slots maxmem", NUMBER }, { NULL, NAME } };
static const struct key smp_keys[] = { { "cpus maxcpus sockets dies clusters cores threads", NUMBER }, { NULL, NAME } };
static const struct key list_keys[] = { { RAW, LIST }, { NULL, NAME } };
static const struct key name_keys[] = { { RAW, NAME }, { NULL, NAME } };
static const struct key guid_keys[] = { { RAW, GUID }, { NULL, NAME } };
static const struct key port_keys[] = { { RAW, PORT }, { NULL, NAME } };
static const struct key net_keys[] = { { RAW, NO_NET }, { NULL, NAME } };
static const struct key rtc_keys[] = { { "base", LIST }, { "clock driftfix", NAME }, { NULL, NAME } };
static const struct key boot_keys[] = {
	{ "order once", NAME },
	{ "menu strict", SWITCH },
	{ "reboot-timeout splash-time", NUMBER },
	{ NULL, NAME },
};
static const struct key overcommit_keys[] = { { "mem-lock cpu-pm", SWITCH }, { NULL, NAME } };
static const struct key sandbox_keys[] = {
	{ "enable", SWITCH },
	{ "obsolete elevateprivileges spawn resourcecontrol", NAME },
	{ NULL, NAME },
};
static const struct key global_keys[] = {
	{ "driver", GLOBAL_DRIVER },
	{ "property", NAME },
	{ "value", NAME },
	{ NULL, NAME },
};
static const struct key object_keys[] = {
	{ "qom-type", OBJECT },
	{ "id", NAME },
	{ "poll-max-ns poll-grow poll-shrink aio-max-batch", NUMBER },
	{ NULL, NAME },
};
static const struct key netdev_keys[] = {
	{ "type", NETDEV },
	{ "id hostname domainname", NAME },
	{ "restrict ipv4 ipv6", SWITCH },
	{ "net host dhcpstart dns ipv6-net ipv6-prefix ipv6-host ipv6-dns", NET },
	{ "ipv6-prefixlen", NUMBER },
	{ NULL, NAME },
};
static const struct key nic_keys[] = {
	{ "type", NIC },
	{ "id model hostname domainname", NAME },
	{ "mac", MAC },
	{ "restrict ipv4 ipv6", SWITCH },
	{ "net host dhcpstart dns ipv6-net ipv6-prefix ipv6-host ipv6-dns", NET },
	{ NULL, NAME },
};
static const struct key drive_keys[] = {
	{ "id if media cache aio discard detect-zeroes werror rerror", NAME },
	{ "index bus unit throttling.* bps* iops*", NUMBER },
	{ "copy-on-read readonly read-only cache.* auto-read-only", SWITCH },
	{ NULL, NAME },
};
static const struct key blockdev_keys[] = {
	{ "node-name discard detect-zeroes", NAME },
	{ "read-only auto-read-only cache.direct cache.no-flush", SWITCH },
	{ NULL, NAME },
};
static const struct key chardev_keys[] = {
	{ "backend", CHARDEV },
	{ "id", NAME },
	{ "mux signal", SWITCH },
	{ NULL, NAME },
};
static const struct key device_keys[] = {
	{ "driver", DEVICE },
	{ "id bus drive netdev chardev rng iothread name tx werror rerror failover_pair_id duplex", NAME },
	{ "mac", MAC },
	{ "romfile", NOTHING },
	{ "addr port chassis slot bus_nr bootindex rombar vectors queues num-queues num_queues queue-size "
	  "virtqueue_size cmd_per_lun max_sectors seg_max_adjust rx_queue_size tx_queue_size x-txtimer x-txburst "
	  "speed host_mtu max-ports max_ports nr iobase iosize ioport irq index events scsi-id lun channel unit wwn "
	  "port_wwn port_index logical_block_size physical_block_size min_io_size opt_io_size discard_granularity "
	  "max-discard-sectors max-write-zeroes-sectors rotation_rate max-bytes period guest-stats-polling-interval "
	  "ports p2 p3 vgamem_mb vgamem xres yres max_outputs io-reserve mem-reserve pref32-reserve pref64-reserve "
	  "bus-reserve x-speed x-width firstport masterbus shpc msi msix intrs slots streams", NUMBER },
	{ "multifunction disable-legacy disable-modern iommu_platform ats packed event_idx indirect_desc any_layout "
	  "ioeventfd modern-pio-notify page-per-vq x-* hotplug csum gso guest_* mrg_rxbuf mq ctrl_* status rss hash "
	  "host_tso4 host_tso6 host_ecn host_ufo free-page-reporting free-page-hint deflate-on-oom share-rw "
	  "write-cache config-wce discard write-zeroes scsi removable dpofua failover edid virgl blob msi msix shpc "
	  "use-disabled-flag notify_on_empty emergency-write iommu aer extended_tags_enabled mitigation init_vet "
	  "autonegotiation usb_version", SWITCH },
	{ NULL, NAME },
};

static const struct rule rules[] = {
	{ "machine", "type", machine_keys },
	{ "accel", "accel", accel_keys },
	{ "m", "size", memory_keys },
	{ "smp", "cpus", smp_keys },
	{ "cpu", RAW, list_keys },
	{ "uuid", RAW, guid_keys },
	{ "vga", RAW, name_keys },
	{ "usbdevice", RAW, name_keys },
	{ "rtc", NULL, rtc_keys },
	{ "boot", "order", boot_keys },
	{ "overcommit", NULL, overcommit_keys },
	{ "sandbox", "enable", sandbox_keys },
	{ "global", NULL, global_keys },
	{ "object", "qom-type", object_keys },
	{ "netdev", "type", netdev_keys },
	{ "nic", "type", nic_keys },
	{ "net", RAW, net_keys },
	{ "drive", NULL, drive_keys },
	{ "blockdev", "driver", blockdev_keys },
	{ "chardev", "backend", chardev_keys },
	{ "device", "driver", device_keys },
	{ "serial", RAW, port_keys },
	{ "parallel", RAW, port_keys },
	{ "nodefaults", NULL, NULL },
	{ "no-user-config", NULL, NULL },
	{ "nographic", NULL, NULL },
	{ "no-reboot", NULL, NULL },
	{ "no-shutdown", NULL, NULL },
	{ "no-acpi", NULL, NULL },
	{ "no-hpet", NULL, NULL },
	{ "no-fd-bootchk", NULL, NULL },
	{ "enable-kvm", NULL, NULL },
	{ "usb", NULL, NULL },
};

static const struct rule *find_rule(const char *option)
{
	for (size_t i = 0; i < sizeof rules / sizeof rules[0]; i++)
		if (!strcmp(rules[i].option, option))
			return &rules[i];
	return NULL;
}

/* A key may be in the table with two forms: shpc is a number here and a switch there. */
static bool is_allowed(const struct rule *rule, const char *key, const char *value)
{
	for (const struct key *k = rule->keys; k && k->names; k++) {
		char names[1200], *rest = names;

		snprintf(names, sizeof names, "%s", k->names);
		for (char *name; (name = strsep(&rest, " "));)
			if (*name && !fnmatch(name, key, 0) && has_form(value, k->form))
				return true;
	}
	return false;
}

static int refuse(char *why, int r, const char *format, ...) __attribute__((format(printf, 3, 4)));

static int refuse(char *why, int r, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(why, MACHINE_WHY_BYTES, format, args);
	va_end(args);
	return r;
}

/* All that comes in, from whatever side, goes through here. */
static int check(const struct machine_option *o, char *why)
{
	const struct rule *rule = find_rule(o->name);
	const struct props *props = &o->props;
	const char *what = props->count ? props->items[0].value : "";

	if (!rule || props->count > MACHINE_PROPS || !rule->keys != !props->count)
		return refuse(why, -ENOTSUP, "-%.24s%s%.60s cannot be described", o->name, *what ? " " : "", what);
	for (size_t i = 0; i < props->count; i++) {
		const struct prop *p = &props->items[i];

		if (is_allowed(rule, p->key, p->value))
			continue;
		if (!i)
			return refuse(why, -ENOTSUP, "-%.24s %.60s cannot be described", o->name, p->value);
		return refuse(why, -ENOTSUP, "-%.24s %.40s cannot be described with %.30s=%.30s", o->name, what, p->key,
			      p->value);
	}
	return 0;
}

static int add(struct machine *m, struct machine_option *o, char *why)
{
	int r = check(o, why);

	if (!r && m->count == MACHINE_OPTIONS)
		r = refuse(why, -ENOTSUP, "a command line with more than %d options cannot be described", MACHINE_OPTIONS);
	if (r)
		props_clear(&o->props);
	else
		m->option[m->count++] = *o;
	return r;
}

void machine_free(struct machine *m)
{
	for (size_t i = 0; m && i < m->count; i++)
		props_clear(&m->option[i].props);
	free(m);
}

/* ---- from a command line ------------------------------------------------------------------------ */

/* Of the host alone, or, as the kernel to boot, of no use any more. */
static bool is_left_out(const char *option)
{
	static const char *const out[] = {
		"name", "kernel", "initrd", "append", "dtb", "pidfile", "monitor", "qmp", "qmp-pretty", "mon", "D", "d",
		"dfilter", "trace", "msg", "vnc", "gdb", "s", "S", "daemonize", "incoming", "sdl", "curses",
		"display", "full-screen", "no-quit", "alt-grab", "ctrl-grab", "k",
	};

	return IN(out, option);
}

/* Replaces the properties by those that `keep` wants. */
static int filter(struct props *props, bool (*keep)(const char *key, const char *value))
{
	struct props kept = { 0 };
	int r = 0;

	for (size_t i = 0; !r && i < props->count; i++)
		if (keep(props->items[i].key, props->items[i].value))
			r = props_add(&kept, props->items[i].key, props->items[i].value);
	props_clear(props);
	if (r)
		props_clear(&kept);
	else
		*props = kept;
	return r;
}

/* The file, and what lies beneath it, come from the snapshot. */
static bool keep_of_drive(const char *key, const char *value)
{
	(void)value;
	return strcmp(key, "file") && strcmp(key, "format") && strcmp(key, "driver") && strcmp(key, "backing") &&
	       strncmp(key, "file.", 5) && strncmp(key, "backing.", 8);
}

/* Ports of the host that are forwarded, its files and programs: clones would share them. */
static bool keep_of_netdev(const char *key, const char *value)
{
	static const char *const out[] = { "hostfwd", "guestfwd", "tftp", "bootfile", "smb", "smbserver" };

	(void)value;
	return !IN(out, key);
}

static bool keep_of_machine(const char *key, const char *value)
{
	(void)value;
	return strcmp(key, "type") && strcmp(key, "memory-backend");
}

/* QEMU draws a new one. */
static bool keep_of_device(const char *key, const char *value)
{
	(void)value;
	return strcmp(key, "guid");
}

/* What QEMU takes if it is not told: the kernel's own source. */
static bool keep_of_object(const char *key, const char *value)
{
	return strcmp(key, "filename") || (strcmp(value, "/dev/urandom") && strcmp(value, "/dev/random"));
}

static bool keep_of_chardev(const char *key, const char *value)
{
	(void)value;
	return !strcmp(key, "id") || !strcmp(key, "mux") || !strcmp(key, "signal");
}

/* A socket that QEMU listens at moves into the run directory; nobody shall write a log or wait for a peer. */
static int change_chardev(struct props *props)
{
	const char *backend = props_get(props, "backend"), *path = props_get(props, "path");
	const char *server = props_get(props, "server"), *kind = "null";
	struct props changed = { 0 };
	int r;

	if (backend && !strcmp(backend, "stdio"))
		kind = "stdio";
	else if (backend && !strcmp(backend, "socket") && path && server && !strcmp(server, "on"))
		kind = "socket";
	r = props_add(&changed, "backend", kind);
	if (!r)
		r = filter(props, keep_of_chardev);
	for (size_t i = 0; !r && i < props->count; i++)
		r = props_add(&changed, props->items[i].key, props->items[i].value);
	props_clear(props);
	*props = changed;
	return r;
}

/* "ICH9-LPC.disable_s3=1" */
static int change_global(struct props *props)
{
	struct props changed = { 0 };
	char driver[64];
	const char *dot = props->count == 1 ? strchr(props->items[0].key, '.') : NULL;
	int r;

	if (!dot)
		return 0;
	snprintf(driver, sizeof driver, "%.*s", (int)(dot - props->items[0].key), props->items[0].key);
	r = props_add(&changed, "driver", driver);
	if (!r)
		r = props_add(&changed, "property", dot + 1);
	if (!r)
		r = props_add(&changed, "value", props->items[0].value);
	props_clear(props);
	*props = changed;
	return r;
}

/* A port that went to a file, a terminal or the network goes nowhere. */
static int change_port(struct props *props)
{
	struct props changed = { 0 };
	int r = has_form(props_get(props, RAW), PORT) ? 0 : props_add(&changed, RAW, "null");

	if (changed.count) {
		props_clear(props);
		*props = changed;
	}
	return r;
}

static int change(struct machine_option *o)
{
	static const struct {
		const char *option;
		bool (*keep)(const char *key, const char *value);
	} filters[] = { { "drive", keep_of_drive }, { "blockdev", keep_of_drive }, { "netdev", keep_of_netdev },
			{ "nic", keep_of_netdev }, { "machine", keep_of_machine }, { "device", keep_of_device },
			{ "object", keep_of_object } };

	for (size_t i = 0; i < sizeof filters / sizeof filters[0]; i++)
		if (!strcmp(o->name, filters[i].option))
			return filter(&o->props, filters[i].keep);
	if (!strcmp(o->name, "chardev"))
		return change_chardev(&o->props);
	if (!strcmp(o->name, "global"))
		return change_global(&o->props);
	if (!strcmp(o->name, "serial") || !strcmp(o->name, "parallel"))
		return change_port(&o->props);
	return 0;
}

static int take_option(struct machine *m, const char *option, const char *value, char *why)
{
	struct machine_option o = { 0 };
	const struct rule *rule;
	int r = 0;

	if (is_left_out(option))
		return 0;
	snprintf(o.name, sizeof o.name, "%s", !strcmp(option, "M") ? "machine" : option);
	rule = find_rule(o.name);
	if (!rule)
		return refuse(why, -ENOTSUP, "-%.40s%s%.80s cannot be described", option, *value ? " " : "", value);
	if (rule->implied && !strcmp(rule->implied, RAW))
		r = props_add(&o.props, RAW, value);
	else if (rule->keys)
		r = props_parse(&o.props, value, rule->implied);
	if (!r)
		r = change(&o);
	if (r || (rule->keys && !o.props.count)) { /* -machine pc: the type alone */
		props_clear(&o.props);
		return r == -EINVAL ? refuse(why, -ENOTSUP, "-%.24s %.80s cannot be read", option, value) : r;
	}
	return add(m, &o, why);
}

static int copy_props(const struct props *from, struct props *to)
{
	int r = 0;

	for (size_t i = 0; !r && i < from->count; i++)
		r = props_add(to, from->items[i].key, from->items[i].value);
	return r;
}

/* A disk of the snapshot, or a drive with nothing in it. */
static int take_drive(struct machine *m, const struct drive_word *w, const char *option, char *why)
{
	const char *file = props_get(&w->props, "file"), *id = props_get(&w->props, "id");
	struct machine_option o = { 0 };
	int r;

	if (w->role == DRIVE_BENEATH)
		return 0;
	if (!id)
		id = props_get(&w->props, "node-name");
	if (w->role == DRIVE_OTHER && (file || !strcmp(option, "-blockdev")))
		return refuse(why, -ENOTSUP, "%s %.60s cannot be described: it is no disk of the snapshot",
			      option[0] == '-' ? option : "-drive", id ? id : file ? file : "");
	snprintf(o.name, sizeof o.name, "%s", strcmp(option, "-blockdev") ? "drive" : "blockdev");
	r = copy_props(&w->props, &o.props);
	if (!r)
		r = change(&o);
	if (r) {
		props_clear(&o.props);
		return r;
	}
	return add(m, &o, why);
}

static int take_words(struct machine *m, int argc, const char *const *argv, const struct drive_line *drives, char *why)
{
	int r = 0;

	for (int i = 1; !r && i < argc; i++) {
		const char *option = argv[i] + (argv[i][0] == '-') + (argv[i][0] == '-' && argv[i][1] == '-');
		const char *value = "";

		if (drives->word[i].words) {
			r = take_drive(m, &drives->word[i], argv[i], why);
			i += drives->word[i].words - 1;
			continue;
		}
		if (props_option_has_value(option) && i + 1 < argc)
			value = argv[++i];
		r = take_option(m, option, value, why);
	}
	return r;
}

int machine_from_argv(int argc, const char *const *argv, const char *type, const char *const *saved,
		      unsigned saved_count, struct machine **ret_machine, char why[MACHINE_WHY_BYTES])
{
	struct machine *m = calloc(1, sizeof *m);
	struct drive_line drives = { 0 };
	int r = m ? drives_find(argc, argv, saved, saved_count, &drives) : -ENOMEM;

	if (!r && !has_form(type, NAME))
		r = refuse(why, -ENOTSUP, "the machine type %.60s cannot be described", type);
	if (!r) {
		snprintf(m->type, sizeof m->type, "%s", type);
		r = take_words(m, argc, argv, &drives, why);
	}
	drives_free(&drives);
	if (r == -ENOMEM)
		refuse(why, r, "there was no memory to describe it");
	if (r)
		machine_free(m);
	else
		*ret_machine = m;
	return r;
}

/* ---- JSON --------------------------------------------------------------------------------------- */

struct json_object *machine_to_json(const struct machine *m)
{
	struct json_object *json = json_object_new_object(), *options = json_object_new_array();

	json_object_object_add(json, "type", json_object_new_string(m->type));
	for (size_t i = 0; i < m->count; i++) {
		struct json_object *one = json_object_new_object(), *props = json_object_new_array();
		const struct machine_option *o = &m->option[i];

		json_object_object_add(one, "option", json_object_new_string(o->name));
		for (size_t j = 0; j < o->props.count; j++) {
			struct json_object *pair = json_object_new_array();

			json_object_array_add(pair, json_object_new_string(o->props.items[j].key));
			json_object_array_add(pair, json_object_new_string(o->props.items[j].value));
			json_object_array_add(props, pair);
		}
		if (o->props.count)
			json_object_object_add(one, "properties", props);
		else
			json_object_put(props);
		json_object_array_add(options, one);
	}
	json_object_object_add(json, "options", options);
	return json;
}

/* NULL: it is no text, or has a zero in it. */
static const char *text_of(struct json_object *json)
{
	const char *text = json_object_is_type(json, json_type_string) ? json_object_get_string(json) : NULL;

	return text && strlen(text) == (size_t)json_object_get_string_len(json) ? text : NULL;
}

static int take_pair(struct json_object *pair, struct props *props)
{
	const char *key = NULL, *value = NULL;

	if (json_object_is_type(pair, json_type_array) && json_object_array_length(pair) == 2) {
		key = text_of(json_object_array_get_idx(pair, 0));
		value = text_of(json_object_array_get_idx(pair, 1));
	}
	return key && value ? props_add(props, key, value) : -EBADMSG;
}

static int take_json(struct machine *m, struct json_object *json, char *why)
{
	struct json_object *name = NULL, *props = NULL;
	struct machine_option o = { 0 };
	const char *option;
	size_t count;
	int r = 0;

	json_object_object_get_ex(json, "option", &name);
	json_object_object_get_ex(json, "properties", &props);
	option = text_of(name);
	count = json_object_is_type(props, json_type_array) ? json_object_array_length(props) : 0;
	if (!option || strlen(option) >= sizeof o.name || (props && !count) || count > MACHINE_PROPS)
		return refuse(why, -EBADMSG, "\"machine\" has an option that is none");
	snprintf(o.name, sizeof o.name, "%s", option);
	for (size_t i = 0; !r && i < count; i++)
		r = take_pair(json_object_array_get_idx(props, i), &o.props);
	if (r) {
		props_clear(&o.props);
		return r == -EBADMSG ? refuse(why, r, "\"machine\" has a property that is none") : r;
	}
	return add(m, &o, why) ? -EBADMSG : 0;
}

int machine_from_json(struct json_object *json, struct machine **ret_machine, char why[MACHINE_WHY_BYTES])
{
	struct machine *m = calloc(1, sizeof *m);
	struct json_object *type = NULL, *options = NULL;
	int r = m ? 0 : -ENOMEM;

	if (!m)
		return refuse(why, r, "no memory");
	if (!json_object_object_get_ex(json, "type", &type) || !text_of(type) || !has_form(text_of(type), NAME) ||
	    !json_object_object_get_ex(json, "options", &options) || !json_object_is_type(options, json_type_array))
		r = refuse(why, -EBADMSG, "\"machine\" has no type, or no options");
	else
		snprintf(m->type, sizeof m->type, "%s", text_of(type));
	for (size_t i = 0; !r && i < json_object_array_length(options); i++)
		r = take_json(m, json_object_array_get_idx(options, i), why);
	if (r)
		machine_free(m);
	else
		*ret_machine = m;
	return r;
}

/* ---- to a command line -------------------------------------------------------------------------- */

struct words {
	char **argv;
	int argc, room;
	bool failed;
};

static void push(struct words *w, const char *prefix, const char *text)
{
	if (w->failed || w->argc + 1 >= w->room || asprintf(&w->argv[w->argc], "%s%s", prefix, text) < 0)
		w->failed = true;
	else
		w->argc++;
	if (w->argv)
		w->argv[w->argc] = NULL;
}

/* A socket is the VM's own: in its run directory, which is not known yet. */
static void push_props(struct words *w, const struct machine_option *o, const struct rule *rule)
{
	const char *backend = props_get(&o->props, "backend"), *id = props_get(&o->props, "id");
	char *text = NULL;
	size_t bytes = 0;
	FILE *out = open_memstream(&text, &bytes);

	if (!out) {
		w->failed = true;
		return;
	}
	for (size_t i = 0; i < o->props.count; i++) {
		const struct prop *p = &o->props.items[i];

		if (rule->implied && !strcmp(p->key, rule->implied))
			fprintf(out, "%s%s", i ? "," : "", p->value);
		else
			fprintf(out, "%s%s=%s", i ? "," : "", p->key, p->value);
	}
	if (backend && !strcmp(backend, "socket"))
		fprintf(out, ",path={run}/%s.sock,server=on,wait=off", id ? id : "chardev");
	if (!strcmp(props_get(&o->props, "driver") ? props_get(&o->props, "driver") : "", "vmgenid"))
		fprintf(out, ",guid=auto");
	if (fclose(out) || !text)
		w->failed = true;
	else
		push(w, "", text);
	free(text);
}

int machine_to_argv(const struct machine *m, int *ret_argc, char ***ret_argv)
{
	struct words w = { .room = (int)(2 * m->count) + 16 };

	w.argv = calloc((size_t)w.room, sizeof *w.argv);
	w.failed = !w.argv;
	push(&w, "", VMM);
	push(&w, "", "-name");
	push(&w, "", "{name}");
	push(&w, "", "-machine");
	push(&w, "", m->type);
	push(&w, "", "-display");
	push(&w, "", "none");
	for (size_t i = 0; i < m->count; i++) {
		const struct rule *rule = find_rule(m->option[i].name);

		push(&w, "-", m->option[i].name);
		if (rule && rule->keys)
			push_props(&w, &m->option[i], rule);
	}
	if (w.failed) {
		machine_free_argv(w.argv);
		return -ENOMEM;
	}
	*ret_argc = w.argc;
	*ret_argv = w.argv;
	return 0;
}

void machine_free_argv(char **argv)
{
	for (size_t i = 0; argv && argv[i]; i++)
		free(argv[i]);
	free(argv);
}
