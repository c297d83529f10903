"""Train, evaluate and apply DRAEM, DSR and DFM.

    python train.py draem                                         a generated toy product: minutes on a CPU, no network
    python train.py draem --data mvtec/bottle --textures dtd/images
    python train.py draem --data mvtec --textures dtd/images      every category below, and a table of means
    torchrun --nproc-per-node 8 train.py draem --data mvtec       the categories shared out over GPUs or machines
    python train.py draem --checkpoint runs/draem/bottle/last.pt --predict part.png photos/

A run leaves in runs/METHOD/CATEGORY: last.pt, log.jsonl, metrics.json, maps/ and summary.png.
"""
import argparse
import contextlib
import datetime
import json
import math
import os
import signal
import sys
import time
import traceback
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

import common
import dfm
import draem
from common import Category, ImageFiles, InputError

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs out of one folder there
    fcntl = None

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOADERS = {"draem": draem.load_draem, "dfm": dfm.load_dfm}
# What replaces the published values where neither --data nor the option itself is given, so that minutes on a CPU do.
TOY = {"draem": dict(size=64, width=32, steps=1000), "dfm": dict(size=128, backbone="resnet18", pooling=2)}
LOG_EVERY = 50


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message} (--help lists the options)")


def number(kind: type, low: float, high: float = math.inf, open_low: bool = False) -> Callable[[str], float]:
    """An argparse type: a number in [low, high], or in (low, high]."""
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if open_low else low <= value) or value > high or value == math.inf:
            upto = f" and at most {high:g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole number' if kind is int else 'a number'} "
                                             f"{'above' if open_low else 'of at least'} {low:g}{upto}")
        return value
    return read


def image_size(text: str) -> int:
    size = number(int, 1)(text)
    if size % 32:
        raise argparse.ArgumentTypeError(f"{size} is not a multiple of 32; "
                                         f"{max(32, size // 32 * 32)} and {size // 32 * 32 + 32} work")
    return size


def variance(text: str) -> float | int:
    return number(int, 1)(text) if text.isdigit() and int(text) > 1 else number(float, 0, 1, open_low=True)(text)


def parse(argv: list[str] | None, **defaults) -> argparse.Namespace:
    """`defaults` replace the published values of options that are not in argv."""
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("--data", type=Path, metavar="DIR", help="a category in MVTec's layout, a parent folder of such, or a folder of "
        "normal images; default: the toy product, drawn into data/toy, at reduced settings")
    add("--out", type=Path, default=Path("runs"), metavar="DIR", help="root of the run folders; default: %(default)s")
    add("--size", type=image_size, default=256, help="side of the square that images are resized to; default: %(default)s")
    add("--batch", type=number(int, 1), default=8, help="images a step; default: %(default)s")
    add("--seed", type=number(int, 0), default=0, help="default: %(default)s")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if there is one")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="of the networks; auto: bf16 on hardware that has it, a GPU or a CPU with AVX512-BF16 or AMX")
    add("--compile", action="store_true", help="torch.compile the networks: a slow start, then faster steps")
    add("--resume", action="store_true", help="go on from the run folder's last.pt")
    add("--save-minutes", type=number(float, 0), default=10, metavar="M", help="between checkpoints; default: %(default)s")
    add("--checkpoint", type=Path, metavar="FILE", help="do not train: evaluate these weights, this project's, the authors' "
        "or anomalib's, on --data, or apply them with --predict")
    add("--predict", type=Path, nargs="+", metavar="PATH", help="images and folders: print path and score, draw the map")
    add("--save-maps", action="store_true", help="write the maps as float TIFF for MVTec's evaluation script")
    add("--bench", type=number(int, 1), metavar="N", help="time N training steps and N predictions; print one JSON line")
    parser = Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    methods = parser.add_subparsers(dest="method", required=True, metavar="{draem,dsr,dfm}", parser_class=Parser)

    sub = methods.add_parser("draem", parents=[shared], help="ICCV 2021: reconstruct, then compare")
    add = sub.add_argument
    add("--textures", type=Path, metavar="DIR", help="images to make anomalies from; published: DTD's images/")
    add("--width", type=number(int, 2), default=128, help="of the reconstructive network, the other has half; "
        "default: %(default)s")
    add("--sspcab", action="store_true", help="put the SSPCAB block into the reconstructive encoder")
    add("--epochs", type=number(int, 1), default=700, help="passes over as many samples as images; default: %(default)s")
    add("--steps", type=number(int, 1), help="instead of --epochs")
    add("--lr", type=number(float, 0, open_low=True), default=1e-4, help="learning rate, times 0.1 after 4/7 and 6/7 of the "
        "steps; default: %(default)s")
    add("--beta", type=number(float, 0, 1), nargs=2, default=(0.1, 1.0), metavar=("LOW", "HIGH"),
        help="range of the texture's share in an anomaly; default: 0.1 1.0")

    sub = methods.add_parser("dfm", parents=[shared], help="2019: pretrained features, PCA, a Gaussian")
    add = sub.add_argument
    add("--backbone", choices=("resnet18", "resnet50", "wide_resnet50_2"), default="resnet50", help="default: %(default)s")
    add("--layer", choices=("layer1", "layer2", "layer3", "layer4", "avgpool"), default="layer3",
        help="whose features are taken; default: %(default)s")
    add("--pooling", type=number(int, 1), default=4, help="side of the average pooling; default: %(default)s")
    add("--variance", type=variance, default=0.97, help="share that PCA keeps, or a number of components above 1; "
        "default: %(default)s")
    add("--score", choices=("fre", "nll"), default="fre", help="feature reconstruction error, with a map, or negative "
        "log-likelihood, without; default: %(default)s")
    add("--weights", metavar="FILE", help="torchvision's weights from a file, or 'random'; default: downloaded")
    add("--joint", action="store_true", help="one class-conditional model over all categories of --data")

    for sub in methods.choices.values():
        sub.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if args.method == "draem" and args.beta[0] > args.beta[1]:
        parser.error(f"argument --beta: {args.beta[0]:g} {args.beta[1]:g} is reversed: the lower share comes first")
    if args.predict and not args.checkpoint:
        parser.error("argument --predict: needs --checkpoint FILE, the weights to apply")
    if args.checkpoint and not (args.predict or args.data):
        parser.error("argument --checkpoint: needs --data DIR to evaluate on, or --predict PATH")
    return args


def hardware(args: argparse.Namespace) -> None:
    """Turns --device and --precision into what this machine has."""
    try:
        device = torch.device(args.device)
        if device.type == "cuda" and WORLD > 1 and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {args.device}: cannot be used ({str(error).splitlines()[0]}); try --device cpu") from None
    if args.precision == "auto":
        native = torch.cuda.is_bf16_supported() if device.type == "cuda" else (
            device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()))
        args.precision = "bf16" if native else "fp32"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    args.device = device


def autocast(args: argparse.Namespace):
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bf16")


def to_network(image: Tensor, args: argparse.Namespace) -> Tensor:
    """uint8 images, from wherever they are, as floats in [0, 1] on the device, channels last."""
    image = image.to(args.device, non_blocking=True).float() / 255
    return image.contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------------------------
# A run's folder


class Stopped(Exception):
    """Ctrl-C or SIGTERM, after the checkpoint is saved."""


class Run:
    """The folder of one training, locked while it is open; `checkpoint` is what --resume goes on from, or empty."""

    def __init__(self, folder: Path, identity: dict, resume: bool, prefix: str = ""):
        self.folder, self.identity, self.prefix, self.checkpoint = folder, identity, prefix, {}
        self.last, self.log_path = folder / "last.pt", folder / "log.jsonl"
        self.lock = self._lock()
        if self.last.exists() and resume:
            self.checkpoint = self._read(identity)
        elif self.last.exists():
            kept = next(path for i in range(1, 10 ** 6) if not (path := folder.with_name(f"{folder.name}.{i}")).exists())
            folder.rename(kept)
            self.say(f"the run that was in {folder} is now in {kept}")
            os.close(self.lock)
            self.lock = self._lock()
        elif resume:
            self.say(f"--resume: no {self.last} yet, so this run starts at the beginning")
        self.begun = time.monotonic() - self.checkpoint.get("seconds", 0)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        os.close(self.lock)

    def _lock(self) -> int:
        self.folder.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            return os.open(os.devnull, os.O_RDONLY)
        lock = os.open(self.folder, os.O_RDONLY)  # a lock ends with its process, however that ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise InputError(f"{self.folder}: another run is writing there; wait for it, or choose another root with --out "
                             "DIR") from None
        return lock

    def _read(self, identity: dict) -> dict:
        checkpoint = read_checkpoint(self.last)
        if checkpoint.get("method") != identity["method"] or "stage" not in checkpoint:
            raise InputError(f"{self.last}: not a checkpoint of {identity['method']} to resume; choose another root with --out")
        then = checkpoint["run"]
        for name in identity:
            more = name == checkpoint["last_steps"] and checkpoint["ended"] and identity[name] >= then.get(name, math.inf)
            if then.get(name) != identity[name] and not more:
                raise InputError(f"--resume: {self.last} was trained with --{name.replace('_', '-')} {then.get(name)}, not "
                                 f"{identity[name]}; give the old value, or another root with --out DIR")
        return checkpoint

    def say(self, text: str) -> None:
        print(self.prefix + text, flush=True)

    def save(self, stage: "Stage", step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None,
             ended: bool = False) -> None:
        if self.log_path.exists():
            with open(self.log_path, "rb") as log:
                os.fsync(log.fileno())
        content = {"method": self.identity["method"], "settings": model.settings, "model": model.state_dict(),
                   "run": self.identity, "stage": stage.name, "step": step, "ended": ended, "last_steps": stage.option,
                   "seconds": time.monotonic() - self.begun}
        if optimizer is not None:
            content["optimizer"] = optimizer.state_dict()
        common.write_atomically(self.last, lambda file: save_tensors(content, file))

    def trim_log(self, stages: list[str], stage: str, step: int) -> None:
        """Keeps the lines up to the checkpoint's step; those after it are written again."""
        if not self.log_path.exists():
            return
        def kept(line: str) -> bool:
            try:
                row = json.loads(line)
                at = stages.index(row["stage"])
                return at < stages.index(stage) or (at == stages.index(stage) and row["step"] <= step)
            except (ValueError, KeyError, TypeError):  # half a line, or no line of ours
                return False
        lines = self.log_path.read_text(errors="replace").splitlines(keepends=True)
        text = "".join(line for line in lines if line.endswith("\n") and kept(line))
        common.write_atomically(self.log_path, lambda file: file.write(text.encode()))

    def log(self, row: dict) -> None:
        with open(self.log_path, "a") as file:
            file.write(json.dumps(row) + "\n")


def save_tensors(content: dict, file) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(str(error).splitlines()[0]) from None


def read_checkpoint(path: Path) -> dict:
    try:
        return draem.read_weights(path)
    except ValueError as error:
        raise InputError(str(error)) from None


def load_model(args: argparse.Namespace) -> torch.nn.Module:
    try:
        return LOADERS[args.method](args.checkpoint)
    except ValueError as error:
        raise InputError(str(error)) from None


# ---------------------------------------------------------------------------------------------------------------------
# Training


@dataclass
class Stage:
    """One training by gradient: `step(generator)` gives the loss's terms, all its randomness from the generator."""
    name: str
    step: Callable[[torch.Generator], dict[str, Tensor]]
    parameters: list[torch.nn.Parameter]
    option: str  # that holds the number of steps
    steps: int
    batch: int
    lr: float
    drops: tuple[int, ...] = ()  # steps after which the learning rate is a tenth


def reseed(generator: torch.Generator, seed: int, stage: str, step: int) -> torch.Generator:
    """Step n depends on (seed, stage, n) alone, so that a resumed run goes on as if it had not stopped."""
    return generator.manual_seed(zlib.crc32(f"{seed} {stage} {step}".encode()))


@contextlib.contextmanager
def signals():
    """Yields a list that a first Ctrl-C or SIGTERM is put into; a second one acts as usual."""
    received = []

    def note(number: int, _) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    previous = {}
    with contextlib.suppress(ValueError):  # only the main thread may; elsewhere signals act as usual
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def fit(run: Run, model: torch.nn.Module, stages: list[Stage], stage: Stage, args: argparse.Namespace) -> None:
    """All steps of one stage, or those that the run's checkpoint lacks."""
    names = [s.name for s in stages]
    reached = names.index(run.checkpoint["stage"]) if run.checkpoint else 0
    if reached > names.index(stage.name):
        return
    resumed = run.checkpoint and reached == names.index(stage.name)
    start = run.checkpoint["step"] if resumed else 0
    if start >= stage.steps:
        return
    optimizer = torch.optim.Adam(stage.parameters, lr=stage.lr, fused=args.device.type in ("cpu", "cuda"))
    if resumed:
        optimizer.load_state_dict(run.checkpoint.pop("optimizer"))
        run.say(f"{stage.name}: resumed after step {start}")
    run.trim_log(names, stage.name, start)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: 0.1 ** sum(n >= drop for drop in stage.drops), last_epoch=start - 1 if start else -1)
    generator = torch.Generator(args.device)
    recent, logged, saved = [], (start, time.monotonic()), time.monotonic()
    with signals() as received:
        for n in range(start, stage.steps):
            terms = stage.step(reseed(generator, args.seed, stage.name, n))
            optimizer.zero_grad(set_to_none=True)
            sum(terms.values()).backward()
            optimizer.step()
            rate = schedule.get_last_lr()[0]
            schedule.step()
            done, now = n + 1, time.monotonic()
            recent.append(torch.stack(list(terms.values())).detach())
            log = done % LOG_EVERY == 0 or done in (1, 5, 20) or done == stage.steps
            save = done == stage.steps or now - saved > 60 * args.save_minutes or bool(received)
            if not (log or save or args.device.type == "cpu"):
                continue  # a GPU is not waited for
            rows = torch.stack(recent).tolist()
            for i, row in enumerate(rows, done - len(rows) + 1):
                if not all(map(math.isfinite, row)):
                    values = ", ".join(f"{name} {value:g}" for name, value in zip(terms, row))
                    kept = f"{run.last} still holds an earlier step" if run.last.exists() else "nothing was saved"
                    raise InputError(f"{stage.name}, step {i}: the loss is not finite ({values}); {kept}; "
                                     "try a lower --lr or --precision fp32")
            recent.clear()
            if log:
                run.log({"stage": stage.name, "step": done, **dict(zip(terms, rows[-1])), "lr": rate})
                speed = (done - logged[0]) / (now - logged[1])
                shown = "  ".join(f"{name} {value:.4f}" for name, value in zip(terms, rows[-1]))
                line = (f"{run.prefix}{stage.name} {done}/{stage.steps}  {shown}  lr {rate:.0e}  {speed * stage.batch:.3g} images/s"
                        f"  {datetime.timedelta(seconds=round((stage.steps - done) / speed))} left")
                live = sys.stdout.isatty() and WORLD == 1
                print(f"\r\033[K{line}" if live else line, end="\n" if not live or done == stage.steps else "", flush=True)
                logged = done, now
            if save:
                run.save(stage, done, model, optimizer, ended=done == stage.steps and stage is stages[-1])
                saved = time.monotonic()
            if received:
                raise Stopped(f"stopped after step {done} of {stage.steps}; {run.last} holds it: go on with the same command "
                              "and --resume")


def draem_stages(model: draem.DraemModel, images: Tensor, textures: Tensor | None, args: argparse.Namespace) -> list[Stage]:
    """Section 3.3 and Eq. (3): images and textures are drawn with replacement (the code's data_loader.py:160)."""
    def draw(pool: Tensor, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(pool), (args.batch,), generator=generator, device=args.device)
        return to_network(pool[index], args)

    def step(generator: torch.Generator) -> dict[str, Tensor]:
        image = draem.rotate_normals(draw(images, generator), generator)
        texture = None if textures is None else draw(textures, generator)
        augmented, mask = draem.synthesize_anomalies(image, texture, generator, tuple(args.beta))
        with autocast(args):
            reconstruction, logits = model(augmented)
        cost = model.reconstructive_subnetwork.encoder.block5.cost if args.sspcab else None
        return draem.draem_loss(image, reconstruction, logits, mask, cost)

    # Section 4: 700 epochs, a tenth of the learning rate after 400 and 600 (the code drops to a fifth after 560 and 630).
    drops = tuple(round(args.steps * part / 7) for part in (4, 6))
    return [Stage("train", step, list(model.parameters()), "steps", args.steps, args.batch, args.lr, drops)]


def train_draem(run: Run, category: Category, args: argparse.Namespace) -> torch.nn.Module:
    model = draem.DraemModel(args.width, args.sspcab)
    if run.checkpoint:
        draem.set_weights(model, run.checkpoint["model"], run.last)
    images = common.decode(category.train, args.size, category.name).to(args.device)
    textures = None
    if args.textures:
        textures = common.decode(common.list_images(args.textures), args.size, "textures").to(args.device)
    else:
        run.say("no --textures: coloured noise stands in; the published results need DTD (--textures dtd/images)")
    model = on_device(model, args).train()
    stages = draem_stages(model, images, textures, args)
    run.say(f"draem, width {args.width}, {args.size} x {args.size}, {args.device} {args.precision}: {args.steps} steps of "
            f"{args.batch} -> {run.folder}")
    for stage in stages:
        fit(run, model, stages, stage, args)
    return model


def new_dfm(args: argparse.Namespace) -> dfm.DFMModel:
    weights = args.weights or True
    if args.data is None and args.weights is None and not cached(dfm.URLS[args.backbone]):
        print("no weights are cached and none are needed for the toy product: the features are random")
        weights = "random"
    try:
        return dfm.DFMModel(args.backbone, args.layer, weights, args.pooling, args.variance, args.score)
    except ValueError as error:
        raise InputError(str(error)) from None


def cached(url: str) -> bool:
    return Path(torch.hub.get_dir(), "checkpoints", Path(url).name).exists()


def train_dfm(run: Run, category: Category, args: argparse.Namespace) -> torch.nn.Module:
    """No gradients: features stream through once, and PCA and Gaussian are fitted in closed form."""
    model = on_device(new_dfm(args), args).eval()
    run.say(f"dfm, {args.backbone} {args.layer}, pooling {args.pooling}, {args.size} x {args.size}, {args.device} "
            f"{args.precision} -> {run.folder}")
    features, start = [], time.monotonic()
    try:
        for image, _, _ in stream(category.train, args):
            with autocast(args):
                features.append(model.features(to_network(image, args)))
        model.fit(torch.cat(features), category.classes if args.joint else None)
    except ValueError as error:
        raise InputError(str(error)) from None
    run.say(f"{len(category.train)} images: {' + '.join(str(len(p.components)) for p in model.pca)} components of "
            f"{features[0][0].numel()} values in {time.monotonic() - start:.1f} s")
    run.save(Stage("fit", None, [], "", 0, args.batch, 0), 0, model, ended=True)
    return model


def on_device(model: torch.nn.Module, args: argparse.Namespace) -> torch.nn.Module:
    model = model.to(args.device, memory_format=torch.channels_last)
    if args.compile:
        for network in model.children():
            network.compile()
    return model


TRAIN = {"draem": train_draem, "dfm": train_dfm}


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and prediction


def stream(paths: list[Path], args: argparse.Namespace, masks: list[Path | None] | None = None, skip: bool = False):
    """Batches (images, masks, errors), decoded by worker processes while the network is busy; InputError unless `skip`."""
    workers = min(os.cpu_count() or 1, math.ceil(len(paths) / args.batch)) if len(paths) > args.batch else 0
    for images, truth, errors in DataLoader(ImageFiles(paths, args.size, masks), args.batch, num_workers=workers,
                                            pin_memory=args.device.type == "cuda"):
        for error in filter(None, () if skip else errors):
            raise InputError(error)
        yield images, truth, errors


def predict_batch(model: torch.nn.Module, image: Tensor, args: argparse.Namespace) -> dict[str, Tensor | None]:
    """The model's score, anomaly_map and whatever else its pictures show, on the CPU; image is uint8."""
    image = to_network(image, args)
    with autocast(args):
        if args.method == "dfm":
            parts = dict(zip(("score", "anomaly_map"), model.predict(image)))
        else:  # the published score is the mean over 21 x 21 pixels at 256 x 256
            parts = model.predict_parts(image, window=round(21 * args.size / 256) // 2 * 2 + 1)
    return {name: None if part is None else part.float().cpu() for name, part in parts.items()}


def draw_strip(image: Tensor, parts: dict[str, Tensor], mask: Tensor | None, top: float) -> tuple[list[str], Image.Image]:
    """Headings and the strip of one image: as it is, what the networks made of it, the map over it, the truth."""
    panels = {"image": common.panel(image)}
    for name, part in parts.items():
        if part.ndim == 3:
            panels[name.replace("_", " ")] = common.panel(part)
        elif part.ndim == 2 and name != "anomaly_map":
            panels[name.replace("_", " ")] = common.heat(part)
    if "anomaly_map" in parts:
        panels["map over image"] = common.overlay(panels["image"], parts["anomaly_map"] / top)
    if mask is not None:
        panels["truth"] = common.panel(mask.bool())
    return list(panels), common.strip(list(panels.values()))


def write_image(path: Path, picture: Image.Image, kind: str = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    common.write_atomically(path, lambda file: picture.save(file, kind))


def save_map(path: Path, source: Path, anomaly_map: Tensor) -> None:
    """A map as 32-bit float TIFF of its image's own size, as MVTec AD's evaluation script reads them."""
    with Image.open(source) as image:
        size = image.size[::-1] if image.getexif().get(0x0112, 1) >= 5 else image.size
    picture = Image.fromarray(anomaly_map.numpy()).resize(size, Image.Resampling.BILINEAR)
    write_image(path, picture, "TIFF")


def evaluate(model: torch.nn.Module, category: Category, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Metrics over the test set with the last weights; writes maps/ and summary.png. Images are kept no longer than a batch."""
    model.eval()
    top = float(model.map_scale) if args.method == "dfm" else 1.0
    scores, maps, truths, shown = [], [], [], {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for images, masks, _ in stream(category.test, args, category.masks):
            parts = predict_batch(model, images, args)
            first, jobs = sum(map(len, scores)), []
            scores.append(parts.pop("score"))
            for i, image in enumerate(images):
                at = first + i
                path, defect, has_map = category.test[at], category.defects[at], parts["anomaly_map"] is not None
                if not has_map:
                    continue
                mask = masks[i] if category.has_truth[at] else None
                headings, strip = draw_strip(image, {name: part[i] for name, part in parts.items()}, mask, top)
                name = path.relative_to(category.folder / "test").with_suffix("")
                jobs.append(pool.submit(write_image, folder / "maps" / name.with_name(name.name + ".png"), strip))
                if args.save_maps:
                    jobs.append(pool.submit(save_map, folder.parent / "anomaly_maps" / category.name / "test"
                                            / name.with_name(name.name + ".tiff"), path, parts["anomaly_map"][i]))
                if sum(shown_defect == defect for _, shown_defect, _, _ in shown.values()) < 2 and len(shown) < 12:
                    shown[at] = strip, defect, f"{defect}\n{scores[-1][i]:.3f}", headings
                if category.has_truth[at]:
                    maps.append(parts["anomaly_map"][i])
                    truths.append(masks[i, 0])
            for job in jobs:
                job.result()
    if shown:
        strips, _, captions, headings = zip(*shown.values())
        headings = max(headings, key=len)
        write_image(folder / "summary.png", common.sheet(strips, captions, headings))
    pixels = (torch.stack(maps), torch.stack(truths)) if maps else (None, None)
    return common.metrics(torch.cat(scores), torch.tensor(category.labels), *pixels)


def remarks(category: Category, args: argparse.Namespace, values: dict) -> list[str]:
    """What could not be measured, and why."""
    if not category.test:
        return [f"{category.name}: no test set, so nothing was evaluated; --checkpoint FILE --predict PATH applies the model"]
    notes = []
    if "image_auroc" not in values:
        notes.append(f"{category.name}: the test set lacks {'normal' if all(category.labels) else 'defective'} images: no image metrics")
    if args.method == "dfm" and args.score == "nll":
        notes.append("NLL scores whole images: no maps, no pixel metrics")
    elif missing := category.has_truth.count(False):
        notes.append(f"{category.name}: {missing} defective images have no mask in ground_truth/ and are left out of pixel metrics")
    return notes


def predict(args: argparse.Namespace) -> int:
    """Prints `path score` a line; strips go to the run root's predictions/. 2 if any file could not be read."""
    model = on_device(load_model(args), args).eval()
    top = float(model.map_scale) if args.method == "dfm" else 1.0
    paths = [path for given in args.predict for path in common.list_images(given)]
    names, folder, bad, done = {}, args.out / args.method / "predictions", 0, 0
    for images, _, errors in stream(paths, args, skip=True):
        parts = predict_batch(model, images, args)
        score = parts.pop("score")
        for i, (image, error) in enumerate(zip(images, errors)):
            path, done = paths[done], done + 1
            if error:
                bad += 1
                print(f"train.py: {error}", file=sys.stderr)
                continue
            print(f"{path} {score[i]:.6f}", flush=True)
            names[path.stem] = names.get(path.stem, 0) + 1
            name = path.stem + (f".{names[path.stem]}" if names[path.stem] > 1 else "")
            if parts["anomaly_map"] is not None:
                strip = draw_strip(image, {name: part[i] for name, part in parts.items()}, None, top)[1]
                write_image(folder / f"{name}.png", strip)
                if args.save_maps:
                    save_map(folder / f"{name}.tiff", path, parts["anomaly_map"][i])
    return 2 if bad else 0


# ---------------------------------------------------------------------------------------------------------------------
# The command

IDENTITY = {"draem": ("textures", "width", "sspcab", "steps", "lr", "beta"),
            "dfm": ("backbone", "layer", "pooling", "variance", "score", "weights", "joint")}


def run_category(category: Category, args: argparse.Namespace) -> dict[str, float]:
    """Trains (or loads) and evaluates one category; returns and writes its metrics."""
    args = argparse.Namespace(**vars(args))
    torch.manual_seed(args.seed)  # initial weights
    if args.method == "draem":
        args.steps = args.steps or args.epochs * math.ceil(len(category.train) / args.batch)
    identity = {"method": args.method} | {
        name: str(value.resolve()) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name in ("data", "size", "batch", "seed", "precision", *IDENTITY[args.method]) for value in [getattr(args, name)]}
    identity["data"] = str(category.folder.resolve())
    folder = args.out / args.method / category.name
    prefix = f"{category.name}: " if WORLD > 1 else ""
    if args.checkpoint:
        folder, model, start = folder.with_name(folder.name + "-checkpoint"), on_device(load_model(args), args), time.monotonic()
        values = evaluate(model, category, folder, args) if category.test else {}
        seconds = time.monotonic() - start
    else:
        with Run(folder, identity, args.resume, prefix) as run:
            model = TRAIN[args.method](run, category, args)
            values = evaluate(model, category, folder, args) if category.test else {}
            seconds = time.monotonic() - run.begun
    content = values | {"category": category.name, "settings": identity, "seed": args.seed, "seconds": round(seconds, 1)}
    common.write_atomically(folder / "metrics.json", lambda file: file.write(json.dumps(content, indent=1).encode()))
    for note in remarks(category, args, values):
        print(prefix + note)
    return values


def print_table(results: dict[str, dict[str, float]]) -> None:
    columns = ("image_auroc", "image_ap", "image_f1", "pixel_auroc", "pixel_ap", "pixel_aupro")
    rows = dict(results)
    if len(rows) > 1:
        rows["mean"] = {c: sum(found) / len(found) for c in columns if (found := [r[c] for r in results.values() if c in r])}
    width = max(map(len, (*rows, "category")))
    print(f"{'category':{width}}" + "".join(f"{c.replace('_', ' '):>13}" for c in columns))
    for name, row in rows.items():
        print(f"{name:{width}}" + "".join(f"{row[c]:13.4f}" if c in row else f"{'-':>13}" for c in columns))


def share(categories: list[Category]) -> list[Category]:
    """This process's part: the longest first, each to the process that has the least so far."""
    loads, mine = [0] * WORLD, []
    for category in sorted(categories, key=lambda c: -len(c.train)):
        rank = loads.index(min(loads))
        loads[rank] += len(category.train)
        if rank == RANK:
            mine.append(category)
    return sorted(mine, key=lambda c: categories.index(c)) if WORLD == 1 else mine


def run_all(args: argparse.Namespace) -> int:
    if args.data is None:
        common.make_toy("data/toy")
    categories = common.find_categories(args.data or Path("data/toy"))
    results, failures = {}, {}
    for category in share(categories):
        try:
            results[category.name] = run_category(category, args)
            if WORLD == 1 and len(categories) > 1:
                print_table({category.name: results[category.name]})
        except (InputError, Exception if WORLD > 1 else InputError) as error:
            if len(categories) == 1:
                raise
            if not isinstance(error, InputError):
                traceback.print_exc()
            failures[category.name] = str(error)
    if WORLD > 1:
        everyone = [None] * WORLD
        dist.all_gather_object(everyone, (results, failures))
        results = {c.name: r[c.name] for c in categories for r, _ in everyone if c.name in r}
        failures = {f"rank {rank}, {name}": f for rank, (_, of) in enumerate(everyone) for name, f in of.items()}
    if RANK == 0:
        if results:
            print_table(results)
        for name, failure in failures.items():
            print(f"train.py: {name}: {failure}", file=sys.stderr)
        if len(categories) == 1 and not args.checkpoint:
            print(f"pictures, metrics and weights: {args.out / args.method / categories[0].name}")
    return 2 if failures else 0


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse(argv)
        if args.checkpoint and (stored := read_checkpoint(args.checkpoint).get("run")):
            args = parse(argv, size=stored["size"])
        elif args.data is None and not args.checkpoint:
            args = parse(argv, **TOY[args.method])
        hardware(args)
        if WORLD > 1:
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
        return predict(args) if args.predict else run_all(args)
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"train.py: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(f"\n{stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("\nstopped; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
