#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Pages are hot, warm and cold as the guest uses them, in a fresh and in a restored VM; nothing is lost by looking."""

import collections
import json
import shutil
import struct
import tempfile
import time
import zlib
from pathlib import Path

from lib import activity, case, latent, vm
from lib.vm import VM

EVERYTHING = ["--min-run", "1", "--share-threshold", "0"]
MEM = "512M"
PERIOD_S = 4
AREA_MIB = 20
LOOKS, MORE_LOOKS = 3, 4
ENOUGH = 0.95
USAGE, NO_VM, SYSTEM, NO_ANSWER = 64, 67, 71, 75
RED = (255, 0, 0)  # hot pages in a picture; src/cli/heat.c


def say_counts(test, counts):
    for (area, source), by_class in sorted(counts.items()):
        test.say(f"{area:8} {source:6} {by_class}")


def told_scores(scores, sources):
    """(source, class, score) of what there is enough of."""
    return [(source, kind, score) for source in sources for kind, score in scores.get(source, {}).items() if score.so > 500]


def is_enough(score):
    return score.precision >= ENOUGH and score.recall >= ENOUGH


def check_scores(test, guest, areas, what, sources=("base",)):
    """On a busy machine the guest may not have used in time what it uses: then it is looked at for some passes more. What
    the scan itself does not see stays unseen in all of them. Returns the scan's figures."""
    for passes in range(1 + MORE_LOOKS):
        figures = activity.wait_passes(guest, 1) if passes else activity.scan(guest)
        scores, counts = areas.scores()
        if all(is_enough(score) for _, _, score in told_scores(scores, sources)):
            break
    test.say(f"{figures['passes']} passes:")
    say_counts(test, counts)
    told = told_scores(scores, sources)
    test.check_equal({kind for _, kind, _ in told}, {"hot", "cold"}, f"{what}: there is enough of both to be judged")
    for source, kind, score in told:
        test.check(is_enough(score), f"{what}, {source}, {kind}: {score}")
    return figures


def check_costs(test, figures):
    gib = vm.parse_bytes(MEM) / (1 << 30)
    share = figures["pass_cpu_ns_now"] / 1e9 / 10 / gib
    test.check(share < 0.01, f"a pass takes {figures['pass_cpu_ns_now'] / 1e6:.1f} ms: at 10 s {share:.2%} of a CPU per GiB")
    test.say(f"lock held for {figures['hold_max_us']} us at most, over 2 ms {figures['holds_over_2ms']} times "
             f"of {figures['holds']}")
    # Of the processor's time: on a busy machine whoever holds a lock may have to wait for a processor. A hold of which the
    # host takes a part away is charged with it, but does not come back at the same place in each pass. (bench/activity
    # reports the longest of all.)
    over = figures["holds_over_2ms_cpu"]
    test.check(over < figures["passes"] and over <= 0.02 * figures["holds"],
               f"the lock is held for {figures['hold_max_cpu_us']} us of the processor's time at most, "
               f"over 2 ms {over} times of {figures['holds']} in {figures['passes']} passes")


def bad_input(test, guest):
    for words, status in ((["--period", "0"], USAGE), (["--period", "-3"], USAGE), (["--period", "1e30"], USAGE),
                          (["--period", "soon"], USAGE), ([], USAGE), (["on"], USAGE)):
        answer = latent.command("scan", guest.name, *words)
        test.check(answer.returncode == status and len(answer.stderr.splitlines()) == 1,
                   f"scan {' '.join(words)}: {answer.stderr.strip()}")
    test.check_equal(latent.command("scan", "nobody", "off").returncode, NO_VM, "a VM that is not there")


# ---- to see it ----

def read_png(path):
    """(width, height, {colour: pixels}) of an image with a palette; checks the sum of each chunk."""
    data = Path(path).read_bytes()
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError("no PNG")
    chunks, at = collections.defaultdict(bytes), 8
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunks[kind] += data[at + 8:at + 8 + length]
        if zlib.crc32(data[at + 4:at + 8 + length]) != struct.unpack_from(">I", data, at + 8 + length)[0]:
            raise ValueError(f"{kind}: wrong sum")
        at += 12 + length
    width, height, bits, colour_type = struct.unpack_from(">IIBB", chunks[b"IHDR"])
    if colour_type != 3 or b"IEND" not in chunks:
        raise ValueError(f"colour type {colour_type}")
    counts = count_indices(zlib.decompress(chunks[b"IDAT"]), width, height, bits)
    palette = list(struct.iter_unpack("3B", chunks[b"PLTE"]))
    return width, height, {palette[index]: count for index, count in counts.items()}


def count_indices(lines, width, height, bits):
    """Pixels by colour; each line begins with the number of a filter, of which None (0) and Up (2) are undone here."""
    row_bytes, counts = (width * bits + 7) // 8, collections.Counter()
    before = bytes(row_bytes)
    for row in range(height):
        kind, line = lines[row * (row_bytes + 1)], lines[row * (row_bytes + 1) + 1:(row + 1) * (row_bytes + 1)]
        if kind not in (0, 2):
            raise ValueError(f"filter {kind}")
        before = line if kind == 0 else bytes((a + b) & 255 for a, b in zip(line, before))
        indices = (byte >> shift & (1 << bits) - 1 for byte in before for shift in range(8 - bits, -1, -bits))
        counts.update(index for _, index in zip(range(width), indices))
    return counts


def heat(guest, *options):
    return json.loads(latent.run("heat", guest.name, "--json", *options))


def seen_as_table(test, guest):
    """With nobody looking the map is the table's, page for page."""
    heat(guest)  # by now it is known which pages are copies
    table = collections.Counter((activity.source_of(entry), activity.class_of(entry))
                                for entry in activity.entries(guest))
    found = heat(guest)
    names = {"base": "base", "masked": "base", "overlay": "clean", "private": "copy"}
    mapped = collections.Counter()
    for source, by_class in found["pages_now"].items():
        for kind, pages in by_class.items():
            mapped[names[source], kind] += pages
    test.check_equal({key: n for key, n in mapped.items() if n}, dict(table), "pages by source and class are the table's")
    cells = [cell for block in found["blocks"] for cell in block["cells"]]
    test.check_equal([sum(column) for column in zip(*cells)],
                     [sum(n for (_, kind), n in table.items() if kind == name) for name in found["cell"]],
                     "all cells together, too")
    test.check_equal(sum(map(sum, cells)), vm.parse_bytes(MEM) // 4096, "they are all of RAM")
    test.check(len(cells) <= 64 * 32 and all(sum(cell) <= found["pages_per_cell"] for cell in cells),
               f"{len(cells)} cells of {found['pages_per_cell']} pages")
    told = activity.scan(guest)["pages_now"]
    told["cold"] += told["frozen"]  # by the last pass; those between hot and cold may have changed since
    for name, kinds in (("hot", ("hot",)), ("cold", activity.IS_COLD)):
        pages = sum(n for (_, kind), n in table.items() if kind in kinds)
        test.check(abs(pages - told[name]) < 0.02 * found["pages"], f"{name}: {pages} pages, {told[name]} by latent stat")


def hot_area_is_hot(test, guest, areas):
    """A cell that lies in a hot area as a whole is hot, one in the cold area is not."""
    found = heat(guest, "--width", "1024")
    block, size = found["blocks"][0], found["pages_per_cell"]
    where = areas.gfns()
    by_area = collections.defaultdict(list)
    for number, cell in enumerate(block["cells"]):
        names = {where.get(gfn) for gfn in range(number * size, (number + 1) * size)}
        if len(names) == 1 and None not in names:
            best = found["cell"][max(range(len(cell)), key=lambda kind: cell[kind])]
            by_area[names.pop()].append(best)
    for area, is_so in (("hot", lambda kind: kind == "hot"), ("cold", lambda kind: kind in activity.IS_COLD)):
        cells = by_area[area]
        right = sum(map(is_so, cells))
        test.check(len(cells) > 100 and right >= ENOUGH * len(cells), f"{right} of {len(cells)} cells of area {area} are so")


def picture(test, guest, directory):
    """A page is a square of 2 pixels in it, and the legend has one of 14."""
    path = directory / "heat.png"
    path.write_text("what was there before")
    latent.run("heat", guest.name, "--png", path)
    width, height, colours = read_png(path)
    test.say(f"a picture of {width} x {height}: {colours}")
    hot = sum(by_class["hot"] for by_class in heat(guest)["pages_now"].values())
    test.check_equal(colours.get(RED, 0), hot * 2 * 2 + 14 * 14, "hot pages are in the picture")
    test.check_equal([found.name for found in directory.iterdir()], ["heat.png"], "nothing else is left there")
    before = path.read_bytes()
    for target in (directory / "missing" / "heat.png", directory, "/dev/null", "/proc/heat.png"):
        answer = latent.command("heat", guest.name, "--png", target)
        test.check(answer.returncode == SYSTEM and len(answer.stderr.splitlines()) == 1, answer.stderr.strip())
    test.check(path.read_bytes() == before, "the picture stays")


def drawn(test, guest):
    lines = latent.run("heat", guest.name, "--width", "64").splitlines()
    rows = [line.split("|")[1] for line in lines if line.count("|") == 2]
    test.check(len(rows) == 32 and all(len(row) == 64 and not row.strip("#+-. ?") for row in rows), "the map is drawn")
    test.check("#" in "".join(rows), "with what is hot")
    for line in (*lines[:3], *lines[-8:]):
        test.say(line)


def watched(test, guest):
    """`latent top` in batch mode, and from its keys' request: the figures are those of latent stat."""
    rounds = latent.run("top", "-b", "-n", "2").split("\n\n")
    test.check_equal(len(rounds), 2, "two rounds")
    names, figures = (line.split() for line in rounds[1].splitlines()[1:3])
    row = dict(zip(names, figures))
    test.say(str(row))
    test.check_equal((row["NAME"], row["PID"], row["RAM"]), (guest.name, str(guest.pid), MEM), "name, process, memory")
    test.check(float(row["%CPU"]) > 0, "it runs")
    told = activity.scan(guest)["pages_now"]
    for title, pages in (("HOT", told["hot"]), ("COLD", told["cold"] + told["frozen"])):
        mib = float(row[title].rstrip("M"))
        test.check(row[title].endswith("M") and abs(mib - pages / activity.PAGES_PER_MIB) < 20, f"{title}: {row[title]}")


def seen(test, guest, areas, directory):
    hot_area_is_hot(test, guest, areas)
    watched(test, guest)
    latent.run("scan", guest.name, "off")
    guest.qmp("stop")
    time.sleep(0.3)
    seen_as_table(test, guest)
    picture(test, guest, directory)
    drawn(test, guest)
    guest.qmp("cont")
    latent.run("scan", guest.name, "--period", f"{PERIOD_S}s")
    activity.wait_passes(guest, 1 + LOOKS)  # all pages were new


def not_seen(test, guest):
    answer = latent.command("heat", guest.name)
    test.check(answer.returncode == NO_ANSWER and f"latent scan {guest.name} --period 10s" in answer.stderr and
               len(answer.stderr.splitlines()) == 1 and not answer.stdout, f"nothing to draw: {answer.stderr.strip()}")
    test.check("-" in latent.run("top", "-b", "-n", "1").splitlines()[2].split(), "top does not know, either")


# ---- the states ----

def fresh(test, guest):
    guest.wait_ready()
    test.check(activity.scan(guest)["passes"] == 0, "nobody looks until it is asked for")
    not_seen(test, guest)
    bad_input(test, guest)
    areas = activity.Areas(guest, AREA_MIB, PERIOD_S)
    areas.start(seconds=300)
    latent.run("scan", guest.name, "--period", f"{PERIOD_S}s")
    activity.wait_passes(guest, 1 + LOOKS)
    figures = check_scores(test, guest, areas, "fresh")
    check_costs(test, figures)
    if "writes by WP_ASYNC" in latent.command("doctor").stdout:
        test.check(figures["writes_seen_pages_now"] > 0 and figures["pages_written"] >= 0.9 * areas.pages,
                   f"{figures['pages_written']} pages were found written, of at least {areas.pages}")
    test.check(figures["working_set_pages_10s_now"] is not None, "the working set over 10 s is known")
    in_use = figures["working_set_pages_10s_now"] / activity.PAGES_PER_MIB
    test.check(3 * AREA_MIB < in_use < 8 * AREA_MIB, f"the working set is {in_use:.0f} MiB, of which {3 * AREA_MIB} are known")
    test.check_equal(figures["working_set_pages_10m_now"], None, "that over 10 min is not, yet")
    return areas


def restored(test, guest, areas, snapshot):
    """The guest was saved with its programs at work, while it was looked at."""
    latent.run("save", guest.name, snapshot)
    before = activity.scan(guest)["passes"]
    activity.wait_passes(guest, 1)
    test.check(activity.scan(guest)["passes"] > before, "the scan goes on after a save")
    guest.kill9()
    guest.restore(snapshot)
    guest.wait_ready()
    latent.run("scan", guest.name, "--period", f"{PERIOD_S}s")
    activity.wait_passes(guest, 2 + LOOKS)  # copies become base a few at a time
    figures = check_scores(test, guest, areas, "restored", ("base", "clean"))
    for source in figures["sources"]:
        test.say(str(source))
    test.check(figures["copies_settled"] > 0.9 * areas.pages, f"{figures['copies_settled']} copies became base")
    test.say(f"the guest stood for {figures['frozen_us'] / 1e3:.1f} ms in {figures['passes']} passes")
    test.check(areas.check(), "the guest's memory is right")


def loses_nothing(test, guest):
    """As fast as it can be, under full write load, with disk reads and discards."""
    latent.run("scan", guest.name, "--period", "100ms")
    load = guest.sh_start(f"latent-guest mem churn m 0 {2 * AREA_MIB * activity.PAGES_PER_MIB} 8 0")
    for _ in range(2):
        latent.check_hashes(test, guest, "/usr/lib/", what="beside a scan at 0.1 s")
        guest.drop_guest_caches()
        guest.sh(f"latent-guest mem discard m {3 * AREA_MIB * activity.PAGES_PER_MIB} 1000")
    test.check(load.wait(60).startswith("ok"), "what was written meanwhile is right")
    test.check(guest.sh("latent-guest mem check m", timeout=120).startswith("ok"), "and all else")
    figures = activity.scan(guest)
    test.check(figures["passes"] > 20, f"{figures['passes']} passes, {figures['pages_brought_back']} pages brought back")
    latent.run("scan", guest.name, "off")
    time.sleep(0.3)
    passes = activity.scan(guest)["passes"]
    time.sleep(0.5)
    test.check_equal(activity.scan(guest)["passes"], passes, "nobody looks any more")
    test.check_equal(activity.scan(guest)["period_us_now"], 0, "and the statistics say so")


def body(test):
    test.need_latent()
    latent.private_run_dir()
    directory = Path(tempfile.mkdtemp(prefix="latent-activity-", dir=vm.images_dir().parent.parent))
    try:
        with VM("activity", mem=MEM, latent=EVERYTHING) as guest:
            areas = fresh(test, guest)
            pictures = directory / "pictures"
            pictures.mkdir()
            seen(test, guest, areas, pictures)
            restored(test, guest, areas, directory / "snapshot")
            loses_nothing(test, guest)
            guest.shutdown()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    test.check_equal(latent.vm_dirs(), [], "no run-time directory is left")


case.main("Hot, warm and cold pages are told apart; no byte is lost by looking.", body, timeout_s=600)
