#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""A guest that writes all the time, and is looked at by a scan, is moved to and fro, by pre-copy and post-copy in turn. Argument:
how often (default: 4; make check-long: 10). While it is moved the scan goes on."""

import sys
import time

from lib import case, latent
from lib.migration import HELD_MIB, NO_ANSWER, SOME_FILES, Pair, begin, check, move, still_lives

CHURN_PAGES_PER_S = 2000
WAYS = ([], ["--max-downtime", "0"], ["--no-postcopy"])


def body(test):
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    test.need_latent()
    latent.private_run_dir()
    with Pair("pong") as pair:
        here, there = pair.first, pair.second
        nonce = begin(test, here, SOME_FILES)
        here.sh_start(f"latent-guest mem churn m 0 {HELD_MIB * 64} 3600 {CHURN_PAGES_PER_S}")
        for number in range(times):
            latent.run("scan", here.name, "--period", "1s")
            if not number:
                scan_goes_on(test, here, there, pair.socket())
            move(test, here, there, pair.socket(), *WAYS[number % len(WAYS)])
            here, there = there, here
            test.check(here.sh("latent-guest mem check m", timeout=60).startswith("ok"), f"move {number + 1}: its memory is right")
        check(test, here, nonce, f"after {times} moves", SOME_FILES)
        here.sh_start("latent-guest poweroff")
        test.check(not still_lives(here, 30), "it powers off")
    test.check_equal(latent.vm_dirs(), [], "no run-time directory is left")


def scan_goes_on(test, here, there, address):
    """In a migration that is broken off."""
    receiver = there.receive(address)
    sender = latent.popen("migrate", "--max-rate", "2", here.name, address)
    first = None
    while sender.poll() is None and (first is None or passes_of(here) < first + 3):
        if first is None and (latent.stat(here)["migration"] or {}).get("phase") == "passes":
            first = passes_of(here)
        time.sleep(0.1)
    test.check(sender.poll() is None and first is not None, "the scan makes passes while pages are told")
    sender.terminate()
    test.check_equal((sender.wait(30), receiver.wait(30)), (NO_ANSWER, NO_ANSWER), "and the migration is broken off")
    there._forget()


def passes_of(guest):
    return latent.stat(guest)["scan"]["passes"]


case.main("A guest is moved to and fro, and proves its contents each time.", body, timeout_s=1200)
