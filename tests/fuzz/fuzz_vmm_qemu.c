/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The cheapest VMM that `latent run` accepts, for fuzz_control: it maps guest RAM, reads an image into
 * all of it, says so with a byte on standard output, answers its QMP connection, and ends with standard
 * input. (The agent keeps out of programs without "qemu" in their names.)
 *
 * fuzz_vmm_qemu -machine q35 -m MIB IMAGE [what `latent run` adds]
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define RAM "size=%zu,mem-path=%63[^,]"

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
	int fd;

	if (sscanf(word, RAM, ret_bytes, path) != 2)
		return MAP_FAILED;
	fd = open(path, O_RDWR | O_CLOEXEC);
	return mmap(NULL, *ret_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
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

int main(int argc, char **argv)
{
	struct pollfd inputs[] = { { .fd = STDIN_FILENO, .events = POLLIN }, { .events = POLLIN } };
	int image = argc > 5 ? open(argv[5], O_RDONLY | O_CLOEXEC) : -1;
	size_t bytes = 0;
	void *ram;

	if (argc > 1 && !strcmp(argv[1], "-version"))
		return puts("QEMU emulator version 7.2.0") < 0;
	ram = map_ram(find_word(argc, argv, "size="), &bytes);
	if (ram == MAP_FAILED || image < 0)
		return fail("guest RAM, or the image");
	if (pread(image, ram, bytes, 0) < 0 || write(STDOUT_FILENO, "r", 1) != 1)
		return fail("reading");
	if (sscanf(find_word(argc, argv, "latent-agent,fd="), "latent-agent,fd=%d", &inputs[1].fd) != 1)
		inputs[1].fd = -1;
	while (!inputs[0].revents) {
		int ready = poll(inputs, 2, -1);

		if (ready < 0 && errno != EINTR) /* the agent stops threads by a signal */
			return fail("poll");
		if (ready > 0 && inputs[1].revents)
			answer(inputs[1].fd);
	}
	return 0;
}
