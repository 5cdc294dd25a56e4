#!/usr/bin/env python3
"""Turns a .pkl of EDM (Karras et al. 2022) or ECT (Geng et al. 2024) into a model file of this project.

    python3 convert_edm.py edm-cifar10-32x32-cond-vp.pkl -o teacher.safetensors
    python3 convert_edm.py network-snapshot-010000.pkl --key ema -o ect.safetensors

Such a .pkl carries the source code of its classes, and reading it with pickle.load runs that code. This script does
not: it reads the pickle with names of its own in the place of every class and function, which keep the state and do
nothing, and it refuses every name that it does not know. It needs Python 3.8 or later and no package, PyTorch neither.

The result holds parameters and buffers under the names of the published networks, and the architecture in its
metadata, from the arguments that the network was made with.
"""

import argparse
import collections
import io
import itertools
import json
import os
import pickle
import struct
import sys
import tempfile

MAGIC = 0x1950A86A20F9469CFC6C
# Storages of torch: the dtype in safetensors and the size of one number.
STORAGES = {
    "DoubleStorage": ("F64", 8),
    "FloatStorage": ("F32", 4),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "LongStorage": ("I64", 8),
    "IntStorage": ("I32", 4),
    "ShortStorage": ("I16", 2),
    "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1),
    "BoolStorage": ("BOOL", 1),
}
# How many times the size of the file the tensors may have, for those that share their numbers.
MOST_SHARED = 2


class Refused(Exception):
    """Why the file is not converted, in one line."""


def short(text):
    """A text out of a file as it may stand in a message of one line."""
    shown = str(text).encode("unicode_escape").decode()
    return shown if len(shown) <= 80 else shown[:80] + "…"


class Frozen(type):
    """Makes classes that no pickle can change."""

    def __setattr__(cls, name, value):
        raise Refused(f"its pickle changes the class {cls.__name__}: refused, and nothing of it was run")


class Function:
    """A function that a pickle may call and cannot change."""

    __slots__ = ("call",)

    def __init__(self, call):
        object.__setattr__(self, "call", call)

    def __call__(self, *arguments):
        return self.call(*arguments)

    def __setattr__(self, name, value):
        raise Refused("its pickle changes a function: refused, and nothing of it was run")

    def __setstate__(self, state):
        raise Refused("its pickle changes a function: refused, and nothing of it was run")


class Checked(metaclass=Frozen):
    """What has been checked when it was made, and does not change behind that."""

    def __setstate__(self, state):
        raise Refused(f"its pickle changes a {type(self).__name__} that was made: refused")


class Module(metaclass=Frozen):
    """The state of a torch.nn.Module, without its code."""

    def __init__(self, class_name="a container", state=None):
        self.class_name = class_name
        self.state = state or {}

    def __setstate__(self, state):
        self.class_name = "a container"
        self.state = state

    def get(self, name):
        return self.state.get(name) or {}


class EasyDict(dict, metaclass=Frozen):
    """A dict whose keys are attributes too, over there."""


class NumpyType(metaclass=Frozen):
    """numpy.dtype of a scalar."""

    def __init__(self, name, *_):
        self.name = name

    def __setstate__(self, state):
        self.little = state[1] in ("<", "|", "=")


class Storage(Checked):
    """Numbers of one dtype."""

    def __init__(self, dtype, size, numel):
        self.dtype, self.size, self.numel = dtype, size, numel
        self.data = b""


class Tensor(Checked):
    """A view of a storage."""

    def __init__(self, storage, offset, shape, stride, *_):
        shape, stride = tuple(shape), tuple(stride)
        if not isinstance(storage, Storage) or len(shape) != len(stride) or min((offset, *shape, *stride)) < 0:
            raise Refused("a tensor that is not made of a storage, an offset, a shape and strides")
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride
        count = self.count()
        last = offset + sum((side - 1) * step for side, step in zip(shape, stride))
        if count and (last >= storage.numel or count > storage.numel):
            raise Refused(f"a tensor of shape {list(shape)} reaches beyond its storage of {storage.numel}")

    def count(self):
        count = 1
        for side in self.shape:
            count *= side
        return count

    def bytes(self):
        """The numbers in row-major order."""
        size, data = self.storage.size, self.storage.data
        packed, step = [], 1
        for side in reversed(self.shape):
            packed.append(step)
            step *= side
        real = [(s, p) for side, s, p in zip(self.shape, self.stride, reversed(packed)) if side > 1]
        if all(stride == packed for stride, packed in real):
            return data[self.offset * size : (self.offset + self.count()) * size]
        places = itertools.product(*(range(side) for side in self.shape))
        at = (self.offset + sum(i * step for i, step in zip(place, self.stride)) for place in places)
        return b"".join(data[i * size : (i + 1) * size] for i in at)


def reconstruct(meta):
    """In the place of EDM's function that runs the embedded source and makes an object of its class."""
    state = meta.get("state") if isinstance(meta, dict) else meta
    if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(state, (dict, type(None))):
        raise Refused("an object that is not in EDM's form of pickled classes")
    return Module(str(meta.get("class_name")), state)


def parameter(data, *_):
    return data


def scalar(dtype, data):
    """A number of numpy."""
    form = {"f8": "d", "f4": "f", "i8": "q", "i4": "i", "b1": "?"}.get(dtype.name)
    if form is None:
        raise Refused(f"a number of numpy's type {dtype.name}")
    return struct.unpack(("<" if getattr(dtype, "little", True) else ">") + form, data)[0]


def encode(text, encoding):
    """How old pickles write bytes."""
    if encoding != "latin1":
        raise Refused(f"bytes in the encoding {encoding}")
    return text.encode("latin1")


def size(values=()):
    return tuple(values)


def storage_type(name):
    return (name, *STORAGES[name])


class StorageUnpickler(pickle.Unpickler):
    """Reads what torch.save made of one storage."""

    def find_class(self, module, name):
        if module == "torch" and name in STORAGES:
            return storage_type(name)
        text = f"its pickle names '{short(module)}.{short(name)}' inside a storage: refused, and nothing of it was run"
        raise Refused(text)

    def persistent_load(self, pid):
        if not (isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage" and not any(pid[5:])):
            raise Refused("a persistent id that is not a whole storage")
        (_, dtype, width), key, numel = pid[1], pid[2], pid[4]
        storage = Storage(dtype, width, numel)
        storage.key = key
        return storage


def load_storage(data):
    """In the place of torch's function that loads a storage from bytes with pickle."""
    stream = io.BytesIO(data)
    magic, version, machine, storage, keys = (StorageUnpickler(stream).load() for _ in range(5))
    whole = magic == MAGIC and version == 1001 and isinstance(storage, Storage) and keys == [storage.key]
    if not whole or machine.get("little_endian") is not True:
        raise Refused("a storage that is not one of torch.save on a little-endian machine")
    (numel,) = struct.unpack("<q", stream.read(8))
    storage.data = stream.read(storage.numel * storage.size)
    if numel != storage.numel or len(storage.data) != storage.numel * storage.size:
        raise Refused(f"a storage of {storage.numel} numbers is cut off; copy or download the file again")
    return storage


KNOWN = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): Function(reconstruct),
    ("torch.storage", "_load_from_bytes"): Function(load_storage),
    ("torch._utils", "_rebuild_tensor"): Function(Tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Function(Tensor),
    ("torch._utils", "_rebuild_parameter"): Function(parameter),
    ("torch", "Size"): Function(size),
    ("torch.nn.modules.container", "ModuleDict"): Module,
    ("torch.nn.modules.container", "ModuleList"): Module,
    ("torch.nn.modules.container", "Sequential"): Module,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("dnnlib.util", "EasyDict"): EasyDict,
    ("numpy", "dtype"): NumpyType,
    ("numpy.core.multiarray", "scalar"): Function(scalar),
    ("numpy._core.multiarray", "scalar"): Function(scalar),
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("_codecs", "encode"): Function(encode),
}


class InertUnpickler(pickle.Unpickler):
    """An unpickler to which no name means anything but the ones above."""

    def find_class(self, module, name):
        try:
            return KNOWN[module, name]
        except KeyError:
            text = f"its pickle names '{short(module)}.{short(name)}': refused, and nothing of it was run"
            raise Refused(text) from None


def collect(module, prefix="", seen=None):
    """Parameters and buffers by their full names."""
    seen = set() if seen is None else seen
    if id(module) in seen:
        raise Refused(f"the module '{short(prefix[:-1])}' is in the network twice")
    seen.add(id(module))
    transient = module.get("_non_persistent_buffers_set") or ()
    for group in ("_parameters", "_buffers"):
        for name, tensor in module.get(group).items():
            if isinstance(tensor, Tensor) and not (group == "_buffers" and name in transient):
                yield prefix + name, tensor
            elif tensor is not None and not isinstance(tensor, Tensor):
                raise Refused(f"'{short(prefix + str(name))}' is not a tensor")
    for name, child in module.get("_modules").items():
        if isinstance(child, Module):
            yield from collect(child, f"{prefix}{name}.", seen)
        elif child is not None:
            raise Refused(f"'{short(prefix + str(name))}' is not a module")


SONG = dict(
    model_channels=128, channel_mult=[1, 2, 2, 2], channel_mult_emb=4, num_blocks=4, attn_resolutions=[16],
    dropout=0.1, label_dropout=0, embedding_type="positional", channel_mult_noise=1, encoder_type="standard",
    decoder_type="standard", resample_filter=[1, 1],
)  # fmt: skip
DHARIWAL = dict(
    model_channels=192, channel_mult=[1, 2, 3, 4], channel_mult_emb=4, num_blocks=3, attn_resolutions=[32, 16, 8],
    dropout=0.1, label_dropout=0,
)  # fmt: skip
# What the preconditioning takes beside the network's options.
AROUND = dict(label_dim=0, augment_dim=0, use_fp16=False, sigma_min=None, sigma_max=None, sigma_data=0.5)


def describe(model, about):
    """The description that the model files of this project carry, or None if the arguments do not tell."""
    given = dict(model.get("_init_kwargs"))
    model_type = given.pop("model_type", "DhariwalUNet")
    networks = {"SongUNet": SONG, "DhariwalUNet": DHARIWAL}
    if "img_resolution" not in given or "img_channels" not in given or model_type not in networks:
        return None
    defaults = networks[model_type]
    if model.get("_init_args") or set(given) - set(defaults) - set(AROUND) - {"img_resolution", "img_channels"}:
        return None
    option = {**AROUND, **defaults, **given}
    ect = model.class_name == "ECMPrecond"
    resolution, levels = int(option["img_resolution"]), len(option["channel_mult"])
    here = [resolution >> level for level in range(levels)]
    classes = int(option["label_dim"])
    net = dict(
        kind="song_unet" if model_type == "SongUNet" else "dhariwal_unet",
        image_size=resolution,
        image_channels=int(option["img_channels"]),
        num_classes=classes,
        augment_dim=int(option["augment_dim"]),
        model_channels=int(option["model_channels"]),
        channel_mult=[int(mult) for mult in option["channel_mult"]],
        channel_mult_emb=int(option["channel_mult_emb"]),
        num_blocks=int(option["num_blocks"]),
        attn_resolutions=[int(r) for r in option["attn_resolutions"] if r in here],
        dropout=float(option["dropout"]),
        label_dropout=float(option["label_dropout"]) if classes else 0.0,
    )
    if model_type == "SongUNet":
        # Only a network that starts anew draws its frequencies; this one carries them.
        scale = 0.02 if ect else 16.0
        fourier = option["embedding_type"] == "fourier"
        net.update(
            embedding={"kind": "fourier", "scale": scale} if fourier else {"kind": "positional"},
            channel_mult_noise=int(option["channel_mult_noise"]),
            encoder=option["encoder_type"],
            decoder=option["decoder_type"],
            resample_filter=[float(tap) for tap in option["resample_filter"]],
        )
    # Where EDM's class allows every noise level, its sampler takes these.
    lowest, highest = (0.003 if ect else 0.002), 80.0
    precond = dict(
        sigma_data=float(option["sigma_data"]),
        noise_cond="quarter_log",
        sigma_min=max(float(option["sigma_min"] or 0), 0.002) if option["sigma_min"] is not None else lowest,
        sigma_max=min(float(option["sigma_max"]), highest) if option["sigma_max"] is not None else highest,
        rho=7.0,
    )
    role = "consistency" if ect else "denoiser"
    return dict(format=1, role=role, net=net, precond=precond, about=about)


def write(path, tensors, metadata):
    """A safetensors file, whole or not at all."""
    order = sorted(tensors, key=lambda name: (-tensors[name].storage.size, name))
    header, end = {}, 0
    if metadata:
        header["__metadata__"] = metadata
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.count() * tensor.storage.size
        header[name] = dict(dtype=tensor.storage.dtype, shape=list(tensor.shape), data_offsets=[begin, end])
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(struct.pack("<Q", len(head)) + head)
            for name in order:
                file.write(tensors[name].bytes())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def convert(source, target, key):
    torch_save = f"a file of torch.save, not a .pkl of EDM or ECT; use cm model import {source} -o {target}"
    with open(source, "rb") as file:
        if file.peek(4)[:4] == b"PK\x03\x04":
            raise Refused(torch_save)
        content = InertUnpickler(file).load()
    # The first of the pickles of torch.save's older form.
    if content == MAGIC:
        raise Refused(torch_save)
    model = content
    if isinstance(content, dict):
        if key not in content:
            names = ", ".join(f"'{short(name)}'" for name in itertools.islice(content, 8))
            raise Refused(f"no '{key}' in it, but {names}; choose with --key")
        model = content[key]
    if not isinstance(model, Module):
        raise Refused(f"'{key}' is not a network; choose with --key")
    if model.class_name not in ("EDMPrecond", "ECMPrecond"):
        found = short(model.class_name)
        raise Refused(f"its preconditioning is {found}; this project has EDM's (EDMPrecond) and ECT's (ECMPrecond)")
    tensors = dict(collect(model))
    # Each tensor lies in the file; only what shares its numbers could make more of them.
    total, present = sum(tensor.count() * tensor.storage.size for tensor in tensors.values()), os.path.getsize(source)
    if total > MOST_SHARED * present:
        raise Refused(f"its tensors have {total} bytes, and the file has {present}: no network of EDM or ECT does")
    about = {"source": os.path.basename(source), "weights": key}
    spec = describe(model, about)
    if spec is not None:
        # The network itself, without the preconditioning around it.
        outside = [name for name in tensors if not name.startswith("model.")]
        if outside:
            raise Refused(f"'{short(outside[0])}' is not a part of its network")
        tensors = {name[len("model.") :]: tensor for name, tensor in tensors.items()}
    if not tensors:
        raise Refused("its network has no tensors")
    metadata = {"consistency-rs": json.dumps(spec, separators=(",", ":"))} if spec else {}
    write(target, tensors, metadata)
    count = sum(tensor.count() for tensor in tensors.values())
    print(f"{target}: {len(tensors)} tensors, {count} numbers, from {model.class_name}")
    if spec is None:
        kind = "ect" if model.class_name == "ECMPrecond" else "edm"
        print(
            "The arguments that the network was made with are not in the file or not known here; finish with\n"
            f"  cm model import {target} --as {kind} -o model.safetensors"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="a .pkl of EDM or ECT")
    parser.add_argument("-o", "--out", required=True, help="the safetensors file to write")
    parser.add_argument("--key", default="ema", help="which network of the file (default: ema)")
    options = parser.parse_args()
    try:
        convert(options.file, options.out, options.key)
    except Refused as why:
        sys.exit(f"error: {options.file}: {why}")
    except OSError as why:
        sys.exit(f"error: {why}")
    except (pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, LookupError, MemoryError,
            RecursionError, struct.error, TypeError, ValueError) as why:  # fmt: skip
        sys.exit(f"error: {options.file}: not a whole .pkl of EDM ({type(why).__name__}: {short(why)})")


if __name__ == "__main__":
    main()
