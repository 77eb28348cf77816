#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""What a snapshot stores: equal pages once, what a parent has not at all. And a save that ends at any of its steps.

usage: save_chain.py [PART ...]      all parts without arguments: chain, equal, steps, space, limit
"""

import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lib import case, cgroup, latent, vm
from lib.vm import VM

EVERYTHING = ["--min-run", "1", "--share-threshold", "0"]
FILES = "/usr/lib/python3.11/"
HELD_MIB = 64
CHANGED_PAGES = 4000
NOISE_PAGES = 6000  # the guest's kernel and its command server go on between two saves
PAGE_BYTES = 4096
NO_IMAGE, NO_ANSWER = 66, 75


def save(guest, directory, *options):
    answer = latent.command("save", "--json", *options, guest.name, directory, timeout_s=120)
    if answer.returncode:
        raise vm.GuestError(f"save: {answer.stderr}")
    return json.loads(answer.stdout)


def info(directory):
    return json.loads(latent.run("info", "--json", directory))


def check_memory(test, guest, what, *names):
    for name in names or ("m",):
        answer = guest.sh(f"latent-guest mem check {name}", timeout=120)
        test.check(answer.startswith("ok"), f"{name}: the guest's memory is right {what}")


def stored_bytes(directory):
    return (Path(directory) / "ram").stat().st_blocks * 512


def fill(test, guest):
    latent.check_hashes(test, guest, FILES)
    guest.sh(f"latent-guest mem hold m {HELD_MIB} 13 mixed", timeout=60)
    guest.sh("head -c 16 /dev/urandom | sha256sum > /run/nonce")
    return guest.sh("cat /run/nonce")


def check_restored(test, guest, directory, nonce, what):
    guest.restore(directory)
    test.check_equal(guest.sh("cat /run/nonce"), nonce, f"{what}: restored, with what only its memory had")
    check_memory(test, guest, f"restored from {what}")
    guest.drop_guest_caches()
    latent.check_hashes(test, guest, FILES, what=f"read anew after {what}")
    test.check(guest.sh("dmesg | grep -ci 'ext4.*error' || true").strip() == "0", "its file system has no error")


def refused(test, guest, snapshot, what, *words):
    """Neither restored nor a parent nor made flat; the sentence names the file."""
    restore = ("restore", "--name", "refused", "--disks", guest.dir, snapshot, "--", guest.qemu, *guest.qemu_arguments())
    arguments = (restore, ("flatten", snapshot, f"{snapshot}.flat"), ("verify", snapshot))
    for command in arguments:
        answer = latent.command(*command)
        test.check(answer.returncode == NO_IMAGE and all(word in answer.stderr for word in words),
                   f"{what}: {command[0]}: {answer.stderr.strip()}")
    test.check(not Path(f"{snapshot}.flat").exists() and "refused" not in latent.vm_dirs(),
               f"{what}: nothing is left behind")


# ---- parents, and one snapshot made of three ----

def chain(test, directory):
    a, b, c, flat = (directory / name for name in ("a", "b", "c", "flat"))
    with VM("chain", latent=EVERYTHING, mem="512M") as guest:
        nonce = fill(test, guest)
        first = save(guest, a)
        guest.sh(f"latent-guest mem write m 0 {CHANGED_PAGES}")
        second = save(guest, b, "--parent", a)
        test.say(f"stored: {first['pages_stored']} pages, then {second['pages_stored']}, "
                 f"{second['pages_in_snapshots']} in the parent, {second['pages_equal']} equal; on the disk "
                 f"{stored_bytes(a) >> 20} MiB, then {stored_bytes(b) >> 20} MiB")
        random = CHANGED_PAGES // 2  # the others are zero, or of one word
        test.check(random <= second["pages_stored"] <= random + NOISE_PAGES,
                   f"{second['pages_stored']} pages are stored, and {random} are known to have changed")
        test.check(stored_bytes(b) <= second["pages_stored"] * PAGE_BYTES + (1 << 20), "and that is what it takes on the disk")
        check_child(test, a, b)
        check_memory(test, guest, "after both")
        guest.kill9()
        check_restored(test, guest, b, nonce, "the child")
        guest.sh(f"latent-guest mem write m {CHANGED_PAGES} 100")
        guest.sh("dd if=/dev/urandom of=/root/more bs=4k count=64 status=none; sync")
        more = guest.sh("sha256sum /root/more")
        third = save(guest, c, "--parent", b)
        test.check(third["pages_stored"] <= NOISE_PAGES, f"of the restored one: {third['pages_stored']} pages are stored")
        rams = [volume["path"] for volume in info(c)["volumes"] if volume["role"] == "ram"]
        test.check_equal(sorted(rams), [str(a / "ram"), str(b / "ram")], "the third refers to both, and not by way of one")
        guest.kill9()
        check_restored(test, guest, c, nonce, "the third")
        guest.kill9()
        missing_and_changed(test, guest, a, b)
        killed_flattening(test, directory, c)
        latent.run("flatten", c, flat)
        check_flat(test, c, flat)
        for path in (a, b):
            shutil.rmtree(path)
        check_restored(test, guest, flat, nonce, "the flat one, with the others gone")
        test.check_equal(guest.sh("sha256sum /root/more"), more, "its disk is right")
        guest.shutdown()


def check_child(test, a, b):
    about = info(b)
    test.check_equal((about["parent"]["path"], about["parent"]["name"]), (str(a), "chain"), "the parent is named")
    roles = {volume["path"]: volume["role"] for volume in about["volumes"]}
    test.check(roles.get(str(a / "ram")) == "ram" and "image" in roles.values(), f"its files have roles: {roles}")
    test.check_equal(about["pages_stored"] + about["pages_equal"] + about["pages_on_volumes"] + about["pages_of_one_word"],
                     about["pages"], "every page is of one kind")
    test.check_equal(sum(volume["pages"] for volume in about["volumes"]), about["pages_on_volumes"],
                     "and its file is counted")
    test.check(latent.run("verify", b).endswith("is whole\n"), "the child is whole")


def killed_flattening(test, directory, snapshot):
    """At every step: no half of it has the name, and it can be tried again."""
    answer = latent.command("flatten", snapshot, directory / "killed", env={"LATENT_FAULT": "save_step:0:KILL"})
    test.check(answer.returncode == latent.USAGE, f"a fault that is none is refused: {answer.stderr.strip()}")
    for number in range(1, 100):
        answer = latent.command("flatten", snapshot, directory / "killed", env={"LATENT_FAULT": f"save_step:{number}:KILL"})
        if not answer.returncode:
            break
        test.check(answer.returncode == -signal.SIGKILL and not (directory / "killed").exists(),
                   f"flatten killed at step {number}: no snapshot")
        for left in directory.glob("killed.partial-*"):
            shutil.rmtree(left)
    test.check(number > 6 and latent.run("verify", directory / "killed").endswith("is whole\n"),
               f"{number - 1} steps were tried; then it is made")
    shutil.rmtree(directory / "killed")


def check_flat(test, old, flat):
    about = info(flat)
    test.check(about["parent"] is None and {volume["role"] for volume in about["volumes"]} <= {"image"},
               "the flat one needs no other snapshot")
    test.check(latent.run("verify", flat).endswith("is whole\n"), "and is whole")
    was, now = ((directory / "active").read_bytes() for directory in (old, flat))
    test.check(was[:32] + was[40:] == now[:32] + now[40:] and was != now,
               "its active pages are those of the old one, and belong to its own metadata")


def page_in_parent(directory, ram):
    """A page of the parent's RAM that the snapshot refers to (src/snapshot/format.h)."""
    number = [volume["path"] for volume in info(directory)["volumes"]].index(str(ram))
    data = (directory / "pages").read_bytes()
    blocks, = struct.unpack_from("<I", data, 16)
    pages = [value for kind, volume, value in struct.iter_unpack("<IIQ", data[40 + 72 * blocks:])
             if (kind, volume) == (2, number)]
    return pages[len(pages) // 2]


def flip(path, page):
    with open(path, "r+b") as file:
        file.seek(page * PAGE_BYTES + 5)
        byte = file.read(1)[0]
        file.seek(page * PAGE_BYTES + 5)
        file.write(bytes([byte ^ 1]))


def missing_and_changed(test, guest, a, b):
    ram, away = a / "ram", a / "away"
    page = page_in_parent(b, ram)
    ram.rename(away)
    refused(test, guest, b, "no parent", str(ram))
    away.rename(ram)
    old = ram.stat()
    flip(ram, page)
    refused(test, guest, b, "a parent that was written", str(ram), str(old.st_size))
    os.utime(ram, ns=(old.st_atime_ns, old.st_mtime_ns))
    answer = latent.command("verify", b)
    test.check(answer.returncode == NO_IMAGE and f"page {page} " in answer.stderr,
               f"a flipped bit that nothing else shows: {answer.stderr.strip()}")
    flip(ram, page)
    os.utime(ram, ns=(old.st_atime_ns, old.st_mtime_ns))


# ---- equal pages ----

def guest_memory(guest):
    """The contents of the file that is guest RAM."""
    for link in Path(f"/proc/{guest.pid}/fd").iterdir():
        if os.readlink(link).startswith("/memfd:latent-ram:"):
            return link.read_bytes()
    raise vm.GuestError("no RAM file")


def count_pages(memory):
    """(zero, of one word, different contents, pages equal to an earlier one)"""
    zero, word, seen, equal = 0, 0, set(), 0
    zeros = bytes(PAGE_BYTES)
    for at in range(0, len(memory), PAGE_BYTES):
        page = memory[at:at + PAGE_BYTES]
        if page == zeros:
            zero += 1
        elif page == page[:8] * (PAGE_BYTES // 8):
            word += 1
        else:
            digest = hashlib.blake2b(page, digest_size=16).digest()
            equal += digest in seen
            seen.add(digest)
    return zero, word, len(seen), equal


def equal(test, directory):
    """Counted by somebody else: each of the different contents is stored once, and nothing else."""
    with VM("equal", latent=[], mem="512M") as guest:
        for name in ("m", "n", "o"):
            guest.sh(f"latent-guest mem hold {name} 16 5", timeout=60)
        guest.qmp("stop")
        figures = save(guest, directory / "equal")
        zero, word, different, again = count_pages(guest_memory(guest))
        test.check(again >= 2 * 16 * 256, f"{again} pages are equal to others")
        test.check_equal((figures["pages_stored"], figures["pages_equal"]), (different, again), "stored once")
        test.check_equal((figures["pages_zero"], figures["pages_of_one_word"]), (zero, zero + word),
                         "and those of one word not at all")
        test.check_equal(figures["pages_on_volumes"], 0, "nothing is elsewhere")
        test.check(stored_bytes(directory / "equal") <= different * PAGE_BYTES + (1 << 20),
                   "and that is what it takes on the disk")
        guest.kill9()
        guest.restore(directory / "equal")
        guest.wait_status("paused")
        guest.qmp("cont")
        check_memory(test, guest, "restored", "m", "n", "o")
        guest.sh("latent-guest mem write m 0 2000")
        check_memory(test, guest, "when some are written, which were shared", "m", "n", "o")
        guest.shutdown()


# ---- a save that ends at any step ----

def steps(test, directory):
    with VM("steps", latent=EVERYTHING, mem="512M") as guest:
        fill(test, guest)
        for how, options, status in (("KILL", [], -signal.SIGKILL), ("ENOSPC", [], NO_ANSWER),
                                     ("KILL", ["--stop", "--no-disk"], -signal.SIGKILL)):
            every_step(test, guest, directory, how, options, status)
        guest.qmp("stop")
        answer = latent.command("save", "--no-disk", guest.name, directory / "paused",
                                env={"LATENT_FAULT": "save_step:9:KILL"})
        test.check_equal(answer.returncode, -signal.SIGKILL, "killed while the user had stopped the guest")
        time.sleep(1)
        test.check(guest.qmp("query-status")["status"] != "running", "it stays stopped")
        guest.qmp("cont")
        save(guest, directory / "last")
        guest.kill9()
        guest.restore(directory / "last")
        check_memory(test, guest, "restored from the save after all those")
        guest.shutdown()


def every_step(test, guest, directory, how, options, status):
    """Until one comes to its end; that is a snapshot, and none before was."""
    what = " ".join([how, *options])
    for number in range(1, 100):
        target = directory / f"steps-{what.replace(' ', '')}"
        guest.sh(f"echo {number} > /root/number; sync; latent-guest mem write m {number * 16} 16")
        answer = latent.command("save", *options, guest.name, target, env={"LATENT_FAULT": f"save_step:{number}:{how}"})
        guest.wait_status("running")
        if not answer.returncode:
            break
        test.check(answer.returncode == status and not target.exists(),
                   f"{what} at step {number}: no snapshot {answer.stderr.strip()}")
        if how != "KILL":
            test.check(not list(directory.glob(f"{target.name}.*")), "nothing is left")
        test.check_equal(guest.sh("cat /root/number").strip(), str(number), "the guest runs")
        check_memory(test, guest, f"after step {number}")
        for left in directory.glob(f"{target.name}.partial-*"):
            shutil.rmtree(left)
    test.check(number > 13, f"{what}: {number - 1} steps were tried")
    test.check(latent.run("verify", target).endswith("is whole\n"), "and then it is saved")
    capabilities = {one["capability"]: one["state"] for one in guest.qmp("query-migrate-capabilities")}
    test.check(not capabilities["x-ignore-shared"] and not capabilities["pause-before-switchover"],
               "nothing of it is left in QEMU")
    guest.drop_guest_caches()
    latent.check_hashes(test, guest, FILES, what=f"after {what} at every step")


# ---- no space ----

def space(test, directory):
    small, roomy = directory / "small", directory / "roomy"
    mounted = []
    try:
        for path, size in ((small, "24M"), (roomy, "1G")):
            path.mkdir()
            if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True).returncode:
                test.not_tried("a full file system: mounting takes root")
                return
            mounted.append(path)
        with VM("space", latent=EVERYTHING, mem="512M") as guest:
            fill(test, guest)
            no_space(test, guest, roomy, small)
            guest.shutdown()
    finally:
        for path in mounted:
            subprocess.run(["umount", path], check=True)


def write_fails(test, guest, directory, number):
    """The sentence of a save whose write number `number` fails; empty when there is no such write."""
    target = directory / "space"
    answer = latent.command("save", "--no-disk", guest.name, target, env={"LATENT_FAULT": f"write:{number}:ENOSPC"})
    if not answer.returncode:
        shutil.rmtree(target)
        return ""
    test.check("No space left" in answer.stderr and not list(directory.glob("space*")),
               f"write {number} fails: {answer.stderr.strip()}")
    return answer.stderr


def full_from_every_step(test, guest, directory):
    """The first write after each step, so of each file, finds no space."""
    words, number = "", 1
    while True:
        target = directory / "full"
        answer = latent.command("save", "--no-disk", guest.name, target, env={"LATENT_FAULT": f"save_step:{number}:FULL"})
        if not answer.returncode:
            break
        test.check("No space left" in answer.stderr and not list(directory.glob("full*")),
                   f"full from step {number} on: {answer.stderr.strip()}")
        words += answer.stderr
        number += 1
    for name in ("RAM", "pages", "state", "active", "manifest.json"):
        test.check(f"{name} cannot be written" in words, f"a write of {name} has failed")
    shutil.rmtree(target)


def no_space(test, guest, directory, small):
    answer = latent.command("save", "--no-disk", guest.name, small / "full")
    test.check(answer.returncode == NO_ANSWER and "No space left" in answer.stderr, f"a full disk: {answer.stderr.strip()}")
    test.check_equal(os.listdir(small), [], "nothing is left")
    number = 1
    while write_fails(test, guest, directory, number):
        number *= 2
    full_from_every_step(test, guest, directory)
    check_memory(test, guest, "after all")
    target = directory / "enough"
    save(guest, target, "--no-disk")
    answer = latent.command("flatten", target, small / "flat")
    test.check(answer.returncode == latent.SYSTEM and "No space left" in answer.stderr, f"flatten: {answer.stderr.strip()}")
    test.check_equal(os.listdir(small), [], "nothing is left")
    slow = subprocess.Popen([vm.BUILD_DIR / "latent", "save", "--no-disk", "--limit", "8", guest.name, small / "ended"],
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    time.sleep(1.5)
    slow.send_signal(signal.SIGTERM)
    test.check(slow.wait(20) == NO_ANSWER and os.listdir(small) == [], "ended by a signal: nothing is left")
    check_memory(test, guest, "after that")


# ---- limits of memory ----

def limit(test, directory):
    group = cgroup.Cgroup()
    if group.path is None:
        test.not_tried("limits of memory: no memory cgroup can be made here")
        return
    outside = group.path.parent / "cgroup.procs"
    with VM("limit", latent=EVERYTHING, mem="512M") as guest:
        fill(test, guest)
        group.limit.write_text(str(48 << 20))
        answer = subprocess.run([vm.BUILD_DIR / "latent", "save", guest.name, directory / "limit"], capture_output=True,
                                text=True, preexec_fn=lambda: group.take(os.getpid()))
        test.check(answer.returncode == NO_ANSWER and "this command's cgroup" in answer.stderr, answer.stderr.strip())
        guest.qmp("stop")
        group.take(guest.pid)
        answer = latent.command("save", guest.name, directory / "limit")
        outside.write_text(str(guest.pid))
        test.check(answer.returncode == NO_ANSWER and "the VM's cgroup" in answer.stderr, answer.stderr.strip())
        guest.qmp("cont")
        test.check(not list(directory.glob("limit*")) and len(list(guest.dir.glob("*.qcow2"))) == 1, "nothing is left")
        check_memory(test, guest, "after both")
        save(guest, directory / "limit")
        guest.shutdown()
    group.remove()


PARTS = {"chain": chain, "equal": equal, "steps": steps, "space": space, "limit": limit}


def body(test):
    test.need_latent()
    latent.private_run_dir()
    # On the file system of the VMs' disks: these become part of the snapshots.
    directory = Path(tempfile.mkdtemp(prefix="latent-snapshots-"))
    try:
        for part in sys.argv[1:] or PARTS:
            PARTS[part](test, directory)
        latent.run("ps")
        test.check_equal(latent.vm_dirs(), [], "no run-time directory is left")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


case.main("A snapshot stores what is new, once; a save that ends anywhere harms nothing.", body, timeout_s=840)
