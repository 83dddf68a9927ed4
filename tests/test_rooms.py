"""Rooms: bounds, decay, direct path, level and place of reverberated speech, banks of simulated and recorded ones."""

import re
from pathlib import Path

import numpy as np
import pyroomacoustics
import pytest
from pyroomacoustics.experimental import measure_rt60
from sounds import likeness, power, write, write_responses

from mrl_redimnet.audio.io import SAMPLING_RATE, AudioError
from mrl_redimnet.audio.rooms import (
    RoomBank,
    draw_room,
    recorded_response,
    reverberate,
    reverberation_time,
    simulated_response,
)
from mrl_redimnet.data.synthetic import synthesise

ROOMS = 4  # a small bank: simulating a room takes up to a second


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    return write_responses(tmp_path_factory.mktemp("rooms"))


@pytest.fixture(scope="module")
def speech() -> list[np.ndarray]:
    return [synthesise(0, speaker, 0, 0, (2.0, 2.0)).astype(np.float32) for speaker in (1, 2, 3)]


def test_rooms_are_drawn_within_their_bounds():
    rooms = [draw_room(0, index) for index in range(400)]
    sizes, times = np.array([room.size for room in rooms]), np.array([room.rt60 for room in rooms])
    sources, microphones = (np.array([getattr(room, one) for room in rooms]) for one in ("source", "microphone"))
    for positions in (sources, microphones):
        assert positions.min() >= 0.5 and (sizes - positions).min() >= 0.5
    assert np.linalg.norm(sources - microphones, axis=1).min() >= 0.5
    assert (sizes >= [3, 3, 2.4]).all() and (sizes <= [9, 7, 4]).all()
    assert 0.2 <= times.min() < 0.22 and 0.78 < times.max() <= 0.8
    assert draw_room(1, 0).rt60 != rooms[0].rt60 == draw_room(0, 0).rt60


@pytest.mark.parametrize("rt60", [0.2, 0.5, 0.8])
def test_reverberation_time_of_a_known_decay(rt60):
    seconds = np.arange(SAMPLING_RATE) / SAMPLING_RATE
    taps = np.random.default_rng(0).standard_normal(SAMPLING_RATE) * 10 ** (-3 * seconds / rt60)
    assert reverberation_time(taps) == pytest.approx(rt60, rel=0.05)


@pytest.mark.parametrize("index", range(ROOMS))
def test_a_simulated_room_rings_as_long_as_drawn(index):
    room, response = draw_room(0, index), simulated_response(0, index)
    measured = measure_rt60(response.taps[response.delay :], SAMPLING_RATE, decay_db=20)  # Schroeder's integration
    assert measured == pytest.approx(room.rt60, rel=0.12)


@pytest.mark.parametrize("index", range(ROOMS))
def test_the_direct_path_is_where_the_distance_puts_it(index):
    room, response = draw_room(0, index), simulated_response(0, index)
    size = np.abs(response.taps)
    assert size[: response.delay - 4].max() < 0.15 * size[response.delay]  # its interpolation's ripple, no more
    # Spherical spreading, 1 / distance, less what interpolation takes for a time between two samples: sinc(1 / 2).
    distance = np.linalg.norm(room.source - room.microphone)
    assert 0.6 < size[response.delay] * distance < 1.05


def test_a_response_does_not_depend_on_the_threads():
    before = pyroomacoustics.constants.get("num_threads")
    simulated = []
    for threads in (1, 3):
        pyroomacoustics.constants.set("num_threads", threads)
        simulated.append(simulated_response.__wrapped__(0, 0).taps)
        assert pyroomacoustics.constants.get("num_threads") == threads
    pyroomacoustics.constants.set("num_threads", before)
    assert np.array_equal(*simulated)


def responses(recorded: Path) -> list:
    files = sorted(str(path) for path in recorded.rglob("*.wav"))
    return [*map(recorded_response, files), *(simulated_response(0, index) for index in range(ROOMS))]


def test_a_click_becomes_a_decay_after_itself(recorded):
    click = np.zeros(SAMPLING_RATE, np.float32)
    click[4000] = 1
    for response in responses(recorded):
        heard = reverberate(click, response)
        onset = int(np.argmax(np.abs(heard) > 0.1 * np.abs(heard).max()))
        assert abs(onset - 4000) <= 4
        assert power(heard[4200:8000]) > 0.01 * power(heard) and not click[4200:].any()


def test_reverberated_speech_keeps_level_and_place(recorded, speech):
    for audio in speech:
        for response in responses(recorded):
            heard = reverberate(audio, response)
            assert heard.shape == audio.shape and heard.dtype == np.float32
            assert power(heard) == pytest.approx(power(audio), rel=1e-4)
            assert 0.1 < likeness(audio, heard) < 0.99


# ---------------------------------------------------------------- banks


def clicks(*names: str, folder: Path) -> list[str]:
    """Files of one pulse each, late by the file's number."""
    paths = []
    for i, name in enumerate(names):
        taps = np.zeros(64)
        taps[i] = 0.5
        paths.append(str(write(folder / name, taps)))
    return paths


RESPONSES = (
    "simulated_rirs/smallroom/Room001/Room001-00001.wav",
    "simulated_rirs/largeroom/Room200/Room200-00100.wav",
    "real_rirs_isotropic_noises/RVB2014_type1_rir_largeroom1_near_angla.wav",
    "real_rirs_isotropic_noises/RWCP_type4_rir_p70r.wav",
    "real_rirs_isotropic_noises/air_type1_air_binaural_lecture_0_1.wav",
)
NOISES = (
    "real_rirs_isotropic_noises/RVB2014_type1_noise_largeroom1_1.wav",
    "real_rirs_isotropic_noises/RWCP_type2_noise_circle_ofc_1.wav",
    "pointsource_noises/noise-free-sound-0000.wav",
    "pointsource_noises/noise-sound-bible-0011.wav",
)


@pytest.mark.parametrize("below", ["", "real_rirs_isotropic_noises"])
def test_of_rirs_noises_only_the_responses_are_drawn(tmp_path, below):
    clicks(*RESPONSES, *NOISES, folder=tmp_path)
    expected = {i for i, name in enumerate(RESPONSES) if name.startswith(below)}
    bank, rng = RoomBank(tmp_path / below), np.random.default_rng(0)
    assert {bank.draw(rng).delay for _ in range(200)} == expected


def test_a_folder_of_noise_alone_is_no_bank(tmp_path):
    clicks(*NOISES, folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="rooms: no audio .*, only the 4 noise files of RIRS_NOISES"):
        RoomBank(tmp_path)
    with pytest.raises(FileNotFoundError, match="rooms: no audio"):
        RoomBank(tmp_path / "nothing")


def test_every_simulated_room_is_drawn_as_often():
    bank, rng = RoomBank(room_count=ROOMS, room_seed=0), np.random.default_rng(0)
    drawn = [id(bank.draw(rng)) for _ in range(400)]
    assert set(drawn) == {id(simulated_response(0, index)) for index in range(ROOMS)}
    assert min(map(drawn.count, set(drawn))) > 70


def test_a_bank_needs_a_room():
    with pytest.raises(ValueError, match=re.escape("room_count: got 0, expected at least 1.")):
        RoomBank(room_count=0)


def test_a_bad_recording_is_an_error(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.wav").write_bytes(b"RIFF, once")
    for path, message in (
        (write(tmp_path / "dumb" / "0.wav", np.zeros(100)), "0.wav is silent"),
        (tmp_path / "bad" / "0.wav", "0.wav cannot be read as audio"),
    ):
        with pytest.raises(AudioError, match=message):
            RoomBank(path.parent).draw(np.random.default_rng(0))
