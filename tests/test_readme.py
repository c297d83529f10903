"""Tests that README fits the code. Oracles: the files themselves, and small runs of its commands and snippets."""
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

import dfm
import draem
import dsr
import train

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
MODULES = {"DRAEM": draem, "DSR": dsr, "DFM": dfm}
SMALL = {"draem": "--size 32 --width 4 --steps 1", "dfm": "--size 64 --backbone resnet18 --weights random --pooling 2",
         "dsr": "--size 64 --width 4 --hiddens 4 --codes 21 --pretrain-steps 1 --steps 1 --upsampling-steps 1"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files that the commands name, and a small codebook in place of the published one."""
    monkeypatch.chdir(tmp_path)
    for place in ("mvtec/bottle/train/good", "mvtec/bottle/test/good", "mvtec/bottle/test/broken", "dtd/images/a",
                  "mvtec/bottle/ground_truth/broken", "imagenet/train", "photos"):
        Path(place).mkdir(parents=True)
        for number in range(4):
            grey = 255 if "truth" in place else 60 * number + 20
            Image.new("RGB", (64, 64), (grey, 99, 20)).save(Path(place, f"{number}.png"))
    Image.new("RGB", (64, 64)).save("part.png")
    latent = dsr.DiscreteLatentModel(4, 1, 2, 21, 4)
    content = {"settings": latent.settings, "preprocessing": {}, "model": latent.state_dict()}
    torch.save({"method": "dsr-codebook"} | content, "published.pt")
    monkeypatch.setattr(dsr, "fetch_codebook", lambda: Path("published.pt"))
    return tmp_path


def test_commands_run(folder, capsys):
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if "train.py" in line]
    assert len(commands) == 9
    for number, words in enumerate(commands):
        words = words[words.index("train.py") + 1:]
        if "--checkpoint" in words:
            assert train.main(words) == 0, words
        elif "--data" in words:  # CI runs the one without it, on the toy product
            out = ["--out", f"runs{number}"] if Path("runs", words[0]).exists() else []  # checkpoints lie in runs
            assert train.main([*words, *SMALL[words[0]].split(), *out]) == 0, words
    assert "part.png 0." in capsys.readouterr().out


def test_snippets_run(folder):
    train.main(["draem", "--data", "mvtec/bottle", "--size", "32", "--width", "4", "--steps", "1"])
    Path("runs/draem/bottle").rename("runs/draem/toy")
    assert len(blocks("python")) == 2
    for snippet in blocks("python"):
        names = {}
        exec(compile(snippet, snippet.splitlines()[0], "exec"), names)
    assert names["score"].shape == (5,) and names["grid"].shape == (5, 7, 7)  # as the last snippet's comment says


@pytest.mark.parametrize("title", MODULES)
def test_names_and_equations_are_in_the_file(title):
    module, text = MODULES[title], section(title)
    table = text.split("| paper | here |" if title != "DFM" else "In `dfm.py`:")[1].split("\n\n")[0]
    names = re.findall(r"`([\w.]+)`", table)
    assert len(names) >= 5
    for name in names:
        part = module
        for word in name.split("."):
            part = getattr(part, word)
    for number in re.findall(r"Eq\. \((\d)\)", table):
        assert f"Eq. ({number})" in Path(module.__file__).read_text(encoding="utf-8")


def test_options_exist(capsys):
    helped = ""
    for method in SMALL:
        with pytest.raises(SystemExit):
            train.main([method, "--help"])
        helped += capsys.readouterr().out
    options = set(re.findall(r"(--[a-z][a-z-]+)", README)) - {"--nproc-per-node"}
    assert len(options) > 15 and not {option for option in options if option not in helped}
