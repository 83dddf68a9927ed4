"""Whether thresholds let through as many strangers as they say: verify with 3 utterances, identify among 19 speakers.

    python benchmarks/thresholds.py MODEL --speech WAV --develop OTHER_WAV --out docs/results/thresholds.md

WAV and OTHER_WAV hold folders of speakers. The speakers of WAV are halved at random, ten times: one half gives the
enrolled speakers and the strangers, thresholds are set as `mrl-redimnet calibrate` sets them, on trials among the other
half or on all of OTHER_WAV. Every utterance is embedded once; scores are cosines of whole embeddings.
"""

import argparse
import os
import platform
import shlex
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

from mrl_redimnet.audio.scan import files_below
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.saving import load_model
from mrl_redimnet.scoring.calibration import Threshold
from mrl_redimnet.scoring.scorers import make_scorer, score, speaker_means, with_enrolments
from mrl_redimnet.scoring.trials import make_trials

AVERAGED, ENROLLED, SPLITS = 3, 19, 10
WANTED = (0.01, 0.05)
IMPOSTORS = 100_000  # at most, of the development trials
FEWEST = 6  # utterances of a speaker who takes part


class Speech:
    """The speakers below a folder who have enough utterances, each utterance embedded once."""

    def __init__(self, model, folder: Path):
        files = files_below(folder)
        names = [file.relative_to(folder).parts[0] for file in files]
        enough = {name for name, count in zip(*np.unique(names, return_counts=True), strict=True) if count >= FEWEST}
        kept = [(file, name) for file, name in zip(files, names, strict=True) if name in enough]
        self.paths = [file.relative_to(folder).as_posix() for file, _ in kept]
        self.speakers = np.array([name for _, name in kept])
        self.embeddings = SpeakerEncoder(model).embed([file for file, _ in kept], progress=str(folder))
        self.units = make_scorer("cosine").units(self.embeddings, self.embeddings.shape[1])

    def thresholds(self, speakers: np.ndarray) -> dict[float, dict[int, Threshold]]:
        """{wanted: {1 and AVERAGED: the threshold for averages of so many utterances}}, on trials among `speakers`."""
        rows = np.flatnonzero(np.isin(self.speakers, speakers))
        trials = make_trials([self.paths[row] for row in rows], self.speakers[rows].tolist(), max_impostors=IMPOSTORS)
        dim, found = self.embeddings.shape[1], {wanted: {} for wanted in WANTED}
        for count in (1, AVERAGED):
            averaged = with_enrolments(trials, count)
            scores = score(averaged, self.paths, self.embeddings, dim)
            for wanted in WANTED:
                options = dict(wanted=wanted, dim=dim, weights="", trials="development", enrolments=count)
                found[wanted][count] = Threshold.fit(scores, averaged.labels, **options)
        return found

    def strangers(self, speakers: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Scores of strangers with averages of AVERAGED utterances: of single trials [T], and of searches [S, 19]."""
        enrolled = {}
        for speaker in speakers:
            rows = rng.choice(np.flatnonzero(self.speakers == speaker), AVERAGED, replace=False)
            (mean,) = speaker_means(self.units[rows], [speaker] * AVERAGED)
            enrolled[speaker] = mean / np.linalg.norm(mean)
        every = np.stack([*enrolled.values()])
        rows = np.isin(self.speakers, speakers)
        scores = self.units[rows] @ every.T
        single = scores[self.speakers[rows][:, None] != speakers[None]]
        strangers = ~np.isin(self.speakers[rows], speakers[:ENROLLED])
        return single, scores[strangers][:, :ENROLLED]


def rates(speech: Speech, development: Speech) -> dict[str, dict[float, list[float]]]:
    """Shares of accepted strangers, {decision: {wanted: [one per split]}}."""
    found: dict = {}
    elsewhere = None if development is speech else development.thresholds(np.unique(development.speakers))
    for split in range(SPLITS):
        rng = np.random.default_rng(split)
        names = rng.permutation(np.unique(speech.speakers))
        half = len(names) // 2
        single, searches = speech.strangers(names[:half], rng)
        best = searches.max(axis=1)
        for wanted, thresholds in (elsewhere or speech.thresholds(names[half:])).items():
            one, several = thresholds[1], thresholds[AVERAGED]
            for decision, values, limit in (
                ("verify, by the threshold for 1 utterance", single, one.threshold),
                (f"verify, by that for {AVERAGED}", single, several.threshold),
                ("identify, by the threshold of one comparison, 1 utterance", best, one.threshold),
                (f"identify, by that of the search, {AVERAGED} utterances", best, several.for_search(ENROLLED)[0]),
            ):
                found.setdefault(decision, {}).setdefault(wanted, []).append(float(np.mean(values >= limit)))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--speech", type=Path, required=True, metavar="WAV")
    parser.add_argument("--develop", type=Path, required=True, metavar="OTHER_WAV")
    parser.add_argument("--out", type=Path, required=True, help="a .md file")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # a threshold that rests on few trials says so; here the result tells
    model = load_model(arguments.model)
    speech, other = Speech(model, arguments.speech), Speech(model, arguments.develop)
    speakers = f"{len(np.unique(speech.speakers))} speakers ({len(speech.paths):,} utterances)"
    lines = [
        f"`{shlex.join(['python', 'benchmarks/thresholds.py', *sys.argv[1:]])}`",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}. Strangers accepted, %: mean of "
        f"{SPLITS} halvings of the {speakers} [lowest, highest]. Enrolled: {AVERAGED} utterances each; identify: "
        f"{ENROLLED} speakers.",
    ]
    for title, development in (
        ("the other half of the speakers", speech),
        (f"{len(np.unique(other.speakers))} speakers of another corpus", other),
    ):
        lines += ["", f"| thresholds set on {title} | " + " | ".join(f"wanted {100 * w:g} %" for w in WANTED) + " |"]
        lines += ["|---|" + "---|" * len(WANTED)]
        for decision, by_wanted in rates(speech, development).items():
            cells = [100 * np.array(by_wanted[wanted]) for wanted in WANTED]
            ranges = [f"{cell.mean():.2f} [{cell.min():.2f}, {cell.max():.2f}]" for cell in cells]
            lines.append(f"| {decision} | {' | '.join(ranges)} |")
    arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
