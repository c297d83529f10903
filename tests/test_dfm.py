"""Tests of dfm.py. Oracles: recorded figures of torchvision 0.28's ResNets (golden.py), torch.linalg.eigh of the
covariance, torch.distributions.MultivariateNormal in float64, closed forms, the defaults of anomalib 2.7.0, a slow DFM
in loops on the ResNet that the figures check, and a cross-validation that fits each fold to the raw features."""
import hashlib
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

import dfm
from dfm import PCA, DFMModel, ResNet, SingleClassGaussian, load, load_resnet
from golden import check, fill, image

GOLDEN = (  # name, layer, shape, mean, standard deviation, first and last value
    ("resnet18", "layer1", (2, 64, 16, 16), 0.67080566, 0.65382395, [0.59933937, 1.0074302]),
    ("resnet18", "layer4", (2, 512, 2, 2), 0.36877771, 0.45764128, [0.40174583, 0.68444526]),
    ("resnet18", "avgpool", (2, 512, 1, 1), 0.36877771, 0.38419643, [0.45573771, 0.28189248]),
    ("resnet50", "layer3", (2, 1024, 4, 4), 0.47418165, 0.46746339, [0., 0.54826331]),
    ("resnet50", "avgpool", (2, 2048, 1, 1), 0.37905781, 0.39772856, [0.19217278, 0.46083617]),
    ("wide_resnet50_2", "layer3", (2, 1024, 4, 4), 0.49524651, 0.50176931, [0., 0.46607411]))
close = torch.testing.assert_close


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def samples(variances: list[float], n: int, d: int) -> torch.Tensor:
    """Samples (n, d) whose covariance (over n) has these eigenvalues, up to rounding; the others are 0."""
    left = torch.linalg.qr(torch.cat((torch.ones(n, 1).double(), randn(n, len(variances))), 1)).Q[:, 1:]  # of mean 0
    right = torch.linalg.qr(randn(d, len(variances), seed=1)).Q
    return left * (n * torch.tensor(variances, dtype=torch.float64)).sqrt() @ right.T


def refuses(words: str, function, *arguments) -> str:
    """The message of a ValueError, one line with these words, that the call raises."""
    with pytest.raises(ValueError, match=words) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def small(score_type: str = "fre", **settings) -> DFMModel:
    model = DFMModel("resnet18", "layer1", False, score_type=score_type, **settings)
    fill(model.backbone)
    return model


def test_published_settings_and_weights():
    published = {"backbone": "resnet50", "layer": "layer3", "pooling": 4, "share": 0.97}
    assert dfm.PUBLISHED == published | {"size": 256, "batch": 8, "score": "fre"}
    model = DFMModel(pre_trained="random")
    assert model.settings == published | {"score_type": "fre"} and model.preprocessing == {} and PCA().share == 0.97
    assert model.features(image(0, 1, 3, 256, 256)).shape == (1, 1024, 4, 4)  # 16,384 values
    assert dfm.URLS == {name: f"https://download.pytorch.org/models/{name}-{digits}.pth" for name, digits in (
        ("resnet18", "f37072fd"), ("resnet50", "0676ba61"), ("wide_resnet50_2", "95faca4d"))}


def test_run_as_a_script_it_prints_every_blocks_shape(capsys):
    runpy.run_path(dfm.__file__, run_name="__main__")
    *blocks, last = capsys.readouterr().out.splitlines()
    assert [block.split(maxsplit=1) for block in blocks] == [[f"backbone.layer{i}.{j}", shape] for i, count, shape in (
        (1, 3, "(8, 256, 64, 64)"), (2, 4, "(8, 512, 32, 32)"), (3, 6, "(8, 1024, 16, 16)")) for j in range(count)]
    assert last == "pooled features (8, 1024, 4, 4), components (7, 16384)"


@pytest.mark.parametrize("name, layer, shape, mean, std, values", GOLDEN)
def test_resnet_gives_torchvisions_figures(name, layer, shape, mean, std, values):
    net = fill(ResNet(name, layer)).train()  # the rule uses the keys: a wrong key changes the figures
    assert not any(m.training for m in net.modules()) and not any(p.requires_grad for p in net.parameters())
    assert [child for child, _ in net.named_children()] == ["conv1", "bn1", *dfm.LAYERS[:dfm.LAYERS.index(layer) + 1]]
    x = net(image(9, 2, 3, 64, 64))
    assert x.shape == shape
    check(x, mean, std, values, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("n, d", [(200, 12), (12, 200), (30, 30), (29, 30)])
def test_pca_equals_eigh_of_the_covariance(n, d):
    x = randn(n, d) * torch.logspace(0, -3, d) + 5
    values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
    values, vectors = values.flip(0), vectors.flip(1)
    pca = PCA(float(values[:5].sum() / values.sum()) - 1e-9).fit(x)
    close(pca.mean, x.mean(0), rtol=1e-12, atol=0)
    close(pca.components.T @ pca.components, vectors[:, :5] @ vectors[:, :5].T, rtol=1e-8, atol=1e-10)
    close(pca.transform(x).square().mean(0), values[:5], rtol=1e-8, atol=0)
    close((x - pca.inverse_transform(pca.transform(x))).square().sum() / n, values[5:].sum(), rtol=1e-8, atol=0)
    everything = PCA(1.0).fit(x)
    assert len(everything.components) == min(n - 1, d)
    close(everything.inverse_transform(everything.transform(x)), x, rtol=1e-12, atol=0)


@pytest.mark.parametrize("n, d", [(60, 8), (8, 60)])
def test_principal_axes_keep_their_digits_over_eleven_decades(n, d):
    expected = torch.logspace(0, -11, 7, dtype=torch.float64)
    x = samples((expected.square() / n).tolist(), n, d) + 0.01
    mean, coordinates, axes = dfm.principal_axes(x)
    close(coordinates.norm(dim=0), expected, rtol=0, atol=1e-15)  # the largest is 1; a Gram matrix would leave 1e-8
    close(coordinates @ axes + mean, x, rtol=0, atol=1e-15)


@pytest.mark.parametrize("variances, share, count", [
    ([1.0] * 43 + [0.13] * 10, 0.97, 43),  # 42 hold 0.948, 43 hold 0.971; an index taken as a count gives 42
    ([98.0, 1.0, 1.0], 0.97, 1),  # the first alone
    ([96.5, 2.0, 1.5], 0.97, 2), ([4.0, 3.0, 2.0, 1e-14], 1.0, 4), ([4.0, 3.0, 2.0, 1e-9], 0.999, 3),
    *(([percent, 100 - percent], percent / 100, 1) for percent in range(51, 100))  # reached in spite of rounding
])
def test_the_smallest_number_of_components_whose_variance_reaches_the_share(variances, share, count):
    assert len(PCA(share).fit(samples(variances, 100, len(variances)) + 3).components) == count


def test_gaussian_equals_multivariate_normal():
    x, y = randn(300, 10) @ randn(10, 10, seed=1) + 2, randn(20, 10, seed=2)
    covariance = (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)
    expected = -torch.distributions.MultivariateNormal(x.mean(0), covariance).log_prob(y)
    close(SingleClassGaussian().fit(x).score_samples(y), expected, rtol=1e-8, atol=0)
    x, y = (torch.cat((z[:, :4], torch.tensor([0.1, 0.1, 1e6]).expand(len(z), 3), z[:, 4:]), 1) for z in (x, y))
    close(SingleClassGaussian().fit(x).score_samples(y), expected, rtol=1e-8, atol=0)  # constants are null directions


@pytest.mark.parametrize("n, d, repeats", [(100, 10, 1), (10, 50, 1), (10, 10, 1), (6, 20, 3), (20, 4, 2)])
def test_mean_nll_of_the_training_set_is_the_entropy(n, d, repeats):
    """If the data are centred once, the mean Mahalanobis term is the rank. Null directions enter no term."""
    x = randn(n, d).repeat(repeats, 1) * 3 + 100
    rank = min(n - 1, d)
    variance = torch.linalg.eigvalsh(torch.cov(x.T, correction=0))[-rank:]
    gaussian = SingleClassGaussian().fit(x)
    assert gaussian.deviation.shape == (rank,)
    expected = rank / 2 * (1 + math.log(2 * math.pi)) + variance.log().sum() / 2
    close(gaussian.score_samples(x).mean(), expected, rtol=1e-8, atol=0)
    assert gaussian.score_samples(randn(5, d, seed=3)).isfinite().all()


def test_arguments_are_untouched_and_float32_is_computed_in_float64():
    x = randn(20, 6, 2, 2).float()
    before = x.clone()
    for kind, score_type in ((PCA, "fre"), (SingleClassGaussian, "nll")):
        one, other = kind().fit(x), kind().fit(x.double())
        assert torch.equal(one.transform(x), other.transform(x.double()))
        assert all(value.dtype == torch.float64 for value in one.state_dict().values())
        small(score_type).fit(x).score_features(x)
    assert torch.equal(x, before)


def test_model_equals_slow_dfm():
    """Score and map (bilinear, half-pixel centres) by eigh of the covariance and by loops."""
    train, test, maps = image(3, 40, 3, 32, 48), image(4, 3, 3, 32, 48), np.zeros((3, 32, 48))
    model = small(pooling=4, share=0.9)
    features, others = model.features(train), model.features(test)
    assert features.shape == (40, 64, 2, 3) and features.dtype == torch.float32
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    close(features, model.backbone((train - mean) / std).view(40, 64, 2, 4, 3, 4).mean((3, 5)))
    rows, unseen = features.double().flatten(1), others.double().flatten(1)
    values, vectors = torch.linalg.eigh((rows - rows.mean(0)).T @ (rows - rows.mean(0)) / 40)
    values, axes, k = values.flip(0), vectors.T.flip(0), 1
    while values[:k].sum() < 0.9 * values.sum():
        k += 1
    along = (unseen - rows.mean(0)) @ axes[:k].T  # (3, k)
    error = unseen - rows.mean(0) - along @ axes[:k]
    for n, y, x, i, j in np.ndindex(3, 32, 48, 2, 3):
        v, u = min(max((y + 0.5) * 2 / 32 - 0.5, 0), 1), min(max((x + 0.5) * 3 / 48 - 0.5, 0), 2)
        weight = max(0, 1 - abs(v - i)) * max(0, 1 - abs(u - j))
        maps[n, y, x] += weight * (error[n].view(64, 2, 3)[:, i, j] ** 2).sum() if weight else 0
    prediction = model.fit(features).predict(test)
    assert set(prediction) == {"score", "anomaly_map"}
    close(prediction["score"], error.norm(dim=1).float(), rtol=1e-6, atol=0)
    close(prediction["anomaly_map"], torch.tensor(maps).float(), rtol=1e-5, atol=1e-9)
    nll = (along ** 2 / values[:k] + values[:k].log() + math.log(2 * math.pi)).sum(1) / 2
    prediction = small("nll", pooling=4, share=0.9).fit(features).predict(test)
    assert set(prediction) == {"score"}
    close(prediction["score"], nll.float(), rtol=1e-6, atol=0)


def slow_cross_validation(features: torch.Tensor, share: float, score_type: str) -> np.ndarray:
    """Held-out scores and maps' maxima (2, n) of features (n, C, h, w), every fifth one by the raw rest's SVD."""
    rows, n, found = features.flatten(1), len(features), np.empty((2, len(features)))
    for i in range(5):
        inside = list(range(i, n, 5))
        rest = rows[[j for j in range(n) if j not in inside]]
        _, values, axes = torch.linalg.svd(rest - rest.mean(0), full_matrices=False)
        values, k = values[values > 1e-9 * values[0]] ** 2 / len(rest), 1
        while k < len(values) and values[:k].sum() < share * values.sum():
            k += 1
        for j, f in zip(inside, rows[inside] - rest.mean(0)):
            error = f - axes[:k].T @ (axes[:k] @ f)
            nll = ((axes[:k] @ f) ** 2 / values[:k] + values[:k].log() + math.log(2 * math.pi)).sum() / 2
            found[:, j] = error.norm() if score_type == "fre" else nll, error.view(4, 3, 2).square().sum(0).max()
    return found


@pytest.mark.parametrize("sizes, share", [((60,), 0.9999), ((12, 40), 0.9), ((11,), 1.0)])  # of 24 values
@pytest.mark.parametrize("score_type", ["fre", "nll"])
def test_threshold_and_map_top_are_those_of_folds_fitted_to_the_raw_features(score_type, sizes, share):
    n, model = sum(sizes), small(score_type, share=share)
    labels = torch.tensor([7] * sizes[0] + [3] * sum(sizes[1:]))[randn(n).argsort()]
    train = randn(n, 4, 3, 2) * torch.logspace(1, -2, 24).view(4, 3, 2) + 50 * labels.view(-1, 1, 1, 1)
    train[2::5] += 4 * randn(4, 3, 2, seed=1)  # samples of a fold that are alike
    slow = [slow_cross_validation(train[labels == label], share, score_type) for label in labels.unique()]
    scores, maxima = torch.tensor(np.concatenate(slow, 1))
    model.fit(train, labels)
    close(model.threshold, torch.tensor(np.quantile(scores, 0.95)).float(), rtol=1e-6, atol=0)
    if score_type == "fre":
        close(model.map_top, torch.tensor(2 * np.median(maxima)).float(), rtol=1e-6, atol=0)
    mean, coordinates, axes = dfm.principal_axes(train[labels == 7])
    found = model.cross_validate(coordinates, axes, mean.shape)
    close(found[0], torch.tensor(slow[-1][0]), rtol=1e-8, atol=1e-8)  # in the samples' order


@pytest.mark.parametrize("features, labels", [
    (randn(4, 6, 3, 2), None), (randn(24, 6, 3, 2), [0] * 20 + [1] * 4),  # too few
    (torch.cat((torch.full((4, 6, 3, 2), 0.1).double(), randn(1, 6, 3, 2))), None),  # one sample has all the variation
    (torch.cat((torch.ones(5, 4, 6, 3, 2).double(), randn(5, 1, 6, 3, 2)), 1).flatten(0, 1), None)])  # one fold has
def test_what_cannot_be_cross_validated_has_no_threshold_but_a_map_top(features, labels):
    model = small().fit(features, None if labels is None else torch.tensor(labels))
    labels = torch.tensor(labels or [0] * len(features))
    largest = max(((f - features[labels == label].mean(0))[:, y, x] ** 2).sum()
                  for f, label in zip(features, labels) for y in range(3) for x in range(2))
    assert model.threshold.isnan()
    close(model.map_top, largest.float())


@pytest.mark.parametrize("score_type", ["fre", "nll"])
@pytest.mark.parametrize("features", [
    randn(20, 5).sign() * 1e-30, randn(20, 5) * 1e30,  # squares beyond float32
    torch.linspace(-1, 1, 20).double()[:, None] * randn(1, 5) + 7])  # a line: nothing is left of a held-out sample
def test_map_top_is_finite_and_above_zero(features, score_type):
    model = small(score_type).fit(features)
    assert 0 < model.map_top < math.inf and model.threshold.isfinite()


def test_a_constant_product_with_one_per_cent_of_noise():
    drawn = image(0, 1, 3, 48, 48).expand(40, -1, -1, -1)
    noisy = (drawn + 0.01 * randn(40, 3, 48, 48).float()).clamp(0, 1)
    model = small(pooling=2)
    model.fit(model.features(noisy[:30]))
    score, anomaly_map = model.predict(noisy[30:]).values()
    assert (score > model.threshold).sum() <= 2 and anomaly_map.amax((1, 2)).median() < model.map_top
    noisy[30:, :, 20:28, 20:28] = 0.5
    score, anomaly_map = model.predict(noisy[30:]).values()
    assert (score > model.threshold).all() and (anomaly_map.amax((1, 2)) > model.map_top).all()


@pytest.mark.parametrize("score_type", ["fre", "nll"])
def test_a_score_is_the_lowest_over_the_classes_with_that_classs_map(score_type):
    labels = torch.arange(3).repeat(10)
    places = 9 * labels.view(30, 1, 1, 1)
    train, test = randn(30, 6, 3, 2) + places, randn(12, 6, 3, 2, seed=1) + places[:12]
    score, grid = small(score_type).fit(train, labels * 5).score_features(test)
    alone = [small(score_type).fit(train[labels == label]).score_features(test) for label in range(3)]
    lowest, best = torch.stack([s for s, _ in alone]).min(0)
    assert len(best.unique()) == 3
    close(score, lowest, rtol=1e-12, atol=0)
    if score_type == "fre":
        close(grid, torch.stack([alone[label][1][i] for i, label in enumerate(best)]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("layer, pooling, shape", [("layer3", 4, (256, 1, 1)), ("avgpool", 4, (512, 1, 1)),
                                                   ("layer2", 3, (128, 2, 2)), ("layer2", 1, (128, 8, 8))])
def test_whole_map_pooled_remainders_and_avgpool(layer, pooling, shape):
    model = DFMModel("resnet18", layer, False, pooling)
    features = model.features(image(0, 5, 3, 64, 64))
    score, anomaly_map = model.fit(features).predict(image(1, 2, 3, 64, 64)).values()
    assert features.shape[1:] == shape and score.dtype == anomaly_map.dtype == torch.float32
    assert score.shape == (2,) and anomaly_map.shape == (2, 64, 64)
    if shape[1] == 1:
        close(anomaly_map, score.square()[:, None, None].expand(2, 64, 64))


def test_autocast_and_train_mode_leave_the_model_alone():
    model, x = small("nll").train(), image(1, 8, 3, 32, 32)
    features = model.features(x)
    expected = model.fit(features).eval().predict(x)["score"]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):
        assert model.features(x).dtype == torch.float32
        assert torch.equal(model.score_features(features)[0].float(), expected)
        model.fit(features)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("score_type", ["fre", "nll"])
def test_predict_exports_at_any_batch_size(score_type):
    model, images = small(score_type), image(2, 5, 3, 32, 32)
    model.fit(model.features(images), torch.tensor([0, 0, 0, 1, 1]))
    model.forward = model.predict  # what is exported
    batch = {"image": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(model, (images,), dynamic_shapes=batch)
    for batch in (images[:1], image(3, 4, 3, 32, 32)):
        close(program.module()(batch), model.predict(batch), rtol=1e-5, atol=1e-5)


def test_errors():
    for share in (0, 0.0, -1, 1.5, 2, 97.0, math.nan):
        refuses("share of the variance in", PCA, share)
    for x in (torch.ones(5, 3), randn(1, 3), randn(0, 3)):
        refuses("no direction varies", PCA().fit, x)
    refuses("1 of 10 samples hold NaN", PCA().fit, torch.where(torch.arange(10)[:, None] == 3, math.nan, randn(10, 3)))
    refuses(r"shape \(4, 2, 2\), got \(2, 2, 4\)", PCA().fit(randn(10, 4, 2, 2)).transform, randn(1, 2, 2, 4))
    for arguments in ({"backbone": "vgg"}, {"layer": "layer9"}, {"share": 97.0}, {"score_type": "l2"}, {"pooling": 0}):
        refuses("vgg|layer9|97.0|l2|pooling 0", lambda: DFMModel(**{"pre_trained": False, **arguments}))
    model, x = small(), image(1, 2, 3, 32, 32)
    refuses("pooling 9 is larger than the 8 x 16 map of layer1", small(pooling=9).features, image(0, 1, 3, 32, 64))
    refuses("not fitted", model.score_features, randn(1, 4))
    for arguments, words in (((randn(0, 4),), "0 for 0"), ((randn(5, 4), torch.zeros(2)), "labels: 2 for 5"),
                             ((randn(5, 4, 3),), r"or \(n, d\) are needed, got \(5, 4, 3\)")):
        refuses(words, model.fit, *arguments)
    model.fit(model.features(image(0, 5, 3, 32, 32)))
    for other, words in (((x * 255).byte(), "uint8"), (x[0], r"\(3, 32, 32\)"), (x[:, :1], r"\(2, 1, 32, 32\)"),
                         (x[:0], r"\(0, 3, 32, 32\)"), (x[None], r"\(1, 2, 3, 32, 32\)"), (x * 255, "found .* to 25"),
                         (x * 2 - 1, "ImageNet"), (x - 0.01, "found -0"), (x + 0.01, "to 1.0"), (x * math.nan, "nan")):
        refuses(words, model.predict, other)
    model.predict(x * 1.001 - 0.0005)  # rounding of a float resize is accepted


def layer1_state() -> dict:
    return fill(ResNet("resnet18", "layer1")).state_dict()


def test_weights_from_a_file(tmp_path):
    state, path = layer1_state(), tmp_path / "weights.pth"
    bare = {k: v for k, v in state.items() if not k.endswith("tracked")}  # older files lack num_batches_tracked
    later = {"layer2.1.bn1.bias": torch.zeros(3), "fc.weight": torch.zeros(10, 512)}
    for content in (state | later, bare, {"state_dict": state | later, "epoch": 3},
                    {f"module.{k}": v for k, v in state.items()}, {f"module.backbone.{k}": v for k, v in bare.items()},
                    {"state_dict": {f"backbone.{k}": v for k, v in state.items()}}):
        torch.save(content, path)
        found = DFMModel("resnet18", "layer1", path).backbone.state_dict()
        assert found.keys() == state.keys() and all(torch.equal(value, state[key]) for key, value in found.items())
    for content, words in (
            ({k: v for k, v in state.items() if not k.startswith("layer1.1")}, "resnet18 up to layer1: .*layer1.1"),
            (state | {"classifier.weight": torch.zeros(1)}, "classifier.weight"),
            (state | {"layer1.0.conv2.weight": torch.zeros(64, 64, 1, 1)}, "layer1.0.conv2.weight"),
            (state | {"conv1.weight": 1}, "conv1.weight"), ({"state_dict": [1]}, "conv1.weight"),
            (state | {"bn1.weight": torch.full((64,), math.nan)}, "NaN"), ([1, 2], "found list"), (path, "holds code")):
        torch.save(content, path)
        assert "weights.pth" in refuses(words, DFMModel, "resnet18", "layer1", str(path))


def test_download_is_cached_and_its_hash_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))

    def saved(content, digits: str | None = None) -> Path:
        torch.save(content, tmp_path / "file")
        digits = digits or hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()[:8]
        return (tmp_path / "file").rename(tmp_path / f"resnet18-{digits}.pth")

    path = saved(layer1_state())
    monkeypatch.setitem(dfm.URLS, "resnet18", path.as_uri())
    assert torch.equal(DFMModel("resnet18", "layer1").backbone.conv1.weight, layer1_state()["conv1.weight"])
    path.unlink()
    load_resnet(ResNet("resnet18", "layer1"))  # from the cache
    assert (tmp_path / "home/hub/checkpoints" / path.name).exists()
    for wrong in (saved(layer1_state(), "00000000"), saved(path), tmp_path / "missing-00000000.pth"):
        monkeypatch.setitem(dfm.URLS, "resnet18", wrong.as_uri())
        message = refuses("failed.*elsewhere.*--weights FILE.*--weights random", DFMModel, "resnet18", "layer1")
        assert wrong.name in message


def own(model: DFMModel) -> dict:
    return {"method": "dfm", "settings": model.settings, "preprocessing": {"size": 32}, "model": model.state_dict()}


@pytest.mark.parametrize("score_type, classes", [("fre", 1), ("fre", 3), ("nll", 2)])  # with 3, threshold is NaN
def test_save_and_load(score_type, classes, tmp_path):
    model, images = small(score_type, pooling=2, share=0.8), image(1, 12, 3, 32, 32)
    assert model.threshold.isnan()
    model.fit(model.features(images), torch.arange(classes).repeat(12 // classes))
    torch.save(own(model), tmp_path / "last.pt")
    loaded = load(tmp_path / "last.pt")
    parts = {"backbone", "pca", "threshold", "map_top"} | ({"gaussian"} if score_type == "nll" else set())
    assert {key.split(".")[0] for key in model.state_dict()} == parts
    assert not loaded.training and loaded.settings == model.settings and loaded.preprocessing == {"size": 32}
    assert len(loaded.pca) == classes and torch.equal(model.map_top, loaded.map_top)
    assert torch.equal(loaded.threshold.nan_to_num(-1), model.threshold.nan_to_num(-1))
    assert model.threshold.isnan() == (classes == 3)
    for key, value in model.predict(images).items():
        assert torch.equal(loaded.predict(images)[key], value)


def test_loading_what_is_not_a_fitted_model(tmp_path):
    path, model = tmp_path / "file.pt", small().fit(randn(5, 4))
    content, state = own(model), model.state_dict()
    for changed, words in (
            (content | {"method": "draem"}, "a checkpoint of draem, not of dfm"),
            ({key: value for key, value in content.items() if key != "model"}, "does not fit DFM: .*Missing"),
            (content | {"settings": {"depth": 1}}, "depth"), (content | {"model": 3}, "does not fit DFM"),
            (content | {"settings": model.settings | {"layer": "layer2"}}, "layer2.0.conv1.weight"),
            (content | {"model": {k: v for k, v in state.items() if k != "pca.0.components"}}, "pca.0.components"),
            (content | {"model": state | {"map_top": torch.tensor(math.inf)}}, "infinity"),
            (layer1_state(), "no last.pt.*conv1.weight, bn1.weight, bn1.bias")):
        torch.save(changed, path)
        assert "file.pt" in refuses(words, load, path)
    path.write_bytes(b"not a file of torch")
    refuses("file.pt: .*truncated", load, path)
    refuses("none.pt: No such file", load, tmp_path / "none.pt")
