/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "migrate/link.h"

#include "os/os.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <gnutls/gnutls.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define PING_US 1000000u
#define HANDSHAKE_MS 10000
#define LAST_MS 1000
#define UNHEARD_MS 120000 /* what is sent arrives by then: where a message waits for us, silence does not show */
/* What the kernel may hold that is not sent yet: an urgent message waits for no more than that. */
#define NOT_SENT_BYTES (256 << 10)
#define PRIORITY_X509 "NORMAL:-VERS-ALL:+VERS-TLS1.3"
#define PRIORITY_PSK PRIORITY_X509 ":-KX-ALL:+ECDHE-PSK:+DHE-PSK"
#define PSK_LINE_BYTES 512

struct link_keys {
	gnutls_certificate_credentials_t x509;
	gnutls_psk_server_credentials_t psk_server;
	gnutls_psk_client_credentials_t psk_client;
};

struct outgoing {
	struct outgoing *next;
	size_t bytes, sent;
	uint8_t data[];
};

struct queue {
	struct outgoing *first, **end;
};

struct link {
	int fd;
	bool peer_is_source;
	gnutls_session_t session; /* NULL: plain */
	struct queue urgent, normal;
	struct outgoing *sending; /* taken out of its queue, perhaps sent in part */
	size_t waiting;
	uint64_t bytes_sent, bytes_received, sent_us, heard_us;
	size_t got;         /* of the header and the payload of the next message */
	bool over;
	bool taken;         /* the message has been given to the caller */
	/* What comes in; the payload is aligned. */
	struct {
		_Alignas(8) struct wire_header header;
		uint8_t payload[WIRE_PAYLOAD_MAX];
	} in;
};

/* ---- keys ----------------------------------------------------------------------------------------- */

static int join(char path[4096], const char *dir, const char *name)
{
	return snprintf(path, 4096, "%s/%s", dir, name) < 4096 ? 0 : -ENAMETOOLONG;
}

static int fail_tls(char why[SNAPSHOT_WHY_BYTES], int error, const char *what)
{
	return snapshot_fail(why, -EACCES, "%.150s: %s", what, gnutls_strerror(error));
}

static int load_x509(struct link_keys *keys, const char *dir, bool server, char why[SNAPSHOT_WHY_BYTES])
{
	char ca[4096], cert[4096], key[4096];
	int r;

	if (join(ca, dir, "ca-cert.pem") || join(cert, dir, server ? "server-cert.pem" : "client-cert.pem") ||
	    join(key, dir, server ? "server-key.pem" : "client-key.pem"))
		return snapshot_fail(why, -ENAMETOOLONG, "the path of the keys is too long");
	if (gnutls_certificate_allocate_credentials(&keys->x509))
		return snapshot_fail(why, -ENOMEM, "no memory for keys");
	r = gnutls_certificate_set_x509_trust_file(keys->x509, ca, GNUTLS_X509_FMT_PEM);
	if (r <= 0)
		return r ? fail_tls(why, r, ca) : snapshot_fail(why, -EACCES, "%.150s has no certificate", ca);
	r = gnutls_certificate_set_x509_key_file(keys->x509, cert, key, GNUTLS_X509_FMT_PEM);
	return r < 0 ? fail_tls(why, r, cert) : 0;
}

/* The first NAME:HEX of a file. */
static int load_psk_client(struct link_keys *keys, const char *path, char why[SNAPSHOT_WHY_BYTES])
{
	char line[PSK_LINE_BYTES], *colon;
	FILE *file = fopen(path, "re");
	gnutls_datum_t key;
	int r;

	if (!file)
		return snapshot_fail(why, -errno, "%.150s: %s", path, strerror(errno));
	colon = fgets(line, sizeof line, file) ? strchr(line, ':') : NULL;
	fclose(file);
	if (!colon)
		return snapshot_fail(why, -EACCES, "%.150s has no line NAME:HEX (psktool makes one)", path);
	*colon++ = '\0';
	colon[strcspn(colon, "\r\n")] = '\0';
	key = (gnutls_datum_t){ (unsigned char *)colon, (unsigned)strlen(colon) };
	r = gnutls_psk_allocate_client_credentials(&keys->psk_client);
	if (!r)
		r = gnutls_psk_set_client_credentials(keys->psk_client, line, &key, GNUTLS_PSK_KEY_HEX);
	explicit_bzero(line, sizeof line);
	return r ? fail_tls(why, r, path) : 0;
}

static int load_psk_server(struct link_keys *keys, const char *path, char why[SNAPSHOT_WHY_BYTES])
{
	int r = gnutls_psk_allocate_server_credentials(&keys->psk_server);

	if (!r)
		r = gnutls_psk_set_server_credentials_file(keys->psk_server, path);
	return r ? fail_tls(why, r, path) : 0;
}

int link_keys_load(const char *dir, bool server, struct link_keys **ret_keys, char why[SNAPSHOT_WHY_BYTES])
{
	struct link_keys *keys = calloc(1, sizeof *keys);
	char psk[4096];
	int r;

	if (!keys)
		return snapshot_fail(why, -ENOMEM, "no memory for keys");
	if (join(psk, dir, "keys.psk"))
		r = snapshot_fail(why, -ENAMETOOLONG, "the path of the keys is too long");
	else if (access(psk, F_OK))
		r = load_x509(keys, dir, server, why);
	else
		r = server ? load_psk_server(keys, psk, why) : load_psk_client(keys, psk, why);
	if (r)
		link_keys_free(keys);
	else
		*ret_keys = keys;
	return r;
}

void link_keys_free(struct link_keys *keys)
{
	if (!keys)
		return;
	if (keys->x509)
		gnutls_certificate_free_credentials(keys->x509);
	if (keys->psk_server)
		gnutls_psk_free_server_credentials(keys->psk_server);
	if (keys->psk_client)
		gnutls_psk_free_client_credentials(keys->psk_client);
	free(keys);
}

/* ---- addresses ------------------------------------------------------------------------------------ */

struct address {
	const char *path; /* of a unix socket; or NULL, and */
	char host[256], port[16];
};

static int parse_address(const char *text, struct address *ret_address, char why[SNAPSHOT_WHY_BYTES])
{
	const char *host = text + 4, *colon = strrchr(text, ':'), *end = colon;

	*ret_address = (struct address){ 0 };
	if (!strncmp(text, "unix:", 5) && text[5] && strlen(text + 5) < sizeof ((struct sockaddr_un *)0)->sun_path) {
		ret_address->path = text + 5;
		return 0;
	}
	if (strncmp(text, "tcp:", 4) || colon <= host)
		return snapshot_fail(why, -EINVAL, "'%.100s' is no address: tcp:HOST:PORT or unix:PATH", text);
	if (*host == '[' && end[-1] == ']') {
		host++;
		end--;
	}
	if (end <= host || (size_t)(end - host) >= sizeof ret_address->host || !colon[1] ||
	    strspn(colon + 1, "0123456789") != strlen(colon + 1) || strlen(colon + 1) > 5)
		return snapshot_fail(why, -EINVAL, "'%.100s' is no address: tcp:HOST:PORT or unix:PATH", text);
	snprintf(ret_address->host, sizeof ret_address->host, "%.*s", (int)(end - host), host);
	snprintf(ret_address->port, sizeof ret_address->port, "%s", colon + 1);
	return 0;
}

static int resolve(const struct address *address, bool passive, struct addrinfo **ret_list, char why[SNAPSHOT_WHY_BYTES])
{
	const struct addrinfo hints = { .ai_socktype = SOCK_STREAM, .ai_flags = passive ? AI_PASSIVE : 0 };
	int r = getaddrinfo(address->host, address->port, &hints, ret_list);

	return r ? snapshot_fail(why, -EHOSTUNREACH, "%.100s: %s", address->host, gai_strerror(r)) : 0;
}

static struct sockaddr_un unix_address(const char *path)
{
	struct sockaddr_un sa = { .sun_family = AF_UNIX };

	snprintf(sa.sun_path, sizeof sa.sun_path, "%s", path); /* its length was checked */
	return sa;
}

/* A socket that somebody has left there goes; one that answers stays. */
static void remove_stale(const char *path)
{
	struct sockaddr_un sa = unix_address(path);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	struct stat st;

	if (!lstat(path, &st) && S_ISSOCK(st.st_mode) && connect(fd, (struct sockaddr *)&sa, sizeof sa) &&
	    errno == ECONNREFUSED)
		(void)unlink(path);
	close(fd);
}

static int listen_unix(const char *path, char why[SNAPSHOT_WHY_BYTES])
{
	struct sockaddr_un sa = unix_address(path);
	mode_t mask = umask(0077);
	int fd, r;

	remove_stale(path);
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	r = fd < 0 || bind(fd, (struct sockaddr *)&sa, sizeof sa) || listen(fd, 8) ? -errno : 0;
	umask(mask);
	if (!r)
		return fd;
	if (fd >= 0)
		close(fd);
	return snapshot_fail(why, r, "%.150s: %s", path, strerror(-r));
}

static int listen_one(const struct addrinfo *a)
{
	int fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), one = 1, r;

	if (fd < 0)
		return -errno;
	(void)setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (!bind(fd, a->ai_addr, a->ai_addrlen) && !listen(fd, 8))
		return fd;
	r = -errno;
	close(fd);
	return r;
}

int link_listen(const char *text, char why[SNAPSHOT_WHY_BYTES])
{
	struct addrinfo *list = NULL;
	struct address address;
	int fd = -EADDRNOTAVAIL, r = parse_address(text, &address, why);

	if (r)
		return r;
	if (address.path)
		return listen_unix(address.path, why);
	r = resolve(&address, true, &list, why);
	if (r)
		return r;
	for (const struct addrinfo *a = list; a && fd < 0; a = a->ai_next)
		fd = listen_one(a);
	freeaddrinfo(list);
	return fd < 0 ? snapshot_fail(why, fd, "%.150s: %s", text, strerror(-fd)) : fd;
}

int link_describe(int listener, char *text, size_t bytes)
{
	union {
		struct sockaddr any;
		struct sockaddr_un local;
		struct sockaddr_storage room;
	} sa = { 0 };
	socklen_t length = sizeof sa.room;
	char host[INET6_ADDRSTRLEN], port[8];

	if (getsockname(listener, &sa.any, &length))
		return -errno;
	if (sa.any.sa_family == AF_UNIX)
		return snprintf(text, bytes, "unix:%s", sa.local.sun_path) < (int)bytes ? 0 : -ENAMETOOLONG;
	if (getnameinfo(&sa.any, length, host, sizeof host, port, sizeof port, NI_NUMERICHOST | NI_NUMERICSERV))
		return -EINVAL;
	return snprintf(text, bytes, sa.any.sa_family == AF_INET6 ? "tcp:[%s]:%s" : "tcp:%s:%s", host, port) < (int)bytes
	       ? 0 : -ENAMETOOLONG;
}

/* ---- connections ---------------------------------------------------------------------------------- */

static int finish_connect(int fd, int timeout_ms)
{
	struct pollfd p = { .fd = fd, .events = POLLOUT };
	int error = 0;
	socklen_t length = sizeof error;

	if (poll(&p, 1, timeout_ms) <= 0)
		return -ETIMEDOUT;
	return getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) ? -errno : -error;
}

static int connect_one(int family, const struct sockaddr *sa, socklen_t bytes)
{
	int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), r;

	if (fd < 0)
		return -errno;
	r = !connect(fd, sa, bytes) ? 0 : errno == EINPROGRESS ? finish_connect(fd, HANDSHAKE_MS) : -errno;
	if (!r)
		return fd;
	close(fd);
	return r;
}

static int connect_to(const struct address *address, char why[SNAPSHOT_WHY_BYTES])
{
	struct addrinfo *list = NULL;
	int fd = -EHOSTUNREACH, r;

	if (address->path) {
		struct sockaddr_un sa = unix_address(address->path);

		return connect_one(AF_UNIX, (struct sockaddr *)&sa, sizeof sa);
	}
	r = resolve(address, false, &list, why);
	for (const struct addrinfo *a = list; !r && a && fd < 0; a = a->ai_next)
		fd = connect_one(a->ai_family, a->ai_addr, a->ai_addrlen);
	if (list)
		freeaddrinfo(list);
	return fd;
}

static int check_user(int fd, char why[SNAPSHOT_WHY_BYTES])
{
	struct ucred peer;
	socklen_t length = sizeof peer;

	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length))
		return snapshot_fail(why, -errno, "the peer's user cannot be known");
	if (peer.uid && peer.uid != geteuid())
		return snapshot_fail(why, -EACCES, "the peer is another user (%u)", peer.uid);
	return 0;
}

static int shake_hands(struct link *link, char why[SNAPSHOT_WHY_BYTES])
{
	uint64_t until_us = os_now_us() + HANDSHAKE_MS * 1000u;
	gnutls_datum_t text = { 0 };
	int r;

	while ((r = gnutls_handshake(link->session)) < 0 && !gnutls_error_is_fatal(r)) {
		struct pollfd p = { link->fd, gnutls_record_get_direction(link->session) ? POLLOUT : POLLIN, 0 };

		if (os_now_us() >= until_us)
			return snapshot_fail(why, -ETIMEDOUT, "the peer does not answer (TLS)");
		(void)poll(&p, 1, 100);
	}
	if (r == GNUTLS_E_CERTIFICATE_VERIFICATION_ERROR &&
	    !gnutls_certificate_verification_status_print(gnutls_session_get_verify_cert_status(link->session),
							  GNUTLS_CRT_X509, &text, 0)) {
		snapshot_fail(why, -EACCES, "the peer's certificate: %.180s", (const char *)text.data);
		gnutls_free(text.data);
		return -EACCES;
	}
	return r ? fail_tls(why, r, "the peer has not proven who it is, or does not trust us (TLS)") : 0;
}

static int start_tls(struct link *link, const struct link_keys *keys, bool server, const char *host,
		     char why[SNAPSHOT_WHY_BYTES])
{
	int r = gnutls_init(&link->session, (server ? GNUTLS_SERVER : GNUTLS_CLIENT) | GNUTLS_NONBLOCK | GNUTLS_NO_SIGNAL);

	if (!r)
		r = gnutls_priority_set_direct(link->session, keys->x509 ? PRIORITY_X509 : PRIORITY_PSK, NULL);
	if (!r && keys->x509)
		r = gnutls_credentials_set(link->session, GNUTLS_CRD_CERTIFICATE, keys->x509);
	else if (!r)
		r = gnutls_credentials_set(link->session, GNUTLS_CRD_PSK,
					   server ? (void *)keys->psk_server : (void *)keys->psk_client);
	if (r)
		return fail_tls(why, r, "TLS cannot be started");
	if (keys->x509 && server)
		gnutls_certificate_server_set_request(link->session, GNUTLS_CERT_REQUIRE);
	if (keys->x509)
		gnutls_session_set_verify_cert(link->session, server ? NULL : host, 0);
	gnutls_transport_set_int(link->session, link->fd);
	return shake_hands(link, why);
}

static bool is_unix(int fd)
{
	int domain = 0;
	socklen_t length = sizeof domain;

	return !getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length) && domain == AF_UNIX;
}

/* Takes the descriptor, also on failure. */
static int begin(int fd, const struct link_keys *keys, bool server, const char *host, bool is_source,
		 struct link **ret_link, char why[SNAPSHOT_WHY_BYTES])
{
	struct link *link = calloc(1, sizeof *link);
	int one = 1, not_sent = NOT_SENT_BYTES, unheard_ms = UNHEARD_MS, r = 0;

	if (!link) {
		close(fd);
		return snapshot_fail(why, -ENOMEM, "no memory for a connection");
	}
	link->fd = fd;
	link->peer_is_source = !is_source;
	link->urgent.end = &link->urgent.first;
	link->normal.end = &link->normal.first;
	(void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	(void)setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &not_sent, sizeof not_sent);
	(void)setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &unheard_ms, sizeof unheard_ms);
	if (keys)
		r = start_tls(link, keys, server, host, why);
	else if (is_unix(fd))
		r = check_user(fd, why);
	link->sent_us = link->heard_us = os_now_us();
	if (r)
		link_close(link);
	else
		*ret_link = link;
	return r;
}

int link_connect(const char *text, const struct link_keys *keys, const char *host, bool is_source,
		 struct link **ret_link, char why[SNAPSHOT_WHY_BYTES])
{
	struct address address;
	int fd, r = parse_address(text, &address, why);

	if (r)
		return r;
	why[0] = '\0';
	fd = connect_to(&address, why);
	if (fd < 0)
		return why[0] ? fd : snapshot_fail(why, fd, "%.150s: %s", text, strerror(-fd));
	return begin(fd, keys, false, host ? host : address.path ? "localhost" : address.host, is_source, ret_link, why);
}

int link_accept(int listener, const struct link_keys *keys, bool is_source, struct link **ret_link,
		char why[SNAPSHOT_WHY_BYTES])
{
	int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

	if (fd < 0)
		return snapshot_fail(why, -errno, "a connection was lost: %s", strerror(errno));
	return begin(fd, keys, true, NULL, is_source, ret_link, why);
}

static void free_queue(struct outgoing *first)
{
	while (first) {
		struct outgoing *next = first->next;

		free(first);
		first = next;
	}
}

void link_close(struct link *link)
{
	if (!link)
		return;
	if (link->session)
		gnutls_deinit(link->session);
	close(link->fd);
	free_queue(link->urgent.first);
	free_queue(link->normal.first);
	free(link->sending);
	free(link);
}

/* ---- bytes ---------------------------------------------------------------------------------------- */

static int tls_error(long n)
{
	return n == GNUTLS_E_AGAIN || n == GNUTLS_E_INTERRUPTED ? -EAGAIN
	       : n == GNUTLS_E_PREMATURE_TERMINATION ? -ECONNRESET : -EPROTO;
}

static int socket_error(void)
{
	return errno == EAGAIN || errno == EINTR ? -EAGAIN : errno == EPIPE ? -ECONNRESET : -errno;
}

/* Bytes, or -EAGAIN, or what ends the connection. */
static long send_some(struct link *link, const uint8_t *data, size_t bytes)
{
	long n = link->session ? gnutls_record_send(link->session, data, bytes)
			       : send(link->fd, data, bytes, MSG_NOSIGNAL);

	return n >= 0 ? n : link->session ? tls_error(n) : socket_error();
}

static long receive_some(struct link *link, void *to, size_t bytes)
{
	long n = link->session ? gnutls_record_recv(link->session, to, bytes) : recv(link->fd, to, bytes, 0);

	return n > 0 ? n : !n ? -ECONNRESET : link->session ? tls_error(n) : socket_error();
}

static int explain(struct link *link, int r, char why[SNAPSHOT_WHY_BYTES])
{
	link->over = true;
	return snapshot_fail(why, r, r == -ECONNRESET ? "the peer has ended the connection"
				     : "the connection to the peer: %s", strerror(-r));
}

/* ---- sending -------------------------------------------------------------------------------------- */

static void push(struct queue *queue, struct outgoing *out)
{
	*queue->end = out;
	queue->end = &out->next;
}

static struct outgoing *pop(struct queue *queue)
{
	struct outgoing *out = queue->first;

	if (out) {
		queue->first = out->next;
		if (!queue->first)
			queue->end = &queue->first;
	}
	return out;
}

static int enqueue(struct link *link, enum wire_type type, const void *payload, size_t bytes, bool urgent)
{
	struct wire_header header = { .type = (uint32_t)type, .bytes = (uint32_t)bytes };
	struct outgoing *out = malloc(sizeof *out + sizeof header + bytes);

	if (!out)
		return -ENOMEM;
	header.checksum = wire_checksum(&header, payload);
	*out = (struct outgoing){ .bytes = sizeof header + bytes };
	memcpy(out->data, &header, sizeof header);
	if (bytes)
		memcpy(out->data + sizeof header, payload, bytes);
	push(urgent ? &link->urgent : &link->normal, out);
	link->waiting += out->bytes;
	return 0;
}

int link_send(struct link *link, enum wire_type type, const void *payload, size_t bytes, bool urgent)
{
	return link->waiting >= LINK_ROOM && !urgent ? -EAGAIN : enqueue(link, type, payload, bytes, urgent);
}

/* What can be sent now. 0, or what ends the connection. */
static int flush(struct link *link)
{
	for (;;) {
		struct outgoing *out = link->sending;
		long n;

		if (!out)
			out = link->sending = link->urgent.first ? pop(&link->urgent) : pop(&link->normal);
		if (!out)
			return 0;
		n = send_some(link, out->data + out->sent, out->bytes - out->sent);
		if (n < 0)
			return n == -EAGAIN ? 0 : (int)n;
		out->sent += (size_t)n;
		link->waiting -= (size_t)n;
		link->bytes_sent += (uint64_t)n;
		link->sent_us = os_now_us();
		if (out->sent < out->bytes)
			continue;
		free(out);
		link->sending = NULL;
	}
}

void link_flush(struct link *link)
{
	uint64_t until_us = os_now_us() + LAST_MS * 1000u;
	struct pollfd p = { .fd = link->fd, .events = POLLOUT };

	while (!flush(link) && link->waiting && os_now_us() < until_us)
		(void)poll(&p, 1, 50);
}

void link_send_last(struct link *link, enum wire_type type, const char *sentence)
{
	size_t bytes = strnlen(sentence, WIRE_TEXT_MAX - 1);

	if (!bytes || enqueue(link, type, sentence, bytes, false))
		return;
	link_flush(link);
	(void)shutdown(link->fd, SHUT_WR);
}

/* ---- receiving ------------------------------------------------------------------------------------ */

static bool is_complete(const struct link *link)
{
	return link->got >= sizeof link->in.header && link->got == sizeof link->in.header + link->in.header.bytes;
}

/* As far as there is something; nothing is received before its header has been checked. */
static int fill(struct link *link, char why[SNAPSHOT_WHY_BYTES])
{
	while (!is_complete(link)) {
		size_t header = sizeof link->in.header, all = link->got < header ? header : header + link->in.header.bytes;
		long n = receive_some(link, (uint8_t *)&link->in + link->got, all - link->got);
		int r;

		if (n < 0)
			return n == -EAGAIN ? -EAGAIN : explain(link, (int)n, why);
		link->got += (size_t)n;
		link->bytes_received += (uint64_t)n;
		link->heard_us = os_now_us();
		r = link->got == header ? wire_check_header(&link->in.header, link->peer_is_source, why) : 0;
		if (!r && is_complete(link) && link->in.header.checksum != wire_checksum(&link->in.header, link->in.payload))
			r = snapshot_fail(why, -EPROTO, "a message was spoilt on its way: use --tls, or look for what is wrong with "
					  "the link");
		link->over = link->over || r;
		if (r)
			return r;
		if (is_complete(link) && link->in.header.type == WIRE_PING) {
			link->got = 0; /* it was to be heard, and nobody takes it */
			return -EAGAIN;
		}
	}
	return 0;
}

/* A message that nobody has taken yet: until then nothing more is received. */
static bool has_message(const struct link *link) { return is_complete(link) && !link->taken; }

static void drop_taken(struct link *link)
{
	if (link->taken)
		link->got = 0;
	link->taken = false;
}

int link_receive(struct link *link, struct wire_message *ret_message, char why[SNAPSHOT_WHY_BYTES])
{
	int r;

	drop_taken(link);
	r = fill(link, why);
	if (r)
		return r;
	link->taken = true;
	*ret_message = (struct wire_message){ (enum wire_type)link->in.header.type, link->in.payload, link->in.header.bytes };
	return 0;
}

/* ---- waiting -------------------------------------------------------------------------------------- */

static int keep_alive(struct link *link, char why[SNAPSHOT_WHY_BYTES])
{
	uint64_t now_us = os_now_us();

	if (has_message(link))
		link->heard_us = now_us; /* it is for us to listen */
	link->over = link->over || now_us - link->heard_us > LINK_SILENT_MS * 1000u;
	if (now_us - link->heard_us > LINK_SILENT_MS * 1000u)
		return snapshot_fail(why, -ETIMEDOUT, "the peer has said nothing for %d s", LINK_SILENT_MS / 1000);
	if (now_us - link->sent_us < PING_US || link->waiting)
		return 0;
	return enqueue(link, WIRE_PING, NULL, 0, true);
}

/* TLS may have taken more from the socket than it has given. */
static bool has_pending(const struct link *link)
{
	return link->session && gnutls_record_check_pending(link->session);
}

static int turn(struct link *link, struct pollfd *polled, unsigned count, int timeout_ms, char why[SNAPSHOT_WHY_BYTES])
{
	struct pollfd all[1 + LINK_POLLED];
	bool listens;
	int r;

	drop_taken(link);
	listens = !has_message(link);
	all[0] = (struct pollfd){ link->fd, (short)((listens ? POLLIN : 0) | (link->waiting ? POLLOUT : 0)), 0 };
	if (count)
		memcpy(all + 1, polled, count * sizeof *polled);
	r = poll(all, 1 + count, listens && has_pending(link) ? 0 : timeout_ms);
	if (r < 0 && errno != EINTR)
		return snapshot_fail(why, -errno, "poll: %s", strerror(errno));
	for (unsigned i = 0; i < count; i++) {
		polled[i].revents = 0;
		if (r > 0)
			polled[i].revents = all[1 + i].revents;
	}
	r = flush(link);
	if (r)
		return explain(link, r, why);
	r = fill(link, why);
	return r == -EAGAIN ? 0 : r;
}

int link_wait(struct link *link, bool for_room, struct pollfd *polled, unsigned count, int timeout_ms,
	      char why[SNAPSHOT_WHY_BYTES])
{
	uint64_t until_us = os_now_us() + (uint64_t)timeout_ms * 1000u;

	for (;;) {
		uint64_t now_us = os_now_us();
		int left_ms = now_us < until_us ? (int)((until_us - now_us + 999) / 1000) : 0, r;

		r = keep_alive(link, why);
		if (!r)
			r = turn(link, polled, count, left_ms < 500 ? left_ms : 500, why);
		if (r)
			return r;
		for (unsigned i = 0; i < count; i++)
			if (polled[i].revents)
				return 0;
		if (is_complete(link) || (for_room && link->waiting < LINK_ROOM) || os_now_us() >= until_us)
			return 0;
	}
}

bool link_is_over(const struct link *link)
{
	return link->over;
}

size_t link_waiting(const struct link *link)
{
	return link->waiting;
}

uint64_t link_bytes_sent(const struct link *link)
{
	return link->bytes_sent;
}

uint64_t link_bytes_received(const struct link *link)
{
	return link->bytes_received;
}
