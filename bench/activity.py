# SPDX-License-Identifier: BSD-2-Clause-Patent
"""How well hot and cold pages are told apart, and what looking costs: processor time, and the guest's."""

import statistics
import subprocess
import time
from pathlib import Path

from common import guests as common
from common.guests import GuestError, vm
from lib import activity
from lib.agent import GuestError as AgentError

MEM = "1G"
AREA_MIB = {"full": 64, "quick": 48}
PERIOD_S = {"full": 10, "quick": 2}  # of the classification
LOOKS = 3
# Slowdown: (period, seconds of a window, pairs of windows); windows with and without a scan in turn.
FULL_SPEED = {10: (20, 7), 60: (60, 4), 1: (5, 7)}
QUICK_PERIOD_S, QUICK_WINDOW_S, QUICK_PAIRS = 2, 4, 2
REPORTED_S = (10, 60)
FRESH, RESTORED = "", "_restored"


def run(result):
    size = "quick" if result.quick else "full"
    with common.scratch_dir() as directory:
        guest = vm.VM("activity", mem=MEM, latent=["--share-threshold", "0"], start=False)
        with common.running(guest):
            bench = Bench(result, guest, AREA_MIB[size], PERIOD_S[size])
            bench.measure(FRESH)
            bench.restore(directory / "snapshot")
            bench.measure(RESTORED)
    result.note(f"""\
Four areas of {AREA_MIB[size]} MiB each: read several times in a period, written so, read in every second period, and never
touched. States are read {LOOKS} looks after the first samples. Fresh: the areas are the VM's own memory. Restored: the
VM was saved with its programs at work and goes on from the snapshot, so that what it reads is mapped from there; all of
the areas count, those of which nothing can be seen as missed. Processor time: of the scan's thread, for one pass, as a share
of 10 s, per GiB of guest RAM. Slowdown: pages that the guest reads and writes per second of its virtual
processor's time, which has its faults in it, without and with a scan in turn, and the time for which the guest was
stopped. {"Quick: measured with a period of " + str(QUICK_PERIOD_S) + " s, and scaled: a pass costs the guest what it costs." if result.quick else ""}""")


class Bench:
    def __init__(self, result, guest, area_mib, period_s):
        self.result, self.guest, self.period_s = result, guest, period_s
        self.areas = activity.Areas(guest, area_mib, period_s)
        self.areas.start(seconds=3600)
        self.looking_s = 0  # the period, 0: off

    def latent(self, *words):
        answer = subprocess.run([common.latent_command(), *map(str, words)], capture_output=True, text=True)
        if answer.returncode:
            raise GuestError(f"latent {words[0]}: {answer.stderr}")

    def scan(self, period_s):
        """Another period, or off; comes back when it has looked at everything anew."""
        if period_s == self.looking_s:
            return
        self.looking_s = period_s
        self.latent("scan", self.guest.name, *(["--period", f"{period_s}s"] if period_s else ["off"]))
        if period_s:
            activity.wait_passes(self.guest, 1, timeout_s=period_s * 10)

    def restore(self, snapshot):
        self.result.say("the guest is saved and restored")
        self.latent("save", self.guest.name, snapshot)
        self.guest.kill9()
        self.guest.restore(snapshot)
        self.looking_s = 0
        self.guest.wait_ready()

    def measure(self, suffix):
        self.classify(suffix)
        self.slow_down(suffix)
        self.result.check(self.areas.check(), f"the guest's memory is right{suffix.replace('_', ', ')}")

    # ---- precision and recall, processor time ----

    def classify(self, suffix):
        self.result.say(f"hot and cold{suffix.replace('_', ', ')}: {LOOKS} looks at {self.period_s} s")
        self.scan(self.period_s)
        # Of a restored VM the first samples move what it writes to base.
        figures = activity.wait_passes(self.guest, LOOKS + (suffix == RESTORED), timeout_s=self.period_s * 12)
        scores, counts = self.areas.scores()
        for kind in ("hot", "cold"):
            total = activity.Score()
            for by_kind in scores.values():
                total.merge(by_kind[kind])
            self.result.metric(f"precision_{kind}{suffix}", total.precision)
            self.result.metric(f"recall_{kind}{suffix}", total.recall)
        gib = vm.parse_bytes(MEM) / (1 << 30)
        self.result.metric(f"cpu_percent_per_gib_10s{suffix}", figures["pass_cpu_ns_now"] / 1e9 / 10 / gib * 100)
        self.result.metric(f"hold_max_cpu_us{suffix}", figures["hold_max_cpu_us"])
        grains = {source["source"]: source.get("granularity_pages_now", "") for source in figures["sources"]}
        names = {"base": "zap", "clean": "zap-frozen", "copy": "none"}
        self.result.table(f"Pages by area and state{suffix.replace('_', ', ')}",
                          ["area", "seen by", "granularity, pages", "pages", "states"],
                          [[area, names[source], grains[names[source]], sum(by_class.values()), by_class]
                           for (area, source), by_class in sorted(counts.items())])

    # ---- what the guest pays ----

    def slow_down(self, suffix):
        self.result.say(f"slowdown{suffix.replace('_', ', ')}")
        rows = []
        if self.result.quick:
            percents = self.pairs(QUICK_PERIOD_S, QUICK_WINDOW_S, QUICK_PAIRS, rows)
            middle = statistics.median(percents) * QUICK_PERIOD_S
            for period_s in REPORTED_S:
                self.result.metric(f"guest_slowdown_percent_{period_s}s{suffix}", middle / period_s)
        else:
            for period_s, (window_s, pairs) in FULL_SPEED.items():
                percents = self.pairs(period_s, window_s, pairs, rows)
                self.result.metric(f"guest_slowdown_percent_{period_s}s{suffix}", statistics.median(percents))
        self.result.table(f"A guest that reads and writes {self.areas.pages >> 8} MiB{suffix.replace('_', ', ')}",
                          ["period", "pages/s without", "pages/s with", "stopped, ms/s", "slower"], rows)

    def pairs(self, period_s, window_s, pairs, rows):
        percents = []
        for number in range(pairs):
            rates, stopped_s = {}, 0.0
            for on in (True, False) if number % 2 else (False, True):
                rates[on], stopped = self.window(period_s if on else 0, window_s)
                stopped_s = max(stopped_s, stopped)
            slower = 100 * (1 - rates[True] / rates[False] * (1 - stopped_s / window_s))
            percents.append(slower)
            rows.append([f"{period_s} s", f"{rates[False]:.0f}", f"{rates[True]:.0f}", f"{stopped_s * 1000 / window_s:.2f}",
                         f"{slower:.2f} %"])
            self.result.tick(f"{period_s} s: {slower:.2f} %")
        return percents

    def window(self, period_s, seconds):
        """Pages touched per second of the virtual processor's time; seconds for which a scan stopped the guest."""
        self.scan(period_s)
        stopped_us, begin_s = activity.scan(self.guest)["frozen_us"], self.vcpu_s()
        work = self.guest.sh(f"latent-guest mem touch m 0 {2 * self.areas.pages} {seconds} 0 w", timeout=seconds + 60)
        took_s = self.vcpu_s() - begin_s
        if not work.startswith("ok pages="):
            raise AgentError(f"touch: {work}")
        return int(work.split("=")[1]) / took_s, (activity.scan(self.guest)["frozen_us"] - stopped_us) / 1e6

    def vcpu_s(self):
        thread = self.guest.qmp("query-cpus-fast")[0]["thread-id"]
        return int(Path(f"/proc/{self.guest.pid}/task/{thread}/schedstat").read_text().split()[0]) / 1e9
