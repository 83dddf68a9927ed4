"""Exits of the packaged nano against networks of as many stages: error rates at every depth and dimension, and time.

    pip install praat-parselmouth==0.4.7     # for packaged_speech.py, whose development speakers these are
    python benchmarks/depth_exits.py prepare RUNS --train SPEECH/train SPEECH_MORE/train
    python benchmarks/depth_exits.py train RUNS --seeds 0 1
    python benchmarks/depth_exits.py report RUNS --lists development --out RUNS/dev
    python benchmarks/depth_exits.py report RUNS --speech SPEECH SPEECH_MORE --out docs/results/depth

`prepare` links the training speech and writes its table of nano's own embeddings, the teacher of everything trained
here. `train` makes, with the same steps and crops for each and one thread:

- frozen: exits after stages 1 and 2, all else frozen;
- joint: from there on everything; the whole network stays near nano by the teacher's table;
- alone: networks of 1 and 2 stages, each by itself, that also begin as the frozen exits are.

Settings are chosen by the development trials; the test lists are opened by the last command alone. Runs that are there
are kept. Rates are means over the seeds that are there.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from paired import Drawn, change, eers, mean, percent
from safetensors.torch import save_file
from timing import machine, quartiles, take_turns

import train_hf
from configuration_mrl_redimnet import SAMPLING_RATE
from modeling_mrl_redimnet import MRLReDimNetModel
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.plotting import legend_line, new_panels, save_figure, shades
from mrl_redimnet.saving import load_model, save_model
from mrl_redimnet.scoring.trials import Trials, read_trials
from mrl_redimnet_cli import main as command_line

BASE = "nano"
EXITS = (1, 2)
DIMS = (16, 32, 64, 128, 192, 256)
SHOWN = ("librispeech", "an4", "adults", "children")  # lists in the picture
STEPS = 200
FEW = 4  # development utterances of a speaker that a run is judged by at its end, for its report alone
COMMON = {"steps": STEPS, "batch_size": 16, "crop_seconds": 2.0, "margin_weight": 0, "ema": 0.98, "workers": 0}
COMMON |= {"max_unusable_ratio": 0.02, "evaluate_every": STEPS, "checkpoint_every": STEPS, "tracker": "none"}
COMMON |= {"final_learning_rate": 1e-5, "bootstrap_samples": 10, "dev_speakers": 2}
WITH_EXITS = {"model": BASE, "model_options": json.dumps({"exits": EXITS})}
TAUGHT = {"teacher": "{runs}/teacher", "teacher_loss": "direction", "teacher_axes": "{runs}/axes.safetensors"}
SYSTEMS: dict[str, dict] = {
    "frozen": {**WITH_EXITS, "finetune": "exits", "ema": 0, "learning_rate": 2e-2},
    "joint": {"model": "{frozen}/best", **TAUGHT, "learning_rate": 7e-4},
    **{f"alone, {depth}": {"model": "{start}", **TAUGHT, "learning_rate": 7e-4} for depth in EXITS},
}
SECONDS = (2.0, 6.0)  # of the utterances that are timed


def main():
    """Parses the command line, and does what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("prepare", "train", "report"))
    parser.add_argument("runs", type=Path, metavar="RUNS")
    parser.add_argument("--train", type=Path, nargs="+", default=[], metavar="SPLIT")
    parser.add_argument("--speech", type=Path, nargs="+", default=[], help="folders with test and its trial lists")
    parser.add_argument("--lists", nargs="+", help="[all of them]")
    parser.add_argument("--only", nargs="+", default=list(SYSTEMS), choices=SYSTEMS, help="systems to train [all]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the trainings [0]")
    parser.add_argument("--out", type=Path, help="without suffix")
    parser.add_argument("--resamples", type=int, default=1000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    {"prepare": prepare, "train": train, "report": report}[arguments.command](arguments)


# ----------------------------------------------------------------------------------------------------------------------
# Training


def prepare(arguments: argparse.Namespace) -> None:
    """Development speech and trials as of packaged_speech.py, links to the rest, the teacher's table, its axes."""
    import csv

    from packaged_speech import development, development_speakers

    runs, rng = arguments.runs, random.Random(0)
    speakers = {folder.name: folder for split in arguments.train for folder in sorted((split / "wav").iterdir())}
    genders = {row["speaker"]: row["gender"] for split in arguments.train
               for row in csv.DictReader((split.parent / "metadata.csv").open())}  # fmt: skip
    held_out = development_speakers(speakers, rng)
    (runs / "speech").mkdir(parents=True, exist_ok=True)
    for name in sorted(speakers.keys() - held_out):
        if not (runs / "speech" / name).exists():
            (runs / "speech" / name).symlink_to(speakers[name].resolve())
    lines = development(held_out, speakers, genders, runs / "dev", rng)
    (runs / "dev_trials.txt").write_text("\n".join(lines) + "\n")
    targets = [line.split()[1:] for line in lines if line.startswith("1") and line[2:].startswith("an4")]
    few = {path for name in {first.split("/")[0] for first, _ in targets}
           for path in sorted({path for pair in targets for path in pair if path.startswith(name)})[:FEW]}  # fmt: skip
    kept = [line for line in lines if few.issuperset(line.split()[1:])]
    (runs / "few_trials.txt").write_text("\n".join(kept) + "\n")
    command_line(["embed", BASE, str(runs / "speech"), "--out", str(runs / "teacher")])
    save_file({"axes": torch.eye(DIMS[-1])}, runs / "axes.safetensors")  # nano's prefixes are to stay what they are


def train(arguments: argparse.Namespace) -> None:
    """Trains the systems that are not there yet, each in a process of its own."""
    for seed in arguments.seeds:
        for name in arguments.only:
            if not (folder_of(arguments.runs, name, seed) / "best").exists():
                train_once(arguments.runs, name, seed)


def train_once(runs: Path, name: str, seed: int) -> None:
    """Goes on where an earlier start of this training was ended."""
    way, *depth = name.split(", ")
    frozen, start = folder_of(runs, "frozen", seed), folder_of(runs, f"start, {name[-1]}", seed)
    if way == "alone":
        save_model(load_model(frozen / "best").at_depth(int(depth[0])), start)
    output = folder_of(runs, name, seed)
    settings = {**COMMON, "train": runs / "speech", "dev_trials": runs / "few_trials.txt", "dev_folder": runs / "dev"}
    settings |= {**SYSTEMS[name], "seed": seed, "output": output}
    filled = {"{runs}": runs, "{frozen}": frozen, "{start}": start}
    words = []
    for key, value in settings.items():
        text = str(value)
        for mark, path in filled.items():
            text = text.replace(mark, str(path))
        words.append(f"--{key}={text}")
    resume = ["--resume"] if output.exists() else []
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, train_hf.__file__, *words, *resume], check=True, env=one_thread)


def folder_of(runs: Path, name: str, seed: int) -> Path:
    """Of a system's run."""
    return runs / f"seed-{seed}" / name.replace(", ", "-")


def networks(runs: Path) -> dict[tuple[str, int, int], MRLReDimNetModel]:
    """By system, depth and seed, every network that is trained; nano itself is of depth 3 and has one seed."""
    whole = len(load_model(BASE).config.stages)
    found = {("nano", whole, 0): load_model(BASE)}
    for seed in sorted(int(folder.name.removeprefix("seed-")) for folder in runs.glob("seed-*")):
        for name in SYSTEMS:
            if not (folder_of(runs, name, seed) / "best").exists():
                continue
            model, (way, *depth) = load_model(folder_of(runs, name, seed) / "best"), name.split(", ")
            if depth:
                found[way, int(depth[0]), seed] = model
            else:
                found |= {(way, each, seed): model.at_depth(each) for each in EXITS} | {(way, whole, seed): model}
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Judging


def report(arguments: argparse.Namespace) -> None:
    """Judges every network on every list, exits also against enrolments by the whole; writes OUT.json, .md and .png."""
    runs, models = arguments.runs, networks(arguments.runs)
    files = {file.stem.removeprefix("trials_"): (file, file.parent / "wav")
             for folder in arguments.speech for file in sorted(folder.glob("test/trials_*.txt"))}  # fmt: skip
    files = {"development": (runs / "dev_trials.txt", runs / "dev"), **files}
    lists = {name: files[name] for name in arguments.lists or files}
    rates: dict[tuple[str, int, str, str], dict[int, Drawn]] = {}  # system, depth, "same" or "cross", list
    trained: dict[str, dict[tuple[str, int, str, str], list[float]]] = {}  # of each seed, at full width
    whole = len(load_model(BASE).config.stages)
    for name, (file, folder) in lists.items():
        trials = read_trials(file)
        speech = [folder / path for path in trials.utterances]
        embedded = {key: SpeakerEncoder(model).embed(speech) for key, model in models.items()}
        seeds: dict[tuple[str, int, str, str], list[dict[int, Drawn]]] = {}
        for (way, depth, seed), embeddings in embedded.items():
            own = eers(trials, trials.utterances, embeddings, DIMS, arguments.resamples)
            seeds.setdefault((way, depth, "same", name), []).append(own)
            if depth < whole:
                enrolled = embedded.get((way, whole, seed), embedded["nano", whole, 0])
                crossed = cross(trials, enrolled, embeddings, arguments.resamples)
                seeds.setdefault((way, depth, "cross", name), []).append(crossed)
        rates |= {key: {dim: mean(of[dim] for of in drawn) for dim in DIMS} for key, drawn in seeds.items()}
        trained[name] = {key: [of[DIMS[-1]].value for of in drawn] for key, drawn in seeds.items()}
    times = timed({depth: model for (_, depth, _), model in models.items()})
    text = [HEAD.format(arguments.resamples, machine()), "", *time_table(times, models), ""]
    for name in lists:
        text += [f"## {name}", "", *table(rates, trained[name]), ""]
    records = [
        {"system": way, "depth": depth, "enrolled by": "the whole" if kind == "cross" else "the same depth",
         "list": name, "dim": dim, **drawn.record()}
        for (way, depth, kind, name), of_dims in rates.items() for dim, drawn in of_dims.items()
    ]  # fmt: skip
    found = {"time": {str(depth): each for depth, each in times.items()}, "eer": records}
    arguments.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text("\n".join(text).rstrip() + "\n")
    draw(rates, times, [name for name in lists if name in SHOWN] or list(lists), arguments.out.with_suffix(".png"))
    print("\n".join(text))


def cross(trials: Trials, enrolled: np.ndarray, tested: np.ndarray, resamples: int) -> dict[int, Drawn]:
    """EERs where one network embeds the enrolments and another one the tests, both [N, D] of the trials' utterances."""
    sides = replace(
        trials, enrol=[f"{path}@enrol" for path in trials.enrol], test=[f"{path}@test" for path in trials.test]
    )
    names = [f"{path}@{side}" for side in ("enrol", "test") for path in trials.utterances]
    return eers(sides, names, np.concatenate([enrolled, tested]), DIMS, resamples)


@torch.inference_mode()
def timed(models: dict[int, MRLReDimNetModel]) -> dict[int, dict[str, dict[str, float]]]:
    """{depth: {seconds of an utterance: quartiles of its time over the whole network's in the same round}}."""
    found: dict[int, dict] = {depth: {} for depth in sorted(models)}
    encoders = {depth: SpeakerEncoder(model).model.eval() for depth, model in sorted(models.items())}
    for seconds in SECONDS:
        wave = 0.1 * torch.randn(1, round(seconds * SAMPLING_RATE), generator=torch.Generator().manual_seed(0))
        calls = {str(depth): partial(model, wave) for depth, model in encoders.items()}
        for call in calls.values():
            call()
        times = take_turns(calls, seconds=20.0, fewest=20, most=100)
        longest = times[str(max(encoders))]
        for depth in encoders:
            ratios = [own / whole for own, whole in zip(times[str(depth)], longest, strict=True)]
            found[depth][f"{seconds:g}"] = quartiles(ratios)
    return found


HEAD = """# Exits after each stage

```bash
python benchmarks/depth_exits.py prepare RUNS --train SPEECH/train SPEECH_MORE/train
python benchmarks/depth_exits.py train RUNS --seeds 0 1
python benchmarks/depth_exits.py report RUNS --speech SPEECH SPEECH_MORE --out docs/results/depth
```

EER % with 95 % intervals over speakers ({} resamples). "Tested at the exit": the enrolment is embedded by the whole
network of the same system (by `nano` for networks of their own), the test by the exit. Differences are from the network
of the same depth that was trained alone, from nano's first stages, paired; **bold** where the interval leaves out zero.
Rates are means over the seeds in the last column, which has each one's at 256. {}, one thread."""


def time_table(times: dict[int, dict], models: dict[tuple[str, int, int], MRLReDimNetModel]) -> list[str]:
    """Markdown: a line for every depth."""
    lines = ["| stages | parameters | " + " | ".join(f"time for {each:g} s" for each in SECONDS) + " |"]
    lines.append("|---" * (2 + len(SECONDS)) + "|")
    for depth, of_lengths in times.items():
        model = next(model for (_, each, _), model in models.items() if each == depth)
        size = sum(parameter.numel() for parameter in model.parameters())
        cells = [f"{q['median']:.2f} [{q['low']:.2f}, {q['high']:.2f}]" for q in of_lengths.values()]
        lines.append(f"| {depth} | {size:,} | " + " | ".join(cells) + " |")
    return lines


TITLES = {
    "nano": "`nano` as packaged",
    "frozen": "exits, the rest frozen",
    "joint": "exits, all trained together",
    "alone": "a network of its own, from nano's stages",
}


def table(rates: dict, trained: dict[tuple[str, int, str, str], list[float]]) -> list[str]:
    """Markdown: a line for every network and side of a list; `trained` has its rates of each seed."""
    lines = ["| stages | network | enrolled by | " + " | ".join(map(str, DIMS)) + " | change at 256 | each seed |"]
    lines.append("|---" * (5 + len(DIMS)) + "|")
    for key in sorted(trained, key=lambda key: (-key[1], list(TITLES).index(key[0]), key[2] == "cross")):
        way, depth, kind, name = key
        own, beside = rates[key], rates.get(("alone", depth, "same", name))
        cells = [percent(own[dim]) if dim == DIMS[-1] else f"{100 * own[dim].value:.2f}" for dim in DIMS]
        differs = change(own[DIMS[-1]] - beside[DIMS[-1]]) if beside and (way, kind) != ("alone", "same") else ""
        by = "the whole" if kind == "cross" else "itself"
        each = ", ".join(f"{100 * value:.2f}" for value in trained[key])
        lines.append(f"| {depth} | {TITLES[way]} | {by} | " + " | ".join(cells) + f" | {differs} | {each} |")
    return lines


def draw(rates: dict, times: dict[int, dict], names: Sequence[str], file: Path) -> None:
    """Error over time: a line for every dimension of the exits that were trained together; other networks at 256."""
    figure, panels = new_panels(len(names), 2, 5.2, 3.6, below=0.9)
    at = {depth: times[depth][f"{SECONDS[-1]:g}"]["median"] for depth in times}
    colours = dict(zip(DIMS, shades(len(DIMS)), strict=True))
    others = {"frozen": "^", "alone": "s"}
    ways = {way for way, *_ in rates}
    shown = "joint" if "joint" in ways else "frozen"
    for ax, name in zip(panels, names, strict=True):
        for dim in DIMS:
            eer = [100 * rates[shown, depth, "same", name][dim].value for depth in at]
            ax.plot([*at.values()], eer, "o-", color=colours[dim], markersize=4)
        for way, marker in others.items():
            points = [(at[depth], 100 * rates[way, depth, "same", name][DIMS[-1]].value)
                      for depth in EXITS if (way, depth, "same", name) in rates]  # fmt: skip
            if points:
                ax.scatter(*zip(*points, strict=True), marker=marker, color="tab:red", zorder=3)
        ax.set(title=name, xlabel="time, of the whole network's", ylabel="EER %", xlim=(0, 1.05))
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
    entries = [legend_line(color=colours[dim], marker="o", label=f"exits, {dim} numbers") for dim in DIMS]
    entries += [legend_line(color="tab:red", marker=marker, linestyle="", label=f"{TITLES[way]}, {DIMS[-1]}")
                for way, marker in others.items() if way in ways]  # fmt: skip
    figure.legend(handles=entries, loc="outside lower center", ncols=2 if len(names) == 1 else 3, fontsize=8)
    save_figure(figure, file)


if __name__ == "__main__":
    main()
