"""The run folder: what a training writes, what a viewer reads. Free of torch."""

from upslope.runs.folder import Run
from upslope.runs.progress import Progress
from upslope.runs.resume import check_resume

__all__ = ["Progress", "Run", "check_resume"]
