"""How short utterances may be: error rates of a model by seconds of the test utterance, and of both sides.

    python benchmarks/durations.py nano --develop TRIALS FOLDER --speech SPLIT ... --noise TRAIN TEST --kept KEPT \
        --out docs/results/durations

TRIALS lists development trials of the speech below FOLDER. A SPLIT holds wav/ and trial lists trials_*.txt. Utterances
are cut as `cut_speech.py` says, and what the model made of them is kept in KEPT for `quality_measures.py`, too (TRAIN
and TEST are the folders of noise that it needs). The one threshold is set on the development trials as they are, for
1 % false accepts; a class's own on these trials cut to that class; the one that knows durations as `mrl-redimnet
calibrate --durations` sets it. No threshold sees a test list.
"""

import argparse
import json
import shlex
import sys
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from cut_speech import CLASSES, CLEAN, WHOLE, Heard, hear
from numpy.typing import NDArray
from paired import Drawn, mean, percent
from timing import machine

from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.evaluation.groups import false_alarm_rate, miss_rate
from mrl_redimnet.plotting import new_panels, save_figure, shades
from mrl_redimnet.scoring.calibration import Threshold, threshold_at
from mrl_redimnet.scoring.metrics import bootstrap_together, eer
from mrl_redimnet.scoring.trials import read_trials
from mrl_redimnet.tables import markdown_table

DIMS = (16, 64, 256)
SIDES = ("test", "both")  # which are cut
WANTED = 0.01
FAR = "telephone"  # kept apart from the mean over lists
LEFT_OUT = ("telephone_handset",)  # a part of another list
NEAR = "mean of the others"
RATES = ("eer", "miss", "false", "own miss", "own false", "known miss", "known false")

Key = tuple[str, int, int, str]  # list, class, dim, side
Found = dict[Key, dict[str, Drawn]]


def main():
    """Parses the command line, listens, measures, writes OUT.md, OUT.json and OUT.png."""
    arguments = parse(__doc__)
    develop, lists = hear_all(arguments)
    whole = CLEAN, WHOLE
    one = {dim: threshold_at(develop.scores(dim, whole, whole), develop.trials.labels, WANTED) for dim in DIMS}
    known = {dim: knowing_durations(develop, dim) for dim in DIMS}
    own = {(number, dim, side): own_threshold(develop, number, dim, side)
           for number in range(len(CLASSES)) for dim in DIMS for side in SIDES}  # fmt: skip
    found: Found = {}
    for name, heard in lists.items():
        for number, dim, side in own:
            limits = one[dim], own[number, dim, side]
            of_scores = rates(heard, number, dim, side, limits, arguments.resamples)
            of_llrs = known_rates(heard, number, dim, side, known[dim], arguments.resamples)
            found[name, number, dim, side] = of_scores | of_llrs
        print(name, flush=True)
    near = [name for name in lists if name != FAR]
    for key in own:
        found[NEAR, *key] = {rate: mean(found[name, *key][rate] for name in near) for rate in RATES}
    record = {
        "command": command_line(),
        "machine": machine(),
        "resamples": arguments.resamples,
        "thresholds": {"one": one, "own": {"|".join(map(str, key)): value for key, value in own.items()}},
        "rates": {"|".join(map(str, key)): {name: drawn.record() for name, drawn in each.items()}
                  for key, each in found.items()},
    }  # fmt: skip
    text = report(record, lists, found, one, own)
    print(text)
    arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(text)
    draw(found, arguments.out.with_suffix(".png"))


def parse(description: str) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--develop", type=Path, nargs=2, required=True, metavar=("TRIALS", "FOLDER"))
    parser.add_argument("--speech", type=Path, nargs="+", required=True, metavar="SPLIT")
    parser.add_argument("--noise", type=Path, nargs=2, required=True, metavar=("TRAIN", "TEST"))
    parser.add_argument("--kept", type=Path, required=True, metavar="KEPT")
    parser.add_argument("--resamples", type=int, default=500, help="of the bootstrap over speakers [500]")
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    return parser.parse_args()


def command_line() -> str:
    """As it was typed."""
    return shlex.join(["python", *sys.argv])


def hear_all(arguments: argparse.Namespace) -> tuple[Heard, dict[str, Heard]]:
    """The development trials, and the test lists by their names."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="a false-accept rate")  # the tables show what the rate came to
    encoder = SpeakerEncoder.from_pretrained(arguments.model, device="cpu")
    trials, folder = arguments.develop
    develop = hear(encoder, read_trials(trials), folder, arguments.noise[0], arguments.kept / "development.npz")
    lists = {}
    for path in [path for split in arguments.speech for path in sorted(split.glob("trials_*.txt"))]:
        name = path.stem.removeprefix("trials_")
        if name not in LEFT_OUT:
            kept = arguments.kept / f"{name}.npz"
            lists[name] = hear(encoder, read_trials(path), path.parent / "wav", arguments.noise[1], kept)
    return develop, lists


# ----------------------------------------------------------------------------------------------------------------------
# Rates


def of_class(heard: Heard, number: int, side: str) -> NDArray:
    """[T] whether the sides that are cut have the class."""
    enrol, test = (heard.has(number)[rows] for rows in heard.trials.rows)
    return test & enrol if side == "both" else test


def scores_of(heard: Heard, number: int, dim: int, side: str) -> tuple[NDArray, NDArray]:
    """Scores [T] of a class, and [T] which trials have it."""
    enrol = (CLEAN, number if side == "both" else WHOLE)
    return heard.scores(dim, enrol, (CLEAN, number)), of_class(heard, number, side)


def own_threshold(develop: Heard, number: int, dim: int, side: str) -> float:
    """For `WANTED` on the development trials of the class."""
    scores, chosen = scores_of(develop, number, dim, side)
    return threshold_at(scores[chosen], develop.trials.labels[chosen], WANTED)


def rates(
    heard: Heard, number: int, dim: int, side: str, limits: tuple[float, float], resamples: int
) -> dict[str, Drawn]:
    """EER, and misses and false accepts at the one and at the class's own threshold."""
    scores, chosen = scores_of(heard, number, dim, side)
    one, own = limits
    metrics = {
        "eer": eer,
        "miss": partial(miss_rate, threshold=one),
        "false": partial(false_alarm_rate, threshold=one),
        "own miss": partial(miss_rate, threshold=own),
        "own false": partial(false_alarm_rate, threshold=own),
    }
    trials = scores[chosen], heard.trials.labels[chosen]
    enrol, test = (each[chosen] for each in heard.trials.speakers)
    values = bootstrap_together(*trials, enrol, test, metrics, resamples)
    return {name: Drawn(metric(*trials), values[name]) for name, metric in metrics.items()}


def knowing_durations(develop: Heard, dim: int) -> Threshold:
    """Set on the development trials as they are and, once more, at drawn lengths."""
    rng = np.random.default_rng(0)
    drawn = [(CLEAN, develop.drawn(rows, rng)) for rows in develop.trials.rows]
    both = [[(CLEAN, WHOLE)] * 2, drawn]
    scores = np.concatenate([develop.scores(dim, *sides) for sides in both])
    seconds = np.concatenate([develop.sides_seconds(*sides) for sides in both])
    labels = np.tile(develop.trials.labels, 2)
    return Threshold.fit(scores, labels, seconds=seconds, wanted=WANTED, dim=dim, weights="", trials="development")


def known_rates(heard: Heard, number: int, dim: int, side: str, saved: Threshold, resamples: int) -> dict[str, Drawn]:
    """Misses and false accepts of the threshold that knows durations."""
    scores, chosen = scores_of(heard, number, dim, side)
    enrol = (CLEAN, number if side == "both" else WHOLE)
    llrs = saved.calibration(scores[chosen], heard.sides_seconds(enrol, (CLEAN, number))[chosen])
    metrics = {
        "known miss": partial(miss_rate, threshold=saved.threshold),
        "known false": partial(false_alarm_rate, threshold=saved.threshold),
    }
    labels, (enrol, test) = heard.trials.labels[chosen], (each[chosen] for each in heard.trials.speakers)
    values = bootstrap_together(llrs, labels, enrol, test, metrics, resamples)
    return {name: Drawn(metric(llrs, labels), values[name]) for name, metric in metrics.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Pages


def report(record: dict, lists: Mapping[str, Heard], found: Found, one: dict, own: dict) -> str:
    """Markdown."""
    return "\n".join([
        "# Short utterances",
        "",
        "```bash",
        record["command"],
        "```",
        "",
        f"{record['machine']}. In brackets 95 % intervals from {record['resamples']} resamples of the speakers.",
        "",
        "## EER %, enrolment whole, test utterance cut",
        "",
        eer_table(lists, found, "test"),
        "",
        "## EER %, both sides cut",
        "",
        eer_table(lists, found, "both"),
        "",
        f"## Misses and false accepts %, thresholds for {100 * WANTED:g} % false accepts",
        "",
        *[part for name in (NEAR, FAR)
          for part in (f"### {name.capitalize()}", "", at_thresholds(name, found, one, own), "")],
        "## Trials: targets and impostors",
        "",
        counts(lists),
        "",
    ])  # fmt: skip


def eer_table(lists: Mapping[str, Heard], found: Found, side: str) -> str:
    """A row for every dimension and class."""
    names = [*lists, NEAR]
    lines = [["numbers", "duration", *names]]
    for dim in DIMS:
        for number, label in enumerate(CLASSES):
            lines.append([str(dim), label, *(percent(found[name, number, dim, side]["eer"]) for name in names)])
    return markdown_table(lines, left=(0, 1), aligned=False)


def at_thresholds(name: str, found: Found, one: dict, own: dict) -> str:
    """Both thresholds, side by side."""
    lines = [["numbers", "cut", "duration", "the one: misses", "false accepts", "own: misses", "false accepts",
              "knowing durations: misses", "false accepts", "the one, own"]]  # fmt: skip
    for dim in DIMS:
        for side in SIDES:
            for number, label in enumerate(CLASSES):
                cells = [percent(found[name, number, dim, side][rate]) for rate in RATES[1:]]
                limits = f"{one[dim]:.3f}, {own[number, dim, side]:.3f}"
                lines.append([str(dim), side, label, *cells, limits])
    return markdown_table(lines, left=(0, 1, 2), aligned=False)


def counts(lists: Mapping[str, Heard]) -> str:
    """How many trials have each class."""
    lines = [["cut", "duration", *lists]]
    for side in SIDES:
        for number, label in enumerate(CLASSES):
            cells = []
            for heard in lists.values():
                labels = heard.trials.labels[of_class(heard, number, side)]
                cells.append(f"{labels.sum():,}, {len(labels) - labels.sum():,}")
            lines.append([side, label, *cells])
    return markdown_table(lines, left=(0, 1), aligned=False)


def draw(found: Found, file: Path) -> None:
    """EER by class and dimension, and what the one threshold does."""
    figure, (left, right) = new_panels(2, 2, 5.5, 4)
    places = np.arange(len(CLASSES))
    for dim, colour in zip(DIMS, shades(len(DIMS)), strict=True):
        for side, style in (("test", "-"), ("both", "--")):
            each = [found[NEAR, number, dim, side]["eer"] for number in range(len(CLASSES))]
            label = f"{dim} numbers" + (", both sides short" if side == "both" else "")
            left.plot(places, [100 * one.value for one in each], style, color=colour, marker="o", label=label)
    left.set(ylabel="EER, %, mean of four lists", ylim=(0, None))
    names = {"miss": "misses, the one threshold", "known miss": "misses, knowing durations",
             "false": "false accepts, the one", "known false": "false accepts, knowing durations"}  # fmt: skip
    for (rate, label), colour in zip(names.items(), np.repeat(shades(2, 0.1, 0.6), 2, axis=0), strict=True):
        each = [found[NEAR, number, DIMS[-1], "test"][rate] for number in range(len(CLASSES))]
        low, high = np.array([one.interval for one in each]).T
        style = "--" if rate.startswith("known") else "-"
        right.plot(places, [100 * one.value for one in each], style, color=colour, marker="o", label=label)
        right.fill_between(places, 100 * low, 100 * high, color=colour, alpha=0.1)
    right.set(ylabel=f"%, test side short, {DIMS[-1]} numbers", yscale="log")
    for axes in (left, right):
        axes.set_xticks(places, CLASSES)
        axes.set_xlabel("the test utterance")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    save_figure(figure, file)


if __name__ == "__main__":
    main()
