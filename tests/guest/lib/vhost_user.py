# SPDX-License-Identifier: BSD-2-Clause-Patent
"""The smallest vhost-user back end that a vhost-user-blk device of QEMU starts with: an empty disk.

It answers no request of the guest and notes what it was given: `mem_tables` counts the memory
tables that came with descriptors. (QEMU, docs/interop/vhost-user.rst.)
"""

import os
import socket
import struct
import threading

HEADER = struct.Struct("<III")  # request, flags, payload bytes
VERSION, REPLY, NEED_REPLY = 1, 1 << 2, 1 << 3
GET_FEATURES, SET_MEM_TABLE, GET_VRING_BASE, GET_PROTOCOL_FEATURES, GET_CONFIG = 1, 5, 11, 15, 24
VIRTIO_F_VERSION_1, F_PROTOCOL_FEATURES, PROTOCOL_F_CONFIG = 1 << 32, 1 << 30, 1 << 9
CONFIG_HEADER_BYTES = 12


class BackEnd:
    def __init__(self, path):
        self.mem_tables = 0
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(path))
        self.listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self):
        self.listener.close()

    def _serve(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection):
        with connection:
            try:
                while self._message(connection):
                    pass
            except OSError:
                pass

    def _message(self, connection):
        header, fds, _, _ = socket.recv_fds(connection, HEADER.size, 16)
        for fd in fds:
            os.close(fd)
        if len(header) < HEADER.size:
            return False
        request, flags, size = HEADER.unpack(header)
        payload = b""
        while len(payload) < size:
            payload += connection.recv(size - len(payload))
        if request == SET_MEM_TABLE and fds:
            self.mem_tables += 1
        answer = self._answer(request, payload)
        if answer is None and flags & NEED_REPLY:
            answer = struct.pack("<Q", 0)
        if answer is not None:
            connection.sendall(HEADER.pack(request, VERSION | REPLY, len(answer)) + answer)
        return True

    @staticmethod
    def _answer(request, payload):
        if request == GET_FEATURES:
            return struct.pack("<Q", VIRTIO_F_VERSION_1 | F_PROTOCOL_FEATURES)
        if request == GET_PROTOCOL_FEATURES:
            return struct.pack("<Q", PROTOCOL_F_CONFIG)
        if request == GET_CONFIG:  # all zeros: a disk of no sectors
            return payload[:CONFIG_HEADER_BYTES] + bytes(len(payload) - CONFIG_HEADER_BYTES)
        return payload if request == GET_VRING_BASE else None
