"""Vectors of sixteen float32 inside numba kernels.

numba has no vector type, and its loops do not become the two-table permutation that reads a packed core. So here is
one: a value type that LLVM keeps in one AVX-512 register (two AVX, four NEON registers), and the few operations on it
that the kernels need. Arrays are addressed flat, whatever their shape, and have to be contiguous. numba knows no 16-bit
float on a CPU: float16 comes as int16, bfloat16 as uint16. int8 is whole numbers, which are only read.
"""

from __future__ import annotations

from llvmlite import binding, ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16
_byte, _half_word, _word = map(ir.IntType, (8, 16, 32))
_float = ir.FloatType()
_floats, _words = ir.VectorType(_float, LANES), ir.VectorType(_word, LANES)


class Floats(types.Type):
    """Sixteen float32."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


class Places(types.Type):
    """Sixteen places, each below 32, among the columns that sixteen kept values of a 2:4 row come from."""

    def __init__(self) -> None:
        super().__init__(name="places16")


@register_model(Floats)
class _FloatsModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, _floats)


@register_model(Places)
class _PlacesModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, _words)


floats, places = Floats(), Places()


def _has_avx512() -> bool:
    """Whether numba compiles for a machine with AVX-512; its own setting wins over what the machine has."""
    if config.CPU_FEATURES is not None:
        return "+avx512f" in config.CPU_FEATURES
    return config.CPU_NAME is None and bool(binding.get_host_cpu_features().get("avx512f"))


def _constant(values) -> ir.Constant:
    return ir.Constant(_words, list(values))


def _repeated(builder, value, vector):
    """A vector of sixteen times one value."""
    nothing = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(_word, 0))
    return builder.shuffle_vector(first, nothing, _constant([0] * LANES))


def _address(context, builder, array, array_type, index):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


def _load(builder, address, kind, align):
    found = builder.load(builder.bitcast(address, kind.as_pointer()))
    found.align = align
    return found


def _widened(builder, found, dtype, count):
    """float32 from what is stored: as it is, a whole number, a float16, or the upper half that a bfloat16 is."""

    def shaped(kind):
        return kind if count == 1 else ir.VectorType(kind, count)

    if dtype == types.float32:
        return found
    if dtype == types.int8:
        return builder.sitofp(builder.sext(found, shaped(_word)), shaped(_float))
    if dtype == types.int16:
        return builder.fpext(builder.bitcast(found, shaped(ir.HalfType())), shaped(_float))
    sixteen = ir.Constant(shaped(_word), 16 if count == 1 else [16] * count)
    return builder.bitcast(builder.shl(builder.zext(found, shaped(_word)), sixteen), shaped(_float))


def _stored_kind(dtype):
    if dtype == types.float32:
        return _float, 4
    if dtype in (types.int16, types.uint16):
        return _half_word, 2
    if dtype == types.int8:
        return _byte, 1
    raise TypeError(f"expected an array of float32, float16 as int16, bfloat16 as uint16, or int8, got {dtype}")


@intrinsic
def pointer(typingctx, address, like):
    """The address as a pointer to entries of the array ``like``, for `numba.carray`."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.int64, like), generate


@intrinsic
def zeros(typingctx):
    """Sixteen zeros."""

    def generate(context, builder, signature, args):
        return ir.Constant(_floats, [0.0] * LANES)

    return floats(), generate


@intrinsic
def load(typingctx, array, index):
    """array[index : index + 16], widened to float32."""
    kind, align = _stored_kind(array.dtype)

    def generate(context, builder, signature, args):
        address = _address(context, builder, args[0], signature.args[0], args[1])
        found = _load(builder, address, ir.VectorType(kind, LANES), align)
        return _widened(builder, found, array.dtype, LANES)

    return floats(array, index), generate


@intrinsic
def element(typingctx, array, index):
    """array[index], widened to float32."""
    kind, align = _stored_kind(array.dtype)

    def generate(context, builder, signature, args):
        address = _address(context, builder, args[0], signature.args[0], args[1])
        return _widened(builder, _load(builder, address, kind, align), array.dtype, 1)

    return types.float32(array, index), generate


@intrinsic
def put(typingctx, array, index, value):
    """array[index] = a float32, rounded to what the array stores."""

    def generate(context, builder, signature, args):
        address = _address(context, builder, args[0], signature.args[0], args[1])
        builder.store(_rounded(builder, args[2], array.dtype), address)
        return context.get_dummy_value()

    return types.none(array, index, types.float32), generate


def _rounded(builder, value, dtype):
    if dtype == types.float32:
        return value
    if dtype == types.int16:
        return builder.bitcast(builder.fptrunc(value, ir.HalfType()), _half_word)
    bits = builder.bitcast(value, _word)
    odd = builder.and_(builder.lshr(bits, ir.Constant(_word, 16)), ir.Constant(_word, 1))
    nearest = builder.add(bits, builder.add(odd, ir.Constant(_word, 0x7FFF)))  # ties to even
    quiet = builder.or_(bits, ir.Constant(_word, 1 << 22))  # rounding could turn a NaN into an infinity
    kept = builder.select(builder.fcmp_unordered("uno", value, value), quiet, nearest)
    return builder.trunc(builder.lshr(kept, ir.Constant(_word, 16)), _half_word)


@intrinsic
def expand(typingctx, dense, at, values, index, mask):
    """dense[at + k] = the next of values[index...] where bit k of the mask is set, else 0.

    k runs over 32 entries of 16 bits, or 16 of 32 bits, the mask's low ones.
    """
    kind = {16: _half_word, 32: _word}[dense.dtype.bitwidth]
    lanes = 512 // dense.dtype.bitwidth
    vector = ir.VectorType(kind, lanes)

    def generate(context, builder, signature, args):
        source = _address(context, builder, args[2], signature.args[2], args[3])
        target = _address(context, builder, args[0], signature.args[0], args[1])
        chosen = builder.bitcast(builder.trunc(args[4], ir.IntType(lanes)), ir.VectorType(ir.IntType(1), lanes))
        signature_of = ir.FunctionType(vector, [kind.as_pointer(), chosen.type, vector])
        name = f"llvm.masked.expandload.v{lanes}i{dense.dtype.bitwidth}"
        load_expanded = cgutils.get_or_insert_function(builder.module, signature_of, name)
        zero = ir.Constant(vector, [0] * lanes)
        expanded = builder.call(load_expanded, [builder.bitcast(source, kind.as_pointer()), chosen, zero])
        builder.store(expanded, builder.bitcast(target, vector.as_pointer())).align = dense.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.none(dense, at, values, index, types.uint32), generate


@intrinsic
def spread(typingctx, value):
    """Sixteen times one float32."""

    def generate(context, builder, signature, args):
        return _repeated(builder, args[0], _floats)

    return floats(types.float32), generate


@intrinsic
def store(typingctx, array, index, vector):
    """array[index : index + 16] = vector, for a float32 array."""

    def generate(context, builder, signature, args):
        address = _address(context, builder, args[0], signature.args[0], args[1])
        builder.store(args[2], builder.bitcast(address, _floats.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.none(array, index, vector), generate


@intrinsic
def fma(typingctx, x, y, z):
    """x * y + z, rounded once where the machine can."""

    def generate(context, builder, signature, args):
        product = builder.fmul(args[0], args[1], flags=("contract",))
        return builder.fadd(product, args[2], flags=("contract",))

    return floats(x, y, z), generate


@intrinsic
def total(typingctx, vector):
    """The sum of the sixteen."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(_float, [_float, _floats])
        add = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.fadd.v16f32")
        return builder.call(add, [ir.Constant(_float, 0.0), args[0]], fastmath=("reassoc",))

    return types.float32(vector), generate


@intrinsic
def read_places(typingctx, packed, index):
    """Where in the next 32 columns sixteen kept values stand, from the four bytes at ``packed[index]``."""

    def generate(context, builder, signature, args):
        address = _address(context, builder, args[0], signature.args[0], args[1])
        codes = _load(builder, address, _word, 1)
        every = _repeated(builder, codes, _words)
        within_group = builder.and_(builder.lshr(every, _constant(range(0, 32, 2))), _constant([3] * LANES))
        return builder.or_(within_group, _constant(4 * (k // 2) for k in range(LANES)))

    return places(packed, index), generate


@intrinsic
def pick(typingctx, array, index, where):
    """array[index + where], for a float32 array that holds 32 entries from ``index`` on."""

    def generate(context, builder, signature, args):
        address = _address(context, builder, args[0], signature.args[0], args[1])
        if _has_avx512():
            low = _load(builder, address, _floats, 4)
            high = _load(builder, builder.gep(address, [ir.Constant(_word, LANES)]), _floats, 4)
            kind = ir.FunctionType(_floats, [_floats, _words, _floats])
            permute = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpermi2var.ps.512")
            return builder.call(permute, [low, args[2], high])
        picked = ir.Constant(_floats, ir.Undefined)
        for lane in (ir.Constant(_word, k) for k in range(LANES)):
            at = builder.gep(address, [builder.extract_element(args[2], lane)])
            picked = builder.insert_element(picked, builder.load(at), lane)
        return picked

    return floats(array, index, where), generate


@intrinsic
def prefetch(typingctx, array, index):
    """Ask for the cache line of array[index], which may lie beyond its end."""

    def generate(context, builder, signature, args):
        address = _address(context, builder, args[0], signature.args[0], args[1])
        pointer = _byte.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, _word, _word, _word])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read, keep, data = (ir.Constant(_word, value) for value in (0, 3, 1))
        builder.call(fetch, [builder.bitcast(address, pointer), read, keep, data])
        return context.get_dummy_value()

    return types.none(array, index), generate
