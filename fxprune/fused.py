"""A graph run with every convolution and the batch normalisation behind it as one convolution.

Equal to rounding where the normalisation is the only reader of the convolution's result: then its
scale and shift go into the weights, which are small, and not over the activations.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fxprune.products import Product
from fxprune.renorm import SideBySide

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # no subclasses: they may do more
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Fused(SideBySide):
    """:class:`SideBySide`, faster; :meth:`attempt` still runs every node as it is.

    A normalisation must not change any more once its convolution has run.
    """

    def __init__(self, module: fx.GraphModule, inputs: Sequence[tuple[Any, ...]]) -> None:
        super().__init__(module, inputs)
        self.norms = _pairs(module)
        self.done = set(self.norms.values())
        self.current: tuple[fx.Node, nn.Module] | None = None

    def step(self, node: fx.Node, i: int) -> None:
        """Input ``i`` passes ``node``; values that nothing else reads are freed."""
        env = self.envs[i]
        if node in self.done:
            env[node] = env.pop(node.all_input_nodes[0])
        elif node in self.norms:
            self.give(node, i, self.result(node, i))
        else:
            super().step(node, i)

    def enters(self, node: fx.Node, i: int) -> Product | None:
        """The product that ``node`` is, a fused convolution; None where it takes a run to tell."""
        if node in self.norms:
            m: Any = self.fetch_attr(str(node.target))
            x: Tensor = self.envs[i][node.all_input_nodes[0]]
            if m.padding_mode == "zeros" and not isinstance(m.padding, str):
                known = Product(
                    "conv", x, m.weight, m.bias, m.groups, False, m.stride, m.padding, m.dilation
                )
                return known if x.ndim == m.weight.ndim else None
        return None

    def result(self, node: fx.Node, i: int) -> Tensor:
        """What the normalisation behind a fused convolution gives."""
        value: Tensor = self.convolution(node)(self.envs[i][node.all_input_nodes[0]])
        return value

    def changed(self) -> None:
        """The weights of the convolution at hand, or its normalisation, are others now."""
        self.current = None

    def convolution(self, node: fx.Node) -> nn.Module:
        """The fused convolution; made for the first input that passes the node."""
        if self.current is None or self.current[0] is not node:
            conv: Any = self.fetch_attr(str(node.target))
            norm: Any = self.fetch_attr(str(self.norms[node].target))
            weight, bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps,
                norm.weight, norm.bias,
            )  # fmt: skip
            made = copy.copy(conv)
            made._parameters = {"weight": weight, "bias": bias}
            self.current = node, made
        return self.current[1]


def _pairs(module: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Convolution -> the normalisation that alone reads it, both modules that run once."""
    calls = Counter(str(n.target) for n in module.graph.nodes if n.op == "call_module")
    found = {}
    for norm in module.graph.nodes:
        conv = _only_input(norm)
        if conv is None or _only_input(conv) is None or len(conv.users) > 1:
            continue
        names = str(conv.target), str(norm.target)
        first, second = (module.get_submodule(name) for name in names)
        known = type(first) in _CONVS and type(second) in _NORMS and second.running_mean is not None
        once = calls[names[0]] == calls[names[1]] == 1
        if known and once and not (_hooked(first) or _hooked(second)):
            found[conv] = norm
    return found


def _only_input(node: fx.Node) -> fx.Node | None:
    """What a module is called with, where that is one value."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    return node.args[0] if isinstance(node.args[0], fx.Node) else None


def _hooked(module: nn.Module) -> bool:
    """Hooks want to see the module as it is."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
