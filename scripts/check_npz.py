#!/usr/bin/env python3
"""Images in NumPy's archives, from there to here and back: what `crates/cm-data/tests/numpy.rs` holds against files.

    .libtorch/python/bin/python scripts/check_npz.py write FOLDER     the fixtures that NumPy writes
    .libtorch/python/bin/python scripts/check_npz.py read FILE.npz    reads a file that was written here, array by array

Pixels and labels are functions of their places, which the tests know too.
"""

import os
import sys

import numpy as np

SHAPE = (5, 4, 3, 3)
LABELS = np.array([3, 0, 9, 1, 3], dtype=np.int64)


def images():
    count = int(np.prod(SHAPE))
    return ((np.arange(count) * 37 + 11) % 256).astype(np.uint8).reshape(SHAPE)


def write(folder):
    np.savez(os.path.join(folder, "images-numpy.npz"), images(), LABELS)
    # Without labels, deflated, and grey.
    np.savez_compressed(os.path.join(folder, "images-numpy-grey.npz"), images()[..., :1])


def read(path):
    with np.load(path, allow_pickle=False) as archive:
        found = {name: archive[name] for name in archive.files}
    assert sorted(found) == ["arr_0", "arr_1"], sorted(found)
    for name, expected in [("arr_0", images()), ("arr_1", LABELS)]:
        array = found[name]
        assert array.dtype == expected.dtype, f"{name}: {array.dtype}"
        assert np.array_equal(array, expected), f"{name}: other numbers"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["write", folder]:
            write(folder)
        case ["read", path]:
            read(path)
        case _:
            sys.exit(__doc__)
