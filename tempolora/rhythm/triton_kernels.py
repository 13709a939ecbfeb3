"""The fused rhythm kernel in Triton: flow loss, energies and gradient from one read of e = x - v.

Legend: B sample, C channel, T latent frame, H, W latent height and width, P probe row; N pixels of
a tile, R rows of a chunk, M probe rows of a piece. A row is one (t, c) of a pixel's column.

A program takes tiles of N pixels of one sample. It forms e in float32, lets the probe see it on the
matrix units (y = K e), and writes g = a e + K^T (w y) while e is still on the chip; meanwhile the
next tiles are being fetched. What it summed goes to a table. The last program of a sample to arrive
adds that sample's entries in a fixed order, so that no result depends on who came last.

Precision: the matrix units take float16 and add in float32, so K, e and w y are brought into its
range by exact powers of two; for float32 inputs each is split into two float16 numbers, which keeps
22 bits. A program whose residual turns out too large or too small for float16 as it is walks over
its tiles again by the careful way, which measures a tile before it rounds it. Columns too long to
stay on the chip go that way from the start, and are read twice, the second time from the L2 cache.
What cuts a problem into tiles, chunks and pieces, and launches it: triton_launch.py.
"""

import triton
import triton.language as tl

ROW_NORM = tl.constexpr(16.0)
"""Rows of a prepared probe have norms from half of this up to this."""
LARGEST = tl.constexpr(2.0**24)
"""Square of the longest column whose w y, at that norm, float16 is sure to hold."""
SMALLEST_ONE = tl.constexpr(2.0**-28)
"""Least mean square of a residual that rounding to one float16 number leaves exact enough."""
SMALLEST_TWO = tl.constexpr(2.0**-8)
"""The same for two float16 numbers, the second of which is 2^11 times smaller."""
ENTRIES = tl.constexpr(32)
"""Table entries that are added at once."""

WARPS = 4
"""Warps of a program: together they issue one instruction of the matrix units."""

RUNTIME = [f"{tensor}_{axis}" for tensor in "xvg" for axis in "bcthw"]
RUNTIME += ["width", "pixels", "splits", "probe_b"]
"""Integers that differ from call to call and must not make a new kernel each."""


@triton.jit
def _power_of_two(x):
    """The largest power of two up to x, of a positive float32."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _at(image, i, first_c, n, width, C: tl.constexpr, R: tl.constexpr, FLAT: tl.constexpr):
    """Pointers (R, N) to chunk i of the pixels n. image: pointer and strides of c, t, h and w."""
    ptr, stride_c, stride_t, stride_h, stride_w = image
    ptr += first_c * stride_c
    if FLAT:
        pixel_N = n
    else:
        pixel_N = (n // width) * stride_h + (n % width) * stride_w
    r = tl.arange(0, R)
    if R % C == 0:  # then chunks differ by whole frames and share their offsets
        ptr += i * (R // C) * stride_t
    else:
        r += i * R
    row_R = (r % C) * stride_c + (r // C) * stride_t
    return ptr + (row_R[:, None] + pixel_N[None, :])


@triton.jit
def _inside(
    i, inside_N, left, C: tl.constexpr, T: tl.constexpr, R: tl.constexpr, WHOLE: tl.constexpr
):
    """Which elements of chunk i exist. left: how many channels there are, unless WHOLE."""
    d = i * R + tl.arange(0, R)
    inside_R = d < C * T
    if not WHOLE:
        inside_R &= d % C < left
    return inside_R[:, None] & inside_N[None, :]


@triton.jit
def _read(
    x,
    v,
    i,
    first_c,
    n,
    inside_N,
    width,
    CHANNELS: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    HAS_V: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Chunk i of x and of v, as stored."""
    inside = _inside(i, inside_N, CHANNELS - first_c, C, T, R, CHANNELS % C == 0)
    x_RN = tl.load(_at(x, i, first_c, n, width, C, R, FLAT), inside, 0.0)
    if HAS_V:
        return (x_RN, tl.load(_at(v, i, first_c, n, width, C, R, FLAT), inside, 0.0))
    else:
        return (x_RN,)


@triton.jit
def _ahead(
    x,
    v,
    first_c,
    n,
    inside_N,
    width,
    CHANNELS: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    HAS_V: tl.constexpr,
    FLAT: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """The first chunks of a tile."""
    read = ()
    for i in tl.static_range(AHEAD):
        read += (_read(x, v, i, first_c, n, inside_N, width, CHANNELS, C, T, R, HAS_V, FLAT),)
    return read


@triton.jit
def _fetch(x_desc, v_desc, sample, c, n, R: tl.constexpr, N: tl.constexpr, HAS_V: tl.constexpr):
    """The columns of one channel at the pixels from n on, as stored; zeros where there are none."""
    x_RN = x_desc.load([sample, c, 0, n]).reshape(R, N)
    if HAS_V:
        return (x_RN, v_desc.load([sample, c, 0, n]).reshape(R, N))
    else:
        return (x_RN,)


@triton.jit
def _residual(read, one, HAS_V: tl.constexpr):
    if HAS_V:
        return read[0].to(tl.float32) - read[1].to(tl.float32) * one
    else:
        return read[0].to(tl.float32) * one


@triton.jit
def _halves(x, HALVES: tl.constexpr):
    """x as one float16 number, or as two whose sum it is."""
    high = x.to(tl.float16)
    if HALVES == 2:
        return (high, (x - high.to(tl.float32)).to(tl.float16))
    else:
        return (high,)


@triton.jit
def _flip(a, HALVES: tl.constexpr):
    if HALVES == 2:
        return (tl.trans(a[0]), tl.trans(a[1]))
    else:
        return (tl.trans(a[0]),)


@triton.jit
def _dot(a, b, c, HALVES: tl.constexpr):
    """a b + c of halves; low times low is less than float32 keeps."""
    if HALVES == 2:
        c = tl.dot(a[1], b[0], c)
        c = tl.dot(a[0], b[1], c)
    return tl.dot(a[0], b[0], c)


@triton.jit
def _zeros(N: tl.constexpr, M: tl.constexpr):
    return tl.zeros([N, M], tl.float32)


@triton.jit
def _nothing(N: tl.constexpr, SIZES: tl.constexpr):
    y = ()
    for j in tl.static_range(len(SIZES)):
        y += (_zeros(N, SIZES[j]),)
    return y


@triton.jit
def _piece(
    ptr,
    i,
    R: tl.constexpr,
    START: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    HALVES: tl.constexpr,
):
    row = (i * R + tl.arange(0, R)) * (WIDTH * HALVES)
    at = ptr + row[:, None] + (START + tl.arange(0, SIZE))[None, :]
    high = tl.load(at)
    if HALVES == 2:
        return (high, tl.load(at + WIDTH))
    else:
        return (high,)


@triton.jit
def _probe(
    ptr, i, R: tl.constexpr, STARTS: tl.constexpr, SIZES: tl.constexpr, HALVES: tl.constexpr
):
    """The transposed probe at chunk i, in pieces (R, M) of halves."""
    WIDTH: tl.constexpr = STARTS[len(SIZES) - 1] + SIZES[len(SIZES) - 1]
    pieces = ()
    for j in tl.static_range(len(SIZES)):
        pieces += (_piece(ptr, i, R, STARTS[j], SIZES[j], WIDTH, HALVES),)
    return pieces


@triton.jit
def _see(y, e_NR, probe, one, HALVES: tl.constexpr):
    """y + K e of one chunk, in pieces (N, M)."""
    seen = ()
    for j in tl.static_range(len(y)):
        if HALVES == 2:
            # The matrix units cut off what they add, which over a long column shows in float32:
            # chunks are added outside them (without the factor the compiler would move that in).
            seen += (y[j] + _dot(e_NR, probe[j], tl.zeros_like(y[j]), HALVES) * one,)
        else:
            seen += (_dot(e_NR, probe[j], y[j], HALVES),)
    return seen


@triton.jit
def _diagonal(i, rate, R: tl.constexpr, C: tl.constexpr, FIRST: tl.constexpr):
    """rate at the rows of chunk i that are learned: what the flow loss is as a probe."""
    r = tl.arange(0, R)
    learned_R = i * R + r >= FIRST * C
    return tl.where((r[:, None] == r[None, :]) & learned_R[:, None], rate, 0.0).to(tl.float16)


@triton.jit
def _gradient(e_NR, diagonal, u, probe, N: tl.constexpr, R: tl.constexpr, HALVES: tl.constexpr):
    """a e + K^T u of one chunk, (R, N)."""
    g_NR = tl.dot(e_NR[0], diagonal, _zeros(N, R))
    if HALVES == 2:
        g_NR = tl.dot(e_NR[1], diagonal, g_NR)
    for j in tl.static_range(len(u)):
        g_NR = _dot(u[j], _flip(probe[j], HALVES), g_NR, HALVES)
    return tl.trans(g_NR)


@triton.jit
def _weights(
    ptr,
    b,
    START: tl.constexpr,
    SIZE: tl.constexpr,
    P: tl.constexpr,
    EACH: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """The weights of a piece's probe rows: EACH row's own, or all the sample's, or one."""
    p = START + tl.arange(0, SIZE)
    if WEIGHTED:
        return tl.load(ptr + (b * P + p % P if EACH else b + p * 0))
    else:
        return tl.full([SIZE], 1.0, tl.float32)


@triton.jit
def _gains(ptr, START: tl.constexpr, SIZE: tl.constexpr):
    return tl.load(ptr + START + tl.arange(0, SIZE))


@triton.jit
def _zero_sums(N: tl.constexpr, SIZES: tl.constexpr, EACH: tl.constexpr):
    sums = ()
    for j in tl.static_range(len(SIZES)):
        sums += (tl.sum(_zeros(SIZES[j] if EACH else N, 1), 1),)
    return sums


@triton.jit
def _weigh(
    y,
    sums,
    inverse,
    unit,
    gain_ptr,
    weight_ptr,
    b,
    STARTS: tl.constexpr,
    SIZES: tl.constexpr,
    P: tl.constexpr,
    EACH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HALVES: tl.constexpr,
):
    """Add the energies of y to sums, (M,) of rows or (N,) of pixels; return u = w y in halves."""
    u = ()
    added = ()
    for j in tl.static_range(len(SIZES)):
        strong = y[j] * _gains(gain_ptr, STARTS[j], SIZES[j])[None, :]
        energy = tl.sum(y[j] * strong, 0 if EACH else 1)
        added += (sums[j] + energy * (inverse * inverse),)
        weight = _weights(weight_ptr, b, STARTS[j], SIZES[j], P, EACH, WEIGHTED) / unit
        u += (_halves(strong * weight[None, :], HALVES),)
    return (added, u)


@triton.jit
def _finish(
    table_ptr,
    flow_ptr,
    energy_ptr,
    b,
    splits,
    pixels,
    FLOW_ROWS: tl.constexpr,
    P: tl.constexpr,
    COPIES: tl.constexpr,
    ENTRY: tl.constexpr,
    EACH: tl.constexpr,
):
    """Add a sample's table entries, a fixed number at a time. COPIES: channels of a probe row."""
    COLUMNS: tl.constexpr = P if EACH else 1
    for start in tl.static_range(0, COLUMNS, 64):
        p = start + tl.arange(0, 64)
        energy_M = tl.zeros([64], tl.float32)
        for first in range(0, splits, ENTRIES):
            entry = (first + tl.arange(0, ENTRIES))[:, None]
            for copy in tl.static_range(COPIES if EACH else 1):
                column = 1 + copy * P + p[None, :]
                inside = (entry < splits) & (p[None, :] < COLUMNS)
                at = table_ptr + entry * ENTRY + column
                energy_M += tl.sum(tl.load(at, inside, 0.0, cache_modifier=".cg"), 0)
        tl.store(energy_ptr + b * COLUMNS + p, energy_M / pixels, p < COLUMNS)
    flow = 0.0
    for first in range(0, splits, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        at = table_ptr + entry * ENTRY
        flow += tl.sum(tl.load(at, entry < splits, 0.0, cache_modifier=".cg"))
    tl.store(flow_ptr + b, flow / FLOW_ROWS / pixels)


@triton.jit(do_not_specialize=RUNTIME)
def fused_kernel(
    x_desc,
    v_desc,
    g_desc,
    x_ptr,
    v_ptr,
    g_ptr,
    probe_ptr,
    gain_ptr,
    weight_ptr,
    d_flow_ptr,
    d_energy_ptr,
    table_ptr,
    counter_ptr,
    flow_ptr,
    energy_ptr,
    unit_ptr,
    x_b,
    x_c,
    x_t,
    x_h,
    x_w,
    v_b,
    v_c,
    v_t,
    v_h,
    v_w,
    g_b,
    g_c,
    g_t,
    g_h,
    g_w,
    width,
    pixels,
    splits,
    probe_b,
    share,
    one,
    CHANNELS: tl.constexpr,
    P: tl.constexpr,
    COPIES: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    FIRST: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    STARTS: tl.constexpr,
    SIZES: tl.constexpr,
    HALVES: tl.constexpr,
    RESIDENT: tl.constexpr,
    DESCRIBED: tl.constexpr,
    AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_V: tl.constexpr,
    GRAD: tl.constexpr,
    AGAIN: tl.constexpr,
    EXACT: tl.constexpr,
    EACH: tl.constexpr,
    FLAT: tl.constexpr,
    UNIT: tl.constexpr,
    ALIKE: tl.constexpr,
    WIDE: tl.constexpr,
):
    GROUPS: tl.constexpr = (CHANNELS + C - 1) // C
    CHUNKS: tl.constexpr = (C * T + R - 1) // R
    WIDTH: tl.constexpr = STARTS[len(SIZES) - 1] + SIZES[len(SIZES) - 1]
    ENTRY: tl.constexpr = WIDTH + 1 if EACH else 2
    PIPELINE: tl.constexpr = STAGES if DESCRIBED else 1
    WEIGHTED: tl.constexpr = HAS_V or AGAIN
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32

    program = tl.program_id(0)
    sample = program // splits
    b = sample.to(tl.int64)
    split = program % splits

    # Strides of b, c and t and the pixels come in units of UNIT, so that the compiler knows what
    # divides them; it could not know that two tensors are ALIKE either.
    pixels *= UNIT
    x_ptr += b * (x_b.to(tl.int64) * UNIT)
    x = (x_ptr, x_c.to(INDEX) * UNIT, x_t.to(INDEX) * UNIT, x_h.to(INDEX), x_w.to(INDEX))
    if ALIKE:
        v = (v_ptr + b * (x_b.to(tl.int64) * UNIT), x[1], x[2], x[3], x[4])
        g = (g_ptr + b * (x_b.to(tl.int64) * UNIT), x[1], x[2], x[3], x[4])
    else:
        v_ptr += b * (v_b.to(tl.int64) * UNIT)
        g_ptr += b * (g_b.to(tl.int64) * UNIT)
        v = (v_ptr, v_c.to(INDEX) * UNIT, v_t.to(INDEX) * UNIT, v_h.to(INDEX), v_w.to(INDEX))
        g = (g_ptr, g_c.to(INDEX) * UNIT, g_t.to(INDEX) * UNIT, g_h.to(INDEX), g_w.to(INDEX))
    probe_ptr += b * probe_b * (CHUNKS * R * WIDTH * HALVES)
    gain_ptr += b * probe_b * WIDTH
    plane_tiles = tl.cdiv(pixels, N)
    tiles = plane_tiles * GROUPS

    # g is kept in a unit of its own that is neither large nor small beside e, since a gradient of
    # means over millions of numbers underflows in float16.
    alpha = 0.0
    if HAS_V:
        alpha = 1.0 / (CHANNELS * (T - FIRST))
    given_ptr = weight_ptr
    if AGAIN:
        d_flow = tl.load(d_flow_ptr + b)
        alpha *= d_flow
        given_ptr = d_energy_ptr
        differ = 0
    bound = tl.abs(alpha)
    for j in tl.static_range(len(SIZES)):
        weight = _weights(given_ptr, b, STARTS[j], SIZES[j], P, EACH, WEIGHTED)
        bound += tl.sum(tl.abs(weight) * _gains(gain_ptr, STARTS[j], SIZES[j]))
        if AGAIN:
            expected = d_flow * _weights(weight_ptr, b, STARTS[j], SIZES[j], P, EACH, HAS_V)
            near = tl.abs(weight - expected) <= 5e-7 * tl.abs(expected)
            differ += tl.sum((near == 0).to(tl.int32))
    if AGAIN:
        if EXACT:  # then d_flow must not round it either
            differ += (tl.abs(d_flow) != _power_of_two(tl.abs(d_flow))).to(tl.int32)
        if differ == 0:
            return
    bound = tl.where(bound > 0, bound, 1.0)
    if tl.abs(alpha) <= bound * 2.0**-24:
        alpha = 0.0
    if AGAIN:
        share = tl.where(alpha == 0, share, tl.abs(alpha))
    unit = share * _power_of_two(bound / share)
    back = unit * 2.0 / pixels if AGAIN else 1.0
    rate = alpha / unit
    diagonal = _diagonal(CHUNKS, rate, R, C, 0)

    flow_R = tl.zeros([R], tl.float32)
    sums = _zero_sums(N, SIZES, EACH)
    careful = True
    if RESIDENT:
        given_R = tl.zeros([R], tl.float32)
        largest_R = tl.zeros([R], tl.float32)
        probe = ()
        for i in tl.static_range(CHUNKS):
            probe += (_probe(probe_ptr, i, R, STARTS, SIZES, HALVES),)
        if AHEAD > 0:
            n = split % plane_tiles * N + tl.arange(0, N)
            c = split // plane_tiles * C
            ahead = _ahead(x, v, c, n, n < pixels, width, CHANNELS, C, T, R, HAS_V, FLAT, AHEAD)
        for tile in tl.range(split, tiles, splits, num_stages=PIPELINE, disable_licm=True):
            first_n = tile % plane_tiles * N
            n = first_n + tl.arange(0, N)
            c = tile // plane_tiles * C
            inside_N = n < pixels
            following = tile + splits
            next_n = following % plane_tiles * N + tl.arange(0, N)
            next_c = following // plane_tiles * C
            next_inside_N = next_n < tl.where(following < tiles, pixels, 0)
            read = ()
            if AHEAD > 0:
                read = ahead
            if AHEAD == CHUNKS:
                ahead = _ahead(
                    x,
                    v,
                    next_c,
                    next_n,
                    next_inside_N,
                    width,
                    CHANNELS,
                    C,
                    T,
                    R,
                    HAS_V,
                    FLAT,
                    AHEAD,
                )
            e = ()
            y = _nothing(N, SIZES)
            for i in tl.static_range(CHUNKS):
                if DESCRIBED:
                    read += (_fetch(x_desc, v_desc, sample, c, first_n, R, N, HAS_V),)
                elif i + AHEAD < CHUNKS:
                    read += (
                        _read(
                            x, v, i + AHEAD, c, n, inside_N, width, CHANNELS, C, T, R, HAS_V, FLAT
                        ),
                    )
                e_RN = _residual(read[i], one, HAS_V)
                # Summed here, chunk by chunk: the compiler would keep every e for a sum at the end.
                squares_R = tl.sum(e_RN * e_RN, 1)
                largest_R = tl.maximum(largest_R, squares_R)
                if i * R < FIRST * C:
                    learned_R = i * R + tl.arange(0, R) >= FIRST * C
                    given_R += tl.where(learned_R, 0.0, squares_R)
                    squares_R = tl.where(learned_R, squares_R, 0.0)
                flow_R += squares_R
                e += (_flip(_halves(e_RN, HALVES), HALVES),)
                y = _see(y, e[i], probe[i], one, HALVES)
            sums, u = _weigh(
                y, sums, 1.0, unit, gain_ptr, given_ptr, b, STARTS, SIZES, P, EACH, WEIGHTED, HALVES
            )
            if (AHEAD > 0) & (AHEAD < CHUNKS):
                ahead = _ahead(
                    x,
                    v,
                    next_c,
                    next_n,
                    next_inside_N,
                    width,
                    CHANNELS,
                    C,
                    T,
                    R,
                    HAS_V,
                    FLAT,
                    AHEAD,
                )
            if GRAD:
                for i in tl.static_range(CHUNKS):
                    chosen = diagonal
                    if i * R < FIRST * C:
                        chosen = _diagonal(i, rate, R, C, FIRST)
                    g_RN = _gradient(e[i], chosen, u, probe[i], N, R, HALVES) * back
                    g_RN = g_RN.to(g_ptr.dtype.element_ty)
                    if DESCRIBED:
                        g_desc.store([sample, c, 0, first_n], g_RN.reshape(1, 1, R, N))
                    else:
                        inside = _inside(i, inside_N, CHANNELS - c, C, T, R, CHANNELS % C == 0)
                        tl.store(_at(g, i, c, n, width, C, R, FLAT), g_RN, inside)
        total = tl.sum(flow_R) + tl.sum(given_R)
        smallest = (SMALLEST_TWO if HALVES == 2 else SMALLEST_ONE) * (C * T * N)
        smallest *= tl.cdiv(tiles - split, splits)
        careful = (tl.max(largest_R) > LARGEST / (CHUNKS * R)) | ((total > 0) & (total < smallest))
    if careful:
        flow_R = tl.zeros([R], tl.float32)
        sums = _zero_sums(N, SIZES, EACH)
        scale = 1.0
        for tile in range(split, tiles, splits):
            n = tile % plane_tiles * N + tl.arange(0, N)
            c = tile // plane_tiles * C
            inside_N = n < pixels
            y = _nothing(N, SIZES)
            tile_R = tl.zeros([R], tl.float32)
            attempts = 2
            while attempts > 0:
                y = _nothing(N, SIZES)
                tile_R = tl.zeros([R], tl.float32)
                total_R = tl.zeros([R], tl.float32)
                for k in tl.range(0, CHUNKS, num_stages=STAGES):
                    now = _read(x, v, k, c, n, inside_N, width, CHANNELS, C, T, R, HAS_V, FLAT)
                    seen_RN = _residual(now, one, HAS_V) * scale
                    row_R = tl.sum(seen_RN * seen_RN, 1)
                    total_R += row_R
                    tile_R += tl.where(k * R + tl.arange(0, R) >= FIRST * C, row_R, 0.0)
                    pieces = _probe(probe_ptr, k, R, STARTS, SIZES, HALVES)
                    y = _see(y, _flip(_halves(seen_RN, HALVES), HALVES), pieces, one, HALVES)
                total = tl.sum(total_R)
                # It is zero or infinite, or fits, or can be made to fit.
                misfit = ((total > LARGEST) & (total < float("inf"))) | (
                    (total > 0) & (total < 1.0)
                )
                attempts = tl.where(misfit, attempts - 1, 0)
                if misfit & (attempts > 0):
                    scale *= _power_of_two(tl.sqrt(2.0**12 / total))
            inverse = 1 / scale
            flow_R += tile_R * (inverse * inverse)
            sums, u = _weigh(
                y,
                sums,
                inverse,
                unit,
                gain_ptr,
                given_ptr,
                b,
                STARTS,
                SIZES,
                P,
                EACH,
                WEIGHTED,
                HALVES,
            )
            if GRAD:
                # Backwards: what was read last is what the cache still has.
                for k in tl.range(0, CHUNKS, num_stages=STAGES):
                    q = CHUNKS - 1 - k
                    now = _read(x, v, q, c, n, inside_N, width, CHANNELS, C, T, R, HAS_V, FLAT)
                    shown = _flip(_halves(_residual(now, one, HAS_V) * scale, HALVES), HALVES)
                    chosen = diagonal
                    if FIRST > 0:
                        chosen = _diagonal(q, rate, R, C, FIRST)
                    pieces = _probe(probe_ptr, q, R, STARTS, SIZES, HALVES)
                    g_RN = _gradient(shown, chosen, u, pieces, N, R, HALVES) * (inverse * back)
                    tl.store(
                        _at(g, q, c, n, width, C, R, FLAT),
                        g_RN.to(g_ptr.dtype.element_ty),
                        _inside(q, inside_N, CHANNELS - c, C, T, R, CHANNELS % C == 0),
                    )
    if not AGAIN:
        entry_ptr = table_ptr + program * ENTRY
        tl.store(entry_ptr, tl.sum(flow_R))
        if EACH:
            for j in tl.static_range(len(SIZES)):
                tl.store(entry_ptr + 1 + STARTS[j] + tl.arange(0, SIZES[j]), sums[j])
        else:
            energy = 0.0
            for j in tl.static_range(len(SIZES)):
                energy += tl.sum(sums[j])
            tl.store(entry_ptr + 1, energy)
        if split == 0:
            tl.store(unit_ptr + b, unit * 2.0 / pixels)

        # Every thread's entry is written before the count goes up, and the last program reads the
        # table past its own first-level cache, which may hold what was there before.
        tl.debug_barrier()
        if tl.atomic_add(counter_ptr + b, 1, sem="acq_rel", scope="gpu") == splits - 1:
            tl.store(counter_ptr + b, 0)
            _finish(
                table_ptr + b * splits * ENTRY,
                flow_ptr,
                energy_ptr,
                b,
                splits,
                pixels,
                CHANNELS * (T - FIRST),
                P,
                COPIES,
                ENTRY,
                EACH,
            )
