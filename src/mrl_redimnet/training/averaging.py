"""Averages of a model's weights along a run: exponential, after every step, and plain, over the last evaluation points.

Averaged weights lie nearer the middle of the region that training wanders about in, and often generalise better than
any of those averaged (Polyak and Juditsky 1992; arXiv 1803.05407, 1806.05594; exponentially: arXiv 1703.01780).
Batch-norm statistics are averaged like weights, as wespeaker's model averaging does, so no pass over the training
speech follows; buffers of whole numbers (counts) are not averaged, the newest count. Buffers that a model does not
save are constants and stay. Names of tensors are those of `model.state_dict()`; give the model without wrappers.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mrl_redimnet.files import replace_file

# ----------------------------------------------------------------------------------------------------------------------
# Exponential


class Ema:
    """The exponential moving average of a model's weights and batch-norm statistics.

    average <- d average + (1 - d) weights after each step, where d = min(decay, (1 + t) / (10 + t)) for t updates so
    far: early on the average reaches back over a share of the run only, and soon forgets the random weights it began
    from (as in TensorFlow's ExponentialMovingAverage). Kept in float32 at least, on the model's device. What is frozen
    equals its average to the last bit.

    Plain tensors instead of torch's AveragedModel: that one averages whole numbers too, and a copy of the whole module
    would not follow an adapter whose ranks are cut during training.

    It can be given to `accelerator.register_for_checkpointing`; a resumed run goes on to bit-identical averages. Raises
    ValueError for a decay outside [0, 1), and where the model's tensors are no longer those averaged.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: got {decay}, expected a number from 0 to below 1, such as 0.999.")
        self.decay, self.updates = decay, 0
        self.tensors: dict[str, torch.Tensor] = {}
        self.reset(model)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes in the model's tensors as they are after a step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        now = model.state_dict()
        _check_tensors(self.tensors, now, "the average", "Ema.reset(model) begins the average anew")
        averages, values = [], []
        for name, value in now.items():
            average = self.tensors[name] = self.tensors[name].to(value.device)  # models move after construction
            if value.is_floating_point():
                averages.append(average)
                values.append(value.to(average.dtype))
            else:
                average.copy_(value)
        get_ema_multi_avg_fn(decay)(averages, values, self.updates)
        self.updates += 1

    def copy_to(self, model: nn.Module) -> None:
        """Puts the averages into the model."""
        _copy(self.tensors, model, "the average")

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """`with ema.applied(model):` the model holds the averages; then the trained tensors again, bit for bit,
        whatever happened in between.
        """
        trained = {name: value.clone() for name, value in model.state_dict().items()}
        try:
            self.copy_to(model)
            yield model
        finally:
            _copy(trained, model, "the trained weights")

    def transform(self, model: nn.Module, change: Callable[[nn.Module], object]) -> None:
        """Does to the averages what `change(model)`, which works in place, does to a model; the model stays as it is.

        For a linear map, such as a rotation of the basis, that is exact: the average of turned weights is the turned
        average. `change` must not depend on the weights: with embeddings that the trained model gave beforehand,
        `lambda m: rotate(m, embeddings)` turns model and average alike.
        """
        with self.applied(model):
            change(model)
            self._restart(model, self.tensors)

    def reset(self, model: nn.Module, names: Iterable[str] | None = None) -> None:
        """Restarts the averages of the named tensors from the model; None: of all, which may then be others.

        Restarting all restarts the rise of the decay, too. Raises ValueError for names the model does not have.
        """
        if names is None:
            self.updates, self.tensors = 0, {}
            names = model.state_dict()
        self._restart(model, names)

    def _restart(self, model: nn.Module, names: Iterable[str]):
        values, names = model.state_dict(), list(names)
        if unknown := [name for name in names if name not in values]:
            raise ValueError(f"names: the model has no tensor {', '.join(unknown[:5])}.")
        self.tensors |= {name: _kept(values[name]) for name in names}

    def state_dict(self) -> dict:
        """The averages and how many updates are in them. `decay` is the recipe's, not the state's."""
        return {"updates": self.updates, "tensors": self.tensors}

    def load_state_dict(self, state: dict) -> None:
        """Takes over a state, and with it what is averaged, on the devices that the tensors were on."""
        devices = {name: tensor.device for name, tensor in self.tensors.items()}
        self.updates = int(state["updates"])
        self.tensors = {
            name: t.detach().to(devices.get(name, t.device)).clone() for name, t in state["tensors"].items()
        }


def _kept(value: torch.Tensor) -> torch.Tensor:
    """A copy that small steps can be added to: in bfloat16, a thousandth of a change would round to none."""
    dtype = torch.promote_types(value.dtype, torch.float32) if value.is_floating_point() else value.dtype
    return value.detach().to(dtype, copy=True)


# ----------------------------------------------------------------------------------------------------------------------
# Over the last evaluation points


class LastWeights:
    """The weights at the last evaluation points, one file each (`step-NNNNNNNN.safetensors`), and their mean.

    keep: how many are averaged. Under several processes the main one adds; all may read once it has.
    """

    NAME = re.compile(r"step-(\d{8})\.safetensors")

    def __init__(self, folder: str | Path, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"keep: got {keep}, expected at least 1 evaluation point to average.")
        self.folder, self.keep = Path(folder), keep

    @property
    def steps(self) -> list[int]:
        """The steps of the files there are, rising."""
        names = (self.NAME.fullmatch(path.name) for path in self.folder.glob("step-*.safetensors"))
        return sorted(int(name[1]) for name in names if name)

    def begin(self, step: int) -> None:
        """Drops what was written after `step`, from which a run is resumed (0: all, the run is new)."""
        self._drop(later for later in self.steps if step == 0 or later > step)
        for unfinished in self.folder.glob(".*.writing"):
            unfinished.unlink()

    def add(self, step: int, model: nn.Module, resume_step: int) -> None:
        """Writes the model's tensors, whole or not at all, then drops files that will not be needed again.

        resume_step: of the newest complete checkpoint, 0 without one. A run resumed there will average the last `keep`
        files up to it, so they stay as well: at most 2 `keep` files. On an error, a full disk for one, the files that
        were there are untouched.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
        replace_file(self._file(step), lambda temporary: save_file(tensors, temporary))
        steps = self.steps
        needed = {*steps[-self.keep :], *[earlier for earlier in steps if earlier <= resume_step][-self.keep :]}
        self._drop(set(steps) - needed)

    @torch.no_grad()
    def mean_into(self, model: nn.Module, since: int = 0) -> list[int]:
        """Puts the mean of the last `keep` files (or as many as there are) into the model; returns their steps.

        since: files of earlier steps are left out; after a rotation of the basis, the step of the first evaluation in
        the new one. Sums are in float64. Buffers of whole numbers are the newest file's. Raises FileNotFoundError where
        there is nothing to average, ValueError for files that cannot be read or hold other tensors than the model.
        """
        steps = [step for step in self.steps if step >= since][-self.keep :]
        if not steps:
            raise FileNotFoundError(
                f"{self.folder} holds no weights of step {since} or later: add() writes them at evaluation points."
            )
        wanted = model.state_dict()
        sums: dict[str, torch.Tensor] = {}
        for step in steps:
            for name, value in self._load(step, wanted).items():
                averaged = value.is_floating_point()
                sums[name] = sums[name] + value.double() if averaged and name in sums else value
        means = {name: t / len(steps) if t.is_floating_point() else t for name, t in sums.items()}
        _copy(means, model, f"the files in {self.folder}")
        return steps

    def _load(self, step: int, wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        file = self._file(step)
        try:
            with safe_open(file, "pt") as tensors:
                shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
            _check_shapes(shapes, wanted, str(file), "it is of another model: remove it, or average in another folder")
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read ({error}): remove it, and average the others.") from error

    def _file(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"

    def _drop(self, steps: Iterable[int]):
        for step in steps:
            self._file(step).unlink()


# ----------------------------------------------------------------------------------------------------------------------
# Tensors by name


@torch.no_grad()
def _copy(tensors: dict[str, torch.Tensor], model: nn.Module, source: str):
    """Copies into the model's own tensors: an optimiser and a compiled graph still hold the right ones."""
    own = model.state_dict()
    _check_tensors(tensors, own, source, "they are of another model, or ranks were changed since")
    for name, value in own.items():
        value.copy_(tensors[name])


def _check_tensors(tensors: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], source: str, hint: str):
    _check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, wanted, source, hint)


def _check_shapes(shapes: dict[str, tuple], wanted: dict[str, torch.Tensor], source: str, hint: str):
    """Raises ValueError listing where names or shapes differ from the model's."""
    wrong = [f"{name} is not in the model" for name in shapes if name not in wanted]
    for name, tensor in wanted.items():
        if name not in shapes:
            wrong.append(f"{name} is missing")
        elif shapes[name] != tuple(tensor.shape):
            wrong.append(f"{name} is {list(shapes[name])}, the model's {list(tensor.shape)}")
    if wrong:
        raise ValueError(f"{source}: {len(wrong)} tensors do not fit the model: {'; '.join(wrong[:5])}. {hint}.")
