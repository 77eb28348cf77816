# SPDX-License-Identifier: BSD-2-Clause-Patent
"""For unit tests of commands: a list of complaints, and VMs of the cheapest kind (tests/fuzz/fuzz_vmm_qemu.c).

    import cheap

    def body(directory):
        vm = cheap.VM("vm", directory)
        cheap.check(vm.stat()["pages_overlay_now"] == cheap.IMAGE_PAGES, "the image is mapped")
        vm.close()

    if __name__ == "__main__":
        cheap.main(body)

LATENT_BUILD is meson's build directory.
"""

import json
import os
import pathlib
import re
import socket
import struct
import subprocess
import sys
import tempfile

BUILD = pathlib.Path(os.environ.get("LATENT_BUILD", pathlib.Path(__file__).resolve().parents[2] / "build"))
LATENT, VMM = BUILD / "latent", BUILD / "tests" / "fuzz_vmm_qemu"
RAM_MIB, IMAGE_MIB, PAGES_PER_MIB = 8, 4, 256
IMAGE_PAGES = IMAGE_MIB * PAGES_PER_MIB
TIMEOUT_S = 30
SKIPPED = 77
# src/vmdir/control.h
HEADER = (pathlib.Path(__file__).resolve().parents[2] / "src/vmdir/control.h").read_text()
MAGIC, VERSION = 0x4C43544C, int(re.search(r"CONTROL_VERSION (\d+)", HEADER)[1])
OPS = re.findall(r"^\t(CONTROL_[A-Z_]+),", HEADER, re.M)
REQUEST, REPLY = struct.Struct("=IIII4096s"), struct.Struct("=IIiIQQQQ512s")

failures = []


def check(holds, what):
    if not holds:
        failures.append(what)


def latent(*arguments):
    return subprocess.run([LATENT, *map(str, arguments)], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          check=False, timeout=TIMEOUT_S)


class VM:
    """RAM that nobody uses; its first half is an image."""

    def __init__(self, name, directory):
        self.name = name
        image = directory / f"{name}.image"  # of its own: it is written here
        image.write_bytes(os.urandom(IMAGE_MIB << 20))
        self.process = subprocess.Popen([LATENT, "run", "--name", name, "--share-threshold", "0", "--min-run", "1", "--",
                                         VMM, "-machine", "q35", "-m", str(RAM_MIB), image], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
        check(self.process.stdout.read(1) == b"r", f"{name} runs")

    def do(self, command):
        self.process.stdin.write(command.encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            answer += self.process.stdout.read(1) or b"it has ended\n"
        return answer.decode().strip()

    def stat(self):
        return json.loads(latent("stat", self.name, "--json").stdout)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def close(self):
        self.kill()
        self.process.stdin.close()
        self.process.stdout.close()


class Control:
    """A connection to the VM's agent."""

    def __init__(self, vm):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(TIMEOUT_S)
        self.socket.connect(f"{os.environ['LATENT_RUNTIME_DIR']}/{vm.name}/control.sock")

    def ask(self, op):
        """(error, pages, pages_all, text)"""
        self.socket.send(REQUEST.pack(MAGIC, VERSION, OPS.index(op), 0, b""))
        reply = REPLY.unpack(self.socket.recv(REPLY.size))
        return reply[2], reply[4], reply[5], reply[8].split(b"\0")[0].decode()

    def close(self):
        self.socket.close()


def main(body, *needed):
    """Runs body(directory), with a run-time directory of its own, and ends the process; 77: what is needed beside
    LATENT (paths) is not there."""
    missing = [str(path) for path in (LATENT, *needed) if not path.exists()]
    if missing:
        print(f"there is no {' and no '.join(missing)}")
        sys.exit(SKIPPED)
    with tempfile.TemporaryDirectory(prefix="latent-run-") as root, \
            tempfile.TemporaryDirectory(prefix="latent-test-") as directory:
        os.environ["LATENT_RUNTIME_DIR"] = root
        body(pathlib.Path(directory))
    for failure in failures:
        print(failure)
    print(f"{len(failures)} complaints")
    sys.exit(1 if failures else 0)
