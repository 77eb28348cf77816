/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * What the fuzz targets have in common. A target defines `fuzz_target` and LLVMFuzzerTestOneInput, which
 * aborts where something does not hold. It is run in one of two ways:
 *
 *   with fuzz.c, built by any compiler:    fuzz_NAME SECONDS [SEED] [CORPUS FILE OR DIRECTORY…]
 *   with clang and -fsanitize=fuzzer:      without fuzz.c; libFuzzer has a main of its own
 *
 * The first runs the corpus once, then mutations of it for SECONDS, which the seed decides. An input
 * that aborts, crashes, takes longer than 30 s or much memory is written to ./crash-NAME; to run it
 * again: fuzz_NAME 0 crash-NAME.
 */
#ifndef LATENT_TESTS_FUZZ_H
#define LATENT_TESTS_FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What random bytes would hardly ever hit. */
struct fuzz_token {
	const void *bytes;
	size_t count;
};
#define FUZZ_TEXT(text)                                                                                 \
	{                                                                                               \
		(text), sizeof(text) - 1                                                                \
	}

struct fuzz_target {
	const char *name;
	size_t max_bytes;                /* of an input */
	const struct fuzz_token *tokens; /* ends with a NULL; NULL: none */
	bool text;                       /* single bytes that are put in are ASCII */
};

extern const struct fuzz_target fuzz_target;

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

/* Aborts, and says what does not hold. */
#define fuzz_require(condition) ((condition) ? (void)0 : fuzz_fail(#condition, __FILE__, __LINE__))
_Noreturn void fuzz_fail(const char *condition, const char *file, int line);

/* Reads an input from its beginning; zeros after its end. */
struct fuzz_reader {
	const uint8_t *at, *end;
};
uint8_t fuzz_byte(struct fuzz_reader *in);
uint64_t fuzz_number(struct fuzz_reader *in, size_t bytes); /* little-endian, at most 8 */
/* The next bytes themselves, as many as there are of them. */
const uint8_t *fuzz_bytes(struct fuzz_reader *in, size_t *bytes);

/* Valid UTF-8 without control characters other than a newline: nothing that a terminal obeys. */
bool fuzz_is_plain_text(const char *text, size_t bytes);

/* What is written to standard output and standard error in between; the texts are the caller's to free.
 */
struct fuzz_output {
	char *out, *err;
	size_t out_bytes, err_bytes;
};
void fuzz_capture_begin(void);
void fuzz_capture_end(struct fuzz_output *ret_output);
void fuzz_capture_abandon(void); /* after a failure: shows what was captured of standard error */
void fuzz_output_free(struct fuzz_output *output);

/* A directory of the target's own, which becomes the working directory, emptied and removed at exit. */
const char *fuzz_directory(void);

#endif
