"""A tree of token sequences in which each common beginning occurs once.

c c c c          contexts and choices of several questions, each a path from the root
|     |
a a   b b b
      |   |
      d   e
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

Ids = tuple[int, ...]


@dataclass(eq=False)
class Node:
    """Tokens without a branch between them.

    Attributes:
        tokens: Empty in the root only.
        children: What continues them, by first token, in the order in which it was added.
        start: The first token's place in the packed sequence, once the tree is laid out.
    """

    tokens: Ids = ()
    children: dict[int, Node] = field(default_factory=dict)
    start: int = 0


def insert(root: Node, ids: Ids) -> int:
    """Adds a path; returns how many of its tokens are new, which are always the last ones."""
    node, at = root, 0
    while at < len(ids):
        child = node.children.get(ids[at])
        if child is None:
            node.children[ids[at]] = Node(ids[at:])
            return len(ids) - at
        same = common_start(child.tokens, ids[at : at + len(child.tokens)])
        if same < len(child.tokens):
            rest = Node(child.tokens[same:], child.children)
            child.tokens, child.children = child.tokens[:same], {rest.tokens[0]: rest}
        node, at = child, at + same
    return 0


def common_start(one: Ids, other: Ids) -> int:
    """How many first tokens of both are the same."""
    least, most = 0, min(len(one), len(other))
    while least < most:  # comparing slices is much faster than comparing token by token
        middle = (least + most + 1) // 2
        if one[least:middle] == other[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least


def walk(root: Node) -> Iterator[tuple[Node, Node, int]]:
    """Each node with its parent and the number of tokens before it on its path, a node before its children.

    Between a node and the last of those below it there is no other one: `packed_attention.Layout` needs this order.
    """
    left = [(child, root, 0) for child in reversed(root.children.values())]
    while left:
        node, parent, depth = left.pop()
        yield node, parent, depth
        below = depth + len(node.tokens)
        left += [(child, node, below) for child in reversed(node.children.values())]


def places(root: Node, ids: Sequence[int]) -> list[range]:
    """Where the tokens of a path that was added lie in the packed sequence, in order."""
    found, node, at = [], root, 0
    while at < len(ids):
        node = node.children[ids[at]]
        here = min(len(node.tokens), len(ids) - at)
        found.append(range(node.start, node.start + here))
        at += here
    return found
