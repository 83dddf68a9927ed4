"""Ways to score, multi-enrolment, calibration and thresholds of one model at every dimension.

    python benchmarks/compare_scoring.py MODEL --speech ROOT --out docs/results/scoring

ROOT holds test/wav, test/trials_*.txt and train/wav in folders of speakers. Every utterance is embedded once. The
cohort is one utterance per training speaker; intervals and differences come from one bootstrap over test speakers, so
a difference's interval is paired. A calibration and a threshold are set on other trials than they are judged on:
development trials drawn from training speech, the other list, or half of the test speakers. --quick: few training
utterances and resamples, to try the script.
"""

import argparse
import json
import os
import platform
import time
import warnings
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from mrl_redimnet.audio.io import audio_info
from mrl_redimnet.data.corpus import AUDIO_SUFFIXES
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.saving import load_model
from mrl_redimnet.scoring.calibration import Calibration, threshold_at
from mrl_redimnet.scoring.metrics import act_dcf, bootstrap_values, cllr, eer, min_cllr, min_dcf, quantile_interval
from mrl_redimnet.scoring.scorers import SCORERS, make_scorer, score, trial_seconds
from mrl_redimnet.scoring.trials import Trials, make_trials, read_trials, speaker_of

WANTED = 0.01  # false-accept rate of the thresholds
ENROLLED = 3  # utterances of a multi-enrolment model
SPLITS = 10  # random halves of the test speakers
DURATIONS = {"without": False, "with": True}


class Speech:
    """Utterances below a folder, embedded once."""

    def __init__(self, model, folder: Path, paths: list[str]):
        self.paths = paths
        files = [folder / path for path in paths]
        self.seconds = np.array([audio_info(file).seconds for file in files])
        self.embeddings = SpeakerEncoder(model).embed(files, progress=str(folder))

    @cached_property
    def row_of(self) -> dict[str, int]:
        return {path: row for row, path in enumerate(self.paths)}

    def scores(self, trials: Trials, dim: int, scorer=None) -> np.ndarray:
        return score(trials, self.paths, self.embeddings, dim, scorer)

    def trial_seconds(self, trials: Trials) -> np.ndarray:
        return trial_seconds(trials, self.paths, self.seconds)


def main():
    """Embeds, scores, writes OUT.json and OUT.md."""
    arguments = parse()
    began = time.time()
    warnings.filterwarnings("ignore", message="a false-accept rate")  # the table shows how many impostors there were
    lists = trial_lists(arguments.speech)
    model = load_model(arguments.model)
    test = Speech(model, arguments.speech / "test" / "wav", lists["both lists"].utterances)
    train = Speech(model, arguments.speech / "train" / "wav", training_utterances(arguments))
    development = make_trials(train.paths, [speaker_of(path) for path in train.paths])
    cohort = one_per_speaker(train)
    scorers = {name: make_scorer(name, cohort, min(arguments.top, len(cohort))) for name in SCORERS}
    record = {
        "command": "python benchmarks/compare_scoring.py MODEL --speech ROOT --out docs/results/scoring "
        f"--top {arguments.top} --resamples {arguments.resamples}" + " --quick" * arguments.quick,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"threads: {torch.get_num_threads()}",
        "resamples": arguments.resamples,
        "cohort": len(cohort),
        "top": scorers["as_norm"].top,
        "development": {"targets": int(development.labels.sum()), "trials": len(development)},
        "lists": {name: {"targets": int(each.labels.sum()), "trials": len(each)} for name, each in lists.items()},
        "scorers": [],
        "enrolment": [],
        "calibration": [],
    }
    for dim in model.config.matryoshka_dims:
        record["scorers"] += compare_scorers(lists, test, dim, scorers, arguments.resamples)
        record["enrolment"] += compare_enrolments(lists, test, dim, arguments.resamples)
        record["calibration"] += compare_calibrations(lists, test, development, train, dim)
        print(f"{dim} dimensions: done after {time.time() - began:.0f} s", flush=True)
    record["seconds"] = round(time.time() - began)
    arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(report(record))
    print(report(record))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="path or Hub id")
    parser.add_argument("--speech", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    parser.add_argument("--top", type=int, default=100, help="of the cohort's scores [100]")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.resamples = min(arguments.resamples, 20)
    return arguments


def trial_lists(speech: Path) -> dict[str, Trials]:
    """The trial lists of a speech folder, and all their trials as one."""
    files = sorted((speech / "test").glob("trials_*.txt"), reverse=True)
    lists = {path.stem.removeprefix("trials_"): read_trials(path) for path in files}
    sides = [[path for trials in lists.values() for path in getattr(trials, side)] for side in ("enrol", "test")]
    return {**lists, "both lists": Trials(np.concatenate([t.labels for t in lists.values()]), *sides)}


def training_utterances(arguments) -> list[str]:
    """Paths below train/wav; when quick, every tenth."""
    folder = arguments.speech / "train" / "wav"
    paths = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES)
    return paths[::10] if arguments.quick else paths


def one_per_speaker(train: Speech) -> np.ndarray:
    """Embeddings [S, D] of one drawn utterance of each speaker."""
    order = np.random.default_rng(0).permutation(len(train.paths))
    first = {speaker_of(train.paths[row]): row for row in order}
    return train.embeddings[sorted(first.values())]


def measured(scores: np.ndarray, trials: Trials, resamples: int) -> tuple[dict, np.ndarray]:
    """EER and minDCF with the EER's interval, and its values over the resamples."""
    values = bootstrap_values(scores, trials.labels, *trials.speakers, resamples=resamples)
    low, high = quantile_interval(values)
    rates = {"eer": eer(scores, trials.labels), "eer_low": low, "eer_high": high}
    return {**rates, "min_dcf": min_dcf(scores, trials.labels)}, values


def difference(row: dict, values: np.ndarray, base: tuple[dict, np.ndarray]) -> dict:
    """The change of the EER against the base, with its paired interval."""
    low, high = quantile_interval(values - base[1])
    return {"difference": row["eer"] - base[0]["eer"], "difference_low": low, "difference_high": high}


def compare_scorers(lists: dict[str, Trials], test: Speech, dim: int, scorers: dict, resamples: int) -> Iterator[dict]:
    """Per list and scorer, the rates and the difference to the cosine."""
    for name, trials in lists.items():
        results = {each: measured(test.scores(trials, dim, scorers[each]), trials, resamples) for each in scorers}
        for each, (row, values) in results.items():
            yield {"list": name, "dim": dim, "scorer": each, **row, **difference(row, values, results["cosine"])}


def compare_enrolments(lists: dict[str, Trials], test: Speech, dim: int, resamples: int) -> Iterator[dict]:
    """Per list, one enrolment utterance and the average of several, of the same speakers against the same tests."""
    for name, trials in lists.items():
        several, single = enrolment_trials(trials)
        results = {
            str(count): measured(test.scores(each, dim), each, resamples)
            for count, each in ((1, single), (ENROLLED, several))
        }
        for count, (row, values) in results.items():
            change = difference(row, values, results["1"])
            yield {"list": name, "dim": dim, "enrolled": int(count), **row, **change}


def enrolment_trials(trials: Trials) -> tuple[Trials, Trials]:
    """Models of ENROLLED utterances against all other utterances of the list's corpus; the same with each member alone.

    A speaker's utterances, in order, are cut into as many models as fit.
    """
    of_speaker: dict[str, list[str]] = {}
    for path in trials.utterances:
        of_speaker.setdefault(speaker_of(path), []).append(path)
    paired = set(zip(*trials.speakers, strict=True)) | {(b, a) for a, b in zip(*trials.speakers, strict=True)}
    models, several, single = {}, [], []
    for speaker, paths in of_speaker.items():
        for start in range(0, len(paths) - ENROLLED, ENROLLED):
            name, members = f"{speaker}, from {start}", paths[start : start + ENROLLED]
            models[name] = members
            for other in trials.utterances:
                if other not in members and (speaker, speaker_of(other)) in paired:  # no trials across lists
                    label = int(speaker_of(other) == speaker)
                    several.append((label, name, other))
                    single += [(label, member, other) for member in members]
    return trials_of(several, models), trials_of(single)


def trials_of(rows: list[tuple[int, str, str]], models: dict[str, list[str]] | None = None) -> Trials:
    """Trials of rows (label, enrolment, test)."""
    labels, enrol, test = zip(*rows, strict=True)
    return Trials(np.array(labels), list(enrol), list(test), models)


def compare_calibrations(
    lists: dict[str, Trials], test: Speech, development: Trials, train: Speech, dim: int
) -> Iterator[dict]:
    """Calibrations and thresholds by what they were set on and judged on, with and without duration terms."""
    names = [name for name in lists if name != "both lists"]
    on_development = (train.scores(development, dim), development.labels, train.trial_seconds(development))
    on_list = {
        name: (test.scores(trials, dim), trials.labels, test.trial_seconds(trials)) for name, trials in lists.items()
    }
    for terms in DURATIONS:
        about = {"dim": dim, "durations": terms}
        for name in lists:
            yield {**about, "set_on": "training speech", "list": name, **judged(on_development, on_list[name], terms)}
        for source, name in ((a, b) for a in names for b in names if a != b):
            yield {**about, "set_on": source, "list": name, **judged(on_list[source], on_list[name], terms)}
        halves = speaker_halves([lists[name] for name in names], lists["both lists"], on_list["both lists"])
        rows = [judged(*pair, terms) for pair in halves]
        means = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        rates = [row["false_accepts"] for row in rows]
        spread = {"false_accepts_low": min(rates), "false_accepts_high": max(rates)}
        yield {**about, "set_on": "half of the test speakers", "list": "both lists, other half", **means, **spread}


def speaker_halves(lists: list[Trials], both: Trials, data: tuple) -> Iterator[tuple[tuple, tuple]]:
    """Scores, labels and seconds among half of the speakers of every list, and among the others, both ways."""
    enrol, test = both.speakers
    for seed in range(SPLITS):
        rng = np.random.default_rng(seed)
        shuffled = [rng.permutation(np.unique(trials.speakers)) for trials in lists]
        chosen = np.concatenate([speakers[: len(speakers) // 2] for speakers in shuffled])
        inside = np.isin(enrol, chosen).astype(int) + np.isin(test, chosen)
        halves = [tuple(part[inside == count] for part in data) for count in (2, 0)]
        yield halves[0], halves[1]
        yield halves[1], halves[0]


def judged(source: tuple, target: tuple, terms: str) -> dict:
    """A calibration and a threshold of the source's scores, labels and seconds, on the target's."""
    durations = DURATIONS[terms]
    seconds = [data[2] if durations else None for data in (source, target)]
    calibration = Calibration.fit(source[0], source[1], seconds[0])
    llrs, labels = calibration(target[0], seconds[1]), target[1]
    threshold = threshold_at(calibration(source[0], seconds[0]), source[1], WANTED)
    accepted = llrs >= threshold
    return {
        "eer": eer(llrs, labels),
        "cllr": cllr(llrs, labels),
        "min_cllr": min_cllr(llrs, labels),
        "act_dcf": act_dcf(llrs, labels),
        "min_dcf": min_dcf(llrs, labels),
        "false_accepts": float(accepted[labels == 0].mean()),
        "misses": float(1 - accepted[labels == 1].mean()),
        "impostors": int((np.asarray(source[1]) == 0).sum()),
    }


def report(record: dict) -> str:
    """Markdown: a table per comparison."""
    text = [
        f"`{record['command']}`",
        "",
        f"{record['machine']}; {record['seconds']} s in all. EER % with its 95 % interval over speakers, and minDCF "
        f"(prior 0.01); differences with their paired intervals, **bold** where that excludes zero; "
        f"{record['resamples']} resamples. Cohort: one utterance of each of {record['cohort']} training speakers, the "
        f"{record['top']} highest scores normalise.",
    ]
    for name in record["lists"]:
        rows = [row for row in record["scorers"] if row["list"] == name]
        text += ["", f"## Scorers, {name}", "", *grid(rows, ["scorer"], rate_cell)]
    text += ["", f"## One enrolment utterance, or {ENROLLED} averaged", ""]
    text += grid(record["enrolment"], ["list", "enrolled"], rate_cell)
    text += ["", "## Calibration", "", calibration_note(record), ""]
    keys = ["list", "set_on", "durations"]
    for title, cell in (
        ("Cllr (minCllr), bits", partial(pair_cell, "cllr", "min_cllr")),
        ("actDCF (minDCF)", partial(pair_cell, "act_dcf", "min_dcf")),
        (f"False accepts % (misses %) of the threshold set for {100 * WANTED:g} %", threshold_cell),
    ):
        text += ["", f"### {title}", "", *grid(record["calibration"], keys, cell)]
    return "\n".join(text) + "\n"


def calibration_note(record: dict) -> str:
    """What the calibrations were set on."""
    development = record["development"]
    return (
        f"Set on training speech ({development['targets']:,} target and "
        f"{development['trials'] - development['targets']:,} impostor trials, of speakers the model was trained on), "
        f"on the other list, or on half of the test speakers (mean over {2 * SPLITS} halves of both lists, range of "
        "the false accepts in brackets), with or without duration terms, on cosines; in round brackets the least "
        "possible."
    )


def grid(rows: list[dict], keys: list[str], cell) -> list[str]:
    """A line per combination of the `keys`' values, a column per dimension."""
    dims = sorted({row["dim"] for row in rows})
    lines = ["| " + " | ".join([*(key.replace("_", " ") for key in keys), *map(str, dims)]) + " |"]
    lines.append("|---" * (len(keys) + len(dims)) + "|")
    for case in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        cells = {row["dim"]: cell(row) for row in rows if tuple(row[key] for key in keys) == case}
        lines.append("| " + " | ".join([*map(str, case), *(cells[dim] for dim in dims)]) + " |")
    return lines


def rate_cell(row: dict) -> str:
    """EER with interval, minDCF, and the difference where this is not the base itself."""
    value = f"{100 * row['eer']:.2f} [{100 * row['eer_low']:.1f}, {100 * row['eer_high']:.1f}], {row['min_dcf']:.3f}"
    if row["difference"] == row["difference_low"] == row["difference_high"] == 0:
        return value
    change = f"{100 * row['difference']:+.2f} [{100 * row['difference_low']:+.1f}, {100 * row['difference_high']:+.1f}]"
    return f"{value}<br>{f'**{change}**' if row['difference_low'] * row['difference_high'] > 0 else change}"


def pair_cell(actual: str, best: str, row: dict) -> str:
    """A cost and its minimum."""
    return f"{row[actual]:.3f} ({row[best]:.3f})"


def threshold_cell(row: dict) -> str:
    """Realised rates of a threshold."""
    spread = ""
    if "false_accepts_low" in row:
        spread = f" [{100 * row['false_accepts_low']:.1f}, {100 * row['false_accepts_high']:.1f}]"
    return f"{100 * row['false_accepts']:.2f}{spread} ({100 * row['misses']:.1f})"


if __name__ == "__main__":
    main()
