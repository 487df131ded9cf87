"""nn.MultiheadAttention as an equal module that can be traced and cut.

F.multi_head_attention_forward keeps the number of heads and their width as fixed numbers inside one
composite call, so it cannot lose head dimensions. This module computes the same from the same
parameters, under the same names, in plain tensor operations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SHARED = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")


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

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias = self.in_proj_bias
        if self._qkv_same_embed_dim and query is key and key is value:
            q, k, v = F.linear(query, self.in_proj_weight, bias).chunk(3, dim=-1)
            return q, k, v
        if self._qkv_same_embed_dim:
            wq, wk, wv = self.in_proj_weight.chunk(3)
        else:
            wq, wk, wv = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        bq, bk, bv = (None, None, None) if bias is None else bias.chunk(3)
        return F.linear(query, wq, bq), F.linear(key, wk, bk), F.linear(value, wv, bv)

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
        batched = query.dim() == 3
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        heads, width = self.num_heads, self.embed_dim // self.num_heads
        q = q.unflatten(-1, (heads, width)).transpose(1, 2)
        k = k.unflatten(-1, (heads, width)).transpose(1, 2)
        v = v.unflatten(-1, (heads, width)).transpose(1, 2)
        mask = self._mask(attn_mask, key_padding_mask, q)
        weights: Tensor | None = None
        if need_weights:
            scores = (q * width**-0.5) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            out = F.dropout(weights, self.dropout, self.training) @ v
        else:
            rate = self.dropout if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, mask, rate, scale=width**-0.5)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return (out if self.batch_first else out.transpose(0, 1)), weights

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
                mask = mask.unflatten(0, (-1, self.num_heads))
            total = mask if total is None else total + mask
        return total
