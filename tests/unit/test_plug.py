#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Whatever needs guest RAM for itself, and comes while images are mapped: they are plain RAM first, and their contents
stay; or, where the kernel may be writing there, it is refused, and nothing changes.

The VM is of the cheapest kind (tests/fuzz/fuzz_vmm_qemu.c) and does what QEMU does for such a device; real ones are in
tests/guest/excluded.py and run_as_nice.py. LATENT_BUILD is meson's build directory.
"""

import errno
import json
import os
import pathlib
import subprocess
import sys
import tempfile

BUILD = pathlib.Path(os.environ.get("LATENT_BUILD", pathlib.Path(__file__).resolve().parents[2] / "build"))
LATENT, VMM = BUILD / "latent", BUILD / "tests" / "fuzz_vmm_qemu"
RAM_MIB, IMAGE_MIB, PAGES_PER_MIB = 8, 4, 256
TIMEOUT_S = 30


def ioc(direction, kind, number, size):
    return direction << 30 | size << 16 | ord(kind) << 8 | number


WRITES, READS_AND_WRITES = 1, 3
VHOST_SET_OWNER = ioc(0, "\xaf", 1, 0)
# What is done, and what `latent stat` names then.
PLUGS = [
    ("open /dev/vfio/vfio", "/dev/vfio/vfio"),
    ("open /dev/vfio/17", "/dev/vfio/17"),
    ("open /dev/iommu", "/dev/iommu"),
    ("open /dev/vhost-vdpa-0", "/dev/vhost-vdpa-0"),
    ("open /dev/infiniband/uverbs0", "/dev/infiniband/uverbs0"),
    ("open /dev/udmabuf", "/dev/udmabuf"),
    ("open /dev/sev", "/dev/sev"),
    ("open /dev/userfaultfd", "/dev/userfaultfd"),
    (f"ioctl {ioc(0, ';', 100 + 13, 0)}", "VFIO"),                          # VFIO_IOMMU_MAP_DMA
    (f"ioctl {ioc(0, ';', 0x85, 0)}", "VFIO"),                              # IOMMU_IOAS_MAP
    (f"ioctl {ioc(WRITES, 'u', 0x42, 24)}", "udmabuf"),                     # UDMABUF_CREATE
    (f"ioctl {ioc(WRITES, 'u', 0x43, 8)}", "udmabuf"),                      # UDMABUF_CREATE_LIST
    (f"ioctl {ioc(WRITES, chr(0xaf), 0x72, 1)}", "vhost-vdpa"),             # VHOST_VDPA_SET_STATUS
    (f"ioctl {ioc(2, chr(0xae), 0xbb, 16)}", "memory encryption"),          # KVM_MEMORY_ENCRYPT_REG_REGION
    ("lock", "mlockall"),
    ("userfaultfd", "userfaultfd"),
]

failures = []


def check(holds, what):
    if not holds:
        failures.append(what)


class VM:
    def __init__(self, directory):
        image = directory / "image"
        image.write_bytes(os.urandom(IMAGE_MIB << 20))
        self.process = subprocess.Popen([LATENT, "run", "--name", "vm", "--share-threshold", "0", "--min-run", "1", "--",
                                         VMM, "-machine", "q35", "-m", str(RAM_MIB), image], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
        check(self.process.stdout.read(1) == b"r", "the VM runs")

    def do(self, command):
        self.process.stdin.write(command.encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            answer += self.process.stdout.read(1) or b"it has ended\n"
        return answer.decode().strip()

    def stat(self):
        done = subprocess.run([LATENT, "stat", "vm", "--json"], capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
        return json.loads(done.stdout)

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def check_plug(directory, command, named):
    vm = VM(directory)
    try:
        check(vm.stat()["pages_overlay_now"] == IMAGE_MIB * PAGES_PER_MIB, f"{command}: the image is mapped before")
        before = vm.do("sum")
        answer = vm.do(command)
        check(answer != str(errno.EPERM), f"{command}: it is not refused")
        stat = vm.stat()
        check(stat["pages_overlay_now"] == 0 and not stat["overlays_allowed"], f"{command}: all is plain RAM: {stat}")
        check(stat["excluded_by"].startswith(named), f"{command}: excluded by {stat['excluded_by']!r}, not {named}")
        check(vm.do("sum") == before, f"{command}: RAM holds what it held")
        check(vm.do("read") == "0" and vm.do("sum") == before, f"{command}: what is read anew is right")
        check(vm.stat()["pages_overlay_now"] == 0, f"{command}: and is not mapped")
    finally:
        vm.close()


def check_refusal(directory):
    """A vhost device in the kernel writes guest RAM with no thread of the VMM's: nothing can be moved beneath it."""
    vm = VM(directory)
    try:
        before = vm.do("sum")
        vm.do(f"ioctl {VHOST_SET_OWNER}")
        for command in ("open /dev/vfio/vfio", "lock"):
            check(vm.do(command) == str(errno.EPERM), f"{command}: refused while the kernel does I/O")
            stat = vm.stat()
            check(stat["pages_overlay_now"] == IMAGE_MIB * PAGES_PER_MIB and stat["overlays_allowed"], f"{command}: {stat}")
            check("latent detach vm" in stat["message"], f"{command}: the remedy is named: {stat['message']!r}")
        check(vm.do("sum") == before, "RAM holds what it held")
    finally:
        vm.close()


def check_others(directory):
    """What needs nothing of guest RAM changes nothing."""
    vm = VM(directory)
    try:
        for command in ("open /dev/null", "open /dev/vhost-net-of-nobody", "ioctl 0"):
            vm.do(command)
        check(vm.stat()["pages_overlay_now"] == IMAGE_MIB * PAGES_PER_MIB, "other devices: the image stays mapped")
    finally:
        vm.close()


def main():
    if not LATENT.exists() or not VMM.exists():
        print(f"{LATENT} or {VMM} is not built")
        return 77
    with tempfile.TemporaryDirectory() as root, tempfile.TemporaryDirectory() as directory:
        os.environ["LATENT_RUNTIME_DIR"] = root
        for command, named in PLUGS:
            check_plug(pathlib.Path(directory), command, named)
        check_refusal(pathlib.Path(directory))
        check_others(pathlib.Path(directory))
    for failure in failures:
        print(failure)
    print(f"{len(failures)} complaints")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
