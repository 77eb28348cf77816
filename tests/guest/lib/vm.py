# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Guests for tests and benchmarks: plain QEMU, or QEMU under `latent run`.

    with VM("a", mem="1G", latent=["--option"]) as vm:
        vm.wait_ready()
        print(vm.sh("uname -r"))

Everything a VM needs lives in a directory of its own (vm.dir): its overlay disk,
serial log, QEMU's messages and sockets. It is removed at the end unless the test
failed or LATENT_KEEP=1.
"""

import atexit
import base64
import contextlib
import ctypes
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from . import host
from .agent import Agent, GuestError
from .qmp import Qmp, QmpError

SOURCE_DIR = Path(__file__).resolve().parents[3]
BUILD_DIR = Path(os.environ.get("LATENT_BUILD") or SOURCE_DIR / "build")
PORT_NAME = "org.latent.test"
PR_SET_PDEATHSIG = 1
LOG_TAIL_LINES = 30
NESTED_TRIES = 5
NESTED_READY_S = 120  # of one try: a guest that boots there is up after 60 s at the latest
PUT_CHUNK_BYTES = 60000

live_vms = []  # started and not yet ended; case.py dumps them when a test fails
_libc = ctypes.CDLL(None)
_images_dir = None


def images_dir():
    """The directory of the guest images; builds them when they are missing."""
    global _images_dir
    if _images_dir is None:
        result = subprocess.run([SOURCE_DIR / "tests/image/build"], stdout=subprocess.PIPE, text=True)
        if result.returncode != 0:
            raise GuestError("tests/image/build failed")
        _images_dir = Path(result.stdout.strip().splitlines()[-1])
    return _images_dir


def parse_bytes(text):
    """ "512M" or "2G" in bytes."""
    number, unit = re.fullmatch(r"(\d+)([MG])", text).groups()
    return int(number) << {"M": 20, "G": 30}[unit]


class EmulatorError(GuestError):
    """The emulation of a processor loses every guest; nothing of Latent's has been tried."""


class Skip(Exception):
    """The machine cannot run this test; says what is missing."""


class VM:
    """One guest.

    image       name of a built image, or a path; raw or qcow2 by its suffix
    overlay     True: the guest writes to a qcow2 overlay of its own in vm.dir;
                False: to the image itself
    latent      None: plain QEMU; a list: `latent run` with these options
    extra       more QEMU arguments; drive_opts more options of the root drive
    append      more words for the kernel command line
    qemu        the QEMU program; env more environment variables for it
    before      words before the command: where it runs
    """

    def __init__(self, name, image="golden.qcow2", mem="1G", smp=1, latent=None, overlay=True,
                 extra=(), drive_opts="", append="", qemu="qemu-system-x86_64", env=None, before=(), start=True):
        self.name, self.mem, self.smp, self.latent = name, mem, smp, latent
        self.extra, self.drive_opts, self.append = list(extra), drive_opts, append
        self.qemu, self.env, self.before = qemu, dict(env or {}), list(before)
        self.image = Path(image) if "/" in str(image) else images_dir() / image
        self.dir = Path(tempfile.mkdtemp(prefix=f"latent-{name}-"))
        self.disk = self._make_overlay() if overlay else self.image
        self.serial_log = self.dir / "serial.log"
        self.qemu_log = self.dir / "qemu.log"
        self.process = self._pid = self._agent = self._qmp = None
        self.started_s = self._start_again = None
        self._diagnosed = False
        if start:
            self.start()

    def __enter__(self):
        return self

    def __exit__(self, error_type, error, trace):
        keep = error_type is not None and not issubclass(error_type, (KeyboardInterrupt, Skip))
        if keep:
            self.diagnose()
        self.close(keep_files=keep)

    # ---- starting ----

    def start(self):
        """Starts (or, after its end, starts again) QEMU; does not wait for the guest."""
        if self.process is not None:
            self.kill9()
        self._remove_sockets()
        self._start_again = self.start
        command = self.command()
        (self.dir / "command").write_text(shlex.join(command) + "\n")
        self.adopt(self.spawn(command))

    def restore(self, snapshot, *options):
        """`latent restore` in the place of a QEMU that has ended; does not wait for the guest."""
        self._remove_sockets()
        self._start_again = lambda: self.restore(snapshot, *options)
        command = [BUILD_DIR / "latent", "restore", "--name", self.name, "--disks", self.dir, *options, snapshot, "--",
                   self.qemu, *self.qemu_arguments()]
        self.adopt(self.spawn(command))

    def receive(self, listen, *options):
        """`latent receive` in the place of a QEMU that has ended; returns its Popen object. The guest is here when that
        has ended well."""
        self._remove_sockets()
        command = [*self.before, BUILD_DIR / "latent", "receive", "--listen", listen, "--name", self.name, "--json", *options, "--",
                   self.qemu, *self.qemu_arguments()]
        with open(self.qemu_log, "ab") as log:
            process = subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                       stderr=log, text=True, env=dict(os.environ, **self.env), preexec_fn=_choose_preexec())
        process.stdout.readline()  # it listens
        self.adopt(None)
        return process

    def spawn(self, command, pass_fds=()):
        """The Popen object of a command that is, or becomes, this VM's QEMU."""
        with open(self.qemu_log, "ab") as log:
            return subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                    env=dict(os.environ, **self.env), pass_fds=pass_fds, preexec_fn=_choose_preexec())

    def adopt(self, process):
        """Takes over a QEMU that something else started with this VM's sockets (a restore).

        process: its Popen object, or None when the pid file says enough.
        """
        self._forget_connections()
        self.process = process
        self._note_started()

    def _note_started(self):
        self.started_s = time.monotonic()
        self._diagnosed = False
        if self not in live_vms:
            live_vms.append(self)

    def command(self):
        """The whole command line, `latent run` included."""
        command = [self.qemu, *self.qemu_arguments()]
        if self.latent is None:
            return [*self.before, *command]
        return [*self.before, str(BUILD_DIR / "latent"), "run", "--name", self.name, *self.latent, "--", *command]

    def qemu_arguments(self):
        accel = host.accelerator(images_dir())
        return [
            "-name", self.name,
            "-machine", "q35",
            *(["-accel", "kvm", "-cpu", "host"] if accel == "kvm" else ["-accel", "tcg"]),
            "-m", self.mem, "-smp", str(self.smp),
            "-nodefaults", "-no-user-config", "-display", "none", "-vga", "none", "-no-reboot",
            "-pidfile", str(self.dir / "pid"),
            "-qmp", f"unix:{self.dir}/qmp.sock,server=on,wait=off",
            *self._console_arguments(), *self._kernel_arguments(), *self._disk_arguments(),
            "-object", "rng-random,id=rng0,filename=/dev/urandom",
            "-device", "virtio-rng-pci,rng=rng0",
            *self.extra,
        ]

    def _console_arguments(self):
        return [
            "-chardev", f"file,id=console,path={self.serial_log},append=on", "-serial", "chardev:console",
            "-chardev", f"socket,id=agent,path={self.dir}/agent.sock,server=on,wait=off",
            "-device", "virtio-serial-pci", "-device", f"virtserialport,chardev=agent,name={PORT_NAME}",
        ]

    def _kernel_arguments(self):
        words = f"console=ttyS0 loglevel=6 panic=-1 mitigations=off no_timer_check {self.append}".strip()
        return ["-kernel", str(images_dir() / "vmlinuz"), "-initrd", str(images_dir() / "initrd.img"),
                "-append", words]

    def _disk_arguments(self):
        file_format = "qcow2" if self.disk.suffix == ".qcow2" else "raw"
        options = f"file={self.disk},if=none,id=root,format={file_format}"
        if self.drive_opts:
            options += "," + self.drive_opts
        return ["-drive", options, "-device", "virtio-blk-pci,drive=root"]

    def _make_overlay(self):
        overlay = self.dir / "disk.qcow2"
        backing_format = "qcow2" if self.image.suffix == ".qcow2" else "raw"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", self.image.resolve(),
                        "-F", backing_format, overlay], check=True)
        return overlay

    # ---- the guest ----

    def wait_status(self, wanted, timeout_s=20):
        """Waits until QEMU says that the VM is in that state: "running", "paused"."""
        deadline_s = time.monotonic() + timeout_s
        while (status := self.qmp("query-status"))["status"] != wanted:
            if time.monotonic() > deadline_s:
                raise GuestError(f"status {status}, not {wanted}")
            time.sleep(0.02)

    def wait_ready(self, timeout=60):
        """Waits until the guest runs commands; returns the seconds since the start."""
        tries, fault = (NESTED_TRIES, "") if host.is_nested() else (2, "")
        for attempt in range(tries):
            if attempt:
                print(f"NOTE: {self.name}: {fault}; started once more", flush=True)
                self.serial_log.unlink(missing_ok=True)
                self._start_again()
            try:
                return self._wait_ready(min(timeout, NESTED_READY_S) if host.is_nested() else timeout)
            except GuestError:
                fault = self._emulator_fault()
                if fault is None:
                    raise
        raise EmulatorError(f"{self.name}: {fault}, {tries} times")

    def _emulator_fault(self):
        """What went wrong in early boot, if it is something that QEMU's TCG alone brings about; otherwise None."""
        log = _read_or_empty(self.serial_log)
        if "initramfs: modules loaded" in log:
            return None
        accelerator = host.accelerator(images_dir())
        # Seen once in some 80 boots with several processors under QEMU 7.2's TCG: the guest's kernel patches its
        # own text ("crng init done" turns a static branch) and one processor never gets past that place.
        if (self.smp > 1 and accelerator == "tcg" and self.alive() and "soft lockup" in log and
                "sys_getrandom" in log):
            return "the guest's kernel hung in early boot under TCG"
        # Seen in some 100 boots there: one of two guests that boot at once never gets past its first seconds. (No disk
        # has been read so early, so nothing has been mapped.)
        if accelerator == "kvm" and host.is_nested() and self.alive():
            return "the guest's kernel hung in early boot under emulated SVM"
        # Seen in one of 56 boots of plain QEMU, without Latent: SVM as TCG emulates it loses a processor's state, and
        # the guest of the guest ends by a triple fault, without a word.
        if self.was_reset() and "Kernel panic" not in log:
            return "the guest's processor was reset in early boot under emulated SVM"
        return None

    def was_reset(self, timeout_s=5):
        """QEMU has ended as after a triple fault of its guest, where emulated SVM may bring that about."""
        if host.accelerator(images_dir()) != "kvm" or not host.is_nested() or self.process is None:
            return False
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout_s) == 0
        return False

    def _wait_ready(self, timeout):
        deadline_s = time.monotonic() + timeout
        self._agent = self._connect_agent(deadline_s)
        self._agent.wait_ready(deadline_s - time.monotonic(), still_alive=self._check_alive)
        return time.monotonic() - self.started_s

    def sh(self, command, timeout=60, check=True):
        """Runs a shell command in the guest; returns its output (both streams)."""
        return self.sh_start(command).wait(timeout, check)

    def sh_start(self, command, on_output=None):
        """Starts a shell command; returns its Job (agent.py): wait(), kill(), output, status."""
        if self._agent is None:
            self.wait_ready()
        return self._agent.start(command, on_output)

    def drop_guest_caches(self):
        self.sh("sync; echo 3 > /proc/sys/vm/drop_caches")

    def put(self, data, path):
        """Writes a small file in the guest."""
        self.sh(f": > {shlex.quote(path)}")
        for at in range(0, len(data), PUT_CHUNK_BYTES):
            text = base64.b64encode(data[at:at + PUT_CHUNK_BYTES]).decode()
            self.sh(f"echo {text} | base64 -d >> {shlex.quote(path)}")

    def _connect_agent(self, deadline_s):
        while True:
            self._check_alive()
            try:
                return Agent(self.dir / "agent.sock")
            except OSError as error:
                if time.monotonic() > deadline_s:
                    raise GuestError(f"{self.name}: no agent socket: {error}") from error
                time.sleep(0.01)

    # ---- QEMU ----

    @property
    def pid(self):
        """The process id of QEMU itself (not of `latent run`)."""
        deadline_s = time.monotonic() + 20
        while self._pid is None:
            try:
                self._pid = int((self.dir / "pid").read_text())
            except (OSError, ValueError):
                self._check_alive()
                if time.monotonic() > deadline_s:
                    raise GuestError(f"{self.name}: QEMU wrote no pid file") from None
                time.sleep(0.01)
        return self._pid

    def alive(self):
        if self.process is not None:
            return self.process.poll() is None
        return self._own_pid() is not None

    def qmp(self, command, **arguments):
        """Runs a QMP command (`_` in argument names becomes `-`); returns its result."""
        return self.monitor.command(command, **arguments)

    @property
    def monitor(self):
        if self._qmp is None:
            self._check_alive()
            self._qmp = Qmp(self.dir / "qmp.sock")
        return self._qmp

    def ram_hva(self):
        """The address in QEMU of guest RAM's first byte."""
        answer = self.monitor.hmp("gpa2hva 0x100000")
        return int(re.search(r"is (0x[0-9a-f]+)", answer)[1], 16) - 0x100000

    def ram_kib(self):
        """Guest RAM by what backs it: see host.guest_ram_kib."""
        return host.guest_ram_kib(self.pid, self.ram_hva(), parse_bytes(self.mem))

    # ---- ending ----

    def shutdown(self, timeout=30):
        """Powers the guest off; raises when QEMU does not end well."""
        try:
            self.sh_start("latent-guest poweroff")
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise GuestError(f"{self.name}: no end {timeout} s after poweroff") from None
        self._forget()
        if status != 0:
            raise GuestError(f"{self.name}: QEMU ended with status {status}")

    def kill9(self):
        """SIGKILL to QEMU; the disk stays for another start()."""
        pid = self._own_pid()
        if pid is not None:
            _kill(pid)
        if self.process is not None:
            if pid is None:
                self.process.kill()
            self._reap()
        self._forget()

    def close(self, keep_files=False):
        if self.process is not None or self._own_pid() is not None:
            self.kill9()
        if not keep_files and os.environ.get("LATENT_KEEP") != "1":
            shutil.rmtree(self.dir, ignore_errors=True)

    def _reap(self):
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:  # `latent run` did not follow QEMU
            self.process.kill()
            self.process.wait(10)

    def _own_pid(self):
        """QEMU's process id if it lives and is ours (the number may have been used again)."""
        try:
            pid = self._pid or int((self.dir / "pid").read_text())
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        return pid if str(self.dir).encode() in words else None

    def _forget(self):
        self._forget_connections()
        self.process = None
        (self.dir / "pid").unlink(missing_ok=True)
        if self in live_vms:
            live_vms.remove(self)

    def _forget_connections(self):
        for connection in (self._agent, self._qmp):
            if connection is not None:
                connection.close()
        self._agent = self._qmp = self._pid = None

    def _remove_sockets(self):
        for name in ("qmp.sock", "agent.sock", "pid"):
            (self.dir / name).unlink(missing_ok=True)

    def _check_alive(self):
        if not self.alive() and self.process is not None:
            raise GuestError(f"{self.name}: QEMU ended with status {self.process.returncode}: "
                             f"{tail(self.qemu_log, 5)}")

    # ---- when something went wrong ----

    def diagnose(self, file=sys.stderr):
        """Prints what helps to find a fault, once; never raises."""
        if self._diagnosed:
            return
        self._diagnosed = True
        print(f"--- VM {self.name}: {self._describe_end()}; files in {self.dir}", file=file)
        print(f"    serial log: {self.serial_log}\n    command: {self.dir}/command", file=file)
        for path in (self.qemu_log, self.serial_log):
            print(f"--- {path.name}, last lines\n{tail(path, LOG_TAIL_LINES)}", file=file)
        if self.alive():
            print(f"--- QEMU\n{self._describe_process()}", file=file)

    def _describe_end(self):
        if self.alive():
            return "alive"
        return f"ended with status {self.process.returncode}" if self.process else "ended"

    def _describe_process(self):
        lines = []
        try:
            for task in sorted(Path(f"/proc/{self.pid}/task").iterdir()):
                name = (task / "comm").read_text().strip()
                stack = _read_or_empty(task / "stack").split("\n")[:4]
                lines.append(f"thread {task.name} {name}: {' '.join(stack)}")
            lines.append(f"status: {self.qmp('query-status')}")
        except (OSError, QmpError, GuestError) as error:
            lines.append(str(error))
        return "\n".join(lines)


@contextlib.contextmanager
def stopped(guests):
    """Guests that stand still: the kernel shows one mapping after another, and not one moment."""
    for guest in guests:
        guest.qmp("stop")
    try:
        yield
    finally:
        for guest in guests:
            guest.qmp("cont")


def tail(path, n_lines):
    return "\n".join(_read_or_empty(path).splitlines()[-n_lines:])


def _read_or_empty(path):
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _choose_preexec():
    # The signal comes when the starting *thread* ends: only the main thread may ask for it.
    return _die_with_parent if threading.current_thread() is threading.main_thread() else None


def _die_with_parent():
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@atexit.register
def _end_all():
    for vm in list(live_vms):
        vm.close(keep_files=True)
