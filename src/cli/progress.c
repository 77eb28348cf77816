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

static struct {
	struct source_progress *progress;
	_Atomic bool done;
	bool shown;
	pthread_t thread;
} shown;

static void on_interrupt(int signal)
{
	(void)signal;
	shown.progress->stop = true;
}

static void show(const struct source_progress *p)
{
	uint64_t all = p->pages_all, done = p->pages_done, load = p->load_all;
	char size[CLI_SIZE_TEXT];

	if (load)
		fprintf(stderr, "\rloading what it runs from first: %3.0f %% of %s ", 100 * (double)p->load_now / (double)load,
			cli_size(load * OS_PAGE_BYTES, size));
	else if (all)
		fprintf(stderr, "\rwriting RAM: %3.0f %%, %s written ", 100 * (double)done / (double)all,
			cli_size(p->bytes_written, size));
}

static void *show_all(void *arg)
{
	(void)arg;
	while (!shown.done) {
		show(shown.progress);
		usleep(PROGRESS_MS * 1000);
	}
	fprintf(stderr, "\r\033[K");
	return NULL;
}

void progress_begin(struct source_progress *progress)
{
	struct sigaction action = { .sa_handler = on_interrupt };

	shown.progress = progress;
	shown.done = false;
	sigaction(SIGINT, &action, NULL);
	sigaction(SIGTERM, &action, NULL);
	signal(SIGPIPE, SIG_IGN);
	shown.shown = isatty(STDERR_FILENO) && !pthread_create(&shown.thread, NULL, show_all, NULL);
}

void progress_end(void)
{
	shown.done = true;
	if (shown.shown)
		pthread_join(shown.thread, NULL);
}

int progress_take_faults(void)
{
	const char *faults = getenv("LATENT_FAULT");

	if (faults && os_fault_parse(faults))
		return cli_fail(CLI_USAGE, "LATENT_FAULT is not understood: %.80s", faults);
	return CLI_OK;
}
