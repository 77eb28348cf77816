# SPDX-License-Identifier: BSD-2-Clause-Patent
"""A snapshot on a store 2 ms and 1 Gbit/s away: until the restored guest has read its working set."""

import os
import shutil
import signal
import subprocess
import time

from common import guests as common
from common.guests import GuestError, vm
from lib import latent, store

LATENCY_MS, MBIT_S = 2, 1000
HOT_MIB, COLD_MIB = 32, 600  # random words: what is packed is as large as what is not
READ_SOME = "find /usr/lib -type f | sort | head -3000 | xargs cat > /dev/null"
SIZES = {"1g": "1G", "4g": "4G"}
COLD = {"1g": COLD_MIB, "4g": 3 * COLD_MIB}
PAIRS = {"full": {"1g": 5, "4g": 3}, "quick": {"1g": 2}}
DEMAND_PAIRS = {"full": 2, "quick": 1}
READY_S = 300


def run(result):
    kind = "quick" if result.quick else "full"
    with common.scratch_dir() as scratch:
        for size, pairs in PAIRS[kind].items():
            measure(result, scratch / size, size, pairs, DEMAND_PAIRS[kind] if size == "1g" else 0)
    result.note(f"""\
The guest holds {HOT_MIB} MiB that it reads after the restore and {COLD_MIB} MiB that it does not
({COLD["4g"]} MiB with 4 GiB), and has read files.
The time is that until it has read and checked the {HOT_MIB} MiB, from the start of the download or of `latent restore`. The
store is a server on this machine that adds {LATENCY_MS} ms to each request and sends {MBIT_S} Mbit/s in all. Fetched first
is the packed snapshot, by curl, file by file; it is then restored from the local disk, lazily too. On demand only:
`latent restore` with LATENT_PREFETCH=none from a plain snapshot, page by page. Disks are local in all of them.""")


def measure(result, directory, size, pairs, demand_pairs):
    guest = vm.VM(f"remote-{size}", mem=SIZES[size], latent=["--share-threshold", "0"], start=False)
    directory.mkdir()
    with common.running(guest):
        result.say(f"a guest of {SIZES[size]} is saved")
        prepare(result, guest, guest.dir, size, bool(demand_pairs))
        with store.Store(guest.dir, latency_ms=LATENCY_MS, mbit_s=MBIT_S) as there:
            first, lazy, rows = [], [], []
            for number in range(pairs):
                result.say(f"{SIZES[size]}: pair {number + 1} of {pairs}")
                before = there.bytes
                first.append(fetched_first(result, guest, there, directory))
                fetched = there.bytes - before
                lazy.append(restored(result, guest, f"{there.url}/packed", there))
                rows.append([number + 1, f"{first[-1]:.2f}", f"{lazy[-1][0]:.2f}", fetched >> 20, lazy[-1][1] >> 20])
                result.say(f"fetched first {first[-1]:.2f} s, Latent {lazy[-1][0]:.2f} s")
            lazy_s = [one[0] for one in lazy]
            result.table(f"{SIZES[size]}: until the working set is read, s",
                         ["pair", "fetched first", "Latent", "MiB fetched first", "MiB that Latent had fetched"], rows)
            if size == "1g":
                result.ratio("fetch_first_over_latent", first, lazy_s)
            result.metric(f"fetch_first_s_{size}", common.median(first))
            result.metric(f"latent_s_{size}", common.median(lazy_s))
            if demand_pairs:
                on_demand(result, guest, there, demand_pairs)


def prepare(result, guest, directory, size, plain):
    guest.sh(READ_SOME, timeout=120)
    guest.sh(f"latent-guest mem hold cold {COLD[size]} 3 random", timeout=120)
    guest.sh(f"latent-guest mem hold hot {HOT_MIB} 5 random", timeout=120)
    guest.sh("echo 3 > /proc/sys/vm/drop_caches")
    if plain:
        latent.run("save", "--stop", guest.name, directory / "plain", timeout_s=120)
    latent.run("save", "--compress", guest.name, directory / "packed", timeout_s=120)
    result.metric(f"packed_mib_{size}", os.stat(directory / "packed/ram.zst").st_size >> 20)


def begin_again(guest):
    """No pager is left that has what the next one shall fetch."""
    guest.kill9()
    for pid in latent.pagers():
        os.kill(pid, signal.SIGKILL)
    while latent.pagers():
        time.sleep(0.01)


def work(result, guest):
    result.say(f"it answers after {guest.wait_ready(READY_S):.2f} s")
    answer = guest.sh("latent-guest mem check hot", timeout=READY_S)
    result.check(answer.startswith("ok"), "the working set is right")


def restored(result, guest, where, there, disks=None):
    """(seconds, bytes that came meanwhile)"""
    begin_again(guest)
    before, begin_s = there.bytes, time.monotonic()
    guest.restore(where, "--disks-from", disks or guest.dir / "packed/disks")
    work(result, guest)
    return time.monotonic() - begin_s, there.bytes - before


def fetched_first(result, guest, there, directory):
    begin_again(guest)
    copy = directory / "fetched"
    shutil.rmtree(copy, ignore_errors=True)
    begin_s = time.monotonic()
    copy.mkdir()
    for name in ("manifest.json", "pages", "state", "ram.zst"):
        done = subprocess.run(["curl", "-sf", "--noproxy", "*", "-o", copy / name, f"{there.url}/packed/{name}"])
        if done.returncode:
            raise GuestError(f"curl: {done.returncode}")
    guest.restore(copy, "--disks-from", guest.dir / "packed/disks")
    work(result, guest)
    return time.monotonic() - begin_s


def on_demand(result, guest, there, pairs):
    demand, lazy, rows = [], [], []
    for number in range(pairs):
        result.say(f"page by page: pair {number + 1} of {pairs}")
        os.environ["LATENT_PREFETCH"] = "none"
        try:
            slow_s, n_bytes = restored(result, guest, f"{there.url}/plain", there, guest.dir / "plain/disks")
        finally:
            del os.environ["LATENT_PREFETCH"]
        demand.append(slow_s)
        lazy.append(restored(result, guest, f"{there.url}/packed", there)[0])
        rows.append([number + 1, f"{slow_s:.2f}", f"{lazy[-1]:.2f}", n_bytes >> 20])
    begin_again(guest)
    result.table("Page by page on demand, s", ["pair", "on demand only", "Latent", "MiB fetched on demand"], rows)
    result.ratio("demand_only_over_latent", demand, lazy)
    result.metric("demand_only_s", common.median(demand))
