"""The loss of one batch: cross-entropy with the targets, distillation from the teacher, or both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fxprune.errors import DataError, InputError
from fxprune.fitness import floating
from fxprune.imitate import Target
from fxprune.tune.options import Tuning

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Objective:
    """``loss``: the user's ``loss(output, targets)``; None: cross-entropy."""

    tuning: Tuning
    loss: Loss | None = None

    def __call__(self, output: Any, targets: Any, teacher: Target | None) -> Tensor:
        """One number with a gradient. ``targets`` and ``teacher``: None where there are none."""
        share = self.tuning.distill
        parts: list[tuple[float, Tensor]] = []
        if targets is not None and (share < 1 or teacher is None):
            hard = self._hard(output, targets)
            parts.append((1.0 if teacher is None else 1 - share, hard))
        if teacher is not None and (share > 0 or targets is None):
            soft = self._soft(output, teacher)
            parts.append((1.0 if targets is None else share, soft))
        if not parts:
            raise DataError(
                "a batch has no targets and there is no teacher, so there is nothing to learn "
                "from; give (inputs, targets), or teacher=the original model"
            )
        return sum((w * p for w, p in parts[1:]), parts[0][0] * parts[0][1])

    def _hard(self, output: Any, targets: Any) -> Tensor:
        if self.loss is not None:
            found = self.loss(output, targets)
            if not isinstance(found, Tensor) or found.numel() != 1:
                raise InputError(f"loss(output, targets) must give a tensor of one number: {found}")
            return found.squeeze()
        smooth = self.tuning.label_smoothing
        x = _main(output)
        if isinstance(targets, Tensor) and not targets.is_floating_point() and x.ndim > 1:
            if (len(x), *x.shape[2:]) == targets.shape:
                return F.cross_entropy(x.float(), targets.long(), label_smoothing=smooth)
            if x.shape[:-1] == targets.shape:  # classes last, as for tokens
                flat = x.float().flatten(0, -2), targets.long().flatten()
                return F.cross_entropy(*flat, label_smoothing=smooth)
        found_targets = (
            f"{targets.dtype} {list(targets.shape)}"
            if isinstance(targets, Tensor)
            else type(targets).__name__
        )
        raise DataError(
            f"targets ({found_targets}) are no class numbers for outputs {list(x.shape)}; give "
            "loss=, a function of (output, targets), or data without targets to distil alone"
        )

    def _soft(self, output: Any, teacher: Target) -> Tensor:
        if len(teacher.outputs) == 1 and not isinstance(output, Tensor):
            output = _main(output)
        return teacher.loss(output, self.tuning.temperature)


def _main(output: Any) -> Tensor:
    """The output, or its first floating tensor: in training some nets give auxiliary ones too."""
    found = next(floating(output), None)
    if found is None:
        raise DataError(
            f"the model's output ({type(output).__name__}) holds no floating tensor to learn by; "
            "give loss=, a function of (output, targets)"
        )
    return found
