"""Fills a ring with blocks of keys and values, page by page through the tensor memory accelerator. In Gluon for Hopper.

One warp of a program of `attention_programs.py` or `attention_fp8_programs.py` runs it. `carry_attention.py` loads by
itself, as its keys and values have rings of their own.

Shape legend: K KV heads, N pages of G tokens, P pages of a table.
"""

# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# Tokens of a page.
PAGE_TOKENS = 16
_PAGE: gl.constexpr = gl.constexpr(PAGE_TOKENS)


@gluon.jit
def _pages_of(page_tables, table_stride, rows, cursor):
    """The pages of a block of keys; for those beyond the context the last page."""
    last = gl.maximum(cursor.context - 1, 0) // _PAGE
    table, at = page_tables + (rows.first_row + cursor.row) * table_stride, cursor.block * (rows.BLOCK // _PAGE)
    page0, page1 = gl.load(table + gl.minimum(at, last)), gl.load(table + gl.minimum(at + 1, last))
    page2, page3 = gl.load(table + gl.minimum(at + 2, last)), gl.load(table + gl.minimum(at + 3, last))
    return (page0, page1, page2, page3)


@gluon.jit
def fill_ring(
    keys, values, scales, memory, ring, page_tables, table_stride, rows, cursor, num_steps,
    PANELS: gl.constexpr, WIDTH: gl.constexpr, SLOT_BYTES: gl.constexpr,
):  # fmt: skip
    """Load the blocks of a run into the ring, in PANELS panels of WIDTH dimensions.

    `scales`, of keys and values in 8 bits, are words [N x K, G] and go to `memory.scales`; else they are None. Every
    slot gets SLOT_BYTES bytes, as a page beyond the context is replaced by the last one.
    """
    PAGES: gl.constexpr = rows.BLOCK // _PAGE
    # Page numbers are read a step ahead, which hides their latency.
    pages = _pages_of(page_tables, table_stride, rows, cursor)
    for step in range(num_steps):
        slot = step % ring.STAGES
        following = cursor.next(rows)
        next_pages = _pages_of(page_tables, table_stride, rows, following)
        bar = ring.expect(step, SLOT_BYTES)
        for i in gl.static_range(PAGES):
            head = pages[i] * rows.KV_HEADS + cursor.head
            for panel in gl.static_range(PANELS):
                tile = memory.keys.index(slot * PANELS + panel).slice(i * _PAGE, _PAGE)
                tma.async_copy_global_to_shared(keys, [head * _PAGE, panel * WIDTH], bar, tile)
            for panel in gl.static_range(PANELS):
                tile = memory.values.index(slot * PANELS + panel).slice(i * _PAGE, _PAGE)
                tma.async_copy_global_to_shared(values, [head * _PAGE, panel * WIDTH], bar, tile)
            if scales is not None:
                words = memory.scales.index(slot * PAGES + i).slice(0, 1)
                tma.async_copy_global_to_shared(scales, [head, 0], bar, words)
        cursor, pages = following, next_pages
