#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Copies on write that were swapped out are copies still: in the counts, and when all is given up."""

import contextlib
import ctypes
import os
import re
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


def body(test):
    test.need_latent()
    latent.private_run_dir()
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
        guest.shutdown()
    test.check_equal(latent.vm_dirs(), [], "no run-time directory is left")


case.main("Pages that were swapped out keep their contents and their place in the counts.", body, timeout_s=300)
