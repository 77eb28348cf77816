/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Bytes as a QEMU command line: words that end in NUL, the last of them the text of every
 * -readconfig file. Whatever they are, the plan is sound or the refusal says why.
 *
 * With clang: -fsanitize=fuzzer,address,undefined. With gcc: -DFUZZ_STANDALONE, and then
 *     fuzz_qemu_args SECONDS [SEED] [CORPUS FILE OR DIRECTORY…]
 * runs the corpus once, then seeded mutations of it for SECONDS. An input that fails is written to
 * ./crash-qemu_args.
 */
#include "cli/qemu_args.h"

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define WORDS_MAX 64

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static void require(int holds)
{
	if (!holds)
		abort();
}

static char *read_config(void *ctx, const char *path)
{
	(void)path;
	return strdup(ctx);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	const char *words[WORDS_MAX] = { "qemu-system-x86_64" };
	char *text = malloc(bytes + 1), why[QEMU_ARGS_WHY_BYTES] = "";
	struct qemu_plan plan, before;
	int count = 1, r;

	require(text != NULL);
	memcpy(text, data, bytes);
	text[bytes] = 0;
	for (size_t at = 0; at < bytes && count < WORDS_MAX; at += strlen(text + at) + 1)
		words[count++] = text + at;

	memset(&plan, 0xa5, sizeof plan);
	before = plan;
	r = qemu_args_plan(count, words, read_config, (void *)words[count - 1], &plan, why);
	if (r) {
		require(r == -EINVAL && memchr(why, 0, sizeof why) && why[0]);
		require(!memcmp(&plan, &before, sizeof plan));
	} else {
		require(plan.ram_bytes && plan.ram_bytes % 8192 == 0 && plan.ram_bytes <= INT64_MAX);
		require(memchr(plan.block_name, 0, sizeof plan.block_name) && plan.block_name[0]);
		require(memchr(plan.guest_name, 0, sizeof plan.guest_name) != NULL);
		require(memchr(plan.excluded_by, 0, sizeof plan.excluded_by) != NULL);
		require(!plan.excludes == !plan.excluded_by[0]);
	}
	free(text);
	return 0;
}

#ifdef FUZZ_STANDALONE

#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define INPUT_MAX_BYTES 2048
#define INPUTS_MAX 256

struct input {
	uint8_t data[INPUT_MAX_BYTES];
	size_t bytes;
};

static struct input corpus[INPUTS_MAX], current;
static size_t corpus_inputs;
static uint64_t random_state = 1;

/* Words that a random byte would hardly ever hit. */
static const char *const tokens[] = {
	"-m",
	"-machine",
	"-M",
	"-object",
	"-device",
	"-netdev",
	"-numa",
	"-readconfig",
	"-global",
	"-drive",
	"-blockdev",
	"-overcommit",
	"-name",
	"-incoming",
	"-hda",
	"size=",
	"memory.size=",
	"memdev=",
	"id=",
	"type=",
	"driver=",
	"qom-type=",
	"blob=on",
	"mem-lock=on",
	"vfio-pci",
	"vhost-user",
	"microvm",
	"{\"driver\":",
	"{\"qom-type\":\"",
	"\"}",
	"[memory]\n",
	"[object \"",
	"\"]\n",
	" = \"",
	",,",
	",",
	"=",
	"0x",
	"1.5G",
	"18446744073709551615",
	"nvme://",
	".file.driver=",
	"pc.ram",
};

static uint32_t random_below(uint32_t limit)
{
	random_state = random_state * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)(random_state >> 33) % limit;
}

static void on_failure(int signal_number)
{
	FILE *file = fopen("crash-qemu_args", "w");

	if (file) {
		fwrite(current.data, 1, current.bytes, file);
		fclose(file);
	}
	signal(signal_number, SIG_DFL);
	raise(signal_number);
}

static void load(const char *path)
{
	DIR *dir = opendir(path);
	struct dirent *entry;
	FILE *file;

	while (dir && (entry = readdir(dir))) {
		char inner[1024];

		snprintf(inner, sizeof inner, "%s/%s", path, entry->d_name);
		if (entry->d_name[0] != '.')
			load(inner);
	}
	if (dir) {
		closedir(dir);
		return;
	}
	file = corpus_inputs < INPUTS_MAX ? fopen(path, "r") : NULL;
	if (!file)
		return;
	corpus[corpus_inputs].bytes = fread(corpus[corpus_inputs].data, 1, INPUT_MAX_BYTES, file);
	corpus_inputs++;
	fclose(file);
}

static void insert(const void *what, size_t bytes)
{
	size_t at = random_below((uint32_t)current.bytes + 1);

	if (current.bytes + bytes > INPUT_MAX_BYTES)
		return;
	memmove(current.data + at + bytes, current.data + at, current.bytes - at);
	memcpy(current.data + at, what, bytes);
	current.bytes += bytes;
}

static void mutate(void)
{
	if (corpus_inputs)
		current = corpus[random_below((uint32_t)corpus_inputs)];
	for (uint32_t n = 1 + random_below(8); n; n--) {
		const char *token = tokens[random_below(sizeof tokens / sizeof tokens[0])];
		uint8_t byte = (uint8_t)random_below(128);

		switch (random_below(4)) {
		case 0:
			insert(token, strlen(token) + random_below(2)); /* with its NUL, or without */
			break;
		case 1:
			insert(&byte, 1);
			break;
		case 2:
			if (current.bytes)
				current.data[random_below((uint32_t)current.bytes)] = byte;
			break;
		default:
			current.bytes -= current.bytes ? random_below((uint32_t)current.bytes) / 4 : 0;
		}
	}
}

int main(int argc, char **argv)
{
	time_t end = time(NULL) + (argc > 1 ? atoi(argv[1]) : 5);
	uint64_t runs = 0;

	signal(SIGABRT, on_failure);
	signal(SIGSEGV, on_failure);
	for (int i = 2; i < argc; i++) {
		if (i == 2 && !argv[i][strspn(argv[i], "0123456789")])
			random_state = strtoull(argv[i], NULL, 10);
		else
			load(argv[i]);
	}
	for (size_t i = 0; i < corpus_inputs; i++) {
		current = corpus[i];
		LLVMFuzzerTestOneInput(current.data, current.bytes);
	}
	for (; time(NULL) < end; runs++) {
		mutate();
		LLVMFuzzerTestOneInput(current.data, current.bytes);
	}
	printf("fuzz_qemu_args: %zu corpus files, %ju mutations, all sound\n", corpus_inputs,
	       (uintmax_t)runs);
	return 0;
}

#endif
