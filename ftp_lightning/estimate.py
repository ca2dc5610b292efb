"""What a stage will take before it is started: bytes on a device by a stated sum, seconds by FLOPs.

All [ours]. B rows of P prompt and C continuation tokens; a = bytes of a number in the model's precision; D hidden size,
Q = query heads x head size, K = key heads x head size, F MLP width, V vocabulary, N blocks. Beside the weights:

* **forward** (search, evaluate, sensitivity): the larger of
  prefill: B P (2 a K N + 2.1 a F + 5 a D): the cache, the MLP's two wide tensors, norms and attention of one block;
  continuation: B (P + C) 2 a K N + B C (8 V + 4 a D): the cache, logits and their log-softmax in float32.
  `evict` stores less; the sum is that of `keep`. Where distributions are compared (evaluate, validation) one of them
  waits, 12 V in place of 8 V, and the comparison takes B C 20 V without a cache, which may be the largest.
* **training**: B (P + C) ((G - 1) s + e + 5 a D + r), G = blocks from the first routed one on, with
  s = (8 + a) D + 2 a Q + 2 a K + 3 a F + r: what backward needs of a block whose weights are frozen (the two norms'
  inputs in float32; queries, keys, values, the attention's output; gate, activation and product of the MLP; the gate's
  two sides; r = 900 bytes of router and mask), and e = max(10 D, 3 a (F - D)) of backward's own. With `--recompute` s
  is 2 a D + r / 4, and one block's s is added. KL distillation adds B C (36 - 2 a) V.

`tests/test_estimate.py` holds the sums to 15 % of what tensors really occupy. Whatever the allocator rounds up and the
device keeps for itself is `MARGIN` and `CONTEXT`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ftp_lightning.costs.flops import block_costs, head_flops, prompt_flops
from ftp_lightning.errors import UserError
from ftp_lightning.pruning.family import find_blocks
from ftp_lightning.schedule import Schedule

MARGIN, CONTEXT = 1.05, 1.0e9
ROUTER = 900
RATES = {24: ("RTX 4090", 165e12), 40: ("A100", 312e12), 80: ("A100", 312e12), 141: ("H200", 989e12)}
"""GB -> a device of this size, its dense bfloat16 FLOP/s by its data sheet."""
UTILISATION = 0.35
"""Share of it that these forwards reach [ours, assumed: nothing here was measured on such a device]."""


@dataclass(frozen=True)
class Shape:
    """What the sums need of a model. `weights`: bytes; `largest`: of them those of the largest block, or of the
    embedding, which lie on one device; `forward_flops`: of so many tokens."""

    blocks: int
    hidden: int
    queries: int
    keys: int
    mlp: int
    vocabulary: int
    bytes: int
    weights: int
    model: nn.Module
    largest: int = 0

    @classmethod
    def of(cls, model: nn.Module) -> Shape:
        """Of a model on any device, `meta` too. UserError where the configuration does not say what is needed."""
        config = model.config.get_text_config()
        try:
            heads = config.num_attention_heads
            size = getattr(config, "head_dim", None) or config.hidden_size // heads
            keys = (getattr(config, "num_key_value_heads", None) or heads) * size
            about = (config.num_hidden_layers, config.hidden_size, heads * size, keys, config.intermediate_size)
        except AttributeError as error:
            raise UserError(f"the memory of this model cannot be told: {error}\nLeave --estimate out.") from None
        pieces = [model.get_input_embeddings(), *find_blocks(model)]
        return cls(*about, config.vocab_size, model.dtype.itemsize, _bytes(model), model, max(map(_bytes, pieces)))

    def forward_flops(self, tokens: int, scored: int = 1) -> float:
        """Of one dense row of so many tokens, `scored` of them through the head."""
        costs = block_costs(self.model)
        return prompt_flops(costs, Schedule.uniform(len(costs), 0.0), tokens, "keep", scored * head_flops(self.model))


def _bytes(module: nn.Module) -> int:
    """Of weights and buffers, those that are tied once."""
    stored = {id(w): w.numel() * w.element_size() for w in (*module.parameters(), *module.buffers())}
    return sum(stored.values())


@dataclass(frozen=True)
class Need:
    """What a stage takes: bytes of weights and of all else on a device, and FLOPs in all. Of the weights `largest` lie
    on one device, however many share the rest; of the FLOPs `alone` are done by one device, or by each of them."""

    weights: float
    working: float
    flops: float
    largest: float = 0.0
    alone: float = 0.0

    @property
    def memory(self) -> float:
        return self.weights + self.working

    def fits(self, gigabytes: float) -> bool:
        return MARGIN * self.memory + CONTEXT <= gigabytes * 1e9

    def spread(self, devices: int, gigabytes: float) -> int | None:
        """The fewest of these devices that hold the blocks between them, each with room for all work; None where no
        number does. The fullest has weights / devices + 1.25 largest: accelerate's own rule for `device_map="auto"`."""

        def share(count: int) -> Need:
            return replace(self, weights=self.weights / count + 1.25 * self.largest)

        return next((n for n in range(2, devices + 1) if share(n).fits(gigabytes)), None)

    def seconds(self, devices: int, gigabytes: int) -> float:
        shared = (self.flops - self.alone) / devices
        return (self.alone + shared) / (UTILISATION * rate(gigabytes)[1])


def rate(gigabytes: int) -> tuple[str, float]:
    """A device with so much memory and its FLOP/s; UserError for a size that none is known of."""
    if gigabytes not in RATES:
        raise UserError(f"no device of {gigabytes} GB is known\nGive one of {', '.join(map(str, RATES))} GB.")
    return RATES[gigabytes]


def forward_bytes(shape: Shape, rows: int, prompt: int, continuation: int, comparing: bool = False) -> float:
    """Beside the weights, of one forward without gradient; `comparing` two distributions over all words."""
    a, cache = shape.bytes, 2 * shape.bytes * shape.keys * shape.blocks
    prefill = prompt * (cache + 2.1 * a * shape.mlp + 5 * a * shape.hidden)
    scored = continuation * ((12 if comparing else 8) * shape.vocabulary + 4 * a * shape.hidden)
    compared = continuation * 20 * shape.vocabulary * comparing
    return rows * max(prefill, (prompt + continuation) * cache + scored, compared)


def training_bytes(
    shape: Shape,
    rows: int,
    prompt: int,
    continuation: int,
    recompute: bool = False,
    logits: bool = False,
    routed: int | None = None,
) -> float:
    """Beside the weights, of one training step; `routed`: blocks from the first routed one on, by default all."""
    a, wide = shape.bytes, shape.mlp
    block = (8 + a) * shape.hidden + 2 * a * (shape.queries + shape.keys) + 3 * a * wide + ROUTER
    kept = 2 * a * shape.hidden + ROUTER / 4 if recompute else block
    extra = max(10 * shape.hidden, 3 * a * (wide - shape.hidden)) + block * recompute
    routed = shape.blocks if routed is None else routed
    token = (routed - 1) * kept + extra + 5 * a * shape.hidden + ROUTER
    return rows * ((prompt + continuation) * token + continuation * logits * (36 - 2 * a) * shape.vocabulary)


def search_need(shape: Shape, stage: Any) -> Need:
    """Of `search`, every child measured and nothing shared: the memo and dense first blocks save of it."""
    settings, windows = stage.search_settings(), stage.windows
    stages = settings.stages(windows)
    born = [settings.offspring, *(survivors for _, survivors in stages)]
    generation = sum(n * count for (n, _), count in zip(stages, born)) + windows * born[-1]
    forwards = windows * (1 + 8) + settings.generations * generation
    tokens = stage.prompt_tokens, stage.continuation_tokens
    flops = forwards * max(1, len(stage.budgets)) * shape.forward_flops(sum(tokens), tokens[1])
    return Need(shape.weights, forward_bytes(shape, stage.chunk, *tokens), flops)


def train_need(shape: Shape, stage: Any) -> Need:
    """Of `train`: the teacher's forward, the student's, and back through frozen blocks, which is another forward; and
    the validations."""
    tokens = stage.prompt_tokens, stage.continuation_tokens
    sizes = (shape, stage.batch_size, *tokens)
    scores = stage.distillation != "mse"
    working = training_bytes(*sizes, stage.recompute, scores)
    working = max(working, forward_bytes(*sizes, comparing=True))
    rows = stage.steps * stage.accumulate * stage.batch_size * stage.processes
    forwards = rows * (4 if stage.recompute else 3) + 2 * stage.validations * stage.validation_windows
    return Need(shape.weights, working, forwards * shape.forward_flops(sum(tokens), tokens[1]))


def evaluate_need(
    shape: Shape,
    stage: Any,
    windows: int = 200,
    choices: int = 4,
    known: Mapping[str, tuple[int, int]] | None = None,
) -> Need:
    """Of `evaluate`. Processes share the items of tasks; each measures all windows of text.

    In mode `prompt` a context is prefilled once for all its answers, in mode `sequence` once for each of them.

    Args:
        windows: where --windows does not say how many.
        choices: answers of an item, each as long as a continuation.
        known: task -> (contexts, mean tokens of one); of others --limit or --items contexts as long as a prompt.
    """
    tokens = stage.prompt_tokens, stage.continuation_tokens
    methods = len(stage.compare) + 1 + bool(stage.before)
    alone = (stage.windows or windows) * (2 + 2 * methods) * shape.forward_flops(sum(tokens), tokens[1])
    answered = 0.0
    for task in stage.tasks:
        items, length = (known or {}).get(task, (stage.limit or stage.items, stage.prompt_tokens))
        whole, context = shape.forward_flops(length + tokens[1], tokens[1]), shape.forward_flops(length, 0)
        item = {"prompt": context + choices * (whole - context), "sequence": choices * whole}
        asked = (1 + methods) * item["prompt"] + methods * item["sequence"] if stage.mode == "both" else 0.0
        answered += min(stage.limit or items, items) * (asked or (1 + methods) * item[stage.mode])
    working = forward_bytes(shape, stage.batch_size, *tokens, comparing=True)
    return Need(shape.weights, working, alone + answered, alone=alone)


def sensitivity_need(shape: Shape, stage: Any) -> Need:
    """Of `sensitivity`, which is one process's: a forward per block and level, and one with a gradient through all
    blocks."""
    tokens = stage.prompt_tokens, stage.continuation_tokens
    sizes, modes = (shape, stage.batch_size, *tokens), 2 if stage.kv == "both" else 1
    working = forward_bytes(*sizes, comparing=True)
    if stage.gradient:
        working = max(working, training_bytes(*sizes, logits=True))
    forwards = stage.windows * (2 + 3 * stage.gradient + modes * shape.blocks * len(stage.levels))
    flops = forwards * shape.forward_flops(sum(tokens), tokens[1])
    return Need(shape.weights, working, flops, alone=flops)


def tune_need(shape: Shape, stage: Any) -> Need:
    """Of `tune` at most, for --limit prompts of --prompt_tokens: the answers, a fit and a distillation, every recipe at
    every cut on its choice prompts, all cuts on the validation prompts, the confirmation; dense where it prunes."""
    from ftp_lightning.lit.distillation import DistillationSettings
    from ftp_lightning.tuning.parts import SHARES
    from ftp_lightning.tuning.recipes import RECIPES

    prompts, cuts, tokens = stage.limit or 1000, len(stage.cuts), (stage.prompt_tokens, stage.continuation_tokens)
    fitted = SHARES["fit"] * (1 + 3 * DistillationSettings().epochs)
    recipes = len(RECIPES) + (stage.pruned is not None)
    measured = SHARES["choice"] * recipes * cuts + SHARES["validation"] * cuts + SHARES["held_out"]
    forwards = prompts * (2 + fitted + measured)  # the answers, and their distributions
    working = forward_bytes(shape, stage.batch_size, *tokens, comparing=True)
    working = max(working, training_bytes(shape, 1, *tokens, logits=True))
    flops = forwards * shape.forward_flops(sum(tokens), tokens[1])
    return Need(shape.weights, working, flops, alone=flops)


NEEDS = {
    "sensitivity": sensitivity_need,
    "search": search_need,
    "train": train_need,
    "evaluate": evaluate_need,
    "tune": tune_need,
}
"""Stages that a cluster is asked for -> their sum."""


def empty_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """A model of this configuration that occupies nothing."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
