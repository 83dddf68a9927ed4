"""Train a Matryoshka ReDimNet with Accelerate.

    accelerate launch train_hf.py                                     # nano on a synthetic corpus, minutes on a CPU
    accelerate launch train_hf.py recipes/FILE.yaml --output runs/x   # a recipe, single settings replaced
    accelerate launch train_hf.py recipes/FILE.yaml --resume          # go on after a stop, to the same weights

Several CPU processes: torchrun --nproc_per_node 2 train_hf.py (accelerate launch starts one on CPUs).

The run reads from top to bottom in `main` and `train`: data, model, optimiser, steps, evaluation, save. Below `output`
it writes checkpoints/, the models best_as_trained/, last/ and at the end best/ (complete Hub folders), results.json and
tracker logs.
"""

import copy
import importlib.util
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

import mrl_redimnet  # noqa: F401  registers the models with transformers
from configuration_mrl_redimnet import SIZES
from mrl_redimnet.adapters import AdapterFacts, Base, adapter_report, fingerprint
from mrl_redimnet.adapters.strategies import STRATEGIES, AdapterPlan, Probe, Vanilla
from mrl_redimnet.batches import AddNoise, CropDataset, DrawBatches, InDomain, collate
from mrl_redimnet.corpus import check_problems, load_corpus, split_usable
from mrl_redimnet.evaluation import as_records, embed_files, format_table
from mrl_redimnet.hub_cards.results import Evaluation
from mrl_redimnet.recipe import Recipe, parse_command_line
from mrl_redimnet.rotation import ROTATION_UTTERANCES, rotate
from mrl_redimnet.saving import publish_adapter, save_adapter, save_model
from mrl_redimnet.synthetic import make_corpus
from mrl_redimnet.tasks import Attribute, Verification, make_task, training_domain
from mrl_redimnet.training import (
    ChanceGuard,
    Progress,
    build_optimizer,
    chance_loss,
    freeze,
    learning_rate_at,
    load_checkpoint,
    margin_at,
    newest_step,
    save_checkpoint,
)

PROBE_BATCHES = 8  # what data-driven ranks and initialisations look at


def main(argv: list[str] | None = None):
    """Runs the training described by the command line `argv` (None: the process's own)."""
    recipe, resume = parse_command_line(argv, __doc__)
    disable_progress_bar()  # of saving; the steps have their own
    Path(recipe.output).mkdir(parents=True, exist_ok=True)
    accelerator = build_accelerator(recipe)
    set_seed(recipe.seed)

    # Data: training rows, development speech of other speakers; batches are a function of the step.
    task = prepare_task(recipe, accelerator)
    dataset = build_dataset(recipe, task)

    # Model, and what of it is trained: all, a part, or an adapter on it.
    model, fresh_classifier = task.build_model(recipe, dataset.num_labels)
    check_fit(recipe, model.config)
    guard = chance_guard(recipe, model) if fresh_classifier else None
    run = Run(recipe, accelerator, task, dataset, model, guard, facts_of(recipe, task, model))
    check_output(recipe, resume)
    prepare_training(run, newest_step(checkpoints(recipe)) if resume else 0)

    # Steps, with evaluation and checkpoints in between; where what is trained changes, a new optimiser.
    progress = start_or_resume(run, resume)
    for stop in phase_ends(recipe, progress.step):
        train(run, progress, stop)
        if stop < recipe.steps:
            begin_phase(run, stop)

    # Save and report.
    if accelerator.is_main_process:
        save(run, "last")
    final_report(run, progress)
    accelerator.end_training()


@dataclass
class Run:
    """What the parts of a run share. model: without wrappers; prepared: the same, as Accelerate trains it.

    facts: of the adapter, None when none is trained; strategy: what holds it.
    """

    recipe: Recipe
    accelerator: Accelerator
    task: Verification | Attribute
    dataset: CropDataset
    model: torch.nn.Module
    guard: ChanceGuard | None = None
    facts: AdapterFacts | None = None
    strategy: Vanilla | None = None
    prepared: torch.nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None


def train(run: Run, progress: Progress, stop: int):
    """The steps from `progress.step` to before `stop`; the model is trained in place, `progress` kept up to date."""
    recipe, accelerator, optimizer = run.recipe, run.accelerator, run.optimizer
    batches = iter(build_loader(run, progress.step, stop))
    history = History(run, progress.step)
    rotations = {int(share * recipe.steps) for share in recipe.rotate_at}
    run.prepared.train()
    for step in range(progress.step, stop):
        torch.manual_seed(recipe.seed + 1_000_003 * (step + 1) + accelerator.process_index)  # dropout, spec-augment
        if step in rotations:
            rotate_in_training(run)
        for group in optimizer.param_groups:
            group["lr"] = group["lr_scale"] * learning_rate_at(step, recipe)
        for _ in range(recipe.accumulation):
            batch = next(batches)
            progress.problems += batch["problems"]
            with accelerator.accumulate(run.prepared):
                answer = forward(run, batch, step)
                penalty = run.strategy.penalty() if run.strategy else 0.0
                accelerator.backward(answer.loss + penalty)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(run.prepared.parameters(), recipe.max_gradient_norm)
                optimizer.step()
                if run.strategy and accelerator.sync_gradients:
                    run.strategy.after_step(step)
                optimizer.zero_grad()
        history.add(step, answer)
        if run.guard is not None:
            guard_against_chance(run, step, answer, history)

        progress.step = step + 1
        if progress.step % recipe.evaluate_every == 0 or progress.step == recipe.steps:
            evaluate_and_keep_best(run, progress, history)
        if progress.step % recipe.checkpoint_every == 0 or progress.step == recipe.steps:
            save_checkpoint(accelerator, checkpoints(recipe), progress, recipe)
    history.close()


def forward(run: Run, batch: dict, step: int):
    """The model's answer, with loss, to one batch at one step."""
    inputs, labels = (batch[key].to(run.accelerator.device) for key in ("input_values", "labels"))
    if isinstance(run.task, Attribute):
        return run.prepared(inputs, labels=labels)
    return run.prepared(inputs, labels=labels, margin=margin_at(step, run.recipe, run.model.config.margin))


def evaluate_and_keep_best(run: Run, progress: Progress, history: "History"):
    """Judges the model on development speech; the best so far is saved. The first of several domains decides."""
    report_unreadable(run, progress)
    tables = {title: run.task.evaluate(run.model, test) for title, test in run.task.development.items()}
    history.report(progress.step, tables)
    score = run.task.score(next(iter(tables.values())))
    settled = run.strategy is None or run.strategy.settled(progress.step)
    if settled and score <= progress.best_score:  # of equals the later, longer trained one
        progress.best_score, progress.best_step = score, progress.step
        if run.accelerator.is_main_process:
            save(run, "best_as_trained")


# ----------------------------------------------------------------------------------------------------------------------
# In the order of use


def build_accelerator(recipe: Recipe) -> Accelerator:
    """Devices, precision, accumulation, trackers."""
    if recipe.tracker == "wandb" and importlib.util.find_spec("wandb") is None:
        raise ModuleNotFoundError("tracker: wandb is not installed: pip install 'mrl-redimnet[wandb]'.")
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else processes without an accelerator each train on their own
        mixed_precision=recipe.mixed_precision,
        gradient_accumulation_steps=recipe.accumulation,
        log_with=None if recipe.tracker == "none" else recipe.tracker,
        project_config=ProjectConfiguration(project_dir=recipe.output, logging_dir=str(Path(recipe.output) / "logs")),
    )
    settings = {k: v if isinstance(v, (int, float, str)) else json.dumps(v) for k, v in asdict(recipe).items()}
    accelerator.init_trackers("mrl-redimnet", config=settings)
    return accelerator


def prepare_task(recipe: Recipe, accelerator: Accelerator) -> Verification | Attribute:
    """Reads the training folder, the main process first, the others from its cache."""
    with accelerator.main_process_first():
        with_embedded_corpus(recipe)
        task = make_task(recipe, load_training_speech(recipe, accelerator))
        task.speakers.save(Path(recipe.output) / "speakers.json")
        return task


def with_embedded_corpus(recipe: Recipe):
    """Without a training folder: the synthetic corpus, made on first use, and its trial list as the test."""
    if recipe.train is not None:
        return
    root = make_corpus(Path("data") / "synthetic")
    print(f"No training folder given: using the synthetic corpus in {root}. Its EERs say nothing about real voices.")
    recipe.train = str(root / "train")
    options = recipe.domain_options
    if recipe.domain == "noisy" and recipe.noise is None and "noise" not in options:
        recipe.noise = recipe.train  # other talkers are the noise that every corpus has
    test = {"trials": str(root / "test" / "trials.txt"), "folder": str(root / "test" / "wav")}
    if recipe.tests or recipe.label_column:
        return
    recipe.tests = {"synthetic": test}
    if recipe.domain != "clean":
        options = {"noise": recipe.noise, **options} if recipe.domain == "noisy" else options
        recipe.tests[f"synthetic, {recipe.domain}"] = {**test, "domain": recipe.domain, "domain_options": options}


def load_training_speech(recipe: Recipe, accelerator: Accelerator) -> Dataset:
    """The usable rows of the training folder; the others are counted, listed, and too many of them stop the run."""
    corpus = load_corpus(recipe.train, recipe.layout)
    usable, problems = split_usable(corpus, recipe.min_seconds)
    report = Path(recipe.output) / "unusable_files.tsv"
    summary = check_problems(problems, len(corpus), recipe.max_problem_share, report)
    if problems:
        accelerator.print(summary)
    return usable


def build_dataset(recipe: Recipe, task: Verification | Attribute) -> CropDataset:
    """Training crops with the recipe's augmentations, then its domain."""
    augmentations = []
    if recipe.noise and recipe.domain != "noisy":  # there the noise is the domain's
        augmentations.append(AddNoise(recipe.noise, tuple(recipe.noise_snr), recipe.noise_probability))
    if recipe.domain != "clean":
        augmentations.append(InDomain(training_domain(recipe), recipe.base_share))
    return CropDataset(
        task.corpus,
        task.speakers,
        crop_seconds=recipe.crop_seconds,
        sampler=recipe.sampler,
        speeds=tuple(recipe.speeds),
        augmentations=augmentations,
        seed=recipe.seed,
        targets=task.targets,
    )


def check_fit(recipe: Recipe, config):
    """Raises ValueError for settings that this model cannot meet."""
    wrong = [dim for dim in recipe.report_dims if not 1 <= dim <= config.embedding_size]
    if wrong:
        raise ValueError(f"report_dims: {wrong} are not between 1 and the embedding's {config.embedding_size}.")
    if recipe.rotate_at and config.embedding_norm:
        raise ValueError("rotate_at: a rotation folds embedding_norm in, which training still needs; leave out either.")
    if recipe.trains == "adapter" and recipe.model in SIZES:
        raise ValueError(f"trains: an adapter needs a trained base; model: {recipe.model} is random weights.")
    if recipe.segment_ranks and len(recipe.segment_ranks) != len(config.matryoshka_dims):
        raise ValueError(
            f"segment_ranks: {len(recipe.segment_ranks)} ranks for the segments of {config.matryoshka_dims} dimensions."
        )


def chance_guard(recipe: Recipe, model) -> ChanceGuard | None:
    """Knows the loss of a classifier that has learnt nothing, and the step by which it must have."""
    crops = min(recipe.batch_size, 64)  # what more of them would change is small
    mean, deviation = chance_loss(model.classifier, margin_at(0, recipe, model.config.margin), crops)
    return ChanceGuard(mean, deviation, deadline=int(recipe.warmup * recipe.steps) + recipe.chance_steps)


def guard_against_chance(run: Run, step: int, answer, history: "History"):
    """Stops a run with a fresh classifier that is not set up right, or does not learn."""
    if step == 0:
        run.guard.check_start(float(answer.loss.detach()))
    if history.loss is not None:
        margin = margin_at(step, run.recipe, run.model.config.margin)
        run.guard.check_progress(step, history.loss, run.model.config.scale * math.sin(margin))


def facts_of(recipe: Recipe, task: Verification | Attribute, model) -> AdapterFacts | None:
    """What the adapter's folder is to say; None when no adapter is trained."""
    if recipe.trains != "adapter":
        return None
    local = Path(recipe.model)
    repository = recipe.base_repository or (local.resolve().name if local.is_dir() else recipe.model)
    base = Base(repository, getattr(model.config, "_commit_hash", None), fingerprint(model))
    domain = recipe.label_column or recipe.domain
    return AdapterFacts(domain, base, task=task.name, labels=list(task.labels))


def checkpoints(recipe: Recipe) -> Path:
    """The folder of the run's checkpoints."""
    return Path(recipe.output) / "checkpoints"


def check_output(recipe: Recipe, resume: bool):
    """An earlier run's checkpoints are never overwritten."""
    if not resume and checkpoints(recipe).exists() and any(checkpoints(recipe).iterdir()):
        raise FileExistsError(
            f"output: {recipe.output} holds checkpoints of an earlier run: --resume goes on with it, another --output "
            "begins anew."
        )


def prepare_training(run: Run, resumed_at: int):
    """Freezes what stays, puts the adapter in, and says what is about to be trained; resumed_at: 0 for a new run."""
    step = max(0, resumed_at - 1)  # where what is trained changes, the checkpoint is still of what was before
    if run.facts is not None:
        run.strategy = attach_adapter(run, step, resumed_at > 0)
        if run.strategy.state() is not None:
            run.accelerator.register_for_checkpointing(run.strategy.state())
    begin_phase(run, step)
    describe(run)


def attach_adapter(run: Run, step: int, resumed: bool) -> Vanilla:
    """The recipe's adapter, as it is at `step`, on the encoder (or, for an attribute, on the model with its head)."""
    recipe, output = run.recipe, Path(run.recipe.output)
    known = output / "ranks.json"
    plan = AdapterPlan(
        steps=recipe.steps,
        placement=recipe.placement,
        rank=recipe.rank,
        segment_ranks=recipe.segment_ranks,
        start_rank=recipe.start_rank,
        cut_step=int(recipe.cut_at * recipe.steps),
        first_step=step,
        norms=recipe.adapter_norms,
        task_type=run.task.adapter_task,
        options=recipe.peft_options,
        known_ranks=json.loads(known.read_text()) if resumed and known.is_file() else None,
    )
    host = run.model if isinstance(run.task, Attribute) else run.model.redimnet
    run.model.to(run.accelerator.device)
    probe = Probe(lambda: probe_batches(run), lambda batch: run.model(**batch).loss)
    strategy = STRATEGIES[recipe.strategy](host, plan, probe)
    strategy.keep_start(output / "adapter_at_start")
    if strategy.ranks_from_data and run.accelerator.is_main_process:
        known.write_text(json.dumps(strategy.ranks(), indent=1))
    return strategy


def probe_batches(run: Run) -> list[dict]:
    """The same few training batches in every process, none of which is trained on."""
    size, beyond = run.recipe.batch_size, 2**40
    examples = [[run.dataset[beyond + i * size + j] for j in range(size)] for i in range(PROBE_BATCHES)]
    keys = ("input_values", "labels")
    return [{key: collate(batch)[key].to(run.accelerator.device) for key in keys} for batch in examples]


def describe(run: Run):
    """What is about to be trained, on what."""
    recipe, task, accelerator = run.recipe, run.task, run.accelerator
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    classes = run.dataset.num_labels if task.targets is None else max(1, len(task.labels))
    speech = f"{len(task.corpus):,} utterances of {len(task.corpus.unique('speaker')):,} speakers"
    accelerator.print(
        f"{recipe.model}: {sum(p.numel() for p in run.model.parameters()):,} parameters with the classifier of "
        f"{classes:,} classes, {trained:,} of them trained ({recipe.trains}).\n"
        f"{speech}, {sum(task.corpus['seconds']) / 3600:.1f} h; "
        + "; ".join(f"{title}: {len(test):,} trials or utterances" for title, test in task.development.items())
        + f".\n{recipe.steps} steps of {recipe.batch_size} x {recipe.accumulation} x {accelerator.num_processes} crops "
        f"of {recipe.crop_seconds} s on {accelerator.device}."
    )
    if run.strategy:
        accelerator.print(adapter_report(run.strategy.peft))


def phase_ends(recipe: Recipe, first_step: int) -> list[int]:
    """The steps at which what is trained changes, from `first_step` on, and the last."""
    ends = {int(recipe.trunk_frozen_until * recipe.steps), recipe.steps}
    if recipe.trains == "adapter" and recipe.strategy == "warm_up":
        ends.add(int(recipe.cut_at * recipe.steps))
    return sorted(end for end in ends if end > 0 and end >= first_step)


def begin_phase(run: Run, step: int):
    """Sets what is trained from `step` on, with an optimiser of its own."""
    if run.strategy is None:
        freeze(run.model, run.recipe, step)
    elif run.strategy.changes_ranks and step == run.strategy.plan.cut_step:
        run.accelerator.print(run.strategy.cut())
    run.accelerator.free_memory()
    run.prepared, run.optimizer = run.accelerator.prepare(run.model, build_optimizer(run.model, run.recipe))


def start_or_resume(run: Run, resume: bool) -> Progress:
    """Step 0, or the newest checkpoint when resuming."""
    if not resume:
        return Progress()
    progress = load_checkpoint(run.accelerator, checkpoints(run.recipe), run.recipe)
    if progress is None:
        run.accelerator.print(f"No checkpoint below {checkpoints(run.recipe)}: starting from the beginning.")
        return Progress()
    run.accelerator.print(f"Resuming at step {progress.step} of {run.recipe.steps}.")
    return progress


def build_loader(run: Run, first_step: int, stop: int) -> DataLoader:
    """Batches of the steps from `first_step` to before `stop`.

    Not prepared by Accelerate: each process draws its own share already, and a resumed run begins at its step instead
    of skipping batches.
    """
    recipe, accelerator = run.recipe, run.accelerator
    batches = DrawBatches(
        recipe.batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        first=first_step * recipe.accumulation,
        stop=stop * recipe.accumulation,
    )
    return DataLoader(
        run.dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=recipe.workers,
        generator=torch.Generator().manual_seed(recipe.seed),  # else the loader draws from the global one
        pin_memory=accelerator.device.type == "cuda",
    )


class History:
    """Losses on the device until a log line is due; progress bar and trackers."""

    def __init__(self, run: Run, first_step: int):
        self.run, self.accelerator, self.recipe = run, run.accelerator, run.recipe
        self.pending: list[torch.Tensor] = []
        self.loss: float | None = None
        self.clock = time.perf_counter()
        bar = not self.accelerator.is_main_process
        self.bar = tqdm(total=self.recipe.steps, initial=first_step, disable=bar, unit="step")

    def add(self, step: int, answer):
        """Keeps this step's losses; every `log_every` steps fetches their means, in one device sync."""
        self.bar.update()
        prefixes = answer.get("prefix_losses")
        loss = answer.loss.detach()[None]
        self.pending.append(loss if prefixes is None else torch.cat([loss, prefixes]))
        if (step + 1) % self.recipe.log_every:
            return
        self.loss, *prefixes = torch.stack(self.pending).mean(0).tolist()
        crops = len(self.pending) * self.recipe.batch_size * self.recipe.accumulation * self.accelerator.num_processes
        rate = crops / (time.perf_counter() - self.clock)
        self.pending, self.clock = [], time.perf_counter()
        learning_rate = learning_rate_at(step, self.recipe)
        self.bar.set_postfix_str(f"loss {self.loss:.2f}, lr {learning_rate:.1e}, {rate:.0f} crops/s")
        named = {f"loss/{d}": v for d, v in zip(self.run.model.config.matryoshka_dims, prefixes, strict=False)}
        values = {"loss": self.loss, **named, "learning_rate": learning_rate, "crops_per_s": rate}
        self.accelerator.log(values, step=step + 1)

    def report(self, step: int, tables: dict):
        """Prints tables of development results and logs their scores."""
        scores = {f"score/{title}": self.run.task.score(rows) for title, rows in tables.items()}
        self.accelerator.log(scores, step=step)
        if self.accelerator.is_main_process:
            self.bar.write(f"step {step}\n{format_table(tables)}")
        self.clock = time.perf_counter()

    def close(self):
        """Ends the progress bar."""
        self.bar.close()


def training_embeddings(run: Run, model) -> np.ndarray:
    """Embeddings of (a drawn share of) the training utterances, for the rotation, [N, D]."""
    corpus = run.task.corpus
    rows = np.random.default_rng([run.recipe.seed, 3]).permutation(len(corpus))[:ROTATION_UTTERANCES]
    return embed_files(model, [corpus[int(row)]["audio"]["path"] for row in sorted(rows)], progress="rotation")


def rotate_in_training(run: Run):
    """Turns the basis mid-run; the optimiser forgets the moments of the turned tensors, which were of the old basis."""
    rotate(run.model, training_embeddings(run, run.model))
    for parameter in (*run.model.redimnet.projection.segments.parameters(), run.model.classifier.weight):
        run.optimizer.state.pop(parameter, None)


def report_unreadable(run: Run, progress: Progress):
    """Lists the crops that could not be read so far; too large a share of them stops the run."""
    recipe = run.recipe
    if progress.problems:
        crops = progress.step * recipe.batch_size * recipe.accumulation
        listing = Path(recipe.output) / f"unreadable_crops_{run.accelerator.process_index}.tsv"
        print(check_problems(progress.problems, crops, recipe.max_problem_share, listing))


def save(run: Run, name: str):
    """Writes the adapter, or else the model, as it now is to `output`/`name`."""
    folder = Path(run.recipe.output) / name
    if run.strategy is None:
        save_model(run.model, folder, run.task.speakers, name=Path(run.recipe.output).name)
    else:
        save_adapter(run.strategy, run.facts, folder)


def final_report(run: Run, progress: Progress):
    """Evaluates the best model beside what it came from, writes best/ and results.json, and prints the tables."""
    recipe, task, accelerator = run.recipe, run.task, run.accelerator
    systems, saved, scores = final_systems(run)
    dims = sorted({*run.model.config.matryoshka_dims, *recipe.report_dims})
    results = {
        name: {s: task.evaluate(m, test, dims, recipe.resamples, name) for s, m in systems.items()}
        for name, test in (task.tests or task.development).items()
    }
    if not accelerator.is_main_process:
        return
    sentence = training_sentence(run, progress, saved)
    evaluation = Evaluation(saved, results)
    best = Path(recipe.output) / "best"
    if run.strategy is None:
        name = Path(recipe.output).name
        save_model(systems[saved], best, task.speakers, name=name, training=sentence, evaluation=evaluation)
    else:
        publish_adapter(Path(recipe.output) / "best_as_trained", best, sentence, evaluation)
        ranks = AdapterFacts.load(best).layers
        print("\nRanks: " + ", ".join(f"{name} {rank}" for name, rank in ranks.items()))
    record = {
        "recipe": asdict(recipe),
        "best_step": progress.best_step,
        "saved": saved,
        "development_scores": scores,
        "results": {name: {s: as_records(rows) for s, rows in r.items()} for name, r in results.items()},
    }
    (Path(recipe.output) / "results.json").write_text(json.dumps(record, indent=1))
    for name, tables in results.items():
        print(f"\n{name}: best model (step {progress.best_step}); 95 % intervals over speakers")
        print(format_table(tables))
    print(f"\nSaved: {best} ({saved}), {recipe.output}/last, {recipe.output}/results.json")


def final_systems(run: Run) -> tuple[dict, str, dict[str, float]]:
    """The models to report, the name of the one to save, and development scores that it was chosen by.

    An adapter is loaded as its users will load it, beside the base without it. A trained verification model is
    reported as trained and rotated: at full width the two score alike; prefixes gain much by the rotation when they
    were not trained as prefixes of a rotated basis, and little or nothing after `rotate_at`: the development trials
    decide.
    """
    recipe, task, device = run.recipe, run.task, run.accelerator.device
    folder = Path(recipe.output) / "best_as_trained"
    systems = {}
    if recipe.model not in SIZES and isinstance(task, Verification):
        systems["base"] = task.build_model(recipe, run.dataset.num_labels)[0].to(device).eval()
    if run.strategy is not None:
        model = task.build_model(recipe, run.dataset.num_labels)[0].to(device).eval()
        PeftModel.from_pretrained(model if isinstance(task, Attribute) else model.redimnet, folder)
        return {**systems, "adapter": model}, "adapter", {}
    trained = type(run.model).from_pretrained(folder).to(device)
    systems["as trained"] = trained
    if isinstance(task, Attribute) or recipe.trains != "all":
        return systems, "as trained", {}
    systems["rotated"] = copy.deepcopy(trained)
    rotate(systems["rotated"], training_embeddings(run, trained))
    judge = next(iter(task.development.values()))
    scores = {state: task.score(task.evaluate(systems[state], judge)) for state in ("as trained", "rotated")}
    return systems, "rotated" if scores["rotated"] <= scores["as trained"] else "as trained", scores


def training_sentence(run: Run, progress: Progress, saved: str) -> str:
    """What the card says about the training."""
    recipe, corpus = run.recipe, run.task.corpus
    start = "random weights" if recipe.model in SIZES else f"`{Path(recipe.model).name}`"
    crops = recipe.batch_size * recipe.accumulation * run.accelerator.num_processes
    what = "Trained" if run.strategy is None else f"An adapter ({recipe.placement}, {recipe.strategy}) trained"
    domain = "" if recipe.domain == "clean" else f", {1 - recipe.base_share:.0%} of them made {recipe.domain},"
    return (
        f"{what} from {start} by `train_hf.py`: {recipe.steps} steps of {crops} crops of {recipe.crop_seconds} s"
        f"{domain} from {len(corpus):,} utterances of {len(corpus.unique('speaker')):,} speakers "
        f"({sum(corpus['seconds']) / 3600:.1f} h). Step {progress.best_step} was best on the development speech."
        + (f" Prefixes are {saved}." if saved in ("as trained", "rotated") else "")
    )


if __name__ == "__main__":
    main()
