"""common.py against oracles that share none of its code: pixel values computed in numpy from what was written into a
file, a dense triangle filter for the resize, pairwise and all-threshold loops for metrics, a flood fill for regions,
the toy product's pictures drawn again without their defects."""

import colorsys
import os
import pickle
import random
import resource
import struct
import sys
import threading
import time
import zlib
from _thread import interrupt_main
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from common import InputError

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")  # as common does, but pytest starts from its own filters
rng = np.random.default_rng(0)
RGB = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
GREY = rng.integers(0, 256, (16, 16), dtype=np.uint8)
DEEP = rng.integers(0, 65536, (16, 16), dtype=np.uint16)
ALPHA = rng.integers(0, 256, (16, 16), dtype=np.uint8)
SMOOTH = np.dstack((*np.mgrid[60:220:10, 40:200:10], np.full((16, 16), 128))).astype(np.uint8)
RAMP = np.linspace(0, 255, 5000).round().astype(np.uint8)[:, None]


def grey(array):
    return np.stack([array] * 3, axis=-1)


def weights(inputs, outputs):
    """Row o: the triangle of output pixel o over the input pixels, as wide as the scale (at least one pixel), sum 1."""
    scale = inputs / outputs
    distance = (np.arange(inputs) + 0.5)[None] - (np.arange(outputs)[:, None] + 0.5) * scale
    triangle = np.maximum(0, 1 - abs(distance) / max(scale, 1))
    return triangle / triangle.sum(1, keepdims=True)


def resized(array, size):
    rows, columns = weights(array.shape[0], size), weights(array.shape[1], size)
    return np.einsum("oh,hwc,pw->opc", rows, array.astype(float), columns)


def saved(image, suffix=".png", **options):
    return lambda path: image.save(path, **options), suffix


def palette_image(**info):
    image = Image.frombytes("P", (16, 16), (GREY // 64).tobytes())
    image.putpalette([10, 20, 30, 200, 100, 0, 7, 77, 177, 250, 251, 252])
    image.info.update(info)
    return image


PALETTE = np.array([[10, 20, 30], [200, 100, 0], [7, 77, 177], [250, 251, 252]])[GREY // 64]


def merged(mode, *bands):
    return Image.merge(mode, [Image.fromarray(np.ascontiguousarray(band)) for band in bands])


def turned(orientation, array):
    """What a viewer shows of stored pixels, by the EXIF standard's table of where row 0 and column 0 lie."""
    return {
        1: array,
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: array.transpose(1, 0, 2),
        6: np.rot90(array, -1),
        7: array[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(array),
    }[orientation]


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def ycbcr_to_rgb(array):
    y, blue, red = (array[..., i].astype(float) - (0, 128, 128)[i] for i in range(3))
    return np.clip(np.stack((y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue), -1), 0, 255)


def deep_image(mode):
    kind = ">u2" if mode == "I;16B" else "<u2"
    return Image.frombytes(mode, (16, 16), DEEP.astype(kind).tobytes())


def pgm(maximum, values):
    return lambda path: path.write_bytes(b"P5 16 16 %d\n" % maximum + values.astype(">u2").tobytes()), ".pgm"


frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
deep = grey(np.rint(DEEP / 257))
corners = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8)
blocks = np.kron(corners, np.ones((8, 8, 1), np.uint8))
cmyk = 255 - np.concatenate((RGB, ALPHA[..., None]), axis=2).astype(float)

# name: (how to write the file, its suffix), the pixels it must give, and by how many levels a pixel may be off
GOOD = {
    "1": (saved(Image.fromarray(GREY > 127)), grey((GREY > 127) * 255), 0),
    "L": (saved(Image.fromarray(GREY)), grey(GREY), 0),
    "L bmp": (saved(Image.fromarray(GREY), ".BMP"), grey(GREY), 0),
    "LA": (saved(merged("LA", GREY, ALPHA)), grey(GREY), 0),
    "P": (saved(palette_image()), PALETTE, 0),
    "P gif": (saved(palette_image(), ".GIF"), PALETTE, 0),
    "P bmp": (saved(palette_image(), ".bmp"), PALETTE, 0),
    "P transparent index": (saved(palette_image(), transparency=2), PALETTE, 0),
    "P transparent bytes": (saved(palette_image(), transparency=b"\x00\x80\xff\x10"), PALETTE, 0),
    "PA tiff": (saved(palette_image().convert("PA"), ".tif"), PALETTE, 0),
    "RGB": (saved(Image.fromarray(RGB)), RGB, 0),
    "RGB tiff": (saved(Image.fromarray(RGB), ".Tiff"), RGB, 0),
    "RGB lzw tiff": (saved(Image.fromarray(RGB), ".tif", compression="tiff_lzw"), RGB, 0),
    "RGB ppm": (saved(Image.fromarray(RGB), ".ppm"), RGB, 0),
    "RGB webp": (saved(Image.fromarray(RGB), ".webp", lossless=True), RGB, 0),
    "RGB jpeg": (saved(Image.fromarray(SMOOTH), ".JPG", quality=100, subsampling=0), SMOOTH, 3),
    "L jpeg": (saved(Image.fromarray(SMOOTH[..., 0]), ".jpeg", quality=100), grey(SMOOTH[..., 0]), 2),
    "RGB jpeg named png": (saved(Image.fromarray(SMOOTH), format="JPEG", quality=100, subsampling=0), SMOOTH, 3),
    "animated png": (saved(frames[0], save_all=True, append_images=frames[1:]), RGB, 0),
    "animated webp": (saved(frames[0], ".webp", save_all=True, append_images=frames[1:], lossless=True), RGB, 0),
    "two-page tiff": (saved(frames[0], ".tif", save_all=True, append_images=frames[1:]), RGB, 0),
    "animated gif": (
        saved(Image.fromarray(blocks), ".gif", save_all=True, append_images=[Image.fromarray(255 - blocks)]), blocks, 0
    ),
    "RGBA": (saved(merged("RGBA", *RGB.transpose(2, 0, 1), ALPHA)), RGB, 0),
    "RGBX tiff": (saved(merged("RGBX", *RGB.transpose(2, 0, 1), ALPHA), ".tif"), RGB, 0),
    "CMYK tiff": (
        saved(merged("CMYK", *RGB.transpose(2, 0, 1), ALPHA), ".tif"), cmyk[..., :3] * cmyk[..., 3:] / 255, 1
    ),
    "CMYK jpeg": (
        saved(Image.new("CMYK", (16, 16), (200, 20, 80, 40)), ".jpg", quality=100),
        np.full((16, 16, 3), np.array((55, 235, 175)) * 215 / 255), 2,
    ),
    "YCbCr tiff": (saved(merged("YCbCr", *RGB.transpose(2, 0, 1)), ".tif"), ycbcr_to_rgb(RGB), 2),
    "I;16": (saved(deep_image("I;16")), deep, 0),
    "I;16 tiff": (saved(deep_image("I;16"), ".tif"), deep, 0),
    "I;16B tiff": (saved(deep_image("I;16B"), ".tif"), deep, 0),
    "16-bit pgm": (pgm(65535, DEEP), deep, 0),
    "12-bit pgm": (pgm(4095, DEEP >> 4), grey(np.rint((DEEP >> 4) * (255 / 4095))), 1),
    "I;16 turned": (saved(deep_image("I;16"), ".tif", exif=exif(6)), np.rot90(deep, -1), 0),
    "1 x 1": (saved(Image.new("RGB", (1, 1), (1, 2, 3))), np.full((16, 16, 3), (1, 2, 3)), 0),
    "1 x 5000": (saved(Image.fromarray(RAMP)), resized(grey(RAMP), 16), 1),
    "5000 x 1": (saved(Image.fromarray(RAMP.T)), resized(grey(RAMP.T), 16), 1),
    "smaller": (saved(Image.fromarray(RGB[:5, :7])), resized(RGB[:5, :7], 16), 1),
    "larger": (saved(Image.fromarray(np.tile(RGB, (3, 5, 1)))), resized(np.tile(RGB, (3, 5, 1)), 16), 1),
    **{f"EXIF {i} png": (saved(Image.fromarray(RGB), exif=exif(i)), turned(i, RGB), 0) for i in range(1, 9)},
    "EXIF 6 webp": (saved(Image.fromarray(RGB), ".webp", lossless=True, exif=exif(6)), turned(6, RGB), 0),
    "EXIF 8 jpeg": (
        saved(Image.fromarray(SMOOTH), ".jpg", quality=100, subsampling=0, exif=exif(8)), turned(8, SMOOTH), 3
    ),
    "EXIF 99": (saved(Image.fromarray(RGB), exif=exif(99)), RGB, 0),
}


def check(tensor, expected, tolerance):
    assert tensor.dtype == torch.uint8 and tensor.shape == (3, 16, 16)
    off = abs(tensor.permute(1, 2, 0).numpy().astype(float) - expected).max()
    assert off <= tolerance + 0.5 * bool(tolerance), off


@pytest.mark.parametrize("name", GOOD)
def test_image(name, tmp_path):
    (write, suffix), expected, tolerance = GOOD[name]
    path = tmp_path / ("image" + suffix)
    write(path)
    check(common.read_image(path, 16, antialias=True), expected, tolerance)
    assert common.list_images(tmp_path) == [path]


def premultiplied():
    opaque = np.maximum(ALPHA, 128).astype(int)
    return opaque, RGB.astype(int) * opaque[..., None] // 255


@pytest.mark.parametrize("mode", ["HSV", "I;16N", "I;16L", "La", "RGBa"])
def test_mode_that_no_writer_makes(mode, tmp_path, monkeypatch):
    opaque, colours = premultiplied()
    if mode == "HSV":
        image = merged(mode, *RGB.transpose(2, 0, 1))
        expected = np.array([[colorsys.hsv_to_rgb(*(pixel / 255)) for pixel in row] for row in RGB]) * 255
    elif mode.startswith("I;16"):
        image, expected = deep_image(mode), deep
    elif mode == "La":
        image = Image.frombytes(mode, (16, 16), np.stack((colours[..., 0], opaque), -1).astype(np.uint8).tobytes())
        expected = grey(colours[..., 0] * 255 / opaque)
    else:
        image = Image.frombytes(mode, (16, 16), np.dstack((colours, opaque)).astype(np.uint8).tobytes())
        expected = colours * 255 / opaque[..., None]
    path = tmp_path / "image.png"
    path.touch()
    monkeypatch.setattr(common.Image, "open", lambda *_, **__: image)
    check(common.read_image(path, 16), expected, 0 if mode.startswith("I;16") else 2)


@pytest.mark.parametrize("name", ["with space [1].png", "line\nbreak.png", b"\xff\xfe.png", "päckchen 包.PNG"])
def test_odd_names(name, tmp_path):
    path = tmp_path / (os.fsdecode(name) if isinstance(name, bytes) else name)
    Image.fromarray(RGB).save(path)
    check(common.read_image(common.list_images(tmp_path)[0], 16), RGB, 0)
    path.write_bytes(b"")
    with pytest.raises(InputError) as caught:
        common.read_image(path, 16)
    str(caught.value).encode("utf-8")  # can be printed
    assert len(str(caught.value).splitlines()) == 1


def bomb(path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


def forbidden(path):
    Image.fromarray(RGB).save(path)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")


BAD = {
    "zero bytes": (".png", lambda path: path.write_bytes(b"")),
    "text": (".png", lambda path: path.write_text("not an image\n" * 9)),
    "PostScript": (".png", lambda path: Image.fromarray(RGB).save(path, "EPS")),
    "folder": (".png", lambda path: path.mkdir()),
    "dangling link": (".png", lambda path: path.symlink_to("nowhere.png")),
    "link to itself": (".png", lambda path: path.symlink_to(path)),
    "missing": (".png", lambda path: None),
    "pipe": (".png", os.mkfifo),
    "permission": (".png", forbidden),
    "bomb": (".png", bomb),
    "signature only": (".png", lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n")),
    "header without size": (".ppm", lambda path: path.write_bytes(b"P6\n")),
    "size zero": (".bmp", lambda path: path.write_bytes(b"BM" + struct.pack("<14I", 54, 0, 54, 40, *(0,) * 10))),
    "I": (".tif", lambda path: Image.fromarray(DEEP.astype(np.int32)).save(path)),
    "F": (".tif", lambda path: Image.fromarray(DEEP.astype(np.float32)).save(path)),
    "LAB": (".tif", lambda path: Image.new("LAB", (16, 16)).save(path)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_image(name, tmp_path):
    suffix, write = BAD[name]
    path = tmp_path / ("bad" + suffix)
    write(path)
    with pytest.raises(InputError) as caught:
        common.read_image(path, 16)
    line = str(caught.value)
    assert str(path) in line and len(line.splitlines()) == 1 and "Error" not in line
    if name in ("folder", "pipe", "dangling link"):  # as masks, too
        with pytest.raises(InputError, match="bad"):
            common.read_mask(path, 16)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif", ".gif", ".webp", ".ppm"])
def test_truncated_or_damaged(suffix, tmp_path):
    """At every tenth of its length: an InputError or, where no pixel was lost, the image. Bytes changed: no crash."""
    path, pick = tmp_path / f"image{suffix}", random.Random(0)
    Image.fromarray(SMOOTH if suffix == ".jpg" else blocks if suffix == ".gif" else RGB).save(path)
    whole, data = common.read_image(path, 16), path.read_bytes()
    refused = 0
    for tenth in range(10):
        path.write_bytes(data[: len(data) * tenth // 10])
        try:
            assert torch.equal(common.read_image(path, 16), whole)
        except InputError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused >= 8
    for _ in range(60):
        changed = bytearray(data)
        for _ in range(pick.randint(1, 8)):
            changed[pick.randrange(len(data))] = pick.randrange(256)
        path.write_bytes(changed)
        for read, channels in ((common.read_image, 3), (common.read_mask, 1)):
            try:
                assert read(path, 16).shape == (channels, 16, 16)
            except InputError as error:
                assert len(str(error).splitlines()) == 1


def test_list_images(tmp_path):
    for name in ("b.PNG", "a/c.JpG", "a/.hidden.png", ".git/d.png", "Thumbs.db", "notes.txt", "._b.png", "z.tiff"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "x.png").mkdir()
    assert common.list_images(tmp_path) == [tmp_path / name for name in ("a/c.JpG", "b.PNG", "z.tiff")]
    assert common.list_images(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]
    for link, target in (("a/back", tmp_path), ("one", tmp_path / "a"), ("gone", "nowhere")):
        (tmp_path / link).symlink_to(target)
    assert len(common.list_images(tmp_path)) == 3  # each once, and there is an end
    (tmp_path / "far").mkdir()
    (tmp_path / "far/link").symlink_to(tmp_path / "a")
    assert common.list_images(tmp_path / "far") == [
        tmp_path / "far/link" / name for name in ("back/b.PNG", "back/z.tiff", "c.JpG")]
    for path, words in ((tmp_path / "x.png", "no images.*png"), (tmp_path / "nowhere", "no such")):
        with pytest.raises(InputError, match=f"{path.name}.*{words}"):
            common.list_images(path)


# --- Masks ------------------------------------------------------------------------------------------------------------

SPOT = np.zeros((4, 4), bool)
SPOT[1:3, 2] = True


def spot_palette():
    image = Image.frombytes("P", (4, 4), (~SPOT).tobytes())  # index 0 is white and 1 black
    image.putpalette([255, 255, 255, 0, 0, 0])
    return image


MASKS = {
    "1.png": Image.fromarray(SPOT),
    "L of 1.png": Image.fromarray(SPOT.astype(np.uint8)),
    "L of 255.bmp": Image.fromarray(SPOT.astype(np.uint8) * 255),
    "LA.png": merged("LA", SPOT.astype(np.uint8), np.full((4, 4), 255, np.uint8)),
    "P.png": spot_palette(),
    "RGB blue 1.png": Image.fromarray(np.dstack((SPOT * 0, SPOT * 0, SPOT)).astype(np.uint8)),
    "RGBA.png": Image.fromarray(np.dstack((SPOT, SPOT, SPOT, SPOT * 0 + 1)).astype(np.uint8) * 255),
    "I16 of 1.png": Image.fromarray(SPOT.astype(np.uint16)),
    "I of 1.tif": Image.fromarray(SPOT.astype(np.int32)),
    "F of a half.tif": Image.fromarray(SPOT.astype(np.float32) / 2),
}


@pytest.mark.parametrize("name", MASKS)
def test_mask(name, tmp_path):
    MASKS[name].save(tmp_path / name)
    mask = common.read_mask(tmp_path / name, 4)
    assert mask.dtype == torch.uint8 and mask.shape == (1, 4, 4) and np.array_equal(mask[0], SPOT)


@pytest.mark.parametrize("ratio", [1, 2, 3, 5, 6, 7])
def test_mask_is_anomalous_where_more_than_half_of_the_area_is(ratio, tmp_path):
    array = rng.random((8 * ratio, 8 * ratio)) < 0.5
    array[:ratio, :ratio] = np.arange(ratio * ratio).reshape(ratio, ratio) % 2  # just half where the ratio is even
    Image.fromarray(array).save(tmp_path / "mask.png")
    counts = array.reshape(8, ratio, 8, ratio).sum((1, 3))
    assert np.array_equal(common.read_mask(tmp_path / "mask.png", 8)[0], 2 * counts > ratio * ratio)


def test_mask_turns_with_its_exif_and_squeezes_like_its_image(tmp_path):
    array = np.zeros((8, 24), np.uint8)
    array[:4, :12] = 255
    Image.fromarray(array).save(tmp_path / "mask.png", exif=exif(6))
    mask = common.read_mask(tmp_path / "mask.png", 8)[0]
    assert mask[:4, 4:].all() and mask.sum() == 16


# --- Decoding ---------------------------------------------------------------------------------------------------------


def write_images(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.new("RGB", (20, 10), (index, 2 * index, 3)).save(folder / f"{index:03d}.png")
    return sorted(folder.iterdir())


def test_decode_keeps_the_order_and_names_the_first_bad_file(tmp_path, capsys):
    paths = write_images(tmp_path, 30)
    images = common.decode(paths, 8, "caps")
    assert images.shape == (30, 3, 8, 8) and images[:, 1, 0, 0].tolist() == list(range(0, 60, 2))
    assert len(capsys.readouterr().err.splitlines()) == 1
    for bad in (7, 20):
        paths[bad].write_bytes(b"")
    with pytest.raises(InputError, match="007.png"):
        common.decode(paths, 8, "caps")


def test_decode_can_be_interrupted(monkeypatch):
    monkeypatch.setattr(common, "read_image", lambda *_: time.sleep(0.05) or torch.zeros(3, 8, 8))
    timer, start = threading.Timer(0.3, interrupt_main), time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        common.decode([Path("x.png")] * 100 * os.cpu_count(), 8, "caps")
    assert time.monotonic() - start < 3


def test_errors_of_a_worker_are_values(tmp_path):
    paths = write_images(tmp_path, 4)
    paths[1].write_bytes(b"\x89PNG")
    masks = [None, None, paths[3], tmp_path / "nowhere.png"]
    files = pickle.loads(pickle.dumps(common.ImageFiles(paths, 8, masks)))
    images, masks, errors = next(iter(torch.utils.data.DataLoader(files, batch_size=4, num_workers=1)))
    assert images.shape == (4, 3, 8, 8) and masks.shape == (4, 1, 8, 8) and masks.dtype == torch.uint8
    assert [bool(error) for error in errors] == [False, True, False, True]
    assert "001.png" in errors[1] and "nowhere.png" in errors[3] and not images[1].any() and not images[3].any()
    assert masks.flatten(1).amax(1).tolist() == [0, 0, 1, 0]
    pickled = pickle.loads(pickle.dumps(InputError("one\nline")))
    assert str(pickled) == "one line"


# --- Data sets --------------------------------------------------------------------------------------------------------


def test_mvtec_layout(tmp_path):
    for part, count in {"train/good": 3, "test/good": 2, "test/cut": 3, "test/a dent": 2}.items():
        write_images(tmp_path / "cap" / part, count)
    for name in ("cut/000_mask.png", "cut/001.PNG", "a dent/000_mask.tif", "good/000_mask.png"):
        (tmp_path / "cap/ground_truth" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cap/ground_truth" / name).touch()
    (tmp_path / "cap/test/.DS_Store").touch()
    (category,) = common.find_categories(tmp_path / "cap")
    truth = category.folder / "ground_truth"
    assert category.name == "cap" and [path.name for path in category.train] == ["000.png", "001.png", "002.png"]
    assert category.defects == ["a dent"] * 2 + ["cut"] * 3 + ["good"] * 2
    assert category.labels == [True] * 5 + [False] * 2
    expected = ["a dent/000_mask.tif", None, "cut/000_mask.png", "cut/001.PNG", None, None, None]
    assert category.masks == [name and truth / name for name in expected]
    assert category.has_truth == [True, False, True, True, False, True, True]
    write_images(tmp_path / "bolt" / "train", 2)  # directly in train/, and without a test set
    (tmp_path / "license.txt").touch()
    (tmp_path / "empty").mkdir()
    assert [category.name for category in common.find_categories(tmp_path)] == ["bolt", "cap"]
    assert common.find_categories(str(tmp_path))[0].test == []


def test_plain_folder(tmp_path, monkeypatch):
    write_images(tmp_path / "photos", 3)
    monkeypatch.chdir(tmp_path / "photos")
    for folder in (tmp_path / "photos", Path(".")):
        (category,) = common.find_categories(folder)
        assert category.name == "photos" and len(category.train) == 3 and not category.test and not category.masks


def test_layout_errors(tmp_path):
    write_images(tmp_path / "only_test/test/cut", 1)
    (tmp_path / "no_images/train/good").mkdir(parents=True)
    write_images(tmp_path / "no_good/train/bad", 1)
    write_images(tmp_path / "unsorted/train/good", 1)
    write_images(tmp_path / "unsorted/test", 1)
    (tmp_path / "file.txt").touch()
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "two_above/mvtec/bottle/train/good", 1)
    write_images(tmp_path / "two_above/mvtec/bottle/ground_truth/cut", 1)
    for name in ("two_above", "only_test/test", "only_test", "no_images", "no_good", "unsorted", "file.txt", "empty",
                 "nowhere", "long" * 100):
        with pytest.raises(InputError, match=name):
            common.find_categories(tmp_path / name)


# --- Metrics ----------------------------------------------------------------------------------------------------------


def brute_auroc(scores, labels):
    pairs = [(a > b) + (a == b) / 2 for a in scores[labels] for b in scores[~labels]]
    return sum(pairs) / len(pairs)


def brute_thresholds(scores, labels):
    """(recall, precision) with everything at or above a score called anomalous, from the highest score down."""
    for threshold in sorted(set(scores.tolist()), reverse=True):
        called = scores >= threshold
        yield (called & labels).sum() / labels.sum(), (called & labels).sum() / called.sum()


def brute_ap(scores, labels):
    points = [(0, 1), *brute_thresholds(scores, labels)]
    return sum((now[0] - before[0]) * now[1] for before, now in zip(points, points[1:]))


def brute_f1(scores, labels):
    return max(2 * r * p / (r + p) if r + p else 0 for r, p in brute_thresholds(scores, labels))


def flood_fill(mask):
    labels, regions = np.zeros(mask.shape, int), 0
    for start in zip(*np.nonzero(mask)):
        if labels[start]:
            continue
        regions += 1
        labels[start], stack = regions, [start]
        while stack:
            y, x = stack.pop()
            for near in ((y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)):
                if 0 <= near[0] < mask.shape[0] and 0 <= near[1] < mask.shape[1] and mask[near] and not labels[near]:
                    labels[near] = regions
                    stack.append(near)
    return labels


def brute_aupro(maps, masks, limit):
    regions = [(n, labels == r) for n, labels in enumerate(map(flood_fill, masks)) for r in range(1, labels.max() + 1)]
    points = [(0.0, 0.0)]
    for threshold in sorted(set(maps.flatten().tolist()), reverse=True):
        called = maps >= threshold
        points.append((called[~masks].mean(), np.mean([called[n][region].mean() for n, region in regions])))
    area = 0.0
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 < limit and x1 > x0:
            end = min(x1, limit)
            area += (end - x0) * (y0 + y0 + (y1 - y0) * (end - x0) / (x1 - x0)) / 2
    return area / limit


def ranked(scores, regions, limit=0.3, slice_size=2**20):
    scores, regions = torch.as_tensor(scores), torch.as_tensor(regions)
    return common.Ranking(scores.numel(), slice_size).add(scores, regions).metrics(limit)


@pytest.mark.parametrize("levels", [2, 5, 1000])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("slice_size", [1, 7, 2**20])
def test_ranking_metrics(levels, share, slice_size):
    """Ties, also across the ends of slices, negative scores, both zeros."""
    for count in (2, 3, 40, 200):
        scores, labels = np.float32(rng.integers(0, levels, count) / levels - 0.4), rng.random(count) < share
        scores[scores == 0] *= rng.choice((1, -1))
        labels[:2] = True, False
        found = ranked(scores, labels, slice_size=slice_size)
        assert found["auroc"] == pytest.approx(brute_auroc(scores, labels), abs=1e-9)
        assert found["ap"] == pytest.approx(brute_ap(scores, labels), abs=1e-9)
        assert found["f1"] == pytest.approx(brute_f1(scores, labels), abs=1e-9)


@pytest.mark.parametrize("levels", [1, 4, 10**6])
@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("slice_size", [1, 50, 2**20])
def test_aupro(levels, limit, slice_size):
    """As evaluation has it, in two parts whose regions are numbered apart."""
    for density in (0.02, 0.2, 0.7):
        masks = rng.random((3, 12, 10)) < density
        masks[0, 3:5, 4:8] = True
        maps = np.float32(np.floor((rng.random(masks.shape) + masks * 0.6) * levels) / levels)
        ranking = common.Ranking(masks.size, slice_size)
        for part in (slice(0, 1), slice(1, 3)):
            ranking.add(torch.tensor(maps[part]), common.connected_components(torch.tensor(masks[part])))
        assert ranking.metrics(limit)["aupro"] == pytest.approx(brute_aupro(maps, masks, limit), abs=1e-9)


def test_perfect_and_useless_maps():
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, 2:4, 2:4] = True
    assert ranked(masks.float(), masks)["aupro"] == pytest.approx(1, abs=1e-12)
    assert ranked(torch.zeros(2, 8, 8), masks)["aupro"] == pytest.approx(0.15)  # the diagonal, to 0.3
    assert ranked([0.1, 0.9], [False, True])["auroc"] == 1 and ranked([1, 1, 1], [0, 1, 0])["auroc"] == 0.5


def test_absent_metrics():
    scores = torch.rand(4)
    found = ranked(scores, [0, 1, 0, 1])
    assert found.keys() == {"auroc", "ap", "f1", "aupro"}
    assert all(type(value) is float and 0 <= value <= 1 for value in found.values())
    assert ranked(scores, torch.ones(4)) == {} == ranked(scores, torch.zeros(4)) == common.Ranking(0).metrics()
    with pytest.raises(InputError, match="NaN"):
        ranked(scores * float("nan"), torch.ones(4))


def test_a_million_scores_in_closed_form():
    """One anomalous score on top, all others tied: positives times negatives is far beyond what float32 can count."""
    labels = torch.arange(3 * 10**6 + 1) % 4 == 0
    scores, positives = torch.zeros(len(labels)), int(labels.sum())
    scores[0] = 1
    found = ranked(scores, labels)
    assert found["auroc"] == pytest.approx((1 + (positives - 1) / 2) / positives, abs=1e-12)
    expected = (1 + (positives - 1) * positives / len(labels)) / positives
    assert found["ap"] == pytest.approx(expected, abs=1e-12)


def spiral(size):
    mask, y, x, dy, dx = np.zeros((size, size), bool), 0, 0, 0, 1
    mask[0, 0] = True
    for length in [size - 1] + [n for n in range(size - 1, 0, -2) for _ in (0, 1)]:
        for _ in range(length):
            if not (0 <= y + dy < size and 0 <= x + dx < size):
                break
            y, x = y + dy, x + dx
            mask[y, x] = True
        dy, dx = dx, -dy
    return mask


def test_connected_components():
    snake = np.zeros((41, 41), bool)
    snake[::2] = True
    snake[1::4, -1] = snake[3::4, 0] = True
    checker = np.indices((41, 41)).sum(0) % 2 == 0
    shapes = [snake, snake.T, spiral(41), checker, np.ones((41, 41), bool), np.zeros((41, 41), bool)]
    shapes += [rng.random((41, 41)) < density for density in (0.1, 0.25, 0.4, 0.6)]
    for mask in shapes:
        assert np.array_equal(common.connected_components(torch.tensor(mask)), flood_fill(mask))
    together = common.connected_components(torch.tensor(np.stack(shapes)))  # regions never reach into the next plane
    assert together.max() == sum(flood_fill(mask).max() for mask in shapes)
    assert common.connected_components(torch.ones(3, 1, 1)).flatten().tolist() == [1, 2, 3]


# --- Pictures and files -----------------------------------------------------------------------------------------------


def test_heat_is_ever_brighter():
    colours = common.heat(torch.linspace(0, 1, 200)[None]).astype(float)[0]
    assert (np.diff(colours @ (0.2126, 0.7152, 0.0722)) > -0.6).all() and colours[-1].sum() > colours[0].sum() + 500
    assert np.array_equal(common.heat(np.array([[-1.0, 2.0]])), common.heat(np.array([[0.0, 1.0]])))


def test_pictures(tmp_path):
    image, mask = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8), torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[0, 3, 4] = True
    panels = [common.panel(image), common.panel(image / 255), None, common.panel(mask)]
    panels[2] = common.overlay(panels[0], mask[0].float())
    assert np.array_equal(panels[0], panels[1]) and panels[3][3, 4].tolist() == [255] * 3 and panels[3].sum() == 765
    strip = common.strip(panels)
    assert strip.size == (4 * 32 + 3 * common.GAP, 32)
    assert np.array_equal(np.asarray(strip)[:, :32], panels[0])
    assert np.array_equal(np.asarray(strip)[:, -32:], panels[3])
    captions = ["cut\n0.93", os.fsdecode(b"\xff"), "包"]
    page = common.sheet([strip] * 3, captions, ["image", "reconstruction", "map over image", "truth"])
    page.save(tmp_path / "page.png")
    assert page.height > 3 * 128 and page.width > 4 * 128


def test_write_atomically(tmp_path):
    path = tmp_path / "last.pt"
    common.write_atomically(path, lambda file: torch.save({"step": 1}, file))

    def fail(file):
        file.write(b"half")
        raise ValueError("stop")

    with pytest.raises(ValueError):
        common.write_atomically(path, fail)
    assert torch.load(path, weights_only=True) == {"step": 1} and list(tmp_path.iterdir()) == [path]
    for target in (tmp_path / "nowhere" / "a", path / "a"):
        with pytest.raises(InputError, match="cannot be written"):
            common.write_atomically(target, lambda file: None)


def test_full_disk_leaves_the_old_file(tmp_path):
    """A limit on the size of files fails within a write, as a full disk does."""
    path = tmp_path / "last.pt"
    common.write_atomically(path, lambda file: torch.save({"step": 1}, file))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        for save in (lambda file: torch.save(torch.rand(10**6), file), lambda file: file.write(bytes(10**6))):
            with pytest.raises(InputError, match="last.pt: cannot be written"):
                common.write_atomically(path, save)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.load(path, weights_only=True) == {"step": 1} and list(tmp_path.iterdir()) == [path]


# --- The toy product --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return common.make_toy(tmp_path_factory.mktemp("data") / "toy")


def test_toy_layout(toy):
    (category,) = common.find_categories(toy)
    assert len(category.train) == 100 and all(category.has_truth)
    assert {name: category.defects.count(name) for name in set(category.defects)} == {
        "good": 20, "scratch": 12, "stain": 12, "missing": 12,
    }
    assert sum(mask is not None for mask in category.masks) == 36 and list(toy.parent.iterdir()) == [toy]
    with Image.open(category.train[0]) as image:
        assert image.size == (256, 256) and image.mode == "RGB" and image.format == "PNG"


def test_toy_masks_are_where_the_defect_shows(toy):
    """The same draws without the defect: in the mask the pictures differ by more than 8, elsewhere by no more."""
    (category,) = common.find_categories(toy)
    for path, mask, defect in zip(category.test, category.masks, category.defects):
        if mask is None or int(path.stem) % 3:
            continue
        seed = (0, *f"test/{defect}".encode(), int(path.stem))
        normal, nothing = common._toy_image("good", np.random.default_rng(seed))
        picture = common.read_image(path, 256).permute(1, 2, 0).numpy()
        truth = common.read_mask(mask, 256)[0].numpy()
        change = abs(picture.astype(int) - normal)
        assert np.array_equal(truth, change.max(2) > 8) and not nothing.any()
        assert 150 < truth.sum() < 3000
        assert common.read_mask(mask, 64).sum() >= 8  # still there at the size of a quick training


def test_toy_depends_on_its_seed_alone(toy, tmp_path):
    for part, index in (("train/good", 99), ("test/scratch", 3), ("test/missing", 11)):
        seeds = [np.random.default_rng((seed, *part.encode(), index)) for seed in (0, 0, 1)]
        draw = [common._toy_image(Path(part).name, seed)[0] for seed in seeds]
        with Image.open(toy / part / f"{index:03d}.png") as image:
            assert np.array_equal(draw[0], np.asarray(image))
        assert np.array_equal(draw[0], draw[1]) and not np.array_equal(draw[0], draw[2])


def test_toy_is_whole_or_not_there(toy, tmp_path, monkeypatch):
    before = (toy / "train/good/000.png").stat().st_mtime_ns
    assert common.make_toy(toy, seed=5) == toy and (toy / "train/good/000.png").stat().st_mtime_ns == before
    calls = iter(range(3))
    monkeypatch.setattr(common, "_toy_image", lambda *_: next(calls) and (RGB, ALPHA > 0))
    with pytest.raises(Exception):
        common.make_toy(tmp_path / "toy")
    assert list(tmp_path.iterdir()) == []
    write_images(tmp_path / "mine", 2)
    with pytest.raises(InputError, match="mine"):
        common.make_toy(tmp_path / "mine")


def test_resizing_blends_four_neighbours(tmp_path):
    """OpenCV's rule in a closed form: output pixel o looks at (o + 0.5) * scale - 0.5, clamped to the picture."""
    pixels = np.random.RandomState(0).randint(0, 256, (37, 50, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for size in (16, 64):
        expected = pixels.astype(np.float64)
        for axis, length in ((0, 37), (1, 50)):
            at = ((np.arange(size) + 0.5) * length / size - 0.5).clip(0, length - 1)
            low = np.floor(at).astype(int).clip(0, length - 2)
            weight = (at - low).reshape(-1, 1, 1) if axis == 0 else (at - low).reshape(1, -1, 1)
            expected = expected.take(low, axis) * (1 - weight) + expected.take(low + 1, axis) * weight
        found = common.read_image(tmp_path / "a.png", size).permute(1, 2, 0).numpy()
        assert abs(found - expected).max() <= 1
