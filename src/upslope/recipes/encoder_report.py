"""What an encoder's run says after it ends: the best checkpoint on dev and test."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upslope.atomic import write_atomic
from upslope.models.encoder.network import load_encoder
from upslope.runs.encoding import to_json
from upslope.training import checkpoint

__all__ = ["finish"]


def finish(learner: Any, summary: Mapping[str, Any], splits: Mapping[str, Any]) -> dict[str, Any]:
    """Score the best checkpoint on dev and, this once, on test; write report.json and report.txt into the run folder.

    The checkpoint is read back from its folder, so the figures are those of the model that is there. An interrupted
    run is left as it is: test waits for the end.
    """
    if summary["stopped"] == "interrupted":
        return dict(summary)
    folder = Path(summary["folder"])
    best = checkpoint.resolve(folder / "checkpoints", "best")
    ours = learner.encoder
    encoder = load_encoder(best.path / "model", ours.kind, labels=None).to_compute(ours.dtype, ours.device)
    measured, reports, texts = {}, {}, []
    for name, split in splits.items():
        measured[name], reports[name] = learner.measure(split, encoder)
        for report in reports[name].values():
            texts.append(f"{name}, step {best.step}: {learner.describe(report)}")
    text = "\n\n".join(texts)
    whole = {**summary, **measured, "best_step": best.step, "best_model": str(folder / "checkpoints/best/model")}
    write_atomic(folder / "report.json", to_json({"step": best.step, **reports}, indent=2) + "\n")
    write_atomic(folder / "report.txt", text + "\n")
    write_atomic(folder / "summary.json", to_json(whole, indent=2) + "\n")
    print(text, file=sys.stderr)
    return whole
