"""What `generate` does to the phase rule: which of its forwards bring prompt tokens, and which it cannot do."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import nn

from ftp_lightning.errors import UserError
from ftp_lightning.pruning.family import given_cache

_DYNAMIC = (None, "dynamic", "hybrid")
"""What makes `generate` take a dynamic cache; "hybrid" stands in settings of old and is passed over by it."""
_BY_TOKEN = ("input_ids", "inputs_embeds", "position_ids", "token_type_ids")


@dataclass
class Generation:
    """One call of `generate`: `prompt_end` slots are its prompt; they are routed (`routes`) also where the prompt comes
    in chunks, and never together with guesses behind them (`guesses`: assisted decoding). `whole`: the prompt has no
    padding, so that nothing after it has. `cache`: the one that `generate` itself goes on with."""

    prompt_end: int
    routes: bool
    guesses: bool
    whole: bool = False
    cache: object | None = None

    @staticmethod
    def of(model: nn.Module, args: tuple, kwargs: dict, routing_chunk: bool) -> Generation:
        """UserError for what cannot be pruned right."""
        names = [name for name in inspect.signature(type(model).generate).parameters if name != "self"]
        given = dict(zip(names, args)) | kwargs
        configs = [c for c in (given.get("generation_config"), model.generation_config) if c is not None]

        def asked(name: str):  # as Hugging Face reads it: what a config leaves open, the model's own says
            values = (given.get(name), *(getattr(config, name, None) for config in configs))
            return next((value for value in values if value is not None), None)

        if asked("use_cache") is False:
            raise UserError(
                "generate(use_cache=False) would route the prompt anew for every token.\nLeave use_cache on."
            )
        if (kind := asked("cache_implementation")) not in _DYNAMIC:
            raise UserError(
                f"token skipping needs a dynamic key-value cache; cache_implementation is {kind!r}.\n"
                "Leave `cache_implementation` unset."
            )
        if asked("token_healing"):
            raise UserError(
                "token_healing rewrites the end of the prompt after its length is known.\nLeave token_healing unset."
            )
        if asked("assistant_early_exit"):
            raise UserError(
                "assistant_early_exit drafts with the pruned model's own first blocks; that is not supported.\n"
                "Use an assistant_model or prompt_lookup_num_tokens."
            )
        guesses = asked("assistant_model") is not None or bool(asked("prompt_lookup_num_tokens") or asked("use_mtp"))
        cache = given_cache(given)
        fresh = cache is None or cache.get_seq_length() == 0
        return Generation(_prompt_length(given), fresh or routing_chunk, guesses)

    def is_about(self, cache: object | None) -> bool:
        """Whether a forward with this cache brings tokens of the text that is generated; guidance (`guidance_scale`)
        asks the model about another one, with a cache of its own."""
        self.cache = cache if self.cache is None else self.cache
        return cache is not None and cache is self.cache

    def is_prompt(self, past: int) -> bool:
        """Whether a forward that starts at this slot brings prompt tokens to be routed."""
        return self.routes and past < self.prompt_end

    def guesses_in(self, past: int, arguments: dict) -> bool:
        """Whether a forward of the decoder brings the end of the prompt and guesses behind it."""
        if not (self.guesses and past < self.prompt_end):
            return False
        tokens = arguments.get("input_ids")
        new = (arguments["inputs_embeds"] if tokens is None else tokens).shape[1]
        return self.prompt_end < past + new


def _prompt_length(given: dict) -> int:
    """Slots of the prompt, those already in the cache included; 1 where `generate` starts from its own first token."""
    inputs = (given.get(name) for name in ("inputs", "input_ids", "inputs_embeds", "attention_mask"))
    return max((x.shape[1] for x in inputs if isinstance(x, torch.Tensor) and x.dim() >= 2), default=1)


def split_arguments(arguments: dict, cut: int, past: int) -> tuple[dict, dict]:
    """A decoder's arguments for its first `cut` new tokens, and for the rest."""
    first, second = dict(arguments), dict(arguments)
    for name in _BY_TOKEN:
        x = arguments.get(name)
        if isinstance(x, torch.Tensor):
            first[name], second[name] = (x[:, :cut], x[:, cut:]) if x.shape[1] > 1 else (x, x)
    mask = arguments.get("attention_mask")
    if mask is not None:
        first["attention_mask"] = mask[:, : past + cut]
    return first, second


def join_outputs(first, second):
    """The output of both calls as if it had been one; UserError for what cannot be joined."""
    if first.get("attentions") or second.get("attentions"):
        raise UserError("output_attentions is not supported with assisted decoding while a pruner is attached.")
    second["last_hidden_state"] = torch.cat([first["last_hidden_state"], second["last_hidden_state"]], 1)
    if second.get("hidden_states"):
        pairs = zip(first["hidden_states"], second["hidden_states"])
        second["hidden_states"] = tuple(torch.cat(pair, 1) for pair in pairs)
    return second
