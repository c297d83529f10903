"""What the three methods share: reading images and data sets, metrics, pictures, and a generated toy product.

Images are RGB, uint8, (3, size, size). Masks are bool, (size, size), True = anomalous. Both are resized to a square,
whatever their aspect ratio. A fault that a user can mend raises ValueError: one line of what, where, and what to do.
"""
import csv
import math
import os
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import Tensor

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # EPS is left out: Pillow opens it with Ghostscript
NORMAL = ("good", "ok", "normal")  # folder names of normal images, in any letter case
MASK_ENDING = re.compile(r"_(mask|gt|label|seg)$")  # endings of a mask's name, in lower case
THREADS = min(16, os.cpu_count() or 1)  # for reading images

# --- Reading images ---------------------------------------------------------------------------------------------------

def open_upright(source, any_mode: bool = False) -> Image.Image:
    """A path, open file, PIL image or array as an image with EXIF's orientation applied. ValueError, one line.

    16-bit grey has mode I;16 or I;16B. Files of several pictures are refused, but for a camera's MPO.
    """
    is_path = isinstance(source, (str, os.PathLike))
    try:
        if is_path and os.path.exists(source) and not os.path.isfile(source):  # opening a pipe would block
            raise ValueError("it is a folder or a device, not a file")
        image = Image.open(source, formats=FORMATS) if is_path or hasattr(source, "read") else source
        if is_path:
            image.filename = ""  # else Pillow 13 maps it into memory, and a rotated TIFF with its sides swapped
        image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
        if 0 in image.size:
            raise ValueError("it has no pixels")
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise ValueError(f"it holds {image.n_frames} pictures; save each as a file of its own")
        upright = ImageOps.exif_transpose(image)
        if image.mode == "I" and image.format in ("PNG", "PPM"):  # 16-bit PPM, and PNG in older Pillow
            upright = Image.fromarray(np.asarray(upright).astype(np.uint16))
        if upright.mode in ("I", "F", "LAB") and not any_mode:
            raise ValueError(f"mode {upright.mode} has no known range; save it as 8-bit RGB or as 8- or 16-bit grey")
        upright.format = image.format
        return upright
    except Exception as error:  # on damaged files Pillow raises SyntaxError, struct.error, MemoryError...
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        line = f"{source if is_path else type(source).__name__}: cannot be read as an image: {reason}"
        raise ValueError(" ".join(line.splitlines()) + "; replace or remove it") from None


def to_tensor(image: Image.Image, size: int, antialias: bool, bits: int) -> Tensor:
    """RGB, uint8 (3, size, size). 16-bit grey is white at 2^bits - 1. Alpha is put on black, unless 0 everywhere."""
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
        grey = np.asarray(image).astype(np.float64) * 255 / (2 ** bits - 1)
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert(image.mode.upper()).convert("RGBA")  # Pillow has no way from La but through LA
        if image.getchannel("A").getbbox():
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float()  # (1, 3, H, W)
    pixels = torch.nn.functional.interpolate(pixels, (size, size), mode="bilinear", antialias=antialias)
    return pixels[0].round().clamp(0, 255).byte().contiguous()


def read_image(source, size: int, antialias: bool = True, bits: int = 16) -> Tensor:
    """A path, open file, PIL image or RGB array (H, W[, 3]) as upright RGB, uint8 (3, size, size). ValueError.

    Resized bilinearly: antialiased, or from four pixels as in DRAEM's and DSR's code (OpenCV; D9). bits: see to_tensor.
    """
    return to_tensor(open_upright(source), size, antialias, bits)


def read_mask(path: Path, size: int, image_size: tuple[int, int]) -> Tensor:
    """A mask, bool (size, size): True where more than half of a pixel's area is anomalous. ValueError, one line.

    A stored pixel is anomalous if it is not 0 (JPEG, WebP: above 127). image_size: upright width, height.
    """
    mask = open_upright(path, any_mode=True)
    if abs(mask.width * image_size[1] / (mask.height * image_size[0]) - 1) > 0.02:
        raise ValueError(f"{path}: {mask.size} pixels for an upright image of {image_size}; give both one aspect ratio")
    one_band = mask.mode in ("1", "L", "I", "F") or mask.mode.startswith("I;16")
    values = np.stack([mask] if one_band else mask.convert("RGBA").convert("RGBa").split()[:3], 2)  # alpha on black
    values = (values > 127 if mask.format in ("JPEG", "MPO", "WEBP") else values != 0).any(2)  # these ring at edges
    area = Image.fromarray(values.astype(np.float32)).resize((size, size), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(area) > 0.5 + 1e-6)  # exactly half is not enough; 1e-6 covers rounding


def read_ahead(read: Callable, groups: Iterable[list]) -> Iterator[list]:
    """Yields [read(item) for item in group] for each group. Threads read one group ahead of the caller."""
    with ThreadPoolExecutor(THREADS) as pool:
        jobs = ([pool.submit(read, item) for item in group] for group in groups)
        ahead = next(jobs, None)
        while ahead is not None:
            ready, ahead = ahead, next(jobs, None)
            yield [job.result() for job in ready]


def load_images(paths: list[Path], size: int, antialias: bool = True, bits: int = 16) -> Tensor:
    """Training images, decoded once, by threads: uint8 (N, 3, size, size). ValueError that names all damaged ones."""
    images, peaks, faults = torch.empty(len(paths), 3, size, size, dtype=torch.uint8), [], []
    def read(index: int) -> None:
        try:
            image = open_upright(paths[index])
            images[index] = to_tensor(image, size, antialias, bits)
            peaks.append(int(images[index].max()) if image.mode.startswith("I;16") else -1)
        except ValueError as error:
            faults.append(str(error))  # the error itself would hold the file open
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, range(len(paths))))
    if faults:
        raise ValueError("; ".join(sorted(faults)))
    if bits == 16 and 0 <= max(peaks, default=-1) < 64:
        print(f"{paths[0].parent}: all 16-bit images are below a quarter of white; see --bits", file=sys.stderr)
    return images


# --- Data sets --------------------------------------------------------------------------------------------------------

def list_images(folder: Path | str, may_be_empty: bool = False) -> list[Path]:
    """The images in a folder and its subfolders, sorted, without dot-files. A file gives itself. ValueError for none.

    Links are followed, each folder once. A line on stderr counts other files. OSError for an unreadable folder.
    """
    def refuse(error: OSError):
        raise error
    folder, files, seen = Path(folder), [], set()
    if not os.path.lexists(folder):
        raise ValueError(f"{folder}: no such file or folder; check the path")
    if not folder.is_dir():
        return [folder]
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)  # a link to a folder above would never end
        folders[:] = [] if real in seen else sorted(name for name in folders if name[0] != ".")
        files += [] if real in seen else [Path(parent, name) for name in names if name[0] != "."]
        seen.add(real)
    found = sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)
    others = sorted(path.name for path in set(files) - set(found))
    if not found and (others or not may_be_empty):
        raise ValueError(f"{folder}: holds no images; looked for names that end in {' '.join(IMAGE_SUFFIXES)}")
    if others:
        print(f"{folder}: files of other kinds passed over: {len(others)}, such as {others[0]}", file=sys.stderr)
    return found


class TestImage(NamedTuple):
    path: Path
    name: Path  # path below test/; it names the output pictures
    defect: str  # its folder's name; "good" if normal
    mask: Path | None


class Category(NamedTuple):
    name: str
    train: list[Path]  # normal images
    test: list[TestImage]


def child(folder: Path, *names: str) -> Path | None:
    """The subfolder with one of these names, in any letter case, or None."""
    return next((entry for entry in sorted(folder.iterdir()) if entry.name.lower() in names and entry.is_dir()), None)


def normal_images(folder: Path) -> list[Path]:
    """The images of one folder, all normal. ValueError where defects or masks could be among them."""
    images, names = list_images(folder), {}
    how = "keep the normal images alone in one folder, or use train/good, test/good and test/DEFECT (links will do)"
    for path in images:
        if path.parent != folder:
            raise ValueError(f"{path}: defects or masks in subfolders would be learned as normal: {how}")
        other = names.setdefault(MASK_ENDING.sub("", path.stem.lower()), path)
        if other != path:
            raise ValueError(f"{path}, {other.name}: an image and its mask? It would be learned as normal: {how}")
    return images


def test_images(folder: Path, truth: Path | None) -> list[TestImage]:
    """The images in folder/good and folder/DEFECT, with masks in truth/DEFECT. A line on stderr names unused masks."""
    def key(path: Path, top: Path) -> str:
        return MASK_ENDING.sub("", path.relative_to(top).with_suffix("").as_posix().lower())

    marked = list_images(truth, may_be_empty=True) if truth else []
    masks, found, images = {key(mask, truth): mask for mask in marked}, [], list_images(folder)
    plain = {key(path, folder) for path in images if not MASK_ENDING.search(path.stem.lower())}
    for path in images:
        if path.parent == folder:
            raise ValueError(f"{path}: is it normal or not? Put it into test/good or into test/ and the defect's name")
        if MASK_ENDING.search(path.stem.lower()) and key(path, folder) in plain:
            raise ValueError(f"{path}: looks like a mask; put masks into ground_truth/, beside test/")
        name = path.relative_to(folder)
        defect = "good" if name.parts[0].lower() in NORMAL else name.parts[0]
        found.append(TestImage(path, name, defect, None if defect == "good" else masks.get(key(path, folder))))
    unused = sorted(set(masks) - {key(item.path, folder) for item in found})
    if unused:
        print(f"{truth}: masks that fit no test image: {len(unused)}, such as {masks[unused[0]]}", file=sys.stderr)
    return found


def find_categories(folder: Path | str, training: bool = True) -> list[Category]:
    """The folder as one category if it has MVTec's layout:

        train/good/000.png   test/good/000.png   test/DEFECT/000.png   ground_truth/DEFECT/000_mask.png

    else its subfolders of this layout; else its images as one training set. Letter case does not matter. ok and normal
    mean good, masks means ground_truth. train/ itself may hold images. Without `training`, test/ is enough. ValueError.
    """
    def category(folder: Path) -> Category | None:
        train, test = child(folder, "train"), child(folder, "test")
        if not (train if training else test):
            return None
        return Category(os.path.basename(os.path.abspath(folder)),  # a link's own name, not its target's
                        normal_images(child(train, *NORMAL) or train) if training else [],
                        test_images(test, child(folder, "ground_truth", "groundtruth", "masks")) if test else [])
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: {'is not a' if os.path.lexists(folder) else 'no such'} folder; check the path")
    whole = category(folder)
    below = [] if whole else sorted(filter(Path.is_dir, folder.glob("[!.]*")))
    found = [whole] if whole else list(filter(None, map(category, below)))
    others = sorted({path.name for path in below} - {kept.name for kept in found})
    if found and others:
        print(f"{folder}: not {'trained on' if training else 'tested'}: {', '.join(others)[:500]}", file=sys.stderr)
    if not found and not training:
        raise ValueError(f"{folder}: holds no test/; evaluation needs test/good and test/DEFECT")
    return found or [Category(os.path.basename(os.path.abspath(folder)), normal_images(folder), [])]


# --- Metrics ----------------------------------------------------------------------------------------------------------

def connected_regions(mask: Tensor) -> Tensor:
    """Labels 1, 2, ... of the 8-connected regions of a mask (H, W), else 0. Pixels take the largest number around."""
    regions = torch.zeros(mask.shape, dtype=torch.int64)
    if mask.any():
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        inside = mask[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1].double()[None]
        number, spread = inside, torch.arange(1, inside.numel() + 1).view_as(inside) * inside
        while not torch.equal(number, spread):
            number, spread = spread, torch.nn.functional.max_pool2d(spread, 3, stride=1, padding=1) * inside
            spread = torch.nn.functional.pad(spread.flatten(), (1, 0))[spread.long()]  # on to that pixel's own number
        regions[mask] = number[inside > 0].unique(return_inverse=True)[1] + 1
    return regions


def ranking_metrics(score: np.ndarray, region: np.ndarray, limit: float = 0.3) -> dict[str, float]:
    """Metrics of samples with a score (N,) and a region (N,): 0 = normal, 1, 2, ... anomalous. {} without both kinds.

    Every distinct score is a threshold, from the highest (n = 1) down, with recall R_n and precision P_n.
    auroc: the probability that an anomalous sample scores above a normal one; a tie counts half
    ap: the sum over n of (R_n - R_{n-1}) * P_n
    f1, threshold: the largest 2 P_n R_n / (P_n + R_n), and its score; samples at or above it are called anomalous
    aupro: the mean recall of the regions, averaged over false positive rates from 0 to `limit`, as in MVTec's script
    ValueError for a NaN score.
    """
    sizes = np.bincount(region)
    positives = int(sizes[1:].sum())
    negatives = len(region) - positives
    if not positives or not negatives:
        return {}
    if np.isnan(score).any():
        raise ValueError("scores are NaN: the weights are damaged or the training diverged; train again")
    order = np.argsort(-score)
    score, region = score[order], region[order]
    last = np.append(score[1:] != score[:-1], True)  # True for the last of tied samples
    hits = np.insert((region > 0).cumsum()[last], 0, 0)
    alarms = np.insert((region == 0).cumsum()[last], 0, 0)
    area = ((hits[1:] + hits[:-1]) * np.diff(alarms)).sum() / 2  # of integers, so exact
    f1 = 2 * hits[1:] / (hits[1:] + alarms[1:] + positives)
    weight = np.append(0, 1 / np.maximum(sizes[1:], 1))  # what a sample adds to its region's recall
    overlap = np.insert(weight[region].cumsum()[last], 0, 0.0)
    missed, rate = 1 - overlap / overlap[-1], alarms / negatives
    inside = rate <= limit
    missed = np.append(missed[inside], np.interp(limit, rate, missed))
    rate = np.append(rate[inside], limit)
    return {"auroc": float(area / (positives * negatives)),
            "ap": float((np.diff(hits) * (hits / np.maximum(hits + alarms, 1))[1:]).sum() / positives),
            "f1": float(f1.max()), "threshold": float(score[last][f1.argmax()]),
            "aupro": float(1 - ((missed[1:] + missed[:-1]) * np.diff(rate)).sum() / 2 / limit)}


def image_metrics(scores: list[float], labels: list[int]) -> dict[str, float]:
    """auroc, ap, f1 and threshold of image scores; labels: 0 = normal, 1 = defective. {} without both kinds."""
    metrics = ranking_metrics(np.array(scores, np.float32), np.array(labels, np.int64))
    return {name: value for name, value in metrics.items() if name != "aupro"}


def pixel_metrics(maps: list[Tensor], masks: list[Tensor]) -> dict[str, float]:
    """ranking_metrics over all pixels of maps and masks (H, W), at the network's size. {} without both kinds."""
    regions, count = [], 0  # numbered over all images
    for mask in masks:
        region = connected_regions(mask)
        regions.append(torch.where(region > 0, region + count, 0))
        count += int(region.max())
    return ranking_metrics(torch.stack(maps).flatten().numpy(), torch.stack(regions).flatten().numpy()) if maps else {}


def write_csv(path: Path, mode: str, rows: list[tuple]) -> None:
    with open(path, mode, newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows(rows)


# --- Pictures ---------------------------------------------------------------------------------------------------------

def panel(image: Tensor) -> np.ndarray:
    """An image (3, H, W), map or mask ([1,] H, W), uint8 in 0..255, float or bool in 0..1, as uint8 (H, W, 3)."""
    if image.dtype != torch.uint8:
        image = (image.float().clamp(0, 1) * 255).round().byte()
    return image.expand(3, *image.shape[-2:]).permute(1, 2, 0).numpy()


def heat(image: np.ndarray, anomaly_map: Tensor) -> np.ndarray:
    """The map (H, W) in [0, 1] over the image (H, W, 3) turned grey: clear to 0.3, then blue, cyan, yellow, red."""
    level = anomaly_map.clamp(0, 1).numpy()
    channels = ((0, 0, 0, 255, 255), (0, 0, 255, 255, 0), (255, 255, 255, 0, 0))  # red, green, blue at the five levels
    colour = np.stack([np.interp(level, (0, 0.35, 0.6, 0.8, 1), channel) for channel in channels], -1)
    weight = 2 / 3 * ((level[..., None] - 0.3) / 0.5).clip(0, 1)  # 0.5: the median of normal images' maxima in DFM
    grey = image @ np.array((0.299, 0.587, 0.114))
    return (grey[..., None] * (1 - weight) + colour * weight).round().astype(np.uint8)


def panels(image: Tensor, parts: dict[str, Tensor], mask: Tensor | None = None, top: float = 1.0) -> dict:
    """What a picture shows of an image: panels by heading. The heat map's scale ends at top or the map's maximum."""
    shown = {"image": panel(image)}
    for name, part in parts.items():
        if name not in ("score", "anomaly_map"):
            shown[name.replace("_", " ")] = panel(part)
    if "anomaly_map" in parts:
        anomaly_map = parts["anomaly_map"]
        shown["anomaly map"] = heat(shown["image"], anomaly_map / max(top, float(anomaly_map.max())))
    return shown if mask is None else shown | {"truth": panel(mask)}


def page(rows: list[tuple[str, dict[str, np.ndarray]]]) -> Image.Image:
    """Rows of panels of one size, a caption (one or more lines) left of each, a heading above each column."""
    height, width = next(iter(rows[0][1].values())).shape[:2]
    scale = max(1, 160 // width)  # room for the headings
    height, width, font = scale * height, scale * width, ImageFont.load_default(14)
    left = 24 + max(int(font.getlength(line)) for caption, _ in rows for line in caption.split("\n"))
    headings = max((row for _, row in rows), key=len)
    picture = Image.new("RGB", (left + len(headings) * (width + 8), 28 + len(rows) * (height + 8)), "white")
    draw = ImageDraw.Draw(picture)
    for column, heading in enumerate(headings):
        draw.text((left + column * (width + 8) + width // 2, 14), heading, "black", font, anchor="mm")
    for number, (caption, row) in enumerate(rows):
        top = 28 + number * (height + 8)
        draw.multiline_text((left - 12, top + height // 2), caption, "black", font, anchor="rm", align="right")
        for heading, pixels in row.items():
            small = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            picture.paste(small, (left + list(headings).index(heading) * (width + 8), top))
    return picture


# --- The toy product --------------------------------------------------------------------------------------------------

TOY = {"train/good": 100, "test/good": 20, "test/scratch": 12, "test/stain": 12, "test/missing": 12}


def draw_toy(kind: str, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """A steel cap with six bolts and a brass hub on a belt, and its mask; 256 x 256, drawn at twice that size."""
    picture, mask = Image.new("RGB", (512, 512), (44, 46, 54)), Image.new("L", (512, 512))
    draw, truth = ImageDraw.Draw(picture), ImageDraw.Draw(mask)
    (cx, cy), angle, lost = 256 + rng.uniform(-4, 4, 2), rng.uniform(-0.04, 0.04), int(rng.integers(6))
    for start in range(int(rng.integers(24)) - 536, 512, 24):  # the belt's weave
        draw.line((start, 0, start + 512, 512), (52, 54, 62), 8)
    draw.circle((cx, cy), 196, (84, 86, 92))
    for radius in range(188, 0, -2):  # light from the upper left, turning marks
        grey = 118 + (188 - radius) * 3 // 8 + 6 * (radius // 2 % 2) - 28 * (94 <= radius <= 98)
        draw.circle((cx - (188 - radius) / 14, cy - (188 - radius) / 14), radius, (grey, grey + 2, grey + 6))
    for bolt in range(6):
        x, y = cx + 140 * math.cos(angle + bolt * math.pi / 3), cy + 140 * math.sin(angle + bolt * math.pi / 3)
        draw.circle((x, y), 27, (72, 74, 80))
        if kind == "missing" and bolt == lost:
            draw.circle((x, y), 22, (18, 18, 20))
            truth.circle((x, y), 22, 255)
        else:
            draw.circle((x, y), 22, (206, 208, 214))
            draw.regular_polygon((x, y, 11), 6, math.degrees(angle), (40, 41, 44))
    draw.circle((cx, cy), 66, (190, 152, 82))
    draw.regular_polygon((cx, cy, 32), 6, math.degrees(angle), (34, 30, 26))
    if kind == "scratch":
        (x, y), radius, start = rng.normal((cx, cy), 20), rng.uniform(70, 130), rng.uniform(0, 360)
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.arc(box, start, start + 60, (34, 34, 38), 10)
        truth.arc(box, start, start + 60, 255, 10)
    if kind == "stain":
        way, reach = rng.uniform(0, 2 * math.pi), rng.uniform(60, 130)
        for x, y in rng.normal((cx + reach * math.cos(way), cy + reach * math.sin(way)), 16, (5, 2)):
            truth.circle((x, y), rng.uniform(16, 30), 255)
        picture.paste((84, 56, 30), mask=mask.filter(ImageFilter.GaussianBlur(4)).point(lambda value: int(0.8 * value)))
    noisy = picture.resize((256, 256), Image.Resampling.BOX) + rng.normal(0, 2, (256, 256, 3)) + rng.uniform(-5, 5)
    mask = mask.resize((256, 256), Image.Resampling.BOX).point(lambda value: 255 * (value > 127))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), mask


def make_toy(folder: Path | str) -> Path:
    """Draws the toy product in MVTec's layout unless the folder exists. Returns the folder, which is never partial."""
    folder = Path(folder)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        toy = Path(temporary, folder.name)
        for part, count in TOY.items():
            truth = toy / "ground_truth" / Path(part).name
            (toy / part).mkdir(parents=True)
            for index in range(count):  # each from its own seed: no picture depends on the ones before
                picture, mask = draw_toy(truth.name, np.random.default_rng((*part.encode(), index)))
                picture.save(toy / part / f"{index:03d}.png")
                if truth.name != "good":
                    truth.mkdir(parents=True, exist_ok=True)
                    mask.save(truth / f"{index:03d}_mask.png")
        if not folder.is_dir():  # another process may have been faster
            toy.rename(folder)
    return folder
