# SPDX-License-Identifier: BSD-2-Clause-Patent
"""A small QMP client: one command at a time; events are kept in a list."""

import json
import socket
import time


class QmpError(Exception):
    pass


class Qmp:
    def __init__(self, socket_path, timeout_s=20):
        self.events = []
        self.buffer = b""
        self.socket = connect(str(socket_path), timeout_s)
        self._receive(timeout_s)  # the greeting
        self.command("qmp_capabilities", timeout_s=timeout_s)

    def command(self, name, timeout_s=30, **arguments):
        """Sends a command and returns its result. `_` in argument names becomes `-`."""
        arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
        message = {"execute": name, "arguments": arguments}
        self.socket.sendall(json.dumps(message).encode() + b"\n")
        deadline_s = time.monotonic() + timeout_s
        while True:
            reply = self._receive(deadline_s - time.monotonic())
            if "event" in reply:
                self.events.append(reply)
            elif "error" in reply:
                raise QmpError(f"{name}: {reply['error'].get('desc')}")
            elif "return" in reply:
                return reply["return"]

    def wait_event(self, name, timeout_s=30):
        """The oldest such event, removed from the list; waits for one."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            for event in self.events:
                if event["event"] == name:
                    self.events.remove(event)
                    return event
            reply = self._receive(deadline_s - time.monotonic())
            if "event" in reply:
                self.events.append(reply)

    def hmp(self, line):
        return self.command("human-monitor-command", command_line=line)

    def close(self):
        self.socket.close()

    def _receive(self, timeout_s):
        while b"\n" not in self.buffer:
            self.socket.settimeout(max(timeout_s, 0.001))
            try:
                data = self.socket.recv(65536)
            except socket.timeout as error:
                raise QmpError("no answer on the QMP socket") from error
            if not data:
                raise QmpError("the QMP socket was closed")
            self.buffer += data
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)


def connect(socket_path, timeout_s):
    """Connects to a UNIX socket that is about to appear."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(socket_path)
            return sock
        except OSError as error:
            sock.close()
            if time.monotonic() > deadline_s:
                raise QmpError(f"{socket_path}: {error}") from error
            time.sleep(0.01)
