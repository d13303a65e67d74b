"""Near-duplicates among rows: what a row is compared by, and which rows are alike.

Used where rows are held out for validation (`job.data.validation_split`) and by the audit (`job.audit`). A row has the
SHA-256 of its words and a MinHash signature (datasketch) of its shingles: runs of three words. Letter case, punctuation
and white space do not count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from hashlib import sha256
from itertools import combinations
from typing import TYPE_CHECKING, Any
from zlib import crc32

if TYPE_CHECKING:
    import numpy as np

ALIKE = 0.8
SHINGLE = 3
BANDS, BAND = 20, 6
VALUES = 128
"""Values of a signature. Its first BANDS * BAND ones, in bands of BAND, find candidates: rows that agree in a band."""
SEED = 1
"""Of the hash functions of a signature: a constant, so that a row falls alike in every run."""
MOST_COMPARED = 64
"""Rows that agree in a band are compared pair by pair up to this number; more of them form one group at once, since all
pairs of thousands of rows made from one pattern would take minutes."""
_DIGEST_BYTES = 32
# One word for each character where words are written without spaces: Thai to Burmese, Khmer, Chinese, Japanese, Korean.
_WORD = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+")


class RowHashes:
    """What rows are compared by, collected while they are read: `digests` by row, and a signature for each digest."""

    def __init__(self) -> None:
        self.digests: list[bytes] = []
        self.signatures: dict[bytes, np.ndarray[Any, np.dtype[np.uint32]]] = {}

    def add(self, hashed: bytes) -> None:
        """Adds the next row by its `row_hash`."""
        import numpy as np

        digest = hashed[:_DIGEST_BYTES]
        self.digests.append(digest)
        if digest not in self.signatures:
            self.signatures[digest] = np.frombuffer(hashed[_DIGEST_BYTES:], np.uint32)


def words_of(text: str) -> list[str]:
    """The words of a text in lower case."""
    return _WORD.findall(text.casefold())


def row_hash(texts: Sequence[str]) -> bytes:
    """What a row is compared by, from the texts of its fields: the SHA-256 of its words, and its signature."""
    # Without a single word (emoji, punctuation) the unchanged texts are compared.
    words = (" ".join(words_of(" ".join(texts))) or "\0".join(texts)).encode()
    return sha256(words).digest() + _signature(words.split(b" "))


@cache
def _hasher() -> Any:
    from datasketch import MinHash

    return MinHash(VALUES, SEED, hashfunc=int, scheme="affine32")


def _signature(words: Sequence[bytes]) -> bytes:
    """(VALUES,) uint32."""
    import numpy as np

    hasher = _hasher()
    hasher.clear()
    # By number: a hash of each word, then one of neighbours, modulo 2 ** 32; MinHash mixes the bits once more.
    hashed = np.fromiter(map(crc32, words), np.uint32, len(words))
    last = max(1, len(hashed) - SHINGLE + 1)
    shingles = np.zeros(last, dtype=np.uint32)
    for place in range(min(SHINGLE, len(hashed))):
        shingles = (shingles + hashed[place : place + last]) * np.uint32(0x9E3779B1)
        shingles ^= shingles >> np.uint32(16)
    hasher.update_batch(shingles.tolist())
    return bytes(hasher.hashvalues.astype(np.uint32, copy=False).tobytes())


def group_rows(rows: RowHashes, check_stop: Callable[[], None] = lambda: None) -> list[bytes]:
    """The group of each row, named by the smallest digest in it."""
    digests = sorted(rows.signatures)
    parent = list(range(len(digests)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    for one, other in _alike([rows.signatures[digest] for digest in digests], check_stop):
        first, second = sorted((root(one), root(other)))
        parent[second] = first  # so a group's root is its smallest digest
    named = {digest: digests[root(index)] for index, digest in enumerate(digests)}
    return [named[digest] for digest in rows.digests]


def _alike(
    signatures: Sequence[np.ndarray[Any, np.dtype[np.uint32]]], check_stop: Callable[[], None]
) -> Iterator[tuple[int, int]]:
    """Pairs of positions whose signatures are alike: enough of them to connect all that are."""
    import numpy as np

    if not signatures:
        return
    table = np.stack(signatures)
    for band in range(BANDS):
        check_stop()
        part = np.ascontiguousarray(table[:, band * BAND : (band + 1) * BAND]).view(f"V{4 * BAND}")[:, 0]
        order = np.argsort(part, kind="stable")
        borders = np.flatnonzero(part[order][1:] != part[order][:-1]) + 1
        starts = np.concatenate([[0], borders])
        ends = np.concatenate([borders, [len(order)]])
        several = ends - starts > 1
        for start, end in zip(starts[several].tolist(), ends[several].tolist(), strict=True):
            bucket = order[start:end].tolist()
            if len(bucket) > MOST_COMPARED:
                yield from ((bucket[0], other) for other in bucket[1:])
                continue
            for one, other in combinations(bucket, 2):
                if np.count_nonzero(table[one] == table[other]) >= ALIKE * VALUES:
                    yield one, other
