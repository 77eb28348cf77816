#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""A restore that fails removes the disks that it has made, and no older one, whatever process id that VM had."""

import json
import os
import pathlib
import re
import subprocess

import cheap
from cheap import check

FORMAT = (pathlib.Path(__file__).resolve().parents[2] / "src/snapshot/format.h").read_text()
PIDS = 400  # that a child may get


def manifest():
    """Of a VM with one disk; nothing else of the snapshot is looked at before the step that fails."""
    volume = {"path": "/nowhere", "bytes": 0, "fingerprint": "0" * 16, "dev": 0, "ino": 0, "mtime_ns": 0}
    layer = {**volume, "file": "disk0.0.qcow2", "format": "qcow2"}
    return {"format": "latent-snapshot", "version": int(re.search(r"SNAPSHOT_VERSION (\d+)", FORMAT)[1]), "name": "web",
            "qemu_version": "7.2", "created_unix_s": 0, "ram_bytes": 0, "state_bytes": 0, "state_digest": "0" * 16,
            "pages_digest": "0" * 16, "volumes": [], "disks": [{"drive": "root", "bytes": 0, "layers": [layer]}]}


def failed_restore(snapshot, disks, *options):
    """Whoever watches it has ended, too: its output is this pipe. Before it there is a disk of its own process id."""
    script = 'echo older > "$0/web-root.$$.qcow2"; exec "$@"'
    return subprocess.run(["sh", "-c", script, disks, cheap.LATENT, "restore", "--name", "web", "--disks", disks, *options,
                           snapshot, "--", "qemu-system-x86_64"], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          check=False, timeout=cheap.TIMEOUT_S, env=dict(os.environ, LATENT_FAULT="restore_step:1:ENOMEM"))


def next_pids():
    """Those that are given out next, if nobody is in a hurry."""
    most = int(pathlib.Path("/proc/sys/kernel/pid_max").read_text())
    last = subprocess.Popen(["true"])
    last.wait()
    return [(last.pid + i) % most for i in range(PIDS)]


def body(directory):
    snapshot, disks = directory / "snapshot", directory / "disks"
    snapshot.mkdir()
    disks.mkdir()
    (snapshot / "manifest.json").write_text(json.dumps(manifest()))
    answer = failed_restore(snapshot, disks)
    check(answer.returncode and "on purpose" in answer.stderr, f"it fails: {answer.returncode} {answer.stderr}")
    check([path.read_text() for path in disks.iterdir()] == ["older\n"], "the disk of a VM of the same process id is there")
    older = {disks / f"web-{clone}-root.{pid}.qcow2" for clone in (1, 2) for pid in next_pids()}
    for path in older:
        path.write_text("older\n")
    answer = failed_restore(snapshot, disks, "--clones", "2")
    check(answer.returncode and "on purpose" in answer.stderr, f"clones fail: {answer.returncode} {answer.stderr}")
    check(older <= set(disks.iterdir()), f"clones: gone is {[path.name for path in older - set(disks.iterdir())]}")


if __name__ == "__main__":
    cheap.main(body)
