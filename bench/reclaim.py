# SPDX-License-Identifier: BSD-2-Clause-Patent
"""What of a guest's memory is given back when a third is in use, what that costs it, and a limit against swapping."""

import contextlib
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from common import guests as common
from common.guests import host, vm
from lib import activity, cgroup, latent

MIB = 1 << 20
MEM_MIB = 768
PERIOD_S = 5
COLD_FOR_S = 15
WITHIN_S = 120
PAGES = {"used": MEM_MIB // 3 * 256, "area": 256 * 64}
WINDOW_S = 6
WINDOWS = {"full": 9, "quick": 4}
LIMIT_MIB = MEM_MIB // 2
LIMIT_PAIRS = {"full": 5, "quick": 2}
LIMIT_WINDOW_S = 10
EVERYTHING = ["--share-threshold", "0"]
READ_FILES = "find /usr -type f -size +64k | sort | xargs cat > /dev/null"
COLD_FILES = ("mkdir -p /run/cold && mount -t tmpfs -o size=90% cold /run/cold && "
              "find /usr/lib -type f -size +100k | sort | xargs cat 2> /dev/null | head -c {mib}M > /run/cold/files")
LIST_FILES = ("find /usr -type f -size +64k -printf '%s %p\\n' | sort -k 2 | "
              "awk -v most={bytes} '(sum += $1) < most {{ print $2 }}' > /run/files")
# Reads the same files over and over; says how many bytes. One process: to start one costs an emulated processor more
# than to read a file.
READ_AGAIN = """import os, sys, time
files = [os.open(path, os.O_RDONLY) for path in open("/run/files").read().split()]
buffer, done, end = bytearray(1 << 20), 0, time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    for file in files:
        at = 0
        while n := os.preadv(file, [buffer], at):
            at += n
        done += at
        if time.monotonic() > end:
            break
print(done)
"""


def run(result):
    size = "quick" if result.quick else "full"
    with common.scratch_dir() as directory:
        image = common.copy_image("golden.qcow2", directory)
        give_back(result, image, size)
        against_swap(result, directory, image, size)
    result.note(f"""\
Given back: a guest of {MEM_MIB} MiB has touched all of its memory: a third is a program's that uses it all the time and does
not pack, an eighth are files in memory, the rest shows files of its disk image. `latent scan` looks every {PERIOD_S} s, then
`latent reclaim --cold-for {COLD_FOR_S}s`. Resident: the VM's own RAM, its copies, the store, and the image's pages in the
host's page cache, of which this guest is the only user, also those that it has dropped itself meanwhile. Slowdown: what the program reads and writes by its virtual
processor's time, before and after. Limit: guests of the same size, each in a memory cgroup of {LIMIT_MIB} MiB with swap on
the disk, that read {LIMIT_MIB + MEM_MIB // 8} MiB of files again and again, one at a time; the throughput of the one under
Latent by that of plain QEMU. Latent looks every {PERIOD_S} s, and has given back what was not used for {COLD_FOR_S} s, to a
file on the disk, before that; the other's memory is the kernel's to swap.""")


# ---- given back ----

def give_back(result, image, size):
    guest = vm.VM("reclaim", image=image, mem=f"{MEM_MIB}M", latent=EVERYTHING, start=False)
    with common.running(guest):
        result.say("the guest touches all of its memory")
        guest.sh(f"latent-guest mem hold m {PAGES['used'] >> 8} 7 random", timeout=120)
        guest.sh(COLD_FILES.format(mib=MEM_MIB // 8), timeout=120)
        sums = guest.sh("sha256sum /run/cold/files")
        guest.sh(READ_FILES, timeout=180)
        use_third(guest)
        begun_s = time.monotonic()
        latent.run("scan", guest.name, "--period", f"{PERIOD_S}s")
        before, rates = resident(guest, image), [window(guest) for _ in range(WINDOWS[size])]
        result.say("what is not used becomes cold, and is given back")
        done = reclaim_in_time(result, guest, begun_s + WITHIN_S)
        returned = stat(guest)["pages_returned"]
        after, measured_s = resident(guest, image), time.monotonic()
        later = [window(guest) for _ in range(WINDOWS[size])]
        refaults_per_s = (stat(guest)["pages_returned"] - returned) / (time.monotonic() - measured_s)
        result.metric("given_back_fraction", 1 - sum(after.values()) / sum(before.values()))
        for number, name in enumerate(("guest_slowdown_percent", "guest_slowdown_wall_percent")):
            was, now = (statistics.median([pair[number] for pair in found]) for found in (rates, later))
            result.metric(name, 100 * (1 - now / was))
        result.metric("refaults_per_s", refaults_per_s)
        result.metric("reclaim_s", done["took_us"] / 1e6)
        result.table("Resident, MiB", ["", "before", "after"],
                     [[key, f"{before[key] / MIB:.0f}", f"{after[key] / MIB:.0f}"] for key in before])
        columns = [(f"{what}, {clock}", [pair[number] for pair in found]) for number, clock in enumerate(("processor's time", "time"))
                   for what, found in (("before", rates), ("after", later))]
        result.table("The program, pages/s", ["", "median", "lowest", "highest"],
                     [[what, f"{statistics.median(found):.0f}", f"{min(found):.0f}", f"{max(found):.0f}"]
                      for what, found in columns])
        result.check(guest.sh("sha256sum /run/cold/files", timeout=120) == sums, "files in memory are right")
        result.check(guest.sh("latent-guest mem check m", timeout=120).startswith("ok"), "the program's memory is right")
        wrong = common.wrong_files(guest.sh("latent-guest hash -r /usr/lib", timeout=180),
                                   {path: found for path, found in common.golden_sums().items()
                                    if path.startswith("/usr/lib/")})
        result.check(not wrong, f"files of the image are right: {wrong[:3]}")


def use_third(guest):
    """Reads and writes it all the time, slowly enough to leave the processor to the measurement."""
    guest.sh(f"latent-guest mem touch m 0 {PAGES['used']} 3600 1000 r > /dev/null 2>&1 &")


def reclaim_in_time(result, guest, until_s):
    """As soon as enough is known to be cold; what is given back later than that does not count."""
    activity.wait_passes(guest, 5, timeout_s=until_s - time.monotonic())
    done = json.loads(latent.run("reclaim", "--json", "--cold-for", f"{COLD_FOR_S}s", guest.name, timeout_s=WITHIN_S))
    result.check(time.monotonic() < until_s, f"it is given back within {WITHIN_S} s")
    result.say(f"packed {done['pages_packed'] >> 8} MiB into {done['store_bytes_now'] / MIB:.0f}, zeros and words "
               f"{done['pages_zero'] + done['pages_of_one_word'] >> 8}, of files {done['pages_of_files'] >> 8}")
    return done


def stat(guest):
    return common.latent_stat(guest.name)["reclaim"]


def resident(guest, image):
    figures = common.latent_stat(guest.name)
    return {"its own RAM": latent.base_bytes(guest), "copies": figures["pages_private_now"] * 4096,
            "the store": figures["reclaim"]["store_bytes_now"], "the image": host.cached_pages(image) * 4096}


def window(guest):
    """Pages that the program reads and writes for a second of processor time, and for one of time, in which it also waits
    for pages that come back."""
    before_s, started_s = vcpu_s(guest), time.monotonic()
    jobs = [guest.sh_start(f"latent-guest mem touch m {first} {PAGES['area']} {WINDOW_S} 0 {how}")
            for first, how in ((0, "r"), (PAGES["area"], "w"))]
    pages = sum(int(job.wait(WINDOW_S + 60).split("=")[1]) for job in jobs)
    return pages / (vcpu_s(guest) - before_s), pages / (time.monotonic() - started_s)


def vcpu_s(guest):
    thread = guest.qmp("query-cpus-fast")[0]["thread-id"]
    return int(Path(f"/proc/{guest.pid}/task/{thread}/schedstat").read_text().split()[0]) / 1e9


# ---- a limit ----

@contextlib.contextmanager
def swap_file(directory):
    """Swap on the disk for the time being; False if the machine does not allow it."""
    handle, name = tempfile.mkstemp(prefix="swap-", dir=directory)
    on = False
    try:
        os.posix_fallocate(handle, 0, 2 * MEM_MIB * MIB)
        os.close(handle)
        on = all(subprocess.run(command, capture_output=True).returncode == 0
                 for command in (["/usr/sbin/mkswap", name], ["/usr/sbin/swapon", name]))
        yield on
    finally:
        if on:
            subprocess.run(["/usr/sbin/swapoff", name], check=False)
        os.unlink(name)


def against_swap(result, directory, image, size):
    with contextlib.ExitStack() as stack:
        swap = stack.enter_context(swap_file(directory))
        sides = {name: cgroup.Cgroup(f"bench-{name}") for name in ("plain", "latent")}
        for side in sides.values():
            if side.path:
                stack.callback(side.remove)
        if not swap or not all(side.path for side in sides.values()):
            result.missing.add("memory cgroup" if swap else "swap")
            return
        pair = {name: start_limited(stack, directory, image, name, limit) for name, limit in sides.items()}
        reclaim_limited(pair["latent"], directory / "store")
        rates = {name: [] for name in pair}
        for _ in range(LIMIT_PAIRS[size]):
            for name, guest in pair.items():
                rates[name].append(read_rate(guest))
                result.tick(f"{name}: {rates[name][-1] / MIB:.1f} MiB/s")
        result.ratio("latent_over_swap", rates["latent"], rates["plain"])
        result.table(f"A guest of {MEM_MIB} MiB that may have {LIMIT_MIB}, MiB/s read", ["", "median", "all"],
                     [[name, f"{statistics.median(found) / MIB:.1f}", " ".join(f"{rate / MIB:.1f}" for rate in found)]
                      for name, found in rates.items()])
        for name, guest in pair.items():
            sides[name].limit.write_text(str(4 * MEM_MIB * MIB))  # a kernel that swaps may kill for it
            guest.qmp("cont")
            sums = common.parse_sums(guest.sh("xargs latent-guest hash < /run/files", timeout=300))
            expected = common.golden_sums()
            result.check(sums and all(expected[path] == found for path, found in sums.items()), f"{name}: files are right")


def start_limited(stack, directory, image, name, limit):
    """A stopped guest that has read the files once, under its limit."""
    own = directory / f"{name}.qcow2"  # its pages are charged to who reads them first
    subprocess.run(["cp", "--reflink=auto", "--sparse=always", image, own], check=True)
    guest = vm.VM(name, image=own, mem=f"{MEM_MIB}M", latent=EVERYTHING if name == "latent" else None, start=False)
    stack.enter_context(contextlib.closing(guest))
    guest.start()
    limit.take(guest.process.pid)
    limit.limit.write_text(str(LIMIT_MIB * MIB))
    guest.wait_ready(timeout=180)
    guest.sh(LIST_FILES.format(bytes=(LIMIT_MIB + MEM_MIB // 8) * MIB))
    guest.put(READ_AGAIN.encode(), "/run/read.py")
    guest.sh("cat $(cat /run/files) > /dev/null", timeout=300)
    guest.qmp("stop")
    return guest


def reclaim_limited(guest, store):
    """What is not used goes to the disk beforehand, as on the other side's swap; looking goes on."""
    guest.qmp("cont")
    latent.run("scan", guest.name, "--period", f"{PERIOD_S}s")
    activity.wait_passes(guest, 5)
    latent.run("reclaim", "--cold-for", f"{COLD_FOR_S}s", "--store", store, guest.name, timeout_s=WITHIN_S)
    guest.qmp("stop")


def read_rate(guest):
    guest.qmp("cont")
    started_s = time.monotonic()
    done = int(guest.sh(f"ulimit -n 8192; python3 /run/read.py {LIMIT_WINDOW_S}", timeout=300))
    seconds = time.monotonic() - started_s
    guest.qmp("stop")
    return done / seconds
