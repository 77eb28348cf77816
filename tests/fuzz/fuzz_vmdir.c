/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * A run-time directory that somebody hostile has made: the statistics, the lock and the agent's answers
 * are anything. `latent ps`, `stat`, `top`, `heat` and `detach` end, with a status of theirs, and what they print is
 * plain text or valid JSON; nothing outside of the directory is touched, and a new VM gets a name.
 *
 * Input: kinds of things (1 byte each, see the enums), how the agent answers, the answer's length (2
 * bytes) and contents, over a valid one, and what tables of page entries it hands out (4 bytes, see set_tables); then
 * patches of valid statistics: place (2 bytes), length (1
 * byte), contents.
 */
#include "fuzz.h"

#include "cli/cli.h"
#include "vmdir/control.h"
#include "vmdir/stats.h"
#include "vmdir/vmdir.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <json-c/json.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define ROOT "run"
#define VM "vm"
#define OUTSIDE "outside"
#define TABLES_MAX 70 /* more than there are blocks */
#define TABLE_PAGES 3000

/* What stands in the place of a file. */
enum kind { FILE_USUAL, FILE_ABSENT, FILE_FIFO, FILE_DIRECTORY, FILE_LINK, FILE_SOCKET, FILE_KINDS };
/* What the agent does with a request. */
enum manner { ANSWER, ANSWER_TWICE, HANG_UP, CUT_STATS, GROW_STATS, REPLACE_STATS, ANSWER_TABLES, MANNERS };

static const struct fuzz_token tokens[] = {
	FUZZ_TEXT("\xff\xff\xff\xff"),
	FUZZ_TEXT("\x00\x00\x00\x80"), /* INT32_MIN */
	FUZZ_TEXT("\xff\xff\xff\xff\xff\xff\xff\xff"),
	FUZZ_TEXT("\x1b[2J"),
	FUZZ_TEXT("\xc2\x9b"),
	FUZZ_TEXT("\xc3\xbc"),
	FUZZ_TEXT("\xed\xa0\x80"),
	FUZZ_TEXT("%s%n"),
	FUZZ_TEXT("\"\\"),
	FUZZ_TEXT("\n"),
	FUZZ_TEXT("TLST"),
	FUZZ_TEXT("LTCL"),
	{ NULL, 0 },
};

const struct fuzz_target fuzz_target = { "vmdir", 2048, tokens, false };

/* ---- the agent ---------------------------------------------------------------------------------- */

static struct {
	int listen_fd;
	enum manner manner; /* these are set while the thread has nothing to do */
	uint8_t reply[sizeof(struct control_reply) + 64];
	size_t reply_bytes;
	struct control_layout layout; /* with ANSWER_TABLES */
	int table_fds[TABLES_MAX];
	unsigned table_count;
} peer;

static void spoil_stats(enum manner manner)
{
	int r = 0;

	if (manner == CUT_STATS)
		r = truncate(ROOT "/" VM "/" VMDIR_STATS, 0);
	else if (manner == GROW_STATS)
		r = truncate(ROOT "/" VM "/" VMDIR_STATS, 1 << 20);
	else if (manner == REPLACE_STATS)
		r = rename(ROOT "/" VM "/" VMDIR_STATS, ROOT "/" VM "/other");
	(void)r; /* it may be no file */
}

static void send_tables(int client)
{
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof peer.table_fds)];
	} rights = { .header = { CMSG_LEN(peer.table_count * sizeof(int)), SOL_SOCKET, SCM_RIGHTS } };
	struct iovec iov = { &peer.layout, sizeof peer.layout };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1 };

	memcpy(CMSG_DATA(&rights.header), peer.table_fds, sizeof peer.table_fds);
	if (peer.table_count) {
		message.msg_control = &rights;
		message.msg_controllen = CMSG_SPACE(peer.table_count * sizeof(int));
	}
	(void)!sendmsg(client, &message, MSG_NOSIGNAL);
}

static void *peer_main(void *arg)
{
	struct control_request request;
	(void)arg;

	for (;;) {
		int client = accept4(peer.listen_fd, NULL, NULL, SOCK_CLOEXEC);

		if (client < 0)
			continue;
		if (recv(client, &request, sizeof request, 0) > 0 && peer.manner != HANG_UP) {
			spoil_stats(peer.manner);
			for (int i = 0; i <= (peer.manner == ANSWER_TWICE); i++)
				(void)!send(client, peer.reply, peer.reply_bytes, MSG_NOSIGNAL);
			if (peer.manner == ANSWER_TABLES)
				send_tables(client);
		}
		close(client);
	}
	return NULL;
}

/* The socket is made once and linked to where it belongs. */
static void start_peer(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX, .sun_path = "control" };
	pthread_t thread;

	peer.listen_fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	fuzz_require(peer.listen_fd >= 0 &&
		     !bind(peer.listen_fd, (struct sockaddr *)&address, sizeof address));
	fuzz_require(!listen(peer.listen_fd, 16) && !pthread_create(&thread, NULL, peer_main, NULL));
	pthread_detach(thread);
}

/* A table of entries of all kinds, and something that is none. */
static void open_tables(int fds[2])
{
	static uint64_t entries[TABLE_PAGES];
	int ends[2];

	for (size_t i = 0; i < TABLE_PAGES; i++)
		entries[i] = i * 0x9e3779b97f4a7c15ull;
	fds[0] = memfd_create("table", MFD_CLOEXEC);
	fuzz_require(fds[0] >= 0 && write(fds[0], entries, sizeof entries) == (ssize_t)sizeof entries);
	fuzz_require(!pipe2(ends, O_CLOEXEC));
	fds[1] = ends[0];
}

/* How many blocks, how many descriptors, which one is none, and the pages of the first. */
static void set_tables(struct fuzz_reader *in)
{
	static int fds[2] = { -1, -1 };
	unsigned blocks = fuzz_byte(in) % 68, strange;
	uint8_t pages;

	if (fds[0] < 0)
		open_tables(fds);
	peer.table_count = fuzz_byte(in);
	peer.table_count = peer.table_count < TABLES_MAX ? peer.table_count : blocks < TABLES_MAX ? blocks : TABLES_MAX;
	strange = fuzz_byte(in);
	pages = fuzz_byte(in);
	memset(&peer.layout, pages, sizeof peer.layout); /* names without an end, too */
	peer.layout.blocks = blocks;
	for (unsigned i = 0; i < TABLES_MAX; i++)
		peer.table_fds[i] = fds[i == strange];
	for (unsigned i = 0; i < 64; i++)
		peer.layout.block[i].pages = TABLE_PAGES - i;
	if (pages)
		peer.layout.block[0].pages = pages < 128 ? pages : UINT64_MAX >> (pages % 64);
}

static void set_answer(struct fuzz_reader *in)
{
	struct control_reply usual = { .magic = CONTROL_MAGIC, .version = CONTROL_VERSION };
	size_t bytes;
	const uint8_t *contents;

	peer.manner = fuzz_byte(in) % MANNERS;
	if (peer.manner == ANSWER_TABLES)
		set_tables(in);
	bytes = fuzz_number(in, 2) % (sizeof peer.reply + 1);
	memcpy(peer.reply, &usual, sizeof usual);
	peer.reply_bytes = bytes > sizeof usual ? bytes : sizeof usual;
	if (!bytes)
		return;
	contents = fuzz_bytes(in, &bytes);
	memcpy(peer.reply, contents, bytes);
}

/* ---- the directory ------------------------------------------------------------------------------ */

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *where)
{
	(void)st;
	(void)type;
	(void)where;
	return remove(path);
}

static void write_file(const char *path, const void *contents, size_t bytes)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	fuzz_require(fd >= 0 && write(fd, contents, bytes) == (ssize_t)bytes);
	close(fd);
}

/* Something else than a file; false: a file is wanted. */
static bool make_strange(enum kind kind, const char *path, const char *link_to)
{
	switch (kind) {
	case FILE_USUAL:
		return false;
	case FILE_FIFO:
		fuzz_require(!mkfifo(path, 0600));
		break;
	case FILE_DIRECTORY:
		fuzz_require(!mkdir(path, 0700));
		break;
	case FILE_LINK:
		fuzz_require(!symlink(link_to, path));
		break;
	case FILE_SOCKET:
		fuzz_require(!link("control", path));
		break;
	default:
		break;
	}
	return true;
}

static struct vm_stats usual_stats(void)
{
	struct vm_stats stats = {
		.magic = VM_STATS_MAGIC,
		.version = VM_STATS_VERSION,
		.name = VM,
		.agent_version = "1.2.3",
		.pid = 1,
		.ram_bytes = 1 << 30,
		.pages_base_now = 1000,
		.pages_overlay_now = 200,
		.pages_private_now = 100,
		.volume_count = 1,
		.scan = { .period_us_now = 10000000, .passes = 3 },
	};

	strcpy(stats.volumes[0].path, "/images/golden.qcow2");
	stats.volumes[0].bytes_asked = 1 << 20;
	stats.volumes[0].bytes_shortcut = 1 << 19;
	return stats;
}

static void make_stats(enum kind kind, uint8_t length, struct fuzz_reader *in)
{
	static const size_t lengths[] = { 0, 4096, sizeof(struct vm_stats) - 1,
					  sizeof(struct vm_stats) + 1 };
	const char *path = ROOT "/" VM "/" VMDIR_STATS;
	struct vm_stats stats = usual_stats();

	if (make_strange(kind, path, "../../" OUTSIDE "/" VMDIR_STATS))
		return;
	while (in->at < in->end) {
		size_t at = fuzz_number(in, 2) % sizeof stats, bytes = fuzz_byte(in);
		const uint8_t *contents = fuzz_bytes(in, &bytes);

		if (bytes <= sizeof stats - at)
			memcpy((uint8_t *)&stats + at, contents, bytes);
	}
	write_file(path, &stats, sizeof stats);
	if (length)
		fuzz_require(!truncate(path, (off_t)lengths[length % 4]));
}

static int take_lock(const char *path)
{
	struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
	int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);

	fuzz_require(fd >= 0 && !fcntl(fd, F_OFD_SETLK, &lock));
	return fd;
}

/* What is locked, or -1. */
struct locks {
	int root, vm;
};

static struct locks make_directory(struct fuzz_reader *in)
{
	uint8_t dir = fuzz_byte(in), lock = fuzz_byte(in), stats = fuzz_byte(in),
		control = fuzz_byte(in);
	struct locks locks = { -1, -1 };

	nftw(ROOT, remove_one, 16, FTW_DEPTH | FTW_PHYS);
	fuzz_require(!mkdir(ROOT, 0700));
	if (dir & 128)
		locks.root = take_lock(ROOT "/.lock");
	if (make_strange(dir % 16 < FILE_KINDS ? dir % 16 : FILE_USUAL, ROOT "/" VM, "../" OUTSIDE))
		return locks;
	fuzz_require(!mkdir(ROOT "/" VM, 0700));
	if (!make_strange(lock % 16 < FILE_KINDS ? lock % 16 : FILE_USUAL, ROOT "/" VM "/" VMDIR_LOCK,
			  "../../" OUTSIDE "/" VMDIR_LOCK) &&
	    lock < 224) /* or it has died */
		locks.vm = take_lock(ROOT "/" VM "/" VMDIR_LOCK);
	set_answer(in);
	make_strange(control % 16 < FILE_KINDS ? control % 16 : FILE_SOCKET,
		     ROOT "/" VM "/" VMDIR_CONTROL, "../../" OUTSIDE "/" VMDIR_CONTROL);
	make_stats(stats % 16 < FILE_KINDS ? stats % 16 : FILE_USUAL, stats / 16 < 5 ? stats / 16 : 0,
		   in);
	return locks;
}

static void prepare(void)
{
	static bool prepared;
	char root[128];

	if (prepared)
		return;
	prepared = true;
	snprintf(root, sizeof root, "%s/" ROOT, fuzz_directory());
	setenv("LATENT_RUNTIME_DIR", root, 1);
	start_peer();
	fuzz_require(!mkdir(OUTSIDE, 0700));
	write_file(OUTSIDE "/" VMDIR_STATS, "precious", 8);
	write_file(OUTSIDE "/" VMDIR_LOCK, "precious", 8);
}

static void check_outside(void)
{
	struct stat stats, lock;

	fuzz_require(!stat(OUTSIDE "/" VMDIR_STATS, &stats) && stats.st_size == 8);
	fuzz_require(!stat(OUTSIDE "/" VMDIR_LOCK, &lock) && lock.st_size == 8);
	fuzz_require(access(OUTSIDE "/" VMDIR_CONTROL, F_OK));
}

/* ---- the commands ------------------------------------------------------------------------------- */

static bool is_status(int status)
{
	return status == CLI_OK || status == CLI_NO_IMAGE || status == CLI_NO_VM ||
	       status == CLI_RUN_DIR || status == CLI_NO_ANSWER;
}

static void check_vm(struct json_object *vm)
{
	struct json_object *text;

	fuzz_require(json_object_object_get_ex(vm, "name", &text));
	if (json_object_object_get_ex(vm, "state", &text) && !strcmp(json_object_get_string(text), "unknown"))
		return; /* its statistics could not be read */
	fuzz_require(json_object_object_get_ex(vm, "excluded_by", &text));
	fuzz_require(json_object_get_string_len(text) < (int)sizeof((struct vm_stats *)0)->excluded_by);
}

static void check_json(const char *text)
{
	struct json_tokener *tokener = json_tokener_new();
	struct json_object *json;

	json_tokener_set_flags(tokener, JSON_TOKENER_STRICT | JSON_TOKENER_VALIDATE_UTF8);
	json = json_tokener_parse_ex(tokener, text, -1);
	fuzz_require(json != NULL);
	if (json_object_object_get_ex(json, "pages_per_cell", NULL))
		; /* a map has none of their texts */
	else if (json_object_is_type(json, json_type_object))
		check_vm(json);
	else
		for (size_t i = 0; i < json_object_array_length(json); i++)
			check_vm(json_object_array_get_idx(json, i));
	json_object_put(json);
	json_tokener_free(tokener);
}

static int run(const struct cli_command *command, const char *first, const char *second)
{
	char words[3][16];
	char *argv[] = { words[0], words[1], words[2], NULL };
	int argc = 1 + (first != NULL) + (second != NULL), status;
	struct fuzz_output output;

	snprintf(words[0], sizeof words[0], "%s", command->name);
	snprintf(words[1], sizeof words[1], "%s", first ? first : "");
	snprintf(words[2], sizeof words[2], "%s", second ? second : "");
	argv[argc] = NULL;
	fuzz_capture_begin();
	status = command->run(command, argc, argv);
	fuzz_capture_end(&output);
	fuzz_require(is_status(status) && (status == CLI_OK || output.err_bytes));
	fuzz_require(fuzz_is_plain_text(output.out, output.out_bytes));
	fuzz_require(fuzz_is_plain_text(output.err, output.err_bytes));
	if (output.out[0] == '{' || output.out[0] == '[')
		check_json(output.out);
	fuzz_output_free(&output);
	return status;
}

/* One that is not hostile finds its place, or a sentence that says why not. */
static void claim(const char *name)
{
	char root[VMDIR_PATH_BYTES], why[VMDIR_WHY_BYTES] = "";
	struct vmdir dir;

	if (vmdir_root(true, root, why) || vmdir_claim(root, name, &dir, why))
		fuzz_require(memchr(why, 0, sizeof why) && why[0]);
	else
		vmdir_abandon(&dir);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	struct fuzz_reader in = { data, data + bytes };
	struct locks locks;

	prepare();
	locks = make_directory(&in);
	run(&cli_stat, VM, NULL);
	run(&cli_stat, VM, "--json");
	run(&cli_detach, VM, bytes & 1 ? ROOT : NULL);
	run(&cli_ps, NULL, NULL);
	run(&cli_ps, "--json", NULL);
	run(&cli_heat, VM, NULL);
	run(&cli_heat, VM, "--json");
	run(&cli_top, "-b", "-n=1");
	if (locks.root >= 0)
		close(locks.root);
	claim("new");
	if (locks.vm >= 0)
		close(locks.vm);
	claim(VM);
	check_outside();
	return 0;
}
