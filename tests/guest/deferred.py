#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""A restored guest with known pages of each kind reads half of them and writes a quarter: what `latent stat` says of
them, exactly.

The rest of the guest goes on meanwhile. So the page entries are looked at with the guest stopped, before and after: the
known pages have to be what they should be, and what has changed in all entries is what the counters have to show.
"""

import hashlib
import json
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

from lib import activity, case, host, latent, vm
from lib.vm import VM

EVERYTHING = ["--min-run", "1", "--share-threshold", "0"]
HOLDERS = {"unique": 3, "same": 5, "again": 5}  # seeds: those of one seed hold equal pages
HELD_MIB = 2
HELD_PAGES = HELD_MIB * 256
DISK_PAGES = 512  # every second page of the disk, so that no two lie in one mapping
COPIED_MAX = 0.25  # of all known pages, on a machine on which whoever has the range lock has to wait for a processor
KINDS = ("zero", "word", "equal", "disk", "unique")
CLEARED = ("masked_made", "masked_mapped", "masked_copied", "masked_dropped")
COUNTERS = (*CLEARED, "pages_copied_on_write")
QEMU_MAX = 64  # pages that QEMU itself reads while it takes the devices' states: rings, tables of the firmware


def disk_pages(first, count, after):
    """A command for every second page of the disk, of which `after` says what is done with it."""
    return (f"for i in $(seq {2 * first} 2 {2 * (first + count - 1)}); do "
            f"dd if=/dev/vdb bs={host.PAGE_BYTES} count=1 skip=$i status=none {after}; done")


def fill(test, guest):
    guest.sh("echo never > /sys/kernel/mm/transparent_hugepage/enabled")  # nobody puts pages elsewhere
    for name, seed in HOLDERS.items():
        guest.sh(f"latent-guest mem hold {name} {HELD_MIB} {seed} mixed", timeout=60)
    guest.sh("echo 0 > /sys/block/vdb/queue/read_ahead_kb")
    guest.sh("sleep 100000 < /dev/vdb > /dev/null 2>&1 &")  # as long as it is open, its pages stay in memory
    guest.sh(disk_pages(0, DISK_PAGES, "> /dev/null"), timeout=120)


def places(guest, name):
    """Guest page numbers of a holder's pages, in their order; RAM lies below the PCI hole."""
    found = []
    for line in guest.sh(f"latent-guest mem pfns {name}").splitlines():
        _, pfn, count = map(int, line.split())
        found += range(pfn, pfn + count)
    return found


def memory(guest):
    """All of guest RAM, as a list of pages."""
    path = guest.dir / "ram.bin"
    guest.qmp("pmemsave", val=0, size=vm.parse_bytes(guest.mem), filename=str(path))
    data = path.read_bytes()
    path.unlink()
    return [data[at:at + host.PAGE_BYTES] for at in range(0, len(data), host.PAGE_BYTES)]


def source(entry):
    return entry & activity.SOURCE_MASK


def locator(entry):
    return entry >> activity.PAGE_SHIFT


def is_word(entry):
    return entry >> activity.FILE_SHIFT == activity.WORDS


def kind_of(page, holder):
    if page == bytes(host.PAGE_BYTES):
        return "zero"
    if page == page[:8] * (host.PAGE_BYTES // 8):
        return "word"
    return "unique" if holder == "unique" else "equal"


def is_apart(gfn, kinds):
    """Is there a page of a word on either side, before others than the holder's come? (With them it may lie in a run that
    is long enough to be mapped at once.)"""
    for step in (-1, 1):
        at = gfn
        while kinds.get(at) != "word":
            if at not in kinds:
                return False
            at += step
    return True


class Known:
    """The guest's known pages by their contents: {page number: (kind, "read", "written" or "left")}."""

    def __init__(self, guest, holders, image):
        """The guest is stopped; holders: {name: page numbers}."""
        pages, table = memory(guest), activity.entries(guest)
        self.what = {}
        for name, gfns in holders.items():
            kinds = {gfn: kind_of(pages[gfn], name) for gfn in gfns}
            self.what.update({gfn: (kinds[gfn], self.use(i, len(gfns))) for i, gfn in enumerate(gfns) if is_apart(gfn, kinds)})
        wanted = {image[2 * i]: i for i in range(DISK_PAGES)}
        for gfn, page in enumerate(pages):  # what a program has read of them lies about, too, and is not mapped
            if page in wanted and source(table[gfn]) == activity.OVERLAY:
                self.what[gfn] = ("disk", self.use(wanted[page], DISK_PAGES))

    @staticmethod
    def use(i, count):
        return "read" if 2 * i < count else "written" if 4 * i < 3 * count else "left"

    def count(self):
        """{(kind, use): pages}"""
        return Counter(self.what.values())

    def found(self, before, after):
        """{(kind, use, what has become of it): pages}"""
        return Counter((*what, became(before[gfn], after[gfn])) for gfn, what in self.what.items())


def became(before, after):
    """What has become of a page, by its entries."""
    if source(before) != activity.MASKED:
        return "never masked"
    if source(after) == activity.MASKED:
        return "masked"
    if source(after) == activity.WATCHED:
        return "made" if is_word(before) else "copied"
    if source(after) == activity.OVERLAY and locator(after) == locator(before):
        return "copied on write" if after & activity.PRIVATE else "mapped"
    return "dropped"


def expected(known):
    """What the counts of known pages say."""
    of_file = {"read": "mapped", "written": "copied on write", "left": "masked"}
    of_word = {"read": "made", "written": "made", "left": "masked"}
    return Counter({(kind, use, "never masked" if kind == "zero" else (of_word if kind == "word" else of_file)[use]): pages
                    for (kind, use), pages in known.count().items()})


def counted(before, after):
    """What the counters have to have grown by, of all of guest RAM."""
    all_of_it = Counter(became(*pair) for pair in zip(before, after))
    copies = sum(1 for pair in zip(before, after) if pair[1] & activity.PRIVATE and not pair[0] & activity.PRIVATE)
    return {"masked_made": all_of_it["made"], "masked_mapped": all_of_it["mapped"] + all_of_it["copied on write"],
            "masked_copied": all_of_it["copied"], "masked_dropped": all_of_it["dropped"], "pages_copied_on_write": copies}


def use_pages(guest):
    """Half of the pages of each kind are read, and half of the others written."""
    half, quarter = HELD_PAGES // 2, HELD_PAGES // 4
    for name in HOLDERS:
        guest.sh(f"latent-guest mem check {name} 0 {half}")
        guest.sh(f"latent-guest mem write {name} {half} {quarter}")
    guest.sh(disk_pages(0, DISK_PAGES // 2, "> /dev/null"), timeout=120)
    guest.sh(disk_pages(DISK_PAGES // 2, DISK_PAGES // 4, "of=/dev/vdb seek=$i conv=notrunc"), timeout=120)


def snapshot_of_known_pages(test, guest, image, directory):
    """The known pages, and how many pages are zero."""
    fill(test, guest)
    holders = {name: places(guest, name) for name in HOLDERS}
    test.check_equal([len(gfns) for gfns in holders.values()], [HELD_PAGES] * len(HOLDERS), "all that is held is in memory")
    time.sleep(1)
    guest.qmp("stop")
    known = Known(guest, holders, image)
    counts = known.count()
    test.say("known pages: " + ", ".join(f"{kind} {sum(counts[kind, use] for use in ('read', 'written', 'left'))}"
                                         for kind in KINDS))
    test.check(all(counts[kind, use] >= 60 for kind in KINDS for use in ("read", "written", "left")) and
               counts["disk", "read"] * 2 == DISK_PAGES, "there are enough of each kind")
    answer = json.loads(latent.run("save", "--json", guest.name, directory))
    return known, holders, answer["pages_zero"]


def check_updates(test, guest, known, zero_pages):
    stat, table = latent.stat(guest), activity.entries(guest)
    masked = sum(source(entry) == activity.MASKED for entry in table)
    by_qemu = sum(stat[key] for key in CLEARED)
    test.check(by_qemu <= QEMU_MAX, f"QEMU itself has used {by_qemu} pages")
    test.check_equal((stat["pages_masked"], stat["pages_masked_now"], stat["pages_never_masked"]),
                     (masked + by_qemu, masked, zero_pages),
                     "flags that were set, those that still are, and zero pages that have none")
    guest.qmp("cont")
    use_pages(guest)
    guest.qmp("stop")
    after, now = latent.stat(guest), activity.entries(guest)
    found, wanted = known.found(table, now), expected(known)
    others = found - wanted  # copied where it would have been mapped, if somebody had the range lock at that moment
    test.check(all(became == "copied" for _, _, became in others) and others.total() <= COPIED_MAX * wanted.total(),
               f"{wanted.total() - others.total()} of {wanted.total()} known pages have become what they should be" +
               (f"; not {dict(wanted - found)}, but {dict(others)}" if others else ""))
    test.check_equal({key: after[key] - stat[key] for key in COUNTERS}, counted(table, now), "that is what was counted")
    cleared = sum(after[key] - stat[key] for key in CLEARED)
    test.check_equal((after["pages_masked"], after["pages_masked_now"], after["pages_never_masked"]),
                     (stat["pages_masked"], masked - cleared, zero_pages), f"flags that were cleared: {cleared}")
    guest.qmp("cont")


def body(test):
    test.need_latent()
    latent.private_run_dir()
    directory = Path(tempfile.mkdtemp(prefix="latent-deferred-"))
    try:
        path = latent.random_image(directory / "known.raw", 2 * DISK_PAGES * host.PAGE_BYTES >> 20)
        data = path.read_bytes()
        image = [data[at:at + host.PAGE_BYTES] for at in range(0, len(data), host.PAGE_BYTES)]
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", path, "-F", "raw", directory / "known.qcow2"],
                       check=True)
        with VM("deferred", latent=EVERYTHING, mem="512M",
                extra=latent.extra_disk(directory / "known.qcow2", "known", "qcow2", read_only=False)) as guest:
            known, holders, zero_pages = snapshot_of_known_pages(test, guest, image, directory / "snapshot")
            guest.kill9()
            guest.restore(directory / "snapshot", "--paused", "--no-rest")
            guest.wait_status("paused")
            check_updates(test, guest, known, zero_pages)
            for name in HOLDERS:
                test.check(guest.sh(f"latent-guest mem check {name}").startswith("ok"), f"{name}: all of it is right")
            test.check_equal({name: places(guest, name) for name in HOLDERS}, holders, "and lies where it did")
            test.check_equal(guest.sh("sha256sum /dev/vdb").split()[0], hashlib.sha256(data).hexdigest(), "so is the disk")
            guest.shutdown()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


case.main("Of known pages that are touched each counter of deferred updates says exactly what has happened.", body,
          timeout_s=600)
