"""Stage `serve`: an OpenAI-compatible server."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from ftp_lightning.cli.kv import AUTO, given_modes, kv_option
from ftp_lightning.cli.option import option
from ftp_lightning.cli.progress import Progress
from ftp_lightning.cli.settings import Settings
from ftp_lightning.errors import UserError
from ftp_lightning.named_file import read_named_text

_LARGEST_KEY_FILE = 65_536
"""Bytes that the file of a key may have [ours]."""


@dataclass(frozen=True, kw_only=True)
class ServeStage(Settings):
    """Serve a model to OpenAI clients. It answers densely unless --pruned, --schedule, --budget, --ftp_mode or a
    request asks for pruning.
    """

    stage: ClassVar[str] = "serve"

    model: str | None = option(
        None, "Hub name, folder, GGUF file or named model; by default that of --pruned, or `embedded`"
    )
    pruned: str | None = option(None, "folder of a pruner, or the name of a ready-made one (docs/models.md)")
    schedule: str | None = option(None, "schedule.json or schedules.json; replaces that of --pruned")
    budget: float | None = option(None, "share of tokens that skip, for requests that name none", least=0.0, below=1.0)
    kv: str = kv_option(
        AUTO,
        "keys and values of skipped tokens; auto is the mode of --pruned, --schedule or the default schedule",
        AUTO,
    )
    ftp_mode: Literal["off", "auto", "always"] | None = option(
        None, "never prune; from --least_tokens on; always. By default auto where a pruner or budget is given, else off"
    )
    least_tokens: str = option(
        "auto", "shorter prompts are computed densely under auto; auto: where skipping would cost more"
    )
    dense_structured: bool = option(False, "under auto leave code, tables, JSON and requests with tools dense")
    chat_template: str | None = option(None, "Jinja file, or plain: the turns' texts; by default the tokenizer's own")
    revision: str | None = option(None, "revision of a Hub model: branch, tag or commit")
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = option("float32", "precision of the model")
    device: str = option("auto", "cpu, cuda, cuda:1; `auto` takes the best there is")
    workers: int = option(1, "processes, each with the model", least=1)
    max_batch: int = option(8, "requests that are computed together, at most", least=1)
    host: str = option("127.0.0.1", "address to listen at; 0.0.0.0 lets other machines in")
    port: int = option(8000, "port to listen at; 0 takes a free one and prints it", least=0, most=65535)
    api_key_file: str | None = option(None, "file whose first line is the API key that clients must send")
    max_new_tokens: int = option(256, "tokens of an answer whose request gives no max_tokens", least=1)
    max_prompt_tokens: int | None = option(None, "longer prompts are refused (400); by default what the model takes")
    max_waiting: int = option(64, "requests at once, waiting and running; further ones are refused (429)", least=1)
    max_body: int = option(2_000_000, "bytes of a request; larger ones are refused (413)", least=1000)
    timeout: float = option(600.0, "seconds until a request is given up (504)", above=0.0)
    seed: int | None = option(
        None, "seed of requests that give none; by default each of them draws anew", least=0, most=2**32 - 1
    )
    log_prompts: bool = option(False, "write prompts into the log, too")

    def check(self) -> None:
        if self.least_tokens != "auto" and not self.least_tokens.isdecimal():
            raise UserError(f"least_tokens is {self.least_tokens!r}\nGive auto, or a whole number of tokens from 0.")

    def execute(self, progress: Progress | None = None) -> Path:
        from ftp_lightning.serving.options import Served
        from ftp_lightning.serving.server import log_to_stderr, serve

        served = Served(
            **{name: getattr(self, name) for name in Served.__dataclass_fields__ if hasattr(self, name)}
            | {"model": self._model(), "mode": self._mode(), "key": self._key(), "kv": given_modes(self.kv)}
        )
        log_to_stderr()
        how = f"--ftp_mode {served.mode}" + (f", pruner {self.pruned}" if self.pruned else "")
        serve(served, self.host, self.port, lambda at: print(f"ready: {at} serves {served.model} ({how})", flush=True))
        return Path()

    def _model(self) -> str:
        """The model that is served; of a ready-made pruner a line says where it was made from other weights."""
        if self.model is not None or self.pruned is None:
            return self.model or "embedded"
        from ftp_lightning.disk.ready import base_of, is_ready, other_weights

        if is_ready(self.pruned) and (told := other_weights(self.pruned)):
            print(told, file=sys.stderr)
        return base_of(self.pruned)

    def _mode(self) -> str:
        asked = self.pruned or self.schedule or self.budget is not None
        return self.ftp_mode or ("auto" if asked else "off")

    def _key(self) -> str | None:
        """The first line of --api_key_file. UserError where there is none."""
        if self.api_key_file is None:
            return None
        key = read_named_text(self.api_key_file, _LARGEST_KEY_FILE).partition("\n")[0].strip()
        if len(key) < 8:
            raise UserError(f"the key in {self.api_key_file} has {len(key)} characters\nWrite one of at least 8.")
        return key
