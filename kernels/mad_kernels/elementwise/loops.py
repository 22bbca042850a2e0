"""RMSNorm and the SwiGLU gate as compiled loops: one pass over memory each way.

    s = x + r        y = s c w,   c = (mean(s^2) + eps)^(-1/2)
    ds = d_sum + c w dy - s c^3 mean(w dy s)                     dw = sum over rows of c s dy

    y = g sigma(g) v
    dg = dy v sigma(g) (1 + g (1 - sigma(g)))                    dv = dy g sigma(g)

Numbers are read and written in their own type, bfloat16 as its bits, and worked on in float32 or
float64. Rows shorter than a vector and a power of two wide, as those of heads are, lie several in
one line; their sums are taken in groups. Shares of dw are added in blocks of lines, so that its
error does not grow with their number.

Legend: a line is what one sum of squares is taken over, or as many rows as fill a vector; `step_*`
the distance between two lines of an array.
"""

from mad_kernels.lanes import (
    LANES,
    add,
    aligned_zeros,
    compile_loop,
    div,
    fetch,
    fma,
    group_totals,
    load,
    mul,
    put,
    root,
    sigmoid,
    spread,
    store,
    sub,
)

_BLOCK = 64  # lines whose shares of dw are added up before they join the rest


@compile_loop
def rms_norm_forward(x, step_x, r, step_r, weight, constants, line, group, total, y):
    """Fill `total` with x + r, unless r is None, and `y` with its norm.

    Args:
        weight: As long as a line, and filled up with zeros.
        constants: 1, 1 / width and eps.
        line: Numbers in a line.
        group: Numbers that a sum is taken over; a vector's for longer ones.
    """
    nothing = load(aligned_zeros(LANES, weight.dtype), 0)
    one, share, eps = spread(constants, 0), spread(constants, 1), spread(constants, 2)
    for i in range(-(-y.size // line)):
        end = min(line, y.size - i * line)
        squares = nothing
        for j in range(0, end, LANES):
            row = fetch(x, i * step_x + j, end - j)
            if r is not None:
                row = add(row, fetch(r, i * step_r + j, end - j))
                put(total, i * line + j, row, end - j)
            squares = fma(row, row, squares)
        scale = div(one, root(fma(group_totals(squares, group), share, eps)))
        for j in range(0, end, LANES):
            if r is not None:  # noqa: SIM108  numba leaves out a branch on None, not half of a line
                row = fetch(total, i * line + j, end - j)
            else:
                row = fetch(x, i * step_x + j, end - j)
            put(y, i * line + j, mul(mul(row, scale), load(weight, j)), end - j)


@compile_loop
def rms_norm_backward(s, step_s, weight, constants, line, group, dy, step_dy, d_sum, step_sum, dx, dr, d_weight):
    """Fill `dx`, the same as `dr` in its own type, and `d_weight`, as long as `weight`.

    `d_sum` is what comes to s from elsewhere; it and `dr` may be None.
    """
    nothing = load(aligned_zeros(LANES, weight.dtype), 0)
    one, share, eps = spread(constants, 0), spread(constants, 1), spread(constants, 2)
    shares = aligned_zeros(weight.size, weight.dtype)
    lines = -(-dx.size // line)
    for i in range(lines):
        end = min(line, dx.size - i * line)
        squares, along = nothing, nothing
        for j in range(0, end, LANES):
            row = fetch(s, i * step_s + j, end - j)
            pull = mul(load(weight, j), fetch(dy, i * step_dy + j, end - j))
            squares = fma(row, row, squares)
            along = fma(row, pull, along)
        scale = div(one, root(fma(group_totals(squares, group), share, eps)))
        back = mul(mul(mul(scale, scale), share), group_totals(along, group))
        for j in range(0, end, LANES):
            row = fetch(s, i * step_s + j, end - j)
            slope = fetch(dy, i * step_dy + j, end - j)
            store(shares, j, fma(mul(row, scale), slope, load(shares, j)))
            change = mul(scale, sub(mul(load(weight, j), slope), mul(row, back)))
            if d_sum is not None:
                change = add(change, fetch(d_sum, i * step_sum + j, end - j))
            put(dx, i * line + j, change, end - j)
            if dr is not None:
                put(dr, i * line + j, change, end - j)
        if i % _BLOCK == _BLOCK - 1 or i == lines - 1:
            for j in range(0, weight.size, LANES):
                store(d_weight, j, add(load(d_weight, j), load(shares, j)))
            shares[:] = 0


@compile_loop
def swiglu_forward(h, step, width, y):
    """Fill `y` from lines that hold g and, behind it, v."""
    for i in range(y.size // width):
        at = i * step
        for j in range(0, width, LANES):
            left = width - j
            gate = fetch(h, at + j, left)
            value = mul(gate, fetch(h, at + width + j, left))
            put(y, i * width + j, mul(sigmoid(gate), value), left)


@compile_loop
def swiglu_backward(h, step, width, dy, step_dy, ones, dh):
    """Fill `dh` with dg and, behind it, dv; `ones` holds a one of the type of sums."""
    one = spread(ones, 0)
    for i in range(dh.size // (2 * width)):
        at, into = i * step, 2 * i * width
        for j in range(0, width, LANES):
            left = width - j
            gate, value = fetch(h, at + j, left), fetch(h, at + width + j, left)
            slope = fetch(dy, i * step_dy + j, left)
            s = sigmoid(gate)
            dg = mul(mul(slope, value), mul(s, fma(gate, sub(one, s), one)))
            put(dh, into + j, dg, left)
            put(dh, into + width + j, mul(slope, mul(gate, s)), left)


@compile_loop
def token_shift_forward(x, step, mix, L, width, parts):
    """Fill `parts`, an array for each row of mix: a token moved by its share to the one before it.

    Args:
        mix: Rows as long as a line, one after another, each filled up with zeros.
        L: Tokens of a sequence; nothing stands before its first one.
    """
    nothing, W = load(aligned_zeros(LANES, mix.dtype), 0), mix.size // len(parts)
    for i in range(parts[0].size // width):
        for j in range(0, width, LANES):
            left = width - j
            row, before = fetch(x, i * step + j, left), nothing
            if i % L:
                before = fetch(x, (i - 1) * step + j, left)
            change = sub(before, row)
            for p in range(len(parts)):
                put(parts[p], i * width + j, fma(change, load(mix, p * W + j), row), left)


@compile_loop
def token_shift_backward(x, step, mix, L, width, d_parts, steps, dx, d_mix):
    """Fill `dx`, and add to `d_mix`, all zeros; `steps` is the distance between lines of each part."""
    nothing, W = load(aligned_zeros(LANES, mix.dtype), 0), mix.size // len(d_parts)
    later, shares = aligned_zeros(W, mix.dtype), aligned_zeros(mix.size, mix.dtype)
    for i in range(dx.size // width - 1, -1, -1):
        if i % L == L - 1:
            later[:] = 0
        for j in range(0, width, LANES):
            left = width - j
            row, before = fetch(x, i * step + j, left), nothing
            if i % L:
                before = fetch(x, (i - 1) * step + j, left)
            change = sub(before, row)
            own, moved = load(later, j), nothing
            for p in range(len(d_parts)):
                slope = fetch(d_parts[p], i * steps[p] + j, left)
                own, moved = add(own, slope), fma(load(mix, p * W + j), slope, moved)
                store(shares, p * W + j, fma(change, slope, load(shares, p * W + j)))
            put(dx, i * width + j, sub(own, moved), left)
            store(later, j, moved)
        if i % L == 0:
            for j in range(0, mix.size, LANES):
                store(d_mix, j, add(load(d_mix, j), load(shares, j)))
            shares[:] = 0


@compile_loop
def skip_gate_forward(y, step_y, u, step_u, z, step_z, skip, width, out):
    """Fill `out` with (y + skip u) silu(z); `skip` is as long as a line, and filled up with zeros."""
    for i in range(out.size // width):
        for j in range(0, width, LANES):
            left = width - j
            gate = fetch(z, i * step_z + j, left)
            row = fma(load(skip, j), fetch(u, i * step_u + j, left), fetch(y, i * step_y + j, left))
            put(out, i * width + j, mul(row, mul(gate, sigmoid(gate))), left)


@compile_loop
def skip_gate_backward(y, step_y, u, step_u, z, step_z, skip, ones, width, d_out, step_out, dy, du, dz, d_skip):
    """Fill `dy`, `du` and `dz`, and add to `d_skip`, all zeros."""
    one, shares = spread(ones, 0), aligned_zeros(skip.size, skip.dtype)
    rows = dy.size // width
    for i in range(rows):
        for j in range(0, width, LANES):
            left = width - j
            gate, passed = fetch(z, i * step_z + j, left), fetch(u, i * step_u + j, left)
            row = fma(load(skip, j), passed, fetch(y, i * step_y + j, left))
            slope, s = fetch(d_out, i * step_out + j, left), sigmoid(gate)
            put(dz, i * width + j, mul(mul(slope, row), mul(s, fma(gate, sub(one, s), one))), left)
            slope = mul(slope, mul(gate, s))
            put(dy, i * width + j, slope, left)
            put(du, i * width + j, mul(slope, load(skip, j)), left)
            store(shares, j, fma(slope, passed, load(shares, j)))
        if i % _BLOCK == _BLOCK - 1 or i == rows - 1:
            for j in range(0, skip.size, LANES):
                store(d_skip, j, add(load(d_skip, j), load(shares, j)))
            shares[:] = 0


@compile_loop
def head_norm_gate_forward(o, r, k, v, g, weight, bias, bonus, constants, width, line, group, out):
    """Fill `out`; all arrays but `constants` are flat, and rows are `width` numbers, lines of whole vectors.

    Args:
        constants: 1, 1 / (width of a head) and eps.
        line: Numbers in a line: a head, or as many as fill a vector.
        group: Numbers that a sum is taken over; a vector's for longer ones.
    """
    nothing = load(aligned_zeros(LANES, weight.dtype), 0)
    one, share, eps = spread(constants, 0), spread(constants, 1), spread(constants, 2)
    for i in range(0, out.size, width):
        for h in range(0, width, line):
            whole, asked, squares = nothing, nothing, nothing
            for j in range(h, h + line, LANES):
                whole = add(whole, load(o, i + j))
                asked = fma(mul(load(r, i + j), load(k, i + j)), load(bonus, j), asked)
            mean, own = mul(group_totals(whole, group), share), group_totals(asked, group)
            for j in range(h, h + line, LANES):
                row = sub(load(o, i + j), mean)
                squares = fma(row, row, squares)
            scale = div(one, root(fma(group_totals(squares, group), share, eps)))
            for j in range(h, h + line, LANES):
                row = fma(mul(sub(load(o, i + j), mean), scale), load(weight, j), load(bias, j))
                store(out, i + j, mul(fma(own, load(v, i + j), row), load(g, i + j)))


@compile_loop
def head_norm_gate_backward(
    o,
    r,
    k,
    v,
    g,
    weight,
    bias,
    bonus,
    constants,
    width,
    line,
    group,
    d_out,
    do,
    dr,
    dk,
    dv,
    dg,
    d_weight,
    d_bias,
    d_bonus,
):
    """Fill `do` to `dg`, and add to `d_weight`, `d_bias` and `d_bonus`, all zeros."""
    nothing = load(aligned_zeros(LANES, weight.dtype), 0)
    one, share, eps = spread(constants, 0), spread(constants, 1), spread(constants, 2)
    shares = aligned_zeros(3 * width, weight.dtype)
    rows = do.size // width
    for n in range(rows):
        i = n * width
        for h in range(0, width, line):
            whole, asked, squares = nothing, nothing, nothing
            for j in range(h, h + line, LANES):
                whole = add(whole, load(o, i + j))
                asked = fma(mul(load(r, i + j), load(k, i + j)), load(bonus, j), asked)
            mean, own = mul(group_totals(whole, group), share), group_totals(asked, group)
            for j in range(h, h + line, LANES):
                row = sub(load(o, i + j), mean)
                squares = fma(row, row, squares)
            scale = div(one, root(fma(group_totals(squares, group), share, eps)))
            level, along, told = nothing, nothing, nothing
            for j in range(h, h + line, LANES):
                slope = mul(load(d_out, i + j), load(g, i + j))
                told = fma(slope, load(v, i + j), told)
                pull = mul(slope, load(weight, j))
                level = add(level, pull)
                along = fma(pull, mul(sub(load(o, i + j), mean), scale), along)
            level, along = mul(group_totals(level, group), share), mul(group_totals(along, group), share)
            told = group_totals(told, group)
            for j in range(h, h + line, LANES):
                row = mul(sub(load(o, i + j), mean), scale)
                value, slope = load(v, i + j), load(d_out, i + j)
                sum_ = fma(own, value, fma(row, load(weight, j), load(bias, j)))
                store(dg, i + j, mul(slope, sum_))
                slope = mul(slope, load(g, i + j))
                store(dv, i + j, mul(slope, own))
                pull = sub(mul(slope, load(weight, j)), fma(row, along, level))
                store(do, i + j, mul(pull, scale))
                first, second = load(r, i + j), load(k, i + j)
                store(dr, i + j, mul(told, mul(second, load(bonus, j))))
                store(dk, i + j, mul(told, mul(first, load(bonus, j))))
                store(shares, j, fma(slope, row, load(shares, j)))
                store(shares, width + j, add(slope, load(shares, width + j)))
                store(shares, 2 * width + j, fma(told, mul(first, second), load(shares, 2 * width + j)))
        if n % _BLOCK == _BLOCK - 1 or n == rows - 1:
            for j in range(0, width, LANES):
                store(d_weight, j, add(load(d_weight, j), load(shares, j)))
                store(d_bias, j, add(load(d_bias, j), load(shares, width + j)))
                store(d_bonus, j, add(load(d_bonus, j), load(shares, 2 * width + j)))
            shares[:] = 0
