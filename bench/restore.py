# SPDX-License-Identifier: BSD-2-Clause-Patent
"""From the command to a guest that answers: latent restore, QEMU's -incoming, and the ways of papers, warm and cold."""

import time
from concurrent.futures import ThreadPoolExecutor

from common import guests as common
from common import restores
from common.result import spread

MEM, BIG_MEM = "1G", "4G"
ROUNDS = {"full": 9, "quick": 2}

LATENT, FIRST, SPARE, BIG = "latent", "latent_first", "spare", "latent 4 GiB"
INCOMING, PRIVATE, DEMAND, REAP = "qemu_incoming", "private_map", "uffd_demand", "reap"
WAYS = {LATENT: restores.latent, FIRST: restores.latent_first, SPARE: restores.spare, INCOMING: restores.qemu_incoming, PRIVATE: restores.private_map,
        DEMAND: restores.uffd_demand, REAP: restores.reap, BIG: restores.latent}
WARM, COLD = "warm", "cold"
STARTS = {WARM: (LATENT, INCOMING, SPARE, PRIVATE, BIG), COLD: (LATENT, INCOMING, PRIVATE, DEMAND, REAP, FIRST)}
# The contract's: the other way, ours, the page cache.
RATIOS = ((INCOMING, LATENT, WARM), (INCOMING, LATENT, COLD), (INCOMING, SPARE, WARM), (PRIVATE, LATENT, WARM),
          (PRIVATE, LATENT, COLD), (DEMAND, LATENT, COLD), (REAP, LATENT, COLD), (INCOMING, FIRST, COLD), (PRIVATE, FIRST, COLD))


def run(result):
    rounds = ROUNDS["quick" if result.quick else "full"]
    with common.scratch_dir() as directory, restores.directories_in(directory):
        image = common.copy_image("golden.qcow2", directory)
        small, big = (restores.Saved(directory, image, name, mem) for name, mem in (("1g", MEM), ("4g", BIG_MEM)))
        bench = Bench(result, small, big)
        result.say(f"guests of {MEM} and {BIG_MEM} boot, are filled and saved")
        with common.running(small.guest, big.guest):
            both_at_once(lambda: small.save(whole=True), lambda: big.save(whole=False))
            bench.record()
            for cache in STARTS:  # what is warm stays so until all warm starts are done
                for number in range(rounds):
                    result.say(f"{cache}, round {number + 1} of {rounds}")
                    bench.run_round(cache, number)
        bench.report()
        bench.report_recall()


class Bench:
    def __init__(self, result, small, big):
        self.result, self.small, self.big = result, small, big
        self.samples = {(way, cache): [] for cache, ways in STARTS.items() for way in ways}
        self.demanded = self.learned = None

    def record(self):
        """What the ways of papers need."""
        self.result.say("a guest on demand is watched for a second")
        restores.write_complete_ram(self.small)
        self.demanded, right = self.small.record()
        self.result.check(right, "memory of the guest that was watched is right")
        self.learned = restores.learn(self.small)
        restores.learn(self.big)

    def run_round(self, cache, number):
        if cache == WARM:
            self.small.warm()
            self.big.warm()
        for way in in_turn(STARTS[cache], number):
            if cache == COLD:
                self.small.cool()
            self.start(way, cache)

    def start(self, way, cache):
        saved = self.big if way == BIG else self.small
        with restores.started(WAYS[way], saved, f"restore-{way.split()[0]}") as guest:
            if way in (DEMAND, REAP):
                restores.read_data(saved.ram)  # page by page the check would take many seconds
            right = restores.memory_is_right(guest)
            checked_ms = (time.monotonic_ns() - guest.begin_ns) / 1e6
        self.result.check(right, f"{way}, {cache}: the guest's memory is right")
        self.samples[way, cache].append((guest.answer_ms(), checked_ms))
        self.result.tick(f"{way}, {cache}: {guest.answer_ms():.0f} ms")

    def answers(self, way, cache):
        return [answer_ms for answer_ms, _ in self.samples[way, cache]]

    def report(self):
        result = self.result
        for other, ours, cache in RATIOS:
            result.ratio(f"{other}_over_{ours}_{cache}", self.answers(other, cache), self.answers(ours, cache))
        for ours, cache in ((LATENT, WARM), (LATENT, COLD), (FIRST, COLD), (SPARE, WARM)):
            result.metric(f"{ours}_{cache}_ms", common.median(self.answers(ours, cache)))
        result.metric("time_4g_over_1g", common.median(
            [big / small for big, small in zip(self.answers(BIG, WARM), self.answers(LATENT, WARM))]))
        result.table(f"A saved guest of {MEM} starts again, ms: median (lowest-highest)",
                     ["page cache, way", "first answer", "all it holds checked", "starts"],
                     [[f"{cache}, {way}", spread(self.answers(way, cache)),
                       spread([checked_ms for _, checked_ms in samples]) if cache == WARM else "", len(samples)]
                      for (way, cache), samples in self.samples.items()])
        result.note(f"""\
First answer: from the start of the command to the second line that the guest prints by itself; it prints one each
millisecond, and the host sleeps in the kernel until they come. Checked: from the same start until the guest has read
and verified the {restores.HELD_MIB} MiB that it holds, by a command sent after the answer (after cold starts it is
checked, too). latent: a snapshot that has been restored on this host before, so that what that asked for beside the
active set is known; latent_first: one that has not. Latent's time has its checks and the making of an overlay disk in it; the others' disks are made
beforehand. All have one command line, without -kernel. spare: `latent spare take` of a machine that waits.
qemu_incoming: migrate-incoming fd: of a whole migration. The others load the device state alone, and have RAM in one
complete file: private_map maps it MAP_PRIVATE; uffd_demand reads a page for each userfault; reap does, too, but first
installs the pages that such a guest had asked for until a second after its first answer, from one packed file. QEMU
finds all orders in its monitor's socket. Cold: nothing of what was saved, nor of the disk's image, is in the page
cache (mincore); QEMU itself stays there.""")

    def report_recall(self):
        """How much of what a guest asks for in its first second the snapshot had predicted."""
        needed = self.small.with_contents(self.demanded)
        rows = [["asked for until a second after the first answer", len(self.demanded)],
                ["of these not zero: what has to be brought", len(needed)]]
        active = self.small.active_set()
        if active is None:
            self.result.missing.add("the active set of a snapshot")
        else:
            self.result.metric("active_set_recall", len(self.demanded & active) / len(self.demanded))
            self.result.metric("active_set_recall_not_zero", len(needed & active) / len(needed))
            self.result.metric("active_set_pages", len(active))
            rows += [["in the snapshot's active set", len(active)],
                     ["asked for and in it", len(self.demanded & active)],
                     ["of these not zero", len(needed & active)],
                     ["learned by the first restore", len(self.learned)],
                     ["asked for and in one of the two", len(self.demanded & (active | self.learned))]]
            self.result.metric("active_set_recall_learned", len(self.demanded & (active | self.learned)) / len(self.demanded))
        if self.result.env["accel"] == "tcg":
            self.result.note("""\
Under TCG a guest's code is read when QEMU translates it, and not when it runs. So the save of a running guest does not
see the pages that its code is in, and QEMU, started anew, asks for all of them. The first restore learns which they are.""")
        self.result.table("The first second of a guest", ["", "pages"], rows)


def both_at_once(one, other):
    with ThreadPoolExecutor() as pool:
        for job in [pool.submit(one), pool.submit(other)]:
            job.result()


def in_turn(ways, number):
    return ways if number % 2 == 0 else ways[::-1]
