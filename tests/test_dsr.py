"""Tests of dsr.py. Oracles: recorded figures of the authors' networks (golden.py); the numbers of the paper and of the
authors' code, as literals; slow versions that sort all codes at each position, use one-hot assignments, or call the
modules one by one in float64; closed forms; uniform distributions; known clusters."""
import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsr  # noqa: E402
from dsr import (DiscreteLatentModel, DsrModel, VectorQuantizer, load, load_codebook, perlin_mask,  # noqa: E402
                 rank_codes, sample_codebook_anomalies, synthesize_smudges)
from golden import check, fill, golden_value, image  # noqa: E402

close = torch.testing.assert_close
LATENT, RESTRICTION_LO, RESTRICTION_HI, RECONSTRUCTION, DETECTION, UPSAMPLING = PARTS = [
    "discrete_latent_model", "subspace_restriction_module_lo", "subspace_restriction_module_hi",
    "image_reconstruction_network", "anomaly_detection_module", "upsampling_module"]
SIZES = dict(hiddens=8, residual_layers=2, residual_hiddens=4, codes=64, code_length=6)  # no two are the same
RELEASED = {"encoder_lo": "encoder_t", "encoder_hi": "encoder_b", "project_lo": "pre_vq_conv_top",
            "project_hi": "pre_vq_conv_bot", "codebook_lo": "vq_vae_top", "codebook_hi": "vq_vae_bot",
            "general_decoder": "decoder_b", "upsample_lo": "upsample_t"}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def double(monkeypatch):
    """Everything in float64, so that no rounding decides between two codes."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small(seed: int = 0, **knobs) -> DsrModel:
    """A small model whose codes start from features of eight images."""
    torch.manual_seed(seed)
    latent = DiscreteLatentModel(**SIZES).train()
    with torch.no_grad():
        latent.losses(image(seed, 8, 3, 64, 64), seeded(seed))
    return DsrModel(latent, width=5, **knobs).eval()


def state(module: nn.Module) -> dict:
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def is_uniform(values: Tensor, low: float, high: float) -> bool:
    """Kolmogorov's test. Fewer than one uniform sample in 1,000 fails it."""
    values = ((values.detach().double().flatten() - low) / (high - low)).sort()[0]
    expected = (torch.arange(len(values)) + 0.5) / len(values)
    inside = -1e-4 <= values[0] and values[-1] <= 1 + 1e-4
    return inside and bool((values - expected).abs().max() < 2 / len(values) ** 0.5)


def distances(features: Tensor, codes: Tensor) -> Tensor:
    """Distances (..., K) in float64 of features (..., D) to codes (K, D)."""
    return (features.double()[..., None, :] - codes.double()).norm(dim=-1)


def slow_quantize(quantizer: VectorQuantizer, features: Tensor) -> Tensor:
    codes = quantizer.embedding.weight
    return codes[distances(features.movedim(1, -1), codes).argmin(-1)].movedim(-1, 1)


# Published numbers and networks


def test_published_settings():
    assert dsr.PUBLISHED == {
        "size": 256, "lr": 2e-4, "hiddens": 128, "residual_layers": 2, "residual_hiddens": 64, "codes": 4096,
        "code_length": 128, "decay": 0.99, "commitment_cost": 0.25, "pretrain_steps": 200_000, "pretrain_batch": 32,
        "steps": 100_000, "batch": 8, "drops": (80_000 / 100_000,), "drop_factor": 1 / 10, "width": 64,
        "lambda_s": (0.2, 1.0), "skipped": 0.05, "both_share": 1 / 2, "normal_share": 1 / 2, "noise_threshold": 0.5,
        "rotation": 90, "rotation_share": 0.4, "reconstruction_lambda": 10, "upsampling_steps": 20_000,
        "upsampling_rotation_share": 0.3, "beta": (0.1, 1.0), "window": 21}


@torch.no_grad()
def test_published_model_has_the_authors_sizes_and_initial_weights(monkeypatch):
    """Two modules have weights N(0, 0.02). All else is PyTorch's: uniform within 1 / sqrt(fan in)."""
    torch.manual_seed(0)
    model = DsrModel()
    assert sum(p.numel() for p in model.parameters()) == 40_298_762
    assert [len(getattr(model, name).state_dict()) for name in PARTS] == [40, 26, 26, 24, 36, 36]
    monkeypatch.setattr(dsr, "rank_codes", lambda codes: codes)  # slow
    trained = model.begin(2) + model.begin(3)
    assert len(set(trained)) == len(trained) and sum(p.numel() for p in trained) == 36_277_383
    for name in PARTS[1:]:
        for conv in getattr(model, name).modules():
            if isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d)):
                bound, weight, spread = conv.weight[0].numel() ** -0.5, conv.weight, 5 / conv.weight.numel() ** 0.5
                std = 0.02 if name in (RECONSTRUCTION, DETECTION) else bound / 3 ** 0.5
                assert abs(weight.mean()) < spread * std and abs(weight.std() - std) < spread * std
                assert (weight.abs().max() > 1.8 * std) == (name in (RECONSTRUCTION, DETECTION))  # uniform ends at 1.73
                assert conv.bias is None or conv.bias.abs().max() <= bound


GOLDEN = {  # name: shape, mean, standard deviation, values
    "general": ((2, 3, 64, 64), -0.024714079, 0.1336139, [
        -0.026116796, -0.32459238, -0.00097379461, 0.14265403, 0.19916733, -0.097870559, -0.020130105, -0.023687232]),
    "lo": ((2, 32, 8, 8), -0.004101669, 0.15132476, [
        0.0015247315, -0.31065279, -0.025813766, -0.075695246, -0.0079665482, -0.0917923, -0.010701567, -0.14937356]),
    "hi": ((2, 32, 16, 16), 0.014927193, 0.15913322, [
        0.13647723, 0.21241091, 0.11080842, 0.29791111, -0.14453851, 0.084040277, 0.018532366, 0.26568556]),
    "restricted_hi": ((2, 32, 16, 16), 0.0054847791, 0.66086873, [
        -0.042455792, 0.00482063, 0.033290327, 1.4589422, 1.2208233, -0.029858153, -0.180792, -1.4180968]),
    "restricted_lo": ((2, 32, 8, 8), -0.011903204, 0.64362941, [
        -0.18731864, 0.29670754, 0.59150636, -1.4801083, -0.099686019, 0.097314447, -0.49493539, 0.171803]),
    "specific": ((2, 3, 64, 64), 0.11011928, 0.26859235, [
        0.069362298, -0.17289838, 0.044024818, -0.047216192, -0.11007529, -0.08682467, 0.1720437, 0.24426137]),
    "coarse_mask": ((2, 64, 64), 0.44860755, 0.17172544, [
        0.54011118, 0.37377852, 0.53734934, 0.34124491, 0.74935746, 0.25033438, 0.69136226, 0.42321196]),
    "anomaly_map": ((2, 64, 64), 0.44838182, 0.17513586, [
        0.51425707, 0.57008892, 0.40850019, 0.54976815, 0.58667123, 0.50716615, 0.31814376, 0.30178359]),
}


@torch.no_grad()
def test_networks_give_the_authors_figures():
    model, x = DsrModel(DiscreteLatentModel(32, 2, 16, 64, 32)).eval(), image(0, 2, 3, 64, 64)
    latent = model.discrete_latent_model
    for key, tensor in latent.state_dict().items():
        first, rest = key.split(".", 1)
        tensor.copy_(torch.from_numpy(golden_value(f"{RELEASED[first]}.{rest}", tensor.shape)))
    for name, salt in zip(PARTS[1:], ("lo", "hi", "", "", "")):
        fill(getattr(model, name), salt)
    found = dict(zip(("lo", "hi"), latent.quantize(x)))
    found |= zip(("restricted_lo", "restricted_hi"), model.detect(found["lo"], found["hi"]))
    found |= model.predict(x, window=21)
    for name, (shape, mean, std, values) in GOLDEN.items():
        assert found[name].shape == shape, name
        check(found[name], mean, std, values, abs=1e-4)
    close(found["score"], torch.tensor([0.50015032, 0.50421613]), rtol=0, atol=1e-4)
    close(latent.losses(x, seeded()), {
        "reconstruction": (found["general"] - x).square().mean(), "commitment_lo": torch.tensor(0.0087962840),
        "commitment_hi": torch.tensor(0.0120141311)}, rtol=1e-4, atol=1e-6)


def test_residual_blocks_add_to_the_rectified_input():
    stack = dsr.ResidualStack(3, 2, 4)
    slow = x = torch.randn(2, 3, 5, 5, generator=seeded())
    before = x.clone()
    for layer in stack.layers:
        first, second = (m for m in layer.block if isinstance(m, nn.Conv2d))
        assert first.bias is None and second.bias is None
        hidden = F.conv2d(slow.clamp(min=0), first.weight, padding=1).clamp(min=0)
        slow = slow.clamp(min=0) + F.conv2d(hidden, second.weight)
    close(stack(x), slow.clamp(min=0))
    assert torch.equal(x, before)


# Codebooks and stage 1


def quantizer_with(codes: Tensor) -> VectorQuantizer:
    quantizer = VectorQuantizer(*codes.shape)
    quantizer.embedding.weight.data.copy_(codes)
    quantizer.ema_w.data.copy_(4 * codes)
    quantizer.ema_cluster_size.fill_(4)
    return quantizer


def test_nearest_codes_and_straight_through_gradient():
    quantizer = quantizer_with(torch.randn(20, 3, generator=seeded(1))).eval()
    features = torch.randn(2, 3, 4, 5, generator=seeded(2)).requires_grad_()
    codes = quantizer.embedding.weight
    slow = distances(features.movedim(1, -1), codes).argmin(-1)  # (2, 4, 5)
    assert torch.equal(quantizer.nearest(features), slow)
    before, weight = state(quantizer), torch.randn(2, 3, 4, 5, generator=seeded(3))
    quantized, commitment = quantizer(features, seeded())
    close(quantized, codes[slow].movedim(-1, 1))
    close(quantizer.quantize(features), quantized)
    close(quantizer.lookup(slow), quantized)
    close(commitment, 0.25 * (features - codes[slow].movedim(-1, 1)).square().mean())
    for term, expected in ((commitment, 0.5 * (features - quantized).detach() / features.numel()), (
            (quantized * weight).sum(), weight), ((quantizer.quantize(features) * weight).sum(), weight)):
        close(torch.autograd.grad(term, features)[0], expected)
    assert not codes.requires_grad and same(before, state(quantizer))


def test_distances_are_exact_where_codes_lie_close_together():
    codes = 100 + 0.01 * torch.randn(530, 3, generator=seeded(1))
    features = codes[::5] + 1e-4
    slow = distances(features, codes).argmin(-1)
    found = quantizer_with(codes).nearest(features.t().reshape(1, 3, 1, -1))
    assert torch.equal(found.flatten(), slow)
    ranked, slow = rank_codes(codes).long(), distances(codes, codes)
    assert torch.equal(ranked.sort()[0], torch.arange(530).expand(530, -1))
    assert torch.equal(ranked[:, 0], torch.arange(530))
    close(slow.gather(1, ranked), slow.sort()[0], rtol=0, atol=1e-5)


def test_moving_averages_against_one_hot_rows():
    """Some sizes are as small as the smoothing term, 1e-5."""
    codes, size = torch.randn(12, 3, generator=seeded(1)), torch.tensor([4.0, 1.0, 1e-5, 0.0]).repeat(3)
    quantizer, total = quantizer_with(codes), size[:, None] * codes
    quantizer.ema_cluster_size.copy_(size)
    quantizer.ema_w.data.copy_(total)
    for step in range(3):
        rows = torch.randn(3, 3, generator=seeded(step)).double()
        hot = F.one_hot(distances(rows, codes).argmin(1), 12).double()
        size = 0.99 * size + 0.01 * hot.sum(0)
        size = (size + 1e-5) / (size.sum() + 12 * 1e-5) * size.sum()
        total = 0.99 * total + 0.01 * hot.T @ rows
        codes = total / size[:, None]
        quantizer.update(rows.float(), quantizer.nearest(rows.t()[None, :, None]).flatten())
    close((quantizer.ema_cluster_size, quantizer.ema_w.data, quantizer.embedding.weight),
          (size, total, codes), rtol=1e-4, atol=1e-7, check_dtype=False)
    share = size / size.sum()
    assert quantizer.perplexity() == pytest.approx((-(share * share.log()).sum()).exp().item(), rel=1e-5)


def test_codebook_finds_clusters():
    centres = 3 * torch.randn(8, 4, generator=seeded(1))
    torch.manual_seed(0)
    quantizer, generator = VectorQuantizer(16, 4).train(), seeded(2)
    for _ in range(300):
        member = torch.randint(8, (4, 8, 8), generator=generator)
        features = (centres[member] + 0.05 * torch.randn(4, 8, 8, 4, generator=generator)).movedim(-1, 1)
        quantized, _ = quantizer(features, generator)
    assert distances(centres, quantizer.embedding.weight).amin(1).max() < 0.1
    assert (quantized - features).square().mean().sqrt() < 0.06 and quantizer.perplexity() > 7
    assert quantizer.ema_cluster_size.min() > 0.05  # no code is left unused


@pytest.mark.parametrize("rows, least", [(30, 0.1), (2, 0.1 * 2 / 6)])
def test_dead_codes_alone_are_revived(rows, least):
    quantizer = quantizer_with(torch.randn(6, 3, generator=seeded(1))).train()
    quantizer.ema_cluster_size[2:5] = least * torch.tensor([0.95, 1.05, 0.0])
    before, rows = state(quantizer), torch.randn(rows, 3, generator=seeded(2))
    quantizer.revive(rows, seeded())
    codes, revived = quantizer.embedding.weight, torch.tensor([False, False, True, False, True, False])
    assert torch.equal((codes != before["embedding.weight"]).any(1), revived)
    assert (codes[revived][:, None] == rows).all(2).any(1).all()  # features of this batch
    close(quantizer.ema_w[revived] / quantizer.ema_cluster_size[revived][:, None], codes[revived])
    assert (quantizer.ema_cluster_size[revived] > least).all()  # not dead any more
    for key in ("ema_w", "ema_cluster_size"):
        assert torch.equal(state(quantizer)[key][~revived], before[key][~revived])


# Simulated anomalies


def test_a_swap_draws_from_the_codes_that_sorting_gives_all_equally_likely():
    codes = torch.randn(40, 5, generator=seeded(1))
    index = torch.randint(40, (4, 2, 2), generator=seeded(2))
    strength, mask = torch.tensor([0.0, 0.21, 0.56, 1.0]), torch.tensor([[1.0, 1], [1, 0]]).expand(4, 1, 2, 2)
    before, ranked = index.clone(), rank_codes(codes)
    draws = torch.stack([sample_codebook_anomalies(index, ranked, mask, strength, seeded(n)) for n in range(1000)])
    assert (draws[:, :, 1, 1] == index[:, 1, 1]).all() and torch.equal(index, before)
    first = int(0.05 * 40)
    for n, topk in enumerate((first + 1, int(0.21 * 40) + 1, int(0.56 * 40) + 1, 40)):  # even strength 0 leaves one
        counts = torch.zeros(40)
        for y, x in ((0, 0), (0, 1), (1, 0)):
            order = distances(codes[index[n, y, x]], codes).argsort()
            counts += torch.bincount(draws[:, n, y, x], minlength=40)[order]
        assert counts[:first].sum() == counts[topk:].sum() == 0
        expected, freedom = 3000 / (topk - first), topk - first - 1
        statistic = (counts[first:topk] - expected).square().sum() / expected
        assert abs(statistic - freedom) <= 4 * (2 * freedom) ** 0.5


@torch.no_grad()
def test_three_cases_and_their_target_masks(monkeypatch, double):
    """lambda_s leaves a single candidate, the fourth nearest code, so that every code of both levels is known."""
    spot = torch.zeros(1, 1, 64, 64)
    spot[..., 21, 45] = 1
    monkeypatch.setattr(dsr, "perlin_mask", lambda count, *_: spot.expand(count, -1, -1, -1))
    model, x = small(lambda_s=(0.06, 0.06)), image(5, 200, 3, 64, 64)  # int(0.06 * 64) + 1 = 4, int(0.05 * 64) = 3
    model.begin(2)
    latent = model.discrete_latent_model
    lo, hi, normal_lo, normal_hi, mask = model.simulate(x, seeded())
    encoded, features = latent.encode_lo(x)
    close(normal_lo, slow_quantize(latent.codebook_lo, features))
    close(normal_hi, slow_quantize(latent.codebook_hi, latent.encode_hi(encoded, normal_lo)))

    def swapped(quantizer: VectorQuantizer, codes: Tensor, y: int, x: int) -> Tensor:
        order = distances(codes[:, :, y, x], quantizer.embedding.weight).argsort(1)
        codes = codes.clone()
        codes[:, :, y, x] = quantizer.embedding.weight[order[:, 3]]
        return codes

    changed_lo = swapped(latent.codebook_lo, normal_lo, 21 // 8, 45 // 8)
    changed_hi = swapped(latent.codebook_hi, normal_hi, 21 // 4, 45 // 4)
    again = slow_quantize(latent.codebook_hi, latent.encode_hi(encoded, changed_lo))
    assert (again != normal_hi).any()  # the cases differ
    target_lo, target_hi = torch.zeros(200, 1, 64, 64), torch.zeros(200, 1, 64, 64)
    target_lo[:, :, 16:24, 40:48] = target_hi[:, :, 20:24, 44:48] = 1
    found = 0
    for share, *case in ((1 / 2, changed_lo, swapped(latent.codebook_hi, again, 21 // 4, 45 // 4), target_lo),
                         (1 / 4, changed_lo, normal_hi, target_lo), (1 / 4, normal_lo, changed_hi, target_hi)):
        is_case = torch.stack([(one == other).flatten(1).all(1) for one, other in zip((lo, hi, mask), case)]).all(0)
        assert abs(is_case.float().mean() - share) < 4 * (share * (1 - share) / 200) ** 0.5
        found += is_case.sum()
    assert found == 200


def test_masks_are_perlin_noise_and_half_of_the_samples_stay_normal():
    mask = perlin_mask(1000, 64, 64, seeded(7), 0.5, 0.5)
    assert abs((mask.amax((1, 2, 3)) == 0).float().mean() - (0.5 + 0.5 * 0.056)) < 0.06
    assert abs(mask.mean() - 0.5 * 0.048) < 0.006

    model, x = small(), image(5, 40, 3, 64, 64)
    with pytest.raises(RuntimeError, match=r"begin\(2\)"):
        model.simulate(x, seeded())
    model.begin(2)
    lo, hi, normal_lo, normal_hi, target = model.simulate(x, seeded(7))
    mask = perlin_mask(40, 64, 64, seeded(7), 0.5, 0.5)
    pooled = [mask.view(40, 1, 64 // s, s, 64 // s, s).amax((3, 5)).repeat_interleave(s, 2).repeat_interleave(s, 3)
              for s in (8, 4)]
    assert all(torch.equal(target[n], pooled[0][n]) or torch.equal(target[n], pooled[1][n]) for n in range(40))
    changed = (lo != normal_lo).flatten(1).any(1) | (hi != normal_hi).flatten(1).any(1)
    assert torch.equal(changed, mask.amax((1, 2, 3)) > 0)
    assert not model.simulate(x, seeded(), normal_share=1.0).mask.any()


def test_strengths_are_uniform_in_lambda_s(monkeypatch):
    seen = []
    monkeypatch.setattr(dsr, "sample_codebook_anomalies", lambda index, ranked, mask, strength, generator: (
        seen.append(strength), index)[1])
    x = torch.zeros(500, 3, 32, 32)
    for lambda_s, knobs in (((0.2, 1.0), {}), ((0.5, 0.6), {"lambda_s": (0.5, 0.6)})):
        seen.clear()
        model = small(**knobs)
        model.begin(2)
        model.simulate(x, seeded())
        lo, hi = seen
        assert lo.shape == hi.shape == (500,) and is_uniform(lo, *lambda_s) and is_uniform(hi, *lambda_s)
        assert abs(torch.corrcoef(torch.stack(seen))[0, 1]) < 0.15  # each level draws its own


def test_smudges_are_one_colour_blended_under_the_mask(monkeypatch):
    x = image(6, 32, 3, 64, 64)
    before = x.clone()
    smudged, mask = synthesize_smudges(x, seeded(1))
    assert torch.equal(mask, perlin_mask(32, 64, 64, seeded(1), 0.5, 0.5))
    assert torch.equal(torch.where(mask > 0, x, smudged), x) and torch.equal(x, before)
    assert torch.equal((smudged != x).any(1, keepdim=True), mask > 0)

    monkeypatch.setattr(dsr, "perlin_mask", lambda count, height, width, *_: torch.ones(count, 1, height, width))
    x = torch.tensor([0.0, 1.0, 0.5, 0.25]).view(1, 1, 2, 2).expand(1000, 3, 2, 2)
    for beta, arguments in (((0.1, 1.0), ()), ((0.3, 0.4), ((0.3, 0.4),))):
        smudged, _ = synthesize_smudges(x, seeded(2), *arguments)
        kept = smudged[:, :, 0, 1] - smudged[:, :, 0, 0]  # 1 - beta, the image's share
        close(kept, kept[:, :1].expand(-1, 3))
        assert is_uniform(1 - kept[:, 0], *beta)
        colour = smudged[:, :, 0, 0] / (1 - kept)
        assert is_uniform(colour, 0, 1) and (colour.t().corrcoef() - torch.eye(3)).abs().max() < 0.15  # three draws
        close(smudged, (1 - kept)[..., None, None] * colour[..., None, None] + kept[..., None, None] * x)


@pytest.mark.parametrize("stage, share", [(2, 0.4), (3, 0.3)])
@pytest.mark.parametrize("knobs, most", [({}, 90), ({"rotation": 20}, 20), ({"rotation": 0}, 0)])
def test_normal_images_are_turned(stage, share, knobs, most, monkeypatch):
    """Slopes of brightness ramps about the centre show the angles."""
    seen = []

    def stop(turned: Tensor, *_):
        seen.append(turned)
        raise InterruptedError

    ramp = 0.5 + (torch.arange(32) - 15.5).expand(32, 32) / 64
    x = torch.stack((ramp.t(), ramp, ramp)).expand(1000, -1, -1, -1)
    model = small(**knobs)
    model.begin(stage)
    monkeypatch.setattr(model, "simulate", stop)
    monkeypatch.setattr(dsr, "synthesize_smudges", stop)
    with pytest.raises(InterruptedError):
        model.losses(x, seeded(3))
    turned, = seen
    along_y, along_x = turned[:, 0, 18, 15] - turned[:, 0, 14, 15], turned[:, 0, 15, 18] - turned[:, 0, 15, 14]
    angle = torch.atan2(along_x, along_y).rad2deg()
    close((along_x.square() + along_y.square()).sqrt(), torch.full((1000,), 4 / 64), rtol=1e-3, atol=0)
    if most:
        moved = (turned != x).flatten(1).any(1)
        assert abs(moved.float().mean() - share) < 4 * (share * (1 - share) / 1000) ** 0.5
        assert is_uniform(angle[moved], -most, most)
    else:
        close(turned, x, rtol=0, atol=1e-5)


# Losses and stages


def turn_some(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    chosen = torch.rand(len(x), generator=generator) < share
    degrees = 180 * torch.rand(len(x), generator=generator) - 90
    assert 0 < chosen.sum() < len(x)
    return torch.cat([dsr.rotate(x[n:n + 1], degrees[n:n + 1]) if chosen[n] else x[n:n + 1] for n in range(len(x))])


def slow_detect(model: DsrModel, lo: Tensor, hi: Tensor) -> tuple[Tensor, ...]:
    """restricted_lo, restricted_hi, general, specific, coarse logits; from modules called one by one."""
    latent = model.discrete_latent_model
    restricted_lo, restricted_hi = model.subspace_restriction_module_lo(lo), model.subspace_restriction_module_hi(hi)
    requantized = [slow_quantize(latent.codebook_lo, restricted_lo), slow_quantize(latent.codebook_hi, restricted_hi)]
    specific = model.image_reconstruction_network(torch.cat((latent.upsample_lo(requantized[0]), requantized[1]), 1))
    general = latent.general_decoder(torch.cat((latent.upsample_lo(lo), hi), 1))
    return restricted_lo, restricted_hi, general, specific, model.anomaly_detection_module.unet(
        torch.cat((specific, general), 1))


def slow_focal(logits: Tensor, mask: Tensor) -> Tensor:
    p = logits.double().softmax(1)
    truth = torch.cat((mask == 0, mask > 0), 1).double().clamp(1e-5, 1 - 1e-5)
    p = (p * truth).sum(1) + 1e-5
    return -((1 - p) ** 2 * p.log()).mean()


@torch.no_grad()
def test_terms_of_both_losses_against_a_slow_version(double):
    model, x = small(), image(8, 8, 3, 64, 64)
    model.begin(2)
    terms, generator = model.losses(x, seeded(3)), seeded(3)
    turned = turn_some(x, 0.4, generator)
    simulated = model.simulate(turned, generator)
    assert 0 < simulated.mask.mean() < 0.5
    restricted_lo, restricted_hi, _, specific, coarse = slow_detect(model, simulated.lo, simulated.hi)
    expected = {"focal": slow_focal(coarse, simulated.mask),
                "restriction_hi": (restricted_hi - simulated.normal_hi).square().mean(),
                "restriction_lo": (restricted_lo - simulated.normal_lo).square().mean(),
                "reconstruction": 10 * (specific - turned).square().mean()}
    close(terms, expected, rtol=1e-9, atol=0)

    model.begin(3)
    terms, generator = model.losses(x, seeded(3)), seeded(3)
    smudged, mask = synthesize_smudges(turn_some(x, 0.3, generator), generator)
    assert mask.mean() > 0
    *_, general, specific, coarse = slow_detect(model, *model.discrete_latent_model.quantize(smudged))
    logits = model.upsampling_module.unet(torch.cat((specific, general, coarse.softmax(1)), 1))
    close(terms, {"focal": slow_focal(logits, mask)}, rtol=1e-9, atol=0)


def test_gradients_of_each_term():
    """The detector's inputs are detached. Gradients pass straight through requantization."""
    model = small()
    model.begin(2)
    terms = model.losses(image(8, 4, 3, 64, 64), seeded(1))
    for term, reached in {"focal": {DETECTION}, "restriction_lo": {RESTRICTION_LO}, "restriction_hi": {RESTRICTION_HI},
                          "reconstruction": {RESTRICTION_LO, RESTRICTION_HI, RECONSTRUCTION}}.items():
        model.zero_grad()
        terms[term].backward(retain_graph=True)
        assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == reached, term


@pytest.mark.parametrize("stage, moving", [(1, PARTS[:1]), (2, PARTS[1:5]), (3, PARTS[5:])])
def test_a_stage_moves_its_own_parts_alone_and_its_loss_falls(stage, moving):
    model, x = small(), image(8, 4, 3, 64, 64)
    trainer, parameters = model, list(model.discrete_latent_model.parameters())
    if stage == 1:
        trainer = model.discrete_latent_model.train()
    else:
        model.begin(5 - stage)  # begin undoes the other stage's choice
        parameters = model.begin(stage)
        assert {id(p) for p in parameters} == {id(p) for name in moving for p in getattr(model, name).parameters()}
        assert [name for name in PARTS if getattr(model, name).training] == moving
        assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == set(moving)
    before = {name: state(getattr(model, name)) for name in PARTS}
    optimizer, seen = torch.optim.Adam(parameters, lr=2e-3), []
    for _ in range(10):
        optimizer.zero_grad()
        loss = sum(trainer.losses(x, seeded(1)).values())
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.95 * seen[0]
    for name in PARTS:
        still = {key for key, value in state(getattr(model, name)).items() if torch.equal(value, before[name][key])}
        assert still == (set() if name in moving else before[name].keys())  # every entry of a moving part changes


def test_bfloat16_autocast_leaves_codes_losses_and_scores_in_float32():
    model, x = small(), image(1, 2, 3, 64, 64)
    logits, y = (torch.randn(2, 2, 8, 8, generator=seeded(n)).bfloat16() for n in (1, 2))
    features, mask = 0.1 * torch.randn(2, 6, 16, 16, generator=seeded(3)), (y[:, :1] > 0).float()
    plain, other = quantizer_with(torch.randn(40, 6)).train(), quantizer_with(torch.randn(40, 6)).train()
    other.load_state_dict(plain.state_dict())
    quantized, commitment = plain(features, seeded())
    parameters = model.begin(2)
    with torch.autocast("cpu", torch.bfloat16):
        for found, expected in zip(other(features, seeded()), (quantized, commitment)):
            close(found, expected)
        terms = model.losses(x, seeded())
        found = dsr.focal_loss(logits, mask), dsr.squared_error(logits, y)
    assert same(plain.state_dict(), other.state_dict())
    close(found, (slow_focal(logits, mask), (logits.double() - y.double()).square().mean()), check_dtype=False)
    assert all(term.dtype == torch.float32 for term in (*terms.values(), *found))
    sum(terms.values()).backward()
    assert all(p.grad.isfinite().all() for p in parameters)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.eval().predict(x)
    assert found["score"].dtype == found["anomaly_map"].dtype == torch.float32


def test_five_lines_train_stage_two_in_an_empty_folder(tmp_path):
    """The five lines are those of the file's docstring."""
    shutil.copy(dsr.__file__, tmp_path)
    lines = [line.strip() for line in dsr.__doc__.split("Five lines train a stage:")[1].strip().split("\n")[:5]]
    code = "\n".join(lines).replace("load_codebook()", "DiscreteLatentModel(8, 1, 4, 64, 8), width=4")
    code = f"""
import torch
from dsr import PUBLISHED, DiscreteLatentModel, DsrModel
image = torch.rand(2, 3, 64, 64)
{code}
assert all(term.isfinite() for term in terms.values()) and len(terms) == 4
found = model.eval().predict(image)
print(*found["score"].shape, *found["anomaly_map"].shape)
"""
    run = subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, '.')\n{code}"],
                         cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.split() == ["2", "2", "64", "64"], run.stderr


# Prediction


def test_the_score_comes_from_the_mask_before_upsampling():
    model, x = small(), image(1, 3, 3, 64, 96)
    model.begin(3)
    with pytest.raises(RuntimeError, match="eval"):
        model.predict(x)
    model.eval()
    for window, side in ((None, 5), (9, 9)):  # 21 / 256 of 64 is 5.25
        found = model.predict(x, window)
        coarse, before = found["coarse_mask"], found["anomaly_map"]
        assert coarse.shape == before.shape == (3, 64, 96)
        means = F.pad(coarse, (side // 2,) * 4).unfold(1, side, 1).unfold(2, side, 1).mean((3, 4))
        close(found["score"], means.amax((1, 2)))
        model.upsampling_module.unet.decoder.fin_out[0].bias.data.add_(torch.tensor([0.0, 1.0]))
        again = model.predict(x, window)
        assert not again["score"].requires_grad
        assert torch.equal(again["score"], found["score"]) and (again["anomaly_map"] > before).all()


@pytest.mark.parametrize("wrong, words", [
    (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "uint8"), (torch.zeros(3, 64, 64), "3, 64, 64"),
    (torch.zeros(1, 1, 64, 64), "1, 1, 64, 64"), (torch.zeros(1, 3, 80, 64), "80, 64"),
    (torch.zeros(1, 3, 64, 80), "64, 80"), (torch.zeros(1, 3, 32, 64), "32, 64"),
    (torch.full((1, 3, 64, 64), 255.0), "255"), (torch.full((1, 3, 64, 64), -0.1), "-0.1"),
    (torch.full((1, 3, 64, 64), torch.nan), "nan")])
def test_predict_refuses_what_is_no_image(wrong, words):
    with pytest.raises(ValueError, match=words):
        small().predict(wrong)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["export", "trace"])
def test_predict_as_a_graph(way, double):
    class Predict(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = small()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            found = self.model.predict(x)
            return found["score"], found["anomaly_map"]

    module, example = Predict().eval(), image(0, 2, 3, 64, 64)
    if way == "export":
        dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
        graph, x = torch.export.export(module, (example,), dynamic_shapes=dynamic).module(), image(1, 3, 3, 64, 64)
    else:
        graph, x = torch.jit.trace(module, example, check_trace=False), image(1, 3, 3, 64, 64)
    for found, expected in zip(graph(x), module(x)):
        close(found, expected)


# Weights

FILES = {"subspace_restriction_hi": RESTRICTION_HI, "subspace_restriction_lo": RESTRICTION_LO,
         "anomaly_det_module": DETECTION, "upsample_module": UPSAMPLING, "image_recon_module": RECONSTRUCTION}
TRAINING = "dsr_0.0002_100_bs8_anom_par0.2"  # how file names of the authors' training begin


def as_authors(module: nn.Module) -> dict:
    """A state dict under the authors' keys: most parts of a name begin with an underscore."""
    plain = "upsample_t", "block1", "block2", "upblock1", "upblock2", "pre_vq_conv", "weight", "bias"

    def name(part: str) -> str:
        part = RELEASED.get(part, part)
        return part if part.isdigit() or part in plain else "_" + part

    return {key if key.startswith("unet") else ".".join(map(name, key.split("."))): value
            for key, value in module.state_dict().items()}


def save_authors(model: DsrModel, folder: Path) -> Path:
    """Saves the five files of a class and the codebook's. Returns one path."""
    for kind, module in FILES.items():
        content = as_authors(getattr(model, module))
        if kind == "image_recon_module":
            content["_vq_vae_bot._ema_w"] = torch.zeros(3)
        torch.save(content, folder / f"DSR_{kind}_metal_nut.pckl")
    torch.save(as_authors(model.discrete_latent_model), folder / "vq_model_pretrained_128_4096.pckl")
    return folder / "DSR_image_recon_module_metal_nut.pckl"


@torch.no_grad()
def test_authors_files_take_rgb(tmp_path, double):
    model, x = small(), image(9, 2, 3, 64, 64)
    loaded = load(save_authors(model, tmp_path))
    assert not loaded.training and loaded.reading == {"size": 256, "antialias": False}
    latent = load_codebook(tmp_path / dsr.CODEBOOK_FILE)
    assert not latent.training and latent.settings == SIZES
    expected = model.predict(x.flip(1))
    expected |= {name: expected[name].flip(1) for name in ("general", "specific")}
    close(loaded.predict(x), expected, rtol=0, atol=1e-9)
    close(latent.decode(*latent.quantize(x)), expected["general"], rtol=0, atol=1e-9)


def test_authors_files_are_found_from_any_of_them(tmp_path):
    path = save_authors(small(), tmp_path)
    expected = state(load(path))
    codebook = shutil.move(tmp_path / dsr.CODEBOOK_FILE, tmp_path / "elsewhere.pckl")
    with pytest.raises(ValueError, match=dsr.CODEBOOK_FILE):
        load(path)
    for kind in FILES:
        assert same(state(load(tmp_path / f"DSR_{kind}_metal_nut.pckl", codebook)), expected)
    with zipfile.ZipFile(tmp_path / "codebook.zip", "w") as archive:
        archive.write(codebook, dsr.CODEBOOK_FILE)
    for kind in FILES:  # as the authors' training writes them
        name = "upsample" if kind == "upsample_module" else f"{kind}_metal_nut"
        shutil.copy(tmp_path / f"DSR_{kind}_metal_nut.pckl", tmp_path / f"{TRAINING}_{name}.pckl")
    for name in ("upsample", "anomaly_det_module_metal_nut", "image_recon_module_metal_nut"):
        assert same(state(load(tmp_path / f"{TRAINING}_{name}.pckl", tmp_path / "codebook.zip")), expected)
    shutil.copy(path, tmp_path / f"{TRAINING}_image_recon_module_pill.pckl")
    with pytest.raises(ValueError, match="2 files"):  # two classes are there
        load(tmp_path / f"{TRAINING}_upsample.pckl", codebook)
    with pytest.raises(ValueError, match="subspace_restriction_hi_pill.pckl"):
        load(tmp_path / f"{TRAINING}_image_recon_module_pill.pckl", codebook)
    with pytest.raises(ValueError, match="DSR_image_recon_module_CLASS.pckl"):
        load(shutil.copy(path, tmp_path / "weights.pckl"), codebook)


def test_own_checkpoints_keep_settings_and_reading(tmp_path):
    model, reading = small(lambda_s=(0.3, 0.9), rotation=5.0), {"size": 64, "antialias": True}
    torch.save({"method": "dsr", "settings": model.settings, "reading": reading, "model": model.state_dict()},
               tmp_path / "last.pt")
    loaded = load(tmp_path / "last.pt")
    assert same(state(loaded), state(model)) and not loaded.training and loaded.reading == reading
    assert loaded.settings == {"latent": SIZES, "width": 5, "lambda_s": (0.3, 0.9), "rotation": 5.0}
    assert (loaded.lambda_s, loaded.rotation, model.reading) == ((0.3, 0.9), 5.0, {})
    latent = model.discrete_latent_model
    torch.save({"method": "dsr-codebook", "settings": latent.settings, "reading": reading,
                "model": latent.state_dict()}, tmp_path / "codebook.pt")
    loaded = load_codebook(tmp_path / "codebook.pt")
    assert same(state(loaded), state(latent)) and loaded.settings == SIZES and not loaded.training
    with pytest.raises(ValueError, match="of dsr-codebook, not of dsr"):
        load(tmp_path / "codebook.pt")
    with pytest.raises(ValueError, match="of dsr, not of dsr-codebook"):
        load_codebook(tmp_path / "last.pt")


def test_anomalib_checkpoints_are_kept_as_trained(tmp_path):
    model = small()
    content = {}
    for name in PARTS:
        content |= {f"model.{name}.{key}": value for key, value in as_authors(getattr(model, name)).items()}
    content |= {"post_processor._image_threshold": torch.zeros(1), "model.other": torch.zeros(1)}
    resize = {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [192, 192], "antialias": True}}
    other = {"class_path": "torchvision.transforms.v2.ToDtype", "init_args": {"scale": True}}
    config = {"transform": {"init_args": {"transforms": [other, resize]}}}
    for extra, size in (({}, 256), ({"anomalib_pre_processor_config": config}, 192)):
        torch.save({"state_dict": content, "epoch": 3} | extra, tmp_path / "model.ckpt")
        loaded = load(tmp_path / "model.ckpt")
        assert same(state(loaded), state(model)) and not loaded.training
        assert loaded.settings["width"] == 5 and loaded.reading == {"size": size, "antialias": True}


def test_the_published_codebook_is_fetched_once_and_checked(tmp_path, monkeypatch):
    assert dsr.CODEBOOK_URL == ("https://github.com/open-edge-platform/anomalib/releases/download/"
                                "dsr_pretrained_weights/dsr_vq_model_pretrained.zip")
    assert dsr.CODEBOOK_SHA256 == "52fe7504ec8e9df70b4382f287ab26269dcfe000cd7a7e146a52c6f146f34afb"
    model = small()
    torch.save(as_authors(model.discrete_latent_model), tmp_path / "codes")
    source = tmp_path / "published.zip"
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("folder/README", "not this")
        archive.write(tmp_path / "codes", "folder/../../vq_model_pretrained_128_4096.pckl")
    monkeypatch.setattr(dsr, "CODEBOOK_URL", source.as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(ValueError, match="hash.*--codebook FILE"):
        load_codebook()
    assert not list(tmp_path.glob("hub/checkpoints/*"))
    monkeypatch.setattr(dsr, "CODEBOOK_SHA256", hashlib.sha256(source.read_bytes()).hexdigest())
    weight = load_codebook().encoder_hi.conv_1.weight
    assert torch.equal(weight, model.discrete_latent_model.encoder_hi.conv_1.weight.flip(1))
    assert torch.equal(weight, load_codebook(source).encoder_hi.conv_1.weight)
    source.unlink()
    assert torch.equal(weight, load_codebook().encoder_hi.conv_1.weight)
    cached = tmp_path / "hub/checkpoints/published.zip"
    cached.write_bytes(cached.read_bytes()[:-2000] + cached.read_bytes()[-1900:])
    with pytest.raises(ValueError, match="published.zip: damaged") as damaged:
        load_codebook()
    cached.unlink()
    with pytest.raises(ValueError, match="--pretrain IMAGES") as gone:
        load_codebook()
    assert "\n" not in str(damaged.value) + str(gone.value)


def test_files_that_do_not_fit_are_named_in_one_line(tmp_path):
    model, path = small(), tmp_path / "file.pt"
    own = {"method": "dsr", "settings": model.settings, "reading": {}, "model": model.state_dict()}
    key = "upsampling_module.unet.decoder.fin_out.0.bias"
    short = {name: value for name, value in own["model"].items() if name != key}
    not_finite = own["model"] | {key: torch.tensor([0, torch.nan])}
    for content, found in ((own | {"method": "draem"}, "draem"), (own | {"model": short}, "fin_out.0.bias"),
                           (own | {"settings": {"latent": SIZES, "depth": 3}}, "depth"), ({"weights": 1}, "CLASS"),
                           (own | {"model": not_finite}, "NaN"), ([1, 2], "list"), ({"a": Path("b")}, "more than")):
        torch.save(content, path)
        for reader in (load, load_codebook):
            with pytest.raises(ValueError) as error:
                reader(path)
            assert str(path) in str(error.value) and "\n" not in str(error.value)
        with pytest.raises(ValueError, match=found):
            load(path)
    torch.save(own, path)
    path.write_bytes(path.read_bytes()[:-5000])
    for reader in (load, load_codebook):
        with pytest.raises(ValueError, match="truncated"):
            reader(path)
        with pytest.raises(ValueError, match="No such file"):
            reader(tmp_path / "absent.pt")
