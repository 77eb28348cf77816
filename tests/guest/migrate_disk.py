#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""A guest that is moved with much of its writable disk in its page cache: what the disk has is not sent, whether the guest has
written it or read it. Then to where the disk is an older copy of itself: what that has not comes from the source."""

from lib import case, latent
from lib.migration import Pair, move

FILE_MIB = 96
FILE_PAGES = FILE_MIB << 8
WRITE = (f"dd if=/dev/urandom of=/root/big bs=1M count={FILE_MIB} conv=notrunc 2>/dev/null; sync; "
         "sha256sum /root/big > /run/big.sum")
CHECK = "sha256sum -c --quiet /run/big.sum"


def body(test):
    test.need_latent()
    latent.private_run_dir()
    with Pair("disk", []) as pair:  # nothing is mapped: no other VM reads its images
        first, second = pair.first, pair.second
        first.sh(WRITE, timeout=120)
        mostly_on_disks(test, first, second, pair, "as the guest has written it")
        second.drop_guest_caches()
        second.sh(CHECK, timeout=120)
        sent = mostly_on_disks(test, second, first, pair, "as the guest has read it", "--no-postcopy")
        test.check_equal(sent["pages_missing"], 0, "and all was there before it ran")
        to_an_older_copy(test, first, second, pair)
        test.check_equal(second.sh("echo alive").strip(), "alive", "it runs on")


def mostly_on_disks(test, here, there, pair, what, *options):
    sent, got = move(test, here, there, pair.socket(), *options)
    test.check_equal(got["pages_on_disks"], sent["pages_on_disks"], "both sides have counted the same pages as on disks")
    test.check(sent["pages_on_disks"] > FILE_PAGES * 9 // 10, f"{sent['pages_on_disks']} pages were on disks, "
               f"{sent['pages_stale_on_disks']} were not found there: {what}")
    test.check(sent["bytes_sent"] < FILE_MIB << 19, f"{sent['bytes_sent'] >> 20} MiB were sent")
    there.sh(CHECK, timeout=120)
    test.check(True, f"{what}: the file is right in its cache")
    return sent


def to_an_older_copy(test, here, there, pair):
    """Both see the ballot, for the directory is the same; the file is not."""
    copy = pair.directory / "copy"
    here.sh("sync")
    latent.copy_image(here.disk, copy)
    here.sh(WRITE, timeout=120)
    there.before = ["unshare", "--mount", "sh", "-c", f'mount --bind {copy} {here.disk} && exec "$@"', "sh"]
    sent, got = move(test, here, there, pair.socket())
    test.check(sent["pages_stale_on_disks"] > FILE_PAGES * 9 // 10, f"{sent['pages_stale_on_disks']} pages are not on the older copy")
    test.check(sent["bytes_sent"] > FILE_MIB << 20, f"and were sent, among {sent['bytes_sent'] >> 20} MiB")
    test.check_equal(got["pages_on_disks"], sent["pages_on_disks"], "both sides have counted the others")
    there.sh(CHECK, timeout=120)
    test.check(True, "the file is right in its cache: it came from the source")


case.main("A guest is moved with its disk in its memory.", body, timeout_s=600)
