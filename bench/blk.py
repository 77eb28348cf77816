# SPDX-License-Identifier: BSD-2-Clause-Patent
"""A block backend that maps what is in flight (latent blkd) against one that maps all of guest RAM: throughput, CPU."""

import array
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from common.guests import GuestError, vm
from common.result import spread
from lib.blkd import Blkd

IMAGE_MIB, SECTOR_BYTES = 128, 512
WORKLOADS = [("seq128k", "read"), ("rand4k", "read"), ("seq128k", "write"), ("rand4k", "write")]
DEPTH, RUN_MS = 16, 1000
ROUNDS = {"full": 15, "quick": 5}
LATENT, QSD = "latent blkd", "qemu-storage-daemon"
PEERS = {f"{QSD}, threads": "threads", f"{QSD}, io_uring": "io_uring"}
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def run(result):
    """Requests of a driver of its own (blk_io.c), without a guest, to an image in memory: nothing hides the cost."""
    with tempfile.TemporaryDirectory(prefix="latent-blk-", dir="/dev/shm") as directory, contextlib.ExitStack() as stack:
        bench = Bench(result, Path(directory), stack)
        for number in range(ROUNDS["quick" if result.quick else "full"]):
            bench.run_round(number)
        bench.report()


def make_image(path):
    """Each sector begins with its number."""
    words = array.array("Q", bytes(IMAGE_MIB << 20))
    words[::SECTOR_BYTES // 8] = array.array("Q", range((IMAGE_MIB << 20) // SECTOR_BYTES))
    path.write_bytes(words.tobytes())
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
    def __init__(self, result, directory, stack):
        self.result, self.program = result, vm.BUILD_DIR / "bench/blk_io"
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

    def run_round(self, number):
        for workload in WORKLOADS:
            self.result.tick(f"round {number + 1}: {' '.join(workload)}")
            for name, server in self.servers.items():
                self.measure(name, server, workload)

    def measure(self, name, server, workload):
        before = cpu_ticks(server.pids())
        done = subprocess.run([self.program, server.socket, *workload, str(RUN_MS), str(DEPTH)], capture_output=True,
                              text=True, check=False, timeout=60)
        ticks = cpu_ticks(server.pids()) - before
        self.result.check(done.returncode == 0, f"{name}, {' '.join(workload)}: {done.stderr.strip()} {done.stdout.strip()}")
        said = json.loads(done.stdout)
        self.found.setdefault((name, workload), []).append(
            (said["requests"] / said["seconds"], said["bytes"] / said["seconds"],
             1e6 * ticks / TICKS_PER_S / max(1, said["requests"])))

    # ---- reporting ----

    def values(self, name, workload, which):
        return [one[which] for one in self.found[name, workload]]

    def report(self):
        for workload in WORKLOADS:
            rows = [[name, spread([n / 1000 for n in self.values(name, workload, 0)]),
                     spread([n / 1e6 for n in self.values(name, workload, 1)]), spread(self.values(name, workload, 2))]
                    for name in self.servers]
            self.result.table(f"{' '.join(workload)}, {DEPTH} under way",
                              ["", "1000 requests/s", "MB/s", "CPU µs/request"], rows)
            self.compare(workload)
        self.result.metric("peak_mapped_guest_pages", self.peak_pages())
        self.result.note(f"Image of {IMAGE_MIB} MiB in memory; the driver sleeps until it is told, as a guest does. The peer "
                         "of a ratio is the better of the two. CPU: user and system time of the processes that serve. "
                         "An image in memory is read without windows, and written with them from the length on at which "
                         "they pay; no guest pages mapped: all was copied. Not measured: from inside a guest.")

    def compare(self, workload):
        """Throughput of ours over the peer's, by pairs; of the peers, the one that is faster."""
        peers = [name for name in self.servers if name != LATENT]
        if not peers:
            return
        best = max(peers, key=lambda name: statistics.median(self.values(name, workload, 0)))
        suffix = workload[0] + ("" if workload[1] == "read" else "_write")
        self.result.ratio(f"latent_over_qsd_{suffix}", self.values(LATENT, workload, 0), self.values(best, workload, 0))

    def peak_pages(self):
        """Guest pages that were mapped at once beside the rings, as the lane says when a connection ends."""
        said = re.findall(r"at most (\d+) guest pages", self.servers[LATENT].log.read_text())
        self.result.check(said, "the lane says what it has mapped")
        return max(map(int, said), default=0)


def cpu_ticks(pids):
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks
