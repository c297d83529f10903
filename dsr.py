"""DSR: a dual subspace re-projection network for surface anomaly detection.

Paper: Zavrtanik, Kristan, Skočaj, ECCV 2022, arXiv 2208.01521. Authors' code: VitjanZ/DSR_anomaly_detection @ 672bfb8,
"the code" below. It lacks stage 1, which follows the paper here.

An image is written in the codes of two codebooks, a coarse and a fine one, learned from all sorts of images. Anomalies
are simulated by swapping codes for others; some networks learn to put the product's own codes back, another compares
the images that are drawn from both. Training has three stages: 1, the codebooks and their general decoder, on any
images; 2, everything that detects, on one product's faultless images; 3, a module that sharpens the mask. This file
holds, in order: simulated anomalies, losses, the discrete latent model, the modules trained for each product, the
model, and readers for released weights. It needs torch alone.

    paper       here                      shape                   range
    I           image                     (N, 3, H, W)            [0, 1], RGB; H and W multiples of 32, at least 64
    K_lo, K_hi  vq_vae_top, vq_vae_bot    (K, D)                  codebooks of K = num_embeddings, D = embedding_dim
    F_lo, F_hi  features                  as Q_lo, Q_hi           before quantization
    Q_lo        lo                        (N, D, H / 8, W / 8)    rows of K_lo
    Q_hi        hi                        (N, D, H / 4, W / 4)    rows of K_hi
    F~_lo, hi   restricted_lo, _hi        as lo, hi               put back to normal, before quantization
    lambda_s    strength                  (N,)                    share of the codebook that replacements come from
    M           mask                      (N, 1, H, W)            1 = anomalous, 0 = normal, throughout
    I_gen       general                   (N, 3, H, W)            drawn by the general appearance decoder
    I_spc       specific                  (N, 3, H, W)            drawn by the object-specific decoder
    M_o         coarse                    (N, H, W)               [0, 1], the softmax of logits (N, 2, H, W)
    -           anomaly_map               (N, H, W)               [0, 1], likewise, after the upsampling module
    eta         score                     (N,)                    [0, 1]
"""
import io
import math
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------------------
# Simulated anomalies. Everything random comes from `generator`, on whose device all of it is computed.


# Copied from draem.uniform
def uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


# Copied from draem.gradient_noise
def gradient_noise(y: Tensor, x: Tensor, angles: Tensor) -> Tensor:
    """Perlin noise (N, H, W) at lattice coordinates y, x (N, H, W), for gradients at `angles` (N, R, C), in radians.

    The code's perlin.py: the four corners' products gradient * offset, blended by fade(t) = 6 t^5 - 15 t^4 + 10 t^3,
    times sqrt(2). Coordinates lie in [0, R - 1) and [0, C - 1).
    """
    count, rows, columns = angles.shape
    gradients = torch.stack((angles.cos(), angles.sin()), -1).view(-1, 2)
    row, column = y.floor(), x.floor()
    y, x = y - row, x - column
    first = torch.arange(0, count * rows * columns, rows * columns, device=angles.device).view(-1, 1, 1)
    corner = first + (row * columns + column).long()

    def product(down: int, right: int) -> Tensor:
        gradient = F.embedding(corner + down * columns + right, gradients)  # (N, H, W, 2)
        return gradient[..., 0] * (y - down) + gradient[..., 1] * (x - right)

    fade_y, fade_x = (t * t * t * (t * (t * 6 - 15) + 10) for t in (y, x))
    top = torch.lerp(product(0, 0), product(0, 1), fade_x)
    bottom = torch.lerp(product(1, 0), product(1, 1), fade_x)
    return math.sqrt(2) * torch.lerp(top, bottom, fade_y)


# Copied from draem.perlin_noise
def perlin_noise(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """`count` independent noise images (count, height, width), of any size.

    As in the code (data_loader.py): a lattice of 2^0 to 2^5 cells a side, each side drawn alone, turned by up to 90
    degrees about the centre; what the turn brings in from outside is 0. The code turns the finished picture; to turn
    the coordinates instead costs less and blurs nothing.
    """
    device = generator.device
    cells = 2.0 ** torch.randint(0, 6, (2, count, 1, 1), generator=generator, device=device)
    angles = uniform(generator, 0, 2 * math.pi, count, 33, 33)  # enough for the finest lattice
    angle = uniform(generator, -math.pi / 2, math.pi / 2, count, 1, 1)
    y = torch.arange(height, device=device).view(1, -1, 1) - (height - 1) / 2
    x = torch.arange(width, device=device).view(1, 1, -1) - (width - 1) / 2
    y, x = angle.cos() * y - angle.sin() * x + (height - 1) / 2, angle.sin() * y + angle.cos() * x + (width - 1) / 2
    inside = (y >= 0) & (y <= height - 1) & (x >= 0) & (x <= width - 1)
    y, x = y.clamp(0, height - 1) * cells[0] / height, x.clamp(0, width - 1) * cells[1] / width
    return gradient_noise(y, x, angles) * inside


# Copied from draem.change
def change(chosen: Tensor, function, image: Tensor, *arguments: Tensor) -> Tensor:
    """function(image, *arguments) for the chosen samples (N,), the others as they are; all arguments are per sample."""
    if image.is_cuda:  # picking the samples would make the host wait for the device: compute all of them
        return torch.where(chosen.view(-1, 1, 1, 1), function(image, *arguments), image)
    index = chosen.nonzero().squeeze(1)
    if not len(index):
        return image
    return image.index_copy(0, index, function(image[index], *(a[index] for a in arguments)))


# Copied from draem.rotate
def rotate(image: Tensor, degrees: Tensor) -> Tensor:
    """Turn each sample about its centre by its own angle (N,): bilinear, black where nothing was."""
    height, width = image.shape[2:]
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    zero = torch.zeros_like(cos)
    matrix = torch.stack((cos, -sin * height / width, zero, sin * width / height, cos, zero), 1).view(-1, 2, 3)
    return F.grid_sample(image, F.affine_grid(matrix, list(image.shape), align_corners=False), align_corners=False)


# Copied from draem.rotate_normals
def rotate_normals(image: Tensor, generator: torch.Generator, degrees: float = 45, share: float = 0.3) -> Tensor:
    """Turn a share of the normal images by up to +-degrees: DRAEM's angle (its code has 90), and its code's share."""
    chosen = uniform(generator, 0, 1, len(image)) < share
    return change(chosen, rotate, image, uniform(generator, -degrees, degrees, len(image)))


def perlin_mask(count: int, height: int, width: int, generator: torch.Generator, normal_share: float) -> Tensor:
    """Masks (count, 1, height, width): noise > 0.5, empty for `normal_share` of the samples, as in DRAEM."""
    anomalous = uniform(generator, 0, 1, count, 1, 1) >= normal_share
    return ((perlin_noise(count, height, width, generator) > 0.5) & anomalous)[:, None].float()


@torch.no_grad()
def rank_codes(codes: Tensor) -> Tensor:
    """Row k of (K, K): all codes (K, D) by their distance to code k, the nearest (k itself) first.

    Once for a trained codebook: 4096 codes take about a second on a CPU core, and 64 MiB.
    """
    codes = codes - codes.mean(0)  # for exactness, as in VectorQuantizer.nearest
    norms = codes.square().sum(1)
    return torch.cat([torch.addmm(norms, rows, codes.t(), alpha=-2).sort(dim=1, stable=True)[1].int()
                      for rows in codes.split(512)])


@torch.no_grad()
def sample_codebook_anomalies(index: Tensor, ranked: Tensor, mask: Tensor, strength: Tensor,
                              generator: torch.Generator) -> Tensor:
    """Swap the codes `index` (N, h, w) under mask (N, 1, h, w) for others of the codebook, whose K codes are sorted by
    distance: the nearest 5 % (204 of 4096) are skipped, those from there to strength (N,) * K are equally likely.

    `ranked` is rank_codes(codebook), distances being those between codes. So a swap is a look-up in a table: it costs
    next to nothing wherever the mask is, and as no shape depends on the mask, the host need not wait for the device.
    """
    count = len(ranked)
    first = int(0.05 * count)
    candidates = (strength * count).floor().clamp(first + 1, count) - first  # one at least
    draw = uniform(generator, 0, 1, *index.shape) * candidates.view(-1, 1, 1)
    rank = first + torch.minimum(draw.floor(), candidates.view(-1, 1, 1) - 1).long()
    return torch.where(mask[:, 0] > 0, ranked[index, rank].long(), index)


@torch.no_grad()
def synthesize_smudges(image: Tensor, generator: torch.Generator, beta: tuple[float, float] = (0.1, 1.0),
                       normal_share: float = 0.5) -> tuple[Tensor, Tensor]:
    """Stage 3: smudged = (1 - mask) * image + (1 - beta) * (mask * image) + beta * (mask * colour)

    One plain random colour a sample. Takes image (N, 3, H, W) in [0, 1] on the generator's device; returns smudged,
    likewise, and mask (N, 1, H, W). beta is drawn from its range for each sample, as in DRAEM, and weights the colour.
    """
    count, _, height, width = image.shape
    mask = perlin_mask(count, height, width, generator, normal_share)
    colour, beta = uniform(generator, 0, 1, count, 3, 1, 1), uniform(generator, *beta, count, 1, 1, 1)
    return torch.lerp(image, colour, beta * mask), mask


# ---------------------------------------------------------------------------------------------------------------------
# Losses, in float32 under any autocast.


# Copied from draem.focal_loss
def focal_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Focal loss = mean over pixels of -(1 - p)^2 log p, p the softmax probability of the pixel's true class.

    logits (N, 2, H, W), mask (N, 1, H, W) of 0 and 1. Followed is the code (loss.py): gamma 2, neither class weighted,
    labels smoothed by 1e-5: p = (1 - 1e-5) p_true + 1e-5 p_other + 1e-5, which also keeps log p finite.
    """
    with torch.autocast(logits.device.type, enabled=False):
        p_true = logits.float().softmax(1).gather(1, mask.long())
        p = (1 - 2e-5) * p_true + 2e-5  # p_other = 1 - p_true
        return (-(1 - p) ** 2 * p.log()).mean()


def squared_error(x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return F.mse_loss(x.float(), y.float())


def codebook_loss(image: Tensor, reconstruction: Tensor, commitment: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Stage 1: squared error of the image + commitment of F_lo and of F_hi: the sum of the terms."""
    return {"reconstruction": squared_error(reconstruction, image),
            "commitment_lo": commitment[0], "commitment_hi": commitment[1]}


def detection_loss(image: Tensor, simulated: "Simulated", restricted_lo: Tensor, restricted_hi: Tensor,
                   general: Tensor, specific: Tensor, logits: Tensor) -> dict[str, Tensor]:
    """Stage 2: focal + MSE(restricted_hi, Q_hi) + MSE(restricted_lo, Q_lo) + 10 * MSE(specific, image)

    Q are the codes before the swap. What follows `simulated` is what DsrModel.detect returns; `general`, which frozen
    parts draw, carries no loss.
    """
    return {"focal": focal_loss(logits, simulated.mask),
            "restriction_hi": squared_error(restricted_hi, simulated.normal_hi),
            "restriction_lo": squared_error(restricted_lo, simulated.normal_lo),
            "reconstruction": 10 * squared_error(specific, image)}


def upsampling_loss(logits: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Stage 3: focal, at the image's full size."""
    return {"focal": focal_loss(logits, mask)}


# ---------------------------------------------------------------------------------------------------------------------
# The discrete latent model: a VQ-VAE-2 of two levels. Here and below, attribute names are the authors' without leading
# underscores, so that released weights fit. Restriction and upsampling modules start from PyTorch's initial weights.


def eager_on_cpu(x: Tensor) -> bool:
    """Whether work is best done in pieces: a GPU wants few large ones, a graph none whose number depends on a shape."""
    return not (x.is_cuda or torch.compiler.is_compiling())


class VectorQuantizer(nn.Module):
    """A codebook (K, D), and the replacement of features (N, D, h, w) by their nearest codes.

    Learned by exponential moving averages (decay 0.99) of how many features a code stands for, and of their sum:
    no gradient reaches the codes, and only `forward` in training mode changes them.
    """

    decay, epsilon, commitment_cost = 0.99, 1e-5, 0.25

    def __init__(self, num_embeddings: int, embedding_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(num_embeddings, embedding_dim).requires_grad_(False)
        self.ema_w = nn.Parameter(torch.randn(num_embeddings, embedding_dim), requires_grad=False)
        self.register_buffer("ema_cluster_size", torch.zeros(num_embeddings))

    @torch.no_grad()
    def nearest(self, features: Tensor) -> Tensor:
        """argmin over codes of ||feature - code||^2, less ||feature||^2, which is the same for all: (N, h, w).

        On a GPU the distances are the only large tensor: 512 MiB for 8 images' 64 x 64 positions and 4096 codes. All
        vectors are taken from the codes' mean, lest rounding decide where they lie close together (as before training).
        """
        with torch.autocast(features.device.type, enabled=False):
            mean = self.embedding.weight.mean(0)
            rows, codes = features.float().movedim(1, -1) - mean, self.embedding.weight - mean
            norms, rows, shape = codes.square().sum(1), rows.flatten(0, 2), rows.shape[:3]
            parts = rows.split(512) if eager_on_cpu(rows) else (rows,)  # 8 MiB of distances, which stay in the cache
            nearest = [torch.addmm(norms, part, codes.t(), alpha=-2).min(1)[1] for part in parts]  # half argmin's time
            return torch.cat(nearest).view(shape)

    def lookup(self, index: Tensor) -> Tensor:
        return self.embedding(index).movedim(-1, 1)  # (N, D, h, w)

    def quantize(self, features: Tensor) -> Tensor:
        """The nearest codes; the gradient passes straight through to the features."""
        features = features.float()
        return features + (self.lookup(self.nearest(features)) - features).detach()

    def forward(self, features: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """quantize, commitment = 0.25 * MSE(features, codes), and perplexity, the number of codes in even use.

        In training mode the codes then move towards the features; before it, with a generator, dead ones are revived.
        Under torch.distributed all ranks move to what they would learn as one, if all have the same number of features.
        """
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            rows = features.detach().movedim(1, -1).flatten(0, 2)
            if self.training and generator is not None:
                self.revive(rows, generator)
            index = self.nearest(features)
            codes = self.lookup(index)
            counts = torch.zeros_like(self.ema_cluster_size).index_add_(0, index.flatten(), torch.ones_like(rows[:, 0]))
            if self.training:
                counts = self.update(rows, index.flatten(), counts)
            commitment = self.commitment_cost * F.mse_loss(features, codes)
            perplexity = torch.special.entr(counts / counts.sum()).sum().exp()
            return features + (codes - features).detach(), commitment, perplexity

    @torch.no_grad()
    def update(self, rows: Tensor, index: Tensor, counts: Tensor) -> Tensor:
        """One step of the moving averages; counts over all ranks. Sizes are smoothed (Laplace) as in the code."""
        sums = torch.zeros_like(self.ema_w).index_add_(0, index, rows)
        if ranks() > 1:
            both = torch.cat((sums, counts[:, None]), 1)
            dist.all_reduce(both)
            sums, counts = both[:, :-1], both[:, -1]
        size = torch.lerp(counts, self.ema_cluster_size, self.decay)
        total = size.sum()
        size = (size + self.epsilon) / (total + len(size) * self.epsilon) * total
        self.ema_cluster_size.copy_(size)
        self.ema_w.lerp_(sums, 1 - self.decay)
        self.embedding.weight.copy_(self.ema_w / size[:, None])
        return counts

    @torch.no_grad()
    def revive(self, rows: Tensor, generator: torch.Generator) -> None:
        """Set dead codes to random features of this batch; all of a new codebook, which so starts from features.

        Dead is a code that less than one feature in ten steps chose, or, where codes outnumber a step's features, less
        than a tenth of what each would get. Neither paper nor code has this. The draw is that of the first rank, over
        the features of all.
        """
        pick = torch.randint(len(rows) * ranks(), self.ema_cluster_size.shape, generator=generator, device=rows.device)
        if ranks() > 1:
            dist.broadcast(pick, 0)
        drawn = rows[pick % len(rows)]
        if ranks() > 1:  # each rank adds the features it has
            drawn = torch.where((pick // len(rows) == dist.get_rank())[:, None], drawn, 0)
            dist.all_reduce(drawn)
        least = 0.1 * min(1, len(rows) * ranks() / len(pick))
        alive, size = self.ema_cluster_size >= least, 2 * least
        self.ema_cluster_size.copy_(torch.where(alive, self.ema_cluster_size, size))
        self.ema_w.copy_(torch.where(alive[:, None], self.ema_w, size * drawn))
        self.embedding.weight.copy_(torch.where(alive[:, None], self.embedding.weight, drawn))


def ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Residual(nn.Module):
    """relu(x) + conv1x1(relu(conv3x3(relu(x)))): the code's ReLU works in place, so that relu(x) is what is added.

    Here it does not, and the values are the same: in place, autograd refuses EncoderTop's backward pass.
    """

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.block = nn.Sequential(nn.ReLU(), nn.Conv2d(channels, hidden, 3, padding=1, bias=False),
                                   nn.ReLU(), nn.Conv2d(hidden, channels, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) + self.block(x)


class ResidualStack(nn.Module):
    def __init__(self, channels: int, layers: int, hidden: int):
        super().__init__()
        self.layers = nn.ModuleList(Residual(channels, hidden) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.relu(x)


def halve(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 4, stride=2, padding=1)


def double(inputs: int, outputs: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)


class EncoderBot(nn.Module):
    """Encoder_hi: image (N, 3, H, W) -> (N, num_hiddens, H / 4, W / 4)."""

    def __init__(self, num_hiddens: int, num_residual_layers: int, num_residual_hiddens: int):
        super().__init__()
        self.conv_1, self.conv_2 = halve(3, num_hiddens // 2), halve(num_hiddens // 2, num_hiddens)
        self.conv_3 = nn.Conv2d(num_hiddens, num_hiddens, 3, padding=1)
        self.residual_stack = ResidualStack(num_hiddens, num_residual_layers, num_residual_hiddens)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual_stack(self.conv_3(F.relu(self.conv_2(F.relu(self.conv_1(x))))))


class EncoderTop(nn.Module):
    """Encoder_lo: (N, num_hiddens, H / 4, W / 4) -> (N, num_hiddens, H / 8, W / 8)."""

    def __init__(self, num_hiddens: int, num_residual_layers: int, num_residual_hiddens: int):
        super().__init__()
        self.conv_1, self.conv_2 = halve(num_hiddens, num_hiddens), nn.Conv2d(num_hiddens, num_hiddens, 3, padding=1)
        self.residual_stack = ResidualStack(num_hiddens, num_residual_layers, num_residual_hiddens)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual_stack(F.relu(self.conv_2(F.relu(self.conv_1(x)))))


class DecoderBot(nn.Module):
    """The general appearance decoder: (N, in_channels, H / 4, W / 4) -> image (N, 3, H, W)."""

    def __init__(self, in_channels: int, num_hiddens: int, num_residual_layers: int, num_residual_hiddens: int):
        super().__init__()
        self.conv_1 = nn.Conv2d(in_channels, num_hiddens, 3, padding=1)
        self.residual_stack = ResidualStack(num_hiddens, num_residual_layers, num_residual_hiddens)
        self.conv_trans_1, self.conv_trans_2 = double(num_hiddens, num_hiddens // 2), double(num_hiddens // 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_trans_2(F.relu(self.conv_trans_1(self.residual_stack(self.conv_1(x)))))


class DiscreteLatentModel(nn.Module):
    def __init__(self, num_hiddens: int, num_residual_layers: int, num_residual_hiddens: int,
                 num_embeddings: int, embedding_dim: int):
        super().__init__()
        sizes = num_hiddens, num_residual_layers, num_residual_hiddens
        self.encoder_t, self.encoder_b = EncoderTop(*sizes), EncoderBot(*sizes)
        self.pre_vq_conv_top = nn.Conv2d(num_hiddens, embedding_dim, 1)
        self.pre_vq_conv_bot = nn.Conv2d(num_hiddens + embedding_dim, embedding_dim, 1)
        self.vq_vae_top = VectorQuantizer(num_embeddings, embedding_dim)
        self.vq_vae_bot = VectorQuantizer(num_embeddings, embedding_dim)
        self.decoder_b = DecoderBot(2 * embedding_dim, *sizes)
        self.upsample_t = double(embedding_dim, embedding_dim)

    def encode_lo(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder_hi's output and F_lo."""
        encoded = self.encoder_b(image)
        return encoded, self.pre_vq_conv_top(self.encoder_t(encoded))

    def encode_hi(self, encoded: Tensor, lo: Tensor) -> Tensor:
        """F_hi, which depends on Q_lo."""
        return self.pre_vq_conv_bot(torch.cat((encoded, self.upsample_t(lo)), 1))

    def join(self, lo: Tensor, hi: Tensor) -> Tensor:
        return torch.cat((self.upsample_t(lo), hi), 1)  # (N, 2 D, H / 4, W / 4), what both decoders draw from

    def decode(self, lo: Tensor, hi: Tensor) -> Tensor:
        return self.decoder_b(self.join(lo, hi))

    def quantize(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Q_lo and Q_hi."""
        encoded, features = self.encode_lo(image)
        lo = self.vq_vae_top.quantize(features)
        return lo, self.vq_vae_bot.quantize(self.encode_hi(encoded, lo))

    def forward(self, image: Tensor, generator: torch.Generator | None = None
                ) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Stage 1: reconstruction, commitment (lo, hi), perplexity (lo, hi). In training mode the codebooks learn."""
        encoded, features = self.encode_lo(image)
        lo, commitment_lo, perplexity_lo = self.vq_vae_top(features, generator)
        hi, commitment_hi, perplexity_hi = self.vq_vae_bot(self.encode_hi(encoded, lo), generator)
        return self.decode(lo, hi), (commitment_lo, commitment_hi), (perplexity_lo, perplexity_hi)


# ---------------------------------------------------------------------------------------------------------------------
# The modules trained for each product.


class InstanceNorm(nn.Module):
    """(x - mean) / sqrt(variance + 1e-5) over each sample's channel, in every mode; no parameters."""

    def forward(self, x: Tensor) -> Tensor:
        if eager_on_cpu(x):  # batch norm of one sample, in a third of the time: PyTorch's copies to planes and back
            return torch.cat([F.batch_norm(sample, None, None, training=True) for sample in x.split(1)])
        return F.instance_norm(x)


def normed_convs(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, hidden, 3, padding=1), InstanceNorm(), nn.ReLU(inplace=True),
                         nn.Conv2d(hidden, outputs, 3, padding=1), InstanceNorm(), nn.ReLU(inplace=True))


def normed_up(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
                         nn.Conv2d(inputs, outputs, 3, padding=1), InstanceNorm(), nn.ReLU(inplace=True))


class FeatureEncoder(nn.Module):
    def __init__(self, w: int):
        super().__init__()
        self.block1, self.block2 = normed_convs(w, w, w), normed_convs(w, 2 * w, 2 * w)
        self.block3 = normed_convs(2 * w, 4 * w, 4 * w)

    def forward(self, x: Tensor) -> Tensor:
        return self.block3(F.max_pool2d(self.block2(F.max_pool2d(self.block1(x), 2)), 2))  # (N, 4w, h / 4, w / 4)


class FeatureDecoder(nn.Module):
    def __init__(self, w: int):
        super().__init__()
        self.up2, self.db2 = normed_up(4 * w, 2 * w), normed_convs(2 * w, 2 * w, 2 * w)
        self.up3, self.db3 = normed_up(2 * w, w), normed_convs(w, w, w)
        self.fin_out = nn.Sequential(nn.Conv2d(w, w, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fin_out(self.db3(self.up3(self.db2(self.up2(x)))))


class UnetEncoder(nn.Module):
    def __init__(self, in_channels: int, w: int):
        super().__init__()
        self.block1, self.block2 = normed_convs(in_channels, w, w), normed_convs(w, 2 * w, 2 * w)
        self.block3, self.block4 = normed_convs(2 * w, 4 * w, 4 * w), normed_convs(4 * w, 4 * w, 4 * w)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = [self.block1(x)]
        for block in (self.block2, self.block3, self.block4):
            features.append(block(F.max_pool2d(features[-1], 2)))
        return features  # from (N, w, H, W) to (N, 4w, H / 8, W / 8)


class UnetDecoder(nn.Module):
    def __init__(self, w: int, out_channels: int):
        super().__init__()
        self.up1, self.db1 = normed_up(4 * w, 4 * w), normed_convs(8 * w, 4 * w, 4 * w)
        self.up2, self.db2 = normed_up(4 * w, 2 * w), normed_convs(4 * w, 2 * w, 2 * w)
        self.up3, self.db3 = normed_up(2 * w, w), normed_convs(2 * w, w, w)
        self.fin_out = nn.Sequential(nn.Conv2d(w, out_channels, 3, padding=1))

    def forward(self, features: list[Tensor]) -> Tensor:
        b1, b2, b3, x = features
        x = self.db1(torch.cat((self.up1(x), b3), 1))
        x = self.db2(torch.cat((self.up2(x), b2), 1))
        x = self.db3(torch.cat((self.up3(x), b1), 1))
        return self.fin_out(x)


class AutoEncoder(nn.Module):
    def __init__(self, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class SubspaceRestrictionModule(nn.Module):
    """Puts features (N, base_width, h, w) back to the product's normal ones. No skips: anomalies must not pass by.

    Followed is the code, with two poolings; the paper's figure shows three.
    """

    def __init__(self, base_width: int):
        super().__init__()
        self.unet = AutoEncoder(FeatureEncoder(base_width), FeatureDecoder(base_width))

    def forward(self, x: Tensor) -> Tensor:
        return self.unet(x)


class AnomalyDetectionModule(nn.Module):
    """A U-Net: (N, in_channels, H, W), specific and general image in this order -> logits (N, out_channels, H, W)."""

    def __init__(self, in_channels: int = 6, out_channels: int = 2, base_width: int = 64):
        super().__init__()
        self.unet = AutoEncoder(UnetEncoder(in_channels, base_width), UnetDecoder(base_width, out_channels))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.unet(torch.cat(inputs, 1))


class UpsamplingModule(AnomalyDetectionModule):
    """The same with the coarse mask's softmax (both channels) as a third input."""

    def __init__(self, in_channels: int = 8, out_channels: int = 2, base_width: int = 64):
        super().__init__(in_channels, out_channels, base_width)


class ImageReconstructionNetwork(nn.Module):
    """The object-specific decoder: (N, in_channels, H / 4, W / 4) -> image (N, 3, H, W), by way of H / 16."""

    def __init__(self, in_channels: int, num_hiddens: int, num_residual_layers: int, num_residual_hiddens: int):
        super().__init__()
        self.block1 = normed_convs(in_channels, in_channels, 2 * in_channels)
        self.block2 = normed_convs(2 * in_channels, 2 * in_channels, 4 * in_channels)
        self.pre_vq_conv = nn.Conv2d(4 * in_channels, 64, 1)
        self.upblock1, self.upblock2 = double(64, 64), double(64, 64)
        self.conv_1 = nn.Conv2d(64, num_hiddens, 3, padding=1)
        self.residual_stack = ResidualStack(num_hiddens, num_residual_layers, num_residual_hiddens)
        self.conv_trans_1, self.conv_trans_2 = double(num_hiddens, num_hiddens // 2), double(num_hiddens // 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.block2(F.max_pool2d(self.block1(x), 2)), 2)
        x = F.relu(self.upblock2(F.relu(self.upblock1(self.pre_vq_conv(x)))))
        return self.conv_trans_2(F.relu(self.conv_trans_1(self.residual_stack(self.conv_1(x)))))


# ---------------------------------------------------------------------------------------------------------------------
# The model.


def initialize(module: nn.Module) -> None:
    """The code's initial weights (train_dsr.py:179, 189); biases keep PyTorch's."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0, 0.02)


class Simulated(NamedTuple):
    """Stage 2's anomalies: the codes after the swap, those before it, and where the detector has to find the swap."""
    lo: Tensor
    hi: Tensor
    normal_lo: Tensor
    normal_hi: Tensor
    mask: Tensor


class DsrModel(nn.Module):
    """All of DSR: 40.3 million parameters, 36.3 of them trained for each product, and, at 256 x 256, 133 GMAC.

    latent_anomaly_strength is the least lambda_s; base_width is that of the detection and upsampling modules.
    """

    def __init__(self, latent_anomaly_strength: float = 0.2, embedding_dim: int = 128, num_embeddings: int = 4096,
                 num_hiddens: int = 128, num_residual_layers: int = 2, num_residual_hiddens: int = 64,
                 base_width: int = 64):
        super().__init__()
        self.latent_anomaly_strength = latent_anomaly_strength
        sizes = num_hiddens, num_residual_layers, num_residual_hiddens
        self.discrete_latent_model = DiscreteLatentModel(*sizes, num_embeddings, embedding_dim)
        self.subspace_restriction_module_lo = SubspaceRestrictionModule(embedding_dim)
        self.subspace_restriction_module_hi = SubspaceRestrictionModule(embedding_dim)
        self.image_reconstruction_network = ImageReconstructionNetwork(2 * embedding_dim, *sizes)
        self.anomaly_detection_module = AnomalyDetectionModule(base_width=base_width)
        self.upsampling_module = UpsamplingModule(base_width=base_width)
        self.image_reconstruction_network.apply(initialize)
        self.anomaly_detection_module.apply(initialize)
        self.ranked = None  # rank_codes of both codebooks, while stage 2 is trained

    def train_stage(self, stage: int) -> list[nn.Parameter]:
        """Freeze what stage 1, 2 or 3 does not train, put the rest in training mode, and return its parameters.

        For stage 2 both codebooks are ranked, as they are now and on the device where they are.
        """
        last, first = "upsampling_module", "discrete_latent_model"
        names = [name for name, _ in self.named_children()]
        trained = {1: [first], 2: [name for name in names if name not in (first, last)], 3: [last]}[stage]
        for name, module in self.train().named_children():
            module.train(name in trained)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in trained and ".vq_vae_" not in name)
        latent = self.discrete_latent_model
        self.ranked = [rank_codes(level.embedding.weight)
                       for level in (latent.vq_vae_top, latent.vq_vae_bot)] if stage == 2 else None
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def simulate(self, image: Tensor, generator: torch.Generator, normal_share: float = 0.5) -> Simulated:
        """Stage 2's anomalies, after train_stage(2): codes swapped under a Perlin mask, pooled to each level's size.

        As in the code (train_dsr.py:233-266): both levels' codes with probability 1/2, those of lo or those of hi alone
        with 1/4 each. Where both are swapped, F_hi is computed and quantized again from the swapped Q_lo; else hi is
        that of the unchanged image. The mask returned has the pixels of lo where lo was changed. The code first turns normal images: rotate_normals(image, generator, 90, 0.4), 0.3 in stage 3.
        """
        if self.ranked is None:
            raise RuntimeError("simulate needs both codebooks ranked: call model.train_stage(2) first")
        count, _, height, width = image.shape
        latent = self.discrete_latent_model
        top, bot = latent.vq_vae_top, latent.vq_vae_bot
        mask = perlin_mask(count, height, width, generator, normal_share)
        strength_lo, strength_hi = uniform(generator, self.latent_anomaly_strength, 1, 2, count)
        case = uniform(generator, 0, 1, count, 1, 1, 1)
        change_lo, change_hi = case < 0.75, (case < 0.5) | (case >= 0.75)
        mask_lo, mask_hi = F.max_pool2d(mask, 8), F.max_pool2d(mask, 4)

        encoded, features = latent.encode_lo(image)
        index = top.nearest(features)
        normal_lo = top.lookup(index)
        lo = top.lookup(sample_codebook_anomalies(index, self.ranked[0], mask_lo * change_lo, strength_lo, generator))
        index = bot.nearest(latent.encode_hi(encoded, normal_lo))
        normal_hi = bot.lookup(index)
        both = (change_lo & change_hi)[:, 0]
        index = torch.where(both, bot.nearest(latent.encode_hi(encoded, lo)), index)
        hi = bot.lookup(sample_codebook_anomalies(index, self.ranked[1], mask_hi * change_hi, strength_hi, generator))
        target = torch.where(change_lo, F.interpolate(mask_lo, scale_factor=8), F.interpolate(mask_hi, scale_factor=4))
        return Simulated(lo, hi, normal_lo, normal_hi, target)

    def detect(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """From Q_lo and Q_hi, swapped or not: restricted_lo, restricted_hi, general, specific, coarse logits."""
        latent = self.discrete_latent_model
        restricted_lo, restricted_hi = self.subspace_restriction_module_lo(lo), self.subspace_restriction_module_hi(hi)
        general = latent.decode(lo, hi)
        specific = self.image_reconstruction_network(
            latent.join(latent.vq_vae_top.quantize(restricted_lo), latent.vq_vae_bot.quantize(restricted_hi)))
        logits = self.anomaly_detection_module(specific.detach(), general.detach())
        return restricted_lo, restricted_hi, general, specific, logits

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """general, specific, logits of the coarse mask, logits."""
        *_, general, specific, coarse = self.detect(*self.discrete_latent_model.quantize(image))
        logits = self.upsampling_module(specific.detach(), general.detach(), coarse.detach().float().softmax(1))
        return general, specific, coarse, logits

    @torch.no_grad()
    def predict_parts(self, image: Tensor, window: int | None = None) -> dict[str, Tensor]:
        """score (N,): the maximum of the window x window mean of coarse_mask; anomaly_map; both (N, H, W) in [0, 1].

        The window, an odd number, is the code's 21 at 256 x 256, padded with zeros, on the mask before upsampling, and
        in proportion at other sizes. general and specific, the images that are compared, come along.
        """
        if self.training:
            raise RuntimeError("predict needs a model in eval mode: call model.eval() first")
        general, specific, coarse, logits = self(image)
        coarse, anomaly_map = coarse.float().softmax(1)[:, 1], logits.float().softmax(1)[:, 1]
        window = window or round(21 * min(image.shape[2:]) / 256) // 2 * 2 + 1
        score = F.avg_pool2d(coarse[:, None], window, stride=1, padding=window // 2).amax((1, 2, 3))
        return {"score": score, "anomaly_map": anomaly_map, "general": general, "specific": specific,
                "coarse_mask": coarse}

    def predict(self, image: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        """predict_parts' score (N,) and anomaly_map (N, H, W), both in [0, 1]."""
        parts = self.predict_parts(image, window)
        return parts["score"], parts["anomaly_map"]


# ---------------------------------------------------------------------------------------------------------------------
# Weights.

CODEBOOK_URL = ("https://github.com/open-edge-platform/anomalib/releases/download/dsr_pretrained_weights/"
                "dsr_vq_model_pretrained.zip")
CODEBOOK_SHA256 = "52fe7504ec8e9df70b4382f287ab26269dcfe000cd7a7e146a52c6f146f34afb"
CODEBOOK_FILE = "vq_model_pretrained_128_4096.pckl"  # the authors' name, also inside the zip
AUTHORS_FILES = {"subspace_restriction_hi": "subspace_restriction_module_hi",
                 "subspace_restriction_lo": "subspace_restriction_module_lo",
                 "anomaly_det_module": "anomaly_detection_module", "upsample_module": "upsampling_module",
                 "image_recon_module": "image_reconstruction_network"}


# Copied from draem.read_weights
def read_weights(path: str | Path) -> dict:
    """What torch.save wrote, tensors and plain values alone: a pickle's code is never run. ValueError, in one line."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # a damaged file fails in many ways
        unsafe = "GLOBAL " in str(error)  # the pickle names a class or function; any other fault is a damaged file
        raise ValueError(f"{path}: " + ("holds more than tensors and could run code; save its state dict alone"
                                        if unsafe else "truncated, or not a file of weights")) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict of tensors, found {type(content).__name__}")
    return content


# Copied from draem.set_weights
def set_weights(module: nn.Module, state: dict, path: str | Path) -> None:
    """load_state_dict, strict, with the first few differences in one line: ValueError."""
    own = module.state_dict()
    shapes = [f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}" for k in own
              if isinstance(state.get(k), Tensor) and state[k].shape != own[k].shape]
    faults = {"missing": [k for k in own if not isinstance(state.get(k), Tensor)],
              "unknown": [str(k) for k in state if k not in own], "of another shape": shapes,
              "not finite": [k for k in own if isinstance(state.get(k), Tensor) and not state[k].isfinite().all()]}
    found = [f"{len(keys)} entries {fault} ({', '.join(keys[:3])}{', ...' * (len(keys) > 3)})"
             for fault, keys in faults.items() if keys]
    if found:
        raise ValueError(f"{path}: does not fit {type(module).__name__}: " + "; ".join(found))
    module.load_state_dict(state)


def clean(state: dict, prefix: str = "") -> dict:
    """Keys without the leading underscores of the authors' names, under a prefix."""
    return {prefix + ".".join(part.lstrip("_") for part in str(key).split(".")): value for key, value in state.items()}


def swap_red_blue(state: dict) -> dict:
    """The authors' networks saw BGR: their image channels turned round."""
    latent, specific = "discrete_latent_model.", "image_reconstruction_network."
    state, both = dict(state), (2, 1, 0, 5, 4, 3)
    for key, dim, order in ((latent + "encoder_b.conv_1.weight", 1, (2, 1, 0)),
                            (latent + "decoder_b.conv_trans_2.weight", 1, (2, 1, 0)),  # transposed: (in, out, 4, 4)
                            (latent + "decoder_b.conv_trans_2.bias", 0, (2, 1, 0)),
                            (specific + "conv_trans_2.weight", 1, (2, 1, 0)),
                            (specific + "conv_trans_2.bias", 0, (2, 1, 0)),
                            ("anomaly_detection_module.unet.encoder.block1.0.weight", 1, both),
                            ("upsampling_module.unet.encoder.block1.0.weight", 1, (*both, 6, 7))):
        value = state.get(key)
        if isinstance(value, Tensor) and value.ndim > dim and value.shape[dim] == len(order):
            state[key] = value.index_select(dim, torch.tensor(order))
    return state


def model_for(state: dict, latent_anomaly_strength: float = 0.2, base_width: int = 64) -> DsrModel:
    """A new model of the size that the weights have; published sizes for what is absent."""
    def size(key: str, dim: int, default: int) -> int:
        value = state.get(key)
        return value.shape[dim] if isinstance(value, Tensor) and value.ndim > dim else default

    codes = "discrete_latent_model.vq_vae_top.embedding.weight"
    encoder = "discrete_latent_model.encoder_b."
    layers = sum(k.startswith(encoder + "residual_stack.") and k.endswith("block.1.weight") for k in state) or 2
    return DsrModel(latent_anomaly_strength, size(codes, 1, 128), size(codes, 0, 4096),
                    size(encoder + "conv_3.weight", 0, 128), layers,
                    size(encoder + "residual_stack.layers.0.block.1.weight", 0, 64),
                    size("anomaly_detection_module.unet.encoder.block1.0.weight", 0, base_width))


def fetch_codebook() -> Path:
    """The published codebook's zip from torch.hub's cache or, its hash checked, the network. ValueError in one line."""
    path = Path(torch.hub.get_dir(), "checkpoints", CODEBOOK_URL.rsplit("/", 1)[1])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(CODEBOOK_URL, str(path), CODEBOOK_SHA256, progress=False)
        except (OSError, RuntimeError) as error:  # RuntimeError: another hash
            raise ValueError(f"{CODEBOOK_URL}: {error}; fetch the codebook where there is a network and give it with "
                             "--codebook FILE, or make one with --pretrain IMAGES") from None
    return path


def read_codebook(path: str | Path) -> dict:
    """The tensors of a codebook's file, or of the one that the published zip holds; nothing is unpacked to disk."""
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith(".pckl"):  # no file that torch.save wrote, itself a zip, has such a member
                        return read_weights(io.BytesIO(archive.read(name)))
        except Exception:  # a damaged file fails in many ways
            raise ValueError(f"{path}: damaged; delete it and fetch it again from {CODEBOOK_URL}") from None
    return read_weights(path)


def load_codebook(path: str | Path | None = None, latent_anomaly_strength: float = 0.2,
                  base_width: int = 64) -> DsrModel:
    """A model of the codebook's size with its discrete latent model trained, the rest new. ValueError in one line.

    Without a path the published codebook is fetched. Told apart by their keys: a file made by stage 1 here,
    {"method": "dsr-codebook", "model": the discrete latent model's state}; the authors' file or its zip, for BGR.
    """
    path, prefix = fetch_codebook() if path is None else Path(path), "discrete_latent_model."
    content = read_codebook(path)
    if "model" in content:
        if content.get("method") != "dsr-codebook":
            raise ValueError(f"{path}: a checkpoint of {content.get('method')}, not of dsr-codebook")
        state = clean(content["model"], prefix)
    else:
        state = swap_red_blue(clean(content, prefix))
    model = model_for(state, latent_anomaly_strength, base_width)
    set_weights(model.discrete_latent_model, {k.removeprefix(prefix): v for k, v in state.items()}, path)
    return model


def load_dsr(path: str | Path, codebook: str | Path | None = None) -> DsrModel:
    """A trained model in eval mode, for RGB, of the size that the weights have. ValueError in one line.

    Told apart by their keys: this project's last.pt; anomalib's checkpoint; one of the authors' five files of a class,
    with the other four beside it and the codebook's too, if not given. The authors' networks saw BGR: their image
    channels are turned round. anomalib shows RGB to a codebook that saw BGR and trains the rest so: kept as trained.
    """
    path, content = Path(path), read_weights(path)
    if "model" in content:
        if content.get("method") != "dsr":
            raise ValueError(f"{path}: a checkpoint of {content.get('method')}, not of dsr")
        state = content["model"]
    elif "state_dict" in content:
        modules = tuple(f"model.{module}." for module in ("discrete_latent_model", *AUTHORS_FILES.values()))
        state = clean({k.removeprefix("model."): v for k, v in content["state_dict"].items() if k.startswith(modules)})
    else:
        kind = next((kind for kind in AUTHORS_FILES if path.name.startswith(f"DSR_{kind}_")), None)
        if kind is None:
            raise ValueError(f"{path}: neither this project's checkpoint, nor anomalib's, nor named as the authors' "
                             "five files (DSR_image_recon_module_CLASS.pckl); it begins with "
                             + ", ".join(map(str, list(content)[:3])))
        state = clean(read_codebook(codebook or path.with_name(CODEBOOK_FILE)), "discrete_latent_model.")
        for other, module in AUTHORS_FILES.items():
            beside = path.with_name(path.name.replace(kind, other, 1))
            state |= clean(read_weights(beside), module + ".")
        state = swap_red_blue(state)
    # The authors' decoder may carry codebooks that it does not use.
    state = {k: v for k, v in state.items() if not k.startswith("image_reconstruction_network.vq")}
    model = model_for(state)
    set_weights(model, state, path)
    return model.eval()
