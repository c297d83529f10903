"""The command, run as a person runs it, on a data set of ten small pictures.

Oracles: a run that nothing interrupted, for those that something did, bit for bit; a run of one process, for two
ranks; the bytes and names that DESIGN's layout promises, for the files; the message each mistake deserves.
"""
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common
import draem
import train

DRAEM = ["draem", "--size", "32", "--width", "2", "--batch", "6", "--precision", "fp32", "--device", "cpu"]
DSR = ["dsr", "--size", "64", "--width", "2", "--batch", "6", "--precision", "fp32", "--device", "cpu",
       "--hiddens", "4", "--codes", "21", "--pretrain-steps", "4", "--pretrain-batch", "4", "--steps", "4",
       "--upsampling-steps", "4"]
DFM = ["dfm", "--size", "64", "--backbone", "resnet18", "--layer", "layer2", "--pooling", "2", "--weights", "random",
       "--batch", "6", "--precision", "fp32", "--device", "cpu"]
MEANS = {"image_auroc", "image_ap", "image_f1", "pixel_auroc", "pixel_ap", "pixel_aupro"}


def draw_data(folder, train_count=4, good=2, masks=True, defects=("hole", "dirt"), seed=0):
    """A category in MVTec's layout: 40 x 36 pixels, a shaded weave, with black holes and white dirt."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:36, :40]

    def normal():
        weave = np.dstack((3 * x + 40, 3 * y + 40, 100 + 30 * np.sin(x / 3 + y / 5)))
        return np.uint8(weave + rng.integers(0, 20, (36, 40, 3)))

    def save(name, array):
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)

    for i in range(train_count):
        save(f"train/good/{i:03d}.png", normal())
    for i in range(good):
        save(f"test/good/{i:03d}.png", normal())
    for defect in defects:
        for i in range(2):
            picture, spot = normal(), np.hypot(x - 12 - 10 * i, y - 18) < 6
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
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def command(capsys):
    """command(*argv) -> exit status, stdout, stderr without the decoder's progress lines."""
    def run(*argv):
        capsys.readouterr()
        status = train.main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        return status, out, "".join(line for line in err.splitlines(True) if " images decoded in " not in line)
    return run


def launch(*argv, ranks=0, **options):
    """The command as a process of its own, or several."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    return subprocess.run([sys.executable, *launcher, ROOT / "train.py", *argv], capture_output=True, timeout=120,
                          env=environment, **options)


def log_rows(folder):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def metrics_of(folder):
    return json.loads(Path(folder, "metrics.json").read_text())


def tensors(value, name=""):
    """All tensors and numbers of a checkpoint, by path."""
    if isinstance(value, (dict, list, tuple)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors(part, f"{name}.{key}")
    else:
        yield name, value


def same_run(one, other):
    """Weights, optimizer, log and metrics of two run folders, bit for bit; the seconds and the roots may differ."""
    a, b = (torch.load(Path(folder, "last.pt"), weights_only=True) for folder in (one, other))
    for part in ("model", "optimizer", "stage", "step", "ended"):
        a_part, b_part = dict(tensors(a[part], part)), dict(tensors(b[part], part))
        assert a_part.keys() == b_part.keys()
        for name, value in a_part.items():
            equal = torch.equal(value, b_part[name]) if isinstance(value, torch.Tensor) else value == b_part[name]
            assert equal, name
    assert Path(one, "log.jsonl").read_bytes() == Path(other, "log.jsonl").read_bytes()
    assert not list(Path(one).rglob("*.tmp"))
    if Path(other, "metrics.json").exists():
        a, b = metrics_of(one), metrics_of(other)
        for values in (a, b):
            assert values.pop("seconds") > 0
            values["settings"].pop("codebook", None)
        assert a == b


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run folder of DRAEM that is only read."""
    out = tmp_path_factory.mktemp("trained")
    assert train.main([*DRAEM, "--data", str(data), "--steps", "60", "--lr", "5e-3", "--out", str(out), "--save-maps"]
                      ) == 0
    return out / "draem" / "weave"


def test_draem_trains_and_leaves_a_run_folder(trained, data):
    rows = log_rows(trained)
    assert [row["step"] for row in rows] == [1, 5, 20, 50, 60]
    for row in rows:
        assert set(row) == {"stage", "step", "l2", "ssim", "focal", "lr"} and row["stage"] == "train"
    for term in ("l2", "ssim", "focal"):
        assert rows[-1][term] < rows[0][term], term
    # 4/7 and 6/7 of 60 steps: the 35th and the 52nd step are the first with a tenth and a hundredth
    assert [row["lr"] for row in rows] == pytest.approx([5e-3, 5e-3, 5e-3, 5e-4, 5e-5])
    files = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
    pictures = {f"maps/{part}/00{i}.png" for part in ("good", "hole", "dirt") for i in range(2)}
    assert files == {"last.pt", "log.jsonl", "metrics.json", "summary.png", *pictures}
    found = metrics_of(trained)
    assert set(found) == MEANS | {"category", "settings", "seed", "seconds"}
    assert all(0 <= found[name] <= 1 for name in MEANS) and found["category"] == "weave" and found["seed"] == 0
    assert found["settings"] == {"method": "draem", "data": str(data), "textures": None, "width": 2, "sspcab": False,
                                 "batch": 6, "steps": 60, "lr": 5e-3, "beta": [0.1, 1.0], "size": 32, "seed": 0,
                                 "precision": "fp32"}
    with Image.open(trained / "maps/hole/000.png") as strip:  # image, reconstruction, map over image, truth
        assert strip.size == (4 * 32 + 3 * common.GAP, 32)
    assert json.loads(json.dumps(torch.load(trained / "last.pt", weights_only=True)["run"])) == found["settings"]


def test_metrics_are_those_of_the_saved_weights(trained, data):
    """Once more from last.pt, by the model's own predict and all maps at once."""
    model, category = draem.load_draem(trained / "last.pt"), common.find_categories(data)[0]
    images = torch.stack([common.read_image(path, 32) for path in category.test])
    masks = torch.stack([torch.zeros(1, 32, 32, dtype=torch.uint8) if path is None else common.read_mask(path, 32)
                         for path in category.masks])
    score, maps = model.predict(images / 255)
    labels, found = torch.tensor(category.labels), metrics_of(trained)
    image = common.Ranking(len(score)).add(score, labels).metrics()
    pixel = common.Ranking(maps.numel()).add(maps, common.connected_components(masks[:, 0])).metrics()
    assert [found[f"image_{name}"] for name in ("auroc", "ap", "f1")] == pytest.approx(
        [image[name] for name in ("auroc", "ap", "f1")])
    assert [found[f"pixel_{name}"] for name in ("auroc", "ap", "aupro")] == pytest.approx(
        [pixel[name] for name in ("auroc", "ap", "aupro")], abs=1e-4)


def test_maps_for_mvtecs_script(trained, data):
    """anomaly_maps/CATEGORY/test/DEFECT/NAME.tiff: one channel, 32-bit float, as large as the image."""
    root = trained.parent / "anomaly_maps" / "weave" / "test"
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*.*")) == sorted(
        str(path.relative_to(data / "test").with_suffix(".tiff")) for path in (data / "test").rglob("*.png"))
    with Image.open(root / "hole" / "000.tiff") as tiff:
        assert tiff.mode == "F" and tiff.size == (40, 36) and 0 <= np.asarray(tiff).min() <= np.asarray(tiff).max() <= 1


def test_a_seed_gives_a_run_and_another_another(data, command):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert command(*DRAEM, "--data", data, "--steps", 3, "--seed", seed, "--out", out)[0] == 0
    same_run("a/draem/weave", "b/draem/weave")
    assert log_rows("a/draem/weave") != log_rows("c/draem/weave")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("name, argv, cuts", [
    ("draem", [*DRAEM, "--steps", "8"], (0, 3, 8)),
    ("draem", [*DRAEM, "--steps", "8", "--sspcab", "--textures", "DATA/test"], (5,)),
    ("dsr", [*DSR, "--pretrain", "DATA/train"], (2, 4, 6, 8, 10, 12))])
def test_an_interrupted_run_ends_like_one_that_was_not(name, argv, cuts, data, command, monkeypatch):
    """Cut before that many steps, of all stages counted through; the last cut is before the evaluation."""
    argv = [arg.replace("DATA", str(data)) for arg in (*argv, "--data", str(data), "--save-minutes", "0")]
    assert command(*argv, "--out", "whole")[0] == 0
    advance, evaluate, taken = train.advance, train.evaluate, []

    def cut(*arguments):
        if len(taken) == stop:
            raise Killed
        taken.append(1)
        return advance(*arguments)

    def cut_evaluation(*arguments):
        raise Killed

    monkeypatch.setattr(train, "advance", cut)
    for stop in cuts:
        monkeypatch.setattr(train, "evaluate", cut_evaluation)
        with pytest.raises(Killed):
            command(*argv, "--out", "cut", "--resume")
    stop = None
    monkeypatch.setattr(train, "evaluate", evaluate)
    status, out, _ = command(*argv, "--out", "cut", "--resume")
    assert status == 0 and len(taken) == (12 if name == "dsr" else 8)  # no step twice
    for folder in Path("whole", name).glob("[a-z]*"):
        same_run(Path("cut", name, folder.name), folder)


def test_steps_between_checkpoints_are_taken_and_logged_again(data, command, monkeypatch):
    """The last checkpoint is some steps old: the log has lines after it, the last of them half-written."""
    argv = [*DRAEM, "--data", data, "--steps", 7]
    assert command(*argv, "--out", "whole")[0] == 0
    save, advance, taken = train.Run.save, train.advance, []
    def cut(*arguments):
        taken.append(1)
        if len(taken) == 7:
            raise Killed
        return advance(*arguments)

    def save_step_4(run, stage, step, *rest):
        if step == 4:
            save(run, stage, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "advance", cut)
        patch.setattr(train.Run, "save", save_step_4)
        command(*argv, "--out", "cut", "--save-minutes", 0)
    assert [row["step"] for row in log_rows("cut/draem/weave")] == [1, 5]
    with open("cut/draem/weave/log.jsonl", "a") as log:
        log.write('{"stage": "train", "st')
    assert command(*argv, "--out", "cut", "--resume")[0] == 0
    same_run("cut/draem/weave", "whole/draem/weave")


@pytest.mark.parametrize("option, old, new", [
    ("--size", "32", "64"), ("--width", "2", "4"), ("--batch", "6", "5"), ("--seed", "0", "7"),
    ("--lr", "0.0001", "0.001"), ("--steps", "3", "2"), ("--sspcab", "False", None), ("--beta", "0.1", ("0.2", "1.0")),
    ("--data", "weave", "OTHER"), ("--textures", "not given", "OTHER")])
def test_resume_refuses_another_setting(option, old, new, data, command, tmp_path_factory):
    done = tmp_path_factory.getbasetemp() / "refusals"
    argv = [*DRAEM, "--steps", "3", "--out", done]
    if not done.exists():
        assert command(*argv, "--data", data)[0] == 0
    before = {path: path.read_bytes() for path in done.rglob("*") if path.is_file()}
    if new == "OTHER":
        new = draw_data("other/weave")
    values = () if new is None else new if isinstance(new, tuple) else (new,)
    status, _, err = command(*argv, "--data", data, "--resume", option, *values)
    assert status == 2 and err.count("\n") == 1 and f"{option} " in err
    assert old in err and (str(values[0]) if values else "True") in err
    assert before == {path: path.read_bytes() for path in done.rglob("*") if path.is_file()}


def test_more_steps_after_the_end_continue(data, command):
    argv = [*DRAEM, "--data", data, "--resume", "--save-minutes", 0]
    status, out, _ = command(*argv, "--steps", 3)
    assert status == 0 and "starts at the beginning" in out
    status, out, _ = command(*argv, "--steps", 6)
    assert status == 0 and "resumed after step 3" in out
    assert [row["step"] for row in log_rows("runs/draem/weave")] == [1, 3, 5, 6]
    assert metrics_of("runs/draem/weave")["settings"]["steps"] == 6


def test_an_earlier_run_is_kept_aside(data, command):
    argv = [*DRAEM, "--data", data, "--steps", 2]
    for _ in range(2):
        assert command(*argv)[0] == 0
    kept = Path("runs/draem/weave/last.pt").read_bytes()
    status, out, _ = command(*argv)
    assert status == 0 and "earlier run" in out and "weave.2" in out
    assert Path("runs/draem/weave.2/last.pt").read_bytes() == kept
    same_run("runs/draem/weave.2", "runs/draem/weave.1")


def test_a_second_run_in_the_same_folder_is_refused(data, command):
    Path("runs/draem").mkdir(parents=True)
    holder = subprocess.Popen([sys.executable, "-c", "import fcntl, sys; f = open('runs/draem/.weave.lock', 'a'); "
                               "fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        status, _, err = command(*DRAEM, "--data", data, "--steps", 2)
        assert status == 2 and "another run" in err and "--out" in err and err.count("\n") == 1
        assert not Path("runs/draem/weave").exists()
    finally:
        holder.communicate()
    assert command(*DRAEM, "--data", data, "--steps", 2)[0] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and prediction


def test_checkpoint_is_evaluated_without_training(trained, data, command):
    before = (trained / "last.pt").read_bytes()
    status, out, _ = command("draem", "--checkpoint", trained / "last.pt", "--data", data, "--precision", "fp32")
    assert status == 0 and "step" not in out and (trained / "last.pt").read_bytes() == before
    found, trained_found = metrics_of("runs/draem/weave-checkpoint"), metrics_of(trained)
    assert {name: found[name] for name in MEANS} == {name: trained_found[name] for name in MEANS}
    assert found["settings"]["size"] == 32  # the checkpoint's
    assert {path.name for path in Path("runs/draem").iterdir()} == {"weave-checkpoint"}


def test_predict_scores_files_and_folders_and_names_bad_ones(trained, data, command):
    Path("photos/more [1]").mkdir(parents=True)
    whole = (data / "test/hole/000.png").read_bytes()
    Path("photos/a b.png").write_bytes(whole)
    Path("photos/more [1]/a b.png").write_bytes(whole)
    Path("photos/more [1]/half.png").write_bytes(whole[:len(whole) // 2])
    Path("photos/text.png").write_text("no image")
    one = data / "test/good/001.png"
    argv = ["draem", "--checkpoint", trained / "last.pt", "--precision", "fp32", "--predict"]
    status, out, err = command(*argv, one, "photos", "--save-maps")
    assert status == 2
    assert len(err.splitlines()) == 2 and "photos/more [1]/half.png" in err and "photos/text.png" in err
    rows = [line.rsplit(" ", 1) for line in out.splitlines()]
    assert [path for path, _ in rows] == [str(one), "photos/a b.png", "photos/more [1]/a b.png"]
    model = draem.load_draem(trained / "last.pt")
    images = torch.stack([common.read_image(path, 32) for path, _ in rows])
    assert [float(score) for _, score in rows] == pytest.approx(model.predict(images / 255, 3)[0].tolist(), abs=2e-6)
    assert {path.name for path in Path("runs/draem/predictions").iterdir()} == {
        f"{name}.{kind}" for name in ("001", "a b", "a b.2") for kind in ("png", "tiff")}
    assert command(*argv, one) == (0, out.splitlines(True)[0], "")


def test_names_that_are_not_utf_8(trained, data):
    name = b"\xff\xfe [1] *.png"
    Path(os.fsdecode(b"w\xff")).mkdir()
    Path(os.fsdecode(b"w\xff"), os.fsdecode(name)).write_bytes((data / "test/hole/000.png").read_bytes())
    Path(os.fsdecode(b"w\xff"), os.fsdecode(b"\xfe.png")).write_bytes(b"")
    done = launch("draem", "--checkpoint", trained / "last.pt", "--predict", os.fsdecode(b"w\xff"), "--device", "cpu")
    assert done.returncode == 2 and re.fullmatch(rb"w\xff/\xff\xfe \[1\] \*\.png \d\.\d{6}\n", done.stdout)
    assert done.stderr.count(b"\n") == 1 and rb"w\udcff/\udcfe.png" in done.stderr


def test_a_category_whose_name_is_not_utf_8(data, capfdbinary):
    folder = draw_data(Path(os.fsdecode(b"w\xff")), defects=("hole",))
    done = launch(*DRAEM, "--data", folder, "--steps", "2")
    assert done.returncode == 0, done.stderr
    again = launch(*DRAEM, "--data", folder, "--steps", "2", "--resume")
    assert again.returncode == 0 and metrics_of(Path("runs/draem") / folder)["category"] == str(folder)


def test_a_plain_folder_of_images_trains(data, command):
    status, out, _ = command(*DRAEM, "--data", data / "train" / "good", "--steps", 2)
    assert status == 0 and "nothing was evaluated" in out and "image auroc" not in out
    assert Path("runs/draem/good/last.pt").exists() and not MEANS & set(metrics_of("runs/draem/good"))


def test_missing_masks_leave_pixel_metrics_out(command):
    draw_data("bare", masks=False)
    status, out, _ = command(*DFM, "--data", "bare")
    assert status == 0 and "4 defective images without a mask" in out
    assert set(metrics_of("runs/dfm/bare")) & MEANS == {"image_auroc", "image_ap", "image_f1"}
    draw_data("part")
    Path("part/ground_truth/hole/000_mask.png").unlink()
    status, out, _ = command(*DFM, "--data", "part")
    assert status == 0 and "1 defective images without a mask" in out and MEANS <= set(metrics_of("runs/dfm/part"))


def test_a_test_set_without_defects_or_without_normal_images(command):
    draw_data("fine", defects=())
    status, out, _ = command(*DFM, "--data", "fine")
    assert status == 0 and "no defective images" in out and not MEANS & set(metrics_of("runs/dfm/fine"))
    draw_data("bad", good=0)
    status, out, _ = command(*DFM, "--data", "bad")
    assert status == 0 and "no normal images" in out
    assert MEANS & set(metrics_of("runs/dfm/bad")) == {"pixel_auroc", "pixel_ap", "pixel_aupro"}


def test_more_images_than_a_batch_are_read_by_workers(trained, data, command):
    argv = ["draem", "--checkpoint", trained / "last.pt", "--data", data, "--precision", "fp32"]
    for batch in (2, 50):
        assert command(*argv, "--batch", batch, "--out", str(batch))[0] == 0 and not multiprocessing.active_children()
    few, many = (metrics_of(f"{batch}/draem/weave-checkpoint") for batch in (2, 50))
    assert [few[name] for name in MEANS] == pytest.approx([many[name] for name in MEANS], abs=1e-3)


def table_of(out):
    """Name -> figures of the printed table; None where there is a dash."""
    lines = out[out.index("category"):].splitlines()[1:]
    return {line.split()[0]: [None if word == "-" else float(word) for word in line.split()[1:]]
            for line in lines if line.count(".") >= 3}


def test_a_parent_folder_gives_a_table_with_means(command):
    for seed, name in enumerate(("b", "a", "c")):
        draw_data(f"parent/{name}", seed=seed, masks=name != "b")
    status, out, _ = command(*DFM, "--data", "parent")
    table = table_of(out)
    assert status == 0 and list(table) == ["a", "b", "c", "mean"] and table["b"][3:] == [None] * 3
    columns = ("image_auroc", "image_ap", "image_f1", "pixel_auroc", "pixel_ap", "pixel_aupro")
    for name in "abc":
        found = metrics_of(f"runs/dfm/{name}")
        assert table[name] == [pytest.approx(found[c], abs=1e-4) if c in found else None for c in columns]
    for i in range(6):
        known = [table[name][i] for name in "abc" if table[name][i] is not None]
        assert table["mean"][i] == pytest.approx(sum(known) / len(known), abs=1e-4)


def test_a_bad_category_does_not_stop_the_others(command):
    for name in ("a", "b", "c"):
        draw_data(f"parent/{name}")
    Path("parent/b/train/good/001.png").write_bytes(b"")
    status, out, err = command(*DFM, "--data", "parent")
    assert status == 2 and list(table_of(out)) == ["a", "c", "mean"]
    assert err.count("\n") == 1 and "b: parent/b/train/good/001.png" in err and not Path("runs/dfm/b").exists()


# ---------------------------------------------------------------------------------------------------------------------
# DFM and DSR


def test_dfm_fre_and_nll(data, command):
    status, out, _ = command(*DFM, "--data", data, "--out", "fre")
    assert status == 0 and MEANS <= set(metrics_of("fre/dfm/weave")) and Path("fre/dfm/weave/summary.png").exists()
    status, out, _ = command(*DFM, "--data", data, "--score", "nll", "--out", "nll")
    assert status == 0 and "no maps" in out and not Path("nll/dfm/weave/maps").exists()
    assert MEANS & set(metrics_of("nll/dfm/weave")) == {"image_auroc", "image_ap", "image_f1"}
    status, again, _ = command("dfm", "--checkpoint", "fre/dfm/weave/last.pt", "--data", data, "--batch", 6,
                               "--precision", "fp32")
    assert status == 0 and {k: metrics_of("runs/dfm/weave-checkpoint")[k] for k in MEANS} == {
        k: metrics_of("fre/dfm/weave")[k] for k in MEANS}


def test_dfm_joint(command):
    for seed, name in enumerate(("a", "b")):
        draw_data(f"parent/{name}", seed=seed)
    status, out, _ = command(*DFM, "--data", "parent", "--joint")
    assert status == 0 and list(table_of(out)) == ["a", "b", "mean"]
    state = torch.load("runs/dfm/joint/last.pt", weights_only=True)["model"]
    assert {key.split(".")[1] for key in state if key.startswith("pca.")} == {"0", "1"}  # one PCA a category
    assert {path.name for path in Path("runs/dfm/joint").iterdir()} == {"last.pt", "a", "b"}


def test_a_codebook_is_trained_once(data, command):
    argv = [*DSR, "--data", data, "--pretrain", data / "train"]
    status, out, _ = command(*argv)
    assert status == 0 and "stage 1 on 4 images" in out and MEANS <= set(metrics_of("runs/dsr/weave"))
    assert Path("runs/dsr/codebook-train/reconstructions.png").exists()
    assert [row["stage"] for row in log_rows("runs/dsr/weave")] == ["detection"] * 2 + ["upsampling"] * 2
    book = Path("runs/dsr/codebook-train/last.pt").read_bytes()
    status, out, _ = command(*argv)
    assert status == 0 and "was done before" in out and Path("runs/dsr/codebook-train/last.pt").read_bytes() == book
    same_run("runs/dsr/weave", "runs/dsr/weave.1")
    status, _, _ = command(*DSR, "--data", data, "--codebook", "runs/dsr/codebook-train/last.pt", "--out", "given")
    assert status == 0
    same_run("given/dsr/weave", "runs/dsr/weave")


def test_images_streamed_by_workers_train_the_same_codebook(data, command, monkeypatch):
    argv = [*DSR, "--data", data, "--pretrain", data / "train"]
    monkeypatch.setattr(train, "run_category", lambda *_: {})
    assert command(*argv, "--out", "resident")[0] == 0
    monkeypatch.setattr(train, "RESIDENT", 0)
    assert command(*argv, "--out", "streamed")[0] == 0 and not multiprocessing.active_children()
    same_run("streamed/dsr/codebook-train", "resident/dsr/codebook-train")


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


def test_two_ranks_share_the_categories_out(command):
    """DSR over three categories, one of them bad: stage 1 by both ranks, held against one rank with the whole batch."""
    for seed, name in enumerate(("a", "b", "c")):
        draw_data(f"parent/{name}", seed=seed)
    Path("parent/b/train/good/001.png").write_bytes(b"")
    draw_data("books")
    argv = [*DSR, "--data", "parent", "--pretrain", "books/train", "--steps", "1", "--upsampling-steps", "1"]
    done = launch(*argv, "--out", "two", ranks=2)
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode and list(table_of(out)) == ["a", "c", "mean"] and out.count("image auroc") == 1
    assert len(re.findall("^train.py: rank 1: b: parent/b/train/good/001.png: ", err, re.M)) == 1
    assert sorted(path.name for path in Path("two/dsr").glob("[a-z]*")) == ["a", "c", "codebook-train"]
    assert command(*argv, "--out", "one")[0] == 2
    two, one = (torch.load(f"{out}/dsr/codebook-train/last.pt", weights_only=True) for out in ("two", "one"))
    assert two["step"] == one["step"] == 4 and two["run"] == one["run"]
    for name, value in one["model"].items():
        apart = (two["model"][name].float() - value.float()).norm() / value.float().norm()
        assert apart < 0.02, name  # rounding may give a feature to the other of two near codes


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds a rank's process in /proc")
def test_ranks_stop_together_though_one_alone_is_told_to(data):
    log = Path("runs/dsr/codebook-train/log.jsonl")
    argv = [*DSR, "--data", data, "--pretrain", data / "train"]
    argv[argv.index("--pretrain-steps") + 1] = "1000000"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", ROOT / "train.py"]
    process = subprocess.Popen([*launcher, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        begun = time.monotonic()
        while not (log.exists() and log.read_text().count("\n") > 3):
            assert process.poll() is None and time.monotonic() - begun < 100
            time.sleep(0.1)
        ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        second = next(pid for pid in ranks if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
        os.kill(second, signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode and b"stopped after step" in err
    assert torch.load(log.with_name("last.pt"), weights_only=True)["step"] >= 50


def test_ranks_without_a_launcher_are_one_line(data):
    done = launch(*DFM, "--data", data, env={"WORLD_SIZE": "2"})
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1, done.stderr


@pytest.mark.parametrize("argv", [[*DRAEM, "--sspcab", "--steps", 3], [*DSR, "--pretrain", "DATA/train"], DFM],
                         ids=lambda argv: argv[0])
def test_compiled_networks_are_whole_graphs_and_change_nothing(argv, data, command, monkeypatch):
    """The graphs are run as they were captured, which needs no C++ compiler; one that breaks is an error."""
    compiled = []

    def capture(module):
        compiled.append(type(module))
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch.nn.Module, "compile", capture)
    argv = [str(arg).replace("DATA", str(data)) for arg in argv]
    assert command(*argv, "--data", data, "--out", "eager")[0] == 0 and not compiled
    assert command(*argv, "--data", data, "--out", "whole", "--compile")[0] == 0
    assert compiled and all(issubclass(kind, train.COMPILED) for kind in compiled)
    assert MEANS <= set(metrics_of(Path("whole", argv[0], "weave")))
    for log in Path("eager").rglob("log.jsonl"):  # DFM has none
        for one, other in zip(log_rows(log.parent), log_rows(Path("whole", *log.parent.parts[1:])), strict=True):
            assert other.pop("stage") == one.pop("stage") and other == pytest.approx(one, rel=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize("argv, lacks", [
    (DRAEM, ()), ([*DSR, "--pretrain", "DATA/train"], ()), (DFM, ("synthesis_images_per_s",))])
def test_bench(argv, lacks, data, command):
    status, out, _ = command(*(arg.replace("DATA", str(data)) for arg in argv), "--data", data, "--bench", 2)
    figures = json.loads(out.splitlines()[-1])
    keys = {"method", "device", "precision", "size", "batch", "train_ms", "train_images_per_s", "predict_ms",
            "predict_images_per_s", "synthesis_images_per_s", "peak_memory_mib"}
    assert status == 0 and set(figures) == keys - set(lacks)
    assert figures["method"] == argv[0] and figures["batch"] == 6 and figures["device"] == "cpu"
    assert figures["train_images_per_s"] == pytest.approx(6000 / figures["train_ms"], rel=1e-3)
    assert not Path("runs", argv[0], "weave").exists()


@pytest.mark.parametrize("method", train.TOY)
def test_help_prints_published_values_and_the_toy_resolves_to_its_own(method, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "run_all", lambda args: seen.append(args) or 0)
    with pytest.raises(SystemExit) as left:
        train.main([method, "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0
    published = {
        "draem": ("side; default: 256", "half; default: 128", "images; default: 700", "a step; default: 8"),
        "dsr": ("1; default: 200000", "modules; default: 64", "codebook; default: 4096", "3; default: 20000"),
        "dfm": ("default: resnet50", "taken; default: layer3", "pooling; default: 4", "above 1; default: 0.97")}
    for value in published[method]:
        assert value in words
    assert train.main([method]) == train.main([method, "--size", "96"]) == train.main([method, "--data", "x"]) == 0
    toy, sized, real = (vars(args) for args in seen)
    assert toy["toy"] and toy.items() >= train.TOY[method].items()
    assert sized["size"] == 96 and sized.items() >= {k: v for k, v in train.TOY[method].items() if k != "size"}.items()
    assert not real["toy"] and real["size"] == 256


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


def prepare_mistakes(data, trained):
    """The files that MISTAKES speak of, below the current folder."""
    Path("empty").mkdir()
    Path("file").write_text("x")
    draw_data("text")
    Path("text/train/good/002.png").write_text("no image")
    draw_data("short")
    whole = Path("short/train/good/001.png").read_bytes()
    Path("short/train/good/001.png").write_bytes(whole[:len(whole) // 2])
    draw_data("only", train_count=0)
    last, state = (trained / "last.pt").read_bytes(), torch.load(trained / "last.pt", weights_only=True)
    Path("half.pt").write_bytes(last[:len(last) // 2])
    Path("flipped.pt").write_bytes(last[:5000] + bytes([last[5000] ^ 1]) + last[5001:])
    torch.save({"weights": torch.zeros(3)}, "foreign.pt")
    torch.save([1, 2], "list.pt")
    torch.save(state | {"method": "dsr"}, "dsr.pt")
    torch.save({"model": Evil(), "method": "draem"}, "evil.pt")
    torch.save(state | {"run": {"size": 100}}, "size.pt")
    weights = dict(state["model"])
    first = next(iter(weights))
    torch.save(state | {"model": weights | {first: weights[first] * math.nan}}, "nan.pt")
    torch.save(state | {"model": {k: v for k, v in weights.items() if k != first}}, "lacks.pt")
    torch.save(state | {"model": weights | {first: weights[first][:1, :1]}}, "shape.pt")


MISTAKES = {  # name: (arguments after DATA is put in, what the line must say)
    "no method": ([], "required"),
    "unknown method": (["yolo"], "yolo.*choose|invalid choice: 'yolo'"),
    "unknown option": ([*DRAEM, "--data", "DATA", "--fast"], "--fast"),
    "no such folder": ([*DRAEM, "--data", "nowhere"], "nowhere: no such folder"),
    "file for a folder": ([*DRAEM, "--data", "file"], "file: is not a folder"),
    "empty folder": ([*DRAEM, "--data", "empty"], "empty: holds no images"),
    "test alone": ([*DRAEM, "--data", "only"], "only: images in test/ would"),
    "text named png": ([*DRAEM, "--data", "text"], "text/train/good/002.png"),
    "truncated image": ([*DRAEM, "--data", "short"], "short/train/good/001.png.*truncated"),
    "no textures": ([*DRAEM, "--data", "DATA", "--textures", "nowhere"], "nowhere"),
    "empty textures": ([*DRAEM, "--data", "DATA", "--textures", "empty"], "empty: holds no images"),
    "size 100": ([*DRAEM, "--size", "100"], "--size: 100 .*96 and 128"),
    "size 0": ([*DRAEM, "--size", "0"], "--size: '0' .*32"),
    "size -32": ([*DRAEM, "--size", "-32"], "--size: '-32'"),
    "size of dsr": ([*DSR, "--size", "32"], "--size: 32 .*64"),
    "size x": ([*DRAEM, "--size", "x"], "--size: 'x' is not a whole number"),
    "batch 0": ([*DRAEM, "--batch", "0"], "--batch: '0'"),
    "one 32": ([*DRAEM, "--batch", "1"], "--batch: 1 .*--size 64"),
    "steps 0": ([*DRAEM, "--steps", "0"], "--steps: '0'"),
    "steps 1.5": ([*DRAEM, "--steps", "1.5"], "--steps: '1.5'"),
    "epochs -1": ([*DRAEM, "--epochs", "-1"], "--epochs: '-1'"),
    "seed -1": ([*DRAEM, "--seed", "-1"], "--seed: '-1'"),
    "lr 0": ([*DRAEM, "--lr", "0"], "--lr: '0' .*above 0"),
    "lr nan": ([*DRAEM, "--lr", "nan"], "--lr: 'nan'"),
    "beta reversed": ([*DRAEM, "--beta", "0.9", "0.1"], "--beta: 0.9 0.1 is reversed"),
    "one beta": ([*DRAEM, "--beta", "0.9"], "--beta: expected 2"),
    "width 1": ([*DRAEM, "--width", "1"], "--width: '1'"),
    "variance 0": ([*DFM, "--variance", "0"], "--variance: '0' .*above 0"),
    "pooling 0": ([*DFM, "--pooling", "0"], "--pooling: '0'"),
    "pooling too large": ([*DFM, "--data", "DATA", "--pooling", "64"], "pooling"),
    "backbone": ([*DFM, "--backbone", "resnet19"], "resnet19"),
    "no weights file": ([*DFM, "--data", "DATA", "--weights", "nowhere.pth"], "nowhere.pth: No such file"),
    "other weights file": ([*DFM, "--data", "DATA", "--weights", "foreign.pt"], "foreign.pt.*missing.*conv1"),
    "codes 20": ([*DSR, "--codes", "20"], "--codes: '20'"),
    "no codebook": ([*DSR, "--data", "DATA", "--codebook", "nowhere.pt"], "nowhere.pt: No such file"),
    "foreign codebook": ([*DSR, "--data", "DATA", "--codebook", "foreign.pt"], "foreign.pt.*missing"),
    "codebook twice": ([*DSR, "--codebook", "a", "--pretrain", "b"], "--pretrain: .*--codebook"),
    "nothing to pretrain on": ([*DSR, "--data", "DATA", "--pretrain", "empty"], "empty: holds no images"),
    "device cuda": ([*DRAEM, "--data", "DATA", "--device", "cuda"], "--device cuda: .*--device cpu"),
    "device nonsense": ([*DRAEM, "--data", "DATA", "--device", "gpu"], "--device gpu: .*--device cpu"),
    "device meta": ([*DRAEM, "--data", "DATA", "--device", "meta"], "--device meta: .*--device cpu"),
    "out is a file": ([*DRAEM, "--data", "DATA", "--steps", "1", "--out", "file"], "file"),
    "predict alone": (["draem", "--predict", "DATA"], "--predict: needs --checkpoint"),
    "checkpoint alone": (["draem", "--checkpoint", "TRAINED"], "--checkpoint: needs --data"),
    "nothing to predict": (["draem", "--checkpoint", "TRAINED", "--predict", "nowhere"], "nowhere: no such"),
    "no checkpoint": (["draem", "--checkpoint", "nowhere.pt", "--data", "DATA"], "nowhere.pt: No such file"),
    "a folder": (["draem", "--checkpoint", "empty", "--data", "DATA"], "empty: Is a directory"),
    "another method's": (["dfm", "--checkpoint", "TRAINED", "--data", "DATA"], "of draem, not of dfm"),
    "another method's, too": (["draem", "--checkpoint", "dsr.pt", "--data", "DATA"], "dsr, not of draem"),
    "an image": (["draem", "--checkpoint", "DATA/test/hole/000.png", "--data", "DATA"], "000.png: truncated, or not"),
    "half a checkpoint": (["draem", "--checkpoint", "half.pt", "--data", "DATA"], "half.pt: truncated, or not"),
    "a flipped bit": (["draem", "--checkpoint", "flipped.pt", "--data", "DATA"], "flipped.pt: damaged"),
    "foreign": (["draem", "--checkpoint", "foreign.pt", "--data", "DATA"], "foreign.pt: neither .*weights"),
    "a list": (["draem", "--checkpoint", "list.pt", "--data", "DATA"], "list.pt: expected a dict"),
    "code": (["draem", "--checkpoint", "evil.pt", "--data", "DATA"], "evil.pt: .*could run code"),
    "code to predict with": (["dsr", "--checkpoint", "evil.pt", "--predict", "DATA"], "evil.pt: .*could run code"),
    "code for weights": ([*DFM, "--data", "DATA", "--weights", "evil.pt"], "evil.pt: .*could run code"),
    "code for a codebook": ([*DSR, "--data", "DATA", "--codebook", "evil.pt"], "evil.pt: .*could run code"),
    "NaN weights": (["draem", "--checkpoint", "nan.pt", "--data", "DATA"], "nan.pt.*not finite.*block1.0.weight"),
    "weights lacking": (["draem", "--checkpoint", "lacks.pt", "--data", "DATA"], "lacks.pt.*missing.*block1.0.weight"),
    "another shape": (["draem", "--checkpoint", "shape.pt", "--data", "DATA"], "shape.pt.*of another shape"),
    "stored size 100": (["draem", "--checkpoint", "size.pt", "--data", "DATA"], "100 is not a multiple"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, data, trained, command):
    if name == "device cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    prepare_mistakes(data, trained)
    argv, words = MISTAKES[name]
    before = {path for path in Path().rglob("*")}
    argv = [arg.replace("DATA", str(data)).replace("TRAINED", str(trained / "last.pt")) for arg in argv]
    status, _, err = command(*argv)
    assert status == 2 and err.count("\n") == 1 and err.startswith("train.py: "), err
    assert re.search(words, err), err
    assert {path for path in Path().rglob("*")} == before  # no run folder, and no code was run


@pytest.mark.parametrize("file, words", [
    ("half.pt", "truncated, or not"), ("foreign.pt", "not a checkpoint of draem"), ("dsr.pt", "not a checkpoint"),
    ("evil.pt", "could run code"), ("flipped.pt", "damaged"), ("list.pt", "expected a dict"),
    ("nan.pt", "not finite"), ("shape.pt", "another shape")])
def test_resume_from_a_bad_checkpoint_is_one_line_and_leaves_it(file, words, data, trained, command):
    prepare_mistakes(data, trained)
    last = Path("runs/draem/weave/last.pt")
    last.parent.mkdir(parents=True)
    last.write_bytes(Path(file).read_bytes())
    argv = [*DRAEM, "--data", data, "--steps", 60, "--lr", 5e-3, "--resume"]
    status, _, err = command(*argv)
    assert status == 2 and err.count("\n") == 1 and str(last) in err and re.search(words, err), err
    assert last.read_bytes() == Path(file).read_bytes() and not Path("ran").exists()
    last.unlink()
    assert command(*argv[:-5], "--steps", 1)[0] == 0  # the refused one holds nothing that is in the way


def test_a_failed_download_names_the_ways_on(data, command, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", "hub")
    monkeypatch.setitem(train.dfm.URLS, "resnet18", "file:///nowhere/resnet18-f37072fd.pth")
    argv = [arg for arg in DFM if arg not in ("--weights", "random")]
    status, _, err = command(*argv, "--data", data)
    assert status == 2 and err.count("\n") == 1 and not Path("runs").exists()
    assert "resnet18-f37072fd.pth" in err and "--weights FILE" in err and "--weights random" in err and "network" in err
    monkeypatch.setattr(train.dsr, "CODEBOOK_URL", "file:///nowhere/book.zip")
    status, _, err = command(*DSR, "--data", data)
    assert status == 2 and err.count("\n") == 1 and not Path("runs").exists()
    assert "book.zip" in err and "--codebook FILE" in err and "--pretrain" in err and "network" in err


def test_memory_that_is_not_there_is_one_line(data, command, monkeypatch):
    monkeypatch.setattr(train.common, "decode", lambda *_: torch.empty(10 ** 15))
    status, _, err = command(*DRAEM, "--data", data)
    assert status == 2 and err == "train.py: out of memory: a smaller --batch, --size or --width needs less\n"


def test_a_fault_of_the_program_is_not_hidden(data, command, monkeypatch):
    monkeypatch.setattr(train, "fit", lambda *_: {}["x"])
    with pytest.raises(KeyError):
        command(*DRAEM, "--data", data)
