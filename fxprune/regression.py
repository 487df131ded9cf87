"""The original's inputs of a consumer, regressed on those of the pruned model; the ridge is chosen.

With X the original's input, X' the pruned model's and B X' a first guess (the kept channels in
their places, and what the one-shot form makes of the removed ones), find D that is best in

    | W (X - (B + D) X') |^2 + lambda |W D|^2,    D = S_(X - B X'),X' (S_X'X' + lambda I)^-1,
    B - E + D = (S_(X - E X'),X' + lambda (B - E)) (S_X'X' + lambda I)^-1,    E X' the kept ones.

How large lambda has to be depends on how many samples speak for how many channels, and differs from
layer to layer by a factor of 1,000. So lambda and the guess are chosen by the error that they leave
at the consumer's *output* on samples that take no part in the fit. Leaving the weights of the cut
alone is one of the choices: a repair that makes its layer worse on new samples is dropped.

Legend for shapes: S rows (samples x positions), g convolution groups that stay, v variables of each
in the original, k of them kept; f outputs, or mixtures of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from fxprune.errors import InternalError
from fxprune.moments import CHUNK, STRIPES, mirror
from fxprune.repair import RIDGE, Solved
from fxprune.types import BoolArray

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # tried, as shares of the mean variance of the kept inputs
KEPT = 1 << 21  # numbers of a factor that is kept for the next regression on the same rows
Sums: TypeAlias = list[Tensor]


class Cannot(Exception):
    """Why a consumer cannot be treated; never reaches a caller."""


@dataclass(frozen=True)
class Joint:
    """Moments over ``count`` rows, float64.

    rest [g, v], mean [g, k]: the means of X - E X' and of X'; across [g, v, k], inside [g, k, k]:
    their second moments, about the means or about zero; solvers: ridge -> the Cholesky factor of
    inside + lambda I, or (False) its inverse.
    """

    count: int
    rest: Tensor
    mean: Tensor
    across: Tensor
    inside: Tensor
    solvers: dict[float, tuple[Tensor, bool]]

    def fits(self, ridge: float, guesses: Tensor) -> Tensor:
        """Each of the ``guesses`` [q, g, v, k] + D [q, g, v, k]."""
        drawn = self.across + self._level(ridge)[:, None, None] * guesses
        found = self._solved(ridge, drawn.transpose(0, 1).flatten(1, 2))
        each: Tensor = found.unflatten(1, (len(guesses), -1)).transpose(0, 1)
        return each

    def fit(self, ridge: float, guess: Tensor | None) -> Tensor:
        """``guess`` + D [g, v, k]."""
        if guess is None:
            return self._solved(ridge, self.across)
        return self.fits(ridge, guess[None])[0]

    def _level(self, ridge: float) -> Tensor:
        """[g]: lambda."""
        return ridge * self.inside.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)

    def _solved(self, ridge: float, across: Tensor) -> Tensor:
        """[g, v, k]: across [g, v, k] (inside + lambda I)^-1."""
        known = self.solvers.get(ridge)
        if known is None:
            inside = self.inside.clone()
            inside.diagonal(dim1=1, dim2=2).add_(self._level(ridge)[:, None])
            factor, failed = torch.linalg.cholesky_ex(inside)
            known = factor, not bool(failed.any())
            if not known[1]:
                known = torch.linalg.pinv(inside, hermitian=True), False
            if inside.numel() <= KEPT:
                self.solvers[ridge] = known
        if not known[1]:
            return across @ known[0]
        return torch.cholesky_solve(across.transpose(1, 2), known[0]).transpose(1, 2)

    def seen_by(self, outputs: Tensor) -> Joint:
        """The same for ``outputs`` [g, f, v] of X - E X', in the place of its variables."""
        rest = (outputs @ self.rest[:, :, None])[:, :, 0]
        return replace(self, rest=rest, across=outputs @ self.across)

    def left(self, found: Tensor) -> Tensor:
        """[*, g, v] means of X - (E + found) X' for some ``found`` [*, g, v, k]."""
        return self.rest - (found @ self.mean[:, :, None])[..., 0]

    def errors(self, found: Tensor) -> Tensor:
        """[*]: |X - (E + found) X'|^2 less |X - E X'|^2 for some ``found`` [*, g, v, k]."""
        by_group = found.movedim(-3, 0)
        seen = (by_group.flatten(1, -2) @ self.inside).view(by_group.shape).movedim(0, -3)
        errors: Tensor = (found * (seen - 2 * self.across)).sum((-3, -2, -1))
        return errors


def _turned(t: Tensor) -> Tensor:
    """[S, g, v] -> [g, v, S]: the rows of many small products next to each other."""
    t = t.permute(1, 2, 0)
    return t if len(t) == 1 else t.contiguous()


def _inside(k: Tensor) -> Tensor:
    """[g, k, k] products of ``k`` [g, k, S]; of one group alone the upper part, by stripes."""
    if len(k) > 1:
        return torch.bmm(k, k.transpose(1, 2))
    one = k[0]
    found = torch.zeros(len(one), len(one), dtype=k.dtype, device=k.device)
    step = max(64, -(-len(one) // STRIPES))
    for at in range(0, len(one), step):
        found[at : at + step, at:] = one[at : at + step] @ one[at:].t()
    return found[None]


class Folds:
    """Streaming moments of rows and of what is to be fitted from them, in two folds.

    Products are float32 where the rows are, around a point near the mean; sums are float64.
    ``known``: sums over the same rows, with what else was fitted from them; what only the rows
    decide is not computed once more.
    """

    def __init__(self, known: Folds | None = None) -> None:
        self.known = known
        self.shifts: tuple[Tensor, Tensor] | None = None
        self.sums: tuple[Sums, Sums] = ([], [])
        self.counts = [0, 0]
        self.joints: dict[tuple[tuple[int, ...], bool], Joint] = {}

    def add(self, rest: Tensor, y: Tensor, fold: int) -> None:
        """``rest`` [S, g, v] is to be fitted from ``y`` [S, g, k]; fold 1 is held out."""
        if self.shifts is None:
            known = None if self.known is None else self.known.shifts
            self.shifts = rest.mean(0), y.mean(0) if known is None else known[1]
        self.joints.clear()
        sums = self.sums[fold]
        for r, k in zip(rest.split(CHUNK), y.split(CHUNK), strict=True):
            r, k = (_turned(t - s) for t, s in zip((r, k), self.shifts, strict=True))
            new = [r.sum(2), r @ k.transpose(1, 2)]
            if self.known is None:
                new += [k.sum(2), _inside(k)]
            wide = [p.double().cpu() for p in new]
            sums[:] = [a.add_(b) for a, b in zip(sums, wide, strict=True)] if sums else wide
        self.counts[fold] += len(rest)

    def joint(self, folds: tuple[int, ...], centred: bool) -> Joint:
        """The moments over all rows of some folds."""
        if (folds, centred) not in self.joints:
            self.joints[folds, centred] = self._joint(folds, centred)
        return self.joints[folds, centred]

    def _joint(self, folds: tuple[int, ...], centred: bool) -> Joint:
        if self.shifts is None:
            raise InternalError("a regression without a row")
        count = sum(self.counts[f] for f in folds)
        parts = [self.sums[f] for f in folds if self.counts[f]]
        rest, across, *own = (sum(p[1:], p[0]) / count for p in zip(*parts, strict=True))
        shifts = [s.double().cpu() for s in self.shifts]
        solvers: dict[float, tuple[Tensor, bool]] = {}
        if self.known is None:
            offset, inside = own
            if len(inside) == 1:
                mirror(inside[0])
            inside = inside - offset[:, :, None] * offset[:, None]
            mean = offset + shifts[1]
            inside = inside if centred else inside + mean[:, :, None] * mean[:, None]
        else:
            known = self.known.joint(folds, centred)
            if known.count != count:
                raise InternalError("moments of other rows")
            mean, inside, solvers = known.mean, known.inside, known.solvers
            offset = mean - shifts[1]
        across = across - rest[:, :, None] * offset[:, None]
        rest = rest + shifts[0]
        across = across if centred else across + rest[:, :, None] * mean[:, None]
        return Joint(count, rest, mean, across, inside, solvers)

    def chosen(
        self, centred: bool, outputs: Tensor | None, guesses: Sequence[Tensor] = ()
    ) -> Choice:
        """What leaves the least error on the held-out rows.

        ``outputs`` [g, f, v]: see :meth:`Pair.solve`; None: the variables themselves count.
        """
        fitted, held = self.joint((0,), centred), self.joint((1,), centred)
        if outputs is not None:
            fitted, held = fitted.seen_by(outputs), held.seen_by(outputs)
        seen = [g if outputs is None else outputs @ g for g in guesses]
        start = torch.stack([torch.zeros_like(held.across), *seen])
        best = Choice(None, None, start[0], False, float("inf"))
        for ridge in (None, *RIDGES):
            found = start if ridge is None else fitted.fits(ridge, start)
            left = held.left(found)
            moved = (left - fitted.left(found)).square().sum((1, 2))
            still = left.square().sum((1, 2))
            errors = held.errors(found) + (torch.minimum(moved, still) if centred else 0.0)
            for i, guess in enumerate((None, *guesses)):
                if errors[i] < best.error:
                    mean = centred and bool(moved[i] < still[i])
                    best = Choice(ridge, guess, found[i], mean, float(errors[i]))
        return best


@dataclass(frozen=True)
class Choice:
    """What leaves the least error on the held-out rows.

    ridge: None: the guess as it is; guess: None: E X'; found [g, f, k]: what the outputs get on the
    rows of the first fold; mean: whether the mean moves.
    """

    ridge: float | None
    guess: Tensor | None
    found: Tensor
    mean: bool
    error: float


class Pair:
    """Moments of X' and of X - E X'.

    ``keep`` [groups, v]: the original's variables that are kept. A convolution group that keeps
    nothing is gone; the others keep equally many. ``unchanged``: whether X = E X' in every row;
    ``dropped``: whether no fit was better than E X' on the held-out rows.
    """

    def __init__(self, keep: BoolArray) -> None:
        self.keep = keep
        count = keep.sum(1)
        self.alive = torch.from_numpy(np.flatnonzero(count))
        widths = set(count[count > 0].tolist())
        if len(widths) != 1:
            raise Cannot(f"its convolution groups keep different numbers of inputs: {widths}")
        order = torch.from_numpy(np.argsort(~keep, axis=1, kind="stable"))
        self.kept = order[self.alive, : widths.pop()]
        self.unchanged, self.dropped = True, False
        self.folds = Folds()

    def add(self, x: Tensor, y: Tensor, fold: int = 0) -> None:
        """Rows of the original's input [S, V] and of the pruned model's [S, V']; 1: held out."""
        x, y = (t if t.dtype == torch.float64 else t.float() for t in (x, y))
        kept, alive = self.kept.to(x.device), self.alive.to(x.device)
        for part, k in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            rest = part.unflatten(1, self.keep.shape)
            rest = rest.clone() if len(alive) == len(self.keep) else rest[:, alive]
            k = k.unflatten(1, kept.shape)
            rest.scatter_add_(2, kept.expand(len(rest), -1, -1), -k)
            self.unchanged = self.unchanged and not bool((rest != 0).any())
            self.folds.add(rest, k, fold)

    def solve(
        self,
        ridge: float | None,
        centred: bool,
        outputs: Tensor | None = None,
        guesses: Sequence[Tensor] = (),
        refit: bool = True,
    ) -> Solved:
        """D [g, v, k] and the mean that it leaves [g, v]; for all variables, the kept ones too.

        ridge     None: chosen on the second fold, with the guess, by the error of ``outputs``
        outputs   [g, f, v]: what the consumer, or a sketch of it, makes of the variables
        guesses   [g, v, k], added to E; where nothing is chosen the last one counts
        refit     whether the rows of the second fold take part once the choice is made
        """
        counts = self.folds.counts
        whole = self.folds.joint((0, 1) if refit or counts[0] == 0 else (0,), centred)
        guess: Tensor | None = guesses[-1] if guesses else None
        mean = centred
        if ridge is not None or outputs is None or min(counts) == 0:
            found = whole.fit(RIDGE if ridge is None else ridge, guess)
        else:
            choice = self.folds.chosen(centred, outputs, guesses)
            guess, mean = choice.guess, choice.mean
            self.dropped = choice.ridge is None and guess is None
            if choice.ridge is not None:
                found = whole.fit(choice.ridge, guess)
            else:
                found = torch.zeros_like(whole.across) if guess is None else guess
        if not bool(found.isfinite().all()):
            raise Cannot("the moments of its input are not finite")
        offset = whole.left(found)
        every = torch.arange(self.keep.shape[1]).expand(len(self.alive), -1)
        return Solved(
            self.alive, self.kept, every, found, offset if mean else torch.zeros_like(offset)
        )
