"""The criterion ``attention``: what the attention map loses with a channel (ARPruning).

The abstract of the source paper says that the importance of a channel inside a layer comes from the
layer's attention map; its formula is not public here. Two readings of it:

displacement    how far the normalised map moves when the channel goes (:mod:`fxprune.moments`)
reconstruction  the loss that is left after the best linear reconstruction of the channel from those
                that stay, positions weighted by the attention map; the default
                (:mod:`fxprune.criteria.elimination`). gamma = 0 ignores the map: ``reconstruction``

A group sums over the consumers that its channels enter, each relative to its output energy.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from fxprune.criteria.elimination import (
    Coupled,
    Independent,
    Loss,
    eliminate,
    factor_of,
    factor_of_square,
    inverse_of,
)
from fxprune.criteria.registry import Generator, Scores, register
from fxprune.errors import DataError, SpecError
from fxprune.moments import Moments
from fxprune.observe import Statistics, producers, takes_outputs_along, unit_variables
from fxprune.types import ChannelGroup, Consumer, FloatArray, IntArray

if TYPE_CHECKING:
    from fxprune.traced import Traced

RIDGE = 1e-3  # of the mean variance
FORMS = ("reconstruction", "displacement")
_AT_ONCE = 1 << 24  # weights that are held in float64 at a time


@dataclass(frozen=True)
class AttentionCriterion:
    """form: ``reconstruction`` or ``displacement``; p, gamma: of the attention map F^gamma.

    The statistics have to be observed with the same p and gamma (``observe`` holds the options).
    A score is the relative loss summed up to the moment when the channel goes (reconstruction), or
    the displacement summed over inputs. Raises SpecError for an unknown form or other options,
    DataError without statistics.
    """

    form: str = "reconstruction"
    gamma: float = 1.0
    p: float = 2.0
    needs_data: bool = True

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise SpecError(f"unknown form {self.form!r} of attention; choose one of {FORMS}")
        if not (self.p > 0 and self.gamma >= 0):
            raise SpecError(f"expected p > 0 and gamma >= 0; got p={self.p}, gamma={self.gamma}")

    @property
    def observe(self) -> Mapping[str, Any]:
        """Options for :func:`fxprune.observe.observe`."""
        if self.form == "displacement":
            return {"gamma": 0.0, "p": self.p, "displacement": True}
        return {"gamma": self.gamma, "p": self.p, "displacement": False}

    def __call__(
        self, traced: Traced, statistics: Statistics | None, generator: Generator
    ) -> Scores:
        if statistics is None:
            raise DataError("the attention criterion needs calibration data; give statistics")
        groups = [g for g in traced.groups if g.locked is None]
        if self.form == "displacement":
            return {g.name: _displaced(g, traced, statistics) for g in groups}
        mapped = self.gamma != 0
        if mapped and (statistics.gamma, statistics.p) != (self.gamma, self.p):
            raise SpecError(
                f"the statistics were observed with gamma={statistics.gamma}, p={statistics.p}; "
                f"this criterion needs gamma={self.gamma}, p={self.p}"
            )
        inverses = _Inverses(statistics, mapped)
        # Thousands of small products: several BLAS threads wait for each other most of the time.
        with threadpool_limits(limits=1, user_api="blas"):
            return {g.name: _reconstructed(g, traced, statistics, inverses) for g in groups}


register("attention")(AttentionCriterion)
register("reconstruction")(functools.partial(AttentionCriterion, gamma=0.0))


class _Inverses:
    """(G / s + ridge)^-1 of each input, made once for all groups: [V, V], or [V] where diagonal.

    s is the mean variance: very small or large activations stay within the range of floats.
    """

    def __init__(self, statistics: Statistics, mapped: bool) -> None:
        self.statistics, self.mapped = statistics, mapped
        self.made: dict[str, FloatArray] = {}

    def moments(self, key: str) -> Moments:
        seen = self.statistics.inputs[key]
        return seen.attention if self.mapped else seen.plain

    def scale(self, key: str) -> float:
        """The mean variance s; 0 where nothing varies."""
        cov = self.moments(key).cov
        variances = cov if cov.ndim == 1 else np.diagonal(cov, axis1=1, axis2=2)
        return max(float(variances.mean()), 0.0)

    def of(self, key: str) -> FloatArray:
        if key not in self.made:
            cov = self.moments(key).cov / (self.scale(key) or 1.0)
            if cov.ndim == 1:
                self.made[key] = 1.0 / (cov + RIDGE)
            else:
                eye = np.eye(cov.shape[1])
                self.made[key] = _block_diagonal([inverse_of(c + RIDGE * eye) for c in cov])
        return self.made[key]


def _block_diagonal(parts: list[FloatArray]) -> FloatArray:
    if len(parts) == 1:
        return parts[0]
    v = len(parts[0])
    full = np.zeros((len(parts), v, len(parts), v))
    at = np.arange(len(parts))
    full[at, :, at, :] = np.stack(parts)
    return full.reshape(len(parts) * v, -1)


def _by_input(
    group: ChannelGroup, traced: Traced, statistics: Statistics
) -> dict[str, tuple[IntArray, list[Consumer]]]:
    """Input key -> (variables [n, k] of the group's channels, the consumers of that input)."""
    consumers = {c.key: c for c in traced.consumers}
    found: dict[str, tuple[IntArray, list[Consumer]]] = {}
    for use in group.uses:
        consumer = consumers[use.consumer]
        if use.consumer not in statistics.consumers or takes_outputs_along(use, consumer):
            continue
        key = statistics.consumers[use.consumer].input
        units = unit_variables(use.index, statistics.inputs[key].layout)
        found.setdefault(key, (units, []))[1].append(consumer)
    return found


def _reconstructed(
    group: ChannelGroup, traced: Traced, statistics: Statistics, inverses: _Inverses
) -> FloatArray:
    losses: list[Loss] = []
    for key, (units, consumers) in _by_input(group, traced, statistics).items():
        at, k = units.ravel(), units.shape[1]
        inverse, scale = inverses.of(key), inverses.scale(key)
        if inverse.ndim == 1:
            column = sum(_column_energies(statistics, c, at, scale) for c in consumers)
            losses.append(Independent((column / inverse[at]).reshape(group.n, k).sum(1)))
        else:
            factor = _factor(statistics, consumers, at, scale)
            losses.append(Coupled(inverse[np.ix_(at, at)], factor, k))
    if not losses:
        return _made(group, traced, statistics)
    return eliminate(losses, group.n, group.rows)


def _share(statistics: Statistics, consumer: Consumer, scale: float) -> float:
    """The input's mean variance over the output's energy; 0 where the output does not vary."""
    energy = statistics.consumers[consumer.key].energy
    return scale / energy if energy > 0 else 0.0


def _parts(statistics: Statistics, consumer: Consumer) -> Iterator[torch.Tensor]:
    """The weight in float64, each tap by the root of its coverage: [g, O/g, v, T], parts of O/g."""
    blocks = statistics.blocks(consumer)
    root = statistics.consumers[consumer.key].coverage.sqrt().to(blocks.device)
    per_output = max(1, blocks.numel() // blocks.shape[1])
    for part in torch.split(blocks, max(1, _AT_ONCE // per_output), dim=1):
        yield part.double() * root


def _column_energies(
    statistics: Statistics, consumer: Consumer, at: IntArray, scale: float
) -> FloatArray:
    """Relative |W_c|^2 of the variables ``at``."""
    parts = _parts(statistics, consumer)
    total = sum(part.square().sum((1, 3)).flatten() for part in parts)
    assert isinstance(total, torch.Tensor)
    column: FloatArray = total.cpu().numpy()[at] * _share(statistics, consumer, scale)
    return column


def _factor(
    statistics: Statistics, consumers: list[Consumer], at: IntArray, scale: float
) -> FloatArray:
    """[r, m] whose square is the sum of the consumers' relative W^T W over the variables ``at``."""
    if len(consumers) == 1 and consumers[0].groups == 1:
        blocks = statistics.blocks(consumers[0])
        if blocks.shape[1] * blocks.shape[3] <= len(at):
            parts = [p[0, :, torch.from_numpy(at)] for p in _parts(statistics, consumers[0])]
            w = torch.cat(parts).transpose(1, 2).reshape(-1, len(at)).cpu().numpy()
            return factor_of(w * np.sqrt(_share(statistics, consumers[0], scale)))
    square = np.zeros((len(at), len(at)))
    for consumer in consumers:
        square += _square(statistics, consumer, at) * _share(statistics, consumer, scale)
    return factor_of_square(square)


def _square(statistics: Statistics, consumer: Consumer, at: IntArray) -> FloatArray:
    """W^T W [m, m] over the variables ``at``; zero between convolution groups."""
    if consumer.groups == 1:
        total = np.zeros((len(at), len(at)))
        for part in _parts(statistics, consumer):
            chosen = torch.from_numpy(at).to(part.device)
            w = part[0].index_select(1, chosen).transpose(1, 2).reshape(-1, len(at))
            total += (w.t() @ w).cpu().numpy()
        return total
    parts = _parts(statistics, consumer)
    squares = sum(torch.einsum("govt,gowt->gvw", w, w).cpu().numpy() for w in parts)
    assert isinstance(squares, np.ndarray)
    return _block_diagonal(list(squares))[np.ix_(at, at)]


def _displaced(group: ChannelGroup, traced: Traced, statistics: Statistics) -> FloatArray:
    total = np.zeros(group.n)
    inputs = _by_input(group, traced, statistics)
    for key, (units, _) in inputs.items():
        seen = statistics.inputs[key]
        if seen.displacement is None:
            raise SpecError("the statistics were observed without displacement=True")
        single = units.shape[1] == 1
        total += seen.displacement[units[:, 0]] if single else seen.blocks[group.name]
    return total if inputs else _made(group, traced, statistics)


def _made(group: ChannelGroup, traced: Traced, statistics: Statistics) -> FloatArray:
    """Scores of a group that enters no consumer: its channels only meet each other in products.

    A channel of queries and keys adds q_c k_c to every logit, so its weight there is the product of
    the energies E[q_c^2] E[k_c^2] of the rows that make it. The score is the geometric mean over
    all such rows (of the squared norm, where what enters them was not observed), as a share of the
    sum, summed up from the weakest channel.
    """
    rows = [_row_energies(c, statistics)[index] for c, index in producers(group, traced.consumers)]
    if not rows:
        return np.arange(1, group.n + 1)[::-1] / group.n
    energies = np.concatenate(rows, axis=1)
    tiny = np.finfo(np.float64).tiny
    means = np.exp(np.log(np.maximum(energies, tiny)).mean(1))
    order = means.argsort(kind="stable")
    scores = np.empty(group.n)
    shares = np.cumsum(means[order] / max(float(means.sum()), tiny))
    scores[order] = shares + 1e-12 * np.arange(group.n)
    return scores


def _row_energies(consumer: Consumer, statistics: Statistics) -> FloatArray:
    """[O]: E[y^2] of each output without its bias, or the squared norm of its weights."""
    weight = statistics.weights[consumer.weight]
    layout_rows = weight.detach().double().transpose(0, consumer.out_dim).flatten(1)
    seen = statistics.consumers.get(consumer.key)
    if seen is None or seen.weight is not None or consumer.kind != "linear":
        return np.asarray(layout_rows.square().sum(1).cpu().numpy())
    moments = statistics.input_of(consumer.key).plain
    w = statistics.blocks(consumer)[0].double().cpu().numpy()
    if moments.cov.ndim == 1:
        spread = np.einsum("ovt,v->o", w**2, moments.cov)
    else:
        spread = np.einsum("ovt,ovt->o", np.einsum("ovt,vu->out", w, moments.cov[0]), w)
    level = np.einsum("ovt,v->o", w, moments.mean)
    return np.asarray(spread + level**2)
