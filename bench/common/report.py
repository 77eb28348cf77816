# SPDX-License-Identifier: BSD-2-Clause-Patent
"""report.md from what the benchmarks saved, with plots where python3-matplotlib is installed."""

import json

try:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
except ImportError:
    pyplot = None

NO_PLOTS = "Without plots: python3-matplotlib is not installed."


def write(directory, names):
    """Writes report.md for the named benchmarks; returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    parts = ["# Benchmarks\n"]
    if pyplot is None:
        parts.append(NO_PLOTS + "\n")
    machine_said = False
    for name in names:
        saved = directory / f"{name}.json"
        if not saved.exists():
            parts.append(f"## {name}\n\nIt did not finish.\n")
            continue
        result = json.loads(saved.read_text())
        if not machine_said:
            parts.insert(1, _machine(result["env"]))
            machine_said = True
        parts += _benchmark(result, directory)
    path = directory / "report.md"
    path.write_text("\n".join(parts))
    return path


def _machine(env):
    return (f"{env['cpus']} CPUs ({env['cpu']}), {env['memory_mib']} MiB, Linux {env['kernel']}, "
            f"guests on {env['accel']}. A ratio above 1 means that Latent is better.\n")


def _benchmark(result, directory):
    parts = [f"## {result['name']}\n",
             f"{'Quick run' if result['quick'] else 'Full run'}, {result['seconds']:.0f} s, "
             f"{result['n_checks']} content checks: "
             + ("all right.\n" if result["ok"] else "**FAILED**: " + "; ".join(result["failures"]) + "\n")]
    if result.get("left_out"):
        parts.append(f"Not measured in a quick run: {', '.join(result['left_out'])}.\n")
    if result["missing"]:
        parts.append(f"Left out, not on this machine: {', '.join(result['missing'])}.\n")
    if result["ratios"]:
        rows = [[name, value, *result["spreads"][name]] for name, value in result["ratios"].items()]
        parts.append(_table(["ratio", "median", "lowest", "highest", "pairs"], rows))
    if result["metrics"]:
        parts.append(_table(["metric", "value"], result["metrics"].items()))
    for each in result["tables"]:
        parts += [f"{each['title']}\n", _table(each["headers"], each["rows"])]
    parts += [text.replace("\n", " ") + "\n" for text in result["notes"]]
    if pyplot is not None:
        for number, plot in enumerate(result["plots"]):
            name = f"{result['name']}-{number + 1}.png"
            _draw(plot, directory / name)
            parts.append(f"![{plot['title']}]({name})\n")
    return parts


def _table(headers, rows):
    def line(cells):
        return "| " + " | ".join(str(cell).strip() for cell in cells) + " |"

    return "\n".join([line(headers), line(["---"] + ["---:"] * (len(headers) - 1)), *map(line, rows)]) + "\n"


def _draw(plot, path):
    figure, axes = pyplot.subplots(figsize=(7, 4))
    if plot["kind"] == "bars":
        _draw_bars(axes, plot)
    else:
        _draw_lines(axes, plot)
    axes.set_title(plot["title"])
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_bars(axes, plot):
    bottom = [0.0] * len(plot["groups"])
    for name, values in plot["series"].items():
        axes.bar(plot["groups"], values, bottom=bottom, label=name)
        bottom = [low + value for low, value in zip(bottom, values)]
    axes.set_ylabel(plot["unit"])


def _draw_lines(axes, plot):
    for name, values in plot["series"].items():
        axes.plot(plot["x"], values, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(plot["x"], [str(x) for x in plot["x"]])
    axes.set_xlabel(plot["x_name"])
    axes.set_ylabel(plot["y_name"])
    axes.set_ylim(bottom=0)
