"""Where text comes from: embedded stories, files of several formats, a Hub data set; always documents per split."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ftp_lightning.data.records import hub_records, json_records, jsonl_records, record_text
from ftp_lightning.data.stories import SPLITS, load_stories
from ftp_lightning.data.text import normalise_book, paragraphs_of
from ftp_lightning.errors import UserError
from ftp_lightning.named_file import read_named_text

SHARES = {"calibration": 0.30, "training": 0.40, "validation": 0.10, "test": 0.20}
MANY_DOCUMENTS = 20
MINIMUM_WORDS = 50
_READERS = {".jsonl": jsonl_records, ".ndjson": jsonl_records, ".json": json_records}
_TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".xlsx", ".xml", ".html", ".pdf", ".zip", ".gz", ".xz", ".zst")
T = TypeVar("T")


def load_documents(source: str, split: str) -> list[str]:
    """The documents of `source` that belong to `split` (one of SPLITS, or "all"), in a fixed order.

    `source` is one of

    * `embedded`: our stories, one document each;
    * a text file: one document, or several with form feeds between them; see `text.normalise_book` for what is
      unwrapped;
    * a folder of `*.txt` files, read so in the order of their names;
    * a `.jsonl` or `.ndjson` file: per line `text`, or chat `messages`, or `instruction`/`input`/`output` (see
      `records.record_text`);
    * a `.json` file: an array of such records, e.g. Stanford Alpaca's;
    * otherwise a Hub data set `NAME` or `NAME:CONFIG` (its `train` part, or the first).

    Splitting a source that has none of its own is fixed [ours]: see `split_documents`. Duplicated documents count once.
    Raises UserError for unknown sources and splits, broken records, and fewer than 50 words in the split.
    """
    check_split(split)
    if source == "embedded":
        documents = [story.text for name in SPLITS if split in (name, "all") for story in load_stories(name)]
    else:
        documents = split_documents(list(dict.fromkeys(text for text in _read(source) if text.strip())), split)
    words = sum(map(word_count, documents))
    if words < MINIMUM_WORDS:
        raise UserError(
            f"{source}: the split {split!r} holds {words} words, at least {MINIMUM_WORDS} are needed\nGive it more text"
        )
    return documents


def word_count(text: str) -> int:
    """Words between white space; where a script writes none, as Chinese or Thai, 5 characters count as one [ours]."""
    words = text.split()
    return len(words) if text.isascii() else max(len(words), sum(map(len, words)) // 5)


def check_split(split: str) -> None:
    """UserError where this is neither a split nor "all"."""
    if split not in (*SPLITS, "all"):
        raise UserError(f"unknown split {split!r}\nChoose one of: {', '.join(SPLITS)}, all")


def split_documents(documents: Sequence[str], split: str) -> list[str]:
    """The part of `documents` that is `split`: 30 % calibration, 40 % training, 10 % validation, 20 % test. [ours]

    With 20 documents or more each goes as a whole to one split, by the sha256 of its text (so adding documents moves
    none). With fewer, every document is cut at paragraph boundaries into four contiguous parts of these shares of its
    characters, in this order.
    """
    if split == "all":
        return list(documents)
    if len(documents) >= MANY_DOCUMENTS:
        return [text for text in documents if split_of(text) == split]
    parts = ("\n\n".join(p for p, name in _paragraph_splits(text) if name == split) for text in documents)
    return [part for part in parts if part]


def split_of(text: str) -> str:
    """The split that the sha256 of `text`, read as a number in [0, 1), falls into."""
    return split_at(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64)


def split_at(fraction: float, shares: Mapping[str, float] = SHARES) -> str:
    """The split whose stretch of [0, 1) holds `fraction`: stretches as long as the shares, one after the other."""
    bound = 0.0
    for name, share in shares.items():
        bound += share
        if fraction < bound:
            return name
    return name


def _paragraph_splits(text: str) -> list[tuple[str, str]]:
    """Every paragraph with its split, which the place of its middle character decides."""
    paragraphs = paragraphs_of(text)
    total, before, result = sum(map(len, paragraphs)), 0, []
    for paragraph in paragraphs:
        result.append((paragraph, split_at((before + len(paragraph) / 2) / total)))
        before += len(paragraph)
    return result


def has_records(source: str) -> bool:
    """False where `source` is text on this disk: our stories, a text file, a folder of them."""
    path = Path(source).expanduser()
    is_text = path.is_file() and path.suffix.lower() not in _READERS
    return not (source == "embedded" or path.is_dir() or is_text)


def read_records(source: str, make: Callable[[Any], T]) -> list[T]:
    """What `make` makes of every record of a JSON(L) file or a Hub data set, in order; where it raises ValueError a
    UserError names the place."""
    path = Path(source).expanduser()
    if path.is_file():
        return _READERS[path.suffix.lower()](path, make)
    if path.suffix.lower() in (".txt", ".json", ".jsonl") or source.startswith((".", "/", "~")):
        raise UserError(
            f"data source {source} does not exist\nGive a text file, a folder of .txt files, JSON(L), or 'embedded'"
        )
    return hub_records(source, make)


def _read(source: str) -> list[str]:
    if has_records(source):
        return read_records(source, record_text)
    path = Path(source).expanduser()
    return _read_folder(path) if path.is_dir() else _read_text(path)


def _read_folder(folder: Path) -> list[str]:
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise UserError(f"data folder {folder} holds no .txt files\nPut one text per file there, or name a .jsonl file")
    return [document for file in files for document in _read_text(file)]


def _read_text(path: Path) -> list[str]:
    if path.suffix.lower() in _TABLES:
        raise UserError(f'{path} is not plain text\nGive text, or its records as .jsonl: {{"text": ...}} per line.')
    text = read_named_text(path)
    return [normalise_book(part) for part in text.split("\f")]
