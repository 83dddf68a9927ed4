"""What a speaker service answers, in Python: `Service`. `app.py` puts HTTP in front of it.

Audio comes as the bytes of files. Decoding runs in threads, the network in the batches of a `MicroBatcher`.
"""

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from mrl_redimnet.adapters.detector import DomainDetector
from mrl_redimnet.adapters.hub import HubError
from mrl_redimnet.audio.io import SAMPLING_RATE, AudioError, Encoded, audio_info, read_audio
from mrl_redimnet.audio.levels import refuse_silence, speech_seconds
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.scoring.calibration import Thresholds
from mrl_redimnet.scoring.decisions import ENROL_SECONDS, TEST_SECONDS, Decision, DecisionRule, short_speech
from mrl_redimnet.scoring.scorers import enrolment_units, make_scorer
from mrl_redimnet.serving.batcher import BatcherClosedError, MicroBatcher, QueueFullError
from mrl_redimnet.serving.store import (
    Enrolled,
    Logged,
    Space,
    SpeakerStore,
    StoreError,
    UnknownSpeakerError,
)

AUTO = "auto"  # in place of an adapter's name: the detector chooses
NONE = "none"  # the model itself
MEGABYTE = 2**20
Result = TypeVar("Result")

# An owner's name, "/", and a repository's, as the Hub has them: no path of this machine.
_HUB_ID = re.compile(r"(?P<owner>[\w-][\w.-]*)/[\w-][\w.-]*")


class Refused(Exception):
    """A request that is not carried out.

    Attributes:
        code: a short word that programs compare. status: of HTTP. str(): a sentence.
    """

    def __init__(self, code: str, status: int, message: str) -> None:
        super().__init__(message)
        self.code, self.status = code, status


@dataclass(frozen=True)
class Limits:
    """What a service takes.

    Attributes:
        bytes: of the body of one request. seconds: of one utterance. utterances: in one request.
        requests: at once; more are refused.
        enrol_seconds: of speech that a speaker is enrolled from, at least.
        adapters: loaded at once.
    """

    bytes: int = 32 * MEGABYTE
    seconds: float = 120.0
    utterances: int = 20
    requests: int = 256
    enrol_seconds: float = ENROL_SECONDS
    adapters: int = 32

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0 and not (name == "enrol_seconds" and value == 0):
                raise ValueError(f"limits: {name} is {value}, expected a number above 0.")


@dataclass(frozen=True)
class Voice:
    """Utterances as the service embedded them: whole embeddings [N, D], seconds and seconds of speech [N]."""

    embeddings: NDArray
    seconds: list[float]
    speech: list[float]
    adapter: str | None
    weights: str


class Service:
    """A model with its adapters, and enrolled speakers, for many requests at once.

    The methods that answer are coroutines. They raise `Refused` for whatever a request asks that cannot be; other
    requests go on.

    Attributes:
        encoder, batcher, store, limits: as given.
        require_consent: whether enrolments must say where consent is recorded.
        on_decision: where it is set, is told the kind of each decision and whether it accepted.
    """

    def __init__(
        self,
        encoder: SpeakerEncoder,
        store: SpeakerStore | None = None,
        *,
        batcher: MicroBatcher | None = None,
        detector: DomainDetector | None = None,
        thresholds: Thresholds | None = None,
        namespaces: Sequence[str] = (),
        limits: Limits | None = None,
        log_decisions: bool = False,
        require_consent: bool = False,
    ) -> None:
        """Args:
        encoder: with the adapters that are there from the start.
        store: of enrolled speakers; None: nobody can be enrolled. It is closed with the service.
        batcher: of this encoder; by default one with its own settings. It is closed with the service.
        detector: chooses the adapter where a request says "auto".
        thresholds: to decide by [those beside the model].
        namespaces: of the Hub, from which adapters may be loaded by requests. None by default.
        log_decisions: keep every decision in the store, without audio.
        """
        if log_decisions and store is None:
            raise ValueError("log_decisions: decisions are kept in the store, and there is none.")
        self.encoder, self.store, self.limits = encoder, store, limits or Limits()
        self.batcher = batcher or MicroBatcher(encoder)
        self.require_consent = require_consent
        self._detector, self._namespaces, self._log = detector, tuple(namespaces), log_decisions
        self._thresholds = encoder.thresholds() if thresholds is None else thresholds
        self.on_decision: Callable[[str, bool | None], object] | None = None
        self._own_weights = encoder.weights(None)
        self._version = version("mrl-redimnet")
        self._scorer = make_scorer("cosine")
        self._threads = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="mrl-redimnet audio")
        self._stored = ThreadPoolExecutor(4, thread_name_prefix="mrl-redimnet store")
        self._changing = asyncio.Lock()  # adapters are loaded one after the other

    def close(self) -> None:
        """Answers what was asked, and closes batcher and store."""
        self.batcher.close()
        self._threads.shutdown()
        self._stored.shutdown()
        if self.store is not None:
            self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ------------------------------------------------------------ what can be asked

    async def embed(self, audio: Sequence[bytes], adapter: str | None = None, dim: int | None = None) -> dict[str, Any]:
        """The embeddings of utterances, each with the adapter that fits it where that is "auto"."""
        dim = self._dim(dim)
        waves = await self._read(audio, "audio", refuse_silent=False)
        chosen = [self._adapter(adapter, wave) for wave in waves]
        found = await _together([self._answer(wave, name) for wave, name in zip(waves, chosen, strict=True)])
        return {
            "dim": dim,
            "embeddings": [
                {
                    "embedding": each.numbers[:dim].tolist(),
                    "seconds": len(wave) / SAMPLING_RATE,
                    "adapter": name,
                    "weights": each.weights,
                }
                for wave, name, each in zip(waves, chosen, found, strict=True)
            ],
        }

    async def verify(
        self,
        test: bytes,
        enrol: Sequence[bytes] = (),
        speaker: str | None = None,
        adapter: str | None = None,
        dim: int | None = None,
        threshold: float | None = None,
    ) -> dict[str, Any]:
        """Whether `test` is an enrolled speaker, or the one of the utterances `enrol`."""
        if bool(enrol) == (speaker is not None):
            raise Refused("bad_request", 422, "Give either `enrol`, utterances of one speaker, or `speaker`, a name.")
        dim = self._dim(dim)
        (wave,) = await self._read([test], "test")
        name = self._adapter(adapter, wave)  # of both sides: they must be comparable
        if speaker is None:
            others = await self._read(enrol, "enrol")
            heard = await self._embedded([wave, *others], name)
            units = self._units(heard.embeddings, dim)
            (enrolment,) = enrolment_units(units[1:], {"the enrolment": range(len(others))})
            count, seconds = len(others), sum(heard.seconds[1:])
            notes = short_speech("enrolments", [("the enrolment", sum(heard.speech[1:]))], ENROL_SECONDS)
            space = Space(heard.weights, name, dim)
        else:
            heard = await self._embedded([wave], name)
            units, space = self._units(heard.embeddings, dim), Space(heard.weights, name, dim)
            known, enrolment = await self._store(lambda store: store.find(space, speaker))
            count, seconds, notes = known.utterances, known.seconds, []  # too little is refused there
        rule = self._rule(space, [count], threshold)
        score = float(enrolment @ units[0])
        (decision,) = rule.decide(np.array([score]), [count], np.array([[seconds, heard.seconds[0]]]))
        await self._decided("verify", speaker, space, decision)
        return {
            "speaker": speaker,
            **_decision(decision),
            **self._versions(space, rule),
            "enrolled_utterances": count,
            "notes": notes + _notes(heard),
        }

    async def enrol(
        self,
        speaker: str,
        audio: Sequence[bytes],
        adapter: str | None = None,
        dim: int | None = None,
        consent: str | None = None,
    ) -> dict[str, Any]:
        """Adds utterances to a speaker, who is made where there is none."""
        if self.require_consent and not (consent or "").strip():
            raise Refused("consent_missing", 422, "`consent` is missing: say where the speaker's consent is recorded.")
        dim = self._dim(dim)
        self._need_store()
        waves = await self._read(audio, "audio")
        seconds, speech = sum(map(len, waves)) / SAMPLING_RATE, sum(await self._speech(waves))
        if speech < self.limits.enrol_seconds:
            raise Refused(
                "too_short",
                422,
                f"{speech:.2f} s of speech are too little to enrol a speaker: give {self.limits.enrol_seconds:g} s.",
            )
        name = self._adapter(adapter, np.concatenate(waves))
        heard = await self._embedded(waves, name)
        units = self._units(heard.embeddings, dim)
        space = Space(heard.weights, name, dim)
        return _enrolled(await self._store(lambda store: store.enrol(space, speaker, units, seconds, consent)))

    async def identify(
        self,
        test: bytes,
        adapter: str | None = None,
        dim: int | None = None,
        threshold: float | None = None,
        top: int = 3,
    ) -> dict[str, Any]:
        """Which of the enrolled speakers `test` is, with the nearest ones."""
        if not 1 <= top <= 100:
            raise Refused("bad_request", 422, f"top: got {top}, expected 1 to 100.")
        dim = self._dim(dim)
        self._need_store()
        (wave,) = await self._read([test], "test")
        name = self._adapter(adapter, wave)
        heard = await self._embedded([wave], name)
        space = Space(heard.weights, name, dim)
        (unit,) = self._units(heard.embeddings, dim)
        found, speakers = await self._store(lambda store: (store.nearest(space, unit, top), store.count(space)))
        if not found:
            raise Refused("nobody_enrolled", 404, f"Nobody is enrolled with {_named(space)}: nobody can be identified.")
        counts = [match.enrolled.utterances for match in found]
        rule = self._rule(space, counts, threshold, speakers)
        seconds = np.array([[match.enrolled.seconds, heard.seconds[0]] for match in found])
        decisions = rule.decide(np.array([match.score for match in found]), counts, seconds)
        best = decisions[0]
        await self._decided("identify", found[0].enrolled.speaker, space, best)
        return {
            "speaker": None if best.accepted is False else found[0].enrolled.speaker,
            "accepted": best.accepted,
            "candidates": [
                {"speaker": match.enrolled.speaker, **_decision(each)}
                for match, each in zip(found, decisions, strict=True)
            ],
            "enrolled_speakers": speakers,
            **self._versions(space, rule),
            "notes": _notes(heard),
        }

    async def classify(self, audio: bytes, adapter: str | None = None) -> dict[str, Any]:
        """What the classifier of an adapter, or of the model, says."""
        (wave,) = await self._read([audio], "audio")
        name = self._adapter(adapter, wave)
        self._classified(np.zeros((1, self.encoder.config.embedding_size)), name)  # before the network runs
        answer = await self._answer(wave, name)
        (found,) = self._classified(answer.numbers[None], name)
        which: dict[str, Any] = {"adapter": name, "weights": answer.weights, "seconds": len(wave) / SAMPLING_RATE}
        if isinstance(found, dict):
            return {"label": max(found, key=lambda label: found[label]), "probabilities": found, **which}
        return {"value": float(found), **which}

    def _classified(self, embeddings: NDArray, adapter: str | None) -> Any:
        try:
            return self.encoder.classify(embeddings, adapter)
        except ValueError as error:
            raise Refused("no_classifier", 409, str(error)) from error

    async def speakers(self, speaker: str | None = None, after: str = "", limit: int = 1000) -> dict[str, Any]:
        """Who is enrolled, in all spaces."""
        found = await self._store(lambda store: store.speakers(speaker, after=after, limit=limit))
        if speaker is not None and not found:
            raise Refused("unknown_speaker", 404, f"Nobody is enrolled as {speaker!r}.")
        return {"speakers": [_enrolled(each) for each in found]}

    async def delete(self, speaker: str) -> dict[str, Any]:
        """Forgets a speaker, with everything that is kept of the voice."""
        return {"speaker": speaker, "deleted": await self._store(lambda store: store.delete(speaker))}

    async def decisions(self, limit: int = 1000) -> dict[str, Any]:
        """The latest decisions that were logged."""
        found = await self._store(lambda store: store.decisions(limit))
        return {"decisions": [vars(each) | {"space": vars(each.space)} for each in found]}

    # ------------------------------------------------------------ adapters

    @property
    def adapters(self) -> list[str]:
        """The adapters that are loaded."""
        try:
            return self.encoder.adapters.names
        except ValueError:  # one is merged into the model, and others cannot be loaded
            return []

    def list_adapters(self) -> dict[str, Any]:
        """The adapters that are loaded, and from whom more may be."""
        found = []
        for name in self.adapters:
            facts = self.encoder.adapters.facts(name)
            found.append(
                {
                    "name": name,
                    "domain": facts.domain if facts else None,
                    "task": facts.task if facts else None,
                    "labels": facts.labels if facts else [],
                    "weights": self.encoder.weights(name),
                }
            )
        return {
            "model": self.encoder.name,
            "weights": self._own_weights,
            "merged": self.encoder.adapter if not self.adapters else None,
            "adapters": found,
            "namespaces": list(self._namespaces),
            "detector": list(self._detector.domains) if self._detector else None,
        }

    async def load_adapter(self, name: str, repository: str, revision: str | None = None) -> dict[str, Any]:
        """Loads an adapter from a repository on the Hub whose owner is in the list of namespaces."""
        match = _HUB_ID.fullmatch(repository)
        if match is None or match["owner"] not in self._namespaces:
            allowed = ", ".join(self._namespaces) or "none"
            raise Refused(
                "not_allowed",
                403,
                f"{repository!r} is not to be loaded: this service takes adapters OWNER/NAME of the Hub, of these "
                f"owners: {allowed}.",
            )
        if os.path.exists(repository):  # a folder of that name would be taken first
            raise Refused("not_allowed", 403, f"{repository!r} is a folder here: it is not to be loaded by a request.")
        if name in (AUTO, NONE):
            raise Refused("bad_request", 422, f"{name!r} has a meaning in requests: take another name.")
        async with self._changing:
            if len(self.adapters) >= self.limits.adapters:
                raise Refused(
                    "too_many_adapters",
                    409,
                    f"{len(self.adapters)} adapters are loaded, which is the limit: delete one.",
                )
            try:
                await self._in_thread(partial(self.encoder.adapters.add, name, repository, revision=revision))
            except HubError as error:
                raise Refused("adapter_unavailable", 502, str(error)) from error
            except (ValueError, OSError) as error:
                raise Refused("adapter_refused", 409, str(error)) from error
        return {"name": name, "weights": self.encoder.weights(name)}

    async def delete_adapter(self, name: str) -> dict[str, Any]:
        """Unloads an adapter; who was enrolled with it stays in the store, for when it is there again."""
        async with self._changing:
            if name not in self.adapters:
                raise self._unknown_adapter(name)
            await self._in_thread(partial(self.encoder.adapters.delete, name))
        return {"deleted": name}

    # ------------------------------------------------------------ steps

    async def _read(self, audio: Sequence[bytes], field: str, refuse_silent: bool = True) -> list[NDArray]:
        """Files -> waveforms [samples] at 16 kHz."""
        if not audio:
            raise Refused("audio_missing", 422, f"`{field}` is missing: give an audio file.")
        if len(audio) > self.limits.utterances:
            raise Refused(
                "too_many",
                413,
                f"{field}: {len(audio)} files, this service takes {self.limits.utterances} in a request.",
            )
        names = [field if len(audio) == 1 else f"{field} {number}" for number in range(1, len(audio) + 1)]
        read = partial(self._waveform, refuse_silent=refuse_silent)
        return await _together(
            [self._in_thread(partial(read, Encoded(name, data))) for name, data in zip(names, audio, strict=True)]
        )

    def _waveform(self, source: Encoded, refuse_silent: bool) -> NDArray:
        most = self.limits.seconds
        try:
            seconds = audio_info(source).seconds  # before it is decoded, which could take much memory
            if seconds <= most:
                wave = read_audio(source)
        except AudioError as error:
            raise Refused("bad_audio", 422, f"{error}.") from error
        if seconds > most or len(wave) > (most + 1) * SAMPLING_RATE:
            raise Refused("too_long", 413, f"{source.name} has {seconds:.1f} s, this service takes {most:g} s.")
        least = self.encoder.config.min_samples
        if len(wave) < least:
            raise Refused(
                "too_short", 422, f"{source.name} has {len(wave) / SAMPLING_RATE:.3f} s, the model needs "
                f"{least / SAMPLING_RATE:.3f} s."
            )  # fmt: skip
        if refuse_silent:
            try:
                refuse_silence(source, wave)
            except AudioError as error:
                raise Refused("no_speech", 422, f"{error}.") from error
        return wave

    def _adapter(self, asked: str | None, wave: NDArray) -> str | None:
        """The adapter for a waveform that was asked for with "auto" or "none"."""
        if asked in (None, "", NONE):
            return None
        if asked == AUTO:
            if self._detector is None:
                raise Refused("no_detector", 409, "This service has no detector to choose the adapter: name one.")
            return self._detector.choose([wave], self.adapters)[0]
        if asked not in self.adapters:
            raise self._unknown_adapter(asked)
        return asked

    def _unknown_adapter(self, name: str | None) -> Refused:
        there = ", ".join(self.adapters) or "none"
        return Refused("unknown_adapter", 404, f"There is no adapter {name!r}; loaded are: {there}.")

    def _dim(self, asked: int | None) -> int:
        try:
            return self.encoder.dim(asked)
        except ValueError as error:
            raise Refused("bad_dim", 422, str(error)) from error

    async def _answer(self, wave: NDArray, adapter: str | None) -> Any:
        try:
            return await self.batcher.embed_async(wave, adapter)
        except QueueFullError as error:
            raise Refused("queue_full", 503, str(error)) from error
        except BatcherClosedError as error:
            raise Refused("stopping", 503, str(error)) from error
        except ValueError as error:
            if adapter is not None and adapter not in self.adapters:  # deleted meanwhile
                raise self._unknown_adapter(adapter) from error
            raise Refused("bad_audio", 422, str(error)) from error

    async def _embedded(self, waves: Sequence[NDArray], adapter: str | None) -> Voice:
        """Utterances through one adapter."""
        found = await _together([self._answer(wave, adapter) for wave in waves])
        weights = {each.weights for each in found}
        if len(weights) > 1:
            raise Refused("adapter_changed", 409, f"The adapter {adapter!r} was replaced meanwhile: ask again.")
        seconds = [len(wave) / SAMPLING_RATE for wave in waves]
        speech = await self._speech(waves)
        return Voice(np.stack([each.numbers for each in found]), seconds, speech, adapter, weights.pop())

    async def _speech(self, waves: Sequence[NDArray]) -> list[float]:
        """Seconds of speech of each."""
        return await _together([self._in_thread(partial(speech_seconds, wave)) for wave in waves])

    def _units(self, embeddings: NDArray, dim: int) -> NDArray:
        return self._scorer.units(embeddings, dim)

    def _rule(self, space: Space, counts: Sequence[int], threshold: float | None, speakers: int = 1) -> DecisionRule:
        domain = self.encoder.adapter if space.adapter is None else space.adapter  # a merged one's, as none is in use
        if space.adapter in self.adapters and (facts := self.encoder.adapters.facts(space.adapter)) is not None:
            domain = facts.domain  # thresholds are saved by it
        try:
            return DecisionRule.of(
                self._thresholds, space.dim, domain, self._scorer, space.weights, counts, given=threshold,
                speakers=speakers,
            )  # fmt: skip
        except ValueError as error:
            raise Refused("no_threshold", 409, f"{error}. Or give `threshold`.") from error

    def _versions(self, space: Space, rule: DecisionRule) -> dict[str, Any]:
        return {
            "adapter": space.adapter,
            "dim": space.dim,
            "weights": space.weights,
            "rule": str(rule),
            "service": self._version,
        }

    async def _decided(self, kind: str, speaker: str | None, space: Space, decision: Decision) -> None:
        if self.on_decision is not None:
            self.on_decision(kind, decision.accepted)
        if self._log:
            entry = Logged(
                kind, speaker, space, decision.score, decision.threshold, decision.llr, decision.accepted, self._version
            )
            await self._store(lambda store: store.log(entry))

    def _need_store(self) -> SpeakerStore:
        if self.store is None:
            raise Refused("no_store", 409, "This service keeps no speakers: it was started without a store.")
        return self.store

    async def _store(self, ask: Callable[[SpeakerStore], Result]) -> Result:
        store = self._need_store()
        try:
            return await self._in_thread(partial(ask, store), self._stored)
        except UnknownSpeakerError as error:
            raise Refused("unknown_speaker", 404, str(error)) from error
        except StoreError as error:
            raise Refused("store_failed", 503, str(error)) from error
        except ValueError as error:
            raise Refused("bad_request", 422, str(error)) from error

    async def _in_thread(self, call: Callable[[], Result], pool: ThreadPoolExecutor | None = None) -> Result:
        return await asyncio.get_running_loop().run_in_executor(pool or self._threads, call)


async def _together(work: Sequence[Awaitable[Result]]) -> list[Result]:
    """The results of all; the first that fails cancels the others."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _notes(heard: Voice) -> list[str]:
    """On a test utterance, the first of what was heard."""
    return short_speech("test utterances", [("test", heard.speech[0])], TEST_SECONDS)


def _decision(decision: Decision) -> dict[str, Any]:
    return {
        "score": decision.score,
        "accepted": decision.accepted,
        "threshold": decision.threshold,
        "llr": decision.llr,
    }


def _enrolled(found: Enrolled) -> dict[str, Any]:
    space = found.space
    return {
        "speaker": found.speaker,
        "utterances": found.utterances,
        "seconds": found.seconds,
        "consent": found.consent,
        "created": found.created,
        "updated": found.updated,
        "adapter": space.adapter,
        "dim": space.dim,
        "weights": space.weights,
    }


def _named(space: Space) -> str:
    return f"{f'the adapter {space.adapter}' if space.adapter else 'no adapter'} and {space.dim} dimensions"
