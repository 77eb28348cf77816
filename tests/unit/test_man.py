#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Every command and option has its place in a manual page, and no page tells of one that is gone."""

import pathlib
import re
import shutil
import subprocess

import cheap
from cheap import LATENT, check

SOURCE = pathlib.Path(__file__).resolve().parents[2]
PAGES = SOURCE / "docs" / "man"


def latent(*arguments):
    done = subprocess.run([LATENT, *arguments], capture_output=True, text=True, check=False)
    check(done.returncode == 0, f"latent {' '.join(arguments)}: exit status {done.returncode}")
    return done.stdout


def commands():
    """The names in the table that `latent help` prints."""
    table = latent("help").split("Commands:\n")[1].split("\n\n")[0]
    return [line.split()[0] for line in table.splitlines()]


def documented_options(page):
    """Those with an item of their own."""
    return set(re.findall(r"^\.It Fl -([a-z-]+)", page, re.MULTILINE))


def check_command(name):
    help_text = latent(name, "--help")
    check(latent("help", name) == help_text, f"latent help {name} differs from latent {name} --help")
    path = PAGES / f"latent-{name}.1"
    if not path.exists():
        check(False, f"{path} is missing")
        return
    page = path.read_text()
    options = set(re.findall(r"^  --([a-z-]+)", help_text, re.MULTILINE))
    for option in sorted(options - documented_options(page)):
        check(False, f"{path.name} does not describe --{option}")
    for option in sorted(documented_options(page) - options):
        check(False, f"{path.name} describes --{option}, which latent {name} does not have")
    synopsis = page.split(".Sh DESCRIPTION")[0]
    for option in sorted(options - {"help"}):
        check(f"Fl -{option}" in synopsis, f"the synopsis of {path.name} lacks --{option}")


def check_overview(names):
    page = (PAGES / "latent.1").read_text()
    for name in names:
        check(f".It Cm {name}\n" in page, f"latent.1 does not list the command {name}")
    header = (SOURCE / "src" / "cli" / "cli.h").read_text()
    for status in re.findall(r"^\tCLI_[A-Z_]+ = (\d+)", header, re.MULTILINE):
        check(f".It {status}\n" in page, f"latent.1 does not list exit status {status}")


def check_miss_reasons():
    page = (PAGES / "latent-stat.1").read_text()
    source = (SOURCE / "src" / "cli" / "stat.c").read_text()
    for key in re.findall(r'\[MISS_[A-Z_]+\] = \{ "([a-z_]+)"', source):
        check(f".It {key}\n" in page, f"latent-stat.1 does not explain the reason {key}")


def check_markup():
    if not shutil.which("mandoc"):
        return
    for path in sorted(PAGES.glob("*.1")):
        done = subprocess.run(["mandoc", "-T", "lint", "-W", "warning", path], capture_output=True, text=True,
                              check=False)
        check(done.returncode == 0, done.stdout.strip())


def body(_):
    names = commands()
    for name in names:
        if name not in ("help", "version"):
            check_command(name)
    check_overview(names)
    check_miss_reasons()
    check_markup()


if __name__ == "__main__":
    cheap.main(body)
