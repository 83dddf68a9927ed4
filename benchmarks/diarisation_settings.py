"""How the settings of diarisation were chosen: with the reference's speech, one thing changed at a time.

    python benchmarks/packaged_speech.py packaged ...            # names the development speakers
    ls packaged/dev > SPEAKERS
    python benchmarks/conversations.py CONVERSATIONS --speech SPLIT/train ... --speakers SPEAKERS
    python benchmarks/conversations.py ALONE --speech SPLIT/train ... --speakers SPEAKERS --counts 1 --seconds 20
    python benchmarks/diarisation_settings.py nano --sets CONVERSATIONS ALONE MEETINGS --out docs/results/NAME

The recordings are of development speakers, and MEETINGS may hold more than `--pattern` names. Columns are DER in per
cent, of it confused speakers, and by how many speakers the count is off, see diarisation.py. Rows of "detector" find
the speech, and show what is missed and what is taken for speech by mistake, in per cent of the speech.
"""

import argparse
import fnmatch
import functools
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import diarisation
import numpy as np
import torch
from diarisation import annotation, diarized, errors, rates, remembered
from pyannote.metrics.detection import DetectionErrorRate
from sklearn.cluster import KMeans
from timing import machine

from configuration_mrl_redimnet import SAMPLING_RATE
from feature_extraction_mrl_redimnet import MRLReDimNetFeatureExtractor
from mrl_redimnet import MRLReDimNetModel, SpeakerEncoder
from mrl_redimnet.audio.windows import consecutive, stretch_reader
from mrl_redimnet.diarization import activity, clustering, pipeline
from mrl_redimnet.diarization.turns import Turn, read_rttm

DETECTORS = {
    "0.5, as Silero has it": dict(threshold=0.5, neg_threshold=0.35, min_silence_duration_ms=100,
                                  min_speech_duration_ms=250, speech_pad_ms=30),
    "0.3": dict(activity.DECISIONS, threshold=0.3, neg_threshold=0.15),
    "0.2 (kept)": dict(activity.DECISIONS),
    "0.1": dict(activity.DECISIONS, threshold=0.1, neg_threshold=0.05),
}  # fmt: skip


def main():
    """Parses the command line, measures, writes a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--sets", type=Path, nargs="+", required=True, metavar="FOLDER")
    parser.add_argument("--pattern", default="*", help="recordings whose names match this alone [all]")
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    arguments = parser.parse_args()
    sets = {}
    for folder in arguments.sets:
        references = read_rttm(next(folder.glob("*.rttm")))
        chosen = {folder / f"{name}.flac": turns for name, turns in references.items()
                  if fnmatch.fnmatch(name, arguments.pattern)}  # fmt: skip
        if chosen:
            sets[folder.name] = chosen
    encoder = SpeakerEncoder.from_pretrained(arguments.model, device="cpu")
    embed, model = remembered(encoder.embed), encoder.model.base_model
    kept = {"windows of 1 s every 0.5 s; below 35 s of speech 1.5 s every 0.75 s, cut at 0.6 (kept)": {}}
    short = {"pipeline.WINDOW_OF_FEW": 1.0}
    tried = kept | {
        f"below 35 s of speech 1 s every 0.5 s, cut at {distance}": short | {"clustering.DISTANCE": distance}
        for distance in (0.6, 0.7, 0.8)
    }
    tried |= {
        f"below 35 s of speech cut at {distance}": {"clustering.DISTANCE": distance} for distance in (0.5, 0.7, 0.8)
    }
    tried |= {
        "below 35 s of speech 2 s every 1 s": {"pipeline.WINDOW_OF_FEW": 2.0},
        "spectral for every recording": {"pipeline.FEW_SECONDS": 0.0},
        "average linkage for every recording": {"pipeline.FEW_SECONDS": 1e9},
        "spectral, counted by the eigengap": {"clustering.spectral": by_eigengap},
        "otherwise 0.75 s every 0.375 s": {"pipeline.WINDOW": 0.75},
        "otherwise 1.5 s every 0.75 s": {"pipeline.WINDOW": 1.5},
        "without a least length of 2 s in all": {"least_seconds": 0.0},
        "windows out of joint passes of the trunk": {"diarisation.Diarizer": functools.partial(Shared, model=model)},
    }
    lines = [f"| | {' | '.join(f'{name}: DER | confused | speakers off by' for name in sets)} |",
             f"|---|{'---|' * 3 * len(sets)}"]  # fmt: skip
    for name, changes in tried.items():
        cells = []
        for recordings in sets.values():
            with patched(changes) as settings:
                rows = [errors(turns, diarized(embed, file, turns, "oracle", **settings))
                        for file, turns in recordings.items()]  # fmt: skip
            found = rates(rows)
            cells += [f"{found[0]:.1f}", f"{found[3]:.1f}", f"{found[5]:.1f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    detected = [f"| detector's threshold | {' | '.join(f'{name}: missed | false' for name in sets)} |",
                f"|---|{'---|' * 2 * len(sets)}"]  # fmt: skip
    for name, decisions in DETECTORS.items():
        with mock.patch.object(activity, "DECISIONS", decisions):
            cells = [f"{value:.1f}" for recordings in sets.values() for value in detection(recordings)]
        detected.append(f"| {name} | {' | '.join(cells)} |")
        print(detected[-1], flush=True)
    text = "\n".join(lines) + "\n\n" + "\n".join(detected)
    count = ", ".join(f"{name}: {len(recordings)} recordings" for name, recordings in sets.items())
    command = shlex.join(["python", *sys.argv])
    page = f"# Settings of diarisation\n\n```bash\n{command}\n```\n\n{machine()}; {count}.\n\n{text}\n"
    arguments.out.with_suffix(".md").write_text(page)


class patched:
    """With other values of constants and functions of the package; gives those that are settings of `Diarizer`."""

    def __init__(self, changes: dict):
        self.settings = {name: value for name, value in changes.items() if "." not in name}
        parts = {"clustering": clustering, "pipeline": pipeline, "diarisation": diarisation}
        self.patches = [mock.patch.object(parts[name.split(".")[0]], name.split(".")[1], value)
                        for name, value in changes.items() if "." in name]  # fmt: skip

    def __enter__(self) -> dict:
        for patch in self.patches:
            patch.start()
        return self.settings

    def __exit__(self, *error) -> None:
        for patch in self.patches:
            patch.stop()


@dataclass(frozen=True)
class Shared(pipeline.Diarizer):
    """Windows that are pooled out of passes of the trunk over longer stretches, as `embed_windows(shared=True)` does.

    Attributes:
        model: the network.
        longest: seconds of a pass.
    """

    model: MRLReDimNetModel | None = None
    longest: float = 15.0

    def embedded(self, read, windows, progress):
        samples = np.round(windows * SAMPLING_RATE).astype(int)
        size, found = int((samples[:, 1] - samples[:, 0]).max()), []
        for rows in consecutive(samples[:, 0], size, round(self.longest * SAMPLING_RATE)):
            first, last = samples[rows[0], 0], samples[rows, 1].max()
            weights = torch.zeros(1, len(rows), -(-(last - first) // 160))
            for row, (start, end) in zip(weights[0], (samples[rows] - first) // 160, strict=True):
                row[start : max(end, start + 1)] = 1
            with torch.inference_mode():
                wave = torch.from_numpy(read(first, last))[None]
                found.append(self.model(wave, frame_weights=weights).embeddings[0].numpy())
        units = np.concatenate(found)
        return units / np.linalg.norm(units, axis=1, keepdims=True)


def by_eigengap(units: np.ndarray, speakers: int | None, most: int) -> np.ndarray:
    """Spectral clustering whose number of clusters is where the eigenvalues make their largest step."""
    vectors, values = clustering.eigenvectors(units, most)
    count = speakers or int(np.diff(values).argmax()) + 1
    return KMeans(count, n_init=5, random_state=0).fit_predict(vectors[:, :count])


def detection(recordings: dict[Path, list[Turn]]) -> tuple[float, float]:
    """Per cent of the speech that is missed, and that is added."""
    rate = DetectionErrorRate(collar=0.0, skip_overlap=False)
    speech = missed = false = 0.0
    for file, turns in recordings.items():
        read = stretch_reader(file, str(file), MRLReDimNetFeatureExtractor(min_samples=1))
        found = [Turn(start, end, "somebody") for start, end in activity.speech_in(read)]
        parts = rate(annotation(turns), annotation(found), detailed=True)
        speech, missed = speech + parts["total"], missed + parts["miss"]
        false += parts["false alarm"]
    return 100 * missed / speech, 100 * false / speech


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
