/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The connection between the two sides of a migration: messages (wire.h) over TCP or a unix socket, with TLS that
 * proves both sides to each other. Nothing blocks but link_wait. A peer that says nothing for LINK_SILENT_MS is
 * gone; each side says something every second (WIRE_PING), by link_wait alone.
 *
 * Errors are negative errno values with a sentence in `why`: -EPROTO (what the peer sends is wrong), -ECONNRESET
 * (it has ended), -ETIMEDOUT (it says nothing), -EACCES (it has not proven who it is). After one of these nothing more is
 * sent or received. One thread.
 */
#ifndef LATENT_MIGRATE_LINK_H
#define LATENT_MIGRATE_LINK_H

#include "migrate/wire.h"

#include <poll.h>
#include <stdint.h>

#define LINK_SILENT_MS 10000
#define LINK_ROOM (4u << 20) /* bytes that may wait to be sent */
#define LINK_POLLED 8u

struct link;
struct link_keys;

/*
 * Files in `dir`, called as QEMU calls them: ca-cert.pem with server-cert.pem and server-key.pem, or client-cert.pem
 * and client-key.pem; or keys.psk, lines of NAME:HEX, of which the side that connects takes the first one.
 */
int link_keys_load(const char *dir, bool server, struct link_keys **ret_keys, char why[SNAPSHOT_WHY_BYTES]);
void link_keys_free(struct link_keys *keys); /* NULL is allowed */

/* tcp:HOST:PORT, tcp:[ADDRESS]:PORT or unix:PATH. Returns a descriptor; the path is replaced if nobody listens there. */
int link_listen(const char *address, char why[SNAPSHOT_WHY_BYTES]);
/* The address that a listener has, with the port that the kernel has chosen for 0. */
int link_describe(int listener, char *address, size_t bytes);

/*
 * A connection whose peer has proven who it is: by TLS (1.3) if there are `keys`, which must live longer; else by its
 * user (the same one, or root) on a unix socket; else not at all. `host`: whom the server's certificate must name;
 * NULL: the one of the address. `is_source`: what we are.
 */
int link_connect(const char *address, const struct link_keys *keys, const char *host, bool is_source,
		 struct link **ret_link, char why[SNAPSHOT_WHY_BYTES]);
/* Of a listener that is ready. */
int link_accept(int listener, const struct link_keys *keys, bool is_source, struct link **ret_link,
		char why[SNAPSHOT_WHY_BYTES]);
/* Says nothing more to the peer. NULL is allowed. */
void link_close(struct link *link);

/* Copies the payload. An urgent message overtakes those that are not being sent yet. -EAGAIN: there is no room now;
 * -ENOMEM. */
int link_send(struct link *link, enum wire_type type, const void *payload, size_t bytes, bool urgent);
/* Waits until all has been sent that waits for it, for a second at the most. */
void link_flush(struct link *link);
/* A sentence (WIRE_REFUSE, WIRE_FAILED), and all that waits before it, as far as the peer takes it within a second. */
void link_send_last(struct link *link, enum wire_type type, const char *sentence);

/* The next message; its payload is valid until the next link_receive or link_wait. -EAGAIN: none is there yet. */
int link_receive(struct link *link, struct wire_message *ret_message, char why[SNAPSHOT_WHY_BYTES]);
/* Sends and receives until there is a message, room for more (if `for_room`), one of `polled` (at most LINK_POLLED) is
 * ready, or `timeout_ms` are over. */
int link_wait(struct link *link, bool for_room, struct pollfd *polled, unsigned count, int timeout_ms,
	      char why[SNAPSHOT_WHY_BYTES]);

/* One of the errors above has come: to talk on, it takes another link. */
bool link_is_over(const struct link *link);

/* Bytes that wait to be sent; that have been sent and received (before TLS). */
size_t link_waiting(const struct link *link);
uint64_t link_bytes_sent(const struct link *link);
uint64_t link_bytes_received(const struct link *link);

#endif
