#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Snapshots that cannot be mapped: packed ones, and those on HTTP(S) and S3-compatible stores."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from lib import case, host, latent, store, vm
from lib.vm import VM

EVERYTHING = ["--min-run", "1", "--share-threshold", "0"]
HELD_MIB = 96
HELD_PAGES = HELD_MIB * 256
NO_IMAGE, NO_ANSWER = 66, 75
KILLS = 4


# ---- the guest ----

def fill(guest):
    guest.sh(f"latent-guest mem hold m {HELD_MIB} 7 mixed", timeout=60)
    guest.sh("head -c 16 /dev/urandom | sha256sum > /run/nonce")
    return guest.sh("cat /run/nonce")


def check(test, guest, nonce, what):
    test.check_equal(guest.sh("cat /run/nonce"), nonce, f"{what}: it is the saved guest")
    test.check(guest.sh("latent-guest mem check m", timeout=120).startswith("ok"), f"{what}: every page of its memory is right")


def save(guest, directory, *options):
    return json.loads(latent.run("save", "--json", *options, guest.name, directory))


def restore(guest, where, *options, prefetch=None, **environment):
    guest.env = {**environment, **({"LATENT_PREFETCH": prefetch} if prefetch else {})}
    guest.restore(where, *options)


def wait(what, condition, timeout_s=30):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise vm.GuestError(f"not within {timeout_s} s: {what}")
        time.sleep(0.05)


def source(guest):
    return latent.stat(guest)


def wait_loaded(guest):
    wait("all is loaded", lambda: 0 < source(guest)["source_pages_all"] == source(guest)["source_pages_now"], 60)


# ---- the pager ----

def pagers():
    """Process ids of this test's pagers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0] == b"latent-pager" and words[1].startswith(os.fsencode(latent.run_dir())):
            found.append(int(path.parent.name))
    return found


def kill_pager():
    [pid] = pagers()
    os.kill(pid, signal.SIGKILL)
    wait("the pager is gone", lambda: pid not in pagers())


def wait_for_no_pager():
    wait("a pager that nobody needs ends", lambda: not pagers(), 20)


# ---- parts ----

def make(test, directory):
    """A snapshot, plain and packed, of one guest; its nonces."""
    with VM("made", latent=EVERYTHING, mem="512M") as guest:
        nonce = fill(guest)
        plain = save(guest, directory / "plain", "--stop")
        packed = save(guest, directory / "packed", "--compress")
        stored = os.stat(directory / "plain/ram").st_blocks * 512
        size = os.stat(directory / "packed/ram.zst").st_size
        test.check(not (directory / "packed/ram").exists() and size == packed["packed_bytes"] < stored,
                   f"{stored >> 20} MiB of RAM are packed into {size >> 20} MiB")
        test.check(plain["packed_bytes"] == 0, "and only when that is asked for")
        for name in ("plain", "packed"):
            test.check(latent.run("verify", directory / name).endswith("is whole\n"), f"{name} is whole")
        guest.kill9()
        return guest.disk_layers, nonce


def packed_here(test, guest, directory, nonce):
    """From a packed snapshot on this machine."""
    restore(guest, directory / "packed")
    check(test, guest, nonce, "packed")
    figures = source(guest)
    test.check(figures["source_faults"] > 0, f"{figures['source_faults']} faults were served")
    wait_loaded(guest)
    test.check(latent.volume_states(figures).count("cached") == 1, "stat names the cache")
    answer = latent.command("save", guest.name, directory / "refused")
    test.check(answer.returncode == NO_ANSWER and "latent detach" in answer.stderr, f"save says: {answer.stderr.strip()}")
    latent.run("detach", guest.name)
    check(test, guest, nonce, "detached from the cache")
    save(guest, directory / "again", "--compress")
    guest.kill9()
    wait_for_no_pager()
    restore(guest, directory / "again")
    check(test, guest, nonce, "packed a second time")
    guest.kill9()


def body(test):
    test.need_latent()
    latent.private_run_dir()
    directory = Path(tempfile.mkdtemp(prefix="latent-snapshots-"))
    try:
        with VM("lazy", latent=EVERYTHING, mem="512M") as guest:
            nonce = fill(guest)
            save(guest, directory / "plain", "--stop")
            packed = save(guest, directory / "packed", "--compress")
            guest.kill9()
            packed_here(test, guest, directory, nonce)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


case.main("A snapshot that cannot be mapped is loaded lazily, shared by all clones, and never wrong.", body, timeout_s=400)
