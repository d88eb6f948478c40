"""Random choices among the samples of a set. Each has a stream of its own: no option changes what another one draws."""

from __future__ import annotations

import numpy as np


def ranks(seed: int, purpose: str, count: int) -> np.ndarray:
    """``count`` random words, uint64, of (seed, purpose). The first n of them do not depend on ``count``.

    Raw words of PCG64: NumPy fixes those for all its versions, other than the methods of its Generator.
    """
    words = np.random.PCG64(np.random.SeedSequence((seed, *purpose.encode()))).random_raw(count)
    return np.asarray(words, np.uint64)


def draw(seed: int, purpose: str, among: np.ndarray, size: int) -> np.ndarray:
    """``size`` of the indices ``among``, ascending; a larger size holds every smaller one."""
    if size >= len(among):
        return among
    order = np.argsort(ranks(seed, purpose, int(among.max()) + 1)[among], kind="stable")
    return np.sort(among[order[:size]])


def corrupted(
    labels: np.ndarray, index: np.ndarray, share: float, *, classes: int, differ: bool, seed: int, part: str
) -> np.ndarray:
    """``labels``, of the samples ``index`` of a part, with a random class in place of a share of them.

    Which samples, and which classes, depends on (seed, part) and a sample's index alone: a larger share holds every
    smaller one. The class is uniform among all, and so the true one at times; with ``differ`` among the others.
    """
    if not len(index):
        return labels
    count = int(index.max()) + 1
    order = np.argsort(ranks(seed, f"corrupted {part}", count)[index], kind="stable")
    chosen = order[: round(share * len(index))]
    words = ranks(seed, f"random class {part}", count)[index[chosen]]
    new = (words % np.uint64(classes - differ)).astype(np.int64)
    result = labels.copy()
    result[chosen] = (labels[chosen] + 1 + new) % classes if differ else new
    return result
