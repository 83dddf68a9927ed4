"""The calls that people of the Hub know: transformers' pipeline, sentence-transformers, rows of data sets. Each gives
the numbers of `SpeakerEncoder`.
"""

import importlib.util
import io
import json
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from conftest import run_alone, tiny_config, tiny_model, waves
from transformers import pipeline

from feature_extraction_mrl_redimnet import MRLReDimNetFeatureExtractor
from modeling_mrl_redimnet import MRLReDimNetForSequenceClassification, MRLReDimNetForXVector
from mrl_redimnet import SpeakerEncoder
from mrl_redimnet.audio.io import read_audio
from mrl_redimnet.recordings import FIRST, OTHER_SPEAKER, SAME_SPEAKER
from mrl_redimnet.saving import load_model, packaged_models, save_model
from mrl_redimnet.scoring.calibration import Threshold, Thresholds

RECORDINGS = [str(file) for file in (FIRST, SAME_SPEAKER, OTHER_SPEAKER)]
CLOSE = dict(rtol=0, atol=2e-5)  # the faster forms of modules round otherwise


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """nano as a folder with its code, as on the Hub."""
    folder = tmp_path_factory.mktemp("hub") / "nano"
    save_model(load_model("nano"), folder)
    shutil.copy(packaged_models()["nano"] / "thresholds.json", folder)
    return folder


@pytest.fixture(scope="module")
def encoder():
    return SpeakerEncoder.from_pretrained("nano", device="cpu")


@pytest.fixture(scope="module")
def verifier(folder):
    return pipeline(model=str(folder), trust_remote_code=True, device="cpu")


# ---------------------------------------------------------------- transformers


def test_the_pipeline_is_found_by_the_model_alone(verifier):
    assert verifier.task == "speaker-verification"
    assert type(verifier).__module__.startswith("transformers_modules.")


def test_a_recording_becomes_an_embedding(verifier, encoder):
    embedding = verifier(RECORDINGS[0])
    assert embedding.dtype == np.float32
    np.testing.assert_allclose(embedding, encoder.embed(RECORDINGS[:1])[0], **CLOSE)
    np.testing.assert_array_equal(verifier(RECORDINGS[0], truncate_dim=64), embedding[:64])


@pytest.mark.parametrize("dim", [None, 64])
@pytest.mark.parametrize("enrol, test", [([0], 1), ([0], 2), ([0, 1], 2), ([0, 1, 2, 0], 1)])
def test_a_pair_is_decided_as_the_encoder_does(verifier, encoder, dim, enrol, test):
    enrolled = [RECORDINGS[row] for row in dict.fromkeys(enrol)]
    found = verifier({"enrol": enrolled, "test": RECORDINGS[test]}, truncate_dim=dim)
    (expected,) = encoder.verify(enrolled, [RECORDINGS[test]], dim)
    assert found["score"] == pytest.approx(expected.score, abs=2e-5)
    assert (found["accepted"], found["threshold"]) == (expected.accepted, expected.threshold)
    assert found["dim"] == (dim or 256)


def test_a_threshold_that_knows_durations_is_applied_as_the_encoder_does(tmp_path, encoder):
    """Entries of random scores that fall with the durations; recordings as they are, and cut to a second."""
    folder, rng = tmp_path / "nano", np.random.default_rng(0)
    save_model(load_model("nano"), folder)
    labels, seconds = rng.integers(0, 2, 5000), np.exp(rng.uniform(-0.7, 2, (5000, 2)))
    logs = np.log(seconds.min(axis=1))
    thresholds = Thresholds()
    for dim, count in ((64, 1), (256, 1), (256, 2)):
        scores = rng.normal(0.3 + 0.1 * logs + (0.3 + 0.1 * logs) * labels, 0.1)
        given = dict(wanted=0.05, dim=dim, weights=encoder.fingerprint, trials="random", enrolments=count)
        thresholds.put(Threshold.fit(scores, labels, seconds=seconds, **given))
    thresholds.save(folder)
    verifier = pipeline(model=str(folder), trust_remote_code=True, device="cpu")
    known = SpeakerEncoder.from_pretrained(folder, device="cpu")
    whole = [read_audio(file) for file in RECORDINGS]
    short = [wave[16_000:32_000] for wave in whole]
    told = []
    for dim in (None, 64):
        for enrol, test in (([0], 1), ([0, 1], 2)):
            for waves_of in (whole, short):
                found = verifier({"enrol": [waves_of[row] for row in enrol], "test": waves_of[test]}, truncate_dim=dim)
                (expected,) = known.verify([waves_of[row] for row in enrol], [waves_of[test]], dim)
                assert found["threshold"] == pytest.approx(expected.threshold, abs=1e-9)
                assert found["accepted"] is expected.accepted
                told.append(found["threshold"])
    assert len(set(told)) == 8
    pairs = [(whole[0], whole[1]), (short[0], short[1])]
    assert [each["threshold"] for each in verifier(pairs, batch_size=4)] == [
        each["threshold"] for each in map(verifier, pairs)
    ]


def test_a_pair_may_be_a_tuple(verifier):
    of_dict = verifier({"enrol": [RECORDINGS[0]], "test": RECORDINGS[1]})
    assert verifier((RECORDINGS[0], RECORDINGS[1])) == of_dict
    assert verifier((RECORDINGS[0], RECORDINGS[1]), threshold=0.99) == {**of_dict, "threshold": 0.99, "accepted": False}


def test_many_inputs_in_batches(verifier):
    """Utterances of different inputs and lengths go through the network together."""
    inputs = [RECORDINGS[0], (RECORDINGS[0], RECORDINGS[2]), {"enrol": RECORDINGS[:2], "test": RECORDINGS[2]}]
    alone, together = [verifier(each) for each in inputs], verifier(inputs, batch_size=3)
    np.testing.assert_allclose(together[0], alone[0], **CLOSE)
    for one, other in zip(together[1:], alone[1:], strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=2e-5)
        assert one["accepted"] is other["accepted"]


def test_without_thresholds_nothing_is_decided(tmp_path):
    save_model(tiny_model(kind=MRLReDimNetForXVector), tmp_path / "model")
    verifier = pipeline(model=str(tmp_path / "model"), trust_remote_code=True, device="cpu")
    found = verifier((RECORDINGS[0], RECORDINGS[1]))
    assert found["accepted"] is None and found["threshold"] is None and -1 <= found["score"] <= 1


@pytest.mark.parametrize(
    "inputs, message",
    [
        ((RECORDINGS[0],), "A pair is .*got 1 sides"),
        ({"enrol": RECORDINGS[:1]}, "A pair is .*one of them missing"),
        ({"enrol": [], "test": RECORDINGS[0]}, "enrol: an empty list"),
        (
            {"enrol": [RECORDINGS[0], "nowhere.wav"], "test": RECORDINGS[0]},
            r"enrol\[1\]: there is no file nowhere.wav, or",
        ),
        ((RECORDINGS[0], np.zeros(10, np.float32)), "test: 10 samples .* needs at least 257"),
        ("nowhere.wav", "the input: there is no file nowhere.wav, or"),
    ],
)
def test_what_is_wrong_with_an_input(verifier, inputs, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        verifier(inputs)


def test_other_arguments_are_refused(verifier):
    with pytest.raises(TypeError, match="has no argument treshold"):
        verifier(RECORDINGS[0], treshold=0.5)
    with pytest.raises(ValueError, match="truncate_dim: got 65"):
        verifier(RECORDINGS[0], truncate_dim=65)


def test_a_classifier_has_transformers_own_pipeline(tmp_path):
    model = tiny_model(tiny_config(num_labels=3), kind=MRLReDimNetForSequenceClassification)
    save_model(model, tmp_path / "model")
    assert not json.loads((tmp_path / "model/config.json").read_text())["custom_pipelines"]
    assert not (tmp_path / "model/modules.json").exists()
    assert "sentence-transformers" not in (tmp_path / "model/README.md").read_text()


def test_what_was_loaded_from_the_hub_is_saved_with_its_pipeline(verifier, tmp_path):
    """Code that transformers fetched saves itself whole."""
    verifier.save_pretrained(tmp_path / "again")
    again = pipeline(model=str(tmp_path / "again"), trust_remote_code=True, device="cpu")
    np.testing.assert_array_equal(again(RECORDINGS[0]), verifier(RECORDINGS[0]))


# In a process that has neither this package nor what it needs, but for what reads audio.
ALONE = """
import json, sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        hidden = {"mrl_redimnet", "peft", "evaluate", "av"}
        ours = name.endswith("_mrl_redimnet") and "." not in name
        return None if ours or name.split(".")[0] in hidden else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
folder, *recordings = sys.argv[1:]
"""
IMPORTS = """
from sentence_transformers import SentenceTransformer
from transformers import pipeline
"""
PIPELINE_ALONE = """
from transformers import pipeline

verifier = pipeline(model=folder, trust_remote_code=True, device="cpu")
print(json.dumps([verifier(recordings[0]).tolist(), verifier(tuple(recordings[:2])), verifier(tuple(recordings[::2]))]))
"""


def test_the_pipeline_needs_the_weights_folder_alone(folder, encoder, tmp_path):
    printed = run_alone(ALONE + PIPELINE_ALONE, folder, *RECORDINGS, folder=tmp_path)
    embedding, same, other = json.loads(printed.splitlines()[-1])
    np.testing.assert_allclose(embedding, encoder.embed(RECORDINGS[:1])[0], **CLOSE)
    expected = encoder.verify(RECORDINGS[:1], RECORDINGS[1:])
    assert [same["accepted"], other["accepted"]] == [decision.accepted for decision in expected] == [True, False]


# ---------------------------------------------------------------- sentence-transformers

SENTENCES_ALONE = """
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings

model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
short = SentenceTransformer(folder, trust_remote_code=True, truncate_dim=64, device="cpu")
embeddings = model.encode(recordings)
print(json.dumps({
    "embeddings": embeddings.tolist(),
    "short": short.encode(recordings).tolist(),
    "dims": [model.get_embedding_dimension(), short.get_embedding_dimension()],
    "similarity": model.similarity(embeddings, embeddings).tolist(),
    "binary": model.encode(recordings, precision="binary").tolist(),
    "int8": quantize_embeddings(embeddings, "int8", calibration_embeddings=embeddings).tolist(),
}))
"""


@pytest.fixture(scope="module")
def sentences(folder, tmp_path_factory):
    printed = run_alone(ALONE + SENTENCES_ALONE, folder, *RECORDINGS, folder=tmp_path_factory.mktemp("alone"))
    return {name: np.array(value) for name, value in json.loads(printed.splitlines()[-1]).items()}


def test_sentence_transformers_gives_the_same_embeddings(sentences, encoder):
    expected = encoder.embed(RECORDINGS)
    np.testing.assert_allclose(sentences["embeddings"], expected, **CLOSE)
    np.testing.assert_array_equal(sentences["short"], sentences["embeddings"][:, :64])
    np.testing.assert_allclose(sentences["similarity"], encoder.similarity(expected, expected), **CLOSE)
    assert sentences["dims"].tolist() == [256, 64]


def test_sentence_transformers_quantises(sentences):
    bits = np.packbits(sentences["embeddings"] > 0, axis=-1).astype(np.int16) - 128  # their convention
    np.testing.assert_array_equal(sentences["binary"], bits)
    assert sentences["int8"].shape == (3, 256) and np.ptp(sentences["int8"]) == 255


# ---------------------------------------------------------------- data sets, files, bytes, URLs


@pytest.fixture(scope="module")
def rows():
    """A data set with an audio column that is not decoded."""
    data = datasets.Dataset.from_dict({"audio": RECORDINGS, "speaker": ["a", "a", "b"]})
    return data.cast_column("audio", datasets.Audio(decode=False))


def test_a_data_set_is_mapped(rows, encoder):
    mapped = rows.map(encoder.embed_batch, batched=True, batch_size=2)
    np.testing.assert_allclose(np.array(mapped["embedding"]), encoder.embed(RECORDINGS), **CLOSE)
    short = rows.map(encoder.embed_batch, batched=True, fn_kwargs={"column": "audio", "dim": 64})
    np.testing.assert_allclose(np.array(short["embedding"]), encoder.embed(RECORDINGS, dim=64), **CLOSE)
    with pytest.raises(ValueError, match="no column sound; there are: audio, speaker"):
        encoder.embed_batch(rows[:2], column="sound")


class Decoder:
    """What torchcodec's AudioDecoder gives of a decoded row."""

    def __init__(self, file):
        self.file = file

    def get_all_samples(self):
        samples, rate = soundfile.read(self.file, dtype="float32", always_2d=True)
        return type("AudioSamples", (), {"data": torch.from_numpy(samples.T), "sample_rate": rate})


FORMS = {
    "path": lambda file: file,
    "bytes": lambda file: file.read_bytes(),
    "open file": lambda file: file.open("rb"),
    "bytes in memory": lambda file: io.BytesIO(file.read_bytes()),
    "row with a path": lambda file: {"path": str(file), "bytes": None},
    "row with bytes": lambda file: {"path": None, "bytes": file.read_bytes()},
    "decoded row": lambda file: {
        "path": None, "array": soundfile.read(file)[0].mean(-1), "sampling_rate": soundfile.info(file).samplerate
    },
    "torchcodec": Decoder,
    "url": lambda file: file.as_uri(),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_every_form_of_a_recording_is_the_same_speech(form, rate, tmp_path, encoder):
    """Two channels, resampled where need be; for the Hub's code and for the package."""
    file = tmp_path / "x.wav"
    soundfile.write(file, torch.stack(waves(rate, rate), 1).numpy(), rate, subtype="FLOAT")
    expected = read_audio(file)
    batch = MRLReDimNetFeatureExtractor()([FORMS[form](file), waves(4_000)[0]], sampling_rate=16_000)
    found = batch["input_values"][0, : batch["attention_mask"][0].sum()]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(encoder.embed([FORMS[form](file)]), encoder.embed([file]), rtol=0, atol=1e-4)


# ---------------------------------------------------------------- a column that torchcodec decodes

DECODED = """
import datasets

rows = datasets.load_dataset("audiofolder", data_dir=recordings[0], split="train")
audio = [row["audio"] for row in rows]
model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
answers = {
    "kinds": [type(each).__mro__[1].__module__.split(".")[0] for each in audio],
    "encoded": model.encode(audio).tolist(),
    "pipeline": [pipeline(model=folder, trust_remote_code=True, device="cpu")(each).tolist() for each in audio],
}
sys.meta_path[:] = [finder.finder if type(finder) is Hiding else finder for finder in sys.meta_path]  # now with ours

from mrl_redimnet import SpeakerEncoder

encoder = SpeakerEncoder.from_pretrained("nano", device="cpu")
answers |= {
    "mapped": rows.map(encoder.embed_batch, batched=True, batch_size=2)["embedding"][:],
    "column": encoder.embed(rows).tolist(),
    "list": encoder.embed(audio).tolist(),
}
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def ffmpeg(tmp_path_factory) -> list[Path]:
    """FFmpeg's libraries in PyAV's wheel, under the names by which torchcodec looks for them, and where they are."""
    av = Path(importlib.util.find_spec("av").origin).parent
    libraries, folder = av.with_name("av.libs"), tmp_path_factory.mktemp("ffmpeg")
    if not libraries.is_dir() or importlib.util.find_spec("torchcodec") is None:
        pytest.skip("PyAV is not from its wheel, whose FFmpeg torchcodec borrows here, or torchcodec is not installed")
    for file in libraries.glob("lib*.so.*"):
        name, version = re.fullmatch(r"(.+)-[0-9a-f]{8}\.so\.(\d+).*", file.name).groups()
        (folder / f"{name}.so.{version}").symlink_to(file)
    return [folder, libraries]


def test_a_column_that_torchcodec_decodes(ffmpeg, folder, encoder, tmp_path):
    """A folder of files as datasets loads it, with real decoders as rows: for the Hub's code and for the package."""
    (tmp_path / "files").mkdir()
    for number, file in enumerate(RECORDINGS):
        shutil.copy(file, tmp_path / "files" / f"{number}.flac")
    printed = run_alone(ALONE + IMPORTS + DECODED, folder, tmp_path / "files", folder=tmp_path, libraries=ffmpeg)
    answers = json.loads(printed.splitlines()[-1])
    assert set(answers.pop("kinds")) == {"torchcodec"} and len(answers) == 5
    for way, found in answers.items():
        np.testing.assert_allclose(np.array(found), encoder.embed(RECORDINGS), **CLOSE, err_msg=way)


@pytest.mark.parametrize(
    "utterance, message",
    [
        (".", r"raw_speech\[0\]: . cannot be opened"),
        ("foo://x.wav", r"raw_speech\[0\]: foo://x.wav cannot be opened \(Protocol not known: foo\)"),
        (b"no audio at all", r"raw_speech\[0\]: libsndfile cannot read its bytes"),
        ({"path": None, "bytes": None}, r"raw_speech\[0\]: a dict without audio"),
        ({"array": [0.0] * 400}, r"raw_speech\[0\]: a dict with `array` needs `sampling_rate`"),
    ],
)
def test_what_is_wrong_with_a_file(utterance, message):
    with pytest.raises(ValueError, match=message):
        MRLReDimNetFeatureExtractor()(utterance)
