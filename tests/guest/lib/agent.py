# SPDX-License-Identifier: BSD-2-Clause-Patent
"""The host's end of the guest's command server (tests/image/guest/serve.c)."""

import os
import select
import socket
import struct
import threading
import time

MAGIC = 0x544E544C
HEADER = struct.Struct("<IIII")  # magic, type, id, payload bytes
PING, RUN, KILL, PONG, OUTPUT, EXIT = 1, 2, 3, 4, 5, 6
COMMAND_MAX_BYTES = 120 * 1024


class GuestError(Exception):
    """A command failed in the guest, or the guest did not answer."""


class CommandFailed(GuestError):
    def __init__(self, command, status, output):
        super().__init__(f"status {status} from: {command}\n{output}")
        self.command, self.status, self.output = command, status, output


class Job:
    """A command that runs in the guest; `on_output(bytes)` is called as output comes."""

    def __init__(self, agent, job_id, command, on_output):
        self.agent, self.id, self.command = agent, job_id, command
        self.on_output = on_output
        self.chunks = []
        self.status = None
        self.lost = None
        self.done = threading.Event()

    @property
    def output(self):
        return b"".join(self.chunks).decode(errors="replace")

    def wait(self, timeout_s=60, check=True):
        """The output; raises CommandFailed on a status other than 0 (unless check=False)."""
        if not self.done.wait(timeout_s):
            self.kill()
            raise GuestError(f"no end after {timeout_s} s: {self.command}\n{self.output[-2000:]}")
        if self.lost:
            raise GuestError(f"{self.lost} during: {self.command}\n{self.output[-2000:]}")
        if check and self.status != 0:
            raise CommandFailed(self.command, self.status, self.output)
        return self.output

    def kill(self):
        try:
            self.agent.send(KILL, self.id, b"")
        except OSError:
            pass


class Agent:
    """One connection to the guest's port. A reader thread hands frames to jobs."""

    def __init__(self, socket_path):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(str(socket_path))
        self.jobs = {}
        self.next_id = 1
        self.lock = threading.Lock()  # protects jobs, next_id and writes to the socket
        self.reader = None

    def wait_ready(self, timeout_s, still_alive=lambda: None):
        """Sends a nonce until the guest answers it; what came before is dropped."""
        nonce = os.urandom(16)
        answer = HEADER.pack(MAGIC, PONG, 0, len(nonce)) + nonce
        deadline_s = time.monotonic() + timeout_s
        seen = b""
        next_ping_s = 0.0
        while answer not in seen:
            now_s = time.monotonic()
            if now_s > deadline_s:
                raise GuestError(f"the guest did not answer within {timeout_s} s")
            still_alive()
            if now_s >= next_ping_s:
                self.send(PING, 0, nonce)
                next_ping_s = now_s + 2.0
            seen += self._receive_some(0.2)
        rest = seen[seen.index(answer) + len(answer):]
        self.reader = threading.Thread(target=self._read_frames, args=(rest,), daemon=True)
        self.reader.start()

    def _receive_some(self, timeout_s):
        if not select.select([self.socket], [], [], timeout_s)[0]:
            return b""
        try:
            data = self.socket.recv(65536)
        except ConnectionResetError:
            data = b""
        if not data:
            raise GuestError("the guest's port was closed")
        return data

    def send(self, frame_type, job_id, payload):
        with self.lock:
            self.socket.sendall(HEADER.pack(MAGIC, frame_type, job_id, len(payload)) + payload)

    def start(self, command, on_output=None):
        payload = command.encode()
        if len(payload) > COMMAND_MAX_BYTES:
            raise ValueError(f"the command is longer than {COMMAND_MAX_BYTES} bytes")
        with self.lock:
            job = Job(self, self.next_id, command, on_output)
            self.jobs[job.id] = job
            self.next_id += 1
        try:
            self.send(RUN, job.id, payload)
        except OSError as error:
            raise GuestError(f"cannot send to the guest: {error}") from error
        return job

    def close(self):
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.socket.close()

    def _read_frames(self, data):
        reason = "the guest's port was closed"
        try:
            while True:
                data = self._take_frames(data)
                more = self.socket.recv(65536)
                if not more:
                    break
                data += more
        except OSError as error:
            reason = f"the guest's port failed ({error})"
        except Exception as error:  # a job's on_output may raise anything
            reason = f"the reader of the guest's answers ended ({error!r})"
        self._lose_jobs(reason)

    def _take_frames(self, data):
        while len(data) >= HEADER.size:
            magic, frame_type, job_id, payload_bytes = HEADER.unpack_from(data)
            if magic != MAGIC:
                raise GuestError("the guest's answer is not a frame")
            if len(data) < HEADER.size + payload_bytes:
                break
            self._handle(frame_type, job_id, data[HEADER.size:HEADER.size + payload_bytes])
            data = data[HEADER.size + payload_bytes:]
        return data

    def _handle(self, frame_type, job_id, payload):
        job = self.jobs.get(job_id)
        if job is None:
            return
        if frame_type == OUTPUT:
            job.chunks.append(payload)
            if job.on_output:
                job.on_output(payload)
        elif frame_type == EXIT:
            job.status = struct.unpack("<I", payload)[0]
            with self.lock:
                del self.jobs[job_id]
            job.done.set()

    def _lose_jobs(self, reason):
        with self.lock:
            lost, self.jobs = list(self.jobs.values()), {}
        for job in lost:
            job.lost = reason
            job.done.set()
