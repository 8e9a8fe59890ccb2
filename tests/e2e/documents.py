"""Commands and code as the documents print them."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block: its language and its lines."""

    language: str
    text: str


def blocks(document: str, after: str = "") -> list[Block]:
    """Return the fenced blocks of a document below the heading ``after``."""
    text = (ROOT / document).read_text()
    start = text.index(f"\n## {after}\n") if after else 0
    return [Block(*found) for found in _FENCE.findall(text[start:])]


def as_shell(block: Block) -> str:
    """Return a block as shell lines: Python is fed to the interpreter."""
    if block.language == "python":
        return f"python -W error - <<'PYTHON'\n{block.text}PYTHON\n"
    return block.text
