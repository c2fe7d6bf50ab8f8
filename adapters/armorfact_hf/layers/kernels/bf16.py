"""Vectors of 32 bfloat16 inside numba kernels, for machines whose processor multiplies pairs of them (AVX512-BF16).

One instruction multiplies 32 of them and adds the products, two by two, to sixteen sums in float32; `simd` widens
sixteen and multiplies those. Arrays are addressed flat and hold bfloat16 as uint16. After a change here, touch the
kernels, as for `simd`.
"""

from __future__ import annotations

from functools import cache

from llvmlite import binding, ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from armorfact_hf.layers.kernels.simd import floats

LANES = 32
_half_word, _word, _long = map(ir.IntType, (16, 32, 64))
_halves, _sums = ir.VectorType(_half_word, LANES), ir.VectorType(ir.FloatType(), 16)
_sixteen = ir.VectorType(_half_word, 16)


class _BFloat(ir.types.Type):
    """LLVM's type, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


class Halves(types.Type):
    """32 bfloat16, or as many places among the 64 columns that 32 kept values of a 2:4 row come from."""

    def __init__(self) -> None:
        super().__init__(name="bfloat16x32")


@register_model(Halves)
class _HalvesModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, _halves)


halves = Halves()


def has_bf16() -> bool:
    """Whether numba compiles for a machine with these instructions; its own setting wins over what the machine has."""
    if config.CPU_FEATURES is not None:
        return all(f"+{name}" in config.CPU_FEATURES for name in ("avx512bf16", "avx512bw"))
    found = binding.get_host_cpu_features()
    return config.CPU_NAME is None and bool(found.get("avx512bf16")) and bool(found.get("avx512bw"))


@cache
def beats_dense() -> bool:
    """Whether PyTorch's dense product has no more than these instructions either: no matrix units (AMX)."""
    return has_bf16() and not binding.get_host_cpu_features().get("amx-bf16")


def _constant(values) -> ir.Constant:
    return ir.Constant(_halves, list(values))


def _address(context, builder, array, array_type, index, kind):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


def _read(context, builder, array, array_type, index, kind, align):
    found = builder.load(_address(context, builder, array, array_type, index, kind))
    found.align = align
    return found


@intrinsic
def load_pairs(typingctx, array, index):
    """array[index : index + 32]."""

    def generate(context, builder, signature, args):
        return _read(context, builder, args[0], signature.args[0], args[1], _halves, 2)

    return halves(array, index), generate


@intrinsic
def read_many_places(typingctx, packed, index):
    """Where in the next 64 columns 32 kept values stand, from the eight bytes at ``packed[index]``."""

    def generate(context, builder, signature, args):
        codes = _read(context, builder, args[0], signature.args[0], args[1], _long, 1)
        words = builder.bitcast(codes, ir.VectorType(_half_word, 4))
        spread = ir.Constant(ir.VectorType(_word, LANES), [k // 8 for k in range(LANES)])
        every = builder.shuffle_vector(words, words, spread)
        within_group = builder.and_(
            builder.lshr(every, _constant(2 * (k % 8) for k in range(LANES))), _constant([3] * LANES)
        )
        return builder.or_(within_group, _constant(4 * (k // 2) for k in range(LANES)))

    return halves(packed, index), generate


@intrinsic
def pick_pairs(typingctx, array, index, where):
    """array[index + where], of 64 entries from ``index`` on."""

    def generate(context, builder, signature, args):
        low = _read(context, builder, args[0], signature.args[0], args[1], _halves, 2)
        further = builder.add(args[1], ir.Constant(args[1].type, LANES))
        high = _read(context, builder, args[0], signature.args[0], further, _halves, 2)
        kind = ir.FunctionType(_halves, [_halves] * 3)
        permute = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpermi2var.hi.512")
        return builder.call(permute, [low, args[2], high])

    return halves(array, index, where), generate


@intrinsic
def add_products(typingctx, sums, x, y):
    """sums[k] + x[2k] y[2k] + x[2k + 1] y[2k + 1], for the sixteen k."""

    def generate(context, builder, signature, args):
        pairs = ir.VectorType(_BFloat(), LANES)
        kind = ir.FunctionType(_sums, [_sums, pairs, pairs])
        dot = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
        return builder.call(dot, [args[0], *(builder.bitcast(vector, pairs) for vector in args[1:])])

    return floats(sums, x, y), generate


@intrinsic
def spread_pair(typingctx, array, index):
    """array[index] and array[index + 1] in turns, sixteen times."""

    def generate(context, builder, signature, args):
        pair = _read(context, builder, args[0], signature.args[0], args[1], _word, 2)
        words, nothing = ir.VectorType(_word, 16), ir.Constant(ir.VectorType(_word, 16), ir.Undefined)
        first = builder.insert_element(nothing, pair, ir.Constant(_word, 0))
        return builder.bitcast(builder.shuffle_vector(first, nothing, ir.Constant(words, [0] * 16)), _halves)

    return halves(array, index), generate


@intrinsic
def take_turns(typingctx, array, first, second):
    """array[first], array[second], array[first + 1], array[second + 1], …: sixteen of each."""

    def generate(context, builder, signature, args):
        low, high = (_read(context, builder, args[0], signature.args[0], at, _sixteen, 2) for at in args[1:])
        order = ir.Constant(ir.VectorType(_word, LANES), [k // 2 + 16 * (k % 2) for k in range(LANES)])
        return builder.shuffle_vector(low, high, order)

    return halves(array, first, second), generate


@intrinsic
def store_pairs(typingctx, array, index, vector):
    """array[index : index + 32] = vector."""

    def generate(context, builder, signature, args):
        address = _address(context, builder, args[0], signature.args[0], args[1], _halves)
        builder.store(args[2], address).align = 2
        return context.get_dummy_value()

    return types.none(array, index, vector), generate


@intrinsic
def store_rounded(typingctx, array, index, vector):
    """array[index : index + 16] = sixteen float32, rounded to bfloat16."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.VectorType(_BFloat(), 16), [_sums])
        convert = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.cvtneps2bf16.512")
        rounded = builder.bitcast(builder.call(convert, [args[2]]), _sixteen)
        builder.store(rounded, _address(context, builder, args[0], signature.args[0], args[1], _sixteen)).align = 2
        return context.get_dummy_value()

    return types.none(array, index, vector), generate


@intrinsic
def transpose_pairs(typingctx, source, at, step, target, to, to_step):
    """target[to + j to_step + 2i] = source[at + i step + 2j], and the next of both, for i and j below sixteen."""

    def generate(context, builder, signature, args):
        source, at, step, target, to, to_step = args
        words = ir.VectorType(_word, 16)
        rows = []
        for _ in range(16):
            rows.append(_read(context, builder, source, signature.args[0], at, words, 2))
            at = builder.add(at, step)
        for distance in (8, 4, 2, 1):
            rows = _exchanged(builder, rows, distance)
        for row in rows:
            builder.store(row, _address(context, builder, target, signature.args[3], to, words)).align = 2
            to = builder.add(to, to_step)
        return context.get_dummy_value()

    return types.none(source, at, step, target, to, to_step), generate


def _exchanged(builder, rows, distance):
    """Rows i and i + distance give each other the quarter of their square that lies across its diagonal."""
    lanes, found = range(16), list(rows)
    kind = ir.VectorType(_word, 16)
    upper = ir.Constant(kind, [16 + k - distance if k & distance else k for k in lanes])
    lower = ir.Constant(kind, [16 + k if k & distance else k + distance for k in lanes])
    for i in (i for i in lanes if not i & distance):
        found[i] = builder.shuffle_vector(rows[i], rows[i + distance], upper)
        found[i + distance] = builder.shuffle_vector(rows[i], rows[i + distance], lower)
    return found
