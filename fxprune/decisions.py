"""What Python may decide while a model is traced, although a tensor is asked.

Two kinds of questions have an answer that holds for all inputs: those about constants (a stride
that is kept as a buffer of integers), and those of which the other answer only raises (an
assertion).
"""

from __future__ import annotations

import dis
import sys
from types import CodeType, FrameType

import torch
from torch import Tensor, fx

_SIZES = ("shape", "size", "dim", "numel", "len", "ndim")
_BY_CHANCE = ("rand", "randn", "randint", "randperm", "empty", "multinomial", "bernoulli")
_FAR = 80  # instructions of a branch that are read


def settled_tensor(node: fx.Node) -> bool:
    """Whether a value follows from sizes and from constants that no cut changes alone."""
    known: bool | None = node.meta.get("settled")
    if known is None:
        known = node.meta["settled"] = _settled(node)
    return known


def _settled(node: fx.Node) -> bool:
    value = node.meta.get("value")
    if node.op == "get_attr":
        one = isinstance(value, Tensor) and value.numel() == 1
        learned = isinstance(value, torch.nn.Parameter)
        return isinstance(value, Tensor) and not learned and (one or not value.is_floating_point())
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op not in ("call_function", "call_method") or any(b in name for b in _BY_CHANCE):
        return False
    if name in _SIZES or (name == "getattr" and node.args[1] in _SIZES):
        return not node.meta.get("data")  # how many boxes there are depends on the image
    return all(settled_tensor(i) for i in node.all_input_nodes)


def other_way_raises(own: tuple[str, ...], truth: bool) -> bool:
    """Whether the code that asks for a truth would raise with the other answer, whatever else.

    own: names of the modules whose frames are not the model's
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and str(frame.f_globals.get("__name__", "")).startswith(own):
        frame = frame.f_back
    return frame is not None and _raises(frame.f_code, frame.f_lasti, not truth)


def _raises(code: CodeType, offset: int, truth: bool) -> bool:
    instructions = list(dis.get_instructions(code))
    at = next((i for i, n in enumerate(instructions) if n.offset == offset), len(instructions))
    for i in range(at, min(at + 3, len(instructions))):
        name = instructions[i].opname
        if "JUMP" in name and ("IF_TRUE" in name or "IF_FALSE" in name):
            jumps = truth == ("IF_TRUE" in name)
            if not jumps:
                return _only_raises(instructions, i + 1)
            target = instructions[i].argval
            found = (k for k, n in enumerate(instructions) if n.offset == target)
            return _only_raises(instructions, next(found, len(instructions)))
        if name not in ("TO_BOOL", "CACHE", "NOP", "COPY", "NOT_TAKEN"):
            return False
    return False


def _only_raises(instructions: list[dis.Instruction], start: int) -> bool:
    """Whether an exception is raised before anything else can happen."""
    for n in instructions[start : start + _FAR]:
        if n.opname == "RAISE_VARARGS":
            return True
        if "JUMP" in n.opname or n.opname.startswith(("RETURN", "YIELD", "STORE", "FOR_ITER")):
            return False
    return False
