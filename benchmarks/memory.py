"""What benchmarks of memory share: a process of their own, and a call's peak by the system, by torch and on a GPU."""

import multiprocessing
import os
import resource
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def in_fresh_process(function: Callable, *arguments, preload: Sequence[str] = ("mrl_redimnet.training.checkpoints",)):
    """The function's answer from a process that has the modules `preload` loaded and has done nothing yet.

    Forked from a server: a process started anew would inherit this one's peak memory. Freed blocks go back to the
    system at once there, so that its memory is that of live tensors; times are no use in it.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*preload])
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def resident() -> int:
    """Bytes of memory that this process occupies."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_resident(call: Callable[[], object]) -> int:
    """The most bytes that this process occupies during a call."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    call()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def peak_allocated(call: Callable[[], object]) -> int:
    """The most bytes of tensors that live at once during a call, beyond those before it. Workspaces inside libraries
    are not among them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def peak_on_gpu(call: Callable[[], object]) -> int:
    """The most bytes of tensors on the GPU at once during a call, beyond those before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
