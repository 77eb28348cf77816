#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Clones and spares of one snapshot, started from its own description of the machine."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from lib import case, latent, vm
from lib.agent import Agent
from lib.vm import VM

HELD_MIB = 48
CLONES = 16
STEPS = ["checks", "overlays", "exec", "ram", "state", "resumed", "rest"]
NO_IMAGE, REFUSED, NO_VM = 66, 65, 67
GA_PORT = "org.qemu.guest_agent.0"
MAC = "52:54:00:00:00:99"

keepers = []

KEEP_GA = f"""
name=$(grep -l {GA_PORT} /sys/class/virtio-ports/*/name)
port=/dev/$(basename $(dirname $name))
until [ -s /run/ga ]; do cat $port >> /run/ga; sleep 1; done
"""


class Restored:
    """A VM that only Latent knows: by its run directory."""

    def __init__(self, name):
        self.name = name
        self.figures = latent.stat(name)
        self.pid = self.figures["pid"]
        self.agent = Agent(latent.run_dir() / name / "agent.sock")
        self.agent.wait_ready(60)

    def sh(self, command, timeout=60):
        return self.agent.start(command).wait(timeout)

    def qmp(self, command):
        connection = vm.Qmp(latent.run_dir() / self.name / "qmp.sock")
        try:
            return connection.command(command)
        finally:
            connection.close()

    def end(self):
        self.agent.close()
        end_pid(self.pid)


def end_pid(pid):
    os.kill(pid, signal.SIGTERM)
    wait_gone(pid)


def wait_gone(pid):
    latent.wait_for(f"process {pid} ends", lambda: not is_running(pid), 20)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def save(test, directory):
    """A guest that holds memory and a nonce that is nowhere else; it has a generation ID and a guest agent's port."""
    extra = ["-chardev", f"socket,id=ga,path={directory}/ga.sock,server=on,wait=off",
             "-device", f"virtserialport,chardev=ga,name={GA_PORT}",
             "-netdev", "user,id=net,hostfwd=tcp:127.0.0.1:0-:22", "-device", "virtio-net-pci,netdev=net"]
    with VM("web", latent=["--vmgenid"], mem="512M", extra=extra) as guest:
        guest.sh(f"latent-guest mem hold m {HELD_MIB} 13 mixed", timeout=60)
        guest.sh("head -c 16 /dev/urandom | sha256sum > /run/nonce; echo before > /root/mark; sync")
        # What the host says to the guest agent is kept; a port that nobody has at the host's end reads as ended.
        guest.put(KEEP_GA.encode(), "/run/keep-ga")
        guest.sh("sh -c 'setsid sh /run/keep-ga > /dev/null 2>&1 &'")
        time.sleep(0.3)
        nonce, generation = guest.sh("cat /run/nonce"), guest.qmp("query-vm-generation-id")["guid"]
        latent.run("save", "web", directory / "web")
        described = json.loads((directory / "web/manifest.json").read_text())
        test.check("machine" in described and described["machine"]["type"].startswith("pc-q35-"),
                   f"the machine is described: {described.get('machine', described.get('machine_missing'))}"[:200])
        text = json.dumps(described["machine"])
        test.check(str(guest.dir) not in text and "vmlinuz" not in text, "without a path of the host's")
        guest.kill9()
    shutil.rmtree(guest.dir, ignore_errors=True)
    return nonce, generation


def check_steps(test, steps, what):
    test.check_equal([step["step"] for step in steps], STEPS, f"{what}: all steps, in their order")
    times = [step["us"] for step in steps]
    test.check(times == sorted(times) and times[0] > 0 and times[-1] < 60e6, f"{what}: {times}")


def many_clones(test, directory, nonce, generation):
    """All at once, each with memory, disk, name, generation and clock of its own."""
    disks = directory / "clones"
    disks.mkdir()
    answer = latent.command("restore", "--clones", CLONES, "--json", "--disks", disks, directory / "web", timeout_s=170)
    test.check_equal(answer.returncode, 0, f"{CLONES} clones start {answer.stderr}")
    told = json.loads(answer.stdout)
    test.check_equal([one["name"] for one in told], [f"web-{n}" for n in range(1, CLONES + 1)], "their names")
    for one in told:
        check_steps(test, one["steps"], one["name"])
    clones = [Restored(one["name"]) for one in told]
    try:
        test.check_equal([clone.pid for clone in clones], [one["pid"] for one in told], "their processes")
        check_clones(test, clones, nonce, generation)
        for clone in clones:
            latent.wait_for(f"{clone.name}: the rest is there", lambda: latent.stat(clone.name)["rest"]["state"] == "loaded")
        test.check_equal(len(list(disks.iterdir())), CLONES, "each has a disk of its own")
        test.check((latent.run_dir() / "web-1/log").exists(), "what QEMU prints is kept")
    finally:
        for clone in clones:
            clone.end()
    latent.wait_for("no VM left", lambda: latent.run("ps") is not None and latent.vm_dirs() == [])
    test.check_equal(len(list(disks.iterdir())), CLONES, "the disks of guests that ran stay")
    return clones


def check_clones(test, clones, nonce, generation):
    guids = [clone.qmp("query-vm-generation-id")["guid"] for clone in clones]
    test.check_equal(len({generation, *guids}), CLONES + 1, "generations that nobody else has")
    for job in [clone.agent.start(f"echo {clone.name} > /root/mark; sync") for clone in clones]:
        job.wait(170)
    looks = [clone.agent.start("cat /run/nonce; echo 3 > /proc/sys/vm/drop_caches; cat /root/mark; latent-guest mem check m")
             for clone in clones]
    for clone, job in zip(clones, looks):
        found, mark, memory = job.wait(170).splitlines()[:3]
        test.check_equal(found, nonce.strip(), f"{clone.name}: it was restored, not booted")
        test.check_equal(mark, clone.name, f"{clone.name}: nobody else writes its disk")
        test.check(memory.startswith("ok"), f"{clone.name}: its memory is right")
    for clone in clones:
        check_clock(test, clone)


def check_clock(test, guest):
    before_s = time.time()
    rtc = int(guest.sh("cat /sys/class/rtc/rtc0/since_epoch"))
    test.check(before_s - 2 < rtc < time.time() + 2, f"{guest.name}: its hardware clock is right")
    latent.wait_for("the guest agent is told the time", lambda: "guest-set-time" in guest.sh("cat /run/ga"))
    text = guest.sh("cat /run/ga")
    told_s = json.loads(text[text.index("{"):].splitlines()[0])["arguments"]["time"] / 1e9
    test.check(guest.figures["started_unix_s"] - 2 < told_s < time.time(), f"{guest.name}: its guest agent was told the time")


def one(test, directory, nonce):
    """In the foreground, without a line of QEMU's, and with one that has placeholders."""
    log = open(directory / "one.log", "w")
    process = subprocess.Popen([vm.BUILD_DIR / "latent", "restore", "--json", "--disks", directory, directory / "web"],
                               stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    latent.wait_for("its times", lambda: (directory / "one.log").read_text().endswith("\n"))
    told = json.loads((directory / "one.log").read_text())
    test.check_equal((told["name"], told["pid"]), ("web", process.pid), "the command became the VM")
    check_steps(test, told["steps"], "one")
    guest = Restored("web")
    latent.wait_for("the rest", lambda: latent.stat("web")["rest"]["state"] == "loaded")
    test.check_equal(latent.stat("web")["restore"], told["steps"], "latent stat has the same times")
    test.check_equal(guest.sh("cat /run/nonce"), nonce, "it was restored without a command line")
    described = subprocess.run([vm.BUILD_DIR / "latent", "save", "web", directory / "again"], check=False).returncode
    test.check_equal(described, 0, "it can be saved again")
    test.check("machine" in json.loads((directory / "again/manifest.json").read_text()), "and is described again")
    guest.end()
    process.wait(20)


def same_line(test, directory, nonce):
    """The user's own line, for clones: {clone} keeps their sockets apart; -blockdev and IDE disks are replaced."""
    with VM("ide", latent=[], mem="256M", start=False) as guest:
        words = guest.qemu_arguments()
        place = words.index("-drive")
        words[place:place + 4] = ["-blockdev", f"driver=file,node-name=file0,filename={guest.disk}", "-blockdev",
                                  json.dumps({"driver": "qcow2", "node-name": "disk0", "file": "file0"}),
                                  "-device", "virtio-blk-pci,drive=disk0"]
        scratch = guest.dir / "scratch.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", scratch, "16M"], check=True)
        words += ["-hda", str(scratch), "-netdev", "user,id=net", "-device", "virtio-net-pci,id=card,netdev=net,mac=" + MAC]
        guest.qemu_arguments = lambda: words
        guest.start()
        guest.sh("echo here > /run/nonce; echo before > /root/mark; sync")
        latent.run("save", "ide", directory / "first")
        latent.run("save", "ide", directory / "ide")
        manifest = json.loads((directory / "ide/manifest.json").read_text())
        test.check_equal(sorted(disk["drive"] for disk in manifest["disks"]), ["disk0", "ide0-hd0"], "its disks")
        test.check("machine" in manifest, "a machine of -blockdev and -hda is described")
        guest.kill9()
        line = [word.replace(str(guest.dir), str(directory)).replace("agent.sock", "agent-{clone}.sock")
                .replace("qmp.sock", "qmp-{clone}.sock").replace("/pid", "/pid-{clone}")
                .replace(MAC, MAC[:-2] + "{clone:x}") for word in words]
        for own in ([], ["--", guest.qemu, *line]):
            latent.run("restore", "--clones", "2", "--name", "own", "--disks", directory, directory / "ide", *own)
            for number in (1, 2):
                path = directory / f"agent-{number}.sock" if own else latent.run_dir() / f"own-{number}/agent.sock"
                agent = Agent(path)
                agent.wait_ready(60)
                test.check_equal(agent.start("cat /run/nonce; cat /root/mark; echo new > /root/mark; sync; "
                                             "dd if=/dev/zero of=/dev/sda bs=64k count=1 oflag=direct status=none || "
                                             "echo no disk").wait(30).split()[:2], ["here", "before"],
                                 f"clone {number} {'of a line of its own' if own else 'as described'} has its disk")
                agent.close()
                check_mac(test, f"own-{number}", MAC[:-2] + f"{number:02x}" if own else MAC)


def check_mac(test, name, said):
    """A card's address is part of its state, whatever the line says."""
    pid = latent.stat(name)["pid"]
    test.check(f"mac={said}" in Path(f"/proc/{pid}/cmdline").read_text(), f"{name} was started with {said}")
    monitor = vm.Qmp(latent.run_dir() / name / "qmp.sock")
    test.check_equal(monitor.command("query-rx-filter")[0]["main-mac"], MAC, "and has what was saved")
    monitor.close()
    end_pid(pid)


def keep(*arguments):
    keeper = subprocess.Popen([vm.BUILD_DIR / "latent", "spare", *arguments], stdin=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    keepers.append(keeper)
    return keeper


def spares(test, directory, nonce, generation):
    """Kept, taken under a name, replaced; gone with their keeper, who takes no taken one along."""
    disks = directory / "spares"
    disks.mkdir()
    keeper = keep("--disks", disks, directory / "web", "-n", "2")

    def waiting():
        return sorted(one["name"] for one in json.loads(latent.run("ps", "--json")) if one["state"] == "spare")

    latent.wait_for("two spares", lambda: len(waiting()) == 2)
    test.check_equal(waiting(), ["web-spare-1", "web-spare-2"], "two spares wait")
    told = json.loads(latent.run("spare", "take", "--name", "mine", "--json", "web"))
    test.check_equal(told["name"], "mine", f"one is taken in {told['took_us'] / 1000:.1f} ms")
    test.check(told["took_us"] < 2000000, "which is soon")
    mine = Restored("mine")
    test.check_equal(mine.sh("cat /run/nonce"), nonce, "it was restored")
    test.check(mine.sh("latent-guest mem check m").startswith("ok"), "its memory is right")
    latent.wait_for("its rest is there", lambda: latent.stat("mine")["rest"]["state"] == "loaded")
    test.check(mine.qmp("query-vm-generation-id")["guid"] != generation, "it has a generation of its own")
    check_clock(test, mine)
    test.check_equal(json.loads((latent.run_dir() / "mine/vm.json").read_text())["name"], "mine", "vm.json has its name")
    latent.wait_for("another spare", lambda: len(waiting()) == 2)
    answer = latent.command("spare", "take", "--name", "mine", "web")
    test.check_equal(answer.returncode, latent.NAME_IN_USE, f"a name in use is refused: {answer.stderr.strip()}")
    test.check_equal(len(waiting()), 2, "and the spare goes on waiting")
    takers = [threading.Thread(target=latent.command, args=("spare", "take", "--name", name, "web"))
              for name in ("a", "b")]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join()
    both = [latent.stat("a")["pid"], latent.stat("b")["pid"]]
    test.check(both[0] != both[1], "two takers get two VMs")
    latent.wait_for("two spares again", lambda: len(waiting()) == 2)
    pids = [latent.stat(name)["pid"] for name in waiting()]
    keeper.kill()
    keeper.wait()
    for pid in pids:
        wait_gone(pid)
    test.check_equal(sorted(latent.vm_dirs()), ["a", "b", "mine"], "spares end with a keeper that was killed")
    test.check_equal(mine.sh("cat /run/nonce"), nonce, "taken ones go on")
    test.check_equal(len(list(disks.iterdir())), 3, "and only they have disks")
    test.check_equal(latent.command("spare", "take", "web").returncode, NO_VM, "there is none to take")
    for pid in both:
        end_pid(pid)
    interrupted_keeper(test, directory, disks, waiting)
    mine.end()


def interrupted_keeper(test, directory, disks, waiting):
    keeper = keep("-n", "1", "--disks", disks, directory / "web")
    latent.wait_for("a spare", lambda: len(waiting()) == 1)
    name = latent.run("spare", "take", "web").split()[0]
    taken = latent.stat(name)["pid"]
    latent.wait_for("another spare", lambda: len(waiting()) == 1)
    keeper.send_signal(signal.SIGINT)
    test.check_equal(keeper.wait(20), 0, "Ctrl-C ends the keeper")
    test.check_equal(waiting(), [], "and its spare")
    test.check(is_running(taken), "but not the one that was taken")
    end_pid(taken)


def fails(test, directory):
    """A restore that comes to nothing leaves nothing."""
    disks = directory / "failed"
    disks.mkdir()
    good = json.loads((directory / "web/manifest.json").read_text())
    bad = directory / "bad"
    shutil.copytree(directory / "web", bad, copy_function=os.link)

    def with_machine(what, word, **changes):
        (bad / "manifest.json").unlink(missing_ok=True)
        (bad / "manifest.json").write_text(json.dumps({**good, **changes}))
        for clones in ((), ("--clones", "2")):
            answer = latent.command("restore", *clones, "--disks", disks, bad)
            test.check(answer.returncode in (NO_IMAGE, REFUSED) and word in answer.stderr and
                       answer.stderr.count("\n") == 1, f"{what}: {answer.stderr.strip()}")
        test.check_equal((latent.vm_dirs(), list(disks.iterdir())), ([], []), f"{what}: nothing is left")

    def option(name, *properties):
        return {**good["machine"], "options": good["machine"]["options"] + [{"option": name, "properties": properties}]}

    with_machine("a program", "romfile", machine=option("device", ("driver", "e1000"), ("romfile", "/x")))
    with_machine("a file", "/etc/passwd", machine=option("drive", ("file", "/etc/passwd")))
    with_machine("a log", "serial", machine=option("serial", ("value", "file:/tmp/x")))
    with_machine("an option", "readconfig", machine=option("readconfig", ("value", "x")))
    with_machine("two options in one", "-bios", machine=option("net none -bios", ("value", "x")))
    with_machine("a type with more", "machine", machine={**good["machine"], "type": "q35,firmware=x"})
    del good["machine"]
    with_machine("none", "vfio-pci", machine_missing="-device vfio-pci cannot be described")
    after_exec(test, directory, disks)


def after_exec(test, directory, disks):
    """QEMU itself fails, before it has a machine, and when it loads the state of a device that is not there."""
    manifest = json.loads((directory / "web/manifest.json").read_text())
    options = manifest["machine"]["options"]
    smaller = [{"option": "m", "properties": [["size", "256M"]]} if one["option"] == "m" else one for one in options]
    fewer = [one for one in options if ["driver", "virtio-net-pci"] not in one.get("properties", [])]
    for what, changed, word in (("less RAM", smaller, "256 MiB"), ("no network card", fewer, "virtio-net")):
        (directory / "bad/manifest.json").unlink()
        (directory / "bad/manifest.json").write_text(json.dumps(
            {**manifest, "machine": {**manifest["machine"], "options": changed}}))
        answer = latent.command("restore", "--clones", "3", "--disks", disks, directory / "bad")
        test.check(answer.returncode == latent.NO_ANSWER and "did not start" in answer.stderr,
                   f"{what}: {answer.stderr.strip()}")
        latent.wait_for("all of them gone", lambda: latent.run("ps") is not None and latent.vm_dirs() == [])
        test.check_equal(list(disks.iterdir()), [], "no disk of theirs is left")
        answer = latent.command("restore", "--disks", disks, directory / "bad")
        test.check(answer.returncode == 1 and word in answer.stderr, f"and alone: {answer.stderr.strip()}")
        test.check_equal(list(disks.iterdir()), [], "no disk of it is left")
    one_in_use(test, directory, disks)


def one_in_use(test, directory, disks):
    taken = subprocess.Popen([vm.BUILD_DIR / "latent", "restore", "--name", "web-2", "--disks", directory,
                              directory / "web"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    latent.wait_for("web-2", lambda: "web-2" in latent.run("ps"))
    answer = latent.command("restore", "--clones", "3", "--disks", disks, directory / "web")
    test.check(answer.returncode == latent.NO_ANSWER and "web-2" in answer.stderr, f"{answer.stderr.strip()}")
    latent.wait_for("only the other web-2", lambda: latent.run("ps") is not None and latent.vm_dirs() == ["web-2"])
    test.check_equal(list(disks.iterdir()), [], "those that had started are ended, and no disk is left")
    taken.terminate()
    taken.wait(20)


def body(test):
    test.need_latent()
    latent.private_run_dir()
    # On the file system of the VMs' disks: these become part of the snapshots.
    directory = Path(tempfile.mkdtemp(prefix="latent-clones-"))
    try:
        nonce, generation = save(test, directory)
        one(test, directory, nonce)
        fails(test, directory)
        spares(test, directory, nonce, generation)
        same_line(test, directory, nonce)
        many_clones(test, directory, nonce, generation)
    finally:
        for keeper in keepers:
            keeper.kill()
            keeper.wait()
        latent.end_all_vms()
        shutil.rmtree(directory, ignore_errors=True)


case.main("Clones and spares are restored as described, each with what has to be its own; failures leave nothing.",
          body, timeout_s=840)
