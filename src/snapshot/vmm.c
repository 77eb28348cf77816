/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "snapshot/vmm.h"

#include "os/os.h"
#include "vmdir/vmdir.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define COMMAND_MS 10000
#define STATE_MS 60000
#define START_MS 20000
#define OVER_MS 1000 /* a `migrate` that is being cancelled ends within that */
#define FINALIZE_TRIES 2000
#define BANDWIDTH (1ll << 40) /* bytes a second */

_Static_assert(QMP_WHY_BYTES <= SNAPSHOT_WHY_BYTES, "QEMU's words fit");

static void on_event(void *ctx, const char *name, struct json_object *data)
{
	struct vmm *vmm = ctx;
	struct json_object *status;

	if (!strcmp(name, "STOP") && !vmm->stopped_us)
		vmm->stopped_us = os_now_us();
	if (!strcmp(name, "RESUME"))
		vmm->continued_us = os_now_us();
	if (!strcmp(name, "MIGRATION") && data && json_object_object_get_ex(data, "status", &status))
		snprintf(vmm->migration, sizeof vmm->migration, "%s", json_object_get_string(status));
}

int vmm_run(struct vmm *vmm, const char *name, struct json_object *arguments, struct json_object **ret_value)
{
	const struct qmp_command command = { .name = name, .arguments = arguments, .timeout_ms = COMMAND_MS };
	char words[QMP_WHY_BYTES];
	int r = qmp_run(vmm->qmp, &command, ret_value, words);

	return r ? snapshot_fail(vmm->why, r, "QEMU's %s: %.200s", name, words) : 0;
}

/* ---- open and close ------------------------------------------------------------------------------- */

static int query_version(struct vmm *vmm)
{
	struct json_object *value = NULL, *part;
	int r = vmm_run(vmm, "query-version", NULL, &value);

	if (!r && json_object_object_get_ex(value, "qemu", &part))
		snprintf(vmm->version, sizeof vmm->version, "%d.%d.%d",
			 json_object_get_int(json_object_object_get(part, "major")),
			 json_object_get_int(json_object_object_get(part, "minor")),
			 json_object_get_int(json_object_object_get(part, "micro")));
	json_object_put(value);
	return r;
}

static int query_status(struct vmm *vmm)
{
	struct json_object *value = NULL, *part;
	int r = vmm_run(vmm, "query-status", NULL, &value);

	if (!r && json_object_object_get_ex(value, "status", &part)) {
		const char *status = json_object_get_string(part);

		vmm->ran = !strcmp(status, "running");
		if (!strcmp(status, "postmigrate"))
			r = snapshot_fail(vmm->why, -EBUSY, "the VM has been saved, or migrated, while it was paused, and QEMU does "
					  "not do that twice: let it run first (`cont`)");
		else if (!vmm->ran && strcmp(status, "paused"))
			r = snapshot_fail(vmm->why, -EBUSY, "the VM cannot be saved in the state \"%.40s\"%s", status,
					  !strcmp(status, "prelaunch") ? ": let it run first (`cont`)" : "");
	}
	json_object_put(value);
	return r;
}

int vmm_query_running(struct vmm *vmm, bool *ret_runs)
{
	struct json_object *value = NULL, *part;
	int r = vmm_run(vmm, "query-status", NULL, &value);

	if (!r)
		*ret_runs = json_object_object_get_ex(value, "running", &part) && json_object_get_boolean(part);
	json_object_put(value);
	return r;
}

static bool is_over(const char *migration)
{
	static const char *const over[] = { "none", "completed", "failed", "cancelled" };

	for (size_t i = 0; i < sizeof over / sizeof over[0]; i++)
		if (!strcmp(migration, over[i]))
			return true;
	return false;
}

static int query_migration(struct vmm *vmm, char ret_status[32])
{
	struct json_object *value = NULL, *part;
	int r = vmm_run(vmm, "query-migrate", NULL, &value);

	if (!r)
		snprintf(ret_status, 32, "%s", json_object_object_get_ex(value, "status", &part) ? json_object_get_string(part) : "none");
	json_object_put(value);
	return r;
}

/* QEMU has one migration at a time: with ours a user's would be cancelled. */
static int await_no_migration(struct vmm *vmm)
{
	uint64_t until_us = os_now_us() + OVER_MS * 1000ull;
	char status[32];
	int r;

	while (!(r = query_migration(vmm, status)) && !is_over(status)) {
		if (os_now_us() >= until_us)
			return snapshot_fail(vmm->why, -EBUSY, "QEMU is migrating the VM (\"%s\"): wait until that is over, or end it "
					     "(`migrate_cancel`)", status);
		usleep(10000);
	}
	return r;
}

static int greet(struct vmm *vmm)
{
	int r = qmp_greet(vmm->qmp, COMMAND_MS);

	if (r)
		return snapshot_fail(vmm->why, r, "QEMU does not answer on the monitor for saving: %s", strerror(-r));
	return query_version(vmm);
}

/* Its socket is there when QEMU has come so far. */
static int connect_waiting(struct vmm *vmm, const char *path, int end_fd)
{
	uint64_t until_us = os_now_us() + START_MS * 1000ull;
	struct pollfd p = { end_fd, POLLIN, 0 };
	int r;

	while ((r = qmp_connect(path, on_event, vmm, &vmm->qmp))) {
		if (end_fd >= 0 && poll(&p, 1, 0) > 0)
			return snapshot_fail(vmm->why, -EPIPE, "the VMM has ended (see its log)");
		if ((r != -ENOENT && r != -ECONNREFUSED) || os_now_us() >= until_us)
			return snapshot_fail(vmm->why, r, "the VM's monitor cannot be reached: %s", strerror(-r));
		usleep(2000);
	}
	return 0;
}

int vmm_open_waiting(const char *run_dir, int end_fd, char why[SNAPSHOT_WHY_BYTES], struct vmm *vmm)
{
	char path[VMDIR_PATH_BYTES];
	int r;

	*vmm = (struct vmm){ .why = why, .state_fd = -1, .max_bandwidth = -1 };
	snprintf(path, sizeof path, "%.230s/" VMDIR_MOVER, run_dir);
	r = connect_waiting(vmm, path, end_fd);
	return r ? r : greet(vmm);
}

int vmm_open(const char *run_dir, const _Atomic bool *stop, char why[SNAPSHOT_WHY_BYTES], struct vmm *vmm)
{
	char path[VMDIR_PATH_BYTES];
	int r;

	*vmm = (struct vmm){ .why = why, .state_fd = -1, .max_bandwidth = -1 };
	snprintf(path, sizeof path, "%.230s/" VMDIR_MOVER, run_dir);
	r = qmp_connect(path, on_event, vmm, &vmm->qmp);
	if (r)
		return snapshot_fail(why, r, "the VM's monitor for saving cannot be reached: %s", strerror(-r));
	qmp_stop_when(vmm->qmp, stop);
	r = greet(vmm);
	if (!r)
		r = query_status(vmm);
	return r ? r : await_no_migration(vmm);
}

static int set_capabilities(struct vmm *vmm, bool on)
{
	struct json_object *arguments = json_tokener_parse(
		on ? "{\"capabilities\": [{\"capability\": \"x-ignore-shared\", \"state\": true},"
		     "{\"capability\": \"pause-before-switchover\", \"state\": true},"
		     "{\"capability\": \"events\", \"state\": true}]}"
		   : "{\"capabilities\": [{\"capability\": \"x-ignore-shared\", \"state\": false},"
		     "{\"capability\": \"pause-before-switchover\", \"state\": false}]}");

	return vmm_run(vmm, "migrate-set-capabilities", arguments, NULL);
}

static int set_bandwidth(struct vmm *vmm, int64_t bytes_s)
{
	struct json_object *arguments = json_object_new_object();

	json_object_object_add(arguments, "max-bandwidth", json_object_new_int64(bytes_s));
	return vmm_run(vmm, "migrate-set-parameters", arguments, NULL);
}

/* The device state is not held up by what the user has set, which is kept. */
static int take_bandwidth(struct vmm *vmm)
{
	struct json_object *value = NULL, *part;
	int r = vmm_run(vmm, "query-migrate-parameters", NULL, &value);

	if (!r && json_object_object_get_ex(value, "max-bandwidth", &part))
		vmm->max_bandwidth = json_object_get_int64(part);
	json_object_put(value);
	return r ? r : set_bandwidth(vmm, BANDWIDTH);
}

void vmm_close(struct vmm *vmm)
{
	char ignored[SNAPSHOT_WHY_BYTES];

	vmm->why = ignored;
	if (vmm->qmp && vmm->max_bandwidth >= 0)
		(void)set_bandwidth(vmm, vmm->max_bandwidth);
	if (vmm->qmp && vmm->prepared)
		(void)set_capabilities(vmm, false);
	qmp_close(vmm->qmp);
	if (vmm->state_fd >= 0)
		close(vmm->state_fd);
	*vmm = (struct vmm){ .state_fd = -1, .max_bandwidth = -1 };
}

/* ---- the pause ------------------------------------------------------------------------------------ */

static int tell_failure(struct vmm *vmm)
{
	struct json_object *value = NULL, *words;
	int r = vmm_run(vmm, "query-migrate", NULL, &value);

	if (!r)
		r = snapshot_fail(vmm->why, -EIO, "QEMU could not save its device state: %.180s",
				  json_object_object_get_ex(value, "error-desc", &words) ? json_object_get_string(words)
											 : vmm->migration);
	json_object_put(value);
	return r;
}

static int wait_migration(struct vmm *vmm, const char *wanted)
{
	uint64_t until_us = os_now_us() + STATE_MS * 1000ull;

	while (strcmp(vmm->migration, wanted)) {
		int r = os_now_us() < until_us ? qmp_wait(vmm->qmp, 1000) : -ETIMEDOUT;

		if (!strcmp(vmm->migration, "failed") || !strcmp(vmm->migration, "cancelled"))
			return tell_failure(vmm);
		if (r && (r != -ETIMEDOUT || os_now_us() >= until_us))
			return snapshot_fail(vmm->why, r, "QEMU's device state did not come: %s", strerror(-r));
	}
	return 0;
}

static int give_fd(struct vmm *vmm, int fd, const char *arguments)
{
	struct qmp_command getfd = { .name = "getfd", .timeout_ms = COMMAND_MS, .fd = fd };
	char words[QMP_WHY_BYTES];
	int r;

	getfd.arguments = json_tokener_parse(arguments);
	r = qmp_run(vmm->qmp, &getfd, NULL, words);
	return r ? snapshot_fail(vmm->why, r, "QEMU's getfd: %.200s", words) : 0;
}

int vmm_begin_pause(struct vmm *vmm)
{
	int r;

	qmp_stop_when(vmm->qmp, NULL); /* what has begun to pause goes to its end, which is near */
	vmm->state_fd = os_memfd_create("latent-state", 0, false);
	if (vmm->state_fd < 0)
		return snapshot_fail(vmm->why, vmm->state_fd, "no memory for the device state");
	r = give_fd(vmm, vmm->state_fd, "{\"fdname\": \"latent-state\"}");
	if (!r) { /* refused if a user has begun a migration meanwhile, which then is left alone */
		r = set_capabilities(vmm, true);
		vmm->prepared = r != -EREMOTEIO;
	}
	if (!r)
		r = take_bandwidth(vmm);
	if (r)
		return r;
	r = vmm_run(vmm, "migrate", json_tokener_parse("{\"uri\": \"fd:latent-state\"}"), NULL);
	vmm->stopped = r != -EREMOTEIO;
	return r;
}

int vmm_wait_stopped(struct vmm *vmm)
{
	return wait_migration(vmm, "pre-switchover");
}

/* Its answer is not waited for. */
static int begin(struct vmm *vmm, const char *name, const char *arguments)
{
	struct qmp_command command = { .name = name };
	int r;

	command.arguments = arguments ? json_tokener_parse(arguments) : NULL;
	r = qmp_send(vmm->qmp, &command);
	return r ? snapshot_fail(vmm->why, r, "QEMU's %s: %s", name, strerror(-r)) : 0;
}

int vmm_start_guest(struct vmm *vmm)
{
	vmm->continued_us = 0;
	return begin(vmm, "cont", NULL);
}

int vmm_poll_fd(const struct vmm *vmm)
{
	return vmm->qmp ? qmp_poll_fd(vmm->qmp) : -1;
}

void vmm_drain(struct vmm *vmm)
{
	qmp_drain(vmm->qmp);
}

int vmm_prepare_load(struct vmm *vmm, bool runs)
{
	static const char *const capabilities[] = {
		"{\"capabilities\": [{\"capability\": \"x-ignore-shared\", \"state\": true},"
		"{\"capability\": \"events\", \"state\": true}]}",
		"{\"capabilities\": [{\"capability\": \"x-ignore-shared\", \"state\": true},"
		"{\"capability\": \"late-block-activate\", \"state\": true},"
		"{\"capability\": \"events\", \"state\": true}]}",
	};

	return vmm_run(vmm, "migrate-set-capabilities", json_tokener_parse(capabilities[runs]), NULL);
}

int vmm_start_load(struct vmm *vmm, int state_fd)
{
	int r = lseek(state_fd, 0, SEEK_SET) ? snapshot_fail(vmm->why, -errno, "the device state cannot be read") : 0;

	if (!r)
		r = give_fd(vmm, state_fd, "{\"fdname\": \"latent-state\"}");
	return r ? r : begin(vmm, "migrate-incoming", "{\"uri\": \"fd:latent-state\"}");
}

int vmm_save_devices(struct vmm *vmm, uint64_t *ret_bytes)
{
	struct stat st;
	int r = vmm_run(vmm, "migrate-continue", json_tokener_parse("{\"state\": \"pre-switchover\"}"), NULL);

	if (!r)
		r = wait_migration(vmm, "completed");
	if (!r && fstat(vmm->state_fd, &st))
		r = snapshot_fail(vmm->why, -errno, "the device state cannot be read");
	if (!r)
		*ret_bytes = (uint64_t)st.st_size;
	return r;
}

/* QEMU tells that a migration is complete a moment before it lets the guest go on. */
int vmm_go_on(struct vmm *vmm)
{
	const struct qmp_command command = { .name = "cont", .timeout_ms = COMMAND_MS };
	char words[QMP_WHY_BYTES] = "";
	int r = 0;

	if (!vmm->ran || !vmm->stopped)
		return 0;
	for (int tries = 0; tries < FINALIZE_TRIES; tries++) {
		r = qmp_run(vmm->qmp, &command, NULL, words);
		if (r != -EREMOTEIO || !strstr(words, "not finalized"))
			break;
		usleep(300);
	}
	vmm->stopped = false;
	vmm->continued_us = os_now_us();
	return r ? snapshot_fail(vmm->why, r, "the VM was stopped and could not be continued (use `cont`): %.150s", words) : 0;
}

void vmm_undo(struct vmm *vmm)
{
	char why[SNAPSHOT_WHY_BYTES], *kept = vmm->why;

	vmm->why = why; /* what failed first is what the user shall hear */
	if (vmm->stopped) {
		if (strcmp(vmm->migration, "completed")) {
			(void)vmm_run(vmm, "migrate_cancel", NULL, NULL);
			for (int i = 0; i < 100 && strcmp(vmm->migration, "cancelled") && strcmp(vmm->migration, "failed"); i++)
				(void)qmp_wait(vmm->qmp, 10);
		}
		(void)vmm_go_on(vmm);
	}
	vmm->why = kept;
}
