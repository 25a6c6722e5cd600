"""What the inline PTX of kernel bodies does to a warp: arrays of 32 lanes. For ``warps``.

Fragments, descriptors and swizzles are as the PTX manual has them. An instruction takes the warp,
the mask of its active lanes, its text and its operands, and returns its results.
"""

import re

import ml_dtypes
import numpy as np

BF16 = ml_dtypes.bfloat16
E4M3 = ml_dtypes.float8_e4m3fn
LANES = np.arange(32)
G, T = LANES // 4, LANES % 4


def pairs(word):
    """The bfloat16 of words, low one first: float32 [32, 2]."""
    return np.ascontiguousarray(word).view(BF16).reshape(-1, 2).astype(np.float32)


def words(pair):
    """The inverse of ``pairs``, which rounds."""
    return np.ascontiguousarray(pair, np.float32).astype(BF16).view(np.uint32)[:, 0]


def halves(word):
    """The float16 of words, low one first: [32, 2]."""
    return np.ascontiguousarray(word).view(np.float16).reshape(-1, 2)


def halves_to_e4m3(word):
    """Two bytes of each word of float16; what is too large becomes the largest."""
    pair = halves(word).astype(np.float32)
    return np.clip(pair, -448, 448).astype(E4M3).view(np.uint16)[:, 0]


def e4m3_to_halves(pair):
    return pair.view(E4M3).astype(np.float16).view(np.uint32)


def lop3(text, a, b, c):
    table, result = int(re.search(r"(\d+);", text)[1]), np.zeros_like(a)
    for case in range(8):
        if table >> case & 1:
            bits = [w if case >> s & 1 else ~w for w, s in ((a, 2), (b, 1), (c, 0))]
            result |= bits[0] & bits[1] & bits[2]
    return result


def add_constant(text, a):
    return a + np.uint32(re.search(r"\$1, (\d+);", text)[1])


def permute_bytes(text, low, high, selector):
    del text
    both = np.stack([low, high], axis=-1).view(np.uint8)
    nibbles = selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & 15
    assert (nibbles < 8).all()  # the highest bit would repeat a sign
    return np.take_along_axis(both, nibbles.astype(np.int64), axis=1).view(np.uint32)[:, 0]


def swizzled(address, line=128):
    """Where a byte of lines of 128 or 64 bytes lies: 16 bytes change places, by the 128 around."""
    return address ^ (address >> 7 & line // 16 - 1) << 4


def swizzled_tiles(matrix, line=128):
    """Bytes of a matrix in tiles of 8 rows by ``line`` bytes, swizzled; rows of tiles first."""
    rows, row_bytes = matrix.shape[0], matrix[0].nbytes
    plain = np.ascontiguousarray(matrix).view(np.uint8)
    plain = plain.reshape(rows // 8, 8, row_bytes // line, line).swapaxes(1, 2).reshape(-1)
    memory = np.empty_like(plain)
    memory[swizzled(np.arange(plain.size), line)] = plain
    return memory


def places_of_sums(columns):
    """Rows and columns [128] of each register of wgmma's sums [64, columns]."""
    thread = np.arange(128)
    row, column = 16 * (thread // 32) + thread % 32 // 4, 2 * (thread % 4)
    return [
        (row + 8 * (index // 2 % 2), 8 * (index // 4) + column + index % 2)
        for index in range(columns // 2)
    ]


def fragment_of_rows(registers):
    """A [16, 16] of m16n8k16, or a warp's rows of wgmma's."""
    a = np.zeros((16, 16), np.float32)
    for index, register in enumerate(registers):
        for side, value in enumerate(pairs(register).T):
            a[G + 8 * (index % 2), 2 * T + 8 * (index // 2) + side] = value
    return a


def mma(text, *operands):
    multiply = _mma_int8 if ".s8" in text else _mma_bf16
    return multiply(text, *operands)


def _mma_int8(text, *operands):
    assert ".m16n8k32.row.col.s32.s8.s8.s32" in text
    a, b = np.zeros((16, 32), np.int32), np.zeros((32, 8), np.int32)
    for index, register in enumerate(operands[:4]):
        for side, value in enumerate(_bytes(register).T):
            a[G + 8 * (index % 2), 4 * T + 16 * (index // 2) + side] = value
    for index, register in enumerate(operands[4:6]):
        for side, value in enumerate(_bytes(register).T):
            b[4 * T + 16 * index + side, G] = value
    d = (a @ b).view(np.uint32)
    return tuple(
        c + d[G + 8 * (index // 2), 2 * T + index % 2] for index, c in enumerate(operands[6:])
    )


def _bytes(word):
    """Signed [32, 4]."""
    return np.ascontiguousarray(word).view(np.int8).reshape(-1, 4)


def _mma_bf16(text, *operands):
    assert ".m16n8k16.row.col.f32.bf16.bf16.f32" in text
    b = np.zeros((16, 8), np.float32)
    for index, register in enumerate(operands[4:6]):
        for side, value in enumerate(pairs(register).T):
            b[2 * T + 8 * index + side, G] = value
    d = fragment_of_rows(operands[:4]) @ b
    return tuple(
        c + d[G + 8 * (index // 2), 2 * T + index % 2] for index, c in enumerate(operands[6:])
    )


def larger_magnitude(a, b):
    """Signs as the instruction has them: that of the product."""
    return np.copysign(np.maximum(np.abs(a), np.abs(b)), np.copysign(1, a) * np.copysign(1, b))


def load_matrices(warp, mask, text, address):
    """Four of them: lane 8 i + r has row r of matrix i."""
    assert mask.all()
    assert text.startswith("ldmatrix.sync.aligned.m8n8.x4.shared.b16 ")
    rows = warp.memory.load(address, 16, mask).view(np.uint32).reshape(4, 8, 4)
    return tuple(matrix[G, T] for matrix in rows)


def wgmma(warp, text, operands):
    if "wgmma.mma_async" not in text:
        assert text.startswith(("wgmma.fence", "wgmma.commit_group", "wgmma.wait_group"))
        if text.startswith("wgmma.commit_group"):
            warp.is_committed = True
        if text.startswith("wgmma.wait_group"):
            assert warp.is_committed, "products are waited for that are in no group"
        return tuple(operands)
    warp.is_committed = False
    *sums, a0, a1, a2, a3, descriptor = operands
    multiply = _wgmma_e4m3 if ".e4m3" in text else _wgmma_bf16
    d = multiply(warp.memory, text, (a0, a1, a2, a3), int(descriptor[0]))
    keeps = np.float32("setp.ne.b32 p, 0, 0;" not in text)
    return tuple(
        keeps * c + d[G + 8 * (index // 2 % 2), 8 * (index // 4) + 2 * T + index % 2]
        for index, c in enumerate(sums)
    )


def _wgmma_bf16(memory, text, a, descriptor):
    n = int(re.search(r"\.m64n(\d+)k16\.f32\.bf16\.bf16 ", text)[1])
    assert text.endswith(f"${n + 4}, p, 1, 1, 0; }}")  # K-major
    return fragment_of_rows(a) @ _read_k_major(memory, descriptor, n).T


def _wgmma_e4m3(memory, text, a, descriptor):
    n = int(re.search(r"\.m64n(\d+)k32\.f32\.e4m3\.e4m3 ", text)[1])
    assert text.endswith(f"${n + 4}, p, 1, 1; }}")
    rows = np.zeros((16, 32), np.float32)
    for index, register in enumerate(a):
        for side, value in enumerate(np.ascontiguousarray(register).view(E4M3).reshape(32, 4).T):
            rows[G + 8 * (index % 2), 4 * T + 16 * (index // 2) + side] = value
    return rows @ _read_plain(memory, descriptor, n).T


def _read_plain(memory, descriptor, n):
    """B [n, 32] in core matrices of eight rows of 16 bytes, not swizzled."""
    assert not descriptor >> 62
    start, next_columns, next_eight = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
    row, byte = np.mgrid[:n, :32]
    address = start + row // 8 * next_eight + row % 8 * 16 + byte // 16 * next_columns + byte % 16
    return memory.bytes[address].view(E4M3).astype(np.float32)


def _read_k_major(memory, descriptor, n):
    """B [n, 16] in eights of rows, 128 bytes a row, swizzled."""
    assert descriptor >> 62 == 1
    start, next_eight = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 32))
    row, byte = np.mgrid[:n, :32]
    address = swizzled(start + row // 8 * next_eight + row % 8 * 128 + byte)
    return memory.bytes[address].view(BF16).astype(np.float32)


def shuffle(mask, text, value, *lane):
    assert mask.all()
    if lane:
        return value[lane[0] & 31]
    if of_quad := re.search(r"idx\.b32 \$0, \$1, (\d), 0x1c1f, 0xffffffff;", text):
        return value[LANES & ~3 | int(of_quad[1])]
    if "%laneid" in text:  # of a word plus the number of the lane, from the first
        assert "mov.u32 t, %laneid; add.u32 t, t, $1; shfl.sync.idx.b32 $0, t, 0, 31" in text
        return np.full_like(value, value[0])
    if up := re.search(r"up\.b32 \$0, \$1, (\d+), 0, 0xffffffff;", text):
        return value[np.where(int(up[1]) <= LANES, LANES - int(up[1]), LANES)]
    return value[LANES ^ int(re.search(r"bfly\.b32 \$0, \$1, (\d+), 31, 0xffffffff;", text)[1])]


def reduce(mask, text, value):
    assert mask.all()
    function = np.max if ".max.u32" in text else np.min
    return np.full(32, function(value), np.uint32)


def ballot(mask, text, value):
    assert mask.all()
    assert "setp.ne.u32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff;" in text
    return np.full(32, sum(1 << lane for lane in np.flatnonzero(value)), np.uint32)


_LOADED = {"b32": np.uint32, "f32": np.float32, "u16": np.uint16}


def load(warp, mask, text, address, *wanted):
    """Zeros where a predicate is false."""
    assert ("@p" in text) == bool(wanted)
    count, kind = re.search(r"ld\.global\S*?(?:\.v(\d))?\.([bfu]\d+) ", text).groups()
    dtype = np.dtype(_LOADED[kind])
    for lanes in wanted:
        mask = mask & (lanes != 0)
    loaded = warp.memory.load(address, dtype.itemsize * int(count or 1), mask)
    return tuple(loaded.view(dtype).T.copy())


def store_words(warp, mask, text, address, *words):
    assert (".v2" in text) == (len(words) == 2)
    warp.memory.store(address, np.stack(words, axis=-1).view(np.uint8), mask)
    return ()


def store(warp, mask, text, address, *operands):
    """Of rows whose number is below the last operand."""
    *values, left = operands
    place = int(re.search(r"setp.gt.s32 p, \$\d+, (\d+);", text)[1])
    assert (".v2" in text) == (len(values) == 2)
    mine = mask & (left.view(np.int32) > place)
    warp.memory.store(address, np.stack(values, axis=-1).view(np.uint8), mine)


def increment(warp, mask, text, address, limit):
    """Atomic: one more, or zero if it has reached the limit; what was before."""
    assert text.startswith("atom.acq_rel.gpu.global.inc.u32")
    before = np.zeros(32, np.uint32)
    for lane in np.flatnonzero(mask):
        only = lane == LANES
        before[lane] = warp.memory.load(address, 4, only).view(np.uint32)[lane, 0]
        after = np.uint32(0) if before[lane] >= limit[lane] else before[lane] + np.uint32(1)
        warp.memory.store(address, np.full((32, 1), after).view(np.uint8), only)
    return before


def add_to_count(warp, mask, text, address, number):
    """Atomic, without a result."""
    assert text.startswith(("red.relaxed.gpu.global.add.u32", "red.release.gpu.global.add.u32"))
    for lane in np.flatnonzero(mask):
        only = lane == LANES
        after = warp.memory.load(address, 4, only).view(np.uint32)[:, 0] + number
        warp.memory.store(address, after.view(np.uint8).reshape(32, 4), only)
    return ()


def expect(warp, mask, text, address, size):
    """One arrival, which is all that a barrier waits for beside its bytes."""
    del text
    for lane in np.flatnonzero(mask):
        warp.memory.barrier(address[lane]).expect(int(size[lane]))


def copy(warp, mask, text, target, source, size, barrier):
    del text
    for lane in np.flatnonzero(mask):
        assert not size[lane] % 16
        assert not target[lane] % 16
        assert not source[lane] % 16
        piece = int(target[lane]), int(source[lane]), int(size[lane])
        warp.memory.barrier(barrier[lane]).copies.append(piece)


def copy_own(warp, mask, text, target, source):
    """Of each lane 16 or 4 bytes, which appear when the warp waits."""
    size = int(re.fullmatch(r"cp\.async\.c[ag]\.shared\.global \[\$0\], \[\$1\], (16|4);", text)[1])
    assert (size == 16) == (".cg" in text)
    warp.copies.append((target, source, size, mask))


def wait_for_own(warp, mask, text):
    for target, source, size, lanes in warp.copies:
        warp.memory.store(target, warp.memory.load(source, size, lanes), lanes)
    warp.copies.clear()
    return ()


def arrived(warp, mask, address, parity):
    """Whether a barrier has passed the phase of that parity; its copies arrive now, not before."""
    (address,), (parity,) = np.unique(address[mask]), np.unique(parity[mask])
    return warp.memory.barrier(address).has_passed(int(parity), warp.memory)


def _plain(function):
    return lambda warp, mask, text, *operands: function(*operands)


def _of_text(function):
    return lambda warp, mask, text, *operands: function(text, *operands)


def _nothing(warp, mask, text):
    assert mask.all()
    return ()


INSTRUCTIONS = {
    "lop3.b32": _of_text(lop3),
    "prmt.b32": _of_text(permute_bytes),
    "fma.rn.f32": _plain(lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32)),
    "max.f32": _plain(np.fmax),
    "cvt.rn.satfinite.e4m3x2.f16x2": _plain(halves_to_e4m3),
    "cvt.rn.f16x2.e4m3x2": _plain(e4m3_to_halves),
    "cvt.rn.f16x2.f32": _plain(
        lambda high, low: np.stack([low, high], axis=-1).astype(np.float16).view(np.uint32)[:, 0]
    ),
    "sub.rn.f16x2": _plain(lambda a, b: (halves(a) - halves(b)).view(np.uint32)[:, 0]),
    "mul.rn.f16x2": _plain(lambda a, b: (halves(a) * halves(b)).view(np.uint32)[:, 0]),
    "max.NaN.xorsign.abs.f32": _plain(larger_magnitude),
    "max.NaN.xorsign.abs.bf16x2": _plain(lambda a, b: words(larger_magnitude(pairs(a), pairs(b)))),
    "ex2.approx.f32": _plain(np.exp2),
    "rcp.approx.f32": _plain(np.reciprocal),
    "rsqrt.approx.f32": _plain(lambda a: np.reciprocal(np.sqrt(a))),
    "cvt.rn.bf16x2.f32": _plain(lambda high, low: words(np.stack([low, high], axis=-1))),
    "cvt.rn.bf16.f32": _plain(lambda a: a.astype(BF16).view(np.uint16)),
    "add.rn.bf16x2": _plain(lambda a, b: words(pairs(a) + pairs(b))),
    "sub.rn.bf16x2": _plain(lambda a, b: words(pairs(a) - pairs(b))),
    "mul.rn.bf16x2": _plain(lambda a, b: words(pairs(a) * pairs(b))),
    "mma.sync": _of_text(mma),
    "ldmatrix": load_matrices,
    "wgmma": lambda warp, mask, text, *operands: wgmma(warp, text, operands),
    "redux.sync": lambda warp, mask, text, value: reduce(mask, text, value),
    "vote.sync.ballot.b32": lambda warp, mask, text, value: ballot(mask, text, value),
    "shfl.sync": lambda warp, mask, text, *operands: shuffle(mask, text, *operands),
    "ld.global": load,
    "st.global": store,
    "st.relaxed.gpu.global": store_words,
    "atom": increment,
    "red": add_to_count,
    "fence.acq_rel.gpu": lambda warp, mask, text: (),
    "mbarrier.arrive.expect_tx": expect,
    "cp.async.bulk": copy,
    "cp.async.cg": copy_own,
    "cp.async.ca": copy_own,
    "cp.async.wait_all": wait_for_own,
    "bar.warp.sync": _nothing,
    ".pragma": lambda warp, mask, text: (),
    "add.s32": _of_text(add_constant),
    "mov.b32": _plain(lambda low, high: low.astype(np.uint32) | high.astype(np.uint32) << 16),
}


def instruction(text):
    """What the text does, by the first of the names above that is in it; tiny numbers stay."""
    plain = text.replace(".ftz", "")
    for name, run in INSTRUCTIONS.items():
        if re.search(rf"(^|[ \n]){re.escape(name)}\b", plain):
            return run
    raise NotImplementedError(text)
