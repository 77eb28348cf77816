# SPDX-License-Identifier: BSD-2-Clause-Patent
"""A store of snapshots: a directory over HTTP/1.1 with range requests, as far away and as faulty as one likes.

    with store.Store(directory, latency_ms=2, mbit_s=1000) as there:
        guest.restore(f"{there.url}/snapshot")
        there.faults.append(store.wrong_bytes)

A fault is a function (request, path, data) -> data; it may raise store.Status(404), cut the data, or wait.
"""

import datetime
import hashlib
import hmac
import http.server
import re
import socket
import ssl
import threading
import time
from pathlib import Path

PIECE_BYTES = 64 << 10


class Status(Exception):
    """Answers with this status instead."""


class Line:
    """A line of so many bits a second that all connections share."""

    def __init__(self, mbit_s):
        self.bytes_s = mbit_s * 1e6 / 8
        self.free_s = 0.0  # when it has sent everything so far
        self.lock = threading.Lock()

    def wait_for(self, n_bytes):
        with self.lock:
            self.free_s = max(self.free_s, time.monotonic()) + n_bytes / self.bytes_s
            wait_s = self.free_s - time.monotonic()
        if wait_s > 0:
            time.sleep(wait_s)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        pass  # clients that hang up


class Store:
    """latency_ms: added to each request. certificate: (file, key): HTTPS. keys: {access key: secret}: requests
    have to be signed for S3."""

    def __init__(self, directory, latency_ms=0, mbit_s=None, certificate=None, keys=None, port=0):
        self.directory, self.latency_s, self.keys = Path(directory), latency_ms / 1000, keys
        self.line = Line(mbit_s) if mbit_s else None
        self.faults = []
        self.silent = threading.Event()  # set: nothing is answered
        self.requests, self.bytes = 0, 0
        self.server = Server(("127.0.0.1", port), self._handler())
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        scheme = "https" if certificate else "http"
        self.url = f"{scheme}://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.silent.clear()
        self.server.shutdown()
        self.server.server_close()

    def _handler(self):
        store = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

            def do_GET(self):
                store.answer(self)

            def log_message(self, *_):
                pass

        return Handler

    # ---- one request ----

    def answer(self, request):
        self.requests += 1
        time.sleep(self.latency_s)
        while self.silent.is_set():
            time.sleep(0.02)
        try:
            if self.keys is not None:
                check_signature(request, self.keys)
            path = self._find(request.path)
            status, first, n_bytes, size = self._range(request, path)
            data = _read(path, first, n_bytes)
            length = len(data)
            for fault in list(self.faults):
                data = fault(request, path, data)
        except Status as refusal:
            self._send(request, refusal.args[0], {"Content-Length": 0}, b"")
            return
        headers = {"Content-Length": length, "Accept-Ranges": "bytes", "ETag": _etag(path)}
        if status == 206:
            headers["Content-Range"] = f"bytes {first}-{first + length - 1}/{size}"
        self._send(request, status, headers, data)
        if len(data) < length:
            request.close_connection = True

    def _find(self, name):
        path = (self.directory / name.lstrip("/")).resolve()
        if not path.is_file() or self.directory.resolve() not in path.parents:
            raise Status(404)
        return path

    def _range(self, request, path):
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if not asked or request.headers.get("If-Range", _etag(path)) != _etag(path):
            return 200, 0, size, size
        first, last = int(asked[1]), min(int(asked[2]), size - 1)
        if first > last:
            raise Status(416)
        return 206, first, last + 1 - first, size

    def _send(self, request, status, headers, data):
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, str(value))
        request.end_headers()
        for at in range(0, len(data), PIECE_BYTES):
            piece = data[at:at + PIECE_BYTES]
            if self.line:
                self.line.wait_for(len(piece))
            request.wfile.write(piece)
            self.bytes += len(piece)


def _read(path, first, n_bytes):
    with open(path, "rb") as file:
        file.seek(first)
        return file.read(n_bytes)


def _etag(path):
    status = path.stat()
    return f'"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"'


# ---- faults ----

def _is_ram(path):
    return path.name.startswith("ram")


def wrong_bytes(request, path, data):
    return bytes(byte ^ 0x55 for byte in data[:64]) + data[64:] if _is_ram(path) else data


def cut(request, path, data):
    return data[:len(data) // 2] if _is_ram(path) else data


def gone(request, path, data):
    if _is_ram(path):
        raise Status(404)
    return data


# ---- S3: Signature Version 4, as its documentation describes it ----

def _hmac(key, text):
    return hmac.new(key, text.encode(), hashlib.sha256).digest()


def check_signature(request, keys):
    """Raises Status(403) unless the request is signed with one of the keys, just now."""
    found = re.fullmatch(r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d{8})/([^/]+)/s3/aws4_request, *"
                         r"SignedHeaders=([^,]+), *Signature=([0-9a-f]{64})", request.headers.get("Authorization", ""))
    if not found or found[1] not in keys:
        raise Status(403)
    key, day, region, names, signature = found.groups()
    stamp = request.headers.get("x-amz-date", "")
    age = datetime.datetime.utcnow() - datetime.datetime.strptime(stamp, "%Y%m%dT%H%M%SZ")
    headers = "".join(f"{name}:{' '.join(request.headers.get(name, '').split())}\n" for name in names.split(";"))
    payload = request.headers.get("x-amz-content-sha256", "")
    canonical = "\n".join(["GET", request.path, "", headers, names, payload])
    scope = f"{day}/{region}/s3/aws4_request"
    to_sign = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    signing = _hmac(_hmac(_hmac(_hmac(b"AWS4" + keys[key].encode(), day), region), "s3"), "aws4_request")
    right = hmac.new(signing, to_sign.encode(), hashlib.sha256).hexdigest()
    if not hmac.compare_digest(right, signature) or abs(age.total_seconds()) > 900 or not stamp.startswith(day) or \
            "host" not in names.split(";") or not payload:
        raise Status(403)
