"""PEFT's kinds of adapters on a small network: what the table of docs/results/peft_kinds.md says of `nano` holds."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, waves

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # at the end: its modules have plain names

import peft_kinds  # noqa: E402

OFTEN = ("LoRA", "LoRA, from PiSSA", "IA3", "LoHa")  # the others in `make test-all`


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in OFTEN else pytest.mark.slow) for kind in peft_kinds.KINDS]
)
def test_a_kind_does_what_the_table_says(kind):
    batch = {"input_values": torch.stack(waves(4_000, 4_000, 4_000))}
    outcomes = peft_kinds.examine(kind, tiny_model(), batch)
    assert peft_kinds.judge({kind: outcomes}) == []


def test_the_table_has_every_kind_and_reason():
    page = (ROOT / "docs" / "results" / "peft_kinds.md").read_text()
    table, reasons = page.split("## Why not")
    for kind in peft_kinds.KINDS:
        assert f"| {kind} |" in table
    for check, kinds, reason, whose in peft_kinds.REASONS:
        assert f"| {check} | {'; '.join(kinds)} | {reason} | {whose} |" in reasons
        assert reason.endswith(".") and whose != "ours" and set(kinds) <= set(peft_kinds.KINDS)


def test_what_the_checks_refuse():
    """They can fail: an adapter that is not the one that was trained, and a base that learns with it."""
    batch = {"input_values": torch.stack(waves(4_000, 4_000, 4_000))}
    base = tiny_model()
    model = peft_kinds.trained("LoRA", base, batch, 0)
    found = peft_kinds.embeddings(model, batch)
    with pytest.raises(ValueError, match="differ by"):
        peft_kinds.switch_off(model, batch, found)
    with pytest.raises(ValueError, match="differ by"):
        peft_kinds.merge(model, batch, peft_kinds.embeddings(base, batch))
    assert peft_kinds.judge({"LoRA": dict.fromkeys(peft_kinds.CHECKS, "ValueError: x")}) != []
