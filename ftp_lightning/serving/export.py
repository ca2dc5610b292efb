"""A model and its pruner as one folder that stock transformers serves and generates with.

The folder is a model of `save_pretrained` with the files of the pruner beside it, and a `custom_generate/generate.py`
that transformers runs in place of `generate` where `trust_remote_code=True` allows it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ftp_lightning import models
from ftp_lightning.disk.pruned_folder import check_base
from ftp_lightning.disk.ready import base_of, load_pruner
from ftp_lightning.errors import UserError, file_error
from ftp_lightning.hub import model_card
from ftp_lightning.models.loading import WEIGHTS as MODEL_WEIGHTS
from ftp_lightning.pruning import TokenPruner

CUSTOM = "custom_generate"
GENERATE = '''"""Stock `generate` under the token pruner of this folder. Needs `pip install ftp-lightning`."""

from ftp_lightning.serving.exported import generate_pruned


def generate(model, *args, **kwargs):
    return generate_pruned({folder!r}, model, *args, **kwargs)
'''
CARD = """
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)  # runs custom_generate/generate.py
ids = AutoTokenizer.from_pretrained("FOLDER")("a long prompt", return_tensors="pt")
model.generate(**ids, max_new_tokens=50)                   # prunes the prompt
model.generate(**ids, max_new_tokens=50, ftp_budget=0.2)   # another share of tokens; 0 is dense
```

`transformers serve FOLDER --trust-remote-code` prunes, too. A request sets its share in the text field
`generation_config`, for example `"generation_config": "{\\"ftp_budget\\": 0.2, \\"max_new_tokens\\": 50}"`.

## Traps

* Without `trust_remote_code=True` (`--trust-remote-code`) answers are dense, and nothing says so.
* `transformers serve --continuous-batching` never calls `generate`: answers are dense, and nothing says so.
* `transformers serve --compile` makes a static cache, which is refused: clients see a bare error 500, and the reason
  stands in the server's log.
* `transformers serve` answers unknown request fields, `ftp_budget` among them, with 422.
* Chat needs a tokenizer with a chat template.
* A folder that was moved works through `from_pretrained(FOLDER)`; `generate(custom_generate=FOLDER)` on a model that
  was loaded from elsewhere looks for the pruner where the folder was exported to.
"""


def export(pruned: str, folder: str, name: str | None = None, link: bool = False, again: bool = False) -> Path:
    """Write model, tokenizer, pruner, card and `custom_generate` to `folder`, whole or not at all.

    Args:
        pruned: folder of a pruner, or the name of a ready-made one.
        name: its base model; None: the one that it names.
        link: symbolic links to the weights of a base in a local folder, in place of a copy.
        again: replace an earlier export.

    Raises:
        UserError: no base is named, it is another model than the pruner's, or the folder holds something else.
    """
    target = Path(folder).expanduser().absolute()
    pruner = load_pruner(pruned)
    name = name or base_of(pruned)
    _check_target(target, again)
    model = models.load_model(name, dtype=_stored_dtype(name))
    check_base(pruner._base or {}, model)
    if len(pruner.kv) != model.config.get_text_config().num_hidden_layers:
        raise UserError(
            f"{pruned} is made for {len(pruner.kv)} blocks, {name} has others\nGive the base of the pruner."
        )
    partial = target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        _write(partial, model, name, pruner, target, link)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    except OSError as error:
        raise file_error(error) or UserError(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        if partial != target:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _write(folder: Path, model: Any, name: str, pruner: TokenPruner, target: Path, link: bool) -> None:
    if link:
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        for weights in _weights_of(name):
            (folder / weights.name).symlink_to(weights.resolve())
    else:
        model.save_pretrained(folder)
    models.load_tokenizer(name).save_pretrained(folder)
    own = folder / "pruner"  # with the identity of this very model
    pruner.save(own, base=name, model=model)
    card = model_card(own)
    for part in own.iterdir():
        part.rename(folder / part.name)
    own.rmdir()
    (folder / CUSTOM).mkdir()
    (folder / CUSTOM / "generate.py").write_text(GENERATE.format(folder=str(target)), encoding="utf-8")
    (folder / CUSTOM / "requirements.txt").write_text("ftp-lightning\n", encoding="utf-8")
    (folder / "README.md").write_text(card + CARD, encoding="utf-8")
    os.chmod(folder, 0o755)


def _stored_dtype(name: str) -> str:
    """The precision that the base is stored in."""
    stored = str(getattr(models.load_config(name).get_text_config(), "dtype", "")).removeprefix("torch.")
    return stored if stored in models.DTYPES else "float32"


def _weights_of(name: str) -> list[Path]:
    """The files of weights of a base in a folder. UserError where it is in none."""
    folder = models.EMBEDDED if name == "embedded" else Path(models.locate(name)).expanduser()
    found = [file for pattern in MODEL_WEIGHTS for file in folder.glob(pattern)] if folder.is_dir() else []
    if not found:
        raise UserError(f"the weights of {name} lie in no local folder to link to\nLeave --link out.")
    return found


def _check_target(target: Path, again: bool) -> None:
    """UserError unless the folder is new or empty, or holds an export that is to be replaced."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / CUSTOM / "generate.py").is_file():
        raise UserError(f"{target} exists and is not an export; it is left as it is\nGive another --output.")
    if not again:
        raise UserError(f"{target} already holds an export\nGive --overwrite to replace it, or another --output.")
