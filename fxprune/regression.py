"""The original's inputs of a consumer, regressed on those of the pruned model; the ridge is chosen.

With X the original's input, X' the pruned model's and B X' a first guess (the kept channels in
their places, and what the one-shot form makes of the removed ones), find D that is best in

    | W (X - (B + D) X') |^2 + lambda |W D|^2,    D = S_(X - B X'),X' (S_X'X' + lambda I)^-1.

How large lambda has to be depends on how many samples speak for how many channels, and differs from
layer to layer by a factor of 1,000. So lambda and the guess are chosen by the error that they leave
at the consumer's *output* on samples that take no part in the fit. Leaving the weights of the cut
alone is one of the choices: a repair that makes its layer worse on new samples is dropped.

Legend for shapes: S rows (samples x positions), g convolution groups that stay, v variables of each
in the original, k of them kept; f outputs, or mixtures of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from fxprune.errors import InternalError
from fxprune.moments import CHUNK
from fxprune.repair import RIDGE, Solved
from fxprune.types import BoolArray

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # tried, as shares of the mean variance of the kept inputs
AT_ONCE = 1 << 24  # numbers of regressions that are held at a time
Sums: TypeAlias = list[Tensor]


class Cannot(Exception):
    """Why a consumer cannot be treated; never reaches a caller."""


@dataclass(frozen=True)
class Joint:
    """Moments over ``count`` rows, float64.

    rest [g, v], mean [g, k]: the means of X - E X' and of X'; across [g, v, k], inside [g, k, k]:
    their second moments, about the means or about zero.
    """

    count: int
    rest: Tensor
    mean: Tensor
    across: Tensor
    inside: Tensor

    def about(self, guess: Tensor | None) -> Tensor:
        """The moments of X - (E + guess) X' with X' [g, v, k]."""
        return self.across if guess is None else self.across - guess @ self.inside

    def fits(self, ridges: Sequence[float], guess: Tensor | None) -> Iterator[Tensor]:
        """``guess`` + D, for some ridges at a time [n, g, v, k]."""
        across = self.about(guess)
        step = max(1, AT_ONCE // max(1, across.numel() + self.inside.numel()))
        mean = self.inside.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
        for i in range(0, len(ridges), step):
            level = torch.tensor(ridges[i : i + step], dtype=mean.dtype)[:, None] * mean
            inside = self.inside.repeat(len(level), 1, 1, 1)
            inside.diagonal(dim1=2, dim2=3).add_(level[:, :, None])
            found = _solved(inside, across)
            yield found if guess is None else found.add_(guess)

    def fit(self, ridge: float, guess: Tensor | None) -> Tensor:
        """``guess`` + D [g, v, k]."""
        return next(self.fits([ridge], guess))[0]

    def seen_by(self, outputs: Tensor) -> Joint:
        """The same for ``outputs`` [g, f, v] of X - E X', in the place of its variables."""
        rest = (outputs @ self.rest[:, :, None])[:, :, 0]
        return Joint(self.count, rest, self.mean, outputs @ self.across, self.inside)

    def left(self, found: Tensor) -> Tensor:
        """[*, g, v] means of X - (E + found) X' for some ``found`` [*, g, v, k]."""
        return self.rest - (found @ self.mean[:, :, None])[..., 0]

    def errors(self, found: Tensor) -> Tensor:
        """[n]: |X - (E + found) X'|^2 less |X - E X'|^2 for some ``found`` [n, g, v, k]."""
        return (found * (found @ self.inside - 2 * self.across)).sum((1, 2, 3))


def _solved(inside: Tensor, across: Tensor) -> Tensor:
    """[n, g, v, k]: across [g, v, k] inside^-1 for several ``inside`` [n, g, k, k]."""
    factor, failed = torch.linalg.cholesky_ex(inside)
    if not bool(failed.any()):
        wide = across.transpose(1, 2).expand(len(inside), -1, -1, -1)
        return torch.cholesky_solve(wide, factor).transpose(2, 3)
    found = [
        across @ torch.linalg.pinv(m, hermitian=True)
        if bool(f.any())
        else _solved(m[None], across)[0]
        for m, f in zip(inside, failed, strict=True)
    ]
    return torch.stack(found)


class Folds:
    """Streaming moments of rows and of what is to be fitted from them, in two folds.

    Products are float32 where the rows are, around a point near the mean; sums are float64.
    """

    def __init__(self) -> None:
        self.shifts: tuple[Tensor, Tensor] | None = None
        self.sums: tuple[Sums, Sums] = ([], [])
        self.counts = [0, 0]

    def add(self, rest: Tensor, y: Tensor, fold: int) -> None:
        """``rest`` [S, g, v] is to be fitted from ``y`` [S, g, k]; fold 1 is held out."""
        if self.shifts is None:
            self.shifts = rest.mean(0), y.mean(0)
        sums = self.sums[fold]
        for r, k in zip(rest.split(CHUNK), y.split(CHUNK), strict=True):
            k = k - self.shifts[1]
            both = torch.cat([r - self.shifts[0], k], 2)
            if k.shape[1] == 1:
                second = (k[:, 0].t() @ both[:, 0])[None]
            else:
                second = torch.einsum("sgk,sgb->gkb", k, both)
            wide = [p.double().cpu() for p in (both.sum(0), second)]
            sums[:] = [a + b for a, b in zip(sums, wide, strict=True)] if sums else wide
        self.counts[fold] += len(rest)

    def joint(self, folds: Sequence[int], centred: bool) -> Joint:
        """The moments over all rows of some folds."""
        if self.shifts is None:
            raise InternalError("a regression without a row")
        count = sum(self.counts[f] for f in folds)
        parts = [self.sums[f] for f in folds if self.counts[f]]
        total = [torch.stack(p).sum(0) if len(p) > 1 else p[0] for p in zip(*parts, strict=True)]
        first, second = (s / count for s in total)
        sizes = [t.shape[1] for t in self.shifts]
        rest, mean = first.split(sizes, 1)
        across, inside = second.split(sizes, 2)
        across = across.transpose(1, 2)
        across = across - rest[:, :, None] * mean[:, None]
        inside = inside - mean[:, :, None] * mean[:, None]
        rest, mean = rest + self.shifts[0].double().cpu(), mean + self.shifts[1].double().cpu()
        if not centred:
            across = across + rest[:, :, None] * mean[:, None]
            inside = inside + mean[:, :, None] * mean[:, None]
        return Joint(count, rest, mean, across, inside)

    def chosen(
        self, centred: bool, outputs: Tensor | None, guesses: Sequence[Tensor] = ()
    ) -> Choice:
        """What leaves the least error on the held-out rows.

        ``outputs`` [g, f, v]: see :meth:`Pair.solve`; None: the variables themselves count.
        """
        fitted, held = self.joint((0,), centred), self.joint((1,), centred)
        if outputs is not None:
            fitted, held = fitted.seen_by(outputs), held.seen_by(outputs)
        best = Choice(None, None, False, float("inf"))
        for guess in (None, *guesses):
            seen = torch.zeros_like(held.across)
            if guess is not None:
                seen = guess if outputs is None else outputs @ guess
            tried: Iterator[Tensor] = chain([seen[None]], fitted.fits(RIDGES, seen))
            ridges = iter((None, *RIDGES))
            for found in tried:
                left = held.left(found)
                moved = (left - fitted.left(found)).square().sum((1, 2))
                still = left.square().sum((1, 2))
                errors = held.errors(found) + (torch.minimum(moved, still) if centred else 0.0)
                mean = moved < still
                for error, moves in zip(errors.tolist(), mean.tolist(), strict=True):
                    ridge = next(ridges)
                    if error < best.error:
                        best = Choice(ridge, guess, centred and moves, error)
        return best


@dataclass(frozen=True)
class Choice:
    """ridge: None: the guess as it is; guess: None: E X'; mean: whether the mean moves; error."""

    ridge: float | None
    guess: Tensor | None
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
