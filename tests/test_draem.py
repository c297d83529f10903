"""Tests of draem.py. Oracles: the paper's numbers, as literals; recorded figures of the authors' networks, losses,
noise and SSPCAB (golden.py); slow versions in float64 that loop over pixels; Pillow and colorsys; closed forms;
sub-networks wired as anomalib's, for its files."""
import colorsys
import math
import os
import pickle
import runpy
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

import draem
from draem import (AUGMENTATIONS, PUBLISHED, SSPCAB, DiscriminativeSubNetwork, DraemModel, apply_where,
                   augment_textures, draem_loss, focal_loss, learning_rate, load, perlin_noise, rotate, ssim_loss)
from golden import check, fill, image

close = torch.testing.assert_close
FIRST, SECOND = "reconstructive_subnetwork.", "discriminative_subnetwork."


def seeded(seed: int = 0, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def filled(sspcab: bool = False, **settings) -> DraemModel:
    """A small model in eval mode. The golden rule fills each sub-network by its own keys."""
    model = DraemModel(8, sspcab, **settings).eval()
    fill(model.reconstructive_subnetwork)
    fill(model.discriminative_subnetwork)
    return model


def pixels(seed: int, *shape: int) -> np.ndarray:
    """Random levels 0..255: normal around 110, with both ends clipped."""
    return np.random.RandomState(seed).normal(110, 50, shape).clip(0, 255).round().astype(np.uint8)


def tensor(*pictures) -> torch.Tensor:
    """(H, W, 3) of 0..255 to (N, 3, H, W) in [0, 1]."""
    return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures]).float() / 255


# --- Published numbers and recorded figures ---------------------------------------------------------------------------
def test_published_is_the_papers_recipe():
    """Sections 3.3 and 4; size, batch, width, shares, threshold, ssim_lambda and window are the authors' code's."""
    assert PUBLISHED == {
        "size": 256, "batch": 8, "epochs": 700, "lr": 1e-4, "drops": pytest.approx((400 / 700, 600 / 700)),
        "drop_factor": 0.1, "width": 128, "rotate": 45, "rotate_share": 0.3, "normal_share": 0.5, "window": 21,
        "noise_threshold": 0.5, "beta": (0.1, 1.0), "augmentations": 3, "ssim_lambda": 1, "sspcab_lambda": 0.1}
    with torch.device("meta"):
        model = DraemModel()
    assert model.settings == {"width": 128, "sspcab": False, "beta": (0.1, 1.0), "rotate": 45}
    networks = model.reconstructive_subnetwork, model.discriminative_subnetwork
    assert [sum(p.numel() for p in net.parameters()) for net in networks] == [69_048_579, 28_374_146]
    assert [len(net.state_dict()) for net in networks] == [156, 191] and model.preprocessing == {}


@pytest.mark.parametrize("steps, drops", [
    (700, [400, 600]), (18900, [10800, 16200]), (25, [14, 21]), (99, [57, 85]), (9, [5, 8]), (1, [])])
def test_the_rate_drops_after_400_and_600_of_700_epochs(steps, drops):
    """18,900 steps are 700 epochs of 27. With 25 and 99 epochs the code's milestones are no integers and never fire."""
    rates = [learning_rate(step, steps) for step in range(steps)]
    assert [step for step in range(1, steps) if rates[step] != rates[step - 1]] == drops
    assert [rates[0], *(rates[step] for step in drops)] == pytest.approx([1e-4, 1e-5, 1e-6][:len(drops) + 1])
    assert [learning_rate(step, 4, 0.5, (0.5,)) for step in range(4)] == pytest.approx([0.5, 0.5, 0.05, 0.05])
    assert learning_rate(steps, steps, 0.5, ()) == 0.5


def test_networks_give_the_authors_figures():
    model, x = filled(), image(0, 2, 3, 64, 64)
    model.discriminative_subnetwork = fill(DiscriminativeSubNetwork(base_width=8))  # as wide as the first
    result, (reconstruction, logits) = model.predict(x, 21), model(x)
    assert list(result) == ["score", "anomaly_map", "reconstruction"]
    close(result["reconstruction"], reconstruction.detach())
    check(reconstruction, -0.06128573, 0.05027453, [
        -0.0428918, -0.0458431, -0.1286904, -0.0111964, -0.0457614, -0.1284812, -0.0098829, 0.0193940], abs=1e-5)
    check(logits, -0.08118397, 0.12541347, [
        0.12341657, 0.06853306, -0.21700150, -0.13793623, 0.02709839, 0.02373309, -0.13584623, -0.18285418], abs=1e-5)
    check(result["anomaly_map"], 0.44132463, 0.01322174, [
        0.41857743, 0.42041385, 0.44612324, 0.41825533, 0.43192780, 0.45985451, 0.41380078, 0.45663786], abs=1e-5)
    close(result["score"], torch.tensor([0.44406992, 0.44357950]), rtol=0, atol=1e-5)


def test_losses_noise_and_sspcab_give_the_authors_figures():
    a, mask, logits = image(1, 2, 3, 64, 64), (image(3, 2, 1, 64, 64) > 0.8).float(), image(4, 2, 2, 64, 64)
    terms = draem_loss(a, 0.7 * a + 0.3 * image(2, 2, 3, 64, 64), (logits - 0.5) * 6, mask)
    assert list(terms) == ["l2", "ssim", "focal"]
    close(torch.stack([*terms.values()]), torch.tensor([0.01506146, 0.10997969, 0.91657382]), rtol=1e-5, atol=1e-6)
    block, x = fill(SSPCAB(16)), image(6, 2, 16, 12, 12)
    check(block(x), 0.18083029, 0.26313855, [
        0., 0., 0.51494128, 0.04584040, 0.38722420, 0.18539052, 0.32361004, 0.], abs=1e-5)
    assert block.cost is None
    close(block.train()(x).sub(x).square().mean(), block.cost)
    angles = torch.zeros(2, 33, 33)  # theirs fill the corner of a larger lattice, second in the batch
    angles[1, :3, :9] = torch.from_numpy(2 * np.pi * np.random.RandomState(5).rand(3, 9))
    y, x = torch.meshgrid(torch.arange(64) / 32, torch.arange(64) / 8, indexing="ij")
    noise = draem.gradient_noise(y.expand(2, -1, -1), x.expand(2, -1, -1), angles)[1]
    check(noise, 0.00512993, 0.31654693, [
        0., 0.00109449, 0.08151374, 0.05589088, 0.64295715, -0.26829977, -0.45500629, -0.15697166], abs=1e-5)


# --- Noise and masks --------------------------------------------------------------------------------------------------
def slow_noise(y: float, x: float, angles: np.ndarray) -> float:
    """The noise at one place by its definition, in float64: a weighted sum over four corners."""
    total = 0.0
    for row, column in np.ndindex(2, 2):
        down, right = y - math.floor(y) - row, x - math.floor(x) - column
        angle = angles[math.floor(y) + row, math.floor(x) + column]
        weights = [1 - (6 * t ** 5 - 15 * t ** 4 + 10 * t ** 3) for t in (abs(down), abs(right))]
        total += weights[0] * weights[1] * (math.cos(angle) * down + math.sin(angle) * right)
    return math.sqrt(2) * total


@pytest.mark.parametrize("height, width", [(37, 51), (64, 32), (1, 7)])
def test_noise_of_any_size_equals_the_definition(height, width):
    """Each pixel's place is rotated about the centre. The noise there follows the definition; outside it is 0."""
    noise, generator = perlin_noise(5, height, width, seeded(3)), seeded(3)
    assert noise.shape == (5, height, width)
    cells = 2.0 ** torch.randint(0, 6, (2, 5), generator=generator)  # 1, 2, ... 32 cells a side
    angles = 2 * math.pi * torch.rand(5, 33, 33, generator=generator)
    rotation = math.pi * torch.rand(5, generator=generator) - math.pi / 2  # up to 90 degrees
    for n, i, j in [place for place in np.ndindex(5, height, width) if sum(place) % 5 == 0]:
        place = complex(j - (width - 1) / 2, i - (height - 1) / 2) * np.exp(-1j * rotation[n].item())
        u, v = place.real + (width - 1) / 2, place.imag + (height - 1) / 2
        edge, expected = min(v, u, height - 1 - v, width - 1 - u), 0.0
        if edge >= 0:
            expected = slow_noise(v * cells[0, n].item() / height, u * cells[1, n].item() / width, angles[n].numpy())
        if abs(edge) > 1e-3:  # nearer to the border, rounding decides
            assert noise[n, i, j].item() == pytest.approx(expected, abs=2e-4)


def test_many_masks_cover_as_much_as_the_authors():
    """2,000 masks of the authors' code at 256 x 256 have a mean area of 4.83 %; 5.4 % of them are empty."""
    generator, error = seeded(), math.sqrt(1 / 1600 + 1 / 2000)  # a lattice spans the image, so any size will do
    areas = torch.cat([draem.perlin_mask(40, 96, 96, generator, 0, 0.5).flatten(1).mean(1) for _ in range(40)])
    assert areas.std() < 0.04 and areas.mean().item() == pytest.approx(0.0483, abs=3 * areas.std().item() * error)
    assert (areas == 0).float().mean().item() == pytest.approx(0.054, abs=3 * math.sqrt(0.054 * 0.946) * error)


# --- Augmentations, on levels 0..255, against Pillow and loops over pixels --------------------------------------------
def test_gamma_brightness_and_invert_in_closed_form_and_hue_saturation_by_colorsys():
    pictures = [pixels(n, 6, 8, 3) for n in range(5)]
    pictures[0][0, :4] = [(0, 0, 0), (255, 255, 255), (9, 9, 9), (255, 0, 255)]
    u = torch.tensor([(0.5, 0.5, 0.1), (0.0, 0.5, 1.0), (1.0, 0.5, 0.0), (0.3, 0.0, 0.4), (0.9, 1.0, 0.6)])
    x, draws = tensor(*pictures), u.double().numpy()
    out = [function(x, u) for function in (draem.gamma, draem.brightness, draem.invert, draem.hue_saturation)]
    for n, i, j in np.ndindex(5, 6, 8):
        rgb, (hue, saturation, value) = pictures[n][i, j] / 255, colorsys.rgb_to_hsv(*(pictures[n][i, j] / 255))
        saturation = min(max(saturation + (2 * draws[n, 1] - 1) * 50 / 255, 0), 1)
        expected = [rgb ** (0.5 + 1.5 * draws[n]),  # powers of 0.5 to 2
                    (rgb * (0.8 + 0.4 * draws[n, 0]) + (60 * draws[n, 1] - 30) / 255).clip(0, 1),
                    1 - rgb, colorsys.hsv_to_rgb((hue + (2 * draws[n, 0] - 1) * 50 / 255) % 1, saturation, value)]
        close(torch.stack(out)[:, n, :, i, j].double(), torch.from_numpy(np.array(expected)), rtol=0, atol=2e-5)


def test_sharpness_is_a_loops_and_inside_the_border_pillows():
    pictures, u = [pixels(n, 20, 24, 3) for n in range(4)], torch.tensor([[0.0], [0.35], [0.5], [0.95]])
    weight = np.array([(1, 1, 1), (1, 5, 1), (1, 1, 1)]) / 13
    for picture, out, factor in zip(pictures, draem.sharpness(tensor(*pictures), u), (2 * u[:, 0]).tolist()):
        padded = np.pad(picture / 255, ((1, 1), (1, 1), (0, 0)), "edge")
        smooth = sum(weight[i, j] * padded[i:i + 20, j:j + 24] for i, j in np.ndindex(3, 3))
        expected = torch.from_numpy((smooth + factor * (picture / 255 - smooth)).clip(0, 1)).permute(2, 0, 1)
        close(out, expected.float(), rtol=0, atol=1e-6)
        expected = tensor(ImageEnhance.Sharpness(Image.fromarray(picture)).enhance(factor))[0]
        close(out[:, 1:-1, 1:-1], expected[:, 1:-1, 1:-1], rtol=0, atol=1.6 / 255)  # Pillow rounds twice


def test_solarize_posterize_equalize_and_autocontrast_are_pillows():
    levels = Image.fromarray(np.arange(768).reshape(16, 16, 3).astype(np.uint8))  # all of them
    out = draem.solarize(tensor(*[levels] * 4), torch.tensor([(0.1, 0.0), (0.49, 0.5), (0.3, 1.0), (0.5, 0.0)]))
    close(out, tensor(*(ImageOps.solarize(levels, threshold) for threshold in (32, 80, 128, 256))))
    assert draem.solarize(torch.full((1, 3, 1, 1), 127.7 / 255), torch.tensor([(0.1, 1.0)])).max() > 0.5  # below 128
    out = draem.posterize(tensor(*[levels] * 8), 0.14 * torch.arange(8.0).view(8, 1))
    close(out, tensor(*(ImageOps.posterize(levels, bits) for bits in range(1, 9))))
    rng = np.random.RandomState(7)  # for difficult histograms: a dominant level, one level, few levels, gaps
    heavy = np.where(rng.rand(40, 40, 3) < 0.9, 200, rng.randint(0, 256, (40, 40, 3)))
    arrays = [pixels(0, 40, 40, 3), heavy, np.full((40, 40, 3), 77), rng.choice([3, 90, 91, 255], (40, 40, 3)),
              pixels(1, 40, 40, 3) // 4 + 60]
    pictures = [Image.fromarray(array.astype(np.uint8)) for array in arrays]
    close(draem.equalize(tensor(*pictures), torch.zeros(5, 0)), tensor(*map(ImageOps.equalize, pictures)))
    for cutoff in (0, 1, 7, 20):
        out = draem.autocontrast(tensor(*pictures), torch.full((5, 1), (cutoff + 0.5) / 21))
        apart = 255 * (out - tensor(*(ImageOps.autocontrast(picture, cutoff) for picture in pictures)))
        assert -0.01 < apart.min() and apart.max() < 1.001  # Pillow drops fractions


def slow_rotate(x: torch.Tensor, degrees: float) -> torch.Tensor:
    """(3, H, W) rotated clockwise by an affine matrix."""
    c, s, ratio = math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), x.shape[1] / x.shape[2]
    grid = F.affine_grid(torch.tensor([[[c, s * ratio, 0], [-s / ratio, c, 0]]]), [1, *x.shape], align_corners=False)
    return F.grid_sample(x[None], grid, align_corners=False)[0]


def test_rotate_is_clockwise_about_the_centre():
    x, angles = image(0, 4, 3, 24, 33), torch.tensor([0.0, 30.0, -45.0, 22.5])
    close(rotate(x, angles), torch.stack([slow_rotate(*pair) for pair in zip(x, angles.tolist())]), rtol=0, atol=1e-4)
    close(rotate(x[..., :24], torch.full((4,), 90.0)), x[..., :24].rot90(-1, (2, 3)), rtol=0, atol=1e-4)
    close(draem.rotate_texture(x[2:], torch.tensor([[0.0], [0.75]])), rotate(x[2:], angles[2:]))


@pytest.mark.parametrize("chosen", [[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
def test_apply_where_changes_the_chosen_alone_on_a_cpu_and_on_a_gpu(chosen):
    """A CPU tensor plays the GPU's by claiming to be there."""
    chosen, x, u, seen = torch.tensor(chosen).bool(), image(0, 4, 3, 5, 5), image(1, 4, 3), []
    function = lambda x, u: seen.append(len(x)) or x * u[:, :1, None, None] + 1
    on_gpu = x.as_subclass(type("OnGPU", (torch.Tensor,), {"is_cuda": True}))
    expected = torch.stack([x[n] * u[n, 0] + 1 if chosen[n] else x[n] for n in range(4)])
    assert torch.equal(apply_where(chosen, function, x, u), expected)
    assert seen == [chosen.sum().item()] * bool(chosen.any())  # on a CPU the others cost no work
    assert torch.equal(apply_where(chosen, function, on_gpu, u).as_subclass(torch.Tensor), expected)
    assert seen[-1] == 4 and torch.equal(x, image(0, 4, 3, 5, 5))


def test_a_texture_gets_three_different_augmentations_of_the_ten_in_random_order():
    x, generator = image(0, 40, 3, 8, 9), seeded(5)
    order = torch.rand(40, 10, generator=generator).argsort(1)[:, :3]  # all orders are equally likely
    expected = x.split(1)
    for choice in order.unbind(1):
        u = torch.rand(40, 3, generator=generator)
        expected = [AUGMENTATIONS[k](expected[n], u[n:n + 1]) for n, k in enumerate(choice.tolist())]
    assert len(AUGMENTATIONS) == len(order.unique()) == 10
    out = augment_textures(x, seeded(5))
    assert ((out - torch.cat(expected)).abs() > 1e-5).float().mean() < 1e-3  # rounding can move a level
    assert torch.equal(x, image(0, 40, 3, 8, 9)) and out.min() >= 0 and out.max() <= 1 + 1e-6


# --- Losses -----------------------------------------------------------------------------------------------------------
def slow_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """1 - mean SSIM of (..., H, W). Each pixel's 11 x 11 window is summed alone, with 0 beyond the border."""
    weight = np.exp(-(np.arange(-5, 6)[:, None] ** 2 + np.arange(-5, 6) ** 2) / (2 * 1.5 ** 2))
    pad = [(0, 0)] * (x.ndim - 2) + [(5, 5)] * 2
    a, b = (np.lib.stride_tricks.sliding_window_view(np.pad(v.astype(np.float64), pad), (11, 11), (-2, -1))
            for v in (x, y))
    mean_a, mean_b, aa, bb, ab = ((weight / weight.sum() * v).sum((-2, -1)) for v in (a, b, a * a, b * b, a * b))
    means = (2 * mean_a * mean_b + 0.01 ** 2) / (mean_a ** 2 + mean_b ** 2 + 0.01 ** 2)
    spreads = (2 * (ab - mean_a * mean_b) + 0.03 ** 2) / (aa - mean_a ** 2 + bb - mean_b ** 2 + 0.03 ** 2)
    return (1 - means * spreads).mean()


@pytest.mark.parametrize("height, width", [(20, 27), (4, 9)])
def test_ssim_equals_the_loop(height, width):
    x, y = image(0, 2, 3, height, width), image(1, 2, 3, height, width)
    y[1] = 0.9 * x[1] - 0.7  # values below -0.5 must not change the range
    expected = pytest.approx(slow_ssim(x.numpy(), y.numpy()), abs=2e-6)
    assert ssim_loss(x, y).item() == expected and ssim_loss(x, x).item() == pytest.approx(0, abs=1e-6)
    assert ssim_loss(*(v.to(memory_format=torch.channels_last) for v in (x, y))).item() == expected


@pytest.mark.parametrize("truth", [0.0, 1.0])
@pytest.mark.parametrize("difference", [-80.0, -30.0, -2.0, 0.0, 1.5, 30.0, 80.0])
def test_focal_loss_in_closed_form(difference, truth):
    """-(1 - p)^2 log p with p = (1 - 1e-5) q + 1e-5 (1 - q) + 1e-5, where q is the true class's probability."""
    q = 1 / (1 + math.exp(-difference if truth else difference))
    p = (1 - 1e-5) * q + 1e-5 * (1 - q) + 1e-5
    logits = torch.tensor([3.0, 3.0 + difference]).view(1, 2, 1, 1).repeat(2, 1, 5, 7).requires_grad_()
    loss = focal_loss(logits, torch.full((2, 1, 5, 7), truth))
    assert loss.item() == pytest.approx(-(1 - p) ** 2 * math.log(p), rel=1e-4, abs=1e-9)
    loss.backward()
    assert logits.grad.isfinite().all()


def test_losses_under_autocast_are_float32s():
    x, y, mask = image(0, 2, 3, 32, 32), image(1, 2, 3, 32, 32).bfloat16(), (image(3, 2, 1, 32, 32) > 0.7).float()
    logits, block, inputs = 4 * image(2, 2, 2, 32, 32).bfloat16(), fill(SSPCAB(8)).train(), image(4, 1, 8, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, out, terms = draem_loss(x, y, logits, mask), block(inputs), filled(True).train().losses(x, x, seeded())
    close(mixed, draem_loss(x, y.float(), logits.float(), mask), rtol=0, atol=0)
    assert out.dtype == torch.bfloat16
    assert block.cost.item() == pytest.approx(((out.double() - inputs) ** 2).mean().item())
    assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())


# --- The recipe: what a training step rotates, blends, masks and sums -------------------------------------------------
@pytest.mark.parametrize("textures", [True, False])
def test_simulate_equals_a_slow_version_step_by_step(textures, monkeypatch):
    """Without textures, noise between two random colours replaces them."""
    monkeypatch.setitem(PUBLISHED, "rotate_share", 0.6)
    monkeypatch.setitem(PUBLISHED, "noise_threshold", 0.3)
    model, x, generator = DraemModel(2, beta=[0.2, 0.7], rotate=30.0), image(0, 6, 3, 32, 32), seeded(22)
    texture = image(1, 6, 3, 32, 32).requires_grad_() if textures else None
    shown = model.simulate(x, texture, seeded(22))
    assert list(shown) == ["image", "augmented", "mask"] and not shown["augmented"].requires_grad
    assert torch.equal(x, image(0, 6, 3, 32, 32)) and model.beta == model.settings["beta"] == (0.2, 0.7)
    chosen, degrees = torch.rand(6, generator=generator) < 0.6, 60 * torch.rand(6, generator=generator) - 30
    normal = torch.stack([slow_rotate(x[n], degrees[n].item()) if chosen[n] else x[n] for n in range(6)])
    anomalous = torch.rand(6, 1, 1, generator=generator) >= 0.5
    mask = ((perlin_noise(6, 32, 32, generator) > 0.3) & anomalous)[:, None].float()
    assert 0 < chosen.sum() < 6 and 0 < anomalous.sum() < 6 and mask.any()
    if not textures:
        share = (perlin_noise(6, 32, 32, generator)[:, None] + 1) / 2
        one, other = torch.rand(2, 6, 3, 1, 1, generator=generator)
        texture = ((1 - share) * one + share * other).clamp(0, 1)
    texture = augment_textures(texture, generator).detach()
    beta = 0.2 + 0.5 * torch.rand(6, 1, 1, 1, generator=generator)
    augmented = (1 - mask) * normal + (1 - beta) * (mask * normal) + beta * (mask * texture)  # Eq. (4)
    assert ((shown["augmented"] - augmented).abs() > 1e-5).float().mean() < 1e-3  # rounding can move a level
    close((shown["image"], shown["mask"]), (normal, mask), rtol=0, atol=1e-5)
    none = model.simulate(x, None, seeded(22), normal_share=1.0)
    assert torch.equal(none["augmented"], shown["image"]) and not none["mask"].any()
    assert (model.simulate(x, None, seeded(22), 0.0)["mask"].amax((1, 2, 3)) > 0).sum() > anomalous.sum()
    published = draem.synthesize_anomalies(x, texture, seeded(22), (0.1, 1.0), 0.5)
    close(draem.synthesize_anomalies(x, texture, seeded(22)), published, rtol=0, atol=0)


@pytest.mark.parametrize("sspcab", [False, True])
def test_losses_compare_the_networks_with_what_simulate_shows(sspcab, monkeypatch):
    monkeypatch.setitem(PUBLISHED, "ssim_lambda", 3.0)
    monkeypatch.setitem(PUBLISHED, "sspcab_lambda", 0.25)
    model, x, seen = filled(sspcab, rotate=90.0).train(), image(0, 6, 3, 32, 32), {}
    model.register_forward_hook(lambda _, inputs, outputs: seen.update(augmented=inputs[0], outputs=outputs))
    model.reconstructive_subnetwork.encoder.block5.register_forward_hook(
        lambda _, inputs, output: seen.update(apart=output - inputs[0]))
    terms, shown = model.losses(x, None, seeded(4)), model.simulate(x, None, seeded(4))
    assert torch.equal(seen["augmented"], shown["augmented"]) and not torch.equal(x, shown["image"])
    (reconstruction, logits), target, mask = seen["outputs"], shown["image"], shown["mask"]
    assert torch.equal(logits, model.discriminative_subnetwork(torch.cat((reconstruction, shown["augmented"]), 1)))
    expected = {"l2": (reconstruction - target).square().mean(), "ssim": 3 * ssim_loss(target, reconstruction),
                "focal": focal_loss(logits, mask)}
    close(terms, expected | ({"sspcab": seen["apart"].square().mean() / 4} if sspcab else {}))
    assert mask.any() and list(terms)[:3] == list(expected)
    assert torch.autograd.grad(terms["focal"], reconstruction, retain_graph=True)[0].any()  # L_seg trains both networks
    monkeypatch.setattr(model, "simulate", lambda *_: shown)
    close(model.losses(None, None, None), terms)


def test_initial_weights():
    """As in the code: convolutions N(0, 0.02), batch norms N(1, 0.02) with bias 0. Convolution biases are PyTorch's."""
    torch.manual_seed(0)
    for module in DraemModel(16, True).modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.BatchNorm2d)) and module.weight.numel() > 60:
            conv, count = isinstance(module, torch.nn.Conv2d), module.weight.numel()
            assert module.weight.mean().item() == pytest.approx(0 if conv else 1, abs=4 * 0.02 / math.sqrt(count))
            assert module.weight.std().item() == pytest.approx(0.02, rel=4 / math.sqrt(2 * count))
            assert module.bias.abs().max() <= (1 / math.sqrt(module.weight[0].numel()) if conv else 0)
            assert module.bias.any() == conv


def test_the_five_lines_of_the_head_train_as_printed(monkeypatch):
    start, step_lines = (textwrap.dedent(part) for part in draem.__doc__.split("train it:\n\n")[1].split("\n\n")[:2])
    assert len(step_lines.splitlines()) == 5 and "DraemModel()" in start
    normal = torch.linspace(0, 9, 32).sin().expand(8, 3, 32, 32) / 2 + 0.5
    names = vars(draem) | {"image": normal, "texture": image(1, 8, 3, 32, 32)}
    monkeypatch.setattr(learning_rate, "__defaults__", (2e-3, PUBLISHED["drops"]))  # 20 times the paper's
    torch.manual_seed(0)
    exec(start.replace("DraemModel()", "DraemModel(4, sspcab=True)"), names)
    rates, history = [], []
    for names["step"] in range(21):
        exec(step_lines, names | {"steps": 21})
        rates.append(names["optimizer"].param_groups[0]["lr"])
        terms = draem_loss(normal, *names["model"](normal), torch.zeros(8, 1, 32, 32))
        history.append(sum(terms.values()).item())
    assert rates == pytest.approx([2e-3] * 12 + [2e-4] * 6 + [2e-5] * 3)
    assert sum(history[-5:]) / 5 < 0.7 * sum(history[:3]) / 3, history


def test_the_file_run_alone_prints_every_blocks_shape(tmp_path, capsys):
    source = Path(draem.__file__).read_text(encoding="utf-8")
    source = source.replace('"size": 256,  ', '"size": 64,').replace('"width": 128,  ', '"width": 8,')
    (tmp_path / "small.py").write_text(source, encoding="utf-8")
    runpy.run_path(str(tmp_path / "small.py"), run_name="__main__")
    shapes = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert len(shapes) == 9 + 9 + 6 + 11 and shapes[FIRST + "encoder.block5"] == "(1, 64, 4, 4)"
    assert shapes[FIRST + "decoder.fin_out"] == "(1, 3, 64, 64)"
    assert shapes[SECOND + "encoder_segment.block6"] == "(1, 32, 2, 2)"


# --- Prediction -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("height, width, window", [(256, 288, 21), (128, 128, 11), (96, 64, 5), (32, 32, 3)])
def test_the_scores_window_is_21_at_256_and_in_proportion(height, width, window):
    """A single 1 has the mean 1 / window^2, in a corner too: outside is 0. Two add up if at most window - 1 apart."""
    maps = torch.zeros(5, height, width)
    maps[0, 16, 16] = maps[1, 0, 0] = maps[2, -1, -1] = 1
    maps[3, 0, 5] = maps[3, window - 1, 5] = maps[4, 5, 0] = maps[4, 5, window] = 1
    close(draem.mean_filter_maximum(maps), torch.tensor([1.0, 1.0, 1.0, 2.0, 1.0]) / window ** 2)
    close(draem.mean_filter_maximum(maps[:3], 7), torch.full((3,), 1 / 49))


def test_predict_refuses_what_is_no_image():
    model, x = filled(), image(0, 2, 3, 64, 96)
    for wrong, words in [
            ((255 * x).byte(), "uint8"), (x[:, :1], "1, 64, 96"), (x[0], "3, 64, 96"), (x[:0], "0, 3, 64, 96"),
            (x[:, :, :63], "63, 96"), (x[..., :80], "64, 80"), (x[:, :, :0], "0, 96"), (255 * x, "found .* to 25"),
            (x - 0.01, "-0.0"), (x + 0.01, "to 1.0"), ((x - 0.485) / 0.229, "not normalized"), (x / 0, "nan|inf")]:
        with pytest.raises(ValueError, match=f"^image: .*{words}"):
            model.predict(wrong)
    assert model.predict(x * 1.0005 - 2e-4)["score"].isfinite().all()  # rounding is accepted
    with pytest.raises(RuntimeError, match="eval"):
        model.train().predict(x)


def test_predict_gives_float32_without_gradients_and_can_be_compiled():
    model, x = filled(True), image(0, 2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        result = model.predict(x)
    assert result["score"].dtype == result["anomaly_map"].dtype == torch.float32
    assert not any(value.requires_grad for value in result.values())
    close(result["anomaly_map"], model.predict(x)["anomaly_map"], rtol=0, atol=0.02)
    close(model.predict(x.double()), model.predict(x), rtol=0, atol=0)  # float64 too
    torch.compile(draem.check_image, backend="eager", fullgraph=True)(x, 32)  # fails where values decide


# --- Weights ----------------------------------------------------------------------------------------------------------
def own(model: DraemModel, /, **changes) -> dict:
    return {"method": "draem", "settings": model.settings, "preprocessing": {"size": 64, "antialias": True},
            "model": model.state_dict()} | changes


def authors(folder: Path, model: DraemModel) -> Path:
    """Saves a pair of files as the authors release them; their networks see BGR. Returns the first path."""
    torch.save(model.discriminative_subnetwork.state_dict(), folder / "DRAEM_0.0001_bottle__seg.pckl")
    torch.save(model.reconstructive_subnetwork.state_dict(), folder / "DRAEM_0.0001_bottle_.pckl")
    return folder / "DRAEM_0.0001_bottle_.pckl"


def anomalibs(model: DraemModel, *steps, **more) -> dict:
    """The content of a checkpoint of anomalib 2.7.0 whose transforms are `steps`, (name, arguments) each."""
    state = {"model." + key: value for key, value in model.state_dict().items()} | {"loss.weight": torch.zeros(2)}
    named = [{"class_path": "torchvision.transforms.v2." + name, "init_args": given} for name, given in steps]
    transform = {"class_path": "torchvision.transforms.v2.Compose", "init_args": {"transforms": named}}
    return {"state_dict": state, "epoch": 3, "anomalib_pre_processor_config": {"transform": transform}} | more


@pytest.mark.parametrize("sspcab", [False, True])
def test_this_projects_checkpoint_brings_its_settings_and_preprocessing(sspcab, tmp_path, capsys):
    model, x = filled(sspcab, beta=[0.3, 0.4], rotate=10.0), image(0, 4, 3, 32, 64)
    torch.save(own(model), tmp_path / "last.pt")
    loaded = load(str(tmp_path / "last.pt"))
    assert not loaded.training and loaded.preprocessing == {"size": 64, "antialias": True}
    assert loaded.settings == {"width": 8, "sspcab": sspcab, "beta": (0.3, 0.4), "rotate": 10.0}
    close(loaded.predict(x), model.predict(x), rtol=0, atol=0)
    assert capsys.readouterr() == ("", "")


def test_released_weights_give_on_rgb_what_they_gave(tmp_path, monkeypatch, capsys):
    """The authors' networks saw BGR. anomalib's second network saw the image before the reconstruction."""
    model, x = filled(), image(0, 2, 3, 64, 64)
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")  # saved on a GPU
    loaded = load(authors(tmp_path, model))
    assert not loaded.training and loaded.preprocessing == {"size": 256, "antialias": False}
    (reconstruction, logits), (rgb, same) = model(x), loaded(x.flip(1))
    close((rgb.flip(1), same), (reconstruction, logits), rtol=0, atol=1e-5)
    torch.save(anomalibs(model, ("Resize", {"size": [320, 320]})), tmp_path / "model.ckpt")
    swapped = model.discriminative_subnetwork(torch.cat((x, reconstruction), 1))
    close(load(tmp_path / "model.ckpt")(x), (reconstruction, swapped), rtol=0, atol=1e-5)
    assert (swapped - logits).abs().max() > 1e-3 and capsys.readouterr() == ("", "")


def test_anomalibs_sspcab_gets_the_names_here_and_is_announced(tmp_path, capsys):
    """masked_conv1 to 4 look up-left, up-right, down-left, down-right; conv2 here looks down-left, conv3 up-right."""
    model, x = filled(True), image(0, 2, 3, 64, 64)
    content = anomalibs(model, ("Resize", {"size": 256}))
    for name, theirs in (("conv1.", "masked_conv1."), ("conv2.", "masked_conv3."), ("conv3.", "masked_conv2."),
                         ("conv4.", "masked_conv4."), ("se.", "attention_module.")):
        for key in [key for key in content["state_dict"] if key.startswith(f"model.{FIRST}encoder.block5.{name}")]:
            content["state_dict"][key.replace(name, theirs)] = content["state_dict"].pop(key)
    torch.save(content, tmp_path / "model.ckpt")
    close(load(tmp_path / "model.ckpt")(x)[0], model(x)[0], rtol=0, atol=0)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "model.ckpt: " in err and "SSPCAB" in err and "ReLU" in err


@pytest.mark.parametrize("steps, more, expected", [
    ([("Resize", {"size": [320, 320], "antialias": True}), ("Normalize", {})], {}, (320, True)),
    ([("CenterCrop", {"size": [64, 64]}), ("Resize", {"size": 128, "antialias": False})], {}, (128, False)),
    ([], {"transform": {"class_path": "v2.Resize", "init_args": {"size": [96]}}}, (96, True)),  # no Compose
    ([], {}, None), ([], {"transform": None}, None), ([], None, None)])
def test_anomalibs_images_are_read_as_its_resize_says_else_at_256(steps, more, expected, tmp_path, capsys):
    """2.7.0 saves its transforms, older versions do not; one line on stderr says what is assumed."""
    content = anomalibs(DraemModel(2), *steps)
    torch.save(content | ({} if more == {} else {"anomalib_pre_processor_config": more}), tmp_path / "model.ckpt")
    size, antialias = expected or (256, True)
    assert load(tmp_path / "model.ckpt").preprocessing == {"size": size, "antialias": antialias}
    err = capsys.readouterr().err
    assert err == "" if expected else err.count("\n") == 1 and "model.ckpt: holds no image size; 256 x 256" in err


def refusal(path: Path) -> str:
    """The one-line message of load's ValueError, which begins with the file's folder."""
    with pytest.raises(ValueError) as error:
        load(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path.parent))
    return str(error.value)


def test_what_does_not_fit_is_refused_in_one_line_and_no_code_is_run(tmp_path, monkeypatch):
    model, path = DraemModel(2), tmp_path / "other.pt"
    state, bias, conv = model.state_dict(), FIRST + "decoder.fin_out.0.bias", FIRST + "encoder.block1.0.weight"
    theirs, seg_conv = anomalibs(model)["state_dict"], f"model.{SECOND}encoder_segment.block1.0.weight"
    monkeypatch.chdir(tmp_path)
    code = type("Code", (), {"__reduce__": lambda self: (os.mkdir, ("ran",))})()  # unpickling it makes a folder
    for content, words in [
            (own(model, method="dsr"), "a checkpoint of dsr, not of draem"),
            (own(model, model={k: v for k, v in state.items() if k != bias}), bias),
            (own(model, model=state | {"extra": torch.zeros(1)}), "extra"),
            (own(model, model=state | {bias: torch.zeros(4)}), bias),
            (own(model, model=state | {bias: torch.tensor([0, math.nan, 0])}), "NaN or infinity"),
            (own(model, model=state | {bias: torch.tensor([0, math.inf, 0])}), "NaN or infinity"),
            (own(model, model=state | {bias: 3}), "does not fit DraemModel"), (own(model, model=3), "does not fit"),
            (own(model, model={}), "Missing key"), (own(model, settings={"widht": 8}), "widht"),
            (own(model, settings=model.settings | {"width": 4}), "size mismatch"),
            ({"state_dict": {"model." + conv: state[conv]}}, "Missing key"),
            *[({"state_dict": theirs | {seg_conv: value}}, "does not fit") for value in (torch.zeros(4), 3)],
            (anomalibs(model, ("Resize", {"size": [256, 128]})), "was trained on images of [256, 128]; only square"),
            ({"state_dict": {"model.other": state[conv]}}, "no .ckpt of anomalib's Draem"), ({}, "no last.pt"),
            (model.discriminative_subnetwork.state_dict(), "no RUN_CLASS_.pckl of the authors"),
            (own(model, more=code), "holds code"), ([1, 2], "found list"), ({1: 2}, "tensors by name")]:
        torch.save(content, path)
        assert words in refusal(path)
    whole = path.read_bytes()
    for content in (b"", b"hello", pickle.dumps(code, 2), whole[:100], whole[:-200], whole[200:]):
        path.write_bytes(content)
        assert "truncated" in refusal(path)
    assert "directory" in refusal(tmp_path) and not (tmp_path / "ran").exists()
    path, first = authors(tmp_path, model), model.reconstructive_subnetwork.state_dict()
    for key, shape in (("encoder.block1.0.weight", (2, 4, 3, 3)), ("encoder.block1.0.weight", (2,)),
                       ("decoder.fin_out.0.bias", (4,)), ("decoder.fin_out.0.weight", (1, 2, 3, 3))):
        torch.save(first | {key: torch.zeros(shape)}, path)
        assert key in refusal(path)
    (tmp_path / "DRAEM_0.0001_bottle__seg.pckl").unlink()
    assert "bottle__seg.pckl: No such file" in refusal(path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_step_never_makes_the_host_wait():
    model, generator = DraemModel(8, True).cuda().train(), seeded(0, "cuda")
    normal, texture = image(0, 8, 3, 64, 64).cuda(), image(1, 8, 3, 64, 64).cuda()
    for mode, given in (("default", texture), ("error", texture), ("error", None)):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", torch.bfloat16):
                terms = model.losses(normal, given, generator)
            sum(terms.values()).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
