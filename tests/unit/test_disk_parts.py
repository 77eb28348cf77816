#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""A disk, or a file beneath it, that is a part of a file cannot be in a snapshot: a save says so, and nothing is left."""

import sys

import light_vm
from light_vm import check

PART = "driver=raw,offset=65536,size=262144,file.driver=file,file.filename={0}/image.raw"
WAYS = {"the disk itself": PART,
        "what lies beneath": "driver=qcow2,file.driver=file,file.filename={0}/disk.qcow2," +
                             ",".join(f"backing.{word}" for word in PART.split(",")),
        "its own metadata": "driver=qcow2,file.driver=raw,file.offset=0,file.file.driver=file,file.file.filename={0}/disk.qcow2"}


class PartOfFile(light_vm.Place):
    def __init__(self, name, directory, drive):
        super().__init__(name, directory)
        self.drive = drive

    def line(self):
        return [word if ",if=none" not in word else f"{self.drive.format(self.directory)},if=none,id=disk"
                for word in super().line()]


def refused(place, what):
    before = sorted(place.directory.iterdir())
    process = place.start("save", place.name, place.directory / "snapshot")
    _, said = process.communicate(timeout=light_vm.TIMEOUT_S)
    check(process.returncode and "part of a file" in said and "--no-disk" in said, f"{what}: {process.returncode} {said}")
    check(sorted(place.directory.iterdir()) == before, f"{what}: nothing is left")


def body():
    with light_vm.two_places() as places:
        if not places:
            return light_vm.SKIPPED
        for number, (what, drive) in enumerate(WAYS.items()):
            place = PartOfFile(f"part{number}", places[0].directory, drive)
            place.run()
            refused(place, what)
            light_vm.end_what_is_left([place])
    return 1 if light_vm.failures else 0


sys.exit(body())
