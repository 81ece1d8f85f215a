"""What a loader tells how far it is."""

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """What a loader tells how far it is; `tqdm.tqdm(total=...)` is one."""

    def update(self, n: int) -> object:
        """`n` more modules, or bytes of a model, are loaded."""


def counter(progress: Progress | None) -> Callable[[], object]:
    """A function that tells `progress`, if there is one, of one more module."""
    return lambda: progress.update(1) if progress is not None else None
