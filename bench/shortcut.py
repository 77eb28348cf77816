# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Shortcut I/O: CPU and wall time per GiB read, cost per mapping, fractions, bytes from storage."""

import contextlib
import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

from common import guests as common
from common.guests import GuestError, host, vm
from common.result import spread

GUEST_MEM = "1G"
DISK_MIB = 64
SHORT_RUN_PAGES = 4  # of those map_us_median is taken
FULL_OPTIONS = ["--min-run", "1", "--share-threshold", "0"]

PLAIN, LATENT = "plain", "latent"
SETTINGS = {
    "full": {"episodes": 3, "n_guests": 4, "file_rounds": 3,
             "disk_rounds": 5, "map_rounds": 15, "cold_file_sides": (PLAIN, LATENT)},
    # No ratio is made of cold files; what Latent shortcuts of them is counted.
    "quick": {"episodes": 1, "n_guests": 2, "file_rounds": 0, "disk_rounds": 2, "map_rounds": 3,
              "cold_file_sides": (LATENT,)},
}

FRESH_COLD = "all files, fresh guest, cold"
FRESH_WARM = "all files, fresh guest, warm"
AGAIN_WARM = "all files again, warm"
COLD = "disk, cold"

# What is measured is read by the program that hashes it: it is faster than cat, and each measured
# read is checked.
SUMS = "/run/sums"
READ_FILES = f"{common.HASH_ALL_FILES} > {SUMS}"
READ_DISK = f"latent-guest hash /dev/{{}} > {SUMS}"
READ_DISK_DIRECT = f"dd if=/dev/{{}} bs=1M iflag=direct | latent-guest hash /proc/self/fd/0 > {SUMS}"


def run(result):
    settings = SETTINGS["quick" if result.quick else "full"]
    with common.scratch_dir() as directory:
        bench = Bench(result, settings, directory)
        bench.run_map_cost()
        for number in range(settings["episodes"]):
            result.say(f"episode {number + 1} of {settings['episodes']}: {settings['n_guests']} guests of each kind")
            bench.run_episode(is_last=number + 1 == settings["episodes"])
    bench.report()


class Bench:
    def __init__(self, result, settings, directory):
        self.result, self.settings, self.directory = result, settings, directory
        self.expected = common.golden_sums()
        self.image = common.copy_image("golden.qcow2", directory)
        self.samples = {}    # what was read: list of {PLAIN: sample, LATENT: sample}
        self.fractions = {"default": [], "full": []}
        self.misses = {}
        self.storage = []    # one entry per episode
        self.map_cost = None

    # ---- cost of a mapping ----

    def run_map_cost(self):
        program = vm.BUILD_DIR / "bench/map_cost"
        if not os.access(program, os.X_OK):
            self.result.missing.add("map_cost (not built)")
            return
        self.result.say("cost of a mapping by length")
        done = subprocess.run([program, "--json", self.image, str(self.settings["map_rounds"])],
                              stdout=subprocess.PIPE, text=True)
        self.map_cost = json.loads(done.stdout) if done.stdout else None
        self.result.check(done.returncode == 0 and self.map_cost,
                          "what was mapped and what was read is what the file holds")

    # ---- an episode: guests of both kinds, from their boot to their end ----

    def run_episode(self, is_last):
        disks = Disks(self.directory, self.settings["disk_rounds"])
        n_guests = self.settings["n_guests"]
        plains = [self.new_guest(f"plain-{i + 1}", None, disks) for i in range(n_guests)]
        latents = [self.new_guest(f"latent-{i + 1}", [], disks) for i in range(n_guests)]
        with common.running(*latents, *plains):
            pair = {PLAIN: plains[0], LATENT: latents[0]}
            self.read_fresh_cold(pair)
            self.note_fraction("default", latents[0])
            for number in range(1, n_guests):
                self.read_fresh_warm(number, {PLAIN: plains[number], LATENT: latents[number]})
            self.read_again(pair)
            self.read_disks_warm(pair, disks)
            self.read_disks_cold(pair, disks)
            with ThreadPoolExecutor() as pool:  # bytes are counted by now, and no time is taken
                full = pool.submit(self.run_full) if is_last else None
                self.count_storage(latents, plains, disks)
                if full:
                    full.result()
        disks.remove()

    def new_guest(self, name, latent, disks):
        return vm.VM(f"shortcut-{name}", image=self.image, mem=GUEST_MEM, latent=latent,
                     extra=disks.arguments(), start=False)

    def read_fresh_cold(self, pair):
        """Plain first: what Latent maps cannot be dropped again."""
        samples = {}
        for side in self.settings["cold_file_sides"]:
            pair[side].drop_guest_caches()
            stay = drop_unmapped(self.image)
            self.result.say(f"all files, first read, page cache cold ({side}; {stay * 4 >> 10} MiB of the image "
                            "stay cached, mapped by guests since their boot)")
            samples[side] = self.read_files(pair[side])
        if PLAIN in samples:
            self.add(FRESH_COLD, samples)

    def read_fresh_warm(self, number, pair):
        host.fill_page_cache(self.image)
        self.result.say(f"all files, first read, page cache warm, guests {number + 1}")
        samples = {}
        for side in in_turn(number):
            pair[side].drop_guest_caches()
            samples[side] = self.read_files(pair[side])
        self.add(FRESH_WARM, samples)

    def read_again(self, pair):
        for round_number in range(self.settings["file_rounds"]):
            self.result.say(f"all files again, guest's cache emptied, page cache warm, round {round_number + 1} of "
                            f"{self.settings['file_rounds']}")
            samples = {}
            for side in in_turn(round_number):
                pair[side].drop_guest_caches()
                samples[side] = self.read_files(pair[side])
            self.add(AGAIN_WARM, samples)

    def read_files(self, guest):
        sample = read_measured(guest, READ_FILES, "vda")
        wrong = common.wrong_files(guest.sh(f"cat {SUMS}"), self.expected)
        self.result.check(not wrong, f"{guest.name}: every file is as built (wrong: {wrong[:5]})")
        return sample

    def read_disks_warm(self, pair, disks):
        self.result.say(f"a disk of {DISK_MIB} MiB, page cache warm, {self.settings['disk_rounds']} rounds")
        host.fill_page_cache(disks.path("warm"))
        for what, command in (("disk, warm", READ_DISK), ("disk, warm, O_DIRECT", READ_DISK_DIRECT)):
            for round_number in range(self.settings["disk_rounds"]):
                samples = {}
                for side in in_turn(round_number):
                    pair[side].drop_guest_caches()
                    samples[side] = self.read_disk(pair[side], disks, "warm", command)
                self.add(what, samples)

    def read_disks_cold(self, pair, disks):
        """Each disk is read once and by one guest: what Latent maps cannot be dropped again."""
        self.result.say(f"disks of {DISK_MIB} MiB, page cache cold, {self.settings['disk_rounds']} rounds")
        for round_number in range(self.settings["disk_rounds"]):
            samples = {}
            for side in in_turn(round_number):
                name = f"{side}-{round_number}"
                host.drop_from_page_cache(disks.path(name))
                samples[side] = self.read_disk(pair[side], disks, name, READ_DISK)
            self.add(COLD, samples)

    def read_disk(self, guest, disks, name, command):
        device = disks.device(name)
        sample = read_measured(guest, command.format(device), device)
        self.check_disk([guest], disks, name)
        return sample

    def check_disk(self, guests, disks, name):
        for guest, output in zip(guests, common.run_all(guests, f"cat {SUMS}")):
            self.result.check(output.split()[0] == disks.hash(name), f"{guest.name}: the disk {name} is read right")

    # ---- bytes from storage ----

    def count_storage(self, latents, plains, disks):
        """A cold disk that all guests of a kind read at once. What one of them alone reads is known
        from the cold rounds; with cache=none each reads for itself, and one is one of them."""
        self.result.say(f"bytes from storage when {self.settings['n_guests']} guests read at once")
        one = {side: common.median(self.column(COLD, side, "storage_bytes")) for side in (PLAIN, LATENT)}
        uncached = self.storage_bytes(plains, disks, "storage-none")
        self.storage.append({
            "Latent": (one[LATENT], sum(self.storage_bytes(latents, disks, "storage-latent"))),
            "plain QEMU, page cache": (one[PLAIN], sum(self.storage_bytes(plains, disks, "storage-plain"))),
            "plain QEMU, cache=none": (common.median(uncached), sum(uncached)),
        })

    def storage_bytes(self, guests, disks, name):
        """What each guest makes the host read from storage."""
        host.drop_from_page_cache(disks.path(name))
        before = [common.storage_read_bytes(guest.pid) for guest in guests]
        common.run_all(guests, READ_DISK.format(disks.device(name)))
        after = [common.storage_read_bytes(guest.pid) for guest in guests]
        self.check_disk(guests, disks, name)
        return [then - now for then, now in zip(after, before)]

    # ---- how much is shortcut ----

    def note_fraction(self, which, guest):
        stat = common.latent_stat(guest.name)
        volume = next(v for v in stat["volumes"] if v["path"] == str(self.image))
        self.fractions[which].append(volume["bytes_shortcut"] / volume["bytes_asked"])
        self.misses[which] = {reason: miss["bytes"] for reason, miss in volume["misses"].items() if miss["bytes"]}
        self.misses[which]["asked"] = volume["bytes_asked"]
        self.misses[which]["maps"] = volume["maps"]
        self.misses[which]["mapped"] = volume["bytes_shortcut"]

    def run_full(self):
        self.result.say(f"one guest with {' '.join(FULL_OPTIONS)}")
        guest = vm.VM("shortcut-full", image=self.image, mem=GUEST_MEM, latent=FULL_OPTIONS, start=False)
        with common.running(guest):
            self.read_files(guest)
            self.note_fraction("full", guest)

    # ---- what came out ----

    def add(self, what, samples):
        self.samples.setdefault(what, []).append(samples)

    def column(self, what, side, key):
        return [pair[side][key] for pair in self.samples[what]]

    def report(self):
        result = self.result
        self.report_times()
        self.report_fractions()
        self.report_storage()
        self.report_map_cost()
        for kind in ("cpu", "wall"):
            for suffix, what in (("warm", FRESH_WARM), ("warm_again", AGAIN_WARM)):
                if what not in self.samples:  # not tried by a quick run
                    continue
                result.ratio(f"plain_{kind}_over_latent_{kind}_{suffix}",
                             *(self.column(what, side, f"{kind}_s") for side in (PLAIN, LATENT)))
        result.ratio("plain_wall_over_latent_wall_cold",
                     *(self.column(COLD, side, "wall_s") for side in (PLAIN, LATENT)))

    def report_times(self):
        def per_gib(what, side, key):
            return spread([pair[side][key] / pair[side]["gib"] for pair in self.samples[what]], 2)

        def median_ratio(what, key):
            pairs = [p / l for p, l in zip(self.column(what, PLAIN, key), self.column(what, LATENT, key))]
            return spread(pairs, 2)

        self.result.table(
            "Seconds per GiB read by the guest: median (lowest-highest) of pairs",
            ["", "pairs", "CPU plain", "CPU Latent", "plain/Latent", "wall plain", "wall Latent", "plain/Latent"],
            [[what, len(pairs), per_gib(what, PLAIN, "cpu_s"), per_gib(what, LATENT, "cpu_s"),
              median_ratio(what, "cpu_s"), per_gib(what, PLAIN, "wall_s"), per_gib(what, LATENT, "wall_s"),
              median_ratio(what, "wall_s")] for what, pairs in self.samples.items()])
        self.result.note(f"""\
CPU is that of the whole QEMU process, the guest's own work (reading, hashing, emulation under TCG)
included. The ratios "warm" are those of "{FRESH_WARM}", "warm_again" those of
"{AGAIN_WARM}", "cold" that of "{COLD}". Cold files: some pages of the image
stay cached, as the boot mapped them.
Debian's kernel zeroes a page when it allocates it (init_on_alloc): in RAM that maps the image, each
page that is read again costs a copy on write first. O_DIRECT reads go to the same, scattered pages.""")

    def report_fractions(self):
        rows = []
        for which, misses in self.misses.items():
            reasons = ", ".join(f"{reason} {bytes_ / misses['asked'] * 100:.2f} %"
                                for reason, bytes_ in misses.items() if reason not in ("asked", "maps", "mapped"))
            rows.append([f"{which} options", spread([f * 100 for f in self.fractions[which]], 2) + " %",
                         f"{misses['asked'] >> 20}", misses["maps"],
                         f"{misses['mapped'] / 4096 / misses['maps']:.1f}" if misses["maps"] else "", reasons])
        self.result.table("Bytes of the image shortcut by a fresh guest, boot and all files",
                          ["", "shortcut", "MiB asked", "mappings", "pages each", "not shortcut"], rows)
        for which, fractions in self.fractions.items():
            self.result.metric(f"shortcut_fraction_{which}", common.median(fractions))

    def report_storage(self):
        n_guests = self.settings["n_guests"]

        def row(what):
            one = common.median([figures[what][0] for figures in self.storage])
            n = common.median([figures[what][1] for figures in self.storage])
            return [what, f"{one / 2**20:.1f}", f"{n / 2**20:.1f}", f"{n / one:.2f}" if one else ""]

        self.result.table(f"MiB read from storage when a cold disk of {DISK_MIB} MiB is read",
                          ["", "by one guest", f"by {n_guests} guests at once", f"{n_guests} / 1"],
                          [row(what) for what in self.storage[0]])
        self.result.metric("storage_bytes_n_over_one", common.median(
            [figures["Latent"][1] / figures["Latent"][0] for figures in self.storage]))

    def report_map_cost(self):
        if not self.map_cost:
            return
        kinds = [("shortcut", "shortcut"), ("map_untouched", "map, untouched"), ("map_touched", "map, touched"),
                 ("map_overlay", "map, overlay"), ("first_look", "first look"),
                 ("read_untouched", "read, untouched"), ("read_touched", "read, touched")]
        lengths = self.map_cost["lengths_pages"]
        self.result.table(
            "Microseconds for a run of pages: median (10 %-90 %)", ["pages", *(title for _, title in kinds)],
            [[n, *("{1:.1f} ({0:.1f}-{2:.1f})".format(*self.map_cost[f"{key}_us"][i]) for key, _ in kinds)]
             for i, n in enumerate(lengths)])
        self.result.note(f"""\
shortcut: a read of the image as VMs make it, into RAM that holds nothing; {self.map_cost["mapped_reads"]} of
{self.map_cost["shortcut_reads"]} were mapped. map: of that the mapping with its accounting, over RAM that holds nothing, that the
guest has written, or that is an overlay already; first look: the guest's first access to each page; read: pread
of the same.""")
        for metric, key in (("map_us_median", "map_untouched"), ("shortcut_us_median", "shortcut")):
            self.result.metric(metric, common.median(
                [self.map_cost[f"{key}_us"][i][1] for i, n in enumerate(lengths) if n <= SHORT_RUN_PAGES]))
        self.result.line_plot("Cost of a run by its length", "pages", "us", lengths,
                              {title: [q[1] for q in self.map_cost[f"{key}_us"]] for key, title in kinds})


# ---- disks full of random data ----

class Disks:
    """Read-only disks for guests: each is read cold once. Attached in the order of their making."""

    def __init__(self, directory, n_rounds):
        self.directory = directory
        names = ["warm", *(f"{side}-{i}" for i in range(n_rounds) for side in (PLAIN, LATENT))]
        names += ["storage-latent", "storage-plain", "storage-none"]
        self.names = names
        self.hashes = {}
        for name in names:
            self._make(name)

    def _make(self, name):
        with open(self.path(name), "wb") as file:
            file.write(os.urandom(DISK_MIB << 20))
            file.flush()
            os.fsync(file.fileno())

    def path(self, name):
        return self.directory / f"{name}.raw"

    def device(self, name):
        """The guest's name for it: vda is the root."""
        return "vd" + "bcdefghijklmnopqrstuvwxyz"[self.names.index(name)]

    def hash(self, name):
        """By the guest's program, on the host."""
        if name not in self.hashes:
            output = subprocess.run([common.golden("latent-guest"), "hash", self.path(name)],
                                    stdout=subprocess.PIPE, text=True, check=True).stdout
            self.hashes[name] = output.split()[0]
        return self.hashes[name]

    def arguments(self):
        words = []
        for name in self.names:
            cache = ",cache=none" if name == "storage-none" else ""
            words += ["-drive", f"file={self.path(name)},if=none,id={name},format=raw,readonly=on{cache}",
                      "-device", f"virtio-blk-pci,drive={name}"]
        return words

    def remove(self):
        for name in self.names:
            with contextlib.suppress(OSError):
                self.path(name).unlink()


# ---- helpers ----

def in_turn(round_number):
    return (PLAIN, LATENT) if round_number % 2 == 0 else (LATENT, PLAIN)


def read_measured(guest, command, device):
    """CPU and wall time of QEMU around a guest's read, and what the guest read from its disk."""
    sectors_before, storage_before = sectors_read(guest, device), common.storage_read_bytes(guest.pid)
    cpu_before_s, start_s = common.cpu_clock_s(guest.pid), time.monotonic()
    guest.sh(command, timeout=300)
    cpu_s, wall_s = common.cpu_clock_s(guest.pid) - cpu_before_s, time.monotonic() - start_s
    gib = (sectors_read(guest, device) - sectors_before) * 512 / 2**30
    if gib <= 0:
        raise GuestError(f"{guest.name} read nothing from {device}: was its cache not empty?")
    return {"cpu_s": cpu_s, "wall_s": wall_s, "gib": gib,
            "storage_bytes": common.storage_read_bytes(guest.pid) - storage_before}


def sectors_read(guest, device):
    return int(guest.sh(f"cat /sys/block/{device}/stat").split()[2])


def drop_unmapped(path):
    """Drops what can go; returns the pages that stay."""
    host.drop_from_page_cache(path, may_remain_pages=1 << 60)
    return host.cached_pages(path)
