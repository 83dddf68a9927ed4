"""LoRA adapters on a ReDimNet-MRL base: where they sit. Import as `mrl_redimnet.adapters`.

Adapters are ordinary PEFT: `get_peft_model(model, lora_config("linear"))`, `PeftModel.load_adapter`, `set_adapter`.
"""

from peft import LoraConfig

# Each placement is a rule over module names (PEFT matches it against the whole name).
_ATTENTION = r"q_proj|k_proj|v_proj|out_proj"
_FFN = r"ffn_in|ffn_out"
_POINTWISE = r"context\.reduce|context\.expand|context\.layers\.\d+\.(pointwise|widen|narrow)|trunk\.aggregate"
_PROJECTION = r"projection\.segments\.\d+"

PLACEMENTS: dict[str, str] = {
    "attention": rf"(.*\.)?({_ATTENTION})",
    "attention+ffn": rf"(.*\.)?({_ATTENTION}|{_FFN})",
    "pointwise": rf"(.*\.)?({_POINTWISE})",
    "projection": rf"(.*\.)?({_PROJECTION})",
    "linear": rf"(.*\.)?({_ATTENTION}|{_FFN}|{_POINTWISE}|{_PROJECTION})",
}


def lora_config(placement: str = "linear", r: int = 8, **options) -> LoraConfig:
    """A LoRA configuration for MRLReDimNetModel: rank `r` at a named placement.

    "attention": q, k, v, out; "attention+ffn": also the transformer's feed-forward; "pointwise": every 1x1 layer of the
    1-D path, which holds most of the weights; "projection": the Matryoshka segments; "linear": all of these.
    options: further fields of LoraConfig; lora_alpha is 2 r unless given. Raises ValueError for an unknown placement.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement: got {placement!r}, expected one of {', '.join(PLACEMENTS)}.")
    return LoraConfig(
        task_type="FEATURE_EXTRACTION",  # so that AutoPeftModelForFeatureExtraction can load it; call input_values=
        target_modules=PLACEMENTS[placement],
        r=r,
        **{"lora_alpha": 2 * r, **options},
    )


__all__ = ["PLACEMENTS", "lora_config"]
