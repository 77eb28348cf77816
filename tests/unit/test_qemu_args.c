/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* QEMU's command line: the sizes are those that QEMU 7.2 itself was asked for. */
#include "cli/qemu_args.h"

#include "cli/qcow2.h"
#include "vmdir/compat.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <endian.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MIB (1ull << 20)

/* What -readconfig finds, whatever the file's name; NULL: nothing. */
static const char *config_text;
static char why[QEMU_ARGS_WHY_BYTES];

static char *read_config(void *ctx, const char *path)
{
	(void)ctx;
	(void)path;
	return config_text ? strdup(config_text) : NULL;
}

static int plan_words(struct qemu_plan *plan, const char *const *words)
{
	int count = 0;

	while (words[count])
		count++;
	memset(why, 0, sizeof why);
	return qemu_args_plan(count, words, read_config, NULL, plan, why);
}

#define WORDS(...) ((const char *const[]){ "qemu-system-x86_64", __VA_ARGS__, NULL })

static struct qemu_plan accepted(const char *const *words)
{
	struct qemu_plan plan;

	if (plan_words(&plan, words))
		fail_msg("refused: %s", why);
	return plan;
}

/* The reason has to name what it is about; the plan must stay as it was. */
static void assert_refused(const char *const *words, const char *names)
{
	struct qemu_plan plan, before;

	memset(&plan, 0x5a, sizeof plan);
	before = plan;
	assert_int_equal(plan_words(&plan, words), -EINVAL);
	assert_memory_equal(&plan, &before, sizeof plan);
	if (!strstr(why, names))
		fail_msg("'%s' does not name %s", why, names);
	assert_true(why[strlen(why) - 1] != '.');
}

static void assert_excluded(const char *const *words, unsigned excludes, const char *begins)
{
	struct qemu_plan plan = accepted(words);

	assert_int_equal(plan.excludes, excludes);
	if (strncmp(plan.excluded_by, begins, strlen(begins)))
		fail_msg("'%s' does not begin with '%s'", plan.excluded_by, begins);
}

static void assert_fine(const char *const *words)
{
	struct qemu_plan plan = accepted(words);

	assert_int_equal(plan.excludes, 0);
	assert_string_equal(plan.excluded_by, "");
}

static void sizes(void **state)
{
	static const struct {
		const char *m;
		uint64_t bytes;
	} known[] = {
		{ "512", 512 * MIB },
		{ "2G", 2048 * MIB },
		{ "1.5G", 1536 * MIB },
		{ "size=2048M", 2048 * MIB },
		{ "2G,slots=2,maxmem=8G", 2048 * MIB },
		{ "slots=2,maxmem=8G,size=1G", 1024 * MIB },
		{ "100k", 106496 },
		{ "100K", 106496 },
		{ "8193b", 16384 },
		{ "0x20", 32 * MIB },
		{ "0x20M", 32 * MIB },
		{ "0x2f", 8192 },
		{ "1T", 1ull << 40 },
		{ "1.7k", 8192 },
		{ "5.M", 5 * MIB },
		{ "5.", 8192 },
		{ "1.0", 1 * MIB },
		{ "+5", 5 * MIB },
		{ " 5", 5 * MIB },
		{ "64m,size=96M", 96 * MIB },
		{ "0", 128 * MIB },
		{ "", 128 * MIB },
		{ "slots=1,maxmem=1G", 128 * MIB },
		{ "6144", 6144 * MIB },
		{ "1P", 1ull << 50 },
	};

	(void)state;
	for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
		struct qemu_plan plan = accepted(WORDS("-m", known[i].m));

		if (plan.ram_bytes != known[i].bytes)
			fail_msg("-m %s: %ju", known[i].m, (uintmax_t)plan.ram_bytes);
	}
}

static void wrong_sizes(void **state)
{
	static const char *const wrong[] = { "1.5", "1e3",      "1.5e1M", ".5G", "-1",
					     "abc", "12Q",      "1GB",    "16E", "99999999999999999999",
					     "0x",  "size=1.5", "8E" };

	(void)state;
	for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++)
		assert_refused(WORDS("-m", wrong[i]), "RAM");
}

static void size_from_several_places(void **state)
{
	(void)state;
	assert_int_equal(accepted(WORDS("-S")).ram_bytes, 128 * MIB);
	assert_int_equal(accepted(WORDS("--m", "1G")).ram_bytes, 1024 * MIB);
	assert_int_equal(accepted(WORDS("-m", "1G", "-m", "slots=2,maxmem=8G")).ram_bytes, 1024 * MIB);
	assert_int_equal(accepted(WORDS("-m", "1G", "-m", "2G")).ram_bytes, 2048 * MIB);
	assert_int_equal(accepted(WORDS("-M", "q35,memory.size=256M")).ram_bytes, 256 * MIB);
	assert_int_equal(accepted(WORDS("-m", "512", "-machine", "memory.size=256M")).ram_bytes,
			 512 * MIB);
	/* The value of another option, and an option after a missing value. */
	assert_int_equal(accepted(WORDS("-append", "-m", "-m", "256")).ram_bytes, 256 * MIB);
	assert_int_equal(accepted(WORDS("-nographic", "-m", "256")).ram_bytes, 256 * MIB);
	assert_int_equal(accepted(WORDS("disk.img", "-m", "256")).ram_bytes, 256 * MIB);
	assert_int_equal(accepted(WORDS("-m")).ram_bytes, 128 * MIB);
}

static void block_names(void **state)
{
	(void)state;
	assert_string_equal(accepted(WORDS("-S")).block_name, "pc.ram");
	assert_string_equal(accepted(WORDS("-M", "q35")).block_name, "pc.ram");
	assert_string_equal(accepted(WORDS("-M", "microvm")).block_name, "microvm.ram");
	assert_string_equal(accepted(WORDS("-machine", "type=microvm,accel=kvm")).block_name,
			    "microvm.ram");
	assert_string_equal(accepted(WORDS("-M", "microvm", "-M", "accel=tcg")).block_name,
			    "microvm.ram");
	assert_string_equal(accepted(WORDS("-M", "microvm", "-M", "pc")).block_name, "pc.ram");
}

static void guest_names(void **state)
{
	(void)state;
	assert_string_equal(accepted(WORDS("-S")).guest_name, "");
	assert_string_equal(accepted(WORDS("-name", "db1")).guest_name, "db1");
	assert_string_equal(accepted(WORDS("-name", "guest=db1,debug-threads=on")).guest_name, "db1");
	assert_string_equal(accepted(WORDS("-name", "db1,process=x")).guest_name, "db1");
	assert_string_equal(accepted(WORDS("-name", "a,,b")).guest_name, "a,b");
}

static void memory_of_the_users_own(void **state)
{
	(void)state;
	assert_refused(WORDS("-object", "memory-backend-ram,id=m,size=1G", "-M", "q35,memory-backend=m"),
		       "memory-backend=m");
	assert_refused(WORDS("-machine", "pc", "-machine", "memory-backend=m"), "memory-backend=m");
	assert_refused(WORDS("-numa", "node,memdev=m0"), "memdev=m0");
	assert_refused(WORDS("-mem-path", "/dev/hugepages"), "-mem-path");
	assert_refused(WORDS("--mem-prealloc"), "-mem-prealloc");
	assert_refused(WORDS("-object", "memory-backend-ram,id=pc.ram,size=1G"), "pc.ram");
	assert_refused(WORDS("-object", "{\"qom-type\":\"memory-backend-ram\",\"id\":\"pc.ram\"}"),
		       "pc.ram");
	/* Not guest RAM: for a DIMM, or shared between VMs. */
	assert_fine(
		WORDS("-object", "memory-backend-ram,id=d1,size=1G", "-device", "pc-dimm,memdev=d1"));
	assert_fine(WORDS("-numa", "node,nodeid=0", "-numa", "dist,src=0,dst=1,val=20"));
}

static void devices(void **state)
{
	const unsigned both = COMPAT_OVERLAYS | COMPAT_MASKS;

	(void)state;
	assert_fine(WORDS("-device", "virtio-blk-pci,drive=d", "-netdev", "tap,id=n,vhost=on", "-device",
			  "nvme,serial=1", "-chardev", "socket,id=c,path=/x", "-device",
			  "virtio-balloon"));
	assert_excluded(WORDS("-device", "vfio-pci,host=01:00.0"), both, "vfio-pci: ");
	assert_excluded(WORDS("-device", "{\"driver\":\"vfio-pci\",\"host\":\"0000:01:00.0\"}"), both,
			"vfio-pci: ");
	assert_excluded(WORDS("-device", "driver=vhost-user-fs-pci,chardev=c"), COMPAT_OVERLAYS,
			"vhost-user-fs-pci: ");
	assert_string_equal(accepted(WORDS("-drive", "file=a,aio=native")).aio, "native");
	assert_string_equal(accepted(WORDS("-drive", "file=a,aio=threads")).aio, "");
	assert_string_equal(accepted(WORDS("-blockdev", "driver=qcow2,node-name=n,file.driver=file,file.aio=io_uring")).aio,
			    "io_uring");
	assert_excluded(WORDS("-fsdev", "local,id=f,path=/srv,security_model=none"), COMPAT_OVERLAYS, "virtio-9p: ");
	assert_excluded(WORDS("-virtfs", "local,path=/srv,mount_tag=t,security_model=none"), COMPAT_OVERLAYS,
			"virtio-9p: ");
	assert_excluded(WORDS("-netdev", "vhost-user,id=n,chardev=c"), COMPAT_OVERLAYS, "vhost-user: ");
	assert_excluded(WORDS("-netdev", "type=vhost-vdpa,id=n"), both, "vhost-vdpa: ");
	assert_excluded(WORDS("-nic", "vhost-user,chardev=c"), COMPAT_OVERLAYS, "vhost-user: ");
	assert_excluded(WORDS("-device", "pvrdma"), both, "pvrdma: ");
	assert_excluded(WORDS("-incoming", "rdma:host:4444"), both, "rdma: ");
	assert_fine(WORDS("-incoming", "tcp:host:4444"));
	assert_fine(WORDS("-incoming", "defer"));
	/* Two of them: the first is named, the exclusions add up. */
	assert_excluded(WORDS("-device", "vhost-user-blk-pci", "-device", "vfio-pci"), both,
			"vhost-user-blk-pci: ");
}

static void properties(void **state)
{
	const unsigned both = COMPAT_OVERLAYS | COMPAT_MASKS;

	(void)state;
	assert_excluded(WORDS("-device", "virtio-gpu-pci,blob=true"), COMPAT_OVERLAYS, "blob: ");
	assert_excluded(WORDS("-device", "virtio-vga-gl,blob"), COMPAT_OVERLAYS, "blob: ");
	assert_excluded(WORDS("-device", "{\"driver\":\"virtio-vga\",\"blob\":true}"), COMPAT_OVERLAYS,
			"blob: ");
	assert_excluded(WORDS("-global", "virtio-gpu-pci.blob=on"), COMPAT_OVERLAYS, "blob: ");
	assert_excluded(WORDS("-global", "driver=virtio-gpu-device,property=blob,value=on"),
			COMPAT_OVERLAYS, "blob: ");
	assert_fine(WORDS("-device", "virtio-gpu-pci,blob=off"));
	assert_fine(WORDS("-device", "virtio-gpu-pci,noblob"));
	assert_fine(WORDS("-device", "virtio-gpu-pci", "-global", "PIIX4_PM.disable_s3=0"));
	assert_excluded(WORDS("-overcommit", "mem-lock=on"), both, "mem-lock: ");
	assert_excluded(WORDS("-overcommit", "cpu-pm=on,mem-lock"), both, "mem-lock: ");
	assert_fine(WORDS("-overcommit", "mem-lock=off"));
	assert_fine(WORDS("-overcommit", "cpu-pm=on"));
	assert_excluded(WORDS("-M", "q35,confidential-guest-support=sev0"), both,
			"confidential-guest-support: ");
	assert_excluded(WORDS("-machine", "memory-encryption=sev0"), both, "memory-encryption: ");
	assert_excluded(WORDS("-object", "sev-guest,id=sev0"), both, "sev-guest: ");
	assert_excluded(WORDS("-object", "{\"qom-type\":\"tdx-guest\",\"id\":\"t\"}"), both,
			"tdx-guest: ");
	assert_excluded(WORDS("-M", "x-remote,vfio-user=on"), COMPAT_OVERLAYS, "x-remote: ");
}

static void block_drivers(void **state)
{
	const unsigned both = COMPAT_OVERLAYS | COMPAT_MASKS;

	(void)state;
	assert_fine(WORDS("-drive", "file=/images/nvme.qcow2,if=virtio", "-hda", "nvme.img", "a:b.img"));
	assert_excluded(WORDS("-drive", "file=nvme://0000:01:00.0/1,if=none"), both, "nvme: ");
	assert_excluded(WORDS("-hda", "nvme://0000:01:00.0/1"), both, "nvme: ");
	assert_excluded(WORDS("-blockdev", "driver=nvme,device=0000:01:00.0,namespace=1,node-name=n"),
			both, "nvme: ");
	assert_excluded(WORDS("-blockdev", "{\"driver\":\"qcow2\",\"file\":{\"driver\":\"nvme\"}}"),
			both, "nvme: ");
	assert_excluded(WORDS("-blockdev", "{\"driver\":\"quorum\",\"children\":[{\"driver\":\"file\"},"
					   "{\"driver\":\"nvme\"}]}"),
			both, "nvme: ");
}

static void config_files(void **state)
{
	(void)state;
	config_text =
		"# comment\n[memory]\n  size = \"1G\"\n\n[device \"gpu\"]\n  driver = \"vfio-pci\"\n"
		"[name]\n  guest = \"db1\"\n[machine]\n  type = \"microvm\"\n";
	assert_excluded(WORDS("-readconfig", "f"), COMPAT_OVERLAYS | COMPAT_MASKS, "vfio-pci: ");
	assert_int_equal(accepted(WORDS("-readconfig", "f")).ram_bytes, 1024 * MIB);
	assert_string_equal(accepted(WORDS("-readconfig", "f")).guest_name, "db1");
	assert_string_equal(accepted(WORDS("-readconfig", "f")).block_name, "microvm.ram");
	assert_int_equal(accepted(WORDS("-readconfig", "f", "-m", "2G")).ram_bytes, 2048 * MIB);

	config_text = "[object \"pc.ram\"]\n  qom-type = \"memory-backend-ram\"";
	assert_refused(WORDS("-readconfig", "f"), "pc.ram");
	config_text = "[machine]\n  memory-backend = \"m\"\n";
	assert_refused(WORDS("-readconfig", "f"), "memory-backend=m");
	config_text = "[unknown \"x\"]\n  size = \"1G\"\n no equals \n[\n]\n[memory";
	assert_int_equal(accepted(WORDS("-readconfig", "f")).ram_bytes, 128 * MIB);
	config_text = NULL;
	assert_refused(WORDS("-readconfig", "/nowhere"), "/nowhere");
}

/* A qcow2 header that names a backing file at `offset`, and that name. */
static void write_image(const char *path, const char *backing, uint64_t offset, uint32_t bytes)
{
	struct qcow2_header header = { .magic = htobe32(QCOW2_MAGIC), .version = htobe32(3),
				       .backing_offset = htobe64(offset), .backing_bytes = htobe32(bytes) };
	FILE *file = fopen(path, "w");

	assert_non_null(file);
	assert_int_equal(fwrite(&header, sizeof header, 1, file), 1);
	assert_int_equal(fseek(file, 512, SEEK_SET), 0);
	assert_true(fputs(backing, file) >= 0);
	assert_int_equal(fclose(file), 0);
}

static void name_image(const char *path, const char *backing) { write_image(path, backing, 512, (uint32_t)strlen(backing)); }

static struct qemu_plan plan_drive(const char *format)
{
	char value[64];

	snprintf(value, sizeof value, format, "top");
	return accepted(WORDS("-drive", value));
}

static void missing_images(void **state)
{
	char directory[] = "/tmp/latent-args-XXXXXX";

	(void)state;
	assert_non_null(mkdtemp(directory));
	assert_int_equal(chdir(directory), 0);
	assert_string_equal(plan_drive("file=%s").missing, "top");
	assert_string_equal(plan_drive("file=%s").missing_of, "");
	assert_int_equal(mkdir("below", 0700), 0);
	name_image("top", "below/middle");
	assert_string_equal(plan_drive("file=%s").missing, "below/middle");
	assert_string_equal(plan_drive("file=%s").missing_of, "top");
	name_image("below/middle", "base"); /* beside the image that names it */
	assert_string_equal(plan_drive("file=%s,format=qcow2").missing, "below/base");
	assert_string_equal(plan_drive("file=%s,format=qcow2").missing_of, "below/middle");
	assert_string_equal(plan_drive("file=%s,format=raw").missing, "");
	assert_string_equal(plan_drive("file=%s,backing.file.filename=below/middle").missing, "");
	assert_string_equal(accepted(WORDS("-blockdev", "driver=file,node-name=a,filename=below/base")).missing,
			    "below/base");
	assert_string_equal(accepted(WORDS("-blockdev", "driver=file,node-name=a,filename=top")).missing, "");
	name_image("below/middle", "nbd://host/disk");
	assert_string_equal(plan_drive("file=%s").missing, "");
	name_image("below/middle", "../top"); /* a circle */
	assert_string_equal(plan_drive("file=%s").missing, "");
	write_image("top", "x", 512, 2000);
	assert_string_equal(plan_drive("file=%s").missing, "");
	write_image("top", "x", 512, 2);
	assert_string_equal(plan_drive("file=%s").missing, "");
	write_image("top", "x", UINT64_MAX, 1);
	assert_string_equal(plan_drive("file=%s").missing, "");
	assert_int_equal(unlink("top") | unlink("below/middle") | rmdir("below") | chdir("/") | rmdir(directory), 0);
}

/* What is wrong for QEMU too is left to QEMU. */
static void left_to_qemu(void **state)
{
	(void)state;
	assert_fine(WORDS("-device", "{not json"));
	assert_fine(WORDS("-device", "{\"driver\":7}"));
	assert_fine(WORDS("-device", ""));
	assert_fine(WORDS("-object", "", "-netdev", "", "-global", "", "-name", ""));
	assert_fine(WORDS("-no-such-option", "value"));
	assert_fine(WORDS("-", "--"));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(sizes),
		cmocka_unit_test(wrong_sizes),
		cmocka_unit_test(size_from_several_places),
		cmocka_unit_test(block_names),
		cmocka_unit_test(guest_names),
		cmocka_unit_test(memory_of_the_users_own),
		cmocka_unit_test(devices),
		cmocka_unit_test(properties),
		cmocka_unit_test(block_drivers),
		cmocka_unit_test(config_files),
		cmocka_unit_test(missing_images),
		cmocka_unit_test(left_to_qemu),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
