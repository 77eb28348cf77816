#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Shortcut I/O on real guests: every hash right, and how much of what was read was mapped."""

import contextlib

from lib import case, latent, vm
from lib.vm import VM

AT_ONCE = 4
EVERYTHING = ["--min-run", "1", "--share-threshold", "0"]
# The root's label is on both disks of a guest that gets the image as a second one, too.
ROOT_IS_VDA = "latent.root=/dev/vda"
WRITE_FILES = """set -e
mkdir /new
for i in $(seq 16); do head -c $((i * 250000)) /dev/urandom > /new/$i; done
cp -a /usr/share/perl /new/perl
find /new -type f -print0 | xargs -0 sha256sum > /new.sha256
sync
"""


def show(test, guest):
    for one in latent.stat(guest)["volumes"]:
        test.say(f"{guest.name}: {latent.describe(one)}")


def check_share(test, guest, image, at_least_percent):
    percent = latent.shortcut_percent(latent.stat(guest), image)
    test.check(percent >= at_least_percent,
               f"{guest.name}: {percent:.2f} % of {image.name} was mapped, {at_least_percent} % are due")


def read_only_raw(test):
    image = vm.images_dir() / "golden.raw"
    with VM("raw", latent=EVERYTHING, extra=latent.extra_disk(image, "second"), append=ROOT_IS_VDA) as guest:
        guest.sh("mount -o ro,noload /dev/vdb /mnt")
        latent.check_hashes(test, guest, root="/mnt", what="read-only from a raw image")
        show(test, guest)
        check_share(test, guest, image, 99)
        guest.shutdown()


def backing_chain(test):
    golden = vm.images_dir() / "golden.qcow2"
    with VM("middle", latent=EVERYTHING) as middle:
        middle.sh(WRITE_FILES, timeout=120)
        middle.shutdown()
        with VM("top", image=middle.disk, latent=EVERYTHING) as top:
            latent.check_hashes(test, top, what="through a chain of two backing files")
            output = top.sh("sha256sum -c --quiet /new.sha256; wc -l < /new.sha256", timeout=120)
            test.check(int(output) > 1000, f"{output.strip()} files from the middle of the chain are right")
            show(test, top)
            check_share(test, top, golden, 99)
            check_share(test, top, middle.disk, 90)
            top.shutdown()


def compressed(test):
    image = vm.images_dir() / "golden-compressed.qcow2"
    with VM("packed", image=image, latent=EVERYTHING) as guest:
        latent.check_hashes(test, guest, under="/usr/lib/", what="from compressed clusters")
        show(test, guest)
        one = latent.volume(latent.stat(guest), image)
        test.check(one["misses"]["buffer"]["bytes"] > 50 << 20,
                   "compressed clusters are counted: read into a buffer, not into guest RAM")
        guest.shutdown()


def past_the_page_cache(test):
    """cache=none: what is copied QEMU reads by O_DIRECT, what is mapped comes through the page cache."""
    image = vm.images_dir() / "golden.qcow2"
    with VM("direct1", latent=[], drive_opts="cache=none") as first, \
            VM("direct2", latent=[], drive_opts="cache=none") as second:
        for guest in (first, second):
            latent.check_hashes(test, guest, under="/usr/lib/", what="with cache=none")
            show(test, guest)
        check_share(test, second, image, 90)
        one = latent.volume(latent.stat(first), image)
        # (Reads into a buffer of QEMU's own, of the image's header and tables, are none of guest RAM.)
        copied = sum(miss["bytes"] for why, miss in one["misses"].items() if why != "buffer")
        test.check(one["bytes_from_storage"] >= copied, f"what was copied, {copied} bytes, came from storage, and is counted so")
        for guest in (first, second):
            guest.shutdown()


def many_at_once(test):
    image = vm.images_dir() / "golden.qcow2"
    with contextlib.ExitStack() as stack:
        guests = [stack.enter_context(VM(f"many{i}", latent=[])) for i in range(AT_ONCE)]
        latent.check_hashes(test, guests[0], what="in the first guest, at defaults")
        show(test, guests[0])
        latent.check_hashes(test, guests[1], what="in the second guest, at defaults")
        show(test, guests[1])
        check_share(test, guests[1], image, 95)
        for guest in guests:
            guest.drop_guest_caches()
        jobs = [latent.start_hash(guest, "/usr/lib/") for guest in guests]
        for guest, job in zip(guests, jobs):
            latent.check_hashes(test, guest, "/usr/lib/", job=job, what=f"while {AT_ONCE} guests read at once")
            show(test, guest)
        figures = [latent.stat(guest) for guest in guests]
        test.check(all(latent.volume(one, image)["readers_now"] == AT_ONCE for one in figures),
                   f"the volume has {AT_ONCE} readers")
        one, many = (latent.volume(figures[0], image)[key] for key in ("pages_one_now", "pages_many_now"))
        test.check(many > 10 * one, f"most pages are mapped by many ({many}), few by one ({one})")
        for guest in guests:
            guest.shutdown()
    test.check_equal(latent.vm_dirs(), [], "no run-time directory is left")


def body(test):
    test.need_latent()
    latent.private_run_dir()
    read_only_raw(test)
    backing_chain(test)
    compressed(test)
    past_the_page_cache(test)
    many_at_once(test)


case.main("Guests read what is in their images, most of it mapped and not copied.", body, timeout_s=800)
