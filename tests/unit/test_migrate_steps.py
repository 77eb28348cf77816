#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""A mover of a migration is killed at each of its steps, on each side: afterwards there is one VM, here or there, as soon as
who is left has had its say, or another mover has taken the dead one's place; and it can be moved again.

The VM is QEMU with a processor that is halted by its first instruction. It runs, and then, for the steps around the token,
stands. LATENT_BUILD is meson's build directory; arguments: steps to try, as source:3.
"""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

BUILD = pathlib.Path(os.environ.get("LATENT_BUILD", pathlib.Path(__file__).resolve().parents[2] / "build"))
LATENT, QEMU = BUILD / "latent", "qemu-system-x86_64"
TIMEOUT_S = 60
STEPS_MAX = 30
KILLED = -signal.SIGKILL
BEFORE_CONNECTING = 1
AROUND_THE_TOKEN = [f"{side}:{step}" for side in ("source", "destination") for step in (6, 7, 8)]
HALT, BIOS_BYTES = b"\xf4", 1 << 16
SKIPPED = 77

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
        self.log = open(directory / f"{name}.log", "ab")

    def line(self):
        return [QEMU, "-machine", "q35", "-m", "64", "-bios", f"{self.directory}/bios", "-nodefaults", "-display", "none", "-vga", "none",
                "-qmp", f"unix:{self.directory}/{self.name}.qmp,server=on,wait=off",
                "-drive", f"file={self.directory}/disk.qcow2,if=none,id=disk", "-device", "virtio-blk-pci,drive=disk"]

    def is_running(self):
        answer = self.qmp("query-status")
        return bool(answer) and answer["return"]["running"]

    def run(self):
        subprocess.Popen([LATENT, "run", "--name", self.name, "--", *self.line()], stdin=subprocess.DEVNULL, stdout=self.log,
                         stderr=self.log)
        deadline_s = time.monotonic() + TIMEOUT_S
        while not self.qmp("query-status"):
            check(time.monotonic() < deadline_s, "QEMU starts")
            time.sleep(0.05)

    def qmp(self, command):
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(TIMEOUT_S)
                connection.connect(str(self.directory / f"{self.name}.qmp"))
                stream = connection.makefile("rw")
                stream.readline()
                for name in ("qmp_capabilities", command):
                    stream.write(json.dumps({"execute": name}) + "\n")
                    stream.flush()
                    while "event" in (answer := json.loads(stream.readline() or "{}")):
                        pass
                return answer
        except (OSError, ValueError):
            return None

    def start(self, *words, fault=None):
        environment = dict(os.environ, LATENT_FAULT=fault) if fault else None
        return subprocess.Popen([LATENT, *map(str, words)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, env=environment)

    def receive(self, fault=None):
        process = self.start("receive", "--json", "--listen", f"unix:{self.socket}", "--name", self.name, "--",
                             *self.line(), fault=fault)
        process.stdout.readline()
        return process

    def receive_again(self):
        return self.start("receive", "--resume", self.name, "--listen", f"unix:{self.socket}")

    def migrate(self, there, *options, fault=None):
        return self.start("migrate", *options, self.name, f"unix:{there.socket}", fault=fault)


def alive():
    answer = subprocess.run([LATENT, "ps", "--json"], capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    return [vm["name"] for vm in json.loads(answer.stdout)]


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


def try_step(places, here, stands, side, step):
    """Returns where it is then, and whether there was such a step."""
    there = places[1 - places.index(here)]
    if stands:
        for command in ("cont", "stop"):  # QEMU saves the devices of a VM that stands only once
            here.qmp(command)
    what = f"{'stands' if stands else 'runs'}, {side}'s mover killed at step {step}"
    fault = f"migrate_step:{step}:KILL"
    receiver = there.receive(fault if side == "destination" else None)
    sender = here.migrate(there, fault=fault if side == "source" else None)
    victim, other = (sender, receiver) if side == "source" else (receiver, sender)
    if end_of(victim, what) != KILLED:
        end_of(other, what)
        return left_at(places, stands, what), False
    time.sleep(0.3)  # the other one hears of it
    if side == "source" and step == BEFORE_CONNECTING:
        other.terminate()  # it has heard of nobody yet
    if side == "source" and is_given(here):
        victim = here.migrate(there, "--resume")
    elif side == "destination" and there.name in alive() and (run_dir(there) / "migration").exists():
        victim = there.receive_again()
    if victim.returncode is None:
        end_of(victim, f"{what}, the next one")
    end_of(other, f"{what}, the other one")
    left = left_at(places, stands, what)
    print(f"{what}: it is {'where it was' if left is here else 'moved'}", flush=True)
    return left, True


def is_given(place):
    """The VM there was given away; what has been begun only is over with its mover."""
    record = run_dir(place) / "migration"
    return place.name in alive() and record.exists() and record.read_bytes()[8] == 1  # src/migrate/record.h


def run_dir(place):
    return pathlib.Path(os.environ["LATENT_RUNTIME_DIR"]) / place.name


def try_all(places, here, stands, chosen):
    for side in ("source", "destination"):
        for step in range(1, STEPS_MAX):
            if chosen and f"{side}:{step}" not in chosen:
                continue
            here, killed = try_step(places, here, stands, side, step)
            if not killed:
                check(step > 8 or chosen, f"the {side} has more steps than {step - 1}")
                break
            if failures:
                return here
    return here


def try_both(places, chosen):
    here = places[0]
    here.run()
    here = try_all(places, here, False, chosen)
    if not failures:
        here = try_all(places, here, True, chosen or AROUND_THE_TOKEN)
    if failures:
        return
    there = places[1 - places.index(here)]
    here.qmp("cont")
    receiver = there.receive()
    check(end_of(here.migrate(there), "the last one") == 0 and end_of(receiver, "the last one") == 0, "it is moved after all")
    check(not list(here.directory.glob("disk.qcow2.latent-*")), "no ballot is left")


def end_what_is_left(places):
    for place in places:
        place.qmp("quit")


def main():
    if shutil.which(QEMU) is None:
        print(f"{QEMU} is not installed")
        return SKIPPED
    with tempfile.TemporaryDirectory(prefix="latent-steps-") as directory:
        directory = pathlib.Path(directory)
        (directory / "run").mkdir(mode=0o700)
        os.environ["LATENT_RUNTIME_DIR"] = str(directory / "run")
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", directory / "disk.qcow2", "16M"], check=True)
        (directory / "bios").write_bytes(HALT * BIOS_BYTES)
        places = [Place(name, directory) for name in ("one", "two")]
        try:
            try_both(places, sys.argv[1:])
        finally:
            end_what_is_left(places)
            if failures:
                for place in places:
                    print((directory / f"{place.name}.log").read_text()[-2000:])
    return 1 if failures else 0


sys.exit(main())
