"""A model on the command line: what names it, how it scores, its saved thresholds, its embeddings of some files."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import PartialState
from transformers.utils import cached_file

from modeling_mrl_redimnet import MRLReDimNetPreTrainedModel
from mrl_redimnet.adapters.facts import AdapterFacts
from mrl_redimnet.adapters.hub import local_folder
from mrl_redimnet.audio.io import audio_info
from mrl_redimnet.audio.levels import read_utterance
from mrl_redimnet.audio.scan import drawn, files_below
from mrl_redimnet.embedding import embed_files, embed_usable
from mrl_redimnet.evaluation.results import reader
from mrl_redimnet.saving import load_model
from mrl_redimnet.scoring.calibration import THRESHOLDS_FILE, Thresholds, weights_of
from mrl_redimnet.scoring.scorers import Scorer, make_scorer, score, trial_seconds
from mrl_redimnet.scoring.trials import Trials

COHORT_UTTERANCES = 2000  # as many as are drawn from a larger folder


def check_output(file: Path | None, suffixes: Sequence[str] = ()):
    """Refuses, before the work, what could not be written after it."""
    if file is None:
        return
    if suffixes and file.suffix not in suffixes:
        raise ValueError(f"{file}: expected a file that ends in {' or '.join(suffixes)}.")
    if not file.parent.is_dir() or file.is_dir():
        raise FileNotFoundError(f"{file} is a folder, or there is no folder {file.parent}: give a file to write.")


@dataclass(frozen=True)
class System:
    """A model, with an adapter folded in or not, and what names it in files."""

    model: MRLReDimNetPreTrainedModel
    name: str
    adapter: str | None
    weights: str

    @classmethod
    def load(cls, arguments) -> "System":
        """What the arguments `model` and `adapter` name, on the accelerator if there is one."""
        model, adapter = load_model(arguments.model), None
        weights = weights_of(model, arguments.adapter)
        if arguments.adapter is not None:
            from mrl_redimnet.adapters.bank import AdapterBank  # PEFT takes a second to import

            facts = AdapterFacts.load(local_folder(arguments.adapter, None, None))
            adapter = facts.domain if facts else Path(arguments.adapter).name
            model = AdapterBank.load(model, {"adapter": arguments.adapter}).merged("adapter")
        name = Path(arguments.model).resolve().name if Path(arguments.model).is_dir() else arguments.model
        return cls(model.to(PartialState().device), name, adapter, weights)

    def dims(self, asked: Sequence[int] | None) -> list[int]:
        """The dimensions asked for, by default the model's own; ValueError for ones it cannot have."""
        size = self.model.config.embedding_size
        if wrong := [dim for dim in asked or [] if not 1 <= dim <= size]:
            raise ValueError(f"{wrong} are not between 1 and the embedding's {size} dimensions.")
        return sorted(set(asked or self.model.config.matryoshka_dims))

    def dim(self, asked: int | None) -> int:
        """The dimension asked for, by default the whole embedding; errors as of `dims`."""
        return self.dims([self.model.config.embedding_size if asked is None else asked])[0]

    def scorer(self, arguments, domain: Callable | None = None) -> Scorer:
        """The scorer of --scoring, --cohort and --top; a cohort is embedded in the domain of the trials."""
        if arguments.scoring == "cosine":
            return make_scorer("cosine")
        if arguments.cohort is None:
            raise ValueError(f"--scoring {arguments.scoring} needs --cohort, a folder with speech of other speakers.")
        files = drawn(files_below(arguments.cohort), COHORT_UTTERANCES)
        load = reader(arguments.cohort, domain)
        cohort = embed_usable(self.model, files, "cohort", load, progress="embedding the cohort")
        return make_scorer(arguments.scoring, cohort, arguments.top)

    def thresholds(self, folder: Path | None, source: str) -> Thresholds | None:
        """Those saved in `folder`, by default beside the model `source`; None where there are none."""
        if folder is None:
            keep_quiet = {
                "_raise_exceptions_for_missing_entries": False,
                "_raise_exceptions_for_connection_errors": False,
            }
            file = cached_file(source, THRESHOLDS_FILE, **keep_quiet)
            if file is None:
                return None
            folder = Path(file).parent
        return Thresholds.load(folder)


@dataclass(frozen=True)
class Material:
    """The utterances of some trial lists, paths relative to `folder`, and their embeddings [N, D]."""

    utterances: list[str]
    embeddings: np.ndarray
    folder: Path

    @classmethod
    def load(
        cls,
        system: System,
        lists: Iterable[Trials],
        folder: Path,
        domain: Callable | None = None,
        refuse_silence: bool = False,
    ) -> "Material":
        """Embeds every utterance of the lists once, in the domain; AudioError names a file that cannot be read.

        refuse_silence: or holds no signal, of which there is a warning else.
        """
        utterances = sorted({path for trials in lists for path in trials.utterances})
        files = [folder / path for path in utterances]
        load = read_utterance if refuse_silence else reader(folder, domain)
        return cls(utterances, embed_files(system.model, files, progress="embedding", load=load), folder)

    def seconds(self, trials: Trials) -> np.ndarray:
        """Durations [trials, 2] of both sides."""
        row_of = {path: row for row, path in enumerate(self.utterances)}
        lengths = np.full(len(self.utterances), np.nan)
        for path in trials.utterances:
            lengths[row_of[path]] = audio_info(self.folder / path).seconds
        return trial_seconds(trials, self.utterances, lengths)

    def scores(self, trials: Trials, dim: int, scorer: Scorer) -> np.ndarray:
        """Scores [trials] at one dimension."""
        return score(trials, self.utterances, self.embeddings, dim, scorer)
