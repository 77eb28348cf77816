# SPDX-License-Identifier: BSD-2-Clause-Patent
"""A block backend that maps what is in flight (latent blkd) against one that maps all of guest RAM: throughput, CPU."""

import array
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from common.blk_guest import GuestDisks, cpu_s, row
from common.guests import GuestError, scratch_dir, vm
from lib.blkd import Blkd, moved_by

IMAGE_MIB, SECTOR_BYTES = 128, 512
WORKLOADS = [("seq128k", "read"), ("rand4k", "read"), ("seq128k", "write"), ("rand4k", "write")]
DEPTH = 16
SLOTS, SLOT_PAGES = 64, 511  # of a lane, and what each holds at most
ROUNDS, RUN_MS, GUEST_ROUNDS = {"full": 15, "quick": 5}, {"full": 1000, "quick": 300}, {"full": 9, "quick": 2}
LATENT, QSD = "latent blkd", "qemu-storage-daemon"
PEERS = {f"{QSD}, threads": "threads", f"{QSD}, io_uring": "io_uring"}
PLACES = {"": "in memory", "file_": "in a file that the page cache holds"}  # of the image; by what ratios are called


def run(result):
    """Requests of a driver of its own (blk_io.c), without a guest, so that nothing hides the cost; then from a guest."""
    extent = "quick" if result.quick else "full"
    with tempfile.TemporaryDirectory(prefix="latent-blk-", dir="/dev/shm") as memory, scratch_dir() as disk:
        with contextlib.ExitStack() as stack:
            benches = [Bench(result, Path(directory), place, stack) for directory, place in ((memory, ""), (disk, "file_"))]
            for number in range(ROUNDS[extent]):
                for bench in benches:
                    bench.run_round(number, RUN_MS[extent])
            for bench in benches:
                bench.report()
            best = benches[-1].best_peer(WORKLOADS[0])
        run_guest(result, Path(disk), best, GUEST_ROUNDS[extent])
    result.note(f"Images of {IMAGE_MIB} MiB. The driver, and the guest, sleep until they are told. The peer of a ratio is the "
                "better of the two; the guest has the one that is better at 128 KiB reads. CPU: user and system time of the "
                "processes that serve. Mapped guest pages: at once, beside the rings. What went through windows: of the bytes, "
                "the rest was copied (docs/blkd.md: \"When windows pay\").")


def run_guest(result, directory, peer, rounds):
    """A guest (TCG where KVM cannot run it) with a disk of ours and one of the peer's; fio works on them in turn."""
    with contextlib.ExitStack() as stack:
        servers = {}
        for name in (LATENT, peer):
            if name is not None:
                image, socket = make_image(directory / f"guest-{len(servers)}.img"), directory / f"guest-{len(servers)}.sock"
                servers[name] = (Domain(socket, image) if name == LATENT else StorageDaemon(socket, image, PEERS[name]), image)
                stack.callback(servers[name][0].close)
        disks = GuestDisks(result, servers, WORKLOADS, DEPTH)
        disks.run(rounds)
        rows = disks.rows()
        for workload in WORKLOADS:
            result.table(f"from a guest: {' '.join(workload)}, {DEPTH} under way, image in a file",
                         ["", "1000 requests/s", "MB/s", "CPU µs/request"], rows[workload])
            if peer is not None:
                suffix = suffix_of(workload)
                result.ratio(f"latent_over_qsd_guest_{suffix}", disks.values(LATENT, workload, 0), disks.values(peer, workload, 0))
                result.ratio(f"qsd_over_latent_guest_cpu_{suffix}", disks.values(peer, workload, 2), disks.values(LATENT, workload, 2))
        report_windows(result, "guest_", servers[LATENT][0])


def suffix_of(workload):
    return workload[0] + ("" if workload[1] == "read" else "_write")


def report_windows(result, prefix, domain):
    """What the lane has said when its connections ended: pages that were mapped at once beside the rings, and what went
    by which way."""
    said, deadline_s = [], time.monotonic() + 10
    while not said and time.monotonic() < deadline_s:  # the front end is gone, and the lane is about to see that
        said = moved_by(domain.log)
        time.sleep(0.05)
    windows, copies, peak = said[-1] if said else (0, 0, 0)
    result.check(0 < peak <= SLOTS * SLOT_PAGES, f"the lane has had {peak} guest pages mapped at once, within its slots")
    result.metric(f"{prefix}peak_mapped_guest_pages", peak)
    result.metric(f"{prefix}fraction_through_windows", windows / max(1, windows + copies))


def make_image(path):
    """Each sector begins with its number."""
    words = array.array("Q", bytes(IMAGE_MIB << 20))
    words[::SECTOR_BYTES // 8] = array.array("Q", range((IMAGE_MIB << 20) // SECTOR_BYTES))
    with open(path, "wb") as file:
        file.write(words.tobytes())
        os.fsync(file.fileno())
    return path


class StorageDaemon:
    def __init__(self, socket, image, aio):
        self.socket = socket
        self.process = subprocess.Popen(
            ["qemu-storage-daemon", "--blockdev", f"driver=file,node-name=file,filename={image},aio={aio}",
             "--blockdev", "driver=raw,node-name=disk,file=file", "--export",
             f"type=vhost-user-blk,id=export,addr.type=unix,addr.path={socket},node-name=disk,writable=on,num-queues=1"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline_s = time.monotonic() + 10
        while not socket.exists():
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                self.close()
                raise GuestError("qemu-storage-daemon did not start")
            time.sleep(0.02)

    def pids(self):
        return [self.process.pid]

    def close(self):
        self.process.kill()
        self.process.wait()


class Domain(Blkd):
    def pids(self):
        return self.lanes()


class Bench:
    def __init__(self, result, directory, place, stack):
        self.result, self.program, self.place = result, vm.BUILD_DIR / "bench/blk_io", place
        self.found = {}  # (server, workload): list of (requests a second, bytes a second, CPU µs a request)
        self.servers = {LATENT: stack.enter_context(Domain(directory / "latent.sock", make_image(directory / "latent.img")))}
        for name, aio in PEERS.items() if shutil.which(QSD) else ():
            try:
                server = StorageDaemon(directory / f"{aio}.sock", make_image(directory / f"{aio}.img"), aio)
            except GuestError:
                result.missing.add(name)
                continue
            stack.callback(server.close)
            self.servers[name] = server
        if len(self.servers) == 1:
            result.missing.add(QSD)

    def run_round(self, number, run_ms):
        for workload in WORKLOADS:
            self.result.tick(f"round {number + 1}: {' '.join(workload)}, image {PLACES[self.place]}")
            for name, server in self.servers.items():
                self.measure(name, server, workload, run_ms)

    def measure(self, name, server, workload, run_ms):
        before_s = cpu_s(server)
        done = subprocess.run([self.program, server.socket, *workload, str(run_ms), str(DEPTH)], capture_output=True,
                              text=True, check=False, timeout=60)
        used_s = cpu_s(server) - before_s
        self.result.check(done.returncode == 0, f"{name}, {' '.join(workload)}: {done.stderr.strip()} {done.stdout.strip()}")
        said = json.loads(done.stdout)
        self.found.setdefault((name, workload), []).append(
            (said["requests"] / said["seconds"], said["bytes"] / said["seconds"], 1e6 * used_s / max(1, said["requests"])))

    # ---- reporting ----

    def values(self, name, workload, which):
        return [one[which] for one in self.found[name, workload]]

    def report(self):
        for workload in WORKLOADS:
            self.result.table(f"{' '.join(workload)}, {DEPTH} under way, image {PLACES[self.place]}",
                              ["", "1000 requests/s", "MB/s", "CPU µs/request"],
                              [row(name, self.found[name, workload]) for name in self.servers])
            best = self.best_peer(workload)
            if best is not None:
                self.result.ratio(f"latent_over_qsd_{self.place}{suffix_of(workload)}", self.values(LATENT, workload, 0),
                                  self.values(best, workload, 0))
        report_windows(self.result, self.place, self.servers[LATENT])

    def best_peer(self, workload):
        peers = [name for name in self.servers if name != LATENT]
        return max(peers, key=lambda name: statistics.median(self.values(name, workload, 0))) if peers else None
