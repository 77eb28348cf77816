#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""What the guest gives back: balloon, free page reporting, discards of its disk."""

import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from lib import case, latent
from lib.vm import VM

MIB = 1 << 20
EVERYTHING = ["--min-run", "1", "--share-threshold", "0"]
BALLOON_MIB = 320  # what is left to the guest, of 1 GiB
HELD_MIB = 64
FEW_MAPS = 1500
OWN_GROWTH = 200  # by which QEMU's own mappings may grow between two counts of them

# With init_on_free the guest's kernel zeroes pages when it frees them, and gives them out as zeros
# without another look. Pages that it has reported as free in between must come back as zeros.
RELIES_ON_ZEROS = "init_on_free=1 init_on_alloc=0"
TOUCH_AND_CHECK = """
import mmap, sys
PAGE, size = 4096, int(sys.argv[1]) << 20
memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
for at in range(0, size, PAGE):
    memory[at] = 1
page = b"\\1" + bytes(PAGE - 1)
wrong = sum(memory[at:at + PAGE] != page for at in range(0, size, PAGE))
print(wrong)
"""


def wait_until(condition, timeout_s):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.2)
    return True


def balloon_to(test, guest, mib):
    guest.qmp("balloon", value=mib * MIB)
    with test.time(f"balloon to {mib} MiB"):
        done = wait_until(lambda: abs(guest.qmp("query-balloon")["actual"] - mib * MIB) < 8 * MIB, 60)
    if not done:
        test.say(f"the balloon stands at {guest.qmp('query-balloon')['actual'] >> 20} MiB")
    return done


def memory_mib(guest):
    """(the VM's own memory, pages of images that its RAM maps and has touched), and says so."""
    return latent.base_bytes(guest) >> 20, guest.ram_kib()["image"]["rss_kib"] >> 10


def check_maps(test, figures, what):
    maps = figures["maps_ram_now"] + figures["maps_other_now"]
    test.check(maps <= figures["maps_budget_now"] and figures["map_failures"] == 0,
               f"{what}: {figures['maps_ram_now']} mappings of guest RAM, budget {figures['maps_budget_now']}")


def balloon(test):
    with VM("balloon", latent=EVERYTHING, extra=["-device", "virtio-balloon-pci"]) as guest:
        guest.sh(f"latent-guest mem hold m {HELD_MIB} 7 mixed")
        latent.check_hashes(test, guest, "/usr/")
        before, own_mib, image_mib = latent.stat(guest), *memory_mib(guest)
        test.say(f"before: {own_mib} MiB own, {image_mib} MiB of images, {before['maps_ram_now']} mappings")
        test.check(before["pages_overlay_now"] > 300 * 256, f"{before['pages_overlay_now']} pages are mapped")

        test.check(balloon_to(test, guest, BALLOON_MIB), "the balloon inflates")
        inflated, own_mib, image_mib = latent.stat(guest), *memory_mib(guest)
        test.say(f"inflated: {own_mib} MiB own, {image_mib} MiB of images, {inflated['maps_ram_now']} mappings")
        test.check(own_mib + image_mib <= BALLOON_MIB + 16, "the memory is really given back")
        test.check(inflated["pages_overlay_now"] < BALLOON_MIB * 256, "mapped pages went, too")
        test.check(inflated["pages_discarded"] > 300 * 256, f"{inflated['pages_discarded']} pages were discarded")
        check_maps(test, inflated, "inflated")
        test.check(guest.sh("latent-guest mem check m").startswith("ok"), "what the guest holds is as it was")
        latent.check_hashes(test, guest, "/usr/lib/python3.11/", what="with little memory left")

        test.check(balloon_to(test, guest, 1024), "the balloon deflates")
        guest.sh("latent-guest mem hold z 400 9 mixed && latent-guest mem check z && latent-guest mem free z")
        test.check(guest.sh("latent-guest mem check m").startswith("ok"), "what the guest holds is as it was")
        latent.check_hashes(test, guest, "/usr/", what="after it")
        check_maps(test, latent.stat(guest), "in the end")
        guest.shutdown()


def balloon_with_few_mappings(test):
    """A discard in the middle of a mapping would split it: over the budget it must not."""
    with VM("few", latent=[*EVERYTHING, "--max-maps", str(FEW_MAPS)], append=RELIES_ON_ZEROS,
            extra=["-device", "virtio-balloon-pci"]) as guest:
        guest.put(TOUCH_AND_CHECK.encode(), "/run/check.py")
        latent.check_hashes(test, guest, "/usr/lib/")
        worst = 0
        for mib in (900, 700, 500, 300):
            test.check(balloon_to(test, guest, mib), f"the balloon inflates to {mib} MiB")
            worst = max(worst, sum(1 for _ in open(f"/proc/{guest.pid}/maps")))
        test.check(worst <= FEW_MAPS + OWN_GROWTH, f"at most {worst} mappings, budget {FEW_MAPS}")
        test.check(balloon_to(test, guest, 1024), "the balloon deflates")
        wrong = guest.sh("python3 /run/check.py 300", timeout=120).strip()
        test.check_equal(wrong, "0", "pages that the guest takes for zeros are zeros")
        latent.check_hashes(test, guest, "/usr/lib/", what="after it")
        guest.shutdown()


def reporting(test, name, append, check_mib):
    """Free page reporting: pages that held files are reported, and come back as zeros."""
    with VM(name, latent=EVERYTHING, append=f"{RELIES_ON_ZEROS} {append}",
            extra=["-device", "virtio-balloon-pci,free-page-reporting=on"]) as guest:
        guest.put(TOUCH_AND_CHECK.encode(), "/run/check.py")
        latent.check_hashes(test, guest, "/usr/")
        before, own_mib, image_mib = latent.stat(guest), *memory_mib(guest)
        test.say(f"before: {own_mib} MiB own, {image_mib} MiB of images, {before['maps_ram_now']} mappings")
        guest.drop_guest_caches()
        test.check(wait_until(lambda: sum(memory_mib(guest)) < (own_mib + image_mib) // 2, 30),
                   "free pages are reported, and their memory is given back")
        time.sleep(2.5)  # the next round of reports, too
        after, own_mib, image_mib = latent.stat(guest), *memory_mib(guest)
        test.say(f"reported: {own_mib} MiB own, {image_mib} MiB of images, {after['maps_ram_now']} mappings, "
                 f"{after['pages_discarded'] - before['pages_discarded']} pages")
        test.check(after["pages_overlay_now"] < before["pages_overlay_now"] // 2, "fewer pages are mapped")
        test.check(after["maps_ram_now"] < before["maps_ram_now"], "mappings are fewer again")
        check_maps(test, after, "reported")
        with test.time(f"{check_mib} MiB are touched"):
            wrong = guest.sh(f"python3 /run/check.py {check_mib}", timeout=120).strip()
        test.check_equal(wrong, "0", f"{check_mib} MiB of pages that the guest takes for zeros are zeros")
        latent.check_hashes(test, guest, "/usr/", what="after it")
        guest.shutdown()


def disk_discards(test, directory):
    """fstrim of the root overlay, and a discarded part of a disk that a backing file is beneath."""
    base = latent.random_image(directory / "base.raw", 32)
    top = directory / "top.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top], check=True)
    disk = latent.extra_disk(top, "data", "qcow2", read_only=False)
    disk[1] += ",discard=unmap"
    with VM("trim", latent=EVERYTHING, extra=disk, drive_opts="discard=unmap") as guest:
        guest.sh("head -c 50000000 /dev/urandom > /big; sync")
        used = guest.disk.stat().st_blocks
        guest.sh("rm /big; sync; fstrim /")
        test.check(guest.disk.stat().st_blocks * 512 < used * 512 - 40 * MIB, "fstrim shrinks the overlay disk")
        latent.check_hashes(test, guest, "/usr/lib/", what="after fstrim")

        guest.sh_start("sleep 600 < /dev/vdb")
        test.check_equal(guest.sh("sha256sum /dev/vdb").split()[0], latent.sha256(base), "the disk is read right")
        test.check(latent.volume(latent.stat(guest), base)["pages_mapped_now"] > 30 * 256, "and mapped")
        guest.sh("blkdiscard -o 8M -l 16M /dev/vdb; echo 3 > /proc/sys/vm/drop_caches")
        data = base.read_bytes()
        (directory / "expected").write_bytes(data[:8 * MIB] + bytes(16 * MIB) + data[24 * MIB:])
        test.check_equal(guest.sh("sha256sum /dev/vdb").split()[0], latent.sha256(directory / "expected"),
                         "what was discarded reads as zeros, and nothing else changed")
        guest.shutdown()


def body(test):
    test.need_latent()
    latent.private_run_dir()
    directory = Path(tempfile.mkdtemp(prefix="latent-discards-"))
    try:
        balloon(test)
        balloon_with_few_mappings(test)
        reporting(test, "report", "", 500)
        reporting(test, "report1", "page_reporting.page_reporting_order=0", 500)
        disk_discards(test, directory)
        test.check_equal(latent.vm_dirs(), [], "no run-time directory is left")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


case.main("Memory that a guest gives back is given back, and reads as zeros where that is due.", body,
          timeout_s=600)
