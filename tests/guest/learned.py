#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""What the first restore of a snapshot asks for, the next ones bring before the guest runs."""

import os
import re
import shutil
import struct
import tempfile
from pathlib import Path

from lib import activity, case, host, latent
from lib.vm import VM

HELD_MIB = 32  # never looked at in the first second
READ_MIB = 4   # that the guest reads then
SPARSE_PAGES, SPARSE_STEP = 256, 16  # of so many pages it reads one in each step
READ_SPARSE = "; ".join(f"latent-guest mem check s {page} 1" for page in range(0, SPARSE_PAGES, SPARSE_STEP))
TRIES = 6      # on a busy machine it may read it later
MEM = "256M"
LIST_PAGES = 4096  # LEARN_PAGES of src/qemu/learner.c
HEADER, RECORD = struct.Struct("=QIIQQQ"), struct.Struct("=QII")  # src/snapshot/active.h
PRESENT = 1 << 63


def records(path):
    data = path.read_bytes()
    n_pages = HEADER.unpack_from(data)[3]
    return [RECORD.unpack_from(data, HEADER.size + i * RECORD.size)[0] for i in range(n_pages)]


def lists():
    """Those that are complete."""
    return [path for path in Path(os.environ["LATENT_CACHE_DIR"], "learned").glob("*") if not path.name.startswith(".")]


def digests(snapshot):
    return {path: latent.sha256(path) for path in sorted(snapshot.rglob("*")) if path.is_file()}


def share_there(guest, pages):
    """Of these pages of guest RAM, how many are in QEMU's page table."""
    words = latent.pagemap_words
    first = guest.ram_hva() // host.PAGE_BYTES
    with open(f"/proc/{guest.pid}/pagemap", "rb", buffering=0) as pagemap:
        return sum(bool(words(pagemap, (first + page) * host.PAGE_BYTES, (first + page + 1) * host.PAGE_BYTES)[0] & PRESENT)
                   for page in pages) / len(pages)


def restore(guest, snapshot, *options):
    for name in ("ram", "active"):
        host.drop_from_page_cache(snapshot / name, may_remain_pages=1 << 60)
    guest.restore(snapshot, *options)
    guest.wait_status("paused" if "--paused" in options else "running", timeout_s=60)


def check(test, guest, nonce, what):
    test.check_equal(guest.sh("cat /run/nonce"), nonce, f"{what}: it is the saved guest")
    for holder in "mrs":
        test.check(guest.sh(f"latent-guest mem check {holder}", timeout=120).startswith("ok"), f"{what}: every page of {holder} is right")


def gfns(guest, holder):
    """Of what a program in the guest holds; RAM lies below the PCI hole, so that these are the snapshot's numbers."""
    runs = [line.split() for line in guest.sh(f"latent-guest mem pfns {holder}").splitlines()]
    return {int(pfn) + i for words in runs if len(words) == 3 and all(word.isdigit() for word in words)
            for _, pfn, count in [words] for i in range(int(count))}


def sees_single_pages():
    """Linux 6.7: pages can be registered so that the kernel maps no neighbours of one that is touched."""
    return tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= (6, 7)


def learn(test, guest, snapshot, held, read, sparse):
    """One restore; the list that it leaves has what the guest has read, and little of what it has not."""
    active = set(records(snapshot / "active"))
    for _ in range(TRIES):
        restore(guest, snapshot)
        test.check(guest.sh(f"{READ_SPARSE}; latent-guest mem check r").splitlines()[-1].startswith("ok"),
                   f"the guest reads {READ_MIB} MiB, and some single pages")
        latent.wait_for("a list", lists)
        guest.kill9()
        [path] = lists()
        pages = set(records(path))
        share = len(pages & (read - active)) / len(read - active)
        if share > 0.95:
            break
        path.unlink()
    test.check(share > 0.95, f"{share:.0%} of what the guest read is in the list")
    test.check(len(records(path)) == len(pages) <= LIST_PAGES and not active & pages,
               f"{len(pages)} pages, each once, none of the active set's {len(active)}")
    test.check(len(pages & held) < len(held) / 20, f"{len(pages & held)} of {len(held)} that it did not read")
    if sees_single_pages():
        test.check(SPARSE_PAGES / SPARSE_STEP / 2 < len((pages | active) & sparse)
                   and len(pages & sparse) < 2 * SPARSE_PAGES / SPARSE_STEP,
                   f"{len(pages & sparse)} of {SPARSE_PAGES} pages of which it read {SPARSE_PAGES // SPARSE_STEP}, and no neighbours")
    return path, pages


def body(test):
    test.need_latent()
    latent.private_run_dir()
    # On the file system of the VMs' disks: these become part of the snapshot.
    directory = Path(tempfile.mkdtemp(prefix="latent-learned-"))
    snapshot = directory / "snapshot"
    try:
        with VM("learns", latent=[], mem=MEM) as guest:
            guest.sh(f"latent-guest mem hold m {HELD_MIB} 11 mixed && latent-guest mem hold r {READ_MIB} 12 random && "
                     f"latent-guest mem hold s {SPARSE_PAGES >> 8} 13 random", timeout=60)
            held, read, sparse = gfns(guest, "m"), gfns(guest, "r"), gfns(guest, "s")
            nonce = guest.sh("head -c 16 /dev/urandom | sha256sum | tee /run/nonce")
            latent.run("save", guest.name, snapshot)
            guest.kill9()
            before = digests(snapshot)
            path, pages = learn(test, guest, snapshot, held, read, sparse)
            used(test, guest, snapshot, nonce, path, pages)
            from_one_piece(test, guest, snapshot, nonce, path)
            damaged(test, guest, snapshot, nonce, path)
            of_other_files(test, guest, snapshot, nonce, path)
            test.check(digests(snapshot) == before, "the snapshot is what it was, byte by byte")
    finally:
        latent.end_all_vms()
        shutil.rmtree(directory, ignore_errors=True)


def used(test, guest, snapshot, nonce, path, pages):
    """A guest that has not run yet has them; without the list it does not."""
    restore(guest, snapshot, "--paused")
    share = share_there(guest, pages)
    test.check(share >= 0.99, f"{share:.0%} of them are there before the guest runs")
    guest.qmp("cont")
    check(test, guest, nonce, "with the list")
    guest.kill9()
    list_before = path.read_bytes()
    path.rename(path.parent / ".aside")
    restore(guest, snapshot, "--paused")
    share = share_there(guest, pages)
    test.check(share < 0.5, f"without the list {share:.0%} of them are")
    guest.kill9()
    test.check_equal(lists(), [], "a guest that has not run has asked for nothing")
    (path.parent / ".aside").rename(path)
    test.check(path.read_bytes() == list_before, "a list that is there is not made again")


def from_one_piece(test, guest, snapshot, nonce, path):
    """Pages of files that are not in memory come from the copy beside the list; if that is damaged, from where they are."""
    restore(guest, snapshot, "--paused")
    table = activity.entries(guest)
    copied = sum(table[page] & activity.SOURCE_MASK in (activity.BASE, activity.WATCHED) for page in records(path))
    test.check(copied == len(records(path)), f"{copied} of {len(records(path))} pages were copied")
    guest.qmp("cont")
    check(test, guest, nonce, "copied")
    guest.kill9()
    data = bytearray(path.read_bytes())
    for at in range(len(data) - len(records(path)) * host.PAGE_BYTES, len(data), host.PAGE_BYTES):
        data[at] ^= 1
    path.write_bytes(data)
    restore(guest, snapshot)
    check(test, guest, nonce, "copies with flipped bits")
    test.check(not path.exists(), "and they are gone")
    guest.kill9()
    restore(guest, snapshot)
    latent.wait_for("they are made anew", path.exists)
    guest.kill9()


def of_other_files(test, guest, snapshot, nonce, path):
    """What was learned from files as they were is nothing to them as they are."""
    ram = snapshot / "ram"
    ram.chmod(ram.stat().st_mode)  # the time of its change is another one
    restore(guest, snapshot)
    check(test, guest, nonce, "another time of change")
    latent.wait_for("another time of change: it is learned anew", lambda: len(lists()) == 2)
    guest.kill9()
    path.unlink()


def damaged(test, guest, snapshot, nonce, path):
    """Nothing depends on it, and the next restore makes it anew."""
    good = path.read_bytes()
    for what, data in (("cut", good[:len(good) // 2]), ("with a flipped bit", good[:40] + bytes([good[40] ^ 1]) + good[41:]),
                       ("empty", b"")):
        path.write_bytes(data)
        restore(guest, snapshot)
        check(test, guest, nonce, what)
        latent.wait_for(f"{what}: it is made anew", lambda: path.read_bytes() != data)
        guest.kill9()
        test.check(len(records(path)) > 0, f"{what}: and is whole")
    path.unlink()
    os.mkfifo(path)  # nobody waits for a writer
    restore(guest, snapshot)
    check(test, guest, nonce, "a pipe in its place")
    latent.wait_for("a pipe in its place: a list is made", path.is_file)
    guest.kill9()


case.main("What the first restore asks for is remembered, and brought before the guest runs by those that come after it.",
          body, timeout_s=300)
