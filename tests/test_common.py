"""Tests of common.py. The oracles share none of its code: for images, the pixels written; for the resize, a loop over
four pixels, and Pillow; for masks, counts of pixels; for data sets, folders laid out by hand; for metrics, loops over
pairs and thresholds; for regions, a flood fill; for heat maps, opacity and colour solved from pixels over black and
white; for pages, what colours fill; for the toy, its look under the masks, and checksums for README's figures."""
import colorsys
import io
import os
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")
rng = np.random.default_rng(0)
RGB = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
GREY, ALPHA = rng.integers(0, 256, (2, 16, 16), dtype=np.uint8)
DEEP = rng.integers(0, 65536, (16, 16), dtype=np.uint16)
SMOOTH = np.dstack((*np.mgrid[60:220:10, 40:200:10], np.full((16, 16), 128))).astype(np.uint8)
INDEX, COLOURS = GREY // 64, np.uint8([[10, 20, 30], [200, 100, 0], [7, 77, 177], [250, 251, 252]])


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
    """A function that writes the image to a path, and that path's suffix."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.ascontiguousarray(image))
    return lambda path: image.save(path, **options), suffix


def bands(mode, *arrays):
    return Image.frombytes(mode, (16, 16), np.dstack(arrays).astype(np.uint8).tobytes())


def shown(orientation, array):
    """Stored pixels as a viewer shows them, by the EXIF standard's table of row 0 and column 0."""
    transposed = array.swapaxes(0, 1)
    return {1: array, 2: array[:, ::-1], 3: array[::-1, ::-1], 4: array[::-1], 5: transposed, 6: np.rot90(array, -1),
            7: transposed[::-1, ::-1], 8: np.rot90(array)}.get(orientation, array)


HEAD = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0%c\0\0\0\0\0\0"
EXIF = {orientation: {"exif": HEAD % orientation} for orientation in (*range(1, 9), 99)}
FROM_DEEP, PALETTE = grey(np.rint(DEEP / 257)), bands("P", INDEX)
PALETTE.putpalette(COLOURS.flatten().tolist())
RGBA, ON_BLACK, LA_ON_BLACK = np.dstack((RGB, ALPHA)), RGB * (ALPHA[..., None] / 255), grey(GREY * (ALPHA / 255))
GOOD = {  # name: (writer, suffix), expected pixels, tolerance in levels
    "1": (saved(GREY > 127, ".BMP"), grey((GREY > 127) * 255), 0), "P": (saved(PALETTE), COLOURS[INDEX], 0),
    "RGB jpeg": (saved(SMOOTH, ".JPG", **EXIF[8]), shown(8, SMOOTH), 12),
    "MPO": (saved(SMOOTH, ".jpg", format="MPO", save_all=True, append_images=[Image.fromarray(~RGB)]), SMOOTH, 12),
    "RGBA": (saved(RGBA), ON_BLACK, 1.5), "RGBA clear everywhere": (saved(RGBA * np.uint8([1, 1, 1, 0])), RGB, 0),
    "LA": (saved(bands("LA", GREY, ALPHA)), LA_ON_BLACK, 1.5),
    "LA clear everywhere": (saved(bands("LA", GREY, 0 * GREY)), grey(GREY), 0),
    "P transparent index": (saved(PALETTE, transparency=3), COLOURS[INDEX] * (INDEX < 3)[..., None], 0),
    "P transparent bytes": (saved(PALETTE, transparency=b"\0\0\xff\xff"), COLOURS[INDEX] * (INDEX > 1)[..., None], 0),
    "P gif transparent": (saved(PALETTE, ".gif", transparency=1), COLOURS[INDEX] * (INDEX != 1)[..., None], 0),
    "RGB tRNS": (saved(RGB, transparency=tuple(RGB[0, 0].tolist())), RGB * (RGB != RGB[0, 0]).any(2)[..., None], 0),
    "L tRNS": (saved(INDEX * 80, transparency=80), grey(INDEX * 80 * (INDEX != 1)), 0),
    "CMYK": (saved(bands("CMYK", RGBA), ".Tiff"), (255.0 - RGB) * (255 - ALPHA[..., None]) / 255, 1.5),
    "I;16": (saved(DEEP), FROM_DEEP, 0), "I;16B tiff": (saved(DEEP.astype(">u2"), ".tif"), FROM_DEEP, 0),
    "16-bit pgm": (saved(DEEP.astype(np.int32), ".pgm"), FROM_DEEP, 0),
    "I;16 EXIF 6": (saved(DEEP, ".tif", **EXIF[6]), np.rot90(FROM_DEEP, -1), 0),
    **{f"EXIF {i}": (saved(RGB, **EXIF[i]), shown(i, RGB), 0) for i in EXIF},
    "EXIF 6 RGBA": (saved(RGBA, **EXIF[6]), shown(6, ON_BLACK), 1.5)}


def check(tensor, expected, tolerance):
    assert tensor.dtype == torch.uint8 and tensor.shape == (3, 16, 16) and tensor.is_contiguous()
    assert abs(tensor.permute(1, 2, 0).numpy().astype(float) - expected).max() <= tolerance


@pytest.mark.parametrize("name", GOOD)
def test_a_file_its_bytes_and_what_pillow_opens_of_it(name, tmp_path):
    (write, suffix), expected, tolerance = GOOD[name]
    path = tmp_path / ("image" + suffix)
    write(path)
    data = io.BytesIO(path.read_bytes())
    for source in (*common.list_images(tmp_path), str(path), data, data, path.open("rb"), Image.open(path)):
        check(common.read_image(source, 16), expected, tolerance)


def test_arrays_and_modes_that_no_file_has():
    for array, expected in ((GREY, grey(GREY)), (RGB[:, ::-1], RGB[:, ::-1]), (DEEP, FROM_DEEP), (RGBA, ON_BLACK)):
        check(common.read_image(array, 16), expected, expected is ON_BLACK)
    check(common.read_image(bands("RGBa", ON_BLACK, ALPHA), 16), ON_BLACK, 2)
    check(common.read_image(bands("La", LA_ON_BLACK[..., 0], ALPHA), 16), LA_ON_BLACK, 2)
    for source in (RGB / 255, GREY.astype(np.int64), np.zeros((3, 8, 9), np.uint8), np.zeros((0, 5), np.uint8), None,
                   io.StringIO("x"), io.BytesIO(b"x"), "a\nb.png", "a\0b.png", "", "x" * 300, "\udcff.png"):
        assert "cannot be read as an image: " in refusal(common.read_image, source, 16)


def four_pixels(array, size):
    """Each output pixel's centre lies among four input pixels, which weigh in by distance."""
    (height, width), found = array.shape[:2], np.zeros((size, size, 3))
    for row, column in np.ndindex(size, size):
        y = np.clip((row + 0.5) * height / size - 0.5, 0, height - 1)
        x = np.clip((column + 0.5) * width / size - 0.5, 0, width - 1)
        for i in {int(y), min(int(y) + 1, height - 1)}:
            for j in {int(x), min(int(x) + 1, width - 1)}:
                found[row, column] += array[i, j] * (1 - abs(y - i)) * (1 - abs(x - j))
    return found


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (5, 7), (16, 16), (17, 31), (48, 80), (130, 100)])
def test_resizing_from_four_pixels_rounds_and_antialiased_is_as_pillow(shape):
    array = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    check(common.read_image(array, 16, antialias=False), four_pixels(array, 16), 0.501)  # float32 near a half
    pillow = np.asarray(Image.fromarray(array).resize((16, 16), Image.Resampling.BILINEAR)).astype(int)
    assert (abs(common.read_image(array, 16).permute(1, 2, 0).numpy() - pillow) > 1).mean() < 1e-3


def test_bits(tmp_path):
    check(common.read_image(RGB, 16, bits=10), RGB, 0)  # 8-bit stays as it is
    for suffix, dtype in ((".png", np.uint16), (".tif", np.uint16), (".pgm", np.int32)):
        for bits, value, expected in ((16, 128, 0), (16, 129, 1), (16, 4095, 16), (12, 0, 0), (12, 2048, 128),
                                      (12, 4095, 255), (12, 65535, 255), (10, 512, 128), (14, 8191, 127)):
            Image.fromarray(np.full((4, 4), value, dtype)).save(tmp_path / f"deep{suffix}")
            assert common.read_image(tmp_path / f"deep{suffix}", 4, bits=bits).unique().tolist() == [expected]


BAD = {  # name: writer, reason in the message
    "empty.png": (lambda path: path.write_bytes(b""), "cannot identify"),
    "PostScript.png": (lambda path: Image.fromarray(RGB).save(path, "EPS"), "cannot identify"),
    "huge.pgm": (lambda path: path.write_bytes(b"P5 30000 30000 255\n"), "900000000 pixels"),
    "folder.png": (lambda path: path.mkdir(), "folder"), "pipe.png": (lambda path: os.mkfifo(path), "device"),
    "dangling.png": (lambda path: path.symlink_to("nowhere.png"), "No such file"),
    "loop.png": (lambda path: path.symlink_to(path), "symbolic links"),
    **{f"half.{suffix}": (lambda path: [saved(RGB)[0](path), os.truncate(path, path.stat().st_size // 2)], "")
       for suffix in ("png", "jpg", "bmp", "tif", "gif", "webp", "ppm")},
    **{f"two.{suffix}": (lambda path: saved(RGB, save_all=True, append_images=[Image.fromarray(~RGB)])[0](path),
                         "holds 2 pictures") for suffix in ("tif", "gif", "png", "webp")},
    **{f"{mode}.tif": (lambda path: Image.new(path.stem, (16, 16)).save(path), f"mode {mode} has no known range")
       for mode in ("I", "F", "LAB")}}


@pytest.mark.parametrize("name", BAD)
def test_bad_image(name, tmp_path):
    path, (write, reason) = tmp_path / name, BAD[name]
    write(path)
    line = refusal(common.read_image, path, 16)
    assert line.startswith(f"{path}: cannot be read as an image: ") and reason in line and "Error" not in line
    if "range" not in reason:  # a mask is refused in the same words
        assert refusal(common.read_mask, path, 16, (16, 16)) == line


SPOT = np.zeros((16, 16), np.uint8)
SPOT[1:6, 2] = 1
WHITE_FIRST = bands("P", 1 - SPOT)
WHITE_FIRST.putpalette([255, 255, 255, 0, 0, 0])
MASKS = {
    "1.png": SPOT > 0, "1.bmp": SPOT, "255.gif": SPOT * 255, "LA.png": bands("LA", 1 - 0 * SPOT, SPOT * 255),
    "P.png": WHITE_FIRST, "blue.png": grey(SPOT) * np.uint8([0, 0, 1]), "RGBA.png": np.dstack((255 - RGB, SPOT * 255)),
    "I;16.png": SPOT * np.uint16(256), "I.tif": SPOT * np.int32(256), "F.tif": SPOT * np.float32(0.5)}


def mask_of(path, mask, size, image_size=None, **options):
    """read_mask's result for a mask saved to a file, of an image of its size by default."""
    saved(mask, **options)[0](path)
    found = common.read_mask(path, size, image_size or np.shape(mask)[1::-1])
    assert found.dtype == torch.bool and found.shape == (size, size)
    return found


def test_a_mask_is_what_is_not_black_and_has_its_images_aspect_ratio(tmp_path):
    for name in MASKS:
        assert np.array_equal(mask_of(tmp_path / name, MASKS[name], 16), SPOT), name
    assert np.array_equal(mask_of(tmp_path / "exif.tif", SPOT.repeat(2, 0), 16, (32, 16), **EXIF[6]), shown(6, SPOT))
    for width in (500, 509, 491):
        found = mask_of(tmp_path / "ratio.png", np.indices((1000, width))[0] < 500, 8, (50, 100))
        assert found.tolist() == [[True] * 8] * 4 + [[False] * 8] * 4
    for width in (511, 489, 2000):
        assert f"{tmp_path}/ratio.png: ({width}, 1000) pixels for an upright image of (50, 100)" in refusal(
            mask_of, tmp_path / "ratio.png", np.ones((1000, width), bool), 8, (50, 100))


def test_a_pixel_of_a_mask_is_anomalous_where_more_than_half_of_its_area_is(tmp_path):
    for ratio in (1, 2, 3, 5, 6, 7):
        array = rng.random((8 * ratio, 8 * ratio)) < 0.45
        array[:ratio, :ratio] = np.arange(ratio * ratio).reshape(ratio, ratio) % 2  # exactly half if the ratio is even
        counts = array.reshape(8, ratio, 8, ratio).sum((1, 3))
        assert np.array_equal(mask_of(tmp_path / "mask.png", array, 8), 2 * counts > ratio * ratio)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_mask_is_what_is_lighter_than_half(channels, tmp_path):
    row, column = np.mgrid[:128, :128]
    disc, path = (row - 60) ** 2 + (column - 70) ** 2 < 400, tmp_path / "mask.png"  # the name does not count
    mask = mask_of(path, np.dstack([disc * np.uint8(255)] * channels).squeeze(), 128, format="JPEG", quality=50)
    assert np.count_nonzero(np.asarray(Image.open(path).convert("L"))) > 1.1 * disc.sum()  # a JPEG rings at an edge
    assert (mask.numpy() != disc).sum() < 0.01 * disc.sum()
    levels = np.dstack([np.uint8([[127, 128]]).repeat(8, 1).repeat(16, 0)] * channels).squeeze()
    for options in ({"format": "JPEG", "quality": 100}, {"format": "WEBP", "lossless": True}):
        assert mask_of(path, levels, 16, **options).all(0)[[0, 15]].tolist() == [False, True]
    assert mask_of(path, levels, 16).all()


def test_read_ahead_reads_a_group_while_the_caller_has_the_one_before():
    taken, second = [], threading.Event()

    def read(item):
        if item == 3:
            second.set()
        return 10 * item

    results = common.read_ahead(read, (taken.append(group) or group for group in ([1, 2], [3], [], [4])))
    assert next(results) == [10, 20] and second.wait(20) and taken == [[1, 2], [3]]
    assert list(results) == [[30], [], [40]]


def write_images(folder, values, dtype=np.uint8):
    for index, value in enumerate(values):
        Image.fromarray(np.full((10, 20), value, dtype)).save(folder / f"{index:03d}.png")
    return sorted(folder.glob("*.png"))


def test_load_images(tmp_path, capsys):
    """All damaged ones are named. Dark 16-bit ones are warned of: 16319 / 257 rounds to 63, just below a quarter."""
    Image.fromarray(np.full((10, 20), 255, np.uint8)).save(tmp_path / "white.png")  # 8-bit, so it does not count
    for peak, bits, dtype, lines in ((0, 16, np.uint16, 1), (16319, 16, np.uint16, 1), (16320, 16, np.uint16, 0),
                                     (1023, 12, np.uint16, 0), (60, 16, np.uint8, 0)):
        assert common.load_images(write_images(tmp_path, [0, peak, 0], dtype), 8, bits=bits).max() == 255
        assert capsys.readouterr().err.count(f"{tmp_path}: all 16-bit images are below a quarter of white") == lines
    paths = write_images(tmp_path, range(30))[:30]
    images = common.load_images(paths[::-1], 8)
    assert images.dtype == torch.uint8 and images[:, 2, 7, 0].tolist() == [*range(29, -1, -1)]
    assert images.shape == (30, 3, 8, 8) and capsys.readouterr().err == "" and len(common.load_images([], 8)) == 0
    Image.fromarray(np.tile(DEEP, (2, 2))).save(paths[0])
    for options in ({}, {"antialias": False}):
        assert torch.equal(common.load_images(paths[:1], 5, **options)[0], common.read_image(paths[0], 5, **options))
    before = len(os.listdir("/dev/fd"))
    for path in paths[2:20:3]:
        os.truncate(path, 45)
    with pytest.raises(ValueError) as caught:
        common.load_images(paths, 8)
    assert len(os.listdir("/dev/fd")) == before  # damaged files are closed, or a thousand would use up the limit
    named = [part.split(": ")[0] for part in str(caught.value).split("replace or remove it; ")]
    assert named == [*map(str, paths[2:20:3])]


# --- Data sets --------------------------------------------------------------------------------------------------------
def lay_out(folder, *names, links=()):
    """Creates empty files below the folder, and links, a dict from name to target. Returns the folder."""
    for name in (*names, *links):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(folder / links[name]) if name in links else (folder / name).touch()
    return folder


def test_list_images(tmp_path, capsys, monkeypatch):
    lay_out(tmp_path, "b.PNG", "a/c.JpG", "a/.hidden.png", ".git/d.png", "z.tiff", "README", "a/x.db", "x.png/.keep")
    assert common.list_images(tmp_path) == [tmp_path / name for name in ("a/c.JpG", "b.PNG", "z.tiff")]
    assert f"{tmp_path}: files of other kinds passed over: 2, such as README\n" == capsys.readouterr().err
    assert common.list_images(str(tmp_path / "README")) == [tmp_path / "README"]
    for path, words in ((tmp_path / "x.png", "no images"), (tmp_path / "nowhere", "no such"), ("x" * 300, "no such")):
        assert words in refusal(common.list_images, path) and str(path) in refusal(common.list_images, path)
    top = lay_out(tmp_path, "top/b.png", "top/a/c.png", links={
        "top/a/back": "top", "top/itself": "top/itself", "top/gone.png": "nowhere.png", "far/in": "top/a"}) / "top"
    assert common.list_images(top) == [top / "a/c.png", top / "b.png", top / "gone.png"]  # followed, each folder once
    assert common.list_images(tmp_path / "far")[0] == tmp_path / "far/in/back/b.png"
    monkeypatch.setattr(os, "scandir", lambda path: open("/nowhere/at/all"))
    with pytest.raises(OSError):  # a folder that cannot be read is not passed over
        common.list_images(top)


@pytest.mark.parametrize("files, words", [
    # Data sets as downloaded, whose defects would be learned: OK and NG, magnetic tiles, KolektorSDD2, DAGM...
    (["OK/0.png", "NG/0.png"], "NG/0.png"), (["c/cap/train/good/0.png"], "c/cap/train/good/0.png"),
    (["1.jpg", "1.png"], "1.png, 1.jpg"), (["train/1.png", "train/1_GT.png", "test/2.png"], "train/1_GT.png, 1.png"),
    (["Train/0576.PNG", "Train/Label/0576_label.PNG"], "Train/Label/0576_label.PNG: defects or masks in subfolders"),
    (["a/train/0.png", "b/train/good/0.png", "b/train/good/0.bmp"], "0.png, 0.bmp: an image and its mask?"),
    (["test/cut/0.png", "test/good/1.png"], "test/cut/0.png"), (["notes.txt"], ": holds no images"),
    (["train/good/x.txt"], "train/good: holds no images"), (["train/0.png", "test/x.txt"], "test: holds no images"),
    (["train/0.png", "test/0.png"], "test/0.png: is it normal or not?"),
    (["train/0.png", "test/cut/0.png", "test/cut/0_mask.png"], "cut/0_mask.png: looks like a mask; put masks into")])
def test_what_would_be_learned_or_scored_wrongly_is_refused(files, words, tmp_path):
    line = refusal(common.find_categories, lay_out(tmp_path, *files))
    assert line.startswith(str(tmp_path)) and words in line
    assert f"{files[0]}: is not a folder" in refusal(common.find_categories, tmp_path / files[0])
    assert "no such folder" in refusal(common.find_categories, tmp_path / "nowhere")


@pytest.mark.parametrize("train, test, truth, good, mask", [
    ("train/good", "test", "ground_truth", "good", "0_mask.png"), ("Train/Good", "Test", "Ground_Truth", "Ok", "0.bmp"),
    ("TRAIN/OK", "TEST", "groundtruth", "GOOD", "0_LABEL.gif"), ("train", "test", "Masks", "Normal", "0_gt.webp")])
def test_mvtec_layout_in_any_case(train, test, truth, good, mask, tmp_path, capsys):
    """Images of one stem share a mask. Subfolders and defects are told apart. Masks without an image are named."""
    names = f"{good}/0.png", "cut/._0.png", "cut/0.JPG", "cut/0.png", "cut/1.png", "A dent/0.png", "cut/a/0.png"
    cap = lay_out(tmp_path / "cap", f"{train}/0.png", *(f"{test}/{name}" for name in names),
                  *(f"{truth}/{folder}/{mask}" for folder in ("cut", "cut/a", "a dent", good)))
    (category,) = common.find_categories(str(cap))
    assert category.name == "cap" and category.train == [cap / train / "0.png"] and capsys.readouterr().err == ""
    assert {item.path.relative_to(cap / test).as_posix(): item[2:] for item in category.test} == {
        "A dent/0.png": ("A dent", cap / truth / "a dent" / mask), "cut/0.JPG": ("cut", cap / truth / "cut" / mask),
        "cut/0.png": ("cut", cap / truth / "cut" / mask), "cut/a/0.png": ("cut", cap / truth / "cut/a" / mask),
        "cut/1.png": ("cut", None), f"{good}/0.png": ("good", None)}
    common.find_categories(lay_out(cap, *(f"{truth}/{name}.png" for name in ("0", "cut/00", "cut/0_mask2"))))
    assert capsys.readouterr().err == f"{cap / truth}: masks that fit no test image: 3, such as {cap / truth}/0.png\n"


def test_links_categories_below_and_plain_folders(tmp_path, monkeypatch, capsys):
    lay_out(tmp_path, "disk/OK/0.png", "disk/NG/1.png", "disk/masks/1.bmp", "set/license.txt", "set/empty/x.txt",
            "set/.trash/train/0.png", "set/nut/train/0.png", "set/nut/train/1.jpg", links={
                "cap/train/good": "disk/OK", "cap/test/good": "disk/OK", "cap/test/cut": "disk/NG",
                "cap/ground_truth/cut": "disk/masks", "set/bolt": "cap"})
    bolt, nut = tmp_path / "set/bolt", tmp_path / "set/nut"
    tests = [(bolt / "test/cut/1.png", Path("cut/1.png"), "cut", bolt / "ground_truth/cut/1.bmp"),
             (bolt / "test/good/0.png", Path("good/0.png"), "good", None)]
    assert common.find_categories(tmp_path / "set") == [("bolt", [bolt / "train/good/0.png"], tests),
                                                        ("nut", [nut / "train/0.png", nut / "train/1.jpg"], [])]
    assert capsys.readouterr().err == f"{tmp_path / 'set'}: not trained on: empty\n"
    lay_out(tmp_path, "disk/OK/0.bmp")  # with 0.png it would be taken for a mask, but evaluation ignores train/
    tests.insert(1, (bolt / "test/good/0.bmp", Path("good/0.bmp"), "good", None))
    for folder in (tmp_path / "set", bolt):
        assert common.find_categories(folder, training=False) == [("bolt", [], tests)]
    assert "test/DEFECT" in refusal(common.find_categories, nut, training=False)
    (lay_out(tmp_path / "flat", "train/0.png", "test/good/1.png") / "masks/dent").mkdir(parents=True)  # no masks yet
    assert common.find_categories(tmp_path / "flat")[0].test[0].mask is None
    names = [".a_mask.png", "a.png", "a2.png", "a_b.png", "gt.png", "mask_a.png", "notes.txt"]
    monkeypatch.chdir(lay_out(tmp_path / "plain", *names))
    assert common.find_categories(".") == [("plain", [Path(name) for name in names[1:-1]], [])]


# --- Metrics ----------------------------------------------------------------------------------------------------------
def expected_metrics(scores, regions, limit=0.3):
    """By loops over pairs, and over the distinct scores as thresholds, from the highest down."""
    labels, points, f1, ap, area = regions > 0, [(0.0, 0.0, 0.0, 1.0)], {}, 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        called = scores >= threshold
        hits, overlaps = (called & labels).sum(), [called[regions == number].mean() for number in set(regions[labels])]
        points.append((called[~labels].mean(), np.mean(overlaps), hits / labels.sum(), hits / called.sum()))
        f1[threshold] = 2 * hits / (called.sum() + labels.sum())
    for (x0, y0, recall0, _), (x1, y1, recall1, precision) in zip(points, points[1:]):
        ap += (recall1 - recall0) * precision
        if x0 < limit and x1 > x0:  # a trapezoid below the mean recall of the regions, up to the limit
            end = min(x1, limit)
            area += (end - x0) * (y0 + y0 + (y1 - y0) * (end - x0) / (x1 - x0)) / 2
    pairs = [(a > b) + (a == b) / 2 for a in scores[labels] for b in scores[~labels]]
    return pytest.approx({"auroc": sum(pairs) / len(pairs), "ap": ap, "f1": max(f1.values()),
                          "threshold": max(f1, key=f1.get), "aupro": area / limit}, abs=1e-12)


@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_ranking_metrics(levels, share):
    """The samples have ties, negative scores, 0.0 and -0.0, and gaps in the region numbers."""
    for count in (2, 3, 40, 150):
        scores, labels = np.float32(rng.integers(0, levels, count) / levels - 0.4), rng.random(count) < share
        scores[scores == 0] *= rng.choice((1, -1))
        labels[:2] = True, False
        regions = labels * rng.integers(1, 9, count)
        for limit in (0.05, 0.5, 1.0):
            assert common.ranking_metrics(scores, regions, limit) == expected_metrics(scores, regions, limit)
        found = common.ranking_metrics(scores, regions)
        assert found == expected_metrics(scores, regions) and {*map(type, found.values())} == {float}
        del found["aupro"]
        assert common.image_metrics(scores.tolist(), labels.astype(int).tolist()) == found


def test_ranking_metrics_in_closed_form():
    scores, regions = np.float32([9] * 3 + [8] * 4 + [1] * 7), np.array([0] * 3 + [1] * 4 + [0] * 7)
    assert common.ranking_metrics(scores, regions, 0.3)["aupro"] == 0  # recall rises at a rate of exactly 0.3
    scores, regions = np.float32(rng.random(999)), rng.integers(0, 4, 999)  # perfect is exactly 1
    assert {**common.ranking_metrics(scores + 2 * (regions > 0), regions), "threshold": 1} == dict.fromkeys(
        ("auroc", "ap", "f1", "aupro", "threshold"), 1)
    for labels in ([0, 0, 0], [1, 1, 1], []):
        assert common.image_metrics([1.0] * len(labels), labels) == {}
    assert "NaN" in refusal(common.image_metrics, [1, float("nan"), 3], [0, 1, 0])


def flood_fill(mask):
    labels = np.zeros(mask.shape, int)
    for start in zip(*np.nonzero(mask)):
        count, stack = labels.max() + 1, [start] if labels[start] == 0 else []
        while stack:
            y, x = stack.pop()
            if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x] and not labels[y, x]:
                labels[y, x] = count
                stack += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return labels


def test_connected_regions():
    snake = np.zeros((41, 33), bool)
    snake[::2] = snake[1::4, -1] = snake[3::4, 0] = True
    rings, checker = np.indices((41, 33)).max(0) % 2 == 0, np.indices((41, 33)).sum(0) % 2 == 0
    masks = [rng.random((41, 33)) < density for density in (0, 0.002, 0.1, 0.25, 0.4, 0.6, 1)]
    for mask in (snake, snake.T, rings, checker, np.ones((1, 1), bool), *masks):
        regions, expected = common.connected_regions(torch.tensor(mask)), flood_fill(mask)
        pairs = set(zip(regions.flatten().tolist(), expected.flatten().tolist())) - {(0, 0)}
        numbers = list(range(1, expected.max() + 1))  # the labels correspond one to one
        assert sorted(ours for ours, _ in pairs) == numbers == sorted(theirs for _, theirs in pairs)


def test_pixel_metrics():
    """Regions count as one each, over all images; an image without any takes part with its normal pixels."""
    masks = [rng.random((12, 10)) < density for density in (0.05, 0, 0.2, 0.1)]
    maps = [np.float32(rng.integers(0, 9, (12, 10)) / 9 + mask / 3) for mask in masks]
    regions = np.concatenate([np.where(mask, flood_fill(mask) + 100 * index, 0) for index, mask in enumerate(masks)])
    expected = expected_metrics(np.concatenate(maps).flatten(), regions.flatten())
    assert common.pixel_metrics([*map(torch.tensor, maps)], [*map(torch.tensor, masks)]) == expected
    assert common.pixel_metrics([], []) == {} == common.pixel_metrics([torch.rand(3, 3)], [torch.zeros(3, 3).bool()])


def test_write_csv(tmp_path):
    common.write_csv(tmp_path / "a.csv", "w", [("path", "score")])
    common.write_csv(tmp_path / "a.csv", "a", [(Path('a\udcff,"b\n'), 0.5), ("\u00e9", 1)])
    assert (tmp_path / "a.csv").read_bytes() == b'path,score\r\n"a\xff,""b\n",0.5\r\n\xc3\xa9,1\r\n'


# --- Pictures ---------------------------------------------------------------------------------------------------------
def test_panel_and_panels():
    image, part, mask = torch.tensor(RGB).permute(2, 0, 1), torch.rand(3, 16, 16), torch.rand(1, 16, 16) > 0.5
    assert np.array_equal(common.panel(image), RGB) and np.array_equal(common.panel(image / 255), RGB)
    levels = common.panel(torch.tensor([[-1, 0, 0.1, 0.5, 1, 2]]).bfloat16())
    assert levels.dtype == np.uint8 and levels.tolist() == [[[value] * 3 for value in (0, 0, 26, 128, 255, 255)]]
    parts = {"score": torch.tensor(0.3), "joined_in": part, "anomaly_map": part[0] / part[0].max()}
    for top, end in ((1.0, 1), (4.0, 4), (0.25, 1)):  # the scale ends at top, or at the map's maximum if higher
        found = common.panels(image, parts, mask, top)
        assert list(found) == ["image", "joined in", "anomaly map", "truth"]
        expected = RGB, common.panel(part), common.heat(RGB, parts["anomaly_map"] / end), grey(mask[0].numpy() * 255)
        assert all(map(np.array_equal, found.values(), expected))
    assert list(common.panels(image, {"score": part})) == ["image"]


def test_heat():
    """Over black and white the map's opacity and colour can be solved for: light = dark + 255 * (1 - opacity)."""
    levels = torch.tensor([[-3, 0, 0.3, 0.4, 0.5, 0.55, 0.6, 0.7, 0.75, 0.8, 0.9, 1, 7]])
    dark, light = (common.heat(np.full((1, 13, 3), value, np.uint8), levels)[0].astype(float) for value in (0, 255))
    opacity = 1 - (light - dark).mean(1) / 255
    assert opacity == pytest.approx([0, 0, 0, 2 / 15, 4 / 15, 1 / 3, 0.4, 8 / 15, 0.6, *[2 / 3] * 4], abs=0.004)
    hues = [360 * colorsys.rgb_to_hsv(*colour)[0] for colour in dark[3:]]  # 240 blue, 180 cyan, 60 yellow, 0 red
    assert hues == pytest.approx([228, 204, 192, 180, 120, 80, 60, 30, 0, 0], abs=2)
    assert dark.max(1)[3:] / 255 == pytest.approx(opacity[3:], abs=0.004)  # at full brightness, as no grey is
    clear, strong = (common.heat(RGB, torch.full((16, 16), level)).astype(int) for level in (0.0, 1.0))
    assert abs(clear - np.asarray(Image.fromarray(RGB).convert("L"))[..., None]).max() <= 1
    assert (strong[..., 0] - strong[..., 1:].max(2) >= 169).all() and dark[-1].tolist() == [170, 0, 0]  # red anywhere


@pytest.mark.parametrize("width, scale", [(40, 4), (80, 2), (81, 1), (200, 1)])
def test_page(width, scale):
    panels = [np.full((width // 2, width, 3), (200, 0, index), np.uint8) for index in range(5)]
    picture = common.page([("cut\n0.987\na long name \udcff\u4e2d.png", {"image": panels[0], "map": panels[1]}),
                           ("good", {"image": panels[2], "map": panels[3], "truth": panels[4]})])
    pixels, wide, high = np.asarray(picture), scale * width, scale * (width // 2)
    left, top = picture.width - 3 * (wide + 8), picture.height - 2 * (high + 8)  # 28, room for the headings
    for index, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]):
        y, x = top + row * (high + 8), left + column * (wide + 8)
        filled = (pixels == (200, 0, index)).all(2)
        assert filled.sum() == wide * high == filled[y:y + high, x:x + wide].sum()
        rows, columns = np.nonzero(pixels[:28, x:x + wide].mean(2) < 128)  # headings stand centred above their columns
        assert abs(columns.min() + columns.max() + 1 - wide) <= 4 and abs(rows.min() + rows.max() + 1 - 28) <= 6
        rows, columns = np.nonzero(pixels[y:y + high, :left - 4].mean(2) < 128)  # captions end left, at half height
        assert abs(rows.min() + rows.max() + 1 - high) <= 8 and 10 <= left - columns.max() <= 14 and columns.min() >= 10


# --- The toy product --------------------------------------------------------------------------------------------------
def test_the_toys_mask_is_where_its_defect_shows():
    """The checksums are the same under Pillow 10.4 and 13.0. Where they change, README's figures of the toy do."""
    checksums = {"scratch": 3921818908, "stain": 1822423991, "missing": 3304646228, "good": 4276369556}
    for kind in checksums:
        drawn = b""
        for seed in range(6):
            picture, mask = map(np.asarray, common.draw_toy(kind, np.random.default_rng(seed)))
            assert not mask.any() if kind == "good" else 150 < (mask > 0).sum() < 3500
            red, _, blue = np.median(picture[mask > 0], 0) if mask.any() else (0, 0, 0)
            assert red - blue > 30 if kind == "stain" else max(red, blue) < 50  # brown, or dark; the cap is light grey
            drawn += picture.tobytes() + mask.tobytes()
        assert zlib.crc32(drawn) == checksums[kind], kind


def test_make_toy(tmp_path, capsys, monkeypatch):
    assert common.TOY == {"train/good": 100, "test/good": 20, "test/scratch": 12, "test/stain": 12, "test/missing": 12}
    monkeypatch.setattr(common, "TOY", {part: 2 for part in common.TOY})
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(common, "draw_toy", lambda *_: {}["the disk is full"])
        common.make_toy(tmp_path / "toy")
    assert list(tmp_path.iterdir()) == []  # the toy is whole or not there
    folder = common.make_toy(str(tmp_path / "data/toy"))
    assert folder == tmp_path / "data/toy" and list(folder.parent.iterdir()) == [folder]
    (category,) = common.find_categories(folder)
    assert [item.defect for item in category.test[::2]] == ["good", "missing", "scratch", "stain"]
    assert len(category.train) == 2 and len(list(folder.rglob("*.*"))) == 16 and capsys.readouterr().err == ""
    for path, _, defect, mask in [*category.test, (category.train[1], None, "good", None)]:
        part = path.parent.relative_to(folder).as_posix()
        picture, truth = common.draw_toy(defect, np.random.default_rng((*part.encode(), int(path.stem))))
        assert np.array_equal(common.read_image(path, 256).permute(1, 2, 0), picture)
        assert not mask or np.array_equal(common.read_mask(mask, 256, (256, 256)), np.asarray(truth) > 0)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert common.make_toy(folder) == folder and before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_importing_common_changes_nothing_for_others():
    code = ("import os, warnings, numpy, torch; from PIL import Image, ImageDraw, ImageFile, ImageFilter, ImageFont\n"
            "def state(): return (list(warnings.filters), Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES,\n"
            "    numpy.geterr(), torch.get_rng_state().tolist(), torch.get_num_threads(), dict(os.environ))\n"
            "before = state(); import common; assert state() == before")
    subprocess.run([sys.executable, "-c", code], cwd=Path(common.__file__).parent, check=True)
