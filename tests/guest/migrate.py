#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""`latent migrate` and `latent receive`: a guest that writes and reads files is moved, and back, and proves itself; and
whatever ends a migration before the switch leaves it where it was."""

import json
import subprocess
import tempfile
import time
from pathlib import Path

from lib import case, latent
from lib.vm import VM

EVERYTHING = ["--min-run", "1", "--share-threshold", "0"]
FILES = "/usr/lib/"
SOME_FILES = "/usr/lib/python3.11/"
HELD_MIB = 64
MEM = "512M"
CHURN_PAGES_PER_S = 5000
COUNT = "i=0; while :; do i=$((i+1)); echo $i > /run/count; sleep 0.05; done"
NO_ANSWER, USAGE = 75, 64
SLOW = ["--max-rate", "5"]
PAGE_BYTES = 4096


class Pair:
    """Two places for one guest, which share its disk."""

    def __init__(self, name):
        self.first = VM(f"{name}1", latent=EVERYTHING, mem=MEM)
        self.second = VM(f"{name}2", latent=EVERYTHING, mem=MEM, start=False)
        self.second.disk = self.first.disk
        self.directory = Path(tempfile.mkdtemp(prefix="latent-migrate-"))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for guest in (self.second, self.first):
            guest.__exit__(*error)
        subprocess.run(["rm", "-rf", self.directory], check=False)

    def socket(self):
        return f"unix:{self.directory}/socket"


def migrate(guest, address, *options, timeout_s=120):
    return latent.command("migrate", "--json", *options, guest.name, address, timeout_s=timeout_s)


def still_waits(guest, timeout_s=10):
    deadline_s = time.monotonic() + timeout_s
    while guest.alive() and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return guest.alive()


def move(test, here, there, address, *options, receive=()):
    """Returns what both sides say."""
    receiver = there.receive(address, *receive)
    answer = migrate(here, address, *options)
    received, _ = receiver.communicate(timeout=60)
    test.check_equal((answer.returncode, answer.stderr), (0, ""), f"{here.name} is moved")
    test.check_equal(receiver.returncode, 0, f"{there.name} has it")
    test.check(not still_waits(here), "and its QEMU has ended here")
    here._forget()
    sent, got = json.loads(answer.stdout), json.loads(received.splitlines()[-1])
    test.say(f"stood {sent['downtime_us'] / 1000:.1f} ms, {sent['bytes_sent'] >> 20} MiB sent in {sent['total_us'] / 1e6:.2f} s and "
             f"{sent['passes']} passes; words {sent['pages_words']}, on images {sent['pages_on_volumes']}, contents "
             f"{sent['pages_sent']}; missing at the switch {sent['pages_missing']}, waited for {sent['pages_wanted']}")
    test.check_equal(got["pages_missing"], sent["pages_missing"], "both sides have counted the same pages as missing")
    test.check_equal([vm["name"] for vm in json.loads(latent.run("ps", "--json"))], [there.name], "one VM is left")
    return sent, got


def begin(test, guest):
    latent.check_hashes(test, guest, FILES)
    guest.drop_guest_caches()
    latent.check_hashes(test, guest, FILES)
    guest.sh(f"latent-guest mem hold m {HELD_MIB} 13 random", timeout=60)
    guest.sh("head -c 16 /dev/urandom | sha256sum > /run/nonce")
    guest.sh_start(COUNT)
    return guest.sh("cat /run/nonce")


def check(test, guest, nonce, what):
    """Contents that are nowhere else, a process that goes on, files in its cache and from the disk, and new ones."""
    test.check_equal(guest.sh("cat /run/nonce"), nonce, f"{what}: its nonce, which is in RAM alone")
    test.check(guest.sh("latent-guest mem check m", timeout=60).startswith("ok"), f"{what}: its memory is right")
    before = int(guest.sh("cat /run/count"))
    time.sleep(0.5)
    test.check(int(guest.sh("cat /run/count")) > before, f"{what}: it counts on from {before}")
    latent.check_hashes(test, guest, FILES, what=f"{what}: in its cache")
    guest.drop_guest_caches()
    latent.check_hashes(test, guest, SOME_FILES, what=f"{what}: from the disk")
    guest.sh(f"head -c 3000000 /dev/urandom > /root/new; sync; sha256sum /root/new > /run/new.sum; "
             f"echo 3 > /proc/sys/vm/drop_caches; sha256sum -c --quiet /run/new.sum")


def there_and_back(test):
    with Pair("move") as pair:
        nonce = begin(test, pair.first)
        pair.first.sh_start(f"latent-guest mem churn m 0 {HELD_MIB * 64} 600 {CHURN_PAGES_PER_S}")
        before = latent.stat(pair.first)["pages_overlay_now"]
        sent, got = move(test, pair.first, pair.second, pair.socket())
        test.check(sent["pages_on_volumes"] > before // 2 > 1000, f"of {before} pages on images {sent['pages_on_volumes']} were "
                   "told as places")
        stat = latent.stat(pair.second)
        test.check(stat["pages_overlay_now"] > before // 2, f"{stat['pages_overlay_now']} pages are mapped there")
        check(test, pair.second, nonce, "moved")
        sent, got = move(test, pair.second, pair.first, pair.socket(), "--max-downtime", "0")
        test.check(got["pages_missing"] > 0, "the guest ran before all was there")
        check(test, pair.first, nonce, "back, by post-copy")
        sent, got = move(test, pair.first, pair.second, pair.socket(), "--no-postcopy")
        test.check_equal(got["pages_missing"], 0, "all was sent before")
        check(test, pair.second, nonce, "there again, by pre-copy")
        pair.second.sh_start("latent-guest poweroff")
        deadline_s = time.monotonic() + 30
        while pair.second.alive() and time.monotonic() < deadline_s:
            time.sleep(0.1)
        test.check(not pair.second.alive(), "it powers off")


def broken_off(test):
    """The link is slow enough for everything to happen in the passes."""
    with Pair("cut") as pair:
        nonce = begin(test, pair.first)
        for what, victim in (("the source's mover", 0), ("the destination's mover", 1)):
            receiver = pair.second.receive(pair.socket())
            sender = latent.popen("migrate", *SLOW, pair.first.name, pair.socket())
            time.sleep(3)
            test.check_equal((sender.poll(), receiver.poll()), (None, None), "both are at work")
            (sender, receiver)[victim].kill()
            test.check((receiver, sender)[victim].wait(30) == NO_ANSWER, f"{what} is killed: the other one ends")
            (sender, receiver)[victim].wait(10)
            test.check(not still_waits(pair.second), "and nothing waits there any more")
            pair.second._forget()
            test.check_equal(pair.first.qmp("query-status")["status"], "running", f"{what} is killed: the guest runs on here")
            check(test, pair.first, nonce, f"{what} was killed")
        sender = latent.popen("migrate", pair.first.name, "tcp:127.0.0.1:1", "--plain")
        test.check_equal(sender.wait(30), NO_ANSWER, "nobody listens: refused")
        move(test, pair.first, pair.second, pair.socket())
        check(test, pair.second, nonce, "moved after all")
        pair.second.kill9()


def refusals(test):
    with Pair("no") as pair:
        pair.first.wait_ready()
        pair.second.mem = "256M"
        receiver = pair.second.receive(pair.socket())
        answer = migrate(pair.first, pair.socket())
        test.check(answer.returncode == NO_ANSWER and "the same machine and -m" in answer.stderr, answer.stderr.strip())
        test.check_equal(receiver.wait(20), NO_ANSWER, "the other side ends, too")
        pair.second._forget()
        test.check_equal(pair.first.qmp("query-status")["status"], "running", "the guest runs on")
        test.check_equal(migrate(pair.first, "tcp:127.0.0.1:1").returncode, USAGE, "TCP without a word about keys")
        pair.first.shutdown()


def with_keys(test):
    with Pair("keys") as pair:
        pair.first.wait_ready()
        (pair.directory / "keys.psk").write_text("latent:00112233445566778899aabbccddeeff\n")
        other = pair.directory / "other"
        other.mkdir()
        (other / "keys.psk").write_text("latent:ffeeddccbbaa99887766554433221100\n")
        address = "tcp:127.0.0.1:14848"
        receiver = pair.second.receive(address, "--tls", pair.directory)
        answer = migrate(pair.first, address, "--tls", other)
        test.check_equal(answer.returncode, NO_ANSWER, f"another key is refused: {answer.stderr.strip()}")
        receiver.wait(20)
        pair.second._forget()
        move(test, pair.first, pair.second, address, "--tls", pair.directory, receive=["--tls", pair.directory])
        latent.check_hashes(test, pair.second, SOME_FILES, what="moved over TLS")
        pair.second.kill9()


def body(test):
    test.need_latent()
    latent.private_run_dir()
    there_and_back(test)
    broken_off(test)
    refusals(test)
    with_keys(test)
    test.check_equal(latent.vm_dirs(), [], "no run-time directory is left")


case.main("A guest is moved and proves its contents; what goes wrong before the switch leaves it where it was.", body,
          timeout_s=400)
