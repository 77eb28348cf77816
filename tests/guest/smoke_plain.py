#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""The golden image under plain QEMU: the ground that every other guest test stands on."""

from lib import case, vm
from lib.vm import VM

SHA_FILES = "/usr/lib/python3.11/"  # of all files it would take a minute; the fast hashes are of all
HASH_FILES = f"find {SHA_FILES} -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum"
N_NEW_FILES = 20
WRITE_NEW_FILES = f"""set -e
mkdir /new
for i in $(seq {N_NEW_FILES}); do head -c $((i * 100000)) /dev/urandom > /new/$i; done
cp -a /usr/share/perl /new/perl
sha256sum /new/* 2>/dev/null > /run/new.sha256 || true
sync
echo 3 > /proc/sys/vm/drop_caches
"""


def parse_sums(text):
    return {path: digest for digest, path in (line.split("  ", 1) for line in text.splitlines())}


def check_contents(test, guest):
    expected = parse_sums((vm.images_dir() / "golden.sha256").read_text())
    expected = {path: digest for path, digest in expected.items() if path.startswith(SHA_FILES)}
    with test.time(f"sha256 of {SHA_FILES}, cold"):
        found = parse_sums(guest.sh(HASH_FILES, timeout=180))
    differing = sorted(path for path in expected.keys() | found.keys()
                       if expected.get(path) != found.get(path))
    test.check_equal(differing, [], f"{len(expected)} files are as built")


def check_fast_hashes(test, guest):
    expected = parse_sums((vm.images_dir() / "golden.hash64").read_text())
    guest.drop_guest_caches()
    with test.time("hash64 of all files, guest cache cold"):
        text = guest.sh("latent-guest hash -r /", timeout=180)
    found = {path.replace("//", "/"): digest for path, digest in parse_sums(text).items()}
    test.check_equal({p: d for p, d in found.items() if not p.startswith("/lost+found")}, expected,
                     "the fast hashes agree")


def check_writes(test, guest):
    guest.sh(WRITE_NEW_FILES, timeout=120)
    output = guest.sh("sha256sum -c /run/new.sha256", timeout=120)
    test.check_equal(output.count(": OK"), N_NEW_FILES, "new files read back from disk")
    guest.sh("diff -r /usr/share/perl /new/perl")
    test.check("trimmed" in guest.sh("rm -r /new && fstrim -v /"), "the disk can be trimmed")


def check_memory(test, guest):
    test.check(guest.sh("latent-guest mem hold m 64 7 mixed").startswith("ok"), "64 MiB are held")
    guest.sh("latent-guest mem churn m 0 4096 2 0")
    test.check(guest.sh("latent-guest mem check m").startswith("ok"), "and right after churn")
    guest.sh("latent-guest mem free m")


def check_agent(test, guest):
    try:
        guest.sh("echo no; exit 3")
        test.check(False, "a failing command raises")
    except case.vm.GuestError as error:
        test.check_equal((error.status, error.output), (3, "no\n"), "a failing command raises")
    slow = guest.sh_start("sleep 2; echo slow")
    test.check_equal(guest.sh("echo quick"), "quick\n", "commands run beside each other")
    test.check_equal(slow.wait(), "slow\n", "and end in their own time")
    data = bytes(range(256)) * 200
    guest.put(data, "/run/data")
    size = guest.sh("wc -c < /run/data; rm /run/data").strip()
    test.check_equal(int(size), len(data), "small files can be put into the guest")


def body(test):
    with VM("smoke") as guest:
        test.say(f"boot to ready: {guest.wait_ready():.2f} s")
        check_agent(test, guest)
        check_contents(test, guest)
        check_fast_hashes(test, guest)
        check_writes(test, guest)
        check_memory(test, guest)
        ram = guest.ram_kib()
        test.check(ram["private"]["rss_kib"] > 300 << 10, f"plain guest RAM is private memory: {ram}")
        guest.kill9()
        guest.start()
        test.say(f"boot after SIGKILL: {guest.wait_ready():.2f} s")
        guest.shutdown()
        test.check(not guest.alive(), "the guest powers off")


case.main("The golden image boots, reads, writes and powers off under plain QEMU.", body, timeout_s=600)
