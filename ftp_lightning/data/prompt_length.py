"""Prompts of a length that is counted as the model reads them: with BOS or chat template, and the answer's first words.

A generated item has `id, context, context_deleted, gen_prefix, outputs` (gold answers), `tokens` (of the prompt),
`new_tokens` (to generate), and the labels `kind, distance, document`. [ours]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ftp_lightning.data.template import rendered
from ftp_lightning.errors import UserError

Item = dict[str, Any]
MARGIN = 8
"""Tokens generated beyond the gold answer's own: room for a quotation mark, an article, a full stop."""


@dataclass(frozen=True)
class PromptLength:
    """Counts prompts as lm-eval gives them to the model, and finds the longest within `limit` tokens."""

    tokenizer: Any
    limit: int
    chat: bool = False

    def count(self, text: str, prefix: str = "", delimiter: str = " ") -> int:
        """Tokens of `text` and the first words of the answer."""
        if not self.chat:
            return len(self.tokenizer.encode(text + delimiter + prefix if prefix else text, verbose=False))
        messages = [{"role": "user", "content": text}]
        if prefix:
            messages.append({"role": "assistant", "content": prefix})
        ending = {"continue_final_message": True} if prefix else {"add_generation_prompt": True}
        text = rendered(self.tokenizer, messages, **ending)
        return len(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def after(self, text: str, mark: str, prefix: str, delimiter: str = " ") -> int:
        """Tokens of the prompt after the first `mark` in `text`."""
        return self.count(text, prefix, delimiter) - self.count(text[: text.index(mark) + len(mark)])

    def longest(self, task: str, make: Callable[[int], Sequence[Any]], sizes: range, delimiter: str = " ") -> int:
        """The largest of `sizes` whose text and prefix, the first two that `make` gives, are within the limit.

        Lengths must rise with the size. UserError where the smallest is too long.
        """

        def tokens(place: int) -> int:
            text, prefix = make(sizes[place])[:2]
            return self.count(text, prefix, delimiter)

        low, high = 0, len(sizes) - 1
        if (least := tokens(0)) > self.limit:
            raise UserError(
                f"task {task}: its shortest prompt has {least} tokens, {self.limit} are allowed\n"
                f"Give --prompt_tokens {-(-5 * least // 128) * 32}: another item's may be longer."
            )
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if tokens(middle) <= self.limit else (low, middle - 1)
        return sizes[low]

    def item(
        self,
        name: str,
        texts: Sequence[str],
        prefix: str,
        outputs: Sequence[str],
        said: str,
        delimiter: str = " ",
        least_new: int = 0,
        **labels: Any,
    ) -> Item:
        """A generated item.

        texts: with and without what holds the answer. said: the answer in full; as many tokens as it has, and `MARGIN`
        more, are generated, `least_new` at least.
        """
        new = len(self.tokenizer.encode(" " + said, add_special_tokens=False)) + MARGIN
        return {
            "id": name,
            "context": texts[0],
            "context_deleted": texts[1],
            "gen_prefix": prefix,
            "outputs": list(outputs),
            "tokens": max(self.count(text, prefix, delimiter) for text in texts),
            "new_tokens": max(new, least_new),
            "kind": None,
            "distance": None,
            "document": None,
            **labels,
        }
