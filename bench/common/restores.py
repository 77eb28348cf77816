# SPDX-License-Identifier: BSD-2-Clause-Patent
"""One running guest, saved in every way, and the ways to start it again: Latent's, stock QEMU's, those of papers."""

import contextlib
import json
import mmap
import os
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from . import guests as common
from .guests import GuestError, host, vm

BEAT_PORT = "org.latent.beat"
# The guest prints a rising number each millisecond, and has a working set: 2,000 pages in ten places of what it
# holds, a fifth of them written, gone through every 20 ms.
START_BEAT = (f"for port in /sys/class/virtio-ports/*; do grep -qx {BEAT_PORT} $port/name && "
              "exec latent-guest beat 100000 1 > /dev/${port##*/}; done")
WORK = "for i in 0 1 2 3 4 5 6 7 8 9; do latent-guest mem touch m $((i * 3800)) 200 100000 20 {} & done; wait"
WORK = WORK.format("$([ $((i % 5)) = 4 ] && echo w || echo r)")
WARM_UP_S = 1.0
# A number that follows another one: what was printed before the save cannot count.
LINES_OF_AN_ANSWER = 2
HELD_MIB = 150  # random, checked; with the kernel and the files that are read about 370 MiB are in use
FILL = f"""find /usr/lib -type f | sort | xargs cat 2> /dev/null | head -c {140 << 20} > /dev/null
latent-guest mem hold m {HELD_MIB} 13 random"""
ANSWER_TIMEOUT_S = 60
LEARN_TIMEOUT_S = 20
PAGE_BYTES = host.PAGE_BYTES
READY_BYTES = 512 << 20
LAZY_RAM = vm.BUILD_DIR / "bench/lazy_ram.so"


# ---- guests ----

class Guest(vm.VM):
    """A guest that prints numbers on a port of its own, to which the host listens before QEMU is there.

    boots   False: its QEMU is started to go on from something saved, and is spared the kernel's file
    """

    def __init__(self, name, boots=False, **options):
        self.boots = boots
        super().__init__(name, start=False, **options)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(self.dir / "beat.sock"))
        self.listener.listen()
        self.beats = None      # the connection
        self.helpers = []      # what is to be closed with the guest
        self.begin_ns = self.answer_ns = None

    def _kernel_arguments(self):
        return super()._kernel_arguments() if self.boots else []

    def _console_arguments(self):
        return [*super()._console_arguments(), "-chardev", f"socket,id=beat,path={self.dir}/beat.sock",
                "-device", f"virtserialport,chardev=beat,name={BEAT_PORT}"]

    def begin(self, command, pass_fds=()):
        """The command that is measured."""
        self.begin_ns = time.monotonic_ns()
        self.adopt(self.spawn(command, pass_fds))

    def move_to(self, path):
        """Another place for its directory, before it is started."""
        self.dir.rename(path)
        self.dir, self.serial_log, self.qemu_log = path, path / self.serial_log.name, path / self.qemu_log.name

    def has_process(self):
        return self._own_pid() is not None

    def answer_ms(self):
        return (self.answer_ns - self.begin_ns) / 1e6

    def drain(self):
        """Takes what the guest prints from now on, until it ends."""
        self.beats = self.listener.accept()[0]
        threading.Thread(target=_read_all, args=(self.beats,), daemon=True).start()

    def close(self, keep_files=False):
        for each in (*self.helpers, self.listener, self.beats):
            if each is not None:
                each.close()
        super().close(keep_files)


def _read_all(connection):
    with contextlib.suppress(OSError):
        while connection.recv(65536):
            pass


def wait_answers(guests, timeout_s=ANSWER_TIMEOUT_S):
    """Until each guest has answered; notes when it was. Nothing is polled: the kernel wakes us for each line."""
    deadline_s = time.monotonic() + timeout_s
    lines = {guest: 0 for guest in guests}
    with selectors.DefaultSelector() as selector:
        for guest in guests:
            selector.register(guest.listener, selectors.EVENT_READ, guest)
        while any(guest.answer_ns is None for guest in guests):
            for key, _ in selector.select(0.5):
                guest = key.data
                if key.fileobj is guest.listener:
                    guest.beats = guest.listener.accept()[0]
                    selector.unregister(guest.listener)
                    selector.register(guest.beats, selectors.EVENT_READ, guest)
                    continue
                data = guest.beats.recv(4096)
                lines[guest] += data.count(b"\n")
                if lines[guest] >= LINES_OF_AN_ANSWER:
                    guest.answer_ns = time.monotonic_ns()
                if lines[guest] >= LINES_OF_AN_ANSWER or not data:
                    selector.unregister(guest.beats)
            _check_alive(guests, deadline_s)


def _check_alive(guests, deadline_s):
    for guest in guests:
        if guest.answer_ns is None and not guest.alive():
            raise GuestError(f"{guest.name}: QEMU ended: {vm.tail(guest.qemu_log, 5)}")
        if guest.answer_ns is None and time.monotonic() > deadline_s:
            raise GuestError(f"{guest.name}: no answer: {vm.tail(guest.qemu_log, 5)}")


def memory_is_right(guest):
    """The guest itself looks at all that it holds."""
    return guest.sh("latent-guest mem check m", timeout=120, check=False).startswith("ok")


@contextlib.contextmanager
def directories_in(directory):
    """VMs' directories are made there: a snapshot and the disks of the VM have to be on one file system. So is what
    restores learn."""
    before, tempfile.tempdir = tempfile.tempdir, str(directory)
    cache_before = os.environ.get("LATENT_CACHE_DIR")
    os.environ["LATENT_CACHE_DIR"] = str(directory / "cache")
    try:
        yield
    finally:
        tempfile.tempdir = before
        del os.environ["LATENT_CACHE_DIR"]
        if cache_before is not None:
            os.environ["LATENT_CACHE_DIR"] = cache_before


# ---- what was saved ----

class Saved:
    """One guest, saved by `latent save` while it runs and, some milliseconds later, by QEMU's whole migration.

    snapshot, migration   what they wrote
    disk                  the guest's disk as of the migration
    ram                   all of guest RAM as of the snapshot: complete_ram() makes it
    working_set           see record()
    """

    def __init__(self, directory, image, name, mem):
        self.mem, self.image = mem, image
        self.directory = directory / name
        self.directory.mkdir()
        self.snapshot, self.migration = self.directory / "snapshot", self.directory / "migration"
        self.ram, self.working_set = self.directory / "ram", self.directory / "set"
        self.disk = None
        self.guest = Guest(f"saved-{name}", boots=True, image=image, mem=mem, latent=["--share-threshold", "0"])

    def save(self, whole):
        """Lets the guest work, saves and ends it; its disks stay until it is closed."""
        self.guest.drain()
        self.guest.sh(FILL, timeout=180)
        self.guest.sh_start(START_BEAT)
        self.guest.sh_start(WORK)
        time.sleep(WARM_UP_S)
        answer = subprocess.run([common.latent_command(), "save", self.guest.name, self.snapshot], capture_output=True,
                                text=True)
        if answer.returncode:
            raise GuestError(f"latent save: {answer.stderr}")
        if whole:
            self._migrate()
        self.guest.qmp("quit")
        self.guest.process.wait(10)

    def _migrate(self):
        """Of the stopped guest: what a running one writes under TCG meanwhile may be lost (QEMU 7.2)."""
        guest = self.guest
        guest.qmp("stop")
        guest.qmp("migrate-set-parameters", max_bandwidth=1 << 40)
        guest.qmp("migrate", uri=f"exec:cat > {self.migration}")
        while (status := guest.qmp("query-migrate")["status"]) in ("setup", "active", "device"):
            time.sleep(0.01)
        if status != "completed":
            raise GuestError(f"migrate: {status}")
        self.disk = Path(guest.qmp("query-block")[0]["inserted"]["file"])

    def manifest(self):
        return json.loads((self.snapshot / "manifest.json").read_text())

    def snapshot_disk(self):
        layer = self.manifest()["disks"][0]["layers"][0]
        return self.snapshot / "disks" / layer["file"] if layer["file"] else Path(layer["path"])

    def active_set(self):
        """Numbers of the pages that the snapshot says a guest needs first, or None."""
        path = self.snapshot / "active"
        return listed_pages(path) if path.exists() else None

    def record(self):
        """The pages that a guest on demand asks for until a second after its first answer; they are packed, too.
        Also whether the guest's memory was right."""
        log = self.directory / "log"
        with started(uffd_demand, self, "record", LAZY_RAM_LOG=log) as guest:
            time.sleep(1.0)
            right = memory_is_right(guest)
        with open(log, "rb") as file:
            touches = struct.iter_unpack("=QQ", file.read())
        pages = {page for page, time_ns in touches if 0 < time_ns <= guest.answer_ns + 10**9}
        log.unlink()
        write_packed(self.ram, sorted(pages), self.working_set)
        return pages, right

    def with_contents(self, pages):
        """Those that are not zero. Of the others there is nothing to bring: guest RAM is zero before the guest runs."""
        with open(self.ram, "rb") as file:
            return {page for page in pages if any(os.pread(file.fileno(), PAGE_BYTES, page * PAGE_BYTES))}

    def files(self):
        """Everything that a start reads: a cold one finds none of it in the page cache."""
        mine = {path for path in self.directory.rglob("*") if path.is_file()}
        return mine | {self.image} | ({self.disk} if self.disk else set()) | set(learned_lists())

    def cool(self):
        for path in self.files():
            host.drop_from_page_cache(path)

    def warm(self):
        for path in self.files():
            read_data(path)


def ready_memory():
    """Memory that is free and has been used: a machine that is itself virtual gets other memory from its host first,
    which takes longer than all that is measured here."""
    mmap.mmap(-1, READY_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()


def read_data(path):
    """Brings what a file holds into the page cache; no holes."""
    with open(path, "rb", buffering=0) as file, contextlib.suppress(OSError):  # ENXIO: no more data
        end = 0
        while True:
            at = os.lseek(file.fileno(), end, os.SEEK_DATA)
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            while at < end:
                at += len(os.pread(file.fileno(), min(end - at, 1 << 20), at))


# ---- the files that other ways need ----

VERSION, (KIND_WORD, KIND_DATA, KIND_VOLUME, KIND_EQUAL) = 3, range(4)  # src/snapshot/format.h
HEADER, BLOCK_BYTES, RECORD, WORD = struct.Struct("=8sIIIIQQ"), 72, struct.Struct("=IIQ"), struct.Struct("=Q")
ACTIVE_HEADER, ACTIVE_RECORD = struct.Struct("=QIIQQQ"), struct.Struct("=QII")


def listed_pages(path):
    """Of a file as src/snapshot/active.h says."""
    data = path.read_bytes()
    n_pages = ACTIVE_HEADER.unpack_from(data)[3]
    records = data[ACTIVE_HEADER.size:ACTIVE_HEADER.size + n_pages * ACTIVE_RECORD.size]
    return {page for page, _, _ in ACTIVE_RECORD.iter_unpack(records)}


def write_complete_ram(saved):
    """Guest RAM as one file, from a snapshot's `pages` and what they refer to (docs/snapshot.md)."""
    data = (saved.snapshot / "pages").read_bytes()
    magic, version, page_bytes, n_blocks, n_volumes, n_pages, _ = HEADER.unpack_from(data)
    if (magic, version, page_bytes, n_blocks) != (b"LTSNAPAT", VERSION, PAGE_BYTES, 1):
        raise GuestError(f"{saved.snapshot}/pages: version {version}, {n_blocks} blocks: this benchmark reads version "
                         f"{VERSION} with one block")
    records = RECORD.iter_unpack(memoryview(data)[HEADER.size + BLOCK_BYTES * n_blocks:])
    with contextlib.ExitStack() as stack:
        def opened(path, mode):
            return stack.enter_context(open(path, mode)).fileno()

        out, stored = opened(saved.ram, "wb"), opened(saved.snapshot / "ram", "rb")
        volumes = [opened(volume["path"], "rb") for volume in saved.manifest()["volumes"][:n_volumes]]
        os.ftruncate(out, n_pages * PAGE_BYTES)
        for page, (kind, volume, value) in enumerate(records):
            if kind == KIND_WORD:
                contents = WORD.pack(value) * (PAGE_BYTES // WORD.size) if value else None
            elif kind == KIND_DATA:
                contents = os.pread(stored, PAGE_BYTES, page * PAGE_BYTES)
            elif kind == KIND_EQUAL:
                contents = os.pread(stored, PAGE_BYTES, value * PAGE_BYTES)
            elif kind == KIND_VOLUME:
                contents = os.pread(volumes[volume], PAGE_BYTES, value * PAGE_BYTES)
            else:
                raise GuestError(f"{saved.snapshot}/pages: page {page} is of kind {kind}, unknown to this benchmark")
            if contents:
                os.pwrite(out, contents, page * PAGE_BYTES)
        os.fsync(out)


def write_packed(ram, pages, path):
    """The layout is that of LAZY_RAM_SET in bench/lazy_ram.c."""
    numbers = struct.pack(f"={1 + len(pages)}Q", len(pages), *pages)
    with open(ram, "rb") as source, open(path, "wb") as out:
        out.write(numbers.ljust(-(-len(numbers) // PAGE_BYTES) * PAGE_BYTES, b"\0"))
        for page in pages:
            out.write(os.pread(source.fileno(), PAGE_BYTES, page * PAGE_BYTES))


# ---- ways to start again: each gives a guest the command that is measured ----

def latent(saved, guest):
    guest.begin([common.latent_command(), "restore", "--name", guest.name, "--disks", guest.dir, saved.snapshot, "--",
                 guest.qemu, *guest.qemu_arguments()])


def latent_first(saved, guest):
    """As on a host on which the snapshot has never been restored: nothing has been learned."""
    guest.helpers.append(NothingLearned(guest))
    latent(saved, guest)


class NothingLearned:
    """What was learned before is there again when the guest has ended, which may learn until then."""

    def __init__(self, guest):
        self.guest = guest
        self.path, self.aside = learned_dir(), learned_dir().with_name(".learned-aside")
        self.path.rename(self.aside)

    def close(self):
        self.guest.kill9()
        shutil.rmtree(self.path, ignore_errors=True)
        self.aside.rename(self.path)


def learned_dir():
    return Path(os.environ["LATENT_CACHE_DIR"], "learned")


def learn(saved):
    """A first restore, by which the next ones know what is asked for; returns the numbers of those pages."""
    before = set(learned_lists())
    with started(latent, saved, "learn"):
        deadline_s = time.monotonic() + LEARN_TIMEOUT_S
        while not (new := set(learned_lists()) - before):
            if time.monotonic() > deadline_s:
                raise GuestError("the first restore has learned nothing")
            time.sleep(0.1)
    return listed_pages(new.pop())


def learned_lists():
    return [path for path in learned_dir().glob("*") if not path.name.startswith(".")]


def latent_clones(saved, guests):
    """All of them by one command, whose line has a place for each clone's number; they are called NAME-1, NAME-2, …"""
    base = Path(tempfile.mkdtemp(prefix="clones-", dir=saved.directory.parent))
    for number, guest in enumerate(guests, 1):
        guest.move_to(base / str(number))
    first = guests[0]
    line = [word.replace(str(first.dir), f"{base}/{{clone}}").replace(first.name, "{name}") for word in first.qemu_arguments()]
    command = [common.latent_command(), "restore", "--clones", len(guests), "--name", first.name.removesuffix("-1"), "--disks", base,
               saved.snapshot, "--", first.qemu, *line]
    begin_ns, process = time.monotonic_ns(), first.spawn(command)
    for guest in guests:
        guest.begin_ns = begin_ns
        guest.adopt(Clone(guest, process))


class Clone:
    """A machine that `latent restore --clones` starts, as a Popen object: it runs, or will, until it has ended."""

    def __init__(self, guest, command):
        self.guest, self.command, self.returncode = guest, command, None

    def poll(self):
        if self.command.poll() is not None and not self.guest.has_process():
            self.returncode = self.command.returncode
        return self.returncode

    def wait(self, timeout=None):
        deadline_s = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline_s and time.monotonic() > deadline_s:
                raise subprocess.TimeoutExpired("latent restore --clones", timeout)
            time.sleep(0.01)
        return self.returncode

    def kill(self):
        self.command.kill()


def spare(saved, guest):
    """A machine that waits is taken. Its keeper stands still meanwhile: it would start the next one at once."""
    keeper = Keeper(guest, [common.latent_command(), "spare", "--name", guest.name, "--disks", guest.dir, saved.snapshot, "--",
                            guest.qemu, *guest.qemu_arguments()])
    guest.helpers.append(keeper)
    keeper.wait_ready()
    guest.begin_ns = time.monotonic_ns()
    keeper.taken = guest.spawn([common.latent_command(), "spare", "take", guest.name])


class Keeper:
    """`latent spare`, and the machine that it has made."""

    def __init__(self, guest, command):
        self.guest, self.process, self.taken = guest, guest.spawn(command), None

    def wait_ready(self, timeout_s=30):
        deadline_s = time.monotonic() + timeout_s
        while " waits: " not in self.guest.qemu_log.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                raise GuestError(f"no spare: {vm.tail(self.guest.qemu_log, 5)}")
            time.sleep(0.01)
        self.guest.adopt(None)
        self.process.send_signal(signal.SIGSTOP)

    def close(self):
        with contextlib.suppress(OSError, GuestError):
            os.kill(self.guest.pid, signal.SIGTERM)
        self.process.kill()
        self.process.wait()
        if self.taken:
            self.taken.wait()
        deadline_s = time.monotonic() + common.END_TIMEOUT_S
        while self.guest.alive() and time.monotonic() < deadline_s:
            time.sleep(0.01)


def qemu_incoming(saved, guest):
    """The guest was stopped when it was saved, so it is told to go on as soon as all is there."""
    with open(saved.migration, "rb") as file:
        orders = _begin_with_orders(guest, [], file, {"events"})
    threading.Thread(target=_go_on, args=(orders,), daemon=True).start()


def _go_on(orders):
    seen = b""
    with contextlib.suppress(OSError):
        while b'"completed"' not in seen and (data := orders.recv(65536)):
            seen += data
        _order(orders, "cont")


def private_map(saved, guest):
    _begin_with_state(saved, guest, _backend("file", saved, f"mem-path={saved.ram},share=off"))


def uffd_demand(saved, guest):
    guest.env.update(LD_PRELOAD=str(LAZY_RAM), LAZY_RAM_FILE=str(saved.ram))
    _begin_with_state(saved, guest, _backend("ram", saved, "share=off"))


def reap(saved, guest):
    guest.env.update(LAZY_RAM_SET=str(saved.working_set))
    uffd_demand(saved, guest)


def _backend(kind, saved, properties):
    return ["-object", f"memory-backend-{kind},id=pc.ram,size={saved.mem},x-use-canonical-path-for-ramblock-id=off,{properties}",
            "-machine", "memory-backend=pc.ram"]


def _begin_with_state(saved, guest, arguments):
    """Guest RAM is there; the device state is the snapshot's."""
    with open(saved.snapshot / "state", "rb") as state:
        _begin_with_orders(guest, arguments, state, {"x-ignore-shared"})


def _begin_with_orders(guest, arguments, state, capabilities):
    """QEMU finds its orders waiting on a monitor: nobody has to wait until it listens. Our end of the monitor."""
    ours, theirs = socket.socketpair()
    guest.helpers.append(ours)
    _order(ours, "qmp_capabilities")
    _order(ours, "migrate-set-capabilities", capabilities=[{"capability": name, "state": True} for name in capabilities])
    _order(ours, "migrate-incoming", uri=f"fd:{state.fileno()}")
    with theirs:
        guest.begin([*guest.command(), *arguments, "-incoming", "defer", "-chardev", f"socket,id=orders,fd={theirs.fileno()}",
                     "-mon", "chardev=orders,mode=control"], [state.fileno(), theirs.fileno()])
    return ours


def _order(monitor, name, **arguments):
    monitor.sendall(json.dumps({"execute": name, "arguments": arguments}).encode())


def prepare(way, saved, name, **env):
    """A guest that is to be started in this way; its disk is made, but for Latent's, which it makes itself."""
    disk = saved.disk if way is qemu_incoming else saved.snapshot_disk()
    return Guest(name, image=disk, mem=saved.mem, overlay=way not in (latent, spare), env={key: str(value) for key, value in env.items()})


@contextlib.contextmanager
def started(way, saved, name, **env):
    """A guest that has answered; it is gone at the end."""
    guest = prepare(way, saved, name, **env)
    try:
        ready_memory()
        way(saved, guest)
        wait_answers([guest])
        yield guest
    except GuestError:
        guest.diagnose()
        raise
    finally:
        common.end_all([guest])
