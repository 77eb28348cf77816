/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* What outlives a link of a migration, or a mover: the ballot, what images are known by, the record of a run directory. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "migrate/ballot.h"
#include "migrate/digest.h"
#include "migrate/record.h"
#include "os/os.h"
#include "vmdir/moving.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define RACES 200
#define IMAGE_BYTES (40u << 20) /* more than one tick */

static const uint8_t session[WIRE_SESSION_BYTES] = { 1, 2, 3, 4, 5, 6, 7, 8, 9 };

struct rig {
	char dir[64], disk[96], known[96];
};

static int setup(void **state)
{
	struct rig *rig = calloc(1, sizeof *rig);

	if (!rig)
		return -1;
	snprintf(rig->dir, sizeof rig->dir, "/tmp/latent-handover-XXXXXX");
	*state = rig;
	if (!mkdtemp(rig->dir))
		return -1;
	snprintf(rig->disk, sizeof rig->disk, "%s/disk", rig->dir);
	snprintf(rig->known, sizeof rig->known, "%s/known", rig->dir);
	return 0;
}

static int teardown(void **state)
{
	struct rig *rig = *state;
	char command[128];
	int r;

	snprintf(command, sizeof command, "rm -rf %s", rig->dir);
	r = system(command);
	free(rig);
	return r;
}

/* ---- the ballot ---------------------------------------------------------------------------------- */

static struct ballot make_ballot(const struct rig *rig)
{
	struct ballot ballot;

	assert_int_equal(ballot_name(rig->disk, session, &ballot), 0);
	assert_int_equal(ballot_make(&ballot), 0);
	assert_true(ballot_is_there(&ballot));
	assert_int_equal(ballot_make(&ballot), -EEXIST);
	return ballot;
}

static void test_only_the_first_one_gets_the_ballot(void **state)
{
	struct ballot ballot = make_ballot(*state);

	assert_int_equal(ballot_take(&ballot, BALLOT_DESTINATION), 0);
	assert_int_equal(ballot_take(&ballot, BALLOT_SOURCE), -EALREADY);
	assert_int_equal(ballot_take(&ballot, BALLOT_DESTINATION), 0); /* who asks twice has it still */
	assert_false(ballot_is_there(&ballot));
	ballot_return(&ballot);
	assert_int_equal(ballot_take(&ballot, BALLOT_SOURCE), 0);
	assert_int_equal(ballot_take(&ballot, BALLOT_DESTINATION), -EALREADY);
	ballot_remove(&ballot);
	assert_int_equal(ballot_take(&ballot, BALLOT_SOURCE), -ENOENT);
	assert_int_equal(ballot_take(&ballot, BALLOT_DESTINATION), -ENOENT);
}

static void test_storage_that_is_gone_decides_nothing(void **state)
{
	struct rig *rig = *state;
	struct ballot ballot = make_ballot(rig);
	char elsewhere[160];

	/* A file where the directory was: what is asked fails, and not by ENOENT. */
	snprintf(elsewhere, sizeof elsewhere, "%s.away", rig->dir);
	assert_int_equal(rename(rig->dir, elsewhere), 0);
	close(open(rig->dir, O_WRONLY | O_CREAT, 0600));
	assert_int_equal(ballot_take(&ballot, BALLOT_SOURCE), -ENOTDIR);
	assert_int_equal(ballot_take(&ballot, BALLOT_DESTINATION), -ENOTDIR);
	assert_int_equal(unlink(rig->dir), 0);
	assert_int_equal(rename(elsewhere, rig->dir), 0);
	assert_int_equal(ballot_take(&ballot, BALLOT_SOURCE), 0);
}

static void test_two_who_take_it_at_once(void **state)
{
	for (int i = 0; i < RACES; i++) {
		struct ballot ballot = make_ballot(*state);
		int ours, status;
		pid_t other = fork();

		assert_true(other >= 0);
		if (!other)
			_exit(ballot_take(&ballot, BALLOT_SOURCE) ? 1 : 0);
		ours = ballot_take(&ballot, BALLOT_DESTINATION);
		assert_int_equal(waitpid(other, &status, 0), other);
		assert_true(WIFEXITED(status));
		assert_int_equal(!ours + !WEXITSTATUS(status), 1);
		ballot_remove(&ballot);
	}
}

static void test_a_ballot_has_a_path_that_fits(void **state)
{
	char path[BALLOT_PATH_BYTES];
	struct ballot ballot;

	(void)state;
	memset(path, 'x', sizeof path);
	path[sizeof path - 1] = '\0';
	assert_int_equal(ballot_name(path, session, &ballot), -ENAMETOOLONG);
	path[MANIFEST_PATH_BYTES - 1] = '\0'; /* as long as a manifest's path may be */
	assert_int_equal(ballot_name(path, session, &ballot), 0);
}

/* ---- digests -------------------------------------------------------------------------------------- */

static int make_image(const struct rig *rig)
{
	static uint8_t chunk[1 << 20];
	int fd = open(rig->disk, O_RDWR | O_CREAT | O_TRUNC, 0600);
	unsigned seed = 1;

	assert_true(fd >= 0);
	for (size_t i = 0; i < sizeof chunk; i++)
		chunk[i] = (uint8_t)((seed = seed * 1103515245u + 12345u) >> 16);
	for (uint64_t at = 0; at < IMAGE_BYTES; at += 2 * sizeof chunk) /* every other MiB is a hole */
		assert_int_equal(os_write_all(fd, chunk, sizeof chunk, at), 0);
	assert_int_equal(ftruncate(fd, IMAGE_BYTES), 0);
	return fd;
}

static void make_old(int fd)
{
	const struct timespec times[] = { { 1000, 0 }, { 1000, 0 } };

	assert_int_equal(futimens(fd, times), 0); /* (the time of its change is now) */
}

static void test_every_bit_counts(void **state)
{
	const struct digest_reading reading = { .known_dir = ((struct rig *)*state)->known };
	int fd = make_image(*state);
	struct digest before, after;
	uint8_t byte = 1;

	assert_int_equal(digest_file(&reading, fd, &before), 0);
	assert_int_equal(digest_file(&reading, fd, &after), 0);
	assert_memory_equal(&before, &after, sizeof before);
	assert_int_equal(os_write_all(fd, &byte, 1, IMAGE_BYTES / 2 * 2 - 12345), 0);
	assert_int_equal(digest_file(&reading, fd, &after), 0);
	assert_memory_not_equal(&before, &after, sizeof before);
	byte = 0;
	assert_int_equal(os_write_all(fd, &byte, 1, IMAGE_BYTES / 2 * 2 - 12345), 0);
	assert_int_equal(digest_file(&reading, fd, &after), 0);
	assert_memory_equal(&before, &after, sizeof before);
	assert_int_equal(ftruncate(fd, IMAGE_BYTES + 1), 0);
	assert_int_equal(digest_file(&reading, fd, &after), 0);
	assert_memory_not_equal(&before, &after, sizeof before);
	close(fd);
}

static int count_tick(void *ctx)
{
	++*(int *)ctx;
	return 0;
}

/* What is known is not read: but only of a file that has not been written for a while. */
static void test_a_file_is_read_once(void **state)
{
	int ticks = 0, before, fd = make_image(*state);
	const struct digest_reading reading = { ((struct rig *)*state)->known, count_tick, &ticks };
	struct digest first, again;
	uint8_t byte = 9;

	assert_int_equal(digest_file(&reading, fd, &first), 0);
	before = ticks;
	assert_true(before >= 2);
	assert_int_equal(digest_file(&reading, fd, &again), 0);
	assert_int_equal(ticks, 2 * before); /* it has just been written */
	make_old(fd);
	sleep(3); /* for the time of its change */
	assert_int_equal(digest_file(&reading, fd, &again), 0);
	assert_int_equal(ticks, 3 * before);
	assert_int_equal(digest_file(&reading, fd, &again), 0);
	assert_int_equal(ticks, 3 * before);
	assert_memory_equal(&first, &again, sizeof first);
	assert_int_equal(os_write_all(fd, &byte, 1, 5), 0);
	make_old(fd); /* as somebody who restores times does */
	assert_int_equal(digest_file(&reading, fd, &again), 0);
	assert_int_equal(ticks, 4 * before);
	assert_memory_not_equal(&first, &again, sizeof first);
	close(fd);
}

static int write_it(void *ctx)
{
	const uint8_t byte = 7;
	int *fd = ctx;

	return os_write_all(*fd, &byte, 1, 0);
}

static void test_a_file_that_is_written_meanwhile_has_none(void **state)
{
	int fd = make_image(*state);
	const struct digest_reading reading = { ((struct rig *)*state)->known, write_it, &fd };
	struct digest digest;

	make_old(fd);
	assert_int_equal(digest_file(&reading, fd, &digest), -ESTALE);
	close(fd);
}

static void test_what_is_no_file_has_none(void **state)
{
	const struct digest_reading reading = { .known_dir = NULL };
	int fd = open("/dev/zero", O_RDONLY);
	struct digest digest;

	(void)state;
	assert_int_equal(digest_file(&reading, fd, &digest), -ENOTSUP);
	close(fd);
}

/* ---- the record ------------------------------------------------------------------------------------ */

static void test_a_record_is_read_as_it_was_written(void **state)
{
	struct rig *rig = *state;
	struct record record = { .phase = RECORD_COMMITTED, .stood = 1 }, read;
	char why[SNAPSHOT_WHY_BYTES], path[128];
	int fd;

	assert_int_equal(record_read(rig->dir, &read, why), -ENOENT);
	memcpy(record.session, session, sizeof session);
	assert_int_equal(ballot_name(rig->disk, session, &record.ballot), 0);
	assert_int_equal(record_write(rig->dir, &record, why), 0);
	assert_int_equal(record_read(rig->dir, &read, why), 0);
	assert_int_equal(read.phase, RECORD_COMMITTED);
	assert_true(read.stood && !memcmp(read.session, session, sizeof session) &&
		    !strcmp(read.ballot.path, record.ballot.path));
	snprintf(path, sizeof path, "%s/migration", rig->dir);
	fd = open(path, O_WRONLY);
	assert_int_equal(ftruncate(fd, 20), 0);
	close(fd);
	assert_int_equal(record_read(rig->dir, &read, why), -EPROTO);
	record_remove(rig->dir);
	assert_int_equal(record_read(rig->dir, &read, why), -ENOENT);
}

/* ---- how far it is ----------------------------------------------------------------------------------- */

static void test_only_a_mover_at_work_is_seen(void **state)
{
	const char *dir = ((struct rig *)*state)->dir;
	struct moving said = { .side = MOVING_HERE, .phase = MOVING_REST, .cut = 1, .left = 7 }, read;
	int fd = moving_begin(dir);

	assert_true(fd >= 0);
	assert_int_equal(moving_begin(dir), -EAGAIN);
	assert_int_equal(moving_read(dir, &read), -ENOENT); /* it has said nothing yet */
	moving_say(fd, &said);
	assert_int_equal(moving_read(dir, &read), 0);
	assert_true(read.side == MOVING_HERE && read.phase == MOVING_REST && read.cut && read.left == 7);
	said.phase = MOVING_PHASES;
	moving_say(fd, &said);
	assert_int_equal(moving_read(dir, &read), -ENOENT);
	said.phase = MOVING_PASSES;
	moving_say(fd, &said);
	close(fd); /* as by a signal that kills it */
	assert_int_equal(moving_read(dir, &read), -ENOENT);
	fd = moving_begin(dir);
	assert_true(fd >= 0);
	moving_end(dir, fd);
	assert_int_equal(moving_read(dir, &read), -ENOENT);
}

static void test_what_is_over_is_not_taken(void **state)
{
	struct ballot ballot = make_ballot(*state), none = { "" };

	ballot_note_over(&ballot);
	assert_false(ballot_is_over(&ballot)); /* nobody has the guest yet */
	assert_int_equal(ballot_take(&ballot, BALLOT_DESTINATION), 0);
	ballot_note_over(&ballot);
	assert_true(ballot_is_over(&ballot));
	assert_int_equal(ballot_take(&ballot, BALLOT_SOURCE), -EALREADY);
	ballot_remove(&ballot);
	assert_false(ballot_is_over(&ballot));
	assert_false(ballot_is_over(&none));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_only_the_first_one_gets_the_ballot, setup, teardown),
		cmocka_unit_test_setup_teardown(test_storage_that_is_gone_decides_nothing, setup, teardown),
		cmocka_unit_test_setup_teardown(test_two_who_take_it_at_once, setup, teardown),
		cmocka_unit_test_setup_teardown(test_a_ballot_has_a_path_that_fits, setup, teardown),
		cmocka_unit_test_setup_teardown(test_every_bit_counts, setup, teardown),
		cmocka_unit_test_setup_teardown(test_a_file_is_read_once, setup, teardown),
		cmocka_unit_test_setup_teardown(test_a_file_that_is_written_meanwhile_has_none, setup, teardown),
		cmocka_unit_test_setup_teardown(test_what_is_no_file_has_none, setup, teardown),
		cmocka_unit_test_setup_teardown(test_only_a_mover_at_work_is_seen, setup, teardown),
		cmocka_unit_test_setup_teardown(test_what_is_over_is_not_taken, setup, teardown),
		cmocka_unit_test_setup_teardown(test_a_record_is_read_as_it_was_written, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
