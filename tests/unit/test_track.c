/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* The tracking structure of a volume. Several `struct track` in one process stand for several VMs:
 * each has an open file description, and so a lock, of its own. */
#include "volume/track.h"

#include "os/os.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGES 5000u

static char dir[64];

static struct track *vm_opens(void)
{
	struct track *t = NULL;

	assert_int_equal(track_open(dir, 1, 2, PAGES, &t), 0);
	return t;
}

static void volume_path(char path[128])
{
	snprintf(path, 128, "%s/1-2-%u.v1", dir, PAGES);
}

static int make_dir(void **state)
{
	(void)state;
	strcpy(dir, "/tmp/latent-track-XXXXXX");
	return mkdtemp(dir) ? 0 : -1;
}

static int remove_dir(void **state)
{
	char path[128];

	(void)state;
	volume_path(path);
	unlink(path);
	return rmdir(dir);
}

static void assert_near(double got, double want)
{
	assert_true(got > want - 1e-9 && got < want + 1e-9);
}

static int count_files(void)
{
	DIR *files = opendir(dir);
	struct dirent *entry;
	int count = 0;

	while ((entry = readdir(files)))
		count += entry->d_name[0] != '.';
	closedir(files);
	return count;
}

static void the_last_one_removes_the_file(void **state)
{
	struct track *a = vm_opens(), *b = vm_opens();

	(void)state;
	assert_int_equal(count_files(), 1);
	track_close(a);
	assert_int_equal(count_files(), 1);
	track_sweep(dir);
	assert_int_equal(count_files(), 1);
	track_close(b);
	assert_int_equal(count_files(), 0);
}

static void what_the_dead_leave_is_swept(void **state)
{
	pid_t child = fork();

	(void)state;
	if (!child) {
		(void)vm_opens();
		kill(getpid(), SIGKILL);
	}
	waitpid(child, NULL, 0);
	assert_int_equal(count_files(), 1);
	track_sweep(dir);
	assert_int_equal(count_files(), 0);
	track_sweep("/nonexistent");
}

/* Those who open while others close always find each other, or nobody. */
static void opening_races_with_removal(void **state)
{
	pid_t children[4];
	int status;

	(void)state;
	for (int i = 0; i < 4; i++) {
		children[i] = fork();
		if (children[i])
			continue;
		for (int n = 0; n < 500; n++)
			track_close(vm_opens());
		_exit(0);
	}
	for (int i = 0; i < 4; i++) {
		assert_int_equal(waitpid(children[i], &status, 0), children[i]);
		assert_int_equal(status, 0);
	}
	assert_int_equal(count_files(), 0);
}

static void one_reader_shares_nothing(void **state)
{
	struct track *a = vm_opens();

	(void)state;
	track_note_read(a, 0, 100);
	assert_near(track_likelihood(a, 0, 100), 0);
	assert_near(track_likelihood(a, 200, 10), 0);
	assert_int_equal(track_readers(a), 1);
	track_close(a);
}

static void what_another_has_read_will_be_shared(void **state)
{
	struct track *a = vm_opens(), *b = vm_opens();

	(void)state;
	track_note_read(a, 0, 100);
	track_refresh(b);
	assert_near(track_likelihood(b, 0, 100), 1);
	/* Unknown locations: no follower has read anything yet, (0+1)/(0+2). */
	assert_near(track_likelihood(b, 100, 100), 0.5);
	/* Half known, half not. */
	assert_near(track_likelihood(b, 50, 100), 0.75);
	track_close(a);
	track_close(b);
}

static void a_follower_that_hits_raises_the_likelihood(void **state)
{
	struct track *a = vm_opens(), *b = vm_opens();

	(void)state;
	track_refresh(a);
	track_note_read(a, 0, 1000);
	track_note_read(b, 0, 98);
	/* The leader's other 902 reads do not count: (98+1)/(98+2). */
	assert_near(track_likelihood(a, 2000, 1), 0.99);
	track_close(a);
	track_close(b);
}

static void a_follower_that_misses_lowers_it(void **state)
{
	struct track *a = vm_opens(), *b = vm_opens();

	(void)state;
	track_refresh(a);
	track_note_read(a, 0, 1000);
	track_note_read(b, 2000, 98);
	assert_near(track_likelihood(a, 4000, 1), 0.01);
	track_close(a);
	track_close(b);
}

static void a_location_that_this_vm_maps_is_known(void **state)
{
	struct track *a = vm_opens();

	(void)state;
	track_add_maps(a, 7, 1);
	assert_near(track_likelihood(a, 7, 1), 1);
	track_drop_maps(a, 7, 1);
	assert_near(track_likelihood(a, 7, 1), 0);
	track_close(a);
}

static void assert_groups(struct track *t, uint64_t want_one, uint64_t want_many)
{
	uint64_t one, many;

	track_refresh(t);
	track_groups(t, &one, &many);
	assert_int_equal(one, want_one);
	assert_int_equal(many, want_many);
}

static void groups_follow_counts(void **state)
{
	struct track *a = vm_opens(), *b = vm_opens();

	(void)state;
	track_add_maps(a, 10, 20);
	assert_groups(a, 20, 0);
	track_add_maps(b, 20, 20); /* 20..29 are mapped by both */
	assert_groups(a, 20, 10);
	track_add_maps(a, 4999, 1);
	track_add_maps(a, 4999, 1); /* twice by one VM */
	assert_groups(b, 20, 11);
	assert_int_equal(track_maps(b, 4999), 2);
	track_drop_maps(b, 20, 5);
	assert_groups(b, 25, 6);
	track_close(b); /* as if it died */
	assert_groups(a, 20, 1);
	track_close(a);
}

static void death_takes_the_counts_away(void **state)
{
	struct track *a = vm_opens();
	int ready[2], status;
	pid_t child;
	char c;

	(void)state;
	assert_int_equal(pipe(ready), 0);
	child = fork();
	if (!child) {
		struct track *b = NULL;

		if (track_open(dir, 1, 2, PAGES, &b))
			_exit(1);
		track_add_maps(b, 0, 50);
		track_note_read(b, 0, 50);
		if (write(ready[1], "x", 1) != 1)
			_exit(1);
		pause();
		_exit(0);
	}
	assert_int_equal(read(ready[0], &c, 1), 1);
	assert_groups(a, 50, 0);
	assert_near(track_likelihood(a, 0, 50), 1);
	kill(child, SIGKILL);
	assert_int_equal(waitpid(child, &status, 0), child);
	assert_groups(a, 0, 0);
	assert_near(track_likelihood(a, 0, 50), 0);
	/* And the slot that it leaves is clean for the next. */
	struct track *c2 = vm_opens();

	assert_groups(c2, 0, 0);
	track_close(c2);
	track_close(a);
	close(ready[0]);
	close(ready[1]);
}

static void reads_in_flight_are_joined(void **state)
{
	struct track *a = vm_opens(), *b = vm_opens();

	(void)state;
	track_refresh(a);
	assert_int_equal(track_begin_flight(a, 0, 10), 0);
	assert_int_equal(track_begin_flight(b, 5, 10), 5);
	track_end_flight(a, 0, 10);
	track_end_flight(b, 5, 10);
	assert_int_equal(track_begin_flight(b, 0, 10), 0);
	track_end_flight(b, 0, 10);
	track_close(a);
	track_close(b);
}

static void slots_run_out(void **state)
{
	struct track *all[TRACK_SLOTS], *more = NULL;

	(void)state;
	for (size_t i = 0; i < TRACK_SLOTS; i++)
		all[i] = vm_opens();
	assert_int_equal(track_open(dir, 1, 2, PAGES, &more), -EUSERS);
	track_refresh(all[0]);
	assert_int_equal(track_readers(all[0]), TRACK_SLOTS);
	for (size_t i = 0; i < TRACK_SLOTS; i++)
		track_close(all[i]);
}

static void what_others_may_write_is_refused(void **state)
{
	struct track *t = NULL;
	char path[128], target[128];

	(void)state;
	volume_path(path);
	close(open(path, O_CREAT | O_RDWR, 0600));
	chmod(path, 0666);
	assert_int_equal(track_open(dir, 1, 2, PAGES, &t), -EPERM);
	unlink(path);
	snprintf(target, sizeof target, "%s/target", dir);
	close(open(target, O_CREAT | O_RDWR, 0600));
	assert_int_equal(symlink(target, path), 0);
	assert_int_equal(track_open(dir, 1, 2, PAGES, &t), -ELOOP);
	unlink(path);
	unlink(target);
	assert_null(t);
}

/* Whatever stands in the file, nothing breaks and every answer stays within its bounds. */
static void rubbish_does_no_harm(void **state)
{
	struct track *a = vm_opens(), *b = vm_opens();
	char path[128];
	uint64_t one, many;
	int fd, noise = open("/dev/urandom", O_RDONLY);
	static uint8_t rubbish[1 << 20];

	(void)state;
	volume_path(path);
	fd = open(path, O_RDWR);
	assert_int_equal(read(noise, rubbish, sizeof rubbish), sizeof rubbish);
	assert_int_equal(pwrite(fd, rubbish, sizeof rubbish, 0), sizeof rubbish);
	for (uint64_t page = 0; page < PAGES; page += 64) {
		double p = track_likelihood(a, page, 8);

		assert_true(p >= 0 && p <= 1);
		track_note_read(b, page, 8);
		track_add_maps(a, page, 8);
		track_drop_maps(a, page, 8);
		track_drop_maps(b, page, 8);
	}
	track_groups(a, &one, &many);
	assert_true(one + many <= PAGES);
	close(noise);
	close(fd);
	track_close(a);
	track_close(b);
}

static void on_sigbus(int signal, siginfo_t *info, void *context)
{
	(void)context;
	if (!os_absorb_fault(info->si_addr))
		_exit(128 + signal);
}

static void a_cut_file_is_absorbed(void **state)
{
	struct sigaction absorb = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO }, old;
	struct track *a = vm_opens();
	char path[128];

	(void)state;
	sigaction(SIGBUS, &absorb, &old);
	track_add_maps(a, 0, 100);
	volume_path(path);
	assert_int_equal(truncate(path, 0), 0);
	track_add_maps(a, 0, 100);
	track_note_read(a, 200, 100);
	assert_int_equal(track_maps(a, 0), 1); /* what was counted before the cut is gone */
	sigaction(SIGBUS, &old, NULL);
	assert_false(os_absorb_fault(&state));
	track_close(a);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, make_dir, remove_dir)
	const struct CMUnitTest tests[] = {
		TEST(the_last_one_removes_the_file),
		TEST(what_the_dead_leave_is_swept),
		TEST(opening_races_with_removal),
		TEST(one_reader_shares_nothing),
		TEST(what_another_has_read_will_be_shared),
		TEST(a_follower_that_hits_raises_the_likelihood),
		TEST(a_follower_that_misses_lowers_it),
		TEST(a_location_that_this_vm_maps_is_known),
		TEST(groups_follow_counts),
		TEST(death_takes_the_counts_away),
		TEST(reads_in_flight_are_joined),
		TEST(slots_run_out),
		TEST(what_others_may_write_is_refused),
		TEST(rubbish_does_no_harm),
		TEST(a_cut_file_is_absorbed),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
