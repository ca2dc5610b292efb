"""What continuations lost against the dense model, row by row, and the means over them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ftp_lightning.costs.request import RowCosts
from ftp_lightning.data.rows import Rows
from ftp_lightning.losses import kl_per_token, nll_per_token
from ftp_lightning.pruning.trace import Trace


@dataclass(frozen=True)
class ContinuationScores:
    """What the continuation lost: KL in nats per token, PPL(P, C) = exp(mean nll), and what was realised.

    Lists ending in `_rows` hold one value per row, in the order of the rows: differences of two methods on them go to
    `paired_bootstrap`. Scalars are means over all continuation tokens. What a pruner realised is empty for the dense
    model.

    Attributes:
        prompt_tokens, continuation_tokens, documents, kinds: of each row.
        first_rows: whether the most probable first token is the dense model's.
        agreed_rows: the same of every token of the continuation, given the true tokens before it.
        right_rows: whether every token of the continuation itself is the most probable one. Where the continuation is
            the dense model's own answer, greedy generation then says exactly the same.
        sparsity: realised share of each block over the prompts (mode "sequence": over the texts).
        sparsity_rows: the same of each row, averaged over blocks.
        costs: FLOPs of each prompt, and bytes of keys and values it leaves, pruned and dense; None for the dense model.
    """

    mode: str
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    ppl: float
    dense_ppl: float
    sparsity: list[float]
    prompt_tokens: list[int] = field(repr=False)
    continuation_tokens: list[int] = field(repr=False)
    documents: list[int] = field(repr=False)
    kinds: list[str] = field(repr=False)
    kl_rows: list[float] = field(repr=False)
    nll_rows: list[float] = field(repr=False)
    dense_nll_rows: list[float] = field(repr=False)
    first_rows: list[bool] = field(repr=False)
    agreed_rows: list[bool] = field(repr=False)
    right_rows: list[bool] = field(repr=False)
    sparsity_rows: list[float] = field(repr=False)
    costs: RowCosts | None = field(repr=False)

    @property
    def mean_sparsity(self) -> float:
        """Realised sparsity averaged over blocks; 0 for the dense model."""
        return sum(self.sparsity) / len(self.sparsity) if self.sparsity else 0.0

    @property
    def flops_cut(self) -> float:
        """Share of the FLOPs of all prompts that was saved; 0 for the dense model."""
        return self.costs.cut if self.costs is not None else 0.0

    def items(self) -> list[dict[str, object]]:
        """One record per row, for a table of items."""
        names = {"prompt_tokens", "continuation_tokens", "documents", "kinds"}
        columns = {name: getattr(self, name) for name in vars(self) if name in names or name.endswith("_rows")}
        columns |= vars(self.costs) if self.costs is not None else {}
        named = {name.removesuffix("_rows"): values for name, values in columns.items() if values}
        named["document"], named["kind"] = named.pop("documents"), named.pop("kinds")
        return [dict(zip(named, values)) for values in zip(*named.values(), strict=True)]


class Tally:
    """Per-token measures gathered batch by batch, in the order of the rows whatever that of the batches is."""

    def __init__(self, rows: Rows):
        self.rows, self.shapes = rows, rows.shapes
        self.tokens: dict[int, dict[str, Tensor]] = {}
        self.sparsity: dict[int, float] = {}
        self.costs: dict[int, tuple[float, ...]] = {}
        self.skipped: list[float] = []
        self.routed = 0

    def add(self, numbers: list[int], dense: Tensor, logits: Tensor, targets: Tensor) -> None:
        """The log-probabilities (B, C, V) of the dense model, logits (B, C, V) and tokens (B, C) of these rows."""
        best = logits.argmax(-1)
        measures = {
            "kl": kl_per_token(dense, logits),
            "nll": nll_per_token(logits, targets),
            "dense_nll": nll_per_token(dense, targets),
            "agreed": dense.argmax(-1) == best,
            "right": best == targets,
        }
        measures = {name: values.cpu().double() for name, values in measures.items()}
        for place, row in enumerate(numbers):
            self.tokens[row] = {name: values[place, : self.shapes[row][1]] for name, values in measures.items()}

    def add_costs(self, numbers: list[int], trace: Trace, costs: RowCosts) -> None:
        """What the pruner realised on these rows; blocks weigh by their real tokens."""
        real = int(trace.real.sum())
        self.routed += real
        totals = self.skipped or [0.0] * len(trace.keep)
        self.skipped = [total + real * s for total, s in zip(totals, trace.sparsity, strict=True)]
        self.sparsity |= dict(zip(numbers, trace.row_sparsity.tolist(), strict=True))
        self.costs |= dict(zip(numbers, zip(*vars(costs).values()), strict=True))

    def scores(self, mode: str) -> ContinuationScores:
        """All rows together."""
        numbers = range(len(self.rows))
        by_row = {name: [self.tokens[row][name] for row in numbers] for name in self.tokens[0]}
        every = {name: torch.cat(values) for name, values in by_row.items()}
        means = {name: [values.mean().item() for values in rows] for name, rows in by_row.items()}
        costs = [list(one) for one in zip(*(self.costs[row] for row in numbers))] if self.costs else None
        return ContinuationScores(
            mode=mode,
            kl_mean=every["kl"].mean().item(),
            kl_p99=every["kl"].quantile(0.99).item(),
            top1_agreement=every["agreed"].mean().item(),
            ppl=math.exp(every["nll"].mean()),
            dense_ppl=math.exp(every["dense_nll"].mean()),
            sparsity=[total / self.routed for total in self.skipped],
            prompt_tokens=[prompt for prompt, _ in self.shapes],
            continuation_tokens=[continuation for _, continuation in self.shapes],
            documents=self.rows.documents,
            kinds=self.rows.kinds,
            kl_rows=means["kl"],
            nll_rows=means["nll"],
            dense_nll_rows=means["dense_nll"],
            first_rows=[bool(values[0]) for values in by_row["agreed"]],
            agreed_rows=[bool(values.all()) for values in by_row["agreed"]],
            right_rows=[bool(values.all()) for values in by_row["right"]],
            sparsity_rows=[self.sparsity[row] for row in numbers] if self.sparsity else [],
            costs=RowCosts(*costs) if costs is not None else None,
        )
