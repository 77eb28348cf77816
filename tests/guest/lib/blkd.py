# SPDX-License-Identifier: BSD-2-Clause-Patent
"""`latent blkd` for tests: starts it, finds and ends its lanes, and says how QEMU is wired to it."""

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

from . import vm
from .agent import GuestError

WORK = Path(__file__).with_name("blk_work.py")
PART_BYTES = 4 << 20  # of a thread of blk_work.py


def lanes_of(pid):
    """The lanes of a domain: its children."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def moved_by(log):
    """What lanes have said when connections ended: (KiB through windows, KiB by copies, guest pages mapped at most), of
    the lane until then."""
    return [tuple(map(int, found)) for found in
            re.findall(r"this lane has moved (\d+) KiB through windows, (\d+) KiB by copies, at most (\d+) guest pages",
                       log.read_text())]


class Blkd:
    """One domain. Closed with the `with` statement."""

    def __init__(self, socket, image, *options):
        self.socket, self.log = Path(socket), Path(f"{socket}.log")
        self.command = [vm.BUILD_DIR / "latent", "blkd", "--socket", socket, "--image", image, *options]
        self.process = None
        self.start()

    def start(self):
        with open(self.log, "ab") as log:
            seen = log.tell()
            self.process = subprocess.Popen([str(word) for word in self.command], stdin=subprocess.DEVNULL,
                                            stdout=log, stderr=log)
        deadline_s = time.monotonic() + 20
        while "latent blkd: serving" not in self.log.read_text()[seen:]:
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                raise GuestError(f"latent blkd did not start: {self.log.read_text()}")
            time.sleep(0.02)

    def lanes(self):
        return lanes_of(self.process.pid)

    def wait_lanes(self, count, without=()):
        """Until there are so many lanes, none of them one of `without`."""
        deadline_s = time.monotonic() + 20
        while len(found := [pid for pid in self.lanes() if pid not in without]) < count:
            if time.monotonic() > deadline_s:
                raise GuestError(f"{count} lanes are not there: {self.log.read_text()}")
            time.sleep(0.05)
        return found

    def kill(self):
        """SIGKILL to the domain, and its lanes die with it."""
        lanes = self.lanes()
        self.process.kill()
        self.process.wait(10)
        deadline_s = time.monotonic() + 10
        while any(os.path.exists(f"/proc/{pid}") for pid in lanes):
            if time.monotonic() > deadline_s:
                raise GuestError("lanes outlive their domain")
            time.sleep(0.02)

    def close(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(10)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.close()


def device(socket, name="blk0", options=""):
    """QEMU's words for a disk; the first one is /dev/vdb in the guest."""
    return ["-chardev", f"socket,id={name},path={socket},reconnect=1",
            "-device", f"vhost-user-blk-pci,chardev={name}{options}"]


def shared_ram(mem):
    """For plain QEMU; latent run has its own."""
    return ["-object", f"memory-backend-memfd,id=ram,size={mem},share=on", "-machine", "memory-backend=ram"]


def start_work(guest, device_path, seconds, threads, seed):
    guest.put(WORK.read_bytes(), "/tmp/blk_work.py")
    return guest.sh_start(f"python3 /tmp/blk_work.py {device_path} {seconds} {threads} {seed}")
