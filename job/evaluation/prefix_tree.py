"""A tree of token sequences (a radix tree) in which each common prefix occurs once.

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
    """A run of tokens without a branch in it.

    Attributes:
        tokens: Token ids; empty in the root only.
        children: The nodes that continue this one, by their first token, in the order in which they were added.
        start: Index of the first token in the packed sequence, set when the tree is laid out.
    """

    tokens: Ids = ()
    children: dict[int, Node] = field(default_factory=dict)
    start: int = 0


def insert(node: Node, ids: Ids) -> tuple[int, Node]:
    """Adds a path below a node, which may be the root.

    Returns:
        (how many of the path's tokens are new, always its last ones; the node that the path ends with). The path's last
        token is and remains the last token of that node, also after later insertions.
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
    """Splits a child after its first `size` tokens; returns the new node with these, whose only child it then is."""
    first = Node(child.tokens[:size])
    child.tokens = child.tokens[size:]
    first.children[child.tokens[0]] = child
    parent.children[first.tokens[0]] = first
    return first


def common_start(first: Ids, second: Ids) -> int:
    """The length of the longest common prefix."""
    least, most = 0, min(len(first), len(second))
    while least < most:  # comparing slices is much faster than comparing token by token
        middle = (least + most + 1) // 2
        if first[least:middle] == second[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least


def walk(root: Node) -> Iterator[tuple[Node, Node, int]]:
    """Yields (node, parent, tokens before the node on its path) in depth-first preorder, without the root.

    So all descendants of a node follow it without a gap, as `packed_layout.Layout` requires.
    """
    stack = [(child, root, 0) for child in reversed(root.children.values())]
    while stack:
        node, parent, depth = stack.pop()
        yield node, parent, depth
        below = depth + len(node.tokens)
        stack += [(child, node, below) for child in reversed(node.children.values())]


def token_positions(node: Node, ids: Sequence[int]) -> Iterator[int]:
    """Yields the index in the packed sequence of each token of a path below the node, which was inserted there."""
    at = 0
    while at < len(ids):
        node = node.children[ids[at]]
        yield from range(node.start, node.start + len(node.tokens))  # a node ends wherever a path does
        at += len(node.tokens)
