import av
import numpy as np
import pytest
import soundfile as sf
from hypothesis import given
from hypothesis import strategies as st

from mrl_redimnet.audio import SAMPLING_RATE, AudioError, AudioInfo, Encoded, audio_info, read_audio


def noise(samples, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def tone(hertz, rate, seconds=1.0):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write_aac(path, wave, rate):
    """Encode wave [samples] or [samples, channels] with FFmpeg's AAC encoder in the container of the suffix."""
    planes = np.atleast_2d(wave.T)
    layout = "stereo" if len(planes) == 2 else "mono"
    # Noise substitution draws fresh noise in the decoder, so that no two decodes would be equal.
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=rate, layout=layout, options={"aac_pns": "0"})
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(planes), format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """2.02 s of noise in every format, and at another rate and with two channels."""
    folder = tmp_path_factory.mktemp("recordings")
    wave = noise(32_321)
    for suffix in ("wav", "flac", "ogg", "mp3"):
        sf.write(folder / f"a.{suffix}", wave, SAMPLING_RATE)
    write_aac(folder / "a.m4a", wave, SAMPLING_RATE)
    write_aac(folder / "a.aac", wave, SAMPLING_RATE)
    sf.write(folder / "stereo44.wav", noise(89_123).repeat(2).reshape(-1, 2) * [1, 0.5], 44_100)
    write_aac(folder / "stereo44.m4a", noise(89_123).repeat(2).reshape(-1, 2) * np.float32([1, 0.5]), 44_100)
    sf.write(folder / "phone.flac", noise(16_161), 8_000)
    return folder


ALL = ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.m4a", "a.aac", "stereo44.wav", "stereo44.m4a", "phone.flac"]
WHOLE = {}


@pytest.mark.parametrize("name", ALL)
@given(start=st.floats(0, 2.0), seconds=st.floats(0.001, 2.5))
def test_a_stretch_equals_the_slice_of_the_whole_file(recordings, name, start, seconds):
    whole = WHOLE.setdefault(name, read_audio(recordings / name))
    part = read_audio(recordings / name, start, seconds)
    first = round(start * SAMPLING_RATE)
    expected = whole[first : first + round(seconds * SAMPLING_RATE)]
    assert part.dtype == np.float32 and part.flags.c_contiguous
    assert part.shape == expected.shape
    np.testing.assert_allclose(part, expected, atol=2e-6)


@pytest.mark.parametrize("name", ALL)
def test_info_agrees_with_what_is_read(recordings, name):
    info = audio_info(recordings / name)
    assert info.seconds * SAMPLING_RATE == pytest.approx(len(read_audio(recordings / name)), abs=1)
    # AAC's frames pad the end: by little in an m4a, which states the length, by up to two frames in a bare stream.
    assert info.seconds == pytest.approx(2.0205, abs=0.13 if name.endswith(".aac") else 1e-3)


def encoded(path):
    return Encoded(path.name, path.read_bytes())


@pytest.mark.parametrize("name", ALL)
@given(start=st.floats(0, 1.9), seconds=st.floats(0.001, 2.5))
def test_bytes_are_read_as_the_file_is(recordings, name, start, seconds):
    source = encoded(recordings / name)
    assert audio_info(source) == audio_info(recordings / name)
    np.testing.assert_array_equal(read_audio(source, start, seconds), read_audio(recordings / name, start, seconds))


@pytest.mark.parametrize("samples", [51_153, 70_368, 78_630])
def test_the_end_of_an_ogg_file_is_its_end(tmp_path, samples):
    """Where one half is silent, libsndfile's seek near the end of an Ogg file lands elsewhere."""
    wave = np.zeros(samples, dtype=np.float32)
    wave[samples // 2 :] = 0.3 * np.random.default_rng(samples).standard_normal(samples - samples // 2)
    sf.write(tmp_path / "a.ogg", wave, SAMPLING_RATE, format="OGG", subtype="VORBIS")
    whole = read_audio(tmp_path / "a.ogg")
    for seconds in (0.02, 0.2, 0.75):
        start = len(whole) / SAMPLING_RATE - seconds
        assert np.array_equal(read_audio(tmp_path / "a.ogg", start=start), whole[-round(seconds * SAMPLING_RATE) :])


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.m4a"])
def test_bytes_without_a_suffix_are_known_by_their_beginning(recordings, name):
    source = Encoded("row 7", (recordings / name).read_bytes())
    np.testing.assert_array_equal(read_audio(source), read_audio(recordings / name))


def test_info_fields(recordings):
    assert audio_info(recordings / "a.flac") == AudioInfo(32_321 / 16_000, 16_000, 1)
    assert audio_info(recordings / "stereo44.wav") == AudioInfo(89_123 / 44_100, 44_100, 2)


def test_lossless_files_give_back_what_was_written(recordings):
    for name in ("a.wav", "a.flac"):
        np.testing.assert_allclose(read_audio(recordings / name), noise(32_321), atol=2**-15)


def test_m4a_is_not_shifted(tmp_path):
    wave = tone(300, SAMPLING_RATE) * np.linspace(0, 1, SAMPLING_RATE, dtype=np.float32)
    write_aac(tmp_path / "a.m4a", wave, SAMPLING_RATE)
    np.testing.assert_allclose(read_audio(tmp_path / "a.m4a")[: len(wave)], wave, atol=0.03)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_a_tone(tmp_path, rate):
    sf.write(tmp_path / "a.wav", tone(440, rate), rate, subtype="FLOAT")
    wave = read_audio(tmp_path / "a.wav")
    np.testing.assert_allclose(wave[200:-200], tone(440, SAMPLING_RATE)[200:-200], atol=5e-3)


def test_sampling_rate_can_be_chosen(recordings):
    assert read_audio(recordings / "a.wav", 0.5, 1.0, sampling_rate=8_000).shape == (8_000,)


def test_channels_are_averaged(tmp_path):
    left, right = tone(440, SAMPLING_RATE), noise(SAMPLING_RATE)
    sf.write(tmp_path / "a.wav", np.stack([left, right], 1), SAMPLING_RATE, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), (left + right) / 2, atol=1e-7)


def test_suffix_case_does_not_matter(tmp_path):
    sf.write(tmp_path / "A.WAV", noise(1_000), SAMPLING_RATE)
    assert len(read_audio(tmp_path / "A.WAV")) == 1_000


def truncated(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def missing(folder):
    return folder / "gone.wav"


def folder_named_like_audio(folder):
    (folder / "a.wav").mkdir()
    return folder / "a.wav"


def no_bytes(folder):
    (folder / "a.flac").touch()
    return folder / "a.flac"


def no_samples(folder):
    sf.write(folder / "a.wav", noise(0), SAMPLING_RATE)
    return folder / "a.wav"


def text_as_wav(folder):
    (folder / "a.wav").write_text("not audio\n" * 99)
    return folder / "a.wav"


def text_as_m4a(folder):
    (folder / "a.m4a").write_text("not audio\n" * 99)
    return folder / "a.m4a"


def cut_m4a(folder):
    write_aac(folder / "a.m4a", noise(32_000), SAMPLING_RATE)
    truncated(folder / "a.m4a", 0.5)
    return folder / "a.m4a"


def flac_of_unknown_length(folder):
    sf.write(folder / "a.flac", noise(1_000), SAMPLING_RATE)
    content = bytearray((folder / "a.flac").read_bytes())
    content[21] &= 0xF0  # the 36 bits of STREAMINFO that count the samples
    content[22:26] = bytes(4)
    (folder / "a.flac").write_bytes(content)
    return folder / "a.flac"


UNREADABLE = [missing, folder_named_like_audio, no_bytes, no_samples, text_as_wav, text_as_m4a, cut_m4a]


@pytest.mark.parametrize("make", [*UNREADABLE, flac_of_unknown_length])
@pytest.mark.parametrize("use", [audio_info, read_audio])
def test_unreadable_files_are_named(tmp_path, make, use):
    path = make(tmp_path)
    with pytest.raises(AudioError) as error:
        use(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("make", [no_bytes, no_samples, text_as_wav, text_as_m4a, cut_m4a, flac_of_unknown_length])
def test_unreadable_bytes_are_named_as_the_file_would_be(tmp_path, make):
    path = make(tmp_path)
    source = Encoded(f"set/{path.name}", path.read_bytes())
    for use in (audio_info, read_audio):
        with pytest.raises(AudioError, match=f"set/{path.name} "):
            use(source)
    assert len(repr(source)) < 100  # the bytes do not fill a log


def test_truncated_flac_gives_its_start_but_not_its_end(tmp_path):
    path = tmp_path / "a.flac"
    wave = noise(64_000)
    sf.write(path, wave, SAMPLING_RATE)
    truncated(path, 0.5)
    np.testing.assert_allclose(read_audio(path, 0, 0.5), wave[:8_000], atol=2**-15)
    for start in (0.0, 3.5):
        with pytest.raises(AudioError, match="a.flac"):
            read_audio(path, start)


def test_truncated_m4a_with_its_index_in_front(tmp_path):
    path = tmp_path / "a.m4a"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("aac", rate=SAMPLING_RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(noise(64_000)[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = SAMPLING_RATE, 0
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    truncated(path, 0.5)
    assert len(read_audio(path, 0, 0.5)) == 8_000
    with pytest.raises(AudioError, match="header claims more"):
        read_audio(path, 3.5)


def test_nan_and_infinity_are_refused_where_they_are_read(tmp_path):
    for bad in (np.nan, np.inf):
        wave = noise(16_000)
        wave[12_000] = bad
        sf.write(tmp_path / "a.wav", wave, SAMPLING_RATE, subtype="FLOAT")
        assert len(read_audio(tmp_path / "a.wav", 0, 0.5)) == 8_000
        with pytest.raises(AudioError, match="NaN or infinite"):
            read_audio(tmp_path / "a.wav")


def test_video_without_sound_is_refused(tmp_path):
    with av.open(str(tmp_path / "a.m4a"), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=5, width=16, height=16, pix_fmt="yuv420p")
        frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    with pytest.raises(AudioError, match="no audio stream"):
        audio_info(tmp_path / "a.m4a")


def test_start_behind_the_end_and_senseless_stretches(recordings):
    with pytest.raises(AudioError, match="nothing is left from 5.000 s"):
        read_audio(recordings / "a.wav", 5.0, 1.0)
    for start, seconds in ((-0.1, 1.0), (0.0, 0.0), (0.0, -1.0)):
        with pytest.raises(ValueError, match="at least"):
            read_audio(recordings / "a.wav", start, seconds)
