#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""A mover of a migration is killed at each of its steps, on each side: afterwards there is one VM, here or there, as soon as
who is left has had its say, or another mover has taken the dead one's place; and it can be moved again. Nothing is given
back of a VM that is still coming.

The VM (light_vm.py) runs, and then, for the steps around the token, stands. Arguments: steps to try, as source:3.
"""

import os
import pathlib
import signal
import subprocess
import sys
import time

from light_vm import LATENT, SKIPPED, TIMEOUT_S, alive, check, end_of, failures, left_at, migration, two_places

STEPS_MAX = 30
KILLED = -signal.SIGKILL
BEFORE_CONNECTING = 1
FIRST_OF_THERE = 8  # of the destination's, at which the guest is its own
SLOW = "migrate_step:delay:1000"  # each step of a receiver
NO_ANSWER = 75
ARRIVING = "still coming from another host"
AROUND_THE_TOKEN = [f"{side}:{step}" for side in ("source", "destination") for step in (6, 7, 8)]


def try_step(places, here, stands, side, step):
    """Returns where it is then, and whether there was such a step."""
    there = places[1 - places.index(here)]
    if stands:
        for command in ("cont", "stop"):  # QEMU saves the devices of a VM that stands only once
            here.qmp(command)
    what = f"{'stands' if stands else 'runs'}, {side}'s mover killed at step {step}"
    fault = f"migrate_step:{step}:KILL"
    receiver = there.receive(fault if side == "destination" else None)
    sender = here.migrate(there, fault=fault if side == "source" else None)
    victim, other = (sender, receiver) if side == "source" else (receiver, sender)
    if end_of(victim, what) != KILLED:
        end_of(other, what)
        return left_at(places, stands, what), False
    time.sleep(0.3)  # the other one hears of it
    if side == "source" and step == BEFORE_CONNECTING:
        other.terminate()  # it has heard of nobody yet
    if side == "source" and is_given(here):
        victim = here.migrate(there, "--resume")
    elif side == "destination" and there.name in alive() and (run_dir(there) / "migration").exists():
        if step == FIRST_OF_THERE:
            check_stat(here, there, what)
        victim = there.receive_again()
    if victim.returncode is None:
        end_of(victim, f"{what}, the next one")
    end_of(other, f"{what}, the other one")
    left = left_at(places, stands, what)
    print(f"{what}: it is {'where it was' if left is here else 'moved'}", flush=True)
    return left, True


def check_stat(here, there, what):
    deadline_s = time.monotonic() + TIMEOUT_S
    while not (migration(here) or {"cut": False})["cut"] and time.monotonic() < deadline_s:
        time.sleep(0.1)
    said = migration(here)
    check(said and said["cut"] and said["side"] == "source" and said["phase"] == "rest", f"{what}: latent stat shows it: {said}")
    check(migration(there) is None, f"{what}: nobody is at work there")


def is_given(place):
    """The VM there was given away; what has been begun only is over with its mover."""
    record = run_dir(place) / "migration"
    return place.name in alive() and record.exists() and record.read_bytes()[8] == 1  # src/migrate/record.h


def run_dir(place):
    return pathlib.Path(os.environ["LATENT_RUNTIME_DIR"]) / place.name


def try_all(places, here, stands, chosen):
    for side in ("source", "destination"):
        for step in range(1, STEPS_MAX):
            if chosen and f"{side}:{step}" not in chosen:
                continue
            here, killed = try_step(places, here, stands, side, step)
            if not killed:
                check(step > 8 or chosen, f"the {side} has more steps than {step - 1}")
                break
            if failures:
                return here
    return here


def command(*words):
    return subprocess.run([LATENT, *words], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def reclaim(place):
    return command("reclaim", place.name, "--cold-for", "100ms")


def try_to_reclaim(places, here):
    """The mover writes guest RAM by its descriptor until the guest runs."""
    there = places[1 - places.index(here)]
    receiver = there.receive(SLOW)
    sender = here.migrate(there)
    deadline_s = time.monotonic() + TIMEOUT_S
    while (scan := command("scan", there.name, "--period", "100ms")).returncode and time.monotonic() < deadline_s:
        time.sleep(0.05)
    check(scan.returncode == 0, f"a VM that is coming can be told to be scanned: {scan.stderr}")
    answer = reclaim(there)
    check(answer.returncode == NO_ANSWER and ARRIVING in answer.stderr, f"nothing is given back of it: {answer}")
    check(end_of(sender, "the one that is scanned") == 0 and end_of(receiver, "the one that is scanned") == 0, "it is moved")
    answer = reclaim(there)
    check(ARRIVING not in answer.stderr, f"it has come: {answer.stderr}")
    return there


def try_both(places, chosen):
    here = places[0]
    here.run()
    here = try_all(places, here, False, chosen)
    if not failures:
        here = try_all(places, here, True, chosen or AROUND_THE_TOKEN)
    if failures:
        return
    there = places[1 - places.index(here)]
    here.qmp("cont")
    here = try_to_reclaim(places, here)
    there = places[1 - places.index(here)]
    receiver = there.receive()
    check(end_of(here.migrate(there), "the last one") == 0 and end_of(receiver, "the last one") == 0, "it is moved after all")
    check(not list(here.directory.glob("disk.qcow2.latent-*")), "no ballot is left")


def main():
    with two_places() as places:
        if places is None:
            return SKIPPED
        try_both(places, sys.argv[1:])
    return 1 if failures else 0


sys.exit(main())
