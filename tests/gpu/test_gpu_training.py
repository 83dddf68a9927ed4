"""Training on a GPU against float64 on the CPU. `pytest tests/gpu -rs`; without a GPU everything here is skipped, and
`MRL_TEST_DEVICE=cpu pytest tests/gpu` runs it on the CPU."""

import contextlib
import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import (
    VARIANTS,
    enable_checkpointing,
    leave_together,
    padded,
    relative_error,
    tiny_config,
    tiny_model,
    waves,
)
from peft import get_peft_model
from torch import nn

import train_hf
from configuration_mrl_redimnet import MRLReDimNetConfig
from masking_mrl_redimnet import BatchNorm
from modeling_mrl_redimnet import MRLReDimNetForXVector
from mrl_redimnet.adapters import lora_config
from mrl_redimnet.data.synthetic import make_corpus
from mrl_redimnet.speed import speed_up
from mrl_redimnet.speed.norms import synchronise_batch_norms

LABELS = torch.tensor([0, 3, 1, 3])
# Type of the weights, of autocast, and |ours - exact| / |exact| of all gradients together. Only float64 is exact (but
# for pooling and loss, in float32): elsewhere rounding moves what is near a ReLU's kink, the more the deeper a network.
PRECISIONS = {
    "float64": (torch.float64, None, 1e-4),
    "float32": (torch.float32, None, 0.05),
    "bfloat16": (torch.float32, torch.bfloat16, 0.5),
    "float16": (torch.float32, torch.float16, 0.15),
}


def a_batch(masked: bool) -> dict[str, torch.Tensor]:
    lengths = (8_000, 6_000, 5_000, 7_000) if masked else (8_000,) * 4
    return padded(waves(*lengths)) if masked else {"input_values": torch.stack(waves(*lengths))}


def step(model, batch: dict, device: torch.device, autocast: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Loss, gradients and running statistics of a step, on the CPU in float64. A float16 loss is scaled up, as by a
    GradScaler, whose small gradients would vanish."""
    scale = 1024.0 if autocast is torch.float16 else 1.0
    model, batch = model.to(device), {name: tensor.to(device) for name, tensor in batch.items()}
    with torch.autocast(device.type, dtype=autocast) if autocast else contextlib.nullcontext():
        loss = model(**batch, labels=LABELS.to(device)).loss
    (scale * loss).backward()
    made = {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}
    statistics = {name: b for name, b in model.named_buffers() if "running" in name}
    return {name: t.detach().cpu().double() for name, t in {"loss": loss, **made, **statistics}.items()}


def together(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def exact_step(model: nn.Module, batch: dict) -> dict[str, torch.Tensor]:
    """The same in float64 on the CPU."""
    return step(copy.deepcopy(model).double(), batch, torch.device("cpu"))


def assert_same_step(model: nn.Module, batch: dict, device: torch.device, precision: str):
    dtype, autocast, limit = PRECISIONS[precision]
    exact = exact_step(model, batch)
    ours = step(model.to(dtype), batch, device, autocast)
    assert ours.keys() == exact.keys()
    gradients = [
        {name: step[name] for name in exact if name != "loss" and "running" not in name} for step in (ours, exact)
    ]
    statistics = [{name: step[name] for name in exact if "running" in name} for step in (ours, exact)]
    assert abs(ours["loss"] - exact["loss"]) < limit * abs(exact["loss"])
    assert relative_error(*map(together, gradients)) < limit
    if statistics[0]:
        assert relative_error(*map(together, statistics)) < limit


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_has_the_gradients_of_float64(variant, precision, device):
    model = tiny_model(tiny_config(variant, scale=8.0), kind=MRLReDimNetForXVector).train()
    assert_same_step(model, a_batch(False), device, precision)


@pytest.mark.parametrize("variant", ["convnext_convatt", "fwse_att", "norm_batch", "redimnet2_dual"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_with_padding(variant, checkpointing, device):
    model = tiny_model(tiny_config(variant, scale=8.0), kind=MRLReDimNetForXVector).train()
    if checkpointing:
        enable_checkpointing(model)
    assert_same_step(model, a_batch(True), device, "float64")


@pytest.mark.parametrize("size", ["nano", "b0", "redimnet2-nano"])
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_a_step_of_whole_networks(size, precision, device):
    torch.manual_seed(0)
    model = MRLReDimNetForXVector(MRLReDimNetConfig.from_size(size, num_speakers=5, scale=8.0)).train()
    assert_same_step(model, a_batch(False), device, precision)


@pytest.mark.parametrize(
    "changes",
    [
        dict(sub_centers=2, hard_negatives=3, label_smoothing=0.1),
        dict(loss="sphereface2", sub_centers=2, hard_negatives=2),
        dict(prefix_weights=[0, 1, 0]),
    ],
)
def test_a_step_of_other_losses(changes, device):
    model = tiny_model(tiny_config(scale=8.0, **changes), kind=MRLReDimNetForXVector).train()
    assert_same_step(model, a_batch(False), device, "float64")


@pytest.mark.parametrize("placement", ["linear", "all"])
def test_a_step_of_an_adapter_on_a_frozen_base(placement, device):
    model = tiny_model(tiny_config(scale=8.0), kind=MRLReDimNetForXVector)
    options = dict(model=model.redimnet, task_type=None, init_lora_weights=False)
    torch.manual_seed(0)
    model.redimnet = get_peft_model(model.redimnet, lora_config(placement, **options))
    assert_same_step(model.train(), a_batch(False), device, "float64")


def test_a_step_does_not_wait_for_the_gpu(device):
    if device.type != "cuda":
        pytest.skip("only CUDA tells when the host waits")
    model = tiny_model(kind=MRLReDimNetForXVector).train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch, labels = a_batch(False)["input_values"].to(device), LABELS.to(device)
    for mode in ("default", "error"):  # the first step loads kernels
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(batch, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_fifty_steps_of_nano_learn_as_on_a_cpu(device):
    batches = [torch.stack(waves(*[4_800] * 4, seed=seed)) for seed in range(5)]
    curves = []
    for place in (torch.device("cpu"), device):
        torch.manual_seed(0)
        model = MRLReDimNetForXVector(MRLReDimNetConfig.from_size("nano", num_speakers=5, scale=8.0)).train().to(place)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for index in range(50):
            loss = model(batches[index % 5].to(place), labels=LABELS.to(place)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses).cpu())
    torch.testing.assert_close(curves[1][:5], curves[0][:5], rtol=0.02, atol=0.01)
    assert curves[0][-10:].mean() < 0.7 * curves[0][:5].mean()
    torch.testing.assert_close(curves[1][-10:].mean(), curves[0][-10:].mean(), rtol=0.2, atol=0.1)


# ----------------------------------------------------------------------------------------------------------------------
# Batch norms


def norm_step(norm: BatchNorm, x: torch.Tensor, mask: torch.Tensor | None, normalise=None) -> list[torch.Tensor]:
    """Answer, gradients and statistics, on the CPU in float64."""
    x = x.clone().requires_grad_()
    answer = norm(x, mask) if normalise is None else normalise(x)
    (answer * x.detach().cos()).sum().backward()
    tensors = [answer, x.grad, norm.running_mean, norm.running_var]
    tensors += [norm.weight.grad, norm.bias.grad] if norm.weight.requires_grad else []
    return [tensor.detach().cpu().double() for tensor in tensors]


def a_norm() -> BatchNorm:
    norm = speed_up(BatchNorm(6))
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    return norm.train()


def norm_input() -> torch.Tensor:
    return 2.0 + 3.0 * torch.randn(2, 50, 4, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_norms_frozen_and_learning(frozen, masked, device):
    mask = (torch.arange(50) < torch.tensor([[50], [20]]))[..., None] if masked else None
    norm = a_norm().requires_grad_(not frozen)
    exact = norm_step(copy.deepcopy(norm).double(), norm_input().double(), mask)
    ours = norm_step(norm.to(device), norm_input().to(device), None if mask is None else mask.to(device))
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@contextlib.contextmanager
def alone_in(backend: str):
    dist.init_process_group(backend, f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_joint_norm_of_one_process_is_a_plain_one(device):
    """By NCCL's collectives, which one GPU can try: with itself."""
    exact = norm_step(a_norm().double(), norm_input().double(), None)
    norm, x = a_norm().to(device), norm_input().to(device).requires_grad_()
    with alone_in("nccl" if device.type == "cuda" else "gloo"):
        ours = norm_step(norm, x.detach(), None, lambda x: norm.normaliser_by_operators(x, None, joint=True)(x))
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def half_a_batch(rank: int, port: int, folder: str, device: torch.device):
    """One of two processes; both use the same GPU, which gloo allows."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    norm = a_norm().to(device)
    synchronise_batch_norms(norm)
    leave_together(rank, folder, {"step": norm_step(norm, norm_input()[rank : rank + 1].to(device), None)})


def test_norms_of_two_processes_see_the_joint_batch(device, tmp_path):
    torch.multiprocessing.spawn(half_a_batch, (free_port(), str(tmp_path), device), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt")["step"] for rank in range(2)]
    exact = norm_step(a_norm().double(), norm_input().double(), None)
    for index, expected in enumerate(exact):
        ours = [half[index] for half in halves]
        # The answer and x's gradient by rows; statistics are equal; gradients of weights are each process's own.
        ours = torch.cat(ours) if index < 2 else ours[0] if index < 4 else ours[0] + ours[1]
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# The training script


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_training_script_takes_two_steps(precision, device, tmp_path):
    if device.type == "cpu" and precision == "fp16":
        pytest.skip("Accelerate's fp16 needs a GPU")
    corpus = make_corpus(tmp_path / "corpus", 6, 2, sessions=2, utterances=2, seconds=(0.6, 0.9))
    model = (
        "{num_mel_bins: 24, base_channels: 4, group_divisor: 4, embedding_size: 32, matryoshka_dims: [8, 16, 32], "
        "pooling_bottleneck: 16, stages: [{frequency_stride: 2, blocks: 1, expansion: 1, reduction: 8}]}"
    )
    tests = {"synthetic": {"trials": str(corpus / "test/trials.txt"), "folder": str(corpus / "test/wav")}}
    settings = dict(model_options=model, train=corpus / "train", tests=json.dumps(tests), dev_speakers=2)
    settings |= dict(
        crop_seconds=0.5, batch_size=4, steps=2, workers=0, bootstrap_samples=20, rotate_at=[], tracker="none"
    )
    settings |= dict(output=tmp_path / "run", mixed_precision=precision)
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {}
    subprocess.run(
        [sys.executable, Path(train_hf.__file__), *(f"--{key}={value}" for key, value in settings.items())],
        env={**os.environ, **hidden, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        check=True,
        timeout=600,
    )
    assert (tmp_path / "run/results.json").is_file()
