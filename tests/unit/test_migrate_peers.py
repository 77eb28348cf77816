#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""`latent receive` and a source that lies: whatever it says, it is refused with a sentence, QEMU ends, and nothing is left.
And one that tells of pages on an image: they are mapped, with the source bit, and are what the image has there. And one
whose hints are slow to follow: it is asked for those pages instead. And a destination that has not what it said: the source
hears it at once, and does not go on for ever for it.

What an honest source says first is taken down from a real one, and then said with one thing changed. The VM is QEMU with a
processor that is halted by its first instruction, or writes to memory in a loop. LATENT_BUILD is meson's build directory.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import pathlib
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib

BUILD = pathlib.Path(os.environ.get("LATENT_BUILD", pathlib.Path(__file__).resolve().parents[2] / "build"))
LATENT, QEMU = BUILD / "latent", "qemu-system-x86_64"
READ_MS, SLOW_S = 200, 20  # all of one message: 51 s
TIMEOUT_S, SKIPPED, NO_ANSWER = 60, 77, 75
HALT, BIOS_BYTES = b"\xf4", 1 << 16
RAM_MIB, PAGE, IMAGE_PAGES = 64, 4096, 512
RESET = 0xfff0
FIRST_WRITTEN, N_WRITTEN, N_OTHERS = 16 << 8, 600, 512  # pages
PASSES_ENOUGH, PASSES_LOOKED_AT = 3, 8
PASS_S = 0.3  # in which all is written
# For the reset vector, which jumps to the first byte: to 32 bits, and one bit of each written page is turned, on and on.
WRITER = bytes.fromhex(
    "2e660f01165000"    # lgdtl %cs:0x50
    "0f20c0"            # movl %cr0, %eax
    "0c01"              # orb $1, %al
    "0f22c0"            # movl %eax, %cr0
    "66ea1700ffff0800"  # ljmpl $8, $0xffff0017
    "66b81000"          # movw $16, %ax
    "8ed8"              # movw %ax, %ds
    "be00000001"        # movl $0x1000000, %esi
    "803601"            # xorb $1, (%esi)
    "81c600100000"      # addl $0x1000, %esi
    "81fe00802501"      # cmpl $0x1258000, %esi
    "72ef"              # jb to the xorb
    "ebe8"              # jmp to the movl
    "8d7600"
    "0000000000000000" "ffff0000009acf00" "ffff00000092cf00"  # the GDT
    "1700" "3800ffff")  # and where it is
JUMP = bytes.fromhex("e90d00")

# docs/migration.md
HEADER, HELLO = struct.Struct("<IIII"), struct.Struct("<QII16sII")
BLOCK, FILES, RUN, PAGES, SWITCH = (struct.Struct(text) for text in ("<64sQ", "<II", "<QIHHQ", "<IIII", "<QQQ"))
MAGIC, SESSION = 0x54415247494d544c, b"0123456789abcdef"
HELLO_TYPE, REFUSE, MANIFEST, BLOCKS, READY, PAGES_TYPE, PASS, STATE, SWITCH_TYPE = range(9)
LOADED, TOKEN, PING, FILES_TYPE, HAVE, SAME, LACK, HINT, STALE = 9, 10, 15, 16, 18, 19, 20, 21, 22
SAME_ENTRY = struct.Struct("<QQ32s")
MISSING, WORD, VOLUME, DATA = range(4)

failures = []


def check(holds, what):
    if not holds:
        failures.append(what)
    print(f"{'ok' if holds else 'NOT SO'}: {what}", flush=True)


# ---- messages ----

def read(peer, n_bytes):
    data = b""
    while len(data) < n_bytes:
        more = peer.recv(n_bytes - len(data))
        if not more:
            raise OSError("the peer has ended the connection")
        data += more
    return data


def next_message(peer):
    kind, n_bytes, checksum, _ = HEADER.unpack(read(peer, HEADER.size))
    payload = read(peer, n_bytes)
    check_checksum(kind, payload, checksum)
    return kind, payload


def receive(peer, wanted):
    while True:
        kind, payload = next_message(peer)
        if kind == wanted:
            return payload
        if kind == REFUSE:
            raise OSError(payload.decode())


def checksum_of(kind, payload):
    return zlib.crc32(struct.pack("<II", kind, len(payload)) + payload)


def check_checksum(kind, payload, checksum):
    if checksum != checksum_of(kind, payload):
        raise OSError("the checksum is wrong")


def send(peer, kind, payload=b""):
    peer.sendall(HEADER.pack(kind, len(payload), checksum_of(kind, payload), 0) + payload)


def hello(**changes):
    fields = {"magic": MAGIC, "version": 3, "page_bytes": PAGE, "session": SESSION, "resume": 0, "reserved": 0, **changes}
    return HELLO.pack(*fields.values())


def pages(*runs, contents=b"", data_pages=None, packed=0):
    count = len(contents) // PAGE if data_pages is None else data_pages
    return PAGES.pack(len(runs), count, packed, 0) + b"".join(RUN.pack(*run) for run in runs) + contents


def runs_of(payload):
    """(page, pages, kind) of each."""
    n_runs = PAGES.unpack(payload[:PAGES.size])[0]
    return [RUN.unpack(payload[at:at + RUN.size])[:3] for at in range(PAGES.size, PAGES.size + n_runs * RUN.size, RUN.size)]


def same_page(page):
    return SAME_ENTRY.pack(page, 1, b"")


def hint(page, file, file_page, contents=b"", reserved=0):
    return struct.pack("<QQII32s", page, file_page, file, reserved, hashlib.sha256(contents).digest())


# ---- the VM ----

class Machine:
    def __init__(self, directory):
        self.directory = directory
        self.socket = directory / "socket"
        (directory / "bios").write_bytes(HALT * BIOS_BYTES)
        self.image = directory / "image.raw"
        self.image.write_bytes(os.urandom(IMAGE_PAGES * PAGE))
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", self.image, "-F", "raw", directory / "disk.qcow2"],
                       check=True)

    def line(self, mib=RAM_MIB):
        return [QEMU, "-machine", "q35", "-m", str(mib), "-bios", f"{self.directory}/bios", "-nodefaults", "-display", "none",
                "-vga", "none", "-drive", f"file={self.directory}/disk.qcow2,if=none,id=disk", "-device",
                "virtio-blk-pci,drive=disk"]

    def receive(self, fault=None):
        receiver = self.start("receive", "--json", "--listen", f"unix:{self.socket}", "--name", "there", "--", *self.line(),
                              fault=fault)
        receiver.stdout.readline()
        return receiver

    def start(self, *words, fault=None):
        environment = dict(os.environ, LATENT_FAULT=fault) if fault else None
        return subprocess.Popen([LATENT, *map(str, words)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, env=environment)

    @contextlib.contextmanager
    def called(self, name, line, *options):
        """By a real source: the connection, and what it says before it is told that all is ready, {type: payload}."""
        vmm = self.start("run", "--name", name, "--", *line)
        while not (pathlib.Path(os.environ["LATENT_RUNTIME_DIR"]) / name / "mover.sock").exists():
            time.sleep(0.05)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(self.socket))
            listener.listen(1)
            listener.settimeout(TIMEOUT_S)
            sender = self.start("migrate", *options, name, f"unix:{self.socket}")
            peer, _ = listener.accept()
            with peer:
                peer.settimeout(TIMEOUT_S)
                said = {HELLO_TYPE: receive(peer, HELLO_TYPE)}
                send(peer, HELLO_TYPE, said[HELLO_TYPE])
                for kind in (MANIFEST, BLOCKS, FILES_TYPE):
                    said[kind] = receive(peer, kind)
                yield peer, said
            sender.communicate(timeout=TIMEOUT_S)
        self.socket.unlink()
        check(vmm.poll() is None, f"a destination that goes away is no harm to the VM {name}")
        vmm.terminate()
        vmm.wait(TIMEOUT_S)

    def take_down(self):
        with self.called("honest", self.line()) as (_, said):
            return said

    def writers_line(self, contents):
        """A VM that has this from the first page on that it writes."""
        (self.directory / "contents").write_bytes(contents)
        (self.directory / "writer").write_bytes(WRITER.ljust(RESET, HALT) + JUMP.ljust(BIOS_BYTES - RESET, HALT))
        line = [f"{self.directory}/writer" if word == f"{self.directory}/bios" else word for word in self.line()]
        return [*line, "-device", f"loader,file={self.directory}/contents,addr={FIRST_WRITTEN * PAGE},force-raw=on"]


def alive():
    answer = subprocess.run([LATENT, "ps", "--json"], capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    return [vm["name"] for vm in json.loads(answer.stdout)]


def refused(machine, what, words, say):
    receiver = machine.receive()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(TIMEOUT_S)
        peer.connect(str(machine.socket))
        heard = ""
        with contextlib.suppress(OSError):  # it may have been refused before all was said
            say(peer)
        try:
            receive(peer, None)
        except OSError as error:
            heard = str(error)
    _, why = receiver.communicate(timeout=TIMEOUT_S)
    check(receiver.returncode == NO_ANSWER and words in why, f"{what}: {why.strip().splitlines()[-1:]}")
    check(words in heard or "ended the connection" in heard or "reset" in heard, f"{what}: the source hears \"{heard}\"")
    check(not alive(), f"{what}: no VM is left")


# ---- lies ----

def told(said, changes=(), upto=FILES_TYPE):
    """What an honest source says, with some of it replaced."""
    messages = {**said, HELLO_TYPE: hello(), **dict(changes)}

    def say(peer):
        send(peer, HELLO_TYPE, messages[HELLO_TYPE])
        receive(peer, HELLO_TYPE)
        for kind in (MANIFEST, BLOCKS, FILES_TYPE):
            send(peer, kind, messages[kind])
            if kind == upto:
                return
    return say


def manifest_with(said, **changes):
    manifest = {**json.loads(said[MANIFEST]), **changes}
    return {MANIFEST: json.dumps(manifest).encode()}


def blocks_with(said, n_pages):
    name, _ = BLOCK.unpack(said[BLOCKS][:BLOCK.size])
    return {BLOCKS: BLOCK.pack(name, n_pages)}


def without_ballot(said):
    count, _ = FILES.unpack(said[FILES_TYPE][:FILES.size])
    return {FILES_TYPE: FILES.pack(count, 0) + said[FILES_TYPE][FILES.size:]}


def spoilt_digest(said):
    files = bytearray(without_ballot(said)[FILES_TYPE])
    files[-1] ^= 1
    return {FILES_TYPE: bytes(files)}


def then(said, *messages):
    """The VM is ready; then these."""
    def say(peer):
        told(said, without_ballot(said))(peer)
        receive(peer, READY)
        for kind, payload in messages:
            send(peer, kind, payload)
    return say


def try_all(machine, said):
    all_pages = RAM_MIB << 8
    huge = 1 << 40  # pages
    lies = [
        ("no Latent", "no Latent that migrates", told(said, {HELLO_TYPE: hello(magic=1)})),
        ("another version", "speaks version 9", told(said, {HELLO_TYPE: hello(version=9)})),
        ("other pages", "pages have 65536 bytes", told(said, {HELLO_TYPE: hello(page_bytes=65536)})),
        ("a migration that was never cut", "no migration that was cut", told(said, {HELLO_TYPE: hello(resume=1)})),
        ("a manifest that is none", "manifest.json", told(said, {MANIFEST: b"{]"})),
        ("a name with a path in it", "no plain name", told(said, manifest_with(said, name="../../etc/passwd"))),
        ("another QEMU", "the source runs QEMU 99.0.0", told(said, {**without_ballot(said),
                                                                     **manifest_with(said, qemu_version="99.0.0")})),
        ("RAM that the host has not", "which is more than this host",
         told(said, {**manifest_with(said, ram_bytes=huge * PAGE), **blocks_with(said, huge)})),
        ("blocks that the manifest has not", "do not agree", told(said, blocks_with(said, all_pages + 1))),
        ("other RAM", "the same machine and -m",
         told(said, {**without_ballot(said), **manifest_with(said, ram_bytes=(all_pages + 1) * PAGE),
                     **blocks_with(said, all_pages + 1)})),
        ("a ballot that is not there", "not on storage that both hosts share", told(said)),
        ("too many files", "so many files", told(said, {FILES_TYPE: FILES.pack(77, 0) + bytes(77 * 16)})),
        ("an image with other contents", "here that has other contents", told(said, spoilt_digest(said))),
        ("a message of ours", "which is ours to send", then(said, (READY, bytes(8)))),
        ("pages beyond RAM", "beyond RAM", then(said, (PAGES_TYPE, pages((all_pages, 1, WORD, 0, 0))))),
        ("so many pages that they come around", "beyond RAM",
         then(said, (PAGES_TYPE, pages((all_pages - 1, 0xffffffff, WORD, 0, 0))))),
        ("a volume that nobody has", "volume that is not there", then(said, (PAGES_TYPE, pages((0, 1, VOLUME, 5, 0))))),
        ("less contents than it says", "contents of such a length",
         then(said, (PAGES_TYPE, pages((0, 2, DATA, 0, 0), contents=bytes(PAGE), data_pages=2)))),
        ("contents that are no frame", "cannot be unpacked",
         then(said, (PAGES_TYPE, pages((0, 1, DATA, 0, 0), contents=b"x" * 100, data_pages=1, packed=100)))),
        ("equal pages beyond RAM", "beyond RAM", then(said, (SAME, same_page(all_pages)))),
        ("a hint for a page beyond RAM", "beyond RAM", then(said, (HINT, hint(all_pages, 0, 0)))),
        ("a hint at a disk that nobody has", "a disk that is not there", then(said, (HINT, hint(0, 2, 0)))),
        ("a hint at a place beyond all disks", "a place that no disk has", then(said, (HINT, hint(0, 0, 1 << 63)))),
        ("a hint with more than it should have", "a place that no disk has", then(said, (HINT, hint(0, 0, 0, reserved=1)))),
        ("half a hint", "hints of such a length", then(said, (HINT, hint(0, 0, 0) + bytes(9)))),
        ("a token too early", "something else than it should", then(said, (TOKEN, b""))),
        ("a state that is not what was sent", "did not arrive as it was sent",
         then(said, (STATE, b"state"), (SWITCH_TYPE, SWITCH.pack(5, all_pages, 1)))),
        ("more state than it sends", "did not arrive as it was sent",
         then(said, (STATE, b"state"), (SWITCH_TYPE, SWITCH.pack(1 << 50, all_pages, 1)))),
        ("it goes away", "ended the connection", lambda peer: (then(said)(peer), peer.shutdown(socket.SHUT_RDWR))),
    ]
    for what, words, say in lies:
        refused(machine, what, words, say)


# ---- pages on an image ----

def with_volumes(machine, said):
    """The image as a volume, and once more, with a digest that is not its own."""
    volume = {"path": str(machine.image), "bytes": IMAGE_PAGES * PAGE, "fingerprint": "0" * 16, "dev": 0, "ino": 0, "mtime_ns": 0,
              "role": "image"}
    digest = said[FILES_TYPE][FILES.size:]
    other = bytes([digest[0] ^ 1]) + digest[1:]
    return {**manifest_with(said, volumes=[volume, volume]), FILES_TYPE: FILES.pack(3, 0) + digest + other + digest}


def stat(name):
    answer = subprocess.run([LATENT, "stat", name, "--json"], capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    return json.loads(answer.stdout)


def shows(name, key, wanted):
    """What a mover says of its work it says several times a second."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while (found := (stat(name)["migration"] or {}).get(key)) != wanted and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return found == wanted


def guest_ram(name, first, n_pages, path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(TIMEOUT_S)
        connection.connect(str(pathlib.Path(os.environ["LATENT_RUNTIME_DIR"]) / name / "qmp.sock"))
        stream = connection.makefile("rw")
        stream.readline()
        for command in ({"execute": "qmp_capabilities"},
                        {"execute": "pmemsave", "arguments": {"val": first * PAGE, "size": n_pages * PAGE, "filename": str(path)}}):
            stream.write(json.dumps(command) + "\n")
            stream.flush()
            while "event" in json.loads(stream.readline()):
                pass
    return path.read_bytes()


def page_of(path, number):
    return path.read_bytes()[number * PAGE:(number + 1) * PAGE]


def on_a_disk(machine, peer, first):
    """Hints that are right, that have become wrong, and that never were."""
    disk, image = machine.directory / "disk.qcow2", machine.image
    header, last = page_of(disk, 0), page_of(image, IMAGE_PAGES - 1)
    send(peer, HINT, hint(first, 1, IMAGE_PAGES - 1, last) + hint(first + 1, 0, 0, header))
    send(peer, HINT, hint(first + 2, 1, IMAGE_PAGES, last))
    check(receive(peer, STALE) == struct.pack("<Q", first + 2), "behind the end of a file there is nothing")
    send(peer, HINT, hint(first + 3, 1, 3, last) + hint(first + 4, 1, 4, page_of(image, 4)) + hint(first + 5, 1, 5, header))
    check(receive(peer, STALE) == struct.pack("<QQ", first + 3, first + 5), "of three hints in a row two are lies")
    send(peer, PAGES_TYPE, pages((first + 3, 1, DATA, 0, 0), contents=header))

    at, before, after = disk.stat().st_size // PAGE + 1, os.urandom(PAGE), os.urandom(PAGE)
    with open(disk, "r+b") as file:
        os.pwrite(file.fileno(), before, at * PAGE)
        send(peer, HINT, hint(first + 5, 0, at, before))
        send(peer, HINT, hint(first + 2, 0, at, b"something else"))
        check(receive(peer, STALE) == struct.pack("<Q", first + 2), "that was never there")
        os.pwrite(file.fileno(), after, at * PAGE)
        send(peer, HINT, hint(first + 6, 0, at, before))
        check(receive(peer, STALE) == struct.pack("<Q", first + 6), "that was there, and has been written")
        file.truncate(disk_bytes := (at - 1) * PAGE)
    send(peer, PASS)
    receive(peer, PASS)
    check(disk.stat().st_size == disk_bytes and
          guest_ram("there", first, 7, machine.directory / "ram") == last + header + bytes(PAGE) + header + page_of(image, 4) +
          before + bytes(PAGE), "what was right is in place, and nothing else")
    check(shows("there", "pages_on_disks", 4), "latent stat shows it")


def on_an_image(machine, said):
    receiver = machine.receive()
    first, n_pages, from_page = 1000, 300, 7  # above what a PC has below 1 MiB
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(TIMEOUT_S)
        peer.connect(str(machine.socket))
        told(said, with_volumes(machine, said))(peer)
        check(receive(peer, READY) == struct.pack("<QQ", 1, 3), "of two volumes the one that is the same is there, and both files of "
              "the disk can be read")
        send(peer, PAGES_TYPE, pages((first, n_pages, VOLUME, 0, from_page)))
        send(peer, PASS)
        receive(peer, PASS)
        told_stat = stat("there")
        check((told_stat["source_bits_set"], told_stat["source_bits_now"]) == (n_pages, n_pages),
              f"{told_stat['source_bits_set']} pages have the source bit, and none has been fetched")
        check(shows("there", "pages_on_volumes", n_pages), "latent stat shows what was told")
        wanted = machine.image.read_bytes()[from_page * PAGE:(from_page + n_pages // 2) * PAGE]
        check(guest_ram("there", first, n_pages // 2, machine.directory / "ram") == wanted, "half of them are read, and right")
        read_stat = stat("there")
        check(n_pages // 2 <= read_stat["source_bits_fetched"] < n_pages and
              read_stat["source_bits_fetched"] + read_stat["source_bits_now"] == n_pages,
              f"{read_stat['source_bits_fetched']} have been fetched by that")
        send(peer, PAGES_TYPE, pages((first, 1, WORD, 0, 7)))
        send(peer, SAME, same_page(first + 1))
        check(receive(peer, LACK) == struct.pack("<Q", first + 1), "what it has no snapshot of it lacks")
        on_a_disk(machine, peer, first + n_pages)
        send(peer, PASS)
        receive(peer, PASS)
        check(guest_ram("there", first, 1, machine.directory / "ram") == struct.pack("<Q", 7) * (PAGE // 8),
              "what is told later counts")
    receiver.communicate(timeout=TIMEOUT_S)
    check(not alive(), "the source goes away: no VM is left")


# ---- a disk that is slow ----

def stale_of(peer):
    """The pages of the next STALE, and whether a ping came before it."""
    pinged = False
    while True:
        kind, payload = next_message(peer)
        pinged = pinged or kind == PING
        if kind == STALE:
            return struct.unpack(f"<{len(payload) // 8}Q", payload), pinged
        if kind == REFUSE:
            raise OSError(payload.decode())


def on_a_slow_disk(machine, said):
    """Hints that are right, and take longer to be read than to be sent."""
    receiver = machine.receive(fault=f"storage_read:delay:{READ_MS}")
    first, places = 1000, range(0, IMAGE_PAGES, 2)  # one read each
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(SLOW_S)
        peer.connect(str(machine.socket))
        told(said, without_ballot(said))(peer)
        receive(peer, READY)
        found = []
        for begin in (first, first + IMAGE_PAGES):
            send(peer, HINT, b"".join(hint(begin + place, 1, place, page_of(machine.image, place)) for place in places))
            stale, pinged = stale_of(peer)
            found.append(len(places) - len(stale))
            check(pinged or begin != first, "while it reads it pings")
            check(stale == tuple(begin + place for place in places[found[-1]:]), "what it has not read in time is stale, all of it")
        check(0 < found[1] < found[0], f"it has read {found[0]} pages of {len(places)}, and then {found[1]}, for it was slow")
        send(peer, PASS)
        receive(peer, PASS)
        check(guest_ram("there", first, 3, machine.directory / "ram") == page_of(machine.image, 0) + bytes(PAGE) +
              page_of(machine.image, 2), "what it has read is in place")
    receiver.communicate(timeout=TIMEOUT_S)
    check(not alive(), "no VM is left of that")


# ---- a destination that has not what it said ----

def quick_digest(page):
    xxh3 = ctypes.CDLL("libxxhash.so.0").XXH3_64bits
    xxh3.restype, xxh3.argtypes = ctypes.c_uint64, [ctypes.c_char_p, ctypes.c_size_t]
    return xxh3(page, len(page))


def both_contents(contents):
    """Digests of what the written pages hold, in turns."""
    for at in range(0, N_WRITTEN * PAGE, PAGE):
        page = contents[at:at + PAGE]
        yield quick_digest(page)
        yield quick_digest(bytes([page[0] ^ 1]) + page[1:])


def lack_in_each_pass(peer):
    """Of what is told as the same the first page. Returns the passes, and whether the first pass told it once more."""
    passes, lacked, again = 0, None, False
    while passes < PASSES_LOOKED_AT:
        kind, payload = next_message(peer)
        if kind == SAME:
            page = SAME_ENTRY.unpack(payload[:SAME_ENTRY.size])[0]
            lacked = page if lacked is None else lacked
            send(peer, LACK, struct.pack("<Q", page))
        elif kind == PAGES_TYPE and not passes and lacked is not None:
            again = again or any(page <= lacked < page + n_pages and run == DATA for page, n_pages, run in runs_of(payload))
        elif kind == PASS:
            passes += 1
            time.sleep(PASS_S)
            send(peer, PASS)
        elif kind in (STATE, SWITCH_TYPE, REFUSE):
            break
    check(lacked is not None, "pages are told as the same")
    return passes, again


def lacks_a_page(machine):
    """So slowly that a pass takes its time, and that what the guest writes in one cannot be sent in the pause."""
    contents = os.urandom((N_WRITTEN + N_OTHERS) * PAGE)
    with machine.called("writer", machine.writers_line(contents), "--max-rate", "1") as (peer, _):
        digests = list(both_contents(contents))
        send(peer, HAVE, struct.pack(f"<{len(digests)}Q", *digests))
        send(peer, READY, bytes(16))
        passes, again = lack_in_each_pass(peer)
    check(again, "what is lacked is told again in the same pass: the source listens while it tells")
    check(2 <= passes <= PASSES_ENOUGH, f"a page that is lacked in each pass is no reason to go on: {passes} passes")


def main():
    if shutil.which(QEMU) is None:
        print(f"{QEMU} is not installed")
        return SKIPPED
    with tempfile.TemporaryDirectory(prefix="latent-peers-") as directory:
        directory = pathlib.Path(directory)
        (directory / "run").mkdir(mode=0o700)
        os.environ["LATENT_RUNTIME_DIR"] = str(directory / "run")
        machine = Machine(directory)
        said = machine.take_down()
        lacks_a_page(machine)
        on_an_image(machine, said)
        on_a_slow_disk(machine, said)
        try_all(machine, said)
        check(not list(directory.glob("*.latent-*")), "no ballot is left")
    return 1 if failures else 0


sys.exit(main())
