"""Utterances cut to classes of duration."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrl_redimnet.audio.cuts import CUTS, cut
from mrl_redimnet.audio.io import SAMPLING_RATE


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * SAMPLING_RATE)).astype(np.float32)


@given(st.sampled_from(list(CUTS)), st.text(max_size=20), st.floats(0, 3))
def test_a_stretch_of_the_utterance_with_a_length_of_the_class(kind, name, longer):
    low, high = CUTS[kind]
    audio = noise(high + longer)
    found = cut(audio, name, kind)
    assert low * SAMPLING_RATE - 1 <= len(found) <= high * SAMPLING_RATE
    start = int(np.flatnonzero(audio == found[0])[0])
    assert np.array_equal(found, audio[start : start + len(found)])
    assert np.array_equal(cut(audio, name, kind), found)


def test_names_and_classes_draw_for_themselves():
    audio = noise(20)
    lengths = {kind: [len(cut(audio, str(name), kind)) / SAMPLING_RATE for name in range(300)] for kind in CUTS}
    for kind, (low, high) in CUTS.items():
        assert len(set(lengths[kind])) > 290
        assert np.median(lengths[kind]) == pytest.approx(np.sqrt(low * high), rel=0.05)  # log-uniform
    assert not np.allclose(np.array(lengths["0.5-1 s"]) * 2, lengths["1-2 s"], atol=1e-3)


def test_the_stretch_has_speech_where_there_is_some():
    """Two seconds of speech in twenty of silence: a stretch of a second at random would have a tenth of it."""
    audio = np.concatenate([noise(9) * 1e-4, noise(2), noise(9) * 1e-4])
    loud = [np.square(cut(audio, str(name), "0.5-1 s")).mean() > 1e-4 for name in range(100)]
    assert np.mean(loud) > 0.6


def test_audio_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match=r"a.wav: 0.99 s cannot be cut to 0.5-1 s: it takes 1 s."):
        cut(noise(0.99), "a.wav", "0.5-1 s")
