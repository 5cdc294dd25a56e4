#!/usr/bin/env python3
"""Writes the small files that the tests of reading published models read: crates/cm-net/tests/fixtures.

    cargo xtask setup --python
    .libtorch/python/bin/python -m pip install diffusers
    .libtorch/python/bin/python scripts/make_fixtures.py

The files are committed; nothing in the tests runs this. Every weight is a function of its name and place, which the
tests know too: TABLE[(hash(name) + i) mod 251], multiples of 1/512 that float16 and bfloat16 hold exactly. The table
is short so that the files compress, and 251 is prime so that no tensor read in another order comes out the same.
"""

import collections
import gzip
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
import types
import zipfile

import numpy as np
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
OUT = os.path.join(HERE, "..", "crates", "cm-net", "tests", "fixtures")
# What the pickles with code in them would make, in the working directory of whoever ran them.
MARK = "a-pickle-ran-code"
TABLE = np.array([((j * 89) % 251 - 125) / 512 for j in range(251)], dtype=np.float32)


def fnv1a(text):
    value = 0x811C9DC5
    for byte in text.encode():
        value = ((value ^ byte) * 0x01000193) & 0xFFFFFFFF
    return value


def weight(name, shape, dtype=torch.float32):
    count = int(np.prod(shape))
    values = TABLE[(fnv1a(name) + np.arange(count, dtype=np.int64)) % 251]
    return torch.from_numpy(values).reshape(shape).to(dtype)


def path(name):
    full = os.path.join(OUT, name)
    os.makedirs(os.path.dirname(full), exist_ok=True)
    return full


def put(name, data):
    """Writes a file, compressed where its name says so."""
    if name.endswith(".gz"):
        data = gzip.compress(data, 9, mtime=0)
    with open(path(name), "wb") as file:
        file.write(data)


def saved(content, **options):
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


LEGACY = dict(_use_new_zipfile_serialization=False)


# Names and shapes of the published networks.


def layer(shapes, name, *shape, bias=True):
    shapes[f"{name}.weight"] = list(shape)
    if bias:
        shapes[f"{name}.bias"] = [shape[0]]


def openai_shapes(channels, mult, blocks, attention, classes, scale_shift, updown):
    """OpenAI's U-Net; `attention` lists levels."""
    shapes, emb = {}, 4 * channels

    def res(name, inputs, outputs):
        layer(shapes, f"{name}.in_layers.0", inputs)
        layer(shapes, f"{name}.in_layers.2", outputs, inputs, 3, 3)
        layer(shapes, f"{name}.emb_layers.1", 2 * outputs if scale_shift else outputs, emb)
        layer(shapes, f"{name}.out_layers.0", outputs)
        layer(shapes, f"{name}.out_layers.3", outputs, outputs, 3, 3)
        if inputs != outputs:
            layer(shapes, f"{name}.skip_connection", outputs, inputs, 1, 1)

    def attend(name, width):
        layer(shapes, f"{name}.norm", width)
        layer(shapes, f"{name}.qkv", 3 * width, width, 1, 1)
        layer(shapes, f"{name}.proj_out", width, width, 1, 1)

    layer(shapes, "time_embed.0", emb, channels)
    layer(shapes, "time_embed.2", emb, emb)
    if classes:
        layer(shapes, "label_emb", classes, emb, bias=False)
    widths = [channels * m for m in mult]
    layer(shapes, "input_blocks.0.0", widths[0], 3, 3, 3)
    now, skips, stage = widths[0], [widths[0]], 1
    for level, width in enumerate(widths):
        for _ in range(blocks):
            res(f"input_blocks.{stage}.0", now, width)
            now = width
            if level in attention:
                attend(f"input_blocks.{stage}.1", now)
            skips.append(now)
            stage += 1
        if level + 1 < len(widths):
            if updown:
                res(f"input_blocks.{stage}.0", now, now)
            else:
                layer(shapes, f"input_blocks.{stage}.0.op", now, now, 3, 3)
            skips.append(now)
            stage += 1
    res("middle_block.0", now, now)
    attend("middle_block.1", now)
    res("middle_block.2", now, now)
    stage = 0
    for level, width in reversed(list(enumerate(widths))):
        for block in range(blocks + 1):
            res(f"output_blocks.{stage}.0", now + skips.pop(), width)
            now = width
            if level in attention:
                attend(f"output_blocks.{stage}.1", now)
            if level and block == blocks:
                child = f"output_blocks.{stage}.{2 if level in attention else 1}"
                if updown:
                    res(child, now, now)
                else:
                    layer(shapes, f"{child}.conv", now, now, 3, 3)
            stage += 1
    layer(shapes, "out.0", now)
    layer(shapes, "out.2", 3, now, 3, 3)
    return shapes


def edm_shapes(size, channels, mult, blocks, attention, taps=2, noise=1, fourier=False, residual=False, adm=False,
               classes=0, augment=0):  # fmt: skip
    """EDM's networks; `attention` lists resolutions."""
    shapes, emb = {}, 4 * channels
    widths = [channels * m for m in mult]
    if fourier:
        shapes["map_noise.freqs"] = [channels * noise // 2]
    if classes:
        layer(shapes, "map_label", emb if adm else channels * noise, classes, bias=not adm)
    if augment:
        layer(shapes, "map_augment", channels * noise, augment, bias=False)
    layer(shapes, "map_layer0", emb, channels * noise)
    layer(shapes, "map_layer1", emb, emb)

    def block(name, inputs, outputs, attends=False, resampled=False):
        layer(shapes, f"{name}.norm0", inputs)
        layer(shapes, f"{name}.conv0", outputs, inputs, 3, 3)
        layer(shapes, f"{name}.affine", 2 * outputs if adm else outputs, emb)
        layer(shapes, f"{name}.norm1", outputs)
        layer(shapes, f"{name}.conv1", outputs, outputs, 3, 3)
        if resampled:
            shapes[f"{name}.conv0.resample_filter"] = [1, 1, taps, taps]
            shapes[f"{name}.skip.resample_filter"] = [1, 1, taps, taps]
        if inputs != outputs or (resampled and not adm):
            layer(shapes, f"{name}.skip", outputs, inputs, 1, 1)
        if attends and (not adm or outputs >= 64):
            layer(shapes, f"{name}.norm2", outputs)
            layer(shapes, f"{name}.qkv", 3 * outputs, outputs, 1, 1)
            layer(shapes, f"{name}.proj", outputs, outputs, 1, 1)

    now, skips = (widths[0] if adm else channels), []
    for level, width in enumerate(widths):
        r = size >> level
        at = f"enc.{r}x{r}"
        if level == 0:
            layer(shapes, f"{at}_conv", now, 3, 3, 3)
        else:
            block(f"{at}_down", now, now, resampled=True)
            if residual:
                layer(shapes, f"{at}_aux_residual", now, 3 if level == 1 else widths[level - 2], 3, 3)
                shapes[f"{at}_aux_residual.resample_filter"] = [1, 1, taps, taps]
        skips.append(now)
        for index in range(blocks):
            block(f"{at}_block{index}", now, width, r in attention)
            now = width
            skips.append(now)
    for level, width in reversed(list(enumerate(widths))):
        r = size >> level
        at = f"dec.{r}x{r}"
        if level + 1 == len(widths):
            block(f"{at}_in0", now, now, True)
            block(f"{at}_in1", now, now)
        else:
            block(f"{at}_up", now, now, resampled=True)
        for index in range(blocks + 1):
            block(f"{at}_block{index}", now + skips.pop(), width, r in attention and (adm or index == blocks))
            now = width
    if adm:
        layer(shapes, "out_norm", now)
        layer(shapes, "out_conv", 3, now, 3, 3)
    else:
        layer(shapes, f"dec.{size}x{size}_aux_norm", now)
        layer(shapes, f"dec.{size}x{size}_aux_conv", 3, now, 3, 3)
    return shapes


def fill(shapes, dtype=torch.float32, prefix=""):
    state = collections.OrderedDict()
    for name, shape in shapes.items():
        if name.endswith("resample_filter"):
            taps = torch.tensor({2: [1.0, 1.0], 4: [1.0, 3.0, 3.0, 1.0]}[shape[-1]])
            state[prefix + name] = (torch.outer(taps, taps) / taps.sum() ** 2).reshape(shape).to(dtype)
        else:
            state[prefix + name] = weight(name, shape, dtype)
    return state


def openai():
    cond = openai_shapes(32, [1, 2], 1, [1], classes=10, scale_shift=True, updown=True)
    put("openai_cond.pt.gz", saved(fill(cond)))
    uncond = openai_shapes(32, [1, 1], 1, [0], classes=0, scale_shift=False, updown=False)
    nested = {"state_dict": fill(uncond, torch.float16), "step": 3, "lr": 1e-4}
    put("openai_uncond_legacy.pt.gz", saved(nested, **LEGACY))
    put("openai_bf16.pt.gz", saved({"ema": fill(uncond, torch.bfloat16)}))


def diffusers():
    """Folders as the library saves them, with what it computes."""
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel

    common = dict(sample_size=8, layers_per_block=1, attention_head_dim=32)
    resnet = dict(
        **common,
        num_class_embeds=10,
        block_out_channels=[32, 64],
        down_block_types=["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=32,
    )
    conv = dict(
        **common,
        block_out_channels=[32, 32],
        down_block_types=["AttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "AttnUpBlock2D"],
    )
    for name, config in [("diffusers_cd", resnet), ("diffusers_conv", conv)]:
        model = UNet2DModel(**config).eval()
        model.load_state_dict({key: weight(key, value.shape) for key, value in model.state_dict().items()})
        x, t = weight("x", [2, 3, 8, 8]) * 4, torch.tensor([250.0, -900.0])
        labels = torch.tensor([3, 7]) if "num_class_embeds" in config else None
        with torch.no_grad():
            output = model(x, t, class_labels=labels).sample
        with tempfile.TemporaryDirectory() as folder:
            scheduler = CMStochasticIterativeScheduler(num_train_timesteps=40)
            ConsistencyModelPipeline(unet=model, scheduler=scheduler).save_pretrained(folder)
            for part in ["unet/config.json", "scheduler/scheduler_config.json", "model_index.json"]:
                with open(os.path.join(folder, part), "rb") as file:
                    put(f"{name}/{part}", file.read())
            weights = "unet/diffusion_pytorch_model.safetensors"
            with open(os.path.join(folder, weights), "rb") as file:
                put(f"{name}/{weights}.gz", file.read())
        put(f"{name}/output.pt", saved({"x": x, "t": t, "output": output}))


# EDM's pickles: classes that carry their source, and a function that would run it.


def fake_modules():
    for name in ["torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util"]:
        sys.modules[name] = types.ModuleType(name)

    def _reconstruct_persistent_obj(meta):
        raise AssertionError(meta)

    class EasyDict(dict):
        pass

    for made, module in [(_reconstruct_persistent_obj, "torch_utils.persistence"), (EasyDict, "dnnlib.util")]:
        made.__module__, made.__qualname__ = module, made.__name__
        setattr(sys.modules[module], made.__name__, made)
    return _reconstruct_persistent_obj, EasyDict


class Persistent(torch.nn.Module):
    """Pickled as EDM's classes are: by a call of the function that runs the source beside the state."""

    reconstruct = None

    def __init__(self, class_name, **kwargs):
        super().__init__()
        self._init_args, self._init_kwargs = (), kwargs
        self.edm_class = class_name
        # Its blocks hold numbers of numpy.
        self.skip_scale = np.sqrt(0.5)

    def __reduce__(self):
        source = f"import os\nos.system('touch {MARK}')\n"
        meta = dict(
            type="class", version=6, module_src=source, class_name=self.edm_class, state=dict(self.__dict__)
        )
        return Persistent.reconstruct, (meta,)


def module_tree(state, name="SongUNet", **kwargs):
    """Modules with these parameters and buffers below them."""
    module = Persistent(name, **kwargs)
    groups = collections.OrderedDict()
    for key, tensor in state.items():
        first, _, rest = key.partition(".")
        if rest:
            groups.setdefault(first, collections.OrderedDict())[rest] = tensor
        elif first in ("freqs", "resample_filter"):
            module.register_buffer(first, tensor)
        else:
            module.register_parameter(first, torch.nn.Parameter(tensor, requires_grad=False))
    for key, inner in groups.items():
        if key in ("enc", "dec"):
            container = torch.nn.ModuleDict()
            for place in dict.fromkeys(name.partition(".")[0] for name in inner):
                part = {n.partition(".")[2]: t for n, t in inner.items() if n.partition(".")[0] == place}
                container[place] = module_tree(part, "UNetBlock")
            module.add_module(key, container)
        else:
            module.add_module(key, module_tree(inner, "Linear"))
    # Layers without a bias have it as None.
    module.register_parameter("none", None)
    return module


def edm():
    reconstruct, EasyDict = fake_modules()
    Persistent.reconstruct = staticmethod(reconstruct)
    around = dict(img_resolution=8, img_channels=3, use_fp16=False, model_type="SongUNet")
    ddpmpp = dict(model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], dropout=0.13,
                  embedding_type="positional", encoder_type="standard", decoder_type="standard",
                  channel_mult_noise=1, resample_filter=[1, 1], label_dim=10, augment_dim=9)  # fmt: skip
    ncsnpp = dict(model_channels=8, channel_mult=[1, 1, 2], num_blocks=1, attn_resolutions=[16], dropout=0.2,
                  embedding_type="fourier", encoder_type="residual", decoder_type="standard",
                  channel_mult_noise=2, resample_filter=[1, 3, 3, 1], label_dim=0, augment_dim=0)  # fmt: skip
    shapes = {
        "edm_ddpmpp": edm_shapes(8, 8, [1, 2], 1, [4], classes=10, augment=9),
        "ect_ncsnpp": edm_shapes(8, 8, [1, 1, 2], 1, [], taps=4, noise=2, fourier=True, residual=True),
    }
    for name, class_name, options in [("edm_ddpmpp", "EDMPrecond", ddpmpp), ("ect_ncsnpp", "ECMPrecond", ncsnpp)]:
        model = Persistent(class_name, **around, **options)
        model.add_module("model", module_tree(fill(shapes[name])))
        model.eval()
        data = dict(
            ema=model,
            loss_fn=Persistent("EDMLoss", P_mean=-1.2),
            augment_pipe=Persistent("AugmentPipe", p=0.12),
            dataset_kwargs=EasyDict(path="data.zip", use_labels=True, max_size=np.int64(50000)),
        )
        put(f"{name}.pkl.gz", pickle.dumps(data))
        with tempfile.TemporaryDirectory() as folder:
            source, target = os.path.join(folder, f"{name}.pkl"), os.path.join(folder, "out.safetensors")
            with open(source, "wb") as file:
                file.write(pickle.dumps(data))
            script = os.path.join(HERE, "convert_edm.py")
            subprocess.run([sys.executable, script, source, "-o", target], check=True, cwd=folder)
            assert not os.path.exists(os.path.join(folder, MARK)), "the embedded source was run"
            with open(target, "rb") as file:
                put(f"{name}.safetensors.gz", file.read())
    put("edm_state.pt.gz", saved(fill(shapes["edm_ddpmpp"], prefix="model.")))
    evil = dict(ema=Touch(), dataset_kwargs={})
    put("evil_edm.pkl", pickle.dumps(evil))
    adm = edm_shapes(8, 16, [1, 2], 1, [], adm=True, classes=5)
    put("adm.safetensors.gz", safetensors(fill(adm, prefix="model.")))


def safetensors(state):
    header, data = {}, b""
    for name, tensor in state.items():
        begin = len(data)
        data += tensor.numpy().tobytes()
        header[name] = dict(dtype="F32", shape=list(tensor.shape), data_offsets=[begin, len(data)])
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + data


# Small files of torch.save, and files that try to do harm.


class Touch:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {MARK}",)


def rewritten(data, change):
    """A zip with entries changed by `change(name, data)`; None leaves one out."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as target:
        for info in source.infolist():
            content = change(info.filename, source.read(info))
            if content is not None:
                target.writestr(info.filename, content)
    return stream.getvalue()


def small():
    kinds = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()
    dtypes = {kind: torch.arange(6).reshape(2, 3).to(getattr(torch, kind)) for kind in kinds}
    dtypes["scalar"] = torch.tensor(2.5)
    dtypes["empty"] = torch.zeros(0, 3)
    dtypes["parameter"] = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    put("dtypes.pt", saved(dtypes))
    put("dtypes_legacy.pt", saved(dtypes, **LEGACY))
    put("dtypes_protocol5.pt", saved(dtypes, pickle_protocol=5))

    base = torch.arange(24.0)
    views = {
        "whole": base,
        "matrix": base.reshape(4, 6),
        "transposed": base.reshape(4, 6).t(),
        "slice": base[5:9],
        "strided": base.reshape(4, 6)[1::2, ::3],
        "permuted": base.reshape(2, 3, 4).permute(2, 0, 1),
    }
    put("views.pt", saved(views))
    put("views_legacy.pt", saved(views, **LEGACY))

    one = collections.OrderedDict(a=torch.ones(2))
    put("several.pt", saved({"model": one, "ema": collections.OrderedDict(a=torch.zeros(2)), "step": 1}))
    optimizer = {"state": {0: {"step": 1, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    put("training.pt", saved({"model": one, "optimizer": optimizer, "epoch": 3}))
    put("mixed.pt", saved({"a": torch.ones(2), "step": 7}))

    put("evil.pt", saved({"a": torch.ones(2), "b": Touch()}))
    put("evil_legacy.pt", saved({"a": torch.ones(2), "b": Touch()}, **LEGACY))
    put("truncated.pt", saved(dtypes)[:-200])
    put("truncated_legacy.pt", saved(views, **LEGACY)[:-10])
    put("big_endian.pt", rewritten(saved(one), lambda n, d: b"big" if n.endswith("byteorder") else d))
    put("damaged.pt", saved(one).replace(torch.ones(2).numpy().tobytes(), torch.zeros(2).numpy().tobytes()))

    # 2^29 numbers of 4 bytes where there are 2.
    claim = b"J" + struct.pack("<i", 1 << 29)

    def claims(pickled):
        size = b"K\x02t"
        assert pickled.count(size) == 1
        return pickled.replace(size, claim + b"t")

    put("claims_2gb.pt", rewritten(saved(one), lambda n, d: claims(d) if n.endswith("data.pkl") else d))
    legacy = saved(one, **LEGACY)
    size = b"K\x02Nt"
    assert legacy.count(size) == 1
    legacy = legacy.replace(size, claim + b"Nt").replace(struct.pack("<q", 2), struct.pack("<q", 1 << 29))
    put("claims_2gb_legacy.pt", legacy)
    head = json.dumps({"a": dict(dtype="F32", shape=[1 << 29], data_offsets=[0, 1 << 31])}).encode()
    put("claims_2gb.safetensors", struct.pack("<Q", len(head)) + head + b"\0" * 16)
    put("claims_2gb_head.safetensors", struct.pack("<Q", 1 << 31) + b"{" + b"\0" * 16)


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    torch.manual_seed(0)
    openai()
    diffusers()
    edm()
    small()
    import diffusers as library

    with open(path("PROVENANCE"), "w") as file:
        file.write(
            "Written by scripts/make_fixtures.py with "
            f"torch {torch.__version__.split('+')[0]}, numpy {np.__version__}, diffusers {library.__version__}.\n"
            "No weight is of a trained model: each is a function of its name, which the script states.\n"
            "The edm_*.pkl and ect_*.pkl imitate the form of EDM's pickles; the .safetensors of the same name are\n"
            "what scripts/convert_edm.py made of them. evil* hold a command, which nothing that reads them runs.\n"
        )
    total = sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(OUT) for name in names)
    print(f"{total} bytes in {os.path.normpath(OUT)}")
    assert total <= 300_000


if __name__ == "__main__":
    main()
