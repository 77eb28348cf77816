/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "os/log.h"

#include <stdarg.h>
#include <stdio.h>

static os_log_fn log_fn;
static void *log_ctx;

void os_log_to(os_log_fn fn, void *ctx)
{
	log_ctx = ctx;
	log_fn = fn;
}

void os_log(const char *format, ...)
{
	char text[512];
	va_list args;

	if (!log_fn)
		return;
	va_start(args, format);
	vsnprintf(text, sizeof text, format, args);
	va_end(args);
	log_fn(log_ctx, text);
}
