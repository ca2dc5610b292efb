"""Models and tokenizers by name: `embedded`, a named model, a folder, a GGUF file, a Hub name or `random:SHAPE`."""

from ftp_lightning.models.identity import base_record, differences, model_identity, remember_identity
from ftp_lightning.models.loading import (
    DTYPES,
    EMBEDDED,
    load,
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
)
from ftp_lightning.models.named import hub_name, locate, title
from ftp_lightning.models.random_weights import SHAPES, random_config

__all__ = [
    "DTYPES",
    "EMBEDDED",
    "SHAPES",
    "base_record",
    "differences",
    "hub_name",
    "load",
    "load_config",
    "load_model",
    "load_tokenizer",
    "locate",
    "model_identity",
    "random_config",
    "remember_identity",
    "resolve_device",
    "title",
]
