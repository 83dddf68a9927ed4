"""The lines of docs/hub.md on transformers' models and adapters: each loads the embeddings that were saved."""

import re
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, waves
from peft import AutoPeftModelForFeatureExtraction, get_peft_model
from transformers import AutoModel

from mrl_redimnet.adapters import lora_config
from mrl_redimnet.adapters.hub import push_base
from mrl_redimnet.saving import save_model

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "hub.md").read_text()
BATCH = {"input_values": waves(8000)[0][None]}


def lines(heading: str, block: int) -> list[str]:
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^```py\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)[block].splitlines()


def embedding(model) -> torch.Tensor:
    device = "cpu" if model.device.type == "meta" else model.device  # some of its weights are on the disk
    with torch.inference_mode():
        return model(**{name: value.to(device) for name, value in BATCH.items()}).embeddings.float().cpu()


@pytest.fixture
def saved(tmp_path):
    """A base and an adapter on it as folders, and the embeddings of both."""
    base = tiny_model()
    save_model(base, tmp_path / "model")
    adapted = get_peft_model(tiny_model(), lora_config("linear", 2, init_lora_weights=False)).eval()
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "model")
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path, embedding(base), embedding(adapted)


def test_models(saved, hub):
    """In the order of the page; `revision` needs a Hub."""
    folder, of_base, of_adapter = saved
    push_base(folder / "model", "anna/base", tag="v1")
    names = dict(
        AutoModel=AutoModel,
        AutoPeftModelForFeatureExtraction=AutoPeftModelForFeatureExtraction,
        torch=torch,
        REPO="anna/base",
        FOLDER=str(folder),
        OUT=str(folder / "out"),
        DISK=str(folder / "disk"),
        ADAPTER_REPO=str(folder / "adapter"),
    )
    seen = set()
    for line in lines("transformers: models and adapters", 0):
        exec(line.replace("500KB", "20KB"), names)
        expected = of_adapter if "ADAPTER_REPO" in line else of_base
        assert not names["model"].training
        close = dict(rtol=0, atol=0.1 * of_base.abs().max().item()) if "bfloat16" in line else dict(rtol=0, atol=1e-5)
        torch.testing.assert_close(embedding(names["model"]), expected, **close, msg=line)
        assert "**disk" not in line or "disk" in names["model"].hf_device_map.values()
        seen |= set(re.findall(r"(\w+)=", line))
    assert {
        "revision",
        "subfolder",
        "dtype",
        "device_map",
        "low_cpu_mem_usage",
        "max_shard_size",
        "offload_folder",
    } <= seen
    assert len([*(folder / "out").glob("*.safetensors")]) > 1
    assert not torch.allclose(of_base, of_adapter)


def test_adapters(saved):
    folder, of_base, of_adapter = saved
    model = AutoModel.from_pretrained(folder / "model", trust_remote_code=True)
    names = {"model": model, "ADAPTER_REPO": str(folder / "adapter")}
    expected = {"disable_adapters": of_base}
    for line in lines("transformers: models and adapters", 1):
        exec(line, names)
        (method,) = re.findall(r"model\.(\w+)\(", line)
        assert torch.equal(embedding(model), expected.get(method, of_adapter)), line
    assert model.active_adapters() == ["one"]


def test_hot_swap(saved):
    """As the page says it: another adapter of the same rank in the place of the first."""
    folder, _, of_adapter = saved
    torch.manual_seed(5)
    other = get_peft_model(tiny_model(), lora_config("linear", 2, init_lora_weights=False)).eval()
    other.save_pretrained(folder / "other")
    model = AutoModel.from_pretrained(folder / "model", trust_remote_code=True)
    model.load_adapter(str(folder / "adapter"), adapter_name="one")
    torch.testing.assert_close(embedding(model), of_adapter, rtol=0, atol=1e-5)
    model.load_adapter(str(folder / "other"), adapter_name="one", hotswap=True)
    torch.testing.assert_close(embedding(model), embedding(other), rtol=0, atol=1e-5)
