/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Bytes as a QEMU command line: words that end in NUL, the last of them the text of every
 * -readconfig file. Whatever they are, the plan is sound or the refusal says why.
 */
#include "fuzz.h"

#include "cli/qemu_args.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define WORDS_MAX 64

static const struct fuzz_token tokens[] = {
	FUZZ_TEXT("-m"),
	FUZZ_TEXT("-machine"),
	FUZZ_TEXT("-M"),
	FUZZ_TEXT("-object"),
	FUZZ_TEXT("-device"),
	FUZZ_TEXT("-netdev"),
	FUZZ_TEXT("-numa"),
	FUZZ_TEXT("-readconfig"),
	FUZZ_TEXT("-global"),
	FUZZ_TEXT("-drive"),
	FUZZ_TEXT("-blockdev"),
	FUZZ_TEXT("-overcommit"),
	FUZZ_TEXT("-name"),
	FUZZ_TEXT("-incoming"),
	FUZZ_TEXT("-hda"),
	FUZZ_TEXT("size="),
	FUZZ_TEXT("memory.size="),
	FUZZ_TEXT("memdev="),
	FUZZ_TEXT("id="),
	FUZZ_TEXT("type="),
	FUZZ_TEXT("driver="),
	FUZZ_TEXT("qom-type="),
	FUZZ_TEXT("blob=on"),
	FUZZ_TEXT("mem-lock=on"),
	FUZZ_TEXT("vfio-pci"),
	FUZZ_TEXT("vhost-user"),
	FUZZ_TEXT("microvm"),
	FUZZ_TEXT("{\"driver\":"),
	FUZZ_TEXT("{\"qom-type\":\""),
	FUZZ_TEXT("\"}"),
	FUZZ_TEXT("[memory]\n"),
	FUZZ_TEXT("[object \""),
	FUZZ_TEXT("\"]\n"),
	FUZZ_TEXT(" = \""),
	FUZZ_TEXT(",,"),
	FUZZ_TEXT(","),
	FUZZ_TEXT("="),
	FUZZ_TEXT("0x"),
	FUZZ_TEXT("1.5G"),
	FUZZ_TEXT("18446744073709551615"),
	FUZZ_TEXT("nvme://"),
	FUZZ_TEXT(".file.driver="),
	FUZZ_TEXT("pc.ram"),
	{ NULL, 0 },
};

const struct fuzz_target fuzz_target = { "qemu_args", 2048, tokens, true };

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

	fuzz_require(text != NULL);
	memcpy(text, data, bytes);
	text[bytes] = 0;
	for (size_t at = 0; at < bytes && count < WORDS_MAX; at += strlen(text + at) + 1)
		words[count++] = text + at;

	memset(&plan, 0xa5, sizeof plan);
	before = plan;
	r = qemu_args_plan(count, words, read_config, (void *)words[count - 1], &plan, why);
	if (r) {
		fuzz_require(r == -EINVAL && memchr(why, 0, sizeof why) && why[0]);
		fuzz_require(!memcmp(&plan, &before, sizeof plan));
	} else {
		fuzz_require(plan.ram_bytes && plan.ram_bytes % 8192 == 0 && plan.ram_bytes <= INT64_MAX);
		fuzz_require(memchr(plan.block_name, 0, sizeof plan.block_name) && plan.block_name[0]);
		fuzz_require(memchr(plan.guest_name, 0, sizeof plan.guest_name) != NULL);
		fuzz_require(memchr(plan.excluded_by, 0, sizeof plan.excluded_by) != NULL);
		fuzz_require(!plan.excludes == !plan.excluded_by[0]);
	}
	free(text);
	return 0;
}
