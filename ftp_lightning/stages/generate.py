"""Stage `generate`: one prompt, dense and pruned."""

from __future__ import annotations

import random
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from ftp_lightning.artifact import StageFolder
from ftp_lightning.cli.option import option
from ftp_lightning.cli.progress import Progress, say
from ftp_lightning.cli.settings import PrunedSettings
from ftp_lightning.errors import UserError


@dataclass(frozen=True)
class Continued:
    """One prompt, continued dense and pruned.

    Attributes:
        prompt: the text that was given.
        tokens: the text of each prompt token, the chat template's included.
        texts: "dense" and "pruned" -> the continuation.
        skipped: of each block the prompt tokens that skipped it.
        computed: of each prompt token the blocks that computed it.
        first_token_ms: "dense" and "pruned" -> median milliseconds to the first token.
        flops_limit: FLOPs of the dense prompt / FLOPs of the pruned one, the greatest speed-up to expect.
        too_short: the prompt was computed densely, because it is shorter than --least_tokens.
    """

    prompt: str
    tokens: list[str]
    texts: dict[str, str]
    skipped: list[int]
    computed: list[int]
    first_token_ms: dict[str, float]
    flops_limit: float
    too_short: bool

    @property
    def share_skipped(self) -> float:
        return sum(self.skipped) / (len(self.tokens) * len(self.skipped))


@dataclass(frozen=True, kw_only=True)
class GenerateStage(PrunedSettings):
    """Continue one prompt, dense and pruned: texts, tokens skipped, time to first token. Writes generation.json."""

    stage: ClassVar[str] = "generate"
    repeats: ClassVar[bool] = True

    prompt: str | None = option(None, "text to continue; by default a story with facts and a question", raw=True)
    max_new_tokens: int = option(24, "tokens to generate", least=1, most=10**6)
    pairs: int = option(5, "timings of the first token, dense and pruned in turn", least=1, most=10_000)
    apply_chat_template: bool = option(False, "put the prompt into the model's chat template")
    least_tokens: str = option("auto", "shorter prompts are computed densely; auto: where skipping would cost more")

    def check(self) -> None:
        super().check()
        self._least()

    def work(self, folder: StageFolder, progress: Progress) -> None:
        from ftp_lightning.stages.inputs import load_model

        model, tokenizer = load_model(self)
        found = self.continued(model, tokenizer)
        about = {"prompt": found.prompt, "prompt_tokens": len(found.tokens), **found.texts, "skipped": found.skipped}
        folder.write_json("generation.json", about)
        folder.write_json("metrics.json", {"first_token_ms": found.first_token_ms, "flops_limit": found.flops_limit})
        self.show(found)

    def continued(self, model: Any, tokenizer: Any) -> Continued:
        """The prompt's continuation, dense and pruned. UserError for a prompt that is empty or too long."""
        from ftp_lightning.evaluation.speed.limits import padded_flops_limit

        pruner = self.chosen(model).changed(least_tokens=self._least())
        prompt = self.prompt if self.prompt is not None else self._question(tokenizer)
        ids = self._encode(prompt, model, tokenizer)
        new = {name: _generate(model, ids, self.max_new_tokens, chosen) for name, chosen in _both(pruner)}
        texts = {name: tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True) for name, row in new.items()}
        trace = pruner.trace.routed
        return Continued(
            prompt,
            [tokenizer.decode([token]) for token in ids[0].tolist()],
            texts,
            [round(share * ids.shape[1]) for share in trace.sparsity],
            sum(keep[0].int() for keep in trace.keep).tolist(),
            _first_token_ms(model, ids, pruner, self.pairs),
            round(padded_flops_limit(model, trace, pruner.kv, pruner.skip_rank), 3),
            trace.too_short,
        )

    def chosen(self, model: Any) -> Any:
        """The pruner that the flags ask for."""
        from ftp_lightning.stages.inputs import chosen_pruner

        return chosen_pruner(self, model)

    def show(self, found: Continued) -> None:
        """Print what was found."""
        say(_shown(found))

    def _least(self) -> Any:
        if self.least_tokens != "auto" and not self.least_tokens.isdecimal():
            raise UserError(
                f"least_tokens is {self.least_tokens!r}, must be auto or a whole number of at least 0\n"
                "Change --least_tokens."
            )
        return self.least_tokens if self.least_tokens == "auto" else int(self.least_tokens)

    def _question(self, tokenizer: Any) -> str:
        from ftp_lightning.data.choices import recall_items
        from ftp_lightning.data.sources import load_documents
        from ftp_lightning.stages.inputs import text_named

        rng = random.Random(f"{self.seed}/generate")
        with text_named(self.data, self.chosen_split):
            documents = load_documents(self.data, self.chosen_split)
            return recall_items(tokenizer, documents, rng, 1, self.prompt_tokens)[0]["context"]

    def _encode(self, prompt: str, model: Any, tokenizer: Any) -> Any:
        """(1, T) token ids; UserError where there is nothing, or no room to go on."""
        import torch

        from ftp_lightning.data.template import rendered
        from ftp_lightning.data.text import prompt_ids
        from ftp_lightning.pruning.devices import home
        from ftp_lightning.stages.inputs import check_chat_template

        if self.apply_chat_template:
            check_chat_template(self.model, tokenizer)
            turns = [{"role": "user", "content": prompt}]
            templated = rendered(tokenizer, turns, add_generation_prompt=True)
            ids = tokenizer.encode(templated, add_special_tokens=False)
        else:
            ids = prompt_ids(tokenizer, prompt)
        limit = getattr(model.config, "max_position_embeddings", None) or len(ids) + self.max_new_tokens
        if not prompt.strip():
            raise UserError("the prompt is empty\nGive --prompt some text.")
        if len(ids) + self.max_new_tokens > limit:
            raise UserError(
                f"the prompt has {len(ids)} tokens and {self.max_new_tokens} new ones are asked for, but the model "
                f"takes {limit}\nGive a shorter --prompt or fewer --max_new_tokens."
            )
        return torch.tensor([ids], device=home(model))


def _both(pruner: Any) -> tuple[tuple[str, Any], ...]:
    return ("dense", None), ("pruned", pruner)


def _generate(model: Any, ids: Any, tokens: int, pruner: Any) -> Any:
    """Greedy continuation, (T + new,) ids; pruned where there is a pruner."""
    import torch

    from ftp_lightning.models.pretrained import generation_told

    about: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": False}
    with pruner(model) if pruner else nullcontext(), torch.no_grad(), generation_told(model):
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **about)[0]


def _first_token_ms(model: Any, ids: Any, pruner: Any, pairs: int) -> dict[str, float]:
    """Median milliseconds to the first token; dense and pruned in turn, after one of each that does not count."""
    times: dict[str, list[float]] = {"dense": [], "pruned": []}
    for _ in range(pairs + 1):
        for name, chosen in _both(pruner):
            start = time.perf_counter()
            _generate(model, ids, 1, chosen).tolist()  # reading the token waits for the device
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(statistics.median(values[1:]), 2) for name, values in times.items()}


def _shown(found: Continued) -> str:
    blocks, first = " ".join(map(str, found.skipped)), found.first_token_ms
    short = "\nthe prompt is too short: skipping would cost more than it saves, see --least_tokens"
    return (
        f"prompt ({len(found.tokens)} tokens)\n{found.prompt}\n\ndense\n{found.texts['dense']}\n\n"
        f"pruned\n{found.texts['pruned']}\n\n"
        f"tokens skipped per block: {blocks} ({found.share_skipped:.1%} of all){short if found.too_short else ''}\n"
        f"time to first token: dense {first['dense']:.1f} ms, pruned {first['pruned']:.1f} ms"
    )
