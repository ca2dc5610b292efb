"""The pruner: a router and a schedule, in force on a model between `attach` and `detach`."""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn

from ftp_lightning.attention_score import DEFAULT_WINDOW, AttentionScore, checked_spans
from ftp_lightning.errors import UserError
from ftp_lightning.pruning.ambient import Ambient, Latest, Training
from ftp_lightning.pruning.attached import Attached
from ftp_lightning.pruning.policies import DECODE
from ftp_lightning.pruning.trace import Routing, Trace
from ftp_lightning.routing.base import ADDRESSED, PARTS, Router
from ftp_lightning.routing.fixed import FixedRouter
from ftp_lightning.schedule import Schedule, kv_modes, kv_text
from ftp_lightning.schedule_family import ScheduleFamily
from ftp_lightning.training.compensation import Compensation, check_skip
from ftp_lightning.training.gates import StraightThrough

DEFAULT_KV = "evict"
"""The kv mode where neither pruner nor schedule says one (paper)."""
CHOICES = ("topk", "threshold")
_ATTACHING = threading.RLock()
"""One thread at a time attaches: what it checks would not hold beside another one."""


def _no_model() -> nn.Module | None:
    return None


class TokenPruner:
    """Token-wise pruning of a stock Hugging Face causal LM: `with pruner(model): model(**batch)`.

    Args:
        router: gives each token of a block a score.
        schedule: sparsity per block; may be None with a FixedRouter, which obeys its list alone.
        kv: "evict" (skipped tokens give no key and value in that block; paper) or "keep" (they do; queries, output
            projection and MLP are saved), or a list of them, one per block. Default: the mode that the schedule was
            found for, else "evict". Another mode than the schedule's is an error; `schedule.under(kv)` says that it is
            meant.
        choice: "topk" (exactly the scheduled number of tokens [ours]) or "threshold" (where p_compute > `threshold`;
        paper).
        decode: policy for continuation tokens: "dense" computes all of them, "threshold" skips a block where p_compute
            < `threshold`, "strict" where p_compute < 0.5 and the row's skipped share stays within s_l (paper, Section
            4.4). The last two ask the device at every routed block how many tokens skip.
        attention: queries that the attention score averages over: the last `window` kept ones, or "exact" = all kept
            ones; or an `AttentionScore`, which has more options.
        skip: what a skipped token gets: "identity" (h; paper), "mean" (h + b_l) or "low-rank" (h + W_l h + b_l) [ours].
            The last two need a `compensation`, and go for continuation tokens that skip, too.
        compensation: from `compensation.fit_compensation`, on the dense model that is pruned; of rank 0 for "mean".
        removed: blocks, or parts of them, that no token enters, prompt or continuation: pairs (block, "block"),
            (block, "attention") or (block, "mlp"). A block without attention stores no keys and values. The schedule
            and its budget do not count them.
        parts: what a decision addresses: "block" (paper), "attention", "mlp", or "attention+mlp", both apart. The
            schedule's s_l then is that of the part. A list says it block by block [ours]. A FixedRouter says itself
            what it addresses.
        least_tokens: prompts of fewer tokens are computed densely, since skipping would cost more than it saves; the
            trace says so (`too_short`). "auto": chosen from the model's shape by `costs.least_tokens`.
        family: schedules of other budgets for this very router and compensation; see `at`.

    A forward on an empty cache (or none) is a *prompt* and is routed; a forward on a filled cache is a *continuation*
    and follows `decode`. `with pruner.prompt():` makes a call on a filled cache a routed chunk: ranked within the
    chunk, its last token reserved, scored against the cache.

    Attributes:
        ambient: what each thread is doing with the pruner: several may use one model.
        latest: the last forward in any thread.

    Assigning a setting (`pruner.schedule = ...`) makes this pruner what `changed` would give; see there. UserError
    while it is attached. A copy is attached to nothing, unless its model is copied with it.
    """

    def __init__(
        self,
        router: Router,
        schedule: Schedule | None,
        kv: str | Sequence[str] | None = None,
        choice: str = "topk",
        threshold: float = 0.5,
        decode: str = "dense",
        attention: str | AttentionScore | Mapping[str, Any] = "window",
        window: int = DEFAULT_WINDOW,
        skip: str = "identity",
        parts: str | Sequence[str] = "block",
        compensation: Compensation | None = None,
        removed: Sequence[tuple[int, str]] = (),
        least_tokens: int | Literal["auto"] = 0,
        family: ScheduleFamily | None = None,
    ):
        _check_made_of(router, schedule, window)
        self.router, self.schedule = router, schedule
        blocks = router.num_blocks if schedule is None else schedule.num_blocks
        if family is not None and family.num_blocks != blocks:
            raise ValueError(f"the family is for {family.num_blocks} blocks, the pruner for {blocks}")
        self.family = family
        self.removed = _removed(removed, blocks)
        self._removed_by_block = {b: frozenset(p for at, p in self.removed if at == b) for b, _ in self.removed}
        self._kv_wanted = _modes(kv, schedule, blocks)
        self.kv = tuple(
            "evict" if (block, "attention") in self.removed else mode for block, mode in enumerate(self._kv_wanted)
        )
        self.choice = _one_of("choice", choice, CHOICES)
        self.decode = _one_of("decode", decode, DECODE)
        self.attention_score = AttentionScore.of(attention, int(window))
        _check_score(self.attention_score, router)
        if schedule is not None and router.needs.attention:
            self.attention_score.check_schedule(schedule.sparsity)
        self.window = self.attention_score.window if isinstance(self.attention_score.window, int) else int(window)
        said = self.attention_score.said()
        self.attention = said if isinstance(said, str) else self.attention_score
        self.parts_by_block = _parts(parts, blocks)
        uniform = len(set(self.parts_by_block)) == 1
        self.parts: str | tuple[str, ...] = self.parts_by_block[0] if uniform else self.parts_by_block
        if router.ranks_only and (choice != "topk" or decode != "dense"):
            raise UserError(
                f"a {type(router).__name__} ranks the tokens of a prompt, its scores are no probabilities.\n"
                "Use choice='topk' and decode='dense'."
            )
        self.skip, self.compensation = skip, compensation
        check_skip(skip, compensation, self.addressed, blocks)
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold is {threshold}, must be in [0, 1]")
        if least_tokens != "auto" and (type(least_tokens) is not int or least_tokens < 0):
            raise ValueError(f"least_tokens is {least_tokens!r}, must be a whole number from 0, or 'auto'")
        self.least_tokens = least_tokens
        self.threshold = float(threshold)
        self.ambient = Ambient()
        self.latest = Latest((threading.get_ident(), Trace(), list[Routing]()))
        self._attached: Attached | None = None
        self._base: dict | None = None  # what a pruned folder says of its base model: checked by `attach`
        self._model: Callable[[], nn.Module | None] = _no_model

    def __getstate__(self) -> dict:
        """A pruner that is copied or pickled leaves the model behind that it was attached to."""
        return self.__dict__ | {"_model": _no_model}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SETTINGS and "_model" in self.__dict__:  # it is made
            if self._attached is not None:
                raise UserError(
                    f"{name} cannot be changed while the pruner is attached: it would have no effect.\n"
                    f"Detach it first, or attach another one: pruner.changed({name}=...)."
                )
            own = ("ambient", "latest")
            self.__dict__.update({k: v for k, v in vars(self.changed(**{name: value})).items() if k not in own})
        else:
            super().__setattr__(name, value)

    def __repr__(self) -> str:
        budget = "no schedule" if self.schedule is None else f"budget={self.schedule.budget:.3g}"
        about = f"kv={kv_text(self.kv)}, choice={self.choice}, decode={self.decode}, skip={self.skip}"
        return f"TokenPruner({type(self.router).__name__}, {len(self.kv)} blocks, {budget}, {about})"

    def __copy__(self) -> TokenPruner:
        return self.changed()

    def __deepcopy__(self, memo: dict) -> TokenPruner:
        memo[id(self)] = other = type(self).__new__(type(self))
        alone = {"_attached": None, "_model": _no_model}
        other.__dict__.update(copy.deepcopy(self.__dict__ | alone, memo))
        return other

    @property
    def trace(self) -> Trace:
        """Of this thread's last forward, or of a later one of a thread that has ended (a streamer's)."""
        return self._last()[0]

    @property
    def decisions(self) -> list[Routing]:
        """What the router said in the last training forward, block by block."""
        return self._last()[1]

    def _last(self) -> tuple[Trace, list[Routing]]:
        own, (thread, trace, routings) = self.ambient.last, self.latest.told
        ended = thread not in (threading.get_ident(), *(other.ident for other in threading.enumerate()))
        return (trace, routings) if own is None or ended else own

    @property
    def addressed(self) -> list[str]:
        """What decisions are about: "block", or "attention" or "mlp" or both."""
        router = self.router
        if not isinstance(router, FixedRouter):
            sparsity = self.scheduled.sparsity
            named = {part for p, s in zip(self.parts_by_block, sparsity) if s > 0.0 for part in ADDRESSED[p]}
            return [part for part in PARTS if part in named] or list(ADDRESSED[self.parts_by_block[0]])
        lists = {"attention": router.keep_attention, "mlp": router.keep_mlp}
        return [part for part, masks in lists.items() if masks is not None] if router.by_parts else ["block"]

    def removed_parts(self, block: int) -> frozenset[str]:
        """ "attention", "mlp", both or neither: what is removed of a block for every token."""
        return self._removed_by_block.get(block, _NOTHING)

    @property
    def scheduled(self) -> Schedule:
        """The schedule, where the router is known to be none that goes without."""
        assert self.schedule is not None
        return self.schedule

    @property
    def reads_from(self) -> int | None:
        """The first of several blocks whose attention counts; None: only what the latest one wrote does."""
        blocks = self.attention_score.blocks
        if self.router.needs.adds_up or blocks == "max":
            return 0
        return blocks[0] if isinstance(blocks, tuple) else None

    @property
    def skip_rank(self) -> int:
        """Rank of what a skipped token is multiplied with; 0 where it is not."""
        return 0 if self.maps is None else self.maps.rank

    @property
    def maps(self) -> Compensation | None:
        """What skipped tokens get under this schedule: of a compensation with others for smaller budgets the one that
        is meant (`Compensation.under`)."""
        if self.compensation is None or self.schedule is None:
            return self.compensation
        return self.compensation.under(self.schedule)

    def rank_under(self, schedule: Schedule) -> int:
        """`skip_rank` of this pruner under another schedule."""
        return 0 if self.compensation is None else self.compensation.under(schedule).rank

    # ---------------------------------------------------------------- in force

    def attach(self, model: nn.Module) -> TokenPruner:
        """Put the pruner in force on `model`, or on the one that `torch.compile` was given to make it.

        UserError where one is in force already, the block counts differ, or a loaded pruner was made for another base
        model.
        """
        with _ATTACHING:
            self._attach(model)
        return self

    def _attach(self, model: nn.Module) -> None:
        from ftp_lightning.disk.pruned_folder import check_base
        from ftp_lightning.pruning.calls import WrappedMethod, uncompiled
        from ftp_lightning.pruning.devices import home
        from ftp_lightning.pruning.family import find_decoder

        model = uncompiled(model)
        decoder, blocks = find_decoder(model, check=False)
        if self._attached is not None:
            raise UserError(
                "this pruner is attached already; detach it first, or make a second one for a second model."
            )
        if isinstance(decoder.__dict__.get("forward"), WrappedMethod):
            raise UserError("another pruner is attached to this model; detach it first.")
        if len(blocks) != len(self.kv):
            raise UserError(f"the pruner was made for {len(self.kv)} blocks, the model has {len(blocks)}.")
        self.router.check_model(len(blocks), decoder.config.hidden_size)
        if self.compensation is not None and self.compensation.hidden_size != decoder.config.hidden_size:
            fitted, found = self.compensation.hidden_size, decoder.config.hidden_size
            raise UserError(f"the compensation was fitted at hidden size {fitted}, the model has {found}.")
        if self._base is not None:
            check_base(self._base, model)
        self.router.to(home(model))
        self.is_attached(Attached(self, model, decoder, blocks))

    def is_attached(self, attached: Attached) -> None:
        """Note where this pruner is in force."""
        self._attached = attached
        self._model = weakref.ref(attached.model)  # it is named, not kept

    def detach(self) -> None:
        """Leave the model as it was before `attach`; calls of other threads are waited for."""
        attached = self._attached
        if attached is not None:
            attached.undo()
            if self._attached is attached:  # another thread may have attached it anew
                self._attached = None

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[TokenPruner]:
        """`with pruner(model):` = attach, and detach whatever happens inside."""
        self.attach(model)
        try:
            yield self
        finally:
            self.detach()

    @contextmanager
    def prompt(self) -> Iterator[None]:
        """Inside, a forward on a filled cache is a routed chunk, not a continuation."""
        with self.ambient.having(routes_chunks=True):
            yield

    @contextmanager
    def question(self, spans: Sequence[Sequence[int]]) -> Iterator[None]:
        """Inside, prompts have their question at `spans`, which `AttentionScore(window="question")` averages over.

        spans: (start, end) among the real tokens of the prompt, end excluded: one pair for all rows, or one per row.
        UserError where they are none, or the pruner's attention score does not ask for them.
        """
        if self.attention_score.window != "question":
            raise UserError("this pruner reads no question: give it attention=AttentionScore(window='question').")
        with self.ambient.having(spans=checked_spans(spans)):
            yield

    @contextmanager
    def masked(
        self, prompt_tokens: int, gates: StraightThrough | None = None, recompute: bool = False
    ) -> Iterator[None]:
        """Inside, a forward is the differentiable one that training needs, without a cache.

        The first `prompt_tokens` of each row are routed, the rest is computed as a continuation is, in one pass. Same
        decisions and same hidden states as prefill + continuation, with the straight-through gates that are the
        default; see `training.gates` for others.

        Args:
            prompt_tokens: of each row, padding included; at least 1.
            gates: how a decision gets a gradient.
            recompute: activation checkpointing: backward computes whole blocks again instead of keeping what they
                computed.
        """
        if prompt_tokens < 1:
            raise ValueError(f"prompt_tokens is {prompt_tokens}, must be at least 1")
        with self.ambient.having(training=Training(int(prompt_tokens), gates or StraightThrough(), recompute)):
            yield

    # ---------------------------------------------------------------- on disk

    def settings(self) -> dict:
        """Everything but router, schedule and compensation, JSON-able. To make a pruner from this one use `changed`:
        it takes those along, and `TokenPruner(router, schedule, **settings)` refuses a skip without its compensation.
        """
        names = ("choice", "threshold", "decode", "attention", "window", "skip", "parts")
        return {
            "kv": list(self.kv),
            **{name: getattr(self, name) for name in names},
            "attention": self.attention_score.said(),
            **({"least_tokens": self.least_tokens} if self.least_tokens else {}),
        }

    def identity(self) -> dict:
        """JSON-able: all that decides what the pruner does. Pruners of one identity answer alike on the same model."""
        schedule = None if self.schedule is None else [self.schedule.sparsity, self.schedule.kv]
        compensation = None if self.compensation is None else self.compensation.digest()
        own = {"router": self.router.identity(), "schedule": schedule, "removed": self.removed}
        return own | {"compensation": compensation} | self.settings()

    def changed(self, **changes) -> TokenPruner:
        """A new pruner: this one's router, schedule, settings and compensation (all shared), but for `changes`.

        A changed schedule brings the kv mode that it was found for; a changed kv is meant, and becomes the schedule's.
        Blocks that are no longer removed get the kv mode back that they were given. Documents that this pruner's
        schedule was selected on stay seen, and what it says of its base model goes along. The family goes along where
        only the schedule, the decode policy or `least_tokens` change: under another router it would not hold.
        """
        own: dict = {"router": self.router, "schedule": self.schedule, "compensation": self.compensation}
        own |= {"removed": self.removed} | self.settings()
        own["family"] = self.family if set(changes) <= _OF_ONE_FAMILY else None
        uniform = len(set(self._kv_wanted)) == 1  # one name fits a schedule of any number of blocks
        own["kv"] = self._kv_wanted[0] if uniform else self._kv_wanted
        own |= changes
        if isinstance(changes.get("attention"), AttentionScore) and "window" not in changes:
            own["window"] = DEFAULT_WINDOW
        schedule = own["schedule"]
        if schedule is not None and schedule.kv is not None:
            own["schedule"] = schedule.under(changes["kv"]) if changes.get("kv") else schedule
            own["kv"] = None
        if own["schedule"] is not None and self.schedule is not None:
            own["schedule"] = own["schedule"].after(self.schedule.seen)
        pruner = TokenPruner(**own)
        pruner._base, pruner._model = self._base, self._model
        return pruner

    def with_schedule(self, schedule: Schedule) -> TokenPruner:
        """This pruner under another schedule; see `changed`."""
        return self.changed(schedule=schedule)

    def at(self, budget: float) -> TokenPruner:
        """This pruner under the schedule of its family with mean sparsity `budget`; see `ScheduleFamily.at`.

        UserError where it carries no family, or the budget is beyond the largest of it.
        """
        if self.family is None:
            raise UserError("this pruner carries one schedule alone.\nMake one with a family by `ftp-lightning tune`.")
        return self.changed(schedule=self.family.at(budget))

    def save(self, folder, base: str | None = None, model: nn.Module | None = None) -> None:
        """Write the pruner to a folder (safetensors + JSON, no pickle), whole or not at all; see `pruned_folder`.

        `base` names the base model for `load_pruned`; its identity is taken from `model`, else from the model it is or
        was attached to, else (a loaded pruner) carried over.
        """
        from ftp_lightning.disk.pruned_folder import save_pruner

        if self.removed:
            raise UserError("a pruner with removed parts cannot be stored: its list is not part of the format.")
        save_pruner(self, folder, base=base, model=self._model() if model is None else model)

    @staticmethod
    def load(folder) -> TokenPruner:
        """Read what `save` wrote. See `pruned_folder.load_pruner`."""
        from ftp_lightning.disk.pruned_folder import load_pruner

        return load_pruner(folder, TokenPruner)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise UserError(f"{name} is {value!r}, must be one of {', '.join(allowed)}.")
    return value


def _parts(parts: str | Sequence[str], blocks: int) -> tuple[str, ...]:
    """What a decision addresses, block by block. UserError for an unknown part, or a list for other blocks."""
    found = (parts,) * blocks if isinstance(parts, str) else tuple(parts)
    if len(found) != blocks:
        raise UserError(f"parts lists {len(found)} blocks, the schedule {blocks}.")
    return tuple(_one_of("parts", part, tuple(ADDRESSED)) for part in found)


def _check_made_of(router: Router, schedule: Schedule | None, window: int) -> None:
    """UserError or ValueError where router, schedule and window do not go together, or are something else."""
    if not isinstance(router, Router) or not isinstance(schedule, Schedule | None):
        raise UserError(
            f"a TokenPruner is made of a router and a Schedule, not of {type(router).__name__} and "
            f"{type(schedule).__name__}.\nFor example TokenPruner(StaticRouter(), Schedule([0.0, 0.5]))."
        )
    if window != int(window):
        raise UserError(f"window is {window}, must be a whole number of queries.")
    if schedule is None and not isinstance(router, FixedRouter):
        raise ValueError("a schedule is needed; only a FixedRouter goes without")
    if schedule is not None and isinstance(router, FixedRouter) and router.num_blocks != schedule.num_blocks:
        raise ValueError(f"FixedRouter decides {router.num_blocks} blocks, the schedule has {schedule.num_blocks}")
    if schedule is not None:
        router.check_schedule(schedule)


def _check_score(score: AttentionScore, router: Router) -> None:
    """UserError for options that this router would not read."""
    name = type(router).__name__
    if router.needs.reads is not None and not isinstance(score.said(), str):
        raise UserError(f"a {name} reads attention in its own way: leave out the options of AttentionScore.")
    if score.greatest and (router.needs.once == "from block 0" or router.needs.adds_up):
        how = "reads what the first block wrote" if router.needs.once else "adds up what all blocks wrote"
        raise UserError(f"a {name} {how}: leave out blocks={score.blocks!r}.")


_SETTINGS = frozenset(inspect.signature(TokenPruner).parameters)
_NOTHING: frozenset[str] = frozenset()
_OF_ONE_FAMILY = {"schedule", "decode", "threshold", "least_tokens", "family"}
"""What may change in a pruner whose family stays the same."""


def _removed(removed: Sequence[tuple[int, str]], blocks: int) -> tuple[tuple[int, str], ...]:
    """Every removed (block, "attention" or "mlp"), in order, each once."""
    found = set()
    for block, part in removed:
        if part not in ("block", "attention", "mlp") or not 0 <= block < blocks:
            raise ValueError(f"removed names {(block, part)!r}; of {blocks} blocks it may be block, attention or mlp")
        found |= {(block, half) for half in (("attention", "mlp") if part == "block" else (part,))}
    return tuple(sorted(found))


def _modes(kv: str | Sequence[str] | None, schedule: Schedule | None, blocks: int) -> tuple[str, ...]:
    """One mode per block; UserError where the one that is given is not the schedule's."""
    own = None if schedule is None else schedule.kv
    try:
        modes = kv_modes(own or DEFAULT_KV if kv is None else kv, blocks)
    except ValueError as error:
        raise UserError(str(error)) from None
    if own is not None and own != modes:
        raise UserError(
            f"the schedule was found for kv {kv_text(own)}, and kv is {kv_text(modes)}: it is poor under another.\n"
            "Leave kv out, or pass schedule.under(kv) if you mean it."
        )
    return modes
