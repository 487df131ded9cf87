"""A graph and what its nodes name -> fx.GraphModule, without fx's way through ``setattr``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, fx, nn
from torch.fx._lazy_graph_module import _LazyGraphModule

LazyGraphModule = _LazyGraphModule  # becomes code when that is first asked for


def targets(graph: fx.Graph) -> list[str]:
    """Qualified names of the modules and attributes that the graph uses, in its order."""
    found = (str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr"))
    return list(dict.fromkeys(found))


def attributes(source: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """What ``source`` has under qualified names."""
    found: dict[str, Any] = {}
    for path in names:
        above, _, atom = path.rpartition(".")
        if above not in found:
            found[above] = source.get_submodule(above)
        found[path] = getattr(found[above], atom)
    return found


def assembled(
    kind: type[fx.GraphModule],
    graph: fx.Graph,
    name: str,
    names: Iterable[str],
    value: Callable[[str], Any],
    source: nn.Module | None = None,
) -> fx.GraphModule:
    """A graph module in eval mode that holds ``value(n)`` under each qualified name n.

    source: a module that has the same names; its buffers that are not saved are not saved here.
    """
    made = kind(nn.Module(), fx.Graph(), name)
    made.training = False
    for path in names:
        *above, atom = path.split(".")
        holder: nn.Module = made
        for part in above:
            inner = holder._modules.get(part)
            if inner is None:
                inner = holder._modules[part] = nn.Module()
                inner.training = False
            holder = inner
        _hold(holder, atom, value(path), source, path)
    made.graph = graph
    return made


def _hold(holder: nn.Module, atom: str, value: Any, source: nn.Module | None, path: str) -> None:
    if isinstance(value, nn.Parameter):
        holder._parameters[atom] = value
    elif isinstance(value, nn.Module):
        holder._modules[atom] = value
    elif isinstance(value, Tensor):
        holder._buffers[atom] = value
        parent = None if source is None else source.get_submodule(path.rpartition(".")[0])
        if parent is not None and atom in parent._non_persistent_buffers_set:
            holder._non_persistent_buffers_set.add(atom)
    else:
        setattr(holder, atom, value)


def compiled(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm`` with its code; a lazy one has none until that is asked for."""
    _LazyGraphModule.force_recompile(gm)
    return gm
