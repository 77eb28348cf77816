#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""`latent reclaim` gives half of a guest's RAM back to the host, and no byte of it is lost, whatever goes on meanwhile."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from lib import activity, case, cgroup, host, latent, vm
from lib.vm import VM

EVERYTHING = ["--min-run", "1", "--share-threshold", "0"]
MEM_MIB = 384
COLD_MIB = 128  # files in memory, which pack
HELD_MIB = 64   # zeros, words that are repeated, and what does not pack
DISK_MIB = 32
HALF = MEM_MIB // 2
MIB = 1 << 20
YOUNG = "200ms" # of pages that are looked at every 100 ms
LOOKS = 7       # from "never looked at" to the oldest state
BALLOONED_MIB = 24
PRESSURE = 0.05  # percent
SMALL_STORE_MIB = 4
DIRECT_READS = "sha256sum < /dev/vdb"  # through a drive with cache=none: the device writes guest RAM by itself


def reclaim(guest, *options):
    answer = latent.command("reclaim", "--json", *options, guest.name)
    if answer.returncode:
        raise vm.GuestError(f"reclaim {options}: {answer.stderr}")
    return json.loads(answer.stdout)


def figures(guest):
    return latent.stat(guest)["reclaim"]


def scan(guest, period, looks=LOOKS):
    latent.run("scan", guest.name, "--period", period)
    activity.wait_passes(guest, looks)


def mib(pages):
    return pages / activity.PAGES_PER_MIB


class Contents:
    """What the guest knows of its own memory, and of what it reads."""

    def __init__(self, guest, disk):
        self.guest, self.disk_sum = guest, latent.sha256(disk)
        guest.sh("mkdir -p /run/cold && mount -t tmpfs -o size=90% cold /run/cold")
        guest.sh("find /usr/lib /usr/bin /usr/share -type f -size +100k | sort | xargs cat 2> /dev/null | "
                 f"head -c {COLD_MIB}M | split -b 4M - /run/cold/part.", timeout=120)
        self.cold_sums = guest.sh("latent-guest hash -r /run/cold", timeout=120)
        guest.sh(f"latent-guest mem hold m {HELD_MIB} 13 mixed", timeout=60)
        guest.drop_guest_caches()

    def check(self, test, what):
        test.check_equal(self.guest.sh("latent-guest hash -r /run/cold", timeout=120), self.cold_sums,
                         f"{COLD_MIB} MiB of files in memory are right {what}")
        self.check_held(test, what)

    def check_held(self, test, what):
        test.check(self.guest.sh("latent-guest mem check m", timeout=120).startswith("ok"),
                   f"and {HELD_MIB} MiB of a program's {what}")

    def check_disk(self, test, found, what):
        test.check_equal(found.split()[0], self.disk_sum, f"{DISK_MIB} MiB of a disk with O_DIRECT are right {what}")


# ---- what it does not do ----

def bad_input(test, guest):
    for words in ([], ["--cold-for", "0"], ["--cold-for", "-1"], ["--cold-for", "soon"], ["--cold-for", "14m"],
                  ["--to", "0"], ["--to", "1X"],
                  ["--to", "lots"], ["--cold-for", "1m", "--to", "1G"], ["--auto", "--pressure", "0"],
                  ["--auto", "--pressure", "101"], ["--to", "1G", "--pressure", "1"],
                  ["--to", "1G", "--store-max", "1G"], ["--to", "1G", "--store", "file", "--store-max", "4k"]):
        answer = latent.command("reclaim", guest.name, *words)
        test.check(answer.returncode == latent.USAGE and len(answer.stderr.splitlines()) == 1,
                   f"reclaim {' '.join(words)}: {answer.stderr.strip()}")
    test.check_equal(latent.command("reclaim", "nobody", "--cold-for", "1m").returncode, latent.NO_VM,
                     "a VM that is not there")
    for words in (["--cold-for", "1m"], ["--auto"]):
        answer = latent.command("reclaim", guest.name, *words)
        test.check(answer.returncode == latent.NO_ANSWER and "latent scan" in answer.stderr, answer.stderr.strip())


# ---- half of RAM, and back ----

def to_half(test, guest, contents):
    before = figures(guest)["memory_bytes_now"]
    test.check(before > (COLD_MIB + HELD_MIB) * MIB, f"the guest takes {before / MIB:.0f} MiB")
    test.check(abs(before - latent.base_bytes(guest) - latent.stat(guest)["pages_private_now"] * 4096) < 8 * MIB,
               "which is its own RAM and its copies")
    done = reclaim(guest, "--to", f"{HALF}M")
    test.say(str(done))
    after = figures(guest)
    test.check(after["memory_bytes_now"] <= HALF * MIB, f"after reclaim {after['memory_bytes_now'] / MIB:.0f} MiB")
    test.check(latent.base_bytes(guest) + after["store_bytes_now"] <= HALF * MIB, "the kernel says so, too")
    test.check(done["pages_packed"] > 1000 and done["left_failed"] == 0, f"packed {mib(done['pages_packed']):.0f} MiB")
    test.check(0 < after["store_bytes_now"] < after["pages_packed_now"] * 4096 * 3 / 4,
               f"{mib(after['pages_packed_now']):.0f} MiB are packed into {after['store_bytes_now'] / MIB:.0f}")
    contents.check(test, "after that")
    back = figures(guest)
    returned = back["pages_returned"] - after["pages_returned"]
    test.check(returned > 1000, f"{mib(returned):.0f} MiB came back, {mib(back['pages_packed_now']):.0f} MiB were not touched")
    test.check(back["memory_bytes_now"] > after["memory_bytes_now"], "and take memory again")


def below_what_it_uses(test, guest, contents):
    answer = latent.command("reclaim", guest.name, "--to", "16M")
    test.check(answer.returncode == latent.NO_ANSWER and "and not 16 MiB" in answer.stderr, answer.stderr.strip())
    test.check("given back" in answer.stdout, answer.stdout.strip())
    test.check(guest.sh("echo alive").strip() == "alive", "the guest goes on")
    contents.check(test, "after all was given back that was not in use")


# ---- to a file ----

def store_of(guest, path):
    """The agent's descriptor of the store."""
    for found in Path(f"/proc/{guest.pid}/fd").iterdir():
        if os.readlink(found) == f"{path} (deleted)":
            return found
    raise vm.GuestError(f"{guest.name} has no store {path}")


def bad_stores(test, guest, directory):
    there = directory / "there"
    there.write_text("mine")
    for path, why in ((there, "there is a file already"), (directory / "missing" / "store", "No such file"),
                      ("/dev/shm/latent-test-store", "would be in the host's memory")):
        answer = latent.command("reclaim", guest.name, "--cold-for", "1s", "--store", path)
        test.check(answer.returncode == latent.SYSTEM and why in answer.stderr and len(answer.stderr.splitlines()) == 1,
                   answer.stderr.strip())
    test.check(there.read_text() == "mine" and not Path("/dev/shm/latent-test-store").exists(), "what was there stays")
    there.unlink()


def to_file(test, guest, contents, directory):
    """What does not pack goes, too; the file has no name, and nothing of it is in the host's memory."""
    bad_stores(test, guest, directory)
    activity.wait_passes(guest, LOOKS)
    path, before = directory / "store", figures(guest)
    done = reclaim(guest, "--cold-for", "1s", "--store", path)
    test.say(str(done))
    store, after = store_of(guest, path), figures(guest)
    test.check(not path.exists() and store.stat().st_mode & 0o777 == 0o600, "the file has no name, and is the VM's alone")
    test.check(done["left_not_packed"] == 0 and after["store_file_bytes_now"] > HELD_MIB * MIB / 4,
               f"{after['store_file_bytes_now'] / MIB:.0f} MiB are in it")
    test.check(before["memory_bytes_now"] - after["memory_bytes_now"] > (COLD_MIB + HELD_MIB) / 2 * MIB,
               f"the guest takes {after['memory_bytes_now'] / MIB:.0f} MiB of {before['memory_bytes_now'] / MIB:.0f}")
    test.check(host.cached_pages(store) < 64, "and the host has nothing of the file in memory")
    contents.check(test, "from the file")
    test.check(host.cached_pages(store) < 64, "nor when it was read")
    test.check(figures(guest)["store_file_bytes_now"] < after["store_file_bytes_now"] / 2, "there is room in it again")
    answer = latent.command("reclaim", guest.name, "--cold-for", "1s", "--store", directory / "another")
    test.check(answer.returncode == latent.NO_ANSWER and "already" in answer.stderr, answer.stderr.strip())


def full_store(test, guest, directory):
    """It stops there, and says so."""
    guest.sh("head -c 24M /dev/urandom > /run/noise", timeout=60)
    noise = guest.sh("sha256sum /run/noise")
    activity.wait_passes(guest, LOOKS)
    answer = latent.command("reclaim", guest.name, "--cold-for", "1s", "--store", directory / "small",
                            "--store-max", f"{SMALL_STORE_MIB}M")
    test.check(answer.returncode == latent.NO_ANSWER and "the store is full" in answer.stderr and
               len(answer.stderr.splitlines()) == 1, answer.stderr.strip())
    test.check(0 < figures(guest)["store_file_bytes_now"] <= SMALL_STORE_MIB * MIB, "it takes no more than it may")
    test.check_equal(guest.sh("sha256sum /run/noise"), noise, "nothing is lost")


# ---- under load ----

def under_load(test, guest, contents):
    """Walk after walk, as young as it goes, with writers, disk reads and discards; one walk's tool is killed."""
    scan(guest, "100ms", looks=3)
    pages = HELD_MIB * activity.PAGES_PER_MIB
    load = guest.sh_start(f"latent-guest mem churn m 0 {pages * 3 // 4} 12 0")
    files = latent.start_hash(guest, "/usr/lib/python3.11/")
    discards = guest.sh_start(f"for i in 1 2 3 4 5 6 7 8; do latent-guest mem discard m {pages * 3 // 4} 1000; "
                              f"latent-guest mem write m {pages * 3 // 4} 1000; sleep 0.5; done")
    reads = guest.sh_start(f"for i in 1 2 3 4; do echo 1 > /proc/sys/vm/drop_caches; {DIRECT_READS}; done")
    before, walks, killed = figures(guest), 0, False
    discarded = latent.stat(guest)["pages_discarded"]
    while load.status is None:
        guest.qmp("balloon", value=(MEM_MIB - walks % 2 * BALLOONED_MIB) * MIB)
        if walks == 2 and not killed:
            killed = killed_in_the_middle(test, guest)
        else:
            reclaim(guest, "--cold-for", YOUNG)
        walks += 1
    test.check(load.wait(60).startswith("ok"), "what was written meanwhile is right")
    discards.wait(60)
    for line in reads.wait(60).splitlines():
        contents.check_disk(test, line, "beside reclaim")
    latent.check_hashes(test, guest, "/usr/lib/python3.11/", what="beside reclaim", job=files)
    guest.qmp("balloon", value=MEM_MIB * MIB)
    discarded = latent.stat(guest)["pages_discarded"] - discarded
    test.check(discarded > 1000, f"the guest gave back {mib(discarded):.0f} MiB by itself")
    done = figures(guest)
    counts = {key: done[key] - before[key] for key in done if not key.endswith("_now")}
    test.say(f"{walks} walks: {counts}")
    test.check(killed and walks > 3 and counts["pages_packed"] > 1000, "there was something to lose")
    contents.check(test, "after it")


def killed_in_the_middle(test, guest):
    """The tool's end does nothing to the walk, nor to the guest."""
    before = figures(guest)
    tool = subprocess.Popen([vm.BUILD_DIR / "latent", "reclaim", guest.name, "--cold-for", YOUNG], stdout=subprocess.DEVNULL)
    while figures(guest)["looked_now"] == 0 and tool.poll() is None:
        time.sleep(0.01)
    tool.send_signal(signal.SIGKILL)
    test.check_equal(tool.wait(), -signal.SIGKILL, "the tool was killed while it waited")
    wait_walks(guest, before["walks"] + 1)
    return True


def wait_walks(guest, walks):
    deadline_s = time.monotonic() + 30
    while figures(guest)["walks"] < walks:
        if time.monotonic() > deadline_s:
            raise vm.GuestError(f"no walk has ended: {figures(guest)}")
        time.sleep(0.05)


def under_pressure(test, guest, disk):
    """--auto does nothing without pressure on the host's memory, reclaims under it, and ends by Ctrl-C."""
    with contextlib.ExitStack() as stack:
        tool = subprocess.Popen([vm.BUILD_DIR / "latent", "reclaim", guest.name, "--auto", "--pressure", str(PRESSURE), "--json"],
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        stack.callback(tool.kill)
        first = json.loads(tool.stdout.readline())
        test.check(first["pressure_percent"] > PRESSURE or first["act"] == "rest", f"--auto: {first}")
        if make_pressure(test, stack, disk):
            walks, deadline_s = figures(guest)["walks"], time.monotonic() + 40
            while (act := json.loads(tool.stdout.readline()))["act"] != "reclaim" and time.monotonic() < deadline_s:
                pass
            test.check(act["act"] == "reclaim" and act["pressure_percent"] > PRESSURE, f"under pressure: {act}")
            test.check(figures(guest)["walks"] > walks, "it walks through guest RAM")
        tool.send_signal(signal.SIGINT)
        test.check_equal((tool.wait(10), tool.communicate()[1]), (0, ""), "Ctrl-C ends --auto")


def make_pressure(test, stack, file):
    """Somebody reads a file, and has no room for what he reads."""
    group = cgroup.Cgroup()
    if group.path is None:
        test.not_tried("--auto under pressure: no memory cgroup can be made here")
        return False
    stack.callback(group.remove)
    group.limit.write_text(str(8 * MIB))
    host.drop_from_page_cache(file)  # so that its pages are charged to him
    reader = subprocess.Popen(["sh", "-c", 'while :; do cat "$0" > /dev/null; done', file],
                              preexec_fn=lambda: (os.setpgrp(), group.take(os.getpid())))
    stack.callback(reader.wait)
    stack.callback(os.killpg, reader.pid, signal.SIGKILL)
    return True


# ---- saved ----

def saved(test, guest, contents, directory):
    """A save after a reclaim, with another one beside it: all comes back, and is in the snapshot."""
    scan(guest, "200ms")
    done = reclaim(guest, "--cold-for", "1s")
    test.check(done["pages_packed"] > 1000, f"packed {mib(done['pages_packed']):.0f} MiB before the save")
    tool = subprocess.Popen([vm.BUILD_DIR / "latent", "reclaim", guest.name, "--cold-for", "1s"],
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    latent.run("save", guest.name, directory / "snapshot")
    said = tool.communicate(timeout=30)[1].strip()
    test.check(tool.returncode in (0, latent.NO_ANSWER), f"reclaim beside a save: {said or 'done'}")
    test.check(latent.run("verify", directory / "snapshot").endswith("is whole\n"), "the snapshot is whole")
    activity.wait_passes(guest, LOOKS)
    done = reclaim(guest, "--cold-for", "1s")
    test.check(done["pages_packed"] > 1000, f"packed {mib(done['pages_packed']):.0f} MiB after the save")
    guest.kill9()
    guest.restore(directory / "snapshot")
    guest.wait_ready()
    contents.check(test, "in the restored guest")
    contents.check_disk(test, guest.sh(DIRECT_READS), "there, too")
    restored_too(test, guest, contents)


def restored_too(test, guest, contents):
    """Pages of the snapshot are what they were, and what the restored guest has made its own is given back."""
    guest.sh("cp /run/cold/part.aa /run/cold/part.ab /run/cold/part.ac /run/", timeout=60)
    sums = guest.sh("sha256sum /run/part.a?")
    scan(guest, "200ms")
    done = reclaim(guest, "--cold-for", "1s")
    test.check(done["pages_packed"] > 100 and done["pages_of_files"] > 1000,
               f"packed {mib(done['pages_packed']):.0f} MiB of a restored guest, and {mib(done['pages_of_files']):.0f} MiB of "
               "files went out of the page cache")
    contents.check(test, "after reclaim in a restored guest")
    test.check_equal(guest.sh("sha256sum /run/part.a?"), sums, "and its own")


def body(test):
    test.need_latent()
    latent.private_run_dir()
    directory = Path(tempfile.mkdtemp(prefix="latent-reclaim-", dir=vm.images_dir().parent.parent))
    try:
        disk = latent.random_image(directory / "disk.raw", DISK_MIB)
        extra = [*latent.extra_disk(f"{disk},cache=none", "direct"),
                 "-device", "virtio-balloon-pci,free-page-reporting=on"]
        with VM("reclaim", mem=f"{MEM_MIB}M", latent=EVERYTHING, extra=extra) as guest:
            guest.wait_ready()
            bad_input(test, guest)
            with test.time("the guest fills its memory"):
                contents = Contents(guest, disk)
            scan(guest, "400ms")
            to_half(test, guest, contents)
            below_what_it_uses(test, guest, contents)
            to_file(test, guest, contents, directory)
            under_pressure(test, guest, disk)
            under_load(test, guest, contents)
            saved(test, guest, contents, directory)
            full_store(test, guest, directory)
            guest.shutdown()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    test.check_equal(latent.vm_dirs(), [], "no run-time directory is left")


case.main("Half of a guest's RAM is given back to the host, and no byte is lost.", body, timeout_s=400)
