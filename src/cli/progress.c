/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "cli/progress.h"

#include "cli/cli.h"
#include "os/os.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define PROGRESS_MS 200

static _Atomic bool *stop;

static struct {
	void (*show)(void *), (*tell)(void *);
	void *ctx;
	_Atomic bool done;
	bool runs;
	pthread_t thread;
} shown;

static void on_interrupt(int signal)
{
	(void)signal;
	*stop = true;
}

void progress_take_signals(_Atomic bool *to_stop)
{
	struct sigaction action = { .sa_handler = on_interrupt };

	stop = to_stop;
	sigaction(SIGINT, &action, NULL);
	sigaction(SIGTERM, &action, NULL);
	signal(SIGPIPE, SIG_IGN);
}

static void *show_all(void *arg)
{
	(void)arg;
	while (!shown.done) {
		if (shown.show)
			shown.show(shown.ctx);
		if (shown.tell)
			shown.tell(shown.ctx);
		usleep(PROGRESS_MS * 1000);
	}
	if (shown.show)
		fprintf(stderr, "\r\033[K");
	return NULL;
}

void progress_begin(void (*show)(void *ctx), void (*tell)(void *ctx), void *ctx)
{
	shown.show = isatty(STDERR_FILENO) ? show : NULL;
	shown.tell = tell;
	shown.ctx = ctx;
	shown.done = false;
	shown.runs = (shown.show || shown.tell) && !pthread_create(&shown.thread, NULL, show_all, NULL);
}

void progress_end(void)
{
	shown.done = true;
	if (shown.runs)
		pthread_join(shown.thread, NULL);
}

static void show_writing(void *ctx)
{
	const struct source_progress *p = ctx;
	uint64_t all = p->pages_all, done = p->pages_done, load = p->load_all;
	char size[CLI_SIZE_TEXT];

	if (load)
		fprintf(stderr, "\rloading what it runs from first: %3.0f %% of %s ", 100 * (double)p->load_now / (double)load,
			cli_size(load * OS_PAGE_BYTES, size));
	else if (p->syncing)
		fprintf(stderr, "\rbringing to storage what the disks were written ");
	else if (all)
		fprintf(stderr, "\r\033[Kwriting RAM: %3.0f %%, %s written ", 100 * (double)done / (double)all,
			cli_size(p->bytes_written, size));
}

void progress_begin_writing(struct source_progress *progress)
{
	progress_take_signals(&progress->stop);
	progress_begin(show_writing, NULL, progress);
}

int progress_take_faults(void)
{
	const char *faults = getenv("LATENT_FAULT");

	if (faults && os_fault_parse(faults))
		return cli_fail(CLI_USAGE, "LATENT_FAULT is not understood: %.80s", faults);
	return CLI_OK;
}
