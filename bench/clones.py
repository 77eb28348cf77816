# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Eight clones of one saved guest at once: latent restore against QEMU's -incoming, time and memory."""

import time

from common import guests as common
from common import restores
from common.guests import GuestError, host, vm
from common.progress import mib
from common.result import spread

MEM = "1G"
N_CLONES = 8
ROUNDS = {"full": 5, "quick": 1}
SETTLE_S = 2.0  # from the last answer to the look at memory

WAYS = {"latent": restores.latent, "qemu": restores.qemu_incoming}  # how each is prepared


def run(result):
    rounds = ROUNDS["quick" if result.quick else "full"]
    samples = {way: [] for way in WAYS}
    with common.scratch_dir() as directory, restores.directories_in(directory):
        saved = restores.Saved(directory, common.copy_image("golden.qcow2", directory), "clones", MEM)
        result.say(f"a guest of {MEM} boots, is filled and saved")
        with common.running(saved.guest):
            saved.save(whole=True)
            restores.learn(saved)
            for number in range(rounds):
                for way in in_turn(number):
                    result.say(f"round {number + 1} of {rounds}: {N_CLONES} clones, {way}")
                    saved.warm()
                    samples[way].append(run_clones(result, saved, way))
    report(result, samples)


def in_turn(number):
    return list(WAYS) if number % 2 == 0 else list(WAYS)[::-1]


def run_clones(result, saved, way):
    guests = [restores.prepare(WAYS[way], saved, f"clone-{i + 1}") for i in range(N_CLONES)]
    try:
        start(saved, guests, way)
        restores.wait_answers(guests)
        begin_ns = guests[0].begin_ns
        figures = {"first_ms": (min(guest.answer_ns for guest in guests) - begin_ns) / 1e6,
                   "all_ms": (max(guest.answer_ns for guest in guests) - begin_ns) / 1e6}
        time.sleep(SETTLE_S)
        figures.update(measure_memory(result, guests, way))
        return figures
    except GuestError:
        for guest in guests:
            guest.diagnose()
        raise
    finally:
        common.end_all(guests)


def start(saved, guests, way):
    if way == "latent":
        restores.latent_clones(saved, guests)
    else:
        for guest in guests:
            WAYS[way](saved, guest)


def measure_memory(result, guests, way):
    """All stand still. The last one goes on, is checked and ends: what the others have then is seven clones' memory."""
    *others, last = guests
    with vm.stopped(others):
        with vm.stopped([last]):
            figures = common.sum_memory_kib(guests)
        check(result, [last], way)
        last.kill9()
        figures["extra"] = figures["total"] - host.total_pss_kib([guest.pid for guest in others])
    check(result, others, way)
    return figures


def check(result, guests, way):
    jobs = [guest.sh_start("latent-guest mem check m") for guest in guests]
    for guest, job in zip(guests, jobs):
        result.check(job.wait(120, check=False).startswith("ok"), f"{way}: memory of {guest.name} is right")


ROWS = (("guest RAM", "ram"), ("  private copies", "ram_private"), ("  the VM's own memory file", "ram_memfd"),
        ("  pages of files", "ram_image"), ("QEMU's own", "own"), ("total (sum of Pss)", "total"),
        ("one clone more", "extra"))


def report(result, samples):
    def column(way, key):
        return [figures[key] for figures in samples[way]]

    result.ratio("qemu_time_over_latent", column("qemu", "all_ms"), column("latent", "all_ms"))
    result.ratio("qemu_pss_over_latent", column("qemu", "total"), column("latent", "total"))
    result.metric("extra_clone_mib", common.median(column("latent", "extra")) / 1024)
    written = [figures["ram_private"] + figures["ram_memfd"] for figures in samples["latent"]]
    result.metric("written_mib_per_clone", common.median(written) / 1024 / N_CLONES)
    result.metric("own_mib_per_clone", common.median(column("latent", "own")) / 1024 / N_CLONES)
    result.table(f"{N_CLONES} clones at once, page cache warm", ["", *WAYS],
                 [[title, *(spread(column(way, key)) for way in WAYS)]
                  for title, key in (("first answer of the first, ms", "first_ms"), ("of the last, ms", "all_ms"))]
                 + [[f"MiB: {title}" if title[0] != " " else title, *(mib(common.median(column(way, key))) for way in WAYS)]
                    for title, key in ROWS])
    result.note(f"""\
Latent's are started by one `latent restore --clones {N_CLONES}`, QEMU's one right behind the other; times are from the first start. Memory is that of the processes, {SETTLE_S:.0f} s
after the last answer, while the guests stand still; each holds {restores.HELD_MIB} MiB that it has not looked at, all of which is
checked afterwards. A page of a file that n clones map counts 1/n in each. One clone more: what goes away with the
eighth. QEMU's -incoming reads a whole migration, from a file.""")
