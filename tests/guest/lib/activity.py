# SPDX-License-Identifier: BSD-2-Clause-Patent
"""What a VM's page entries say of its activity, and a guest program whose own activity is known.

    areas = activity.Areas(guest, mib=32, period_s=4)   # a holder "m" in the guest: hot, written, warm, cold
    areas.start(seconds=60)
    activity.wait_passes(guest, 4)
    scores = areas.scores()
"""

import array
import os
import time
from pathlib import Path

from . import latent
from .agent import GuestError

# src/core/entry.h
SOURCE_MASK, OVERLAY, PRIVATE, SHORT_SHIFT = 0x7, 1, 1 << 7, 8
BASE, MASKED, WATCHED, SPILL, WORDS, PAGE_SHIFT, FILE_SHIFT = 0, 2, 3, 0xffe, 0xfff, 16, 52
# src/activity/states.h
CLASS_OF_STATE = ("new", "hot", "warm", "warm", "warm", "cool", "cool", "cold", "cold", "cold", "frozen")
IS_COLD = ("cold", "frozen")

PAGES_PER_MIB = 256
HOT_EVERY_S = 0.25  # of a period


def entries(guest):
    """The page entries of the first RAM block, from the table that the agent shares."""
    for path in Path(f"/proc/{guest.pid}/fd").iterdir():
        try:
            if "memfd:latent-entries:" in os.readlink(path):
                return array.array("Q", path.read_bytes())
        except OSError:
            continue
    raise GuestError(f"{guest.name} has no table of page entries")


def class_of(entry):
    return CLASS_OF_STATE[entry >> SHORT_SHIFT & 0xf]


def source_of(entry):
    """By what the page's use can be seen: "base", "clean" pages of an overlay, or a "copy" in one."""
    if entry & SOURCE_MASK != OVERLAY:
        return "base"
    return "copy" if entry & PRIVATE else "clean"


def is_packed(entry):
    """Its contents are in the store of reclaim, and nowhere else."""
    return entry & SOURCE_MASK == MASKED and entry >> FILE_SHIFT == SPILL


def held_gfns(guest, name):
    """(page of the holder, guest page number) of all that it holds."""
    for line in guest.sh(f"latent-guest mem pfns {name}").splitlines():
        words = line.split()
        if len(words) == 3 and all(word.isdigit() for word in words):
            first, pfn, count = map(int, words)
            yield from ((first + i, pfn + i) for i in range(count))


def scan(guest):
    return latent.stat(guest)["scan"]


def wait_passes(guest, count, timeout_s=120):
    """Until so many passes of the scan are over, counted from now; its statistics then."""
    wanted = scan(guest)["passes"] + count
    deadline_s = time.monotonic() + timeout_s
    while (found := scan(guest))["passes"] < wanted:
        if time.monotonic() > deadline_s:
            raise GuestError(f"{found['passes']} passes of the scan, not {wanted}: {found}")
        time.sleep(0.05)
    return found


class Score:
    """Precision and recall of one class: pages that are called so, pages that are so, and those that are both."""

    def __init__(self):
        self.called = self.so = self.both = 0

    def add(self, called, so):
        self.called += called
        self.so += so
        self.both += called and so

    def merge(self, other):
        self.called, self.so, self.both = self.called + other.called, self.so + other.so, self.both + other.both

    @property
    def precision(self):
        return self.both / self.called if self.called else 0.0

    @property
    def recall(self):
        return self.both / self.so if self.so else 0.0

    def __str__(self):
        return f"precision {self.precision:.4f}, recall {self.recall:.4f} ({self.so} pages)"


class Areas:
    """Four areas of the same size in the guest's memory, of which each is used in its own way.

    hot is read and written-to several times in each scan period, warm in every second period, cold never.
    """

    NAMES = ("hot", "written", "warm", "cold")

    def __init__(self, guest, mib, period_s, seed=7):
        self.guest, self.period_s, self.pages = guest, period_s, mib * PAGES_PER_MIB
        guest.sh(f"latent-guest mem hold m {mib * len(self.NAMES)} {seed} random", timeout=180)

    def start(self, seconds):
        """The guest goes on by itself, and through a save."""
        hot_ms, warm_ms = int(self.period_s * HOT_EVERY_S * 1000), int(self.period_s * 2000)
        uses = {"hot": (hot_ms, "r"), "written": (hot_ms, "w"), "warm": (warm_ms, "r")}
        for number, name in enumerate(self.NAMES):
            if name in uses:
                every_ms, how = uses[name]
                self.guest.sh(f"latent-guest mem touch m {number * self.pages} {self.pages} {seconds} {every_ms} {how} "
                              "> /dev/null 2>&1 &")

    def gfns(self):
        """{guest page number: name of the area}; RAM lies below the PCI hole, so that these are the block's pages."""
        return {gfn: self.NAMES[page // self.pages] for page, gfn in held_gfns(self.guest, "m")}

    def scores(self):
        """{source: {"hot": Score, "cold": Score}}, and for each (area, source) how many pages have which class."""
        table, where = entries(self.guest), self.gfns()
        scores, counts = {}, {}
        for gfn, area in where.items():
            found, source = class_of(table[gfn]), source_of(table[gfn])
            by_class = counts.setdefault((area, source), {})
            by_class[found] = by_class.get(found, 0) + 1
            score = scores.setdefault(source, {"hot": Score(), "cold": Score()})
            score["hot"].add(found == "hot", area in ("hot", "written"))
            score["cold"].add(found in IS_COLD, area == "cold")
        return scores, counts

    def check(self):
        """The guest itself looks at all that it holds."""
        return self.guest.sh("latent-guest mem check m", timeout=120).startswith("ok")
