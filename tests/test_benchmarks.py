"""What benchmarks of speed say about where they ran."""

from pathlib import Path

import torch


def test_only_numbers_of_a_gpu_bear_its_name(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import timing

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert "a GPU" not in timing.machine()
    assert timing.machine("cuda") == f"{timing.machine()}, a GPU"
