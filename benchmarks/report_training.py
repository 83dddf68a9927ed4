"""A training run's results as committed evidence: data, a table and a plot.

    python benchmarks/report_training.py RUN/results.json docs/results/NAME [--title TEXT]

Writes NAME.json (results and recipe, paths shortened to their last parts), NAME.md and NAME.png.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main():
    """Reads one results.json and writes the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("name", type=Path)
    parser.add_argument("--title", default="")
    arguments = parser.parse_args()
    record = json.loads(arguments.results.read_text())
    record["recipe"] = shortened(record["recipe"])
    arguments.name.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    arguments.name.with_suffix(".md").write_text(table(record, arguments.title))
    plot(record["results"], arguments.name.with_suffix(".png"), arguments.title)


def shortened(value):
    """Absolute paths cut to their last two parts, anywhere in a recipe."""
    if isinstance(value, dict):
        return {key: shortened(item) for key, item in value.items()}
    if isinstance(value, str) and value.startswith("/"):
        return "/".join(Path(value).parts[-2:])
    return value


def table(record: dict, title: str) -> str:
    """Markdown: EER with its interval, and minDCF, a column per dimension."""
    lines = [f"# {title}" if title else "# Training results", ""]
    for name, states in record["results"].items():
        dims = [row["dim"] for row in next(iter(states.values()))]
        lines += [
            f"## {name}",
            "",
            "| | " + " | ".join(f"{dim}" for dim in dims) + " |",
            "|---" * (len(dims) + 1) + "|",
        ]
        for state, rows in states.items():
            eers = (f"{100 * r['eer']:.2f} [{100 * r['eer_low']:.1f}, {100 * r['eer_high']:.1f}]" for r in rows)
            lines.append(f"| {state}, EER % [95 %] | " + " | ".join(eers) + " |")
            lines.append(f"| {state}, minDCF (p 0.01) | " + " | ".join(f"{r['min_dcf']:.3f}" for r in rows) + " |")
        lines.append("")
    return "\n".join(lines)


def plot(results: dict, path: Path, title: str):
    """EER over dimensions, a panel per trial list, the rotated model's interval shaded."""
    figure, axes = plt.subplots(1, len(results), figsize=(5 * len(results), 4), squeeze=False)
    for axis, (name, states) in zip(axes[0], results.items(), strict=True):
        for state, rows in states.items():
            dims = [row["dim"] for row in rows]
            (line,) = axis.plot(dims, [100 * row["eer"] for row in rows], marker="o", label=state)
            if state == "rotated":
                low, high = ([100 * row[key] for row in rows] for key in ("eer_low", "eer_high"))
                axis.fill_between(dims, low, high, alpha=0.15, color=line.get_color(), label="95 % over speakers")
        axis.set(xscale="log", xlabel="dimensions", ylabel="EER %", title=name, ylim=(0, None))
        axis.set_xticks(dims, [str(dim) for dim in dims])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
