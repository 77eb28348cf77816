# SPDX-License-Identifier: BSD-2-Clause-Patent
"""What benchmarks and the demo do with guests: images of their own, reads, checks, figures."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SOURCE_DIR = Path(__file__).resolve().parents[2]
sys.path.append(str(SOURCE_DIR / "tests/guest"))  # behind: a benchmark and a test may have one name

from lib import host, vm  # noqa: E402
from lib.agent import GuestError  # noqa: E402

END_TIMEOUT_S = 5
HASH_ALL_FILES = "latent-guest hash -r /"
# What the file system makes, and what a test may have written.
NOT_OF_THE_IMAGE = ("/lost+found/", "/new/")


# ---- images ----

def golden(name):
    return vm.images_dir() / name


@contextlib.contextmanager
def scratch_dir():
    """A directory on the images' file system; those of killed runs are removed first.

    Benchmarks work on copies of the golden image: nobody else has them mapped, so their pages
    can be dropped from the page cache, and count for this run alone.
    """
    parent = vm.images_dir().parent.parent / "bench"
    parent.mkdir(parents=True, exist_ok=True)
    for left_over in parent.iterdir():
        _remove_if_unused(left_over)
    path = Path(tempfile.mkdtemp(prefix="run-", dir=parent))
    path.chmod(0o755)
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _remove_if_unused(path):
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except BlockingIOError:
        pass  # another run's
    finally:
        os.close(lock)


def copy_image(name, directory):
    """A copy of a golden image, on disk (so that its pages can be dropped)."""
    copy = Path(directory) / name
    subprocess.run(["cp", "--reflink=auto", "--sparse=always", golden(name), copy], check=True)
    with open(copy, "rb") as file:
        os.fsync(file.fileno())
    return copy


# ---- several guests at once ----

@contextlib.contextmanager
def running(*guests):
    """Guests that run, are ready, and are gone at the end."""
    try:
        for guest in guests:
            guest.start()
        for guest in guests:
            guest.wait_ready(timeout=180)
        yield guests
    except GuestError:
        for guest in guests:
            guest.diagnose()
        raise
    finally:
        end_all(guests)


def end_all(guests):
    """QEMU may clean up after itself (its run-time directory); what does not end is killed."""
    for guest in guests:
        if guest.alive() and guest.process is not None:
            with contextlib.suppress(OSError, GuestError):
                os.kill(guest.pid, signal.SIGTERM)
    for guest in guests:
        if guest.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                guest.process.wait(END_TIMEOUT_S)
        guest.close()


def start_all(guests, command, on_output=None):
    return [guest.sh_start(command, on_output) for guest in guests]


def run_all(guests, command, timeout_s=300):
    """One shell command in all guests at once; their outputs."""
    return [job.wait(timeout_s) for job in start_all(guests, command)]


# ---- contents ----

def parse_sums(text):
    """"HASH  PATH" lines as {path: hash}; paths from the root with a single slash."""
    pairs = (line.split("  ", 1) for line in text.splitlines() if "  " in line)
    return {"/" + path.lstrip("/"): value for value, path in pairs}


def golden_sums():
    return parse_sums(golden("golden.hash64").read_text())


def wrong_files(output, expected):
    """Paths whose contents are not as built, from the output of HASH_ALL_FILES."""
    found = {path: value for path, value in parse_sums(output).items()
             if not path.startswith(NOT_OF_THE_IMAGE)}
    return sorted(path for path in expected.keys() | found.keys()
                  if expected.get(path) != found.get(path))


# ---- figures ----

median = statistics.median


def cpu_clock_s(pid):
    """CPU time of a whole process, to the nanosecond (its CPU clock, see clock_getcpuclockid(3))."""
    return time.clock_gettime(~pid << 3 | 2)


def storage_read_bytes(pid):
    """Bytes that a process made the kernel read from storage; page-cache hits do not count."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise GuestError(f"/proc/{pid}/io has no read_bytes")


def memory_kib(guest):
    """Where a guest's memory is, in KiB of Pss (a page that n processes map counts 1/n in each).

      ram      guest RAM: private copies, the VM's memfd and pages of images, in ram_private,
               ram_memfd and ram_image; what of it is in huge pages, in ram_huge
      own      the rest of QEMU
      total    both: the process's Pss
      private, shared   the same total by whether anybody else maps the page

    To be asked of guests that are stopped.
    """
    ram = guest.ram_kib()
    rollup = host.memory_rollup_kib(guest.pid)
    # smaps cuts the Pss of each mapping to whole KiB, the rollup only the sum; most mappings are the image's.
    cut_kib = rollup["Pss"] - ram["total_pss_kib"] - ram["rest_pss_kib"] if ram["image"]["mappings"] else 0
    ram_kib = ram["total_pss_kib"] + cut_kib
    private_kib = rollup["Private_Clean"] + rollup["Private_Dirty"]
    return {
        "ram": ram_kib,
        "ram_private": ram["private"]["pss_kib"],
        "ram_memfd": ram["memfd"]["pss_kib"],
        "ram_image": ram["image"]["pss_kib"] + cut_kib,
        "ram_huge": ram["huge_kib"],
        "own": rollup["Pss"] - ram_kib,
        "total": rollup["Pss"],
        "private": private_kib,
        "shared": rollup["Pss"] - private_kib,
        "mappings": sum(ram[kind]["mappings"] for kind in ("memfd", "private", "image")),
    }


def sum_memory_kib(guests):
    """The sum over guests that are stopped; of the image, the pages that any of them maps, once."""
    figures = [memory_kib(guest) for guest in guests]
    return {key: sum(figure[key] for figure in figures) for key in figures[0]}


def drop_or_say(path, say):
    """Drops a file from the page cache; says so when pages stay. True when none stayed."""
    try:
        host.drop_from_page_cache(path)
        return True
    except RuntimeError as error:
        say(str(error))
        return False


# ---- Latent ----

def latent_command():
    return vm.BUILD_DIR / "latent"


def latent_is_built():
    return os.access(latent_command(), os.X_OK)


def latent_stat(name):
    """`latent stat NAME --json`."""
    result = subprocess.run([latent_command(), "stat", name, "--json"], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)
    if result.returncode != 0:
        raise GuestError(f"latent stat {name}: {result.stderr.strip()}")
    return json.loads(result.stdout)
