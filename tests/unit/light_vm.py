# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Two places for the cheapest VM that can be migrated: QEMU with a processor that is halted by its first instruction.

LATENT_BUILD is meson's build directory.
"""

import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import tempfile
import time

BUILD = pathlib.Path(os.environ.get("LATENT_BUILD", pathlib.Path(__file__).resolve().parents[2] / "build"))
LATENT, QEMU = BUILD / "latent", "qemu-system-x86_64"
TIMEOUT_S = 60
SKIPPED = 77
HALT, BIOS_BYTES, IMAGE_BYTES = b"\xf4", 1 << 16, 1 << 20

failures = []


def check(holds, what):
    if not holds:
        failures.append(what)
        print(f"not so: {what}", flush=True)


class Place:
    """Where the VM may be: its name there."""

    def __init__(self, name, directory):
        self.name, self.directory = name, directory
        self.socket = directory / f"{name}.sock"
        self.disk = directory / "disk.qcow2"
        self.process = None
        self.log = open(directory / f"{name}.log", "ab")

    def line(self):
        return [QEMU, "-machine", "q35", "-m", "64", "-bios", f"{self.directory}/bios", "-nodefaults", "-display", "none", "-vga", "none",
                "-qmp", f"unix:{self.directory}/{self.name}.qmp,server=on,wait=off",
                "-drive", f"file={self.disk},if=none,id=disk", "-device", "virtio-blk-pci,drive=disk"]

    def is_running(self):
        answer = self.qmp("query-status")
        return bool(answer) and answer["return"]["running"]

    def run(self):
        self.process = subprocess.Popen([LATENT, "run", "--name", self.name, "--", *self.line()], stdin=subprocess.DEVNULL,
                                        stdout=self.log, stderr=self.log)
        deadline_s = time.monotonic() + TIMEOUT_S
        while not self.qmp("query-status"):
            check(time.monotonic() < deadline_s, "QEMU starts")
            time.sleep(0.05)

    def qmp(self, command, arguments=None):
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(TIMEOUT_S)
                connection.connect(str(self.directory / f"{self.name}.qmp"))
                stream = connection.makefile("rw")
                stream.readline()
                for message in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments or {}}):
                    stream.write(json.dumps(message) + "\n")
                    stream.flush()
                    while "event" in (answer := json.loads(stream.readline() or "{}")):
                        pass
                return answer
        except (OSError, ValueError):
            return None

    def start(self, *words, fault=None, path=None):
        """`path`: where programs are looked for first."""
        environment = dict(os.environ, **({"LATENT_FAULT": fault} if fault else {}),
                           **({"PATH": f"{path}:{os.environ['PATH']}"} if path else {}))
        return subprocess.Popen([LATENT, *map(str, words)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, env=environment)

    def receive(self, fault=None):
        process = self.start("receive", "--json", "--listen", f"unix:{self.socket}", "--name", self.name, "--",
                             *self.line(), fault=fault)
        process.stdout.readline()
        return process

    def receive_again(self):
        return self.start("receive", "--resume", self.name, "--listen", f"unix:{self.socket}")

    def migrate(self, there, *options, fault=None, by=None):
        return self.start("migrate", *options, self.name, f"unix:{by or there.socket}", fault=fault)


def alive():
    answer = subprocess.run([LATENT, "ps", "--json"], capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    return [vm["name"] for vm in json.loads(answer.stdout)]


def migration(place):
    """What `latent stat` says of it."""
    answer = subprocess.run([LATENT, "stat", place.name, "--json"], capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    return json.loads(answer.stdout)["migration"]


def end_of(process, what):
    try:
        _, said = process.communicate(timeout=TIMEOUT_S)
        if process.returncode:
            print(f"  {process.args[1]} ended with {process.returncode}: {said.strip()}")
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        check(False, f"{what} ends")
    return process.returncode


def one_is_left(what):
    """Its name; both may be there for a moment."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while len(names := alive()) != 1 and time.monotonic() < deadline_s:
        time.sleep(0.1)
    check(len(names) == 1, f"{what}: one VM is left, and not {names}")
    return names[0] if len(names) == 1 else "one"


def left_at(places, stands, what):
    left = places[[place.name for place in places].index(one_is_left(what))]
    check(left.is_running() != stands, f"{what}: it {'stands' if stands else 'runs'}")
    return left


def end_what_is_left(places):
    for place in places:
        place.qmp("quit")


@contextlib.contextmanager
def two_places():
    """The VM is in none of them yet; at the end it is in none. None: there is no QEMU here."""
    if shutil.which(QEMU) is None:
        print(f"{QEMU} is not installed")
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="latent-light-") as directory:
        directory = pathlib.Path(directory)
        (directory / "run").mkdir(mode=0o700)
        os.environ["LATENT_RUNTIME_DIR"] = str(directory / "run")
        (directory / "image.raw").write_bytes(os.urandom(IMAGE_BYTES))
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", directory / "image.raw", "-F", "raw",
                        directory / "disk.qcow2"], check=True)
        (directory / "bios").write_bytes(HALT * BIOS_BYTES)
        places = [Place(name, directory) for name in ("one", "two")]
        try:
            yield places
        finally:
            end_what_is_left(places)
            if failures:
                for place in places:
                    print((directory / f"{place.name}.log").read_text()[-2000:])
