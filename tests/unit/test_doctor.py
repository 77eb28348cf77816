#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""What `latent doctor` finds: in images of all kinds, and of the machine."""

import json
import os
import pathlib
import shutil
import struct
import subprocess

import cheap
from cheap import LATENT, check

PATH = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"

OK, LACKING, NO_IMAGE = 0, 1, 66  # src/cli/cli.h
MIB, SECTOR = 1 << 20, 512
SHMEM_ENABLED = pathlib.Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
STATUSES = {"ok", "limited", "missing"}
KEYS = {"name", "status", "found", "enables", "remedy"}
MACHINE = ["kernel", "kernel's rules", "pagemap", "populate", "leases", "vm.max_map_count", "userfaultfd", "activity",
           "huge pages", "overcommit", "locked memory", "KVM", "run directory", "aio=", "QEMU"]


def run(*command):
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, env=dict(os.environ, PATH=PATH))


def doctor(*arguments):
    return subprocess.run([LATENT, "doctor", *map(str, arguments)], stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, check=False)


# ---- images ----

def random_file(path, mib=2):
    path.write_bytes(os.urandom(mib * MIB))
    return path


def ext4(path, block_bytes):
    path.write_bytes(bytes(8 * MIB))
    run("mke2fs", "-q", "-F", "-t", "ext4", "-b", block_bytes, path)
    return path


def mbr_entry(kind, first_sector, sectors):
    return struct.pack("<B3sB3sII", 0, b"", kind, b"", first_sector, sectors)


def with_mbr(path, first_sector, contents):
    """One partition, that begins there."""
    head = bytearray(first_sector * SECTOR)
    head[446:462] = mbr_entry(0x83, first_sector, len(contents) // SECTOR)
    head[510:512] = b"\x55\xaa"
    path.write_bytes(whole_pages(head + contents))
    return path


def with_gpt(path, first_sector, contents):
    head = bytearray(first_sector * SECTOR)
    head[446:462] = mbr_entry(0xee, 1, 0xffffffff)
    head[510:512] = b"\x55\xaa"
    struct.pack_into("<8sIIIIQQQQ16sQII", head, SECTOR, b"EFI PART", 0x10000, 92, 0, 0, 1, 0, 34, 0, b"", 2, 128, 128)
    struct.pack_into("<16s16sQQ", head, 2 * SECTOR, os.urandom(16), os.urandom(16), first_sector,
                     first_sector + len(contents) // SECTOR - 1)
    path.write_bytes(whole_pages(head + contents))
    return path


def whole_pages(data):
    return data + bytes(-len(data) % 4096)


def qcow2(path, source, *options):
    run("qemu-img", "convert", "-O", "qcow2", *options, source, path)
    return path


# ---- what is expected ----

def check_image(machine_status, path, expected, status=None):
    """expected: {name of a check: its status}; all others are "ok", a name with None is not there."""
    done = doctor("--json", path)
    answer = json.loads(done.stdout)
    [image] = answer["images"]
    what = f"latent doctor {path.name}"
    check(done.returncode == (machine_status if status is None else status), f"{what}: status {done.returncode}")
    check(image["path"] == str(path), f"{what}: the path is {image['path']}")
    found = check_keys(what, image["checks"])
    for name, wanted in expected.items():
        check(found.get(name) == wanted, f"{what}: {name} is {found.get(name)}, not {wanted}")
    others = {name: one for name, one in found.items() if name not in expected and one != "ok"}
    check(not others, f"{what}: not expected: {others}")
    return {one["name"]: one for one in image["checks"]}, done


def check_keys(what, checks):
    """The shape of each check; {name: status}."""
    for one in checks:
        check(set(one) == KEYS, f"{what}: keys {sorted(one)}")
        check(one["status"] in STATUSES, f"{what}: status {one['status']} of {one['name']}")
        check(one["name"] and one["found"] and one["enables"], f"{what}: says too little: {one}")
        check(one["remedy"] or one["status"] != "limited", f"{what}: no remedy: {one}")
    return {one["name"]: one["status"] for one in checks}


def machine():
    """Of the machine anything may be said; returns the exit status that goes with it."""
    done = doctor("--json")
    answer = json.loads(done.stdout)
    check(set(answer) == {"checks", "images"} and answer["images"] == [], f"keys of the answer: {sorted(answer)}")
    found = check_keys("latent doctor", answer["checks"])
    check(list(found) == MACHINE, f"checks of the machine: {list(found)}")
    huge = next(one for one in answer["checks"] if one["name"] == "huge pages")
    setting = SHMEM_ENABLED.read_text() if SHMEM_ENABLED.exists() else ""
    forced = any(f"[{word}]" in setting for word in ("always", "within_size", "force"))
    check("advise" not in (huge["remedy"] or "") and (huge["status"] == "limited" or not forced), f"huge pages: {huge}")
    status = LACKING if "missing" in found.values() else OK
    check(done.returncode == status and not done.stderr, f"latent doctor: status {done.returncode}: {done.stderr}")
    text = doctor()
    check(text.returncode == status and all(name in text.stdout for name in MACHINE), "the same for people")
    return status


def file_systems(status, directory):
    found, _ = check_image(status, ext4(directory / "1k.raw", 1024), {"format": "ok", "block size": "limited"})
    check("1024" in found["block size"]["found"], f"block size: {found['block size']}")
    found, _ = check_image(status, ext4(directory / "4k.raw", 4096), {"format": "ok", "block size": "ok"})
    check("4096" in found["block size"]["found"], f"block size: {found['block size']}")
    check_image(status, qcow2(directory / "1k.qcow2", directory / "1k.raw"), {"block size": "limited"})
    text = doctor(directory / "1k.raw").stdout
    check("LIMITED  block size" in text and "do: make the file system again" in text, f"for people: {text[-600:]}")


def partitions(status, directory):
    contents = (directory / "4k.raw").read_bytes()
    found, _ = check_image(status, with_mbr(directory / "mbr63.raw", 63, contents),
                           {"partition": "limited", "block size": None})
    check(str(63 * SECTOR) in found["partition"]["found"], f"partition: {found['partition']}")
    aligned = {"partition": None, "block size": "ok"}
    check_image(status, with_mbr(directory / "mbr2048.raw", 2048, contents), aligned)
    check_image(status, with_gpt(directory / "gpt.raw", 2048, contents), aligned)
    check_image(status, with_gpt(directory / "gpt63.raw", 63, contents), {"partition": "limited"})
    check_image(status, qcow2(directory / "gpt63.qcow2", directory / "gpt63.raw"), {"partition": "limited"})


def qcow2s(status, directory):
    source = random_file(directory / "random.raw")
    source.write_bytes(source.read_bytes() + b"well compressed " * (MIB // 16))
    check_image(status, qcow2(directory / "plain.qcow2", source), {"compression": "ok", "backing file": None})
    found, _ = check_image(status, qcow2(directory / "compressed.qcow2", source, "-c"), {"compression": "limited"})
    check("%" in found["compression"]["found"], f"compression: {found['compression']}")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", directory / "plain.qcow2", "-F", "qcow2",
        directory / "overlay.qcow2")
    check_image(status, directory / "overlay.qcow2", {"this file": "ok", "backing file": "ok"})
    (directory / "plain.qcow2").unlink()
    check_image(status, directory / "overlay.qcow2", {"format": "missing"}, LACKING)


def who_writes(status, directory):
    path = random_file(directory / "written.raw")
    with open(path, "r+b"):
        found, _ = check_image(status, path, {"this file": "limited"})
    check(f"process {os.getpid()}" in found["this file"]["found"], f"who writes: {found['this file']}")
    check_image(status, path, {"this file": "ok"})
    with open(path, "ab") as file:
        file.write(b"odd")
    check_image(status, path, {"length": "limited"})


def no_images(directory):
    for path, why in ((directory / "none.raw", "No such file"), (directory, "Is a directory")):
        done = doctor("--json", path)
        check(done.returncode == NO_IMAGE and done.stderr.count("\n") == 1, f"{path}: status {done.returncode}")
        check(str(path) in done.stderr and why in done.stderr, f"{path}: {done.stderr}")
        [image] = json.loads(done.stdout)["images"]
        check(image["path"] == str(path) and not image["checks"] and why in image["error"], f"{path}: {done.stdout[-300:]}")
    done = doctor("--json", directory / "none.raw", directory / "4k.raw")
    images = json.loads(done.stdout)["images"]
    check(done.returncode == NO_IMAGE and not images[0]["checks"] and images[1]["checks"], "the next one is looked at")


def body(directory):
    status = machine()
    file_systems(status, directory)
    partitions(status, directory)
    qcow2s(status, directory)
    who_writes(status, directory)
    no_images(directory)


if __name__ == "__main__":
    cheap.main(body, *[pathlib.Path(shutil.which(name, path=PATH) or name) for name in ("qemu-img", "mke2fs")])
