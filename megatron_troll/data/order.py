"""The order of the training prompts: a shuffle per epoch that any process can resume at any position."""

import numpy as np


class PromptOrder:
    """Indices 0..size-1 epoch after epoch. Each epoch is a permutation keyed by (seed, epoch), so `position`,
    the number of indices returned so far, is the whole state."""

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
        """Continue as if `position` indices had been returned."""
        if position < 0:
            raise ValueError(f"a position is a number of prompts, 0 or more, got {position}")
        self.position = position

    def next(self, count: int) -> list[int]:
        """Return the next `count` indices; continues into the next epoch, so an index may occur twice."""
        drawn = [self._index(self.position + offset) for offset in range(count)]
        self.position += count
        return drawn

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, self._size)
        if self._shuffle and epoch != self._epoch:
            # Unlike Generator.permutation, raw Philox words are guaranteed not to change between releases.
            words = np.random.Philox(key=[self._seed, epoch]).random_raw(self._size)
            self._permutation = np.argsort(words, kind="stable")
            self._epoch = epoch
        return int(self._permutation[place])
