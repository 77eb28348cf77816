/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* A command line in allow-listed fields and back, and QEMU's own names of drives. */
#include "snapshot/drives.h"
#include "snapshot/machine.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WORDS(...) ((const char *const[]){ "qemu-system-x86_64", __VA_ARGS__, NULL })

static char why[MACHINE_WHY_BYTES];

static int count(const char *const *words)
{
	int n = 0;

	while (words[n])
		n++;
	return n;
}

/* Through JSON, as a snapshot keeps it; joined with blanks. NULL: refused. To be freed. */
static char *round_trip(const char *const *words, const char *saved)
{
	struct machine *m = NULL, *again = NULL;
	struct json_object *json, *copy;
	char *line = calloc(1, 8192), **argv;
	int argc;

	why[0] = '\0';
	if (machine_from_argv(count(words), words, "pc-q35-7.2", &saved, saved ? 1 : 0, &m, why)) {
		free(line);
		return NULL;
	}
	json = machine_to_json(m);
	copy = json_tokener_parse(json_object_to_json_string(json));
	assert_int_equal(machine_from_json(copy, &again, why), 0);
	assert_int_equal(machine_to_argv(again, &argc, &argv), 0);
	for (int i = 0; i < argc; i++)
		sprintf(line + strlen(line), "%s%s", i ? " " : "", argv[i]);
	assert_null(argv[argc]);
	machine_free_argv(argv);
	json_object_put(json);
	json_object_put(copy);
	machine_free(m);
	machine_free(again);
	return line;
}

static void becomes(const char *const *words, const char *saved, const char *expected)
{
	char *line = round_trip(words, saved);

	if (!line)
		fail_msg("refused: %s", why);
	if (strncmp(line, "qemu-system-x86_64 -name {name} -machine pc-q35-7.2 -display none ", 66))
		fail_msg("begins with %s", line);
	assert_string_equal(line + 66, expected);
	free(line);
}

static void is_refused(const char *const *words, const char *saved, const char *with)
{
	assert_null(round_trip(words, saved));
	if (!strstr(why, with))
		fail_msg("'%s' does not name '%s'", why, with);
}

static void test_ordinary(void **state)
{
	(void)state;
	becomes(WORDS("-machine", "q35,usb=off", "-accel", "tcg", "-m", "1G", "-smp", "2", "-nodefaults",
		      "-drive", "file=/x/a.qcow2,if=none,id=root,format=qcow2,cache=none", "-device",
		      "virtio-blk-pci,drive=root", "-cpu", "EPYC,+svm"),
		"root",
		"-machine usb=off -accel tcg -m 1G -smp 2 -nodefaults -drive if=none,id=root,cache=none -device "
		"virtio-blk-pci,drive=root -cpu EPYC,+svm");
	becomes(WORDS("-M", "q35", "-device", "virtio-net-pci,netdev=n,mac=52:54:00:12:34:56,romfile=", "-netdev",
		      "user,id=n,hostfwd=tcp::2222-:22,net=10.0.2.0/24"),
		NULL, "-device virtio-net-pci,netdev=n,mac=52:54:00:12:34:56,romfile= -netdev user,id=n,net=10.0.2.0/24");
}

static void test_left_out(void **state)
{
	(void)state;
	becomes(WORDS("-kernel", "/vmlinuz", "-initrd", "/i", "-append", "root=/dev/vda", "-daemonize", "-pidfile", "/p",
		      "-qmp", "unix:/q,server=on", "-display", "gtk", "-vnc", ":1", "-m", "512"),
		NULL, "-m 512");
	becomes(WORDS("-object", "rng-random,id=r,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=r"), NULL,
		"-object rng-random,id=r -device virtio-rng-pci,rng=r");
	becomes(WORDS("-device", "vmgenid,guid=12345678-1234-1234-1234-123456789012"), NULL, "-device vmgenid,guid=auto");
}

static void test_chardevs(void **state)
{
	(void)state;
	becomes(WORDS("-chardev", "file,id=log,path=/var/log/x", "-serial", "chardev:log", "-chardev",
		      "socket,id=ga,path=/tmp/ga.sock,server=on,wait=off", "-chardev", "socket,id=out,path=/tmp/peer"),
		NULL, "-chardev null,id=log -serial chardev:log -chardev socket,id=ga,path={run}/ga.sock,server=on,wait=off "
		      "-chardev null,id=out");
	becomes(WORDS("-serial", "file:/var/log/x", "-serial", "mon:stdio"), NULL, "-serial null -serial mon:stdio");
}

static void test_refused(void **state)
{
	(void)state;
	is_refused(WORDS("-device", "vfio-pci,host=01:00.0"), NULL, "-device vfio-pci cannot be described");
	is_refused(WORDS("-netdev", "tap,id=n,script=/x"), NULL, "-netdev tap");
	is_refused(WORDS("-bios", "/x"), NULL, "-bios /x");
	is_refused(WORDS("-device", "virtio-net-pci,romfile=/x"), NULL, "romfile=/x");
	is_refused(WORDS("-device", "virtio-blk-pci,drive=/x"), NULL, "drive=/x");
	is_refused(WORDS("-object", "memory-backend-file,id=m,mem-path=/x"), NULL, "memory-backend-file");
	is_refused(WORDS("-drive", "file=/x,id=data,if=none"), "root", "data");
	is_refused(WORDS("-blockdev", "driver=file,node-name=f,filename=/x"), "root", "f");
	is_refused(WORDS("-global", "virtio-net-pci.romfile=x"), NULL, "virtio-net-pci");
	is_refused(WORDS("-readconfig", "/x"), NULL, "-readconfig");
	is_refused(WORDS("-fw_cfg", "name=opt/x,file=/x"), NULL, "-fw_cfg");
}

static void test_blockdev(void **state)
{
	(void)state;
	becomes(WORDS("-blockdev", "driver=file,node-name=f0,filename=/x", "-blockdev",
		      "{\"driver\": \"qcow2\", \"node-name\": \"d0\", \"file\": \"f0\", \"discard\": \"unmap\"}", "-device",
		      "virtio-blk-pci,drive=d0"),
		"d0", "-blockdev node-name=d0,discard=unmap -device virtio-blk-pci,drive=d0");
}

/* What comes from elsewhere is checked as what comes from a command line. */
static void test_hostile(void **state)
{
	static const char *const texts[] = {
		"{}",
		"{\"type\": \"../x\", \"options\": []}",
		"{\"type\": \"q35,firmware=x\", \"options\": []}",
		"{\"type\": \"pc\", \"options\": {}}",
		"{\"type\": \"pc\", \"options\": [7]}",
		"{\"type\": \"pc\", \"options\": [{\"option\": \"bios\", \"properties\": [[\"value\", \"x\"]]}]}",
		"{\"type\": \"pc\", \"options\": [{\"option\": \"nodefaults -bios x\"}]}",
		"{\"type\": \"pc\", \"options\": [{\"option\": \"nodefaults\", \"properties\": [[\"a\", \"b\"]]}]}",
		"{\"type\": \"pc\", \"options\": [{\"option\": \"serial\", \"properties\": [[\"value\", \"file:/x\"]]}]}",
		"{\"type\": \"pc\", \"options\": [{\"option\": \"serial\", \"properties\": [[\"value\", \"chardev:a,b\"]]}]}",
		"{\"type\": \"pc\", \"options\": [{\"option\": \"chardev\", \"properties\": [[\"backend\", \"file\"]]}]}",
		"{\"type\": \"pc\", \"options\": [{\"option\": \"chardev\", \"properties\": [[\"backend\", \"socket\"], [\"path\", \"x\"]]}]}",
		"{\"type\": \"pc\", \"options\": [{\"option\": \"drive\", \"properties\": [[\"file\", \"/etc/passwd\"]]}]}",
		"{\"type\": \"pc\", \"options\": [{\"option\": \"drive\", \"properties\": [[\"id\", \"a,file=/x\"]]}]}",
		"{\"type\": \"pc\", \"options\": [{\"option\": \"device\", \"properties\": [[\"driver\", \"vfio-pci\"]]}]}",
		"{\"type\": \"pc\", \"options\": [{\"option\": \"device\", \"properties\": [[\"driver\", \"e1000\"], [\"romfile\", \"x\"]]}]}",
		"{\"type\": \"pc\", \"options\": [{\"option\": \"netdev\", \"properties\": [[\"type\", \"user\"], [\"smb\", \"/\"]]}]}",
		"{\"type\": \"pc\", \"options\": [{\"option\": \"netdev\", \"properties\": [[\"type\", \"user\"], [\"id\", \"-x\"]]}]}",
		"{\"type\": \"pc\", \"options\": [{\"option\": \"nic\", \"properties\": [[\"type\", \"tap\"]]}]}",
		"{\"type\": \"pc\", \"options\": [{\"option\": \"cpu\", \"properties\": [[\"value\", \"max/x\"]]}]}",
		"{\"type\": \"pc\", \"options\": [{\"option\": \"cpu\", \"properties\": [[\"value\", \"a\\u0000/x\"]]}]}",
		"{\"type\": \"pc\", \"options\": [{\"option\": \"cpu\", \"properties\": [[\"value\"]]}]}",
	};

	(void)state;
	for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
		struct json_object *json = json_tokener_parse(texts[i]);
		struct machine *m = NULL;

		why[0] = '\0';
		assert_non_null(json);
		if (machine_from_json(json, &m, why) != -EBADMSG)
			fail_msg("believed: %s", texts[i]);
		assert_null(m);
		assert_true(why[0]);
		json_object_put(json);
	}
}

static int disk_of(const char *const *words, int word, const char *saved)
{
	struct drive_line line;
	int found;

	assert_int_equal(drives_find(count(words), words, &saved, 1, &line), 0);
	found = line.word[word].role == DRIVE_SAVED;
	drives_free(&line);
	return found;
}

/* As QEMU 7.2 answers query-block for these lines. */
static void test_names(void **state)
{
	(void)state;
	assert_true(disk_of(WORDS("-drive", "file=a"), 1, "ide0-hd0"));
	assert_true(disk_of(WORDS("-hda", "a", "-hdb", "b"), 3, "ide0-hd1"));
	assert_true(disk_of(WORDS("-M", "q35", "-hda", "a", "-hdb", "b"), 5, "ide1-hd0"));
	assert_true(disk_of(WORDS("-drive", "file=a", "-drive", "file=b", "-drive", "file=c"), 5, "ide1-hd0"));
	assert_true(disk_of(WORDS("-cdrom", "a"), 1, "ide1-cd0"));
	assert_true(disk_of(WORDS("a.img"), 1, "ide0-hd0"));
	assert_true(disk_of(WORDS("-drive", "if=virtio,file=a", "-drive", "if=virtio,file=b"), 3, "virtio1"));
	assert_true(disk_of(WORDS("-drive", "if=none,file=a,id=x", "-drive", "if=none,file=b"), 3, "none1"));
	assert_true(disk_of(WORDS("-drive", "if=scsi,index=8,file=a"), 1, "scsi1-hd1"));
	assert_true(disk_of(WORDS("-snapshot", "-drive", "file=a,id=mine"), 2, "mine"));
	assert_false(disk_of(WORDS("-drive", "file=a,id=mine"), 1, "ide0-hd0"));
	assert_false(disk_of(WORDS("-name", "-drive", "-m", "file=a"), 2, "ide0-hd0"));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_ordinary), cmocka_unit_test(test_left_out), cmocka_unit_test(test_chardevs),
		cmocka_unit_test(test_refused),	 cmocka_unit_test(test_blockdev), cmocka_unit_test(test_hostile),
		cmocka_unit_test(test_names),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
