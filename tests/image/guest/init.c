/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* Process 1 of the guest: mounts what a program expects, keeps the command
 * server running, reaps orphans. It writes nothing to the root disk. */
#include "guest.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static void mount_one(const char *type, const char *target, const char *options)
{
	if (mount(type, target, type, 0, options) != 0)
		fprintf(stderr, "init: cannot mount %s: %s\n", target, strerror(errno));
}

/* /dev and /proc came with us from the initramfs. */
static void mount_all(void)
{
	mount_one("sysfs", "/sys", NULL);
	mkdir("/dev/pts", 0755);
	mkdir("/dev/shm", 01777);
	mount_one("devpts", "/dev/pts", "mode=0620,ptmxmode=0666");
	mount_one("tmpfs", "/dev/shm", "mode=1777");
	mount_one("tmpfs", "/run", "mode=0755");
}

static pid_t start_server(void)
{
	pid_t pid = fork();

	if (pid != 0)
		return pid;
	char *argv[] = { "serve", NULL };
	setsid();
	_exit(cmd_serve(1, argv));
}

int cmd_init(int argc, char **argv)
{
	(void)argc;
	(void)argv;
	if (getpid() != 1) {
		fprintf(stderr, "init: not process 1\n");
		return 2;
	}
	mount_all();
	setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
	setenv("HOME", "/root", 1);
	setenv("LC_ALL", "C", 1);
	sethostname("guest", 5);
	if (chdir("/root") != 0)
		fprintf(stderr, "init: no /root\n");

	pid_t server = start_server();
	for (;;) {
		pid_t pid = wait(NULL);
		if (pid >= 0 && pid != server)
			continue;
		fprintf(stderr, "init: the command server ended, starting it again\n");
		sleep(1);
		server = start_server();
	}
}

int cmd_poweroff(int argc, char **argv)
{
	(void)argc;
	(void)argv;
	sync();
	/* Refused while files are open for writing; the journal is whole then. */
	if (mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL) != 0)
		sync();
	reboot(RB_POWER_OFF);
	fprintf(stderr, "poweroff: %s\n", strerror(errno));
	return 1;
}
