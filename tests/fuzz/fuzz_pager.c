/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Packets of anything at the socket of a pager that serves a small snapshot. It lives, and a good request is
 * answered afterwards.
 *
 * Input: packets: the client (1 byte), how it is made (1 byte: 1 a good header, 2 other descriptors, 4 a
 * userfaultfd among them, 8 hang up afterwards; the rest is how many descriptors), what (1 byte), length of contents
 * (1 byte), contents, which begin at the blocks of a good header.
 */
#include "fuzz.h"

#include "os/os.h"
#include "pager/pager.h"
#include "snapshot/packed.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define CLIENTS 8
#define PACKETS_MAX 24
#define ANSWER_MS 20000
#define PAGES 100u

static const struct fuzz_token tokens[] = {
	FUZZ_TEXT("\x00\x00\x00\x00\x00\x7f\x00\x00"),
	FUZZ_TEXT("\x64\x00\x00\x00\x00\x00\x00\x00"),
	FUZZ_TEXT("\xff\xff\xff\xff\xff\xff\xff\xff"),
	FUZZ_TEXT("LTPG\x01\x00\x00\x00"),
	{ NULL, 0 },
};

const struct fuzz_target fuzz_target = { "pager", 2048, tokens, false };

static pid_t pager;
static char source[PAGER_SOURCE_BYTES];
static int clients[CLIENTS];

/* ---- the snapshot and its pager ------------------------------------------------------------------ */

static int make_file(const char *name)
{
	char path[1200];

	snprintf(path, sizeof path, "%s/%s", source, name);
	return open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
}

static void make_snapshot(void)
{
	const struct snapshot_image layout = { .blocks = 1, .block = { { .name = "pc.ram", .pages = PAGES } } };
	struct snapshot_image image;
	char text[512], why[SNAPSHOT_WHY_BYTES];
	uint8_t page[OS_PAGE_BYTES];
	int ram = os_memfd_create("ram", os_bytes(PAGES), false), fd;
	uint64_t bytes;

	fuzz_require(!mkdir(source, 0700) && !snapshot_image_create(&layout, &image));
	for (uint32_t i = 0; i < PAGES; i += 1 + i / 40) {
		for (size_t n = 0; n < sizeof page; n++)
			page[n] = (uint8_t)(n * i);
		image.block[0].table[i] = snapshot_classify(page);
		fuzz_require(!os_write_all(ram, page, sizeof page, os_bytes(i)));
	}
	fuzz_require(!packed_write(&image, ram, fd = make_file(SNAPSHOT_PACKED), NULL, &bytes, why));
	close(fd);
	fuzz_require(!snapshot_image_write(&image, fd = make_file(SNAPSHOT_PAGES)));
	close(fd);
	close(make_file(SNAPSHOT_STATE));
	snprintf(text, sizeof text,
		 "{\"format\": \"latent-snapshot\", \"version\": %u, \"name\": \"vm\", \"qemu_version\": \"7.2.0\","
		 "\"created_unix_s\": 1, \"ram_bytes\": %zu, \"state_bytes\": 0, \"state_digest\": \"0123456789abcdef\", "
		 "\"pages_digest\": \"0123456789abcdef\", \"packed_bytes\": %ju, \"volumes\": [], "
		 "\"disks\": []}", SNAPSHOT_VERSION, os_bytes(PAGES), (uintmax_t)bytes);
	fuzz_require(!os_write_all(fd = make_file(SNAPSHOT_MANIFEST), text, strlen(text), 0));
	close(fd);
	close(ram);
	snapshot_image_free(&image);
}

static void start_pager(void)
{
	struct sockaddr_un at = { .sun_family = AF_UNIX };
	char path[VMDIR_PATH_BYTES];
	int listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	fuzz_require(!pager_path(fuzz_directory(), source, ".sock", path));
	snprintf(at.sun_path, sizeof at.sun_path, "%.107s", path);
	unlink(path);
	fuzz_require(!bind(listener, (struct sockaddr *)&at, sizeof at) && !listen(listener, 64));
	pager = fork();
	if (!pager) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		pager_serve(listener, source, false);
		_exit(0);
	}
	fuzz_require(pager > 0);
	close(listener);
}

static void end_pager(void)
{
	kill(pager, SIGKILL);
	waitpid(pager, NULL, 0);
}

static void prepare(void)
{
	int status;

	if (!pager) {
		snprintf(source, sizeof source, "%s/snapshot", fuzz_directory());
		memset(clients, 0xff, sizeof clients); /* -1 */
		make_snapshot();
		start_pager();
		atexit(end_pager);
	} else if (waitpid(pager, &status, WNOHANG) == pager) { /* nobody was there for some seconds */
		fuzz_require(WIFEXITED(status) && !WEXITSTATUS(status));
		start_pager();
	}
}

/* ---- packets ------------------------------------------------------------------------------------ */

static int connect_client(void)
{
	int fd = pager_connect(fuzz_directory(), source, ANSWER_MS);

	fuzz_require(fd >= 0);
	return fd;
}

static void hang_up(int *client)
{
	if (*client >= 0)
		close(*client);
	*client = -1;
}

static struct pager_request good_request(uint32_t op)
{
	struct pager_request q = { .magic = PAGER_MAGIC, .version = PAGER_VERSION, .op = op };

	memcpy(q.source, source, sizeof q.source);
	return q;
}

static int some_descriptor(uint8_t which)
{
	switch (which % 5) {
	case 0:
		return open("/dev/zero", O_RDONLY | O_CLOEXEC);
	case 1:
		return open("/dev/null", O_RDONLY | O_CLOEXEC);
	case 2:
		return os_memfd_create("some", os_bytes(PAGES), false);
	case 3:
		return socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	default:
		return os_uffd_new(O_CLOEXEC | O_NONBLOCK | 1 /* UFFD_USER_MODE_ONLY */);
	}
}

static void talk(struct fuzz_reader *in)
{
	int *client = &clients[fuzz_byte(in) % CLIENTS], fds[8];
	uint8_t how = fuzz_byte(in), what = fuzz_byte(in);
	union {
		struct pager_request request;
		uint8_t bytes[sizeof(struct pager_request) + 256];
	} packet = { .request = good_request(what % (PAGER_OPS + 1)) };
	size_t n = fuzz_byte(in), length = sizeof packet.request;
	const uint8_t *contents = fuzz_bytes(in, &n);
	unsigned count = how >> 4 & 7;

	memcpy(how & 1 ? (uint8_t *)packet.request.block : packet.bytes, contents, n);
	packet.request.blocks = how & 1 ? (uint32_t)(n / sizeof packet.request.block[0]) : packet.request.blocks;
	if (how & 2)
		length = n;
	for (unsigned i = 0; i < count; i++)
		fds[i] = some_descriptor((uint8_t)(how & 4 ? 4 : what + i));
	for (unsigned i = 0; i < count; i++)
		if (fds[i] < 0)
			fds[i] = open("/dev/null", O_RDONLY | O_CLOEXEC);
	if (*client < 0)
		*client = connect_client();
	if (pager_send(*client, packet.bytes, length, fds, count) || how & 8)
		hang_up(client);
	for (unsigned i = 0; i < count; i++)
		close(fds[i]);
}

/* As `latent restore` asks. */
static void require_answer(void)
{
	struct pager_request q = good_request(PAGER_OPEN);
	struct pager_report report;
	int client = connect_client(), fds[PAGER_FDS];
	unsigned count = PAGER_FDS;

	fuzz_require(!pager_send(client, &q, sizeof q, NULL, 0));
	fuzz_require(pager_receive(client, &report, sizeof report, fds, &count) == (int)sizeof report);
	fuzz_require(report.magic == PAGER_MAGIC && report.op == PAGER_OPEN && !report.error && count == PAGER_FDS);
	while (count)
		close(fds[--count]);
	close(client);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	struct fuzz_reader in = { data, data + bytes };

	prepare();
	for (unsigned n = 0; in.at < in.end && n < PACKETS_MAX; n++)
		talk(&in);
	for (size_t i = 0; i < CLIENTS; i++)
		hang_up(&clients[i]);
	require_answer();
	fuzz_require(waitpid(pager, NULL, WNOHANG) == 0);
	return 0;
}
