"""report.html: what a pruning did, on one page that needs nothing else."""

from fxprune.report.page import Figure, write_report

__all__ = ["Figure", "write_report"]
