"""What a GPU would meet, without one: nothing waits, nothing is copied, nothing is on the CPU (`fake_cuda.py`)."""

import contextlib

import pytest
import torch
from conftest import VARIANTS, enable_checkpointing, tiny_config
from fake_cuda import FakeCuda
from peft import LoraConfig, get_peft_model
from torch import nn

from configuration_mrl_redimnet import MRLReDimNetConfig
from modeling_mrl_redimnet import MRLReDimNetForXVector, MRLReDimNetModel
from mrl_redimnet.adapters.placement import lora_config

BATCH, SPEAKERS = 4, 5
LOSSES = {
    "sphereface2": dict(loss="sphereface2"),
    "aam_all": dict(sub_centers=2, hard_negatives=3, label_smoothing=0.1),
    "sphereface2_all": dict(loss="sphereface2", sub_centers=2, hard_negatives=2),
    "prefixes_left_out": dict(prefix_weights=[0, 1, 0]),
}


def of_size(size: str, **changes) -> MRLReDimNetForXVector:
    return MRLReDimNetForXVector(MRLReDimNetConfig.from_size(size, num_speakers=SPEAKERS, **changes)).train()


def tiny(variant: str = "convnext_convatt", **changes) -> MRLReDimNetForXVector:
    return MRLReDimNetForXVector(tiny_config(variant, **changes)).train()


def train_step(cuda: FakeCuda, model: nn.Module, autocast: torch.dtype | None = None, mask: bool = False, **inputs):
    """One step as a training loop takes it; gradients must be there, on the device, of their parameter's type."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    dtype = next(model.parameters()).dtype
    inputs["input_values"] = torch.randn(BATCH, 16_000, device="cuda", dtype=dtype)
    inputs["labels"] = torch.randint(0, SPEAKERS, (BATCH,), device="cuda")
    if mask:
        inputs["attention_mask"] = torch.ones(BATCH, 16_000, dtype=torch.long, device="cuda")
    cuda.forget()
    scope = torch.autocast("cuda", dtype=autocast) if autocast else contextlib.nullcontext()
    with scope:
        answer = model(**inputs)
    answer.loss.backward()
    operations = cuda.operations
    torch.nn.utils.clip_grad_norm_(parameters, 3.0)
    optimizer.step()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(p.grad.device.type == "cuda" and p.grad.dtype == p.dtype for p in parameters)
    return answer, operations


# ----------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize(
    ("size", "ceiling"), [("nano", 900), pytest.param("b0", 1950, marks=pytest.mark.slow), ("redimnet2-nano", 1950)]
)
def test_a_step_keeps_the_device_busy(size, ceiling):
    """ceiling: operations forward and backward, of which each is a kernel to launch, or nearly."""
    model = of_size(size)
    with FakeCuda() as cuda:
        _, operations = train_step(cuda, cuda.moved(model))
        assert cuda.log == {}
        assert operations < ceiling


DAILY = ("convnext_convatt", "fwse_att", "redimnet2_normed")
SOME = [pytest.param(name, marks=[] if name in DAILY else pytest.mark.slow) for name in VARIANTS]


@pytest.mark.parametrize("variant", SOME)
def test_a_step_of_every_block(variant):
    model = tiny(variant, spec_augment=True, map_dropout=0.1, freq_mask_width=[1, 4], time_mask_width=[1, 4])
    with FakeCuda() as cuda:
        train_step(cuda, cuda.moved(model))
        assert cuda.log == {}


@pytest.mark.parametrize("kind", LOSSES)
def test_a_step_of_every_loss(kind):
    model = tiny(**LOSSES[kind])
    with FakeCuda() as cuda:
        train_step(cuda, cuda.moved(model), margin=0.1)
        assert cuda.log == {}


@pytest.mark.parametrize("variant", ["convnext_convatt", "fwse_att", "redimnet2_dual"])
@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, True), (torch.float16, True), (torch.float16, False)])
def test_a_step_in_half_precision(variant, dtype, autocast):
    """By autocast, which on CUDA has norms and softmax in float32, and with weights in half precision."""
    model = tiny(variant)
    with FakeCuda() as cuda:
        answer, _ = train_step(
            cuda, cuda.moved(model, None if autocast else dtype), autocast=dtype if autocast else None
        )
        assert answer.embeddings.dtype == dtype and answer.loss.dtype == torch.float32
        assert cuda.log == {}


@pytest.mark.parametrize("variant", ["convnext_convatt", "norm_batch", "redimnet2_dual"])
@pytest.mark.parametrize("learning", [True, False])
def test_a_step_with_padding_looks_at_its_mask_once(variant, learning):
    """To refuse a wrong one; its norms compute with padding left out."""
    model = tiny(variant)
    if not learning:
        model.redimnet.requires_grad_(False)
    with FakeCuda(answers=[[16_000, 9_000, 8_000, 16_000, 1]]) as cuda:
        train_step(cuda, cuda.moved(model), mask=True)
        assert cuda.log == {"waiting for tolist in pretrained_mrl_redimnet.py, lengths_of": 1}


@pytest.mark.parametrize("variant", ["convnext_convatt", "redimnet2_dual"])
def test_a_step_with_gradient_checkpointing(variant):
    model = tiny(variant)
    enable_checkpointing(model)
    with FakeCuda() as cuda:
        train_step(cuda, cuda.moved(model))
        assert cuda.log == {}


@pytest.mark.parametrize("placement", ["linear", "all"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_step_of_an_adapter(placement, autocast):
    model = tiny()
    model.redimnet = get_peft_model(model.redimnet, lora_config(placement, model=model.redimnet, task_type=None))
    model.train()
    with FakeCuda() as cuda:
        train_step(cuda, cuda.moved(model), autocast=autocast)
        assert cuda.log == {}


# ----------------------------------------------------------------------------------------------------------------------
# Use


@pytest.mark.parametrize("variant", ["convnext_convatt", "fwse_att", "redimnet2_dual"])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_embedding(variant, mask, autocast):
    model = MRLReDimNetModel(tiny_config(variant)).eval()
    with FakeCuda(answers=[[16_000, 9_000, 1]]) as cuda, torch.no_grad():
        cuda.moved(model)
        waves = torch.randn(2, 16_000, device="cuda")
        ones = torch.ones(2, 16_000, dtype=torch.long, device="cuda") if mask else None
        cuda.forget()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            embeddings = model(waves, ones, truncate_dim=8).embeddings
        assert embeddings.shape == (2, 8) and embeddings.device.type == "cuda"
        assert sum(cuda.log.values()) == mask


def test_embedding_through_an_adapter():
    model = get_peft_model(MRLReDimNetModel(tiny_config()), LoraConfig(target_modules=r".*\.(q_proj|expand)")).eval()
    with FakeCuda() as cuda, torch.no_grad():
        cuda.moved(model)
        waves = torch.randn(2, 16_000, device="cuda")
        cuda.forget()
        assert model(input_values=waves).embeddings.device.type == "cuda"
        assert cuda.log == {}


# ----------------------------------------------------------------------------------------------------------------------
# The spy itself

PLANTED = {
    "CPU tensor": lambda x: x * torch.ones(1, 1, 1)[0, 0, 0],
    "number": lambda x: x * x.sum().item(),
    "condition": lambda x: x + 1 if x.sum() > 0 else x,
    "list": lambda x: x * x.new_tensor([1.0]),
    "index of a list": lambda x: x[:, :, [0]] * x,
    "mask as an index": lambda x: x + x[x > 0].sum(),
    "way over the CPU": lambda x: x.cpu().to("cuda"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_spy_sees_what_is_planted(name):
    model = tiny()
    model.redimnet.trunk.register_forward_hook(lambda module, inputs, x: PLANTED[name](x))
    with FakeCuda() as cuda:
        train_step(cuda, cuda.moved(model))
        assert sum(cuda.log.values()) >= 1
        assert all("test_fake_cuda.py" in place for place in cuda.log), cuda.log


def test_a_tensor_of_the_wrong_device_is_an_error():
    model = tiny()
    model.redimnet.trunk.register_forward_hook(lambda module, inputs, x: x * torch.ones(x.shape[-1]))
    with FakeCuda() as cuda, pytest.raises(RuntimeError, match="same device"):
        train_step(cuda, cuda.moved(model))
