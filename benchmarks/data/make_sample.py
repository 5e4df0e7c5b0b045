"""Makes the demo's sample: the first 6,000 training and 2,000 test images of Fashion-MNIST.

    python benchmarks/data/make_sample.py FOLDER    # with the four *-ubyte.gz files of Fashion-MNIST

The files are those of https://github.com/zalandoresearch/fashion-mnist, also in Debian's package
dataset-fashion-mnist, and MIT licensed (LICENSE.fashion-mnist beside this file).
"""

import gzip
import sys
from pathlib import Path

import numpy as np


def read(path: Path, header: int) -> np.ndarray:
    """Content of an IDX file of bytes, without its header."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


if __name__ == '__main__':
    folder, arrays = Path(sys.argv[1]), {}
    for split, prefix, count in (('train', 'train', 6000), ('test', 't10k', 2000)):
        arrays[f'{split}_images'] = read(folder / f'{prefix}-images-idx3-ubyte.gz', 16).reshape(-1, 28, 28)[:count]
        arrays[f'{split}_labels'] = read(folder / f'{prefix}-labels-idx1-ubyte.gz', 8)[:count]
    np.savez_compressed(Path(__file__).parent / 'fashion_mnist.npz', **arrays)
