"""Which calibration knows best what short speech is worth: forms of it on halves of the development speakers.

    python benchmarks/duration_calibration.py nano --develop TRIALS FOLDER --noise NOISE --kept KEPT \
        --out docs/results/duration_calibration

TRIALS lists development trials of the speech below FOLDER. Utterances are cut as `cut_speech.py` says, and what the
model made of them is kept in KEPT for `durations.py`, too (NOISE is what that hears them with; it has no part here).
The speakers are halved at random, within each corpus, `--splits` times; each form is fitted on the trials among one
half and judged on those among the other, and the other way round. A trial of the fit comes as it is ("whole"), at
drawn lengths ("cut"), or both ways. Thresholds are for 1 % false accepts on what was fitted. No test list is opened.
"""

import argparse
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from cut_speech import CLEAN, WHOLE, Heard, hear
from durations import command_line
from numpy.typing import NDArray
from timing import machine

from mrl_redimnet.audio.cuts import CUTS
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.plotting import new_panels, save_figure, shades
from mrl_redimnet.scoring.calibration import Calibration, Threshold
from mrl_redimnet.scoring.metrics import cllr
from mrl_redimnet.scoring.trials import read_trials
from mrl_redimnet.tables import markdown_table

DIMS = (16, 64, 256)
WANTED = 0.01
EDGES = [low for low, _ in CUTS.values()][1:] + [4.0]  # seconds of the shorter side between classes
FEWEST = 100  # impostors of a class for a threshold; with fewer, the trials of the next shorter class count as well
# What is judged: the cut of enrolment and test.
CONDITIONS = {
    "whole": (WHOLE, WHOLE),
    **{f"test {kind}": (WHOLE, number) for number, kind in enumerate(CUTS)},
    **{f"both {kind}": (number, number) for number, kind in enumerate(CUTS)},
}
SHORT = [name for name in CONDITIONS if name != "whole"]
MEASURES = {"Cllr, bits": 1, "false accepts, %": 100, "misses, %": 100}
TODAY, ENTERED = "one, set on whole", "durations and slope, set on whole and cut"


@dataclass(frozen=True)
class Scored:
    """Trials: scores and labels [T], seconds of both sides [T, 2]."""

    scores: NDArray
    labels: NDArray
    seconds: NDArray

    def where(self, chosen: NDArray) -> "Scored":
        """Some of them."""
        return Scored(self.scores[chosen], self.labels[chosen], self.seconds[chosen])


def joined(*parts: Scored) -> Scored:
    """One after the other."""
    return Scored(*(np.concatenate([getattr(part, name) for part in parts]) for name in Scored.__annotations__))


# ----------------------------------------------------------------------------------------------------------------------
# Forms: a fit on trials -> accepted [T] and LLRs [T] of others

Judge = Callable[[Scored], tuple[NDArray, NDArray]]


def threshold(trials: Scored, seconds: bool) -> Threshold:
    """As `mrl-redimnet calibrate` sets it."""
    given = trials.seconds if seconds else None
    return Threshold.fit(trials.scores, trials.labels, wanted=WANTED, dim=1, weights="", trials="", seconds=given)


def one(trials: Scored) -> Judge:
    """By the score alone."""
    saved = threshold(trials, False)
    return lambda test: saved.judge(test.scores)


def by_class(trials: Scored) -> Judge:
    """By the score alone, for every class of the shorter side."""
    classes = class_of(trials)
    saved: dict[int, Threshold] = {}
    for number in range(len(EDGES) + 1):
        chosen, least = classes == number, number
        while np.count_nonzero(trials.labels[chosen] == 0) < FEWEST:
            least -= 1
            chosen |= classes == least
        saved[number] = threshold(trials.where(chosen), False)

    def judge(test: Scored) -> tuple[NDArray, NDArray]:
        accepted, llrs = np.zeros(len(test.scores), bool), np.zeros(len(test.scores))
        for number, each in saved.items():
            chosen = class_of(test) == number
            accepted[chosen], llrs[chosen] = each.judge(test.scores[chosen])
        return accepted, llrs

    return judge


def class_of(trials: Scored) -> NDArray:
    """[T] of the shorter side."""
    return np.searchsorted(EDGES, trials.seconds.min(axis=1), side="right")


def durations_and_slope(trials: Scored) -> Judge:
    """What the package has."""
    saved = threshold(trials, True)
    return lambda test: saved.judge(test.scores, test.seconds)


def durations(trials: Scored) -> Judge:
    """Additive terms of the durations alone: scores that are moved by them, calibrated by themselves."""
    limits = trials.seconds.min(), trials.seconds.max()

    def columns(given: Scored) -> NDArray:
        return np.column_stack([given.scores, np.log(np.sort(np.clip(given.seconds, *limits), axis=1))])

    shifts = additive(columns(trials), trials.labels)
    saved = threshold(Scored(columns(trials) @ shifts, trials.labels, trials.seconds), False)
    return lambda test: saved.judge(columns(test) @ shifts)


def additive(columns: NDArray, labels: NDArray) -> NDArray:
    """Weights [F] of the columns in a logistic regression at the prior of `Calibration.fit`."""
    from sklearn.linear_model import LogisticRegression

    prior, scale = Calibration.prior, columns.std(axis=0)
    weights = np.where(labels == 1, prior / np.sum(labels == 1), (1 - prior) / np.sum(labels == 0)) * len(labels)
    fitted = LogisticRegression(C=np.inf, max_iter=1000, tol=1e-8).fit(columns / scale, labels, sample_weight=weights)
    return fitted.coef_[0] / scale


# name: (the fit, on whole trials, on cut ones)
FORMS: dict[str, tuple[Callable[[Scored], Judge], bool, bool]] = {
    TODAY: (one, True, False),
    "durations and slope, set on whole": (durations_and_slope, True, False),
    "one, set on cut": (one, False, True),
    "one, set on whole and cut": (one, True, True),
    "by class, set on cut": (by_class, False, True),
    "by class, set on whole and cut": (by_class, True, True),
    "durations, set on cut": (durations, False, True),
    "durations, set on whole and cut": (durations, True, True),
    "durations and slope, set on cut": (durations_and_slope, False, True),
    ENTERED: (durations_and_slope, True, True),
}


# ----------------------------------------------------------------------------------------------------------------------
# Splits


def main():
    """Parses the command line, measures, writes OUT.md, OUT.json and OUT.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--develop", type=Path, nargs=2, required=True, metavar=("TRIALS", "FOLDER"))
    parser.add_argument("--noise", type=Path, required=True)
    parser.add_argument("--kept", type=Path, required=True, metavar="KEPT")
    parser.add_argument("--splits", type=int, default=20, help="[20]")
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="a false-accept rate")  # the tables show what the rate came to
    trials, folder = arguments.develop
    encoder = SpeakerEncoder.from_pretrained(arguments.model, device="cpu")
    heard = hear(encoder, read_trials(trials), folder, arguments.noise, arguments.kept / "development.npz")
    found: dict[int, NDArray] = {dim: measured(heard, dim, arguments.splits) for dim in DIMS}
    record = {
        "command": command_line(),
        "machine": machine(),
        "forms": list(FORMS),
        "conditions": list(CONDITIONS),
        "measures": list(MEASURES),
        "values": {str(dim): values.round(4).tolist() for dim, values in found.items()},
    }
    text = report(record, found, heard)
    print(text)
    arguments.out.with_suffix(".json").write_text(json.dumps(record) + "\n")
    arguments.out.with_suffix(".md").write_text(text)
    draw(found[DIMS[-1]], arguments.out.with_suffix(".png"))


def measured(heard: Heard, dim: int, splits: int) -> NDArray:
    """[halves, FORMS, CONDITIONS, MEASURES]; each split gives two halves."""
    found = []
    speakers = np.stack(heard.trials.speakers, axis=1)
    for seed in range(splits):
        rng = np.random.default_rng(seed)
        mine = np.isin(speakers, half(np.unique(speakers), rng))
        first, second = np.flatnonzero(mine.all(axis=1)), np.flatnonzero(~mine.any(axis=1))
        for fitted, judged in ((first, second), (second, first)):
            whole, cut = scored(heard, dim, fitted, WHOLE, WHOLE), drawn(heard, dim, fitted, rng)
            tests = [condition(heard, dim, judged, *kinds) for kinds in CONDITIONS.values()]
            rows = []
            for fit, on_whole, on_cut in FORMS.values():
                judge = fit(joined(*[whole] * on_whole, *[cut] * on_cut))
                rows.append([rates(judge, test) for test in tests])
            found.append(rows)
        print(f"{dim} numbers, split {seed + 1} of {splits}", flush=True)
    return np.array(found)


def half(speakers: Sequence[str], rng: np.random.Generator) -> list[str]:
    """Of the speakers of each corpus, which their names begin with; of an odd number, one more or one less."""
    chosen = []
    for corpus in sorted({name[:2] for name in speakers}):
        own = rng.permutation([name for name in speakers if name.startswith(corpus)])
        chosen += [*own[: (len(own) + rng.integers(2)) // 2]]
    return chosen


def scored(heard: Heard, dim: int, rows: NDArray, enrol: NDArray | int, test: NDArray | int) -> Scored:
    """The trials `rows` [T] with these cuts of their sides, one for all or [T]."""
    sides = [(np.broadcast_to(kind, rows.shape), side[rows])
             for kind, side in zip((enrol, test), heard.trials.rows, strict=True)]  # fmt: skip
    units = [heard.embeddings[(CLEAN, *side)][:, :dim].astype(float) for side in sides]
    units = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in units]
    seconds = np.stack([heard.seconds[(CLEAN, *side)] for side in sides], axis=1)
    return Scored(np.sum(units[0] * units[1], axis=1), heard.trials.labels[rows], seconds)


def drawn(heard: Heard, dim: int, rows: NDArray, rng: np.random.Generator) -> Scored:
    """The trials, each side whole or cut to a class that it is long enough for, with equal chances."""
    return scored(heard, dim, rows, *(heard.drawn(side[rows], rng) for side in heard.trials.rows))


def condition(heard: Heard, dim: int, rows: NDArray, enrol: int, test: int) -> Scored:
    """Of the trials, those whose sides are long enough."""
    of_enrol, of_test = (side[rows] for side in heard.trials.rows)
    there = np.isfinite(heard.seconds[CLEAN, enrol, of_enrol]) & np.isfinite(heard.seconds[CLEAN, test, of_test])
    return scored(heard, dim, rows[there], enrol, test)


def rates(judge: Judge, test: Scored) -> list[float]:
    """Cllr, false accepts and misses."""
    accepted, llrs = judge(test)
    targets = test.labels == 1
    return [cllr(llrs, test.labels), float(accepted[~targets].mean()), float(1 - accepted[targets].mean())]


# ----------------------------------------------------------------------------------------------------------------------
# Pages


def report(record: dict, found: dict[int, NDArray], heard: Heard) -> str:
    """Markdown."""
    splits = len(next(iter(found.values()))) // 2
    labels = heard.trials.labels
    parts = [
        "# A calibration that knows the length",
        "",
        "```bash",
        record["command"],
        "```",
        "",
        f"{record['machine']}. Means over {splits} splits of the development speakers, both ways; "
        f"{len(np.unique(np.stack(heard.trials.speakers)))} speakers, {labels.sum():,} target and "
        f"{len(labels) - labels.sum():,} impostor trials, of which each half has about a half and a quarter. "
        f"**{ENTERED}** is what `mrl-redimnet calibrate --durations` does, *{TODAY}* what it does without.",
    ]
    for dim, values in found.items():
        parts += ["", f"## {dim} numbers", "", changes_table(values)]
        for number, (measure, unit) in enumerate(MEASURES.items()):
            parts += ["", f"### {measure}", "", table(unit * values[..., number].mean(axis=0), 3 if unit == 1 else 1)]
    return "\n".join([*parts, ""])


def changes_table(values: NDArray) -> str:
    """Cllr against today's, paired over the halves of the splits: mean, and from where to where 95 % of them lie."""
    costs = values[..., 0]
    whole, short = costs[:, :, 0], costs[:, :, 1:].mean(axis=2)
    lines = [["calibration", "Cllr of short trials, change", "better in", "of whole trials", "better in"]]
    for row, name in enumerate(FORMS):
        cells = []
        for each in (short, whole):
            change = each[:, row] - each[:, 0]
            low, high = np.quantile(change, [0.025, 0.975])
            cells += [f"{change.mean():+.3f} [{low:+.3f}, {high:+.3f}]", f"{100 * np.mean(change < 0):.0f} %"]
        first = f"{short[:, 0].mean():.3f}", "", f"{whole[:, 0].mean():.3f}", ""
        lines.append([styled(name), *(first if row == 0 else cells)])
    return markdown_table(lines, aligned=False)


def table(means: NDArray, digits: int) -> str:
    """A row for every form: means [FORMS, CONDITIONS]."""
    lines = [["calibration", *CONDITIONS]]
    for name, row in zip(FORMS, means, strict=True):
        lines.append([styled(name), *(f"{value:.{digits}f}" for value in row)])
    return markdown_table(lines, aligned=False)


def styled(name: str) -> str:
    """What is, and what was."""
    return f"**{name}**" if name == ENTERED else f"*{name}*" if name == TODAY else name


def draw(values: NDArray, file: Path) -> None:
    """Cllr, false accepts and misses of the most telling forms over the conditions."""
    names = [TODAY, "one, set on whole and cut", "by class, set on whole and cut", ENTERED]
    figure, panels = new_panels(3, 3, 4.6, 4.2)
    places = np.arange(len(CONDITIONS))
    for axes, (number, (measure, unit)) in zip(panels, enumerate(MEASURES.items()), strict=True):
        for name, colour in zip(names, shades(len(names)), strict=True):
            each = unit * values[:, list(FORMS).index(name), :, number].mean(axis=0)
            axes.plot(places, each, marker="o", color=colour, label=name)
        axes.set_xticks(places, CONDITIONS, rotation=45, ha="right", fontsize=8)
        axes.set(ylabel=measure, ylim=(0, None))
        axes.grid(alpha=0.3)
    panels[0].set(
        yscale="log", ylim=(0.1, 30), yticks=[0.1, 0.2, 0.5, 1, 2, 5, 10], yticklabels=[0.1, 0.2, 0.5, 1, 2, 5, 10]
    )
    panels[1].axhline(100 * WANTED, color="0.7", zorder=0)
    panels[0].legend(fontsize=8)
    save_figure(figure, file)


if __name__ == "__main__":
    main()
