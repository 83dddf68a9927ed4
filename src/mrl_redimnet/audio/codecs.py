"""Speech codecs: encoded and decoded again at a telephone's 8 kHz or at 16 kHz; bands; packets lost on the way."""

from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache, partial
from io import BytesIO
from typing import NamedTuple

import av
import numpy as np
import soundfile as sf
import torch
from torchaudio.functional import resample

from configuration_mrl_redimnet import SAMPLING_RATE
from mrl_redimnet.audio.io import AudioError
from mrl_redimnet.extras import extra

TELEPHONE_RATE = 8_000
PACKET = 160  # samples of 20 ms at 8 kHz, the frame of every codec there and the usual payload of G.711 over RTP
_FADE_OUT = 480  # samples of 60 ms at 8 kHz, after which G.711's Appendix I has faded a concealment to silence
_AMR_MODES = (4750, 5150, 5900, 6700, 7400, 7950, 10200, 12200)  # bits per second, 3GPP TS 26.071
_OPUS_RATES = (6_000, 16_000)  # bits per second
_OPUS_WIDE_RATES = (14_000, 40_000)  # bits per second; below 14 000 it gives up the upper band
_MP3_RATES = (16_000, 24_000, 32_000, 40_000, 48_000, 64_000)  # bits per second that MPEG-2 Layer III has
_AAC_RATES = (16_000, 64_000)  # bits per second
_VORBIS_LEVELS = (0.0, 1.0)  # libsndfile's compression level, 1 least the quality of libvorbis


# ---------------------------------------------------------------- bands


def band_limited(audio: np.ndarray, low: float, high: float, rate: int = SAMPLING_RATE, order: int = 4) -> np.ndarray:
    """audio [samples] float32 at `rate` Hz, of which `low` to `high` Hz are left (low 0: from the bottom on).

    A Butterworth of `order`, forwards and backwards: zero phase, -6 dB at the edges.
    """
    with extra("evaluation"):
        from scipy.signal import sosfiltfilt

    sections = _band_filter(low, high, rate, order)
    # scipy extends the signal at both ends by as many of its own samples, and refuses one that has fewer.
    padding = min(3 * (2 * len(sections) + 1), len(audio) - 1)
    return sosfiltfilt(sections, audio, padlen=padding).astype(np.float32)


@lru_cache(maxsize=64)
def _band_filter(low: float, high: float, rate: int, order: int) -> np.ndarray:
    with extra("evaluation"):
        from scipy.signal import butter

    if low == 0:
        return butter(order, high, "lowpass", fs=rate, output="sos")
    return butter(order, (low, high), "bandpass", fs=rate, output="sos")


def resampled(audio: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """audio [samples] float32 at another rate. The long filter keeps what is near 4 kHz from appearing above it."""
    return resample(torch.from_numpy(audio), rate, new_rate, lowpass_filter_width=32).numpy()


# ---------------------------------------------------------------- packets


def lose_packets(audio: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """audio [whole 20 ms packets] float32 at 8 kHz with every packet lost with the probability `share`.

    Lost packets are concealed on the decoded audio by repeating the last good one, faded linearly to silence over the
    first 60 ms of the gap (as ITU-T G.711 Appendix I, but by packets instead of pitch periods); the decoder's own
    state is not disturbed. Before the first good packet there is silence.
    """
    packets = audio.reshape(-1, PACKET)
    positions = np.arange(len(packets))
    lost = rng.random(len(packets)) < share
    last_good = np.maximum.accumulate(np.where(lost, -1, positions))
    into_gap = (positions - last_good - 1)[:, None] * PACKET + np.arange(PACKET)
    gain = np.where(lost[:, None], np.clip(1 - into_gap / _FADE_OUT, 0, 1), 1.0)
    gain[last_good < 0] = 0
    return (packets[last_good] * gain).astype(np.float32).reshape(-1)


# ---------------------------------------------------------------- codecs


def through_codec(name: str, audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """audio [samples] float32 at 16 kHz, encoded and decoded by a codec of `CODECS`: the same samples, place and level.

    A codec of 8 kHz leaves nothing above 4 kHz. A peak above full scale is scaled down for the codec, and back.
    Raises AudioError for a codec that fails.
    """
    rate = CODECS[name].rate
    whole = np.pad(audio, (0, -len(audio) % (PACKET * SAMPLING_RATE // TELEPHONE_RATE)))
    line = whole if rate == SAMPLING_RATE else resampled(whole, SAMPLING_RATE, rate)
    scale = max(1.0, float(np.abs(line).max()))
    line = transcode(name, line / np.float32(scale), rng)
    wide = line if rate == SAMPLING_RATE else resampled(line, rate, SAMPLING_RATE)
    return wide[: len(audio)] * np.float32(scale)


def transcode(name: str, audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """audio [whole 20 ms packets] float32, within full scale, encoded and decoded, without the codec's delay.

    name: in `CODECS`, whose rate the audio has; the generator draws its bit rate where it has several. Raises
    AudioError for a codec that fails.
    """
    codec = CODECS[name]
    pcm = np.clip(np.round(audio * 2**15), -(2**15), 2**15 - 1).astype(np.int16)
    amount = f"{len(pcm)} samples at {codec.rate // 1000} kHz"
    try:
        decoded = codec.run(pcm, rng)
    except (sf.SoundFileError, av.FFmpegError, av.codec.codec.UnknownCodecError) as error:
        raise AudioError(f"codec {name} failed on {amount} ({error}): leave it out of codecs") from error
    aligned = decoded[codec.delay : codec.delay + len(pcm)]
    if len(aligned) < len(pcm):
        raise AudioError(f"codec {name} gave {len(decoded)} samples for {amount}: leave it out of codecs")
    return aligned


def _run_sndfile(subtype: str, pcm: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """pcm [samples] int16 at 8 kHz -> decoded [samples] float32, by libsndfile's codec `subtype`."""
    form = dict(samplerate=TELEPHONE_RATE, format="RAW", subtype=subtype)
    coded = BytesIO()
    sf.write(coded, pcm, **form)
    coded.seek(0)
    return sf.read(coded, dtype="float32", channels=1, **form)[0]


def _run_amr_nb(pcm: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return run_ffmpeg("libopencore_amrnb", pcm, TELEPHONE_RATE, int(rng.choice(_AMR_MODES)))


def _run_opus(rate: int, bit_rates: tuple[int, int], pcm: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    bit_rate = int(rng.integers(*bit_rates, endpoint=True))
    return run_ffmpeg("libopus", pcm, rate, bit_rate, {"application": "voip", "frame_duration": "20"})


def _run_mp3(pcm: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return run_ffmpeg("mp3", pcm, SAMPLING_RATE, int(rng.choice(_MP3_RATES)))


def _run_aac(pcm: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return run_ffmpeg("aac", pcm, SAMPLING_RATE, int(rng.integers(*_AAC_RATES, endpoint=True)))


def _run_g722(pcm: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return run_ffmpeg("g722", np.pad(pcm, (0, CODECS["g722"].delay)), SAMPLING_RATE, 64_000)


def _run_vorbis(pcm: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    coded = BytesIO()
    sf.write(
        coded, pcm, SAMPLING_RATE, format="OGG", subtype="VORBIS", compression_level=float(rng.uniform(*_VORBIS_LEVELS))
    )
    coded.seek(0)
    return sf.read(coded, dtype="float32")[0]


def run_ffmpeg(
    name: str, pcm: np.ndarray, rate: int, bit_rate: int, options: dict[str, str] | None = None
) -> np.ndarray:
    """pcm [samples] int16 at `rate` Hz -> decoded [samples] float32 at that rate, by the FFmpeg library's codec."""
    encoder = av.CodecContext.create(name, "w")
    formats = [form.name for form in encoder.codec.audio_formats]
    encoder.sample_rate, encoder.layout = rate, "mono"
    encoder.format = "s16" if "s16" in formats else formats[0]
    encoder.time_base, encoder.bit_rate, encoder.options = Fraction(1, rate), bit_rate, options or {}
    frame = av.AudioFrame.from_ndarray(pcm[None], format="s16", layout="mono")
    frame.sample_rate = rate
    packets = encoder.encode(frame) + encoder.encode(None)
    decoder = av.CodecContext.create(name, "r")
    decoder.sample_rate, decoder.layout, decoder.extradata = rate, "mono", encoder.extradata
    frames = [frame for packet in [*packets, None] for frame in decoder.decode(packet)]
    decoded = np.concatenate([frame.to_ndarray()[0] for frame in frames])
    full_scale = 2**15 if decoded.dtype == np.int16 else 1  # decoders give s16 or float, whatever was encoded
    decoded = decoded.astype(np.float32) / full_scale
    if decoder.sample_rate == rate:
        return decoded
    # FFmpeg decodes Opus at 48 kHz whatever the input. It holds nothing above it then: the short filter will do.
    return resample(torch.from_numpy(decoded), decoder.sample_rate, rate).numpy()


class Codec(NamedTuple):
    """run(pcm [samples] int16, generator) -> decoded [samples] float32, `delay` samples late, both at `rate` Hz."""

    run: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    delay: int
    rate: int = TELEPHONE_RATE


# Delays are the peaks of the cross-correlation of input and output, both resampled to 48 kHz, over four synthetic
# utterances, equal for every bit rate: 39.4 samples of AMR (its encoder looks 5 ms ahead), none of the others of 8 kHz.
# The decoder of Opus takes out its own, which the encoder announces in its header, as do MP3's and Vorbis's. AAC's
# overlap is a frame of 1024, G.722's two filter banks take 22.
CODECS = {
    "mulaw": Codec(partial(_run_sndfile, "ULAW"), delay=0),  # ITU-T G.711
    "alaw": Codec(partial(_run_sndfile, "ALAW"), delay=0),  # ITU-T G.711
    "gsm": Codec(partial(_run_sndfile, "GSM610"), delay=0),  # GSM 06.10 full rate, ETSI EN 300 961
    "amr_nb": Codec(_run_amr_nb, delay=39),  # 3GPP TS 26.071
    "opus": Codec(partial(_run_opus, TELEPHONE_RATE, _OPUS_RATES), delay=0),  # RFC 6716
    "opus_wide": Codec(partial(_run_opus, SAMPLING_RATE, _OPUS_WIDE_RATES), delay=0, rate=SAMPLING_RATE),
    "g722": Codec(_run_g722, delay=22, rate=SAMPLING_RATE),  # ITU-T G.722
    "mp3": Codec(_run_mp3, delay=0, rate=SAMPLING_RATE),  # ISO/IEC 13818-3, Layer III
    "aac": Codec(_run_aac, delay=1024, rate=SAMPLING_RATE),  # ISO/IEC 13818-7, low complexity
    "vorbis": Codec(_run_vorbis, delay=0, rate=SAMPLING_RATE),  # Vorbis I, Xiph.Org
}


def telephone_codecs() -> list[str]:
    """Names in `CODECS` of the codecs that run at 8 kHz."""
    return [name for name, codec in CODECS.items() if codec.rate == TELEPHONE_RATE]
