#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""After a restore the rest of the snapshot is loaded in the background, by a process that nothing depends on."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from lib import case, host, latent
from lib.vm import VM

HELD_MIB = 64
SLOWLY = {"LATENT_FAULT": "storage_read:delay:10"}  # each piece
NO_ROOM = {"LATENT_FAULT": "spare_memory:8:ENOMEM"}
IDLE_S = 240  # whatever else runs goes first


def loaders(snapshot):
    """Process ids of who loads something of it just now."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "comm").read_text() == "latent-rest\n" and os.fsencode(snapshot) in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:
            pass  # it has just ended
    return found


def rest(guest):
    return latent.stat(guest)["rest"]


def forget(snapshot):
    for path in [snapshot / "ram", snapshot / "active"]:
        host.drop_from_page_cache(path)


def restore(guest, snapshot, *options, env=None):
    """What `latent restore --json` says. Nothing of the snapshot's RAM is in memory before."""
    forget(snapshot)
    guest.env = dict(env or {})
    at = guest.qemu_log.stat().st_size
    guest.restore(snapshot, "--json", *options)
    latent.wait_for("its times", lambda: b'"steps"' in guest.qemu_log.read_bytes()[at:])
    line = [one for one in guest.qemu_log.read_text()[at:].splitlines() if '"steps"' in one][0]
    return json.loads(line)["steps"]


def check(test, guest, nonce, what):
    test.check_equal(guest.sh("cat /run/nonce"), nonce, f"{what}: it is the saved guest")
    test.check(guest.sh("latent-guest mem check m", timeout=120).startswith("ok"), f"{what}: every page of its memory is right")


def loaded(test, guest, snapshot, nonce):
    """By itself, after the guest runs, and all of it."""
    steps = restore(guest, snapshot)
    names = [step["step"] for step in steps]
    test.check_equal(names[-2:], ["resumed", "rest"], "the rest begins when the guest runs")
    test.check(steps[-1]["us"] >= steps[-2]["us"], f"{steps[-1]['us'] - steps[-2]['us']} us later")
    latent.wait_for("all is loaded", lambda: rest(guest)["state"] != "loading", IDLE_S)
    figures = rest(guest)
    # Images are everybody's, and somebody else may have dropped some of their pages since.
    test.check(figures["state"] == "loaded" and
               figures["pages_all_now"] >= figures["pages_now"] >= 0.98 * figures["pages_all_now"] > HELD_MIB * 200,
               f"{figures['pages_now']} of {figures['pages_all_now']} pages are there after "
               f"{(figures['end_us'] - steps[-1]['us']) / 1e6:.2f} s")
    stored = os.stat(snapshot / "ram").st_blocks // 8
    test.check(host.cached_pages(snapshot / "ram") >= 0.98 * stored, f"{stored} pages are in the page cache, and mincore agrees")
    latent.wait_for("who loaded it ends", lambda: not loaders(snapshot), IDLE_S)
    test.check("all was loaded" in latent.run("stat", guest.name), "stat says it to people")
    check(test, guest, nonce, "loaded")
    test.check_equal(latent.command("stop-rest", guest.name).returncode, latent.NO_ANSWER, "there is nothing to stop any more")
    guest.kill9()


def ended(test, guest, snapshot, nonce):
    """By command, by a signal, with the VM: the guest goes on as if nothing were."""
    for what, end, state in (("stop-rest", lambda pid: latent.run("stop-rest", guest.name), "stopped"),
                             ("SIGTERM", lambda pid: os.kill(pid, signal.SIGTERM), "stopped"),
                             ("SIGKILL to QEMU", lambda pid: guest.kill9(), None)):
        restore(guest, snapshot, env=SLOWLY)
        latent.wait_for("it has begun", lambda: rest(guest)["pages_now"] > 0, IDLE_S)
        figures = rest(guest)
        [pid] = loaders(snapshot)
        niceness = os.getpriority(os.PRIO_PROCESS, pid)
        test.check_equal((figures["state"], niceness, os.sched_getscheduler(pid)), ("loading", 19, os.SCHED_IDLE),
                         f"{what}: {figures['pages_now']} of {figures['pages_all_now']} pages, with low priority")
        test.check("idle" in subprocess.run(["ionice", "-p", str(pid)], capture_output=True, text=True).stdout, "idle I/O")
        end(pid)
        latent.wait_for(f"{what}: it ends", lambda: pid not in loaders(snapshot), IDLE_S)
        if state is None:
            continue
        latent.wait_for(f"{what}: it is told", lambda: rest(guest)["state"] == state, IDLE_S)
        figures = rest(guest)
        test.check(figures["pages_now"] < figures["pages_all_now"], f"{what}: {figures['pages_now']} pages were loaded")
        check(test, guest, nonce, what)
        guest.kill9()


def without(test, guest, snapshot, nonce):
    """Not asked for; no memory to spare; a snapshot that goes away."""
    names = [step["step"] for step in restore(guest, snapshot, "--no-rest")]
    test.check(names[-1] == "resumed" and rest(guest)["state"] == "none" and not loaders(snapshot), "--no-rest: nothing is loaded")
    check(test, guest, nonce, "--no-rest")
    guest.kill9()
    restore(guest, snapshot, env=NO_ROOM)
    latent.wait_for("it ends", lambda: rest(guest)["state"] == "no_room", IDLE_S)
    figures = rest(guest)
    latent.wait_for("who loaded ends", lambda: not loaders(snapshot), IDLE_S)
    test.check(0 < figures["pages_now"] < figures["pages_all_now"],
               f"no memory to spare: {figures['pages_now']} of {figures['pages_all_now']} pages")
    check(test, guest, nonce, "no memory to spare")
    guest.kill9()


def body(test):
    test.need_latent()
    latent.private_run_dir()
    # On the file system of the VMs' disks: these become part of the snapshot.
    directory = Path(tempfile.mkdtemp(prefix="latent-rest-"))
    snapshot = directory / "snapshot"
    try:
        with VM("rest", latent=[], mem="512M") as guest:
            guest.sh(f"latent-guest mem hold m {HELD_MIB} 11 mixed", timeout=60)
            nonce = guest.sh("head -c 16 /dev/urandom | sha256sum | tee /run/nonce")
            latent.run("save", guest.name, snapshot)
            guest.kill9()
            loaded(test, guest, snapshot, nonce)
            ended(test, guest, snapshot, nonce)
            without(test, guest, snapshot, nonce)
        latent.run("ps")
        test.check_equal((latent.vm_dirs(), loaders(snapshot)), ([], []), "nothing is left")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


case.main("The rest of a snapshot is loaded behind the running guest, and need not be.", body, timeout_s=360)
