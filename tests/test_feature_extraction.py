import numpy as np
import pytest
import torch
from conftest import padded, relative_error, waves

from feature_extraction_mrl_redimnet import MRLReDimNetFeatureExtractor

RATE = 16_000


@pytest.fixture
def extractor() -> MRLReDimNetFeatureExtractor:
    return MRLReDimNetFeatureExtractor()


def test_lengths_become_a_mask(extractor):
    utterances = waves(4_800, 6_000, 5_000)
    batch = extractor(utterances, sampling_rate=RATE)
    assert set(batch) == {"input_values", "attention_mask"}
    assert batch["attention_mask"].sum(1).tolist() == [4_800, 6_000, 5_000]
    torch.testing.assert_close(batch["input_values"], padded(utterances)["input_values"], rtol=0, atol=0)
    torch.testing.assert_close(batch["attention_mask"], padded(utterances)["attention_mask"], rtol=0, atol=0)


@pytest.mark.parametrize(
    "form",
    [
        lambda wave: wave,
        lambda wave: wave.numpy(),
        lambda wave: wave.tolist(),
        lambda wave: tuple(wave.tolist()),
        lambda wave: wave[None],
        lambda wave: wave.numpy()[None],
        lambda wave: wave.numpy()[:, None],
        lambda wave: [wave],
        lambda wave: [wave.numpy()],
        lambda wave: [wave.tolist()],
        lambda wave: (wave[None],),
        lambda wave: wave.double(),
        lambda wave: wave.clone().requires_grad_(),
    ],
)
def test_one_waveform_in_any_form(extractor, form):
    (wave,) = waves(5_000)
    batch = extractor(form(wave), sampling_rate=RATE)
    assert batch["input_values"].dtype == torch.float32
    torch.testing.assert_close(batch["input_values"], wave[None], rtol=0, atol=0)
    assert batch["attention_mask"].all()


@pytest.mark.parametrize(("dtype", "full_scale"), [(np.int16, 2**15), (np.int32, 2**31)])
def test_whole_numbers_are_scaled(extractor, dtype, full_scale):
    samples = np.resize(np.array([0, full_scale // 2, -full_scale, full_scale - 1], dtype), 400)
    values = extractor(samples, sampling_rate=RATE)["input_values"][0, :4]
    torch.testing.assert_close(values, torch.tensor([0.0, 0.5, -1.0, 1.0]), rtol=0, atol=1e-4)


def test_half_precision_audio(extractor):
    (wave,) = waves(5_000)
    values = extractor(wave.half(), sampling_rate=RATE)["input_values"]
    assert values.dtype == torch.float32
    assert relative_error(values[0], wave) < 1e-3


def test_padding_to_a_length(extractor):
    batch = extractor(waves(4_800), sampling_rate=RATE, padding="max_length", max_length=8_000)
    assert batch["input_values"].shape == (1, 8_000)
    assert batch["attention_mask"].sum() == 4_800


def test_numpy_output(extractor):
    batch = extractor(waves(4_800, 6_000), sampling_rate=RATE, return_tensors="np")
    assert isinstance(batch["input_values"], np.ndarray)
    assert batch["input_values"].shape == (2, 6_000)


LOUD = np.full(1_000, 20_000.0)
BROKEN = np.where(np.arange(1_000) % 500 == 400, np.nan, 0.1)


@pytest.mark.parametrize(
    ("speech", "message"),
    [
        ([], "raw_speech: an empty list"),
        (np.zeros((2, 1_000)), r"raw_speech\[0\]: shape \(2, 1000\), expected mono .* pass a list"),
        ([np.zeros(1_000), np.zeros((2, 1_000))], r"raw_speech\[1\]: shape \(2, 1000\)"),
        ([np.zeros(1_000), np.zeros(100)], r"raw_speech\[1\]: 100 samples \(0.006 s\), the model needs at least 257"),
        ([np.zeros(0)], r"raw_speech\[0\]: 0 samples"),
        (BROKEN, r"raw_speech\[0\]: 2 of 1000 samples are NaN or infinite, the first at 400"),
        (np.full(1_000, -np.inf), "1000 of 1000 samples are NaN or infinite"),
        (LOUD, r"raw_speech\[0\]: values up to 20000, expected -1 .. 1. .*int16 or divide by 32768"),
        (-LOUD, "values up to 20000"),
        (np.zeros(1_000, np.int64), r"raw_speech\[0\]: dtype int64, expected floating point, int16 or int32"),
        (np.zeros(1_000, np.uint8), "dtype uint8"),
    ],
)
def test_what_is_wrong_with_a_waveform(extractor, speech, message):
    with pytest.raises(ValueError, match=message):
        extractor(speech, sampling_rate=RATE)


def test_wrong_sampling_rate(extractor):
    with pytest.raises(ValueError, match=r"the audio has 8000 Hz, the model needs 16000 Hz. Resample first: .*8000"):
        extractor(waves(4_800), sampling_rate=8_000)


def test_no_sampling_rate_is_taken_for_the_right_one(extractor):
    torch.testing.assert_close(
        extractor(waves(4_800))["input_values"], extractor(waves(4_800), sampling_rate=RATE)["input_values"]
    )


def test_save_and_load(tmp_path):
    MRLReDimNetFeatureExtractor(min_samples=400).save_pretrained(tmp_path)
    loaded = MRLReDimNetFeatureExtractor.from_pretrained(tmp_path)
    assert (loaded.sampling_rate, loaded.min_samples, loaded.padding_value) == (16_000, 400, 0.0)
    assert (loaded.padding_side, loaded.return_attention_mask) == ("right", True)
    assert loaded(waves(4_800), sampling_rate=RATE)["attention_mask"].sum() == 4_800


def test_through_the_model(extractor, model):
    """A list of utterances gives what each gives alone."""
    utterances = waves(4_800, 16_000)
    with torch.inference_mode():
        together = model(**extractor(utterances, sampling_rate=RATE)).embeddings
        for row, utterance in zip(together, utterances, strict=True):
            assert relative_error(row, model(utterance[None]).embeddings[0]) < 1e-5


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float64", "int16", "int32"])
@pytest.mark.parametrize("form", [lambda wave: wave, lambda wave: wave[None], lambda wave: wave.requires_grad_()])
def test_every_precision_is_the_same_waveform(extractor, kind, form):
    (wave,) = waves(4_800)
    wave = 0.1 * wave / wave.abs().max()
    expected = extractor(wave, sampling_rate=RATE)["input_values"]
    scale = {"int16": 2**15, "int32": 2**31}.get(kind, 1)
    given = (wave.double() * scale).to(getattr(torch, kind))
    if given.is_floating_point():
        given = form(given)
    tolerance = {"bfloat16": 1e-3, "float16": 1e-4, "int16": 1e-4}.get(kind, 1e-6)
    torch.testing.assert_close(extractor(given, sampling_rate=RATE)["input_values"], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_other_kinds_of_numbers_are_refused_in_one_sentence(extractor, kind):
    with pytest.raises(
        ValueError, match=r"raw_speech\[0\]: dtype \w+, expected floating point, int16 or int32. Convert"
    ):
        extractor(torch.ones(4_800).to(kind), sampling_rate=RATE)
