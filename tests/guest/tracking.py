#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""The tracking structure of a volume: against pagemap, through all that changes counts, and spoilt."""

import os
import random
import time

from lib import case, host, latent, vm
from lib.vm import VM

MIB = 1 << 20
FILES = "/usr/lib/"
MORE_FILES = "/usr/share/"
BALLOON = ["-device", "virtio-balloon-pci"]
SPOIL_ROUNDS = 6


def image():
    return vm.images_dir() / "golden.qcow2"


def figures_of(guest):
    return latent.volume(latent.stat(guest), image())


def read_again(test, guest, what):
    guest.drop_guest_caches()
    latent.check_hashes(test, guest, FILES, what=what)


def check_counts(test, guests, what):
    """The structure says what pagemap says, location by location; returns the groups' sizes."""
    with vm.stopped(guests):
        stats = [figures_of(guest) for guest in guests]
        stats[0] = figures_of(guests[0])  # again: the others have brought their rows up to date
        expected, private = {}, 0
        for guest, one in zip(guests, stats):
            mapped, copies = latent.count_mapped(guest.pid, image())
            test.check_equal(one["pages_mapped_now"], sum(mapped.values()), f"{what}: {guest.name} counts its pages")
            for page, count in mapped.items():
                expected[page] = expected.get(page, 0) + count
            private += copies
        found = latent.Track(image()).counts()
    differing = sorted(page for page in expected.keys() | found.keys() if expected.get(page) != found.get(page))
    test.check_equal(differing, [], f"{what}: {len(expected)} locations have the counts of pagemap")
    groups = latent.groups(expected)
    test.check_equal((stats[0]["pages_one_now"], stats[0]["pages_many_now"]), groups,
                     f"{what}: mapped by one {groups[0]}, by many {groups[1]}; {private} private copies")
    return groups


def one_then_two_readers(test, a):
    latent.check_hashes(test, a, FILES)
    one = figures_of(a)
    test.check(one["readers_now"] == 1 and one["likelihood_permille_now"] == 0 and one["bytes_shortcut"] == 0,
               "one reader: the likelihood of sharing is 0, and nothing is mapped")
    test.check(one["misses"]["unlikely"]["bytes"] > 100 * MIB, "its reads are counted as copied for that reason")
    b = VM("b", latent=[], extra=BALLOON)
    latent.check_hashes(test, b, FILES)
    two = figures_of(b)
    test.check(two["readers_now"] == 2 and two["bytes_shortcut"] > 100 * MIB,
               f"a second reader: {two['bytes_shortcut'] >> 20} MiB are mapped")
    groups = check_counts(test, [a, b], "two readers, one mapping")
    test.check(groups[0] > 20000 and groups[1] < groups[0] // 10, "the locations are mapped by one")
    read_again(test, a, "in the first reader again")
    groups = check_counts(test, [a, b], "two readers")
    test.check(groups[1] > 20000, "the locations are mapped by many")
    return b, groups


def copies(test, a, b):
    """Pages that held files get used for something else: the guest writes to what is mapped."""
    many_before = figures_of(b)["copied_many"]
    b.sh("echo 3 > /proc/sys/vm/drop_caches; latent-guest mem hold m 600 3 random")
    groups = check_counts(test, [a, b], "after writes")
    copied = figures_of(b)["copied_many"] - many_before
    test.check(copied > 10000, f"{copied} pages of the group of many were copied on write")
    test.check(b.sh("latent-guest mem check m").startswith("ok"), "what was written is right")
    b.sh("latent-guest mem free m")
    read_again(test, b, "after writes")
    return groups


def discard(test, a, b):
    read_again(test, b, "before the balloon")
    before = check_counts(test, [a, b], "before the balloon")
    b.qmp("balloon", value=256 * MIB)
    deadline_s = time.monotonic() + 60
    while b.qmp("query-balloon")["actual"] > 264 * MIB and time.monotonic() < deadline_s:
        time.sleep(0.2)
    after = check_counts(test, [a, b], "after discards")
    test.check(after[1] < before[1] * 2 // 3, "fewer locations are mapped by many")
    b.qmp("balloon", value=1024 * MIB)
    read_again(test, b, "after the balloon")


def detach(test, a, b):
    latent.run("detach", b.name)
    test.check_equal(latent.overlay_mappings(b.pid, image()), [], "nothing is mapped after detach")
    groups = check_counts(test, [a, b], "after detach")
    test.check(groups[1] < groups[0] // 10, "what the other one maps is mapped by one")


def death(test, a):
    with VM("c", latent=[]) as c:
        latent.check_hashes(test, c, FILES)
        groups = check_counts(test, [a, c], "with a third guest")
        test.check(groups[1] > 20000, "the locations are mapped by many")
        job = latent.start_hash(c, MORE_FILES)
        time.sleep(0.3)
        test.check_equal(job.status, None, "the third guest is reading when it is killed")
        slots = len(latent.Track(image()).alive_slots())
        c.kill9()
        time.sleep(0.2)
        test.check_equal(len(latent.Track(image()).alive_slots()), slots - 1, "its slot is free")
        groups = check_counts(test, [a], "after its death")
        test.check_equal(groups[1], sum(1 for n in latent.count_mapped(a.pid, image())[0].values() if n > 1),
                         "its counts went with it")


# ---- spoilt on purpose ----

def scribble(path):
    """Random bytes all over the file: slots, rows, header."""
    size = os.path.getsize(path)
    with open(path, "r+b", buffering=0) as file:
        file.write(os.urandom(host.PAGE_BYTES))
        for _ in range(2000):
            file.seek(random.randrange(size) // 4 * 4)
            file.write(os.urandom(1 << 12))


def cut(path):
    os.truncate(path, 0)


def cut_in_the_middle(path):
    os.truncate(path, os.path.getsize(path) // 2 + 100)


def replace(path):
    new = path.with_name("new")
    new.write_bytes(os.urandom(1 << 16))
    os.rename(new, path)


def remove(path):
    path.unlink()


def spoil(test, *changes):
    """Two guests read while somebody changes the file; then a third one starts on what is left."""
    what = ", ".join(change.__name__ for change in changes)
    with VM("x", latent=["--min-run", "1"]) as x, VM("y", latent=["--min-run", "1"]) as y:
        for guest in (x, y):
            guest.wait_ready()
        path = latent.Track(image()).path
        for change in changes:
            spoil_while_reading(test, (x, y), path, change)
        with VM("z", latent=[]) as z:
            latent.check_hashes(test, z, "/usr/bin/", what=f"in a guest that starts after: {what}")
            z.shutdown()
        for guest in (x, y):
            latent.stat(guest)
            read_again(test, guest, f"after: {what}")
            guest.shutdown()


def spoil_while_reading(test, guests, path, change):
    for guest in guests:
        guest.drop_guest_caches()
    jobs = [(guest, latent.start_hash(guest, FILES)) for guest in guests]
    for _ in range(SPOIL_ROUNDS):
        time.sleep(0.2)
        if path.exists() and path.stat().st_size:
            change(path)
    for guest, job in jobs:
        latent.check_hashes(test, guest, FILES, job=job, what=f"while somebody did: {change.__name__}")


def body(test):
    test.need_latent()
    latent.private_run_dir()
    with VM("a", latent=[], extra=BALLOON) as a:
        b, _ = one_then_two_readers(test, a)
        with b:
            copies(test, a, b)
            discard(test, a, b)
            detach(test, a, b)
            b.shutdown()
        death(test, a)
        a.shutdown()
    spoil(test, scribble, cut)
    spoil(test, cut_in_the_middle)
    spoil(test, replace, remove)
    latent.run("ps")
    test.check_equal(latent.vm_dirs(), [], "no run-time directory is left")


case.main("Counts and groups are those of pagemap; a spoilt structure changes nothing that a guest reads.",
          body, timeout_s=600)
