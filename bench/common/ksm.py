# SPDX-License-Identifier: BSD-2-Clause-Patent
"""KSM: switched on for a while, and everything put back."""

import contextlib
import time
from pathlib import Path

SYSFS = Path("/sys/kernel/mm/ksm")
# merge_across_nodes and max_page_sharing can only be changed while nothing is merged: left alone.
SETTINGS = ("pages_to_scan", "sleep_millisecs")
MIN_FULL_SCANS = 3
SETTLED_S = 5.0      # without
SETTLED_GAIN = 0.005 # such growth
POLL_S = 0.5
RUN_STOP, RUN_SCAN, RUN_UNMERGE = 0, 1, 2


def why_not():
    """Why KSM cannot be used here, or None."""
    if not SYSFS.is_dir():
        return "the kernel has no KSM"
    try:
        with open(SYSFS / "pages_to_scan", "r+"):
            return None
    except OSError as error:
        return f"KSM cannot be set: {error.strerror}"


def read(name):
    return int((SYSFS / name).read_text())


def write(name, value):
    (SYSFS / name).write_text(str(value))


@contextlib.contextmanager
def scanning(pages_to_scan, sleep_millisecs):
    """KSM scans; at the end its settings are as before, and what it merged is unmerged
    (unless it was running before: then it goes on)."""
    before = {name: read(name) for name in ("run", *SETTINGS)}
    advisor = _advisor()
    try:
        if advisor:
            (SYSFS / "advisor_mode").write_text("none")  # it would set pages_to_scan by itself
        write("pages_to_scan", pages_to_scan)
        write("sleep_millisecs", sleep_millisecs)
        write("run", RUN_SCAN)
        yield
    finally:
        for name in SETTINGS:
            write(name, before[name])
        if advisor:
            (SYSFS / "advisor_mode").write_text(advisor)
        if before["run"] != RUN_SCAN:
            write("run", RUN_UNMERGE)
        write("run", before["run"])


def _advisor():
    """The advisor in use (Linux 6.8), or None."""
    try:
        text = (SYSFS / "advisor_mode").read_text()
    except OSError:
        return None
    return text[text.index("[") + 1:text.index("]")]


def ksmd_pid():
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text() == "ksmd\n":
                return int(path.parent.name)
        except OSError:
            pass
    return None


def merged_pages(pids):
    """Pages of these processes that are merged."""
    return sum(int(Path(f"/proc/{pid}/ksm_merging_pages").read_text()) for pid in pids)


def settle(pids, timeout_s, tick):
    """Waits for some full scans, and until merged pages of these processes stop growing.

    Returns (full scans, whether they had stopped growing).
    """
    first_scan = read("full_scans")
    deadline_s = time.monotonic() + timeout_s
    level, level_since_s = 0, time.monotonic()
    while time.monotonic() < deadline_s:
        time.sleep(POLL_S)
        n_scans = read("full_scans") - first_scan
        merged = merged_pages(pids)
        tick(f"KSM: {n_scans} full scans, {merged * 4 >> 10} MiB merged")
        if abs(merged - level) > level * SETTLED_GAIN:
            level, level_since_s = merged, time.monotonic()
        elif n_scans >= MIN_FULL_SCANS and time.monotonic() - level_since_s >= SETTLED_S:
            return n_scans, True
    return read("full_scans") - first_scan, False
