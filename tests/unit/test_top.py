#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""`latent top` gives the terminal back, whatever ends it; it and `latent heat` refuse what makes no sense.

The VMs here are of the cheapest kind (tests/fuzz/fuzz_vmm_qemu.c); tests/guest/activity.py has a real one.
"""

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time

import cheap
from cheap import IMAGE_PAGES, LATENT, TIMEOUT_S, check, latent

OK, USAGE, NO_VM, SYSTEM, NO_ANSWER = 0, 64, 67, 71, 75  # src/cli/cli.h
# What a terminal is told to show the other screen, and that it is the usual one again (xterm).
OTHER_SCREEN, USUAL_SCREEN = b"\x1b[?1049h", b"\x1b[?1049l"
UP, DOWN = b"\x1bOA", b"\x1bOB"

class Terminal:
    """`latent top` on a terminal of its own."""

    def __init__(self, *options, term="xterm-256color", rows=24, columns=80):
        self.master, self.slave = pty.openpty()
        self.resize(rows, columns)
        self.before = termios.tcgetattr(self.slave)
        self.text = b""
        self.process = subprocess.Popen([LATENT, "top", *options], stdin=self.slave, stdout=self.slave,
                                        stderr=subprocess.PIPE, env=dict(os.environ, TERM=term), start_new_session=True,
                                        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))

    def resize(self, rows, columns):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read(self, seconds):
        if not select.select([self.master], [], [], seconds)[0]:
            return False
        try:
            self.text += os.read(self.master, 65536)
        except OSError:
            return False
        return True

    def wait_text(self, wanted):
        deadline_s = time.monotonic() + TIMEOUT_S
        while wanted not in self.text and time.monotonic() < deadline_s and self.process.poll() is None:
            self.read(0.1)
        return wanted in self.text

    def keys(self, keys):
        self.text = b""
        os.write(self.master, keys)

    def wait_end(self):
        """The exit status; None: it goes on."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while self.process.poll() is None and time.monotonic() < deadline_s:
            self.read(0.05)
        while self.read(0):
            pass
        return self.process.poll()

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stderr.close()
        for fd in (self.master, self.slave):
            if fd >= 0:
                os.close(fd)


class VM(cheap.VM):
    def scan(self):
        return self.stat()["scan"]

    def wait_passes(self, count):
        deadline_s = time.monotonic() + TIMEOUT_S
        while self.scan()["passes"] < count and time.monotonic() < deadline_s:
            time.sleep(0.05)


def check_ends(what, end, *options):
    """Whatever ends it: the terminal is as it was."""
    terminal = Terminal(*options)
    try:
        check(terminal.wait_text(b"NAME"), f"{what}: it shows headings: {terminal.text!r}")
        check(OTHER_SCREEN in terminal.text, f"{what}: it uses the other screen")
        check(end is None or termios.tcgetattr(terminal.slave) != terminal.before, f"{what}: it reads single keys")
        if end is not None:
            end(terminal)
        check(terminal.wait_end() == OK, f"{what}: status {terminal.process.poll()}")
        check(termios.tcgetattr(terminal.slave) == terminal.before, f"{what}: the terminal's modes are as they were")
        check(USUAL_SCREEN in terminal.text, f"{what}: the usual screen is back: {terminal.text!r}")
    finally:
        terminal.close()


def check_all_ends():
    check_ends("q", lambda terminal: terminal.keys(b"q"))
    check_ends("Ctrl-C", lambda terminal: terminal.keys(b"\x03"))
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        check_ends(number.name, lambda terminal, number=number: terminal.process.send_signal(number))
    check_ends("-n", None, "-n", "2", "-d", "0.3")


def check_hangup():
    """The terminal's other end goes: it does not stay behind, nor turn in circles."""
    terminal = Terminal()
    try:
        check(terminal.wait_text(b"NAME"), "hang-up: it shows headings")
        os.close(terminal.slave)
        os.close(terminal.master)
        terminal.slave = terminal.master = -1
        try:
            terminal.process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            check(False, "it goes on without a terminal")
    finally:
        terminal.close()


def check_keys():
    terminal = Terminal()
    try:
        check(terminal.wait_text(b"SCAN"), "80 columns: the last figure is shown")
        check(b"MASK" not in terminal.text, "80 columns: MASK is not")
        terminal.keys(b"h")
        check(terminal.wait_text(b"Press any key"), "h: help")
        terminal.keys(b" ")
        check(terminal.wait_text(b"NAME"), "back from help")
        terminal.keys(b"d9999999\n")
        check(terminal.wait_text(b"a delay is from"), f"an absurd delay is refused: {terminal.text!r}")
        terminal.keys(b"d0.2\n")
        terminal.keys(UP + DOWN + b"PMNsx")  # with no VM there is none to select or scan
        terminal.text = b""
        terminal.resize(10, 132)
        check(terminal.wait_text(b"MASK"), f"132 columns: all is shown: {terminal.text!r}")
        for rows, columns in ((1, 1), (2, 300), (3, 5), (24, 80)):
            terminal.resize(rows, columns)
            terminal.read(0.3)
            check(terminal.process.poll() is None, f"it lives in {rows} rows and {columns} columns")
        terminal.keys(b"q")
        check(terminal.wait_end() == OK, "q ends it then")
    finally:
        terminal.close()


def check_refusals():
    for words in (["-n", "0"], ["-n", "-1"], ["-n", "many"], ["-d", "0"], ["-d", "1e9"], ["-d", "nan"], ["vm"], ["-x"], []):
        done = latent("top", *words)
        check(done.returncode == USAGE and len(done.stderr.splitlines()) == 1 and not done.stdout,
              f"top {' '.join(words)}: {done.returncode}, {done.stderr!r}")
    for words in ([], ["vm", "--width", "0"], ["vm", "--width", "-1"], ["vm", "--width", "1e3"], ["vm", "--png"],
                  ["vm", "--width", "99999999999999999999"], ["vm", "vm2"]):
        done = latent("heat", *words)
        check(done.returncode == USAGE and len(done.stderr.splitlines()) == 1,
              f"heat {' '.join(words)}: {done.returncode}, {done.stderr!r}")
    check(latent("heat", "nobody").returncode == NO_VM, "heat of a VM that is not there")
    terminal = Terminal(term="no-such-terminal")
    try:
        check(terminal.wait_end() == USAGE, "an unknown terminal is refused")
        check(termios.tcgetattr(terminal.slave) == terminal.before, "and left alone")
    finally:
        terminal.close()


def check_batch():
    done = latent("top", "-b", "-n", "2", "-d", "0.1")
    check(done.returncode == OK and done.stdout.count("NAME ") == 2 and done.stdout.count("0 VMs") == 2,
          f"batch mode with no VM: {done.stdout!r} {done.stderr!r}")


def check_map(vm, directory):
    done = latent("heat", vm.name)
    check(done.returncode == NO_ANSWER and f"latent scan {vm.name} --period 10s" in done.stderr,
          f"nothing to draw: {done.returncode}, {done.stderr!r}")
    latent("scan", vm.name, "--period", "100ms")
    vm.wait_passes(9)  # nothing changes any more: all is frozen
    latent("scan", vm.name, "off")
    found = json.loads(latent("heat", vm.name, "--json").stdout)
    cells = [cell for block in found["blocks"] for cell in block["cells"]]
    check(sum(map(sum, cells)) == cheap.RAM_MIB * cheap.PAGES_PER_MIB == found["pages"], f"{sum(map(sum, cells))} pages in cells")
    for number, name in enumerate(found["cell"]):
        in_all = sum(by_class[name] for by_class in found["pages_now"].values())
        check(sum(cell[number] for cell in cells) == in_all == vm.scan()["pages_now"][name], f"{name}: {in_all} pages")
    by_source = {source: sum(by_class.values()) for source, by_class in found["pages_now"].items()}
    check(by_source["overlay"] == IMAGE_PAGES, f"pages of the image are {by_source}")
    for width in ("16", "100", "1024"):
        rows = [line.split("|")[1] for line in latent("heat", vm.name, "--width", width).stdout.splitlines()
                if line.count("|") == 2]
        check(rows and all(len(row) <= int(width) for row in rows) and len(rows) <= 32, f"{len(rows)} rows of {width}")
    picture = directory / "heat.png"
    check(latent("heat", vm.name, "--png", picture).returncode == OK, "a picture")
    check(picture.read_bytes()[-8:-4] == b"IEND", "it is whole")
    for target in (directory / "missing" / "heat.png", directory, "/dev/null", "x" * 300):
        done = latent("heat", vm.name, "--png", target)
        check(done.returncode == SYSTEM and len(done.stderr.splitlines()) == 1, f"--png {target}: {done.stderr!r}")
    check([path.name for path in directory.glob("heat*")] == ["heat.png"], "nothing else is left")


def check_watch(directory):
    """`latent stat --watch` ends with its VM, also when another one takes the name at once."""
    old = VM("again", directory)
    watch = subprocess.Popen([LATENT, "stat", "again", "--json", "--watch", "0.3"], stdout=subprocess.PIPE, text=True)
    try:
        check(json.loads(watch.stdout.readline())["pid"] == old.process.pid, "stat --watch shows the VM")
        old.kill()
        new = VM("again", directory)
        try:
            pids = {json.loads(line)["pid"] for line in watch.stdout}
            check(watch.wait(TIMEOUT_S) in (OK, NO_ANSWER), f"stat --watch ends: {watch.returncode}")
            check(new.process.pid not in pids, "and has nothing to do with the new one")
        finally:
            new.close()
    finally:
        watch.kill()
        watch.wait()
        watch.stdout.close()
        old.close()


def check_with_vms(directory):
    one, two = VM("one", directory), VM("two", directory)
    terminal = Terminal("-d", "0.2")
    try:
        check_map(one, directory)
        check(terminal.wait_text(b"two"), f"both VMs are shown: {terminal.text!r}")
        terminal.keys(b"N" + DOWN + DOWN + UP + b"s0\n")  # the later one has the higher process id: it is the first
        check(terminal.wait_text(b"a period is a time"), f"a period of 0 is refused: {terminal.text!r}")
        terminal.keys(b"s300ms\n")
        check(terminal.wait_text(b"two: looked at"), f"two is looked at: {terminal.text!r}")
        check(two.scan()["shortest_us_now"] == 300000, f"with that period: {two.scan()['shortest_us_now']}")
        terminal.keys(b"soff\n")
        check(terminal.wait_text(b"no more"), f"and no more: {terminal.text!r}")
        check(two.scan()["period_us_now"] == 0, "the scan is off")
        terminal.keys(b"sjunk\x7f\x1b")  # Esc: nothing happens
        two.kill()
        check(terminal.wait_text(b"1 VM,"), f"one is left: {terminal.text!r}")
        one.kill()
        check(terminal.wait_text(b"0 VMs"), f"none is left: {terminal.text!r}")
        terminal.keys(b"q")
        check(terminal.wait_end() == OK and termios.tcgetattr(terminal.slave) == terminal.before, "q ends it then")
    finally:
        terminal.close()
        one.close()
        two.close()


def body(directory):
    check_with_vms(directory)
    check_watch(directory)
    check_refusals()
    check_batch()
    check_all_ends()
    check_hangup()
    check_keys()


if __name__ == "__main__":
    cheap.main(body, cheap.VMM)
