/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Range requests of HTTP/1.1, several at a time, over connections that stay open. S3: the same with a signature
 * (libcurl's), with the environment variables that other tools have: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
 * AWS_SESSION_TOKEN, AWS_REGION or AWS_DEFAULT_REGION, AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL.
 */
#include "pager/http.h"

#include "os/os.h"

#include <curl/curl.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#define SILENT_S 5L    /* a connection that brings nothing for so long is given up */
#define CONNECT_S 5L
#define OBJECT_BYTES 64 /* of an object's name */
#define BUFFER_BYTES (256L << 10)
#define POOL 40

struct http {
	char base[1024]; /* URL without a slash at its end */
	char etag[128];  /* of `ram`, as first seen; it must stay so */
	char signature[96], user[300], token[2100]; /* of S3; empty: not signed */
	CURLM *multi;
	CURL *pool[POOL]; /* handles that are free; their connections belong to `multi` */
	unsigned free;
};

/* ---- the source's name ------------------------------------------------------------------------ */

bool http_is_url(const char *source)
{
	return !strncmp(source, "http://", 7) || !strncmp(source, "https://", 8) || !strncmp(source, "s3://", 5);
}

static const char *environment(const char *first, const char *second, const char *otherwise)
{
	const char *value = getenv(first);

	if (!value || !*value)
		value = second ? getenv(second) : NULL;
	return value && *value ? value : otherwise;
}

/* Signatures are made over the path as it is sent: nothing in it may need escapes. */
static bool is_plain_path(const char *path)
{
	static const char plain[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_./";

	return *path && *path != '/' && !strstr(path, "//") && path[strspn(path, plain)] == '\0';
}

static int place_s3(struct http *h, const char *path, char *why)
{
	const char *region = environment("AWS_REGION", "AWS_DEFAULT_REGION", "us-east-1");
	const char *endpoint = environment("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", NULL);
	const char *key = environment("AWS_ACCESS_KEY_ID", NULL, NULL);
	const char *secret = environment("AWS_SECRET_ACCESS_KEY", NULL, "");
	const char *token = environment("AWS_SESSION_TOKEN", NULL, NULL);
	int bucket = (int)strcspn(path, "/"), n;

	if (!is_plain_path(path)) {
		snprintf(why, STORE_WHY_BYTES, "s3://%.100s: a bucket and a prefix of letters, digits, '-', '_', '.' and single "
			 "'/' are meant", path);
		return -EINVAL;
	}
	n = endpoint ? snprintf(h->base, sizeof h->base, "%.*s/%s", (int)(strlen(endpoint) - (endpoint[strlen(endpoint) - 1] == '/')),
				endpoint, path)
		     : snprintf(h->base, sizeof h->base, "https://%.*s.s3.%s.amazonaws.com%s", bucket, path, region, path + bucket);
	if (key)
		snprintf(h->signature, sizeof h->signature, "aws:amz:%.60s:s3", region);
	if (n >= (int)sizeof h->base || (key && snprintf(h->user, sizeof h->user, "%s:%s", key, secret) >= (int)sizeof h->user) ||
	    (token && snprintf(h->token, sizeof h->token, "x-amz-security-token: %s", token) >= (int)sizeof h->token)) {
		snprintf(why, STORE_WHY_BYTES, "the endpoint or the AWS_ variables are longer than they can be");
		return -ENAMETOOLONG;
	}
	return 0;
}

int http_open(const char *source, struct http **ret_http, char why[STORE_WHY_BYTES])
{
	struct http *h = calloc(1, sizeof *h);
	size_t length;
	int r = 0;

	if (!h || curl_global_init(CURL_GLOBAL_DEFAULT)) {
		free(h);
		return -ENOMEM;
	}
	if (!strncmp(source, "s3://", 5))
		r = place_s3(h, source + 5, why);
	else
		snprintf(h->base, sizeof h->base, "%s", source);
	for (length = strlen(h->base); length && h->base[length - 1] == '/'; length--)
		h->base[length - 1] = '\0';
	h->multi = r ? NULL : curl_multi_init();
	if (!r && !h->multi)
		r = -ENOMEM;
	if (r)
		http_close(h);
	else
		*ret_http = h;
	return r;
}

void http_close(struct http *h)
{
	if (!h)
		return;
	while (h->free)
		curl_easy_cleanup(h->pool[--h->free]);
	curl_multi_cleanup(h->multi);
	free(h);
}

/* ---- what every request has ------------------------------------------------------------------- */

/* NULL: no memory. The handle's headers are `*headers`. */
static CURL *prepare(struct http *h, const char *object, struct curl_slist **headers)
{
	const char *authorities = environment("CURL_CA_BUNDLE", "SSL_CERT_FILE", NULL);
	char url[sizeof h->base + OBJECT_BYTES + 1];
	CURL *easy = h->free ? h->pool[--h->free] : curl_easy_init();

	if (!easy)
		return NULL;
	curl_easy_reset(easy);
	snprintf(url, sizeof url, "%s/%.*s", h->base, OBJECT_BYTES, object);
	curl_easy_setopt(easy, CURLOPT_URL, url);
	curl_easy_setopt(easy, CURLOPT_PROTOCOLS_STR, "http,https");
	curl_easy_setopt(easy, CURLOPT_HTTP_VERSION, (long)CURL_HTTP_VERSION_1_1);
	curl_easy_setopt(easy, CURLOPT_NOSIGNAL, 1L);
	curl_easy_setopt(easy, CURLOPT_USERAGENT, "latent/" LATENT_VERSION_TEXT);
	curl_easy_setopt(easy, CURLOPT_CONNECTTIMEOUT, CONNECT_S);
	curl_easy_setopt(easy, CURLOPT_LOW_SPEED_LIMIT, 1L);
	curl_easy_setopt(easy, CURLOPT_LOW_SPEED_TIME, SILENT_S);
	curl_easy_setopt(easy, CURLOPT_TCP_KEEPALIVE, 1L);
	curl_easy_setopt(easy, CURLOPT_BUFFERSIZE, BUFFER_BYTES);
	if (authorities)
		curl_easy_setopt(easy, CURLOPT_CAINFO, authorities);
	if (h->signature[0]) {
		curl_easy_setopt(easy, CURLOPT_AWS_SIGV4, h->signature);
		curl_easy_setopt(easy, CURLOPT_USERPWD, h->user);
		*headers = curl_slist_append(*headers, "x-amz-content-sha256: UNSIGNED-PAYLOAD");
	}
	if (h->token[0])
		*headers = curl_slist_append(*headers, h->token);
	return easy;
}

static void put_back(struct http *h, CURL *easy)
{
	if (h->free < POOL)
		h->pool[h->free++] = easy;
	else
		curl_easy_cleanup(easy);
}

/* What a status says that is not the wanted one. */
static int of_status(long status, const char *url, char *why)
{
	snprintf(why, STORE_WHY_BYTES, "the store answers %ld to %.180s", status, url);
	return status == 404 ? -ENOENT : status == 401 || status == 403 ? -EACCES : -EPROTO;
}

static int of_curl(CURLcode code, const char *url, char *why)
{
	snprintf(why, STORE_WHY_BYTES, "%.150s: %.90s", url, curl_easy_strerror(code));
	return code == CURLE_OPERATION_TIMEDOUT || code == CURLE_COULDNT_CONNECT ? -ETIMEDOUT : -EIO;
}

static long status_of(CURL *easy)
{
	long status = 0;

	curl_easy_getinfo(easy, CURLINFO_RESPONSE_CODE, &status);
	return status;
}

static const char *url_of(CURL *easy)
{
	char *url = NULL;

	curl_easy_getinfo(easy, CURLINFO_EFFECTIVE_URL, &url);
	return url ? url : "";
}

/* ---- a whole object --------------------------------------------------------------------------- */

struct whole {
	CURL *easy;
	int fd;
	uint64_t at, max_bytes;
	bool too_long;
};

static size_t take_whole(char *data, size_t one, size_t bytes, void *arg)
{
	struct whole *w = arg;

	(void)one;
	if (status_of(w->easy) != 200)
		return bytes; /* the page that says why not */
	w->too_long = bytes > w->max_bytes - w->at;
	if (w->too_long || os_write_all(w->fd, data, bytes, w->at))
		return 0;
	w->at += bytes;
	return bytes;
}

static int judge_whole(const struct whole *w, CURLcode code, char *why)
{
	const char *url = url_of(w->easy);

	if (w->too_long) {
		snprintf(why, STORE_WHY_BYTES, "%.150s is larger than %ju bytes, which is the most", url, (uintmax_t)w->max_bytes);
		return -EPROTO;
	}
	if (code)
		return of_curl(code, url, why);
	return status_of(w->easy) == 200 ? 0 : of_status(status_of(w->easy), url, why);
}

int http_get(struct http *h, const char *object, uint64_t max_bytes, int *ret_fd, char why[STORE_WHY_BYTES])
{
	struct curl_slist *headers = NULL;
	struct whole w = { .easy = prepare(h, object, &headers), .max_bytes = max_bytes };
	int r;

	w.fd = w.easy ? os_memfd_create("latent-object", 0, false) : -ENOMEM;
	if (w.fd < 0) {
		if (w.easy)
			put_back(h, w.easy);
		curl_slist_free_all(headers);
		snprintf(why, STORE_WHY_BYTES, "no memory for %s", object);
		return w.fd;
	}
	curl_easy_setopt(w.easy, CURLOPT_HTTPHEADER, headers);
	curl_easy_setopt(w.easy, CURLOPT_WRITEFUNCTION, take_whole);
	curl_easy_setopt(w.easy, CURLOPT_WRITEDATA, &w);
	r = judge_whole(&w, curl_easy_perform(w.easy), why);
	put_back(h, w.easy);
	curl_slist_free_all(headers);
	if (r)
		close(w.fd);
	else
		*ret_fd = w.fd;
	return r;
}

/* ---- a part ----------------------------------------------------------------------------------- */

static size_t take_header(char *data, size_t one, size_t bytes, void *arg)
{
	struct store_read *read = arg;
	char line[256];
	uintmax_t from, to, total;

	(void)one;
	store_heard(read->store);
	snprintf(line, sizeof line, "%.*s", (int)(bytes < sizeof line ? bytes : sizeof line - 1), data);
	line[strcspn(line, "\r\n")] = '\0';
	if (!strncasecmp(line, "etag:", 5))
		snprintf(read->etag, sizeof read->etag, "%.127s", line + 5 + strspn(line + 5, " "));
	else if (!strncasecmp(line, "content-range:", 14) &&
		 sscanf(line + 14, " bytes %ju-%ju/%ju", &from, &to, &total) == 3 && to - from == read->bytes - 1) {
		read->range_from = from;
		read->range_total = total;
	}
	return bytes;
}

static size_t take_part(char *data, size_t one, size_t bytes, void *arg)
{
	struct store_read *read = arg;

	(void)one;
	store_heard(read->store);
	if (status_of(read->easy) != 206 || read->range_from != read->offset || bytes > read->bytes - read->got)
		return 0; /* it will be said which */
	memcpy(read->to + read->got, data, bytes);
	read->got += bytes;
	return bytes;
}

static bool is_ram(const struct store_read *read)
{
	return !strncmp(read->object, "ram", 3);
}

/* `ram` changes the contents of pages that nobody has looked at: another object under its name is noticed at once,
 * and not only by its digests. */
static int check_etag(struct http *h, const struct store_read *read, char *why)
{
	if (!is_ram(read) || !read->etag[0])
		return 0;
	if (!h->etag[0])
		snprintf(h->etag, sizeof h->etag, "%s", read->etag);
	if (!strcmp(h->etag, read->etag))
		return 0;
	snprintf(why, STORE_WHY_BYTES, "%.180s has changed since it was opened", url_of(read->easy));
	return -ESTALE;
}

static int judge_part(struct http *h, const struct store_read *read, CURLcode code, char *why)
{
	const char *url = url_of(read->easy);
	long status = status_of(read->easy);

	if (status == 200 && read->headers && h->etag[0] && is_ram(read)) {
		snprintf(why, STORE_WHY_BYTES, "%.180s has changed since it was opened", url);
		return -ESTALE;
	}
	if (status == 200) {
		snprintf(why, STORE_WHY_BYTES, "%.150s: the store does not give parts of an object (no range requests)", url);
		return -EPROTO;
	}
	if (status && status != 206)
		return of_status(status, url, why);
	if (status == 206 && read->range_from != read->offset) {
		snprintf(why, STORE_WHY_BYTES, "%.150s: another part came than the one that was asked for", url);
		return -EPROTO;
	}
	if (code)
		return of_curl(code, url, why);
	if (read->got != read->bytes) {
		snprintf(why, STORE_WHY_BYTES, "%.150s: %zu bytes came, and %zu were asked for", url, read->got, read->bytes);
		return -EPROTO;
	}
	return check_etag(h, read, why);
}

int http_start(struct http *h, struct store_read *read)
{
	struct curl_slist *headers = NULL;
	char text[160];

	read->etag[0] = '\0';
	read->range_from = UINT64_MAX;
	read->easy = prepare(h, read->object, &headers);
	if (!read->easy)
		return -ENOMEM;
	if (is_ram(read) && h->etag[0] == '"') { /* a weak one cannot be asked for */
		snprintf(text, sizeof text, "If-Range: %s", h->etag);
		headers = curl_slist_append(headers, text);
	}
	snprintf(text, sizeof text, "%ju-%ju", (uintmax_t)read->offset, (uintmax_t)(read->offset + read->bytes - 1));
	read->headers = headers;
	curl_easy_setopt(read->easy, CURLOPT_RANGE, text);
	curl_easy_setopt(read->easy, CURLOPT_HTTPHEADER, headers);
	curl_easy_setopt(read->easy, CURLOPT_HEADERFUNCTION, take_header);
	curl_easy_setopt(read->easy, CURLOPT_HEADERDATA, read);
	curl_easy_setopt(read->easy, CURLOPT_WRITEFUNCTION, take_part);
	curl_easy_setopt(read->easy, CURLOPT_WRITEDATA, read);
	curl_easy_setopt(read->easy, CURLOPT_PRIVATE, read);
	if (!curl_multi_add_handle(h->multi, read->easy))
		return 0;
	put_back(h, read->easy);
	curl_slist_free_all(headers);
	return -ENOMEM;
}

static void end_part(struct http *h, CURL *easy, CURLcode code)
{
	char why[STORE_WHY_BYTES] = "";
	struct store_read *read;
	int r;

	curl_easy_getinfo(easy, CURLINFO_PRIVATE, (char **)&read);
	r = judge_part(h, read, code, why);
	curl_multi_remove_handle(h->multi, easy);
	curl_slist_free_all(read->headers);
	put_back(h, easy);
	store_ended(read->store, read, r, why);
}

void http_wait(struct http *h, struct pollfd *polled, unsigned count, int timeout_ms)
{
	struct curl_waitfd extra[STORE_POLLED];
	int running, left;
	CURLMsg *message;

	for (unsigned i = 0; i < count; i++)
		extra[i] = (struct curl_waitfd){ .fd = polled[i].fd, .events = CURL_WAIT_POLLIN };
	curl_multi_perform(h->multi, &running);
	curl_multi_poll(h->multi, extra, count, timeout_ms, NULL);
	curl_multi_perform(h->multi, &running);
	for (unsigned i = 0; i < count; i++)
		polled[i].revents = extra[i].revents & CURL_WAIT_POLLIN ? POLLIN : 0;
	while ((message = curl_multi_info_read(h->multi, &left)))
		if (message->msg == CURLMSG_DONE)
			end_part(h, message->easy_handle, message->data.result);
}
