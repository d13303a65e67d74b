"""Generation in batches with a cache gives the same text as transformers' own for each prompt alone."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from functools import cache, partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MistralConfig
from transformers.cache_utils import DynamicLayer

from job.distributed.processes import ALONE
from job.errors import TrainingFailed
from job.evaluation import decoding
from job.evaluation.generation import GenerationOptions, generate
from job.evaluation.generation_batches import (
    BATCH_TOKENS,
    CACHE_BATCHES,
    _cache_tokens,
    _fitting_tokens,
    _warn_of_memory,
    _weight_bytes,
    plan_batches,
    token_bytes,
)
from job.evaluation.key_value_cache import RESERVED_TOKENS, ReservedLayer, new_cache
from job.evaluation.model_defaults import with_model_defaults
from job.evaluation.parallel_scoring import ParallelScoring
from job.evaluation.score_cache import ScoreCache
from job.evaluation.token_sampling import Draws, Sampling, _draw, choose_tokens
from job.model.fused import frozen_weights
from job.model.fused.frozen_weights import fuse_layers
from job.model.fused.kernels import TORCH
from job.model.load_base import PLAIN, load_base
from job.model.lora import trainable
from job.model.packed_attention import NAME, is_packed, use
from job.records import Answer
from job.storage.local import LocalStore
from job.training.flat_parameters import FlatParameters
from job.training.memory_model import cache_bytes
from job.training.setup_of_model import setup_of
from tests.helpers import fill_adapter, make_model
from tests.unit.evaluation.test_scorer import Helper, Peers

NEW = 8


def make_prompts(number: int) -> list[tuple[int, ...]]:
    """Random prompts of 2 to 40 tokens."""
    chance = random.Random(number)
    return [(0, *(chance.randrange(3, 400) for _ in range(chance.randint(1, 39)))) for _ in range(number)]


PROMPTS = make_prompts(6)


@cache
def model(folder: Path, quantization: str = "none") -> Any:
    """The tiny model with an adapter that says something."""
    return fill_adapter(make_model(folder, quantization=quantization)).eval()


def by_the_book(own: Any, tokenizer: Any, prompt: Sequence[int], most: int = NEW) -> str:
    """The answer to one prompt by transformers' own generation, with the model's own attention."""
    base = own.get_base_model()
    before = base.config._attn_implementation
    use(base, PLAIN)
    try:
        ids = torch.tensor([prompt])
        said = own.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False, use_cache=True
        )
    finally:
        use(base, before)
    return str(tokenizer.decode(said[0, len(prompt) :], skip_special_tokens=True))


@pytest.mark.parametrize("quantization", ["none", pytest.param("nf4", marks=pytest.mark.long)])
@pytest.mark.parametrize("side", ["base", "adapter"])
def test_answers_are_those_of_each_prompt_alone(
    base_folder: Path, tokenizer: Any, quantization: str, side: str
) -> None:
    """Padded, in batches and with a cache: each answer is that of transformers' own generation of the prompt alone."""
    own = model(base_folder, quantization)
    off = own.disable_adapter() if side == "base" else torch.no_grad()
    with off:
        expected = [by_the_book(own, tokenizer, prompt) for prompt in PROMPTS]
        found = generate(own, tokenizer, PROMPTS, max_new_tokens=NEW, batch_tokens=100)
    assert [answer.text for answer in found] == expected
    assert len(set(expected)) > len(expected) // 2, "the model says the same of everything"
    assert is_packed(own.get_base_model()), "afterwards it computes packed sequences again"


def test_the_fused_decoder_generates_too(base_folder: Path, tokenizer: Any) -> None:
    """With the job's own layers in place of PEFT's: the same answers, of the adapter and of the base."""
    own = fill_adapter(make_model(base_folder, quantization="nf4")).eval()
    expected = [by_the_book(own, tokenizer, prompt) for prompt in PROMPTS]
    assert fuse_layers(own, keep_dequantized=False, kernels=TORCH) == "all"
    assert [answer.text for answer in generate(own, tokenizer, PROMPTS, max_new_tokens=NEW)] == expected
    plain = model(base_folder, "nf4")
    with own.disable_adapter(), plain.disable_adapter():
        expected = [by_the_book(plain, tokenizer, prompt) for prompt in PROMPTS]
        assert [answer.text for answer in generate(own, tokenizer, PROMPTS, max_new_tokens=NEW)] == expected


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.7, top_k=20, seed=3)])
def test_a_model_that_cannot_be_packed_answers_one_prompt_at_a_time(
    base_folder: Path, tokenizer: Any, sampling: Sampling | None
) -> None:
    """The same answers as in batches, also of what is drawn at random."""
    own = fill_adapter(make_model(base_folder)).eval()
    how: dict[str, Any] = {"max_new_tokens": NEW, "sampling": sampling}
    texts = [answer.text for answer in generate(own, tokenizer, PROMPTS[:3], **how)]
    how["stop"] = [next(text[1] for text in texts if text[1:])]
    together = generate(own, tokenizer, PROMPTS, **how)
    own.get_base_model().generation_config.repetition_penalty = 5.0  # of the model's file: not applied in either way
    use(own.get_base_model(), PLAIN)
    assert generate(own, tokenizer, PROMPTS, **how) == together
    assert len({answer.ended_by for answer in together}) > 1
    use(own.get_base_model(), NAME)
    assert generate(own, tokenizer, PROMPTS, **how) == together


@pytest.mark.parametrize("fused", [False, True])
def test_a_batch_read_in_several_passes_says_the_same(
    base_folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, *, fused: bool
) -> None:
    """As on a GPU: the prompts are read in groups, then all get their tokens together, in a cache that grows."""
    own = fill_adapter(make_model(base_folder)).eval() if fused else model(base_folder)
    expected = [by_the_book(own, tokenizer, prompt) for prompt in PROMPTS]
    if fused:
        assert fuse_layers(own, keep_dequantized=False, kernels=TORCH) == "all"
    monkeypatch.setattr("job.evaluation.generation_batches._cache_tokens", lambda *_: 10_000)
    monkeypatch.setattr("job.evaluation.key_value_cache.RESERVED_TOKENS", 3)
    passes: list[tuple[int, ...]] = []

    def see(_module: Any, _args: Any, given: dict[str, Any]) -> None:
        passes.append(tuple(given["input_ids"].shape))

    hook = own.register_forward_pre_hook(see, with_kwargs=True)
    found = generate(own, tokenizer, PROMPTS, max_new_tokens=NEW, batch_tokens=45)
    hook.remove()
    assert [answer.text for answer in found] == expected
    reading = [shape for shape in passes if shape[1] > 1]
    assert len(reading) > 1
    assert sum(rows for rows, _ in reading) == len(PROMPTS)
    assert passes[len(reading)] == (len(PROMPTS), 1)


def test_a_batch_as_on_a_gpu_that_is_stopped_is_answered_again(
    base_folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while prompts are read or tokens drawn, the restart keeps the batches before, and gives equal bytes."""
    own = model(base_folder)
    monkeypatch.setattr("job.evaluation.generation_batches._cache_tokens", lambda *_: 150)
    how: dict[str, Any] = {"max_new_tokens": NEW, "batch_tokens": 45, "sampling": Sampling(seed=3)}
    batches = plan_batches([len(prompt) for prompt in PROMPTS], NEW, 45, cache_tokens=150)
    assert len(batches) < len(plan_batches([len(prompt) for prompt in PROMPTS], NEW, 45))
    expected = generate(own, tokenizer, PROMPTS, **how)
    for name, calls in {"reading": 2, "drawing": 14}.items():
        left = count(-calls)

        def stopping(left: Any = left, **_: Any) -> None:
            if next(left) >= 0:
                raise Stopped

        store = LocalStore(tmp_path / name)
        parts: list[int] = []

        def answer(*args: Any, check_stop: Any, parts: list[int] = parts) -> Any:
            parts.append(len(args[3]))
            return ParallelScoring(ALONE, check_stop).answer(*args)

        for check_stop_here in (stopping, lambda **_: None):
            how["cache"], how["answer"] = ScoreCache(store, "s", "one", {}), partial(answer, check_stop=check_stop_here)
            if check_stop_here is stopping:
                with pytest.raises(Stopped):
                    generate(own, tokenizer, PROMPTS, **how)
            else:
                assert generate(own, tokenizer, PROMPTS, **how) == expected
        assert parts == [len(batches), len(batches) - (name == "drawing")]


def test_the_cache_is_not_larger_than_its_batch() -> None:
    """No memory is allocated for tokens that an answer may not have; it grows by steps up to the most."""
    read = [DynamicLayer(), DynamicLayer()]
    for rows, layer in enumerate(read, start=1):
        layer.update(torch.ones(rows, 1, 4 + rows, 2), torch.ones(rows, 1, 4 + rows, 2))
    layer = ReservedLayer(read, 6, 6 + 3)
    assert [reserved.shape for reserved in layer._reserved] == [(3, 1, 9, 2)] * 2
    layer = ReservedLayer([layer], 6, 6 + RESERVED_TOKENS + 3)
    for _ in range(RESERVED_TOKENS + 3):
        keys, _ = layer.update(torch.ones(3, 1, 1, 2), torch.ones(3, 1, 1, 2))
    assert keys.shape[2] == layer._reserved[0].shape[2] == 6 + RESERVED_TOKENS + 3
    assert int(keys[0, 0, :, 0].sum()) == keys.shape[2] - 1, "zeros in front of the shorter prompt"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forecast_and_batches_count_what_a_cache_takes(base_folder: Path, dtype: torch.dtype) -> None:
    """A token's keys and values by the model's shape, and by the loaded model, take what a real cache takes."""
    own = make_model(base_folder, dtype=dtype)
    config = own.get_base_model().config
    assert config.num_key_value_heads < config.num_attention_heads, "queries are wider than keys"
    setup = setup_of(own, "none", "adamw_torch")
    assert setup is not None
    per_token = token_bytes(own)
    use(own.get_base_model(), PLAIN)
    cache = new_cache(own)
    with torch.no_grad():
        own(input_ids=torch.tensor([PROMPTS[0]] * 3), past_key_values=cache, use_cache=True)
    taken = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert per_token * 3 * len(PROMPTS[0]) == taken
    assert cache_bytes(setup, 3 * len(PROMPTS[0])) == taken


def test_a_gpus_cache_shrinks_with_the_tokens_of_a_pass(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sixteenth of all its memory at most; who lowers JOB_EVAL__BATCH_TOKENS, as the error says, needs less."""
    own = make_model(base_folder)
    base = own.get_base_model()
    assert _cache_tokens(own, BATCH_TOKENS) == 0, "of a CPU"
    monkeypatch.setattr(type(base), "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 0.5)
    properties = SimpleNamespace(total_memory=1 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    config = base.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * base.dtype.itemsize
    assert _cache_tokens(own, 2 * BATCH_TOKENS) == _cache_tokens(own, BATCH_TOKENS) == (1 << 25) // token
    assert _cache_tokens(own, BATCH_TOKENS // 4) == (1 << 23) // token
    use(base, PLAIN)
    assert _cache_tokens(own, BATCH_TOKENS) == 0, "it answers one prompt after the other"


def test_tokens_are_drawn_for_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens as for all rows together."""
    logits = torch.randn(70, 50, generator=torch.Generator().manual_seed(0))

    def chosen() -> list[int]:
        return choose_tokens(logits, [Draws(Sampling(seed=1), number) for number in range(70)])

    some = chosen()
    monkeypatch.setattr("job.evaluation.token_sampling._DRAWN_ROWS", 1000)
    assert chosen() == some


def test_processes_share_the_batches(base_folder: Path, tokenizer: Any) -> None:
    """Each of two answers its own half, and process 0 returns what one process alone would, also of what is drawn."""
    own = model(base_folder)
    how: dict[str, Any] = {"max_new_tokens": 4, "batch_tokens": 45, "sampling": Sampling(seed=3)}
    alone = generate(own, tokenizer, PROMPTS, **how)
    batches = plan_batches([len(prompt) for prompt in PROMPTS], 4, 45)
    first = Peers([])
    asked = GenerationOptions(4, sampling=how["sampling"])
    work = ParallelScoring(first, lambda **_: None).answer(own, tokenizer, PROMPTS, dict(enumerate(batches)), asked)
    assert next(work) == (0, [alone[prompt] for prompt in batches[0]])
    second = Helper(first.shared)
    ParallelScoring(second, lambda **_: None).help(own, tokenizer)
    assert [number for number, _ in second.sent] == [*range(1, len(batches), 2)]
    both = Peers(second.sent)
    assert generate(own, tokenizer, PROMPTS, **how, answer=ParallelScoring(both, lambda **_: None).answer) == alone


class Stopped(Exception):
    """As Preempted, in the place where the stop flag is looked at."""


@pytest.mark.parametrize("attention", [NAME, PLAIN])
def test_a_request_to_stop_ends_a_batch_at_the_next_token(
    base_folder: Path, tokenizer: Any, tmp_path: Path, attention: str
) -> None:
    """It loses the batch that is being answered and no other; the restart computes these again, with the same bytes."""
    own = fill_adapter(make_model(base_folder)).eval()
    use(own.get_base_model(), attention)
    how: dict[str, Any] = {"max_new_tokens": NEW, "batch_tokens": 45}
    batches = plan_batches([len(prompt) for prompt in PROMPTS], NEW, 45)
    looks: list[str] = []

    def stopping(at: int) -> ParallelScoring:
        looks.clear()

        def check_stop(**_: Any) -> None:
            looks.append("look")
            if len(looks) == at:
                raise Stopped

        return ParallelScoring(ALONE, check_stop)

    expected = generate(own, tokenizer, PROMPTS, **how, answer=stopping(0).answer)
    assert len(looks) >= sum(max(expected[prompt].tokens for prompt in batch) for batch in batches)
    store = LocalStore(tmp_path)
    with pytest.raises(Stopped):
        generate(own, tokenizer, PROMPTS, **how, cache=ScoreCache(store, "s", "one", {}), answer=stopping(20).answer)
    assert len(looks) == 20, "nothing is computed after it"
    (kept,) = (store.read(info.key) for info in store.list("s/"))
    assert kept is not None
    done = len(kept.data.splitlines())
    assert 0 < done < len(batches)
    again: list[int] = []

    def answer(*args: Any) -> Any:
        again.extend(args[3])
        return ParallelScoring(ALONE, lambda **_: None).answer(*args)

    assert generate(own, tokenizer, PROMPTS, **how, cache=ScoreCache(store, "s", "one", {}), answer=answer) == expected
    assert again == list(range(done, len(batches)))
    assert own.get_base_model().config._attn_implementation == attention, "the model is as it was before"


def test_a_recurrent_model_generates(tmp_path: Path, tokenizer: Any) -> None:
    """Mamba, whose cache is of its own kind, gives the answers of its own generation."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=1)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    how: dict[str, Any] = {"quantization": "none", "double_quantization": False, "dtype": torch.float32}
    own = load_base(tmp_path, **how, device=torch.device("cpu"), max_length=64, targets=["in_proj"])
    use(own, PLAIN)
    found = generate(own, tokenizer, PROMPTS[:3], max_new_tokens=5)
    for prompt, answer in zip(PROMPTS, found, strict=False):
        said = own.generate(input_ids=torch.tensor([prompt]), max_new_tokens=5, do_sample=False, use_cache=True)
        assert answer.text == tokenizer.decode(said[0, len(prompt) :], skip_special_tokens=True)


class Scripted:
    """A model that says given tokens whatever it is asked, so that the end of an answer can be tested by the token."""

    def __init__(self, tokenizer: Any, text: str, ends: Any = 1) -> None:
        self.said = tokenizer.encode(text, add_special_tokens=False)
        self.device = torch.device("cpu")
        self.config = MistralConfig(num_hidden_layers=1, eos_token_id=ends, attn_implementation=NAME)
        self.steps = count()

    def eval(self) -> None:
        """It has no modes."""

    def set_attn_implementation(self, _: str) -> None:
        """Nor attention."""

    def __call__(self, **_: Any) -> Any:
        """Logits of the next token."""
        logits = torch.zeros(1, 1, 400)
        logits[0, 0, [*self.said, 5][next(self.steps)]] = 9.0
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize(
    ("said", "stop", "expected"),
    [
        ("it is one</s>them", (), Answer("it is one", 0, "eos")),
        ("it is 7\n\nthem", ("\n\n",), Answer("it is 7", 0, "stop")),
        ("it is 7\n\nthem", ("",), Answer("it is 7\n\nthem", 0, "length")),
        ("it is 7 Question: of", ("Question:", "is"), Answer("it ", 0, "stop")),
        ("it is 7<pad>Question", ("<pad>",), Answer("it is 7", 0, "stop")),
        ("Stop", ("Stop",), Answer("", 0, "stop")),
        ("é über ünd", ("ü",), Answer("é ", 0, "stop")),
    ],
)
def test_an_answer_ends_as_lm_eval_has_it(tokenizer: Any, said: str, stop: tuple[str, ...], expected: Answer) -> None:
    """At the first end-of-sequence token, stop text (also if that is a special token) or at the most tokens."""
    scripted = Scripted(tokenizer, said)
    most = len(scripted.said)
    (answer,) = generate(scripted, tokenizer, [(5, 6)], max_new_tokens=most, stop=stop)
    assert (answer.text, answer.ended_by) == (expected.text, expected.ended_by)
    assert 0 < answer.tokens <= most


def test_a_second_end_of_config_json_ends_an_answer(tokenizer: Any) -> None:
    """Chat models end a turn by another token than a text; config.json names both."""
    scripted = Scripted(tokenizer, "it<pad>is", ends=[1, 2])
    (answer,) = generate(scripted, tokenizer, [(5,)], max_new_tokens=9)
    assert (answer.text, answer.ended_by) == ("it", "eos")


def test_the_models_own_ends_count_and_its_penalties_are_named(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A turn may end by a token that only generation_config.json names; what it asks for beyond that is logged once."""
    how = GenerationOptions(9)
    scripted = Scripted(tokenizer, "it<pad>is", ends=[tokenizer.eos_token_id, 5])
    assert with_model_defaults(how, tmp_path, scripted, tokenizer).ends == tuple(sorted({5, tokenizer.eos_token_id}))
    scripted = Scripted(tokenizer, "it<pad>is", ends=[1])
    config = {"eos_token_id": [2, 7], "repetition_penalty": 1.1, "suppress_tokens": [], "min_length": 0, "top_k": 50}
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "generation_config.json").write_text(json.dumps(config))
    found, again = (with_model_defaults(how, folder, scripted, tokenizer) for _ in range(2))
    assert found == again == GenerationOptions(9, ends=tuple(sorted({1, 2, 7, tokenizer.eos_token_id})))
    logged = "".join(capsys.readouterr())
    assert logged.count("is not applied") == 1
    assert "repetition_penalty" in logged
    assert "top_k" not in logged
    (answer,) = generate(scripted, tokenizer, [(5,)], max_new_tokens=9, ends=found.ends)
    assert (answer.text, answer.ended_by) == ("it", "eos")


def test_numbers_that_are_not_finite_are_no_answer(base_folder: Path, tokenizer: Any) -> None:
    """A model that diverged is an error: the largest of NaN would be some token."""
    own = make_model(base_folder)
    with torch.no_grad():
        next(p for p in own.parameters() if p.requires_grad).fill_(math.nan)
    with pytest.raises(TrainingFailed, match="not finite"):
        generate(own, tokenizer, PROMPTS[:2], max_new_tokens=4)


@given(st.lists(st.integers(1, 500), max_size=60), st.integers(1, 300), st.integers(1, 2000))
def test_batches_hold_every_prompt_once_within_the_budget(lengths: list[int], new: int, budget: int) -> None:
    """Each prompt is in one batch; no batch of several has more tokens than allowed, longest prompts come first."""
    batches = plan_batches(lengths, new, budget)
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[number] for number in batch)
        if len(batch) > 1:
            assert len(batch) * longest <= budget
            assert len(batch) * (longest + new) <= CACHE_BATCHES * budget
    order = [lengths[number] for batch in batches for number in batch]
    assert order == sorted(order, reverse=True)


def test_larger_batches_stay_within_the_cache_and_leave_each_process_one() -> None:
    """Of a GPU with memory for them; the usual ones where those are larger."""
    lengths = [100] * 48
    assert list(map(len, plan_batches(lengths, 100, 1000))) == [10, 10, 10, 10, 8]
    assert list(map(len, plan_batches(lengths, 100, 1000, cache_tokens=10**6))) == [48]
    assert list(map(len, plan_batches(lengths, 100, 1000, cache_tokens=6400))) == [32, 16]
    assert list(map(len, plan_batches(lengths, 100, 1000, cache_tokens=1000))) == [10, 10, 10, 10, 8]
    assert set(map(len, plan_batches(lengths, 100, 1000, cache_tokens=600))) == {6}, "of less memory than a pass fills"
    assert set(map(len, plan_batches(lengths, 100, 1000, cache_tokens=100))) == {1}
    assert list(map(len, plan_batches(lengths, 100, 1000, cache_tokens=10**6, processes=3))) == [16, 16, 16]
    assert max(map(len, plan_batches([1] * 600, 100, 10, cache_tokens=10**6))) == 256


def test_what_is_drawn_follows_the_softmax() -> None:
    """Tokens are drawn as often as the softmax has it, cut by top_k and top_p as transformers has it."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.tensor([[0.5, 2.0, -1.0, 1.5, 0.0]])
    drawn = (torch.arange(20_000, dtype=torch.float64)[:, None] + 0.5) / 20_000
    cuts: list[dict[str, Any]] = [{}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 4, "top_p": 0.9}]
    for sampling in (Sampling(temperature=0.8, **cut) for cut in cuts):
        scores = TemperatureLogitsWarper(sampling.temperature)(None, logits)
        scores = TopKLogitsWarper(sampling.top_k)(None, scores) if sampling.top_k else scores
        scores = TopPLogitsWarper(sampling.top_p)(None, scores) if sampling.top_p < 1 else scores
        found = Counter(_draw(logits.expand(len(drawn), -1), sampling, drawn).tolist())
        shares = [found[token] / len(drawn) for token in range(5)]
        assert shares == pytest.approx(scores.softmax(-1)[0].tolist(), abs=2e-4)


def test_batches_fit_beside_the_weights() -> None:
    """Where a GPU's memory is nearly full, fewer prompts are answered at a time; one is always tried."""
    lengths = [50] * 48
    whole = {"cache_tokens": 10**6}
    assert list(map(len, plan_batches(lengths, 50, 1000, fitting_tokens=1600, **whole))) == [16, 16, 16]
    assert list(map(len, plan_batches(lengths, 50, 1000, fitting_tokens=800))) == [8] * 6
    assert set(map(len, plan_batches(lengths, 50, 1000, fitting_tokens=0))) == {1}
    assert plan_batches(lengths, 50, 1000, fitting_tokens=10**6, **whole) == plan_batches(lengths, 50, 1000, **whole)


def test_what_fits_beside_the_weights_is_no_matter_of_what_is_free(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted from the GPU's total and the weights: the same after training, which lays the adapter out anew."""
    own = make_model(base_folder)
    assert _fitting_tokens(own, 100) is None, "of a CPU"
    held = _weight_bytes(own)
    assert held == sum(p.nbytes for p in {p.data_ptr(): p for p in (*own.parameters(), *own.buffers())}.values())
    FlatParameters(trainable(own).values(), 64)
    assert _weight_bytes(own) == held
    config, width = own.config, own.get_base_model().dtype.itemsize
    token = 2 * config.head_dim * width * (config.num_hidden_layers * config.num_key_value_heads)
    token += 2 * config.head_dim * width * config.num_attention_heads
    forward = 100 * 4 * (config.intermediate_size + config.hidden_size) * width
    monkeypatch.setattr("job.evaluation.generation_batches._weight_bytes", lambda _: held)  # all tensors are on the CPU
    monkeypatch.setattr(type(own.get_base_model()), "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 0.5)
    total = 2 * (600 * 2**20 + held + forward + 1000 * token)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=total))
    assert _fitting_tokens(own, 100) == 900
    with structlog.testing.capture_logs() as logs:
        _warn_of_memory(own, 800, 100, 900)
        _warn_of_memory(own, 801, 100, 900)
    assert [(log["tokens"], log["tokens_that_fit"]) for log in logs] == [(901, 900)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=1000))
    assert _fitting_tokens(own, 100) == 0


@pytest.mark.parametrize("kept", [False, True])
def test_memory_that_runs_out_among_answers_is_given_up_or_named(
    base_folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, *, kept: bool
) -> None:
    """Kept weights make room for the batch, with the same bits, and are kept again; without them it is an error.

    The error says how much the cache takes and which settings to lower, with the exit code of a lack of memory.
    """
    own = fill_adapter(make_model(base_folder, quantization="nf4")).eval()
    assert fuse_layers(own, keep_dequantized=kept, kernels=TORCH) == "all"
    how: dict[str, Any] = {"max_new_tokens": NEW, "batch_tokens": 45, "sampling": Sampling(seed=2)}
    expected = generate(own, tokenizer, PROMPTS, **how)
    passes, keeps = list[int](), list[bool]()

    def full(*given: Any) -> torch.Tensor:
        keeps.append(any(one.keeps for one in frozen_weights._kept(own)))
        passes.append(len(passes))
        if len(passes) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return whole(*given)

    whole = decoding._pass
    monkeypatch.setattr(decoding, "_pass", full)
    if kept:
        assert generate(own, tokenizer, PROMPTS, **how) == expected
        assert keeps[:4] == [True, True, True, False]
        assert keeps[-1]
        return
    rows = len(plan_batches([len(prompt) for prompt in PROMPTS], NEW, 45)[0])
    words = (
        rf"^GPU memory ran out while {rows} prompts? of at most \d+ tokens got up to 8 more each, for which the cache "
    )
    with pytest.raises(TrainingFailed, match=words) as raised:
        generate(own, tokenizer, PROMPTS, **how)
    assert raised.value.exit_code == 70
    assert "JOB_EVAL__PROMPTS_MAX_NEW_TOKENS" in str(raised.value)
    assert "more)" not in str(raised.value)


def test_main_memory_that_runs_out_among_answers_is_no_bug(
    base_folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's own error, as on a CPU; another error of the model stays what it is."""
    own = model(base_folder)

    def raising(error: Exception) -> None:
        def fail(*_: Any) -> None:
            raise error

        monkeypatch.setattr(decoding, "_pass", fail)

    raising(MemoryError())
    with pytest.raises(TrainingFailed, match="the machine's memory ran out while"):
        generate(own, tokenizer, PROMPTS, max_new_tokens=NEW)
    raising(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        generate(own, tokenizer, PROMPTS, max_new_tokens=NEW)
