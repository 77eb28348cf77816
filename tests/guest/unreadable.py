#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""An image that nothing protects is cut while it is mapped: the guest is stopped; what touches it all the same ends QEMU."""

import ctypes
import os
import re
import shutil
import tempfile
from pathlib import Path

from lib import case, host, latent
from lib.vm import VM

PR_CAPBSET_DROP, CAP_LEASE = 24, 28
NOBODY = 65534
CUT_TO_PAGES = 16
OPTIONS = ["--min-run", "1", "--share-threshold", "0", "--trust-image"]


def take_no_leases(disk):
    """What this process starts cannot take leases of other users' files."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_CAPBSET_DROP, CAP_LEASE, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    os.chown(disk.path, NOBODY, NOBODY)


def explanation(guest):
    return re.search(r"a page of guest RAM cannot be read: offset 0x[0-9a-f]+ of \S+, from (\S+) at byte (\d+)",
                     guest.qemu_log.read_text())


def body(test):
    test.need_latent()
    latent.private_run_dir()
    directory = Path(tempfile.mkdtemp(prefix="latent-unreadable-"))
    try:
        disk = latent.DataDisk(directory, "trusted")
        take_no_leases(disk)
        with VM("unreadable", latent=OPTIONS, extra=disk.arguments()) as guest:
            test.check_equal(disk.read_in(guest, "/dev/vdb"), disk.sha256, "the image is read right")
            one = latent.volume(latent.stat(guest), disk.path)
            test.check_equal(one["state"], "trusted", f"it is mapped on the user's word: {latent.describe(one)}")
            test.check_equal(guest.qmp("query-status")["status"], "running", "the guest runs")
            os.truncate(disk.path, CUT_TO_PAGES * host.PAGE_BYTES)
            guest.wait_status("paused")
            latent.wait_for("the agent says why",
                            lambda: f"{disk.path} was cut while it was mapped" in guest.qemu_log.read_text())
            guest.qmp("cont")
            guest.sh_start(f"sha256sum {disk.node}")
            test.check(guest.process.wait(60) != 0, "QEMU ends of a page that is not there")
            path, byte = explanation(guest).groups()
            test.check(Path(path) == disk.path and CUT_TO_PAGES * host.PAGE_BYTES <= int(byte) < disk.MIB << 20,
                       f"it is said of which page: {explanation(guest)[0]}")
            guest.kill9()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


case.main("A page that an image does not give any more is explained.", body, timeout_s=300)
