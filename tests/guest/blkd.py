#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Guests whose disk is served by `latent blkd`: what they write is there, also when lanes and domain are killed."""

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from lib import blkd, case, latent, vm
from lib.agent import GuestError
from lib.blkd import Blkd
from lib.vm import VM

MEM = "768M"
THREADS = 6
DISK_MIB = 64
PART = "/usr/lib/python3.11/"


def empty_disk(directory, name):
    path = Path(directory) / name
    with open(path, "wb") as file:
        file.truncate(DISK_MIB << 20)
    return path


def check_disk(test, output, disk, what):
    """The image has what the guest says it has written."""
    counts, digest = output.strip().splitlines()[-2:]
    with open(disk, "rb") as file:
        found = hashlib.sha256(file.read(THREADS * blkd.PART_BYTES)).hexdigest()
    test.check_equal(found, digest, f"{what}: {counts}")


def wait_until(condition, what, timeout_s=30):
    deadline_s = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > deadline_s:
            raise GuestError(f"not within {timeout_s} s: {what}")
        time.sleep(0.05)
    return found


def is_confined(pid):
    """No capabilities, no way to new ones, a filter of system calls, nothing to see."""
    status = Path(f"/proc/{pid}/status").read_text()
    wanted = {"CapEff": 0, "NoNewPrivs": 1, "Seccomp": 2}
    return all(int(re.search(rf"^{key}:\s*(\w+)", status, re.MULTILINE)[1], 16) == value for key, value in wanted.items())


def check_confined(test, domain):
    """As soon as a lane has begun; on a busy machine it may take its time for that."""
    for pid in domain.lanes():
        wait_until(lambda: is_confined(pid), f"lane {pid} is confined: {Path(f'/proc/{pid}/status').read_text()}")
    test.check(True, "lanes have no capabilities, no way to new ones, and a filter of system calls")


def check_mapped(test, domain, guest):
    """While it serves, a lane maps the rings, and what its slots can hold."""
    for pid in domain.lanes():
        maps = Path(f"/proc/{pid}/maps").read_text()
        kib = sum(int(end, 16) - int(start, 16) for start, end in
                  re.findall(r"^(\w+)-(\w+) .* /memfd:(?:memory-backend-memfd|latent-ram)", maps, re.MULTILINE)) >> 10
        test.check(kib < vm.parse_bytes(guest.mem) >> 13, f"lane {pid} maps {kib} KiB of the guest's RAM, at that moment")


def plain_guest(test, directory, disk):
    """QEMU 7.2 as it is, two queues, two lanes: patterns, and files copied to a file system."""
    socket = f"{directory}/plain.sock"
    with Blkd(socket, disk, "--lanes", "2") as domain, \
            VM("plain", mem=MEM, smp=2, extra=[*blkd.shared_ram(MEM), *blkd.device(socket)]) as guest:
        guest.wait_ready(120)
        check_confined(test, domain)
        test.check_equal(guest.sh("cat /sys/block/vdb/size").strip(), str(DISK_MIB << 11), "the disk's size")
        test.check_equal(guest.sh("cat /sys/block/vdb/serial").strip(), disk.name, "its name")
        test.check_equal(guest.sh("ls /sys/block/vdb/mq | wc -l").strip(), "2", "its queues")
        test.check_equal(guest.sh("cat /sys/block/vdb/queue/write_cache").strip(), "write back", "its cache")
        job = blkd.start_work(guest, "/dev/vdb", 15, THREADS, 1)
        time.sleep(5)
        check_mapped(test, domain, guest)
        check_disk(test, job.wait(120), disk, "what was written, read, zeroed, discarded and flushed is right")
        files_on_it(test, guest)
        second_writer(test, socket)
        image_in_use(test, directory, disk)
        kill_under_load(test, guest, domain, disk)
        guest.shutdown()


def files_on_it(test, guest):
    """A file system: files copied there, read back without a cache."""
    guest.sh("mkfs.ext4 -q -b 4096 /dev/vdb && mkdir -p /mnt/d && mount /dev/vdb /mnt/d && mkdir -p /mnt/d/usr/lib",
             timeout=120)
    guest.sh(f"cp -a {PART.rstrip('/')} /mnt/d/usr/lib/ && sync && umount /mnt/d && mount /dev/vdb /mnt/d", timeout=180)
    latent.check_hashes(test, guest, under=PART, root="/mnt/d", what="on the disk of the domain")
    guest.sh("umount /mnt/d")


def second_writer(test, socket):
    """Another VMM that connects gets no answer but the end, and the first one goes on."""
    import socket as sockets
    with sockets.socket(sockets.AF_UNIX) as other:
        other.connect(str(socket))
        other.settimeout(30)
        test.check_equal(other.recv(1), b"", "a second front end of an image that is written is sent away")


def check_refused(test, socket, image, status, word):
    done = latent.command("blkd", "--socket", socket, "--image", image)
    test.check_equal((done.returncode, word in done.stderr), (status, True), f"refused: {done.stderr.strip()}")


def image_in_use(test, directory, disk):
    check_refused(test, f"{directory}/other.sock", disk, latent.NAME_IN_USE, "in use")
    check_refused(test, f"{directory}/plain.sock", empty_disk(directory, "third"), latent.NAME_IN_USE, "in use")
    done = subprocess.run(["qemu-io", "-f", "raw", "-c", "write 0 512", disk], capture_output=True, text=True, check=False)
    test.check("lock" in done.stderr + done.stdout, "QEMU's tools see that the image is in use")


def kill_under_load(test, guest, domain, disk):
    """Lanes, then the domain are killed while requests are under way: the guest notices a delay, nothing else."""
    job = blkd.start_work(guest, "/dev/vdb", 25, THREADS, 2)
    time.sleep(5)
    for _ in range(3):
        old = domain.lanes()
        for pid in old:
            os.kill(pid, signal.SIGKILL)
        domain.wait_lanes(2, without=old)
        time.sleep(3)
    for _ in range(2):
        domain.kill()
        time.sleep(0.5)
        domain.start()
        time.sleep(3)
    check_disk(test, job.wait(180), disk, "nothing is lost when lanes and domain are killed under load")
    test.check(domain.log.read_text().count("was ended by signal 9") >= 3, "the domain says that lanes were killed")


def domain_of(disk):
    """The process that serves an image, or None."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if words[0].endswith(b"latent-blkd") and os.fsencode(disk) in words and path.parent.joinpath("exe").exists():
                status = (path.parent / "status").read_text()
                if "\nName:\tlatent-lane" not in "\n" + status:
                    return int(path.parent.name)
    return None


def latent_guest(test, disk):
    """`latent run --blk-domain`: RAM is plain and shared, looking at it works, saving is refused, lanes may die."""
    with VM("domain", mem=MEM, smp=2, latent=["--blk-domain", str(disk)]) as guest:
        guest.wait_ready(120)
        figures = latent.stat(guest)
        test.check_equal((figures["overlays_allowed"], figures["pages_overlay_now"]), (False, 0),
                         f"nothing is mapped: {figures['excluded_by']}")
        latent.run("scan", "domain", "--period", "1s")
        job = blkd.start_work(guest, "/dev/vdb", 20, THREADS, 3)
        time.sleep(4)
        done = latent.command("save", "domain", disk.with_suffix(".snapshot"))
        test.check_equal((done.returncode, done.stderr.count("\n")), (latent.NO_ANSWER, 1),
                         f"saving is refused: {done.stderr.strip()}")
        test.check(not disk.with_suffix(".snapshot").exists(), "and leaves nothing behind")
        done = latent.command("reclaim", "domain", "--cold-for", "10s")
        test.check(done.returncode, f"reclaim is refused: {done.stderr.strip()}")
        domain = domain_of(disk)
        old = blkd.lanes_of(domain)
        for pid in old:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: set(blkd.lanes_of(domain)) - set(old), "another lane")
        check_disk(test, job.wait(120), disk, "a guest of latent run, its lane killed, its RAM looked at")
        files_on_it(test, guest)
        guest.shutdown()
    wait_until(lambda: domain_of(disk) is None, "the domain ends with its machine")
    test.check(True, "the domain has ended with its machine")


def refusals(test, directory):
    packed = Path(directory) / "packed.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", packed, "16M"], check=True)
    for image, word in ((packed, "qemu-img convert"), (Path(directory) / "none", "No such file")):
        check_refused(test, f"{directory}/refused.sock", image, latent.NO_IMAGE, word)
        done = latent.command("run", "--name", "refused", "--blk-domain", image, "--", "qemu-system-x86_64")
        test.check_equal((done.returncode, word in done.stderr), (latent.NO_IMAGE, True), "latent run says so, too")
    test.check("refused" not in latent.vm_dirs(), "no run directory is left")


def body(test):
    test.need_latent()
    latent.private_run_dir()
    with tempfile.TemporaryDirectory(prefix="latent-blkd-") as directory:
        refusals(test, directory)
        latent_guest(test, empty_disk(directory, "disk"))
        plain_guest(test, directory, empty_disk(directory, "disk"))


case.main("A disk that latent blkd serves holds what the guest writes, whatever is killed.", body, timeout_s=840)
