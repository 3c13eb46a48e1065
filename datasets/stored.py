"""Raw data sets whose images are bytes in something larger than a file of their own: records, not paths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from datasets.images import SCHEME, ImageFiles, Names, SampleError


class JoinedNames(Names):
    """Names that are joined already.

    Args:
        offsets: (N + 1,) int64; name i lies in `joined[offsets[i]:offsets[i + 1]]`.
        joined: (B,) uint8, the bytes of all names.
    """

    def __init__(self, offsets: np.ndarray, joined: np.ndarray) -> None:
        self._offsets = offsets
        self._bytes = joined

    @staticmethod
    def of(names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The offsets and bytes of any names."""
        joined = names if isinstance(names, Names) else Names(names)
        return joined._offsets, joined._bytes

    def picked(self, indices: np.ndarray) -> JoinedNames:
        """Those of the names, without making strings of them."""
        begins, ends = self._offsets[indices], self._offsets[indices + 1]
        offsets = np.zeros(len(indices) + 1, dtype=np.int64)
        np.cumsum(ends - begins, out=offsets[1:])
        places = np.arange(offsets[-1]) + np.repeat(begins - offsets[:-1], ends - begins)
        return JoinedNames(offsets, self._bytes[places])


def joined(names: Sequence[str]) -> JoinedNames:
    """Any names as joined ones."""
    return names if isinstance(names, JoinedNames) else JoinedNames(*JoinedNames.of(names))


class Records:
    """A store of encoded images by number; what it holds open belongs to one process, and is not pickled."""

    def encoded(self, number: int) -> bytes:
        """The bytes of an image file.

        Raises:
            SampleError: where they cannot be read, or are not those that were written.
        """
        raise NotImplementedError

    def where(self, number: int) -> str:
        """Where record `number` lies, for an error: the file, and the place in it."""
        raise NotImplementedError


class StoredImages(ImageFiles):
    """Images in a store of records, and their targets; in all else like images in files.

    Args:
        root: what the records lie in.
        records: the store.
        numbers: (N,) int64, the record of each image.
        names: of the images, as files of a folder would be called.
        targets: (N,) int64 class indices or float32 values.
        channels: 1 or 3.
        classes: the names of the classes.
        digest: what the images contain, of the whole store; it stands for their bytes in the fingerprint.
    """

    lie_elsewhere = True

    def __init__(
        self,
        root: Path,
        records: Records,
        numbers: np.ndarray,
        names: Sequence[str],
        targets: np.ndarray,
        channels: int,
        classes: Sequence[str] = (),
        digest: str = "",
    ) -> None:
        super().__init__(root, joined(names), targets, channels, classes)
        self.records = records
        self.numbers = numbers
        self.digest = digest

    def encoded(self, index: int) -> bytes:
        try:
            return self.records.encoded(int(self.numbers[index]))
        except SampleError as error:
            raise SampleError(f"{self.names[index]}: {error}", error.see) from error

    def where(self, index: int) -> str:
        return f"{self.names[index]} ({self.records.where(int(self.numbers[index]))})"

    def subset(self, indices: np.ndarray) -> StoredImages:
        names = joined(self.names).picked(indices)
        return self._changed(self.numbers[indices], names, self.targets[indices], self.classes)

    def relabelled(self, numbers: np.ndarray, classes: Sequence[str]) -> ImageFiles:
        targets = numbers[self.targets]
        changed = self._changed(self.numbers, self.names, targets, classes)
        return changed.subset(np.flatnonzero(targets >= 0)) if (targets < 0).any() else changed

    def _changed(
        self, numbers: np.ndarray, names: Sequence[str], targets: np.ndarray, classes: Sequence[str]
    ) -> StoredImages:
        changed = StoredImages(
            self.root, self.records, numbers, names, targets, self.channels, classes, self.digest
        )
        changed.decoder = self.decoder
        return changed

    def content(self, scheme: int = SCHEME) -> Iterator[bytes]:
        """Names, targets, the places in the store, and the digest of the store; nothing is read for it."""
        yield from self.names.content()
        yield self.targets.tobytes()
        yield self.numbers.tobytes()
        yield self.digest.encode()
