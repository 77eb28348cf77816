#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""What ends a migration before the switch, and leaves the guest where it was: a mover that is killed on either side, another
machine, another image, another disk, other keys, and peers that lie or say nothing."""

import shutil
import socket
import struct
import subprocess
import time
import zlib

from lib import case, latent
from lib.migration import NO_ANSWER, SOME_FILES, USAGE, Pair, begin, check, end, migrate, move, runs, still_lives

SLOW = ["--max-rate", "5"]
SILENT_S = 10  # src/migrate/link.h, LINK_SILENT_MS
HEADER = struct.Struct("<IIII")  # docs/migration.md
HELLO = struct.Struct("<QII16sII")
MAGIC = 0x54415247494d544c
HAVE_MOST, MANY = 65536, 4  # more than the guest has pages
HELLO_TYPE, READY, WANT, OWED, HAVE, LACK, STALE = 0, 4, 13, 17, 18, 20, 22


def broken_off(test):
    """The link is slow enough for everything to happen in the passes."""
    with Pair("cut") as pair:
        nonce = begin(test, pair.first, SOME_FILES)
        for what, victim in (("the source's mover", 0), ("the destination's mover", 1)):
            receiver = pair.second.receive(pair.socket())
            sender = latent.popen("migrate", *SLOW, pair.first.name, pair.socket())
            time.sleep(3)
            test.check_equal((sender.poll(), receiver.poll()), (None, None), "both are at work")
            (sender, receiver)[victim].kill()
            test.check((receiver, sender)[victim].wait(30) == NO_ANSWER, f"{what} is killed: the other one ends")
            (sender, receiver)[victim].wait(10)
            test.check(not still_lives(pair.second), "and nothing waits there any more")
            pair.second._forget()
            test.check_equal(runs(pair.first), True, f"{what} is killed: the guest runs on here")
            check(test, pair.first, nonce, f"{what} was killed", SOME_FILES)
        sender = latent.popen("migrate", pair.first.name, "tcp:127.0.0.1:1", "--plain")
        test.check_equal(sender.wait(30), NO_ANSWER, "nobody listens: refused")
        move(test, pair.first, pair.second, pair.socket())
        check(test, pair.second, nonce, "moved after all", SOME_FILES)
        end(test, pair.second)


def refused(test, guest, answer, words, what):
    test.check(answer.returncode == NO_ANSWER and words in answer.stderr, f"{what}: {answer.stderr.strip()}")
    test.check(runs(guest), f"{what}: the guest runs on")
    test.check_equal(list(guest.disk.parent.glob("*.latent-*")), [], f"{what}: no ballot is left")


def refused_by_destination(test, pair, words, what, *receive):
    receiver = pair.second.receive(pair.socket(), *receive)
    refused(test, pair.first, migrate(pair.first, pair.socket()), words, what)
    test.check_equal(receiver.wait(20), NO_ANSWER, f"{what}: the other side ends, too")
    pair.second._forget()


def another_image(pair):
    """A copy of the guest's image in which one byte differs."""
    image = pair.directory / "image.qcow2"
    subprocess.run(["cp", "--sparse=always", pair.first.image, image], check=True)
    with open(image, "r+b") as file:
        file.seek(image.stat().st_size // 2 + 123)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    return image


def refusals(test):
    with Pair("no") as pair:
        pair.first.wait_ready()
        pair.second.mem = "256M"
        refused_by_destination(test, pair, "the same machine and -m", "less RAM")
        pair.second.mem = pair.first.mem
        refused_by_destination(test, pair, "here that has other contents", "an image that differs by a bit",
                               "--volume", f"{pair.first.image.resolve()}={another_image(pair)}")
        other_disk = pair.directory / "disk.qcow2"
        shutil.copy(pair.first.disk, other_disk)
        refused_by_destination(test, pair, "not on storage that both hosts share", "a copy of the disk",
                               "--volume", f"{pair.first.disk}={other_disk}")
        test.check_equal(migrate(pair.first, "tcp:127.0.0.1:1").returncode, USAGE, "TCP without a word about keys")
        for what, words, say in LIES:
            refused(test, pair.first, with_peer(pair, say), words, what)
        before_s = time.monotonic()
        refused(test, pair.first, with_peer(pair, lambda peer: peer.recv(1)), "nothing for", "a peer that says nothing")
        test.check(time.monotonic() - before_s >= SILENT_S, "it was waited for")
        pair.first.shutdown()


# ---- a peer that lies ----

def receive(peer):
    header = read(peer, HEADER.size)
    kind, n_bytes, _, _ = HEADER.unpack(header)
    return kind, read(peer, n_bytes)


def read(peer, n_bytes):
    data = b""
    while len(data) < n_bytes:
        more = peer.recv(n_bytes - len(data))
        if not more:
            raise OSError("the source has ended the connection")
        data += more
    return data


def send(peer, kind, payload=b"", n_bytes=None):
    checksum = zlib.crc32(struct.pack("<II", kind, len(payload)) + payload)
    peer.sendall(HEADER.pack(kind, len(payload) if n_bytes is None else n_bytes, checksum, 0) + payload)


def greet(peer, version=3, page_bytes=4096, session=None):
    _, hello = receive(peer)
    send(peer, HELLO_TYPE, HELLO.pack(MAGIC, version, page_bytes, session or HELLO.unpack(hello)[3], 0, 0))


def greet_and_say(kind, payload=b"", n_bytes=None):
    def say(peer):
        greet(peer)
        send(peer, kind, payload, n_bytes)
    return say


def get_ready_and_say(kind, payload):
    def say(peer):
        greet_and_say(READY, bytes(16))(peer)
        send(peer, kind, payload)
    return say


def greet_and_flood(peer):
    greet(peer)
    for _ in range(MANY):
        send(peer, HAVE, bytes(8 * HAVE_MOST))


LIES = (
    ("another version", "speaks version 7", lambda peer: greet(peer, version=7)),
    ("other pages", "pages have 16384 bytes", lambda peer: greet(peer, page_bytes=16384)),
    ("another session", "takes us for another one", lambda peer: greet(peer, session=b"x" * 16)),
    ("no hello", "is no Latent", lambda peer: send(peer, HELLO_TYPE, bytes(HELLO.size))),
    ("no known type", "of no known type", greet_and_say(99)),
    ("a source's message", "which is ours to send", greet_and_say(2, b"{}")),
    ("a message without end", "bytes, and not", greet_and_say(READY, b"", 0xffffffff)),
    ("pages before there are any", "something else than it should", greet_and_say(WANT, struct.pack("<Q", 1 << 60))),
    ("pages that it lacks before there are any", "something else than it should", greet_and_say(LACK, struct.pack("<Q", 1))),
    ("pages that it lacks, of none", "not found more pages than it was to look for", get_ready_and_say(LACK, struct.pack("<Q", 1))),
    ("stale pages, of none", "not found more pages than it was to look for",
     get_ready_and_say(STALE, struct.pack("<Q", 1))),
    ("a stale page beyond RAM", "beyond RAM", get_ready_and_say(STALE, struct.pack("<Q", 1 << 60))),
    ("stale pages before there are any", "something else than it should", greet_and_say(STALE, struct.pack("<Q", 1))),
    ("more digests than there are pages", "has more pages than the VM", greet_and_flood),
    ("a debt before there is one", "something else than it should", greet_and_say(OWED, struct.pack("<QQ", 0, 1 << 63))),
)


def with_peer(pair, say):
    """`say` is what it says to the source; then it listens until the source ends."""
    path = pair.directory / "liar"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)
        sender = latent.start("migrate", "--json", pair.first.name, f"unix:{path}")
        peer, _ = listener.accept()
        with peer:
            try:
                say(peer)
                while peer.recv(1 << 16):
                    pass
            except OSError:
                pass
            stdout, stderr = sender.communicate(timeout=60)
    return subprocess.CompletedProcess(sender.args, sender.returncode, stdout, stderr)


# ---- keys ----

def free_address():
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as free:
        free.bind(("127.0.0.1", 0))
        return f"tcp:127.0.0.1:{free.getsockname()[1]}"


def openssl(directory, *words):
    subprocess.run(["openssl", *map(str, words)], cwd=directory, check=True, capture_output=True)


def certificates(directory):
    """An authority, and what it says of the two sides; called as QEMU calls them."""
    directory.mkdir()
    openssl(directory, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=authority",
            "-days", "2", "-keyout", "ca-key.pem", "-out", "ca-cert.pem")
    for side in ("server", "client"):
        (directory / "extensions").write_text("subjectAltName=IP:127.0.0.1\n")
        openssl(directory, "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={side}",
                "-keyout", f"{side}-key.pem", "-out", "request")
        openssl(directory, "x509", "-req", "-in", "request", "-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial",
                "-days", "2", "-extfile", "extensions", "-out", f"{side}-cert.pem")
    return directory


def key(directory, digits):
    directory.mkdir()
    (directory / "keys.psk").write_text(f"latent:{digits}\n")
    return directory


def with_keys(test):
    with Pair("keys") as pair:
        pair.first.wait_ready()
        address = free_address()
        ours, others = (key(pair.directory / name, digit * 32) for name, digit in (("psk", "a"), ("other-psk", "b")))
        x509, other_x509 = (certificates(pair.directory / name) for name in ("x509", "other-x509"))
        for what, here, there in (("another key", ours, others), ("another authority", x509, other_x509),
                                  ("a key for a certificate", ours, x509)):
            receiver = pair.second.receive(address, "--tls", there)
            refused(test, pair.first, migrate(pair.first, address, "--tls", here), "not moved", what)
            receiver.wait(30)
            pair.second._forget()
        receiver = pair.second.receive(address, "--tls", x509)
        refused(test, pair.first, migrate(pair.first, address, "--tls", x509, "--host", "elsewhere.example"), "not moved",
                "a certificate for another host")
        receiver.wait(30)
        pair.second._forget()
        move(test, pair.first, pair.second, address, "--tls", ours, receive=["--tls", ours])
        move(test, pair.second, pair.first, address, "--tls", x509, receive=["--tls", x509])
        latent.check_hashes(test, pair.first, SOME_FILES, what="moved over TLS, by a key and by certificates")
        end(test, pair.first)


def body(test):
    test.need_latent()
    latent.private_run_dir()
    refusals(test)
    with_keys(test)
    broken_off(test)
    test.check_equal(latent.vm_dirs(), [], "no run-time directory is left")


case.main("What goes wrong before the switch leaves a guest where it was.", body, timeout_s=800)
