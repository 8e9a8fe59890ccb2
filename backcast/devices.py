"""Which device to compute on."""

import torch

from backcast.errors import ConfigError


def choose_device(wanted: str) -> torch.device:
    """Return the device for ``auto``, ``cpu`` or ``cuda``; raise ConfigError without CUDA."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "The device cuda was asked for, but torch finds no CUDA device here. "
            "Use auto or cpu, or install a CUDA build of torch."
        )
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)
