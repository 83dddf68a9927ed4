"""Fine-tuning for prefixes that overfits, and what is said to cure it: each cure with and without, from one recipe.

    python benchmarks/training_lessons.py prepare RUNS --speech SPEECH SPEECH_MORE
    python benchmarks/training_lessons.py train RUNS [--only WORD ...]
    python benchmarks/training_lessons.py report RUNS --speech SPEECH SPEECH_MORE --out docs/results/training_lessons

The base is the packaged model in a basis that is drawn at random: at full width it answers as before, but its prefixes
are those of a model that was never trained for them, as a published checkpoint is. It is trained with speaker labels on
few speakers: five epochs of the head, then five of everything, at one learning rate, nearly without weight decay.
`train` goes through `plan` in its order, by `train_hf.py --resume` on one thread, and leaves out what is done. `report`
reads the record of each run and judges its last model on the development speakers, as means over the seeds that are
done; with `--speech` it also opens the test lists, for the base rotated, for training without a cure and for the cure
that the development speakers say is best.
"""

import argparse
import json
import random
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import soundfile
import torch
import yaml
from development_speakers import development_speakers, training_folders, with_enough
from paired import Drawn, averaged, change, eers, percent
from timing import machine

import train_hf
from configuration_mrl_redimnet import SAMPLING_RATE
from mrl_redimnet.audio.io import read_audio
from mrl_redimnet.evaluation.results import embed_trials
from mrl_redimnet.files import replace_text
from mrl_redimnet.plotting import legend_line, new_panels, save_figure, shades
from mrl_redimnet.rotation import rotate, rotate_on_speech
from mrl_redimnet.saving import load_model, save_model
from mrl_redimnet.scoring.trials import make_trials, read_trials
from mrl_redimnet.training.reading import flat, in_groups, read_recipe

BASE = "nano"
TRAINED = {"an4": 6, "so": 7, "ds": 2, "aa": 3}  # speakers, by the beginning of their names
MOST, SECONDS = {"train": 6, "dev": 4}, 3.0  # utterances of a speaker, and of each of them
DIMS = (16, 64, 256)  # of the tables
HEAD, ALL = 60, 60  # steps with the trunk frozen, and with everything: five epochs each
RATE = 1e-3
SEEDS = (0, 1)
TESTS = ("librispeech", "an4", "adults", "children")
NOISE = [
    {
        "kind": "one_of",
        "probability": 0.6,
        "choices": [
            {"kind": "reverberation"},
            {"kind": "one_of", "choices": [{"kind": "noise", "snr": [0, 15]}, {"kind": "babble", "snr": [10, 30]}]},
        ],
    }
]
PLAIN = {"spec_augment": False}
DROPOUT = {"projection_dropout": 0.1, "aggregation_dropout": 0.1}
LATE_PREFIXES = [0.6, 0.6, 0.6, 0.4, 0.2, 0]  # where 16, 32, 64, 128, 192 and 256 numbers begin, as ratios of a run


@dataclass(frozen=True)
class Run:
    """One training: its name, what it replaces in the recipe, a seed, and the base it begins with."""

    name: str
    settings: dict = field(default_factory=dict, hash=False)
    seed: int = 0
    base: str = "turned"

    def folder(self, runs: Path) -> Path:
        """Where it lies."""
        return runs / "runs" / f"{self.name.replace(' ', '_').replace(',', '')}-{self.seed}"


FIRST = "nothing against it"
STOPPED = "nothing against it, best step (early stopping)"
CUT, ROTATED = "base, as it is cut", "base, rotated"


def plan() -> list[Run]:
    """All runs, seed by seed, what matters most first."""
    lower = {"trunk": RATE / 10}
    curriculum = {"augmentations": NOISE, "augmentation_schedule": [0.0, 0.8]}
    longer = length(3 * HEAD, ALL)
    together = {"model_options": PLAIN | DROPOUT, "weight_decay": 1e-3, "label_smoothing": 0.1, **curriculum}
    together |= {"part_learning_rates": lower, "prefix_starts": LATE_PREFIXES}
    runs = [
        Run(FIRST),
        Run("lower rate of the trunk, a tenth", {"part_learning_rates": lower}),
        Run("head for 15 epochs", longer),
        Run("dropout 0.1", {"model_options": PLAIN | DROPOUT}),
        Run("weight decay 1e-3", {"weight_decay": 1e-3}),
        Run("label smoothing 0.1", {"label_smoothing": 0.1}),
        Run("prefixes one after another", {"prefix_starts": LATE_PREFIXES}),
        Run("noise and rooms, rising", curriculum),
        Run("noise and rooms", {"augmentations": NOISE}),
        Run("rotated first", base="rotated"),
        Run("all of it", together),
        Run("lower rate of the trunk, a hundredth", {"part_learning_rates": {"trunk": RATE / 100}}),
        Run("rotated in training, by default", {"rotate_at": None}),
        Run("classifier not trained", {"part_learning_rates": {"classifier": 0.0}}),
    ]
    return [replace(run, seed=seed) for seed in SEEDS for run in runs]


def main():
    """Prepares, trains what is missing, or reports what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("prepare", "train", "report"))
    parser.add_argument("runs", type=Path, metavar="RUNS")
    parser.add_argument("--speech", type=Path, nargs="+", help="folders with train, test and trial lists, noise")
    parser.add_argument("--only", nargs="+", default=[""], help="runs whose name has one of these words in it")
    parser.add_argument("--out", type=Path, help="without suffix")
    parser.add_argument("--resamples", type=int, default=1000)
    arguments = parser.parse_args()
    {"prepare": prepare, "train": train, "report": report}[arguments.command](arguments)


# ----------------------------------------------------------------------------------------------------------------------
# Speech and bases


def prepare(arguments: argparse.Namespace):
    """The speech of both groups of speakers, the development trials, and the bases."""
    runs = arguments.runs
    speakers = training_folders([folder / "train" for folder in arguments.speech])
    held_out = development_speakers(speakers, random.Random(0))
    others = {name: folder for name, folder in speakers.items() if name not in held_out}
    rng = random.Random("training lessons")
    trained = [
        name for beginning, count in TRAINED.items() for name in rng.sample(with_enough(others, beginning), count)
    ]
    for group, names in {"train": trained, "dev": sorted(held_out)}.items():
        for name in names:
            shorten(speakers[name], runs / group / name, MOST[group])
    if not (runs / "noise").exists():
        noise = next(folder / "noise" / "train" for folder in arguments.speech if (folder / "noise").is_dir())
        (runs / "noise").symlink_to(noise.resolve())
    paths = sorted(str(file.relative_to(runs / "dev")) for file in (runs / "dev").rglob("*.*"))
    speaker_of, session_of = ([path.split("/")[part] for path in paths] for part in (0, 1))
    trials = make_trials(paths, speaker_of, session_of)
    lines = [f"{label} {a} {b}" for label, a, b in zip(trials.labels, trials.enrol, trials.test, strict=True)]
    replace_text(runs / "dev.txt", "\n".join(lines) + "\n")
    few = [next(line for line in lines if line.startswith(label)) for label in "10"]
    replace_text(runs / "few.txt", "\n".join(few) + "\n")
    write_bases(runs)


def shorten(source: Path, target: Path, most: int):
    """Writes the first seconds of the first utterances of a speaker to target/SESSION."""
    for file in sorted(source.glob("*/*.*"))[:most]:
        one = (target / file.parent.name / file.name).with_suffix(".flac")
        one.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(one, read_audio(file, seconds=SECONDS), SAMPLING_RATE)


def write_bases(runs: Path):
    """The packaged model in a random basis, and that one rotated to the principal axes of the training speech."""
    model = load_model(BASE)
    width = model.config.embedding_size
    axes = np.linalg.qr(np.random.default_rng(0).standard_normal((width, width)))[0]
    # Speech whose principal axes are these: `rotate` then makes them the model's.
    rotate(model, np.repeat(axes, np.arange(width, 0, -1), axis=0))
    save_model(model, runs / "turned")
    rotate_on_speech(model, runs / "train")
    save_model(model, runs / "rotated")


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train(arguments: argparse.Namespace):
    """Every run of the plan that has no result yet."""
    torch.set_num_threads(1)
    for run in plan():
        folder = run.folder(arguments.runs)
        if any(word in run.name for word in arguments.only) and not (folder / "results.json").is_file():
            train_once(arguments.runs, run)
            print(run.name, run.seed, seconds_of(folder), flush=True)


def train_once(runs: Path, run: Run):
    """Trains; adds the seconds of a core to those of earlier starts."""
    folder = run.folder(runs)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(in_groups(flat(read_recipe(None, recipe_of(runs, run))))))
    before, used = time.process_time(), seconds_of(folder)
    try:
        train_hf.main([str(folder / "recipe.yaml"), "--resume"])
    finally:
        replace_text(folder / "seconds.txt", f"{used + time.process_time() - before:.1f}\n")


def recipe_of(runs: Path, run: Run) -> dict:
    """The settings of a run, by name."""
    recipe = {"start": str(runs / run.base), "train": str(runs / "train"), "noise": str(runs / "noise")}
    recipe |= {"output": str(run.folder(runs)), "seed": run.seed, "model_options": PLAIN}
    recipe |= {"batch_size": 8, "crop_seconds": 2.0, "sampler": "utterance", "workers": 0}
    recipe |= {"rotate_at": [], "margin_schedule": [0, 0]}
    recipe |= {"learning_rate": RATE, "final_learning_rate": RATE, "weight_decay": 1e-4, **length(HEAD, ALL)}
    recipe |= {"dev_trials": str(runs / "dev.txt"), "dev_folder": str(runs / "dev"), "dev_speakers": 9}
    recipe |= {"checkpoint_every": 30, "log_every": 4, "tracker": "none"}
    recipe |= {"bootstrap_samples": 0}
    if run.name != FIRST and run.base == "turned":  # whose own EERs, which a run ends with, are needed once a seed
        recipe["tests"] = {"few": {"trials": str(runs / "few.txt"), "folder": str(runs / "dev")}}
    return recipe | run.settings


def length(head: int, everything: int) -> dict:
    """Settings of a run of so many steps with the trunk frozen, then so many with everything."""
    steps = head + everything
    every = everything // (1 if head > everything else 2)
    return {"steps": steps, "trunk_frozen_until": head / steps, "warmup": 8 / steps, "evaluate_every": every}


def seconds_of(folder: Path) -> float:
    """Seconds of a core that a run took."""
    file = folder / "seconds.txt"
    return float(file.read_text()) if file.is_file() else 0.0


# ----------------------------------------------------------------------------------------------------------------------
# Report

Rates = dict[int, Drawn]  # by dimension


def report(arguments: argparse.Namespace):
    """Judges what is done; writes OUT.json, OUT.md and OUT.png."""
    runs = arguments.runs
    done = [run for run in plan() if (run.folder(runs) / "results.json").is_file()]
    facts = {run: told(runs, run) for run in done}
    judged = {run: judge(runs, load_model(run.folder(runs) / "last"), arguments.resamples) for run in done}
    by_name: dict[str, list[Run]] = {}
    for run in done:
        by_name.setdefault(run.name, []).append(run)
    firsts, first = by_name[FIRST], averaged([judged[run] for run in by_name[FIRST]])
    stopped = averaged([judge(runs, load_model(folder), arguments.resamples) for folder in best_of(runs, firsts)])
    beside = {name: judge(runs, model, arguments.resamples) for name, model in untrained(runs)}
    beside |= {FIRST: first, STOPPED: stopped}
    cures = {name: ([run.folder(runs) / "last" for run in seeds], averaged([judged[run] for run in seeds]))
             for name, seeds in by_name.items() if name != FIRST}  # fmt: skip
    cures[STOPPED] = (best_of(runs, firsts), stopped)
    best = min(cures, key=lambda name: sum(drawn.value for drawn in cures[name][1].values()))
    models = {ROTATED: [runs / "rotated"], FIRST: [run.folder(runs) / "last" for run in firsts], best: cures[best][0]}
    tested = test(models, arguments) if arguments.speech else {}
    text = [head(runs, arguments, facts), *beside_table(beside), "", *cure_table(by_name, facts, judged), ""]
    text += test_table(tested) if tested else []
    record = {
        "machine": machine(),
        "beside": {name: drawn_record(rates) for name, rates in beside.items()},
        "runs": [
            {"name": run.name, "seed": run.seed, "settings": run.settings, "base": run.base, **facts[run]}
            | {"development": drawn_record(judged[run])}
            for run in done
        ],
        "tests": {name: {of: drawn_record(rates) for of, rates in lists.items()} for name, lists in tested.items()},
    }
    arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text("\n".join(text).rstrip() + "\n")
    draw(facts, arguments.out.with_suffix(".png"))
    print("\n".join(text))


def told(runs: Path, run: Run) -> dict:
    """What the record of a run says: EERs by step, set and dimension, losses by step, its best step, its cost."""
    folder = run.folder(runs)
    results = json.loads((folder / "results.json").read_text())
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    eers_of: dict[str, list[dict]] = {"development": [], "training speakers": []}
    beginning = base_record(runs, run)
    for name, points in eers_of.items():
        rows = beginning["results"][name]["base"]
        points.append({"step": 0, **{str(row["dim"]): row["eer"] for row in rows}})
        points += [
            {"step": line["step"], **line["eer"]}
            for line in lines
            if line["kind"] == "evaluation" and line["set"] == name
        ]
    losses = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]
    return {
        "steps": results["steps"],
        "core_seconds": seconds_of(folder),
        "best_step": results["best_step"],
        "eer": eers_of,
        "loss": losses,
    }


def base_record(runs: Path, run: Run) -> dict:
    """Results that have the base's EERs on the very trials of a run: its own, or those of the first run of its seed."""
    own = run.folder(runs) if run.base != "turned" else Run(FIRST, seed=run.seed).folder(runs)
    return json.loads((own / "results.json").read_text())


def best_of(runs: Path, firsts: list[Run]) -> list[Path]:
    """What early stopping would keep of runs: the models of their best steps."""
    return [run.folder(runs) / "best_as_trained" for run in firsts]


def judge(runs: Path, model, resamples: int) -> Rates:
    """EERs on the development trials at every dimension of the model."""
    trials = read_trials(runs / "dev.txt")
    embeddings = embed_trials(model, trials, runs / "dev")
    return eers(trials, trials.utterances, embeddings, model.config.matryoshka_dims, resamples)


def untrained(runs: Path):
    """(name, model) of the base, without any training."""
    yield CUT, load_model(runs / "turned")
    yield ROTATED, load_model(runs / "rotated")


def test(models: dict[str, list[Path]], arguments: argparse.Namespace) -> dict[str, dict[str, Rates]]:
    """{system: {list: EERs}} on the test lists; means where a system has several models."""
    files = {name: next(f for s in arguments.speech for f in s.glob(f"test/trials_{name}.txt")) for name in TESTS}
    found: dict[str, dict[str, Rates]] = {}
    for system, folders in models.items():
        seeds: dict[str, list[Rates]] = {name: [] for name in files}
        for folder in folders:
            model = load_model(folder)
            for name, file in files.items():
                trials = read_trials(file)
                embeddings = embed_trials(model, trials, file.parent / "wav")
                seeds[name].append(eers(trials, trials.utterances, embeddings, DIMS, arguments.resamples))
        found[system] = {name: averaged(rates) for name, rates in seeds.items()}
    return found


def drawn_record(rates: Rates) -> dict[str, dict]:
    """For JSON, by dimension."""
    return {str(dim): drawn.record() for dim, drawn in rates.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Page


def head(runs: Path, arguments: argparse.Namespace, facts: dict[Run, dict]) -> str:
    """What was done, with how much speech, where."""
    count = {group: len({*(runs / group).iterdir()}) for group in MOST}
    files = {group: len([*(runs / group).rglob("*.*")]) for group in MOST}
    minutes = sum(of["core_seconds"] for of in facts.values()) / 60
    opened = "--speech SPEECH SPEECH_MORE " if arguments.speech else ""
    trained = f"{count['train']} speakers ({files['train']} utterances)"
    return f"""# Fine-tuning for prefixes: what helps against overfitting

```bash
python benchmarks/training_lessons.py prepare RUNS --speech SPEECH SPEECH_MORE
python benchmarks/training_lessons.py train RUNS
python benchmarks/training_lessons.py report RUNS {opened}--out docs/results/training_lessons
```

{len(facts)} of {len(plan())} trainings, on {trained}, {minutes:.0f} minutes of a core.
Development: {count["dev"]} speakers ({files["dev"]} utterances) whom neither these runs nor the base were trained on.
EER %, in brackets 95 % intervals over the development speakers ({arguments.resamples} resamples), paired in
differences, which are **bold** where they leave out zero. {machine()}.
"""


def beside_table(beside: dict[str, Rates]) -> list[str]:
    """Markdown: the base without training, with it, and with its best step."""
    lines = ["## Without training, and with it", "", "| | " + " | ".join(f"{dim}" for dim in DIMS) + " | change, 256 |"]
    lines.append("|---" * (2 + len(DIMS)) + "|")
    for name, rates in beside.items():
        moved = "" if name in (CUT, ROTATED) else change(rates[DIMS[-1]] - beside[ROTATED][DIMS[-1]])
        lines.append(f"| {name} | " + " | ".join(percent(rates[dim]) for dim in DIMS) + f" | {moved} |")
    return lines


def cure_table(by_name: dict[str, list[Run]], facts: dict[Run, dict], judged: dict[Run, Rates]) -> list[str]:
    """Markdown: a line for every cure, means over its seeds, with its changes from training without one."""
    width, first = str(DIMS[-1]), averaged([judged[run] for run in by_name[FIRST]])
    columns = ["", "core s", "loss", "training speakers, 256", "gap, 256", "best step, EER 256"]
    columns += [f"EER, {dim}" for dim in DIMS] + ["of each seed, 256"] + [f"change, {dim}" for dim in DIMS]
    lines = ["## Each cure", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, runs in by_name.items():
        training, gaps, losses, bests = [], [], [], []
        for told_of in (facts[run] for run in runs):
            development, ended = told_of["eer"]["development"], told_of["eer"]["development"][-1]["step"]
            training.append(100 * point_at(told_of["eer"]["training speakers"], ended)[width])
            gaps.append(100 * development[-1][width] - training[-1])
            losses.append(last_loss(told_of, ended))
            best = told_of["best_step"]
            bests.append(f"{best}, {100 * point_at(development, best)[width]:.1f}")
        rates = averaged([judged[run] for run in runs])
        cells = [name, f"{np.mean([facts[run]['core_seconds'] for run in runs]):.0f}", f"{np.mean(losses):.2f}"]
        cells += [f"{np.mean(training):.1f}", f"{np.mean(gaps):+.1f}", "; ".join(bests)]
        cells += [percent(rates[dim]) for dim in DIMS]
        cells += [", ".join(f"{100 * judged[run][DIMS[-1]].value:.2f}" for run in runs)]
        cells += ["" if name == FIRST else change(rates[dim] - first[dim]) for dim in DIMS]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def point_at(points: list[dict], step: int) -> dict:
    """The evaluation of a step."""
    return next(point for point in points if point["step"] == step)


def last_loss(told_of: dict, step: int) -> float:
    """The mean training loss of the last 16 steps before `step`."""
    return float(np.mean([loss for at, loss in told_of["loss"] if step - 16 < at <= step]))


def test_table(tested: dict[str, dict[str, Rates]]) -> list[str]:
    """Markdown: the test lists, with the changes from the base rotated at its full width."""
    lines = ["## Test lists", "", "| | list | " + " | ".join(f"{dim}" for dim in DIMS) + " | change, 256 |"]
    lines.append("|---" * (3 + len(DIMS)) + "|")
    for name in TESTS:
        reference = tested[ROTATED][name]
        for system, lists in tested.items():
            rates = lists[name]
            moved = "" if system in (CUT, ROTATED) else change(rates[DIMS[-1]] - reference[DIMS[-1]])
            lines.append(f"| {system} | {name} | " + " | ".join(percent(rates[dim]) for dim in DIMS) + f" | {moved} |")
    return lines


def draw(facts: dict[Run, dict], file: Path):
    """A panel for every run of the first seed: EERs of development speakers, and of training speakers at full width."""
    runs = [run for run in facts if run.seed == SEEDS[0]]
    figure, panels = new_panels(len(runs), 4, 3.6, 2.6, below=0.5)
    colors = dict(zip(DIMS, shades(len(DIMS)), strict=True))
    for axes, run in zip(panels, runs, strict=True):
        points = facts[run]["eer"]
        for dim in DIMS:
            axes.plot(*line(points["development"], dim), color=colors[dim], marker="o", markersize=2.5)
        axes.plot(*line(points["training speakers"], DIMS[-1]), color=colors[DIMS[-1]], ls="--")
        axes.axvline(facts[run]["steps"] - ALL, color="grey", lw=0.8, ls=":")
        axes.set(title=run.name, xlabel="step", ylabel="EER %")
        axes.set_ylim(bottom=0)
        axes.title.set_fontsize(9)
    handles = [legend_line(color=colors[dim], label=f"development speakers, {dim} numbers") for dim in DIMS]
    handles.append(legend_line(color=colors[DIMS[-1]], ls="--", label=f"training speakers, {DIMS[-1]} numbers"))
    handles.append(legend_line(color="grey", ls=":", label="the trunk begins to train"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    save_figure(figure, file)


def line(points: list[dict], dim: int) -> tuple[list[float], list[float]]:
    """Steps, and EERs in %."""
    return [point["step"] for point in points], [100 * point[str(dim)] for point in points]


if __name__ == "__main__":
    main()
