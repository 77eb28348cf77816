#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Two guests read one cold image at once: storage is asked once, and its errors reach both."""

import contextlib
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

from lib import case, host, latent
from lib.vm import VM

DISK_MIB = 4
MIB = 1 << 20
EVERYTHING = ["--min-run", "1", "--share-threshold", "0"]
COPIED = ["--min-run", "60000"]  # no read is as long
SLOW_STORAGE = {"LATENT_FAULT": "storage_read:delay:200"}
READ_ALL = "dd if=/dev/vdb bs=1M status=none | sha256sum"

# Backwards, so that no read-ahead of any kernel brings in what nobody has asked for yet; all blocks
# of the second half first, because where storage fails it fails there.
READ_BACKWARDS = """
import hashlib, mmap, os
BLOCK = 128 << 10
fd = os.open("/dev/vdb", os.O_RDONLY | os.O_DIRECT)
buffer = mmap.mmap(-1, BLOCK)
blocks = []
for at in reversed(range(0, os.lseek(fd, 0, os.SEEK_END), BLOCK)):
    assert os.preadv(fd, [buffer], at) == BLOCK
    blocks.insert(0, bytes(buffer))
print(hashlib.sha256(b"".join(blocks)).hexdigest())
"""


def storage_bytes(guest):
    """What the kernel has read from storage for this QEMU."""
    return int(re.search(r"^read_bytes: (\d+)", Path(f"/proc/{guest.pid}/io").read_text(), re.M)[1])


@contextlib.contextmanager
def two_guests(image, env=None, options=EVERYTHING):
    """Two guests with the image as /dev/vdb, ready, and with nothing of it in memory anywhere."""
    disk = latent.extra_disk(image, "data")
    with VM("one", latent=options, extra=disk, env=env) as one, \
            VM("two", latent=options, extra=disk, env=env) as two:
        for guest in (one, two):
            guest.put(READ_BACKWARDS.encode(), "/run/read.py")
            guest.sh("python3 -c 'import hashlib, mmap'; dd --version; sha256sum --version")  # not cold themselves
        yield one, two


def joined(test, directory, options, what):
    """Whether the reads are mapped or copied, storage is asked once."""
    image = latent.random_image(directory / f"{what}.raw", DISK_MIB)
    expected = latent.sha256(image)
    os.sync()
    with two_guests(image, SLOW_STORAGE, options) as guests:
        # A partition scan at boot has mapped a few pages; those that are mapped cannot be dropped.
        host.drop_from_page_cache(image, may_remain_pages=64)
        before = [storage_bytes(guest) for guest in guests]
        track = latent.Track(image)
        with test.time(f"two guests read the cold image at once, {what}"):
            jobs = [guest.sh_start("python3 /run/read.py") for guest in guests]
            most_in_flight = 0
            while any(job.status is None and not job.lost for job in jobs):
                most_in_flight = max(most_in_flight, len(track.in_flight()))
                time.sleep(0.02)
        for guest, job in zip(guests, jobs):
            test.check_equal(job.wait().split()[0], expected, f"{guest.name} has read the image right")
        test.check(most_in_flight > 0, f"up to {most_in_flight} locations were seen in flight")
        test.check_equal(track.in_flight(), set(), "none is in flight in the end")
        read = [storage_bytes(guest) - earlier for guest, earlier in zip(guests, before)]
        test.check(DISK_MIB * MIB * 0.9 <= sum(read) <= DISK_MIB * MIB * 1.2,
                   f"storage was read once: {[n >> 10 for n in read]} KiB of {DISK_MIB << 10}")
        figures = [latent.volume(latent.stat(guest), image) for guest in guests]
        test.check(sum(one["reads_joined"] for one in figures) > 0,
                   f"reads joined: {[one['reads_joined'] for one in figures]}, "
                   f"pages {[one['pages_joined'] for one in figures]}")
        test.check(sum(one["bytes_from_storage"] for one in figures) <= DISK_MIB * MIB * 1.2,
                   f"counted from storage: {[one['bytes_from_storage'] >> 10 for one in figures]} KiB")
        for guest in guests:
            test.check_equal(guest.sh(READ_ALL).split()[0], expected, f"{guest.name} reads it right when it is held")
        shared = sum(1 for count in track.counts().values() if count >= 2)
        if options == EVERYTHING:
            test.check(shared > DISK_MIB * 256 * 0.9, "the locations are held, each mapped by two")
        else:
            test.check_equal(shared, 0, "they are copied, none is mapped")
        for guest in guests:
            guest.shutdown()


# ---- storage that fails: a loop device whose file is cut ----

class FailingStorage:
    """A file system on a loop device; fail() cuts away the second half of the image in it."""

    def __init__(self, test, directory):
        self.file, self.mount = directory / "storage", directory / "mnt"
        self.mount.mkdir()
        with open(self.file, "wb") as file:
            file.truncate(4 * DISK_MIB * MIB)
        subprocess.run(["/usr/sbin/mke2fs", "-q", "-t", "ext4", "-b", "4096", "-O", "^has_journal", self.file],
                       check=True)
        if subprocess.run(["mount", "-o", "loop", self.file, self.mount], capture_output=True).returncode:
            test.skip("a loop device cannot be mounted here, and nothing else makes storage fail")
        self.image = latent.random_image(self.mount / "image.raw", DISK_MIB)
        self.sha256 = latent.sha256(self.image)
        self.first_half_sha256 = self._first_half()
        subprocess.run(["sync", "-f", self.mount], check=True)

    def _first_half(self):
        half = self.file.with_name("half")
        half.write_bytes(self.image.read_bytes()[:DISK_MIB * MIB // 2])
        return latent.sha256(half)

    def _offset(self, page):
        """Where in the loop device's file a page of the image lies."""
        text = subprocess.run(["/usr/sbin/filefrag", "-v", "-b4096", self.image], capture_output=True, text=True,
                              check=True).stdout
        for match in re.finditer(r"^ *\d+: +(\d+)\.\. +(\d+): +(\d+)\.\.", text, re.M):
            first, last, physical = map(int, match.groups())
            if first <= page <= last:
                return (physical + page - first) * 4096
        raise RuntimeError(f"page {page} has no place: {text}")

    def fail(self):
        first_bad = min(self._offset(page) for page in range(DISK_MIB * 128, DISK_MIB * 256))
        last_good = max(self._offset(page) for page in range(DISK_MIB * 128))
        assert last_good < first_bad, "the image is not in order on its storage"
        self.whole = self.file.read_bytes()
        os.truncate(self.file, first_bad)

    def repair(self):
        self.file.write_bytes(self.whole)

    def close(self):
        subprocess.run(["umount", "-l", self.mount], check=False)


def errors(test, directory):
    storage = FailingStorage(test, directory)
    try:
        with two_guests(storage.image, SLOW_STORAGE) as guests:
            host.drop_from_page_cache(storage.image, may_remain_pages=64)
            storage.fail()
            halves = [guest.sh_start(f"head -c {DISK_MIB * MIB // 2} /dev/vdb | sha256sum") for guest in guests]
            for guest, job in zip(guests, halves):
                test.check_equal(job.wait().split()[0], storage.first_half_sha256, f"{guest.name}: the good half is right")
            jobs = [guest.sh_start("python3 /run/read.py") for guest in guests]
            for guest, job in zip(guests, jobs):
                output = job.wait(60, check=False)
                test.check(job.status != 0 and "Input/output error" in output, f"{guest.name}: the error reaches the guest")
                test.check("vdb" in guest.sh("dmesg | grep 'I/O error'"), f"{guest.name}: its kernel has seen it")
            test.check_equal(latent.Track(storage.image).in_flight(), set(), "nothing stays in flight")
            storage.repair()
            for guest in guests:
                test.check_equal(guest.sh(READ_ALL).split()[0], storage.sha256,
                                 f"{guest.name} lives, and reads all when storage works again")
                guest.shutdown()
    finally:
        storage.close()


def body(test):
    test.need_latent()
    latent.private_run_dir()
    with tempfile.TemporaryDirectory(prefix="latent-join-") as name:
        joined(test, Path(name), EVERYTHING, "mapped")
        joined(test, Path(name), COPIED, "copied")
        errors(test, Path(name))
    test.check_equal(latent.vm_dirs(), [], "no run-time directory is left")


case.main("Reads of one cold block by two guests are one read of storage.", body, timeout_s=480)
