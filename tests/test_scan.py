"""Which files of a folder are audio: links, hidden files, names of any bytes, what is left out and what is read."""

import os
import warnings
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from mrl_redimnet.audio.augmentation import AddNoise
from mrl_redimnet.audio.io import SAMPLING_RATE, AudioWarning, audio_info, read_audio
from mrl_redimnet.audio.rooms import RoomBank
from mrl_redimnet.audio.scan import AUDIO_SUFFIXES, audio_files, files_below, is_hidden, printable
from mrl_redimnet.data.corpus import load_corpus
from mrl_redimnet.evaluation.robustness import make_grid
from mrl_redimnet.extraction.inputs import Inputs

WAVE = 0.1 * np.random.default_rng(0).standard_normal(8000)


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, WAVE, SAMPLING_RATE)
    return path


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def found(folder: Path) -> tuple[list[str], str]:
    """What the scan gives, and what it says was left out ("" for nothing)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        files = list(audio_files(folder))
    messages = [str(warning.message) for warning in caught if issubclass(warning.category, AudioWarning)]
    assert len(messages) <= 1 and not any("\n" in message for message in messages)
    return files, "".join(messages)


@pytest.fixture
def linked(tmp_path) -> Path:
    """anna's file, bob as a link to a folder elsewhere, a linked file, and loops of links."""
    write(tmp_path / "elsewhere/deep/1.wav")
    root = tmp_path / "root"
    write(root / "anna/1.wav")
    (root / "bob").symlink_to(tmp_path / "elsewhere")
    (root / "anna/2.wav").symlink_to(tmp_path / "elsewhere/deep/1.wav")
    (root / "anna/up").symlink_to(root)
    (tmp_path / "elsewhere/deep/round").symlink_to(tmp_path / "elsewhere")
    (root / "self").symlink_to(root / "self")
    return root


def test_links_are_followed_and_loops_of_links_named(linked):
    files, told = found(linked)
    assert files == ["anna/1.wav", "anna/2.wav", "bob/deep/1.wav"]
    assert "anna/up: a link to a folder that it lies in" in told and "bob/deep/round: a link" in told


def test_two_links_to_one_folder_are_two_folders(tmp_path):
    write(tmp_path / "speech/1.wav")
    for name in ("a", "b"):
        (tmp_path / "root").mkdir(exist_ok=True)
        (tmp_path / "root" / name).symlink_to(tmp_path / "speech")
    assert found(tmp_path / "root") == (["a/1.wav", "b/1.wav"], "")


def test_a_broken_link_is_a_file_that_whoever_reads_it_tells(tmp_path):
    (tmp_path / "a.wav").symlink_to(tmp_path / "gone.wav")
    assert found(tmp_path) == (["a.wav"], "")
    with pytest.raises(ValueError, match="a.wav is a link to .*gone.wav, which is not there"):
        read_audio(tmp_path / "a.wav")


HIDDEN = ("._1.wav", ".cache/2.wav", "__MACOSX/anna/3.wav", "anna/._1.wav", ".DS_Store")


def test_hidden_files_are_passed_over_and_counted(tmp_path):
    write(tmp_path / "anna/1.wav")
    for name in HIDDEN:
        touch(tmp_path / name)
    files, told = found(tmp_path)
    assert files == ["anna/1.wav"] and "5 hidden files or folders" in told
    assert all(map(is_hidden, HIDDEN)) and not any(map(is_hidden, ("./a.wav", "../b.wav", "a.b/c.wav")))


def test_what_is_left_out_is_counted_in_one_line(tmp_path):
    write(tmp_path / "1.wav")
    for name in ("a.txt", "b.TXT", "c.csv", "README"):
        touch(tmp_path / name)
    files, told = found(tmp_path)
    assert files == ["1.wav"]
    assert told.endswith("left out 4 files that are not named as audio (2 .txt, 1 without suffix, 1 .csv).")
    assert found(write(tmp_path / "only/1.wav").parent) == (["1.wav"], "")


def test_the_order_is_that_of_the_paths(tmp_path):
    names = ["a-b/1.wav", "a/1.wav", "a/b.wav", "a/b/1.wav", "a.wav", "B.WAV", "a0/x.FLAC", "ü.wav"]
    for name in names:
        touch(tmp_path / name)
    assert found(tmp_path)[0] == sorted(names)


def test_a_folder_that_cannot_be_read_is_told_and_the_rest_goes_on(tmp_path, monkeypatch):
    write(tmp_path / "a/1.wav")
    write(tmp_path / "closed/1.wav")
    scandir = os.scandir

    def denied(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    files, told = found(tmp_path)
    assert files == ["a/1.wav"] and "closed: Permission denied" in told


def test_odd_entries_have_audio_names(tmp_path):
    """A folder called x.wav is entered; a pipe is a file that cannot be read, and nothing waits for it."""
    write(tmp_path / "x.wav/1.wav")
    os.mkfifo(tmp_path / "pipe.wav")
    assert found(tmp_path)[0] == ["pipe.wav", "x.wav/1.wav"]
    for read in (audio_info, read_audio):
        with pytest.raises(ValueError, match="pipe.wav is a pipe, a device or a socket, not a file"):
            read(tmp_path / "pipe.wav")
        with pytest.raises(ValueError, match="x.wav is a folder, not a file"):
            read(tmp_path / "x.wav")


def test_names_of_any_bytes_can_be_printed(tmp_path):
    name = os.fsdecode(b"caf\xe9 100%\n.wav")
    touch(tmp_path / name)
    assert found(tmp_path)[0] == [name]
    assert printable(name) == "caf\\xe9 100%\\n.wav" and printable("Zoë/1.wav") == "Zoë/1.wav"


def test_every_scan_is_this_one(linked, tmp_path):
    """Training, evaluation, extraction, noise, rooms and robustness find the same files."""
    for name in HIDDEN:
        touch(linked / name)
    for name in ("bob/3.sph", "anna/4.aiff"):
        soundfile.write(
            linked / name, WAVE, SAMPLING_RATE, format={"sph": "NIST", "aiff": "AIFF"}[name[-4:].strip(".")]
        )
    files = ["anna/1.wav", "anna/2.wav", "anna/4.aiff", "bob/3.sph", "bob/deep/1.wav"]
    paths = sorted(str(linked / file) for file in files)
    with pytest.warns(AudioWarning):
        assert [str(file) for file in files_below(linked)] == paths
        assert Inputs.find([linked]).shards[0].known_ids().to_pylist() == files
        assert AddNoise(linked).files == paths
        assert RoomBank(linked).files == paths
        assert [one.name for one in make_grid(linked, [], ["noise"], quick=True)] == ["noise/anna", "noise/bob"]
    (linked / "bob/3.sph").rename(linked / "bob/deep/3.sph")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/anna").symlink_to(linked / "anna")
    (tmp_path / "corpus/bob").symlink_to(linked / "bob/deep")
    (linked / "anna/up").unlink()
    with pytest.warns(AudioWarning, match="hidden"):
        rows = load_corpus(tmp_path / "corpus", "speaker/utterance", cache_dir=tmp_path / "cache")
    assert rows["path"] == ["anna/1.wav", "anna/2.wav", "anna/4.aiff", "bob/1.wav", "bob/3.sph"]
    assert set(rows["problem"]) == {""} and set(rows["speaker"]) == {"anna", "bob"}


def test_no_folder_and_no_audio_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone is not a folder with audio"):
        files_below(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="noise: no audio .* below"):
        files_below(tmp_path, "noise")


# ---------------------------------------------------------------- every suffix is read

BY_SOUNDFILE = {
    ".wav": "WAV",
    ".flac": "FLAC",
    ".ogg": "OGG",
    ".mp3": "MP3",
    ".sph": "NIST",
    ".aif": "AIFF",
    ".aiff": "AIFF",
    ".aifc": "AIFF",
    ".au": "AU",
    ".snd": "AU",
    ".caf": "CAF",
    ".w64": "W64",
    ".rf64": "RF64",
    ".voc": "VOC",
}
# Codec and rate, and the format where the suffix does not say it.
BY_FFMPEG = {
    **dict.fromkeys((".m4a", ".aac", ".mp4", ".3gp", ".mov", ".mkv"), ("aac", 16000)),
    **dict.fromkeys((".opus", ".webm", ".mka"), ("libopus", 48000)),
    ".m4b": ("aac", 16_000, "mp4"),
    ".weba": ("libopus", 48_000, "webm"),
    ".oga": ("flac", 16_000),
    ".wv": ("wavpack", 16_000),
    ".wma": ("wmav2", 44_100, "asf"),
    ".amr": ("libopencore_amrnb", 8_000),
    ".ac3": ("ac3", 48_000),
    ".mp2": ("mp2", 16_000),
    ".tta": ("tta", 16_000),
}


def write_by_ffmpeg(path: Path, codec: str, rate: int, format: str | None = None):
    wave = (np.tile(WAVE, 4)[None] * 32767).astype(np.int16)
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        stream.bit_rate = 12_200 if codec == "libopencore_amrnb" else 64_000
        frame = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
        frame.sample_rate, frame.pts = SAMPLING_RATE, 0
        size = stream.codec_context.frame_size or None
        fit = av.AudioResampler(stream.codec_context.format, "mono", rate, frame_size=size)
        for packet in (
            packet for part in (*fit.resample(frame), *fit.resample(None)) for packet in stream.encode(part)
        ):
            container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)


@pytest.mark.parametrize("suffix", AUDIO_SUFFIXES)
def test_every_suffix_of_the_list_is_read_whole_and_in_part(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix in BY_SOUNDFILE:
        soundfile.write(path, np.tile(WAVE, 4), SAMPLING_RATE, format=BY_SOUNDFILE[suffix])
    else:
        write_by_ffmpeg(path, *BY_FFMPEG[suffix])
    with warnings.catch_warnings():
        warnings.simplefilter("error", AudioWarning)  # none is taken for cut off
        whole, part = read_audio(path), read_audio(path, 0.5, 1.0)
    assert audio_info(path).seconds == pytest.approx(2, abs=0.15) == pytest.approx(len(whole) / SAMPLING_RATE, abs=0.15)
    np.testing.assert_allclose(part, whole[8000:24_000], atol=1e-5)
    assert 0.03 < whole.std() < 0.2
