"""Which rows are held out for validation: near-duplicates are never split, and equal data gives an equal choice.

1. Every row gets the SHA-256 of its words, and a MinHash signature (datasketch) of its shingles: runs of three words.
   Letter case, punctuation and white space do not count, nor does the system prompt, which many rows share. Of rows of
   preferences only the prompt counts, so that no prompt is on both sides.
2. Rows of equal words form a group, and so do rows whose signatures agree in `ALIKE` of their values, an estimate of
   the Jaccard similarity of their shingles; groups that have a row in common are one. Candidates are found by bands
   (locality-sensitive hashing) instead of comparing all pairs. Rows that are similar to 0.9 are found nearly always, at
   0.8 half of them are, and at 0.7 hardly any.
3. A group's rank, a number in [0, 1), is a hash of the smallest SHA-256 in it. With a share, the groups below
   it are held out; with a number of rows, the groups in the order of their ranks, as long as they fit.

So neither the order of the rows nor the run's seed matters. With a share, whether a row without near-duplicates is held
out does not depend on the other rows. A group larger than the requested number of rows stays in training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from hashlib import sha256

from job.common.near_duplicates import RowHashes, group_rows
from job.errors import DataError, Problem


def hold_out(
    rows: RowHashes, share_or_count: float, name: str, check_stop: Callable[[], None] = lambda: None
) -> list[bool]:
    """Which rows are held out for validation.

    Args:
        rows: All rows.
        share_or_count: A share of the rows (below 1), or their number.
        name: Name of the source, for messages.
        check_stop: Called periodically; an exception from it ends the work.

    Returns:
        For each row whether it is held out: at least one is, and at least one is not.

    Raises:
        DataError: There are too few rows, or all of them are near-duplicates of each other.
    """
    total = len(rows.digests)
    most = share_or_count * total if share_or_count < 1 else share_or_count
    if share_or_count >= total:
        what = f"has {total:,} rows, so {share_or_count:,} of them cannot be held out; lower JOB_DATA__VALIDATION"
        raise DataError([Problem(name, what)])
    groups = group_rows(rows, check_stop)
    sizes = Counter(groups)
    ranks = {group: sha256(b"validation\0" + group).digest() for group in sizes}
    fitting = [group for group in sorted(sizes, key=ranks.__getitem__) if sizes[group] <= most]
    if share_or_count < 1:
        held_groups = {group for group in fitting if int.from_bytes(ranks[group][:8], "big") < share_or_count * 2**64}
    else:
        held_groups, room = set(), int(share_or_count)
        for group in fitting:
            if sizes[group] <= room:
                held_groups.add(group)
                room -= sizes[group]
    if not held_groups:
        largest = max(sizes.values())
        reason = (
            f"its {total:,} rows form {len(sizes):,} groups of near-duplicates, the largest of {largest:,} rows, and"
            " none could be held out for validation"
        )
        fix = "raise JOB_DATA__VALIDATION, or set it to a separate source"
        raise DataError([Problem(name, f"{reason}; {fix}")])
    if len(held_groups) == len(sizes):  # each group is held out or not by itself, so of a few groups all may be
        groups_in_words = f"{total:,} rows in {len(sizes):,} groups of near-duplicates"
        what = f"a share of {share_or_count:g} holds all of them out, so that none is left to train on"
        fix = "lower JOB_DATA__VALIDATION, or set it to a number of rows"
        raise DataError([Problem(name, f"has {groups_in_words}, and {what}; {fix}")])
    return [group in held_groups for group in groups]


def count_overlap(training: RowHashes, validation: RowHashes, check_stop: Callable[[], None]) -> tuple[int, int]:
    """How many validation rows are the same as a training row word for word, and how many others are nearly so."""
    both = RowHashes()
    both.digests = [*training.digests, *validation.digests]
    both.signatures = training.signatures | validation.signatures
    groups = group_rows(both, check_stop)
    learned, same = set(groups[: len(training.digests)]), set(training.digests)
    exact = sum(digest in same for digest in validation.digests)
    return exact, sum(group in learned for group in groups[len(training.digests) :]) - exact
