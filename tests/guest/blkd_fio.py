#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""fio and dpkg on a disk of `latent blkd` that is a file, not memory: patterns, packages, with lanes and domain killed."""

import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from lib import blkd, case, latent, newer_qemu, vm
from lib.blkd import Blkd
from lib.vm import VM

MEM = "768M"
DISK_MIB = 384
FIO = ("fio --filename=/dev/vdb --direct=1 --ioengine=libaio --thread --group_reporting --verify=crc32c "
       "--verify_fatal=1 --randrepeat=0")
# Each has a part of the disk for itself; fio reads all of it when it is written, and compares.
JOBS = {
    "mixed sizes, 16 under way, flushes": "--rw=randwrite --bsrange=512-256k --bs_unaligned=0 --iodepth=16 --fdatasync=64",
    "long requests": "--rw=write --bs=1m --iodepth=4",
    "short ones, two at a time, each flushed": "--rw=randwrite --bs=4k --iodepth=2 --fsync=8",
    "discards, each followed by a write": "--rw=randtrimwrite --bs=16k --iodepth=8",
}
JOB_MIB = 16
SLOTS, SLOT_PAGES = 64, 511  # of a lane, and what each holds at most
# Of the guest's own: many small files, and a few long ones.
PACKAGES = ("libpython3.11-minimal", "libpython3.11-stdlib", "perl-base", "cpp-12")
MAKE_PACKAGE = r"""set -e
mkdir -p /tmp/deb/{0}/DEBIAN
dpkg-query -L {0} | while read path; do [ -f "$path" ] && [ ! -L "$path" ] && echo "${{path#/}}"; done > /tmp/deb/{0}.list || true
tar -C / -cf - -T /tmp/deb/{0}.list | tar -C /tmp/deb/{0} -xf -
printf 'Package: {0}\nVersion: 1\nArchitecture: all\nMaintainer: nobody\nDescription: made anew\n' > /tmp/deb/{0}/DEBIAN/control
dpkg-deb -Znone --build /tmp/deb/{0} /mnt/d/{0}.deb
"""
INSTALL = ("mkdir -p /mnt/d/root/var/lib/dpkg/info /mnt/d/root/var/lib/dpkg/updates && cd /mnt/d/root/var/lib/dpkg && "
           "touch status available && dpkg --root=/mnt/d/root --force-not-root,depends,script-chrootless -i /mnt/d/*.deb")


def make_disk(directory):
    path = Path(directory) / "disk"
    with open(path, "wb") as file:
        file.truncate(DISK_MIB << 20)
    return path


def passed(output):
    return output.strip().endswith("status 0")


def check_fio(test, output, what):
    test.check(passed(output), what if passed(output) else f"{what}: {output[-1500:]}")


def all_jobs():
    """All jobs at once, again and again until there is /tmp/stop, and once at least."""
    words = [FIO]
    for number, job in enumerate(JOBS.values()):
        words.append(f"--name=job{number} --offset={number * JOB_MIB}m --size={JOB_MIB}m {job}")
    return f"while {' '.join(words)} 2>&1; do [ ! -e /tmp/stop ] || {{ echo status 0; break; }}; done"


def fio_alone(test, guest):
    for number, (name, job) in enumerate(JOBS.items()):
        output = guest.sh(f"{FIO} --name=job --offset={number * JOB_MIB}m --size={JOB_MIB}m {job} 2>&1; echo status $?", timeout=180)
        check_fio(test, output, f"fio finds what it wrote: {name}")


def check_reached(test, guest):
    """Flushes and discards are what the disk was asked for, not what the guest's kernel has left out."""
    fields = list(map(int, guest.sh("cat /sys/block/vdb/stat").split()))  # Documentation/block/stat.rst
    discards, flushes = fields[11], fields[15]
    test.check(discards and flushes, f"the disk has done {discards} discards and {flushes} flushes")


def kill_lanes(domain):
    old = domain.lanes()
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    domain.wait_lanes(len(old), without=old)


def kill_domain(domain):
    domain.kill()
    time.sleep(0.3)
    domain.start()


def fio_under_fire(test, guest, domain, kills):
    """`kills`: what to do, 2.5 s apart."""
    guest.sh("rm -f /tmp/stop")
    job = guest.sh_start(all_jobs())
    for kill in kills:
        if job.done.wait(2.5):
            break
        kill(domain)
    guest.sh("touch /tmp/stop")
    check_fio(test, job.wait(240), f"all jobs at once find what they wrote, with {', '.join(k.__name__ for k in kills)}")


def packages(test, guest, domain):
    """Packages made of the guest's own files, on the disk, installed there while lanes are killed, and hashed."""
    guest.sh("mkfs.ext4 -q -b 4096 /dev/vdb && mkdir -p /mnt/d && mount /dev/vdb /mnt/d && mkdir -p /tmp/deb", timeout=120)
    for name in PACKAGES:
        guest.sh(MAKE_PACKAGE.format(name), timeout=120)
    job = guest.sh_start(INSTALL)
    for _ in range(3):
        if not job.done.wait(1.5):
            kill_lanes(domain)
    if not job.done.wait(0.5):
        kill_domain(domain)
    job.wait(240)
    guest.sh("sync && umount /mnt/d && mount /dev/vdb /mnt/d", timeout=120)
    output = guest.sh("cd /mnt/d/root && cat /tmp/deb/*.list | xargs -d '\\n' latent-guest hash", timeout=180)
    found = {f"/{path}": value for value, path in (line.split("  ", 1) for line in output.splitlines())}
    golden = latent.golden_hashes("/")
    wrong = [path for path, value in found.items() if golden.get(path) != value]
    test.check(len(found) > 500 and not wrong, f"{len(found)} files are right as dpkg has installed them, with lanes and domain "
               "killed meanwhile" + (f": {wrong[:5]}" if wrong else ""))
    found = guest.sh("dpkg-query --admindir=/mnt/d/root/var/lib/dpkg -W -f '${Package} ${db:Status-Abbrev}\n'").split("\n")
    test.check_equal(sorted(line.strip() for line in found if line), sorted(f"{name} ii" for name in PACKAGES), "dpkg says so")
    guest.sh("umount /mnt/d && e2fsck -fn /dev/vdb", timeout=120)


def check_file(test, disk):
    """The image itself has the file system, for others to read."""
    done = subprocess.run(["e2fsck", "-fn", disk], capture_output=True, text=True, check=False,
                          env=dict(os.environ, PATH=os.environ["PATH"] + ":/usr/sbin:/sbin"))
    test.check_equal((done.returncode, done.stderr[done.stderr.find("\n"):].strip()), (0, ""), "the image has a clean file system")


def with_newer_qemu(test, directory):
    """The same disk under another QEMU than the system's: what it negotiates, patterns, a lane that is killed."""
    other = newer_qemu.find()
    if other is None:
        test.not_tried(f"a newer QEMU with a disk of latent blkd: {newer_qemu.WHY_NOT}")
        return
    socket = f"{directory}/newer.sock"
    with Blkd(socket, make_disk(directory), "--lanes", "2") as domain, \
            VM("newer", mem=MEM, smp=2, qemu=other.qemu, env=other.env,
               extra=[*other.words, *blkd.shared_ram(MEM), *blkd.device(socket)]) as guest:
        guest.wait_ready(120)
        test.check_equal(guest.sh("cd /sys/block/vdb && echo $(ls mq | wc -l) $(cat queue/write_cache)").strip(), "2 write back",
                         f"QEMU {other.version}: queues, and a cache")
        fio_alone(test, guest)
        check_reached(test, guest)
        fio_under_fire(test, guest, domain, [kill_lanes, kill_domain])
        guest.shutdown()


def body(test):
    test.need_latent()
    scratch = vm.images_dir().parent.parent / "blkd"  # on disk, wherever /tmp is
    scratch.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="latent-blkd-", dir=scratch) as directory:
        disk, socket = make_disk(directory), f"{directory}/fio.sock"
        with Blkd(socket, disk, "--lanes", "2") as domain:
            with VM("fio", mem=MEM, smp=2, extra=[*blkd.shared_ram(MEM), *blkd.device(socket)]) as guest:
                guest.wait_ready(120)
                fio_alone(test, guest)
                check_reached(test, guest)
                fio_under_fire(test, guest, domain, [kill_lanes, kill_lanes, kill_domain, kill_lanes])
                packages(test, guest, domain)
                guest.sh("fio --name=r --filename=/dev/vdb --direct=1 --ioengine=libaio --iodepth=8 --rw=read --bs=1m --size=64m")
                guest.shutdown()
            deadline_s = time.monotonic() + 20
            while not blkd.moved_by(domain.log) and time.monotonic() < deadline_s:
                time.sleep(0.05)
            windows, copies, peak = map(max, zip(*blkd.moved_by(domain.log)))
            test.check(windows and copies and 0 < peak <= SLOTS * SLOT_PAGES,
                       f"a lane has moved {windows} KiB through windows, {copies} KiB by copies, at most {peak} guest pages mapped")
        check_file(test, disk)
        with_newer_qemu(test, directory)


case.main("fio and dpkg find what they wrote on a disk that latent blkd serves, whatever is killed.", body, timeout_s=600)
