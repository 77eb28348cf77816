/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* The connection of a migration: messages arrive whole, urgent ones first; and only from whom they should. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "migrate/link.h"
#include "os/os.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

struct rig {
	char dir[64], address[128], why[SNAPSHOT_WHY_BYTES];
	int listener;
	struct link *source, *destination;
};

static void put(const struct rig *rig, const char *name, const char *text)
{
	char path[128];
	FILE *file;

	snprintf(path, sizeof path, "%s/%s", rig->dir, name);
	file = fopen(path, "w");
	assert_non_null(file);
	fputs(text, file);
	fclose(file);
}

static int setup(void **state)
{
	struct rig *rig = calloc(1, sizeof *rig);

	strcpy(rig->dir, "/tmp/latent-link-XXXXXX");
	if (!mkdtemp(rig->dir))
		return -1;
	rig->listener = -1;
	*state = rig;
	return 0;
}

static int teardown(void **state)
{
	struct rig *rig = *state;
	char command[128];

	link_close(rig->source);
	link_close(rig->destination);
	if (rig->listener >= 0)
		close(rig->listener);
	snprintf(command, sizeof command, "rm -rf %s", rig->dir);
	(void)!system(command);
	free(rig);
	return 0;
}

static void listen_on(struct rig *rig, const char *address)
{
	rig->listener = link_listen(address, rig->why);
	assert_true(rig->listener >= 0);
	assert_int_equal(link_describe(rig->listener, rig->address, sizeof rig->address), 0);
}

static void connect_plain(struct rig *rig)
{
	char address[128];

	snprintf(address, sizeof address, "unix:%s/socket", rig->dir);
	listen_on(rig, address);
	assert_int_equal(link_connect(rig->address, NULL, NULL, true, &rig->source, rig->why), 0);
	assert_int_equal(link_accept(rig->listener, NULL, false, &rig->destination, rig->why), 0);
}

/* Both sides work until `to` has a message, which is returned; or one of them fails: NULL. */
static int next_message(struct link *from, struct link *to, struct wire_message *message, char why[SNAPSHOT_WHY_BYTES])
{
	int r;

	for (int tries = 0; tries < 3000; tries++) {
		r = link_wait(from, true, NULL, 0, 0, why);
		if (!r)
			r = link_wait(to, false, NULL, 0, 1, why);
		if (!r)
			r = link_receive(to, message, why);
		if (r != -EAGAIN)
			return r;
	}
	return -ETIMEDOUT;
}

static void test_messages_arrive_whole_and_in_order(void **state)
{
	static uint8_t big[WIRE_STATE_MAX];
	struct rig *rig = *state;
	struct wire_message m;

	connect_plain(rig);
	for (size_t i = 0; i < sizeof big; i++)
		big[i] = (uint8_t)(i * 7 + i / 251);
	assert_int_equal(link_send(rig->source, WIRE_STATE, big, sizeof big, false), 0);
	assert_int_equal(link_send(rig->source, WIRE_PASS, NULL, 0, false), 0);
	assert_int_equal(next_message(rig->source, rig->destination, &m, rig->why), 0);
	assert_int_equal(m.type, WIRE_STATE);
	assert_int_equal(m.bytes, sizeof big);
	assert_memory_equal(m.payload, big, sizeof big);
	assert_int_equal((uintptr_t)m.payload % 8, 0);
	assert_int_equal(next_message(rig->source, rig->destination, &m, rig->why), 0);
	assert_int_equal(m.type, WIRE_PASS);
	assert_int_equal(link_bytes_sent(rig->source), link_bytes_received(rig->destination));
	assert_int_equal(link_waiting(rig->source), 0);
	assert_int_equal(link_send(rig->destination, WIRE_LOADED, NULL, 0, false), 0);
	assert_int_equal(next_message(rig->destination, rig->source, &m, rig->why), 0);
	assert_int_equal(m.type, WIRE_LOADED);
}

static void test_room_is_bounded_and_urgent_goes_first(void **state)
{
	static uint8_t big[WIRE_STATE_MAX];
	struct rig *rig = *state;
	struct wire_message m;
	unsigned before = 0, after = 0;
	int r;

	connect_plain(rig);
	for (r = 0; !r && after < 100; after += !r)
		r = link_send(rig->source, WIRE_STATE, big, sizeof big, false);
	assert_int_equal(r, -EAGAIN);
	assert_in_range(after, 4, 5);
	(void)link_wait(rig->source, false, NULL, 0, 10, rig->why); /* the first one is being sent */
	assert_int_equal(link_send(rig->source, WIRE_PASS, NULL, 0, true), 0);
	for (m.type = WIRE_STATE; m.type == WIRE_STATE; before++)
		assert_int_equal(next_message(rig->source, rig->destination, &m, rig->why), 0);
	assert_int_equal(before - 1, 1);
	for (unsigned i = 1; i < after; i++)
		assert_int_equal(next_message(rig->source, rig->destination, &m, rig->why), 0);
}

/* Both sides do other things for longer than a peer may be silent, and only wait in between. */
static void wait_long(struct rig *rig)
{
	uint64_t until_us = os_now_us() + (LINK_SILENT_MS + 2000) * 1000u;

	while (os_now_us() < until_us) {
		assert_int_equal(link_wait(rig->source, false, NULL, 0, 0, rig->why), 0);
		assert_int_equal(link_wait(rig->destination, true, NULL, 0, 0, rig->why), 0);
		usleep(50000);
	}
}

static void test_who_only_waits_hears_the_peer(void **state)
{
	struct rig *rig = *state;
	struct wire_message m;

	connect_plain(rig);
	/* Nor is a peer silent whose message nobody takes. */
	assert_int_equal(link_send(rig->source, WIRE_PASS, NULL, 0, false), 0);
	wait_long(rig);
	assert_int_equal(link_receive(rig->destination, &m, rig->why), 0);
	assert_int_equal(m.type, WIRE_PASS);
	assert_int_equal(link_receive(rig->destination, &m, rig->why), -EAGAIN);
}

/* A message that lies there is no reason to turn round and round. */
static void test_waiting_takes_its_time_beside_a_message(void **state)
{
	struct rig *rig = *state;
	uint64_t begin_us;

	connect_plain(rig);
	assert_int_equal(link_send(rig->source, WIRE_PASS, NULL, 0, false), 0);
	assert_int_equal(link_wait(rig->source, false, NULL, 0, 10, rig->why), 0);
	assert_int_equal(link_wait(rig->destination, false, NULL, 0, 1000, rig->why), 0);
	begin_us = os_now_us();
	assert_int_equal(link_wait(rig->destination, false, NULL, 0, 200, rig->why), 0);
	assert_true(os_now_us() - begin_us >= 150000);
}

static void test_a_silent_peer_is_given_up(void **state)
{
	struct rig *rig = *state;
	uint64_t until_us = os_now_us() + (LINK_SILENT_MS + 5000) * 1000u;
	int r = 0;

	connect_plain(rig);
	while (!r && os_now_us() < until_us)
		r = link_wait(rig->source, false, NULL, 0, 100, rig->why);
	assert_int_equal(r, -ETIMEDOUT);
	assert_true(link_is_over(rig->source));
}

/* A peer that is no Latent. */
static void test_wrong_bytes_end_it_before_they_are_received(void **state)
{
	const struct wire_header h = { .type = WIRE_PAGES, .bytes = UINT32_MAX };
	struct rig *rig = *state;
	struct wire_message m;

	connect_plain(rig);
	/* (The source's own descriptor is the first field of struct link, which only this test knows.) */
	assert_int_equal(send(*(int *)(void *)rig->source, &h, sizeof h, 0), sizeof h);
	assert_int_equal(next_message(rig->source, rig->destination, &m, rig->why), -EPROTO);
	assert_true(rig->why[0]);
}

/* One bit of a message, wherever it is; what came before it was right. */
static void spoil(struct rig *rig, size_t bit)
{
	uint64_t wanted[4] = { 1, 2, 3, 4 };
	struct wire_header h = { .type = WIRE_WANT, .bytes = sizeof wanted };
	uint8_t message[sizeof h + sizeof wanted];
	struct wire_message m;

	h.checksum = wire_checksum(&h, wanted);
	memcpy(message, &h, sizeof h);
	memcpy(message + sizeof h, wanted, sizeof wanted);
	connect_plain(rig);
	assert_int_equal(send(*(int *)(void *)rig->destination, message, sizeof message, 0), sizeof message);
	assert_int_equal(next_message(rig->destination, rig->source, &m, rig->why), 0);
	assert_memory_equal(m.payload, wanted, sizeof wanted);
	message[bit / 8] ^= (uint8_t)(1u << bit % 8);
	assert_int_equal(send(*(int *)(void *)rig->destination, message, sizeof message, 0), sizeof message);
	shutdown(*(int *)(void *)rig->destination, SHUT_WR);
	assert_true(next_message(rig->destination, rig->source, &m, rig->why) != 0);
	assert_true(link_is_over(rig->source));
	link_close(rig->source);
	link_close(rig->destination);
	rig->source = rig->destination = NULL;
	close(rig->listener);
	rig->listener = -1;
}

static void test_a_message_that_was_spoilt_is_no_message(void **state)
{
	const size_t bits = 8 * (sizeof(struct wire_header) + 4 * sizeof(uint64_t));

	for (size_t bit = 0; bit < bits; bit += 5)
		spoil(*state, bit);
}

static void test_an_end_is_seen(void **state)
{
	struct rig *rig = *state;
	struct wire_message m;
	char text[WIRE_TEXT_MAX];

	connect_plain(rig);
	link_send_last(rig->source, WIRE_REFUSE, "there is no room");
	link_close(rig->source);
	rig->source = NULL;
	assert_int_equal(link_wait(rig->destination, false, NULL, 0, 1000, rig->why), 0);
	assert_int_equal(link_receive(rig->destination, &m, rig->why), 0);
	assert_int_equal(wire_read_text(&m, text, rig->why), 0);
	assert_string_equal(text, "there is no room");
	assert_int_equal(link_receive(rig->destination, &m, rig->why), -ECONNRESET);
}

static void test_wrong_addresses_are_refused(void **state)
{
	static const char *const wrong[] = { "", "tcp", "tcp:", "tcp::1", "tcp:host", "tcp:host:", "tcp:host:x", "tcp:h:123456",
					     "udp:h:1", "unix:", "h:1" };
	struct rig *rig = *state;

	for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
		assert_int_equal(link_listen(wrong[i], rig->why), -EINVAL);
		assert_non_null(strstr(rig->why, "tcp:HOST:PORT"));
	}
	assert_true(link_connect("tcp:127.0.0.1:1", NULL, NULL, true, &rig->source, rig->why) < 0);
	assert_non_null(strstr(rig->why, "refused"));
}

static void test_a_path_in_use_is_not_taken(void **state)
{
	struct rig *rig = *state;
	char address[128];
	int second;

	snprintf(address, sizeof address, "unix:%s/socket", rig->dir);
	listen_on(rig, address);
	second = link_listen(address, rig->why);
	assert_int_equal(second, -EADDRINUSE);
	close(rig->listener); /* what is left of it may be replaced */
	listen_on(rig, address);
}

/* ---- TLS ------------------------------------------------------------------------------------------- */

struct client {
	struct rig *rig;
	const struct link_keys *keys;
	char why[SNAPSHOT_WHY_BYTES];
	int r;
};

static void *connect_thread(void *arg)
{
	struct client *c = arg;

	c->r = link_connect(c->rig->address, c->keys, "latent.test", true, &c->rig->source, c->why);
	return NULL;
}

/* Returns what both sides say of it. */
static void shake_hands(struct rig *rig, const struct link_keys *client_keys, const struct link_keys *server_keys,
			int *ret_client, int *ret_server)
{
	struct client c = { .rig = rig, .keys = client_keys };
	pthread_t thread;
	struct pollfd p;

	listen_on(rig, "tcp:127.0.0.1:0");
	assert_int_equal(pthread_create(&thread, NULL, connect_thread, &c), 0);
	p = (struct pollfd){ rig->listener, POLLIN, 0 };
	assert_int_equal(poll(&p, 1, 5000), 1);
	*ret_server = link_accept(rig->listener, server_keys, false, &rig->destination, rig->why);
	pthread_join(thread, NULL);
	*ret_client = c.r;
}

static struct link_keys *load(struct rig *rig, bool server)
{
	struct link_keys *keys = NULL;

	if (link_keys_load(rig->dir, server, &keys, rig->why))
		fail_msg("%s", rig->why);
	return keys;
}

static void exchange(struct rig *rig)
{
	static uint8_t big[WIRE_STATE_MAX];
	struct wire_message m;

	memset(big, 0x5a, sizeof big);
	for (int i = 0; i < 3; i++)
		assert_int_equal(link_send(rig->source, WIRE_STATE, big, sizeof big, false), 0);
	for (int i = 0; i < 3; i++) {
		assert_int_equal(next_message(rig->source, rig->destination, &m, rig->why), 0);
		assert_int_equal(m.bytes, sizeof big);
		assert_memory_equal(m.payload, big, sizeof big);
	}
	assert_int_equal(link_send(rig->destination, WIRE_PASS, NULL, 0, false), 0);
	assert_int_equal(next_message(rig->destination, rig->source, &m, rig->why), 0);
}

static void test_a_key_that_both_have(void **state)
{
	struct rig *rig = *state;
	struct link_keys *client, *server;
	int at_client, at_server;

	put(rig, "keys.psk", "latent:00112233445566778899aabbccddeeff\n");
	client = load(rig, false);
	server = load(rig, true);
	shake_hands(rig, client, server, &at_client, &at_server);
	assert_int_equal(at_client, 0);
	assert_int_equal(at_server, 0);
	exchange(rig);
	link_close(rig->source);
	link_close(rig->destination);
	rig->source = rig->destination = NULL;
	link_keys_free(client);
	link_keys_free(server);
}

static void test_another_key_is_refused(void **state)
{
	struct rig *rig = *state;
	struct link_keys *client, *server;
	int at_client, at_server;

	put(rig, "keys.psk", "latent:00112233445566778899aabbccddeeff\n");
	client = load(rig, false);
	put(rig, "keys.psk", "latent:ffeeddccbbaa99887766554433221100\n");
	server = load(rig, true);
	shake_hands(rig, client, server, &at_client, &at_server);
	assert_int_equal(at_client, -EACCES);
	assert_int_equal(at_server, -EACCES);
	link_keys_free(client);
	link_keys_free(server);
}

/* A server that wants TLS is met by somebody who speaks plainly. */
static void test_plain_is_refused_where_keys_are_wanted(void **state)
{
	struct rig *rig = *state;
	struct link_keys *server;
	struct wire_hello hello = { .magic = WIRE_MAGIC, .version = WIRE_VERSION, .page_bytes = OS_PAGE_BYTES };

	put(rig, "keys.psk", "latent:00112233445566778899aabbccddeeff\n");
	server = load(rig, true);
	listen_on(rig, "tcp:127.0.0.1:0");
	assert_int_equal(link_connect(rig->address, NULL, NULL, true, &rig->source, rig->why), 0);
	assert_int_equal(link_send(rig->source, WIRE_HELLO, &hello, sizeof hello, false), 0);
	assert_int_equal(link_wait(rig->source, true, NULL, 0, 100, rig->why), 0);
	assert_int_equal(link_accept(rig->listener, server, false, &rig->destination, rig->why), -EACCES);
	link_keys_free(server);
}

static const char MAKE_CERTIFICATES[] =
	"cd %s && exec >/dev/null 2>&1\n"
	"authority() { openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout $1-key.pem"
	" -out $1-cert.pem -days 2 -subj /CN=$1; }\n"
	"sign() { openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout $1-key.pem -out $1.csr"
	" -subj /CN=$2 && echo subjectAltName=DNS:$2 >ext && openssl x509 -req -in $1.csr -CA $3-cert.pem"
	" -CAkey $3-key.pem -CAcreateserial -out $1-cert.pem -days 2 -extfile ext; }\n"
	"authority ca && authority other && sign server %s ca && sign client me %s";

static void make_certificates(struct rig *rig, const char *server_name, const char *client_authority)
{
	char command[2048];

	snprintf(command, sizeof command, MAKE_CERTIFICATES, rig->dir, server_name, client_authority);
	if (system(command))
		skip(); /* no openssl; the packages of the tests have it */
}

static void check_certificates(struct rig *rig, const char *server_name, const char *client_authority, bool good)
{
	struct link_keys *client, *server;
	struct wire_message m;
	int at_client, at_server;

	make_certificates(rig, server_name, client_authority);
	client = load(rig, false);
	server = load(rig, true);
	shake_hands(rig, client, server, &at_client, &at_server);
	if (good) {
		assert_int_equal(at_client, 0);
		assert_int_equal(at_server, 0);
		exchange(rig);
	} else {
		assert_true(at_server == -EACCES || at_client == -EACCES);
		/* In TLS 1.3 a client learns that it was refused when it receives. */
		assert_true(at_client || next_message(rig->source, rig->source, &m, rig->why) < 0);
		assert_null(rig->destination && at_client == 0 ? rig->destination : NULL);
	}
	link_close(rig->source);
	link_close(rig->destination);
	rig->source = rig->destination = NULL;
	link_keys_free(client);
	link_keys_free(server);
}

static void test_certificates_prove_both_sides(void **state)
{
	check_certificates(*state, "latent.test", "ca", true);
}

static void test_a_server_of_another_name_is_refused(void **state)
{
	check_certificates(*state, "evil.test", "ca", false);
}

static void test_a_client_of_another_authority_is_refused(void **state)
{
	check_certificates(*state, "latent.test", "other", false);
}

static void test_missing_keys_are_named(void **state)
{
	struct rig *rig = *state;
	struct link_keys *keys;

	assert_int_equal(link_keys_load(rig->dir, true, &keys, rig->why), -EACCES);
	assert_non_null(strstr(rig->why, "ca-cert.pem"));
	put(rig, "keys.psk", "");
	assert_int_equal(link_keys_load(rig->dir, false, &keys, rig->why), -EACCES);
	assert_non_null(strstr(rig->why, "keys.psk"));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_messages_arrive_whole_and_in_order, setup, teardown),
		cmocka_unit_test_setup_teardown(test_room_is_bounded_and_urgent_goes_first, setup, teardown),
		cmocka_unit_test_setup_teardown(test_who_only_waits_hears_the_peer, setup, teardown),
		cmocka_unit_test_setup_teardown(test_waiting_takes_its_time_beside_a_message, setup, teardown),
		cmocka_unit_test_setup_teardown(test_a_silent_peer_is_given_up, setup, teardown),
		cmocka_unit_test_setup_teardown(test_wrong_bytes_end_it_before_they_are_received, setup, teardown),
		cmocka_unit_test_setup_teardown(test_a_message_that_was_spoilt_is_no_message, setup, teardown),
		cmocka_unit_test_setup_teardown(test_an_end_is_seen, setup, teardown),
		cmocka_unit_test_setup_teardown(test_wrong_addresses_are_refused, setup, teardown),
		cmocka_unit_test_setup_teardown(test_a_path_in_use_is_not_taken, setup, teardown),
		cmocka_unit_test_setup_teardown(test_a_key_that_both_have, setup, teardown),
		cmocka_unit_test_setup_teardown(test_another_key_is_refused, setup, teardown),
		cmocka_unit_test_setup_teardown(test_plain_is_refused_where_keys_are_wanted, setup, teardown),
		cmocka_unit_test_setup_teardown(test_certificates_prove_both_sides, setup, teardown),
		cmocka_unit_test_setup_teardown(test_a_server_of_another_name_is_refused, setup, teardown),
		cmocka_unit_test_setup_teardown(test_a_client_of_another_authority_is_refused, setup, teardown),
		cmocka_unit_test_setup_teardown(test_missing_keys_are_named, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
