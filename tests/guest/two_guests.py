#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""A short round of shortcut I/O: two guests read one image, write, and one is detached.

Short enough for a nested machine, where suite `kvm` runs it on real KVM and an older kernel.
"""

from lib import case, latent, vm
from lib.vm import VM

MAP_ALL = ["--min-run", "1"]  # the cost model of a nested machine would copy short runs
PART = "/usr/lib/python3.11/"
REWRITE = """set -e
mkdir /copy
cp -a /usr/bin /copy
find /copy -type f | sort | xargs sha256sum | cut -c1-64 > /copied
find /usr/bin -type f | sort | xargs sha256sum | cut -c1-64 > /originals
cmp /copied /originals
"""


def body(test):
    test.need_latent()
    latent.private_run_dir()
    image = vm.images_dir() / "golden.qcow2"
    with VM("first", latent=MAP_ALL) as first, VM("second", latent=MAP_ALL) as second:
        for guest in (first, second):
            guest.wait_ready(240)
            latent.check_hashes(test, guest, under=PART, what="as the image has them")
        percent = latent.shortcut_percent(latent.stat(second), image)
        test.check(percent >= 95, f"{percent:.1f} % of what the second guest read was mapped")
        first.sh(REWRITE, timeout=300)  # fails unless the copies that it makes are right
        latent.run("detach", "first")
        test.check_equal(latent.stat(first)["pages_overlay_now"], 0, "pages that are mapped after detach")
        for guest in (first, second):
            guest.sh("sync; echo 3 > /proc/sys/vm/drop_caches")
            latent.check_hashes(test, guest, under=PART, what="again, after the other was detached")
        for guest in (first, second):
            guest.shutdown()


case.main("Two guests share what they read, on whatever accelerator there is.", body, timeout_s=840)
