#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Guests that write, cut and overwrite files, use their memory again and again, and drop caches."""

import contextlib
import itertools
import os
import re
import threading
import time

from lib import case, host, latent, vm
from lib.vm import VM

FILES = "/usr/lib/"
PARTS = ("/usr/lib/python3.11/", "/usr/lib/gcc/", "/usr/share/", "/usr/lib/x86_64-linux-gnu/", "/usr/include/")
EVERYTHING = ["--min-run", "1", "--share-threshold", "0"]
TINY_BUDGET = 1500  # mappings; QEMU itself has about 350
OWN_GROWTH = 200     # by which QEMU's own may grow between two counts of them: stacks, arenas
TORN = 16            # the kernel shows one mapping after another, and not one moment
RAM_MAPPING = re.compile(rb" rw-. .*(?:/memfd:latent-ram|/golden\.qcow2)")
CHURN_PAGES_PER_S = 5000
CHURN_S = 35  # of each guest
MANY_PAGES = 30000  # that have to be discarded meanwhile
LOOK_S = 0.1  # from one look at the mappings to the next
PRESSURE_MEM_MIB = 512  # far less than the files that are read: pages are used again and again
BALLOONED_MIB = 400
# Free pages are reported one by one: discards fall into the middle of mappings.
PRESSURE = {"mem": f"{PRESSURE_MEM_MIB}M", "append": "page_reporting.page_reporting_order=0",
            "extra": ["-device", "virtio-balloon-pci,free-page-reporting=on"]}

# Copies of files of the image are changed in all ways; the manifest is made by other means (from
# standard input, not from the files), so that a wrong page is no part of the expectation.
WRITES = r"""set -e
rm -rf /scratch && mkdir -p /scratch/copy
cp /usr/lib/python3.11/*.py /scratch/copy
cd /scratch/copy
for f in $(ls *.py | head -30); do
    head -c 3000 /usr/bin/perl | dd of=$f bs=1000 seek=1 conv=notrunc status=none                # inside
done
for f in $(ls *.py | sed -n 31,50p); do truncate -s 700 $f; truncate -s 9000 $f; done           # cut, grown
for f in $(ls *.py | sed -n 51,70p); do cat /usr/include/stdio.h > $f; done                    # overwritten
for f in $(ls *.py | sed -n 71,80p); do cat /usr/include/stdlib.h >> $f; done                 # appended
for f in $(ls *.py | sed -n 81,90p); do rm $f; cp /usr/bin/env $f; done                       # replaced
for i in $(seq 4); do head -c 3000000 /dev/urandom | tee /scratch/r$i | sha256sum | sed "s|-|/scratch/r$i|" ; done > /scratch.sums
"""
WRITTEN_SUMS = "cd /scratch && find copy -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum"
CHECK_RANDOM = "sha256sum -c --quiet /scratch.sums"


def mappings(figures):
    return figures["maps_ram_now"] + figures["maps_other_now"]


def count_mappings(guest):
    """(of guest RAM, all), as the kernel has them."""
    with open(f"/proc/{guest.pid}/maps", "rb", buffering=1 << 20) as file:
        lines = file.read()
    return len(RAM_MAPPING.findall(lines)), lines.count(b"\n")


@contextlib.contextmanager
def mappings_watched(test, guest, what):
    """Looked at all the time, mappings are never more than the budget. What QEMU itself has mapped since
    that was last counted is all that may exceed it."""
    looks, ended = [], threading.Event()

    def watch():
        while not ended.wait(LOOK_S):
            looks.append(count_mappings(guest))

    thread = threading.Thread(target=watch, daemon=True)
    before, started_s = latent.stat(guest), time.monotonic()
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    seconds, after = time.monotonic() - started_s, latent.stat(guest)
    budget, counted = after["maps_budget_now"], min(figures["maps_other_now"] for figures in (before, after))
    test.check(len(looks) > 2 * seconds, f"{what}: {len(looks)} looks at the mappings in {seconds:.0f} s")
    most_ram, most = max(ram for ram, _ in looks), max(both for _, both in looks)
    test.check(most_ram + counted <= budget + TORN and most <= budget + OWN_GROWTH,
               f"at most {most_ram} of guest RAM beside {counted} of QEMU, {most} in all, budget {budget}")


def check_budget(test, guest, what):
    figures = latent.stat(guest)
    _, real = count_mappings(guest)
    test.check(mappings(figures) <= figures["maps_budget_now"] + OWN_GROWTH and figures["map_failures"] == 0,
               f"{what}: {figures['maps_ram_now']} + {figures['maps_other_now']} mappings (the kernel says {real}), "
               f"budget {figures['maps_budget_now']}")
    test.check(abs(real - mappings(figures)) < 100 + real // 10, "the count of mappings is about right")
    return figures


def writes(test, guest, expected):
    """The same writes as under plain QEMU give the same files, before and after caches are dropped."""
    guest.sh(WRITES, timeout=120)
    for what in ("in the page cache", "from the disk"):
        found = latent.parse_sums(guest.sh(WRITTEN_SUMS, timeout=60))
        test.check_equal([path for path in expected if found.get(path) != expected[path]], [],
                         f"{len(expected)} files that were written are right {what}")
        guest.sh(CHECK_RANDOM)
        guest.drop_guest_caches()


def expect_writes():
    """What the writes give in a guest without Latent."""
    with VM("plain") as guest:
        guest.sh(WRITES, timeout=120)
        guest.drop_guest_caches()
        sums = latent.parse_sums(guest.sh(WRITTEN_SUMS, timeout=60))
        guest.shutdown()
    return sums


def drop_on_the_host(test, guest):
    """The image's clean pages go wherever they are mapped; the guest's next touch brings them back."""
    path = vm.images_dir() / "golden.qcow2"
    before = host.cached_pages(path)
    try:
        with open("/proc/sys/vm/drop_caches", "w") as file:
            file.write("3\n")
    except PermissionError:
        test.not_tried("the host drops its caches: only root may make it")
        return
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    test.say(f"dropped on the host: {before} pages of the image were cached, now {host.cached_pages(path)}")
    latent.check_hashes(test, guest, FILES, what="after the host dropped its caches")


def churn(test, guest, mib, what):
    """Memory is rewritten and given back while files are read over and over: pages change their use."""
    guest.sh(f"latent-guest mem hold churn {mib} 5 mixed", timeout=60)
    before = latent.stat(guest)
    with mappings_watched(test, guest, what):
        rounds = read_under_churn(test, guest, mib, what)
    after = latent.stat(guest)
    discarded = after["pages_discarded"] - before["pages_discarded"]
    test.check(discarded > MANY_PAGES, f"{discarded} pages were discarded meanwhile")
    test.check(guest.sh("latent-guest mem check churn").startswith("ok"),
               f"{mib} MiB of memory and {rounds} rounds of files are right {what}")
    guest.sh("latent-guest mem free churn")
    guest.drop_guest_caches()
    latent.check_hashes(test, guest, "/usr/", what="after the churn")


def read_under_churn(test, guest, mib, what):
    """Rounds of reading files. The balloon goes up and down; what caches held is reported as free."""
    churning = guest.sh_start(f"latent-guest mem churn churn 0 {mib * 256} {CHURN_S} {CHURN_PAGES_PER_S}")
    end_s = time.monotonic() + CHURN_S
    sizes_mib = itertools.cycle((BALLOONED_MIB, PRESSURE_MEM_MIB))
    for rounds, (part, size_mib) in enumerate(zip(itertools.cycle(PARTS), sizes_mib)):
        if time.monotonic() > end_s:
            break
        guest.qmp("balloon", value=size_mib << 20)
        differing = latent.differing_hashes(latent.start_hash(guest, part), part)
        if differing:
            test.check_equal(differing, [], f"files of {part} are right {what}")
        if rounds % 2:
            guest.drop_guest_caches()
    guest.qmp("balloon", value=PRESSURE_MEM_MIB << 20)
    churning.wait(60)
    return rounds


def mappings_fall(test, guest):
    """When all is given up, guest RAM is one mapping again."""
    latent.check_hashes(test, guest, FILES)
    before = check_budget(test, guest, "files mapped")
    one = latent.volume(before, vm.images_dir() / "golden.qcow2")
    latent.run("detach", guest.name)
    after = check_budget(test, guest, "detached")
    test.check(after["maps_ram_now"] < 50 and after["pages_overlay_now"] == 0,
               f"from {before['maps_ram_now']} mappings of {one['pages_mapped_now']} pages to {after['maps_ram_now']}")


def overwritten(test, guest):
    """The guest reads a file of its own, which is copied, into pages that map the image."""
    guest.sh("head -c 300000000 /dev/zero > /zeros; sync")
    guest.drop_guest_caches()
    latent.check_hashes(test, guest, FILES)
    before = latent.stat(guest)
    guest.drop_guest_caches()
    guest.sh("cat /zeros > /dev/null", timeout=60)
    after = latent.stat(guest)
    test.check(after["pages_overlay_now"] < before["pages_overlay_now"] * 3 // 4,
               f"reads that are copied over mapped pages: {before['pages_overlay_now']} pages were mapped, "
               f"now {after['pages_overlay_now']}; {before['maps_ram_now']} mappings, now {after['maps_ram_now']}")
    test.check(after["maps_ram_now"] < before["maps_ram_now"], "mappings fall again")
    guest.sh("rm /zeros")


def body(test):
    test.need_latent()
    latent.private_run_dir()
    expected = expect_writes()
    with VM("writes", latent=EVERYTHING) as guest:
        writes(test, guest, expected)
        latent.check_hashes(test, guest, FILES, what="beside the writes")
        drop_on_the_host(test, guest)
        overwritten(test, guest)
        check_budget(test, guest, "after writes")
        guest.shutdown()
    with VM("pressure", latent=EVERYTHING, **PRESSURE) as guest:
        churn(test, guest, 200, "under pressure")
        check_budget(test, guest, "under pressure")
        mappings_fall(test, guest)
        guest.shutdown()
    with VM("tiny", latent=[*EVERYTHING, "--max-maps", str(TINY_BUDGET)], **PRESSURE) as guest:
        churn(test, guest, 200, f"with at most {TINY_BUDGET} mappings")
        figures = check_budget(test, guest, "with few mappings")
        one = latent.volume(figures, vm.images_dir() / "golden.qcow2")
        test.check(one["misses"]["budget"]["bytes"] > 1 << 20, "reads beyond the budget are copied, and counted")
        writes(test, guest, expected)
        latent.check_hashes(test, guest, FILES, what="in the end")
        check_budget(test, guest, "in the end")
        guest.shutdown()
    test.check_equal(latent.vm_dirs(), [], "no run-time directory is left")


case.main("Files and memory are right when guests write and run out of memory, and mappings stay few.", body,
          timeout_s=840)
