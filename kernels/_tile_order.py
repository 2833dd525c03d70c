"""The order in which programs take the tiles of a product."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_at(tile, tiles_m, tiles_n):
    """Row and column of a tile. Eight rows of tiles at a time: programs that run together share their tiles of a and
    of b in L2."""
    group = tile // (8 * tiles_n)
    height = tl.minimum(tiles_m - 8 * group, 8)
    within = tile % (8 * tiles_n)
    return 8 * group + within % height, within // height
