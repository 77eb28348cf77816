/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* The public library, as a VMM of one's own would use it: nothing but its header. */
#include <latent/latent.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE ((size_t)LATENT_PAGE_BYTES)
#define RAM_PAGES 256u
#define IMAGE_PAGES 128u

/* A directory of its own for each test: an image and the tracking structures. */
struct rig {
	char dir[64], image[80];
	struct latent_vm *vm;
	uint8_t *ram;
	int memfd, image_fd;
};

static uint8_t image_byte(size_t at)
{
	return (uint8_t)(at * 31 + at / PAGE);
}

static void make_image(struct rig *rig)
{
	static uint8_t bytes[IMAGE_PAGES * 4096 + 100]; /* ends within a page */
	int fd;

	for (size_t i = 0; i < sizeof bytes; i++)
		bytes[i] = image_byte(i);
	snprintf(rig->image, sizeof rig->image, "%s/image", rig->dir);
	fd = open(rig->image, O_CREAT | O_WRONLY | O_EXCL, 0600);
	assert_int_equal(write(fd, bytes, sizeof bytes), sizeof bytes);
	close(fd);
	rig->image_fd = open(rig->image, O_RDONLY);
}

static struct latent_vm *make_vm(struct rig *rig, uint8_t **ret_ram, int *ret_memfd, double threshold)
{
	struct latent_options options;
	struct latent_vm *vm = NULL;
	int fd = memfd_create("guest", MFD_CLOEXEC);

	latent_options_init(&options);
	options.tracks_dir = rig->dir;
	options.share_threshold = threshold;
	options.min_run_pages = 1; /* whatever mapping costs at this moment, which the model has measured */
	options.lease_signal = SIGRTMIN + 1;
	options.lease_tid = (pid_t)syscall(SYS_gettid);
	assert_int_equal(ftruncate(fd, RAM_PAGES * PAGE), 0);
	*ret_ram = mmap(NULL, RAM_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	assert_int_equal(latent_vm_create(&options, &vm), 0);
	assert_int_equal(latent_ram_add(vm, "ram", *ret_ram, RAM_PAGES * PAGE, fd, 0), 0);
	*ret_memfd = fd;
	return vm;
}

static int set_up(void **state)
{
	struct rig *rig = calloc(1, sizeof *rig);
	sigset_t lease;

	sigemptyset(&lease);
	sigaddset(&lease, SIGRTMIN + 1);
	sigprocmask(SIG_BLOCK, &lease, NULL);
	strcpy(rig->dir, "/tmp/latent-public-XXXXXX");
	if (!mkdtemp(rig->dir))
		return -1;
	make_image(rig);
	rig->vm = make_vm(rig, &rig->ram, &rig->memfd, 0);
	*state = rig;
	return 0;
}

static int tear_down(void **state)
{
	struct rig *rig = *state;
	char command[128];

	latent_vm_destroy(rig->vm);
	munmap(rig->ram, RAM_PAGES * PAGE);
	close(rig->memfd);
	close(rig->image_fd);
	snprintf(command, sizeof command, "rm -r %s", rig->dir);
	free(rig);
	return system(command);
}

static void assert_image(const uint8_t *ram, size_t image_at, size_t bytes)
{
	for (size_t i = 0; i < bytes; i++)
		if (ram[i] != image_byte(image_at + i))
			fail_msg("byte %zu of the image is wrong in RAM", image_at + i);
}

static struct latent_stats stats_of(struct latent_vm *vm)
{
	struct latent_stats stats = { .size = sizeof stats };

	assert_int_equal(latent_stats_get(vm, &stats), 0);
	return stats;
}

static ssize_t read_into(struct rig *rig, size_t ram_at, size_t bytes, off_t image_at)
{
	struct iovec iov = { rig->ram + ram_at, bytes };

	return latent_preadv(rig->vm, rig->image_fd, &iov, 1, image_at);
}

static void reads_are_mapped_and_right(void **state)
{
	struct rig *rig = *state;

	assert_int_equal(read_into(rig, 16 * PAGE, 64 * PAGE, 8 * PAGE), 64 * PAGE);
	assert_image(rig->ram + 16 * PAGE, 8 * PAGE, 64 * PAGE);
	assert_int_equal(stats_of(rig->vm).overlay_pages, 64);
	assert_int_equal(stats_of(rig->vm).bytes_shortcut, 64 * PAGE);
}

static void every_alignment_reads_the_same(void **state)
{
	struct rig *rig = *state;
	static const size_t at[] = { 0, 1, 100, 4095, 4096, 5000 };
	static const size_t length[] = { 1, 95, 4096, 4097, 12288, 20000 };

	for (size_t i = 0; i < 6; i++) {
		for (size_t j = 0; j < 6; j++) {
			for (size_t k = 0; k < 6; k++) {
				assert_int_equal(read_into(rig, at[i], length[k], (off_t)at[j]), length[k]);
				assert_image(rig->ram + at[i], at[j], length[k]);
			}
		}
	}
}

static void scattered_buffers_are_filled_in_order(void **state)
{
	struct rig *rig = *state;
	struct iovec iov[] = {
		{ rig->ram + 10 * PAGE, 3 * PAGE }, { rig->ram + 13 * PAGE, PAGE }, /* adjoining */
		{ rig->ram + 50 * PAGE, 2 * PAGE }, { rig->ram + 70 * PAGE + 5, PAGE },
		{ rig->ram + 90 * PAGE, 4 * PAGE },
	};
	ssize_t n = latent_preadv(rig->vm, rig->image_fd, iov, 5, 20 * PAGE);

	assert_int_equal(n, 11 * PAGE);
	assert_image(rig->ram + 10 * PAGE, 20 * PAGE, 4 * PAGE);
	assert_image(rig->ram + 50 * PAGE, 24 * PAGE, 2 * PAGE);
	assert_image(rig->ram + 70 * PAGE + 5, 26 * PAGE, PAGE);
	assert_image(rig->ram + 90 * PAGE, 27 * PAGE, 4 * PAGE);
}

static void the_end_of_the_file_is_a_short_read(void **state)
{
	struct rig *rig = *state;

	memset(rig->ram, 7, 16 * PAGE);
	assert_int_equal(read_into(rig, 0, 16 * PAGE, (IMAGE_PAGES - 4) * PAGE), 4 * PAGE + 100);
	assert_image(rig->ram, (IMAGE_PAGES - 4) * PAGE, 4 * PAGE + 100);
	assert_int_equal(rig->ram[5 * PAGE], 7);
	assert_int_equal(read_into(rig, 0, PAGE, (IMAGE_PAGES + 4) * PAGE), 0);
}

static void errors_are_those_of_preadv(void **state)
{
	struct rig *rig = *state;
	struct iovec iov = { rig->ram, PAGE };

	assert_int_equal(latent_preadv(rig->vm, -1, &iov, 1, 0), -EBADF);
	assert_int_equal(latent_preadv(rig->vm, rig->image_fd, &iov, 1, -1), -EINVAL);
}

static void writes_stay_with_the_guest(void **state)
{
	struct rig *rig = *state;
	char on_disk;

	read_into(rig, 0, 8 * PAGE, 0);
	rig->ram[3 * PAGE] ^= 0xff;
	assert_int_equal(pread(rig->image_fd, &on_disk, 1, 3 * PAGE), 1);
	assert_int_equal((uint8_t)on_disk, image_byte(3 * PAGE));
	assert_int_equal(rig->ram[3 * PAGE], image_byte(3 * PAGE) ^ 0xff);
	assert_int_equal(stats_of(rig->vm).private_pages, 1);
}

static void a_discard_gives_zeros(void **state)
{
	struct rig *rig = *state;

	memset(rig->ram, 9, 16 * PAGE);
	read_into(rig, 4 * PAGE, 8 * PAGE, 0);
	assert_int_equal(latent_ram_discard(rig->vm, rig->ram + 2 * PAGE, 6 * PAGE), 0);
	for (size_t i = 2 * PAGE; i < 8 * PAGE; i++)
		assert_int_equal(rig->ram[i], 0);
	assert_int_equal(rig->ram[PAGE], 9);
	assert_image(rig->ram + 8 * PAGE, 4 * PAGE, 4 * PAGE);
	assert_int_equal(latent_ram_discard(rig->vm, rig->ram + 1, PAGE), -EINVAL);
	assert_int_equal(latent_ram_discard(rig->vm, (void *)PAGE, PAGE), -ENOENT);
}

/* Another process opens the image for writing, rewrites it and cuts it. */
static pid_t start_writer(struct rig *rig)
{
	pid_t child = fork();

	if (!child) {
		int fd = open(rig->image, O_RDWR); /* waits for the lease */
		static char junk[IMAGE_PAGES * 4096];

		memset(junk, 0xee, sizeof junk);
		if (fd < 0 || write(fd, junk, sizeof junk) != (ssize_t)sizeof junk || ftruncate(fd, 0))
			_exit(1);
		_exit(0);
	}
	return child;
}

static void a_writer_waits_until_the_image_is_given_up(void **state)
{
	struct rig *rig = *state;
	char path[128];
	int status;
	pid_t writer;

	read_into(rig, 0, 100 * PAGE, 0);
	rig->ram[5 * PAGE] = 1;
	assert_int_equal(latent_image_broken(rig->vm, path, sizeof path), 0);
	writer = start_writer(rig);
	for (int i = 0; i < 1000 && !latent_image_broken(rig->vm, path, sizeof path); i++)
		usleep(1000);
	assert_int_equal(latent_image_broken(rig->vm, path, sizeof path), 1);
	assert_string_equal(path, rig->image);
	assert_int_equal(waitpid(writer, &status, WNOHANG), 0); /* it waits */
	assert_int_equal(latent_image_settle(rig->vm, path), -EBUSY); /* not before it is private */
	assert_int_equal(latent_image_privatize(rig->vm, path), 0);
	assert_int_equal(latent_image_settle(rig->vm, path), 0);
	assert_int_equal(latent_image_release(rig->vm, path), 0);
	assert_int_equal(waitpid(writer, &status, 0), writer);
	assert_int_equal(status, 0);
	assert_image(rig->ram, 0, 5 * PAGE);
	assert_int_equal(rig->ram[5 * PAGE], 1);
	assert_image(rig->ram + 6 * PAGE, 6 * PAGE, 94 * PAGE);
	assert_int_equal(stats_of(rig->vm).overlay_pages, 0);
	assert_int_equal(read_into(rig, 0, PAGE, 0), 0); /* and it is mapped no more: it is empty now */
}

static void the_image_is_mapped_again_when_the_writer_has_gone(void **state)
{
	struct rig *rig = *state;
	char path[128];
	int writer;

	read_into(rig, 0, 100 * PAGE, 0);
	writer = open(rig->image, O_RDWR | O_NONBLOCK); /* does not wait, but breaks the lease */
	assert_int_equal(writer, -1);
	assert_int_equal(latent_image_broken(rig->vm, path, sizeof path), 1);
	assert_int_equal(latent_image_privatize(rig->vm, path), 0);
	assert_int_equal(latent_image_settle(rig->vm, path), 0);
	assert_int_equal(latent_image_release(rig->vm, path), 0);
	writer = open(rig->image, O_RDWR | O_NONBLOCK);
	assert_true(writer >= 0);
	assert_int_equal(pwrite(writer, "new", 3, 10 * PAGE), 3);
	assert_int_equal(read_into(rig, 0, 100 * PAGE, 0), 100 * PAGE);
	sleep(6);
	latent_images_tidy(rig->vm); /* it is still there */
	assert_int_equal(read_into(rig, 0, 100 * PAGE, 0), 100 * PAGE);
	assert_int_equal(stats_of(rig->vm).overlay_pages, 0);
	close(writer);
	for (int i = 0; i < 20 && !stats_of(rig->vm).overlay_pages; i++) {
		sleep(1);
		latent_images_tidy(rig->vm);
		assert_int_equal(read_into(rig, 0, 100 * PAGE, 0), 100 * PAGE);
	}
	assert_int_equal(stats_of(rig->vm).overlay_pages, 100);
	assert_memory_equal(rig->ram + 10 * PAGE, "new", 3);
	assert_image(rig->ram, 0, 10 * PAGE);
}

static int count_files(const char *dir)
{
	DIR *files = opendir(dir);
	int count = 0;

	while (readdir(files))
		count++;
	closedir(files);
	return count - 2; /* . and .. */
}

/* Many more images than are known at a time, each used for a while. */
static void images_come_and_go(void **state)
{
	struct rig *rig = *state;
	char path[96];

	for (int i = 0; i < 100; i++) {
		int fd;

		snprintf(path, sizeof path, "%s/next", rig->dir);
		fd = open(path, O_CREAT | O_EXCL | O_RDWR, 0600);
		assert_int_equal(write(fd, rig->ram, PAGE), PAGE);
		assert_int_equal(pwrite(fd, &i, sizeof i, 0), sizeof i);
		close(fd);
		close(rig->image_fd);
		rig->image_fd = open(path, O_RDONLY);
		unlink(path);
		assert_int_equal(read_into(rig, 0, PAGE, 0), PAGE);
		assert_memory_equal(rig->ram, &i, sizeof i);
		if (stats_of(rig->vm).overlay_pages != 1)
			fail_msg("image %d is not mapped", i);
		assert_int_equal(latent_ram_discard(rig->vm, rig->ram, PAGE), 0);
		close(rig->image_fd);
		latent_images_tidy(rig->vm);
	}
	rig->image_fd = open(rig->image, O_RDONLY);
	assert_int_equal(count_files(rig->dir), 1); /* no tracking structure is left */
}

static void an_image_with_a_writer_is_copied(void **state)
{
	struct rig *rig = *state;
	int writer = open(rig->image, O_RDWR);

	assert_int_equal(read_into(rig, 0, 64 * PAGE, 0), 64 * PAGE);
	assert_image(rig->ram, 0, 64 * PAGE);
	assert_int_equal(stats_of(rig->vm).overlay_pages, 0);
	close(writer);
}

static void a_lone_vm_copies_and_a_second_one_maps(void **state)
{
	struct rig *rig = *state;
	struct iovec mine, other;
	struct latent_vm *first, *second;
	uint8_t *first_ram, *second_ram;
	int first_fd, second_fd;

	first = make_vm(rig, &first_ram, &first_fd, 0.1);
	mine = (struct iovec){ first_ram, 64 * PAGE };
	assert_int_equal(latent_preadv(first, rig->image_fd, &mine, 1, 0), 64 * PAGE);
	assert_int_equal(stats_of(first).overlay_pages, 0);
	second = make_vm(rig, &second_ram, &second_fd, 0.1);
	other = (struct iovec){ second_ram, 64 * PAGE };
	assert_int_equal(latent_preadv(second, rig->image_fd, &other, 1, 0), 64 * PAGE);
	assert_int_equal(stats_of(second).overlay_pages, 64);
	assert_image(second_ram, 0, 64 * PAGE);
	latent_vm_destroy(first);
	latent_vm_destroy(second);
	munmap(first_ram, RAM_PAGES * PAGE);
	munmap(second_ram, RAM_PAGES * PAGE);
	close(first_fd);
	close(second_fd);
}

static void bad_arguments_are_refused(void **state)
{
	struct rig *rig = *state;
	struct latent_options options;
	struct latent_vm *vm = NULL;

	latent_options_init(&options);
	assert_int_equal(latent_vm_create(&options, &vm), -EINVAL); /* no directory */
	options.tracks_dir = rig->dir;
	options.share_threshold = 1.5;
	assert_int_equal(latent_vm_create(&options, &vm), -EINVAL);
	latent_options_init(&options);
	options.tracks_dir = rig->dir;
	options.size = 1;
	assert_int_equal(latent_vm_create(&options, &vm), -EINVAL);
	assert_int_equal(latent_ram_add(rig->vm, "x", rig->ram + 1, PAGE, rig->memfd, 0), -EINVAL);
	assert_int_equal(latent_ram_remove(rig->vm, rig), -ENOENT);
	assert_int_equal(latent_image_settle(rig->vm, "/nonexistent"), -ENOENT);
	assert_int_equal(latent_absorb_fault(rig->ram), 0);
	latent_vm_destroy(NULL);
	assert_non_null(strchr(latent_version(), '.'));
}

/* The thread sanitizer's own. */
#define HAS_MORE_THREADS 0
#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#undef HAS_MORE_THREADS
#define HAS_MORE_THREADS 1
#endif
#endif

/* All calls of a window, as a lane makes them. */
static int be_a_lane(int memfd, const uint8_t *ram)
{
	struct latent_segment segment = { memfd, 10 * PAGE, 64 * PAGE };
	struct iovec iov;
	struct latent_request request = {
		.size = sizeof request, .segments = &segment, .count = 1, .iov = &iov
	};
	struct latent_window_stats stats = { .size = sizeof stats };
	struct latent_window *window;
	int cpu = sched_getcpu();

	if (latent_window_register(cpu, 2, &window) || latent_window_check(window))
		return 1;
	if (latent_window_map(window, &request, LATENT_LOCAL_FLUSH) ||
	    latent_window_use(window, &request))
		return 2;
	if (memcmp(iov.iov_base, ram + 10 * PAGE, 64 * PAGE))
		return 3;
	if (latent_window_hand_over(window, &request) || latent_window_move(window, cpu))
		return 4;
	if (latent_window_map(window, &request, LATENT_GLOBAL_FLUSH) ||
	    latent_window_done(window, &request, 1))
		return 5;
	if (latent_window_recycle(window) || latent_window_stats_get(window, &stats))
		return 6;
	if (stats.requests != 2 || stats.handed_over != 1 || stats.mapped_pages || stats.peak_pages > 64)
		return 7;
	stats.size--;
	if (latent_window_stats_get(window, &stats) != -EINVAL)
		return 8;
	latent_window_unregister(window);
	return 0;
}

static void a_lane_has_windows(void **state)
{
	struct rig *rig = *state;
	int status = -1;
	pid_t lane;

	if (HAS_MORE_THREADS)
		skip(); /* a lane is a process of one */
	for (size_t i = 0; i < RAM_PAGES * PAGE; i++)
		rig->ram[i] = image_byte(i);
	lane = fork();
	if (!lane)
		_exit(be_a_lane(rig->memfd, rig->ram));
	assert_int_equal(waitpid(lane, &status, 0), lane);
	assert_int_equal(status, 0);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
	const struct CMUnitTest tests[] = {
		TEST(reads_are_mapped_and_right),
		TEST(every_alignment_reads_the_same),
		TEST(scattered_buffers_are_filled_in_order),
		TEST(the_end_of_the_file_is_a_short_read),
		TEST(errors_are_those_of_preadv),
		TEST(writes_stay_with_the_guest),
		TEST(a_discard_gives_zeros),
		TEST(a_writer_waits_until_the_image_is_given_up),
		TEST(the_image_is_mapped_again_when_the_writer_has_gone),
		TEST(images_come_and_go),
		TEST(an_image_with_a_writer_is_copied),
		TEST(a_lone_vm_copies_and_a_second_one_maps),
		TEST(bad_arguments_are_refused),
		TEST(a_lane_has_windows),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
