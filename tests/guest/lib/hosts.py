# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Two network namespaces as two hosts, with a link between them that is as fast as is asked for."""

import contextlib
import os
import shutil
import subprocess

from .agent import GuestError

BURST = "256kb"
QUEUE_MS = 50


class Host:
    """One end of the link: `before` are the words before a command that runs there."""

    def __init__(self, number):
        self.name = f"latent-{os.getpid()}-{number}"
        self.device = f"lt{os.getpid() % 100000}-{number}"
        self.address = f"10.93.71.{number + 1}"
        self.before = ["nsenter", f"--net=/run/netns/{self.name}"]

    def bytes_sent(self):
        """By the link's device, headers and all."""
        path = f"/sys/class/net/{self.device}/statistics/tx_bytes"
        # sysfs shows the namespace that it was mounted in.
        return int(_run("ip", "netns", "exec", self.name, "cat", path))


def why_not():
    """Why there can be no such link here, or None."""
    for tool, package in (("ip", "iproute2"), ("tc", "iproute2"), ("nsenter", "util-linux")):
        if shutil.which(tool) is None:
            return f"{tool} is not installed ({package})"
    if os.geteuid() != 0:
        return "network namespaces are root's to make"
    return None


@contextlib.contextmanager
def shaped(mbit_s):
    """Two Hosts; all that belongs to them is gone at the end."""
    reason = why_not()
    if reason:
        raise GuestError(f"there is no link to measure on: {reason}")
    hosts = Host(0), Host(1)
    try:
        for host in hosts:
            _run("ip", "netns", "add", host.name)
        _run("ip", "link", "add", hosts[0].device, "netns", hosts[0].name, "type", "veth",
             "peer", "name", hosts[1].device, "netns", hosts[1].name)
        for host in hosts:
            _set_up(host, mbit_s)
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.name], stderr=subprocess.DEVNULL, check=False)


def _set_up(host, mbit_s):
    _run("ip", "-n", host.name, "address", "add", f"{host.address}/24", "dev", host.device)
    _run("ip", "-n", host.name, "link", "set", host.device, "up")
    _run("ip", "-n", host.name, "link", "set", "lo", "up")
    _run("tc", "-n", host.name, "qdisc", "add", "dev", host.device, "root", "tbf", "rate", f"{mbit_s}mbit", "burst", BURST,
         "latency", f"{QUEUE_MS}ms")


def _run(*words):
    answer = subprocess.run(words, capture_output=True, text=True)
    if answer.returncode:
        raise GuestError(f"{' '.join(words)}: {answer.stderr.strip()}")
    return answer.stdout
