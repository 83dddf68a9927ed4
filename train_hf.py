"""Train a Matryoshka ReDimNet with Accelerate.

    accelerate launch train_hf.py                                     # nano on a synthetic corpus, minutes on a CPU
    accelerate launch train_hf.py recipes/FILE.yaml --output runs/x   # a recipe, single settings replaced
    accelerate launch train_hf.py recipes/FILE.yaml --resume          # go on after a stop, to the same weights

Several CPU processes: torchrun --nproc_per_node 2 train_hf.py (accelerate launch starts one on CPUs).

The run reads from top to bottom in `main` and `train`: data, model, optimiser, steps, evaluation, save. Below `output`
it writes checkpoints/, the models best_as_trained/, last/ and at the end best/ (complete Hub folders), results.json,
history.jsonl with its picture curves.png, and tracker logs.
"""

import copy
import importlib.util
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list, set_seed
from peft import PeftModel
from transformers.utils.logging import disable_progress_bar

import mrl_redimnet  # noqa: F401  registers the models with transformers
from configuration_mrl_redimnet import SIZES, MRLReDimNetConfig
from modeling_mrl_redimnet import synchronise_batch_norms
from mrl_redimnet.adapters import AdapterFacts, Base, adapter_report, fingerprint
from mrl_redimnet.adapters.publishing import publish_adapter, save_adapter
from mrl_redimnet.adapters.strategies import STRATEGIES, AdapterPlan, Probe, Vanilla
from mrl_redimnet.audio.augmentation import InDomain, Sources, make_augmentations
from mrl_redimnet.data.corpus import (
    SpeakerTable,
    check_problems,
    evaluation_speakers,
    load_corpus,
    split_usable,
    without_evaluation_speakers,
)
from mrl_redimnet.data.crops import CorpusTalkers, CropDataset, CropMaker, augmented
from mrl_redimnet.data.loaders import DrawnCrops, Loading, StreamedCrops
from mrl_redimnet.data.streaming import StreamContents, stream_contents
from mrl_redimnet.data.synthetic import make_corpus
from mrl_redimnet.embedding import embed_usable
from mrl_redimnet.evaluation.groups import format_groups
from mrl_redimnet.evaluation.results import as_records, format_table
from mrl_redimnet.extras import extra
from mrl_redimnet.files import recover_folder
from mrl_redimnet.hub_cards.results import Evaluation
from mrl_redimnet.rotation import ROTATION_UTTERANCES, rotate
from mrl_redimnet.saving import save_model
from mrl_redimnet.training.averaging import Ema, LastWeights
from mrl_redimnet.training.checkpoints import Progress, load_checkpoint, newest_step, save_checkpoint
from mrl_redimnet.training.curves import Record
from mrl_redimnet.training.distillation import Teacher, similarity_loss
from mrl_redimnet.training.guards import ChanceGuard, chance_loss
from mrl_redimnet.training.history import History
from mrl_redimnet.training.optimizer import build_optimizer, freeze, learning_rate_growth
from mrl_redimnet.training.reading import flat, in_groups, parse_command_line
from mrl_redimnet.training.recipe import Recipe, TestSet
from mrl_redimnet.training.sampled_classifier import SampledRows
from mrl_redimnet.training.schedules import (
    Timing,
    augmentation_strength,
    due,
    learning_rate_at,
    margin_at,
    prefix_weights_at,
)
from mrl_redimnet.training.tasks import (
    Attribute,
    Verification,
    base_speakers,
    check_files,
    make_task,
    start_config,
    training_domain,
)

with extra("train"):
    import psutil
    from datasets import Dataset

ROTATION_IN_TRAINING = (600, 3.0)  # utterances, and the seconds of each: what is approximate there is learnt around
PROBE_BATCHES = 8  # what data-driven ranks and initialisations look at
# How long processes wait for each other before the run is given up. The main one reads a new corpus alone, a million
# headers from a slow disk; after Accelerate's 10 minutes (of GPUs) the others would end the run.
LONGEST_WAIT = timedelta(hours=12)


def main(argv: list[str] | None = None):
    """Runs the training described by the command line `argv` (None: the process's own)."""
    recipe, resume = parse_command_line(argv, __doc__)
    check_files(recipe)
    check_fit(recipe, start_config(recipe))
    disable_progress_bar()  # of saving; the steps have their own
    accelerator = build_accelerator(recipe)
    Path(recipe.run.output).mkdir(parents=True, exist_ok=True)
    set_seed(recipe.run.seed)

    # Data: training rows, development speech of other speakers; batches are a function of the step.
    recipe = with_embedded_corpus(recipe, accelerator)
    task = prepare_task(recipe, accelerator)
    timing = Timing.of(recipe, task.utterances / crops_per_step(recipe, accelerator))
    crops = build_crops(recipe, task, accelerator, timing.steps)

    # Model, and what of it is trained: all, a part, or an adapter on it.
    model, fresh_classifier = task.build_model(recipe)
    synchronise_batch_norms(model, recipe.model.sync_batch_norm)
    for note in task.notes.values():
        accelerator.print(f"Note: {note}")
    run = Run(recipe, accelerator, task, crops, model, timing, facts=facts_of(recipe, task, model))
    if recipe.loss.classifier_sample:
        run.rows = SampledRows(model.to(accelerator.device).classifier, recipe.loss.classifier_sample, recipe.run.seed)
    if isinstance(task, Verification):
        run.guard = chance_guard(run, fresh_classifier)
    claim_output(recipe, task, resume)
    prepare_training(run, newest_step(checkpoints(recipe)) if resume else 0)

    # Steps, with evaluation and checkpoints in between; where what is trained changes, a new optimiser.
    progress = start_or_resume(run, resume)
    with told_where_to_go_on(run, progress):
        for stop in phase_ends(recipe, timing.steps, progress.step):
            if progress.ended:
                break
            train(run, progress, stop)
            if stop < timing.steps and not progress.ended:
                begin_phase(run, stop)

        # Save and report.
        if accelerator.is_main_process:
            save(run, "last")
        final_report(run, progress)
    run.prepared = run.optimizer = None  # a wrapper that outlives the process group can hang as Python takes it apart
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    accelerator.end_training()


@dataclass
class Run:
    """What the parts of a run share. model: without wrappers; prepared: the same, as Accelerate trains it.

    facts: of the adapter, None when none is trained; strategy: what holds it. ema, last: averages of weights;
    teacher: what embeddings are to be like. Each None where the recipe has none.
    """

    recipe: Recipe
    accelerator: Accelerator
    task: Verification | Attribute
    crops: DrawnCrops | StreamedCrops
    model: torch.nn.Module
    timing: Timing
    guard: ChanceGuard | None = None
    facts: AdapterFacts | None = None
    strategy: Vanilla | None = None
    prepared: torch.nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None
    ema: Ema | None = None
    last: LastWeights | None = None
    teacher: Teacher | None = None
    rows: SampledRows | None = None


def train(run: Run, progress: Progress, stop: int):
    """The steps from `progress.step` to before `stop`; the model is trained in place, `progress` kept up to date."""
    recipe, accelerator, optimizer = run.recipe, run.accelerator, run.optimizer
    batches = run.crops.batches(progress.step, stop)
    history = History(recipe, run.timing.steps, accelerator, run.task, run.model.config, progress.step)
    rotations = rotations_of(run)
    run.prepared.train()
    for step in range(progress.step, stop):
        torch.manual_seed(recipe.run.seed + 1_000_003 * (step + 1) + accelerator.process_index)  # dropout, spec-augment
        if step in rotations:
            rotate_in_training(run)
        for group in optimizer.param_groups:
            group["lr"] = group["lr_scale"] * learning_rate_at(step, recipe, run.timing.steps)
        for _ in range(recipe.optimizer.gradient_accumulation):
            batch = history.timed(batches)
            progress.problems += batch["problems"]
            with accelerator.accumulate(run.prepared):
                answer, loss = forward(run, batch, step)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(run.prepared.parameters(), recipe.optimizer.max_gradient_norm)
                optimizer.step()
                if accelerator.sync_gradients:
                    after_step(run, step)
                optimizer.zero_grad()
        history.add(step, answer)
        if run.guard is not None:
            guard_against_chance(run, step, answer, history)

        progress.step = step + 1
        ends = progress.step == run.timing.steps
        if ends or due(progress.step, run.timing.evaluate_every):
            evaluate_and_keep_best(run, progress, history)
        if ends or progress.ended or due(progress.step, run.timing.checkpoint_every):
            history.check_finite()  # a checkpoint of weights that are no numbers would be no place to go on from
            progress.crops = run.crops.state()
            save_checkpoint(accelerator, checkpoints(recipe), progress, recipe, run.timing.steps)
        if progress.ended:
            accelerator.print(
                f"No better model in {recipe.evaluation.patience} evaluations: ending at step {progress.step}."
            )
            break
    history.close()


def forward(run: Run, batch: dict, step: int):
    """The model's answer to one batch at one step, and the loss to be minimised: its own and what else there is."""
    inputs, labels = on_device(run, batch["input_values"]), batch["labels"]
    if isinstance(run.task, Attribute):
        answer = run.prepared(inputs, labels=on_device(run, labels))
    else:
        config = run.model.config
        weights = prefix_weights_at(step, run.recipe, run.timing.steps, config)
        labels = on_device(run, labels if run.rows is None else run.rows.begin(labels, step, run.optimizer))
        margin = margin_at(step, run.recipe, run.timing.steps, config.margin)
        answer = run.prepared(inputs, labels=labels, margin=margin, prefix_weights=weights)
    loss = answer.loss + (run.strategy.penalty() if run.strategy else 0.0)
    if run.teacher is not None:
        likeness = similarity_loss(answer.embeddings, run.teacher(inputs), config.matryoshka_dims, weights)
        loss = loss + run.recipe.loss.teacher_weight * likeness
    return answer, loss


def on_device(run: Run, tensor: torch.Tensor) -> torch.Tensor:
    """A batch's tensor where the model is. A GPU fetches it from pinned memory while the host goes on."""
    device = run.accelerator.device
    return tensor.to(device, non_blocking=device.type == "cuda")


def after_step(run: Run, step: int):
    """What follows the optimiser's step: ranks that change, rows that go back, averages.

    In float16 a step whose gradients overflowed is left out: there is nothing new to be averaged then.
    """
    skipped = run.optimizer.step_was_skipped
    if run.strategy is not None:
        run.strategy.after_step(step, skipped)
    if run.rows is not None:
        run.rows.end(run.optimizer)
    if run.ema is not None and not skipped:
        run.ema.update(run.model)


def evaluate_and_keep_best(run: Run, progress: Progress, history: History):
    """Judges the model on development speech; the best so far is saved. The first of several sets decides."""
    history.check_finite()
    report_unreadable(run, progress)
    with averaged(run):
        tables = {title: run.task.evaluate(run.model, test) for title, test in run.task.development.items()}
        history.report(progress.step, tables)
        (score,) = broadcast_object_list([run.task.score(next(iter(tables.values())))])  # all end at the same step
        settled = run.strategy is None or run.strategy.settled(progress.step)
        better = settled and score <= progress.best_score  # of equals the later, longer trained one
        if better:
            progress.best_score, progress.best_step = score, progress.step
        if better and run.accelerator.is_main_process:
            save(run, "best_as_trained")
        if run.last is not None and run.accelerator.is_main_process:
            run.last.add(progress.step, run.model, newest_step(checkpoints(run.recipe)))
    progress.without_better = 0 if better else progress.without_better + settled
    progress.ended = 0 < run.recipe.evaluation.patience <= progress.without_better


# ----------------------------------------------------------------------------------------------------------------------
# In the order of use


def build_accelerator(recipe: Recipe) -> Accelerator:
    """Devices, precision, accumulation, trackers.

    On a GPU torch's own settings stay: TF32 for convolutions but not for products, whose digits the margins need;
    cudnn.benchmark off, because it would time its kernels anew for every length of crops and utterances.
    """
    if (
        recipe.run.tracker != "none" and importlib.util.find_spec(recipe.run.tracker) is None
    ):  # Accelerate would drop it
        raise ModuleNotFoundError(
            f"tracker: {recipe.run.tracker} is not installed: pip install 'mrl-redimnet[{recipe.run.tracker}]'."
        )
    on_cpu = not torch.accelerator.is_available()
    if on_cpu and recipe.run.mixed_precision == "fp16":
        raise ValueError("mixed_precision: fp16 needs a GPU, and there is none here; take bf16 or no.")
    accelerator = Accelerator(
        cpu=on_cpu,  # else processes without an accelerator each train on their own
        mixed_precision=recipe.run.mixed_precision,
        gradient_accumulation_steps=recipe.optimizer.gradient_accumulation,
        log_with=None if recipe.run.tracker == "none" else recipe.run.tracker,
        project_config=ProjectConfiguration(
            project_dir=recipe.run.output, logging_dir=str(Path(recipe.run.output) / "logs")
        ),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )
    refuse_lost_processes(accelerator)
    settings = {k: v if isinstance(v, (int, float, str)) else json.dumps(v) for k, v in flat(recipe).items()}
    accelerator.init_trackers("mrl-redimnet", config=settings)
    return accelerator


def refuse_lost_processes(accelerator: Accelerator):
    """`accelerate launch --num_processes 2` starts one process where there is no accelerator, and says nothing.

    Raises ValueError when this process was launched so.
    """
    if torch.accelerator.is_available() or accelerator.num_processes > 1:
        return
    for parent in psutil.Process().parents():
        words = [part for word in parent.cmdline() for part in word.split("=", 1)]
        if "launch" not in words or not any("accelerate" in word for word in words):
            continue
        wanted = [words[i + 1] for i, word in enumerate(words[:-1]) if word in ("--num_processes", "--num-processes")]
        if wanted and wanted[-1].isdigit() and int(wanted[-1]) > 1:
            raise ValueError(
                f"accelerate launch was asked for {wanted[-1]} processes and started one: it does so on CPUs. Use "
                f"torchrun --nproc_per_node {wanted[-1]} train_hf.py ..., or --num_processes 1."
            )


@contextmanager
def told_where_to_go_on(run: Run, progress: Progress):
    """An error that ends the run says at its end what is left of it."""
    try:
        yield
    except Exception as error:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else a worker's death is raised while this error is told
        error.add_note(what_is_left(run, progress))
        raise


def what_is_left(run: Run, progress: Progress) -> str:
    """The last good checkpoint of a run that stopped, in words."""
    stopped = f"The run stopped after step {progress.step} of {run.timing.steps}. "
    good = newest_step(checkpoints(run.recipe))
    if not good:
        return stopped + "It had not come to its first checkpoint."
    return stopped + (
        f"Its last good checkpoint is {checkpoints(run.recipe)}/step-{good:08d}: once the cause is removed, the same "
        "command with --resume goes on from there."
    )


def prepare_task(recipe: Recipe, accelerator: Accelerator) -> Verification | Attribute:
    """Reads what training speech there is, the main process first, the others from its cache."""
    with accelerator.main_process_first():
        accelerator.print(f"Reading {recipe.data.train}: all of it once when it is new or changed, later from a cache.")
        if recipe.data.streaming:
            return make_task(recipe, streamed_speech(recipe))
        return make_task(recipe, load_training_speech(recipe, accelerator))


def with_embedded_corpus(recipe: Recipe, accelerator: Accelerator) -> Recipe:
    """The recipe; without a training folder, with the synthetic corpus, made on first use, and its trial list."""
    if recipe.data.train is not None:
        return recipe
    with accelerator.main_process_first():
        root = make_corpus(Path("data") / "synthetic")
    accelerator.print(
        f"No training folder given: using the synthetic corpus in {root}. Its EERs say nothing about real voices."
    )
    train, kind = str(root / "train"), recipe.augmentation
    noise, options = kind.noise, kind.domain_options
    if kind.domain == "noisy" and noise is None and "noise" not in options:
        noise = train  # other talkers are the noise that every corpus has
    tests = recipe.evaluation.tests
    if not tests and recipe.data.label_column is None:
        test = TestSet(trials=str(root / "test" / "trials.txt"), folder=str(root / "test" / "wav"))
        tests = {"synthetic": test}
        if kind.domain != "clean":
            options = {"noise": noise, **options} if kind.domain == "noisy" else options
            tests[f"synthetic, {kind.domain}"] = test.model_copy(
                update={"domain": kind.domain, "domain_options": options}
            )
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"train": train}),
            "augmentation": recipe.augmentation.model_copy(update={"noise": noise}),
            "evaluation": recipe.evaluation.model_copy(update={"tests": tests}),
        }
    )


def load_training_speech(recipe: Recipe, accelerator: Accelerator) -> Dataset:
    """The usable rows of the training folder; the others are counted, listed, and too many of them stop the run."""
    corpus = load_corpus(recipe.data.train, recipe.data.layout, columns=recipe.data.columns)
    usable, problems = split_usable(corpus, recipe.data.min_seconds)
    if not recipe.data.evaluation_speakers:
        usable, left_out = without_evaluation_speakers(usable, recipe.data.layout, recipe.data.train)
        if left_out is not None:
            accelerator.print(f"Note: {left_out} evaluation_speakers: true trains on them, too.")
    report = Path(recipe.run.output) / "unusable_files.tsv"
    summary = check_problems(problems, len(corpus), recipe.data.max_unusable_ratio, report)
    if problems:
        accelerator.print(summary)
    return usable


def streamed_speech(recipe: Recipe) -> StreamContents:
    """What there is to stream. Raises ValueError for speakers that are not to be trained on."""
    contents = stream_contents(recipe.data.train, recipe.data.columns)
    wrong = evaluation_speakers(contents.speakers.names, recipe.data.layout, recipe.data.train)
    if wrong and not recipe.data.evaluation_speakers:
        raise ValueError(
            f"train: {len(wrong)} of the {len(contents.speakers):,} speakers of {recipe.data.train} are those of "
            f"CN-Celeb's evaluation part ({wrong[0]} ... {wrong[-1]}), and none can be left out of a stream: "
            "`mrl-redimnet prepare` leaves them out; evaluation_speakers: true trains on them."
        )
    return contents


def crops_per_step(recipe: Recipe, accelerator: Accelerator) -> int:
    """Training crops of one optimiser step, of all processes."""
    return recipe.data.batch_size * recipe.optimizer.gradient_accumulation * accelerator.num_processes


def build_crops(
    recipe: Recipe, task: Verification | Attribute, accelerator: Accelerator, steps: int
) -> DrawnCrops | StreamedCrops:
    """Training crops with the recipe's augmentations, then its domain."""
    talkers = None if recipe.data.streaming else CorpusTalkers(task.corpus)
    chain = make_augmentations(
        recipe.augmentation.augmentations, Sources(recipe.augmentation.noise, recipe.augmentation.rooms, talkers)
    )
    domain = (
        None
        if recipe.augmentation.domain == "clean"
        else InDomain(training_domain(recipe), recipe.augmentation.clean_ratio)
    )
    maker = CropMaker(len(task.speakers), tuple(recipe.augmentation.speed_perturb), partial(augmented, chain, domain))
    loading = Loading(
        batch_size=recipe.data.batch_size,
        accumulation=recipe.optimizer.gradient_accumulation,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        workers=recipe.data.workers,
        seed=recipe.run.seed,
        pin=accelerator.device.type == "cuda",
    )
    if recipe.data.streaming:
        seconds = recipe.data.crop_range[0]
        return StreamedCrops(
            recipe.data.train, recipe.data.columns, maker, task.speakers, seconds, recipe.data.min_seconds, loading
        )
    dataset = CropDataset(
        task.corpus,
        task.speakers,
        maker,
        crop_seconds=recipe.data.crop_range,
        batch=recipe.data.batch_size * accelerator.num_processes,
        sampler=recipe.data.sampler,
        utterances_per_speaker=recipe.data.utterances_per_speaker,
        strength=partial(augmentation_strength, crops=crops_per_step(recipe, accelerator), recipe=recipe, steps=steps),
        seed=recipe.run.seed,
        targets=task.targets,
    )
    return DrawnCrops(dataset, loading)


def check_fit(recipe: Recipe, config):
    """Raises ValueError for settings that this model cannot meet."""
    wrong = [dim for dim in recipe.evaluation.report_dims if not 1 <= dim <= config.embedding_size]
    if wrong:
        raise ValueError(f"report_dims: {wrong} are not between 1 and the embedding's {config.embedding_size}.")
    if recipe.schedule.rotate_at and config.embedding_norm:
        raise ValueError("rotate_at: a rotation folds embedding_norm in, which training still needs; leave out either.")
    if recipe.model.finetune == "adapter" and recipe.model.start in SIZES:
        raise ValueError(f"finetune: an adapter needs a trained base; model: {recipe.model.start} is random weights.")
    if recipe.schedule.prefix_starts and len(recipe.schedule.prefix_starts) != len(config.matryoshka_dims):
        raise ValueError(
            f"prefix_starts: {len(recipe.schedule.prefix_starts)} ratios for the prefixes {config.matryoshka_dims}."
        )
    if recipe.adapter.segment_ranks and len(recipe.adapter.segment_ranks) != len(config.matryoshka_dims):
        raise ValueError(
            f"segment_ranks: {len(recipe.adapter.segment_ranks)} ranks for the segments of {config.matryoshka_dims} "
            "dimensions."
        )


def chance_guard(run: Run, fresh: bool) -> ChanceGuard:
    """Knows the loss of a classifier that has learnt nothing, and the step by which it must have.

    fresh: it has no rows of the model that the run starts from.
    """
    return ChanceGuard(*chance_at(0, run), deadline=run.timing.chance_until, fresh=fresh)


def chance_at(step: int, run: Run) -> tuple[float, float]:
    """Chance level, and its spread over batches, with a step's margin and prefixes."""
    recipe, model, steps = run.recipe, run.model, run.timing.steps
    crops = min(recipe.data.batch_size, 64)  # what more of them would change is small
    margin = margin_at(step, recipe, steps, model.config.margin)
    weights = prefix_weights_at(step, recipe, steps, model.config)
    return chance_loss(model.classifier, margin, crops, weights)


def guard_against_chance(run: Run, step: int, answer, history: History):
    """Stops a run whose classifier is not set up right, or does not learn."""
    if step == 0 and (warning := run.guard.check_start(float(answer.loss.detach()))):
        run.accelerator.print(f"Note: {warning}")
    if history.loss is not None and step >= run.guard.deadline:
        chance, _ = chance_at(step, run)
        run.guard.check_progress(step, history.loss, chance - run.guard.mean)
        run.guard = None


def facts_of(recipe: Recipe, task: Verification | Attribute, model) -> AdapterFacts | None:
    """What the adapter's folder is to say; None when no adapter is trained."""
    if recipe.model.finetune != "adapter":
        return None
    local = Path(recipe.model.start)
    repository = recipe.adapter.base_repository or (local.resolve().name if local.is_dir() else recipe.model.start)
    base = Base(repository, getattr(model.config, "_commit_hash", None), fingerprint(model))
    domain = recipe.data.label_column or recipe.augmentation.domain
    return AdapterFacts(domain, base, task=task.name, labels=list(task.labels))


def checkpoints(recipe: Recipe) -> Path:
    """The folder of the run's checkpoints."""
    return Path(recipe.run.output) / "checkpoints"


def claim_output(recipe: Recipe, task: Verification | Attribute, resume: bool):
    """An earlier run's checkpoints are never overwritten, nor continued with other classes."""
    earlier = checkpoints(recipe).exists() and any(checkpoints(recipe).iterdir())
    if earlier and not resume:
        raise FileExistsError(
            f"output: {recipe.run.output} holds checkpoints of an earlier run: --resume goes on with it, another "
            "--output begins anew."
        )
    tables = {"speakers": task.classes} if task.classes is not None else {}
    if recipe.evaluation.dev_trials is None:
        tables["development_speakers"] = SpeakerTable(sorted(task.development_speakers))
        if earlier and not (Path(recipe.run.output) / "development_speakers.json").is_file():
            everyone = task.development_speakers | set(task.speakers.names)
            if (base_speakers(recipe) or set()) & everyone:
                raise ValueError(
                    f"output: {recipe.run.output} was begun by an earlier version, which held out other speakers: some "
                    f"of those that {recipe.model.start} was trained on. Begin anew with another --output."
                )
    for name, table in tables.items():
        file = Path(recipe.run.output) / f"{name}.json"
        if earlier and file.is_file() and SpeakerTable.load(file).names != table.names:
            raise ValueError(
                f"train: the speakers below {recipe.data.train} are not those that {recipe.run.output} began with."
            )
        if PartialState().is_main_process:
            table.save(file)


def prepare_training(run: Run, resumed_at: int):
    """Freezes what stays, puts the adapter in, and says what is about to be trained; resumed_at: 0 for a new run."""
    recipe, model = run.recipe, run.model
    step = max(0, resumed_at - 1)  # where what is trained changes, the checkpoint is still of what was before
    if run.facts is not None:
        run.strategy = attach_adapter(run, step, resumed_at > 0)
        if run.strategy.state() is not None:
            run.accelerator.register_for_checkpointing(run.strategy.state())
    if recipe.loss.teacher is not None:
        run.teacher = Teacher(recipe.loss.teacher, run.accelerator.device, run.accelerator.autocast)
    begin_phase(run, step)
    if run.rows is not None:
        run.accelerator.register_for_checkpointing(run.rows)
    if recipe.optimizer.ema:
        run.ema = Ema(model, recipe.optimizer.ema)
        run.accelerator.register_for_checkpointing(run.ema)
    if recipe.optimizer.weight_averaging:
        run.last = LastWeights(Path(recipe.run.output) / "last_weights", run.timing.averaged)
    describe(run)


def attach_adapter(run: Run, step: int, resumed: bool) -> Vanilla:
    """The recipe's adapter, as it is at `step`, on the encoder (or, for an attribute, on the model with its head)."""
    recipe, output = run.recipe, Path(run.recipe.run.output)
    known = output / "ranks.json"
    plan = AdapterPlan(
        steps=run.timing.steps,
        placement=recipe.adapter.placement,
        rank=recipe.adapter.rank,
        segment_ranks=recipe.adapter.segment_ranks,
        start_rank=recipe.adapter.start_rank,
        cut_step=int(recipe.adapter.cut_at * run.timing.steps),
        first_step=step,
        norms=recipe.adapter.adapter_norms,
        task_type=run.task.adapter_task,
        options=recipe.adapter.peft_options,
        known_ranks=json.loads(known.read_text()) if resumed and known.is_file() else None,
    )
    host = run.model if isinstance(run.task, Attribute) else run.model.redimnet
    run.model.to(run.accelerator.device)
    probe = Probe(lambda: probe_batches(run), lambda batch: run.model(**batch).loss)
    strategy = STRATEGIES[recipe.adapter.strategy](host, plan, probe)
    if run.accelerator.is_main_process:  # which alone saves adapters
        strategy.keep_start(output / "adapter_at_start")
        if strategy.ranks_from_data:
            known.write_text(json.dumps(strategy.ranks(), indent=1))
    return strategy


def probe_batches(run: Run) -> list[dict]:
    """The same few training batches in every process, none of which is trained on."""
    keys = ("input_values", "labels")
    return [{key: batch[key].to(run.accelerator.device) for key in keys} for batch in run.crops.probe(PROBE_BATCHES)]


def describe(run: Run):
    """What is about to be trained, on what."""
    recipe, task, accelerator = run.recipe, run.task, run.accelerator
    saved_in = None if recipe.model.start in SIZES else MRLReDimNetConfig.from_pretrained(recipe.model.start).dtype
    if saved_in not in (None, torch.float32):
        accelerator.print(f"{recipe.model.start} is saved in {saved_in}; it is trained in float32.")
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    classes = len(task.classes) if task.targets is None else max(1, len(task.labels))
    accelerator.print(
        f"{recipe.model.start}: {sum(p.numel() for p in run.model.parameters()):,} parameters with the classifier of "
        f"{classes:,} classes, {trained:,} of them trained ({recipe.model.finetune}).\n"
        f"{task.speech}; "
        + "; ".join(f"{title}: {len(test):,} trials or utterances" for title, test in task.development.items())
        + f".\n{run.timing.steps} steps of {recipe.data.batch_size} x {recipe.optimizer.gradient_accumulation} x "
        f"{accelerator.num_processes} crops of {recipe.data.crop_seconds} s on {accelerator.device}."
    )
    growth, wanted = learning_rate_growth(recipe, accelerator.num_processes)
    if growth < wanted:
        accelerator.print(
            f"Learning rates are those of the recipe times {growth:g}, not times {wanted:g} as the crops of a step are "
            "(max_learning_rate_growth)."
        )
    if run.strategy:
        accelerator.print(adapter_report(run.strategy.peft))


def phase_ends(recipe: Recipe, steps: int, first_step: int) -> list[int]:
    """The steps at which what is trained changes, from `first_step` on, and the last."""
    ends = {int(recipe.schedule.trunk_frozen_until * steps), steps}
    if recipe.model.finetune == "adapter" and recipe.adapter.strategy == "warm_up":
        ends.add(int(recipe.adapter.cut_at * steps))
    return sorted(end for end in ends if end > 0 and end >= first_step)


def begin_phase(run: Run, step: int):
    """Sets what is trained from `step` on, with an optimiser of its own."""
    if run.strategy is None:
        freeze(run.model, run.recipe, step, run.timing.steps)
    elif run.strategy.changes_ranks and step == run.strategy.plan.cut_step:
        run.accelerator.print(run.strategy.cut())
    run.accelerator.free_memory()
    optimizer = build_optimizer(run.model, run.recipe, run.accelerator.num_processes)
    run.prepared, run.optimizer = run.accelerator.prepare(run.model, optimizer)


def start_or_resume(run: Run, resume: bool) -> Progress:
    """Step 0, or the newest checkpoint when resuming; what was recorded after it is forgotten."""
    progress = (
        load_checkpoint(run.accelerator, checkpoints(run.recipe), run.recipe, run.timing.steps) if resume else None
    )
    if progress is not None:
        run.accelerator.print(f"Resuming at step {progress.step} of {run.timing.steps}.")
        run.crops.go_on(progress.crops)
    elif resume:
        run.accelerator.print(f"No checkpoint below {checkpoints(run.recipe)}: starting from the beginning.")
    progress = progress or Progress()
    if run.accelerator.is_main_process:
        recover_folder(Path(run.recipe.run.output) / "best_as_trained")
        Record(run.recipe.run.output).begin(progress.step)
        if run.last is not None:
            run.last.begin(progress.step)
    return progress


def rotations_of(run: Run) -> set[int]:
    """The steps before which the basis is rotated; not the first, when there is nothing to be turned yet."""
    ratios = [] if run.model.config.embedding_norm else run.recipe.rotations
    return {int(ratio * run.timing.steps) for ratio in ratios} - {0}


@contextmanager
def averaged(run: Run) -> Iterator[None]:
    """The moving average in the model's place, where the recipe has one."""
    with run.ema.applied(run.model) if run.ema else nullcontext():
        yield


def training_embeddings(run: Run, model, most: int = ROTATION_UTTERANCES, longest: float | None = None) -> np.ndarray:
    """Embeddings of `most` drawn training utterances (cut to `longest` seconds), for the rotation, [N, D]."""
    sources = run.crops.sources(most, run.recipe.run.seed)
    return embed_usable(model, sources, "training speech to rotate on", progress="rotation", longest=longest)


def rotate_in_training(run: Run):
    """Turns the basis mid-run; the optimiser forgets the moments of the turned tensors, which were of the old basis.

    SphereFace2's bias of each prefix stays: that of the full width is still right, and the others are soon learnt.
    """
    turn = partial(rotate, embeddings=training_embeddings(run, run.model, *ROTATION_IN_TRAINING))
    if run.ema is not None:
        run.ema.transform(run.model, turn)
    turn(run.model)
    for parameter in (*run.model.redimnet.projection.segments.parameters(), run.model.classifier.weight):
        run.optimizer.state.pop(parameter, None)


def report_unreadable(run: Run, progress: Progress):
    """Lists the crops that could not be read so far; too large a share of them stops the run."""
    recipe = run.recipe
    if progress.problems:
        crops = progress.step * recipe.data.batch_size * recipe.optimizer.gradient_accumulation
        listing = Path(recipe.run.output) / f"unreadable_crops_{run.accelerator.process_index}.tsv"
        print(check_problems(progress.problems, crops, recipe.data.max_unusable_ratio, listing))


def save(run: Run, name: str):
    """Writes the adapter, or else the model, as it now is to `output`/`name`."""
    folder = Path(run.recipe.run.output) / name
    if run.strategy is None:
        with run.rows.gathered() if run.rows else nullcontext():
            save_model(run.model, folder, run.task.classes, name=Path(run.recipe.run.output).name)
    else:
        save_adapter(run.strategy, run.facts, folder)


def final_report(run: Run, progress: Progress):
    """Evaluates the best model beside what it came from, writes best/ and results.json, and prints the tables."""
    recipe, task, accelerator = run.recipe, run.task, run.accelerator
    systems, saved, scores = final_systems(run, progress)
    dims = sorted({*run.model.config.matryoshka_dims, *recipe.evaluation.report_dims})
    results = {
        name: {s: task.evaluate(m, test, dims, recipe.evaluation.bootstrap_samples, name) for s, m in systems.items()}
        for name, test in (task.tests or task.development).items()
    }
    groups = {
        name: task.by_group(systems[saved], test, recipe.evaluation.bootstrap_samples)
        for name, test in task.tests.items()
    }
    groups = {name: rows for name, rows in groups.items() if rows}
    if not accelerator.is_main_process:
        return
    sentence = training_sentence(run, progress, saved)
    evaluation = Evaluation(saved, results, groups=groups)
    best = Path(recipe.run.output) / "best"
    if run.strategy is None:
        name = Path(recipe.run.output).name
        save_model(systems[saved], best, task.classes, name=name, training=sentence, evaluation=evaluation)
    else:
        publish_adapter(Path(recipe.run.output) / "best_as_trained", best, sentence, evaluation)
        ranks = AdapterFacts.load(best).layers
        print("\nRanks: " + ", ".join(f"{name} {rank}" for name, rank in ranks.items()))
    record = {
        "recipe": in_groups(flat(recipe)),
        "steps": run.timing.steps,
        "notes": list(task.notes.values()),
        "best_step": progress.best_step,
        "saved": saved,
        "development_scores": scores,
        "results": {name: {s: as_records(rows) for s, rows in r.items()} for name, r in results.items()},
        "groups": {name: [asdict(row) for row in rows] for name, rows in groups.items()},
    }
    (Path(recipe.run.output) / "results.json").write_text(json.dumps(record, indent=1))
    for name, tables in results.items():
        print(f"\n{name}: best model (step {progress.best_step}); 95 % intervals over speakers")
        print(format_table(tables))
        if name in groups:
            print(format_groups(groups[name]))
    print(f"\nSaved: {best} ({saved}), {recipe.run.output}/last, {recipe.run.output}/results.json")


def final_systems(run: Run, progress: Progress) -> tuple[dict, str, dict[str, float]]:
    """The models to report, the name of the one to save, and development scores that it was chosen by.

    An adapter is loaded as its users will load it, beside the base without it. A trained verification model is
    reported as trained and, where the recipe asks for it, as the mean of its last weights, each also rotated: at full
    width that scores alike; prefixes gain much by it when they were not trained as prefixes of a rotated basis, and
    little or nothing after `rotate_at`. The development trials decide.
    """
    recipe, task, device = run.recipe, run.task, run.accelerator.device
    folder = Path(recipe.run.output) / "best_as_trained"
    systems = {}
    if recipe.model.start not in SIZES and isinstance(task, Verification):
        systems["base"] = task.build_model(recipe)[0].to(device).eval()
    if run.strategy is not None:
        model = task.build_model(recipe)[0].to(device).eval()
        PeftModel.from_pretrained(model if isinstance(task, Attribute) else model.redimnet, folder)
        return {**systems, "adapter": model}, "adapter", {}
    trained = {"as trained": type(run.model).from_pretrained(folder).to(device)}
    if run.last is not None:
        run.accelerator.wait_for_everyone()  # the main process writes its last weights
        trained["mean of the last"] = copy.deepcopy(trained["as trained"])
        turns = [step for step in rotations_of(run) if step < progress.step]
        run.last.mean_into(trained["mean of the last"], since=max(turns, default=-1) + 1)  # of one basis
    if isinstance(task, Verification) and recipe.model.finetune == "all":
        for name, model in list(trained.items()):
            turned = "rotated" if name == "as trained" else f"{name}, rotated"
            trained[turned] = copy.deepcopy(model)
            rotate(trained[turned], training_embeddings(run, model))
    judge = next(iter(task.development.values()))
    scores = {}
    if len(trained) > 1:
        scores = {name: task.score(task.evaluate(model, judge)) for name, model in trained.items()}
    saved = min(scores, key=lambda name: (scores[name], "rotated" not in name)) if scores else "as trained"
    return {**systems, **trained}, saved, scores


def training_sentence(run: Run, progress: Progress, saved: str) -> str:
    """What the card says about the training."""
    recipe = run.recipe
    start = "random weights" if recipe.model.start in SIZES else f"`{Path(recipe.model.start).name}`"
    crops = crops_per_step(recipe, run.accelerator)
    length = " to ".join(f"{seconds:g}" for seconds in dict.fromkeys(recipe.data.crop_range))
    what = (
        "Trained"
        if run.strategy is None
        else f"An adapter ({recipe.adapter.placement}, {recipe.adapter.strategy}) trained"
    )
    domain = (
        ""
        if recipe.augmentation.domain == "clean"
        else f", {1 - recipe.augmentation.clean_ratio:.0%} of them made {recipe.augmentation.domain},"
    )
    return (
        f"{what} from {start} by `train_hf.py`: {progress.step} steps of {crops} crops of {length} s"
        f"{domain} from {run.task.speech}. Step {progress.best_step} was best on the development speech."
        + (f" Saved is: {saved}." if run.strategy is None else "")
    )


if __name__ == "__main__":
    main()
