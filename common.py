"""What the three methods share and nobody copies along with a model: reading images and data sets, metrics, pictures, files
that are never half-written, and a generated toy product.

Images are RGB, uint8, (3, size, size); masks are (1, size, size) with 1 = anomalous; both are squeezed to a square whatever
their aspect ratio. What a user can mend is an InputError: one line that says what, where, and what to do.
"""

import math
import os
import shutil
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # no others: Pillow would run Ghostscript on an EPS named .png

# Pillow remarks on palettes with alpha, damaged EXIF and large pictures; each is either read well or an InputError here.
warnings.filterwarnings("ignore", module=r"PIL\.")


class InputError(Exception):
    """Something that a user can mend. The message is one printable line, whatever bytes a file's name is made of."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.encode("utf-8", "backslashreplace").decode().splitlines()))


# --- Reading images ---------------------------------------------------------------------------------------------------


def _open(path: Path, finish: Callable[[Image.Image, str], np.ndarray]) -> Tensor:
    """`finish(first frame turned upright, mode)` as a tensor; every way in which that can fail is an InputError."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise InputError("it is a folder or a device, not an image file")
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            # 16-bit grey PNG was "I" before Pillow 11 (PGM still is), the mode of 32-bit TIFF, whose range nothing tells.
            mode = "I;16" if image.mode == "I" and image.format in ("PNG", "PPM") else image.mode
            return torch.from_numpy(finish(ImageOps.exif_transpose(image), mode))
    except Exception as error:  # a damaged file makes Pillow raise nearly anything: SyntaxError, struct.error, MemoryError...
        if isinstance(error, UnidentifiedImageError):
            reason = "it is empty" if path.stat().st_size == 0 else f"it is none of {', '.join(FORMATS)}"
        else:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"{path}: cannot be read as an image: {reason}; replace or remove it") from None


def read_image(path: Path | str, size: int) -> Tensor:
    """The image in 8-bit RGB, (3, size, size): upright by its EXIF orientation, first frame, alpha dropped (not blended), 16-bit
    grey divided by 257, resized by Pillow's antialiased BILINEAR. 32-bit and LAB files have no known range: InputError."""

    def finish(image: Image.Image, mode: str) -> np.ndarray:
        if mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
            image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
        elif mode in ("I", "F", "LAB"):
            raise InputError(f"the range of mode {mode} is unknown (save it as 8- or 16-bit grey or RGB)")
        elif mode in ("La", "RGBa"):  # colours multiplied by alpha: divided again, as the file meant them
            image = image.convert(mode.upper())
        image = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))

    return _open(Path(path), finish)


def read_mask(path: Path | str, size: int) -> Tensor:
    """The mask, uint8 (1, size, size): 1 where more than half of a pixel's area (Pillow's BOX) is anomalous in the file, which is
    where the file's colour is not black, however faint. A mask of other dimensions than its image is squeezed like it."""

    def finish(image: Image.Image, mode: str) -> np.ndarray:
        if mode in ("La", "RGBa"):
            image = image.convert(mode.upper())
        if not (mode in ("1", "L", "I", "F") or mode.startswith("I;16")):  # those are compared as they are: 1 of 65535 counts
            image = image.convert("L" if mode in ("LA", "La") else "RGB")
        array = np.asarray(image) != 0
        array = array.any(axis=2) if array.ndim == 3 else array
        area = Image.fromarray(array.astype(np.float32)).resize((size, size), Image.Resampling.BOX)
        return (np.asarray(area) > 0.5 + 1e-6).astype(np.uint8)[None]  # just half, off by rounding, is not more than half

    return _open(Path(path), finish)


class ImageFiles(torch.utils.data.Dataset):
    """Items (image, mask, error): uint8 (3, size, size); uint8 (1, size, size), zeros where there is no mask; "" or the line of
    the InputError, with zeros for both. An error is a value, so that it leaves a worker process as one line and others go on."""

    def __init__(self, paths: Sequence[Path], size: int, masks: Sequence[Path | None] | None = None):
        self.paths, self.size, self.masks = list(paths), size, list(masks) if masks else [None] * len(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, str]:
        empty = torch.zeros(1, self.size, self.size, dtype=torch.uint8)
        try:
            image, mask = read_image(self.paths[index], self.size), self.masks[index]
            return image, empty if mask is None else read_mask(mask, self.size), ""
        except InputError as error:
            return empty.repeat(3, 1, 1), empty, str(error)


def decode(paths: Sequence[Path], size: int, name: str) -> Tensor:
    """All images, decoded once by threads, uint8 (N, 3, size, size); the first bad file's InputError. Progress goes to stderr."""
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    array, start, shown = images.numpy(), time.monotonic(), 0.0

    def load(index: int) -> None:
        array[index] = read_image(paths[index], size).numpy()  # numpy: torch would start its own threads in each of these

    pool = ThreadPoolExecutor(os.cpu_count())
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


def _images(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be listed: {error.strerror}")

    found = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES)  # which passes Thumbs.db over, too


def list_images(folder: Path | str) -> list[Path]:
    """The folder's images, its subfolders' too, sorted; dot-files and dot-folders are passed over. A file stands for itself."""
    folder = Path(folder)
    if not folder.exists():
        raise InputError(f"{folder}: no such file or folder; check the path")
    found = [folder] if folder.is_file() else _images(folder)
    if not found:
        raise InputError(f"{folder}: holds no images; looked for names that end in {' '.join(IMAGE_SUFFIXES)}")
    return found


@dataclass
class Category:
    """One product. `labels` (True = anomalous), `defects` (folder names, "good" for normal) and `masks` go along with `test`."""

    name: str
    folder: Path
    train: list[Path]
    test: list[Path] = field(default_factory=list)
    labels: list[bool] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)
    masks: list[Path | None] = field(default_factory=list)

    @property
    def has_truth(self) -> list[bool]:
        """Which test images pixel metrics may count: normal ones, and anomalous ones with a mask. Without its mask an anomalous
        image would pass for normal in every pixel."""
        return [mask is not None or not label for mask, label in zip(self.masks, self.labels)]


def _category(folder: Path) -> Category:
    good = folder / "train" / "good"
    if good.is_dir():
        train = list_images(good)
    else:  # not the subfolders, which may hold defects
        train = [path for path in _images(folder / "train") if path.parent == folder / "train"]
    if not train:
        raise InputError(f"{folder / 'train'}: holds no images; put the normal ones into {good}")
    category = Category(folder.resolve().name, folder, train)
    for path in _images(folder / "test") if (folder / "test").is_dir() else []:
        inside = path.relative_to(folder / "test")
        if len(inside.parts) == 1:
            raise InputError(f"{path}: is it normal or not? Put it into test/good or into test/ and the defect's name")
        category.test.append(path)
        category.defects.append(inside.parts[0])
        category.labels.append(inside.parts[0] != "good")
    truth = folder / "ground_truth"
    found = {path.relative_to(truth).with_suffix(""): path for path in (_images(truth) if truth.is_dir() else [])}
    for path, label in zip(category.test, category.labels):
        inside = path.relative_to(folder / "test").with_suffix("")
        mask = found.get(inside.with_name(inside.name + "_mask"), found.get(inside))
        category.masks.append(mask if label else None)
    return category


def find_categories(folder: Path | str) -> list[Category]:
    """One category in MVTec's layout, every category below a parent folder (by name), or a folder of normal images, which has no
    test set:

        train/good/*.png   test/good/*.png   test/<defect>/*.png   ground_truth/<defect>/<image's name>[_mask].png
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: {'is not a folder' if folder.exists() else 'no such folder'}; check the path")
    if (folder / "train").is_dir():
        return [_category(folder)]
    below = sorted(child for child in folder.iterdir() if not child.name.startswith(".") and (child / "train").is_dir())
    if below:
        return [_category(child) for child in below]
    if (folder / "test").is_dir():  # as a plain folder its defects would be learned as normal
        raise InputError(f"{folder}: has test/ but no train/; put normal images into {folder / 'train' / 'good'}")
    return [Category(folder.resolve().name, folder, list_images(folder))]


# --- Metrics ----------------------------------------------------------------------------------------------------------


def connected_components(mask: Tensor) -> Tensor:
    """8-connected regions of each (H, W) plane of a bool mask (..., H, W), numbered 1, 2, ... over all planes; 0 is outside.

    Rounds of hooking and pointer jumping over all pixels at once: in every round each region that touches another is joined to
    one, so that there are at most log2(pixels) rounds, on spirals as on blobs."""
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
        parent[edges.amax(0)] = edges.amin(0)  # the larger root below the smaller: no cycles, whichever of several writes wins
        while not torch.equal(parent, jumped := parent[parent]):
            parent = jumped
        edges = parent[edges]
        edges = edges[:, edges[0] != edges[1]]
    number = (parent == torch.arange(len(parent))).cumsum(0)
    labels = torch.zeros(mask.shape, dtype=torch.long)
    labels[mask] = number[parent]
    return labels


def _curve(scores: Tensor, labels: Tensor, *weights: Tensor) -> list[Tensor] | None:
    """At each distinct score as threshold, from the highest down: true positives, false positives, and each weight's sum over all
    samples at or above it; None unless there are both kinds of samples. One sort serves every metric (it is most of their cost),
    and ties are one threshold, which is what counts them half under the trapezoids."""
    scores, labels = torch.as_tensor(scores).flatten(), torch.as_tensor(labels).flatten().bool()
    if scores.isnan().any():
        raise InputError("scores are NaN: the weights are damaged or the training diverged; train again")
    if labels.all() or not labels.any():
        return None
    scores, order = scores.sort(descending=True)
    last = torch.ones_like(labels)
    torch.ne(scores[1:], scores[:-1], out=last[:-1])
    last = last.nonzero().squeeze(1)
    hits, *sums = [weight.flatten()[order].cumsum(0, dtype=torch.float64)[last] for weight in (labels, *weights)]
    return [hits, last + 1 - hits, *sums]


def _auroc(hits: Tensor, alarms: Tensor) -> float:
    zero = hits.new_zeros(1)
    return (torch.trapezoid(torch.cat((zero, hits)), torch.cat((zero, alarms))) / (hits[-1] * alarms[-1])).item()


def _average_precision(hits: Tensor, alarms: Tensor) -> float:
    return (torch.diff(hits, prepend=hits.new_zeros(1)) * hits / (hits + alarms)).sum().div(hits[-1]).item()


def _best_f1(hits: Tensor, alarms: Tensor) -> float:
    return (2 * hits / (hits + alarms + hits[-1])).max().item()


def _overlap(masks: Tensor) -> Tensor:
    """What each pixel adds to the mean overlap of all regions: 1 / (regions * its region's pixels), 0 in normal pixels."""
    regions = connected_components(masks)
    share = regions.flatten().bincount().double()
    share[1:] *= len(share) - 1
    share = 1 / share
    share[0] = 0
    return share[regions]


def _aupro(alarms: Tensor, overlap: Tensor, limit: float) -> float:
    zero = overlap.new_zeros(1)
    rate, overlap = torch.cat((zero, alarms / alarms[-1])), torch.cat((zero, overlap))
    inside = int((rate <= limit).sum())
    if inside < len(rate):  # end on the line between the last point inside the limit and the first beyond
        part = (limit - rate[inside - 1]) / (rate[inside] - rate[inside - 1])
        end = torch.lerp(overlap[inside - 1], overlap[inside], part)
        rate, overlap = torch.cat((rate[:inside], zero + limit)), torch.cat((overlap[:inside], zero + end))
    return (torch.trapezoid(overlap, rate) / limit).item()


def auroc(scores: Tensor, labels: Tensor) -> float | None:
    """The probability that an anomalous sample scores more than a normal one, ties counted half; None without both kinds."""
    curve = _curve(scores, labels)
    return curve and _auroc(*curve)


def average_precision(scores: Tensor, labels: Tensor) -> float | None:
    """The sum over distinct thresholds n of (R_n - R_{n-1}) P_n, with recall R and precision P; None without both kinds."""
    curve = _curve(scores, labels)
    return curve and _average_precision(*curve)


def best_f1(scores: Tensor, labels: Tensor) -> float | None:
    """The largest F1 = 2 PR / (P + R) over all thresholds; None without both kinds."""
    curve = _curve(scores, labels)
    return curve and _best_f1(*curve)


def aupro(maps: Tensor, masks: Tensor, limit: float = 0.3) -> float | None:
    """Area under the per-region overlap: the share of each anomalous region that is found, averaged over regions, against the
    false positive rate of normal pixels from 0 to `limit`, divided by `limit`. Both are (N, H, W); None without both kinds."""
    curve = _curve(maps, masks, _overlap(masks))
    return curve and _aupro(*curve[1:], limit)


def metrics(scores: Tensor, labels: Tensor, maps: Tensor | None = None, masks: Tensor | None = None) -> dict[str, float]:
    """All that can be had of image_auroc, image_ap, image_f1, pixel_auroc, pixel_ap, pixel_aupro, in 0..1. Maps and masks are those
    of the images in `Category.has_truth`."""
    values = {}
    if curve := _curve(scores, labels):
        values |= {"image_auroc": _auroc(*curve), "image_ap": _average_precision(*curve), "image_f1": _best_f1(*curve)}
    if maps is not None and (curve := _curve(maps, masks, _overlap(masks))):
        hits, alarms, overlap = curve
        values |= {"pixel_auroc": _auroc(hits, alarms), "pixel_ap": _average_precision(hits, alarms)}
        values |= {"pixel_aupro": _aupro(alarms, overlap, 0.3)}
    return values


# --- Pictures and files -----------------------------------------------------------------------------------------------

GAP = 4  # pixels between panels
RAMP = ((8, 8, 40), (68, 16, 120), (158, 36, 110), (226, 82, 58), (252, 166, 40), (252, 252, 180))  # evenly brighter


def panel(image: Tensor) -> np.ndarray:
    """An image or mask (3 or 1, H, W) as (H, W, 3) uint8; floats are in [0, 1], uint8 masks 0 or 1 are shown by `panel(mask.bool())`."""
    image = image.detach().cpu()
    if image.dtype == torch.bool:
        image = image.float()
    if image.is_floating_point():
        image = (image.float().clamp(0, 1) * 255).round().byte()
    return image.expand(3, -1, -1).permute(1, 2, 0).numpy()


def heat(anomaly_map: Tensor | np.ndarray) -> np.ndarray:
    """A map (H, W) in [0, 1] as colours (H, W, 3) uint8, from dark blue over purple and orange to yellow."""
    ramp = np.stack([np.interp(np.linspace(0, 1, 256), np.linspace(0, 1, len(RAMP)), channel) for channel in zip(*RAMP)], axis=1)
    return ramp.round().astype(np.uint8)[(np.clip(np.asarray(anomaly_map, np.float32), 0, 1) * 255).round().astype(np.uint8)]


def overlay(image: np.ndarray, anomaly_map: Tensor | np.ndarray) -> np.ndarray:
    """The map's colours over the image (H, W, 3), the more opaque the higher the map."""
    weight = 0.25 + 0.55 * np.clip(np.asarray(anomaly_map, np.float32), 0, 1)[..., None]
    return (image * (1 - weight) + heat(anomaly_map) * weight).round().astype(np.uint8)


def strip(panels: Sequence[np.ndarray]) -> Image.Image:
    """Panels (H, W, 3) uint8 of one size side by side, with thin white gaps."""
    gap = np.full((len(panels[0]), GAP, 3), 255, np.uint8)
    return Image.fromarray(np.concatenate([part for panel in panels for part in (np.asarray(panel), gap)][:-1], axis=1))


def sheet(strips: Sequence[Image.Image], captions: Sequence[str], headings: Sequence[str]) -> Image.Image:
    """Strips of one size below each other, a caption left of each (lines apart by newlines) and a heading over each column."""
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


def write_atomically(path: Path | str, save: Callable[[BinaryIO], None]) -> None:
    """`save(file)` into a temporary file beside `path`, flushed to the disk and renamed: `path` is the old file or the whole new
    one, whenever the machine dies. A full disk or a forbidden folder is an InputError and leaves the old file."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}; free space or choose another folder") from None
    finally:
        temporary.unlink(missing_ok=True)


# --- The toy product --------------------------------------------------------------------------------------------------

TOY = {"train/good": 100, "test/good": 20, "test/scratch": 12, "test/stain": 12, "test/missing": 12}


def _cover(distance: np.ndarray, softness: float = 1.0) -> np.ndarray:
    """How much of each pixel lies inside an edge that is `distance` pixels away (negative inside): 0..1, so edges are smooth."""
    return np.clip(0.5 - distance / softness, 0, 1)


def _cap(x: np.ndarray, y: np.ndarray, turn: float, phase: float, missing: int | None, bite: np.ndarray | None) -> np.ndarray:
    """A turned metal cap with six bolts and a brass hub on a woven belt, (256, 256, 3) in 0..255; x and y are pixels from its
    centre, `turn` its angle. One bolt may be missing, and a disc `bite` (x, y, radius) out of the rim."""

    def paint(colour, alpha):
        nonlocal picture
        picture = picture + (np.stack(np.broadcast_arrays(*np.broadcast_arrays(*colour)), -1) - picture) * alpha[..., None]

    def facing(u, v):  # 1 on the side of the light, upper left, -1 on the other
        return -(0.6 * u + 0.8 * v) / np.maximum(np.hypot(u, v), 1)

    def hexagon(u, v, angle):
        u, v = np.cos(angle) * u + np.sin(angle) * v, np.cos(angle) * v - np.sin(angle) * u
        return np.maximum(np.abs(v), np.abs(u) * math.sqrt(3) / 2 + np.abs(v) / 2)

    radius, light = np.hypot(x, y), facing(x, y)
    weave = 5 * np.sin((x + y) * 0.9 + phase) + 5 * np.sin((x - y) * 0.9) + 0.04 * y
    picture = np.stack((44 + weave, 47 + weave, 54 + weave), axis=-1)
    picture *= 1 - 0.55 * _cover(np.hypot(x - 5, y - 7) - 102, 16)[..., None]  # shadow

    inside = _cover(radius - 98) * (1 if bite is None else 1 - _cover(np.hypot(x - bite[0], y - bite[1]) - bite[2]))
    marks = 4 * np.sin(2.1 * radius) + 3 * np.sin(3.7 * radius + 1) + 3 * np.sin(0.9 * radius)
    steel = 128 + 52 * light**4 + marks
    steel = steel + 55 * light * _cover(np.abs(radius - 94) - 3) - 45 * _cover(np.abs(radius - 90) - 0.7)
    steel = steel - 40 * _cover(np.abs(radius - 45) - 1.2) + 35 * light * _cover(np.abs(radius - 48) - 1.5)
    paint((steel, steel + 3, steel + 7), inside)

    for index in range(6):
        angle = turn + index * math.pi / 3
        u, v = x - 70 * math.cos(angle), y - 70 * math.sin(angle)
        away = np.hypot(u, v)
        side = facing(u, v) * np.minimum(away / 11, 1)
        ring = 70 - 30 * side
        paint((ring, ring, ring + 3), _cover(away - 13.5) * inside)
        if index == missing:
            thread = 16 + 10 * np.sin(2.2 * away) * _cover(5 - away) - 8 * side
            paint((thread, thread, thread + 2), _cover(away - 10) * inside)
        else:
            head = 182 + 60 * side
            paint((head, head + 2, head + 6), _cover(away - 11) * inside)
            socket = 42 - 25 * side
            paint((socket, socket, socket + 4), _cover(hexagon(u, v, turn + index) - 4.5) * inside)

    brass = 0.80 + 0.25 * light**4 + marks / 200 + 0.35 * light * _cover(np.abs(radius - 31) - 3)
    paint((205 * brass, 165 * brass, 92 * brass), _cover(radius - 34))
    socket = hexagon(x, y, turn)
    depth = 34 - 26 * light * np.minimum(radius / 17, 1)
    paint((depth + 6, depth + 2, depth), _cover(socket - 15))
    return picture


def _toy_image(kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A picture (256, 256, 3) uint8 and its mask (256, 256): where it differs by more than 8 of 255 from the same picture, with
    the same noise, without the defect."""
    y, x = np.mgrid[:256, :256] - 127.5 - rng.uniform(-2, 2, (2, 1, 1))
    turn, phase, light = math.radians(rng.uniform(-2, 2)), rng.uniform(0, 2 * math.pi), rng.uniform(0.96, 1.04)
    noise = rng.normal(0, 2, (256, 256, 3))
    normal = picture = _cap(x, y, turn, phase, None, None)
    angle, reach = rng.uniform(0, 2 * math.pi), rng.uniform(30, 75)
    at = reach * np.array((math.cos(angle), math.sin(angle)))
    if kind == "missing" and rng.random() < 0.5:
        picture = _cap(x, y, turn, phase, int(rng.integers(6)), None)
    elif kind == "missing":
        picture = _cap(x, y, turn, phase, None, np.append(at / reach * 100, rng.uniform(15, 24)))
    elif kind == "scratch":
        along = np.linspace(-0.5, 0.5, 60)[:, None, None]
        heading, bend, length = rng.uniform(0, 2 * math.pi), rng.uniform(-1, 1), rng.uniform(60, 130)
        way = heading + bend * along
        u, v = (at[i] * 0.6 + length * (np.cumsum(wave(way), 0) - wave(way).sum(0) / 2) / 60 for i, wave in ((0, np.cos), (1, np.sin)))
        # width: full in the middle, tapering to the ends
        edge = np.hypot(x - u, y - v) - rng.uniform(1.9, 2.8) * np.sqrt(1 - (2 * along) ** 2)
        edge, groove = edge.min(0), np.hypot(x - u - 1, y - v - 1.2).min(0)
        picture = picture + (30 - picture) * 0.75 * (_cover(groove - 3.2, 2) * (edge < 3))[..., None]
        picture = picture + (np.array((236, 238, 242)) - picture) * _cover(edge, 1.5)[..., None]
    elif kind == "stain":
        u, v = x - at[0], y - at[1]
        around, wobble = np.arctan2(v, u), np.zeros_like(x)
        for lobes in range(2, 7):
            wobble += rng.uniform(0.05, 0.28) / math.sqrt(lobes) * np.cos(lobes * around + rng.uniform(0, 2 * math.pi))
        blob = np.hypot(u, v) - rng.uniform(13, 22) * (1 + wobble)
        colour = np.array((74, 46, 24)) + rng.uniform(-12, 12)
        picture = picture + (colour - picture) * 0.82 * _cover(blob, 7)[..., None]
    normal, picture = (np.clip(image * light + noise, 0, 255).round().astype(np.uint8) for image in (normal, picture))
    return picture, (np.abs(picture.astype(int) - normal) > 8).any(axis=2)


def make_toy(folder: Path | str, seed: int = 0) -> Path:
    """Draws the toy product (TOY says how many of what) in MVTec's layout, some 20 MB of PNG, and returns its folder. The folder
    appears whole or not at all; one that is there is kept, whatever its seed."""
    folder = Path(folder)
    if folder.exists():
        if any(not (folder / part / f"{count - 1:03d}.png").is_file() for part, count in TOY.items()):
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
        raise InputError(f"{folder}: cannot be written: {error.strerror or error}; free space or choose another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
