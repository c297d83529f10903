"""DSR: a dual subspace re-projection network for surface anomaly detection.

Paper: Zavrtanik, Kristan, Skočaj, ECCV 2022, arXiv 2208.01521. "The code" is the authors',
VitjanZ/DSR_anomaly_detection @ 672bfb8. The code lacks stage 1, which follows the paper here.

An image is encoded with two codebooks, a coarse one (lo) and a fine one (hi), learned from images of all kinds.
Anomalies are simulated by swapping codes. Restriction modules learn to restore the product's normal codes. A detection
module compares the image decoded before this restoration with the image decoded after it. Training has three stages:

    1  DiscreteLatentModel      codebooks and general decoder, on any images
    2  DsrModel.begin(2)        restriction, decoder and detector, on one product's normal images; stage 1 is frozen
    3  DsrModel.begin(3)        the upsampling module, which sharpens the mask, on the same images; the rest is frozen

This file holds, in order: the published settings, simulated anomalies, losses, the discrete latent model, the modules
trained for each product, the model with its training steps, and readers for trained weights. It needs torch alone.
Five lines train a stage:

    model, generator = DsrModel(load_codebook()), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.begin(2), PUBLISHED["lr"])
    terms = model.losses(image, generator)  # in every step, on a new batch
    sum(terms.values()).backward()
    optimizer.step()  # then optimizer.zero_grad()

    paper       here                 shape                  range
    I           image                (N, 3, H, W)           [0, 1], RGB; H and W multiples of 32, at least 64
    K_lo, K_hi  codebook_lo, _hi     (K, D)                 K codes of D values
    F_lo, F_hi  features             as lo, hi              before quantization
    Q_lo        lo                   (N, D, H / 8, W / 8)   rows of K_lo
    Q_hi        hi                   (N, D, H / 4, W / 4)   rows of K_hi
    F~_lo, _hi  restricted_lo, _hi   as lo, hi              restored to normal, before quantization
    lambda_s    strength             (N,)                   share of the codebook that a swap may draw from
    M           mask                 (N, 1, H, W)           1 = anomalous, 0 = normal, throughout
    I_gen       general              (N, 3, H, W)           decoded by the general appearance decoder
    I_spc       specific             (N, 3, H, W)           decoded by the object-specific decoder
    M_o         coarse_mask          (N, H, W)              [0, 1], the softmax of logits (N, 2, H, W)
    -           anomaly_map          (N, H, W)              [0, 1], likewise, after the upsampling module
    eta         score                (N,)                   [0, 1]

    here                       the released code             anomalib
    encoder_lo, _hi            _encoder_t, _encoder_b        encoder_t, encoder_b: EncoderTop, EncoderBot
    project_lo, _hi            _pre_vq_conv_top, _bot        pre_vq_conv_top, _bot
    codebook_lo, _hi           _vq_vae_top, _vq_vae_bot      vq_vae_top, vq_vae_bot
    general_decoder            _decoder_b                    decoder_b: DecoderBot
    upsample_lo                upsample_t                    upsample_t
    lambda_s                   anom_par (minimum)            latent_anomaly_strength (minimum)
"""
import io
import math
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PUBLISHED = {  # from the paper, where no other source is named
    "size": 256,                    # side of the square images, in pixels
    "lr": 2e-4,                     # of Adam in stages 1 and 2; used for stage 3 as well
    # stage 1
    "codes": 4096,                  # per codebook, K
    "code_length": 128,             # values per code, D
    "hiddens": 128,                 # width of the encoders and decoders (the released weights)
    "residual_layers": 2,           # of each encoder and decoder (the released weights)
    "residual_hiddens": 64,         # width inside them (the released weights)
    "decay": 0.99,                  # of the codebooks' moving averages (the code)
    "commitment_cost": 0.25,        # weight of the commitment terms (the code)
    "pretrain_steps": 200_000,      # on ImageNet
    "pretrain_batch": 32,
    # stage 2
    "steps": 100_000,
    "batch": 8,
    "drops": (0.8,),                # share of the steps after which lr is multiplied by drop_factor: 80,000
    "drop_factor": 0.1,
    "width": 64,                    # of the detection and upsampling modules' first block (the code)
    "lambda_s": (0.2, 1.0),         # range of the share of nearest codes that a swap may draw from
    "skipped": 0.05,                # share of nearest codes that a swap leaves out: 204 of 4096
    "both_share": 0.5,              # share of anomalous samples with both levels swapped; half of the rest swaps lo
                                    # alone, half hi alone (train_dsr.py:233-266)
    "normal_share": 0.5,            # share of samples that get no anomaly (the code)
    "noise_threshold": 0.5,         # mask = noise > threshold (the code)
    "rotation": 90.0,               # maximum rotation of normal images, in degrees (the code)
    "rotation_share": 0.4,          # share of normal images that are rotated in stage 2 (the code)
    "reconstruction_lambda": 10.0,  # weight of MSE(I, I_spc)
    # stage 3
    "upsampling_steps": 20_000,
    "upsampling_rotation_share": 0.3,  # the same in stage 3 (the code)
    "beta": (0.1, 1.0),             # range of the colour's share in a smudge, DRAEM's; DRAEM's and DSR's code: (0.2, 1]
    # score
    "window": 21,                   # side of the mean filter at 256 x 256 (the code)
}

# ---------------------------------------------------------------------------------------------------------------------
# Simulated anomalies. `generator` draws all random numbers, on its own device.


# Copied from draem.uniform
def uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


# Copied from draem.gradient_noise
def gradient_noise(y: Tensor, x: Tensor, angles: Tensor) -> Tensor:
    """Perlin noise (N, H, W) at lattice coordinates y, x (N, H, W), for gradients at `angles` (N, R, C), in radians.

    As in DRAEM's perlin.py: the dot products of gradient and offset at the four corners, interpolated by
    fade(t) = 6 t^5 - 15 t^4 + 10 t^3, times sqrt(2). y lies in [0, R - 1), x in [0, C - 1).
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


# Copied from draem.turned_grid
def turned_grid(height: int, width: int, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel coordinates y, x (N, height, width), rotated about the image's centre by angle (N,), in radians."""
    y = torch.arange(height, device=angle.device).view(1, -1, 1) - (height - 1) / 2
    x = torch.arange(width, device=angle.device).view(1, 1, -1) - (width - 1) / 2
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    return cos * y - sin * x + (height - 1) / 2, sin * y + cos * x + (width - 1) / 2


# Copied from draem.perlin_noise
def perlin_noise(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """`count` independent noise images (count, height, width), of any size.

    As in DRAEM's code (data_loader.py), each side of the lattice has 2^0 to 2^5 cells, drawn independently. The noise
    is rotated by up to 90 degrees about the centre; pixels from outside are 0. The code rotates the finished image.
    Here the coordinates are rotated, which blurs nothing.
    """
    device = generator.device
    cells = 2.0 ** torch.randint(0, 6, (2, count, 1, 1), generator=generator, device=device)
    angles = uniform(generator, 0, 2 * math.pi, count, 33, 33)  # of the gradients; 32 cells have 33 corners a side
    y, x = turned_grid(height, width, uniform(generator, -math.pi / 2, math.pi / 2, count))
    inside = (y >= 0) & (y <= height - 1) & (x >= 0) & (x <= width - 1)
    y = y.clamp(0, height - 1) * cells[0] / height
    x = x.clamp(0, width - 1) * cells[1] / width
    return gradient_noise(y, x, angles) * inside


# Copied from draem.apply_where
def apply_where(chosen: Tensor, function, image: Tensor, *arguments: Tensor) -> Tensor:
    """Apply function(image, *arguments) to the chosen samples (N,) only. Every argument has an entry per sample."""
    if image.is_cuda:  # selecting samples would make the host wait for the device, so all are computed
        return torch.where(chosen.view(-1, 1, 1, 1), function(image, *arguments), image)
    index = chosen.nonzero().squeeze(1)
    if not len(index):
        return image
    return image.index_copy(0, index, function(image[index], *(a[index] for a in arguments)))


# Copied from draem.rotate
def rotate(image: Tensor, degrees: Tensor) -> Tensor:
    """Rotate each sample clockwise about its centre by its own angle (N,). Bilinear; pixels from outside are 0."""
    height, width = image.shape[2:]
    y, x = turned_grid(height, width, degrees.deg2rad())
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), -1)  # (N, H, W, 2), in [-1, 1]
    return F.grid_sample(image, grid, align_corners=False)


# Copied from draem.rotate_normals
def rotate_normals(image: Tensor, generator: torch.Generator, degrees: float, share: float) -> Tensor:
    """Rotate a share of the normal images, each by its own angle of up to +-degrees."""
    chosen = uniform(generator, 0, 1, len(image)) < share
    return apply_where(chosen, rotate, image, uniform(generator, -degrees, degrees, len(image)))


# Copied from draem.perlin_mask
def perlin_mask(count: int, height: int, width: int, generator: torch.Generator, normal_share: float,
                threshold: float) -> Tensor:
    """Masks (count, 1, height, width): noise > threshold, empty for `normal_share` of the samples."""
    anomalous = uniform(generator, 0, 1, count, 1, 1) >= normal_share
    return ((perlin_noise(count, height, width, generator) > threshold) & anomalous)[:, None].float()


@torch.no_grad()
def rank_codes(codes: Tensor) -> Tensor:
    """codes (K, D) -> (K, K): row k lists all codes by their distance from code k, the nearest (k itself) first.

    The table is made once for a trained codebook. It takes 64 MiB for 4096 codes.
    """
    codes = codes - codes.mean(0)  # for exactness, as in VectorQuantizer.nearest
    norms = codes.square().sum(1)
    return torch.cat([torch.addmm(norms, rows, codes.t(), alpha=-2).sort(dim=1, stable=True)[1].int()
                      for rows in codes.split(512)])


@torch.no_grad()
def sample_codebook_anomalies(index: Tensor, ranked: Tensor, mask: Tensor, strength: Tensor,
                              generator: torch.Generator) -> Tensor:
    """Swap the codes `index` (N, h, w) under mask (N, 1, h, w) for others of the codebook.

    All K codes are sorted by distance. The candidates are the first int(strength * K) + 1 without the first
    int(0.05 * K), all equally likely (train_dsr.py:31-40). strength (N,). The code sorts by distance from the
    unquantized feature. Here `ranked`, rank_codes(codebook), sorts by distance from the position's own code. A swap is
    then a look-up in a table made once. No shape depends on the mask, so the host does not wait for the device.
    """
    count = len(ranked)
    first = int(PUBLISHED["skipped"] * count)
    nearest = (strength * count).floor() + 1
    candidates = (nearest.clamp(first + 1, count) - first).view(-1, 1, 1)  # at least one
    draw = (uniform(generator, 0, 1, *index.shape) * candidates).floor()
    rank = first + torch.minimum(draw, candidates - 1).long()
    return torch.where(mask[:, 0] > 0, ranked[index, rank].long(), index)


@torch.no_grad()
def synthesize_smudges(image: Tensor, generator: torch.Generator, beta: tuple[float, float] = PUBLISHED["beta"],
                       normal_share: float = PUBLISHED["normal_share"]) -> tuple[Tensor, Tensor]:
    """Stage 3: smudged = (1 - mask) * image + (1 - beta) * (mask * image) + beta * (mask * colour)

    Each sample has one random colour. Takes image (N, 3, H, W) in [0, 1] on the generator's device; returns smudged,
    likewise, and mask (N, 1, H, W). beta is drawn from its range for each sample.
    """
    count, _, height, width = image.shape
    mask = perlin_mask(count, height, width, generator, normal_share, PUBLISHED["noise_threshold"])
    colour = uniform(generator, 0, 1, count, 3, 1, 1)
    beta = uniform(generator, *beta, count, 1, 1, 1)
    return torch.lerp(image, colour, beta * mask), mask


# ---------------------------------------------------------------------------------------------------------------------
# Losses, in float32 under any autocast.


# Copied from draem.focal_loss
def focal_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Focal loss = mean over pixels of -(1 - p)^2 log p, p the softmax probability of the pixel's true class.

    logits (N, 2, H, W), mask (N, 1, H, W) of 0 and 1. As in DRAEM's loss.py, gamma is 2 and no class is weighted.
    Labels are smoothed by 1e-5: p = (1 - 1e-5) p_true + 1e-5 p_other + 1e-5. This also keeps log p finite.
    """
    with torch.autocast(logits.device.type, enabled=False):
        p_true = logits.float().softmax(1).gather(1, mask.long())
        p = (1 - 2e-5) * p_true + 2e-5  # p_other = 1 - p_true
        return (-(1 - p) ** 2 * p.log()).mean()


def squared_error(x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return F.mse_loss(x.float(), y.float())


# ---------------------------------------------------------------------------------------------------------------------
# The discrete latent model: a VQ-VAE-2 of two levels (stage 1).


def eager_on_cpu(x: Tensor) -> bool:
    """True on a CPU outside a traced graph. There, working in pieces is faster."""
    return not (x.is_cuda or torch.compiler.is_compiling() or torch.jit.is_tracing())


class VectorQuantizer(nn.Module):
    """A codebook (K, D) that replaces features (N, D, h, w) by their nearest codes.

    A code is ema_w / ema_cluster_size, the exponential moving averages of the sum and the number of its features. No
    gradient reaches the codes. Only `forward` in training mode changes them.
    """

    def __init__(self, codes: int, code_length: int):
        super().__init__()
        self.embedding = nn.Embedding(codes, code_length).requires_grad_(False)
        self.ema_w = nn.Parameter(torch.randn(codes, code_length), requires_grad=False)
        self.register_buffer("ema_cluster_size", torch.zeros(codes))

    @torch.no_grad()
    def nearest(self, features: Tensor) -> Tensor:
        """(N, D, h, w) -> (N, h, w): argmin over codes of ||feature - code||^2 - ||feature||^2.

        On a GPU all distances are held at once: 512 MiB for 8 images' 64 x 64 positions and 4096 codes. The codes' mean
        is subtracted first; otherwise rounding would decide between close codes.
        """
        with torch.autocast(features.device.type, enabled=False):
            mean = self.embedding.weight.mean(0)
            codes = self.embedding.weight - mean
            norms = codes.square().sum(1)
            rows = features.float().movedim(1, -1) - mean  # (N, h, w, D)
            shape = rows.shape[:3]
            rows = rows.flatten(0, 2)
            parts = rows.split(512) if eager_on_cpu(rows) else (rows,)  # 8 MiB of distances stay in a CPU's cache
            nearest = [torch.addmm(norms, part, codes.t(), alpha=-2).min(1)[1] for part in parts]
            return torch.cat(nearest).view(shape)

    def lookup(self, index: Tensor) -> Tensor:
        return self.embedding(index).movedim(-1, 1)  # (N, D, h, w)

    def quantize(self, features: Tensor) -> Tensor:
        """The nearest codes; the gradient passes straight through to the features."""
        features = features.float()
        return features + (self.lookup(self.nearest(features)) - features).detach()

    def forward(self, features: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The nearest codes, as in quantize, and commitment = 0.25 * MSE(features, codes).

        In training mode, dead codes are revived before the search, and the codes are updated after it.
        """
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            rows = features.detach().movedim(1, -1).flatten(0, 2)
            if self.training:
                self.revive(rows, generator)
            index = self.nearest(features)
            codes = self.lookup(index)
            if self.training:
                self.update(rows, index.flatten())
            commitment = PUBLISHED["commitment_cost"] * F.mse_loss(features, codes)
            return features + (codes - features).detach(), commitment

    @torch.no_grad()
    def update(self, rows: Tensor, index: Tensor) -> None:
        """One step of both moving averages. The cluster sizes are Laplace-smoothed."""
        counts = torch.zeros_like(self.ema_cluster_size).index_add_(0, index, torch.ones_like(rows[:, 0]))
        sums = torch.zeros_like(self.ema_w).index_add_(0, index, rows)
        size = torch.lerp(counts, self.ema_cluster_size, PUBLISHED["decay"])
        total = size.sum()
        size = (size + 1e-5) / (total + len(size) * 1e-5) * total
        self.ema_cluster_size.copy_(size)
        self.ema_w.lerp_(sums, 1 - PUBLISHED["decay"])
        self.embedding.weight.copy_(self.ema_w / size[:, None])

    @torch.no_grad()
    def revive(self, rows: Tensor, generator: torch.Generator) -> None:
        """Set dead codes to random features of this batch. In a new codebook all codes are dead.

        A code is dead if its moving average of features per step is below 0.1 * min(1, n / K), with n features in the
        batch and K codes. This is not from the paper; the code has no stage 1.
        """
        drawn = rows[torch.randint(len(rows), self.ema_cluster_size.shape, generator=generator, device=rows.device)]
        least = 0.1 * min(1, len(rows) / len(drawn))
        alive = self.ema_cluster_size >= least
        self.ema_cluster_size.copy_(torch.where(alive, self.ema_cluster_size, 2 * least))
        self.ema_w.copy_(torch.where(alive[:, None], self.ema_w, 2 * least * drawn))
        self.embedding.weight.copy_(torch.where(alive[:, None], self.embedding.weight, drawn))

    def perplexity(self) -> float:
        """exp(entropy) of the codes' shares in the moving average: from 1 (one code used) to K (all used alike)."""
        return torch.special.entr(self.ema_cluster_size / self.ema_cluster_size.sum()).sum().exp().item()


class Residual(nn.Module):
    """relu(x) + conv1x1(relu(conv3x3(relu(x)))). The code's ReLU is in place, so relu(x) is added, not x.

    Here the ReLU is out of place; the values are the same. In place, encoder_lo's backward pass fails in stage 1.
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


def strided_conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 4, stride=2, padding=1)


def transposed_conv(inputs: int, outputs: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)


class EncoderHi(nn.Module):
    """Image (N, 3, H, W) -> (N, hiddens, H / 4, W / 4)."""

    def __init__(self, hiddens: int, residual_layers: int, residual_hiddens: int):
        super().__init__()
        self.conv_1 = strided_conv(3, hiddens // 2)
        self.conv_2 = strided_conv(hiddens // 2, hiddens)
        self.conv_3 = nn.Conv2d(hiddens, hiddens, 3, padding=1)
        self.residual_stack = ResidualStack(hiddens, residual_layers, residual_hiddens)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual_stack(self.conv_3(F.relu(self.conv_2(F.relu(self.conv_1(x))))))


class EncoderLo(nn.Module):
    """EncoderHi's output (N, hiddens, H / 4, W / 4) -> (N, hiddens, H / 8, W / 8)."""

    def __init__(self, hiddens: int, residual_layers: int, residual_hiddens: int):
        super().__init__()
        self.conv_1 = strided_conv(hiddens, hiddens)
        self.conv_2 = nn.Conv2d(hiddens, hiddens, 3, padding=1)
        self.residual_stack = ResidualStack(hiddens, residual_layers, residual_hiddens)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual_stack(F.relu(self.conv_2(F.relu(self.conv_1(x)))))


class GeneralDecoder(nn.Module):
    """The general appearance decoder: (N, in_channels, H / 4, W / 4) -> image (N, 3, H, W)."""

    def __init__(self, in_channels: int, hiddens: int, residual_layers: int, residual_hiddens: int):
        super().__init__()
        self.conv_1 = nn.Conv2d(in_channels, hiddens, 3, padding=1)
        self.residual_stack = ResidualStack(hiddens, residual_layers, residual_hiddens)
        self.conv_trans_1 = transposed_conv(hiddens, hiddens // 2)
        self.conv_trans_2 = transposed_conv(hiddens // 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_trans_2(F.relu(self.conv_trans_1(self.residual_stack(self.conv_1(x)))))


class DiscreteLatentModel(nn.Module):
    """Both encoders, both codebooks and the general appearance decoder. `settings` holds the arguments."""

    def __init__(self, hiddens: int = PUBLISHED["hiddens"], residual_layers: int = PUBLISHED["residual_layers"],
                 residual_hiddens: int = PUBLISHED["residual_hiddens"], codes: int = PUBLISHED["codes"],
                 code_length: int = PUBLISHED["code_length"]):
        super().__init__()
        self.settings = dict(hiddens=hiddens, residual_layers=residual_layers, residual_hiddens=residual_hiddens,
                             codes=codes, code_length=code_length)
        sizes = hiddens, residual_layers, residual_hiddens
        self.encoder_lo = EncoderLo(*sizes)
        self.encoder_hi = EncoderHi(*sizes)
        self.project_lo = nn.Conv2d(hiddens, code_length, 1)
        self.project_hi = nn.Conv2d(hiddens + code_length, code_length, 1)
        self.codebook_lo = VectorQuantizer(codes, code_length)
        self.codebook_hi = VectorQuantizer(codes, code_length)
        self.general_decoder = GeneralDecoder(2 * code_length, *sizes)
        self.upsample_lo = transposed_conv(code_length, code_length)

    def encode_lo(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """encoder_hi's output (N, hiddens, H / 4, W / 4), and F_lo (N, D, H / 8, W / 8)."""
        encoded = self.encoder_hi(image)
        return encoded, self.project_lo(self.encoder_lo(encoded))

    def encode_hi(self, encoded: Tensor, lo: Tensor) -> Tensor:
        """F_hi (N, D, H / 4, W / 4), which depends on Q_lo."""
        return self.project_hi(torch.cat((encoded, self.upsample_lo(lo)), 1))

    def join(self, lo: Tensor, hi: Tensor) -> Tensor:
        return torch.cat((self.upsample_lo(lo), hi), 1)  # (N, 2 D, H / 4, W / 4), the input of both decoders

    def decode(self, lo: Tensor, hi: Tensor) -> Tensor:
        """The image (N, 3, H, W) that the general appearance decoder decodes from Q_lo and Q_hi."""
        return self.general_decoder(self.join(lo, hi))

    def quantize(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Q_lo and Q_hi."""
        encoded, features = self.encode_lo(image)
        lo = self.codebook_lo.quantize(features)
        return lo, self.codebook_hi.quantize(self.encode_hi(encoded, lo))

    def losses(self, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Stage 1: MSE of the image + commitments of F_lo and F_hi. In training mode the codebooks are updated."""
        encoded, features = self.encode_lo(image)
        lo, commitment_lo = self.codebook_lo(features, generator)
        hi, commitment_hi = self.codebook_hi(self.encode_hi(encoded, lo), generator)
        return {"reconstruction": squared_error(self.decode(lo, hi), image),
                "commitment_lo": commitment_lo, "commitment_hi": commitment_hi}


# ---------------------------------------------------------------------------------------------------------------------
# The modules trained for each product; attribute names are the authors'.


class InstanceNorm(nn.Module):
    """(x - mean) / sqrt(variance + 1e-5) over each sample's channel, in every mode; no parameters."""

    def forward(self, x: Tensor) -> Tensor:
        if eager_on_cpu(x):  # batch norm of one sample needs no copies out of channels_last and back
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
        self.block1 = normed_convs(w, w, w)
        self.block2 = normed_convs(w, 2 * w, 2 * w)
        self.block3 = normed_convs(2 * w, 4 * w, 4 * w)

    def forward(self, x: Tensor) -> Tensor:
        return self.block3(F.max_pool2d(self.block2(F.max_pool2d(self.block1(x), 2)), 2))  # (N, 4w, h / 4, w / 4)


class FeatureDecoder(nn.Module):
    def __init__(self, w: int):
        super().__init__()
        self.up2 = normed_up(4 * w, 2 * w)
        self.db2 = normed_convs(2 * w, 2 * w, 2 * w)
        self.up3 = normed_up(2 * w, w)
        self.db3 = normed_convs(w, w, w)
        self.fin_out = nn.Sequential(nn.Conv2d(w, w, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fin_out(self.db3(self.up3(self.db2(self.up2(x)))))


class UnetEncoder(nn.Module):
    def __init__(self, in_channels: int, w: int):
        super().__init__()
        self.block1 = normed_convs(in_channels, w, w)
        self.block2 = normed_convs(w, 2 * w, 2 * w)
        self.block3 = normed_convs(2 * w, 4 * w, 4 * w)
        self.block4 = normed_convs(4 * w, 4 * w, 4 * w)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = [self.block1(x)]
        for block in (self.block2, self.block3, self.block4):
            features.append(block(F.max_pool2d(features[-1], 2)))
        return features  # from (N, w, H, W) to (N, 4w, H / 8, W / 8)


class UnetDecoder(nn.Module):
    def __init__(self, w: int, out_channels: int):
        super().__init__()
        self.up1 = normed_up(4 * w, 4 * w)
        self.db1 = normed_convs(8 * w, 4 * w, 4 * w)
        self.up2 = normed_up(4 * w, 2 * w)
        self.db2 = normed_convs(4 * w, 2 * w, 2 * w)
        self.up3 = normed_up(2 * w, w)
        self.db3 = normed_convs(2 * w, w, w)
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
    """Maps features (N, base_width, h, w) to the product's normal ones. Skip connections would let anomalies through.

    It has two poolings, as in the code; the paper's figure shows three.
    """

    def __init__(self, base_width: int):
        super().__init__()
        self.unet = AutoEncoder(FeatureEncoder(base_width), FeatureDecoder(base_width))

    def forward(self, x: Tensor) -> Tensor:
        return self.unet(x)


class AnomalyDetectionModule(nn.Module):
    """A U-Net: (N, in_channels, H, W), specific image, then general image -> logits (N, out_channels, H, W)."""

    def __init__(self, in_channels: int = 6, out_channels: int = 2, base_width: int = PUBLISHED["width"]):
        super().__init__()
        self.unet = AutoEncoder(UnetEncoder(in_channels, base_width), UnetDecoder(base_width, out_channels))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.unet(torch.cat(inputs, 1))


class UpsamplingModule(AnomalyDetectionModule):
    """AnomalyDetectionModule with the coarse mask's softmax (both channels) as a third input."""

    def __init__(self, in_channels: int = 8, out_channels: int = 2, base_width: int = PUBLISHED["width"]):
        super().__init__(in_channels, out_channels, base_width)


class ImageReconstructionNetwork(nn.Module):
    """The object-specific decoder: (N, in_channels, H / 4, W / 4) -> image (N, 3, H, W). Bottleneck at H / 16."""

    def __init__(self, in_channels: int, hiddens: int, residual_layers: int, residual_hiddens: int):
        super().__init__()
        self.block1 = normed_convs(in_channels, in_channels, 2 * in_channels)
        self.block2 = normed_convs(2 * in_channels, 2 * in_channels, 4 * in_channels)
        self.pre_vq_conv = nn.Conv2d(4 * in_channels, 64, 1)
        self.upblock1 = transposed_conv(64, 64)
        self.upblock2 = transposed_conv(64, 64)
        self.conv_1 = nn.Conv2d(64, hiddens, 3, padding=1)
        self.residual_stack = ResidualStack(hiddens, residual_layers, residual_hiddens)
        self.conv_trans_1 = transposed_conv(hiddens, hiddens // 2)
        self.conv_trans_2 = transposed_conv(hiddens // 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.block2(F.max_pool2d(self.block1(x), 2)), 2)
        x = F.relu(self.upblock2(F.relu(self.upblock1(self.pre_vq_conv(x)))))
        return self.conv_trans_2(F.relu(self.conv_trans_1(self.residual_stack(self.conv_1(x)))))


# ---------------------------------------------------------------------------------------------------------------------
# The model.


class Simulated(NamedTuple):
    """Stage 2's anomalies: the codes after the swap, the codes before it, and the target mask."""
    lo: Tensor
    hi: Tensor
    normal_lo: Tensor
    normal_hi: Tensor
    mask: Tensor


def initialize(module: nn.Module) -> None:
    """The code's initial weights of two modules (train_dsr.py:179, 189); biases keep PyTorch's default."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0, 0.02)


class DsrModel(nn.Module):
    """All of DSR: 40.3 million parameters, of which 36.3 are trained for each product; 133 GMAC at 256 x 256.

    latent: stage 1's model, by default a new one. width: of the detection and upsampling modules. lambda_s and rotation
    are for `losses`, see PUBLISHED. `settings` holds all four, to be saved with the weights. `reading` holds the
    arguments of this project's common.read_image for the training images; {} if unknown.
    """

    def __init__(self, latent: DiscreteLatentModel | None = None, width: int = PUBLISHED["width"],
                 lambda_s: tuple[float, float] = PUBLISHED["lambda_s"], rotation: float = PUBLISHED["rotation"]):
        super().__init__()
        latent = latent or DiscreteLatentModel()
        sizes = latent.settings
        self.settings = dict(latent=sizes, width=width, lambda_s=tuple(lambda_s), rotation=rotation)
        self.reading = {}
        self.lambda_s, self.rotation = tuple(lambda_s), rotation
        self.discrete_latent_model = latent
        self.subspace_restriction_module_lo = SubspaceRestrictionModule(sizes["code_length"])
        self.subspace_restriction_module_hi = SubspaceRestrictionModule(sizes["code_length"])
        self.image_reconstruction_network = ImageReconstructionNetwork(
            2 * sizes["code_length"], sizes["hiddens"], sizes["residual_layers"], sizes["residual_hiddens"])
        self.anomaly_detection_module = AnomalyDetectionModule(base_width=width)
        self.upsampling_module = UpsamplingModule(base_width=width)
        self.image_reconstruction_network.apply(initialize)
        self.anomaly_detection_module.apply(initialize)
        self.stage = None  # 2 or 3, set by begin
        self.register_buffer("ranked_lo", None, persistent=False)  # rank_codes of both codebooks in stage 2
        self.register_buffer("ranked_hi", None, persistent=False)

    def begin(self, stage: int) -> list[nn.Parameter]:
        """Put the modules of stage 2 or 3 in training mode, freeze the rest, and return the parameters to train.

        Stage 2 ranks the current codes of both codebooks, on their device.
        """
        latent, upsampling = self.discrete_latent_model, self.upsampling_module
        trained = {2: [module for module in self.children() if module not in (latent, upsampling)],
                   3: [upsampling]}[stage]
        self.stage = stage
        self.training = True  # so that predict asks for eval mode
        for module in self.children():
            module.train(module in trained).requires_grad_(module in trained)
        self.ranked_lo = rank_codes(latent.codebook_lo.embedding.weight) if stage == 2 else None
        self.ranked_hi = rank_codes(latent.codebook_hi.embedding.weight) if stage == 2 else None
        return [parameter for module in trained for parameter in module.parameters()]

    @torch.no_grad()
    def simulate(self, image: Tensor, generator: torch.Generator,
                 normal_share: float = PUBLISHED["normal_share"]) -> Simulated:
        """Stage 2's anomalies, after begin(2): codes swapped under a Perlin mask, max-pooled to each level's size.

        Three cases, as in the code (train_dsr.py:233-266). Both: lo is swapped; F_hi is computed from the swapped lo,
        quantized and swapped. Lo alone: lo is swapped; hi is that of the unchanged image. Hi alone: hi of the unchanged
        image is swapped. The target mask has lo's resolution where lo was swapped, else hi's, enlarged to H x W.
        """
        if self.ranked_lo is None:
            raise RuntimeError("simulate needs both codebooks ranked: call model.begin(2) first")
        count, _, height, width = image.shape
        latent = self.discrete_latent_model
        mask = perlin_mask(count, height, width, generator, normal_share, PUBLISHED["noise_threshold"])
        mask_lo, mask_hi = F.max_pool2d(mask, 8), F.max_pool2d(mask, 4)
        strength_lo, strength_hi = uniform(generator, *self.lambda_s, 2, count)
        case = uniform(generator, 0, 1, count, 1, 1, 1)
        both = case < PUBLISHED["both_share"]
        lo_alone = ~both & (case < (1 + PUBLISHED["both_share"]) / 2)
        swap_lo = both | lo_alone

        encoded, features = latent.encode_lo(image)
        index_lo = latent.codebook_lo.nearest(features)
        normal_lo = latent.codebook_lo.lookup(index_lo)
        swapped = sample_codebook_anomalies(index_lo, self.ranked_lo, mask_lo * swap_lo, strength_lo, generator)
        lo = latent.codebook_lo.lookup(swapped)

        index_hi = latent.codebook_hi.nearest(latent.encode_hi(encoded, normal_lo))
        normal_hi = latent.codebook_hi.lookup(index_hi)
        again = latent.codebook_hi.nearest(latent.encode_hi(encoded, lo))
        index_hi = torch.where(both[:, 0], again, index_hi)
        swapped = sample_codebook_anomalies(index_hi, self.ranked_hi, mask_hi * ~lo_alone, strength_hi, generator)
        hi = latent.codebook_hi.lookup(swapped)
        target = torch.where(swap_lo, F.interpolate(mask_lo, scale_factor=8), F.interpolate(mask_hi, scale_factor=4))
        return Simulated(lo, hi, normal_lo, normal_hi, target)

    def detect(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """From Q_lo and Q_hi, swapped or not: restricted_lo, restricted_hi, general, specific, coarse logits."""
        latent = self.discrete_latent_model
        restricted_lo = self.subspace_restriction_module_lo(lo)
        restricted_hi = self.subspace_restriction_module_hi(hi)
        general = latent.decode(lo, hi)
        specific = self.image_reconstruction_network(
            latent.join(latent.codebook_lo.quantize(restricted_lo), latent.codebook_hi.quantize(restricted_hi)))
        coarse = self.anomaly_detection_module(specific.detach(), general.detach())
        return restricted_lo, restricted_hi, general, specific, coarse

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """general, specific, logits of the coarse mask, logits."""
        *_, general, specific, coarse = self.detect(*self.discrete_latent_model.quantize(image))
        logits = self.upsampling_module(specific.detach(), general.detach(), coarse.detach().float().softmax(1))
        return general, specific, coarse, logits

    def losses(self, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss terms of the stage set by begin. image (N, 3, H, W) in [0, 1], on the generator's device."""
        if self.stage is None:
            raise RuntimeError("losses are those of a stage: call model.begin(2) or model.begin(3) first")
        return {2: self.detection_losses, 3: self.upsampling_losses}[self.stage](image, generator)

    def detection_losses(self, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Stage 2: focal + MSE(restricted_hi, Q_hi) + MSE(restricted_lo, Q_lo) + 10 * MSE(specific, image)

        Q_hi and Q_lo are the codes before the swap.
        """
        image = rotate_normals(image, generator, self.rotation, PUBLISHED["rotation_share"])
        lo, hi, normal_lo, normal_hi, mask = self.simulate(image, generator)
        restricted_lo, restricted_hi, _, specific, coarse = self.detect(lo, hi)
        return {"focal": focal_loss(coarse, mask),
                "restriction_hi": squared_error(restricted_hi, normal_hi),
                "restriction_lo": squared_error(restricted_lo, normal_lo),
                "reconstruction": PUBLISHED["reconstruction_lambda"] * squared_error(specific, image)}

    def upsampling_losses(self, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Stage 3: focal loss on images with smudges, at the image's full size."""
        image = rotate_normals(image, generator, self.rotation, PUBLISHED["upsampling_rotation_share"])
        smudged, mask = synthesize_smudges(image, generator)
        *_, logits = self(smudged)
        return {"focal": focal_loss(logits, mask)}

    @torch.no_grad()
    def predict(self, image: Tensor, window: int | None = None) -> dict[str, Tensor]:
        """score (N,), the maximum of the window x window mean of coarse_mask, with zero padding.

        image (N, 3, H, W) in [0, 1], else ValueError. Also returns anomaly_map and coarse_mask (N, H, W), and general
        and specific, the two images (N, 3, H, W) that the detection module compares. window is odd; by default 21 at
        256 x 256, as in the code, and in proportion at other sizes.
        """
        if self.training:
            raise RuntimeError("predict needs a model in eval mode: call model.eval() first")
        image = check_image(image, 64)
        general, specific, coarse, logits = self(image)
        coarse_mask = coarse.float().softmax(1)[:, 1]
        anomaly_map = logits.float().softmax(1)[:, 1]
        score = mean_filter_maximum(coarse_mask, window)
        return {"score": score, "anomaly_map": anomaly_map, "general": general, "specific": specific,
                "coarse_mask": coarse_mask}


# Copied from draem.mean_filter_maximum
def mean_filter_maximum(anomaly_map: Tensor, window: int | None = None) -> Tensor:
    """(N, H, W) -> (N,): the maximum of the window x window mean, with zero padding. window is odd."""
    side = min(int(length) for length in anomaly_map.shape[1:])
    window = window or round(PUBLISHED["window"] * side / PUBLISHED["size"]) // 2 * 2 + 1
    return F.avg_pool2d(anomaly_map[:, None], window, stride=1, padding=window // 2).amax((1, 2, 3))


# Copied from draem.check_image
def check_image(image: Tensor, least: int) -> Tensor:
    """The image in float32. ValueError unless (N, 3, H, W) in [0, 1], H and W multiples of 32 and at least `least`."""
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return image.float()  # a graph cannot depend on values
    if not image.is_floating_point():
        raise ValueError(f"image: floats in [0, 1] are needed, found {image.dtype}; divide 8-bit values by 255")
    if image.ndim != 4 or image.shape[1] != 3 or not len(image):
        raise ValueError(f"image: RGB of shape (N, 3, H, W) is needed, found {tuple(image.shape)}")
    if image.shape[2] % 32 or image.shape[3] % 32 or min(image.shape[2:]) < least:
        raise ValueError(f"image: sides of {least} or more, in steps of 32, are needed, found {tuple(image.shape[2:])}")
    low, high = (value.item() for value in image.float().aminmax())
    if not -1e-3 <= low <= high <= 1.001:
        raise ValueError(f"image: values in [0, 1] are needed, found {low:g} to {high:g}; divide 8-bit values by 255, "
                         "and do not normalize")
    return image.float()


# ---------------------------------------------------------------------------------------------------------------------
# Weights.

CODEBOOK_URL = ("https://github.com/open-edge-platform/anomalib/releases/download/dsr_pretrained_weights/"
                "dsr_vq_model_pretrained.zip")
CODEBOOK_SHA256 = "52fe7504ec8e9df70b4382f287ab26269dcfe000cd7a7e146a52c6f146f34afb"
CODEBOOK_FILE = "vq_model_pretrained_128_4096.pckl"  # the authors' name, also inside the zip

# Released names of stage 1's modules, without leading underscores -> the names here.
RELEASED = {"encoder_t": "encoder_lo", "encoder_b": "encoder_hi", "pre_vq_conv_top": "project_lo",
            "pre_vq_conv_bot": "project_hi", "vq_vae_top": "codebook_lo", "vq_vae_bot": "codebook_hi",
            "decoder_b": "general_decoder", "upsample_t": "upsample_lo"}
# The authors' five files per class: part of the file's name -> the module here.
AUTHORS_FILES = {"subspace_restriction_hi": "subspace_restriction_module_hi",
                 "subspace_restriction_lo": "subspace_restriction_module_lo",
                 "anomaly_det_module": "anomaly_detection_module", "upsample_module": "upsampling_module",
                 "image_recon_module": "image_reconstruction_network"}
LATENT = "discrete_latent_model."
BGR = (2, 1, 0)  # reverses three channels
# Tensors with colour channels: (key, dimension, order) that converts weights trained on BGR to RGB.
CODEBOOK_CHANNELS = (("encoder_hi.conv_1.weight", 1, BGR),
                     ("general_decoder.conv_trans_2.weight", 1, BGR),  # transposed: (in, out, 4, 4)
                     ("general_decoder.conv_trans_2.bias", 0, BGR))
AUTHORS_CHANNELS = (("image_reconstruction_network.conv_trans_2.weight", 1, BGR),
                    ("image_reconstruction_network.conv_trans_2.bias", 0, BGR),
                    ("anomaly_detection_module.unet.encoder.block1.0.weight", 1, (*BGR, 5, 4, 3)),
                    ("upsampling_module.unet.encoder.block1.0.weight", 1, (*BGR, 5, 4, 3, 6, 7)))


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


# Copied from draem.reorder
def reorder(state: dict, channels) -> None:
    """Reorder channels of tensors in `state`, in place. Each entry of `channels` is (key, dimension, order)."""
    for key, dimension, order in channels:
        value = state.get(key)
        if isinstance(value, Tensor) and value.ndim > dimension and value.shape[dimension] == len(order):
            state[key] = value.index_select(dimension, torch.tensor(order))


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


def clean(state: dict) -> dict:
    """The state dict without the leading underscores in the authors' names."""
    return {".".join(part.lstrip("_") for part in str(key).split(".")): value for key, value in state.items()}


def released_latent(state: dict) -> dict:
    """A released discrete latent model's state dict, renamed to the names here."""
    first = {key: key.split(".")[0] for key in clean(state)}
    return {RELEASED.get(first[key], first[key]) + key[len(first[key]):]: value for key, value in clean(state).items()}


def latent_settings(state: dict) -> dict:
    """A released discrete latent model's sizes, from its tensors' shapes; the published size if a tensor is absent."""
    def size(key: str, dimension: int, name: str) -> int:
        value = state.get(key)
        return value.shape[dimension] if isinstance(value, Tensor) and value.ndim > dimension else PUBLISHED[name]

    blocks = [key for key in state if key.startswith("encoder_hi.residual_stack.") and key.endswith("block.1.weight")]
    return dict(hiddens=size("encoder_hi.conv_3.weight", 0, "hiddens"),
                residual_layers=len(blocks) or PUBLISHED["residual_layers"],
                residual_hiddens=size("encoder_hi.residual_stack.layers.0.block.1.weight", 0, "residual_hiddens"),
                codes=size("codebook_lo.embedding.weight", 0, "codes"),
                code_length=size("codebook_lo.embedding.weight", 1, "code_length"))


def fetch_codebook() -> Path:
    """The published codebook's zip in torch.hub's cache. If absent, a hash-checked download. ValueError on failure."""
    path = Path(torch.hub.get_dir(), "checkpoints", CODEBOOK_URL.rsplit("/", 1)[1])
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(CODEBOOK_URL, str(path), CODEBOOK_SHA256, progress=False)
        except (OSError, RuntimeError) as error:  # RuntimeError: wrong hash
            raise ValueError(f"{CODEBOOK_URL}: {error}; fetch the codebook where there is a network and give it with "
                             "--codebook FILE, or make one with --pretrain IMAGES") from None
    return path


def read_codebook(path: str | Path) -> dict:
    """The content of a codebook's file, or of the file in the published zip. Nothing is unpacked to disk."""
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith(".pckl"):  # a file of torch.save is a zip too, but has no such member
                        content = torch.load(io.BytesIO(archive.read(name)), map_location="cpu", weights_only=True)
                        return dict(content)
        except Exception:  # a damaged file fails in many ways
            raise ValueError(f"{path}: damaged; delete it and fetch it again from {CODEBOOK_URL}") from None
    return read_weights(path)


def load_codebook(path: str | Path | None = None) -> DiscreteLatentModel:
    """A trained discrete latent model, for RGB. Without a path, the published one. One-line ValueError on failure.

    A file is recognized by its keys: this project's stage 1; the authors' file or its zip, converted from BGR.
    """
    path = fetch_codebook() if path is None else Path(path)
    content = read_codebook(path)
    if "settings" in content:
        state, settings, _ = own_parts(content, "dsr-codebook", path)
    else:
        state = released_latent(content)
        reorder(state, CODEBOOK_CHANNELS)
        settings = latent_settings(state)
    return build(DiscreteLatentModel, settings, state, path).eval()


def authors_files(path: Path) -> dict[str, Path]:
    """The five files of a class by module, given any of them. ValueError if the name fits no pattern.

    The released files are DSR_MODULE_CLASS.pckl. The code's training writes dsr_..._MODULE_CLASS.pckl, but for the
    upsampler dsr_..._upsample.pckl, without a class.
    """
    start, nameless = path.name.removesuffix("_upsample.pckl"), "_upsample.pckl"
    if path.name.endswith(nameless):
        others = sorted(path.parent.glob(f"{start}_image_recon_module_*.pckl"))
        if len(others) != 1:
            raise ValueError(f"{path}: {len(others)} files {start}_image_recon_module_CLASS.pckl are beside it; give "
                             "the one of the class to load")
        path = others[0]
    for kind in AUTHORS_FILES:
        start, found, end = path.name.partition(f"_{kind}_")
        if found:
            files = {module: path.with_name(f"{start}_{other}_{end}") for other, module in AUTHORS_FILES.items()}
            if not files["upsampling_module"].exists() and path.with_name(start + nameless).exists():
                files["upsampling_module"] = path.with_name(start + nameless)
            return files
    raise ValueError(f"{path}: neither this project's checkpoint, nor anomalib's, nor named as the authors' five files "
                     "(DSR_image_recon_module_CLASS.pckl)")


def dsr_model(latent: dict, **knobs) -> DsrModel:
    """A new model from saved settings."""
    return DsrModel(DiscreteLatentModel(**latent), **knobs)


def load(path: str | Path, codebook: str | Path | None = None) -> DsrModel:
    """A trained model in eval mode, for RGB. Raises a one-line ValueError on failure.

    Keys identify this project's last.pt and anomalib's checkpoint. Names identify the authors' five files of a class.
    One of them is given, the others are beside it, and the codebook too if not given. The authors trained on BGR; their
    weights are converted to RGB. anomalib trains on RGB with a BGR codebook; its weights are kept as they are.
    """
    path = Path(path)
    content = read_weights(path)
    if "settings" in content:
        state, settings, reading = own_parts(content, "dsr", path)
    else:
        if "state_dict" in content:
            state = {key.removeprefix("model."): value for key, value in clean(content["state_dict"]).items()}
            latent = released_latent({key.removeprefix(LATENT): value for key, value in state.items()
                                      if key.startswith(LATENT)})
            state = {key: value for key, value in state.items() if key.startswith(tuple(AUTHORS_FILES.values()))}
            reading = anomalib_reading(content, path)
        else:
            files = authors_files(path)
            codebook = Path(codebook or path.with_name(CODEBOOK_FILE))
            if not codebook.exists():
                raise ValueError(f"{codebook}: no such file; give the codebook with --codebook FILE")
            latent = released_latent(read_codebook(codebook))
            reorder(latent, CODEBOOK_CHANNELS)
            state = {f"{module}.{key}": value for module, file in files.items()
                     for key, value in clean(read_weights(file)).items()}
            reorder(state, AUTHORS_CHANNELS)
            reading = {"size": PUBLISHED["size"], "antialias": False}
        # The authors' decoder file may hold unused codebooks.
        state = {key: value for key, value in state.items() if not key.startswith("image_reconstruction_network.vq")}
        first_conv = state.get("anomaly_detection_module.unet.encoder.block1.0.weight")
        width = len(first_conv) if isinstance(first_conv, Tensor) else PUBLISHED["width"]
        settings = {"latent": latent_settings(latent), "width": width}
        state |= {LATENT + key: value for key, value in latent.items()}
    model = build(dsr_model, settings, state, path)
    model.reading = reading
    return model.eval()
