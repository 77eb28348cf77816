#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Pages are hot, warm and cold as the guest uses them, in a fresh and in a restored VM; nothing is lost by looking."""

import shutil
import tempfile
import time
from pathlib import Path

from lib import activity, case, latent, vm
from lib.vm import VM

EVERYTHING = ["--min-run", "1", "--share-threshold", "0"]
MEM = "512M"
PERIOD_S = 4
AREA_MIB = 20
LOOKS = 3
ENOUGH = 0.95
USAGE, NO_VM = 64, 67


def say_counts(test, counts):
    for (area, source), by_class in sorted(counts.items()):
        test.say(f"{area:8} {source:6} {by_class}")


def check_scores(test, areas, what, sources=("base",)):
    scores, counts = areas.scores()
    say_counts(test, counts)
    for source in sources:
        for kind, score in scores.get(source, {}).items():
            if score.so > 500:
                test.check(score.precision >= ENOUGH and score.recall >= ENOUGH, f"{what}, {source}, {kind}: {score}")
    return scores


def check_costs(test, figures):
    gib = vm.parse_bytes(MEM) / (1 << 30)
    share = figures["pass_cpu_ns_now"] / 1e9 / 10 / gib
    test.check(share < 0.01, f"a pass takes {figures['pass_cpu_ns_now'] / 1e6:.1f} ms: at 10 s {share:.2%} of a CPU per GiB")
    test.say(f"lock held for {figures['hold_max_us']} us at most, over 2 ms {figures['holds_over_2ms']} times "
             f"of {figures['holds']}")
    # Of the processor's time: on a busy machine whoever holds a lock may have to wait for a processor.
    test.check(figures["hold_max_cpu_us"] <= 2000, f"the lock is held for {figures['hold_max_cpu_us']} us at most")


def bad_input(test, guest):
    for words, status in ((["--period", "0"], USAGE), (["--period", "-3"], USAGE), (["--period", "1e30"], USAGE),
                          (["--period", "soon"], USAGE), ([], USAGE), (["on"], USAGE)):
        answer = latent.command("scan", guest.name, *words)
        test.check(answer.returncode == status and len(answer.stderr.splitlines()) == 1,
                   f"scan {' '.join(words)}: {answer.stderr.strip()}")
    test.check_equal(latent.command("scan", "nobody", "off").returncode, NO_VM, "a VM that is not there")


def fresh(test, guest):
    guest.wait_ready()
    test.check(activity.scan(guest)["passes"] == 0, "nobody looks until it is asked for")
    bad_input(test, guest)
    areas = activity.Areas(guest, AREA_MIB, PERIOD_S)
    areas.start(seconds=300)
    latent.run("scan", guest.name, "--period", f"{PERIOD_S}s")
    figures = activity.wait_passes(guest, 1 + LOOKS)
    check_scores(test, areas, "fresh")
    check_costs(test, figures)
    test.check(figures["working_set_pages_10s_now"] is not None, "the working set over 10 s is known")
    in_use = figures["working_set_pages_10s_now"] / activity.PAGES_PER_MIB
    test.check(3 * AREA_MIB < in_use < 8 * AREA_MIB, f"the working set is {in_use:.0f} MiB, of which {3 * AREA_MIB} are known")
    test.check_equal(figures["working_set_pages_10m_now"], None, "that over 10 min is not, yet")
    return areas


def restored(test, guest, areas, snapshot):
    """The guest was saved with its programs at work, while it was looked at."""
    latent.run("save", guest.name, snapshot)
    before = activity.scan(guest)["passes"]
    activity.wait_passes(guest, 1)
    test.check(activity.scan(guest)["passes"] > before, "the scan goes on after a save")
    guest.kill9()
    guest.restore(snapshot)
    guest.wait_ready()
    latent.run("scan", guest.name, "--period", f"{PERIOD_S}s")
    figures = activity.wait_passes(guest, 2 + LOOKS)
    for source in figures["sources"]:
        test.say(str(source))
    check_scores(test, areas, "restored", ("base", "clean"))
    test.check(figures["copies_settled"] > 0.9 * areas.pages, f"{figures['copies_settled']} copies became base")
    test.say(f"the guest stood for {figures['frozen_us'] / 1e3:.1f} ms in {figures['passes']} passes")
    test.check(areas.check(), "the guest's memory is right")


def loses_nothing(test, guest):
    """As fast as it can be, under full write load, with disk reads and discards."""
    latent.run("scan", guest.name, "--period", "100ms")
    load = guest.sh_start(f"latent-guest mem churn m 0 {2 * AREA_MIB * activity.PAGES_PER_MIB} 8 0")
    for _ in range(2):
        latent.check_hashes(test, guest, "/usr/lib/", what="beside a scan at 0.1 s")
        guest.drop_guest_caches()
        guest.sh(f"latent-guest mem discard m {3 * AREA_MIB * activity.PAGES_PER_MIB} 1000")
    test.check(load.wait(60).startswith("ok"), "what was written meanwhile is right")
    test.check(guest.sh("latent-guest mem check m", timeout=120).startswith("ok"), "and all else")
    figures = activity.scan(guest)
    test.check(figures["passes"] > 20, f"{figures['passes']} passes, {figures['pages_brought_back']} pages brought back")
    latent.run("scan", guest.name, "off")
    time.sleep(0.3)
    passes = activity.scan(guest)["passes"]
    time.sleep(0.5)
    test.check_equal(activity.scan(guest)["passes"], passes, "nobody looks any more")
    test.check_equal(activity.scan(guest)["period_us_now"], 0, "and the statistics say so")


def body(test):
    test.need_latent()
    latent.private_run_dir()
    directory = Path(tempfile.mkdtemp(prefix="latent-activity-", dir=vm.images_dir().parent.parent))
    try:
        with VM("activity", mem=MEM, latent=EVERYTHING) as guest:
            areas = fresh(test, guest)
            restored(test, guest, areas, directory / "snapshot")
            loses_nothing(test, guest)
            guest.shutdown()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    test.check_equal(latent.vm_dirs(), [], "no run-time directory is left")


case.main("Hot, warm and cold pages are told apart; no byte is lost by looking.", body, timeout_s=300)
