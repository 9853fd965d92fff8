"""Tiles of a row of logits, whose maxima let top-K skip most of the row."""

NARROWEST, WIDEST = 32, 128
# The most candidates that one top-K program can hold in registers.
CANDIDATES = 8192


def tile_size(width: int, k: int) -> int:
    """Columns per tile for the top-`k` of rows of `width` columns: the widest of 128, 64 and 32 for which the
    k tiles that top-K reads fit in registers and are at most an eighth of the row; 32 if none does."""
    tile = WIDEST
    while tile > NARROWEST and (k * tile > CANDIDATES or k * tile * 8 > width):
        tile //= 2
    return tile
