# SPDX-License-Identifier: BSD-2-Clause-Patent
"""A limit on the memory of processes.

    group = cgroup.Cgroup("name")
    if group.path is None: ...            # none can be made here
    group.limit.write_text(str(48 << 20))
    group.take(pid)
    group.remove()                        # when its processes have ended
"""

import contextlib
import os
import time
from pathlib import Path


class Cgroup:
    """A memory cgroup of the test's own; version 1 or 2, whichever has the controller."""

    def __init__(self, name="test"):
        self.path = None
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            root = {"memory": "/sys/fs/cgroup/memory", "": "/sys/fs/cgroup"}.get(controllers)
            path = Path(f"{root}{group.rstrip('/')}/latent-{name}-{os.getpid()}")
            try:
                path.mkdir()
            except OSError:
                continue
            for file in ("memory.limit_in_bytes", "memory.max"):
                if root and (path / file).exists():
                    self.path, self.limit = path, path / file
                    return
            path.rmdir()

    def take(self, pid):
        (self.path / "cgroup.procs").write_text(str(pid))

    def remove(self, timeout_s=5):
        """Its processes may be ending."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            with contextlib.suppress(OSError):
                self.path.rmdir()
                return
            time.sleep(0.1)
        self.path.rmdir()
