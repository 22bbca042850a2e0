"""Small files of MNIST's format, for tests."""

import struct

import numpy as np


def encode(array):
    """Write an array of bytes as IDX."""
    head = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape)
    return head + array.tobytes()


def write_set(folder, n=(60, 20), side=4, seed=0):
    """Write the four files of a data set that can be learned: a class is a bright column or row."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for part, count in zip(("train", "t10k"), n, strict=True):
        labels = np.arange(count, dtype=np.uint8) % (2 * side)
        images = rng.integers(0, 60, (count, side, side), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            (image if label < side else image.T)[label % side] = 255
        (folder / f"{part}-images-idx3-ubyte").write_bytes(encode(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(encode(labels))
