/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "snapshot/manifest.h"

#include "os/os.h"

#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#define FORMAT_NAME "latent-snapshot"
#define SAMPLES 1024u
#define CHUNK_BYTES 65536u

/* ---- fingerprints --------------------------------------------------------------------------- */

static int fingerprint(int fd, uint64_t bytes, uint64_t *ret_fingerprint)
{
	uint64_t pages = (bytes + OS_PAGE_BYTES - 1) >> OS_PAGE_SHIFT;
	XXH3_state_t *state = XXH3_createState();
	uint8_t page[OS_PAGE_BYTES];
	int r = 0;

	if (!state)
		return -ENOMEM;
	XXH3_64bits_reset(state);
	XXH3_64bits_update(state, &bytes, sizeof bytes);
	for (uint64_t i = 0; !r && i < SAMPLES && i < pages; i++) {
		uint64_t at = pages <= SAMPLES ? i : i * (pages - 1) / (SAMPLES - 1);
		ssize_t n = pread(fd, page, sizeof page, (off_t)os_bytes(at));

		if (n < 0)
			r = -errno;
		else
			XXH3_64bits_update(state, page, (size_t)n);
	}
	*ret_fingerprint = XXH3_64bits_digest(state);
	XXH3_freeState(state);
	return r;
}

static int take_stat(int fd, struct manifest_volume *v)
{
	struct stat st;

	if (fstat(fd, &st))
		return -errno;
	v->bytes = (uint64_t)st.st_size;
	v->dev = st.st_dev;
	v->ino = st.st_ino;
	v->mtime_ns = (uint64_t)st.st_mtim.tv_sec * 1000000000u + (uint64_t)st.st_mtim.tv_nsec;
	return 0;
}

int manifest_identify(int fd, struct manifest_volume *v)
{
	int r = take_stat(fd, v);

	return r ? r : fingerprint(fd, v->bytes, &v->fingerprint);
}

int manifest_compare(int fd, const struct manifest_volume *v, struct manifest_volume *ret_now)
{
	int r = take_stat(fd, ret_now);
	bool is_same = !r && ret_now->dev == v->dev && ret_now->ino == v->ino;

	ret_now->fingerprint = v->fingerprint;
	if (r || (is_same && ret_now->bytes == v->bytes && ret_now->mtime_ns == v->mtime_ns))
		return r;
	if (is_same)
		return -ESTALE;
	r = fingerprint(fd, ret_now->bytes, &ret_now->fingerprint);
	return r ? r : ret_now->bytes == v->bytes && ret_now->fingerprint == v->fingerprint ? 0 : -ESTALE;
}

static int digest(int fd, uint64_t bytes, uint64_t *ret_digest)
{
	uint8_t *chunk = malloc(CHUNK_BYTES);
	XXH3_state_t *state = XXH3_createState();
	int r = chunk && state ? 0 : -ENOMEM;

	if (!r)
		XXH3_64bits_reset(state);
	for (uint64_t at = 0, n; !r && at < bytes; at += n) {
		n = bytes - at < CHUNK_BYTES ? bytes - at : CHUNK_BYTES;
		r = os_read_all(fd, chunk, n, at);
		if (!r)
			XXH3_64bits_update(state, chunk, n);
	}
	if (!r)
		*ret_digest = XXH3_64bits_digest(state);
	XXH3_freeState(state);
	free(chunk);
	return r;
}

int manifest_check_state(const struct manifest *m, int fd, char why[SNAPSHOT_WHY_BYTES])
{
	uint64_t found = 0;
	struct stat st;
	int r = fstat(fd, &st) ? -errno : 0;

	if (!r && (!S_ISREG(st.st_mode) || (uint64_t)st.st_size != m->state_bytes)) {
		snprintf(why, SNAPSHOT_WHY_BYTES, SNAPSHOT_STATE " is not a file of %ju bytes, as the manifest says",
			 (uintmax_t)m->state_bytes);
		return -EBADMSG;
	}
	if (!r)
		r = digest(fd, m->state_bytes, &found);
	if (r)
		snprintf(why, SNAPSHOT_WHY_BYTES, SNAPSHOT_STATE " cannot be read: %s", strerror(-r));
	else if (found != m->state_digest)
		snprintf(why, SNAPSHOT_WHY_BYTES, SNAPSHOT_STATE " is not what was saved: expected is a file with the digest %016jx",
			 (uintmax_t)m->state_digest);
	return r || found != m->state_digest ? -EBADMSG : 0;
}

int manifest_check_pages(const struct manifest *m, int fd, char why[SNAPSHOT_WHY_BYTES])
{
	struct snapshot_header header = { 0 };
	int r = os_read_all(fd, &header, sizeof header, 0);

	if (r)
		snprintf(why, SNAPSHOT_WHY_BYTES, SNAPSHOT_PAGES " cannot be read, or ends too early");
	else if (header.checksum != m->pages_digest)
		snprintf(why, SNAPSHOT_WHY_BYTES, SNAPSHOT_PAGES " is not what was saved: expected is a file with the digest %016jx",
			 (uintmax_t)m->pages_digest);
	return r || header.checksum != m->pages_digest ? -EBADMSG : 0;
}

/* ---- writing -------------------------------------------------------------------------------- */

static void add_text(struct json_object *json, const char *key, const char *text)
{
	json_object_object_add(json, key, json_object_new_string(text));
}

static void add_number(struct json_object *json, const char *key, uint64_t number)
{
	json_object_object_add(json, key, json_object_new_uint64(number));
}

static void add_digest(struct json_object *json, const char *key, uint64_t digest)
{
	char text[24];

	snprintf(text, sizeof text, "%016jx", (uintmax_t)digest);
	add_text(json, key, text);
}

static struct json_object *volume_to_json(const struct manifest_volume *v)
{
	struct json_object *json = json_object_new_object();

	add_text(json, "path", v->path);
	add_number(json, "bytes", v->bytes);
	add_digest(json, "fingerprint", v->fingerprint);
	add_number(json, "dev", v->dev);
	add_number(json, "ino", v->ino);
	add_number(json, "mtime_ns", v->mtime_ns);
	return json;
}

static const char *const role_names[] = { [MANIFEST_IMAGE] = "image", [MANIFEST_RAM] = "ram" };

static struct json_object *parent_to_json(const struct manifest_parent *p)
{
	struct json_object *json = json_object_new_object();

	add_text(json, "path", p->path);
	add_text(json, "name", p->name);
	add_number(json, "created_unix_s", p->created_unix_s);
	return json;
}

static struct json_object *disk_to_json(const struct manifest_disk *d)
{
	struct json_object *json = json_object_new_object(), *layers = json_object_new_array();

	add_text(json, "drive", d->drive);
	add_number(json, "bytes", d->bytes);
	for (uint32_t i = 0; i < d->layers; i++) {
		struct json_object *layer = volume_to_json(&d->layer[i].volume);

		add_text(layer, "file", d->layer[i].file);
		add_text(layer, "format", d->layer[i].format);
		json_object_array_add(layers, layer);
	}
	json_object_object_add(json, "layers", layers);
	return json;
}

static struct json_object *to_json(const struct manifest *m)
{
	struct json_object *json = json_object_new_object(), *volumes = json_object_new_array(),
			   *disks = json_object_new_array();

	add_text(json, "format", FORMAT_NAME);
	add_number(json, "version", SNAPSHOT_VERSION);
	add_text(json, "name", m->name);
	add_text(json, "qemu_version", m->qemu_version);
	add_number(json, "created_unix_s", m->created_unix_s);
	add_number(json, "ram_bytes", m->ram_bytes);
	add_number(json, "state_bytes", m->state_bytes);
	add_digest(json, "state_digest", m->state_digest);
	add_digest(json, "pages_digest", m->pages_digest);
	if (m->packed_bytes)
		add_number(json, "packed_bytes", m->packed_bytes);
	if (m->parent.path[0])
		json_object_object_add(json, "parent", parent_to_json(&m->parent));
	for (uint32_t i = 0; i < m->volumes; i++) {
		struct json_object *volume = volume_to_json(&m->volume[i]);

		add_text(volume, "role", manifest_role_name(m->volume[i].role));
		json_object_array_add(volumes, volume);
	}
	for (uint32_t i = 0; i < m->disks; i++)
		json_object_array_add(disks, disk_to_json(&m->disk[i]));
	json_object_object_add(json, "volumes", volumes);
	json_object_object_add(json, "disks", disks);
	json_object_object_add(json, "stood", json_object_new_boolean(m->stood));
	if (m->generation_id[0])
		add_text(json, "generation_id", m->generation_id);
	if (m->machine)
		json_object_object_add(json, "machine", machine_to_json(m->machine));
	else
		add_text(json, "machine_missing", m->machine_missing);
	return json;
}

const char *manifest_role_name(enum manifest_role role)
{
	return role_names[role];
}

char *manifest_to_text(const struct manifest *m)
{
	struct json_object *json = to_json(m);
	const char *text = json_object_to_json_string_ext(json, JSON_C_TO_STRING_PRETTY);
	char *copy = text ? strdup(text) : NULL;

	json_object_put(json);
	return copy;
}

int manifest_write(const struct manifest *m, int dir_fd)
{
	char *text = manifest_to_text(m);
	int fd = openat(dir_fd, SNAPSHOT_MANIFEST, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	int r = fd < 0 ? -errno : !text ? -ENOMEM : os_write_all(fd, text, strlen(text), 0);

	if (!r && fsync(fd))
		r = -errno;
	if (fd >= 0)
		close(fd);
	free(text);
	return r;
}

/* ---- reading -------------------------------------------------------------------------------- */

struct reading {
	char *why;
	int r;
};

static void wrong(struct reading *d, const char *format, ...) __attribute__((format(printf, 2, 3)));

static void wrong(struct reading *d, const char *format, ...)
{
	va_list args;

	if (d->r)
		return;
	d->r = -EBADMSG;
	va_start(args, format);
	vsnprintf(d->why, SNAPSHOT_WHY_BYTES, format, args);
	va_end(args);
}

static struct json_object *member(struct reading *d, struct json_object *json, const char *key, json_type type)
{
	struct json_object *value = NULL;

	if (!json_object_object_get_ex(json, key, &value) || !json_object_is_type(value, type)) {
		wrong(d, SNAPSHOT_MANIFEST ": \"%s\" is missing, or is no %s", key, json_type_to_name(type));
		return NULL;
	}
	return value;
}

/* Printable, and short enough. */
static void take_text(struct reading *d, struct json_object *json, const char *key, char *to, size_t room)
{
	struct json_object *value = member(d, json, key, json_type_string);
	const char *text = value ? json_object_get_string(value) : "";
	size_t bytes = value ? (size_t)json_object_get_string_len(value) : 0;

	if (bytes >= room || strlen(text) != bytes)
		wrong(d, SNAPSHOT_MANIFEST ": \"%s\" is too long", key);
	for (size_t i = 0; i < bytes; i++)
		if ((unsigned char)text[i] < ' ' || text[i] == 0x7f)
			wrong(d, SNAPSHOT_MANIFEST ": \"%s\" has control characters", key);
	if (!d->r)
		memcpy(to, text, bytes + 1);
}

/* In one directory: nothing else can be meant by it. */
static bool is_name(const char *text)
{
	return text[0] && text[0] != '.' && !strchr(text, '/');
}

static void take_name(struct reading *d, struct json_object *json, const char *key, char *to, size_t room)
{
	take_text(d, json, key, to, room);
	if (!d->r && !is_name(to))
		wrong(d, SNAPSHOT_MANIFEST ": \"%s\" is no plain name of a file", key);
}

static uint64_t take_number(struct reading *d, struct json_object *json, const char *key, uint64_t max)
{
	struct json_object *value = member(d, json, key, json_type_int);
	int64_t number = value ? json_object_get_int64(value) : 0;

	if (number < 0 || (uint64_t)number > max)
		wrong(d, SNAPSHOT_MANIFEST ": \"%s\" is out of bounds", key);
	return d->r ? 0 : (uint64_t)number;
}

static uint64_t take_digest(struct reading *d, struct json_object *json, const char *key)
{
	char text[24] = "", *end;
	uint64_t digest;

	take_text(d, json, key, text, sizeof text);
	digest = strtoull(text, &end, 16);
	if (!d->r && (strlen(text) != 16 || *end))
		wrong(d, SNAPSHOT_MANIFEST ": \"%s\" is not 16 hexadecimal digits", key);
	return digest;
}

static void take_volume(struct reading *d, struct json_object *json, struct manifest_volume *v)
{
	take_text(d, json, "path", v->path, sizeof v->path);
	v->bytes = take_number(d, json, "bytes", INT64_MAX);
	v->fingerprint = take_digest(d, json, "fingerprint");
	v->dev = take_number(d, json, "dev", INT64_MAX);
	v->ino = take_number(d, json, "ino", INT64_MAX);
	v->mtime_ns = take_number(d, json, "mtime_ns", INT64_MAX);
}

static enum manifest_role take_role(struct reading *d, struct json_object *json)
{
	char text[16] = "";

	take_text(d, json, "role", text, sizeof text);
	if (!d->r && strcmp(text, role_names[MANIFEST_IMAGE]) && strcmp(text, role_names[MANIFEST_RAM]))
		wrong(d, SNAPSHOT_MANIFEST ": \"role\" is neither \"image\" nor \"ram\"");
	return strcmp(text, role_names[MANIFEST_RAM]) ? MANIFEST_IMAGE : MANIFEST_RAM;
}

static void take_parent(struct reading *d, struct json_object *json, struct manifest_parent *p)
{
	struct json_object *parent;

	if (!json_object_object_get_ex(json, "parent", &parent))
		return;
	take_text(d, parent, "path", p->path, sizeof p->path);
	take_text(d, parent, "name", p->name, sizeof p->name);
	p->created_unix_s = take_number(d, parent, "created_unix_s", INT64_MAX);
}

static struct json_object *take_array(struct reading *d, struct json_object *json, const char *key, size_t max,
				      uint32_t *ret_count)
{
	struct json_object *array = member(d, json, key, json_type_array);
	size_t count = array ? json_object_array_length(array) : 0;

	if (count > max)
		wrong(d, SNAPSHOT_MANIFEST ": \"%s\" has %zu members, and %zu are the most", key, count, max);
	*ret_count = d->r ? 0 : (uint32_t)count;
	return array;
}

static void take_disk(struct reading *d, struct json_object *json, struct manifest_disk *disk)
{
	struct json_object *array;

	take_name(d, json, "drive", disk->drive, sizeof disk->drive);
	disk->bytes = take_number(d, json, "bytes", INT64_MAX);
	array = take_array(d, json, "layers", MANIFEST_LAYERS, &disk->layers);
	if (!d->r && !disk->layers)
		wrong(d, SNAPSHOT_MANIFEST ": the disk %s has no layers", disk->drive);
	for (uint32_t i = 0; i < disk->layers; i++) {
		struct json_object *one = json_object_array_get_idx(array, i);
		struct manifest_layer *layer = &disk->layer[i];

		take_volume(d, one, &layer->volume);
		take_name(d, one, "format", layer->format, sizeof layer->format);
		if (!d->r && strcmp(layer->format, "qcow2") && strcmp(layer->format, "raw"))
			wrong(d, SNAPSHOT_MANIFEST ": \"format\" is neither qcow2 nor raw");
		take_text(d, one, "file", layer->file, sizeof layer->file);
		if (!d->r && layer->file[0] && !is_name(layer->file))
			wrong(d, SNAPSHOT_MANIFEST ": \"file\" is no plain name of a file");
	}
}

static void take_generation(struct reading *d, struct json_object *json, struct manifest *m)
{
	if (!json_object_object_get_ex(json, "generation_id", NULL))
		return;
	take_text(d, json, "generation_id", m->generation_id, sizeof m->generation_id);
	if (!d->r && (strlen(m->generation_id) + 1 != sizeof m->generation_id ||
		      m->generation_id[strspn(m->generation_id, "0123456789abcdefABCDEF-")]))
		wrong(d, SNAPSHOT_MANIFEST ": \"generation_id\" is none");
}

/* All of this is younger than the format. */
static void take_machine(struct reading *d, struct json_object *json, struct manifest *m)
{
	struct json_object *value;
	char words[MACHINE_WHY_BYTES];

	if (json_object_object_get_ex(json, "stood", &value))
		m->stood = json_object_get_boolean(value);
	if (json_object_object_get_ex(json, "machine_missing", &value))
		take_text(d, json, "machine_missing", m->machine_missing, sizeof m->machine_missing);
	if (!d->r && json_object_object_get_ex(json, "machine", &value) && machine_from_json(value, &m->machine, words))
		wrong(d, SNAPSHOT_MANIFEST ": %s", words);
}

static void take_all(struct reading *d, struct json_object *json, struct manifest *m)
{
	struct json_object *array;
	char format[32] = "";

	take_text(d, json, "format", format, sizeof format);
	if (!d->r && strcmp(format, FORMAT_NAME))
		wrong(d, SNAPSHOT_MANIFEST ": this is no snapshot of Latent");
	if (take_number(d, json, "version", UINT32_MAX) != SNAPSHOT_VERSION)
		wrong(d, SNAPSHOT_MANIFEST ": another version of the format; this Latent reads %u", SNAPSHOT_VERSION);
	take_name(d, json, "name", m->name, sizeof m->name);
	take_text(d, json, "qemu_version", m->qemu_version, sizeof m->qemu_version);
	m->created_unix_s = take_number(d, json, "created_unix_s", INT64_MAX);
	m->ram_bytes = take_number(d, json, "ram_bytes", INT64_MAX);
	m->state_bytes = take_number(d, json, "state_bytes", 1ull << 32);
	m->state_digest = take_digest(d, json, "state_digest");
	m->pages_digest = take_digest(d, json, "pages_digest");
	if (json_object_object_get_ex(json, "packed_bytes", NULL))
		m->packed_bytes = take_number(d, json, "packed_bytes", INT64_MAX);
	take_parent(d, json, &m->parent);
	array = take_array(d, json, "volumes", SNAPSHOT_VOLUMES, &m->volumes);
	for (uint32_t i = 0; i < m->volumes; i++) {
		take_volume(d, json_object_array_get_idx(array, i), &m->volume[i]);
		m->volume[i].role = take_role(d, json_object_array_get_idx(array, i));
	}
	array = take_array(d, json, "disks", MANIFEST_DISKS, &m->disks);
	for (uint32_t i = 0; i < m->disks; i++)
		take_disk(d, json_object_array_get_idx(array, i), &m->disk[i]);
	take_generation(d, json, m);
	take_machine(d, json, m);
}

static char *read_text(int fd, char *why)
{
	char *text = calloc(1, MANIFEST_MAX_BYTES + 1);
	ssize_t n = text ? pread(fd, text, MANIFEST_MAX_BYTES + 1, 0) : -1;

	if (n >= 0 && n <= MANIFEST_MAX_BYTES)
		return text;
	snprintf(why, SNAPSHOT_WHY_BYTES, SNAPSHOT_MANIFEST ": %s", n < 0 ? strerror(errno) : "larger than any manifest");
	free(text);
	return NULL;
}

int manifest_read(int dir_fd, struct manifest *ret_manifest, char why[SNAPSHOT_WHY_BYTES])
{
	int fd = openat(dir_fd, SNAPSHOT_MANIFEST, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC), r;

	if (fd < 0) {
		snprintf(why, SNAPSHOT_WHY_BYTES, errno == ENOENT ? "no snapshot: there is no " SNAPSHOT_MANIFEST " in it"
			 : SNAPSHOT_MANIFEST ": %s", strerror(errno));
		return -EBADMSG;
	}
	r = manifest_read_file(fd, ret_manifest, why);
	close(fd);
	return r;
}

int manifest_read_file(int fd, struct manifest *ret_manifest, char why[SNAPSHOT_WHY_BYTES])
{
	struct manifest m = { 0 };
	struct reading d = { .why = why };
	char *text = read_text(fd, why);
	struct json_object *json;

	if (!text)
		return -EBADMSG;
	json = json_tokener_parse(text);
	if (json && json_object_is_type(json, json_type_object))
		take_all(&d, json, &m);
	else
		wrong(&d, SNAPSHOT_MANIFEST ": no JSON object");
	json_object_put(json);
	free(text);
	if (d.r)
		machine_free(m.machine);
	else
		*ret_manifest = m;
	return d.r;
}
