/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "qemu/agent.h"

#include "os/log.h"
#include "os/os.h"
#include "vmdir/vmdir.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define EXIT_OTHER_BUILD 69 /* as `latent run` calls it */
#define FREEZE_MS 5000
#define FREEZE_OPEN_MS 1000 /* within an open of QEMU's */

static struct agent the_agent;
static bool configured;
static struct agent *_Atomic running; /* what agent_get returns */
static pthread_mutex_t start_lock = PTHREAD_MUTEX_INITIALIZER;
static struct sigaction vmm_sigbus; /* what the VMM wants done on SIGBUS */

struct agent *agent_get(void)
{
	return atomic_load_explicit(&running, memory_order_acquire);
}

bool agent_is_configured(void)
{
	return configured;
}

/* For `latent stat`: after -daemonize nobody sees standard error. */
static void keep_message(const char *text)
{
	struct vm_stats *stats = the_agent.stats;

	if (!stats)
		return;
	snprintf(stats->message, sizeof stats->message, "%.*s", (int)strcspn(text, "\n"), text);
	stats->message_unix_s = (uint64_t)time(NULL);
}

void agent_say(const char *format, ...)
{
	struct pollfd out = { .fd = STDERR_FILENO, .events = POLLOUT };
	char text[600];
	va_list args;
	int n = snprintf(text, sizeof text, "latent: %s: ", the_agent.config.name);

	va_start(args, format);
	n += vsnprintf(text + n, sizeof text - (size_t)n - 1, format, args);
	va_end(args);
	if (n > (int)sizeof text - 2)
		n = (int)sizeof text - 2;
	text[n++] = '\n';
	keep_message(text);
	/* Nobody may be reading: a message is not worth waiting for. */
	if (poll(&out, 1, 0) == 1 && write(STDERR_FILENO, text, (size_t)n) < 0)
		return;
}

static void say_log(void *ctx, const char *text)
{
	(void)ctx;
	agent_say("%s", text);
}

/* ---- configuration: in the constructor, before QEMU's main ----------------------------------- */

/* Only a QEMU is an agent's host; a shell script that starts one passes everything on. */
static bool is_qemu(void)
{
	char exe[4096];
	ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
	const char *base;

	if (n <= 0)
		return false;
	exe[n] = '\0';
	base = strrchr(exe, '/');
	return strstr(base ? base : exe, "qemu") != NULL;
}

/* Children of the VMM must not get the agent: takes its entry, and only that, out of LD_PRELOAD. */
static void leave_preload(void)
{
	const char *old = getenv("LD_PRELOAD");
	char *kept, *at;

	if (!old)
		return;
	kept = calloc(1, strlen(old) + 1);
	if (!kept)
		return;
	for (at = kept; *old;) {
		size_t n = strcspn(old, ": ");
		bool ours = n >= strlen("latent-qemu.so") &&
			    !strncmp(old + n - strlen("latent-qemu.so"), "latent-qemu.so", strlen("latent-qemu.so"));

		if (n && !ours) {
			at += at == kept ? 0 : sprintf(at, ":");
			memcpy(at, old, n);
			at += n;
		}
		old += n + strspn(old + n, ": ");
	}
	if (*kept)
		setenv("LD_PRELOAD", kept, 1);
	else
		unsetenv("LD_PRELOAD");
	free(kept);
}

static int take_number(const char *variable)
{
	const char *text = getenv(variable);
	int number = text ? atoi(text) : -1;

	unsetenv(variable);
	return number;
}

static void say_hello(void)
{
	int fd = take_number(AGENT_HELLO_ENV);

	if (fd < 0)
		return;
	if (write(fd, AGENT_HELLO_TEXT, strlen(AGENT_HELLO_TEXT)) < 0)
		return;
	close(fd);
}

static void keep_from_children(int fd)
{
	if (fd >= 0)
		fcntl(fd, F_SETFD, FD_CLOEXEC);
}

/* There is none where only a hello was wanted. */
static bool read_config(struct agent_config *c)
{
	int fd = take_number(AGENT_CONFIG_ENV);
	bool ok;

	if (fd < 0)
		return false;
	ok = pread(fd, c, sizeof *c, 0) == (ssize_t)sizeof *c && c->magic == AGENT_CONFIG_MAGIC &&
	     c->version == AGENT_CONFIG_VERSION && !c->name[sizeof c->name - 1] &&
	     !c->run_dir[sizeof c->run_dir - 1] && !c->volumes_dir[sizeof c->volumes_dir - 1];
	close(fd);
	if (!ok) {
		static const char sentence[] = "latent: latent-qemu.so and latent are not of one build: install both anew\n";

		(void)!write(STDERR_FILENO, sentence, sizeof sentence - 1);
		_exit(EXIT_OTHER_BUILD);
	}
	return true;
}

__attribute__((constructor)) static void load(void)
{
	struct agent_config *c = &the_agent.config;
	struct stat st;

	if (!is_qemu())
		return;
	leave_preload();
	say_hello();
	if (!read_config(c) || fstat(c->ram_fd, &st))
		return;
	the_agent.ram_dev = st.st_dev;
	the_agent.ram_ino = st.st_ino;
	keep_from_children(c->ram_fd);
	keep_from_children(c->lock_fd);
	keep_from_children(c->qmp_fd);
	keep_from_children(c->qmp_vmm_fd);
	keep_from_children(c->monitor_fd);
	keep_from_children(c->stats_fd);
	if (c->restore.active) {
		keep_from_children(c->restore.report_fd);
		keep_from_children(c->restore.overlays_fd);
		keep_from_children(c->restore.ram_fd);
		keep_from_children(c->restore.pages_fd);
		keep_from_children(c->restore.state_fd);
		keep_from_children(c->restore.active_fd);
		keep_from_children(c->restore.learned_fd);
		keep_from_children(c->restore.learn_dir_fd);
		for (uint32_t i = 0; i < c->restore.volumes && i < AGENT_RESTORE_VOLUMES; i++)
			keep_from_children(c->restore.volume_fd[i]);
	}
	if (c->incoming.active) {
		keep_from_children(c->incoming.channel_fd);
		for (uint32_t i = 0; i < c->incoming.volumes && i < AGENT_RESTORE_VOLUMES; i++)
			keep_from_children(c->incoming.volume_fd[i]);
	}
	configured = true;
}

/* ---- start: when guest RAM is mapped, after -daemonize has forked ------------------------------ */

int agent_start_thread(const char *name, void *(*run)(void *), void *arg, bool takes_sigbus)
{
	sigset_t blocked, old;
	pthread_t thread;
	int r;

	sigfillset(&blocked);
	if (takes_sigbus)
		sigdelset(&blocked, SIGBUS);
	pthread_sigmask(SIG_SETMASK, &blocked, &old);
	r = -pthread_create(&thread, NULL, run, arg);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (r)
		return r;
	pthread_setname_np(thread, name);
	return -pthread_detach(thread);
}

bool agent_is_ram(int fd)
{
	struct stat st;

	return configured && fd >= 0 && !fstat(fd, &st) && st.st_dev == the_agent.ram_dev &&
	       st.st_ino == the_agent.ram_ino;
}

static int map_stats(struct agent *a)
{
	void *at = os_view_file(a->config.stats_fd, sizeof *a->stats, true);

	if (!at || os_guard_view(at, sizeof *a->stats))
		return -ENOMEM;
	a->stats = at;
	a->stats->magic = VM_STATS_MAGIC;
	a->stats->version = VM_STATS_VERSION;
	snprintf(a->stats->name, sizeof a->stats->name, "%s", a->config.name);
	snprintf(a->stats->agent_version, sizeof a->stats->agent_version, "%s", LATENT_VERSION_TEXT);
	snprintf(a->stats->excluded_by, sizeof a->stats->excluded_by, "%s", a->config.excluded_by);
	a->overlays_allowed = a->config.overlays_allowed;
	a->stats->overlays_allowed = a->config.overlays_allowed;
	a->stats->started_unix_s = (uint64_t)time(NULL);
	for (int i = 0; a->config.restore.active && i < RESTORE_STEPS; i++)
		stat_set(&a->stats->restore_us[i], a->config.restore.step_us[i]);
	return 0;
}

static int create_volumes(struct agent *a)
{
	struct volume_options o = {
		.share_threshold = a->config.share_threshold,
		.min_run_pages = a->config.min_run_pages,
		.trust_images = a->config.trust_images,
		.tracks_dir = a->config.volumes_dir,
		.lease_signal = SERVICE_LEASE_SIGNAL,
	};
	int r = volumes_create(a->ram, &o, a->stats, &a->volumes);

	if (!r)
		volumes_allow(a->volumes, a->config.overlays_allowed);
	return r;
}

static int start(struct agent *a)
{
	const char *faults = getenv("LATENT_FAULT");
	pid_t service_tid = 0;
	int r;

	os_log_to(say_log, NULL);
	if (faults && os_fault_parse(faults))
		agent_say("LATENT_FAULT is not understood: %s", faults);
	a->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	r = a->wake_fd < 0 ? -errno : map_stats(a);
	if (!r)
		r = ram_create(a->config.budget_maps, &a->ram);
	if (!r)
		r = create_volumes(a);
	if (!r)
		r = service_start(a, &service_tid);
	if (r) {
		agent_say("sharing is off: the agent could not start: %s", strerror(-r));
		volumes_destroy(a->volumes);
		ram_destroy(a->ram);
		a->volumes = NULL;
		a->ram = NULL;
		return r;
	}
	volumes_lease_to(a->volumes, service_tid);
	(void)agent_set_sigbus(NULL, NULL);
	atomic_store_explicit(&running, a, memory_order_release);
	return 0;
}

/* With the range lock. A page that is brought by its address comes alone; see "Huge pages" in docs/activity.md. */
static void keep_small(struct agent *a, void *hva, size_t bytes)
{
	if (!os_set_marks(hva, bytes, OS_MARK_NOHUGEPAGE, true)) /* no: this kernel has none */
		ram_remember_advice(a->ram, hva, bytes, MADV_NOHUGEPAGE);
}

/* The kernel joins mappings of one opening of a file only: base has to be mapped from the VMM's own,
 * or what returns to base never becomes one mapping with what has always been there. */
static int add_block(struct agent *a, void *hva, size_t bytes, int fd, uint64_t offset)
{
	int same_opening = fcntl(fd, F_DUPFD_CLOEXEC, 0), r;
	struct ram_block *block;

	if (same_opening < 0)
		return -errno;
	ram_lock(a->ram);
	r = ram_add_block(a->ram, a->config.block_name, hva, bytes >> OS_PAGE_SHIFT, same_opening, offset,
			  &block);
	if (!r)
		keep_small(a, hva, bytes);
	ram_unlock(a->ram);
	if (r) {
		close(same_opening);
	} else {
		a->ram_bytes += bytes;
		a->stats->ram_bytes = a->ram_bytes;
		a->stats->pid = (uint32_t)getpid();
		if (a->config.restore.active)
			r = restorer_begin(a, block);
		else if (a->config.incoming.active)
			r = incoming_begin(a);
	}
	return r;
}

void agent_ram_mapped(void *hva, size_t bytes, int fd, uint64_t offset)
{
	struct agent *a = &the_agent;
	int r;

	pthread_mutex_lock(&start_lock);
	r = agent_get() ? 0 : start(a);
	if (!r)
		r = add_block(a, hva, bytes, fd, offset);
	pthread_mutex_unlock(&start_lock);
	if (!r)
		return;
	agent_say("guest RAM is not managed: %s", strerror(-r));
	if (configured && a->config.restore.active) { /* it would begin with nothing in it */
		resume_drop_disks(a);
		_exit(1);
	}
}

void agent_ram_unmapped(void *hva, size_t bytes)
{
	struct agent *a = agent_get();
	struct ram_block *b;

	if (!a || !ram_find(a->ram, hva, OS_PAGE_BYTES))
		return;
	restorer_wait();
	ram_lock(a->ram);
	b = ram_find(a->ram, hva, OS_PAGE_BYTES);
	if (b && b->hva == hva && os_bytes(b->pages) <= bytes) {
		close(b->memfd);
		ram_remove_block(a->ram, b);
	}
	ram_unlock(a->ram);
}

/* ---- what cannot live with overlays ----------------------------------------------------------- */

void agent_note_kernel_io(bool of_drives)
{
	struct agent *a = agent_get();

	if (!a)
		return;
	if (!a->kernel_io)
		reclaimer_leave(); /* before anybody goes on who sees the flag */
	a->kernel_io = true;
	if (of_drives)
		a->stats->other_io = 1;
}

const char *agent_explain_large(void)
{
	return os_memfd_is_fine_grained() ? NULL
		: "shared memory comes in huge pages, of which no page can be missing alone: write never or advise to "
		  "/sys/kernel/mm/transparent_hugepage/shmem_enabled (and to the files of that name in hugepages-*kB)";
}

int agent_freeze(unsigned timeout_ms)
{
	return os_freeze(AGENT_FREEZE_SIGNAL, timeout_ms);
}

/* A thread sets the flag before it hands its I/O to the kernel: asked before it stands, it may do both in between. */
int agent_freeze_writers(struct agent *a, unsigned timeout_ms)
{
	int r = a->kernel_io ? -EBUSY : agent_freeze(timeout_ms);

	if (!r && a->kernel_io) {
		os_thaw();
		r = -EBUSY;
	}
	return r;
}

int agent_settle_frozen(struct agent *a, bool all, unsigned timeout_ms, struct settled *done)
{
	uint64_t begin_us;
	struct volume *v;
	int r;

	ram_lock(a->ram); /* before the others stop: one of them may have it */
	begin_us = os_now_us();
	r = agent_freeze_writers(a, timeout_ms);
	if (!r) {
		for (uint32_t i = 0; (v = volumes_nth(a->volumes, i)); i++) {
			int one = all || !volume_is_mapped(v) ? volume_settle(v, &done->pages) : 0;

			r = r ? r : one;
		}
		os_thaw();
		r = r == -ETIMEDOUT || r == -EBUSY ? -EIO : r; /* these two mean that nothing was tried */
		done->paused_us += os_now_us() - begin_us;
	}
	ram_unlock(a->ram);
	return r;
}

static const char *why_not_converted(int r)
{
	if (r == -EBUSY)
		return "the kernel does I/O to them (vhost, io_uring or Linux AIO)";
	if (r == -EINPROGRESS)
		return "others are still to come from where the VM was before";
	return r == -ETIMEDOUT ? "a thread of QEMU did not stop in time" : strerror(-r);
}

int agent_exclude(const char *what)
{
	struct agent *a = agent_get();
	struct settled done = { 0 };
	struct ram_counts c;
	struct volume *v;
	int r;

	if (!a || (!a->overlays_allowed && !ram_expected(a->ram)))
		return 0;
	restorer_wait();
	volumes_allow(a->volumes, false);
	reclaimer_leave();
	r = ram_unmask(a->ram);
	ram_get_counts(a->ram, &c);
	for (uint32_t i = 0; c.overlay_pages && (v = volumes_nth(a->volumes, i)); i++)
		volume_swap_in(v);
	if (!r && c.overlay_pages)
		r = agent_settle_frozen(a, true, FREEZE_MS, &done);
	if (r) {
		volumes_allow(a->volumes, a->overlays_allowed);
		agent_say("refused: %s; %llu pages of guest RAM are mapped from disk images, and %s. "
			  "Run `latent detach %s` and try again",
			  what, (unsigned long long)c.overlay_pages, why_not_converted(r), a->config.name);
		return -EPERM;
	}
	snprintf(a->stats->excluded_by, sizeof a->stats->excluded_by, "%s", what);
	a->overlays_allowed = false;
	a->stats->overlays_allowed = 0;
	agent_say("%s; %llu pages that were mapped are plain RAM now, and from now on nothing is mapped", what,
		  (unsigned long long)done.pages);
	return 0;
}

/*
 * What is mapped from the file goes to base before the writer goes on. Where that cannot be done here and now,
 * it is kept as private copies, which the service thread moves to base as soon as it can stop the guest.
 */
static int give_up(struct agent *a, struct volume *v, const char *path)
{
	struct settled done = { 0 };
	uint64_t one = 1;
	int r = volume_break(v, VOLUME_WRITABLE);

	if (r) {
		agent_say("%s cannot be opened for writing: its pages in guest RAM could not be copied (%s)", path,
			  strerror(-r));
		return r;
	}
	(void)agent_settle_frozen(a, false, FREEZE_OPEN_MS, &done);
	stat_add(&a->stats->pages_settled, done.pages);
	volume_release(v);
	(void)!write(a->wake_fd, &one, sizeof one); /* fails only when it is awake already */
	return 0;
}

int agent_before_write(int dir, const char *path)
{
	struct agent *a = agent_get();
	struct stat st;
	struct volume *v;
	int r;

	if (!a || fstatat(dir, path, &st, 0))
		return 0;
	if (restorer_uses(a, &st))
		restorer_wait(); /* which may be about to map it */
	v = volume_get(a->volumes, &st);
	if (!v)
		return 0;
	/* Also when somebody else is about to give it up, or could not. */
	r = volume_is_mapped(v) || volume_overlay_pages(v) ? give_up(a, v, path) : 0;
	volume_put(v);
	return r;
}

/* ---- faults that the kernel could not serve --------------------------------------------------- */

void agent_explain_fault(const void *addr)
{
	struct agent *a = agent_get();
	struct ram_block *b = a ? ram_find(a->ram, addr, 1) : NULL;
	struct ram_range range;
	struct volume *v = NULL;

	if (!b)
		return;
	range = ram_range_at(b, ((uintptr_t)addr - (uintptr_t)b->hva) >> OS_PAGE_SHIFT, b->pages);
	if (range.source == ENTRY_OVERLAY)
		v = volumes_by_index(a->volumes, range.file);
	agent_say("a page of guest RAM cannot be read: offset %#llx of %s, from %s at byte %llu. "
		  "Storage failed, or the file was cut while it was mapped",
		  (unsigned long long)((uintptr_t)addr - (uintptr_t)b->hva), b->name,
		  v ? volume_path(v) : "guest RAM's own memory",
		  (unsigned long long)(v ? os_bytes(range.file_page) : 0));
}

void agent_explain_kvm_fault(void)
{
	struct agent *a = agent_get();
	struct ram_block *b;
	uint64_t page;
	bool found;

	ram_lock(a->ram);
	found = ram_find_unreadable(a->ram, &b, &page);
	ram_unlock(a->ram);
	if (found)
		agent_explain_fault(b->hva + os_bytes(page));
	else
		agent_say("KVM could not get a page of guest RAM, though all that is mapped can be read");
}

static void on_sigbus(int signal, siginfo_t *info, void *context)
{
	if (os_absorb_fault(info->si_addr))
		return;
	agent_explain_fault(info->si_addr);
	if (vmm_sigbus.sa_flags & SA_SIGINFO) {
		vmm_sigbus.sa_sigaction(signal, info, context);
	} else if (vmm_sigbus.sa_handler != SIG_DFL && vmm_sigbus.sa_handler != SIG_IGN) {
		vmm_sigbus.sa_handler(signal);
	} else {
		struct sigaction fatal = { .sa_handler = SIG_DFL };

		hooks_real_sigaction(signal, &fatal, NULL); /* the access is tried again, and ends the VMM */
	}
}

int agent_set_sigbus(const struct sigaction *act, struct sigaction *old)
{
	struct sigaction ours = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER };
	static bool installed;
	int r = 0;

	if (!installed) {
		r = hooks_real_sigaction(SIGBUS, &ours, &vmm_sigbus);
		installed = !r;
	}
	if (!r && old)
		*old = vmm_sigbus;
	if (!r && act)
		vmm_sigbus = *act;
	/* The VMM gives up and raises the signal again, to die of it. */
	if (!r && act && !(act->sa_flags & SA_SIGINFO) && act->sa_handler == SIG_DFL)
		r = hooks_real_sigaction(SIGBUS, act, NULL);
	return r;
}

/* ---- the end ---------------------------------------------------------------------------------- */

__attribute__((destructor)) static void unload(void)
{
	if (!configured)
		return;
	/* The child of -daemonize, which has this descriptor too, is then all that keeps the lock. */
	close(the_agent.config.lock_fd);
	/* (A fill is cut short with the process; who starts next removes what it has left.) */
	if (agent_get() && the_agent.stats->pid == (uint32_t)getpid() && !restorer_is_filling())
		volumes_abandon(the_agent.volumes);
	/* Else it is -daemonize's parent that ends here. */
	if (!vmdir_remove_if_dead(the_agent.config.run_dir) && the_agent.config.restore.active)
		resume_drop_disks(&the_agent);
}
