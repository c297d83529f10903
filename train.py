"""Train, evaluate and apply DRAEM, DSR and DFM.

    python train.py draem                                         a generated toy product: minutes on a CPU, no network
    python train.py draem --data mvtec/bottle --textures dtd/images
    python train.py draem --data mvtec --textures dtd/images      every category below, and a table of means
    torchrun --nproc-per-node 8 train.py draem --data mvtec       the categories shared out over GPUs or machines
    python train.py draem --checkpoint runs/draem/bottle/last.pt --predict part.png photos/

A run leaves in runs/METHOD/CATEGORY: last.pt, log.jsonl (not DFM), metrics.json, scores.csv, maps/ and summary.png.

This file holds, in order: options, a run's folder, the training loop, what each method is fed, evaluation, prediction,
the benchmark, and main. What the methods do is in their own files.
"""
import argparse
import contextlib
import csv
import datetime
import glob
import io
import json
import math
import os
import signal
import statistics
import sys
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Iterator

if sys.version_info < (3, 10):
    print("train.py: Python 3.10 or newer is needed, this is " + sys.version.split()[0], file=sys.stderr)
    sys.exit(2)

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

import common
import dfm
import draem
import dsr
from common import Category, TestImage

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
METHODS = {"draem": draem, "dsr": dsr, "dfm": dfm}
# What replaces the published values where --data is not given, so that minutes on a CPU do.
TOY = {"draem": dict(size=64, width=32, steps=800),
       "dsr": dict(size=64, hiddens=32, codes=512, width=16, lr=1e-3, pretrain_steps=2000, pretrain_batch=16,
                   steps=1000, upsampling_steps=300),
       "dfm": dict(backbone="resnet18", pooling=2)}
LOG_EVERY = 50  # steps
RESIDENT = 2 ** 30  # bytes of images that DSR's stage 1 keeps decoded at most; larger sets are read anew in every step


class UserError(Exception):
    """Something that a user can mend: one line, exit status 2."""


class Stopped(Exception):
    """Raised after Ctrl-C or SIGTERM, once the checkpoint is saved: the signal's number, and what to say."""


@contextlib.contextmanager
def mendable():
    """Turns a loader's ValueError into a UserError. It stands around everything that reads a user's files."""
    try:
        yield
    except ValueError as error:
        raise UserError(error) from None


# ---------------------------------------------------------------------------------------------------------------------
# Options


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (--help lists the options)")


def number(kind: type, low: float, high: float, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a number from low to high; not low itself if `above`."""
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or above and value == low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number "
                                             f"{'above' if above else 'from'} {low:.10g} {'up ' * above}to {high:.10g}")
        return value
    return read


def image_size(text: str) -> int:
    size = number(int, 32, 4096)(text)
    if size % 32:
        raise argparse.ArgumentTypeError(f"{size} is not a multiple of 32; {size // 32 * 32} and "
                                         f"{size // 32 * 32 + 32} are")
    return size


def variance(text: str) -> float | int:
    if text.isdigit() and int(text) > 1:
        return number(int, 1, 10 ** 6)(text)
    return number(float, 0, 1, above=True)(text)


class Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        plain = action.default in (None, False, argparse.SUPPRESS)
        return action.help if plain else f"{action.help or ''} (default: %(default)s)"


def parse(argv: list[str] | None, **defaults) -> argparse.Namespace:
    """`defaults` replace the published values of options that are not in argv."""
    count, wide, rate = number(int, 1, 10 ** 9), number(int, 2, 2048), number(float, 0, 1, above=True)
    batch, degrees = number(int, 1, 4096), number(float, 0, 180)
    parser = Parser(prog="train.py", description=__doc__, formatter_class=Help)
    methods = parser.add_subparsers(dest="method", required=True, metavar="{draem,dsr,dfm}", parser_class=Parser)
    for method, module in METHODS.items():
        published = module.PUBLISHED
        sub = methods.add_parser(method, help=module.__doc__.split("\n")[0], formatter_class=Help)
        add = sub.add_argument
        add("--data", type=Path, metavar="DIR", help="a category in MVTec's layout, a parent folder of such, or a "
            "folder of normal images; without it a toy product is drawn into data/toy and settings are reduced")
        add("--out", type=Path, default=Path("runs"), metavar="DIR", help="root of the run folders")
        add("--size", type=image_size, help="images become squares of this side; default: "
            f"{published['size']}, or what --checkpoint was trained at")
        add("--antialias", action=argparse.BooleanOptionalAction, help="resize with antialiasing; default: bilinearly "
            "from four pixels, as the published results did, or as --checkpoint was trained")
        add("--bits", type=int, choices=(10, 12, 14, 16), help="of a camera that writes 16-bit grey files; default: 16")
        add("--batch", type=batch, default=published.get("batch", draem.PUBLISHED["batch"]), help="images a step")
        add("--seed", type=number(int, 0, 2 ** 32 - 1), default=0)
        add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
            help="of the networks; auto: bf16 on hardware that has it, but for dfm")
        add("--compile", action="store_true", help="torch.compile the networks, for a GPU: a slow start, then faster")
        add("--resume", action="store_true", help="go on from the run folder's last.pt")
        add("--save-minutes", type=number(float, 0, 10 ** 6), default=10, metavar="M", help="between checkpoints")
        add("--checkpoint", type=Path, metavar="FILE", help="do not train: evaluate these weights, this project's, the "
            "authors' or anomalib's, on --data, or apply them with --predict")
        add("--predict", nargs="+", metavar="PATH", help="images and folders: print path and score, draw maps")
        add("--save-maps", action="store_true", help="write the maps as float TIFF for MVTec's evaluation script")
        add("--bench", type=count, metavar="N", help="time N training steps and predictions; prints JSON")
        if method == "draem":
            add("--textures", type=Path, metavar="DIR", help="images to make anomalies from, DTD's in the paper; "
                "default: dtd/images or dtd, here or beside the data")
            add("--width", type=wide, default=published["width"], help="of the first network, twice the other's")
            add("--sspcab", action="store_true", help="put the SSPCAB block into the reconstructive encoder")
            add("--epochs", type=count, default=published["epochs"], help="passes over as many samples as images")
            add("--steps", type=count, help="instead of --epochs")
            add("--beta", type=number(float, 0, 1), nargs=2, default=published["beta"], metavar=("LOW", "HIGH"),
                help="range of the texture's share in an anomaly")
        if method == "dsr":
            add("--codebook", type=Path, metavar="FILE", help="the authors' file or one that --pretrain made; default: "
                "the published one, downloaded")
            add("--pretrain", type=Path, metavar="DIR", help="stage 1: train a codebook on these images")
            add("--pretrain-steps", type=count, default=published["pretrain_steps"], help="of stage 1")
            add("--pretrain-batch", type=batch, default=published["pretrain_batch"], help="of stage 1")
            add("--steps", type=count, default=published["steps"], help="of stage 2")
            add("--upsampling-steps", type=count, default=published["upsampling_steps"], help="of stage 3")
            add("--hiddens", type=wide, default=published["hiddens"], help="width of stage 1's networks and of a code")
            add("--codes", type=number(int, 21, 2 ** 14), default=published["codes"], help="in each codebook")
            add("--width", type=wide, default=published["width"], help="of the detection and upsampling modules")
        if method == "dfm":
            add("--backbone", choices=tuple(dfm.RESNETS), default=published["backbone"], help="pretrained network")
            add("--layer", choices=dfm.LAYERS, default=published["layer"], help="whose features are taken")
            add("--pooling", type=batch, default=published["pooling"], help="side of the average pooling")
            add("--variance", type=variance, default=published["share"],
                help="share that PCA keeps, or a number of components above 1")
            add("--score", choices=("fre", "nll"), default=published["score"],
                help="feature reconstruction error, with a map, or negative log-likelihood, without")
            add("--weights", metavar="FILE", help="torchvision's weights from a file, or 'random'; default: downloaded")
            add("--joint", action="store_true", help="one class-conditional model over all categories of --data")
        else:
            add("--lr", type=rate, default=published["lr"], help="learning rate before its drops")
            add("--rotate", type=degrees, default=published["rotation"], metavar="DEGREES",
                help="turn normal images by up to this; 0 for products that stand upright")
        sub.set_defaults(**defaults)
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuses settings that exclude each other. args.size is set."""
    def refuse(option: str, reason: str):
        raise UserError(f"argument --{option}: {reason}")

    if args.predict and not args.checkpoint:
        refuse("predict", "needs --checkpoint FILE, the weights to apply")
    if args.checkpoint and not (args.predict or args.data):
        refuse("checkpoint", "needs --data DIR to evaluate on, or --predict PATH")
    if args.method == "draem" and args.beta[0] > args.beta[1]:
        refuse("beta", f"{args.beta[0]:g} {args.beta[1]:g} is reversed: the lower share comes first")
    if args.method == "draem" and args.size == 32 and args.batch == 1 and not args.checkpoint:
        refuse("batch", "1 image of 32 x 32 leaves batch norm a single value; 2 and above work, and --size 64")
    if args.method == "dsr" and args.codebook and args.pretrain:
        refuse("pretrain", "trains a codebook and --codebook gives one; choose")
    if args.method == "dsr" and args.size < 64:
        refuse("size", f"{args.size} leaves DSR's networks a single position; 64 and above work")
    if WORLD > 1 and (args.predict or args.bench or getattr(args, "joint", False)):
        raise UserError("--predict, --bench and --joint are one process's work: start them without torchrun")


def settle_hardware(args: argparse.Namespace) -> None:
    """Turns --device and --precision into what this machine has."""
    try:
        device = torch.device(args.device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("cpu, cuda or cuda:N is needed")
        if device.type == "cuda":
            if not torch.cuda.is_available():
                raise RuntimeError("there is no GPU that this PyTorch can use")
            local = int(os.environ.get("LOCAL_RANK", 0))
            device = torch.device("cuda", local if device.index is None else device.index)
            torch.cuda.set_device(device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {args.device}: cannot be used ({reason}); --device cpu works anywhere") from None
    if args.precision == "auto":
        instructions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private: their absence costs speed
        native = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else
                  any(getattr(torch.cpu, name, lambda: False)() for name in instructions))
        # DFM's likelihood weighs the directions of least variance most, where bfloat16's rounding would show.
        args.precision = "bf16" if native and args.method != "dfm" else "fp32"
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = args.method != "dfm"
    args.device = device


def reading(args: argparse.Namespace) -> dict:
    """How images are read: common.read_image's keywords."""
    return {"size": args.size, "antialias": args.antialias, "bits": args.bits}


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bf16")


def to_network(image: Tensor, args: argparse.Namespace) -> Tensor:
    """uint8 images as floats in [0, 1] on the device, channels last."""
    image = image.to(args.device, non_blocking=True).float() / 255
    return image.contiguous(memory_format=torch.channels_last)


def to_device(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    model.reading = reading(args)
    if args.compile:
        for network in (*model.children(), *getattr(model, "discrete_latent_model", nn.Module()).children()):
            network.compile()
    return model.to(args.device, memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------------------------
# A run's folder


def write_whole(path: Path, write: Callable) -> None:
    """Calls write(file) on a temporary file that then replaces `path`. A kill leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save's of a full disk
        temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason}); free space or choose another --out") from None


def settings_of(args: argparse.Namespace, category: str, images: int, **more) -> dict:
    """The settings that --resume compares. Paths are left out: data may move."""
    may_change = {"data", "out", "device", "compile", "resume", "save_minutes", "checkpoint", "predict", "save_maps",
                  "bench", "toy", "textures", "codebook", "pretrain", "weights", "epochs"}
    plain = {name: list(value) if isinstance(value, tuple) else value
             for name, value in vars(args).items() if name not in may_change}
    return plain | {"category": category, "images": images} | more


class Run:
    """The folder of one training. `checkpoint` is what --resume goes on from, else {}.

    UserError if the folder holds a run and `resume` is False, or holds one of other settings.
    """

    def __init__(self, folder: Path, settings: dict, resume: bool):
        self.folder, self.settings, self.checkpoint = folder, settings, {}
        self.last, self.log_path = folder / "last.pt", folder / "log.jsonl"
        if resume and self.last.exists():
            with mendable():
                self.checkpoint = draem.read_weights(self.last)
            self.compare()
        elif not resume and (self.last.exists() or self.log_path.exists()):
            raise UserError(f"{folder}: holds a run; --resume goes on with it, --out DIR puts this one elsewhere")
        if self.log_path.exists():  # steps after the checkpoint are taken and logged again
            os.truncate(self.log_path, min(self.log_path.stat().st_size, self.checkpoint.get("log_bytes", 0)))
        self.begun = time.monotonic() - self.checkpoint.get("seconds", 0)

    def compare(self) -> None:
        then = self.checkpoint.get("run")
        if not isinstance(then, dict):
            raise UserError(f"{self.last}: not a checkpoint to go on from; choose another root with --out DIR")
        for name, value in self.settings.items():
            if value != then.get(name):
                raise UserError(f"--resume: {self.last} was trained with {name.replace('_', '-')} {then.get(name)}, "
                                f"now it is {value}; go back to that, or begin anew with --out DIR")

    def evaluated(self) -> dict:
        """What the evaluation of a finished run left in metrics.json, its last file; {} before that."""
        path = self.folder / "metrics.json"
        return json.loads(path.read_text()) if self.checkpoint and path.exists() else {}

    def steps_done(self, stages: list[str], stage: str) -> int | None:
        """Steps of the stage that the checkpoint holds; None where a later stage has begun."""
        reached = self.checkpoint.get("stage", stages[0])
        if stages.index(reached) > stages.index(stage):
            return None
        return self.checkpoint.get("step", 0) if reached == stage else 0

    def save(self, model: nn.Module, stage: str, step: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        content = {"method": self.settings["method"], "settings": model.settings, "reading": model.reading,
                   "model": model.state_dict(), "optimizer": optimizer.state_dict() if optimizer else None,
                   "run": self.settings, "stage": stage, "step": step, "seconds": time.monotonic() - self.begun,
                   "log_bytes": self.log_path.stat().st_size if self.log_path.exists() else 0}
        write_whole(self.last, lambda file: torch.save(content, file))

    def log(self, row: dict) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.log_path, "a") as file:
            file.write(json.dumps(row) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# The training loop


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Yields a list to which the first Ctrl-C or SIGTERM is appended. A second one acts as usual."""
    received = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _) -> None:
        received.append(number)
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, sample: Callable, generator: torch.Generator,
                  args: argparse.Namespace) -> dict[str, Tensor]:
    """Sample, losses, backward, step. Nothing in it makes the host wait for the device."""
    batch = sample(generator)
    with autocast(args):
        terms = model.losses(*batch, generator)
    optimizer.zero_grad()
    sum(terms.values()).backward()
    optimizer.step()
    return terms


def seed_of(seed: int, stage: str, step: int) -> int:
    """Step n depends on (seed, stage, n) alone, so a resumed run goes on as if it had never stopped."""
    return zlib.crc32(f"{seed} {stage} {step}".encode())


def train(run: Run, model: nn.Module, parameters: list[nn.Parameter], sample: Callable, args: argparse.Namespace,
          stages: list[str], stage: str, steps: int, drops: tuple[float, ...] = ()) -> None:
    """Takes the steps of one stage, or those that the run's checkpoint lacks.

    sample(generator) gives what model.losses takes before the generator. The rate drops after the shares `drops`.
    """
    start = run.steps_done(stages, stage)
    if start is None or start == steps:
        return
    optimizer = torch.optim.Adam(parameters, lr=args.lr, fused=True)
    if start:
        optimizer.load_state_dict(run.checkpoint["optimizer"])
        print(f"{stage}: resumed after step {start}")
    factor = METHODS[args.method].PUBLISHED["drop_factor"]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: factor ** sum(n >= round(steps * drop) for drop in drops), start - 1 if start else -1)
    generator = torch.Generator(args.device)
    began, saved = time.monotonic(), time.monotonic()
    with noted_signals() as received:
        for step in range(start, steps):
            rate = schedule.get_last_lr()[0]
            generator.manual_seed(seed_of(args.seed, stage, step))
            terms = training_step(model, optimizer, sample, generator, args)
            schedule.step()
            done, stop = step + 1, bool(received)
            log = done % LOG_EVERY == 0 or done in (1, steps)
            save = stop or done == steps or time.monotonic() - saved >= 60 * args.save_minutes
            if log or save:
                values = {name: term.item() for name, term in terms.items()}  # waits for the GPU
                if not all(map(math.isfinite, values.values())):
                    raise UserError(f"{stage}, step {done}: the loss is not finite ({values}); {run.folder} holds what "
                                    "was saved before; try a lower --lr or --precision fp32")
            if log:
                run.log({"stage": stage, "step": done, **values, "lr": rate})
                show(stage, done, steps, values, rate, (time.monotonic() - began) / (done - start))
            if save:
                run.save(model, stage, done, optimizer)
                saved = time.monotonic()
            if stop or done == steps and received:  # or the signal came during the last save
                raise Stopped(received[0], f"stopped after step {done} of {steps}, which {run.last} holds; go on with "
                              "the same command and --resume")


def show(stage: str, done: int, steps: int, values: dict[str, float], rate: float, seconds: float) -> None:
    """The progress line: one that changes on a terminal, plain lines elsewhere. `seconds` are those of a step."""
    left = datetime.timedelta(seconds=round((steps - done) * seconds))
    terms = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
    line = f"{stage} {done}/{steps}  {terms}  lr {rate:.0e}  {seconds:.3g} s/step  {left} left"
    if sys.stdout.isatty() and WORLD == 1:
        print(f"\r\033[K{line}", end="\n" if done == steps else "", flush=True)
    else:
        print(line, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# What each method is fed


def resident(paths: list[Path], name: str, args: argparse.Namespace) -> Tensor:
    """Images decoded once, uint8 (N, 3, size, size), on the device. UserError for a bad one, or too many."""
    try:
        images, filled = torch.empty(len(paths), 3, args.size, args.size, dtype=torch.uint8), 0
        with mendable():
            for batch in common.training_batches(paths, 64, **reading(args)):
                images[filled:filled + len(batch)] = batch
                filled += len(batch)
        return images.to(args.device)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        need = len(paths) * 3 * args.size ** 2 / 2 ** 30
        raise UserError(f"{name}: {len(paths)} images of {args.size} x {args.size} need {need:.1f} GiB of memory on "
                        f"{args.device}, which are not there; give fewer images or a smaller --size") from None


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def draw(images: Tensor, generator: torch.Generator, args: argparse.Namespace) -> Tensor:
    """A batch of the resident images, with replacement."""
    return to_network(images[torch.randint(len(images), (args.batch,), generator=generator, device=args.device)], args)


def find_textures(args: argparse.Namespace) -> Path | None:
    """--textures, or DTD where it lies in the working folder or beside the data; says what is used."""
    beside = args.data.resolve().parents[:2] if args.data else []
    for folder in (root / name for root in (Path(), *beside) for name in ("dtd/images", "dtd")):
        if not args.textures and not args.toy and folder.is_dir():
            print(f"textures: {folder}, found there (--textures DIR for others)")
            return folder
    if not args.textures:
        print("textures: none given, coloured noise stands in; the published results need DTD, "
              "https://www.robots.ox.ac.uk/~vgg/data/dtd/ (--textures dtd/images)")
    return args.textures


def new_latent(args: argparse.Namespace) -> dsr.DiscreteLatentModel:
    return dsr.DiscreteLatentModel(args.hiddens, residual_hiddens=args.hiddens // 2, codes=args.codes,
                                   code_length=args.hiddens)


def new_model(args: argparse.Namespace) -> nn.Module:
    """An untrained model of these options."""
    torch.manual_seed(args.seed)
    with mendable():
        if args.method == "draem":
            return draem.DraemModel(args.width, args.sspcab, args.beta, args.rotate)
        if args.method == "dsr":
            latent = new_latent(args) if args.bench and not args.codebook else dsr.load_codebook(args.codebook)
            return dsr.DsrModel(latent, args.width, rotation=args.rotate)
        return dfm.DFMModel(args.backbone, args.layer, args.weights or True, args.pooling, args.variance, args.score)


def sampler(images: Tensor, textures: Tensor | None, args: argparse.Namespace) -> Callable:
    """sample(generator): what model.losses takes before the generator."""
    def sample(generator: torch.Generator) -> tuple:
        if args.method == "dsr":
            return (draw(images, generator, args),)
        return draw(images, generator, args), None if textures is None else draw(textures, generator, args)
    return sample


def train_category(category: Category, args: argparse.Namespace, textures: Tensor | None
                   ) -> tuple[nn.Module | None, Run]:
    """Trains DRAEM or DSR, or what the run's checkpoint lacks. The model is None if the run was evaluated before."""
    if args.method == "draem":
        args.steps = args.steps or args.epochs * math.ceil(len(category.train) / args.batch)
    settings = settings_of(args, category.name, len(category.train),
                           textures=0 if textures is None else len(textures))
    run = Run(args.out / args.method / category.name, settings, args.resume)
    if run.evaluated():
        return None, run
    images = resident(category.train, category.name, args)
    with mendable():
        model = to_device(METHODS[args.method].load(run.last) if run.checkpoint else new_model(args), args)
    print(f"{category.name}: {args.method}, width {args.width}, {args.size} x {args.size}, {len(images)} images, "
          f"{args.device} {args.precision}, batches of {args.batch} -> {run.folder}")
    sample, drops = sampler(images, textures, args), METHODS[args.method].PUBLISHED["drops"]
    if args.method == "draem":
        train(run, model, list(model.train().parameters()), sample, args, ["train"], "train", args.steps, drops)
    else:
        stages = ["detection", "upsampling"]
        train(run, model, model.begin(2), sample, args, stages, "detection", args.steps, drops)
        train(run, model, model.begin(3), sample, args, stages, "upsampling", args.upsampling_steps)
    return model, run


def pretrain_dsr(args: argparse.Namespace) -> Path:
    """Stage 1 of DSR, unless it was done before: the path of its codebook."""
    with mendable():
        paths = common.list_images(args.pretrain)
    name = "codebook-toy" if args.toy else f"codebook-{args.pretrain.resolve().name}"
    size_in_bytes = sum(path.stat().st_size for path in paths)  # tells one product's train/good from another's
    settings = settings_of(args, name, len(paths), bytes=size_in_bytes) | {"method": "dsr-codebook"}
    for later in ("batch", "steps", "upsampling_steps", "width", "rotate"):  # of stages 2 and 3
        del settings[later]
    folder = args.out / "dsr" / name
    done = (folder / "reconstructions.png").exists()
    if WORLD > 1 and not done:
        raise UserError("--pretrain: stage 1 is one process's work; run it first: python train.py dsr --pretrain "
                        f"{args.pretrain} ... --data DIR, without torchrun")
    run = Run(folder, settings, args.resume or done)
    if done:
        print(f"stage 1 was done before: {run.last}")
        return run.last
    torch.manual_seed(args.seed)  # initial weights
    with mendable():
        latent = to_device(dsr.load_codebook(run.last) if run.checkpoint else new_latent(args), args).train()
    print(f"stage 1: {len(paths)} images, {args.codes} codes of {args.hiddens} values, {args.size} x {args.size}, "
          f"{args.device} {args.precision}: {args.pretrain_steps} steps of {args.pretrain_batch} -> {folder}")
    images = pretrain_images(paths, args)
    batches = pretrain_batches(paths, images, run.steps_done(["codebook"], "codebook"), args)
    train(run, latent, list(latent.parameters()), lambda generator: (to_network(next(batches), args),), args,
          ["codebook"], "codebook", args.pretrain_steps)
    batches.close()
    latent.eval()
    print(f"codes in even use, of {args.codes}: lo {latent.codebook_lo.perplexity():.0f}, hi "
          f"{latent.codebook_hi.perplexity():.0f}")
    shown = torch.stack([common.read_image(path, **reading(args)) for path in paths[::math.ceil(len(paths) / 8)]])
    with torch.no_grad(), autocast(args):
        drawn = latent.decode(*latent.quantize(to_network(shown, args))).float().cpu()
    strips = [strip([common.panel(image), common.panel(drawing)]) for image, drawing in zip(shown, drawn)]
    page = sheet(strips, [""] * len(strips), ["image", "general"])
    write_whole(folder / "reconstructions.png", lambda file: page.save(file, "PNG"))
    return run.last


def pretrain_images(paths: list[Path], args: argparse.Namespace) -> Tensor | None:
    """Stage 1's images on the device, uint8; None where they are too many and are read again in every step."""
    if not args.toy and len(paths) * 3 * args.size ** 2 > RESIDENT:
        return None
    images = resident(paths, "stage 1", args)
    if args.toy:  # in place of ImageNet: codes learned from the product alone cannot represent a defect
        strange, _ = draem.synthesize_anomalies(to_network(images.repeat(4, 1, 1, 1), args), None,
                                                torch.Generator(args.device).manual_seed(args.seed), normal_share=0)
        images = torch.cat((images, (255 * strange).round().byte()))
    return images


def pretrain_batches(paths: list[Path], images: Tensor | None, start: int, args: argparse.Namespace
                     ) -> Iterator[Tensor]:
    """Stage 1's batches from step `start` on, uint8. Step n's images depend on (seed, n) alone, resident or read."""
    count = len(paths) if images is None else len(images)

    def indices() -> Iterator[Tensor]:
        for step in range(start, args.pretrain_steps):
            generator = torch.Generator().manual_seed(seed_of(args.seed, "images", step))
            yield torch.randint(count, (args.pretrain_batch,), generator=generator)

    if images is not None:
        for index in indices():  # from pinned memory, so that the host does not wait for a GPU
            index = index.pin_memory() if images.is_cuda else index
            yield images[index.to(images.device, non_blocking=True)]
    else:
        with mendable():
            for batch in common.read_ahead(lambda index: common.read_image(paths[index], **reading(args)),
                                           map(Tensor.tolist, indices())):
                batch = torch.stack(batch)
                yield batch.pin_memory() if args.device.type == "cuda" else batch


def fit_dfm(name: str, categories: list[Category], args: argparse.Namespace) -> tuple[nn.Module | None, Run]:
    """Fits DFM to the features of all images, one PCA and one Gaussian per category.

    The model is None if the run was evaluated before.
    """
    paths = [path for category in categories for path in category.train]
    labels = [number for number, category in enumerate(categories) for _ in category.train]
    run = Run(args.out / "dfm" / name, settings_of(args, name, len(paths)), args.resume)
    if run.evaluated():
        return None, run
    if run.checkpoint:
        with mendable():
            return to_device(dfm.load(run.last), args), run
    model, features, start = to_device(new_model(args), args).eval(), [], time.monotonic()
    with mendable():
        for image in common.training_batches(paths, args.batch, **reading(args)):
            with autocast(args):
                features.append(model.features(to_network(image, args)))
        streamed = time.monotonic()
        model.fit(torch.cat(features), torch.tensor(labels))
    components = " + ".join(str(len(pca.components)) for pca in model.pca)
    print(f"{name}: DFM, {args.backbone} {args.layer}, {args.size} x {args.size}, {len(paths)} images, {components} "
          f"components of {features[0][0].numel()} values -> {run.folder}; {streamed - start:.1f} s for features, "
          f"{time.monotonic() - streamed:.1f} s for the fit")
    run.save(model, "fit", 0)
    return model, run


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and prediction


def predict_batch(model: nn.Module, image: Tensor, args: argparse.Namespace) -> list[dict[str, Tensor]]:
    """model.predict's parts of each image, float32 on the CPU; image is uint8."""
    with autocast(args):
        parts = model.predict(to_network(image, args))
    parts = {name: part.float().cpu() for name, part in parts.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(len(image))]


def strip(panels: list[np.ndarray]) -> Image.Image:
    """Panels (H, W, 3) uint8 of one size side by side, with thin white gaps."""
    gap = np.full((len(panels[0]), 4, 3), 255, np.uint8)
    return Image.fromarray(np.concatenate([part for each in panels for part in (each, gap)][:-1], axis=1))


def sheet(strips: list[Image.Image], captions: list[str], headings: list[str]) -> Image.Image:
    """Strips of one size below each other, a caption (one or more lines) left of each, a heading over each column."""
    scale = max(1, 160 // strips[0].height)  # room for the headings
    width, height, gap = scale * strips[0].width, scale * strips[0].height, scale * 4
    font = ImageFont.load_default(14)
    left = 2 * gap + 16 + max(int(font.getlength(line)) for caption in captions for line in caption.split("\n"))
    page = Image.new("RGB", (left + width + gap, 28 + len(strips) * (height + gap)), "white")
    draw = ImageDraw.Draw(page)
    for column, heading in enumerate(headings):
        draw.text((left + column * (height + gap) + height // 2, 14), heading, "black", font, anchor="mm")
    for row, (picture, caption) in enumerate(zip(strips, captions)):
        top = 28 + row * (height + gap)
        page.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
        draw.multiline_text((left - 12, top + height // 2), caption, "black", font, anchor="rm", align="right")
    return page


def draw_strip(image: Tensor, parts: dict[str, Tensor], mask: Tensor | None, top: float
               ) -> tuple[Image.Image, list[str]]:
    """One image as it is, what the networks made of it, the map over it, the truth: the strip and its headings."""
    panels = {"image": common.panel(image)}
    for name, part in parts.items():
        if name not in ("score", "anomaly_map"):
            panels[name.replace("_", " ")] = common.panel(part)
    panels["map over image"] = common.overlay(panels["image"], parts["anomaly_map"] / top)
    if mask is not None:
        panels["truth"] = common.panel(mask)
    return strip(list(panels.values())), list(panels)


def save_picture(path: Path, picture: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, compress_level=1)


def save_map(path: Path, source: Path, anomaly_map: Tensor) -> None:
    """A map as 32-bit float TIFF of its image's own size, as MVTec AD's evaluation script reads them."""
    size = common.open_upright(source, any_mode=True).size
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(anomaly_map.numpy()).resize(size, Image.Resampling.BILINEAR).save(path, "TIFF")


def color_top(model: nn.Module) -> float:
    """The upper end of the maps' colour scale: DFM's errors have no fixed range, the others are probabilities."""
    return float(getattr(model, "map_scale", 1.0)) or 1.0


def picture_name(path: Path) -> Path:
    """0.png of 0.png, 0.jpg.png of 0.jpg: no two images share a picture."""
    return path if path.suffix == ".png" else path.with_name(path.name + ".png")


def read_test(item: TestImage, args: argparse.Namespace) -> tuple[TestImage, Tensor | None, Tensor | None, str]:
    """A test image, its pixels or None, its mask or None, and a remark that says why, or what is odd about the mask."""
    try:
        image, mask, remark = common.read_image(item.path, **reading(args)), None, ""
        if item.mask:
            mask, remark = common.read_mask(item.mask, args.size, item.path)
        return item, image, mask, remark
    except ValueError as error:
        return item, None, None, str(error)


def predictions(model: nn.Module, items: list[TestImage], args: argparse.Namespace) -> Iterator[tuple]:
    """(item, image, mask, remark, prediction) of each test image; without a prediction if it could not be read."""
    groups = [items[start:start + args.batch] for start in range(0, len(items), args.batch)]
    for group in common.read_ahead(lambda item: read_test(item, args), groups):
        images = [image for _, image, *_ in group if image is not None]
        predicted = iter(predict_batch(model, torch.stack(images), args) if images else [])
        for item, image, mask, remark in group:
            yield item, image, mask, remark, None if image is None else next(predicted)


def score_images(model: nn.Module, category: Category, folder: Path, args: argparse.Namespace) -> tuple[list, ...]:
    """Predicts the test set and draws maps/ and summary.png.

    Returns (path, label, score) of each image, (remark, item) of each odd mask, and the maps and masks (size, size) of
    all normal images and of the defective ones whose mask is not empty.
    """
    top = color_top(model)
    rows, remarks, maps, masks, shown = [], [], [], [], []
    jobs = deque()
    with ThreadPoolExecutor(common.THREADS) as pool:
        for item, image, mask, remark, parts in predictions(model, category.test, args):
            if parts is None:
                print(f"train.py: {remark}", file=sys.stderr)
                continue
            if remark:
                remarks.append((remark, item))
            rows.append((item.path, int(item.defect != "good"), parts["score"].item()))
            if "anomaly_map" not in parts:  # a likelihood has none
                continue
            if item.defect == "good":
                mask = torch.zeros(args.size, args.size, dtype=torch.bool)
            picture, headings = draw_strip(image, parts, mask, top)
            name = picture_name(item.name)
            jobs.append(pool.submit(save_picture, folder / "maps" / name, picture))
            if args.save_maps:
                tiff = folder.parent / "anomaly_maps" / category.name / "test" / name.with_suffix(".tiff")
                jobs.append(pool.submit(save_map, tiff, item.path, parts["anomaly_map"]))
            if mask is not None:
                maps.append(parts["anomaly_map"])
                masks.append(mask)
                if [defect for defect, *_ in shown].count(item.defect) < 2 and len(shown) < 16:
                    shown.append((item.defect, f"{item.defect}\n{rows[-1][2]:.3f}", picture, headings))
            while len(jobs) > 4 * common.THREADS:  # few pictures wait
                jobs.popleft().result()
        for job in jobs:
            job.result()
    if shown:
        _, captions, pictures, headings = zip(*shown)
        save_picture(folder / "summary.png", sheet(pictures, captions, headings[0]))
    return rows, remarks, maps, masks


def evaluate(model: nn.Module, category: Category, folder: Path, settings: dict, begun: float, args: argparse.Namespace
             ) -> tuple[dict, bool]:
    """The metrics of the test set, with the last weights, and whether every file could be read.

    Writes metrics.json, scores.csv and pictures.
    """
    if not category.test:
        print(f"{category.name}: no test set, so nothing was evaluated; --checkpoint FILE --predict PATH applies it")
    rows, remarks, maps, masks = score_images(model.eval(), category, folder, args)
    regions, count = [], 0  # numbered over all images
    for mask in masks:
        region = common.connected_regions(mask)
        regions.append(torch.where(region > 0, region + count, 0))
        count += int(region.max())
    with mendable():
        image_metrics = common.ranking_metrics(np.array([score for *_, score in rows], np.float32),
                                               np.array([label for _, label, _ in rows], np.int64))
        pixel_metrics = (common.ranking_metrics(torch.stack(maps).flatten().numpy(),
                                                torch.stack(regions).flatten().numpy()) if maps else {})
    values = {f"image_{name}": value for name, value in image_metrics.items() if name != "aupro"}
    values |= {f"pixel_{name}": value for name, value in pixel_metrics.items() if name != "threshold"}
    report(category, remarks, image_metrics, getattr(model, "score_type", ""))
    content = values | {"category": category.name, "unreadable": len(category.test) - len(rows),
                        "seconds": round(time.monotonic() - begun, 1), "settings": settings}
    table = io.StringIO(newline="")
    csv.writer(table).writerows([("path", "label", "score"), *rows])
    write_whole(folder / "scores.csv", lambda file: file.write(table.getvalue().encode("utf-8", "surrogateescape")))
    write_whole(folder / "metrics.json", lambda file: file.write(json.dumps(content, indent=1).encode()))  # the last
    return values, len(rows) == len(category.test)


def report(category: Category, remarks: list[tuple], image_metrics: dict, score_type: str) -> None:
    """Prints what the metrics leave out and what is odd about masks, a line each."""
    for remark in dict.fromkeys(remark for remark, _ in remarks):
        items = [item for other, item in remarks if other == remark]
        print(f"{category.name}: images with {remark}: {len(items)}, first {items[0].path}", file=sys.stderr)
    missing = sum(item.defect != "good" and item.mask is None for item in category.test)
    if score_type == "nll":
        print("NLL scores whole images: there are no maps and no pixel metrics")
    elif missing:
        print(f"{category.name}: pixel metrics leave out {missing} defective images without a mask in ground_truth/")
    if category.test and not image_metrics:
        kind = "normal" if all(item.defect != "good" for item in category.test) else "defective"
        print(f"{category.name}: the test set has no {kind} images, so there are no image metrics")


def predict(model: nn.Module, args: argparse.Namespace) -> int:
    """Prints `path score` a line; strips go to predictions/ below the run root. 2 if any file could not be read."""
    folder = args.out / args.method / "predictions"
    top = color_top(model)
    items, names = [], set()
    for given in args.predict:
        home = os.path.expanduser(given)
        for root in [Path(home)] if os.path.lexists(home) else map(Path, sorted(glob.glob(home)) or [home]):
            with mendable():
                found = common.list_images(root)
            for path in found:
                name = picture_name(path.relative_to(root) if root.is_dir() else Path(path.name))
                while name in names:  # of another folder
                    name = name.with_stem(name.stem + "+")
                names.add(name)
                items.append(TestImage(path, name, "good", None))
    readable = True
    for item, image, _, remark, parts in predictions(model, items, args):
        if parts is None:
            print(f"train.py: {remark}", file=sys.stderr)
            readable = False
            continue
        print(f"{item.path} {parts['score'].item():.6f}", flush=True)
        if "anomaly_map" in parts:
            save_picture(folder / item.name, draw_strip(image, parts, None, top)[0])
            if args.save_maps:
                save_map((folder / item.name).with_suffix(".tiff"), item.path, parts["anomaly_map"])
    return 0 if readable else 2


def bench(category: Category, args: argparse.Namespace, textures: Tensor | None) -> int:
    """Medians of the same steps and predictions that training and evaluation make, as one JSON line."""
    def median_ms(work: Callable[[], object]) -> float:
        times = []
        for _ in range(3 + args.bench):
            wait()
            start = time.perf_counter()
            work()
            wait()
            times.append(1000 * (time.perf_counter() - start))
        return statistics.median(times[3:])  # after three to warm up

    wait = torch.cuda.synchronize if args.device.type == "cuda" else lambda: None
    images = resident((category.train * args.batch)[:args.batch], category.name, args)
    model = to_device(new_model(args), args)
    if args.method == "dfm":  # it has no steps: its features stand for them
        with mendable():
            features = model.features(to_network(images, args))
            model.fit(torch.cat((features, 2 * features)))
        step = lambda: model.features(to_network(images, args))
    else:
        parameters = model.begin(2) if args.method == "dsr" else model.train().parameters()
        optimizer = torch.optim.Adam(parameters, lr=args.lr, fused=True)
        generator = torch.Generator(args.device).manual_seed(args.seed)
        step = lambda: training_step(model, optimizer, sampler(images, textures, args), generator, args)
    result = {"method": args.method, "device": str(args.device), "precision": args.precision, "size": args.size,
              "batch": args.batch, "train_ms": median_ms(step)}
    model.eval()
    result["predict_ms"] = median_ms(lambda: predict_batch(model, images, args))
    if args.device.type == "cuda":
        result["peak_memory_mib"] = torch.cuda.max_memory_allocated() / 2 ** 20
    print(json.dumps({name: round(value, 3) if isinstance(value, float) else value for name, value in result.items()}))
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# The command

COLUMNS = ("image_auroc", "image_ap", "image_f1", "image_threshold", "pixel_auroc", "pixel_ap", "pixel_f1",
           "pixel_aupro")


def print_table(results: dict[str, dict[str, float]]) -> None:
    rows = dict(results)
    if len(rows) > 1:
        found = {column: [row[column] for row in rows.values() if column in row] for column in COLUMNS}
        rows["mean"] = {column: statistics.mean(values) for column, values in found.items()
                        if values and column != "image_threshold"}
    width = max(map(len, (*rows, "category")))
    print(f"{'category':{width}}" + "".join(f"{column.replace('_', ' '):>17}" for column in COLUMNS))
    for name, row in rows.items():
        print(f"{name:{width}}" + "".join(f"{row[c]:17.4f}" if c in row else f"{'-':>17}" for c in COLUMNS))


def run_category(category: Category, args: argparse.Namespace, textures: Tensor | None) -> tuple[dict, bool]:
    """Trains and evaluates one category, or reads what an earlier call of the same command left; its metrics."""
    args = argparse.Namespace(**vars(args))
    if args.method == "dfm":
        model, run = fit_dfm(category.name, [category], args)
    else:
        model, run = train_category(category, args, textures)
    values = run.evaluated()
    if values:
        return {column: values[column] for column in COLUMNS if column in values}, not values.get("unreadable")
    return evaluate(model, category, run.folder, run.settings, run.begun, args)


def run_all(args: argparse.Namespace, model: nn.Module | None) -> int:
    """Trains or, given a model, evaluates every category of --data that is this process's; prints a table."""
    if args.toy:
        common.make_toy("data/toy")
        if args.method == "dfm" and args.weights == "random":
            print("the toy product needs no download: random weights (or --weights FILE)")
    with mendable():
        categories = common.find_categories("data/toy" if args.toy else args.data, training=model is None)
    folder = args.out / args.method
    textures = None
    results, failures = {}, 0
    if args.method == "draem" and model is None:
        args.textures = find_textures(args)
        if args.textures:
            with mendable():
                paths = common.list_images(args.textures)
            textures = resident(paths, "textures", args)
    if args.bench:
        return bench(categories[0], args, textures)
    if args.method == "dsr" and model is None:
        if args.toy and not args.codebook:
            args.pretrain = args.pretrain or Path("data/toy/train/good")
        if args.pretrain:
            args.codebook = pretrain_dsr(args)
    if args.method == "dfm" and args.joint and model is None:
        model, run = fit_dfm("joint", categories, args)
        folder = run.folder
    for category in categories[RANK::WORLD]:
        try:
            if model is None:
                results[category.name], readable = run_category(category, args, textures)
            else:
                own = folder / (f"{category.name}-checkpoint" if args.checkpoint else category.name)
                settings = settings_of(args, category.name, len(category.train), checkpoint=str(args.checkpoint))
                results[category.name], readable = evaluate(model, category, own, settings, time.monotonic(), args)
            failures += not readable
        except (UserError, OSError) as error:
            if len(categories) == 1:
                raise
            print(f"train.py: {category.name}: {error}", file=sys.stderr)
            failures += 1
    if any(results.values()):
        print_table(results)
    print(f"written to {folder}")
    return 2 if failures else 0


def prepare(argv: list[str] | None) -> tuple[argparse.Namespace, nn.Module | None]:
    """All settings, and the model of --checkpoint, whose reading replaces the published values."""
    args = parse(argv)
    toy = args.data is None and args.checkpoint is None
    if toy:
        args = parse(argv, **TOY[args.method])
        if getattr(args, "epochs", None) not in (None, draem.PUBLISHED["epochs"]):
            args.steps = None
        if args.method == "dfm" and args.weights is None:
            args.weights = "random"
    args.toy = toy
    model = None
    if args.checkpoint:
        with mendable():
            more = (args.codebook,) if args.method == "dsr" else ()
            model = METHODS[args.method].load(args.checkpoint, *more)
    trained = model.reading.get("size") if args.method == "dfm" and model is not None else None
    if trained and args.size not in (None, trained):
        raise UserError(f"--size {args.size}: {args.checkpoint} was fitted to images of {trained} x {trained}")
    for name, default in (("size", METHODS[args.method].PUBLISHED["size"]), ("antialias", False), ("bits", 16)):
        if getattr(args, name) is None:
            setattr(args, name, default if model is None else model.reading.get(name, default))
    check(args)
    settle_hardware(args)
    if model is not None:
        print(f"{args.checkpoint}: {args.method}, images read at {args.size} x {args.size}"
              f"{', antialiased' if args.antialias else ''}", file=sys.stderr)
        model = to_device(model, args)
    return args, model


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names that the console's encoding lacks are escaped
    try:
        args, model = prepare(argv)
        return predict(model, args) if args.predict else run_all(args, model)
    except Stopped as stopped:
        number, text = stopped.args
        print(f"\n{text}", file=sys.stderr)
        return 128 + number
    except KeyboardInterrupt:
        print("\nstopped; a training goes on from its last checkpoint with the same command and --resume",
              file=sys.stderr)
        return 128 + signal.SIGINT
    except UserError as error:
        print("train.py:", " ".join(str(error).splitlines()), file=sys.stderr)
    except OSError as error:  # a full disk, a forbidden folder
        print(f"train.py: {error.filename or 'a file below --out'}: {error.strerror or error}", file=sys.stderr)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print("train.py: out of memory beside the resident images and textures: a smaller --batch or --size needs less",
              file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
