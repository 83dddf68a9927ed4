"""What a device would object to, or wait for, seen on a machine without one."""

import contextlib
from collections.abc import Iterator

import torch
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode


class WithoutFloat64(torch.Tensor):
    """A tensor on the CPU that stands for one on Apple's GPU: there is no float64, until it is copied to the CPU."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        if function is torch.Tensor.cpu:
            return result.as_subclass(torch.Tensor)
        if isinstance(result, cls) and result.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64.")
        return result


def without_float64(module: torch.nn.Module) -> torch.nn.Module:
    """The module with such tensors for its parameters and buffers."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(parameter.detach().as_subclass(WithoutFloat64))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.as_subclass(WithoutFloat64)
    return module


class Waits(TorchDispatchMode):
    """Notes the operations for which a host would wait for its GPU."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function is torch.ops.aten._to_copy.default:
            self._copied(args[0], result, kwargs.get("non_blocking"))
        if function is torch.ops.aten.copy_.default:
            self._copied(args[1], result, args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        return result

    def _copied(self, source: torch.Tensor, target: torch.Tensor, goes_on: bool | None):
        ways = source.device.type, target.device.type
        if ways == ("cuda", "cpu") or (ways == ("cpu", "cuda") and not goes_on):
            self.seen.append(f"copy {ways[0]} to {ways[1]} {tuple(target.shape)}")


@contextlib.contextmanager
def pretended_gpu(monkeypatch) -> Iterator[Waits]:
    """Within, tensors can be made on "cuda": they have shapes, no values."""
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None)
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True), Waits() as waits:
        yield waits
