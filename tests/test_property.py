"""Random networks under random plans: right, or locked."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from graphs import Seeded
from graphs_check import check_program, random_program
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fxprune.traced import trace

SEEDED = 150
DRAWN = 50


@dataclass
class Drawn:
    """Choices from hypothesis, which can shrink them."""

    data: st.DataObject

    def integer(self, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high))


@pytest.mark.parametrize("seed", range(SEEDED))
def test_seeded_network(seed: int) -> None:
    check_program(random_program(Seeded(seed)))


@settings(
    max_examples=DRAWN,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # benchmarks/property.py makes failures smaller, and faster
    suppress_health_check=list(HealthCheck),
)
@given(st.data())
def test_drawn_network(data: st.DataObject) -> None:
    check_program(random_program(Drawn(data), most=6), plans=1)


def test_networks_can_be_pruned() -> None:
    """The generator is no proof if all is locked: most networks have groups that may go."""
    counts = []
    for seed in range(30):
        program = random_program(Seeded(seed))
        traced = trace(program.build(), program.example())
        counts.append(sum(g.locked is None for g in traced.groups))
    assert sum(c > 0 for c in counts) >= 25
    assert sum(counts) >= 60
