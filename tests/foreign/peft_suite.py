"""PEFT's tests of adapters on custom models, with this project's network as the model.

`run.py` puts the checkout of PEFT, in which the tests are the package `tests`, in front of sys.path.
"""

import os
import types

import pytest
import torch
from conftest import tiny_config
from peft import AdaLoraConfig, IA3Config, LoraConfig
from tests.testing_common import PeftCommonTester
from tests.testing_utils import hub_online_once, set_init_weights_false

from modeling_mrl_redimnet import MRLReDimNetModel
from tests import test_custom_models

SIZE = "tiny"  # the kinds of layers of nano, fewer of each
LAYERS = ["stride", "pointwise", "reduce", "expand", "q_proj", "k_proj", "v_proj", "out_proj", "ffn_in", "ffn_out"]
LINEAR = [*LAYERS, *(f"segments.{i}" for i in range(3))]

CASES = [
    ("LoRA", SIZE, LoraConfig, {"target_modules": LINEAR}),
    ("DoRA", SIZE, LoraConfig, {"target_modules": LINEAR, "use_dora": True}),
    ("AdaLoRA", SIZE, AdaLoraConfig, {"target_modules": LINEAR, "total_step": 10, "init_lora_weights": False}),
    ("IA3", SIZE, IA3Config, {"target_modules": LINEAR, "feedforward_modules": []}),
]

with hub_online_once(SIZE):  # the tests ask the Hub for a model only the first time that they meet its name
    pass


class Network(MRLReDimNetModel):
    """The network as PEFT's tests expect a model: it takes tokens, has a settable dtype, and gives a plain tensor."""

    dtype = torch.float32

    @classmethod
    def from_pretrained(cls, model_id: str, dtype: torch.dtype | None = None) -> "Network":
        if os.path.isdir(model_id):  # one that a test saved
            return super().from_pretrained(model_id, dtype=dtype or torch.float32)
        torch.manual_seed(0)
        config = tiny_config()
        config.name_or_path = model_id  # as transformers' own from_pretrained does
        return cls(config).to(dtype or torch.float32).eval()

    def forward(self, input_ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return super().forward(input_ids, **kwargs).embeddings


class TupleNetwork(Network):
    """The same with a tuple as its answer, and something to generate, as models of transformers have."""

    def forward(self, input_ids: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor]:
        return (super().forward(input_ids, **kwargs),)

    def generate(self, input_ids: torch.Tensor, **options: bool) -> types.SimpleNamespace:
        return types.SimpleNamespace(scores=self(input_ids))

    def prepare_inputs_for_generation(self, *arguments: object, **options: object) -> dict:
        return options


class Inputs:
    """Waveforms under the name that the tests use for tokens."""

    def prepare_inputs_for_testing(self) -> dict[str, torch.Tensor]:
        waveforms = 0.1 * torch.randn(3, 2000, generator=torch.Generator().manual_seed(0))
        return {"input_ids": waveforms.to(self.torch_device)}


CASE_NAMES = "test_name, model_id, config_cls, config_kwargs"
every_case = pytest.mark.parametrize(CASE_NAMES, CASES, ids=[c[0] for c in CASES])


def on_our_cases(test):
    """The same test over `CASES` instead of PEFT's own; None for one that brings a model of its own."""
    marks = getattr(test, "pytestmark", [])
    others = [mark for mark in marks if mark.args[:2] != (CASE_NAMES, test_custom_models.TEST_CASES)]
    if len(others) == len(marks):
        return None
    copy = types.FunctionType(test.__code__, test.__globals__, test.__name__, test.__defaults__, test.__closure__)
    copy.pytestmark = [*others, every_case.mark]
    return copy


class TestCustomModel(Inputs, PeftCommonTester):
    """PEFT's tests of custom models."""

    transformers_class = Network


for name, theirs in vars(test_custom_models.TestPeftCustomModel).items():
    if name.startswith("test_") and (ours := on_our_cases(theirs)):
        setattr(TestCustomModel, name, ours)


class TestCommon(Inputs, PeftCommonTester):
    """What PEFT tests with transformers' models only."""

    transformers_class = TupleNetwork

    @every_case
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_training_gradient_checkpointing(self, test_name, model_id, config_cls, config_kwargs, use_reentrant):
        self._test_training_gradient_checkpointing(model_id, config_cls, config_kwargs, use_reentrant=use_reentrant)


def common(name: str):
    @every_case
    def test(self: TestCommon, test_name, model_id, config_cls, config_kwargs):
        # An adapter that changes nothing, as one does at first, would make most of these tests idle.
        getattr(self, f"_test_{name}")(model_id, config_cls, set_init_weights_false(config_cls, config_kwargs))

    return test


for name in (
    "disable_adapter",
    "merge_layers_multi",
    "merge_layers_nan",
    "mixed_adapter_batches",
    "save_pretrained_selected_adapters",
    "training",
    "training_layer_indexing",
    "unload_adapter",
    "weighted_combination_of_adapters",
):
    setattr(TestCommon, f"test_{name}", common(name))
