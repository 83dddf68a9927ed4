"""The page to try a model on: what it computes, what it says, over HTTP, and in Chromium."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import soundfile
from commands import lists, refusal, run
from demo_visit import missing, visit, write_speech
from gradio_client import Client, handle_file
from hypothesis import given
from hypothesis import strategies as st

from mrl_redimnet import SpeakerEncoder
from mrl_redimnet.adapters.detector import DomainDetector
from mrl_redimnet.audio.domains import make_domain, simulate
from mrl_redimnet.audio.io import SAMPLING_RATE, AudioError
from mrl_redimnet.data.synthetic import synthesise
from mrl_redimnet.demo.listener import AUTO, LONGEST, MOST_FILES, OFF, Listener, flat_map, notes
from mrl_redimnet.demo.page import MOST_SPEAKERS, MOST_TAKES, Session
from mrl_redimnet.recordings import FIRST, OTHER_SPEAKER, SAME_SPEAKER

ROOT = Path(__file__).resolve().parents[1]


def synthetic(speaker: int, seconds: float = 2.5) -> np.ndarray:
    return synthesise(0, speaker, 0, 0, (seconds, seconds)).astype(np.float32)


def write(file: Path, wave: np.ndarray, rate: int = SAMPLING_RATE) -> str:
    soundfile.write(file, wave, rate)
    return str(file)


def plain(html: str) -> str:
    """What is read of HTML."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


@pytest.fixture(scope="module")
def listener() -> Listener:
    return Listener.load("nano")


@pytest.fixture
def session(listener) -> Session:
    return Session(listener)


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    """A detector of telephone speech, saved."""
    domain = make_domain("telephony")
    clean = [synthetic(speaker) for speaker in range(12)]
    heard = {"clean": clean, "telephony": [simulate(domain, wave, str(row)) for row, wave in enumerate(clean)]}
    folder = tmp_path_factory.mktemp("detector") / "detector"
    DomainDetector.train(heard).save(folder)
    return folder


@pytest.fixture
def calls(tmp_path) -> tuple[str, str]:
    """A clean recording of somebody, and one by telephone."""
    wave = synthetic(40)
    by_telephone = simulate(make_domain("telephony"), wave, "call")
    return write(tmp_path / "clean.wav", wave), write(tmp_path / "call.wav", by_telephone)


@pytest.fixture
def adapted(folder, adapters, detector) -> Listener:
    """A small model with two adapters and the detector, without thresholds."""
    return Listener.load(folder, {name: adapters / name for name in ("telephony", "noisy")}, detector=detector)


# ---------------------------------------------------------------- what it computes


def test_decisions_are_those_of_the_encoder_at_every_size(listener):
    first, same, other = map(listener.hear, (FIRST, SAME_SPEAKER, OTHER_SPEAKER))
    encoder = listener.encoder
    assert listener.dims == [16, 32, 64, 128, 192, 256] and listener.choices == [OFF]
    for test, file in ((same, SAME_SPEAKER), (other, OTHER_SPEAKER)):
        for found in listener.verify([first], test):
            (expected,) = encoder.verify([FIRST], [file], found.dim)
            assert found.decision.score == pytest.approx(expected.score, abs=1e-5)
            assert found.decision.llr == pytest.approx(expected.llr, abs=1e-3)
            assert (found.decision.accepted, found.decision.threshold) == (expected.accepted, expected.threshold)
            assert found.probability == pytest.approx(1 / (1 + np.exp(-expected.llr)), abs=1e-3)
            assert found.saved == encoder.thresholds().find(found.dim)


def test_identification_is_that_of_the_encoder(listener):
    first, same, other = map(listener.hear, (FIRST, SAME_SPEAKER, OTHER_SPEAKER))
    found = listener.identify({"berta": [other], "anna": [first, same]}, same, 64)
    (expected,) = listener.encoder.identify(
        {"berta": [OTHER_SPEAKER], "anna": [FIRST, SAME_SPEAKER]}, [SAME_SPEAKER], 64
    )
    assert [each.speaker for each in found] == [each.speaker for each in expected.candidates] == ["anna", "berta"]
    for ours, theirs in zip(found, expected.candidates, strict=True):
        assert ours.decision.score == pytest.approx(theirs.score, abs=1e-5)
        assert (ours.decision.accepted, ours.decision.threshold) == (theirs.accepted, theirs.threshold)


def test_embeddings_of_each_adapter_are_those_of_the_bank(adapted, calls):
    take = adapted.hear(calls[0])
    assert list(take.rows) == [None, "telephony", "noisy"]
    for name, row in take.rows.items():
        adapted.encoder.adapters.set_adapter(name)
        np.testing.assert_allclose(row, adapted.encoder.embed([calls[0]])[0], atol=1e-5)
    assert np.abs(take.rows[None] - take.rows["telephony"]).max() > 1e-3


def test_a_recording_is_drawn_as_it_is(listener):
    take = listener.hear(FIRST)
    wave, _ = soundfile.read(FIRST, dtype="float32")
    low, high = take.envelope
    assert low.min() == wave.min() and high.max() == wave.max() and take.seconds == len(wave) / SAMPLING_RATE
    assert take.mel.shape == (listener.encoder.config.num_mel_bins, 400) and np.isfinite(take.mel).all()


@pytest.mark.parametrize(
    ("change", "rate", "words"),
    [
        (lambda wave: wave, 16_000, None),
        (lambda wave: wave, 48_000, None),
        (lambda wave: wave[: SAMPLING_RATE * 3 // 2], 16_000, "Too short: 0.4 s of speech"),
        (lambda wave: wave / 100, 16_000, "Too quiet: -6"),
        (lambda wave: np.clip(20 * wave, -1, 1), 16_000, "Clipped:"),
        (lambda wave: np.concatenate([wave, 1e-4 * np.resize([1.0, -1.0], 9 * len(wave))]), 16_000, "Mostly silence:"),
        (lambda wave: wave, 8_000, "Sampled at 8,000 Hz: nothing is left above 4 kHz"),
    ],
)
def test_recordings_are_warned_of(change, rate, words):
    wave, _ = soundfile.read(FIRST, dtype="float32")
    found = notes(change(wave).astype(np.float32), rate)
    if words is None:
        assert found == []
    else:
        assert len([note for note in found if note.startswith(words)]) == 1, found


def test_recordings_that_cannot_be_used(listener, tmp_path):
    (tmp_path / "text.wav").write_text("no audio")
    for file, words in (
        (write(tmp_path / "tiny.wav", np.full(20, 0.1)), "tiny.wav is too short: it has 0.00 s"),
        (write(tmp_path / "silent.wav", np.zeros(SAMPLING_RATE)), "silent.wav is silent"),
        (write(tmp_path / "long.wav", np.zeros(round((LONGEST + 1) * 1000)), 1000), "long.wav has 121 s"),
        (tmp_path / "text.wav", "text.wav cannot be read as audio"),
        (tmp_path / "gone.wav", "gone.wav is not there any more: record or choose it again"),
    ):
        with pytest.raises(AudioError, match=words):
            listener.hear(file)


@given(st.integers(2, 20), st.integers(1, 30), st.integers(0, 2**31))
def test_the_map_keeps_distances_where_a_plane_can(count, dim, seed):
    units = np.random.default_rng(seed).standard_normal((count, dim))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    places, share = flat_map(units @ units.T)
    assert places.shape == (count, 2) and np.isfinite(places).all() and 0 <= share <= 1 + 1e-9
    apart = np.linalg.norm(units[:, None] - units[None], axis=2)
    shown = np.linalg.norm(places[:, None] - places[None], axis=2)
    assert (shown <= apart + 1e-6).all()  # a projection brings nothing further apart
    if dim <= 2 or count <= 3:
        np.testing.assert_allclose(shown, apart, atol=1e-6)
        assert share == pytest.approx(1)


def test_the_map_refuses_what_is_no_matrix_of_similarities():
    for shape in ((1, 1), (2, 3)):
        with pytest.raises(ValueError, match="similarities: shape"):
            flat_map(np.ones(shape))


# ---------------------------------------------------------------- adapters


def test_adapters_are_chosen_by_hand_or_by_the_sound(adapted, calls):
    clean, call = map(adapted.hear, calls)
    assert adapted.choices == [OFF, "telephony", "noisy", AUTO]
    assert adapted.choose(OFF, [call]).adapter is None and adapted.choose("noisy", [call]).adapter == "noisy"
    chosen = adapted.choose(AUTO, [call])
    assert chosen.adapter == "telephony"
    assert re.fullmatch(r"call.wav sounds telephony \(\d+ %\): the adapter telephony is used\.", chosen.reason), (
        chosen.reason
    )
    assert adapted.choose(AUTO, [clean]).adapter is None
    both = adapted.choose(AUTO, [clean, call])
    assert both.adapter is None and "they differ, and all must go through the same" in both.reason
    with pytest.raises(ValueError, match="adapter: got 'other', expected one of off, telephony, noisy, automatic"):
        adapted.choose("other", [clean])


def test_without_thresholds_there_are_scores_alone(adapted, calls):
    session = Session(adapted)
    told, lost, _, _ = session.verify(*calls, str(adapted.dims[0]), "telephony")
    assert "No decision: the score stands alone." in plain(told) and "not known: no calibration is saved" in plain(told)
    assert lost.count("<tr>") + lost.count("<tr ") == 1 + len(adapted.dims)
    assert "not known here" in session.points("telephony")


def test_thresholds_of_the_model_are_not_taken_for_an_adapters(folder, adapters, tmp_path, calls):
    from mrl_redimnet.fingerprints import fingerprint
    from mrl_redimnet.scoring.calibration import Threshold, Thresholds

    scores = np.linspace(-1, 1, 400)
    labels = (scores + np.sin(40 * scores) > 0).astype(int)
    weights = SpeakerEncoder.from_pretrained(folder).weights(None)
    assert weights == fingerprint(SpeakerEncoder.from_pretrained(folder).model.base_model)
    saved = Thresholds()
    saved.put(Threshold.fit(scores, labels, wanted=0.2, dim=8, weights=weights, trials="all"))
    (tmp_path / "saved").mkdir()
    saved.save(tmp_path / "saved")
    listener = Listener.load(folder, {"telephony": adapters / "telephony"}, thresholds=tmp_path / "saved")
    first, second = map(listener.hear, calls)
    assert listener.dims == [8]
    assert listener.verify([first], second)[0].decision.accepted is not None
    (found,) = listener.verify([first], second, "telephony")
    assert found.decision.accepted is None and "no threshold is saved for the adapter telephony" in found.rule


def test_a_listener_refuses_what_does_not_fit_together(folder, adapters, detector):
    with pytest.raises(ValueError, match="detector: it chooses among adapters, and none is loaded"):
        Listener.load(folder, detector=detector)
    with pytest.raises(ValueError, match="'off' has a meaning on the page"):
        Listener.load(folder, {OFF: adapters / "noisy"})


# ---------------------------------------------------------------- what the page says


def test_verification_is_told_with_its_warnings(session, tmp_path):
    told, lost, pictures, heard = session.verify(str(FIRST), None, "256", OFF)
    assert "Record or choose the second recording." in plain(told) and lost == "" and pictures.count("<img") == 1
    told, lost, pictures, heard = session.verify(str(FIRST), str(SAME_SPEAKER), "256", OFF, heard)
    (decision,) = session.listener.encoder.verify([FIRST], [SAME_SPEAKER])
    of = f"Score (cosine) {decision.score:.3f} Accepted from {decision.threshold:.3f}"
    assert plain(told).startswith(f"Accepted: one speaker in both recordings. {of}")
    assert (
        f"{100 / (1 + np.exp(-decision.llr)):.1f} %" in told and "Take care" not in told and pictures.count("<img") == 2
    )
    assert '<tr aria-current="true" class="mrl-chosen"><th scope="row">256</th>' in lost
    smaller, *_, again = session.verify(str(FIRST), str(SAME_SPEAKER), "16", OFF, heard)
    assert plain(smaller).startswith("Rejected: two different speakers.")
    assert all(again[path] is heard[path] for path in heard)  # no embedding is computed for another size
    quiet = write(tmp_path / "quiet.wav", 0.003 * synthetic(1, 1.5))
    told, *_, after = session.verify(str(FIRST), quiet, "256", OFF, heard)
    assert "Take care:" in told and "quiet.wav: Too short" in told and "quiet.wav: Too quiet" in told
    assert set(after) == {str(FIRST), quiet}  # what was given before is forgotten


def test_names_of_files_and_speakers_are_no_html(session, tmp_path):
    bad = "<img src=x onerror=alert(1)>"
    file = write(tmp_path / f"{bad}.wav", synthetic(1))
    told, _, pictures, _ = session.verify(file, file, "64", OFF)
    who, done, speakers = session.enrol(bad, file)
    identified = session.identify(file, "64", OFF, speakers)
    compared = session.compare([file, str(FIRST)], "64", OFF)[:2]
    (tmp_path / f"{bad}.txt").write_text("no audio")
    refused = session.verify(str(tmp_path / f"{bad}.txt"), None, "64", OFF)[0]
    for html in (told, pictures, who, done, *identified, *compared, refused):
        assert "onerror" in html and "<img src=x" not in html


def test_speakers_are_enrolled_identified_and_forgotten(session):
    assert "Enrol somebody" in session.identify(str(FIRST), "256", OFF, {})[0]
    _, done, speakers = session.enrol(" anna ", str(FIRST))
    assert "anna is enrolled with 1 recording." in done
    who, done, speakers = session.enrol("anna", str(SAME_SPEAKER), speakers)
    assert "anna is enrolled with 2 recordings, which are averaged." in done
    who, _, speakers = session.enrol("berta", str(OTHER_SPEAKER), speakers)
    assert "anna 2 8.6 s berta 1 4.5 s" in plain(who)
    told, nearest = session.identify(str(SAME_SPEAKER), "128", OFF, speakers)
    assert plain(told).startswith("Accepted: this is anna.") and plain(nearest).index("anna") < plain(nearest).index(
        "berta"
    )
    told, _ = session.identify(str(OTHER_SPEAKER), "128", OFF, {"anna": speakers["anna"]})
    assert plain(told).startswith("Rejected: nobody who is enrolled.")
    assert session.forget()[2] == {}


def test_enrolments_have_bounds_and_lose_nothing(session):
    _, done, speakers = session.enrol("anna", str(FIRST))
    take = speakers["anna"][0]
    for name, file, before, words in (
        ("", str(FIRST), speakers, "A name and a recording are needed"),
        ("anna", None, speakers, "A name and a recording are needed"),
        ("anna", str(FIRST), {"anna": [take] * MOST_TAKES}, f"anna has {MOST_TAKES} recordings"),
        ("new", str(FIRST), {str(i): [take] for i in range(MOST_SPEAKERS)}, f"{MOST_SPEAKERS} speakers are enrolled"),
    ):
        who, done, after = session.enrol(name, file, before)
        assert words in plain(done) and after == before


def test_many_recordings_are_compared(session):
    files = [str(FIRST), str(SAME_SPEAKER), str(OTHER_SPEAKER)]
    table, plane, heard = session.compare(files, "256", OFF)
    assert table.count("0.75 ✓") == 2 and table.count("<strong>") == 2 and "0.22" in table
    assert plane.count("<circle") == 3 and plane.count("<line") == 1
    smaller, plane, again = session.compare(files, "16", OFF, heard)
    assert "✓</strong>" not in smaller and "<line" not in plane
    assert all(again[path] is heard[path] for path in files)
    assert "Choose two to 20" in session.compare(files[:1], "16", OFF)[0]
    assert f"{MOST_FILES + 1} files were given" in session.compare(list(map(str, range(MOST_FILES + 1))), "16", OFF)[0]


def test_recordings_are_compared_by_thresholds_that_know_their_durations(folder, longer_speech, tmp_path):
    assert run("calibrate", folder, *lists(longer_speech), "--false-accept", 0.2, "--durations", "--dims", 16) == 0
    listener = Listener.load(folder)
    files = sorted((longer_speech / "wav").rglob("*.wav"))[:9]
    takes = [listener.hear(file) for file in files]
    found = listener.thresholds(takes, 16)
    assert np.array_equal(found, found.T) and len(np.unique(found)) > 20
    similarities = listener.similarities(takes, 16)
    for row, take in enumerate(takes[1:], start=1):
        (verdict,) = listener.verify([takes[0]], take)
        assert verdict.decision.accepted == (similarities[0, row] >= found[0, row])
        assert verdict.decision.threshold == pytest.approx(found[0, row])
    table, plane, _ = Session(listener).compare(files, "16", OFF)
    accepted = np.triu(similarities >= found, k=1)
    assert 0 < accepted.sum() < 36 and table.count(" ✓</strong>") == 2 * accepted.sum()
    assert plane.count("<line") == accepted.sum() and "by their durations, on" in table


def test_what_is_asked_for_wrongly_is_told(session):
    assert "size: got 48, expected one of 16, 32" in session.verify(str(FIRST), str(FIRST), "48", OFF)[0]
    assert "adapter: got 'x', expected one of off." in plain(session.verify(str(FIRST), str(FIRST), "16", "x")[0])


def test_error_rates_are_the_saved_ones(session, listener):
    said = plain(session.points(OFF))
    for entry in listener.operating_points():
        unit = " (LLR)" if entry.calibration.uses_seconds else ""
        assert (
            f"{entry.dim} {entry.threshold:.3f}{unit} {100 * entry.false_accepts:.2f} % {100 * entry.misses:.1f} %"
            in said
        )
    of = listener.operating_points()[0]
    assert len(listener.operating_points()) == 6
    assert f"{of.targets:,} of one speaker, {of.impostors:,} of two" in said


def test_the_command_refuses_before_it_loads(capsys, tmp_path):
    assert "nanno is not a folder" in refusal(capsys, "demo", "nanno")
    assert "is not NAME=SOURCE" in refusal(capsys, "demo", "--adapter", "me/telephony")
    assert "no folder" in refusal(capsys, "demo", "--detector", tmp_path / "nowhere")


# ---------------------------------------------------------------- the page that runs


@contextmanager
def running(*command: object, folder: Path, **environment: str) -> Iterator[str]:
    """The address of a page of its own process, whose temporary files are in `folder` and gone when it has ended."""
    env = {**os.environ, "TMPDIR": str(folder), "HF_HUB_OFFLINE": "1", **environment}
    with subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    ) as process:
        said = []
        try:
            for line in process.stdout:
                said.append(line)
                if found := re.search(r"The page is at (\S+) until", line):
                    break
            else:
                pytest.fail("".join(said))
            yield found[1]
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
    assert [file for file in folder.rglob("*") if file.is_file()] == []


@pytest.mark.slow
def test_the_command_answers_and_leaves_no_recording(folder, adapters, detector, calls, tmp_path):
    kept = tmp_path / "temporary"
    kept.mkdir()
    options = [option for name in ("telephony", "noisy") for option in ("--adapter", f"{name}={adapters / name}")]
    command = ("-m", "mrl_redimnet_cli", "demo", folder, *options, "--detector", detector)
    with running(*command, folder=kept) as address:
        assert address.startswith("http://127.0.0.1:")
        client = Client(address, verbose=False)
        clean, call = map(handle_file, calls)
        told, lost, pictures = client.predict(clean, call, "32", AUTO, api_name="/verify")
        assert "call.wav sounds telephony" in told and "<table" in lost and pictures.count("<img") == 2
        expected = Listener.load(folder, {"telephony": adapters / "telephony"})
        score = expected.verify([expected.hear(calls[0])], expected.hear(calls[1]), "telephony")[-1].decision.score
        assert f"Score (cosine) {score:.3f}" in plain(told)
        assert "is enrolled with 1 recording" in client.predict("anna", clean, api_name="/enrol")[1]
        assert "anna is the nearest" in client.predict(call, "32", OFF, api_name="/identify")[0]
        other = Client(address, verbose=False)  # a page of somebody else
        assert "Enrol somebody" in other.predict(call, "32", OFF, api_name="/identify")[0]
        assert "<svg" in client.predict([clean, call], "8", "noisy", api_name="/compare")[1]
        (private,) = kept.glob("mrl-redimnet-demo-*")
        assert private.stat().st_mode & 0o077 == 0 and list(private.rglob("call.wav"))


@pytest.mark.slow
def test_the_space_is_the_same_page(tmp_path):
    kept = tmp_path / "temporary"
    kept.mkdir()
    with running(ROOT / "spaces" / "app.py", folder=kept, MODEL="nano", GRADIO_SERVER_NAME="0.0.0.0") as address:
        client = Client(address.replace("0.0.0.0", "127.0.0.1"), verbose=False)
        told, *_ = client.predict(handle_file(FIRST), handle_file(OTHER_SPEAKER), "256", OFF, api_name="/verify")
        assert plain(told).startswith("Rejected: two different speakers.")


@pytest.mark.slow
def test_the_page_in_chromium(tmp_path):
    if problem := missing():
        pytest.skip(problem)
    kept, speech = tmp_path / "temporary", tmp_path / "speech"
    kept.mkdir()
    speech.mkdir()
    write_speech(speech)
    with running("-m", "mrl_redimnet_cli", "demo", folder=kept) as address:
        seen = visit(address, speech)
    assert seen["elsewhere"] == [] and seen["errors"] == [] and seen["requests"] > 50
    assert seen["empty"] == "Record or choose two recordings." and seen["live"] == "polite"
    assert seen["accepted"].startswith("Accepted: one speaker") and "0.749" in seen["accepted"]
    assert len(seen["sizes"]) == len(seen["rates"]) == 6 and len(seen["pictures"]) == 2 and all(seen["pictures"])
    # The arrow keys move the slider, which keeps the focus and says its value.
    assert seen["smallest"].startswith("Rejected") and seen["slider"] == "16 of 256 numbers"
    assert (seen["chosen"], seen["focus"]) == ("16", "range")
    assert seen["rejected"].startswith("Rejected") and "Too short" in seen["warning"] and "silent" in seen["refused"]
    assert re.search(r"\d\.\d s, \d\d,000 Hz|\d\.\d s, 44,100 Hz", seen["recorded"]), seen["recorded"]
    assert seen["identified"].startswith("Accepted: this is Anna.") and seen["nearest"] == ["Anna", "Berta"]
    assert len(seen["matrix"]) == 6 and seen["map"].startswith("Map of 6 recordings")
    assert seen["width"] <= 375 and seen["outside"] == [] and seen["narrowest"] > 150
