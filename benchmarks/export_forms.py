"""The forms of a model that are compared in export_costs.py: each is loaded and called with nothing but what it needs.

    python benchmarks/export_forms.py onnx model.onnx recordings.npy 1

loads one form in a process of its own, embeds the waveforms [N, T] of a file, and prints the most bytes that the
process ever occupied. Nothing of this project is imported for an exported form, and torch for programs of torch.export
alone.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

Embed = Callable[[np.ndarray], np.ndarray]  # waveforms [B, T] float32 -> embeddings [B, D]


def pytorch(source: str, threads: int) -> Embed:
    """The model as this package runs it, in its faster form; source: a name or a folder."""
    import torch

    from mrl_redimnet.encoder import SpeakerEncoder

    torch.set_num_threads(threads)
    model = SpeakerEncoder.from_pretrained(source, device="cpu").model

    @torch.inference_mode()
    def embed(waves: np.ndarray) -> np.ndarray:
        return model(input_values=torch.from_numpy(waves)).embeddings.numpy()

    return embed


def program(source: str, threads: int) -> Embed:
    """A program of torch.export."""
    import torch

    torch.set_num_threads(threads)
    loaded = torch.export.load(source).module()

    @torch.inference_mode()
    def embed(waves: np.ndarray) -> np.ndarray:
        mask = torch.ones(waves.shape, dtype=torch.int64)
        return loaded(input_values=torch.from_numpy(waves), attention_mask=mask).numpy()

    return embed


def onnx(source: str, threads: int) -> Embed:
    """An ONNX file in ONNX Runtime, with a mask, without, of a fixed length (a call for each utterance) or weighted."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names, of_one = [each.name for each in session.get_inputs()], session.get_inputs()[0].shape[0] == 1

    def call(waves: np.ndarray) -> np.ndarray:
        feeds = {
            "input_values": waves,
            "attention_mask": np.ones(waves.shape, np.int64),
            "waveform": waves[:, None],
            "weights": np.ones((len(waves), 100), np.float32),
        }
        return session.run(None, {name: feeds[name] for name in names})[0]

    return (lambda waves: np.concatenate([call(wave[None]) for wave in waves])) if of_one else call


KINDS = {"pytorch": pytorch, "program": program, "onnx": onnx}


def peak() -> int:
    """The most bytes that this process has occupied so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    kind, source, waves, threads = sys.argv[1:]
    KINDS[kind](source, int(threads))(np.load(waves))
    print(peak())
