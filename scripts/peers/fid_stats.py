"""Mean, covariance and Fréchet distance of the features of 2,000 images, as EDM's (a) script computes them.

b  does the same sums in one product and takes the trace of the root by eigenvalues, without SciPy's square root
"""

import json
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from safetensors.torch import load_file


class FidRow:
    def __init__(self, folder, row, mode):
        folder, self.mode = Path(folder), mode
        self.work = json.loads((folder / f"{row}.json").read_text())
        tensors = load_file(folder / f"{row}.safetensors")
        self.features, self.items = tensors["features"], tensors["features"].shape[0]
        self.mean, self.covariance = tensors["mean"].numpy(), tensors["covariance"].numpy()

    def statistics(self):
        count, dim = self.features.shape
        if self.mode.tuned:
            features = self.features.to(torch.float64)
            mean = features.mean(0)
            centred = features - mean
            return mean.numpy(), (centred.T @ centred / (count - 1)).numpy()
        mean = torch.zeros(dim, dtype=torch.float64)
        covariance = torch.zeros(dim, dim, dtype=torch.float64)
        for part in self.features.split(64):
            part = part.to(torch.float64)
            mean += part.sum(0)
            covariance += part.T @ part
        mean /= count
        covariance = (covariance - mean.ger(mean) * count) / (count - 1)
        return mean.numpy(), covariance.numpy()

    def distance(self):
        mean, covariance = self.statistics()
        gap = np.square(mean - self.mean).sum()
        if self.mode.tuned:
            values, vectors = torch.linalg.eigh(torch.from_numpy(self.covariance))
            root = vectors * values.clamp(min=0).sqrt() @ vectors.T
            inner = torch.linalg.eigvalsh(root @ torch.from_numpy(covariance) @ root)
            trace = 2 * inner.clamp(min=0).sqrt().sum().item()
        else:
            root = scipy.linalg.sqrtm(covariance @ self.covariance)
            trace = 2 * np.trace(root).real
        return float(gap + np.trace(covariance) + np.trace(self.covariance) - trace)

    def run(self, count):
        for _ in range(count):
            self.distance()

    def check(self):
        return {"fid": self.distance()}
