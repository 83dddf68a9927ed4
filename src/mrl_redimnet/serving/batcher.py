"""Single requests from many callers, run by the network in joint batches.

    with MicroBatcher(encoder) as batcher:
        batcher.embed(waveform, "telephony").numbers              # from any thread
        (await batcher.embed_async(waveform)).numbers             # from an event loop
        batcher.submit(waveform).cancel()                         # a concurrent.futures.Future

A network computes a batch of short utterances in little more than half the time that it takes for one after the other.
Calls of `SpeakerEncoder.embed` from several threads gain nothing of that, and wait for each other. Here a few threads
("workers") run the network, each with a batch of its own: on a CPU, two passes with one core each take much less time
than the same two passes one after the other with both cores (docs/results/service_load.md). What waits while they are
busy makes up the next round; rows of different adapters share a batch.
"""

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from configuration_mrl_redimnet import SAMPLING_RATE, MRLReDimNetError
from mrl_redimnet.encoder import SpeakerEncoder, padded
from mrl_redimnet.speed.threads import CoreShares, workers_for

WAIT_MS = 10.0
BATCH_SECONDS = 60.0
QUEUE_SECONDS = 600.0
# A pass over the network costs as much as so many more seconds of speech in it; 1 to 3 s make little difference.
PASS_SECONDS = 2.0
MOST_ROWS = 64  # of a round: more bring no speed, and dividing a round into passes takes time with the square of them
LEAST_SECONDS = 1.0  # that an utterance counts in the queue, however short it is: it costs work of its own


class QueueFullError(MRLReDimNetError, RuntimeError):
    """So much speech waits already that another request is not taken. Ask again a little later."""


class BatcherClosedError(MRLReDimNetError, RuntimeError):
    """The batcher was closed, or is being closed: it takes no more requests."""


@dataclass(frozen=True)
class Embedding:
    """An answer.

    Attributes:
        numbers: [D] float32, the whole embedding.
        weights: of what embedded, as `SpeakerEncoder.fingerprint` names them.
    """

    numbers: NDArray
    weights: str


@dataclass(frozen=True)
class Pass:
    """What one pass over the network was, for measurements.

    Attributes:
        rows: utterances in it. seconds: of speech in it. padded: seconds with padding. took: seconds that it took.
        waited: seconds that each of its rows had waited.
    """

    rows: int
    seconds: float
    padded: float
    took: float
    waited: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class _Request:
    waveform: NDArray
    adapter: str | None
    future: "Future[Embedding]"
    arrived: float

    @property
    def seconds(self) -> float:
        return len(self.waveform) / SAMPLING_RATE

    @property
    def counts(self) -> float:
        return max(LEAST_SECONDS, self.seconds)


class MicroBatcher:
    """Embeds single utterances in joint batches, with their adapters, for callers in threads and event loops.

    Requests are taken in the order in which they came, in rounds: a round is the longest waiting ones, as many as fit
    `batch_seconds`. Nobody is in a later round than somebody who came later, so nobody starves. Within a round,
    utterances of like lengths go through the network together, those with the oldest request first, where that saves
    more padding than another pass costs, and there is a pass for each worker. A worker that is free takes the next
    pass; when all passes of a round are taken, the next round begins.

    Attributes:
        encoder: what embeds. Its model is put into evaluation mode and must not change, but for its adapters: these
            may be added and deleted at any time. Who is waiting for one that is deleted gets a ValueError.
        on_pass: as given; may be set later.
    """

    def __init__(
        self,
        encoder: SpeakerEncoder,
        *,
        wait_ms: float = WAIT_MS,
        batch_seconds: float = BATCH_SECONDS,
        queue_seconds: float = QUEUE_SECONDS,
        workers: int | None = None,
        on_pass: Callable[[Pass], object] | None = None,
    ) -> None:
        """Args:
        encoder: a model, with the adapters in `encoder.adapters`, or with one merged into it.
        wait_ms: the deadline: how long an idle network waits, at most, for as many requests as were under way
            together before. It does not wait where the last round was a single request.
        batch_seconds: of speech in a round and of padded speech in a pass, which bounds memory. A longer utterance is a
            round by itself.
        queue_seconds: of speech that may wait; each utterance counts as at least one second. Into an empty queue an
            utterance of any length is taken.
        workers: passes over the network at once, which share torch's threads; each needs memory for `batch_seconds`.
            None: on a CPU as many as torch has threads, four at most; on an accelerator one. Rows of an adapter that is
            more than layers of LoRA, and utterances beyond the model's window with adapters, run alone.
        on_pass: is told of every `Pass`, by the worker that ran it. It must be quick, raise nothing, and bear to be
            called by several threads at once.

        Raises:
            ValueError: numbers that are not above zero (wait_ms: below zero).
        """
        if not wait_ms >= 0:
            raise ValueError(f"wait_ms: got {wait_ms}, expected 0 or more.")
        workers = workers_for(encoder.device) if workers is None else workers
        settings = {"batch_seconds": batch_seconds, "queue_seconds": queue_seconds, "workers": workers}
        for name, value in settings.items():
            if not value > 0:
                raise ValueError(f"{name}: got {value}, expected a number above 0.")
        self.encoder = encoder
        encoder.model.eval()
        self._wait, self._batch_seconds, self._queue_seconds = wait_ms / 1000, batch_seconds, queue_seconds
        self.on_pass = on_pass
        with contextlib.suppress(ValueError):  # an adapter is merged into the model: there will be no others
            _ = encoder.adapters
        self._own_weights = encoder.weights(None)  # once: to hash a model takes a while
        self._extractor = encoder.extractor()
        self._window = int(encoder.config.window_seconds * SAMPLING_RATE)
        self._changed = threading.Condition()
        self._waiting: deque[_Request] = deque()
        self._waiting_seconds = 0.0
        self._closed = False
        self._ready: deque[list[_Request]] = deque()  # passes of the round that nobody has taken yet
        self._busy = 0  # requests of the passes that are ready or run
        self._expected = 1  # requests under way together
        shares = CoreShares(workers)
        self._threads = [
            threading.Thread(target=self._work, args=(shares,), name=f"mrl-redimnet batches {number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()
        shares.all_taken()

    # ------------------------------------------------------------ for callers

    def submit(self, waveform: ArrayLike, adapter: str | None = None) -> "Future[Embedding]":
        """A promise of an utterance's `Embedding`. Cancelled before its round begins, it costs nothing.

        Args:
            waveform: [samples] at 16 kHz, floating point in -1 .. 1 or int16. It must not change until the answer.
            adapter: its name in `encoder.adapters`; None: the model itself.

        Raises:
            QueueFullError: at once, where too much waits.
            BatcherClosedError: after `close`.
            ValueError: a waveform that the model cannot take (too short, not one channel, NaN), or an adapter that is
                not there. Where it is deleted while the request waits, the promise raises it.
        """
        checked = self._extractor.checked(waveform, "the utterance")
        if adapter is not None:
            self.encoder.weights(adapter)
        request = _Request(checked, adapter, Future(), time.monotonic())
        with self._changed:
            if self._closed:
                raise BatcherClosedError("The service is stopping: it takes no more requests.")
            if self._waiting and self._waiting_seconds + request.counts > self._queue_seconds:
                raise QueueFullError(
                    f"The queue is full: {len(self._waiting)} requests with {self._waiting_seconds:.0f} s of speech "
                    "wait. Ask again a little later."
                )
            self._waiting.append(request)
            self._waiting_seconds += request.counts
            self._changed.notify_all()
        request.future.add_done_callback(lambda _: self._drop_cancelled(request))
        return request.future

    def embed(self, waveform: ArrayLike, adapter: str | None = None, timeout: float | None = None) -> Embedding:
        """As `submit`, and waits for the answer. Raises TimeoutError after `timeout` seconds; the request is then
        withdrawn.
        """
        future = self.submit(waveform, adapter)
        try:
            return future.result(timeout)
        except FutureTimeoutError:
            future.cancel()
            raise

    async def embed_async(self, waveform: ArrayLike, adapter: str | None = None) -> Embedding:
        """As `submit`, for a task of an event loop; to cancel the task withdraws the request."""
        return await asyncio.wrap_future(self.submit(waveform, adapter))

    @property
    def waiting(self) -> tuple[int, float]:
        """Requests that wait, and the seconds of speech that they count."""
        with self._changed:
            return len(self._waiting), self._waiting_seconds

    @property
    def running(self) -> bool:
        """Whether requests are taken and answered."""
        return all(thread.is_alive() for thread in self._threads) and not self._closed

    def close(self, drain: bool = True) -> None:
        """Takes no more requests, and returns when all that wait are answered, or, without drain, cancelled."""
        with self._changed:
            self._closed = True
            dropped = [] if drain else [*self._waiting]
            self._changed.notify_all()
        for request in dropped:
            request.future.cancel()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close(drain=error[0] is None)

    # ------------------------------------------------------------ the workers

    def _drop_cancelled(self, request: _Request) -> None:
        """Gives the place of a cancelled request to others."""
        if request.future.cancelled():
            with self._changed, contextlib.suppress(ValueError):  # it was taken out meanwhile
                self._waiting.remove(request)
                self._waiting_seconds -= request.counts

    def _work(self, shares: CoreShares) -> None:
        shares.take()
        while (requests := self._next_pass()) is not None:
            self._run(requests)
            with self._changed:
                self._expected = self._busy + len(self._waiting)
                self._busy -= len(requests)

    def _next_pass(self) -> list[_Request] | None:
        """Waits for requests, and takes those of a pass; None when there will be no more."""
        with self._changed:
            idle = time.monotonic()
            while not self._ready:
                if self._closed and not self._waiting:
                    return None
                left = None
                if self._waiting:
                    left = max(idle, self._waiting[0].arrived) + self._wait - time.monotonic()
                if left is not None and (left <= 0 or self._closed or self._is_full()):
                    self._begin_round()
                else:
                    self._changed.wait(left)
            return self._ready.popleft()

    def _is_full(self) -> bool:
        """Whether there is nothing to wait for: a whole round, or as many requests as were under way before."""
        if len(self._waiting) >= min(self._expected - self._busy, MOST_ROWS):
            return True
        return sum(request.seconds for request in self._waiting) >= self._batch_seconds

    def _begin_round(self) -> None:
        """Takes what waits out of the queue, and divides it into passes."""
        taken: list[_Request] = []
        seconds = 0.0
        while self._waiting and len(taken) < MOST_ROWS:
            if taken and seconds + self._waiting[0].seconds > self._batch_seconds:
                break
            request = self._waiting.popleft()
            self._waiting_seconds -= request.counts
            if request.future.set_running_or_notify_cancel():
                taken.append(request)
                seconds += request.seconds
        lengths = [len(request.waveform) for request in taken]
        most, rows = round(self._batch_seconds * SAMPLING_RATE), math.ceil(len(taken) / len(self._threads))
        self._ready.extend([taken[row] for row in each] for each in passes(lengths, most, self._window, rows))
        self._busy += len(taken)
        self._changed.notify_all()

    def _run(self, requests: list[_Request]) -> None:
        """Answers requests by one pass over the network. Where that fails, each is run by itself: one that cannot be
        embedded takes no other with it.
        """
        try:
            answers = self._embedded(requests)
        except Exception as error:  # whatever it is, it belongs to those who asked
            if len(requests) == 1:
                requests[0].future.set_exception(error)
                return
            for request in requests:
                self._run([request])
            return
        for request, answer in zip(requests, answers, strict=True):
            request.future.set_result(answer)

    def _embedded(self, requests: list[_Request]) -> list[Embedding]:
        began = time.monotonic()
        adapters = [request.adapter for request in requests]
        lengths = torch.tensor([len(request.waveform) for request in requests])
        with self._same_adapters(adapters, int(lengths.max())):
            weights = {adapter: self._weights(adapter) for adapter in set(adapters)}
            waveforms = padded(request.waveform for request in requests)
            embeddings = self.encoder.embed_padded(waveforms, lengths, adapters)
        if self.on_pass is not None:
            seconds = float(lengths.sum()) / SAMPLING_RATE
            area = waveforms.numel() / SAMPLING_RATE
            waited = tuple(began - request.arrived for request in requests)
            self.on_pass(Pass(len(requests), seconds, area, time.monotonic() - began, waited))
        return [Embedding(numbers.copy(), weights[name]) for numbers, name in zip(embeddings, adapters, strict=True)]

    def _weights(self, adapter: str | None) -> str:
        return self._own_weights if adapter is None else self.encoder.weights(adapter)

    def _same_adapters(self, adapters: Sequence[str | None], samples: int) -> contextlib.AbstractContextManager[Any]:
        """Within, the adapters by these names are the same ones."""
        return self.encoder.adapters.held(adapters, samples) if any(adapters) else contextlib.nullcontext()


def passes(lengths: Sequence[int], most: int, window: int, rows: int = MOST_ROWS) -> list[list[int]]:
    """How utterances of these lengths in samples go through the network: the rows of each pass.

    The division into passes of like lengths with the least cost: padded samples, and `PASS_SECONDS` for each pass. A
    pass holds at most `most` padded samples, or one row, and at most `rows` rows. Rows beyond the model's window, in
    samples, are kept apart, as they take another way through it. The pass with row 0, the oldest, is the first, the
    others follow by their oldest row.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    sizes = [lengths[row] for row in order]
    costs, starts = [0.0], [0]  # of the first n rows in order: the least cost, and where their last pass begins
    for end in range(1, len(order) + 1):
        longest = sizes[end - 1]
        best, at = np.inf, end - 1
        for start in range(end - 1, -1, -1):
            apart = longest > window >= sizes[start]
            if start < end - 1 and (apart or end - start > rows or (end - start) * longest > most):
                break
            cost = costs[start] + (end - start) * longest + PASS_SECONDS * SAMPLING_RATE
            if cost < best:
                best, at = cost, start
        costs.append(best)
        starts.append(at)
    found, end = [], len(order)
    while end:
        found.append(sorted(order[starts[end] : end]))
        end = starts[end]
    return sorted(found)
