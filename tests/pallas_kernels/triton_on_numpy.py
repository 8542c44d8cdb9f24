"""Run Triton kernels on the CPU: Triton's interpreter, on numpy arrays, in a process of its own; only float32 is right.

    TRITON_INTERPRET=1 python triton_on_numpy.py CASES.npz OUT.npz

CASES holds, for each case NAME, the inputs as NAME/0, NAME/1, ...; `CASES_BY_NAME` says what is launched on them.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.group_tiles import group_ends, tile_map
from pallas_kernels.triton import grouped_matmul, kernels, permute
from pallas_kernels.triton.call import Launch

POISON = np.nan
"""What outputs hold before a kernel writes them."""


@functools.cache
def torch_dtype(name: str) -> Any:
    """Give a stand-in for a torch dtype, always the same: Triton knows dtypes by their address."""
    return type(name, (), {"__str__": lambda _: f"torch.{name}"})()


class Tensor:
    """What Triton's interpreter wants of a torch tensor, of a numpy array."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.dtype = torch_dtype(str(array.dtype))
        self.shape = array.shape

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "Tensor":
        return self

    def cpu(self) -> "Tensor":
        return self

    def new_empty(self, *_: Any, **__: Any) -> "Tensor":
        return self

    def set_(self, *_: Any) -> None: ...

    def copy_(self, _: Any) -> None: ...

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> None: ...

    def element_size(self) -> int:
        return self.array.itemsize

    def is_contiguous(self) -> bool:
        return True


def launched(kernel: Any, arrays: list[Any], shape: tuple[int, ...], launch: Launch) -> np.ndarray:
    """Launch a kernel on the arrays and a poisoned output of `shape`; give the output."""
    out = np.full(shape, POISON, np.float32)
    tensors = [Tensor(np.ascontiguousarray(x)) for x in arrays]
    kernel[launch.grid](*tensors, Tensor(out), **launch.constants)
    return out


def forward(x: np.ndarray, w: np.ndarray, sizes: np.ndarray, transpose_w: bool) -> np.ndarray:
    config = grouped_matmul.Config(rows=16, columns=32, step=16, band=2)
    width = w.shape[1 if transpose_w else 2]
    tiles = np.asarray(tile_map(jnp.asarray(sizes), x.shape[0], config.rows)[0])
    launch = grouped_matmul.forward_launch(x.shape, width, len(sizes), transpose_w, config)
    return launched(kernels.grouped_matmul_kernel, [x, w, tiles], (x.shape[0], width), launch)


def dw(x: np.ndarray, dy: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    config = grouped_matmul.Config(rows=16, columns=32, step=16)
    end = np.asarray(group_ends(jnp.asarray(sizes), x.shape[0]))
    first = np.append(0, end[:-1]).astype(np.int32)
    launch = grouped_matmul.dw_launch(x.shape[1], dy.shape[1], len(sizes), config)
    shape = (len(sizes), x.shape[1], dy.shape[1])
    return launched(kernels.grouped_matmul_dw_kernel, [x, dy, first, end], shape, launch)


def gather(x: np.ndarray, index: np.ndarray) -> np.ndarray:
    launch = permute.gather_launch(x.shape[0], x.shape[1], index.size)
    return launched(kernels.gather_rows_kernel, [x, index], (index.size, x.shape[1]), launch)


def combine(y: np.ndarray, place: np.ndarray, weights: np.ndarray) -> np.ndarray:
    launch = permute.combine_launch(y.shape, place.shape)
    return launched(kernels.combine_rows_kernel, [y, place, weights], (place.shape[0], y.shape[1]), launch)


CASES_BY_NAME: dict[str, Callable[..., np.ndarray]] = {
    "forward": lambda *args: forward(*args, transpose_w=False),
    "transposed": lambda *args: forward(*args, transpose_w=True),
    "dw": dw,
    "gather": gather,
    "combine": combine,
}

if __name__ == "__main__":
    given = np.load(sys.argv[1])
    names = sorted({key.split("/")[0] for key in given})
    results = {}
    for name in names:
        inputs = [given[f"{name}/{i}"] for i in range(sum(key.split("/")[0] == name for key in given))]
        results[name] = CASES_BY_NAME[name.split(" ")[0]](*inputs)
    np.savez(sys.argv[2], **results)
