"""Multi-head attention in plain tensor operations, which can be traced and cut.

F.multi_head_attention_forward keeps the number of heads and their width as fixed numbers inside one
composite call, so it cannot lose head dimensions. ``TraceableAttention`` stands for
nn.MultiheadAttention, with the same parameters under the same names; ``in_operations`` stands for
the function.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SHARED = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")


@dataclass(frozen=True)
class Attention:
    """The weights of one attention: ``inside`` [3E, E] or three of them; biases may be None.

    scale     of the scores
    outside   rows of ``inside`` that are values, those of queries and of keys being alike
    """

    heads: int
    inside: Tensor | tuple[Tensor, Tensor, Tensor]
    bias: Tensor | None
    dropout: float
    scale: Any
    outside: int
    batch_first: bool = False

    def weigh(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """([N, L, E] what is attended to, [N, heads, L, S] the weights where they are wanted).

        mask: (additive or boolean mask of scores, of keys), either may be None
        """
        q, k, v = self._project(query, key, value)
        if query.dim() == 2:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        added = self._mask(mask[0], mask[1], q)
        if not wanted:
            out = F.scaled_dot_product_attention(q, k, v, added, self.dropout, scale=self.scale)
            return out.transpose(1, 2).flatten(2), None
        scores = (q * self.scale) @ k.transpose(-2, -1)
        weights = (scores if added is None else scores + added).softmax(-1)
        out = F.dropout(weights, self.dropout, self.dropout > 0) @ v
        return out.transpose(1, 2).flatten(2), weights

    def shaped(
        self, out: Tensor, weights: Tensor | None, batched: bool, averaged: bool
    ) -> tuple[Tensor, Tensor | None]:
        """What torch's own attention gives."""
        if weights is not None and averaged:
            weights = weights.mean(1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inside, bias = self.inside, self.bias
        if not isinstance(inside, tuple) and query is key and key is value:
            q, k, v = F.linear(query, inside, bias).split(self._parts(inside), -1)
            return q, k, v
        wq, wk, wv = inside if isinstance(inside, tuple) else inside.split(self._parts(inside))
        bq, bk, bv = (None, None, None) if bias is None else bias.split(self._parts(bias))
        return F.linear(query, wq, bq), F.linear(key, wk, bk), F.linear(value, wv, bv)

    def _parts(self, t: Tensor) -> list[int]:
        """Sizes of the queries', keys' and values' parts of ``t``."""
        inner = (t.shape[0] - self.outside) // 2
        return [inner, inner, self.outside]

    def _mask(self, attn: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """One additive mask that broadcasts against [N, heads, L, S], or None."""
        total: Tensor | None = None
        for mask, is_padding in ((attn, False), (padding, True)):
            if mask is None:
                continue
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))
            if is_padding:
                mask = mask.unsqueeze(-2).unsqueeze(-2)
            elif mask.dim() == 3:
                mask = mask.unflatten(0, (-1, self.heads))
            total = mask if total is None else total + mask
        return total


class TraceableAttention(nn.Module):
    """Drop-in for nn.MultiheadAttention without ``bias_k``/``bias_v``/``add_zero_attn``.

    query [N, L, E], key [N, S, Ek], value [N, S, Ev] (sequence first, or without batch, as the
    original is configured) -> (output like query, weights [N, L, S] or None).
    """

    in_proj_weight: nn.Parameter
    in_proj_bias: nn.Parameter | None
    q_proj_weight: nn.Parameter
    k_proj_weight: nn.Parameter
    v_proj_weight: nn.Parameter

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = source.embed_dim, source.num_heads
        self.batch_first, self.dropout = source.batch_first, source.dropout
        self._qkv_same_embed_dim = source._qkv_same_embed_dim  # nn.TransformerEncoderLayer asks
        self.kdim, self.vdim, self.head_dim = source.kdim, source.vdim, source.head_dim
        self.scale = source.head_dim**-0.5
        self.bias_k = self.bias_v = None
        for name in _SHARED:
            self.register_parameter(name, getattr(source, name))
        self.out_proj = source.out_proj
        self.training = source.training

    @staticmethod
    def replaces(module: nn.Module) -> bool:
        """Whether ``module`` is an attention that this class computes."""
        return (
            isinstance(module, nn.MultiheadAttention)
            and type(module).forward is nn.MultiheadAttention.forward
            and module.bias_k is None
            and module.bias_v is None
            and not module.add_zero_attn
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        three = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        core = Attention(
            self.num_heads, self.in_proj_weight if self._qkv_same_embed_dim else three,
            self.in_proj_bias, self.dropout if self.training else 0.0, self.scale,
            self.out_proj.in_features, self.batch_first,
        )  # fmt: skip
        out, weights = core.weigh(query, key, value, (attn_mask, key_padding_mask), need_weights)
        return core.shaped(self.out_proj(out), weights, query.dim() == 3, average_attn_weights)


def in_operations(*args: Any, **kwargs: Any) -> Any:
    """F.multi_head_attention_forward in plain operations, where nothing is added to the keys."""
    given = _SIGNATURE.bind(*args, **kwargs)
    given.apply_defaults()
    a = given.arguments
    added = ("bias_k", "bias_v", "static_k", "static_v")
    if a["add_zero_attn"] or any(a[name] is not None for name in added):
        return _TORCHS[0](*args, **kwargs)
    split = a["use_separate_proj_weight"]
    three = (a["q_proj_weight"], a["k_proj_weight"], a["v_proj_weight"])
    heads, embed = a["num_heads"], a["out_proj_weight"].shape[1]
    core = Attention(
        heads, three if split else a["in_proj_weight"], a["in_proj_bias"],
        a["dropout_p"] if a["training"] else 0.0, (embed // heads) ** -0.5, embed,
    )  # fmt: skip
    query = a["query"]
    masks = a["attn_mask"], a["key_padding_mask"]
    out, weights = core.weigh(query, a["key"], a["value"], masks, a["need_weights"])
    out = F.linear(out, a["out_proj_weight"], a["out_proj_bias"])
    return core.shaped(out, weights, query.dim() == 3, a["average_attn_weights"])


_TORCHS = (F.multi_head_attention_forward,)
_SIGNATURE = inspect.signature(_TORCHS[0])
