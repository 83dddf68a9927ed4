"""What comes before the first step of a run: devices, speech, crops, model, and the folder that it writes to."""

import importlib.util
import json
import platform
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

from configuration_mrl_redimnet import MRLReDimNetConfig
from mrl_redimnet.adapters import AdapterFacts, Base, fingerprint
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
from mrl_redimnet.extras import extra
from mrl_redimnet.files import recover_folder
from mrl_redimnet.speed import speed_up
from mrl_redimnet.speed.norms import synchronise_batch_norms
from mrl_redimnet.training.checkpoints import Progress, load_checkpoint, newest_step
from mrl_redimnet.training.curves import Record
from mrl_redimnet.training.optimizer import learning_rate_growth
from mrl_redimnet.training.parts import TrainedAdapter, parts_of
from mrl_redimnet.training.reading import flat
from mrl_redimnet.training.recipe import EvaluationSet, Recipe
from mrl_redimnet.training.run import Run
from mrl_redimnet.training.schedules import Timing, augmentation_strength
from mrl_redimnet.training.tasks import Task, base_speakers, make_task, saved_start, training_domain
from mrl_redimnet.training.teachers import hears_clean

with extra("train"):
    import psutil
    from datasets import Dataset

# How long processes wait for each other before the run is given up. The main one reads a new corpus alone, a million
# headers from a slow disk; after Accelerate's 10 minutes (of GPUs) the others would end the run.
LONGEST_WAIT = timedelta(hours=12)


def build_accelerator(recipe: Recipe) -> Accelerator:
    """Devices, precision, accumulation, trackers.

    On a GPU torch's own settings stay: TF32 for convolutions but not for products, whose digits the margins need;
    cudnn.benchmark off, because it would time its kernels anew for every length of crops and utterances.
    """
    tracker, output = recipe.run.tracker, Path(recipe.run.output)
    if tracker != "none" and importlib.util.find_spec(tracker) is None:  # Accelerate would drop it
        raise ModuleNotFoundError(f"tracker: {tracker} is not installed: pip install 'mrl-redimnet[{tracker}]'.")
    on_cpu = not torch.accelerator.is_available()
    if on_cpu and recipe.run.mixed_precision == "fp16":
        raise ValueError("mixed_precision: fp16 needs a GPU, and there is none here; take bf16 or no.")
    accelerator = Accelerator(
        cpu=on_cpu,  # else processes without an accelerator each train on their own
        mixed_precision=recipe.run.mixed_precision,
        gradient_accumulation_steps=recipe.optimizer.gradient_accumulation,
        log_with=None if tracker == "none" else tracker,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "logs")),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )
    refuse_lost_processes(accelerator)
    if on_cpu and recipe.run.mixed_precision == "bf16" and emulates_bfloat16():
        accelerator.print(
            "Note: mixed_precision: this processor has no bfloat16 instructions, and bf16 takes about ten times as "
            "long as float32 on it. --mixed_precision no is faster."
        )
    settings = {k: v if isinstance(v, (int, float, str)) else json.dumps(v) for k, v in flat(recipe).items()}
    accelerator.init_trackers("mrl-redimnet", config=settings)
    return accelerator


def emulates_bfloat16() -> bool:
    """Whether torch makes up for bfloat16 instructions that the processor lacks: x86 without AVX-512.

    A training step of nano then took 7.6 instead of 0.73 s (16 crops of 2 s, one thread of an AMD EPYC with AVX2).
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2")


def refuse_lost_processes(accelerator: Accelerator) -> None:
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
        test = EvaluationSet(trials=str(root / "test" / "trials.txt"), folder=str(root / "test" / "wav"))
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


def prepare_task(recipe: Recipe, accelerator: Accelerator) -> Task:
    """Reads what training speech there is, the main process first, the others from its cache."""
    with accelerator.main_process_first():
        accelerator.print(f"Reading {recipe.data.train}: all of it once when it is new or changed, later from a cache.")
        if recipe.data.streaming:
            return make_task(recipe, streamed_speech(recipe))
        return make_task(recipe, load_training_speech(recipe, accelerator))


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


def build_crops(recipe: Recipe, task: Task, accelerator: Accelerator, steps: int) -> DrawnCrops | StreamedCrops:
    """Training crops with the recipe's augmentations, then its domain."""
    data, kind = recipe.data, recipe.augmentation
    talkers = None if data.streaming else CorpusTalkers(task.corpus)
    chain = make_augmentations(kind.augmentations, Sources(kind.noise, kind.rooms, talkers))
    domain = None if kind.domain == "clean" else InDomain(training_domain(recipe), kind.clean_ratio)
    maker = CropMaker(
        len(task.speakers), tuple(kind.speed_perturb), partial(augmented, chain, domain), hears_clean(recipe)
    )
    loading = Loading(
        batch_size=data.batch_size,
        accumulation=recipe.optimizer.gradient_accumulation,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        workers=data.workers,
        seed=recipe.run.seed,
        pin=accelerator.device.type == "cuda",
    )
    if data.streaming:
        seconds = data.crop_range[0]
        return StreamedCrops(data.train, data.columns, maker, task.speakers, seconds, data.min_seconds, loading)
    dataset = CropDataset(
        task.corpus,
        task.speakers,
        maker,
        crop_seconds=data.crop_range,
        batch=data.batch_size * accelerator.num_processes,
        sampler=data.sampler,
        utterances_per_speaker=data.utterances_per_speaker,
        strength=partial(augmentation_strength, crops=crops_per_step(recipe, accelerator), recipe=recipe, steps=steps),
        seed=recipe.run.seed,
        targets=task.targets,
    )
    return DrawnCrops(dataset, loading)


def check_fit(recipe: Recipe, config: MRLReDimNetConfig) -> None:
    """Raises ValueError for settings that this model cannot meet."""
    wrong = [dim for dim in recipe.evaluation.report_dims if not 1 <= dim <= config.embedding_size]
    if wrong:
        raise ValueError(f"report_dims: {wrong} are not between 1 and the embedding's {config.embedding_size}.")
    if recipe.schedule.rotate_at and config.embedding_norm:
        raise ValueError("rotate_at: a rotation folds embedding_norm in, which training still needs; leave out either.")
    if recipe.model.finetune == "adapter" and recipe.model.start is None:
        raise ValueError("finetune: an adapter needs a trained base; name it by model.start (--model nano).")
    if recipe.model.finetune == "exits" and not config.exits:
        raise ValueError("finetune: the model has no exits; name them, as by --model_options '{exits: [1, 2]}'.")
    starts, ranks, dims = recipe.schedule.prefix_starts, recipe.adapter.segment_ranks, config.matryoshka_dims
    if starts and len(starts) != len(dims):
        raise ValueError(f"prefix_starts: {len(starts)} ratios for the prefixes {dims}.")
    if ranks and len(ranks) != len(dims):
        raise ValueError(f"segment_ranks: {len(ranks)} ranks for the segments of {dims} dimensions.")


def facts_of(recipe: Recipe, task: Task, model: torch.nn.Module) -> AdapterFacts | None:
    """What the adapter's folder is to say; None when no adapter is trained."""
    if recipe.model.finetune != "adapter":
        return None
    local = Path(recipe.model.name)
    repository = recipe.adapter.base_repository or (local.resolve().name if local.is_dir() else recipe.model.name)
    base = Base(repository, getattr(model.config, "_commit_hash", None), fingerprint(model))
    domain = recipe.data.label_column or recipe.augmentation.domain
    return AdapterFacts(domain, base, task=task.name, labels=list(task.labels))


def make_run(recipe: Recipe, accelerator: Accelerator) -> Run:
    """The run of a recipe: its speech, its model, and its parts. Nothing is written to its folder yet."""
    recipe = with_embedded_corpus(recipe, accelerator)
    task = prepare_task(recipe, accelerator)
    timing = Timing.of(recipe, task.utterances / crops_per_step(recipe, accelerator))
    crops = build_crops(recipe, task, accelerator, timing.steps)
    model, fresh_classifier = task.build_model(recipe)
    speed_up(model)
    synchronise_batch_norms(model, recipe.model.sync_batch_norm)
    for note in task.notes.values():
        accelerator.print(f"Note: {note}")
    run = Run(recipe, accelerator, task, crops, model, timing)
    run.parts = parts_of(run, facts_of(recipe, task, model), fresh_classifier)
    return run


def claim_output(recipe: Recipe, task: Task, resume: bool) -> None:
    """An earlier run's checkpoints are never overwritten, nor continued with other classes."""
    checkpoints = Path(recipe.run.output) / "checkpoints"
    earlier = checkpoints.exists() and any(checkpoints.iterdir())
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


def describe(run: Run) -> None:
    """What is about to be trained, on what."""
    recipe, task, accelerator = run.recipe, run.task, run.accelerator
    saved_in = None if recipe.model.start is None else MRLReDimNetConfig.from_pretrained(saved_start(recipe)).dtype
    if saved_in not in (None, torch.float32):
        accelerator.print(f"{recipe.model.start} is saved in {saved_in}; it is trained in float32.")
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    labels = max(1, len(task.labels)) if task.classes is None else len(task.classes)
    classifier = f" with the classifier of {labels:,} classes" if hasattr(run.model, "classifier") else ""
    accelerator.print(
        f"{recipe.model.name}: {sum(p.numel() for p in run.model.parameters()):,} parameters{classifier}, "
        f"{trained:,} of them trained ({recipe.model.finetune}).\n"
        f"{task.speech}; "
        + "; ".join(f"{title}: {len(test):,} trials or utterances" for title, test in task.development.items())
        + f".\n{run.steps} steps of {recipe.data.batch_size} x {recipe.optimizer.gradient_accumulation} x "
        f"{accelerator.num_processes} crops of {recipe.data.crop_seconds} s on {accelerator.device}."
    )
    growth, wanted = learning_rate_growth(recipe, accelerator.num_processes)
    if growth < wanted:
        accelerator.print(
            f"Learning rates are those of the recipe times {growth:g}, not times {wanted:g} as the crops of a step are "
            "(max_learning_rate_growth)."
        )
    if (adapter := run.part(TrainedAdapter)) is not None:
        accelerator.print(adapter.report())


def prepare_training(run: Run, resume: bool) -> None:
    """Freezes what stays, puts an adapter in, builds the optimiser, and says what is about to be trained."""
    resumed_at = newest_step(run.checkpoints) if resume else 0
    step = max(0, resumed_at - 1)  # where what is trained changes, the checkpoint is still of what was before
    for part in run.parts:
        part.start(run, step, resumed_at > 0)
    run.begin_phase(step)
    describe(run)


def start_or_resume(run: Run, resume: bool) -> Progress:
    """Step 0, or the newest checkpoint when resuming; what was recorded after it is forgotten."""
    progress = load_checkpoint(run.accelerator, run.checkpoints, run.recipe, run.steps) if resume else None
    if progress is not None:
        run.accelerator.print(f"Resuming at step {progress.step} of {run.steps}.")
        run.crops.go_on(progress.crops)
    elif resume:
        run.accelerator.print(f"No checkpoint below {run.checkpoints}: starting from the beginning.")
    progress = progress or Progress()
    if run.accelerator.is_main_process:
        recover_folder(run.output / "best_as_trained")
        Record(run.output).begin(progress.step)
    for part in run.parts:
        part.go_on(run, progress.step)
    return progress
