"""Windows over recordings, each embedded by itself or pooled out of shared frames: seconds, and how close they are.

    python benchmarks/windows.py nano --audio FILE ... [--threads 1] --out docs/results/windows

Both ways are timed in turns in one process, on all files one after the other. "To each other" is the cosine of the two
embeddings of a window, beside that of neighbouring windows and of windows of different files.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from timing import machine

from mrl_redimnet import SpeakerEncoder
from mrl_redimnet.audio.io import audio_info
from mrl_redimnet.scoring.scorers import make_scorer


def main():
    """Parses the command line, measures, writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--audio", type=Path, nargs="+", required=True)
    parser.add_argument("--windows", nargs="+", default=["1.5:0.75", "1.5:0.25"], metavar="SECONDS:STEP")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    windows = [tuple(map(float, each.split(":"))) for each in arguments.windows]
    rows = [
        measured(model, arguments.audio, window, step, arguments.rounds)
        for model in arguments.models
        for window, step in windows
    ]
    seconds = sum(audio_info(file).seconds for file in arguments.audio)
    head = ("model", "window / step", "each, s", "shared, s", "times as fast", "to each other", "neighbours",
            "other recordings")  # fmt: skip
    lines = [
        "# Windows over a recording",
        "",
        f"```bash\npython benchmarks/windows.py {' '.join(arguments.models)} --audio AUDIO/*.flac --threads "
        f"{torch.get_num_threads()} --out docs/results/windows\n```",
        "",
        f"{len(arguments.audio)} recordings, {seconds:.0f} s; seconds are medians of {arguments.rounds} rounds in "
        f"turns, the ratio's lowest and highest in brackets; cosines at 256 dimensions. {machine()}.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def measured(model: str, files: list[Path], window: float, step: float, rounds: int) -> tuple[str, ...]:
    """A row of the table."""
    encoder, cosine = SpeakerEncoder.from_pretrained(model), make_scorer("cosine")
    times: dict[bool, list[float]] = {False: [], True: []}
    found: dict[bool, list[np.ndarray]] = {}
    for _ in range(rounds + 1):  # the first one warms up
        for shared in times:
            start = time.perf_counter()
            found[shared] = [encoder.embed_windows(file, window, step, shared=shared)[1] for file in files]
            times[shared].append(time.perf_counter() - start)
    each, together = ([cosine.units(part, part.shape[1]) for part in found[way]] for way in (False, True))
    same = np.concatenate([(a * b).sum(1) for a, b in zip(each, together, strict=True)])
    neighbours = np.concatenate([(a[:-1] * a[1:]).sum(1) for a in each])
    others = np.concatenate([(a @ b.T).ravel() for i, a in enumerate(each) for b in each[i + 1 :]])
    ratios = [a / b for a, b in zip(times[False][1:], times[True][1:], strict=True)]
    return (
        model,
        f"{window:g} / {step:g} s",
        *(f"{statistics.median(times[way][1:]):.2f}" for way in (False, True)),
        f"{statistics.median(ratios):.1f} [{min(ratios):.1f}, {max(ratios):.1f}]",
        *(f"{values.mean():.2f}" for values in (same, neighbours, others)),
    )


if __name__ == "__main__":
    main()
