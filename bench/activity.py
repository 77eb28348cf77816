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
# Slowdown, measured as it is: period: (seconds of a window, pairs of windows with and without a scan, in turn);
DIRECT = {"": {10: (20, 3), 60: (60, 1), 1: (5, 3)}, "_restored": {10: (20, 3)}}
# and by the cost of a fault, which so fast a scan shows above the noise.
FAST_PERIOD_S, FAST_WINDOW_S = 0.2, 3
FAST_PAIRS = {"full": 7, "quick": 2}
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
Four areas of {AREA_MIB[size]} MiB each: read several times in a period, written so, read in every second period, and
never touched. States are read {LOOKS} looks after the first samples. Fresh: the areas are the VM's own memory. Restored:
the VM was saved with its programs at work and goes on from the snapshot, so that what it reads is mapped from there; all
of the areas count, those of which nothing can be seen as missed. Processor time: of the scan's thread, for one pass, as
a share of 10 s, per GiB of guest RAM. Slowdown: a pass costs the guest the same at any period: a fault for each page that
was taken away and is in use, and the time for which all threads are stopped (pages of files). Faults and stops of a pass
are counted at {PERIOD_S[size]} s; the cost of a fault is what a guest, whose virtual processor reads and writes as fast as
it can, loses of its throughput at {FAST_PERIOD_S} s, by fault. Throughput is by the virtual processor's time. The full run
also measures the loss as it is (direct).""")


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
        self.result.metric(f"hold_max_us{suffix}", figures["hold_max_us"])
        grains = {source["source"]: source.get("granularity_pages_now", "") for source in figures["sources"]}
        names = {"base": "zap", "clean": "zap-frozen", "copy": "none"}
        self.result.table(f"Pages by area and state{suffix.replace('_', ', ')}",
                          ["area", "seen by", "granularity, pages", "pages", "states"],
                          [[area, names[source], grains[names[source]], sum(by_class.values()), by_class]
                           for (area, source), by_class in sorted(counts.items())])

    # ---- what the guest pays ----

    def slow_down(self, suffix):
        """A pass costs what its faults and its stops cost, whatever the period: both are measured and joined."""
        of = suffix.replace('_', ', ')
        self.result.say(f"what the guest pays{of}")
        passes = self.window(self.period_s, 2 * self.period_s)
        rows, fault_costs_s = [], []
        for _ in range(FAST_PAIRS["quick" if self.result.quick else "full"]):
            slower, with_scan = self.pair(FAST_PERIOD_S, FAST_WINDOW_S, rows)
            fault_costs_s.append(slower / with_scan.faults_per_s)
        fault_s = statistics.median(fault_costs_s)
        for period_s in REPORTED_S:
            share = (passes.faults_of_a_pass * fault_s + passes.stopped_s_of_a_pass) / period_s
            self.result.metric(f"guest_slowdown_percent_{period_s}s{suffix}", 100 * share)
        self.result.metric(f"fault_us{suffix}", fault_s * 1e6)
        self.result.metric(f"faults_of_a_pass{suffix}", passes.faults_of_a_pass)
        self.result.metric(f"stopped_ms_of_a_pass{suffix}", passes.stopped_s_of_a_pass * 1000)
        for period_s, (window_s, pairs) in {} if self.result.quick else DIRECT[suffix].items():
            found = [self.pair(period_s, window_s, rows)[0] for _ in range(pairs)]
            self.result.metric(f"guest_slowdown_direct_percent_{period_s}s{suffix}", 100 * statistics.median(found))
        self.result.table(f"A guest that reads {self.areas.pages >> 8} MiB and writes as many{of}",
                          ["period", "in force, s", "pages/s without", "pages/s with", "faults/s", "stopped, ms/s",
                           "slower"], rows)

    def pair(self, period_s, window_s, rows):
        """The share that the guest loses, and the window with the scan."""
        without, with_scan = self.window(0, window_s), self.window(period_s, window_s)
        slower = 1 - with_scan.pages_per_s / without.pages_per_s
        rows.append([f"{period_s} s", f"{with_scan.period_s:.1f}", f"{without.pages_per_s:.0f}",
                     f"{with_scan.pages_per_s:.0f}", f"{with_scan.faults_per_s:.0f}",
                     f"{with_scan.stopped_share * 1000:.2f}", f"{slower:.2%}"])
        self.result.tick(f"{period_s} s: {slower:.2%}")
        return slower, with_scan

    def window(self, period_s, seconds):
        """The guest reads the hot area and writes the written one as fast as it can."""
        self.scan(period_s)
        before, begin_s, vcpu_s = activity.scan(self.guest), time.monotonic(), self.vcpu_s()
        jobs = [self.guest.sh_start(f"latent-guest mem touch m {first} {self.areas.pages} {seconds} 0 {how}")
                for first, how in ((0, "r"), (self.areas.pages, "w"))]
        pages = 0
        for work in (job.wait(seconds + 60) for job in jobs):
            if not work.startswith("ok pages="):
                raise AgentError(f"touch: {work}")
            pages += int(work.split("=")[1])
        return Window(pages, self.vcpu_s() - vcpu_s, time.monotonic() - begin_s, before, activity.scan(self.guest))

    def vcpu_s(self):
        """Processor time of the virtual processor: its faults are in it, and nothing of other processes."""
        thread = self.guest.qmp("query-cpus-fast")[0]["thread-id"]
        return int(Path(f"/proc/{self.guest.pid}/task/{thread}/schedstat").read_text().split()[0]) / 1e9


class Window:
    """What was done in some seconds, and what a scan did meanwhile."""

    def __init__(self, pages, vcpu_s, took_s, before, after):
        self.pages_per_s = pages / vcpu_s
        self.period_s = (before["period_us_now"] + after["period_us_now"]) / 2e6
        passes = max(took_s / self.period_s, 1) if self.period_s else 1
        faults, stopped_s = (after[key] - before[key] for key in ("pages_brought_back", "frozen_us"))
        self.faults_per_s, self.faults_of_a_pass = faults / vcpu_s, faults / passes
        self.stopped_share, self.stopped_s_of_a_pass = stopped_s / 1e6 / took_s, stopped_s / 1e6 / passes
