"""DFM: deep features of a pretrained network, modelled by PCA and a Gaussian. Torch and the standard library only.

Papers
    Ahuja, Ndiour, Kalyanpur, Tickoo: Probabilistic Modeling of Deep Features for Out-of-Distribution and Adversarial
    Detection, 2019, arXiv 1909.11786: a density per class on reduced features; score: negative log-likelihood ("nll").
    Ndiour, Ahuja, Tickoo: Out-Of-Distribution Detection With Subspace Techniques And Probabilistic Modeling Of
    Features, 2020, arXiv 2012.04250: the score is the feature reconstruction error ("fre").
    The authors released no code. The defaults and the map are anomalib's (2.7.0).

Here
    principal_axes                          centred SVD in float64, shared by the two below
    PCA, SingleClassGaussian                fit on rows of any features; no network needed
    ResNet                                  resnet18, resnet50, wide_resnet50_2 under torchvision's keys
    DFMModel                                image -> features -> PCA -> FRE and map, or NLL; one PCA per class
    load_resnet, load                       torchvision's weights; a fitted model of this project or of anomalib

Notation (n samples; d = C * h * w values each; k directions kept)
    f       features            (n, C, h, w)    pooled features of a layer, or any (n, d)
    mu      mean                (C, h, w)       their mean over the samples
    T       components          (k, d)          orthonormal rows; T (f - mu) reduces, T^t (.) + mu is the pre-image
    s       singular_values     (k,)            of the centred features
    S       deviation           (k,)            s / sqrt(n): standard deviation along each direction
    U^t     components          (k, d)          likewise, of a Gaussian: all directions that vary
    C       -                   (d, d)          covariance = U S^2 U^t, never built
    -       grid                (n, h, w)       squared feature error summed over channels
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PUBLISHED = {
    "size": 256,             # side of the square images, in pixels (anomalib)
    "backbone": "resnet50",  # anomalib
    "layer": "layer3",       # that yields the features (anomalib)
    "pooling": 4,            # kernel and stride of the average pooling (anomalib)
    "share": 0.97,           # of the variance that PCA keeps (anomalib)
    "score": "fre",          # feature reconstruction error (2012.04250); "nll": negative log-likelihood (1909.11786)
}

# ---------------------------------------------------------------------------------------------------------------------
# PCA and Gaussian


def principal_axes(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """features - mean = left diag(singular_values) axes, in float64, without the null directions.

    features (n, ...) -> mean (...), descending singular values (r,), orthonormal axes (r, d). ValueError if r is 0.

    QR of the longer side, then SVD of the small square factor: as accurate as a direct SVD, and faster.
    A Gram matrix would square the condition number.
    A direction is null if its singular value is at most eps * max(n, d) * |features|, the rounding error of the data.
    """
    rows = features.double().flatten(1)  # (n, d)
    if not rows.isfinite().all():
        raise ValueError(f"{(~rows.isfinite().all(1)).sum()} of {len(rows)} samples hold NaN or infinity")
    n, d = rows.shape
    mean = rows.mean(0)
    centred = rows - mean
    if n < d:
        basis, factor = torch.linalg.qr(centred.T)  # (d, n), (n, n)
        _, singular_values, axes = torch.linalg.svd(factor.T)
        axes = axes @ basis.T
    else:
        _, singular_values, axes = torch.linalg.svd(torch.linalg.qr(centred, mode="r").R)
    kept = singular_values > torch.finfo(torch.float64).eps * max(n, d) * rows.norm()
    if not kept.any():
        raise ValueError(f"no direction varies over {n} sample{'s' * (n != 1)}: at least two different ones are needed")
    return mean.reshape(features.shape[1:]), singular_values[kept], axes[kept]


class _Subspace(nn.Module):
    """A mean and orthonormal directions. fit or a loaded state dict sets the sizes of these buffers."""

    def __init__(self, *names: str):
        super().__init__()
        for name in ("mean", "components", *names):
            self.register_buffer(name, torch.empty(0, dtype=torch.float64))

    def transform(self, features: Tensor) -> Tensor:
        """T (f - mu): (n, ...) -> (n, k), float64."""
        if features.shape[1:] != self.mean.shape:
            raise ValueError(f"{type(self).__name__} was fitted to samples of shape {tuple(self.mean.shape)}, "
                             f"got {tuple(features.shape[1:])}")
        return (features.double() - self.mean).flatten(1) @ self.components.T

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name, buffer in self.named_buffers():
            if prefix + name in state_dict:
                setattr(self, name, buffer.new_empty(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


class PCA(_Subspace):
    """Principal components of samples (n, ...), float64.

    n_components: a float in (0, 1] keeps the smallest number of components whose variance reaches that share of the
    total, within a rounding of 1e-12. 1.0 keeps every direction that varies. An int keeps that many components; fit
    raises ValueError if fewer directions vary.
    """

    def __init__(self, n_components: float | int = PUBLISHED["share"]):
        super().__init__()
        if not (n_components >= 1 if isinstance(n_components, int) else 0 < n_components <= 1):
            raise ValueError(f"n_components: a share in (0, 1] or a count from 1 on, got {n_components}")
        self.n_components = n_components

    def fit(self, features: Tensor) -> "PCA":
        mean, singular_values, axes = principal_axes(features)
        if isinstance(self.n_components, int):
            count = self.n_components
            if count > len(axes):
                raise ValueError(f"{count} components asked for, {len(features)} samples vary along {len(axes)} only")
        elif self.n_components == 1:
            count = len(axes)
        else:
            variance = singular_values.square().cumsum(0)  # of the first 1, 2, ... components
            count = 1 + int((variance < self.n_components * (1 - 1e-12) * variance[-1]).sum())
        self.mean, self.components = mean, axes[:count].clone()
        return self

    def inverse_transform(self, reduced: Tensor) -> Tensor:
        """T^t reduced + mu, the pre-image: (n, k) -> (n, ...)."""
        return (reduced.double() @ self.components).unflatten(1, self.mean.shape) + self.mean


class SingleClassGaussian(_Subspace):
    """The maximum-likelihood Gaussian of samples (n, ...), by SVD of the centred data, float64."""

    def __init__(self):
        super().__init__("deviation")

    def fit(self, features: Tensor) -> "SingleClassGaussian":
        self.mean, singular_values, self.components = principal_axes(features)
        self.deviation = singular_values / math.sqrt(len(features))
        return self

    def score_samples(self, features: Tensor) -> Tensor:
        """1909.11786: NLL = 1/2 (|U^t (f - mu) / S|^2 + log det C + d log 2 pi), log det C = 2 sum(log S).

        (n, ...) -> (n,). d counts the directions that vary. Null directions (n <= d, repeated samples) are left out.
        """
        mahalanobis = (self.transform(features) / self.deviation).square().sum(1)
        log_det = 2 * self.deviation.log().sum()
        return (mahalanobis + log_det + len(self.deviation) * math.log(2 * math.pi)) / 2


# ---------------------------------------------------------------------------------------------------------------------
# Backbone

LAYERS = ("layer1", "layer2", "layer3", "layer4", "avgpool")

# name: kernels of a block, blocks per layer, channels of a block's inner convs and of its output (in layer1)
RESNETS = {
    "resnet18": ((3, 3), (2, 2, 2, 2), 64, 64),
    "resnet50": ((1, 3, 1), (3, 4, 6, 3), 64, 256),
    "wide_resnet50_2": ((1, 3, 1), (3, 4, 6, 3), 128, 256),
}

# IMAGENET1K_V1, the weights available when the papers appeared. A file of V2 can be given by its path.
URLS = {
    "resnet18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    "wide_resnet50_2": "https://download.pytorch.org/models/wide_resnet50_2-95faca4d.pth",
}


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)


class ResidualBlock(nn.Module):
    """Basic block, kernels (3, 3), or bottleneck, kernels (1, 3, 1). The first 3 x 3 conv has the stride."""

    def __init__(self, in_channels: int, width: int, out_channels: int, kernels: tuple[int, ...], stride: int):
        super().__init__()
        channels = [in_channels] + [width] * (len(kernels) - 1) + [out_channels]
        for i, kernel in enumerate(kernels):
            strides = stride if i == kernels.index(3) else 1
            self.add_module(f"conv{i + 1}", conv(channels[i], channels[i + 1], kernel, strides))
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(channels[i + 1]))
        self.depth = len(kernels)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            if i < self.depth:
                y = F.relu(y, inplace=True)
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class ResNet(nn.Module):
    """He et al. 2016, with all state-dict keys of torchvision. forward stops after `layer`.

    name: a key of RESNETS; layer: one of LAYERS. (N, 3, H, W) -> (N, C, H/s, W/s) with s = 4, 8, 16, 32, or
    (N, C, 1, 1) for avgpool. Frozen and always in eval mode, so BatchNorm statistics do not change.
    """

    def __init__(self, name: str = PUBLISHED["backbone"], layer: str = PUBLISHED["layer"]):
        super().__init__()
        if name not in RESNETS:
            raise ValueError(f"backbone {name!r}: one of {', '.join(RESNETS)} is needed")
        if layer not in LAYERS:
            raise ValueError(f"layer {layer!r}: one of {', '.join(LAYERS)} is needed")
        kernels, blocks, width, out_channels = RESNETS[name]
        self.name, self.layers = name, LAYERS[:LAYERS.index(layer) + 1]
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        in_channels = 64
        for i, count in enumerate(blocks):
            stage = nn.Sequential()
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(ResidualBlock(in_channels, width << i, out_channels << i, kernels, stride))
                in_channels = out_channels << i
            self.add_module(LAYERS[i], stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(in_channels, 1000)  # not computed; here for the keys
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(image)), inplace=True)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        for layer in self.layers:
            x = getattr(self, layer)(x)
        return x

    def train(self, mode: bool = True) -> "ResNet":
        return super().train(False)

    def trim(self) -> "ResNet":
        """Remove the layers that forward does not compute."""
        for name in set(dict(self.named_children())) - {"conv1", "bn1", *self.layers}:
            delattr(self, name)
        return self


# ---------------------------------------------------------------------------------------------------------------------
# Model

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DFMModel(nn.Module):
    """Features of one layer, average pooling, and per class a PCA and, for score_type "nll", a Gaussian.

    pre_trained: True downloads torchvision's weights, a path reads that file, False or "random" keeps random ones.
    pooling_kernel_size: kernel and stride of the average pooling; not used after avgpool, whose map is 1 x 1.
    n_comps: PCA's share of variance, or number of components. score_type: "fre" or "nll".

        model = DFMModel("resnet18", pooling_kernel_size=2)
        model.fit(torch.cat([model.features(image) for image in loader]))  # keeps features, not images
        prediction = model.predict(image)  # {"score": (N,), "anomaly_map": (N, H, W)}

    `fit` and `score_features` take any features (n, C, h, w) or (n, d); they do not use the backbone. `settings` holds
    the arguments, to be saved with the weights. `reading` holds the arguments of this project's
    common.read_image for the fitted images; {} if unknown.
    """

    def __init__(self, backbone: str = PUBLISHED["backbone"], layer: str = PUBLISHED["layer"],
                 pre_trained: bool | str | Path = True, pooling_kernel_size: int = PUBLISHED["pooling"],
                 n_comps: float | int = PUBLISHED["share"], score_type: str = PUBLISHED["score"]):
        super().__init__()
        if score_type not in ("fre", "nll"):
            raise ValueError(f"score_type {score_type!r}: fre or nll is needed")
        if pooling_kernel_size < 1:
            raise ValueError(f"pooling_kernel_size {pooling_kernel_size}: at least 1 is needed")
        PCA(n_comps)  # rejects a bad n_comps before features are computed
        self.reading = {}
        self.settings = dict(backbone=backbone, layer=layer, pooling_kernel_size=pooling_kernel_size,
                             n_comps=n_comps, score_type=score_type)
        self.layer, self.pooling_kernel_size = layer, pooling_kernel_size
        self.n_comps, self.score_type = n_comps, score_type
        self.backbone = ResNet(backbone, layer)
        if pre_trained not in (False, "random"):
            load_resnet(self.backbone, None if pre_trained is True else pre_trained)
        self.backbone.trim()
        self.pca, self.gaussian = nn.ModuleList(), nn.ModuleList()  # one per class; no Gaussian for FRE
        self.register_buffer("map_scale", torch.ones(()))
        self.register_buffer("image_mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def features(self, image: Tensor) -> Tensor:
        """image (N, 3, H, W), RGB in [0, 1] -> pooled features (N, C, h, w), returned in float32."""
        x = self.backbone((image - self.image_mean) / self.image_std).float()
        if self.layer == "avgpool":
            return x
        if self.pooling_kernel_size > min(x.shape[-2:]):
            raise ValueError(f"pooling_kernel_size {self.pooling_kernel_size} is larger than the {x.shape[-2]} x "
                             f"{x.shape[-1]} map of {self.layer} for an image of {image.shape[-2]} x {image.shape[-1]}")
        return F.avg_pool2d(x, self.pooling_kernel_size)

    @torch.no_grad()
    def fit(self, features: Tensor, labels: Tensor | None = None) -> "DFMModel":
        """Fit one PCA, and for NLL one Gaussian of the reduced features, per class in labels (n,). None: one class.

        features (n, C, h, w) or (n, d) of normal samples. Sets map_scale, the upper end of a map's colour scale: the
        largest |f - mu|^2 at a grid position over these samples, as if no component were kept.
        """
        features = _as_maps(features).to(self.map_scale.device)
        labels = torch.zeros(len(features)) if labels is None else torch.as_tensor(labels).flatten().cpu()
        if not len(features):
            raise ValueError("no samples to fit to")
        if len(labels) != len(features):
            raise ValueError(f"labels: {len(labels)} for {len(features)} samples")
        pca, gaussian, scale = nn.ModuleList(), nn.ModuleList(), []
        for label in labels.unique():
            chosen = features[(labels == label).to(features.device)]
            pca.append(PCA(self.n_comps).fit(chosen))
            if self.score_type == "nll":
                gaussian.append(SingleClassGaussian().fit(pca[-1].transform(chosen)))
            scale.append((chosen - pca[-1].mean).square().sum(1).max())
        self.pca, self.gaussian, self.map_scale = pca, gaussian, torch.stack(scale).max().float()
        return self

    def score_features(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """features as in fit -> score (N,) and, for FRE, grid (N, h, w), float64, of the class with the lowest score.

        2012.04250: FRE = |f - pre-image(T (f - mu))|. anomalib uses the squared norm, which gives the same ranking.
        score = sqrt(sum of grid).
        """
        if not self.pca:
            raise ValueError("the model is not fitted: fit it, or load a fitted one")
        features = _as_maps(features)
        if self.score_type == "nll":
            scores = [g.score_samples(p.transform(features)) for p, g in zip(self.pca, self.gaussian)]
            return torch.stack(scores).amin(0), None
        grids = torch.stack([(features - p.inverse_transform(p.transform(features))).square().sum(1)
                             for p in self.pca])  # (classes, N, h, w)
        squared, best = grids.sum((2, 3)).min(0)  # (N,), (N,)
        return squared.sqrt(), grids.gather(0, best.view(1, -1, 1, 1).expand_as(grids[:1]))[0]

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """image (N, 3, H, W), RGB in [0, 1] -> score and grid, as in score_features."""
        return self.score_features(self.features(image))

    @torch.no_grad()
    def predict(self, image: Tensor) -> dict[str, Tensor]:
        """image (N, 3, H, W), RGB in [0, 1] -> score (N,) and, for FRE, anomaly_map (N, H, W), float32.

        ValueError for any other image.
        """
        image = check_image(image)
        score, grid = self(image)
        if grid is None:
            return {"score": score.float()}
        anomaly_map = F.interpolate(grid[:, None].float(), image.shape[-2:], mode="bilinear")[:, 0]
        return {"score": score.float(), "anomaly_map": anomaly_map}

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name, part in (("pca", lambda: PCA(self.n_comps)), ("gaussian", SingleClassGaussian)):
            classes = sum(key.startswith(f"{prefix}{name}.") and key.endswith(".mean") for key in state_dict)
            setattr(self, name, nn.ModuleList(part() for _ in range(classes)).to(self.map_scale.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _as_maps(features: Tensor) -> Tensor:
    if features.ndim not in (2, 4):
        raise ValueError(f"features of shape (n, C, h, w) or (n, d) are needed, got {tuple(features.shape)}")
    return features if features.ndim == 4 else features[:, :, None, None]


def check_image(image: Tensor) -> Tensor:
    """The image in float32. ValueError unless it is (N, 3, H, W) in [0, 1]."""
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return image.float()  # a graph cannot depend on values
    if not image.is_floating_point():
        raise ValueError(f"image: floats in [0, 1] are needed, found {image.dtype}; divide 8-bit values by 255")
    if image.ndim != 4 or image.shape[1] != 3 or not len(image):
        raise ValueError(f"image: RGB of shape (N, 3, H, W) is needed, found {tuple(image.shape)}")
    low, high = (value.item() for value in image.float().aminmax())
    if not -1e-3 <= low <= high <= 1.001:
        raise ValueError(f"image: values in [0, 1] are needed, found {low:g} to {high:g}; the model itself applies "
                         "ImageNet's mean and standard deviation")
    return image.float()


# ---------------------------------------------------------------------------------------------------------------------
# Weights


# Copied from draem.Inert
class Inert:
    """Stands in for a class that a pickle names. It takes any arguments and does nothing."""

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, _):
        pass


# Copied from draem.read_weights
def read_weights(path: str | Path) -> dict:
    """Read a file of torch.save: tensors and plain values only. No code in it is run. One-line ValueError on failure.

    anomalib 1.x names torchvision's transforms beside the tensors. Inert replaces them.
    """
    path = str(path)
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            if "GLOBAL " not in str(error):  # the pickle names no class or function: the file is damaged
                raise
            named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if any(name.startswith("anomalib.") for name in named):
                raise ValueError(f"{path}: an export of anomalib, which holds code; give the .ckpt of its training")
            if not all(name.startswith("torchvision.transforms.") for name in named):
                raise ValueError(f"{path}: holds more than tensors and could run code; save its state dict alone")
            with torch.serialization.safe_globals([(Inert, name) for name in named]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # a damaged file fails in many ways
        own = isinstance(error, ValueError) and str(error).startswith(path)
        raise ValueError(str(error) if own else f"{path}: truncated, or not a file of weights") from None
    for state in (content, content.get("state_dict", {})) if isinstance(content, dict) else (content,):
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise ValueError(f"{path}: a dict of tensors by name is needed, found {type(state).__name__}")
    return content


# Copied from draem.build
def build(kind, settings: dict, state: dict, path: str | Path) -> nn.Module:
    """kind(**settings) with the weights `state`. Raises a one-line ValueError if they do not fit or are not finite."""
    try:
        model = kind(**settings)
        model.load_state_dict(state)
    except Exception as error:  # unknown settings, other keys or shapes, values that are no tensors
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: does not fit {kind.__name__}: {reason[:300]}") from None
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise ValueError(f"{path}: holds NaN or infinity; the training that wrote it diverged")
    return model


# Copied from draem.own_parts
def own_parts(content: dict, method: str, path: str | Path) -> list[dict]:
    """Weights, settings and reading of this project's checkpoint. ValueError if it is another method's."""
    if content.get("method") != method:
        raise ValueError(f"{path}: a checkpoint of {content.get('method')}, not of {method}")
    parts = [content.get(name) for name in ("model", "settings", "reading")]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{path}: lacks the model, settings or reading of a checkpoint of {method}")
    return parts


# Copied from draem.anomalib_reading
def anomalib_reading(content: dict, path: str | Path) -> dict:
    """Size and antialiasing of the Resize that an anomalib checkpoint holds; 256, antialiased, if it holds none."""
    try:
        transform = content["anomalib_pre_processor_config"]["transform"]
        steps = transform["init_args"].get("transforms", [transform])
        resize = next(step["init_args"] for step in steps if step["class_path"].endswith(".Resize"))
        sides = {resize["size"]} if isinstance(resize["size"], int) else set(resize["size"])
        antialias = bool(resize.get("antialias", True))
    except (AttributeError, KeyError, StopIteration, TypeError):
        sides, antialias = {256}, True
    if len(sides) != 1:
        raise ValueError(f"{path}: was trained on images of {resize['size']}; only square ones are read")
    return {"size": sides.pop(), "antialias": antialias}


def load_resnet(model: ResNet, path: str | Path | None = None) -> ResNet:
    """Load torchvision's state dict into the model from a file, torch.hub's cache, or a download checked by its hash.

    A file may hold the state dict under "state_dict", and keys may begin with "module." or "backbone.". The model is
    trimmed. Entries of later layers and num_batches_tracked may be missing. Raises a one-line ValueError on failure.
    """
    if path is None:
        path = URLS[model.name]
        try:
            state = torch.hub.load_state_dict_from_url(path, map_location="cpu", check_hash=True, weights_only=True)
        except Exception as error:  # no network, no such page, a wrong hash, a damaged file in the cache
            raise ValueError(f"{path}: download failed ({' '.join(str(error).split())}); three ways on: a file "
                             "(--weights FILE), internet, or, for a trial alone, --weights random") from None
    else:
        content = read_weights(path)
        state = {key.removeprefix("module.").removeprefix("backbone."): value
                 for key, value in content.get("state_dict", content).items()}
    own = model.trim().state_dict()
    later = {*LAYERS, "fc"} - {*model.layers}
    state = {key: value for key, value in state.items() if key.split(".")[0] not in later}
    state = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")} | state
    wrong = [key for key, value in own.items() if getattr(state.get(key), "shape", None) != value.shape]
    if wrong:
        raise ValueError(f"{path}: not weights of {model.name}: {wrong[0]} is missing or has another shape; give the "
                         "network that the file is of (--backbone), or another file (--weights)")

    def resnet() -> ResNet:  # build's errors show this name
        return model

    return build(resnet, {}, state, path)


def anomalib_parts(content: dict, path: str | Path) -> tuple[dict, dict]:
    """State and settings of an anomalib Dfm checkpoint, whose singular vectors are the components, transposed."""
    given, state = content.get("hyper_parameters") or {}, content["state_dict"]
    mean, vectors = state.get("model.pca_model.mean"), state.get("model.pca_model.singular_vectors")
    if (given.get("backbone") not in RESNETS or given.get("layer") not in LAYERS[:4] or given.get("score_type") != "fre"
            or mean is None or vectors is None or vectors.ndim != 2 or len(vectors) != len(mean)):
        raise ValueError(f"{path}: an anomalib checkpoint, but not of a fitted Dfm with score_type fre, backbone "
                         f"{' or '.join(RESNETS)}, and a whole layer")
    settings = {"backbone": given["backbone"], "layer": given["layer"],
                "n_comps": given.get("pca_level", PUBLISHED["share"]),
                "pooling_kernel_size": given.get("pooling_kernel_size", PUBLISHED["pooling"]), "score_type": "fre"}
    prefix = "model.feature_extractor.feature_extractor."
    network = {key.replace(prefix, "backbone."): value for key, value in state.items() if key.startswith(prefix)}
    *_, width = RESNETS[settings["backbone"]]
    channels = width << LAYERS.index(settings["layer"])
    side = math.isqrt(len(mean) // channels)  # of the pooled map
    if channels * side ** 2 != len(mean):
        raise ValueError(f"{path}: {len(mean)} values are no square map of {channels} channels; images must be square")
    shown = state.get("post_processor.pixel_max", torch.tensor(math.nan))  # the largest value in anomalib's maps
    return network | {"pca.0.mean": mean.double().reshape(channels, side, side),
                      "pca.0.components": vectors.double().T,
                      "map_scale": shown if shown.isfinite() and shown > 0 else torch.ones(())}, settings


def load(path: str | Path) -> DFMModel:
    """A fitted model from this project's last.pt or anomalib's Dfm checkpoint. One-line ValueError on failure."""
    content = read_weights(path)
    if "settings" in content:
        state, settings, reading = own_parts(content, "dfm", path)
    elif "state_dict" in content:
        state, settings = anomalib_parts(content, path)
        reading = anomalib_reading(content, path)
    else:
        raise ValueError(f"{path}: neither this project's checkpoint nor anomalib's; it begins with "
                         + ", ".join(map(str, list(content)[:3])))
    model = build(DFMModel, settings | {"pre_trained": False}, state, path)
    model.reading = reading
    return model.eval()
