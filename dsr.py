"""DSR: a dual subspace re-projection network for surface anomaly detection.

Paper: Zavrtanik, Kristan, Skočaj, ECCV 2022, arXiv 2208.01521. "The code" is the authors',
VitjanZ/DSR_anomaly_detection @ 672bfb8. It lacks stage 1, which takes the paper's steps here. S1, S2 ... are rows of
README's *Differences*.

An image is encoded with two codebooks, a coarse one (lo) and a fine one (hi), learned from images of all kinds.
Anomalies are simulated by swapping codes. Restriction modules learn to restore the product's normal codes. A detection
module compares the image decoded before this restoration with the image decoded after it. Training has three stages:

    1  DiscreteLatentModel      codebooks and general decoder, on any images
    2  DsrModel.begin(2)        restriction, decoder and detector, on one product's normal images; stage 1 is frozen
    3  DsrModel.begin(3)        the upsampling module, which sharpens the mask, on the same images; the rest is frozen

This file holds, in order: the published settings, simulated anomalies, the discrete latent model, the modules trained
for each product, the model with its training steps, readers for trained weights, and copies of functions of draem.py.
It needs torch alone. Five lines in each step train a stage, here the second:

    model, generator = DsrModel(load_codebook()), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.begin(2))

    optimizer.param_groups[0]["lr"] = learning_rate(step, steps)  # in stages 1 and 3: drops=()
    terms = model.losses(image, generator)  # a new batch in every step
    optimizer.zero_grad()
    sum(terms.values()).backward()
    optimizer.step()

    paper       here               shape                 range
    I           image              (N, 3, H, W)          [0, 1], RGB; H and W multiples of 32, at least 64
    K_lo, K_hi  codebook_lo, _hi   (K, D)                K codes of D values
    F_lo, F_hi  features           as lo, hi             before quantization
    Q_lo        lo; normal_lo      (N, D, H / 8, W / 8)  rows of K_lo; in stage 2 lo is swapped, normal_lo is not
    Q_hi        hi; normal_hi      (N, D, H / 4, W / 4)  rows of K_hi; likewise
    F~_lo, _hi  restricted_lo,_hi  as lo, hi             restored to normal, before quantization
    lambda_s    lambda_s           (N,)                  share of the codebook that a swap may choose from
    M_gt        mask               (N, 1, H, W)          1 = anomalous, 0 = normal, throughout
    I_gen       general            (N, 3, H, W)          decoded by the general appearance decoder
    I_spc       specific           (N, 3, H, W)          decoded by the object-specific decoder
    M           coarse_mask        (N, H, W)             [0, 1], the softmax of coarse (N, 2, H, W)
    -           anomaly_map        (N, H, W)             [0, 1], the softmax of logits (N, 2, H, W), after upsampling
    -           score              (N,)                  [0, 1]

    here              the code and anomalib         here             the code and anomalib
    encoder_lo, _hi   _encoder_t, _encoder_b        general_decoder  _decoder_b
    project_lo, _hi   _pre_vq_conv_top, _bot        upsample_lo      upsample_t
    codebook_lo, _hi  _vq_vae_top, _vq_vae_bot      lambda_s[0]      anom_par; in anomalib latent_anomaly_strength
"""
import fnmatch
import functools
import io
import math
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PUBLISHED = {  # from the paper, where no other source is named
    "size": 256,                    # side of the square images, in pixels (the code)
    "lr": 2e-4,                     # in all stages (4.1); of Adam (the code of stages 2 and 3)
    # stage 1
    "codes": 4096,                  # per codebook, K
    "code_length": 128,             # values per code, D
    "hiddens": 128,                 # width of the encoders and decoders (the released weights)
    "residual_layers": 2,           # of each encoder and decoder (the released weights)
    "residual_hiddens": 64,         # width inside them (the released weights)
    "decay": 0.99,                  # of the codebooks' moving averages (the code)
    "commitment_cost": 0.25,        # weight of the commitment terms (the code)
    "pretrain_steps": 200_000,      # 200k, on ImageNet
    "pretrain_batch": 32,
    # stage 2
    "steps": 100_000,               # 100k; the code has 100 epochs of 8000 samples (S3)
    "batch": 8,                     # of stages 2 and 3 (4.1)
    "drops": (0.8,),                # share of the steps after which lr is multiplied by drop_factor: 80,000
    "drop_factor": 0.1,
    "width": 64,                    # of the detection and upsampling modules' first block (the code)
    "lambda_s": (0.2, 1.0),         # range, sampled for each image and level (the code); a bound in the paper (S4)
    "skipped": 0.05,                # share of nearest codes that a swap leaves out, 5 %: 204 of 4096
    "both_share": 0.5,              # swap both levels; half of the rest lo alone, half hi alone (train_dsr.py:233-266)
    "normal_share": 0.5,            # share of samples that get no anomaly (the code)
    "noise_threshold": 0.5,         # mask = noise > threshold (the code)
    "rotate": 90.0,                 # maximum rotation of normal images, in degrees (the code; S9)
    "rotate_share": 0.4,            # share of normal images that are rotated in stage 2 (the code)
    "reconstruction_lambda": 10.0,  # weight of MSE(I, I_spc)
    # stage 3
    "upsampling_steps": 20_000,     # 20k at a constant rate, a new Adam; the code has 50,000 (epochs // 2; S3)
    "upsampling_rotate_share": 0.3,  # share of normal images rotated in stage 3 (the code)
    "beta": (0.1, 1.0),             # range of the colour's share in a smudge, DRAEM's; DRAEM's and DSR's code: (0.2, 1]
    "window": 21,                   # side of the score's mean filter at 256 x 256 (the code; S10)
}

# --- Simulated anomalies. `generator` gives all random numbers, on its own device -------------------------------------


@torch.no_grad()
def rank_codes(codes: Tensor) -> Tensor:
    """codes (K, D) -> (K, K): row k lists all codes by distance from code k, itself first. 64 MiB for 4096 codes."""
    codes = codes - codes.mean(0)  # for exactness, as in VectorQuantizer.nearest
    norms = codes.square().sum(1)
    distances = (torch.addmm(norms, rows, codes.t(), alpha=-2) for rows in codes.split(512))  # squared, less |rows|^2
    return torch.cat([distance.sort(dim=1, stable=True).indices.int() for distance in distances])


@torch.no_grad()
def sample_codebook_anomalies(index: Tensor, ranked: Tensor, mask: Tensor, lambda_s: Tensor,
                              generator: torch.Generator) -> Tensor:
    """Swap the codes `index` (N, h, w) under mask (N, 1, h, w) for others of the codebook.

    All K codes are sorted by distance. Candidates are the first int(lambda_s * K) + 1 without the first int(0.05 * K),
    all equally likely; lambda_s (N,). The code takes at most the first K - 1 (train_dsr.py:31-45; S4).
    The paper (4.4) and the code sort by distance from the unquantized feature. Here `ranked`, rank_codes(codebook),
    sorts by distance from the position's own code: a swap is a look-up in a table made once.
    """
    count = len(ranked)
    first = int(PUBLISHED["skipped"] * count)
    nearest = (lambda_s * count).floor() + 1
    candidates = (nearest.clamp(first + 1, count) - first).view(-1, 1, 1)  # at least one
    sample = (uniform(generator, 0, 1, *index.shape) * candidates).floor()
    rank = first + torch.minimum(sample, candidates - 1).long()
    return torch.where(mask[:, 0] > 0, ranked[index, rank].long(), index)


@torch.no_grad()
def synthesize_smudges(image: Tensor, generator: torch.Generator, beta: tuple[float, float] = PUBLISHED["beta"],
                       normal_share: float = PUBLISHED["normal_share"]) -> tuple[Tensor, Tensor]:
    """Stage 3: smudged = (1 - mask) * image + (1 - beta) * (mask * image) + beta * (mask * colour)

    Each sample has one random colour, as in the code; the paper's smudges are pasted (3.7; S6). Takes image
    (N, 3, H, W) in [0, 1] on the generator's device; returns smudged, likewise, and mask (N, 1, H, W). beta is sampled
    from its range for each image.
    """
    count, _, height, width = image.shape
    mask = perlin_mask(count, height, width, generator, normal_share, PUBLISHED["noise_threshold"])
    colour = uniform(generator, 0, 1, count, 3, 1, 1)
    beta = uniform(generator, *beta, count, 1, 1, 1)
    return torch.lerp(image, colour, beta * mask), mask


# --- The discrete latent model: a VQ-VAE-2 of two levels (stage 1) ----------------------------------------------------


class VectorQuantizer(nn.Module):
    """A codebook (K, D) that replaces features (N, D, h, w) by their nearest codes.

    A code is ema_w / ema_cluster_size, the exponential moving averages of the sum and the number of its features, as in
    the code. They stand for Eq. (2)'s gradient term for the codes. Only `forward` in training mode changes the codes.
    """

    def __init__(self, codes: int, code_length: int):
        super().__init__()
        self.embedding = nn.Embedding(codes, code_length).requires_grad_(False)
        self.ema_w = nn.Parameter(torch.randn(codes, code_length), requires_grad=False)
        self.register_buffer("ema_cluster_size", torch.zeros(codes))

    @torch.no_grad()
    def nearest(self, features: Tensor) -> Tensor:
        """(N, D, h, w) -> (N, h, w): argmin over codes of ||feature - code||^2 - ||feature||^2."""
        with torch.autocast(features.device.type, enabled=False):
            mean = self.embedding.weight.mean(0)  # not subtracted, rounding would decide between close codes
            codes = self.embedding.weight - mean
            norms = codes.square().sum(1)
            rows = features.float().movedim(1, -1) - mean  # (N, h, w, D)
            shape = rows.shape[:3]
            rows = rows.flatten(0, 2)
            in_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()  # may not depend on the batch's size
            # To 4096 codes, 8 MiB of distances stay in a CPU's cache (30 % less time); 512 MiB bound a GPU's memory.
            parts = (rows,) if in_graph else rows.split(2 ** 15 if rows.is_cuda else 512)
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
        batch and K codes. This is not from the paper; the code has no stage 1 (S2).
        """
        sampled = rows[torch.randint(len(rows), self.ema_cluster_size.shape, generator=generator, device=rows.device)]
        least = 0.1 * min(1, len(rows) / len(sampled))
        alive = self.ema_cluster_size >= least
        self.ema_cluster_size.copy_(torch.where(alive, self.ema_cluster_size, 2 * least))
        self.ema_w.copy_(torch.where(alive[:, None], self.ema_w, 2 * least * sampled))
        self.embedding.weight.copy_(torch.where(alive[:, None], self.embedding.weight, sampled))


class Named(nn.Sequential):
    """Layers in sequence, under their names in the authors' files.

    A network has a `forward` of its own, because torch.compile keeps at most eight graphs of a function.
    """

    def __init__(self, **layers: nn.Module):
        super().__init__(OrderedDict(layers))


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


class ResidualStack(Named):
    def __init__(self, channels: int, layers: int, hidden: int):
        super().__init__(layers=nn.Sequential(*(Residual(channels, hidden) for _ in range(layers))), relu=nn.ReLU())


halving_conv = functools.partial(nn.Conv2d, kernel_size=4, stride=2, padding=1)  # of height and width
doubling_conv = functools.partial(nn.ConvTranspose2d, kernel_size=4, stride=2, padding=1)


class EncoderHi(Named):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image)  # (N, 3, H, W) -> (N, hiddens, H / 4, W / 4)


class EncoderLo(Named):
    def forward(self, encoded: Tensor) -> Tensor:
        return super().forward(encoded)  # (N, hiddens, H / 4, W / 4) -> (N, hiddens, H / 8, W / 8)


class GeneralDecoder(Named):
    def forward(self, joined: Tensor) -> Tensor:
        return super().forward(joined)  # (N, 2 D, H / 4, W / 4) -> (N, 3, H, W)


class DiscreteLatentModel(nn.Module):
    """Both encoders, both codebooks and the general appearance decoder. `settings` holds the arguments."""

    def __init__(self, hiddens: int = PUBLISHED["hiddens"], residual_layers: int = PUBLISHED["residual_layers"],
                 residual_hiddens: int = PUBLISHED["residual_hiddens"], codes: int = PUBLISHED["codes"],
                 code_length: int = PUBLISHED["code_length"]):
        super().__init__()
        self.settings = dict(hiddens=hiddens, residual_layers=residual_layers, residual_hiddens=residual_hiddens,
                             codes=codes, code_length=code_length)
        self.preprocessing = {}  # this project's arguments of common.read_image for the training images; {}: unknown
        residual = hiddens, residual_layers, residual_hiddens
        self.encoder_lo = EncoderLo(conv_1=halving_conv(hiddens, hiddens), relu_1=nn.ReLU(),
                                    conv_2=nn.Conv2d(hiddens, hiddens, 3, padding=1), relu_2=nn.ReLU(),
                                    residual_stack=ResidualStack(*residual))
        self.encoder_hi = EncoderHi(conv_1=halving_conv(3, hiddens // 2), relu_1=nn.ReLU(),
                                    conv_2=halving_conv(hiddens // 2, hiddens), relu_2=nn.ReLU(),
                                    conv_3=nn.Conv2d(hiddens, hiddens, 3, padding=1),
                                    residual_stack=ResidualStack(*residual))
        self.project_lo = nn.Conv2d(hiddens, code_length, 1)
        self.project_hi = nn.Conv2d(hiddens + code_length, code_length, 1)
        self.codebook_lo = VectorQuantizer(codes, code_length)
        self.codebook_hi = VectorQuantizer(codes, code_length)
        self.general_decoder = GeneralDecoder(conv_1=nn.Conv2d(2 * code_length, hiddens, 3, padding=1),
                                              residual_stack=ResidualStack(*residual),
                                              conv_trans_1=doubling_conv(hiddens, hiddens // 2), relu=nn.ReLU(),
                                              conv_trans_2=doubling_conv(hiddens // 2, 3))
        self.upsample_lo = doubling_conv(code_length, code_length)

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
        return {"reconstruction": F.mse_loss(self.decode(lo, hi), image),
                "commitment_lo": commitment_lo, "commitment_hi": commitment_hi}


# --- The modules trained for each product; attribute names are the authors' -------------------------------------------


class InstanceNorm(nn.Module):
    """(x - mean) / sqrt(variance + 1e-5) over each sample's channel, in every mode; no parameters."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or torch.compiler.is_compiling() or torch.jit.is_tracing():
            # instance_norm returns a view. If the next ReLU wrote into it, autograd would copy it all: 2.2 GiB a step.
            return F.instance_norm(x).contiguous(memory_format=torch.channels_last)
        # Batch norm of one sample needs no copies out of channels_last and back: 16 to 28 % of a step less on a CPU.
        return torch.cat([F.batch_norm(sample, None, None, training=True) for sample in x.split(1)])


def normed_convs(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, hidden, 3, padding=1), InstanceNorm(), nn.ReLU(inplace=True),
                         nn.Conv2d(hidden, outputs, 3, padding=1), InstanceNorm(), nn.ReLU(inplace=True))


def normed_up(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
                         nn.Conv2d(inputs, outputs, 3, padding=1), InstanceNorm(), nn.ReLU(inplace=True))


class SubspaceRestrictionModule(Named):
    """Maps features (N, w, height, width) to the product's normal ones. Skips would let anomalies through.

    It has two poolings, as in the code, so that released weights fit; the paper has three (3.3, figure; S7).
    """

    def __init__(self, w: int):
        encoder = Named(block1=normed_convs(w, w, w), pool_1=nn.MaxPool2d(2),
                        block2=normed_convs(w, 2 * w, 2 * w), pool_2=nn.MaxPool2d(2),
                        block3=normed_convs(2 * w, 4 * w, 4 * w))  # (N, 4w, height / 4, width / 4)
        decoder = Named(up2=normed_up(4 * w, 2 * w), db2=normed_convs(2 * w, 2 * w, 2 * w),
                        up3=normed_up(2 * w, w), db3=normed_convs(w, w, w),
                        fin_out=nn.Sequential(nn.Conv2d(w, w, 3, padding=1)))
        super().__init__(unet=Named(encoder=encoder, decoder=decoder))

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features)


class AnomalyDetectionModule(nn.Module):
    """A U-Net: specific image, general image, (N, 3, H, W) each -> logits (N, 2, H, W).

    The upsampling module is one too. Its third input is the coarse mask's softmax (N, 2, H, W), so it has 8 channels.
    """

    def __init__(self, in_channels: int = 6, w: int = PUBLISHED["width"]):
        super().__init__()
        encoder = nn.ModuleDict(dict(
            block1=normed_convs(in_channels, w, w), block2=normed_convs(w, 2 * w, 2 * w),
            block3=normed_convs(2 * w, 4 * w, 4 * w), block4=normed_convs(4 * w, 4 * w, 4 * w)))
        decoder = nn.ModuleDict(dict(
            up1=normed_up(4 * w, 4 * w), db1=normed_convs(8 * w, 4 * w, 4 * w),
            up2=normed_up(4 * w, 2 * w), db2=normed_convs(4 * w, 2 * w, 2 * w),
            up3=normed_up(2 * w, w), db3=normed_convs(2 * w, w, w),
            fin_out=nn.Sequential(nn.Conv2d(w, 2, 3, padding=1))))
        self.unet = nn.ModuleDict(dict(encoder=encoder, decoder=decoder))

    def forward(self, *inputs: Tensor) -> Tensor:
        encoder, decoder = self.unet.encoder, self.unet.decoder
        b1 = encoder.block1(torch.cat(inputs, 1))  # (N, w, H, W)
        b2 = encoder.block2(F.max_pool2d(b1, 2))
        b3 = encoder.block3(F.max_pool2d(b2, 2))
        x = encoder.block4(F.max_pool2d(b3, 2))  # (N, 4w, H / 8, W / 8)
        x = decoder.db1(torch.cat((decoder.up1(x), b3), 1))
        x = decoder.db2(torch.cat((decoder.up2(x), b2), 1))
        x = decoder.db3(torch.cat((decoder.up3(x), b1), 1))
        return decoder.fin_out(x)


class ImageReconstructionNetwork(Named):
    """The object-specific decoder: (N, in_channels, H / 4, W / 4) -> image (N, 3, H, W). Bottleneck at H / 16."""

    def __init__(self, in_channels: int, hiddens: int, residual_layers: int, residual_hiddens: int):
        super().__init__(block1=normed_convs(in_channels, in_channels, 2 * in_channels), pool_1=nn.MaxPool2d(2),
                         block2=normed_convs(2 * in_channels, 2 * in_channels, 4 * in_channels), pool_2=nn.MaxPool2d(2),
                         pre_vq_conv=nn.Conv2d(4 * in_channels, 64, 1),
                         upblock1=doubling_conv(64, 64), relu_1=nn.ReLU(),
                         upblock2=doubling_conv(64, 64), relu_2=nn.ReLU(),
                         conv_1=nn.Conv2d(64, hiddens, 3, padding=1),
                         residual_stack=ResidualStack(hiddens, residual_layers, residual_hiddens),
                         conv_trans_1=doubling_conv(hiddens, hiddens // 2), relu_3=nn.ReLU(),
                         conv_trans_2=doubling_conv(hiddens // 2, 3))

    def forward(self, joined: Tensor) -> Tensor:
        return super().forward(joined)


# --- The model --------------------------------------------------------------------------------------------------------


class DsrModel(nn.Module):
    """All of DSR: 40.3 million parameters, of which 36.3 are trained for each product; 128.0 GMAC at 256 x 256.

    latent: stage 1's model or its settings, by default a new one. width: of the detection and upsampling modules.
    lambda_s and rotate are for `losses`, see PUBLISHED. `settings` holds all four, to be saved with the weights.
    """

    def __init__(self, latent: DiscreteLatentModel | dict | None = None, width: int = PUBLISHED["width"],
                 lambda_s: tuple[float, float] = PUBLISHED["lambda_s"], rotate: float = PUBLISHED["rotate"]):
        super().__init__()
        if not isinstance(latent, DiscreteLatentModel):
            latent = DiscreteLatentModel(**latent or {})
        sizes = latent.settings
        self.settings = dict(latent=sizes, width=width, lambda_s=tuple(lambda_s), rotate=rotate)
        self.preprocessing = {}  # this project's arguments of common.read_image for the training images; {}: unknown
        self.lambda_s, self.rotate = tuple(lambda_s), rotate
        self.discrete_latent_model = latent
        self.subspace_restriction_module_lo = SubspaceRestrictionModule(sizes["code_length"])
        self.subspace_restriction_module_hi = SubspaceRestrictionModule(sizes["code_length"])
        self.image_reconstruction_network = ImageReconstructionNetwork(
            2 * sizes["code_length"], sizes["hiddens"], sizes["residual_layers"], sizes["residual_hiddens"])
        self.anomaly_detection_module = AnomalyDetectionModule(w=width)
        self.upsampling_module = AnomalyDetectionModule(8, width)
        for module in (*self.image_reconstruction_network.modules(), *self.anomaly_detection_module.modules()):
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(module.weight, 0, 0.02)  # the code's initial weights (train_dsr.py:179, 189; S11)
        self.stage = None  # 2 or 3, set by begin
        self.register_buffer("ranked_lo", None, persistent=False)  # rank_codes of both codebooks in stage 2
        self.register_buffer("ranked_hi", None, persistent=False)

    def begin(self, stage: int) -> list[nn.Parameter]:
        """Freeze all but stage 2's or 3's modules and return their parameters. Stage 2 also ranks the present codes."""
        if stage not in (2, 3):
            raise ValueError(f"stage {stage}: 2 (detection) or 3 (upsampling) is needed; 1 is DiscreteLatentModel's")
        latent, *detection, upsampling = self.children()  # in __init__'s order; detection: the four of stage 2
        trained = detection if stage == 2 else [upsampling]
        self.stage = stage
        self.training = True  # so that predict asks for eval mode
        for module in self.children():
            module.train(module in trained).requires_grad_(module in trained)
        self.ranked_lo = rank_codes(latent.codebook_lo.embedding.weight) if stage == 2 else None
        self.ranked_hi = rank_codes(latent.codebook_hi.embedding.weight) if stage == 2 else None
        return [parameter for module in trained for parameter in module.parameters()]

    @torch.no_grad()
    def simulate(self, image: Tensor, generator: torch.Generator,
                 normal_share: float = PUBLISHED["normal_share"]) -> dict[str, Tensor]:
        """What a step of stage 2 shows the networks, after begin(2): a share of the images rotated, then codes swapped.

        Returns image, where rotated with black corners; general, decoded from the swapped codes; mask (N, 1, H, W), the
        target; lo and hi, swapped; normal_lo and normal_hi, the image's. Codes are swapped under a Perlin mask
        (S5), max-pooled to each level's size. Three cases, as in the code (train_dsr.py:233-266). Both: lo is swapped;
        F_hi is computed from the swapped lo, quantized and swapped. Lo alone: lo is swapped; hi is the image's. Hi
        alone: its hi is swapped. The target has lo's resolution where lo was swapped, else hi's, enlarged to H x W.
        """
        if self.ranked_lo is None:
            raise RuntimeError("simulate needs both codebooks ranked: call model.begin(2) first")
        count, _, height, width = image.shape
        latent = self.discrete_latent_model
        image = rotate_normals(image, generator, self.rotate, PUBLISHED["rotate_share"])
        mask = perlin_mask(count, height, width, generator, normal_share, PUBLISHED["noise_threshold"])
        mask_lo, mask_hi = F.max_pool2d(mask, 8), F.max_pool2d(mask, 4)
        lambda_lo, lambda_hi = uniform(generator, *self.lambda_s, 2, count)
        case = uniform(generator, 0, 1, count, 1, 1, 1)
        both = case < PUBLISHED["both_share"]
        lo_alone = ~both & (case < (1 + PUBLISHED["both_share"]) / 2)
        swap_lo = both | lo_alone

        encoded, features = latent.encode_lo(image)
        index_lo = latent.codebook_lo.nearest(features)
        normal_lo = latent.codebook_lo.lookup(index_lo)
        swapped = sample_codebook_anomalies(index_lo, self.ranked_lo, mask_lo * swap_lo, lambda_lo, generator)
        lo = latent.codebook_lo.lookup(swapped)

        index_hi = latent.codebook_hi.nearest(latent.encode_hi(encoded, normal_lo))
        normal_hi = latent.codebook_hi.lookup(index_hi)
        index_from_swapped = latent.codebook_hi.nearest(latent.encode_hi(encoded, lo))
        index_hi = torch.where(both[:, 0], index_from_swapped, index_hi)
        swapped = sample_codebook_anomalies(index_hi, self.ranked_hi, mask_hi * ~lo_alone, lambda_hi, generator)
        hi = latent.codebook_hi.lookup(swapped)
        target = torch.where(swap_lo, F.interpolate(mask_lo, scale_factor=8), F.interpolate(mask_hi, scale_factor=4))
        return {"image": image, "general": latent.decode(lo, hi), "mask": target,
                "lo": lo, "hi": hi, "normal_lo": normal_lo, "normal_hi": normal_hi}

    def detect(self, lo: Tensor, hi: Tensor, general: Tensor) -> dict[str, Tensor]:
        """From Q_lo and Q_hi, swapped or not, and their decoded image: restricted_lo, restricted_hi, specific, coarse.

        The detector's inputs are detached, so the focal loss does not reach the decoder (S1). In DRAEM it does.
        """
        latent = self.discrete_latent_model
        restricted_lo = self.subspace_restriction_module_lo(lo)
        restricted_hi = self.subspace_restriction_module_hi(hi)
        specific = self.image_reconstruction_network(
            latent.join(latent.codebook_lo.quantize(restricted_lo), latent.codebook_hi.quantize(restricted_hi)))
        coarse = self.anomaly_detection_module(specific.detach(), general.detach())
        return {"restricted_lo": restricted_lo, "restricted_hi": restricted_hi, "specific": specific, "coarse": coarse}

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """general, specific; coarse, the logits of the coarse mask, and logits, those of the upsampled one."""
        lo, hi = self.discrete_latent_model.quantize(image)
        general = self.discrete_latent_model.decode(lo, hi)
        found = self.detect(lo, hi, general)
        specific, coarse = found["specific"], found["coarse"]
        logits = self.upsampling_module(specific.detach(), general.detach(), coarse.detach().float().softmax(1))
        return {"general": general, "specific": specific, "coarse": coarse, "logits": logits}

    def losses(self, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The terms of the stage set by begin. image (N, 3, H, W) in [0, 1], on the device of generator and model."""
        if self.stage is None:
            raise RuntimeError("losses are those of a stage: call model.begin(2) or model.begin(3) first")
        return self.detection_losses(image, generator) if self.stage == 2 else self.upsampling_losses(image, generator)

    def detection_losses(self, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Stage 2: focal + MSE(restricted_hi, normal_hi) + MSE(restricted_lo, normal_lo) + 10 MSE(specific, image)"""
        shown = self.simulate(image, generator)
        found = self.detect(shown["lo"], shown["hi"], shown["general"])
        return {"focal": focal_loss(found["coarse"], shown["mask"]),
                "restriction_hi": F.mse_loss(found["restricted_hi"], shown["normal_hi"]),
                "restriction_lo": F.mse_loss(found["restricted_lo"], shown["normal_lo"]),
                "reconstruction": PUBLISHED["reconstruction_lambda"] * F.mse_loss(found["specific"], shown["image"])}

    def upsampling_losses(self, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Stage 3: focal loss on images with smudges, at the image's full size."""
        image = rotate_normals(image, generator, self.rotate, PUBLISHED["upsampling_rotate_share"])
        smudged, mask = synthesize_smudges(image, generator)
        return {"focal": focal_loss(self(smudged)["logits"], mask)}

    @torch.no_grad()
    def predict(self, image: Tensor, window: int | None = None) -> dict[str, Tensor]:
        """score (N,), the maximum of the window x window mean of coarse_mask (before upsampling), with zero padding.

        image (N, 3, H, W) in [0, 1], else ValueError. Also returns anomaly_map and coarse_mask (N, H, W), and general
        and specific, the two images (N, 3, H, W) that the detection module compares. window is odd; by default 21 at
        256 x 256, as in the code, and in proportion at other sizes (S10).
        """
        if self.training:
            raise RuntimeError("predict needs a model in eval mode: call model.eval() first")
        found = self(check_image(image, 64))
        coarse_mask = found["coarse"].float().softmax(1)[:, 1]
        anomaly_map = found["logits"].float().softmax(1)[:, 1]
        return {"score": mean_filter_maximum(coarse_mask, window), "anomaly_map": anomaly_map,
                "general": found["general"], "specific": found["specific"], "coarse_mask": coarse_mask}


# --- Weights ----------------------------------------------------------------------------------------------------------

CODEBOOK_URL = ("https://github.com/open-edge-platform/anomalib/releases/download/dsr_pretrained_weights/"
                "dsr_vq_model_pretrained.zip")
CODEBOOK_SHA256 = "52fe7504ec8e9df70b4382f287ab26269dcfe000cd7a7e146a52c6f146f34afb"
CODEBOOK_FILE = "vq_model_pretrained_128_4096.pckl"  # the authors' name, also inside the zip

# Parts of released names -> the names here. All others lose their leading underscores.
RELEASED = {"_encoder_t": "encoder_lo", "_encoder_b": "encoder_hi", "_pre_vq_conv_top": "project_lo",
            "_pre_vq_conv_bot": "project_hi", "_vq_vae_top": "codebook_lo", "_vq_vae_bot": "codebook_hi",
            "_decoder_b": "general_decoder", "upsample_t": "upsample_lo"}
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


def renamed(state: dict) -> dict:
    """Released weights under the names here."""
    return {".".join(RELEASED.get(part, part.lstrip("_")) for part in str(key).split(".")): value
            for key, value in state.items()}


def latent_settings(state: dict, path: str | Path, prefix: str = "") -> dict:
    """The sizes of a released discrete latent model, from the shapes of its tensors."""
    blocks = fnmatch.filter(state, prefix + "encoder_hi.residual_stack.layers.*.block.1.weight")
    try:
        codes, code_length = state[prefix + "codebook_lo.embedding.weight"].shape
        residual_hiddens, hiddens = state[blocks[0]].shape[:2]
    except (AttributeError, IndexError, KeyError, ValueError):
        raise ValueError(f"{path}: no discrete latent model; {CODEBOOK_FILE} and anomalib's Dsr have one") from None
    return dict(hiddens=hiddens, residual_layers=len(blocks), residual_hiddens=residual_hiddens, codes=codes,
                code_length=code_length)


def fetch_codebook() -> Path:
    """The published codebook's zip in torch.hub's cache. If absent, a hash-checked download. ValueError on failure."""
    path = Path(torch.hub.get_dir(), "checkpoints", CODEBOOK_URL.rsplit("/", 1)[1])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
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
                for name in fnmatch.filter(archive.namelist(), "*.pckl"):  # a file of torch.save is a zip without one
                    return dict(torch.load(io.BytesIO(archive.read(name)), map_location="cpu", weights_only=True))
        except Exception:  # a damaged file fails in many ways
            raise ValueError(f"{path}: damaged; delete it and fetch it again from {CODEBOOK_URL}") from None
    return read_weights(path)


def load_codebook(path: str | Path | None = None) -> DiscreteLatentModel:
    """A trained discrete latent model in eval mode, for RGB. By default the published one. ValueError, one line.

    A file is recognized by its keys: this project's stage 1; the authors' file or its zip, converted from BGR.
    """
    path = fetch_codebook() if path is None else Path(path)
    content, preprocessing = read_codebook(path), {}
    if "method" in content:
        state, settings, preprocessing = own_checkpoint(content, "dsr-codebook", path)
    else:
        state = reorder(renamed(content), CODEBOOK_CHANNELS)
        settings = latent_settings(state, path)
    model = build(DiscreteLatentModel, settings, state, path)
    model.preprocessing = preprocessing
    return model


def authors_files(path: Path) -> dict[str, Path]:
    """The five files of a class by module, given any of them. ValueError unless they are those of one class.

    The released files are DSR_MODULE_CLASS.pckl. The code's training writes RUN_MODULE_CLASS.pckl, but for the
    upsampler RUN__upsample.pckl, without a class (train_dsr.py:59, 140).
    """
    found = []
    for decoder in sorted(path.parent.glob("*_image_recon_module_*.pckl")):
        run, _, end = decoder.name.partition("_image_recon_module_")
        files = {module: path.with_name(f"{run}_{kind}_{end}") for kind, module in AUTHORS_FILES.items()}
        if not files["upsampling_module"].exists():
            files["upsampling_module"] = path.with_name(f"{run}__upsample.pckl")
        if path in files.values():
            found.append(files)
    if len(found) != 1:
        raise ValueError(f"{path}: neither this project's checkpoint, nor anomalib's, nor named as the authors' five "
                         f"files (DSR_image_recon_module_CLASS.pckl): it fits {len(found)} such classes beside it")
    return found[0]


def load(path: str | Path, codebook: str | Path | None = None) -> DsrModel:
    """A trained model in eval mode, for RGB. ValueError, one line, on failure.

    Keys identify this project's last.pt and anomalib's checkpoint. Names identify the authors' five files of a class:
    one is given, the others are beside it, and the codebook too if not given. The authors trained on BGR; their weights
    are converted to RGB. anomalib trains on RGB with a BGR codebook; its weights are kept as they are (S8).
    """
    path = Path(path)
    content = read_weights(path)
    preprocessing = {"size": PUBLISHED["size"], "antialias": False}  # the authors', whatever the default here
    if "method" in content:
        state, settings, preprocessing = own_checkpoint(content, "dsr", path)
    elif isinstance(content.get("state_dict"), dict):
        parts = tuple(f"model.{module}." for module in ("discrete_latent_model", *AUTHORS_FILES.values()))
        state = {key.removeprefix("model."): value for key, value in renamed(content["state_dict"]).items()
                 if key.startswith(parts)}
        preprocessing = anomalib_preprocessing(content, path)
    else:
        files = authors_files(path)
        codebook = Path(codebook or path.with_name(CODEBOOK_FILE))
        if not codebook.exists():
            raise ValueError(f"{codebook}: no such file; give the codebook with --codebook FILE")
        latent = reorder(renamed(read_codebook(codebook)), CODEBOOK_CHANNELS)
        state = {LATENT + key: value for key, value in latent.items()}
        for module, file in files.items():
            state |= {f"{module}.{key}": value for key, value in renamed(read_weights(file)).items()}
        state = reorder(state, AUTHORS_CHANNELS)
    if "method" not in content:  # a released file: settings from its shapes
        unused = "image_reconstruction_network.vq", "image_reconstruction_network.codebook"  # in some decoders' files
        state = {key: value for key, value in state.items() if not key.startswith(unused)}
        first_conv = state.get("anomaly_detection_module.unet.encoder.block1.0.weight", ())
        settings = {"latent": latent_settings(state, path, LATENT), "width": len(first_conv)}
    model = build(DsrModel, settings, state, path)
    model.preprocessing = preprocessing
    return model


# --- Copies of functions in draem.py, which says more of them ---------------------------------------------------------


# Copied from draem.learning_rate
def learning_rate(step: int, steps: int, lr: float = PUBLISHED["lr"], drops: tuple = PUBLISHED["drops"]) -> float:
    """The rate of step 0, 1, ... of `steps`: lr, multiplied by drop_factor after each share of the steps in drops."""
    return lr * PUBLISHED["drop_factor"] ** sum(step >= round(steps * drop) for drop in drops)


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


# Copied from draem.rotated_grid
def rotated_grid(height: int, width: int, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel coordinates y, x (N, height, width), rotated about the image's centre by angle (N,), in radians."""
    y = torch.arange(height, device=angle.device).view(1, -1, 1) - (height - 1) / 2
    x = torch.arange(width, device=angle.device).view(1, 1, -1) - (width - 1) / 2
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    return cos * y - sin * x + (height - 1) / 2, sin * y + cos * x + (width - 1) / 2


# Copied from draem.perlin_noise
def perlin_noise(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """`count` independent noise images (count, height, width), of any size.

    As in DRAEM's code (data_loader.py), each side of the lattice has 2^0 to 2^5 cells, sampled independently. The noise
    is rotated by up to 90 degrees about the centre; pixels from outside are 0. The code rotates the finished picture,
    which blurs it. Here the coordinates are rotated (D7).
    """
    device = generator.device
    cells = 2.0 ** torch.randint(0, 6, (2, count, 1, 1), generator=generator, device=device)
    angles = uniform(generator, 0, 2 * math.pi, count, 33, 33)  # of the gradients; 32 cells have 33 corners a side
    y, x = rotated_grid(height, width, uniform(generator, -math.pi / 2, math.pi / 2, count))
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
    """Rotate each sample clockwise about its centre by its own angle (N,). Bilinear; pixels from outside are black."""
    height, width = image.shape[2:]
    y, x = rotated_grid(height, width, degrees.deg2rad())
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), -1)  # (N, H, W, 2), in [-1, 1]
    return F.grid_sample(image, grid, align_corners=False)


# Copied from draem.rotate_normals
def rotate_normals(image: Tensor, generator: torch.Generator, degrees: float, share: float) -> Tensor:
    """Rotate a share of the normal images, each by its own angle of up to +-degrees. Targets are rotated too."""
    chosen = uniform(generator, 0, 1, len(image)) < share
    return apply_where(chosen, rotate, image, uniform(generator, -degrees, degrees, len(image)))


# Copied from draem.perlin_mask
def perlin_mask(count: int, height: int, width: int, generator: torch.Generator, normal_share: float,
                threshold: float) -> Tensor:
    """Masks (count, 1, height, width): noise > threshold, empty for `normal_share` of the samples."""
    anomalous = uniform(generator, 0, 1, count, 1, 1) >= normal_share
    return ((perlin_noise(count, height, width, generator) > threshold) & anomalous)[:, None].float()


# Copied from draem.focal_loss
def focal_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Focal loss = mean over pixels of -(1 - p)^2 log p, p the softmax probability of the pixel's true class.

    logits (N, 2, H, W), mask (N, 1, H, W) of 0 and 1. As in DRAEM's loss.py, gamma is 2 and no class is weighted (D1).
    Labels are smoothed by 1e-5: p = (1 - 1e-5) p_true + 1e-5 p_other + 1e-5. This also keeps log p finite.
    """
    with torch.autocast(logits.device.type, enabled=False):
        p_true = logits.float().softmax(1).gather(1, mask.long())
        p = (1 - 2e-5) * p_true + 2e-5  # p_other = 1 - p_true
        return (-(1 - p) ** 2 * p.log()).mean()


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
    if image.ndim != 4 or image.shape[1] != 3 or not len(image) or not image.is_floating_point():
        raise ValueError(f"image: RGB floats (N, 3, H, W) are needed, found {tuple(image.shape)}, {image.dtype}")
    if image.shape[2] % 32 or image.shape[3] % 32 or min(image.shape[2:]) < least:
        raise ValueError(f"image: sides of {least} or more, in steps of 32, are needed, found {tuple(image.shape[2:])}")
    low, high = (value.item() for value in image.float().aminmax())
    if not -1e-3 <= low <= high <= 1.001:
        raise ValueError(f"image: values in [0, 1] are needed, not normalized ones, found {low:g} to {high:g}")
    return image.float()


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


# Copied from draem.build
def build(kind, settings: dict, state: dict, path: str | Path) -> nn.Module:
    """kind(**settings) in eval mode with the weights `state`. ValueError, one line, unless they fit and are finite."""
    try:
        model = kind(**settings)
        model.load_state_dict(state)
    except Exception as error:  # unknown settings, other keys or shapes, values that are no tensors
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: does not fit {kind.__name__}: {reason[:300]}") from None
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise ValueError(f"{path}: holds NaN or infinity; the training that wrote it diverged")
    return model.eval()


# Copied from draem.own_checkpoint
def own_checkpoint(content: dict, method: str, path: str | Path) -> list[dict]:
    """Weights, settings and preprocessing of this project's checkpoint. ValueError if it is another method's."""
    if content["method"] != method:
        raise ValueError(f"{path}: a checkpoint of {content['method']}, not of {method}")
    return [content.get(name, {}) for name in ("model", "settings", "preprocessing")]


# Copied from draem.reorder
def reorder(state: dict, channels) -> dict:
    """`state` reordered by channels' (key, dimension, order). What is missing or has another size is left to build."""
    return state | {key: state[key].index_select(dimension, torch.tensor(order)) for key, dimension, order in channels
                    if getattr(state.get(key), "shape", ())[dimension:dimension + 1] == (len(order),)}


# Copied from draem.anomalib_preprocessing
def anomalib_preprocessing(content: dict, path: str | Path) -> dict:
    """The Resize that a checkpoint of 2.7.0 holds; older ones of 2 hold none. ValueError unless it is square."""
    transform = (content.get("anomalib_pre_processor_config") or {}).get("transform") or {}
    for step in transform.get("init_args", {}).get("transforms", [transform]):
        if step.get("class_path", "").endswith(".Resize"):
            size, antialias = step["init_args"]["size"], bool(step["init_args"].get("antialias", True))
            if not isinstance(size, int) and len(set(size)) != 1:
                raise ValueError(f"{path}: was trained on images of {size}; only square ones are read")
            return {"size": size if isinstance(size, int) else size[0], "antialias": antialias}
    print(f"{path}: holds no image size; 256 x 256, antialiased, is assumed", file=sys.stderr)
    return {"size": 256, "antialias": True}


if __name__ == "__main__":  # python dsr.py: the shape of every block's output
    model = DsrModel().eval()
    for name, block in model.named_modules():
        layer = any(part.isdigit() for part in name.split("."))
        if isinstance(block, (nn.Sequential, nn.Conv2d, nn.ConvTranspose2d)) and not layer:
            block.register_forward_hook(lambda _, __, output, name=name: print(f"{name:54} {tuple(output.shape)}"))
    model.predict(torch.rand(1, 3, PUBLISHED["size"], PUBLISHED["size"]))
