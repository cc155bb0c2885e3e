"""Keys and values of tokens that attention has read, so that the next token costs one row and not all of them again."""

from torch import Tensor

from llmfast._dispatch import eager


class KeyValues:
    """Keys and values of the rows that one attention layer has read so far."""

    def __init__(self) -> None:
        self.rows = 0
        self._room: Tensor | None = None  # (2, B, H, at least `rows`, head_width)

    @eager  # a number that changes with every token would recompile a compiled block each time
    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add rows (B, H, T, head_width); return all there are now."""
        begin, end = self.rows, self.rows + k.shape[2]
        if self._room is None or self._room.shape[3] < end:  # doubled: on average, a row is copied at most once more
            room = k.new_empty(2, *k.shape[:2], max(64, 2 * end), k.shape[3])
            if self._room is not None:
                room[:, :, :, :begin] = self._room[:, :, :, :begin]
            self._room = room
        self._room[0, :, :, begin:end], self._room[1, :, :, begin:end] = k, v
        self.rows = end
        keys, values = self._room[:, :, :, :end]
        return keys, values

    def crop(self, rows: int) -> None:
        """Forget all but the first `rows`."""
        self.rows = min(self.rows, rows)
