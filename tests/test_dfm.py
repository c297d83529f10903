"""Tests of dfm.py. Oracles: torchvision 0.28's ResNets in figures (golden.py), torch.linalg.eigh of the covariance,
torch.distributions.MultivariateNormal in float64, closed forms, and a slow DFM in numpy loops."""
import hashlib
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dfm  # noqa: E402
from dfm import PCA, DFMModel, ResNet, SingleClassGaussian, load_dfm, load_resnet  # noqa: E402
from golden import check, fill, image  # noqa: E402

GOLDEN = {  # name: entries, parameters, and of each layer: shape, mean, standard deviation, values
    "resnet18": (122, 11689512, {
        "layer1": ((2, 64, 16, 16), 0.67080566, 0.65382395, [
            0.59933937, 0.83578318, 0., 2.1983342, 0.06095773, 0.78154612, 0.51028204, 1.0074302]),
        "layer2": ((2, 128, 8, 8), 0.53688578, 0.64861828, [
            0.3045986, 0.80127645, 0., 1.3570967, 0.16505156, 0., 0.4854787, 1.2661612]),
        "layer3": ((2, 256, 4, 4), 0.4503671, 0.56536189, [
            0.42793748, 1.7591789, 0., 0., 0.63533288, 0.50068039, 0.18822443, 1.2804742]),
        "layer4": ((2, 512, 2, 2), 0.36877771, 0.45764128, [
            0.40174583, 0., 1.0349545, 0., 0.90992403, 0., 0., 0.68444526]),
        "avgpool": ((2, 512, 1, 1), 0.36877771, 0.38419643, [
            0.45573771, 0., 0.92965567, 0.050301157, 1.3098392, 0.24656251, 0.76881409, 0.28189248]),
    }),
    "resnet50": (320, 25557032, {
        "layer1": ((2, 256, 16, 16), 0.36407634, 0.42486955, [
            0.35721254, 0., 0.12293068, 0.063887544, 0.036308948, 0.21428448, 0.073398083, 0.40718096]),
        "layer2": ((2, 512, 8, 8), 0.36976497, 0.42403995, [
            0.28371274, 0.51282287, 1.8100482, 0.16349566, 0., 0.0019093752, 0.19345845, 0.30043948]),
        "layer3": ((2, 1024, 4, 4), 0.47418165, 0.46746339, [
            0., 0., 0.065406978, 0.67141795, 0.066038288, 0.88162947, 0.71916634, 0.54826331]),
        "layer4": ((2, 2048, 2, 2), 0.37905781, 0.43324079, [
            0.2995185, 0.87909263, 0., 1.5225501, 0.91200066, 0.28822723, 0.46038884, 0.48520952]),
        "avgpool": ((2, 2048, 1, 1), 0.37905781, 0.39772856, [
            0.19217278, 0.8348847, 0., 1.4347754, 0.62098944, 0.41222233, 0.52188319, 0.46083617]),
    }),
    "wide_resnet50_2": (320, 68883240, {
        "layer1": ((2, 256, 16, 16), 0.38810574, 0.44054309, [
            0.26520702, 0., 0.082871348, 0.78862464, 0.86105317, 0.5818736, 0.3401162, 0.21626282]),
        "layer2": ((2, 512, 8, 8), 0.38345438, 0.40763831, [
            0.10674663, 1.0814531, 1.1550049, 1.5356801, 0.056002095, 0.26747888, 0.43189803, 0.38307405]),
        "layer3": ((2, 1024, 4, 4), 0.49524651, 0.50176931, [
            0., 0.79337072, 0.45047146, 0.543859, 1.3227239, 1.3873199, 0.20092395, 0.46607411]),
        "layer4": ((2, 2048, 2, 2), 0.38743268, 0.45665988, [
            0.84290725, 0.21466263, 0., 2.0767627, 0.42915642, 0.13357776, 0.032094721, 0.037571877]),
        "avgpool": ((2, 2048, 1, 1), 0.38743268, 0.42080182, [
            0.89826751, 0.21299855, 0., 1.6272088, 0.34470654, 0.21395355, 0.067762241, 0.18074253]),
    }),
}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spectrum(variances: list[float], n: int = 100) -> torch.Tensor:
    """Samples (n, d) whose covariance (over n) has exactly these eigenvalues, up to rounding."""
    left = torch.linalg.qr(torch.cat((torch.ones(n, 1).double(), randn(n, len(variances))), 1)).Q[:, 1:]  # centred
    right = torch.linalg.qr(randn(len(variances), len(variances), seed=1)).Q
    return left * (n * torch.tensor(variances).double()).sqrt() @ right + 3


def fitted(score_type: str = "fre", classes: int = 2, **arguments) -> tuple[DFMModel, torch.Tensor]:
    """A small fitted model, and images (6, 3, 64, 64)."""
    torch.manual_seed(0)
    model = DFMModel("resnet18", "layer2", False, 2, score_type=score_type, **arguments)
    images = image(1, 6 * classes, 3, 64, 64) * torch.linspace(0.3, 1, classes).repeat(6)[:, None, None, None]
    model.fit(model.features(images), torch.arange(classes).repeat(6))
    return model, image(2, 6, 3, 64, 64) * 0.8


close = torch.testing.assert_close


# ---------------------------------------------------------------------------------------------------------------------
# ResNet


@pytest.mark.parametrize("name", GOLDEN)
def test_resnet_gives_torchvisions_figures_at_every_layer(name):
    entries, parameters, layers = GOLDEN[name]
    net = fill(ResNet(name, "avgpool"))
    assert len(net.state_dict()) == entries
    assert sum(p.numel() for p in net.parameters()) == parameters
    x = image(9, 2, 3, 64, 64)
    for i, (layer, (shape, mean, std, values)) in enumerate(layers.items()):
        net.layers = dfm.LAYERS[:i + 1]  # as ResNet(name, layer) sets it
        features = net(x)
        assert features.shape == shape
        check(features, mean, std, values, rel=1e-4, abs=1e-7)


def test_resnet_keys_are_torchvisions():
    keys = list(ResNet("resnet50", "layer1").state_dict())
    assert keys[:6] == ["conv1.weight"] + [f"bn1.{k}" for k in (
        "weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    for key in ("layer1.0.downsample.0.weight", "layer3.5.conv3.weight", "layer4.2.bn3.running_var", "fc.bias"):
        assert key in keys
    assert "layer1.1.downsample.0.weight" not in keys
    assert "layer1.0.downsample.0.weight" not in ResNet("resnet18").state_dict()


def test_resnet_computes_no_further_than_its_layer():
    called = []
    net = ResNet("resnet18", "layer2")
    for name, child in net.named_children():
        child.register_forward_hook(lambda *_, name=name: called.append(name))
    net(image(0, 1, 3, 32, 32))
    assert called == ["conv1", "bn1", "layer1", "layer2"]
    assert [name for name, _ in net.trim().named_children()] == called


def test_resnet_is_frozen():
    net = ResNet("resnet18", "layer1").train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net(image(0, 2, 3, 32, 32))
    assert not any(m.training for m in net.modules()) and not any(p.requires_grad for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# PCA and Gaussian


@pytest.mark.parametrize("n, d", [(200, 12), (12, 200), (30, 30), (29, 30)])
def test_pca_equals_eigh_of_the_covariance(n, d):
    x = randn(n, d) * torch.logspace(0, -3, d) + 5
    covariance = torch.cov(x.T, correction=0)
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0), vectors.flip(1)
    rank = min(n - 1, d)
    pca = PCA(5).fit(x)
    close(pca.mean, x.mean(0), rtol=1e-12, atol=0)
    close(pca.components.T @ pca.components, vectors[:, :5] @ vectors[:, :5].T, rtol=1e-8, atol=1e-10)
    close(pca.components @ pca.components.T, torch.eye(5).double(), rtol=0, atol=1e-12)
    close(pca.transform(x).square().mean(0), values[:5], rtol=1e-8, atol=0)
    close((x - pca.inverse_transform(pca.transform(x))).square().sum() / n, values[5:].sum(), rtol=1e-8, atol=0)
    everything = PCA(1.0).fit(x)
    assert len(everything.components) == rank
    close(everything.inverse_transform(everything.transform(x)), x, rtol=1e-12, atol=0)


@pytest.mark.parametrize("n, d", [(60, 8), (8, 60)])
def test_singular_values_keep_their_digits_over_twelve_decades(n, d):
    values = torch.logspace(0, -11, 7, dtype=torch.float64)
    left = torch.linalg.qr(torch.cat((torch.ones(n, 1).double(), randn(n, 7)), 1)).Q[:, 1:]
    right = torch.linalg.qr(randn(d, 7, seed=1)).Q
    found = dfm.principal_axes(left * values @ right.T)[1]
    close(found, values, rtol=0, atol=1e-15)  # relative to the largest; a Gram matrix would leave 1e-8


@pytest.mark.parametrize("variances, share, count", [
    ([1.0] * 43 + [0.13] * 10, 0.97, 43),  # 42 of them hold 0.948, 43 0.971: an index taken as a count gives 42
    ([98.0, 1.0, 1.0], 0.97, 1),  # the first alone
    ([96.0, 2.0, 2.0], 0.97, 2),
    ([4.0, 3.0, 2.0, 1e-14], 1.0, 4),
    ([4.0, 3.0, 2.0, 1e-9], 2, 2),
    ([4.0, 3.0, 2.0, 1e-9], 1, 1),
])
def test_the_smallest_number_of_components_whose_variance_reaches_the_share(variances, share, count):
    assert len(PCA(share).fit(spectrum(variances)).components) == count


def test_a_share_that_is_reached_exactly_is_reached_in_spite_of_rounding():
    for percent in range(51, 100):
        assert len(PCA(percent / 100).fit(spectrum([percent, 100 - percent])).components) == 1


def test_gaussian_equals_multivariate_normal():
    x, y = randn(300, 10) @ randn(10, 10, seed=1) + 2, randn(20, 10, seed=2)
    covariance = (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)
    expected = -torch.distributions.MultivariateNormal(x.mean(0), covariance).log_prob(y)
    close(SingleClassGaussian().fit(x).score_samples(y), expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("n, d, repeats", [(100, 10, 1), (10, 50, 1), (10, 10, 1), (6, 20, 3), (20, 4, 2)])
def test_mean_nll_of_the_training_set_is_the_entropy(n, d, repeats):
    """The mean Mahalanobis term is the number of directions that vary, so the mean NLL has a closed form."""
    x = randn(n, d).repeat(repeats, 1) * 3 + 100
    rank = min(n - 1, d)
    variance = torch.linalg.eigvalsh(torch.cov(x.T, correction=0))[-rank:]
    expected = rank / 2 * (1 + math.log(2 * math.pi)) + variance.log().sum() / 2
    gaussian = SingleClassGaussian().fit(x)
    assert gaussian.deviation.shape == (rank,)
    close(gaussian.score_samples(x).mean(), expected, rtol=1e-8, atol=0)
    assert gaussian.score_samples(randn(5, d, seed=3)).isfinite().all()


def test_constant_values_are_null_directions_wherever_they_lie():
    x = torch.cat((randn(50, 3), torch.full((50, 2), 0.1).double(), torch.full((50, 1), 1e6).double()), 1)
    close(SingleClassGaussian().fit(x).score_samples(x), SingleClassGaussian().fit(x[:, :3]).score_samples(x[:, :3]),
          rtol=1e-8, atol=0)


def test_arguments_are_untouched_and_float32_is_computed_in_float64():
    x = randn(20, 6, 2, 2).float()
    before, exact = x.clone(), x.double()
    pca, gaussian = PCA(0.9).fit(x), SingleClassGaussian().fit(x.flatten(1)[:, :5])
    assert torch.equal(pca.inverse_transform(pca.transform(x)), pca.inverse_transform(pca.transform(exact)))
    assert torch.equal(gaussian.score_samples(x.flatten(1)[:, :5]), gaussian.score_samples(exact.flatten(1)[:, :5]))
    for score_type in ("fre", "nll"):
        DFMModel("resnet18", "layer1", False, score_type=score_type).fit(x).score_features(x)
    assert torch.equal(x, before)


def test_pca_errors():
    for share in (0, 0.0, -1, 1.5, 97.0):
        with pytest.raises(ValueError, match="share in"):
            PCA(share)
    with pytest.raises(ValueError, match="11 components asked for, 10 samples vary along 9 only"):
        PCA(11).fit(randn(10, 20))
    for x in (torch.ones(5, 3), randn(1, 3), randn(0, 3)):
        with pytest.raises(ValueError, match="no direction varies"):
            PCA(0.97).fit(x)
    with pytest.raises(ValueError, match="1 of 10 samples hold NaN"):
        PCA(0.97).fit(torch.where(torch.arange(10)[:, None] == 3, math.nan, randn(10, 3)))
    with pytest.raises(ValueError, match=r"shape \(4, 2, 2\), got \(2, 2, 4\)"):
        PCA(0.97).fit(randn(10, 4, 2, 2)).transform(randn(1, 2, 2, 4))


# ---------------------------------------------------------------------------------------------------------------------
# Model


def slow_dfm(train: np.ndarray, test: np.ndarray, share: float, size: int):
    """FRE, map (bilinear, half-pixel centres) and NLL by loops over samples and pixels: (n, C, h, w) in float64."""
    n, c, h, w = train.shape
    flat = train.reshape(n, -1)
    mean = flat.sum(0) / n
    values, vectors = np.linalg.eigh(sum(np.outer(f - mean, f - mean) for f in flat) / n)
    values, vectors = values[::-1], vectors[:, ::-1]
    k = 0
    while values[:k].sum() < share * values.sum():
        k += 1
    scores, maps, nlls = [], [], []
    for f in test.reshape(len(test), -1):
        reduced = [(f - mean) @ vectors[:, i] for i in range(k)]
        error = f - mean - sum(r * vectors[:, i] for i, r in enumerate(reduced))
        scores.append(np.sqrt((error ** 2).sum()))
        grid = (error ** 2).reshape(c, h, w).sum(0)
        enlarged = np.zeros((size, size))
        for y in range(size):
            for x in range(size):
                v, u = ((p + 0.5) * q / size - 0.5 for p, q in ((y, h), (x, w)))
                v, u = min(max(v, 0), h - 1), min(max(u, 0), w - 1)
                for i in range(h):
                    for j in range(w):
                        enlarged[y, x] += max(0, 1 - abs(v - i)) * max(0, 1 - abs(u - j)) * grid[i, j]
        maps.append(enlarged)
        nlls.append(sum(r ** 2 / values[i] + np.log(values[i]) + np.log(2 * np.pi) for i, r in enumerate(reduced)) / 2)
    return np.array(scores), np.array(maps), np.array(nlls)


def test_model_equals_slow_dfm():
    torch.manual_seed(0)
    model = DFMModel("resnet18", "layer1", False, pooling_kernel_size=4, n_comps=0.9)
    train, test = image(3, 40, 3, 32, 32), image(4, 3, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    features = model.features(train)
    close(features, model.backbone((train - mean) / std).view(40, 64, 2, 4, 2, 4).mean((3, 5)))
    score, anomaly_map = model.fit(features).predict(test)
    fre, maps, nll = slow_dfm(features.double().numpy(), model.features(test).double().numpy(), 0.9, 32)
    close(score, torch.tensor(fre).float(), rtol=1e-6, atol=0)
    close(anomaly_map, torch.tensor(maps).float(), rtol=1e-5, atol=1e-9)
    close(model.map_scale, (features - features.mean(0)).square().sum(1).max())
    gaussian = DFMModel("resnet18", "layer1", False, pooling_kernel_size=4, n_comps=0.9, score_type="nll").fit(features)
    close(gaussian.score_features(model.features(test))[0], torch.tensor(nll), rtol=1e-8, atol=0)
    assert gaussian.predict(test)[1] is None


def test_map_scale_is_the_largest_value_before_pca_of_any_class():
    train, labels = randn(9, 6, 3, 2) + 4, torch.tensor([2, 0, 0, 2, 2, 0, 0, 2, 0])
    train[4] *= 3
    model = DFMModel("resnet18", "layer1", False).fit(train, labels)
    largest = max(((f - train[labels == label].mean(0))[:, y, x] ** 2).sum()
                  for f, label in zip(train, labels) for y in range(3) for x in range(2))
    close(model.map_scale, largest.float())


def test_a_score_is_the_lowest_over_the_classes_with_that_classs_map():
    model, images = fitted("fre", classes=3)
    features = model.features(images)
    alone = [model.score_features(features) for model.pca in [torch.nn.ModuleList([p]) for p in model.pca]]
    model, _ = fitted("fre", classes=3)
    score, grid = model.score_features(features)
    scores = torch.stack([s for s, _ in alone])
    assert torch.equal(score, scores.amin(0))
    for i, best in enumerate(scores.argmin(0)):
        assert torch.equal(grid[i], alone[best][1][i])
    close(score.square(), grid.sum((1, 2)))


@pytest.mark.parametrize("score_type", ["fre", "nll"])
def test_two_classes_far_apart(score_type):
    """What lies between two classes is far from both; to a single model over both it is as normal as they are."""
    spread = torch.cat((torch.ones(5), torch.full((15,), 0.01))).double()

    def samples(place: float, n: int, seed: int) -> torch.Tensor:
        return randn(n, 20, seed=seed) * spread + place * torch.eye(20)[10]

    train = torch.cat((samples(50, 100, 0), samples(-50, 100, 1)))
    normal, between = torch.cat((samples(50, 50, 2), samples(-50, 50, 3))), samples(0, 100, 4)
    model = DFMModel("resnet18", "layer1", False, n_comps=6, score_type=score_type)
    score = model.fit(train, torch.arange(2).repeat_interleave(100)).score_features
    assert score(between)[0].min() > 5 * score(normal)[0].abs().max()
    score = model.fit(train).score_features
    assert score(between)[0].mean() < 1.05 * score(normal)[0].mean()


def test_fitting_to_a_stream_of_batches_is_fitting_to_all_at_once():
    model, images = fitted()
    probe = image(5, 2, 3, 64, 64)
    streamed = model.fit(torch.cat([model.features(batch) for batch in images.split(4)])).predict(probe)
    for a, b in zip(streamed, model.fit(model.features(images)).predict(probe)):
        close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layer, pooling, shape", [("layer3", 4, (256, 1, 1)), ("avgpool", 4, (512, 1, 1)),
                                                   ("layer2", 3, (128, 2, 2)), ("layer2", 1, (128, 8, 8))])
def test_whole_map_pooled_remainders_and_avgpool(layer, pooling, shape):
    model = DFMModel("resnet18", layer, False, pooling)
    features = model.features(image(0, 5, 3, 64, 64))
    assert features.shape[1:] == shape
    score, anomaly_map = model.fit(features).predict(image(1, 2, 3, 64, 64))
    assert score.shape == (2,) and anomaly_map.shape == (2, 64, 64)
    assert score.dtype == anomaly_map.dtype == torch.float32
    if shape[1] == 1:
        close(anomaly_map, score.square()[:, None, None].expand(2, 64, 64))


@pytest.mark.parametrize("score_type, classes", [("fre", 1), ("fre", 3), ("nll", 2)])
def test_save_and_load(score_type, classes, tmp_path):
    model, images = fitted(score_type, classes)
    torch.save({"method": "dfm", "settings": model.settings, "model": model.state_dict()}, tmp_path / "last.pt")
    loaded = load_dfm(tmp_path / "last.pt")
    assert not loaded.training and loaded.settings == model.settings
    for a, b in zip(model.predict(images), loaded.predict(images)):
        assert a is b is None or torch.equal(a, b)
    assert torch.equal(model.map_scale, loaded.map_scale)
    fitted_otherwise, _ = fitted(score_type, 2)
    fitted_otherwise.load_state_dict(model.state_dict())  # strict, over another number of classes
    assert torch.equal(fitted_otherwise.predict(images)[0], model.predict(images)[0])
    pca = PCA()
    pca.load_state_dict(model.pca[0].state_dict())
    assert torch.equal(pca.components, model.pca[0].components)


def test_loading_what_is_not_a_model(tmp_path):
    path = tmp_path / "file.pt"
    with pytest.raises(ValueError, match="file.pt: No such file"):
        load_dfm(path)
    path.write_bytes(b"not a file of torch")
    with pytest.raises(ValueError, match="file.pt"):
        load_dfm(path)
    model, _ = fitted()
    for content in ({"method": "draem", "settings": {}, "model": {}}, {"conv1.weight": torch.zeros(1)},
                    {"method": "dfm", "settings": {"depth": 1}, "model": {}},
                    {"method": "dfm", "settings": model.settings | {"layer": "layer1"}, "model": model.state_dict()}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="file.pt") as error:
            load_dfm(path)
        assert "\n" not in str(error.value)


def test_autocast_and_train_mode_leave_the_model_alone():
    model, images = fitted("nll")
    expected = model.predict(images)[0]
    features = model.features(images)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    assert torch.equal(model.predict(images)[0], expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.features(images).dtype == torch.float32
        assert torch.equal(model.score_features(features)[0].float(), expected)
        model.fit(features)
    reference = DFMModel("resnet18", "layer2", False, 2, score_type="nll").fit(features)
    assert torch.equal(model.score_features(features)[0], reference.score_features(features)[0])
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, before["backbone." + key])


@pytest.mark.parametrize("score_type", ["fre", "nll"])
def test_predict_exports_at_any_batch_size(score_type):
    class Predict(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, image):
            return self.model.predict(image)

    model, images = fitted(score_type)
    program = torch.export.export(Predict(model), (images,), dynamic_shapes={"image": {0: torch.export.Dim("batch")}})
    for batch in (images[:1], images[:5]):
        for a, b in zip(program.module()(batch), model.predict(batch)):
            assert a is b is None or torch.allclose(a, b, rtol=1e-5)


def test_model_errors():
    for arguments, words in (({"backbone": "vgg"}, "vgg"), ({"layer": "layer9"}, "layer9"), ({"n_comps": 97.0}, "97.0"),
                             ({"score_type": "l2"}, "l2"), ({"pooling_kernel_size": 0}, "pooling_kernel_size 0")):
        with pytest.raises(ValueError, match=words):
            DFMModel(**{"pre_trained": False, **arguments})
    model = DFMModel("resnet18", "layer3", False, pooling_kernel_size=8)
    with pytest.raises(ValueError, match="pooling_kernel_size 8 is larger than the 4 x 4 map of layer3"):
        model.features(image(0, 1, 3, 64, 64))
    with pytest.raises(ValueError, match="not fitted"):
        model.score_features(randn(1, 4))
    with pytest.raises(ValueError, match="no samples"):
        model.fit(randn(0, 4))
    with pytest.raises(ValueError, match="labels: 2 for 5 samples"):
        model.fit(randn(5, 4), torch.zeros(2))
    with pytest.raises(ValueError, match=r"or \(n, d\) are needed, got \(5, 4, 3\)"):
        model.fit(randn(5, 4, 3))


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def torchvision_state() -> dict:
    return {k: v.clone() for k, v in fill(ResNet("resnet18", "layer1")).state_dict().items()}


def test_weights_from_a_file(tmp_path):
    state, path = torchvision_state(), tmp_path / "resnet18.pth"
    old = {k: v for k, v in state.items()  # nothing after layer1 but a stray entry and a head of one's own; no counters
           if k.startswith(("conv1", "bn1", "layer1", "layer4.1.bn")) and not k.endswith("tracked")}
    for content in (state, old | {"fc.weight": torch.zeros(10, 512)}):
        torch.save(content, path)
        net = DFMModel("resnet18", "layer1", path).backbone
        assert set(net.state_dict()) == {k for k in state if k.startswith(("conv1", "bn1", "layer1"))}
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, state = tmp_path / "weights.pth", torchvision_state()
    cases = [
        ({k: v for k, v in state.items() if not k.startswith("layer1.1")}, "missing (layer1.1.conv1.weight"),
        (state | {"classifier.weight": torch.zeros(1)}, "unknown (classifier.weight"),
        (state | {"layer1.0.conv2.weight": torch.zeros(64, 64, 1, 1)}, "layer1.0.conv2.weight (64, 64, 1, 1)"),
        (state | {"bn1.weight": torch.full((64,), math.nan)}, "not finite (bn1.weight"),
        ([1, 2], "found list"),
        (Code(), "could run code"),
    ]
    for content, words in cases:
        torch.save(content, path)
        with pytest.raises(ValueError) as error:
            DFMModel("resnet18", "layer1", str(path))
        assert words in str(error.value) and "weights.pth" in str(error.value) and "\n" not in str(error.value)
    path.write_bytes(pickle.dumps(Code(), protocol=2))
    with pytest.raises(ValueError, match="weights.pth"):
        DFMModel("resnet18", "layer1", path)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="none.pth: No such file"):
        DFMModel("resnet18", "layer1", "none.pth")


def test_download_is_cached_and_its_hash_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    torch.save(torchvision_state(), tmp_path / "file")
    digest = hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
    for name in (f"resnet18-{digest[:8]}.pth", "resnet18-00000000.pth"):
        shutil.copy(tmp_path / "file", tmp_path / name)
    monkeypatch.setitem(dfm.URLS, "resnet18", (tmp_path / f"resnet18-{digest[:8]}.pth").as_uri())
    state = DFMModel("resnet18", "layer1").backbone.state_dict()
    assert torch.equal(state["conv1.weight"], torchvision_state()["conv1.weight"])
    (tmp_path / f"resnet18-{digest[:8]}.pth").unlink()
    load_resnet(load_resnet(ResNet("resnet18", "layer2")))  # twice, from the cache, under the file's own name
    assert (tmp_path / "home/hub/checkpoints" / f"resnet18-{digest[:8]}.pth").exists()
    for name in ("resnet18-00000000.pth", "missing-00000000.pth"):
        monkeypatch.setitem(dfm.URLS, "resnet18", (tmp_path / name).as_uri())
        with pytest.raises(ValueError, match="download failed.*--weights FILE.*--weights random.*network") as error:
            DFMModel("resnet18", "layer1")
        assert name in str(error.value) and "\n" not in str(error.value)


def test_random_weights_follow_the_seed():
    states = []
    for seed, kind in ((0, "random"), (0, False), (1, False)):
        torch.manual_seed(seed)
        states.append(DFMModel("resnet18", "layer1", kind).backbone.conv1.weight)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_the_file_works_alone(tmp_path):
    shutil.copy(dfm.__file__, tmp_path)
    code = """
import torch, dfm
train, test = torch.randn(50, 512) * torch.linspace(1, 0, 512), torch.randn(3, 512)
model = dfm.DFMModel("resnet18", "layer1", False)
score, grid = model.fit(train).score_features(test)
print(tuple(score.shape), tuple(grid.shape))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[0] == "(3,) (3, 1, 1)"
