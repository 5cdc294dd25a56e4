"""DDPM++ and NCSN++ in PyTorch, layer by layer as EDM's SongUNet computes them in eager mode.

Parameters and buffers have the names of EDM's files without the leading `model.`, so that one safetensors file serves
this project and its peers. With `tuned` the bias goes into the convolution call, attention is libtorch's fused kernel
and the low-pass filters stay float32 (libtorch's depthwise bfloat16 kernels are slow on a CPU); else each is a step of
its own, as in the reference.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

SKIP_SCALE = math.sqrt(0.5)
EPS = 1e-6


class Linear(nn.Module):
    def __init__(self, inputs, outputs, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x):
        y = x @ self.weight.to(x.dtype).t()
        return y if self.bias is None else y.add_(self.bias.to(y.dtype))


class Conv2d(nn.Module):
    """A convolution, with a filter in front of it that doubles (`up`) or halves (`down`) the resolution.

    With `fused` the filter follows instead, and the two are padded as one.
    """

    def __init__(self, inputs, outputs, kernel, up=False, down=False, taps=(1, 1), fused=False, tuned=False):
        super().__init__()
        self.inputs, self.outputs, self.up, self.down = inputs, outputs, up, down
        self.fused, self.tuned = fused, tuned
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.padding = kernel // 2
        self.filter_padding = (len(taps) - 1) // 2
        if up or down:
            taps = torch.tensor(taps, dtype=torch.float32)
            self.register_buffer("resample_filter", torch.outer(taps, taps)[None, None] / taps.sum() ** 2)

    def resample(self, x, channels, padding):
        if self.tuned and x.dtype != torch.float32:
            with torch.autocast(x.device.type, enabled=False):
                return self._resample(x.float(), channels, padding).to(x.dtype)
        return self._resample(x, channels, padding)

    def _resample(self, x, channels, padding):
        taps = self.resample_filter.to(x.dtype)
        if self.up:
            taps = taps.mul(4).tile([channels, 1, 1, 1])
            return F.conv_transpose2d(x, taps, groups=channels, stride=2, padding=padding)
        return F.conv2d(x, taps.tile([channels, 1, 1, 1]), groups=channels, stride=2, padding=padding)

    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if self.fused:
            x = F.conv2d(x, weight, padding=self.padding + self.filter_padding)
            return self.resample(x, self.outputs, 0).add_(bias.reshape(1, -1, 1, 1))
        if self.up or self.down:
            x = self.resample(x, self.inputs, self.filter_padding)
        if self.tuned:
            return F.conv2d(x, weight, bias, padding=self.padding)
        return F.conv2d(x, weight, padding=self.padding).add_(bias.reshape(1, -1, 1, 1))


class GroupNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.groups = min(32, channels // 4)
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x):
        return F.group_norm(x, self.groups, self.weight.to(x.dtype), self.bias.to(x.dtype), EPS)


class AttentionWeights(torch.autograd.Function):
    """softmax(qᵀk/√C) in float32, whatever q and k are, with its gradient written out as the reference does."""

    @staticmethod
    def forward(ctx, q, k):
        scale = 1 / math.sqrt(k.shape[1])
        w = torch.einsum("ncq,nck->nqk", q.float(), k.float() * scale).softmax(dim=2).to(q.dtype)
        ctx.save_for_backward(q, k, w)
        return w

    @staticmethod
    def backward(ctx, dw):
        q, k, w = ctx.saved_tensors
        ds = torch._softmax_backward_data(dw.float(), w.float(), 2, torch.float32)
        scale = 1 / math.sqrt(k.shape[1])
        dq = torch.einsum("nck,nqk->ncq", k.float(), ds).to(q.dtype) * scale
        dk = torch.einsum("ncq,nqk->nck", q.float(), ds).to(k.dtype) * scale
        return dq, dk


class Block(nn.Module):
    def __init__(self, inputs, outputs, emb, up=False, down=False, attention=False, dropout=0.0, taps=(1, 1),
                 tuned=False):
        super().__init__()
        self.inputs, self.outputs, self.dropout, self.tuned = inputs, outputs, dropout, tuned
        way = {"up": up, "down": down, "taps": taps, "tuned": tuned}
        self.norm0 = GroupNorm(inputs)
        self.conv0 = Conv2d(inputs, outputs, 3, **way)
        self.affine = Linear(emb, outputs)
        self.norm1 = GroupNorm(outputs)
        self.conv1 = Conv2d(outputs, outputs, 3, tuned=tuned)
        self.skip = Conv2d(inputs, outputs, 1, **way) if up or down or inputs != outputs else None
        self.attends = attention
        if attention:
            self.norm2 = GroupNorm(outputs)
            self.qkv = Conv2d(outputs, 3 * outputs, 1, tuned=tuned)
            self.proj = Conv2d(outputs, outputs, 1, tuned=tuned)

    def forward(self, x, emb):
        origin = x
        x = self.conv0(F.silu(self.norm0(x)))
        shift = self.affine(emb)[:, :, None, None].to(x.dtype)
        x = F.silu(self.norm1(x.add_(shift)))
        x = self.conv1(F.dropout(x, p=self.dropout, training=self.training))
        x = x.add_(self.skip(origin) if self.skip is not None else origin) * SKIP_SCALE
        return (self.attend(x) + x) * SKIP_SCALE if self.attends else x

    def attend(self, x):
        q, k, v = self.qkv(self.norm2(x)).reshape(x.shape[0], x.shape[1], 3, -1).unbind(2)
        if self.tuned:
            # Channels next to one another, or libtorch takes the product of whole matrices instead of its fused kernel.
            q, k, v = (part.transpose(1, 2).unsqueeze(1).contiguous() for part in (q, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        else:
            mixed = torch.einsum("nqk,nck->ncq", AttentionWeights.apply(q, k), v)
        return self.proj(mixed.reshape(x.shape))


class Fourier(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("freqs", torch.empty(channels // 2))

    def forward(self, x):
        return x.ger(2 * math.pi * self.freqs.to(x.dtype))


class Positional(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.half = channels // 2

    def forward(self, x):
        powers = torch.arange(self.half, dtype=torch.float32, device=x.device) / (self.half - 1)
        return x.ger(((1 / 10000) ** powers).to(x.dtype))


class SongUNet(nn.Module):
    """`spec` is the section `[network]` of an experiment, unconditional and without augmentation labels."""

    def __init__(self, spec, tuned=False):
        super().__init__()
        width, taps = spec["model_channels"], tuple(spec["resample_filter"])
        emb, noise = width * spec["channel_mult_emb"], width * spec["channel_mult_noise"]
        widths = [width * factor for factor in spec["channel_mult"]]
        attends, residual = spec["attn_resolutions"], spec["encoder"] == "residual"
        block = {"emb": emb, "dropout": spec["dropout"], "taps": taps, "tuned": tuned}
        self.map_noise = (Fourier if spec["embedding"]["kind"] == "fourier" else Positional)(noise)
        self.map_layer0, self.map_layer1 = Linear(noise, emb), Linear(emb, emb)

        self.enc, channels, above, skips = nn.ModuleDict(), spec["image_channels"], spec["image_channels"], []
        for level, out in enumerate(widths):
            size = spec["image_size"] >> level
            name = f"{size}x{size}"
            if level == 0:
                self.enc[f"{name}_conv"] = Conv2d(channels, width, 3, tuned=tuned)
                channels = width
            else:
                self.enc[f"{name}_down"] = Block(channels, channels, down=True, **block)
                if residual:
                    self.enc[f"{name}_aux_residual"] = Conv2d(
                        above, channels, 3, down=True, taps=taps, fused=True, tuned=tuned)
                    above = channels
            skips.append(channels)
            for index in range(spec["num_blocks"]):
                self.enc[f"{name}_block{index}"] = Block(channels, out, attention=size in attends, **block)
                channels = out
                skips.append(channels)

        self.dec = nn.ModuleDict()
        for level, out in reversed(list(enumerate(widths))):
            size = spec["image_size"] >> level
            name = f"{size}x{size}"
            if level == len(widths) - 1:
                self.dec[f"{name}_in0"] = Block(channels, channels, attention=True, **block)
                self.dec[f"{name}_in1"] = Block(channels, channels, **block)
            else:
                self.dec[f"{name}_up"] = Block(channels, channels, up=True, **block)
            for index in range(spec["num_blocks"] + 1):
                last = index == spec["num_blocks"] and size in attends
                self.dec[f"{name}_block{index}"] = Block(channels + skips.pop(), out, attention=last, **block)
                channels = out
        self.dec[f"{name}_aux_norm"] = GroupNorm(channels)
        self.dec[f"{name}_aux_conv"] = Conv2d(channels, spec["image_channels"], 3, tuned=tuned)

    def embed(self, c_noise):
        angles = self.map_noise(c_noise)
        emb = torch.cat([angles.sin(), angles.cos()], dim=1)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(self, x, c_noise):
        emb, skips, above = self.embed(c_noise), [], x
        for name, layer in self.enc.items():
            if "aux_residual" in name:
                x = skips[-1] = above = (x + layer(above)) / math.sqrt(2)
                continue
            x = layer(x, emb) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            if "aux_norm" in name:
                x = F.silu(layer(x))
            elif "aux_conv" in name:
                x = layer(x)
            else:
                if x.shape[1] != layer.inputs:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = layer(x, emb)
        return x
