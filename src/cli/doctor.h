/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* What `latent doctor` finds out: of the machine (doctor_machine.c) and of images (doctor_image.c). */
#ifndef LATENT_CLI_DOCTOR_H
#define LATENT_CLI_DOCTOR_H

#include <stddef.h>

enum check_status {
	CHECK_OK,
	CHECK_LIMITED, /* it works, with less */
	CHECK_MISSING, /* images cannot be mapped without it */
};

struct check {
	const char *name;
	enum check_status status;
	char found[256];
	const char *enables; /* what it is for */
	char remedy[384];    /* how to get more, or empty */
};

struct check_list { /* zero-initialised: empty */
	struct check *items;
	size_t count;
};

/* Adds a check and returns it until the next is added; never NULL (no memory: the program ends). */
struct check *check_add(struct check_list *list, const char *name, const char *enables);
void check_found(struct check *check, enum check_status status, const char *format, ...)
	__attribute__((format(printf, 3, 4)));
void check_remedy(struct check *check, const char *format, ...) __attribute__((format(printf, 2, 3)));

void doctor_check_machine(struct check_list *list);

/* Negative errno: the image cannot be read. */
int doctor_check_image(struct check_list *list, const char *path);

#endif
