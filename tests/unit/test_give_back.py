#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""`latent reclaim` with a store in a file, and a save that brings all of it back before it begins, in parts."""

import os
import sys
import time
from pathlib import Path

import cheap
from cheap import check, latent

OTHER_HALF_PAGES = (cheap.RAM_MIB - cheap.IMAGE_MIB) * cheap.PAGES_PER_MIB
DEADLINE_S = 30


def reclaim_stat(vm):
    return vm.stat()["reclaim"]


def give_back(vm, *options):
    """As soon as all has been cold for long enough."""
    deadline_s = time.monotonic() + DEADLINE_S
    while (answer := latent("reclaim", vm.name, "--cold-for", "300ms", *options)).returncode == 0:
        options = ()
        if reclaim_stat(vm)["pages_packed_now"] == cheap.IMAGE_PAGES or time.monotonic() > deadline_s:
            return
        time.sleep(0.2)
    if "userfaultfd" in answer.stderr or "write-protect" in answer.stderr:
        print(f"skipped: {answer.stderr.strip()}")
        vm.close()
        sys.exit(cheap.SKIPPED)
    check(False, f"reclaim: {answer.stderr}")


def large_folios_are_forbidden(vm):
    """Of what shows guest RAM's memfd; where the kernel knows none, there is nothing to forbid."""
    mapping, flags = "", {}
    for line in Path(f"/proc/{vm.process.pid}/smaps").read_text().splitlines():
        if line.startswith("VmFlags:"):
            flags[mapping] = line.split()[1:]
        elif not line.split()[0].endswith(":"):
            mapping = line
    found = {name: one for name, one in flags.items() if "memfd:latent-ram" in name}
    known = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").exists()
    check(found and all("nh" in one for one in found.values()) == known, f"guest RAM in small pages: {found}")


def body(directory):
    vm = cheap.VM("vm", directory)
    large_folios_are_forbidden(vm)
    total = vm.do("sum")
    vm.do(f"open {directory}/vm.image")  # for writing: its pages, which do not pack, become the VM's own
    check(vm.stat()["pages_base_now"] == cheap.IMAGE_PAGES + OTHER_HALF_PAGES, "all is the VM's own memory")
    latent("scan", "vm", "--period", "100ms")
    store = Path(f"/var/tmp/latent-test-give-back-{os.getpid()}")  # not in memory
    give_back(vm, "--store", store)
    given = reclaim_stat(vm)
    check(given["pages_packed_now"] == cheap.IMAGE_PAGES and given["left_failed"] == 0, f"given back: {given}")
    check(given["store_file_bytes_now"] == cheap.IMAGE_PAGES * 4096 and given["store_bytes_now"] == 0,
          f"to the file: {given}")
    check(not store.exists(), "which has no name")

    saver = cheap.Control(vm)
    parts = 0
    while True:
        error, pages, pages_all, _ = saver.ask("CONTROL_SAVE_LOAD")
        parts += 1
        check(error == 0 and pages_all == cheap.IMAGE_PAGES, f"part {parts}: {error}, {pages} of {pages_all}")
        if error or pages == pages_all or parts > 100:
            break
    check(2 <= parts <= 20, f"it comes back in {parts} parts")
    check(reclaim_stat(vm)["pages_packed_now"] == 0, "all is back")
    answer = latent("reclaim", "vm", "--cold-for", "300ms")
    check(answer.returncode == 75 and "saved" in answer.stderr and len(answer.stderr.splitlines()) == 1,
          f"nothing is given back meanwhile: {answer.stderr}")
    check(saver.ask("CONTROL_SAVE_BEGIN")[0] == 0, "a save can begin")
    saver.close()
    check(vm.do("sum") == total, "memory is what it was")
    give_back(vm)  # nobody saves it any more
    check(reclaim_stat(vm)["pages_packed_now"] == cheap.IMAGE_PAGES, "and is given back again")
    check(vm.do("sum") == total, "memory is what it was, from the file")
    vm.close()


if __name__ == "__main__":
    cheap.main(body, cheap.VMM)
