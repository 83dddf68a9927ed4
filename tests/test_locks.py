"""The lock of the adapters: held alone, or shared."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mrl_redimnet.adapters.locks import SharedLock


def test_nobody_shares_what_another_holds_alone():
    """Eight threads take it by chance alone or shared, nested or not; what they see inside is checked."""
    lock, alone, sharing, together = SharedLock(), [], [], []

    def work(seed: int):
        rng = random.Random(seed)
        for _ in range(200):
            if rng.random() < 0.3:
                with lock:
                    alone.append(seed)
                    assert alone == [seed] and not sharing
                    with lock, lock.shared():  # nested
                        assert alone == [seed] and not sharing
                    alone.remove(seed)
            else:
                with lock.shared():
                    sharing.append(seed)
                    assert not alone
                    with lock.shared():
                        time.sleep(1e-5)
                        together.append(len(sharing))
                    assert not alone
                    sharing.remove(seed)

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, seed) for seed in range(8)]:
            done.result(60)
    assert max(together) > 1


def test_who_waits_to_hold_it_alone_is_not_overtaken():
    lock, order, begun = SharedLock(), [], threading.Event()

    def hold():
        begun.set()
        with lock:
            order.append("alone")

    def share():
        with lock.shared():
            order.append("shared")

    with lock.shared():
        holding = threading.Thread(target=hold)
        holding.start()
        assert begun.wait(60)
        holding.join(0.05)  # it waits by now
        sharing = threading.Thread(target=share)
        sharing.start()
        sharing.join(0.05)
        with lock.shared():  # who shares it already does not wait for one who waits for it
            assert order == []
    holding.join(60)
    sharing.join(60)
    assert order == ["alone", "shared"]


def test_a_thread_that_shares_it_cannot_hold_it_alone():
    lock = SharedLock()
    with lock.shared(), pytest.raises(RuntimeError, match="shares the lock"):
        lock.__enter__()
    with lock:  # nothing of it is left
        pass


def test_an_error_inside_gives_it_back():
    lock = SharedLock()
    for inside in (lambda: lock, lock.shared):
        with pytest.raises(ZeroDivisionError), inside():
            raise ZeroDivisionError
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lock.__enter__).result(60)
