"""Which embeddings are one speaker's, and how many speakers there are."""

import numpy as np
from numpy.typing import NDArray

from mrl_redimnet.extras import extra

DISTANCE = 0.6  # of cosines, at which few windows are cut into clusters
_MANY = 1500  # windows that are clustered; of more, so many are drawn evenly, and the others go to the nearest cluster
_NEIGHBOURS = (0.02, 0.03, 0.05, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3)  # shares of all windows, of which one is chosen
_LEAST_SILHOUETTE = 0.05  # two clusters that are less apart are one


def clustered(
    units: NDArray,
    seconds: NDArray,
    speakers: int | None = None,
    most: int = 10,
    least_seconds: float = 2.0,
    few: bool = False,
) -> tuple[NDArray, NDArray]:
    """Embeddings of windows in clusters, one for each speaker.

    Args:
        units: [N, D] of length one, N at least 1.
        seconds: [N] of the windows.
        speakers: how many there are; None: found, at most `most`.
        least_seconds: smaller clusters are given up, unless `speakers` asks for them.
        few: whether so few windows are all that there is, that the graph of their neighbours says too little: then
            they are clustered by average linkage, otherwise by the spectrum of that graph.

    Returns:
        The cluster of each window [N], and the clusters' mean embeddings [K, D] of length one. Where fewer windows
        differ than speakers are asked for, there are fewer clusters.
    """
    rows = np.arange(len(units))
    if len(units) > _MANY:
        rows = np.linspace(0, len(units) - 1, _MANY).round().astype(int)
    drawn = units[rows]
    if few or len(drawn) < 4:
        labels = _linked(drawn, speakers)
    else:
        labels = spectral(drawn, speakers, most)
    return _kept(units, rows, labels, seconds, 0.0 if speakers else least_seconds)


def _linked(units: NDArray, speakers: int | None) -> NDArray:
    """Agglomerative clustering, average linkage of cosine distances [N, D] -> [N]."""
    if len(units) < 2:
        return np.zeros(len(units), dtype=int)
    with extra("diarization"):
        from sklearn.cluster import AgglomerativeClustering

    cut = {"n_clusters": min(speakers, len(units))} if speakers else {"distance_threshold": DISTANCE}
    return AgglomerativeClustering(**{"n_clusters": None, **cut}, metric="cosine", linkage="average").fit_predict(units)


def spectral(units: NDArray, speakers: int | None, most: int) -> NDArray:
    """Spectral clustering [N, D] -> [N]. The graph joins each window with its p most alike, where p is the one with the
    smallest normalised maximum eigengap (Park et al., arXiv 2003.02405, eq. 7 to 10); the number of clusters is the one
    with the highest silhouette (Rousseeuw, 1987), which counted speakers better than the eigengap itself
    (docs/results/diarisation_settings.md).
    """
    with extra("diarization"):
        from sklearn.cluster import KMeans
        from sklearn.metrics import silhouette_score

    most = min(speakers or most, len(units) - 1)
    vectors, _ = eigenvectors(units, most)
    best, labels = _LEAST_SILHOUETTE, np.zeros(len(units), dtype=int)
    for count in [speakers] if speakers else range(2, most + 1):
        found = KMeans(count, n_init=5, random_state=0).fit_predict(vectors[:, :count])
        if speakers:
            return found
        if len(np.unique(found)) > 1 and (score := silhouette_score(units, found, metric="cosine")) > best:
            best, labels = score, found
    return labels


def eigenvectors(units: NDArray, most: int) -> tuple[NDArray, NDArray]:
    """units [N, D] -> eigenvectors [N, most] of the smallest eigenvalues of the graph's Laplacian, and one more value
    than there are vectors [most + 1].
    """
    with extra("diarization"):
        from scipy.linalg import eigh

    similar = units @ units.T
    np.fill_diagonal(similar, -np.inf)
    nearest = np.argsort(-similar, axis=1, kind="stable")
    best, chosen, smallest = np.inf, np.empty((0, 0)), np.empty(0)
    for count in sorted({max(2, int(share * len(units))) for share in _NEIGHBOURS}):
        graph = np.zeros(similar.shape)
        np.put_along_axis(graph, nearest[:, :count], 1.0, axis=1)
        graph = (graph + graph.T) / 2
        laplacian = np.diag(graph.sum(axis=1)) - graph
        # All eigenvalues, for the largest; vectors of the smallest only.
        values = eigh(laplacian, eigvals_only=True)
        gap = np.diff(values[: most + 1]).max() / values[-1]
        if (ratio := count / len(units) / max(gap, 1e-10)) < best:
            best, chosen, smallest = ratio, laplacian, values[: most + 1]
    return eigh(chosen, subset_by_index=(0, most - 1))[1], smallest


def _kept(units: NDArray, rows: NDArray, labels: NDArray, seconds: NDArray, least: float) -> tuple[NDArray, NDArray]:
    """The clusters of the windows `rows` that last `least` seconds, at least the longest; other windows go to the
    nearest.
    """
    spoken = np.bincount(labels, seconds[rows])
    kept = np.flatnonzero((spoken >= least) | (spoken == spoken.max()))
    means = np.stack([units[rows[labels == cluster]].mean(axis=0) for cluster in kept])
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), np.finfo(means.dtype).tiny)
    found = (units @ means.T).argmax(axis=1)
    stays = np.isin(labels, kept)
    found[rows[stays]] = np.searchsorted(kept, labels[stays])
    return found, means
