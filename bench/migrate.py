# SPDX-License-Identifier: BSD-2-Clause-Patent
"""A running guest moved over 1 Gbit/s: latent migrate against QEMU's own pre-copy, and its post-copy."""

import contextlib
import json
import subprocess
import threading
import time

from common import guests as common
from common.guests import GuestError, vm
from common.result import spread
from lib import hosts as links
from lib import latent

MEM = "1G"
MBIT_S = 1000
DOWNTIME_MS = 50  # asked of both
HELD_MIB = {"idle": 8, "cache": 8, "write": 64}  # random words
WARM_UP = "idle"  # the first of them: its first move has to read the images, and is reported apart
FILES = "/usr/lib/python3.11/"
READ_ALL = "find /usr -xdev -type f | sort | xargs cat > /dev/null"
WRITE_PAGES_PER_S = 12800  # 50 MB/s
WRITE = f"latent-guest mem churn m 0 {HELD_MIB['write'] * 256} 600 {WRITE_PAGES_PER_S}"
PAIRS = {"full": 4, "quick": 1}
PORT = 4848
END_S = 120     # of one move, after which QEMU may pause its guest for as long as it takes
SETTLE_S = 1.0
PAGE_BYTES = 4096
WAYS = ("latent", "precopy")


def run(result):
    pairs = PAIRS["quick" if result.quick else "full"]
    with common.scratch_dir() as scratch, links.shaped(MBIT_S) as hosts:
        images = {name: [copy_image(scratch / f"{name}{number}") for number in range(2)] for name in WAYS}
        lost = sum(measure(result, hosts, images, work, pairs) for work in HELD_MIB)
    result.metric("guests_lost_by_qemu", lost)
    result.note(f"""\
Two network namespaces are the hosts, with {MBIT_S} Mbit/s between them (tbf); each has an image of its own under the guest's
disk, which is not in the page cache where the guest is moved to. Bytes are those of the link's device, with all headers;
the time is from the order to move until nothing is left to be sent; the start of the other QEMU is in it, on both sides.
Before that each image was read once (latent_first_time_s is a first move's, which does that), and is known from then on;
the downtime is from QEMU's event STOP on one side to RESUME on the other. Both are asked for {DOWNTIME_MS} ms, and neither uses
TLS. "cache": it has read all files of /usr. "write": it writes {WRITE_PAGES_PER_S * PAGE_BYTES // 1000000} MB/s, all over {HELD_MIB["write"]} MiB.
Under TCG, QEMU's own pre-copy can miss a write; a guest that it has lost so is counted (guests_lost_by_qemu) and replaced, and
the move's figures are kept: nothing of them depends on it.""")
    result.left_out.add("10 Gbit/s")


def copy_image(directory):
    directory.mkdir()
    return common.copy_image("golden.qcow2", directory)


class Side:
    """A guest that goes to and fro between two places, which share its disk, and have an image each below it."""

    def __init__(self, name, hosts, copies, options):
        self.hosts, self.copies, self.here, self.lost = hosts, copies, 0, 0
        self.guests = [vm.VM(f"migrate-{name}{number}", image=copy, mem=MEM, latent=options, start=False, before=host.before,
                             drive_opts=f"backing.file.filename={copy}")
                       for number, (host, copy) in enumerate(zip(hosts, copies))]
        self.own_disk = self.guests[1].disk
        self.guests[1].disk = self.guests[0].disk

    @property
    def guest(self):
        return self.guests[self.here]

    @property
    def there(self):
        return self.guests[1 - self.here]

    def address(self):
        return f"tcp:{self.hosts[1 - self.here].address}:{PORT}"

    def moved(self):
        self.guest.kill9()
        self.here = 1 - self.here


def measure(result, hosts, images, work, pairs):
    """Returns how many guests QEMU has lost."""
    sides = {"latent": Side(f"latent-{work}-", hosts, images["latent"], ["--share-threshold", "0"]),
             "precopy": Side(f"plain-{work}-", hosts, images["precopy"], None)}
    samples = {way: [] for way in (*WAYS, "postcopy")}
    moves = [way for number in range(pairs) for way in
             [*(WAYS if number % 2 == 0 else WAYS[::-1]), *(["postcopy"] if work == "cache" else [])]]
    with contextlib.ExitStack() as stack:
        for side in sides.values():
            for guest in side.guests:
                stack.callback(guest.close)
        result.say(f"{work}: two guests boot")
        for side in sides.values():
            side.guest.start()
        for side in sides.values():
            begin(side.guest, work)
        if work == WARM_UP:
            result.metric("latent_first_time_s", one(result, sides["latent"], work, "latent")["time_s"])
            survived(result, sides["latent"], work, "latent", False)
        for number, way in enumerate(moves):
            side = sides["latent" if way == "latent" else "precopy"]
            samples[way].append(one(result, side, work, way))
            survived(result, side, work, way, number + 1 == len(moves))
    report(result, work, samples)
    return sides["precopy"].lost


def begin(guest, work):
    guest.wait_ready(timeout=180)
    guest.sh(f"latent-guest mem hold m {HELD_MIB[work]} 13 random", timeout=120)
    if work == "cache":
        guest.sh(READ_ALL, timeout=240)
    if work == "write":
        guest.sh_start(WRITE)
    guest.sh("sync")


def one(result, side, work, way):
    common.drop_or_say(side.copies[1 - side.here], result.say)
    before = sum(host.bytes_sent() for host in side.hosts)
    guest, there = side.guest, side.there
    figures = (move_latent if way == "latent" else move_plain)(result, side, way)
    figures["bytes"] = sum(host.bytes_sent() for host in side.hosts) - before
    figures["down_ms"] = downtime_ms(guest, there)
    result.say(f"{work}, {way}: {figures['bytes'] / 1e6:.1f} MB in {figures['time_s']:.2f} s, stood "
               f"{figures['down_ms']:.1f} ms")
    time.sleep(SETTLE_S)
    if way == "latent":
        figures["on_disk"] = latent.stat(there)["source_bits_now"]
    figures["disk_bytes"] = common.storage_read_bytes(there.pid) if there.alive() else 0
    side.moved()
    return figures


def survived(result, side, work, way, is_last):
    """The guest that was moved is right. One that QEMU has lost is replaced."""
    if way == "latent":
        for what, right in looked_at(side.guest):
            result.check(right, f"{work}, {way}: {what}")
        return
    try:
        if all(right for _, right in looked_at(side.guest)):
            return
        fault = "its contents are wrong"
    except (GuestError, OSError) as error:
        fault = str(error).splitlines()[0]
    side.lost += 1
    result.say(f"{work}, {way}: QEMU has lost its guest ({fault})")
    if not is_last:
        side.guest.start()
        begin(side.guest, work)


def looked_at(guest):
    guest.wait_ready()
    yield "its memory is right", guest.sh("latent-guest mem check m", timeout=120).startswith("ok")
    found = common.parse_sums(guest.sh(f"latent-guest hash -r {FILES}", timeout=120))
    expected = latent.golden_hashes(FILES)
    yield "its files are right", all(found.get(path) == value for path, value in expected.items())


# ---- the ways ----

def move_latent(result, side, way):
    guest, there = side.guest, side.there
    here_image, there_image = side.copies[side.here], side.copies[1 - side.here]
    receiver = there.receive(side.address(), "--plain", "--volume", f"{here_image}={there_image}")
    listener = listen(there)
    _ = guest.monitor  # its events are ours from now on
    begin_s = time.monotonic()
    command = [*guest.before, common.latent_command(), "migrate", "--json", "--plain", "--max-downtime", DOWNTIME_MS,
               guest.name, side.address()]
    answer = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=END_S)
    took_s = time.monotonic() - begin_s
    if answer.returncode:
        raise GuestError(f"latent migrate: {answer.stderr}")
    receiver.communicate(timeout=60)
    listener.join()
    told = json.loads(answer.stdout)
    steps = ", ".join(f"{key.split('_')[-2]} {told[key] / 1000:.0f}" for key in told if key.endswith("_us"))
    result.say(f"  {told['passes']} passes, {told['pages_missing']} pages missing at the switch; ms: {steps}")
    return {"time_s": took_s}


def move_plain(result, side, way):
    guest, there = side.guest, side.there
    there.extra = ["-incoming", "defer"]
    _ = guest.monitor
    begin_s = time.monotonic()
    there.start()
    there.extra = []
    for each in (guest, there):
        each.qmp("migrate-set-capabilities", capabilities=[{"capability": "postcopy-ram", "state": way == "postcopy"}])
    there.qmp("migrate-incoming", uri=side.address())
    guest.qmp("migrate-set-parameters", max_bandwidth=1 << 40, downtime_limit=DOWNTIME_MS)
    guest.qmp("migrate", uri=side.address())
    if way == "postcopy":
        guest.qmp("migrate-start-postcopy")
    wait_migrated(guest, begin_s)
    return {"time_s": time.monotonic() - begin_s}


def wait_migrated(guest, begin_s):
    forced = False
    while (status := guest.qmp("query-migrate")["status"]) != "completed":
        if status in ("failed", "cancelled"):
            raise GuestError(f"migrate: {status}")
        if time.monotonic() - begin_s > END_S and not forced:
            guest.qmp("migrate-set-parameters", downtime_limit=60000)
            forced = True
        time.sleep(0.005)


def listen(guest):
    """Connects to QEMU's monitor as soon as it is there: nothing is told of what was before."""
    thread = threading.Thread(target=lambda: guest.monitor)
    thread.start()
    return thread


def time_of(event):
    return event["timestamp"]["seconds"] * 1000 + event["timestamp"]["microseconds"] / 1000


def downtime_ms(guest, there):
    return time_of(there.monitor.wait_event("RESUME")) - time_of(guest.monitor.wait_event("STOP"))


# ---- what was found ----

def report(result, work, samples):
    def column(way, key):
        return [figures[key] for figures in samples[way]]

    for name, key in (("bytes", "bytes"), ("time", "time_s"), ("downtime", "down_ms")):
        result.ratio(f"{name}_qemu_precopy_over_latent_{work}", column("precopy", key), column("latent", key))
    result.metric(f"latent_downtime_ms_{work}", common.median(column("latent", "down_ms")))
    ways = [way for way in samples if samples[way]]
    result.table(f"A guest of {MEM} that is moved: {work}", ["", *ways],
                 [[title, *(spread([value * factor for value in column(way, key)], digits) for way in ways)]
                  for title, key, factor, digits in (("MB sent", "bytes", 1e-6, 1), ("time, s", "time_s", 1, 2),
                                                     ("downtime, ms", "down_ms", 1, 1),
                                                     ("MB read from the disk there", "disk_bytes", 1e-6, 1))])
    if work == "cache":
        result.ratio("time_qemu_postcopy_over_latent_cache", column("postcopy", "time_s"), column("latent", "time_s"))
        result.metric("disk_bytes_fetched_cache", common.median(column("latent", "disk_bytes")))
        result.metric("pages_left_on_disk_cache", common.median(column("latent", "on_disk")))
