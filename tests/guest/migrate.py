#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""`latent migrate` and `latent receive`: a guest that writes and reads files is moved, there, back by post-copy and there
again by pre-copy, and proves itself each time."""

from lib import case, latent
from lib.migration import HELD_MIB, Pair, begin, check, move, still_lives

CHURN_PAGES_PER_S = 5000


def body(test):
    test.need_latent()
    latent.private_run_dir()
    there_and_back(test)
    test.check_equal(latent.vm_dirs(), [], "no run-time directory is left")


def check_source_bits(test, stat):
    told, fetched, now = (stat[f"source_bits_{what}"] for what in ("set", "fetched", "now"))
    test.check(told > 1000 and fetched + now <= told, f"of {told} pages that were told by their place {fetched} have been "
               f"fetched, and {now} are still on the image alone")


def there_and_back(test):
    with Pair("move") as pair:
        nonce = begin(test, pair.first)
        pair.first.sh_start(f"latent-guest mem churn m 0 {HELD_MIB * 64} 600 {CHURN_PAGES_PER_S}")
        before = latent.stat(pair.first)["pages_overlay_now"]
        sent, got = move(test, pair.first, pair.second, pair.socket())
        test.check(sent["pages_on_volumes"] > before // 2 > 1000, f"of {before} pages on images {sent['pages_on_volumes']} were "
                   "told as places")
        stat = latent.stat(pair.second)
        test.check(stat["pages_overlay_now"] > before // 2, f"{stat['pages_overlay_now']} pages are mapped there")
        check_source_bits(test, stat)
        check(test, pair.second, nonce, "moved")
        later = latent.stat(pair.second)
        check_source_bits(test, later)
        test.check(later["source_bits_fetched"] > stat["source_bits_fetched"], f"{later['source_bits_fetched']} pages have been "
                   "fetched from the image")
        sent, got = move(test, pair.second, pair.first, pair.socket(), "--max-downtime", "0")
        test.check(got["pages_missing"] > 0, "the guest ran before all was there")
        check(test, pair.first, nonce, "back, by post-copy")
        sent, got = move(test, pair.first, pair.second, pair.socket(), "--no-postcopy")
        test.check_equal(got["pages_missing"], 0, "all was sent before")
        check(test, pair.second, nonce, "there again, by pre-copy")
        pair.second.sh_start("latent-guest poweroff")
        test.check(not still_lives(pair.second, 30), "it powers off")


case.main("A guest is moved, there and back, and proves its contents.", body, timeout_s=800)
