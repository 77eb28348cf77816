# SPDX-License-Identifier: BSD-2-Clause-Patent
"""The host's side of a measurement: page cache, memory figures, accelerator."""

import contextlib
import ctypes
import mmap
import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

PAGE_BYTES = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int,
                       ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


# ---- page cache ----

def cached_pages(path):
    """How many pages of the file are in the page cache."""
    size_bytes = os.path.getsize(path)
    if size_bytes == 0:
        return 0
    n_pages = (size_bytes + PAGE_BYTES - 1) // PAGE_BYTES
    with open(path, "rb") as file:
        address = _libc.mmap(None, size_bytes, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), f"mmap {path}")
    try:
        resident = ctypes.create_string_buffer(n_pages)
        if _libc.mincore(address, size_bytes, resident) != 0:
            raise OSError(ctypes.get_errno(), f"mincore {path}")
        return sum(1 for byte in resident.raw[:n_pages] if byte & 1)
    finally:
        _libc.munmap(address, size_bytes)


def drop_from_page_cache(path, may_remain_pages=0):
    """Drops a file's pages and checks that they are gone (mapped pages cannot go)."""
    remaining = None
    for _ in range(5):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        remaining = cached_pages(path)
        if remaining <= may_remain_pages:
            return
        time.sleep(0.1)  # pages in a per-CPU batch go a little later
    raise RuntimeError(f"{path}: {remaining} pages stay in the page cache (mapped, or in use?)")


def fill_page_cache(path):
    """Reads a file once; returns the seconds it took."""
    start_s = time.monotonic()
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(1 << 20)
        while file.readinto(buffer):
            pass
    return time.monotonic() - start_s


# ---- memory figures of a process, in KiB ----

def memory_rollup_kib(pid):
    """smaps_rollup as a dictionary: Rss, Pss, Pss_Anon, Private_Dirty, ..."""
    return _parse_kib_lines(Path(f"/proc/{pid}/smaps_rollup").read_text())


def total_pss_kib(pids):
    return sum(memory_rollup_kib(pid)["Pss"] for pid in pids)


def mappings(pid):
    """Each mapping of smaps: start, end, perms, path and its figures in KiB."""
    result = []
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        header = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ (\d+) *(.*)", line)
        if header:
            start, end, perms, inode, path = header.groups()
            result.append({"start": int(start, 16), "end": int(end, 16), "perms": perms,
                           "inode": int(inode), "path": path})
        else:
            result[-1].update(_parse_kib_lines(line))
    return result


def guest_ram_kib(pid, hva, size_bytes):
    """Guest RAM between hva and hva + size, by what backs its pages:

      memfd    pages of a shared memory file (the VM's own)
      private  anonymous pages: plain guest RAM, or copies in an overlay
      image    pages of ordinary files mapped into the guest

    Each with rss_kib and pss_kib of these pages, and the number of its mappings; an overlay counts as
    one of `image`, and the copies in it as pages of `private`. rest_pss_kib is that of the process's
    other mappings, huge_kib what of guest RAM is in transparent huge pages.
    """
    figures = {kind: {"rss_kib": 0, "pss_kib": 0, "mappings": 0}
               for kind in ("memfd", "private", "image")}
    rest_kib = huge_kib = 0
    for mapping in mappings(pid):
        if mapping["start"] < hva + size_bytes and mapping["end"] > hva:
            _add_mapping(figures, mapping)
            huge_kib += mapping["AnonHugePages"] + mapping["ShmemPmdMapped"] + mapping["FilePmdMapped"]
        else:
            rest_kib += mapping.get("Pss", 0)
    figures["rest_pss_kib"] = rest_kib
    figures["huge_kib"] = huge_kib
    figures["total_rss_kib"] = sum(figures[k]["rss_kib"] for k in ("memfd", "private", "image"))
    figures["total_pss_kib"] = sum(figures[k]["pss_kib"] for k in ("memfd", "private", "image"))
    return figures


def _add_mapping(figures, mapping):
    if mapping["inode"] == 0:
        kind = "private"
    elif re.match(r"/memfd:|/dev/shm/|/dev/zero", mapping["path"]):
        kind = "memfd"
    else:
        kind = "image"
    anonymous_kib = mapping["Anonymous"]
    # smaps has no Pss of anonymous pages alone. Copies in a file's mapping are this process's, all of
    # them, unless KSM has merged some.
    own_kib = mapping["Pss"] if kind == "private" else min(anonymous_kib, mapping["Pss"])
    figures[kind]["mappings"] += 1
    figures["private"]["rss_kib"] += anonymous_kib
    figures["private"]["pss_kib"] += own_kib
    figures[kind]["rss_kib"] += mapping["Rss"] - anonymous_kib
    figures[kind]["pss_kib"] += mapping["Pss"] - own_kib


def _parse_kib_lines(text):
    return {match[1]: int(match[2]) for match in re.finditer(r"^(\w+): +(\d+) kB$", text, re.M)}


def stop_process(pid, timeout_s=20):
    """SIGSTOP, and waits until each thread stands still: until then those that are not stopped go on."""
    os.kill(pid, signal.SIGSTOP)
    deadline_s = time.monotonic() + timeout_s
    while _thread_states(pid) != {"T"}:
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"process {pid} does not stop")
        time.sleep(0.01)


def _thread_states(pid):
    states = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            states.add((task / "stat").read_text().rpartition(")")[2].split()[0])
    return states


def cpu_seconds(pid):
    """User and system time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---- which accelerator an ordinary guest boots on ----

KVM_PROBE_TIMEOUT_S = 15


def accelerator(images_dir):
    """"kvm" when an ordinary guest boots on it here, else "tcg". LATENT_ACCEL overrides.

    The answer is kept beside the images, for this boot of the host.
    """
    chosen = os.environ.get("LATENT_ACCEL")
    if chosen:
        return chosen
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    answer_path = Path(images_dir).parent / "accelerator"
    try:
        known_boot_id, answer = answer_path.read_text().split()
        if known_boot_id == boot_id:
            return answer
    except (OSError, ValueError):
        pass
    answer = "kvm" if _kvm_boots(images_dir) else "tcg"
    with tempfile.NamedTemporaryFile("w", dir=answer_path.parent, delete=False) as file:
        file.write(f"{boot_id} {answer}\n")
    os.replace(file.name, answer_path)
    return answer


def is_nested():
    """Whether this is the machine of tests/kvm/nested, whose SVM QEMU's TCG emulates."""
    return os.environ.get("LATENT_NESTED") == "1"


def _kvm_boots(images_dir):
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    command = ["qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-machine", "q35", "-m", "256",
               "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot",
               "-kernel", f"{images_dir}/vmlinuz", "-initrd", f"{images_dir}/initrd.img",
               "-append", "console=ttyS0 panic=-1 latent.root=/dev/none"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    try:
        os.set_blocking(process.stdout.fileno(), False)
        return _output_contains(process, b"initramfs: modules loaded", KVM_PROBE_TIMEOUT_S)
    finally:
        process.kill()
        process.wait()


def _output_contains(process, wanted, timeout_s):
    seen = b""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s and process.poll() is None:
        seen += process.stdout.read() or b""
        if wanted in seen:
            return True
        time.sleep(0.05)
    return False
