"""The training verbs: what `--dry-run` shows, or the run and what came out of it."""

import json
import sys

from upslope.loop.closing import closing_words
from upslope.options import RunOptions
from upslope.preview import dry_run
from upslope.recipes import recipe_of
from upslope.training.stopping import GracefulInterrupt


def run(options: RunOptions) -> int:
    """A training verb's exit code: 130 after Ctrl-C, else 0. With --json the summary is on standard output."""
    if options.dry_run:
        return dry_run.run(options)
    summary = recipe_of(options)(options)
    print("\n".join(closing_words(summary)), file=sys.stderr)
    if options.json:
        print(json.dumps(summary))
    return GracefulInterrupt.exit_code if summary["stopped"] == "interrupted" else 0
