"""A pruner on disk: `pruner.json` (schedule or a family of them, settings, router, base model), `router.safetensors` (a
few kB) and, where its skip is compensated, `compensation.safetensors`. No pickle, no code.

A compensation has N D (2 r + 1) numbers per part: in float32 0.2 MB for 12 blocks of 256 at rank 8, 8.9 MB for 32 of
4096. Blocks for which it is zero are left out, and numbers that bfloat16 holds exactly are stored in it: what is loaded
is what was saved. `pruner.json` tells its sizes and bytes. Those for smaller budgets lie in the same file.

Written beside the target and swapped in, so that a folder is whole or not there.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ftp_lightning.errors import UserError, file_error
from ftp_lightning.json_file import read_json
from ftp_lightning.routing import router_class, stored_name
from ftp_lightning.routing.base import Router
from ftp_lightning.schedule import Schedule
from ftp_lightning.schedule_family import ScheduleFamily
from ftp_lightning.training.compensation import Compensation, shapes
from ftp_lightning.whole_files import partial_folder

FORMAT = "ftp-lightning/pruner"
VERSION = 1
SETTINGS, WEIGHTS, COMPENSATION = "pruner.json", "router.safetensors", "compensation.safetensors"
_LARGEST_SETTINGS = 100_000
"""Bytes the settings may have [ours]: they are a few kB, anything bigger is something else."""
_LARGEST_ROUTER = 64_000_000
"""Bytes of weights a stored router may have [ours]: those that read hidden states are the largest."""
_SIZES = ("parts", "num_blocks", "hidden_size", "rank")
_STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What a compensation may be stored in."""
_LARGEST_COMPENSATION = 1_000_000_000
"""Bytes of a stored compensation [ours]: rank 64 of a model of 80 blocks and 8192 has a third of them."""
_MOST_SMALLER = 100
"""Compensations for smaller budgets that a stored one may have [ours]."""
_HEADER, _HEADER_PER_TENSOR = 4096, 256
"""Bytes that a file of weights may have beside them: names, shapes, offsets [ours]."""
_MOST = {"width": 4096, "num_blocks": 1000, "hidden_size": 65536}
"""What the sizes in the settings may be, from 1 [ours]: checked before anything is allocated for them."""


def save_pruner(pruner, folder, base: str | None = None, model: nn.Module | None = None) -> None:
    """Write `pruner` to `folder`, replacing a pruner that is there.

    Args:
        base: name of the base model, for `load_pruned`.
        model: the base model; its identity is stored, and checked when the folder is loaded.

    Raises:
        UserError: a router that cannot be stored, a target that is something else than a pruner, an unwritable place.
    """
    folder = Path(folder)
    folder = folder.resolve() if folder.is_symlink() else folder  # a link goes on to point at what is written
    router = _described_router(pruner.router)
    compensation = None if pruner.compensation is None else _described_all(pruner.compensation)
    record = {
        "format": FORMAT,
        "version": VERSION,
        "router": router,
        **pruner.schedule.record(),
        "settings": pruner.settings(),
        "compensation": compensation,
        **({} if pruner.family is None else {"family": pruner.family.records()}),
        "base": base,
        "base_identity": _identity(model) or (pruner._base or {}).get("base_identity"),
    }
    _check_target(folder)
    partial = None
    try:
        partial = partial_folder(folder)
        _write(partial, record, pruner)
        _swap(partial, folder)
    except OSError as error:
        raise file_error(error) or UserError(
            f"cannot write the pruner to {folder}: {error.strerror or error}"
        ) from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _check_target(folder: Path) -> None:
    """UserError unless `folder` is new, empty, or a pruner and nothing else: it will be replaced whole."""
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if names - {SETTINGS, WEIGHTS, COMPENSATION}:
        raise UserError(
            f"{folder} exists and holds something else than a pruner; it is left as it is.\nGive another folder."
        )


def _write(folder: Path, record: dict, pruner) -> None:
    from safetensors.torch import save

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in pruner.router.state_dict().items()}
    (folder / WEIGHTS).write_bytes(save(state))
    if pruner.compensation is not None:
        (folder / COMPENSATION).write_bytes(save(_packed_all(pruner.compensation, record["compensation"])))
    record = record | {"sha256": _checksum(record, folder)}
    (folder / SETTINGS).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _checksum(record: dict, folder: Path) -> str:
    """sha256 (hex) over what is said and the files of weights: a flipped bit is another pruner, and looks like one."""
    said = json.dumps({name: record[name] for name in sorted(record) if name != "sha256"}, sort_keys=True)
    hashed = hashlib.sha256(said.encode())
    for name in (WEIGHTS, COMPENSATION) if record.get("compensation") else (WEIGHTS,):
        hashed.update((folder / name).read_bytes())
    return hashed.hexdigest()


def without_base(folder: Path) -> bytes:
    """The settings of a stored pruner without the name of its base model, for others than this disk's owner."""
    record = read_settings(folder) | {"base": None}
    return (json.dumps(record | {"sha256": _checksum(record, folder)}, indent=1) + "\n").encode()


def _swap(new: Path, target: Path) -> None:
    """`new` takes the place of `target`, which takes that of `new`, where there is one: at no time is neither there."""
    if not target.exists() or not _exchange(new, target):
        if target.exists():
            old = target.with_name(f".{target.name}.{os.getpid()}.old")
            os.replace(target, old)
            try:
                os.replace(new, target)
            except OSError:
                os.replace(old, target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(new, target)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths at once by Linux's renameat2; False where that cannot be had, with both as they were."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        return ctypes.CDLL(None).renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
    except (AttributeError, OSError):
        return False


def load_pruner(folder, kind):
    """The pruner of class `kind` in `folder`; UserError where a file is missing, too large, broken or another one."""
    record = read_settings(folder)
    try:
        router = _build_router(dict(record["router"]))
        schedule = Schedule.from_record(record)
        compensation = _load_compensation(record.get("compensation"), Path(folder) / COMPENSATION)
        family = ScheduleFamily.from_records(record["family"]) if record.get("family") else None
        pruner = kind(router, schedule, compensation=compensation, family=family, **record["settings"])
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, UserError) and len(str(error)) < 300:
            raise
        error = " ".join(str(error).split())[:300]
        raise UserError(f"{Path(folder) / SETTINGS} does not describe a pruner: {error}") from None
    _load_weights(router, Path(folder) / WEIGHTS)
    if record.get("sha256") not in (None, _checksum(record, Path(folder))):
        raise UserError(
            f"{folder} is not as it was written: a file of it is broken or was changed.\n"
            f'Copy it anew; if you changed it, take "sha256" out of {SETTINGS}.'
        )
    pruner._base = {name: record.get(name) for name in ("base", "base_identity")}
    return pruner


def read_settings(folder) -> dict:
    """The JSON of a pruner folder, checked for format and size."""
    path = Path(folder) / SETTINGS
    try:
        record = read_json(path, _LARGEST_SETTINGS)
    except OSError as error:
        raise UserError(
            f"{folder} is not a pruner: {path.name} cannot be read ({error.strerror}).\n"
            "Make one with `ftp-lightning train`."
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is broken: {error}") from None
    if not isinstance(record, dict) or (record.get("format"), record.get("version")) != (FORMAT, VERSION):
        raise UserError(f'{path} is not "format": "{FORMAT}", "version": {VERSION}.')
    _check_base_name(record.get("base"), path)
    return record


def _check_base_name(base: Any, path: Path) -> None:
    """UserError where a base is named by something else than a name."""
    if base is not None and not (isinstance(base, str) and 0 < len(base) <= 4096 and base.isprintable()):
        raise UserError(f"{path} names a base model that cannot be one: {str(base)[:80]!r}.")


def check_base(record: dict, model: nn.Module) -> None:
    """UserError where `model` is another one than the pruner in `record` was made for; a record without identity
    passes."""
    from ftp_lightning.models import differences

    stored = record.get("base_identity")
    if stored and (different := differences(stored, model)):
        what = ", ".join(different[:3])
        raise UserError(f"the pruner was made for another base model ({what}).\nUse the base {record.get('base')!r}.")


def _identity(model: nn.Module | None) -> dict | None:
    if model is None:
        return None
    from ftp_lightning.models import base_record

    return base_record(model)


def _described_router(router: Router) -> dict:
    """The name and the arguments that `router` is built from again; UserError where they do not give its like."""
    name, given = stored_name(router), router.config()
    own = f"a {type(router).__name__} cannot be stored"
    try:
        given = json.loads(json.dumps(given))
        again = _check_size({**given, "name": name})
    except UserError:
        raise
    except Exception as error:  # of a router that somebody else wrote
        raise UserError(f"{own}: its config() does not build it again ({str(error)[:200]}).") from None
    state = router.state_dict()
    if "name" in given or _shapes(again) != _shapes(router):
        raise UserError(f"{own}: its config() builds one with other weights, or has an argument called name.")
    if any(tensor.dtype != torch.float32 for tensor in state.values()):
        raise UserError(f"{own}: its weights and buffers must be float32.")
    _check_finite(state, f"{own}: its weights")
    return {"name": name, **given}


def _check_finite(tensors: Mapping[str, torch.Tensor], whose: str) -> None:
    """UserError for numbers that a stored pruner may not have."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise UserError(
            f"{whose} are not finite.\nTrain or fit it anew; a training that diverges needs a smaller rate."
        )


def _shapes(router: Router) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in router.state_dict().items()}


def _bytes(router: Router) -> int:
    """Of its weights and buffers as they are stored, in float32."""
    return 4 * sum(map(math.prod, _shapes(router).values()))


def _build_router(config: dict) -> Router:
    _check_size(config)
    return _router(config)


def _check_size(config: dict) -> Router:
    """The router of these settings without its numbers; UserError where it is larger than a stored one may be."""
    for name in _MOST.keys() & config.keys():
        value = config[name]
        if type(value) is not int or value < 1:
            raise UserError(f"a router's {name} must be a whole number from 1 to {_MOST[name]}, got {value!r}.")
        if value > _MOST[name]:
            raise UserError(f"a router's {name} of {value} is more than the {_MOST[name]} that a stored one may have.")
    with torch.device("meta"):
        router = _router(dict(config))
    if (size := _bytes(router)) > _LARGEST_ROUTER:
        raise UserError(f"this router takes {size} bytes, more than the {_LARGEST_ROUTER} that a stored one may have.")
    return router


def _router(config: dict) -> Router:
    kind = router_class(config.pop("name"))
    if "names" in config:
        config["names"] = tuple(config["names"])
    return kind(**config)


def _load_weights(router: Router, path: Path) -> None:
    wanted = {name: (shape, torch.float32) for name, shape in _shapes(router).items()}
    router.load_state_dict(_read(path, "router", wanted, _bytes(router)))


def _read(
    path: Path, what: str, wanted: dict[str, tuple[tuple[int, ...], torch.dtype]], size: int
) -> dict[str, torch.Tensor]:
    """The tensors in a file that should hold `size` bytes of them, each of the shape and dtype in `wanted`; UserError
    for more, or for others."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    most = size + _HEADER + _HEADER_PER_TENSOR * len(wanted)
    try:
        if not path.is_file():
            raise UserError(f"{path} is not a file; it should hold the {what}'s weights.")
        if path.stat().st_size > most:
            raise UserError(f"{path} has {path.stat().st_size} bytes; the {what} it should hold has at most {most}.")
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"the {what}'s weights {path} cannot be read: {error}") from None
    found, expected = {n: tuple(t.shape) for n, t in state.items()}, {n: shape for n, (shape, _) in wanted.items()}
    if expected != found:
        raise UserError(f"{path} holds a {what} of another shape: {str(found)[:300]}, expected {str(expected)[:300]}.")
    for name, (_, dtype) in wanted.items():
        if state[name].dtype != dtype or not bool(state[name].isfinite().all()):
            kind = str(dtype).removeprefix("torch.")
            raise UserError(f"{path} holds a {what} whose numbers are not {kind} and finite.")
    return state


def _described(sizes: dict) -> dict:
    """What `pruner.json` says of a compensation: its sizes, and the bytes of its numbers. UserError where a stored one
    may not have these; allocates nothing."""
    parts, most = sizes["parts"], {"num_blocks": _MOST["num_blocks"], "hidden_size": _MOST["hidden_size"]}
    if not isinstance(parts, list) or not parts or not all(part in ("block", "attention", "mlp") for part in parts):
        raise UserError(f"a compensation's parts must be of block, attention, mlp, got {parts!r}.")
    for name, least in {**dict.fromkeys(most, 1), "rank": 0}.items():
        top = most.get(name, sizes["hidden_size"])
        value = sizes[name]
        if type(value) is not int or not least <= value <= top:
            raise UserError(f"a compensation's {name} must be a whole number from {least} to {top}, got {value!r}.")
    if sizes.get("dtype", "float32") not in _STORED:
        raise UserError(f"a compensation's dtype must be of {', '.join(_STORED)}, got {str(sizes['dtype'])[:80]!r}.")
    blocks = sizes.get("blocks")
    if blocks is not None and not (
        isinstance(blocks, list)
        and all(type(block) is int and 0 <= block < sizes["num_blocks"] for block in blocks)
        and blocks == sorted({*blocks})
    ):
        raise UserError(f"a compensation's blocks must rise within {sizes['num_blocks']}, got {str(blocks)[:80]}.")
    size = _dtype(sizes).itemsize * sum(map(math.prod, _stored_shapes(sizes).values()))
    if size > _LARGEST_COMPENSATION:
        raise UserError(f"this compensation takes {size} bytes, more than the {_LARGEST_COMPENSATION} of a stored one.")
    return {**sizes, "bytes": size}


def _described_all(compensation: Compensation) -> dict:
    """`_described` of a compensation; those for smaller budgets stand in its "smaller", each with its budget."""
    _check_finite(compensation.tensors, "this compensation's numbers")
    own = _described(_packing(compensation))
    _check_smaller(compensation.smaller)
    smaller = [{"budget": budget, **_described_all(other)} for budget, other in compensation.smaller]
    return own | {"smaller": smaller} if smaller else own


def _check_smaller(smaller: Any) -> None:
    """UserError for more compensations for smaller budgets than a stored one may have."""
    if not isinstance(smaller, (list, tuple)) or len(smaller) > _MOST_SMALLER:
        raise UserError(f"a compensation has at most {_MOST_SMALLER} others for smaller budgets.")


def _packed_all(compensation: Compensation, described: dict) -> dict[str, torch.Tensor]:
    """The tensors as they are stored; the names of those for the first smaller budget begin with "0/", and so on."""
    state = _packed(compensation, described)
    for place, (_, other) in enumerate(compensation.smaller):
        packed = _packed(other, described["smaller"][place])
        state |= {f"{place}/{name}": tensor for name, tensor in packed.items()}
    return state


def _packing(compensation: Compensation) -> dict:
    """Its sizes, and how it is stored: "dtype" and "blocks", where these are not float32 and all blocks."""
    tensors = compensation.tensors.values()
    packing = compensation.sizes()
    if all(bool((t.bfloat16().to(t.dtype) == t).all()) for t in tensors):
        packing["dtype"] = "bfloat16"
    filled = sorted(compensation.blocks)
    return packing if len(filled) == compensation.num_blocks else packing | {"blocks": filled}


def _packed(compensation: Compensation, packing: dict) -> dict[str, torch.Tensor]:
    """The tensors as they are stored."""
    kept = packing.get("blocks", list(range(compensation.num_blocks)))
    return {name: t.detach().cpu()[kept].to(_dtype(packing)).contiguous() for name, t in compensation.tensors.items()}


def _sizes(packing: dict) -> dict[str, Any]:
    return {name: packing[name] for name in _SIZES}


def _dtype(packing: dict) -> torch.dtype:
    return _STORED[packing.get("dtype", "float32")]


def _stored_shapes(packing: dict) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the stored tensors."""
    whole = shapes(**_sizes(packing))
    count = len(packing["blocks"]) if packing.get("blocks") is not None else packing["num_blocks"]
    return {name: (count, *shape[1:]) for name, shape in whole.items()}


def _load_compensation(described: dict | None, path: Path) -> Compensation | None:
    """The compensation of these sizes; UserError where the file holds another one, or numbers that are none."""
    if described is None:
        return None
    smaller = described.get("smaller", [])
    _check_smaller(smaller)
    packings = [_checked(one) for one in (described, *smaller)]
    unpacked = 4 * sum(math.prod(shape) for one in packings for shape in shapes(**_sizes(one)).values())
    if unpacked > 2 * _LARGEST_COMPENSATION:
        raise UserError(f"this compensation takes {unpacked} bytes, more than the {2 * _LARGEST_COMPENSATION} of one.")
    names = ["", *(f"{place}/" for place in range(len(smaller)))]
    wanted = [
        {f"{before}{name}": (shape, _dtype(packing)) for name, shape in _stored_shapes(packing).items()}
        for before, packing in zip(names, packings, strict=True)
    ]
    size = sum(packing["bytes"] for packing in packings)
    state = _read(path, "compensation", {name: about for one in wanted for name, about in one.items()}, size)
    parts = [{name.removeprefix(before): state[name] for name in one} for before, one in zip(names, wanted)]
    own, *others = [_unpacked(part, packing) for part, packing in zip(parts, packings, strict=True)]
    budgets = [float(one["budget"]) for one in smaller]
    return replace(own, smaller=tuple(zip(budgets, others, strict=True)))


def _checked(described: dict) -> dict:
    return _described({n: described[n] for n in (*_SIZES, "dtype", "blocks") if n in described or n in _SIZES})


def _unpacked(state: dict[str, torch.Tensor], packing: dict) -> Compensation:
    """From the stored tensors, those of all blocks in float32."""
    state = {name: tensor.float() for name, tensor in state.items()}
    sizes = _sizes(packing)
    if (blocks := packing.get("blocks")) is not None:
        whole = {name: torch.zeros(shape, dtype=torch.float32) for name, shape in shapes(**sizes).items()}
        state = {
            name: whole[name].index_copy(0, torch.tensor(blocks, dtype=torch.int64), state[name]) for name in whole
        }
    return Compensation(tensors=state, **sizes | {"parts": tuple(packing["parts"])})
