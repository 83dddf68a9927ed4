"""Prefixes of a teacher's student: targets for every prefix, against one for the whole embedding and a rotation after.

    python benchmarks/nested_targets.py train PACKAGED RUNS
    python benchmarks/nested_targets.py report PACKAGED RUNS --out docs/results/nested_targets
    python benchmarks/nested_targets.py draw --out docs/results/nested_targets   # the picture again, from the record

PACKAGED is what `packaged_speech.py` made. The first stage of the packaged model's recipe, shorter and without
augmentation, is trained for every seed in two ways: each prefix learns where the same prefix of the teacher's embedding
points, as in the recipe, or the whole embedding alone does. `train` leaves out what is done; every run has one thread.
`report` judges the last step's models on the development speakers, as they are and rotated to the principal axes of
their own embeddings of training speech; with --also NAME=MODEL it does so for models that are trained already.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from durations import command_line
from paired import Drawn, averaged, change, eers, percent
from timing import machine

import train_hf
from mrl_redimnet.evaluation.results import embed_trials
from mrl_redimnet.files import replace_text
from mrl_redimnet.plotting import new_figure, save_figure
from mrl_redimnet.rotation import rotate_on_speech
from mrl_redimnet.saving import load_model
from mrl_redimnet.scoring.trials import read_trials
from mrl_redimnet.training.reading import flat, in_groups, read_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "packaged_nano.yaml"
STEPS = 900
SEEDS = (0, 1)
NESTED, WHOLE = "every prefix", "the whole embedding alone"
WAYS = {NESTED: None, WHOLE: [0, 0, 0, 0, 0, 1]}  # weights of the prefixes in the loss
AS_IT_IS, ROTATED = THEN = ("as it is", "rotated")
SHOWN = (16, 64, 256)  # dimensions whose changes the table shows
Rates = dict[int, Drawn]  # by dimension


def main():
    """Trains what is missing, reports what is there, or draws a report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "report", "draw"))
    parser.add_argument("packaged", type=Path, nargs="?", metavar="PACKAGED")
    parser.add_argument("runs", type=Path, nargs="?", metavar="RUNS")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--also", nargs="+", default=[], metavar="NAME=MODEL", help="trained with targets for prefixes")
    parser.add_argument("--out", type=Path, help="without suffix")
    parser.add_argument("--resamples", type=int, default=1000)
    arguments = parser.parse_args()
    if arguments.runs is None and arguments.command != "draw":
        parser.error(f"{arguments.command} needs PACKAGED and RUNS")
    {"train": train, "report": report, "draw": draw}[arguments.command](arguments)


def folder_of(runs: Path, way: str, seed: int) -> Path:
    """Where a run lies."""
    return runs / f"{way.replace(' ', '_')}-{seed}"


def train(arguments: argparse.Namespace):
    """Every way, seed by seed."""
    torch.set_num_threads(1)
    for seed in arguments.seeds:
        for way, weights in WAYS.items():
            folder = folder_of(arguments.runs, way, seed)
            if (folder / "results.json").is_file():
                continue
            packaged = arguments.packaged
            settings = {"train": str(packaged / "real"), "teacher": str(packaged / "teacher.parquet")}
            settings |= {"dev_trials": str(packaged / "dev_trials.txt"), "dev_folder": str(packaged / "dev")}
            settings |= {"output": str(folder), "seed": seed}
            settings |= {"augmentations": [], "prefix_weights": weights, "mixed_precision": "no", "workers": 0}
            settings |= {"steps": STEPS, "evaluate_every": STEPS, "bootstrap_samples": 0}
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "recipe.yaml").write_text(yaml.safe_dump(in_groups(flat(read_recipe(RECIPE, settings)))))
            began = time.process_time()
            train_hf.main([str(folder / "recipe.yaml"), "--resume"])
            print(way, seed, f"{time.process_time() - began:.0f} s of a core", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Report


def report(arguments: argparse.Namespace):
    """Writes OUT.json, OUT.md and OUT.png."""
    seeds = {way: list(judged_seeds(arguments, way)) for way in WAYS}
    rows = [(f"targets for {way}", then, averaged([of[then] for of in seeds[way]])) for way in WAYS for then in THEN]
    first = rows[0][2]
    columns = ["", "", *(f"EER, {dim}" for dim in first), *(f"change, {dim}" for dim in SHOWN)]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += [line(name, then, rates, first) for name, then, rates in rows]
    for name, _, path in (also.partition("=") for also in arguments.also):
        of = judged(arguments, path)
        lines += [line(name, then, rates, of[AS_IT_IS]) for then, rates in of.items()]
        rows += [(name, then, rates) for then, rates in of.items()]
    text = HEAD.format(command_line(), len(seeds[NESTED]), STEPS, arguments.resamples, machine()) + "\n".join(lines)
    record = {
        "command": command_line(),
        "rows": [{"of": name, "then": then, "eer": recorded(rates)} for name, then, rates in rows],
        "seeds": {way: [{then: recorded(rates) for then, rates in of.items()} for of in seeds[way]] for way in WAYS},
    }
    replace_text(arguments.out.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    replace_text(arguments.out.with_suffix(".md"), text + "\n")
    draw(arguments)
    print(text)


HEAD = """# Targets for every prefix, or a rotation at the end

```bash
{}
```

EER % on the development speakers, means over {} seeds of {} steps each [95 % interval over speakers]; changes in
points from the first row, or from the model as it is, with paired intervals ({} resamples), **bold** where they leave
out zero. {}.

![EER over the numbers of the embedding](nested_targets.png)

"""


def judged_seeds(arguments: argparse.Namespace, way: str) -> Iterator[dict[str, Rates]]:
    """Of each seed that is done."""
    for seed in arguments.seeds:
        folder = folder_of(arguments.runs, way, seed)
        if (folder / "results.json").is_file():
            yield judged(arguments, folder / "last")


def judged(arguments: argparse.Namespace, model: str | Path) -> dict[str, Rates]:
    """EERs on the development trials at every dimension of a model, as it is and rotated."""
    loaded = load_model(model)
    before = rates_of(arguments, loaded)
    rotate_on_speech(loaded, arguments.packaged / "real")
    return {AS_IT_IS: before, ROTATED: rates_of(arguments, loaded)}


def rates_of(arguments: argparse.Namespace, model) -> Rates:
    """EERs of a model at its dimensions."""
    trials = read_trials(arguments.packaged / "dev_trials.txt")
    embeddings = embed_trials(model, trials, arguments.packaged / "dev")
    return eers(trials, trials.utterances, embeddings, model.config.matryoshka_dims, arguments.resamples)


def recorded(rates: Rates) -> dict[str, dict]:
    """For JSON, by dimension."""
    return {str(dim): drawn.record() for dim, drawn in rates.items()}


def line(name: str, then: str, rates: Rates, reference: Rates) -> str:
    """A row of the table."""
    changes = ["" if rates is reference else change(rates[dim] - reference[dim]) for dim in SHOWN]
    return "| " + " | ".join([name, then, *(percent(drawn) for drawn in rates.values()), *changes]) + " |"


def draw(arguments: argparse.Namespace):
    """OUT.png from OUT.json: EER over the numbers of the embedding, a line for every row of the table."""
    rows = json.loads(arguments.out.with_suffix(".json").read_text())["rows"]
    figure = new_figure(7, 4.2)
    axes = figure.subplots()
    colours = {name: f"C{place}" for place, name in enumerate(dict.fromkeys(row["of"] for row in rows))}
    for row in rows:
        dims, rates = [*row["eer"]], [100 * of["value"] for of in row["eer"].values()]
        style = {AS_IT_IS: "-", ROTATED: "--"}[row["then"]]
        axes.plot(
            range(len(dims)), rates, style, marker="o", color=colours[row["of"]], label=f"{row['of']}, {row['then']}"
        )
        axes.set_xticks(range(len(dims)), dims)
    axes.set(xlabel="numbers of the embedding", ylabel="EER % on the development speakers")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
