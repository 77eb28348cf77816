#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""A short round of save and restore: a guest that writes is saved, goes on, and is restored; so is what was restored.

Short enough for a nested machine, where suite `kvm` runs it on real KVM and an older kernel.
"""

import json
import shutil
import tempfile
import time
from pathlib import Path

from lib import case, latent
from lib.vm import VM, GuestError

EVERYTHING = ["--min-run", "1", "--share-threshold", "0"]
HELD_MIB = 16
CHURN_PAGES_PER_S = 500
TOUCHED_PAGES = 400
WATCHED_US = 950000
PART = "/usr/lib/python3.11/json/"
READY_S, SAVE_S = 240, 180
COUNT = "i=0; while :; do i=$((i+1)); echo $i > /run/count; sleep 0.05; done"


def save(test, guest, snapshot):
    answer = latent.command("save", "--json", "--live", guest.name, snapshot, timeout_s=SAVE_S)
    test.check_equal((answer.returncode, answer.stderr), (0, ""), f"{guest.name} is saved")
    figures = json.loads(answer.stdout)
    test.say(f"the guest stood {figures['pause_us'] / 1000:.1f} ms (RAM {figures['point_us'] / 1000:.1f}), "
             f"{figures['faults']} write faults, {figures['private_pages']} copies, {figures['pages_stored']} pages stored, "
             f"{figures['pages_on_volumes']} on images, {figures['active_pages']} in use")
    test.check(figures["active_pages"] >= TOUCHED_PAGES, "what it reads over and over was seen in use")
    # Of a restored VM there is little to write, and yet its timers of a second shall have been seen.
    test.check(figures["write_us"] >= WATCHED_US, f"it was watched on after the pause: {figures['write_us'] / 1e6:.2f} s")


def restore(test, guest, snapshot, nonce, what):
    """Restores and checks it. Where the emulator may reset a processor it is tried twice: wrong contents of a snapshot
    would be there the second time, too."""
    for attempt in (1, 2):
        guest.restore(snapshot)
        guest.wait_ready(READY_S)
        try:
            return check(test, guest, nonce, what)
        except GuestError:
            if attempt == 2 or not guest.was_reset():
                raise
        print(f"NOTE: {guest.name}: the guest's processor was reset under emulated SVM; restored once more", flush=True)
    return None


def check(test, guest, nonce, what):
    """Contents that are nowhere else, a process that goes on, files of the image."""
    test.check_equal(guest.sh("cat /run/nonce"), nonce, f"{what}: its nonce, which is in RAM alone")
    test.check(guest.sh("latent-guest mem check m", timeout=READY_S).startswith("ok"), f"{what}: its memory is right")
    before = int(guest.sh("cat /run/count"))
    time.sleep(1)
    after = int(guest.sh("cat /run/count"))
    test.check(after > before, f"{what}: it counts on, {before} to {after}")
    latent.check_hashes(test, guest, PART, what=f"{what}: as the image has them")
    return after


def begin(guest):
    guest.wait_ready(READY_S)
    guest.sh(f"latent-guest hash -r {PART}")
    guest.sh(f"latent-guest mem hold m {HELD_MIB} 13 random", timeout=READY_S)
    guest.sh("head -c 16 /dev/urandom | sha256sum > /run/nonce")
    guest.sh_start(COUNT)
    guest.sh_start(f"latent-guest mem touch m 0 {TOUCHED_PAGES} 1000000 20 r")
    return guest.sh("cat /run/nonce")


def body(test):
    test.need_latent()
    latent.private_run_dir()
    # On the file system of the VMs' disks: these become part of the snapshots.
    directory = Path(tempfile.mkdtemp(prefix="latent-snapshots-"))
    try:
        with VM("first", latent=EVERYTHING, mem="512M") as first, VM("second", mem="512M", latent=EVERYTHING,
                                                                     start=False) as second:
            nonce = begin(first)
            load = first.sh_start(f"latent-guest mem churn m 0 {HELD_MIB * 256} 600 {CHURN_PAGES_PER_S}")
            save(test, first, directory / "one")
            test.check(load.status is None, "it wrote all the time")
            saved = int(first.sh("cat /run/count"))
            counted = restore(test, second, directory / "one", nonce, "restored beside the one that was saved")
            load.kill()
            test.check(check(test, first, nonce, "the one that was saved") > saved, "it went on")
            first.kill9()
            save(test, second, directory / "two")
            check(test, second, nonce, "restored, and saved")
            second.kill9()
            test.check(restore(test, second, directory / "two", nonce, "restored from a save of a restored VM") > counted,
                       f"of the second save, when it had counted to {counted}, and not of the first")
            second.shutdown()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


case.main("A VM is saved and restored, twice over, on whatever accelerator there is.", body, timeout_s=840)
