"""How a row of logits is cut into tiles, whose maxima let top-K skip most of the row."""

NARROWEST, WIDEST = 32, 128
# Candidates that one top-K program holds in registers.
CANDIDATES = 8192


def tile_size(width: int, k: int) -> int:
    """Columns of a tile for rows of `width` and top-`k`: as wide as registers allow, down to 32, and narrow
    enough that the k tiles that can hold a top-K entry are an eighth of the row."""
    tile = WIDEST
    while tile > NARROWEST and (k * tile > CANDIDATES or k * tile * 8 > width):
        tile //= 2
    return tile
