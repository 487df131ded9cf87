"""Rules for ops, calls and modules that fxprune does not know. See docs/extending.md.

op      what an op does to channel labels; without a rule they are locked
call    how the constants of a call follow a cut; without one they stay
leaf    a module that stays one node of the graph, its attributes in step with its parameters
"""

from __future__ import annotations

from fxprune.coupling.rules import elementwise
from fxprune.coupling.rules import register as op
from fxprune.leaves import register as leaf
from fxprune.rewrite import register as call

__all__ = ["call", "elementwise", "leaf", "op"]
