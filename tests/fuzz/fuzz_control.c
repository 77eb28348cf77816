/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Packets of anything at the control socket of a VM that runs, with the real agent and a cheap VMM
 * (fuzz_vmm_qemu.c). Requests that are none are refused as such, each reply is sound, the VM lives, and
 * a good request is answered afterwards.
 *
 * Input: packets: the client (1 byte), how it is made (1 byte, see `make_packet`), its length (2 bytes),
 * contents.
 */
#include "fuzz.h"

#include "vmdir/control.h"
#include "vmdir/vmdir.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define CLIENTS 20 /* more than are served at a time */
#define PACKETS_MAX 32
#define ANSWER_MS 20000
#define IMAGE "image"
#define IMAGE_BYTES (4u << 20)
#define RAM_MIB "8"
#define FRESH_INPUTS 256 /* a VM that was detached as a whole is started anew after so many */

static const struct fuzz_token tokens[] = {
	FUZZ_TEXT("LTCL\x01\x00\x00\x00\x00\x00\x00\x00"),
	FUZZ_TEXT("LTCL\x01\x00\x00\x00\x01\x00\x00\x00"),
	FUZZ_TEXT("LTCL\x01\x00\x00\x00\xff\xff\xff\xff"),
	FUZZ_TEXT("/dev/null"),
	FUZZ_TEXT("/proc/self/exe"),
	FUZZ_TEXT("image"),
	FUZZ_TEXT("../"),
	FUZZ_TEXT("%s%n"),
	FUZZ_TEXT("\x1b["),
	{ NULL, 0 },
};

const struct fuzz_target fuzz_target = { "control", 8192, tokens, false };

static struct {
	pid_t pid;
	int input; /* the VMM ends when this is closed */
	bool detached;
} vm;
static int clients[CLIENTS];

/* ---- the VM ------------------------------------------------------------------------------------- */

static void show_log(void)
{
	char text[2048];
	int fd = open("vm.log", O_RDONLY | O_CLOEXEC);
	ssize_t n = fd >= 0 ? read(fd, text, sizeof text) : 0;

	if (n > 0 && write(STDERR_FILENO, text, (size_t)n) < 0)
		return;
	if (fd >= 0)
		close(fd);
}

#define require_vm(condition)                                                                           \
	((condition) ? (void)0 : (show_log(), fuzz_fail(#condition, __FILE__, __LINE__)))

static void make_image(void)
{
	static uint8_t contents[IMAGE_BYTES];
	int fd = open(IMAGE, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);

	memset(contents, 0x5a, sizeof contents);
	fuzz_require(fd >= 0 && write(fd, contents, sizeof contents) == (ssize_t)sizeof contents);
	close(fd);
}

/* Of the build that this program is of. */
static void build_path(const char *name, char path[4200])
{
	char exe[4096];
	ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);

	fuzz_require(n > 0);
	exe[n] = 0;
	*strrchr(exe, '/') = 0;
	snprintf(path, 4200, "%s/%s", exe, name);
}

static _Noreturn void become_vm(int input, int output)
{
	char latent[4200], vmm[4200];
	int log = open("vm.log", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	build_path("../latent", latent);
	build_path("fuzz_vmm_qemu", vmm);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (dup2(input, STDIN_FILENO) >= 0 && dup2(output, STDOUT_FILENO) >= 0 &&
	    dup2(log, STDERR_FILENO) >= 0)
		execl(latent, latent, "run", "--name", "vm", "--share-threshold", "0", "--min-run", "1",
		      "--", vmm, "-machine", "q35", "-m", RAM_MIB, IMAGE, (char *)NULL);
	_exit(127);
}

static void start_vm(void)
{
	int input[2], output[2];
	char ready = 0;

	fuzz_require(!pipe2(input, O_CLOEXEC) && !pipe2(output, O_CLOEXEC));
	vm.pid = fork();
	if (!vm.pid)
		become_vm(input[0], output[1]);
	fuzz_require(vm.pid > 0);
	close(input[0]);
	close(output[1]);
	require_vm(read(output[0], &ready, 1) == 1 && ready == 'r');
	close(output[0]);
	vm.input = input[1];
	vm.detached = false;
}

static void end_vm(void)
{
	int status;

	if (!vm.pid)
		return;
	close(vm.input);
	require_vm(waitpid(vm.pid, &status, 0) == vm.pid && WIFEXITED(status) && !WEXITSTATUS(status));
	require_vm(access("run/vm", F_OK)); /* it has taken its directory along */
	vm.pid = 0;
}

static void prepare(void)
{
	static unsigned inputs;
	char root[128];

	if (!inputs++) {
		snprintf(root, sizeof root, "%s/run", fuzz_directory());
		setenv("LATENT_RUNTIME_DIR", root, 1);
		make_image();
		memset(clients, 0xff, sizeof clients); /* -1 */
		start_vm();
		atexit(end_vm);
	} else if (vm.detached && !(inputs % FRESH_INPUTS)) {
		end_vm();
		start_vm();
	}
}

/* ---- clients ------------------------------------------------------------------------------------ */

/* The VM may hang up at any time: more clients than it serves at a time. */
static int connect_client(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX, .sun_path = "run/vm/" VMDIR_CONTROL };
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	require_vm(fd >= 0 && !connect(fd, (struct sockaddr *)&address, sizeof address));
	return fd;
}

static void hang_up(int *client)
{
	if (*client >= 0)
		close(*client);
	*client = -1;
}

static bool is_sound(const struct control_reply *reply, ssize_t bytes)
{
	return bytes == (ssize_t)sizeof *reply && reply->magic == CONTROL_MAGIC &&
	       reply->version == CONTROL_VERSION && reply->error <= 0 && reply->error > -4096 &&
	       memchr(reply->text, 0, sizeof reply->text) && (reply->error || !reply->text[0]) &&
	       reply->pages <= IMAGE_BYTES / 4096;
}

/* False: the VM has hung up. */
static bool await(int client, struct control_reply *reply)
{
	struct pollfd end = { .fd = client, .events = POLLIN };
	ssize_t n;

	require_vm(poll(&end, 1, ANSWER_MS) == 1);
	n = recv(client, reply, sizeof *reply, 0);
	if (n <= 0)
		return false;
	require_vm(is_sound(reply, n));
	return true;
}

/* ---- packets ------------------------------------------------------------------------------------ */

struct packet {
	union {
		struct control_request request;
		uint8_t contents[2 * sizeof(struct control_request)];
	};
	size_t bytes;
	bool with_descriptor, hang_up_at_once;
};

/* The two low bits: as it is; over a good request; the path of one; after a whole one. */
static void make_packet(struct packet *p, uint8_t how, struct fuzz_reader *in)
{
	size_t bytes = fuzz_number(in, 2) % (sizeof p->contents - sizeof p->request);
	const uint8_t *contents;
	size_t length = bytes;

	memset(p, 0, sizeof *p);
	p->request = (struct control_request){
		.magic = CONTROL_MAGIC,
		.version = CONTROL_VERSION,
		.op = how & 8 ? CONTROL_ENTRIES : how & 4 ? CONTROL_DETACH : CONTROL_REFRESH,
	};
	contents = fuzz_bytes(in, &length);
	if (how % 4 == 0)
		memcpy(p->contents, contents, length);
	else if (how % 4 == 1)
		memcpy(p->contents + length % 16, contents, length);
	else if (how % 4 == 2)
		memcpy(p->request.path, contents,
		       length < sizeof p->request.path ? length : sizeof p->request.path);
	else
		memcpy(p->contents + sizeof p->request, contents, length);
	p->bytes = how % 4 == 0 ? bytes : sizeof p->request + (how % 4 == 3 ? bytes : 0);
	p->with_descriptor = how & 16;
	p->hang_up_at_once = how & 32;
}

static bool is_request(const struct packet *p)
{
	return p->bytes == sizeof p->request && p->request.magic == CONTROL_MAGIC &&
	       p->request.version == CONTROL_VERSION &&
	       memchr(p->request.path, 0, sizeof p->request.path);
}

static bool send_packet(int client, const struct packet *p)
{
	union {
		struct cmsghdr header;
		uint8_t space[CMSG_SPACE(sizeof(int))];
	} rights = { .header = { CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS } };
	struct iovec iov = { (void *)p->contents, p->bytes };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1 };

	memcpy(CMSG_DATA(&rights.header), &vm.input, sizeof vm.input);
	if (p->with_descriptor) {
		message.msg_control = &rights;
		message.msg_controllen = sizeof rights;
	}
	return sendmsg(client, &message, MSG_NOSIGNAL) == (ssize_t)p->bytes;
}

static void check_reply(const struct packet *p, const struct control_reply *reply)
{
	if (p->bytes > sizeof p->request) /* whether its beginning counts is not promised */
		return;
	if (!is_request(p))
		require_vm(reply->error == -EPROTO);
	else if (p->request.op >= CONTROL_OPS)
		require_vm(reply->error == -EOPNOTSUPP);
	else if (p->request.op == CONTROL_DETACH && !p->request.path[0] && !reply->error)
		vm.detached = true;
}

/* What comes after the reply; its descriptors the kernel drops. */
static void take_layout(int client)
{
	static struct control_layout layout;
	struct pollfd end = { .fd = client, .events = POLLIN };

	require_vm(poll(&end, 1, ANSWER_MS) == 1);
	require_vm(recv(client, &layout, sizeof layout, 0) == (ssize_t)sizeof layout);
	require_vm(layout.blocks == 1 && !layout.volumes && memchr(layout.block[0].name, 0, sizeof layout.block[0].name));
}

static void talk(struct fuzz_reader *in)
{
	int *client = &clients[fuzz_byte(in) % CLIENTS];
	struct control_reply reply;
	struct packet packet;

	make_packet(&packet, fuzz_byte(in), in);
	if (*client < 0)
		*client = connect_client();
	if (!send_packet(*client, &packet) || packet.hang_up_at_once || !packet.bytes ||
	    !await(*client, &reply))
		hang_up(client);
	else
		check_reply(&packet, &reply);
	if (*client >= 0 && is_request(&packet) && !reply.error) {
		if (packet.request.op == CONTROL_ENTRIES)
			take_layout(*client);
		if (packet.request.op == CONTROL_SAVE_BEGIN)
			hang_up(client); /* which ends the save */
	}
}

static bool ask(void)
{
	struct packet packet = { .bytes = sizeof packet.request };
	struct control_reply reply;
	int client = connect_client();
	bool answered;

	packet.request =
		(struct control_request){ CONTROL_MAGIC, CONTROL_VERSION, CONTROL_REFRESH, 0, "" };
	answered = send_packet(client, &packet) && await(client, &reply);
	close(client);
	require_vm(!answered || !reply.error);
	return answered;
}

/* The VM has yet to notice that others have gone. */
static void ask_until_answered(void)
{
	for (int tries = 0; !ask(); tries++) {
		require_vm(tries < 1000);
		usleep(1000);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	struct fuzz_reader in = { data, data + bytes };

	prepare();
	for (unsigned n = 0; in.at < in.end && n < PACKETS_MAX; n++)
		talk(&in);
	for (size_t i = 0; i < CLIENTS; i++)
		hang_up(&clients[i]);
	ask_until_answered();
	require_vm(waitpid(vm.pid, NULL, WNOHANG) == 0);
	return 0;
}
