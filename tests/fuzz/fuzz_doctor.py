#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Hostile images through the real `latent doctor` and the real qemu-img: each gets an answer, soon.

usage: fuzz_doctor.py [SECONDS [SEED]]     (fuzz_image.c does the same, faster, without qemu-img)

An image whose answer is wrong is kept as ./crash-doctor.
"""

import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BUILD = Path(os.environ.get("LATENT_BUILD") or Path(__file__).resolve().parents[2] / "build")
ANSWERS = {0, 1, 66}  # fine, something is missing, the image cannot be read
ANSWER_MAX_S = 10
MEMORY_MAX_KIB = 512 << 10  # of the command and of every qemu-img
TELLING = [0, 1, 2, 3, 9, 16, 21, 63, 64, 0x7fffffff, 0x80000000, 0xffffffff, 1 << 40, (1 << 62) - 1,
           (1 << 63), (1 << 64) - 1]


def qemu_img(*words):
    subprocess.run(["qemu-img", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def doctor(path):
    """None, or what is wrong with the answer."""
    start_s = time.monotonic()
    result = subprocess.run([BUILD / "latent", "doctor", "--json", path], capture_output=True, timeout=300)
    took_s = time.monotonic() - start_s
    memory_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    if result.returncode not in ANSWERS:
        return f"status {result.returncode}: {result.stderr.decode(errors='replace')}"
    if took_s > ANSWER_MAX_S or memory_kib > MEMORY_MAX_KIB:
        return f"it took {took_s:.1f} s; the largest process had {memory_kib} KiB"
    checks = json.loads(result.stdout.decode())["images"][0]["checks"]
    names = [check["name"] for check in checks]
    return None if "format" in names else f"it says nothing of the image: {names}"


def seeds(directory):
    """Images of the formats that Latent maps, with something in them."""
    base, zipped, middle, top = (directory / f"{name}.qcow2" for name in ("base", "zipped", "middle", "top"))
    raw = directory / "disk.raw"
    raw.write_bytes(os.urandom(1 << 20) + bytes(3 << 20))
    qemu_img("convert", "-O", "qcow2", raw, base)
    qemu_img("convert", "-c", "-O", "qcow2", raw, zipped)
    qemu_img("create", "-f", "qcow2", "-b", base, "-F", "qcow2", middle)
    qemu_img("create", "-f", "qcow2", "-b", middle, "-F", "qcow2", top)
    return [raw, base, zipped, middle, top]


def loops(directory):
    """Backing files that never end."""
    one, two, itself = (directory / f"{name}.qcow2" for name in ("one", "two", "itself"))
    for path in (one, itself):
        qemu_img("create", "-f", "qcow2", path, "64M")
    qemu_img("create", "-f", "qcow2", "-b", one, "-F", "qcow2", two)
    qemu_img("rebase", "-u", "-b", two, "-F", "qcow2", one)
    qemu_img("rebase", "-u", "-b", itself, "-F", "qcow2", itself)
    return [one, two, itself]


def mutate(data, chance):
    """Numbers of the header, and of the tables behind it."""
    for _ in range(chance.randint(1, 4)):
        what = chance.randrange(4)
        if what == 0:
            struct.pack_into(">I", data, chance.randrange(0, 112, 4), chance.choice(TELLING) & 0xffffffff)
        elif what == 1:
            struct.pack_into(">Q", data, chance.randrange(0, 112, 8), chance.choice(TELLING))
        elif what == 2:
            struct.pack_into(">Q", data, chance.randrange(0, min(len(data), 1 << 19) - 8, 8), chance.getrandbits(64))
        else:
            del data[chance.randrange(len(data) // 2, len(data)) + 8:]
    return data


def main():
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10
    chance = random.Random(sys.argv[2] if len(sys.argv) > 2 else "1")
    if not shutil.which("qemu-img"):
        print("skipped: there is no qemu-img")
        return 77
    with tempfile.TemporaryDirectory(prefix="latent-doctor-") as name:
        directory = Path(name)
        plain, image, done = seeds(directory), directory / "image", 0
        for path in plain + loops(directory):
            wrong = doctor(path)
            if wrong:
                print(f"{path.name}: {wrong}")
                return 1
        contents = [path.read_bytes() for path in plain]
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            image.write_bytes(mutate(bytearray(chance.choice(contents)), chance))
            wrong = doctor(image)
            if wrong:
                shutil.copy(image, "crash-doctor")
                print(f"mutation {done}: {wrong}\nthe image is ./crash-doctor")
                return 1
            done += 1
    print(f"fuzz_doctor: {len(plain) + 3} images, {done} mutations, all answered")
    return 0


sys.exit(main())
