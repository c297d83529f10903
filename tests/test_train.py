"""Tests of train.py: the command, run as a user runs it, on fourteen small pictures.

Oracles: for weights and logs, a loop written here from the model's file alone; for stopped, killed and shared runs, an
undisturbed one, bit for bit; for defaults and rates, the papers' numbers as literals; for metrics, pairs of images and
what the saved model predicts; for mistakes, the words of their one line.
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
from torch.optim.optimizer import register_optimizer_step_post_hook

import common
import dfm
import draem
import dsr
import train

SCRIPT = Path(train.__file__).resolve()
CPU = "--precision fp32 --device cpu".split()
DRAEM = [*"draem --size 32 --width 4 --batch 2".split(), *CPU]
DSR = [*"dsr --size 64 --width 4 --hiddens 4 --codes 21 --batch 2 --pretrain-batch 3 --pretrain-steps 3 --steps 5 "
       "--upsampling-steps 2".split(), *CPU]
DFM = [*"dfm --size 64 --backbone resnet18 --pooling 2 --weights random --batch 4".split(), *CPU]
COLUMNS = ["image_auroc", "image_ap", "image_f1", "pixel_auroc", "pixel_ap", "pixel_f1", "pixel_aupro"]
NAMES = [f"{kind}/{i:03d}.png" for kind in ("dirt", "good", "hole") for i in range(3)]  # of the test images
unix = pytest.mark.skipif(sys.platform == "win32", reason="has no such signals")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def draw_data(folder, seed=0, train=5, good=3, defects=("dirt", "hole"), masks=True):
    """A category in MVTec's layout: a shaded weave, 64 wide and 48 high, with white dirt or black holes."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:48, :64]
    weave = np.dstack((3 * x, 4 * y, 100 + 30 * np.sin(x / 3 + y / 5)))
    for part, count in (("train/good", train), ("test/good", good), *((f"test/{name}", 3) for name in defects)):
        for i in range(count):
            picture = np.uint8(weave + rng.integers(0, 20, weave.shape))
            spot = np.hypot(x - 20 - 9 * i, y - 16) < (0 if "good" in part else 6 + i)
            picture[spot] = 255 if "dirt" in part else 0
            files = {Path(folder, part, f"{i:03d}.png"): picture}
            if masks and spot.any():
                files[Path(folder, part.replace("test", "ground_truth"), f"{i:03d}_mask.png")] = spot
            for path, array in files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    return Path(folder)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw_data(tmp_path_factory.mktemp("data") / "weave")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run folder of DRAEM; the tests only read it."""
    out = tmp_path_factory.mktemp("trained")
    assert train.main([*DRAEM, "--data", str(data), "--steps", "8", "--lr", "5e-3", "--out", str(out)]) == 0
    return out / "draem" / "weave"


@pytest.fixture(autouse=True)
def as_it_was(tmp_path, monkeypatch):
    """An empty working folder. Signals and cuDNN's switches are put back."""
    monkeypatch.chdir(tmp_path)
    for name in ("benchmark", "allow_tf32"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def command(capsys):
    """command(*argv) -> exit status, stdout, stderr."""
    def run(*argv):
        capsys.readouterr()
        try:
            status = train.main([str(arg) for arg in argv])
        except SystemExit as left:
            status = left.code
        return status, *capsys.readouterr()
    return run


@pytest.fixture
def mistake(command):
    """mistake(*argv) -> the message of a command that a user can mend."""
    def run(*argv):
        try:
            status, _, err = command(*argv)
        except (ValueError, OSError) as error:
            return str(error)
        assert status == 2 and re.fullmatch(r"train\.py.*: error: .*\n", err), err
        return err.partition(": error: ")[2]
    return run


@pytest.fixture
def after_step():
    """after_step(act) calls act(count, optimizer) after every training step; count starts at 1."""
    handles = []

    def register(act):
        count = itertools.count(1)
        handles.append(register_optimizer_step_post_hook(lambda optimizer, *_: act(next(count), optimizer)))
    yield register
    for handle in handles:
        handle.remove()


@pytest.fixture
def pages(monkeypatch):
    """A list of the rows of every picture that is drawn."""
    drawn, inner = [], common.page
    monkeypatch.setattr(common, "page", lambda rows: drawn.append(rows) or inner(rows))
    return drawn


def die(*_, **__):
    sys.exit("killed")


def metrics_of(folder):
    return json.loads(Path(folder, "metrics.json").read_text())


def log_of(folder):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def rows_of(folder):
    with open(Path(folder, "scores.csv"), newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table_of(out):
    """The printed table as {name: figures}; a dash is None."""
    lines = out[("\n" + out).index("\ncategory"):].splitlines()
    assert re.split(" {2,}", lines[0])[1:] == [column.replace("_", " ") for column in COLUMNS]
    return {line.split()[0]: [None if word == "-" else float(word) for word in line.split()[1:]] for line in lines[1:]}


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def saved(folder):
    return torch.load(Path(folder, "last.pt"), weights_only=True)


def as_bytes(value):
    if isinstance(value, dict):
        return {key: as_bytes(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_bytes(part) for part in value]
    return (value.dtype, value.shape, value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value


def same_runs(method, one, other):
    """Asserts that the run folders below two roots are bit-equal. last.tmp is what a kill may leave."""
    files = [files_in(Path(root, method)) for root in (one, other)]
    assert files[0].keys() == {name for name in files[1] if not name.endswith("last.tmp")}
    differ = [name for name, content in files[0].items() if content != files[1][name]]
    assert [name for name in differ if not name.endswith("last.pt")] == []
    for name in files[0]:
        if name.endswith("last.pt"):
            assert as_bytes(saved(Path(one, method, name).parent)) == as_bytes(saved(Path(other, method, name).parent))


def read_all(paths, size):
    return torch.stack([common.read_image(path, size) for path in sorted(paths)])


# --- The recipe -------------------------------------------------------------------------------------------------------

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
        if step in (0, len(rates) - 1):
            rows.append({"stage": stage, "step": step + 1, **{k: v.item() for k, v in terms.items()}, "lr": rate})
    return rows


def choose(images, count, generator):
    index = torch.randint(len(images), (count,), generator=generator)
    return (images[index].float() / 255).contiguous(memory_format=torch.channels_last)


def test_draem_is_trained_by_its_recipe(data, command):
    """Rates fall to a tenth after 4/7 and 6/7. Step n depends on (seed, stage, n) alone. simulated.png costs nothing."""
    argv = [*DRAEM, "--data", data, "--textures", data / "test", "--sspcab", "--rotate", 5, "--lr", 0.01, "--steps", 7]
    assert command(*argv, "--seed", 3)[0] == 0
    images, textures = read_all(data.glob("train/*/*"), 32), read_all(data.glob("test/*/*"), 32)
    torch.manual_seed(3)
    model = draem.DraemModel(4, True, rotate=5.0).train()
    rows = loop(model, model.parameters(), "train", [0.01] * 4 + [0.01 * 0.1] * 2 + [0.01 * 0.1 ** 2],
                lambda generator, _: (choose(images, 2, generator), choose(textures, 2, generator)))
    found = saved("runs/draem/weave")
    assert as_bytes(found["model"]) == as_bytes(model.state_dict()) and found["settings"] == model.settings
    assert log_of("runs/draem/weave") == rows == found["run"]["log"] and found["run"]["steps"] == {"train": 7}
    assert found["preprocessing"] == {"size": 32, "antialias": True, "bits": 16} and found["method"] == "draem"
    assert found["run"]["settings"] == {
        "method": "draem", "images": 5, "textures": 9, "size": 32, "antialias": True, "bits": 16, "batch": 2, "seed": 3,
        "precision": "fp32", "width": 4, "sspcab": True, "steps": 7, "lr": 0.01, "rotate": 5.0}


def test_dsr_is_trained_by_its_recipe(data, command):
    """Three stages. The rate falls to a tenth in stage 2 alone, after 4/5."""
    argv = [*DSR, "--data", data, "--pretrain", data / "test", "--rotate", 5, "--lr", 0.01, "--seed", 3]
    assert command(*argv)[0] == 0
    images, other = read_all(data.glob("train/*/*"), 64), read_all(data.glob("test/*/*"), 64)
    torch.manual_seed(3)
    latent = dsr.DiscreteLatentModel(4, residual_hiddens=2, codes=21, code_length=4).train()
    rows = loop(latent, latent.parameters(), "codebook", [0.01] * 3, lambda _, step: [
        choose(other, 3, torch.Generator().manual_seed(zlib.crc32(f"3 images {step}".encode())))])
    found = saved("runs/dsr/codebook-test")
    assert as_bytes(found["model"]) == as_bytes(latent.state_dict()) and found["settings"] == latent.settings
    assert log_of("runs/dsr/codebook-test") == rows and found["method"] == "dsr-codebook"
    torch.manual_seed(3)
    model, feed = dsr.DsrModel(latent, 4, rotate=5.0), lambda generator, _: [choose(images, 2, generator)]
    torch.manual_seed(3)
    model = dsr.DsrModel(dsr.load_codebook("runs/dsr/codebook-test/last.pt"), 4, rotate=5.0)
    rows = loop(model, model.begin(2), "detection", [0.01] * 4 + [0.01 * 0.1], feed)
    rows += loop(model, model.begin(3), "upsampling", [0.01] * 2, feed)
    found = saved("runs/dsr/weave")
    assert as_bytes(found["model"]) == as_bytes(model.state_dict()) and found["settings"] == model.settings
    assert log_of("runs/dsr/weave") == rows


def test_dfm_is_fitted_to_all_images_and_has_a_threshold(data, command):
    argv = [*DFM, "--data", data, "--layer", "layer2", "--pooling", 3, "--share", 0.5, "--seed", 3]
    status, out, _ = command(*argv)
    torch.manual_seed(3)
    model = dfm.DFMModel("resnet18", "layer2", False, 3, 0.5).eval()
    model.fit(model.features(read_all(data.glob("train/*/*"), 64) / 255))
    found = dfm.load("runs/dfm/weave/last.pt")
    assert status == 0 and found.settings == model.settings and found.preprocessing["size"] == 64
    assert f"{len(model.pca[0].components)} components of 512 values" in out
    score, limit = model.predict(read_all(data.glob("test/*/*"), 64) / 255)["score"], found.threshold.item()
    assert limit == pytest.approx(model.threshold.item(), rel=1e-4)
    assert [float(row["score"]) for row in rows_of("runs/dfm/weave")] == pytest.approx(score.tolist(), rel=1e-4)
    for kind, report in metrics_of("runs/dfm/weave")["kinds"].items():
        called = [float(row["score"]) >= limit for row in rows_of("runs/dfm/weave") if f"/{kind}/" in row["path"]]
        assert (report["threshold"], report["called_defective"]) == (limit, sum(called))
    status, out, _ = command("dfm", "--checkpoint", "runs/dfm/weave/last.pt", "--predict", data / "test", *CPU)
    rows = [line.split() for line in out.splitlines()]
    assert status == 0 and len(rows) == 9 and {row[2] for row in rows} == {"defective", "normal"}
    assert all((row[2] == "defective") == (float(row[1]) >= limit) for row in rows)


@pytest.mark.parametrize("argv, shown", [([*DRAEM, "--steps", 2], "augmented"), (DSR, "general")])
def test_simulated_png_shows_six_samples_before_the_first_step(argv, shown, data, command, pages, after_step):
    seen, stage_1 = [], 3 * (argv == DSR)
    after_step(lambda *_: seen.append((Path(f"runs/{argv[0]}/weave/simulated.png").exists(), len(pages))))
    assert command(*argv, *["--pretrain", data / "train"][:2 * (argv == DSR)], "--data", data, "--rotate", 0)[0] == 0
    assert set(seen[:stage_1]) <= {(False, 0)} and set(seen[stage_1:]) == {(True, 1)}
    images = read_all(data.glob("train/*/*"), int(argv[2])).permute(0, 2, 3, 1).numpy()
    assert len(pages[0]) == 6 and all(list(row) == ["image", shown, "mask"] for _, row in pages[0])
    assert all((row["image"] == images).all((1, 2, 3)).any() for _, row in pages[0])
    assert sum(row["mask"].any() for _, row in pages[0]) >= 3  # none is normal, though noise may stay below 0.5


# --- Stopped, killed, resumed -----------------------------------------------------------------------------------------

def in_a_process_of_its_own(argv):
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.exit(train.main(argv))


@unix
@pytest.mark.parametrize("argv, stops", [([*DRAEM, "--steps", "9", "--sspcab"], (2, 3, 9)), (DSR, (2, 5, 8, 9))],
                         ids=["draem", "dsr"])
def test_signals_and_kills_leave_no_trace_in_the_result(argv, stops, data, command, monkeypatch, after_step):
    """SIGINT and SIGTERM wait for the step's end and save. Runs also die in a step, in writing, before a rename."""
    method, signals = argv[0], (signal.SIGINT, signal.SIGTERM)
    lengths = {"train": 9, "codebook": 3, "detection": 5, "upsampling": 2}
    argv = [*argv, "--data", str(data)] + ["--pretrain", str(data / "train")] * (argv == DSR)
    began = time.monotonic()
    assert command(*argv, "--out", "whole")[0] == 0
    lasted, counts = time.monotonic() - began, []

    def act(count, _):
        counts.append(count)
        if count in stops:
            os.kill(os.getpid(), signals[count % 2])
    after_step(act)
    for stop in stops:
        status, _, err = command(*argv, "--resume")
        assert status == 128 + signals[stop % 2] and counts[-1] == stop and "--resume goes on" in err
        run = saved(max(Path("runs", method).iterdir()))["run"]
        stage, steps = list(run["steps"].items())[-1]
        assert (run["optimizer"] is None) == (steps == lengths[stage]) and f"stopped after step {steps};" in err
    status, out, _ = command(*argv, "--resume")
    assert status == 0 and counts == list(range(1, counts[-1] + 1)) and counts[-1] in (9, 10)
    same_runs(method, "whole", "runs")
    argv += ["--resume", "--save-minutes", "0"]

    def half(content, path, inner=torch.save):
        whole = io.BytesIO()
        inner(content, whole)
        Path(path).write_bytes(whole.getvalue()[:999])
        die()
    for moment, (place, name, fault) in zip((3, 5, 7), ((os, "replace", die), (torch, "save", half), (zlib, "crc32", die))):
        with monkeypatch.context() as patch:
            inner, count = getattr(place, name), itertools.count(1)
            patch.setattr(place, name, lambda *given: (fault if next(count) == moment else inner)(*given))
            assert command(*argv, "--out", "cut")[0] == "killed"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(SCRIPT.parent), str(Path(__file__).parent))))
    server = multiprocessing.get_context("forkserver")  # forks processes that have imported everything
    server.set_forkserver_preload(["test_train", "torch._dynamo"])  # optimizers import the latter, slowly
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        child, moment = server.Process(target=in_a_process_of_its_own, args=([*argv, "--out", "killed"],)), random.random()
        print(number, moment)  # pytest shows it where this fails
        child.start()
        child.join(moment * lasted)
        if child.is_alive():
            os.kill(child.pid, number)
        child.join()
    for out in ("cut", "killed"):
        assert command(*argv, "--out", out)[0] == 0
        same_runs(method, "whole", out)


def test_log_checkpoints_and_the_time_left(data, command, monkeypatch, after_step):
    """A step takes 40 s here: 2 minutes are over after every fourth. Steps that are not logged or saved copy nothing."""
    now, marks, saves, copies = [1000], [], [], itertools.count()

    def act(count, _):
        now[0] += 40
        marks.append(next(copies))
    after_step(act)
    monkeypatch.setattr(draem.DraemModel, "losses", lambda model, *_: {"l2": next(model.parameters()).square().mean()})
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor, inner=torch.Tensor.item: (next(copies), inner(tensor))[1])
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(train.Run, "save", lambda run, *given, inner=train.Run.save: (
        saves.append(len(marks)), inner(run, *given)))
    status, out, _ = command(*DRAEM, "--data", data, "--steps", 101, "--save-minutes", 2)
    assert status == 0 and saves == [*range(4, 101, 4), 101]
    assert [row["step"] for row in log_of("runs/draem/weave")] == [1, 50, 100, 101]
    copied = [step for step in range(1, 101) if marks[step] - marks[step - 1] > 1]
    assert copied == sorted({1, 50, *range(4, 101, 4)})
    assert re.search(r"^train 50/101  l2 \S+  lr 1e-04  40 s/step  34 min left$", out, re.M)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(value, data, mistake, monkeypatch):
    count = itertools.count(1)
    monkeypatch.setattr(draem.DraemModel, "losses", lambda model, *_: {
        "l2": next(model.parameters()).mean() * (value if next(count) == 3 else 1)})
    words = mistake(*DRAEM, "--data", data, "--steps", 9, "--save-minutes", 0)
    assert "train, step 3: the loss is not finite" in words and str(value) in words
    assert saved("runs/draem/weave")["run"]["steps"] == {"train": 2}
    draem.load("runs/draem/weave/last.pt")


# --- Which result is whose --------------------------------------------------------------------------------------------

def test_another_runs_metrics_are_not_believed(data, command, monkeypatch):
    """Train, delete last.pt, train otherwise, die before the evaluation, --resume: once the first run's table."""
    last, found, argv = Path("runs/dfm/weave/last.pt"), Path("runs/dfm/weave/metrics.json"), [*DFM, "--data", data]
    assert command(*argv)[0] == 0
    older = found.read_bytes()
    last.unlink()
    argv += ["--pooling", 1]
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", die)
        assert command(*argv)[0] == "killed" and last.exists() and not found.exists()
    status, table, _ = command(*argv, "--out", "whole")
    whole = Path("whole/dfm/weave/metrics.json").read_bytes()
    for content in (older, b"", whole[:99], b"\xff", None):
        found.unlink(missing_ok=True) if content is None else found.write_bytes(content)
        assert command(*argv, "--resume")[0] == status == 0 and found.read_bytes() == whole
    same_runs("dfm", "whole", "runs")
    with monkeypatch.context() as patch:  # what is complete is printed without work
        for place, name in ((train, "fit_dfm"), (train, "evaluate"), (common, "load_images")):
            patch.setattr(place, name, None)
        assert table_of(command(*argv, "--resume")[1]) == table_of(table)
    last.unlink()
    monkeypatch.setattr(dfm.DFMModel, "fit", die)
    assert command(*argv, "--resume")[0] == "killed"  # metrics without weights are no run


def test_resume_compares_settings(trained, data, mistake, command):
    argv = [*DRAEM, "--steps", 8, "--lr", 5e-3, "--data", data, "--out", trained.parents[1], "--resume"]
    before = files_in(trained.parents[1])
    more = draw_data("more/weave", train=6)
    for words, *options in (("size was 32, not 64", "--size", 64), ("width was 4, not 6", "--width", 6),
                            ("batch was 2, not 5", "--batch", 5), ("seed was 0, not 7", "--seed", 7),
                            ("lr was 0.005, not 0.001", "--lr", 1e-3), ("steps was 8, not 20", "--steps", 20),
                            ("rotate was 45.0, not 0.0", "--rotate", 0), ("bits was 16, not 12", "--bits", 12),
                            ("antialias was True, not False", "--no-antialias"), ("sspcab was False", "--sspcab"),
                            ("precision was fp32, not bf16", "--precision", "bf16"), ("images was 5", "--data", more),
                            ("textures was 0, not 9", "--textures", data / "test")):
        assert f"draem/weave/last.pt: {words}" in mistake(*argv, *options)
    assert re.search("holds a run; --resume", mistake(*argv[:-1])) and files_in(trained.parents[1]) == before
    shutil.copytree(trained, "runs/draem/weave")
    shutil.copytree(data, "moved/weave")
    older = saved(trained)
    del older["run"]["settings"]["bits"]  # made before this option was
    torch.save(older, "runs/draem/weave/last.pt")
    assert command(*argv, "--data", "moved/weave", "--out", "runs", "--bits", 12)[0] == 0
    for content, words in (({"model": {}}, "not a checkpoint to go on from"), ([1], "a dict of tensors"),
                           ({"method": "draem", "run": {"steps": 3}}, "not a checkpoint to go on from")):
        torch.save(content, "runs/draem/weave/last.pt")
        assert words in mistake(*argv, "--out", "runs")


def test_what_cannot_be_read_is_named_left_out_and_tried_again(data, command):
    shutil.copytree(data, "odd")
    bad, mask = Path("odd/test/good/bad.png"), Path("odd/ground_truth/hole/000_mask.png")
    bad.write_bytes(b"x")
    whole = mask.read_bytes()
    mask.write_bytes(whole[:50])
    Path("odd/ground_truth/dirt/000_mask.png").unlink()
    argv = [*DFM, "--data", "odd", "--resume"]
    for status, out, err in (command(*argv), command(*argv)):
        assert status == 2 and len(err.splitlines()) == 2
        assert f"train.py: {bad}: cannot be read" in err and f"train.py: {mask}: cannot be read" in err
        assert metrics_of("runs/dfm/odd")["unreadable"] == 2 and "leave out 1 images without a map or a mask" in out
        assert [Path(row["path"]).relative_to("odd/test").as_posix() for row in rows_of("runs/dfm/odd")] == [
            name for name in NAMES if name != "hole/000.png"]
    mask.write_bytes(whole)
    bad.unlink()
    status, out, err = command(*argv)
    assert (status, err, metrics_of("runs/dfm/odd")["unreadable"], len(rows_of("runs/dfm/odd"))) == (0, "", 0, 9)


def test_nothing_of_the_users_is_written_over(trained, mistake, command):
    draw_data("d/weave")
    draw_data("t/u/other", defects=())
    predict = ["draem", "--checkpoint", trained / "last.pt", *CPU, "--predict"]
    assert command(*predict, "d/weave/test")[0] == 0
    before = files_in(".")
    for argv in ([*DRAEM, "--data", "d/weave", "--out", "d/weave/test"], [*DRAEM, "--data", "d/weave", "--out", "d"],
                 [*DFM, "--data", "d/weave", "--out", "."], [*DFM, "--data", "d", "--out", "d"],
                 [*DRAEM, "--data", "d", "--textures", "t/u", "--out", "t"],
                 [*DRAEM, "--data", "d", "--textures", "t/u", "--out", "t/u/runs"],
                 [*DSR, "--data", "d", "--pretrain", "t/u/other/train", "--out", "t/u"],
                 [*DSR, "--data", "d", "--pretrain", "t", "--out", "t/runs"],
                 [*predict, "d/weave/test", "runs/draem/predictions"], [*predict, "runs"], [*predict, "."],
                 [*predict, next(Path("runs/draem/predictions").rglob("*.png"))]):
        assert re.search("lie one inside the other; .*--out", mistake(*argv))
    assert files_in(".") == before


def test_two_processes_do_each_category_once(command, monkeypatch):
    """Category b has no masks, c an image that cannot be read: this ends no process of two, but one alone."""
    for seed, name in enumerate("abc"):
        draw_data(f"parent/{name}", seed, masks=name != "b")
    Path("parent/c/test/good/bad.png").write_bytes(b"x")
    for rank, world, out, names in ((0, 2, "runs", "ac"), (1, 2, "runs", "b"), (0, 1, "whole", "abc")):
        monkeypatch.setattr(train, "RANK", rank)
        monkeypatch.setattr(train, "WORLD", world)
        status, table, err = command(*DFM, "--data", "parent", "--out", out)
        assert status == (2 if world == 1 else 0) and ("bad.png: cannot be read" in err) == ("c" in names)
        assert "".join(table_of(table)).replace("mean", "") == names
    same_runs("dfm", "whole", "runs")
    again = command(*DFM, "--data", "parent", "--resume")
    assert again[0] == 2 and table_of(again[1]) == table_of(table) and list(table_of(table)) == ["a", "b", "c", "mean"]
    columns = dict(zip(COLUMNS, zip(*table_of(table).values())))
    for column, (*values, mean) in columns.items():
        found = [metrics_of(f"runs/dfm/{name}").get(column) for name in "abc"]
        known = [value for value in found if value is not None]
        assert values == [pytest.approx(value, abs=6e-5) if value is not None else None for value in found]
        assert mean == pytest.approx(sum(known) / len(known), abs=6e-5) and len(known) == 3 - ("pixel" in column)


# --- Options, precision, device ---------------------------------------------------------------------------------------

def test_defaults_are_the_published_settings(capsys):
    published = {
        "draem": dict(textures=None, width=128, sspcab=False, steps=None, lr=1e-4, rotate=45.0),
        "dsr": dict(codebook=None, pretrain=None, steps=100_000, upsampling_steps=20_000, pretrain_steps=200_000,
                    pretrain_batch=32, hiddens=128, codes=4096, width=64, lr=2e-4, rotate=90.0),
        "dfm": dict(backbone="resnet50", layer="layer3", pooling=4, share=0.97, score="fre", weights=None)}
    shared = dict(size=256, antialias=True, bits=16, batch=8, seed=0, compile=False, resume=False, save_minutes=10,
                  checkpoint=None, predict=None, threshold=None, out=Path("runs"), toy=False)
    for method, options in published.items():
        args = vars(train.parse([method, "--data", "x", "--device", "cpu"]))
        assert args.items() >= (shared | options).items()
        assert args["preprocessing"] == {"size": 256, "antialias": True, "bits": 16}
        with pytest.raises(SystemExit, match="^0$"):
            train.main([method, "--help"])
        words = " ".join(capsys.readouterr().out.split())
        assert "usage" not in words and all(f"--{name.replace('_', '-')}" in words for name in options)
        assert all(f"(default: {value})" in words for value in options.values() if value)
    with pytest.raises(SystemExit, match="^0$"):
        train.main(["--help"])
    assert train.__doc__.strip() in capsys.readouterr().out


MISTAKES = {  # arguments: pattern of the message; words in capitals are replaced
    "": "required", "draem --fast": "--fast", "yolo": "invalid choice: 'yolo'",
    "DRAEM --data nowhere": "^nowhere: no such folder",
    "DRAEM --data text": "text/train/good/002.png.*; text/train/good/003.png",
    "DRAEM --data DATA --textures empty": "^empty: holds no images",
    "DRAEM --data DATA --size 100": "--size 100: 32 or more is needed, in steps of 32",
    "DSR --data DATA --size 32": "--size 32: 64 or more",
    "DRAEM --data DATA --batch 0": "--batch 0: 1 or more",
    "DRAEM --data DATA --width 1": "--width 1: 2 or more",
    "DSR --data DATA --upsampling-steps 0": "--upsampling-steps 0: 1 or more",
    "DSR --data DATA --codebook a --pretrain b": "--pretrain .*--codebook .*choose",
    "DSR --data DATA --codebook foreign.pt": "^foreign.pt",
    "DSR --data DATA --pretrain empty": "^empty: holds no images",
    "DFM --data DATA --share 1.5": "share 1.5", "DFM --data DATA --pooling 64": "pooling 64",
    "DFM --data DATA --weights nowhere.pth": "^nowhere.pth: No such file",
    "DRAEM --data DATA --device cuda": "^--device cuda: .* 0 GPUs for 1 processes; --device cpu",
    "DRAEM --data DATA --device cuda:1": "^--device cuda:1: .*--device cpu",
    "DRAEM --data DATA --device gpu": "^--device gpu: .*--device cpu",
    "DRAEM --data DATA --device meta": "^--device meta: .*--device cpu",
    "DRAEM --data DATA --steps 1 --out text/file": "text/file",
    "draem --data DATA --predict DATA": "--predict needs --checkpoint",
    "draem --checkpoint LAST": "--checkpoint needs --data",
    "draem --checkpoint LAST --data DATA --size 32": "--size, --antialias and --bits are those of --checkpoint",
    "draem --checkpoint LAST --data DATA --bits 16": "are those of --checkpoint",
    "draem --checkpoint LAST --predict DATA --no-antialias": "are those of --checkpoint",
    "draem --checkpoint nowhere.pt --data DATA": "^nowhere.pt: No such file",
    "draem --checkpoint half.pt --data DATA": "^half.pt: ", "dfm --checkpoint LAST --data DATA": "last.pt: .*draem",
    "draem --checkpoint LAST --data DATA/train": "holds no test/",
    "draem --checkpoint LAST --predict nowhere": "^nowhere: no such file",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(words, data, trained, mistake):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is one")
    Path("empty").mkdir()
    draw_data("text", defects=())
    for name in ("file", "train/good/002.png", "train/good/003.png"):
        Path("text", name).write_text("no image")
    Path("half.pt").write_bytes((trained / "last.pt").read_bytes()[:99999])
    torch.save({"weights": torch.zeros(3)}, "foreign.pt")
    before, argv = files_in("."), []
    for word in words.split():
        word = word.replace("DATA", str(data)).replace("LAST", str(trained / "last.pt"))
        argv += {"DRAEM": DRAEM, "DSR": DSR, "DFM": DFM}.get(word, [word])
    message = mistake(*argv)
    assert re.search(MISTAKES[words], message) and files_in(".") == before, message


@pytest.mark.parametrize("precision, dtype", [("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_networks_run_in_the_precision(precision, dtype, data, command, monkeypatch):
    seen = []
    for kind, name in ((draem.DraemModel, "losses"), (draem.DraemModel, "predict"), (dfm.DFMModel, "features")):
        def call(self, *given, inner=getattr(kind, name)):
            seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
            return inner(self, *given)
        monkeypatch.setattr(kind, name, call)
    for argv, calls in (([*DRAEM, "--steps", 1], 1 + 5), (DFM, 2 + 3)):  # of training or fitting, of nine test images
        assert command(*argv, "--data", data, "--precision", precision)[0] == 0
        assert [seen.pop() for _ in seen[:]] == [dtype] * calls


def test_fp16_scales_the_loss_and_skips_a_step_that_overflows(data, command, monkeypatch, after_step):
    weights = []
    monkeypatch.setattr(draem.DraemModel, "losses", lambda *given, inner=draem.DraemModel.losses: {
        name: term * (1e36 if given[-1].initial_seed() == zlib.crc32(b"0 train 2") else 1)
        for name, term in inner(*given).items()})
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *given, inner=torch.amp.GradScaler, **more: inner(
        *given, **more, init_scale=256, growth_interval=3))
    argv = [*DRAEM, "--data", data, "--steps", 7, "--precision", "fp16"]
    assert command(*argv, "--out", "whole")[0] == 0

    def act(count, optimizer):
        weights.append(optimizer.param_groups[0]["params"][0].detach().clone())
        if count == 4:
            os.kill(os.getpid(), signal.SIGTERM)
    after_step(act)
    assert command(*argv)[0] == 143
    assert [torch.equal(one, other) for one, other in zip(weights, weights[1:])] == [False, True, False]
    scaler = saved("runs/draem/weave")["run"]["scaler"]
    assert scaler["scale"] == 128 and scaler["_growth_tracker"] == 1
    assert command(*argv, "--resume")[0] == 0
    assert saved("runs/draem/weave")["run"]["scaler"]["scale"] == 256  # three steps after the overflow
    same_runs("draem", "whole", "runs")


def test_automatic_precision_is_what_the_processor_has(monkeypatch):
    def settled(method, **has):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.delattr(torch.cpu, name, raising=False)
            if name in has:
                monkeypatch.setattr(torch.cpu, name, lambda value=has[name]: value, raising=False)
        torch.backends.cudnn.benchmark = False
        device, precision = train.hardware(SimpleNamespace(device="cpu", method=method, precision="auto"))
        assert torch.backends.cudnn.benchmark and torch.backends.cudnn.allow_tf32 == (method != "dfm")
        return precision, device.type

    assert settled("draem") == settled("draem", _is_amx_tile_supported=False) == ("fp32", "cpu")
    assert settled("dsr", _is_amx_tile_supported=True)[0] == settled("dsr", _is_avx512_bf16_supported=True)[0] == "bf16"
    assert settled("dfm", _is_amx_tile_supported=True)[0] == "fp32"  # its likelihood would show bfloat16's rounding


@pytest.mark.parametrize("given, index, has", [("cuda", 3, True), ("cuda:0", 0, False), ("cuda:2", 2, False)])
def test_a_process_takes_the_gpu_of_its_number_or_the_given_one(given, index, has, monkeypatch):
    chosen, tried = [], []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or has)
    monkeypatch.setattr(torch, "ones", lambda *shape, device: tried.append(device) or torch.zeros(*shape))
    monkeypatch.setattr(train, "WORLD", 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    args = SimpleNamespace(device=given, method="draem", precision="auto")
    assert train.hardware(args) == (torch.device("cuda", index), "bf16" if has else "fp16")
    assert chosen == tried == [torch.device("cuda", index)]

    def too_old(*_, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with")
    monkeypatch.setattr(torch, "ones", too_old)
    with pytest.raises(ValueError, match=f"^--device {given}: .*no kernel image .*the device; 2 GPUs for 4 processes"):
        train.hardware(args)


@pytest.mark.parametrize("argv, networks", [
    ([*DRAEM, "--steps", 1], {"ReconstructiveSubNetwork", "DiscriminativeSubNetwork"}),
    ([*DSR, "--pretrain", "DATA/train"], {"Named", "SubspaceRestrictionModule", "ImageReconstructionNetwork",
                                          "AnomalyDetectionModule", "DiscreteLatentModel"}),
    (DFM, set())], ids=["draem", "dsr", "dfm"])
def test_compile_takes_networks_and_augmentations_of_the_training(argv, networks, data, command, monkeypatch):
    modules, functions, predicting = [], [], []
    monkeypatch.setattr(draem, "AUGMENTATIONS", draem.AUGMENTATIONS)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: modules.append(module))
    monkeypatch.setattr(torch, "compile", lambda function: functions.append(function) or function)
    monkeypatch.setattr(train, "predictions", lambda model, *given, inner=train.predictions: (
        predicting.extend(model.modules()), inner(model, *given))[1])
    argv = [str(arg).replace("DATA", str(data)) for arg in (*argv, "--data", "DATA")]
    assert command(*argv, "--out", "plain")[0] == 0 and not modules and not functions
    assert command(*argv, "--compile")[0] == 0
    assert {type(module).__name__ for module in modules} == networks
    assert not {id(module) for module in modules} & {id(module) for module in predicting}
    assert functions == (list(draem.AUGMENTATIONS) if argv[0] == "draem" else [])
    same_runs(argv[0], "plain", "runs")


# --- Textures, codebook, toy ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("folder", ["dtd/images", "dtd", "products/mvtec/dtd", "products/dtd/images", None])
def test_textures_are_found_beside_the_data(folder, command, monkeypatch):
    draw_data("products/mvtec/weave", defects=(), good=0)
    if folder:
        Path(folder, "banded").mkdir(parents=True)
        Image.new("RGB", (40, 40), "magenta").save(Path(folder, "banded", "1.png"))
    given, argv = [], [*DRAEM, "--data", "products/mvtec/weave"]
    monkeypatch.setattr(train, "train_draem", lambda images, textures, *_: given.append(textures) or die())
    said = command(*argv)[1]
    assert command(*argv, "--textures", "products/mvtec/weave/train")[0] == "killed"
    if folder:
        assert given[0].shape == (1, 3, 32, 32) and given[0][0, :, 9, 9].tolist() == [255, 0, 255]
    else:
        assert given[0] is None and "textures: coloured noise; the published results need DTD" in said
    assert torch.equal(given[1], read_all(Path("products/mvtec/weave/train").rglob("*.png"), 32))


def test_a_codebook_is_made_once_by_one_process_and_refused_for_other_images(data, command, mistake, monkeypatch):
    argv, book = [*DSR, "--data", data, "--pretrain", data / "train"], Path("runs/dsr/codebook-train/last.pt")
    monkeypatch.setattr(train, "WORLD", 2)
    assert "run it without torchrun first" in mistake(*argv) and not list(Path("runs").rglob("*.pt"))
    monkeypatch.setattr(train, "WORLD", 1)
    assert command(*argv)[0] == 0
    made = files_in(book.parent)
    shutil.move("runs/dsr/weave", "whole/dsr/weave")
    monkeypatch.setattr(train, "WORLD", 2)
    more = ["--width", 6, "--steps", 2, "--batch", 1, "--rotate", 0, "--upsampling-steps", 1]
    assert command(*argv, *more)[0] == 0 and files_in(book.parent) == made == files_in(book.parent)
    other = draw_data("train", train=4, good=0, defects=())  # a folder of the same name
    assert "codebook-train/last.pt: images was 5, not 4" in mistake(*argv, "--pretrain", other)
    assert "codes was 21, not 22" in mistake(*argv, "--codes", 22)
    assert command(*DSR, "--data", data, "--codebook", book, "--out", "given")[0] == 0
    same_runs("dsr", "whole", "given")
    monkeypatch.setattr(dsr, "fetch_codebook", die)
    assert command(*DSR, "--data", data, "--out", "published")[0] == "killed"


@pytest.mark.parametrize("method", train.METHODS)
def test_the_toy_product_takes_its_own_settings(method, command, monkeypatch):
    """The toy is drawn into data/toy. The command line overrides its settings."""
    drawn, shown, inner = [], [], dsr.DiscreteLatentModel.losses
    monkeypatch.setattr(common, "make_toy", lambda folder: drawn.append(folder) or draw_data(folder))
    monkeypatch.setattr(dsr.DiscreteLatentModel, "losses", lambda self, image, generator: (
        shown.append(image), inner(self, image, generator))[1])
    Path("dtd").mkdir()  # the toy ignores textures
    toy = {"draem": dict(size=32, width=4, steps=3), "dfm": train.TOY["dfm"],
           "dsr": dict(size=64, hiddens=4, codes=21, width=4, lr=1e-3, pretrain_steps=2, pretrain_batch=40, steps=1,
                       upsampling_steps=1)}[method]
    monkeypatch.setitem(train.TOY, method, toy)
    status, _, err = command(method, "--batch", 2, *CPU)
    assert status == 0 and not err and drawn == ["data/toy"]
    found = metrics_of(f"runs/{method}/toy")
    assert found["settings"].items() >= ({"batch": 2} | {key: toy[key] for key in toy if key != "weights"}).items()
    if method == "dsr":  # stage 1 is shown normal images, a fifth of them, and such with anomalies
        normal = read_all(Path("data/toy/train/good").iterdir(), 64) / 255
        same = torch.stack([(image == normal).flatten(1).float().mean(1).max() for image in torch.cat(shown)])
        assert len(same) == 80 and 5 <= (same == 1).sum() <= 45 and (same > 0.3).all()  # a mask may be empty
        assert list(Path("runs/dsr").glob("codebook*")) == [Path("runs/dsr/codebook-toy")]


# --- Evaluation and prediction ----------------------------------------------------------------------------------------

def auroc(normal, defective):
    return np.mean([(a > b) + (a == b) / 2 for a in defective for b in normal])


def test_a_runs_files_are_those_of_the_saved_weights(trained, data):
    assert set(files_in(trained)) == {"last.pt", "log.jsonl", "metrics.json", "scores.csv", "summary.png",
                                      "simulated.png", *(f"maps/{name}" for name in NAMES)}
    model, found, rows = draem.load(trained / "last.pt"), metrics_of(trained), rows_of(trained)
    assert [row["path"] for row in rows] == [str(data / "test" / name) for name in NAMES]
    scores, labels = [float(row["score"]) for row in rows], [int(row["label"]) for row in rows]
    image, masks = read_all([row["path"] for row in rows], 32), torch.zeros(9, 32, 32, dtype=torch.bool)
    parts = model.predict(image / 255)
    assert scores == pytest.approx(parts["score"].tolist(), abs=1e-6) and labels == [1, 1, 1, 0, 0, 0, 1, 1, 1]
    for number, name in enumerate(NAMES):  # a picture has score and name, and what the model found
        if labels[number]:
            masks[number] = common.read_mask(data / "ground_truth" / name.replace(".png", "_mask.png"), 32, (64, 48))
        panels = common.panels(image[number], {key: value[number] for key, value in parts.items()}, masks[number])
        page = common.page([(f"{name[:4]}\n{scores[number]:.3f}\n{name[5:]}", panels)])
        with Image.open(trained / "maps" / name) as picture:
            assert abs(np.asarray(picture).astype(int) - np.asarray(page)).max() <= 1
    good, maps = scores[3:6], parts["anomaly_map"]
    kinds = {kind: {"count": 3, "image_auroc": pytest.approx(auroc(good, scores[first:first + 3]))}
             for kind, first in (("dirt", 0), ("hole", 6))}
    assert found.pop("kinds") == kinds | {"good": {"count": 3}}
    assert found["image_auroc"] == pytest.approx(auroc(good, scores[:3] + scores[6:]))
    for name, value in common.image_metrics(scores, labels).items():
        assert found.pop(f"image_{name}") == pytest.approx(value)
    for name, value in common.pixel_metrics(list(maps), list(masks)).items():  # pixel_threshold is among them
        assert found.pop(f"pixel_{name}") == pytest.approx(value, abs=1e-4)
    commit = subprocess.run(["git", "-C", SCRIPT.parent, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    assert found.pop("commit").startswith(commit.stdout.strip()[:7])
    assert found == {"unreadable": 0, "settings": saved(trained)["run"]["settings"], "data": str(data),
                     "torch": torch.__version__}


@pytest.mark.parametrize("argv, masks, headings", [
    ([*DRAEM, "--steps", 1], False, ["image", "reconstruction", "anomaly map"]), (DFM, True, ["image", "anomaly map"]),
    ([*DFM, "--score", "nll"], True, ["image"])], ids=["no masks", "fre", "nll"])
def test_summary_has_of_each_kind_the_highest_and_the_lowest_score(argv, masks, headings, command, pages):
    draw_data("weave", masks=masks)
    status, out, _ = command(*argv, "--data", "weave")
    folder, expected = Path("runs", argv[0], "weave"), []
    for kind in ("dirt", "good", "hole"):
        found = [(float(row["score"]), Path(row["path"]).name) for row in rows_of(folder) if f"/{kind}/" in row["path"]]
        expected += [f"{kind}\n{score:.3f}\n{name}" for score, name in (max(found), min(found, key=lambda row: row[0]))]
    assert status == 0 and [caption.split("\n")[:2] for caption, _ in pages[-1]] == [
        caption.split("\n")[:2] for caption in expected]
    for caption, row in pages[-1]:
        assert list(row) == headings + ["truth"] * (masks or "good" in caption)
    with Image.open(folder / "summary.png") as page:
        assert np.array_equal(np.asarray(page), np.asarray(common.page(pages[-1])))
    assert (folder / "maps").exists() == ("anomaly map" in headings)
    left_out = 9 if headings == ["image"] else 0 if masks else 6
    assert (f"leave out {left_out} images without a map or a mask" in out) == bool(left_out)
    assert (table_of(out)["weave"][3:] == [None] * 4) == bool(left_out)


def test_what_metrics_need(data, command, monkeypatch):
    """Scores outlive pixel metrics that find no memory. Image metrics need both kinds, a threshold five images."""
    def full(*_):
        raise MemoryError
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(common, "pixel_metrics", full)
        command(*DFM, "--data", data)
    assert len(rows_of("runs/dfm/weave")) == 9 and not Path("runs/dfm/weave/metrics.json").exists()
    for name, kind, columns in (("fine", dict(defects=()), 0), ("bad", dict(good=0), 4), ("few", dict(train=4), 7)):
        draw_data(name, **kind)
        assert command(*DFM, "--data", name)[0] == 0
        found = metrics_of(f"runs/dfm/{name}")
        assert len(set(COLUMNS) & set(found)) == columns
        assert [{"image_auroc", "threshold"} & set(report) for report in found["kinds"].values()] == {
            "fine": [{"threshold"}], "bad": [{"threshold"}] * 2, "few": [{"image_auroc"}, set(), {"image_auroc"}]}[name]
    status, out, _ = command(*DFM, "--data", data / "train/good")  # a plain folder of images
    assert status == 0 and table_of(out)["good"] == [None] * 7 and Path("runs/dfm/good/last.pt").exists()


@pytest.mark.parametrize("options, preprocessing, middle", [
    ([], {"size": 32, "antialias": True, "bits": 16}, 1),  # a third of 255 * 1023 / 65535
    (["--no-antialias"], {"size": 32, "antialias": False, "bits": 16}, 4),
    (["--bits", 10], {"size": 32, "antialias": True, "bits": 10}, 85)])
def test_images_are_read_then_and_later_as_the_options_said(options, preprocessing, middle, command, monkeypatch):
    """Every third column is 1023, the white of a 10-bit camera, in the middle of an output pixel."""
    stripes = np.zeros((96, 96), np.uint16)
    stripes[:, 1::3] = 1023
    for part in ("train/good", "test/good", "test/cut"):
        Path("grey", part).mkdir(parents=True)
        Image.fromarray(stripes).save(f"grey/{part}/0.png")
    shown, predict, last = [], draem.DraemModel.predict, "runs/draem/grey/last.pt"
    monkeypatch.setattr(draem.DraemModel, "predict", lambda self, image: shown.append(image) or predict(self, image))
    assert command(*DRAEM, *options, "--data", "grey", "--steps", 1)[0] == 0
    assert saved("runs/draem/grey")["preprocessing"] == preprocessing
    shutil.rmtree("grey/train")
    assert command("draem", "--checkpoint", last, "--data", "grey", "--batch", 2, *CPU)[0] == 0
    assert command("draem", "--checkpoint", last, "--predict", "grey/test/cut/0.png", *CPU)[0] == 0
    assert [len(image) for image in shown] == [2, 2, 1]
    for image in shown:
        assert (255 * image[:, :, 4:-4, 4:-4]).round().unique().tolist() == [middle]
        assert image.is_contiguous(memory_format=torch.channels_last)
    assert rows_of("runs/draem/grey") == rows_of("runs/draem/grey-checkpoint")
    settings = metrics_of("runs/draem/grey-checkpoint")["settings"]
    assert settings.items() >= (preprocessing | {"width": 4, "file": last}).items()


def test_predict(trained, data, command):
    """Path, score, decision. Pictures lie under the image's full path. What cannot be read is named."""
    whole = (data / "test/hole/000.png").read_bytes()
    for name in ("photos/a.png", "photos/more/a.png", "other/a.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(whole)
    Path("photos/half.png").write_bytes(whole[:len(whole) // 2])
    Path("text").write_text("no image")
    Image.new("RGB", (50, 40), "red").save("photos/a.jpg")
    argv = ["draem", "--checkpoint", trained / "last.pt", *CPU, "--batch", 2, "--predict"]
    status, out, err = command(*argv, data / "test/good/001.png", "photos", "text")
    assert status == 2 and re.search("^train.py: photos/half.png: cannot be read", err, re.M)
    assert re.search("^train.py: text: cannot be read", err, re.M) and "runs/draem/predictions" in err
    names = [str(data / "test/good/001.png"), "photos/a.jpg", "photos/a.png", "photos/more/a.png"]
    model, images = draem.load(trained / "last.pt"), [common.read_image(path, 32) for path in names]
    score = model.predict(torch.stack(images) / 255)["score"].tolist()
    assert out == "".join(f"{name} {value:.6f}\n" for name, value in zip(names, score))
    limit = rows_of("runs/draem/predictions")[2]["score"]
    assert float(limit) == pytest.approx(score[2], abs=1e-6)
    status, out, _ = command(*argv, "other/a.png", "--threshold", limit)
    assert status == 0 and out.endswith(" defective\n")
    status, out, _ = command(*argv, "other/a.png", "--threshold", float(limit) + 1e-6)
    assert status == 0 and out.endswith(" normal\n")
    assert [(row["path"], row["decision"], row["checkpoint"]) for row in rows_of("runs/draem/predictions")] == [
        (os.path.abspath(name), decision, str(trained / "last.pt")) for name, decision in
        zip((*names, "other/a.png", "other/a.png"), ("", "", "", "", "defective", "normal"))]
    pictures = {os.path.abspath(name).strip("/") for name in (names[0], "photos/a.jpg.png", *names[2:], "other/a.png")}
    assert set(files_in("runs/draem/predictions")) == {"scores.csv", *pictures}


# --- The bottom of the file, processes of their own -------------------------------------------------------------------

def test_what_ends_the_script(data, monkeypatch, capfd):
    """A mistake is one line and status 2, Ctrl-C is 130 and silent, a fault of the program has its traceback."""
    monkeypatch.setattr(sys, "argv", ["train.py", *DFM, "--data", str(data)])
    for fault, status, err in ((ValueError("a\nb  c"), 2, "train.py: a b c\n"), (KeyboardInterrupt(), 130, ""),
                               (OSError(28, "Full", "x"), 2, "train.py: [Errno 28] Full: 'x'\n"), (KeyError(), 1, "")):
        def broken(*_, fault=fault, **more):
            raise fault
        monkeypatch.setattr(common, "find_categories", broken)
        with pytest.raises(KeyError if status == 1 else SystemExit) as left:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert capfd.readouterr().err == err and getattr(left.value, "code", 1) == status


def test_processes_of_their_own(trained, data):
    """python -X dev shows the traceback. | head ends quietly. Rank 1 of 2 on a console that cannot encode its names."""
    for name in ("a", "\u00e9"):
        draw_data(f"parent/{name}")
    Path("parent/\u00e9/test/good/\u00fc.png").write_text("no image")

    def start(*argv, flags=(), **more):
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | more
        return subprocess.Popen([sys.executable, *flags, SCRIPT, *map(str, argv)], env=environment,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    dev = start(*DFM, "--data", "nowhere", flags=("-X", "dev", "-W", "ignore"))
    head = start("draem", "--checkpoint", trained / "last.pt", "--predict", data, *CPU, "--batch", 1)
    rank = start(*DFM, "--data", "parent", RANK="1", WORLD_SIZE="2", PYTHONIOENCODING="ascii")
    first = head.stdout.readline()
    head.stdout.close()
    err = head.stderr.read()
    assert first.startswith(str(data).encode()) and head.wait() == 0 and b"Error" not in err and b"Trace" not in err
    out, err = rank.communicate()
    assert rank.returncode == 0 and os.listdir("runs/dfm") == ["\u00e9"]  # 2 would end the other process
    assert err.count(b"\n") == 1 and rb"\xe9/test/good/\xfc.png: cannot be read" in err and rb"\xe9: dfm" in out
    out, err = dev.communicate()
    assert dev.returncode == 1 and b"Traceback" in err and err.endswith(b"nowhere: no such folder; check the path\n")


# --- On a GPU ---------------------------------------------------------------------------------------------------------

@gpu
def test_a_step_on_a_gpu_never_waits_for_it(data, command, monkeypatch, after_step):
    """From the rate, the first line of a step, to the end of the optimizer's work."""
    for module in (draem, dsr):
        def learning_rate(*given, inner=module.learning_rate):
            torch.cuda.set_sync_debug_mode("error")
            return inner(*given)
        monkeypatch.setattr(module, "learning_rate", learning_rate)
    after_step(lambda *_: torch.cuda.set_sync_debug_mode("default"))
    for argv in ([*DRAEM, "--steps", 4, "--textures", data / "test"], [*DSR, "--pretrain", data / "train"]):
        assert command(*argv, "--data", data, "--device", "cuda", "--precision", "auto")[0] == 0


@gpu
def test_a_gpu_computes_what_the_cpu_computes(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    image, u = torch.randint(0, 256, (4, 3, 256, 256)) / 255, torch.rand(4, 3)
    for augmentation in draem.AUGMENTATIONS:  # a level may fall to the other side of a threshold
        apart = (augmentation(image.cuda(), u.cuda()).cpu() - augmentation(image, u)).abs() > 1e-3
        assert apart.float().mean() < 1e-3, augmentation.__name__
    for model in (draem.DraemModel(16).eval(), dsr.DsrModel(width=16).eval()):
        expected = model.predict(image[:2])
        model = model.cuda().to(memory_format=torch.channels_last)
        for bf16, limit in ((False, 2e-3), (True, 0.1)):
            with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
                found = model.predict(image[:2].cuda())
            for name, part in expected.items():
                assert (part - found[name].float().cpu()).abs().mean() < limit, (type(model), name, bf16)
    quantizer, z, features = dsr.VectorQuantizer(4096, 128), torch.randn(2, 128, 64, 64), torch.randn(60, 64, 8, 8)
    near = quantizer.nearest(z)
    assert (near == quantizer.cuda().nearest(z.cuda()).cpu()).float().mean() > 0.999
    one, other = dfm.PCA(0.97).fit(features), dfm.PCA(0.97).fit(features.cuda()).cpu()
    torch.testing.assert_close(one.transform(features) ** 2, other.transform(features) ** 2, rtol=1e-3, atol=1e-3)
