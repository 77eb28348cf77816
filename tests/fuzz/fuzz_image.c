/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * `latent doctor IMAGE` on an image that is anything, with a qemu-img that says anything: it ends, and
 * what it prints is plain text or valid JSON.
 *
 * Input: settings (1 byte, see SETTING_*), the image's length (4 bytes), the number of patches (1 byte),
 * each with its place (3 bytes), length (1 byte) and contents; then, with their lengths (2 bytes), what
 * qemu-img says to `info` and to `check`. A guest finds in an image that is not raw what the file holds.
 */
#include "fuzz.h"

#include "cli/capture.h"
#include "cli/cli.h"
#include "cli/doctor.h"

#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define IMAGE "image"
#define IMAGE_MAX_BYTES (32u << 20)
#define CHECKS_MAX 120 /* some twenty, one for each of 64 layers, one for each of 32 partitions */

#define SETTING_FILE_TYPE 3 /* a regular file in most cases */
#define SETTING_NO_INFO 4
#define SETTING_NO_CHECK 8
#define SETTING_NO_CONVERT 16
#define SETTING_SHORT_CONVERT 32
#define SETTING_NO_TOOL 64

static const struct fuzz_token tokens[] = {
	FUZZ_TEXT("EFI PART"),
	FUZZ_TEXT("\x55\xaa"),
	FUZZ_TEXT("\x53\xef"),
	FUZZ_TEXT("QFI\xfb"),
	FUZZ_TEXT("\x00\x04\x00"), /* the place of a superblock */
	FUZZ_TEXT("\x00\x02\x00"),
	FUZZ_TEXT("\x80\x00\x00\x00"),
	FUZZ_TEXT("\xff\xff\xff\xff"),
	FUZZ_TEXT("\xff\xff\xff\xff\xff\xff\xff\xff"),
	FUZZ_TEXT("[{"),
	FUZZ_TEXT("{}"),
	FUZZ_TEXT("[]"),
	FUZZ_TEXT("null"),
	FUZZ_TEXT("\"filename\": \""),
	FUZZ_TEXT("\"format\": \"qcow2\""),
	FUZZ_TEXT("\"format\": \"raw\""),
	FUZZ_TEXT("\"format-specific\": {"),
	FUZZ_TEXT("\"data\": {"),
	FUZZ_TEXT("\"encrypt\": {}"),
	FUZZ_TEXT("\"allocated-clusters\": "),
	FUZZ_TEXT("\"compressed-clusters\": "),
	FUZZ_TEXT("18446744073709551615"),
	FUZZ_TEXT("\\u0000"),
	FUZZ_TEXT("\\u001b]0;"),
	FUZZ_TEXT("\\u00fc"),
	FUZZ_TEXT("\\ud800"),
	FUZZ_TEXT("\xc3\xbc"),
	FUZZ_TEXT("image"),
	FUZZ_TEXT("fifo"),
	FUZZ_TEXT("."),
	{ NULL, 0 },
};

const struct fuzz_target fuzz_target = { "image", 4096, tokens, false };

struct answer {
	const uint8_t *text;
	size_t bytes;
};

static uint8_t settings;
static struct answer info, check;

/* ---- the two things outside of the parsers that are not real ------------------------------------ */

void doctor_check_machine(struct check_list *list)
{
	check_found(check_add(list, "machine", "everything"), CHECK_OK, "fuzzed");
}

static char *say(struct answer answer, bool refused)
{
	char *text = refused ? NULL : malloc(answer.bytes + 1);

	if (text) {
		memcpy(text, answer.text, answer.bytes);
		text[answer.bytes] = 0;
	}
	return text;
}

/* Copies a part of the image to `fd`, beyond its end zeros. */
static char *convert(const char *source, int fd)
{
	static uint8_t part[65536];
	uintmax_t offset;
	size_t bytes;
	int image;

	fuzz_require(sscanf(source, "driver=raw,offset=%ju,size=%zu,", &offset, &bytes) == 2);
	fuzz_require(bytes <= sizeof part && offset <= INT64_MAX);
	if (settings & SETTING_NO_CONVERT)
		return NULL;
	if (settings & SETTING_SHORT_CONVERT)
		bytes /= 2;
	memset(part, 0, bytes);
	image = open(IMAGE, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	if (image < 0 || pread(image, part, bytes, (off_t)offset) < 0)
		memset(part, 0, bytes);
	if (image >= 0)
		close(image);
	fuzz_require(pwrite(fd, part, bytes, 0) == (ssize_t)bytes);
	return calloc(1, 1);
}

char *capture(const char *const *argv, int inherit_fd, size_t max_bytes, unsigned timeout_s,
	      int max_status)
{
	fuzz_require(!strcmp(argv[0], "qemu-img") && max_bytes <= 1 << 20 && timeout_s <= 120);
	(void)max_status;
	if (!strcmp(argv[1], "--version"))
		return say(info, settings & SETTING_NO_TOOL);
	if (!strcmp(argv[1], "info"))
		return say(info, settings & SETTING_NO_INFO);
	if (!strcmp(argv[1], "check"))
		return say(check, settings & SETTING_NO_CHECK);
	fuzz_require(!strcmp(argv[1], "convert") && inherit_fd >= 0);
	return convert(argv[6], inherit_fd);
}

/* ---- the image ---------------------------------------------------------------------------------- */

static void make_other_files(void)
{
	static bool made;

	if (!made)
		fuzz_require(!mkfifo("fifo", 0600) && !mkdir("directory", 0700));
	made = true;
}

static void make_image(struct fuzz_reader *in)
{
	uint32_t bytes = (uint32_t)fuzz_number(in, 4) % IMAGE_MAX_BYTES;
	int fd = open(IMAGE, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);

	fuzz_require(fd >= 0);
	for (uint8_t patches = fuzz_byte(in); patches; patches--) {
		off_t place = (off_t)fuzz_number(in, 3);
		size_t length = fuzz_byte(in);
		const uint8_t *contents = fuzz_bytes(in, &length);

		fuzz_require(pwrite(fd, contents, length, place) == (ssize_t)length);
	}
	fuzz_require(!ftruncate(fd, bytes));
	close(fd);
}

static struct answer next_answer(struct fuzz_reader *in)
{
	struct answer answer = { .bytes = fuzz_number(in, 2) };

	answer.text = fuzz_bytes(in, &answer.bytes);
	return answer;
}

/* ---- what it says ------------------------------------------------------------------------------- */

static void examine(bool json, struct fuzz_output *output)
{
	static const char *const paths[] = { IMAGE, IMAGE, "fifo", "directory" };
	char command[] = "doctor", option[] = "--json", path[16];
	char *argv[] = { command, json ? option : path, json ? path : NULL, NULL };
	int status;

	snprintf(path, sizeof path, "%s", paths[settings & SETTING_FILE_TYPE]);
	fuzz_capture_begin();
	status = cli_doctor.run(&cli_doctor, json ? 3 : 2, argv);
	fuzz_capture_end(output);
	fuzz_require(status == CLI_OK || status == CLI_LACKING || status == CLI_NO_IMAGE);
	fuzz_require((status == CLI_NO_IMAGE) == (output->err_bytes > 0));
	fuzz_require(fuzz_is_plain_text(output->out, output->out_bytes));
	fuzz_require(fuzz_is_plain_text(output->err, output->err_bytes));
}

static void check_json(const char *text)
{
	struct json_tokener *tokener = json_tokener_new();
	struct json_object *whole, *images, *checks;

	json_tokener_set_flags(tokener, JSON_TOKENER_STRICT | JSON_TOKENER_VALIDATE_UTF8);
	whole = json_tokener_parse_ex(tokener, text, -1);
	fuzz_require(whole && json_object_object_get_ex(whole, "images", &images));
	fuzz_require(json_object_array_length(images) == 1);
	fuzz_require(json_object_object_get_ex(json_object_array_get_idx(images, 0), "checks", &checks));
	fuzz_require(json_object_array_length(checks) <= CHECKS_MAX);
	json_object_put(whole);
	json_tokener_free(tokener);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	struct fuzz_reader in = { data, data + bytes };
	struct fuzz_output text, json;

	fuzz_directory();
	make_other_files();
	settings = fuzz_byte(&in);
	make_image(&in);
	info = next_answer(&in);
	check = next_answer(&in);

	examine(false, &text);
	examine(true, &json);
	check_json(json.out);
	fuzz_output_free(&text);
	fuzz_output_free(&json);
	return 0;
}
