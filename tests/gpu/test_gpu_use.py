"""Embeddings, adapters, compiling and exporting on a GPU, as `test_gpu_training.py` says."""

import copy

import pytest
import torch
from conftest import VARIANTS, padded, relative_error, tiny_config, tiny_model, waves
from peft import get_peft_model

from configuration_mrl_redimnet import MRLReDimNetConfig
from modeling_mrl_redimnet import MRLReDimNetModel
from mrl_redimnet.adapters import AdapterBank, lora_config
from mrl_redimnet.export import export_onnx, export_torch

BATCH = padded(waves(8_000, 5_000, 7_000))


def moved(batch: dict, device: torch.device) -> dict:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def embed(model, batch: dict, device: torch.device, **options) -> torch.Tensor:
    with torch.inference_mode():
        answer = model.to(device)(**moved(batch, device), **options).embeddings
    assert answer.device.type == device.type
    return answer.float().cpu()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16 autocast", "float16 weights"])
def test_an_embedding_is_that_of_a_cpu(variant, precision, device):
    model = tiny_model(tiny_config(variant))
    exact = embed(copy.deepcopy(model).double(), BATCH, torch.device("cpu"))
    if precision == "float16 weights":
        batch = BATCH | {"input_values": BATCH["input_values"].half()}
        assert relative_error(embed(model.half(), batch, device), exact) < 0.05
        return
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16 autocast"):
        ours = embed(model, BATCH, device)
    assert relative_error(ours, exact) < (1e-4 if precision == "float32" else 0.1)


@pytest.mark.parametrize("size", ["nano", "redimnet2-nano"])
def test_padding_and_windows_change_nothing(size, device):
    torch.manual_seed(0)
    model = MRLReDimNetModel(MRLReDimNetConfig.from_size(size, window_seconds=1.0)).eval()
    utterances = waves(10_000, 16_000, 40_000)
    together = embed(model, padded(utterances), device)
    for row, utterance in zip(together, utterances, strict=True):
        assert relative_error(row, embed(model, {"input_values": utterance[None]}, device)[0]) < 1e-4


@pytest.mark.parametrize("variant", ["convnext_convatt", "redimnet2_dual"])
def test_a_compiled_model_answers_alike(variant, device):
    torch.compiler.reset()
    model = tiny_model(tiny_config(variant)).to(device)
    backend = "inductor" if device.type == "cuda" else "eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert relative_error(embed(compiled, BATCH, device), embed(model, BATCH, device)) < 1e-4


# ----------------------------------------------------------------------------------------------------------------------
# Adapters


@pytest.fixture
def folders(tmp_path) -> dict[str, str]:
    """Two adapters with an effect."""
    made = {}
    for seed, name in enumerate(("tel", "far")):
        torch.manual_seed(seed)
        adapted = get_peft_model(tiny_model(), lora_config("linear", r=2 + seed, init_lora_weights=False))
        adapted.save_pretrained(tmp_path / name)
        made[name] = str(tmp_path / name)
    return made


def on_cpu_and_device(folders, device) -> list[AdapterBank]:
    banks = [AdapterBank.load(tiny_model(), folders) for _ in range(2)]
    banks[1].model.to(device)
    return banks


@pytest.mark.parametrize("choice", ["tel", ["tel", None, "far"]])
def test_adapters_and_mixed_batches(choice, folders, device):
    exact, bank = on_cpu_and_device(folders, device)
    ours = bank.embed(**moved(BATCH, device), adapter=choice).cpu()
    assert relative_error(ours, exact.embed(**BATCH, adapter=choice)) < 1e-4


def test_a_merged_adapter_and_the_base_again(folders, device):
    _, bank = on_cpu_and_device(folders, device)
    base, on_top = (bank.embed(**moved(BATCH, device), adapter=name).cpu() for name in (None, "tel"))
    assert relative_error(embed(bank.merged("tel"), BATCH, device), on_top) < 1e-4
    assert torch.equal(bank.embed(**moved(BATCH, device), adapter=None).cpu(), base)


def test_hot_swap_into_a_compiled_model(folders, device):
    torch.compiler.reset()
    exact, _ = on_cpu_and_device(folders, device)
    bank = AdapterBank.load(tiny_model())
    bank.model.to(device)
    bank.prepare_hot_swap(4)
    bank.set_adapter("hot")
    backend = "inductor" if device.type == "cuda" else "eager"
    compiled = torch.compile(bank.model, backend=backend)
    for name in folders:
        bank.hot_swap(folders[name])
        with torch.inference_mode():
            ours = compiled(**moved(BATCH, device)).embeddings.cpu()
        assert relative_error(ours, exact.embed(**BATCH, adapter=name)) < 1e-4


# ----------------------------------------------------------------------------------------------------------------------
# Exporting


def test_exporting_a_model_that_is_on_the_device(device, tmp_path):
    model = tiny_model()
    exact = embed(model, BATCH, torch.device("cpu"))
    model.to(device)
    program = torch.export.load(export_torch(model, tmp_path / "model.pt2")).module()
    assert relative_error(program(**BATCH), exact) < 1e-4
    onnxruntime = pytest.importorskip("onnxruntime")
    file = export_onnx(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    feeds = {"input_values": BATCH["input_values"].numpy(), "attention_mask": BATCH["attention_mask"].long().numpy()}
    assert relative_error(torch.from_numpy(session.run(None, feeds)[0]), exact) < 1e-4
    assert next(model.parameters()).device.type == device.type
    assert relative_error(embed(model, BATCH, device), exact) < 1e-4
