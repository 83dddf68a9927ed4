"""What each ingredient of the small-corpus recipe brings: the recipe with and without it, at equal budgets.

    python benchmarks/ingredients.py train --speech ROOT --runs runs/ingredients --teacher MODEL [--seeds 0 1 2]
    python benchmarks/ingredients.py report --speech ROOT --runs runs/ingredients --out docs/results/ingredients

ROOT holds train, noise/train, test/wav and test/trials_*.txt. Every run has one thread; `--parallel` of them go side by
side. Finished runs are kept, so a stopped `train` goes on. The table's EERs are means over seeds; a difference to the
whole recipe is the mean over seeds of differences at the same seed, its interval is from one bootstrap over speakers.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from compare_adapters import machine, trial_lists
from paired import eers, mean

from modeling_mrl_redimnet import MRLReDimNetForXVector
from mrl_redimnet.data.corpus import audio_source, load_corpus, split_usable
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.evaluation.results import embed_trials
from mrl_redimnet.rotation import principal_rotation
from mrl_redimnet.scoring.trials import Trials
from mrl_redimnet.training.averaging import LastWeights
from mrl_redimnet.training.reading import flat, in_groups, read_recipe

ROOT = Path(__file__).parents[1]
DIMS = (8, 16, 32, 64, 128, 256)
# Recipe of all runs: that of the small corpus, shorter, with a hop of 15 ms, and averages kept to be judged.
RECIPE = ROOT / "recipes" / "nano_small_corpus.yaml"
OPTIONS = {**read_recipe(RECIPE).model.model_options, "hop_length": 240}
SHORTER = dict(steps=300, evaluate_every=75, checkpoint_every=300, bootstrap_samples=0, tracker="none")
SHORTER |= dict(model_options=OPTIONS, workers=0, report_dims=[], ema=0.97, tests={}, weight_averaging=0)
SHORTER |= dict(speed_perturb=[1.0], prefix_starts=[], margin_schedule=[0.3, 0.7])  # what 300 steps can use


@dataclass(frozen=True)
class Variant:
    """One way to train: what differs from the whole recipe, and the variant whose model it starts from."""

    changes: dict = field(default_factory=dict)
    after: str | None = None
    taught: bool = False


ROOMS = [{"kind": "one_of", "probability": 0.6, "choices": [
    {"kind": "reverberation"},
    {"kind": "one_of", "choices": [{"kind": "noise", "snr": [0, 15]}, {"kind": "babble", "snr": [10, 30]}]},
]}]  # fmt: skip
LAST_ONLY = [0.0] * (len(OPTIONS["matryoshka_dims"]) - 1) + [1.0]
PLAIN = {**OPTIONS, "spec_augment": False}
# A second stage of a tenth of the steps: long crops, a large margin, the classifier's rows kept by name.
LARGE_MARGIN = dict(steps=30, crop_seconds=4.0, batch_size=24, learning_rate=1e-4, margin_schedule=[0, 0])
LARGE_MARGIN |= dict(model_options={}, margin=0.4, rotate_at=[], evaluate_every=15, ema=0.0)
VARIANTS = {
    "whole": Variant(dict(weight_averaging=0.75)),
    "no augmentation": Variant(dict(augmentations=[], model_options=PLAIN)),
    "speeds": Variant(dict(speed_perturb=[1.0, 0.9, 1.1])),
    "rooms and babble": Variant(dict(augmentations=ROOMS)),
    "margin from the start": Variant(dict(margin_schedule=[0, 0])),
    "utterances alike": Variant(dict(sampler="utterance")),
    "plain loss": Variant(dict(prefix_weights=LAST_ONLY, rotate_at=[])),
    "prefix loss alone": Variant(dict(rotate_at=[])),
    "distilled": Variant(taught=True),
    "large margin": Variant(LARGE_MARGIN, after="whole"),
}
# Rows of the table: (title, variant, weights, rotated at the end).
ROWS = (
    ("the whole recipe: moving average, best step", "whole", "best_as_trained", False),
    ("without average: the last step's weights", "whole", "last", False),
    ("mean of the last two evaluations instead", "whole", "mean", False),
    ("without any augmentation", "no augmentation", "best_as_trained", False),
    ("three speeds, as speakers of their own", "speeds", "best_as_trained", False),
    ("rooms and babble beside noise", "rooms and babble", "best_as_trained", False),
    ("the whole margin from the first step on", "margin from the start", "best_as_trained", False),
    ("utterances alike instead of speakers", "utterances alike", "best_as_trained", False),
    ("then a large-margin stage", "large margin", "best_as_trained", False),
    ("distilled from a longer trained model", "distilled", "best_as_trained", False),
    ("prefixes: plain loss, cut", "plain loss", "best_as_trained", False),
    ("prefixes: plain loss, rotated at the end", "plain loss", "best_as_trained", True),
    ("prefixes: their loss alone", "prefix loss alone", "best_as_trained", False),
    ("prefixes: their loss, rotated at the end", "prefix loss alone", "best_as_trained", True),
    ("prefixes: their loss, rotated during training and at the end", "whole", "best_as_trained", True),
)


def main():
    """Trains what is missing, or reports what is there."""
    arguments = parse()
    if arguments.command == "train":
        train(arguments)
    else:
        report(arguments)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "report"))
    parser.add_argument("--speech", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="without suffix")
    parser.add_argument("--teacher", help="path or Hub id of the model to distil from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--resamples", type=int, default=400)
    return parser.parse_args()


# ---------------------------------------------------------------- training


def train(arguments: argparse.Namespace):
    """All variants of the first seed, then of the next; those that continue another's model at the end of a seed."""
    for seed in arguments.seeds:
        waves = [[v for v in arguments.variants if (VARIANTS[v].after is None) is first] for first in (True, False)]
        for wave in waves:
            with ThreadPoolExecutor(arguments.parallel) as pool:
                list(pool.map(lambda variant, seed=seed: run(arguments, variant, seed), wave))


def run(arguments: argparse.Namespace, name: str, seed: int):
    """One training in a process of its own, unless it has been done."""
    variant, folder = VARIANTS[name], folder_of(arguments.runs, name, seed)
    if (folder / "results.json").is_file():
        return
    settings = {**SHORTER, **variant.changes, "seed": seed, "output": str(folder)}
    settings |= {"train": str(arguments.speech / "train"), "noise": str(arguments.speech / "noise" / "train")}
    if variant.after:
        settings["model"] = str(folder_of(arguments.runs, variant.after, seed) / "best_as_trained")
    if variant.taught:
        if arguments.teacher is None:
            raise ValueError(f"--teacher: the variant {name!r} needs one.")
        settings |= {"teacher": arguments.teacher, "teacher_hears": "same"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(in_groups(flat(read_recipe(RECIPE, settings)))))
    command = [sys.executable, str(ROOT / "train_hf.py"), str(folder / "recipe.yaml"), "--resume"]
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{name}, seed {seed}: the training stopped, see {folder / 'log.txt'}.")
    seconds = usage.ru_utime + usage.ru_stime  # of one core, whatever else ran beside
    (folder / "cpu_seconds.txt").write_text(f"{seconds:.0f}\n")
    print(f"{name}, seed {seed}: {seconds:.0f} s of CPU", flush=True)


def folder_of(runs: Path, variant: str, seed: int) -> Path:
    """Where a run lies."""
    return runs / f"{variant.replace(' ', '_')}-{seed}"


# ---------------------------------------------------------------- report


def report(arguments: argparse.Namespace):
    """Embeds both test lists with every row's models, scores, writes OUT.json and OUT.md."""
    torch.set_num_threads(os.cpu_count())
    lists = trial_lists(arguments.speech)
    training = training_sources(arguments.speech)
    rows, whole = [], {}
    for title, variant, weights, rotated in ROWS:
        by_seed = {}
        for seed in arguments.seeds:
            folder = folder_of(arguments.runs, variant, seed)
            if (folder / "results.json").is_file():
                embeddings = embed(folder, weights, rotated, lists, training, arguments.speech)
                by_seed[seed] = dict(values_of(lists, embeddings, arguments.resamples))
        if by_seed:
            whole = whole or by_seed
            rows += summaries(title, by_seed, whole)
            print(title, f"{len(by_seed)} seeds", flush=True)
    seconds = {path.parent.name: int(path.read_text()) for path in sorted(arguments.runs.glob("*/cpu_seconds.txt"))}
    record = {"machine": machine(), "resamples": arguments.resamples, "seconds": seconds, "rows": rows}
    arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(table(record))
    print(table(record))


def training_sources(speech: Path) -> list:
    """The training speech, which rotations are computed on."""
    corpus, _ = split_usable(load_corpus(speech / "train"), 0.3)
    return [audio_source(corpus, row) for row in range(len(corpus))]


def embed(
    folder: Path, weights: str, rotated: bool, lists: dict[str, Trials], training: list, speech: Path
) -> np.ndarray:
    """Embeddings [N, D] of the test utterances by one run's model."""
    model = MRLReDimNetForXVector.from_pretrained(folder / ("best_as_trained" if weights == "mean" else weights)).eval()
    if weights == "mean":
        model = copy.deepcopy(model)
        turns = read_recipe(RECIPE).schedule.rotate_at
        last_turn = int(max(turns) * SHORTER["steps"])  # weights of two bases have no mean
        kept = round(VARIANTS["whole"].changes["weight_averaging"] * SHORTER["steps"] / SHORTER["evaluate_every"])
        LastWeights(folder / "last_weights", kept).mean_into(model, last_turn + 1)
    embeddings = embed_trials(model, lists["both lists"], speech / "test" / "wav")
    if rotated:  # turning the embeddings is turning the model
        embeddings = embeddings @ principal_rotation(SpeakerEncoder(model).embed(training))[0].astype(np.float32)
    return embeddings


def values_of(lists: dict[str, Trials], embeddings: np.ndarray, resamples: int) -> Iterator:
    """((list, dim), EER)."""
    for name, trials in lists.items():
        if name != "both lists":
            for dim, drawn in eers(trials, lists["both lists"].utterances, embeddings, DIMS, resamples).items():
                yield (name, dim), drawn


def summaries(title: str, by_seed: dict, whole: dict) -> Iterator[dict]:
    """A row's mean over seeds and its difference to the whole recipe at the same seeds, per list and dimension."""
    for key in next(iter(by_seed.values())):
        drawn = mean(values[key] for values in by_seed.values())
        changes = [values[key] - whole[seed][key] for seed, values in by_seed.items() if seed in whole]
        (low, high), (change_low, change_high) = drawn.interval, mean(changes).interval
        yield {
            "row": title,
            "list": key[0],
            "dim": key[1],
            "seeds": len(by_seed),
            "eer": drawn.value,
            "eer_low": low,
            "eer_high": high,
            "difference": mean(changes).value,
            "difference_low": change_low,
            "difference_high": change_high,
            "difference_by_seed": [change.value for change in changes],
        }


def table(record: dict) -> str:
    """Markdown: per list, rows by dimensions."""
    rows = record["rows"]
    minutes = sum(record["seconds"].values()) / 60
    text = [
        "# What each ingredient brings",
        "",
        "EER %, mean over seeds; below it the difference to the whole recipe: mean over seeds, [its 95 % interval, one "
        f"bootstrap over speakers, {record['resamples']} resamples], (range over seeds). **Bold** where the interval "
        f"excludes zero and all seeds agree in sign. {len(record['seconds'])} runs, {minutes:.0f} minutes of one core "
        f"altogether. {record['machine']}.",
    ]
    for name in dict.fromkeys(row["list"] for row in rows):
        here = {(row["row"], row["dim"]): row for row in rows if row["list"] == name}
        titles = list(dict.fromkeys(title for title, _ in here))
        text += [
            "",
            f"## {name}",
            "",
            "| | seeds | " + " | ".join(map(str, DIMS)) + " |",
            "|---" * (len(DIMS) + 2) + "|",
        ]
        for title in titles:
            cells = [cell(here[title, dim], title == titles[0]) for dim in DIMS]
            text.append(f"| {title} | {here[title, DIMS[0]]['seeds']} | " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def cell(row: dict, is_whole: bool) -> str:
    """One row at one dimension."""
    if is_whole:
        return f"{100 * row['eer']:.2f} [{100 * row['eer_low']:.1f}, {100 * row['eer_high']:.1f}]"
    change = f"{100 * row['difference']:+.2f} [{100 * row['difference_low']:+.1f}, {100 * row['difference_high']:+.1f}]"
    by_seed = row["difference_by_seed"]
    agreed = row["difference_low"] * row["difference_high"] > 0 and min(by_seed) * max(by_seed) > 0
    change = f"**{change}**" if agreed else change
    return f"{100 * row['eer']:.2f}<br>{change}<br>({100 * min(by_seed):+.1f} to {100 * max(by_seed):+.1f})"


if __name__ == "__main__":
    main()
