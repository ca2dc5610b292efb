"""What all stages share: settings that are checked where they are born, and the way a stage is carried out."""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftp_lightning.artifact import StageFolder
from ftp_lightning.cli.kv import AUTO, kv_option
from ftp_lightning.cli.option import check_bounds, check_reachable, check_words, option
from ftp_lightning.cli.progress import Progress
from ftp_lightning.data.stories import SPLITS
from ftp_lightning.device_map import read_device_map
from ftp_lightning.disk.ready import pruner_folder
from ftp_lightning.errors import UserError, file_error
from ftp_lightning.fingerprint import hash_path
from ftp_lightning.json_file import read_json
from ftp_lightning.products import read_provenance
from ftp_lightning.schedule_family import LARGEST, holds_family

ASSETS = Path(__file__).resolve().parent.parent / "assets"
BUDGET_LENGTH = 1024


@dataclass(frozen=True, kw_only=True)
class Settings(ABC):
    """Every subclass is the command line, the YAML schema and the help of one stage.

    Raises UserError where a value is out of its bounds. Subclasses extend `check`.
    """

    stage: ClassVar[str]
    first_flags: ClassVar[tuple[str, ...]] = ()
    """Flags that `--help` shows before all others, see `cli.flags`."""
    hidden_flags: ClassVar[tuple[str, ...]] = ()
    """Flags that the stage refuses, so that no help shows them."""

    def __post_init__(self) -> None:
        for item in fields(self):
            if read := item.metadata["read"]:
                object.__setattr__(self, item.name, read(getattr(self, item.name)))
            check_bounds(item.name, getattr(self, item.name), item.metadata["bounds"])
            if not item.metadata["raw"]:
                check_words(item.name, getattr(self, item.name))
        self.check()

    def check(self) -> None:  # noqa: B027  a hook, empty where bounds say all
        """What a single bound cannot say; UserError where values do not go together."""

    @abstractmethod
    def execute(self, progress: Progress | None = None) -> Path:
        """Carry the stage out. Returns the folder it wrote to."""

    def config(self) -> dict[str, Any]:
        """All settings, ready for YAML; `--config` reads it back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def command(self) -> str:
        """The shortest command line that gives these settings."""
        changed = [item.name for item in fields(self) if getattr(self, item.name) != item.default]
        words = [f"--{name}={_as_argument(getattr(self, name))}" for name in changed]
        return shlex.join(["ftp-lightning", self.stage, *words])


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """What names a model, a text, and a folder for what is found."""

    default_split: ClassVar[str] = "calibration"
    spreads: ClassVar[bool] = True
    """Whether the stage takes a model whose blocks lie on several devices."""

    model: str = option(
        "embedded",
        "Hub name, folder, GGUF file, a named model (docs/models.md), random:SHAPE, or `embedded`",
    )
    data: str = option("embedded", "text file, folder of them, JSON(L), Hub data set, or `embedded`: our stories")
    split: str = option(
        "auto", "part of the text: calibration, training, validation, test, all; `auto` is what the stage is for"
    )
    output: str | None = option(None, "folder to write; by default runs/STAGE", passive=True)
    seed: int = option(0, "seed of everything random", least=0, most=2**32 - 1)
    device: str = option("auto", "cpu, cuda, cuda:1; `auto` takes the best there is")
    device_map: str = option(
        "none", "auto: spread the blocks over all devices; or a JSON file that maps modules to devices", passive=True
    )
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = option("float32", "precision of the model")
    revision: str | None = option(None, "revision of a Hub model: branch, tag or commit")
    overwrite: bool = option(False, "run again although this folder holds a finished stage", passive=True)
    estimate: str | None = option(
        None, "only print the memory and time needed on GPUs, such as 8x80 (8 of 80 GB each)", passive=True
    )
    tracking: Literal["csv", "tensorboard", "wandb", "none"] = option(
        "csv", "where metrics are logged during the run", passive=True
    )
    prompt_tokens: int = option(
        192, "tokens of a window that are routed; longer prompts are left out", least=4, most=10**7
    )
    continuation_tokens: int = option(64, "tokens after the prompt that are scored, at most", least=1, most=10**7)

    def __post_init__(self) -> None:
        if self.model == ModelSettings.model and (base := _base_of(getattr(self, "pruned", None))) is not None:
            object.__setattr__(self, "model", base)
        super().__post_init__()
        if self.split not in (known := ("auto", *SPLITS, "all")):
            raise UserError(f"unknown split {self.split!r}\nGive --split one of {', '.join(known)}.")
        self._check_device_map()

    def _check_device_map(self) -> None:
        """UserError where one model is to lie on all devices, and something else wants to know which is its own."""
        if read_device_map(self.device_map) is None:
            return
        if not self.spreads:
            raise UserError(f"{self.stage} works on one device only\nLeave --device_map out.")
        if self.device != "auto":
            raise UserError(
                "--device cannot be combined with --device_map: the map places every block\nRemove one of them."
            )
        if getattr(self, "processes", 1) > 1:
            raise UserError(
                "--device_map spreads one model over all devices, and --processes needs one for each process\n"
                "Remove one of them."
            )

    @property
    def folder(self) -> Path:
        return Path(self.output or f"runs/{self.stage}").expanduser()

    @property
    def chosen_split(self) -> str:
        return self.default_split if self.split == "auto" else self.split

    def shared(self) -> dict[str, Any]:
        """The flags that every stage on the same model has, but for its folder and its part of the text."""
        names = {item.name for item in fields(ModelSettings)} - {"split", "output"}
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class RowsSettings(ModelSettings):
    """A stage that measures or trains on rows: a prompt that is routed, and a continuation that is scored."""

    rows: Literal["windows", "prompts", "own_answers"] = option(
        "windows",
        "windows of text; prompts of their own length, with their answers, from chat, instruction or prompt records; "
        "own_answers: the same prompts, each with what the dense model answers greedily",
    )
    own_answers: str = option("runs/own_answers", "folder that keeps the dense model's own answers", passive=True)

    def row_flags(self) -> dict[str, str]:
        """What a stage hands on to others that measure on the same rows."""
        return {"rows": self.rows, "own_answers": self.own_answers}


@dataclass(frozen=True, kw_only=True)
class BudgetSettings(ModelSettings):
    """A stage whose --budget is a share of tokens, or of a prompt's FLOPs.

    A share of FLOPs is translated into a token sparsity. For `search` and `run` it is that of the uniform schedule with
    this FLOPs cut, which they spread over the blocks; elsewhere it is that of the default schedule.
    """

    budget_kind: Literal["tokens", "flops"] = option(
        "tokens", "--budget is a share of tokens, or of a prompt's FLOPs that is saved"
    )
    budget_length: int = option(BUDGET_LENGTH, "with --budget_kind flops, tokens of that prompt", least=4, most=10**7)

    if TYPE_CHECKING:

        @property
        def budget(self) -> float | None:
            """A field of every stage that has a budget, with a default of its own."""

    def check(self) -> None:
        """UserError where the kind has nothing to say something about, or the budget is out of reach."""
        if self.budget_kind == "tokens":
            if self.budget_length != BUDGET_LENGTH:
                raise UserError(
                    "--budget_length has no effect on a budget of tokens\nAdd --budget_kind flops, or leave it out."
                )
            check_reachable(self.budget or 0.0, self.prompt_tokens)
        elif self.budget is None and not getattr(self, "budgets", ()):
            raise UserError("--budget_kind flops needs a budget\nGive --budget, or leave --budget_kind out.")


class StageSettings(ModelSettings):
    """A stage that fills a folder of its own."""

    repeats: ClassVar[bool] = False
    """Whether a finished folder of this very stage is simply written anew, as if by --overwrite."""

    @abstractmethod
    def work(self, folder: StageFolder, progress: Progress) -> None:
        """Read the inputs, call one edge, write the products into `folder`."""

    def execute(self, progress: Progress | None = None) -> Path:
        """Fill the folder, unless it holds the same stage, finished. UserError where it holds another one."""
        if self.estimate is not None:
            return self.say_estimate()
        progress = progress or Progress(self.stage)
        again = self.overwrite or (self.repeats and (read_provenance(self.folder) or {}).get("stage") == self.stage)
        with StageFolder(self.folder, self.stage, self.config(), self.identity(), self.command(), again) as folder:
            if folder.finished:
                progress.done_already(f"{self.folder} is done already; --overwrite runs it again")
            else:
                self.work(folder, progress)
        return self.folder

    def say_estimate(self) -> Path:
        """Print what the stage would take."""
        from ftp_lightning.cli.estimate import told

        print(told(self))
        return self.folder

    def identity(self) -> dict[str, Any]:
        """What decides the result besides the code: the settings that matter, files by the hash of their content."""
        settings = {item.name: getattr(self, item.name) for item in fields(self) if not item.metadata["passive"]}
        files = [item.name for item in fields(self) if item.metadata["is_file"]]
        settings |= {name: _content(name, getattr(self, name)) for name in files}
        settings["model"] = _model_identity(self.model, self.revision)
        settings["data"] = text_identity(self.data)
        return settings


@dataclass(frozen=True, kw_only=True)
class PrunedSettings(BudgetSettings, StageSettings):
    """A stage that looks at one pruner: a folder, or the static router under a schedule."""

    default_split: ClassVar[str] = "test"

    pruned: str | None = option(None, "folder of a pruner, or the name of a ready-made one", is_file=True)
    schedule: str | None = option(None, "schedule.json; replaces that of --pruned", is_file=True)
    budget: float | None = option(
        None,
        "share of tokens that skip: of the default schedule, or of a pruner or file with a family of schedules",
        least=0.0,
        below=1.0,
    )
    kv: str = kv_option(
        AUTO,
        "keys and values of skipped tokens; auto is the mode of --pruned, --schedule or the default schedule",
        AUTO,
    )
    decode: Literal["auto", "dense", "threshold", "strict"] = option(
        "auto", "which generated tokens skip blocks; auto takes that of --pruned, else dense (none)"
    )

    def check(self) -> None:
        one_schedule = self.pruned and not carries_family(self.pruned)
        if self.schedule is not None:
            one_schedule = not holds_family(self.schedule)
        if self.budget is not None and one_schedule:
            raise UserError(
                "--budget cannot be combined with --pruned or --schedule: both already set a budget\n"
                "Remove one of them."
            )
        super().check()


def carries_family(folder: str) -> bool:
    """Whether a pruner's folder holds schedules of several budgets; where it cannot be read, others tell that."""
    try:
        record = read_json(pruner_folder(folder) / "pruner.json", LARGEST)
    except (OSError, ValueError):
        return True
    return isinstance(record, dict) and bool(record.get("family"))


def picked(settings_class: type, settings: Settings) -> Any:
    """A settings object of an edge, its fields taken from the flags of the same names."""
    return settings_class(**{item.name: getattr(settings, item.name) for item in fields(settings_class)})


def _base_of(pruned: str | None) -> str | None:
    """The base model that a pruner's folder names; None where there is no such folder, or it names none."""
    if pruned is None:
        return None
    try:
        base = read_json(Path(pruned).expanduser() / "pruner.json", LARGEST)["base"]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # a home that nobody has is refused later
        return None
    return base if isinstance(base, str) else None


def _as_argument(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "[]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _content(name: str, path: str | None) -> str | None:
    if path is None:
        return None
    place = pruner_folder(path) if name == "pruned" else Path(path).expanduser()
    if not place.exists():
        raise UserError(f"{name}: there is no file or folder {path}\nGive --{name} what a stage has written.")
    if not place.is_file() and not place.is_dir():
        raise UserError(f"{name}: {path} is neither a file nor a folder\nGive --{name} what a stage has written.")
    return hash_path(place)


def _model_identity(name: str, revision: str | None) -> str:
    """A model by content where it lies on this disk, a named one by which weights it is, else by its name."""
    from ftp_lightning.models import title

    known = title(name, revision)
    return known if known != name else _source(name, ASSETS / "llama")


def text_identity(source: str) -> str:
    """A text by its content where it lies on this disk, else by its name."""
    return _source(source, ASSETS / "stories", texts=True)


def _source(name: str, embedded: Path, texts: bool = False) -> str:
    """Text and models by content where they lie on this disk, else by name."""
    path = embedded if name == "embedded" else Path(name).expanduser()
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{name} is neither a file nor a folder\nGive the path of one.")
        return hash_path(path, texts="*.txt") if path.is_dir() and texts else hash_path(path) if path.exists() else name
    except OSError as error:
        raise file_error(error) or error from None
