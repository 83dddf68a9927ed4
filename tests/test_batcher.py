"""Requests of many callers in joint batches: the right answer for each, in order, and nothing lost."""

import asyncio
import random
import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from test_bank import save_adapter

from mrl_redimnet import SpeakerEncoder
from mrl_redimnet.adapters import lora_config
from mrl_redimnet.serving.batcher import (
    PASS_SECONDS,
    BatcherClosedError,
    MicroBatcher,
    Pass,
    QueueFullError,
    passes,
)

ADAPTERS = ("one", "two", "three")
SECOND = 16_000


def noise(seed: int, samples: int) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(samples).astype(np.float32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(ADAPTERS):
        save_adapter(root / name, lora_config("linear", r=2), seed=seed + 1)
    return {name: root / name for name in ADAPTERS}


@pytest.fixture
def encoder(folders):
    encoder = SpeakerEncoder(tiny_model(), "tiny")
    for name, folder in folders.items():
        encoder.adapters.add(name, folder)
    return encoder


class Held:
    """Keeps a batcher's network busy from `with` on until `release`, so that what is asked meanwhile has to wait."""

    def __init__(self, batcher: MicroBatcher):
        self.batcher, self.entered, self.free = batcher, threading.Event(), threading.Event()
        self.passes: list[Pass] = []
        self.plain = batcher.encoder.embed_padded
        batcher.encoder.embed_padded = self.embed_padded

    def embed_padded(self, *arguments):
        self.entered.set()
        self.free.wait()
        return self.plain(*arguments)

    def __enter__(self):
        self.first = self.batcher.submit(noise(0, 4000))
        assert self.entered.wait(60)
        return self

    def release(self):
        self.free.set()

    def __exit__(self, *error):
        self.release()


@pytest.mark.parametrize("workers", [1, 3])
def test_every_caller_gets_the_answer_to_its_request(encoder, tmp_path, workers):
    """16 callers, mixed adapters and lengths, answers by value: those of embedding alone.

    With several workers some requests also name an adapter that cannot share a pass (DoRA), and some are longer than
    the model's window, so that what may run at once and what may not take turns.
    """
    names, lengths = (None, *ADAPTERS), [3000, 4111, 9000]
    if workers > 1:
        save_adapter(tmp_path, lora_config("linear", r=2, use_dora=True), seed=9)
        encoder.adapters.add("dora", tmp_path)
        encoder.config.window_seconds = 0.5
        names = (*names, "dora")
    kinds = [(name, samples, seed) for name in names for samples in lengths for seed in (1, 2)]
    alone = {}
    for name, samples, seed in kinds:
        encoder.adapters.set_adapter(name)
        alone[name, samples, seed] = encoder.embed([noise(seed, samples)])[0]
    encoder.adapters.disable()
    far = min(np.abs(a - b).max() for i, a in enumerate(alone.values()) for j, b in enumerate(alone.values()) if i < j)
    assert far > 1e-2  # so none can be taken for another
    found: list[Pass] = []

    def caller(number: int) -> float:
        rng, worst = random.Random(number), 0.0
        for _ in range(150):
            kind = rng.choice(kinds)
            answer = batcher.embed(noise(kind[2], kind[1]), kind[0])
            worst = max(worst, np.abs(answer.numbers - alone[kind]).max())
            assert answer.weights == encoder.weights(kind[0])
        return worst

    with MicroBatcher(encoder, workers=workers, on_pass=found.append) as batcher, ThreadPoolExecutor(16) as pool:
        assert max(pool.map(caller, range(16))) < 1e-4
    assert sum(each.rows for each in found) == 16 * 150
    assert max(each.rows for each in found) > (4 if workers == 1 else 1)


def test_workers_run_passes_at_once(encoder):
    """Each pass waits for the other: with one worker, or behind a lock, none would end."""
    both, plain, threads = threading.Barrier(2), encoder.embed_padded, torch.get_num_threads()

    def embed_padded(*arguments):
        both.wait(60)
        return plain(*arguments)

    encoder.embed_padded = embed_padded
    with MicroBatcher(encoder, workers=2) as batcher:
        futures = [batcher.submit(noise(n, 4000), name) for n, name in enumerate(["one", "two"])]
        assert [future.result(60).weights for future in futures] == [encoder.weights("one"), encoder.weights("two")]
    assert torch.get_num_threads() == threads


def test_requests_are_taken_in_the_order_they_came(encoder):
    found: list[Pass] = []
    done: list[int] = []
    batcher = MicroBatcher(encoder, batch_seconds=1.0, on_pass=found.append)
    with batcher, Held(batcher) as held:
        # The long one is first of those that wait; all short ones after it would fit into rounds before it.
        lengths = [14_000, *[4_000] * 8]
        futures = [batcher.submit(noise(n, length)) for n, length in enumerate(lengths)]
        for number, future in enumerate(futures):
            future.add_done_callback(lambda _, number=number: done.append(number))
        held.release()
        [future.result(60) for future in futures]
    assert done == sorted(done)
    assert [each.rows for each in found] == [1, 1, 4, 4]  # a second of speech at most in each


def test_a_lone_caller_does_not_wait_for_others(encoder):
    with MicroBatcher(encoder, wait_ms=60_000) as batcher:
        for _ in range(3):
            batcher.embed(noise(1, 4000), timeout=30)


def test_the_deadline_ends_the_wait_for_callers_who_left(encoder):
    with MicroBatcher(encoder, wait_ms=50) as batcher:
        with Held(batcher) as held:
            futures = [batcher.submit(noise(n, 4000)) for n in range(8)]
            held.release()
            [future.result(60) for future in futures]
        batcher.embed(noise(1, 4000), timeout=30)  # the others never come


def test_a_full_queue_answers_at_once(encoder):
    batcher = MicroBatcher(encoder, queue_seconds=3)
    with batcher, Held(batcher) as held:
        futures = [batcher.submit(noise(n, 4000)) for n in range(3)]
        with pytest.raises(QueueFullError, match="3 requests with 3 s of speech wait. Ask again"):
            batcher.submit(noise(9, 4000))
        assert futures[1].cancel()
        assert batcher.waiting == (2, 2.0)
        futures[1] = batcher.submit(noise(9, 4000))  # the place of the one that was cancelled
        held.release()
        assert len([future.result(60) for future in futures]) == 3
    assert batcher.waiting == (0, 0.0)


def test_a_request_longer_than_the_queue_is_taken_when_nothing_waits(encoder):
    with MicroBatcher(encoder, queue_seconds=0.1, batch_seconds=0.1) as batcher:
        assert batcher.embed(noise(1, 2 * SECOND)).numbers.shape == (encoder.config.embedding_size,)


def test_cancelled_requests_are_not_run(encoder):
    found: list[Pass] = []
    batcher = MicroBatcher(encoder, on_pass=found.append)
    with batcher, Held(batcher) as held:
        futures = [batcher.submit(noise(n, 4000)) for n in range(4)]
        with pytest.raises(TimeoutError):
            batcher.embed(noise(5, 4000), timeout=0.01)
        assert futures[0].cancel() and futures[3].cancel()
        held.release()
        assert [future.cancelled() or future.result(60) is not None for future in futures] == [True] * 4
    assert [each.rows for each in found] == [1, 2]


def test_from_an_event_loop(encoder):
    async def several():
        answers = asyncio.gather(*(batcher.embed_async(noise(n, 4000), ADAPTERS[n % 3]) for n in range(12)))
        withdrawn = asyncio.create_task(batcher.embed_async(noise(99, 4000)))
        await asyncio.sleep(0)
        withdrawn.cancel()
        with pytest.raises(asyncio.CancelledError):
            await withdrawn
        return await answers

    with MicroBatcher(encoder) as batcher:
        found = asyncio.run(several())
    encoder.adapters.set_adapter("two")
    assert np.allclose(found[1].numbers, encoder.embed([noise(1, 4000)])[0], atol=1e-5)


def test_what_cannot_be_embedded_is_refused_before_it_meets_others(encoder):
    with MicroBatcher(encoder) as batcher:
        with pytest.raises(ValueError, match="the utterance"):
            batcher.submit(noise(1, 10))
        with pytest.raises(ValueError, match="NaN or infinite"):
            batcher.submit(np.full(4000, np.nan, np.float32))
        with pytest.raises(ValueError, match="no adapter 'four'; loaded are: one, two, three"):
            batcher.submit(noise(1, 4000), "four")


def test_a_request_whose_adapter_was_deleted_takes_no_other_with_it(encoder):
    batcher = MicroBatcher(encoder)
    with batcher, Held(batcher) as held:
        lost, kept = batcher.submit(noise(1, 4000), "one"), batcher.submit(noise(1, 4000), "two")
        deleting = threading.Thread(target=encoder.adapters.delete, args=("one",))
        deleting.start()
        deleting.join(0.2)
        held.release()
        deleting.join()
        assert kept.result(60).weights == encoder.weights("two")
        if lost.exception(60) is not None:  # the bank was free in time
            assert "no adapter 'one'" in str(lost.exception())


@pytest.mark.parametrize("workers", [1, 3])
def test_adapters_come_and_go_while_requests_are_answered(encoder, folders, workers):
    """Each answer says what weights it is of, and is of them."""
    alone = {}
    for name in (None, *ADAPTERS):
        encoder.adapters.set_adapter(name)
        alone[encoder.fingerprint] = encoder.embed([noise(7, 4000)])[0]
    encoder.adapters.disable()
    stop = threading.Event()

    def ask(number: int) -> int:
        answers = 0
        while not stop.is_set():
            try:
                answer = batcher.embed(noise(7, 4000), ("swapped", "one", None)[number % 3])
            except ValueError as error:
                assert "no adapter 'swapped'" in str(error)
                continue
            assert np.abs(answer.numbers - alone[answer.weights]).max() < 1e-4
            answers += 1
        return answers

    with MicroBatcher(encoder, workers=workers) as batcher, ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(ask, number) for number in range(6)]
        try:
            for turn in range(10):
                encoder.adapters.add("swapped", folders[ADAPTERS[1 + turn % 2]])
                time.sleep(0.02)
                encoder.adapters.delete("swapped")
        finally:
            stop.set()
        assert all(each.result(60) for each in asking[1::3])


def test_a_failing_pass_is_repeated_row_by_row(encoder):
    plain = encoder.embed_padded

    def out_of_memory(waveforms, lengths, adapters):
        if len(lengths) > 1 or lengths[0] == 5000:
            raise RuntimeError("out of memory")
        return plain(waveforms, lengths, adapters)

    batcher = MicroBatcher(encoder)
    with batcher, Held(batcher) as held:
        held.plain = out_of_memory
        futures = [batcher.submit(noise(1, samples)) for samples in (4000, 5000, 4000)]
        held.release()
        assert str(futures[1].exception(60)) == "out of memory"
        assert futures[0].result(60) is not None and futures[2].result(60) is not None


def test_closing_answers_what_waits_or_cancels_it(encoder):
    batcher = MicroBatcher(encoder)
    with Held(batcher) as held:
        future = batcher.submit(noise(1, 4000))
        closing = threading.Thread(target=batcher.close)
        closing.start()
        while batcher.running:
            time.sleep(0.001)
        with pytest.raises(BatcherClosedError):
            batcher.submit(noise(1, 4000))
        held.release()
        closing.join()
    assert future.result(0) is not None

    batcher = MicroBatcher(encoder)
    with Held(batcher) as held:
        future: Future = batcher.submit(noise(1, 4000))
        closing = threading.Thread(target=batcher.close, kwargs={"drain": False})
        closing.start()
        with pytest.raises(CancelledError):
            future.result(60)
        held.release()
        closing.join()


def test_a_model_with_a_merged_adapter(tmp_path, folders):
    tiny_model().save_pretrained(tmp_path / "base")
    encoder = SpeakerEncoder.from_pretrained(tmp_path / "base", folders["one"], device="cpu")
    with MicroBatcher(encoder) as batcher:
        answer = batcher.embed(noise(1, 4000))
        assert np.allclose(answer.numbers, encoder.embed([noise(1, 4000)])[0], atol=1e-5)
        assert answer.weights == encoder.fingerprint
        with pytest.raises(ValueError, match="merged into its weights"):
            batcher.submit(noise(1, 4000), "two")


@pytest.mark.parametrize(
    "wrong", [{"wait_ms": -1}, {"batch_seconds": 0}, {"queue_seconds": float("nan")}, {"workers": 0}]
)
def test_settings_that_make_no_sense(encoder, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MicroBatcher(encoder, **wrong)


# ---------------------------------------------------------------- passes

LENGTHS = st.lists(st.integers(1, 40 * SECOND), min_size=1, max_size=12)


def cost(rows: list[list[int]], lengths: list[int]) -> float:
    return sum(len(each) * max(lengths[row] for row in each) + PASS_SECONDS * SECOND for each in rows)


@given(LENGTHS, st.integers(SECOND, 60 * SECOND), st.integers(SECOND, 30 * SECOND), st.integers(1, 12))
def test_passes_hold_every_row_once_within_the_bounds(lengths, most, window, most_rows):
    found = passes(lengths, most, window, most_rows)
    assert sorted(row for each in found for row in each) == list(range(len(lengths)))
    assert found[0][0] == 0 and found == sorted(found)
    for rows in found:
        own = [lengths[row] for row in rows]
        assert len(rows) <= most_rows
        assert len(rows) == 1 or len(rows) * max(own) <= most
        assert len({length > window for length in own}) == 1


@given(LENGTHS)
def test_passes_are_the_cheapest(lengths):
    """Against one pass, a pass for each row, and every cut of the sorted rows in two."""
    most = window = 10**9
    best = cost(passes(lengths, most, window), lengths)
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    others = [[order], [[row] for row in order], *([order[:cut], order[cut:]] for cut in range(1, len(order)))]
    assert all(best <= cost(other, lengths) for other in others)


def test_like_lengths_share_a_pass():
    second = [SECOND] * 4 + [10 * SECOND] * 2
    assert passes(second, 10**9, 10**9) == [[0, 1, 2, 3], [4, 5]]
    assert passes([SECOND, 2 * SECOND], 10**9, 10**9) == [[0, 1]]
