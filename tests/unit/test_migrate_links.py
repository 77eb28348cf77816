#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""The link of a migration is cut, or spoils a bit, after so many bytes in one direction, from the first to the last: afterwards
there is one VM, here or there, and it runs. It is whole again at once, and is spoilt once. A link that brings nothing for a
while, or little, is no reason to end: the VM is moved.

The VM is light_vm.py's. Arguments: what to try, as cut:there:1000.
"""

import contextlib
import os
import select
import socket
import sys
import threading
import time

from light_vm import SKIPPED, check, end_of, failures, left_at, two_places

POINTS = 9
SLOW_POINTS = 4
CHUNK_BYTES = 1 << 14
DELAY_S = 1.5                              # longer than a side is silent, and shorter than it may be
DROP_BYTES, DROP_S, DROPS = 128, 0.002, 250  # throttled: so many bytes at a time, with a pause, so often
NO_ANSWER = 75
NEVER = 1 << 62


class Relay:
    """Carries connections on, and does something to a byte on its way, once."""

    def __init__(self, near, far):
        self.near, self.far = str(near), str(far)
        self.how, self.where, self.at, self.drops = None, None, NEVER, 0
        self.carried = {"there": 0, "back": 0}
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.near)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(self.near)
        self.listener.listen(4)
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self):
        self.listener.close()

    def _serve(self):
        while True:
            try:
                one, _ = self.listener.accept()
                other = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                try:
                    other.connect(self.far)
                except OSError:
                    one.close()
                    other.close()
                    continue
            except OSError:
                return
            threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one, other):
        ways = {one: (other, "there"), other: (one, "back")}
        with one, other, contextlib.suppress(OSError):
            while True:
                for ready in select.select(list(ways), [], [])[0]:
                    to, where = ways[ready]
                    data = bytearray(ready.recv(CHUNK_BYTES))
                    if not data or not self._pass(data, to, where):
                        return

    def _pass(self, data, to, where):
        """False: it is cut."""
        at = self.at - self.carried[where]
        hit = where == self.where and at < len(data)
        self.carried[where] += len(data)
        if hit:
            self.at = NEVER
        if hit and self.how == "delay":
            time.sleep(DELAY_S)
        if hit and self.how == "throttle":
            self.drops = DROPS
        if hit and self.how == "spoil":
            data[at] ^= 1
        if hit and self.how == "cut":
            to.sendall(data[:at])
            return False
        while data and self.drops:
            to.sendall(data[:DROP_BYTES])
            del data[:DROP_BYTES]
            self.drops -= 1
            time.sleep(DROP_S)
        to.sendall(data)
        return True


def move(places, here, how, where, at):
    """Returns where it is then, and the bytes that went each way."""
    there = places[1 - places.index(here)]
    what = f"{how} {where} at byte {at}" if how else "whole"
    relay = Relay(here.directory / "relay.sock", there.socket)
    relay.how, relay.where, relay.at = how, where, at
    receiver = there.receive()
    sender = here.migrate(there, by=relay.near)
    status = end_of(sender, what)
    if status:
        receiver.terminate()  # it may not even have been called
    end_of(receiver, what)
    left = left_at(places, False, what)
    check(status in (0, NO_ANSWER) and (left is there) == (status == 0), f"{what}: the source says where it is")
    check(status == 0 or how in ("cut", "spoil"), f"{what}: it is moved")
    print(f"{what}: it is {'moved' if left is there else 'where it was'}", flush=True)
    relay.close()
    return left, relay.carried


def try_all(places, chosen):
    here = places[0]
    here.run()
    here, carried = move(places, here, None, None, NEVER)
    # (One migration is like the other to some bytes: the last points may lie behind its end.)
    points = [(how, where, step * carried[where] // steps)
              for how, steps in (("cut", POINTS), ("spoil", POINTS), ("delay", SLOW_POINTS), ("throttle", SLOW_POINTS))
              for where in ("there", "back") for step in range(steps + 1)]
    for how, where, at in points:
        if chosen and f"{how}:{where}:{at}" not in chosen:
            continue
        here, _ = move(places, here, how, where, at)
        if failures:
            return
    check(not list(here.directory.glob("disk.qcow2.latent-*")), "no ballot is left")


def main():
    with two_places() as places:
        if places is None:
            return SKIPPED
        try_all(places, sys.argv[1:])
    return 1 if failures else 0


sys.exit(main())
