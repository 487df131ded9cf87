"""nn.LSTM, nn.GRU and nn.RNN: labels of a whole recurrent layer, at once for all time steps.

A hidden unit is one row of every gate, one column of the recurrent weight, one entry of the state
and one channel of what the layer gives. It is zero for ever once its rows are zero (with a state
that starts at zero there), so it can go. All layers and directions of a module have one hidden
size: they lose equally many units, each its own.

Legend: I inputs, H hidden units, R units of the state (H, or the projection's), G gates,
L layers times directions, D directions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fxprune.coupling.labels import Contraction, Fields, Labels, varying
from fxprune.types import IntArray

_FIXED = "read by a recurrent layer together with values whose channels are fixed"


def recurrent(labels: Labels, module: nn.RNNBase, args: Any, kwargs: Any, result: Any) -> None:
    """Carry labels over one call of a recurrent module, which has run."""
    given = dict(zip(("input", "hx"), args, strict=False)) | kwargs
    x, out = (t.data if isinstance(t, PackedSequence) else t for t in (given["input"], result[0]))
    states = _all(given.get("hx"))
    below = _last(labels, x)
    steps = x.numel() // x.shape[-1]
    hidden: list[IntArray] = []
    units: list[IntArray] = []
    above = np.zeros(0, dtype=np.int64)
    for names in _by_layer(module):
        side: list[IntArray] = []
        for own in names:
            weights = {n.split("_l")[0]: getattr(module, n) for n in own}
            h, r = _cell(labels, weights, below, steps)
            hidden.append(h)
            units.append(r)
            side.append(r)
        below = above = np.concatenate(side)
    for many in (hidden, units):
        labels.rect(np.stack(many), 1)
    labels.put(out, [above.reshape([1] * (out.dim() - 1) + [-1])])
    vanishing = all(labels.vanishes(s) for s in states)
    for i, made in enumerate(_all(result[1])):  # h, and the cell state of an LSTM
        at = np.stack(hidden if i else units)
        field = at.reshape([len(at)] + [1] * (made.dim() - 2) + [-1])
        if states:
            _begins(labels, states[i], field)
        labels.put(made, [field])
        if vanishing:
            labels.vanish(made)
    if vanishing:
        labels.vanish(out)


def _cell(
    labels: Labels, weights: dict[str, Tensor], below: IntArray | None, steps: int
) -> tuple[IntArray, IntArray]:
    """([H] hidden units, [R] what is given) of one layer in one direction."""
    w_ih, w_hh, w_hr = (weights.get(n) for n in ("weight_ih", "weight_hh", "weight_hr"))
    assert w_ih is not None and w_hh is not None
    size = w_hh.shape[1] if w_hr is None else w_hr.shape[1]
    rows = [_along(labels, t, 0).reshape(-1, size) for n, t in weights.items() if n != "weight_hr"]
    hidden = rows[0][0]
    for gates in rows:
        labels.union(hidden, gates)
    given = hidden
    if w_hr is not None:
        given = _along(labels, w_hr, 0)
        labels.union(hidden, _along(labels, w_hr, 1))
        labels.lock(hidden, "torch wants more hidden units than a projection gives")
    labels.union(given, _along(labels, w_hh, 1))
    inputs = _along(labels, w_ih, 1)
    if below is None:
        labels.lock(inputs, _FIXED)
    else:
        labels.union(below, inputs)
    gates = rows[0].reshape(-1, 1)
    pairs = [(gates, inputs), (gates, given)]
    if w_hr is not None:
        pairs.append((given, hidden))
    for a, b in pairs:
        dims = (a.reshape(-1, 1), b.reshape(-1, 1))
        labels.facts.contractions.append(Contraction(steps, dims))
    return hidden, given


def _along(labels: Labels, t: Tensor, dim: int) -> IntArray:
    """[size] the labels of a parameter along one dim."""
    found = [f for f in labels.of(t) if varying(f) == {dim}]
    if found:
        return found[0].ravel()
    fresh = labels.new(t.shape[dim])  # one row, or no labels at all: nothing may go
    labels.lock(fresh, "one channel: nothing to choose from")
    return fresh


def _last(labels: Labels, t: Tensor) -> IntArray | None:
    """[C] the labels along the last dim; others are locked."""
    kept: IntArray | None = None
    for f in labels.of(t):
        dims = varying(f)
        if t.dim() - 1 not in dims:
            labels.lock(f, "time steps or samples of a recurrent layer")
        else:
            kept = labels.merge(f, dims - {t.dim() - 1}).ravel()
    return kept


def _begins(labels: Labels, state: Tensor, field: IntArray) -> None:
    """A state [L, N, R] from which the layer starts."""
    unit, layer = state.dim() - 1, 0
    fields: Fields = labels.of(state)
    with_units = [f for f in fields if unit in varying(f)]
    for f in fields:
        if unit not in varying(f):
            labels.lock(f, "layers or samples of a recurrent layer")
        elif varying(f) <= {unit, layer}:
            labels.union(f, field)
        else:
            labels.union(labels.merge(f, varying(f) - {unit, layer}), field)
    if not with_units:
        labels.lock(field, "starts from a state whose channels are fixed")


def _all(states: Any) -> list[Tensor]:
    """h, or h and c."""
    if states is None:
        return []
    return [states] if isinstance(states, Tensor) else list(states)


def _by_layer(module: nn.RNNBase) -> list[list[list[str]]]:
    """Names of the parameters: for each layer, for each direction."""
    sides = 2 if module.bidirectional else 1
    names = module._all_weights
    return [names[i : i + sides] for i in range(0, len(names), sides)]
