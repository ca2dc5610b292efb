"""docs/extending.md, done: its blocks are applied to a copy of the repository, and its tests are run there."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "extending.md"


def titled_blocks() -> list[tuple[str, str, str]]:
    """(language, file, text) of every block with a title, without the indentation of its list."""
    found = re.findall(r'^( *)```(\w+) title="([^"]+)"\n(.*?)^ *```', PAGE.read_text(), re.M | re.S)
    return [(kind, name, re.sub(rf"^{indent}", "", text, flags=re.M)) for indent, kind, name, text in found]


def apply(kind: str, path: Path, text: str) -> None:
    """Write a new file, or replace what a diff's `-` lines say, which stands there once, by its `+` lines."""
    if kind != "diff":
        assert not path.exists()
        path.write_text(text)
        return
    old, new = ("\n".join(line[1:] for line in text.splitlines() if line[:1] == sign) for sign in "-+")
    content = path.read_text()
    assert content.count(old) == 1, f"{path.name} holds {content.count(old)} times:\n{old}"
    path.write_text(content.replace(old, new))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package and its tests, every block applied; the model's weights are linked, not copied."""
    ignore = shutil.ignore_patterns("assets", "__pycache__")
    for name in ("ftp_lightning", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    (tmp_path / "ftp_lightning/assets").symlink_to(ROOT / "ftp_lightning/assets")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for kind, name, text in titled_blocks():
        apply(kind, tmp_path / name, text)
    return tmp_path


def test_every_block_can_be_applied_and_is_python(copy: Path):
    kinds = [kind for kind, _, _ in titled_blocks()]
    assert kinds.count("diff") >= 8 and kinds.count("python") >= 4
    for _, name, _ in titled_blocks():
        compile((copy / name).read_text(), name, "exec")


def test_what_the_blocks_import_is_there(copy: Path):
    """Without running them: what a block names of a module of this package stands in that module's text."""
    found = 0
    for _, name, _ in titled_blocks():
        for line in ast.walk(ast.parse((copy / name).read_text())) if name.endswith(".py") else ():
            if isinstance(line, ast.ImportFrom) and (line.module or "").startswith("ftp_lightning."):
                module = copy / line.module.replace(".", "/")
                path = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
                for one in line.names:
                    found += 1
                    text = path.read_text() + ("" if not module.is_dir() else "".join(p.stem for p in module.iterdir()))
                    assert re.search(rf"\b{one.name}\b", text), f"{name} imports {one.name} of {line.module}"
    assert found > 10


def test_a_block_that_no_longer_fits_is_noticed(tmp_path: Path):
    (tmp_path / "losses.py").write_text("a = 1\n")
    with pytest.raises(AssertionError, match="0 times"):
        apply("diff", tmp_path / "losses.py", "-b = 1\n+b = 2\n")


@pytest.mark.slow
def test_the_tests_of_every_recipe_pass(copy: Path):
    ran = re.findall(r"`python -m pytest ([^`]+)`", PAGE.read_text())
    assert len(ran) == 4
    tests = [name for kind, name, _ in titled_blocks() if kind == "python" and name.startswith("tests/")]
    assert [line for line in ran if line.startswith("tests/test_families")] == [
        'tests/test_families.py -k "glm and not glm4"'
    ]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    for arguments in (tests, ["tests/test_families.py", "-k", "glm and not glm4", "-m", "not slow"]):
        run = [sys.executable, "-m", "pytest", "-q", *arguments]
        done = subprocess.run(run, cwd=copy, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:]
        assert " passed" in done.stdout
    asked = [sys.executable, "-m", "ftp_lightning", "search", "--allocations", "alternate", "--generations", "0"]
    done = subprocess.run([*asked, "--print_config"], cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "alternate" in done.stdout
