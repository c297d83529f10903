"""Tests that a model file can be copied alone. Oracles: the files' own syntax trees, inspect.getsource, and a fresh
interpreter in a folder that holds that file only."""
import ast
import importlib
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("draem", "dsr", "dfm")
FILES = sorted((*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")))
OWN = {path.stem for path in FILES}
COPY = re.compile(r"^# Copied from (\w+)\.(\w+)\n(?:@.*\n)*(?:def|class) (\w+)\b", re.MULTILINE)


def imported(path: Path) -> set[str]:
    """The packages that a file imports, at its top or anywhere else."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports(path):
    allowed = {"torch", "numpy", "PIL", "pytest"} | OWN
    if path.stem in MODELS:
        allowed = {"torch"}
    elif path.stem == "common":
        allowed = {"torch", "numpy", "PIL"}
    assert imported(path) - sys.stdlib_module_names <= allowed


def test_requirements():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert {re.match(r"\w+", line)[0] for line in lines} == {"torch", "numpy", "pillow", "pytest"}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_file_works_alone(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import {name}; print(*{OWN!r} & {{*sys.modules}})"
    result = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.split() == [name], result.stderr


@pytest.mark.parametrize("name", ["dsr", "dfm"])
def test_marked_copies_equal_their_originals(name):
    module, source = importlib.import_module(name), (ROOT / f"{name}.py").read_text(encoding="utf-8")
    marks = COPY.findall(source)
    assert marks and len(marks) == source.lower().count("# copied from ")  # each mark is above a definition
    for file, original, copy in marks:
        assert file == "draem" and copy == original
        assert inspect.getsource(getattr(module, copy)) == inspect.getsource(
            getattr(importlib.import_module(file), original))
