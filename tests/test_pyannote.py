"""The plug for pyannote.audio: the encoder's own embeddings, the network once for a chunk, whole pipelines."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import at_most, tiny_config, tiny_model, waves
from hypothesis import given
from hypothesis import strategies as st

from mrl_redimnet import SpeakerEncoder
from mrl_redimnet.diarization.plda import PLDA

pytest.importorskip("pyannote.audio", reason="pyannote.audio is not installed: pip install '.[pyannote]'")

from pyannote.audio import Inference
from pyannote.audio.core.task import Problem, Resolution, Specifications
from pyannote.audio.models.segmentation import PyanNet
from pyannote.audio.pipelines import SpeakerDiarization
from pyannote.audio.pipelines.speaker_verification import PretrainedSpeakerEmbedding
from pyannote.audio.telemetry.metrics import is_metrics_enabled
from pyannote.core import Annotation, Segment, Timeline
from pyannote.metrics.diarization import DiarizationErrorRate

from mrl_redimnet.diarization.pyannote import ReDimNetEmbedding, diarization_pipeline

pytestmark = pytest.mark.slow  # see conftest

CLOSE = dict(rtol=1e-5, atol=1e-5)
SEGMENTATION = os.environ.get("MRL_SEGMENTATION")  # pytorch_model.bin of pyannote's segmentation-3.0
MEETINGS = os.environ.get("MRL_MEETINGS")  # a folder of .flac with meetings.rttm and meetings.uem


class Counting(ReDimNetEmbedding):
    """Counts the waveforms that the network goes over."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.rows: list[int] = []
        self.redimnet.trunk.register_forward_pre_hook(lambda module, inputs: self.rows.append(len(inputs[0])))


@pytest.fixture(scope="module")
def encoder() -> SpeakerEncoder:
    return SpeakerEncoder(tiny_model())


@pytest.fixture
def plug(encoder) -> Counting:
    return Counting(encoder)


def chunks(count: int, speakers: int, samples: int = 8_000) -> torch.Tensor:
    """Chunks as pyannote sends them, each once for every local speaker: [count * speakers, 1, samples]."""
    return torch.stack(waves(*[samples] * count)).repeat_interleave(speakers, 0)[:, None]


def masks(rows: int, parts: int, seed: int = 0) -> torch.Tensor:
    """Who speaks when, [rows, parts]; in each row somebody does."""
    found = torch.rand(rows, parts, generator=torch.Generator().manual_seed(seed)).round()
    found[:, 0] = 1
    return found


# ---------------------------------------------------------------- embeddings


@pytest.mark.parametrize("dim", [None, 8, 5])
def test_without_weights_it_is_the_encoder(encoder, dim):
    plug, found = ReDimNetEmbedding(encoder, dim), waves(8_000, 8_000, 8_000)
    embeddings = plug(torch.stack(found)[:, None])
    assert embeddings.shape == (3, plug.dimension) and plug.dimension == (dim or 32)
    np.testing.assert_allclose(embeddings.numpy(), encoder.embed(found, dim), **CLOSE)
    ones = plug(torch.stack(found)[:, None], torch.ones(3, 77))
    np.testing.assert_allclose(ones.numpy(), encoder.embed(found, dim), **CLOSE)


@at_most(20)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=8),  # which chunk each row is
    st.integers(1, 120),
    st.integers(0, 2**31),
    st.integers(1, 8),
)
def test_with_weights_it_is_the_model(encoder, which, parts, seed, batch):
    """However many parts a mask has, whoever is silent, and wherever batches end."""
    plug, given_waves = ReDimNetEmbedding(encoder), torch.stack(waves(*[4_000] * 4))[which][:, None]
    weights = masks(len(which), parts, seed)
    weights[torch.rand(len(which), generator=torch.Generator().manual_seed(seed)) < 0.3] = 0
    with torch.inference_mode():
        expected = encoder.model(given_waves[:, 0], frame_weights=weights).embeddings
        rows = zip(given_waves.split(batch), weights.split(batch), strict=True)
        found = torch.cat([plug(some, weights=theirs) for some, theirs in rows])
    torch.testing.assert_close(found, expected, equal_nan=True, **CLOSE)


def test_several_speakers_of_each_waveform(encoder, plug):
    given_waves, weights = torch.stack(waves(8_000, 8_000))[:, None], masks(6, 40).view(2, 3, 40)
    with torch.inference_mode():
        found = plug(given_waves, weights)
        expected = encoder.model(given_waves[:, 0], frame_weights=weights).embeddings
    assert found.shape == (2, 3, 32) and plug.rows == [2]
    torch.testing.assert_close(found, expected, **CLOSE)


def test_longer_than_the_models_window():
    encoder = SpeakerEncoder(tiny_model(tiny_config(window_seconds=0.5)))
    given_waves, weights = torch.stack(waves(20_000, 20_000))[:, None], masks(6, 40).view(2, 3, 40)
    plug = ReDimNetEmbedding(encoder, 8)
    with torch.inference_mode():
        expected = encoder.model(given_waves[:, 0], frame_weights=weights).embeddings[..., :8]
        torch.testing.assert_close(plug(given_waves, weights), expected, **CLOSE)


def test_other_poolings_and_networks():
    for config in (tiny_config("redimnet2_dual"), tiny_config(pooling="TSTP"), tiny_config(pooling_context=False)):
        encoder = SpeakerEncoder(tiny_model(config))
        given_waves, weights = chunks(2, 3), masks(6, 50)
        with torch.inference_mode():
            expected = encoder.model(given_waves[:, 0], frame_weights=weights).embeddings
            torch.testing.assert_close(ReDimNetEmbedding(encoder)(given_waves, weights), expected, **CLOSE)


def test_the_network_goes_over_a_chunk_once(plug):
    given_waves, weights = chunks(4, 3), masks(12, 59)
    with torch.inference_mode():
        plug(given_waves, weights)
        assert plug.rows == [4]
        for row in range(12):  # pyannote's own batch size is 1; the last chunk of the call before is still there
            plug(given_waves[[row - 1]], weights[[row - 1]])
        assert sum(plug.rows) == 4 + 4  # the last one comes a second time at the end
        plug.rows.clear()
        for start in (0, 5, 10):  # batches that end in the middle of a chunk
            plug(given_waves[start : start + 5], weights[start : start + 5])
        assert sum(plug.rows) == 4
        plug.rows.clear()
        weights[3:9] = 0  # nobody speaks in the second and third
        assert plug(given_waves, weights).isnan().any(1).tolist() == [False] * 3 + [True] * 6 + [False] * 3
        assert plug.rows == [2]
        assert plug(given_waves, 0 * weights).isnan().all() and plug.rows == [2]


def test_what_is_kept_is_never_out_of_date(encoder, plug):
    """A copy of the encoder; where gradients flow nothing is kept; nor does it travel."""
    given_waves, weights = chunks(1, 3), masks(3, 20)
    with torch.inference_mode():
        expected = plug(given_waves, weights)
        again = pickle.loads(pickle.dumps(ReDimNetEmbedding(encoder)))
        torch.testing.assert_close(again(given_waves, weights), expected, **CLOSE)
        assert len(pickle.dumps(again)) < len(pickle.dumps(ReDimNetEmbedding(encoder))) + 2_000
        torch.testing.assert_close(copy.deepcopy(again)(given_waves, weights), expected, **CLOSE)
    other = ReDimNetEmbedding(encoder).requires_grad_(True)
    first = other(given_waves, weights)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    second = other(given_waves, weights)
    assert first.requires_grad and not torch.allclose(first, second)
    torch.testing.assert_close(plug(given_waves, weights), expected, **CLOSE)


def test_adapters(folder, adapters):
    """The one that is in use when the plug is made, merged or not."""
    merged = SpeakerEncoder.from_pretrained(folder, adapters / "telephony", device="cpu")
    several = SpeakerEncoder.from_pretrained(folder, device="cpu")
    plain = ReDimNetEmbedding(several)
    several.adapters.add("telephony", adapters / "telephony", any_base=True)
    several.adapters.set_adapter("telephony")
    chosen = ReDimNetEmbedding(several)
    several.adapters.disable()
    given_waves = torch.stack(waves(8_000, 8_000))[:, None]
    with torch.inference_mode():
        expected = merged.embed(list(given_waves[:, 0]))
        np.testing.assert_allclose(ReDimNetEmbedding(merged)(given_waves), expected, **CLOSE)
        np.testing.assert_allclose(chosen(given_waves), expected, rtol=1e-3, atol=1e-4)
        assert not np.allclose(plain(given_waves), expected, rtol=0.1)


@pytest.mark.parametrize(
    ("given_waves", "weights", "message"),
    [
        (torch.zeros(2, 8_000), None, r"expected \[batch, 1, samples\], got shape \(2, 8000\)"),
        (torch.zeros(2, 2, 8_000), None, r"got shape \(2, 2, 8000\)"),
        (torch.zeros(2, 1, 10), None, "10 samples, the model needs at least"),
        (torch.zeros(2, 1, 10), torch.ones(2, 5), "10 samples, the model needs at least"),
        (torch.zeros(2, 1, 8_000), torch.ones(3, 5), r"for a batch of 2, got shape \(3, 5\)"),
        (torch.zeros(2, 1, 8_000), -torch.ones(2, 5), "finite numbers of at least 0"),
    ],
)
def test_what_is_wrong(plug, given_waves, weights, message):
    with pytest.raises(ValueError, match=message):
        plug(given_waves, weights)


def test_a_dimension_that_there_is_not(encoder):
    with pytest.raises(ValueError, match="are not between 1 and the embedding's 32 dimensions"):
        ReDimNetEmbedding(encoder, 33)


# ---------------------------------------------------------------- as pyannote calls it


def test_pyannotes_wrapper_takes_it(encoder):
    wrapped = PretrainedSpeakerEmbedding(ReDimNetEmbedding(encoder, 16))
    assert (wrapped.dimension, wrapped.sample_rate, wrapped.metric) == (16, 16_000, "cosine")
    assert wrapped.min_num_samples == encoder.config.min_samples
    assert wrapped.to(torch.device("cpu")) is wrapped
    weights = masks(6, 59)
    weights[1] = 0
    found = wrapped(chunks(2, 3), weights)
    assert found.shape == (6, 16) and found.dtype == np.float32
    assert np.isnan(found).all(1).tolist() == [False, True, False, False, False, False]


def test_inference_with_windows(encoder):
    """pyannote's own sliding window, and a file as a whole."""
    wave = waves(48_000)[0]
    file = {"waveform": wave[None], "sample_rate": 16_000}
    whole = Inference(ReDimNetEmbedding(encoder), window="whole")(file)
    np.testing.assert_allclose(whole, encoder.embed([wave])[0], **CLOSE)
    sliding = Inference(ReDimNetEmbedding(encoder), duration=1.5, step=0.75)(file)
    _, expected = encoder.embed_windows(wave, 1.5, 0.75)
    np.testing.assert_allclose(sliding.data, expected, **CLOSE)


@pytest.fixture(scope="module")
def segmentation() -> PyanNet:
    """pyannote's network with random weights, and powers of sets as segmentation-3.0 has them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = PyanNet(lstm={"hidden_size": 8, "num_layers": 1}, linear={"hidden_size": 8, "num_layers": 1})
        network.specifications = Specifications(
            problem=Problem.MONO_LABEL_CLASSIFICATION,
            resolution=Resolution.FRAME,
            duration=2.0,
            classes=["a", "b", "c"],
            powerset_max_classes=2,
            permutation_invariant=True,
        )
        network.build()
        torch.nn.init.normal_(network.classifier.weight, std=20.0)  # so that everybody speaks now and then
        return network.eval()


@pytest.fixture(scope="module")
def meeting() -> dict:
    return {"waveform": torch.cat(waves(*[16_000] * 6))[None], "sample_rate": 16_000, "uri": "meeting"}


@pytest.fixture(scope="module")
def plda(encoder, tmp_path_factory) -> Path:
    """Of made-up embeddings of the encoder's size."""
    random = np.random.default_rng(0)
    means = np.repeat(random.normal(size=(20, 32)), 6, 0)
    made = PLDA.fit(means + 0.3 * random.normal(size=means.shape), np.repeat(np.arange(20), 6), 8, encoder.fingerprint)
    folder = tmp_path_factory.mktemp("made") / "plda"
    made.save(folder)
    return folder


@pytest.mark.parametrize("clustering", ["agglomerative", "vbx"])
def test_a_pipeline(encoder, segmentation, meeting, plda, clustering):
    """From audio in memory to turns, with a network of random weights for who speaks when."""
    pipeline = diarization_pipeline(encoder, segmentation, plda if clustering == "vbx" else None, batch_size=4)
    assert pipeline.embedding_batch_size == 12 and pipeline.klustering.lower().startswith(clustering)
    output = pipeline(meeting)
    labels = output.speaker_diarization.labels()
    assert labels and output.speaker_embeddings.shape == (len(labels), 32)
    assert output.speaker_diarization.get_timeline().extent() in Segment(-0.1, 6.1)
    one = pipeline(meeting, num_speakers=1)
    assert len(one.speaker_diarization.labels()) == 1


def test_a_pipeline_of_ones_own(encoder, segmentation, meeting, plda):
    """Without this package's pipeline: the plug is an embedding as any other, and answers as one that repeats work."""

    class Naive(ReDimNetEmbedding):
        def forward(self, waveforms, weights=None):
            return self.redimnet(waveforms[:, 0], frame_weights=weights).embeddings

    found = []
    for embedding in (ReDimNetEmbedding(encoder), Naive(encoder)):
        pipeline = SpeakerDiarization(
            segmentation=segmentation, embedding=embedding, plda=str(plda), clustering="AgglomerativeClustering"
        )
        clustering = {"method": "centroid", "threshold": 0.5, "min_cluster_size": 1}
        pipeline.instantiate({"segmentation": {"min_duration_off": 0.0}, "clustering": clustering})
        found.append(pipeline(meeting))
    assert found[0].speaker_diarization == found[1].speaker_diarization
    np.testing.assert_allclose(found[0].speaker_embeddings, found[1].speaker_embeddings, rtol=1e-4, atol=1e-4)


def test_pyannote_reads_the_plda(plda):
    """Its own functions give the same numbers as ours, up to the sign of an axis."""
    from pyannote.audio.core.plda import PLDA as Theirs

    ours, theirs = PLDA.load(plda), Theirs.from_pretrained(plda)
    x = np.random.default_rng(1).normal(size=(9, 32))
    np.testing.assert_allclose(np.abs(theirs(x)), np.abs(ours.latent(x)), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(theirs.phi, ours.psi, rtol=1e-6)


def test_what_does_not_fit_is_told(encoder, segmentation, plda, tmp_path):
    with pytest.raises(FileNotFoundError, match="segmentation: no file nowhere"):
        diarization_pipeline(encoder, "nowhere")
    with pytest.raises(FileNotFoundError, match="xvec_transform.npz is missing"):
        diarization_pipeline(encoder, segmentation, tmp_path)
    with pytest.raises(ValueError, match=r"of 32 numbers, not of 8: give dim=32"):
        diarization_pipeline(encoder, segmentation, plda, dim=8)
    with pytest.raises(ValueError, match="of other weights than"):
        diarization_pipeline(SpeakerEncoder(tiny_model(seed=1)), segmentation, plda)


# ---------------------------------------------------------------- telemetry


def test_nobody_is_told_what_is_diarised():
    """pyannote was imported before the plug here."""
    assert not is_metrics_enabled()


@pytest.mark.parametrize(("chosen", "expected"), [(None, False), ("1", True), ("0", False)])
def test_who_runs_it_decides(chosen, expected):
    """By the variable; without it nobody is told."""
    environment = {key: value for key, value in os.environ.items() if key != "PYANNOTE_METRICS_ENABLED"}
    environment |= {} if chosen is None else {"PYANNOTE_METRICS_ENABLED": chosen}
    code = """import mrl_redimnet.diarization.pyannote
from pyannote.audio.telemetry.metrics import is_metrics_enabled
print(is_metrics_enabled())"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split()[-1:] == [str(expected)], done.stderr


# ---------------------------------------------------------------- real meetings


@pytest.mark.skipif(
    not (SEGMENTATION and MEETINGS), reason="set MRL_SEGMENTATION and MRL_MEETINGS to weights and a folder of meetings"
)
def test_real_meetings():
    """Half minutes of AMI: with real segmentation and the packaged model a pipeline beats one speaker for all."""
    pipeline = diarization_pipeline(SpeakerEncoder.from_pretrained("nano", device="cpu"), SEGMENTATION)
    turns: dict[str, Annotation] = {}
    for line in (Path(MEETINGS) / "meetings.rttm").read_text().splitlines():
        _, uri, _, start, length, _, _, speaker, *_ = line.split()
        turns.setdefault(uri, Annotation(uri=uri))[Segment(float(start), float(start) + float(length))] = speaker
    ours, one = DiarizationErrorRate(), DiarizationErrorRate()
    for uri, reference in turns.items():
        wave, rate = soundfile.read(Path(MEETINGS) / f"{uri}.flac", dtype="float32")
        found = pipeline({"waveform": torch.from_numpy(wave)[None], "sample_rate": rate, "uri": uri})
        everything = Timeline([Segment(0, len(wave) / rate)])
        ours(reference, found.speaker_diarization, uem=everything)
        somebody = Annotation(uri=uri)
        for segment in found.speaker_diarization.get_timeline().support():
            somebody[segment] = "somebody"
        one(reference, somebody, uem=everything)
    assert abs(ours) < 0.9 * abs(one) and abs(ours) < 0.35
