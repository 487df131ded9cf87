"""Cutting: the input stays bit for bit, bad plans are refused, attributes follow."""

from __future__ import annotations

import pytest
import torch
from checks import assert_right
from oracle import oracle_error, random_plan, randomise
from patterns_attention import FusedChunk, FusedIndexed, PackedAttention
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.cut import as_user_class, cut
from fxprune.errors import PlanError
from fxprune.traced import Traced, trace
from fxprune.types import ChannelGroup, PrunePlan


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.d = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.g, self.p = nn.GroupNorm(4, 16), nn.PReLU(16)
        self.t = nn.ConvTranspose2d(16, 12, 2, 2)
        self.i = nn.InstanceNorm2d(12, affine=True)
        self.w = nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.l, self.f, self.h = nn.LayerNorm(12), nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.p(self.g(self.d(self.n(self.a(x)).relu())))
        y = self.w(self.i(self.t(y)).relu())
        return self.h(self.f(self.l(y.mean((2, 3)))).relu())


def images(seed: int = 0, batch: int = 2) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 6, 6, generator=g, dtype=torch.float64)


def traced_net() -> Traced:
    torch.manual_seed(0)
    return trace(randomise(Net().double()), images())


def of(traced: Traced, param: str, dim: int = 0) -> ChannelGroup:
    """The column group of a parameter dim (not the rows of a block)."""
    found = [
        g
        for g in traced.groups
        if any((m.param, m.dim) == (param, dim) for m in g.members) and ".rows" not in g.name
    ]
    return found[0]


def test_input_is_untouched() -> None:
    traced = traced_net()
    gm = traced.graph_module
    before = {k: (v.data_ptr(), v.clone()) for k, v in gm.state_dict().items()}
    code, modes = gm.code, [m.training for m in gm.modules()]
    widths = (gm.a.out_channels, gm.d.groups, gm.f.in_features, gm.l.normalized_shape)
    pruned = cut(traced, random_plan(traced, 1))
    pruned.train()
    with torch.no_grad():
        for t in [*pruned.parameters(), *pruned.buffers()]:
            t.add_(1)
    for k, v in gm.state_dict().items():
        assert v.data_ptr() == before[k][0] and torch.equal(v, before[k][1])
    assert gm.code == code and [m.training for m in gm.modules()] == modes
    assert widths == (gm.a.out_channels, gm.d.groups, gm.f.in_features, gm.l.normalized_shape)


def test_keeping_all_copies() -> None:
    """Also where nothing goes, no memory is shared with the input."""
    traced = traced_net()
    theirs = {t.untyped_storage().data_ptr() for t in traced.graph_module.state_dict().values()}
    for t in cut(traced, traced.full_plan()).state_dict().values():
        assert t.untyped_storage().data_ptr() not in theirs


def test_attributes_follow_the_parameters() -> None:
    traced = traced_net()
    for seed in range(5):
        plan = random_plan(traced, seed)
        m = cut(traced, plan)
        assert (m.a.out_channels, m.a.in_channels) == tuple(m.a.weight.shape[:2])
        assert m.n.num_features == m.a.out_channels == len(m.n.running_var)
        assert m.d.groups == m.d.in_channels == m.a.out_channels
        assert m.d.out_channels == m.d.weight.shape[0] == m.g.num_channels
        assert m.g.num_channels == len(m.g.weight) and m.g.num_channels % m.g.num_groups == 0
        assert m.p.num_parameters == len(m.p.weight) == m.g.num_channels
        assert (m.t.in_channels, m.t.out_channels) == tuple(m.t.weight.shape[:2])
        assert m.i.num_features == m.t.out_channels == m.w.in_channels
        assert m.w.groups * m.w.weight.shape[1] == m.w.in_channels
        assert m.w.out_channels == m.w.weight.shape[0] == len(m.w.bias)
        assert m.l.normalized_shape == tuple(m.l.weight.shape) == (m.w.out_channels,)
        assert (m.f.out_features, m.f.in_features) == tuple(m.f.weight.shape)
        assert m.h.in_features == m.f.out_features and m.h.out_features == 4
        assert_right(traced, plan, m, [(images(1),), (images(2, 3),)])


def test_requires_grad_and_leaf() -> None:
    model = Net()
    model.a.weight.requires_grad_(False)
    traced = trace(model, images().float())
    pruned = cut(traced, random_plan(traced, 0))
    for name, p in pruned.named_parameters():
        assert p.is_leaf and isinstance(p, nn.Parameter)
        assert p.requires_grad == (name != "a.weight")


def test_tied_parameters_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p, self.q, self.r = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.first = nn.Linear(3, 6)
            self.q.weight = self.p.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.r(self.q(self.p(self.first(x)).relu()))

    traced = trace(randomise(Tied().double()), torch.randn(2, 3, dtype=torch.float64))
    plan = random_plan(traced, 0, share=0.5)
    pruned = cut(traced, plan)
    assert pruned.p.weight is pruned.q.weight
    assert pruned.p.weight.shape == (3, 3)
    assert_right(traced, plan, pruned, [traced.example_inputs])


# -- scales --------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [FusedChunk, FusedIndexed, PackedAttention])
def test_softmax_scale_is_the_originals(build: type[nn.Module]) -> None:
    """4 dims of each head, 2 kept: the scale stays 1/2 and does not become 1/sqrt(2)."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    traced = trace(randomise(build().double()), x)
    dims = [g for g in traced.groups if g.rows > 1 and g.locked is None]
    assert dims
    plan = random_plan(traced, 0, share=0.5)
    pruned = cut(traced, plan)
    assert all(len(plan.kept[g.name]) == g.n // 2 for g in dims)
    assert_right(traced, plan, pruned, [(x,)])


# -- plans ---------------------------------------------------------------------------------------


def test_unknown_group_gives_near_matches() -> None:
    traced = traced_net()
    name = of(traced, "f.weight").name
    with pytest.raises(PlanError, match=name):
        traced.plan({name + "x": (0, 1)})


@pytest.mark.parametrize("kept", [(), (-1, 0), (0, 10), (3, 3)])
def test_indices_out_of_range(kept: tuple[int, ...]) -> None:
    traced = traced_net()
    group = of(traced, "f.weight")
    assert group.n == 10
    with pytest.raises(PlanError, match=r"'f' \(10 channels\)"):
        traced.plan({group.name: kept})
    with pytest.raises(PlanError):
        cut(traced, PrunePlan({group.name: kept}))


def test_locked_group_says_why() -> None:
    traced = traced_net()
    group = of(traced, "h.weight")
    assert group.locked == "model output"
    with pytest.raises(PlanError, match="model output"):
        traced.plan({group.name: (0, 1)})
    assert traced.plan({group.name: range(group.n)}).kept


def test_ragged_rows_are_refused() -> None:
    traced = trace(FusedChunk(), torch.randn(2, 9, 16))
    group = next(g for g in traced.groups if g.rows > 1 and g.locked is None)
    with pytest.raises(PlanError, match=f"{group.rows} rows"):
        traced.plan({group.name: range(group.n - 1)})


def test_order_of_indices_does_not_matter() -> None:
    traced = traced_net()
    a, b = traced.plan({"f": (7, 0, 3)}), traced.plan({"f": [0, 3, 7]})
    assert a == b
    x, y = cut(traced, a), cut(traced, PrunePlan({"f": (7, 0, 3)}))
    assert torch.equal(x.f.weight, y.f.weight)
    assert torch.equal(x.f.weight, traced.graph_module.f.weight[[0, 3, 7]])


def test_json_round_trip() -> None:
    traced = traced_net()
    plan = random_plan(traced, 2)
    plan = PrunePlan(plan.kept, {"seed": 2, "note": "µ"})
    again = PrunePlan.from_json(plan.to_json())
    assert again == plan
    a, b = cut(traced, plan).state_dict(), cut(traced, again).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"kept": 3}', '{"kept": {"a": 1}}', '{"kept": {"a": ["x"]}}', "null"]
)
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="JSON"):
        PrunePlan.from_json(text)


def test_plan_of_another_model_is_refused() -> None:
    traced = traced_net()
    other = trace(nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 2)), torch.randn(1, 3))
    with pytest.raises(PlanError):
        cut(traced, random_plan(other, 0))


def test_apply_gives_the_users_class() -> None:
    traced = traced_net()
    plan = random_plan(traced, 3)
    torch.manual_seed(0)
    small = fxprune.apply(randomise(Net().double()), plan, images())
    assert type(small) is Net
    expected = cut(traced, plan).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in small.state_dict().items())
    assert_right(traced, plan, small, [(images(1),)])


def test_excluded_modules_stay() -> None:
    traced = traced_net().excluding(["f", "a"])
    assert "excluded" in (of(traced, "f.weight").locked or "")
    pruned = cut(traced, random_plan(traced, 0, 0.5))
    assert pruned.f.out_features == 10 and pruned.a.out_channels == 8
    assert pruned.t.out_channels < 12 or pruned.w.out_channels < 12
    with pytest.raises(fxprune.FxpruneError, match="exclude"):
        traced.excluding(["nothing.like.it"])


def test_another_name_of_a_used_parameter_is_cut_with_it() -> None:
    class Named(nn.Module):
        """As models that keep one embedding under several names."""

        def __init__(self) -> None:
            super().__init__()
            self.used, self.other, self.last = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(8, 2)
            self.other.weight = self.used.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.used(x))

    torch.manual_seed(0)
    x = torch.randn(4, 3).double()
    traced = trace(randomise(Named().double()), x)
    plan = random_plan(traced, 0, 0.5)
    pruned = cut(traced, plan)
    assert pruned.other.weight is pruned.used.weight and len(pruned.used.weight) == 4
    assert_right(traced, plan, pruned, [(x,)])


class Literal(nn.Module):
    """A view with literal sizes, behind it a norm that shows little of the order of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.mix = nn.Linear(6, 32), nn.Linear(32, 7)
        self.norm, self.last = nn.LayerNorm(7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.make(x).view(len(x), -1, 4, 4).permute(0, 2, 3, 1).reshape(len(x), -1)
        return self.last(self.norm(self.mix(y)) * 1e-6)


def test_the_users_class_must_put_the_same_into_its_layers() -> None:
    """Half of a dim of literal size goes: the class would run, with another order of channels."""
    torch.manual_seed(0)
    x = torch.randn(2, 6)
    traced = trace(randomise(Literal()), x)
    columns = next(g for g in traced.groups if g.locked is None and g.n == 4)
    plan = PrunePlan({columns.name: (0, 2)})
    pruned = cut(traced, plan)
    assert torch.allclose(pruned(x), pruned(x + 1), atol=1e-4)  # the outputs tell little
    assert as_user_class(traced, plan, pruned) is None
    assert oracle_error(traced, plan, pruned, (x,)) < 1e-5


class Weak(nn.Module):
    """Attention that weights all tokens alike: the number of heads does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=False) for _ in range(4))
        for layer in (self.q, self.k):
            nn.init.normal_(layer.weight, std=1e-4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2))


def test_the_users_class_must_agree_with_stronger_weights_too() -> None:
    """Half of the columns of each head go: the class would run with half of the heads."""
    torch.manual_seed(0)
    x, weak = torch.randn(2, 5, 8), Weak()
    traced = trace(weak, x)
    columns = {g.name: g for g in traced.groups if g.locked is None and g.rows == 2}
    plan = PrunePlan({name: tuple(c for c in range(8) if c % 4 < 2) for name in columns})
    pruned = cut(traced, plan)
    before = {k: v.clone() for k, v in pruned.state_dict().items()}
    assert as_user_class(traced, plan, pruned) is None
    assert all(torch.equal(v, before[k]) for k, v in pruned.state_dict().items())
    assert oracle_error(traced, plan, pruned, (x,)) < 1e-5
    nn.init.normal_(weak.q.weight)
    assert as_user_class(traced, traced.full_plan(), cut(traced, traced.full_plan())) is not None
