/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The cheapest VMM that `latent run` accepts, for tests: it maps guest RAM, reads an image into all of it, says so
 * with a byte on standard output, answers its QMP connection, and ends with standard input. (The agent keeps out
 * of programs without "qemu" in their names.)
 *
 * fuzz_vmm_qemu -machine q35 -m MIB IMAGE [what `latent run` adds]
 *
 * Commands on standard input do what a VMM does for a device that is plugged in; each is answered with a line: 0,
 * or the number of an error.
 *   open PATH, ioctl REQUEST (of no descriptor), lock, userfaultfd
 *   read      the image once more
 *   give      guest RAM to another process
 *   sum       answered with a hash of guest RAM
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define RAM "size=%zu,mem-path=%63[^,]"

static int ram_fd = -1;

static int fail(const char *what)
{
	perror(what);
	return 1;
}

static const char *find_word(int argc, char **argv, const char *part)
{
	for (int i = 1; i < argc; i++)
		if (strstr(argv[i], part))
			return strstr(argv[i], part);
	return "";
}

static void *map_ram(const char *word, size_t *ret_bytes)
{
	char path[64];

	if (sscanf(word, RAM, ret_bytes, path) != 2)
		return MAP_FAILED;
	ram_fd = open(path, O_RDWR | O_CLOEXEC);
	return mmap(NULL, *ret_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, ram_fd, 0);
}

/* To every request the same: it has happened, and the guest runs. */
static void answer(int qmp)
{
	char line[4096], reply[128], *id;
	ssize_t n = read(qmp, line, sizeof line - 1);

	line[n > 0 ? n : 0] = 0;
	for (char *at = line; (id = strstr(at, "\"id\": ")); at = id + 1) {
		int length = snprintf(reply, sizeof reply,
				      "{\"return\": {\"status\": \"running\"}, \"id\": %lu}\n",
				      strtoul(id + 6, NULL, 10));

		if (write(qmp, reply, (size_t)length) < 0)
			return;
	}
}

/* ---- devices --------------------------------------------------------------------------------- */

static void *ram;
static size_t ram_bytes;
static int image;

static int status_of(long result, bool is_fd)
{
	int error = result < 0 ? errno : 0;

	if (is_fd && result >= 0)
		close((int)result);
	return error;
}

/* FNV-1a, in words. */
static unsigned long long hash_ram(void)
{
	unsigned long long hash = 0xcbf29ce484222325ull;

	for (size_t i = 0; i < ram_bytes / sizeof hash; i++)
		hash = (hash ^ ((const unsigned long long *)ram)[i]) * 0x100000001b3ull;
	return hash;
}
/* Guest RAM to another process, as a vhost-user device would. */
static int give_ram(void)
{
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof(int))];
	} rights = { .header = { .cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS } };
	struct iovec iov = { (char[]){ 0 }, 1 };
	struct msghdr message = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &rights, .msg_controllen = sizeof rights
	};
	int ends[2], status;

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends))
		return errno;
	memcpy(CMSG_DATA(&rights.header), &ram_fd, sizeof ram_fd);
	status = status_of(sendmsg(ends[0], &message, 0), false);
	close(ends[0]);
	close(ends[1]);
	return status;
}

static void obey(char *command)
{
	char *argument = strchr(command, ' ');
	int status = EINVAL;

	if (argument)
		*argument++ = '\0';
	if (!strcmp(command, "sum")) {
		printf("%016llx\n", hash_ram());
		return;
	}
	if (!strcmp(command, "open") && argument)
		status = status_of(open(argument, O_RDWR | O_CLOEXEC), true);
	else if (!strcmp(command, "ioctl") && argument)
		status = status_of(ioctl(-1, strtoul(argument, NULL, 0), 0), false);
	else if (!strcmp(command, "userfaultfd"))
		status = status_of(syscall(SYS_userfaultfd, O_CLOEXEC), true);
	else if (!strcmp(command, "give"))
		status = give_ram();
	else if (!strcmp(command, "lock"))
		status = status_of(mlockall(MCL_CURRENT), false);
	else if (!strcmp(command, "read"))
		status = status_of(pread(image, ram, ram_bytes, 0), false);
	printf("%d\n", status);
}

/* False: there will be no more. */
static bool obey_all(void)
{
	static char text[4096];
	ssize_t n = read(STDIN_FILENO, text, sizeof text - 1);

	if (n <= 0)
		return n < 0 && errno == EINTR;
	text[n] = '\0';
	for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n"))
		obey(line);
	return !fflush(stdout);
}

int main(int argc, char **argv)
{
	struct pollfd inputs[] = { { .fd = STDIN_FILENO, .events = POLLIN }, { .events = POLLIN } };

	if (argc > 1 && !strcmp(argv[1], "-version"))
		return puts("QEMU emulator version 7.2.0") < 0;
	image = argc > 5 ? open(argv[5], O_RDONLY | O_CLOEXEC) : -1;
	ram = map_ram(find_word(argc, argv, "size="), &ram_bytes);
	if (ram == MAP_FAILED || image < 0)
		return fail("guest RAM, or the image");
	if (pread(image, ram, ram_bytes, 0) < 0 || write(STDOUT_FILENO, "r", 1) != 1)
		return fail("reading");
	if (sscanf(find_word(argc, argv, "latent-agent,fd="), "latent-agent,fd=%d", &inputs[1].fd) != 1)
		inputs[1].fd = -1;
	for (;;) {
		int ready = poll(inputs, 2, -1);

		if (ready < 0 && errno != EINTR) /* the agent stops threads by a signal */
			return fail("poll");
		if (ready > 0 && inputs[1].revents)
			answer(inputs[1].fd);
		if (ready > 0 && inputs[0].revents && !obey_all())
			return 0;
	}
}
