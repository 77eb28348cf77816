# SPDX-License-Identifier: BSD-2-Clause-Patent
"""A link between two sides of a migration that can be cut: a relay between two unix sockets."""

import contextlib
import os
import select
import socket
import threading


class Relay:
    """Connections to `near` are carried on to `far`. cut(): those that are there end, and new ones are refused, until
    mend()."""

    def __init__(self, near, far):
        self.near, self.far = str(near), str(far)
        self.whole, self.ended = True, False
        self.bytes_back = 0  # from the far side
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(self.near)
        self.listener.listen(4)
        self.pairs = []
        threading.Thread(target=self._serve, daemon=True).start()

    def cut(self):
        self.whole = False
        for pair in self.pairs:
            for one in pair:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def mend(self):
        self.whole = True

    def close(self):
        self.ended = True
        self.cut()
        self.listener.close()
        with contextlib.suppress(OSError):
            os.unlink(self.near)

    def _serve(self):
        while not self.ended:
            try:
                one, _ = self.listener.accept()
            except OSError:
                return
            other = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                if not self.whole:
                    raise OSError
                other.connect(self.far)
            except OSError:
                one.close()
                other.close()
                continue
            self.pairs.append((one, other))
            threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one, other):
        ends = {one: other, other: one}
        try:
            while self.whole:
                for ready in select.select(list(ends), [], [], 0.2)[0]:
                    data = ready.recv(1 << 16)
                    if not data:
                        return
                    ends[ready].sendall(data)
                    self.bytes_back += len(data) if ready is other else 0
        except OSError:
            pass
        finally:
            one.close()
            other.close()
