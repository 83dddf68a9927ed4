"""Where somebody speaks: Silero's voice activity detector (MIT), whose weights come with its package."""

from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configuration_mrl_redimnet import SAMPLING_RATE
from mrl_redimnet.audio.windows import Reader
from mrl_redimnet.extras import extra

FRAME = 512  # samples of a decision
STRETCH = 300 * SAMPLING_RATE // FRAME * FRAME  # samples that are held at a time
_LEAD_IN = 10 * SAMPLING_RATE // FRAME * FRAME  # samples before a stretch that the recurrent network hears first
# Chosen on simulated conversations and on nine half minutes of meetings (docs/results/diarisation_settings.md).
# Silero's own values lose a tenth more of the speech: it is made for clear speech near a microphone.
DECISIONS = {
    "threshold": 0.2,  # speech begins at this probability
    "neg_threshold": 0.1,  # and ends below this one
    "min_silence_duration_ms": 300,
    "min_speech_duration_ms": 100,
    "speech_pad_ms": 50,
}

Span = tuple[float, float]  # start and end in seconds


@cache
def _detector() -> Any:
    with extra("diarization"):
        from silero_vad import SileroVADSequence

    return SileroVADSequence(str(files("silero_vad.data") / "silero_vad_16k_sequence.onnx"))


def speech_in(read: Reader) -> list[Span]:
    """Where there is speech in a recording, in seconds, in order and without overlaps.

    Memory does not grow with the recording, which is read in stretches of five minutes.

    Raises AudioError for what cannot be read, ModuleNotFoundError without the `diarization` extra.
    """
    with extra("diarization"):
        from silero_vad import get_speech_timestamps_from_probs

    found: list[NDArray] = []
    for first in range(0, read.samples, STRETCH):
        begin = max(0, first - _LEAD_IN)
        wave = read(begin, min(first + STRETCH, read.samples))
        found.append(_detector().audio_forward(wave)[(first - begin) // FRAME :])
    probabilities = np.concatenate(found).tolist()
    spans = get_speech_timestamps_from_probs(probabilities, audio_length_samples=read.samples, **DECISIONS)
    return [(span["start"] / SAMPLING_RATE, span["end"] / SAMPLING_RATE) for span in spans]
