"""Runs that are killed, and input that is damaged at random.

Oracles: of a killed and resumed run, one that was left alone, bit for bit; of everything else the promise that there is
an exit status of 0 or 2, lines on stderr that begin with the command's name, and no file outside the run's root.
FUZZ=40 in the environment makes everything here 40 times as long, with further seeds.
"""
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train
from test_train import DFM, DRAEM, DSR, command, data, draw_data, empty_folder, log_rows, one_thread, same_run, trained

FUZZ = int(os.environ.get("FUZZ", 1))

# A process that has imported everything and forks a run at each line of its input: a run starts in milliseconds.
SERVER = """
import json, os, resource, sys
import torch._dynamo  # the first optimizer's step would import it
import train
for line in sys.stdin:
    order = json.loads(line)
    if "start" in order:
        child = os.fork()
        if not child:
            os.chdir(order["folder"])
            for number, name in (0, os.devnull), (1, "stdout"), (2, "stderr"):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
            if order["limit"]:
                resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"],) * 2)
            status = train.main(order["start"])
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        print(child, flush=True)
    else:
        pid, status = os.waitpid(order["reap"], 0 if order["wait"] else os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
"""


class Server:
    def __init__(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen([sys.executable, "-c", SERVER], env=environment, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, **order):
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start(self, argv, limit=None):
        return Started(self, self.ask(start=[str(arg) for arg in argv], folder=os.getcwd(), limit=limit))

    def run(self, argv, limit=None):
        return self.start(argv, limit).wait()


class Started:
    """A run that goes on in a process of its own."""

    def __init__(self, server, pid):
        self.server, self.pid, self.status = server, pid, None

    def ended(self, wait=False):
        if self.status is None:
            self.status = self.server.ask(reap=self.pid, wait=wait)
        return self.status is not None

    def wait(self):
        self.ended(wait=True)
        return self.status, Path("stdout").read_text(), Path("stderr").read_text()

    def send(self, number):
        if not self.ended():
            os.kill(self.pid, number)  # ours until it is reaped
        return self.wait()

    def until(self, reached, seconds=60):
        """Whether that was reached, before the run ended or the time was over."""
        end = time.monotonic() + seconds
        for i in itertools.count():
            if reached():
                return True
            if time.monotonic() > end or i % 20 == 19 and self.ended():
                return False
            time.sleep(0.0003)


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.process.communicate()


# ---------------------------------------------------------------------------------------------------------------------
# Killed

KILLED = {"draem": ([*DRAEM, "--steps", "10"], ["draem/weave"]),
          "sspcab": ([*DRAEM, "--steps", "10", "--sspcab", "--textures", "DATA/test", "--batch", "4"], ["draem/weave"]),
          "dsr": ([*DSR, "--pretrain", "DATA/train", "--batch", "3"], ["dsr/codebook-train", "dsr/weave"])}


def size_of(path):
    try:
        return path.stat().st_size
    except OSError:
        return 0


def written_since(begun, path):
    try:
        return path.stat().st_mtime_ns > begun
    except OSError:
        return False


def total(paths):
    return sum(map(size_of, paths))


@pytest.mark.parametrize("seed", range(FUZZ))
@pytest.mark.parametrize("name", KILLED)
def test_killed_again_and_again_a_run_ends_like_one_left_alone(name, seed, server, data):
    """SIGKILL at random moments: anywhere, while a checkpoint is written, after a line of the log, at a stage's end,
    while maps are drawn or metrics written. Where the batch is smaller than the test set, workers read it: they may
    outlive their run by seconds, and must not hold its folder."""
    pick = random.Random(f"{name} {seed}")
    argv, folders = KILLED[name]
    argv = [arg.replace("DATA", str(data)) for arg in (*argv, "--data", str(data), "--save-minutes", "0")]
    begun = time.monotonic()
    assert server.run([*argv, "--out", "whole"])[0] == 0
    length, cut = time.monotonic() - begun, [Path("cut", folder) for folder in folders]
    logs, temporaries = [folder / "log.jsonl" for folder in cut], [folder / "last.pt.tmp" for folder in cut]

    def at_any_time():
        end = time.monotonic() + pick.uniform(0, 0.4) * length
        return lambda: time.monotonic() > end

    def while_a_checkpoint_is_written():
        return lambda: total(temporaries) > 0

    def after_a_line_of_the_log():
        size = total(logs)
        return lambda: total(logs) > size

    def while_maps_are_drawn():
        count, begun = pick.randint(1, 5), time.time_ns()
        return lambda: sum(written_since(begun, path) for path in cut[-1].glob("maps/*/*.png")) >= count

    def while_metrics_are_written():
        begun = time.time_ns()
        return lambda: any(written_since(begun, path) for path in (*cut[-1].glob("summary.*"), *cut[-1].glob("metr*")))

    early = [at_any_time, while_a_checkpoint_is_written, after_a_line_of_the_log]
    late = [at_any_time, while_maps_are_drawn, while_metrics_are_written]
    steps, kills = size_of(Path("whole", folders[-1], "log.jsonl")), []
    for _ in range(12):
        aim = pick.choice(late if size_of(logs[-1]) == steps else early)
        reached, started = aim(), server.start([*argv, "--out", "cut", "--resume"])
        started.until(reached)
        if started.send(signal.SIGKILL)[0] == -signal.SIGKILL:
            kills.append(aim.__name__)
    status, _, err = server.run([*argv, "--out", "cut", "--resume"])
    print(f"{name} {seed}: killed {len(kills)} times: {kills}")
    assert status == 0 and len(kills) >= 8, err
    for folder in folders:
        same_run(Path("cut", folder), Path("whole", folder))
    pictures = {path.relative_to("whole"): path.read_bytes() for path in Path("whole").rglob("*.png")}
    assert pictures == {path.relative_to("cut"): path.read_bytes() for path in Path("cut").rglob("*.png")}


def test_a_second_run_waits_for_the_first_to_end(server, data, command):
    argv = [*DRAEM, "--data", data, "--steps", 10 ** 6, "--save-minutes", 0]
    first = server.start(argv)
    assert first.until(Path("runs/draem/weave/last.pt").exists)
    log = Path("runs/draem/weave/log.jsonl").read_bytes()
    for more in ((), ("--resume",)):
        status, _, err = command(*argv, *more)
        assert status == 2 and err.count("\n") == 1 and "another run is writing" in err and "--out" in err
    assert Path("runs/draem/weave/log.jsonl").read_bytes().startswith(log) and not Path("runs/draem/weave.1").exists()
    assert first.send(signal.SIGKILL)[0] == -signal.SIGKILL
    status, _, err = command(*argv[:-3], 2, "--resume")
    assert status == 2 and "--steps" in err  # no longer that it is taken


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first_and_says_how_to_go_on(number, server, data):
    argv = [*DRAEM, "--data", data, "--steps", "30"]
    assert server.run([*argv, "--out", "whole"])[0] == 0
    log, last = Path("runs/draem/weave/log.jsonl"), Path("runs/draem/weave/last.pt")
    started = server.start(argv)
    assert started.until(lambda: size_of(log) > 200) and not last.exists()  # ten minutes are not over
    status, out, err = started.send(number)
    words = [line for line in err.splitlines() if line and "decoded" not in line]
    assert status == 128 + number and len(words) == 1 and f"{last} holds" in words[0] and "--resume" in words[0]
    step = torch.load(last, weights_only=True)["step"]
    assert 5 <= step < 30 and f"after step {step} of 30" in words[0]
    status, out, _ = server.run([*argv, "--resume"])
    assert status == 0 and f"resumed after step {step}" in out
    same_run("runs/draem/weave", "whole/draem/weave")


def test_ctrl_c_while_evaluating(server, data):
    argv = [*DRAEM, "--data", data, "--steps", "2", "--batch", "2"]
    assert server.run([*argv, "--out", "whole"])[0] == 0
    started = server.start(argv)
    assert started.until(Path("runs/draem/weave/last.pt").exists)
    status, _, err = started.send(signal.SIGINT)
    if status:  # it may have been done
        words = [line for line in err.splitlines() if line and "decoded" not in line]
        assert status == 130 and len(words) == 1 and "--resume" in words[0], err
    assert server.run([*argv, "--resume"])[0] == 0
    same_run("runs/draem/weave", "whole/draem/weave")


# ---------------------------------------------------------------------------------------------------------------------
# Full disks, bad numbers


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(server, data):
    """No file may grow beyond a limit: that of the checkpoint, of the log, of a map."""
    argv, last = [*DRAEM, "--data", data, "--resume", "--save-maps"], Path("runs/draem/weave/last.pt")
    assert server.run([*argv, "--steps", 12])[0] == 0
    assert server.run([*argv, "--steps", 12, "--out", "fresh"], limit=500)[0] == 2
    assert not Path("fresh/draem/weave/last.pt").exists() and not list(Path("fresh").rglob("*.tmp"))
    before, log = last.read_bytes(), Path("runs/draem/weave/log.jsonl").stat().st_size
    for limit, steps, name in ((len(before) // 2, 13, "last.pt"), (log + 10, 20, "log.jsonl"), (log, 12, "")):
        status, out, err = server.run([*argv, "--steps", steps], limit)
        words = [line for line in err.splitlines() if "decoded" not in line]
        assert status == 2 and len(words) == 1 and name in words[0] and "cannot be written: File too large" in words[0]
        assert last.read_bytes() == before and not list(Path("runs").rglob("*.tmp"))
    status, out, _ = server.run([*argv, "--steps", 14])
    assert status == 0 and "resumed after step 12" in out
    assert [row["step"] for row in log_rows("runs/draem/weave")] == [1, 5, 12, 14]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(value, data, command, monkeypatch):
    loss, calls = train.draem.draem_loss, []

    def breaks(*arguments):
        calls.append(1)
        terms = loss(*arguments)
        return terms | {"ssim": terms["ssim"] * value} if len(calls) == 4 else terms

    monkeypatch.setattr(train.draem, "draem_loss", breaks)
    status, out, err = command(*DRAEM, "--data", data, "--steps", 8, "--save-minutes", 0)
    assert status == 2 and len(calls) == 4 and err.count("\n") == 1
    assert "step 4: the loss is not finite" in err and f"ssim {value:g}" in err and "l2 0." in err and "last.pt" in err
    checkpoint = torch.load("runs/draem/weave/last.pt", weights_only=True)
    assert checkpoint["step"] == 3 and all(value.isfinite().all() for value in checkpoint["model"].values())
    assert command(*DRAEM, "--data", data, "--steps", 8, "--resume")[0] == 0


def test_weights_that_are_not_finite_are_not_saved(data, command, monkeypatch):
    """The gradient may overflow where the loss did not."""
    advance, calls = train.advance, []

    def breaks(stage, optimizer, generator):
        terms = advance(stage, optimizer, generator)
        calls.append(1)
        if len(calls) == 4:
            next(iter(optimizer.param_groups[0]["params"])).data[0] = math.inf
        return terms

    monkeypatch.setattr(train, "advance", breaks)
    status, out, err = command(*DRAEM, "--data", data, "--steps", 8, "--save-minutes", 0)
    assert status == 2 and "step 4: the weights are no longer finite" in err and err.count("\n") == 1
    assert torch.load("runs/draem/weave/last.pt", weights_only=True)["step"] == 3


# ---------------------------------------------------------------------------------------------------------------------
# At random


class Hang(BaseException):
    pass


@pytest.fixture
def checked(capsys):
    """checked(argv) runs the command under a time limit and holds it to the promise; returns status, stdout, stderr."""
    def late(*_):
        raise Hang

    def run(argv):
        capsys.readouterr()
        before = signal.signal(signal.SIGALRM, late)
        signal.alarm(30)
        try:
            status = train.main([str(arg) for arg in argv])
        except SystemExit as left:
            status = left.code  # --help
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__} from {argv}: {error}") from error
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if " images decoded in " not in line]
        assert status in (0, 2) and all(line.startswith("train.py: ") for line in lines), (argv, err)
        assert bool(lines) == (status == 2), (argv, status, err)
        return status, out, lines
    return run


def files_outside(root="runs"):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(Path().rglob("*"))
            if Path(root) not in (path, *path.parents)}


NUMBERS = ["0", "1", "2", "3", "-1", "0.5", "1e9", "1e400", "nan", "inf", "-0", "0x10", "", " 4", "1_0",
           "\u0663", "9" * 400]
PATHS = ["weave", "parent", "nowhere", "text.png", "empty", "", ".", "weave/train", "weave/test",
         "weave/train/good/000.png", "last.pt", "x" * 300, "weave/../weave", "runs", "-", "a\nb", "\udcff", "/dev/null"]
SMALL = {"--size": ["32", "64", "100", "0", "-32", "32.0"], "--batch": ["1", "2", "6", "0"], "--width": ["2", "3", "1"],
         "--hiddens": ["2", "3", "1"], "--codes": ["21", "20", "30"], "--pooling": ["1", "2", "9", "0"],
         "--backbone": ["resnet18", "resnet19"], "--layer": ["layer1", "layer3", "avgpool", "layer9"],
         "--score": ["fre", "nll", "both"], "--weights": ["random", "random", "last.pt", "nowhere"],
         "--precision": ["fp32", "auto", "fp8"], "--out": ["runs/a", "runs/a/b", "text.png", "runs/" + "x" * 300],
         "--device": ["cpu", "cpu", "cpu:0", "cpu:1", "cpu:-1", "meta", "cuda:99", "gpu", ""],
         "--bench": ["1", "0", "x"], "--variance": ["0.5", "0", "3", "1", "1.5", "-1", "nan"]}
FLAGS = ["--sspcab", "--resume", "--save-maps", "--joint"]
PATHED = ["--data", "--textures", "--checkpoint", "--codebook", "--pretrain", "--predict"]
NUMBERED = ["--steps", "--epochs", "--lr", "--seed", "--beta", "--save-minutes", "--pretrain-steps", "--pretrain-batch",
            "--upsampling-steps"]


def random_line(pick):
    """A command line that is mostly well-formed, mostly of small sizes, and mostly wrong somewhere."""
    argv = list({"draem": DRAEM, "dsr": DSR, "dfm": DFM}[pick.choice(["draem", "dsr", "dfm"])])
    if pick.random() < 0.7:
        argv += ["--data", pick.choice(["weave", "parent"])]
    for _ in range(pick.randint(0, 4)):
        kind = pick.random()
        if kind < 0.35:
            option = pick.choice(list(SMALL))
            argv += [option, pick.choice(SMALL[option])]
        elif kind < 0.55:
            argv += [pick.choice(PATHED), *pick.choices(PATHS, k=pick.choice((1, 1, 1, 2)))]
        elif kind < 0.75:
            argv += [pick.choice(NUMBERED), *pick.choices(NUMBERS, k=pick.choice((1, 1, 1, 2)))]
        elif kind < 0.9:
            argv += [pick.choice(FLAGS)]
        else:
            argv.insert(pick.randint(0, len(argv)), pick.choice([*PATHS, "--", "--help", "--no", "-x", "--dev", "--s"]))
    if pick.random() < 0.1:
        del argv[pick.randrange(len(argv))]
    return argv


def test_random_command_lines(data, trained, checked, monkeypatch):
    """Everything is read and built as ever; only the steps are left out, and the toy product is a smaller one."""
    monkeypatch.setattr(train.common, "make_toy", lambda folder: Path(folder))
    monkeypatch.setattr(train, "fit", lambda run, model, *_: run.save("train", 1, model, None, True))
    monkeypatch.setenv("TORCH_HOME", "hub")
    monkeypatch.setitem(train.dfm.URLS, "resnet18", "file:///nowhere/resnet18-f37072fd.pth")
    monkeypatch.setattr(train.dsr, "CODEBOOK_URL", "file:///nowhere/book.zip")
    for name, sizes in train.TOY.items():
        small = {"width": 2, "hiddens": 2, "codes": 21}
        monkeypatch.setitem(train.TOY, name, sizes | {k: v for k, v in small.items() if k in sizes})
    for name in ("weave", "parent/a", "parent/b", "data/toy"):
        draw_data(name, train_count=2, good=1, defects=("hole",))
    Path("empty").mkdir()
    Path("text.png").write_text("x")
    Path("last.pt").write_bytes((trained / "last.pt").read_bytes())
    before, pick, counts = files_outside(), random.Random(0), {0: 0, 2: 0}
    for _ in range(250 * FUZZ):
        status, *_ = checked(random_line(pick))
        counts[status] += 1
    print(f"exit statuses: {counts}")
    after = files_outside()
    assert {path for path in after if path.parts[0] != "hub"} == set(before)
    assert all(after[path] == content for path, content in before.items()) and min(counts.values()) > 20


def mutated(content, other, pick):
    """Bytes flipped, overwritten, cut off, cut out, put in, doubled, blanked, or another file's."""
    content = bytearray(content)
    for _ in range(pick.choice((1, 1, 2, 5))):
        length = len(content)
        at, end = sorted((pick.randrange(length + 1), pick.randrange(length + 1)))
        near = min(length, at + pick.choice((1, 4, 50)))
        kind = pick.randrange(8)
        if kind == 0 and length:
            content[pick.randrange(length)] ^= 1 << pick.randrange(8)
        elif kind == 1:
            content[at:near] = pick.randbytes(near - at)
        elif kind == 2:
            del content[at:]
        elif kind == 3:
            del content[at:near]
        elif kind == 4:
            content[at:at] = pick.randbytes(pick.choice((1, 4, 50)))
        elif kind == 5:
            content[at:at] = content[at:near]
        elif kind == 6:
            content[at:near] = bytes(near - at)
        elif pick.random() < 0.2:
            content[at:end] = other[at:end]
    return bytes(content)


def test_mutated_images(data, trained, checked):
    """Each is scored or named, in folders of fifty; and what cannot be read is not trained on."""
    pick, whole = random.Random(1), {}
    with Image.open(data / "test/hole/000.png") as image:
        for suffix in ("png", "jpg", "bmp", "tif", "gif", "webp", "ppm"):
            image.save(f"whole.{suffix}")
            whole[suffix] = Path(f"whole.{suffix}").read_bytes()
        image.convert("I;16").save("deep.tif")
        image.save("packed.tif", compression="tiff_lzw")
    whole |= {"tiff": Path("deep.tif").read_bytes(), "TIF": Path("packed.tif").read_bytes()}
    Path("photos/train").mkdir(parents=True)
    scored = 0
    for _ in range(6 * FUZZ):
        for old in Path("photos/train").iterdir():
            old.unlink()
        for i in range(50):
            suffix = pick.choice(list(whole))
            content = mutated(whole[suffix], pick.choice(list(whole.values())), pick)
            Path(f"photos/train/{i}.{suffix}").write_bytes(content)
        before = files_outside()
        _, out, lines = checked(["draem", "--checkpoint", trained / "last.pt", "--batch", "50", "--device", "cpu",
                                 "--predict", "photos", "--save-maps"])
        named = {line.split(": ")[1] for line in lines} | {line.rsplit(" ", 1)[0] for line in out.splitlines()}
        assert named == {str(path) for path in Path("photos/train").iterdir()}
        scored += len(out.splitlines())
        status, _, lines = checked([*DFM, "--size", "32", "--layer", "layer1", "--data", "photos"])
        assert status == 2 and len(lines) == 1 and "photos/train/" in lines[0]
        assert files_outside() == before
    print(f"{300 * FUZZ} images, {scored} scored")


def swapped(value, pick):
    """A checkpoint's content with one part of it, at any depth, missing or of another kind, shape or value."""
    junk = [None, 0, -1, 10 ** 20, "x", "train", b"", math.nan, True, [], {}, [1, 2], torch.zeros(2), torch.tensor(0)]
    if isinstance(value, dict) and value and pick.random() < 0.9:
        key = pick.choice(list(value))
        if pick.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: swapped(value[key], pick)}
    if isinstance(value, torch.Tensor) and value.numel() and pick.random() < 0.7:
        return pick.choice([value[None], value.flatten()[:1], value.double(), value * math.nan, value.bool()])
    return pick.choice(junk)


def test_mutated_checkpoints_and_logs(data, trained, checked, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *_: {})
    argv = [*DRAEM, "--data", data, "--save-minutes", 0]
    assert checked([*argv, "--steps", 2])[0] == 0
    assert checked([*argv, "--steps", 2, "--out", "runs/more"])[0] == 0
    assert checked([*DFM, "--data", data])[0] == 0
    folder = Path("runs/draem/weave")
    contents, other = {}, Path("runs/dfm/weave/last.pt").read_bytes()
    for name in ("last.pt", "log.jsonl"):
        contents[name] = (folder / name).read_bytes()
    whole = torch.load(folder / "last.pt", weights_only=True)
    models = {"draem": whole, "dfm": torch.load("runs/dfm/weave/last.pt", weights_only=True)}
    before, pick, counts = files_outside(), random.Random(2), {0: 0, 2: 0}
    for i in range(120 * FUZZ):
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        if i % 4 == 0:
            (folder / "last.pt").write_bytes(mutated(contents["last.pt"], other, pick))
        elif i % 4 == 1:
            torch.save(swapped(whole, pick), folder / "last.pt")
        elif i % 4 == 2:
            (folder / "log.jsonl").write_bytes(mutated(contents["log.jsonl"], contents["last.pt"], pick))
        if i % 4 < 3:
            status, _, lines = checked([*argv, "--steps", 2 + i // 4 % 2, "--resume"])
            if status == 0:
                rows = log_rows(folder)  # whole lines, every step once
                assert len({(row["stage"], row["step"]) for row in rows}) == len(rows)
        else:
            method = pick.choice(list(models))
            torch.save(swapped(models[method], pick), "runs/changed.pt")
            status, _, lines = checked([method, "--checkpoint", "runs/changed.pt", "--device", "cpu", "--predict",
                                        data / "test/hole/000.png"])
        assert len(lines) <= 1
        counts[status] += 1
    print(f"exit statuses: {counts}")
    assert files_outside() == before and min(counts.values()) > 10
