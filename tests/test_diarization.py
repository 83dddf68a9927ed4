"""Who spoke when: turns and their files, clusters, the pipeline, names, simulated conversations, the command."""

import json

import numpy as np
import pytest
import soundfile
from commands import refusal, run
from conftest import at_most
from hypothesis import given
from hypothesis import strategies as st

from mrl_redimnet import SpeakerEncoder
from mrl_redimnet.audio.domains import make_domain
from mrl_redimnet.audio.io import AudioError, read_audio
from mrl_redimnet.diarization import activity, clustering, pipeline
from mrl_redimnet.diarization.clustering import clustered
from mrl_redimnet.diarization.conversations import MEETINGS, Statistics, simulate_conversation
from mrl_redimnet.diarization.naming import Roll
from mrl_redimnet.diarization.pipeline import Diarization, Diarizer
from mrl_redimnet.diarization.turns import Turn, joined, read_rttm, rttm_name, rttm_text
from mrl_redimnet.recordings import FIRST, OTHER_SPEAKER, SAME_SPEAKER

RATE = 16_000
TURNS = st.lists(
    st.builds(
        lambda start, length, speaker: Turn(start / 100, (start + length) / 100, speaker),
        st.integers(0, 2_000),
        st.integers(1, 500),
        st.sampled_from("abc"),
    ),
    max_size=12,
)


@pytest.fixture(scope="module")
def nano():
    return SpeakerEncoder.from_pretrained("nano", device="cpu")


@pytest.fixture(scope="module")
def dialogue(tmp_path_factory):
    """Two women in turns with silence around them: the file, and who speaks when."""
    parts, turns, end = [np.zeros(RATE)], [], 1.0
    for name, file in (("a", FIRST), ("b", OTHER_SPEAKER), ("a", SAME_SPEAKER)):
        wave = read_audio(file)
        turns.append(Turn(end, end + len(wave) / RATE, name))
        parts += [wave, np.zeros(RATE)]
        end = turns[-1].end + 1
    path = tmp_path_factory.mktemp("dialogue") / "dialogue.wav"
    soundfile.write(path, np.concatenate(parts), RATE)
    return path, turns


def talking(turns, speaker=None, seconds=40):
    """Whether somebody, or a speaker, speaks in each hundredth of a second."""
    frames = np.zeros(seconds * 100, dtype=bool)
    for turn in turns:
        if speaker in (None, turn.speaker):
            frames[round(turn.start * 100) : round(turn.end * 100)] = True
    return frames


# ---------------------------------------------------------------- turns


@given(TURNS, st.sampled_from([0.0, 0.1, 0.5]))
def test_joined_turns_say_the_same_and_lie_apart(turns, pause):
    found = joined(turns, pause)
    assert found == sorted(found)
    for speaker in "abc":
        own = [turn for turn in found if turn.speaker == speaker]
        assert all(after.start - before.end > pause for before, after in zip(own, own[1:], strict=False))
        before, after = talking(turns, speaker), talking(found, speaker)
        assert (after | ~before).all() and (pause or (after == before).all())


@given(TURNS)
def test_rttm_is_read_as_it_was_written(tmp_path_factory, turns):
    file = tmp_path_factory.mktemp("rttm") / "all.rttm"
    file.write_text(";; a remark\nSPKR-INFO x 1 <NA> <NA> <NA> unknown a <NA>\n" + rttm_text("my call", turns))
    if not turns:
        with pytest.raises(ValueError, match="holds no turn"):
            read_rttm(file)
        return
    (found,) = read_rttm(file).values()
    assert [turn.speaker for turn in found] == [turn.speaker for turn in sorted(turns)]
    np.testing.assert_allclose([(t.start, t.end) for t in found], [(t.start, t.end) for t in sorted(turns)], atol=2e-3)
    assert list(read_rttm(file)) == [rttm_name("my call")] == ["my_call"]


@pytest.mark.parametrize("line", ["SPEAKER a 1 x 1 <NA> <NA> b <NA> <NA>", "SPEAKER a 1 0 -1 <NA> <NA> b", "SPEAKER a"])
def test_what_is_no_rttm_is_refused_with_its_line(tmp_path, line):
    (tmp_path / "a.rttm").write_text(f"SPEAKER a 1 0 1 <NA> <NA> b <NA> <NA>\n{line}\n")
    with pytest.raises(ValueError, match=r"a\.rttm, line 2: expected `SPEAKER"):
        read_rttm(tmp_path / "a.rttm")


# ---------------------------------------------------------------- clusters


def voices(sizes, spread=0.25, dim=32, seed=0):
    """Units [N, dim] around as many directions as there are sizes, and the direction of each."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    units = np.eye(dim)[labels] + spread * rng.standard_normal((len(labels), dim)) / np.sqrt(dim)
    order = rng.permutation(len(labels))
    return (units / np.linalg.norm(units, axis=1, keepdims=True))[order], labels[order]


@at_most(20)
@given(st.lists(st.integers(12, 25), min_size=1, max_size=6), st.booleans(), st.integers(0, 99))
def test_speakers_who_differ_are_told_apart_and_counted(sizes, counted, seed):
    units, truth = voices(sizes, seed=seed)
    labels, means = clustered(units, np.ones(len(units)), len(sizes) if counted else None, few=len(units) < 70)
    assert len(means) == len(sizes) and len(set(zip(labels, truth, strict=True))) == len(sizes)
    np.testing.assert_allclose(np.linalg.norm(means, axis=1), 1)


@pytest.mark.parametrize("most", [30, 1500])
def test_of_many_windows_some_are_clustered_and_all_get_a_speaker(monkeypatch, most):
    monkeypatch.setattr(clustering, "_MANY", most)
    units, truth = voices([40, 40, 40])
    labels, means = clustered(units, np.ones(len(units)))
    assert len(means) == 3 and len(set(zip(labels, truth, strict=True))) == 3


def test_who_hardly_speaks_is_no_further_speaker_unless_asked_for():
    units, truth = voices([30, 2])
    assert len(clustered(units, np.full(32, 0.9), few=True)[1]) == 1
    labels, means = clustered(units, np.full(32, 0.9), speakers=2, few=True)
    assert len(means) == 2 and len(set(zip(labels, truth, strict=True))) == 2


@pytest.mark.parametrize("count", [1, 2, 3])
def test_more_speakers_than_windows(count):
    units, _ = voices([1] * count)
    labels, means = clustered(units, np.ones(count), speakers=5)
    assert sorted(labels) == list(range(count)) and len(means) == count


# ---------------------------------------------------------------- the pipeline


def by_loudness(waves):
    """Stands in for a model: who is louder than 0.1 on average is another speaker."""
    return np.array([[1.0, 0.1] if np.abs(wave).mean() < 0.1 else [0.1, 1.0] for wave in waves])


@given(st.lists(st.integers(1, 60), min_size=2, max_size=10), st.sampled_from([(1.5, 0.75), (1.0, 0.3), (0.5, 0.5)]))
def test_turns_fill_the_speech_and_nothing_else(lengths, windows):
    """Every other length is silence."""
    ends = np.cumsum(lengths) / 10
    speech = [(float(start), float(end)) for start, end in zip(ends[::2], ends[1::2], strict=False)]
    rng = np.random.default_rng(len(lengths))
    wave = rng.uniform(-0.1, 0.1, round(ends[-1] * RATE)).astype(np.float32)
    wave[: len(wave) // 2] *= 3
    found = Diarizer(by_loudness, *windows)(wave, speech=speech)
    np.testing.assert_array_equal(
        talking(found.turns, seconds=61), talking([Turn(*span, "x") for span in speech], None, 61)
    )
    assert all(before.end <= after.start + 1e-9 for before, after in zip(found.turns, found.turns[1:], strict=False))
    assert {turn.speaker for turn in found.turns} == set(found.voices)
    if found.turns:
        assert found.turns[0].speaker == "speaker_01"


def test_a_change_of_speaker_is_found_where_it_is():
    rng = np.random.default_rng(0)
    wave = rng.uniform(-0.1, 0.1, 30 * RATE).astype(np.float32)
    wave[12 * RATE : 19 * RATE] *= 3
    found = Diarizer(by_loudness)(wave, speech=[(0.0, 30.0)], speakers=2)
    assert [turn.speaker for turn in found.turns] == ["speaker_01", "speaker_02", "speaker_01"]
    assert [turn.end for turn in found.turns] == pytest.approx([12, 19, 30], abs=0.8)


def test_a_long_recording_is_read_in_stretches(monkeypatch, dialogue):
    """So that memory does not grow with its length; and the same is found."""
    path, _ = dialogue
    whole = Diarizer(by_loudness)(path)
    read, longest = activity.STRETCH, []
    monkeypatch.setattr(activity, "STRETCH", 4 * RATE // activity.FRAME * activity.FRAME)
    monkeypatch.setattr(pipeline, "STRETCH", 3.0)

    def embed(waves):
        longest.append(sum(map(len, waves)) / RATE)
        return by_loudness(waves)

    again = Diarizer(embed)(path)
    assert read > 100 * RATE and max(longest[:-1]) < 3 * 1.5 / 0.75 + 1.5
    assert np.mean(talking(again.turns) == talking(whole.turns)) > 0.97


def test_two_women_are_told_apart(nano, dialogue):
    path, truth = dialogue
    for speakers in (None, 2):
        found = Diarizer(nano.embed)(path, speakers=speakers)
        names = {"a": "speaker_01", "b": "speaker_02"}
        assert set(found.voices) == set(names.values())
        for name in names:
            right = talking(truth, name) == talking(found.turns, names[name])
            assert right.mean() > 0.92  # but for pauses in their speech
    similar = nano.similarity(nano.embed([FIRST, OTHER_SPEAKER]), np.stack([*found.voices.values()]))
    assert similar[0, 0] > 0.8 > similar[0, 1] and similar[1, 1] > 0.8 > similar[1, 0]


@pytest.mark.parametrize("samples", [200, 2 * RATE])
def test_nobody_speaks(nano, samples):
    found = Diarizer(nano.embed)(np.zeros(samples, dtype=np.float32))
    assert found.turns == () and found.voices == {} and found.seconds == samples / RATE


def test_who_speaks_for_a_little_more_than_an_excerpt(tmp_path):
    """Of the last turn that an excerpt takes, less than a sample could be left."""
    soundfile.write(tmp_path / "a.wav", np.full(40 * RATE, 0.05), RATE)
    for last in (pipeline.EXCERPT - 15 - 1e-6, 15.0, 15.2):
        found = Diarizer(by_loudness)(tmp_path / "a.wav", speech=[(0.0, 15.0), (16.0, 16.0 + last), (35.0, 39.0)])
        assert list(found.voices) == ["speaker_01"]


def test_speech_of_an_instant_is_embedded_with_its_surroundings(nano):
    wave = read_audio(FIRST)
    found = Diarizer(nano.embed)(wave, speech=[(0.0, 0.05), (1.0, 1.02), (len(wave) / RATE - 0.01, len(wave) / RATE)])
    assert sum(turn.seconds for turn in found.turns) == pytest.approx(0.08, abs=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"window": 0.1}, "window: got 0.1 s"),
        ({"step": 2.0}, "step of 2.0 s"),
        ({"most_speakers": 0}, "most_speakers: got 0"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Diarizer(by_loudness, **options)


def test_impossible_questions_are_refused(tmp_path):
    wave = np.zeros(RATE, dtype=np.float32)
    with pytest.raises(ValueError, match="speakers: got 0"):
        Diarizer(by_loudness)(wave, speakers=0)
    for speech in ([(0.5, 0.7), (0.6, 0.8)], [(0.5, 1.2)], [(0.5, 0.5)]):
        with pytest.raises(ValueError, match="expected pieces in order"):
            Diarizer(by_loudness)(wave, speech=speech)
    with pytest.raises(AudioError, match=r"none\.wav"):
        Diarizer(by_loudness)(tmp_path / "none.wav")


# ---------------------------------------------------------------- names


def heard(recording, *voices):
    """A recording of some voices, 10 s each."""
    names = [f"speaker_{number:02}" for number in range(1, len(voices) + 1)]
    turns = tuple(Turn(10.0 * row, 10.0 * row + 10, name) for row, name in enumerate(names))
    return Diarization(recording, 10.0 * len(voices), turns, dict(zip(names, map(np.array, voices), strict=True)))


def test_unknown_speakers_keep_their_number(nano):
    roll = Roll.of(nano, dim=2, threshold=0.9)
    east, north, west = [1.0, 0.0], [0.0, 3.0], [-1.0, 0.1]
    assert list(roll.named(heard("1", east, north))[0].voices) == ["speaker_01", "speaker_02"]
    second, recognised = roll.named(heard("2", west, [0.1, 1.0], [2.0, 0.1]))
    assert list(second.voices) == ["speaker_03", "speaker_02", "speaker_01"] and recognised == {}
    assert [turn.speaker for turn in second.turns] == list(second.voices)


def test_two_speakers_of_a_recording_never_become_one(nano):
    roll = Roll.of(nano, dim=2, threshold=0.5)
    roll.named(heard("1", [1.0, 0.0]))
    named, _ = roll.named(heard("2", [1.0, 0.4], [1.0, 0.1]))
    assert list(named.voices) == ["speaker_02", "speaker_01"]


def test_enrolled_speakers_get_their_names(nano, dialogue):
    roll = Roll.of(nano, {"anna": [FIRST]}, threshold=0.6)
    named, recognised = roll.named(Diarizer(nano.embed)(dialogue[0]))
    assert list(named.voices) == ["anna", "speaker_01"]
    assert recognised["anna"].accepted and recognised["anna"].threshold == 0.6


# ---------------------------------------------------------------- simulated conversations


def test_statistics_are_those_that_were_drawn_from():
    rng = np.random.default_rng(0)
    turns, end, speaker = [], 0.0, "a"
    for _ in range(4000):
        start = end + rng.laplace(0.3, 0.5)
        end = start + np.exp(rng.normal(0.4, 0.9))
        speaker = "b" if speaker == "a" else "a"
        turns.append(Turn(start, end, speaker))
    found = Statistics.of({"all": turns})
    assert found.length == pytest.approx(0.4, abs=0.06) and found.length_spread == pytest.approx(0.9, abs=0.06)
    with pytest.raises(ValueError, match="no recording has turns of two speakers"):
        Statistics.of({"all": [Turn(0, 1, "a")]})


@pytest.mark.parametrize("place", [{}, {"in_room": True}, {"domain": make_domain("telephony")}])
def test_a_conversation_sounds_where_its_turns_are(place):
    speech = {"a": [FIRST, SAME_SPEAKER], "b": [OTHER_SPEAKER]}
    wave, turns = simulate_conversation(speech, 40, np.random.default_rng(1), **place)
    again, _ = simulate_conversation(speech, 40, np.random.default_rng(1), **place)
    np.testing.assert_array_equal(wave, again)
    assert wave.dtype == np.float32 and 0.01 < np.abs(wave).max() <= 1
    assert {turn.speaker for turn in turns} == {"a", "b"} and turns == joined(turns)
    assert 40 <= len(wave) / RATE < 60 and all(0 <= turn.start < turn.end <= len(wave) / RATE + 0.01 for turn in turns)
    inside = talking(turns, seconds=60)[: len(wave) // 160]
    energy = np.square(wave[: len(inside) * 160].reshape(-1, 160)).sum(axis=1)
    assert energy[inside].sum() > 0.98 * energy.sum() and 0.2 < inside.mean() < 0.95


def test_nobody_cannot_converse():
    with pytest.raises(ValueError, match="at least one speaker"):
        simulate_conversation({}, 10, np.random.default_rng(0))


def test_one_speaker_takes_all_turns():
    _, turns = simulate_conversation({"a": [FIRST]}, 20, np.random.default_rng(0), statistics=MEETINGS)
    assert {turn.speaker for turn in turns} == {"a"}


# ---------------------------------------------------------------- the command


def test_command(tmp_path, dialogue, capsys):
    path, truth = dialogue
    calls = tmp_path / "calls"
    (calls / "more").mkdir(parents=True)
    soundfile.write(calls / "my call.flac", read_audio(path), RATE)
    soundfile.write(calls / "more" / "b.wav", read_audio(OTHER_SPEAKER), RATE)
    (calls / "bad.wav").write_bytes(b"RIFF")
    (tmp_path / "enrolled" / "anna").mkdir(parents=True)
    soundfile.write(tmp_path / "enrolled" / "anna" / "1.wav", read_audio(FIRST), RATE)
    out = tmp_path / "out"
    assert run("diarize", "nano", calls, "--out", out, "--enrolled", tmp_path / "enrolled", "--dim", 128) == 1
    printed = capsys.readouterr()
    assert "bad.wav" in printed.err and "left out" in printed.err and "1 enrolled speaker: accepted" in printed.out
    written = {file.relative_to(out).as_posix() for file in out.rglob("*.*")}
    assert written == {f"{stem}.{kind}" for stem in ("my_call", "more/b") for kind in ("rttm", "json", "png")}
    turns = read_rttm(out / "my_call.rttm")["my_call"]
    assert {turn.speaker for turn in turns} == {"anna", "speaker_01"}
    assert np.mean(talking(turns, "anna") == talking(truth, "a")) > 0.92
    record = json.loads((out / "my_call.json").read_text())
    assert record["dim"] == 128 and record["model"] == "nano" and record["adapter"] is None and record["fingerprint"]
    assert [len(speaker["embedding"]) for speaker in record["speakers"]] == [128, 128]
    assert {speaker["name"]: speaker["enrolled"] for speaker in record["speakers"]} == {
        "anna": True,
        "speaker_01": False,
    }
    assert {turn["speaker"] for turn in record["turns"]} == {"anna", "speaker_01"}
    # The woman of the other recording is nobody who is enrolled, and the same one in both.
    assert {turn.speaker for turn in read_rttm(out / "more" / "b.rttm")["b"]} == {"speaker_01"}
    assert (out / "my_call.png").read_bytes().startswith(b"\x89PNG")


def test_command_refuses(tmp_path, dialogue, capsys):
    path, _ = dialogue
    out = ("--out", tmp_path / "out")
    assert "speakers: got 0" in refusal_late(capsys, "diarize", "nano", path, *out, "--speakers", 0)
    assert "no file or folder" in refusal(capsys, "diarize", "nano", tmp_path / "none.wav", *out)
    assert "is a file: give a folder" in refusal(capsys, "diarize", "nano", path, "--out", path)
    other = tmp_path / "dialogue.flac"
    soundfile.write(other, np.zeros(RATE), RATE)
    message = refusal(capsys, "diarize", "nano", path, other, *out)
    assert "would both be written as" in message and "dialogue.rttm" in message
    assert not (tmp_path / "out").exists()


def refusal_late(capsys, *argv):
    """The message of a command that fails after it has said what it does."""
    assert run(*argv) == 2
    return capsys.readouterr().err
