"""What benchmarks of speed share: the machine in words, quartiles, contestants that take turns, and their ratios."""

import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

PAUSE_SECONDS = 0.02  # between contestants: the idle threads of one spin for a while, on the cores of the next


def machine(device: str = "cpu") -> str:
    """Processor with its vector instructions, and system; and the GPU, where `device`, which is measured, is one."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    name, instructions = names[0] if names else platform.processor(), torch.backends.cpu.get_cpu_capability()
    words = f"{name} ({instructions}), {len(names)} cores, {platform.system()}"
    return f"{words}, {torch.cuda.get_device_name()}" if device == "cuda" else words


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles of at least two values."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low": low, "high": high}


def take_turns(
    calls: dict[str, Callable[[], object]], seconds: float, fewest: int = 5, most: int = 50, device: str = "cpu"
) -> dict[str, list[float]]:
    """Rounds in which each call runs once, in an order drawn anew -> seconds of each call, by round.

    Rounds follow until `seconds` have gone by, at least `fewest` and at most `most` of them. Warm the calls up before.
    device: "cuda" where they run on a GPU; a call then ends when the GPU has done what it was told.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, turns = list(calls), random.Random(0)
    end = time.perf_counter() + seconds
    for done in range(most):
        if done >= fewest and time.perf_counter() > end:
            break
        turns.shuffle(order)
        for name in order:
            time.sleep(PAUSE_SECONDS)
            start = time.perf_counter()
            calls[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return times


def speedup(times: dict[str, list[float]], reference: str, name: str) -> dict[str, float]:
    """Quartiles over rounds of how many times faster `name` was than `reference` in the same round."""
    return quartiles([slow / fast for slow, fast in zip(times[reference], times[name], strict=True)])
