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


@dataclass(eq=False, slots=True)
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


def insert(node: Node, ids: Ids) -> tuple[int, Node]:
    """Adds a path that continues a node, which may be the root.

    Returns:
        How many of its tokens are new, which are always the last ones, and the node that it ends with: its last token
        is the node's last, also after further paths have been added.
    """
    at = 0
    while at < len(ids):
        child = node.children.get(ids[at])
        if child is None:
            node.children[ids[at]] = new = Node(ids[at:])
            return len(ids) - at, new
        size = len(child.tokens)
        here = ids[at : at + size]
        if here != child.tokens:
            size = common_start(child.tokens, here)
            child = _split(node, child, size)
        node, at = child, at + size
    return 0, node


def _split(parent: Node, child: Node, size: int) -> Node:
    """The first tokens of a child as a node of their own, which the child then continues."""
    first = Node(child.tokens[:size])
    child.tokens = child.tokens[size:]
    first.children[child.tokens[0]] = child
    parent.children[first.tokens[0]] = first
    return first


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


def places(node: Node, ids: Sequence[int]) -> Iterator[int]:
    """Where the tokens of a path that continues the node lie in the packed sequence, in order."""
    at = 0
    while at < len(ids):
        node = node.children[ids[at]]
        here = min(len(node.tokens), len(ids) - at)
        yield from range(node.start, node.start + here)
        at += here
