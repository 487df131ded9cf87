"""Fine-tuning what prune() gave: its original as teacher, several inputs, odd classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tuning import Shaky, batches, loader, net, same, state, tune

import fxprune
from fxprune.checkpoint import save
from fxprune.isolate import rng_kept

# --- after pruning --------------------------------------------------------------------------------


def test_a_prune_result_has_its_original_as_teacher(tmp_path: Path) -> None:
    data = loader()
    original = tune(net(), data, 4, lr=0.02).model
    x = torch.stack([Shaky()[i][0] for i in range(40)])
    pruned = fxprune.prune(
        original, x[:1], 0.3, [x], round_to=1, allocation="uniform", repair=None, progress=False
    )
    before = state(pruned.model)
    result = tune(pruned, data, 8, lr=0.01, distill=1.0)
    assert same(before, state(pruned.model)) and result.pruned is not None
    small, graph = result.pruned.model.eval(), result.pruned.graph_module.eval()
    assert small.one.out_features < 32 and result.pruned.plan == pruned.plan
    torch.testing.assert_close(small(x), graph(x))
    assert not torch.allclose(pruned.model.eval()(x), small(x))
    target = original.eval()(x).detach().softmax(1)
    distances = [
        float(F.kl_div(m.eval()(x).detach().log_softmax(1), target, reduction="batchmean"))
        for m in (pruned.model, small)
    ]
    assert distances[1] < 0.5 * distances[0]
    save(tmp_path / "out", result.pruned.graph_module, result.pruned.plan)
    loaded = fxprune.load(tmp_path / "out", net(), x[:1]).eval()
    torch.testing.assert_close(loaded(x), small(x))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 16), nn.Linear(3, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, more: Tensor) -> Tensor:
        return self.head(F.relu(self.a(x) + self.b(more)))


@pytest.mark.parametrize("form", ["position", "keyword", "mapping"])
def test_several_inputs(form: str) -> None:
    with rng_kept(0):
        model = Two()
    pairs = [(x, torch.randn(len(x), 3), y) for x, y in batches(4)]
    data: list[Any] = [((x, m), y) for x, m, y in pairs]
    inputs: Any = pairs[0][:2]
    if form != "position":
        inputs = {"x": inputs[0], "more": inputs[1]}
        data = [({"x": x, "more": m}, y) for x, m, y in pairs]
    calibration = [d[0] for d in data]
    if form == "mapping":
        data = [{"more": m, "x": x, "labels": y} for x, m, y in pairs]
    options = fxprune.Distillation(steps=4, batch_size=4)
    result = fxprune.prune(model, inputs, 0.6, calibration, round_to=1, repair=options,
                           progress=False, max_evaluations=2)  # fmt: skip
    assert result.report["repair"]["distill"]["steps"] == 4
    tuned = tune(result, data, 6, lr=0.02)
    assert tuned.history[-1].loss < 0.9 * tuned.history[0].loss
    assert tuned.pruned is not None
    call = tuned.model(**inputs) if form != "position" else tuned.model(*inputs)
    torch.testing.assert_close(call, tuned.pruned.graph_module(*pairs[0][:2]))


class Auxiliary(nn.Module):
    """A second head that only training uses; it is not in the graph, and so it is not cut."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.more = nn.Linear(6, 32), nn.Linear(32, 4), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.body(x))
        return (self.head(y), self.more(y)) if self.training else self.head(y)


def test_a_class_that_cannot_train_at_the_new_widths_is_tuned_as_a_graph() -> None:
    with rng_kept(0):
        model = Auxiliary()
    assert tune(model, batches()).history[-1].loss > 0  # whole, with both outputs
    x = batches(1)[0][0]
    pruned = fxprune.prune(model, x, 0.5, [x], round_to=1, repair=None, allocation="uniform",
                           progress=False)  # fmt: skip
    assert isinstance(pruned.model, Auxiliary)
    tuned = tune(pruned, batches(), 2)
    assert isinstance(tuned.model, torch.fx.GraphModule) and tuned.pruned is not None
    assert tuned.pruned.model is tuned.model and tuned.model(x).shape == (8, 4)
