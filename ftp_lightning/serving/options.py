"""What a server is started with, and what one request asks of a worker. Both travel between processes."""

from __future__ import annotations

from dataclasses import dataclass

MODES = ("off", "auto", "always")
"""Whether prompts are pruned: never, from `least_tokens` on, always."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a server is started with: the flags of `ftp-lightning serve`, which describes them."""

    model: str
    revision: str | None
    dtype: str
    device: str
    pruned: str | None
    schedule: str | None
    budget: float | None
    kv: str | tuple[str, ...] | None
    mode: str
    least_tokens: str
    dense_structured: bool
    chat_template: str | None
    max_batch: int
    workers: int
    max_new_tokens: int
    max_prompt_tokens: int | None
    max_waiting: int
    max_body: int
    timeout: float
    seed: int | None
    log_prompts: bool
    key: str | None


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request as a worker gets it.

    ids: the prompt. budget: None is that of the pruner or the server. structured: code, tables, JSON or tools.
    trace: tell of every prompt token how many blocks computed it.
    """

    ids: list[int]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    mode: str = "off"
    budget: float | None = None
    structured: bool = False
    trace: bool = False
