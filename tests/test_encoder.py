"""`SpeakerEncoder`: one speech in every form, decisions as the commands print them, adapters, and what is refused."""

import re
import shutil
import warnings
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from commands import lists, run
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st

from modeling_mrl_redimnet import MRLReDimNetForXVector
from mrl_redimnet import SpeakerEncoder
from mrl_redimnet.adapters import AdapterBank, fingerprint
from mrl_redimnet.adapters.facts import adapter_digest
from mrl_redimnet.audio import io
from mrl_redimnet.audio.io import SAMPLING_RATE, AudioError, AudioWarning, Encoded
from mrl_redimnet.audio.scan import speakers_files
from mrl_redimnet.audio.waveforms import READ_AHEAD, length_batches
from mrl_redimnet.saving import load_model
from mrl_redimnet.scoring.calibration import Thresholds
from mrl_redimnet.scoring.decisions import ENROL_SECONDS, TEST_SECONDS, short_speech
from mrl_redimnet.scoring.scorers import make_scorer


@pytest.fixture
def files(speech) -> list[Path]:
    """Three of id0 and one of id7."""
    return [speech / "wav" / name for name in ("id0/0.wav", "id0/1.wav", "id0/2.wav", "id7/0.wav")]


@pytest.fixture
def encoder(folder) -> SpeakerEncoder:
    return SpeakerEncoder.from_pretrained(folder)


def audio(file: Path) -> np.ndarray:
    return soundfile.read(file, dtype="float32")[0]


# ---------------------------------------------------------------- inputs


def test_all_forms_of_the_same_speech_have_the_same_embeddings(encoder, files):
    embeddings = encoder.embed(files)
    assert embeddings.shape == (4, 32) and embeddings.dtype == np.float32
    table = datasets.Dataset.from_dict({"clip": [str(file) for file in files], "number": range(4)})
    table = table.cast_column("clip", datasets.Audio())
    held = [{"bytes": file.read_bytes(), "path": None if row else file.name} for row, file in enumerate(files)]
    held = datasets.Dataset.from_dict({"clip": held}).cast_column("clip", datasets.Audio())
    forms = {
        "paths as text": [str(file) for file in files],
        "arrays": [audio(file) for file in files],
        "tensors": [torch.from_numpy(audio(file)).double()[None] for file in files],
        "pairs": [(audio(file), SAMPLING_RATE) for file in files],
        "16 bits": [soundfile.read(file, dtype="int16")[0] for file in files],
        "encoded": [Encoded(file.name, file.read_bytes()) for file in files],
        "mixed": [files[0], audio(files[1]), (audio(files[2]), SAMPLING_RATE), str(files[3])],
        "data set of paths": table,
        "column of it": table["clip"],
        "data set of bytes": held,
        "generator's list": tuple(files),
    }
    for name, form in forms.items():
        assert np.allclose(encoder.embed(form), embeddings, atol=1e-4), name
    assert np.array_equal(encoder.embed(files, dim=8), embeddings[:, :8])


@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_an_array_at_another_rate_is_resampled_as_its_file_is(encoder, tmp_path, rate):
    wave = (0.1 * np.random.default_rng(0).standard_normal(rate)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", wave, rate, subtype="FLOAT")
    by_file, by_array = encoder.embed([tmp_path / "a.wav", (wave, rate)])
    assert np.allclose(by_file, by_array, atol=1e-5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((2, 9000), np.float32), r"row 1: shape \(2, 9000\), expected mono"),
        (np.zeros(100, np.float32), "row 1: 100 samples"),
        (np.full(9000, np.nan, np.float32), "row 1: 9000 of 9000 samples are NaN"),
        ((np.zeros(9000, np.float32), 16_000.5), "row 1: its sampling rate is 16000.5, expected a whole number"),
        ((np.zeros(9000, np.float32), 0), "row 1: its sampling rate is 0"),
        (7, "row 1: int is no audio. Give the path of a file"),
        (None, "row 1: NoneType is no audio"),
        ("nowhere.wav", "nowhere.wav is not there"),
        (Encoded("some.wav", b"RIFF, once"), "some.wav cannot be read as audio"),
    ],
)
def test_what_cannot_be_embedded_is_named(encoder, files, bad, message):
    with pytest.raises(AudioError, match=message):
        encoder.embed([files[0], bad])
    found = encoder.embed_all([files[0], bad, files[1]])
    assert list(found.problems) == [1] and re.match(message, found.problems[1])
    assert np.isnan(found.embeddings[1]).all() and np.isnan(found.seconds[1])
    assert np.isfinite(found.embeddings[[0, 2]]).all()
    with pytest.warns(AudioWarning, match="cohort: 1 of 3 files cannot be used: .*The others are used"):
        assert found.usable("cohort").shape == (2, 32)
    with pytest.raises(AudioError, match="cohort: 1 of 1 files cannot be used"):
        encoder.embed_all([bad]).usable("cohort")


def test_a_bad_row_of_a_data_set_is_named(encoder, files):
    values = [{"bytes": files[0].read_bytes(), "path": "a.wav"}, {"bytes": b"no audio", "path": "b.wav"}, None]
    table = datasets.Dataset.from_dict({"audio": values}).cast_column("audio", datasets.Audio())
    problems = encoder.embed_all(table).problems
    assert list(problems) == [1, 2]
    assert problems[1].startswith("row 1, b.wav cannot be read as audio") and problems[2].startswith("row 2, audio is")


def test_inputs_that_are_no_list_of_utterances_are_refused(encoder, files):
    for one in (str(files[0]), files[0], audio(files[0]), Encoded("a.wav", b"")):
        with pytest.raises(ValueError, match="expected a list of utterances"):
            encoder.embed(one)
    table = datasets.Dataset.from_dict({"number": [1]})
    with pytest.raises(ValueError, match=r"0 audio columns \(none\), expected one"):
        encoder.embed(table)
    with pytest.raises(ValueError, match="the column number holds no audio"):
        encoder.embed(table["number"])
    with pytest.raises(ValueError, match="IterableDataset cannot be embedded at once"):
        encoder.embed(table.to_iterable_dataset())
    for dim in (0, 33):
        with pytest.raises(ValueError, match=f"\\[{dim}\\] are not between 1 and the embedding's 32"):
            encoder.embed(files, dim=dim)


def test_every_file_is_opened_and_decoded_once(encoder, files, monkeypatch):
    opened, real = Counter(), io.sf.SoundFile

    def count(file, *arguments, **options):
        opened[Path(file.decode()).name if isinstance(file, bytes) else "bytes"] += 1
        return real(file, *arguments, **options)

    monkeypatch.setattr(io.sf, "SoundFile", count)
    other = files[3].with_name("9.wav")
    shutil.copy(files[3], other)
    try:
        found = encoder.embed_all([files[0], str(files[0]), other, files[1]])
        assert opened == {"0.wav": 1, "1.wav": 1, "9.wav": 1}
        assert np.array_equal(found.embeddings[0], found.embeddings[1])
        seconds = [soundfile.info(file).duration for file in (files[0], files[0], other, files[1])]
        assert found.seconds == pytest.approx(seconds)
        opened.clear()
        encoder.verify(files[:2], [files[0], other], threshold=0.5)
        assert opened == {"0.wav": 1, "1.wav": 1, "9.wav": 1}
    finally:
        other.unlink()


@given(
    lengths=st.lists(st.integers(1, 4000), max_size=60),
    batch=st.integers(500, 8000),
)
def test_batches_hold_each_waveform_once_within_their_size_and_memory_is_bounded(lengths, batch):
    ahead, given_out = [0], [0]

    def waveforms():
        for row, length in enumerate(lengths):
            ahead[0] += length
            assert ahead[0] - given_out[0] <= READ_AHEAD * batch + max(lengths)
            yield row, np.zeros(length, np.float32)

    rows = []
    for each in length_batches(waveforms(), batch / SAMPLING_RATE):
        sizes = [len(wave) for wave in each.values()]
        assert len(each) == 1 or max(sizes) * len(sizes) <= batch
        assert sizes == sorted(sizes, reverse=True) and [lengths[row] for row in each] == sizes
        rows += each
        given_out[0] += sum(sizes)
    assert sorted(rows) == list(range(len(lengths)))


# ---------------------------------------------------------------- scores and decisions


def test_similarity_is_the_cosine_of_prefixes(encoder, files):
    a, b = encoder.embed(files), encoder.embed(files[:2])
    for dim in (None, 8):
        x, y = (each[:, :dim].astype(float) for each in (a, b))
        expected = (x @ y.T) / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(y, axis=1)
        assert np.allclose(encoder.similarity(a, b, dim), expected)
    with pytest.raises(ValueError, match=r"got shapes \(4, 32\) and \(32,\)"):
        encoder.similarity(a, b[0])
    with pytest.raises(ValueError, match="dim must be from 1 to the embeddings' 32 numbers, got 33"):
        encoder.similarity(a, b, 33)


def test_verify_decides_as_the_command_prints(folder, files, speech, capsys):
    assert run("calibrate", folder, *lists(speech), "--false-accept", 0.1) == 0
    capsys.readouterr()
    assert run("verify", folder, *files[:2], "--test", *files, "--dim", 16) == 1
    heading, *lines = capsys.readouterr().out.splitlines()
    encoder = SpeakerEncoder.from_pretrained(folder)
    decisions = encoder.verify(files[:2], files, 16)
    assert {each.accepted for each in decisions} == {True, False}
    for line, each in zip(lines, decisions, strict=True):
        told = "accepted" if each.accepted else "rejected"
        assert line.startswith(f"{told:<10} score {each.score:.4f}  LLR {each.llr:+.2f}")
        assert f"accepted from a score of {each.threshold:.4f} on" in heading
        assert each.accepted == (each.score >= each.threshold)
    again = encoder.verify([audio(files[0]), files[1]], [audio(file) for file in files], 16)
    assert [each.score for each in again] == pytest.approx([each.score for each in decisions], abs=1e-5)
    assert [each.accepted for each in again] == [each.accepted for each in decisions]


def test_a_threshold_that_knows_durations_is_told_as_the_score_it_is_here(folder, longer_speech):
    """Each comparison has its own; an LLR of the saved threshold is reached there."""
    assert run("calibrate", folder, *lists(longer_speech), "--false-accept", 0.2, "--durations", "--dims", 16) == 0
    encoder, files = SpeakerEncoder.from_pretrained(folder), sorted((longer_speech / "wav").rglob("*.wav"))
    saved = encoder.thresholds().find(16)
    assert saved.calibration.steeper != 0
    decisions = encoder.verify(files[:1], files[1:], 16)
    seconds = [[soundfile.info(files[0]).duration, soundfile.info(file).duration] for file in files[1:]]
    thresholds = [each.threshold for each in decisions]
    assert saved.calibration(thresholds, seconds) == pytest.approx(saved.threshold) and len(set(thresholds)) > 10
    accepted, llrs = saved.judge([each.score for each in decisions], seconds)
    assert [each.accepted for each in decisions] == accepted.tolist() and len(set(accepted.tolist())) == 2
    assert [each.llr for each in decisions] == pytest.approx(llrs)


def test_identify_names_as_the_command_prints(folder, files, speech, capsys):
    test = [speech / "wav" / f"id{number}" / "3.wav" for number in (0, 3)]
    assert run("calibrate", folder, *lists(speech), "--false-accept", 0.3) == 0
    capsys.readouterr()
    assert run("identify", folder, "--enrolled", speech / "wav", "--test", *test) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    encoder = SpeakerEncoder.from_pretrained(folder)
    found = encoder.identify(speakers_files(speech / "wav"), test)
    assert "8 enrolled speakers" in heading
    for line, path, each in zip(lines, test, found, strict=True):
        ranked = ", ".join(f"{one.speaker} {one.score:.4f}" for one in each.candidates)
        assert line == f"{each.speaker or 'unknown'}\t{path}\t{ranked}"
        scores = [one.score for one in each.candidates]
        assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    assert [each.candidates[0].speaker for each in encoder.identify({"a": test[:1], "b": test[1:]}, test)] == ["a", "b"]


def test_a_threshold_by_hand_and_none_at_all(encoder, files):
    (decision,) = encoder.verify(files[:1], [files[3]], threshold=-1)
    assert (decision.accepted, decision.threshold, decision.llr) == (True, -1, None)
    (decision,) = encoder.verify(files[:1], [files[3]])
    assert (decision.accepted, decision.threshold, decision.llr) == (None, None, None)
    (unknown,) = encoder.identify({"a": files[:1]}, [files[3]], threshold=1.5)
    assert unknown.speaker is None and unknown.candidates[0].speaker == "a"
    (undecided,) = encoder.identify({"a": files[:1]}, [files[3]])
    assert undecided.accepted is None and undecided.speaker == "a"


@pytest.mark.parametrize("name", ["centred", "as_norm", "centred_as_norm"])
def test_verify_scores_with_a_cohort(encoder, files, speech, name):
    scorer = encoder.scorer(name, speech / "wav", top=5)
    assert scorer.cohort.shape == (32, 32)
    (decision,) = encoder.verify(files[:1], [files[1]], scorer=scorer, threshold=0.0)
    one, other = (scorer.units(encoder.embed([file]), 32) for file in files[:2])
    (expected,) = scorer.compare(one, other, (np.array([0]), np.array([0])))
    assert decision.score == pytest.approx(expected, abs=1e-4)
    other = make_scorer("centred", np.eye(7))
    with pytest.raises(ValueError, match="the cohort has embeddings of 7 numbers, the trials of 32"):
        encoder.verify(files[:1], [files[1]], scorer=other, threshold=0.0)


def test_silence_and_nobody_are_refused(encoder, files):
    silent = np.zeros(9000, np.float32)
    with pytest.raises(AudioError, match="test utterance 0 is silent"):
        encoder.verify(files[:1], [silent])
    with pytest.raises(AudioError, match="1 of 2 files cannot be used: a, utterance 0 is silent"):
        encoder.identify({"a": [silent]}, files[:1])
    with pytest.raises(ValueError, match="enrol: got no utterance"):
        encoder.verify([], files)
    for enrolled in ({}, {"a": []}):
        with pytest.raises(ValueError, match="at least one speaker, and at least one utterance of each"):
            encoder.identify(enrolled, files)


def talk(seed: int, seconds: float) -> np.ndarray:
    """Noise, all of which counts as speech."""
    return 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * SAMPLING_RATE)).astype(np.float32)


def told(call) -> list[str]:
    """The AudioWarnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in caught if issubclass(each.category, AudioWarning)]


def test_too_little_speech_is_told_of_each_side_in_a_sentence(encoder):
    long, short = talk(0, 5), talk(1, 0.5)
    with_pauses = np.concatenate([short, np.zeros(5 * SAMPLING_RATE, np.float32)])
    assert told(lambda: encoder.verify([long], [long, talk(2, TEST_SECONDS)], threshold=0.5)) == []
    assert told(lambda: encoder.verify([talk(seed, ENROL_SECONDS / 2) for seed in (3, 4)], [long], threshold=0.5)) == []
    for enrolled in (short, with_pauses):
        (sentence,) = told(lambda enrolled=enrolled: encoder.verify([enrolled], [long], threshold=0.5))
        assert sentence.startswith(f"the enrolment has 0.5 s of speech: below {ENROL_SECONDS:g} s")
    both = told(lambda: encoder.verify([short], [long, talk(2, 0.75), short], threshold=0.5))
    assert len(both) == 2
    assert "2 of 3 test utterances have too little speech, test utterance 2 the least with 0.5 s" in both[1]
    named = told(lambda: encoder.identify({"anna": [long], "bert": [short]}, [long], threshold=0.5))
    assert len(named) == 1 and "1 of 2 enrolments have too little speech, bert the least" in named[0]


@given(st.lists(st.floats(0, 10), min_size=1, max_size=6), st.floats(0.1, 9))
def test_a_sentence_on_short_speech_counts_what_is_below_the_limit(seconds, least):
    found = short_speech("test utterances", [(f"file{row}", each) for row, each in enumerate(seconds)], least)
    short = [each for each in seconds if each < least]
    assert len(found) == bool(short)
    if short:
        assert f"file{seconds.index(min(short))}" in found[0] and f"{min(short):.1f} s" in found[0]
        assert found[0].startswith(f"{len(short)} of {len(seconds)} ") or len(seconds) == 1


# ---------------------------------------------------------------- what it is


def test_a_model_in_memory_is_left_as_it_is(files):
    model = tiny_model(kind=MRLReDimNetForXVector).train()
    encoder = SpeakerEncoder(model, "mine")
    embeddings = encoder.embed(files)
    assert model.training and encoder.model is model and encoder.name == "mine" and encoder.thresholds() is None
    assert np.array_equal(embeddings, SpeakerEncoder(model.eval()).embed(files))
    assert encoder.dims() == [8, 16, 32] and encoder.dims([16, 3]) == [3, 16] and encoder.dim() == 32
    assert encoder.commit is None and encoder.adapter is None


def test_the_device_is_where_the_model_goes(folder, files):
    encoder = SpeakerEncoder.from_pretrained(folder, device="cpu")
    assert encoder.device == torch.device("cpu") and encoder.embed(files[:1]).shape == (1, 32)
    assert SpeakerEncoder.from_pretrained(folder, device="meta").device == torch.device("meta")


def test_adapters_are_swapped_in_memory(folder, files, adapters, speech):
    encoder = SpeakerEncoder.from_pretrained(folder)
    plain, base = encoder.embed(files), encoder.fingerprint
    for name in ("telephony", "noisy"):
        encoder.adapters.add(name, adapters / name)
    assert np.allclose(encoder.embed(files), plain, atol=1e-6) and encoder.fingerprint == base
    for name in ("telephony", "noisy"):
        encoder.adapters.set_adapter(name)
        merged = SpeakerEncoder.from_pretrained(folder, adapters / name)
        embeddings = encoder.embed(files)
        assert np.allclose(embeddings, merged.embed(files), atol=1e-4) and not np.allclose(embeddings, plain, atol=1e-2)
        assert encoder.adapter == merged.adapter == name
        assert encoder.fingerprint == merged.fingerprint == f"{base}+{adapter_digest(adapters / name)}"
    encoder.adapters.combine("both", {"telephony": 0.5, "noisy": 0.5}, "cat")
    encoder.adapters.set_adapter("both")
    assert encoder.fingerprint == f"{base}+unsaved" and encoder.adapter == "telephony+noisy"
    encoder.adapters.disable()
    assert np.allclose(encoder.embed(files), plain, atol=1e-6) and encoder.adapter is None
    assert isinstance(encoder.adapters, AdapterBank) and encoder.adapters.names == ["telephony", "noisy", "both"]
    with pytest.raises(ValueError, match="model has the adapter noisy merged into its weights"):
        _ = merged.adapters


def test_thresholds_of_an_adapter_are_found_for_the_one_in_use(folder, files, adapters, speech):
    more = ["--false-accept", 0.1, "--dims", 16, "--adapter", adapters / "telephony"]
    assert run("calibrate", folder, *lists(speech), *more) == 0
    encoder = SpeakerEncoder.from_pretrained(folder)
    encoder.adapters.add("phone", adapters / "telephony")
    with pytest.raises(ValueError, match="no threshold for 16 dims, no adapter, cosine"):
        encoder.verify(files[:1], files[1:], 16)
    encoder.adapters.set_adapter("phone")
    (decision,) = encoder.verify(files[:1], files[1:2], 16)
    assert decision.threshold == Thresholds.load(folder).find(16, "telephony").threshold


def test_a_fingerprint_tells_bases_and_adapters_apart(folder, adapters, tmp_path):
    one = SpeakerEncoder.from_pretrained(folder).fingerprint
    names = [one, *(SpeakerEncoder.from_pretrained(folder, adapters / n).fingerprint for n in ("noisy", "telephony"))]
    assert len(set(names)) == 3 and all(name.startswith(one) for name in names)
    encoder = SpeakerEncoder(load_model(folder))
    assert encoder.fingerprint == one == fingerprint(encoder.model)
    next(encoder.model.redimnet.parameters()).data.add_(1.0)
    assert encoder.fingerprint != one  # training goes on
    with pytest.raises(FileNotFoundError, match="no adapter_model.safetensors in .*: not an adapter's folder"):
        SpeakerEncoder.from_pretrained(folder, tmp_path)


def test_a_revision_of_the_hub_is_loaded(hub, folder):
    assert run("push", folder, "anna/base", "--tag", "v1") == 0
    encoder = SpeakerEncoder.from_pretrained("anna/base", revision="v1")
    assert encoder.name == "anna/base" and encoder.commit == hub.repositories["anna/base"].resolve("v1")
    assert encoder.fingerprint == SpeakerEncoder.from_pretrained(folder).fingerprint
    with pytest.raises(OSError, match="v2"):
        SpeakerEncoder.from_pretrained("anna/base", revision="v2")
