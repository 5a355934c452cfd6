"""What the tests of `upslope generate` share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from upslope.cli import main

WORDS = ("Name a colour.", "Count to three.", "Say hello.", "What is up?", "Why?", "Go on then.", "And now?")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Rows as JSONL; the file's name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_prompts(folder: Path) -> str:
    """A file of WORDS, each with its number; its name."""
    return write(folder / "prompts.jsonl", [{"prompt": text, "id": i} for i, text in enumerate(WORDS)])


def generate(*arguments: str, model: str) -> int:
    """The verb with few tokens in float32; its exit code."""
    return main(["generate", model, "--dtype", "float32", "--max-tokens", "12", *arguments])


def rows_of(text: str) -> list[dict[str, Any]]:
    """JSONL as a list."""
    return [json.loads(line) for line in text.splitlines()]
