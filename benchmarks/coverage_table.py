"""docs/coverage.md from the rows of a coverage run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]

HEAD = """# Coverage

Every model is pruned to half its MACs with default settings and compared with the masked original
(`tests/oracle.py`). No setting differs from model to model. To repeat:

    pip install -e .[bench]
    python benchmarks/coverage.py --show --onnx                        # first table
    python benchmarks/coverage.py --library torchvision                # second
    python benchmarks/coverage.py --library timm --timm-modules        # third

The second and third were mostly run with `--attention-below 0`: weights rank, which is quicker.

One process and one thread for each model. Weights are random, with norm parameters, biases and
layer scales away from 0 and 1 (`oracle.randomise`), so that a wrong channel shows. Analysis runs at
batch 1, the comparison of image models at batch 2 with other data.

- **status** `right`: max |pruned - masked original| / max |masked original| is at most 1e-5 in
  float32 or, where rounding alone exceeds that, at most 1e-10 in float64 (then that figure is given
  too). `wrong`: it is not, and nothing was raised. `error`: something was raised. `stopped`: over
  the limit of time or memory.
- **free**: channel groups that may be pruned / all; **params free**: share of the model's
  parameters that a plan may remove.
- **by**: what ranked the channels. `attention` on 8 random inputs; `l2` for larger models, to save
  time; `random plan` where `prune()` itself could not run, `keep all` where nothing may be pruned
  (notes). Allocation is uniform, without repair, so that the comparison is exact.
- **MACs**: of the cost model; `=` where it equals torch's FlopCounterMode / 2 on the really pruned
  network, else what that counts.
- **s**: seconds to trace and couple, to cut, and for one forward pass of the original at batch 1.
"""


HUGGING_FACE = """## Hugging Face

`tests/test_huggingface.py` holds two dozen small random configurations to the oracle. Beyond those,
177 architectures of transformers 5.24 (text, mixtures of experts, state spaces, vision, detection,
segmentation, speech, several modalities) were tried once with random plans at two batch sizes, in
float64 where the model's own code does not cast: 150 are right within 1e-10 (1e-5 for mixtures of
experts, whose grouped product takes no float64), and 21, which compute norms or states in float32,
within 1.5e-6. Two draw random numbers in forward (ViT-MAE, ViLT), and four give infinities or
zeros when masked (CANINE, ProphetNet, two time series models): these cannot be compared. None
raised. Parts stay whole in five: Longformer and LED (data decides about global attention),
Reformer, SuperPoint, ViLT.
"""


def page(rows: Sequence[Row]) -> str:
    """The whole file."""
    ordered = sorted(rows, key=lambda r: (r["library"], r["name"]))
    show = [r for r in ordered if r.get("part") == "onnx"]
    parts = [HEAD, HUGGING_FACE]
    parts += _section("Half the MACs, ONNX verified", show, onnx=True)
    for library in ("torchvision", "timm"):
        # A model of the first table that was not run again counts here too.
        mine = [r for r in ordered if r["library"] == library]
        best = {r["name"]: r for r in sorted(mine, key=lambda r: r.get("part") != "onnx")}
        parts += _section(library, sorted(best.values(), key=lambda r: str(r["name"])))
    return "\n".join(parts)


def short(row: Row) -> str:
    """One line for the terminal."""
    figures = ""
    if "macs_before" in row:
        figures = (
            f"err {_error(row)} MACs {row['macs_after'] / max(1, row['macs_before']):.3f} "
            f"groups {row['groups_free']}/{row['groups']} trace {row['trace_s']:.1f}s"
        )
    why = row.get("reason") or row.get("onnx_error") or row.get("prune_error") or ""
    onnx = f" onnx {row['onnx']:.1e}" if "onnx" in row else ""
    return f"{row['status']:8s}{row['name']:40s} {figures}{onnx} [{row['seconds']:.0f}s] {why}"


def _section(title: str, rows: Sequence[Row], onnx: bool = False) -> list[str]:
    if not rows:
        return []
    counts = Counter(r["status"] for r in rows)
    exact = sum(bool(r.get("macs_exact")) for r in rows)
    counted = sum("macs_exact" in r for r in rows)
    half = sum("macs_before" in r and r["macs_after"] <= 0.5 * r["macs_before"] for r in rows)
    lines = [
        f"## {title}",
        "",
        f"{len(rows)} models: {', '.join(f'{n} {s}' for s, n in counts.most_common())}. "
        f"Half the MACs reached by {half}; the cost model is exact for {exact} of {counted}; "
        f"pruned by `prune()` itself {_by_prune(rows)}; whole forward traced (no opaque module) "
        f"{sum('opaque' in r and not r['opaque'] for r in rows)}.",
        "",
    ]
    if onnx:
        good = [r for r in rows if "onnx" in r]
        worst = max((r["onnx"] for r in good), default=0.0)
        lines[2] += f" ONNX verified in onnxruntime: {len(good)}, worst error {worst:.1e}."
    commits = sorted({str(r.get("commit")) for r in rows})
    lines += [f"Engine at {', '.join(commits)}.", ""]
    columns = [*COLUMNS, *(ONNX_COLUMNS if onnx else ())]
    lines += ["| " + " | ".join(c for c, _ in columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(f(r) for _, f in columns) + " |" for r in rows]
    return [*lines, "", *_notes(rows)]


def _by_prune(rows: Sequence[Row]) -> int:
    return sum(r.get("by") in ("attention", "l2") for r in rows)


def _notes(rows: Sequence[Row]) -> list[str]:
    """Failures first, then what is opaque, then what could not reach half."""
    lines: list[str] = []
    failed = [r for r in rows if r["status"] != "right" or r.get("onnx_error")]
    if failed:
        lines += ["Failures:", ""]
        for r in failed:
            why = [r.get("reason"), r.get("first_reason"), r.get("onnx_error")]
            lines.append(f"- {r['name']}: " + _clean("; ".join(w for w in why if w)))
        lines.append("")
    for title, field in (
        ("`prune()` failed (what was checked instead: column by):", "prune_error"),
        ("Half cannot be reached:", "note"),
        ("Kept whole:", "opaque"),
        ("One batch size only:", "batch_note"),
    ):
        found = [r for r in rows if r.get(field)]
        if found:
            lines += [title, "", *(f"- {r['name']}: {_clean(_text(r[field]))}" for r in found), ""]
    if any("decisions" in r.get("compared", "") for r in rows):
        names = [r["name"] for r in rows if "decisions" in r.get("compared", "")]
        lines += [
            "Models that decide (NMS, top-k, thresholds), whose outputs differ because the two "
            "networks decide differently within rounding; compared with the decisions (integer and "
            f"boolean tensors) of the masked original: {', '.join(names)}.",
            "",
        ]
    return lines


def _text(value: Any) -> str:
    if isinstance(value, dict):
        parts = [f"`{k}` ({v})" for k, v in list(value.items())[:4]]
        return "; ".join(parts) + (f"; {len(value) - 4} more" if len(value) > 4 else "")
    return str(value)


def _clean(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:420]


def _error(row: Row) -> str:
    if row.get("error32") is None:
        return "-" if "error64" not in row else f"? ({row['error64']:.0e} in f64)"
    text = f"{row['error32']:.1e}"
    return text if "error64" not in row else f"{text} ({row['error64']:.0e} in f64)"


def _macs(row: Row) -> str:
    if "macs_before" not in row:
        return "-"
    before, after = row["macs_before"], row["macs_after"]
    share = after / max(1, before)
    if "macs_exact" not in row:
        check = ""
    elif row["macs_exact"]:
        check = " ="
    else:
        check = f" (counted {row['macs_counted'] / 1e6:.1f})"
    return f"{before / 1e6:.0f} -> {after / 1e6:.0f} M ({share:.3f}){check}"


def _seconds(row: Row) -> str:
    parts = [row.get(k) for k in ("trace_s", "cut_s", "forward_s")]
    return ", ".join("-" if s is None else f"{s:.2f}" for s in parts)


def _params(row: Row) -> str:
    if "params_before" not in row:
        return "-"
    return f"{row['params_before'] / 1e6:.1f} -> {row['params_after'] / 1e6:.1f} M"


def _groups(row: Row) -> str:
    return f"{row['groups_free']}/{row['groups']}" if "groups" in row else "-"


def _onnx(row: Row) -> str:
    if "onnx" not in row:
        return "failed" if "onnx_error" in row else "-"
    return f"{row['onnx']:.1e} at batch {', '.join(str(n) for n in row['onnx_batches'])}"


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("model", lambda r: str(r["name"])),
    ("input", lambda r: str(r.get("size", "-"))),
    ("status", lambda r: str(r["status"])),
    ("error", _error),
    ("MACs before -> after (share)", _macs),
    ("params", _params),
    ("opaque", lambda r: str(len(r["opaque"])) if "opaque" in r else "-"),
    ("free", _groups),
    ("params free", lambda r: f"{r['free_share']:.0%}" if "free_share" in r else "-"),
    ("by", lambda r: str(r.get("by", "-"))),
    ("s trace, cut, forward", _seconds),
)
ONNX_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("ONNX error", _onnx),
    ("s ONNX", lambda r: f"{r['onnx_s']:.0f}" if "onnx_s" in r else "-"),
)
