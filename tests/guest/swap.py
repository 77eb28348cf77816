#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Copies on write that were swapped out are copies still: in the counts, in a save, and when all is given up."""

import contextlib
import ctypes
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from lib import case, host, latent, vm
from lib.vm import VM

MIB = 1 << 20
SWAP_MIB = 1024
HELD_MIB = 400
FILES = "/usr/lib/"
MORE_FILES = "/usr/share/"
EVERYTHING = ["--min-run", "1", "--share-threshold", "0"]
SYS_PROCESS_MADVISE, MADV_PAGEOUT = 440, 21
IOV_MAX = 512
_libc = ctypes.CDLL(None, use_errno=True)


class Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


@contextlib.contextmanager
def swap_space(test):
    """A swap file for the time of the test; skips where the machine does not allow one."""
    handle, name = tempfile.mkstemp(prefix="latent-swap-", dir="/var/tmp")
    try:
        os.posix_fallocate(handle, 0, SWAP_MIB * MIB)
        os.close(handle)
        for command in (["/usr/sbin/mkswap", name], ["/usr/sbin/swapon", name]):
            if subprocess.run(command, capture_output=True).returncode != 0:
                test.skip(f"no swap can be had here: {command[0]} failed")
        try:
            yield
        finally:
            subprocess.run(["/usr/sbin/swapoff", name], check=False)
    finally:
        os.unlink(name)


def page_out(test, guest):
    """Asks the kernel to take all of guest RAM out of memory: copies and the VM's own to swap."""
    hva = guest.ram_hva()
    end = hva + vm.parse_bytes(guest.mem)
    parts = [(m["start"], m["end"]) for m in host.mappings(guest.pid) if hva <= m["start"] < end]
    pidfd = os.pidfd_open(guest.pid)
    for i in range(0, len(parts), IOV_MAX):
        batch = parts[i:i + IOV_MAX]
        vector = (Iovec * len(batch))(*(Iovec(first, last - first) for first, last in batch))
        if _libc.syscall(SYS_PROCESS_MADVISE, pidfd, vector, len(batch), MADV_PAGEOUT, 0) < 0:
            test.skip(f"guest RAM cannot be paged out here: {os.strerror(ctypes.get_errno())}")
    os.close(pidfd)
    test.say(f"paged out: {used_swap_mib()} MiB of swap are used")


def used_swap_mib():
    figures = dict(re.findall(r"(\w+): +(\d+) kB", Path("/proc/meminfo").read_text()))
    return int(figures["SwapTotal"]) - int(figures["SwapFree"]) >> 10


def swapped_copies(guest, image):
    """Private copies in overlays that are in swap now."""
    count = 0
    with open(f"/proc/{guest.pid}/pagemap", "rb", buffering=0) as pagemap:
        for start, end, _ in latent.overlay_mappings(guest.pid, image):
            count += sum(1 for word in latent.pagemap_words(pagemap, start, end)
                         if word & latent.PAGE_SWAPPED and not word & (latent.PAGE_PRESENT | latent.PAGE_FILE))
    return count


def check_counts(test, guest, image, what):
    """The counts are those of pagemap, with the guest stopped; returns the copies."""
    guest.qmp("stop")
    figures = latent.stat(guest)
    mapped, copies = latent.count_mapped(guest.pid, image)
    swapped = swapped_copies(guest, image)
    found = latent.Track(image).counts()
    guest.qmp("cont")
    test.check_equal((figures["pages_private_now"], latent.volume(figures, image)["pages_mapped_now"]),
                     (copies, sum(mapped.values())),
                     f"{what}: {copies} copies (of them {swapped} in swap), {sum(mapped.values())} pages mapped")
    test.check_equal(found, mapped, f"{what}: the tracking structure agrees")
    return copies, swapped


def check_memory(test, guest, what):
    test.check(guest.sh("latent-guest mem check m", timeout=120).startswith("ok"), f"the guest's memory is right {what}")


def physical_memory(guest):
    """All of guest RAM below the PCI hole, as QEMU sees it, as a list of pages' digests."""
    path = guest.dir / "ram.bin"
    guest.qmp("pmemsave", val=0, size=vm.parse_bytes(guest.mem), filename=str(path))
    with open(path, "rb") as file:
        digests = [hash(page) for page in iter(lambda: file.read(host.PAGE_BYTES), b"")]
    path.unlink()
    return digests


def save_from_swap(test, guest, image, snapshot):
    """The stopped guest's pages, of which most were in swap when it was saved."""
    guest.qmp("stop")
    page_out(test, guest)
    swapped = swapped_copies(guest, image)
    figures = json.loads(latent.run("save", "--json", guest.name, snapshot, timeout_s=120))
    test.check(figures["private_pages"] > 10000 and swapped > figures["private_pages"] // 2,
               f"saved: {figures['private_pages']} copies, of which {swapped} were in swap")
    test.check(latent.run("verify", snapshot).endswith("is whole\n"), "the snapshot is whole")
    pages = physical_memory(guest)
    guest.qmp("cont")
    return pages


def save_live_from_swap(test, guest, snapshot):
    page_out(test, guest)
    used_mib = used_swap_mib()
    figures = json.loads(latent.run("save", "--json", guest.name, snapshot, timeout_s=120))
    test.check(used_mib << 8 > figures["pages_stored"] // 2, f"saved while it ran: of {figures['pages_stored'] >> 8} MiB that are stored most were "
               f"in swap, where {used_mib} MiB were")
    check_memory(test, guest, "after that save")


def check_restored(test, guest, stood, pages, live):
    guest.kill9()
    guest.restore(stood)
    guest.wait_status("paused")
    found = physical_memory(guest)
    differing = [number for number, pair in enumerate(zip(found, pages)) if pair[0] != pair[1]]
    test.check_equal((len(found), differing[:10]), (len(pages), []), f"restored: {len(pages)} pages are those of the stopped VM")
    guest.qmp("cont")
    check_memory(test, guest, "restored from what was in swap")
    guest.kill9()
    guest.restore(live)
    check_memory(test, guest, "restored from the save while it ran")


def body(test):
    test.need_latent()
    latent.private_run_dir()
    # On the file system of the VM's disk, which becomes part of the snapshots.
    directory = Path(tempfile.mkdtemp(prefix="latent-snapshots-"))
    try:
        run(test, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def run(test, directory):
    image = vm.images_dir() / "golden.qcow2"
    with swap_space(test), VM("swap", latent=EVERYTHING) as guest:
        latent.check_hashes(test, guest, "/usr/")
        # The guest's free memory maps files that it has dropped: what it writes there becomes copies.
        guest.drop_guest_caches()
        guest.sh(f"latent-guest mem hold m {HELD_MIB} 13 random", timeout=60)
        page_out(test, guest)  # at once: nobody has counted the copies yet
        copies, swapped = check_counts(test, guest, image, "swapped out")
        test.check(copies > 10000 and swapped > copies // 2, "there are copies enough, most of them in swap")
        check_memory(test, guest, "when it comes back from swap")
        latent.check_hashes(test, guest, FILES, what="after swap")

        pages = save_from_swap(test, guest, image, directory / "stood")
        check_memory(test, guest, "after the save")
        save_live_from_swap(test, guest, directory / "live")

        page_out(test, guest)
        test.check(swapped_copies(guest, image) > copies // 2, "most copies are in swap again")
        with test.time("detach with swapped pages"):
            test.say(latent.run("detach", guest.name, timeout_s=60).strip())
        test.check_equal(latent.overlay_mappings(guest.pid, image), [], "nothing is mapped any more")
        check_memory(test, guest, "after detach")
        latent.check_hashes(test, guest, FILES, what="after detach")

        page_out(test, guest)  # the VM's own RAM file, too
        check_memory(test, guest, "when all of it comes back from swap")
        latent.check_hashes(test, guest, MORE_FILES, what="in the end")
        check_restored(test, guest, directory / "stood", pages, directory / "live")
        guest.shutdown()
    test.check_equal(latent.vm_dirs(), [], "no run-time directory is left")


case.main("Pages that were swapped out keep their contents and their place in the counts.", body, timeout_s=600)
