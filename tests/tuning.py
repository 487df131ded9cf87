"""A small net that depends on order and random numbers, and its data."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import fxprune
from fxprune.isolate import rng_kept
from fxprune.tune import Tuning, finetune


class Net(nn.Module):
    """Normalisation, dropout: all that makes training depend on order and random numbers."""

    def __init__(self, drop: float = 0.2, norm: bool = True) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 32), nn.Linear(32, 4)
        self.norm = nn.BatchNorm1d(32) if norm else nn.Identity()
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.drop(F.relu(self.norm(self.one(x)))))


def net(**options: Any) -> nn.Module:
    with rng_kept(0):
        return Net(**options)


class Shaky(Dataset[tuple[Tensor, int]]):
    """Four directions in six dims, with noise from three libraries' global generators."""

    def __init__(self, n: int = 40) -> None:
        self.n = n
        self.centres = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        noise = torch.randn(6) * 0.1 + random.random() * 0.1 + np.random.rand() * 0.1  # noqa: NPY002
        return self.centres[i % 4] + noise.float(), i % 4


def loader(seed: int | None = 7, n: int = 40) -> DataLoader[Any]:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(Shaky(n), batch_size=8, shuffle=True, generator=generator)


def batches(n: int = 4, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(3)
    return [
        (torch.randn(size, 6, generator=g), torch.randint(0, 4, (size,), generator=g))
        for _ in range(n)
    ]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def tune(model: Any, data: Any, epochs: int = 2, **given: Any) -> fxprune.TuneResult:
    own = {k: given.pop(k) for k in list(given) if k in Tuning.__dataclass_fields__}
    return finetune(model, data, epochs, options=Tuning(**own), progress=False, **given)
