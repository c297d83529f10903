"""Tests of draem.py. Oracles: the authors' networks, losses, noise and SSPCAB in figures (golden.py); slow versions in
float64 that go from pixel to pixel, or turn a finished picture; Pillow and colorsys; closed forms; chi-square."""
import colorsys
import math
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import draem  # noqa: E402
from draem import (AUGMENTATIONS, SSPCAB, DiscriminativeSubNetwork, DraemModel, ReconstructiveSubNetwork,  # noqa: E402
                   augment_textures, change, coloured_noise, draem_loss, focal_loss, gradient_noise, load_draem,
                   perlin_noise, rotate, rotate_normals, ssim_loss, synthesize_anomalies)
from golden import check, fill, image  # noqa: E402

close = torch.testing.assert_close
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def seeded(seed: int = 0, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def small(sspcab: bool = False, width: int = 8) -> DraemModel:
    """Both sub-networks of the given width, filled by the golden rule, keys those of each sub-network alone."""
    model = DraemModel(width, sspcab)
    model.discriminative_subnetwork = DiscriminativeSubNetwork(base_width=width)
    fill(model.reconstructive_subnetwork)
    fill(model.discriminative_subnetwork)
    return model.eval()


def pixels(seed: int, *shape: int) -> np.ndarray:
    """Random levels 0..255: smooth, not uniform, with something at both ends."""
    levels = np.random.RandomState(seed).normal(110, 50, shape)
    return levels.clip(0, 255).round().astype(np.uint8)


def tensor(*pictures: np.ndarray) -> torch.Tensor:
    """(H, W, 3) of 0..255 to (N, 3, H, W) in [0, 1]."""
    return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures]).float() / 255


def draws(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor([tuple(row) + (0.5,) * (3 - len(row)) for row in rows])


# ---------------------------------------------------------------------------------------------------------------------
# Recorded figures


def test_networks_give_the_authors_figures():
    model, x = small(), image(0, 2, 3, 64, 64)
    assert len(model.reconstructive_subnetwork.state_dict()) == 156
    assert len(model.discriminative_subnetwork.state_dict()) == 191
    with torch.no_grad():
        reconstruction, logits = model(x)
    assert reconstruction.shape == (2, 3, 64, 64) and logits.shape == (2, 2, 64, 64)
    check(reconstruction, -0.061285726599834334, 0.05027452255599213, [
        -0.04289182275533676, -0.04584307223558426, -0.12869040668010712, -0.011196380481123924,
        -0.0457613468170166, -0.1284811943769455, -0.00988287478685379, 0.019393974915146828], abs=1e-5)
    check(logits, -0.08118397452130921, 0.12541347363146893, [
        0.12341657280921936, 0.06853305548429489, -0.21700149774551392, -0.13793623447418213,
        0.027098393067717552, 0.02373308688402176, -0.13584622740745544, -0.18285417556762695], abs=1e-5)
    score, anomaly_map = model.predict(x, 21)
    assert anomaly_map.shape == (2, 64, 64)
    check(anomaly_map, 0.44132463135247235, 0.01322174142937547, [
        0.4185774326324463, 0.4204138517379761, 0.44612324237823486, 0.4182553291320801,
        0.43192780017852783, 0.45985451340675354, 0.41380077600479126, 0.4566378593444824], abs=1e-5)
    close(score, torch.tensor([0.44406992197036743, 0.4435794949531555]), rtol=0, atol=1e-5)
    parts = model.predict_parts(x, 21)
    assert torch.equal(parts["score"], score) and torch.equal(parts["anomaly_map"], anomaly_map)
    close(parts["reconstruction"], reconstruction)


def test_parameter_counts():
    with torch.device("meta"):
        model = DraemModel()
    counts = [sum(p.numel() for p in net.parameters()) for net in
              (model.reconstructive_subnetwork, model.discriminative_subnetwork)]
    assert counts == [69_048_579, 28_374_146]


def test_losses_give_the_authors_figures():
    a = image(1, 2, 3, 64, 64)
    b = 0.7 * a + 0.3 * image(2, 2, 3, 64, 64)
    mask, logits = (image(3, 2, 1, 64, 64) > 0.8).float(), (image(4, 2, 2, 64, 64) - 0.5) * 6
    assert ssim_loss(a, b).item() == pytest.approx(0.10997968912124634, abs=1e-6)
    assert focal_loss(logits, mask).item() == pytest.approx(0.9165738224983215, rel=1e-4)
    terms = draem_loss(a, b, logits, mask)
    assert list(terms) == ["l2", "ssim", "focal"]
    assert terms["l2"].item() == pytest.approx(0.015061459504067898, abs=1e-6)
    assert torch.equal(terms["ssim"], ssim_loss(b, a)) and torch.equal(terms["focal"], focal_loss(logits, mask))
    assert draem_loss(a, b, logits, mask, torch.tensor(2.0))["sspcab"].item() == pytest.approx(0.2)


def test_sspcab_gives_the_authors_figures():
    block, x = fill(SSPCAB(16)), image(6, 2, 16, 12, 12)
    out = block(x)
    assert block.cost is None and out.shape == x.shape
    check(out, 0.18083029579130047, 0.26313854869957864, [
        0., 0., 0.5149412751197815, 0.04584039747714996, 0.3872241973876953, 0.18539051711559296,
        0.3236100375652313, 0.], abs=1e-5)
    out = block.train()(x)
    close(block.cost, ((out - x) ** 2).mean())


LATTICES = [  # cells; mean, standard deviation, values; share above 0.5. Angles are 2 pi RandomState(5).rand(...)
    ((1, 1), 0.29196670975681793, 0.2097672996880039, [
        0., 0.2394805600354442, 0.46860979956412385, 0.558920299256023, 0.42382627714808063, 0.16067212592063235,
        -0.01856149513139605, -0.008369578091813212], 0.180908203125),
    ((2, 8), 0.0051299290614526235, 0.31654692775642573, [
        0., 0.0010944850401268537, 0.08151374092360637, 0.05589088153411407, 0.6429571455650053,
        -0.26829976855198323, -0.455006289950071, -0.15697166234224763], 0.080810546875),
    ((16, 4), 0.01409708376628892, 0.3087945018079073, [
        0., 0.6414562953778048, -0.06310427896532282, 0.2654864009447491, 0.2891063478558475, 0.19889616904028282,
        0.11617080318350641, -0.19440300385391415], 0.067626953125),
    ((32, 32), 0.00026062750639870794, 0.29686230652595985, [
        0., 0.46516045921278515, 0., -0.6637903140842863, 0., -0.7522552400867191, 0., 0.7285333929491475],
     0.06298828125)]


@pytest.mark.parametrize("cells, mean, std, values, share", LATTICES)
def test_noise_gives_the_authors_figures(cells, mean, std, values, share):
    angles = 2 * np.pi * np.random.RandomState(5).rand(cells[0] + 1, cells[1] + 1)
    y, x = torch.meshgrid(*(torch.arange(64) * (c / 64) for c in cells), indexing="ij")
    for wide in (False, True):  # inside a larger lattice, and second in its batch, too
        at = torch.zeros(2, 33, 33) if wide else torch.zeros(2, cells[0] + 1, cells[1] + 1)
        at[1, :cells[0] + 1, :cells[1] + 1] = torch.from_numpy(angles)
        noise = gradient_noise(y.expand(2, -1, -1), x.expand(2, -1, -1), at)[1]
        check(noise, mean, std, values, abs=1e-5)
        assert (noise > 0.5).float().mean().item() == share


# ---------------------------------------------------------------------------------------------------------------------
# Noise


def slow_noise(y: float, x: float, angles: np.ndarray) -> float:
    """The noise at one place, in float64 from its definition: four corners, each with its weight."""
    total = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            weight = 1.0
            for t in (abs(y - row), abs(x - column)):
                weight *= 1 - (6 * t ** 5 - 15 * t ** 4 + 10 * t ** 3)
            total += weight * (math.cos(angles[row, column]) * (y - row) + math.sin(angles[row, column]) * (x - column))
    return math.sqrt(2) * total


def lattices(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What perlin_noise draws first from a seed: cells (2, N), gradients' angles, the turn in radians (N,)."""
    generator = seeded(seed)
    cells = 2.0 ** torch.randint(0, 6, (2, count, 1, 1), generator=generator)
    angles = 2 * math.pi * torch.rand(count, 33, 33, generator=generator)
    return cells[:, :, 0, 0], angles, math.pi * torch.rand(count, generator=generator) - math.pi / 2


@pytest.mark.parametrize("height, width", [(37, 51), (64, 32), (1, 7)])
def test_noise_of_any_size_equals_the_definition(height, width):
    """Each pixel's place turned about the centre, the noise there from its definition, nothing outside."""
    noise = perlin_noise(5, height, width, seeded(3))
    assert noise.shape == (5, height, width) and noise.isfinite().all() and noise.abs().max() < 1.01
    cells, angles, turn = lattices(5, 3)
    for n in range(5):
        c, s = math.cos(turn[n]), math.sin(turn[n])
        for i in range(0, height, 3):
            for j in range(0, width, 2):
                v, u = i - (height - 1) / 2, j - (width - 1) / 2
                v, u = c * v - s * u + (height - 1) / 2, s * v + c * u + (width - 1) / 2
                edge = min(v, u, height - 1 - v, width - 1 - u)
                if abs(edge) < 1e-3:
                    continue  # on the border, where rounding decides
                expected = 0.0 if edge < 0 else slow_noise(v * cells[0, n].item() / height,
                                                           u * cells[1, n].item() / width, angles[n].numpy())
                assert noise[n, i, j].item() == pytest.approx(expected, abs=2e-4)


def test_noise_is_the_turned_picture_of_noise():
    """The code's way: draw the upright picture at full size, then turn it, bilinear, by Pillow."""
    cells, angles, turn = lattices(12, 4)
    noise = perlin_noise(12, 128, 128, seeded(4))
    for n in range(12):
        y, x = torch.meshgrid(*(torch.arange(128) * (cells[k, n] / 128) for k in (0, 1)), indexing="ij")
        upright = Image.fromarray(gradient_noise(y[None], x[None], angles[n:n + 1])[0].numpy())
        turned = np.array(upright.rotate(-math.degrees(turn[n]), Image.BILINEAR))
        inner = np.s_[24:-24, 24:-24]
        blur = 0.35 * (cells[:, n].max().item() / 128) ** 2  # what resampling costs grows with the square of the cells
        assert np.abs(turned - noise[n].numpy())[inner].mean() < 1e-4 + blur
        corners = np.array(Image.new("L", (128, 128), 255).rotate(-math.degrees(turn[n]), Image.BILINEAR)) == 0
        assert (noise[n].numpy()[corners] != 0).mean() < 0.01  # the same corners are empty, but for the rim


def test_noise_varies_smoothly():
    cells, _, _ = lattices(20, 5)
    noise = perlin_noise(20, 256, 256, seeded(5))
    inner = noise[:, 60:-60, 60:-60]  # far from the corners that a turn empties: |gradient| is at most a few a cell
    for dim in (1, 2):
        steps = inner.diff(dim=dim).abs().amax((1, 2))
        assert (steps < 4.5 * cells.amax(0) / 256).all()


def test_masks_of_many_draws_cover_as_much_as_the_authors():
    """1,500 draws of the authors' generator at 256 x 256: 4.8 % of the pixels, 5 % empty."""
    generator, covers, empty = seeded(0), [], 0
    for _ in range(60):
        mask = perlin_noise(16, 256, 256, generator)[:, ::2, ::2] > 0.5
        covers.append(mask.float().mean((1, 2)))
    covers = torch.cat(covers)
    error = covers.std().item() * math.sqrt(1 / len(covers) + 1 / 1500)
    assert abs(covers.mean().item() - 0.048) < 3 * error + 0.0005
    share = (covers == 0).float().mean().item()
    assert abs(share - 0.05) < 3 * math.sqrt(0.05 * 0.95 * (1 / len(covers) + 1 / 1500)) + 0.005
    assert (perlin_noise(1, 256, 256, seeded(1)) != perlin_noise(1, 256, 256, seeded(2))).any()


# ---------------------------------------------------------------------------------------------------------------------
# Augmentations, on levels 0..255, against Pillow and loops over pixels


def test_gamma_and_brightness_and_invert():
    x = tensor(pixels(0, 9, 7, 3), pixels(1, 9, 7, 3))
    u = draws((0.0, 0.5, 1.0), (0.2, 0.3, 0.4))
    out, bright, inverse = draem.gamma(x, u), draem.brightness(x, u), draem.invert(x, u)
    for n in range(2):
        for c in range(3):
            exponent = 0.5 + 1.5 * u[n, c].item()
            for i in range(9):
                for j in range(7):
                    value = x[n, c, i, j].item()
                    assert out[n, c, i, j].item() == pytest.approx(value ** exponent, abs=1e-5)
                    level = 255 * value * (0.8 + 0.4 * u[n, 0].item()) + 60 * u[n, 1].item() - 30
                    assert bright[n, c, i, j].item() == pytest.approx(min(max(level, 0), 255) / 255, abs=1e-5)
    for n in range(2):
        picture = Image.fromarray((x[n] * 255).round().byte().permute(1, 2, 0).numpy())
        close(inverse[n:n + 1], tensor(np.array(ImageOps.invert(picture))))


def test_sharpness_is_pillows():
    pictures = [pixels(n, 20, 24, 3) for n in range(4)]
    u = draws((0.0,), (0.35,), (0.5,), (0.95,))
    out = draem.sharpness(tensor(*pictures), u)
    for n, picture in enumerate(pictures):
        expected = tensor(np.array(ImageEnhance.Sharpness(Image.fromarray(picture)).enhance(2 * u[n, 0].item())))[0]
        close(out[n, :, 1:-1, 1:-1], expected[:, 1:-1, 1:-1], rtol=0, atol=1.6 / 255)  # Pillow rounds twice
    close(out[2], tensor(pictures[2])[0])  # factor 1
    flat = torch.full((1, 3, 5, 5), 0.25)
    close(draem.sharpness(flat, draws((0.9,))), flat)  # borders too


def test_hue_saturation_is_colorsys():
    pictures = [pixels(n, 6, 8, 3) for n in range(5)]
    pictures[0][0, :4] = [(0, 0, 0), (255, 255, 255), (9, 9, 9), (255, 0, 255)]
    u = draws((0.5, 0.5), (0.0, 0.5), (1.0, 0.5), (0.3, 0.0), (0.9, 1.0))
    out = draem.hue_saturation(tensor(*pictures), u)
    for n, picture in enumerate(pictures):
        for i in range(6):
            for j in range(8):
                hue, saturation, value = colorsys.rgb_to_hsv(*(picture[i, j] / 255))
                shift_hue, shift_saturation = ((2 * u[n, k].item() - 1) * 50 / 255 for k in (0, 1))
                expected = colorsys.hsv_to_rgb((hue + shift_hue) % 1, min(max(saturation + shift_saturation, 0), 1),
                                               value)
                close(out[n, :, i, j], torch.tensor(expected).float(), rtol=0, atol=2e-5)


def test_solarize_is_pillows():
    picture = pixels(0, 16, 16, 3)
    u = draws((0.1, 0.0), (0.49, 0.5), (0.3, 1.0), (0.5, 0.0))
    out = draem.solarize(tensor(*[picture] * 4), u)
    for n, threshold in enumerate((32, 80, 128, 256)):
        close(out[n:n + 1], tensor(np.array(ImageOps.solarize(Image.fromarray(picture), threshold))))


def test_posterize_is_pillows():
    picture = np.arange(768).reshape(16, 16, 3).astype(np.uint8)  # all levels
    out = draem.posterize(tensor(*[picture] * 8), draws(*[(k * 0.14,) for k in range(8)]))
    for n in range(8):
        close(out[n:n + 1], tensor(np.array(ImageOps.posterize(Image.fromarray(picture), n + 1))))


def odd_pictures() -> list[np.ndarray]:
    """Histograms that trip equalization and stretching: few levels, one level, gaps, one heavy level."""
    rng = np.random.RandomState(7)
    heavy = np.where(rng.rand(40, 40, 3) < 0.9, 200, rng.randint(0, 256, (40, 40, 3)))
    return [pixels(0, 40, 40, 3), heavy.astype(np.uint8), np.full((40, 40, 3), 77, np.uint8),
            rng.choice([3, 90, 91, 255], (40, 40, 3)).astype(np.uint8), (pixels(1, 40, 40, 3) // 4 + 60)]


@pytest.mark.parametrize("cutoff", [0, 1, 7, 20])
def test_autocontrast_is_pillows(cutoff):
    pictures = odd_pictures()
    out = draem.autocontrast(tensor(*pictures), draws(*[((cutoff + 0.5) / 21,)] * len(pictures)))
    for n, picture in enumerate(pictures):
        expected = tensor(np.array(ImageOps.autocontrast(Image.fromarray(picture), cutoff)))[0]
        close(out[n], expected, rtol=0, atol=1.001 / 255)  # Pillow drops fractions
        assert (out[n] >= expected - 1e-5).all()


def test_equalize_is_pillows():
    pictures = odd_pictures()
    out = draem.equalize(tensor(*pictures), draws(*[()] * len(pictures)))
    for n, picture in enumerate(pictures):
        close(out[n], tensor(np.array(ImageOps.equalize(Image.fromarray(picture))))[0], rtol=0, atol=1e-6)


def test_rotate_is_pillows():
    smooth = np.array(Image.fromarray(pixels(0, 6, 8, 3)).resize((64, 48), Image.BICUBIC))
    degrees = torch.tensor([0.0, 30.0, -45.0, 90.0, 180.0])
    out = rotate(tensor(*[smooth] * 5), degrees)
    close(out[0], tensor(smooth)[0], rtol=0, atol=1e-4)
    for n, angle in enumerate(degrees.tolist()):
        expected = tensor(np.array(Image.fromarray(smooth).rotate(angle, Image.BILINEAR)))[0]
        apart = (out[n] - expected).abs()
        assert apart.mean() < 0.01 and (apart.amax(0) > 0.02).float().mean() < 0.06  # the rim is blended, not cut
    square = tensor(pixels(3, 33, 33, 3))
    close(rotate(square, torch.tensor([90.0])), square.rot90(1, (2, 3)), rtol=0, atol=1e-4)
    close(draem.turn(square.expand(2, -1, -1, -1), draws((0.0,), (0.75,))),
          rotate(square.expand(2, -1, -1, -1), torch.tensor([-45.0, 22.5])))


@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=lambda f: f.__name__)
def test_augmentations_stay_in_range_and_leave_their_arguments_alone(augmentation):
    x, u = image(0, 6, 3, 17, 23), image(1, 6, 3)
    x[0], x[1], u[2], u[3] = 0, 1, 0, 1 - 2 ** -24
    before = x.clone(), u.clone()
    out = augmentation(x, u)
    assert out.shape == x.shape and out.dtype == torch.float32 and out.min() >= 0 and out.max() <= 1 + 1e-6
    assert torch.equal(x, before[0]) and torch.equal(u, before[1])
    for n in range(6):  # each sample for itself
        close(augmentation(x[n:n + 1], u[n:n + 1])[0], out[n], rtol=1e-5, atol=1e-6)


class OnGPU(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""
    is_cuda = True


@pytest.mark.parametrize("chosen", [[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
def test_change_touches_the_chosen_alone_the_same_on_both_ways(chosen):
    chosen, x, seen = torch.tensor(chosen).bool(), image(0, 4, 3, 5, 5), []

    def function(x, u):
        seen.append(len(x))
        return x * u[:, :1, None, None] + 1

    u, before = image(1, 4, 3), x.clone()
    out = change(chosen, function, x, u)
    for n in range(4):
        assert torch.equal(out[n], x[n] * u[n, 0] + 1 if chosen[n] else x[n])
    assert seen == [chosen.sum().item()][:int(chosen.any())] and torch.equal(x, before)
    other = change(chosen, function, x.as_subclass(OnGPU), u)
    assert seen[-1] == 4 and torch.equal(other.as_subclass(torch.Tensor), out)


def test_three_different_augmentations_of_all_ten_evenly(monkeypatch):
    used = []

    def recorder(k):
        def function(x, u):
            used.append((k, x[:, 0, 0, 0].long()))
            assert u.shape == (len(x), 3)
            return x
        return function

    monkeypatch.setattr(draem, "AUGMENTATIONS", tuple(recorder(k) for k in range(10)))
    count = 4000
    augment_textures(torch.arange(float(count)).view(-1, 1, 1, 1).expand(-1, 3, 1, 1), seeded())
    table = torch.zeros(count, 10)
    for k, samples in used:
        table[samples, k] += 1
    assert (table.sum(1) == 3).all() and table.max() == 1
    chi = ((table.sum(0) - 1200) ** 2 / 1200).sum() / 0.7  # drawn without replacement: variance 0.7 of Poisson's
    assert 1 < chi < 27.9  # 9 degrees of freedom: 0.1 % above
    first = torch.zeros(10)
    for k, samples in used[:10]:
        first[k] += len(samples)
    assert ((first - 400) ** 2 / 400).sum() < 27.9  # the order is random, too


def test_augmented_textures_stay_in_range_and_change():
    texture = image(0, 60, 3, 24, 24)
    before = texture.clone()
    out = augment_textures(texture, seeded())
    assert out.isfinite().all() and out.min() >= 0 and out.max() <= 1 and torch.equal(texture, before)
    assert ((out - texture).abs().amax((1, 2, 3)) > 0.01).float().mean() > 0.95
    textures = coloured_noise(30, 16, 24, seeded())
    assert textures.shape == (30, 3, 16, 24) and textures.min() >= 0 and textures.max() <= 1
    assert textures.std((2, 3)).mean() > 0.02


# ---------------------------------------------------------------------------------------------------------------------
# Synthesis


def test_blend_equals_equation_4_at_each_pixel(monkeypatch):
    """With a known texture and beta = 0.3, from pixel to pixel; what the mask spares is the same to the bit."""
    monkeypatch.setattr(draem, "augment_textures", lambda texture, generator: texture)
    x, texture = image(0, 6, 3, 32, 32), image(1, 6, 3, 32, 32)
    before = x.clone(), texture.clone()
    augmented, mask = synthesize_anomalies(x, texture, seeded(2), (0.3, 0.3), 0)
    assert mask.shape == (6, 1, 32, 32) and mask.unique().tolist() == [0, 1]
    for n in range(6):
        for i in range(32):
            for j in range(32):
                m = mask[n, 0, i, j].item()
                for c in range(3):
                    p, a = x[n, c, i, j].item(), texture[n, c, i, j].item()
                    assert augmented[n, c, i, j].item() == pytest.approx(
                        (1 - m) * p + (1 - 0.3) * (m * p) + 0.3 * (m * a), abs=1e-6)
    spared = (mask == 0).expand_as(x)
    assert torch.equal(augmented[spared], x[spared])
    assert torch.equal(x, before[0]) and torch.equal(texture, before[1])


def test_mask_is_the_noise_above_one_half():
    x = image(0, 8, 3, 48, 40)
    _, mask = synthesize_anomalies(x, None, seeded(5), normal_share=0)
    generator = seeded(5)
    torch.rand(8, 1, 1, generator=generator)  # which samples stay normal
    assert torch.equal(mask[:, 0] == 1, perlin_noise(8, 48, 40, generator) > 0.5)


def test_half_stay_normal_and_beta_weights_the_anomaly(monkeypatch):
    """Black images, white texture: what shows in the mask is beta itself, uniform over its range."""
    monkeypatch.setattr(draem, "augment_textures", lambda texture, generator: texture)
    black, white = torch.zeros(1000, 3, 32, 32), torch.ones(1000, 3, 32, 32)
    augmented, mask = synthesize_anomalies(black, white, seeded())
    anomalous = mask.amax((1, 2, 3)) > 0
    generator = seeded()
    torch.rand(1000, 1, 1, generator=generator)
    drawn = ((perlin_noise(1000, 32, 32, generator) > 0.5).flatten(1).any(1)).float().mean().item()
    assert abs(anomalous.float().mean().item() - drawn / 2) < 0.06
    assert torch.equal(augmented[~anomalous], black[~anomalous])
    beta = augmented.amax((1, 2, 3))[anomalous]
    inside = augmented.mean(1, True)[mask > 0]
    assert 0.1 <= inside.min() and inside.max() <= 1
    assert beta.min() < 0.13 and beta.max() > 0.97 and abs(beta.mean() - 0.55) < 0.045
    histogram = torch.histc(beta, 6, 0.1, 1.0)
    assert ((histogram - len(beta) / 6) ** 2 / (len(beta) / 6)).sum() < 20.5  # 5 degrees of freedom: 0.1 % above
    full, _ = synthesize_anomalies(black, white, seeded(), (1.0, 1.0), 0)
    assert set(full.unique().tolist()) == {0.0, 1.0}
    for share, expected in ((1.0, 0), (0.0, drawn)):
        _, mask = synthesize_anomalies(black[:200], None, seeded(1), normal_share=share)
        assert abs((mask.amax((1, 2, 3)) > 0).float().mean().item() - expected) <= (0.1 if expected else 0)


def test_synthesis_without_texture_and_repeated():
    x = image(0, 8, 3, 64, 64)
    first, again = (synthesize_anomalies(x, None, seeded(3), normal_share=0) for _ in range(2))
    for a, b in zip(first, again):
        assert torch.equal(a, b)
    augmented, mask = first
    assert augmented.min() >= 0 and augmented.max() <= 1 and mask.sum() > 0
    assert ((augmented - x).abs().amax(1, True)[mask > 0] > 0.02).float().mean() > 0.5
    other, _ = synthesize_anomalies(x, None, seeded(4), normal_share=0)
    assert not torch.equal(other, augmented)
    leaf = x.clone().requires_grad_()
    assert not synthesize_anomalies(leaf, None, seeded())[0].requires_grad


def test_rotated_normals():
    count = 3000
    x = tensor(pixels(0, 9, 9, 3)).expand(count, -1, -1, -1)
    out = rotate_normals(x, seeded())
    changed = (out != x).flatten(1).any(1)
    assert abs(changed.float().mean().item() - 0.3) < 3 * math.sqrt(0.21 / count)
    degrees = []
    ramp = torch.linspace(0, 1, 65).expand(count, 3, 65, 65)  # its slope turns with the image
    for sample in rotate_normals(ramp[:300], seeded(1), 45, 1.0)[:, 0]:
        dy, dx = (sample[31:34, 31:34].diff(dim=d).mean() for d in (0, 1))
        degrees.append(math.degrees(math.atan2(-dy, dx)))
    assert -45.1 < min(degrees) < -42 and 42 < max(degrees) < 45.1 and abs(np.mean(degrees)) < 6
    assert torch.equal(rotate_normals(x, seeded(), share=0.0), x)


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def slow_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """1 - SSIM of (C, H, W), each pixel's 11 x 11 window summed by itself; beyond the border is 0."""
    offset = np.arange(-5, 6)
    window = np.exp(-(offset[:, None] ** 2 + offset ** 2) / 4.5)
    window /= window.sum()
    total = 0.0
    x, y = (np.pad(a.astype(np.float64), ((0, 0), (5, 5), (5, 5))) for a in (x, y))
    for c in range(x.shape[0]):
        for i in range(x.shape[1] - 10):
            for j in range(x.shape[2] - 10):
                a, b = x[c, i:i + 11, j:j + 11], y[c, i:i + 11, j:j + 11]
                ma, mb = (window * a).sum(), (window * b).sum()
                va, vb, cov = ((window * p * q).sum() - mp * mq for p, q, mp, mq in
                               ((a, a, ma, ma), (b, b, mb, mb), (a, b, ma, mb)))
                total += 1 - ((2 * ma * mb + 1e-4) * (2 * cov + 9e-4)
                              / ((ma ** 2 + mb ** 2 + 1e-4) * (va + vb + 9e-4)))
    return total / ((x.shape[1] - 10) * (x.shape[2] - 10) * x.shape[0])


@pytest.mark.parametrize("height, width", [(20, 27), (4, 9)])
def test_ssim_equals_the_loop(height, width):
    x, y = image(0, 2, 3, height, width), image(1, 2, 3, height, width)
    y[1] = 0.9 * x[1] - 0.7  # below -0.5, which must not change the range
    expected = np.mean([slow_ssim(a.numpy(), b.numpy()) for a, b in zip(x, y)])
    assert ssim_loss(x, y).item() == pytest.approx(expected, abs=2e-6)
    assert ssim_loss(x, x).item() == pytest.approx(0, abs=1e-6)
    strided = x.to(memory_format=torch.channels_last), y.to(memory_format=torch.channels_last)
    close(ssim_loss(*strided), ssim_loss(x, y))


def test_ssim_has_the_right_gradient():
    x, y = image(0, 1, 2, 8, 8).double(), image(1, 1, 2, 8, 8).double()
    reconstruction = y.float().requires_grad_()
    ssim_loss(x.float(), reconstruction).backward()
    for c, i, j in ((0, 0, 0), (1, 3, 4), (0, 7, 2)):
        step = torch.zeros_like(y)
        step[0, c, i, j] = 1e-6
        slope = (slow_ssim(x[0].numpy(), (y + step)[0].numpy()) - slow_ssim(x[0].numpy(), (y - step)[0].numpy())) / 2e-6
        assert reconstruction.grad[0, c, i, j].item() == pytest.approx(slope, rel=2e-3, abs=1e-6)


def test_focal_loss_in_closed_form():
    """One logit difference everywhere: p = (1 - 2e-5) sigmoid(d) + 2e-5 of the true class, -(1 - p)^2 log p."""
    for d in (-30.0, -2.0, 0.0, 1.5, 30.0):
        for truth in (0.0, 1.0):
            logits = torch.tensor([0.0, d]).view(1, 2, 1, 1).expand(2, 2, 5, 7)
            p = (1 - 2e-5) / (1 + math.exp(-d if truth else d)) + 2e-5
            expected = -(1 - p) ** 2 * math.log(p)
            assert focal_loss(logits, torch.full((2, 1, 5, 7), truth)).item() == pytest.approx(expected, rel=1e-4,
                                                                                              abs=1e-9)
    wrong = torch.tensor([-40.0, 40.0]).view(1, 2, 1, 1).expand(1, 2, 8, 8).clone().requires_grad_()
    loss = focal_loss(wrong, torch.zeros(1, 1, 8, 8))  # all of a normal image marked: dear (anomalib's costs 0)
    assert loss.item() == pytest.approx(-(1 - 2e-5) ** 2 * math.log(2e-5), rel=1e-5)
    loss.backward()
    assert wrong.grad.isfinite().all()


def test_losses_under_autocast_are_float32s():
    x, y = image(0, 2, 3, 32, 32), image(1, 2, 3, 32, 32)
    logits, mask = 4 * image(2, 2, 2, 32, 32).bfloat16(), (image(3, 2, 1, 32, 32) > 0.7).float()
    cost = torch.tensor(0.5)
    plain = draem_loss(x, y.bfloat16().float(), logits.float(), mask, cost)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = draem_loss(x, y.bfloat16(), logits, mask, cost)
        block = SSPCAB(8).train()
        block(image(4, 1, 8, 8, 8))
    assert all(torch.equal(plain[k], mixed[k]) and mixed[k].dtype == torch.float32 for k in plain)
    assert block.cost.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Model


def test_predict_needs_eval_mode_and_averages_before_the_maximum(monkeypatch):
    model, x = small(), image(0, 2, 3, 64, 96)
    with pytest.raises(RuntimeError, match="eval"):
        model.train().predict(x)
    logits = image(1, 2, 2, 64, 96)
    logits[0, 1, :3, -3:] += 2  # in a corner, where the mean takes in zeros
    monkeypatch.setattr(model, "forward", lambda image: (image, logits))
    score, anomaly_map = model.eval().predict(x)  # 21 / 256 of 64, odd: 5
    assert score.shape == (2,) and anomaly_map.shape == (2, 64, 96)
    assert not score.requires_grad and not anomaly_map.requires_grad
    for n in range(2):
        padded = np.pad(anomaly_map[n].double().numpy(), 2)
        means = [padded[i:i + 5, j:j + 5].sum() / 25 for i in range(64) for j in range(96)]
        assert score[n].item() == pytest.approx(max(means), abs=1e-6)
    monkeypatch.undo()
    with torch.autocast("cpu", torch.bfloat16):
        score, anomaly_map = model.predict(x)
    assert score.dtype == anomaly_map.dtype == torch.float32


def test_initial_weights():
    torch.manual_seed(0)
    for module in DraemModel(16).modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 2000:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert module.bias.abs().max() > 0
        if isinstance(module, torch.nn.BatchNorm2d) and module.weight.numel() > 60:
            assert abs(module.weight.mean().item() - 1) < 0.02 and module.weight.std().item() < 0.04
            assert (module.bias == 0).all()


@pytest.mark.parametrize("sspcab", [False, True])
def test_training_reduces_the_loss(sspcab):
    torch.manual_seed(0)
    model, generator = DraemModel(8, sspcab), seeded()
    optimizer, losses = torch.optim.Adam(model.parameters(), 2e-3), []
    y, x = torch.meshgrid(*(torch.linspace(0, 9, 32),) * 2, indexing="ij")
    normal = torch.stack((y.sin(), x.sin(), (x + y).cos())).expand(8, -1, -1, -1) / 2 + 0.5
    for _ in range(30):
        augmented, mask = synthesize_anomalies(normal, None, generator)
        reconstruction, logits = model(augmented)
        cost = model.reconstructive_subnetwork.encoder.block5.cost if sspcab else None
        terms = draem_loss(normal, reconstruction, logits, mask, cost)
        assert ("sspcab" in terms) == sspcab
        optimizer.zero_grad()
        sum(terms.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(sum(terms.values()).item())
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:3])
    score, anomaly_map = model.eval().predict(normal)
    assert score.isfinite().all() and 0 <= anomaly_map.min() and anomaly_map.max() <= 1


@pytest.mark.parametrize("sspcab", [False, True])
def test_predict_exports_at_any_batch_size(sspcab):
    class Predict(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, image):
            return self.model.predict(image)

    model = small(sspcab)
    program = torch.export.export(Predict(model), (image(0, 2, 3, 64, 64),),
                                  dynamic_shapes={"image": {0: torch.export.Dim("batch")}}).module()
    for count in (1, 4):
        x = image(count, count, 3, 64, 64)
        for a, b in zip(program(x), model.predict(x)):
            close(a, b, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Weights

FIRST, SECOND = "reconstructive_subnetwork.", "discriminative_subnetwork."


def authors(folder: Path, width: int = 8) -> tuple[Path, Path, DraemModel]:
    """A pair of files as the authors release them, and the networks, which see BGR."""
    model = small(width=width)
    files = folder / "DRAEM_0.0001_bottle_.pckl", folder / "DRAEM_0.0001_bottle__seg.pckl"
    torch.save(model.reconstructive_subnetwork.state_dict(), files[0])
    torch.save(model.discriminative_subnetwork.state_dict(), files[1])
    return *files, model


def anomalibs(model: DraemModel) -> dict:
    """The state of `model` as anomalib writes it, its second network fed (image, reconstruction)."""
    state = {"model." + k: v.clone() for k, v in model.state_dict().items()}
    key = "model." + SECOND + "encoder_segment.block1.0.weight"
    state[key] = state[key][:, [3, 4, 5, 0, 1, 2]]
    return {"state_dict": state | {"loss.weight": torch.zeros(2)}, "epoch": 3, "hyper_parameters": {"sspcab": False}}


def test_the_authors_pair_gives_on_rgb_what_it_gave_on_bgr(tmp_path):
    path, _, model = authors(tmp_path)
    loaded, bgr = load_draem(path), image(0, 2, 3, 64, 64)
    assert not loaded.training
    with torch.no_grad():
        expected, got = model(bgr), loaded(bgr.flip(1))
    close(got[0].flip(1), expected[0], rtol=0, atol=1e-5)
    close(got[1], expected[1], rtol=0, atol=1e-5)
    for a, b in zip(loaded.predict(bgr.flip(1)), model.predict(bgr)):
        close(a, b, rtol=0, atol=1e-5)
    assert not torch.allclose(loaded(bgr)[1], expected[1], atol=1e-4)  # the order matters to these weights


def test_anomalibs_checkpoint(tmp_path):
    model, x = small(), image(0, 2, 3, 64, 64)
    torch.save(anomalibs(model), tmp_path / "model.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_draem(tmp_path / "model.ckpt")
    for a, b in zip(loaded.predict(x), model.predict(x)):
        assert torch.equal(a, b)


def test_anomalibs_sspcab_is_renamed_with_a_warning(tmp_path):
    model, x = small(sspcab=True), image(0, 2, 3, 64, 64)
    content, names = anomalibs(model), {"conv1": "masked_conv1", "conv3": "masked_conv2", "conv2": "masked_conv3",
                                        "conv4": "masked_conv4", "se": "attention_module"}
    for key in list(content["state_dict"]):
        head, block, rest = key.partition("block5.")
        if block and key.startswith("model." + FIRST):
            name, _, end = rest.partition(".")
            content["state_dict"][f"{head}block5.{names[name]}.{end}"] = content["state_dict"].pop(key)
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.warns(UserWarning, match="model.ckpt.*SSPCAB.*ReLU") as caught:
        loaded = load_draem(tmp_path / "model.ckpt")
    assert len(caught) == 1
    for a, b in zip(loaded.predict(x), model.predict(x)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sspcab", [False, True])
def test_this_projects_checkpoint(sspcab, tmp_path):
    torch.manual_seed(0)
    model, x = DraemModel(12, sspcab).eval(), image(0, 1, 3, 32, 64)
    torch.save({"method": "draem", "model": model.state_dict(), "step": 5}, tmp_path / "last.pt")
    loaded = load_draem(str(tmp_path / "last.pt"))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for a, b in zip(loaded.predict(x), model.predict(x)):
        assert torch.equal(a, b)


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def refusal(path: Path) -> str:
    """What load_draem says of a file, which is one line that names it."""
    with pytest.raises(ValueError) as error:
        load_draem(path)
    assert "\n" not in str(error.value) and str(path.parent) in str(error.value)
    return str(error.value)


def test_what_does_not_fit_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, seg, model = authors(tmp_path)
    own, first = {"method": "draem", "model": model.state_dict()}, model.reconstructive_subnetwork.state_dict()
    other = tmp_path / "other.pt"
    last = "decoder.fin_out.0.bias"
    cases = [
        ({"method": "dsr", "model": {}}, "of dsr, not of draem"),
        ({"model": {}}, "not of draem"),
        ({"method": "draem", "model": {}}, "missing"),
        (own | {"model": {k: v for k, v in own["model"].items() if not k.endswith(last)}}, f"missing ({FIRST}{last}"),
        (own | {"model": own["model"] | {"extra": torch.zeros(1)}}, "unknown (extra)"),
        (own | {"model": own["model"] | {FIRST + last: torch.zeros(4)}}, f"{FIRST}{last} (4,) instead of (3,)"),
        (own | {"model": own["model"] | {FIRST + last: torch.tensor([0, math.nan, 0])}}, "not finite"),
        (own | {"model": own["model"] | {FIRST + last: 3}}, "missing"),
        ({"state_dict": {}}, "missing"),
        ({"weights": 1, "more": 2}, "neither this project's checkpoint"),
        ({}, "neither this project's checkpoint"),
        (model.discriminative_subnetwork.state_dict(), "first file"),
        ([1, 2], "found list"),
        (torch.zeros(3), "found Tensor"),
        (own | {"settings": Code()}, "could run code"),
        (SimpleNamespace(a=1), "could run code"),
    ]
    for content, words in cases:
        torch.save(content, other)
        assert words in refusal(other)
    assert not (tmp_path / "ran").exists()
    assert "No such file" in refusal(tmp_path / "none.pckl")
    assert "directory" in refusal(tmp_path)
    whole = path.read_bytes()
    for content in (b"", b"hello", b"A text.", b"\x89PNG\r\n\x1a\n" + bytes(50),
                    whole[:100], whole[:-2000], whole[2000:]):
        other.write_bytes(content)
        assert "truncated, or not a file of weights" in refusal(other)
    torch.save(first | {"decoder.up1.1.weight": torch.zeros(1)}, path)
    assert "decoder.up1.1.weight (1,)" in refusal(path)
    torch.save(first, path)
    seg.write_bytes(seg.read_bytes()[:1000])
    assert "__seg.pckl: truncated" in refusal(path)
    seg.unlink()
    assert "DRAEM_0.0001_bottle__seg.pckl: No such file" in refusal(path)


@pytest.mark.parametrize("key, shape", [("encoder.block1.0.weight", (8, 4, 3, 3)), ("encoder.block1.0.weight", (8,)),
                                        ("decoder.fin_out.0.bias", (4,)), ("decoder.fin_out.0.weight", (1, 8, 3, 3))])
def test_reordered_channels_of_another_shape_are_refused(key, shape, tmp_path):
    path, _, model = authors(tmp_path)
    torch.save(model.reconstructive_subnetwork.state_dict() | {key: torch.zeros(shape)}, path)
    assert f"{key} {shape} instead of" in refusal(path).replace("[", "(").replace("]", ")")


def test_anomalibs_first_layer_of_another_shape_is_refused(tmp_path):
    content = anomalibs(small())
    key = "model." + SECOND + "encoder_segment.block1.0.weight"
    for value in (torch.zeros(8), torch.zeros(8, 3, 3, 3), 3):
        torch.save({"state_dict": content["state_dict"] | {key: value}}, tmp_path / "model.ckpt")
        refusal(tmp_path / "model.ckpt")


# ---------------------------------------------------------------------------------------------------------------------
# GPU


@gpu
def test_a_step_never_makes_the_host_wait():
    torch.manual_seed(0)
    model, generator = DraemModel(8, True).cuda(), seeded(0, "cuda")
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=True)
    normal, texture = image(0, 8, 3, 64, 64).cuda(), image(1, 8, 3, 64, 64).cuda()

    def step(texture):
        augmented, mask = synthesize_anomalies(rotate_normals(normal, generator), texture, generator)
        with torch.autocast("cuda", torch.bfloat16):
            reconstruction, logits = model(augmented)
        terms = draem_loss(normal, reconstruction, logits, mask, model.reconstructive_subnetwork.encoder.block5.cost)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()

    step(texture)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step(texture)
        step(None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_gpu_gives_the_cpus_values():
    x = tensor(*(pixels(n, 32, 32, 3) for n in range(4)))
    u = image(0, 4, 3)
    for augmentation in AUGMENTATIONS:
        close(augmentation(x.cuda(), u.cuda()).cpu(), augmentation(x, u), rtol=0, atol=2e-3)
    a, b = image(1, 2, 3, 64, 64), image(2, 2, 3, 64, 64)
    close(ssim_loss(a.cuda(), b.cuda()).cpu(), ssim_loss(a, b), rtol=0, atol=1e-3)
    augmented, mask = synthesize_anomalies(a.cuda(), None, seeded(0, "cuda"), normal_share=0)
    assert augmented.is_cuda and mask.is_cuda and torch.equal(augmented[(mask == 0).expand_as(augmented)],
                                                              a.cuda()[(mask == 0).expand_as(augmented)])
