#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""`latent reclaim` with a store in a file, and a save that brings all of it back before it begins, in parts."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cheap
from cheap import check, latent

OTHER_HALF_PAGES = (cheap.RAM_MIB - cheap.IMAGE_MIB) * cheap.PAGES_PER_MIB
DEADLINE_S = 30
USAGE, NO_ANSWER = 64, 75


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


@contextlib.contextmanager
def slow_walk(directory):
    """A VM, and a walk through its RAM that takes minutes: each page waits for the store."""
    os.environ["LATENT_FAULT"] = "write:delay:100"
    vm = cheap.VM("slow", directory)
    del os.environ["LATENT_FAULT"]
    vm.do(f"open {directory}/slow.image")
    latent("scan", "slow", "--period", "100ms")
    time.sleep(1)
    walk = subprocess.Popen([cheap.LATENT, "reclaim", "slow", "--cold-for", "300ms", "--store",
                             f"/var/tmp/latent-test-slow-{os.getpid()}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            text=True)
    try:
        time.sleep(1)
        check(walk.poll() is None, "a walk is under way")
        yield vm, walk
    finally:
        if walk.poll() is None:
            walk.kill()
        walk.communicate()
        vm.kill()
        vm.close()


def replace(vm, watcher, directory):
    """Another VM of its name, before the watcher can see that there is none."""
    watcher.send_signal(signal.SIGSTOP)
    vm.kill()
    other = cheap.VM(vm.name, directory)
    watcher.send_signal(signal.SIGCONT)
    return other


def end_of(walk, what):
    try:
        walk.wait(DEADLINE_S / 3)
    except subprocess.TimeoutExpired:
        check(False, f"{what}: it ends")
    return walk.returncode


def walks_end_early(directory):
    with slow_walk(directory) as (_, walk):
        walk.send_signal(signal.SIGINT)
        time.sleep(0.5)
        check(walk.poll() is None, "the first Ctrl-C waits for the agent")
        walk.send_signal(signal.SIGINT)
        check(end_of(walk, "a second Ctrl-C") == NO_ANSWER, "its end was not waited for")
    with slow_walk(directory) as (vm, walk):
        other = replace(vm, walk, directory)
        check(end_of(walk, "another VM has its name") == NO_ANSWER, "its VM has ended")
        other.close()


def auto_ends_with_its_vm(directory):
    if not Path("/proc/pressure/memory").exists():
        print("no pressure is told here: --auto is not tried")
        return
    vm = cheap.VM("again", directory)
    latent("scan", "again", "--period", "100ms")
    auto = subprocess.Popen([cheap.LATENT, "reclaim", "again", "--auto", "--pressure", "100", "--json"],
                            stdout=subprocess.PIPE, text=True)
    check("rest" in auto.stdout.readline(), "--auto is at work")
    other = replace(vm, auto, directory)
    check(end_of(auto, "--auto, and another VM has its name") == 0, "--auto ends with its VM")
    auto.kill()
    auto.communicate()
    other.close()
    vm.close()


def body(directory):
    vm = cheap.VM("vm", directory)
    large_folios_are_forbidden(vm)
    answer = latent("reclaim", "vm", "--cold-for", "781s")
    check(answer.returncode == USAGE and "longer than 780 s" in answer.stderr, f"nobody remembers more: {answer.stderr}")
    latent("scan", "vm", "--period", "1h")
    answer = latent("reclaim", "vm", "--cold-for", "18001s")
    check(answer.returncode == USAGE and "longer than 18000 s" in answer.stderr, f"nor of long periods: {answer.stderr}")
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
    walks_end_early(directory)
    auto_ends_with_its_vm(directory)


if __name__ == "__main__":
    cheap.main(body, cheap.VMM)
