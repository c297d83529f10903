"""Tests of draem.py. Oracles: the paper's numbers, as literals; recorded figures of the authors' networks, losses,
noise and SSPCAB (golden.py); slow versions in float64 that loop over pixels; Pillow and colorsys; closed forms;
chi-square tests of random draws; sub-networks wired as anomalib's, for its files; a fresh interpreter."""
import colorsys
import math
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

import draem  # noqa: E402
from draem import (AUGMENTATIONS, PUBLISHED, SSPCAB, DiscriminativeSubNetwork, DraemModel, apply_where,  # noqa: E402
                   augment_textures, draem_loss, focal_loss, gradient_noise, load, mean_filter_maximum, perlin_mask,
                   perlin_noise, rotate, rotate_normals, ssim_loss, synthesize_anomalies)
from golden import check, fill, image  # noqa: E402

close = torch.testing.assert_close
FIRST, SECOND = "reconstructive_subnetwork.", "discriminative_subnetwork."


def seeded(seed: int = 0, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def filled(sspcab: bool = False, **knobs) -> DraemModel:
    """A small model in eval mode. The golden rule fills each sub-network by its own keys."""
    model = DraemModel(8, sspcab, **knobs)
    fill(model.reconstructive_subnetwork)
    fill(model.discriminative_subnetwork)
    return model.eval()


def pixels(seed: int, *shape: int) -> np.ndarray:
    """Random levels 0..255: normal around 110, with both ends clipped."""
    levels = np.random.RandomState(seed).normal(110, 50, shape)
    return levels.clip(0, 255).round().astype(np.uint8)


def tensor(*pictures) -> torch.Tensor:
    """(H, W, 3) of 0..255 to (N, 3, H, W) in [0, 1]."""
    return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures]).float() / 255


def uniform_chi_square(values, low: float, high: float, bins: int = 6) -> float:
    """Chi-square of values against the uniform distribution on [low, high]; with 6 bins, 0.1 % exceed 20.5."""
    counts, _ = np.histogram(values, bins, (low, high))
    assert counts.sum() == len(values)
    return ((counts - len(values) / bins) ** 2 / (len(values) / bins)).sum()


# ---------------------------------------------------------------------------------------------------------------------
# Published numbers and recorded figures


def test_published_is_the_papers_recipe():
    """Sections 3.3 and 4 of the paper; batch, shares, threshold, ssim_lambda and window are the authors' code's."""
    assert [700 * share for share in PUBLISHED["drops"]] == pytest.approx([400, 600])
    assert {key: value for key, value in PUBLISHED.items() if key != "drops"} == {
        "size": 256, "batch": 8, "epochs": 700, "lr": 1e-4, "drop_factor": 0.1, "width": 128, "rotation": 45,
        "rotation_share": 0.3, "normal_share": 0.5, "noise_threshold": 0.5, "beta": (0.1, 1.0), "augmentations": 3,
        "ssim_lambda": 1, "sspcab_lambda": 0.1, "window": 21}
    with torch.device("meta"):
        model = DraemModel()
    assert model.settings == {"width": 128, "sspcab": False, "beta": (0.1, 1.0), "rotation": 45, "sspcab_lambda": 0.1}
    networks = model.reconstructive_subnetwork, model.discriminative_subnetwork
    assert [sum(p.numel() for p in net.parameters()) for net in networks] == [69_048_579, 28_374_146]
    assert [len(net.state_dict()) for net in networks] == [156, 191] and model.reading == {}


def test_networks_give_the_authors_figures():
    model, x = filled(), image(0, 2, 3, 64, 64)
    model.discriminative_subnetwork = fill(DiscriminativeSubNetwork(base_width=8))  # as wide as the first
    result = model.predict(x, 21)
    reconstruction, logits = model(x)
    assert torch.equal(logits, model.discriminative_subnetwork(torch.cat((reconstruction, x), 1)))  # in this order
    assert list(result) == ["score", "anomaly_map", "reconstruction"]
    close(result["reconstruction"], reconstruction.detach())
    check(reconstruction, -0.061285726599834334, 0.05027452255599213, [
        -0.04289182275533676, -0.04584307223558426, -0.12869040668010712, -0.011196380481123924,
        -0.0457613468170166, -0.1284811943769455, -0.00988287478685379, 0.019393974915146828], abs=1e-5)
    check(logits, -0.08118397452130921, 0.12541347363146893, [
        0.12341657280921936, 0.06853305548429489, -0.21700149774551392, -0.13793623447418213,
        0.027098393067717552, 0.02373308688402176, -0.13584622740745544, -0.18285417556762695], abs=1e-5)
    check(result["anomaly_map"], 0.44132463135247235, 0.01322174142937547, [
        0.4185774326324463, 0.4204138517379761, 0.44612324237823486, 0.4182553291320801,
        0.43192780017852783, 0.45985451340675354, 0.41380077600479126, 0.4566378593444824], abs=1e-5)
    close(result["score"], torch.tensor([0.44406992197036743, 0.4435794949531555]), rtol=0, atol=1e-5)


def test_losses_give_the_authors_figures():
    a = image(1, 2, 3, 64, 64)
    b = 0.7 * a + 0.3 * image(2, 2, 3, 64, 64)
    mask, logits = (image(3, 2, 1, 64, 64) > 0.8).float(), (image(4, 2, 2, 64, 64) - 0.5) * 6
    terms = {key: value.item() for key, value in draem_loss(a, b, logits, mask).items()}
    assert terms == {"l2": pytest.approx(0.015061459504067898, abs=1e-6),
                     "ssim": pytest.approx(0.10997968912124634, abs=1e-6),
                     "focal": pytest.approx(0.9165738224983215, rel=1e-4)}


def test_sspcab_gives_the_authors_figures():
    block, x = fill(SSPCAB(16)), image(6, 2, 16, 12, 12)
    out = block(x)
    assert block.cost is None
    check(out, 0.18083029579130047, 0.26313854869957864, [
        0., 0., 0.5149412751197815, 0.04584039747714996, 0.3872241973876953, 0.18539051711559296,
        0.3236100375652313, 0.], abs=1e-5)
    out = block.train()(x)
    close(block.cost, ((out - x) ** 2).mean())


@pytest.mark.parametrize("cells, mean, std, values, share", [
    ((2, 8), 0.0051299290614526235, 0.31654692775642573, [
        0., 0.0010944850401268537, 0.08151374092360637, 0.05589088153411407, 0.6429571455650053,
        -0.26829976855198323, -0.455006289950071, -0.15697166234224763], 0.080810546875),
    ((32, 32), 0.00026062750639870794, 0.29686230652595985, [
        0., 0.46516045921278515, 0., -0.6637903140842863, 0., -0.7522552400867191, 0., 0.7285333929491475],
     0.06298828125)])
def test_noise_gives_the_authors_figures(cells, mean, std, values, share):
    angles = torch.zeros(2, 33, 33)  # theirs fill the corner of a larger lattice, second in the batch
    theirs = 2 * np.pi * np.random.RandomState(5).rand(cells[0] + 1, cells[1] + 1)
    angles[1, :cells[0] + 1, :cells[1] + 1] = torch.from_numpy(theirs)
    y, x = torch.meshgrid(*(torch.arange(64) * (c / 64) for c in cells), indexing="ij")
    noise = gradient_noise(y.expand(2, -1, -1), x.expand(2, -1, -1), angles)[1]
    check(noise, mean, std, values, abs=1e-5)
    assert (noise > 0.5).float().mean().item() == share


# ---------------------------------------------------------------------------------------------------------------------
# Noise and masks


def slow_noise(y: float, x: float, angles: np.ndarray) -> float:
    """The noise at one place by its definition, in float64: a weighted sum over four corners."""
    total = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            weight = 1.0
            for t in (abs(y - row), abs(x - column)):
                weight *= 1 - (6 * t ** 5 - 15 * t ** 4 + 10 * t ** 3)
            total += weight * (math.cos(angles[row, column]) * (y - row) + math.sin(angles[row, column]) * (x - column))
    return math.sqrt(2) * total


@pytest.mark.parametrize("height, width", [(37, 51), (64, 32), (1, 7)])
def test_noise_of_any_size_equals_the_definition(height, width):
    """Each pixel's place is turned about the centre. The noise there follows the definition; outside it is 0."""
    noise = perlin_noise(5, height, width, seeded(3))
    assert noise.shape == (5, height, width)
    generator = seeded(3)
    cells = 2.0 ** torch.randint(0, 6, (2, 5, 1, 1), generator=generator)  # 1, 2, ... 32 cells a side
    angles = 2 * math.pi * torch.rand(5, 33, 33, generator=generator)
    turn = math.pi * torch.rand(5, generator=generator) - math.pi / 2  # up to 90 degrees
    for n in range(5):
        for i in range(0, height, 3):
            for j in range(0, width, 2):
                place = complex(j - (width - 1) / 2, i - (height - 1) / 2) * np.exp(-1j * turn[n].item())
                u, v = place.real + (width - 1) / 2, place.imag + (height - 1) / 2
                edge = min(v, u, height - 1 - v, width - 1 - u)
                if abs(edge) < 1e-3:
                    continue  # on the border, where rounding decides
                expected = 0.0 if edge < 0 else slow_noise(v * cells[0, n].item() / height,
                                                           u * cells[1, n].item() / width, angles[n].numpy())
                assert noise[n, i, j].item() == pytest.approx(expected, abs=2e-4)


def test_masks_of_many_draws_cover_as_much_as_the_authors():
    """2,000 masks of the authors' code at 256 x 256 have a mean area of 4.83 %; 5.4 % of them are empty."""
    generator, error = seeded(0), math.sqrt(1 / 1600 + 1 / 2000)  # a lattice spans the image, so any size will do
    areas = torch.cat([perlin_mask(20, 128, 128, generator, 0, 0.5).flatten(1).mean(1) for _ in range(80)])
    assert areas.std() < 0.04 and areas.mean().item() == pytest.approx(0.0483, abs=3 * areas.std().item() * error)
    assert (areas == 0).float().mean().item() == pytest.approx(0.054, abs=3 * math.sqrt(0.054 * 0.946) * error)


# ---------------------------------------------------------------------------------------------------------------------
# Augmentations, on levels 0..255, against Pillow and loops over pixels


def test_gamma_brightness_and_invert():
    x, u = tensor(pixels(0, 9, 7, 3), pixels(1, 9, 7, 3)), torch.tensor([(0.0, 0.5, 1.0), (0.2, 0.3, 0.4)])
    out, bright, inverse = draem.gamma(x, u), draem.brightness(x, u), draem.invert(x, u)
    for n, c, i, j in np.ndindex(2, 3, 9, 7):
        value = x[n, c, i, j].item()
        assert out[n, c, i, j].item() == pytest.approx(value ** (0.5 + 1.5 * u[n, c].item()), abs=1e-5)  # 0.5 to 2
        level = 255 * value * (0.8 + 0.4 * u[n, 0].item()) + 60 * u[n, 1].item() - 30  # 0.8 to 1.2, -30 to 30
        assert bright[n, c, i, j].item() == pytest.approx(min(max(level, 0), 255) / 255, abs=1e-5)
        assert inverse[n, c, i, j].item() == pytest.approx(1 - value)


def test_sharpness_is_pillows():
    pictures, u = [pixels(n, 20, 24, 3) for n in range(4)], torch.tensor([[0.0], [0.35], [0.5], [0.95]])
    out = draem.sharpness(tensor(*pictures), u)
    for n, picture in enumerate(pictures):
        expected = tensor(ImageEnhance.Sharpness(Image.fromarray(picture)).enhance(2 * u[n, 0].item()))[0]
        close(out[n, :, 1:-1, 1:-1], expected[:, 1:-1, 1:-1], rtol=0, atol=1.6 / 255)  # Pillow rounds twice
    flat = torch.full((1, 3, 5, 5), 0.25)
    close(draem.sharpness(flat, torch.tensor([[0.9]])), flat)  # borders too


def test_hue_saturation_is_colorsys():
    pictures = [pixels(n, 6, 8, 3) for n in range(5)]
    pictures[0][0, :4] = [(0, 0, 0), (255, 255, 255), (9, 9, 9), (255, 0, 255)]
    u = torch.tensor([(0.5, 0.5), (0.0, 0.5), (1.0, 0.5), (0.3, 0.0), (0.9, 1.0)])
    out = draem.hue_saturation(tensor(*pictures), u)
    for n, i, j in np.ndindex(5, 6, 8):
        hue, saturation, value = colorsys.rgb_to_hsv(*(pictures[n][i, j] / 255))
        shift_hue, shift_saturation = ((2 * u[n, k].item() - 1) * 50 / 255 for k in (0, 1))
        expected = colorsys.hsv_to_rgb((hue + shift_hue) % 1, min(max(saturation + shift_saturation, 0), 1), value)
        close(out[n, :, i, j], torch.tensor(expected).float(), rtol=0, atol=2e-5)


def test_solarize_and_posterize_are_pillows():
    picture = Image.fromarray(np.arange(768).reshape(16, 16, 3).astype(np.uint8))  # all levels
    u = torch.tensor([(0.1, 0.0), (0.49, 0.5), (0.3, 1.0), (0.5, 0.0)])
    out = draem.solarize(tensor(*[picture] * 4), u)
    for n, threshold in enumerate((32, 80, 128, 256)):
        close(out[n:n + 1], tensor(ImageOps.solarize(picture, threshold)))
    out = draem.posterize(tensor(*[picture] * 8), 0.14 * torch.arange(8.0).view(8, 1))
    for n in range(8):
        close(out[n:n + 1], tensor(ImageOps.posterize(picture, n + 1)))


def odd_pictures() -> list[np.ndarray]:
    """Pictures with difficult histograms: few levels, one level, gaps, one dominant level."""
    rng = np.random.RandomState(7)
    heavy = np.where(rng.rand(40, 40, 3) < 0.9, 200, rng.randint(0, 256, (40, 40, 3)))
    return [pixels(0, 40, 40, 3), heavy.astype(np.uint8), np.full((40, 40, 3), 77, np.uint8),
            rng.choice([3, 90, 91, 255], (40, 40, 3)).astype(np.uint8), (pixels(1, 40, 40, 3) // 4 + 60)]


@pytest.mark.parametrize("cutoff", [0, 1, 7, 20])
def test_autocontrast_is_pillows(cutoff):
    pictures = odd_pictures()
    out = draem.autocontrast(tensor(*pictures), torch.full((5, 1), (cutoff + 0.5) / 21))
    for n, picture in enumerate(pictures):
        expected = tensor(ImageOps.autocontrast(Image.fromarray(picture), cutoff))[0]
        close(out[n], expected, rtol=0, atol=1.001 / 255)  # Pillow drops fractions
        assert (out[n] >= expected - 1e-5).all()


def test_equalize_is_pillows():
    pictures = odd_pictures()
    out = draem.equalize(tensor(*pictures), torch.zeros(5, 0))
    close(out, tensor(*(ImageOps.equalize(Image.fromarray(picture)) for picture in pictures)), rtol=0, atol=1e-6)


def test_rotate_is_pillows_clockwise():
    smooth = np.array(Image.fromarray(pixels(0, 6, 8, 3)).resize((64, 48), Image.BICUBIC))
    degrees = torch.tensor([0.0, 30.0, -45.0, 90.0, 180.0])
    out = rotate(tensor(*[smooth] * 5), degrees)
    close(out[0], tensor(smooth)[0], rtol=0, atol=1e-4)
    for n, angle in enumerate(degrees.tolist()):
        expected = tensor(Image.fromarray(smooth).rotate(-angle, Image.BILINEAR))[0]
        apart = (out[n] - expected).abs()
        assert apart.mean() < 0.01 and (apart.amax(0) > 0.02).float().mean() < 0.06  # Pillow cuts the rim, unblended
    square = tensor(pixels(3, 33, 33, 3))
    close(rotate(square, torch.tensor([90.0])), square.rot90(-1, (2, 3)), rtol=0, atol=1e-4)
    turned = draem.rotate_texture(square.expand(2, -1, -1, -1), torch.tensor([[0.0], [0.75]]))
    close(turned, rotate(square.expand(2, -1, -1, -1), torch.tensor([-45.0, 22.5])))


def test_augmentations_stay_in_range_and_leave_their_arguments_alone():
    x, u = image(0, 6, 3, 17, 23), image(1, 6, 3)
    x[0], x[1], u[2], u[3] = 0, 1, 0, 1 - 2 ** -24
    versions = x._version, u._version
    for augmentation in AUGMENTATIONS:
        out = augmentation(x, u)
        assert out.shape == x.shape and out.dtype == torch.float32 and out.min() >= 0 and out.max() <= 1 + 1e-6
    assert (x._version, u._version) == versions


class OnGPU(torch.Tensor):
    """A CPU tensor that claims to be on a GPU."""
    is_cuda = True


@pytest.mark.parametrize("chosen", [[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
def test_apply_where_changes_the_chosen_alone_on_a_cpu_and_on_a_gpu(chosen):
    chosen, x, u, seen = torch.tensor(chosen).bool(), image(0, 4, 3, 5, 5), image(1, 4, 3), []

    def function(x, u):
        seen.append(len(x))
        return x * u[:, :1, None, None] + 1

    expected = torch.stack([x[n] * u[n, 0] + 1 if chosen[n] else x[n] for n in range(4)])
    assert torch.equal(apply_where(chosen, function, x, u), expected)
    assert seen == [chosen.sum().item()] * bool(chosen.any())  # on a CPU the others cost no work
    assert torch.equal(apply_where(chosen, function, x.as_subclass(OnGPU), u).as_subclass(torch.Tensor), expected)
    assert seen[-1] == 4 and torch.equal(x, image(0, 4, 3, 5, 5))


def test_a_texture_gets_three_different_augmentations_of_all_ten_evenly(monkeypatch):
    """Stand-ins for the ten record their samples and draws, and add 10,000 times their own number."""
    count, drawn = 4000, [[] for _ in range(4000)]

    def recorder(k):
        def function(x, u):
            for sample, numbers in zip(x[:, 0, 0, 0].long().tolist(), u.tolist()):
                drawn[sample % 10000].append((k, *numbers))
            return x + 10000 * k
        return function

    assert len(AUGMENTATIONS) == 10
    monkeypatch.setattr(draem, "AUGMENTATIONS", tuple(recorder(k) for k in range(10)))
    texture = torch.arange(float(count)).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    out = augment_textures(texture, seeded())
    drawn = np.array(drawn)  # (samples, 3 augmentations, number and three draws)
    numbers = drawn[:, :, 0].astype(int)
    assert drawn.shape == (count, 3, 4) and all(len(set(row)) == 3 for row in numbers.tolist())
    assert np.array_equal(out[:, 2, 0, 0].numpy(), np.arange(count) + 10000 * numbers.sum(1))
    for counts in (np.bincount(column, minlength=10) for column in numbers.T):  # first, second and third
        assert ((counts - 400) ** 2 / 400).sum() < 27.9  # 9 degrees of freedom: 0.1 % exceed 27.9
    u = drawn[:, :, 1:].reshape(count, 9)
    assert max(uniform_chi_square(column, 0, 1) for column in u.T) < 26
    assert np.abs(np.corrcoef(u.T) - np.eye(9)).max() < 0.08  # no draw is used twice


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def slow_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """1 - mean SSIM of (C, H, W). Each pixel's 11 x 11 window is summed alone, with 0 beyond the border."""
    offset = np.arange(-5, 6)
    weight = np.exp(-(offset[:, None] ** 2 + offset ** 2) / (2 * 1.5 ** 2))
    weight /= weight.sum()
    a, b = (np.lib.stride_tricks.sliding_window_view(np.pad(v.astype(np.float64), ((0, 0), (5, 5), (5, 5))), (11, 11),
                                                     (1, 2)) for v in (x, y))
    mean_a, mean_b, aa, bb, ab = ((weight * v).sum((3, 4)) for v in (a, b, a * a, b * b, a * b))
    means = (2 * mean_a * mean_b + 0.01 ** 2) / (mean_a ** 2 + mean_b ** 2 + 0.01 ** 2)
    spreads = (2 * (ab - mean_a * mean_b) + 0.03 ** 2) / (aa - mean_a ** 2 + bb - mean_b ** 2 + 0.03 ** 2)
    return (1 - means * spreads).mean()


@pytest.mark.parametrize("height, width", [(20, 27), (4, 9)])
def test_ssim_equals_the_loop(height, width):
    x, y = image(0, 2, 3, height, width), image(1, 2, 3, height, width)
    y[1] = 0.9 * x[1] - 0.7  # values below -0.5 must not change the range
    expected = np.mean([slow_ssim(a.numpy(), b.numpy()) for a, b in zip(x, y)])
    assert ssim_loss(x, y).item() == pytest.approx(expected, abs=2e-6)
    assert ssim_loss(x, x).item() == pytest.approx(0, abs=1e-6)
    strided = x.to(memory_format=torch.channels_last), y.to(memory_format=torch.channels_last)
    assert ssim_loss(*strided).item() == pytest.approx(expected, abs=2e-6)


def slow_focal(difference: float, truth: float) -> float:
    """-(1 - p)^2 log p with p = (1 - 1e-5) q + 1e-5 (1 - q) + 1e-5 and q the true class's probability."""
    q = 1 / (1 + math.exp(-difference if truth else difference))
    p = (1 - 1e-5) * q + 1e-5 * (1 - q) + 1e-5
    return -(1 - p) ** 2 * math.log(p)


def test_focal_loss_in_closed_form():
    for difference in (-30.0, -2.0, 0.0, 1.5, 30.0):
        for truth in (0.0, 1.0):
            logits = torch.tensor([3.0, 3.0 + difference]).view(1, 2, 1, 1).expand(2, 2, 5, 7)
            value = focal_loss(logits, torch.full((2, 1, 5, 7), truth)).item()
            assert value == pytest.approx(slow_focal(difference, truth), rel=1e-4, abs=1e-9)
    wrong = torch.tensor([-40.0, 40.0]).view(1, 2, 1, 1).expand(1, 2, 8, 8).clone().requires_grad_()
    loss = focal_loss(wrong, torch.zeros(1, 1, 8, 8))  # a normal image, all marked; anomalib's loss is 0
    assert loss.item() == pytest.approx(-(1 - 2e-5) ** 2 * math.log(2e-5), rel=1e-5)
    loss.backward()
    assert wrong.grad.isfinite().all()


def test_losses_under_autocast_are_float32s():
    x, y = image(0, 2, 3, 32, 32), image(1, 2, 3, 32, 32).bfloat16()
    logits, mask = 4 * image(2, 2, 2, 32, 32).bfloat16(), (image(3, 2, 1, 32, 32) > 0.7).float()
    block, inputs = fill(SSPCAB(8)).train(), image(4, 1, 8, 8, 8)
    plain = draem_loss(x, y.float(), logits.float(), mask)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = draem_loss(x, y, logits, mask)
        out = block(inputs)
        terms = filled(True).train().losses(x, None, seeded())
    assert all(torch.equal(plain[k], mixed[k]) for k in plain)
    assert out.dtype == torch.bfloat16
    assert block.cost.item() == pytest.approx(((out.double() - inputs) ** 2).mean().item())
    assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())


# ---------------------------------------------------------------------------------------------------------------------
# The recipe: what a training step turns, blends, masks and sums


def slow_turn(x: torch.Tensor, degrees: float) -> torch.Tensor:
    """(3, H, W) turned clockwise by an affine matrix."""
    c, s, ratio = math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), x.shape[1] / x.shape[2]
    grid = F.affine_grid(torch.tensor([[[c, s * ratio, 0], [-s / ratio, c, 0]]]), [1, *x.shape], align_corners=False)
    return F.grid_sample(x[None], grid, align_corners=False)[0]


@pytest.mark.parametrize("sspcab", [False, True])
def test_losses_equal_a_slow_version_step_by_step(sspcab, monkeypatch):
    for knob, value in (("rotation_share", 0.6), ("noise_threshold", 0.3), ("ssim_lambda", 3.0)):
        monkeypatch.setitem(PUBLISHED, knob, value)
    model = filled(sspcab, beta=(0.2, 0.7), rotation=30.0, sspcab_lambda=0.25).train()
    x, texture, seen = image(0, 6, 3, 32, 32), image(1, 6, 3, 32, 32), {}
    block = model.reconstructive_subnetwork.encoder.block5
    model.register_forward_hook(lambda _, inputs, outputs: seen.update(augmented=inputs[0], outputs=outputs))
    block.register_forward_hook(lambda _, inputs, output: seen.update(apart=output - inputs[0]))
    terms = model.losses(x, texture, seeded(22))
    assert list(terms) == ["l2", "ssim", "focal"] + ["sspcab"] * sspcab
    assert torch.equal(x, image(0, 6, 3, 32, 32)) and torch.equal(texture, image(1, 6, 3, 32, 32))

    generator = seeded(22)
    chosen, degrees = torch.rand(6, generator=generator) < 0.6, 60 * torch.rand(6, generator=generator) - 30
    normal = torch.stack([slow_turn(x[n], degrees[n].item()) if chosen[n] else x[n] for n in range(6)])
    anomalous = torch.rand(6, 1, 1, generator=generator) >= 0.5
    mask = ((perlin_noise(6, 32, 32, generator) > 0.3) & anomalous)[:, None].float()
    assert 0 < chosen.sum() < 6 and 0 < anomalous.sum() < 6 and mask.any()
    texture = augment_textures(texture, generator)
    beta = 0.2 + 0.5 * torch.rand(6, 1, 1, 1, generator=generator)
    augmented = (1 - mask) * normal + (1 - beta) * (mask * normal) + beta * (mask * texture)  # Eq. (4)
    close(seen["augmented"], augmented, rtol=0, atol=1e-5)
    reconstruction, logits = (output.detach().double().numpy() for output in seen["outputs"])
    assert terms["l2"].item() == pytest.approx(((reconstruction - normal.numpy()) ** 2).mean(), rel=1e-4)
    costs = [slow_ssim(normal[n].numpy(), reconstruction[n]) for n in range(6)]
    assert terms["ssim"].item() == pytest.approx(3 * np.mean(costs), rel=1e-4)
    costs = [slow_focal(d, m) for d, m in zip((logits[:, 1] - logits[:, 0]).flat, mask.flatten().tolist())]
    assert terms["focal"].item() == pytest.approx(np.mean(costs), rel=1e-4)
    if sspcab:
        assert terms["sspcab"].item() == pytest.approx(0.25 * (seen["apart"] ** 2).mean().item(), rel=1e-4)


def fed(seed: int, x: torch.Tensor, texture: torch.Tensor | None, **knobs) -> torch.Tensor:
    """The augmented images that `losses` gives a model of these knobs. No network runs."""
    model, seen = DraemModel(2, **knobs), []
    model.forward = lambda augmented: seen.append(augmented) or (augmented, augmented[:, :2])
    model.losses(x, texture, seeded(seed))
    return seen[0]


def test_a_marked_texture_is_found_under_the_mask_and_nowhere_else(monkeypatch):
    """beta is the texture's share, not the image's, so at least 0.1 of the texture shows."""
    monkeypatch.setattr(draem, "augment_textures", lambda texture, generator: texture)
    black, white = torch.zeros(1000, 3, 16, 16), torch.ones(1000, 3, 16, 16)
    generator = seeded(1)
    torch.rand(2, 1000, generator=generator)  # rotate_normals' draws
    anomalous = torch.rand(1000, generator=generator) >= 0.5
    noise = perlin_noise(1000, 16, 16, generator) > 0.5
    expected = noise & anomalous.view(-1, 1, 1)
    augmented = fed(1, black, white)
    assert torch.equal(augmented > 0, expected[:, None].expand(-1, 3, -1, -1))
    assert anomalous.float().mean().item() == pytest.approx(0.5, abs=3 * 0.5 / math.sqrt(1000))
    marked = expected.flatten(1).any(1)
    beta = augmented.amax((1, 2, 3))[marked]  # white over black has the value beta
    close(augmented[marked], expected[marked][:, None] * beta.view(-1, 1, 1, 1).expand(-1, 3, -1, -1))
    assert uniform_chi_square(beta.numpy(), 0.1, 1.0) < 20.5
    for share in (0.3, 1.0, 0.0):
        close(fed(1, black, white, beta=(share, share)), share * expected[:, None].float().expand(-1, 3, -1, -1))
    out, mask = synthesize_anomalies(black, white, seeded(1), (0.3, 0.3), 0.0)
    assert (out.amax((1, 2, 3)) > 0).sum() == mask.amax((1, 2, 3)).sum() > 1.7 * marked.sum()
    assert not synthesize_anomalies(black, white, seeded(1), normal_share=1.0)[0].any()


def test_without_textures_noise_between_two_colours_is_blended_in():
    leaf, generator = image(0, 8, 3, 64, 64).requires_grad_(), seeded(3)
    augmented, mask = synthesize_anomalies(leaf, None, seeded(3), normal_share=0)
    assert not augmented.requires_grad and augmented.min() >= 0 and augmented.max() <= 1
    torch.rand(8, generator=generator)  # decides which are anomalous: here all
    assert torch.equal(mask[:, 0] == 1, perlin_noise(8, 64, 64, generator) > 0.5)
    share = (perlin_noise(8, 64, 64, generator)[:, None] + 1) / 2
    one, other = torch.rand(2, 8, 3, 1, 1, generator=generator)
    texture = augment_textures(((1 - share) * one + share * other).clamp(0, 1), generator)
    beta = 0.1 + 0.9 * torch.rand(8, 1, 1, 1, generator=generator)
    apart = (augmented - (leaf + mask * beta * (texture - leaf))).abs()
    assert (apart > 1e-5).float().mean() < 1e-3  # rounding can move a pixel to another level


def test_30_percent_of_the_normal_images_are_turned_by_up_to_45_degrees():
    """The slope of a ramp shows its angle. With beta = 0 the model gets the turned image itself."""
    count = 1500
    ramp = torch.linspace(0, 1, 16).expand(count, 3, 16, 16)

    def angles(x):
        centre = x[:, 0, 6:10, 6:10].double()
        slopes = (centre.diff(dim=dim).mean((1, 2)) for dim in (1, 2))
        return np.degrees(np.arctan2(*(slope.numpy() for slope in slopes)))

    for limit, knobs in ((45, {}), (20, {"rotation": 20.0})):
        degrees = angles(fed(0, ramp, None, beta=(0, 0), **knobs))
        turned = degrees[np.abs(degrees) > 1e-3]
        assert len(turned) / count == pytest.approx(0.3, abs=3 * math.sqrt(0.21 / count))
        assert uniform_chi_square(turned, -limit - 0.05, limit + 0.05) < 20.5
    close(fed(0, ramp, None, beta=(0, 0), rotation=0), ramp, rtol=0, atol=1e-5)
    assert (np.abs(angles(rotate_normals(ramp, seeded(), 45, 1.0))) > 1e-3).mean() > 0.99
    assert torch.equal(rotate_normals(ramp, seeded(), 45, 0.0), ramp)


def test_initial_weights():
    """As in the code: convolutions N(0, 0.02), batch norms N(1, 0.02) with bias 0. Convolution biases are PyTorch's."""
    torch.manual_seed(0)
    for module in DraemModel(16, True).modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 2000:
            assert abs(module.weight.mean().item()) < 0.002
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert 0 < module.bias.abs().max() <= 1 / math.sqrt(module.weight[0].numel())
        if isinstance(module, torch.nn.BatchNorm2d) and module.weight.numel() > 60:
            assert abs(module.weight.mean().item() - 1) < 0.01
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.35) and not module.bias.any()


TRAINS = """
import sys
sys.path.insert(0, "")
import torch
from draem import PUBLISHED, DraemModel
torch.manual_seed(0)
PUBLISHED["lr"], history = 2e-3, []
ramp = torch.linspace(0, 9, 32)
image = torch.stack((ramp.sin().expand(32, 32), ramp.cos().expand(32, 32).T, ramp.expand(32, 32) / 9 - 0.5))
image, texture = image.expand(8, 3, 32, 32) / 2 + 0.5, torch.rand(8, 3, 32, 32)
{start}
for _ in range(20):
{step}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer.zero_grad()
    history.append(sum(terms.values()).item())
assert sum(history[-5:]) / 5 < 0.7 * sum(history[:3]) / 3, history
result = model.eval().predict(image)
assert result["score"].shape == (8,) and result["anomaly_map"].shape == (8, 32, 32)
assert 0 <= result["anomaly_map"].min() and result["anomaly_map"].max() <= 1
assert not {{"PIL", "common", "dsr", "dfm", "train", "golden", "torchvision"}} & set(sys.modules)
"""


def test_the_five_lines_of_the_docstring_train_in_an_empty_folder(tmp_path):
    shutil.copy(draem.__file__, tmp_path)
    lines = textwrap.dedent(draem.__doc__.split("Five lines train it:\n\n")[1].split("\n\n")[0]).split("\n")
    assert len(lines) == 5 and "DraemModel()" in lines[0]
    start = "\n".join(lines[:2]).replace("DraemModel()", "DraemModel(4, sspcab=True)")
    code = TRAINS.format(start=start, step=textwrap.indent("\n".join(lines[2:]), "    "))
    result = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True,
                            text=True, timeout=100)
    assert result.returncode == 0, result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Prediction


@pytest.mark.parametrize("height, width, window", [(256, 256, 21), (256, 288, 21), (128, 128, 11), (96, 64, 5),
                                                   (32, 32, 3)])
def test_the_scores_window_is_21_at_256_and_in_proportion(height, width, window):
    """A single 1 has the mean 1 / window^2, in a corner too: outside is 0. Two add up if at most window - 1 apart."""
    maps = torch.zeros(5, height, width)
    maps[0, 16, 16] = maps[1, 0, 0] = maps[2, -1, -1] = 1
    maps[3, 0, 5] = maps[3, window - 1, 5] = maps[4, 5, 0] = maps[4, 5, window] = 1
    close(mean_filter_maximum(maps), torch.tensor([1.0, 1.0, 1.0, 2.0, 1.0]) / window ** 2)
    close(mean_filter_maximum(maps[:3], 7), torch.full((3,), 1 / 49))


@pytest.mark.parametrize("change, words", [
    (lambda x: (255 * x).byte(), "uint8"), (lambda x: x[:, :1], "1, 64, 96"), (lambda x: x[0], "3, 64, 96"),
    (lambda x: x[:0], "0, 3, 64, 96"), (lambda x: x[:, :, :63], "63, 96"), (lambda x: x[..., :80], "64, 80"),
    (lambda x: x[:, :, :0], "0, 96"), (lambda x: 255 * x, "found .* to 25"), (lambda x: x - 0.01, "-0.0"),
    (lambda x: x + 0.01, "to 1.0"), (lambda x: (x - 0.485) / 0.229, "do not normalize"),
    (lambda x: torch.full_like(x, math.nan), "nan")])
def test_predict_refuses_what_is_no_image(change, words):
    x = image(0, 2, 3, 64, 96)
    with pytest.raises(ValueError, match=f"^image: .*{words}"):
        filled().predict(change(x))
    assert filled().predict(x * 1.0005 - 2e-4)["score"].isfinite().all()  # rounding is accepted


def test_predict_needs_eval_mode_and_gives_float32_without_gradients():
    model, x = filled(), image(0, 2, 3, 32, 32)
    with pytest.raises(RuntimeError, match="eval"):
        model.train().predict(x)
    with torch.autocast("cpu", torch.bfloat16):
        result = model.eval().predict(x)
    assert result["score"].dtype == result["anomaly_map"].dtype == torch.float32
    assert not any(value.requires_grad for value in result.values())
    close(result["anomaly_map"], model.predict(x)["anomaly_map"], rtol=0, atol=0.02)
    close(model.predict(x.double()), model.predict(x), rtol=0, atol=0)  # float64 too


class Predict(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        return self.model.predict(image)


@pytest.mark.filterwarnings("ignore")
def test_predict_can_be_exported_and_traced_for_any_batch():
    model, x = filled(True), image(0, 2, 3, 64, 64)
    batch = {"image": {0: torch.export.Dim("batch", min=1, max=64)}}
    exported = torch.export.export(Predict(model), (x,), dynamic_shapes=batch)
    traced = torch.jit.trace(Predict(model), x, strict=False)
    for count in (1, 4):
        x = image(count, count, 3, 64, 64)
        for program in (exported.module(), traced):
            close(dict(program(x)), model.predict(x), rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def own(model: DraemModel, /, **changes) -> dict:
    return {"method": "draem", "settings": model.settings, "reading": {"size": 64, "antialias": True},
            "model": model.state_dict()} | changes


def authors(folder: Path, model: DraemModel) -> Path:
    """Saves a pair of files as the authors release them; their networks see BGR. Returns the first path."""
    torch.save(model.discriminative_subnetwork.state_dict(), folder / "DRAEM_0.0001_bottle__seg.pckl")
    torch.save(model.reconstructive_subnetwork.state_dict(), folder / "DRAEM_0.0001_bottle_.pckl")
    return folder / "DRAEM_0.0001_bottle_.pckl"


def anomalibs(model: DraemModel, **more) -> dict:
    state = {"model." + key: value for key, value in model.state_dict().items()} | {"loss.weight": torch.zeros(2)}
    return {"state_dict": state, "epoch": 3, "hyper_parameters": {"sspcab": False}} | more


@pytest.mark.parametrize("sspcab", [False, True])
def test_this_projects_checkpoint_brings_its_settings_and_reading(sspcab, tmp_path, capsys):
    model, x = filled(sspcab, beta=[0.3, 0.4], rotation=10.0, sspcab_lambda=0.7), image(0, 4, 3, 32, 64)
    torch.save(own(model), tmp_path / "last.pt")
    loaded = load(str(tmp_path / "last.pt"))
    assert not loaded.training and loaded.reading == {"size": 64, "antialias": True}
    assert loaded.settings == {"width": 8, "sspcab": sspcab, "beta": (0.3, 0.4), "rotation": 10.0,
                               "sspcab_lambda": 0.7}
    close(loaded.predict(x), model.predict(x), rtol=0, atol=0)
    close(loaded.train().losses(x, None, seeded()), model.train().losses(x, None, seeded()), rtol=0, atol=0)
    assert capsys.readouterr() == ("", "")


def test_the_authors_pair_gives_on_rgb_what_it_gave_on_bgr(tmp_path, monkeypatch):
    model, bgr = filled(), image(0, 2, 3, 64, 64)
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")  # saved on a GPU
    loaded = load(authors(tmp_path, model))
    assert not loaded.training and loaded.reading == {"size": 256, "antialias": False}
    (reconstruction, logits), (rgb, same) = model(bgr), loaded(bgr.flip(1))
    close((rgb.flip(1), same), (reconstruction, logits), rtol=0, atol=1e-5)
    assert (loaded(bgr)[1] - logits).abs().max() > 1e-3  # these weights depend on the order


def test_anomalibs_second_network_saw_the_image_first(tmp_path, capsys):
    model, x = filled(), image(0, 2, 3, 64, 64)
    torch.save(anomalibs(model), tmp_path / "model.ckpt")
    loaded, reconstruction = load(tmp_path / "model.ckpt"), model.reconstructive_subnetwork(x)
    logits = model.discriminative_subnetwork(torch.cat((x, reconstruction), 1))
    close(loaded(x), (reconstruction, logits), rtol=0, atol=1e-5)
    assert not loaded.training and capsys.readouterr() == ("", "")


def test_anomalibs_sspcab_looks_its_four_ways_and_is_announced(tmp_path, capsys):
    """masked_conv1 to 4 look up-left, up-right, down-left, down-right; each passes its own 16 channels here."""
    content, head = anomalibs(filled(True)), "model." + FIRST + "encoder.block5."
    state = {key: value for key, value in content["state_dict"].items() if not key.startswith(head)}
    for k in range(4):
        state[f"{head}masked_conv{k + 1}.weight"] = torch.diag((torch.arange(64) // 16 == k).float())[..., None, None]
        state[f"{head}masked_conv{k + 1}.bias"] = torch.zeros(64)
    for name, rows, columns in (("fc1", 8, 64), ("fc2", 64, 8)):  # zeros: each channel's weight is sigmoid(0) = 1/2
        state[f"{head}attention_module.{name}.weight"] = torch.zeros(rows, columns)
        state[f"{head}attention_module.{name}.bias"] = torch.zeros(rows)
    torch.save(content | {"state_dict": state}, tmp_path / "model.ckpt")
    loaded, x = load(tmp_path / "model.ckpt"), image(0, 1, 64, 6, 6)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "model.ckpt: " in err and "SSPCAB" in err and "ReLU" in err
    padded = np.pad(x[0].numpy(), ((0, 0), (2, 2), (2, 2)))
    expected = [padded[16 * k:16 * k + 16, down:down + 6, right:right + 6] / 2
                for k, (down, right) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)])]
    close(loaded.reconstructive_subnetwork.encoder.block5(x)[0], torch.from_numpy(np.concatenate(expected)))


@pytest.mark.parametrize("steps, size", [
    ([("Resize", {"size": [320, 320], "antialias": True}), ("Normalize", {"mean": [0.5] * 3})], 320),
    ([("CenterCrop", {"size": [64, 64]}), ("Resize", {"size": 128})], 128), ([], 256), (None, 256)])
def test_anomalibs_images_are_read_as_its_resize_says(steps, size, tmp_path):
    more = {}
    if steps is not None:
        named = [{"class_path": "torchvision.transforms.v2." + name, "init_args": given} for name, given in steps]
        more = {"anomalib_pre_processor_config": {"transform": {"class_path": "torchvision.transforms.v2.Compose",
                                                                "init_args": {"transforms": named}}}}
    torch.save(anomalibs(DraemModel(2), **more), tmp_path / "model.ckpt")
    assert load(tmp_path / "model.ckpt").reading == {"size": size, "antialias": True}


def pretended(patch, module: str, name: str, base: type = object) -> type:
    """A class of that name in a stand-in module, importable until `patch` is undone."""
    parts = module.split(".")
    for k in range(len(parts)):
        patch.setitem(sys.modules, ".".join(parts[:k + 1]), ModuleType(parts[k]))
    made = type(name, (base,), {"__module__": module})
    setattr(sys.modules[module], name, made)
    return made


class Call:
    """Unpickling it calls a function."""

    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


def test_a_file_that_names_torchvisions_transforms_is_read_without_torchvision(tmp_path, monkeypatch):
    """anomalib 1.x pickled its transform: nested modules, and an enum made by a call."""
    model, x = filled(), image(0, 1, 3, 32, 32)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")  # saved on a GPU
        compose = pretended(patch, "torchvision.transforms.v2._container", "Compose", torch.nn.Module)()
        compose.resize = pretended(patch, "torchvision.transforms.v2._geometry", "Resize", torch.nn.Module)()
        compose.mode = Call(pretended(patch, "torchvision.transforms.functional", "InterpolationMode"), "bilinear")
        torch.save(anomalibs(model, transform=compose), tmp_path / "model.ckpt")
    monkeypatch.setitem(sys.modules, "torchvision", None)  # importing it fails
    before = torch.serialization.get_safe_globals()
    close(load(tmp_path / "model.ckpt").predict(x)["reconstruction"], model.predict(x)["reconstruction"])
    assert set(torch.serialization.get_safe_globals()) == set(before)


def refusal(path: Path) -> str:
    """The one-line message of load's ValueError, which begins with the file's folder."""
    with pytest.raises(ValueError) as error:
        load(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path.parent))
    return str(error.value)


def test_a_files_code_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, path = anomalibs(DraemModel(2)), tmp_path / "model.ckpt"
    with monkeypatch.context() as patch:
        resize = pretended(patch, "torchvision.transforms.v2", "Resize")()
        for call in (Call(eval, "open('ran', 'w')"), Call(os.system, "touch ran"), Call(os.mkdir, "ran"),
                     Call(getattr, {}, "keys"), pretended(patch, "torchvision.transformsevil", "Resize")()):
            torch.save(content | {"transform": call, "more": resize}, path)
            assert "holds more than tensors and could run code" in refusal(path)
            path.write_bytes(pickle.dumps(call, 2))
            refusal(path)
        torch.save({"model": pretended(patch, "anomalib.models.image", "Draem")(), "transform": resize}, path)
        assert "an export of anomalib" in refusal(path) and "give the .ckpt" in refusal(path)
    assert not (tmp_path / "ran").exists()


def test_what_does_not_fit_is_refused_in_one_line(tmp_path):
    model, path = filled(), tmp_path / "other.pt"
    state, bias, conv = model.state_dict(), FIRST + "decoder.fin_out.0.bias", FIRST + "encoder.block1.0.weight"
    theirs, seg_conv = anomalibs(model)["state_dict"], f"model.{SECOND}encoder_segment.block1.0.weight"
    for content, words in [
            (own(model, method="dsr"), "a checkpoint of dsr, not of draem"),
            (own(model, model={k: v for k, v in state.items() if k != bias}), bias),
            (own(model, model=state | {"extra": torch.zeros(1)}), "extra"),
            (own(model, model=state | {bias: torch.zeros(4)}), bias),
            (own(model, model=state | {bias: torch.tensor([0, math.nan, 0])}), "NaN or infinity"),
            (own(model, model=state | {bias: torch.tensor([0, math.inf, 0])}), "NaN or infinity"),
            (own(model, model=state | {bias: 3}), "does not fit DraemModel"),
            (own(model, settings={"widht": 8}), "widht"),
            (own(model, settings=model.settings | {"width": 12}), "size mismatch"),
            ({"state_dict": {"model." + conv: state[conv]}}, "Missing key"),
            *[({"state_dict": theirs | {seg_conv: value}}, "does not fit")
              for value in (torch.zeros(4), torch.zeros(4, 3, 3, 3), 3)],
            ({"weights": 1, "more": 2}, "it begins with weights, more"), ({}, "neither this project's checkpoint"),
            ({"state_dict": 3}, "found int"), ({"state_dict": {1: state[conv]}}, "tensors by name"),
            (own(model, model=3), "lacks the model"),
            (model.discriminative_subnetwork.state_dict(), "the authors' first file"),
            ([1, 2], "found list"), (torch.zeros(3), "found Tensor")]:
        torch.save(content, path)
        assert words in refusal(path)
    assert "No such file" in refusal(tmp_path / "none.pckl") and "directory" in refusal(tmp_path)
    whole = path.read_bytes()
    for content in (b"", b"hello", b"\x89PNG\r\n\x1a\n" + bytes(50), whole[:100], whole[:-200], whole[200:]):
        path.write_bytes(content)
        assert "truncated, or not a file of weights" in refusal(path)


def test_a_faulty_pair_is_refused_in_one_line(tmp_path):
    model = filled()
    path = authors(tmp_path, model)
    first, seg = model.reconstructive_subnetwork.state_dict(), tmp_path / "DRAEM_0.0001_bottle__seg.pckl"
    for key, shape in (("encoder.block1.0.weight", (8, 4, 3, 3)), ("encoder.block1.0.weight", (8,)),
                       ("decoder.fin_out.0.bias", (4,)), ("decoder.fin_out.0.weight", (1, 8, 3, 3))):
        torch.save(first | {key: torch.zeros(shape)}, path)
        assert key in refusal(path)
    torch.save(first, path)
    seg.write_bytes(seg.read_bytes()[:1000])
    assert "bottle__seg.pckl: truncated" in refusal(path)
    seg.unlink()
    assert "bottle__seg.pckl: No such file" in refusal(path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_step_never_makes_the_host_wait():
    model, generator = DraemModel(8, True).cuda().train(), seeded(0, "cuda")
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=True)
    normal, texture = image(0, 8, 3, 64, 64).cuda(), image(1, 8, 3, 64, 64).cuda()
    for mode, given in (("default", texture), ("error", texture), ("error", None)):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", torch.bfloat16):
                terms = model.losses(normal, given, generator)
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(term.isfinite() for term in terms.values())
