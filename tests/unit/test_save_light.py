#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Saves of a VM whose guest does nothing (light_vm.py): what they do to its disks' files and to QEMU's own migration, when
they fail, too.

Arguments: parts to try, as names of functions below.
"""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time

from light_vm import SKIPPED, TIMEOUT_S, Place, check, failures, two_places

NO_ANSWER = 75
NOISE_BYTES, NOISE_AT = 4 << 20, 16 << 20
SLOW_BYTES_S = 64 << 10  # of QEMU's migration
WRITTEN_BYTES = 8 << 20
LIMIT_MIB = 1
LAYERS_MAX = 24  # src/snapshot/manifest.h
COMMAND_S = 10  # src/snapshot/vmm.c
# Steps of a save (maker_step), by the number that LATENT_FAULT takes.
STEPS = ["the directory is made", "new overlays are made", "guest RAM is held", "what the disks were written is on storage",
         "the migration of the device state is started", "the guest is stopped", "the disks are switched"]
SYS_CACHESTAT = 451


def save(place, target, *options, **how):
    return place.start("save", "--json", "--window", "0", *options, place.name, target, **how)


def end(process):
    """(status, what it printed, what it said)"""
    try:
        printed, said = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        printed, said = process.communicate()
        check(False, f"{process.args[1]} ends")
    return process.returncode, printed, said


def saved(place, target, *options):
    status, printed, said = end(save(place, target, *options))
    check(status == 0, f"{place.name} is saved: {said.strip()}")
    return json.loads(printed or "{}")


def save_fails_after(place, target, step, options=()):
    status, _, said = end(save(place, target, *options, fault=f"save_step:{STEPS.index(step) + 1}:ENOSPC"))
    check(status == NO_ANSWER and f'after the step "{step}"' in said, f"it fails after {step}: {said.strip()}")
    return said


def disk_of(place):
    """The file that the VM writes to."""
    return place.qmp("query-block")["return"][0]["inserted"]["file"]


def wait_until(what, condition):
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    check(condition(), what)


def fill(place):
    """Bytes in guest RAM that are like no others."""
    for fd in os.scandir(f"/proc/{place.process.pid}/fd"):
        if os.readlink(fd.path).startswith("/memfd:latent-ram"):
            with open(fd.path, "r+b") as ram:
                ram.seek(NOISE_AT)
                ram.write(os.urandom(NOISE_BYTES))
            return
    check(False, "guest RAM is a file")


# ---- new overlays ----

def two_at_once(one, two):
    """Both would have the same name for their overlay; qemu-img takes its time."""
    slow = one.directory / "slow"
    slow.mkdir()
    (slow / "qemu-img").write_text(f"#!/bin/sh\nsleep 1\nexec {shutil.which('qemu-img')} \"$@\"\n")
    (slow / "qemu-img").chmod(0o755)
    one.disk.chmod(0o600)
    for process in [save(place, place.directory / f"at-once-{place.name}", path=slow) for place in (one, two)]:
        status, _, said = end(process)
        check(status == 0, f"two at once: {process.args[-2]} is saved: {said.strip()}")
    disks = [disk_of(place) for place in (one, two)]
    check(disks[0] != disks[1] and all(map(os.path.exists, disks)), f"two at once: each has a file of its own: {disks}")
    check([os.stat(disk).st_mode & 0o777 for disk in disks] == [0o600, 0o644],
          f"two at once: they are as private as those before: {[oct(os.stat(disk).st_mode) for disk in disks]}")


def late_answer(one, _):
    """QEMU is held up when it shall switch the disks, and does it when nobody waits any more."""
    before = disk_of(one)
    process = save(one, one.directory / "late", fault="save_step:delay:1000")
    wait_until("late answer: the guest is stopped", lambda: not one.is_running() or process.poll() is not None)
    os.kill(one.process.pid, signal.SIGSTOP)
    time.sleep(2 + COMMAND_S + 2)  # two steps of a second lie before the command
    os.kill(one.process.pid, signal.SIGCONT)
    status, _, said = end(process)
    now = disk_of(one)
    check(status == NO_ANSWER and "transaction" in said, f"late answer: the save fails: {said.strip()}")
    check(now != before, "late answer: QEMU has switched the disk")
    check(f"whether the VM writes to {now}" in said, f"late answer: it says that it does not know: {said.strip()}")
    check(os.path.exists(now), f"late answer: the file that the VM writes to is there: {now}")
    wait_until("late answer: the guest goes on", one.is_running)


def named_disks(one, _):
    """Whoever has not got a snapshot hears what the disk is from now on, and what it is no more."""
    before = disk_of(one)
    said = save_fails_after(one, one.directory / "not-named", "the guest is stopped")
    check(before not in said and disk_of(one) == before, f"named disks: nothing was switched yet: {said.strip()}")
    said = save_fails_after(one, one.directory / "named", "the disks are switched")
    now = disk_of(one)
    check(now != before and f"the VM writes to {now} from now on; {before} lies beneath" in said,
          f"named disks: when they were switched: {said.strip()}")


def overlay_over(path, below):
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", path], check=True)
    return path


def many_layers(one, _):
    """What the refusal advises helps, and writes nothing beneath."""
    deep = Place("deep", one.directory)
    layers = [one.directory / "disk.qcow2"]  # which has a layer itself
    while len(layers) < LAYERS_MAX:
        layers.append(overlay_over(one.directory / f"layer{len(layers)}.qcow2", layers[-1]))
    deep.disk = layers[-1]
    deep.run()
    status, _, said = end(save(deep, deep.directory / "deep"))
    check(status == NO_ANSWER and "block-stream" in said, f"many layers: refused: {said.strip()}")
    before = [os.stat(layer).st_mtime_ns for layer in layers[:-1]]
    deep.qmp("block-stream", {"device": "disk", "base": str(layers[1])})
    wait_until("many layers: they are joined", lambda: not deep.qmp("query-block-jobs")["return"])
    saved(deep, deep.directory / "deep")
    check([os.stat(layer).st_mtime_ns for layer in layers[:-1]] == before, "many layers: those beneath are as they were")
    deep.qmp("quit")


# ---- before the pause ----

def dirty_pages(path):
    """Of a file, in this host's page cache, not on storage yet; None: this kernel does not say (cachestat, Linux 6.5)."""
    whole, counts = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
    with open(path, "rb") as file:
        if ctypes.CDLL(None, use_errno=True).syscall(SYS_CACHESTAT, file.fileno(), whole, counts, 0):
            return None
    return counts[1] + counts[2]  # of which some are being written


def written_disks(one, _):
    """QEMU waits for them when it stops the guest: there is nothing left to wait for."""
    disk, step = disk_of(one), "what the disks were written is on storage"
    for options in ([], ["--no-disk"]):
        with open(disk, "ab") as file:  # behind all that the image uses
            file.write(os.urandom(WRITTEN_BYTES))
        if dirty_pages(disk) is None:
            print("written disks: not tried, this kernel has no cachestat")
            return
        check(dirty_pages(disk) > 0, "written disks: there is something to bring to storage")
        save_fails_after(one, one.directory / "written", step, options=options)
        check(dirty_pages(disk) == 0, f"written disks: before the guest is stopped {dirty_pages(disk)} pages are left {options}")


# ---- the rate ----

def limited(one, _):
    """Far less than what is written between two looks at the clock."""
    figures = saved(one, one.directory / "limited", "--limit", str(LIMIT_MIB))
    mib, seconds = figures["ram_bytes_written"] / (1 << 20), figures["write_us"] / 1e6
    print(f"limited: {mib:.2f} MiB in {seconds:.2f} s")
    check(mib >= NOISE_BYTES >> 20, f"limited: {mib} MiB were there to write")
    check(mib <= seconds * LIMIT_MIB * 1.1, f"limited: {mib:.2f} MiB in {seconds:.2f} s are more than {LIMIT_MIB} MiB/s")


# ---- QEMU's own migration ----

def status_of(place):
    return place.qmp("query-migrate")["return"].get("status", "none")


def bandwidth_of(place):
    return place.qmp("query-migrate-parameters")["return"]["max-bandwidth"]


def set_bandwidth(place, bytes_s):
    place.qmp("migrate-set-parameters", {"max-bandwidth": bytes_s})


def users_migration(one, two):
    """It goes on; saves and migrations are refused meanwhile."""
    set_bandwidth(one, SLOW_BYTES_S)
    one.qmp("migrate", {"uri": "exec:cat > /dev/null"})
    wait_until("user's migration: it has begun", lambda: status_of(one) == "active")
    for process in (save(one, one.directory / "refused"), one.migrate(two)):
        status, _, said = end(process)
        check(status == NO_ANSWER and "migrat" in said and "active" in said,
              f"user's migration: {process.args[1]} is refused: {said.strip()}")
        check(status_of(one) == "active", f"user's migration: it goes on after {process.args[1]}: {status_of(one)}")
        check(bandwidth_of(one) == SLOW_BYTES_S, f"user's migration: it is as fast as it was: {bandwidth_of(one)}")
    one.qmp("migrate_cancel")
    wait_until("user's migration: it is over", lambda: status_of(one) == "cancelled")


def users_bandwidth(one, _):
    """What the user has set is there again after a save, however it ends."""
    set_bandwidth(one, SLOW_BYTES_S)
    saved(one, one.directory / "bandwidth")
    check(bandwidth_of(one) == SLOW_BYTES_S, f"user's bandwidth: after a save: {bandwidth_of(one)}")
    save_fails_after(one, one.directory / "failed", "the guest is stopped")
    check(bandwidth_of(one) == SLOW_BYTES_S, f"user's bandwidth: after one that fails: {bandwidth_of(one)}")
    killed = save(one, one.directory / "killed", fault=f"save_step:{STEPS.index('the guest is stopped') + 1}:KILL")
    check(end(killed)[0] == -signal.SIGKILL, "user's bandwidth: a save is killed")
    wait_until("user's bandwidth: after one that is killed", lambda: bandwidth_of(one) == SLOW_BYTES_S and one.is_running())


TESTS = {test.__name__: test for test in (two_at_once, late_answer, named_disks, many_layers, written_disks, limited,
                                          users_migration, users_bandwidth)}


def run(places, names):
    for place, name in zip(places, ("debian.web.qcow2", "debian.db.qcow2")):
        place.disk = place.directory / name
        shutil.copy(place.directory / "disk.qcow2", place.disk)
        place.run()
        fill(place)
    for name in names or TESTS:
        begin_s = time.monotonic()
        TESTS[name](*places)
        print(f"{name}: {time.monotonic() - begin_s:.1f} s", flush=True)


def main():
    with two_places() as places:
        if places is None:
            return SKIPPED
        run(places, sys.argv[1:])
    return 1 if failures else 0


sys.exit(main())
