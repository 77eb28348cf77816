/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* The run-time directory: who may have a name, who lives, and what is left behind. */
#include "vmdir/vmdir.h"

#include "vmdir/compat.h"
#include "vmdir/stats.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static char parent[64], root[VMDIR_PATH_BYTES], why[VMDIR_WHY_BYTES];

static int set_up(void **state)
{
	char chosen[80];

	(void)state;
	snprintf(parent, sizeof parent, "/tmp/test_vmdir.XXXXXX");
	if (!mkdtemp(parent))
		return -1;
	snprintf(chosen, sizeof chosen, "%s/run", parent);
	setenv("LATENT_RUNTIME_DIR", chosen, 1);
	return vmdir_root(true, root, why);
}

static int tear_down(void **state)
{
	char command[96];

	(void)state;
	snprintf(command, sizeof command, "rm -rf %s", parent);
	return system(command);
}

static const char *in_root(const char *name)
{
	static char path[VMDIR_PATH_BYTES + 64];

	snprintf(path, sizeof path, "%s/%s", root, name);
	return path;
}

static bool exists(const char *name)
{
	struct stat st;

	return !lstat(in_root(name), &st);
}

static void make_file(const char *name)
{
	int fd = open(in_root(name), O_WRONLY | O_CREAT, 0600);

	assert_true(fd >= 0);
	close(fd);
}

static struct vmdir claimed(const char *name)
{
	struct vmdir dir;

	if (vmdir_claim(root, name, &dir, why))
		fail_msg("%s", why);
	return dir;
}

static void names(void **state)
{
	char name[80];

	(void)state;
	assert_true(vmdir_name_ok("vm1"));
	assert_true(vmdir_name_ok("7"));
	assert_true(vmdir_name_ok("Web_1.example-a"));
	assert_true(vmdir_name_ok("volumes2"));
	assert_false(vmdir_name_ok(""));
	assert_false(vmdir_name_ok("volumes"));
	assert_false(vmdir_name_ok("."));
	assert_false(vmdir_name_ok(".."));
	assert_false(vmdir_name_ok(".lock"));
	assert_false(vmdir_name_ok("-vm"));
	assert_false(vmdir_name_ok("a/b"));
	assert_false(vmdir_name_ok("a b"));
	assert_false(vmdir_name_ok("a\n"));
	assert_false(vmdir_name_ok("\xc3\xa4"));
	memset(name, 'a', sizeof name);
	name[63] = 0;
	assert_true(vmdir_name_ok(name));
	name[63] = 'a';
	name[64] = 0;
	assert_false(vmdir_name_ok(name));
}

static void root_is_private(void **state)
{
	char other[VMDIR_PATH_BYTES];
	struct stat st;

	(void)state;
	assert_int_equal(stat(root, &st), 0);
	assert_int_equal(st.st_mode & 07777, 0700);
	assert_int_equal(stat(in_root(VMDIR_VOLUMES), &st), 0);
	assert_int_equal(st.st_mode & 07777, 0700);
	assert_int_equal(vmdir_root(true, other, why), 0);
	assert_string_equal(other, root);
}

static void assert_root_refused(int error, const char *reason)
{
	char other[VMDIR_PATH_BYTES] = "untouched";

	assert_int_equal(vmdir_root(true, other, why), error);
	assert_string_equal(other, "untouched");
	if (!strstr(why, reason))
		fail_msg("'%s' does not say '%s'", why, reason);
}

static void bad_roots_are_refused(void **state)
{
	char path[VMDIR_PATH_BYTES + 1];

	(void)state;
	assert_int_equal(chmod(root, 0755), 0);
	assert_root_refused(-EPERM, "chmod 700");
	assert_int_equal(chmod(root, 0700), 0);

	snprintf(path, sizeof path, "%s/link", parent);
	assert_int_equal(symlink(root, path), 0);
	setenv("LATENT_RUNTIME_DIR", path, 1);
	assert_root_refused(-ENOTDIR, "symbolic link");
	snprintf(path, sizeof path, "%s/none/run", parent);
	setenv("LATENT_RUNTIME_DIR", path, 1);
	assert_root_refused(-ENOENT, "above it");
	setenv("LATENT_RUNTIME_DIR", "run", 1);
	assert_root_refused(-EINVAL, "absolute");
	memset(path, 'x', sizeof path);
	path[0] = '/';
	path[VMDIR_PATH_BYTES] = 0;
	setenv("LATENT_RUNTIME_DIR", path, 1);
	assert_root_refused(-ENAMETOOLONG, "too long");
	if (!geteuid()) {
		assert_int_equal(chown(root, 65534, 65534), 0);
		setenv("LATENT_RUNTIME_DIR", root, 1);
		assert_root_refused(-EPERM, "belongs to user 65534");
	}
}

static void one_vm_per_name(void **state)
{
	struct vmdir dir = claimed("vm1"), second = { .lock_fd = 77 };
	struct stat st;

	(void)state;
	assert_string_equal(dir.path, in_root("vm1"));
	assert_int_equal(fstat(dir.stats_fd, &st), 0);
	assert_int_equal(st.st_size, sizeof(struct vm_stats));
	assert_int_equal(st.st_mode & 07777, 0600);
	assert_true(fcntl(dir.lock_fd, F_GETFD) & FD_CLOEXEC);
	assert_true(vmdir_is_live(root, "vm1"));
	assert_false(vmdir_is_live(root, "vm2"));

	assert_int_equal(vmdir_claim(root, "vm1", &second, why), -EEXIST);
	assert_int_equal(second.lock_fd, 77);
	assert_string_equal(why, "a VM named vm1 is running already: give another --name");
	assert_true(exists("vm1/stats")); /* the live one's are still there */

	vmdir_abandon(&dir);
	assert_false(exists("vm1"));
	assert_int_equal(dir.lock_fd, -1);
	vmdir_abandon(&dir); /* does nothing */
	dir = claimed("vm1");
	vmdir_abandon(&dir);
}

static void what_the_dead_left_is_replaced(void **state)
{
	struct vmdir dir = claimed("vm1");

	(void)state;
	make_file("vm1/old");
	close(dir.lock_fd); /* dies */
	close(dir.stats_fd);
	assert_false(vmdir_is_live(root, "vm1"));
	dir = claimed("vm1");
	assert_false(exists("vm1/old"));
	vmdir_abandon(&dir);

	/* A directory that died before it had a lock. */
	assert_int_equal(mkdir(in_root("vm2"), 0700), 0);
	dir = claimed("vm2");
	vmdir_abandon(&dir);
	assert_false(exists("vm2"));
}

/* As through -daemonize: the lock ends with the last process that has it. */
static void the_lock_is_inherited(void **state)
{
	struct vmdir dir = claimed("vm1");
	int ready[2];
	pid_t child;
	char byte;

	(void)state;
	assert_int_equal(pipe(ready), 0);
	child = fork();
	if (!child) {
		close(ready[1]);
		_exit(read(ready[0], &byte, 1) < 0);
	}
	assert_true(child > 0);
	close(dir.lock_fd);
	close(dir.stats_fd);
	assert_true(vmdir_is_live(root, "vm1"));
	close(ready[1]);
	assert_int_equal(waitpid(child, NULL, 0), child);
	assert_false(vmdir_is_live(root, "vm1"));
	close(ready[0]);
}

static int collect(void *ctx, const char *name)
{
	strcat(ctx, name);
	strcat(ctx, " ");
	return 0;
}

static int stop(void *ctx, const char *name)
{
	(void)ctx;
	(void)name;
	return -ECANCELED;
}

static void listing_cleans_up(void **state)
{
	struct vmdir b = claimed("b"), a = claimed("a"), dead = claimed("dead");
	char found[256] = "";

	(void)state;
	close(dead.lock_fd);
	close(dead.stats_fd);
	assert_int_equal(vmdir_for_each(root, collect, found), 0);
	assert_string_equal(found, "a b ");
	assert_false(exists("dead"));
	assert_true(exists(VMDIR_VOLUMES));
	assert_int_equal(vmdir_for_each(root, stop, NULL), -ECANCELED);
	vmdir_abandon(&a);
	vmdir_abandon(&b);
}

static void strangers_are_left_alone(void **state)
{
	struct vmdir dir;
	char target[VMDIR_PATH_BYTES];

	(void)state;
	/* A symbolic link in a VM's place must not be followed. */
	snprintf(target, sizeof target, "%s/elsewhere", parent);
	assert_int_equal(mkdir(target, 0700), 0);
	assert_int_equal(symlink(target, in_root("vm1")), 0);
	assert_int_equal(vmdir_claim(root, "vm1", &dir, why), -ENOTDIR);
	assert_int_equal(vmdir_for_each(root, collect, target), 0);
	assert_true(exists("vm1"));
	/* A file there is no VM. */
	make_file("vm2");
	assert_int_equal(vmdir_claim(root, "vm2", &dir, why), -ENOTDIR);
	assert_true(exists("vm2"));
}

static void long_paths_are_refused(void **state)
{
	char deep[160], name[64];
	struct vmdir dir;

	(void)state;
	memset(name, 'n', sizeof name);
	name[63] = 0;
	memset(deep, 'd', sizeof deep);
	deep[0] = '/';
	deep[60] = 0;
	assert_int_equal(vmdir_claim(deep, name, &dir, why), -ENAMETOOLONG);
	assert_non_null(strstr(why, "shorter"));
	assert_int_equal(vmdir_claim(root, "a/b", &dir, why), -EINVAL);
}

/* A file that cannot grow stands for a full file system. */
static void a_full_directory_leaves_nothing(void **state)
{
	struct rlimit old, none = { 0, 0 };
	struct vmdir dir;

	(void)state;
	assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
	none.rlim_max = old.rlim_max;
	signal(SIGXFSZ, SIG_IGN);
	assert_int_equal(setrlimit(RLIMIT_FSIZE, &none), 0);
	assert_int_equal(vmdir_claim(root, "vm1", &dir, why), -EFBIG);
	assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
	assert_false(exists("vm1"));
}

/* Many processes want one name again and again: never two at a time, and none is refused for ever. */
static void one_at_a_time_under_contention(void **state)
{
	enum { CHILDREN = 4, ROUNDS = 200 };
	pid_t children[CHILDREN];
	int status;

	(void)state;
	for (int i = 0; i < CHILDREN; i++) {
		children[i] = fork();
		for (int got = 0; !children[i];) {
			struct vmdir dir;
			int r = vmdir_claim(root, "vm1", &dir, why);

			if (r && r != -EEXIST)
				_exit(1);
			if (r)
				continue;
			if (mkdir(in_root("mutex"), 0700) || rmdir(in_root("mutex")))
				_exit(2);
			vmdir_abandon(&dir);
			if (++got == ROUNDS)
				_exit(0);
		}
	}
	for (int i = 0; i < CHILDREN; i++) {
		assert_int_equal(waitpid(children[i], &status, 0), children[i]);
		assert_true(WIFEXITED(status));
		assert_int_equal(WEXITSTATUS(status), 0);
	}
}

static const char *blob_is(void *ctx, const char *property)
{
	return strcmp(property, "blob") ? NULL : ctx;
}

static void compatibility(void **state)
{
	const struct compat_rule *rule = compat_find(COMPAT_DEVICE, "vfio-pci", NULL, NULL);
	char text[160], on[] = "on", off[] = "off";

	(void)state;
	assert_non_null(rule);
	compat_sentence(rule, "vfio-pci", text, sizeof text);
	assert_true(!strncmp(text, "vfio-pci: ", 10));
	assert_null(compat_find(COMPAT_NETDEV, "vfio-pci", NULL, NULL));
	assert_null(compat_find(COMPAT_DEVICE, "virtio-blk-pci", NULL, NULL));
	assert_null(compat_find(COMPAT_DEVICE, "virtio-gpu-pci", NULL, NULL));
	assert_null(compat_find(COMPAT_DEVICE, "virtio-gpu-pci", blob_is, off));
	assert_non_null(compat_find(COMPAT_DEVICE, "virtio-gpu-pci", blob_is, on));
	assert_non_null(compat_find(COMPAT_FILE, "/dev/vfio/12", NULL, NULL));
	assert_null(compat_find(COMPAT_FILE, "/dev/kvm", NULL, NULL));
}

/* A VM that lives keeps its lock and its files under its new name. */
static void rename_live(void **state)
{
	struct vmdir a = claimed("a"), b = claimed("b");

	(void)state;
	assert_int_equal(mkdir(in_root("dead"), 0700), 0);
	make_file("dead/left"); /* by a VM that was killed */
	assert_int_equal(vmdir_rename(root, "a", "b", why), -EEXIST);
	assert_non_null(strstr(why, "b is running"));
	assert_int_equal(vmdir_rename(root, "a", "../c", why), -EINVAL);
	assert_int_equal(vmdir_rename(root, "none", "c", why), -ENOENT);
	assert_int_equal(vmdir_rename(root, "a", "dead", why), 0);
	assert_true(vmdir_is_live(root, "dead") && !vmdir_is_live(root, "a") && vmdir_is_live(root, "b"));
	assert_true(exists("dead/stats") && !exists("dead/left") && !exists("a"));
	vmdir_abandon(&b);
	close(a.lock_fd);
	close(a.stats_fd);
	assert_int_equal(vmdir_remove_if_dead(in_root("dead")), 0);
}

int main(void)
{
#define TEST(function) cmocka_unit_test_setup_teardown(function, set_up, tear_down)
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(names),
		TEST(rename_live),
		cmocka_unit_test(compatibility),
		TEST(root_is_private),
		TEST(bad_roots_are_refused),
		TEST(one_vm_per_name),
		TEST(what_the_dead_left_is_replaced),
		TEST(the_lock_is_inherited),
		TEST(listing_cleans_up),
		TEST(strangers_are_left_alone),
		TEST(long_paths_are_refused),
		TEST(a_full_directory_leaves_nothing),
		TEST(one_at_a_time_under_contention),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
