"""The order in which prompts are drawn: a shuffle per epoch that any process can take up at any position."""

import numpy as np


class PromptOrder:
    """Indices 0..size-1 epoch after epoch. Each epoch is a permutation keyed by (seed, epoch), so `position`,
    the number of prompts drawn so far, is the whole state."""

    def __init__(self, size: int, seed: int, shuffle: bool = True):
        if size < 1:
            raise ValueError(f"there must be one prompt or more, got {size}")
        self._size = size
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = -1
        self._permutation = np.arange(size)
        self.position = 0

    def seek(self, position: int) -> None:
        """Continue as if `position` prompts had been drawn."""
        if position < 0:
            raise ValueError(f"a position counts the prompts drawn, got {position}")
        self.position = position

    def next(self, count: int) -> list[int]:
        """The next `count` indices; runs on into the next epoch, where an index may come again."""
        drawn = [self._index(self.position + offset) for offset in range(count)]
        self.position += count
        return drawn

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, self._size)
        if self._shuffle and epoch != self._epoch:
            # Raw Philox words, unlike Generator.permutation, are promised not to change between releases.
            words = np.random.Philox(key=[self._seed, epoch]).random_raw(self._size)
            self._permutation = np.argsort(words, kind="stable")
            self._epoch = epoch
        return int(self._permutation[place])
