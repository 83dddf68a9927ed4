import os
import struct
import warnings

import av
import numpy as np
import pytest
import soundfile as sf
from hypothesis import given
from hypothesis import strategies as st

from mrl_redimnet.audio.io import SAMPLING_RATE, AudioError, AudioInfo, AudioWarning, Encoded, audio_info, read_audio


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


@pytest.mark.parametrize("make", UNREADABLE)
@pytest.mark.parametrize("use", [audio_info, read_audio])
def test_unreadable_files_are_named(tmp_path, make, use):
    path = make(tmp_path)
    with pytest.raises(AudioError) as error:
        use(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("make", [no_bytes, no_samples, text_as_wav, text_as_m4a, cut_m4a])
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


# ---------------------------------------------------------------- what one library reads, what is cut, odd headers


def read_with_warnings(path, *arguments):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wave = read_audio(path, *arguments)
    return wave, [str(warning.message) for warning in caught if issubclass(warning.category, AudioWarning)]


UNSEEKABLE = [("wav", "GSM610"), ("w64", "GSM610"), ("aiff", "GSM610"), ("wav", "G721_32"), ("au", "G723_24")]


@pytest.mark.parametrize(("suffix", "subtype"), [*UNSEEKABLE, ("wav", "NMS_ADPCM_32")])
def test_files_that_cannot_be_sought_in_are_read(tmp_path, suffix, subtype):
    path, wave = tmp_path / f"a.{suffix}", tone(300, 8_000, 2.0)
    sf.write(path, wave, 8_000, subtype=subtype)
    whole, part = read_audio(path, sampling_rate=8_000), read_audio(path, 0.5, 1.0, sampling_rate=8_000)
    assert len(whole) == pytest.approx(16_000, abs=400)
    np.testing.assert_allclose(part, whole[4_000:12_000], atol=1e-6)
    assert np.corrcoef(whole[: len(wave)], wave)[0, 1] > 0.95
    assert len(read_audio(path)) == 2 * len(whole)
    np.testing.assert_array_equal(read_audio(Encoded(path.name, path.read_bytes())), read_audio(path))


def test_what_the_suffix_says_wrongly_is_read_by_the_other_library(tmp_path):
    """An m4a called .wav, a WAV called .m4a, and FLAC in Ogg, which libsndfile does not read."""
    wave = noise(32_000)
    write_aac(tmp_path / "a.m4a", wave, SAMPLING_RATE)
    expected = read_audio(tmp_path / "a.m4a")
    (tmp_path / "a.m4a").rename(tmp_path / "a.wav")
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav"), expected)
    sf.write(tmp_path / "b.wav", wave, SAMPLING_RATE)
    (tmp_path / "b.wav").rename(tmp_path / "b.m4a")
    np.testing.assert_allclose(read_audio(tmp_path / "b.m4a", 0.5, 1), wave[8_000:24_000], atol=2**-15)
    with av.open(str(tmp_path / "c.ogg"), "w") as container:
        stream = container.add_stream("flac", rate=SAMPLING_RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray((wave[None] * 32768).astype(np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts = SAMPLING_RATE, 0
        fit = av.AudioResampler("s16", "mono", SAMPLING_RATE, frame_size=stream.codec_context.frame_size)
        for part in (*fit.resample(frame), *fit.resample(None), None):
            container.mux(stream.encode(part))
    np.testing.assert_allclose(read_audio(tmp_path / "c.ogg"), wave, atol=2**-14)


def wav_bytes(wave, data_size=None, riff_size=None, rate=SAMPLING_RATE, extra=b""):
    """A 16-bit WAV whose header says what is wanted."""
    data = (wave * 32768).astype("<i2").tobytes()
    size = len(data) if data_size is None else data_size
    riff = 36 + len(data) if riff_size is None else riff_size
    head = b"RIFF" + struct.pack("<I", riff) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, rate, 32_000, 2, 16)
    return head + extra + b"data" + struct.pack("<I", size) + data


LIST = b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + struct.pack("<I", 14) + b"Lavf58.29.100\0"


@pytest.mark.parametrize("extra", [b"", LIST])
@pytest.mark.parametrize("riff_size", [0, 8, 36, 2**32 - 1])
@pytest.mark.parametrize("data_size", [0, 2**31 - 36, 2**32 - 1])
def test_a_wav_whose_recorder_was_killed_or_wrote_to_a_pipe_gives_what_is_there(tmp_path, extra, riff_size, data_size):
    (tmp_path / "a.wav").write_bytes(wav_bytes(noise(38_400), data_size, riff_size, extra=extra))
    wave, told = read_with_warnings(tmp_path / "a.wav")
    np.testing.assert_allclose(wave, noise(38_400), atol=2**-14)
    assert not told and audio_info(tmp_path / "a.wav").seconds == 2.4
    assert len(read_audio(tmp_path / "a.wav", 1.0, 0.5)) == 8_000


def test_a_flac_that_was_written_to_a_pipe_is_read(tmp_path):
    """Its header does not say how long it is."""
    sf.write(tmp_path / "a.flac", noise(40_000), SAMPLING_RATE)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    content[21] &= 0xF0  # the 36 bits of STREAMINFO that count the samples
    content[22:26] = bytes(4)
    (tmp_path / "a.flac").write_bytes(content)
    assert audio_info(tmp_path / "a.flac").seconds == 2.5
    np.testing.assert_allclose(read_audio(tmp_path / "a.flac", 1, 1), noise(40_000)[16_000:32_000], atol=2**-14)


@pytest.mark.parametrize("suffix", ["wav", "aiff", "au", "w64", "mp3", "ogg", "opus", "aac"])
def test_a_file_that_was_cut_in_half_gives_its_first_half_and_says_so(tmp_path, suffix):
    path, seconds = tmp_path / f"a.{suffix}", 30
    wave = noise(SAMPLING_RATE * seconds)
    if suffix == "aac":
        write_aac(path, wave, SAMPLING_RATE)
    else:
        sf.write(path, wave, SAMPLING_RATE, **({"format": "OGG", "subtype": "OPUS"} if suffix == "opus" else {}))
    assert read_with_warnings(path)[1] == []
    truncated(path, 0.5)
    part, told = read_with_warnings(path)
    assert len(part) / SAMPLING_RATE == pytest.approx(seconds / 2, abs=2)
    (message,) = told
    assert str(path) in message and "is cut off: it ends at 1" in message
    assert read_with_warnings(path, 1.0, 2.0)[1] == []  # which is there


@pytest.mark.parametrize("rate", [0, 1, 999, 2_000_000, 2**32 - 1])
def test_a_sampling_rate_that_no_speech_has_is_refused(tmp_path, rate):
    (tmp_path / "a.wav").write_bytes(wav_bytes(noise(16_000), rate=rate))
    for use in (audio_info, read_audio):
        with pytest.raises(AudioError, match="a.wav"):
            use(tmp_path / "a.wav")


@pytest.mark.parametrize("rate", [44_101, 11_127, 15_999, 192_000])
def test_odd_rates_are_resampled_within_memory(tmp_path, rate):
    sf.write(tmp_path / "a.wav", tone(440, rate, 2.0), rate)
    wave = read_audio(tmp_path / "a.wav")
    assert len(wave) == pytest.approx(32_000, abs=3)
    spectrum = np.abs(np.fft.rfft(wave[:32_000] * np.hanning(len(wave[:32_000]))))
    assert spectrum.argmax() == 880 and spectrum[870:891].sum() > 0.99 * spectrum.sum()


def test_a_header_that_claims_more_than_memory_holds_is_read_as_far_as_it_goes(tmp_path):
    sf.write(tmp_path / "a.flac", noise(40_000), SAMPLING_RATE)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    content[21] |= 0x0F
    (tmp_path / "a.flac").write_bytes(content)
    try:
        assert len(read_audio(tmp_path / "a.flac")) <= 40_000
    except AudioError as error:
        assert "a.flac" in str(error)


def test_many_channels_one_sample_24_bits_and_loud_floats(tmp_path):
    wave = noise(16_000)
    sf.write(tmp_path / "8.wav", np.repeat(wave[:, None], 8, axis=1), SAMPLING_RATE, subtype="PCM_24")
    np.testing.assert_allclose(read_audio(tmp_path / "8.wav"), wave, atol=1e-6)
    sf.write(tmp_path / "1.wav", wave[:1], 192_000)
    assert len(read_audio(tmp_path / "1.wav")) == 1
    sf.write(tmp_path / "loud.wav", 40 * wave, SAMPLING_RATE, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "loud.wav"), 40 * wave, rtol=1e-6)


@pytest.mark.parametrize("content", ["#EXTM3U\n#EXTINF:2,\nsecret.wav\n", "ffconcat version 1.0\nfile secret.wav\n"])
@pytest.mark.parametrize("name", ["a.m4a", "a.wav", "a.m3u8"])
def test_a_list_of_other_files_is_not_followed(tmp_path, content, name):
    sf.write(tmp_path / "secret.wav", noise(16_000), SAMPLING_RATE)
    (tmp_path / name).write_text(content)
    with pytest.raises(AudioError, match=name):
        read_audio(tmp_path / name)


@pytest.mark.parametrize("name", [b"caf\xe9.wav", b"caf\xe9.m4a", b"100%\n.flac", b"x" * 250 + b".ogg"])
def test_names_of_any_bytes_are_opened(tmp_path, name):
    path, suffix = tmp_path / os.fsdecode(name), os.fsdecode(name).rsplit(".")[-1]
    plain = tmp_path / f"plain.{suffix}"
    write_aac(plain, noise(16_000), SAMPLING_RATE) if suffix == "m4a" else sf.write(plain, noise(16_000), SAMPLING_RATE)
    plain.rename(path)
    assert len(read_audio(path)) == pytest.approx(16_000, abs=1_024) and audio_info(str(path)).seconds >= 1
