# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Runs in a guest: writes, reads, flushes, discards and zeroes a disk, and knows what it must hold.

usage: blk_work.py DEVICE SECONDS THREADS SEED

Each thread has a part of the disk for itself, and a copy of it in memory. Requests are O_DIRECT, of one to 512
sectors. The last line is the SHA-256 of all parts as they must be, which the disk was read against once more.
"""

import fcntl
import hashlib
import mmap
import os
import random
import struct
import sys
import threading
import time

BLKDISCARD, BLKZEROOUT = 0x1277, 0x127f
SECTOR, PART, MOST = 512, 4 << 20, 512
POOL = random.Random(1).randbytes(1 << 20)


class Part:
    def __init__(self, path, number, seed):
        self.fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        self.at, self.random = number * PART, random.Random(seed * 1000 + number)
        self.model = bytearray(PART)
        self.counts = dict.fromkeys(("write", "read", "zero", "discard", "flush"), 0)
        self.error = None

    def span(self, align=1):
        """Offset and length in bytes of a request; many are short, some long."""
        most = self.random.choice((1, 8, 8, 64, MOST)) * align
        sectors = self.random.randrange(align, most + 1, align)
        return self.random.randrange(0, PART // SECTOR - sectors + 1, align) * SECTOR, sectors * SECTOR

    def write(self):
        offset, size = self.span()
        start = self.random.randrange(len(POOL) - size)
        data = mmap.mmap(-1, size)
        data[:] = POOL[start:start + size]
        if os.pwrite(self.fd, data, self.at + offset) != size:
            raise OSError("a short write")
        self.model[offset:offset + size] = data[:]

    def read(self):
        offset, size = self.span()
        self.compare(offset, size)

    def compare(self, offset, size):
        data = mmap.mmap(-1, size)
        if os.preadv(self.fd, [data], self.at + offset) != size:
            raise OSError("a short read")
        if data[:] != self.model[offset:offset + size]:
            bad = next(i for i in range(0, size, SECTOR) if data[i:i + SECTOR] != self.model[offset + i:offset + i + SECTOR])
            raise OSError(f"sector {(self.at + offset + bad) // SECTOR} is not what was written: {data[bad:bad + 16].hex()}")

    def zero(self):
        offset, size = self.span()
        fcntl.ioctl(self.fd, BLKZEROOUT, struct.pack("QQ", self.at + offset, size))
        self.model[offset:offset + size] = bytes(size)

    def discard(self):
        """What a discarded sector holds nobody knows: it is written at once."""
        offset, size = self.span(8)
        fcntl.ioctl(self.fd, BLKDISCARD, struct.pack("QQ", self.at + offset, size))
        data = mmap.mmap(-1, size)
        if os.pwrite(self.fd, data, self.at + offset) != size:
            raise OSError("a short write")
        self.model[offset:offset + size] = bytes(size)

    def flush(self):
        os.fsync(self.fd)

    def work(self, until_s):
        try:
            os.pwrite(self.fd, mmap.mmap(-1, PART), self.at)
            while time.monotonic() < until_s:
                name = self.random.choice(("write",) * 8 + ("read",) * 8 + ("zero", "discard", "flush"))
                getattr(self, name)()
                self.counts[name] += 1
            self.compare(0, PART)
        except Exception as error:  # said by the main thread
            self.error = error


def main(path, seconds, threads, seed):
    until_s = time.monotonic() + float(seconds)
    parts = [Part(path, number, int(seed)) for number in range(int(threads))]
    workers = [threading.Thread(target=part.work, args=(until_s,)) for part in parts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    errors = [str(part.error) for part in parts if part.error]
    if errors:
        sys.exit("; ".join(errors))
    os.fsync(parts[0].fd)
    print({name: sum(part.counts[name] for part in parts) for name in parts[0].counts})
    print(hashlib.sha256(b"".join(part.model for part in parts)).hexdigest())


main(*sys.argv[1:])
