"""Networks with their preconditioning, out of the race's files."""

from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import load_file

from openai_unet import OpenaiUNet
from song_unet import SongUNet

NETWORKS = {"song_unet": SongUNet, "openai_unet": OpenaiUNet}


class Preconditioned(nn.Module):
    """c_skip·x + c_out·F(c_in·x; c_noise): a denoiser, or with `boundary` a consistency function."""

    def __init__(self, net, precond, boundary, mode):
        super().__init__()
        self.net, self.boundary, self.mode = net, boundary, mode
        self.sigma_data, self.sigma_min = precond["sigma_data"], precond["sigma_min"]
        self.noise_cond = precond["noise_cond"]

    def noise_label(self, sigma):
        if self.noise_cond == "thousand_quarter_log":
            return 1000 * 0.25 * (sigma + 1e-44).log()
        return sigma.log() / 4

    def forward(self, x, sigma, labels=None):
        x = x.to(torch.float32)
        sigma = sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        data = self.sigma_data
        nearness = sigma - self.sigma_min if self.boundary else sigma
        c_skip = data**2 / (nearness**2 + data**2)
        c_out = nearness * data / (sigma**2 + data**2).sqrt()
        c_in = 1 / (data**2 + sigma**2).sqrt()
        c_noise = self.noise_label(sigma).flatten().expand(x.shape[0])
        with self.mode.autocast():
            extra = () if labels is None else (labels,)
            raw = self.net(self.mode.layout(c_in * x), c_noise, *extra)
        return c_skip * x + c_out * raw.to(torch.float32)


def classes(work, images, device):
    """Classes of so many images, one after the other; none for an unconditional network."""
    count = work["network"]["num_classes"]
    return torch.arange(images, device=device) % count if count else None


def build(work, mode, boundary, file, folder, trains=False):
    """The network of a row with the weights of `file`, placed and compiled as the mode says."""
    net = NETWORKS[work["network"]["kind"]](work["network"], tuned=mode.tuned)
    net.load_state_dict(load_file(Path(folder) / file), strict=True)
    net = mode.place(net).requires_grad_(trains).train(trains)
    return net, Preconditioned(mode.wrap(net), work["precond"], boundary, mode)
