"""A classifier over so many speakers that a step uses only some of its rows (partial FC, An et al. 2022, 2203.15565).

With 1,000,000 speakers the logits, their gradients and the gradient of every row are what fills the memory. A step
needs the rows of the batch's own speakers; of the others a random sample gives nearly the same gradient.

    rows = SampledRows(model.classifier, sample=10_000, seed=0)  # before the optimiser and any wrapper of the model
    ...
    local = rows.begin(labels, step, optimizer)
    model(..., labels=local).loss.backward()
    optimizer.step()
    rows.end(optimizer)
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from modeling_mrl_redimnet import MatryoshkaMarginClassifier


class SampledRows:
    """Keeps all rows of a classifier, and their optimiser state, as plain tensors; `classifier.weight` holds a sample.

    sample: speakers per step, those of the batch of all processes among them. All processes of torch.distributed draw
    the same: a function of the seed, the step and all their labels. device: where all rows are kept (None: where they
    are); the CPU may be, whatever the model is on.

    The parameter `classifier.weight` [sample * sub_centers, D] stays one and the same, so an optimiser and
    DistributedDataParallel may hold it. With sample = all speakers every step is that of the full classifier. With
    fewer, rows that were not drawn wait: neither momentum nor weight decay moves them, and moving averages of gradients
    do not fade; the optimiser's step count (the bias correction of AdamW) is that of all rows together. A rarely drawn
    row's first steps under AdamW are therefore up to (1 - beta1) / sqrt(1 - beta2), 3 times by default, as long. The
    losses that sum over wrong speakers ("sphereface2") sum over the sample's.

    Raises ValueError for a sample that does not fit the classifier.
    """

    def __init__(
        self, classifier: MatryoshkaMarginClassifier, sample: int, seed: int, device: torch.device | str | None = None
    ) -> None:
        self.num_speakers, self.centers = classifier.num_speakers, classifier.config.sub_centers
        if not 1 <= sample <= self.num_speakers:
            raise ValueError(f"sample: got {sample}, expected 1 to the classifier's {self.num_speakers} speakers.")
        self.classifier, self.sample, self.seed = classifier, sample, seed
        self.weight = classifier.weight.detach().to(device)
        if _several_processes():
            _broadcast(self.weight)  # a wrapper would do this for parameters alone
        self.state: dict[str, torch.Tensor] = {}  # of the optimiser, each as `weight`; empty before its first step
        self.rows_in_use: torch.Tensor | None = None  # indices into `weight`, between begin and end
        start = self.weight[: sample * self.centers].to(classifier.weight.device, copy=True)
        self._parameter = nn.Parameter(start, requires_grad=classifier.weight.requires_grad)
        classifier.weight = self._parameter

    def begin(self, labels: torch.Tensor, step: int, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        """Puts a step's rows into the classifier and their state into the optimiser; labels [B] -> local labels [B].

        labels are this process's, best on the CPU, where a batch comes from: of labels on a GPU, and of several
        processes under NCCL, the host has to wait for the device. Where gradients of several batches are accumulated,
        they are those of all these batches (their crops in one row), since the rows must stay the same until the step.

        Raises ValueError for labels that are no speakers, more speakers than the sample has room for, or an optimiser
        that does not train these rows; RuntimeError when the step before has not ended, or the optimiser's state is not
        the one that belongs to these rows.
        """
        if self.rows_in_use is not None:
            raise RuntimeError("begin: the step before has not ended; call end(optimizer) after optimizer.step().")
        if not any(p is self._parameter for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("optimizer: it does not train the sampled rows; build it after SampledRows.")
        speakers = self.speakers_of_step(gathered_speakers(labels), step)
        centers = torch.arange(self.centers)
        rows = (torch.from_numpy(speakers)[:, None] * self.centers + centers).flatten()
        rows = rows.to(self.weight.device, non_blocking=self.weight.is_cuda)  # the host does not wait for the device
        state = self._state_of(optimizer)
        if not state:  # a new optimiser begins anew
            self.state = {}
        if set(state) != set(self.state):
            raise RuntimeError(
                f"The optimiser's state of the classifier ({', '.join(sorted(state)) or 'none'}) is not that of the "
                f"sampled rows ({', '.join(sorted(self.state)) or 'none'}): load both from the same checkpoint."
            )
        with torch.no_grad():
            _take(self._parameter, self.weight, rows)
            for name, tensor in state.items():
                _take(tensor, self.state[name], rows)
        self.rows_in_use = rows
        return torch.searchsorted(torch.from_numpy(speakers).to(labels.device), labels)

    def end(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes the rows and their state back after the optimiser's step (or after a step that was left out).

        Raises RuntimeError without a step begun, ValueError for an optimiser whose state is not kept row by row.
        """
        if self.rows_in_use is None:
            raise RuntimeError("end: no step has begun; call begin(labels, step, optimizer) first.")
        with torch.no_grad():
            self._put_back(self.weight, self._parameter)
            for name, tensor in self._state_of(optimizer).items():
                if name not in self.state:
                    self.state[name] = torch.zeros(self.weight.shape, dtype=tensor.dtype, device=self.weight.device)
                self._put_back(self.state[name], tensor)
        self.rows_in_use = None

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """All rows in the classifier, where they are kept, to be saved or looked at; within, nothing is trained.

        Raises RuntimeError within a step.
        """
        if self.rows_in_use is not None:
            raise RuntimeError("gathered: a step has begun; call end(optimizer) first.")
        self.classifier.weight = nn.Parameter(self.weight, requires_grad=False)
        try:
            yield
        finally:
            self.classifier.weight = self._parameter

    def state_dict(self) -> dict:
        """All rows and their state; the optimiser's own state_dict belongs to a checkpoint, too."""
        if self.rows_in_use is not None:
            raise RuntimeError("state_dict: a step has begun; call end(optimizer) first.")
        return {"seed": self.seed, "sample": self.sample, "weight": self.weight, "state": dict(self.state)}

    def load_state_dict(self, state_dict: dict) -> None:
        """Goes on from `state_dict()`; the steps to come are the same to the last bit.

        Raises ValueError when it is of another sample, seed or classifier.
        """
        for name, own in (("seed", self.seed), ("sample", self.sample)):
            if state_dict[name] != own:
                raise ValueError(f"{name}: the checkpoint's is {state_dict[name]}, this run's {own}.")
        if state_dict["weight"].shape != self.weight.shape:
            raise ValueError(
                f"The checkpoint's classifier has the shape {tuple(state_dict['weight'].shape)}, this one "
                f"{tuple(self.weight.shape)}."
            )
        self.weight.copy_(state_dict["weight"])
        self.state = {n: t.to(self.weight.device, copy=True) for n, t in state_dict["state"].items()}
        self.rows_in_use = None

    def speakers_of_step(self, present: np.ndarray, step: int) -> np.ndarray:
        """`sample` speakers in order, all of `present` [n] (in order, without repetition) among them."""
        if len(present) and not (present[0] >= 0 and present[-1] < self.num_speakers):
            raise ValueError(
                f"labels: got {present[0]} to {present[-1]}, the classifier has the speakers 0 to "
                f"{self.num_speakers - 1}."
            )
        if len(present) > self.sample:
            raise ValueError(f"sample: {self.sample} speakers, but a step's batches have {len(present)}: use more.")
        if self.sample == self.num_speakers:
            return np.arange(self.num_speakers)
        generator = np.random.default_rng([self.seed, step])
        # Without the present ones there are at least sample - len(present) left, in random order.
        others = generator.choice(self.num_speakers, self.sample, replace=False)
        others = others[~np.isin(others, present)]
        return np.sort(np.concatenate([present, others[: self.sample - len(present)]]))

    def _state_of(self, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        """The parts of the optimiser's state that go row by row; single numbers belong to all rows."""
        state = {}
        for name, value in optimizer.state.get(self._parameter, {}).items():
            if not isinstance(value, torch.Tensor) or value.numel() == 1:
                continue
            if value.shape != self._parameter.shape:
                raise ValueError(
                    f"optimizer: its state {name!r} of the shape {tuple(value.shape)} is not kept row by row of "
                    f"{tuple(self._parameter.shape)}; SGD and AdamW keep theirs so."
                )
            state[name] = value
        return state

    def _put_back(self, whole: torch.Tensor, part: torch.Tensor):
        whole.index_copy_(0, self.rows_in_use, part.to(whole.device))


def _take(part: torch.Tensor, whole: torch.Tensor, rows: torch.Tensor):
    part.copy_(whole.index_select(0, rows))


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gathered_speakers(labels: torch.Tensor) -> np.ndarray:
    """The different labels of all processes' batches [B], in order."""
    if not _several_processes():
        return np.unique(labels.cpu().numpy())
    labels = labels.to(_carrying(labels.device))
    sizes = labels.new_zeros(dist.get_world_size())
    sizes[dist.get_rank()] = len(labels)
    dist.all_reduce(sizes)  # the last batches of an epoch may differ in size
    ends = sizes.cumsum(0)
    joint = labels.new_zeros(int(ends[-1]))
    end = int(ends[dist.get_rank()])
    joint[end - len(labels) : end] = labels
    dist.all_reduce(joint)
    return np.unique(joint.cpu().numpy())


def _broadcast(tensor: torch.Tensor):
    """The first process's values to all."""
    carrier = tensor.to(_carrying(tensor.device))
    dist.broadcast(carrier, 0)
    if carrier is not tensor:
        tensor.copy_(carrier)


def _carrying(device: torch.device) -> torch.device:
    """Where the processes' backend takes tensors of a device: NCCL takes none of the CPU."""
    return torch.device("cuda") if "nccl" in dist.get_backend() and device.type == "cpu" else device
