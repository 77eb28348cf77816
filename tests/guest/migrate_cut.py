#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""A migration whose link is cut, or whose movers are killed, after the guest was given away: it goes on, in the same
processes or in others, and the guest has its memory."""

import time

from lib import case, latent
from lib.link_cut import Relay
from lib.migration import HELD_MIB, Pair, begin, check, end, runs, still_lives

FEW_FILES = "/usr/lib/python3.11/"
CHURN_PAGES_PER_S = 5000


def start_move(pair, *options):
    """By post-copy, slow enough to be cut while pages are missing."""
    receiver = pair.second.receive(f"unix:{pair.directory}/far")
    sender = latent.start("migrate", "--max-rate", "8", "--max-downtime", "0", *options, pair.first.name, pair.socket())
    return sender, receiver


def wait_runs(test, guest, timeout_s=90):
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        try:
            if runs(guest):
                return
        except Exception:  # its monitor is not there yet
            guest._forget_connections()
        time.sleep(0.1)
    test.check(False, f"{guest.name} runs within {timeout_s} s")


def both_end(test, sender, receiver, what):
    said, why = sender.communicate(timeout=120)
    test.check_equal((sender.returncode, why), (0, ""), f"{what}: the source has ended well")
    receiver.communicate(timeout=60)
    test.check_equal(receiver.returncode, 0, f"{what}: the destination has all")


def after_the_switch(test, what, disturb):
    """`disturb(pair, relay, sender, receiver)` returns who does the work then."""
    with Pair("cut") as pair:
        relay = Relay(pair.directory / "socket", pair.directory / "far")
        nonce = begin(test, pair.first, FEW_FILES)
        pair.first.sh_start(f"latent-guest mem churn m 0 {HELD_MIB * 256} 600 {CHURN_PAGES_PER_S}")
        sender, receiver = start_move(pair)
        wait_runs(test, pair.second)
        relay.cut()
        test.check(pair.first.qmp("query-status")["status"] == "postmigrate", f"{what}: the source stands, with its pages")
        sender, receiver = disturb(pair, sender, receiver)
        left = latent.stat(pair.second)["pages_masked_now"]
        test.check(left > 0 and runs(pair.second), f"{what}: {left} pages are missing, and the guest is not stopped")
        relay.mend()
        both_end(test, sender, receiver, what)
        test.check(not still_lives(pair.first), f"{what}: the source's QEMU has ended")
        pair.first._forget()
        check(test, pair.second, nonce, what, FEW_FILES)
        end(test, pair.second)
        relay.close()
        test.check_equal(list(pair.first.disk.parent.glob("*.latent-*")), [], f"{what}: no ballot is left")


def just_the_link(pair, sender, receiver):
    time.sleep(1)
    return sender, receiver


def source_killed(pair, sender, receiver):
    sender.kill()
    sender.wait()
    return latent.start("migrate", "--resume", pair.first.name, pair.socket()), receiver


def destination_killed(pair, sender, receiver):
    receiver.kill()
    receiver.wait()
    other = latent.start("receive", "--listen", f"unix:{pair.directory}/far", "--resume", pair.second.name)
    return sender, other


def body(test):
    test.need_latent()
    latent.private_run_dir()
    for what, disturb in (("source's mover killed", source_killed), ("destination's mover killed", destination_killed),
                          ("link cut", just_the_link)):
        after_the_switch(test, what, disturb)
    test.check_equal(latent.vm_dirs(), [], "no run-time directory is left")


case.main("A migration goes on after a cut, with every page.", body, timeout_s=800)
