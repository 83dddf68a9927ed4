"""What bounds each part of the network: its time, arithmetic and traffic beside what the processor can do.

`measure_ceilings` times a large matrix product and passes over memory. `measure_parts` runs a model in eager mode and
puts every operation that torch executes down to the part of the network that called it (Williams et al. 2009,
"Roofline"). Traffic counts each operation's inputs, outputs and weights once, as eager execution moves them; an
operation without a product (a norm, GELU, a sum) counts as one FLOP per number it reads or writes, whichever are more.
"""

import math
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PASS_BYTES = [2**p for p in range(16, 30, 2)]  # sizes of the three arrays together: 64 KiB to 256 MiB
PRODUCT_SHAPES = ((4096, 1024), (2048, 512))  # rows and columns, times columns and columns
# Which part a module belongs to: the first pattern found in its name; modules without one belong to their parent's.
PLACES = [
    ("front end", r"^front_end$"),
    ("stem", r"^trunk\.stem$"),
    ("mixing of maps", r"\.mix$"),
    ("strides", r"\.stride$"),
    ("2-D blocks", r"\.(blocks\.\d+|squeeze)$"),
    ("1-D blocks", r"\.context$"),
    ("pooling", r"^pooling$"),
    ("projection", r"^projection$"),
]
DIVIDED = ("2-D blocks", "1-D blocks")  # by kind of operation; a convolution with a kernel of 1x1 is a product
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_")
# Products by name, with the argument whose last axis is summed over.
PRODUCTS = {"mm": 0, "bmm": 0, "matmul": 0, "linear": 0, "addmm": 1, "baddbmm": 1, "_mkl_linear": 0}


@dataclass(frozen=True)
class Ceilings:
    """Rates that were reached: products in GFLOP/s by dtype, and passes over memory in GB/s by bytes touched."""

    gflops: dict[str, float]
    copy: dict[int, float]
    triad: dict[int, float]

    @classmethod
    def from_record(cls, record: dict) -> "Ceilings":
        """From its dictionary, also after JSON has made the sizes text."""
        passes = {kind: {int(size): rate for size, rate in record[kind].items()} for kind in ("copy", "triad")}
        return cls(record["gflops"], **passes)

    def bandwidth(self, footprint: float) -> float:
        """GB/s of the faster kind of pass at the smallest measured size that holds `footprint` bytes."""
        size = min((size for size in self.triad if size >= footprint), default=max(self.triad))
        return max(self.triad[size], self.copy[size])


@dataclass
class Part:
    """Operations of a part: seconds (median over runs), how many, FLOP, bytes moved, the least seconds by bandwidth."""

    seconds: float = 0.0
    calls: int = 0
    flop: float = 0.0
    bytes: float = 0.0
    traffic_seconds: float = 0.0
    runs: list[float] = field(default_factory=list)


def measure_ceilings() -> Ceilings:
    """With torch's current number of threads; takes some seconds."""
    gflops = {str(dtype).removeprefix("torch."): _product_rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return Ceilings(gflops, {n: _copy_rate(n) for n in PASS_BYTES}, {n: _triad_rate(n) for n in PASS_BYTES})


def _copy_rate(size: int) -> float:
    """GB/s of a copy that reads and writes `size` bytes together."""
    a, b = torch.rand(2, size // 8)
    return 1e-9 * 8 * len(a) / _best(lambda: a.copy_(b))


def _triad_rate(size: int) -> float:
    """GB/s of a = b + 0.5 c, `size` bytes together."""
    a, b, c = torch.rand(3, size // 12)
    return 1e-9 * 12 * len(a) / _best(lambda: torch.add(b, c, alpha=0.5, out=a))


@torch.inference_mode()
def _product_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of a large matrix product by the faster of torch's two libraries, BLAS and oneDNN: which, depends on the
    processor."""
    best = 0.0
    for rows, columns in PRODUCT_SHAPES:
        a, b = torch.randn(rows, columns).to(dtype), torch.randn(columns, columns).to(dtype)
        image = a.view(1, 1, rows, columns).permute(0, 3, 1, 2)  # [1, channels, 1, rows], channels last
        # A 1x1 convolution; its dilation means nothing, but without one torch keeps oneDNN from a single thread.
        for call in (partial(torch.mm, a, b), partial(F.conv2d, image, b[..., None, None], dilation=2)):
            best = max(best, 2e-9 * rows * columns**2 / _best(call))
    return best


def _best(call: Callable[[], object], seconds: float = 0.7) -> float:
    """The shortest time of a call in seconds: a ceiling is what the machine can do undisturbed."""
    call()
    start = time.perf_counter()
    call()
    inner = max(1, round(1e-3 / max(1e-7, time.perf_counter() - start)))  # short calls are timed in a row
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(inner):
            call()
        best = min(best, (time.perf_counter() - start) / inner)
    return best


@torch.inference_mode()
def measure_parts(
    model: nn.Module, waveform: torch.Tensor, ceilings: Ceilings, seconds: float, fewest: int = 5
) -> dict:
    """model on waveform [B, T], eager, float32 -> {"seconds" of the whole unobserved, "parts": {name: facts}}.

    Watching costs some microseconds an operation, outside of what is timed; `seconds` shows how much of the whole the
    parts explain.
    """
    whole, parts = [], {}
    model(waveform)
    end = time.perf_counter() + seconds
    while len(whole) < fewest or time.perf_counter() < end:
        start = time.perf_counter()
        model(waveform)
        whole.append(time.perf_counter() - start)
        with _Watch(model, ceilings) as watch:
            model(waveform)
        for name, part in watch.parts.items():
            parts.setdefault(name, part).runs.append(part.seconds)
    facts = {}
    for name, part in parts.items():
        part.seconds = statistics.median(part.runs)
        facts[name] = _facts(part, ceilings)
    return {"seconds": statistics.median(whole), "runs": len(whole), "parts": facts}


def _facts(part: Part, ceilings: Ceilings) -> dict:
    arithmetic = part.flop / (1e9 * ceilings.gflops["float32"])
    bound = max(arithmetic, part.traffic_seconds)
    facts = {name: value for name, value in asdict(part).items() if name != "runs"}
    return facts | {
        "gflops": 1e-9 * part.flop / part.seconds,
        "gbs": 1e-9 * part.bytes / part.seconds,
        "bound_seconds": bound,
        "binds": "arithmetic" if arithmetic >= part.traffic_seconds else "memory",
        "above_bound": part.seconds / bound if bound else None,
    }


class _Watch(TorchDispatchMode):
    """Puts down every operation to the part whose module is running."""

    def __init__(self, model: nn.Module, ceilings: Ceilings):
        super().__init__()
        self.model, self.ceilings, self.parts = model, ceilings, {}
        self._stack, self._hooks = ["rest"], []

    def __enter__(self):
        for name, module in self.model.named_modules():
            place = next((place for place, pattern in PLACES if re.search(pattern, name)), None)
            if place is not None:
                self._hooks.append(module.register_forward_pre_hook(lambda *_, place=place: self._stack.append(place)))
                self._hooks.append(module.register_forward_hook(lambda *_: (self._stack.pop(), None)[1]))
        return super().__enter__()

    def __exit__(self, *error):
        for hook in self._hooks:
            hook.remove()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        elapsed = time.perf_counter() - start
        kind, flop = _arithmetic(func, args, out)
        place = self._stack[-1]
        part = self.parts.setdefault(f"{place}: {kind}" if place in DIVIDED else place, Part())
        part.seconds += elapsed
        part.calls += 1
        if not _moves_nothing(func, (args, kwargs), out):
            moved = sum(map(_bytes, _tensors((args, kwargs, out))))
            part.flop += flop
            part.bytes += moved
            part.traffic_seconds += moved / (1e9 * self.ceilings.bandwidth(moved))
        return out


def _moves_nothing(func, inputs, out) -> bool:
    """Whether an operation touches no numbers: it gives memory, or looks at its input's in another shape, as a reshape
    may or may not."""
    if func.is_view or func.overloadpacket.__name__ in ALLOCATIONS:
        return True
    if func._schema.is_mutable:  # noqa: SLF001 -- what PyTorch's own dispatch modes read
        return False
    memory = [{x.untyped_storage().data_ptr() for x in _tensors(side)} for side in (inputs, out)]
    return bool(memory[0] & memory[1])


def _tensors(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _bytes(x: torch.Tensor) -> int:
    """Bytes that a tensor's numbers take; an axis that was only expanded is there once."""
    shape = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride or size == 0)
    return math.prod(shape) * x.element_size()


def _arithmetic(func, args, out) -> tuple[str, float]:
    """(kind of operation, FLOP); a multiplication and an addition are two."""
    name = func.overloadpacket.__name__
    if "attention" in name:
        query, key = args[0], args[1]
        return "attention", 4.0 * query.numel() * key.shape[-2]
    if "conv" in name and isinstance(out, torch.Tensor):
        kernel = args[1][0]  # [channels in a group, height, width]
        return "products" if kernel[0].numel() == 1 else "convolutions", 2.0 * out.numel() * kernel.numel()
    if name in PRODUCTS:
        return "products", 2.0 * out.numel() * args[PRODUCTS[name]].shape[-1]
    largest = max((x.numel() for x in _tensors((args, out))), default=0)
    if "fft" in name:  # of real numbers, in frames of the last axis
        return "rest", 2.5 * largest * math.log2(max(2, args[0].shape[-1]))
    return "norms, activations, sums", float(largest)
