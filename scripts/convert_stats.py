#!/usr/bin/env python3
"""Turns reference statistics in EDM2's .pkl (Karras et al. 2024) into the .npz that `cm eval --reference` reads.

    python3 convert_stats.py img512.pkl -o img512-fid.npz
    python3 convert_stats.py img512.pkl --key fd_dinov2 -o img512-dinov2.npz

pickle.load runs what a file tells it to. This script does not: dicts, numbers, texts and NumPy arrays of floats are
read with stand-ins of its own, and any other name is refused. It needs Python 3.8 or later and no package.
"""

import argparse
import math
import os
import pickle
import sys
import tempfile
import zipfile

KINDS = {"f4": 4, "f8": 8}
# A covariance of 8192 numbers an image has half as many.
MOST_BYTES = 1 << 30


class Refused(Exception):
    """Why the file is not converted, in one line."""


class Kind:
    """numpy.dtype of a float."""

    def __init__(self, name, *_):
        if name not in KINDS:
            raise Refused(f"an array of {str(name)[:40]!r}: expected float32 or float64")
        self.name, self.order = name, "<"

    def __setstate__(self, state):
        self.order = {"<": "<", ">": ">", "=": "<", "|": "<"}.get(state[1] if len(state) > 1 else None)
        if self.order is None:
            raise Refused("an array of an unknown byte order")


class Array:
    """A NumPy array: its shape, and its numbers as they lie in the file."""

    shape, kind, fortran, data = None, None, False, b""

    def __setstate__(self, state):
        _, shape, kind, fortran, data = state
        self.fill(shape, kind, fortran, data)

    def fill(self, shape, kind, fortran, data):
        if not isinstance(kind, Kind) or not isinstance(data, (bytes, bytearray)):
            raise Refused("an array that is not made of floats")
        shape = tuple(shape)
        if not all(isinstance(side, int) and side >= 0 for side in shape):
            raise Refused("an array without a shape")
        size = math.prod(shape) * KINDS[kind.name]
        if size > MOST_BYTES or size != len(data):
            raise Refused(f"an array of shape {list(shape)} with {len(data)} bytes")
        self.shape, self.kind, self.fortran, self.data = shape, kind, bool(fortran), bytes(data)
        return self


def reconstruct(*_):
    return Array()


def from_buffer(data, kind, shape, order):
    return Array().fill(shape, kind, order == "F", data)


class Reader(pickle.Unpickler):
    """Reads a pickle whose only names are those of NumPy's arrays."""

    def find_class(self, module, name):
        modules = ("numpy.core", "numpy._core")
        if (module, name) == ("numpy", "ndarray"):
            return Array
        if (module, name) == ("numpy", "dtype"):
            return Kind
        if name == "_reconstruct" and module in [f"{m}.multiarray" for m in modules]:
            return reconstruct
        if name == "_frombuffer" and module in [f"{m}.numeric" for m in modules]:
            return from_buffer
        raise Refused(f"it names {module[:40]}.{name[:40]}, which statistics do not need: refused, and nothing was run")

    def persistent_load(self, _):
        raise Refused("it refers to something outside of the file")


def read(path, key):
    try:
        with open(path, "rb") as file:
            found = Reader(file).load()
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"no whole pickle of statistics ({type(error).__name__})") from error
    if isinstance(found, dict) and isinstance(found.get(key), dict):
        found = found[key]
    elif not (isinstance(found, dict) and "mu" in found):
        keys = ", ".join(str(k)[:40] for k in list(found)[:10]) if isinstance(found, dict) else type(found).__name__
        raise Refused(f"no statistics under --key {key}; it holds {keys}")
    mu, sigma = found.get("mu"), found.get("sigma")
    if not (isinstance(mu, Array) and isinstance(sigma, Array)) or len(mu.shape or ()) != 1:
        raise Refused(f"no arrays mu and sigma under --key {key}")
    if sigma.shape != mu.shape * 2:
        raise Refused(f"mu of shape {list(mu.shape)} and sigma of shape {list(sigma.shape)} do not belong together")
    return {"mu": mu, "sigma": sigma}


def npy(array):
    """An array as a .npy file."""
    shape = f"({array.shape[0]},)" if len(array.shape) == 1 else str(array.shape)
    kind = array.kind.order + array.kind.name
    text = f"{{'descr': '{kind}', 'fortran_order': {array.fortran}, 'shape': {shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + array.data


def write(path, arrays):
    folder = os.path.dirname(os.path.abspath(path))
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as temp:
        try:
            with zipfile.ZipFile(temp, "w") as archive:
                for name, array in arrays.items():
                    archive.writestr(f"{name}.npy", npy(array))
            temp.close()
            os.replace(temp.name, path)
        except BaseException:
            os.unlink(temp.name)
            raise


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="the .pkl")
    parser.add_argument("--key", default="fid", help="which statistics of several [fid]")
    parser.add_argument("-o", "--out", required=True, help="the .npz to write")
    args = parser.parse_args()
    try:
        write(args.out, read(args.file, args.key))
    except (Refused, OSError) as error:
        print(f"error: {args.file}: {error}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
