"""The features of training that a recipe asks for, each a part of the run with the hooks of `Part`."""

import json
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers.utils import ModelOutput

from mrl_redimnet.adapters import AdapterFacts, adapter_report
from mrl_redimnet.adapters.publishing import save_adapter
from mrl_redimnet.adapters.strategies import STRATEGIES, AdapterPlan, Probe, Vanilla
from mrl_redimnet.audio.levels import refuse_silence
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.rotation import ROTATION_UTTERANCES, rotate
from mrl_redimnet.saving import save_model
from mrl_redimnet.training.averaging import Ema, LastWeights
from mrl_redimnet.training.checkpoints import Progress, newest_step
from mrl_redimnet.training.distillation import PrincipalAxes, direction_loss, similarity_loss
from mrl_redimnet.training.guards import ChanceGuard, chance_loss
from mrl_redimnet.training.history import History
from mrl_redimnet.training.optimizer import freeze
from mrl_redimnet.training.run import Part, Run, Trained
from mrl_redimnet.training.sampled_classifier import SampledRows
from mrl_redimnet.training.schedules import margin_at, prefix_weights_at
from mrl_redimnet.training.tasks import Attribute, Verification
from mrl_redimnet.training.teachers import Listener, Table, load_teacher, source_of

ROTATION_IN_TRAINING = (600, 3.0)  # utterances, and the seconds of each: training makes up for what is approximate
PROBE_BATCHES = 8  # training batches that data-driven ranks and initialisations look at


def parts_of(run: Run, facts: AdapterFacts | None, fresh_classifier: bool) -> list[Part]:
    """The parts that the recipe asks for, in the order in which their hooks are called.

    facts: what an adapter's folder says, None where the model itself is trained. fresh_classifier: no row of it comes
    from an earlier model. Checkpoints hold the parts' states in this order.
    """
    recipe = run.recipe
    parts: list[Part] = []
    if recipe.loss.teacher is not None:  # first: an adapter may begin with what the loss says
        parts.append(Distillation(recipe.loss.taught))
    parts.append(TrainedModel() if facts is None else TrainedAdapter(facts))
    if recipe.exits_learn and run.model.config.exits:
        parts.append(Exits())
    if recipe.loss.classifier_sample:
        parts.append(SampledClassifier(run))
    if recipe.optimizer.ema:
        parts.append(MovingAverage())
    if recipe.optimizer.weight_averaging:
        parts.append(CheckpointAverage(run))
    if rotations_of(run):
        parts.append(Rotation(rotations_of(run)))
    if isinstance(run.task, Verification) and recipe.loss.margin_weight:
        parts.append(Learning(run, fresh_classifier))
    return parts


# ----------------------------------------------------------------------------------------------------------------------
# What is trained


class TrainedModel(Trained):
    """The model, or a part of it; the trunk may wait."""

    def phases(self, run: Run) -> set[int]:
        """Where the trunk begins to be trained."""
        return {int(run.recipe.schedule.trunk_frozen_until * run.steps)}

    def begin_phase(self, run: Run, step: int) -> None:
        """Freezes what is not trained."""
        freeze(run.model, run.recipe, step, run.steps)

    def save(self, run: Run, folder: Path) -> None:
        """The whole model, with its classes."""
        save_model(run.model, folder, run.task.classes, name=run.output.name)


class TrainedAdapter(Trained):
    """An adapter on the encoder or, for an attribute, on the model with its head. facts: what its folder says."""

    strategy: Vanilla  # from `start` on

    def __init__(self, facts: AdapterFacts) -> None:
        self.facts = facts

    def start(self, run: Run, step: int, resumed: bool) -> None:
        """Puts the adapter in, as it is at `step`."""
        recipe, known = run.recipe.adapter, run.output / "ranks.json"
        plan = AdapterPlan(
            steps=run.steps,
            placement=recipe.placement,
            rank=recipe.rank,
            segment_ranks=recipe.segment_ranks,
            start_rank=recipe.start_rank,
            cut_step=int(recipe.cut_at * run.steps),
            first_step=step,
            norms=recipe.adapter_norms,
            task_type=run.task.adapter_task,
            options=recipe.peft_options,
            known_ranks=json.loads(known.read_text()) if resumed and known.is_file() else None,
        )
        host = run.model if isinstance(run.task, Attribute) else run.model.base_model
        run.model.to(run.accelerator.device)
        probe = Probe(lambda: _probe_batches(run), lambda batch: _probe_loss(run, batch))
        self.strategy = STRATEGIES[recipe.strategy](host, plan, probe)
        if run.accelerator.is_main_process:  # which alone saves adapters
            self.strategy.keep_start(run.output / "adapter_at_start")
            if self.strategy.ranks_from_data:
                known.write_text(json.dumps(self.strategy.ranks(), indent=1))
        if self.strategy.state() is not None:
            run.accelerator.register_for_checkpointing(self.strategy.state())

    def phases(self, run: Run) -> set[int]:
        """Where ranks are cut."""
        return {self.strategy.plan.cut_step} if self.strategy.changes_ranks else set()

    def begin_phase(self, run: Run, step: int) -> None:
        """Cuts the ranks where it is time to."""
        if self.strategy.changes_ranks and step == self.strategy.plan.cut_step:
            run.accelerator.print(self.strategy.cut())

    def loss(self, run: Run, batch: dict, answer: ModelOutput, options: dict) -> torch.Tensor | float:
        """The strategy's penalty."""
        return self.strategy.penalty()

    def after_optimizer(self, run: Run, step: int, skipped: bool) -> None:
        """Ranks may change."""
        self.strategy.after_step(step, skipped)

    def may_be_best(self, run: Run, step: int) -> bool:
        """Once ranks are what they will be."""
        return self.strategy.settled(step)

    def save(self, run: Run, folder: Path) -> None:
        """The adapter alone."""
        save_adapter(self.strategy, self.facts, folder)

    def report(self) -> str:
        """The layers that train."""
        return adapter_report(self.strategy.peft)


def _probe_batches(run: Run) -> list[dict]:
    """The same few training batches in every process, none of which is trained on."""
    return [run.batch_on_device(batch) for batch in run.crops.probe(PROBE_BATCHES)]


def _probe_loss(run: Run, batch: dict) -> torch.Tensor:
    """The model's own loss or, where it has none, the teacher's."""
    teaching = run.part(Distillation)
    if teaching is None or run.recipe.loss.margin_weight:
        return run.model(batch["input_values"], labels=run.on_device(batch["labels"])).loss
    return teaching.loss(run, batch, run.model(batch["input_values"]), {})


# ----------------------------------------------------------------------------------------------------------------------
# The loss


class SampledClassifier(Part):
    """A step uses a sample of the classifier's rows."""

    def __init__(self, run: Run) -> None:
        classifier = run.model.to(run.accelerator.device).classifier
        self.rows = SampledRows(classifier, run.recipe.loss.classifier_sample, run.recipe.run.seed)

    def start(self, run: Run, step: int, resumed: bool) -> None:
        """All rows are in a checkpoint."""
        run.accelerator.register_for_checkpointing(self.rows)

    def labels(self, run: Run, labels: torch.Tensor, step: int) -> torch.Tensor:
        """Puts the step's rows in, and gives their labels."""
        return self.rows.begin(labels, step, run.optimizer)

    def after_optimizer(self, run: Run, step: int, skipped: bool) -> None:
        """Takes the rows back."""
        self.rows.end(run.optimizer)

    def saving(self, run: Run) -> AbstractContextManager:
        """All rows in the classifier."""
        return self.rows.gathered()


class Distillation(Part):
    """A teacher's embeddings of the batch, from which every prefix learns. taught: which of `TEACHER_LOSSES`."""

    teacher: Listener | Table  # from `start` on
    last: torch.Tensor  # the loss of the last batch

    def __init__(self, taught: str) -> None:
        self.axes = PrincipalAxes() if taught == "direction" else None

    def start(self, run: Run, step: int, resumed: bool) -> None:
        """Loads the teacher; the axes of its space are computed or read once, and then are the checkpoint's."""
        self.teacher, loss = load_teacher(run), run.recipe.loss
        run.accelerator.print(
            f"Teacher: {loss.teacher} ({source_of(loss.teacher)}); its {loss.taught} has the weight "
            f"{loss.teacher_weight:g}, the margin loss {loss.margin_weight:g}."
        )
        if self.axes is None:
            return
        run.accelerator.register_for_checkpointing(self.axes)
        if resumed:
            return
        if loss.teacher_axes is not None:
            self.axes.read(loss.teacher_axes, self.teacher.sample(run).shape[1])
        else:
            run.accelerator.print("Computing the principal axes of the teacher's space.")
            self.axes.fit(self.teacher.sample(run) if run.accelerator.is_main_process else None)
        if run.accelerator.is_main_process:
            self.axes.save(run.recipe.run.output)

    def loss(self, run: Run, batch: dict, answer: ModelOutput, options: dict) -> torch.Tensor:
        """The weighted loss over the crops that the teacher has an answer to; 0 where it has none."""
        config, found = run.model.config, self.teacher(batch)
        student = answer.embeddings if found.crops is None else answer.embeddings[run.on_device(found.crops)]
        weights = options.get("prefix_weights") or config.prefix_weights
        if found.crops is not None and len(student) < (2 if self.axes is None else 1):
            loss = 0.0 * answer.embeddings.sum()  # a gradient of zeros, which other processes wait for
        elif self.axes is not None:
            loss = direction_loss(student, self.axes.rotated(found.embeddings), config.matryoshka_dims, weights)
        else:
            loss = similarity_loss(student, found.embeddings, config.matryoshka_dims, weights)
        self.last = loss.detach()
        return run.recipe.loss.teacher_weight * loss

    def numbers(self) -> dict[str, torch.Tensor]:
        """The teacher's loss, without its weight."""
        return {"teacher_loss": self.last}


class Exits(Part):
    """Every prefix at an exit learns where the whole network's embedding of the same crop points, from one pass of the
    trunk. The whole embedding is a target that gets no gradient; the layers that exits share with it do.
    """

    last: torch.Tensor  # the loss of the last batch

    def asks(self, run: Run) -> dict[str, bool]:
        """The embeddings of all exits."""
        return {"output_exits": True}

    def loss(self, run: Run, batch: dict, answer: ModelOutput, options: dict) -> torch.Tensor:
        """The weighted mean over the exits."""
        config = run.model.config
        weights = options.get("prefix_weights") or config.prefix_weights
        losses = [direction_loss(exit, answer.embeddings, config.matryoshka_dims, weights) for exit in answer.exits]
        loss = torch.stack(losses).mean()
        self.last = loss.detach()
        return run.recipe.loss.exits_weight * loss

    def numbers(self) -> dict[str, torch.Tensor]:
        """The exits' loss, without its weight."""
        return {"exits_loss": self.last}


# ----------------------------------------------------------------------------------------------------------------------
# The weights


class MovingAverage(Part):
    """An exponential moving average of the weights, which is evaluated and saved in the model's place."""

    ema: Ema  # from `start` on

    def start(self, run: Run, step: int, resumed: bool) -> None:
        """Begins with the model's weights."""
        self.ema = Ema(run.model, run.recipe.optimizer.ema)
        run.accelerator.register_for_checkpointing(self.ema)

    def after_optimizer(self, run: Run, step: int, skipped: bool) -> None:
        """Takes in the new weights; there are none after a step that was left out."""
        if not skipped:
            self.ema.update(run.model)

    def evaluating(self, run: Run) -> AbstractContextManager:
        """The average in the model."""
        return self.ema.applied(run.model)


class CheckpointAverage(Part):
    """The weights at the last evaluations, whose mean is one of the models to choose from at the end."""

    def __init__(self, run: Run) -> None:
        self.weights = LastWeights(run.output / "last_weights", run.timing.averaged)

    def go_on(self, run: Run, step: int) -> None:
        """Drops later weights."""
        if run.accelerator.is_main_process:
            self.weights.begin(step)

    def evaluated(self, run: Run, progress: Progress) -> None:
        """Keeps the weights."""
        if run.accelerator.is_main_process:
            self.weights.add(progress.step, run.model, newest_step(run.checkpoints))

    def mean_into(self, run: Run, model: torch.nn.Module, last_step: int) -> None:
        """Puts the mean of the kept weights that share one basis into the model; last_step: of the run."""
        run.accelerator.wait_for_everyone()  # the main process writes its last weights
        turns = [step for step in rotations_of(run) if step < last_step]
        self.weights.mean_into(model, since=max(turns, default=-1) + 1)


def rotations_of(run: Run) -> set[int]:
    """The steps before which the basis is rotated; not the first, when there is nothing to be rotated yet."""
    ratios = [] if run.model.config.embedding_norm else run.recipe.rotations
    return {int(ratio * run.steps) for ratio in ratios} - {0}


class Rotation(Part):
    """Rotates the embedding's basis to its principal axes before some steps."""

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps

    def before_step(self, run: Run, step: int) -> None:
        """Rotates the model and its average; the optimiser forgets the moments of the rotated tensors.

        SphereFace2's bias of each prefix stays: that of the full width is still right, and the others are soon learnt.
        """
        if step not in self.steps:
            return
        turn = partial(rotate, embeddings=training_embeddings(run, run.model, *ROTATION_IN_TRAINING))
        if (average := run.part(MovingAverage)) is not None:
            average.ema.transform(run.model, turn)
        turn(run.model)
        rotated = [*run.model.base_model.projection.segments.parameters()]
        if run.recipe.loss.margin_weight:
            rotated.append(run.model.classifier.weight)
        for parameter in rotated:
            run.optimizer.state.pop(parameter, None)


def training_embeddings(
    run: Run, model: torch.nn.Module, most: int = ROTATION_UTTERANCES, longest: float | None = None
) -> np.ndarray:
    """Embeddings of `most` drawn training utterances (of each the first `longest` seconds), for a rotation, [N, D]."""
    sources = run.crops.sources(most, run.recipe.run.seed)
    found = SpeakerEncoder(model).embed_all(sources, progress="rotation", prepare=refuse_silence, longest=longest)
    return found.usable("training speech to rotate on")


# ----------------------------------------------------------------------------------------------------------------------
# Checks


class Learning(Part):
    """Stops a run whose classifier is not set up right, or does not learn."""

    def __init__(self, run: Run, fresh: bool) -> None:
        """fresh: the classifier has no rows of the model that the run starts from."""
        self.guard: ChanceGuard | None = ChanceGuard(*chance_at(0, run), deadline=run.timing.chance_until, fresh=fresh)

    def after_step(self, run: Run, step: int, answer: ModelOutput, history: History) -> None:
        """Looks at the first loss, and at the first one after the deadline."""
        if self.guard is None:
            return
        if step == 0 and (warning := self.guard.check_start(float(answer.loss.detach()))):
            run.accelerator.print(f"Note: {warning}")
        if history.loss is not None and step >= self.guard.deadline:
            chance, _ = chance_at(step, run)
            self.guard.check_progress(step, history.loss, chance - self.guard.mean)
            self.guard = None


def chance_at(step: int, run: Run) -> tuple[float, float]:
    """The loss at chance level, and its spread over batches, with a step's margin and prefixes."""
    recipe, model = run.recipe, run.model
    crops = min(recipe.data.batch_size, 64)  # what more of them would change is small
    margin = margin_at(step, recipe, run.steps, model.config.margin)
    weights = prefix_weights_at(step, recipe, run.steps, model.config)
    return chance_loss(model.classifier, margin, crops, weights)
