"""Runs of train_hf.py side by side: what differs in their recipes, and their EER on the development trials.

    python benchmarks/run_differences.py FIRST RUN ... --names "all of it" "without noise" ... --out docs/results/NAME

The first run is the one that the others are compared with. Development speech is what the best step was chosen on, so
that these figures rank recipes; they say nothing of how well a model does elsewhere.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from timing import machine

from mrl_redimnet.plotting import new_figure, save_figure

LEFT_OUT = ("run.", "evaluation.")  # settings that change nothing of the model


def main():
    """Parses the command line, prints and writes the record, the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--names", nargs="+", help="[the folders' names]")
    parser.add_argument("--step", type=int, help="compare at this step, for runs that were not ended [the last one]")
    parser.add_argument("--out", type=Path, required=True, help="OUT.json, OUT.md and OUT.png")
    arguments = parser.parse_args()
    names = arguments.names or [run.name for run in arguments.runs]
    if len(names) != len(arguments.runs):
        parser.error(f"--names: {len(names)} for {len(arguments.runs)} runs")
    recipes = [settings(run) for run in arguments.runs]
    curves = [rates_of(run, "development") for run in arguments.runs]
    dims = [*curves[0][max(curves[0])]]
    lines = ["| | " + " | ".join(dims) + " | steps x crops | what differs |", "|---|" + "---|" * (len(dims) + 2)]
    for name, recipe, curve in zip(names, recipes, curves, strict=True):
        step = max(curve) if arguments.step is None else arguments.step
        last, budget = curve[step], f"{step:,} x {recipe['data.batch_size']}"
        changed = [f"`{key}: {json.dumps(value)}`" for key, value in recipe.items() if recipes[0].get(key) != value]
        cells = " | ".join(f"{100 * last[dim]:.1f}" for dim in dims)
        lines.append(f"| {name} | {cells} | {budget} | {'; '.join(changed)} |")
    text = (
        f"# Recipes side by side\n\n```bash\n{shlex.join(['python', *sys.argv])}\n```\n\nEER % on the development "
        f"trials after these steps, by dimension; one run each. {machine()}.\n\n"
        + "\n".join(lines)
        + f"\n\n![EER over steps]({arguments.out.name}.png)\n"
    )
    print(text)
    arguments.out.with_suffix(".md").write_text(text)
    record = {name: {"recipe": recipe, "development": curve, "training speakers": rates_of(run, "training speakers")}
              for name, recipe, curve, run in zip(names, recipes, curves, arguments.runs, strict=True)}  # fmt: skip
    arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for name, curve in zip(names, curves, strict=True):
        steps = sorted(curve)
        axes.plot(steps, [100 * curve[step][dims[-1]] for step in steps], marker="o", label=name)
    axes.set(xlabel="step", ylabel=f"development EER, {dims[-1]} dimensions, %")
    axes.legend()
    save_figure(figure, arguments.out.with_suffix(".png"))


def settings(run: Path) -> dict[str, Any]:
    """{full name: value} of a run's recipe, of its newest checkpoint where it was stopped; paths by their last part."""
    file = run / "results.json"
    if not file.is_file():
        file = max(run.glob("checkpoints/*/settings.json"), default=file)
    groups = json.loads(file.read_text())["recipe"]
    found = {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()}
    found = {name: value for name, value in found.items() if not name.startswith(LEFT_OUT)}
    return {
        name: Path(value).name if isinstance(value, str) and "/" in value else value for name, value in found.items()
    }


def rates_of(run: Path, speakers: str) -> dict[int, dict[str, float]]:
    """{step: {dimension: EER}} of the evaluations on the trials of these speakers."""
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return {row["step"]: row["eer"] for row in rows if row["kind"] == "evaluation" and row["set"] == speakers}


if __name__ == "__main__":
    main()
