"""Train, evaluate and apply DRAEM, DSR and DFM.

    python train.py draem                                         a generated toy product: minutes on a CPU, no network
    python train.py draem --data mvtec/bottle --textures dtd/images
    python train.py draem --data mvtec --textures dtd/images      every category below, and a table of means
    torchrun --nproc-per-node 8 train.py draem --data mvtec       the categories shared out over GPUs or machines
    python train.py draem --checkpoint runs/draem/bottle/last.pt --predict part.png photos/

A run leaves in runs/METHOD/CATEGORY: last.pt, log.jsonl, metrics.json, maps/ and summary.png.

The calls, from the top: main, run_all, run_category, prepare_draem or prepare_dsr, fit, evaluate.
"""
import argparse
import contextlib
import ctypes
import datetime
import functools
import json
import math
import os
import signal
import statistics
import sys
import time
import traceback
import zipfile
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, TextIO

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

import common
import dfm
import draem
import dsr
from common import Category, ImageFiles, InputError

try:
    import fcntl
    import resource
except ImportError:  # Windows: nothing keeps two runs out of one folder there, and --bench tells no memory
    fcntl = resource = None

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
# What replaces the published values where neither --data nor the option itself is given, so that minutes on a CPU do.
TOY = {"draem": dict(size=64, width=32, steps=800),
       "dsr": dict(size=64, hiddens=32, codes=512, width=16, lr=1e-3, pretrain_steps=2000, pretrain_batch=16,
                   steps=1000, upsampling_steps=300),
       "dfm": dict(backbone="resnet18", pooling=2)}
LOG_EVERY = 50  # steps
# What --compile compiles: networks that are one graph each. A codebook's draws and searches are left as they are.
COMPILED = (draem.ReconstructiveSubNetwork, draem.DiscriminativeSubNetwork, dsr.EncoderBot, dsr.EncoderTop,
            dsr.DecoderBot, dsr.SubspaceRestrictionModule, dsr.ImageReconstructionNetwork, dsr.AnomalyDetectionModule,
            dfm.ResNet)
RESIDENT = 2 ** 30  # bytes of images up to which DSR's stage 1 decodes once; more are streamed


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message} (--help lists the options)")


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
    count = text.isdigit() and int(text) > 1
    return number(int, 1, 10 ** 6)(text) if count else number(float, 0, 1, above=True)(text)


def parse(argv: list[str] | None, **defaults) -> argparse.Namespace:
    """`defaults` replace the published values of options that are not in argv."""
    count, wide, rate = number(int, 1, 10 ** 9), number(int, 2, 2048), number(float, 0, 1, above=True)
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("--data", type=Path, metavar="DIR",
        help="a category in MVTec's layout, a parent folder of such, or a folder of normal images; default: the toy "
        "product, drawn into data/toy, at reduced settings")
    add("--out", type=Path, default=Path("runs"), metavar="DIR", help="root of the run folders; default: %(default)s")
    add("--size", type=image_size, default=256, help="images become squares of this side; default: %(default)s")
    add("--antialias", action="store_true", help="resize with antialiasing; default: bilinear from four pixels")
    add("--batch", type=number(int, 1, 4096), default=8, help="images a step; default: %(default)s")
    add("--seed", type=number(int, 0, 2 ** 32 - 1), default=0, help="default: %(default)s")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if there is one")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="of the networks; auto: bf16 on hardware that has it, a GPU or a CPU with AVX512-BF16 or AMX, but for dfm")
    add("--compile", action="store_true", help="torch.compile the networks, for a GPU: a slow start, then faster steps")
    add("--resume", action="store_true", help="go on from the run folder's last.pt")
    add("--save-minutes", type=number(float, 0, 10 ** 6), default=10, metavar="M",
        help="between checkpoints; default: %(default)s")
    add("--checkpoint", type=Path, metavar="FILE",
        help="do not train: evaluate these weights, this project's, the authors' or anomalib's, on --data, or apply "
        "them with --predict")
    add("--predict", type=Path, nargs="+", metavar="PATH", help="images and folders: print path and score, draw maps")
    add("--save-maps", action="store_true", help="write the maps as float TIFF for MVTec's evaluation script")
    add("--bench", type=number(int, 1, 10 ** 6), metavar="N", help="time N training steps and predictions; prints JSON")
    parser = Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    methods = parser.add_subparsers(dest="method", required=True, metavar="{draem,dsr,dfm}", parser_class=Parser)

    add = methods.add_parser("draem", parents=[shared], help="ICCV 2021: reconstruct, then compare").add_argument
    add("--textures", type=Path, metavar="DIR", help="images to make anomalies from; published: DTD's images/")
    add("--width", type=wide, default=128,
        help="of the reconstructive network, the other has half; default: %(default)s")
    add("--sspcab", action="store_true", help="put the SSPCAB block into the reconstructive encoder")
    add("--epochs", type=count, default=700, help="passes over as many samples as images; default: %(default)s")
    add("--steps", type=count, help="instead of --epochs")
    add("--lr", type=rate, default=1e-4,
        help="learning rate, times 0.1 after 4/7 and 6/7 of the steps; default: %(default)s")
    add("--beta", type=number(float, 0, 1), nargs=2, default=(0.1, 1.0), metavar=("LOW", "HIGH"),
        help="range of the texture's share in an anomaly; default: 0.1 1.0")

    add = methods.add_parser("dsr", parents=[shared], help="ECCV 2022: swap codes, then put them back").add_argument
    add("--codebook", type=Path, metavar="FILE",
        help="the authors' file or one that --pretrain made; default: the published one, downloaded")
    add("--pretrain", type=Path, metavar="DIR", help="stage 1: train a codebook on these images; published: ImageNet")
    add("--pretrain-steps", type=count, default=200_000, help="of stage 1; default: %(default)s")
    add("--pretrain-batch", type=number(int, 1, 4096), default=32, help="of stage 1; default: %(default)s")
    add("--steps", type=count, default=100_000,
        help="of stage 2, the learning rate times 0.1 after 4/5 of them; default: %(default)s")
    add("--upsampling-steps", type=count, default=20_000, help="of stage 3; default: %(default)s")
    add("--lr", type=rate, default=2e-4, help="learning rate; default: %(default)s")
    add("--hiddens", type=wide, default=128, help="width of stage 1's networks and of a code; default: %(default)s")
    add("--codes", type=number(int, 21, 2 ** 14), default=4096, help="in each codebook; default: %(default)s")
    add("--width", type=wide, default=64, help="of the detection and upsampling modules; default: %(default)s")

    add = methods.add_parser("dfm", parents=[shared], help="2019: pretrained features, PCA, a Gaussian").add_argument
    add("--backbone", choices=tuple(dfm.RESNETS), default="resnet50", help="default: %(default)s")
    add("--layer", choices=dfm.LAYERS, default="layer3", help="whose features are taken; default: %(default)s")
    add("--pooling", type=number(int, 1, 4096), default=4, help="side of the average pooling; default: %(default)s")
    add("--variance", type=variance, default=0.97,
        help="share that PCA keeps, or a number of components above 1; default: %(default)s")
    add("--score", choices=("fre", "nll"), default="fre",
        help="feature reconstruction error, with a map, or negative log-likelihood, without; default: %(default)s")
    add("--weights", metavar="FILE", help="torchvision's weights from a file, or 'random'; default: downloaded")
    add("--joint", action="store_true", help="one class-conditional model over all categories of --data")

    for sub in methods.choices.values():
        sub.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if args.method == "draem" and args.beta[0] > args.beta[1]:
        parser.error(f"argument --beta: {args.beta[0]:g} {args.beta[1]:g} is reversed: the lower share comes first")
    if args.method == "dsr" and args.codebook and args.pretrain:
        parser.error("argument --pretrain: trains a codebook and --codebook gives one; choose")
    if args.method == "dsr" and args.size < 64:
        parser.error(f"argument --size: {args.size} leaves DSR's networks a single position; 64 and above work")
    if args.method == "draem" and args.size == 32 and args.batch == 1 and not args.checkpoint:
        parser.error("argument --batch: 1 image of 32 x 32 leaves batch norm a single value; 2 and above work, and "
                     "--size 64")
    if args.predict and not args.checkpoint:
        parser.error("argument --predict: needs --checkpoint FILE, the weights to apply")
    if args.checkpoint and not (args.predict or args.data):
        parser.error("argument --checkpoint: needs --data DIR to evaluate on, or --predict PATH")
    return args


def keep_freed_memory() -> None:
    """glibc hands large blocks back to the system, which clears their pages when the next step asks for them again: a
    fifth of a step on a CPU. Where the C library is another, nothing changes."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: every block comes from the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: which never shrinks


def settle_hardware(args: argparse.Namespace) -> None:
    """Turns --device and --precision into what this machine has."""
    try:
        device = torch.device(args.device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("cpu, cuda or cuda:N is needed")
        if device.type == "cuda":
            if not torch.cuda.is_available():
                raise RuntimeError("there is no GPU that this PyTorch can use")
            device = torch.device("cuda", device.index or int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
            torch.backends.cudnn.benchmark = True
        else:
            keep_freed_memory()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {args.device}: cannot be used ({reason}); --device cpu works anywhere") from None
    if args.precision == "auto":
        cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu
        # DFM's likelihood weighs the directions of least variance most, where bfloat16's rounding would show.
        args.precision = "bf16" if native and args.method != "dfm" else "fp32"
    torch.backends.cudnn.allow_tf32 = args.method != "dfm"  # so would TF32's; matrix products never use it here
    args.device = device
    if WORLD > 1 and (args.predict or args.bench or getattr(args, "joint", False)):
        raise InputError("--predict, --bench and --joint are one process's work: start them without torchrun")


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bf16")


def to_network(image: Tensor, args: argparse.Namespace) -> Tensor:
    """uint8 images, from wherever they are, as floats in [0, 1] on the device, channels last."""
    image = image.to(args.device, non_blocking=True).float() / 255
    return image.contiguous(memory_format=torch.channels_last)


def to_device(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    model = model.to(args.device, memory_format=torch.channels_last)
    if args.compile:
        for network in model.modules():
            if isinstance(network, COMPILED):
                network.compile()
    return model


def mendable(load: Callable, *arguments):
    """load(*arguments), whose ValueError is a user's to mend."""
    try:
        return load(*arguments)
    except ValueError as error:
        raise InputError(str(error)) from None


def from_file(load: Callable, *arguments):
    """mendable, for what reads files that anyone may have made: they can hold anything in place of tensors by name."""
    try:
        return mendable(load, *arguments)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        paths = ", ".join(str(argument) for argument in arguments if isinstance(argument, Path))
        raise InputError(f"{paths}: does not hold tensors as a file of weights does ({error})") from None


def read_checkpoint(path: Path) -> dict:
    """Weights from anywhere, of a zip file's also the checksums, which torch.load passes over."""
    content = mendable(draem.read_weights, path)
    try:
        damaged = zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip()
        json.dumps(content.get("run"))  # settings are plain values, to be compared
    except Exception as error:  # a damaged file fails in many ways
        damaged = error
    if damaged:
        raise InputError(f"{path}: damaged since it was written; take an older copy or train again")
    return content


# ---------------------------------------------------------------------------------------------------------------------
# A run's folder


class Stopped(Exception):
    """Ctrl-C or SIGTERM, its number and what to say, after the checkpoint is saved."""


class Run:
    """The folder of one training, locked while it is open; `checkpoint` is what --resume goes on from, or empty.

    `identity` holds the settings that make the run what it is. Of ranks that train one model only the first writes.
    """

    def __init__(self, folder: Path, identity: dict, resume: bool, writes: bool = True):
        self.folder, self.identity, self.writes, self.checkpoint = folder, identity, writes, {}
        self.last, self.log_path = folder / "last.pt", folder / "log.jsonl"
        self.lock = self._lock()
        try:
            if resume and self.last.exists():
                self.checkpoint = self._read()
            elif resume:
                self.say(f"--resume: there is no {self.last} yet, so this run starts at the beginning")
            elif self.last.exists() and writes:  # a trained model is never overwritten
                kept = next(path for i in range(1, 10 ** 6) if not (path := Path(f"{folder}.{i}")).exists())
                folder.rename(kept)
                self.say(f"{folder} holds an earlier run, which is now {kept}")
            folder.mkdir(exist_ok=True)
        except BaseException:
            self.lock.close()
            raise
        self.begun = time.monotonic() - self.checkpoint.get("seconds", 0)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        self.lock.close()

    def _lock(self) -> TextIO:
        """Ends with the process, however that ends. It is beside the folder, which may be renamed; and fcntl's, which
        worker processes, who may outlive a killed run by seconds, do not inherit as they do flock's."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if fcntl is None or not self.writes:
            return open(os.devnull)
        lock = open(self.folder.with_name(f".{self.folder.name}.lock"), "a")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            lock.close()
            raise InputError(f"{self.folder}: another run is writing there; wait for it, or choose another root with "
                             "--out DIR") from None
        return lock

    def _read(self) -> dict:
        checkpoint, kinds = read_checkpoint(self.last), {"run": dict, "stage": str, "step": int, "ended": bool,
                                                         "last_option": str, "seconds": float, "model": dict}
        if (checkpoint.get("method") != self.identity["method"]
                or not all(isinstance(checkpoint.get(name), kind) for name, kind in kinds.items())
                or checkpoint["step"] < 0):
            raise InputError(f"{self.last}: not a checkpoint of {self.identity['method']} to go on from; choose "
                             "another root with --out DIR")
        for name, value in self.identity.items():
            then = checkpoint["run"].get(name)
            longer = (name == checkpoint["last_option"] and checkpoint["ended"] and isinstance(then, int)
                      and value >= then)
            if value != then and not longer:
                then, value = ("not given" if setting is None else setting for setting in (then, value))
                raise InputError(f"--resume: {self.last} was trained with --{name.replace('_', '-')} {then}, now it is "
                                 f"{value}; give the old value, or another root with --out DIR")
        return checkpoint

    def say(self, text: str) -> None:
        if self.writes:
            print(f"{self.folder.name}: {text}" if WORLD > 1 else text, flush=True)

    def save(self, stage: str, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None = None,
             ended: bool = False, last_option: str = "") -> None:
        """last.pt, the old one or the whole new one; the log's lines up to here are on the disk before."""
        if not self.writes:
            return
        if self.log_path.exists():
            with open(self.log_path, "rb+") as log:
                os.fsync(log.fileno())
        content = {"method": self.identity["method"], "settings": getattr(model, "settings", {}),
                   "model": model.state_dict(), "optimizer": optimizer.state_dict() if optimizer else None,
                   "run": self.identity, "stage": stage, "step": step, "ended": ended, "last_option": last_option,
                   "seconds": time.monotonic() - self.begun}
        common.write_atomically(self.last, lambda file: torch.save(content, file))

    def log(self, row: dict) -> None:
        if self.writes:
            try:
                with open(self.log_path, "a") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                raise InputError(f"{self.log_path}: cannot be written: {error.strerror}; free space, then go on from "
                                 "the last checkpoint with --resume") from None

    def trim_log(self, stages: list[str], stage: str, step: int) -> None:
        """Keeps the lines up to the checkpoint's step; the steps after it are taken, and logged, again."""
        def kept(line: str) -> bool:
            try:
                row = json.loads(line)
                return (stages.index(row["stage"]), row["step"]) <= (stages.index(stage), step)
            except (ValueError, KeyError, TypeError):  # half a line, or none of ours
                return False

        if self.writes and self.log_path.exists():
            lines = self.log_path.read_text(errors="replace").splitlines(keepends=True)
            text = "".join(line for line in lines if line.endswith("\n") and kept(line))
            common.write_atomically(self.log_path, lambda file: file.write(text.encode()))


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """A list that a first Ctrl-C or SIGTERM is put into; a second one acts as usual."""
    received, before = [], {}

    def note(number: int, _) -> None:
        received.append(number)
        signal.signal(number, before[number])

    with contextlib.suppress(ValueError):  # only the main thread may; elsewhere signals act as usual
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.getsignal(number)
            signal.signal(number, note)
    try:
        yield received
    finally:
        with contextlib.suppress(ValueError):
            for number, handler in before.items():
                signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------------
# Training


@dataclass
class Stage:
    """One training by gradient: losses(*synthesize(generator)) are the terms, all their randomness the generator's.

    A term without a gradient is not trained on but logged.
    """
    name: str
    synthesize: Callable[[torch.Generator], tuple]
    losses: Callable[..., dict[str, Tensor]]
    parameters: Callable[[], list[nn.Parameter]]  # called when the stage begins
    option: str  # that holds the number of steps
    steps: int
    batch: int
    lr: float
    drops: tuple[int, ...] = ()  # steps after which the learning rate is a tenth
    shared: bool = False  # by all ranks, which train one model


def new_optimizer(stage: Stage) -> torch.optim.Optimizer:
    return torch.optim.Adam(stage.parameters(), lr=stage.lr, fused=True)


def advance(stage: Stage, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> dict[str, Tensor]:
    """One training step. Nothing in it makes the host wait for the device."""
    terms = stage.losses(*stage.synthesize(generator))
    optimizer.zero_grad(set_to_none=True)
    sum(value for value in terms.values() if value.requires_grad).backward()
    optimizer.step()
    return {name: value.detach() for name, value in terms.items()}


def reseed(generator: torch.Generator, seed: int, stage: str, step: int) -> torch.Generator:
    """Step n depends on (seed, stage, n) alone, so a resumed run goes on as if it had never stopped."""
    return generator.manual_seed(zlib.crc32(f"{seed} {stage} {step}".encode()))


def restore(optimizer: torch.optim.Optimizer, run: Run) -> None:
    try:
        optimizer.load_state_dict(run.checkpoint["optimizer"])
        fits = all(optimizer.state[parameter][name].shape == parameter.shape and optimizer.state[parameter]["step"] >= 0
                   for group in optimizer.param_groups for parameter in group["params"]
                   for name in ("exp_avg", "exp_avg_sq"))
    except Exception:  # a foreign file fails in many ways
        fits = False
    if not fits:
        raise InputError(f"{run.last}: the optimizer's state is missing or does not fit; choose another root with "
                         "--out DIR")


def diverged(run: Run, stage: Stage, step: int, what: str) -> InputError:
    kept = f"{run.last} holds an earlier step" if run.last.exists() else "nothing was saved yet"
    return InputError(f"{stage.name}, step {step}: {what}; {kept}; try a lower --lr or --precision fp32")


def fit(run: Run, model: nn.Module, stages: list[Stage], stage: Stage, args: argparse.Namespace) -> None:
    """All steps of one stage, or those that the run's checkpoint lacks."""
    names = [other.name for other in stages]
    reached = run.checkpoint.get("stage", names[0])
    start = run.checkpoint.get("step", 0) if reached == stage.name else 0
    if reached not in names:
        raise InputError(f"{run.last}: its stage {reached!r} is none of {', '.join(names)}; choose another root with "
                         "--out DIR")
    if names.index(reached) > names.index(stage.name):
        return
    run.trim_log(names, stage.name, start)
    if start >= stage.steps:
        return
    optimizer = new_optimizer(stage)
    if start:
        restore(optimizer, run)
        run.say(f"{stage.name}: resumed after step {start}")
    run.checkpoint = {}
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: 0.1 ** sum(n >= drop for drop in stage.drops), last_epoch=start - 1 if start else -1)
    generator = torch.Generator(args.device)
    recent, logged, saved = [], (start, time.monotonic()), time.monotonic()
    with noted_signals() as received:
        for n in range(start, stage.steps):
            rate, done = schedule.get_last_lr()[0], n + 1
            terms = advance(stage, optimizer, reseed(generator, args.seed, stage.name, n))
            schedule.step()
            recent.append(torch.stack(list(terms.values())))
            now = time.monotonic()
            log = done % LOG_EVERY == 0 or done in (1, 5, 20, stage.steps)
            stop = bool(received)  # looked at once: a signal from here on stops the next step, which saves
            if stage.shared and WORLD > 1:  # a signal reaches ranks a step apart, and one alone would wait for ever
                asked = torch.tensor(int(stop))
                dist.all_reduce(asked)
                stop = asked.item() > 0
            save = stop or done == stage.steps or now - saved >= 60 * args.save_minutes
            if not (log or save or args.device.type == "cpu"):
                continue  # a GPU is waited for only now and then
            rows = torch.stack(recent).tolist()
            recent.clear()
            for i, row in enumerate(rows, done - len(rows) + 1):
                if not all(map(math.isfinite, row)):
                    values = ", ".join(f"{name} {value:g}" for name, value in zip(terms, row))
                    raise diverged(run, stage, i, f"the loss is not finite ({values})")
            if log:
                values = dict(zip(terms, rows[-1]))
                run.log({"stage": stage.name, "step": done, **values, "lr": rate})
                speed = (done - logged[0]) / (time.monotonic() - logged[1])
                logged = done, time.monotonic()
                show(run, f"{stage.name} {done}/{stage.steps}  {'  '.join(f'{k} {v:.4f}' for k, v in values.items())}  "
                     f"lr {rate:.0e}  {speed * stage.batch:.3g} images/s  "
                     f"{datetime.timedelta(seconds=round((stage.steps - done) / speed))} left", done == stage.steps)
            if save:
                if not all(value.isfinite().all() for value in model.state_dict().values()):
                    raise diverged(run, stage, done, "the weights are no longer finite")
                run.save(stage.name, done, model, optimizer, done == stage.steps and stage is stages[-1],
                         stages[-1].option)
                saved = time.monotonic()
            if stop:
                break
    if stop or received:
        raise Stopped((*received, signal.SIGTERM)[0], f"stopped after step {done} of {stage.steps}, which {run.last} "
                      "holds; go on with the same command and --resume")


def show(run: Run, line: str, last: bool) -> None:
    """The progress line: one that changes on a terminal, plain lines elsewhere."""
    if sys.stdout.isatty() and WORLD == 1:
        print(f"\r\033[K{line}", end="\n" if last else "", flush=True)
    else:
        run.say(line)


def load(files: ImageFiles, args: argparse.Namespace, workers: int, kept: set[int], **batches) -> Iterator[list]:
    """A DataLoader's batches. Its processes start with the signals `kept` blocked: those are this one's to handle."""
    mask = getattr(signal, "pthread_sigmask", None) if workers else None  # Windows has none
    before = mask(signal.SIG_BLOCK, kept) if mask else set()
    try:
        return iter(DataLoader(files, num_workers=workers, pin_memory=args.device.type == "cuda", **batches))
    finally:
        if mask:
            mask(signal.SIG_SETMASK, before)


def draw(pool: Tensor, generator: torch.Generator, args: argparse.Namespace) -> Tensor:
    """A batch of the resident uint8 images, with replacement (DRAEM code, data_loader.py:160)."""
    return to_network(pool[torch.randint(len(pool), (args.batch,), generator=generator, device=args.device)], args)


@functools.cache
def resident_textures(folder: Path, size: int, antialias: bool, device: torch.device) -> Tensor:
    """Decoded once, however many categories use them."""
    return common.decode(common.list_images(folder), size, "textures", antialias).to(device)


def prepare_draem(category: Category, args: argparse.Namespace) -> tuple[nn.Module, list[Stage]]:
    images = common.decode(category.train, args.size, category.name, args.antialias).to(args.device)
    textures = resident_textures(args.textures, args.size, args.antialias, args.device) if args.textures else None
    model = to_device(draem.DraemModel(args.width, args.sspcab), args)

    def synthesize(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        image = draem.rotate_normals(draw(images, generator, args), generator)
        texture = None if textures is None else draw(textures, generator, args)
        return image, *draem.synthesize_anomalies(image, texture, generator, tuple(args.beta))

    def losses(image: Tensor, augmented: Tensor, mask: Tensor) -> dict[str, Tensor]:
        with autocast(args):
            reconstruction, logits = model(augmented)
        cost = model.reconstructive_subnetwork.encoder.block5.cost if args.sspcab else None
        return draem.draem_loss(image, reconstruction, logits, mask, cost)

    # Section 4: 700 epochs, a tenth of the learning rate after 400 and 600 (the code: a fifth after 560 and 630).
    drops = tuple(round(args.steps * part / 7) for part in (4, 6))
    return model, [Stage("train", synthesize, losses, lambda: list(model.train().parameters()), "steps", args.steps,
                         args.batch, args.lr, drops)]


def pretrain_dsr(args: argparse.Namespace, toy: bool) -> Path:
    """Stage 1 of DSR, unless it was done before: the path of its codebook."""
    if args.pretrain_batch % WORLD:
        raise InputError(f"--pretrain-batch {args.pretrain_batch}: is not a multiple of the {WORLD} processes")
    identity = describe(args, "dsr-codebook")
    folder = args.out / "dsr" / f"codebook-{'toy' if toy else args.pretrain.resolve().name}"
    paths, last = common.list_images(args.pretrain), folder / "last.pt"
    stored, picture = read_checkpoint(last) if last.exists() else {}, folder / "reconstructions.png"
    done = bool(stored.get("ended")) and stored.get("run") == identity
    complete = done and picture.exists()
    if WORLD > 1:
        dist.barrier()  # all have looked before the first one moves an earlier run away
    if complete:
        print(f"stage 1 was done before: {last}")
        return last
    fits = toy or len(paths) * 3 * args.size ** 2 <= RESIDENT
    images = common.decode(paths, args.size, "stage 1", args.antialias).to(args.device) if fits else None
    if toy:  # in place of ImageNet: codes that know the product alone could not write down a defect
        strange, _ = draem.synthesize_anomalies(to_network(images.repeat(4, 1, 1, 1), args), None,
                                                torch.Generator(args.device).manual_seed(args.seed), normal_share=0)
        images = torch.cat((images, (255 * strange).round().byte()))
    torch.manual_seed(args.seed)
    latent = network = to_device(
        dsr.DiscreteLatentModel(args.hiddens, 2, args.hiddens // 2, args.codes, args.hiddens), args)
    if WORLD > 1:
        network = nn.parallel.DistributedDataParallel(latent, broadcast_buffers=False)
    with Run(folder, identity, args.resume or done, writes=RANK == 0) as run:
        if run.checkpoint:
            from_file(draem.set_weights, latent, run.checkpoint["model"], last)
        batches = pretrain_batches(images, paths, run.checkpoint.get("step", 0), args)

        def losses(image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
            with autocast(args):
                reconstruction, commitment, perplexity = network(image, generator)
            return dsr.codebook_loss(image, reconstruction, commitment) | {
                "perplexity_lo": perplexity[0], "perplexity_hi": perplexity[1]}

        stage = Stage("codebook", lambda generator: (to_network(next(batches), args), generator), losses,
                      lambda: [parameter for parameter in latent.train().parameters() if parameter.requires_grad],
                      "pretrain_steps", args.pretrain_steps, args.pretrain_batch, args.lr, shared=True)
        run.say(f"stage 1 on {len(paths)} images, {args.codes} codes of {args.hiddens} values, {args.size} x "
                f"{args.size}, {args.device} {args.precision}: {stage.steps} steps of {stage.batch} -> {folder}")
        with contextlib.closing(batches):  # which ends its processes
            fit(run, latent, [stage], stage, args)
        if run.writes:
            latent.eval()
            shown = torch.stack([common.read_image(path, args.size, args.antialias) for path in paths[:: math.ceil(len(paths) / 8)]])
            with torch.no_grad(), autocast(args):
                drawn = latent(to_network(shown, args))[0].float().cpu()
            strips = [common.strip([common.panel(a), common.panel(b)]) for a, b in zip(shown, drawn)]
            write_image(picture, common.sheet(strips, [""] * len(strips), ("image", "general")))
    if WORLD > 1:
        dist.barrier()  # the others read what the first one wrote
    return last


def pretrain_batches(images: Tensor | None, paths: list[Path], start: int, args: argparse.Namespace
                     ) -> Iterator[Tensor]:
    """This rank's share of stage 1's batches from step `start` on, uint8: from memory, or read by worker processes.

    The images of step n depend on (seed, n) alone, whichever way they come.
    """
    count = len(paths) if images is None else len(images)

    def indices() -> Iterator[list[int]]:
        generator = torch.Generator()
        for n in range(start, args.pretrain_steps):
            reseed(generator, args.seed, "images", n)
            yield torch.randint(count, (args.pretrain_batch,), generator=generator).tolist()[RANK::WORLD]

    if images is not None:
        for index in map(torch.tensor, indices()):
            yield images[(index.pin_memory() if images.is_cuda else index).to(args.device, non_blocking=True)]
    else:
        for batch, _, errors in load(ImageFiles(paths, args.size, None, args.antialias), args, common.cores(),
                                     {signal.SIGINT, signal.SIGTERM}, batch_sampler=indices()):
            for error in filter(None, errors):
                raise InputError(error)
            yield batch


def prepare_dsr(category: Category, args: argparse.Namespace) -> tuple[nn.Module, list[Stage]]:
    images = common.decode(category.train, args.size, category.name, args.antialias).to(args.device)
    if args.bench and not args.codebook:  # the codes' values take no time
        model = dsr.DsrModel(0.2, args.hiddens, args.codes, args.hiddens, 2, args.hiddens // 2, args.width)
    else:
        model = from_file(dsr.load_codebook, args.codebook, 0.2, args.width)
    model = to_device(model, args)

    def simulate(generator: torch.Generator) -> tuple[Tensor, dsr.Simulated]:
        image = dsr.rotate_normals(draw(images, generator, args), generator, 90, 0.4)
        with autocast(args):
            return image, model.simulate(image, generator)

    def detection(image: Tensor, simulated: dsr.Simulated) -> dict[str, Tensor]:
        with autocast(args):
            outputs = model.detect(simulated.lo, simulated.hi)
        return dsr.detection_loss(image, simulated, *outputs)

    def smudge(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        image = dsr.rotate_normals(draw(images, generator, args), generator, 90, 0.3)
        return dsr.synthesize_smudges(image, generator)

    def upsampling(smudged: Tensor, mask: Tensor) -> dict[str, Tensor]:
        with autocast(args):
            *_, logits = model(smudged)
        return dsr.upsampling_loss(logits, mask)

    return model, [Stage("detection", simulate, detection, lambda: model.train_stage(2), "steps", args.steps,
                         args.batch, args.lr, (round(args.steps * 4 / 5),)),
                   Stage("upsampling", smudge, upsampling, lambda: model.train_stage(3), "upsampling_steps",
                         args.upsampling_steps, args.batch, args.lr)]


PREPARE = {"draem": prepare_draem, "dsr": prepare_dsr}


def new_dfm(args: argparse.Namespace) -> dfm.DFMModel:
    if args.toy and args.weights is None:
        cached = Path(torch.hub.get_dir(), "checkpoints", Path(dfm.URLS[args.backbone]).name).exists()
        print(f"the toy product needs no download: {'cached' if cached else 'random'} weights (or --weights FILE)")
        args.weights = None if cached else "random"
    return to_device(mendable(dfm.DFMModel, args.backbone, args.layer, args.weights or True, args.pooling,
                              args.variance, args.score), args).eval()


def run_dfm(categories: list[Category], folder: Path, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Fits one DFM, class-conditional if there are several categories, and evaluates it on each.

    No gradients: the features stream through once, and PCA and Gaussian are fitted in closed form.
    """
    begun, features, results = time.monotonic(), [], {}
    torch.manual_seed(args.seed)  # weights, if random
    model, identity = new_dfm(args), describe(args, "dfm")  # which names the weights that were found
    paths = [path for category in categories for path in category.train]
    labels = [number for number, category in enumerate(categories) for _ in category.train]
    start = time.monotonic()
    for image, _, _ in stream(paths, args):
        with autocast(args):
            features.append(mendable(model.features, to_network(image, args)))
    streamed = time.monotonic()
    mendable(model.fit, torch.cat(features), torch.tensor(labels))
    components = " + ".join(str(len(pca.components)) for pca in model.pca)
    print(f"{folder.name}: {len(paths)} images, {components} components of {features[0][0].numel()} values; "
          f"{streamed - start:.1f} s for features, {time.monotonic() - streamed:.1f} s for the fit")
    with Run(folder, identity, args.resume) as run:
        run.save("fit", 0, model, ended=True)
        for category in categories:
            own = folder / category.name if args.joint else folder
            own.mkdir(exist_ok=True)
            results[category.name] = evaluate(model, category, own, identity, begun, args)
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and prediction


def stream(paths: list[Path], args: argparse.Namespace, masks: list[Path | None] | None = None, skip: bool = False
           ) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """Batches (images, masks, errors), read by worker processes while the network is busy; InputError unless `skip`."""
    workers = min(common.cores(), math.ceil(len(paths) / args.batch)) if len(paths) > args.batch else 0
    for images, truth, errors in load(ImageFiles(paths, args.size, masks, args.antialias), args, workers, {signal.SIGINT},
                                      batch_size=args.batch):
        for error in () if skip else filter(None, errors):
            raise InputError(error)
        yield images, truth, errors


def predict_batch(model: nn.Module, image: Tensor, args: argparse.Namespace) -> dict[str, Tensor]:
    """score, anomaly_map if there is one, and what else a picture shows, float32 on the CPU; image is uint8."""
    with autocast(args):
        if args.method == "dfm":
            parts = dict(zip(("score", "anomaly_map"), mendable(model.predict, to_network(image, args))))
        else:
            parts = model.predict_parts(to_network(image, args))
    return {name: part.float().cpu() for name, part in parts.items() if part is not None}


def draw_strip(image: Tensor, parts: dict[str, Tensor], mask: Tensor | None, top: float
               ) -> tuple[Image.Image, list[str]]:
    """One image as it is, what the networks made of it, the map over it, the truth: the strip and its headings."""
    panels = {"image": common.panel(image)}
    for name, part in parts.items():
        if name != "anomaly_map":
            panels[name.replace("_", " ")] = common.panel(part) if part.ndim == 3 else common.heat(part)
    panels["map over image"] = common.overlay(panels["image"], parts["anomaly_map"] / top)
    if mask is not None:
        panels["truth"] = common.panel(mask.bool())
    return common.strip(list(panels.values())), list(panels)


def write_image(path: Path, picture: Image.Image, kind: str = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    common.write_atomically(path, lambda file: picture.save(file, kind))


def save_map(path: Path, source: Path, anomaly_map: Tensor) -> None:
    """A map as 32-bit float TIFF of its image's own size, as MVTec AD's evaluation script reads them."""
    with Image.open(source) as image:
        size = image.size[::-1] if image.getexif().get(0x0112, 1) >= 5 else image.size  # lying on its side
    write_image(path, Image.fromarray(anomaly_map.numpy()).resize(size, Image.Resampling.BILINEAR), "TIFF")


def color_top(model: nn.Module) -> float:
    """The upper end of the maps' colour scale: DFM's errors have no fixed range, the others are probabilities."""
    return float(getattr(model, "map_scale", 1.0)) or 1.0


def evaluate(model: nn.Module, category: Category, folder: Path, identity: dict, begun: float, args: argparse.Namespace
             ) -> dict[str, float]:
    """The metrics of the test set, with the last weights; writes metrics.json, and pictures where there are maps."""
    values = measure(model.eval(), category, folder, args) if category.test else {}
    content = values | {"category": category.name, "settings": identity, "seed": identity["seed"],
                        "seconds": round(time.monotonic() - begun, 1)}
    common.write_atomically(folder / "metrics.json", lambda file: file.write(json.dumps(content, indent=1).encode()))
    if not category.test:
        print(f"{category.name}: no test set, so nothing was evaluated; --checkpoint FILE --predict PATH applies it")
    elif "image_auroc" not in values:
        print(f"{category.name}: the test set has no {'normal' if all(category.labels) else 'defective'} images, so "
              "there are no image metrics")
    if category.test and getattr(model, "score_type", "") == "nll":
        print("NLL scores whole images: there are no maps and no pixel metrics")
    elif missing := category.has_truth.count(False):
        print(f"{category.name}: pixel metrics leave out {missing} defective images without a mask in ground_truth/")
    return values


@contextlib.contextmanager
def drawing() -> Iterator[Callable]:
    """submit(function, *arguments): threads write pictures while the network goes on, and few pictures wait."""
    def submit(*job) -> None:
        jobs.append(pool.submit(*job))
        if len(jobs) > 4 * common.cores():
            jobs.popleft().result()

    jobs = deque()
    with ThreadPoolExecutor(common.cores()) as pool:
        yield submit
        for job in jobs:
            job.result()  # raises what the thread raised


def predictions(model: nn.Module, paths: list[Path], args: argparse.Namespace, masks: list[Path | None] | None = None,
                skip: bool = False) -> Iterator[tuple[Tensor, Tensor, str, dict[str, Tensor]]]:
    """Image, mask, error and predict_batch's parts of each path: read, computed and forgotten batch by batch."""
    for images, truths, errors in stream(paths, args, masks, skip):
        parts = predict_batch(model, images, args)
        for i, error in enumerate(errors):
            yield images[i], truths[i], error, {name: part[i] for name, part in parts.items()}


def measure(model: nn.Module, category: Category, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """The metrics; pictures on the way. Scores are kept, images and maps are not."""
    known, shown, top = category.has_truth, [], color_top(model)
    scores, pixels = common.Ranking(len(known)), common.Ranking(known.count(True) * args.size ** 2)
    tests = zip(category.test, category.labels, category.defects, known)
    with drawing() as submit:
        for (path, label, defect, truth), (image, mask, _, parts) in zip(
                tests, predictions(model, category.test, args, category.masks)):
            score = parts.pop("score")
            scores.add(score, torch.tensor(label))
            if not parts:  # a likelihood has no map
                continue
            if truth:
                pixels.add(parts["anomaly_map"], common.connected_components(mask[0]))
            name = path.relative_to(category.folder / "test").with_suffix("")
            strip, headings = draw_strip(image, parts, mask if truth else None, top)
            submit(write_image, folder / "maps" / f"{name}.png", strip)
            if args.save_maps:
                tiff = folder.parent / "anomaly_maps" / category.name / "test" / f"{name}.tiff"
                submit(save_map, tiff, path, parts["anomaly_map"])
            if [other for other, *_ in shown].count(defect) < 2 and truth and len(shown) < 16:
                shown.append((defect, f"{defect}\n{score:.3f}", strip, headings))
    if shown:
        _, captions, strips, headings = zip(*shown)
        write_image(folder / "summary.png", common.sheet(strips, captions, headings[0]))
    image, pixel = scores.metrics(), pixels.metrics()
    return ({f"image_{name}": image[name] for name in ("auroc", "ap", "f1") if image}
            | {f"pixel_{name}": pixel[name] for name in ("auroc", "ap", "aupro") if pixel})


def predict(args: argparse.Namespace) -> int:
    """Prints `path score` a line; strips go to predictions/ below the run root. 2 if any file could not be read."""
    model = load_model(args)
    paths = [path for given in args.predict for path in common.list_images(given)]
    folder, used, bad, top = args.out / args.method / "predictions", set(), 0, color_top(model)
    with drawing() as submit:
        for path, (image, _, error, parts) in zip(paths, predictions(model, paths, args, skip=True)):
            if error:
                print(f"train.py: {error}", file=sys.stderr)
                bad += 1
                continue
            print(f"{path} {parts.pop('score'):.6f}", flush=True)
            name, count = path.stem, 1
            while name in used:  # images of one name in several folders
                name, count = f"{path.stem}.{count + 1}", count + 1
            used.add(name)
            if parts:
                submit(write_image, folder / f"{name}.png", draw_strip(image, parts, None, top)[0])
                if args.save_maps:
                    submit(save_map, folder / f"{name}.tiff", path, parts["anomaly_map"])
    return 2 if bad else 0


# ---------------------------------------------------------------------------------------------------------------------
# The command

IDENTITY = {"draem": ("data", "textures", "width", "sspcab", "batch", "steps", "lr", "beta"),
            "dsr": ("data", "codebook", "width", "batch", "steps", "upsampling_steps", "lr"),
            "dsr-codebook": ("pretrain", "pretrain_steps", "pretrain_batch", "hiddens", "codes", "lr"),
            "dfm": ("data", "backbone", "layer", "pooling", "variance", "score", "weights", "joint"),
            "checkpoint": ("data", "checkpoint")}


def describe(args: argparse.Namespace, method: str) -> dict:
    """The settings that make a run what it is; --resume holds the old ones against the new."""
    def plain(value):
        return str(value.resolve()) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
    return {"method": method} | {name: plain(getattr(args, name))
                                 for name in (*IDENTITY[method], "size", "antialias", "seed", "precision")}


def load_model(args: argparse.Namespace) -> nn.Module:
    """--checkpoint's model in eval mode."""
    load, more = {"draem": (draem.load_draem, ()), "dfm": (dfm.load_dfm, ()),
                  "dsr": (dsr.load_dsr, (getattr(args, "codebook", None),))}[args.method]
    return to_device(from_file(load, args.checkpoint, *more), args)


def run_category(category: Category, args: argparse.Namespace) -> dict[str, float]:
    """Trains (or loads) and evaluates one category; returns its metrics."""
    args = argparse.Namespace(**vars(args) | {"data": category.folder})
    if args.method == "draem":
        args.steps = args.steps or args.epochs * math.ceil(len(category.train) / args.batch)
    folder = args.out / args.method / category.name
    if args.checkpoint:
        folder = folder.with_name(f"{category.name}-checkpoint")
        model, begun = load_model(args), time.monotonic()
        identity = args.trained | describe(args, "checkpoint") | {
            "method": args.method, "seed": args.trained.get("seed", args.seed)}
        folder.mkdir(parents=True, exist_ok=True)
        return evaluate(model, category, folder, identity, begun, args)
    if args.method == "dfm":
        return run_dfm([category], folder, args)[category.name]
    identity, stage_1 = describe(args, args.method), {}
    torch.manual_seed(args.seed)  # initial weights
    if args.method == "dsr" and args.codebook:
        stage_1 = {"stage_1": from_file(dsr.read_codebook, args.codebook).get("run")}  # None of the authors'
    model, stages = PREPARE[args.method](category, args)  # reads everything before anything is written
    with Run(folder, identity, args.resume) as run:
        if run.checkpoint:
            from_file(draem.set_weights, model, run.checkpoint["model"], run.last)
        run.say(f"{args.method}, width {args.width}, {args.size} x {args.size}, {args.device} {args.precision}: "
                f"{' + '.join(str(stage.steps) for stage in stages)} steps of {args.batch} -> {folder}")
        for stage in stages:
            fit(run, model, stages, stage, args)
        return evaluate(model, category, folder, identity | stage_1, run.begun, args)


def bench(category: Category, args: argparse.Namespace) -> int:
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
    images = common.decode((category.train * args.batch)[:args.batch], args.size, "bench", args.antialias)
    torch.manual_seed(args.seed)
    if args.method == "dfm":  # it has no steps: its features stand for them
        model = new_dfm(args)
        def step() -> Tensor:
            with autocast(args):
                return mendable(model.features, to_network(images, args))
        mendable(model.fit, torch.cat([step(), 2 * step()]))
    else:
        args.steps = args.steps or 1
        model, stages = PREPARE[args.method](category, args)
        generator, optimizer = torch.Generator(args.device), new_optimizer(stages[0])
        step = lambda: advance(stages[0], optimizer, generator)
    result = {"method": args.method, "device": str(args.device), "precision": args.precision, "size": args.size,
              "batch": args.batch, "train_ms": median_ms(step)}
    result["train_images_per_s"] = 1000 * args.batch / result["train_ms"]
    if args.method != "dfm":
        result["synthesis_images_per_s"] = 1000 * args.batch / median_ms(lambda: stages[0].synthesize(generator))
    model.eval()
    result["predict_ms"] = median_ms(lambda: predict_batch(model, images, args))
    result["predict_images_per_s"] = 1000 * args.batch / result["predict_ms"]
    memory = (torch.cuda.max_memory_allocated() if args.device.type == "cuda" else
              resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
              if resource else 0)
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}
                     | {"peak_memory_mib": round(memory / 2 ** 20)}))
    return 0


def print_table(results: dict[str, dict[str, float]]) -> None:
    columns = ("image_auroc", "image_ap", "image_f1", "pixel_auroc", "pixel_ap", "pixel_aupro")
    rows = dict(results)
    if len(rows) > 1:
        found = {column: [row[column] for row in rows.values() if column in row] for column in columns}
        rows["mean"] = {column: sum(values) / len(values) for column, values in found.items() if values}
    width = max(map(len, (*rows, "category")))
    print(f"{'category':{width}}" + "".join(f"{column.replace('_', ' '):>13}" for column in columns))
    for name, row in rows.items():
        print(f"{name:{width}}" + "".join(f"{row[c]:13.4f}" if c in row else f"{'-':>13}" for c in columns))


def share_out(categories: list[Category]) -> list[Category]:
    """This rank's part: the longest first, each to the rank that has the least so far."""
    loads, mine = [0] * WORLD, []
    for category in sorted(categories, key=lambda category: -len(category.train)) if WORLD > 1 else categories:
        rank = loads.index(min(loads))
        loads[rank] += len(category.train)
        if rank == RANK:
            mine.append(category)
    return mine


def run_all(args: argparse.Namespace) -> int:
    if args.toy:
        common.make_toy("data/toy")
    categories = common.find_categories("data/toy" if args.toy else args.data)
    if args.method == "dsr" and not args.checkpoint:
        toy = args.toy and not args.codebook and not args.pretrain
        if toy:
            args.pretrain = categories[0].folder / "train" / "good"
        if args.pretrain and not args.bench:
            args.codebook = pretrain_dsr(args, toy)
    if args.method == "draem" and not (args.textures or args.checkpoint) and RANK == 0:
        print("no --textures: coloured noise stands in; the published results need DTD (--textures dtd/images)")
    if args.bench:
        return bench(categories[0], args)
    if args.method == "dfm" and args.joint and not args.checkpoint:
        print_table(run_dfm(categories, args.out / "dfm" / "joint", args))
        print(f"written to {args.out / 'dfm' / 'joint'}")
        return 0
    results, failures, suffix = {}, {}, "-checkpoint" if args.checkpoint else ""
    for category in share_out(categories):
        try:
            results[category.name] = run_category(category, args)
        except (InputError, Exception if WORLD > 1 else InputError) as error:
            if len(categories) == 1 and WORLD == 1 or isinstance(error, Stopped):
                raise
            if not isinstance(error, InputError):
                traceback.print_exc()
            failures[category.name] = str(error)
    if WORLD > 1:
        everyone = [None] * WORLD
        dist.all_gather_object(everyone, (results, failures))
        results = {c.name: found[c.name] for c in categories for found, _ in everyone if c.name in found}
        failures = {f"rank {rank}: {name}": text for rank, (_, of) in enumerate(everyone) for name, text in of.items()}
    if RANK == 0:
        if any(results.values()):
            print_table(results)
        for name, text in failures.items():
            print(f"train.py: {name}: {text}", file=sys.stderr)
        if results:
            print(f"written to {args.out / args.method}: {', '.join(f'{name}{suffix}' for name in results)}")
    return 2 if failures else 0


def user_line(error: Exception) -> InputError:
    """What a user can mend, in one line; anything else is raised again, a fault of this program."""
    if isinstance(error, InputError):
        return error
    if isinstance(error, OSError):
        return InputError(f"{error.filename or 'output'}: {error.strerror or error}")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return InputError("out of memory: a smaller --batch, --size or --width needs less")
    raise error


def main(argv: list[str] | None = None) -> int:
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="surrogateescape")  # file names of any bytes are printed as they are
    try:
        args = parse(argv)
        toy = args.data is None and args.checkpoint is None
        if toy:
            args = parse(argv, **TOY[args.method])
        elif args.checkpoint:
            content = read_checkpoint(args.checkpoint)
            if isinstance(method := content.get("method"), str) and method != args.method:
                raise InputError(f"{args.checkpoint}: a checkpoint of {method}, not of {args.method}")
            run = content.get("run")
            trained = run if isinstance(run, dict) else {}  # unknown of others' files
            args = parse(argv, size=str(trained.get("size", args.size)), trained=trained)  # a text is checked as given
        args.toy = toy
        settle_hardware(args)
        if WORLD > 1:
            backend, wait = "cpu:gloo,cuda:nccl" if args.device.type == "cuda" else "gloo", datetime.timedelta(days=30)
            mendable(lambda: dist.init_process_group(backend, timeout=wait))  # ranks wait for the longest category
        return predict(args) if args.predict else run_all(args)
    except Stopped as stopped:
        number, text = stopped.args
        print(f"\n{text}", file=sys.stderr)
        return 128 + number
    except KeyboardInterrupt:
        print("\nstopped; a training goes on from its last checkpoint with the same command and --resume",
              file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        print(f"train.py: {user_line(error)}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
