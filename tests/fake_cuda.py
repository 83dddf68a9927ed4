"""A CUDA device that does not exist, for tests of what a GPU would meet: `with FakeCuda() as cuda: ...`.

Tensors have shapes, types and devices, but no numbers (torch's FakeTensorMode). Every operation passes a spy, which
counts them, and logs what costs time or fails on a GPU: waiting for the device, copies between it and the host, tensors
that were made on the CPU. Tensors of two devices in one operation raise torch's own error.

FakeTensorMode asks a real driver in every backward pass. Here C++ sees the device "meta", and Python "cuda".
"""

import contextlib
import os
import traceback
import warnings
from collections import Counter

import pytest
import torch
import torch._dynamo  # before anything is patched: it compares signatures of what it finds
from torch import nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# Their results' shapes depend on numbers: a GPU would have to be waited for.
WAITING = (aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim)


# Of CUDA's autocast (torch's documentation lists them), what this project and PEFT may call.
TO_HALF = {"linear", "conv1d", "conv2d", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "einsum",
           "scaled_dot_product_attention"}  # fmt: skip
TO_FLOAT32 = {"layer_norm", "group_norm", "softmax", "log_softmax", "softplus", "exp", "log", "rsqrt", "pow", "square",
              "sum", "prod", "cumsum", "norm", "vector_norm", "cross_entropy", "nll_loss", "mse_loss"}  # fmt: skip


class Autocast(TorchFunctionMode):
    """CUDA's autocast, which C++ does only for tensors that it sees on such a device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in TO_HALF | TO_FLOAT32 and torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda") if name in TO_HALF else torch.float32

            def cast(value):
                return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

            with torch.autocast("cuda", enabled=False):
                return func(*tree_map(cast, args), **tree_map(cast, kwargs))
        return func(*args, **kwargs)


class Spy(TorchDispatchMode):
    """Notes what goes wrong in `log`, and where in this project; counts the operations that launch a kernel."""

    def __init__(self):
        super().__init__()
        self.log: Counter[str] = Counter()
        self.operations = 0

    def note(self, what: str):
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(ROOT)]
        frames = [f for f in frames if "site-packages" not in f.filename]
        frames = [f for f in frames if os.path.basename(f.filename) != os.path.basename(__file__)]
        place = f"{os.path.basename(frames[-1].filename)}, {frames[-1].name}" if frames else "autograd"
        self.log[f"{what} in {place}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += not (func.is_view or func.overloadpacket in (aten._unsafe_view, aten.empty))
        args, kwargs = tree_map(self._of_the_device, args), tree_map(self._of_the_device, dict(kwargs or {}))
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            kwargs["device"] = torch.device("cuda")  # C++ asked for a tensor beside one of ours
        packet = func.overloadpacket
        first = args[0] if args else None
        if packet in WAITING and first.device.type == "cuda":
            self.note(f"waiting for {packet.__name__}")
        if packet in (aten.index, aten.index_put, aten.index_put_):
            self._look_at_indices(first, args[1])
        if packet is aten.repeat_interleave and kwargs.get("output_size") is None:
            self.note("waiting for repeat_interleave")
        if packet is aten.copy_ and args[0].device != args[1].device:
            self.note(f"copy {args[1].device.type} to {args[0].device.type}")
        if packet is aten._to_copy:
            target = torch.device(kwargs.get("device") or first.device)
            if target.type != first.device.type:
                self.note(f"copy {first.device.type} to {target.type}")
        result = self._result(func, packet, args, kwargs)
        if isinstance(result, torch.Tensor) and result.device.type == "cpu" and _no_tensor_in(args):
            self.note(f"CPU tensor of {packet.__name__}")
        return result

    def _of_the_device(self, value):
        """What C++ made of a Python list or number, on the device that it sees."""
        if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) and value.device.type == "meta":
            self.note("copy of a Python value to cuda")
            return torch.zeros(value.shape, dtype=value.dtype, device="cuda")
        return value

    def _look_at_indices(self, x, indices):
        for index in indices:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                self.note("waiting for an index of booleans")
            if index is not None and index.device.type == "cpu" and x.device.type == "cuda":
                self.note("copy of an index to cuda")

    @staticmethod
    def _result(func, packet, args, kwargs):
        if packet is aten._local_scalar_dense:
            return 1 if args[0].dtype in (torch.bool, torch.int64, torch.int32) else 1.0
        if packet is aten.equal:
            return True
        if packet is aten.index and any(i is not None and i.dtype == torch.bool for i in args[1]):
            return args[0].flatten(0, args[1][0].dim() - 1).clone()  # as if all were true
        if packet in (aten.masked_select, aten._unique2, aten.nonzero):
            return args[0].flatten().clone()
        # torch's own shape functions of these mix tensors that Python and C++ made.
        if packet is aten.nll_loss_forward:
            x, target, _, reduction = args[:4]
            return x.new_empty(target.shape if reduction == 0 else ()), x.new_empty(())
        if packet is aten.nll_loss_backward:
            return torch.empty_like(args[1])
        if packet is aten.threshold_backward:
            return torch.empty_like(args[0])
        return func(*args, **kwargs)


def _no_tensor_in(values) -> bool:
    return not any(isinstance(value, torch.Tensor) for value in values)


class FakeCuda:
    """The device, as a context; single-threaded.

    answers: what `Tensor.tolist` gives on the device, in the order of the calls (each is in the log, as waiting).
    """

    def __init__(self, answers: list | None = None):
        self.spy, self.answers = Spy(), list(answers or [])

    def __enter__(self) -> "FakeCuda":
        with contextlib.ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            make_subclass = torch.Tensor._make_subclass

            def seen_as_meta(cls, data, requires_grad=False, **options):
                return make_subclass(cls, data, requires_grad, **{**options, "dispatch_device": False})

            patch.setattr(torch.Tensor, "_make_subclass", staticmethod(seen_as_meta))
            patch.setattr(FakeTensor, "tolist", lambda tensor: self._tolist(tensor))
            patch.setattr(fake_tensor, "init_gpu_context", lambda device: None)
            patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
            patch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **options: True)
            # Fake tensors have no memory; an address for each all the same, for code that compares storages.
            patch.setattr(torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata)
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message=".*[Dd]oes not support bfloat16|.*CUDA is not available")
            stack.enter_context(FakeTensorMode())
            stack.enter_context(self.spy)
            stack.enter_context(Autocast())
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *error):
        return self._exit.__exit__(*error)

    def _tolist(self, tensor):
        if tensor.device.type == "cuda":
            self.spy.note("waiting for tolist")
        return self.answers.pop(0)

    @property
    def log(self) -> dict[str, int]:
        """What a GPU would be slow at, and how often."""
        return dict(self.spy.log)

    @property
    def operations(self) -> int:
        return self.spy.operations

    def forget(self):
        self.spy.log.clear()
        self.spy.operations = 0

    def moved(self, module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """`module` with all parameters and buffers on the device; floating ones as `dtype`."""
        for part in module.modules():
            for name, value in part._parameters.items():
                if value is not None:
                    part._parameters[name] = nn.Parameter(self._like(value, dtype), requires_grad=value.requires_grad)
            for name, value in part._buffers.items():
                if value is not None:
                    part._buffers[name] = self._like(value, dtype)
        self.forget()
        return module

    @staticmethod
    def _like(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        dtype = dtype if dtype is not None and value.is_floating_point() else value.dtype
        return torch.empty_strided(value.shape, value.stride(), dtype=dtype, device="cuda")
