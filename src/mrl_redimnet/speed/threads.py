"""Several passes over the network at once on a CPU, each on cores of its own.

The layers of a small network are too small for several cores: two passes with one core each take much less time than
the same two one after the other with both cores (docs/results/service_load.md).
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_WORKERS = 4  # each holds memory, and Python runs one thread at a time


def workers_for(device: torch.device) -> int:
    """How many passes at once: on a CPU as many as torch has threads, four at most; on an accelerator one."""
    return min(torch.get_num_threads(), MOST_WORKERS) if device.type == "cpu" else 1


class CoreShares:
    """Torch's threads, divided among `workers` threads: each calls `take` first, and who started them `all_taken`."""

    def __init__(self, workers: int) -> None:
        self._threads = torch.get_num_threads()
        self._each = max(1, self._threads // workers)
        self._begun = threading.Barrier(workers + 1)

    def take(self) -> None:
        """In a worker: from here on torch uses its share of the cores in this thread. Waits for the others."""
        torch.get_num_threads()  # a thread takes over the default at its first use of torch: not after the next line
        torch.set_num_threads(self._each)
        self._begun.wait()

    def all_taken(self) -> None:
        """Waits for all workers to have their share."""
        self._begun.wait()
        torch.set_num_threads(self._threads)  # a worker sets its own number, but with it that of threads to come

    def give_up(self) -> None:
        """Ends the waiting of the workers that have begun, with `threading.BrokenBarrierError`."""
        self._begun.abort()


def side_by_side(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """function(item) of each item, in their order, `workers` of them at once; a single item gets all cores.

    It is at most `workers` + 1 items ahead of what was taken of it. What an item raises is raised in its place, and
    ends it. RuntimeError where the system gives no more threads.
    """
    if workers == 1:
        yield from map(function, items)
        return
    items = iter(items)
    first = list(itertools.islice(items, 2))
    if len(first) < 2:
        yield from map(function, first)
        return
    shares = CoreShares(workers)
    with ThreadPoolExecutor(workers, "mrl-redimnet embeds", initializer=shares.take) as pool:
        try:
            for _ in range(workers):
                pool.submit(int)  # starts a thread, as those before wait in `take`
        except RuntimeError:  # the system gives no more threads; the pool would wait for those that there are
            shares.give_up()
            raise
        shares.all_taken()
        pending: deque[Future[Result]] = deque()
        try:
            for item in itertools.chain(first, items):
                pending.append(pool.submit(function, item))
                if len(pending) > workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for each in pending:
                each.cancel()
