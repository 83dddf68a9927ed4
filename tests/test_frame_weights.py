"""Weights of frames in the pooling: of the parts of an utterance, and of several speakers in one recording."""

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import padded, tiny_config, tiny_model, waves

from mrl_redimnet.export import export_onnx_weights
from mrl_redimnet.speed import speed_up
from mrl_redimnet_cli import main

CLOSE = dict(rtol=1e-5, atol=1e-5)
POOLINGS = ("ASTP", "TSTP", "TSDP", "TAP")
VARIANTS = [*POOLINGS, "without context", "redimnet2", "faster forms"]


def model_of(variant: str):
    if variant == "redimnet2":
        return tiny_model(tiny_config("redimnet2_dual"))
    if variant == "without context":
        return tiny_model(tiny_config(pooling_context=False))
    if variant == "faster forms":
        return speed_up(tiny_model())
    return tiny_model(tiny_config(pooling=variant))


def embed(model, *arguments, **options) -> torch.Tensor:
    with torch.inference_mode():
        return model(*arguments, **options).embeddings


@pytest.fixture(params=VARIANTS)
def network(request):
    return model_of(request.param)


def test_ones_change_nothing(network):
    batch = padded(waves(9_000, 16_000))
    expected = embed(network, **batch)
    assert torch.equal(embed(network, **batch, frame_weights=torch.ones(2, 31)), expected)
    several = embed(network, **batch, frame_weights=torch.ones(2, 3, 31))
    assert several.shape == (2, 3, 32) and torch.equal(several, expected[:, None].expand(-1, 3, -1))


@pytest.mark.parametrize("factor", [1e-4, 0.5, 7.0, 1e4])
def test_only_ratios_matter(network, factor):
    batch = padded(waves(9_000, 16_000))
    weights = torch.rand(2, 50) + 0.01
    weights[:, 10:15] = 0
    expected = embed(network, **batch, frame_weights=weights)
    torch.testing.assert_close(embed(network, **batch, frame_weights=factor * weights), expected, **CLOSE)
    equal = embed(network, **batch, frame_weights=torch.full((2, 50), factor))
    torch.testing.assert_close(equal, embed(network, **batch), **CLOSE)


def test_zeros_are_as_padding(network):
    """To the pooling a frame of weight 0 is one behind the utterance's end."""
    x = torch.randn(2, 40, network.pooling.attention_in.in_features if hasattr(network.pooling, "attention_in") else 24)
    mask = torch.arange(40)[None, :, None] < torch.tensor([25, 40])[:, None, None]
    with torch.inference_mode():
        torch.testing.assert_close(network.pooling(x, None, mask.float()), network.pooling(x, mask), **CLOSE)


def test_a_frame_that_counts_twice_is_there_twice():
    """Of statistics without attention, whole weights are counts; the variance is that of weights, not of counts."""
    pooling = model_of("TAP").pooling
    x, counts = torch.randn(1, 6, 24), torch.tensor([1, 3, 0, 2, 1, 1])
    repeated = x.repeat_interleave(counts, 1)
    torch.testing.assert_close(pooling(x, None, counts[None, :, None].float()), pooling(repeated, None))


def test_several_speakers_from_one_pass(network):
    batch = padded(waves(9_000, 16_000))
    weights = torch.rand(2, 3, 40).round()  # who speaks when
    weights[..., 0] = 1
    together = embed(network, **batch, frame_weights=weights)
    for speaker in range(3):
        alone = embed(network, **batch, frame_weights=weights[:, speaker])
        torch.testing.assert_close(together[:, speaker], alone, **CLOSE)
    short = embed(network, **batch, frame_weights=weights, truncate_dim=8)
    torch.testing.assert_close(short, together[..., :8], **CLOSE)


def test_nobody_has_no_embedding(network):
    weights = torch.zeros(2, 2, 10)
    weights[0, 0] = weights[1, 1, 3] = 1
    found = embed(network, torch.stack(waves(9_000, 9_000)), frame_weights=weights)
    assert found.isfinite().all(-1).tolist() == [[True, False], [False, True]]
    assert found[0, 1].isnan().all() and found[1, 0].isnan().all()


def test_padding_does_not_count():
    """Weights are of the whole padded row; what they say of padding is nothing."""
    model, wave = tiny_model(), waves(8_000)[0]
    weights = torch.rand(1, 20) + 0.1
    expected = embed(model, wave[None], frame_weights=weights)
    batch = padded([wave, waves(16_000)[0]])
    of_row = torch.cat([weights, torch.full_like(weights, 9.0)], 1).repeat(2, 1)
    torch.testing.assert_close(embed(model, **batch, frame_weights=of_row)[:1], expected, rtol=2e-2, atol=2e-2)


def test_a_long_recording_is_cut_with_its_weights():
    """Windows without weight do not count, and the others by the sum of theirs."""
    model = tiny_model(tiny_config(window_seconds=1.0))
    wave = torch.cat(waves(16_000, 16_000, 16_000))[None]
    weights = torch.zeros(1, 2, 300)
    weights[:, 0, :200], weights[:, 1, 250:] = 1, 0.5
    found = embed(model, wave, frame_weights=weights)[0]
    first = embed(model, wave[:, :16_000]) / 2 + embed(model, wave[:, 16_000:32_000]) / 2
    half = embed(model, wave[:, 32_000:], frame_weights=weights[:, 1, 200:])
    torch.testing.assert_close(found[:1], first, **CLOSE)
    torch.testing.assert_close(found[1:], half, **CLOSE)


def test_gradients_reach_the_weights():
    model, weights = tiny_model(), torch.rand(1, 20).requires_grad_()
    model(waves(8_000)[0][None], frame_weights=weights).embeddings.sum().backward()
    assert weights.grad.isfinite().all() and weights.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "weights, message",
    [
        (torch.ones(3, 10), r"for a batch of 2, got shape \(3, 10\)"),
        (torch.ones(10), r"for a batch of 2, got shape \(10,\)"),
        (torch.ones(2, 0), r"got shape \(2, 0\)"),
        (torch.tensor([[1.0, -1.0]] * 2), "finite numbers of at least 0"),
        (torch.tensor([[1.0, torch.nan]] * 2), "finite numbers of at least 0"),
    ],
)
def test_what_is_wrong_with_weights(weights, message):
    with pytest.raises(ValueError, match=f"frame_weights: .*{message}"):
        embed(tiny_model(), torch.stack(waves(8_000, 8_000)), frame_weights=weights)


@pytest.mark.parametrize("variant", ["ASTP", "redimnet2"])
def test_exported_with_weights(variant, tmp_path):
    """Any batch, length and number of parts; by the names that diart's models have."""
    network = model_of(variant)
    export_onnx_weights(network, tmp_path / "x.onnx", facts={"base": "me/x"})
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["base"] == "me/x"
    for batch, samples, parts in ((1, 5_000, 1), (3, 16_000, 589)):
        wave, weights = 0.1 * torch.randn(batch, 1, samples), torch.rand(batch, parts)
        weights[:, : parts // 2] = 0
        (found,) = session.run(["embedding"], {"waveform": wave.numpy(), "weights": weights.numpy()})
        expected = embed(network, wave[:, 0], frame_weights=weights)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)
    silent = session.run(["embedding"], {"waveform": wave.numpy(), "weights": 0 * weights.numpy()})[0]
    assert np.isnan(silent).all()


def test_the_command_exports_with_weights(tmp_path, folder):
    out = tmp_path / "x.onnx"
    assert main(["export", str(folder), "--to", "onnx-weights", "--out", str(out)]) == 0 and out.exists()
    assert main(["export", str(folder), "--to", "onnx-weights", "--out", str(out), "--overwrite", "--no-mask"]) == 2
