"""DFM: deep features of a pretrained network, modelled by PCA and a Gaussian. Torch and the standard library only.

Papers
    Ahuja, Ndiour, Kalyanpur, Tickoo: Probabilistic Modeling of Deep Features for Out-of-Distribution and Adversarial
    Detection, 2019, arXiv 1909.11786: a Gaussian per class on deep features; score: negative log-likelihood ("nll").
    Ndiour, Ahuja, Tickoo: Out-Of-Distribution Detection With Subspace Techniques And Probabilistic Modeling Of
    Features, 2020, arXiv 2012.04250: the likelihood of reduced features; the feature reconstruction error ("fre").
    No code came with the papers. anomalib's DFM (2.7.0) is by their first author; defaults and map are as there. F1,
    F2 ... are rows of README's *Differences*.

Notation (n samples; d = C * h * w values each, C channels; k directions kept of the r that vary)
    f       features            (n, C, h, w)    pooled features of a layer, or any (n, d)
    mu      mean                (C, h, w)       their mean over the samples
    T       components          (k, d)          orthonormal rows; T (f - mu) reduces, T^t (.) + mu is the pre-image
    -       axes, coordinates   (r, d), (n, r)  all principal axes; the samples' places along them
    S       deviation           (r,)            of a Gaussian: standard deviation along each axis
    U^t     components          (r, d)          of a Gaussian: all axes; covariance = U S^2 U^t, which is not built
    -       grid                (n, h, w)       squared feature error summed over channels
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PUBLISHED = {
    "size": 256,             # side of the square images, in pixels (anomalib)
    "batch": 8,              # images a forward pass, chosen here
    "backbone": "resnet50",  # anomalib
    "layer": "layer3",       # that yields the features (anomalib)
    "pooling": 4,            # kernel and stride of the average pooling (anomalib)
    "share": 0.97,           # of the variance that PCA keeps (anomalib)
    "score": "fre",          # reconstruction error, or "nll", of reduced features (both 2012.04250; nll: 1909.11786)
}

# --- PCA and Gaussian -------------------------------------------------------------------------------------------------

def principal_axes(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """features - mean = coordinates axes, by SVD in float64, without the null directions.

    features (n, ...) -> mean (...), coordinates (n, r), orthonormal axes (r, d). The norms of the coordinates' columns
    are the singular values, in descending order. ValueError if r is 0.
    A direction is null if its singular value is at most eps * max(n, d) * |features|, the rounding error of the data.
    """
    rows = features.double().flatten(1)  # (n, d)
    if not rows.isfinite().all():
        raise ValueError(f"{(~rows.isfinite().all(1)).sum()} of {len(rows)} samples hold NaN or infinity")
    mean = rows.mean(0)  # subtracted once, from a copy (F2)
    axes, singular_values, right = torch.linalg.svd((rows - mean).T, full_matrices=False)  # as (n, d) 4 times as slow
    r = int((singular_values > torch.finfo(torch.float64).eps * max(rows.shape) * rows.norm()).sum())
    if not r:
        raise ValueError(f"no direction varies over {len(rows)} sample(s): at least two different ones are needed")
    return mean.reshape(features.shape[1:]), (right.T * singular_values)[:, :r], axes.T[:r]


class PCA(nn.Module):
    """Principal components of samples (n, ...), float64.

    It keeps the smallest number of components whose variance reaches `share` in (0, 1] of the total (F1), within a
    rounding of 1e-12. A share of 1 keeps every direction that varies. fit sets the sizes of the buffers.
    """

    def __init__(self, share: float = PUBLISHED["share"]):
        super().__init__()
        if not 0 < share <= 1:
            raise ValueError(f"share {share}: a share of the variance in (0, 1] is needed")
        self.share = share
        self.register_buffer("mean", torch.empty(0, dtype=torch.float64))
        self.register_buffer("components", torch.empty(0, dtype=torch.float64))

    def fit(self, features: Tensor) -> "PCA":
        return self.keep(*principal_axes(features))

    def keep(self, mean: Tensor, coordinates: Tensor, axes: Tensor) -> "PCA":
        """fit, from what principal_axes returned."""
        variance = coordinates.square().sum(0).cumsum(0)  # of the first 1, 2, ... components
        count = int((variance < self.share * (1 - 1e-12) * variance[-1]).sum()) + 1  # the first that reaches the share
        self.mean, self.components = mean, axes[:count if self.share < 1 else None].clone()
        return self

    def transform(self, features: Tensor) -> Tensor:
        """T (f - mu): (n, ...) -> (n, k), float64."""
        if features.shape[1:] != self.mean.shape:
            raise ValueError(f"fitted to samples of shape {tuple(self.mean.shape)}, got {tuple(features.shape[1:])}")
        return (features.double() - self.mean).flatten(1) @ self.components.T

    def inverse_transform(self, reduced: Tensor) -> Tensor:
        """T^t reduced + mu, the pre-image: (n, k) -> (n, ...)."""
        return (reduced.double() @ self.components).unflatten(1, self.mean.shape) + self.mean


class SingleClassGaussian(PCA):
    """The maximum-likelihood Gaussian of samples (n, ...): all directions that vary, and the deviation along each."""

    def __init__(self):
        super().__init__(share=1.0)
        self.register_buffer("deviation", torch.empty(0, dtype=torch.float64))

    def fit(self, features: Tensor) -> "SingleClassGaussian":
        mean, coordinates, axes = principal_axes(features)
        self.deviation = coordinates.square().mean(0).sqrt()
        return self.keep(mean, coordinates, axes)

    def score_samples(self, features: Tensor) -> Tensor:
        """1909.11786: NLL = 1/2 (|U^t (f - mu) / S|^2 + log det + r log 2 pi): (n, ...) -> (n,).

        det is the covariance's, log det = 2 sum(log S). Null directions (n <= d, repeated samples) are left out (F4).
        """
        mahalanobis = (self.transform(features) / self.deviation).square().sum(1)
        return (mahalanobis + (2 * self.deviation.log() + math.log(2 * math.pi)).sum()) / 2


# --- Backbone ---------------------------------------------------------------------------------------------------------

LAYERS = ("layer1", "layer2", "layer3", "layer4", "avgpool")

# IMAGENET1K_V1, the weights available when the papers appeared; timm 0.5.4's resnet18, of anomalib's published figures,
# is the same. A file of V2 can be given by its path.
URLS = {name: f"https://download.pytorch.org/models/{name}-{digits}.pth" for name, digits in (
    ("resnet18", "f37072fd"), ("resnet50", "0676ba61"), ("wide_resnet50_2", "95faca4d"))}


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """What x passes before it is added to a block's output: a projection if their shapes differ, else nothing."""
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """(N, in, H, W) -> (N, out, H / stride, W / stride) by two 3 x 3 convs, the first with the stride."""

    def __init__(self, in_channels: int, width: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels)
        self.downsample = shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x), inplace=True)


class Bottleneck(nn.Module):
    """(N, in, H, W) -> (N, out, H / stride, W / stride) by convs of 1 x 1, 3 x 3 with the stride, 1 x 1."""

    def __init__(self, in_channels: int, width: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
        self.downsample = shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.downsample(x), inplace=True)


# name: block, blocks per layer, channels of a block's inner convs and of its output (in layer1)
RESNETS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2), 64, 64),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 64, 256),
    "wide_resnet50_2": (Bottleneck, (3, 4, 6, 3), 128, 256),
}


def stage(block: type, count: int, in_channels: int, width: int, out_channels: int, stride: int) -> nn.Sequential:
    """`count` blocks, the first with the stride."""
    first = block(in_channels, width, out_channels, stride)
    return nn.Sequential(first, *(block(out_channels, width, out_channels, 1) for _ in range(count - 1)))


class ResNet(nn.Module):
    """He et al. 2016, up to and with `layer`, under torchvision's state-dict keys.

    (N, 3, H, W) -> (N, C, H / s, W / s) with s = 4, 8, 16, 32 for layer1 to layer4, or (N, C, 1, 1) for avgpool.
    Frozen and always in eval mode, so BatchNorm statistics do not change.
    """

    def __init__(self, name: str = PUBLISHED["backbone"], layer: str = PUBLISHED["layer"]):
        super().__init__()
        if name not in RESNETS or layer not in LAYERS:
            raise ValueError(f"backbone {name!r}, layer {layer!r}: one of {[*RESNETS]} and one of {LAYERS} are needed")
        block, counts, width, out = RESNETS[name]
        self.name, self.layers = name, LAYERS[:LAYERS.index(layer) + 1]
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = stage(block, counts[0], 64, width, out, stride=1)
        self.layer2 = stage(block, counts[1], out, 2 * width, 2 * out, stride=2)
        self.layer3 = stage(block, counts[2], 2 * out, 4 * width, 4 * out, stride=2)
        self.layer4 = stage(block, counts[3], 4 * out, 8 * width, 8 * out, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        for later in LAYERS[len(self.layers):]:
            delattr(self, later)
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(image)), inplace=True)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        for layer in self.layers:
            x = getattr(self, layer)(x)
        return x

    def train(self, mode: bool = True) -> "ResNet":
        return super().train(False)


# --- Model ------------------------------------------------------------------------------------------------------------

class DFMModel(nn.Module):
    """Features of one layer, average pooling, and per class a PCA and, for score_type "nll", a Gaussian.

    pre_trained: True downloads torchvision's weights, a path reads that file, False or "random" keeps random ones.
    pooling: kernel and stride, but after avgpool. share: of the variance, kept by PCA. score_type: "fre" or "nll".

        model = DFMModel("resnet18", pooling=2)
        model.fit(torch.cat([model.features(image) for image in loader]))  # keeps features, not images
        prediction = model.predict(image)  # {"score": (N,), "anomaly_map": (N, H, W)}

    fit and score_features take any features (n, C, h, w) or (n, d). settings: the arguments but pre_trained, saved with
    the weights, as is preprocessing: keywords of this project's common.read_image, {} if unknown.
    """

    def __init__(self, backbone: str = PUBLISHED["backbone"], layer: str = PUBLISHED["layer"],
                 pre_trained: bool | str | Path = True, pooling: int = PUBLISHED["pooling"],
                 share: float = PUBLISHED["share"], score_type: str = PUBLISHED["score"]):
        super().__init__()
        if score_type not in ("fre", "nll") or pooling < 1:
            raise ValueError(f"score_type {score_type!r}, pooling {pooling}: fre or nll, and at least 1, are needed")
        PCA(share)  # rejects a bad share before features are computed
        self.settings = dict(backbone=backbone, layer=layer, pooling=pooling, share=share, score_type=score_type)
        self.preprocessing = {}
        self.layer, self.pooling = layer, pooling
        self.share, self.score_type = share, score_type
        self.backbone = ResNet(backbone, layer)
        if pre_trained not in (False, "random"):
            load_resnet(self.backbone, None if pre_trained is True else pre_trained)
        self.pca, self.gaussian = nn.ModuleList(), nn.ModuleList()  # one per class; no Gaussian for FRE
        self.register_buffer("threshold", torch.tensor(math.nan))
        self.register_buffer("map_top", torch.ones(()))
        self.register_buffer("image_mean", torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def features(self, image: Tensor) -> Tensor:
        """image (N, 3, H, W), RGB in [0, 1] -> pooled features (N, C, h, w), returned in float32."""
        x = self.backbone((image - self.image_mean) / self.image_std).float()
        kernel = 1 if self.layer == "avgpool" else self.pooling
        if kernel > min(x.shape[-2:]):
            raise ValueError(f"pooling {kernel} is larger than the {x.shape[-2]} x {x.shape[-1]} map of {self.layer}")
        return F.avg_pool2d(x, kernel)

    @torch.no_grad()
    def fit(self, features: Tensor, labels: Tensor | None = None) -> "DFMModel":
        """Fit one PCA, and for NLL one Gaussian of the reduced features, per class in labels (n,). None: one class.

        features (n, C, h, w) or (n, d) of normal samples. Every class is also cross-validated, by which are set
        threshold   the 95 % quantile of the held-out scores; from it upward defective. NaN: not known
        map_top     the upper end of the map's colour scale: twice the median of the held-out maps' maxima. Without
                    such maps: the largest |f - mu|^2 at a grid position, as if no component were kept
        """
        features = as_maps(features).to(self.map_top.device)
        labels = torch.zeros(len(features)) if labels is None else torch.as_tensor(labels).flatten().cpu()
        if not len(features) or len(labels) != len(features):
            raise ValueError(f"labels: {len(labels)} for {len(features)} samples; as many are needed, and at least one")
        pca, gaussian = nn.ModuleList(), nn.ModuleList()
        held_out, deviations = [], []
        for label in labels.unique():
            chosen = features[(labels == label).to(features.device)]
            mean, coordinates, axes = principal_axes(chosen)
            pca.append(PCA(self.share).keep(mean, coordinates, axes))
            if self.score_type == "nll":
                gaussian.append(SingleClassGaussian().fit(pca[-1].transform(chosen)))
            held_out.append(self.cross_validate(coordinates, axes, mean.shape))
            deviations.append((chosen - mean).square().sum(1).max())
        self.pca, self.gaussian = pca, gaussian
        scores, maxima = (torch.cat(parts) for parts in zip(*held_out))  # of all classes
        self.threshold = scores.quantile(0.95).float()
        top, largest = 2 * maxima.quantile(0.5), max(deviations)
        self.map_top = torch.where(top > 1e-12 * largest, top, largest).float().clamp(1e-38, 3e38)  # top may be NaN
        return self

    def cross_validate(self, coordinates: Tensor, axes: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Score and largest grid value of each sample, by a model that is fitted to the other four fifths.

        coordinates (n, r) and axes (r, d) of features (n, C, h, w) = (n, *shape) -> scores (n,) and, for FRE, maxima
        (n,). NaN if there are fewer than five samples, or if the other four fifths do not vary.
        Coordinates keep all distances, so PCA is the same in them and a fold's SVD is small. The grid needs d values.
        """
        scores, maxima = coordinates.new_full((2, len(coordinates)), math.nan)
        errors = torch.full_like(coordinates, math.nan)
        # Every fifth sample. Fifths in a row raise fewer false alarms where a product drifts (5 %, not 8 %, on unseen
        # stretches of bottle and pill), but then only a third as many of the pill's defects are found.
        fold = torch.arange(len(coordinates), device=axes.device) % 5
        for number in range(5 if len(coordinates) >= 5 else 0):
            held_out = fold == number
            try:
                pca = PCA(self.share).fit(coordinates[~held_out])
            except ValueError:  # no direction varies
                continue
            reduced = pca.transform(coordinates)  # (n, k)
            if self.score_type == "nll":
                scores[held_out] = SingleClassGaussian().fit(reduced[~held_out]).score_samples(reduced[held_out])
            errors[held_out] = coordinates[held_out] - pca.inverse_transform(reduced[held_out])
        if self.score_type == "fre":
            grid = (errors @ axes).unflatten(1, shape).square().sum(1)  # (n, h, w)
            scores, maxima = errors.norm(dim=1), grid.amax((1, 2))
        return scores, maxima

    def score_features(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """features as in fit -> score (N,) and, for FRE, grid (N, h, w), float64, of the class with the lowest score.

        2012.04250: FRE = |f - pre-image(T (f - mu))|. anomalib uses the squared norm, which ranks alike (F6).
        """
        if not self.pca:
            raise ValueError("the model is not fitted: fit it, or load a fitted one")
        features = as_maps(features)
        if self.score_type == "nll":
            nll = [gaussian.score_samples(pca.transform(features)) for pca, gaussian in zip(self.pca, self.gaussian)]
            return torch.stack(nll).amin(0), None  # of densities whose dimensions may differ from class to class
        grids = torch.stack([(features - pca.inverse_transform(pca.transform(features))).square().sum(1)
                             for pca in self.pca])  # (classes, N, h, w)
        fre = grids.sum((2, 3)).sqrt()  # (classes, N)
        score, best = fre.min(0)
        return score, grids.gather(0, best.view(1, -1, 1, 1).expand_as(grids[:1]))[0]  # (N, h, w)

    @torch.no_grad()
    def predict(self, image: Tensor) -> dict[str, Tensor]:
        """image (N, 3, H, W), RGB in [0, 1] -> score (N,) and, for FRE, anomaly_map (N, H, W), float32.

        The map is the grid (anomalib's) enlarged: squared values. The score is not its maximum but the root of its sum.
        """
        image = check_image(image)
        score, grid = self.score_features(self.features(image))
        prediction = {"score": score.float()}
        if grid is not None:
            prediction["anomaly_map"] = F.interpolate(grid[:, None].float(), image.shape[-2:], mode="bilinear")[:, 0]
        return prediction


def as_maps(features: Tensor) -> Tensor:
    """(n, d) as (n, d, 1, 1), and (n, C, h, w) as it is. ValueError for other shapes."""
    if features.ndim not in (2, 4):
        raise ValueError(f"features of shape (n, C, h, w) or (n, d) are needed, got {tuple(features.shape)}")
    return features if features.ndim == 4 else features[:, :, None, None]


def check_image(image: Tensor) -> Tensor:
    """The image in float32. ValueError unless it is (N, 3, H, W) in [0, 1]."""
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return image.float()  # a graph cannot depend on values
    if not image.is_floating_point() or image.ndim != 4 or image.shape[1] != 3 or not len(image):
        raise ValueError("image: RGB floats in [0, 1] of shape (N, 3, H, W) are needed (divide 8-bit values by 255), "
                         f"found {image.dtype} of shape {tuple(image.shape)}")
    low, high = (value.item() for value in image.float().aminmax())
    if not -1e-3 <= low <= high <= 1.001:
        raise ValueError(f"image: values in [0, 1], before ImageNet's mean and std, needed, found {low:g} to {high:g}")
    return image.float()


# --- Weights ----------------------------------------------------------------------------------------------------------

# Copied from draem.read_weights
def read_weights(path: str | Path) -> dict:
    """The content of a file of torch.save: tensors and plain values. No code in it is run. ValueError, one line."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; check the path") from None
    except Exception:  # a damaged file fails in many ways
        raise ValueError(f"{path}: truncated, no file of torch.save, or one that holds code; give a last.pt, a state "
                         "dict, or the .ckpt of anomalib 2") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path}: a dict of tensors by name is needed, found {type(content).__name__}")
    return content


# Copied from draem.own_checkpoint
def own_checkpoint(content: dict, method: str, path: str | Path) -> list[dict]:
    """Weights, settings and preprocessing of this project's checkpoint. ValueError if it is another method's."""
    if content["method"] != method:
        raise ValueError(f"{path}: a checkpoint of {content['method']}, not of {method}")
    return [content.get(name, {}) for name in ("model", "settings", "preprocessing")]


def build(make, state: dict, kind: str, path: str | Path) -> nn.Module:
    """make(), in words a `kind`, with the weights `state`. ValueError, one line, unless they fit and are finite."""
    try:
        model = make()
        model.load_state_dict(state)
    except Exception as error:  # unknown settings, other keys or shapes, values that are no tensors
        raise ValueError(f"{path}: does not fit {kind}: {' '.join(str(error).split())[:220]}") from None
    if not all(value.isfinite().all() for key, value in model.state_dict().items() if key != "threshold"):
        raise ValueError(f"{path}: holds NaN or infinity")
    return model


def load_resnet(model: ResNet, path: str | Path | None = None) -> ResNet:
    """Load torchvision's state dict into the model from a file, torch.hub's cache, or a download checked by its hash.

    It may be under "state_dict", with "module." or "backbone." before each key. Later layers are not read, and
    num_batches_tracked may be missing. ValueError, one line, on failure.
    """
    if path is None:
        path = URLS[model.name]
        try:
            state = torch.hub.load_state_dict_from_url(path, map_location="cpu", check_hash=True, weights_only=True)
        except Exception as error:  # no network, no such page, a wrong hash, a damaged file in the cache
            raise ValueError(f"{path}: download failed ({' '.join(str(error).split())}); fetch it elsewhere and "
                             "give --weights FILE, or, for a trial alone, --weights random") from None
    else:
        content = read_weights(path)
        state = content["state_dict"] if isinstance(content.get("state_dict"), dict) else content
    state = {str(key).removeprefix("module.").removeprefix("backbone."): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith(("fc.", *LAYERS[len(model.layers):]))}
    counters = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    return build(lambda: model, counters | state, f"--backbone {model.name} up to {model.layers[-1]}", path)


def load(path: str | Path) -> DFMModel:
    """A fitted model from this project's last.pt. ValueError, one line, on failure."""
    content = read_weights(path)
    if "method" not in content:
        raise ValueError(f"{path}: no last.pt of this project; it begins with {', '.join([*content][:3])}")
    state, settings, preprocessing = own_checkpoint(content, "dfm", path)

    def make() -> DFMModel:
        model = DFMModel(**settings, pre_trained=False)
        while f"pca.{len(model.pca)}.mean" in state:
            model.pca.append(PCA(model.share))
        while f"gaussian.{len(model.gaussian)}.mean" in state:
            model.gaussian.append(SingleClassGaussian())
        for name, buffer in (*model.pca.named_buffers("pca"), *model.gaussian.named_buffers("gaussian")):
            buffer.resize_(state[name].shape)  # as fitted
        model.preprocessing = preprocessing
        return model

    return build(make, state, "DFM", path).eval()


if __name__ == "__main__":  # python dfm.py: the shape of every block's output
    network = DFMModel(pre_trained=False)
    for path, block in network.named_modules():
        if path.count(".") == 2:
            block.register_forward_hook(lambda _, __, output, path=path: print(f"{path:24} {tuple(output.shape)}"))
    pooled = network.features(torch.rand(8, 3, PUBLISHED["size"], PUBLISHED["size"]))
    print(f"pooled features {tuple(pooled.shape)}, components {tuple(network.fit(pooled).pca[0].components.shape)}")
