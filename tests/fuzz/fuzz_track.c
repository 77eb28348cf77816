/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * VMs that share the tracking structure of a volume with somebody hostile, who writes into the file,
 * cuts it, puts something else in its place and takes its locks, in between and, in a thread, at the
 * same time. Every answer stays within its bounds, and when he has gone a VM attaches as ever.
 *
 * Input: settings (1 byte: SETTING_*, and the volume's length), then operations of 1 to 20 bytes.
 */
#include "fuzz.h"

#include "os/os.h"
#include "volume/track.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define VMS 4
#define OPERATIONS_MAX 64
#define SETTING_THREAD 128
#define COUNT_MAX 0xffffffu /* of one VM, at one location */
#define FILE_PAGES_MAX 512  /* what is written of the file */

static const struct fuzz_token tokens[] = {
	FUZZ_TEXT("\xff\xff\xff\xff"),
	FUZZ_TEXT("\xff\xff\xff\x00"),
	FUZZ_TEXT("\xff\xff\xff\xff\xff\xff\xff\xff"),
	FUZZ_TEXT("\xff\xff\xff\xff\xff\xff\xff\x7f"),
	FUZZ_TEXT("\x00\x00\x00\x40"),
	FUZZ_TEXT("\x00\x00\x00\x80"),
	{ NULL, 0 },
};

const struct fuzz_target fuzz_target = { "track", 512, tokens, false };

static uint64_t pages;
static char path[128];
static struct track *vms[VMS];
static int kept_lock = -1;

/* ---- somebody hostile ----------------------------------------------------------------------------- */

static int open_file(void) { return open(path, O_WRONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC); }

static void cut(uint8_t how)
{
	static const off_t lengths[] = { 0, 1, 4095, 4096, 4097, 8192, 65536, 1 << 20 };
	int fd = open_file();

	if (fd >= 0)
		(void)!ftruncate(fd, lengths[how % 8]);
	if (fd >= 0)
		close(fd);
}

static void write_at(off_t at, const void *what, size_t bytes)
{
	int fd = open_file();

	if (fd >= 0)
		(void)!pwrite(fd, what, bytes, at);
	if (fd >= 0)
		close(fd);
}

static void fill_page(uint32_t page, uint8_t byte)
{
	uint8_t contents[OS_PAGE_BYTES];

	memset(contents, byte, sizeof contents);
	write_at((off_t)(page % FILE_PAGES_MAX) * OS_PAGE_BYTES, contents, sizeof contents);
}

static void put_in_its_place(uint8_t what)
{
	unlink(path);
	rmdir(path);
	switch (what % 8) {
	case 0:
		(void)!mkfifo(path, 0600);
		break;
	case 1:
		(void)!mkdir(path, 0700);
		break;
	case 2:
		(void)!symlink("precious", path);
		break;
	case 3:
		close(open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0666));
		(void)!chmod(path, 0666);
		break;
	case 4:
		close(open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
		break;
	default:
		break;
	}
}

static void keep_locks(uint8_t first, uint8_t count)
{
	struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = first % 64 };

	lock.l_len = 1 + count % 64;
	if (kept_lock < 0)
		kept_lock = open(path, O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
	if (kept_lock >= 0)
		(void)!fcntl(kept_lock, F_OFD_SETLK, &lock);
}

static void let_locks_go(void)
{
	if (kept_lock >= 0)
		close(kept_lock);
	kept_lock = -1;
}

/* Does the worst of it all the time, while it is wanted. */
static _Atomic bool thread_wanted, thread_busy;

static void *disturb(void *arg)
{
	uint32_t state = 1;

	for (;;) {
		(void)arg;
		thread_busy = true; /* before it looks: who sees it idle knows that it stays so */
		if (!thread_wanted) {
			thread_busy = false;
			usleep(50);
			continue;
		}
		state = state * 1664525 + 1013904223;
		if (state >> 31)
			fill_page(state >> 8, (uint8_t)(state >> 16));
		else
			cut((uint8_t)(state >> 16));
	}
	return NULL;
}

static void disturb_more(bool wanted)
{
	static bool started;
	pthread_t thread;

	if (wanted && !started)
		fuzz_require(!pthread_create(&thread, NULL, disturb, NULL) && !pthread_detach(thread));
	started |= wanted;
	thread_wanted = wanted;
	while (!wanted && thread_busy)
		usleep(10);
}

/* ---- VMs ------------------------------------------------------------------------------------------ */

static void open_vm(unsigned vm)
{
	struct track *before = vms[vm];
	int r;

	if (before)
		return;
	r = track_open(".", 1, 2, pages, &vms[vm]);
	fuzz_require(r <= 0 && (r ? !vms[vm] : vms[vm] != NULL));
}

static void close_vm(unsigned vm)
{
	track_close(vms[vm]);
	vms[vm] = NULL;
}

/* A volume that is too long to be mapped. */
static void open_huge(uint8_t bits)
{
	struct track *none = NULL;
	uint64_t huge = (UINT64_C(1) << (40 + bits % 24)) + (bits & 128);

	fuzz_require(track_open(".", 3, 4, huge, &none) < 0 && !none);
}

struct part {
	uint64_t page, pages;
};

static struct part next_part(struct fuzz_reader *in)
{
	struct part part = { .page = fuzz_number(in, 2) % pages };

	part.pages = fuzz_byte(in) % (pages - part.page + 1);
	return part;
}

static void ask(struct track *t, struct part part)
{
	double likelihood = track_likelihood(t, part.page, part.pages);
	uint64_t one = 0, many = 0;
	uint32_t readers = track_readers(t);

	fuzz_require(likelihood >= 0 && likelihood <= 1);
	fuzz_require(readers >= 1 && readers <= TRACK_SLOTS);
	fuzz_require(track_maps(t, part.page) <= (uint64_t)TRACK_SLOTS * COUNT_MAX);
	track_groups(t, &one, &many);
	fuzz_require(one <= pages && many <= pages - one);
}

static void use(struct track *t, uint8_t how, struct part part)
{
	uint64_t joined;

	switch (how % 8) {
	case 0:
		track_note_read(t, part.page, part.pages);
		break;
	case 1:
		joined = track_begin_flight(t, part.page, part.pages);
		fuzz_require(joined <= part.pages);
		break;
	case 2:
		track_end_flight(t, part.page, part.pages);
		break;
	case 3:
		track_add_maps(t, part.page, part.pages);
		break;
	case 4:
		track_drop_maps(t, part.page, part.pages);
		break;
	case 5:
		track_refresh(t);
		break;
	default:
		ask(t, part);
	}
}

/* ---- one input ------------------------------------------------------------------------------------ */

static void operate(struct fuzz_reader *in)
{
	uint8_t operation = fuzz_byte(in), argument = fuzz_byte(in);
	unsigned vm = argument % VMS;
	size_t bytes = 8;
	off_t at;

	switch (operation % 16) {
	case 0:
	case 1:
		open_vm(vm);
		break;
	case 2:
		close_vm(vm);
		break;
	case 3: /* the header of a VM that lives, or may */
		at = argument % 64 * 64 + (argument & 64 ? 8 : 0);
		write_at(at, fuzz_bytes(in, &bytes), bytes);
		break;
	case 4:
		at = (off_t)(fuzz_number(in, 3) % (FILE_PAGES_MAX * OS_PAGE_BYTES));
		write_at(at, fuzz_bytes(in, &bytes), bytes);
		break;
	case 5:
		fill_page((uint32_t)fuzz_number(in, 2), argument);
		break;
	case 6:
		cut(argument);
		break;
	case 7:
		put_in_its_place(argument);
		break;
	case 8:
		if (argument & 1)
			keep_locks(argument, fuzz_byte(in));
		else
			let_locks_go();
		break;
	case 9:
		open_huge(argument);
		break;
	default:
		if (vms[vm])
			use(vms[vm], argument / VMS, next_part(in));
	}
}

static void on_sigbus(int signal_number, siginfo_t *info, void *context)
{
	(void)context;
	if (os_absorb_fault(info->si_addr))
		return;
	signal(signal_number, SIG_DFL);
	abort();
}

static void prepare(uint8_t settings)
{
	static const uint64_t lengths[] = { 1, 7, 1023, 1024, 1025, 3000, 5000, 100000 };
	struct sigaction absorb = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO };

	if (!path[0])
		fuzz_require(!sigaction(SIGBUS, &absorb, NULL));
	fuzz_directory();
	close(open("precious", O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
	pages = lengths[settings % 8];
	snprintf(path, sizeof path, "1-2-%ju.v1", (uintmax_t)pages);
}

static unsigned count_descriptors(void)
{
	DIR *dir = opendir("/proc/self/fd");
	unsigned count = 0;

	fuzz_require(dir);
	while (readdir(dir))
		count++;
	closedir(dir);
	return count;
}

/* Nothing is left of what has been: no descriptor, no guard of a view, no lock. */
static void check_end(unsigned descriptors)
{
	struct track *t = NULL;
	struct stat st;

	put_in_its_place(5);
	fuzz_require(!stat("precious", &st) && st.st_size == 0);
	fuzz_require(!track_open(".", 1, 2, pages, &t));
	fuzz_require(track_readers(t) == 1 && track_maps(t, 0) == 0);
	track_add_maps(t, 0, 1);
	fuzz_require(track_maps(t, 0) == 1);
	track_close(t);
	unlink(path);
	fuzz_require(count_descriptors() == descriptors);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	struct fuzz_reader in = { data, data + bytes };
	uint8_t settings = fuzz_byte(&in);
	unsigned descriptors;

	prepare(settings);
	descriptors = count_descriptors();
	disturb_more(settings & SETTING_THREAD);
	for (unsigned n = 0; in.at < in.end && n < OPERATIONS_MAX; n++)
		operate(&in);
	disturb_more(false);
	for (unsigned vm = 0; vm < VMS; vm++)
		close_vm(vm);
	let_locks_go();
	check_end(descriptors);
	return 0;
}
