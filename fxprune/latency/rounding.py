"""Which kept counts are worth having on a target: ``round_to="auto"``.

A count is worth having when the next larger one takes noticeably more time. On a runtime that works
on blocks of 16 channels that leaves the multiples of 16 (and no count at all in a group of 16).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxprune.latency.model import LatencyModel
from fxprune.types import ChannelGroup, FloatArray, IntArray

WORTH = 0.5  # of what the channels' share of the group's time would save
CHUNK = 2048  # plans predicted at once


def fast_counts(model: LatencyModel, groups: Sequence[ChannelGroup]) -> dict[str, IntArray]:
    """Allowed kept counts of each row, ascending, for every group that is not locked.

    From the full width down, with all other groups whole: a count is taken when it saves at least
    ``WORTH`` of its channels' share of what the whole group's removal would save.
    """
    found = {}
    for i, g in enumerate(groups):
        if g.locked is None and g.width > 1:
            ms = _alone(model, i, g.width)
            found[g.name] = _worth(ms)
    return found


def _alone(model: LatencyModel, group: int, width: int) -> FloatArray:
    """[width] milliseconds with 1, 2, ... channels of one group, all others whole."""
    counts = np.tile(model.full, (width, 1))
    counts[:, group] = np.arange(1, width + 1)
    parts = [model.predict(counts[i : i + CHUNK]) for i in range(0, width, CHUNK)]
    return np.concatenate(parts)


def _worth(ms: FloatArray) -> IntArray:
    """[width] milliseconds of each count -> counts worth having."""
    width = len(ms)
    share = max(float(ms[-1] - ms.min()), 1e-12) / width
    taken = [width]
    for count in range(width - 1, 0, -1):
        saved = float(ms[taken[-1] - 1] - ms[count - 1])
        if saved >= WORTH * share * (taken[-1] - count):
            taken.append(count)
    return np.array(taken[::-1], dtype=np.int64)
