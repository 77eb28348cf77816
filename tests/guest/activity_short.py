#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""A short round of classification and reclaim: what a guest uses is found hot, the rest cold and given back.

Short enough for a nested machine, where suite `kvm` runs it: there the accesses are KVM's, on an older kernel.
"""

from lib import activity, case, latent
from lib.vm import VM

MEM = "192M"
AREA_MIB = 4
PACKS_MIB = 4  # held and not used, and it packs
PERIOD_S = 4  # a guest of an emulated processor gets through what it uses well within that
LOOKS, MORE_LOOKS = 4, 6
ENOUGH = 0.95
READY_S = 240
USES_S = 600
COLD_FOR = f"{4 * PERIOD_S}s"
WALKS = 8


def classified(areas):
    """(score of hot, score of cold), of base, where the areas are."""
    scores, counts = areas.scores()
    for (area, source), by_class in sorted(counts.items()):
        print(f"    {area:8} {source:6} {by_class}", flush=True)
    return scores["base"]["hot"], scores["base"]["cold"]


def classify(test, guest, areas):
    """On a busy machine the guest may not have used in time what it uses: then it is looked at for some passes more."""
    for passes in range(1 + MORE_LOOKS):
        activity.wait_passes(guest, 1 if passes else LOOKS)
        hot, cold = classified(areas)
        if min(hot.precision, hot.recall, cold.precision, cold.recall) >= ENOUGH:
            break
    for name, score in (("hot", hot), ("cold", cold)):
        test.check(score.precision >= ENOUGH and score.recall >= ENOUGH, f"{name}: {score}")


def give_back(test, guest, areas):
    """Walks until most of what the guest holds and does not use is packed: what is cold for so long grows with each pass."""
    held = [gfn for _, gfn in activity.held_gfns(guest, "packs")]
    test.check(len(held) == PACKS_MIB * activity.PAGES_PER_MIB, f"it holds {len(held)} pages")
    for _ in range(WALKS):
        activity.wait_passes(guest, 1)
        test.say(latent.run("reclaim", "--cold-for", COLD_FOR, guest.name, timeout_s=120).strip())
        table = activity.entries(guest)
        packed = sum(activity.is_packed(table[gfn]) for gfn in held)
        if packed >= ENOUGH * len(held):
            break
    before = latent.stat(guest)["reclaim"]
    test.check(packed >= ENOUGH * len(held), f"{packed} of them are packed (and {before['pages_packed_now']} of all)")
    test.check(guest.sh("latent-guest mem check packs", timeout=READY_S).startswith("ok"), "what was packed is right")
    returned = latent.stat(guest)["reclaim"]["pages_returned"] - before["pages_returned"]
    test.check(returned >= packed, f"{returned} pages came back for that")
    test.check(areas.check(), "and so is what was in use")


def body(test):
    test.need_latent()
    latent.private_run_dir()
    with VM("short", latent=[], mem=MEM) as guest:
        guest.wait_ready(READY_S)
        guest.sh(f"latent-guest mem hold packs {PACKS_MIB} 8 text", timeout=READY_S)
        areas = activity.Areas(guest, AREA_MIB, PERIOD_S)
        latent.run("scan", guest.name, "--period", f"{PERIOD_S}s")
        areas.start(USES_S)
        classify(test, guest, areas)
        give_back(test, guest, areas)


case.main("On real KVM, too, pages are hot and cold as the guest uses them, and cold ones come back.", body, timeout_s=900)
