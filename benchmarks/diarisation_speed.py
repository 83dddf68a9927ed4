"""Diarisation of long recordings: seconds, and the memory of the process.

    python benchmarks/diarisation_speed.py nano MODEL ... --sets FOLDER --out docs/results/diarisation_speed

The recordings are those of FOLDER (FLAC), one after the other and again, up to the lengths asked for, at 16 kHz. Each
model and length is a process of its own, from which the time to import and load is left out. Memory is the most that
the process held, with all that it has imported; the difference of two lengths is what the length costs.
"""

import argparse
import multiprocessing
import shlex
import sys
import tempfile
import time
from pathlib import Path

import soundfile
import torch
from memory import peak_resident
from timing import machine

from configuration_mrl_redimnet import SAMPLING_RATE
from mrl_redimnet import SpeakerEncoder
from mrl_redimnet.diarization.pipeline import Diarizer


def main():
    """Parses the command line, measures, writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--sets", type=Path, nargs="+", required=True, metavar="FOLDER")
    parser.add_argument("--minutes", type=int, nargs="+", default=[10, 60, 120])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="[all cores]")
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    arguments = parser.parse_args()
    files = [file for folder in arguments.sets for file in sorted(folder.glob("*.flac"))]
    lines = ["| model | recording, min | speech, min | s | times real time | speakers found | memory, MB |",
             f"|{'---|' * 7}"]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for minutes in arguments.minutes:
            recording = long_recording(files, minutes, Path(folder) / f"{minutes}.flac")
            for model in arguments.models:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    row = pool.apply(measured, (model, recording, minutes, arguments.threads))
                lines.append(row)
                print(lines[-1], flush=True)
    command = shlex.join(["python", *sys.argv])
    text = (
        f"# Diarisation of long recordings\n\n```bash\n{command}\n```\n\n{machine()}, {arguments.threads} threads.\n\n"
    )
    arguments.out.with_suffix(".md").write_text(text + "\n".join(lines) + "\n")


def long_recording(files: list[Path], minutes: int, target: Path) -> Path:
    """A recording of so many minutes."""
    left = minutes * 60 * SAMPLING_RATE
    with soundfile.SoundFile(target, "w", SAMPLING_RATE, 1) as written:
        while left:
            for file in files:
                wave, _ = soundfile.read(file, dtype="float32")
                written.write(wave[:left])
                left -= min(left, len(wave))
    return target


def measured(model: str, recording: Path, minutes: int, threads: int) -> str:
    """A row of the table."""
    torch.set_num_threads(threads)
    encoder = SpeakerEncoder.from_pretrained(model, device="cpu")
    diarizer = Diarizer(encoder.embed)
    diarizer(recording, speech=[(0.0, 3.0)])  # loads what is loaded at the first use
    found = []
    began = time.perf_counter()
    peak = peak_resident(lambda: found.append(diarizer(recording)))
    took = time.perf_counter() - began
    speech = sum(turn.seconds for turn in found[0].turns) / 60
    cells = (model, minutes, f"{speech:.0f}", f"{took:.1f}", f"{60 * minutes / took:.0f}", len(found[0].voices),
             f"{peak / 1e6:.0f}")  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
