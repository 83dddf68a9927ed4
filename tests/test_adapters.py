import pytest
import torch
from conftest import tiny_config, tiny_model, waves
from peft import PeftModel, get_peft_model

from mrl_redimnet.adapters import PLACEMENTS, lora_config

TARGETS = {  # of the tiny model: one 1-D block of four convolution units and a transformer layer, three segments
    "attention": 4,
    "attention+ffn": 6,
    "pointwise": 6,
    "projection": 3,
    "linear": 15,
}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placement_reaches_the_layers_it_names(placement):
    adapted = get_peft_model(tiny_model(), lora_config(placement, r=2))
    assert len(adapted.base_model.targeted_module_names) == TARGETS[placement]


def test_unknown_placement():
    with pytest.raises(ValueError, match="placement: got 'convs', expected one of attention"):
        lora_config("convs")


def test_adapter_survives_saving_and_merging(tmp_path):
    """A trained adapter answers the same after loading it onto a fresh base, and merged into it."""
    batch = torch.stack(waves(8_000, 8_000))
    adapted = get_peft_model(tiny_model(), lora_config("linear", r=2, init_lora_weights=False)).eval()
    with torch.inference_mode():
        answer = adapted(input_values=batch).embeddings
        assert not torch.allclose(answer, tiny_model()(batch).embeddings, atol=1e-3)
        adapted.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_model(tiny_config()), tmp_path).eval()
        assert torch.equal(loaded(input_values=batch).embeddings, answer)
        torch.testing.assert_close(loaded.merge_and_unload()(batch).embeddings, answer, rtol=1e-5, atol=1e-5)
