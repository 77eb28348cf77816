#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""A migration whose link is cut, or whose movers are killed, after the guest was given away: it goes on, in the same
processes or in others, and the guest has its memory."""

import threading
import time

from lib import case, latent
from lib.link_cut import Relay
from lib.migration import HELD_MIB, MEM, Pair, begin, check, end, runs, still_lives

FEW_FILES = "/usr/lib/python3.11/"
CHURN_PAGES_PER_S = 5000


def start_move(here, there, directory, *options):
    """By post-copy, slow enough to be cut while pages are missing."""
    receiver = there.receive(f"unix:{directory}/far")
    sender = latent.start("migrate", "--max-rate", "16", "--max-downtime", "0", *options, here.name, f"unix:{directory}/socket")
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


def touch_everything(guest):
    """QEMU's main loop touches all of guest RAM, as a device may, and waits for what is missing: it answers nobody meanwhile."""
    bytes_all = int(MEM[:-1]) << 20
    thread = threading.Thread(target=lambda: guest.qmp("pmemsave", timeout_s=120, val=0, size=bytes_all, filename="/dev/null"))
    thread.start()
    return thread


def both_end(test, sender, receiver, what):
    said, why = sender.communicate(timeout=120)
    test.check_equal((sender.returncode, why), (0, ""), f"{what}: the source has ended well")
    receiver.communicate(timeout=60)
    test.check_equal(receiver.returncode, 0, f"{what}: the destination has all")


def after_the_switch(test, here, there, nonce, directory, what, disturb):
    """`disturb(here, there, directory, sender, receiver)` returns who does the work then."""
    relay = Relay(directory / "socket", directory / "far")
    sender, receiver = start_move(here, there, directory)
    wait_runs(test, there)
    relay.cut()
    test.check(here.qmp("query-status")["status"] == "postmigrate", f"{what}: the source stands, with its pages")
    touching = touch_everything(there)
    sender, receiver = disturb(here, there, directory, sender, receiver)
    left = latent.stat(there)["pages_masked_now"]
    test.check(left > 0, f"{what}: {left} pages are missing")
    relay.mend()
    both_end(test, sender, receiver, what)
    touching.join()
    test.check(runs(there) and not [event for event in there.monitor.events if event["event"] == "STOP"],
               f"{what}: the guest was not stopped meanwhile")
    test.check(not still_lives(here), f"{what}: the source's QEMU has ended")
    here._forget()
    check(test, there, nonce, what, FEW_FILES)
    relay.close()
    test.check_equal(list(here.disk.parent.glob("*.latent-*")), [], f"{what}: no ballot is left")


def just_the_link(here, there, directory, sender, receiver):
    time.sleep(1)
    return sender, receiver


def source_killed(here, there, directory, sender, receiver):
    sender.kill()
    sender.wait()
    return latent.start("migrate", "--resume", here.name, f"unix:{directory}/socket"), receiver


def destination_killed(here, there, directory, sender, receiver):
    receiver.kill()
    receiver.wait()
    other = latent.start("receive", "--listen", f"unix:{directory}/far", "--resume", there.name)
    return sender, other


def body(test):
    test.need_latent()
    latent.private_run_dir()
    with Pair("cut") as pair:
        nonce = begin(test, pair.first, FEW_FILES)
        pair.first.sh_start(f"latent-guest mem churn m 0 {HELD_MIB * 256} 600 {CHURN_PAGES_PER_S}")
        here, there = pair.first, pair.second
        for what, disturb in (("source's mover killed", source_killed), ("destination's mover killed", destination_killed),
                              ("link cut", just_the_link)):
            after_the_switch(test, here, there, nonce, pair.directory, what, disturb)
            here, there = there, here
        end(test, here)
    test.check_equal(latent.vm_dirs(), [], "no run-time directory is left")


case.main("A migration goes on after a cut, with every page.", body, timeout_s=800)
