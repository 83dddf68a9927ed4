"""Search among enrolled speakers: a short list by prefix, re-ranked by the whole embedding."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mrl_redimnet.extraction.search import FULL_STORAGES, STORAGES, BinaryShortlist, SpeakerIndex
from mrl_redimnet.scoring.scorers import speaker_means

DIM = 32


def speakers(count: int, seed: int = 0, dim: int = DIM) -> tuple[list[str], np.ndarray]:
    """Names, not in alphabetical order, and embeddings with falling energy and a common direction, as models give."""
    rng = np.random.default_rng(seed)
    energies = 0.9 ** np.arange(dim)
    names = [f"s{number}" for number in rng.permutation(10 * count)[:count]]
    return names, (rng.standard_normal((count, dim)) * energies + 0.5 * energies).astype(np.float32) * 3


def oracle(names, embeddings, query) -> list[tuple[float, str]]:
    """All speakers as (cosine, name), best first, equal cosines by name; one by one, in float64."""
    query = np.asarray(query, dtype=np.float64)
    cosines = [float(np.dot(e, query) / np.linalg.norm(e) / np.linalg.norm(query)) for e in embeddings.astype(float)]
    return sorted(zip(cosines, names, strict=True), key=lambda pair: (-pair[0], pair[1]))


def assert_same(first: SpeakerIndex, second: SpeakerIndex, queries: np.ndarray, **options):
    """Both indices give the same names and, to the last bit, the same scores."""
    (names, scores), (other_names, other_scores) = first.search(queries, **options), second.search(queries, **options)
    assert names == other_names
    np.testing.assert_array_equal(scores, other_scores)


any_storage = pytest.mark.parametrize("storage", STORAGES)
any_full = pytest.mark.parametrize("full", FULL_STORAGES)
kinds = dict(storage=st.sampled_from(list(STORAGES)), full=st.sampled_from(FULL_STORAGES))


# ---------------------------------------------------------------- what is found


@given(seed=st.integers(0, 999), count=st.integers(1, 60), storage=kinds["storage"], data=st.data())
def test_a_shortlist_of_all_is_exhaustive_search(seed, count, storage, data):
    names, embeddings = speakers(count, seed)
    queries = speakers(4, seed + 1)[1]
    k = data.draw(st.integers(1, count))
    found, scores = SpeakerIndex(names, embeddings, short=8, storage=storage).search(queries, k, shortlist=count)
    assert scores.shape == (4, k) and scores.dtype == np.float32
    for query, row, cosines in zip(queries, found, scores, strict=True):
        expected = oracle(names, embeddings, query)[:k]
        assert row == [name for _, name in expected]
        np.testing.assert_allclose(cosines, [cosine for cosine, _ in expected], atol=1e-6)


@any_storage
def test_scores_are_cosines_of_whole_embeddings_whatever_the_shortlist(storage):
    names, embeddings = speakers(500)
    queries = speakers(3, 1)[1]
    found, scores = SpeakerIndex(names, embeddings, short=8, storage=storage).search(queries, k=5, shortlist=20)
    for query, row, cosines in zip(queries, found, scores, strict=True):
        of = {name: cosine for cosine, name in oracle(names, embeddings, query)}
        np.testing.assert_allclose(cosines, [of[name] for name in row], atol=1e-6)
        assert sorted(cosines, reverse=True) == list(cosines)


@any_storage
def test_the_shortlist_is_that_of_the_prefix(storage):
    """Speakers who share the query's prefix are listed before those who share only the rest of it."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal(DIM) * np.repeat([1, 3], DIM // 2)
    embeddings = rng.standard_normal((100, DIM))
    embeddings[:5, :16] = query[:16]
    embeddings[5:, 16:] = 3 * query[16:]  # nearer by the whole embedding
    names = [f"prefix{row}" if row < 5 else f"rest{row}" for row in range(100)]
    index = SpeakerIndex(names, embeddings, short=16, storage=storage)
    assert sorted(index.search(query[None], k=5, shortlist=5)[0][0]) == [f"prefix{row}" for row in range(5)]
    assert all(name.startswith("rest") for name in index.search(query[None], k=5, shortlist=100)[0][0])


@any_storage
def test_recall_grows_with_the_shortlist(storage):
    names, embeddings = speakers(2000)
    queries = embeddings[:100] + 0.3 * speakers(100, 1)[1]
    index = SpeakerIndex(names, embeddings, short=16, storage=storage)
    best = [set(row) for row in index.search(queries, k=10, shortlist=2000)[0]]
    recalls = []
    for shortlist in (10, 50, 300, 2000):
        found = index.search(queries, k=10, shortlist=shortlist)[0]
        recalls.append(np.mean([len(best[row] & set(found[row])) / 10 for row in range(100)]))
    assert recalls == sorted(recalls) and recalls[0] < 0.9 and recalls[2] > recalls[0] and recalls[3] == 1.0


def coarse_scores(storage: str, prefixes: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """What a scan of unit prefixes [N, short] by unit queries [Q, short] ranks by, [Q, N], higher is nearer."""
    if storage == "binary":
        signs = BinaryShortlist(prefixes.shape[1], prefixes.mean(axis=0, dtype=np.float64)).signs
        bits, asked = (np.unpackbits(signs(some), axis=1).astype(int) for some in (prefixes, queries))
        return -np.abs(asked[:, None] - bits).sum(axis=2)
    if storage == "int8":
        prefixes, queries = np.rint(127 * prefixes), np.rint(127 * queries)
    return queries.astype(np.float64) @ prefixes.T.astype(np.float64)


@any_storage
@pytest.mark.parametrize("short", [8, 16, 24, 32, 40, 64, 96, 128, 256])
def test_a_scan_finds_the_nearest_codes_at_every_width(storage, short):
    """Faiss has kernels of its own for some widths: for int8, on some processors, for multiples of 32."""
    rng = np.random.default_rng(short)
    prefixes, queries = (rng.standard_normal((count, short)).astype(np.float32) for count in (400, 25))
    for some in (prefixes, queries):
        some /= np.linalg.norm(some, axis=1, keepdims=True)
    scan = STORAGES[storage](short, prefixes.mean(axis=0, dtype=np.float64))
    scan.add(prefixes)
    scores = coarse_scores(storage, prefixes, queries)
    found = np.take_along_axis(scores, scan.nearest(queries, 20), axis=1)
    best = np.sort(scores, axis=1)[:, :-21:-1]
    np.testing.assert_allclose(-np.sort(-found, axis=1), best, rtol=1e-4, atol=1e-6)  # scores: rows may tie


@any_storage
def test_the_default_prefix_finds_the_speakers(storage):
    names, embeddings = speakers(1000, dim=256)
    queries = embeddings[:100] + 0.2 * speakers(100, 1, dim=256)[1]
    found = SpeakerIndex(names, embeddings, storage=storage).search(queries, k=1, shortlist=20)[0]
    assert [row[0] for row in found] == names[:100]


def test_more_numbers_recall_more_and_int8_nearly_what_float32_does():
    names, embeddings = speakers(2000)
    queries = embeddings[:100] + 0.3 * speakers(100, 1)[1]
    best = SpeakerIndex(names, embeddings, short=8).search(queries, k=10, shortlist=2000)[0]

    def recall(short: int, storage: str) -> float:
        found = SpeakerIndex(names, embeddings, short, storage).search(queries, k=10, shortlist=15)[0]
        return np.mean([len(set(some) & set(all_best)) / 10 for some, all_best in zip(found, best, strict=True)])

    for storage in STORAGES:
        assert recall(8, storage) < recall(16, storage) < recall(24, storage)
    for short in (16, 32):
        assert abs(recall(short, "int8") - recall(short, "float32")) < 0.01


@given(seed=st.integers(0, 999), scale=st.floats(1e-20, 1e20), storage=kinds["storage"])
def test_the_scale_of_queries_and_of_embeddings_does_not_matter(seed, scale, storage):
    names, embeddings = speakers(80, seed)
    queries = speakers(4, seed + 1)[1]
    index = SpeakerIndex(names, embeddings, short=16, storage=storage)
    found, scores = index.search(queries, k=3, shortlist=30)
    for other, asked in (
        (index, queries * np.float64(scale)),
        (SpeakerIndex(names, embeddings * np.float64(scale), 16, storage), queries),
    ):
        again, scores_again = other.search(asked, k=3, shortlist=30)
        assert again == found
        np.testing.assert_allclose(scores_again, scores, atol=1e-6)


@any_full
def test_coarser_embeddings_score_nearly_the_same(full):
    names, embeddings = speakers(300)
    queries = speakers(5, 1)[1]
    scores = SpeakerIndex(names, embeddings, short=16, full=full).search(queries, k=5, shortlist=300)[1]
    exact = SpeakerIndex(names, embeddings, short=16).search(queries, k=5, shortlist=300)[1]
    tolerance = {"float32": 1e-6, "float16": 1e-3, "int8": 2e-2}[full]
    np.testing.assert_allclose(scores, exact, atol=tolerance)
    assert full == "float32" or np.abs(scores - exact).max() > 1e-6  # it is stored as it says


@any_storage
def test_equal_scores_are_listed_by_name(storage):
    rng = np.random.default_rng(0)
    of = rng.integers(3, size=600)  # only three different embeddings
    embeddings, names = speakers(3)[1][of], [f"s{number:03d}" for number in rng.permutation(600)]
    query = speakers(1, 1)[1]
    found, scores = SpeakerIndex(names, embeddings, short=8, storage=storage).search(query, k=600, shortlist=600)
    score_of = dict(zip(found[0], scores[0].tolist(), strict=True))
    assert len(set(score_of.values())) == 3
    assert found[0] == sorted(names, key=lambda name: (-score_of[name], name))


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_prefixes_are_normalised_after_the_cut(storage):
    """A prefix that points where the query's does is nearer than one that is ten times as long and points aside."""
    along, aside = np.eye(DIM)[0], np.eye(DIM)[0] + np.eye(DIM)[1]
    rest = np.eye(DIM)[20]
    index = SpeakerIndex(["along", "aside"], np.stack([0.1 * along + rest, aside + rest]), 8, storage)
    assert index.search((along + rest)[None], k=1, shortlist=1)[0] == [["along"]]


@any_storage
def test_an_embedding_finds_itself_at_cosine_one(storage):
    names, embeddings = speakers(300)
    found, scores = SpeakerIndex(names, embeddings, short=16, storage=storage).search(embeddings, k=1, shortlist=5)
    assert [row[0] for row in found] == names
    np.testing.assert_allclose(scores, 1.0, atol=1e-6)
    assert scores.max() <= 1.0


def test_binary_codes_do_not_see_what_all_speakers_share(tmp_path):
    names, embeddings = speakers(400)
    queries = embeddings + 0.2 * speakers(400, 1)[1]
    shift = 20 * np.eye(DIM)[0]  # most of the energy of all embeddings is one direction
    rates = []
    for moved in (0.0, shift):
        index = SpeakerIndex(names, embeddings + moved, short=32, storage="binary")
        index.save(tmp_path / "index")
        codes = np.unpackbits(np.load(tmp_path / "index/shortlist.npy"), axis=1)
        assert np.abs(codes.mean(axis=0) - 0.5).max() < 0.2  # each sign tells something
        found = index.search(queries + moved, k=1, shortlist=20)[0]
        rates.append(np.mean([row == [name] for row, name in zip(found, names, strict=True)]))
    assert min(rates) > 0.9


# ---------------------------------------------------------------- what an index is a function of


@given(seed=st.integers(0, 999), cut=st.integers(1, 119), **kinds)
def test_order_and_way_of_enrolment_do_not_matter(seed, cut, storage, full):
    names, embeddings = speakers(120, seed)
    queries = speakers(6, seed + 1)[1]
    whole = SpeakerIndex(names, embeddings, 8, storage, full)
    order = np.random.default_rng(seed).permutation(120)
    shuffled = SpeakerIndex([names[row] for row in order], embeddings[order], 8, storage, full)
    assert_same(whole, shuffled, queries, k=5, shortlist=11)
    grown = SpeakerIndex(names[:cut], embeddings[:cut], 8, storage, full)
    grown.add(names[cut:], embeddings[cut:])
    assert_same(whole, grown, queries, k=5, shortlist=11)
    others = speakers(30, seed + 2)[1]
    grown.add([f"x{row}" for row in range(30)], others)
    grown.remove(f"x{row}" for row in range(30))
    assert_same(whole, grown, queries, k=5, shortlist=11)
    assert grown.names == sorted(names) and len(grown) == 120


def test_blocks_do_not_show(monkeypatch):
    names, embeddings = speakers(100)
    queries = speakers(3, 1)[1]
    whole = SpeakerIndex(names, embeddings, 16)
    whole_answer = whole.search(queries, k=9, shortlist=60)
    monkeypatch.setattr("mrl_redimnet.extraction.search._BLOCK", 7)
    answer = SpeakerIndex(names, embeddings, 16).search(queries, k=9, shortlist=60)
    assert answer[0] == whole_answer[0]
    np.testing.assert_array_equal(answer[1], whole_answer[1])


@any_storage
def test_batches_and_threads_do_not_matter(storage):
    names, embeddings = speakers(3000)
    queries = speakers(64, 1)[1]
    index = SpeakerIndex(names, embeddings, 16, storage)
    found, scores = index.search(queries, k=5, shortlist=50)
    before = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(2)
        torch.randn(200, 200) @ torch.randn(200, 200)  # its OpenMP beside that of Faiss
        assert index.search(queries, k=5, shortlist=50)[0] == found
    finally:
        faiss.omp_set_num_threads(before)
    with ThreadPoolExecutor(2) as pool:
        alone = list(pool.map(lambda row: index.search(queries[row : row + 1], k=5, shortlist=50), range(64)))
    assert [names[0] for names, _ in alone] == found
    np.testing.assert_allclose(np.concatenate([score for _, score in alone]), scores, atol=1e-6)


# ---------------------------------------------------------------- folders


@any_full
@any_storage
@pytest.mark.parametrize("memory_map", [False, True])
def test_a_saved_index_answers_as_before(tmp_path, storage, full, memory_map):
    names, embeddings = speakers(200)
    queries = speakers(6, 1)[1]
    index = SpeakerIndex(names, embeddings, 16, storage, full)
    index.save(tmp_path / "new" / "index")
    loaded = SpeakerIndex.load(tmp_path / "new" / "index", memory_map)
    assert (loaded.names, loaded.short, loaded.storage, loaded.full) == (sorted(names), 16, storage, full)
    assert (len(loaded), loaded.dimensions, loaded.sizes) == (200, DIM, index.sizes)
    assert_same(index, loaded, queries, k=5, shortlist=20)
    more = speakers(50, 2)[1]
    for each in (index, loaded):
        each.add([f"x{row}" for row in range(50)], more)
        each.remove(names[:9])
    assert_same(index, loaded, queries, k=5, shortlist=20)
    loaded.save(tmp_path / "new" / "index")  # also over the files that it reads from
    assert_same(index, SpeakerIndex.load(tmp_path / "new" / "index"), queries, k=5, shortlist=20)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["index"]


def test_an_index_is_not_saved_over_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    index = SpeakerIndex(*speakers(10), short=8)
    for target in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(FileExistsError, match="no saved index"):
            index.save(target)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_save_that_fails_leaves_the_old_index(tmp_path, monkeypatch):
    index = SpeakerIndex(*speakers(10), short=8)
    index.save(tmp_path / "index")

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("mrl_redimnet.extraction.search.np.save", full_disk)
    with pytest.raises(OSError, match="No space"):
        SpeakerIndex(*speakers(20), short=8).save(tmp_path / "index")
    assert len(SpeakerIndex.load(tmp_path / "index")) == 10


def test_folders_that_are_no_index_are_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="no saved index"):
            SpeakerIndex.load(folder)


def _describe(folder, **changes):
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "embeddings.npy").unlink(), "embeddings.npy"),
        (lambda folder: (folder / "embeddings.npy").write_bytes(b"\x93NUMPY"), "no index that can be read"),
        (lambda folder: (folder / "embeddings.npy").write_bytes(b""), "no index that can be read"),
        (lambda folder: np.save(folder / "embeddings.npy", np.zeros((9, DIM), np.float32)), r"\(9, 32\)"),
        (lambda folder: np.save(folder / "embeddings.npy", np.zeros((10, DIM))), "float64"),
        (lambda folder: np.save(folder / "shortlist.npy", np.zeros((10, 7), np.uint8)), r"\(10, 7\)"),
        (lambda folder: (folder / "names.json").write_text('["a"]'), "got 1 for 10"),
        (lambda folder: (folder / "names.json").write_text('["a"'), "no index that can be read"),
        (lambda folder: (folder / "names.json").write_text(json.dumps([*"jihgfedcba"])), "not sorted"),
        (lambda folder: (folder / "index.json").write_text("[]"), "no index that can be read"),
        (lambda folder: (folder / "index.json").write_text("{}"), "format"),
        (lambda folder: _describe(folder, format=2), "format is 2"),
        (lambda folder: _describe(folder, storage="float8"), "float8"),
        (lambda folder: _describe(folder, mean=[0.0]), "mean"),
        (lambda folder: _describe(folder, short="8"), "no index that can be read"),
    ],
)
def test_damaged_folders_are_named(tmp_path, damage, message):
    SpeakerIndex(*speakers(10), short=8).save(tmp_path / "index")
    damage(tmp_path / "index")
    with pytest.raises(ValueError, match=message) as error:
        SpeakerIndex.load(tmp_path / "index")
    assert str(tmp_path / "index") in str(error.value)


# ---------------------------------------------------------------- sizes and wrong input


@pytest.mark.parametrize(("storage", "width"), [("float32", 64), ("int8", 16), ("binary", 2)])
@pytest.mark.parametrize(("full", "number"), [("float32", 4), ("float16", 2), ("int8", 1)])
def test_sizes_are_those_of_what_is_held(tmp_path, storage, width, full, number):
    names, embeddings = speakers(1000)
    index = SpeakerIndex(names, embeddings, 16, storage, full)
    assert index.sizes["shortlist"] == 1000 * width and index.sizes["embeddings"] == 1000 * DIM * number
    held = sum(map(sys.getsizeof, names)) / 1000
    assert held <= index.bytes_per_speaker - width - DIM * number <= held + 16  # and the list's pointers
    index.save(tmp_path / "index")
    on_disk = (tmp_path / "index" / "shortlist.npy").stat().st_size
    assert 0 <= on_disk - index.sizes["shortlist"] <= 128  # .npy's header


def test_several_utterances_of_a_speaker_are_averaged_before():
    names, embeddings = speakers(50)
    utterances = np.repeat(embeddings, 4, axis=0) + 0.2 * speakers(200, 1)[1]
    owners = np.repeat(names, 4)
    units = utterances / np.linalg.norm(utterances, axis=1, keepdims=True)
    index = SpeakerIndex(sorted(names), speaker_means(units, owners), short=16)
    assert [row[0] for row in index.search(embeddings, k=1)[0]] == names


def _changed(row: int, value: float, start: int = 0) -> np.ndarray:
    embeddings = speakers(10)[1]
    embeddings[row, start:] = value
    return embeddings


NAMES = [*"abcdefghij"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((NAMES[:9], speakers(10)[1]), "got 9 for 10"),
        (([*NAMES[:8], "b", "a"], speakers(10)[1]), "2 come again, first 'b'"),
        (([*NAMES[:9], ""], speakers(10)[1]), "non-empty strings"),
        (([*NAMES[:9], 7], speakers(10)[1]), "non-empty strings"),
        (("abcdefghij", speakers(10)[1]), "expected a list"),
        (([], np.empty((0, DIM))), "at least one"),
        ((NAMES, speakers(10)[1][0]), r"\[N, D\]"),
        ((NAMES, [["x"] * DIM] * 10), r"\[N, D\]"),
        ((NAMES, _changed(3, 0.0)), "1 of 10 embeddings are zero in the first 8 numbers, first 'd'"),
        ((NAMES, np.pad(speakers(10)[1], [(0, 0), (8, 0)])), "10 of 10 embeddings are zero in the first 8 numbers"),
        ((NAMES, _changed(4, np.nan, 9)), "1 of 10 embeddings are not finite, first 'e'"),
        ((NAMES, _changed(4, np.inf, 31)), "not finite, first 'e'"),
        ((NAMES, speakers(10)[1], 0), "short: got 0"),
        ((NAMES, speakers(10)[1], 33), "short: got 33, expected 1 to the embeddings' 32"),
        ((NAMES, speakers(10)[1], 12, "binary"), "multiple of 8"),
        ((NAMES, speakers(10)[1], 8, "int4"), "storage: got 'int4', expected one of float32, int8, binary"),
        ((NAMES, speakers(10)[1], 8, "int8", "float64"), "full: got 'float64'"),
    ],
)
def test_wrong_enrolments_are_named(arguments, message):
    names, embeddings, short, *rest = (*arguments, 8) if len(arguments) == 2 else arguments
    with pytest.raises(ValueError, match=message):
        SpeakerIndex(names, embeddings, short, *rest)


def test_a_name_may_end_in_any_character():
    names = ["a", "a\0", "é", "日本", "a b", "a/b"]
    index = SpeakerIndex(names, speakers(6)[1], short=8)
    assert [row[0] for row in index.search(speakers(6)[1], k=1)[0]] == names


@pytest.mark.parametrize(
    ("queries", "options", "message"),
    [
        (speakers(2)[1], dict(k=0), "k: got 0, expected 1 to the 10"),
        (speakers(2)[1], dict(k=11), "k: got 11, expected 1 to the 10"),
        (speakers(2)[1], dict(k=5, shortlist=4), "shortlist: got 4, expected at least k=5"),
        (speakers(2)[1][0], {}, r"queries: expected numbers \[N, D\]"),
        (speakers(2)[1][:, :16], {}, "queries: got 16 numbers each, the index has embeddings of 32"),
        (_changed(3, 0.0), {}, "first 'query 3'"),
        (_changed(3, np.nan), {}, "not finite, first 'query 3'"),
    ],
)
def test_wrong_queries_are_named(queries, options, message):
    with pytest.raises(ValueError, match=message):
        SpeakerIndex(NAMES, speakers(10)[1], short=8).search(queries, **options)


def test_no_queries_have_no_answers():
    names, scores = SpeakerIndex(NAMES, speakers(10)[1], short=8).search(np.empty((0, DIM)), k=3, shortlist=5)
    assert names == [] and scores.shape == (0, 3)


def test_wrong_additions_and_removals_change_nothing():
    names, embeddings = speakers(10)
    index = SpeakerIndex(NAMES, embeddings, short=8)
    for wrong, message in (
        (lambda: index.add(["z", "c"], embeddings[:2]), "1 names are enrolled already, first 'c'"),
        (lambda: index.add(["y", "z"], _changed(1, 0.0)[:2]), "zero in the first 8 numbers, first 'z'"),
        (lambda: index.add(["z"], embeddings[:1, :16]), "got 16 numbers each"),
        (lambda: index.remove(["a", "z"]), "1 names are not enrolled, first 'z'"),
        (lambda: index.remove("a"), "expected a list"),
        (lambda: index.remove(NAMES), "at least one speaker"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    assert_same(index, SpeakerIndex(NAMES, embeddings, short=8), embeddings, k=3, shortlist=5)
