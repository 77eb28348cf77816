/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "cli/lazy.h"

#include "cli/cli.h"
#include "os/os.h"
#include "vmdir/pager.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define START_US 15000000 /* a pager is there within that, */
#define START_AGAIN_US 500000
#define AGAIN_US 2000
#define ANSWER_MS 60000 /* and has read the snapshot's metadata within that */

bool lazy_is_url(const char *source)
{
	return !strncmp(source, "http://", 7) || !strncmp(source, "https://", 8) || !strncmp(source, "s3://", 5);
}

static int place(const char *source, struct agent_pager *pager)
{
	char root[VMDIR_PATH_BYTES], why[VMDIR_WHY_BYTES], program[PATH_MAX];
	int status = cli_find_program(PAGER_PROGRAM, LATENT_PAGER_PATH, program);

	if (status)
		return status;
	if (vmdir_root(true, root, why))
		return cli_fail(CLI_RUN_DIR, "%s", why);
	if (snprintf(pager->dir, sizeof pager->dir, "%s/" PAGER_DIR, root) >= (int)sizeof pager->dir ||
	    snprintf(pager->program, sizeof pager->program, "%s", program) >= (int)sizeof pager->program)
		return cli_fail(CLI_RUN_DIR, "the path of the run directory, or of %s, is too long", PAGER_PROGRAM);
	if (snprintf(pager->source, sizeof pager->source, "%s", source) >= (int)sizeof pager->source)
		return cli_fail(CLI_USAGE, "the snapshot's name is longer than %zu characters", sizeof pager->source - 1);
	if (mkdir(pager->dir, 0700) && errno != EEXIST)
		return cli_fail(CLI_RUN_DIR, "%s cannot be made: %s", pager->dir, strerror(errno));
	return CLI_OK;
}

/* One that serves, started if there is none. */
static int connect_pager(const struct agent_pager *pager)
{
	uint64_t until_us = os_now_us() + START_US, next_start_us = 0;
	struct pager_starter starter;
	int fd = pager_starter_init(&starter);

	while (!fd || fd == -ENOENT || fd == -ECONNREFUSED) {
		fd = pager_connect(pager->dir, pager->source, ANSWER_MS);
		if (fd >= 0 || os_now_us() > until_us)
			break;
		if (os_now_us() >= next_start_us) {
			int r = pager_start(&starter, pager->program, pager->dir, pager->source);

			next_start_us = os_now_us() + START_AGAIN_US;
			if (r)
				return r;
		}
		usleep(AGAIN_US);
	}
	return fd;
}

static int ask(const struct agent_pager *pager, int fd, struct pager_report *report, int fds[PAGER_FDS])
{
	static struct pager_request q = { .magic = PAGER_MAGIC, .version = PAGER_VERSION, .op = PAGER_OPEN };
	unsigned count = PAGER_FDS;
	int r;

	memcpy(q.source, pager->source, sizeof q.source);
	r = pager_send(fd, &q, sizeof q, NULL, 0);
	if (!r)
		r = pager_receive(fd, report, sizeof *report, fds, &count);
	if (r < 0)
		return r;
	report->text[sizeof report->text - 1] = '\0';
	if (r != (int)sizeof *report || report->magic != PAGER_MAGIC || report->version != PAGER_VERSION ||
	    report->op != PAGER_OPEN || (!report->error && count != PAGER_FDS))
		return r ? -EPROTO : -ECONNRESET;
	return 0;
}

/* It may be about to end, with nobody there, while we come: then another one is asked. */
static int open_with(struct agent_pager *pager, struct pager_report *report, int fds[PAGER_FDS])
{
	int r = -ECONNRESET;

	for (int tries = 0; tries < 3 && (r == -ECONNRESET || r == -EPIPE); tries++) {
		pager->fd = connect_pager(pager);
		if (pager->fd < 0)
			return pager->fd;
		r = ask(pager, pager->fd, report, fds);
		if (r)
			close(pager->fd);
	}
	return r;
}

static void inherit(int fd)
{
	(void)fcntl(fd, F_SETFD, 0);
}

/* The file positions of what came from the pager are those of all that it gives it to; QEMU reads from one. */
static int with_own_position(int fd)
{
	char path[32];
	int own;

	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	own = open(path, O_RDONLY);
	close(fd);
	return own;
}

static int take(const int fds[PAGER_FDS], struct agent_restore *restore, struct manifest *ret_manifest, const char *source)
{
	char why[SNAPSHOT_WHY_BYTES];
	struct stat st;

	restore->active = 1;
	restore->active_fd = -1; /* the pager has it, and loads in that order */
	restore->learned_fd = restore->learn_dir_fd = -1;
	restore->ram_fd = fds[PAGER_FD_CACHE];
	restore->pages_fd = fds[PAGER_FD_PAGES];
	restore->state_fd = with_own_position(fds[PAGER_FD_STATE]);
	restore->pager.active = 1;
	restore->pager.index_fd = fds[PAGER_FD_INDEX];
	inherit(restore->ram_fd);
	inherit(restore->pages_fd);
	inherit(restore->pager.index_fd);
	inherit(restore->pager.fd);
	if (manifest_read_file(fds[PAGER_FD_MANIFEST], ret_manifest, why))
		return cli_fail(CLI_NO_IMAGE, "%s: %s", source, why);
	close(fds[PAGER_FD_MANIFEST]);
	if (manifest_check_pages(ret_manifest, restore->pages_fd, why) ||
	    manifest_check_state(ret_manifest, restore->state_fd, why))
		return cli_fail(CLI_NO_IMAGE, "%s/%s", source, why);
	if (fstat(restore->ram_fd, &st) || (uint64_t)st.st_size != ret_manifest->ram_bytes)
		return cli_fail(CLI_NO_IMAGE, "%s/" SNAPSHOT_PAGES " is not of %ju bytes of RAM, as the manifest says", source,
				(uintmax_t)ret_manifest->ram_bytes);
	return CLI_OK;
}

int lazy_open(const char *source, struct agent_restore *restore, struct manifest *ret_manifest)
{
	struct pager_report report = { 0 };
	int fds[PAGER_FDS], r, status = place(source, &restore->pager);

	if (status)
		return status;
	r = open_with(&restore->pager, &report, fds);
	if (r)
		return cli_fail(CLI_SYSTEM, "the pager of %s does not answer: %s", source, strerror(-r));
	if (report.error)
		return cli_fail(CLI_NO_IMAGE, "%s: %s", source, report.text);
	return take(fds, restore, ret_manifest, source);
}

void lazy_close(const struct agent_restore *restore)
{
	close(restore->ram_fd);
	close(restore->pages_fd);
	close(restore->state_fd);
	close(restore->pager.index_fd);
	close(restore->pager.fd);
}
