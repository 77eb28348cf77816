#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""`latent run` is like `nice`: it becomes QEMU. And what it refuses, it refuses in a sentence."""

import json
import os
import resource
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from lib import case, latent, vm
from lib.qmp import Qmp
from lib.vhost_user import BackEnd
from lib.vm import VM

FILES = "/usr/lib/python3.11/"
MORE_FILES = "/usr/share/"
EVERYTHING = ["--min-run", "1", "--share-threshold", "0"]
QEMU = "qemu-system-x86_64"
IDLE = [QEMU, "-machine", "q35,accel=tcg", "-m", "128", "-nodefaults", "-display", "none", "-S"]
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
PORTS = ["-device", "pcie-root-port,id=port0,chassis=1", "-device", "pcie-root-port,id=port1,chassis=2"]
MOUNTS = []
KEPT = {"volumes", ".lock", ".vmms"}  # of the run-time directory itself


def latent_run(*arguments, **options):
    """Starts `latent run ...`; its standard streams are pipes."""
    return subprocess.Popen([vm.BUILD_DIR / "latent", "run", *map(str, arguments)], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def finish(process, text=None):
    out, err = process.communicate(text, timeout=60)
    return process.returncode, out, err


def check_nothing_left(test, what):
    test.check_equal(latent.vm_dirs(), [], f"nothing is left of {what}")


def check_never_was(test, what, directory):
    """Not even of the images that it did not come to read."""
    left = sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))
    test.check_equal([path for path in left if path not in KEPT], [], f"nothing is left of {what}")


def wait_for(condition, timeout_s=20):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)
    return True


# ---- becoming QEMU ----

def same_process(test, directory):
    pid_file = directory / "pid"
    process = latent_run("--name", "same", "--", *IDLE, "-pidfile", pid_file)
    test.check(wait_for(lambda: pid_file.exists() and pid_file.read_text().strip()), "QEMU starts")
    test.check_equal(int(pid_file.read_text()), process.pid, "QEMU has the process id of `latent run`")
    test.check(os.readlink(f"/proc/{process.pid}/exe").endswith(QEMU), "and it is QEMU's program")
    Qmp(latent.run_dir() / "same" / "qmp.sock").close()  # it answers: RAM and signal handlers are there
    listed = json.loads(latent.run("ps", "--json"))
    test.check_equal([(one["name"], one["pid"]) for one in listed], [("same", process.pid)], "`latent ps` lists it")
    environment = Path(f"/proc/{process.pid}/maps").read_text()
    test.check("latent-qemu.so" in environment, "the agent is loaded")
    process.send_signal(signal.SIGTERM)
    status, _, err = finish(process)
    test.check_equal((status, "terminating on signal 15" in err), (0, True), "a signal reaches QEMU, whose status is passed on")
    check_nothing_left(test, "a VM that was terminated")


def standard_streams(test):
    process = latent_run("--name", "streams", "--", *IDLE, "-monitor", "stdio")
    status, out, _ = finish(process, "info status\ninfo version\nquit\n")
    test.check(status == 0 and "VM status: paused" in out, "standard input and output are QEMU's")
    status, out, err = finish(latent_run("--", QEMU, "-version"))
    test.check(status == 0 and out.startswith("QEMU emulator version"), "-version says what QEMU says")
    status, _, err = finish(latent_run("--", QEMU, "-no-such-option"))
    test.check(status == 1 and "invalid option" in err, "a wrong option of QEMU's: its own message and status")
    check_nothing_left(test, "QEMUs that ended at once")


def exit_status(test):
    """The guest ends QEMU with a status of its own: (value << 1) | 1 through a debug port."""
    with VM("status", latent=EVERYTHING, extra=["-device", "isa-debug-exit,iobase=0x501,iosize=4"]) as guest:
        latent.check_hashes(test, guest, FILES)
        guest.put(b"#include <sys/io.h>\nint main(void) { ioperm(0x501, 4, 1); outb(21, 0x501); return 1; }\n",
                  "/run/end.c")
        guest.sh("gcc -O1 -o /run/end /run/end.c")
        guest.sh_start("/run/end")
        test.check_equal(guest.process.wait(20), 43, "the exit status is the one that the guest chose")
    check_nothing_left(test, "it")


def daemonize(test):
    with VM("daemon", latent=EVERYTHING, extra=["-daemonize"]) as guest:
        test.check_equal(guest.process.wait(30), 0, "-daemonize: the starting process ends with 0")
        guest.adopt(None)
        latent.check_hashes(test, guest, FILES, what="in a daemonized guest")
        figures = latent.stat(guest)
        test.check_equal(figures["pid"], guest.pid, "the agent lives in the process that stayed")
        test.check(latent.shortcut_percent(figures, vm.images_dir() / "golden.qcow2") > 90, "and maps what is read")
        guest.sh_start("latent-guest poweroff")
        test.check(wait_for(lambda: not guest.alive()), "it powers off")
        guest.kill9()
    check_nothing_left(test, "it")


def sandbox(test):
    with VM("sandbox", latent=EVERYTHING, extra=["-sandbox", SANDBOX]) as guest:
        latent.check_hashes(test, guest, FILES, what=f"under -sandbox {SANDBOX}")
        test.check(latent.shortcut_percent(latent.stat(guest), vm.images_dir() / "golden.qcow2") > 90,
                   "reads are mapped")
        latent.run("detach", guest.name)
        latent.check_hashes(test, guest, FILES, what="after detach in the sandbox")
        guest.shutdown()
    check_nothing_left(test, "it")


# ---- what does not go together ----

def plug_vhost_user(guest, socket_path, number):
    backend = {"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": str(socket_path)}},
                                          "server": False}}
    guest.qmp("chardev-add", id=f"vhost{number}", backend=backend)
    guest.qmp("device_add", driver="vhost-user-blk-pci", chardev=f"vhost{number}", bus=f"port{number}",
              id=f"plugged{number}", num_queues=1)


def vhost_user_by_hotplug(test, directory):
    """What is mapped goes to plain RAM first, under load; then the other process gets guest RAM."""
    back_end = BackEnd(directory / "vhost.sock")
    with VM("plug", latent=EVERYTHING, extra=PORTS) as guest:
        latent.check_hashes(test, guest, FILES)
        test.check(latent.stat(guest)["pages_overlay_now"] > 0, "pages are mapped")
        load = latent.start_hash(guest, MORE_FILES)
        time.sleep(0.5)
        plug_vhost_user(guest, directory / "vhost.sock", 0)
        test.check(wait_for(lambda: back_end.mem_tables > 0), "a vhost-user back end that is plugged in gets RAM")
        said = [line for line in guest.qemu_log.read_text().splitlines() if "are plain RAM now" in line]
        test.check(len(said) == 1 and "vhost-user" in said[0], f"what was mapped was moved, and it says so: {said}")
        figures = latent.stat(guest)
        test.check(not figures["overlays_allowed"] and figures["excluded_by"].startswith("vhost-user"),
                   f"`latent stat` says why nothing is mapped: {figures['excluded_by']}")
        test.check_equal(figures["pages_overlay_now"], 0, "nothing is mapped")
        latent.check_hashes(test, guest, MORE_FILES, job=load, what="read while the device was plugged in")
        latent.check_hashes(test, guest, FILES, what="beside a vhost-user device")
        guest.drop_guest_caches()
        latent.check_hashes(test, guest, FILES, what="read anew")
        test.check_equal(latent.stat(guest)["pages_overlay_now"], 0, "nothing is mapped")
        guest.shutdown()
    back_end.close()


def kernel_does_the_io(test, directory):
    """With I/O that goes on without QEMU's threads it is refused, until `latent detach` has been run."""
    back_end = BackEnd(directory / "uring.sock")
    disk = latent.random_image(directory / "uring.raw", 4)
    drive = ["-drive", f"file={disk},format=raw,if=none,id=uring,readonly=on,aio=io_uring",
             "-device", "virtio-blk-pci,drive=uring"]
    other = latent.random_image(directory / "native.raw", 2)
    drive += ["-drive", f"file={other},format=raw,if=none,id=native,readonly=on,aio=native,cache.direct=on",
              "-device", "virtio-blk-pci,drive=native"]
    with VM("uring", latent=EVERYTHING, extra=PORTS + drive) as guest:
        latent.check_hashes(test, guest, FILES)
        test.check_equal(guest.sh("sha256sum /dev/vdb").split()[0], latent.sha256(disk), "read by io_uring")
        test.check(latent.stat(guest)["other_io"] and "aio=native" in guest.qemu_log.read_text(),
                   "`latent run` and `latent stat` say that such reads are copied")
        test.check_equal(guest.sh("sha256sum /dev/vdc").split()[0], latent.sha256(other), "read by Linux AIO")
        for image in (disk, other):
            one = latent.volume(latent.stat(guest), image)
            test.check(one["bytes_asked"] == one["misses"]["kernel_io"]["bytes"] >= image.stat().st_size
                       and not one["bytes_shortcut"], f"what is read of {image.name} is counted: {latent.describe(one)}")
        plug_vhost_user(guest, directory / "uring.sock", 0)
        refused = wait_for(lambda: "refused: vhost-user" in guest.qemu_log.read_text())
        test.check(refused and back_end.mem_tables == 0, "the back end does not get RAM that is mapped")
        test.check(f"Run `latent detach {guest.name}`" in guest.qemu_log.read_text(), "the refusal says what to do")
        latent.check_hashes(test, guest, FILES, what="after the refusal")
        latent.run("detach", guest.name)
        plug_vhost_user(guest, directory / "uring.sock", 1)
        test.check(wait_for(lambda: back_end.mem_tables > 0), "after `latent detach` it gets RAM")
        guest.shutdown()
    back_end.close()


def excluded_at_launch(test):
    if os.geteuid() != 0 and resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY:
        test.not_tried("mem-lock=on: so much memory cannot be locked here (ulimit -l)")
        return
    with VM("locked", latent=EVERYTHING, mem="512M", extra=["-overcommit", "mem-lock=on"]) as guest:
        latent.check_hashes(test, guest, FILES, what="with locked memory")
        figures = latent.stat(guest)
        one = latent.volume(figures, vm.images_dir() / "golden.qcow2")
        test.check(figures["pages_overlay_now"] == 0 and one["bytes_shortcut"] == 0 and
                   one["misses"]["excluded"]["bytes"] > 0, "mem-lock=on: nothing is mapped, counted as excluded")
        lines = [line for line in guest.qemu_log.read_text().splitlines() if line.startswith("latent:")]
        test.check(len(lines) == 1 and "mem-lock" in lines[0] and "plain" in lines[0], f"a sentence says so: {lines}")
        guest.shutdown()


# ---- bad input ----

def check_refused(test, what, status, arguments, needle, env=None):
    """One sentence on standard error, the status, and nothing left behind."""
    result = latent.command("run", *arguments, env=env)
    lines = result.stderr.strip().splitlines()
    test.check(result.returncode == status and len(lines) == 1 and needle in lines[0] and not result.stdout,
               f"{what}: status {result.returncode}: {result.stderr.strip()}")


def bad_input(test, directory):
    idle = ["--", *IDLE]
    script = directory / "script"
    script.write_text("#!/bin/sh\nexec qemu-system-x86_64 \"$@\"\n")
    plain = directory / "plain"
    plain.write_text("no program")
    check_refused(test, "an unknown option", latent.USAGE, ["--no-such", *idle], "no-such")
    check_refused(test, "no command", latent.USAGE, [], "missing")
    check_refused(test, "a wrong number", latent.USAGE, ["--share-threshold", "2", *idle], "share-threshold")
    check_refused(test, "a wrong name", latent.USAGE, ["--name", "../x", *idle], "../x")
    check_refused(test, "no QEMU", latent.NO_AGENT, ["--", "/bin/true"], "/bin/true")
    check_refused(test, "a file that cannot be run", 126, ["--", plain], "cannot be run")
    check_refused(test, "a command that is not there", 127, ["--", "no-such-qemu"], "not found")
    script.chmod(0o755)
    check_refused(test, "a script", latent.NO_AGENT, ["--", script], "script")
    check_refused(test, "a memory backend of the user's", latent.REFUSED,
                  [*idle, "-machine", "memory-backend=m", "-object", "memory-backend-ram,id=m,size=128M"], "backend")
    check_nothing_left(test, "what was refused")
    missing_image(test, directory / "none.qcow2")
    for words in (["stat", "nobody"], ["detach", "nobody"]):
        result = latent.command(*words)
        test.check(result.returncode == latent.NO_VM and result.stderr.count("\n") == 1,
                   f"latent {' '.join(words)}: {result.stderr.strip()}")


def missing_image(test, path):
    """Where Latent sees it, with a status of its own; elsewhere QEMU says so, which `latent run` has become."""
    middle, top = path.with_name("middle.qcow2"), path.with_name("top.qcow2")
    for image, backing in ((middle, path), (top, middle)): # the second one by a relative name
        subprocess.run(["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b",
                        backing if backing == path else backing.name, image, "1M"], check=True)
    for words in (["-drive", f"file={path},if=virtio"], ["-hda", path],
                  ["-blockdev", f"driver=file,node-name=none,filename={path}"],
                  ["-drive", f"file={middle},if=virtio"], ["-hda", top],
                  ["-blockdev", f"driver=qcow2,node-name=none,file.driver=file,file.filename={top}"]):
        result = latent.command("run", "--", *IDLE, *words)
        test.check(result.returncode == latent.NO_IMAGE and result.stderr.count("\n") == 1 and str(path) in result.stderr,
                   f"a missing image: status {result.returncode}: {result.stderr.strip()}")
    result = latent.command("run", "--", *IDLE, "-drive", f"file=nbd+unix:///?socket={path},if=virtio")
    test.check(result.returncode == 1 and str(path) in result.stderr,
               f"an image that another program serves: status {result.returncode}: {result.stderr.strip()}")
    check_never_was(test, "a QEMU that found no image", latent.run_dir())


def two_of_one_name(test):
    first = latent_run("--name", "twin", "--", *IDLE, "-monitor", "stdio")
    test.check(wait_for(lambda: latent.command("stat", "twin", "--json").returncode == 0), "the first one runs")
    check_refused(test, "a second VM of the same name", latent.NAME_IN_USE, ["--name", "twin", "--", *IDLE], "twin")
    monitor = Qmp(latent.run_dir() / "twin" / "qmp.sock")
    test.check_equal(monitor.command("query-status")["status"], "prelaunch", "the first one is as it was")
    monitor.close()
    test.check_equal(finish(first, "quit\n")[0], 0, "and ends well")
    check_nothing_left(test, "both")


def small_file_system(test, directory, kib):
    """A tmpfs of that size as the run-time directory."""
    path = directory / f"tmpfs{kib}"
    path.mkdir(mode=0o700)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k,mode=700", "none", path],
                      stderr=subprocess.DEVNULL).returncode != 0:
        return None
    MOUNTS.append(path)
    return path


def full_run_dir(test, directory):
    path = small_file_system(test, directory, 8)
    if not path:
        test.not_tried("a full run-time directory: a tmpfs cannot be mounted here")
        return
    env = {"LATENT_RUNTIME_DIR": str(path)}
    check_refused(test, "a full run-time directory", latent.RUN_DIR, ["--name", "full", "--", *IDLE], str(path), env)
    check_never_was(test, "a VM that found no room", path)
    # Enough to start, and too little for what the agent wants to write down later.
    path = small_file_system(test, directory, 64)
    with VM("tight", latent=EVERYTHING, env={"LATENT_RUNTIME_DIR": str(path)}) as guest:
        latent.check_hashes(test, guest, "/usr/lib/", what="with a run-time directory that fills up")
        guest.shutdown()


def others_directory(test, directory):
    path = directory / "open"
    path.mkdir()
    path.chmod(0o755)
    check_refused(test, "a run-time directory that is open to others", latent.RUN_DIR, ["--", *IDLE], "chmod 700",
                  {"LATENT_RUNTIME_DIR": str(path)})


def body(test):
    test.need_latent()
    latent.private_run_dir()
    with tempfile.TemporaryDirectory(prefix="latent-nice-") as name:
        directory = Path(name)
        try:
            same_process(test, directory)
            standard_streams(test)
            bad_input(test, directory)
            two_of_one_name(test)
            full_run_dir(test, directory)
            others_directory(test, directory)
            exit_status(test)
            daemonize(test)
            sandbox(test)
            excluded_at_launch(test)
            vhost_user_by_hotplug(test, directory)
            kernel_does_the_io(test, directory)
        finally:
            for path in MOUNTS:
                subprocess.run(["umount", path], check=False)


case.main("`latent run` becomes QEMU in every way, and refuses what it must in one sentence.", body, timeout_s=480)
