/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* Runs a fuzz target without libFuzzer. See fuzz.h. */
#include "fuzz.h"

#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#define INPUT_MAX_BYTES 8192u
#define INPUTS_MAX 512
#define INPUT_MAX_S 30
#define MEMORY_MAX_KIB (2l << 20)

struct input {
	uint8_t data[INPUT_MAX_BYTES];
	size_t bytes;
};

static struct input corpus[INPUTS_MAX];
static uint32_t corpus_inputs;
static uint64_t random_state = 1;
static int start_dir;                       /* the target may go elsewhere */
static const struct input *_Atomic running; /* read when something has failed */

/* The sanitizers': most of their reports end the process without a signal. */
void __sanitizer_set_death_callback(void (*callback)(void)) __attribute__((weak));

/* ---- failures --------------------------------------------------------------------------------- */

static void keep_input(void)
{
	const struct input *input = running;
	char name[64];
	int fd;

	running = NULL;
	if (!input)
		return;
	fuzz_capture_abandon();
	snprintf(name, sizeof name, "crash-%s", fuzz_target.name);
	fd = openat(start_dir, name, O_WRONLY | O_CREAT | O_TRUNC, 0644);
	if (fd < 0 || write(fd, input->data, input->bytes) != (ssize_t)input->bytes)
		fprintf(stderr, "fuzz_%s: the input that failed could not be kept\n", fuzz_target.name);
	else
		fprintf(stderr, "fuzz_%s: the input that failed is ./%s\n", fuzz_target.name, name);
}

static void on_failure(int signal_number)
{
	keep_input();
	if (signal_number == SIGALRM)
		fprintf(stderr, "fuzz_%s: no end after %d s\n", fuzz_target.name, INPUT_MAX_S);
	signal(signal_number, SIG_DFL);
	raise(signal_number);
}

static void watch_for_failures(void)
{
	static const int signals[] = { SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGALRM };
	struct sigaction action = { .sa_handler = on_failure, .sa_flags = SA_NODEFER };
	struct sigaction old;

	/* Where a sanitizer is, its own handlers say more. */
	for (size_t i = 0; i < sizeof signals / sizeof signals[0]; i++)
		if (!sigaction(signals[i], NULL, &old) && old.sa_handler == SIG_DFL)
			sigaction(signals[i], &action, NULL);
	if (__sanitizer_set_death_callback)
		__sanitizer_set_death_callback(keep_input);
}

static void run(const struct input *input)
{
	struct rusage usage;

	running = input;
	alarm(INPUT_MAX_S);
	LLVMFuzzerTestOneInput(input->data, input->bytes);
	alarm(0);
	fuzz_require(!getrusage(RUSAGE_SELF, &usage) && usage.ru_maxrss < MEMORY_MAX_KIB);
	running = NULL;
}

/* ---- the corpus ------------------------------------------------------------------------------- */

static void load_file(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = -1;

	if (fd >= 0 && corpus_inputs < INPUTS_MAX)
		n = read(fd, corpus[corpus_inputs].data, fuzz_target.max_bytes);
	if (fd >= 0)
		close(fd);
	if (n < 0) {
		fprintf(stderr, "fuzz_%s: cannot read %s\n", fuzz_target.name, path);
		exit(1);
	}
	corpus[corpus_inputs++].bytes = (size_t)n;
}

static int is_visible(const struct dirent *entry) { return entry->d_name[0] != '.'; }

/* In the order of names: the same inputs for the same seed. */
static void load(const char *path)
{
	struct dirent **entries;
	int count = scandir(path, &entries, is_visible, alphasort);
	char inner[PATH_MAX];

	if (count < 0) {
		load_file(path);
		return;
	}
	for (int i = 0; i < count; i++) {
		snprintf(inner, sizeof inner, "%s/%s", path, entries[i]->d_name);
		load_file(inner);
		free(entries[i]);
	}
	free(entries);
}

/* ---- mutations -------------------------------------------------------------------------------- */

static uint32_t random_below(uint32_t limit)
{
	random_state = random_state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
	return (uint32_t)(random_state >> 33) % limit;
}

static uint8_t random_byte(void)
{
	static const uint8_t telling[] = { 0, 1, 2, 0x7f, 0x80, 0xfe, 0xff };

	if (fuzz_target.text)
		return (uint8_t)random_below(128);
	return random_below(4) ? (uint8_t)random_below(256) : telling[random_below(sizeof telling)];
}

static size_t random_place(const struct input *input)
{
	return random_below((uint32_t)input->bytes + 1);
}

static void insert(struct input *input, const void *what, size_t bytes)
{
	size_t at = random_place(input);

	if (input->bytes + bytes > fuzz_target.max_bytes)
		return;
	memmove(input->data + at + bytes, input->data + at, input->bytes - at);
	memcpy(input->data + at, what, bytes);
	input->bytes += bytes;
}

static void overwrite(struct input *input, const void *what, size_t bytes)
{
	size_t at = random_place(input);

	if (at + bytes <= input->bytes)
		memcpy(input->data + at, what, bytes);
}

static void use_token(struct input *input)
{
	const struct fuzz_token *tokens = fuzz_target.tokens, *token;
	uint32_t count = 0;

	while (tokens && tokens[count].bytes)
		count++;
	if (!count)
		return;
	token = &tokens[random_below(count)];
	if (fuzz_target.text) /* with its NUL, or without */
		insert(input, token->bytes, token->count + random_below(2));
	else if (random_below(2))
		insert(input, token->bytes, token->count);
	else
		overwrite(input, token->bytes, token->count);
}

static void cut_out(struct input *input)
{
	size_t at = random_place(input), bytes = (input->bytes - at) / (1 + random_below(8));

	memmove(input->data + at, input->data + at + bytes, input->bytes - at - bytes);
	input->bytes -= bytes;
}

/* Goes on as another input does. */
static void splice_in(struct input *input)
{
	const struct input *other = &corpus[random_below(corpus_inputs)];
	size_t at = random_place(input), from = random_place(other), bytes = other->bytes - from;

	if (bytes > fuzz_target.max_bytes - at)
		bytes = fuzz_target.max_bytes - at;
	memcpy(input->data + at, other->data + from, bytes);
	input->bytes = at + bytes;
}

static void mutate_once(struct input *input)
{
	uint8_t byte = random_byte();

	switch (random_below(8)) {
	case 0:
	case 1:
		use_token(input);
		break;
	case 2:
		insert(input, &byte, 1);
		break;
	case 3:
		cut_out(input);
		break;
	case 4:
		if (corpus_inputs && !random_below(4))
			splice_in(input);
		break;
	default:
		overwrite(input, &byte, 1);
	}
}

static void make_random(struct input *input)
{
	input->bytes = 8 + random_below(256 - 8);
	for (size_t i = 0; i < input->bytes; i++)
		input->data[i] = random_byte();
}

static void make_input(struct input *input)
{
	if (!corpus_inputs || !random_below(4))
		make_random(input);
	else
		*input = corpus[random_below(corpus_inputs)];
	for (uint32_t n = 1 + random_below(8); n; n--)
		mutate_once(input);
}

/* ---- the run ---------------------------------------------------------------------------------- */

static double now_s(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
	double seconds = argc > 1 ? strtod(argv[1], NULL) : 5, end_s;
	static struct input input;
	uint64_t runs = 0;

	fuzz_require(fuzz_target.max_bytes >= 256 && fuzz_target.max_bytes <= INPUT_MAX_BYTES);
	start_dir = open(".", O_PATH | O_DIRECTORY | O_CLOEXEC);
	for (int i = 2; i < argc; i++) {
		if (i == 2 && !argv[i][strspn(argv[i], "0123456789")])
			random_state = strtoull(argv[i], NULL, 10);
		else
			load(argv[i]);
	}
	watch_for_failures();
	for (uint32_t i = 0; i < corpus_inputs; i++)
		run(&corpus[i]);
	for (end_s = now_s() + seconds; now_s() < end_s; runs++) {
		make_input(&input);
		run(&input);
	}
	printf("fuzz_%s: %u corpus files, %ju mutations, all sound\n", fuzz_target.name, corpus_inputs,
	       (uintmax_t)runs);
	return 0;
}
