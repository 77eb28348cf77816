#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Runs in L1 (tests/kvm/nested run --share SOURCES -- tests/kvm/l2_boot.py)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "guest"))

from lib import case, host, vm  # noqa: E402
from lib.vm import VM  # noqa: E402

BOOT_MAX_S = 240
READ_ALL_OF_USR_LIB = "find /usr/lib -type f -print0 | xargs -0 cat | wc -c"


def body(test):
    test.check_equal(host.accelerator(vm.images_dir()), "kvm", "guests use KVM here")
    with VM("l2", mem="512M") as guest:
        test.say(f"boot to ready: {guest.wait_ready(BOOT_MAX_S):.1f} s")
        test.check_equal(guest.qmp("query-kvm"), {"enabled": True, "present": True}, "KVM is in use")
        test.say("guest: " + guest.sh("uname -a; grep -c ^processor /proc/cpuinfo").strip())
        test.check("KVM" in guest.sh("dmesg | grep -i hypervisor"), "the guest sees KVM")
        for cache in ("cold", "warm"):
            with test.time(f"read /usr/lib, guest cache {cache}"):
                guest.sh(READ_ALL_OF_USR_LIB, timeout=120)
        with test.time("sha256 of 32 MiB"):
            guest.sh("head -c 33554432 /dev/zero | sha256sum", timeout=120)
        guest.shutdown(timeout=60)
        test.check(not guest.alive(), "the guest powers off")


case.main("A Debian guest boots on KVM, nested.", body, timeout_s=600)
