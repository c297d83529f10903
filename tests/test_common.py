"""Tests of common.py. The oracles share none of its code: for images, the pixels written, in numpy; for the resize,
four-neighbour weights and a dense triangle filter; for masks, counts of pixels; for data sets, folders laid out by
hand; for metrics, loops over pairs and thresholds; for regions, a flood fill; for pictures, closed forms; for the toy
product, drawings without noise or defect."""
import io
import math
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")  # pytest resets common's own filter
rng = np.random.default_rng(0)
RGB = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
GREY = rng.integers(0, 256, (16, 16), dtype=np.uint8)
DEEP = rng.integers(0, 65536, (16, 16), dtype=np.uint16)
ALPHA = rng.integers(128, 256, (16, 16), dtype=np.uint8)
SMOOTH = np.dstack((*np.mgrid[60:220:10, 40:200:10], np.full((16, 16), 128))).astype(np.uint8)
BLOCKS = np.uint8([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]]).repeat(8, 0).repeat(8, 1)


def refusal(call, *arguments, **options) -> str:
    """The one-line message of the ValueError that the call raises."""
    with pytest.raises(ValueError) as caught:
        call(*arguments, **options)
    assert caught.type is ValueError and len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# --- Reading images ---------------------------------------------------------------------------------------------------


def grey(array):
    return np.stack([array] * 3, axis=-1)


def saved(image, suffix=".png", **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.ascontiguousarray(image))
    return lambda path: image.save(path, **options), suffix


def bands(mode, *arrays):
    return Image.frombytes(mode, (16, 16), np.dstack(arrays).astype(np.uint8).tobytes())


def palette_image(**info):
    image = bands("P", GREY // 64)
    image.putpalette([10, 20, 30, 200, 100, 0, 7, 77, 177, 250, 251, 252])
    image.info.update(info)
    return image


def turned(orientation, array):
    """Stored pixels as a viewer shows them, by the EXIF standard's table of row 0 and column 0."""
    transposed = array.swapaxes(0, 1)
    return {1: array, 2: array[:, ::-1], 3: array[::-1, ::-1], 4: array[::-1], 5: transposed, 6: np.rot90(array, -1),
            7: transposed[::-1, ::-1], 8: np.rot90(array)}.get(orientation, array)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return {"exif": tags}


def pgm(maximum, values):
    return lambda path: path.write_bytes(b"P5 16 16 %d\n" % maximum + values.astype(">u2").tobytes()), ".pgm"


PALETTE = np.uint8([[10, 20, 30], [200, 100, 0], [7, 77, 177], [250, 251, 252]])[GREY // 64]
MORE = {"save_all": True, "append_images": [Image.fromarray(255 - BLOCKS)]}
BEST = {"quality": 100, "subsampling": 0}
FROM_DEEP = grey(np.rint(DEEP / 257))
CMYK = 255 - np.dstack((RGB, ALPHA)).astype(float)

# name: (writer, suffix), expected pixels, tolerance in levels
GOOD = {
    "1": (saved(GREY > 127), grey((GREY > 127) * 255), 0),
    "L bmp": (saved(GREY, ".BMP"), grey(GREY), 0),
    "LA": (saved(bands("LA", GREY, ALPHA)), grey(GREY), 0),
    "P": (saved(palette_image()), PALETTE, 0),
    "P gif": (saved(palette_image(), ".GIF"), PALETTE, 0),
    "P transparent index": (saved(palette_image(), transparency=2), PALETTE, 0),
    "P transparent bytes": (saved(palette_image(), transparency=b"\x00\x80\xff\x10"), PALETTE, 0),
    "RGB": (saved(RGB), RGB, 0),
    "RGB lzw tiff": (saved(RGB, ".Tiff", compression="tiff_lzw"), RGB, 0),
    "RGB ppm": (saved(RGB, ".ppm"), RGB, 0),
    "RGB webp": (saved(RGB, ".webp", lossless=True), RGB, 0),
    "RGB jpeg": (saved(SMOOTH, ".JPG", **BEST), SMOOTH, 3),
    "L jpeg": (saved(SMOOTH[..., 0], ".jpeg", quality=100), grey(SMOOTH[..., 0]), 2),
    "RGB jpeg named png": (saved(SMOOTH, format="JPEG", **BEST), SMOOTH, 3),
    "animated png": (saved(BLOCKS, **MORE), BLOCKS, 0),
    "animated gif": (saved(BLOCKS, ".gif", **MORE), BLOCKS, 0),
    "two-page tiff": (saved(BLOCKS, ".tif", **MORE), BLOCKS, 0),
    "RGBA": (saved(np.dstack((RGB, ALPHA))), RGB, 0),
    "CMYK tiff": (saved(bands("CMYK", RGB, ALPHA), ".tif"), CMYK[..., :3] * CMYK[..., 3:] / 255, 1),
    "CMYK jpeg": (saved(Image.new("CMYK", (16, 16), (200, 20, 80, 40)), ".jpg", quality=100),
                  np.full((16, 16, 3), np.array((55, 235, 175)) * 215 / 255), 2),
    "I;16": (saved(DEEP), FROM_DEEP, 0),
    "I;16B tiff": (saved(DEEP.astype(">u2"), ".tif"), FROM_DEEP, 0),
    "16-bit pgm": (pgm(65535, DEEP), FROM_DEEP, 0),
    "12-bit pgm": (pgm(4095, DEEP >> 4), grey(np.rint((DEEP >> 4) * (255 / 4095))), 1),
    "I;16 turned": (saved(DEEP, ".tif", **exif(6)), np.rot90(FROM_DEEP, -1), 0),
    **{f"EXIF {i}": (saved(RGB, **exif(i)), turned(i, RGB), 0) for i in (*range(1, 9), 99)},
    "EXIF 6 tiff": (saved(RGB, ".tif", **exif(6)), turned(6, RGB), 0),
    "EXIF 6 webp": (saved(RGB, ".webp", lossless=True, **exif(6)), turned(6, RGB), 0),
    "EXIF 8 jpeg": (saved(SMOOTH, ".jpg", **exif(8), **BEST), turned(8, SMOOTH), 3),
}


def check(tensor, expected, tolerance):
    assert tensor.dtype == torch.uint8 and tensor.shape == (3, 16, 16)
    off = abs(tensor.permute(1, 2, 0).numpy().astype(float) - expected).max()
    assert off <= tolerance + 0.5 * bool(tolerance), off


@pytest.mark.parametrize("name", GOOD)
def test_a_file_and_what_pillow_opens_of_it(name, tmp_path):
    (write, suffix), expected, tolerance = GOOD[name]
    path = tmp_path / ("image" + suffix)
    write(path)
    assert common.list_images(tmp_path) == [path]
    check(common.read_image(str(path), 16), expected, tolerance)
    with Image.open(path) as image:
        check(common.read_image(image, 16), expected, tolerance)


def test_arrays_and_modes_that_no_file_has():
    for array, expected in ((GREY, grey(GREY)), (RGB, RGB), (RGB[::-1, ::-1], RGB[::-1, ::-1]), (DEEP, FROM_DEEP),
                            (GREY > 127, grey((GREY > 127) * 255)), (np.dstack((RGB, ALPHA)), RGB)):
        before = array.copy()
        check(common.read_image(array, 16), expected, 0)
        assert np.array_equal(array, before)
    for array in (RGB / 255, GREY.astype(np.float32), GREY.astype(np.int64), np.zeros((3, 8, 9), np.uint8)):
        assert refusal(common.read_image, array, 16).startswith("ndarray: cannot be read as an image: ")
    multiplied = RGB.astype(int) * ALPHA[..., None] // 255
    restored = multiplied * 255 / ALPHA[..., None]
    check(common.read_image(bands("RGBa", multiplied, ALPHA), 16), restored, 2)
    check(common.read_image(bands("La", multiplied[..., 0], ALPHA), 16), grey(restored[..., 0]), 2)


def four_neighbours(inputs, outputs):
    """(outputs, inputs): row o weighs the two input pixels beside (o + 0.5) * inputs / outputs - 0.5, clamped."""
    at = np.clip((np.arange(outputs) + 0.5) * inputs / outputs - 0.5, 0, inputs - 1)
    return np.maximum(0, 1 - abs(at[:, None] - np.arange(inputs)))


def triangle(inputs, outputs):
    """(outputs, inputs): row o is a triangle about output pixel o, of half-width max(scale, 1) and sum 1."""
    scale = inputs / outputs
    distance = (np.arange(inputs) + 0.5)[None] - (np.arange(outputs)[:, None] + 0.5) * scale
    weight = np.maximum(0, 1 - abs(distance) / max(scale, 1))
    return weight / weight.sum(1, keepdims=True)


@pytest.mark.parametrize("options, weights", [({}, four_neighbours), ({"antialias": True}, triangle)])
@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (5, 7), (16, 16), (17, 31), (48, 80), (130, 100)])
def test_resize(shape, options, weights):
    array = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    rows, columns = weights(shape[0], 16), weights(shape[1], 16)
    expected = np.einsum("oh,hwc,pw->opc", rows, array.astype(float), columns)
    check(common.read_image(array, 16, **options), expected, 0 if shape == (16, 16) else 1)


@pytest.mark.parametrize("bits, value, expected", [
    (16, 128, 0), (16, 129, 1), (16, 65535, 255), (16, 4095, 16), (12, 0, 0), (12, 2048, 128), (12, 4095, 255),
    (12, 4096, 255), (12, 65535, 255), (10, 512, 128), (10, 1023, 255), (14, 8191, 127), (14, 16383, 255)])
def test_bits(bits, value, expected, tmp_path):
    Image.fromarray(np.full((4, 4), value, np.uint16)).save(tmp_path / "deep.png")
    assert common.read_image(tmp_path / "deep.png", 4, bits=bits).unique().tolist() == [expected]
    assert common.read_image(np.full((4, 4), 77, np.uint8), 4, bits=bits).unique().tolist() == [77]  # 8-bit stays as is


def test_pictures_of_up_to_two_to_the_thirty_pixels_are_opened(tmp_path):
    def header(height):  # a PGM file without its pixels
        return b"P5 32768 %d 255\n" % height

    with Image.open(io.BytesIO(header(2 ** 15))) as image:
        assert image.size == (2 ** 15, 2 ** 15)
    (tmp_path / "scan.pgm").write_bytes(header(2 ** 15 + 1))
    assert str(2 ** 30 + 2 ** 15) in refusal(common.read_image, tmp_path / "scan.pgm", 16)


BAD = {  # name: writer, reason in the message
    "empty.png": (lambda path: path.write_bytes(b""), "cannot identify"),
    "PostScript.png": (lambda path: Image.fromarray(RGB).save(path, "EPS"), "cannot identify"),
    "signature.png": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), ""),
    "folder.png": (lambda path: path.mkdir(), "folder"),
    "pipe.png": (lambda path: os.mkfifo(path), "device"),
    "dangling.png": (lambda path: path.symlink_to("nowhere.png"), "No such file"),
    "loop.png": (lambda path: path.symlink_to(path), "symbolic links"),
    "missing.png": (lambda path: None, "No such file"),
    "I.tif": (lambda path: Image.fromarray(DEEP.astype(np.int32)).save(path), "mode I has no known range"),
    "F.tif": (lambda path: Image.fromarray(DEEP.astype(np.float32)).save(path), "mode F has no known range"),
    "LAB.tif": (lambda path: Image.new("LAB", (16, 16)).save(path), "mode LAB has no known range"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_image(name, tmp_path):
    path, (write, reason) = tmp_path / name, BAD[name]
    write(path)
    line = refusal(common.read_image, path, 16)
    assert line.startswith(f"{path}: cannot be read as an image: ") and reason in line and "Error" not in line
    if path.suffix != ".tif":  # a mask is refused in the same words
        assert refusal(common.read_mask, path, 16, path) == line


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif", ".gif", ".webp", ".ppm"])
def test_a_truncated_file_is_refused_or_whole(suffix, tmp_path):
    path = tmp_path / f"image{suffix}"
    Image.fromarray(SMOOTH if suffix == ".jpg" else BLOCKS if suffix == ".gif" else RGB).save(path)
    whole, data, refused = common.read_image(path, 16), path.read_bytes(), 0
    for tenth in range(10):
        path.write_bytes(data[:len(data) * tenth // 10])
        try:
            assert torch.equal(common.read_image(path, 16), whole)  # no pixel was lost
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused >= 8


# --- Masks ------------------------------------------------------------------------------------------------------------

SPOT = np.zeros((16, 16), np.uint8)
SPOT[1:6, 2] = 1
WHITE_FIRST = bands("P", 1 - SPOT)
WHITE_FIRST.putpalette([255, 255, 255, 0, 0, 0])
MASKS = {
    "1.png": SPOT > 0, "1.bmp": SPOT, "255.gif": SPOT * 255, "LA.png": bands("LA", SPOT, ALPHA), "P.png": WHITE_FIRST,
    "blue.png": grey(SPOT) * np.uint8([0, 0, 1]), "RGBA.png": np.dstack((grey(SPOT), ALPHA)),
    "I;16.png": SPOT * np.uint16(256), "I.tif": SPOT * np.int32(256), "F.tif": SPOT * np.float32(0.5)}


def mask_of(folder, mask, size, shape=None, name="mask.png", **options):
    """read_mask's result for a mask saved to a file and a photo of `shape`, by default the mask's."""
    saved(mask, **options)[0](folder / name)
    Image.new("L", (shape or np.shape(mask)[:2])[::-1]).save(folder / "photo.png")
    return common.read_mask(folder / name, size, folder / "photo.png")


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_what_is_not_black(name, tmp_path):
    mask, remark = mask_of(tmp_path, MASKS[name], 16, (16, 16), name)
    assert mask.dtype == torch.bool and np.array_equal(mask, SPOT) and remark == ""


@pytest.mark.parametrize("ratio", [1, 2, 3, 5, 6, 7])
def test_a_pixel_of_a_mask_is_anomalous_where_more_than_half_of_its_area_is(ratio, tmp_path):
    array = rng.random((8 * ratio, 8 * ratio)) < 0.45
    array[:ratio, :ratio] = np.arange(ratio * ratio).reshape(ratio, ratio) % 2  # exactly half if the ratio is even
    counts = array.reshape(8, ratio, 8, ratio).sum((1, 3))
    assert np.array_equal(mask_of(tmp_path, array, 8)[0], 2 * counts > ratio * ratio)


def test_an_empty_mask_says_where_it_is_empty(tmp_path):
    thin = np.zeros((1024, 1024), np.uint8)
    mask, remark = mask_of(tmp_path, thin, 256)
    assert mask is None and "empty" in remark and "file" in remark
    thin[:, 400:402] = 255
    mask, remark = mask_of(tmp_path, thin, 256)
    assert mask is None and "empty" in remark and "256 x 256" in remark and "file" not in remark
    thin[:, 402] = 255
    mask, remark = mask_of(tmp_path, thin, 256)
    assert mask.sum() == 256 and mask[:, 100].all() and remark == ""


@pytest.mark.parametrize("name", ["mask.jpg", "mask.png"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_mask_is_what_is_lighter_than_half(channels, name, tmp_path):
    row, column = np.mgrid[:128, :128]
    disc = (row - 60) ** 2 + (column - 70) ** 2 < 400
    array = np.dstack([disc * np.uint8(255)] * channels).squeeze()
    mask, remark = mask_of(tmp_path, array, 128, name=name, format="JPEG", quality=50)
    with Image.open(tmp_path / name) as image:
        assert np.count_nonzero(np.asarray(image.convert("L"))) > 1.1 * disc.sum()  # a JPEG rings at an edge
    assert (mask.numpy() != disc).sum() < 0.01 * disc.sum() and remark == ""
    levels = np.uint8([[127, 128]]).repeat(8, 1).repeat(16, 0)
    for options, expected in (({"format": "JPEG", "quality": 100}, [False, True]), ({"format": "PNG"}, [True, True])):
        mask, _ = mask_of(tmp_path, levels, 16, name=name, **options)
        assert mask[:, [0, 15]].unique(dim=0).tolist() == [expected]


@pytest.mark.parametrize("height, width, photo, covered, word", [
    (100, 100, (100, 100), 0.5, ""), (100, 100, (100, 100), 0.51, "covers most"), (50, 25, (100, 50), 0.2, ""),
    (99, 100, (100, 100), 0.2, ""), (100, 99, (100, 100), 0.2, ""), (97, 100, (100, 100), 0.2, "aspect"),
    (100, 97, (100, 100), 0.2, "aspect"), (100, 100, (100, 200), 0.2, "aspect")])
def test_an_odd_mask_is_used_and_remarked_on(height, width, photo, covered, word, tmp_path):
    mask, remark = mask_of(tmp_path, np.arange(height)[:, None].repeat(width, 1) < height * covered, 100, photo)
    assert abs(mask.float().mean() - covered) < 0.02 and word in remark and bool(word) == bool(remark)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize("orientation", [*range(1, 9), 99])
def test_a_mask_is_turned_with_its_photo(orientation, suffix, tmp_path):
    """A mask of the photo's stored size is turned with the photo. A mask of its shown size is not."""
    raw = np.zeros((8, 24), bool)
    raw[:4, :12] = True
    shown = turned(orientation, raw) if orientation in (5, 6, 7, 8) else raw
    expected = shown.repeat(24 // shown.shape[0], 0).repeat(24 // shown.shape[1], 1)
    path, photo = tmp_path / "mask.png", tmp_path / f"photo{suffix}"
    Image.new("RGB", (24, 8)).save(photo, **exif(orientation))
    for array, options in ((raw, {}), (shown, {}), (raw, exif(orientation if shown is not raw else 1))):
        Image.fromarray(np.ascontiguousarray(array)).save(path, **options)
        mask, remark = common.read_mask(path, 24, photo)
        assert np.array_equal(mask, expected) and remark == ""


# --- Reading by threads -----------------------------------------------------------------------------------------------


def test_read_ahead_reads_a_group_while_the_caller_has_the_one_before(monkeypatch):
    monkeypatch.setattr(common, "THREADS", 2)
    taken, together, second = [], threading.Barrier(2), threading.Event()

    def groups():
        for group in ([1, 2], [3], [], [4]):
            taken.append(group)
            yield group

    def read(item):
        if item < 3:
            together.wait(20)  # two threads read at once
        else:
            second.set()
        return 10 * item

    results = common.read_ahead(read, groups())
    assert next(results) == [10, 20] and second.wait(20) and taken == [[1, 2], [3]]
    assert list(results) == [[30], [], [40]]


def write_images(folder, values, dtype=np.uint8):
    for index, value in enumerate(values):
        Image.fromarray(np.full((10, 20), value, dtype)).save(folder / f"{index:03d}.png")
    return sorted(folder.iterdir())


def test_training_batches(tmp_path, capsys):
    paths = write_images(tmp_path, range(7))
    batches = list(common.training_batches(paths[::-1], 3, 8))
    assert [batch.shape for batch in batches] == [(3, 3, 8, 8), (3, 3, 8, 8), (1, 3, 8, 8)]
    assert torch.cat(batches)[:, 2, 7, 0].tolist() == [6, 5, 4, 3, 2, 1, 0] and capsys.readouterr().err == ""
    Image.fromarray(RGB).save(paths[0])
    for options in ({}, {"antialias": True}):
        (image,), *_ = common.training_batches(paths[:1], 1, 5, **options)
        assert torch.equal(image, common.read_image(RGB, 5, **options))
    for bad in (2, 5):
        paths[bad].write_bytes(b"")
    assert "002.png" in refusal(list, common.training_batches(paths, 3, 8))


@pytest.mark.parametrize("peak, depth", [(0, 10), (1023, 10), (1024, 12), (4095, 12), (4096, 14), (16383, 14),
                                         (16384, None), (65535, None)])
def test_a_camera_of_few_bits_is_warned_of(peak, depth, tmp_path, capsys):
    paths = write_images(tmp_path, [0, peak, 0], np.uint16)
    Image.fromarray(np.full((10, 20), 255, np.uint8)).save(tmp_path / "white.png")
    list(common.training_batches([*paths, tmp_path / "white.png"], 2, 8))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(depth)
    if depth:
        assert str(tmp_path) in lines[0] and "all 3 16-bit" in lines[0] and f"--bits {depth}" in lines[0]
    images = torch.cat(list(common.training_batches(paths, 2, 8, bits=12)))
    assert images.amax() == min(255, round(peak / 4095 * 255)) and capsys.readouterr().err == ""  # bits was given


# --- Data sets --------------------------------------------------------------------------------------------------------


def lay_out(folder, *names, links=()):
    """Creates empty files below the folder, and links, a dict from name to target. Returns the folder."""
    for name in (*names, *dict(links)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name in names:
            (folder / name).touch()
        else:
            (folder / name).symlink_to(folder / dict(links)[name])
    return folder


def test_list_images(tmp_path, capsys):
    lay_out(tmp_path, "b.PNG", "a/c.JpG", "a/.hidden.png", ".git/d.png", "._b.png", ".DS_Store", "z.tiff", "README",
            "a/Thumbs.db", "notes.txt", "more.TXT", "x.png/.keep")
    assert common.list_images(tmp_path) == [tmp_path / name for name in ("a/c.JpG", "b.PNG", "z.tiff")]
    (line,) = capsys.readouterr().err.splitlines()
    assert all(words in line for words in (str(tmp_path), "4 files", "2 .txt", "1 .db", "1 README"))
    assert common.list_images(str(tmp_path / "notes.txt")) == [tmp_path / "notes.txt"]
    for path, words in ((tmp_path / "x.png", "no images"), (tmp_path / "nowhere", "no such"), ("x" * 300, "no such")):
        assert words in refusal(common.list_images, path) and str(path) in refusal(common.list_images, path)


def test_links_are_followed_once(tmp_path):
    lay_out(tmp_path, "top/b.png", "top/a/c.png", links={
        "top/a/back": "top", "top/itself": "top/itself", "top/gone": "nowhere", "far/in": "top/a"})
    assert common.list_images(tmp_path / "top") == [tmp_path / "top" / name for name in ("a/c.png", "b.png")]
    assert common.list_images(tmp_path / "far") == [tmp_path / "far/in" / name for name in ("back/b.png", "c.png")]
    lay_out(tmp_path, links={"top/lost.png": "nowhere.png"})
    assert tmp_path / "top/lost.png" in common.list_images(tmp_path / "top")  # the error comes when it is read


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    def scandir(path, real=os.scandir):
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    lay_out(tmp_path, "a.png", "locked/b.png")
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="locked"):
        common.list_images(tmp_path)


LAYOUTS = {  # data set as downloaded: files, words in the refusal
    "OK, NG": (["OK/0.png", "NG/0.png"], ["OK", "NG"]),
    "good, bad": (["good/0.png", "bad/1.png"], ["good", "bad"]),
    "normal, abnormal, mask": (["normal/0.png", "abnormal/1.png", "mask/1.png"], ["normal", "abnormal", "mask"]),
    "VisA": (["Data/Images/Normal/0.JPG", "Data/Images/Anomaly/0.JPG", "Data/Masks/Anomaly/0.png"],
             ["Data/Images/Normal", "Data/Images/Anomaly", "Data/Masks/Anomaly"]),
    "KolektorSDD": (["kos01/Part0.jpg", "kos01/Part0_label.bmp", "kos02/Part0.jpg"], ["kos01", "kos02"]),
    "KolektorSDD, one": (["Part0.jpg", "Part0_label.bmp"], ["Part0.jpg", "Part0_label.bmp"]),
    "KolektorSDD2": (["train/10000.png", "train/10000_GT.png", "test/20000.png"], ["10000.png", "train/10000_GT.png"]),
    "DAGM": (["Train/0576.PNG", "Train/Label/0576_label.PNG", "Test/0001.PNG"], ["Train", "Label"]),
    "magnetic tile": (["MT_Break/Imgs/a.jpg", "MT_Break/Imgs/a.png", "MT_Free/Imgs/b.jpg"], ["MT_Break/Imgs"]),
    "magnetic tile, one": (["exp1.jpg", "exp1.png"], ["exp1.jpg", "exp1.png"]),
    "gt": (["a.png", "A_gt.png"], ["a.png", "A_gt.png"]),
    "mask": (["train/good/a.png", "train/good/a_MASK.jpg"], ["a.png", "a_MASK.jpg"]),
    "MVTec without train": (["test/cut/0.png", "test/good/1.png"], ["test/cut", "test/good"]),
    "two levels above": (["mvtec/cap/train/good/0.png", "mvtec/cap/test/cut/0.png"], ["mvtec/cap/test/cut"]),
    "one of two": (["a/train/0.png", "b/train/good/0.png", "b/train/good/0.bmp"], ["b/train/good/0.png", "0.bmp"])}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_whose_defects_would_be_learned_is_refused(name, tmp_path):
    files, words = LAYOUTS[name]
    line = refusal(common.find_categories, lay_out(tmp_path, *files))
    assert all(word in line for word in (str(tmp_path), *words, "train/good", "test/DEFECT", "links"))


def test_a_plain_folder(tmp_path, monkeypatch):
    names = ["a.png", "a2.png", "a_b.png", "a_masked.png", "ab.png", "gt.png", "label.png", "mask_a.png"]
    monkeypatch.chdir(lay_out(tmp_path, *names, ".a_mask.png", "notes.txt"))
    for folder in (tmp_path, "."):
        (category,) = common.find_categories(folder)
        assert category.name == tmp_path.name and category.test == []
        assert [path.name for path in category.train] == names


@pytest.mark.parametrize("train, test, truth, good", [
    ("train/good", "test", "ground_truth", "good"), ("Train/Good", "Test", "Ground_Truth", "Good"),
    ("TRAIN/OK", "TEST", "GROUND_TRUTH", "OK"), ("train/normal", "test", "ground_truth", "Normal"),
    ("train", "test", "groundtruth", "ok"), ("train", "test", "Masks", "good")])
def test_mvtec_layout_in_any_case(train, test, truth, good, tmp_path, capsys):
    cap = lay_out(tmp_path / "cap", f"{train}/000.png", f"{train}/001.png", f"{test}/{good}/000.png",
                  f"{test}/{good}/001.png", f"{test}/cut/000.png", f"{test}/cut/001.png", f"{test}/A dent/000.png",
                  f"{truth}/cut/000_mask.png", f"{truth}/a dent/000_mask.png", f"{truth}/{good}/000_mask.png",
                  f"{test}/.DS_Store", f"{test}/cut/._000.png")
    (category,) = common.find_categories(str(cap))
    assert category.name == "cap" and category.train == [cap / train / "000.png", cap / train / "001.png"]
    found = {item.path.relative_to(cap / test).as_posix(): (item.defect, item.mask) for item in category.test}
    assert found == {"A dent/000.png": ("A dent", cap / truth / "a dent/000_mask.png"),
                     "cut/000.png": ("cut", cap / truth / "cut/000_mask.png"), "cut/001.png": ("cut", None),
                     f"{good}/000.png": ("good", None), f"{good}/001.png": ("good", None)}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("mask", ["000.png", "000_mask.png", "000_Mask.JPG", "000_GT.bmp", "000_gt.tiff",
                                  "000_LABEL.gif", "000_label.webp"])
def test_a_mask_is_found_by_every_suffix(mask, tmp_path, capsys):
    """Images of one stem share a mask. Subfolders and defects are told apart."""
    lay_out(tmp_path, "train/0.png", "test/cut/000.JPEG", "test/cut/000.png", "test/cut/a/000.png", "test/dent/000.png",
            f"ground_truth/cut/{mask}", f"ground_truth/cut/a/{mask}")
    (category,) = common.find_categories(tmp_path)
    truth = tmp_path / "ground_truth/cut"
    assert [item.mask for item in category.test] == [truth / mask, truth / mask, truth / "a" / mask, None]
    assert [item.defect for item in category.test] == ["cut", "cut", "cut", "dent"] and capsys.readouterr().err == ""


def test_masks_that_fit_no_image_are_named(tmp_path, capsys):
    lost = ["000_mask.png", "cut/000_mask2.png", "cut/00_mask.png", "dent/000_mask.png"]
    lay_out(tmp_path, "train/0.png", "test/cut/000.png", "ground_truth/cut/000_mask.png")
    lay_out(tmp_path / "ground_truth", *lost)
    (category,) = common.find_categories(tmp_path)
    assert [item.mask for item in category.test] == [tmp_path / "ground_truth/cut/000_mask.png"]
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'ground_truth'}: 4 masks" in line and all(name in line for name in lost)


def test_a_layout_of_links_has_the_links_names(tmp_path):
    lay_out(tmp_path, "disk/OK/0.png", "disk/NG/1.png", "disk/masks/1.bmp", links={
        "cap/train/good": "disk/OK", "cap/test/good": "disk/OK", "cap/test/cut": "disk/NG",
        "cap/ground_truth/cut": "disk/masks", "set/bolt": "cap"})
    bolt = tmp_path / "set/bolt"
    assert common.find_categories(tmp_path / "set") == [("bolt", [bolt / "train/good/0.png"], [
        (bolt / "test/cut/1.png", Path("cut/1.png"), "cut", bolt / "ground_truth/cut/1.bmp"),
        (bolt / "test/good/0.png", Path("good/0.png"), "good", None)])]


def test_categories_below_for_training_and_for_evaluation(tmp_path):
    lay_out(tmp_path, "license.txt", "empty/x.txt", ".trash/train/0.png", "cap/train/good/0.png", "cap/test/cut/1.png",
            "bolt/train/0.png", "bolt/train/1.jpg")
    found = [(each.name, len(each.train), len(each.test)) for each in common.find_categories(tmp_path)]
    assert found == [("bolt", 2, 0), ("cap", 1, 1)]
    lay_out(tmp_path, "cap/train/good/0_gt.png", "nut/test/ok/2.png")  # evaluation ignores train/
    found = [(each.name, each.train, len(each.test)) for each in common.find_categories(tmp_path, training=False)]
    assert found == [("cap", [], 1), ("nut", [], 1)]
    assert common.find_categories(tmp_path / "nut", training=False)[0].name == "nut"
    assert "test/DEFECT" in refusal(common.find_categories, tmp_path / "bolt", training=False)


@pytest.mark.parametrize("files, name, words", [
    (["train/0.png", "test/0.png"], "", "test/0.png: is it normal or not?"), (["notes.txt"], "", "holds no images"),
    (["train/good/x.txt"], "", "train/good: holds no images"), (["file.txt"], "file.txt", "is not a folder"),
    (["train/0.png", "test/x.txt"], "", "test: holds no images"), ([], "nowhere", "no such folder")])
def test_what_is_missing_is_named(files, name, words, tmp_path):
    line = refusal(common.find_categories, lay_out(tmp_path, *files) / name)
    assert line.startswith(str(tmp_path / name)) and words in line


# --- Metrics ----------------------------------------------------------------------------------------------------------


def thresholds(scores, labels):
    """(score, recall, precision) with each distinct score as threshold, from the highest down."""
    for threshold in sorted(set(scores.tolist()), reverse=True):
        called = scores >= threshold
        yield threshold, (called & labels).sum() / labels.sum(), (called & labels).sum() / called.sum()


def area_per_region(scores, regions, limit):
    """AUPRO: the mean recall of the regions over the false positive rate, by trapezoids up to `limit`, over `limit`."""
    points, numbers = [(0.0, 0.0)], set(regions.tolist()) - {0}
    for threshold in sorted(set(scores.tolist()), reverse=True):
        called = scores >= threshold
        points.append((called[regions == 0].mean(), np.mean([called[regions == number].mean() for number in numbers])))
    area = 0.0
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 < limit and x1 > x0:
            end = min(x1, limit)
            area += (end - x0) * (y0 + y0 + (y1 - y0) * (end - x0) / (x1 - x0)) / 2
    return area / limit


@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_ranking_metrics(levels, share):
    """The samples have ties, negative scores, 0.0 and -0.0, and gaps in the region numbers."""
    for count in (2, 3, 40, 150):
        scores, labels = np.float32(rng.integers(0, levels, count) / levels - 0.4), rng.random(count) < share
        scores[scores == 0] *= rng.choice((1, -1))
        labels[:2] = True, False
        regions = labels * rng.integers(1, 9, count)
        found = common.ranking_metrics(scores, regions)
        assert found.keys() == {"auroc", "ap", "f1", "threshold", "aupro"} and {*map(type, found.values())} == {float}
        points = list(thresholds(scores, labels))
        recalls = [0, *(recall for _, recall, _ in points)]
        f1 = {t: 2 * recall * precision / (recall + precision) for t, recall, precision in points if recall}
        pairs = [(a > b) + (a == b) / 2 for a in scores[labels] for b in scores[~labels]]
        expected = {"auroc": sum(pairs) / len(pairs), "ap": sum(np.diff(recalls) * [p for *_, p in points]),
                    "f1": max(f1.values()), "aupro": area_per_region(scores, regions, 0.3)}
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)
        assert f1[found["threshold"]] == pytest.approx(max(f1.values()), abs=1e-12)
        for limit in (0.05, 0.5, 1.0):
            expected = pytest.approx(area_per_region(scores, regions, limit), abs=1e-12)
            assert common.ranking_metrics(scores, regions, limit)["aupro"] == expected


def test_aupro_where_the_rate_is_at_the_limit():
    """Three of ten normal samples score above the region, so recall rises at a rate of exactly 0.3."""
    scores, regions = np.float32([9] * 3 + [8] * 4 + [1] * 7), np.array([0] * 3 + [1] * 4 + [0] * 7)
    assert common.ranking_metrics(scores, regions, 0.3)["aupro"] == 0
    assert common.ranking_metrics(scores, regions, 0.6)["aupro"] == pytest.approx(0.5)


def test_perfect_is_exactly_one():
    for count in range(2, 60):
        regions = rng.integers(0, 4, count)
        regions[:2] = 0, 1
        scores = np.float32(rng.random(count) + 2 * (regions > 0))
        found = common.ranking_metrics(scores, regions)
        assert found == {"auroc": 1, "ap": 1, "f1": 1, "aupro": 1, "threshold": scores[regions > 0].min()}


def test_no_metrics():
    for regions in ([0, 0, 0], [1, 2, 1], []):
        assert common.ranking_metrics(np.ones(len(regions), np.float32), np.array(regions, np.int64)) == {}
    assert "NaN" in refusal(common.ranking_metrics, np.float32([1, math.nan, 3]), np.array([0, 1, 0]))


def test_a_million_scores_in_closed_form():
    """One anomalous score is highest, all others tie. positives * negatives is too large for float32 to count."""
    regions = (np.arange(10 ** 6 + 1) % 4 == 0).astype(np.int32)
    scores, positives = np.zeros(len(regions), np.float32), int(regions.sum())
    scores[0] = 1
    found = common.ranking_metrics(scores, regions)
    assert found["auroc"] == pytest.approx((1 + (positives - 1) / 2) / positives, abs=1e-12)
    assert found["ap"] == pytest.approx((1 + (positives - 1) * positives / len(regions)) / positives, abs=1e-12)


def flood_fill(mask):
    labels, count = np.zeros(mask.shape, int), 0
    for start in zip(*np.nonzero(mask)):
        count += labels[start] == 0
        stack = [start] if labels[start] == 0 else []
        while stack:
            y, x = stack.pop()
            if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x] and not labels[y, x]:
                labels[y, x] = count
                stack += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return labels


def test_connected_regions():
    snake = np.zeros((41, 33), bool)
    snake[::2] = True
    snake[1::4, -1] = snake[3::4, 0] = True
    rings, checker = np.indices((41, 33)).max(0) % 2 == 0, np.indices((41, 33)).sum(0) % 2 == 0
    masks = [snake, snake.T, rings, checker, np.ones((1, 1), bool), np.ones((9, 5), bool), np.zeros((5, 5), bool)]
    masks += [rng.random((41, 33)) < density for density in (0.002, 0.1, 0.25, 0.4, 0.6)]
    for mask in masks:
        regions, expected = common.connected_regions(torch.tensor(mask)), flood_fill(mask)
        pairs = set(zip(regions.flatten().tolist(), expected.flatten().tolist())) - {(0, 0)}
        numbers = list(range(1, expected.max() + 1))  # the labels correspond one to one
        assert sorted(ours for ours, _ in pairs) == numbers == sorted(theirs for _, theirs in pairs)


# --- Pictures ---------------------------------------------------------------------------------------------------------


def test_panel():
    image = torch.tensor(RGB).permute(2, 0, 1)
    assert np.array_equal(common.panel(image), RGB) and np.array_equal(common.panel(image / 255), RGB)
    assert np.array_equal(common.panel(torch.tensor(GREY > 127)), grey((GREY > 127) * 255))
    levels = common.panel(torch.tensor([[-1, 0, 0.1, 0.5, 1, 2]]))
    assert levels.dtype == np.uint8 and levels.tolist() == [[[value] * 3 for value in (0, 0, 26, 128, 255, 255)]]


@pytest.mark.parametrize("level, weight", [(0, 0), (-3, 0), (1, 1), (7, 1), (0.25, 0.125)])
def test_overlay(level, weight):
    """The image's colours at 0, red at 1. A map value of 0.25 has weight 0.125."""
    drawn = common.overlay(RGB, torch.full((16, 16), float(level)))
    expected = (1 - weight) * RGB + weight * np.array((255, 20, 0))
    assert drawn.dtype == np.uint8 and abs(drawn - expected).max() <= 0.5001 * (level > 0)


# --- The toy product --------------------------------------------------------------------------------------------------


class Quiet:
    """A generator that makes draw_toy leave out noise and brightness."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.integers = self.rng.integers

    def normal(self, mean, deviation, size=None):
        return np.zeros(size) if size == (256, 256, 3) else self.rng.normal(mean, deviation, size)

    def uniform(self, low, high, size=None):
        return 0.0 if (low, high) == (-5, 5) else self.rng.uniform(low, high, size)


def draw(kind, generator):
    picture, mask = common.draw_toy(kind, generator)
    assert picture.size == mask.size == (256, 256) and picture.mode == "RGB" and {*np.unique(mask)} <= {0, 255}
    return np.asarray(picture).astype(int), np.asarray(mask) > 0


@pytest.mark.parametrize("kind", ["scratch", "stain", "missing"])
def test_the_toys_mask_is_where_its_defect_shows(kind):
    for seed in range(6):
        (normal, nothing), (picture, mask) = draw("good", Quiet(seed)), draw(kind, Quiet(seed))
        change = abs(picture - normal).max(2)
        assert not nothing.any() and 150 < mask.sum() < 3500 and np.median(change[mask]) > 70
        assert (change[mask] > 8).mean() > 0.95 and change[~mask].max() < 80  # edges are soft
        assert (change[~mask] > 8).sum() < (0.5 if kind == "stain" else 0.1) * mask.sum()
    noise = draw(kind, np.random.default_rng(5))[0] - picture
    assert 1.9 < noise.std() < 2.1 and abs(noise.mean()) < 5.2


@pytest.fixture
def small_toy(monkeypatch):
    assert common.TOY == {"train/good": 100, "test/good": 20, "test/scratch": 12, "test/stain": 12, "test/missing": 12}
    monkeypatch.setattr(common, "TOY", {part: 2 for part in common.TOY})


def test_make_toy(small_toy, tmp_path, capsys):
    folder = common.make_toy(str(tmp_path / "data/toy"))
    assert folder == tmp_path / "data/toy" and list(folder.parent.iterdir()) == [folder]
    (category,) = common.find_categories(folder)
    assert [item.defect for item in category.test[::2]] == ["good", "missing", "scratch", "stain"]
    assert len(category.train) == 2 and len(list(folder.rglob("*.*"))) == 16 and capsys.readouterr().err == ""
    for path, _, defect, mask in [*category.test, (category.train[1], None, "good", None)]:
        part = path.parent.relative_to(folder).as_posix()
        picture, truth = draw(defect, np.random.default_rng((*part.encode(), int(path.stem))))
        assert np.array_equal(common.read_image(path, 256).permute(1, 2, 0), picture)
        if defect != "good":
            assert np.array_equal(common.read_mask(mask, 256, path)[0], truth)
            assert common.read_mask(mask, 64, path)[0].sum() >= 8  # still there at the toy training's size
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert common.make_toy(folder) == folder
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_toy_is_whole_or_not_there(small_toy, tmp_path, monkeypatch):
    calls = iter((RGB, RGB))
    monkeypatch.setattr(common, "draw_toy", lambda *_: [Image.fromarray(next(calls))] * 2)
    with pytest.raises(StopIteration):
        common.make_toy(tmp_path / "toy")
    assert list(tmp_path.iterdir()) == []

    def slower(*_):
        (tmp_path / "toy/faster").mkdir(parents=True, exist_ok=True)
        return Image.fromarray(RGB), Image.fromarray(GREY)

    monkeypatch.setattr(common, "draw_toy", slower)  # another process creates the folder first
    assert list(common.make_toy(tmp_path / "toy").iterdir()) == [tmp_path / "toy/faster"]
    assert list(tmp_path.iterdir()) == [tmp_path / "toy"]


def test_masks_beside_test_images_are_refused(tmp_path):
    lay_out(tmp_path, "train/good/0.png", "test/cut/0.png", "test/cut/0_mask.png")
    with pytest.raises(ValueError, match="0_mask.png: looks like a mask; put masks into ground_truth/"):
        common.find_categories(tmp_path)
