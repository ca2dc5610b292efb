"""Compensated skip: a skipped token gets a linear guess of what the block would have added, fitted in closed form.

Source: method.md, section 12, point 3 [ours]; reduced-rank ridge regression is Mukherjee and Zhu (2011).
Shapes: N blocks, D hidden size, r rank, B rows, T tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftp_lightning.errors import UserError
from ftp_lightning.pruning.calls import WrappedMethod
from ftp_lightning.pruning.devices import home, hooked_place
from ftp_lightning.pruning.family import find_attention, find_decoder, find_mlp
from ftp_lightning.pruning.kept import padding_arguments

if TYPE_CHECKING:
    from ftp_lightning.schedule import Schedule

SKIP = ("identity", "mean", "low-rank")
"""What a skipped token may get: nothing (paper), the mean update, or a linear map of rank r of its input."""
OUTLIER = 10.0
"""Times its row's median norm that a token's may be to be looked at [ours]."""


@dataclass(frozen=True, eq=False)
class Compensation:
    """What a token that skips block l gets: u = W_l h + b_l, W_l = up_l down_l of rank r; with r = 0 the mean, b_l.

    What h is, and what u is added to, is the part's: of a "block" its input and the residual stream; of "attention" and
    "mlp" what enters that module, and u stands for what it returns.

    Attributes:
        parts: of "block", "attention", "mlp" those that were fitted.
        tensors: per part `{part}.bias` (N, D) and, where r > 0, `{part}.down` (N, r, D) and `{part}.up` (N, D, r).
        smaller: (budget, compensation) pairs that rise: what schedules of at most that budget take instead, where it
            has maps for all blocks that they skip, see `under`. Maps that are distilled for few blocks are better there
            than those that serve all cuts.

    ValueError where one of `smaller` is for another model, for other parts, or has smaller ones itself.

    Size: N D (2 r + 1) numbers per part; in float32 at rank 8 0.2 MB for 12 blocks of 256, 8.9 MB for 32 of 4096.
    """

    parts: tuple[str, ...]
    num_blocks: int
    hidden_size: int
    rank: int
    tensors: dict[str, Tensor]
    smaller: tuple[tuple[float, Compensation], ...] = ()

    def __post_init__(self) -> None:
        shape = (self.parts, self.num_blocks, self.hidden_size)
        for _, other in self.smaller:
            if (other.parts, other.num_blocks, other.hidden_size) != shape or other.smaller or not other.rank:
                raise ValueError(f"a compensation for smaller budgets must have the sizes {shape}, and a rank")
        object.__setattr__(self, "smaller", tuple((float(budget), other) for budget, other in self.smaller))
        budgets = [budget for budget, _ in self.smaller]
        if budgets != sorted({*budgets}) or not all(map(math.isfinite, budgets)) or (budgets and not self.rank):
            raise ValueError(f"budgets of compensations must rise, and all have a rank; they are {budgets}")

    @cached_property
    def blocks(self) -> frozenset[int]:
        """Blocks in which a skipped token gets something."""
        filled = [tensor.flatten(1).any(1) for tensor in self.tensors.values()]
        return frozenset(torch.stack(filled).any(0).nonzero().flatten().tolist())

    def under(self, schedule: Schedule) -> Compensation:
        """What tokens get under a schedule: of those for its mean sparsity or more, least first, the first one that has
        maps for all blocks that skip here, else this one. A block for which this one has none needs none."""
        skipped = {block for block, share in enumerate(schedule.sparsity) if share > 0.0}
        for most, other in self.smaller:
            if schedule.budget <= most + 1e-9 and skipped & self.blocks <= other.blocks:
                return other
        return self._alone if self.smaller else self

    @cached_property
    def _alone(self) -> Compensation:
        """This one without others. Never asked of one that has none: it would hold itself, and what trains it."""
        return replace(self, smaller=())

    def with_maps(self, schedule: Schedule, found: Compensation) -> Compensation:
        """The same, but that `found` stands where `under(schedule)` stood."""
        old = self.under(schedule)
        if all(one is not old for _, one in self.smaller):
            return replace(found, smaller=self.smaller)
        return replace(self, smaller=tuple((most, found if one is old else one) for most, one in self.smaller))

    def update(self, hidden: Tensor, block: int, part: str = "block") -> Tensor:
        """u (B, T, D) for hidden (B, T, D), in the dtype of both."""
        bias = self.tensors[f"{part}.bias"][block]
        if not self.rank:
            return bias.expand(hidden.shape)
        narrow = nn.functional.linear(hidden, self.tensors[f"{part}.down"][block])
        return nn.functional.linear(narrow, self.tensors[f"{part}.up"][block], bias)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Compensation:
        """The same elsewhere, fit for training even where it is asked for in inference mode."""
        with torch.inference_mode(False):
            normal = {name: t.clone() if t.is_inference() else t for name, t in self.tensors.items()}
            moved = {name: t.to(device, dtype) for name, t in normal.items()}
        return replace(self, tensors=moved, smaller=self._smaller(lambda one: one.to(device, dtype)))

    def only(self, blocks: Sequence[int]) -> Compensation:
        """The same for these blocks; in the others a skipped token gets nothing. A stored one is smaller by them."""
        gone = [block for block in range(self.num_blocks) if block not in blocks]
        kept = {name: tensor.clone() for name, tensor in self.tensors.items()}
        for tensor in kept.values():
            tensor[gone] = 0.0
        return replace(self, tensors=kept, smaller=self._smaller(lambda one: one.only(blocks)))

    def rounded(self, dtype: torch.dtype = torch.bfloat16) -> Compensation:
        """The same, its numbers rounded to `dtype`. One in bfloat16 is stored in half of the bytes."""
        rounded = {name: t.to(dtype).to(t.dtype) for name, t in self.tensors.items()}
        return replace(self, tensors=rounded, smaller=self._smaller(lambda one: one.rounded(dtype)))

    def _smaller(self, change: Callable[[Compensation], Compensation]) -> tuple[tuple[float, Compensation], ...]:
        return tuple((budget, change(other)) for budget, other in self.smaller)

    def sizes(self) -> dict[str, Any]:
        """JSON-able: what `shapes` takes."""
        own = {"num_blocks": self.num_blocks, "hidden_size": self.hidden_size, "rank": self.rank}
        return {"parts": list(self.parts), **own}

    def digest(self) -> str:
        """16 hex digits over the numbers."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            found.update(name.encode() + tensor.cpu().float().contiguous().numpy().tobytes())
        for budget, other in self.smaller:
            found.update(f"{budget} {other.digest()}".encode())
        return found.hexdigest()[:16]


def shapes(parts: Sequence[str], num_blocks: int, hidden_size: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a compensation's tensors."""
    maps = {"down": (num_blocks, rank, hidden_size), "up": (num_blocks, hidden_size, rank)} if rank else {}
    return {f"{part}.{name}": s for part in parts for name, s in {"bias": (num_blocks, hidden_size), **maps}.items()}


def balanced(compensation: Compensation) -> Compensation:
    """The same maps with down_l and up_l of one Frobenius norm: W_l = up_l down_l does not know how it was split, a
    gradient step does."""
    tensors = dict(compensation.tensors)
    for part in compensation.parts if compensation.rank else ():
        down, up = tensors[f"{part}.down"], tensors[f"{part}.up"]
        norms = [t.flatten(1).norm(dim=1).clamp(min=1e-12).sqrt()[:, None, None] for t in (down, up)]
        tensors |= {f"{part}.down": down * norms[1] / norms[0], f"{part}.up": up * norms[0] / norms[1]}
    return replace(compensation, tensors=tensors)


def check_skip(skip: str, compensation: Compensation | None, parts: Sequence[str], num_blocks: int) -> None:
    """UserError where `compensation` is not what this skip needs for decisions about `parts` of so many blocks."""
    if skip not in SKIP:
        raise UserError(f"skip is {skip!r}, must be one of {', '.join(SKIP)}.")
    if skip == "identity":
        if compensation is not None:
            raise UserError("a compensation is given, skip='identity' adds nothing.\nSay skip='low-rank' or 'mean'.")
        return
    if compensation is None:
        raise UserError(
            f"skip={skip!r} needs to know what it adds to a skipped token.\n"
            "Give compensation=fit_compensation(model, windows, rank=R) of training.compensation, 0 for the mean."
        )
    if (compensation.rank == 0) != (skip == "mean"):
        wanted = "rank=0, the mean update alone" if skip == "mean" else "a rank of at least 1"
        raise UserError(f"skip={skip!r} takes a compensation of {wanted}; this one has rank {compensation.rank}.")
    if missing := [part for part in parts if part not in compensation.parts]:
        raise UserError(
            f"decisions address the {' and the '.join(missing)}, the compensation was fitted for the "
            f"{' and the '.join(compensation.parts)}.\nFit it with parts={'+'.join(parts)!r}."
        )
    if compensation.num_blocks != num_blocks:
        raise UserError(f"the compensation is for {compensation.num_blocks} blocks, the pruner for {num_blocks}.")


# ---------------------------------------------------------------- the regression


class Moments:
    """Sums over tokens of a block's input x and of its update y, (D,) each, in float64.

    Attributes:
        count: tokens. x, y (D,): their sums. xx, yx (D, D): the sums of x x^T and y x^T; None without `products`.
    """

    def __init__(self, hidden_size: int, device: torch.device | str = "cpu", products: bool = True):
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.count, self.x, self.y = 0, zeros(hidden_size), zeros(hidden_size)
        self.xx: Any = zeros(hidden_size, hidden_size) if products else None
        self.yx: Any = zeros(hidden_size, hidden_size) if products else None

    def add(self, x: Tensor, y: Tensor) -> None:
        """Count more tokens: x, y (n, D)."""
        x, y = x.to(self.x), y.to(self.y)
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        if self.xx is not None:
            self.xx.addmm_(x.T, x)
            self.yx.addmm_(y.T, x)

    def __add__(self, other: Moments) -> Moments:
        """The sums of two processes, or of two halves of a text."""
        both = Moments(len(self.x), self.x.device, products=False)
        both.count = self.count + other.count
        for name in ("x", "y", "xx", "yx"):
            mine, its = getattr(self, name), getattr(other, name)
            setattr(both, name, None if mine is None else mine + its.to(mine.device))
        return both

    def solve(self, rank: int, ridge: float) -> dict[str, Tensor]:
        """bias (D,), down (r, D) and up (D, r) of the best affine map of rank r from x to y, in float64.

        W = up down minimises, over all matrices of rank r, sum |y' - W x'|^2 + lambda |W|^2 with x', y' centred and
        lambda = ridge * the mean eigenvalue of S = sum x' x'^T; then b = mean y - W mean x, which is not penalised.
        With A = S + lambda and C = sum y' x'^T the unrestricted optimum is R = C A^-1, and that of rank r is P R, P the
        projection on the r leading eigenvectors of R A R^T = R C^T, the covariance of the fitted values (penalty
        included, as rows added to the data). Cutting R by its own singular values is not optimal: it knows nothing of
        x.
        """
        mean_x, mean_y = self.x / self.count, self.y / self.count
        if not rank:
            return {"bias": mean_y}
        centred = self.xx - self.count * torch.outer(mean_x, mean_x)
        cross = self.yx - self.count * torch.outer(mean_y, mean_x)
        penalty = (ridge * centred.diagonal().mean()).clamp(min=torch.finfo(centred.dtype).tiny)
        centred.diagonal().add_(penalty)
        best = torch.cholesky_solve(cross.T, torch.linalg.cholesky(centred)).T
        fitted = best @ cross.T
        up = torch.linalg.eigh((fitted + fitted.T) / 2).eigenvectors[:, -rank:]
        down = up.T @ best
        return {"bias": mean_y - up @ (down @ mean_x), "down": down, "up": up}


def fit_compensation(
    model: nn.Module, windows, rank: int = 8, ridge: float = 1e-3, batch_size: int = 8, parts: str = "block"
) -> Compensation:
    """What skipped tokens get, from one pass of the dense model over calibration text: see `gather_moments`, `solve`.

    Args:
        model: a Hugging Face causal LM in eval mode, nothing attached.
        windows: rows of prompts and continuations (`data.rows.Rows`), or batches as their `batch` makes them.
        rank: of W_l; 0 fits the mean update, for skip="mean".
        ridge: penalty in units of the mean eigenvalue of the inputs' covariance.
        batch_size: prompts per forward, where windows are given; the result does not depend on it but for rounding.
        parts: what the pruner's decisions address; "attention+mlp" fits the two apart.

    Returns a compensation in float32 on the CPU, as it is stored.
    """
    return solve_compensation(gather_moments(model, windows, batch_size, parts, products=rank > 0), rank, ridge)


def solve_compensation(moments: dict[str, list[Moments]], rank: int = 8, ridge: float = 1e-3) -> Compensation:
    """The compensation of the sums that `gather_moments` found: part -> one per block.

    UserError where the rank is not in [0, D], the penalty not positive, or there is nothing to fit.
    """
    parts, (blocks, width) = tuple(moments), _extent(moments)
    if not 0 <= rank <= width:
        raise UserError(f"the rank of a compensation is {rank}, must be in [0, {width}], the model's hidden size.")
    if not ridge > 0.0:
        raise UserError(f"the ridge of a compensation is {ridge}, must be positive.")
    if not all(one.count for sums in moments.values() for one in sums):
        raise UserError("there is no token to fit a compensation on.\nGive longer prompts, or check the model's dtype.")
    tensors: dict[str, list[Tensor]] = {}
    for part, sums in moments.items():
        for one in sums:
            for name, tensor in one.solve(rank, ridge).items():
                tensors.setdefault(f"{part}.{name}", []).append(tensor.to("cpu", torch.float32))
    return Compensation(parts, blocks, width, rank, {name: torch.stack(found) for name, found in tensors.items()}).to()


def _extent(moments: dict[str, list[Moments]]) -> tuple[int, int]:
    sums = next(iter(moments.values()))
    return len(sums), len(sums[0].x)


@torch.no_grad()
def gather_moments(
    model: nn.Module, windows, batch_size: int = 8, parts: str = "block", products: bool = True
) -> dict[str, list[Moments]]:
    """Part -> per block the sums that `solve` needs, of the dense block's input and its update, over prompt tokens.

    Left out are [ours]: the continuation, which is computed; a prompt's first and last token, which never skip; and a
    token whose norm, entering or leaving, is more than `OUTLIER` times its row's median (massive activations, Sun et
    al. 2024, which elsewhere than at the first token would outweigh all others in a sum of squares). All three go by
    the row alone, so that batches and processes add up: `Moments.__add__`.

    Memory: 16 D^2 bytes per block and part, on the model's device: 0.27 GB at D = 4096, 8.6 GB for 32 blocks; none of
    it for the mean (`products=False`). Time: one forward and 4 D^2 FLOPs per token, block and part, in float64.
    """
    decoder, blocks = find_decoder(model)
    if isinstance(decoder.__dict__.get("forward"), WrappedMethod):
        raise UserError("a compensation is fitted on the dense model, and a pruner is attached to it; detach it first.")
    place, width = home(model), decoder.config.hidden_size
    sums = ["cpu" if place.type == "mps" else hooked_place(block) or place for block in blocks]  # mps has no float64
    moments = {part: [Moments(width, one, products) for one in sums] for part in parts.split("+")}
    with ExitStack() as stack:
        observers = [
            stack.enter_context(_Observer(block, part, one))
            for part, per_block in moments.items()
            for block, one in zip(blocks, per_block)
        ]
        for ids, mask in _prompts(windows, batch_size):
            for observer in observers:
                observer.shape, observer.real = ids.shape, None if mask is None else mask.bool()
            mask = None if mask is None else mask.to(place)
            decoder(input_ids=ids.to(place), use_cache=False, **padding_arguments(mask))
    return moments


def _prompts(windows: Any, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Prompts (B, P) and, where some are padded, the mask of their real tokens; of rows or of batches."""
    batches: Iterable[dict] = windows
    if hasattr(windows, "batches"):
        batches = (batch for _, batch in windows.batches(batch_size))
    for batch in batches:
        prompt, mask = int(batch["prompt_tokens"]), batch.get("attention_mask")
        mask = None if mask is None or mask[:, :prompt].all() else mask[:, :prompt]
        yield batch["input_ids"][:, :prompt], mask


class _Observer:
    """Adds what enters and leaves a block (or part) to its sums, between enter and exit.

    `shape`: (B, T) of a batch; `real` (B, T) bool: False for padding, on the left; None = all are real.
    """

    def __init__(self, block: nn.Module, part: str, moments: Moments):
        self.entry, self.leave = _doors(block, part)
        self.part, self.moments = part, moments
        self.shape: Sequence[int] = ()
        self.real: Tensor | None = None

    def __enter__(self) -> _Observer:
        entering = self.entry.register_forward_pre_hook(self._enter, with_kwargs=True)
        self._handles = [entering, self.leave.register_forward_hook(self._add)]
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._hidden = args[0] if args else kwargs["hidden_states"]

    def _add(self, module: nn.Module, args: tuple, output) -> None:
        output = output[0] if isinstance(output, tuple) else output
        x, y = (state.reshape(*self.shape, -1).to(self.moments.x) for state in (self._hidden, output))
        y = y - x if self.part == "block" else y
        real = None if self.real is None else self.real.to(x.device)
        usual = _usual(x, real) & _usual(x + y, real)
        usual[:, 0] = usual[:, -1] = False
        if real is not None:
            usual &= real.cumsum(1) > 1
        self.moments.add(x[usual], y[usual])


def _doors(block: nn.Module, part: str) -> tuple[nn.Module, nn.Module]:
    """Where tokens enter and leave a part of a block."""
    if part == "block":
        return block, block
    if part == "attention":
        attention = find_attention(block)
        return attention, attention
    found = find_mlp(block) if part == "mlp" else None
    if found is None:
        raise UserError(f"{type(block).__name__} has no {part!r} that is understood.\nFit it with parts='block'.")
    return found


def _usual(state: Tensor, real: Tensor | None) -> Tensor:
    """(B, T) bool: real tokens of (B, T, D) whose norm is not far above their row's median."""
    norm = state.norm(dim=-1)
    if real is None:
        return norm <= OUTLIER * norm.median(dim=1, keepdim=True).values
    norm = norm.masked_fill(~real, float("nan"))  # compares as False
    return norm <= OUTLIER * norm.nanmedian(dim=1, keepdim=True).values
