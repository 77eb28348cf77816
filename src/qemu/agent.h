/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The agent inside QEMU, loaded by LD_PRELOAD:
 *   agent.c    its life: configuration, start at the first mapping of guest RAM, clean-up
 *   hooks.c    the C library's functions that it stands in front of
 *   service.c  its one thread: control socket, lease breaks, housekeeping
 *   saver.c    its part of a save
 *   restorer.c its part of a restore
 *   faults.c   its other thread, from the first restore or save on: serves faults
 *   layout.c   blocks of guest RAM, told to other processes
 *   lazy.c     its end of a source that cannot be mapped
 *   learner.c  what a restored guest asks for first
 *   pause.c    the guest stopped and continued, over a QMP connection of its own
 *   scanner.c  its thread that looks at what the guest uses, from the first request for that on
 *   reclaimer.c its thread that gives cold memory back to the host, from the first request for that on
 *   incoming.c its end of a migration to this host
 *   resume.c   what comes after a restore: the guest runs, or waits to be taken
 *
 * Until guest RAM is mapped no thread runs and every hook passes through.
 */
#ifndef LATENT_QEMU_AGENT_H
#define LATENT_QEMU_AGENT_H

#include "core/ram.h"
#include "vmdir/agent_config.h"
#include "vmdir/control.h"
#include "vmdir/stats.h"
#include "volume/volume.h"

#include <signal.h>
#include <stdbool.h>
#include <sys/stat.h>

struct agent {
	struct agent_config config;
	struct vm_stats *stats;
	dev_t ram_dev;
	ino_t ram_ino;
	uint64_t ram_bytes; /* of all blocks that are mapped */
	struct ram *ram;
	struct volumes *volumes;
	_Atomic bool overlays_allowed; /* what agent_exclude has decided */
	_Atomic bool ram_given; /* to another process, whose writes nobody here can hold up */
	_Atomic bool kernel_io; /* the kernel does I/O to guest RAM with no thread of QEMU's in it */
	int wake_fd; /* eventfd: the service thread shall look at what hooks have left to do */
};

/* NULL until guest RAM is mapped; then set once and for good. */
struct agent *agent_get(void);

/* A process that `latent run` has started, whether guest RAM is mapped yet or not. */
bool agent_is_configured(void);

/* Is `fd` the memfd behind guest RAM? */
bool agent_is_ram(int fd);

/* A thread of the agent's own, which nobody joins and no signal of QEMU's reaches. `takes_sigbus`: it looks at files that
 * somebody may cut, or at guest RAM that shows such a file. `name`: at most 15 characters. -EAGAIN: there is no room. */
int agent_start_thread(const char *name, void *(*run)(void *), void *arg, bool takes_sigbus);

/* Guest RAM has been mapped at hva from fd (from mmap's hook); starts the agent at the first time. */
void agent_ram_mapped(void *hva, size_t bytes, int fd, uint64_t offset);
void agent_ram_unmapped(void *hva, size_t bytes);

/*
 * Something is about to be used that needs all of guest RAM in one file. What is mapped goes to base first,
 * with all other threads of the VMM stopped. 0: go on, no overlay will be made any more. -EPERM: that could
 * not be done; the refusal has been explained.
 */
int agent_exclude(const char *what);
/* vhost, io_uring and Linux AIO do I/O to guest RAM that no stopped thread holds up. */
void agent_note_kernel_io(bool of_drives);

/* What to do where shared memory comes in large folios; NULL: it does not. */
const char *agent_explain_large(void);

/* os_freeze of all threads but the agent's own ones; os_thaw ends it. */
int agent_freeze(unsigned timeout_ms);
/* The same for who needs that nobody writes guest RAM. -EBUSY: the kernel may do so by itself; nobody stands then. */
int agent_freeze_writers(struct agent *agent, unsigned timeout_ms);

struct settled {
	uint64_t pages, paused_us;
};

/*
 * Settles what is mapped no more, or `all`, with every other thread of the VMM stopped by a signal; from any
 * thread, with no lock held. -EBUSY: the kernel may do I/O to guest RAM by itself; -ETIMEDOUT: a thread
 * did not stop. With both nothing was done. Other errors: as volume_settle.
 */
int agent_settle_frozen(struct agent *agent, bool all, unsigned timeout_ms, struct settled *done);

/* A file is about to be opened for writing by the VMM itself. 0, or the negative errno that the open has
 * to fail with, because pages that show the file could not be copied. */
int agent_before_write(int dir, const char *path);

/* `actions` of SIGBUS: the agent's handler explains, then does what the VMM asked for. */
int agent_set_sigbus(const struct sigaction *act, struct sigaction *old);
void agent_explain_fault(const void *addr);
void agent_explain_kvm_fault(void); /* KVM says that, but not where */

/* hooks.c: the C library's own sigaction. */
int hooks_real_sigaction(int signal, const struct sigaction *act, struct sigaction *old);

/* service.c: starts the thread; returns when it is ready to receive leases' signals, or an errno. */
int service_start(struct agent *agent, pid_t *ret_tid);
#define SERVICE_LEASE_SIGNAL (SIGRTMAX - 3)
#define AGENT_FREEZE_SIGNAL (SIGRTMAX - 4)

/* service.c: the VMM writes to a descriptor (from sendmsg's hook): settles here when it is the reply to
 * the agent's own `stop`, sent by the main loop. */
void service_before_send(int fd, const struct iovec *iov, size_t count);

/* pause.c: one thread (the service's) uses it. */
struct pause;
int pause_open(int fd, struct pause **ret_pause); /* the agent's end of its QMP connection; takes it */
/* Is this a moment in which the guest can be stopped for good? -EBUSY: no (a migration, a suspend).
 * `*ret_stop_id`: the id that the next request, pause_stop's, will have. -ETIMEDOUT. */
int pause_prepare(struct pause *pause, unsigned *ret_stop_id);
/* Stops the guest and drains its I/O. `*ret_stopped`: it ran before, and it was us. -ETIMEDOUT. */
int pause_stop(struct pause *pause, bool *ret_stopped);
int pause_end(struct pause *pause);
/* Stops the guest until a user lets it go on; a stop that comes late is as good. -EBUSY, -ETIMEDOUT: as above. */
int pause_halt(struct pause *pause);
/* A save begins: whether the guest runs now is remembered. When the process that saves is gone, what it has begun
 * in QEMU is taken back, and a guest that it has stopped runs again. */
void pause_save_begins(struct pause *pause);
int pause_undo_save(struct pause *pause);
void pause_give(struct pause *pause); /* the guest is another host's now, and stays stopped */
int pause_poll_fd(const struct pause *pause);
/* `migrate-incoming` from an inherited descriptor; comes back when the devices have their state. The guest stands
 * then (-S). */
int pause_load_state(struct pause *pause, int fd, char *why, size_t why_bytes);
int pause_resume(struct pause *pause);
void pause_quit(struct pause *pause); /* waits for nothing */
bool pause_is_loaded(const struct pause *pause);
uint64_t pause_resumed_us(const struct pause *pause); /* when the guest ran first; 0: not yet */
void pause_drain(struct pause *pause); /* reads and drops what has come */

/* saver.c: requests of a save, from the service thread; `client` is the connection that they came by. */
struct control_reply;
void saver_load(struct agent *agent, int client, struct control_reply *reply);
void saver_begin(struct agent *agent, int client, struct control_reply *reply);
void saver_began(struct agent *agent, int client); /* the reply has been sent: the layout follows */
void saver_arm(struct agent *agent, int client, struct control_reply *reply);
void saver_pass(int client, uint64_t pass_us, struct control_reply *reply);
void saver_written(struct agent *agent, uintptr_t hva); /* from faults.c */
void saver_peer_gone(void);
void saver_watch(int client, struct control_reply *reply);
void saver_settle(struct agent *a, int client, struct control_reply *reply);
uint64_t saver_tick(struct agent *agent); /* to be called again after so many microseconds at the latest */
bool saver_stays(void); /* any thread: a save has its point in time, and the guest goes on here */
void saver_point(struct agent *agent, int client, struct control_reply *reply);
void saver_end(struct agent *agent, int client, struct control_reply *reply);
bool saver_client_gone(struct agent *agent, int client); /* true: it was saving the VM */
bool saver_is_client(int client); /* it saves the VM, or is about to */

/* incoming.c: at the first mapping of guest RAM. */
int incoming_begin(struct agent *agent);
/* False: what the guest begins with is still to come, and the mover writes guest RAM by its descriptor, which no
 * protection of a mapping holds up. True of a VM that has come from nowhere. Any thread. */
bool incoming_may_run(const struct agent *agent);
/* Also what comes while the guest runs is there. Any thread, without the mask lock. */
bool incoming_is_complete(const struct agent *agent);
void incoming_want(struct agent *agent, uintptr_t hva);
/* Another mover in the place of one that is gone: its end of a new channel. From the service thread. -ENOENT: nothing
 * has come from another host; -EALREADY: there is a mover. */
int incoming_attach(int *ret_channel);

/* layout.c, from the service thread. layout_send: at most LAYOUT_FDS descriptors; -EPIPE. */
#define LAYOUT_FDS (CONTROL_FD_BLOCKS + CONTROL_FDS_PER_BLOCK * RAM_BLOCKS + 2)
void layout_describe(const struct ram_block *block, struct control_block *to);
int layout_send(int client, const struct control_layout *layout, const int *fds, size_t count);
/* What follows the reply to CONTROL_ENTRIES. */
int layout_send_tables(struct agent *agent, int client, bool with_memory);

/* scanner.c: looks at each page once in `period_us` from now on; 0: no more. -EINVAL: absurd; -EBUSY: QEMU has taken
 * guest RAM's userfaultfd. From the service thread. */
int scanner_set(struct agent *agent, uint64_t period_us);
/* A save begins or ends; it needs base for its own userfaultfd. From the service thread. */
void scanner_yield(bool yield);
/* It was a migration's: base is write-protected, a pass begins, and it takes so long; 0: not known. */
void scanner_accompany(uint64_t pass_us);
/* QEMU is about to watch guest RAM by a userfaultfd of its own: there is no scan from now on. Any thread. */
void scanner_leave(void);
uint64_t scanner_shortest_us(void); /* as in struct scan_report; 0: nothing is known. Any thread */

/* reclaimer.c: walks once through guest RAM and gives back the memory of pages that were not used for so
 * long (not 0), until the VM takes no more than so many bytes of memory (0: to the end); replies at
 * once. From the service thread. -EBUSY and a sentence: not in this VM, or not now; -EALREADY. */
struct reclaim_order {
	uint64_t unused_us, until_bytes;
};
void reclaimer_begin(struct agent *agent, const struct reclaim_order *order,
		     struct control_reply *reply);
/* What is packed goes to this file from now on (taken, if it works), at most so many bytes of it. As above; -EALREADY:
 * there is one. */
void reclaimer_store(struct agent *agent, int fd, uint64_t most_bytes, struct control_reply *reply);
/* A walk that is under way ends soon; what it has given back stays so. */
void reclaimer_end(void);
/* Brings its statistics up to date; returns memory_bytes_now of them. Any thread, with no lock held. */
uint64_t reclaimer_publish(struct agent *agent);
/* A save begins or ends: nothing is masked meanwhile. From the service thread. */
void reclaimer_yield(bool yield);
/* Somebody is about to get hold of guest RAM who would not see that a page of it is taken away: nothing
 * is taken any more when it returns. Any thread, with no lock held. */
void reclaimer_leave(void);

/* faults.c: from now on pages may be masked. -EPERM, -EOPNOTSUPP: as os_uffd_open; -EOPNOTSUPP also while shared memory
 * comes in large folios (agent_explain_large), of which no page can be missing alone. */
int faults_make_pages(struct agent *agent);
/* Writes to what `uffd` protects go to saver_written; -1: no more (none is under way when it returns). */
int faults_serve_writes(struct agent *agent, int uffd);
/* When the other end of this socket is gone, saver_peer_gone is called; -1: no more, as above. */
void faults_watch_peer(int socket);

/* restorer.c: begins to fill guest RAM, in a thread of its own; it ends QEMU when that fails. -ENOMEM. */
int restorer_begin(struct agent *agent, struct ram_block *block);
/* Until guest RAM is what it begins with: before it, or what it comes from, is changed. At once without a restore.
 * With no lock held but the start lock. */
void restorer_wait(void);
bool restorer_is_filling(void);
bool restorer_uses(const struct agent *agent, const struct stat *file);
/* Devices get their state, and the guest runs; from the service thread. NULL pause: there is no QMP. */
void restorer_load_state(struct agent *agent, struct pause *pause);

/* learner.c. Before anything is brought into the page table: from now on each page comes there alone. */
void learner_begin(struct agent *agent);
/* The end of that, for who wants to watch guest RAM: with what else the kernel maps there the list is less exact. */
void learner_yield(struct agent *agent);
/* Pages of a restored block that the guest has to bring by itself (`may`: 1, else 0, for each, by malloc; taken),
 * and which of the snapshot the first of them is. From the thread that fills it. */
void learner_watch(struct agent *agent, struct ram_block *block, uint64_t ram_page, uint8_t *may);
/* From the service thread: looks at what the guest asks for in its first second, and writes it down at the end of that.
 * To be called again after so many microseconds at the latest. */
uint64_t learner_tick(struct agent *agent);

/* resume.c, from the service thread: goes on where restorer_load_state has ended. */
void resume_restored(struct agent *agent, struct pause *pause);
/* What the pause has drained may have been that the guest runs. */
void resume_note(struct agent *agent, struct pause *pause);
/* The rest is loaded so far, by a pager (any thread) or by the process whose reports come at this descriptor (-1: none). */
void resume_note_rest(struct agent *agent, enum rest_state state, uint64_t pages_all, uint64_t pages_now);
int resume_rest_fd(const struct agent *agent);
void resume_rest_said(struct agent *agent);
void resume_stop_rest(struct agent *agent, struct control_reply *reply);
/* The descriptor that tells a spare when its keeper is gone, and what to do then; -1: none. */
int resume_poll_fd(const struct agent *agent);
void resume_keeper_gone(struct agent *agent, struct pause *pause);
void resume_take(struct agent *agent, struct pause *pause, const char *name, struct control_reply *reply);
/* Removes the disks of a VM whose guest has never run; any thread, when QEMU ends. */
void resume_drop_disks(const struct agent *agent);
/* lazy.c: a source that cannot be mapped, which a pager brings into a cache. Used by the restorer. */
int lazy_begin(struct agent *agent); /* does nothing the second time */
bool lazy_may_map(void); /* else all has to be loaded before it is read */
/* The cache has been mapped there, and nobody has touched it yet. */
int lazy_mapped(void *hva, size_t bytes);
int lazy_watch(const struct ram_block *block, uint64_t first_page); /* first_page: of the cache */
void lazy_load_all(void); /* waits until the cache is whole */
void lazy_load_rest(void); /* the guest runs: what it has not touched is loaded, too */
void lazy_stop_rest(void);
/* All is wanted before anything else but what is waited for; or no more. */
void lazy_want_all(bool wanted);
/* Of what VMs map; both are 0 before the pager has said anything. */
void lazy_count(uint64_t *ret_present, uint64_t *ret_all);

/* hooks.c: sendmsg(2), which guest RAM's descriptors may pass. */
struct msghdr;
ssize_t agent_send(int fd, const struct msghdr *message);

/* "latent: NAME: text" on standard error. */
void agent_say(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
