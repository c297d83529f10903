"""Train, evaluate and apply DRAEM, DSR and DFM.

    python train.py draem                                         a generated toy product: minutes on a CPU, no network
    python train.py draem --data mvtec/bottle --textures dtd/images
    python train.py draem --data mvtec --textures dtd/images      every category below, and a table of means
    torchrun --nproc-per-node 8 train.py draem --data mvtec       the categories shared out over GPUs or machines
    python train.py draem --checkpoint runs/draem/bottle/last.pt --predict part.png photos/

Results are in runs/METHOD/CATEGORY. What the methods do is in their own files. This one holds, in order: options, a
run's folder, the training loop, what each method is fed, evaluation and prediction, main.
"""
import argparse
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

import common
import dfm
import draem
import dsr

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
METHODS = {"draem": draem, "dsr": dsr, "dfm": dfm}
TOY = {  # replaces the published values where --data is not given, so that minutes on a CPU do
    "draem": dict(size=64, width=32, steps=500, lr=3e-4),
    "dsr": dict(size=64, hiddens=32, codes=512, width=16, lr=1e-3, pretrain_steps=2000, pretrain_batch=16, steps=1000,
                upsampling_steps=300),
    "dfm": dict(backbone="resnet18", pooling=2, weights="random")}
MAY_CHANGE = {"data", "out", "device", "compile", "resume", "save_minutes", "checkpoint", "predict", "threshold",
              "textures", "codebook", "pretrain"}  # --resume does not compare them: data may move

# --- Options ----------------------------------------------------------------------------------------------------------

def parse(argv: list[str] | None) -> argparse.Namespace:
    """The settings of one call, checked, with the device and precision that this machine has. Bad ones: status 2."""
    parser = argparse.ArgumentParser(prog="train.py", usage=argparse.SUPPRESS, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="method", required=True, metavar="{draem,dsr,dfm}")
    for method, module in METHODS.items():
        published = module.PUBLISHED
        command = commands.add_parser(method, prog=f"train.py {method}", usage=argparse.SUPPRESS, allow_abbrev=False)
        def add(name: str, help: str, **given) -> None:
            command.add_argument(name, help=f"{help} (%(default)s)" if "default" in given else help, **given)
        add("--data", type=Path, help="a category in MVTec's layout, a folder of such, or normal images; else a toy")
        add("--out", type=Path, default="runs", help="root of the run folders")
        add("--size", type=int, help=f"images become squares of this side, {published['size']} if not given")
        add("--antialias", action=argparse.BooleanOptionalAction, help="yes if not given; no: from four pixels (D9)")
        add("--bits", type=int, choices=(10, 12, 14, 16), help="of a camera that fills a part of 16-bit grey files")
        add("--batch", type=int, default=published["batch"], help="images a step")
        add("--seed", type=int, default=0, help="of initial weights and all random numbers")
        add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
        add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="of the networks")
        add("--compile", action="store_true", help="torch.compile the networks, for a GPU; minutes before step 1")
        add("--resume", action="store_true", help="go on from the run folder's last.pt")
        add("--save-minutes", type=float, default=10, help="between checkpoints")
        add("--checkpoint", type=Path, help="do not train: evaluate this file's weights on --data, or --predict")
        add("--predict", type=Path, nargs="+", help="images and folders: print path and score, draw maps")
        add("--threshold", type=float, help="scores from here upward are called defective; dfm has its own")
        if method == "draem":
            add("--textures", type=Path, help="to make anomalies from; else dtd, here or beside the data; else noise")
            add("--width", type=int, default=published["width"], help="of the first network, twice the other's")
            add("--sspcab", action="store_true", help="put the SSPCAB block into the reconstructive encoder")
            add("--steps", type=int, help=f"instead of {published['epochs']} epochs")
        if method == "dsr":
            add("--codebook", type=Path, help="the authors' file or one that --pretrain made, else a download")
            add("--pretrain", type=Path, help="in place of --codebook: train one on these images, stage 1")
            for name, what in (("pretrain_steps", "of stage 1"), ("pretrain_batch", "of stage 1"),
                               ("hiddens", "width of stage 1's networks"), ("codes", "in each codebook"),
                               ("steps", "of stage 2"), ("upsampling_steps", "of stage 3"), ("width", "of the U-Nets")):
                add("--" + name.replace("_", "-"), type=int, default=published[name], help=what)
        if method == "dfm":
            add("--backbone", choices=tuple(dfm.RESNETS), default=published["backbone"], help="pretrained network")
            add("--layer", choices=dfm.LAYERS, default=published["layer"], help="whose features are taken")
            add("--pooling", type=int, default=published["pooling"], help="side of the average pooling")
            add("--share", type=float, default=published["share"], help="of the variance, kept by PCA")
            add("--score", choices=("fre", "nll"), default=published["score"], help="nll, a likelihood, has no map")
            add("--weights", help="torchvision's weights from a file, or 'random'; else a download")
        else:
            add("--lr", type=float, default=published["lr"], help="learning rate before its drops")
            add("--rotate", type=float, default=published["rotate"], help="normal images by up to these degrees")
    args = parser.parse_args(argv)
    toy, command = not (args.data or args.checkpoint or args.predict), commands.choices[args.method]
    if toy:
        command.set_defaults(data=Path("data/toy"), **TOY[args.method])
        args = parser.parse_args(argv)
    size, least = args.size or METHODS[args.method].PUBLISHED["size"], 64 if args.method == "dsr" else 32
    used = "method batch precision data out device resume checkpoint predict threshold codebook".split()
    others = [name for name in sorted({*vars(args)} - {*used}) if getattr(args, name) != command.get_default(name)]
    refused = {
        "--predict needs --checkpoint FILE, the weights to apply": args.predict and not args.checkpoint,
        "--checkpoint needs --data DIR or --predict PATH": args.checkpoint and bool(args.data) == bool(args.predict),
        f"--{' --'.join(others).replace('_', '-')}: not used with --checkpoint; leave out": args.checkpoint and others,
        "--pretrain trains a codebook and --codebook gives one; choose": getattr(args, "pretrain", 0) and args.codebook,
        f"--size {size}: {least} or more is needed, in steps of 32": size % 32 or size < least}
    low = {"seed": -math.inf, "width": 2, "hiddens": 2}  # networks of half a width are among them
    refused |= {f"--{name.replace('_', '-')} {value}: {low.get(name, 1)} or more is needed": value < low.get(name, 1)
                for name, value in vars(args).items() if type(value) is int}
    for message in [message for message, wrong in refused.items() if wrong]:
        command.error(message)
    device, precision = hardware(args)
    preprocessing = {"size": size, "antialias": args.antialias is not False, "bits": args.bits or 16}
    settled = vars(args) | preprocessing | {"device": device, "precision": precision}
    settings = {name: value for name, value in settled.items() if name not in MAY_CHANGE}
    kind = torch.float16 if precision == "fp16" else torch.bfloat16
    autocast = functools.partial(torch.autocast, device.type, kind, enabled=precision != "fp32")
    return argparse.Namespace(**settled, toy=toy, preprocessing=preprocessing, settings=settings, autocast=autocast)


def hardware(args: argparse.Namespace) -> tuple[torch.device, str]:
    """--device and --precision as this machine has them. ValueError for a device that cannot be used."""
    try:
        device = torch.device(args.device)
        if device.type == "cuda" and torch.cuda.is_available():
            local = int(os.environ.get("LOCAL_RANK", 0))  # set by torchrun
            device = torch.device("cuda", local if device.index is None else device.index)
            torch.cuda.set_device(device)
        torch.ones(1, device=device).add_(1).item()  # fails on a GPU that is too old for this PyTorch
    except (RuntimeError, AssertionError) as error:  # AssertionError: a PyTorch without CUDA
        raise ValueError(f"--device {args.device}: {str(error).splitlines()[0]}; {torch.cuda.device_count()} GPUs for "
                         f"{WORLD} processes; --device cpu works anywhere") from None
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # fp32 means float32; bf16 is the fast one
    if args.precision != "auto":
        return device, args.precision
    if args.method == "dfm":  # the likelihood weighs the directions of least variance most, where rounding would show
        return device, "fp32"
    if device.type == "cuda":
        return device, "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private: without them bf16 must be asked for
    return device, "bf16" if any(getattr(torch.cpu, probe, lambda: False)() for probe in probes) else "fp32"


# --- A run's folder ---------------------------------------------------------------------------------------------------

class Run:
    """The folder of one training and the content of its last.pt. ValueError where that cannot be continued."""

    def __init__(self, folder: Path, settings: dict, resume: bool):
        self.folder, self.last, self.test_set = folder, folder / "last.pt", 0
        self.state = {"settings": settings, "steps": {}, "log": [], "optimizer": None, "scaler": {}}
        if self.last.exists():
            if not resume:
                raise ValueError(f"{folder}: holds a run; --resume goes on with it, --out DIR puts this one elsewhere")
            self.state = draem.read_weights(self.last).get("run", {})
            if "settings" not in self.state:
                raise ValueError(f"{self.last}: not a checkpoint to go on from; choose another root with --out DIR")
        self.settings, self.steps = self.state["settings"], self.state["steps"]
        for name, then in self.settings.items():
            if settings.get(name, then) != then:
                raise ValueError(f"{self.last}: {name} was {then}, not {settings[name]}; go back or take another --out")
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, model: nn.Module, method: str) -> None:
        torch.save({"method": method, "settings": model.settings, "preprocessing": model.preprocessing,
                    "model": model.state_dict(), "run": self.state}, self.folder / "last.tmp")
        (self.folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.state["log"]))
        os.replace(self.folder / "last.tmp", self.last)  # a kill leaves the old checkpoint or the new one

    def metrics(self) -> dict:
        """What the evaluation of this very run on this test set left, complete, in metrics.json; else {}."""
        try:
            found = json.loads((self.folder / "metrics.json").read_text())
            own = (found["settings"], found["test_set"], found["unreadable"]) == (self.settings, self.test_set, 0)
        except (OSError, ValueError, KeyError, TypeError):  # none yet, or cut short
            return {}
        return found if own and self.steps else {}


# --- The training loop ------------------------------------------------------------------------------------------------

def train(run: Run, model: nn.Module, parameters, sample, stage: str, steps: int, drops: tuple, args) -> None:
    """Takes the steps of one stage that the run lacks. model.losses gets *sample(generator), then the generator."""
    start = run.steps.get(stage, 0)
    if start == steps:
        return
    optimizer = torch.optim.Adam(parameters, args.lr, fused=True)
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.precision == "fp16")
    generator = torch.Generator(args.device)
    if start:
        print(f"{stage}: resumed after step {start}")
        optimizer.load_state_dict(run.state["optimizer"])
        scaler.load_state_dict(run.state["scaler"])
    if not run.steps and hasattr(model, "simulate"):
        save_simulated(run.folder, model, sample, generator.manual_seed(args.seed))
    if args.compile:  # networks, not bare convolutions and quantizers
        for part in [*model.children(), *getattr(model, "discrete_latent_model", nn.Module()).children()]:
            if any(isinstance(inner, nn.Conv2d) for inner in [*part.modules()][1:]):
                part.compile()
    stop = []  # holds a Ctrl-C or SIGTERM until the step is done; a second one ends a step that hangs
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: (stop.append(number), signal.signal(number, signal.SIG_DFL)))
    began = saved = time.monotonic()
    for step in range(start, steps):
        optimizer.param_groups[0]["lr"] = rate = METHODS[args.method].learning_rate(step, steps, args.lr, drops)
        # Step n depends on (seed, stage, n) alone, so a resumed run goes on as if it had never stopped.
        generator.manual_seed(zlib.crc32(f"{args.seed} {stage} {step}".encode()))
        batch = sample(generator)
        with args.autocast():
            terms = model.losses(*batch, generator)
        optimizer.zero_grad()
        scaler.scale(sum(terms.values())).backward()
        scaler.step(optimizer)
        scaler.update()

        done = step + 1
        log = done % 50 == 0 or done in (1, steps)
        save = bool(stop) or done == steps or time.monotonic() - saved > 60 * args.save_minutes
        if log or save:
            values = {name: term.item() for name, term in terms.items()}  # waits for the GPU
            if not all(map(math.isfinite, values.values())):
                raise ValueError(f"{stage}, step {done}: the loss is not finite, {values}; try a lower --lr or fp32")
        if log:
            run.state["log"].append({"stage": stage, "step": done, **values, "lr": rate})
            seconds = (time.monotonic() - began) / (done - start)
            print(f"{stage} {done}/{steps}", *(f" {name} {value:.4f}" for name, value in values.items()),
                  f" lr {rate:.0e}  {seconds:.2g} s/step  {(steps - done) * seconds / 60:.0f} min left", flush=True)
        if save:
            run.steps[stage] = done
            run.state["optimizer"] = optimizer.state_dict() if done < steps else None  # two thirds of the file
            run.state["scaler"] = scaler.state_dict()
            run.save(model, args.method if stage != "codebook" else "dsr-codebook")
            saved = time.monotonic()
            if stop:
                print(f"stopped after step {done}; the same command with --resume goes on", file=sys.stderr)
                sys.exit(128 + stop[0])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# --- What each method is fed ------------------------------------------------------------------------------------------

def to_device(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    model.preprocessing = args.preprocessing | model.preprocessing
    return model.to(args.device, memory_format=torch.channels_last)


def to_float(image: Tensor, args: argparse.Namespace) -> Tensor:
    """uint8 images as floats in [0, 1] on the device, channels last."""
    return (image.to(args.device, non_blocking=True).float() / 255).contiguous(memory_format=torch.channels_last)


def choose(sources: list[Tensor | None], args: argparse.Namespace, generator: torch.Generator) -> list[Tensor | None]:
    """A batch of each source, with replacement; None stays None."""
    pick = functools.partial(torch.randint, size=(args.batch,), generator=generator, device=args.device)
    return [None if source is None else to_float(source[pick(len(source))], args) for source in sources]


def save_simulated(folder: Path, model: nn.Module, sample, generator: torch.Generator) -> None:
    """simulated.png: six samples, made as in a training step: image, what the network is shown, mask."""
    rows = []
    while len(rows) < 6:
        shown = model.simulate(*sample(generator), generator, normal_share=0)
        names = list(shown)[:3]  # image, what the network is shown, mask
        rows += [("", {name: common.panel(shown[name][i].cpu()) for name in names}) for i in range(len(shown["mask"]))]
    common.page(rows[:6]).save(folder / "simulated.png")


def load_textures(args: argparse.Namespace) -> Tensor | None:
    """The images of --textures, or DTD's where it lies in the working folder, in or beside the data; else None."""
    roots = [] if args.toy else [Path(), args.data, *args.data.resolve().parents[:2]]
    found = [root / name for root in roots for name in ("dtd/images", "dtd") if (root / name).is_dir()]
    folder = args.textures or next(iter(found), None)
    print(f"textures: {folder or 'coloured noise; the published results need DTD, --textures dtd/images'}")
    return common.load_images(common.list_images(folder), **args.preprocessing).to(args.device) if folder else None


def train_draem(images: Tensor, textures: Tensor | None, run: Run, args: argparse.Namespace) -> nn.Module:
    model = draem.load(run.last) if run.steps else draem.DraemModel(args.width, args.sspcab, rotate=args.rotate)
    model = to_device(model, args).train()
    sample = functools.partial(choose, [images, textures], args)
    steps = args.steps or draem.PUBLISHED["epochs"] * math.ceil(len(images) / args.batch)
    train(run, model, list(model.parameters()), sample, "train", steps, draem.PUBLISHED["drops"], args)
    return model


def train_dsr(images: Tensor, codebook: Path | None, run: Run, args: argparse.Namespace) -> nn.Module:
    model = to_device(dsr.load(run.last) if run.steps else
                      dsr.DsrModel(dsr.load_codebook(codebook), args.width, rotate=args.rotate), args)
    sample = functools.partial(choose, [images], args)
    train(run, model, model.begin(2), sample, "detection", args.steps, dsr.PUBLISHED["drops"], args)
    train(run, model, model.begin(3), sample, "upsampling", args.upsampling_steps, (), args)
    return model


def pretrain_dsr(args: argparse.Namespace) -> Path:
    """Trains stage 1 of DSR, or what its folder lacks of it. Images are read a batch ahead. Returns the codebook."""
    source, name = (args.pretrain, args.pretrain.resolve().name) if args.pretrain else (args.data / "train/good", "toy")
    paths = common.list_images(source)
    later = dict.fromkeys(("batch", "steps", "upsampling_steps", "width", "rotate"))  # of stages 2, 3: not compared
    run = Run(args.out / "dsr" / f"codebook-{name}", args.settings | later | {"images": len(paths)}, resume=True)
    print(f"stage 1: {len(paths)} images of {source} -> {run.last}" + ", used or continued as it is" * bool(run.steps))
    if WORLD > 1 and run.steps.get("codebook") != args.pretrain_steps:
        raise ValueError("--pretrain is one process's work: run it without torchrun first")
    torch.manual_seed(args.seed)  # initial weights
    latent = dsr.load_codebook(run.last) if run.steps else dsr.DiscreteLatentModel(
        args.hiddens, residual_hiddens=args.hiddens // 2, codes=args.codes, code_length=args.hiddens)
    latent = to_device(latent, args).train()
    steps = range(run.steps.get("codebook", 0), args.pretrain_steps)
    generators = (torch.Generator().manual_seed(zlib.crc32(f"{args.seed} images {step}".encode())) for step in steps)
    indices = (torch.randint(len(paths), (args.pretrain_batch,), generator=own).tolist() for own in generators)
    read = functools.lru_cache(5000)(lambda index: common.read_image(paths[index], **args.preprocessing))
    batches = common.read_ahead(read, indices)

    def sample(generator: torch.Generator) -> list[Tensor]:
        image = torch.stack(next(batches))
        image = to_float(image.pin_memory() if args.device.type == "cuda" else image, args)
        if not args.pretrain:  # the toy, for ImageNet: codes learned from the product alone cannot represent a defect
            image, _ = draem.synthesize_anomalies(image, None, generator, normal_share=0.2)
        return [image]
    train(run, latent, list(latent.parameters()), sample, "codebook", args.pretrain_steps, (), args)
    return run.last


def fit_dfm(images: Tensor, _, run: Run, args: argparse.Namespace) -> nn.Module:
    if run.steps:
        return to_device(dfm.load(run.last), args)
    model = dfm.DFMModel(args.backbone, args.layer, args.weights or True, args.pooling, args.share, args.score)
    model = to_device(model, args).eval()
    with args.autocast():
        model.fit(torch.cat([model.features(to_float(image, args)) for image in images.split(args.batch)]))
    print("{} components of {} values,".format(*model.pca[0].components.shape), f"threshold {model.threshold:.6g}")
    run.steps["fit"] = 1
    run.save(model, "dfm")
    return model


# --- Evaluation and prediction ----------------------------------------------------------------------------------------

def predictions(model: nn.Module, items: list[common.TestImage], folder: Path, args: argparse.Namespace):
    """Yields (item, score, row of a picture, map or None, mask or None). What cannot be read is named and left out."""
    def read(item: common.TestImage) -> tuple | None:
        try:
            photo = common.open_upright(item.path)
            image = common.to_tensor(photo, **model.preprocessing)
            return item, image, common.read_mask(item.mask, len(image[0]), photo.size) if item.mask else None
        except ValueError as error:
            sys.stderr.write(f"train.py: {error}\n")  # one write: threads share the stream

    groups = [items[start:start + args.batch] for start in range(0, len(items), args.batch)]
    for group in common.read_ahead(read, groups):
        group = [entry for entry in group if entry]
        if group:
            with args.autocast():
                parts = model.predict(to_float(torch.stack([image for _, image, _ in group]), args))
            parts = {name: part.float().cpu() for name, part in parts.items()}
        for number, (item, image, mask) in enumerate(group):
            part = {name: values[number] for name, values in parts.items()}
            mask = torch.zeros(image.shape[1:], dtype=torch.bool) if item.defect == "good" else mask
            panels = common.panels(image, part, mask, float(getattr(model, "map_top", 1)))
            row = f"{item.defect}\n{part['score']:.3f}\n{item.path.name}".strip(), panels
            if "anomaly_map" in part:  # its picture is 0.png for 0.png, 0.jpg.png for 0.jpg: no two images share one
                extended = item.name.suffix != ".png" or Path(item.name.stem).suffix.lower() in common.IMAGE_SUFFIXES
                path = folder / (f"{item.name}.png" if extended else item.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                common.page([row]).save(path, compress_level=1)
            yield item, part["score"].item(), row, part.get("anomaly_map"), mask


def evaluate(model: nn.Module, category: common.Category, run: Run, args: argparse.Namespace) -> dict:
    """Metrics of the test set, with the last weights. Writes maps/, summary.png, scores.csv and, last, metrics.json."""
    kinds, shown = {}, {}
    rows, maps, masks = [], [], []
    for item, score, row, anomaly_map, mask in predictions(model.eval(), category.test, run.folder / "maps", args):
        rows.append((item.path, int(item.defect != "good"), score))
        scores = kinds.setdefault(item.defect, [])
        scores.append(score)
        for end, extreme in (("highest", max), ("lowest", min)):
            if score == extreme(scores):
                shown[item.defect, end] = row
        if anomaly_map is not None and mask is not None and (mask.any() or item.defect == "good"):
            maps.append(anomaly_map)
            masks.append(mask)
    if shown:
        once = {id(row): row for _, row in sorted(shown.items())}  # an image may be both
        common.page([*once.values()]).save(run.folder / "summary.png")
    if not category.test:
        print(f"{category.name}: no test images; next: {args.method} --checkpoint {run.last} --predict PATH")
    common.write_csv(run.folder / "scores.csv", "w", [("path", "label", "score"), *rows])  # pixel metrics need memory
    threshold = float(getattr(model, "threshold", math.nan)) if args.threshold is None else args.threshold
    good = kinds.get("good", [])
    metrics = {"kinds": {}, "tested": len(rows), "unreadable": len(category.test) - len(rows), "test_set": run.test_set}
    for kind, scores in kinds.items():
        report = metrics["kinds"][kind] = {"count": len(scores)}
        if good and kind != "good":
            report["image_auroc"] = common.image_metrics(good + scores, [0] * len(good) + [1] * len(scores))["auroc"]
        if not math.isnan(threshold):
            report |= {"threshold": threshold, "called_defective": sum(score >= threshold for score in scores)}
        print(f"{category.name}: {kind}", *(f" {name.replace('_', ' ')} {value:.4g}" for name, value in report.items()))
    if len(maps) < len(rows):
        print(f"{category.name}: pixel metrics leave out {len(rows) - len(maps)} images without a map or a mask")
    image_metrics = common.image_metrics([score for *_, score in rows], [label for _, label, _ in rows])
    metrics |= {f"image_{name}": value for name, value in image_metrics.items()}
    metrics |= {f"pixel_{name}": value for name, value in common.pixel_metrics(maps, masks).items()}
    commit = subprocess.getoutput(f'git -C "{Path(__file__).parent}" describe --always --dirty 2>/dev/null')
    metrics |= {"settings": run.settings, "data": str(args.data), "torch": torch.__version__, "commit": commit}
    (run.folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
    return metrics


def predict(model: nn.Module, folder: Path, args: argparse.Namespace) -> int:
    """Prints path, score and decision. Pictures and scores.csv, which grows, go into the folder. Returns the status."""
    paths = [path for given in args.predict for path in common.list_images(given)]
    items = [common.TestImage(path, Path(*Path(os.path.abspath(path)).parts[1:]), "", None) for path in paths]
    threshold = float(getattr(model, "threshold", math.nan)) if args.threshold is None else args.threshold
    scores, count = folder / "scores.csv", 0
    folder.mkdir(parents=True, exist_ok=True)
    common.write_csv(scores, "a", [] if scores.exists() else [("path", "score", "decision", "checkpoint")])
    told = "none, see --threshold" if math.isnan(threshold) else f"{threshold:.6g}"
    print(f"pictures and scores.csv: {folder}; threshold: {told}", file=sys.stderr)
    for item, score, *_ in predictions(model.eval(), items, folder, args):
        decision = "" if math.isnan(threshold) else ("normal", "defective")[score >= threshold]
        print(f"{item.path} {score:.6f} {decision}".rstrip(), flush=True)
        common.write_csv(scores, "a", [(os.path.abspath(item.path), score, decision, args.checkpoint)])
        count += 1
    return 0 if count == len(items) else 2


# --- The command ------------------------------------------------------------------------------------------------------

def print_table(results: dict[str, dict]) -> None:
    """A row a category and, below several, each column's mean over the rows that have it."""
    columns = "image_auroc", "image_ap", "image_f1", "pixel_auroc", "pixel_ap", "pixel_f1", "pixel_aupro"
    if len(results) > 1:
        found = {column: [row[column] for row in results.values() if column in row] for column in columns}
        results = results | {"mean": {name: sum(values) / len(values) for name, values in found.items() if values}}
    width = max(map(len, (*results, "category")))
    print(f"{'category':{width}}" + "".join(f"{column.replace('_', ' '):>13}" for column in columns))
    for name, row in results.items():
        print(f"{name:{width}}" + "".join(f"{row[c]:13.4f}" if c in row else f"{'-':>13}" for c in columns))


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status. ValueError or OSError, one line, for what a user can mend."""
    args = parse(argv)
    root, model, settings = args.out / args.method, None, args.settings
    target = root / "predictions" if args.predict else args.out
    sources = args.predict or [getattr(args, name, None) for name in ("data", "textures", "pretrain")]
    for path in filter(None, sources):
        if target.resolve().is_relative_to(path.resolve()) or path.resolve().is_relative_to(target.resolve()):
            raise ValueError(f"{path} and {target}, where results go, lie one inside the other; choose another --out")
    if args.checkpoint:
        codebook = [args.codebook] if args.method == "dsr" else []
        model = to_device(METHODS[args.method].load(args.checkpoint, *codebook), args)
        settings = model.settings | model.preprocessing | {"precision": args.precision, "file": str(args.checkpoint)}
        print(f"{args.checkpoint}: {args.method}, reads images as {model.preprocessing}", file=sys.stderr)
    if args.predict:
        return predict(model, root / "predictions", args)
    categories = common.find_categories(common.make_toy(args.data) if args.toy else args.data, training=not model)
    learn, extra = {"draem": train_draem, "dsr": train_dsr, "dfm": fit_dfm}[args.method], None
    if args.method == "draem" and not model:
        extra = load_textures(args)
        if args.compile:
            draem.AUGMENTATIONS = tuple(map(torch.compile, draem.AUGMENTATIONS))
    if args.method == "dsr" and not model:
        extra = pretrain_dsr(args) if (args.pretrain or args.toy) and not args.codebook else args.codebook
    results = {}
    for category in categories[RANK::WORLD]:
        counts = {"images": len(category.train), "textures": len(extra) if torch.is_tensor(extra) else 0}
        run = Run(root / (f"{category.name}-checkpoint" if model else category.name), settings | counts, args.resume)
        run.test_set = zlib.adler32(ascii(category.test).encode())  # changes with paths, kinds and masks
        results[category.name] = {} if args.threshold is not None else run.metrics()
        if results[category.name]:
            continue
        (run.folder / "metrics.json").unlink(missing_ok=True)  # another run's, or not complete
        if not model:
            print(f"{category.name}: {args.method}, {len(category.train)} images, {args.size} x {args.size}, "
                  f"{args.device} {args.precision}, batches of {args.batch} -> {run.folder}")
            torch.manual_seed(args.seed)  # initial weights
            images = common.load_images(category.train, **args.preprocessing).to(args.device)
            trained = learn(images, extra, run, args)
            if args.compile:  # prediction runs uncompiled
                trained = to_device(METHODS[args.method].load(run.last), args)
        results[category.name] = evaluate(model or trained, category, run, args)
    print_table(results)
    return 2 if any(row["unreadable"] for row in results.values()) and WORLD == 1 else 0  # 2 ends torchrun's others


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # names that the console's encoding lacks are escaped
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError) as error:  # what a user can mend; python -X dev train.py shows the traceback
        if sys.flags.dev_mode:
            raise
        print("train.py:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
