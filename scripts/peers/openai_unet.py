"""OpenAI's UNetModel in PyTorch, layer by layer as Consistency Models computes it in eager mode.

Names are those of the published files. With `tuned` normalisation stays in the dtype of its input and attention is
libtorch's fused kernel; else both go through float32 as in the reference.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

GROUPS = 32


class GroupNorm(nn.GroupNorm):
    def __init__(self, channels, tuned):
        super().__init__(GROUPS, channels, eps=1e-5)
        self.tuned = tuned

    def forward(self, x):
        return super().forward(x) if self.tuned else super().forward(x.float()).type(x.dtype)


class Resample(nn.Module):
    """Doubles or halves the resolution, with a convolution of its own where blocks do not do it."""

    def __init__(self, channels, up, with_conv):
        super().__init__()
        self.up = up
        if with_conv and up:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        elif with_conv:
            self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.with_conv = with_conv

    def forward(self, x, emb=None):
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            return self.conv(x) if self.with_conv else x
        return self.op(x) if self.with_conv else F.avg_pool2d(x, 2)


class ResBlock(nn.Module):
    def __init__(self, inputs, outputs, emb, spec, tuned, way=None):
        super().__init__()
        self.scale_shift = spec["scale_shift_norm"]
        self.in_layers = nn.Sequential(
            GroupNorm(inputs, tuned), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, outputs * (2 if self.scale_shift else 1)))
        self.out_layers = nn.Sequential(
            GroupNorm(outputs, tuned), nn.SiLU(), nn.Dropout(spec["dropout"]),
            nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        self.resample = None if way is None else Resample(inputs, way == "up", False)

    def forward(self, x, emb):
        norm, act, conv = self.in_layers
        h = act(norm(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = conv(h)
        shift = self.emb_layers(emb).type(h.dtype)[:, :, None, None]
        norm, *rest = self.out_layers
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + shift)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h


class Attention(nn.Module):
    def __init__(self, channels, heads, tuned):
        super().__init__()
        self.heads, self.tuned = heads, tuned
        self.norm = GroupNorm(channels, tuned)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x, emb=None):
        batch, channels, height, width = x.shape
        dim, pixels = channels // self.heads, height * width
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, dim, pixels)
        if self.tuned:
            q, k, v = qkv.transpose(3, 4).unbind(1)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        else:
            q, k, v = (part.reshape(batch * self.heads, dim, pixels) for part in qkv.unbind(1))
            scale = 1 / math.sqrt(math.sqrt(dim))
            weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
            weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
            mixed = torch.einsum("bts,bcs->bct", weight, v)
        return x + self.proj_out(mixed.reshape(batch, channels, height, width))


class Stage(nn.ModuleList):
    def forward(self, x, emb):
        for layer in self:
            x = layer(x) if isinstance(layer, nn.Conv2d) else layer(x, emb)
        return x


class OpenaiUNet(nn.Module):
    """`spec` is the section `[network]` of an experiment."""

    def __init__(self, spec, tuned=False):
        super().__init__()
        self.base = spec["model_channels"]
        emb, widths = 4 * self.base, [self.base * factor for factor in spec["channel_mult"]]
        self.time_embed = nn.Sequential(nn.Linear(self.base, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label_emb = nn.Embedding(spec["num_classes"], emb) if spec["num_classes"] else None

        def heads(channels):
            (kind, count), = spec["attn_heads"].items()
            return channels // count if kind == "head_channels" else count

        def stage(inputs, outputs, level):
            layers = [ResBlock(inputs, outputs, emb, spec, tuned)]
            if spec["image_size"] >> level in spec["attn_resolutions"]:
                layers.append(Attention(outputs, heads(outputs), tuned))
            return layers

        def resampler(channels, way):
            if spec["resblock_updown"]:
                return ResBlock(channels, channels, emb, spec, tuned, way)
            return Resample(channels, way == "up", True)

        channels, skips = widths[0], [widths[0]]
        self.input_blocks = nn.ModuleList([Stage([nn.Conv2d(spec["image_channels"], channels, 3, padding=1)])])
        for level, width in enumerate(widths):
            for _ in range(spec["num_blocks"]):
                self.input_blocks.append(Stage(stage(channels, width, level)))
                channels = width
                skips.append(channels)
            if level + 1 < len(widths):
                self.input_blocks.append(Stage([resampler(channels, "down")]))
                skips.append(channels)
        self.middle_block = Stage([
            ResBlock(channels, channels, emb, spec, tuned), Attention(channels, heads(channels), tuned),
            ResBlock(channels, channels, emb, spec, tuned)])
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for index in range(spec["num_blocks"] + 1):
                layers = stage(channels + skips.pop(), width, level)
                channels = width
                if level and index == spec["num_blocks"]:
                    layers.append(resampler(channels, "up"))
                self.output_blocks.append(Stage(layers))
        self.out = nn.Sequential(
            GroupNorm(channels, tuned), nn.SiLU(), nn.Conv2d(channels, spec["image_channels"], 3, padding=1))

    def forward(self, x, c_noise, labels=None):
        half = self.base // 2
        powers = torch.arange(half, dtype=torch.float32, device=x.device) / half
        angles = c_noise[:, None].float() * torch.exp(-math.log(10000) * powers)[None]
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1))
        if self.label_emb is not None:
            emb = emb + self.label_emb(labels)
        skips = []
        for stage in self.input_blocks:
            x = stage(x, emb)
            skips.append(x)
        x = self.middle_block(x, emb)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skips.pop()], dim=1), emb)
        return self.out(x)
