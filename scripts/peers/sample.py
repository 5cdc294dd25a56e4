"""Sampling as the public samplers do it: one step of a consistency function, and EDM's Heun in 18 steps."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from weights import build, classes


class SampleRow:
    def __init__(self, folder, row, mode):
        self.mode, folder = mode, Path(folder)
        self.work = json.loads((folder / f"{row}.json").read_text())
        self.items = self.work["batch"]
        _, self.model = build(self.work, mode, self.work["consistency"], self.work["weights"], folder)
        self.reference = load_file(folder / f"{row}.safetensors")
        self.shape = self.reference["noise"].shape
        self.labels = classes(self.work, self.items, mode.device)

    @torch.no_grad()
    def images(self, noise):
        if self.work["consistency"]:
            sigma = torch.full((noise.shape[0],), self.work["precond"]["sigma_max"], device=noise.device)
            return self.model(noise * self.work["precond"]["sigma_max"], sigma, self.labels).clamp(-1, 1)
        return self.heun(noise)

    def heun(self, noise):
        """EDM's sampler without churn: the state in float64, the network in float32."""
        levels, steps = self.work["precond"], self.work["levels"]
        index, rho = torch.arange(steps, dtype=torch.float64, device=noise.device), levels["rho"]
        high, low = levels["sigma_max"] ** (1 / rho), levels["sigma_min"] ** (1 / rho)
        sigmas = torch.cat([(high + index / (steps - 1) * (low - high)) ** rho, index.new_zeros(1)])
        x = noise.to(torch.float64) * sigmas[0]
        for i, (here, there) in enumerate(zip(sigmas[:-1], sigmas[1:])):
            slope = (x - self.model(x, here, self.labels).to(torch.float64)) / here
            ahead = x + (there - here) * slope
            if i < steps - 1:
                slope2 = (ahead - self.model(ahead, there, self.labels).to(torch.float64)) / there
                ahead = x + (there - here) * (slope + slope2) / 2
            x = ahead
        return x

    def run(self, count):
        for _ in range(count):
            images = self.images(torch.randn(self.shape, device=self.mode.device))
        self.mode.synchronize()
        return images

    def check(self):
        images = self.images(self.reference["noise"].to(self.mode.device)).float().cpu()
        return compare(images, self.reference["images"])


class DiffusersRow:
    """The same network and weights, exported to a folder of diffusers."""

    def __init__(self, folder, row, mode):
        from diffusers import ConsistencyModelPipeline

        self.mode, folder = mode, Path(folder)
        self.work = json.loads((folder / f"{row}.json").read_text())
        self.items = self.work["batch"]
        self.pipeline = ConsistencyModelPipeline.from_pretrained(folder / self.work["diffusers"]).to(mode.device)
        self.pipeline.set_progress_bar_config(disable=True)
        labels = classes(self.work, self.items, mode.device)
        self.options = {
            "batch_size": self.items, "num_inference_steps": 1, "output_type": "pt",
            "class_labels": None if labels is None else labels.tolist(),
        }
        self.reference = load_file(folder / f"{row}.safetensors")

    def run(self, count):
        for _ in range(count):
            self.pipeline(**self.options)
        self.mode.synchronize()

    def check(self):
        latents = self.reference["noise"].to(self.mode.device)
        images = self.pipeline(**self.options, latents=latents).images
        return compare(images.float().cpu() * 2 - 1, self.reference["images"])


def compare(images, reference):
    """How far samples lie from the reference, as a share of its root mean square."""
    gap = (images.double() - reference.double()).square().mean().sqrt()
    return {"distance": (gap / reference.double().square().mean().sqrt()).item()}
