"""What `window_seconds` costs and changes: time and peak memory for long audio, and how far windowed embeddings move.

    python benchmarks/long_audio.py --size b2 --minutes 60 --windows 30 120 [--output FILE.json]
    python benchmarks/long_audio.py --model MODEL --speech WAV_FOLDER --windows 10 20 30 60 [--output FILE.json]

The first form times random weights on noise (neither matters for cost), each window in a process of its own for its
peak memory. The second joins each speaker's utterances below WAV_FOLDER to one long recording and reports the cosine
between its embedding as a whole and windowed, beside the cosine between different speakers.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from configuration_mrl_redimnet import MRLReDimNetConfig
from modeling_mrl_redimnet import MRLReDimNetModel
from mrl_redimnet.audio.io import SAMPLING_RATE, read_audio
from mrl_redimnet.data.corpus import load_corpus
from mrl_redimnet.saving import load_model


def main():
    """Prints a line per window, and writes all of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="b2")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--windows", type=float, nargs="+", default=[30, 60, 120])
    parser.add_argument("--model")
    parser.add_argument("--speech", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one-window", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one_window is not None:
        print(json.dumps(cost(arguments.size, arguments.minutes, arguments.one_window)))
        return
    rows = agreement(arguments) if arguments.speech is not None else costs(arguments)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps({"threads": arguments.threads, "rows": rows}, indent=1) + "\n")


def costs(arguments) -> list[dict]:
    """Time and peak memory per window length."""
    rows = []
    for window in arguments.windows:
        command = [sys.executable, __file__, "--size", arguments.size, "--minutes", str(arguments.minutes)]
        command += ["--threads", str(arguments.threads), "--one-window", str(window)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(
            "{model}, {minutes:g} min, windows of {window_seconds:g} s: {seconds:.1f} s, {peak_gib:.2f} GiB".format(
                **rows[-1]
            )
        )
    return rows


@torch.inference_mode()
def cost(size: str, minutes: float, window: float) -> dict:
    """One embedding of `minutes` of noise: seconds, and the growth of the process's peak memory in GiB."""
    model = MRLReDimNetModel(MRLReDimNetConfig.from_size(size, window_seconds=window)).eval()
    waveform = torch.randn(1, int(minutes * 60 * SAMPLING_RATE)) * 0.1
    model(waveform[:, :48000])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    model(waveform)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"model": size, "minutes": minutes, "window_seconds": window, "seconds": seconds, "peak_gib": peak / 2**20}


@torch.inference_mode()
def agreement(arguments) -> list[dict]:
    """Cosines between whole and windowed embeddings of each speaker's joined recording."""
    model, corpus = load_model(arguments.model), load_corpus(arguments.speech)
    encoder = getattr(model, model.base_model_prefix, model)
    recordings = {}
    for row in corpus:
        recordings.setdefault(row["speaker"], []).append(read_audio(row["audio"]["path"]))
    waveforms = [torch.from_numpy(np.concatenate(parts))[None] for parts in recordings.values()]

    def embed(window: float) -> torch.Tensor:
        encoder.config.window_seconds = window
        return torch.nn.functional.normalize(torch.cat([encoder(w).embeddings for w in waveforms]))

    whole = embed(1e9)
    others = whole @ whole.T
    between = float(others[~torch.eye(len(whole), dtype=torch.bool)].mean())
    lengths = [w.shape[1] / SAMPLING_RATE for w in waveforms]
    rows = []
    for window in arguments.windows:
        same = (embed(window) * whole).sum(1)
        rows.append({"window_seconds": window, "cosine_mean": float(same.mean()), "cosine_min": float(same.min())})
        rows[-1] |= {"between_speakers": between, "recordings": len(whole), "longest_seconds": max(lengths)}
        print(
            "windows of {window_seconds:g} s: cosine with the whole {cosine_mean:.3f} (lowest {cosine_min:.3f}); "
            "between speakers {between_speakers:.3f}; {recordings} recordings up to {longest_seconds:.0f} s".format(
                **rows[-1]
            )
        )
    return rows


if __name__ == "__main__":
    main()
