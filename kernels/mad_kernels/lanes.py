"""Rows of 32 numbers as one value inside compiled loops: what a vector register is to a compiler.

A loop over 32 numbers that adds into an array keeps its sums in memory, unless a compiler sees
through the array. These operations name the vector, so that sums stay in registers; a machine
with shorter registers splits each into as many as it needs. Only compiled functions can call them.

    load(x, at), store(x, at, row)    x[at : at + 32] of a flat array, no bounds check
    fetch(x, at, n), put(x, at, row, n)   the first n of them; what is not read is 0
    spread(x, at)                     x[at] in all 32 places
    copy(x, at, y, from, count)       y[from : from + count] into x[at : at + count]
    fma(row, row, row)                a * b + c
    mul(row, row), add(row, row), sub(row, row), div(row, row)
    exp(row)                          right to the last bit but one; 0 where it would underflow
    sigmoid(row)                      1 / (1 + exp(-row))
    total(row)                        the sum, always in the same order
    group_totals(row, n)              in every place the sum of its group of n, a power of two

Arrays of uint16 hold bfloat16: they are read as float32, and written rounded to the nearest, to the
even one of two, as torch does.

Importing this module imports numba; only the compiled backends do so, and only when they run.
"""

import contextlib
from collections.abc import Callable
from hashlib import sha256
from math import factorial, log
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.errors import RequireLiteralValue
from numba.core.typing.templates import Signature
from numba.extending import intrinsic, models, register_model

from mad_kernels.loop_cache import LoopCache

LANES = 32

# exp(x) = 2^n exp(r), n = round(x / log 2): log 2 in two parts, terms of the series of exp(r),
# exponent bits and bias, and the range of x that gives normal numbers.
_EXP = {
    types.float32: (0.693359375, -2.12194440e-4, 8, 23, 127, -87.3, 88.7),
    types.float64: (6.93147180369123816490e-01, 1.90821492927058770002e-10, 14, 52, 1023, -708.3, 709.7),
}


class Row(types.Type):
    """32 numbers of one float type."""

    def __init__(self, dtype):
        self.dtype = dtype
        super().__init__(name=f"Row({dtype})")


@register_model(Row)
class _RowModel(models.PrimitiveModel):
    def __init__(self, manager, row):
        number = ir.DoubleType() if row.dtype == types.float64 else ir.FloatType()
        super().__init__(manager, row, ir.VectorType(number, LANES))


# numba looks at a loop's own file only to tell whether what it kept on disk is still right.
_DIGEST = sha256(Path(__file__).read_bytes()).hexdigest()[:8]


def compile_loop(function: Callable) -> Callable[..., Any]:
    """Compile a function on first use; kept on disk, where numba finds a folder it may write to.

    What is on disk is named after the function and a digest of this file, which it was made from.
    """
    function.__qualname__ += f"_{_DIGEST}"
    compiled: Any = njit(nogil=True, error_model="numpy")(function)
    with contextlib.suppress(RuntimeError):  # no such folder: every process compiles for itself
        compiled._cache = LoopCache(function)  # as `cache=True` would set numba's own
    return compiled


@compile_loop
def aligned_zeros(size, dtype):
    """Make a flat array that begins on a cache line: a row across two lines costs twice."""
    x = np.zeros(size + 16, dtype)
    skip = -(x.ctypes.data // x.itemsize) % (64 // x.itemsize)
    return x[skip : skip + size]


def row_operation(emitter: Callable) -> Callable[..., Any]:
    """Make an operation of a function that gives its types and emits its instructions.

    Compiled functions call it without the first argument, which type checkers do not know.
    """
    return intrinsic(emitter)


def _row_of(array):
    return Row(types.float32 if array.dtype == types.uint16 else array.dtype)


def _lanes(number):
    """The type of 32 numbers, or bfloat16's bits, in memory."""
    kinds = {types.uint16: ir.IntType(16), types.float32: ir.FloatType()}
    return ir.VectorType(kinds.get(number, ir.DoubleType()), LANES)


def _widened(builder, row):
    """Turn bits of bfloat16 into float32; leave anything else."""
    if row.type.element != ir.IntType(16):
        return row
    integers = ir.VectorType(ir.IntType(32), LANES)
    bits = builder.shl(builder.zext(row, integers), ir.Constant(integers, [16] * LANES))
    return builder.bitcast(bits, ir.VectorType(ir.FloatType(), LANES))


def _narrowed(builder, row, number):
    """Round float32 to the bits of bfloat16 where an array holds those."""
    if number != types.uint16:
        return row
    integers = ir.VectorType(ir.IntType(32), LANES)

    def constant(value):
        return ir.Constant(integers, [value] * LANES)

    bits = builder.bitcast(row, integers)
    odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, constant(0x7FFF))), constant(16))
    rounded = builder.select(builder.fcmp_unordered("uno", row, row), constant(0x7FC0), rounded)
    return builder.trunc(rounded, ir.VectorType(ir.IntType(16), LANES))


def _address(context, builder, array_type, array, at):
    if array_type.layout != "C":
        raise TypeError(f"{array_type} must be contiguous, since rows are read without strides")
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [at])


def _call(builder, name, number, arguments, result):
    """Call an operation that the compiler knows by name, like `llvm.fmuladd.v32f32`."""
    suffix = f"v{LANES}{'f64' if number == types.float64 else 'f32'}"
    function_type = ir.FunctionType(result, [x.type for x in arguments])
    full = f"{name}.{suffix}"
    function = builder.module.globals.get(full) or ir.Function(builder.module, function_type, full)
    return builder.call(function, arguments)


@row_operation
def load(typing_context, x, at):
    """Read 32 numbers from `at` on."""

    def emit(context, builder, signature, arguments):
        address = _address(context, builder, x, *arguments)
        address = builder.bitcast(address, _lanes(x.dtype).as_pointer())
        return _widened(builder, builder.load(address, align=x.dtype.bitwidth // 8))

    return Signature(_row_of(x), (x, types.intp), None), emit


@row_operation
def store(typing_context, x, at, row):
    """Write 32 numbers from `at` on."""

    def emit(context, builder, signature, arguments):
        array, position, value = arguments
        address = _address(context, builder, x, array, position)
        value = _narrowed(builder, value, x.dtype)
        address = builder.bitcast(address, value.type.as_pointer())
        builder.store(value, address, align=x.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return Signature(types.void, (x, types.intp, row), None), emit


@row_operation
def load_part(typing_context, x, at, count):
    """Read fewer than 32 numbers from `at` on; zeros behind them."""

    def emit(context, builder, signature, arguments):
        array, position, numbers = arguments
        source = _address(context, builder, x, array, position)
        lanes = _lanes(x.dtype)
        room = cgutils.alloca_once(builder, lanes)
        builder.store(ir.Constant(lanes, None), room)
        into = builder.bitcast(room, source.type)
        cgutils.raw_memcpy(builder, into, source, numbers, x.dtype.bitwidth // 8)
        return _widened(builder, builder.load(room))

    return Signature(_row_of(x), (x, types.intp, types.intp), None), emit


@row_operation
def store_part(typing_context, x, at, row, count):
    """Write the first `count` of 32 numbers from `at` on."""

    def emit(context, builder, signature, arguments):
        array, position, value, numbers = arguments
        into = _address(context, builder, x, array, position)
        room = cgutils.alloca_once(builder, _lanes(x.dtype))
        builder.store(_narrowed(builder, value, x.dtype), room)
        source = builder.bitcast(room, into.type)
        cgutils.raw_memcpy(builder, into, source, numbers, x.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return Signature(types.void, (x, types.intp, row, types.intp), None), emit


@row_operation
def copy(typing_context, x, at, y, from_, count):
    """Copy numbers between two flat arrays that do not overlap."""

    def emit(context, builder, signature, arguments):
        array, position, other, place, numbers = arguments
        into = _address(context, builder, x, array, position)
        source = _address(context, builder, y, other, place)
        cgutils.raw_memcpy(builder, into, source, numbers, x.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return Signature(types.void, (x, types.intp, y, types.intp, types.intp), None), emit


@row_operation
def spread(typing_context, x, at):
    """Put one number of an array into all places."""
    row = Row(x.dtype)

    def emit(context, builder, signature, arguments):
        number = builder.load(_address(context, builder, x, *arguments))
        vector = ir.Constant(context.get_value_type(row), ir.Undefined)
        vector = builder.insert_element(vector, number, ir.Constant(ir.IntType(32), 0))
        places = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        return builder.shuffle_vector(vector, vector, places)

    return Signature(row, (x, types.intp), None), emit


@row_operation
def fma(typing_context, a, b, c):
    """Compute a * b + c."""

    def emit(context, builder, signature, arguments):
        result = arguments[0].type
        return _call(builder, "llvm.fmuladd", a.dtype, arguments, result)

    return Signature(a, (a, b, c), None), emit


@row_operation
def mul(typing_context, a, b):
    """Compute a * b."""

    def emit(context, builder, signature, arguments):
        return builder.fmul(*arguments)

    return Signature(a, (a, b), None), emit


@row_operation
def add(typing_context, a, b):
    """Compute a + b."""

    def emit(context, builder, signature, arguments):
        return builder.fadd(*arguments)

    return Signature(a, (a, b), None), emit


@row_operation
def sub(typing_context, a, b):
    """Compute a - b."""

    def emit(context, builder, signature, arguments):
        return builder.fsub(*arguments)

    return Signature(a, (a, b), None), emit


@row_operation
def div(typing_context, a, b):
    """Compute a / b."""

    def emit(context, builder, signature, arguments):
        return builder.fdiv(*arguments)

    return Signature(a, (a, b), None), emit


@row_operation
def root(typing_context, a):
    """Compute the square root of each number."""

    def emit(context, builder, signature, arguments):
        return _call(builder, "llvm.sqrt", a.dtype, arguments, arguments[0].type)

    return Signature(a, (a,), None), emit


@row_operation
def larger(typing_context, a, b):
    """Take the larger of a and b in each place, b where a is not a number."""

    def emit(context, builder, signature, arguments):
        return builder.select(builder.fcmp_ordered(">", *arguments), *arguments)

    return Signature(a, (a, b), None), emit


@row_operation
def _swapped(typing_context, a, distance):
    """Swap neighbouring blocks of `distance` numbers, a literal."""
    if not isinstance(distance, types.IntegerLiteral):
        raise RequireLiteralValue("distance")
    shift = distance.literal_value

    def emit(context, builder, signature, arguments):
        places = [place ^ shift for place in range(LANES)]
        index = ir.Constant(ir.VectorType(ir.IntType(32), LANES), places)
        return builder.shuffle_vector(arguments[0], arguments[0], index)

    return Signature(a, (a, distance), None), emit


def _exponential(builder, number, x):
    """Emit the exponential of a row."""
    high, low, terms, bits, bias, smallest, largest = _EXP[number]
    vector = x.type
    integers = ir.VectorType(ir.IntType(number.bitwidth), LANES)

    def constant(value, kind=vector):
        return ir.Constant(kind, [value] * LANES)

    def multiply_add(*factors):
        return _call(builder, "llvm.fmuladd", number, factors, vector)

    vanishes = builder.fcmp_ordered("<", x, constant(smallest))
    x = _call(builder, "llvm.maxnum", number, [x, constant(smallest)], vector)
    x = _call(builder, "llvm.minnum", number, [x, constant(largest)], vector)
    n = builder.fmul(x, constant(1 / log(2)))
    n = _call(builder, "llvm.rint", number, [n], vector)
    r = multiply_add(n, constant(-high), x)
    r = multiply_add(n, constant(-low), r)
    power = constant(1 / factorial(terms - 1))
    for term in reversed(range(terms - 1)):
        power = multiply_add(power, r, constant(1 / factorial(term)))
    exponent = builder.add(builder.fptosi(n, integers), constant(bias, integers))
    scale = builder.bitcast(builder.shl(exponent, constant(bits, integers)), vector)
    return builder.select(vanishes, constant(0.0), builder.fmul(power, scale))


@row_operation
def exp(typing_context, a):
    """Compute the exponential of each number."""

    def emit(context, builder, signature, arguments):
        return _exponential(builder, a.dtype, *arguments)

    return Signature(a, (a,), None), emit


@row_operation
def sigmoid(typing_context, a):
    """Compute 1 / (1 + exp(-a)), anything for what is not a number."""

    def emit(context, builder, signature, arguments):
        (x,) = arguments
        one = ir.Constant(x.type, [1.0] * LANES)
        power = _exponential(builder, a.dtype, builder.fneg(x))
        return builder.fdiv(one, builder.fadd(one, power))

    return Signature(a, (a,), None), emit


@row_operation
def total(typing_context, a):
    """Sum the 32 numbers, always in the same order."""

    def emit(context, builder, signature, arguments):
        kind = context.get_value_type(a.dtype)
        row = arguments[0]
        width = LANES // 2
        while width:  # halves onto halves
            places = [[p + shift for p in range(width)] for shift in (0, width)]
            index = ir.VectorType(ir.IntType(32), width)
            halves = [builder.shuffle_vector(row, row, ir.Constant(index, p)) for p in places]
            row = builder.fadd(*halves)
            width //= 2
        assert row.type.element == kind
        return builder.extract_element(row, ir.Constant(ir.IntType(32), 0))

    return Signature(a.dtype, (a,), None), emit


@compile_loop
def fetch(x, at, left):
    """Read up to 32 numbers: those of the `left` that a line still has; zeros behind them."""
    return load(x, at) if left >= LANES else load_part(x, at, left)


@compile_loop
def put(x, at, row, left):
    """Write up to 32 numbers: as many as the `left` that a line still has."""
    if left >= LANES:
        store(x, at, row)
    else:
        store_part(x, at, row, left)


@compile_loop
def group_totals(row, width):
    """Sum groups of neighbours, `width` each, a power of two up to 32; in all its places."""
    if width > 1:
        row = add(row, _swapped(row, 1))
    if width > 2:
        row = add(row, _swapped(row, 2))
    if width > 4:
        row = add(row, _swapped(row, 4))
    if width > 8:
        row = add(row, _swapped(row, 8))
    if width > 16:
        row = add(row, _swapped(row, 16))
    return row


@compile_loop
def filled(width):
    """Round a width up to whole vectors."""
    return -(-width // LANES) * LANES


@compile_loop
def gather(x, b, first, h, T, into, W):
    """Copy a head's chunk out of [B L H D] into rows of W, filled up with zeros."""
    _, L, H, D = x.shape
    flat = x.reshape(x.size)
    for t in range(T):
        into[t * W + D : (t + 1) * W] = 0
        copy(into, t * W, flat, ((b * L + first + t) * H + h) * D, D)


@compile_loop
def scatter(x, W, into, b, first, h, T):
    """Copy rows of W to a head's chunk of [B L H D]."""
    _, L, H, D = into.shape
    flat = into.reshape(into.size)
    for t in range(T):
        copy(flat, ((b * L + first + t) * H + h) * D, x, t * W, D)


@compile_loop
def to_slabs(matrix, S, rows):
    """Lay out a matrix in slabs of 32 columns, one after another, filled up with zeros."""
    S[:] = 0
    D = matrix.shape[1]
    flat = matrix.reshape(matrix.size)
    for j in range(0, D, LANES):
        for i in range(matrix.shape[0]):
            copy(S, j * rows + i * LANES, flat, i * D + j, min(LANES, D - j))


@compile_loop
def from_slabs(S, matrix, rows):
    """Undo `to_slabs`."""
    D = matrix.shape[1]
    flat = matrix.reshape(matrix.size)
    for j in range(0, D, LANES):
        for i in range(matrix.shape[0]):
            copy(flat, i * D + j, S, j * rows + i * LANES, min(LANES, D - j))


@compile_loop
def to_slabs_turned(matrix, S, rows):
    """Lay out the transpose of a matrix in slabs of 32 columns, filled up with zeros."""
    S[:] = 0
    for i in range(matrix.shape[0]):
        at = (i // LANES) * rows * LANES + i % LANES
        for j in range(matrix.shape[1]):
            S[at + j * LANES] = matrix[i, j]
