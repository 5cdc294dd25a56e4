"""From nothing to one picture: cold_start.py FOLDER ROW MODE DTYPE THREADS DEVICE PNG

Started as a process of its own for each measurement; the race stops its clock when the PNG is there.
"""

import os
import sys

import torch

from modes import Mode
from sample import SampleRow


def main():
    folder, row, letter, dtype, threads, device, png = sys.argv[1:]
    torch.set_num_threads(int(threads))
    row = SampleRow(folder, row, Mode.of(letter, device, dtype))
    pixels = (row.run(1)[0] * 127.5 + 127.5).clip(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    import PIL.Image

    picture = PIL.Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    picture.save(png + ".part", format="PNG")
    os.replace(png + ".part", png)


main()
