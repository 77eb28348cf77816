# SPDX-License-Identifier: BSD-2-Clause-Patent
"""The `latent` command, and what Latent keeps of its VMs: statistics and tracking structures.

    latent.private_run_dir()            # once, before the first VM
    figures = latent.stat(guest)
    latent.volume(figures, image)["bytes_shortcut"]
"""

import array
import atexit
import fcntl
import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from pathlib import Path

from . import host, vm
from .agent import GuestError

# src/cli/cli.h, enum cli_status
USAGE, REFUSED, NO_IMAGE, NO_VM, NO_AGENT, SYSTEM, RUN_DIR, NAME_IN_USE, NO_ANSWER = 64, 65, 66, 67, 69, 71, 73, 74, 75

# src/volume/track.h
TRACK_SLOTS = 60
WORD_COUNT, WORD_READ, WORD_FLIGHT = 0x00ffffff, 1 << 30, 1 << 31
F_OFD_GETLK = 36
FLOCK = struct.Struct("hhqqi4x")

PAGE_PRESENT, PAGE_SWAPPED, PAGE_FILE = 1 << 63, 1 << 62, 1 << 61


# ---- the run-time directory and the command ----

def private_run_dir():
    """A run-time directory that no other test shares; removed when the test ends."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="latent-run-", dir=base))
    os.environ["LATENT_RUNTIME_DIR"] = str(path)
    os.environ["LATENT_CACHE_DIR"] = str(path / ".cache")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def run_dir():
    return Path(os.environ["LATENT_RUNTIME_DIR"])


def vm_dirs():
    """Names of the VMs' directories, dead or alive."""
    return sorted(path.name for path in run_dir().iterdir()
                  if path.is_dir() and path.name not in ("volumes", ".pagers", ".digests", ".cache"))


def end_all_vms():
    """By SIGKILL, whoever started them: what a test does at its end."""
    for name in vm_dirs():
        try:
            os.kill(stat(name)["pid"], signal.SIGKILL)
        except (GuestError, OSError, KeyError):
            pass


def wait_for(what, condition, timeout_s=60):
    """Until condition() holds; returns what it has returned."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > deadline_s:
            raise GuestError(f"not within {timeout_s} s: {what}")
        time.sleep(0.02)
    return found


def physical_memory(guest):
    """The SHA-256 of all of guest RAM below the PCI hole, as QEMU sees it."""
    path = guest.dir / "ram.bin"
    guest.qmp("pmemsave", val=0, size=vm.parse_bytes(guest.mem), filename=str(path))
    digest = sha256(path)
    path.unlink()
    return digest


def pagers(source=""):
    """Process ids of the pagers that use this run-time directory (src/vmdir/pager.h), of sources that begin so."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0] == b"latent-pager" and words[1] == os.fsencode(run_dir() / ".pagers") and \
                words[2].startswith(source.encode()):
            found.append(int(path.parent.name))
    return found


def command(*arguments, timeout_s=60, env=None, before=()):
    """Runs `latent ARGUMENTS`, behind the words `before`; the CompletedProcess with text output, whatever its status."""
    return subprocess.run([*before, vm.BUILD_DIR / "latent", *map(str, arguments)], stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=timeout_s,
                          env=dict(os.environ, **(env or {})))


def popen(*arguments):
    """A `latent` command that goes on beside the test; its messages are not kept."""
    return subprocess.Popen([vm.BUILD_DIR / "latent", *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL)


def start(*arguments):
    """The same, with what it says kept."""
    return subprocess.Popen([vm.BUILD_DIR / "latent", *map(str, arguments)], stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments, timeout_s=60):
    """Runs `latent ARGUMENTS`; its standard output. Raises on a status other than 0."""
    result = command(*arguments, timeout_s=timeout_s)
    if result.returncode != 0:
        raise GuestError(f"latent {' '.join(map(str, arguments))}: status {result.returncode}: "
                         f"{result.stderr.strip()}")
    return result.stdout


def stat(guest):
    """`latent stat NAME --json`, refreshed: copies and groups are those of this moment."""
    figures = json.loads(run("stat", guest if isinstance(guest, str) else guest.name, "--json"))
    if not figures["refreshed"]:
        raise GuestError(f"{guest}: the agent did not refresh its statistics")
    return figures


def volume(figures, image):
    """The part of the statistics that is about one image, or None."""
    status = os.stat(image)
    for one in figures["volumes"]:
        if (one["dev"], one["ino"]) == (status.st_dev, status.st_ino):
            return one
    return None


def shortcut_percent(figures, image):
    one = volume(figures, image)
    return 100 * one["bytes_shortcut"] / one["bytes_asked"]


def describe(one):
    """A volume's figures in a line."""
    misses = {key: miss["bytes"] for key, miss in one["misses"].items() if miss["bytes"]}
    return (f"{os.path.basename(one['path'])}: {one['state']}, {one['bytes_shortcut'] >> 10} of "
            f"{one['bytes_asked'] >> 10} KiB shortcut in {one['maps']} maps, "
            f"(minimum run {one['min_run_pages_now']}), {one['bytes_from_storage'] >> 10} KiB from storage; "
            f"not: {misses}")


def base_bytes(guest):
    """Memory that the VM's own RAM file holds."""
    for link in Path(f"/proc/{guest.pid}/fd").iterdir():
        try:
            if os.readlink(link).startswith("/memfd:latent-ram:"):
                return os.stat(link).st_blocks * 512
        except OSError:  # closed meanwhile
            pass
    raise GuestError(f"{guest.name}: no RAM file")


# ---- contents ----

def parse_sums(text):
    """Lines "DIGEST  PATH" as a dictionary {path: digest}."""
    return {path.replace("//", "/"): digest
            for digest, path in (line.split("  ", 1) for line in text.splitlines())}


def golden_hashes(under="/"):
    """{path: hash64} of the files of the golden image below a directory."""
    sums = parse_sums((vm.images_dir() / "golden.hash64").read_text())
    chosen = {path: digest for path, digest in sums.items() if path.startswith(under)}
    if not chosen:
        raise ValueError(f"the image has no files below {under}")
    return chosen


def start_hash(guest, under="/", root=""):
    """Starts to hash files in the guest; check_hashes takes the job.

    root: where the image's root is mounted in the guest.
    """
    return guest.sh_start(f"latent-guest hash -r {root}{under}")


def differing_hashes(job, under="/", root="", timeout_s=180):
    """Paths whose contents are not those of the golden image, or that are missing."""
    found = {path[len(root):]: digest for path, digest in parse_sums(job.wait(timeout_s)).items()}
    return sorted(path for path, digest in golden_hashes(under).items() if found.get(path) != digest)


def check_hashes(test, guest, under="/", root="", what="", job=None, timeout_s=180):
    """Hashes files in the guest and compares them with the image as it was built."""
    job = job or start_hash(guest, under, root)
    test.check_equal(differing_hashes(job, under, root, timeout_s), [],
                     f"{guest.name}: {len(golden_hashes(under))} files of {under} are right"
                     + (f" {what}" if what else ""))


def extra_disk(path, name, image_format="raw", read_only=True, device_options=""):
    """QEMU arguments of one more disk; the first one is /dev/vdb in the guest."""
    return ["-drive", f"file={path},format={image_format},if=none,id={name},"
            f"readonly={'on' if read_only else 'off'}",
            "-device", f"virtio-blk-pci,drive={name}{device_options}"]


def random_image(path, mib):
    """A file of random bytes; returns its path."""
    with open(path, "wb") as file:
        for _ in range(mib):
            file.write(os.urandom(1 << 20))
    return Path(path)


def copy_image(source, target):
    """A copy of an image that the test may change or have for itself."""
    subprocess.run(["cp", "--sparse=always", source, target], check=True)
    return Path(target)


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class DataDisk:
    """A raw image of random bytes, read as a whole by the guest, which keeps it in its page cache."""

    MIB = 32

    def __init__(self, directory, name):
        self.path = random_image(directory / f"{name}.raw", self.MIB)
        self.sha256 = sha256(self.path)
        self.name = name
        self.node = None

    def arguments(self, **options):
        return extra_disk(self.path, self.name, **options)

    def read_in(self, guest, node):
        """The holder keeps the device open: at the last close the guest drops its pages."""
        self.node = node
        guest.sh_start(f"sleep 600 < {node}")
        return self.hash_in(guest)

    def hash_in(self, guest):
        return guest.sh(f"sha256sum {self.node}").split()[0]


# ---- tracking structures ----

class Track:
    """The tracking structure of an image, read from its file (src/volume/track.h)."""

    def __init__(self, image):
        status = os.stat(image)
        self.pages = status.st_size // host.PAGE_BYTES
        self.path = run_dir() / "volumes" / f"{status.st_dev:x}-{status.st_ino:x}-{status.st_size >> 12}.v1"
        row_bytes = self.pages * 4
        self.row_bytes = (row_bytes + host.PAGE_BYTES - 1) // host.PAGE_BYTES * host.PAGE_BYTES

    def alive_slots(self):
        with open(self.path, "r+b") as file:
            return [slot for slot in range(TRACK_SLOTS) if self._is_locked(file, slot)]

    @staticmethod
    def _is_locked(file, slot):
        answer = fcntl.fcntl(file, F_OFD_GETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, slot, 1, 0))
        return FLOCK.unpack(answer)[0] != fcntl.F_UNLCK

    def row(self, slot):
        """The words of one VM, by location."""
        words = array.array("I")
        with open(self.path, "rb") as file:
            file.seek(host.PAGE_BYTES + slot * self.row_bytes)
            words.frombytes(file.read(self.pages * 4))
        return words

    def counts(self):
        """How many guest pages of all living VMs map each location: {page: count}."""
        counts = {}
        for slot in self.alive_slots():
            for page, word in enumerate(self.row(slot)):
                if word & WORD_COUNT:
                    counts[page] = counts.get(page, 0) + (word & WORD_COUNT)
        return counts

    def in_flight(self):
        """The locations that some living VM has in flight."""
        return {page for slot in self.alive_slots() for page, word in enumerate(self.row(slot))
                if word & WORD_FLIGHT}


# ---- what the kernel says ----

def overlay_mappings(pid, image):
    """(start, end, file offset) of the private mappings of an image in a process."""
    inode = os.stat(image).st_ino
    result = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        addresses, perms, offset, _, found_inode = line.split(maxsplit=5)[:5]
        if int(found_inode) == inode and perms.startswith("rw") and perms.endswith("p"):
            start, end = (int(address, 16) for address in addresses.split("-"))
            result.append((start, end, int(offset, 16)))
    return result


def pagemap_words(pagemap, start, end):
    pagemap.seek(start // host.PAGE_BYTES * 8)
    words = array.array("Q")
    words.frombytes(pagemap.read((end - start) // host.PAGE_BYTES * 8))
    return words


def count_mapped(pid, image, counts=None):
    """Adds the guest pages of a QEMU that map each page of an image: ({page: count}, private pages).

    A page of an overlay that is a private copy (not FILE, and present or swapped out) is counted
    apart; all others map the image, whether the page table has heard of it or not.
    """
    counts = {} if counts is None else counts
    private = 0
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        for start, end, offset in overlay_mappings(pid, image):
            first = offset // host.PAGE_BYTES
            for i, word in enumerate(pagemap_words(pagemap, start, end)):
                if not word & PAGE_FILE and word & (PAGE_PRESENT | PAGE_SWAPPED):
                    private += 1
                else:
                    counts[first + i] = counts.get(first + i, 0) + 1
    return counts, private


def groups(counts):
    """(locations mapped by exactly one guest page, by two or more)"""
    one = sum(1 for count in counts.values() if count == 1)
    return one, len(counts) - one
