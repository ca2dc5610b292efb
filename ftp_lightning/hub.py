"""A pruner on the Hugging Face Hub: pushed as one commit with a card of its own numbers, and had back by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ftp_lightning.cells import markdown_code, markdown_text, yaml_text
from ftp_lightning.disk.pruned_folder import COMPENSATION, SETTINGS, WEIGHTS, read_settings, without_base
from ftp_lightning.errors import UserError, hub_errors
from ftp_lightning.fingerprint import hash_path
from ftp_lightning.json_file import read_json
from ftp_lightning.models.named import is_named
from ftp_lightning.products import read_provenance
from ftp_lightning.pruning.pruner import TokenPruner
from ftp_lightning.schedule import kv_name

FILES = (SETTINGS, WEIGHTS, COMPENSATION)
"""All that is ever sent or fetched: no code, no pickle, no name that a repository chooses."""
_LARGEST_RESULTS = 64_000_000


def push_to_hub(
    folder: str | Path,
    repo: str,
    *,
    results: str | Path | None = None,
    private: bool = False,
    message: str = "Upload pruner",
    api: Any = None,
) -> str:
    """Send the pruner in `folder` to the model repository `repo`, made if it is not there, in one commit. Returns its
    address. The token is the one that `hf auth login` or HF_TOKEN has given.

    Args:
        results: folder of the stage `evaluate` of this very pruner; its numbers go into the card.
        api: `huggingface_hub.HfApi` or its like.

    UserError where the folder is no sound pruner, the results are of another one, or the Hub refuses.
    """
    from huggingface_hub import CommitOperationAdd

    folder, api = Path(folder), api or _api()
    TokenPruner.load(folder)
    card = model_card(folder, results)
    sent = {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}
    if public_base(read_settings(folder).get("base")) is None:
        sent[SETTINGS] = without_base(folder)
    operations = [CommitOperationAdd(name, content) for name, content in sent.items()]
    operations.append(CommitOperationAdd("README.md", card.encode()))
    _asked(repo, lambda: api.create_repo(repo, private=private, exist_ok=True, repo_type="model"))
    return str(_asked(repo, lambda: api.create_commit(repo, operations=operations, commit_message=message)).commit_url)


def from_pretrained(name: str | Path, *, revision: str | None = None, api: Any = None) -> TokenPruner:
    """The pruner in a folder, or in the Hub's repository of this name. UserError as `TokenPruner.load`."""
    return TokenPruner.load(fetched(name, revision=revision, api=api))


def fetched(name: str | Path, *, revision: str | None = None, api: Any = None) -> Path:
    """The folder of a pruner: `name` itself, or where the repository of that name now lies on this disk."""
    path = Path(name).expanduser()
    if path.exists() or str(name).startswith((".", "/", "~")) or str(name).count("/") != 1:
        return path
    api = api or _api()
    where = {"revision": revision, "allow_patterns": list(FILES)}
    return Path(_asked(str(name), lambda: api.snapshot_download(str(name), **where)))


def model_card(folder: str | Path, results: str | Path | None = None) -> str:
    """README.md of a pruner: what it is of and does, and where `results` are given what it was measured to lose."""
    record = read_settings(folder)
    base, sparsity, router = public_base(record.get("base")), record["sparsity"], record["router"]
    of_base = [f"base_model: {yaml_text(base)}"] if base and "/" in base else []
    head = ["---", "library_name: ftp_lightning", "tags: [token-pruning, ftp]", *of_base, "---"]
    settings = record["settings"]
    kv = kv_name(settings["kv"])
    lines = [
        f"# Token pruner for {markdown_text(base) if base else 'a causal language model'}",
        f"A prompt's tokens skip blocks: {sum(sparsity) / len(sparsity):.1%} of them on average over {len(sparsity)} "
        f"blocks. Router {markdown_code(router['name'])}, keys and values `{kv}`, choice `{settings['choice']}`.",
        "| block | " + " | ".join(map(str, range(1, len(sparsity) + 1))) + " |",
        "|---" * (len(sparsity) + 1) + "|",
        "| tokens that skip, % | " + " | ".join(f"{100 * s:.0f}" for s in sparsity) + " |",
        "",
        *(_measured(Path(folder), Path(results)) if results else ["Not evaluated."]),
        "",
        "```python",
        "from ftp_lightning import load_pruned",
        "from ftp_lightning.hub import fetched",
        "",
        'model, tokenizer = load_pruned(fetched("OWNER/NAME"))  # of this repository',
        "```",
    ]
    return "\n".join([*head, "", *lines]) + "\n"


def public_base(base: str | None) -> str | None:
    """The name of a base model as others may be told it: a Hub name, or one that this package knows. None for a folder
    or a file, whose path tells of this disk."""
    if not base or base.lower().endswith(".gguf") or Path(base).expanduser().exists():
        return None
    known = base == "embedded" or is_named(base) or base.startswith("random:")
    return base if known or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base) else None


def _measured(folder: Path, results: Path) -> list[str]:
    """The numbers of the stage `evaluate`; UserError where they are those of another pruner."""
    provenance = read_provenance(results) or {}
    if provenance.get("parts", {}).get("pruned") != hash_path(folder):
        raise UserError(f"{results} holds no evaluation of {folder}\nGive the folder that `evaluate --pruned` wrote.")
    try:
        found = read_json(results / "results.json", _LARGEST_RESULTS)
        ours = found["methods"][-1]
        rows = {
            "tokens skipped": f"{ours['realised_sparsity']:.1%}",
            "FLOPs of the prompt saved": f"{ours['flops_reduction']:.1%}",
            "KL to dense per continuation token": f"{ours['kl']['mean']:.4g}",
            "perplexity, dense and pruned": f"{found['dense']['ppl']:.4g}, {ours['ppl']['prompt']:.4g}",
        }
        kept = ours["kept"]
        if kept:
            known = kept["low"] is not None
            ends = f"{100 * kept['low']:.1f} to {100 * kept['high']:.1f}" if known else kept["note"]
            rows["answers kept"] = f"{100 * kept['share']:.1f} % ({ends}, {kept['items']} items)"
        for task, cell in ours["tasks"].items():
            if cell["acc"] is not None and task in found["dense"]["tasks"]:
                rows[f"accuracy, {markdown_text(task)}, dense and pruned"] = (
                    f"{found['dense']['tasks'][task]['acc']:.3f}, {cell['acc']:.3f}"
                )
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{results}/results.json cannot be read: {error}\nRun `evaluate` again.") from None
    versions = provenance.get("versions", {}).get("ftp-lightning")
    told = f"Measured by `{provenance['stage']}`, ftp-lightning {versions}, code {provenance['parts']['code']}:"
    return [told, "", "| | |", "|---|---|", *(f"| {what} | {number} |" for what, number in rows.items())]


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="ftp-lightning")


def _asked(name: str, ask) -> Any:
    """`ask()`, with what the Hub and the network answer told in a sentence, which holds no token."""
    try:
        return ask()
    except hub_errors(OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        remedy = "Check the name, the network, HF_HUB_OFFLINE and `hf auth login`."
        raise UserError(f"{name} on the Hub: {reason}\n{remedy}") from None
