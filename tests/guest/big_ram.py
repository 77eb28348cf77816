#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Guest RAM on both sides of the PCI hole, and several processors."""

from lib import case, latent, vm
from lib.vm import VM

EVERYTHING = ["--min-run", "1", "--share-threshold", "0"]
GIB = 1 << 30
HOLD_MIB = 4300  # more than lies above the hole of q35 (4 of 6 GiB), which the guest uses first
BELOW_4G_PAGES = 4 * GIB // 4096


def sides(runs):
    """Pages below and above 4 GiB, of the lines "page pfn count"."""
    below = above = 0
    for line in runs.splitlines():
        words = line.split()
        if len(words) == 3 and all(word.isdigit() for word in words):
            pfn, count = int(words[1]), int(words[2])
            below, above = (below + count, above) if pfn < BELOW_4G_PAGES else (below, above + count)
    return below, above


def overlay_sides(guest):
    """Pages of images that are mapped below and above the hole; guest RAM is contiguous in QEMU."""
    hva = guest.ram_hva()
    result = [0, 0]
    for start, end, _ in latent.overlay_mappings(guest.pid, vm.images_dir() / "golden.qcow2"):
        result[start - hva >= 2 * GIB] += (end - start) // 4096
    return result


def big(test):
    with VM("big", mem="6G", latent=EVERYTHING) as guest:
        test.check("100000000" in guest.sh("grep -i 'system ram' /proc/iomem"), "the guest has RAM above 4 GiB")
        latent.check_hashes(test, guest, "/usr/lib/")
        guest.sh(f"latent-guest mem hold m {HOLD_MIB} 11 word", timeout=180)
        below, above = sides(guest.sh("latent-guest mem pfns m", timeout=60))
        test.check(below > 1000 and above > 1000, f"memory is held: {below} pages below, {above} above 4 GiB")
        latent.check_hashes(test, guest, "/usr/", what=f"beside {HOLD_MIB} MiB of memory in use")
        below, above = overlay_sides(guest)
        test.check(below > 1000 and above > 10000, f"{below} pages are mapped below the hole, {above} above it")
        test.check(guest.sh("latent-guest mem check m", timeout=120).startswith("ok"), "the memory is right")
        latent.run("detach", guest.name, timeout_s=60)
        test.check_equal(overlay_sides(guest), [0, 0], "nothing is mapped after detach")
        latent.check_hashes(test, guest, "/usr/", what="after detach")
        test.check(guest.sh("latent-guest mem check m", timeout=120).startswith("ok"), "and the memory still is")
        guest.shutdown()


def many_processors(test):
    with VM("smp", smp=4, latent=EVERYTHING) as guest:
        test.check_equal(guest.sh("nproc").strip(), "4", "four processors")
        parts = ("/usr/lib/", "/usr/share/", "/usr/bin/", "/usr/include/")
        jobs = [(part, latent.start_hash(guest, part)) for part in parts]
        guest.sh("latent-guest mem hold m 128 4 mixed", timeout=60)
        for part, job in jobs:
            latent.check_hashes(test, guest, part, job=job, what="read by four processors at once")
        guest.drop_guest_caches()
        jobs = [(part, latent.start_hash(guest, part)) for part in parts]
        churn = guest.sh_start("latent-guest mem churn m 0 32768 5 4000")
        for part, job in jobs:
            latent.check_hashes(test, guest, part, job=job, what="beside churn")
        churn.wait(60)
        test.check(guest.sh("latent-guest mem check m").startswith("ok"), "the memory is right")
        guest.shutdown()


def body(test):
    test.need_latent()
    latent.private_run_dir()
    big(test)
    many_processors(test)
    test.check_equal(latent.vm_dirs(), [], "no run-time directory is left")


case.main("6 GiB of RAM across the PCI hole, and four processors: every hash right.", body, timeout_s=600)
