# SPDX-License-Identifier: BSD-2-Clause-Patent
"""The part of the benchmark `blk` that is run by a real guest: fio, on a disk of each server in turn."""

import json
import subprocess

from common.guests import cpu_clock_s, golden, vm
from common.result import spread
from lib import blkd

MEM = "512M"
RUN_S = 1
VERIFY_MIB = 8
FIO = "fio --name=x --direct=1 --ioengine=libaio --thread"


class GuestDisks:
    """`servers`: {name: (server, image)}; a server has `socket` and `pids()`."""

    def __init__(self, result, servers, workloads, depth):
        self.result, self.servers, self.workloads, self.depth = result, servers, workloads, depth
        self.devices = {name: f"/dev/vd{chr(ord('b') + n)}" for n, name in enumerate(servers)}
        self.found = {}  # (server, workload): list of (requests a second, bytes a second, CPU µs a request)

    def run(self, rounds):
        """Boots, measures, compares contents, and powers off, so that lanes say what they have mapped."""
        devices = [word for n, (server, _) in enumerate(self.servers.values()) for word in blkd.device(server.socket, f"blk{n}")]
        with vm.VM("blk", mem=MEM, extra=[*blkd.shared_ram(MEM), *devices]) as guest:
            guest.wait_ready(120)
            self.compare(guest, "before any write")
            for number in range(rounds):
                for workload in self.workloads:
                    self.result.tick(f"guest, round {number + 1}: {' '.join(workload)}")
                    for name in self.servers:
                        self.measure(guest, name, workload)
            self.verify(guest)
            self.compare(guest, "after the writes")
            guest.shutdown()

    def measure(self, guest, name, workload):
        server = self.servers[name][0]
        pattern, direction = workload
        words = {"seq128k": f"--bs=128k --rw={direction}", "rand4k": f"--bs=4k --rw=rand{direction}"}[pattern]
        before_s = cpu_s(server)
        output = guest.sh(f"{FIO} {words} --filename={self.devices[name]} --iodepth={self.depth} --time_based --norandommap "
                          f"--runtime={RUN_S} --output-format=json --output=/tmp/fio.json > /dev/null && cat /tmp/fio.json")
        used_s = cpu_s(server) - before_s
        said = json.loads(output)["jobs"][0][direction]
        requests = max(1, said["total_ios"])
        self.found.setdefault((name, workload), []).append(
            (said["total_ios"] * 1000 / said["runtime"], said["io_bytes"] * 1000 / said["runtime"], 1e6 * used_s / requests))

    # ---- contents ----

    def verify(self, guest):
        """fio writes blocks that say where they belong, in both sizes, and reads them."""
        for name, device in self.devices.items():
            for number, size in enumerate(("4k", "128k")):
                status = guest.sh(f"{FIO} --rw=randwrite --bs={size} --filename={device} --offset={number * VERIFY_MIB}m "
                                  f"--size={VERIFY_MIB}m --iodepth={self.depth} --verify=crc32c --verify_fatal=1 "
                                  "> /tmp/fio.txt 2>&1; echo $?", timeout=120).strip()
                self.result.check(status == "0", f"{name}: fio finds what it wrote, {size} ({status})")

    def compare(self, guest, when):
        """The whole disk as the guest sees it is the whole image."""
        guest.drop_guest_caches()
        for name, (_, image) in self.servers.items():
            seen = guest.sh(f"latent-guest hash {self.devices[name]}", timeout=120).split()[0]
            there = subprocess.run([golden("latent-guest"), "hash", image], capture_output=True, text=True, check=True)
            self.result.check(seen == there.stdout.split()[0], f"{name}: the guest sees what the image has, {when}")

    # ---- reporting ----

    def values(self, name, workload, which):
        return [one[which] for one in self.found[name, workload]]

    def rows(self):
        return {workload: [row(name, self.found[name, workload]) for name in self.servers] for workload in self.workloads}


def row(name, found):
    """Of a table: requests, bytes and CPU of some runs."""
    requests, data, cpu_us = zip(*found)
    return [name, spread([n / 1000 for n in requests]), spread([n / 1e6 for n in data]), spread(cpu_us)]


def cpu_s(server):
    return sum(cpu_clock_s(pid) for pid in server.pids())
