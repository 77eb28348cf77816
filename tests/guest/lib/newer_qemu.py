# SPDX-License-Identifier: BSD-2-Clause-Patent
"""A QEMU beside the system's: the program that LATENT_QEMU names, or that of Debian's backports if tests/kvm/nested has
unpacked it. Nothing is downloaded here."""

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

from . import vm
from .agent import GuestError

# `qemu` and `env` are for vm.VM, `words` for its `extra`.
Qemu = namedtuple("Qemu", "qemu words env version")
WHY_NOT = ("there is no other QEMU: tests/kvm/nested build unpacks that of Debian's backports, or LATENT_QEMU may name "
           "a qemu-system-x86_64")


def find():
    """A Qemu, or None (WHY_NOT says why)."""
    named = os.environ.get("LATENT_QEMU")
    program, words, env = ([named], [], {}) if named else ([], [], {})
    if not named:
        nested = _nested()
        if not nested.emulator_dir().exists():
            return None
        program, env = nested.emulator()  # there: nothing is made
        program, words = program[:1], program[1:]
    return Qemu(program[0], words, env, _version(program[0], env))


def _nested():
    loader = importlib.machinery.SourceFileLoader("nested", str(Path(vm.SOURCE_DIR) / "tests/kvm/nested"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("nested", loader))
    sys.dont_write_bytecode = True
    loader.exec_module(module)
    return module


def _version(program, env):
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True, env=dict(os.environ, **env))
    except (OSError, subprocess.CalledProcessError) as error:
        raise GuestError(f"{program} does not run: {error}") from error
    return done.stdout.splitlines()[0].removeprefix("QEMU emulator version ")
