"""The documentation: every command in it parses, what it links to is there, its table names what exists, it builds."""

import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from ftp_lightning.__main__ import STAGES, main, parse

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
OTHER_PROGRAMS = {
    "git",
    "cd",
    "pip",
    "wandb",
    "lm_eval",
    "lm-eval",
    "sbatch",
    "export",
    "srun",
    "tensorboard",
    "curl",
    "transformers",
}
"""Programs that are not ours: their lines are shown, not checked. A misspelt one of ours is none of them."""


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, without the indentation of a list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.M | re.S)
    return [re.sub(rf"^{indent}", "", text, flags=re.M) for indent, text in found]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command line: continued lines joined, comments left out, `a && b` as two."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            cut = words.index("&&")
            yield words[:cut]
            words = words[cut + 1 :]
        if words:
            yield words


ALL = [(page, words) for page in PAGES for block in blocks(page, "bash") for words in commands(block)]
OURS = [(page, words) for page, words in ALL if words[0] in ("ftp-lightning", "python")]


def check(words: list[str]) -> None:
    """AssertionError or UserError where a command line cannot be what it looks like."""
    words = list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words))  # NAME=VALUE in front of one
    program, *rest = words
    if words[:3] == ["python", "-m", "ftp_lightning"]:
        program, rest = "ftp-lightning", rest[2:]
    if program == "ftp-lightning":
        stage, *arguments = rest
        for name in STAGES if stage == "STAGE" else [stage]:
            assert name in STAGES, f"there is no stage {name}"
            settings = parse(name, arguments)
            assert settings is not None or "--help" in arguments or "--print_config" in arguments
    elif program == "make":
        targets = {word for word in rest if "=" not in word}
        known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
        known |= {f"ablation-{path.stem}" for path in (ROOT / "sweeps").glob("*.yaml")}
        assert targets and targets <= known
    elif program == "python" and rest[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in rest[2:] if word.startswith("tests/"))
    elif program == "python":
        source = (ROOT / rest[0]).read_text(encoding="utf-8")
        flags = {word.split("=")[0] for word in rest[1:] if word.startswith("--")}
        studies = re.findall(r"from (ftp_lightning\.studies\.\w+) import", source)
        if studies:  # they make flags of keywords
            read = (ROOT / f"{name.replace('.', '/')}.py" for name in {*studies, "ftp_lightning.studies.grid"})
            source += "".join(path.read_text(encoding="utf-8") for path in read)
            flags = {flag for flag in flags if not re.search(rf'\b{flag[2:]}=|"{flag[2:]}":', source)}
        assert all(f'"{flag}"' in source for flag in flags), flags
    elif "/" in program:
        assert (ROOT / program).is_file()
    else:
        assert program in OTHER_PROGRAMS, f"{program} is not known here"


def test_there_are_commands_to_check():
    assert len(ALL) > 25 and {page.name for page, _ in OURS} >= {"README.md", "index.md", "stages.md", "benchmarks.md"}


@pytest.mark.parametrize(
    ("page", "words"), ALL, ids=lambda part: part.name if isinstance(part, Path) else " ".join(part)
)
def test_every_command_parses(page: Path, words: list[str], monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    check(words)


@pytest.mark.parametrize(
    "line",
    ["ftp-lightning serch --budget 0.3", "ftp-lightning search --bugdet 0.3", "make dmo", "python experiments/none.py",
     "python experiments/schedules.py --bugdets 0.3", "ftp-lightening run", "python -m pytest tests/test_none.py",
     "ftp-lightning search --config experiments/none.yaml", "ftp-lightning train --router globl"],
)  # fmt: skip
def test_a_command_that_is_wrong_is_noticed(line: str, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(Exception):  # noqa: B017  by whatever first finds it
        check(shlex.split(line))


@pytest.mark.slow
def test_the_commands_in_seconds_run_as_they_stand(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = [
        words for words in commands("\n".join(blocks(DOCS / "index.md", "bash"))) if "runs/tiny" in " ".join(words)
    ]
    assert len(quick) == 5
    for words in quick:
        assert main(words[1:]) == 0, capsys.readouterr().err
    assert (tmp_path / "runs/tiny/report.html").is_file()


def test_the_python_of_the_quick_start_runs(capsys):
    (code,) = blocks(DOCS / "index.md", "python")
    exec(compile(code, "index.md", "exec"), {})
    assert capsys.readouterr().out.startswith("[")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_compile_and_import_what_exists(page: Path):
    for code in blocks(page, "python"):
        compile(code, page.name, "exec")
        for module, names in re.findall(r"^from (ftp_lightning[\w.]*) import ([\w, ]+)$", code, re.M):
            assert all(hasattr(import_module(module), name.strip()) for name in names.split(","))


def test_the_python_of_the_readme_runs(capsys):
    from ftp_lightning.errors import UserError

    code, *_ = blocks(ROOT / "README.md", "python")
    try:
        exec(compile(code, "README.md", "exec"), {})
    except UserError as error:
        pytest.skip(str(error).splitlines()[0])
    assert "Paris" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_prune_under_the_default_or_a_schedule_with_its_own_mode(page: Path):
    for code in blocks(page, "python"):
        assert "Schedule.uniform(" not in code
        for arguments in re.findall(r"TokenPruner\((.*)\)", code):
            assert "kv=" not in arguments, code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def paper_rows() -> list[tuple[str, str]]:
    """(functions, command) of every row of the table on the page about the paper."""
    lines = [line for line in (DOCS / "paper.md").read_text().splitlines() if line.startswith("| ") and "`" in line]
    return [tuple(cell.strip() for cell in re.split(r" \| ", line.strip("| "))[2:]) for line in lines]


@pytest.mark.parametrize(("functions", "command"), paper_rows())
def test_the_paper_table_names_what_exists(functions: str, command: str):
    for name in re.findall(r"`([^`]+)`", functions):
        module, _, attribute = name.rpartition(".")
        assert find_spec(name) if attribute.islower() and is_module(name) else hasattr(import_module(module), attribute)
    check(shlex.split(command.strip("`")))


def is_module(name: str) -> bool:
    return (ROOT / (name.replace(".", "/") + ".py")).is_file()


def test_every_page_is_in_the_navigation():
    text = re.sub(r"!!python\S+", "", (ROOT / "mkdocs.yml").read_text())
    named = set(re.findall(r"[\w-]+\.md", str(yaml.safe_load(text)["nav"])))
    missing = {page.name for page in DOCS.glob("*.md")} - named
    assert not missing, f"add to nav in mkdocs.yml: {', '.join(sorted(missing))}"
    assert named <= {page.name for page in DOCS.glob("*.md")}


def test_the_api_page_names_what_exists():
    for name in re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.M):
        module, _, attribute = name.rpartition(".")
        assert is_module(name) or hasattr(import_module(module), attribute), name


def test_no_extension_takes_more_than_six_steps():
    recipes = (DOCS / "extending.md").read_text().split("\n## ")[1:]
    assert [recipe.splitlines()[0] for recipe in recipes] == ["A router", "A loss", "An allocation", "A model family"]
    assert all(1 <= len(re.findall(r"^\d\. ", recipe, re.M)) <= 6 for recipe in recipes)


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("mkdocs"), reason="mkdocs is not installed; `make docs` installs it")
def test_the_site_builds_strictly(tmp_path: Path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "site/api/index.html").is_file()
