# SPDX-License-Identifier: BSD-2-Clause-Patent
"""A limit on the memory of a VM, and swap for what does not fit."""

import contextlib
import os
import subprocess
import tempfile
import time
from pathlib import Path

MIB = 1 << 20


class MemoryLimit:
    """A memory cgroup below this process's, version 1 or 2; `with` gives None where none can be made."""

    def __init__(self, name):
        self.name, self.path, self.file = name, None, None

    def __enter__(self):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            root = {"memory": "/sys/fs/cgroup/memory", "": "/sys/fs/cgroup"}.get(controllers)
            if root and self._make(Path(f"{root}{group.rstrip('/')}/latent-bench-{self.name}-{os.getpid()}")):
                return self
        return None

    def _make(self, path):
        try:
            path.mkdir()
        except OSError:
            return False
        for name in ("memory.limit_in_bytes", "memory.max"):
            if (path / name).exists():
                self.path, self.file = path, path / name
                return True
        path.rmdir()
        return False

    def take(self, pid):
        (self.path / "cgroup.procs").write_text(str(pid))

    def set(self, limit_bytes):
        self.file.write_text(str(limit_bytes))

    def __exit__(self, *_):
        for _ in range(50):  # its processes may be ending
            with contextlib.suppress(OSError):
                self.path.rmdir()
                return
            time.sleep(0.1)


@contextlib.contextmanager
def swap_file(directory, size_mib):
    """Swap on the disk for the time being; True if the machine allows it."""
    handle, name = tempfile.mkstemp(prefix="swap-", dir=directory)
    on = False
    try:
        os.posix_fallocate(handle, 0, size_mib * MIB)
        os.close(handle)
        on = all(subprocess.run(command, capture_output=True).returncode == 0
                 for command in (["/usr/sbin/mkswap", name], ["/usr/sbin/swapon", name]))
        yield on
    finally:
        if on:
            subprocess.run(["/usr/sbin/swapoff", name], check=False)
        os.unlink(name)
