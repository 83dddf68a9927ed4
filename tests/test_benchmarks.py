"""Parts of benchmarks on which figures rest."""

from pathlib import Path

import pytest
import torch
from conftest import padded, tiny_config, tiny_model, waves

BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")


def test_only_numbers_of_a_gpu_bear_its_name(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import timing

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert "a GPU" not in timing.machine()
    assert timing.machine("cuda") == f"{timing.machine()}, a GPU"


@torch.no_grad()
def test_answers_of_a_frozen_trunk_are_kept_and_are_the_models(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import real_domains

    model = tiny_model(tiny_config(exits=[1]))
    batch = padded(waves(9_000, 5_000))
    wanted = [model(**batch, depth=depth).embeddings for depth in (None, 1)]
    monkeypatch.setattr(type(model), "pooled", real_domains.remembered(type(model).pooled, tmp_path))
    for _ in ("made", "read"):
        for depth, embeddings in zip((None, 1), wanted, strict=True):
            assert torch.equal(model(**batch, depth=depth).embeddings, embeddings)
        assert len([*tmp_path.rglob("*.pt")]) == 1  # an exit's answers are not kept
    model.trunk.requires_grad_(True)
    monkeypatch.setattr(type(model), "frames", lambda *_: pytest.fail("the trunk ran again"))
    assert torch.equal(model(**batch).embeddings, wanted[0])
    with torch.enable_grad(), pytest.raises(pytest.fail.Exception, match="ran again"):
        model(**batch)  # a trunk that learns is another one after each step
