/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "fuzz.h"

#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static struct {
	int err_fd, real_err_fd; /* while it goes on */
	FILE *real_out;
	char *out;
	size_t out_bytes;
} capturing = { .err_fd = -1, .real_err_fd = -1 };

void fuzz_fail(const char *condition, const char *file, int line)
{
	fuzz_capture_abandon();
	fprintf(stderr, "fuzz_%s: %s:%d: not so: %s\n", fuzz_target.name, file, line, condition);
	abort();
}

uint8_t fuzz_byte(struct fuzz_reader *in) { return in->at < in->end ? *in->at++ : 0; }

uint64_t fuzz_number(struct fuzz_reader *in, size_t bytes)
{
	uint64_t number = 0;

	for (size_t i = 0; i < bytes; i++)
		number |= (uint64_t)fuzz_byte(in) << 8 * i;
	return number;
}

const uint8_t *fuzz_bytes(struct fuzz_reader *in, size_t *bytes)
{
	const uint8_t *from = in->at;
	size_t left = (size_t)(in->end - in->at);

	*bytes = *bytes < left ? *bytes : left;
	in->at += *bytes;
	return from;
}

/* Length of the sequence that this byte begins; 0: none. */
static size_t utf8_length(uint8_t first)
{
	if (first < 0x80)
		return 1;
	if (first >= 0xc2 && first < 0xe0)
		return 2;
	if (first >= 0xe0 && first < 0xf0)
		return 3;
	return first >= 0xf0 && first < 0xf5 ? 4 : 0;
}

bool fuzz_is_plain_text(const char *text, size_t bytes)
{
	const uint8_t *at = (const uint8_t *)text;

	for (size_t i = 0, length; i < bytes; i += length) {
		uint32_t code = at[i];

		length = utf8_length(at[i]);
		if (!length || length > bytes - i)
			return false;
		if (length > 1)
			code &= 0x7fu >> length;
		for (size_t k = 1; k < length; k++) {
			if ((at[i + k] & 0xc0) != 0x80)
				return false;
			code = code << 6 | (at[i + k] & 0x3f);
		}
		if ((code < 0x20 && code != '\n') || (code >= 0x7f && code < 0xa0))
			return false;
		if ((code >= 0xd800 && code < 0xe000) || code > 0x10ffff ||
		    (length == 3 && code < 0x800) || (length == 4 && code < 0x10000))
			return false;
	}
	return true;
}

/* ---- output ----------------------------------------------------------------------------------- */

/* The sanitizers', which else would write to what standard error is then. */
void __sanitizer_set_report_fd(void *fd) __attribute__((weak));

void fuzz_capture_abandon(void)
{
	char text[4096];
	ssize_t n = pread(capturing.err_fd, text, sizeof text, 0);

	if (!capturing.real_out)
		return;
	dup2(capturing.real_err_fd, STDERR_FILENO);
	if (n > 0 && write(STDERR_FILENO, text, (size_t)n) < n)
		return;
}

void fuzz_capture_begin(void)
{
	if (capturing.err_fd < 0) {
		capturing.err_fd = memfd_create("stderr", MFD_CLOEXEC);
		capturing.real_err_fd = fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 3);
		fuzz_require(capturing.err_fd >= 0 && capturing.real_err_fd >= 0);
		if (__sanitizer_set_report_fd)
			__sanitizer_set_report_fd((void *)(uintptr_t)capturing.real_err_fd);
	}
	capturing.real_out = stdout;
	stdout = open_memstream(&capturing.out, &capturing.out_bytes);
	fuzz_require(stdout && !ftruncate(capturing.err_fd, 0) && !lseek(capturing.err_fd, 0, SEEK_SET));
	dup2(capturing.err_fd, STDERR_FILENO);
}

void fuzz_capture_end(struct fuzz_output *ret_output)
{
	off_t bytes = lseek(capturing.err_fd, 0, SEEK_END);

	dup2(capturing.real_err_fd, STDERR_FILENO);
	fclose(stdout);
	stdout = capturing.real_out;
	capturing.real_out = NULL;
	*ret_output = (struct fuzz_output){ .out = capturing.out, .out_bytes = capturing.out_bytes };
	ret_output->err = calloc(1, (size_t)bytes + 1);
	ret_output->err_bytes = (size_t)bytes;
	fuzz_require(ret_output->err &&
		     pread(capturing.err_fd, ret_output->err, (size_t)bytes, 0) == bytes);
}

void fuzz_output_free(struct fuzz_output *output)
{
	free(output->out);
	free(output->err);
}

/* ---- the directory -------------------------------------------------------------------------- */

static char directory[64];

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *where)
{
	(void)st;
	(void)type;
	(void)where;
	return remove(path);
}

static void remove_directory(void) { nftw(directory, remove_one, 16, FTW_DEPTH | FTW_PHYS); }

const char *fuzz_directory(void)
{
	if (directory[0])
		return directory;
	snprintf(directory, sizeof directory, "%s/latent-fuzz-XXXXXX",
		 access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm");
	fuzz_require(mkdtemp(directory) && !chdir(directory));
	atexit(remove_directory);
	return directory;
}
