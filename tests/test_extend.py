"""A user's own ops, calls and modules: locked without a rule, right with one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import assert_right, prunable
from oracle import random_plan, randomise
from torch import Tensor, nn

import fxprune
from fxprune import extend, leaves, rewrite
from fxprune.coupling import rules
from fxprune.cut import cut
from fxprune.errors import SpecError
from fxprune.traced import Traced, trace


@pytest.fixture(autouse=True)
def _tables_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is gone after it."""
    before = [(t, dict(t)) for t in (rules.RULES, rewrite.HANDLERS, leaves._FITS)]
    yield
    for table, content in before:
        table.clear()
        table.update(content)


@torch.library.custom_op("fxprune_tests::swish", mutates_args=())
def swish(x: Tensor) -> Tensor:
    return x * x.sigmoid()


@torch.library.custom_op("fxprune_tests::blend", mutates_args=())
def blend(x: Tensor, y: Tensor) -> Tensor:
    return 0.25 * x + 0.75 * y


@torch.library.custom_op("fxprune_tests::heads", mutates_args=())
def as_heads(x: Tensor, heads: int, dim: int) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], heads, dim).clone()


class Ops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = (nn.Conv2d(3, 8, 3, padding=1) for _ in range(2))
        self.b = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.ops.fxprune_tests.blend(swish(self.a(x)), self.c(x)))


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.scale = nn.Linear(6, 12), nn.Parameter(torch.randn(3, 1))
        self.b = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.fxprune_tests.heads(self.a(x), 3, 4) * self.scale
        return self.b(y.flatten(2))


class ScaledLinear(nn.Module):
    """Reads its width from an attribute."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.weight, self.width = nn.Parameter(torch.randn(o, i)), o
        self.shift = nn.Parameter(torch.randn(o))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.shift.expand(x.shape[0], self.width)


class Leaves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = ScaledLinear(6, 10), ScaledLinear(10, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).relu()).relu())


def traced_of(model: nn.Module, *shape: int) -> tuple[Traced, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    x = torch.randn(*shape, dtype=torch.float64)
    return trace(randomise(model.double()), x), (x,)


def held_to_the_oracle(traced: Traced, inputs: Any) -> None:
    for seed in range(3):
        plan = random_plan(traced, seed)
        assert_right(traced, plan, cut(traced, plan), [inputs])


def test_unknown_ops_lock_and_say_so() -> None:
    traced, _ = traced_of(Ops(), 2, 3, 6, 6)
    assert not {"a.weight:0", "c.weight:0"} & prunable(traced)
    assert "no rule for op fxprune_tests.swish" in traced.locked["a"]


def test_ops_with_a_rule() -> None:
    @extend.op("fxprune_tests.swish")
    def rule(labels: Any, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        labels.put(out, labels.of(args[0]))

    extend.op("fxprune_tests.blend")(extend.elementwise)
    traced, inputs = traced_of(Ops(), 2, 3, 6, 6)
    assert {"a.weight:0", "c.weight:0", "b.weight:1"} <= prunable(traced)
    held_to_the_oracle(traced, inputs)


def test_calls_with_a_handler() -> None:
    @extend.op("fxprune_tests.heads")
    def rule(labels: Any, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        fields = [f.reshape(1, 1, *out.shape[2:]) for f in labels.of(args[0])]
        for f in fields:
            labels.rect(f, 3)
        labels.put(out, fields)

    @extend.call("heads")
    def handler(rewriter: Any, old: Any, new: Any) -> None:
        heads, dim = rewriter.sizes.shape(rewriter.sizes.old(old))[2:]
        new.args = (new.args[0], heads, dim)

    traced, inputs = traced_of(Heads(), 2, 5, 6)
    assert {"a.weight:0", "b.weight:1", "scale:0"} <= prunable(traced)
    held_to_the_oracle(traced, inputs)


def test_a_leaf_module_with_its_attributes() -> None:
    @extend.leaf(ScaledLinear)
    def fit(module: ScaledLinear, kept: Any) -> None:
        module.width = module.weight.shape[0]

    traced, inputs = traced_of(Leaves(), 4, 6)
    assert {"a.weight:0", "a.shift:0", "b.weight:1", "b.weight:0"} <= prunable(traced)
    held_to_the_oracle(traced, inputs)
    small = cut(traced, random_plan(traced, 0, 0.5))
    assert (small.a.width, small.b.width) == (5, 4)


def test_a_second_rule_is_refused() -> None:
    extend.leaf(ScaledLinear)(lambda module, kept: None)
    with pytest.raises(SpecError, match="a second one is refused"):
        extend.leaf(ScaledLinear)(lambda module, kept: None)
    with pytest.raises(SpecError, match=r"aten\.view"):
        extend.op("aten.view")(extend.elementwise)


def test_criteria_and_allocations_of_the_documentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # one of them writes a journal
    text = (Path(__file__).parent.parent / "docs" / "extending.md").read_text(encoding="utf-8")
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(576, 4)).eval()
    with torch.no_grad():
        model[0].weight[:8] *= 1e-3
        model[0].bias[:8] = 0.5
        model[2].weight[:, :8] *= 1e-3
    g = torch.Generator().manual_seed(1)
    data = [torch.randn(8, 1, 8, 8, generator=g) for _ in range(4)]
    names = {"fxprune": fxprune, "model": model, "x": data[0][:1], "data": data}
    plans = []
    for code in re.findall(r"```python\n(.*?)```", text[text.index("## A criterion") :], re.S):
        exec(code, names)
        result: Any = names["result"]
        plans.append(result.plan)
        share = result.after.macs / result.before.macs
        assert share <= (0.6 if "halves" in code else 0.5)
    assert len(plans) == 4
    for plan in plans[:2]:  # the weak half goes first
        assert sum(i >= 8 for i in plan.kept["0"]) >= sum(i < 8 for i in plan.kept["0"])
    assert [len(plans[2].kept[k]) for k in ("0", "2")] == [8, 8]
    assert plans[3].meta["allocation"] == "mine" and (tmp_path / "mine.jsonl").is_file()
