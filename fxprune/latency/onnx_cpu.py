"""Time single products, and whole models, in onnxruntime on the CPU.

onnxruntime keeps activations of convolutions in blocks of channels. A convolution that is timed
alone pays for going into blocks and out again, which it does not inside a net. So it stands
between two small convolutions; the profile tells what belongs to whom, and reorderings that the
product itself provokes (a width that does not fit the blocks) are counted to it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxprune.errors import InternalError
from fxprune.export import export_onnx
from fxprune.latency.ops import Family
from fxprune.latency.target import Sample, Target, clock, forget, sample

SIDE = 16  # channels of the convolutions beside the one that is timed
# Activation -> ONNX op and the numbers it takes as inputs.
_AFTER: dict[str, tuple[str, dict[str, float]]] = {
    "relu": ("Relu", {}),
    "clip": ("Clip", {"low": 0.0, "high": 6.0}),
    "leaky_relu": ("LeakyRelu", {}),
}
SECONDS = 0.04  # of repeated runs for one product
LEAST, MOST = 10, 200  # runs
QUIET = 0.15  # quantile of a short node's profiled times that other processes do not reach


def time_product(target: Target, family: Family, widths: tuple[int, ...]) -> Sample:
    """Milliseconds of one product with these widths, without what a net does not pay for."""
    graph = _Graph()
    between = family.kind == "conv" and len(family.size) == 2
    feed = graph.build(family, widths, between)
    with tempfile.TemporaryDirectory(prefix="fxprune-") as folder:
        options = _options(target)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = _session(graph.model(), options)
        now = clock(target)
        for _ in range(3):
            session.run(None, feed)
        seconds: list[float] = []
        most = 2 * LEAST if family.cold else MOST  # forgetting takes longer than most products
        while len(seconds) < LEAST or (sum(seconds) < SECONDS and len(seconds) < most):
            if family.cold:
                forget()
            start = now()
            session.run(None, feed)
            seconds.append(now() - start)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return _own(events, sample(seconds))


def _own(events: list[dict[str, Any]], whole: Sample) -> Sample:
    """What the product took, of runs that took ``whole``.

    The profile's clock is the wall clock. Few runs of a short node are interrupted by other
    processes, so the low quantile of its times is its time. A long node may be interrupted each
    time; then the whole run's clock, less what is beside the product, is nearer. Both can only be
    too high.
    """
    taken: dict[str, list[float]] = {}
    for e in events:
        if e.get("cat") == "Node" and e["name"].endswith("_kernel_time"):
            taken.setdefault(e["name"], []).append(e["dur"] / 1e3)
    if not taken:
        raise InternalError("onnxruntime wrote a profile without nodes")
    names = list(taken)
    quiet = {n: float(np.quantile(v[3:], QUIET)) for n, v in taken.items()}
    beside = {n for n in names if n.startswith(("pre", "post"))}
    beside |= {n for n in (names[0], names[-1]) if n.startswith("Reorder")}
    own = sum(quiet[n] for n in names if n not in beside)
    rest = whole.ms - sum(min(taken[n]) for n in beside)
    own = min(own, rest) if rest > 0 else own
    return Sample(own, whole.runs, whole.spread)


class _Graph:
    """A small ONNX graph around one product."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.rng = np.random.default_rng(0)
        self.shape: list[int] = []
        self.output = ""

    def build(
        self, family: Family, widths: tuple[int, ...], between: bool
    ) -> dict[str, NDArray[np.float32]]:
        """Add the nodes; returns what to feed. Optimised nodes are called after their outputs."""
        cin, cout, groups = family.channels(widths)
        last = "op_after" if family.after else "op_out"
        if between:
            self.shape = [family.batch, SIDE, *family.size]
            self._side("pre", "x", "pre_out", SIDE, cin)
            self._product(family, "pre_out", cin, cout, groups)
            self._side("post", last, "post_out", cout, SIDE)
            self.output = "post_out"
        else:
            self.shape = [family.batch, cin, *family.size]
            self._product(family, "x", cin, cout, groups)
            self.output = last
        return {"x": self._random(*self.shape)}

    def model(self) -> bytes:
        from onnx import TensorProto, helper

        graph = helper.make_graph(
            self.nodes,
            "product",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info(self.output, TensorProto.FLOAT, None)],
            self.weights,
        )
        opset = [helper.make_opsetid("", 18)]
        return bytes(
            helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString()
        )

    def _random(self, *shape: int) -> NDArray[np.float32]:
        return self.rng.standard_normal(shape, dtype=np.float32) * np.float32(0.05)

    def _weight(self, name: str, *shape: int) -> str:
        from onnx import numpy_helper

        self.weights.append(numpy_helper.from_array(self._random(*shape), name))
        return name

    def _side(self, name: str, x: str, y: str, cin: int, cout: int) -> None:
        from onnx import helper

        inputs = [x, self._weight(f"{name}_w", cout, cin, 1, 1)]
        self.nodes.append(helper.make_node("Conv", inputs, [y], name=name, kernel_shape=[1, 1]))

    def _product(self, f: Family, x: str, cin: int, cout: int, groups: int) -> None:
        from onnx import helper

        if f.kind == "linear":
            inputs = [x, self._weight("w", cout, cin), self._weight("bias", cout)]
            node = helper.make_node("Gemm", inputs, ["op_out"], name="op", transB=1)
        else:
            transposed = f.kind == "transposed"
            shape = (cin, cout // groups) if transposed else (cout, cin // groups)
            inputs = [x, self._weight("w", *shape, *f.kernel), self._weight("bias", cout)]
            node = helper.make_node(
                "ConvTranspose" if transposed else "Conv",
                inputs,
                ["op_out"],
                name="op",
                kernel_shape=list(f.kernel),
                strides=list(f.stride),
                pads=[*f.padding, *f.padding],
                dilations=list(f.dilation),
                group=groups,
            )
        self.nodes.append(node)
        if f.after:
            kind, attributes = _AFTER[f.after]
            inputs = ["op_out", *(self._number(n, v) for n, v in attributes.items())]
            self.nodes.append(helper.make_node(kind, inputs, ["op_after"], name="op_after"))

    def _number(self, name: str, value: float) -> str:
        from onnx import numpy_helper

        self.weights.append(numpy_helper.from_array(np.array(value, dtype=np.float32), name))
        return name


def whole_model(
    target: Target, model: nn.Module, inputs: tuple[Any, ...], path: Path
) -> Callable[[], object]:
    """A call that runs the model once, from a checked ONNX file that is written to ``path``."""
    export_onnx(model, inputs, path, dynamic_batch=False)
    return file_call(target, path, inputs)


def file_call(target: Target, path: Path, inputs: tuple[Any, ...]) -> Callable[[], object]:
    """A call that runs an ONNX file once on the inputs."""
    session = _session(str(path), _options(target))
    leaves = [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]
    names = [i.name for i in session.get_inputs()]
    feed = {n: t.detach().cpu().numpy() for n, t in zip(names, leaves, strict=True)}
    return lambda: session.run(None, feed)


def _options(target: Target) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = target.threads
    options.inter_op_num_threads = 1
    return options


def _session(model: Any, options: Any) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
