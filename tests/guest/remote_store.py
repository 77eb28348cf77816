#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Snapshots that cannot be mapped: packed ones, and those on HTTP(S) and S3-compatible stores."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from lib import case, host, latent, store, vm
from lib.agent import Agent
from lib.vm import VM

EVERYTHING = ["--min-run", "1", "--share-threshold", "0"]
MEM = "512M"
HELD_MIB = 96
HELD_PAGES = HELD_MIB * 256
NO_IMAGE, NO_ANSWER = 66, 75
KILLS = 4


# ---- the guest ----

def check(test, guest, nonce, what):
    test.check_equal(guest.sh("cat /run/nonce"), nonce, f"{what}: it is the saved guest")
    test.check(guest.sh("latent-guest mem check m", timeout=120).startswith("ok"), f"{what}: every page of its memory is right")


def save(guest, directory, *options):
    return json.loads(latent.run("save", "--json", *options, guest.name, directory))


@contextlib.contextmanager
def environment(**variables):
    """Variables for what is started within."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def wait_loaded(guest):
    def is_loaded():
        figures = latent.stat(guest)
        return 0 < figures["source_pages_all"] == figures["source_pages_now"] and figures["rest"]["state"] == "loaded" and \
            figures["rest"]["pages_now"] == figures["rest"]["pages_all_now"] == figures["source_pages_all"]

    latent.wait_for("all is loaded", is_loaded, 60)


# ---- the pager ----

def kill_pager(there):
    [pid] = latent.pagers(there.url)
    os.kill(pid, signal.SIGKILL)
    latent.wait_for("the pager is gone", lambda: pid not in latent.pagers())


# ---- on this machine ----

def make(test, guest, directory):
    """Snapshots of one guest, plain and packed; the nonce that it knows."""
    guest.sh(f"latent-guest mem hold m {HELD_MIB} 7 mixed", timeout=60)
    nonce = guest.sh("head -c 16 /dev/urandom | sha256sum | tee /run/nonce")
    plain = save(guest, directory / "plain", "--stop")
    packed = save(guest, directory / "packed", "--compress")
    stored = os.stat(directory / "plain/ram").st_blocks * 512
    size = os.stat(directory / "packed/ram.zst").st_size
    test.check(not (directory / "packed/ram").exists() and size == packed["packed_bytes"] < stored and
               not plain["packed_bytes"], f"{stored >> 20} MiB of RAM are packed into {size >> 20} MiB")
    for name in ("plain", "packed"):
        test.check(latent.run("verify", directory / name).endswith("is whole\n"), f"{name} is whole")
    for words in (("flatten", directory / "packed", directory / "flat"),
                  ("save", "--parent", directory / "packed", guest.name, directory / "child")):
        answer = latent.command(*words)
        test.check(answer.returncode and "without --compress" in answer.stderr and not words[-1].exists(),
                   f"{words[0]} says: {answer.stderr.strip()}")
    child = save(guest, directory / "child", "--compress", "--parent", directory / "plain")
    test.check(child["packed_bytes"] < packed["packed_bytes"] and child["pages_in_snapshots"] > HELD_PAGES // 2,
               f"with a parent it is {child['packed_bytes'] >> 20} MiB")
    test.check(latent.run("verify", directory / "child").endswith("is whole\n"), "and is whole")
    guest.kill9()
    return nonce


def packed_here(test, guest, directory, nonce):
    guest.restore(directory / "packed")
    check(test, guest, nonce, "packed")
    figures = latent.stat(guest)
    test.check(figures["source_faults"] > 0 and "cached" in [one["state"] for one in figures["volumes"]],
               f"{figures['source_faults']} faults were served, and stat names the cache")
    wait_loaded(guest)
    guest.sh(f"latent-guest mem write m 0 {HELD_PAGES // 8}", timeout=60)
    figures = save(guest, directory / "again", "--compress")
    test.check(figures["private_pages"] > HELD_PAGES // 16 and not figures["load_us"] and figures["pages_stored"] > HELD_PAGES // 2,
               f"saved from the cache: {figures['pages_stored']} pages, {figures['private_pages']} of them copies")
    check(test, guest, nonce, "saved from the cache")
    latent.run("detach", guest.name)
    check(test, guest, nonce, "detached from the cache")
    guest.kill9()
    latent.wait_for("a pager that nobody needs ends", lambda: not latent.pagers(), 20)
    guest.restore(directory / "again")
    check(test, guest, nonce, "packed a second time")
    spoilt_cache(test, guest, directory)
    guest.kill9()


def packed_child(test, guest, directory, nonce):
    """Its pages are in its own packed RAM, and in the plain one of its parent."""
    guest.restore(directory / "child")
    check(test, guest, nonce, "packed, with a parent")
    guest.kill9()


def without_userfaultfd(test, guest, directory, nonce):
    with environment(LATENT_FAULT="uffd:1:EPERM"):
        guest.restore(directory / "packed")
        check(test, guest, nonce, "without a userfaultfd")
    figures = latent.stat(guest)
    test.check(figures["source_faults"] == 0 and figures["source_pages_now"] == figures["source_pages_all"],
               "all was loaded before the guest ran")
    guest.kill9()


def damaged_here(test, guest, directory):
    bad = directory / "bad"
    shutil.copytree(directory / "packed", bad)
    size = os.stat(bad / "ram.zst").st_size
    for what, place, data, word in (("cut off", None, size - 8, "early"), ("of another format", 0, b"PK", "begins"),
                                    ("with another index", size - 8, b"\xff" * 8, "checksum")):
        shutil.copyfile(directory / "packed/ram.zst", bad / "ram.zst")
        with open(bad / "ram.zst", "r+b") as file:
            if place is None:
                file.truncate(data)
            else:
                file.seek(place)
                file.write(data)
        refused(test, guest, bad, f"packed RAM {what}", word)
    mixed(test, guest, directory, bad)
    shutil.copyfile(directory / "packed/ram.zst", bad / "ram.zst")
    with open(bad / "ram.zst", "r+b") as file:
        file.seek(size // 2)
        byte = file.read(1)[0]
        file.seek(size // 2)
        file.write(bytes([byte ^ 1]))
    answer = latent.command("verify", bad)
    test.check(answer.returncode == NO_IMAGE and "chunk" in answer.stderr, f"a flipped bit: {answer.stderr.strip()}")


def mixed(test, guest, directory, bad):
    """Devices of one save and packed memory of another one, each of them whole."""
    manifest = (bad / "manifest.json").read_text()
    other = json.loads((directory / "again/manifest.json").read_text())
    (bad / "manifest.json").write_text(json.dumps({**json.loads(manifest), "packed_bytes": other["packed_bytes"]}))
    for name in ("pages", "ram.zst"):
        shutil.copyfile(directory / "again" / name, bad / name)
    refused(test, guest, bad, "packed RAM of another save", "pages", "digest")
    answer = latent.command("verify", bad)
    test.check(answer.returncode == NO_IMAGE and "pages" in answer.stderr, f"verify, too: {answer.stderr.strip()}")
    (bad / "manifest.json").write_text(manifest)
    shutil.copyfile(directory / "packed/pages", bad / "pages")


def refused(test, guest, where, what, *words, options=()):
    answer = latent.command("restore", "--name", "refused", "--disks", guest.dir, *options, where, "--", guest.qemu,
                            *guest.qemu_arguments())
    test.check(answer.returncode == NO_IMAGE and answer.stderr.count("\n") == 1 and
               all(word in answer.stderr for word in words), f"{what}: {answer.stderr.strip()}")


def spoilt_cache(test, guest, directory):
    """A save compares what it takes from there with what was saved."""
    wait_loaded(guest)
    [path] = [fd for pid in latent.pagers() for fd in Path(f"/proc/{pid}/fd").iterdir()
              if os.readlink(fd).startswith("/memfd:latent-cache")][:1]
    guest.qmp("stop")
    with open(path, "r+b", buffering=0) as cache:
        for megabyte in range(vm.parse_bytes(guest.mem) >> 20):
            os.pwrite(cache.fileno(), b"\x55\xaa", megabyte << 20)
    answer = latent.command("save", guest.name, directory / "spoilt")
    test.check(answer.returncode == NO_ANSWER and "not what was saved" in answer.stderr and
               not (directory / "spoilt").exists(), f"a cache with other contents: {answer.stderr.strip()}")


def saved_early(test, guest, directory, nonce):
    """What is missing is loaded first, while the guest runs; what comes of it is the stopped VM, page by page."""
    with store.Store(directory, mbit_s=200) as there:
        fetch(guest, there, directory, options=["--no-rest"])
        check_nonce(test, guest, nonce)
        guest.sh(f"latent-guest mem write m {HELD_PAGES // 2} {HELD_PAGES // 8}", timeout=60)
        there.silent.set()
        process = subprocess.Popen([vm.BUILD_DIR / "latent", "save", guest.name, directory / "silent"],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        latent.wait_for("stat tells of the silence", lambda: latent.stat(guest)["source_silent_ms_now"] > 1000)
        test.check(process.poll() is None and guest.qmp("query-status")["status"] == "running",
                   "a store that says nothing: the save waits, and the guest runs")
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=20)[1]
        test.check(process.returncode == NO_ANSWER and "loaded" in error and not (directory / "silent").exists(),
                   f"Ctrl-C: {error.strip()}")
        there.silent.clear()
        time.sleep(1)  # what was asked for comes yet
        stays_away(test, guest, "after Ctrl-C as before", "none")
        guest.qmp("stop")
        figures = save(guest, directory / "paused", "--parent", directory / "plain")
        test.check(figures["load_us"] > 0 and figures["pages_in_snapshots"] > HELD_PAGES // 4,
                   f"it was loaded in {figures['load_us'] / 1e6:.1f} s; {figures['pages_in_snapshots']} pages are the parent's, "
                   f"{figures['pages_stored']} are stored")
        paths = [one["path"] for one in json.loads((directory / "paused/manifest.json").read_text())["volumes"]]
        test.check(not any("latent-cache" in path for path in paths), f"it refers to files: {paths}")
        saved = latent.physical_memory(guest)
    guest.kill9()
    test.check(latent.run("verify", directory / "paused").endswith("is whole\n"), "it is whole")
    guest.restore(directory / "paused")
    guest.wait_status("paused")
    test.check_equal(latent.physical_memory(guest), saved, "RAM is the same, byte by byte")
    guest.qmp("cont")
    check(test, guest, nonce, "saved from a store")
    guest.kill9()


# ---- from a store ----

def fetch(guest, there, directory, name="packed", options=()):
    guest.restore(f"{there.url}/{name}", *options, "--disks-from", directory / name / "disks")


def check_shared(test, *clones):
    """What they map of the cache is there once."""
    rss = pss = 0
    with vm.stopped(clones):
        for clone in clones:
            for mapping in host.mappings(clone.pid):
                if "latent-cache" in mapping["path"] and mapping["perms"].startswith("rw"):
                    rss += mapping["Rss"] - mapping["Anonymous"]
                    pss += mapping["Pss"] - mapping["Anonymous"]
    test.check(rss > HELD_MIB << 10 and pss < 0.6 * rss, f"they map {rss >> 10} MiB of the cache, and {pss >> 10} are there")


def clones(test, guest, directory, nonce):
    """Two of them, with one cache."""
    with store.Store(directory) as there, VM("second", latent=EVERYTHING, mem=MEM, start=False) as second:
        fetch(guest, there, directory)
        fetch(second, there, directory)
        for clone in (guest, second):
            check(test, clone, nonce, f"{clone.name}, over HTTP")
            wait_loaded(clone)
        size = os.stat(directory / "packed/ram.zst").st_size
        test.check(there.bytes < 1.4 * size, f"{there.bytes >> 20} MiB were fetched for both, of {size >> 20}")
        check_shared(test, guest, second)
        guest.sh(f"latent-guest mem write m 0 {HELD_PAGES // 4}", timeout=60)
        for clone in (guest, second):
            check(test, clone, nonce, f"{clone.name}, when one has written")
        second.kill9()
    guest.kill9()


def stays_away(test, guest, what, state):
    """What nobody needs is not loaded."""
    before = latent.stat(guest)
    time.sleep(1.5)
    figures = latent.stat(guest)
    grown = figures["source_pages_now"] - before["source_pages_now"]
    test.check(grown < HELD_PAGES // 20 and figures["source_pages_now"] < figures["source_pages_all"] - HELD_PAGES // 4 and
               figures["rest"]["state"] == state,
               f"{what}: {figures['source_pages_now']} of {figures['source_pages_all']} pages, {grown} of them just now")


def rest(test, guest, directory, nonce):
    """It is loaded when the guest runs, until somebody stops it, or not at all."""
    with store.Store(directory, mbit_s=100) as there:
        fetch(guest, there, directory)
        check_nonce(test, guest, nonce)
        steps = {step["step"]: step["us"] for step in latent.stat(guest)["restore"]}
        test.check(steps["rest"] >= steps["resumed"], f"it begins {steps['rest'] - steps['resumed']} us after the guest runs")
        test.check_equal(latent.stat(guest)["rest"]["state"], "loading", "stat has it as of any snapshot")
        latent.run("stop-rest", guest.name)
        time.sleep(0.5)  # what was on its way
        stays_away(test, guest, "stopped", "stopped")
        there.line.bytes_s *= 10
        check(test, guest, nonce, "stopped")
        guest.kill9()
        fetch(guest, there, directory, "plain", ["--no-rest"])
        check_nonce(test, guest, nonce)
        time.sleep(0.5)
        stays_away(test, guest, "--no-rest", "none")
    guest.kill9()


class Described:
    """A VM without a line of QEMU's: known by its run directory."""

    def __init__(self, name):
        self.name = name
        self.pid = latent.stat(name)["pid"]
        self.agent = Agent(latent.run_dir() / name / "agent.sock")
        self.agent.wait_ready(60)

    def sh(self, command, timeout=60):
        return self.agent.start(command).wait(timeout)

    def end(self):
        self.agent.close()
        os.kill(self.pid, signal.SIGTERM)
        latent.wait_for(f"{self.name} has ended", lambda: self.name not in [one["name"] for one in json.loads(latent.run("ps", "--json"))])


def described(test, directory, nonce):
    """The manifest says what to run, wherever it is: clones from a store, and a spare of a packed snapshot."""
    disks = directory / "new-disks"
    disks.mkdir()
    with store.Store(directory) as there:
        latent.run("restore", "--clones", "2", "--name", "far", "--disks", disks, "--disks-from", directory / "packed/disks",
                   f"{there.url}/packed")
        for clone in [Described(f"far-{number}") for number in (1, 2)]:
            check(test, clone, nonce, f"{clone.name}, as described")
            clone.end()
    keeper = subprocess.Popen([vm.BUILD_DIR / "latent", "spare", "--name", "near", "--disks", disks, directory / "packed"],
                              stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        latent.wait_for("a spare", lambda: latent.command("spare", "take", "--name", "taken", "near").returncode == 0, 60)
        spare = Described("taken")
        check(test, spare, nonce, "a spare of a packed snapshot")
        spare.end()
    finally:
        keeper.send_signal(signal.SIGINT)
        keeper.wait(20)


def killed_pagers(test, guest, directory, nonce):
    """Under load, with nothing loaded that was not waited for."""
    def replaced():
        return guest.qemu_log.read_text(errors="replace").count("another one goes on")

    before = replaced()
    with store.Store(directory, latency_ms=15) as there, environment(LATENT_PREFETCH="none"):
        fetch(guest, there, directory)
        guest.wait_ready()
        work = guest.sh_start("latent-guest mem check m")
        for number in range(KILLS):
            time.sleep(0.6)
            test.check(work.status is None, f"the guest is at work when pager {number + 1} is killed")
            kill_pager(there)
            latent.wait_for("another one goes on", lambda: replaced() == before + number + 1)
        test.check(work.wait(120).startswith("ok"), "every page is right")
        check(test, guest, nonce, "after all")
        figures = latent.stat(guest)
        test.check_equal(figures["source_pagers_lost"], KILLS, "stat counts the pagers that were lost")
        second = VM("second", latent=EVERYTHING, mem=MEM, start=False)
        with second:
            fetch(second, there, directory)
            check(test, second, nonce, "a clone that comes after that")
            test.check_equal(len(latent.pagers(there.url)), 1, "there is one pager for both")
            check_shared(test, guest, second)
    guest.kill9()


def bad_answers(test, guest, directory, nonce):
    """The vCPU that needs a page waits for the right one, and for nothing else."""
    with store.Store(directory) as there, environment(LATENT_PREFETCH="none"):
        fetch(guest, there, directory)
        check_nonce(test, guest, nonce)
        quarter = HELD_PAGES // 4
        for number, (what, fault, word) in enumerate((("wrong bytes", store.wrong_bytes, "not what was saved"),
                                                      ("answers cut off", store.cut, "ram.zst"),
                                                      ("404", store.gone, "404"))):
            there.faults.append(fault)
            work = guest.sh_start(f"latent-guest mem check m {number * quarter} {quarter}")
            latent.wait_for(f"{what}: stat tells", lambda: word in latent.stat(guest)["source_trouble"])
            time.sleep(0.5)
            figures = latent.stat(guest)
            test.check(work.status is None and figures["source_waiting_now"] > 0, f"{what}: it waits: {figures['source_trouble']}")
            there.faults.clear()
            test.check(work.wait(60).startswith("ok"), f"{what}: it goes on, and every page is right")
        test.check(latent.stat(guest)["source_wrong"] > 0, "wrong answers were counted")
        there.silent.set()
        work = guest.sh_start(f"latent-guest mem check m {3 * quarter} {quarter}")
        latent.wait_for("stat tells of the silence", lambda: latent.stat(guest)["source_silent_ms_now"] > 2000)
        test.check("does not answer since" in latent.run("stat", guest.name) and work.status is None,
                   "a store that says nothing: stat tells, and the guest waits")
        there.silent.clear()
        test.check(work.wait(60).startswith("ok"), "it answers again, and every page is right")
        check(test, guest, nonce, "after all")
    guest.kill9()


def check_nonce(test, guest, nonce):
    test.check_equal(guest.sh("cat /run/nonce"), nonce, "it is the saved guest")


def another_snapshot(test, guest, directory, nonce):
    """What is replaced on the store while VMs run from it is not mixed with it."""
    copy = directory / "replaced"
    shutil.copytree(directory / "packed", copy)
    with store.Store(directory) as there, environment(LATENT_PREFETCH="none"):
        fetch(guest, there, directory, "replaced")
        check_nonce(test, guest, nonce)
        shutil.copyfile(directory / "again/ram.zst", copy / "ram.zst")
        work = guest.sh_start("latent-guest mem check m")
        latent.wait_for("stat tells", lambda: "has changed" in latent.stat(guest)["source_trouble"])
        test.check(work.status is None, "the guest gets nothing of another object")
        shutil.copyfile(directory / "again/manifest.json", copy / "manifest.json")
        refused(test, guest, f"{there.url}/replaced", "the same name, another snapshot", "replaced")
    guest.kill9()


def refused_there(test, guest, directory):
    with store.Store(directory) as there:
        refused(test, guest, f"{there.url}/nothing", "nothing there", "404")
        refused(test, guest, f"{there.url}/packed", "disks elsewhere", "--disks-from")
        bad = directory / "bad2"
        shutil.copytree(directory / "plain", bad, ignore=shutil.ignore_patterns("ram"))
        manifest = json.loads((bad / "manifest.json").read_text())
        (bad / "manifest.json").write_text(json.dumps({**manifest, "ram_bytes": 1 << 20}))
        refused(test, guest, f"{there.url}/bad2", "more pages than RAM", "larger than")
        (bad / "manifest.json").write_text("{" + " " * (2 << 20))
        refused(test, guest, f"{there.url}/bad2", "a manifest without end", "larger than")
    refused(test, guest, "http://127.0.0.1:9/x", "nobody there", "127.0.0.1:9")


def secured(test, guest, directory, nonce):
    """HTTPS with an authority of one's own, and S3's signatures, there."""
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
                    "-subj", "/CN=store", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
                   check=True, capture_output=True)
    (directory / "bucket").mkdir()
    (directory / "bucket/plain").symlink_to(directory / "plain")
    with store.Store(directory, certificate=(certificate, key), keys={"somebody": "open sesame"}) as there:
        refused(test, guest, f"{there.url}/plain", "an authority that is not known", "certificate")
        with environment(CURL_CA_BUNDLE=str(certificate), AWS_ENDPOINT_URL=there.url, AWS_REGION="eu-north-7"):
            refused(test, guest, "s3://bucket/plain", "not signed", "403")
            with environment(AWS_ACCESS_KEY_ID="somebody", AWS_SECRET_ACCESS_KEY="guessed"):
                refused(test, guest, "s3://bucket/plain", "signed with another key", "403")
            with environment(AWS_ACCESS_KEY_ID="somebody", AWS_SECRET_ACCESS_KEY="open sesame"):
                guest.restore("s3://bucket/plain", "--disks-from", directory / "plain/disks")
                check(test, guest, nonce, "from S3 over HTTPS")
                wait_loaded(guest)
    guest.kill9()


def body(test):
    test.need_latent()
    latent.private_run_dir()
    # On the file system of the VMs' disks: these become part of the snapshots.
    directory = Path(tempfile.mkdtemp(prefix="latent-snapshots-"))
    try:
        with VM("lazy", latent=EVERYTHING, mem=MEM) as guest:
            nonce = make(test, guest, directory)
            packed_here(test, guest, directory, nonce)
            packed_child(test, guest, directory, nonce)
            without_userfaultfd(test, guest, directory, nonce)
            damaged_here(test, guest, directory)
            clones(test, guest, directory, nonce)
            rest(test, guest, directory, nonce)
            saved_early(test, guest, directory, nonce)
            described(test, directory, nonce)
            killed_pagers(test, guest, directory, nonce)
            bad_answers(test, guest, directory, nonce)
            another_snapshot(test, guest, directory, nonce)
            refused_there(test, guest, directory)
            secured(test, guest, directory, nonce)
        latent.run("ps")
        test.check_equal(latent.vm_dirs(), [], "no run-time directory is left")
        latent.wait_for("the last pager ends", lambda: not latent.pagers(), 20)
        test.check_equal(list((latent.run_dir() / ".pagers").iterdir()), [], "and leaves nothing")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


case.main("A snapshot that cannot be mapped is loaded lazily, shared by all clones, and never wrong.", body, timeout_s=800)
