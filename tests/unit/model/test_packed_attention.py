"""Packed attention: many sequences in one behave as if each were alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from job.model.packed_attention import Unpackable, _has_kernel, _varlen_kernel, packed_attention
from job.model.packed_layout import Layout, Segment, build_layout

CPU = torch.device("cpu")
ALONE = [Segment(0, 5), Segment(5, 6), Segment(6, 17)]
# A question of 7 tokens and three choices, one of them a single token, then a question whose choices take none.
SHARED = [Segment(0, 7), Segment(7, 10, 0, 7), Segment(10, 11, 0, 7), Segment(11, 16, 0, 7), Segment(16, 20)]
# Examples, after them two questions, each with choices of which some begin alike, and a question without examples.
NESTED = [
    *(
        Segment(0, 40),
        Segment(40, 80, 0, 40),
        Segment(80, 84, 40, 80),
        Segment(84, 85, 80, 84),
        Segment(85, 90, 80, 84),
    ),
    *(Segment(90, 97, 40, 80), Segment(97, 102, 0, 40), Segment(102, 104, 97, 102), Segment(104, 109)),
]
MADE = pytest.mark.parametrize(
    "segments", [ALONE, SHARED, NESTED], ids=["alone", "shared prefix", "prefixes with prefixes"]
)
HEADS = pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])


def rows(heads: int, groups: int, tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Random queries, keys and values of one row, that want a gradient."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(1, heads, tokens, 8), (1, groups, tokens, 8), (1, groups, tokens, 8)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scaling: float | None = None
) -> torch.Tensor:
    """What the model would get."""
    return packed_attention(torch.nn.Module(), query, key, value, None, layout=layout, scaling=scaling)[0]


def seen_before(segments: Sequence[Segment], s: Segment) -> list[int]:
    """The tokens that a segment sees before its own."""
    if s.prefix_end == s.prefix_start:
        return []
    (parent,) = (other for other in segments if other.start == s.prefix_start)
    return [*seen_before(segments, parent), *range(s.prefix_start, s.prefix_end)]


def eager(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Sequence[Segment], scaling: float
) -> torch.Tensor:
    """The textbook's attention with one full matrix: which token sees which is said outright."""
    tokens = query.shape[2]
    sees = torch.zeros(tokens, tokens, dtype=torch.bool)
    for s in segments:
        for token in range(s.start, s.end):
            sees[token, seen_before(segments, s)] = True
            sees[token, s.start : token + 1] = True
    shared_by = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared_by, dim=1), value.repeat_interleave(shared_by, dim=1)
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~sees, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


@MADE
@HEADS
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_eager_attention(
    segments: list[Segment], heads: int, groups: int, dtype: torch.dtype, close: float
) -> None:
    """Values and all three gradients are those of plain attention under the same mask."""
    inputs = rows(heads, groups, segments[-1].end, dtype)
    plain = eager(*inputs, segments, 8**-0.5)
    flat = attend(*inputs, build_layout(segments, CPU))
    assert flat.shape == plain.shape
    torch.testing.assert_close(flat, plain, rtol=close, atol=close)
    weights = torch.randn(plain.shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    expected = torch.autograd.grad((plain * weights).sum(), inputs)
    found = torch.autograd.grad((flat * weights).sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=close, atol=close)


@MADE
def test_takes_the_scale_it_is_given(segments: list[Segment]) -> None:
    """A model with its own scale of the scores gets it."""
    inputs = rows(4, 2, segments[-1].end, torch.float64)
    torch.testing.assert_close(attend(*inputs, build_layout(segments, CPU), 0.3), eager(*inputs, segments, 0.3))


@pytest.mark.parametrize("hit", range(len(ALONE)))
def test_sequences_never_see_each_other(hit: int) -> None:
    """Whatever is done to one sequence, the outputs of the others keep their bits."""
    segments = ALONE
    before = rows(4, 2, segments[-1].end, torch.float32)
    span = slice(segments[hit].start, segments[hit].end)
    after = [tensor.detach().clone() for tensor in before]
    for tensor in after:
        tensor[:, :, span] += 100
    one, other = (attend(*tensors, build_layout(segments, CPU)) for tensors in (before, after))
    others = [token for s in segments if s is not segments[hit] for token in range(s.start, s.end)]
    assert torch.equal(one[:, others], other[:, others])
    assert not torch.equal(one[:, span], other[:, span])


def test_choices_see_their_question_and_no_other_choice() -> None:
    """A change in one choice reaches neither the question nor another choice; one in the question reaches them all."""
    before = rows(4, 2, SHARED[-1].end, torch.float32)

    def changed_by(span: slice) -> set[int]:
        after = [tensor.detach().clone() for tensor in before]
        for tensor in after:
            tensor[:, :, span] += 1
        one, other = (attend(*tensors, build_layout(SHARED, CPU)) for tensors in (before, after))
        return {token for token in range(SHARED[-1].end) if not torch.equal(one[:, token], other[:, token])}

    assert changed_by(slice(7, 10)) == {7, 8, 9}
    assert changed_by(slice(10, 11)) == {10}
    assert changed_by(slice(0, 7)) == set(range(16))
    assert changed_by(slice(16, 20)) == {16, 17, 18, 19}


def test_tokens_see_nothing_behind_them() -> None:
    """Attention is causal: what comes later in a sequence changes nothing before it, with a prefix and without."""
    before = rows(4, 2, SHARED[-1].end, torch.float32)
    for s in SHARED:
        after = [tensor.detach().clone() for tensor in before]
        for tensor in after:
            tensor[:, :, s.end - 1] += 1
        one, other = (attend(*tensors, build_layout(SHARED, CPU)) for tensors in (before, after))
        assert torch.equal(one[:, s.start : s.end - 1], other[:, s.start : s.end - 1])


def test_the_plain_way_refuses_what_it_would_get_wrong() -> None:
    """A prefix must lie in the group of its segment, and begin with a segment: another is no silent mistake."""
    with pytest.raises(ValueError, match="not the last before it"):
        build_layout([Segment(0, 5), Segment(5, 9), Segment(9, 10, 0, 5)], CPU).blocks()
    with pytest.raises(KeyError):
        build_layout([Segment(0, 5), Segment(5, 9, 1, 5)], CPU)


@MADE
def test_the_layout_tells_the_kernel_the_same(segments: list[Segment]) -> None:
    """Offsets and key index, read as the variable-length kernel reads them, give plain attention's result."""
    query, key, value = rows(4, 4, segments[-1].end, torch.float64)
    layout = build_layout(segments, CPU)
    index = torch.arange(segments[-1].end) if layout.key_index is None else layout.key_index
    parts = []
    pairs = zip(pairwise(layout.queries.tolist()), pairwise(layout.keys.tolist()), strict=True)
    for (query_start, query_end), (key_start, key_end) in pairs:
        q, k, v = (
            query[:, :, query_start:query_end],
            key[:, :, index[key_start:key_end]],
            value[:, :, index[key_start:key_end]],
        )
        # causal from the last key backwards
        sees = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        parts.append((q @ k.transpose(2, 3) / 8**0.5).masked_fill(~sees, float("-inf")).softmax(-1) @ v)
    torch.testing.assert_close(torch.cat(parts, 2).transpose(1, 2), attend(query, key, value, layout))


def test_keys_are_not_copied_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a long beginning is shared by so many that its copies would fill the memory, blocks run one by one."""
    monkeypatch.setattr("job.model.packed_attention._varlen_kernel", lambda *_: "kernel")
    monkeypatch.setattr("job.model.packed_attention._block_by_block", lambda *_: "plain")
    monkeypatch.setattr("job.model.packed_attention._fits_kernel", lambda *_: True)
    for shared_by, way in ((10, "kernel"), (90, "plain")):
        segments = [Segment(0, 20), *(Segment(n, n + 1, 0, 20) for n in range(20, 20 + shared_by))]
        query = SimpleNamespace(is_cuda=True, dtype=torch.float16, shape=(1, 4, segments[-1].end, 64))
        layout = build_layout(segments, CPU)
        assert packed_attention(torch.nn.Module(), query, query, query, None, layout=layout)[0] == way  # type: ignore[arg-type]


@pytest.mark.parametrize(("capability", "fast"), [((6, 0), False), ((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_older_gpus_take_the_plain_way(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], *, fast: bool
) -> None:
    """The kernel is asked for only where it was built for: not on a P100 or T4, in half precision either."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _device: capability)
    monkeypatch.setattr("job.model.packed_attention._varlen_kernel", lambda *_: "kernel")
    monkeypatch.setattr("job.model.packed_attention._block_by_block", lambda *_: "plain")
    _has_kernel.cache_clear()
    query = SimpleNamespace(is_cuda=True, dtype=torch.float16, device=torch.device("cuda", 0), shape=(1, 4, 9, 64))
    (way, _weights) = packed_attention(torch.nn.Module(), query, query, query, None, layout=build_layout(ALONE, CPU))  # type: ignore[arg-type]
    _has_kernel.cache_clear()
    assert way == ("kernel" if fast else "plain")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel needs a GPU")
@MADE
@HEADS
def test_the_kernel_agrees_on_a_gpu(segments: list[Segment], heads: int, groups: int) -> None:
    """On a GPU, in bf16 and fp16, the kernel gives plain attention's values and gradients within rounding."""
    device = torch.device("cuda")
    for dtype in (torch.bfloat16, torch.float16):
        exact = [
            tensor.detach().to(dtype).double().requires_grad_()
            for tensor in rows(heads, groups, segments[-1].end, torch.float64)
        ]
        inputs = [tensor.detach().to(device, dtype).requires_grad_() for tensor in exact]
        plain, flat = eager(*exact, segments, 8**-0.5), attend(*inputs, build_layout(segments, device))
        torch.testing.assert_close(flat.cpu().double(), plain, rtol=2e-2, atol=2e-2)
        expected, found = torch.autograd.grad(plain.sum(), exact), torch.autograd.grad(flat.sum(), inputs)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.cpu().double(), other, rtol=5e-2, atol=5e-2)


def textbook(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Sequence[Segment],
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each segment alone behind its prefix, by the formula, with what else a layer may ask for."""
    shared_by = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared_by, dim=1), value.repeat_interleave(shared_by, dim=1)
    parts = []
    for s in segments:
        before = seen_before(segments, s)
        seen, first = [*before, *range(s.start, s.end)], len(before)
        scores = query[:, :, s.start : s.end] @ key[:, :, seen].transpose(2, 3) / query.shape[-1] ** 0.5
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        distance = torch.arange(first, len(seen))[:, None] - torch.arange(len(seen))
        scores = scores.masked_fill((distance < 0) | (distance >= (window or len(seen))), float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
        weights = scores.softmax(-1)
        parts.append((weights if sinks is None else weights[..., :-1]) @ value[:, :, seen])
    return torch.cat(parts, 2).transpose(1, 2)


@MADE
@pytest.mark.parametrize("window", [1, 3, 8, 100])
@pytest.mark.parametrize("others", [{}, {"softcap": 0.7}, {"sinks": True}, {"softcap": 2.0, "sinks": True}])
def test_windows_caps_and_sinks_are_honoured(segments: list[Segment], window: int, others: dict[str, Any]) -> None:
    """Values and gradients are the formula's; distances count over a prefix as if it stood right before."""
    inputs = rows(4, 2, segments[-1].end, torch.float64)
    asked = dict(others)
    if asked.pop("sinks", False):
        asked["sinks"] = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)
    expected = textbook(*inputs, segments, window=window, **asked)
    given = {"s_aux" if name == "sinks" else name: value for name, value in asked.items()}
    layout = build_layout(segments, CPU)
    found = packed_attention(torch.nn.Module(), *inputs, None, layout=layout, sliding_window=window, **given)[0]
    close = (
        {"rtol": 1e-5, "atol": 1e-5} if given else {"rtol": 1e-9, "atol": 1e-9}
    )  # a softmax in fp32, as models have it
    torch.testing.assert_close(found, expected, **close)
    for one, other in zip(
        torch.autograd.grad(found.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(one, other, **close)


def test_a_window_that_nothing_fills_changes_no_bit() -> None:
    """Mistral's 4,096 on shorter sequences: the same operations as without one."""
    inputs = rows(4, 2, SHARED[-1].end, torch.float32)
    layout = build_layout(SHARED, CPU)
    wide = packed_attention(torch.nn.Module(), *inputs, None, layout=layout, sliding_window=12)[0]
    assert torch.equal(wide, attend(*inputs, layout))


@pytest.mark.parametrize(
    "asked",
    [
        {"attention_mask": torch.ones(1, 1, 17, 17)},
        {"dropout": 0.1},
        {"is_causal": False},
        {"position_bias": torch.ones(1)},
        {"no_such_thing": 3},
        {"indices": torch.ones(1)},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_is_not_computed_is_refused(asked: dict[str, Any]) -> None:
    """Nothing that a layer hands over is dropped in silence."""
    inputs, mask = rows(4, 2, 17, torch.float32), asked.get("attention_mask")
    others = {name: value for name, value in asked.items() if name != "attention_mask"}
    with pytest.raises(Unpackable, match="requests"):
        packed_attention(torch.nn.Module(), *inputs, mask, layout=build_layout(ALONE, CPU), **others)


def test_values_may_be_narrower_than_keys() -> None:
    """As in latent attention."""
    query, key, _ = rows(4, 4, 17, torch.float64)
    value = torch.randn(1, 4, 17, 5, dtype=torch.float64)
    found = attend(query, key, value, build_layout(ALONE, CPU))
    torch.testing.assert_close(found, textbook(query, key, value, ALONE))


def test_the_kernel_is_flashs_whatever_torch_prefers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch 2.15 would take cuDNN's kernel in a CUDA graph, where queries and keys have the same offsets."""
    from torch.nn.attention import varlen

    allowed: list[tuple[bool, bool]] = []

    def kernel(query: torch.Tensor, *_: Any, enable_gqa: bool = True, **__: Any) -> torch.Tensor:
        assert enable_gqa
        allowed.append((torch._C._get_flash_sdp_enabled(), torch._C._get_cudnn_sdp_enabled()))
        return query

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    inputs = [torch.randn(1, 2, 4, 8) for _ in range(3)]
    _varlen_kernel(*inputs, build_layout([Segment(0, 4)], CPU), None, None)
    assert allowed == [(True, not hasattr(varlen, "_select_backend"))]


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=["plain", "soft cap"])
def test_the_output_lies_as_transformers_own_does(options: dict[str, float]) -> None:
    """Contiguous: AFMoE, JetMoE and others take a view of it."""
    found = packed_attention(
        torch.nn.Module(), *rows(4, 2, 17, torch.float32), None, layout=build_layout(ALONE, CPU), **options
    )[0]
    assert found.is_contiguous()


def test_the_kernels_gradients_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer gets the gradient in the memory order that it gave its queries in, so that no kernel has to copy it."""
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", lambda q, *_, **__: 2 * q)
    queries = torch.ones(1, 4, 2, 8, requires_grad=True)  # (1, tokens, heads, head size)
    contiguous: list[bool] = []
    queries.register_hook(lambda gradient: contiguous.append(gradient.is_contiguous()))
    inputs = [x.transpose(1, 2) for x in (queries, queries.detach(), queries.detach())]
    _varlen_kernel(*inputs, build_layout([Segment(0, 4)], CPU), None, None).sum().backward()
    assert contiguous == [True]
