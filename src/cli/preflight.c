/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "cli/preflight.h"

#include "vmdir/agent_config.h"
#include "os/os.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

#define ANSWER_TIMEOUT_MS 20000
#define MEMORY_MAX_BYTES 16384
#define KEY_BYTES 256
#define VERSION_BEGINS "QEMU emulator version "

/* What the VMM said: the beginnings of its output and of the agent's greeting. */
struct answer {
	char output[256], hello[64];
	bool timed_out;
};

static int make_key(const char *vmm_path, const char *agent_path, char key[KEY_BYTES]);
static bool recall(const char *root, const char *key, char version[PREFLIGHT_VERSION_BYTES]);
static void remember(const char *root, const char *key, const char *version);
static int ask(const char *vmm_path, const char *agent_path, struct answer *answer);
static int judge(const char *vmm_path, const struct answer *answer, char *version, char *why);
static const char *why_not_loaded(const char *vmm_path);
static bool has_qemu_name(const char *path);
static bool is_script(const char *path);
static bool is_static(const char *path);
static _Noreturn void become_vmm(const char *vmm_path, const char *agent_path, int output, int hello);
static void collect(int output, int hello, struct answer *answer);
static int explain(int error, char *why, const char *format, ...) __attribute__((format(printf, 3, 4)));

int preflight(const char *vmm_path, const char *agent_path, const char *root,
	      char ret_version[PREFLIGHT_VERSION_BYTES], char why[PREFLIGHT_WHY_BYTES])
{
	char key[KEY_BYTES], version[PREFLIGHT_VERSION_BYTES];
	struct answer answer = { 0 };
	int r = make_key(vmm_path, agent_path, key);

	if (r)
		return explain(r, why, "the agent %s cannot be used: %s", agent_path, strerror(-r));
	if (root && recall(root, key, version)) {
		memcpy(ret_version, version, sizeof version);
		return 0;
	}
	/* A script's interpreter would load the agent and not hand it on. */
	if (is_script(vmm_path))
		return explain(-ENOEXEC, why,
			       "%s is a script, and the agent would end up in its "
			       "interpreter: give the QEMU program that it starts",
			       vmm_path);
	r = ask(vmm_path, agent_path, &answer);
	if (r)
		return explain(r, why, "%s -version could not be tried: %s", vmm_path, strerror(-r));
	r = judge(vmm_path, &answer, version, why);
	if (r)
		return r;
	memcpy(ret_version, version, sizeof version);
	if (root)
		remember(root, key, version);
	return 0;
}

int preflight_set_preload(const char *agent_path)
{
	const char *old = getenv("LD_PRELOAD");
	char *list;
	int r = 0;

	if (strpbrk(agent_path, ": \t\n"))
		return -EINVAL;
	if (!old || !*old)
		return setenv("LD_PRELOAD", agent_path, 1) ? -errno : 0;
	if (asprintf(&list, "%s:%s", agent_path, old) < 0)
		return -ENOMEM;
	if (setenv("LD_PRELOAD", list, 1))
		r = -errno;
	free(list);
	return r;
}

/* A changed program is another one: its inode, or its times, or its size differ. */
static int make_key(const char *vmm_path, const char *agent_path, char key[KEY_BYTES])
{
	const char *const paths[] = { vmm_path, agent_path };
	size_t used = 0;

	for (size_t i = 0; i < 2; i++) {
		struct stat st;

		if (stat(paths[i], &st))
			return -errno;
		used += (size_t)snprintf(key + used, KEY_BYTES - used,
					 "%ju:%ju:%jd:%jd.%09ld:%jd.%09ld ", (uintmax_t)st.st_dev,
					 (uintmax_t)st.st_ino, (intmax_t)st.st_size,
					 (intmax_t)st.st_mtim.tv_sec, st.st_mtim.tv_nsec,
					 (intmax_t)st.st_ctim.tv_sec, st.st_ctim.tv_nsec);
	}
	return 0;
}

static bool recall(const char *root, const char *key, char version[PREFLIGHT_VERSION_BYTES])
{
	char path[KEY_BYTES + 32], memory[MEMORY_MAX_BYTES + 1], *at;
	ssize_t bytes;
	int fd;

	snprintf(path, sizeof path, "%s/.vmms", root);
	fd = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC); /* it may be a pipe */
	if (fd < 0)
		return false;
	bytes = read(fd, memory, MEMORY_MAX_BYTES);
	close(fd);
	memory[bytes > 0 ? bytes : 0] = 0;
	at = strstr(memory, key);
	if (!at || (at > memory && at[-1] != '\n'))
		return false;
	return sscanf(at + strlen(key), "%63[^\n]", version) == 1;
}

/* Forgetting costs one more question, so nothing here fails. */
static void remember(const char *root, const char *key, const char *version)
{
	char path[KEY_BYTES + 32], line[KEY_BYTES + PREFLIGHT_VERSION_BYTES + 2];
	int length = snprintf(line, sizeof line, "%s%s\n", key, version);
	struct stat st;
	int fd;

	snprintf(path, sizeof path, "%s/.vmms", root);
	fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0600);
	if (fd < 0)
		return;
	if (!fstat(fd, &st) && st.st_size + length > MEMORY_MAX_BYTES && ftruncate(fd, 0))
		length = 0;
	if (write(fd, line, (size_t)length) < 0)
		unlink(path);
	close(fd);
}

static int ask(const char *vmm_path, const char *agent_path, struct answer *answer)
{
	int output[2], hello[2];
	pid_t child;
	int r = 0;

	if (pipe2(output, O_CLOEXEC))
		return -errno;
	if (pipe2(hello, O_CLOEXEC)) {
		r = -errno;
		close(output[0]);
		close(output[1]);
		return r;
	}
	child = fork();
	if (!child)
		become_vmm(vmm_path, agent_path, output[1], hello[1]);
	if (child < 0)
		r = -errno;
	close(output[1]);
	close(hello[1]);
	if (!r)
		collect(output[0], hello[0], answer);
	close(output[0]);
	close(hello[0]);
	if (!r && answer->timed_out)
		kill(child, SIGKILL);
	while (!r && waitpid(child, NULL, 0) < 0 && errno == EINTR)
		;
	return r;
}

static int judge(const char *vmm_path, const struct answer *answer, char *version, char *why)
{
	if (answer->timed_out)
		return explain(-ETIMEDOUT, why,
			       "%s -version did not end within %d s: is it a QEMU system "
			       "emulator?",
			       vmm_path, ANSWER_TIMEOUT_MS / 1000);
	if (strncmp(answer->output, VERSION_BEGINS, strlen(VERSION_BEGINS)) ||
	    sscanf(answer->output + strlen(VERSION_BEGINS), "%63s", version) != 1)
		return explain(-ENOEXEC, why,
			       "%s is no QEMU system emulator (-version does not begin "
			       "with '" VERSION_BEGINS
			       "'); programs like nice or taskset go before latent",
			       vmm_path);
	if (!strcmp(answer->hello, AGENT_HELLO_TEXT))
		return 0;
	if (answer->hello[0])
		return explain(-EPROTO, why,
			       "%s loads an agent of another version; install latent and "
			       "latent-qemu.so from one build",
			       vmm_path);
	return explain(-ENOEXEC, why, "%s does not load the agent: %s", vmm_path,
		       why_not_loaded(vmm_path));
}

static const char *why_not_loaded(const char *vmm_path)
{
	struct stat st;

	if (!stat(vmm_path, &st) && st.st_mode & (S_ISUID | S_ISGID))
		return "it is setuid or setgid, so LD_PRELOAD is ignored; use a copy that is not";
	if (getxattr(vmm_path, "security.capability", NULL, 0) > 0)
		return "it has file capabilities, so LD_PRELOAD is ignored; use a copy without";
	if (is_static(vmm_path))
		return "it is a static program; use one that is linked dynamically";
	if (!has_qemu_name(vmm_path))
		return "the agent keeps out of programs without 'qemu' in their names; name it so";
	return "it may be of another architecture or C library than the agent, start another program, "
	       "or a security policy forbids LD_PRELOAD";
}

/* As the agent sees it: without symbolic links. */
static bool has_qemu_name(const char *path)
{
	char *real = realpath(path, NULL);
	const char *slash = real ? strrchr(real, '/') : NULL;
	bool has = slash && strstr(slash, "qemu");

	free(real);
	return has;
}

static bool is_script(const char *path)
{
	char magic[2] = { 0 };
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	bool script = fd >= 0 && read(fd, magic, 2) == 2 && magic[0] == '#' && magic[1] == '!';

	if (fd >= 0)
		close(fd);
	return script;
}

/* No program header asks for an interpreter. */
static bool is_static(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	bool is_elf, interpreted = false;
	Elf64_Ehdr header;

	if (fd < 0)
		return false;
	is_elf = read(fd, &header, sizeof header) == sizeof header &&
		 !memcmp(header.e_ident, ELFMAG, SELFMAG) && header.e_ident[EI_CLASS] == ELFCLASS64 &&
		 header.e_phentsize == sizeof(Elf64_Phdr);
	for (unsigned i = 0; is_elf && i < header.e_phnum; i++) {
		Elf64_Phdr program;
		uint64_t offset = header.e_phoff + i * sizeof program;

		if (offset > INT64_MAX ||
		    pread(fd, &program, sizeof program, (off_t)offset) != sizeof program)
			break;
		interpreted |= program.p_type == PT_INTERP;
	}
	close(fd);
	return is_elf && !interpreted;
}

static _Noreturn void become_vmm(const char *vmm_path, const char *agent_path, int output, int hello)
{
	char number[16];
	int null = open("/dev/null", O_RDWR);

	snprintf(number, sizeof number, "%d", hello);
	if (null < 0 || dup2(null, STDIN_FILENO) < 0 || dup2(output, STDOUT_FILENO) < 0 ||
	    dup2(null, STDERR_FILENO) < 0 || fcntl(hello, F_SETFD, 0) ||
	    setenv(AGENT_HELLO_ENV, number, 1) || unsetenv(AGENT_CONFIG_ENV) ||
	    preflight_set_preload(agent_path))
		_exit(127);
	execl(vmm_path, vmm_path, "-version", (char *)NULL);
	_exit(127);
}

/* Until both pipes are at their end. What does not fit is read and dropped. */
static void collect(int output, int hello, struct answer *answer)
{
	struct pollfd pipes[2] = { { .fd = output, .events = POLLIN },
				   { .fd = hello, .events = POLLIN } };
	char *const into[2] = { answer->output, answer->hello };
	const size_t room[2] = { sizeof answer->output - 1, sizeof answer->hello - 1 };
	uint64_t deadline_ms = os_now_us() / 1000 + ANSWER_TIMEOUT_MS;
	size_t used[2] = { 0 };

	while (pipes[0].fd >= 0 || pipes[1].fd >= 0) {
		uint64_t at_ms = os_now_us() / 1000;

		if (at_ms >= deadline_ms || !poll(pipes, 2, (int)(deadline_ms - at_ms))) {
			answer->timed_out = true;
			return;
		}
		for (size_t i = 0; i < 2; i++) {
			char part[512];
			ssize_t n;

			if (pipes[i].fd < 0 || !pipes[i].revents)
				continue;
			n = read(pipes[i].fd, part, sizeof part);
			if (n <= 0 && !(n < 0 && errno == EINTR))
				pipes[i].fd = -1;
			if (n > 0 && used[i] < room[i]) {
				size_t fits =
					(size_t)n < room[i] - used[i] ? (size_t)n : room[i] - used[i];

				memcpy(into[i] + used[i], part, fits);
				used[i] += fits;
			}
			into[i][used[i]] = 0;
		}
	}
}

static int explain(int error, char *why, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(why, PREFLIGHT_WHY_BYTES, format, args);
	va_end(args);
	return error;
}
