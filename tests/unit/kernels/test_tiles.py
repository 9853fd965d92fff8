import pytest
from troll_kernels.tiles import CANDIDATES, tile_size


@pytest.mark.parametrize(("width", "k", "tile"), [(151_936, 64, 128), (18_992, 64, 32), (151_936, 256, 32)])
def test_tiles_fit_registers_and_skip_most_of_the_row(width, k, tile):
    assert tile_size(width, k) == tile
    assert k * tile <= CANDIDATES
    assert k * tile * 8 <= width or tile == 32
