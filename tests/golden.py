"""Fills networks by a rule that depends on state-dict keys and shapes alone, and checks recorded figures.

The figures in the tests come from the authors' released code (VitjanZ/DRAEM @ 2dbf673, VitjanZ/DSR_anomaly_detection
@ 672bfb8, ristea/sspcab @ 07d416c) and torchvision 0.28, on a CPU in float32. Their weights were filled by this rule,
with keys that have no leading underscores:

    n = RandomState(crc32(key + salt)).standard_normal(shape)
    *.num_batches_tracked: 0    *.running_var: 1 + 0.1 |n|    1-d *.weight: 1 + 0.1 n    other 1-d: 0.1 n
    two or more dimensions: n / sqrt(product of shape[1:])
"""
import zlib

import numpy as np
import torch


def golden_value(key: str, shape: torch.Size, salt: str = "") -> np.ndarray:
    noise = np.random.RandomState(zlib.crc32((key + salt).encode())).standard_normal(tuple(shape))
    if key.endswith("num_batches_tracked"):
        return np.zeros(tuple(shape))
    if key.endswith("running_var"):
        return 1 + 0.1 * np.abs(noise)
    if len(shape) >= 2:
        return noise / np.sqrt(np.prod(shape[1:]))
    return 1 + 0.1 * noise if key.endswith("weight") else 0.1 * noise


@torch.no_grad()
def fill(module: torch.nn.Module, salt: str = "") -> torch.nn.Module:
    """Sets every entry of the module's state by the rule; returns it in eval mode."""
    for key, tensor in module.state_dict().items():
        tensor.copy_(torch.from_numpy(golden_value(key, tensor.shape, salt)))
    return module.eval()


def image(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).rand(*shape)).float()


def check(tensor: torch.Tensor, mean: float, std: float, values: list[float], rel: float = 0.0, abs: float = 0.0):
    """Checks mean, unbiased standard deviation, and values at evenly spaced flat positions, ends included."""
    flat = tensor.detach().double().flatten()
    at = np.linspace(0, flat.numel() - 1, len(values)).astype(int)
    torch.testing.assert_close(flat.mean().item(), mean, rtol=rel, atol=abs)
    torch.testing.assert_close(flat.std().item(), std, rtol=rel, atol=abs)
    torch.testing.assert_close(flat[at], torch.tensor(values, dtype=torch.float64), rtol=rel, atol=abs)
