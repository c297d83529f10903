"""Tests of train.py: the command, run as a user runs it, on ten small pictures.

Oracles: for stopped and killed runs, an uninterrupted run, bit for bit; for several processes, one; for defaults and
learning-rate drops, the papers' numbers as literals; for what losses and predict receive, the files; for metrics,
brute force over pairs and thresholds; for a mistake, the words of its message.
"""
import csv
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
import common
import dfm
import draem
import dsr
import train

DRAEM = "draem --size 32 --width 4 --batch 6 --precision fp32 --device cpu".split()
DSR = ("dsr --size 64 --width 4 --batch 3 --precision fp32 --device cpu --hiddens 8 --codes 32 --pretrain-steps 4 "
       "--pretrain-batch 3 --steps 4 --upsampling-steps 4").split()
DFM = ("dfm --size 64 --backbone resnet18 --layer layer1 --pooling 2 --weights random --batch 4 --precision fp32 "
       "--device cpu").split()
COLUMNS = ["image_auroc", "image_ap", "image_f1", "image_threshold", "pixel_auroc", "pixel_ap", "pixel_f1",
           "pixel_aupro"]
PIXEL = {name for name in COLUMNS if name.startswith("pixel")}
unix = pytest.mark.skipif(sys.platform == "win32", reason="has no such signals")


def draw_data(folder, seed=0, train=4, good=2, defects=("hole", "dirt"), masks=True):
    """A category in MVTec's layout: a shaded weave, 64 wide and 48 high, with black holes or white dirt."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:48, :64]

    def normal():
        weave = np.dstack((3 * x, 4 * y, 100 + 30 * np.sin(x / 3 + y / 5)))
        return np.uint8(weave + rng.integers(0, 20, (48, 64, 3)))

    def save(name, array):
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)

    for part, count in (("train", train), ("test", good)):
        for i in range(count):
            save(f"{part}/good/{i:03d}.png", normal())
    for defect, i in itertools.product(defects, range(2)):
        picture = normal()
        spot = np.hypot(x - 20 - 12 * i, y - 16) < 8
        if (defect, i) == ("hole", 0):
            spot |= np.hypot(x - 50, y - 36) < 5
        picture[spot] = 0 if defect == "hole" else 255
        save(f"test/{defect}/{i:03d}.png", picture)
        if masks:
            save(f"ground_truth/{defect}/{i:03d}_mask.png", spot)
    return Path(folder)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw_data(tmp_path_factory.mktemp("data") / "weave")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("benchmark", "allow_tf32"):  # restored after the test
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))


@pytest.fixture
def command(capsys):
    """command(*argv) -> exit status, stdout, stderr."""
    def run(*argv):
        capsys.readouterr()
        return train.main([str(arg) for arg in argv]), *capsys.readouterr()
    return run


@pytest.fixture
def mistake(command):
    """mistake(*argv) -> the one line on stderr of a command that must end with status 2."""
    def run(*argv):
        status, _, err = command(*argv)
        assert status == 2 and err.startswith("train.py: ") and err.count("\n") == 1 and err.endswith("\n"), err
        return err
    return run


@pytest.fixture
def fed(monkeypatch):
    """A list of (model, arguments of its losses) for every step."""
    calls = []
    for kind in (draem.DraemModel, dsr.DsrModel, dsr.DiscreteLatentModel):
        def losses(self, *given, inner=kind.losses):
            calls.append((self, given))
            return inner(self, *given)
        monkeypatch.setattr(kind, "losses", losses)
    return calls


def before_each_step(monkeypatch, act):
    """Calls act(step, optimizer, generator) before every training step; step counts from 1."""
    inner, count = train.training_step, itertools.count(1)

    def step(model, optimizer, sample, generator, args):
        act(next(count), optimizer, generator)
        return inner(model, optimizer, sample, generator, args)
    monkeypatch.setattr(train, "training_step", step)


def log_rows(folder):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def metrics_of(folder):
    return json.loads(Path(folder, "metrics.json").read_text())


def scores_of(folder):
    with open(Path(folder, "scores.csv"), newline="", encoding="utf-8") as file:
        return [(Path(row["path"]), int(row["label"]), float(row["score"])) for row in csv.DictReader(file)]


def table_of(out):
    """The printed table as {name: figures}; a dash is None."""
    lines = out[("\n" + out).index("\ncategory  "):].splitlines()[1:-1]
    return {line.split()[0]: [None if word == "-" else float(word) for word in line.split()[1:]] for line in lines}


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def leaves(value, name=""):
    """Yields (path, value) for every tensor and number of a checkpoint."""
    if isinstance(value, (dict, list, tuple)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, f"{name}.{key}")
    else:
        yield name, value


def same_run(one, other):
    """Asserts that two run folders are bit-equal, apart from seconds and the images' paths."""
    states = [dict(leaves(torch.load(Path(folder, "last.pt"), weights_only=True))) for folder in (one, other)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        equal = torch.equal(value, states[1][name]) if isinstance(value, torch.Tensor) else value == states[1][name]
        assert equal or name == ".seconds", name
    files = [files_in(folder) for folder in (one, other)]
    assert files[0].keys() == files[1].keys() and not any(name.endswith(".tmp") for name in files[0])
    for name in files[0].keys() - {"last.pt", "metrics.json", "scores.csv"}:
        assert files[0][name] == files[1][name], name
    if "metrics.json" in files[0]:
        a, b = metrics_of(one), metrics_of(other)
        assert a.pop("seconds") > 0 and b.pop("seconds") > 0 and a == b
        assert [row[1:] for row in scores_of(one)] == [row[1:] for row in scores_of(other)]


# ---------------------------------------------------------------------------------------------------------------------
# A run's folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run folder of DRAEM; the tests only read it."""
    out, before = tmp_path_factory.mktemp("trained"), files_in(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "LOG_EVERY", 5)
        argv = [*DRAEM, "--data", str(data), "--steps", "14", "--lr", "5e-3", "--out", str(out), "--save-maps"]
        assert train.main(argv) == 0
    assert files_in(data) == before  # a run writes below --out alone
    return out / "draem" / "weave"


def test_a_run_leaves_its_files(trained):
    pictures = {f"maps/{part}/00{i}.png" for part in ("good", "hole", "dirt") for i in range(2)}
    assert set(files_in(trained)) == {"last.pt", "log.jsonl", "metrics.json", "scores.csv", "summary.png", *pictures}
    rows = log_rows(trained)
    assert [row["step"] for row in rows] == [1, 5, 10, 14] and {row["stage"] for row in rows} == {"train"}
    assert all(set(row) == {"stage", "step", "l2", "ssim", "focal", "lr"} for row in rows)
    assert all(rows[-1][term] < rows[0][term] for term in ("l2", "ssim", "focal"))  # it learns
    last, found = torch.load(trained / "last.pt", weights_only=True), metrics_of(trained)
    assert set(last) == {"method", "settings", "reading", "model", "optimizer", "run", "stage", "step", "seconds",
                         "log_bytes"}
    assert (last["method"], last["stage"], last["step"]) == ("draem", "train", 14)
    assert last["reading"] == {"size": 32, "antialias": False, "bits": 16}
    assert last["log_bytes"] == (trained / "log.jsonl").stat().st_size
    assert set(found) == {*COLUMNS, "category", "seconds", "settings", "unreadable"} and found["category"] == "weave"
    assert last["run"] == found["settings"] == {
        "method": "draem", "category": "weave", "images": 4, "textures": 0, "size": 32, "antialias": False, "bits": 16,
        "batch": 6, "seed": 0, "precision": "fp32", "width": 4, "sspcab": False, "steps": 14, "beta": [0.1, 1.0],
        "lr": 5e-3, "rotate": 45.0}


def brute_force(scores, labels):
    """AUROC over pairs; AP, the best F1 and its highest threshold over every score as threshold."""
    scores, labels = np.asarray(scores), np.asarray(labels) > 0
    apart = np.sign(scores[labels][:, None] - scores[~labels])
    ap, f1, threshold, recall = 0, 0, None, 0
    for limit in sorted(set(scores), reverse=True):
        found = (labels & (scores >= limit)).sum()
        ap += (found / labels.sum() - recall) * found / (scores >= limit).sum()
        recall = found / labels.sum()
        if 2 * found / ((scores >= limit).sum() + labels.sum()) > f1:
            f1, threshold = 2 * found / ((scores >= limit).sum() + labels.sum()), limit
    return (1 + apart.mean()) / 2, ap, f1, threshold


def test_metrics_and_scores_are_those_of_the_saved_weights(trained, data):
    model, found, rows = draem.load(trained / "last.pt"), metrics_of(trained), scores_of(trained)
    assert [path for path, *_ in rows] == sorted(data.glob("test/*/*.png"))
    assert [label for _, label, _ in rows] == [int(path.parent.name != "good") for path, *_ in rows]
    parts = model.predict(torch.stack([common.read_image(path, 32) for path, *_ in rows]) / 255)
    assert [score for *_, score in rows] == pytest.approx(parts["score"].tolist(), abs=1e-6)
    auroc, ap, f1, threshold = brute_force([score for *_, score in rows], [label for _, label, _ in rows])
    assert [found[f"image_{name}"] for name in ("auroc", "ap", "f1")] == pytest.approx([auroc, ap, f1])
    assert found["image_threshold"] == threshold
    regions, count = [], 0
    for path, label, _ in rows:
        truth = data / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"
        region = common.connected_regions(common.read_mask(truth, 32, path)[0]) if label else torch.zeros(32, 32).int()
        regions.append(torch.where(region > 0, region + count, 0))
        count += int(region.max())
    assert count == 5
    maps, regions = parts["anomaly_map"].flatten().numpy(), torch.stack(regions).flatten().numpy()
    aupro = common.ranking_metrics(maps, regions)["aupro"]
    assert [found[f"pixel_{name}"] for name in ("auroc", "ap", "f1", "aupro")] == pytest.approx(
        [*brute_force(maps, regions)[:3], aupro], abs=2e-5)


def test_pictures(trained, data):
    """A strip shows image, reconstruction, map over image and truth, with white gaps. The sheet shows all strips."""
    with Image.open(trained / "maps/hole/000.png") as picture:
        strip = np.asarray(picture).astype(int)
    assert strip.shape == (32, 4 * 32 + 3 * 4, 3)
    image = common.read_image(data / "test/hole/000.png", 32)
    model = draem.load(trained / "last.pt")
    parts = {name: part[0] for name, part in model.predict(image[None] / 255).items()}
    image = image.permute(1, 2, 0).numpy()
    assert (strip[:, :32] == image).all() and (strip[:, 32:36] == 255).all()
    drawn = parts["reconstruction"].permute(1, 2, 0).clamp(0, 1).numpy() * 255
    assert abs(strip[:, 36:68] - drawn).max() <= 0.51
    assert abs(strip[:, 72:104] - common.overlay(image, parts["anomaly_map"])).max() <= 1
    mask = common.read_mask(data / "ground_truth/hole/000_mask.png", 32, data / "test/hole/000.png")[0]
    assert (strip[:, 108:] == 255 * mask.numpy()[..., None]).all()
    with Image.open(trained / "summary.png") as page:  # six strips, five times as large, twenty pixels apart
        assert page.height == 28 + 6 * (160 + 20)
        row = page.crop((page.width - 20 - 5 * 140, 28 + 4 * 180, page.width - 20, 28 + 4 * 180 + 160))
    assert (np.asarray(row)[2::5, 2::5] == strip).all()


@pytest.mark.parametrize("name, turn, size", [("a.tiff", 6, (50, 70)), ("a.jpg", 8, (50, 70)), ("a.tiff", 3, (70, 50)),
                                              ("a.jpg", 99, (70, 50))])  # 99 is no orientation
def test_a_saved_map_is_as_large_as_the_image_as_it_is_seen(name, turn, size, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.new("RGB", (70, 50)).save(name, exif=exif)
    train.save_map(tmp_path / "map.tiff", Path(name), torch.zeros(32, 32))
    with Image.open(tmp_path / "map.tiff") as tiff:
        assert tiff.size == size


def test_maps_for_mvtecs_script(trained, data, command):
    """anomaly_maps/CATEGORY/test/DEFECT/NAME.tiff: one channel, 32-bit float, of the upright image's size."""
    root = trained.parent / "anomaly_maps" / "weave" / "test"
    assert {path.relative_to(root) for path in root.rglob("*.*")} == {
        path.relative_to(data / "test").with_suffix(".tiff") for path in (data / "test").rglob("*.png")}
    model = draem.load(trained / "last.pt")
    image = common.read_image(data / "test/hole/000.png", 32)
    anomaly_map = model.predict(image[None] / 255)["anomaly_map"][0].numpy()
    with Image.open(root / "hole/000.tiff") as tiff:
        assert tiff.mode == "F" and tiff.size == (64, 48)
        assert abs(np.asarray(tiff) - np.asarray(Image.fromarray(anomaly_map).resize((64, 48), 2))).max() < 1e-5
    for turn in (1, 3, 5, 8):
        exif = Image.Exif()
        exif[0x0112] = turn
        Image.new("RGB", (70, 50)).save(f"{turn}.jpg", exif=exif)
    argv = ["draem", "--checkpoint", trained / "last.pt", "--predict", *Path().glob("*.jpg"), "--save-maps"]
    assert command(*argv)[0] == 0
    for turn, size in ((1, (70, 50)), (3, (70, 50)), (5, (50, 70)), (8, (50, 70))):
        with Image.open(f"runs/draem/predictions/{turn}.jpg.tiff") as tiff:
            assert tiff.size == size


# ---------------------------------------------------------------------------------------------------------------------
# Stopped, killed, resumed


def train_and_die(argv, moment, number):
    """Runs the command and kills its own process at the number-th training step or checkpoint."""
    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def act(count, *_):
        if moment == "before a step" and count == number:
            die()

    def save(content, file, inner=torch.save, count=itertools.count(1)):
        if moment == "in the middle of a checkpoint" and next(count) == number:
            whole = io.BytesIO()
            inner(content, whole)
            file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
            file.flush()
            die()
        inner(content, file)

    def replace(old, new, inner=os.replace, count=itertools.count(1)):
        if moment == "before a checkpoint takes its place" and new.name == "last.pt" and next(count) == number:
            die()
        inner(old, new)

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        before_each_step(patch, act)
        patch.setattr(train, "LOG_EVERY", 1)
        patch.setattr(torch, "save", save)
        patch.setattr(os, "replace", replace)
        train.main(argv)


@unix
@pytest.mark.parametrize("method", ["draem", "dsr"])
def test_killed_at_random_a_run_ends_like_one_left_alone(method, data, command, monkeypatch):
    argv = {"draem": [*DRAEM, "--steps", "12", "--sspcab"], "dsr": [*DSR, "--pretrain", str(data / "train")]}[method]
    argv += ["--data", str(data), "--save-minutes", "0"]
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    assert command(*argv, "--out", "whole")[0] == 0
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(Path(__file__).parent))))
    clean = multiprocessing.get_context("forkserver")  # forks processes that have imported everything
    clean.set_forkserver_preload(["test_train", "torch._dynamo"])  # optimizers import the latter, slowly
    pick = random.Random(method)
    for moment in ("before a step", "in the middle of a checkpoint", "before a checkpoint takes its place"):
        given = [*argv, "--out", "cut", "--resume"], moment, pick.choice((2, 3, 4))
        died = clean.Process(target=train_and_die, args=given)
        died.start()
        died.join()
        assert died.exitcode == -signal.SIGKILL
    folder = sorted(Path("cut", method).iterdir())[-1]
    saved = torch.load(folder / "last.pt", weights_only=True)["log_bytes"]
    assert saved < (folder / "log.jsonl").stat().st_size  # the killed step was logged, not saved
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"stage": "tr')
    assert command(*argv, "--out", "cut", "--resume")[0] == 0
    for folder in Path("whole", method).iterdir():
        same_run(Path("cut", method, folder.name), folder)


@unix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step(number, data, command, monkeypatch):
    """The run saves and exits with 128 + the signal's number. --resume goes on, although the data have moved."""
    argv = [*DRAEM, "--steps", "7"]
    assert command(*argv, "--data", data, "--out", "whole")[0] == 0
    taken = []

    def act(count, *_):
        taken.append(count)
        if taken == [1, 2, 3]:
            os.kill(os.getpid(), number)

    def unnoticed(*_):
        raise AssertionError("the signal was not noticed")

    before = signal.signal(number, unnoticed)
    try:
        with monkeypatch.context() as patch:
            before_each_step(patch, act)
            status, out, err = command(*argv, "--data", data)
        assert signal.getsignal(number) is unnoticed
    finally:
        signal.signal(number, before)
    assert status == 128 + number and taken == [1, 2, 3] and "step 3 of 7" in err and "--resume" in err
    assert torch.load("runs/draem/weave/last.pt", weights_only=True)["step"] == 3
    shutil.copytree(data, "moved/weave")
    before_each_step(monkeypatch, act)
    status, out, _ = command(*argv, "--data", "moved/weave", "--resume")
    assert status == 0 and "resumed after step 3" in out and taken == [1, 2, 3, 1, 2, 3, 4]
    same_run("runs/draem/weave", "whole/draem/weave")


@unix
def test_a_second_ctrl_c_acts_as_usual(data, command, monkeypatch):
    def act(count, *_):
        if count == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
    before_each_step(monkeypatch, act)
    status, _, err = command(*DRAEM, "--data", data, "--steps", 4)
    assert status == 130 and "--resume" in err and not Path("runs/draem/weave/last.pt").exists()


class Killed(BaseException):
    pass


def test_minutes_between_checkpoints_and_the_time_left(data, command, monkeypatch):
    """A step takes 40 s here: 2 minutes are over after steps 3 and 6. A run killed in step 8 goes on from step 6."""
    now, saved, save = [1000], [], train.Run.save

    def act(count, *_):
        now[0] += 40
        if count == 8:
            raise Killed
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(train.Run, "save", lambda run, *given: saved.append(given[2]) or save(run, *given))
    before_each_step(monkeypatch, act)
    argv = [*DRAEM, "--data", data, "--steps", 9, "--save-minutes", 2, "--resume"]
    with pytest.raises(Killed):
        command(*argv)
    assert saved == [3, 6] and torch.load("runs/draem/weave/last.pt", weights_only=True)["seconds"] == 240
    status, out, _ = command(*argv)
    assert status == 0 and saved == [3, 6, 9] and metrics_of("runs/draem/weave")["seconds"] == 360
    assert re.search(r"^train 7/9 .* 40 s/step  0:01:20 left$", out, re.M)


def test_weights_and_steps_depend_on_seed_stage_and_number_alone(data, command, monkeypatch):
    """Random numbers that earlier steps drew make no difference."""
    def seen(*argv, waste=0):
        draws, weights = [], []

        def act(count, optimizer, generator):
            draws.append(torch.rand(1, generator=generator.clone_state(), dtype=torch.float64).item())
            weights.append(optimizer.param_groups[0]["params"][0].sum().item())
            torch.rand(waste), torch.rand(waste, generator=generator)
        torch.rand(waste)
        with monkeypatch.context() as patch:
            before_each_step(patch, act)
            assert command(*argv, "--data", data, "--pretrain", data / "train")[0] == 0
        return draws, weights[0], weights[4], weights[8]  # where the stages begin

    one, other = seen(*DSR), seen(*DSR, "--out", "other", "--seed", 1)
    assert seen(*DSR, "--out", "again", waste=9)[:2] == one[:2]
    assert len({*one[0], *other[0]}) == 24  # every step of every stage draws its own
    assert all(a != b for a, b in zip(one[1:], other[1:]))


# ---------------------------------------------------------------------------------------------------------------------
# What --resume takes and refuses


def test_a_folder_that_holds_a_run_is_refused(data, command, mistake):
    for argv in ([*DRAEM, "--steps", 1], DFM):
        argv = [*argv, "--data", data]
        assert command(*argv)[0] == 0
        before = files_in("runs")
        line = mistake(*argv)
        assert f"{argv[0]}/weave: holds a run" in line and "--resume" in line and "--out" in line
        assert files_in("runs") == before and command(*argv, "--out", "other")[0] == 0
    Path("runs/draem/weave/last.pt").unlink()  # a run killed before its first checkpoint leaves a log
    assert "holds a run" in mistake(*DRAEM, "--steps", 1, "--data", data)
    assert command(*DRAEM, "--steps", 1, "--data", data, "--resume")[0] == 0
    assert len(log_rows("runs/draem/weave")) == 1


def test_resume_refuses_another_setting(trained, data, mistake):
    argv = [*DRAEM, "--steps", 14, "--lr", 5e-3, "--out", trained.parents[1], "--resume"]
    before = files_in(trained.parents[1])
    for option, old, *new in (("--size", 32, 64), ("--width", 4, 6), ("--batch", 6, 5), ("--seed", 0, 7),
                              ("--lr", 0.005, 0.001), ("--steps", 14, 20), ("--steps", 14, 9), ("--rotate", 45.0, 0.0),
                              ("--beta", [0.1, 1.0], 0.2, 1.0), ("--bits", 16, 12), ("--antialias", False),
                              ("--sspcab", False), ("--precision", "fp32", "bf16")):
        line = mistake(*argv, "--data", data, option, *new)
        assert f"trained with {option[2:]} {old}, now it is {list(new) if new[1:] else new[0] if new else True}" in line
    more = draw_data("more/weave", train=5)
    assert "trained with images 4, now it is 5" in mistake(*argv, "--data", more)
    assert "trained with textures 0, now it is 4" in mistake(*argv, "--data", data, "--textures", data / "train")
    assert files_in(trained.parents[1]) == before


@pytest.mark.parametrize("method, argv", [("draem", [*DRAEM, "--steps", "1"]), ("dfm", DFM)])
def test_resume_of_a_whole_command_prints_the_whole_table(method, argv, command, monkeypatch):
    """Two processes do each category once, with one process's results. --resume then prints the table without work."""
    names = ["a", "b", "c"]
    for seed, name in enumerate(names):
        draw_data(f"parent/{name}", seed, masks=name != "b")
    done = {}
    for rank in range(2):
        monkeypatch.setattr(train, "RANK", rank)
        monkeypatch.setattr(train, "WORLD", 2)
        status, out, _ = command(*argv, "--data", "parent")
        assert status == 0
        done[rank] = set(table_of(out)) - {"mean"}
    assert done == {0: {"a", "c"}, 1: {"b"}}
    monkeypatch.setattr(train, "RANK", 0)
    monkeypatch.setattr(train, "WORLD", 1)
    status, whole, _ = command(*argv, "--data", "parent", "--out", "one")
    for name in names:
        same_run(f"runs/{method}/{name}", f"one/{method}/{name}")
    for work in ("training_step", "predict_batch", "resident", "to_device"):
        monkeypatch.setattr(train, work, None)
    status, out, _ = command(*argv, "--data", "parent", "--resume")
    table = table_of(out)
    assert status == 0 and table == table_of(whole) and list(table) == [*names, "mean"]
    assert table["b"][4:] == [None] * 4
    for name in names:
        found = metrics_of(f"runs/{method}/{name}")
        assert table[name] == [pytest.approx(found[c], abs=6e-5) if c in found else None for c in COLUMNS]
    for column, values in zip(COLUMNS, zip(*(table[name] for name in names))):
        known = [value for value in values if value is not None]
        mean = None if column == "image_threshold" else pytest.approx(sum(known) / len(known), abs=1e-4)
        assert table["mean"][COLUMNS.index(column)] == mean


def test_a_run_that_was_killed_before_its_evaluation_is_evaluated(trained, data, command):
    shutil.copytree(trained, "runs/draem/weave")
    Path("runs/draem/weave/metrics.json").unlink()
    assert command(*DRAEM, "--data", data, "--steps", 14, "--lr", 5e-3, "--resume")[0] == 0
    same_run("runs/draem/weave", trained)


# ---------------------------------------------------------------------------------------------------------------------
# Options


def test_defaults_are_the_published_settings(monkeypatch):
    published = {
        "draem": dict(size=256, batch=8, epochs=700, lr=1e-4, width=128, beta=(0.1, 1.0), rotate=45.0, sspcab=False,
                      steps=None),
        "dsr": dict(size=256, batch=8, lr=2e-4, steps=100_000, upsampling_steps=20_000, pretrain_steps=200_000,
                    pretrain_batch=32, hiddens=128, codes=4096, width=64, rotate=90.0),
        "dfm": dict(size=256, backbone="resnet50", layer="layer3", pooling=4, variance=0.97, score="fre")}
    shared = dict(seed=0, antialias=False, bits=16, out=Path("runs"), resume=False, toy=False)
    monkeypatch.setattr(train, "run_all", lambda args, model: seen.update(vars(args)) or 0)
    for method, values in published.items():
        seen = {}
        assert train.main([method, "--data", "x", "--device", "cpu"]) == 0
        assert seen.items() >= (values | shared).items()
    names = {"rotate": "rotation", "variance": "share"}
    for method, values in published.items():  # a default is PUBLISHED's entry, not a copy
        for name in values.keys() - {"size", "batch", "steps", "sspcab"}:
            with monkeypatch.context() as patch:
                patch.setitem(train.METHODS[method].PUBLISHED, names.get(name, name), changed := [1])
                assert getattr(train.parse([method]), name) is changed


@pytest.mark.parametrize("method", train.METHODS)
def test_help(method, capsys):
    with pytest.raises(SystemExit) as left:
        train.main([method, "--help"])
    words = " ".join(capsys.readouterr().out.split())
    for value in {"draem": (256, 700, 0.0001, 45.0), "dsr": (200000, 4096, 20000), "dfm": ("layer3", 0.97)}[method]:
        assert f"default: {value}" in words
    assert left.value.code == 0 and not re.search("default: (None|False)|SUPPRESS", words)


def test_the_rate_drops_where_published(data, command, monkeypatch):
    """The rate falls to a tenth: DRAEM's after 4/7 and 6/7 of the steps, DSR's in stage 2 alone, after 4/5."""
    rates = []
    before_each_step(monkeypatch, lambda _, optimizer, __: rates.append(optimizer.param_groups[0]["lr"]))
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    assert command(*DRAEM, "--data", data, "--steps", 7, "--lr", 0.01)[0] == 0
    assert rates == pytest.approx([0.01] * 4 + [0.001] * 2 + [0.0001])
    assert [row["lr"] for row in log_rows("runs/draem/weave")] == rates
    rates.clear()
    argv = [*DSR, "--data", data, "--pretrain", data / "train", "--steps", 5, "--upsampling-steps", 5]
    assert command(*argv, "--lr", 0.01)[0] == 0
    assert rates == pytest.approx([0.01] * 4 + [0.01] * 4 + [0.001] + [0.01] * 5)
    assert [row["lr"] for row in log_rows("runs/dsr/weave")] == rates[4:]
    assert [row["stage"] for row in log_rows("runs/dsr/weave")] == ["detection"] * 5 + ["upsampling"] * 5


def is_one_of(image, images):
    return any(torch.equal(image, other) for other in images)


def test_draem_is_fed_images_and_textures(data, command, fed):
    """Batches in [0, 1] come from all training images and all textures. Every option reaches the model."""
    colours = {"magenta": (255, 0, 255), "green": (0, 255, 0)}
    Path("textures").mkdir()
    for name, colour in colours.items():
        Image.new("RGB", (50, 70), colour).save(f"textures/{name}.jpg", quality=100, subsampling=0)
    status, out, _ = command(
        "draem", "--data", data, "--textures", "textures", "--size", 64, "--width", 6, "--batch", 3, "--epochs", 3,
        "--beta", 0.2, 0.3, "--rotate", 5, "--sspcab", "--lr", 3e-3, "--seed", 5, "--precision", "fp32", "--device",
        "cpu")
    assert status == 0 and len(fed) == 3 * 2  # four images make two batches of three
    sources = {name: [common.read_image(path, 64) / 255 for path in common.list_images(folder)]
               for name, folder in (("image", data / "train"), ("texture", Path("textures")))}
    for model, (image, texture, _) in fed:
        for name, batch in (("image", image), ("texture", texture)):
            assert batch.shape == (3, 3, 64, 64) and batch.is_contiguous(memory_format=torch.channels_last)
            assert all(is_one_of(each, sources[name]) for each in batch)
    for name, index in (("image", 0), ("texture", 1)):
        drawn = torch.cat([given[index] for _, given in fed])
        assert all(is_one_of(each, drawn) for each in sources[name])
    assert model.beta == (0.2, 0.3) and model.rotation == 5
    assert isinstance(model.reconstructive_subnetwork.encoder.block5, draem.SSPCAB)
    assert model.reconstructive_subnetwork.encoder.block1[0].out_channels == 6
    rows, last = log_rows("runs/draem/weave"), torch.load("runs/draem/weave/last.pt", weights_only=True)
    assert rows[0]["lr"] == 3e-3 and "sspcab" in rows[0] and last["run"]["textures"] == 2
    assert last["settings"] == dict(width=6, sspcab=True, beta=(0.2, 0.3), rotation=5.0, sspcab_lambda=0.1)


def test_dsr_is_fed_images_and_has_its_sizes(data, command, fed):
    argv = [*DSR, "--data", data, "--pretrain", data / "test", "--rotate", 0, "--pretrain-batch", 5, "--width", 6]
    assert command(*argv)[0] == 0 and len(fed) == 12
    normal, other = ([common.read_image(path, 64) / 255 for path in sorted((data / part).rglob("*.png"))]
                     for part in ("train", "test"))
    for model, (image, generator) in fed[:4]:
        assert image.shape == (5, 3, 64, 64) and all(is_one_of(each, other) for each in image)
    for model, (image, generator) in fed[4:]:
        assert image.shape == (3, 3, 64, 64) and all(is_one_of(each, normal) for each in image)
    assert model.rotation == 0 and len(model.anomaly_detection_module.unet.encoder.block1[0].weight) == 6
    latent = dict(hiddens=8, residual_layers=2, residual_hiddens=4, codes=32, code_length=8)
    assert fed[0][0].settings == model.discrete_latent_model.settings == latent
    last = torch.load("runs/dsr/codebook-test/last.pt", weights_only=True)
    assert last["method"] == "dsr-codebook" and last["settings"] == latent
    for name, value in last["model"].items():  # stages 2 and 3 leave it as it is
        assert torch.equal(value, model.discrete_latent_model.state_dict()[name])


def test_dfm_has_its_options(data, command):
    argv = ["dfm", "--data", data, "--size", 64, "--backbone", "resnet18", "--layer", "layer2", "--pooling", 3,
            "--variance", 2, "--weights", "random", "--device", "cpu"]
    assert command(*argv)[0] == 0
    model = dfm.load("runs/dfm/weave/last.pt")
    assert model.backbone.name == "resnet18" and model.layer == "layer2" and model.score_type == "fre"
    assert model.pca[0].components.shape == (2, 128 * 2 * 2)  # 8 x 8 pooled by 3
    assert torch.load("runs/dfm/weave/last.pt", weights_only=True)["run"]["precision"] == "fp32"


def test_precision(data, command, monkeypatch):
    seen = []

    def watch(kind, name, inner):
        def call(self, *given):
            seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
            return inner(self, *given)
        monkeypatch.setattr(kind, name, call)

    for kind, name in ((draem.DraemModel, "losses"), (draem.DraemModel, "predict"), (dfm.DFMModel, "features")):
        watch(kind, name, getattr(kind, name))
    for precision, dtype in (("fp32", False), ("bf16", torch.bfloat16)):
        for argv in ([*DRAEM, "--steps", "1"], DFM):
            assert command(*argv, "--data", data, "--precision", precision, "--out", precision)[0] == 0
        assert len(seen) == 5 and set(seen) == {dtype}  # a batch to train on and one to test; DFM has two to test
        seen.clear()


def test_automatic_precision_is_what_the_processor_has(monkeypatch):
    def settled(method, **has):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.delattr(torch.cpu, name, raising=False)
            if name in has:
                monkeypatch.setattr(torch.cpu, name, lambda value=has[name]: value, raising=False)
        args = train.parse([method, "--device", "cpu"])
        train.settle_hardware(args)
        assert torch.backends.cudnn.benchmark and torch.backends.cudnn.allow_tf32 == (method != "dfm")
        assert args.device == torch.device("cpu")
        return args.precision

    assert settled("draem") == "fp32" and settled("draem", _is_amx_tile_supported=False) == "fp32"
    assert settled("dsr", _is_amx_tile_supported=True) == settled("draem", _is_avx512_bf16_supported=True) == "bf16"
    assert settled("dfm", _is_amx_tile_supported=True) == "fp32"  # its likelihood would show bfloat16's rounding


@pytest.mark.parametrize("given, index", [("cuda", 3), ("cuda:2", 2)])
def test_a_process_takes_the_gpu_of_its_number(given, index, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setenv("LOCAL_RANK", "3")
    args = train.parse(["draem", "--device", given])
    train.settle_hardware(args)
    assert chosen == [args.device] == [torch.device("cuda", index)] and args.precision == "fp32"


@pytest.mark.parametrize("options, reading, middle", [
    ((), {"size": 32, "antialias": False, "bits": 16}, 4),  # 255 * 1023 / 65535
    (("--bits", 10), {"size": 32, "antialias": False, "bits": 10}, 255),
    (("--bits", 10, "--antialias"), {"size": 32, "antialias": True, "bits": 10}, 85)])  # a third of each pixel is white
def test_images_are_read_as_the_options_say_then_and_later(options, reading, middle, command, fed, monkeypatch):
    """Every third column is 1023, the white of a 10-bit camera, in the middle of an output pixel."""
    stripes = np.zeros((96, 96), np.uint16)
    stripes[:, 1::3] = 1023
    for part in ("train/good", "test/good", "test/cut"):
        Path("grey", part).mkdir(parents=True)
        Image.fromarray(stripes).save(f"grey/{part}/0.png")
    shown = []
    predict = draem.DraemModel.predict
    monkeypatch.setattr(draem.DraemModel, "predict", lambda self, image: shown.append(image) or predict(self, image))
    assert command(*DRAEM, *options, "--data", "grey", "--steps", 1)[0] == 0
    last = "runs/draem/grey/last.pt"
    assert torch.load(last, weights_only=True)["reading"] == reading == draem.load(last).reading
    for argv in (["--data", "grey"], ["--predict", "grey/test/cut/0.png"]):
        assert command("draem", "--checkpoint", last, *argv, "--device", "cpu", "--precision", "fp32")[0] == 0
    assert [len(image) for image in shown] == [2, 2, 1]
    for image in (fed[0][1][0], *shown):
        assert (255 * image[:, :, 4:-4, 4:-4]).round().unique().tolist() == [middle]
    assert command("draem", "--checkpoint", last, "--predict", "grey/test", "--device", "cpu", "--bits", 10,
                   "--no-antialias", "--size", 96)[0] == 0  # options override the checkpoint
    assert shown[-1].shape == (2, 3, 96, 96) and shown[-1].unique().tolist() == [0, 1]


@pytest.mark.parametrize("argv", [[*DRAEM, "--steps", "1"], [*DSR, "--pretrain", "DATA/train"], DFM],
                         ids=["draem", "dsr", "dfm"])
def test_compile_takes_the_networks(argv, data, command, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    argv = [arg.replace("DATA", str(data)) for arg in (*argv, "--data", "DATA")]
    assert command(*argv, "--out", "plain")[0] == 0 and not compiled
    assert command(*argv, "--compile")[0] == 0 and len(compiled) == len(set(compiled)) > 0
    same_run(Path("plain", argv[0], "weave"), Path("runs", argv[0], "weave"))


def test_steps_that_are_not_logged_copy_nothing_to_the_host(data, command, monkeypatch):
    copies, marks = [0], []

    def watch(name, inner):
        def call(self, *given, **more):
            copies[0] += 1
            return inner(self, *given, **more)
        monkeypatch.setattr(torch.Tensor, name, call)

    for name in ("item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
        watch(name, getattr(torch.Tensor, name))
    before_each_step(monkeypatch, lambda *_: marks.append(copies[0]))
    for argv, stages in (([*DRAEM, "--steps", 5], 1),
                         ([*DSR, "--pretrain", data / "train", "--pretrain-steps", 5, "--steps", 5,
                           "--upsampling-steps", 5], 3)):
        marks.clear()
        assert command(*argv, "--data", data)[0] == 0 and len(marks) == 5 * stages
        for first in range(0, 5 * stages, 5):
            assert marks[first + 1] > marks[first]  # the first step is logged
            assert marks[first + 1] == marks[first + 4]  # steps 2, 3 and 4 are not


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_on_a_gpu_never_waits_for_it(data, command, monkeypatch):
    inner = train.training_step

    def step(*given):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return inner(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    monkeypatch.setattr(train, "training_step", step)
    for argv in ([*DRAEM, "--steps", 4, "--textures", data / "test"], [*DSR, "--pretrain", data / "train"]):
        assert command(*argv, "--data", data, "--device", "cuda", "--precision", "auto")[0] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Textures, the toy product


@pytest.mark.parametrize("folder", ["dtd/images", "dtd", "mvtec/dtd", "products/dtd/images"])
def test_textures_are_found_beside_the_data(folder, command, fed):
    draw_data("products/mvtec/weave", defects=(), good=0)
    place = Path(folder if folder.startswith(("dtd", "products")) else f"products/{folder}")
    (place / "banded").mkdir(parents=True)
    Image.new("RGB", (40, 40), "magenta").save(place / "banded" / "1.png")
    argv = [*DRAEM, "--data", "products/mvtec/weave", "--steps", 1]
    status, out, _ = command(*argv)
    said = [line for line in out.splitlines() if line.startswith("textures: ")]
    assert status == 0 and len(said) == 1 and f"{place}, found there" in said[0]
    assert (fed[0][1][1] == torch.tensor([1.0, 0, 1]).view(1, 3, 1, 1)).all()
    status, out, _ = command(*argv, "--out", "given", "--textures", "products/mvtec/weave/train")
    assert status == 0 and "textures:" not in out and fed[1][1][1].unique().numel() > 9


def test_without_textures_noise_stands_in_and_it_is_said(data, command, fed):
    status, out, _ = command(*DRAEM, "--data", data, "--steps", 1)
    assert status == 0 and "coloured noise" in out and "robots.ox.ac.uk" in out and fed[0][1][1] is None


@pytest.mark.parametrize("method", train.METHODS)
def test_the_toy_product_takes_its_own_settings(method, command, fed, monkeypatch):
    """The toy is drawn into data/toy. The command line overrides its settings."""
    drawn = []
    monkeypatch.setattr(common, "make_toy", lambda folder: drawn.append(folder) or draw_data(folder))
    Path("dtd").mkdir()  # the toy ignores textures
    small = {"draem": dict(size=32, width=4, steps=3), "dfm": train.TOY["dfm"],
             "dsr": dict(size=64, hiddens=8, codes=32, width=4, lr=1e-3, pretrain_steps=2, pretrain_batch=64, steps=1,
                         upsampling_steps=1)}[method]
    monkeypatch.setitem(train.TOY, method, small)
    status, out, err = command(method, "--device", "cpu", "--precision", "fp32", "--batch", 2)
    assert status == 0 and not err and drawn == ["data/toy"]
    settings = metrics_of(f"runs/{method}/toy")["settings"]
    assert settings.items() >= {name: value for name, value in small.items() if "pretrain" not in name}.items()
    assert settings["batch"] == 2 and set(COLUMNS) <= set(metrics_of(f"runs/{method}/toy"))
    if method == "dfm":
        assert "random weights" in out
    if method == "draem":
        assert len(fed) == 3 and fed[0][1][1] is None
        command("draem", "--device", "cpu", "--steps", 2, "--out", "given")
        assert len(fed) == 5
    if method == "dsr":  # stage 1 takes the training images, and four of each with anomalies
        images = torch.cat([given[0] for _, given in fed[:2]])
        kinds = images.flatten(1).unique(dim=0)
        normal = torch.stack([common.read_image(path, 64) for path in sorted(Path("data/toy/train/good").iterdir())])
        plain = [any(torch.equal(kind, image.flatten() / 255) for image in normal) for kind in kinds]
        assert plain.count(True) == 4 and 12 <= plain.count(False) <= 16  # a mask may be empty
        same = (kinds[:, None] - normal.flatten(1)[None] / 255).abs() < 0.003
        assert (same.float().mean(2).amax(1) > 0.4).all()  # each is one of them, changed in part


# ---------------------------------------------------------------------------------------------------------------------
# DSR and DFM


def test_a_codebook_is_made_once_and_found_again(data, command):
    argv = [*DSR, "--data", data, "--pretrain", data / "train"]
    status, out, _ = command(*argv)
    made = files_in("runs/dsr/codebook-train")
    assert status == 0 and set(made) == {"last.pt", "log.jsonl", "reconstructions.png"}
    used = [float(number) for number in re.search(r"codes in even use, of 32: lo (\d+), hi (\d+)", out).groups()]
    assert all(1 <= number <= 32 for number in used)
    with Image.open("runs/dsr/codebook-train/reconstructions.png") as page:  # four strips, twice as large
        assert page.height == 28 + 4 * (128 + 8)
    shutil.move("runs/dsr/weave", "first")
    status, out, _ = command(*argv)
    assert status == 0 and "stage 1 was done before" in out and files_in("runs/dsr/codebook-train") == made
    same_run("first", "runs/dsr/weave")
    assert command(*DSR, "--data", data, "--codebook", "runs/dsr/codebook-train/last.pt", "--out", "given")[0] == 0
    same_run("given/dsr/weave", "runs/dsr/weave")


def test_stage_1_is_one_processs_work(data, command, mistake, monkeypatch):
    argv = [*DSR, "--data", data, "--pretrain", data / "train"]
    monkeypatch.setattr(train, "WORLD", 2)
    line = mistake(*argv)
    assert "run it first: python train.py dsr --pretrain" in line and not Path("runs").exists()
    monkeypatch.setattr(train, "WORLD", 1)
    assert command(*argv)[0] == 0
    shutil.rmtree("runs/dsr/weave")
    monkeypatch.setattr(train, "WORLD", 2)
    assert command(*argv)[0] == 0 and Path("runs/dsr/weave/metrics.json").exists()


def test_images_that_memory_does_not_hold_train_the_same_codebook(data, command, monkeypatch):
    """The images are read again in every step, also after a resume in the middle."""
    argv = [*DSR, "--data", data, "--pretrain", data / "train", "--save-minutes", 0]
    assert command(*argv, "--out", "resident")[0] == 0
    monkeypatch.setattr(train, "RESIDENT", 4 * 3 * 64 * 64 - 1)
    monkeypatch.setattr(train, "resident", None)  # must not be called

    def act(count, *_):
        if count == 3:
            raise Killed
    with monkeypatch.context() as patch, pytest.raises(Killed):
        before_each_step(patch, act)
        command(*argv, "--out", "streamed")
    with pytest.raises(TypeError):  # stage 2 does call it
        command(*argv, "--out", "streamed", "--resume")
    same_run("streamed/dsr/codebook-train", "resident/dsr/codebook-train")


def test_dfm_by_likelihood_has_no_maps(data, command):
    status, out, _ = command(*DFM, "--data", data, "--score", "nll")
    assert status == 0 and "no maps" in out and table_of(out)["weave"][4:] == [None] * 4
    assert set(files_in("runs/dfm/weave")) == {"last.pt", "metrics.json", "scores.csv"}
    assert not PIXEL & set(metrics_of("runs/dfm/weave"))
    last = "runs/dfm/weave/last.pt"
    status, out, _ = command("dfm", "--checkpoint", last, "--predict", data / "test/hole", "--device", "cpu")
    assert status == 0 and len(out.splitlines()) == 2 and not Path("runs/dfm/predictions").exists()


def test_dfm_joint_is_one_class_conditional_model(command):
    for seed, name in enumerate("ab"):
        draw_data(f"parent/{name}", seed, train=3 + seed)
    status, out, _ = command(*DFM, "--data", "parent", "--joint")
    assert status == 0 and list(table_of(out)) == ["a", "b", "mean"]
    model = dfm.load("runs/dfm/joint/last.pt")
    means = [torch.stack([common.read_image(path, 64) for path in sorted(Path(f"parent/{name}/train/good").iterdir())])
             for name in "ab"]
    for pca, images in zip(model.pca, means, strict=True):  # each is fitted to a category of its own
        torch.testing.assert_close(pca.mean, model.features(images / 255).double().mean(0), rtol=1e-4, atol=1e-4)
    for name in "ab":
        rows = scores_of(f"runs/dfm/joint/{name}")
        images = torch.stack([common.read_image(path, 64) for path, *_ in rows])
        assert [score for *_, score in rows] == pytest.approx(model.predict(images / 255)["score"].tolist(), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and prediction


def test_a_checkpoint_is_evaluated_where_there_is_a_test_set_alone(trained, data, command):
    shutil.copytree(data, "alone/weave")
    shutil.rmtree("alone/weave/train")
    status, out, err = command("draem", "--checkpoint", trained / "last.pt", "--data", "alone/weave", "--batch", 6,
                               "--precision", "fp32", "--device", "cpu")
    assert status == 0 and "32 x 32" in err and set(os.listdir("runs/draem")) == {"weave-checkpoint"}
    found, before = metrics_of("runs/draem/weave-checkpoint"), metrics_of(trained)
    assert all(found[name] == before[name] for name in COLUMNS)
    assert [row[1:] for row in scores_of("runs/draem/weave-checkpoint")] == [row[1:] for row in scores_of(trained)]
    assert found["settings"].items() >= {"size": 32, "checkpoint": str(trained / "last.pt")}.items()


def test_predict_takes_files_folders_patterns_and_names_what_it_cannot_read(trained, data, command, monkeypatch):
    """Pictures keep the subfolders below a given folder. A second picture of one name gets a + at its end."""
    whole = (data / "test/hole/000.png").read_bytes()
    for name in ("photos/a.png", "photos/more [1]/a.png", "photos/more [1]/b.png", "other/a.png", "home/c.png",
                 "x1.png", "x2.png", "[1].png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(whole)
    Path("photos/more [1]/half.png").write_bytes(whole[:len(whole) // 2])
    Path("photos/text.png").write_text("no image")
    with Image.open("photos/a.png") as image:
        image.save("photos/a.jpg")
    monkeypatch.setenv("HOME", str(Path("home").resolve()))
    argv = ["draem", "--checkpoint", trained / "last.pt", "--precision", "fp32", "--device", "cpu", "--predict"]
    status, out, err = command(*argv, data / "test/good/001.png", "photos", "other/a.png", "x*.png", "[1].png",
                               "~/c.png", "--batch", 2)
    lines = [line for line in err.splitlines() if line.startswith("train.py: ")]
    assert status == 2 and len(lines) == 2 and "photos/more [1]/half.png" in lines[0] and "photos/text.png" in lines[1]
    rows = [line.rsplit(" ", 1) for line in out.splitlines()]
    assert [path for path, _ in rows] == [
        str(data / "test/good/001.png"), "photos/a.jpg", "photos/a.png", "photos/more [1]/a.png",
        "photos/more [1]/b.png", "other/a.png", "x1.png", "x2.png", "[1].png", str(Path("home/c.png").resolve())]
    model = draem.load(trained / "last.pt")
    images = torch.stack([common.read_image(path, 32) for path, _ in rows])
    assert [float(score) for _, score in rows] == pytest.approx(model.predict(images / 255)["score"].tolist(), abs=2e-6)
    assert set(files_in("runs/draem/predictions")) == {
        "001.png", "a.jpg.png", "a.png", "more [1]/a.png", "more [1]/b.png", "a+.png", "x1.png", "x2.png", "[1].png",
        "c.png"}
    with Image.open("runs/draem/predictions/001.png") as strip:  # image, reconstruction, map: there is no truth
        assert strip.size == (3 * 32 + 2 * 4, 32)
    assert command(*argv, data / "test/good/001.png")[:2] == (0, out.splitlines(True)[0])
    assert not list(Path("runs").rglob("*.tiff"))


def test_what_cannot_be_evaluated_is_said_and_left_out(data, command, monkeypatch):
    """Unreadable images and empty or missing masks are left out; the status is 2. Images may share a stem."""
    shutil.copytree(data, "odd")
    Path("odd/test/good/bad.png").write_bytes(b"x")
    with Image.open("odd/test/good/000.png") as image:
        image.save("odd/test/good/000.jpg")
    Image.new("L", (64, 48)).save("odd/ground_truth/hole/001_mask.png")
    Path("odd/ground_truth/dirt/000_mask.png").unlink()
    inner, given = common.ranking_metrics, []
    monkeypatch.setattr(common, "ranking_metrics", lambda *a: given.append(a) or inner(*a))
    status, out, err = command(*DFM, "--data", "odd", "--save-maps")
    assert status == 2 and len(err.splitlines()) == 2
    assert "train.py: odd/test/good/bad.png: cannot be read" in err
    assert "an empty mask, in its file, left out of the pixel metrics" in err and "odd/test/hole/001.png" in err
    assert "1 defective images without a mask" in out
    shown = ["good/000.jpg", "good/000.png", "good/001.png", "hole/000.png", "hole/001.png", "dirt/000.png",
             "dirt/001.png"]
    assert {str(path.relative_to("odd/test")) for path, *_ in scores_of("runs/dfm/odd")} == set(shown)
    assert {name for name in files_in("runs/dfm/odd") if name.startswith("maps/")} == {
        "maps/good/000.jpg.png", *(f"maps/{name}" for name in shown if name.endswith("png"))}
    assert len(list(Path("runs/dfm/anomaly_maps/odd/test").rglob("*.tiff"))) == 7
    with Image.open("runs/dfm/odd/maps/hole/001.png") as strip:  # image and map: no reconstruction, no truth
        assert strip.size == (2 * 64 + 4, 64)
    (scores, labels), (maps, regions) = given
    assert len(scores) == 7 and labels.sum() == 4
    assert len(maps) == 5 * 64 * 64 and sorted(set(regions)) == [0, 1, 2, 3]  # three good, hole 0, dirt 1
    found = metrics_of("runs/dfm/odd")
    auroc, ap, f1, threshold = brute_force(scores, labels)
    assert [found[f"image_{name}"] for name in ("auroc", "ap", "f1")] == pytest.approx([auroc, ap, f1])
    assert found["image_threshold"] == threshold


def test_metrics_need_both_kinds(data, command):
    cases = {"fine": (dict(defects=()), "no defective images", set()),
             "bad": (dict(good=0), "no normal images", PIXEL),
             "bare": (dict(masks=False), "4 defective images without a mask", set(COLUMNS) - PIXEL)}
    for name, (kind, words, columns) in cases.items():
        draw_data(name, **kind)
        status, out, _ = command(*DFM, "--data", name)
        assert status == 0 and words in out and set(metrics_of(f"runs/dfm/{name}")) & set(COLUMNS) == columns
    status, out, _ = command(*DFM, "--data", data / "train/good")  # a plain folder of images
    assert status == 0 and "nothing was evaluated" in out and "image auroc" not in out
    assert Path("runs/dfm/good/last.pt").exists() and not set(COLUMNS) & set(metrics_of("runs/dfm/good"))


def test_a_bad_category_does_not_stop_the_others(command):
    for name in "abc":
        draw_data(f"parent/{name}")
    Path("parent/b/train/good/001.png").write_bytes(b"")
    status, out, err = command(*DFM, "--data", "parent")
    assert status == 2 and list(table_of(out)) == ["a", "c", "mean"]
    assert err.count("\n") == 1 and err.startswith("train.py: b: parent/b/train/good/001.png: ")
    assert not Path("runs/dfm/b/last.pt").exists()


def test_a_process_of_its_own(data):
    """Rank 1 of 2, as a launcher starts it. The console cannot encode the file names."""
    for name in ("a", "\u00e9"):
        draw_data(f"parent/{name}")
    Path("parent/\u00e9/test/good/\u00fc.png").write_text("no image")
    environment = os.environ | {"RANK": "1", "WORLD_SIZE": "2", "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, ROOT / "train.py", *DFM, "--data", "parent"], capture_output=True,
                          env=environment, timeout=120)
    assert done.returncode == 2 and rb"\xe9/test/good/\xfc.png: cannot be read" in done.stderr
    assert rb"\xe9: DFM, resnet18 layer1" in done.stdout and len(done.stderr.splitlines()) == 1
    assert os.listdir("runs/dfm") == ["\u00e9"]


def test_progress_on_a_terminal_is_one_line_that_changes(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    train.show("train", 1, 3, {"l2": 0.25}, 1e-4, 1800)
    train.show("train", 3, 3, {"l2": 0.125}, 1e-5, 0.01234)
    assert capsys.readouterr().out == ("\r\033[Ktrain 1/3  l2 0.2500  lr 1e-04  1.8e+03 s/step  1:00:00 left"
                                       "\r\033[Ktrain 3/3  l2 0.1250  lr 1e-05  0.0123 s/step  0:00:00 left\n")
    monkeypatch.setattr(train, "WORLD", 2)
    train.show("train", 1, 3, {"l2": 0.25}, 1e-4, 1)
    assert capsys.readouterr().out == "train 1/3  l2 0.2500  lr 1e-04  1 s/step  0:00:02 left\n"


@pytest.mark.parametrize("argv", [DRAEM, DSR, [*DSR, "--codebook", "BOOK"], DFM], ids=["draem", "dsr", "book", "dfm"])
def test_bench(argv, data, command, monkeypatch):
    """Medians leave out three warm-up calls. By this clock call n takes (n modulo 7)^2 milliseconds.

    Calls 1 to 6 are steps; 4, 5 and 6 take 16, 25 and 36 ms. Calls 7 to 12 are predictions; 10, 11 and 12 take 9, 16
    and 25 ms."""
    argv = [arg.replace("BOOK", "book.pt") for arg in argv]
    if "book.pt" in argv:
        latent = dsr.DiscreteLatentModel(8, residual_hiddens=4, codes=32, code_length=8)
        torch.save({"method": "dsr-codebook", "settings": latent.settings, "reading": {}, "model": latent.state_dict()},
                   "book.pt")
    ticks = itertools.accumulate(step for n in itertools.count(1) for step in (0, (n % 7) ** 2 / 1000))
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=time.monotonic, perf_counter=lambda: next(ticks)))
    status, out, _ = command(*argv, "--data", data, "--bench", 3)
    figures = json.loads(out.splitlines()[-1])
    assert status == 0 and figures == {
        "method": argv[0], "device": "cpu", "precision": "fp32", "size": int(argv[2]),
        "batch": int(argv[argv.index("--batch") + 1]), "train_ms": 25, "predict_ms": 16}
    assert not Path("runs").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes

MISTAKES = {  # arguments: pattern of the line; words in capitals are replaced
    "": "required",
    "yolo": "invalid choice: 'yolo'",
    "DRAEM --fast": "--fast",
    "DRAEM --data nowhere": "nowhere: no such folder",
    "DRAEM --data file": "file: is not a folder",
    "DRAEM --data empty": "empty: holds no images",
    "DRAEM --data DATA/test": "defects or masks among them",
    "DRAEM --data text": "text/train/good/002.png",
    "DRAEM --data DATA --textures empty": "empty: holds no images",
    "DRAEM --size 100": "--size: 100 .*96 and 128",
    "DRAEM --size 0": "--size: '0' is not a whole number from 32 to 4096",
    "DRAEM --size x": "--size: 'x' is not a whole number",
    "DRAEM --batch 1": "--batch: 1 .*--size 64",
    "DRAEM --steps 1.5": "--steps: '1.5'",
    "DRAEM --lr 0": "--lr: '0' is not a number above 0 up to 1",
    "DRAEM --lr nan": "--lr: 'nan'",
    "DRAEM --beta 0.9 0.1": "--beta: 0.9 0.1 is reversed",
    "DRAEM --rotate 181": "--rotate: '181'",
    "DSR --size 32": "--size: 32 .*64",
    "DSR --codes 20": "--codes: '20'",
    "DSR --codebook a --pretrain b": "--pretrain: .*--codebook",
    "DSR --data DATA --codebook foreign.pt": "foreign.pt",
    "DSR --data DATA --pretrain empty": "empty: holds no images",
    "DFM --variance 1.5": "--variance: '1.5'",
    "DFM --variance 0": "--variance: '0'",
    "DFM --data DATA --pooling 64": "pooling",
    "DFM --data DATA --weights nowhere.pth": "nowhere.pth: No such file",
    "DRAEM --data DATA --device cuda": "--device cuda: cannot be used .*--device cpu",
    "DRAEM --data DATA --device gpu": "--device gpu: .*--device cpu",
    "DRAEM --data DATA --device meta": "--device meta: .*--device cpu",
    "DRAEM --data DATA --steps 1 --out file": "file",
    "draem --predict DATA": "--predict: needs --checkpoint",
    "draem --checkpoint LAST": "--checkpoint: needs --data",
    "draem --checkpoint nowhere.pt --data DATA": "nowhere.pt: No such file",
    "draem --checkpoint half.pt --data DATA": "half.pt: truncated",
    "draem --checkpoint foreign.pt --data DATA": "foreign.pt: neither",
    "dfm --checkpoint LAST --data DATA": "last.pt: .*draem",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line(words, data, trained, mistake):
    if words.endswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is one")
    Path("empty").mkdir()
    Path("file").write_text("x")
    draw_data("text")
    Path("text/train/good/002.png").write_text("no image")
    last = (trained / "last.pt").read_bytes()
    Path("half.pt").write_bytes(last[:len(last) // 2])
    torch.save({"weights": torch.zeros(3)}, "foreign.pt")
    before, argv = set(files_in(".")), []
    for word in words.split():
        word = word.replace("DATA", str(data)).replace("LAST", str(trained / "last.pt"))
        argv += {"DRAEM": DRAEM, "DSR": DSR, "DFM": DFM}.get(word, [word])
    line = mistake(*argv)
    assert re.search(MISTAKES[words], line), line
    assert set(files_in(".")) == before


def test_several_processes_do_categories_and_nothing_else(trained, data, mistake, monkeypatch):
    monkeypatch.setattr(train, "WORLD", 2)
    for argv in ([*DFM, "--data", data, "--joint"], [*DRAEM, "--data", data, "--bench", 1],
                 ["draem", "--checkpoint", trained / "last.pt", "--predict", data]):
        assert "without torchrun" in mistake(*argv)


def test_resume_from_a_checkpoint_that_is_none(data, mistake):
    last, argv = Path("runs/draem/weave/last.pt"), [*DRAEM, "--data", data, "--steps", 2, "--resume"]
    last.parent.mkdir(parents=True)
    for content, words in (({"model": {}}, "not a checkpoint to go on from"), ([1], "a dict of tensors")):
        torch.save(content, last)
        before = last.read_bytes()
        assert words in mistake(*argv) and last.read_bytes() == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("[enforce fail] write\nat")])
def test_a_full_disk_leaves_the_checkpoint_before(error, data, command, mistake, monkeypatch):
    argv, last = [*DRAEM, "--data", data, "--steps", 3, "--save-minutes", 0], Path("runs/draem/weave/last.pt")

    def save(content, file, inner=torch.save):
        if content["step"] < 3:
            return inner(content, file)
        file.write(b"half")
        raise error
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        line = mistake(*argv)
    assert f"{last}: cannot be written" in line and "--out" in line
    assert "No space left" in line or "enforce fail" in line
    assert torch.load(last, weights_only=True)["step"] == 2 and not list(Path("runs").rglob("*.tmp"))
    assert command(*argv, "--resume")[0] == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_at_a_line_of_the_log(data, mistake, monkeypatch):
    def act(*_):
        Path("runs/draem/weave").mkdir(parents=True)
        Path("runs/draem/weave/log.jsonl").symlink_to("/dev/full")
    before_each_step(monkeypatch, act)
    assert "No space left on device" in mistake(*DRAEM, "--data", data, "--steps", 2)


def test_memory_that_is_not_there(data, mistake, monkeypatch):
    """If the images do not fit, the message names them."""
    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        assert "weave: 4 images of 32 x 32 need 0.0 GiB of memory on cpu" in mistake(*DRAEM, "--data", data)
        args = SimpleNamespace(size=256, device="cuda:1")
        with pytest.raises(train.UserError, match="textures: 1000000 images of 256 x 256 need 183.1 GiB .* on cuda:1"):
            train.resident([Path("x.png")] * 10 ** 6, "textures", args)  # 10^6 * 3 * 256^2 / 2^30
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")):
        def step(*_, error=error):
            raise error
        monkeypatch.setattr(train, "training_step", step)
        assert "out of memory beside the resident images" in mistake(*DRAEM, "--data", data)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(value, data, mistake, monkeypatch):
    inner, count = train.training_step, itertools.count(1)

    def step(*given):
        terms = inner(*given)
        return terms | {"ssim": terms["ssim"] * value} if next(count) == 3 else terms
    monkeypatch.setattr(train, "training_step", step)
    line = mistake(*DRAEM, "--data", data, "--steps", 9, "--save-minutes", 0)
    assert "step 3: the loss is not finite" in line and f"'ssim': {value}" in line and "runs/draem/weave" in line
    assert torch.load("runs/draem/weave/last.pt", weights_only=True)["step"] == 2


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("shapes differ"), ValueError("math domain error")])
def test_a_fault_of_the_program_shows_its_traceback(error, data, command, monkeypatch):
    def broken(*_):
        raise error
    monkeypatch.setattr(train, "training_step", broken)
    with pytest.raises(type(error)):
        command(*DRAEM, "--data", data)
