# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Lines of progress and plain tables, for people."""

import sys
import time

WIDTH = 100


class Progress:
    """Lines with the seconds since the start, and a changing line while something runs.

    On a terminal the changing line is drawn over itself; elsewhere it is printed every 5 seconds.
    """

    QUIET_S = 5.0
    TERMINAL_QUIET_S = 0.2

    def __init__(self, stream=None):
        self.stream = stream or sys.stdout
        self.terminal = self.stream.isatty()
        self.started_s = self.last_s = time.monotonic()
        self.drawn = False

    def elapsed_s(self):
        return time.monotonic() - self.started_s

    def say(self, text=""):
        """A line that stays."""
        self._clear()
        for line in text.split("\n"):
            print(f"[{self.elapsed_s():6.1f} s] {line}".rstrip(), file=self.stream, flush=True)
        self.last_s = time.monotonic()

    def show(self, text):
        """Lines as they are (a table)."""
        self._clear()
        print(text, file=self.stream, flush=True)

    def tick(self, text):
        """What is going on: call it often."""
        now_s = time.monotonic()
        if now_s - self.last_s < (self.TERMINAL_QUIET_S if self.terminal else self.QUIET_S):
            return
        line = f"[{self.elapsed_s():6.1f} s]   {text}"[:WIDTH]
        if self.terminal:
            print("\r" + line.ljust(WIDTH), end="", file=self.stream, flush=True)
            self.drawn = True
        else:
            print(line, file=self.stream, flush=True)
        self.last_s = now_s

    def _clear(self):
        if self.drawn:
            print("\r" + " " * WIDTH + "\r", end="", file=self.stream)
            self.drawn = False


def table(headers, rows):
    """Columns of text: the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in [headers, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]

    def line(row):
        return "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])

    return "\n".join([line(cells[0]), "  ".join("-" * w for w in widths), *map(line, cells[1:])])


def mib(kib):
    return f"{kib / 1024:.0f}"
