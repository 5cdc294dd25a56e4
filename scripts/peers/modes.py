"""The ways in which a peer computes.

a  eager PyTorch in float32, as the public reference implementations run
b  the same network with what a PyTorch user can switch on without writing kernels: channels-last, autocast, fused or
   foreach optimisers and averages, bias inside the convolution, scaled_dot_product_attention
c  b under torch.compile
d  the ConsistencyModelPipeline of diffusers, in its default float32 (sampling alone)
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch

DTYPES = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Mode:
    letter: str
    device: torch.device
    dtype: torch.dtype | None

    @staticmethod
    def of(letter, device, dtype):
        """`dtype` is what b and c compute in."""
        mode = Mode(letter, torch.device(device), DTYPES[dtype] if letter in "bc" else None)
        if mode.device.type == "cuda":
            # What is asked without a device is about the current one.
            torch.cuda.set_device(mode.device)
            # As EDM's training loop has it; the tuned in low precision may round what is left in float32 too.
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = mode.dtype is not None
        return mode

    @property
    def tuned(self):
        return self.letter in "bc"

    @property
    def compiled(self):
        return self.letter == "c"

    @property
    def dtype_name(self):
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    def autocast(self):
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def place(self, net):
        """Puts a network where and how this mode wants it."""
        net = net.to(self.device)
        return net.to(memory_format=torch.channels_last) if self.tuned else net

    def wrap(self, net):
        return torch.compile(net) if self.compiled else net

    def layout(self, x):
        return x.contiguous(memory_format=torch.channels_last) if self.tuned else x

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
