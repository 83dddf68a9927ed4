"""What an exported file costs in accuracy, and what it weighs: every precision against the PyTorch model.

    python benchmarks/export_costs.py MODEL --trials LIST ... --folder WAV --out docs/results/export_costs

Every utterance is embedded whole, by PyTorch and by onnxruntime from each file; intervals and differences come from one
bootstrap over speakers, so a difference's interval is paired. Writes OUT.json and OUT.md. To try it in two minutes:
`--quick`, the first four utterances of every speaker.
"""

import argparse
import collections
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from paired import Drawn, change, eers, percent
from timing import machine

from mrl_redimnet.audio.io import read_audio
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.evaluation.results import check_present
from mrl_redimnet.export import PRECISIONS, export_onnx
from mrl_redimnet.files import check_output, replace_file
from mrl_redimnet.saving import load_model
from mrl_redimnet.scoring.trials import Trials, read_trials, speaker_of

TORCH = "PyTorch"
QUICK_UTTERANCES = 4


def main():
    """Exports, embeds, scores, writes."""
    arguments = parse()
    check_output(arguments.out.with_suffix(".md"))
    torch.set_num_threads(arguments.threads)
    lists = {path.stem.removeprefix("trials_"): read_trials(path) for path in arguments.trials}
    if arguments.quick:
        lists = {name: first_utterances(trials) for name, trials in lists.items()}
    utterances = sorted({path for trials in lists.values() for path in trials.utterances})
    for trials in lists.values():
        check_present(trials, arguments.folder)
    model = load_model(arguments.model)
    files = [arguments.folder / path for path in utterances]
    embedded, sizes = {TORCH: SpeakerEncoder(model).embed(files)}, {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in PRECISIONS:
            exported = export_onnx(model, Path(folder) / f"{precision}.onnx", precision=precision)
            sizes[precision] = exported.stat().st_size
            embedded[precision] = np.concatenate([*embeddings(exported, files, model.config, arguments.threads)])
            print(f"{precision}: {len(files)} utterances embedded", flush=True)
    found = {
        system: {
            name: eers(trials, utterances, each, arguments.dims, arguments.resamples) for name, trials in lists.items()
        }
        for system, each in embedded.items()
    }
    differences = {precision: relative(embedded[precision], embedded[TORCH]) for precision in sizes}
    write(arguments, found, differences, sizes, {name: len(trials) for name, trials in lists.items()}, len(files))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="path or Hub id")
    parser.add_argument("--trials", type=Path, nargs="+", required=True)
    parser.add_argument("--folder", type=Path, required=True, help="what the paths in the lists are relative to")
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="a few utterances of every speaker")
    return parser.parse_args()


def first_utterances(trials: Trials) -> Trials:
    """The trials among every speaker's first utterances."""
    of_speaker = collections.defaultdict(list)
    for path in trials.utterances:
        of_speaker[speaker_of(path)].append(path)
    kept = {path for paths in of_speaker.values() for path in paths[:QUICK_UTTERANCES]}
    rows = [i for i, sides in enumerate(zip(trials.enrol, trials.test, strict=True)) if kept.issuperset(sides)]
    return Trials(trials.labels[rows], [trials.enrol[i] for i in rows], [trials.test[i] for i in rows])


def embeddings(exported: Path, files: list[Path], config, threads: int) -> Iterator[np.ndarray]:
    """The embedding [1, D] of each file, which must fit into a window."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(exported, options, providers=["CPUExecutionProvider"])
    for file in files:
        audio = read_audio(file)[None]
        if audio.shape[1] > config.window_seconds * 16000:
            raise SystemExit(f"{file} is longer than the model's window of {config.window_seconds:g} s.")
        yield session.run(None, {"input_values": audio, "attention_mask": np.ones(audio.shape, np.int64)})[0]


def relative(embeddings: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """|embedding - expected| / |expected| of every utterance, [N]."""
    return np.linalg.norm(embeddings - expected, axis=1) / np.linalg.norm(expected, axis=1)


def write(
    arguments: argparse.Namespace,
    found: dict[str, dict[str, dict[int, Drawn]]],
    differences: dict[str, np.ndarray],
    sizes: dict[str, int],
    trials: dict[str, int],
    utterances: int,
):
    """OUT.json and OUT.md."""
    where = (
        f"{machine()}; torch {torch.__version__}, onnxruntime {onnxruntime.__version__}; threads: {arguments.threads}"
    )
    lists = ", ".join(f"{name} ({count:,} trials)" for name, count in trials.items())
    command = shlex.join(["python", "benchmarks/export_costs.py", "MODEL", *named_arguments(arguments)])
    columns = ["", "MB", "difference, median", "largest", *(f"{n}, {d}" for n in trials for d in arguments.dims)]
    text = [
        "# Exported files against PyTorch",
        "",
        f"ONNX files of one model ({Path(arguments.model).name}) in every precision, run by onnxruntime, against the "
        f"PyTorch model: {utterances} utterances; {lists}. Difference: |embedding - PyTorch's| / |PyTorch's|, whole "
        f"embeddings. Then EER % at {' and '.join(map(str, arguments.dims))} dimensions, below it the change against "
        f"PyTorch, both with 95 % intervals over speakers ({arguments.resamples} resamples; the change's is paired), "
        f"**bold** where that leaves out zero.",
        "",
        f"`{command}`, on {where}.",
        "",
        line(columns),
        "|---" * len(columns) + "|",
    ]
    for system, rates in found.items():
        cells = [system, *["-"] * 3]
        if system in sizes:
            typical, largest = np.median(differences[system]), differences[system].max()
            cells = [system, f"{sizes[system] / 1e6:.2f}", f"{typical:.1e}", f"{largest:.1e}"]
        for name in trials:
            for dim in arguments.dims:
                against = f"<br>{change(rates[name][dim] - found[TORCH][name][dim])}" if system in sizes else ""
                cells.append(percent(rates[name][dim]) + against)
        text.append(line(cells))
    record = {
        "command": command,
        "machine": where,
        "utterances": utterances,
        "trials": trials,
        "resamples": arguments.resamples,
        "systems": {system: summary(system, rates, found, differences, sizes) for system, rates in found.items()},
    }
    for suffix, content in ((".json", json.dumps(record, indent=1)), (".md", "\n".join(text))):
        replace_file(arguments.out.with_suffix(suffix), lambda file, c=content: file.write_text(c + "\n", "utf-8"))
    print("\n".join(text))


def summary(system: str, rates: dict, found: dict, differences: dict, sizes: dict) -> dict:
    """What is known of one system, for JSON."""
    known = {"eer": {f"{name}, {dim}": drawn.record() for name, by in rates.items() for dim, drawn in by.items()}}
    if system in sizes:
        known["bytes"] = sizes[system]
        known["difference"] = dict(
            zip(("median", "largest"), np.quantile(differences[system], [0.5, 1.0]), strict=True)
        )
        known["change"] = {
            f"{name}, {dim}": (drawn - found[TORCH][name][dim]).record()
            for name, by in rates.items()
            for dim, drawn in by.items()
        }
    return known


def named_arguments(arguments: argparse.Namespace) -> list[str]:
    """The options of this run, files by their names alone: where they lie is this machine's business."""
    options = ["--trials", *(path.name for path in arguments.trials), "--folder", arguments.folder.name]
    options += ["--dims", *map(str, arguments.dims), "--threads", str(arguments.threads)]
    return options + (["--quick"] if arguments.quick else [])


def line(cells: list[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
