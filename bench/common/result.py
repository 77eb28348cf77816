# SPDX-License-Identifier: BSD-2-Clause-Patent
"""What a benchmark found: metrics, ratios of pairs, content checks, tables; its last line."""

import json
import os
import platform
import statistics
import sys
from pathlib import Path

from .progress import Progress, table

SIGNIFICANT_DIGITS = 4


class Result:
    """A benchmark's run(result) fills this in; bench/run prints the end of it.

    quick     fewer repetitions were asked for
    missing   peers or tools that this machine lacks
    left_out  what a quick run has no time for
    """

    def __init__(self, name, quick):
        self.name, self.quick = name, quick
        self.progress = Progress()
        self.metrics, self.ratios, self.spreads = {}, {}, {}
        self.missing = set()
        self.left_out = set()
        self.tables, self.notes, self.plots = [], [], []
        self.failures = []
        self.n_checks = 0
        self.env = environment()

    # ---- progress ----

    def say(self, text):
        self.progress.say(text)

    def tick(self, text):
        self.progress.tick(text)

    # ---- contents ----

    def check(self, condition, what):
        """A content check. The benchmark goes on, and fails in the end."""
        self.n_checks += 1
        if not condition:
            self.failures.append(what)
            self.say(f"WRONG: {what}")

    # ---- figures ----

    def metric(self, name, value):
        self.metrics[name] = rounded(value)

    def ratio(self, name, others, latents):
        """The median over pairs of other / latent; for times and bytes, above 1 is better."""
        pairs = [other / latent for other, latent in zip(others, latents, strict=True)]
        self.ratios[name] = rounded(statistics.median(pairs))
        self.spreads[name] = [rounded(min(pairs)), rounded(max(pairs)), len(pairs)]

    # ---- for people ----

    def table(self, title, headers, rows):
        self.tables.append({"title": title, "headers": headers, "rows": [list(map(str, r)) for r in rows]})

    def note(self, text):
        self.notes.append(text)

    def bar_plot(self, title, unit, groups, series):
        """Bars: series is {name: one value for each group}; stacked within a group."""
        self.plots.append({"kind": "bars", "title": title, "unit": unit, "groups": groups, "series": series})

    def line_plot(self, title, x_name, y_name, x, series):
        self.plots.append({"kind": "lines", "title": title, "x_name": x_name, "y_name": y_name, "x": x,
                           "series": series})

    # ---- the end ----

    def ok(self):
        return not self.failures

    def print_tables(self):
        for each in self.tables:
            print(f"\n{each['title']}\n\n{table(each['headers'], each['rows'])}")
        if self.ratios:
            print("\nRatios (above 1: Latent is better)\n")
            print(table(["ratio", "median", "lowest", "highest", "pairs"],
                        [[name, value, *self.spreads[name]] for name, value in self.ratios.items()]))
        if self.metrics:
            print("\n" + table(["metric", "value"], self.metrics.items()))
        for text in self.notes:
            print(f"\n{text}")
        print(f"\n{self.n_checks} content checks, "
              + ("all right" if self.ok() else f"{len(self.failures)} WRONG:"))
        for failure in self.failures:
            print(f"  {failure}")

    def last_line(self):
        """The contract's JSON object."""
        env = dict(self.env)
        if self.missing:
            env["missing"] = sorted(self.missing)
        if self.left_out:
            env["left_out"] = sorted(self.left_out)
        return json.dumps({"bench": self.name, "ok": self.ok(), "metrics": self.metrics,
                           "ratios": self.ratios, "env": env})

    def save(self, directory):
        """Everything, for the report."""
        everything = {key: getattr(self, key) for key in
                      ("name", "quick", "metrics", "ratios", "spreads", "tables", "notes", "plots",
                       "failures", "n_checks", "env")}
        everything.update(ok=self.ok(), missing=sorted(self.missing), left_out=sorted(self.left_out),
                          seconds=round(self.progress.elapsed_s(), 1))
        directory.mkdir(parents=True, exist_ok=True)
        partial = directory / f"{self.name}.json.partial"
        partial.write_text(json.dumps(everything, indent=1))
        partial.rename(directory / f"{self.name}.json")


def rounded(value):
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value


def spread(values, digits=1):
    """"median (lowest-highest)" of some runs."""
    middle = statistics.median(values)
    if len(values) == 1:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def environment():
    return {"cpus": len(os.sched_getaffinity(0)), "kernel": platform.release(), "accel": None,
            "cpu": cpu_model(), "memory_mib": memory_mib()}


def cpu_model():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def memory_mib():
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20


def busy_warning(stream=sys.stdout):
    """Says so when others use the machine: figures are noisy then."""
    load = os.getloadavg()[0]
    if load > 0.7:
        print(f"note: the load average is {load:.1f} before this begins; figures will be noisy",
              file=stream, flush=True)
