"""Give back accuracy after a cut, without labels and without back-propagation.

Least squares: every consumer that lost inputs gets the weights with which those that stay reproduce
its original output best: W' = W_K + W_R G_RK (G_KK + lambda I)^-1, G the centred second moments of
its input in the original model, K kept, R removed. What the mean of the removed inputs added goes
to its bias, or into the running mean of the batch normalisation behind it. ``repair_bn`` is in
:mod:`fxprune.renorm`.

Legend for shapes: g convolution groups that stay, o outputs of each, k kept and r removed variables
of each, T taps (kernel positions, or columns of a flatten).
"""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from fxprune.errors import InternalError
from fxprune.moments import Layout, Moments, join_weight, split_weight
from fxprune.observe import Statistics
from fxprune.products import storage_key
from fxprune.renorm import RepairReport, repair_bn
from fxprune.types import BoolArray, Consumer, PrunePlan

if TYPE_CHECKING:
    from fxprune.traced import Traced

__all__ = ["LeastSquares", "RepairReport", "repair_bn", "repair_lstsq", "solve"]

RIDGE = 1e-3  # of the mean variance of the kept inputs; flat from 1e-5 to 1e-2
_AT_ONCE = 1 << 24  # weights that are held in float64 at a time
_REMEMBERED = 4  # solved regressions kept for each input


@dataclass(frozen=True)
class Solved:
    """What the removed inputs are in terms of the kept ones, float64.

    kept [g, k] and removed [g, r]: variables within the convolution groups ``alive`` [g];
    regression [g, r, k], or None where they cannot be told; offset [g, r]: the mean that is left.
    """

    alive: Tensor
    kept: Tensor
    removed: Tensor
    regression: Tensor | None
    offset: Tensor


class LeastSquares:
    """The one-shot repair, ready for many plans: ``apply(plan, graph_module)``, in place.

    The moments are those of ``observe``, unweighted. Calls may come from several threads. Weights
    are computed from the original's, so applying a plan twice gives the same.
    """

    def __init__(self, traced: Traced, statistics: Statistics, ridge: float = RIDGE) -> None:
        self.traced, self.statistics, self.ridge = traced, statistics, ridge
        self.original = named_tensors(traced.graph_module)
        self.never, self.consumers = _repairable(traced, statistics, self.original)
        self.moments = {key: _average(statistics, cs) for key, cs in self.consumers.items()}
        self.writer = Writer(traced, self.original, self.consumers.values())
        self.solved: dict[str, dict[bytes, Solved]] = {}
        self.lock = threading.Lock()

    def __call__(self, plan: PrunePlan, module: fx.GraphModule) -> RepairReport:
        return self.apply(plan, module)

    def only(self, consumers: Iterable[str]) -> LeastSquares:
        """The same for these consumers (keys) alone, and those that share their weights."""
        wanted = set(consumers)
        fewer = copy.copy(self)
        fewer.consumers = {
            w: cs for w, cs in self.consumers.items() if wanted.intersection(c.key for c in cs)
        }
        return fewer

    def apply(self, plan: PrunePlan, module: fx.GraphModule) -> RepairReport:
        """Repair ``module``, the cut of ``plan``. Raises InternalError where they do not fit."""
        masks = self.traced.masks(plan)
        targets = named_tensors(module)
        repaired: list[str] = []
        skipped: dict[str, str] = {}
        with torch.no_grad():
            for weight, consumers in self.consumers.items():
                consumer = consumers[0]
                keep = masks[consumer.classes]
                if keep.all() or not keep.any():
                    continue
                note = self._repair(weight, consumers, keep, masks, targets)
                repaired.append(consumer.key)
                if note:
                    skipped[consumer.key] = note
            for key, (consumer, reason) in self.never.items():
                if not masks[consumer.classes].all():
                    skipped[key] = reason
        return RepairReport(tuple(repaired), skipped)

    def _repair(
        self,
        weight: str,
        consumers: Sequence[Consumer],
        keep: BoolArray,
        masks: BoolArray,
        targets: Mapping[str, Tensor],
    ) -> str | None:
        """Write one weight and its mean part; returns what had to be left out."""
        consumer = consumers[0]
        layout = self.statistics.input_of(consumer.key).layout
        solved = self._solve(weight, consumer, kept_variables(consumer, layout, keep))
        coverage = self.statistics.consumers[consumer.key].coverage
        note = self.writer.write(consumers, solved, layout, coverage, masks, targets)
        if solved.regression is None:
            note = "too many channels for a regression; only the mean part was repaired"
        return note

    def guess(self, consumer: Consumer, keep: BoolArray) -> Tensor | None:
        """[g, v, k]: what the solution adds to the kept variables ``keep`` [V] in their places.

        For convolution groups that stay; None where there is no solution for this consumer.
        """
        if consumer.weight not in self.consumers:
            return None
        solved = self._solve(consumer.weight, consumer, keep)
        if solved.regression is None:
            return None
        groups, kept = solved.kept.shape
        full = torch.zeros(groups, len(keep) // consumer.groups, kept, dtype=torch.float64)
        at = solved.removed[:, :, None].expand(-1, -1, kept)
        return full.scatter_(1, at, solved.regression)

    def _solve(self, weight: str, consumer: Consumer, keep: BoolArray) -> Solved:
        known = self.solved.setdefault(weight, {})
        mark = np.packbits(keep).tobytes()
        found = known.get(mark)
        if found is None:
            found = solve(self.moments[weight], keep.reshape(consumer.groups, -1), self.ridge)
            with self.lock:
                while len(known) >= _REMEMBERED:
                    known.pop(next(iter(known)))
                known[mark] = found
        return found


def kept_variables(consumer: Consumer, layout: Layout, keep: BoolArray) -> BoolArray:
    """Kept input channels [C] -> kept variables [V]. Raises InternalError where they are torn."""
    variables: BoolArray = keep[layout.columns]
    if (variables != variables[:, :1]).any():
        raise InternalError(f"{consumer.key}: a channel lost some of its columns, not all")
    return variables[:, 0]


def named_tensors(module: fx.GraphModule) -> dict[str, Tensor]:
    """Parameters and buffers by every name that they have."""
    return {
        **dict(module.named_buffers(remove_duplicate=False)),
        **dict(module.named_parameters(remove_duplicate=False)),
    }


class Writer:
    """Writes repaired weights, and the mean part where there is a place for it.

    Everything is computed from the original's tensors, so writing twice gives the same.
    ``consumers``: those that share a weight, for every weight that may be written.
    """

    def __init__(
        self,
        traced: Traced,
        original: Mapping[str, Tensor],
        consumers: Iterable[Sequence[Consumer]],
    ) -> None:
        self.traced, self.original = traced, original
        self.writers = Counter(
            name for cs in consumers for name in {c.bias or f"{c.norm}.running_mean" for c in cs}
        )
        nodes = [n for n in traced.graph_module.graph.nodes if n.op == "call_module"]
        for path, calls in Counter(str(n.target) for n in nodes).items():
            if calls > 1:  # a normalisation that something else enters too
                self.writers[f"{path}.running_mean"] += calls

    def write(
        self,
        consumers: Sequence[Consumer],
        solved: Solved,
        layout: Layout,
        coverage: Tensor,
        masks: BoolArray,
        targets: Mapping[str, Tensor],
    ) -> str | None:
        """Of one weight, shared by ``consumers``; returns what had to be left out."""
        consumer = consumers[0]
        target = targets[consumer.weight]
        blocks = split_weight(consumer, self.original[consumer.weight], layout)
        classes = self.traced.param_classes.get((consumer.weight, consumer.out_dim))
        rows = torch.from_numpy(_rows(masks, classes, consumer))
        new, shift = _rewrite(blocks, solved, rows, coverage)
        kernel = target.shape[2:] if consumer.kind == "conv" else torch.Size()
        joined = join_weight(consumer, new, kernel, layout)
        if joined.shape != target.shape:
            raise InternalError(
                f"{consumer.key}: the cut left {consumer.weight} as {tuple(target.shape)}, "
                f"its plan says {tuple(joined.shape)}"
            )
        target.copy_(joined.to(target.device))
        place = self.place(consumers, targets)
        if isinstance(place, str):
            return f"{place}; the mean part was left out"
        self._shift(*place, shift, masks, targets)
        return None

    def add(
        self, consumer: Consumer, weight: Tensor, shift: Tensor, targets: Mapping[str, Tensor]
    ) -> None:
        """Add ``weight`` [g, o, k, T] and, where there is a place, ``shift`` [O] to what is there.

        Both of the pruned model's shape.
        """
        target = targets[consumer.weight]
        kernel = target.shape[2:] if consumer.kind == "conv" else torch.Size()
        plain = Layout(weight.shape[0] * weight.shape[2])
        joined = join_weight(consumer, weight, kernel, plain)
        target.copy_(target.double() + joined.to(target.device))
        place = self.place([consumer], targets)
        if not isinstance(place, str):
            name, sign = place
            mean = targets[name]
            mean.copy_(mean.double() + sign * shift.to(mean.device))

    def place(
        self, consumers: Sequence[Consumer], targets: Mapping[str, Tensor]
    ) -> tuple[str, float] | str:
        """(tensor, sign) that takes a shift of the outputs' means, or why there is none."""
        norms = {c.norm for c in consumers}
        if consumers[0].bias is not None:
            name, sign = consumers[0].bias, 1.0
        elif len(norms) == 1 and f"{next(iter(norms))}.running_mean" in targets:
            name, sign = f"{next(iter(norms))}.running_mean", -1.0
        else:
            return "no bias and no batch normalisation behind it"
        return f"{name} belongs to several weights" if self.writers[name] > 1 else (name, sign)

    def _shift(
        self,
        name: str,
        sign: float,
        shift: Tensor,
        masks: BoolArray,
        targets: Mapping[str, Tensor],
    ) -> None:
        """Add ``sign`` * ``shift`` [O'] to what the original has there."""
        classes = self.traced.param_classes.get((name, 0))
        base = self.original[name].double()
        if classes is not None:
            base = base[torch.from_numpy(masks[classes]).to(base.device)]
        targets[name].copy_(base + sign * shift.to(base.device))


def _repairable(
    traced: Traced, statistics: Statistics, original: Mapping[str, Tensor]
) -> tuple[dict[str, tuple[Consumer, str]], dict[str, list[Consumer]]]:
    """(consumer key -> why it cannot be repaired, weight name -> consumers that share it)."""
    by_weight: dict[str, list[Consumer]] = {}
    for c in traced.consumers:
        if c.groups == 1 or c.groups < len(c.classes):
            by_weight.setdefault(c.weight, []).append(c)
    calls = parameter_calls(traced.graph_module)
    never: dict[str, tuple[Consumer, str]] = {}
    for weight, consumers in list(by_weight.items()):
        reason = None
        if any(c.key not in statistics.consumers for c in consumers):
            reason = "its input was not observed"
        elif any(statistics.consumers[c.key].weight is not None for c in consumers):
            reason = "it uses a part of its parameter"
        elif consumers[0].kind == "linear" and original[weight].ndim != 2:
            reason = "its parameter is not a matrix"
        elif calls.get(storage_key(original[weight]), 0) > len(consumers):
            reason = "its parameter is also used elsewhere"
        elif not _alike(consumers, statistics):
            reason = "consumers that share its weight read different channels"
        if reason is not None:
            never.update({c.key: (c, reason) for c in by_weight.pop(weight)})
    return never, by_weight


def parameter_calls(module: fx.GraphModule) -> dict[int, int]:
    """Storage of a parameter -> graph nodes that read it, directly or through their module."""
    counts: dict[int, int] = {}
    for node in module.graph.nodes:
        tensors: list[Tensor] = []
        uses = 1
        if node.op == "call_module":
            tensors = list(module.get_submodule(str(node.target)).parameters())
        elif node.op == "get_attr":
            value: Any = module
            for atom in str(node.target).split("."):
                value = getattr(value, atom)
            tensors = [value] if isinstance(value, Tensor) else []
            uses = len(node.users)
        for key in {storage_key(t) for t in tensors}:
            counts[key] = counts.get(key, 0) + uses
    return counts


def _alike(consumers: Sequence[Consumer], statistics: Statistics) -> bool:
    first = consumers[0]
    return all(
        np.array_equal(c.classes, first.classes)
        and (c.kind, c.in_dim, c.out_dim, c.bias)
        == (first.kind, first.in_dim, first.out_dim, first.bias)
        and statistics.input_of(c.key).layout == statistics.input_of(first.key).layout
        for c in consumers[1:]
    )


def _average(statistics: Statistics, consumers: Sequence[Consumer]) -> Moments:
    """The moments of all inputs that meet one weight, pooled."""
    parts = [statistics.input_of(c.key).plain for c in consumers]
    if len(parts) == 1:
        return parts[0]
    total = sum(m.total for m in parts)
    mean = np.sum([m.total / total * m.mean for m in parts], axis=0)
    cov = np.sum([m.total / total * m.cov for m in parts], axis=0)
    for m in parts:
        offset = (m.mean - mean).reshape(cov.shape[0], -1)
        between = offset**2 if cov.ndim == 1 else offset[:, :, None] * offset[:, None, :]
        cov += m.total / total * between.reshape(cov.shape)
    return Moments(total, mean, cov)


def solve(moments: Moments, keep: BoolArray, ridge: float = RIDGE) -> Solved:
    """Regress removed on kept variables, in each convolution group. ``keep`` [g, v].

    A convolution group that keeps nothing is gone; the others keep equally many. Raises
    InternalError where they do not.
    """
    alive = np.flatnonzero(keep.any(1))
    count = keep[alive].sum(1)
    if (count != count[0]).any():
        raise InternalError(f"convolution groups keep different numbers of inputs: {set(count)}")
    order = np.argsort(~keep[alive], axis=1, kind="stable")
    kept, removed = torch.from_numpy(order[:, : count[0]]), torch.from_numpy(order[:, count[0] :])
    mean = torch.from_numpy(moments.mean).reshape(keep.shape)[alive]
    offset = mean.gather(1, removed)
    if moments.cov.ndim == 1:
        return Solved(torch.from_numpy(alive), kept, removed, None, offset)
    cov = torch.from_numpy(moments.cov)[alive]
    taken = cov.gather(1, kept[:, :, None].expand(-1, -1, cov.shape[2]))
    inside = taken.gather(2, kept[:, None, :].expand(-1, kept.shape[1], -1))
    across = taken.gather(2, removed[:, None, :].expand(-1, kept.shape[1], -1))
    level = inside.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30) * ridge
    inside.diagonal(dim1=1, dim2=2).add_(level[:, None])
    factor, failed = torch.linalg.cholesky_ex(inside)
    if bool(failed.any()):
        regression = torch.linalg.pinv(inside, hermitian=True) @ across
    else:
        regression = torch.cholesky_solve(across, factor)
    regression = regression.transpose(1, 2)
    offset = offset - (regression @ mean.gather(1, kept)[:, :, None])[:, :, 0]
    return Solved(torch.from_numpy(alive), kept, removed, regression, offset)


def _rows(masks: BoolArray, classes: Any, consumer: Consumer) -> BoolArray:
    """Kept outputs [g, O/g]; of a transposed convolution the parameter holds [O/g] for all."""
    if classes is None:
        return np.ones((consumer.groups, 1), dtype=np.bool_)
    keep: BoolArray = masks[classes]
    if consumer.transposed:
        return np.broadcast_to(keep, (consumer.groups, len(keep))).copy()
    return keep.reshape(consumer.groups, -1)


def _rewrite(
    blocks: Tensor, solved: Solved, rows: Tensor, coverage: Tensor
) -> tuple[Tensor, Tensor]:
    """The new weights [g', o, k, T] and the shift of the outputs' means [g' * o], float64.

    ``blocks`` [g, O/g, v, T]: the original weight; ``rows`` [g, O/g]: the outputs that are kept;
    ``coverage`` [T]: how often each tap meets the input.
    """
    device = blocks.device
    outs = blocks.shape[1]
    rows = rows.expand(-1, outs)[solved.alive]
    count = rows.sum(1)
    if bool((count != count[0]).any()):
        raise InternalError("convolution groups keep different numbers of outputs")
    kept_rows = torch.argsort((~rows).to(torch.int8), dim=1, stable=True)[:, : int(count[0])]
    kept, removed, offset = (t.to(device) for t in (solved.kept, solved.removed, solved.offset))
    regression = None if solved.regression is None else solved.regression.to(device)
    w = blocks[solved.alive.to(device)] if len(solved.alive) < len(blocks) else blocks
    step = max(1, _AT_ONCE // max(1, w.shape[0] * w.shape[2] * w.shape[3]))
    taps = coverage.to(device)
    weights: list[Tensor] = []
    shifts: list[Tensor] = []
    for part in torch.split(kept_rows.to(device), step, dim=1):
        whole = _taken(w, part, 1).double()
        stay = _taken(whole, kept, 2)
        # as many as there are: all of them, in their order
        gone = whole if removed.shape[1] == w.shape[2] else _taken(whole, removed, 2)
        if regression is not None:
            stay = stay + torch.einsum("gort,grk->gokt", gone, regression)
        weights.append(stay)
        shifts.append(torch.einsum("gort,gr,t->go", gone, offset, taps))
    return torch.cat(weights, 1), torch.cat(shifts, 1).flatten()


def _taken(t: Tensor, index: Tensor, dim: int) -> Tensor:
    """Of ``t`` [g, *], along ``dim`` the positions that ``index`` [g, n] names for each g."""
    if len(t) == 1:
        return t.index_select(dim, index[0])
    shape = [len(t), *[1] * (t.ndim - 1)]
    shape[dim] = index.shape[1]
    sizes = [*t.shape]
    sizes[dim] = index.shape[1]
    return t.gather(dim, index.reshape(shape).expand(sizes))


def repair_lstsq(
    traced: Traced, plan: PrunePlan, module: fx.GraphModule, statistics: Statistics
) -> RepairReport:
    """:class:`LeastSquares` for one plan; ``module``, the cut of ``plan``, changes in place."""
    return LeastSquares(traced, statistics).apply(plan, module)
