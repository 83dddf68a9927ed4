"""Several passes over the network at once: the same answers, in order, whatever fails."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from sounds import write
from test_bank import save_adapter

from mrl_redimnet import SpeakerEncoder
from mrl_redimnet.adapters import lora_config
from mrl_redimnet.extraction.bulk import embed_corpus, read_embeddings
from mrl_redimnet.extraction.inputs import Inputs
from mrl_redimnet.speed.threads import MOST_WORKERS, side_by_side, workers_for


@pytest.fixture
def four_threads():
    """As on a machine with four cores: the tests have one thread."""
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)


@given(st.lists(st.integers(), max_size=12), st.integers(1, 5))
def test_answers_come_in_order(items, workers):
    assert list(side_by_side(lambda item: 2 * item, iter(items), workers)) == [2 * item for item in items]


def test_so_many_run_at_once():
    together = threading.Barrier(3)
    assert list(side_by_side(lambda item: together.wait(60) >= 0 and item, range(6), 3)) == [*range(6)]


def test_each_has_its_share_of_the_cores(four_threads):
    assert set(side_by_side(lambda _: torch.get_num_threads(), range(8), 2)) == {2}
    assert torch.get_num_threads() == 4
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [4]
    assert list(side_by_side(lambda _: torch.get_num_threads(), [0], 2)) == [4]  # one alone has all of them


def test_it_is_not_far_ahead_of_what_is_taken():
    given_out = []
    found = side_by_side(lambda item: item, (given_out.append(item) or item for item in range(100)), 2)
    assert next(found) == 0 and len(given_out) <= 4
    found.close()
    assert len(given_out) <= 4


def test_an_error_comes_in_its_place():
    found = side_by_side(lambda item: 1 // (item - 3), range(6), 2)
    assert [next(found) for _ in range(3)] == [-1, -1, -1]
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_no_more_threads_is_an_error_and_no_wait(monkeypatch):
    started, start = [], threading.Thread.start

    def refused(thread):
        started.append(thread)
        if len(started) > 1:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        list(side_by_side(lambda item: item, range(6), 3))


def test_workers_follow_the_device(four_threads):
    assert workers_for(torch.device("cpu")) == 4
    torch.set_num_threads(2 * MOST_WORKERS)
    assert workers_for(torch.device("cpu")) == MOST_WORKERS
    assert workers_for(torch.device("cuda")) == 1


@pytest.fixture
def speech(tmp_path) -> list[Path]:
    rng = np.random.default_rng(0)
    (tmp_path / "speech").mkdir()
    return [
        write(tmp_path / "speech" / f"{number}.wav", 0.1 * rng.standard_normal(6000 + 1000 * (number % 5)))
        for number in range(12)
    ]


@pytest.mark.parametrize("active", [None, "one", "dora"])
def test_an_encoder_answers_the_same_with_several_threads(speech, tmp_path, active):
    encoder = SpeakerEncoder(tiny_model(), "tiny")
    for name, config in (("one", lora_config("linear", r=2)), ("dora", lora_config("linear", r=2, use_dora=True))):
        save_adapter(tmp_path / name, config, seed=3)
        encoder.adapters.add(name, tmp_path / name)
    encoder.adapters.set_adapter(active)
    alone = encoder.embed(speech, batch_seconds=2)
    noise = 0.1 * np.random.default_rng(1).standard_normal(16_000).astype(np.float32)
    torch.set_num_threads(3)
    try:
        assert np.abs(encoder.embed(speech, batch_seconds=2) - alone).max() < 1e-5
        starts, windows = encoder.embed_windows(np.tile(noise, 40), 0.5, 0.1)
        assert encoder.adapters.active == active and torch.get_num_threads() == 3
        report = embed_corpus(encoder, Inputs.find([speech[0].parent]), tmp_path / "parts")
    finally:
        torch.set_num_threads(1)
    alone_starts, alone_windows = encoder.embed_windows(np.tile(noise, 40), 0.5, 0.1)
    assert np.array_equal(starts, alone_starts) and np.abs(windows - alone_windows).max() < 1e-5
    assert report.embedded == 12 and not report.problems
    ids, embeddings = read_embeddings(tmp_path / "parts")
    order = [[file.stem for file in speech].index(Path(name).stem) for name in ids]
    assert np.abs(embeddings - alone[order]).max() < 1e-5


@pytest.mark.parametrize("shared", [False, True])
def test_windows_are_the_same_with_several_threads(shared):
    encoder = SpeakerEncoder(tiny_model(), "tiny")
    noise = 0.1 * np.random.default_rng(1).standard_normal(16_000 * 40).astype(np.float32)  # four stretches
    alone = encoder.embed_windows(noise, 0.5, 0.25, shared=shared)
    torch.set_num_threads(3)
    try:
        together = encoder.embed_windows(noise, 0.5, 0.25, shared=shared)
    finally:
        torch.set_num_threads(1)
    assert np.array_equal(together[0], alone[0]) and np.abs(together[1] - alone[1]).max() < 1e-5
