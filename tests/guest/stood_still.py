#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""QEMU, or its main loop, stands still while an image is wanted for writing, until the kernel waits no longer."""

import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path

from lib import case, host, latent
from lib.vm import VM

EVERYTHING = ["--min-run", "1", "--share-threshold", "0"]
LEASE_BREAK_S = int(Path("/proc/sys/fs/lease-break-time").read_text())


class Writer(threading.Thread):
    """Opens a file for writing, which takes as long as its lease is not given back, and changes it."""

    def __init__(self, path, change):
        super().__init__(daemon=True)
        self.path, self.change = path, change
        self.waited_s = None
        self.start()

    def run(self):
        start_s = time.monotonic()
        with open(self.path, "r+b") as file:
            self.waited_s = time.monotonic() - start_s
            self.change(file)


def nothing(_):
    pass


def overwrite(file):
    file.write(bytes(latent.DataDisk.MIB << 20))


def cut(file):
    file.truncate(4096)


def read_in(test, guest, disks):
    for letter, disk in zip("bcd", disks):
        test.check_equal(disk.read_in(guest, f"/dev/vd{letter}"), disk.sha256, f"{disk.name} is read right")
        pages = latent.volume(latent.stat(guest), disk.path)["pages_mapped_now"]
        test.check(pages > disk.MIB * 256 * 0.9, f"{disk.name}: {pages} pages are mapped")


def join(writers):
    for writer in writers:
        writer.join(LEASE_BREAK_S + 60)
    return [writer.waited_s or 0 for writer in writers]


def status(guest):
    return guest.qmp("query-status")["status"]


def qemu_is_stopped(test, directory):
    """What could have been changed is said and the guest is stopped; what was cut ends it, with the place."""
    opened, changed, shortened = disks = [latent.DataDisk(directory, name) for name in ("opened", "changed", "shortened")]
    with VM("still", latent=EVERYTHING, extra=[word for disk in disks for word in disk.arguments()]) as guest:
        read_in(test, guest, disks)
        host.stop_process(guest.pid)
        waited = join([Writer(opened.path, nothing), Writer(changed.path, overwrite), Writer(shortened.path, cut)])
        os.kill(guest.pid, signal.SIGCONT)
        test.check(min(waited) > LEASE_BREAK_S - 2, f"writers were let in after {min(waited):.0f} s")
        guest.wait_status("paused")
        latent.wait_for("both are said", lambda: all(f"{disk.path} was changed while QEMU stood still"
                                                     in guest.qemu_log.read_text() for disk in (changed, shortened)))
        test.check(f"{opened.path} was changed" not in guest.qemu_log.read_text(), "of an image that was only opened nothing is said")
        test.check("stood still" in latent.stat(guest)["message"] or "wanted" in latent.stat(guest)["message"],
                   "`latent stat` has it")
        guest.qmp("cont")
        test.check_equal(opened.hash_in(guest), opened.sha256, "what was read of the image that was only opened is as it was")
        test.check_equal(status(guest), "running", "after `cont` the guest runs, and is not stopped again")
        guest.sh_start(f"sha256sum {shortened.node}")
        guest.process.wait(60)
        said = f"from {shortened.path} at byte "
        test.check("a page of guest RAM cannot be read: offset 0x" in guest.qemu_log.read_text()
                   and said in guest.qemu_log.read_text(), "QEMU ends of the page that was cut off, and its place is said")
        guest.kill9()


def main_loop_hangs(test, directory):
    """With io_uring in use only QEMU's main loop can stop the guest. It waits for a client of a character device here."""
    disk = latent.DataDisk(directory, "held")
    other = latent.random_image(directory / "uring.raw", 1)
    drive = ["-drive", f"file={other},format=raw,if=none,id=uring,readonly=on,aio=io_uring",
             "-device", "virtio-blk-pci,drive=uring"]
    with VM("hangs", latent=EVERYTHING, extra=[*disk.arguments(), *drive]) as guest:
        read_in(test, guest, [disk])
        guest.sh("cat /dev/vdc > /dev/null")
        door = directory / "door.sock"
        hang = threading.Thread(target=guest.qmp, args=["chardev-add"], kwargs={
            "timeout_s": LEASE_BREAK_S + 60, "id": "door", "backend": {"type": "socket", "data": {"server": True, "wait": True, "addr": {
                "type": "unix", "data": {"path": str(door)}}}}}, daemon=True)
        hang.start()
        latent.wait_for("QEMU's main loop waits", door.exists)
        waited = join([Writer(disk.path, overwrite)])
        test.check(LEASE_BREAK_S / 2 < waited[0] < LEASE_BREAK_S, f"the writer was let in after {waited[0]:.0f} s")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(door))
            hang.join(20)
            test.check("is given back though the guest could not be stopped" in guest.qemu_log.read_text(), "it is said")
            test.check_equal(disk.hash_in(guest), disk.sha256, "what the guest had read is as it was")
            latent.wait_for("the pages are moved to plain RAM",
                            lambda: not latent.overlay_mappings(guest.pid, disk.path), 120)
            test.check_equal(disk.hash_in(guest), disk.sha256, "and still is")
            guest.shutdown()


def body(test):
    test.need_latent()
    latent.private_run_dir()
    directory = Path(tempfile.mkdtemp(prefix="latent-still-"))
    try:
        qemu_is_stopped(test, directory)
        main_loop_hangs(test, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


case.main("A guest whose VMM stands still for too long does not go on with what was changed beneath it.", body,
          timeout_s=600)
