"""The pages of the documentation, as files of the source tree, and the blocks and links in them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "hf_compress" / "methods").glob("*/README.md"),
    ]
)
_BLOCK = re.compile(r"^(```+)([\w-]*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """What stands between two fences.

    Args:
        page: The page's path.
        line: Its first line in the page.
        language: What its first fence says; commands and what they print have none.
        text: What is in it.
    """

    page: str
    line: int
    language: str
    text: str

    @property
    def name(self):
        return f"{self.page}:{self.line}"


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page, language=None):
    """The blocks of a page, those of one language or all."""
    text = text_of(page)
    found = [Block(page, text[: match.start()].count("\n") + 2, match[2], match[3]) for match in _BLOCK.finditer(text)]
    return [block for block in found if language is None or block.language == language]


def links(page):
    """(path from the root or "" for the page itself, part after #) of every link that stays in the source tree."""
    folder = (ROOT / page).parent
    for link in _LINK.findall(_BLOCK.sub("", text_of(page))):
        if "://" not in link:
            path, _, part = link.partition("#")
            yield (folder / path).resolve() if path else ROOT / page, part


def anchors(path):
    """What the headings of a file are called in links."""
    headings = re.findall(r"^#+ (.*)$", _BLOCK.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def commands(page, inline=False):
    """The words of every command line of ours in a page, or in one block of it.

    Args:
        page: The page's path, or a block.
        inline: Also those in the middle of a sentence.
    """
    found = [page] if isinstance(page, Block) else blocks(page)
    shown = [block for block in found if block.language in ("", "bash")]
    lines = [line for block in shown for line in re.sub(r"\\\n\s*", "", block.text).splitlines()]
    if inline:
        lines += re.findall(r"`(hf-compress [^`]*)`", _BLOCK.sub("", text_of(page)))
    return [shlex.split(line, comments=True) for line in lines if line.startswith("hf-compress ")]


def cells(page):
    """The rows of all tables of a page, as lists of cells; rows of headings and rules left out."""
    lines = _BLOCK.sub("", text_of(page)).splitlines()
    rules = [place for place, line in enumerate(lines) if re.fullmatch(r"\|(-+:?\||:?-+\|)+", line)]
    skipped = {place for rule in rules for place in (rule, rule - 1)}
    for place, line in enumerate(lines):
        if line.startswith("|") and place not in skipped:
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
