"""What correct means: the pruned model equals the masked original.

The masked original is the *unpruned* traced model with the removed positions of every parameter set
to zero (weights both ways, biases, affine parameters of norms), in which LayerNorm, RMSNorm and
GroupNorm take their statistics over the kept channels only. It shares no code with ``fxprune.cut``:
it knows the plan's masks and nothing of how a graph is rewritten.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import ParametrizationList

from fxprune.traced import Traced
from fxprune.trees import tensors
from fxprune.types import PrunePlan

_NORMS = ("layer_norm", "rms_norm", "group_norm")


class _Masked(fx.Interpreter):
    """Runs the original graph; norms see the kept channels only."""

    def __init__(
        self, gm: fx.GraphModule, keep: dict[str, Tensor], bare: dict[str, Tensor]
    ) -> None:
        super().__init__(gm)
        self.keep = keep  # parameter name -> bool mask over its whole shape
        self.bare = bare  # norm without parameters -> bool mask of what it normalises
        self.node: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        return super().run_node(n)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        m = self.fetch_attr(target)
        if isinstance(m, ParametrizationList):  # the weight is masked, not what it is made from
            weight = super().call_module(target, args, kwargs)
            for name, _ in m.named_parameters(recurse=False):
                mask = self.keep.get(f"{target}.{name}")
                if mask is not None and mask.shape == weight.shape:
                    weight = weight * mask
            return weight
        bare = self.bare.get(self.node.name)
        if bare is not None and isinstance(m, nn.GroupNorm):
            return _group_norm(args[0], m.num_groups, bare, None, None, m.eps)
        if bare is not None:
            return _over_kept(args[0], bare, None, None, m.eps, isinstance(m, nn.LayerNorm))
        if isinstance(m, nn.LayerNorm | nn.RMSNorm) and m.weight is not None:
            keep = self.keep.get(f"{target}.weight")
            if keep is not None:
                centre = isinstance(m, nn.LayerNorm)
                bias = m.bias if centre else None
                return _over_kept(args[0], keep, m.weight, bias, m.eps, centre)
        if isinstance(m, nn.GroupNorm) and f"{target}.weight" in self.keep:
            keep = self.keep[f"{target}.weight"]
            return _group_norm(args[0], m.num_groups, keep, m.weight, m.bias, m.eps)
        return super().call_module(target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(target, "__name__", "")
        if name in _NORMS:
            node_args = dict(enumerate(self.node.args)) | dict(self.node.kwargs)
            weight = node_args.get(2, node_args.get("weight"))
            keep = self.keep.get(_source(weight)) if isinstance(weight, fx.Node) else None
            keep = self.bare.get(self.node.name, keep)
            if keep is not None:
                values = dict(enumerate(args)) | kwargs
                w = values.get(2, values.get("weight"))
                bias = None if name == "rms_norm" else values.get(3, values.get("bias"))
                at = 3 if name == "rms_norm" else 4
                eps = values.get(at, values.get("eps", 1e-5))
                if name == "group_norm":
                    return _group_norm(args[0], values[1], keep, w, bias, eps)
                eps = torch.finfo(args[0].dtype).eps if eps is None else eps
                return _over_kept(args[0], keep, w, bias, eps, name == "layer_norm")
        return super().call_function(target, args, kwargs)


def _source(node: fx.Node) -> str:
    """The parameter that a weight is, or is made from (1 + weight)."""
    while node.op != "get_attr" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return str(node.target)


def _over_kept(
    x: Tensor, keep: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centre: bool
) -> Tensor:
    """``keep``: of the normalised dims; of the last one where it has as many dims as ``x``."""
    dims = (-1,) if keep.dim() == x.dim() else tuple(range(-keep.dim(), 0))
    count = keep.sum(dims, keepdim=True).clamp(min=1)
    mean = (x * keep).sum(dims, keepdim=True) / count if centre else 0.0
    var = ((x - mean) ** 2 * keep).sum(dims, keepdim=True) / count
    y = (x - mean) * torch.rsqrt(var + (torch.finfo(x.dtype).eps if eps is None else eps))
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _group_norm(
    x: Tensor, groups: int, keep: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    n, c = x.shape[:2]
    shape = [1, c] + [1] * (x.dim() - 2)
    m = keep.reshape(shape).expand_as(x).reshape(n, groups, -1).to(x.dtype)
    z = x.reshape(n, groups, -1)
    count = m.sum(2, keepdim=True).clamp(min=1)
    mean = (z * m).sum(2, keepdim=True) / count
    var = ((z - mean) ** 2 * m).sum(2, keepdim=True) / count
    y = ((z - mean) * torch.rsqrt(var + eps)).reshape(x.shape)
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


def _bare_norms(traced: Traced, mask: np.ndarray) -> dict[str, Tensor]:
    """Norms without parameters -> kept positions of what they normalise, by its own labels."""
    found: dict[str, Tensor] = {}
    for node in traced.graph_module.graph.nodes:
        kind = None
        if node.op == "call_module":
            m = traced.graph_module.get_submodule(node.target)
            norm = isinstance(m, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm)
            kind = type(m).__name__ if norm and m.weight is None else None
        elif node.op == "call_function" and getattr(node.target, "__name__", "") in _NORMS:
            named = node.kwargs.get("weight", node.args[2] if len(node.args) > 2 else None)
            kind = node.target.__name__ if named is None else None
        if kind is None:
            continue
        x = traced.coupling.values[node.args[0].name]
        grouped = kind in ("GroupNorm", "group_norm")
        along = 1 if grouped else len(x.shape) - 1
        keep = torch.ones([s if d == along else 1 for d, s in enumerate(x.shape)]).bool()
        for f in x.fields:
            kept = torch.from_numpy(mask[traced.coupling.cls[f]])
            elsewhere = any(s > 1 and d != along for d, s in enumerate(kept.shape))
            assert not (grouped and elsewhere), "labels elsewhere"
            keep = keep & kept
        found[node.name] = keep.flatten() if grouped else keep
    return found


def masked_original(traced: Traced, plan: PrunePlan) -> Any:
    """A callable ``f(*inputs)`` that computes the masked original."""
    mask = traced.masks(plan)
    gm = copy.deepcopy(traced.graph_module)
    tensors = dict(gm.named_parameters()) | dict(gm.named_buffers())
    keep: dict[str, Tensor] = {}
    with torch.no_grad():
        for (name, dim), classes in traced.param_classes.items():
            t = tensors[name]
            along = torch.from_numpy(mask[classes])
            shape = [len(along) if d == dim else 1 for d in range(t.dim())]
            one = along.reshape(shape).expand(t.shape)
            keep[name] = keep[name] & one if name in keep else one
        behind = {p for p, m in gm.named_modules() if isinstance(m, ParametrizationList)}
        for name, m in keep.items():  # of a removed channel a buffer may hold whatever it likes
            learned = isinstance(tensors[name], nn.Parameter)
            if learned and name.rpartition(".")[0] not in behind:
                tensors[name].mul_(m.to(tensors[name].dtype))
    names = dict(gm.named_parameters(remove_duplicate=False))
    by_id = {id(t): n for n, t in tensors.items()}
    keep |= {n: keep[by_id[id(t)]] for n, t in names.items() if by_id.get(id(t)) in keep}

    bare = _bare_norms(traced, mask)

    def run(*inputs: Any) -> Any:
        with torch.no_grad():
            return _Masked(gm, keep, bare).run(*copy.deepcopy(inputs))

    return run


def relative_error(expected: Any, actual: Any) -> float:
    """max |expected - actual| / max |expected|, the worst of all floating tensors."""
    a = [t for t in tensors(expected) if t.is_floating_point()]
    b = [t for t in tensors(actual) if t.is_floating_point()]
    assert len(a) == len(b) > 0, f"{len(a)} tensors expected, {len(b)} came"
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape, f"shape {tuple(x.shape)} expected, {tuple(y.shape)} came"
        assert bool(torch.isfinite(x).all()), "the masked original is not finite"
        assert bool(torch.isfinite(y).all()), "the pruned model is not finite"
        scale = float(x.abs().max())
        assert scale > 1e-12, "the masked original is all zero: the comparison says nothing"
        worst = max(worst, float((x - y).abs().max()) / scale)
    return worst


def oracle_error(
    traced: Traced, plan: PrunePlan, pruned: nn.Module, inputs: Sequence[Any]
) -> float:
    """Relative error of ``pruned`` against the masked original on ``inputs``."""
    expected = masked_original(traced, plan)(*inputs)
    with torch.no_grad():
        actual = pruned(*copy.deepcopy(tuple(inputs)))
    return relative_error(expected, actual)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Norm parameters and biases away from 0 and 1, so that a wrong channel shows.

    Buffers that are in no state dict stay: they are constants of the class.
    """
    g = torch.Generator().manual_seed(seed)
    saved = model.state_dict(keep_vars=True).keys()
    with torch.no_grad():
        for name, p in list(model.named_parameters()) + list(model.named_buffers()):
            if not p.is_floating_point() or p.numel() < 2 or name not in saved:
                continue
            noise = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)
            if name.endswith("running_var"):
                p.copy_(1 + 0.5 * noise.tanh())
            elif p.dim() == 1 and name.endswith("weight"):
                p.copy_(1 + 0.3 * noise.tanh())
            elif p.dim() == 1:
                p.add_(0.1 * noise)
            elif float(p.abs().max()) < 1e-3:  # layer scales and embeddings that start at zero
                p.copy_(0.1 * noise)
    return model.eval()


def random_plan(traced: Traced, seed: int = 0, share: float | None = None) -> PrunePlan:
    """Keeps a random count (or ``share``) of every group, random channels in each row."""
    rng = np.random.default_rng(seed)
    kept = {}
    for g in traced.groups:
        if g.locked is None:
            count = int(rng.integers(1, g.width + 1)) if share is None else round(share * g.width)
            order = rng.random((g.rows, g.width)).argsort(1)[:, : max(1, count)]
            kept[g.name] = (np.sort(order, 1) + np.arange(g.rows)[:, None] * g.width).ravel()
    return traced.plan(kept)
