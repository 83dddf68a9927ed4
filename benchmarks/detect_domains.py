"""How well the domain detector finds the adapter for speakers and noises that it was not trained on.

    python benchmarks/detect_domains.py --speech ROOT --out docs/results/domain_detector [--save FOLDER]

ROOT holds train/wav, noise/train, test/wav and noise/test. Every utterance is brought into every domain of
`mrl_redimnet.audio.domains`. Trained is on a few hundred drawn training utterances, one of every speaker before any has
two: at most 8 s from the start of each, and a stretch of 0.5 to 3 s of that. Tested is on all the test utterances,
whole and cut to the 2 s and 1 s in their middle. Nothing is chosen on the test: the threshold is read off training
speakers that a regression had not seen, in five parts.
"""

import argparse
import json
import os
import platform
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mrl_redimnet.adapters.detector import CLEAN, FEATURES, THRESHOLD, Detection, DomainDetector, features
from mrl_redimnet.audio.domains import DOMAINS, make_domain, simulate
from mrl_redimnet.audio.io import SAMPLING_RATE, read_audio
from mrl_redimnet.data.corpus import AUDIO_SUFFIXES
from mrl_redimnet.scoring.metrics import mean_interval
from mrl_redimnet.scoring.trials import speaker_of

COMMAND = "python benchmarks/detect_domains.py --speech ROOT --out docs/results/domain_detector"
TRAIN_SECONDS = 8.0
STRETCH = (0.5, 3.0)  # seconds, of the second example from each training utterance
LENGTHS = {"whole": None, "2 s": 2.0, "1 s": 1.0}
PARTS = 5
THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
TIMED_SECONDS = 3.0


def main():
    """Trains, tests, writes OUT.json and OUT.md."""
    arguments = parse()
    files = drawn(arguments.speech / "train" / "wav", arguments.utterances, arguments.seed)
    rows, labels, speakers = training_examples(arguments.speech, files, arguments.seed)
    domains = list(DOMAINS)
    detector = DomainDetector.fit(rows, labels, domains)
    print(f"trained on {len(rows)} examples of {len(files)} utterances", flush=True)
    if arguments.save is not None:
        detector.save(arguments.save)
    answers, milliseconds = test(detector, arguments.speech)
    record = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, numpy {np.__version__}",
        "training": dict(utterances=len(files), speakers=len(set(speakers)), examples=len(rows), seed=arguments.seed),
        "domains": domains,
        "threshold": THRESHOLD,
        "thresholds": sweep(held_out(rows, labels, speakers, domains), labels),
        "resamples": arguments.resamples,
        "lengths": {name: summary(found, domains, arguments.resamples) for name, found in answers.items()},
        "milliseconds": milliseconds,
        "weights": dict(zip(FEATURES, detector.weight.T.round(3).tolist(), strict=True)),
    }
    arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(report(record))
    print(report(record))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speech", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    parser.add_argument("--save", type=Path, help="folder for the detector")
    parser.add_argument("--utterances", type=int, default=325, help="to train on")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn utterances and stretches")
    parser.add_argument("--resamples", type=int, default=1000)
    return parser.parse_args()


def utterances(folder: Path) -> list[str]:
    """The audio files below a folder, relative to it, sorted."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES)


def drawn(folder: Path, count: int, seed: int) -> list[str]:
    """`count` utterances, one of every speaker before any has two."""
    rng, of_speaker = np.random.default_rng(seed), defaultdict(list)
    for path in rng.permutation(utterances(folder)).tolist():
        of_speaker[speaker_of(path)].append(path)
    turns = [(turn, path) for paths in of_speaker.values() for turn, path in enumerate(paths)]
    return [path for _, path in sorted(turns, key=lambda turn: turn[0])[:count]]


def in_domains(
    speech: Path, split: str, files: list[str], seconds: float | None
) -> Iterator[tuple[str, int, np.ndarray]]:
    """(path, label, audio [samples]) of every file in every domain."""
    domains = [make_domain(name, noise=speech / "noise" / split) for name in DOMAINS]
    for path in files:
        audio = read_audio(speech / split / "wav" / path, seconds=seconds)
        for label, domain in enumerate(domains):
            yield path, label, simulate(domain, audio, path)


def training_examples(speech: Path, files: list[str], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features [N, K], labels [N] and speakers [N] of each file in each domain, as it is and a stretch of it."""
    rng, rows, labels, speakers = np.random.default_rng(seed), [], [], []
    for path, label, audio in in_domains(speech, "train", files, TRAIN_SECONDS):
        length = int(rng.uniform(*STRETCH) * SAMPLING_RATE)
        start = rng.integers(max(1, len(audio) - length))
        rows += [features(audio), features(audio[start : start + length])]
        labels += [label] * 2
        speakers += [speaker_of(path)] * 2
    return np.array(rows), np.array(labels), np.array(speakers)


def held_out(rows: np.ndarray, labels: np.ndarray, speakers: np.ndarray, domains: list[str]) -> np.ndarray:
    """Probabilities [N, D] of training examples, each by a regression that did not see its speaker."""
    part = np.unique(speakers, return_inverse=True)[1] % PARTS
    found = np.empty((len(rows), len(domains)))
    for i in range(PARTS):
        detector = DomainDetector.fit(rows[part != i], labels[part != i], domains)
        found[part == i] = detector.probabilities(rows[part == i])
    return found


def sweep(probabilities: np.ndarray, labels: np.ndarray) -> list[dict]:
    """What each threshold does to examples with known labels, as shares of clean and of other examples."""
    best, clean, found = probabilities.argmax(axis=1), labels == 0, []
    for threshold in THRESHOLDS:
        given = np.where(probabilities.max(axis=1) >= threshold, best, 0)
        others = given[~clean]
        found.append(
            {
                "threshold": threshold,
                "clean_to_an_adapter": float(np.mean(given[clean] != 0)),
                "others_to_their_adapter": float(np.mean(others == labels[~clean])),
                "others_to_the_base": float(np.mean(others == 0)),
                "others_to_another_adapter": float(np.mean((others != labels[~clean]) & (others != 0))),
            }
        )
    return found


Answers = list[tuple[str, int, Detection]]


def test(detector: DomainDetector, speech: Path) -> tuple[dict[str, Answers], dict[str, float]]:
    """(path, label, answer) of every test utterance at every length; median milliseconds an answer takes."""
    answers, took = {name: [] for name in LENGTHS}, {"whole": [], f"{TIMED_SECONDS:g} s": []}
    for path, label, audio in in_domains(speech, "test", utterances(speech / "test" / "wav"), None):
        for name, seconds in LENGTHS.items():
            answers[name].append((path, label, detector(middle(audio, seconds))))
        for spent, stretch in zip(took.values(), (audio, middle(audio, TIMED_SECONDS)), strict=True):
            began = time.perf_counter()
            detector(stretch)
            spent.append(1000 * (time.perf_counter() - began))
    return answers, {name: float(np.median(spent)) for name, spent in took.items()}


def middle(audio: np.ndarray, seconds: float | None) -> np.ndarray:
    """The middle of audio [samples]; all of it where it is shorter."""
    length = len(audio) if seconds is None else int(seconds * SAMPLING_RATE)
    start = max(0, len(audio) - length) // 2
    return audio[start : start + length]


def summary(answers: Answers, domains: list[str], resamples: int) -> dict:
    """Counts [D, 1 + D] per true domain of: the base in doubt, then each domain; and rates with their intervals."""
    truth = np.array([label for _, label, _ in answers])
    likeliest = np.array([domains.index(max(a.probabilities, key=a.probabilities.get)) for *_, a in answers])
    given = np.array([domains.index(a.domain or CLEAN) for *_, a in answers])
    speakers = [speaker_of(path) for path, *_ in answers]
    doubt = (given == 0) & (likeliest != 0)
    counts = np.zeros((len(domains), 1 + len(domains)), dtype=int)
    np.add.at(counts, (truth, np.where(doubt, 0, 1 + given)), 1)

    def rate(values: np.ndarray) -> list[float]:
        return [float(values.mean()), *mean_interval(values, speakers, resamples)]

    return {
        "utterances": len(answers) // len(domains),
        "speakers": len(set(speakers)),
        "counts": counts.tolist(),
        "most_probable_is_right": rate(likeliest == truth),
        "right_adapter_or_base": rate(given == truth),
        "fallback": float(doubt.mean()),
    }


def report(record: dict) -> str:
    """Markdown: what was trained, confusion, lengths, thresholds, time."""
    training, whole = record["training"], record["lengths"]["whole"]
    text = [
        "# Finding the adapter by the sound",
        "",
        f"```bash\n{COMMAND}\n```",
        "",
        f"A logistic regression on {len(FEATURES)} facts about the signal (`adapters/detector.py`). Trained on "
        f"{training['utterances']} utterances of {training['speakers']} speakers of LibriSpeech train-clean-100 and "
        f"AN4, each in every domain, {training['examples']} examples; tested on {whole['utterances']} utterances of "
        f"{whole['speakers']} other speakers, of LibriSpeech test-other and AN4, with noise clips that training did "
        f"not have. Intervals: 95 %, bootstrap over speakers, {record['resamples']} resamples. {record['machine']}.",
        "",
        "**Trained and tested on simulations.** Telephone calls and noisy rooms are those of "
        "`mrl_redimnet.audio.domains` at their defaults, which the adapters are trained with too; clean is read and "
        "dictated English of two corpora. "
        "Speakers and noise clips of the test are new to the detector; codecs, simulated rooms, the ten kinds of noise "
        "(ESC-10) and the two corpora's recording channels are not. On real calls and recordings expect less, and "
        "train on examples of your own where you have them. Some noisy examples hardly are: up to 15 dB SNR, half of "
        "them without a room, and noises such as a dog's bark leave most of an utterance alone.",
        "",
        "## Whole utterances",
        "",
        *confusion(whole, record["domains"]),
        "",
        "## By length",
        "",
        "Stretches from the middle of the same audio, shorter utterances as they are.",
        "",
        "| length | most probable domain is right, % | right adapter or base, % | in doubt, % |",
        "|---|---|---|---|",
        *(
            f"| {name} | {percent(row['most_probable_is_right'])} | {percent(row['right_adapter_or_base'])} "
            f"| {100 * row['fallback']:.1f} |"
            for name, row in record["lengths"].items()
        ),
        "",
        "## The threshold",
        "",
        "On the training utterances, whole and stretches, by regressions that had not seen their speakers (the noise "
        "clips they had). The default, **bold**, is the lowest of these that gives at most 5 % of clean speech to an "
        "adapter.",
        "",
        "| threshold | clean to an adapter, % | others: to theirs, % | to the base, % | to another, % |",
        "|---|---|---|---|---|",
        *(threshold_row(row, record["threshold"]) for row in record["thresholds"]),
        "",
        "## Time",
        "",
        "Median milliseconds an answer on one core, features included: "
        + ", ".join(f"{value:.2f} ({name})" for name, value in record["milliseconds"].items())
        + ".",
    ]
    return "\n".join(text) + "\n"


def confusion(row: dict, domains: list[str]) -> list[str]:
    """The table of counts and shares."""
    total = sum(map(sum, row["counts"]))
    lines = ["| truth | base, in doubt | " + " | ".join(["base, clean", *domains[1:]]) + " |"]
    lines.append("|---" * (len(domains) + 2) + "|")
    for domain, counts in zip(domains, row["counts"], strict=True):
        cells = (f"{count} ({100 * count / sum(counts):.1f} %)" for count in counts)
        lines.append(f"| {domain} | " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        f"Columns are what `choose` hands over, {total} utterances in all. In doubt: another domain was the most "
        "probable, but below the threshold.",
    ]


def percent(rate: list[float]) -> str:
    """A rate with its interval."""
    value, low, high = (100 * number for number in rate)
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def threshold_row(row: dict, default: float) -> str:
    """A line of the table of thresholds."""
    names = ("clean_to_an_adapter", "others_to_their_adapter", "others_to_the_base", "others_to_another_adapter")
    name = f"**{row['threshold']:g}**" if row["threshold"] == default else f"{row['threshold']:g}"
    return f"| {name} | " + " | ".join(f"{100 * row[key]:.1f}" for key in names) + " |"


if __name__ == "__main__":
    main()
