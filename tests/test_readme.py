"""README is held to the files it speaks of: names, equations, line counts, options, commands and snippets.

Oracle: the files themselves. .ci/run, read here too, runs the commands in a fresh environment exactly as printed.
"""
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train

TOP = Path(__file__).resolve().parent.parent
README = (TOP / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
MODELS = ("draem", "dsr", "dfm")


def section(title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE).group(1)


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README


def test_line_counts_are_the_files():
    rows = dict(re.findall(r"^\| (\w+\.py) \| (\d+) \|", section("Files"), re.MULTILINE))
    assert rows == {name: str(len((TOP / name).read_text(encoding="utf-8").splitlines())) for name in rows}
    assert set(rows) == {path.name for path in TOP.glob("*.py")}


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:draem|dsr|dfm)\.[A-Za-z_.]+)`", README))))
def test_names_exist(name):
    module, *path = name.split(".")
    found = importlib.import_module(module)
    for part in path:
        if path == ["py"]:
            return
        found = getattr(found, part)
    assert found.__doc__ or isinstance(found, type)


def test_every_class_of_a_figure_and_every_equation_is_in_a_table():
    for module, title in zip(MODELS, ("DRAEM", "DSR", "DFM")):
        code = set(re.findall(r"Eq\. \((\d+)\)", (TOP / f"{module}.py").read_text(encoding="utf-8")))
        table = set(re.findall(r"Eq\. \((\d+)\)", section(title)))
        assert code == table, title
    assert set(re.findall(r"Eq\. \((\d+)\)", section("DRAEM"))) == set("12345")


def test_every_equation_is_in_the_function_that_the_table_names():
    for equations, names in re.findall(r"^\| (Eq\. [^|]*) \| ([^|]*) \|", README, re.MULTILINE):
        function = re.findall(r"`draem\.([\w.]+)`", names)[0].split(".")[-1]
        source = (TOP / "draem.py").read_text(encoding="utf-8")
        body = re.search(rf"def {function}\(.*?\n(?=    def |\S)", source, re.DOTALL).group(0)
        for number in re.findall(r"\((\d)\)", equations):
            assert f"Eq. ({number})" in body


def test_every_option_is_in_a_sentence_and_every_option_named_exists(capsys):
    for method in MODELS:
        with pytest.raises(SystemExit):
            train.parse([method, "--help"])
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", capsys.readouterr().out))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - {"--nproc-per-node"}  # torchrun's
    assert options - {"--help"} == named


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[text.splitlines()[1][:40] for text in SNIPPETS])
def test_snippets_run(snippet):
    assert len(snippet.splitlines()) < 16
    result = subprocess.run([sys.executable, "-c", snippet], cwd=TOP, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("word, first, second", [("kornia", 9.634, 0.0), ("dsr.focal", 0.0, 0.0227), ("share", 2, 1)])
def test_snippets_of_defects_show_what_they_say(word, first, second):
    snippet = next(text for text in SNIPPETS if word in text)
    out = subprocess.run([sys.executable, "-c", snippet], cwd=TOP, capture_output=True, text=True).stdout
    found = [float(line.strip("tensor()[]\n")) for line in out.splitlines()]
    assert found == pytest.approx([first, second], abs=5e-3 if word == "kornia" else 5e-5)


def test_ci_runs_the_commands_as_printed():
    ci = (TOP / ".ci" / "run").read_text()
    for title, commands in (("On a fresh machine", ["pip install -r requirements.txt", "python train.py draem"]),
                            ("Tests", ["python -m pytest -q"])):
        assert f'commands "{title}"' in ci
        block = re.search(r"```sh\n(.*?)```", section(title), re.DOTALL).group(1)
        assert block.splitlines() == commands


def test_picture_is_small():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures and all((TOP / name).stat().st_size < 300_000 for name in pictures)
