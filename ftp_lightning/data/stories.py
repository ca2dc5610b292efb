"""The embedded stories: short tales of our own, in four disjoint splits, so that everything runs without a download.

A split is one file under `assets/stories/`: a line `# Title`, a blank line, paragraphs separated by blank lines. [ours]
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ftp_lightning.errors import UserError

SPLITS = ("calibration", "training", "validation", "test")
FOLDER = Path(__file__).resolve().parent.parent / "assets" / "stories"


@dataclass(frozen=True)
class Story:
    """One tale. The title is a label, not part of the text a model reads."""

    title: str
    paragraphs: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.title or not self.paragraphs:
            raise ValueError(f"story {self.title!r} has {len(self.paragraphs)} paragraphs; it needs a title and a text")

    @property
    def text(self) -> str:
        """The paragraphs, a blank line between them, without the title."""
        return "\n\n".join(self.paragraphs)


def parse_stories(text: str) -> list[Story]:
    """All stories of a file in the format above; lines within a paragraph are joined by spaces.

    Raises ValueError for text before the first title and for a story without a title or without paragraphs.
    """
    head, *chunks = ("\n" + text).split("\n# ")
    if head.strip():
        raise ValueError(f"a story file must begin with '# Title', not with {head.strip()[:40]!r}")
    return [_parse_story(chunk) for chunk in chunks]


def _parse_story(chunk: str) -> Story:
    title, _, body = chunk.partition("\n")
    paragraphs = (" ".join(paragraph.split()) for paragraph in body.split("\n\n"))
    return Story(title.strip(), tuple(paragraph for paragraph in paragraphs if paragraph))


def load_stories(split: str) -> list[Story]:
    """The embedded stories of `split`, one of SPLITS, in file order. An unknown split is a UserError."""
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}\nChoose one of: {', '.join(SPLITS)}")
    return list(_read(split))


@cache
def _read(split: str) -> tuple[Story, ...]:
    return tuple(parse_stories((FOLDER / f"{split}.txt").read_text(encoding="utf-8")))
