/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Bytes as the "machine" of a manifest, or (first byte odd) as a command line of words that end in NUL, of which
 * one is made. Whatever is believed of it names no file of the host, and is the same after a way there and back.
 */
#include "fuzz.h"

#include "snapshot/machine.h"

#include <stdlib.h>
#include <string.h>

#define WORDS_MAX 64

static const struct fuzz_token tokens[] = {
	FUZZ_TEXT("{\"type\": \"pc\", \"options\": ["),
	FUZZ_TEXT("{\"option\": \""),
	FUZZ_TEXT("\", \"properties\": [[\""),
	FUZZ_TEXT("\", \""),
	FUZZ_TEXT("\"]]}"),
	FUZZ_TEXT("]}"),
	FUZZ_TEXT("device"),
	FUZZ_TEXT("driver"),
	FUZZ_TEXT("virtio-blk-pci"),
	FUZZ_TEXT("vmgenid"),
	FUZZ_TEXT("chardev"),
	FUZZ_TEXT("backend"),
	FUZZ_TEXT("socket"),
	FUZZ_TEXT("path"),
	FUZZ_TEXT("romfile"),
	FUZZ_TEXT("netdev"),
	FUZZ_TEXT("serial"),
	FUZZ_TEXT("chardev:"),
	FUZZ_TEXT("file:/x"),
	FUZZ_TEXT("-drive"),
	FUZZ_TEXT("-blockdev"),
	FUZZ_TEXT("node-name=root"),
	FUZZ_TEXT("id=root"),
	FUZZ_TEXT("file=/x"),
	FUZZ_TEXT("-hda"),
	FUZZ_TEXT("-cpu"),
	FUZZ_TEXT("-global"),
	FUZZ_TEXT("{run}"),
	FUZZ_TEXT("../"),
	FUZZ_TEXT(","),
	FUZZ_TEXT("\\u0000"),
	{ NULL, 0 },
};

const struct fuzz_target fuzz_target = { "machine", 2048, tokens, true };

/* One slash is our own (the socket in the run directory), and one may be in an address (10.0.2.0/24). */
static void check_word(const char *option, const char *word)
{
	bool net = !strcmp(option, "-netdev") || !strcmp(option, "-nic");
	const char *ours = !strcmp(option, "-chardev") ? strstr(word, ",path={run}/") : NULL;

	for (const char *at = word; *at; at++) {
		fuzz_require((unsigned char)*at >= ' ' && (unsigned char)*at < 0x7f);
		if (*at != '/' || at == (ours ? ours + 11 : NULL))
			continue;
		fuzz_require(net && at > word && at[-1] != '=' && at[-1] != ',');
	}
	fuzz_require(!strstr(word, "file=/") && !strstr(word, "filename="));
}

static void check_machine(const struct machine *m)
{
	struct machine *again = NULL;
	struct json_object *json = machine_to_json(m);
	char why[MACHINE_WHY_BYTES], **argv;
	int argc;

	fuzz_require(!machine_from_json(json, &again, why));
	fuzz_require(again->count == m->count && !strcmp(again->type, m->type));
	fuzz_require(!machine_to_argv(again, &argc, &argv));
	fuzz_require(!strcmp(argv[0], "qemu-system-x86_64"));
	for (int i = 1; i < argc; i++)
		check_word(argv[i - 1], argv[i]);
	machine_free_argv(argv);
	machine_free(again);
	json_object_put(json);
}

static int from_text(char *text, struct machine **ret_machine, char *why)
{
	struct json_object *json = json_tokener_parse(text);
	int r = machine_from_json(json, ret_machine, why);

	json_object_put(json);
	return r;
}

static int from_words(char *text, size_t bytes, struct machine **ret_machine, char *why)
{
	static const char *const saved[] = { "root", "ide0-hd0" };
	const char *words[WORDS_MAX] = { "qemu-system-x86_64" };
	int count = 1;

	for (size_t at = 0; at < bytes && count < WORDS_MAX; at += strlen(text + at) + 1)
		words[count++] = text + at;
	return machine_from_argv(count, words, "pc-q35-7.2", saved, 2, ret_machine, why);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	char *text = malloc(bytes + 1), why[MACHINE_WHY_BYTES] = "";
	struct machine *m = NULL;
	int r;

	fuzz_require(text != NULL);
	memcpy(text, data, bytes);
	text[bytes] = 0;
	if (bytes && data[0] & 1)
		r = from_words(text + 1, bytes - 1, &m, why);
	else
		r = from_text(text + (bytes > 0), &m, why);
	if (r)
		fuzz_require(!m && why[0] && memchr(why, 0, sizeof why));
	else
		check_machine(m);
	machine_free(m);
	free(text);
	return 0;
}
