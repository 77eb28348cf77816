/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* Anonymous memory with contents that can be verified at any time.
 *
 *   mem hold NAME MIB SEED [random|zero|word|mixed|text]
 *        starts a holder in the background; returns when the memory is filled
 *   mem check NAME [FIRST COUNT]            verifies pages
 *   mem write NAME FIRST COUNT              gives pages new contents
 *   mem discard NAME FIRST COUNT            MADV_DONTNEED: they are zero after it
 *   mem touch NAME FIRST COUNT SECONDS PERIOD_MS r|w
 *        every period reads (or rewrites unchanged) one word of each page
 *   mem churn NAME FIRST COUNT SECONDS PAGES_PER_S
 *        verifies and rewrites random pages; 0 pages per second: no limit
 *   mem pfns NAME [FIRST COUNT]             runs of "page pfn count"
 *   mem free NAME                           ends the holder
 *
 * Contents of a page follow from (seed, page, generation), so guests that hold
 * with one seed hold equal pages. Operations of one holder may run at the same
 * time; each page is locked while it is read or written. */
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define WORDS_PER_PAGE (PAGE_BYTES / sizeof(uint64_t))
#define PAGES_PER_MIB (1048576u / PAGE_BYTES)
#define GENERATION_DISCARDED UINT32_MAX
#define REQUEST_MAX_BYTES 256
#define MAX_WORDS 8

enum kind { RANDOM, ZERO, WORD, MIXED, TEXT };

static struct {
	uint64_t *words;
	uint32_t *generations;
	uint64_t n_pages;
	uint64_t seed;
	enum kind kind;
	pthread_mutex_t lock; /* protects contents and generations */
} held = { .lock = PTHREAD_MUTEX_INITIALIZER };

struct request {
	int fd;
	int n_words;
	char *words[MAX_WORDS];
	char text[REQUEST_MAX_BYTES];
	uint64_t first, count;
};

/* ---- contents ---- */

static enum kind page_kind(uint64_t page)
{
	static const enum kind mixed[4] = { RANDOM, ZERO, RANDOM, WORD };

	if (held.generations[page] == GENERATION_DISCARDED)
		return ZERO;
	return held.kind == MIXED ? mixed[page % 4] : held.kind;
}

static uint64_t page_state(uint64_t page)
{
	return mix64(held.seed ^ mix64(page << 24 ^ held.generations[page]));
}

static uint64_t expected_word(enum kind kind, uint64_t state, uint64_t index)
{
	switch (kind) {
	case ZERO:
		return 0;
	case WORD:
		return (state % 16) * 0x0101010101010101u;
	case TEXT: /* differs from page to page, and packs well */
		return index % 8 ? 0x2c736567617020 + index % 8 : (state + index) * 0x9e3779b97f4a7c15u;
	default:
		return (state + index) * 0x9e3779b97f4a7c15u;
	}
}

static void fill_page(uint64_t page)
{
	uint64_t *words = held.words + page * WORDS_PER_PAGE;
	enum kind kind = page_kind(page);
	uint64_t state = page_state(page);

	for (uint64_t i = 0; i < WORDS_PER_PAGE; i++)
		words[i] = expected_word(kind, state, i);
}

static int page_is_right(uint64_t page)
{
	const uint64_t *words = held.words + page * WORDS_PER_PAGE;
	enum kind kind = page_kind(page);
	uint64_t state = page_state(page);
	uint64_t differing = 0;

	for (uint64_t i = 0; i < WORDS_PER_PAGE; i++)
		differing |= words[i] ^ expected_word(kind, state, i);
	return differing == 0;
}

static void renew_page(uint64_t page)
{
	uint32_t generation = held.generations[page];

	held.generations[page] = generation >= GENERATION_DISCARDED - 1 ? 1 : generation + 1;
	fill_page(page);
}

/* ---- operations; each answers "ok ..." or "bad ..." ---- */

static void reply(const struct request *request, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vdprintf(request->fd, format, args);
	va_end(args);
}

static void report(const struct request *request, uint64_t n_bad, uint64_t first_bad, uint64_t n_pages)
{
	if (n_bad == 0)
		reply(request, "ok pages=%llu\n", (unsigned long long)n_pages);
	else
		reply(request, "bad pages=%llu of=%llu first=%llu\n", (unsigned long long)n_bad,
		      (unsigned long long)n_pages, (unsigned long long)first_bad);
}

static void op_check(struct request *request)
{
	uint64_t n_bad = 0, first_bad = 0;

	for (uint64_t page = request->first; page < request->first + request->count; page++) {
		pthread_mutex_lock(&held.lock);
		int right = page_is_right(page);
		pthread_mutex_unlock(&held.lock);
		if (!right && n_bad++ == 0)
			first_bad = page;
	}
	report(request, n_bad, first_bad, request->count);
}

static void op_write(struct request *request)
{
	for (uint64_t page = request->first; page < request->first + request->count; page++) {
		pthread_mutex_lock(&held.lock);
		renew_page(page);
		pthread_mutex_unlock(&held.lock);
	}
	report(request, 0, 0, request->count);
}

static void op_discard(struct request *request)
{
	pthread_mutex_lock(&held.lock);
	int failed = madvise(held.words + request->first * WORDS_PER_PAGE, request->count * PAGE_BYTES,
			     MADV_DONTNEED);
	for (uint64_t i = 0; !failed && i < request->count; i++)
		held.generations[request->first + i] = GENERATION_DISCARDED;
	pthread_mutex_unlock(&held.lock);
	report(request, failed ? request->count : 0, request->first, request->count);
}

static int touch_page(uint64_t page, int writing)
{
	volatile uint64_t *words = held.words + page * WORDS_PER_PAGE;

	pthread_mutex_lock(&held.lock);
	uint64_t index = page % WORDS_PER_PAGE;
	uint64_t value = words[index];
	if (writing)
		words[index] = value;
	int right = value == expected_word(page_kind(page), page_state(page), index);
	pthread_mutex_unlock(&held.lock);
	return right;
}

static void op_touch(struct request *request)
{
	uint64_t seconds, period_ms, rounds = 0, n_bad = 0, first_bad = 0;

	if (request->n_words != 7 || parse_u64(request->words[4], &seconds) != 0 ||
	    parse_u64(request->words[5], &period_ms) != 0) {
		reply(request, "bad usage\n");
		return;
	}
	int writing = request->words[6][0] == 'w';
	for (uint64_t end_ns = now_ns() + seconds * 1000000000u; now_ns() < end_ns; rounds++) {
		for (uint64_t i = 0; i < request->count; i++)
			if (!touch_page(request->first + i, writing) && n_bad++ == 0)
				first_bad = request->first + i;
		usleep((useconds_t)(period_ms * 1000));
	}
	report(request, n_bad, first_bad, rounds * request->count);
}

static int verify_and_renew(uint64_t page)
{
	pthread_mutex_lock(&held.lock);
	int right = page_is_right(page);
	renew_page(page);
	pthread_mutex_unlock(&held.lock);
	return right;
}

static void op_churn(struct request *request)
{
	uint64_t seconds, pages_per_s, done = 0, n_bad = 0, first_bad = 0;

	if (request->n_words != 6 || parse_u64(request->words[4], &seconds) != 0 ||
	    parse_u64(request->words[5], &pages_per_s) != 0) {
		reply(request, "bad usage\n");
		return;
	}
	uint64_t start_ns = now_ns(), end_ns = start_ns + seconds * 1000000000u;
	for (uint64_t time_ns = start_ns; time_ns < end_ns; time_ns = now_ns()) {
		if (pages_per_s != 0 && done * 1000000000u > (time_ns - start_ns) * pages_per_s) {
			usleep(1000);
			continue;
		}
		uint64_t page = request->first + mix64(held.seed + done) % request->count;
		if (!verify_and_renew(page) && n_bad++ == 0)
			first_bad = page;
		done++;
	}
	report(request, n_bad, first_bad, done);
}

/* The kernel's page frame number, 0 when the page is not present. */
static uint64_t read_pfn(int pagemap_fd, uint64_t page)
{
	uint64_t entry = 0;
	uint64_t virtual_page = (uint64_t)(uintptr_t)held.words / PAGE_BYTES + page;

	if (pread(pagemap_fd, &entry, sizeof(entry), (off_t)(virtual_page * sizeof(entry))) !=
	    sizeof(entry))
		return 0;
	return entry >> 63 ? entry & ((1ull << 55) - 1) : 0;
}

static void op_pfns(struct request *request)
{
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	FILE *out = fdopen(dup(request->fd), "w");
	uint64_t end = request->first + request->count;

	for (uint64_t page = request->first; page < end;) {
		uint64_t pfn = read_pfn(fd, page), length = 1;
		while (pfn != 0 && page + length < end && read_pfn(fd, page + length) == pfn + length)
			length++;
		if (pfn != 0)
			fprintf(out, "%llu %llu %llu\n", (unsigned long long)page,
				(unsigned long long)pfn, (unsigned long long)length);
		page += length;
	}
	fclose(out);
	close(fd);
}

static void op_free(struct request *request)
{
	report(request, 0, 0, held.n_pages);
	_exit(0);
}

static const struct {
	const char *name;
	void (*run)(struct request *request);
} operations[] = {
	{ "check", op_check }, { "write", op_write }, { "discard", op_discard }, { "touch", op_touch },
	{ "churn", op_churn }, { "pfns", op_pfns },   { "free", op_free },
};

/* ---- the holder ---- */

static void split_words(struct request *request)
{
	char *rest = NULL;

	for (char *word = strtok_r(request->text, " \n", &rest);
	     word != NULL && request->n_words < MAX_WORDS; word = strtok_r(NULL, " \n", &rest))
		request->words[request->n_words++] = word;
}

/* Words: operation, name, first page, count. Without the last two, all pages. */
static int parse_range(struct request *request)
{
	request->first = 0;
	request->count = held.n_pages;
	if (request->n_words < 4)
		return 0;
	if (parse_u64(request->words[2], &request->first) != 0 ||
	    parse_u64(request->words[3], &request->count) != 0)
		return -EINVAL;
	if (request->count == 0 || request->first >= held.n_pages ||
	    request->count > held.n_pages - request->first)
		return -ERANGE;
	return 0;
}

static void run_request(struct request *request)
{
	if (request->n_words < 2 || parse_range(request) != 0) {
		reply(request, "bad request\n");
		return;
	}
	for (size_t i = 0; i < sizeof(operations) / sizeof(operations[0]); i++) {
		if (strcmp(request->words[0], operations[i].name) == 0) {
			operations[i].run(request);
			return;
		}
	}
	reply(request, "bad operation\n");
}

static void *serve_connection(void *argument)
{
	struct request *request = argument;
	ssize_t bytes = read(request->fd, request->text, sizeof(request->text) - 1);

	if (bytes > 0) {
		request->text[bytes] = '\0';
		split_words(request);
		run_request(request);
	}
	close(request->fd);
	free(request);
	return NULL;
}

static socklen_t holder_address(const char *name, struct sockaddr_un *ret_address)
{
	memset(ret_address, 0, sizeof(*ret_address));
	ret_address->sun_family = AF_UNIX;
	/* A leading zero byte: the abstract name space, no file is left behind. */
	int length = snprintf(ret_address->sun_path + 1, sizeof(ret_address->sun_path) - 1,
			      "latent-mem-%.60s", name);
	return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)length);
}

static int listen_as(const char *name)
{
	struct sockaddr_un address;
	socklen_t length = holder_address(name, &address);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0 || bind(fd, (struct sockaddr *)&address, length) != 0 || listen(fd, 16) != 0)
		return -errno;
	return fd;
}

static void *map_bytes(size_t bytes)
{
	void *address = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	return address == MAP_FAILED ? NULL : address;
}

static int allocate_and_fill(uint64_t mib)
{
	held.n_pages = mib * PAGES_PER_MIB;
	held.words = map_bytes(held.n_pages * PAGE_BYTES);
	held.generations = map_bytes(held.n_pages * sizeof(uint32_t));
	if (held.words == NULL || held.generations == NULL)
		return -ENOMEM;
	for (uint64_t page = 0; page < held.n_pages; page++)
		fill_page(page);
	return 0;
}

static void accept_forever(int listen_fd)
{
	for (;;) {
		pthread_t thread;
		struct request *request = calloc(1, sizeof(*request));
		if (request == NULL)
			_exit(1);
		request->fd = accept4(listen_fd, NULL, NULL, SOCK_CLOEXEC);
		if (request->fd < 0 || pthread_create(&thread, NULL, serve_connection, request) != 0) {
			free(request);
			continue;
		}
		pthread_detach(thread);
	}
}

static void become_holder(const char *name, uint64_t mib, int ready_fd)
{
	int listen_fd = listen_as(name);

	setsid();
	if (listen_fd < 0 || allocate_and_fill(mib) != 0)
		_exit(1);
	int null_fd = open("/dev/null", O_RDWR);
	for (int fd = 0; fd < 3; fd++)
		dup2(null_fd, fd);
	if (write(ready_fd, "", 1) != 1)
		_exit(1);
	close(ready_fd);
	signal(SIGPIPE, SIG_IGN);
	accept_forever(listen_fd);
}

static int parse_kind(const char *text, enum kind *ret_kind)
{
	static const char *const names[] = { "random", "zero", "word", "mixed", "text" };

	for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
		if (strcmp(text, names[i]) == 0) {
			*ret_kind = (enum kind)i;
			return 0;
		}
	}
	return -EINVAL;
}

static int hold(int argc, char **argv)
{
	uint64_t mib;
	int ready_fds[2];
	char byte;

	if (argc < 5 || argc > 6 || parse_u64(argv[3], &mib) != 0 || mib == 0 || mib > 1u << 20 ||
	    parse_u64(argv[4], &held.seed) != 0 || parse_kind(argc > 5 ? argv[5] : "random", &held.kind))
		return 2;
	if (pipe2(ready_fds, O_CLOEXEC) != 0)
		return 1;
	pid_t pid = fork();
	if (pid == 0)
		become_holder(argv[2], mib, ready_fds[1]);
	close(ready_fds[1]);
	if (pid < 0 || read(ready_fds[0], &byte, 1) != 1) {
		fprintf(stderr, "mem: cannot hold %s (is the name in use?)\n", argv[2]);
		return 1;
	}
	printf("ok pid=%d\n", (int)pid);
	return 0;
}

/* ---- the asking side ---- */

static int connect_to(const char *name)
{
	struct sockaddr_un address;
	socklen_t length = holder_address(name, &address);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0 || connect(fd, (struct sockaddr *)&address, length) != 0)
		return -errno;
	return fd;
}

static void send_words(int fd, int argc, char **argv)
{
	char text[REQUEST_MAX_BYTES] = "";
	size_t length = 0;

	for (int i = 1; i < argc && length < sizeof(text); i++)
		length += (size_t)snprintf(text + length, sizeof(text) - length, "%s ", argv[i]);
	dprintf(fd, "%s", text);
}

/* Copies the answer to standard output; 1 if it begins with "bad" or is empty. */
static int print_answer(int fd, int may_be_empty)
{
	char text[4096], first = '\0';
	ssize_t bytes;

	while ((bytes = read(fd, text, sizeof(text))) > 0) {
		if (first == '\0')
			first = text[0];
		if (write(1, text, (size_t)bytes) != bytes)
			return 1;
	}
	return first == 'b' || (first == '\0' && !may_be_empty);
}

int cmd_mem(int argc, char **argv)
{
	if (argc >= 3 && strcmp(argv[1], "hold") == 0)
		return hold(argc, argv);
	if (argc < 3)
		return 2;
	int fd = connect_to(argv[2]);
	if (fd < 0) {
		fprintf(stderr, "mem: no holder %s: %s\n", argv[2], strerror(-fd));
		return 1;
	}
	send_words(fd, argc, argv);
	return print_answer(fd, strcmp(argv[1], "pfns") == 0);
}
