"""What does one program of each Triton kernel do? Imports triton: only call.kernels() imports this.

Offsets of rows and experts are 64-bit: two million rows of 6144 columns pass 2^31. All masks load zeros, so that what
lies beside a kernel's own rows may hold anything.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def grouped_matmul_kernel(
    x_RD,
    w_E,
    tiles_T3,
    y_RF,
    depth: tl.constexpr,
    width: tl.constexpr,
    num_experts: tl.constexpr,
    num_tiles: tl.constexpr,
    transposed: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    step: tl.constexpr,
    band: tl.constexpr,
):
    """Multiply one tile of an expert's rows by one tile of the columns of its weights; rows of no expert give zeros."""
    # Programs sweep `band` row tiles before they move on to the next columns: what is in flight fits in L2.
    num_columns: tl.constexpr = (width + columns - 1) // columns
    program = tl.program_id(0)
    band_first = program // (band * num_columns) * band
    in_band = min(num_tiles - band_first, band)
    inside = program % (band * num_columns)
    tile = band_first + inside % in_band
    first = tl.load(tiles_T3 + 3 * tile + 1).to(tl.int64)
    end = first + tl.load(tiles_T3 + 3 * tile + 2)
    if first < end:
        expert = tl.load(tiles_T3 + 3 * tile).to(tl.int64)
        row = first + tl.arange(0, rows)
        col = inside // in_band * columns + tl.arange(0, columns)
        k = tl.arange(0, step)
        own = row[:, None] < end
        there = col[None, :] < width
        acc = tl.zeros((rows, columns), tl.float32)
        x_at = x_RD + row[:, None] * depth + k[None, :]
        if transposed:
            w_at = w_E + expert * depth * width + col[None, :] * depth + k[:, None]
        else:
            w_at = w_E + expert * depth * width + k[:, None] * width + col[None, :]
        limit = tl.where(expert < num_experts, depth, 0)
        for begin in range(0, limit, step):
            inner = k < depth - begin
            a = tl.load(x_at, mask=own & inner[None, :], other=0.0)
            b = tl.load(w_at, mask=there & inner[:, None], other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
            x_at += step
            w_at += step if transposed else step * width
        tl.store(y_RF + row[:, None] * width + col[None, :], acc.to(y_RF.dtype.element_ty), mask=own & there)


@triton.jit
def grouped_matmul_dw_kernel(
    x_RD,
    dy_RF,
    first_E,
    end_E,
    dw_EDF,
    depth: tl.constexpr,
    width: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    step: tl.constexpr,
):
    """Multiply one expert's rows, transposed, by its gradients: one tile of dw; an expert without rows gives zeros."""
    expert = tl.program_id(1).to(tl.int64)
    num_columns: tl.constexpr = (width + columns - 1) // columns
    d = tl.program_id(0) // num_columns * rows + tl.arange(0, rows)
    f = tl.program_id(0) % num_columns * columns + tl.arange(0, columns)
    first, end = tl.load(first_E + expert).to(tl.int64), tl.load(end_E + expert).to(tl.int64)
    acc = tl.zeros((rows, columns), tl.float32)
    for begin in range(first, end, step):
        row = begin + tl.arange(0, step)
        own = row < end
        # x comes transposed out of memory: a dot of a transposed accumulator is miscompiled on Hopper (triton < 3.8)
        a = tl.load(x_RD + row[None, :] * depth + d[:, None], mask=own[None, :] & (d < depth)[:, None], other=0.0)
        b = tl.load(dy_RF + row[:, None] * width + f[None, :], mask=own[:, None] & (f < width)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    there = (d < depth)[:, None] & (f < width)[None, :]
    out = dw_EDF + expert * depth * width + d[:, None].to(tl.int64) * width + f[None, :]
    tl.store(out, acc.to(dw_EDF.dtype.element_ty), mask=there)


@triton.jit
def gather_rows_kernel(
    x_MD,
    index_X,
    y_XD,
    num_rows: tl.constexpr,
    num_out: tl.constexpr,
    depth: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Copy a block of rows by index; an index outside of the rows gives zeros."""
    i = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    d = tl.program_id(1) * columns + tl.arange(0, columns)
    index = tl.load(index_X + i, mask=i < num_out, other=-1).to(tl.int64)
    there = (d < depth)[None, :]
    taken = ((index >= 0) & (index < num_rows))[:, None]
    x = tl.load(x_MD + index[:, None] * depth + d[None, :], mask=taken & there, other=0.0)
    tl.store(y_XD + i[:, None] * depth + d[None, :], x, mask=(i < num_out)[:, None] & there)


@triton.jit
def combine_rows_kernel(
    y_RD,
    place_MA,
    weights_MA,
    out_MD,
    num_rows: tl.constexpr,
    num_tokens: tl.constexpr,
    num_active: tl.constexpr,
    depth: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Sum each token's rows by weight in float32, in the order of its choices."""
    m = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    d = tl.program_id(1) * columns + tl.arange(0, columns)
    there = (d < depth)[None, :]
    acc = tl.zeros((rows, columns), tl.float32)
    for a in tl.static_range(num_active):  # pyright: ignore[reportGeneralTypeIssues]
        place = tl.load(place_MA + m * num_active + a, mask=m < num_tokens, other=-1).to(tl.int64)
        weight = tl.load(weights_MA + m * num_active + a, mask=m < num_tokens, other=0.0).to(tl.float32)
        taken = (place >= 0) & (place < num_rows)
        y = tl.load(y_RD + place[:, None] * depth + d[None, :], mask=taken[:, None] & there, other=0.0)
        acc += tl.where(taken, weight, 0.0)[:, None] * y.to(tl.float32)
    out = out_MD + m[:, None] * depth + d[None, :]
    tl.store(out, acc.to(out_MD.dtype.element_ty), mask=(m < num_tokens)[:, None] & there)
