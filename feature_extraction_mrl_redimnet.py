"""Waveforms of any length to a padded batch for ReDimNet-MRL. Travels beside the weights to the Hub."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.utils import logging

logger = logging.get_logger(__name__)


class MRLReDimNetFeatureExtractor(SequenceFeatureExtractor):
    """Checks waveforms and pads them into `input_values` [B, T] float32 and `attention_mask` [B, T].

    Args:
        sampling_rate: the rate the model was trained for, in Hz.
        min_samples: the model's shortest utterance (`config.min_samples`).
    """

    model_input_names = ["input_values", "attention_mask"]

    def __init__(
        self, sampling_rate: int = 16_000, min_samples: int = 257, padding_value: float = 0.0, **kwargs: Any
    ) -> None:
        kwargs.pop("feature_size", None)  # saved by the parent class; a waveform has one value per step
        super().__init__(feature_size=1, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        self.return_attention_mask = True
        self.min_samples = min_samples

    def __call__(
        self,
        raw_speech: ArrayLike | torch.Tensor | Sequence[ArrayLike | torch.Tensor],
        sampling_rate: int | None = None,
        padding: bool | str = True,
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """raw_speech: one waveform or a list of them, each a mono array, tensor or list [samples] (or [1, samples]),
        floating point (any precision) in -1 .. 1, or int16/int32 (scaled to it); sampling_rate in Hz: pass it, a wrong
        one is refused.

        `padding` and further arguments are those of SequenceFeatureExtractor.pad. Raises ValueError saying which
        waveform is wrong, how, and what to do.
        """
        if sampling_rate is None:
            logger.warning_once(f"No sampling_rate given: taking the audio for {self.sampling_rate} Hz.")
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"sampling_rate: the audio has {sampling_rate} Hz, the model needs {self.sampling_rate} Hz. "
                f"Resample first: torchaudio.functional.resample(waveform, {sampling_rate}, {self.sampling_rate})."
            )
        waveforms: list[ArrayLike | torch.Tensor]
        if isinstance(raw_speech, (list, tuple)) and not (len(raw_speech) > 0 and np.isscalar(raw_speech[0])):
            waveforms = list(raw_speech)
        else:
            waveforms = [raw_speech]
        if not waveforms:
            raise ValueError("raw_speech: an empty list, expected at least one waveform.")
        checked = [self.checked(waveform, f"raw_speech[{i}]") for i, waveform in enumerate(waveforms)]
        return self.pad(
            BatchFeature({"input_values": checked}), padding=padding, return_tensors=return_tensors, **kwargs
        )

    def checked(self, waveform: ArrayLike | torch.Tensor, where: str) -> np.ndarray:
        """One waveform, as for a call, as float32 [samples]; raises ValueError that begins with `where`, its name."""
        if isinstance(waveform, torch.Tensor):
            waveform = waveform.detach().cpu()
            if waveform.is_floating_point():  # numpy has no bfloat16
                waveform = waveform.float()
            array = waveform.numpy()
        else:
            array = np.asarray(waveform)
        if array.ndim == 2 and 1 in array.shape:
            array = array.reshape(-1)
        if array.ndim != 1:
            raise ValueError(
                f"{where}: shape {array.shape}, expected mono [samples]. Several channels: average or choose one. "
                "Several utterances: pass a list of arrays."
            )
        array = self._scaled(array, where)
        if array.size < self.min_samples:
            raise ValueError(
                f"{where}: {array.size} samples ({array.size / self.sampling_rate:.3f} s), the model needs at least "
                f"{self.min_samples} ({self.min_samples / self.sampling_rate:.3f} s)."
            )
        bad = ~np.isfinite(array)
        if bad.any():
            raise ValueError(
                f"{where}: {int(bad.sum())} of {array.size} samples are NaN or infinite, the first at "
                f"{int(bad.argmax())}."
            )
        peak = float(np.abs(array).max())
        if peak > 10:
            raise ValueError(
                f"{where}: values up to {peak:.0f}, expected -1 .. 1. If these are 16-bit samples, pass them as int16 "
                "or divide by 32768."
            )
        return array

    @staticmethod
    def _scaled(array: np.ndarray, where: str) -> np.ndarray:
        if array.dtype in (np.int16, np.int32):
            return (array / -float(np.iinfo(array.dtype).min)).astype(np.float32)
        if array.size == 0 or np.issubdtype(array.dtype, np.floating):
            return array.astype(np.float32)
        raise ValueError(
            f"{where}: dtype {array.dtype}, expected floating point, int16 or int32. Convert it: floating point in "
            "-1 .. 1, or the 16-bit samples as they are."
        )


MRLReDimNetFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")

__all__ = ["MRLReDimNetFeatureExtractor"]
