"""What the three methods share and nobody copies along with a model: reading images and data sets, metrics, pictures,
files that are never half-written, and a generated toy product.

Images are RGB, uint8, (3, size, size); masks are uint8, (1, size, size), 1 = anomalous; both are squeezed to a square
whatever their aspect ratio. What a user can mend is an InputError: one line that says what, where, and what to do.
"""

import logging
import math
import os
import shutil
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # no EPS, for which Pillow would run Ghostscript

# Pillow remarks on palettes with alpha, damaged EXIF, large pictures: here they are read well or become an InputError.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


class InputError(Exception):
    """Something that a user can mend. The message is one printable line, whatever bytes a file's name is made of."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.encode("utf-8", "backslashreplace").decode().splitlines()))


def cores() -> int:
    """Processors that this process may use, less the share of other ranks on the same machine."""
    known = hasattr(os, "sched_getaffinity")  # which Windows and macOS lack
    count = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    return max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


# --- Reading images ---------------------------------------------------------------------------------------------------


def _open(path: Path, finish: Callable[[Image.Image, str], np.ndarray]) -> Tensor:
    """`finish(first frame turned upright, mode)` as a tensor; every way in which that can fail is an InputError."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise InputError("it is a folder or a device, not a file")
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            # "I" is 32-bit and of unknown range in TIFF, but 16-bit in PGM and, with older Pillow, in PNG.
            mode = "I;16" if image.mode == "I" and image.format in ("PNG", "PPM") else image.mode
            return torch.from_numpy(finish(ImageOps.exif_transpose(image), mode))
    except Exception as error:  # on damaged files Pillow raises SyntaxError, struct.error, MemoryError...
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "it is empty" if path.stat().st_size == 0 else f"it is none of {', '.join(FORMATS)}"
        raise InputError(f"{path}: cannot be read as an image: {reason}; replace or remove it") from None


def _rgb(image: Image.Image, mode: str) -> Image.Image:
    if mode.startswith("I;16"):  # Pillow's own conversion clips at 255
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif mode in ("I", "F", "LAB"):
        raise InputError(f"mode {mode} has no known range (save it as 8-bit RGB or as 8- or 16-bit grey)")
    elif mode in ("La", "RGBa"):  # stored multiplied by alpha
        image = image.convert(mode.upper())
    return image.convert("RGB")


def read_image(path: Path | str, size: int, antialias: bool = False) -> Tensor:
    """The image in 8-bit RGB, (3, size, size): upright by EXIF orientation, first frame, alpha dropped, not blended,
    16-bit grey divided by 257. 32-bit and LAB files are refused.

    Resized bilinearly from the four nearest pixels, as OpenCV's resize does and the authors' results need; or with
    Pillow's antialiasing, which averages over all pixels that an output pixel covers."""

    def finish(image: Image.Image, mode: str) -> np.ndarray:
        image = _rgb(image, mode)
        if antialias:
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        else:
            matrix = (image.width / size, 0, 0, 0, image.height / size, 0)
            image = image.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))

    return _open(Path(path), finish)


def read_mask(path: Path | str, size: int) -> Tensor:
    """The mask, uint8 (1, size, size): 1 where more than half of a pixel's area (Pillow's BOX) is anomalous, which is
    where the file is not black, however dark. A mask of other dimensions than its image is squeezed like it."""

    def finish(image: Image.Image, mode: str) -> np.ndarray:
        grey = mode in ("1", "L", "I", "F") or mode.startswith("I;16")  # compared as it is, so that 1 of 65535 counts
        array = np.asarray(image if grey else _rgb(image, mode)) != 0
        area = Image.fromarray(array.reshape(*array.shape[:2], -1).any(axis=2).astype(np.float32))
        area = np.asarray(area.resize((size, size), Image.Resampling.BOX))
        return (area > 0.5 + 1e-6).astype(np.uint8)[None]  # half, off by rounding, is not more than half

    return _open(Path(path), finish)


class ImageFiles(torch.utils.data.Dataset):
    """Items (image, mask, error): uint8 (3, size, size); uint8 (1, size, size), zeros where there is no mask; "", or an
    InputError's line with zeros for both. As a value it leaves a worker process as one line, and the others go on."""

    def __init__(self, paths: Sequence[Path], size: int, masks: Sequence[Path | None] | None = None,
                 antialias: bool = False):
        self.paths, self.size, self.antialias = list(paths), size, antialias
        self.masks = list(masks) if masks else [None] * len(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, str]:
        empty = torch.zeros(1, self.size, self.size, dtype=torch.uint8)
        try:
            image, mask = read_image(self.paths[index], self.size, self.antialias), self.masks[index]
            return image, empty if mask is None else read_mask(mask, self.size), ""
        except InputError as error:
            return empty.repeat(3, 1, 1), empty, str(error)


def decode(paths: Sequence[Path], size: int, name: str, antialias: bool = False) -> Tensor:
    """All images, decoded once by threads, uint8 (N, 3, size, size), or the first bad file's InputError. Progress goes
    to stderr under `name`."""
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    array, start, shown = images.numpy(), time.monotonic(), 0.0

    def load(index: int) -> None:
        array[index] = read_image(paths[index], size, antialias).numpy()  # numpy: each thread would start torch's own threads

    pool = ThreadPoolExecutor(cores())
    try:
        for done, _ in enumerate(pool.map(load, range(len(paths))), 1):
            if sys.stderr.isatty() and time.monotonic() - shown > 0.1:
                shown = time.monotonic()
                print(f"\r{name}: {done}/{len(paths)} images", end="", file=sys.stderr, flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # else Ctrl-C would wait for every image left
        if shown:
            print("\r\033[K", end="", file=sys.stderr)
    print(f"{name}: {len(paths)} images decoded in {time.monotonic() - start:.1f} s", file=sys.stderr)
    return images


# --- Data sets --------------------------------------------------------------------------------------------------------


def _refuse(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be listed: {error.strerror}; check the path and its permissions")


def _images(folder: Path) -> list[Path]:
    found, seen = [], set()
    for parent, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(parent)  # a link back to a folder above would never end
        folders[:] = sorted(name for name in folders if not name.startswith(".") and real not in seen)
        if real in seen:
            continue
        seen.add(real)
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES)  # which passes Thumbs.db over, too


def list_images(folder: Path | str) -> list[Path]:
    """The folder's images and its subfolders', sorted, without dot-files and dot-folders; a file gives itself. Folders
    that are links are followed, each once."""
    folder = Path(folder)
    if not os.path.lexists(folder):  # os.path's never raise, as Path's do on names too long or folders forbidden
        raise InputError(f"{folder}: no such file or folder; check the path")
    found = _images(folder) if os.path.isdir(folder) else [folder]
    if not found:
        raise InputError(f"{folder}: holds no images; looked for names that end in {' '.join(IMAGE_SUFFIXES)}")
    return found


@dataclass
class Category:
    """One product. Along with `test` go `labels` (True = anomalous), `defects` (folders, "good" if normal), `masks`."""

    name: str
    folder: Path
    train: list[Path]
    test: list[Path] = field(default_factory=list)
    labels: list[bool] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)
    masks: list[Path | None] = field(default_factory=list)

    @property
    def has_truth(self) -> list[bool]:
        """The test images that pixel metrics may count. Without its mask, an anomalous one would pass for normal."""
        return [mask is not None or not label for mask, label in zip(self.masks, self.labels)]


def _name(folder: Path) -> str:
    return os.path.basename(os.path.abspath(folder))  # a link's own name, not its target's


def _category(folder: Path) -> Category:
    good = folder / "train" / "good"
    if os.path.isdir(good):
        train = list_images(good)
    else:  # not the subfolders, which may hold defects
        train = [path for path in _images(folder / "train") if path.parent == folder / "train"]
    if not train:
        raise InputError(f"{folder / 'train'}: holds no images; put the normal ones into {good}")
    category = Category(_name(folder), folder, train)
    for path in _images(folder / "test") if os.path.isdir(folder / "test") else []:
        inside = path.relative_to(folder / "test")
        if len(inside.parts) == 1:
            raise InputError(f"{path}: is it normal or not? Put it into test/good or into test/ and the defect's name")
        category.test.append(path)
        category.defects.append(inside.parts[0])
        category.labels.append(inside.parts[0] != "good")
    truth = folder / "ground_truth"
    found = {path.relative_to(truth).with_suffix(""): path for path in _images(truth)} if os.path.isdir(truth) else {}
    for path, label in zip(category.test, category.labels):
        inside = path.relative_to(folder / "test").with_suffix("")
        mask = found.get(inside.with_name(inside.name + "_mask"), found.get(inside))
        category.masks.append(mask if label else None)
    return category


def find_categories(folder: Path | str) -> list[Category]:
    """The folder itself if it is in MVTec's layout:

        train/good/000.png   test/good/000.png   test/<defect>/000.png   ground_truth/<defect>/000_mask.png or 000.png

    (images directly in train/ do as well, and all but train/ may be missing); else the folders in it that are, by name;
    else all its images as one training set, without a test set."""
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: {'is not a' if os.path.lexists(folder) else 'no such'} folder; check the path")
    if os.path.isdir(folder / "train"):
        return [_category(folder)]
    _, children, _ = next(os.walk(folder, onerror=_refuse))
    below = [folder / name for name in sorted(children) if name[0] != "." and os.path.isdir(folder / name / "train")]
    if below:
        return [_category(child) for child in below]
    images = list_images(folder)  # of which defects and masks would be learned as normal
    parts = {_name(folder)}.union(*(path.relative_to(folder).parts[:-1] for path in images))
    if found := parts & {"test", "ground_truth"}:
        raise InputError(f"{folder}: images in {max(found)}/ would be learned as normal; give a folder with train/good "
                         "in it, the folder above several such, or one of normal images alone")
    return [Category(_name(folder), folder, images)]


# --- Metrics ----------------------------------------------------------------------------------------------------------


def connected_components(mask: Tensor) -> Tensor:
    """8-connected regions of a mask (..., H, W), plane by plane, numbered 1, 2, ... over all planes; 0 is outside.

    Hooking and pointer jumping on all pixels at once: each round joins every region to another that it touches, which
    at least halves their number, so that a spiral takes no more than log2(pixels) rounds either."""
    mask = mask.bool()
    height, width = mask.shape[-2:]
    node = torch.full(mask.shape, -1)
    parent = torch.arange(int(mask.sum()))
    node[mask] = parent
    edges = []
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        here = node[..., : height - down, max(0, -right) : width - max(0, right)]
        there = node[..., down:, max(0, right) : width + min(0, right)]
        both = (here >= 0) & (there >= 0)
        edges.append(torch.stack((here[both], there[both])))
    edges = torch.cat(edges, dim=1)
    while edges.numel():
        parent[edges.amax(0)] = edges.amin(0)  # the larger root under a smaller: no cycle, whichever write comes last
        while not torch.equal(parent, jumped := parent[parent]):
            parent = jumped
        edges = parent[edges]
        edges = edges[:, edges[0] != edges[1]]
    number = (parent == torch.arange(len(parent))).cumsum(0)
    labels = torch.zeros(mask.shape, dtype=torch.long)
    labels[mask] = number[parent]
    return labels


class Ranking:
    """Scored samples, added part by part, and the metrics of their order. 8 bytes a sample are all that is kept: an
    integer that sorts as the float32 score in its upper half does, and holds the sample's region in its lower half.
    They are sorted in place, and summed slice by slice."""

    def __init__(self, count: int, slice_size: int = 2**20):
        self.keys, self.used, self.slice_size = torch.empty(count + 1, dtype=torch.int64), 1, slice_size
        self.keys[0] = torch.iinfo(torch.int64).min  # below every score
        self.sizes, self.regions = [torch.zeros(1, dtype=torch.int64)], 0  # samples of each region, 0 for normal ones

    def add(self, scores: Tensor, regions: Tensor) -> "Ranking":
        """Scores and, in the same shape, the region of each: 0 = normal, else one of this call's regions 1, 2, ..."""
        bits = (scores.float().flatten() + 0.0).view(torch.int32).long()  # -0.0 becomes 0.0
        bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # below 0, a larger integer is a smaller float
        if scores.isnan().any():
            raise InputError("scores are NaN: the weights are damaged or the training diverged; train again")
        regions = regions.flatten().long()
        numbers = torch.where(regions > 0, regions + self.regions, 0)
        self.keys[self.used : self.used + len(bits)] = bits << 32 | numbers
        self.used += len(bits)
        self.sizes.append(regions.bincount(minlength=1)[1:])
        self.regions += len(self.sizes[-1])
        return self

    def metrics(self, limit: float = 0.3) -> dict[str, float]:
        """{} without both kinds of samples; else, with thresholds at every distinct score,

        auroc: the probability that an anomalous sample scores above a normal one, ties half
        ap: the sum over thresholds n, from the highest down, of (R_n - R_{n-1}) * P_n, recall and precision
        f1: the largest 2 P R / (P + R)
        aupro: the area under the mean over regions of the share found, against the false positive rate from 0 to
            `limit`, over `limit`, as MVTec's evaluation script has it
        """
        sizes = torch.cat(self.sizes)
        positives = int(sizes.sum())
        negatives = self.used - 1 - positives
        if not positives or not negatives:
            return {}
        share = 1 / (sizes.double() * (sizes > 0).sum())  # of the mean overlap, found with each sample
        share[sizes == 0] = 0
        self.keys[: self.used].numpy().sort()
        sums = point = torch.zeros(3, 1, dtype=torch.float64)  # hits, alarms, overlap so far; at the last threshold
        auroc = ap = f1 = aupro = 0.0
        for end in range(self.used, 1, -self.slice_size):
            start = max(1, end - self.slice_size)
            keys, below = self.keys[start:end].flip(0), self.keys[start - 1 : end - 1].flip(0)
            region = keys & 0xFFFFFFFF
            found = torch.stack((region > 0, region == 0, share[region]))
            sums = sums[:, -1:] + found.cumsum(1)
            curve = torch.cat((point, sums[:, keys >> 32 != below >> 32]), 1)
            point, (hits, alarms, overlap), rate = curve[:, -1:], curve, curve[1] / negatives
            auroc += torch.trapezoid(hits, rate).item() / positives
            ap += (hits.diff() * hits[1:] / (hits + alarms)[1:]).sum().item() / positives
            f1 = max(f1, (2 * hits / (hits + alarms + positives)).max().item())
            overlap = overlap.where(rate <= limit, float(np.interp(limit, rate, overlap)))  # no area beyond the limit
            aupro += torch.trapezoid(overlap, rate.clamp(max=limit)).item() / limit
        return {"auroc": auroc, "ap": ap, "f1": f1, "aupro": aupro}


# --- Pictures and files -----------------------------------------------------------------------------------------------

GAP = 4  # pixels between panels
RAMP = ((8, 8, 40), (68, 16, 120), (158, 36, 110), (226, 82, 58), (252, 166, 40), (252, 252, 180))  # evenly brighter


def panel(image: Tensor) -> np.ndarray:
    """An image or mask, (3 or 1, H, W), uint8 in 0..255 or float or bool in 0..1, as (H, W, 3) uint8."""
    if image.dtype != torch.uint8:
        image = (image.detach().float().clamp(0, 1) * 255).round().byte()
    return image.cpu().expand(3, -1, -1).permute(1, 2, 0).numpy()


def heat(anomaly_map: Tensor | np.ndarray) -> np.ndarray:
    """A map (H, W) in [0, 1] as colours (H, W, 3) uint8, from dark blue over purple and orange to yellow."""
    levels, stops = np.clip(np.asarray(anomaly_map, np.float32), 0, 1), np.linspace(0, 1, len(RAMP))
    return np.stack([np.interp(levels, stops, channel) for channel in zip(*RAMP)], axis=-1).round().astype(np.uint8)


def overlay(image: np.ndarray, anomaly_map: Tensor | np.ndarray) -> np.ndarray:
    """The map's colours over the image (H, W, 3), the more opaque the higher the map."""
    weight = 0.25 + 0.55 * np.clip(np.asarray(anomaly_map, np.float32), 0, 1)[..., None]
    return (image * (1 - weight) + heat(anomaly_map) * weight).round().astype(np.uint8)


def strip(panels: Sequence[np.ndarray]) -> Image.Image:
    """Panels (H, W, 3) uint8 of one size side by side, with thin white gaps."""
    gap = np.full((len(panels[0]), GAP, 3), 255, np.uint8)
    return Image.fromarray(np.concatenate([part for each in panels for part in (each, gap)][:-1], axis=1))


def sheet(strips: Sequence[Image.Image], captions: Sequence[str], headings: Sequence[str]) -> Image.Image:
    """Strips of one size below each other, a caption (one or more lines) left of each, a heading over each column."""
    scale = max(1, 160 // strips[0].height)  # room for the headings
    width, height, gap = (scale * pixels for pixels in (strips[0].width, strips[0].height, GAP))
    font = ImageFont.load_default(14)
    captions = [caption.encode("utf-8", "replace").decode() for caption in captions]
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


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be written: {error.strerror or error}; free space or choose another place")


def write_atomically(path: Path | str, save: Callable[[BinaryIO], None]) -> None:
    """`save(file)` into a temporary file beside `path`, flushed to the disk and renamed: whenever the machine dies,
    `path` is the old file or the whole new one. A full disk or forbidden folder is an InputError."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides the disk's error
        if not isinstance(cause, OSError):
            raise
        raise _unwritable(path, cause) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


# --- The toy product --------------------------------------------------------------------------------------------------

TOY = {"train/good": 100, "test/good": 20, "test/scratch": 12, "test/stain": 12, "test/missing": 12}


def _cover(distance: np.ndarray, softness: float = 1.0) -> np.ndarray:
    """The part, 0..1, of each pixel inside an edge `distance` pixels away (negative inside), for smooth edges."""
    return np.clip(0.5 - distance / softness, 0, 1)


def _paint(pixels: np.ndarray, shade: np.ndarray, tint: tuple[float, float, float], alpha: np.ndarray) -> np.ndarray:
    return pixels + (shade[..., None] * np.float32(tint) - pixels) * alpha[..., None]


def _facing(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """1 on the side of the light, which comes from the upper left, to -1 on the other."""
    return -(0.6 * x + 0.8 * y) / np.maximum(np.hypot(x, y), 1)


def _hexagon(x: np.ndarray, y: np.ndarray, angle: float) -> np.ndarray:
    x, y = abs(math.cos(angle) * x + math.sin(angle) * y), abs(math.cos(angle) * y - math.sin(angle) * x)
    return np.maximum(y, x * math.sqrt(3) / 2 + y / 2)


def _cap(x: np.ndarray, y: np.ndarray, turn: float, weft: float, lost: int | None = None, bite=None) -> np.ndarray:
    """A turned steel cap with six bolts and a brass hub on a woven belt, (256, 256, 3) in 0..255. x and y are pixels
    from its centre, `turn` its angle, `weft` the belt's phase; a bolt may be lost, or a disc `bite` (x, y, radius)."""
    radius, light = np.hypot(x, y), _facing(x, y)
    belt = 47 + 5 * np.sin(0.9 * (x + y) + weft) + 5 * np.sin(0.9 * (x - y)) + 0.04 * y
    belt *= 1 - 0.55 * _cover(np.hypot(x - 5, y - 7) - 102, 16)  # the cap's shadow
    picture = belt[..., None] * np.float32((0.94, 1, 1.15))

    marks = 4 * np.sin(2.1 * radius) + 3 * np.sin(3.7 * radius + 1) + 3 * np.sin(0.9 * radius)  # of the lathe
    steel = 128 + 52 * light**4 + marks
    steel += 55 * light * _cover(abs(radius - 94) - 3) - 45 * _cover(abs(radius - 90) - 0.7)  # bevelled rim
    steel += 35 * light * _cover(abs(radius - 48) - 1.5) - 40 * _cover(abs(radius - 45) - 1.2)  # groove
    body = _cover(radius - 98)
    if bite is not None:
        body *= 1 - _cover(np.hypot(x - bite[0], y - bite[1]) - bite[2])
    picture = _paint(picture, steel, (1, 1.02, 1.05), body)

    for index in range(6):
        u, v = (part - 70 * wave(turn + index * math.pi / 3) for part, wave in ((x, math.cos), (y, math.sin)))
        near = np.hypot(u, v) < 15
        u, v, inside, pixels = u[near], v[near], body[near], picture[near]
        away = np.hypot(u, v)
        side = _facing(u, v) * np.minimum(away / 11, 1)
        pixels = _paint(pixels, 70 - 30 * side, (1, 1, 1.04), _cover(away - 13.5) * inside)  # counterbore
        if index == lost:
            pixels = _paint(pixels, 16 - 8 * side, (1, 1, 1.1), _cover(away - 10) * inside)
        else:
            pixels = _paint(pixels, 182 + 60 * side, (1, 1.01, 1.03), _cover(away - 11) * inside)
            pixels = _paint(pixels, 42 - 25 * side, (1, 1, 1.1), _cover(_hexagon(u, v, turn + index) - 4.5) * inside)
        picture[near] = pixels

    brass = 164 + 51 * light**4 + marks + 72 * light * _cover(abs(radius - 31) - 3)
    picture = _paint(picture, brass, (1, 0.8, 0.45), _cover(radius - 34))
    depth = 38 - 26 * light * np.minimum(radius / 17, 1)
    return _paint(picture, depth, (1.05, 0.95, 0.9), _cover(_hexagon(x, y, turn) - 15))


def _toy_image(kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A picture (256, 256, 3) uint8 and its mask (256, 256) bool: where it differs by more than 8 of 255 from the same
    picture, with the same noise, without the defect."""
    y, x = (np.mgrid[:256, :256] - 127.5 - rng.uniform(-2, 2, (2, 1, 1))).astype(np.float32)
    turn, weft, light = math.radians(rng.uniform(-2, 2)), rng.uniform(0, 2 * math.pi), rng.uniform(0.96, 1.04)
    noise = 2 * rng.standard_normal((256, 256, 3), np.float32)
    normal = picture = _cap(x, y, turn, weft)

    angle, reach = rng.uniform(0, 2 * math.pi), rng.uniform(30, 78)
    right, down = math.cos(angle), math.sin(angle)
    if kind == "missing" and rng.random() < 0.5:
        picture = _cap(x, y, turn, weft, lost=int(rng.integers(6)))
    elif kind == "missing":
        picture = _cap(x, y, turn, weft, bite=(100 * right, 100 * down, rng.uniform(15, 24)))
    elif kind == "scratch":
        along = np.linspace(-0.5, 0.5, 64, dtype=np.float32)[:, None, None]
        way, length = rng.uniform(0, 2 * math.pi) + rng.uniform(-1, 1) * along, rng.uniform(60, 130)  # an arc
        u = x - 0.7 * reach * right - length * (np.cos(way).cumsum(0) - np.cos(way).sum(0) / 2) / 64
        v = y - 0.7 * reach * down - length * (np.sin(way).cumsum(0) - np.sin(way).sum(0) / 2) / 64
        groove = (np.hypot(u, v) - rng.uniform(3.5, 5) * np.sqrt(1 - (2 * along) ** 2)).min(0)  # ends taper
        steel = _cover(np.hypot(x, y) - 97)
        burr = _cover(np.hypot(u - 1.5, v - 1.8).min(0) - 5, 2)
        picture = _paint(picture, np.float32(225), (1, 1, 1), 0.75 * burr * steel)
        picture = _paint(picture, np.float32(38), (1, 1, 1), _cover(groove, 1.5) * steel)
    elif kind == "stain":
        u, v = x - reach * right, y - reach * down
        around, outline = np.arctan2(v, u), 1
        for lobes in range(2, 7):
            outline += rng.uniform(0.05, 0.28) * np.cos(lobes * around + rng.uniform(0, 2 * math.pi)) / lobes**0.5
        blob = np.hypot(u, v) - rng.uniform(13, 22) * outline
        picture = _paint(picture, np.float32(rng.uniform(62, 86)), (1, 0.62, 0.32), 0.82 * _cover(blob, 7))
    normal, picture = (np.clip(image * np.float32(light) + noise, 0, 255).round() for image in (normal, picture))
    return picture.astype(np.uint8), (abs(picture - normal) > 8).any(axis=2)


def make_toy(folder: Path | str, seed: int = 0) -> Path:
    """Draws the toy product, 156 images in MVTec's layout and 20 MB, and returns its folder. That appears whole or not
    at all; one that is there already is kept, whatever its seed."""
    folder = Path(folder)
    if os.path.lexists(folder):
        if any(not os.path.isfile(folder / part / f"{count - 1:03d}.png") for part, count in TOY.items()):
            raise InputError(f"{folder}: is not the generated toy product; move it away or give another folder")
        return folder
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        for part, count in TOY.items():
            kind = Path(part).name
            truth = temporary / "ground_truth" / kind
            (temporary / part).mkdir(parents=True)
            if kind != "good":
                truth.mkdir(parents=True)
            for index in range(count):  # each from its own seed: no picture depends on the ones before
                picture, mask = _toy_image(kind, np.random.default_rng((seed, *part.encode(), index)))
                Image.fromarray(picture).save(temporary / part / f"{index:03d}.png", compress_level=1)
                if kind != "good":
                    Image.fromarray(mask.astype(np.uint8) * 255).save(truth / f"{index:03d}_mask.png")
        try:
            os.rename(temporary, folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    except OSError as error:
        raise _unwritable(folder, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
