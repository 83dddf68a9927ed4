"""Who among many enrolled speakers is speaking: a shortlist by the first few numbers, re-ranked by all of them.

A Matryoshka embedding is its own coarse version. A scan of every speaker compares short prefixes (cut, then
normalised), stored in few bytes; the speakers nearest by prefix are compared again by the cosine of the whole embedding
("adaptive retrieval" of Kusupati et al., "Matryoshka Representation Learning", 2022, section 4.3). The scans are those
of Faiss (Douze et al., "The Faiss library", 2024), which compare with every speaker: what is lost is lost by the
prefix, not by a graph. benchmarks/search_at_size.py measures what the choices here cost and bring.
"""

import json
import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mrl_redimnet.extras import extra
from mrl_redimnet.files import recover_folder, replace_folder

with extra("search"):
    import faiss

_FORMAT = 1  # of saved folders
_DESCRIPTION = "index.json"
_BLOCK = 1 << 16  # rows that are worked on at a time: bounds memory beyond what is stored


class SpeakerIndex:
    """Enrolled speakers, each with a name and an embedding, and the search for those nearest to a query.

    An index is a function of what is enrolled, whatever the order and however many calls it took: speakers are kept
    sorted by name, and equal scores are listed in that order. Hence `add` and `remove` build the shortlist's codes
    anew, in a time that grows with all speakers: enrol many at a time.

    Of several utterances of a speaker give the average of their length-normalised embeddings
    (`mrl_redimnet.scoring.scorers.speaker_means`). Whether the nearest speaker is the one who speaks is a question of
    the score and the caller's threshold.

    Threads searching one index do not disturb each other, as long as none adds or removes. The scan of a batch of
    queries uses as many threads as `faiss.omp_set_num_threads` allows (not torch's number); in a process forked after
    a search with several threads it hangs, as OpenMP does: fork before, or spawn.

    Args:
        names: N distinct names.
        embeddings: [N, D] whole embeddings of any length.
        short: numbers of the prefix that makes the shortlist, at most D; a multiple of 8 for "binary".
        storage: of the prefixes, one of STORAGES: "float32" (4 bytes a number), "int8" (1 byte; ranks almost as
            float32 does) or "binary" (a bit; wants a prefix and a shortlist several times as long).
        full: of the whole embeddings, one of FULL_STORAGES: "float32", "float16", or "int8" (scaled by speaker).

    Raises:
        ValueError: names that are not distinct, non-empty strings, an embedding that is zero (also in its first
            `short` numbers) or not finite, shapes that do not fit, or an unknown storage.
    """

    def __init__(
        self, names: Sequence[str], embeddings: ArrayLike, short: int = 64, storage: str = "int8", full: str = "float32"
    ) -> None:
        embeddings = _matrix(embeddings, "embeddings")
        _check_options(embeddings.shape[1], short, storage, full)
        self.short, self.storage, self.full = operator.index(short), storage, full
        names = _checked_names(names, len(embeddings))
        order = sorted(range(len(names)), key=names.__getitem__)
        stored = np.empty(embeddings.shape, dtype=full)
        for start in range(0, len(order), _BLOCK):
            rows = order[start : start + _BLOCK]
            stored[start : start + _BLOCK] = _encoded(
                _units(embeddings[rows], short, [names[row] for row in rows]), full
            )
        self._build([names[row] for row in order], stored)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def names(self) -> list[str]:
        """The enrolled names, sorted."""
        return list(self._names)

    @property
    def dimensions(self) -> int:
        """Numbers of a whole embedding."""
        return self._embeddings.shape[1]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each part, of all speakers together; with `memory_map` the embeddings are on disk."""
        names = self._names.__sizeof__() + sum(name.__sizeof__() for name in self._names)
        return {"shortlist": self._shortlist.codes.nbytes, "embeddings": self._embeddings.nbytes, "names": names}

    @property
    def bytes_per_speaker(self) -> float:
        """All of `sizes`, for one speaker."""
        return sum(self.sizes.values()) / len(self)

    def search(self, queries: ArrayLike, k: int = 5, shortlist: int = 200) -> tuple[list[list[str]], NDArray]:
        """The k enrolled speakers of the highest cosine to each query, among the `shortlist` nearest by prefix.

        Args:
            queries: [Q, D] whole embeddings of any length.
            k: speakers per query, 1 to the number enrolled.
            shortlist: speakers compared by the whole embedding, at least k; all of them where it is no less than the
                number enrolled, which makes the search exhaustive.

        Returns:
            names, Q lists of k, best first, equal scores by name, and cosines [Q, k] float32 of the whole embeddings as
            stored.

        Raises:
            ValueError: k or shortlist out of range, queries of another width, zero or not finite.
        """
        if not 1 <= k <= len(self):
            raise ValueError(f"k: got {k}, expected 1 to the {len(self)} enrolled speakers.")
        if shortlist < k:
            raise ValueError(f"shortlist: got {shortlist}, expected at least k={k}.")
        queries = self._checked_rows(queries, "queries")
        queries = _units(queries, self.short, [f"query {row}" for row in range(len(queries))])
        if shortlist < len(self):
            # in the order of names, for ties; and memory is then read forwards
            candidates = np.sort(self._shortlist.nearest(_prefixes(queries, self.short), shortlist), axis=1)
        else:
            candidates = np.broadcast_to(np.arange(len(self)), (len(queries), len(self)))
        names, scores = [], np.empty((len(queries), k), dtype=np.float32)
        for query, rows, best_scores in zip(queries, candidates, scores, strict=True):
            cosines = self._cosines(rows, query)
            best = np.argsort(-cosines, kind="stable")[:k]
            best_scores[:] = cosines[best]
            names.append([self._names[row] for row in rows[best]])
        return names, scores

    def add(self, names: Sequence[str], embeddings: ArrayLike) -> None:
        """Enrols more speakers; on an error none. Arguments and errors as for the class; no name may be there yet."""
        embeddings = self._checked_rows(embeddings, "embeddings")
        names = _checked_names(names, len(embeddings))
        present = sorted(set(names) & set(self._names))
        if present:
            raise ValueError(f"{len(present)} names are enrolled already, first {present[0]!r}: remove them before.")
        new = _encoded(_units(embeddings, self.short, names), self.full)
        together = [*self._names, *names]
        order = sorted(range(len(together)), key=together.__getitem__)
        place = np.empty(len(order), dtype=np.int64)  # of each speaker in the new order
        place[order] = np.arange(len(order))
        stored = np.empty((len(order), self.dimensions), dtype=self.full)
        stored[place[: len(self)]] = self._embeddings
        stored[place[len(self) :]] = new
        self._build([together[row] for row in order], stored)

    def remove(self, names: Iterable[str]) -> None:
        """Forgets speakers. Raises ValueError for a name that is not enrolled, or when none would be left."""
        if isinstance(names, str):
            raise ValueError(f"names: got the string {names!r}, expected a list of names.")
        gone = set(names)
        unknown = sorted(gone.difference(self._names))
        if unknown:
            raise ValueError(f"{len(unknown)} names are not enrolled, first {unknown[0]!r}.")
        kept = [row for row, name in enumerate(self._names) if name not in gone]
        if not kept:
            raise ValueError("An index needs at least one speaker; these names are all of them.")
        self._build([self._names[row] for row in kept], self._embeddings[kept])

    def save(self, folder: str | Path) -> None:
        """Writes the index as a folder of JSON and .npy files, whole or not at all, in place of an older index.

        Raises FileExistsError where `folder` is something else than a saved index.
        """
        folder = Path(folder)
        recover_folder(folder)
        if folder.exists() and not (folder / _DESCRIPTION).is_file():
            raise FileExistsError(f"{folder} exists and is no saved index: give a new folder, or remove it.")
        replace_folder(folder, self._write)

    @classmethod
    def load(cls, folder: str | Path, memory_map: bool = False) -> Self:
        """The index that `save` wrote.

        memory_map: leave the whole embeddings on disk, of which a search reads those on the shortlist.

        Raises FileNotFoundError where `folder` is no saved index, ValueError where its files do not fit together.
        """
        folder = Path(folder)
        recover_folder(folder)
        if not (folder / _DESCRIPTION).is_file():
            raise FileNotFoundError(
                f"{folder} is no saved index: it has no {_DESCRIPTION}. `SpeakerIndex.save` makes one."
            )
        try:
            return cls._read(folder, memory_map)
        except (ValueError, KeyError, TypeError, EOFError, FileNotFoundError) as error:
            raise ValueError(f"{folder} is no index that can be read, save it again: {error}") from error

    def _build(self, names: list[str], embeddings: NDArray) -> None:
        """Takes over names, sorted, and their stored embeddings [N, D], and makes the codes of the shortlist."""
        prefixes = np.empty((len(names), self.short), dtype=np.float32)
        for start in range(0, len(names), _BLOCK):
            # from what is stored, so that adding to a loaded index gives the codes that building it whole would
            rows = embeddings[start : start + _BLOCK, : self.short].astype(np.float32)
            prefixes[start : start + _BLOCK] = _prefixes(rows, self.short)
        shortlist = STORAGES[self.storage](self.short, prefixes.mean(axis=0, dtype=np.float64))
        shortlist.add(prefixes)
        self._names, self._embeddings, self._shortlist = names, embeddings, shortlist

    def _cosines(self, rows: NDArray, query: NDArray) -> NDArray:
        """Cosines [N] float32 of the enrolled `rows` [N] with a unit vector [D].

        Each by a dot product of its own, which a matrix product is not: there the rounding of a row depends on its
        place, and equal embeddings would not tie.
        """
        cosines = np.empty(len(rows), dtype=np.float32)
        for start in range(0, len(rows), _BLOCK):
            block = self._embeddings[rows[start : start + _BLOCK]].astype(np.float32, copy=False)
            cosines[start : start + _BLOCK] = np.vecdot(block, query) / np.sqrt(np.vecdot(block, block))
        return cosines.clip(-1.0, 1.0, out=cosines)

    def _checked_rows(self, rows: ArrayLike, what: str) -> NDArray:
        rows = _matrix(rows, what)
        if rows.shape[1] != self.dimensions:
            raise ValueError(
                f"{what}: got {rows.shape[1]} numbers each, the index has embeddings of {self.dimensions}: "
                "give whole embeddings of the same model."
            )
        return rows

    def _write(self, folder: Path) -> None:
        description = {
            "format": _FORMAT,
            "speakers": len(self),
            "dimensions": self.dimensions,
            "short": self.short,
            "storage": self.storage,
            "full": self.full,
            "mean": self._shortlist.mean.tolist(),
        }
        np.save(folder / "embeddings.npy", self._embeddings)
        np.save(folder / "shortlist.npy", self._shortlist.codes)
        (folder / "names.json").write_text(json.dumps(self._names), encoding="utf-8")
        (folder / _DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def _read(cls, folder: Path, memory_map: bool) -> Self:
        description = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        if description["format"] != _FORMAT:
            raise ValueError(f"its format is {description['format']}, expected {_FORMAT}")
        index: Self = cls.__new__(cls)
        index.short, index.storage, index.full = (description[key] for key in ("short", "storage", "full"))
        shape = (description["speakers"], description["dimensions"])
        _check_options(shape[1], index.short, index.storage, index.full)
        names = _checked_names(json.loads((folder / "names.json").read_text(encoding="utf-8")), shape[0])
        if names != sorted(names):
            raise ValueError("names.json is not sorted")
        embeddings = np.asarray(np.load(folder / "embeddings.npy", mmap_mode="r" if memory_map else None))
        if embeddings.shape != shape or embeddings.dtype != index.full:
            raise ValueError(
                f"embeddings.npy holds {embeddings.dtype} {embeddings.shape}, expected {index.full} {shape}"
            )
        mean = np.array(description["mean"], dtype=np.float64)
        if mean.shape != (index.short,):
            raise ValueError(f"the mean has shape {mean.shape}, expected ({index.short},)")
        shortlist = STORAGES[index.storage](index.short, mean)
        shortlist.add_codes(np.load(folder / "shortlist.npy"), shape[0])
        index._names, index._embeddings, index._shortlist = names, embeddings, shortlist
        return index


# ---------------------------------------------------------------- how prefixes are stored and scanned


class Shortlist(Protocol):
    """Codes of unit prefixes [N, short] and the scan over them; built with the mean of the prefixes [short] float64."""

    mean: NDArray

    def __init__(self, short: int, mean: NDArray) -> None: ...

    def add(self, prefixes: NDArray) -> None:
        """Encodes unit prefixes [N, short] float32; called once."""

    def add_codes(self, codes: NDArray, count: int) -> None:
        """Takes what `codes` of another one gave, of `count` prefixes; ValueError where it cannot be that."""

    def nearest(self, prefixes: NDArray, count: int) -> NDArray:
        """Rows [Q, count] of the codes nearest to unit prefixes [Q, short] float32, in any order."""

    @property
    def codes(self) -> NDArray:
        """[N, bytes] uint8."""


class Float32Shortlist:
    """Prefixes as they are, by inner product."""

    def __init__(self, short: int, mean: NDArray) -> None:
        self.mean, self._index = mean, faiss.IndexFlatIP(short)

    def add(self, prefixes: NDArray) -> None:
        """Copies the prefixes into the index."""
        self._index.add(prefixes)

    def add_codes(self, codes: NDArray, count: int) -> None:
        """Takes the bytes of `count` encoded prefixes; ValueError for another type or shape."""
        self._index.add_sa_codes(_checked_codes(codes, count, self._index.sa_code_size()))

    def nearest(self, prefixes: NDArray, count: int) -> NDArray:
        """Rows [Q, count] of the prefixes with the largest inner products, the largest first."""
        return self._index.search(prefixes, count)[1]

    @property
    def codes(self) -> NDArray:
        """[N, bytes] uint8, the index's own memory."""
        return _view(self._index.codes, self._index.ntotal)


class Int8Shortlist(Float32Shortlist):
    """Each number, of the query too, in whole 127ths; by inner product."""

    def __init__(self, short: int, mean: NDArray) -> None:
        self.mean = mean
        kind = faiss.ScalarQuantizer.QT_8bit_direct_signed  # takes numbers from -128 to 127, and cuts fractions off
        self._index = faiss.IndexScalarQuantizer(short, kind, faiss.METRIC_INNER_PRODUCT)

    def add(self, prefixes: NDArray) -> None:
        """Rounds the prefixes to 127ths."""
        self._index.add(np.rint(127 * prefixes))

    def nearest(self, prefixes: NDArray, count: int) -> NDArray:
        """As `Float32Shortlist.nearest`, with the query in 127ths, too."""
        # Rounded here: for some widths (multiples of 32 with AVX-512) Faiss cuts the fractions of a query off, which
        # leaves nothing of a unit vector; for others it does not.
        return self._index.search(np.rint(127 * prefixes), count)[1]


class BinaryShortlist:
    """The signs of the centred prefix in a random orthogonal basis, by the number of signs that differ.

    Centring: where all embeddings share a direction, its sign tells nobody apart. Rotation: signs weigh all alike, but
    the numbers of a principal basis do not; a random basis spreads what they hold over all signs (Gong, Lazebnik,
    "Iterative quantization", 2011, the baseline PCA-RR).
    """

    def __init__(self, short: int, mean: NDArray) -> None:
        self.mean, self._index = mean, faiss.IndexBinaryFlat(short)
        basis, triangle = np.linalg.qr(np.random.default_rng(0).standard_normal((short, short)))
        self._basis = (basis * np.sign(np.diag(triangle))).astype(np.float32)  # this sign makes it unique

    def add(self, prefixes: NDArray) -> None:
        """Keeps the signs of the prefixes."""
        self._index.add(self.signs(prefixes))

    def add_codes(self, codes: NDArray, count: int) -> None:
        """Takes the signs of `count` prefixes; ValueError for another type or shape."""
        self._index.add(_checked_codes(codes, count, self._index.code_size))

    def nearest(self, prefixes: NDArray, count: int) -> NDArray:
        """Rows [Q, count] of the prefixes with the fewest signs that differ, the fewest first."""
        return self._index.search(self.signs(prefixes), count)[1]

    @property
    def codes(self) -> NDArray:
        """[N, short / 8] uint8, the index's own memory."""
        return _view(self._index.xb, self._index.ntotal)

    def signs(self, prefixes: NDArray) -> NDArray:
        """prefixes [N, short] -> codes [N, short / 8] uint8, one bit a sign."""
        return np.packbits((prefixes - self.mean.astype(np.float32)) @ self._basis > 0, axis=1)


def _view(codes: Any, count: int) -> NDArray:
    """A Faiss index's codes [count, bytes] uint8 where they lie: for use while the index lives."""
    return faiss.rev_swig_ptr(codes.data(), codes.size()).reshape(count, -1)


STORAGES: dict[str, type[Shortlist]] = {"float32": Float32Shortlist, "int8": Int8Shortlist, "binary": BinaryShortlist}
FULL_STORAGES = ("float32", "float16", "int8")


def _encoded(units: NDArray, full: str) -> NDArray:
    """Unit vectors [N, D] as they are stored; int8 on a scale of each row's own, which its cosines do not see."""
    if full == "int8":
        return np.rint(units * (127 / np.abs(units).max(axis=1, keepdims=True))).astype(np.int8)
    return units.astype(full)


def _prefixes(vectors: NDArray, short: int) -> NDArray:
    """The first `short` numbers of [N, D] float32, normalised; zero where coarse storage has left nothing of them."""
    prefixes = vectors[:, :short]
    norms = np.sqrt(np.vecdot(prefixes, prefixes))[:, None]
    return np.ascontiguousarray(prefixes / np.maximum(norms, np.finfo(np.float32).tiny))


# ---------------------------------------------------------------- what comes in


def _check_options(dimensions: int, short: int, storage: str, full: str) -> None:
    for option, value, known in (("storage", storage, STORAGES), ("full", full, FULL_STORAGES)):
        if value not in known:
            raise ValueError(f"{option}: got {value!r}, expected one of {', '.join(known)}.")
    if not 1 <= short <= dimensions:
        raise ValueError(f"short: got {short}, expected 1 to the embeddings' {dimensions} numbers.")
    if storage == "binary" and short % 8:
        raise ValueError(f"short: got {short}, expected a multiple of 8 for binary storage.")


def _checked_names(names: Sequence[str], count: int) -> list[str]:
    listed = [] if isinstance(names, str) else list(names)
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in listed):
        raise ValueError("names: expected a list of non-empty strings.")
    names = [str(name) for name in listed]  # also numpy's strings, which are larger
    if len(names) != count or not names:
        raise ValueError(f"names: got {len(names)} for {count} embeddings, expected one each and at least one.")
    if len(set(names)) != len(names):
        first = {name: row for row, name in reversed([*enumerate(names)])}
        twice = next(name for row, name in enumerate(names) if row > first[name])
        raise ValueError(
            f"names: {len(names) - len(set(names))} come again, first {twice!r}. Average a speaker's embeddings "
            "before (`mrl_redimnet.scoring.scorers.speaker_means`)."
        )
    return names


def _matrix(rows: ArrayLike, what: str) -> NDArray:
    rows = np.asarray(rows)
    if rows.ndim != 2 or rows.dtype.kind not in "fiu":
        raise ValueError(f"{what}: expected numbers [N, D], got {rows.dtype} of shape {rows.shape}.")
    return rows


def _units(rows: NDArray, short: int, names: Sequence[str]) -> NDArray:
    """Rows [N, D] divided by their norms, float32; ValueError naming the first that is zero or not finite."""
    rows = rows.astype(np.float64)  # squares of small numbers vanish in float32
    norms = np.linalg.norm(rows, axis=1)
    for what, wrong in (
        ("not finite", ~np.isfinite(norms)),
        (f"zero in the first {short} numbers", ~np.any(rows[:, :short], axis=1)),
    ):
        if wrong.any():
            first = int(np.argmax(wrong))
            raise ValueError(f"{np.count_nonzero(wrong)} of {len(rows)} embeddings are {what}, first {names[first]!r}.")
    return (rows / norms[:, None]).astype(np.float32)


def _checked_codes(codes: NDArray, count: int, width: int) -> NDArray:
    if codes.dtype != np.uint8 or codes.shape != (count, width):
        raise ValueError(f"shortlist.npy holds {codes.dtype} {codes.shape}, expected uint8 {(count, width)}")
    return codes
