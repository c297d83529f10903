"""Tests of dsr.py. Oracles: the authors' networks in figures (golden.py), slow versions that sort all codes for each
position or write assignments as one-hot rows, closed forms, known clusters, one process against two."""
import copy
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dsr  # noqa: E402
from dsr import (DsrModel, VectorQuantizer, codebook_loss, detection_loss, load_codebook, load_dsr,  # noqa: E402
                 rank_codes, sample_codebook_anomalies, synthesize_smudges, upsampling_loss)
from golden import check, fill, image  # noqa: E402

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
    "requantized_hi": ((2, 32, 16, 16), -0.0043057737, 0.18282179, [
        -0.19669065, -0.0707146, -0.3790265, 0.066486239, -0.13562787, -0.22148629, -0.061238855, -0.37892342]),
    "requantized_lo": ((2, 32, 8, 8), 0.00087875099, 0.17805813, [
        -0.15044303, 0.064405978, 0.0021772385, -0.276963, 0.048466854, -0.13405712, -0.41803142, 0.13730609]),
    "specific": ((2, 3, 64, 64), 0.11011928, 0.26859235, [
        0.069362298, -0.17289838, 0.044024818, -0.047216192, -0.11007529, -0.08682467, 0.1720437, 0.24426137]),
    "coarse_mask": ((2, 64, 64), 0.44860755, 0.17172544, [
        0.54011118, 0.37377852, 0.53734934, 0.34124491, 0.74935746, 0.25033438, 0.69136226, 0.42321196]),
    "anomaly_map": ((2, 64, 64), 0.44838182, 0.17513586, [
        0.51425707, 0.57008892, 0.40850019, 0.54976815, 0.58667123, 0.50716615, 0.31814376, 0.30178359]),
}
PARTS = ["discrete_latent_model", "subspace_restriction_module_lo", "subspace_restriction_module_hi",
         "image_reconstruction_network", "anomaly_detection_module", "upsampling_module"]
SMALL = {"embedding_dim": 8, "num_embeddings": 64, "num_hiddens": 8, "num_residual_layers": 1,
         "num_residual_hiddens": 4, "base_width": 4}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(seed: int = 0) -> DsrModel:
    """A small model whose codebooks stand where features are."""
    torch.manual_seed(seed)
    model = DsrModel(**SMALL)
    model.train_stage(1)
    with torch.no_grad():
        model.discrete_latent_model(image(seed, 8, 3, 64, 64), seeded(seed))
    return model.eval()


def state(module: torch.nn.Module) -> dict:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# Networks.


@torch.no_grad()
def test_networks_give_the_authors_figures():
    model = DsrModel(0.2, 32, 64, 32, 2, 16)
    for name in PARTS:
        salt = {"subspace_restriction_module_lo": "lo", "subspace_restriction_module_hi": "hi"}.get(name, "")
        fill(getattr(model, name), salt)
    model.eval()
    latent, x = model.discrete_latent_model, image(0, 2, 3, 64, 64)
    found = dict(zip(("lo", "hi"), latent.quantize(x)))
    found |= zip(("restricted_lo", "restricted_hi", "general", "specific"), model.detect(found["lo"], found["hi"]))
    found["requantized_lo"] = latent.vq_vae_top.quantize(found["restricted_lo"])
    found["requantized_hi"] = latent.vq_vae_bot.quantize(found["restricted_hi"])
    found |= model.predict_parts(x)
    for name, (shape, mean, std, values) in GOLDEN.items():
        assert found[name].shape == shape, name
        check(found[name], mean, std, values, abs=1e-4)
    reconstruction, commitment, _ = latent(x)
    assert torch.equal(reconstruction, found["general"])
    torch.testing.assert_close(torch.stack(commitment), torch.tensor([0.0087962840, 0.0120141311]), rtol=0, atol=1e-6)
    score, anomaly_map = model.predict(x, window=21)
    torch.testing.assert_close(score, torch.tensor([0.50015032, 0.50421613]), rtol=0, atol=1e-4)
    assert torch.equal(anomaly_map, found["anomaly_map"])


def test_published_size_and_keys():
    model = DsrModel(num_embeddings=4096)
    assert sum(p.numel() for p in model.parameters()) == 40_298_762
    assert [len(getattr(model, name).state_dict()) for name in PARTS] == [40, 26, 26, 24, 36, 36]
    trained = [p for name in PARTS[1:] for p in getattr(model, name).parameters()]
    assert sum(p.numel() for p in trained) == 36_277_383


def test_predict_is_for_evaluation_and_works_at_any_size():
    model = small()
    score, anomaly_map = model.predict(image(1, 3, 3, 64, 96))
    assert score.shape == (3,) and anomaly_map.shape == (3, 64, 96) and not score.requires_grad
    coarse = model.predict_parts(image(1, 3, 3, 64, 96))["coarse_mask"]
    means = F.pad(coarse, (2, 2, 2, 2)).unfold(1, 5, 1).unfold(2, 5, 1).mean((3, 4))  # 21 / 256 of 64, odd
    torch.testing.assert_close(score, means.amax((1, 2)))
    with pytest.raises(RuntimeError, match="eval"):
        model.train().predict(image(1, 1, 3, 64, 64))


def test_bfloat16_autocast_leaves_codes_losses_and_scores_in_float32():
    model, x = small(), image(1, 2, 3, 64, 64)
    features = 0.1 * torch.randn(2, 8, 16, 16, generator=seeded())
    quantizer = model.discrete_latent_model.vq_vae_bot
    plain = quantizer.nearest(features)
    parameters = model.train_stage(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.nearest(features), plain)
        simulated = model.simulate(x, seeded())
        outputs = model.detect(simulated.lo, simulated.hi)
    assert outputs[-1].dtype == torch.bfloat16
    terms = detection_loss(x, simulated, *outputs)
    assert all(term.dtype == torch.float32 for term in terms.values())
    sum(terms.values()).backward()
    assert all(p.grad.isfinite().all() for p in parameters)
    with torch.autocast("cpu", torch.bfloat16):
        score, anomaly_map = model.eval().predict(x)
    assert score.dtype == anomaly_map.dtype == torch.float32


def test_exports_with_a_dynamic_batch():
    class Predict(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = small()

        def forward(self, x):
            return self.model.predict(x)

    module = Predict().eval()
    program = torch.export.export(module, (image(0, 2, 3, 64, 64),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for found, expected in zip(program.module()(image(1, 3, 3, 64, 64)), module(image(1, 3, 3, 64, 64))):
        torch.testing.assert_close(found, expected)


# The quantizer.


class OnGPU(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""
    is_cuda = True


@pytest.mark.parametrize("kind", [torch.Tensor, OnGPU])
def test_in_pieces_or_at_once_the_same(kind):
    """The search against all distances, the last piece a part; normalization and its gradient against its formula."""
    quantizer = quantizer_with(torch.randn(50, 4, generator=seeded(1)))
    features = torch.randn(2, 4, 20, 30, generator=seeded(2))
    slow = torch.cdist(features.movedim(1, -1).double(), quantizer.embedding.weight.double()).argmin(-1)
    assert torch.equal(quantizer.nearest(features.as_subclass(kind)).as_subclass(torch.Tensor), slow)

    x = (3 * torch.randn(3, 5, 8, 6, generator=seeded(3)) + 2).requires_grad_()
    weight = torch.randn(x.shape, generator=seeded(4))
    centred = x - x.mean((2, 3), keepdim=True)
    slow = centred / (centred.square().mean((2, 3), keepdim=True) + 1e-5).sqrt()
    found = dsr.InstanceNorm()(x.as_subclass(kind)).as_subclass(torch.Tensor)
    torch.testing.assert_close(found, slow, rtol=1e-5, atol=1e-5)
    for gradient, expected in zip(*(torch.autograd.grad((y * weight).sum(), x) for y in (found, slow))):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def quantizer_with(codes: torch.Tensor) -> VectorQuantizer:
    quantizer = VectorQuantizer(*codes.shape)
    for tensor, value in ((quantizer.embedding.weight, codes), (quantizer.ema_w, 4 * codes)):
        tensor.data.copy_(value)
    quantizer.ema_cluster_size.fill_(4)
    return quantizer


def test_nearest_codes_and_straight_through_gradient():
    quantizer = quantizer_with(torch.randn(20, 3, generator=seeded(1))).eval()
    features = torch.randn(2, 3, 4, 5, generator=seeded(2)).requires_grad_()
    codes = quantizer.embedding.weight
    slow = torch.stack([torch.stack([(features[n, :, y, x] - codes).norm(dim=1).argmin() for x in range(5)])
                        for n in range(2) for y in range(4)]).view(2, 4, 5)
    assert torch.equal(quantizer.nearest(features), slow)
    before, weight = state(quantizer), torch.randn(2, 3, 4, 5, generator=seeded(3))
    quantized, commitment, perplexity = quantizer(features)
    torch.testing.assert_close(quantized, codes[slow].movedim(-1, 1))
    torch.testing.assert_close(quantizer.quantize(features), quantized)
    torch.testing.assert_close(commitment, 0.25 * (features - codes[slow].movedim(-1, 1)).square().mean())
    share = torch.bincount(slow.flatten(), minlength=20) / 40
    torch.testing.assert_close(perplexity, (-(share[share > 0] * share[share > 0].log()).sum()).exp())
    ((quantized * weight).sum() + commitment).backward()
    torch.testing.assert_close(features.grad, weight + 0.5 * (features - quantized).detach() / features.numel())
    assert codes.grad is None and same(before, state(quantizer))


def test_moving_averages_against_one_hot_rows():
    codes = torch.randn(12, 3, generator=seeded(1))
    quantizer = quantizer_with(codes).train()
    size, total, codes = torch.full((12,), 4.0).double(), 4 * codes.double(), codes.double()
    for step in range(5):
        features = torch.randn(2, 3, 4, 4, generator=seeded(step))
        quantizer(features)
        rows = features.movedim(1, -1).reshape(-1, 3).double()
        hot = F.one_hot(((rows[:, None] - codes) ** 2).sum(2).argmin(1), 12).double()
        size = 0.99 * size + 0.01 * hot.sum(0)
        size = (size + 1e-5) / (size.sum() + 12e-5) * size.sum()
        total = 0.99 * total + 0.01 * hot.T @ rows
        codes = total / size[:, None]
    found = quantizer.ema_cluster_size, quantizer.ema_w, quantizer.embedding.weight
    for found, expected in zip(found, (size, total, codes)):
        torch.testing.assert_close(found.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_codebook_finds_clusters():
    centres = 3 * torch.randn(8, 4, generator=seeded(1))
    torch.manual_seed(0)
    quantizer, generator = VectorQuantizer(16, 4).train(), seeded(2)
    for _ in range(300):
        member = torch.randint(8, (4, 8, 8), generator=generator)
        features = (centres[member] + 0.05 * torch.randn(4, 8, 8, 4, generator=generator)).movedim(-1, 1)
        quantized, _, perplexity = quantizer(features, generator)
    assert torch.cdist(centres, quantizer.embedding.weight).amin(1).max() < 0.1
    assert (quantized - features).square().mean().sqrt() < 0.06 and perplexity > 7
    assert quantizer.ema_cluster_size.min() > 0.05  # no code is left unused


def test_a_code_far_from_all_features_is_revived_and_others_are_not():
    quantizer = quantizer_with(torch.randn(6, 3, generator=seeded(1))).train()
    quantizer.embedding.weight.data[2] = 1e3
    quantizer.ema_cluster_size[2] = 0.05
    before, features = state(quantizer), torch.randn(1, 3, 4, 4, generator=seeded(2))
    quantizer.revive(features.movedim(1, -1).reshape(-1, 3), seeded())
    changed = (quantizer.embedding.weight != before["embedding.weight"]).any(1)
    assert changed.tolist() == [False, False, True, False, False, False]
    assert (features[0].flatten(1).T == quantizer.embedding.weight[2]).all(1).any()
    torch.testing.assert_close(quantizer.ema_w / quantizer.ema_cluster_size[:, None], quantizer.embedding.weight)
    before = state(quantizer)
    quantizer.ema_cluster_size.fill_(0.05)  # enough where six codes share two features, of which 0.33 for each
    quantizer.revive(torch.zeros(2, 3), seeded())
    assert torch.equal(quantizer.embedding.weight, before["embedding.weight"])


def train_codebooks(batch: slice, generator: torch.Generator, steps: int, wrap=lambda model: model) -> dict:
    torch.manual_seed(0)
    model = DsrModel(**SMALL)
    optimizer = torch.optim.Adam(model.train_stage(1), lr=2e-4)
    latent = wrap(model.discrete_latent_model)
    for step in range(steps):
        x = F.interpolate(image(step, 8, 3, 5, 5), (64, 64), mode="bilinear")[batch]
        reconstruction, commitment, _ = latent(x, generator)
        optimizer.zero_grad()
        sum(codebook_loss(x, reconstruction, commitment).values()).backward()
        optimizer.step()
    return state(model.discrete_latent_model)


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
                            timeout=timedelta(seconds=60))
    result = train_codebooks(slice(4 * rank, 4 * rank + 4), seeded(rank), 5, torch.nn.parallel.DistributedDataParallel)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_learn_what_one_does(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert same(first, second)
    for key, value in train_codebooks(slice(8), seeded(0), 5).items():
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-5, msg=lambda text: f"{key}: {text}")


# Simulated anomalies.


def test_sampler_draws_from_the_codes_that_sorting_gives():
    codes = torch.randn(40, 5, generator=seeded(1))
    index = torch.randint(40, (3, 2, 2), generator=seeded(2))
    strength = torch.tensor([0.2, 0.55, 1.0])
    mask = torch.tensor([[1.0, 1], [1, 0]]).expand(3, 1, 2, 2)
    ranked = rank_codes(codes)
    draws = torch.stack([sample_codebook_anomalies(index, ranked, mask, strength, seeded(n)) for n in range(800)])
    for n, last in enumerate((8, 22, 40)):
        for y, x in ((0, 0), (0, 1), (1, 0)):
            order = (codes - codes[index[n, y, x]]).double().norm(dim=1).argsort()
            assert set(draws[:, n, y, x].tolist()) == set(order[2:last].tolist())
    assert (draws[:, :, 1, 1] == index[:, 1, 1]).all()


def test_sampler_is_uniform():
    ranked = rank_codes(torch.randn(64, 5, generator=seeded(1)))
    index = torch.zeros(1, 200, 200).long()
    drawn = sample_codebook_anomalies(index, ranked, torch.ones(1, 1, 200, 200), torch.tensor([0.7]), seeded())
    counts = torch.bincount(drawn.flatten(), minlength=64)[ranked[0].long()].double()
    assert counts[:3].sum() == counts[44:].sum() == 0  # 5 % of 64 is 3.2, 70 % is 44.8
    expected, freedom = 200 * 200 / 41, 40
    statistic = (counts[3:44] - expected).square().sum() / expected
    assert freedom - 4 * (2 * freedom) ** 0.5 < statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_sampler_leaves_the_unmasked_and_the_empty_mask():
    ranked = rank_codes(torch.randn(64, 5, generator=seeded(1)))
    index = torch.randint(64, (2, 8, 8), generator=seeded(2))
    before, mask = index.clone(), (torch.rand(2, 1, 8, 8, generator=seeded(3)) < 0.3).float()
    drawn = sample_codebook_anomalies(index, ranked, mask, torch.tensor([0.2, 1.0]), seeded())
    assert torch.equal(drawn != index, mask[:, 0] > 0) and torch.equal(index, before)
    assert torch.equal(sample_codebook_anomalies(index, ranked, 0 * mask, torch.tensor([0.2, 1.0]), seeded()), index)


def test_weakest_strength_has_a_candidate():
    ranked, index = rank_codes(torch.randn(64, 5, generator=seeded(1))), torch.arange(64).view(1, 8, 8)
    drawn = sample_codebook_anomalies(index, ranked, torch.ones(1, 1, 8, 8), torch.tensor([0.0]), seeded())
    assert torch.equal(drawn.flatten(), ranked[:, 3].long())


def test_three_cases_and_their_target_masks(monkeypatch):
    spot = torch.zeros(1, 1, 64, 64)
    spot[..., 21, 45] = 1
    monkeypatch.setattr(dsr, "perlin_mask", lambda count, *_: spot.expand(count, -1, -1, -1))
    model = small()
    model.train_stage(2)
    x = image(5, 400, 3, 64, 64)
    latent, simulated = model.discrete_latent_model, model.simulate(x, seeded())
    lo, hi, normal_lo, normal_hi, mask = simulated
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([q.flatten() for q in latent.quantize(x)]),
                                   torch.cat([normal_lo.flatten(), normal_hi.flatten()]))
        encoded, _ = latent.encode_lo(x)
        again = latent.vq_vae_bot.lookup(latent.vq_vae_bot.nearest(latent.encode_hi(encoded, lo)))
    # PAPERS.md's three cases: hi is encoded again from the swapped lo where both are swapped, and there alone.
    at_lo, changed_hi = (lo != normal_lo).any(1), (hi != normal_hi).any(1).flatten(1).any(1)
    changed_lo = at_lo.flatten(1).any(1)
    at_hi = (hi != torch.where((changed_lo & changed_hi)[:, None, None, None], again, normal_hi)).any(1)
    here_lo, here_hi = torch.zeros(8, 8).bool(), torch.zeros(16, 16).bool()
    here_lo[2, 5] = here_hi[5, 11] = True
    assert (at_lo[changed_lo] == here_lo).all() and (at_hi[changed_hi] == here_hi).all()
    for share, cases in ((0.5, changed_lo & changed_hi), (0.25, changed_lo & ~changed_hi),
                         (0.25, changed_hi & ~changed_lo)):
        assert abs(cases.float().mean() - share) < 0.08
    assert (changed_lo | changed_hi).all()
    target_lo, target_hi = torch.zeros(64, 64), torch.zeros(64, 64)
    target_lo[16:24, 40:48] = target_hi[20:24, 44:48] = 1
    assert (mask[changed_lo, 0] == target_lo).all() and (mask[~changed_lo, 0] == target_hi).all()


def test_simulation_follows_its_generator_and_leaves_half_of_the_samples():
    model, x = small(), image(5, 64, 3, 64, 64)
    with pytest.raises(RuntimeError, match="train_stage"):
        model.simulate(x, seeded())
    model.train_stage(2)
    one, two = model.simulate(x, seeded(7)), model.simulate(x, seeded(7))
    assert all(map(torch.equal, one, two))
    normal = one.mask.flatten(1).amax(1) == 0
    assert 0.35 < normal.float().mean() < 0.75
    assert torch.equal(one.lo[normal], one.normal_lo[normal]) and torch.equal(one.hi[normal], one.normal_hi[normal])
    assert not model.simulate(x, seeded(), normal_share=1.0).mask.any()


def test_smudges_are_one_colour_blended_under_the_mask():
    x = image(6, 32, 3, 64, 64)
    before = x.clone()
    smudged, mask = synthesize_smudges(x, seeded(1))
    assert torch.equal(x, before) and set(mask.unique().tolist()) == {0, 1}
    assert torch.equal(torch.where(mask > 0, x, smudged), x) and 0 <= smudged.min() and smudged.max() <= 1
    seen = 0
    for n in range(32):
        inside = mask[n, 0] > 0
        if inside.sum() > 2:  # smudged = (1 - beta) x + beta colour: a line, of the same slope in each channel
            a, b = x[n][:, inside].double(), smudged[n][:, inside].double()
            slope = ((a - a.mean(1, True)) * (b - b.mean(1, True))).sum(1) / (a - a.mean(1, True)).square().sum(1)
            torch.testing.assert_close(slope, slope[:1].expand(3), rtol=0, atol=1e-4)
            colour = b - slope[:, None] * a
            torch.testing.assert_close(colour, colour[:, :1].expand_as(b), rtol=0, atol=1e-4)
            assert -1e-4 <= slope[0] <= 0.9 + 1e-4
            seen += 1
    assert 8 < seen < 24


# Losses and stages.


def test_losses_are_their_formulas():
    a, b, c, d = (torch.randn(2, 3, 4, 4, generator=seeded(n)) for n in range(4))
    logits = torch.randn(2, 2, 4, 4, generator=seeded(4))
    mask = (torch.rand(2, 1, 4, 4, generator=seeded(5)) < 0.5).float()
    p = torch.where(mask[:, 0] > 0, logits.softmax(1)[:, 1], logits.softmax(1)[:, 0])
    focal = -((1 - p) ** 2 * p.log()).mean()
    simulated = dsr.Simulated(a, b, c, d, mask)
    terms = detection_loss(a, simulated, a, b, c, d, logits)
    expected = {"focal": focal, "restriction_hi": ((b - d) ** 2).mean(), "restriction_lo": ((a - c) ** 2).mean(),
                "reconstruction": 10 * ((a - d) ** 2).mean()}
    torch.testing.assert_close(terms, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(upsampling_loss(logits, mask), {"focal": focal}, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(codebook_loss(a, b, (focal, focal + 1)), {
        "reconstruction": ((a - b) ** 2).mean(), "commitment_lo": focal, "commitment_hi": focal + 1})


def losses(model: DsrModel, stage: int, generator: torch.Generator) -> dict:
    x = image(8, 4, 3, 64, 64)
    if stage == 1:
        return codebook_loss(x, *model.discrete_latent_model(x, generator)[:2])
    if stage == 2:
        simulated = model.simulate(x, generator)
        return detection_loss(x, simulated, *model.detect(simulated.lo, simulated.hi))
    smudged, mask = synthesize_smudges(x, generator)
    return upsampling_loss(model(smudged)[-1], mask)


@pytest.mark.parametrize("stage, moving", [(1, PARTS[:1]), (2, PARTS[1:5]), (3, PARTS[5:])])
def test_a_stage_moves_its_own_parts_alone_and_its_loss_falls(stage, moving):
    model = small()
    before = {name: state(getattr(model, name)) for name in PARTS}
    parameters = model.train_stage(stage)
    optimizer, seen = torch.optim.Adam(parameters, lr=2e-3), []
    for _ in range(12):
        optimizer.zero_grad()
        loss = sum(losses(model, stage, seeded(1)).values())
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.9 * seen[0]
    assert [name for name in PARTS if not same(before[name], state(getattr(model, name)))] == moving
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == set(moving)
    still = [k for k, v in state(model).items() if torch.equal(v, before[k.split(".")[0]][k.split(".", 1)[1]])]
    assert {k.split(".")[0] for k in still}.isdisjoint(moving)  # every entry of what moves has moved


def test_stage_one_resumes_bit_equal():
    torch.manual_seed(0)
    model = DsrModel(**SMALL)
    once, (first, second) = copy.deepcopy(model), (copy.deepcopy(model) for _ in range(2))
    for n in range(4):
        once.train_stage(1)
        once.discrete_latent_model(image(n, 2, 3, 64, 64), seeded(n))
    for n in range(4):
        if n == 2:
            second.load_state_dict(first.state_dict())
        (part := first if n < 2 else second).train_stage(1)
        part.discrete_latent_model(image(n, 2, 3, 64, 64), seeded(n))
    assert same(state(once), state(second))


# Weights.


def as_authors(module: torch.nn.Module) -> dict:
    plain = "upsample_t", "block1", "block2", "upblock1", "upblock2", "pre_vq_conv", "weight", "bias"

    def name(part: str) -> str:
        return part if part.isdigit() or part in plain else "_" + part
    return {k if k.startswith("unet") else ".".join(map(name, k.split("."))): v for k, v in module.state_dict().items()}


def save_authors(model: DsrModel, folder: Path) -> Path:
    for kind, module in dsr.AUTHORS_FILES.items():
        content = as_authors(getattr(model, module))
        if kind == "image_recon_module":
            content["_vq_vae_bot._ema_w"] = torch.zeros(3)
        torch.save(content, folder / f"DSR_{kind}_metal_nut.pckl")
    torch.save(as_authors(model.discrete_latent_model), folder / dsr.CODEBOOK_FILE)
    return folder / "DSR_image_recon_module_metal_nut.pckl"


def test_authors_files_take_rgb(tmp_path, monkeypatch):
    model, x = small(), image(9, 2, 3, 64, 64).double()
    path = save_authors(model, tmp_path)
    loaded = [load_dsr(path), load_dsr(tmp_path / "DSR_upsample_module_metal_nut.pckl")]
    codebook = shutil.move(tmp_path / dsr.CODEBOOK_FILE, tmp_path / "codebook.pckl")
    with pytest.raises(ValueError, match=dsr.CODEBOOK_FILE):
        load_dsr(path)
    loaded.append(load_dsr(path, codebook))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the order of sums differs: not to see it
    expected = model.double().predict_parts(x.flip(1))
    expected |= {name: expected[name].flip(1) for name in ("general", "specific")}
    for other in loaded:
        for name, part in other.double().predict_parts(x).items():
            torch.testing.assert_close(part, expected[name], rtol=0, atol=1e-9)
    reconstruction = load_codebook(codebook).double().discrete_latent_model.eval()(x)[0]
    torch.testing.assert_close(reconstruction, expected["general"], rtol=0, atol=1e-9)


def test_anomalib_and_own_checkpoints(tmp_path):
    model = small()
    content = {}
    for name in PARTS:
        content |= {f"model.{name}.{k}": v for k, v in as_authors(getattr(model, name)).items()}
    content |= {"post_processor._image_threshold": torch.zeros(1), "model.other": torch.zeros(1)}
    torch.save({"state_dict": content, "epoch": 3}, tmp_path / "anomalib.ckpt")
    torch.save({"method": "dsr", "settings": SMALL, "model": model.state_dict()}, tmp_path / "last.pt")
    torch.save({"method": "dsr-codebook", "model": model.discrete_latent_model.state_dict()}, tmp_path / "codebook.pt")
    for name in ("anomalib.ckpt", "last.pt"):
        loaded = load_dsr(tmp_path / name)
        assert same(state(loaded), state(model)) and not loaded.training
    loaded = load_codebook(tmp_path / "codebook.pt", latent_anomaly_strength=0.3, base_width=4)
    assert same(state(loaded.discrete_latent_model), state(model.discrete_latent_model))
    assert loaded.latent_anomaly_strength == 0.3 and loaded.state_dict().keys() == model.state_dict().keys()


def test_published_codebook_is_fetched_once_and_checked(tmp_path, monkeypatch):
    model = small()
    torch.save(as_authors(model.discrete_latent_model), tmp_path / "codes")
    source = tmp_path / "published.zip"
    with zipfile.ZipFile(source, "w") as archive:
        archive.write(tmp_path / "codes", "folder/../../" + dsr.CODEBOOK_FILE)
    monkeypatch.setattr(dsr, "CODEBOOK_URL", source.as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(ValueError, match="hash.*--codebook FILE"):
        load_codebook()
    assert not list(tmp_path.glob("hub/checkpoints/*"))
    monkeypatch.setattr(dsr, "CODEBOOK_SHA256", hashlib.sha256(source.read_bytes()).hexdigest())
    weight = load_codebook().discrete_latent_model.encoder_b.conv_1.weight
    assert torch.equal(weight, model.discrete_latent_model.encoder_b.conv_1.weight.flip(1))
    assert torch.equal(weight, load_codebook(source).discrete_latent_model.encoder_b.conv_1.weight)
    source.unlink()
    assert torch.equal(weight, load_codebook().discrete_latent_model.encoder_b.conv_1.weight)
    cached = tmp_path / "hub/checkpoints/published.zip"
    cached.write_bytes(cached.read_bytes()[:-2000] + cached.read_bytes()[-1900:])
    with pytest.raises(ValueError, match="published.zip: ") as error:
        load_codebook()
    cached.unlink()
    with pytest.raises(ValueError, match="--pretrain IMAGES") as gone:
        load_codebook()
    assert "\n" not in str(error.value) + str(gone.value)


def test_files_that_do_not_fit_are_named_in_one_line(tmp_path):
    model, path = small(), tmp_path / "file.pt"
    own = {"method": "dsr", "model": model.state_dict()}
    short = {k: v for k, v in own["model"].items() if k != PARTS[5] + ".unet.decoder.fin_out.0.bias"}
    stray = {**own["model"], "anomaly_detection_module.vq.weight": torch.zeros(1)}
    for content, found in ((own | {"method": "draem"}, "draem"), (own | {"model": short}, "fin_out.0.bias"),
                           (own | {"model": stray}, "anomaly_detection_module.vq.weight"), ({"weights": 1}, "weights"),
                           ([1, 2], "list")):
        torch.save(content, path)
        with pytest.raises(ValueError, match=found) as error:
            load_dsr(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    torch.save(own, path)
    path.write_bytes(path.read_bytes()[:-5000])
    for load in (load_dsr, load_codebook):
        with pytest.raises(ValueError, match="truncated"):
            load(path)
        with pytest.raises(ValueError, match="No such file"):
            load(tmp_path / "absent.pt")
    torch.save(own, path)
    with pytest.raises(ValueError, match="of dsr, not of dsr-codebook"):
        load_codebook(path)


def test_works_alone_in_an_empty_folder(tmp_path):
    shutil.copy(dsr.__file__, tmp_path)
    code = """
import dsr, torch
model, image, generator = dsr.DsrModel(0.2, 8, 32, 8, 1, 4, base_width=4), torch.rand(2, 3, 64, 64), torch.Generator()
for stage in (1, 2, 3):
    optimizer = torch.optim.Adam(model.train_stage(stage), lr=2e-4)
    if stage == 1:
        reconstruction, commitment, perplexity = model.discrete_latent_model(image, generator)
        terms = dsr.codebook_loss(image, reconstruction, commitment)
    elif stage == 2:
        simulated = model.simulate(dsr.rotate_normals(image, generator, 90, 0.4), generator)
        terms = dsr.detection_loss(image, simulated, *model.detect(simulated.lo, simulated.hi))
    else:
        smudged, mask = dsr.synthesize_smudges(image, generator)
        *_, logits = model(smudged)
        terms = dsr.upsampling_loss(logits, mask)
    sum(terms.values()).backward()
    optimizer.step()
score, anomaly_map = model.eval().predict(image)
print(*score.shape, *anomaly_map.shape)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                         env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    assert run.stdout.split() == ["2", "2", "64", "64"], run.stderr
