#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""One of four guests is killed while all of them read: the others do not notice."""

import contextlib
import json
import time

from lib import case, latent, vm
from lib.vm import VM

GUESTS = 4
FILES = "/usr/"


def listed():
    return sorted(one["name"] for one in json.loads(latent.run("ps", "--json")))


def check_rest(test, guests, jobs, victim):
    for guest, job in zip(guests, jobs):
        if guest is not victim:
            latent.check_hashes(test, guest, FILES, job=job, what=f"while {victim.name} was killed")


def kill_while_reading(test, guests, victim):
    for guest in guests:
        guest.drop_guest_caches()
    jobs = [latent.start_hash(guest, FILES) for guest in guests]
    time.sleep(1.0)
    test.check(all(job.status is None for job in jobs), f"{len(guests)} guests are reading")
    victim.kill9()
    test.check(victim.name in latent.vm_dirs(), "the dead guest's run-time directory is still there")
    check_rest(test, guests, jobs, victim)
    rest = [guest for guest in guests if guest is not victim]
    test.check_equal(listed(), sorted(guest.name for guest in rest), "`latent ps` lists the living")
    test.check_equal(latent.vm_dirs(), sorted(guest.name for guest in rest), "and has cleaned up after the dead")
    readers = latent.volume(latent.stat(rest[0]), vm.images_dir() / "golden.qcow2")["readers_now"]
    test.check_equal(readers, len(rest), "the volume's readers are those that live")
    return rest


def body(test):
    test.need_latent()
    latent.private_run_dir()
    with contextlib.ExitStack() as stack:
        guests = [stack.enter_context(VM(f"g{i}", latent=["--min-run", "1"])) for i in range(GUESTS)]
        for guest in guests:
            guest.wait_ready()
        rest = kill_while_reading(test, guests, guests[1])
        rest = kill_while_reading(test, rest, guests[0])  # the first reader
        again = stack.enter_context(VM(guests[0].name, latent=["--min-run", "1"]))
        latent.check_hashes(test, again, FILES, what="in a new guest of the dead one's name")
        for guest in (*rest, again):
            guest.shutdown()
        test.check_equal((listed(), latent.vm_dirs()), ([], []), "nothing is left in the end")


case.main("SIGKILL to a guest harms no other and leaves nothing behind.", body, timeout_s=480)
