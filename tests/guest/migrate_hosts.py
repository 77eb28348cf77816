#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""A guest that is moved over TCP between two network namespaces, to where its image is on storage of its own: what is read there
comes from there. Then the image that it came from is changed: the guest does not notice, and does not go back."""

import contextlib
import os
import subprocess
import tempfile
from pathlib import Path

from lib import case, hosts, latent
from lib.migration import EVERYTHING, MEM, NO_ANSWER, SOME_FILES, begin, check, migrate, move, runs
from lib.vm import VM, images_dir

MBIT_S, PORT = 1000, 4848
OTHER_BYTES = 64 << 20


def body(test):
    test.need_latent()
    reason = hosts.why_not()
    if reason:
        test.skip(reason)
    latent.private_run_dir()
    with hosts.shaped(MBIT_S) as (here, there), storage() as storage_here, storage() as storage_there:
        images = [copy_image(directory) for directory in (storage_here, storage_there)]
        with place("host1", here, images[0]) as first, place("host2", there, images[1], start=False) as second:
            second.disk = first.disk
            to_and_not_back(test, first, second, here, there, images)


@contextlib.contextmanager
def storage():
    """A file system of its own, in memory."""
    with tempfile.TemporaryDirectory(prefix="latent-storage-") as directory:
        subprocess.run(["mount", "-t", "tmpfs", "latent-storage", directory], check=True)
        try:
            yield Path(directory)
        finally:
            subprocess.run(["umount", "-l", directory], check=True)


def copy_image(directory):
    copy = directory / "golden.qcow2"
    subprocess.run(["cp", "--sparse=always", images_dir() / copy.name, copy], check=True)
    return copy


def place(name, host, image, start=True):
    return VM(name, image=image, mem=MEM, latent=EVERYTHING, start=start, before=host.before,
              drive_opts=f"backing.file.filename={image}")


def to_and_not_back(test, first, second, here, there, images):
    nonce = begin(test, first, SOME_FILES)
    sent, _ = move(test, first, second, f"tcp:{there.address}:{PORT}", "--plain",
                   receive=["--plain", "--volume", f"{images[0]}={images[1]}"])
    test.check(sent["pages_on_volumes"] > 1000, f"{sent['pages_on_volumes']} pages were told by their places on the image")
    change(images[0])
    check(test, second, nonce, "the image that it came from is another one now", SOME_FILES)

    address = f"tcp:{here.address}:{PORT}"
    receiver = first.receive(address, "--plain", "--volume", f"{images[1]}={images[0]}")
    answer = migrate(second, address, "--plain")
    test.check(answer.returncode == NO_ANSWER and "other contents" in answer.stderr, f"it cannot go back: {answer.stderr.strip()}")
    test.check_equal(receiver.wait(30), NO_ANSWER, "and is not waited for any more")
    test.check_equal(runs(second), True, "it runs where it is")
    check(test, second, nonce, "after that", SOME_FILES)


def change(image):
    """All that it holds, in its last part."""
    with open(image, "r+b") as file:
        file.seek(-OTHER_BYTES, os.SEEK_END)
        file.write(os.urandom(OTHER_BYTES))


case.main("A guest is moved between two hosts that share no image.", body, timeout_s=600)
