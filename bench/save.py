# SPDX-License-Identifier: BSD-2-Clause-Patent
"""How long a guest stands while it is saved: QEMU's stop, migrate to a file and cont, against `latent save`."""

import contextlib
import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

from common import guests as common
from common import restores
from common.guests import GuestError, vm
from common.result import spread

MEM = "1G"
BIG_MEM = "4G"
HELD_MIB = 150  # random, checked; with what the guest reads about 370 MiB are in use
READ_SOME = "find /usr/lib -type f | sort | head -3000 | xargs cat > /dev/null"
CHURN = "latent-guest mem churn m 0 {} 30 {}"
CHURN_PAGES_PER_S = 5000
WRITE = "latent-guest mem touch m 0 {} 1 0 w"
PAIRS = {"full": 7, "quick": 3}


def run(result):
    pairs = PAIRS["quick" if result.quick else "full"]
    plain = vm.VM("save-plain", mem=MEM, latent=None, start=False)
    latent = vm.VM("save-latent", mem=MEM, latent=["--share-threshold", "0"], start=False)
    with common.running(plain, latent) as guests:
        for guest in guests:
            fill(guest)
        pauses, totals, last = measure(result, plain, latent, pairs)
        measure_after_resume(result, plain, latent, pairs)
        second = saves_of_a_restored_vm(result, latent, last, pairs)
    big_pauses = big(result, pairs)
    result.ratio("qemu_pause_over_latent_pause", *pauses)
    result.ratio("qemu_total_over_latent_total", *totals)
    result.metric("latent_pause_ms", common.median(pauses[1]))
    result.metric("qemu_pause_ms", common.median(pauses[0]))
    result.metric("latent_pause_4g_ms", common.median(big_pauses))
    result.metric("second_save_pause_ms", common.median(second))
    result.note(f"""\
The guest holds {HELD_MIB} MiB of random words and rewrites {CHURN_PAGES_PER_S} pages of them a second while it is saved; it has read
files, which Latent has mapped from the image. The pause is the time from the stop to the guest's next
instruction, as seen over QMP; the total that until all is in the file. Pages on disk images are references in the
metadata; what the image has at their places is looked at, page by page (the active set's packed copy is apart from it).""")


def fill(guest):
    guest.sh(READ_SOME, timeout=120)
    guest.sh(f"latent-guest mem hold m {HELD_MIB} 13 random", timeout=120)


def under_load(guest, work):
    load = guest.sh_start(CHURN.format(HELD_MIB * 256, CHURN_PAGES_PER_S))
    time.sleep(0.3)
    answer = work()
    load.kill()
    return answer


def written_in_a_second(guest):
    """Pages that the guest writes in a second, as fast as it can."""
    return int(guest.sh(WRITE.format(HELD_MIB * 256)).split("=")[1])


# ---- after the resume ----

def measure_after_resume(result, plain, latent, pairs):
    """Of both sides: the share of its throughput that a guest has in the second after it goes on."""
    result.say("the second after the resume")
    shares = {"QEMU": [], "Latent": []}
    for number in range(pairs):
        before = written_in_a_second(plain)
        save_plain(plain, plain.dir / "state")
        shares["QEMU"].append(written_in_a_second(plain) / before)
        before = written_in_a_second(latent)
        shares["Latent"].append(written_beside(latent, latent.dir / f"after{number}") / before)
    result.table("What a guest writes in the second after it goes on, of what it writes otherwise", ["", "median (lowest-highest)"],
                 [[side, spread(found, 2)] for side, found in shares.items()])
    for side, found in shares.items():
        result.metric(f"{side.lower()}_throughput_after_resume", common.median(found))


def written_beside(guest, snapshot):
    """The writer of the save works meanwhile."""
    guest.monitor.events.clear()
    with ThreadPoolExecutor() as pool:
        job = pool.submit(save_latent, guest, snapshot)
        guest.monitor.wait_event("RESUME")
        written = written_in_a_second(guest)
        job.result()
    return written


# ---- the sides ----

def save_plain(guest, path):
    """The stopped VM's whole state into a file, as managers do it; (pause, total) in ms."""
    guest.qmp("migrate-set-parameters", max_bandwidth=1 << 40)
    begin_s = time.monotonic()
    guest.qmp("stop")
    guest.qmp("migrate", uri=f"exec:cat > {path}")
    while (status := guest.qmp("query-migrate")["status"]) in ("setup", "active", "device"):
        time.sleep(0.001)
    if status != "completed":
        raise GuestError(f"migrate: {status}")
    guest.qmp("cont")
    took_ms = (time.monotonic() - begin_s) * 1000
    path.unlink()
    return took_ms, took_ms


def save_latent(guest, path):
    begin_s = time.monotonic()
    command = [common.latent_command(), "save", "--json", guest.name, path]
    answer = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if answer.returncode:
        raise GuestError(f"latent save: {answer.stderr}")
    return json.loads(answer.stdout), (time.monotonic() - begin_s) * 1000


def measure(result, plain, latent, pairs):
    pauses, totals, rows = ([], []), ([], []), []
    for number in range(pairs):
        result.say(f"pair {number + 1} of {pairs}")
        pause_ms, total_ms = under_load(plain, lambda: save_plain(plain, plain.dir / "state"))
        snapshot = latent.dir / f"snapshot{number}"
        figures, latent_total_ms = under_load(latent, lambda: save_latent(latent, snapshot))
        pauses[0].append(pause_ms)
        pauses[1].append(figures["pause_us"] / 1000)
        totals[0].append(total_ms)
        totals[1].append(latent_total_ms)
        rows.append([number + 1, f"{pause_ms:.0f}", f"{figures['pause_us'] / 1000:.1f}", f"{figures['point_us'] / 1000:.1f}",
                     f"{total_ms:.0f}", f"{latent_total_ms:.0f}", figures["private_pages"], figures["faults"],
                     (figures["pages_stored"] + figures["pages_on_volumes"]) >> 8])
        for guest in (plain, latent):
            result.check(guest.sh("latent-guest mem check m", timeout=60).startswith("ok"),
                         f"{guest.name}: memory is right after a save")
    result.table("Saves of a guest that writes, ms",
                 ["pair", "QEMU pause", "Latent pause", "of that RAM", "QEMU total", "Latent total", "copies in overlays",
                  "write faults", "MiB in use"], rows)
    pages = disk_pages(snapshot)
    stored_bytes = bytes_in_ram(snapshot, pages)
    result.check(len(pages) == figures["pages_on_volumes"], "the metadata has as many pages on disk images as the save says")
    result.check(stored_bytes == 0, "the image holds nothing of pages that are on the disk")
    result.metric("image_bytes_for_disk_pages", stored_bytes)
    result.metric("pages_on_disk_images", len(pages))
    return pauses, totals, snapshot


def disk_pages(snapshot):
    """Numbers of the pages that are references to disk images (docs/snapshot.md)."""
    data = (snapshot / "pages").read_bytes()
    _, _, _, n_blocks, _, _, _ = restores.HEADER.unpack_from(data)
    images = {number for number, volume in enumerate(json.loads((snapshot / "manifest.json").read_text())["volumes"])
              if volume["role"] == "image"}
    records = restores.RECORD.iter_unpack(memoryview(data)[restores.HEADER.size + restores.BLOCK_BYTES * n_blocks:])
    return [page for page, (kind, volume, _) in enumerate(records) if kind == restores.KIND_VOLUME and volume in images]


def bytes_in_ram(snapshot, pages):
    """What the snapshot's `ram` has at these pages' places, where a page that is elsewhere is a hole."""
    count = 0
    with open(snapshot / "ram", "rb") as file:
        for page in pages:
            with contextlib.suppress(OSError):  # ENXIO: no more data
                count += os.lseek(file.fileno(), page * restores.PAGE_BYTES, os.SEEK_DATA) == page * restores.PAGE_BYTES
    return count * restores.PAGE_BYTES


def big(result, pairs):
    result.say(f"a guest of {BIG_MEM}")
    pauses = []
    with common.running(vm.VM("save-big", mem=BIG_MEM, latent=["--share-threshold", "0"], start=False)) as (guest,):
        fill(guest)
        for number in range(pairs):
            figures, _ = under_load(guest, lambda: save_latent(guest, guest.dir / f"snapshot{number}"))
            pauses.append(figures["pause_us"] / 1000)
        result.check(guest.sh("latent-guest mem check m", timeout=60).startswith("ok"), "memory of the big guest is right")
    return pauses


def saves_of_a_restored_vm(result, guest, snapshot, pairs):
    """Their pauses; the guest is killed and goes on from the snapshot."""
    result.say("saves of a restored VM")
    guest.kill9()
    guest.restore(snapshot)
    pauses = []
    for number in range(pairs):
        figures, _ = under_load(guest, lambda: save_latent(guest, guest.dir / f"again{number}"))
        pauses.append(figures["pause_us"] / 1000)
    result.check(guest.sh("latent-guest mem check m", timeout=60).startswith("ok"), "memory of the restored guest is right")
    return pauses
