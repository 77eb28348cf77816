# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Guests that are moved: two places for one guest, a move that both sides tell of, and its contents checked.

    with migration.Pair("move") as pair:
        migration.begin(test, pair.first)
        migration.move(test, pair.first, pair.second, pair.socket())
"""

import json
import subprocess
import tempfile
import time
from pathlib import Path

from . import latent
from .vm import VM

EVERYTHING = ["--min-run", "1", "--share-threshold", "0"]
FILES = "/usr/lib/"
SOME_FILES = "/usr/lib/python3.11/"
HELD_MIB = 64
MEM = "512M"
COUNT = "i=0; while :; do i=$((i+1)); echo $i > /run/count; sleep 0.05; done"
NO_ANSWER, USAGE = latent.NO_ANSWER, latent.USAGE


class Pair:
    """Two places for one guest, which share its disk."""

    def __init__(self, name, options=EVERYTHING):
        self.first = VM(f"{name}1", latent=options, mem=MEM)
        self.second = VM(f"{name}2", latent=options, mem=MEM, start=False)
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
    return latent.command("migrate", "--json", *options, guest.name, address, timeout_s=timeout_s, before=guest.before)


def still_lives(guest, timeout_s=10):
    """Whether it lives after so long."""
    deadline_s = time.monotonic() + timeout_s
    while guest.alive() and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return guest.alive()


def end(test, guest):
    """A guest that was moved is no child of ours: QEMU is asked to end, and cleans up."""
    guest.qmp("quit")
    test.check(not still_lives(guest), f"{guest.name} ends")
    guest._forget()


def runs(guest):
    return guest.qmp("query-status")["status"] == "running"


def move(test, here, there, address, *options, receive=()):
    """Returns what both sides say."""
    receiver = there.receive(address, *receive)
    answer = migrate(here, address, *options)
    received, _ = receiver.communicate(timeout=60)
    test.check_equal((answer.returncode, answer.stderr), (0, ""), f"{here.name} is moved")
    test.check_equal(receiver.returncode, 0, f"{there.name} has it")
    test.check(not still_lives(here), "and its QEMU has ended here")
    here._forget()
    sent, got = json.loads(answer.stdout), json.loads(received.splitlines()[-1])
    test.say(f"stood {sent['downtime_us'] / 1000:.1f} ms, {sent['bytes_sent'] >> 20} MiB sent in {sent['total_us'] / 1e6:.2f} s and "
             f"{sent['passes']} passes; words {sent['pages_words']}, on images {sent['pages_on_volumes']}, contents "
             f"{sent['pages_sent']}; missing at the switch {sent['pages_missing']}, waited for {sent['pages_wanted']}")
    test.check_equal(got["pages_missing"], sent["pages_missing"], "both sides have counted the same pages as missing")
    test.check_equal([vm["name"] for vm in json.loads(latent.run("ps", "--json"))], [there.name], "one VM is left")
    return sent, got


def begin(test, guest, files=FILES):
    """`files`: read twice; the second time they are mapped."""
    latent.check_hashes(test, guest, files)
    guest.drop_guest_caches()
    latent.check_hashes(test, guest, files)
    guest.sh(f"latent-guest mem hold m {HELD_MIB} 13 random", timeout=60)
    guest.sh("head -c 16 /dev/urandom | sha256sum > /run/nonce")
    guest.sh_start(COUNT)
    return guest.sh("cat /run/nonce")


def check(test, guest, nonce, what, files=FILES):
    """Contents that are nowhere else, a process that goes on, files in its cache and from the disk, and new ones."""
    test.check_equal(guest.sh("cat /run/nonce"), nonce, f"{what}: its nonce, which is in RAM alone")
    test.check(guest.sh("latent-guest mem check m", timeout=60).startswith("ok"), f"{what}: its memory is right")
    before = int(guest.sh("cat /run/count"))
    time.sleep(0.5)
    test.check(int(guest.sh("cat /run/count")) > before, f"{what}: it counts on from {before}")
    latent.check_hashes(test, guest, files, what=f"{what}: in its cache")
    guest.drop_guest_caches()
    latent.check_hashes(test, guest, SOME_FILES, what=f"{what}: from the disk")
    guest.sh(f"head -c 3000000 /dev/urandom > /root/new; sync; sha256sum /root/new > /run/new.sum; "
             f"echo 3 > /proc/sys/vm/drop_caches; sha256sum -c --quiet /run/new.sum")
