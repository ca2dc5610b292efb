"""Plain text made ready for tokens, and made into them: books unwrapped, sentences found, a prompt's ids."""

import re

from transformers import PreTrainedTokenizerBase

_START = re.compile(r"^\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG.*$", re.MULTILINE)
_END = re.compile(r"^\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG.*$", re.MULTILINE)
_BLANK = re.compile(r"\n[ \t]*\n\s*")
_SENTENCE_END = re.compile(
    r"(?<=[.!?])(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)"  # the mark, but not of a title
    r"[\"'”’)]*\s+(?=[\"'“‘(]?[A-Z])"  # closing quotes, white space, and a capital ahead
)


def normalise_book(text: str) -> str:
    r"""The text with one line per paragraph and exactly one blank line between paragraphs.

    Hard-wrapped lines are joined by one space, runs of blank lines shrink to one, `\r\n` becomes `\n`, and the
    licence before and after the START and END marks of a Project Gutenberg file is dropped. Wording, case and
    punctuation stay.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").lstrip("\ufeff")
    if begin := _START.search(text):
        text = text[begin.end() :]
    if end := _END.search(text):
        text = text[: end.start()]
    return "\n\n".join(paragraphs_of(text))


def paragraphs_of(text: str) -> list[str]:
    """The paragraphs of `text` (separated by blank lines), their inner white space shrunk to single spaces."""
    lines = (" ".join(paragraph.split()) for paragraph in _BLANK.split(text))
    return [line for line in lines if line]


def sentences_of(text: str) -> tuple[str, ...]:
    """The sentences of `text` in order; a paragraph ends its last one, white space within is single spaces.

    The rule: a sentence ends after `.`, `!` or `?` and closing quotes where white space and a capital letter follow,
    but not after Mr. Mrs. Dr. St. It errs on the long side, which filler does not mind.
    """
    return tuple(sentence for paragraph in paragraphs_of(text) for sentence in _cut(paragraph))


def _cut(paragraph: str) -> list[str]:
    ends = [match.end() for match in _SENTENCE_END.finditer(paragraph)]
    pieces = (paragraph[a:b].strip() for a, b in zip([0, *ends], [*ends, len(paragraph)], strict=True))
    return [piece for piece in pieces if piece]


def tokens_within(tokenizer: PreTrainedTokenizerBase, sentence: str) -> int:
    """Tokens that `sentence` and the space before it take within a text (alone, some tokenizers add one)."""
    alone, both = (tokenizer.encode(text, add_special_tokens=False) for text in ("x", f"x {sentence}"))
    return len(both) - len(alone)


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text: BOS or nothing. Many have a BOS token and never add it."""
    plain, whole = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    starts = range(len(whole) - len(plain) + 1)
    return whole[: next((start for start in starts if whole[start : start + len(plain)] == plain), 0)]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text that something is to follow: what the tokenizer puts before it, and no EOS after it."""
    return leading_ids(tokenizer) + tokenizer.encode(text, add_special_tokens=False, verbose=False)
