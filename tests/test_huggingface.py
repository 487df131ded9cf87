"""Hugging Face models with small random configurations, by keyword inputs: held to the oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from checks import prunable
from oracle import oracle_error, random_plan, randomise
from torch import Tensor, nn

import fxprune
from fxprune.cut import as_user_class, cut
from fxprune.traced import Traced, trace

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}
VISION = {k: TEXT[k] for k in list(TEXT)[1:5]} | {"image_size": 32, "patch_size": 8}
GPT = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
SEQ = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
}


def tokens(batch: int, seed: int, masked: bool = True, length: int = 9) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, 6:] = 0
    ids = torch.randint(3, 99, (batch, length), generator=g)
    return {"input_ids": ids, "attention_mask": mask} if masked else {"input_ids": ids}


def pixels(batch: int, seed: int, size: int = 32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(batch, 3, size, size, generator=g)}


def unmasked(batch: int, seed: int) -> dict[str, Tensor]:
    return tokens(batch, seed, masked=False)


def pairs(batch: int, seed: int) -> dict[str, Tensor]:
    decoder = tokens(batch, seed + 1, masked=False, length=5)["input_ids"]
    return tokens(batch, seed) | {"decoder_input_ids": decoder}


def large(batch: int, seed: int) -> dict[str, Tensor]:
    return pixels(batch, seed, 64)


def text(name: str, **more: Any) -> nn.Module:
    config, model = name.split()
    return getattr(hf, model)(getattr(hf, config)(**(TEXT | more)))


def detr() -> nn.Module:
    backbone = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, out_features=["stage4"]
    )
    sizes = SEQ | {"num_queries": 6, "backbone_config": backbone, "use_timm_backbone": False}
    sizes |= {"use_pretrained_backbone": False, "backbone": None}
    return hf.DetrForObjectDetection(hf.DetrConfig(**sizes))


Draw = Callable[[int, int], dict[str, Tensor]]
MODELS: dict[str, tuple[Callable[[], nn.Module], Draw]] = {
    "bert": (lambda: text("BertConfig BertForSequenceClassification"), tokens),
    "bert eager": (lambda: text("BertConfig BertModel", attn_implementation="eager"), tokens),
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT)), unmasked),
    "vit": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION)), pixels),
    "llama": (lambda: text("LlamaConfig LlamaForCausalLM", num_key_value_heads=2), tokens),
    "llama unmasked": (
        lambda: text("LlamaConfig LlamaForCausalLM", num_key_value_heads=2),
        unmasked,
    ),
    "distilbert": (
        lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(vocab_size=99, dim=32, n_layers=1, n_heads=4, hidden_dim=48)
        ),
        tokens,
    ),
    "t5": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), pairs),
    "swin": (
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2],
                          num_heads=[2, 4], window_size=4)
        ),
        pixels,
    ),
    "segformer": (
        lambda: hf.SegformerForSemanticSegmentation(
            hf.SegformerConfig(depths=[1] * 4, hidden_sizes=[8, 16, 24, 32],
                               num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=24)
        ),
        large,
    ),
    "detr": (detr, large),
    "qwen2": (lambda: text("Qwen2Config Qwen2ForCausalLM", num_key_value_heads=2), tokens),
    "gemma": (
        lambda: text("GemmaConfig GemmaForCausalLM", num_key_value_heads=1, head_dim=8),
        unmasked,
    ),
    "beit": (
        lambda: hf.BeitModel(
            hf.BeitConfig(**VISION, use_relative_position_bias=True, vocab_size=99)
        ),
        pixels,
    ),
    "whisper encoder": (
        lambda: hf.WhisperModel(
            hf.WhisperConfig(**SEQ, num_mel_bins=16, max_source_positions=20, pad_token_id=0,
                             bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
        ).get_encoder(),
        lambda b, s: {"input_features": pixels(b, s, 40)["pixel_values"][:, 0, :16]},
    ),
    "bart": (
        lambda: hf.BartForConditionalGeneration(
            hf.BartConfig(**SEQ, max_position_embeddings=32)
        ),
        pairs,
    ),
    "mixtral": (
        lambda: text("MixtralConfig MixtralForCausalLM", num_key_value_heads=2,
                     num_local_experts=3, num_experts_per_tok=2),
        unmasked,
    ),
    "deberta v2": (
        lambda: text("DebertaV2Config DebertaV2Model", relative_attention=True,
                     pos_att_type=["p2c", "c2p"], position_biased_input=False),
        tokens,
    ),
    "xlm": (
        lambda: hf.XLMModel(
            hf.XLMConfig(vocab_size=99, emb_dim=32, n_layers=2, n_heads=4,
                         max_position_embeddings=32)
        ),
        tokens,
    ),
    "cohere": (
        lambda: text("CohereConfig CohereForCausalLM", num_key_value_heads=2, pad_token_id=0,
                     bos_token_id=1, eos_token_id=2),
        tokens,
    ),
}  # fmt: skip


def build(name: str) -> tuple[nn.Module, Draw]:
    make, draw = MODELS[name]
    torch.manual_seed(0)
    return randomise(make()), draw


@pytest.mark.parametrize("name", MODELS)
def test_oracle(name: str) -> None:
    """Random plans, on other data and another batch size than the example's."""
    model, draw = build(name)
    traced = trace(model, draw(2, 0))
    assert traced.captured.opaque == {}
    with torch.no_grad():
        expected = model(**draw(3, 5))
    given = traced.graph_module(*draw(3, 5).values())
    assert type(given) is type(expected)
    first = next(iter(given.values()))
    assert torch.allclose(first, next(iter(expected.values())), atol=1e-6)
    for seed in range(2):
        plan = random_plan(traced, seed)
        pruned = cut(traced, plan)
        assert traced.cost(plan).params < traced.cost().params
        for data in (draw(2, 1), draw(3, 2)):
            assert oracle_error(traced, plan, pruned, [*data.values()]) <= 1e-5


def plan_of(traced: Traced, part: str) -> fxprune.PrunePlan:
    """Half of every group of one kind: whole heads ("rows") or dims of each head ("columns")."""
    kept = {}
    for g in traced.groups:
        whole = g.name.endswith(".rows")
        columns = g.rows > 1 or any(o.endswith(".rows") for o in g.overlaps)
        if g.locked is None and (whole if part == "rows" else columns and not whole):
            width = g.width // 2
            kept[g.name] = [r * g.width + c + 1 for r in range(g.rows) for c in range(width)]
    return traced.plan(kept)


QUERIES = {
    "bert": "bert.encoder.layer.{}.attention.self.query.weight:0",
    "gpt2": "transformer.h.{}.attn.c_attn.weight:1",
    "vit": "vit.layers.{}.attention.q_proj.weight:0",
    "llama": "model.layers.{}.self_attn.q_proj.weight:0",
}


@pytest.mark.parametrize("part", ["rows", "columns"])
@pytest.mark.parametrize("name", QUERIES)
def test_heads_and_head_dims(name: str, part: str) -> None:
    """Both are offered, both are cut: half of the query's outputs are left in each layer."""
    model, draw = build(name)
    traced = trace(model, draw(2, 0))
    plan = plan_of(traced, part)
    pruned = cut(traced, plan)
    before, after = dict(model.named_parameters()), dict(pruned.named_parameters())
    for layer in range(2):
        weight, _, dim = QUERIES[name].format(layer).partition(":")
        assert after[weight].shape[int(dim)] * 2 == before[weight].shape[int(dim)]
    assert oracle_error(traced, plan, pruned, [*draw(3, 4).values()]) <= 1e-5


def test_what_can_go_in_a_llama() -> None:
    """The stream, the MLPs, heads and head dims, through its own RMSNorm; the vocabulary stays."""
    model, draw = build("llama")
    free = prunable(trace(model, draw(2, 0)))
    kept = {f"{n}:{d}" for n, p in model.named_parameters() for d in range(p.dim())} - free
    assert kept == {"model.embed_tokens.weight:0", "lm_head.weight:0"}


def test_the_class_stays_where_only_mlps_go() -> None:
    model, draw = build("llama")
    traced = trace(model, draw(2, 0))
    names = [g.name for g in traced.groups if g.locked is None and "mlp" in g.name]
    plan = traced.plan({n: range(0, traced.group(n).n, 2) for n in names})
    small = as_user_class(traced, plan, cut(traced, plan))
    assert type(small) is type(model)
    with torch.no_grad():
        longer = small(**tokens(1, 3, length=12)).logits
    assert longer.shape == (1, 12, 99) and bool(longer.isfinite().all())


def test_prune_and_export_by_keyword(tmp_path: Path) -> None:
    model, draw = build("bert")
    data = [draw(4, s) | {"labels": torch.zeros(4)} for s in range(2)]
    result = fxprune.prune(model, draw(2, 0), 0.6, data, allocation="uniform", progress=False)
    assert result.after.macs <= 0.6 * result.before.macs
    report = fxprune.export_onnx(result.model, draw(2, 0), tmp_path / "bert.onnx")
    assert report.inputs == ("input_ids", "attention_mask")
    assert max(report.errors) <= 1e-4
    again = fxprune.apply(model, result.plan, draw(2, 0))
    shapes = [tuple(p.shape) for p in again.parameters()]
    assert shapes == [tuple(p.shape) for p in result.model.parameters()]


def test_options_that_are_no_tensors() -> None:
    """``use_cache=False`` goes to the model; the cache of the default is no output of the graph."""
    model, draw = build("llama unmasked")
    with_cache = trace(model, draw(2, 0)).graph_module(*draw(2, 0).values())
    assert with_cache.past_key_values is None
    given = draw(2, 0) | {"use_cache": False}
    without = trace(model, given)
    assert without.example_inputs[1] is False
    out = without.graph_module(*given.values())
    assert torch.equal(out.logits, with_cache.logits)
