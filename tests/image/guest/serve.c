/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* The command server: runs the host's shell commands, several at a time.
 *
 * Frames in both directions: a header of four little-endian 32-bit words
 * (magic, type, id, payload bytes), then the payload.
 *
 *   host to guest   PING  any payload           answered by PONG with the same
 *                   RUN   a shell command       id chosen by the host
 *                   KILL  nothing               SIGKILL to the command's group
 *   guest to host   PONG, OUTPUT (standard output and error as they come),
 *                   EXIT  one word: exit status, or 128 + signal
 *
 * A host that connects again (after a restore, say) sends PING with a fresh
 * nonce and ignores everything before its answer; a frame that stays
 * incomplete for a second is dropped here. */
#include "guest.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#define PORT_NAME "org.latent.test"
#define FRAME_MAGIC 0x544e544cu /* "LTNT" */
#define REQUEST_MAX_BYTES (128u * 1024)
#define OUTPUT_CHUNK_BYTES (16u * 1024)
#define MAX_JOBS 64
#define PARTIAL_FRAME_MS 1000
#define UNCONNECTED_POLL_MS 20

enum frame_type { PING = 1, RUN = 2, KILL = 3, PONG = 4, OUTPUT = 5, EXIT = 6 };

struct frame_header {
	uint32_t magic;
	uint32_t type;
	uint32_t id;
	uint32_t payload_bytes;
};

struct job {
	pid_t pid; /* 0: this slot is free */
	uint32_t id;
	int output_fd; /* -1 after its end */
};

struct server {
	int port_fd;
	int child_fd;
	struct job jobs[MAX_JOBS];
	size_t input_bytes;
	unsigned char input[sizeof(struct frame_header) + REQUEST_MAX_BYTES];
};

/* ---- the port ---- */

static int port_has_name(const char *port)
{
	char path[300], name[64] = "";

	snprintf(path, sizeof(path), "/sys/class/virtio-ports/%s/name", port);
	FILE *file = fopen(path, "re");
	if (file == NULL)
		return 0;
	if (fgets(name, sizeof(name), file) != NULL)
		name[strcspn(name, "\n")] = '\0';
	fclose(file);
	return strcmp(name, PORT_NAME) == 0;
}

static int open_named_port(void)
{
	int fd = -ENOENT;
	DIR *ports = opendir("/sys/class/virtio-ports");

	if (ports == NULL)
		return -errno;
	for (struct dirent *entry; fd < 0 && (entry = readdir(ports)) != NULL;) {
		char path[300];
		if (!port_has_name(entry->d_name))
			continue;
		snprintf(path, sizeof(path), "/dev/%s", entry->d_name);
		fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
		if (fd < 0)
			fd = -errno;
	}
	closedir(ports);
	return fd;
}

static int wait_for_port(void)
{
	for (;;) {
		int fd = open_named_port();
		if (fd >= 0)
			return fd;
		usleep(20000);
	}
}

/* Writes everything, or gives up when no host is listening. */
static void port_write(int fd, const void *data, size_t bytes)
{
	const unsigned char *next = data;

	while (bytes > 0) {
		ssize_t written = write(fd, next, bytes);
		if (written > 0) {
			next += written;
			bytes -= (size_t)written;
		} else if (written < 0 && errno == EINTR) {
			continue;
		} else {
			struct pollfd poll_fd = { .fd = fd, .events = POLLOUT };
			poll(&poll_fd, 1, 1000);
			if (poll_fd.revents & (POLLHUP | POLLERR))
				return;
		}
	}
}

static void send_frame(struct server *server, enum frame_type type, uint32_t id, const void *payload,
		       size_t bytes)
{
	unsigned char frame[sizeof(struct frame_header) + OUTPUT_CHUNK_BYTES];
	struct frame_header header = { FRAME_MAGIC, type, id, (uint32_t)bytes };

	memcpy(frame, &header, sizeof(header));
	memcpy(frame + sizeof(header), payload, bytes);
	port_write(server->port_fd, frame, sizeof(header) + bytes);
}

static void send_exit(struct server *server, uint32_t id, int wait_status)
{
	uint32_t status = WIFEXITED(wait_status) ? (uint32_t)WEXITSTATUS(wait_status)
						 : 128u + (uint32_t)WTERMSIG(wait_status);
	send_frame(server, EXIT, id, &status, sizeof(status));
}

/* ---- jobs ---- */

static struct job *find_job_by_pid(struct server *server, pid_t pid)
{
	for (size_t i = 0; i < MAX_JOBS; i++)
		if (server->jobs[i].pid == pid)
			return &server->jobs[i];
	return NULL;
}

static struct job *find_job_by_id(struct server *server, uint32_t id)
{
	for (size_t i = 0; i < MAX_JOBS; i++)
		if (server->jobs[i].pid != 0 && server->jobs[i].id == id)
			return &server->jobs[i];
	return NULL;
}

static void exec_shell(const char *command, int output_fd)
{
	sigset_t none;
	int null_fd = open("/dev/null", O_RDONLY);

	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	setsid();
	dup2(null_fd, 0);
	dup2(output_fd, 1);
	dup2(output_fd, 2);
	execl("/bin/sh", "sh", "-c", command, (char *)NULL);
	_exit(127);
}

static int start_job(struct server *server, uint32_t id, const char *command)
{
	struct job *job = find_job_by_pid(server, 0);
	int pipe_fds[2];

	if (job == NULL)
		return -EAGAIN;
	if (pipe2(pipe_fds, O_CLOEXEC) != 0)
		return -errno;
	pid_t pid = fork();
	if (pid == 0)
		exec_shell(command, pipe_fds[1]);
	close(pipe_fds[1]);
	if (pid < 0) {
		close(pipe_fds[0]);
		return -EAGAIN;
	}
	fcntl(pipe_fds[0], F_SETFL, O_NONBLOCK);
	*job = (struct job){ .pid = pid, .id = id, .output_fd = pipe_fds[0] };
	return 0;
}

/* Sends what is there; closes at the end. Returns 0 when nothing more is there now. */
static int forward_output(struct server *server, struct job *job)
{
	unsigned char chunk[OUTPUT_CHUNK_BYTES];

	if (job->output_fd < 0)
		return 0;
	ssize_t bytes = read(job->output_fd, chunk, sizeof(chunk));
	if (bytes > 0) {
		send_frame(server, OUTPUT, job->id, chunk, (size_t)bytes);
		return 1;
	}
	if (bytes == 0) {
		close(job->output_fd);
		job->output_fd = -1;
	}
	return 0;
}

/* A job ends with its shell: background children may keep the pipe open. */
static void finish_job(struct server *server, struct job *job, int wait_status)
{
	while (forward_output(server, job))
		;
	if (job->output_fd >= 0)
		close(job->output_fd);
	send_exit(server, job->id, wait_status);
	*job = (struct job){ .output_fd = -1 };
}

static void reap_children(struct server *server)
{
	struct signalfd_siginfo info;
	int wait_status;
	pid_t pid;

	while (read(server->child_fd, &info, sizeof(info)) > 0)
		;
	while ((pid = waitpid(-1, &wait_status, WNOHANG)) > 0) {
		struct job *job = find_job_by_pid(server, pid);
		if (job != NULL)
			finish_job(server, job, wait_status);
	}
}

/* ---- requests ---- */

static void handle_run(struct server *server, uint32_t id, const unsigned char *payload, size_t bytes)
{
	char *command = strndup((const char *)payload, bytes);
	int error = command != NULL ? start_job(server, id, command) : -ENOMEM;

	free(command);
	if (error != 0)
		send_exit(server, id, 126 << 8);
}

static void handle_request(struct server *server, const struct frame_header *header,
			   const unsigned char *payload)
{
	struct job *job;

	switch (header->type) {
	case PING:
		if (header->payload_bytes <= OUTPUT_CHUNK_BYTES)
			send_frame(server, PONG, header->id, payload, header->payload_bytes);
		break;
	case RUN:
		handle_run(server, header->id, payload, header->payload_bytes);
		break;
	case KILL:
		job = find_job_by_id(server, header->id);
		if (job != NULL)
			kill(-job->pid, SIGKILL);
		break;
	default:
		break;
	}
}

static void drop_input(struct server *server, size_t bytes)
{
	server->input_bytes -= bytes;
	memmove(server->input, server->input + bytes, server->input_bytes);
}

/* Handles one frame if it is whole; skips a byte when it cannot be one. */
static int take_frame(struct server *server)
{
	struct frame_header header;

	if (server->input_bytes < sizeof(header))
		return 0;
	memcpy(&header, server->input, sizeof(header));
	if (header.magic != FRAME_MAGIC || header.payload_bytes > REQUEST_MAX_BYTES) {
		drop_input(server, 1);
		return 1;
	}
	if (server->input_bytes < sizeof(header) + header.payload_bytes)
		return 0;
	handle_request(server, &header, server->input + sizeof(header));
	drop_input(server, sizeof(header) + header.payload_bytes);
	return 1;
}

/* Without a host the port is always "readable", at its end, and nothing tells
 * when a host comes: so look again after a while. */
static void read_requests(struct server *server)
{
	ssize_t bytes = read(server->port_fd, server->input + server->input_bytes,
			     sizeof(server->input) - server->input_bytes);

	if (bytes == 0) {
		server->input_bytes = 0;
		usleep(UNCONNECTED_POLL_MS * 1000);
		return;
	}
	if (bytes > 0)
		server->input_bytes += (size_t)bytes;
	while (take_frame(server))
		;
}

/* ---- the loop ---- */

static void serve_once(struct server *server)
{
	struct pollfd fds[2 + MAX_JOBS];
	struct job *polled[2 + MAX_JOBS] = { NULL };
	nfds_t count = 2;

	fds[0] = (struct pollfd){ .fd = server->port_fd, .events = POLLIN };
	fds[1] = (struct pollfd){ .fd = server->child_fd, .events = POLLIN };
	for (size_t i = 0; i < MAX_JOBS; i++) {
		struct job *job = &server->jobs[i];
		if (job->pid == 0 || job->output_fd < 0)
			continue;
		fds[count] = (struct pollfd){ .fd = job->output_fd, .events = POLLIN };
		polled[count++] = job;
	}
	if (poll(fds, count, server->input_bytes > 0 ? PARTIAL_FRAME_MS : -1) == 0)
		server->input_bytes = 0;
	if (fds[0].revents != 0)
		read_requests(server);
	for (nfds_t i = 2; i < count; i++)
		if (fds[i].revents != 0)
			forward_output(server, polled[i]);
	if (fds[1].revents != 0)
		reap_children(server);
}

static int watch_children(void)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	sigprocmask(SIG_BLOCK, &set, NULL);
	return signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
}

int cmd_serve(int argc, char **argv)
{
	static struct server server;

	signal(SIGPIPE, SIG_IGN);
	for (size_t i = 0; i < MAX_JOBS; i++)
		server.jobs[i].output_fd = -1;
	server.child_fd = watch_children();
	server.port_fd = argc > 1 ? open(argv[1], O_RDWR | O_NONBLOCK | O_CLOEXEC) : wait_for_port();
	if (server.port_fd < 0 || server.child_fd < 0) {
		fprintf(stderr, "serve: %s\n", strerror(errno));
		return 1;
	}
	fprintf(stderr, "latent-guest: serving\n");
	for (;;)
		serve_once(&server);
}
