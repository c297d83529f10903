"""DRAEM: a discriminatively trained reconstruction embedding for surface anomaly detection.

Paper: Zavrtanik, Kristan, Skočaj, ICCV 2021, arXiv 2108.07610. "The code" is the authors', VitjanZ/DRAEM @ 2dbf673.
SSPCAB, an optional block: Ristea et al., CVPR 2022, arXiv 2111.09099; code ristea/sspcab @ 07d416c.

One network reconstructs a product's image without its anomalies. A second network compares the image with the
reconstruction and segments the anomalies. Both are trained on normal images, with new anomalies simulated in every
step. This file needs torch alone. It holds, in order: settings and schedule, simulated anomalies, losses, the networks,
the model with its training step, ten texture augmentations, weights. D1, D2 ... are rows of README's *Differences*.
Five lines in each step train it:

    model, generator = DraemModel().train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters())

    optimizer.param_groups[0]["lr"] = learning_rate(step, steps)
    terms = model.losses(image, texture, generator)  # a new batch in every step
    optimizer.zero_grad()
    sum(terms.values()).backward()
    optimizer.step()

    paper  here             train_DRAEM.py    shape           range
    I      image            gray_batch        (N, 3, H, W)    [0, 1], RGB; H and W multiples of 32
    P      noise            -                 (N, H, W)       about [-1, 1]
    M_a    mask             anomaly_mask      (N, 1, H, W)    1 = anomalous, 0 = normal, throughout
    A      texture          -                 (N, 3, H, W)    [0, 1], RGB; any unrelated images
    beta   beta             -                 (N, 1, 1, 1)    share of the texture in the blend; the code's is 1 - beta
    I_a    augmented        aug_gray_batch    (N, 3, H, W)    [0, 1], the image with anomalies blended in
    I_r    reconstruction   gray_rec          (N, 3, H, W)    about [0, 1]
    -      logits           out_mask          (N, 2, H, W)    from (I_r, I_a), which the code calls joined_in
    M_o    anomaly_map      out_mask_sm       (N, H, W)       [0, 1], the second channel of the softmax of logits
    eta    score            -                 (N,)            [0, 1]
"""
import math
import sys
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PUBLISHED = {  # the paper's implementation details, where no other source is named
    "size": 256,              # side of the square images, in pixels (the code)
    "batch": 8,               # images per step (the code)
    "epochs": 700,            # of ceil(images / batch) full batches; with replacement, as in the code (D11)
    "lr": 1e-4,               # of Adam, the code's optimizer
    "drops": (4 / 7, 6 / 7),  # shares of the training after which lr drops: after 400 and 600 epochs
    "drop_factor": 0.1,       # of lr at each drop; the code has 0.2, after 0.8 and 0.9 (train_DRAEM.py:47; D2)
    "width": 128,             # channels of the reconstructive sub-network's first block; the other has half (the code)
    "rotate": 45.0,           # maximum rotation of normal images, in degrees; the code has 90 (D5)
    "rotate_share": 0.3,      # share of normal images that are rotated (the code)
    "normal_share": 0.5,      # share of samples that get no anomaly (the code)
    "noise_threshold": 0.5,   # mask = noise > threshold (the code); section 3.3 samples the threshold uniformly (D7)
    "beta": (0.1, 1.0),       # range of the texture's share in the blend (section 3.3); the code's is (0.2, 1] (D6)
    "augmentations": 3,       # number applied to each texture (section 3.3)
    "ssim_lambda": 1.0,       # weight of L_SSIM in Eq. (2) (the code)
    "sspcab_lambda": 0.1,     # weight of SSPCAB's own loss (2111.09099)
    "window": 21,             # side of the score's mean filter at 256 x 256 (test_DRAEM.py:105; D10)
}


def learning_rate(step: int, steps: int, lr: float = PUBLISHED["lr"], drops: tuple = PUBLISHED["drops"]) -> float:
    """The rate of step 0, 1, ... of `steps`: lr, multiplied by drop_factor after each share of the steps in drops."""
    return lr * PUBLISHED["drop_factor"] ** sum(step >= round(steps * drop) for drop in drops)


# --- Simulated anomalies (section 3.3). `generator` gives all random numbers, on its own device -----------------------

def uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


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


def rotated_grid(height: int, width: int, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel coordinates y, x (N, height, width), rotated about the image's centre by angle (N,), in radians."""
    y = torch.arange(height, device=angle.device).view(1, -1, 1) - (height - 1) / 2
    x = torch.arange(width, device=angle.device).view(1, 1, -1) - (width - 1) / 2
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    return cos * y - sin * x + (height - 1) / 2, sin * y + cos * x + (width - 1) / 2


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


def apply_where(chosen: Tensor, function, image: Tensor, *arguments: Tensor) -> Tensor:
    """Apply function(image, *arguments) to the chosen samples (N,) only. Every argument has an entry per sample."""
    if image.is_cuda:  # selecting samples would make the host wait for the device, so all are computed
        return torch.where(chosen.view(-1, 1, 1, 1), function(image, *arguments), image)
    index = chosen.nonzero().squeeze(1)
    if not len(index):
        return image
    return image.index_copy(0, index, function(image[index], *(a[index] for a in arguments)))


def rotate(image: Tensor, degrees: Tensor) -> Tensor:
    """Rotate each sample clockwise about its centre by its own angle (N,). Bilinear; pixels from outside are black."""
    height, width = image.shape[2:]
    y, x = rotated_grid(height, width, degrees.deg2rad())
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), -1)  # (N, H, W, 2), in [-1, 1]
    return F.grid_sample(image, grid, align_corners=False)


def rotate_normals(image: Tensor, generator: torch.Generator, degrees: float, share: float) -> Tensor:
    """Rotate a share of the normal images, each by its own angle of up to +-degrees. Targets are rotated too."""
    chosen = uniform(generator, 0, 1, len(image)) < share
    return apply_where(chosen, rotate, image, uniform(generator, -degrees, degrees, len(image)))


def perlin_mask(count: int, height: int, width: int, generator: torch.Generator, normal_share: float,
                threshold: float) -> Tensor:
    """Masks (count, 1, height, width): noise > threshold, empty for `normal_share` of the samples."""
    anomalous = uniform(generator, 0, 1, count, 1, 1) >= normal_share
    return ((perlin_noise(count, height, width, generator) > threshold) & anomalous)[:, None].float()


def coloured_noise(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Substitute textures (count, 3, height, width) in [0, 1]: Perlin noise that blends two random colours."""
    noise = perlin_noise(count, height, width, generator)[:, None] / 2 + 0.5
    colours = uniform(generator, 0, 1, 2, count, 3, 1, 1)
    return torch.lerp(colours[0], colours[1], noise).clamp(0, 1)


@torch.no_grad()
def synthesize_anomalies(image: Tensor, texture: Tensor | None, generator: torch.Generator,
                         beta: tuple[float, float] = PUBLISHED["beta"],
                         normal_share: float = PUBLISHED["normal_share"]) -> tuple[Tensor, Tensor]:
    """Eq. (4): augmented = (1 - mask) * image + (1 - beta) * (mask * image) + beta * (mask * texture)

    Takes image and texture (N, 3, H, W) in [0, 1] on the generator's device; returns augmented, likewise, and mask
    (N, 1, H, W). Each sample has its own beta, uniform in the range. The mask is empty for `normal_share` of the
    samples and wherever the noise stays below the threshold. If texture is None, coloured noise replaces it (D14).
    """
    count, _, height, width = image.shape
    mask = perlin_mask(count, height, width, generator, normal_share, PUBLISHED["noise_threshold"])
    if texture is None:
        texture = coloured_noise(count, height, width, generator)
    texture = augment_textures(texture, generator)
    beta = uniform(generator, *beta, count, 1, 1, 1)
    return torch.lerp(image, texture, beta * mask), mask  # Eq. (4) with its two image terms combined


# --- Losses, in float32 under any autocast ----------------------------------------------------------------------------

def ssim_loss(x: Tensor, y: Tensor) -> Tensor:
    """Eq. (1): L_SSIM = mean over pixels of (1 - SSIM(x, y))

    SSIM = (2 mx my + C1) (2 cov + C2) / ((mx^2 + my^2 + C1) (vx + vy + C2)) with means, variances and covariance under
    an 11 x 11 Gaussian window of sigma 1.5, C1 = 0.01^2, C2 = 0.03^2, for images (N, C, H, W) of data range 1.
    Zeros pad the border, as in the code (loss.py:113). The code takes a data range of 2 if any value of the
    reconstruction is below -0.5 (loss.py:105), so one dark pixel changes the whole loss. Here the range is 1 (D4).
    """
    with torch.autocast(x.device.type, enabled=False):
        x, y = x.float(), y.float()
        # SSIM needs only vx + vy, so four images are filtered. Contiguous: cuDNN may filter channels_last in TF32.
        moments = torch.cat((x, y, x * x + y * y, x * y), 1).contiguous()
        channels = moments.shape[1]
        offset = torch.arange(-5.0, 6.0, device=x.device)
        window = torch.softmax(-offset ** 2 / (2 * 1.5 ** 2), 0).expand(channels, 1, 11)
        moments = F.conv2d(moments, window[..., None], padding=(5, 0), groups=channels)
        moments = F.conv2d(moments, window[:, :, None], padding=(0, 5), groups=channels)
        mean_x, mean_y, square, product = moments.chunk(4, 1)
        means = mean_x * mean_y
        mean_squares = mean_x * mean_x + mean_y * mean_y
        c1, c2 = 0.01 ** 2, 0.03 ** 2
        ssim = (2 * means + c1) * (2 * (product - means) + c2) / ((mean_squares + c1) * (square - mean_squares + c2))
        return (1 - ssim).mean()


def focal_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Focal loss = mean over pixels of -(1 - p)^2 log p, p the softmax probability of the pixel's true class.

    logits (N, 2, H, W), mask (N, 1, H, W) of 0 and 1. As in DRAEM's loss.py, gamma is 2 and no class is weighted (D1).
    Labels are smoothed by 1e-5: p = (1 - 1e-5) p_true + 1e-5 p_other + 1e-5. This also keeps log p finite.
    """
    with torch.autocast(logits.device.type, enabled=False):
        p_true = logits.float().softmax(1).gather(1, mask.long())
        p = (1 - 2e-5) * p_true + 2e-5  # p_other = 1 - p_true
        return (-(1 - p) ** 2 * p.log()).mean()


def draem_loss(image: Tensor, reconstruction: Tensor, logits: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Eq. (3): L = L_rec + L_seg, the sum of these; Eq. (2): L_rec = lambda * L_SSIM + l2. L_seg trains both."""
    with torch.autocast(image.device.type, enabled=False):
        return {"l2": F.mse_loss(reconstruction.float(), image),
                "ssim": PUBLISHED["ssim_lambda"] * ssim_loss(reconstruction, image),
                "focal": focal_loss(logits, mask)}


# --- Blocks and the two sub-networks; attribute names are the authors', so that released weights fit ------------------

def double_conv(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, hidden, 3, padding=1), nn.BatchNorm2d(hidden), nn.ReLU(inplace=True),
                         nn.Conv2d(hidden, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def up_conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
                         nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class SqueezeExcitation(nn.Module):
    """Multiplies each channel by a weight in (0, 1), computed from the means of all channels."""

    def __init__(self, channels: int, reduction: int = 8):
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // reduction)
        self.fc2 = nn.Linear(channels // reduction, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3))))))[:, :, None, None]


class SSPCAB(nn.Module):
    """Self-supervised predictive convolutional attentive block (2111.09099): (N, C, H, W) in and out (D15).

    Predicts each position from the four positions at offsets (+-2, +-2), never from itself. The names, the order of the
    convolutions and the ReLU before the squeeze-excitation are those of ristea/sspcab. In training mode, `cost`
    is the mean squared error between the block's output and its input; otherwise None.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1)  # up left
        self.conv2 = nn.Conv2d(channels, channels, 1)  # down left
        self.conv3 = nn.Conv2d(channels, channels, 1)  # up right
        self.conv4 = nn.Conv2d(channels, channels, 1)  # down right
        self.se = SqueezeExcitation(channels)
        self.cost = None

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (2, 2, 2, 2))
        prediction = (self.conv1(padded[:, :, :-4, :-4]) + self.conv2(padded[:, :, 4:, :-4])
                      + self.conv3(padded[:, :, :-4, 4:]) + self.conv4(padded[:, :, 4:, 4:]))
        prediction = self.se(F.relu(prediction))
        self.cost = F.mse_loss(prediction.float(), x.float()) if self.training else None
        return prediction


class ReconstructiveSubNetwork(nn.Module):
    """Section 3.1: an encoder-decoder without skips, (N, in_channels, H, W) -> (N, out_channels, H, W)."""

    def __init__(self, in_channels: int = 3, out_channels: int = 3, base_width: int = 128, sspcab: bool = False):
        super().__init__()
        w = base_width
        self.encoder = nn.Sequential(OrderedDict(
            block1=double_conv(in_channels, w, w), pool1=nn.MaxPool2d(2),
            block2=double_conv(w, 2 * w, 2 * w), pool2=nn.MaxPool2d(2),
            block3=double_conv(2 * w, 4 * w, 4 * w), pool3=nn.MaxPool2d(2),
            block4=double_conv(4 * w, 8 * w, 8 * w), pool4=nn.MaxPool2d(2),
            block5=SSPCAB(8 * w) if sspcab else double_conv(8 * w, 8 * w, 8 * w)))  # (N, 8w, H / 16, W / 16)
        self.decoder = nn.Sequential(OrderedDict(
            up1=up_conv(8 * w, 8 * w), db1=double_conv(8 * w, 8 * w, 4 * w),
            up2=up_conv(4 * w, 4 * w), db2=double_conv(4 * w, 4 * w, 2 * w),
            up3=up_conv(2 * w, 2 * w), db3=double_conv(2 * w, 2 * w, w),
            up4=up_conv(w, w), db4=double_conv(w, w, w),
            fin_out=nn.Sequential(nn.Conv2d(w, out_channels, 3, padding=1))))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class DiscriminativeSubNetwork(nn.Module):
    """Section 3.2: a U-Net, (N, in_channels, H, W) -> logits (N, out_channels, H, W)."""

    def __init__(self, in_channels: int = 6, out_channels: int = 2, base_width: int = 64):
        super().__init__()
        w = base_width
        self.encoder_segment = nn.ModuleDict(OrderedDict(
            block1=double_conv(in_channels, w, w),
            block2=double_conv(w, 2 * w, 2 * w),
            block3=double_conv(2 * w, 4 * w, 4 * w),
            block4=double_conv(4 * w, 8 * w, 8 * w),
            block5=double_conv(8 * w, 8 * w, 8 * w),
            block6=double_conv(8 * w, 8 * w, 8 * w)))
        self.decoder_segment = nn.ModuleDict(OrderedDict(
            up_b=up_conv(8 * w, 8 * w), db_b=double_conv(16 * w, 8 * w, 8 * w),
            up1=up_conv(8 * w, 4 * w), db1=double_conv(12 * w, 4 * w, 4 * w),
            up2=up_conv(4 * w, 2 * w), db2=double_conv(6 * w, 2 * w, 2 * w),
            up3=up_conv(2 * w, w), db3=double_conv(3 * w, w, w),
            up4=up_conv(w, w), db4=double_conv(2 * w, w, w),
            fin_out=nn.Sequential(nn.Conv2d(w, out_channels, 3, padding=1))))

    def forward(self, x: Tensor) -> Tensor:
        encoder, decoder = self.encoder_segment, self.decoder_segment
        b1 = encoder.block1(x)  # (N, w, H, W)
        b2 = encoder.block2(F.max_pool2d(b1, 2))
        b3 = encoder.block3(F.max_pool2d(b2, 2))
        b4 = encoder.block4(F.max_pool2d(b3, 2))
        b5 = encoder.block5(F.max_pool2d(b4, 2))
        b6 = encoder.block6(F.max_pool2d(b5, 2))  # (N, 8w, H / 32, W / 32)
        x = decoder.db_b(torch.cat((decoder.up_b(b6), b5), 1))
        x = decoder.db1(torch.cat((decoder.up1(x), b4), 1))
        x = decoder.db2(torch.cat((decoder.up2(x), b3), 1))
        x = decoder.db3(torch.cat((decoder.up3(x), b2), 1))
        x = decoder.db4(torch.cat((decoder.up4(x), b1), 1))
        return decoder.fin_out(x)


# --- The model --------------------------------------------------------------------------------------------------------

class DraemModel(nn.Module):
    """Both sub-networks, the second half as wide as the first; 69.0 + 28.4 million parameters, 198 GMAC at 256.

    width and sspcab define the networks; beta and rotate are for `losses`, see PUBLISHED. `settings` holds all four, to
    be saved with the weights. `preprocessing` holds this project's arguments of common.read_image; {} if unknown.
    """

    def __init__(self, width: int = PUBLISHED["width"], sspcab: bool = False,
                 beta: tuple[float, float] = PUBLISHED["beta"], rotate: float = PUBLISHED["rotate"]):
        super().__init__()
        self.settings = dict(width=width, sspcab=sspcab, beta=tuple(beta), rotate=rotate)
        self.preprocessing = {}
        self.beta, self.rotate = tuple(beta), rotate
        self.reconstructive_subnetwork = ReconstructiveSubNetwork(base_width=width, sspcab=sspcab)
        self.discriminative_subnetwork = DiscriminativeSubNetwork(base_width=width // 2)
        self.apply(initialize)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image (N, 3, H, W) -> reconstruction (N, 3, H, W), logits (N, 2, H, W)."""
        reconstruction = self.reconstructive_subnetwork(image)
        # Section 3.2, concatenation: the reconstruction first, then the input (D3).
        logits = self.discriminative_subnetwork(torch.cat((reconstruction, image), 1))
        return reconstruction, logits

    def simulate(self, image: Tensor, texture: Tensor | None, generator: torch.Generator,
                 normal_share: float = PUBLISHED["normal_share"]) -> dict[str, Tensor]:
        """What one training step shows the networks: a share of the images rotated, then anomalies blended in.

        image and texture (N, 3, H, W) in [0, 1], on the generator's device; texture may be None. Returns the rotated
        image, which is the target, augmented, and mask (N, 1, H, W).
        """
        image = rotate_normals(image, generator, self.rotate, PUBLISHED["rotate_share"])
        augmented, mask = synthesize_anomalies(image, texture, generator, self.beta, normal_share)
        return {"image": image, "augmented": augmented, "mask": mask}

    def losses(self, image: Tensor, texture: Tensor | None, generator: torch.Generator) -> dict[str, Tensor]:
        """The terms of Eq. (3) for one training step, and SSPCAB's. Training mode; arguments as in simulate."""
        simulated = self.simulate(image, texture, generator)
        reconstruction, logits = self(simulated["augmented"])
        terms = draem_loss(simulated["image"], reconstruction, logits, simulated["mask"])
        block5 = self.reconstructive_subnetwork.encoder.block5
        if isinstance(block5, SSPCAB):
            terms["sspcab"] = PUBLISHED["sspcab_lambda"] * block5.cost
        return terms

    @torch.no_grad()
    def predict(self, image: Tensor, window: int | None = None) -> dict[str, Tensor]:
        """Eq. (5): eta = max(M_o * f_sf), where f_sf is a window x window mean filter with zero padding.

        image (N, 3, H, W) in [0, 1], else ValueError. Returns score (N,), anomaly_map (N, H, W) and reconstruction
        (N, 3, H, W). window is odd; by default 21 at 256 x 256, as in the code, and in proportion at other sizes (D10).
        """
        if self.training:
            raise RuntimeError("predict needs the statistics learned in training: call model.eval() first")
        image = check_image(image, 32)
        reconstruction, logits = self(image)
        anomaly_map = logits.float().softmax(1)[:, 1]
        score = mean_filter_maximum(anomaly_map, window)
        return {"score": score, "anomaly_map": anomaly_map, "reconstruction": reconstruction}


def mean_filter_maximum(anomaly_map: Tensor, window: int | None = None) -> Tensor:
    """(N, H, W) -> (N,): the maximum of the window x window mean, with zero padding. window is odd."""
    side = min(int(length) for length in anomaly_map.shape[1:])
    window = window or round(PUBLISHED["window"] * side / PUBLISHED["size"]) // 2 * 2 + 1
    return F.avg_pool2d(anomaly_map[:, None], window, stride=1, padding=window // 2).amax((1, 2, 3))


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


def initialize(module: nn.Module) -> None:
    """The code's initial weights (train_DRAEM.py, weights_init; D13); convolution biases keep PyTorch's default."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1, 0.02)
        nn.init.zeros_(module.bias)


# --- Texture augmentations: the code's ten (data_loader.py, with imgaug); section 3.3 names seven (D8) ----------------
# x (n, 3, H, W) is RGB in [0, 1]. u (n, 3) holds the augmentation's random numbers, uniform in [0, 1).

def gamma(x: Tensor, u: Tensor) -> Tensor:
    """Raise each channel to its own power in [0.5, 2]."""
    return x ** (0.5 + 1.5 * u[:, :, None, None])


def brightness(x: Tensor, u: Tensor) -> Tensor:
    """Multiply RGB by 0.8 to 1.2 and add up to +-30/255. The code changes the brightness of a random colour space."""
    factor = (0.8 + 0.4 * u[:, 0]).view(-1, 1, 1, 1)
    offset = ((2 * u[:, 1] - 1) * 30 / 255).view(-1, 1, 1, 1)
    return (x * factor + offset).clamp(0, 1)


def sharpness(x: Tensor, u: Tensor) -> Tensor:
    """smooth + factor * (x - smooth), with a 3 x 3 smoothing of x and a factor in [0, 2]."""
    smooth = (9 * F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1) + 4 * x) / 13
    return torch.lerp(smooth, x, 2 * u[:, 0].view(-1, 1, 1, 1)).clamp(0, 1)


def hue_saturation(x: Tensor, u: Tensor) -> Tensor:
    """Shift hue and saturation by up to +-50/255 of their ranges, in HSV (Smith, Color gamut transform pairs, 1978).

    Back to RGB: channel n = V - V S max(0, min(k, 4 - k, 1)) with k = (n + hue) mod 6, hue in sixths, n = 5, 3, 1.
    """
    value = x.amax(1)
    least = x.amin(1)
    chroma = (value - least).clamp_min(1e-8)
    red, green, blue = x.unbind(1)
    hue = torch.where(value == red, (green - blue) / chroma,
                      torch.where(value == green, (blue - red) / chroma + 2, (red - green) / chroma + 4))
    shift = (2 * u[:, :2] - 1) * 50 / 255
    hue = hue + 6 * shift[:, 0].view(-1, 1, 1)
    saturation = ((value - least) / value.clamp_min(1e-8) + shift[:, 1].view(-1, 1, 1)).clamp(0, 1)
    k = (torch.arange(5, 0, -2, device=x.device).view(1, 3, 1, 1) + hue[:, None]) % 6
    return value[:, None] * (1 - saturation[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))


def solarize(x: Tensor, u: Tensor) -> Tensor:
    """In half of the samples, invert the values at or above a threshold in [32, 128] / 255."""
    threshold = torch.where(u[:, 0] < 0.5, (32 + 96 * u[:, 1]) / 255, 2.0).view(-1, 1, 1, 1)
    return torch.where(x >= threshold, 1 - x, x)


def posterize(x: Tensor, u: Tensor) -> Tensor:
    """Keep the 1 to 8 highest bits."""
    step = (2 ** (7 - (8 * u[:, 0]).floor())).view(-1, 1, 1, 1)
    return (x * 255 / step).floor() * step / 255


def invert(x: Tensor, u: Tensor) -> Tensor:
    return 1 - x


def histogram(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each channel's values as levels 0..255 (n, 3, H * W), and its number of pixels up to each level (n, 3, 256)."""
    level = (x * 255).round().long().clamp(0, 255).flatten(2)
    counts = torch.zeros(*x.shape[:2], 256, device=x.device)
    return level, counts.scatter_add_(2, level, torch.ones_like(level, dtype=x.dtype)).cumsum(2)


def autocontrast(x: Tensor, u: Tensor) -> Tensor:
    """Stretch each channel to [0, 1] after cutting off 0 to 20 % of its pixels at each end."""
    _, up_to = histogram(x)
    cut = up_to[:, :, -1:] * (21 * u[:, :1, None]).floor() / 100
    low = (up_to <= cut).sum(2)
    high = (up_to < up_to[:, :, -1:] - cut).sum(2)
    low, high = low[..., None, None] / 255, high[..., None, None] / 255
    return torch.where(high > low, (x - low) / (high - low), x).clamp(0, 1)


def equalize(x: Tensor, u: Tensor) -> Tensor:
    """As in Pillow: level -> (pixels below it + step // 2) // step, step = (pixels below the highest level) // 255."""
    level, up_to = histogram(x)
    counts = up_to.diff(dim=2, prepend=torch.zeros_like(up_to[:, :, :1]))
    last = counts.gather(2, (up_to == up_to[:, :, -1:]).long().argmax(2, keepdim=True))  # pixels of the highest level
    step = ((up_to[:, :, -1:] - last) / 255).floor()
    table = (((up_to - counts) + (step / 2).floor()) / step).floor().clamp(0, 255) / 255
    return torch.where(step[..., None] > 0, table.gather(2, level).view_as(x), x)


def rotate_texture(x: Tensor, u: Tensor) -> Tensor:
    """Rotate by up to +-45 degrees."""
    return rotate(x, 90 * u[:, 0] - 45)


AUGMENTATIONS = (gamma, brightness, sharpness, hue_saturation, solarize, posterize, invert, autocontrast, equalize,
                 rotate_texture)


def augment_textures(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Apply three different ones of the ten to each sample, in random order; (N, 3, H, W) in [0, 1] in and out."""
    order = uniform(generator, 0, 1, len(texture), len(AUGMENTATIONS)).argsort(1)[:, :PUBLISHED["augmentations"]]
    for choice in order.unbind(1):
        u = uniform(generator, 0, 1, len(texture), 3)
        for k, augmentation in enumerate(AUGMENTATIONS):
            texture = apply_where(choice == k, augmentation, texture, u)
    return texture


# --- Weights ----------------------------------------------------------------------------------------------------------

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


def own_checkpoint(content: dict, method: str, path: str | Path) -> list[dict]:
    """Weights, settings and preprocessing of this project's checkpoint. ValueError if it is another method's."""
    if content["method"] != method:
        raise ValueError(f"{path}: a checkpoint of {content['method']}, not of {method}")
    return [content.get(name, {}) for name in ("model", "settings", "preprocessing")]


def reorder(state: dict, channels) -> dict:
    """`state` reordered by channels' (key, dimension, order). What is missing or has another size is left to build."""
    return state | {key: state[key].index_select(dimension, torch.tensor(order)) for key, dimension, order in channels
                    if getattr(state.get(key), "shape", ())[dimension:dimension + 1] == (len(order),)}


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


RECONSTRUCTIVE, DISCRIMINATIVE = "reconstructive_subnetwork.", "discriminative_subnetwork."
FIRST_CONV = RECONSTRUCTIVE + "encoder.block1.0.weight"
BGR = (2, 1, 0)  # reverses three channels
# Tensors with colour channels: (key, dimension, order) that converts weights trained on BGR to RGB.
AUTHORS_CHANNELS = ((FIRST_CONV, 1, BGR),
                    (RECONSTRUCTIVE + "decoder.fin_out.0.weight", 0, BGR),
                    (RECONSTRUCTIVE + "decoder.fin_out.0.bias", 0, BGR),
                    (DISCRIMINATIVE + "encoder_segment.block1.0.weight", 1, (*BGR, 5, 4, 3)))
# anomalib's names in SSPCAB -> ristea/sspcab's names. The second and third convolutions are swapped.
ANOMALIB_SSPCAB = {"masked_conv1.": "conv1.", "masked_conv2.": "conv3.", "masked_conv3.": "conv2.",
                   "masked_conv4.": "conv4.", "attention_module.": "se."}


def load(path: str | Path) -> DraemModel:
    """A trained model in eval mode, for RGB. ValueError, one line, on failure.

    A file is recognized by its keys: this project's last.pt; the authors' RUN_CLASS_.pckl, with RUN_CLASS__seg.pckl
    beside it; anomalib's checkpoint. The authors trained on BGR, so their weights are converted to RGB. anomalib feeds
    the second network (image, reconstruction), so the six input channels are put into the paper's order.
    """
    path = Path(path)
    content = read_weights(path)
    preprocessing = {"size": PUBLISHED["size"], "antialias": False}
    if "method" in content:
        state, settings, preprocessing = own_checkpoint(content, "draem", path)
    elif "model." + FIRST_CONV in content.get("state_dict", {}):
        state = {key.removeprefix("model."): value for key, value in content["state_dict"].items()
                 if key.startswith(("model." + RECONSTRUCTIVE, "model." + DISCRIMINATIVE))}
        if any(".masked_conv" in key for key in state):
            print(f"{path}: anomalib's SSPCAB lacks a ReLU, so its maps will not be the same here", file=sys.stderr)
        for old, new in ANOMALIB_SSPCAB.items():
            state = {key.replace("block5." + old, "block5." + new): value for key, value in state.items()}
        state = reorder(state, [(DISCRIMINATIVE + "encoder_segment.block1.0.weight", 1, (3, 4, 5, 0, 1, 2))])
        preprocessing = anomalib_preprocessing(content, path)
    elif "encoder.block1.0.weight" in content:
        beside = path.with_name(path.stem + "_seg" + path.suffix)
        state = {RECONSTRUCTIVE + key: value for key, value in content.items()}
        state |= {DISCRIMINATIVE + key: value for key, value in read_weights(beside).items()}
        state = reorder(state, AUTHORS_CHANNELS)
    else:
        raise ValueError(f"{path}: no last.pt, no RUN_CLASS_.pckl of the authors, no .ckpt of anomalib's Draem")
    if "method" not in content:  # a released file: settings from its keys and shapes
        settings = {"width": len(state[FIRST_CONV]), "sspcab": RECONSTRUCTIVE + "encoder.block5.conv1.weight" in state}
    model = build(DraemModel, settings, state, path)
    model.preprocessing = preprocessing
    return model


if __name__ == "__main__":  # python draem.py: the shape of every block's output
    def show(block: nn.Module, _, output: Tensor) -> None:
        print(f"{names[block]:56} {tuple(output.shape)}")

    model = DraemModel().eval()
    names = {block: name for name, block in model.named_modules() if name.count(".") == 2}
    for block in names:
        block.register_forward_hook(show)
    model.predict(torch.rand(1, 3, PUBLISHED["size"], PUBLISHED["size"]))
