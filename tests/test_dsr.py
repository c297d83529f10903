"""Tests of dsr.py. Oracles: recorded figures of the authors' networks (golden.py); the numbers of the paper and of the
authors' code, as literals; slow versions that sort all codes at each position, use one-hot assignments, or call the
modules one by one in float64; closed forms; uniform distributions; known clusters; autograd's graph."""
import hashlib
import math
import runpy
import shutil
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsr
from dsr import (PUBLISHED, DiscreteLatentModel, DsrModel, VectorQuantizer, learning_rate, load, load_codebook,
                 perlin_mask, rank_codes, sample_codebook_anomalies, synthesize_smudges)
from golden import check, fill, golden_value, image

close = torch.testing.assert_close
LATENT, RESTRICTION_LO, RESTRICTION_HI, RECONSTRUCTION, DETECTION, UPSAMPLING = PARTS = [
    "discrete_latent_model", "subspace_restriction_module_lo", "subspace_restriction_module_hi",
    "image_reconstruction_network", "anomaly_detection_module", "upsampling_module"]
SIZES = dict(hiddens=8, residual_layers=2, residual_hiddens=4, codes=64, code_length=6)  # no two are the same
RELEASED = {"encoder_lo": "encoder_t", "encoder_hi": "encoder_b", "project_lo": "pre_vq_conv_top",
            "project_hi": "pre_vq_conv_bot", "codebook_lo": "vq_vae_top", "codebook_hi": "vq_vae_bot",
            "general_decoder": "decoder_b", "upsample_lo": "upsample_t"}


def seeded(seed: int = 0, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


@pytest.fixture
def double(monkeypatch):
    """Everything in float64, so that no rounding decides between two codes."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small(seed: int = 0, **settings) -> DsrModel:
    """A small model whose codes start from features of eight images."""
    torch.manual_seed(seed)
    latent = DiscreteLatentModel(**SIZES).train()
    with torch.no_grad():
        latent.losses(image(seed, 8, 3, 64, 64), seeded(seed))
    return DsrModel(latent, width=5, **settings).eval()


def state(module: nn.Module) -> dict:
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def distances(features: Tensor, codes: Tensor) -> Tensor:
    """Distances (..., K) in float64 of features (..., D) to codes (K, D)."""
    return (features.double()[..., None, :] - codes.double()).norm(dim=-1)


def slow_quantize(quantizer: VectorQuantizer, features: Tensor) -> Tensor:
    codes = quantizer.embedding.weight
    return codes[distances(features.movedim(1, -1), codes).argmin(-1)].movedim(-1, 1)


# --- Published numbers and networks -----------------------------------------------------------------------------------
def test_published_settings():
    assert PUBLISHED == {
        "size": 256, "lr": 2e-4, "hiddens": 128, "residual_layers": 2, "residual_hiddens": 64, "codes": 4096,
        "code_length": 128, "decay": 0.99, "commitment_cost": 0.25, "pretrain_steps": 200_000, "pretrain_batch": 32,
        "steps": 100_000, "batch": 8, "drops": (80_000 / 100_000,), "drop_factor": 1 / 10, "width": 64,
        "lambda_s": (0.2, 1.0), "skipped": 0.05, "both_share": 1 / 2, "normal_share": 1 / 2, "noise_threshold": 0.5,
        "rotate": 90, "rotate_share": 0.4, "reconstruction_lambda": 10, "upsampling_steps": 20_000,
        "upsampling_rotate_share": 0.3, "beta": (0.1, 1.0), "window": 21}
    rates = [learning_rate(step, 100_000) for step in (0, 79_999, 80_000, 99_999)]
    assert rates == pytest.approx([2e-4, 2e-4, 2e-5, 2e-5]) and learning_rate(19_999, 20_000, drops=()) == 2e-4


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
    networks = [getattr(model, name) for name in PARTS[1:]] + [
        getattr(model.discrete_latent_model, name) for name in ("encoder_lo", "encoder_hi", "general_decoder")]
    assert len({type(network).forward for network in networks} - {nn.Sequential.forward}) == 6  # for torch.compile
    for name in PARTS[1:]:
        for conv in getattr(model, name).modules():
            if isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d)):
                bound, weight, spread = conv.weight[0].numel() ** -0.5, conv.weight, 5 / conv.weight.numel() ** 0.5
                std = 0.02 if name in (RECONSTRUCTION, DETECTION) else bound / 3 ** 0.5
                assert abs(weight.mean()) < spread * std and abs(weight.std() - std) < spread * std
                assert (weight.abs().max() > 1.8 * std) == (name in (RECONSTRUCTION, DETECTION))  # uniform ends at 1.73
                assert conv.bias is None or conv.bias.abs().max() <= bound


GOLDEN = {  # name: mean, standard deviation, values
    "general": (-0.024714079, 0.1336139, [
        -0.026116796, -0.32459238, -0.00097379461, 0.14265403, 0.19916733, -0.097870559, -0.020130105, -0.023687232]),
    "restricted_hi": (0.0054847791, 0.66086873, [
        -0.042455792, 0.00482063, 0.033290327, 1.4589422, 1.2208233, -0.029858153, -0.180792, -1.4180968]),
    "restricted_lo": (-0.011903204, 0.64362941, [
        -0.18731864, 0.29670754, 0.59150636, -1.4801083, -0.099686019, 0.097314447, -0.49493539, 0.171803]),
    "specific": (0.11011928, 0.26859235, [
        0.069362298, -0.17289838, 0.044024818, -0.047216192, -0.11007529, -0.08682467, 0.1720437, 0.24426137]),
    "coarse_mask": (0.44860755, 0.17172544, [
        0.54011118, 0.37377852, 0.53734934, 0.34124491, 0.74935746, 0.25033438, 0.69136226, 0.42321196]),
    "anomaly_map": (0.44838182, 0.17513586, [
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
    found |= model.detect(found["lo"], found["hi"], latent.decode(found["lo"], found["hi"]))
    found |= model.predict(x, window=21)
    for name, figures in GOLDEN.items():
        check(found[name], *figures, abs=1e-4)
    close(found["score"], torch.tensor([0.50015032, 0.50421613]), rtol=0, atol=1e-4)
    close(latent.losses(x, seeded()), {
        "reconstruction": (found["general"] - x).square().mean(), "commitment_lo": torch.tensor(0.0087962840),
        "commitment_hi": torch.tensor(0.0120141311)}, rtol=1e-4, atol=1e-6)


# --- Codebooks and stage 1 --------------------------------------------------------------------------------------------
def quantizer_with(codes: Tensor) -> VectorQuantizer:
    quantizer = VectorQuantizer(*codes.shape)
    quantizer.embedding.weight.data.copy_(codes)
    quantizer.ema_w.data.copy_(4 * codes)
    quantizer.ema_cluster_size.fill_(4)
    return quantizer


def test_nearest_codes_and_straight_through_gradient():
    """The codes lie close together and far from 0, where rounding could decide between them."""
    codes = 100 + 0.01 * torch.randn(530, 3, generator=seeded(1))
    quantizer = quantizer_with(codes).eval()
    features = (codes[:520] + 1e-4).view(2, 13, 20, 3).movedim(3, 1).requires_grad_()
    slow = distances(features.movedim(1, -1), codes).argmin(-1)  # (2, 13, 20)
    before, weight = state(quantizer), torch.randn(features.shape, generator=seeded(3))
    quantized, commitment = quantizer(features, seeded())
    assert torch.equal(quantizer.nearest(features), slow)
    close(quantized, codes[slow].movedim(-1, 1))
    close(quantizer.quantize(features), quantized)
    close(commitment, 0.25 * (features - codes[slow].movedim(-1, 1)).square().mean())
    for term, expected in ((commitment, 0.5 * (features - quantized).detach() / features.numel()), (
            (quantized * weight).sum(), weight), ((quantizer.quantize(features) * weight).sum(), weight)):
        close(torch.autograd.grad(term, features)[0], expected)
    assert not quantizer.embedding.weight.requires_grad and same(before, state(quantizer))
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


# --- Simulated anomalies ----------------------------------------------------------------------------------------------
def rotate_some(x: Tensor, most: float, share: float, generator: torch.Generator) -> Tensor:
    chosen = torch.rand(len(x), generator=generator) < share
    degrees = most * (2 * torch.rand(len(x), generator=generator) - 1)
    assert 0 < chosen.sum() < len(x)
    return torch.cat([dsr.rotate(x[n:n + 1], degrees[n:n + 1]) if chosen[n] else x[n:n + 1] for n in range(len(x))])


def slow_swap(quantizer: VectorQuantizer, codes: Tensor, mask: Tensor, lambda_s: Tensor, u: Tensor) -> Tensor:
    """All codes sorted at each position; rank 3 = int(0.05 * 64) up to int(lambda_s * 64), at least one of them."""
    order = distances(codes.movedim(1, -1), quantizer.embedding.weight).argsort(-1)
    last = (lambda_s * 64).int().clamp(min=3).view(-1, 1, 1)
    rank = 3 + (u * (last - 2)).floor().long()
    other = quantizer.embedding.weight[order.gather(-1, rank[..., None])[..., 0]].movedim(-1, 1)
    return torch.where(mask > 0, other, codes)


@torch.no_grad()
@pytest.mark.parametrize("settings, bounds, most", [({}, (0.2, 1), 90), (
    {"lambda_s": (0.0, 0.1), "rotate": 20}, (0, 0.1), 20)])
def test_simulate_equals_a_slow_version(settings, bounds, most, double):
    """1/2 of the samples normal; of the others 1/2 with both levels swapped, 1/4 with lo, 1/4 with hi alone."""
    model, x, generator = small(**settings), image(5, 40, 3, 64, 64), seeded(7)
    with pytest.raises(RuntimeError, match=r"begin\(2\)"):
        model.simulate(x, seeded(7))
    model.begin(2)
    latent, before, found = model.discrete_latent_model, x.clone(), model.simulate(x, seeded(7))
    rotated = rotate_some(x, most, 0.4, generator)
    mask = perlin_mask(40, 64, 64, generator, 0.5, 0.5)
    lambda_s = bounds[0] + (bounds[1] - bounds[0]) * torch.rand(2, 40, generator=generator)
    case = torch.rand(40, generator=generator).view(-1, 1, 1, 1)
    both, lo_alone = case < 1 / 2, (case >= 1 / 2) & (case < 3 / 4)
    pooled = [mask.view(40, 1, 64 // s, s, 64 // s, s).amax((3, 5)) for s in (8, 4)]
    large = [small_mask.repeat_interleave(s, 2).repeat_interleave(s, 3) for small_mask, s in zip(pooled, (8, 4))]
    encoded, features = latent.encode_lo(rotated)
    normal_lo = slow_quantize(latent.codebook_lo, features)
    lo = slow_swap(latent.codebook_lo, normal_lo, pooled[0] * (both | lo_alone), lambda_s[0],
                   torch.rand(40, 8, 8, generator=generator))
    normal_hi = slow_quantize(latent.codebook_hi, latent.encode_hi(encoded, normal_lo))
    again = slow_quantize(latent.codebook_hi, latent.encode_hi(encoded, lo))
    hi = slow_swap(latent.codebook_hi, torch.where(both, again, normal_hi), pooled[1] * ~lo_alone, lambda_s[1],
                   torch.rand(40, 16, 16, generator=generator))
    expected = {"image": rotated, "general": latent.general_decoder(torch.cat((latent.upsample_lo(lo), hi), 1)),
                "mask": torch.where(both | lo_alone, large[0], large[1]), "lo": lo, "hi": hi,
                "normal_lo": normal_lo, "normal_hi": normal_hi}
    assert list(found) == list(expected) and torch.equal(x, before) and (again != normal_hi).any()
    close(found, expected)
    anomalous = mask.amax((1, 2, 3)) > 0
    for chosen in (both, lo_alone, ~both & ~lo_alone):
        assert (chosen.flatten() & anomalous).sum() > 2
    assert not model.simulate(x, seeded(), normal_share=1.0)["mask"].any()


def test_smudges_are_one_colour_blended_under_the_mask():
    x = image(6, 32, 3, 64, 64)
    for beta, arguments in (((0.1, 1.0), ()), ((0.3, 0.4), ((0.3, 0.4),))):
        (smudged, mask), generator = synthesize_smudges(x, seeded(1), *arguments), seeded(1)
        assert torch.equal(mask, perlin_mask(32, 64, 64, generator, 0.5, 0.5))
        colour = torch.rand(32, 3, 1, 1, generator=generator)
        share = beta[0] + (beta[1] - beta[0]) * torch.rand(32, 1, 1, 1, generator=generator)
        close(smudged, (1 - mask) * x + (1 - share) * (mask * x) + share * (mask * colour))


# --- Losses and stages ------------------------------------------------------------------------------------------------
def slow_detect(model: DsrModel, lo: Tensor, hi: Tensor) -> tuple[Tensor, ...]:
    """restricted_lo, restricted_hi, general, specific, coarse logits; from modules called one by one."""
    latent = model.discrete_latent_model
    restricted_lo, restricted_hi = model.subspace_restriction_module_lo(lo), model.subspace_restriction_module_hi(hi)
    requantized = [slow_quantize(latent.codebook_lo, restricted_lo), slow_quantize(latent.codebook_hi, restricted_hi)]
    specific = model.image_reconstruction_network(torch.cat((latent.upsample_lo(requantized[0]), requantized[1]), 1))
    general = latent.general_decoder(torch.cat((latent.upsample_lo(lo), hi), 1))
    coarse = model.anomaly_detection_module(torch.cat((specific, general), 1))
    return restricted_lo, restricted_hi, general, specific, coarse


def slow_focal(logits: Tensor, mask: Tensor) -> Tensor:
    truth = torch.cat((mask == 0, mask > 0), 1).double().clamp(1e-5, 1 - 1e-5)
    p = (logits.double().softmax(1) * truth).sum(1) + 1e-5
    return -((1 - p) ** 2 * p.log()).mean()


@torch.no_grad()
def test_terms_of_both_losses_against_a_slow_version(double):
    model, x, decoded = small(), image(8, 8, 3, 64, 64), []
    model.discrete_latent_model.general_decoder.register_forward_hook(lambda *_: decoded.append(1))
    model.begin(2)
    terms, simulated = model.losses(x, seeded(3)), model.simulate(x, seeded(3))
    assert len(decoded) == 2 and 0 < simulated["mask"].mean() < 0.5  # each decodes once
    rotated = rotate_some(x, 90, 0.4, seeded(3))
    close(simulated["image"], rotated)
    restricted_lo, restricted_hi, _, specific, coarse = slow_detect(model, simulated["lo"], simulated["hi"])
    expected = {"focal": slow_focal(coarse, simulated["mask"]),
                "restriction_hi": (restricted_hi - simulated["normal_hi"]).square().mean(),
                "restriction_lo": (restricted_lo - simulated["normal_lo"]).square().mean(),
                "reconstruction": 10 * (specific - rotated).square().mean()}
    close(terms, expected, rtol=1e-9, atol=0)

    model.begin(3)
    terms, generator = model.losses(x, seeded(3)), seeded(3)
    smudged, mask = synthesize_smudges(rotate_some(x, 90, 0.3, generator), generator)
    assert mask.mean() > 0
    _, _, general, specific, coarse = slow_detect(model, *model.discrete_latent_model.quantize(smudged))
    logits = model.upsampling_module(torch.cat((specific, general, coarse.softmax(1)), 1))
    close(terms, {"focal": slow_focal(logits, mask)}, rtol=1e-9, atol=0)


@pytest.mark.parametrize("term, reached", [
    ("focal", {DETECTION}), ("restriction_lo", {RESTRICTION_LO}), ("restriction_hi", {RESTRICTION_HI}),
    ("reconstruction", {RESTRICTION_LO, RESTRICTION_HI, RECONSTRUCTION})])
def test_what_the_gradients_of_a_term_reach(term, reached):
    """The detector's inputs are detached. Gradients pass straight through requantization."""
    model, x = small(), image(8, 4, 3, 64, 64)
    with pytest.raises(RuntimeError, match=r"begin\(2\)"):
        model.losses(x, seeded(1))
    model.begin(2)
    model.losses(x, seeded(1))[term].backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == reached


@pytest.mark.parametrize("stage, moving", [(1, PARTS[:1]), (2, PARTS[1:5]), (3, PARTS[5:])])
def test_a_stage_moves_its_own_parts_alone_and_its_loss_falls(stage, moving):
    model, x, seen = small(), image(8, 4, 3, 64, 64), []
    trainer, parameters = model.discrete_latent_model.train(), list(model.discrete_latent_model.parameters())
    if stage > 1:
        model.begin(5 - stage)  # begin undoes the other stage's choice
        trainer, parameters = model, model.begin(stage)
        assert {id(p) for p in parameters} == {id(p) for name in moving for p in getattr(model, name).parameters()}
        assert [name for name in PARTS if getattr(model, name).training] == moving
        assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == set(moving)
    before, optimizer = state(model), torch.optim.Adam(parameters, lr=2e-3)
    for _ in range(10):
        optimizer.zero_grad()
        loss = sum(trainer.losses(x, seeded(1)).values())
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.95 * seen[0]
    moved = {key for key, value in state(model).items() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if key.split(".")[0] in moving}
    with pytest.raises(ValueError, match="7.* 2 .* 3 "):
        model.begin(7)


def test_bfloat16_autocast_leaves_codes_losses_and_scores_in_float32():
    model, x, features = small(), image(1, 2, 3, 64, 64), 0.1 * torch.randn(2, 6, 16, 16, generator=seeded(3))
    plain, other = quantizer_with(torch.randn(40, 6)).train(), quantizer_with(torch.randn(40, 6)).train()
    other.load_state_dict(plain.state_dict())
    expected, parameters = plain(features, seeded()), model.begin(2)
    with torch.autocast("cpu", torch.bfloat16):
        close(other(features, seeded()), expected)
        terms = model.losses(x, seeded())
        found = model.eval().predict(x)
    assert same(plain.state_dict(), other.state_dict())
    sum(terms.values()).backward()
    assert all(p.grad.isfinite().all() for p in parameters)
    assert all(value.dtype == torch.float32 for value in (*terms.values(), found["score"], found["anomaly_map"]))


def test_the_five_lines_of_the_head_train_as_printed():
    start, lines = (textwrap.dedent(part) for part in dsr.__doc__.split("here the second:\n\n")[1].split("\n\n")[:2])
    names, rates = vars(dsr) | {"image": image(1, 4, 3, 64, 64), "steps": 5}, []
    exec(start.replace("load_codebook()", "DiscreteLatentModel(8, 1, 4, 64, 8), width=4"), names)
    for names["step"] in range(5):
        exec(lines, names)
        rates.append(names["optimizer"].param_groups[0]["lr"])
    assert rates == pytest.approx([2e-4] * 4 + [2e-5]) and len(lines.splitlines()) == 5
    assert all(p.grad.isfinite().all() for p in names["model"].anomaly_detection_module.parameters())


# --- What a GPU does, tried on a CPU: is_cuda chooses between two ways ------------------------------------------------
def test_on_a_gpu_autograd_copies_no_view_and_values_are_the_same(monkeypatch, double):
    """A ReLU that writes into instance_norm's view would appear in autograd's graph, as CopySlices."""
    model, x = small().to(memory_format=torch.channels_last), image(1, 2, 3, 64, 64)
    x, parameters, found = x.contiguous(memory_format=torch.channels_last), model.begin(2), []
    for on_gpu in (False, True):
        monkeypatch.setattr(Tensor, "is_cuda", on_gpu)
        terms = model.losses(x, seeded(1))
        seen, ahead = set(), [sum(terms.values()).grad_fn]
        while ahead:
            seen.add(ahead.pop())
            ahead += {node for last in seen for node, _ in last.next_functions} - seen - {None, *ahead}
        assert not {node.name() for node in seen} & {"CopySlices", "AsStridedBackward0"} and len(seen) > 200
        found.append([*terms.values(), *torch.autograd.grad(sum(terms.values()), parameters)])
    close(found[1], found[0], rtol=1e-7, atol=1e-9)
    assert dsr.InstanceNorm()(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("on_gpu, most", [(False, 512), (True, 2 ** 15)])
def test_few_distances_are_held_at_once(on_gpu, most, monkeypatch):
    """2 ** 15 features and 4096 codes: 512 MiB, whatever the batch."""
    quantizer, lengths, addmm = quantizer_with(torch.tensor([[0.0], [1], [2]])), [], torch.addmm
    monkeypatch.setattr(Tensor, "is_cuda", on_gpu)
    monkeypatch.setattr(torch, "addmm", lambda bias, rows, *rest, **more: (
        lengths.append(len(rows)), addmm(bias, rows, *rest, **more))[1])
    features = 2 * torch.rand(1, 1, 257, 256, generator=seeded())
    assert torch.equal(quantizer.nearest(features), features[:, 0].round().long())
    assert max(lengths) == most and sum(lengths) == 257 * 256


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stage", [2, 3])
def test_on_a_gpu_a_step_never_makes_the_host_wait_and_predictions_are_the_cpus(stage, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    x, model, generator = image(1, 4, 3, 64, 64), small(), seeded(0, "cuda")
    expected, model = model.predict(x), model.cuda().to(memory_format=torch.channels_last)
    close({name: value.cpu() for name, value in model.predict(x.cuda()).items()}, expected, rtol=1e-2, atol=1e-2)
    model.begin(stage)
    x = x.cuda()
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            sum(model.losses(x, generator).values()).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# --- Prediction -------------------------------------------------------------------------------------------------------
def test_the_score_comes_from_the_mask_before_upsampling():
    model, x = small(), image(1, 3, 3, 64, 96)
    model.begin(3)
    with pytest.raises(RuntimeError, match="eval"):
        model.predict(x)
    with pytest.raises(ValueError, match="64 or more"):
        model.eval().predict(x[:, :, :32])
    for window, side in ((None, 5), (9, 9)):  # 21 / 256 of 64 is 5.25
        found = model.predict(x, window)
        means = F.pad(found["coarse_mask"], (side // 2,) * 4).unfold(1, side, 1).unfold(2, side, 1).mean((3, 4))
        close(found["score"], means.amax((1, 2)))
        model.upsampling_module.unet.decoder.fin_out[0].bias.data.add_(torch.tensor([0.0, 1.0]))
        again = model.predict(x, window)
        assert torch.equal(again["score"], found["score"]) and not again["score"].requires_grad
        assert again["anomaly_map"].shape == (3, 64, 96) and (again["anomaly_map"] > found["anomaly_map"]).all()


class Predict(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = small()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.model.predict(x)
        return found["score"], found["anomaly_map"]


@pytest.mark.filterwarnings("ignore")
def test_predict_as_a_graph(double):
    module, example, x = Predict().eval(), image(0, 2, 3, 64, 64), image(1, 3, 3, 64, 64)
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    for graph in (torch.export.export(module, (example,), dynamic_shapes=dynamic).module(),
                  torch.jit.trace(module, example, check_trace=False)):
        close(graph(x), module(x))


def test_the_file_run_alone_prints_every_blocks_shape(tmp_path, capsys):
    source = Path(dsr.__file__).read_text(encoding="utf-8")
    for name, value in (("size", 64), ("codes", 64), ("width", 8), ("hiddens", 16)):
        source = source.replace(f'"{name}": {PUBLISHED[name]},', f'"{name}": {value},')
    (tmp_path / "small.py").write_text(source, encoding="utf-8")
    runpy.run_path(str(tmp_path / "small.py"), run_name="__main__")
    shapes = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert len(shapes) == 77 and shapes[DETECTION + ".unet.encoder.block4"] == "(1, 32, 8, 8)"


# --- Weights ----------------------------------------------------------------------------------------------------------

FILES = dict(zip(["subspace_restriction_lo", "subspace_restriction_hi", "image_recon_module", "anomaly_det_module",
                  "upsample_module"], PARTS[1:]))
RUN = "dsr_0.0002_100_bs8_anom_par0.2_"  # the name of a run of the authors' training


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
    assert not loaded.training and loaded.preprocessing == {"size": 256, "antialias": False}
    latent = load_codebook(tmp_path / dsr.CODEBOOK_FILE)
    assert not latent.training and latent.settings == SIZES and latent.preprocessing == {}
    expected = model.predict(x.flip(1))
    expected |= {name: expected[name].flip(1) for name in ("general", "specific")}
    close(loaded.predict(x), expected, rtol=0, atol=1e-9)
    close(latent.decode(*latent.quantize(x)), expected["general"], rtol=0, atol=1e-9)


def test_authors_files_are_found_from_any_of_them(tmp_path):
    path = save_authors(small(), tmp_path)
    expected = state(load(path))
    codebook = shutil.move(tmp_path / dsr.CODEBOOK_FILE, tmp_path / "elsewhere.pckl")
    with zipfile.ZipFile(tmp_path / "codebook.zip", "w") as archive:
        archive.write(codebook, dsr.CODEBOOK_FILE)
    for kind in FILES:
        assert same(state(load(tmp_path / f"DSR_{kind}_metal_nut.pckl", codebook)), expected)
    key, names = "unet.decoder.fin_out.0.bias", {kind: f"{RUN}{kind}_metal_nut.pckl" for kind in FILES}
    names["upsample_module"] = "dsr_0.0002_100_bs8_anom_par0.2__upsample.pckl"  # train_dsr.py:59, 140
    for kind, name in names.items():
        content = torch.load(tmp_path / f"DSR_{kind}_metal_nut.pckl")
        if kind == "upsample_module":
            content[key] += 1  # this is not the released one
        torch.save(content, tmp_path / name)
    expected[f"{UPSAMPLING}.{key}"] += 1
    for name in names.values():
        assert same(state(load(tmp_path / name, tmp_path / "codebook.zip")), expected)
    pill = shutil.copy(path, tmp_path / f"{RUN}image_recon_module_pill.pckl")
    for given, words in ((path, dsr.CODEBOOK_FILE), (tmp_path / names["upsample_module"], "2 such classes"),
                         (pill, "subspace_restriction_hi_pill.pckl"),
                         (shutil.copy(path, tmp_path / "other.pckl"), "DSR_image_recon_module_CLASS.pckl.* 0 such")):
        with pytest.raises(ValueError, match=words):
            load(given, None if given == path else codebook)


def test_own_checkpoints_keep_settings_and_preprocessing(tmp_path):
    model, preprocessing = small(lambda_s=(0.3, 0.9), rotate=5.0), {"size": 64, "antialias": True}
    latent, path, other = model.discrete_latent_model, tmp_path / "last.pt", tmp_path / "codebook.pt"
    for part, method, file in ((model, "dsr", path), (latent, "dsr-codebook", other)):
        torch.save({"method": method, "settings": part.settings, "preprocessing": preprocessing,
                    "model": part.state_dict()}, file)
    loaded, codebook = load(path), load_codebook(other)
    assert same(state(loaded), state(model)) and same(state(codebook), state(latent))
    assert loaded.settings == {"latent": SIZES, "width": 5, "lambda_s": (0.3, 0.9), "rotate": 5.0}
    assert codebook.settings == SIZES and not (loaded.training or codebook.training)
    assert loaded.preprocessing == codebook.preprocessing == preprocessing and model.preprocessing == {}
    with pytest.raises(ValueError, match="of dsr-codebook, not of dsr"):
        load(other)
    with pytest.raises(ValueError, match="of dsr, not of dsr-codebook"):
        load_codebook(path)


def test_anomalib_checkpoints_are_kept_as_trained(tmp_path, capsys):
    model, content = small(), {"post_processor._image_threshold": torch.zeros(1), "model.other": torch.zeros(1)}
    for name in PARTS:
        content |= {f"model.{name}.{key}": value for key, value in as_authors(getattr(model, name)).items()}
    resize = {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [192, 192], "antialias": True}}
    for extra, size in (({}, 256), ({"anomalib_pre_processor_config": {"transform": resize}}, 192)):
        torch.save({"state_dict": content, "epoch": 3} | extra, tmp_path / "model.ckpt")
        loaded = load(tmp_path / "model.ckpt")
        assert same(state(loaded), state(model)) and not loaded.training
        assert loaded.settings["width"] == 5 and loaded.preprocessing == {"size": size, "antialias": True}
        assert ("256 x 256" in capsys.readouterr().err) == (size == 256)  # 2.0 to 2.6 hold no size


def test_the_published_codebook_is_fetched_once_and_checked(tmp_path, monkeypatch):
    assert dsr.CODEBOOK_URL == ("https://github.com/open-edge-platform/anomalib/releases/download/"
                                "dsr_pretrained_weights/dsr_vq_model_pretrained.zip")
    assert dsr.CODEBOOK_SHA256 == "52fe7504ec8e9df70b4382f287ab26269dcfe000cd7a7e146a52c6f146f34afb"
    latent, source = small().discrete_latent_model, tmp_path / "published.zip"
    cached, expected = tmp_path / "hub/checkpoints/published.zip", latent.encoder_hi.conv_1.weight.flip(1)
    torch.save(as_authors(latent), tmp_path / "codes")
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("folder/README", "not this")
        archive.write(tmp_path / "codes", "folder/../../vq_model_pretrained_128_4096.pckl")
    monkeypatch.setattr(dsr, "CODEBOOK_URL", source.as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(ValueError, match="hash.*--codebook FILE"):
        load_codebook()
    assert not cached.exists()
    monkeypatch.setattr(dsr, "CODEBOOK_SHA256", hashlib.sha256(source.read_bytes()).hexdigest())
    for given in (None, source, None):
        assert torch.equal(expected, load_codebook(given).encoder_hi.conv_1.weight)
    source.unlink()
    assert torch.equal(expected, load_codebook().encoder_hi.conv_1.weight)
    cached.write_bytes(cached.read_bytes()[:-2000] + cached.read_bytes()[-1900:])
    with pytest.raises(ValueError, match="published.zip: damaged"):
        load_codebook()
    cached.unlink()
    with pytest.raises(ValueError, match="--pretrain IMAGES"):
        load_codebook()


def test_files_that_do_not_fit_are_named_in_one_line(tmp_path):
    model, path, key = small(), tmp_path / "file.pt", "upsampling_module.unet.decoder.fin_out.0.bias"
    own = {"method": "dsr", "settings": model.settings, "preprocessing": {}, "model": model.state_dict()}
    short = {name: value for name, value in own["model"].items() if name != key}
    foreign = {"state_dict": {"model.discrete_latent_model.upsample_t.bias": torch.zeros(3)}}
    for content, words in ((own | {"method": "draem"}, "draem"), (own | {"model": short}, "fin_out.0.bias"),
                           (own | {"settings": {"latent": SIZES, "depth": 3}}, "depth"), ({"weights": 1}, "CLASS"),
                           (own | {"model": own["model"] | {key: torch.tensor([0, math.nan])}}, "NaN"),
                           ([1, 2], "list"), ({"a": Path("b")}, "holds code"), ({"state_dict": 3}, "CLASS"),
                           (foreign, "no discrete latent model"), (own, "truncated"), (None, "No such file")):
        torch.save(content, path)
        if content is own:
            path.write_bytes(path.read_bytes()[:-5000])
        if content is None:
            path.unlink()
        for reader in (load, load_codebook):
            with pytest.raises(ValueError, match=f"^{path}: .*{words if reader is load else ''}") as error:
                reader(path)
            assert "\n" not in str(error.value)
