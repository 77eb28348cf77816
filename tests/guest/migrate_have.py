#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""A guest that is moved to where a snapshot of it is (`latent receive --have`): what both have is not sent. Then back to where the
same snapshot has been damaged: what is damaged is sent, and does no harm."""

import os

from lib import case, latent
from lib.migration import HELD_MIB, SOME_FILES, Pair, begin, check, move

PAGE_BYTES = 4096
HELD_PAGES = HELD_MIB << 8


def body(test):
    test.need_latent()
    latent.private_run_dir()
    with Pair("have") as pair:
        nonce = begin(test, pair.first, SOME_FILES)
        snapshot = pair.directory / "snapshot"
        latent.run("save", "--no-disk", pair.first.name, snapshot)
        whole = move_with(test, pair.first, pair.second, pair, snapshot)
        test.check(whole["pages_same"] > HELD_PAGES * 9 // 10, f"{whole['pages_same']} pages were not sent")
        test.check(whole["bytes_sent"] < HELD_MIB << 19, f"and {whole['bytes_sent'] >> 20} MiB were")
        check(test, pair.second, nonce, "moved", SOME_FILES)

        damage(snapshot / "ram")
        damaged = move_with(test, pair.second, pair.first, pair, snapshot, "--no-postcopy")
        test.check_equal(damaged["pages_missing"], 0, "all was there before it ran")
        test.check(0 < damaged["pages_same"] < whole["pages_same"] * 3 // 4, f"with a half of it damaged {damaged['pages_same']} were "
                   "not sent")
        check(test, pair.first, nonce, "with a damaged snapshot", SOME_FILES)

        answer = latent.command("receive", "--listen", pair.socket(), "--have", pair.directory / "nowhere")
        test.check(answer.returncode and "nowhere" in answer.stderr, "a snapshot that is not there is refused at once")


def move_with(test, here, there, pair, snapshot, *options):
    sent, got = move(test, here, there, pair.socket(), *options, receive=["--have", snapshot])
    test.check_equal(got["pages_same"], sent["pages_same"], "both sides have counted the same pages as the same")
    return sent


def damage(path):
    """Every other page that is stored gets one other byte."""
    fd = os.open(path, os.O_RDWR)
    end, at = os.fstat(fd).st_size, 0
    try:
        while at < end:
            at = os.lseek(fd, at, os.SEEK_DATA)
            byte = os.pread(fd, 1, at + 99)
            os.pwrite(fd, bytes([byte[0] ^ 1]), at + 99)
            at += 2 * PAGE_BYTES
    except OSError:
        pass  # no data behind it
    os.close(fd)


case.main("A guest is moved to where a snapshot has much of its memory.", body, timeout_s=600)
