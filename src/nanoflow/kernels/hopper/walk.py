"""The order in which Hopper's programs process the keys of a batch: row, KV head, block of keys. In Gluon.

A run is a sequence of consecutive blocks in this order, across heads and rows; a `Cursor` is a position in it.
`attention_programs.py` and `carry_attention.py` compute with the blocks. `merge.py`, in Triton, counts blocks in the
same order.

Shape legend: B rows that may be decodes, K KV heads.

Gluon checks fields of an aggregate against their annotations, so these must be classes, not strings.
"""

# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate


@aggregate
class Rows:
    """The rows of a launch.

    Attributes:
        context_len: int32 [B], keys of each row of the batch.
        key_blocks: int32 [B + 1], blocks of keys of one head before each row.
        first_row, num_rows: The rows of this launch.
        KV_HEADS: K.
        BLOCK: Keys of a block.
    """

    context_len: gl.tensor
    key_blocks: gl.tensor
    first_row: gl.tensor
    num_rows: gl.tensor
    KV_HEADS: gl.constexpr
    BLOCK: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, context_len, key_blocks, first_row, num_rows, KV_HEADS, BLOCK):
        self.context_len, self.key_blocks, self.first_row, self.num_rows = context_len, key_blocks, first_row, num_rows
        self.KV_HEADS, self.BLOCK = gl.constexpr(KV_HEADS), gl.constexpr(BLOCK)

    @gluon.jit
    def base(self):
        """Number of blocks of one head before the launch's first row."""
        return gl.load(self.key_blocks + self.first_row)

    @gluon.jit
    def num_blocks(self, base):
        """Number of blocks of all heads of all rows of the launch."""
        return (gl.load(self.key_blocks + self.first_row + self.num_rows) - base) * self.KV_HEADS

    @gluon.jit
    def find(self, place, base, SCAN: gl.constexpr, WARPS: gl.constexpr):
        """The cursor at block `place` of the launch; SCAN rows are searched in one step."""
        # Its row is the number of rows whose blocks all come before it.
        layout: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
        row = place * 0
        for at in range(0, self.num_rows, SCAN):
            rows = at + gl.arange(0, SCAN, layout)
            ends = gl.load(self.key_blocks + self.first_row + gl.minimum(rows, self.num_rows - 1) + 1)
            row += gl.sum((((ends - base) * self.KV_HEADS <= place) & (rows < self.num_rows)).to(gl.int32), 0)
        row = gl.maximum(gl.minimum(row, self.num_rows - 1), 0)
        context = gl.load(self.context_len + self.first_row + row)
        within = place - (gl.load(self.key_blocks + self.first_row + row) - base) * self.KV_HEADS
        blocks = gl.maximum(gl.cdiv(context, self.BLOCK), 1)
        return Cursor(row, within // blocks, within % blocks, context)


@aggregate
class Cursor:
    """A block of keys.

    Attributes:
        row: Row of the launch, from 0.
        head: KV head.
        block: Index of the block within its head and row.
        context: Keys of the row.
    """

    row: gl.tensor
    head: gl.tensor
    block: gl.tensor
    context: gl.tensor

    @gluon.constexpr_function
    def __init__(self, row, head, block, context):
        self.row, self.head, self.block, self.context = row, head, block, context

    @gluon.jit
    def next(self, rows):
        """The next block: of the same head, else of the next head, else of the next row that has any."""
        row, head, block, context = self.row, self.head, self.block, self.context
        block += 1
        if block * rows.BLOCK >= context:
            block = block * 0
            head += 1
            if head == rows.KV_HEADS:
                head = head * 0
                row = gl.minimum(row + 1, rows.num_rows - 1)
                context = gl.load(rows.context_len + rows.first_row + row)
                while (context == 0) & (row < rows.num_rows - 1):
                    row += 1
                    context = gl.load(rows.context_len + rows.first_row + row)
        return Cursor(row, head, block, context)

    @gluon.jit
    def ends_head(self, rows):
        """Whether it is the last block of its head."""
        return (self.block + 1) * rows.BLOCK >= self.context

    @gluon.jit
    def is_partial(self, rows):
        """Whether some of its keys are beyond the context."""
        return (self.block + 1) * rows.BLOCK > self.context

    @gluon.jit
    def exists(self, rows, layout: gl.constexpr):
        """Whether each of its keys is within the context, [BLOCK]."""
        return self.block * rows.BLOCK + gl.arange(0, rows.BLOCK, layout) < self.context


@gluon.jit
def run_of_program(rows, SCAN: gl.constexpr, WARPS: gl.constexpr):
    """The first block of this program's run, and its number of blocks; all programs' runs are equal but the last."""
    base = rows.base()
    num_blocks = rows.num_blocks(base)
    per_program = gl.cdiv(num_blocks, gl.num_programs(0))
    begin = gl.minimum(gl.program_id(0) * per_program, num_blocks)
    return rows.find(begin, base, SCAN, WARPS), gl.minimum(begin + per_program, num_blocks) - begin
