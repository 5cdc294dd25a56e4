"""The data path: a folder of PNGs to shuffled, randomly mirrored float batches in [-1, 1].

a  one worker process that decodes with Pillow and keeps what it has decoded, as EDM's loader is set up
b  as many workers as there are threads
"""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import torch


class Pictures(torch.utils.data.Dataset):
    def __init__(self, folder):
        self.files = sorted(Path(folder).glob("*.png"))
        self.decoded = {}

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        pixels = self.decoded.get(index)
        if pixels is None:
            pixels = np.array(PIL.Image.open(self.files[index]))
            pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
            self.decoded[index] = pixels
        if torch.rand(()) < 0.5:
            pixels = pixels[:, :, ::-1]
        return pixels.copy()


class DataRow:
    def __init__(self, folder, row, mode):
        folder, self.mode = Path(folder), mode
        self.work = json.loads((folder / f"{row}.json").read_text())
        workers = 1 if mode.letter == "a" else torch.get_num_threads()
        self.set, self.items = Pictures(folder / "pictures"), self.work["batch"]
        loader = torch.utils.data.DataLoader(
            self.set, batch_size=self.items, shuffle=True, num_workers=workers, drop_last=True,
            persistent_workers=True, prefetch_factor=2, pin_memory=mode.device.type == "cuda")
        self.stream = self.endless(loader)

    @staticmethod
    def endless(loader):
        while True:
            yield from loader

    def run(self, count):
        for _ in range(count):
            batch = next(self.stream).to(self.mode.device, non_blocking=True).to(torch.float32) / 127.5 - 1
        self.mode.synchronize()
        return batch

    def check(self):
        pixels = torch.from_numpy(np.stack([self.set[i] for i in range(len(self.set))]))
        return {"images": len(self.set), "mean": (pixels.double() / 127.5 - 1).mean().item()}
