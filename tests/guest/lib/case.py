# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Scaffolding for a test that is one executable.

    from lib import case

    def body(test):
        test.check(1 + 1 == 2, "one and one is two")

    case.main("What this test proves, in a sentence.", body, timeout_s=120)

Exit status: 0 passed, 1 failed, 3 a check was not so, 4 guests were lost before anything was tried
(vm.EmulatorError), 77 skipped (test.skip("why")). What the machine keeps a
test from trying, the rest being tried, is said by test.not_tried(). A failure leaves
the VMs' files and prints their logs and a command that repeats the test; at the
timeout the state of every VM and Python stack is dumped first.
"""

import faulthandler
import os
import shlex
import signal
import sys
import time
import traceback

from . import vm
from .agent import CommandFailed
from .vm import Skip

EXIT_PASSED, EXIT_FAILED, EXIT_NOT_SO, EXIT_LOST, EXIT_SKIPPED = 0, 1, 3, 4, 77
DUMP_MAX_S = 30


class Failed(Exception):
    pass


class Timeout(BaseException):  # passes through `except Exception` in a test's body
    pass


class Test:
    def __init__(self):
        self.started_s = time.monotonic()
        self.n_checks = 0

    def say(self, text):
        print(f"[{time.monotonic() - self.started_s:6.1f} s] {text}", flush=True)

    def check(self, condition, what):
        if not condition:
            raise Failed(f"not so: {what}")
        self.n_checks += 1
        self.say(f"ok: {what}")

    def check_equal(self, found, expected, what):
        if found != expected:
            raise Failed(f"not so: {what}\n  found    {found!r:.500}\n  expected {expected!r:.500}")
        self.n_checks += 1
        self.say(f"ok: {what}")

    def skip(self, reason):
        raise Skip(reason)

    def not_tried(self, what):
        """A part of the test cannot be tried on this machine; `what` says why. scripts/check counts it."""
        print(f"[  SKIPPED ] {what}", flush=True)

    def need_latent(self):
        """Skips unless the `latent` command was built."""
        if not os.access(vm.BUILD_DIR / "latent", os.X_OK):
            raise Skip("latent is not built (LATENT_BUILD names the build directory)")

    def time(self, what):
        """with test.time("boot") as t: ...; t.seconds afterwards, and a line printed."""
        return _Timer(self, what)


class _Timer:
    def __init__(self, test, what):
        self.test, self.what, self.seconds = test, what, None

    def __enter__(self):
        self.started_s = time.monotonic()
        return self

    def __exit__(self, error_type, error, trace):
        self.seconds = time.monotonic() - self.started_s
        if error_type is None:
            self.test.say(f"{self.what}: {self.seconds:.2f} s")


def main(proves, body, timeout_s=120):
    """Runs body(test) and ends the process with the test's exit status."""
    print(f"{os.path.basename(sys.argv[0])}: {proves}", flush=True)
    test = Test()
    # Images may have to be built first, which takes its own time.
    vm.images_dir()
    signal.signal(signal.SIGTERM, _on_sigterm)
    signal.signal(signal.SIGALRM, lambda *_: _on_timeout(timeout_s))
    signal.alarm(timeout_s)
    sys.exit(_run(test, body))


def _run(test, body):
    try:
        body(test)
    except Skip as skip:
        print(f"skipped: {skip}")
        return EXIT_SKIPPED
    except (Exception, Timeout) as error:
        _report_failure(error)
        # A command that fails in the guest has found something wrong there (its memory, two files that differ).
        return EXIT_NOT_SO if isinstance(error, (Failed, CommandFailed)) else EXIT_LOST if isinstance(error, vm.EmulatorError) else EXIT_FAILED
    finally:
        signal.alarm(0)
    print(f"passed: {test.n_checks} checks in {time.monotonic() - test.started_s:.1f} s")
    return EXIT_PASSED


def _report_failure(error):
    if not isinstance(error, (Failed, Timeout)):
        traceback.print_exc()
    for left in list(vm.live_vms):
        left.diagnose()
        left.close(keep_files=True)
    print(f"FAILED: {error}\nrepeat with: {repeat_command()}", file=sys.stderr)


def repeat_command():
    script = os.path.relpath(sys.argv[0], vm.SOURCE_DIR)
    settings = [f"{key}={shlex.quote(value)}" for key, value in sorted(os.environ.items())
                if key.startswith("LATENT_")]
    return " ".join([*settings, script, *map(shlex.quote, sys.argv[1:])])


def _on_timeout(timeout_s):
    # A second alarm must not find us still dumping: it ends the process.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(DUMP_MAX_S)
    faulthandler.dump_traceback()
    for left in list(vm.live_vms):
        left.diagnose()
    raise Timeout(f"not finished after {timeout_s} s")


def _on_sigterm(*_):
    sys.exit(EXIT_FAILED)  # atexit ends the VMs
