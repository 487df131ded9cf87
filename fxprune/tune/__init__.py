"""Fine-tuning after pruning; :func:`finetune` is the way in."""

from fxprune.tune.loop import Epoch, TuneResult, finetune
from fxprune.tune.options import Tuning

__all__ = ["Epoch", "TuneResult", "Tuning", "finetune"]
