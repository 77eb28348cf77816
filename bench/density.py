# SPDX-License-Identifier: BSD-2-Clause-Patent
"""Memory of four guests that read the same files: plain QEMU, plain QEMU with KSM, Latent."""

from pathlib import Path

from common import guests as common
from common import ksm
from common.guests import host, vm
from common.progress import mib

N_GUESTS = 4
GUEST_MEM = "1G"
KSM_PAGES_TO_SCAN = 20000
KSM_SLEEP_MS = 20
KSM_SETTLE_S = 120
KSM_QUICK_S = 65  # a quick run begins with it no later: it needs 15 s, on a slow machine 40
KSM_RECORD_BYTES = 64  # struct ksm_rmap_item, one for each page that KSM looks at
WITHOUT_KSM = "there was no time left for it in a quick run, and half merged it would be wronged"
REPETITIONS = {"full": 3, "quick": 1}

PLAIN, KSM, LATENT = "plain QEMU", "QEMU + KSM", "Latent"


def run(result):
    expected = common.golden_sums()
    repetitions = REPETITIONS["quick" if result.quick else "full"]
    sides = {PLAIN: [], KSM: [], LATENT: []}
    no_ksm = ksm.why_not()
    if no_ksm:
        result.missing.add("ksm")
        result.note(f"Without KSM: {no_ksm}.")
    with common.scratch_dir() as directory:
        image = common.copy_image("golden.qcow2", directory)
        for repetition in range(repetitions):
            result.say(f"round {repetition + 1} of {repetitions}: {N_GUESTS} guests with Latent")
            sides[LATENT].append(measure_latent(result, image, expected))
            result.say(f"round {repetition + 1} of {repetitions}: {N_GUESTS} plain guests")
            plain, merged = measure_plain(result, image, expected, use_ksm=no_ksm is None)
            sides[PLAIN].append(plain)
            if merged:
                sides[KSM].append(merged)
    report(result, {name: figures for name, figures in sides.items() if figures})


# ---- the sides ----

def new_guests(image, latent):
    return [vm.VM(f"density-{i}", image=image, mem=GUEST_MEM, latent=latent, start=False)
            for i in range(1, N_GUESTS + 1)]


def measure_latent(result, image, expected):
    with common.running(*new_guests(image, latent=[])) as guests:
        read_files(result, guests, expected)
        figures = measure(guests, image)
        for guest in guests:
            result.check(common.latent_stat(guest.name)["map_failures"] == 0,
                         f"{guest.name}: no mapping call failed")
    return figures


def measure_plain(result, image, expected, use_ksm):
    """The same guests twice: as they are, and after KSM has settled."""
    with common.running(*new_guests(image, latent=None)) as guests:
        read_files(result, guests, expected)
        plain = measure(guests, image)
        if use_ksm and result.quick and result.progress.elapsed_s() > KSM_QUICK_S:
            result.left_out.add("ksm")
            result.note(f"Without KSM: {WITHOUT_KSM}.")
            use_ksm = False
        if not use_ksm:
            return plain, None
        merged = measure_merged(result, guests, image)
        outputs = common.run_all(guests, "echo 3 > /proc/sys/vm/drop_caches; sha256sum /usr/bin/latent-guest")
        result.check(len(set(outputs)) == 1, "merged guests still read the same")
    return plain, merged


def read_files(result, guests, expected):
    """All guests at once hash all files; the hashes are those of the image."""
    result.say(f"{len(guests)} guests are up; each reads and hashes {len(expected)} files")
    outputs = common.run_all(guests, common.HASH_ALL_FILES)
    for guest, output in zip(guests, outputs):
        wrong = common.wrong_files(output, expected)
        result.check(not wrong, f"{guest.name}: every file is as built (wrong: {wrong[:5]})")


def measure_merged(result, guests, image):
    ksmd = ksm.ksmd_pid()
    with ksm.scanning(KSM_PAGES_TO_SCAN, KSM_SLEEP_MS):
        cpu_before_s = host.cpu_seconds(ksmd)
        scans, settled = ksm.settle([guest.pid for guest in guests], KSM_SETTLE_S, result.tick)
        cpu_s = host.cpu_seconds(ksmd) - cpu_before_s
        figures = measure(guests, image)
        figures["records"] = ksm_records_kib(guests)
    result.say(f"KSM: {scans} full scans, {cpu_s:.1f} s of CPU"
               + ("" if settled else "; still merging, its figure would get better"))
    figures["ksmd_cpu_s"] = cpu_s
    return figures


def measure(guests, image):
    with vm.stopped(guests):
        figures = common.sum_memory_kib(guests)
        figures["page_tables"] = sum(page_tables_kib(guest.pid) for guest in guests)
        figures["cache_besides"] = (host.cached_pages(image) * host.PAGE_BYTES >> 10) - figures["ram_image"]
    figures["records"] = 0
    return figures


def page_tables_kib(pid):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmPTE:"):
            return int(line.split()[1])
    return 0


def ksm_records_kib(guests):
    """Kernel memory that KSM needs to know the guests' pages."""
    n_items = 0
    for guest in guests:
        for line in Path(f"/proc/{guest.pid}/ksm_stat").read_text().splitlines():
            if line.startswith("ksm_rmap_items"):
                n_items += int(line.split()[1])
    return n_items * KSM_RECORD_BYTES >> 10


# ---- what came out ----

ROWS = (
    ("guest RAM", "ram"),
    ("  private copies", "ram_private"),
    ("  the VM's own memory file", "ram_memfd"),
    ("  pages of the image", "ram_image"),
    ("  of all these in huge pages", "ram_huge"),
    ("QEMU's own", "own"),
    ("total (sum of Pss)", "total"),
    ("  private to one process", "private"),
    ("  shared by several", "shared"),
    ("besides: page cache of the image", "cache_besides"),
    ("besides: page tables", "page_tables"),
    ("besides: KSM's records", "records"),
)


def report(result, sides):
    result.table(
        f"{N_GUESTS} guests of {GUEST_MEM} read and hash all {len(common.golden_sums())} files of one image: "
        "MiB of memory, median (lowest-highest)",
        ["", *sides],
        [[title, *(spread_mib([f[key] for f in figures]) for figures in sides.values())]
         for title, key in ROWS]
        + [["mappings of guest RAM", *(str(figures[-1]["mappings"]) for figures in sides.values())]])
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    result.env["transparent_hugepage"] = huge_pages[huge_pages.index("[") + 1:huge_pages.index("]")]
    result.note('"Besides" is in none of the ratios. Pages of the image that guests map count in guest RAM;\n'
                "plain QEMU has the image in the page cache as well, which the host may drop under pressure.")
    result.metric("guests", N_GUESTS)
    result.ratio("plain_guest_ram_over_latent", column(sides[PLAIN], "ram"), column(sides[LATENT], "ram"))
    if KSM in sides:
        result.ratio("ksm_total_over_latent_total", column(sides[KSM], "total"),
                     column(sides[LATENT], "total"))
        result.metric("ksmd_cpu_s", common.median(column(sides[KSM], "ksmd_cpu_s")))
    plot(result, sides)


def column(figures, key):
    return [figure[key] for figure in figures]


def spread_mib(values_kib):
    middle = mib(common.median(values_kib))
    if len(values_kib) == 1:
        return middle
    return f"{middle} ({mib(min(values_kib))}-{mib(max(values_kib))})"


def plot(result, sides):
    parts = {"private copies": "ram_private", "VM's memory file": "ram_memfd", "pages of the image": "ram_image",
             "QEMU's own": "own"}
    result.bar_plot(f"Memory of {N_GUESTS} guests that read the same files", "MiB", list(sides),
                    {name: [common.median(column(figures, key)) / 1024 for figures in sides.values()]
                     for name, key in parts.items()})
