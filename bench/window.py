# SPDX-License-Identifier: BSD-2-Clause-Patent
"""I/O windows: time to get at guest pages from another process, and flushes of other CPUs that it takes."""

import json
import os
import subprocess

from common.guests import GuestError, vm
from common.result import spread

PAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
OPERATIONS_MAX, PAGES_PER_MEASURE = 2000, 20000  # of a short request; of a long one fewer
URING_OPERATIONS = 200                           # each waits for a read of io_uring
ROUNDS = {"full": 15, "quick": 3}
WAYS = {  # name in tables: the words of bench/window_io.c
    "lane": ["lane"],
    "lane, mapped": ["lane-map"],
    "shared, mapped": ["shared"],
    "process_vm": ["process-vm"],
    "permanent": ["permanent"],
}
URING = {  # io_uring's workers are threads of the process
    "lane, mapped, io_uring busy": ["lane-map", "--uring"],
    "permanent, io_uring busy": ["permanent", "--uring"],  # its control run
}
SHARED, LANE, LANE_MAPPED, PROCESS_VM = "shared, mapped", "lane", "lane, mapped", "process_vm"
EXIT_MISSING = 77


def run(result):
    if os.cpu_count() < 2:
        raise GuestError("this takes two CPUs")
    bench = Bench(result)
    for number in range(ROUNDS["quick" if result.quick else "full"]):
        bench.run_round(number)
    bench.report()


class Bench:
    def __init__(self, result):
        self.result, self.program = result, vm.BUILD_DIR / "bench/window_io"
        self.found = {}  # (way, layout, pages): list of what the program has said, one a round

    # ---- measuring ----

    def run_round(self, number):
        """Every way of one request after the other: what disturbs one, disturbs its neighbours in the pair."""
        for layout in ("contiguous", "scattered"):
            for pages in PAGES:
                self.result.tick(f"round {number + 1}: {pages} pages, {layout}")
                for way, words in WAYS.items():
                    self.measure(way, words, layout, pages)
        for pages in PAGES:
            for way, words in URING.items():
                self.measure(way, words, "contiguous", pages)

    def measure(self, way, words, layout, pages):
        operations = min(URING_OPERATIONS if "--uring" in words else OPERATIONS_MAX, PAGES_PER_MEASURE // pages)
        done = subprocess.run([self.program, words[0], str(pages), layout, str(operations), *words[1:]],
                              capture_output=True, text=True, check=False)
        if done.returncode == EXIT_MISSING:
            raise GuestError("this takes two CPUs")
        self.result.check(done.returncode == 0, f"{way}, {pages} pages, {layout}: {done.stderr.strip() or 'contents wrong'}")
        said = json.loads(done.stdout)
        self.result.check(not said["off_cpu"], f"{way}: used off its CPU")
        if "--uring" in words:
            self.result.check(said["uring_reads"] > 0, f"{way}: io_uring was not busy")
            self.result.check(said["bound"], f"{way}: a worker may run on another CPU")
        self.found.setdefault((way, layout, pages), []).append(said)

    # ---- reporting ----

    def times_us(self, way, layout, pages):
        return [said["median_ns"] / 1000 for said in self.found[way, layout, pages]]

    def counts(self, key, way, layout, pages):
        return [said[key] for said in self.found[way, layout, pages]]

    def report(self):
        for layout in ("contiguous", "scattered"):
            self.report_times(layout)
        for pages in (1, 8):
            self.ratio(f"shared_remap_over_lane_{pages}", SHARED, LANE_MAPPED, pages)
        for pages in (16, 64):
            self.ratio(f"process_vm_over_lane_{pages}", PROCESS_VM, LANE, pages)
            self.ratio(f"process_vm_over_lane_mapped_{pages}", PROCESS_VM, LANE_MAPPED, pages)
        self.report_flushes()
        thresholds = {said["min_window_bytes"] for said in self.found[LANE, "contiguous", 1]}
        self.result.metric("min_window_pages", max(thresholds) // 4096)
        self.result.note("Each operation looks at one word of each page. Times are medians of operations; in tables the median "
                         "of rounds, and their spread. \"lane\" maps or copies by the threshold that it has measured "
                         f"({', '.join(str(t // 4096) for t in sorted(thresholds))} pages here); \"mapped\" always maps.")

    def ratio(self, name, other, way, pages):
        self.result.ratio(name, self.times_us(other, "contiguous", pages), self.times_us(way, "contiguous", pages))

    def report_times(self, layout):
        rows = [[pages, *(spread(self.times_us(way, layout, pages)) for way in WAYS)] for pages in PAGES]
        self.result.table(f"µs for an operation, pages {layout}", ["pages", *WAYS], rows)

    def report_flushes(self):
        ways = {**WAYS, **URING}
        if self.counts("flushes", LANE, "contiguous", 1)[0] is None:
            self.result.missing.add("tracepoint tlb:tlb_flush")
        else:
            rows = [[way, *(f"{max(self.counts('flushes', way, 'contiguous', pages)):.4f}" for pages in PAGES)] for way in ways]
            self.result.table("Flushes of other CPUs that the process has sent for, for an operation (contiguous; the worst "
                              "round; the control run is \"permanent\")", ["pages", *PAGES], rows)
            self.result.metric("remote_flushes_per_op", self.worst_flushes())
        rows = [[way, *(spread(self.counts("host_shootdowns", way, "contiguous", pages), 3) for pages in PAGES)] for way in ways]
        self.result.table("TLB shootdowns of the whole host meanwhile (/proc/interrupts), for an operation", ["pages", *PAGES], rows)

    def worst_flushes(self):
        """Of all sizes and rounds, io_uring busy or not, without what the control run has in its worst."""
        def worst(ways):
            return max(said["flushes"] for (way, _, _), runs in self.found.items() if way in ways for said in runs)

        windows = worst([LANE, LANE_MAPPED, "lane, mapped, io_uring busy"])
        return max(0.0, windows - worst(["permanent", "permanent, io_uring busy"]))
