#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""`latent save` under load, `latent restore`, and what must not go wrong between them."""

import contextlib
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from pathlib import Path

from lib import case, host, latent, vm
from lib.vm import VM

EVERYTHING = ["--min-run", "1", "--share-threshold", "0"]
FILES = "/usr/lib/python3.11/"
HELD_MIB = 128
CHURN_PAGES_PER_S = 20000
# A line for each number, with its digest; those in /run/synced, which is memory, are on the disk.
KEEP_JOURNAL = ("i=0; while [ ! -e /run/stop ]; do i=$((i+1)); echo $i $(echo $i | sha256sum | cut -c1-64) >> /root/journal; "
                "sync /root/journal; echo $i > /run/synced.new; mv /run/synced.new /run/synced; done")
STEPS_BEFORE = ["checks", "overlays", "exec", "ram", "state"]  # before the guest runs
KIND_DATA, KIND_EQUAL = 1, 3  # src/snapshot/format.h
ACTIVE_HEADER_BYTES, RECORD_BYTES, DIGEST_BYTES = 40, 16, 8  # src/snapshot/active.h
ACTIVE_PAGES = 64  # of the active set, at its end, that are damaged
NO_IMAGE, REFUSED = 66, 65


def save(guest, directory, *options):
    answer = latent.command("save", "--json", *options, guest.name, directory)
    if answer.returncode:
        raise vm.GuestError(f"save: {answer.stderr}")
    return json.loads(answer.stdout)


def fill(test, guest):
    """Reads files, has many copies in overlays, holds checked memory, and knows a nonce that is nowhere else."""
    latent.check_hashes(test, guest, "/usr/")
    guest.drop_guest_caches()
    guest.sh(f"latent-guest mem hold m {HELD_MIB} 13 mixed", timeout=60)
    latent.check_hashes(test, guest, FILES)
    guest.sh("head -c 16 /dev/urandom | sha256sum > /run/nonce")
    return guest.sh("cat /run/nonce")


def check_memory(test, guest, what):
    test.check(guest.sh("latent-guest mem check m", timeout=120).startswith("ok"), f"the guest's memory is right {what}")


def same_memory(test, directory):
    """Every page of the restored VM is that of the stopped one."""
    snapshot = directory / "same"
    with VM("same", latent=EVERYTHING, mem="512M") as guest:
        nonce = fill(test, guest)
        guest.qmp("stop")
        figures = save(guest, snapshot)
        test.check(figures["private_pages"] > 1000 and figures["pages_on_volumes"] > 1000,
                   f"{figures['private_pages']} copies in overlays, {figures['pages_on_volumes']} pages on images")
        saved = latent.physical_memory(guest)
        guest.kill9()
        guest.restore(snapshot)
        guest.wait_status("paused")
        test.check_equal(latent.physical_memory(guest), saved, "RAM is the same, byte by byte")
        guest.qmp("cont")
        test.check_equal(guest.sh("cat /run/nonce"), nonce, "it is the same guest, not a new one")
        check_memory(test, guest, "after the restore")
        guest.shutdown()


def saves_under_load(test, directory):
    """Saved while it writes, three times over, and from the restored VM again."""
    with VM("load", latent=EVERYTHING) as guest:
        nonce = fill(test, guest)
        load = guest.sh_start(f"latent-guest mem churn m 0 {HELD_MIB * 256} 40 {CHURN_PAGES_PER_S}")
        writes = guest.sh_start(KEEP_JOURNAL)
        for number in range(3):
            time.sleep(1)
            figures = save(guest, directory / f"load{number}")
            test.say(f"save {number}: the guest stood {figures['pause_us'] / 1000:.1f} ms (RAM {figures['point_us'] / 1000:.1f}), "
                     f"{figures['private_pages']} copies, {figures['faults']} write faults, "
                     f"{figures['pages_stored']} pages stored")
            test.check(figures["faults"] > 0 and figures["pages_stored"] > 1000, "it wrote while it was saved")
            test.check(figures["active_pages"] > figures["active_written_pages"] > 0,
                       f"{figures['active_pages']} pages in use, of that {figures['active_written_pages']} written")
        test.check(load.status is None, "the load ran all the time")
        load.kill()
        writes.kill()
        check_memory(test, guest, "after three saves")
        latent.check_hashes(test, guest, FILES, what="after three saves")
        guest.kill9()
        for number in (2, 0):
            snapshot = directory / f"load{number}"
            test.check(latent.run("verify", snapshot).endswith("is whole\n"), f"snapshot {number} is whole")
            if number == 0:
                restore_step_by_step(test, guest, snapshot)
            else:
                guest.restore(snapshot)
            test.check_equal(guest.sh("cat /run/nonce"), nonce, f"restored from save {number}: the nonce is there")
            check_memory(test, guest, "and what it was writing")
            check_masks(test, guest)
            guest.drop_guest_caches()
            latent.check_hashes(test, guest, FILES, what="read anew by the restored guest")
            test.check(guest.sh("dmesg | grep -ci 'ext4.*error' || true").strip() == "0", "its file system has no error")
            check_journal(test, guest)
            if number == 2:
                save(guest, directory / "again")
                check_memory(test, guest, "after the save of a restored VM")
            guest.kill9()
        guest.restore(directory / "again")
        test.check_equal(guest.sh("cat /run/nonce"), nonce, "restored from a snapshot of a restored VM")
        check_memory(test, guest, "there, too")
        guest.shutdown()


def check_journal(test, guest):
    """What the guest had written and synced when it was saved is on the disk that it finds: read from there, whole, and
    as far as the number that it held in its memory."""
    guest.sh("touch /run/stop; sleep 1")  # it has gone on with the guest
    guest.drop_guest_caches()
    lines = guest.sh("cat /root/journal").splitlines()
    synced = int(guest.sh("cat /run/synced"))
    numbers = [int(line.split()[0]) for line in lines if len(line.split()) == 2]
    sums = guest.sh("while read n sum; do echo $n | sha256sum | cut -c1-64; done < /root/journal").splitlines()
    test.check_equal((numbers, sums), (list(range(1, len(lines) + 1)), [line.split()[1] for line in lines]),
                     f"its journal has {len(lines)} whole lines")
    test.check(0 < synced <= len(lines), f"and all {synced} that were synced")


def restore_step_by_step(test, guest, snapshot):
    """What a guest needs first is there before it runs, though none of its files was in memory."""
    for path in snapshot.glob("*"):
        if path.is_file():
            host.drop_from_page_cache(path)
    for path in snapshot.glob("disks/*"):
        with contextlib.suppress(RuntimeError):  # an image, which other VMs may have mapped
            host.drop_from_page_cache(path)
    guest.restore(snapshot, "--paused", "--no-rest")  # (rest.py: when that begins)
    guest.wait_status("paused")
    test.check_equal(steps(guest)[0], STEPS_BEFORE, "a guest that was not let run yet: the steps")
    files = {os.readlink(fd): fd for fd in Path(f"/proc/{guest.pid}/fd").iterdir() if fd.is_symlink()}
    own = [str(path) for path in guest.dir.glob(f"{guest.name}-root.*.qcow2") if str(path) in files]
    test.check(len(own) == 1 and re.search(r"\.[0-9a-f]{16}\.qcow2$", own[0]), f"its new disk is open: {own}")
    test.check(f"{snapshot}/disks/disk0.0.qcow2" in files, "and the saved one beneath")
    [memfd] = [fd for name, fd in files.items() if name.startswith("/memfd:latent-ram:")]
    first = first_in_use(snapshot)
    test.check(len(first) > 100 and first <= in_memory(memfd, first),
               f"the {len(first)} stored pages that it used first are in memory")
    guest.qmp("cont")
    guest.wait_status("running")
    names, times = steps(guest)
    test.check_equal(names[:len(STEPS_BEFORE) + 1], [*STEPS_BEFORE, "resumed"], "then it was resumed")
    test.check(0 < times[0] and times == sorted(times), f"one after the other: {times}")


def steps(guest):
    """The steps of a restore that are done, and when they were, in microseconds."""
    told = latent.stat(guest)["restore"]
    return [step["step"] for step in told], [step["us"] for step in told]


def first_in_use(snapshot):
    """Pages of the first quarter of the active set whose contents are in the snapshot's `ram` (docs/snapshot.md)."""
    in_use = kinds_in_use(snapshot)
    return {page for page, kind in in_use[:len(in_use) // 4] if kind == KIND_DATA}


def kinds_in_use(snapshot):
    """(number, kind) of the pages of the active set, in its order."""
    metadata, active = ((snapshot / name).read_bytes() for name in ("pages", "active"))
    [blocks], [count] = struct.unpack_from("=I", metadata, 16), struct.unpack_from("=Q", active, 16)
    kinds = [kind for kind, _, _ in struct.iter_unpack("=IIQ", metadata[40 + 72 * blocks:])]
    records = active[ACTIVE_HEADER_BYTES:][:RECORD_BYTES * count]
    return [(page, kinds[page]) for page, _, _ in struct.iter_unpack("=QII", records)]


def in_memory(memfd, pages):
    """Those of the pages that a VM's memfd has."""
    with open(memfd, "rb") as file:
        return {page for page in pages if data_begins_at(file, page * host.PAGE_BYTES)}


def data_begins_at(file, offset):
    try:
        return os.lseek(file.fileno(), offset, os.SEEK_DATA) == offset
    except OSError:  # ENXIO: no more data
        return False


def check_masks(test, guest):
    """Each page that was to be made when it is touched is accounted for."""
    time.sleep(1.2)  # the statistics follow once a second
    stat = json.loads(latent.run("stat", "--json", guest.name))
    gone = sum(stat[f"masked_{how}"] for how in ("made", "mapped", "copied", "dropped"))
    test.check(0 < stat["pages_masked"] == gone + stat["pages_masked_now"],
               f"of {stat['pages_masked']} masked pages {stat['masked_made']} were made, {stat['masked_mapped']} mapped, "
               f"{stat['masked_copied']} copied, {stat['masked_dropped']} replaced")


def broken_off(test, directory):
    """A save that ends early, however it ends, leaves the VM as it was."""
    with VM("broken", latent=EVERYTHING, extra=["-device", "virtio-balloon-pci,free-page-reporting=on"]) as guest:
        fill(test, guest)
        for what, number in (("SIGINT", signal.SIGINT), ("SIGKILL", signal.SIGKILL)):
            load = guest.sh_start(f"latent-guest mem churn m 0 {HELD_MIB * 256} 6 {CHURN_PAGES_PER_S}")
            process = subprocess.Popen([vm.BUILD_DIR / "latent", "save", "--limit", "10", guest.name, directory / what],
                                       stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            time.sleep(1)
            guest.drop_guest_caches()  # free pages are reported: QEMU itself meets the write-protection
            guest.qmp("balloon", value=600 << 20)
            time.sleep(1)
            test.check(process.poll() is None, f"{what}: it is being saved")
            process.send_signal(number)
            _, said = process.communicate(timeout=10)
            disk = guest.qmp("query-block")[0]["inserted"]["file"]
            test.check(number == signal.SIGKILL or f"the VM writes to {disk} from now on" in said,
                       f"{what}: it says what the disk is: {said.strip()}")
            test.check(not (directory / what).exists(), f"{what}: there is no snapshot")
            test.check("ok" in load.wait(30), f"{what}: the guest goes on writing")
            check_memory(test, guest, f"after {what}")
            guest.qmp("balloon", value=1 << 30)
        leftover = [path.name for path in directory.iterdir() if "SIGINT" in path.name]
        test.check_equal(leftover, [], "what an interrupted save has written is removed")
        save(guest, directory / "after")
        test.check_equal(latent.command("save", guest.name, directory / "after").returncode, latent.USAGE,
                         "a directory that is there is not written over")
        check_memory(test, guest, "after all")
        guest.shutdown()


def refused(test, guest, snapshot, what, *words):
    answer = latent.command("restore", "--name", "refused", "--disks", snapshot, snapshot, "--", guest.qemu,
                            *guest.qemu_arguments())
    test.check(answer.returncode in (NO_IMAGE, REFUSED) and answer.stderr.count("\n") == 1 and
               all(word in answer.stderr for word in words), f"{what}: {answer.stderr.strip()}")
    test.check("refused" not in latent.vm_dirs(), f"{what}: nothing is left behind")


def copy_snapshot(good, bad):
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(good, bad, copy_function=lambda a, b: subprocess.run(["cp", "--sparse=always", a, b], check=True))


def flip_bit(path, at):
    with open(path, "r+b") as file:
        byte = os.pread(file.fileno(), 1, at)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1]), at)


def damaged(test, directory):
    """A snapshot that is not what it was is refused before anything is mapped or run."""
    good = directory / "after"
    with VM("damaged", latent=EVERYTHING, start=False) as guest:
        bad = directory / "bad"

        def copy():
            copy_snapshot(good, bad)

        copy()
        manifest = json.loads((bad / "manifest.json").read_text())
        for key, value, word in (("version", 99, "version"), ("format", "other", "snapshot"), ("ram_bytes", -1, "ram_bytes"),
                                 ("volumes", 7, "volumes")):
            (bad / "manifest.json").write_text(json.dumps({**manifest, key: value}))
            refused(test, guest, bad, f"manifest with {key} {value}", word)
        layers = [dict(manifest["disks"][0]["layers"][0], file="../../etc/passwd")]
        disks = [dict(manifest["disks"][0], layers=layers)]
        (bad / "manifest.json").write_text(json.dumps({**manifest, "disks": disks}))
        refused(test, guest, bad, "a disk outside", "file")
        (bad / "manifest.json").write_text(json.dumps({**manifest, "name": "../outside"}))
        refused(test, guest, bad, "a name that leads elsewhere", "name")
        disks = [dict(manifest["disks"][0], drive="../outside")]
        (bad / "manifest.json").write_text(json.dumps({**manifest, "disks": disks}))
        refused(test, guest, bad, "a drive that leads elsewhere", "drive")
        (bad / "manifest.json").write_text("{")
        refused(test, guest, bad, "half a manifest", "JSON")
        copy()
        os.truncate(bad / "ram", 4096)
        refused(test, guest, bad, "RAM cut off", "ram")
        copy()
        with open(bad / "disks/disk0.0.qcow2", "r+b") as file:
            file.write(b"\0" * 512)
        refused(test, guest, bad, "a disk that has changed", "disk0")
        copy()
        flip_bit(bad / "state", 1000)
        refused(test, guest, bad, "a bit of the device state", "state", "digest")
        answer = latent.command("verify", bad)
        test.check(answer.returncode == NO_IMAGE and "state" in answer.stderr, f"verify, too: {answer.stderr.strip()}")
        mixed(test, guest, directory, bad)
        copy()
        with open(bad / "ram", "rb") as file:
            data = os.lseek(file.fileno(), 1 << 20, os.SEEK_DATA)
        flip_bit(bad / "ram", data)
        answer = latent.command("verify", bad)
        test.check(answer.returncode == NO_IMAGE and "page" in answer.stderr, f"a flipped bit: {answer.stderr.strip()}")
        active_damaged(test, guest, directory / "load0", bad)
        pages_damaged(test, guest, bad, copy)


def mixed(test, guest, directory, bad):
    """Devices of one save and memory of another one, each of them whole."""
    copy_snapshot(directory / "load1", bad)
    for name in ("pages", "ram"):
        shutil.copy(directory / "load0" / name, bad / name)
    refused(test, guest, bad, "pages and RAM of another save", "pages", "digest")
    answer = latent.command("verify", bad)
    test.check(answer.returncode == NO_IMAGE and "pages" in answer.stderr, f"verify, too: {answer.stderr.strip()}")


def active_damaged(test, guest, good, bad):
    """It is a help: one that is not what it should be is found by verify, and a restore does without."""
    copy_snapshot(good, bad)
    data = bytearray((bad / "active").read_bytes())
    for at in range(len(data) - 100, len(data) - ACTIVE_PAGES * 4096, -4096):  # a bit of many pages
        data[at] ^= 1
    (bad / "active").write_bytes(data)
    answer = latent.command("verify", bad)
    test.check(answer.returncode == NO_IMAGE and "the copy of page" in answer.stderr, f"a wrong copy: {answer.stderr.strip()}")
    wrong_copies(test, guest, bad, "flipped bits")
    copy_snapshot(good, bad)
    swap_copies(test, bad)
    wrong_copies(test, guest, bad, "swapped copies")
    copy_snapshot(good, bad)
    os.truncate(bad / "active", 8192)
    does_without(test, guest, bad, "a damaged active set")
    shutil.copy(good.parent / "load1/active", bad / "active")
    answer = latent.command("verify", bad)
    test.check(answer.returncode == NO_IMAGE and "another snapshot" in answer.stderr, f"verify: {answer.stderr.strip()}")
    does_without(test, guest, bad, "that of another save of this guest")


def does_without(test, guest, bad, what):
    said = cold_restore(test, guest, bad, what)
    test.check("active set is not used" in said, f"{what}: and it is said: {said}")


def swap_copies(test, snapshot):
    """Of the pages that are stored, neighbours in the list have each other's contents, and the digests that go with them."""
    data = bytearray((snapshot / "active").read_bytes())
    stored = [kind in (KIND_DATA, KIND_EQUAL) for _, kind in kinds_in_use(snapshot)]
    count, swapped = len(stored), 0
    for number in range(0, count - 1, 2):
        if not stored[number] or not stored[number + 1]:
            continue
        swapped += 1
        for at, size in ((ACTIVE_HEADER_BYTES + count * RECORD_BYTES + number * DIGEST_BYTES, DIGEST_BYTES),
                         (len(data) - (count - number) * 4096, 4096)):
            data[at:at + 2 * size] = data[at + size:at + 2 * size] + data[at:at + size]
    (snapshot / "active").write_bytes(data)
    test.check(swapped > ACTIVE_PAGES, f"{swapped} pairs of copies have changed places")


def wrong_copies(test, guest, bad, what):
    said = cold_restore(test, guest, bad, what)
    wrong = re.search(r"(\d+) pages of the snapshot's active set are not what was saved", said)
    test.check(wrong and int(wrong[1]) > 0, f"{what}: and it is said: {wrong and wrong[0]}")


def cold_restore(test, guest, bad, what):
    """Nothing of the snapshot is in memory, so that the copies are used, but for the wrong ones. What is said then."""
    for name in ("ram", "active"):
        host.drop_from_page_cache(bad / name)
    before = len(guest.qemu_log.read_text()) if guest.qemu_log.exists() else 0
    guest.restore(bad)
    test.check(guest.sh("latent-guest mem check m", timeout=120).startswith("ok"), f"{what}: the guest's memory is right")
    guest.kill9()
    return guest.qemu_log.read_text()[before:]


def pages_damaged(test, guest, bad, copy):
    """The agent reads this file itself; it ends QEMU before the guest could run."""
    copy()
    with open(bad / "pages", "r+b") as file:
        file.seek(5000)
        file.write(b"\xff" * 16)
    guest.restore(bad)
    test.check(guest.process.wait(20) != 0, "damaged metadata: QEMU ends")
    test.check("pages: the checksum is wrong" in guest.qemu_log.read_text(), "and says why")


def body(test):
    test.need_latent()
    latent.private_run_dir()
    # On the file system of the VMs' disks: these become part of the snapshots.
    directory = Path(tempfile.mkdtemp(prefix="latent-snapshots-"))
    try:
        same_memory(test, directory)
        saves_under_load(test, directory)
        broken_off(test, directory)
        damaged(test, directory)
        latent.run("ps")
        test.check_equal(latent.vm_dirs(), [], "no run-time directory is left")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


case.main("A VM is saved while it runs and restored as it was; nothing that fails harms it.", body, timeout_s=800)
