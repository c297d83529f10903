"""Tests of dfm.py. Oracles: recorded figures of torchvision 0.28's ResNets (golden.py), torch.linalg.eigh of the
covariance, torch.distributions.MultivariateNormal in float64, closed forms, the defaults of anomalib 2.7.0, and a slow
DFM in loops on the ResNet that the figures check."""
import hashlib
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dfm  # noqa: E402
from dfm import PCA, DFMModel, ResNet, SingleClassGaussian, load, load_resnet  # noqa: E402
from golden import check, fill, image  # noqa: E402

GOLDEN = {  # name: state entries, parameters, {layer: shape, mean, standard deviation, first and last value}
    "resnet18": (122, 11689512, {
        "layer1": ((2, 64, 16, 16), 0.67080566, 0.65382395, [0.59933937, 1.0074302]),
        "layer2": ((2, 128, 8, 8), 0.53688578, 0.64861828, [0.3045986, 1.2661612]),
        "layer3": ((2, 256, 4, 4), 0.4503671, 0.56536189, [0.42793748, 1.2804742]),
        "layer4": ((2, 512, 2, 2), 0.36877771, 0.45764128, [0.40174583, 0.68444526]),
        "avgpool": ((2, 512, 1, 1), 0.36877771, 0.38419643, [0.45573771, 0.28189248]),
    }),
    "resnet50": (320, 25557032, {
        "layer1": ((2, 256, 16, 16), 0.36407634, 0.42486955, [0.35721254, 0.40718096]),
        "layer2": ((2, 512, 8, 8), 0.36976497, 0.42403995, [0.28371274, 0.30043948]),
        "layer3": ((2, 1024, 4, 4), 0.47418165, 0.46746339, [0., 0.54826331]),
        "layer4": ((2, 2048, 2, 2), 0.37905781, 0.43324079, [0.2995185, 0.48520952]),
        "avgpool": ((2, 2048, 1, 1), 0.37905781, 0.39772856, [0.19217278, 0.46083617]),
    }),
    "wide_resnet50_2": (320, 68883240, {
        "layer1": ((2, 256, 16, 16), 0.38810574, 0.44054309, [0.26520702, 0.21626282]),
        "layer2": ((2, 512, 8, 8), 0.38345438, 0.40763831, [0.10674663, 0.38307405]),
        "layer3": ((2, 1024, 4, 4), 0.49524651, 0.50176931, [0., 0.46607411]),
    }),
}

close = torch.testing.assert_close


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def samples(variances: list[float], n: int, d: int) -> torch.Tensor:
    """Samples (n, d) whose covariance (over n) has these eigenvalues, up to rounding; the others are 0."""
    k = len(variances)
    left = torch.linalg.qr(torch.cat((torch.ones(n, 1).double(), randn(n, k)), 1)).Q[:, 1:]  # columns of mean 0
    right = torch.linalg.qr(randn(d, k, seed=1)).Q
    return left * (n * torch.tensor(variances, dtype=torch.float64)).sqrt() @ right.T


def normalized(x: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    return (x - mean) / std


def small(score_type: str = "fre", **settings) -> DFMModel:
    model = DFMModel("resnet18", "layer1", False, score_type=score_type, **settings)
    fill(model.backbone)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Published


def test_published_settings_and_weights():
    assert dfm.PUBLISHED == {"size": 256, "backbone": "resnet50", "layer": "layer3", "pooling": 4, "share": 0.97,
                             "score": "fre"}
    model = DFMModel(pre_trained=False)
    assert model.settings == {"backbone": "resnet50", "layer": "layer3", "pooling_kernel_size": 4, "n_comps": 0.97,
                              "score_type": "fre"}
    assert model.features(image(0, 1, 3, 256, 256)).shape == (1, 1024, 4, 4)  # 16,384 values
    assert PCA().n_components == 0.97
    assert dfm.URLS == {name: f"https://download.pytorch.org/models/{name}-{digits}.pth" for name, digits in (
        ("resnet18", "f37072fd"), ("resnet50", "0676ba61"), ("wide_resnet50_2", "95faca4d"))}


# ---------------------------------------------------------------------------------------------------------------------
# ResNet


@pytest.mark.parametrize("name", GOLDEN)
def test_resnet_gives_torchvisions_figures_at_every_layer(name):
    entries, parameters, layers = GOLDEN[name]
    net, found = ResNet(name, list(layers)[-1]), {}
    assert len(net.state_dict()) == entries
    assert sum(p.numel() for p in net.parameters()) == parameters
    fill(net.trim())  # the rule uses the keys: a wrong key changes the figures
    for layer in layers:
        getattr(net, layer).register_forward_hook(lambda *at, layer=layer: found.update({layer: at[2].clone()}))
    assert torch.equal(net(image(9, 2, 3, 64, 64)), found[list(layers)[-1]])
    for layer, (shape, mean, std, values) in layers.items():
        assert found[layer].shape == shape
        check(found[layer], mean, std, values, rel=1e-4, abs=1e-7)


def test_resnet_is_frozen_and_computes_and_keeps_no_more_than_its_layer():
    called, net = [], ResNet("resnet18", "layer2").train()
    for name, child in net.named_children():
        child.register_forward_hook(lambda *_, name=name: called.append(name))
    assert net(image(0, 1, 3, 32, 32)).shape == (1, 128, 4, 4)
    assert called == ["conv1", "bn1", "layer1", "layer2"]
    assert not any(m.training for m in net.modules()) and not any(p.requires_grad for p in net.parameters())
    assert [name for name, _ in net.trim().named_children()] == called


# ---------------------------------------------------------------------------------------------------------------------
# PCA and Gaussian


@pytest.mark.parametrize("n, d", [(200, 12), (12, 200), (30, 30), (29, 30)])
def test_pca_equals_eigh_of_the_covariance(n, d):
    x = randn(n, d) * torch.logspace(0, -3, d) + 5
    values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
    values, vectors = values.flip(0), vectors.flip(1)
    pca = PCA(5).fit(x)
    close(pca.mean, x.mean(0), rtol=1e-12, atol=0)
    close(pca.components.T @ pca.components, vectors[:, :5] @ vectors[:, :5].T, rtol=1e-8, atol=1e-10)
    close(pca.components @ pca.components.T, torch.eye(5).double(), rtol=0, atol=1e-12)
    close(pca.transform(x).square().mean(0), values[:5], rtol=1e-8, atol=0)
    close((x - pca.inverse_transform(pca.transform(x))).square().sum() / n, values[5:].sum(), rtol=1e-8, atol=0)
    everything = PCA(1.0).fit(x)
    assert len(everything.components) == min(n - 1, d)
    close(everything.inverse_transform(everything.transform(x)), x, rtol=1e-12, atol=0)


@pytest.mark.parametrize("n, d", [(60, 8), (8, 60)])
def test_singular_values_keep_their_digits_over_eleven_decades(n, d):
    expected = torch.logspace(0, -11, 7, dtype=torch.float64)
    found = dfm.principal_axes(samples((expected.square() / n).tolist(), n, d))[1]
    close(found, expected, rtol=0, atol=1e-15)  # the largest is 1; a Gram matrix would leave 1e-8


@pytest.mark.parametrize("variances, share, count", [
    ([1.0] * 43 + [0.13] * 10, 0.97, 43),  # 42 hold 0.948, 43 hold 0.971; an index taken as a count gives 42
    ([98.0, 1.0, 1.0], 0.97, 1),  # the first alone
    ([96.5, 2.0, 1.5], 0.97, 2),
    ([4.0, 3.0, 2.0, 1e-14], 1.0, 4),
    ([4.0, 3.0, 2.0, 1e-9], 2, 2),
    ([4.0, 3.0, 2.0, 1e-9], 1, 1),
    ([4.0, 3.0, 2.0, 1e-9], 4, 4),
])
def test_the_smallest_number_of_components_whose_variance_reaches_the_share(variances, share, count):
    assert len(PCA(share).fit(samples(variances, 100, len(variances)) + 3).components) == count


def test_a_share_that_is_reached_exactly_is_reached_in_spite_of_rounding():
    for percent in range(51, 100):
        assert len(PCA(percent / 100).fit(samples([percent, 100 - percent], 100, 2) + 3).components) == 1


def test_gaussian_equals_multivariate_normal():
    x, y = randn(300, 10) @ randn(10, 10, seed=1) + 2, randn(20, 10, seed=2)
    covariance = (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)
    expected = -torch.distributions.MultivariateNormal(x.mean(0), covariance).log_prob(y)
    close(SingleClassGaussian().fit(x).score_samples(y), expected, rtol=1e-8, atol=0)


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


def test_constant_values_are_null_directions_wherever_they_lie():
    x = torch.cat((randn(50, 3), torch.full((50, 2), 0.1).double(), torch.full((50, 1), 1e6).double()), 1)
    close(SingleClassGaussian().fit(x).score_samples(x), SingleClassGaussian().fit(x[:, :3]).score_samples(x[:, :3]),
          rtol=1e-8, atol=0)


def test_arguments_are_untouched_and_float32_is_computed_in_float64():
    x = randn(20, 6, 2, 2).float()
    before, exact = x.clone(), x.double()
    for kind in (lambda: PCA(0.9), SingleClassGaussian):
        one, other = kind().fit(x), kind().fit(exact)
        assert torch.equal(one.transform(x), other.transform(exact))
        assert all(value.dtype == torch.float64 for value in one.state_dict().values())
    for score_type in ("fre", "nll"):
        small(score_type).fit(x).score_features(x)
    assert torch.equal(x, before)


def test_pca_errors():
    for share in (0, 0.0, -1, 1.5, 97.0):
        with pytest.raises(ValueError, match="share in"):
            PCA(share)
    with pytest.raises(ValueError, match="10 components asked for, 10 samples vary along 9 only"):
        PCA(10).fit(randn(10, 20))
    for x in (torch.ones(5, 3), randn(1, 3), randn(0, 3)):
        with pytest.raises(ValueError, match="no direction varies"):
            PCA(0.97).fit(x)
    with pytest.raises(ValueError, match="1 of 10 samples hold NaN"):
        PCA(0.97).fit(torch.where(torch.arange(10)[:, None] == 3, math.nan, randn(10, 3)))
    with pytest.raises(ValueError, match=r"shape \(4, 2, 2\), got \(2, 2, 4\)"):
        PCA(0.97).fit(randn(10, 4, 2, 2)).transform(randn(1, 2, 2, 4))


# ---------------------------------------------------------------------------------------------------------------------
# Model


def slow_fre(features: torch.Tensor, mean: torch.Tensor, axes: torch.Tensor, height: int, width: int):
    """FRE (n,) and map (bilinear, half-pixel centres) of features (n, C, h, w), axes (k, d), by loops in float64."""
    c, h, w = features.shape[1:]
    scores, maps = [], np.zeros((len(features), height, width))
    for n, f in enumerate(features.double().flatten(1).numpy() - mean.double().numpy()):
        error = f - sum((f @ axis) * axis for axis in axes.double().numpy())
        scores.append(np.sqrt((error ** 2).sum()))
        grid = (error ** 2).reshape(c, h, w).sum(0)
        for y, x in np.ndindex(height, width):
            v = min(max((y + 0.5) * h / height - 0.5, 0), h - 1)
            u = min(max((x + 0.5) * w / width - 0.5, 0), w - 1)
            for i, j in np.ndindex(h, w):
                maps[n, y, x] += max(0, 1 - abs(v - i)) * max(0, 1 - abs(u - j)) * grid[i, j]
    return torch.tensor(scores), torch.tensor(maps)


def test_model_equals_slow_dfm():
    model = small(pooling_kernel_size=4, n_comps=0.9)
    train, test = image(3, 40, 3, 32, 48), image(4, 3, 3, 32, 48)
    features, others = model.features(train), model.features(test)
    assert features.shape == (40, 64, 2, 3) and features.dtype == torch.float32
    close(features, model.backbone(normalized(train)).view(40, 64, 2, 4, 3, 4).mean((3, 5)))
    rows, unseen = features.double().flatten(1), others.double().flatten(1)
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / 40)
    values, axes, k = values.flip(0), vectors.T.flip(0), 1
    while values[:k].sum() < 0.9 * values.sum():
        k += 1
    fre, maps = slow_fre(others, mean, axes[:k], 32, 48)
    prediction = model.fit(features).predict(test)
    assert set(prediction) == {"score", "anomaly_map"}
    close(prediction["score"], fre.float(), rtol=1e-6, atol=0)
    close(prediction["anomaly_map"], maps.float(), rtol=1e-5, atol=1e-9)
    score, grid = model.score_features(others)
    close(score, grid.sum((1, 2)).sqrt(), rtol=1e-12, atol=0)
    nll = sum(((unseen - mean) @ axes[i]) ** 2 / values[i] + values[i].log() + math.log(2 * math.pi)
              for i in range(k)) / 2
    model = small("nll", pooling_kernel_size=4, n_comps=0.9).fit(features)
    close(model.score_features(others)[0], nll, rtol=1e-8, atol=0)
    prediction = model.predict(test)
    assert set(prediction) == {"score"}
    close(prediction["score"], nll.float(), rtol=1e-6, atol=0)


def test_map_scale_is_the_largest_value_before_pca_of_any_class():
    train, labels = randn(9, 6, 3, 2) + 4, torch.tensor([2, 0, 0, 2, 2, 0, 0, 2, 0])
    train[4] *= 3
    largest = max(((f - train[labels == label].mean(0))[:, y, x] ** 2).sum()
                  for f, label in zip(train, labels) for y in range(3) for x in range(2))
    close(small().fit(train, labels).map_scale, largest.float())


@pytest.mark.parametrize("score_type", ["fre", "nll"])
def test_a_score_is_the_lowest_over_the_classes_with_that_classs_map(score_type):
    labels = torch.arange(3).repeat(10)
    places = torch.tensor([-9, 0, 9]).view(3, 1, 1, 1)
    train, test = randn(30, 6, 3, 2) + places[labels], randn(12, 6, 3, 2, seed=1) + places.repeat(4, 1, 1, 1)
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
    assert features.shape[1:] == shape
    score, anomaly_map = model.fit(features).predict(image(1, 2, 3, 64, 64)).values()
    assert score.shape == (2,) and anomaly_map.shape == (2, 64, 64)
    assert score.dtype == anomaly_map.dtype == torch.float32
    if shape[1] == 1:
        close(anomaly_map, score.square()[:, None, None].expand(2, 64, 64))


def test_autocast_and_train_mode_leave_the_model_alone():
    model, x = small("nll"), image(1, 8, 3, 32, 32)
    features = model.features(x)
    expected = model.fit(features).predict(x)["score"]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert torch.equal(model.train().predict(x)["score"], expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.features(x).dtype == torch.float32
        assert torch.equal(model.score_features(features)[0].float(), expected)
        model.fit(features)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("score_type", ["fre", "nll"])
def test_predict_exports_at_any_batch_size(score_type):
    class Predict(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, image):
            return self.model.predict(image)

    model, images = small(score_type), image(2, 5, 3, 32, 32)
    model.fit(model.features(images), torch.tensor([0, 0, 0, 1, 1]))
    batch = {"image": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(Predict(model), (images,), dynamic_shapes=batch)
    for batch in (images[:1], image(3, 4, 3, 32, 32)):
        close(program.module()(batch), model.predict(batch), rtol=1e-5, atol=1e-5)


def test_predict_refuses_other_kinds_of_image():
    model, x = small(), image(1, 2, 3, 32, 32)
    model.fit(model.features(image(0, 5, 3, 32, 32)))
    for other, words in (((x * 255).byte(), "uint8"), (x[0], r"\(3, 32, 32\)"), (x[:, :1], r"\(2, 1, 32, 32\)"),
                         (torch.cat((x, x[:, :1]), 1), r"\(2, 4, 32, 32\)"), (x[None], r"\(1, 2, 3, 32, 32\)"),
                         (x * 255, "found .* to 25"), (x * 2 - 1, "ImageNet"), (x - 0.01, "found -0.0"),
                         (x + 0.01, "to 1.0"), (x * math.nan, "nan")):
        with pytest.raises(ValueError, match=words):
            model.predict(other)
    model.predict(x * 1.001 - 0.0005)  # rounding of a float resize is accepted


def test_model_errors():
    for arguments, words in (({"backbone": "vgg"}, "vgg"), ({"layer": "layer9"}, "layer9"), ({"n_comps": 97.0}, "97.0"),
                             ({"score_type": "l2"}, "l2"), ({"pooling_kernel_size": 0}, "pooling_kernel_size 0")):
        with pytest.raises(ValueError, match=words):
            DFMModel(**{"pre_trained": False, **arguments})
    model = small(pooling_kernel_size=9)
    with pytest.raises(ValueError, match="pooling_kernel_size 9 is larger than the 8 x 16 map of layer1 .* 32 x 64"):
        model.features(image(0, 1, 3, 32, 64))
    with pytest.raises(ValueError, match="not fitted"):
        model.score_features(randn(1, 4))
    with pytest.raises(ValueError, match="no samples"):
        model.fit(randn(0, 4))
    with pytest.raises(ValueError, match="labels: 2 for 5 samples"):
        model.fit(randn(5, 4), torch.zeros(2))
    with pytest.raises(ValueError, match=r"or \(n, d\) are needed, got \(5, 4, 3\)"):
        model.fit(randn(5, 4, 3))


# ---------------------------------------------------------------------------------------------------------------------
# A backbone's weights


def layer1_state() -> dict:
    return fill(ResNet("resnet18", "layer1").trim()).state_dict()


def test_weights_from_a_file(tmp_path):
    state, path = layer1_state(), tmp_path / "resnet18.pth"
    bare = {k: v for k, v in state.items() if not k.endswith("tracked")}  # older files lack num_batches_tracked
    later = {"layer2.1.bn1.bias": torch.zeros(3), "fc.weight": torch.zeros(10, 512)}
    for content in (state | later, bare, {"state_dict": state | later, "epoch": 3},
                    {f"module.{k}": v for k, v in state.items()}, {f"module.backbone.{k}": v for k, v in bare.items()},
                    {"state_dict": {f"backbone.{k}": v for k, v in state.items()}}):
        torch.save(content, path)
        found = DFMModel("resnet18", "layer1", path).backbone.state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in found.items())


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, state = tmp_path / "weights.pth", layer1_state()
    for content, words in (
            ({k: v for k, v in state.items() if not k.startswith("layer1.1")},
             r"not weights of resnet18: layer1.1.conv1.weight .*\(--backbone\)"),
            (state | {"classifier.weight": torch.zeros(1)}, "classifier.weight"),
            (state | {"layer1.0.conv2.weight": torch.zeros(64, 64, 1, 1)}, "layer1.0.conv2.weight"),
            (state | {"bn1.weight": torch.full((64,), math.nan)}, "NaN"), ([1, 2], "found list"),
            (Code(), "could run code")):
        torch.save(content, path)
        with pytest.raises(ValueError, match=words) as error:
            DFMModel("resnet18", "layer1", str(path))
        assert "weights.pth" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="none.pth: No such file"):
        DFMModel("resnet18", "layer1", "none.pth")


def test_download_is_cached_and_its_hash_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)

    def saved(content, digits: str | None = None) -> Path:
        torch.save(content, tmp_path / "file")
        digits = digits or hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()[:8]
        return (tmp_path / "file").rename(tmp_path / f"resnet18-{digits}.pth")

    path = saved(layer1_state())
    monkeypatch.setitem(dfm.URLS, "resnet18", path.as_uri())
    assert torch.equal(DFMModel("resnet18", "layer1").backbone.conv1.weight, layer1_state()["conv1.weight"])
    path.unlink()
    load_resnet(load_resnet(ResNet("resnet18", "layer1")))  # both times from the cache
    assert (tmp_path / "home/hub/checkpoints" / path.name).exists()
    for wrong in (saved(layer1_state(), "00000000"), saved(Code()), tmp_path / "missing-00000000.pth"):
        monkeypatch.setitem(dfm.URLS, "resnet18", wrong.as_uri())
        with pytest.raises(ValueError, match="download failed.*--weights FILE.*internet.*--weights random") as error:
            DFMModel("resnet18", "layer1")
        assert wrong.name in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_random_weights_follow_the_seed():
    first = []
    for seed, kind in ((0, "random"), (0, False), (1, False)):
        torch.manual_seed(seed)
        first.append(DFMModel("resnet18", "layer1", kind).backbone.conv1.weight)
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])


# ---------------------------------------------------------------------------------------------------------------------
# Fitted models


@pytest.mark.parametrize("score_type, classes", [("fre", 1), ("fre", 3), ("nll", 2)])
def test_save_and_load(score_type, classes, tmp_path):
    model, images = small(score_type, pooling_kernel_size=2, n_comps=0.8), image(1, 12, 3, 32, 32)
    assert model.reading == {}
    model.fit(model.features(images), torch.arange(classes).repeat(12 // classes))
    reading = {"size": 32, "antialias": False}
    torch.save({"method": "dfm", "settings": model.settings, "reading": reading, "model": model.state_dict()},
               tmp_path / "last.pt")
    loaded = load(tmp_path / "last.pt")
    assert not loaded.training and loaded.settings == model.settings and loaded.reading == reading
    assert len(loaded.pca) == classes and torch.equal(model.map_scale, loaded.map_scale)
    for key, value in model.predict(images).items():
        assert torch.equal(loaded.predict(images)[key], value)
    refitted = small(score_type, pooling_kernel_size=2).fit(model.features(images), torch.arange(2).repeat(6))
    refitted.load_state_dict(model.state_dict())  # strict, though the number of classes differs
    assert torch.equal(refitted.predict(images)["score"], model.predict(images)["score"])


def anomalib_checkpoint(layer: str, pixel_max: float, resize: list | int | None) -> dict:
    """A file with the keys of anomalib 2.7.0's Dfm: resnet18 up to `layer`, pooling 2, 4 x 4 grid, 3 components."""
    d, empty = 16 * {"layer1": 64, "layer2": 128}[layer], torch.empty(0)
    model = {"pca_model.mean": randn(d).abs().float(), "pca_model.num_components": torch.tensor([3]),
             "pca_model.singular_vectors": torch.linalg.qr(randn(d, 3, seed=1)).Q.float(),
             "gaussian_model.mean_vec": empty, "gaussian_model.u_mat": empty, "gaussian_model.sigma_mat": empty}
    model |= {"feature_extractor.feature_extractor." + key: value
              for key, value in fill(ResNet("resnet18", layer).trim()).state_dict().items()}
    names = ("_image_threshold", "_pixel_threshold", "image_min", "image_max", "pixel_min")
    state = {"_is_fitted": torch.tensor([True])} | {f"post_processor.{name}": torch.tensor(9.0) for name in names}
    state |= {"post_processor.pixel_max": torch.tensor(pixel_max)} | {f"model.{k}": v for k, v in model.items()}
    steps = [{"class_path": "torchvision.transforms.v2.Normalize", "init_args": {"mean": [0.485, 0.456, 0.406]}}]
    if resize:
        steps.insert(0, {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": resize}})
    return {"epoch": 0, "pytorch-lightning_version": "2.6.6", "hparams_name": "kwargs", "state_dict": state,
            "hyper_parameters": {"backbone": "resnet18", "layer": layer, "pre_trained": True, "pooling_kernel_size": 2,
                                 "pca_level": 0.97, "score_type": "fre"},
            "anomalib_pre_processor_config": {"transform": {
                "class_path": "torchvision.transforms.v2.Compose", "init_args": {"transforms": steps}}}}


@pytest.mark.parametrize("layer, side, pixel_max, scale, resize, size", [
    ("layer1", 32, 0.5, 0.5, [96, 96], 96), ("layer2", 64, math.nan, 1.0, None, 256), ("layer1", 32, 0.0, 1.0, 64, 64)])
def test_anomalibs_checkpoint(layer, side, pixel_max, scale, resize, size, tmp_path):
    content = anomalib_checkpoint(layer, pixel_max, resize)
    torch.save(content, tmp_path / "model.ckpt")
    model, x = load(tmp_path / "model.ckpt"), image(5, 3, 3, side, side)
    features = F.avg_pool2d(fill(ResNet("resnet18", layer))(normalized(x)), 2)  # of the file's network
    mean, vectors = (content["state_dict"][f"model.pca_model.{name}"] for name in ("mean", "singular_vectors"))
    fre, maps = slow_fre(features, mean, vectors.T, side, side)
    prediction = model.predict(x)
    close(prediction["score"], fre.float(), rtol=1e-5, atol=0)
    close(prediction["anomaly_map"], maps.float(), rtol=1e-4, atol=1e-5)
    assert model.settings == {"backbone": "resnet18", "layer": layer, "pooling_kernel_size": 2, "n_comps": 0.97,
                              "score_type": "fre"}
    assert model.reading == {"size": size, "antialias": True} and not model.training and model.map_scale == scale


def test_loading_what_is_not_a_fitted_model(tmp_path):
    path, model = tmp_path / "file.pt", small().fit(randn(5, 4))
    own = {"method": "dfm", "settings": model.settings, "reading": {}, "model": model.state_dict()}
    other = anomalib_checkpoint("layer1", 1.0, None)
    for content, words in (
            (own | {"method": "draem"}, "a checkpoint of draem, not of dfm"),
            ({key: value for key, value in own.items() if key != "model"}, "of dfm"),
            (own | {"settings": {"depth": 1}}, "depth"),
            (own | {"settings": model.settings | {"layer": "layer2"}}, "layer2.0.conv1.weight"),
            (own | {"model": model.state_dict() | {"map_scale": torch.tensor(math.inf)}}, "infinity"),
            (layer1_state(), "neither.*conv1.weight, bn1.weight, bn1.bias"),
            (other | {"hyper_parameters": other["hyper_parameters"] | {"score_type": "nll"}}, "score_type fre"),
            (other | {"state_dict": {"model.encoder.weight": torch.zeros(1)}}, "not of a fitted Dfm"),
            ({"state_dict": other["state_dict"]}, "not of a fitted Dfm"),
            (other | {"hyper_parameters": other["hyper_parameters"] | {"backbone": "resnet34"}}, "backbone resnet18"),
            (other | {"hyper_parameters": other["hyper_parameters"] | {"layer": "layer3.1"}}, "a whole layer"),
            (other | {"state_dict": other["state_dict"] | {
                "model.pca_model.mean": torch.zeros(384), "model.pca_model.singular_vectors": torch.zeros(384, 2)}},
             "square"),
            (other | {"state_dict": other["state_dict"] | {"model.pca_model.singular_vectors": torch.zeros(0)}},
             "fitted")):
        torch.save(content, path)
        with pytest.raises(ValueError, match=words) as error:
            load(path)
        assert "file.pt" in str(error.value) and "\n" not in str(error.value)
    path.write_bytes(b"not a file of torch")
    with pytest.raises(ValueError, match="file.pt: truncated, or not a file of weights"):
        load(path)
    with pytest.raises(ValueError, match="none.pt: No such file"):
        load(tmp_path / "none.pt")
