"""Options of fine-tuning, checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fxprune.errors import SpecError, unknown

OPTIMIZERS: Mapping[str, tuple[float, float]] = {"adamw": (5e-4, 0.01), "sgd": (0.01, 5e-4)}
"""Name -> (learning rate, weight decay) where none is given."""
PRECISIONS = ("auto", "no", "bf16", "fp16")


@dataclass(frozen=True)
class Tuning:
    """How :func:`fxprune.finetune` trains.

    optimizer        adamw, or sgd with Nesterov's momentum of 0.9
    lr               highest learning rate; None: 5e-4 for adamw, 0.01 for sgd
    weight_decay     of weights with two dims or more; None: 0.01 for adamw, 5e-4 for sgd
    warm_up          share of all steps in which the rate rises; half a cosine takes it to zero then
    distill          share of the distillation in the loss where there are targets too, in [0, 1]
    temperature      of the distillation's softmax
    label_smoothing  of the cross-entropy
    clip             longest gradient (2-norm over all parameters); None: never clipped
    ema              decay of an exponential moving average of the weights, which is then what is
                     evaluated and returned; None: no average
    mixed_precision  auto (bf16 or fp16 on a CUDA device, no on others), no, bf16, fp16
    seed             of the data's order and of everything random in the model
    """

    optimizer: str = "adamw"
    lr: float | None = None
    weight_decay: float | None = None
    warm_up: float = 0.05
    distill: float = 0.5
    temperature: float = 2.0
    label_smoothing: float = 0.0
    clip: float | None = 1.0
    ema: float | None = None
    mixed_precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", str(self.optimizer), OPTIMIZERS)
        if self.mixed_precision not in PRECISIONS:
            raise unknown("mixed precision", str(self.mixed_precision), PRECISIONS)
        _range("lr", self.lr, above=0)
        _range("weight_decay", self.weight_decay)
        _range("warm_up", self.warm_up, most=1)
        _range("distill", self.distill, most=1)
        _range("temperature", self.temperature, above=0)
        _range("label_smoothing", self.label_smoothing, most=1)
        _range("clip", self.clip, above=0)
        _range("ema", self.ema, below=1)
        if not isinstance(self.seed, int) or self.seed < 0:
            raise SpecError(f"tuning: seed must be a whole number from 0, got {self.seed!r}")

    @property
    def rate(self) -> float:
        return OPTIMIZERS[self.optimizer][0] if self.lr is None else self.lr

    @property
    def decay(self) -> float:
        found = self.weight_decay
        return OPTIMIZERS[self.optimizer][1] if found is None else found

    def share(self, step: int, steps: int) -> float:
        """Of the highest learning rate at step 0..steps - 1."""
        rise = round(self.warm_up * steps)
        if step < rise:
            return (step + 1) / (rise + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _range(
    name: str,
    value: Any,
    above: float | None = None,
    most: float = math.inf,
    below: float = math.inf,
) -> None:
    """SpecError unless ``value`` is None or a finite number from 0 (or above) to ``most``."""
    if value is None and name in ("lr", "weight_decay", "clip", "ema"):
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= most or value == above or not value < below:
        low = "at least 0" if above is None else f"above {above:g}"
        high = "" if most == math.inf else f" and at most {most:g}"
        high = high if below == math.inf else f" and below {below:g}"
        raise SpecError(f"tuning: {name} must be {low}{high}, got {value!r}")
