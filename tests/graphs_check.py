"""What every random network is held to, and how a failing one is made smaller."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import graphs_tokens  # noqa: F401 - registers its blocks
import torch
from checks import assert_right
from graphs import Program, Step, random_program
from oracle import oracle_error, random_plan, randomise
from torch import nn
from torch.utils._pytree import tree_leaves

import fxprune
from fxprune.cut import cut
from fxprune.traced import trace
from fxprune.types import PrunePlan

__all__ = ["check_program", "random_program", "smaller"]


def check_program(program: Program, plans: int = 2) -> int:
    """Hold one network to everything; returns the number of groups that can be pruned."""
    model = randomise(program.build())
    traced = trace(model, program.example())
    inputs = [program.example(1), program.example(2, batch=3)]
    _check_whole(model, traced, inputs[0])
    for seed in range(plans):
        plan = random_plan(traced, seed)
        pruned = cut(traced, plan)
        einsum = any(s.options.get("kind") == "einsum" for s in program.steps)
        exact = not einsum or int(traced.counts(plan).min(initial=2)) > 1
        assert_right(traced, plan, pruned, inputs, exact_macs=exact)
    _check_repeatable(program, traced, plan, inputs[1])
    _check_trains(pruned, inputs[1])
    return sum(g.locked is None for g in traced.groups)


@torch.no_grad()
def _check_whole(
    model: nn.Module, traced: fxprune.Traced, inputs: tuple[torch.Tensor, ...]
) -> None:
    """Keeping all gives the same bits, and what the user's model gives."""
    whole = tree_leaves(cut(traced, traced.full_plan())(*copy.deepcopy(inputs)))
    graph = tree_leaves(traced.graph_module(*copy.deepcopy(inputs)))
    users = tree_leaves(model(*copy.deepcopy(inputs)))
    for a, b, c in zip(whole, graph, users, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-10, atol=1e-10)


def _check_repeatable(
    program: Program, traced: fxprune.Traced, plan: PrunePlan, inputs: tuple[torch.Tensor, ...]
) -> None:
    """The plan, as JSON, on two fresh instances: equal states, right as the user's class."""
    plan = PrunePlan.from_json(plan.to_json())
    one, two = (
        fxprune.apply(randomise(program.build()), plan, program.example()) for _ in range(2)
    )
    first, second = one.state_dict(), two.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[k], second[k]) for k in first)
    error = oracle_error(traced, plan, one, inputs)
    assert error <= 1e-10, f"relative error {error:.2e} as {type(one).__name__}; kept {plan.kept}"


def _check_trains(pruned: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """One step: gradients are finite and parameters move."""
    pruned.train()
    before = [p.detach().clone() for p in pruned.parameters()]
    loss = sum(t.square().mean() for t in tree_leaves(pruned(*inputs)))
    loss.backward()
    gradients = [p.grad for p in pruned.parameters()]
    assert any(g is not None for g in gradients)
    for p, g in zip(pruned.parameters(), gradients, strict=True):
        assert g is None or (g.shape == p.shape and bool(torch.isfinite(g).all()))
    torch.optim.SGD(pruned.parameters(), 0.1).step()
    moved = [not torch.equal(a, b) for a, b in zip(before, pruned.parameters(), strict=True)]
    assert any(moved)


# -- smaller programs ----------------------------------------------------------------------------


def _without(program: Program, gone: int) -> Program | None:
    """Without one block: its readers read its first input."""
    fresh = len(program.inputs)
    number = fresh + gone
    source = program.steps[gone].at[0]

    def moved(i: int) -> int:
        i = source if i == number else i
        return i - (i > number)

    steps: list[Step] = []
    for k, s in enumerate(program.steps):
        if k == gone:
            continue
        options = dict(s.options)
        if s.op == "Again":
            if options["which"] == gone:
                return None
            options["which"] -= options["which"] > gone
        steps.append(Step(s.op, tuple(moved(i) for i in s.at), options))
    heads = tuple(dict.fromkeys(h for h in map(moved, program.heads) if h >= fresh))
    return replace(program, steps=tuple(steps), heads=heads) if heads else None


def smaller(program: Program, fails: Callable[[Program], bool]) -> Program:
    """Drop heads and blocks as long as the program still fails."""
    again = True
    while again:
        again = False
        candidates = [replace(program, heads=(h,)) for h in program.heads if len(program.heads) > 1]
        candidates += [c for k in range(len(program.steps)) if (c := _without(program, k))]
        for c in candidates:
            if fails(c):
                program, again = c, True
                break
    return program
