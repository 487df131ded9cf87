"""Copies of module trees against copy.deepcopy."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.copies import copied


class Odd(nn.Module):
    """Attributes of all kinds; one module under two names, one buffer in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = self.a
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("table", torch.randn(4, 3))
        self.register_buffer("head", self.table[:2])  # shares memory
        self.register_buffer("none", None)
        self.cache: dict[str, Any] = {"x": [1, 2], "module": [self.a]}
        self.sizes, self.names, self.empty = (1, 2), ["p"], OrderedDict()
        self.again = {"table": self.table}

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.b(self.a(x))) + self.table[0]


class Counted(nn.Module):
    """Copies itself in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.copies, self.layer = 0, nn.Linear(2, 2)

    def __deepcopy__(self, memo: dict[int, Any]) -> Counted:
        made = Counted()
        made.copies = self.copies + 1
        made.layer = copy.deepcopy(self.layer, memo)
        return made


def test_structure_and_values_are_those_of_a_deep_copy() -> None:
    torch.manual_seed(0)
    model = Odd().eval()
    new, reference = copied(model, {}), copy.deepcopy(model)
    x = torch.randn(5, 3)
    assert torch.equal(new(x), reference(x))
    assert list(new.state_dict()) == list(reference.state_dict())
    assert new.b is new.a
    assert new.cache["module"][0] is new.a
    assert new.again["table"] is new.table
    assert new.head.untyped_storage().data_ptr() == new.table.untyped_storage().data_ptr()
    assert (new.sizes, new.names, new.none) == (model.sizes, model.names, None)
    assert not new.training


def test_nothing_mutable_is_shared() -> None:
    model = Odd()
    new = copied(model, {})
    assert new.names is not model.names
    assert new.cache["x"] is not model.cache["x"]
    assert new.empty is not model.empty
    new.table.zero_()
    new.norm.running_mean.add_(1)
    with torch.no_grad():
        new.a.weight.zero_()
    new.a.register_forward_hook(lambda *_: None)
    assert model.table.abs().sum() > 0
    assert float(model.norm.running_mean.abs().sum()) == 0
    assert model.a.weight.abs().sum() > 0
    assert not model.a._forward_hooks


def test_given_replacements_are_taken() -> None:
    model = Odd()
    new = copied(model, {id(p): p for p in model.parameters()})
    assert all(a is b for a, b in zip(new.parameters(), model.parameters(), strict=True))
    assert new.table is not model.table


def test_a_module_that_copies_itself_does() -> None:
    model = nn.Sequential(Counted(), nn.ReLU())
    new = copied(model, {})
    assert new[0].copies == 1
    assert torch.equal(new[0].layer.weight, model[0].layer.weight)
    assert new[0].layer is not model[0].layer
