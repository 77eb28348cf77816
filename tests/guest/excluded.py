#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""What cannot live with mapped images, and comes while they are mapped: they become plain RAM first."""

import time

from lib import case, latent
from lib.vm import VM

EVERYTHING = ["--min-run", "1", "--share-threshold", "0"]
PART = "/usr/lib/python3.11/"


def background_snapshot(test):
    """QEMU's own watches guest RAM with a userfaultfd, which it tries when the capability is set."""
    with VM("snapshot", latent=EVERYTHING) as guest:
        latent.check_hashes(test, guest, under=PART, what="before")
        test.check(latent.stat(guest)["pages_overlay_now"] > 1000, "pages are mapped")
        guest.qmp("migrate-set-capabilities", capabilities=[{"capability": "background-snapshot", "state": True}])
        stat = latent.stat(guest)
        test.check_equal((stat["pages_overlay_now"], stat["overlays_allowed"]), (0, False), "nothing is mapped any more")
        test.check("plain RAM now" in guest.qemu_log.read_text(), "and it is said")
        latent.check_hashes(test, guest, under=PART, what="after")
        guest.qmp("migrate", uri=f"exec:cat > {guest.dir / 'state'}")
        while (status := guest.qmp("query-migrate")["status"]) not in ("completed", "failed"):
            time.sleep(0.1)
        test.check_equal(status, "completed", "QEMU's own snapshot")
        guest.drop_guest_caches()
        latent.check_hashes(test, guest, under=PART, what="read anew")
        test.check_equal(latent.stat(guest)["pages_overlay_now"], 0, "pages that are mapped from then on")
        guest.shutdown()


def body(test):
    test.need_latent()
    latent.private_run_dir()
    background_snapshot(test)


case.main("A feature that needs guest RAM for itself turns mapped pages to plain RAM.", body, timeout_s=600)
