"""Triton kernels for weights with a sparse part; imported only by kernels.py, and only if triton is installed.

A weight (out_features, in_features) is divided into tiles of ROWS x COLUMNS, one program each. The table `starts` locates entries
of S: every row of the weight is divided into blocks of WIDTH columns. Since positions are sorted, the entries of block b of row o
have the numbers starts[o * num_blocks + b] to starts[o * num_blocks + b + 1] - 1, at most WIDTH of them.
"""

import triton
import triton.language as tl

# True if TRITON_INTERPRET=1 when this module is imported; the kernels then run in NumPy on the CPU.
INTERPRETED: bool = triton.knobs.runtime.interpret


@triton.jit
def block_starts(
    positions, starts, num_positions, out_features, in_features, num_blocks, WIDTH: tl.constexpr, SIZE: tl.constexpr
):
    """Sets starts[c] to the number of positions before block c, c = 0 .. out_features * num_blocks, by binary search."""
    block = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    row, column = block // num_blocks, block % num_blocks * WIDTH
    # 64 bits, because the last bound is the number of entries, which may exceed int32 even if all positions fit.
    bound = row.to(tl.int64) * in_features + column
    low = tl.zeros((SIZE,), tl.int64)
    high = low + num_positions
    while tl.max(high - low) > 0:
        middle = (low + high) // 2
        before = (tl.load(positions + middle, mask=low < high, other=0) < bound) & (low < high)
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    tl.store(starts + block, low, mask=block <= out_features * num_blocks)


@triton.jit
def _place(program, out_features, in_features, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Returns the first row and column of a program's tile; GROUP rows of tiles run together, to share data in the L2 cache."""
    across = tl.cdiv(in_features, COLUMNS)
    first = program // (GROUP * across) * GROUP
    height = min(tl.cdiv(out_features, ROWS) - first, GROUP)
    inside = program % (GROUP * across)
    return (first + inside % height) * ROWS, inside // height * COLUMNS


@triton.jit
def build_weight(
    lora_A,
    scaled_B,
    values,
    positions,
    starts,
    weight,
    out_features,
    in_features,
    rank,
    stride_A,
    stride_B,
    num_blocks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes one tile of scaled_B A + S: the accumulator starts as the tile of S, the product is added, the sum is stored once.

    stride_A >= in_features: columns beyond in_features are read and ignored, which keeps loads wide and aligned.
    """
    first_row, first_column = _place(tl.program_id(0), out_features, in_features, ROWS, COLUMNS, GROUP)
    rows, columns = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)

    blocks = first_column // WIDTH + tl.arange(0, COLUMNS // WIDTH)
    known = (rows[:, None] < out_features) & (blocks[None, :] < num_blocks)
    start = starts + (rows[:, None] * num_blocks + blocks[None, :])
    begin = tl.load(start, mask=known, other=0)
    end = tl.load(start + 1, mask=known, other=0)
    # In the positions' dtype, which is 64 bits wide if the product needs it.
    origin = rows[:, None].to(positions.dtype.element_ty) * in_features + blocks[None, :] * WIDTH
    inside = tl.arange(0, WIDTH)[None, None, :]
    sparse = tl.zeros((ROWS, COLUMNS // WIDTH, WIDTH), tl.float32)
    for entry in range(tl.max(end - begin)):
        number = begin + entry
        position = tl.load(positions + number, mask=number < end, other=0)
        value = tl.load(values + number, mask=number < end, other=0.0).to(tl.float32)
        column = tl.where(number < end, position - origin, -1)
        sparse = tl.where(column[:, :, None] == inside, value[:, :, None], sparse)
    accumulator = tl.reshape(sparse, (ROWS, COLUMNS))

    depth = tl.arange(0, DEPTH)
    from_B = scaled_B + rows[:, None].to(tl.int64) * stride_B + depth[None, :]
    from_A = lora_A + depth[:, None].to(tl.int64) * stride_A + columns[None, :]
    for done in range(0, rank, DEPTH):
        valid = depth < rank - done
        b = tl.load(from_B, mask=(rows[:, None] < out_features) & valid[None, :], other=0.0)
        a = tl.load(from_A, mask=valid[:, None] & (columns[None, :] < stride_A), other=0.0)
        accumulator = tl.dot(b, a, accumulator, input_precision=PRECISION)
        from_B += DEPTH
        from_A += DEPTH * stride_A

    to = weight + rows[:, None].to(tl.int64) * in_features + columns[None, :]
    keep = (rows[:, None] < out_features) & (columns[None, :] < in_features)
    tl.store(to, accumulator.to(weight.dtype.element_ty), mask=keep)


@triton.jit
def gather_gradient(
    grad_output,
    x,
    positions,
    starts,
    gathered,
    num_rows,
    rows_per_split,
    out_features,
    in_features,
    stride_G,
    stride_x,
    num_positions,
    num_blocks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes one tile of G^T x over one share of the rows of G and x, and stores only the entries at the positions.

    gathered: (splits, num_positions), one row per share; program_id(1) is the share's number.
    stride_G >= out_features, stride_x >= in_features: as in build_weight.
    """
    first_row, first_column = _place(tl.program_id(0), out_features, in_features, ROWS, COLUMNS, GROUP)
    rows, columns = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)

    first = tl.program_id(1) * rows_per_split
    last = min(first + rows_per_split, num_rows)
    token = first + tl.arange(0, DEPTH)
    from_G = grad_output + token[:, None].to(tl.int64) * stride_G + rows[None, :]
    from_x = x + token[:, None].to(tl.int64) * stride_x + columns[None, :]
    accumulator = tl.zeros((ROWS, COLUMNS), tl.float32)
    for done in range(first, last, DEPTH):
        valid = done + tl.arange(0, DEPTH) < last
        g = tl.load(from_G, mask=valid[:, None] & (rows[None, :] < stride_G), other=0.0)
        x_tile = tl.load(from_x, mask=valid[:, None] & (columns[None, :] < stride_x), other=0.0)
        accumulator = tl.dot(tl.trans(g), x_tile, accumulator, input_precision=PRECISION)
        from_G += DEPTH * stride_G
        from_x += DEPTH * stride_x

    # The blocks of a tile are adjacent, so a row's entries in the tile are one contiguous range of positions.
    block = rows * num_blocks + first_column // WIDTH
    known = rows < out_features
    begin = tl.load(starts + block, mask=known, other=0)
    num_here = min(COLUMNS // WIDTH, num_blocks - first_column // WIDTH)
    end = tl.load(starts + block + num_here, mask=known, other=0)
    origin = rows.to(positions.dtype.element_ty) * in_features + first_column
    to = gathered + tl.program_id(1).to(tl.int64) * num_positions
    for done in range(0, tl.max(end - begin), AT_ONCE):
        number = begin[:, None] + done + tl.arange(0, AT_ONCE)[None, :]
        valid = number < end[:, None]
        position = tl.load(positions + number, mask=valid, other=0)
        column = tl.where(valid, position - origin[:, None], 0).to(tl.int32)
        gradient = tl.gather(accumulator, column, 1)
        tl.store(to + number, gradient.to(gathered.dtype.element_ty), mask=valid)
