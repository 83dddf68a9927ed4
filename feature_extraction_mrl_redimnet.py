"""Speech of any length to a padded batch for ReDimNet-MRL. Travels beside the weights to the Hub."""

import io
import os
from collections.abc import Mapping
from typing import Any

import fsspec
import numpy as np
import torch
from numpy.typing import ArrayLike
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.utils import logging

# Only files need the first, and only audio of another rate the second.
try:
    import soundfile
except ImportError:
    soundfile = None
try:
    from torchaudio.functional import resample
except ImportError:
    resample = None

logger = logging.get_logger(__name__)


NUMBERS = (int, float, np.number)


class MRLReDimNetFeatureExtractor(SequenceFeatureExtractor):
    """Reads audio, checks it and pads it into `input_values` [B, T] float32 and `attention_mask` [B, T].

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
        raw_speech: Any,
        sampling_rate: int | None = None,
        padding: bool | str = True,
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """One utterance, or a list of them, as a batch.

        raw_speech: each utterance is one of these:

        - a mono waveform: an array, tensor or list [samples] (or [1, samples]), floating point (any precision) in
          -1 .. 1, or int16/int32 (scaled to it);
        - a file, see `read`: its path or URL, its bytes, an open binary file;
        - a row of a data set's audio column: a dict with `array` and `sampling_rate`, or with `bytes` or `path`, or a
          decoder of torchcodec.

        sampling_rate of waveforms in Hz: pass it, a wrong one is refused. Files and rows know theirs.
        `padding` and further arguments are those of SequenceFeatureExtractor.pad.

        Raises ValueError saying which utterance is wrong, how, and what to do; OSError for a file that is not there;
        ImportError where reading it takes a package that is not installed.
        """
        if isinstance(raw_speech, (list, tuple)) and not (len(raw_speech) > 0 and isinstance(raw_speech[0], NUMBERS)):
            utterances = list(raw_speech)
        else:
            utterances = [raw_speech]
        if not utterances:
            raise ValueError("raw_speech: an empty list, expected at least one waveform.")
        checked = [self.waveform(each, sampling_rate, f"raw_speech[{i}]") for i, each in enumerate(utterances)]
        return self.pad(
            BatchFeature({"input_values": checked}), padding=padding, return_tensors=return_tensors, **kwargs
        )

    def waveform(self, utterance: Any, sampling_rate: int | None = None, where: str = "the utterance") -> np.ndarray:
        """One utterance, as for a call, as float32 [samples]; errors begin with `where`, its name."""
        if isinstance(utterance, Mapping) and utterance.get("array") is None:  # a row that is not decoded
            utterance = utterance.get("path") if utterance.get("bytes") is None else utterance["bytes"]
            if utterance is None:
                raise ValueError(f"{where}: a dict without audio; expected `array`, `bytes` or `path`.")
        if isinstance(utterance, (str, os.PathLike, bytes)) or hasattr(utterance, "read"):
            utterance, sampling_rate = self.read(utterance, where)
        elif isinstance(utterance, Mapping):
            if "sampling_rate" not in utterance:
                raise ValueError(f"{where}: a dict with `array` needs `sampling_rate`, in Hz.")
            utterance, sampling_rate = self._resampled(utterance["array"], utterance["sampling_rate"], where)
        elif hasattr(utterance, "get_all_samples"):  # torchcodec's AudioDecoder
            samples = utterance.get_all_samples()
            utterance, sampling_rate = self._resampled(samples.data.mean(0), samples.sample_rate, where)
        if sampling_rate is None:
            logger.warning_once(f"No sampling_rate given: taking the audio for {self.sampling_rate} Hz.")
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"sampling_rate: the audio has {sampling_rate} Hz, the model needs {self.sampling_rate} Hz. "
                f"Resample first: torchaudio.functional.resample(waveform, {sampling_rate}, {self.sampling_rate})."
            )
        return self.checked(utterance, where)

    def read(self, file: Any, where: str = "the file") -> tuple[np.ndarray, int]:
        """An audio file -> mono float32 [samples] at the model's rate, and that rate in Hz.

        file: a path or any URL that fsspec opens, the bytes of a file, or an open binary file. Several channels are
        averaged; another rate is resampled. Formats are those of libsndfile: WAV, FLAC, OGG (Vorbis, Opus), MP3. Raises
        as a call.
        """
        if soundfile is None:
            raise ImportError(f"{where}: reading audio files needs soundfile: `pip install soundfile`.")
        name = "its bytes" if isinstance(file, bytes) else getattr(file, "name", file)
        try:
            if isinstance(file, (str, os.PathLike)):
                with fsspec.open(file, "rb") as opened:
                    samples, rate = soundfile.read(opened, dtype="float32", always_2d=True)
            else:
                opened = io.BytesIO(file) if isinstance(file, bytes) else file
                samples, rate = soundfile.read(opened, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise ValueError(
                f"{where}: libsndfile cannot read {name} ({error.error_string.rstrip('.')}). It reads WAV, FLAC, OGG "
                "and MP3; for AAC and others use mrl_redimnet.SpeakerEncoder."
            ) from error
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{where}: there is no file {name}, or it cannot be reached.") from error
        except (OSError, ValueError) as error:  # a folder, a protocol that fsspec does not know
            raise ValueError(f"{where}: {name} cannot be opened ({error}).") from error
        return self._resampled(samples.mean(1), rate, where)

    def _resampled(self, waveform: ArrayLike | torch.Tensor, rate: int, where: str) -> tuple[Any, int]:
        if rate == self.sampling_rate:
            return waveform, rate
        if resample is None:
            raise ImportError(
                f"{where}: the audio has {rate} Hz, the model needs {self.sampling_rate} Hz, and resampling needs "
                "torchaudio: `pip install torchaudio`."
            )
        return resample(torch.as_tensor(waveform).float(), rate, self.sampling_rate), self.sampling_rate

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
