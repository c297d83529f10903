"""Tests of train.py: the command, run as a user runs it, on fourteen small pictures.

Oracles: for weights and logs, a loop written here from the model's file alone; for stopped, killed and shared runs, an
undisturbed one, bit for bit; for metrics, pairs of images and what the saved model predicts; for mistakes, the words of
their one line.
"""
import csv
import itertools
import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import common
import dfm
import draem
import dsr
import train

SCRIPT = Path(train.__file__).resolve()
CPU = "--precision fp32 --device cpu".split()
DRAEM = [*"draem --size 32 --width 4 --batch 2".split(), *CPU]
RECIPE = [*DRAEM, *"--sspcab --rotate 5 --lr 0.01 --steps 7 --seed 3".split()]
DSR = [*"dsr --size 64 --width 4 --hiddens 4 --codes 21 --batch 2 --pretrain-batch 3 --pretrain-steps 3 --steps 5 "
       "--upsampling-steps 2".split(), *CPU]
DFM = [*"dfm --size 64 --backbone resnet18 --pooling 2 --weights random --batch 4".split(), *CPU]
COLUMNS = ["image_auroc", "image_ap", "image_f1", "pixel_auroc", "pixel_ap", "pixel_f1", "pixel_aupro"]
NAMES = [f"{kind}/{i:03d}.png" for kind in ("dirt", "good", "hole") for i in range(3)]  # of the test images
RUN = Path("runs/draem/weave")
die = (lambda *_, **__: sys.exit("killed"))
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def draw_data(folder, seed=0, train=5, good=3, defects=("dirt", "hole"), masks=True):
    """A category in MVTec's layout: coarse noise, 64 wide and 48 high, with white dirt or black holes."""
    rng = np.random.default_rng(seed)
    for part, count in (("train/good", train), ("test/good", good), *((f"test/{name}", 3) for name in defects)):
        for i in range(count):
            picture, spot = rng.integers(60, 200, (6, 8, 3)).repeat(8, 0).repeat(8, 1), np.zeros((48, 64), bool)
            spot[9:9 + 9 * ("good" not in part), 8 * i:8 * i + 12] = True
            picture[spot] = 255 * ("dirt" in part)
            files = {Path(folder, part, f"{i:03d}.png"): np.uint8(picture)}
            if masks and spot.any():
                files[Path(folder, part.replace("test", "ground_truth"), f"{i:03d}_mask.png")] = spot
            for path, array in files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    return Path(folder)


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    """The tests only read it. All is computed by one thread: sums keep their order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield draw_data(tmp_path_factory.mktemp("data") / "weave")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run folder of DRAEM; the tests only read it."""
    out = str(tmp_path_factory.mktemp("trained"))
    assert train.main([*RECIPE, "--data", str(data), "--textures", str(data / "test"), "--out", out]) == 0
    return Path(out, "draem", "weave")


@pytest.fixture(autouse=True)
def as_it_was(tmp_path, monkeypatch):
    """An empty working folder, and no commit, which may change meanwhile. Signals are put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_DIR", "none")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def command(capsys):
    """command(*argv) -> exit status or ValueError or OSError, stdout, stderr."""
    def run(*argv):
        capsys.readouterr()
        try:
            status = train.main([str(arg) for arg in argv])
        except (SystemExit, ValueError, OSError) as left:
            status = getattr(left, "code", left)
        return status, *capsys.readouterr()
    return run


def mistake(ended):
    """The one line of a command that must have ended for what a user can mend."""
    status, _, err = ended
    assert isinstance(status, (ValueError, OSError)) or status == 2 and err.count("\n") == 1, ended
    return err if status == 2 else f" {status}"


def watch_pages(monkeypatch):
    """A list of the rows of every picture that is drawn."""
    drawn = []
    monkeypatch.setattr(common, "page", lambda rows, inner=common.page: drawn.append(rows) or inner(rows))
    return drawn


def before_step(monkeypatch, act):
    """Calls act("SEED STAGE STEP") before every training step."""
    patched = SimpleNamespace(adler32=zlib.adler32, crc32=lambda text: act(text.decode()) or zlib.crc32(text))
    monkeypatch.setattr(train, "zlib", patched)


def read(path):
    """The content of a last.pt, metrics.json or scores.csv."""
    if Path(path).suffix == ".csv":
        return list(csv.DictReader(Path(path).read_text(encoding="utf-8").splitlines()))
    return torch.load(path, weights_only=True) if Path(path).suffix == ".pt" else json.loads(Path(path).read_text())


def table_of(out):
    """The printed table as {name: figures}; a dash is None."""
    lines = out[("\n" + out).index("\ncategory"):].splitlines()
    assert re.split(" {2,}", lines[0])[1:] == [column.replace("_", " ") for column in COLUMNS]
    return {line.split()[0]: [None if word == "-" else float(word) for word in line.split()[1:]] for line in lines[1:]}


def digest(value):
    return json.dumps(value, default=lambda tensor: [str(tensor.dtype), zlib.crc32(tensor.numpy().tobytes())])


def files_in(folder):
    """{name: content or, of a checkpoint, digest}. What a kill may leave, last.tmp, is left out."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != "last.tmp"]
    return {path.relative_to(folder).as_posix(): digest(read(path)) if path.name == "last.pt" else
            path.read_bytes() for path in paths}


def same(one, other):
    """Asserts that two folders are bit-equal."""
    one, other = files_in(one), files_in(other)
    assert one.keys() == other.keys() and [name for name in one if one[name] != other[name]] == []


def read_all(paths, size):
    return torch.stack([common.read_image(path, size) for path in sorted(paths)])


def loop(model, parameters, stage, rates, feed):
    """The five lines of the models' files, for seed 3. Returns the log's rows."""
    model.to(memory_format=torch.channels_last)
    optimizer, rows = torch.optim.Adam(parameters, fused=True), []
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        generator = torch.Generator().manual_seed(zlib.crc32(f"3 {stage} {step}".encode()))
        terms = model.losses(*feed(generator, step), generator)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        rows.append({"stage": stage, "step": step + 1, **{k: v.item() for k, v in terms.items()}, "lr": rate})
    return [rows[0], rows[-1]]


def of(data, argv):
    return ["--data", str(data)] + ["--pretrain", str(data / "train")] * (argv[0] == "dsr")


def choose(images, count, generator):
    index = torch.randint(len(images), (count,), generator=generator)
    return (images[index].float() / 255).contiguous(memory_format=torch.channels_last)


def test_draem_is_trained_by_its_recipe(data, trained):
    """Rates fall to a tenth at 4/7 and 6/7. Step n depends on (seed, stage, n) alone. simulated.png changes nothing."""
    images, textures = read_all(data.glob("train/*/*"), 32), read_all(data.glob("test/*/*"), 32)
    torch.manual_seed(3)
    model = draem.DraemModel(4, True, rotate=5.0).train()
    rows = loop(model, model.parameters(), "train", [0.01] * 4 + [0.01 * 0.1] * 2 + [0.01 * 0.1 ** 2],
                lambda generator, _: (choose(images, 2, generator), choose(textures, 2, generator)))
    found = read(trained / "last.pt")
    assert digest(found["model"]) == digest(model.state_dict()) and found["settings"] == model.settings
    assert trained.joinpath("log.jsonl").read_text() == "".join(json.dumps(row) + "\n" for row in rows)
    assert found["preprocessing"] == {"size": 32, "antialias": True, "bits": 16} and found["run"]["optimizer"] is None


def test_dsr_is_trained_by_its_recipe(data, command):
    """Three stages. The rate falls to a tenth in stage 2 alone, after 4/5."""
    argv = [*DSR, "--data", data, "--pretrain", data / "test", "--rotate", 5, "--lr", 0.01, "--seed", 3]
    assert command(*argv)[0] == 0
    images, other = read_all(data.glob("train/*/*"), 64), read_all(data.glob("test/*/*"), 64)
    torch.manual_seed(3)
    latent = dsr.DiscreteLatentModel(4, residual_hiddens=2, codes=21, code_length=4).train()
    rows = loop(latent, latent.parameters(), "codebook", [0.01] * 3, lambda _, step: [
        choose(other, 3, torch.Generator().manual_seed(zlib.crc32(f"3 images {step}".encode())))])
    found = read("runs/dsr/codebook-test/last.pt")
    assert digest(found["model"]) == digest(latent.state_dict()) and found["settings"] == latent.settings
    assert found["run"]["log"] == rows and found["method"] == "dsr-codebook"
    torch.manual_seed(3)
    model = dsr.DsrModel(dsr.load_codebook("runs/dsr/codebook-test/last.pt"), 4, rotate=5.0)
    for stage, name, rates in ((2, "detection", [0.01] * 4 + [0.01 * 0.1]), (3, "upsampling", [0.01] * 2)):
        rows += loop(model, model.begin(stage), name, rates, lambda generator, _: [choose(images, 2, generator)])
    found = read("runs/dsr/weave/last.pt")
    assert digest(found["model"]) == digest(model.state_dict()) and found["settings"] == model.settings
    assert found["run"]["log"] == rows[2:] and found["run"]["optimizer"] is None


def test_dfm_is_fitted_to_all_images_and_decides_by_its_own_threshold(data, command):
    options = "--layer layer2 --pooling 3 --share 0.5 --seed 3".split()
    said = command(*DFM, "--data", data, *options)[1]
    assert re.search(r"^weave: hole  count 3  image auroc \S+  threshold \S+  called defective \d$", said, re.M)
    torch.manual_seed(3)
    model, last = dfm.DFMModel("resnet18", "layer2", False, 3, 0.5).eval(), "runs/dfm/weave/last.pt"
    model.fit(model.features(read_all(data.glob("train/*/*"), 64) / 255))
    found, limit = [float(row["score"]) for row in read("runs/dfm/weave/scores.csv")], dfm.load(last).threshold.item()
    score = model.predict(read_all(data.glob("test/*/*"), 64) / 255)["score"].tolist()
    assert f"components of 512 values, threshold {limit:.6g}\n" in said
    assert [*found, limit] == pytest.approx([*score, model.threshold.item()], rel=1e-4)
    decisions = ["defective" if value >= limit else "normal" for value in found]
    for first, report in zip((0, 3, 6), read("runs/dfm/weave/metrics.json")["kinds"].values()):
        called = decisions[first:first + 3].count("defective")
        assert (report["threshold"], report["called_defective"]) == (limit, called)
    out, err = command("dfm", "--checkpoint", last, "--predict", data / "test", *CPU)[1:]
    assert [line.split()[2] for line in out.splitlines()] == decisions and len(set(decisions)) == 2
    assert err.endswith(f"pictures and scores.csv: runs/dfm/predictions; threshold: {limit:.6g}\n")


@pytest.mark.parametrize("argv, shown", [([*DRAEM, "--steps", 2], "augmented"), (DSR, "general")])
def test_simulated_png_shows_six_samples_before_the_first_step(argv, shown, data, command, monkeypatch):
    seen, pages, argv = {}, watch_pages(monkeypatch), [*argv, *of(data, argv), "--rotate", 0]
    before_step(monkeypatch, lambda step: seen.update({step: len(pages)}))
    assert command(*argv)[0] == 0 and all(count == (step[2:4] in ("tr", "de", "up")) for step, count in seen.items())
    images = read_all(data.glob("train/*/*"), int(argv[2])).permute(0, 2, 3, 1).numpy()
    assert len(pages[0]) == 6 and all(list(row) == ["image", shown, "mask"] for _, row in pages[0])
    assert all((row["image"] == images).all((1, 2, 3)).any() for _, row in pages[0])
    assert sum(row["mask"].any() for _, row in pages[0]) > 4  # none is normal, though noise may stay below 0.5


@pytest.mark.skipif(sys.platform == "win32", reason="has no such signals")
@pytest.mark.parametrize("argv, stops", [
    ([*DRAEM, "--steps", "9", "--sspcab"], ["train 1", "train 2", "train 8"]),
    (DSR, ["codebook 1", "detection 2", "detection 4", "upsampling 0"])], ids=["draem", "dsr"])
def test_signals_and_kills_leave_no_trace_in_the_result(argv, stops, data, command, monkeypatch):
    """SIGINT and SIGTERM wait for the step's end and save. Runs also die in a step, in writing, before a rename."""
    argv, seen, began = [*argv, *of(data, argv)], [], time.monotonic()
    assert command(*argv, "--out", "whole")[0] == 0
    lasted = time.monotonic() - began
    argv += ["--resume"]

    def act(step):
        seen.append(step[2:])
        if step[2:] in stops and seen.count(step[2:]) == 1:
            number = signal.SIGINT if "1" in step else signal.SIGTERM
            signal.raise_signal(number)
            assert signal.getsignal(number) == signal.SIG_DFL  # a second one ends a step that hangs
    before_step(monkeypatch, act)
    for stop in stops:
        status, _, err = command(*argv)
        assert status == 128 + (signal.SIGINT if "1" in stop else signal.SIGTERM) and stop in seen
        assert f"stopped after step {int(stop[-1]) + 1}; the same command with --resume goes on" in err
    status, out, _ = command(*argv)
    assert status == 0 and ("upsampling: resumed after step 1\n" in out) == ("upsampling 0" in stops)
    assert all(seen.count(step) == 1 for step in seen if "images" not in step)
    same("whole", "runs")
    argv += ["--save-minutes", "0"]
    for moment, place, name, fault in ((3, os, "replace", die), (7, zlib, "crc32", die), (
            5, torch, "save", lambda _, path: path.write_bytes(b"half") and die())):
        with monkeypatch.context() as patch:
            inner, count = getattr(place, name), itertools.count(1)
            patch.setattr(place, name, lambda *given: (fault if next(count) == moment else inner)(*given))
            assert command(*argv, "--out", "cut")[0] == "killed"
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    server = multiprocessing.get_context("forkserver")  # forks processes that have imported everything
    server.set_forkserver_preload(["train", "torch._dynamo"])  # optimizers import the latter, slowly
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        child = server.Process(target=train.main, args=([*argv, "--out", "killed"],))
        child.start()
        child.join(random.uniform(0, lasted))
        if child.is_alive():
            os.kill(child.pid, number)
        child.join()
    for out in ("cut", "killed"):
        assert command(*argv, "--out", out)[0] == 0
        same("whole", out)


def test_log_checkpoints_and_the_time_left(data, command, monkeypatch):
    """A step takes 40 s here: 2 minutes are over at every fourth. Steps that are not logged or saved copy nothing."""
    now, copies = [1000], [0]

    def act(_):
        now[0] += 40
        copies.append(0)
    before_step(monkeypatch, act)
    monkeypatch.setattr(draem.DraemModel, "losses", lambda model, *_: {"l2": next(model.parameters()).square().mean()})
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor, inner=torch.Tensor.item: (
        copies.append(copies.pop() + 1), inner(tensor))[1])
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: now[0]))
    status, out, _ = command(*DRAEM, "--data", data, "--steps", 101, "--save-minutes", 2)
    assert status == 0 and [row["step"] for row in read(RUN / "last.pt")["run"]["log"]] == [1, 50, 100, 101]
    assert [step for step, count in enumerate(copies) if count][1:] == sorted({1, 50, 101, *range(4, 101, 4)})
    assert re.search(r"^train 50/101  l2 \S+  lr 1e-04  40 s/step  34 min left$", out, re.M)


def test_a_loss_that_is_not_finite_ends_the_run(data, command, monkeypatch):
    factors = iter((1, 1, float("inf")))
    monkeypatch.setattr(draem.DraemModel, "losses", lambda model, *_: {
        "l2": next(model.parameters()).sum() * next(factors)})
    words = mistake(command(*DRAEM, "--data", data, "--steps", 9, "--save-minutes", 0))
    assert re.search("train, step 3: the loss is not finite, {'l2': -?inf}", words)
    assert read(RUN / "last.pt")["run"]["steps"] == {"train": 2} and draem.load(RUN / "last.pt")


def test_another_runs_metrics_are_not_believed(data, command, monkeypatch):
    """Train, delete last.pt, train otherwise, die before the evaluation, --resume: once the first run's table."""
    last, metrics, argv = Path("runs/dfm/weave/last.pt"), Path("runs/dfm/weave/metrics.json"), [*DFM, "--data", data]
    assert command(*argv)[0] == 0
    older, argv = metrics.read_bytes(), [*argv, "--pooling", 1]
    last.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", die)
        assert command(*argv)[0] == "killed" and not metrics.exists()
    table = table_of(command(*argv, "--out", "whole")[1])
    for content in (older, b"", Path("whole/dfm/weave/metrics.json").read_bytes()[:99], b"\xff"):
        metrics.write_bytes(content)
        assert command(*argv, "--resume")[0] == 0
        same("whole", "runs")
    assert "weights was random, not x.pth" in mistake(command(*argv, "--resume", "--weights", "x.pth"))
    for place, name in ((train, "fit_dfm"), (train, "evaluate"), (common, "load_images")):
        monkeypatch.setattr(place, name, die)
    assert table_of(command(*argv, "--resume")[1]) == table  # printed without work
    last.unlink()
    assert command(*argv, "--resume")[0] == "killed"  # metrics without weights are no run


def test_resume_compares_settings(trained, data, command):
    argv = [*RECIPE, "--data", data, "--textures", data / "test", "--out", trained.parents[1], "--resume"]
    before, more = files_in(trained.parents[1]), draw_data("more/weave", train=6)
    for words, options in {
            "size was 32, not 64": "--size 64", "width was 4, not 6": "--width 6", "batch was 2, not 5": "--batch 5",
            "seed was 3, not 7": "--seed 7", "lr was 0.01, not 0.1": "--lr 0.1", "steps was 7, not 20": "--steps 20",
            "rotate was 5.0, not 0.0": "--rotate 0", "bits was 16, not 12": "--bits 12",
            "antialias was True, not False": "--no-antialias", "precision was fp32, not bf16": "--precision bf16",
            "images was 5, not 6": f"--data {more}", "textures was 9, not 5": f"--textures {data / 'train'}"}.items():
        assert f"draem/weave/last.pt: {words}" in mistake(command(*argv, *options.split()))
    assert "holds a run; --resume" in mistake(command(*argv[:-1])) and files_in(trained.parents[1]) == before
    shutil.copytree(trained, RUN)
    older = read(trained / "last.pt")
    del older["run"]["settings"]["bits"]  # made before this option was
    torch.save(older, RUN / "last.pt")
    assert command(*argv, "--data", draw_data("moved/weave"), "--out", "runs", "--bits", 12)[0] == 0
    for content in ({"model": {}}, {"method": "draem", "run": {"steps": 3}}):
        torch.save(content, RUN / "last.pt")
        assert "not a checkpoint to go on from" in mistake(command(*argv, "--out", "runs"))


def test_what_cannot_be_read_is_named_left_out_and_tried_again(command, monkeypatch):
    folder, data = Path("runs/dfm/odd"), draw_data("odd")
    bad, mask, argv = data / "test/good/bad.png", data / "ground_truth/hole/000_mask.png", [*DFM, "--data", data]
    whole = mask.read_bytes()
    for path in (bad, mask):
        path.write_bytes(b"x")
    Path("odd/ground_truth/dirt/000_mask.png").unlink()
    for status, out, err in (command(*argv), command(*argv, "--resume")):
        names = sorted(line.split(": cannot be")[0] for line in err.splitlines())  # threads read in any order
        assert status == 2 and names == [f"train.py: {mask}", f"train.py: {bad}"]
        assert "leave out 1 images without a map or a mask" in out
        assert read(folder / "metrics.json")["unreadable"] == 2
        assert [row["path"][9:] for row in read(folder / "scores.csv")] == NAMES[:6] + NAMES[7:]
    mask.write_bytes(whole)
    bad.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(common, "pixel_metrics", die)  # as if there were no memory for them: the scores are there
        assert command(*argv, "--resume")[0] == "killed" and len(read(folder / "scores.csv")) == 9
    assert command(*argv, "--resume")[::2] == (0, "") and "pixel_f1" in read(folder / "metrics.json")
    shutil.copy(mask, "odd/ground_truth/dirt/000_mask.png")
    assert "odd: dirt  count 3" in command(*argv, "--resume")[1]  # not the table from before this mask
    assert command(*DFM, "--data", draw_data("bad", good=0, train=4))[0] == 0  # five give a threshold
    assert read("runs/dfm/bad/metrics.json")["kinds"] == {"dirt": {"count": 3}, "hole": {"count": 3}}
    out = command(*DFM, "--data", data / "train/good")[1]  # a plain folder of images
    assert table_of(out)["good"] == [None] * 7 and "next: dfm --checkpoint runs/dfm/good/last.pt --predict" in out


def test_nothing_of_the_users_is_written_over(trained, command):
    draw_data("d/weave")
    draw_data("t/u/other", defects=())
    predict = ["draem", "--checkpoint", trained / "last.pt", *CPU, "--predict"]
    assert command(*predict, "d/weave/test")[0] == 0
    before, picture = files_in("."), next(Path("runs/draem/predictions").rglob("*.png"))
    for argv in ("draem --data d/weave --out d/weave/test", "dfm --data d/weave --out d", "dfm --data d --out .",
                 "dfm --data d --out d", "draem --data d --textures t/u --out t", "dsr --data d --pretrain t --out t/a",
                 "draem --data d --textures t/u --out t/u/a", "dsr --data d --pretrain t/u/other/train --out t/u"):
        assert re.search("lie one inside the other; .*--out", mistake(command(*argv.split(), *CPU)))
    for paths in (["d/weave/test", "runs/draem/predictions"], ["."], [picture]):
        assert "lie one inside the other" in mistake(command(*predict, *paths))
    assert files_in(".") == before


def test_two_processes_do_each_category_once(command, monkeypatch):
    """Category b has no masks, c an image that cannot be read: this ends no process of two, but one alone."""
    for seed, name in enumerate("abc"):
        draw_data(f"parent/{name}", seed, masks=name != "b")
    Path("parent/c/test/good/bad.png").write_bytes(b"x")
    for rank, world, out, names in ((0, 2, "runs", "ac"), (1, 2, "runs", "b"), (0, 1, "whole", "abc")):
        monkeypatch.setattr(train, "RANK", rank)
        monkeypatch.setattr(train, "WORLD", world)
        status, said, err = command(*DFM, "--data", "parent", "--out", out)
        assert status == (2 if world == 1 else 0) and ("bad.png: cannot be read" in err) == ("c" in names)
        assert "".join(table_of(said)).replace("mean", "") == names
    same("whole", "runs")
    again, table = command(*DFM, "--data", "parent", "--resume"), table_of(said)
    assert again[0] == 2 and table_of(again[1]) == table and list(table) == ["a", "b", "c", "mean"]
    for column, (*values, mean) in zip(COLUMNS, zip(*table.values())):
        found = [read(f"runs/dfm/{name}/metrics.json").get(column) for name in "abc"]
        known = [value for value in found if value is not None]
        assert [*values, mean] == pytest.approx([*found, np.mean(known)], abs=6e-5)


def test_defaults_are_the_published_settings(capsys):
    shared = dict(size=256, antialias=True, bits=16, batch=8, seed=0, compile=False, resume=False, save_minutes=10,
                  checkpoint=None, predict=None, threshold=None, out=Path("runs"), toy=False)
    for method, count in (("draem", 3), ("dsr", 9), ("dfm", 5)):
        args, published = vars(train.parse([method, "--data", "x", "--device", "cpu"])), train.METHODS[method].PUBLISHED
        own = {name: value for name, value in published.items() if name in args and name not in ("size", "batch")}
        assert args.items() >= (shared | own).items() and len(own) == count
        with pytest.raises(SystemExit, match="^0$"):
            train.main([method, "--help"])
        words = " ".join(capsys.readouterr().out.split())
        assert "usage" not in words and "None" not in words and all(f"({value})" in words for value in own.values())
    for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with train.parse(["draem", "--data", "x", "--device", "cpu", "--precision", precision]).autocast():
            assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == dtype


MISTAKES = {  # arguments: pattern of the message; words in capitals are replaced
    "": "required", "dfm --score x": "choice: 'x'", "yolo": "choice: 'yolo'", "DFM --data DATA --pooling 64": "pooling",
    "DRAEM --data gone": " gone: no such folder", "DRAEM --data DATA --textures empty": " empty: holds no images",
    "DRAEM --data text": "good/002.png.*; text/train/good/003.png", "DFM --data DATA --batch 0": "0: 1 or more",
    "draem --size 100": "100: 32 or more is needed, in steps of 32", "draem --checkpoint LAST": "--data",
    "DSR --data DATA --size 32": "--size 32: 64 or more", "DSR --data DATA --hiddens 1": "--hiddens 1: 2 or more",
    "DSR --data DATA --codebook a --pretrain b": "--codebook .*choose", "DSR --pretrain empty --data DATA": " empty: ",
    "DRAEM --data DATA --device cuda": "--device cuda: .* 0 GPUs for 1 processes; --device cpu",
    "DRAEM --data DATA --device gpu": "--device gpu: .*cpu", "DRAEM --data DATA --device meta": "--device meta: .*cpu",
    "DRAEM --data DATA --out text/file": "text/file", "draem --predict DATA": "needs --checkpoint",
    "draem --checkpoint LAST --data DATA --size 32 --bits 16 --lr 1": "--bits --lr --size: not used with",
    "draem --checkpoint LAST --predict DATA --no-antialias --seed 1": "--antialias --seed: not used",
    "draem --checkpoint LAST --predict DATA --data DATA": "--data DIR or", "DRAEM --data DATA --step 9": "unrecognized",
    "draem --checkpoint half.pt --data DATA": "half.pt: ", "dfm --checkpoint LAST --data DATA": "last.pt: .*draem",
    "draem --checkpoint LAST --data DATA/train": "no test/", "draem --checkpoint LAST --predict gone": "gone: no such"}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(words, data, trained, command):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is one")
    Path("empty").mkdir()
    draw_data("text", defects=())
    for name in ("file", "train/good/002.png", "train/good/003.png"):
        Path("text", name).write_text("no image")
    Path("half.pt").write_bytes((trained / "last.pt").read_bytes()[:99999])
    before, line = files_in("."), words.replace("DATA", str(data)).replace("LAST", str(trained / "last.pt"))
    for short, argv in ("DRAEM", DRAEM), ("DSR", DSR), ("DFM", DFM):
        line = line.replace(short, " ".join(argv))
    message = mistake(command(*line.split()))
    assert re.search(MISTAKES[words], message) and files_in(".") == before, message


def test_fp16_scales_the_loss_and_skips_a_step_that_overflows(data, command, monkeypatch):
    weights, argv = {}, [*DRAEM, "--data", data, "--steps", 7, "--precision", "fp16"]

    def losses(model, *given, inner=draem.DraemModel.losses):
        step = [zlib.crc32(f"0 train {n}".encode()) for n in range(7)].index(given[-1].initial_seed())
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.float16
        weights[step] = next(model.parameters()).detach().clone()
        if step == 3 and len(weights) == 4:
            signal.raise_signal(signal.SIGTERM)
        return {name: term * (1e36 if step == 2 else 1) for name, term in inner(model, *given).items()}
    monkeypatch.setattr(draem.DraemModel, "losses", losses)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *given, inner=torch.amp.GradScaler, **more: inner(
        *given, **more, init_scale=256, growth_interval=3))
    assert command(*argv)[0] == 143
    assert read(RUN / "last.pt")["run"]["scaler"].items() >= {"scale": 128, "_growth_tracker": 1}.items()
    assert command(*argv, "--resume")[0] == command(*argv, "--out", "whole")[0] == 0
    assert [torch.equal(weights[n], weights[n + 1]) for n in range(6)] == [False, False, True, False, False, False]
    same("whole", "runs")


@pytest.mark.parametrize("given, method, has, expected", [
    ("cpu", "dsr", "", "fp32"), ("cpu", "dsr", "amx_tile", "bf16"), ("cpu", "dsr", "avx512_bf16", "bf16"),
    ("cpu", "dfm", "amx_tile", "fp32"), ("cuda", "dsr", "gpu", "cuda:3 bf16"), ("cuda:0", "dsr", "", "cuda:0 fp16")])
def test_device_and_automatic_precision(given, method, has, expected, monkeypatch):
    """LOCAL_RANK is 3, which cuda:0 overrules. bf16's rounding would show in DFM's likelihood."""
    chosen, tried = [], []
    for name in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name == has, raising=False)
    for place, name, value in ((torch.cuda, "set_device", chosen.append), (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or has == "gpu"),
            (torch.backends.cudnn, "benchmark", False),
            (torch, "ones", lambda *shape, device: tried.append(device) or torch.zeros(*shape))):
        monkeypatch.setattr(place, name, value)
    monkeypatch.setenv("LOCAL_RANK", "3")
    device, precision = train.hardware(SimpleNamespace(device=given, method=method, precision="auto"))
    assert f"{device} {precision}".removeprefix("cpu ") == expected and tried == [device]
    assert chosen == [device] * given.startswith("cuda") and torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("argv, count", [([*DRAEM, "--steps", "1"], 2), (DFM, 0), (DSR, 3 + 2 * 9)])
def test_compile_takes_networks_and_augmentations_of_the_training(argv, count, data, command, monkeypatch):
    modules, functions, predicting, argv = [], [], [], [*argv, *of(data, argv)]
    monkeypatch.setattr(draem, "AUGMENTATIONS", draem.AUGMENTATIONS)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: modules.append(module))
    monkeypatch.setattr(torch, "compile", lambda function: functions.append(function) or function)
    monkeypatch.setattr(train, "predictions", lambda model, *given, inner=train.predictions: (
        predicting.extend(model.modules()), inner(model, *given))[1])
    assert command(*argv, "--out", "plain")[0] == 0 and not modules and not functions
    assert command(*argv, "--compile")[0] == 0
    assert len(modules) == count and not any(isinstance(m, (torch.nn.Conv2d, dsr.VectorQuantizer)) for m in modules)
    assert not {id(module) for module in modules} & {id(module) for module in predicting}
    assert functions == (list(draem.AUGMENTATIONS) if argv[0] == "draem" else [])
    same("plain", "runs")


@pytest.mark.parametrize("folder", ["dtd/images", "dtd", "products/mvtec/dtd", "products/dtd/images"])
def test_textures_are_found_beside_the_data_but_not_for_the_toy(folder, capsys):
    Path(folder).mkdir(parents=True)
    Image.new("RGB", (40, 40), "magenta").save(Path(folder, "1.png"))
    args = dict(data=Path("products/mvtec/weave"), textures=None, device="cpu", preprocessing={"size": 32})
    assert train.load_textures(SimpleNamespace(**args, toy=False))[0, :, 9, 9].tolist() == [255, 0, 255]
    assert train.load_textures(SimpleNamespace(**args, toy=True)) is None
    assert "textures: coloured noise; the published results need DTD" in capsys.readouterr().out


def test_a_codebook_is_made_once_by_one_process_and_refused_for_another_count_of_images(data, command, monkeypatch):
    argv, book = [*DSR, *of(data, DSR)], Path("runs/dsr/codebook-train/last.pt")
    assert command(*argv)[0] == 0
    made = files_in(book.parent)
    shutil.move("runs/dsr/weave", "whole/dsr/weave")
    monkeypatch.setattr(train, "WORLD", 2)
    more = ["--width", 6, "--steps", 2, "--batch", 1, "--rotate", 0, "--upsampling-steps", 1]
    assert command(*argv, *more)[0] == 0 and files_in(book.parent) == made
    assert "run it without torchrun first" in mistake(command(*argv, "--out", "two"))
    other = draw_data("train", good=0, defects=(), train=6)  # a folder of the same name
    assert "codebook-train/last.pt: images was 5, not 6" in mistake(command(*argv, "--pretrain", other))
    assert "codes was 21, not 22" in mistake(command(*argv, "--codes", 22))
    monkeypatch.setattr(dsr, "fetch_codebook", lambda: book)
    for out, more in (("given", ["--codebook", book]), ("published", [])):
        assert command(*DSR, "--data", data, *more, "--out", out)[0] == 0
        same("whole", out)


@pytest.mark.parametrize("method, toy", [
    ("draem", dict(size=32, width=4, steps=3)), ("dfm", train.TOY["dfm"]),
    ("dsr", dict(size=64, hiddens=4, codes=21, width=4, steps=1, upsampling_steps=1, pretrain_steps=2))])
def test_the_toy_product_takes_its_own_settings(method, toy, command, monkeypatch):
    """The toy is drawn into data/toy. The command line overrides its settings."""
    shown = []
    monkeypatch.setattr(common, "make_toy", draw_data)
    monkeypatch.setattr(draem, "synthesize_anomalies", lambda *given, inner=draem.synthesize_anomalies, **more: (
        shown.append(more), inner(*given, **more))[1])
    monkeypatch.setitem(train.TOY, method, toy)
    assert command(method, "--batch", 2, *CPU)[::2] == (0, "")
    settings = read(f"runs/{method}/toy/metrics.json")["settings"] | {"weights": "random"}
    assert settings.items() >= (toy | {"batch": 2}).items()
    assert method != "dsr" or shown == [{"normal_share": 0.2}] * 2  # in both steps of stage 1


def test_a_runs_files_are_those_of_the_saved_weights(trained, data):
    assert set(files_in(trained)) == {"last.pt", "log.jsonl", "metrics.json", "scores.csv", "summary.png",
                                      "simulated.png", *(f"maps/{name}" for name in NAMES)}
    found, rows = read(trained / "metrics.json"), read(trained / "scores.csv")
    assert [row["path"] for row in rows] == [str(data / "test" / name) for name in NAMES]
    scores, labels = [float(row["score"]) for row in rows], [int(row["label"]) for row in rows]
    image, masks = read_all([row["path"] for row in rows], 32), torch.zeros(9, 32, 32, dtype=torch.bool)
    parts = draem.load(trained / "last.pt").predict(image / 255)
    assert scores == pytest.approx(parts["score"].tolist(), abs=1e-6) and labels == [1, 1, 1, 0, 0, 0, 1, 1, 1]
    for number, name in enumerate(NAMES):  # a picture has score and name, and what the model found
        if labels[number]:
            masks[number] = common.read_mask(data / "ground_truth" / name.replace(".png", "_mask.png"), 32, (64, 48))
        panels = common.panels(image[number], {key: value[number] for key, value in parts.items()}, masks[number])
        page = common.page([(f"{name[:4]}\n{scores[number]:.3f}\n{name[5:]}", panels)])
        with Image.open(trained / "maps" / name) as picture:
            assert abs(np.asarray(picture).astype(int) - np.asarray(page)).max() <= 1
    for kind, defective in (("dirt", scores[:3]), ("hole", scores[6:])):
        auroc = np.mean([(a > b) + (a == b) / 2 for a in defective for b in scores[3:6]])
        assert found["kinds"].pop(kind) == {"count": 3, "image_auroc": pytest.approx(auroc)}
    assert found.pop("kinds") == {"good": {"count": 3}}
    for level, metrics in (("image", common.image_metrics(scores, labels)),
                           ("pixel", common.pixel_metrics(list(parts["anomaly_map"]), list(masks)))):
        for name, value in metrics.items():  # threshold is among them
            assert found.pop(f"{level}_{name}") == pytest.approx(value, abs=5e-3)
    assert re.fullmatch("[0-9a-f]{7,40}(-dirty)?|", found.pop("commit")) and found.pop("test_set")
    assert found == {"tested": 9, "unreadable": 0, "data": str(data), "torch": torch.__version__, "settings": {
        "method": "draem", "images": 5, "textures": 9, "size": 32, "antialias": True, "bits": 16, "batch": 2, "seed": 3,
        "precision": "fp32", "width": 4, "sspcab": True, "steps": 7, "lr": 0.01, "rotate": 5.0}}


@pytest.mark.parametrize("argv, masks, headings", [
    ([*DRAEM, "--steps", 1], False, ["image", "reconstruction", "anomaly map"]), (DFM, True, ["image", "anomaly map"]),
    ([*DFM, "--score", "nll"], True, ["image"])], ids=["no masks", "fre", "nll"])
def test_summary_has_of_each_kind_the_highest_and_the_lowest_score(argv, masks, headings, command, monkeypatch):
    pages, folder, expected = watch_pages(monkeypatch), Path("runs", argv[0], "weave"), []
    status, out, _ = command(*argv, "--data", draw_data("weave", masks=masks))
    for kind in ("dirt", "good", "hole"):
        found = [float(row["score"]) for row in read(folder / "scores.csv") if f"/{kind}/" in row["path"]]
        expected += [[kind, f"{end:.3f}"] for end in sorted({min(found), max(found)}, reverse=True)]
    assert status == 0 and [caption.split("\n")[:2] for caption, _ in pages[-1]] == expected
    assert all(list(row) == headings + ["truth"] * (masks or "good" in caption) for caption, row in pages[-1])
    assert (folder / "maps").exists() == ("anomaly map" in headings)
    left_out = 9 if headings == ["image"] else 0 if masks else 6
    assert (f"leave out {left_out} images" in out) == (table_of(out)["weave"][3:] == [None] * 4) == bool(left_out)


def test_images_are_read_then_and_later_as_the_options_said(data, command, monkeypatch):
    seen, other = [], Path("runs/draem/weave-checkpoint")
    last = ["draem", "--checkpoint", RUN / "last.pt", "--batch", 2, *CPU]
    monkeypatch.setattr(common, "to_tensor", lambda image, size, antialias, bits, inner=common.to_tensor: (
        seen.append({"size": size, "antialias": antialias, "bits": bits}), inner(image, size, antialias, bits))[1])
    assert command(*DRAEM, "--no-antialias", "--bits", 10, "--data", data, "--steps", 1)[0] == 0
    assert command(*last, "--data", data)[0] == command(*last, "--predict", data / "test/hole")[0] == 0
    assert seen == [{"size": 32, "antialias": False, "bits": 10}] * (5 + 9 + 9 + 3)
    assert read(RUN / "scores.csv") == read(other / "scores.csv") and read(RUN / "last.pt")["preprocessing"] == seen[0]
    assert read(other / "metrics.json")["settings"].items() >= (seen[0] | {"file": f"{RUN}/last.pt"}).items()


def test_predict(trained, data, command):
    """Path, score, decision. Pictures lie under the image's full path. What cannot be read is named."""
    whole, first = (data / "test/hole/000.png").read_bytes(), str(data / "test/good/001.png")
    for name, content in {"photos/a.png": whole, "photos/b/a.png": whole, "photos/half.png": whole[:99],
                          "other/a.png": whole, "text": b"no image"}.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)
    Image.new("RGB", (50, 40), "red").save("photos/a.jpg")
    argv = ["draem", "--checkpoint", trained / "last.pt", *CPU, "--batch", 2, "--predict"]
    status, out, err = command(*argv, first, "photos", "text")
    assert status == 2 and all(f"\ntrain.py: {bad}: cannot be read" in err for bad in ("photos/half.png", "text"))
    names, folder = [first, "photos/a.jpg", "photos/a.png", "photos/b/a.png"], Path("runs/draem/predictions")
    images = torch.stack([common.read_image(path, 32) for path in names])
    scores = draem.load(trained / "last.pt").predict(images / 255)["score"].tolist()
    assert out == "".join(f"{name} {value:.6f}\n" for name, value in zip(names, scores)) and str(folder) in err
    limit = float(read(folder / "scores.csv")[2]["score"])
    for threshold, decision in ((limit, "defective"), (limit + 1e-6, "normal")):
        status, out, _ = command(*argv, "other/a.png", "--threshold", threshold)
        assert status == 0 and out.endswith(f" {decision}\n") and limit == pytest.approx(scores[2], abs=1e-6)
    names = [os.path.abspath(name) for name in (*names, *["other/a.png"] * 2)]
    assert [(row["path"], row["decision"], row["checkpoint"]) for row in read(folder / "scores.csv")] == [
        *zip(names, ("", "", "", "", "defective", "normal"), [str(trained / "last.pt")] * 6)]
    assert set(files_in(folder)) == {"scores.csv", *(name[1:].replace(".jpg", ".jpg.png") for name in names)}


def test_what_ends_the_script(data, monkeypatch, capfd):
    """A mistake is one line and status 2, Ctrl-C is 130 and silent, a fault of the program has its traceback."""
    monkeypatch.setattr(sys, "argv", ["train.py", *DFM, "--data", str(data)])
    for fault, status, err in ((ValueError("a\nb  c"), 2, "train.py: a b c\n"), (KeyboardInterrupt(), 130, ""),
                               (OSError(28, "Full", "x"), 2, "train.py: [Errno 28] Full: 'x'\n"), (KeyError(), 1, "")):
        with monkeypatch.context() as patch, pytest.raises((KeyError, SystemExit)) as left:
            patch.setattr(common, "find_categories", lambda *_, **__: (_ for _ in ()).throw(fault))
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert capfd.readouterr().err == err and getattr(left.value, "code", 1) == status


def test_processes_of_their_own(trained, data):
    """python -X dev shows the traceback. | head ends quietly. Rank 1 of 2 on a console that cannot encode its names."""
    for name in ("a", "\u00e9"):
        draw_data(f"parent/{name}")
    Path("parent/\u00e9/test/good/\u00fc.png").write_text("no image")

    def start(*argv, flags=(), **more):
        return subprocess.Popen([sys.executable, *flags, SCRIPT, *map(str, argv)], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"} | more)
    dev = start(*DFM, "--data", "nowhere", flags=("-X", "dev", "-W", "ignore"))
    head = start("draem", "--checkpoint", trained / "last.pt", "--predict", data, *CPU, "--batch", 1)
    rank = start(*DFM, "--data", "parent", RANK="1", WORLD_SIZE="2", PYTHONIOENCODING="ascii")
    assert head.stdout.readline().startswith(str(data).encode())
    head.stdout.close()
    assert b"Error" not in head.stderr.read() and head.wait() == 0
    out, err = rank.communicate()
    assert rank.returncode == 0 and os.listdir("runs/dfm") == ["\u00e9"]  # 2 would end the other process
    assert err.count(b"\n") == 1 and rb"\xe9/test/good/\xfc.png: cannot be read" in err and rb"\xe9: dfm" in out
    out, err = dev.communicate()
    assert dev.returncode == 1 and b"Traceback" in err and err.endswith(b"nowhere: no such folder; check the path\n")


@gpu
def test_a_step_on_a_gpu_never_waits_for_it(data, command, monkeypatch):
    """From the rate, the first line of a step, to the end of the optimizer's work."""
    for module in (draem, dsr):
        monkeypatch.setattr(module, "learning_rate", lambda *given, inner=module.learning_rate: (
            torch.cuda.set_sync_debug_mode("error"), inner(*given))[1])
    monkeypatch.setattr(torch.amp.GradScaler, "update", lambda _: torch.cuda.set_sync_debug_mode("default"))
    for argv in ([*DRAEM, "--steps", 4, "--textures", data / "test"], DSR):
        assert command(*argv, *of(data, argv), "--device", "cuda", "--precision", "bf16")[0] == 0


@gpu
def test_a_gpu_computes_what_the_cpu_computes(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    image, u = torch.randint(0, 256, (4, 3, 256, 256)) / 255, torch.rand(4, 3)
    for function in draem.AUGMENTATIONS:  # a level may fall to the other side of a threshold
        apart = (function(image.cuda(), u.cuda()).cpu() - function(image, u)).abs() > 1e-3
        assert apart.float().mean() < 1e-3, function
    for model in (draem.DraemModel(16).eval(), dsr.DsrModel(width=16).eval()):
        expected, model = model.predict(image), model.cuda().to(memory_format=torch.channels_last)
        for bf16, limit in ((False, 2e-3), (True, 0.2)):  # on a CPU 0.07 for DSR, which is not trained
            with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
                found = model.predict(image.cuda())
            assert all((part - found[name].float().cpu()).abs().mean() < limit for name, part in expected.items())
    quantizer, z, features = dsr.VectorQuantizer(4096, 128), torch.randn(2, 128, 64, 64), torch.randn(60, 64, 8, 8)
    near = quantizer.nearest(z)
    assert (near == quantizer.cuda().nearest(z.cuda()).cpu()).float().mean() > 0.999
    one, other = dfm.PCA(0.97).fit(features), dfm.PCA(0.97).fit(features.cuda()).cpu()
    torch.testing.assert_close(one.transform(features) ** 2, other.transform(features) ** 2, rtol=1e-3, atol=1e-3)
