#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Whatever needs guest RAM for itself, and comes while images are mapped: they are plain RAM first, and their contents
stay; or, where the kernel may be writing there, it is refused, and nothing changes.

The VM is of the cheapest kind (tests/fuzz/fuzz_vmm_qemu.c) and does what QEMU does for such a device; real ones are in
tests/guest/excluded.py and run_as_nice.py.
"""

import errno

import cheap
from cheap import IMAGE_PAGES, check


def ioc(direction, kind, number, size):
    return direction << 30 | size << 16 | ord(kind) << 8 | number


WRITES = 1
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


def check_plug(directory, command, named):
    vm = cheap.VM("vm", directory)
    try:
        check(vm.stat()["pages_overlay_now"] == IMAGE_PAGES, f"{command}: the image is mapped before")
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
    vm = cheap.VM("vm", directory)
    try:
        before = vm.do("sum")
        vm.do(f"ioctl {VHOST_SET_OWNER}")
        for command in ("open /dev/vfio/vfio", "lock"):
            check(vm.do(command) == str(errno.EPERM), f"{command}: refused while the kernel does I/O")
            stat = vm.stat()
            check(stat["pages_overlay_now"] == IMAGE_PAGES and stat["overlays_allowed"], f"{command}: {stat}")
            check("latent detach vm" in stat["message"], f"{command}: the remedy is named: {stat['message']!r}")
        check(vm.do("sum") == before, "RAM holds what it held")
    finally:
        vm.close()


def check_others(directory):
    """What needs nothing of guest RAM changes nothing."""
    vm = cheap.VM("vm", directory)
    try:
        for command in ("open /dev/null", "open /dev/vhost-net-of-nobody", "ioctl 0"):
            vm.do(command)
        check(vm.stat()["pages_overlay_now"] == IMAGE_PAGES, "other devices: the image stays mapped")
    finally:
        vm.close()


def check_given(directory):
    """What another process writes into guest RAM nobody holds up: that VM is not saved while it runs."""
    vm = cheap.VM("vm", directory)
    try:
        saver = cheap.Control(vm)
        error, _, _, text = saver.ask("CONTROL_SAVE_BEGIN")
        check(error == 0, f"a save can begin: {text}")
        saver.close()
        check(vm.do("give") == "0" and vm.stat()["excluded_by"].startswith("vhost-user"), "guest RAM is given away")
        saver = cheap.Control(vm)
        error, _, _, text = saver.ask("CONTROL_SAVE_BEGIN")
        check(error == -errno.EBUSY and "vhost-user" in text, f"then it cannot: {error}, {text}")
        saver.close()
    finally:
        vm.close()


def body(directory):
    for command, named in PLUGS:
        check_plug(directory, command, named)
    check_refusal(directory)
    check_others(directory)
    check_given(directory)


if __name__ == "__main__":
    cheap.main(body, cheap.VMM)
