#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""tests/guest/two_guests.py, save_short.py and activity_short.py on real KVM: Debian guests in a nested machine.

What it needs is copied into a Debian 12 machine (Linux 6.1: no PAGEMAP_SCAN, the fallbacks run)
that an emulated processor with SVM runs; its kvm_amd runs the guests.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("LATENT_BUILD") or SOURCE / "build")
COMMANDS = ("LATENT_BUILD=/share/build build/latent doctor || true; "
            "{ build/tests/test_os && build/tests/test_ram || exit 3; } && "
            "export LATENT_BUILD=/share/build && "
            "python3 -B tests/guest/two_guests.py && python3 -B tests/guest/save_short.py && "
            "python3 -B tests/guest/activity_short.py")


def make_share(share):
    (share / "build/tests").mkdir(parents=True)
    for name in ("latent", "latent-qemu.so", "tests/test_os", "tests/test_ram"):
        shutil.copy2(BUILD / name, share / "build" / name)
    for folder in ("tests/guest", "tests/image"):
        shutil.copytree(SOURCE / folder, share / folder, ignore=shutil.ignore_patterns("__pycache__"))


def main():
    with tempfile.TemporaryDirectory(prefix="latent-share-") as share:
        make_share(Path(share))
        command = [SOURCE / "tests/kvm/nested", "run", "--share", share, "--timeout", "1000", "--",
                   "sh", "-c", COMMANDS]
        return subprocess.run(command, check=False).returncode


sys.exit(main())
