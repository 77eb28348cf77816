#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Discards of every other page that is mapped: each would split a mapping in two."""

import time

from lib import case, latent
from lib.vm import VM, GuestError

MIB = 1 << 20
FILES = "/usr/"
SLACK = 200  # by which QEMU's own mappings may grow between two counts of them

# All files are read, and then every other page of them leaves the guest's page cache: the guest's
# free memory is tens of thousands of single pages, and a balloon takes single pages first.
SCATTER = """
import os
PAGE = 4096
def files():
    for directory, _, names in os.walk("/usr"):
        for name in names:
            path = os.path.join(directory, name)
            if not os.path.islink(path):
                fd = os.open(path, os.O_RDONLY)
                yield fd
                os.close(fd)
for fd in files():
    while os.read(fd, 1 << 20):
        pass
for fd in files():
    for at in range(0, os.fstat(fd).st_size, 2 * PAGE):
        os.posix_fadvise(fd, at, PAGE, os.POSIX_FADV_DONTNEED)
line = next(line for line in open("/proc/buddyinfo") if "DMA32" in line)
print(line.split()[4])
"""


def real_mappings(guest):
    with open(f"/proc/{guest.pid}/maps") as file:
        return sum(1 for _ in file)


def inflate(test, guest, mib):
    guest.qmp("balloon", value=mib * MIB)
    deadline_s = time.monotonic() + 60
    while abs(guest.qmp("query-balloon")["actual"] - mib * MIB) > 8 * MIB:
        if time.monotonic() > deadline_s:
            raise GuestError(f"the balloon stands at {guest.qmp('query-balloon')}")
        time.sleep(0.1)
    maps = real_mappings(guest)
    test.say(f"balloon to {mib} MiB: {maps} mappings")
    return maps


def body(test):
    test.need_latent()
    latent.private_run_dir()
    with VM("scatter", latent=["--share-threshold", "0"], extra=["-device", "virtio-balloon-pci"]) as guest:
        guest.put(SCATTER.encode(), "/run/scatter.py")
        single = int(guest.sh("python3 /run/scatter.py", timeout=120))
        figures = latent.stat(guest)
        test.check(single > 20000 and figures["pages_overlay_now"] > 80000,
                   f"{single} free single pages, {figures['maps_ram_now']} mappings of guest RAM")
        worst = max(inflate(test, guest, mib) for mib in range(900, 300, -100))
        figures = latent.stat(guest)
        test.check(worst <= figures["maps_budget_now"] + SLACK,
                   f"at most {worst} mappings, budget {figures['maps_budget_now']}")
        latent.check_hashes(test, guest, FILES, what="with scattered holes")
        guest.qmp("balloon", value=1024 * MIB)
        guest.sh("latent-guest mem hold z 300 9 mixed && latent-guest mem check z && latent-guest mem free z")
        latent.check_hashes(test, guest, FILES, what="after it")
        guest.shutdown()
    test.check_equal(latent.vm_dirs(), [], "no run-time directory is left")


case.main("A balloon that takes single pages out of mappings stays within the budget.", body, timeout_s=480)
