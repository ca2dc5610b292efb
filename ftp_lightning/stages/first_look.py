"""Stage `try`: one prompt, dense and pruned, its tokens coloured by the blocks that computed them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ftp_lightning.cli.option import option
from ftp_lightning.cli.settings import ASSETS
from ftp_lightning.errors import UserError
from ftp_lightning.stages.generate import Continued, GenerateStage

REAL, OWN = "smollm2-135m-instruct", "embedded"
AUTO_MODEL = "auto"
SMALL_BUDGET = 0.2
"""Mean sparsity where nothing else is asked for and there is no ready-made pruner: SmolLM2 still answers [ours]."""


@dataclass(frozen=True, kw_only=True)
class TryStage(GenerateStage):
    """See what pruning does to one prompt: both answers, the tokens coloured by the blocks that computed them, and the
    time to the first token.

    Without words it takes a letter of 600 words with a question, or a story for the embedded model.
    """

    stage: ClassVar[str] = "try"
    first_flags: ClassVar[tuple[str, ...]] = ("model", "budget", "pruned", "max_new_tokens", "least_tokens", "kv")

    words: tuple[str, ...] = option((), "the prompt; by default a built-in one", positional=True)
    model: str = option(AUTO_MODEL, f"any model; `auto` is {REAL} where it is installed, else {OWN}")
    max_new_tokens: int = option(32, "tokens to generate", least=1, most=10**6)
    pairs: int = option(2, "timings of the first token, dense and pruned in turn", least=1, most=10_000)

    def __post_init__(self) -> None:
        if self.model == AUTO_MODEL:
            object.__setattr__(self, "model", default_model())
        if self.words and self.prompt is not None:
            raise UserError("the prompt is given twice, by words and by --prompt\nGive it once.")
        if self.words:
            object.__setattr__(self, "prompt", " ".join(self.words))
            object.__setattr__(self, "words", ())
        super().__post_init__()

    def continued(self, model: Any, tokenizer: Any) -> Continued:
        if tokenizer.chat_template and not self.apply_chat_template:
            object.__setattr__(self, "apply_chat_template", True)
        return super().continued(model, tokenizer)

    def chosen(self, model: Any) -> Any:
        """What --pruned or --schedule ask for, else the ready-made pruner of this model, at --budget where its family
        goes so far, else the default schedule."""
        from ftp_lightning.pruning import TokenPruner
        from ftp_lightning.routing import StaticRouter
        from ftp_lightning.schedule import Schedule
        from ftp_lightning.stages.inputs import load_pruner, num_blocks

        if self.pruned or self.schedule:
            return super().chosen(model)
        if self._takes_ready():
            pruner = load_pruner(self.model, model)
            return pruner if self.budget is None else pruner.at(self.budget)
        if self.budget is not None:
            return super().chosen(model)
        return TokenPruner(StaticRouter(), Schedule.default(num_blocks(model), SMALL_BUDGET))

    def _question(self, tokenizer: Any) -> str:
        if not tokenizer.chat_template:
            return super()._question(tokenizer)
        return (ASSETS / "prompt.txt").read_text(encoding="utf-8").strip()

    def show(self, found: Continued) -> None:
        from ftp_lightning.cli.coloured import print_continued

        print_continued(found, self.model, self._pruner_name())

    def _takes_ready(self) -> bool:
        """Whether this model has a ready-made pruner whose family goes as far as --budget."""
        from ftp_lightning.disk.ready import is_ready, load_pruner

        if not is_ready(self.model) or self.budget is None:
            return is_ready(self.model)
        family = load_pruner(self.model).family
        return family is not None and self.budget <= family.budgets[-1]

    def _pruner_name(self) -> str:
        from ftp_lightning.cli.coloured import READY

        if self.pruned or self.schedule:
            return str(self.pruned or self.schedule)
        if self._takes_ready():
            return READY if self.budget is None else f"{READY}, at budget {self.budget:g}"
        return f"the default schedule, budget {SMALL_BUDGET if self.budget is None else self.budget:g}"


def default_model() -> str:
    """A real model where it is at hand, else our own."""
    from ftp_lightning.models import title

    try:
        title(REAL)
    except UserError:
        return OWN
    return REAL
