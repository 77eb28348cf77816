#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Whoever restores, keeps spares or serves pages is killed (or fails) at each of its steps.

usage: killed_restores.py [PART ...]      all parts without arguments: alone, clones, spare, pager, memory, silent

Nothing is left behind, the snapshot is what it was, and the next restore works; a pager's death harms nobody.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lib import case, host, latent, vm
from lib.vm import VM

HELD_MIB = 24
STEPS_MAX = 60
PAGER_STEPS = (*range(1, 13), 20, 40)
WAIT_S = 30


class Snapshots:
    """Of one guest: a plain one, and a packed one, which needs a pager."""

    def __init__(self, guest, directory):
        self.guest, self.directory = guest, directory
        self.plain, self.packed, self.disks = (directory / name for name in ("plain", "packed", "new-disks"))
        self.disks.mkdir()
        guest.sh(f"latent-guest mem hold m {HELD_MIB} 13 mixed", timeout=60)
        self.nonce = guest.sh("head -c 16 /dev/urandom | sha256sum | tee /run/nonce")
        latent.run("save", guest.name, self.plain)
        latent.run("save", "--compress", guest.name, self.packed)
        guest.kill9()
        self.digests_before, self.files_before = self.digests(), self.files()

    def paths(self):
        return [path for top in (self.plain, self.packed) for path in sorted(top.rglob("*"))]

    def digests(self):
        return {str(path): latent.sha256(path) for path in self.paths() if path.is_file()}

    def files(self):
        """What shows that nobody has written them, but for somebody who sets times back: see check_untouched."""
        return {str(path): (status.st_ino, status.st_size, status.st_mtime_ns)
                for path, status in ((path, path.lstat()) for path in self.paths())}

    def check_untouched(self, test):
        test.check(self.digests() == self.digests_before, "the snapshots are what they were, byte by byte")

    def overlays(self):
        return [*self.disks.iterdir(), *self.guest.dir.glob(f"{self.guest.name}-*.qcow2")]

    def check_nothing_left(self, test, what):
        latent.wait_for(f"{what}: nothing is left",
                 lambda: latent.run("ps") is not None and latent.vm_dirs() == [] and self.overlays() == [])
        test.check(self.files() == self.files_before, f"{what}: nothing is left, and nobody wrote the snapshots")

    def check_guest(self, test, what):
        """The VM that was restored last, with the user's own line."""
        test.check_equal(self.guest.sh("cat /run/nonce"), self.nonce, f"{what}: it is the saved guest")
        answer = self.guest.sh("latent-guest mem check m", timeout=60)
        test.check(answer.startswith("ok"), f"{what}: its memory is right")

    def end_guest(self):
        self.guest.kill9()
        for path in self.overlays():
            path.unlink()


# ---- restores ------------------------------------------------------------------------------------

def restore_status(guest, snapshot, fault):
    """What a restore with a fault ended with; None: it came to its end, and the VM lives."""
    told = guest.qemu_log.read_text(errors="replace").count('"steps"')
    guest.env = {"LATENT_FAULT": fault}
    guest.restore(snapshot, "--json")
    guest.env = {}

    def ended():
        return guest.process.poll() is not None or guest.qemu_log.read_text(errors="replace").count('"steps"') > told

    latent.wait_for(f"{fault}: its end", ended)
    return guest.process.poll()


def alone(test, at):
    """The command becomes the VM."""
    killed, refused, failed = [-signal.SIGKILL], [latent.SYSTEM], [1, 0]  # 0: QEMU was told to quit
    for point, how, wanted in (("restore_step", "KILL", killed), ("restore_step", "ENOMEM", refused),
                               ("agent_step", "KILL", killed), ("agent_step", "ENOMEM", failed)):
        for number in range(1, STEPS_MAX):
            status = restore_status(at.guest, at.plain, f"{point}:{number}:{how}")
            if status is None:
                break
            what = f"{how} at {point} {number}"
            test.check(status in wanted, f"{what}: the restore ends with {status}")
            at.check_nothing_left(test, what)
        test.check(number > (10 if point == "restore_step" else 3), f"{point}: {number - 1} steps were tried")
        at.check_guest(test, f"the restore after {number - 1} that ended by {how}")
        at.end_guest()
    at.check_nothing_left(test, "in the end")


def clones(test, at):
    """Children of a command that waits for them."""
    for point in ("restore_step", "agent_step"):
        for number in range(1, STEPS_MAX):
            answer = latent.command("restore", "--clones", "2", "--json", "--name", "clone", "--disks", at.disks, at.plain,
                                    env={"LATENT_FAULT": f"{point}:{number}:KILL"})
            if not answer.returncode:
                break
            what = f"clones killed at {point} {number}"
            test.check_equal(answer.returncode, latent.NO_ANSWER, f"{what}: {answer.stderr.strip()}")
            at.check_nothing_left(test, what)
        test.check(number > 3, f"{number - 1} steps were tried")
        end_described(at, [one["pid"] for one in json.loads(answer.stdout)])
    at.check_nothing_left(test, "in the end")


def end_described(at, pids):
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    latent.wait_for("they have ended", lambda: latent.run("ps") is not None and latent.vm_dirs() == [])
    for path in at.overlays():
        path.unlink()


def spare(test, at):
    """Three in a row that die end their keeper; one that dies when it is taken is nobody's."""
    for point in ("restore_step", "agent_step"):
        for number in range(1, STEPS_MAX):
            outcome, pid = keep_and_take(test, at, f"{point}:{number}:KILL")
            if outcome == "taken":
                break
            at.check_nothing_left(test, f"spare killed at {point} {number} ({outcome})")
        test.check(number > 3, f"{number - 1} steps were tried")
        end_described(at, [pid])
    at.check_nothing_left(test, "in the end")


def keep_and_take(test, at, fault):
    """Of a keeper and its spares with a fault: ("never ready", None), ("not taken", None) or ("taken", process id)."""
    keeper = subprocess.Popen([vm.BUILD_DIR / "latent", "spare", "--name", "kept", "--disks", at.disks, at.plain],
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                              env=dict(os.environ, LATENT_FAULT=fault))
    try:
        if "waits" not in keeper.stdout.readline():
            test.check_equal(keeper.wait(WAIT_S), latent.NO_ANSWER, f"{fault}: the keeper gives up")
            return "never ready", None
        answer = latent.command("spare", "take", "--name", "taken", "kept")
        pid = None if answer.returncode else latent.stat("taken")["pid"]
        keeper.send_signal(signal.SIGINT)
        test.check_equal(keeper.wait(WAIT_S), 0, f"{fault}: the keeper ends when it is asked to")
        return ("taken", pid) if pid else ("not taken", None)
    finally:
        keeper.kill()
        keeper.wait()


# ---- pagers --------------------------------------------------------------------------------------

def start_pager(at, **environment):
    """A pager of the packed snapshot that restores find."""
    directory = latent.run_dir() / ".pagers"
    directory.mkdir(exist_ok=True)
    end_pagers()
    subprocess.run(["latent-pager", directory, os.path.realpath(at.packed)], executable=vm.BUILD_DIR / "latent-pager",
                   check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                   env=dict(os.environ, **environment))
    return latent.wait_for("a pager", lambda: list(directory.glob("*.sock")) and latent.pagers())[0]


def end_pagers():
    for pid in latent.pagers():
        os.kill(pid, signal.SIGKILL)
    latent.wait_for("no pager is left", lambda: not latent.pagers())
    for path in (latent.run_dir() / ".pagers").iterdir():
        path.unlink()


def pager(test, at):
    """The guest waits for the next one, and loses nothing."""
    killed = 0
    for number in PAGER_STEPS:
        pid = start_pager(at, LATENT_FAULT=f"pager_step:{number}:KILL")
        at.guest.restore(at.packed)
        at.check_guest(test, f"the pager killed at step {number}")
        killed += pid not in latent.pagers()
        at.end_guest()
    test.check_equal(killed, len(PAGER_STEPS), "each was killed, and another one went on")
    end_pagers()
    at.check_nothing_left(test, "in the end")


def memory(test, at):
    """A pager that cannot remember what somebody waits for: nobody waits for ever, though nothing is loaded unasked."""
    for number in (1, 2, 5, 20):
        start_pager(at, LATENT_FAULT=f"pager_memory:{number}:ENOMEM", LATENT_PREFETCH="none")
        at.guest.restore(at.packed, "--no-rest")
        at.check_guest(test, f"no memory for wish {number}")
        at.end_guest()
    end_pagers()


def silent(test, at):
    """The next pager says nothing: the agent goes on answering, and finds another one."""
    pid = start_pager(at, LATENT_PREFETCH="none")
    at.guest.restore(at.packed, "--no-rest")
    test.check_equal(at.guest.sh("cat /run/nonce"), at.nonce, "it is the saved guest")
    host.stop_process(at.guest.pid)  # or it would start one before the silent one is there
    os.kill(pid, signal.SIGKILL)
    [path] = (latent.run_dir() / ".pagers").glob("*.sock")
    path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.settimeout(WAIT_S)
        listener.bind(str(path))
        listener.listen()
        os.kill(at.guest.pid, signal.SIGCONT)
        with listener.accept()[0]:
            saving = subprocess.Popen([vm.BUILD_DIR / "latent", "save", at.guest.name, at.directory / "waits"],
                                      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(1)  # it wants all to be loaded, which cannot be said to anybody yet
            with test.time("stat, beside a save that waits for the pager"):
                latent.stat(at.guest)  # raises when it gets no answer
            saving.send_signal(signal.SIGINT)
            saving.wait(WAIT_S)
    path.unlink(missing_ok=True)
    at.check_guest(test, "after a pager that said nothing")
    at.end_guest()
    end_pagers()


PARTS = {"alone": alone, "clones": clones, "spare": spare, "pager": pager, "memory": memory, "silent": silent}


def body(test):
    test.need_latent()
    latent.private_run_dir()
    # On the file system of the VMs' disks: these become part of the snapshots.
    directory = Path(tempfile.mkdtemp(prefix="latent-snapshots-"))
    try:
        with VM("steps", latent=[], mem="256M") as guest:
            at = Snapshots(guest, directory)
            for part in sys.argv[1:] or PARTS:
                PARTS[part](test, at)
                at.check_untouched(test)
    finally:
        latent.end_all_vms()
        shutil.rmtree(directory, ignore_errors=True)


case.main("A restore, a spare or a pager that ends at any of its steps leaves nothing behind and harms nobody.", body,
          timeout_s=840)
