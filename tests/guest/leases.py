#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Images that change while they are mapped: the writer waits, the guest keeps what it has read."""

import os
import re
import shutil
import struct
import subprocess
import tempfile
import time
from pathlib import Path

from lib import case, latent
from lib.qmp import QmpError
from lib.vm import VM, GuestError

EVERYTHING = ["--min-run", "1", "--share-threshold", "0"]
WRITE_FILES = """set -e
mkdir /new
for i in $(seq 16); do head -c $((i * 250000)) /dev/urandom > /new/$i; done
cp -a /usr/share/perl /new/perl
find /new -type f -print0 | xargs -0 sha256sum > /new.sha256
sync
"""
CHECK_FILES = "sha256sum -c --quiet /new.sha256"
# What is committed: changed and new blocks over those of the backing file.
CHANGE_FILES = """set -e
for i in 3 7 11; do head -c $((i * 250000)) /dev/urandom > /new/$i; done
cp -a /usr/include/linux /new/linux
find /new -type f -print0 | xargs -0 sha256sum > /new.sha256
sync
"""
COMMIT_BYTES_PER_S = 6 << 20  # slow enough for reads to meet it
OPEN_MAX_S = 20  # far below the kernel's lease-break-time, 45 s


TAGGED_PAGES = 2048
TAG = struct.Struct("=QQ")  # version and number of a page, over and over
REWRITES = 3
READ_TAGGED = f"""
import mmap, os, struct
disk, buffer, last = os.open("/dev/vdb", os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, 65536), False
while not last:
    last, seen, passes = os.path.exists("/run/end"), set(), globals().get("passes", 0) + 1
    for first in range(0, {TAGGED_PAGES}, 16):
        os.preadv(disk, [buffer], first * 4096)
        for number in range(first, first + 16):
            page = buffer[(number - first) * 4096:(number - first + 1) * 4096]
            tags = [page[:16]] if page == page[:16] * 256 else [page[i:i + 16] for i in range(0, 4096, 16)]
            for version, of in map(struct.Struct("=QQ").unpack, tags):
                assert of == number and version <= {REWRITES}, (version, of, number)
                seen.add(version)
print(passes, *sorted(seen))
"""


def mapped_pages(guest, disk):
    return latent.volume(latent.stat(guest), disk.path)["pages_mapped_now"]


def state(guest, disk):
    return latent.volume(latent.stat(guest), disk.path)["state"]


def start_with_disks(test, disks, **options):
    """A guest that has read all the disks; nearly all of it is mapped."""
    arguments = [word for disk in disks for word in disk.arguments(**options)]
    guest = VM("reader", latent=EVERYTHING, extra=arguments)
    for letter, disk in zip("bcdefg", disks):
        test.check_equal(disk.read_in(guest, f"/dev/vd{letter}"), disk.sha256, f"{disk.name} is read right")
        pages = mapped_pages(guest, disk)
        test.check(pages > latent.DataDisk.MIB * 256 * 0.9, f"{disk.name}: {pages} pages are mapped")
    return guest


def check_given_up(test, guest, disk, why):
    test.check_equal(latent.overlay_mappings(guest.pid, disk.path), [], f"{disk.name} is mapped no more")
    test.check_equal((state(guest, disk), mapped_pages(guest, disk)), (why, 0), f"{disk.name} counts as {why}")
    test.check_equal(disk.hash_in(guest), disk.sha256, f"{disk.name}: what was read is as it was")


def check_pause(test, guest):
    pauses = [float(ms) for ms in re.findall(r"the guest stood for ([\d.]+) ms", guest.qemu_log.read_text())]
    test.check(pauses and max(pauses) < 2000, f"the guest was stopped for {pauses} ms")


def rewrite(path):
    with open(path, "r+b") as file:
        for _ in range(latent.DataDisk.MIB):
            file.write(os.urandom(1 << 20))


def cut(path):
    os.truncate(path, 0)


def change_under_load(test, guest, disk, change, what, load_under):
    load = latent.start_hash(guest, load_under)
    time.sleep(0.5)
    with test.time(f"{disk.name} is {what} by another process") as timer:
        change(disk.path)
    test.check(timer.seconds < OPEN_MAX_S, "the writer had to wait for a moment only")
    check_given_up(test, guest, disk, "writable")
    latent.check_hashes(test, guest, load_under, job=load, what=f"read while an image was {what}")
    check_pause(test, guest)


def new_contents_are_read(test, guest, disk):
    """After the writer has gone, the guest's next reads get what it has written; soon by mapping again."""
    guest.drop_guest_caches()
    test.check_equal(disk.hash_in(guest), latent.sha256(disk.path), f"{disk.name}: new reads get new contents")
    for _ in range(60):
        if state(guest, disk) == "leased":
            break
        time.sleep(1)
    guest.drop_guest_caches()
    test.check_equal(disk.hash_in(guest), latent.sha256(disk.path), f"{disk.name}: and again")
    test.check(mapped_pages(guest, disk) > latent.DataDisk.MIB * 256 * 0.9, "the image is leased and mapped again")


def changed_once_more(test, guest, disk):
    before = disk.hash_in(guest)
    rewrite(disk.path)
    check_given_up_as(test, guest, disk, before)


def check_given_up_as(test, guest, disk, sha256):
    test.check_equal(latent.overlay_mappings(guest.pid, disk.path), [], f"{disk.name} is given up a second time")
    test.check_equal(disk.hash_in(guest), sha256, f"{disk.name}: the guest has what it had read")


def detach_by_command(test, guest, disk):
    text = latent.run("detach", guest.name, disk.path)
    test.say(f"latent detach: {text.strip()}")
    check_given_up(test, guest, disk, "detached")


def detach_all(test, guest):
    text = latent.run("detach", guest.name)
    test.say(f"latent detach: {text.strip()}")
    figures = latent.stat(guest)
    test.check_equal((figures["pages_overlay_now"], figures["pages_private_now"]), (0, 0), "all RAM is plain")
    test.check_equal(guest.ram_kib()["image"]["rss_kib"], 0, "no image is mapped into guest RAM")
    latent.check_hashes(test, guest, "/usr/lib/", what="after everything was detached")


def write_tagged(path, version):
    with open(path, "r+b") as file:
        for number in range(TAGGED_PAGES):
            file.write(TAG.pack(version, number) * 256)


def is_mapped(guest, path):
    one = latent.volume(latent.stat(guest), path)
    return one and one["state"] == "leased" and one["pages_mapped_now"] > 0


def read_while_rewritten(test, directory):
    """The guest reads the very image that changes: each page is what it was or what it becomes, never another one's."""
    path = directory / "tagged.raw"
    path.touch()
    write_tagged(path, 0)
    with VM("reads", latent=EVERYTHING, extra=latent.extra_disk(path, "tagged")) as guest:
        guest.put(READ_TAGGED.encode(), "/run/read.py")
        reader = guest.sh_start("python3 /run/read.py")
        for version in range(1, REWRITES + 1):
            latent.wait_for("it is leased and mapped", lambda: is_mapped(guest, path))
            write_tagged(path, version)
        guest.sh("touch /run/end")
        passes, *versions = map(int, reader.wait(120).split())
        test.check_equal(versions, [REWRITES], f"{passes} times read beside {REWRITES} writers: at last all is new")
        guest.shutdown()


def others_change_images(test, directory):
    disks = [latent.DataDisk(directory, name) for name in ("rewritten", "cut", "detached")]
    with start_with_disks(test, disks) as guest:
        change_under_load(test, guest, disks[0], rewrite, "rewritten", "/usr/lib/")
        change_under_load(test, guest, disks[1], cut, "truncated", "/usr/share/")
        detach_by_command(test, guest, disks[2])
        new_contents_are_read(test, guest, disks[0])
        changed_once_more(test, guest, disks[0])
        detach_all(test, guest)
        wrong = latent.command("detach", guest.name, directory / "none.raw")
        test.check(wrong.returncode != 0 and wrong.stderr.count("\n") == 1,
                   f"an image that is not there: {wrong.stderr.strip()}")
        guest.shutdown()


def start_writer(disk, shared):
    options = ",share-rw=on" if shared else ""
    return VM("writer", latent=[], extra=disk.arguments(read_only=False, device_options=options))


def refused(test, guest, disk):
    """QEMU's own image locks: the reader does not share it with writers."""
    with start_writer(disk, shared=False) as writer:
        status = writer.process.wait(30)
        test.check(status == 1 and 'Failed to get "write" lock' in writer.qemu_log.read_text(),
                   "a second VM cannot open the image for writing, and QEMU says why")
    test.check_equal(disk.hash_in(guest), disk.sha256, f"{disk.name}: the reader has it as it was")


def second_vm_writes(test, directory):
    alone, shared = latent.DataDisk(directory, "alone"), latent.DataDisk(directory, "shared")
    with start_with_disks(test, [alone]) as guest:
        refused(test, guest, alone)
    with start_with_disks(test, [shared], device_options=",share-rw=on") as guest:
        with start_writer(shared, shared=True) as writer:
            writer.sh(f"head -c {latent.DataDisk.MIB << 20} /dev/urandom > /dev/vdb; sync")
            check_given_up(test, guest, shared, "writable")
            test.check(latent.sha256(shared.path) != shared.sha256, "the second VM has written the image")
            writer.shutdown()
        new_contents_are_read(test, guest, shared)


def written_from_the_start(test, directory):
    disk = latent.DataDisk(directory, "busy")
    with open(disk.path, "r+b"):
        with VM("reader", latent=EVERYTHING, extra=disk.arguments()) as guest:
            test.check_equal(disk.read_in(guest, "/dev/vdb"), disk.sha256, "an image that somebody writes is right")
            one = latent.volume(latent.stat(guest), disk.path)
            test.check_equal(one["state"], "writable", "its state says why it is not mapped")
            test.check(one["misses"]["writable"]["bytes"] >= latent.DataDisk.MIB << 20 and one["bytes_shortcut"] == 0,
                       "its reads are counted as copied for that reason")


def wait_job(guest, wanted_event, timeout_s=60):
    try:
        event = guest.monitor.wait_event(wanted_event, timeout_s)
    except QmpError as error:
        raise GuestError(f"no {wanted_event}: {error}; jobs: {guest.qmp('query-block-jobs')}") from error
    if event["data"].get("error"):
        raise GuestError(f"{wanted_event}: {event['data']['error']}")


def commit_under_load(test, guest, base):
    load = guest.sh_start(f"while :; do {CHECK_FILES} || exit 1; "
                          "echo 3 > /proc/sys/vm/drop_caches; [ -e /run/end ] && exit 0; done")
    hashing = latent.start_hash(guest, "/usr/lib/")
    with test.time("block-commit into the backing file"):
        guest.qmp("block-commit", job_id="commit", device="root", base=str(base), speed=COMMIT_BYTES_PER_S)
        wait_job(guest, "BLOCK_JOB_READY")
        guest.qmp("block-job-complete", device="commit")
        wait_job(guest, "BLOCK_JOB_COMPLETED")
    guest.sh("touch /run/end")
    load.wait(120)
    test.say("the guest's files were right during the commit")
    latent.check_hashes(test, guest, "/usr/lib/", job=hashing, what="read during the commit")


def block_commit(test, directory):
    base = directory / "base.qcow2"
    with VM("first", latent=[]) as first:
        first.sh(WRITE_FILES, timeout=120)
        first.shutdown()
        shutil.move(first.disk, base)
    with VM("commit", image=base, latent=EVERYTHING) as guest:
        guest.sh(CHECK_FILES)
        guest.sh(CHANGE_FILES, timeout=120)
        one = latent.volume(latent.stat(guest), base)
        test.check(one["state"] == "leased" and one["pages_mapped_now"] > 1000,
                   f"{one['pages_mapped_now']} pages of the backing file are mapped before")
        commit_under_load(test, guest, base)
        one = latent.volume(latent.stat(guest), base)
        test.check_equal((one["state"], one["pages_mapped_now"]), ("writable", 0), "it was given up")
        guest.drop_guest_caches()
        guest.sh(f"{CHECK_FILES} && {CHANGE_FILES} {CHECK_FILES}", timeout=120)
        test.say("the guest's files are right after it, and when they are written again")
        guest.shutdown()
    subprocess.run(["qemu-img", "check", "-q", base], check=True)
    with VM("after", image=base, overlay=False) as guest:
        guest.sh(CHECK_FILES)
        latent.check_hashes(test, guest, "/usr/lib/", what="in the image after the commit, by plain QEMU")
        guest.shutdown()


def body(test):
    test.need_latent()
    latent.private_run_dir()
    directory = Path(tempfile.mkdtemp(prefix="latent-leases-"))
    try:
        others_change_images(test, directory)
        read_while_rewritten(test, directory)
        written_from_the_start(test, directory)
        second_vm_writes(test, directory)
        block_commit(test, directory)
        latent.run("ps")
        test.check_equal(latent.vm_dirs(), [], "no run-time directory is left")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


case.main("A guest keeps what it has read when its images are rewritten, cut or committed into.", body,
          timeout_s=600)
