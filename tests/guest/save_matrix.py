#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Saves 1, 2 and 5 of one VM, with images mapped into its RAM and without, while it writes and while it does not.

usage: save_matrix.py [ROW ...]      all rows without arguments: mapped-active, mapped-idle, plain-active, plain-idle
       save_matrix.py short          two saves of one row
"""

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from lib import case, latent
from lib.vm import VM

ROWS = ("mapped-active", "mapped-idle", "plain-active", "plain-idle")
MAPPED, PLAIN = ["--min-run", "1", "--share-threshold", "0"], ["--no-overlays"]
RESTORED = (1, 2, 5)
FILES = "/usr/lib/python3.11/"
HELD_MIB = 64
HELD_PAGES = HELD_MIB * 256
CHURN_PAGES_PER_S = 10000
CHANGED_PAGES = 1000
# Random pages, and page after page: of these several are taken with one fault.
LOADS = (f"latent-guest mem churn m 0 {HELD_PAGES} 600 {CHURN_PAGES_PER_S}",
         f"while latent-guest mem write m {HELD_PAGES // 2} {HELD_PAGES // 2}; do sleep 0.02; done")


def fill(test, guest):
    """What is free afterwards has held files: where they were mapped, what is written there are copies in overlays."""
    latent.check_hashes(test, guest, "/usr/lib/")
    guest.drop_guest_caches()
    guest.sh(f"latent-guest mem hold m {HELD_MIB} 13 mixed", timeout=60)
    return guest.sh("head -c 16 /dev/urandom | sha256sum | tee /run/nonce")


def check_memory(test, guest, what):
    answer = guest.sh("latent-guest mem check m", timeout=120)
    test.check(answer.startswith("ok"), f"the guest's memory is right {what}")


def save(test, guest, number, directory, is_mapped, is_active):
    """Each finds other contents, and the guest knows which save it is."""
    guest.sh(f"echo {number} > /run/number; echo {number} > /root/number; sync; "
             f"latent-guest mem write m {number * CHANGED_PAGES} {CHANGED_PAGES}")
    figures = json.loads(latent.run("save", "--json", guest.name, directory, timeout_s=120))
    test.say(f"save {number}: the guest stood {figures['pause_us'] / 1000:.1f} ms; {figures['private_pages']} copies, "
             f"{figures['faults']} write faults, {figures['pages_stored']} pages stored, {figures['pages_on_volumes']} on images")
    test.check(figures["pages_stored"] > HELD_PAGES // 4, f"save {number} has what the guest holds")
    test.check((figures["private_pages"] > 0 and figures["pages_on_volumes"] > 0) == is_mapped,
               "it has copies in overlays, and pages on images" if is_mapped else "all of its RAM is its own")
    if is_active:
        test.check(figures["faults"] > 0, "it wrote while it was saved")


def check_restored(test, guest, number, directory, nonce):
    what = f"restored from save {number}"
    test.check(latent.run("verify", directory).endswith("is whole\n"), f"save {number} is whole")
    guest.restore(directory)
    test.check_equal(guest.sh("cat /run/nonce /run/number /root/number"), f"{nonce}{number}\n{number}\n",
                     f"{what}: its memory and its disk are of that save")
    check_memory(test, guest, what)
    guest.drop_guest_caches()
    latent.check_hashes(test, guest, FILES, what=what)
    guest.kill9()


def row(test, name, restored):
    is_mapped, is_active = name.startswith("mapped"), name.endswith("active")
    # On the file system of the VM's disk, which becomes part of the snapshots.
    directory = Path(tempfile.mkdtemp(prefix="latent-snapshots-"))
    try:
        with VM(name, latent=MAPPED if is_mapped else PLAIN, mem="512M") as guest:
            nonce = fill(test, guest)
            loads = [guest.sh_start(load) for load in LOADS] if is_active else []
            for number in range(1, restored[-1] + 1):
                time.sleep(0.5)
                save(test, guest, number, directory / str(number), is_mapped, is_active)
            for load in loads:
                test.check(load.status is None, "it wrote all the time")
                load.kill()
            check_memory(test, guest, f"after {restored[-1]} saves")
            guest.kill9()
            for number in restored:
                check_restored(test, guest, number, directory / str(number), nonce)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def body(test):
    test.need_latent()
    latent.private_run_dir()
    if sys.argv[1:] == ["short"]:
        row(test, "plain-active", RESTORED[:2])  # save_restore.py has three of the first row
    else:
        for name in sys.argv[1:] or ROWS:
            row(test, name, RESTORED)
    latent.run("ps")
    test.check_equal(latent.vm_dirs(), [], "no run-time directory is left")


case.main("Any save of a VM can be restored: the first and the fifth, of mapped and of plain RAM, idle or not.", body,
          timeout_s=900)
