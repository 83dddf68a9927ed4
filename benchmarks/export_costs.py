"""What an exported file weighs, and what it costs in time, memory and accuracy: every form against the PyTorch model.

    python benchmarks/export_costs.py MODEL [--trials LIST ... --folder WAV] --out docs/results/export_costs

Size, speed, memory and agreement are those on cuts of 3 s from the recordings in the package: the forms take turns in
an order drawn anew each round, and each has a process of its own for its memory. Run it while nothing else runs. With
trials, every utterance is also embedded whole, by PyTorch and by onnxruntime from each file; intervals and differences
come from one bootstrap over speakers, so a difference's interval is paired. Writes OUT.json and OUT.md. To try it in
two minutes: `--quick`, a few rounds, and the first four utterances of every speaker.
"""

import argparse
import collections
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from export_forms import KINDS
from paired import change, eers, percent
from timing import machine, quartiles, speedup, take_turns

from mrl_redimnet import recordings
from mrl_redimnet.audio.io import read_audio
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.evaluation.results import check_present
from mrl_redimnet.export import PRECISIONS, export_onnx, export_onnx_weights, export_torch
from mrl_redimnet.files import check_output, replace_file
from mrl_redimnet.saving import load_model, save_model
from mrl_redimnet.scoring.trials import Trials, read_trials, speaker_of

TORCH = "PyTorch"
QUICK_UTTERANCES = 4


CUT_SECONDS, BATCH = 3, 8
LOADS = {f"1 x {CUT_SECONDS} s": 1, f"{BATCH} x {CUT_SECONDS} s": BATCH}


def main():
    """Exports, times, embeds, scores, writes."""
    arguments = parse()
    check_output(arguments.out.with_suffix(".md"))
    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        made = make_forms(model, arguments.model, Path(folder))
        measured = measure(made, arguments, Path(folder))
        scored = score_lists(arguments, model, made) if arguments.trials else None
    write(arguments, measured, scored)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="path or Hub id")
    parser.add_argument("--trials", type=Path, nargs="+", default=[], help="lists for error rates [none]")
    parser.add_argument("--folder", type=Path, help="what the paths in the lists are relative to")
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=60, help="of timing for each load, at least five rounds [60]")
    parser.add_argument("--quick", action="store_true", help="a few rounds, a few utterances of every speaker")
    arguments = parser.parse_args()
    if bool(arguments.trials) != (arguments.folder is not None):
        parser.error("--trials and --folder go together")
    return arguments


# ---------------------------------------------------------------- size, speed, memory


@dataclass(frozen=True)
class Form:
    """kind: one of export_forms.KINDS; source: what it loads; bytes: of the file."""

    kind: str
    source: str
    bytes: int


def make_forms(model, source: str, folder: Path) -> dict[str, Form]:
    """Every form by its name, the PyTorch model first; their files are in `folder`."""
    save_model(model, folder / "saved")
    weights = sum(file.stat().st_size for file in (folder / "saved").glob("*.safetensors"))
    makers = {
        "torch.export": ("program", "any.pt2", export_torch),
        **{f"ONNX {each}": ("onnx", f"{each}.onnx", partial(export_onnx, precision=each)) for each in PRECISIONS},
        "ONNX float32, no mask": ("onnx", "no_mask.onnx", partial(export_onnx, mask=False)),
        f"ONNX float32, {CUT_SECONDS} s": ("onnx", "fixed.onnx", partial(export_onnx, seconds=CUT_SECONDS)),
        "ONNX float32, weighted parts": ("onnx", "weighted.onnx", export_onnx_weights),
    }
    forms = {TORCH: Form("pytorch", source, weights)}
    for name, (kind, file, make) in makers.items():
        path = make(model, folder / file)
        forms[name] = Form(kind, str(path), path.stat().st_size)
    return forms


def cuts() -> np.ndarray:
    """BATCH cuts [BATCH, samples] of the recordings in the package, overlapping ones where need be."""
    samples, waves = CUT_SECONDS * 16_000, []
    files = (recordings.FIRST, recordings.SAME_SPEAKER, recordings.OTHER_SPEAKER)
    for number in range(BATCH):
        wave = read_audio(files[number % len(files)])
        last = -(-BATCH // len(files)) - 1  # cuts of a recording after its first
        start = (len(wave) - samples) * (number // len(files)) // last
        waves.append(wave[start : start + samples])
    return np.stack(waves)


def measure(forms: dict[str, Form], arguments: argparse.Namespace, folder: Path) -> dict[str, dict]:
    """What each form weighs, takes and answers, by its name."""
    waves = cuts()
    np.save(folder / "waves.npy", waves)
    found: dict[str, dict] = {}
    loaded, answers = {}, {}
    for name, form in forms.items():
        command = [Path(__file__).with_name("export_forms.py"), form.kind, form.source, folder / "waves.npy"]
        done = subprocess.run([sys.executable, *command, str(arguments.threads)], stdout=subprocess.PIPE, check=True)
        loaded[name] = KINDS[form.kind](form.source, arguments.threads)
        answers[name] = loaded[name](waves)
        found[name] = {"bytes": form.bytes, "peak_bytes": int(done.stdout.split()[-1])}
        found[name]["cosine"] = float(cosine(answers[name], answers[TORCH]).min())
    for load, count in LOADS.items():
        calls = {name: partial(embed, waves[:count]) for name, embed in loaded.items()}
        for call in calls.values():
            call()
        times = take_turns(calls, 1 if arguments.quick else arguments.seconds, most=10 if arguments.quick else 200)
        for name, values in times.items():
            found[name][load] = {
                "seconds": quartiles(values),
                "speedup": speedup(times, TORCH, name),
                "rounds": len(values),
            }
        print(f"{load}: timed", flush=True)
    return found


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of the rows of two tables [N, D]."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


# ---------------------------------------------------------------- error rates


def score_lists(arguments: argparse.Namespace, model, forms: dict[str, Form]) -> dict:
    """Error rates of PyTorch and of each precision, and how far embeddings differ."""
    lists = {path.stem.removeprefix("trials_"): read_trials(path) for path in arguments.trials}
    if arguments.quick:
        lists = {name: first_utterances(trials) for name, trials in lists.items()}
    utterances = sorted({path for trials in lists.values() for path in trials.utterances})
    for trials in lists.values():
        check_present(trials, arguments.folder)
    files = [arguments.folder / path for path in utterances]
    embedded = {TORCH: SpeakerEncoder(model).embed(files)}
    for precision in PRECISIONS:
        exported = Path(forms[f"ONNX {precision}"].source)
        embedded[precision] = np.concatenate([*embeddings(exported, files, model.config, arguments.threads)])
        print(f"{precision}: {len(files)} utterances embedded", flush=True)
    return {
        "rates": {
            system: {
                name: eers(trials, utterances, each, arguments.dims, arguments.resamples)
                for name, trials in lists.items()
            }
            for system, each in embedded.items()
        },
        "differences": {precision: relative(embedded[precision], embedded[TORCH]) for precision in PRECISIONS},
        "trials": {name: len(trials) for name, trials in lists.items()},
        "utterances": len(files),
    }


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


# ---------------------------------------------------------------- what is written


def write(arguments: argparse.Namespace, measured: dict[str, dict], scored: dict | None):
    """OUT.json and OUT.md."""
    where = (
        f"{machine()}; torch {torch.__version__}, onnxruntime {onnxruntime.__version__}; threads: {arguments.threads}"
    )
    words = ["python", "benchmarks/export_costs.py", Path(arguments.model).name, *named_arguments(arguments)]
    command = shlex.join(words)
    text = ["# Exported files against PyTorch", "", f"`{command}`, on {where}.", "", *costs(measured)]
    if scored is not None:
        text += ["", "## Error rates", "", *rates(arguments, scored)]
    record = {"command": command, "machine": where, "forms": measured}
    if scored is not None:
        systems = {system: summary(system, scored) for system in scored["rates"]}
        record |= {name: scored[name] for name in ("utterances", "trials")}
        record |= {"resamples": arguments.resamples, "systems": systems}
    for suffix, content in ((".json", json.dumps(record, indent=1)), (".md", "\n".join(text))):
        replace_file(arguments.out.with_suffix(suffix), lambda file, c=content: file.write_text(c + "\n", "utf-8"))
    print("\n".join(text))


def costs(measured: dict[str, dict]) -> list[str]:
    """The table of sizes, times and memory."""
    columns = ["", "MB"]
    for load in LOADS:
        columns += [f"{load}, ms", "times PyTorch's speed"]
    columns += [f"memory, {BATCH} x {CUT_SECONDS} s, MB", "1 - cosine, worst"]
    rounds = ", ".join(str(next(iter(measured.values()))[load]["rounds"]) for load in LOADS)
    lines = [
        f"Cuts of {CUT_SECONDS} s from the recordings in the package. PyTorch: the model as `SpeakerEncoder` runs it; "
        f"its MB are those of weights saved in float32. Times: median [quartiles] over rounds ({rounds}) in which "
        "every form had its turn; a speed is PyTorch's time by the form's in the same round. A file of a fixed length "
        "is called once for each utterance. Memory: the most that a process occupied that loaded this form alone, "
        f"with the libraries that it needs, and embedded {BATCH} cuts. 1 - cosine: of the embedding that is furthest "
        "from PyTorch's.",
        "",
        line(columns),
        "|---" + "|---:" * (len(columns) - 1) + "|",
    ]
    for name, found in measured.items():
        cells = [name, f"{found['bytes'] / 1e6:.2f}"]
        for load in LOADS:
            milliseconds = {name: 1e3 * value for name, value in found[load]["seconds"].items()}
            cells += [spread(milliseconds, 1), spread(found[load]["speedup"], 2)]
        apart = "-" if name == TORCH else f"{max(1 - found['cosine'], 0):.1e}"
        lines.append(line([*cells, f"{found['peak_bytes'] / 1e6:.0f}", apart]))
    return lines


def spread(found: dict[str, float], digits: int) -> str:
    """Median [quartiles]."""
    return "{median:.{n}f} [{low:.{n}f}, {high:.{n}f}]".format(**found, n=digits)


def rates(arguments: argparse.Namespace, scored: dict) -> list[str]:
    """The table of error rates."""
    lists = ", ".join(f"{name} ({count:,} trials)" for name, count in scored["trials"].items())
    columns = ["", "difference, median", "largest"]
    columns += [f"{name}, {dim}" for name in scored["trials"] for dim in arguments.dims]
    lines = [
        f"ONNX files in every precision, run by onnxruntime, against the PyTorch model: {scored['utterances']} "
        f"utterances; {lists}. Difference: |embedding - PyTorch's| / |PyTorch's|, whole embeddings. Then EER % at "
        f"{' and '.join(map(str, arguments.dims))} dimensions, below it the change against PyTorch, both with 95 % "
        f"intervals over speakers ({arguments.resamples} resamples; the change's is paired), **bold** where that "
        "leaves out zero.",
        "",
        line(columns),
        "|---" * len(columns) + "|",
    ]
    of_torch = scored["rates"][TORCH]
    for system, found in scored["rates"].items():
        cells = [system, "-", "-"]
        if (differences := scored["differences"].get(system)) is not None:
            cells = [system, f"{np.median(differences):.1e}", f"{differences.max():.1e}"]
        for name in scored["trials"]:
            for dim in arguments.dims:
                against = "" if differences is None else f"<br>{change(found[name][dim] - of_torch[name][dim])}"
                cells.append(percent(found[name][dim]) + against)
        lines.append(line(cells))
    return lines


def summary(system: str, scored: dict) -> dict:
    """What is known of one system, for JSON."""
    rates, of_torch = scored["rates"][system], scored["rates"][TORCH]
    known = {"eer": {f"{name}, {dim}": drawn.record() for name, by in rates.items() for dim, drawn in by.items()}}
    if system in scored["differences"]:
        quantiles = np.quantile(scored["differences"][system], [0.5, 1.0])
        known["difference"] = dict(zip(("median", "largest"), quantiles.tolist(), strict=True))
        known["change"] = {
            f"{name}, {dim}": (drawn - of_torch[name][dim]).record()
            for name, by in rates.items()
            for dim, drawn in by.items()
        }
    return known


def named_arguments(arguments: argparse.Namespace) -> list[str]:
    """The options of this run, files by their names alone: where they lie is this machine's business."""
    options = ["--threads", str(arguments.threads)]
    if arguments.trials:
        options += ["--trials", *(path.name for path in arguments.trials), "--folder", arguments.folder.name]
        options += ["--dims", *map(str, arguments.dims)]
    return options + (["--quick"] if arguments.quick else [])


def line(cells: list[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
