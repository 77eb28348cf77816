/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* QEMU: docs/interop/qemu-ga-ref (guest-set-time). */
#include "cli/guest_clock.h"

#include "vmdir/props.h"
#include "vmdir/vmdir.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CHANNEL "org.qemu.guest_agent.0"
#define TIMEOUT_MS 5000

/* The value of `wanted` in the option where `key` is `value`; to be freed. */
static char *look_up(int argc, char **argv, const char *option, const char *implied, const char *key,
		     const char *value, const char *wanted)
{
	char *found = NULL;

	for (int i = 1; !found && i + 1 < argc; i++) {
		const char *word = argv[i] + (argv[i][0] == '-' && argv[i][1] == '-');
		struct props props = { 0 };
		const char *its;

		if (strcmp(word, option))
			continue;
		if (!props_parse(&props, argv[i + 1], implied)) {
			its = props_get(&props, key);
			if (its && !strcmp(its, value) && props_get(&props, wanted))
				found = strdup(props_get(&props, wanted));
		}
		props_clear(&props);
	}
	return found;
}

char *guest_clock_socket(int argc, char **argv)
{
	char *chardev = look_up(argc, argv, "-device", "driver", "name", CHANNEL, "chardev");
	char *path = chardev ? look_up(argc, argv, "-chardev", "backend", "id", chardev, "path") : NULL;

	free(chardev);
	return path;
}

/* The byte 255 ends whatever another client has left half said. */
void guest_clock_set(const char *path)
{
	int fd = vmdir_connect(path, SOCK_STREAM, TIMEOUT_MS);
	struct timespec now;
	char text[128];
	int length;

	if (fd < 0)
		return;
	clock_gettime(CLOCK_REALTIME, &now);
	length = snprintf(text, sizeof text, "\xff{\"execute\": \"guest-set-time\", \"arguments\": {\"time\": %jd}}\n",
			  (intmax_t)now.tv_sec * 1000000000 + now.tv_nsec);
	/* QEMU drops what it has not handed on when its client goes: the answer tells that it has. */
	if (send(fd, text, (size_t)length, MSG_NOSIGNAL) == length)
		(void)!read(fd, text, sizeof text);
	close(fd);
}

void guest_clock_set_aside(const char *path)
{
	pid_t child = fork();

	if (!child) {
		if (fork())
			_exit(0);
		(void)close_range(0, UINT32_MAX, 0);
		guest_clock_set(path);
		_exit(0);
	}
	if (child > 0)
		(void)waitpid(child, NULL, 0);
}
