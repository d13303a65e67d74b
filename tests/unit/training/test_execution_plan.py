"""How a GPU's memory is used: the fastest plan that fits; settings take precedence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.errors import SettingsError
from job.model.architecture import Architecture
from job.records import PEFT, ExecutionPlan
from job.training.execution_plan import (
    BUDGETS,
    GIB,
    choose_budget,
    choose_long_rows,
    choose_placement,
    choose_plan,
    kept_activation_bytes,
    why_not_recorded,
)
from job.training.memory_check import Sharing, refuse_rows
from job.training.memory_model import LONG_ROW, PLACEMENTS, Setup, long_row_bytes, training_memory, usable_bytes
from job.training.sequence_parallel import least_memory, row_host_bytes, row_memory, tokens_alone

MISTRAL_7B = Architecture(4096, 14336, 32, 32, 8, 128, 32000)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SETUP = Setup(
    MISTRAL_7B, 16, TARGETS, "nf4", double_quantization=True, value_bytes=2, optimizer="adamw_8bit", recompute=True
)


def chosen(
    free_gib: float, tokens: int = 4096, *, keep_base: bool | None = None, keep_activations: bool | None = None
) -> ExecutionPlan:
    """What is chosen for Mistral-7B with so much free memory."""
    return choose_plan(
        SETUP,
        free_bytes=int(free_gib * GIB),
        sequence_tokens=tokens,
        keep_base=keep_base,
        keep_activations=keep_activations,
        recorded=True,
    )


@pytest.mark.parametrize(
    ("free_gib", "kept"), [(74, (True, True)), (34, (False, True)), (22, (True, False)), (3, (False, False))]
)
def test_the_fastest_way_that_fits(free_gib: float, kept: tuple[bool, bool]) -> None:
    """Both are kept where both fit; then the activations alone, the base alone, and at last neither."""
    found = chosen(free_gib)
    assert (found.kept_base, found.kept_activations) == kept
    assert f"{free_gib:.1f} GiB that are free" in found.reason


@given(st.floats(0, 200), st.tuples(*[st.sampled_from([None, True, False])] * 2))
def test_what_is_set_holds(free: float, given_: tuple[bool | None, bool | None]) -> None:
    """Whatever the memory, a setting is not overruled."""
    base, kept = given_
    found = chosen(free, keep_base=base, keep_activations=kept)
    assert base in {None, found.kept_base}
    assert kept in {None, found.kept_activations}
    assert ("as set" in found.reason) == (base is not None or kept is not None)


@given(st.floats(0, 200), st.floats(0, 200), st.integers(128, 16384))
def test_more_memory_is_never_slower(one: float, other: float, row: int) -> None:
    """Of two machines the one with more free memory keeps at least as much of what saves the most time."""
    less, more = (chosen(free, row) for free in sorted((one, other)))
    speed = {(True, True): 3, (False, True): 2, (True, False): 1, (False, False): 0}
    assert speed[less.kept_base, less.kept_activations] <= speed[more.kept_base, more.kept_activations]


def test_nothing_is_kept_of_a_base_that_is_not_quantized() -> None:
    """Its weights are in use as they lie: there is nothing to give up later either."""
    setup = replace(SETUP, quantization="none")
    found = choose_plan(
        setup, free_bytes=200 * GIB, sequence_tokens=4096, keep_base=None, keep_activations=None, recorded=True
    )
    assert (found.kept_base, found.kept_activations) == (False, True)


def test_a_decoder_that_is_not_fused_throughout_keeps_more() -> None:
    """Between its layers runs transformers' own code, which leaves more activations."""
    kept = [
        choose_plan(
            SETUP, free_bytes=26 * GIB, sequence_tokens=4096, keep_base=False, keep_activations=None, recorded=recorded
        ).kept_activations
        for recorded in (True, False)
    ]
    assert kept == [True, False]


def test_the_formula_against_a_measured_run() -> None:
    """An H100, Mistral-7B's shape, 3,722 tokens a row: a peak of 36.15 GiB with 4.03 GiB of weights, all kept."""
    kept = kept_activation_bytes(SETUP, 3722) + 2 * MISTRAL_7B.linear_parameters
    assert 0.75 < kept / GIB / (36.15 - 4.03) < 1


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_the_budget_depends_on_the_size_alone(one: int, other: int) -> None:
    """A larger GPU never has a smaller budget."""
    less, more = sorted((one, other))
    assert choose_budget(less) <= choose_budget(more)
    assert {choose_budget(one), choose_budget(other)} <= {budget for _, budget in BUDGETS}


def test_what_is_given_up_is_gone_and_the_rest_stays() -> None:
    """In the order of `droppable`; the plan it was stays as it is, and what is not there cannot be given up again."""
    plan = ExecutionPlan(
        kept_base=True, kept_activations=True, recorded=True, reason="a test", forward="fused all, triton"
    )
    assert plan.droppable == ("kept_base", "kept_activations", "recorded")
    less = plan.give_up("kept_base")
    assert less == replace(plan, kept_base=False)
    assert plan.kept_base
    assert less.droppable == ("kept_activations", "recorded")
    with pytest.raises(ValueError, match="kept_base is not among"):
        less.give_up("kept_base")
    with pytest.raises(ValueError, match="reason is not among"):
        less.give_up("reason")


def test_sequences_stay_padded_when_the_graphs_are_given_up() -> None:
    """Other lengths would change the last bits, which giving something up must not."""
    plan = ExecutionPlan(
        kept_base=False, kept_activations=False, recorded=True, reason="a test", forward="fused all, triton"
    )
    assert plan.give_up("recorded").padded
    assert not replace(plan, forward="fused layers, triton").padded


def test_peft_has_nothing_to_give_up() -> None:
    """What PEFT's own layers keep is as it was set: only the budget shrinks."""
    plan = ExecutionPlan(kept_base=False, kept_activations=True, recorded=False, reason="a test", forward=PEFT)
    assert plan.droppable == ()
    assert not plan.fused
    assert not plan.padded


def test_a_record_of_an_older_version_was_fused() -> None:
    """It has no `forward`, and was only written where fused layers computed."""
    assert ExecutionPlan(kept_base=True, kept_activations=True, recorded=True, reason="needs 9 of 12 GiB").fused


def chosen_for_a_row(
    free_gib: float, tokens: int, host_gib: float = 1000, *, offload: bool | None = None
) -> ExecutionPlan:
    """What is chosen for a long row."""
    return choose_long_rows(
        chosen(free_gib, 0, keep_base=False, keep_activations=False),
        SETUP,
        tokens=tokens,
        free_bytes=int(free_gib * GIB),
        host_bytes=int(host_gib * GIB),
        offload=offload,
        copies=132,
        tile=8192,
    )


@pytest.mark.parametrize(
    ("free_gib", "tokens", "host_gib", "expected"),
    [
        (130, 64_000, 100, (False, True)),
        (40, 64_000, 100, (True, True)),
        (40, 64_000, 40, (False, False)),
        (18, 78_500, 60, (True, False)),
        (70, 343_000, 150, (True, False)),
        (70, 343_000, 400, (True, True)),
    ],
)
def test_where_the_activations_of_a_long_row_wait(
    free_gib: float, tokens: int, host_gib: float, expected: tuple[bool, bool]
) -> None:
    """Attention's output is kept where it can be, on the GPU before main memory; at last the inputs alone, there."""
    found = chosen_for_a_row(free_gib, tokens, host_gib)
    assert (found.offloaded, found.kept_attention) == expected
    assert found.tile_tokens == 8192
    assert f"rows of up to {tokens:,} tokens need" in found.reason


def test_offloading_is_taken_up_first() -> None:
    """When memory runs out: it costs the least time. Not where it is forbidden, and not twice."""
    plan = replace(chosen_for_a_row(130, 64_000), kept_base=True, forward="fused all, triton")
    assert plan.droppable[:2] == ("on_gpu", "kept_base")
    assert plan.give_up("on_gpu").offloaded
    assert "on_gpu" not in plan.give_up("on_gpu").droppable
    assert plan.droppable[-1] == "kept_attention"
    assert "on_gpu" not in chosen_for_a_row(130, 64_000, offload=False).droppable


def refused(free_gib: float, tokens: int, host_gib: float = 1000, **how: object) -> str:
    """What is said of a row; empty if it is not refused."""
    options = {"offload": None, "copies": 132, **how}
    try:
        refuse_rows(SETUP, tokens, free_bytes=int(free_gib * GIB), host_bytes=int(host_gib * GIB), **options)
    except SettingsError as error:
        return str(error)
    return ""


def test_only_what_is_certain_is_refused() -> None:
    """What is planned to fit is not refused; of what is refused, the number of tokens that fit fits."""
    assert not refused(70, 343_000)
    assert not refused(70, 200_000)
    text = refused(70, 1_000_000)
    assert text.startswith("JOB_TRAIN__MAX_LENGTH: the longest row has 1,000,000 tokens")
    fits = int(text.split("about ")[1].split(" tokens")[0].replace(",", ""))
    assert not refused(70, fits)
    assert refused(70, fits + 1)
    assert "main memory" not in text
    assert "the machine's memory" in refused(70, 343_000, host_gib=50)
    assert "JOB_TRAIN__OFFLOAD_ACTIVATIONS=auto" in refused(70, 343_000, offload=False)
    assert "JOB_TRAIN__OFFLOAD_ACTIVATIONS=auto" in refused(120, 200_000, host_gib=10, offload=True)
    whole = refused(70, 343_000, copies=None)
    assert "OFFLOAD" not in whole
    assert whole


def test_a_row_that_more_gpus_could_compute() -> None:
    """The refusal says how many, or what keeps those that there are from it; one that is divided has its own limit."""
    assert ", or use 2 such GPUs, which compute it together" in refused(40, 343_000)
    assert "use 2" not in refused(40, 343_000, sharing=Sharing(processes=2))
    assert not refused(40, 300_000, sharing=Sharing(processes=2))
    assert "JOB_TRAIN__SEQUENCE_PARALLEL=auto: the 4 GPUs" in refused(40, 343_000, sharing=Sharing(may_divide=4))
    assert "cannot compute it together: because" in refused(40, 343_000, sharing=Sharing(never="because"))
    assert "GPUs" not in refused(40, 343_000, copies=None)
    assert "GPUs" not in refused(1, 343_000)
    text = refused(40, 900_000, sharing=Sharing(processes=2))
    assert "has 900,000 tokens and is divided over 2 GPUs; these take at least" in text
    fits = int(text.split("about ")[1].split(" tokens")[0].replace(",", ""))
    assert not refused(40, fits, sharing=Sharing(processes=2))
    assert refused(40, fits + 1, sharing=Sharing(processes=2))


def test_the_way_of_rows_that_are_divided() -> None:
    """The longest row of all counts, divided or not; the reason says over how many."""
    how: dict[str, Any] = {
        "free_bytes": 45 * GIB,
        "host_bytes": 400 * GIB,
        "offload": None,
        "copies": 132,
        "tile": 8192,
    }
    plan = chosen(45, 0, keep_base=False, keep_activations=False)
    alone = choose_long_rows(plan, SETUP, tokens=200_000, **how)
    divided = choose_long_rows(plan, SETUP, tokens=0, divided=(200_000, 4), **how)
    both = choose_long_rows(plan, SETUP, tokens=100_000, divided=(200_000, 4), **how)
    assert "over which the longest are divided" not in alone.reason
    for one in (divided, both):
        assert "on each of 4 GPUs, over which the longest are divided" in one.reason
    needs = [one.reason.split("tokens need ")[1].split(" of ")[0] for one in (alone, divided, both)]
    assert float(needs[1]) <= float(needs[2]) <= float(needs[0])


@given(memory=st.integers(10, 200), host=st.integers(0, 300), offload=st.sampled_from([None, True, False]))
def test_the_longest_row_of_one_process(*, memory: int, host: int, offload: bool | None) -> None:
    """It is the longest that fits, by the memory there is in all; a divided one takes less of it."""
    how: dict[str, Any] = {"memory_bytes": memory * GIB, "host_bytes": host * GIB, "offload": offload}
    found = tokens_alone(SETUP, 400_000, **how)
    assert LONG_ROW <= found <= 400_000
    assert tokens_alone(SETUP, 50_000, **how) == min(found, 50_000)
    usable = usable_bytes(memory * GIB)

    def fits(tokens: int, *, offloaded: bool) -> bool:
        if offload not in {None, offloaded}:
            return False
        in_host = row_host_bytes(SETUP, tokens, kept_attention=False) <= host * GIB
        return row_memory(SETUP, tokens, offload=offloaded).total <= usable and (in_host or not offloaded)

    longer = [fits(found + 1, offloaded=offloaded) for offloaded in (True, False)]
    assert found == 400_000 or not any(longer)
    assert found == LONG_ROW or any(fits(found, offloaded=offloaded) for offloaded in (True, False))
    for over in (2, 8):
        assert row_memory(SETUP, 100_000, over).total < row_memory(SETUP, 100_000).total
        assert least_memory(SETUP, 100_000, over) == row_memory(SETUP, 100_000, over)


@given(
    one=st.integers(1, 500_000), other=st.integers(1, 500_000), offloaded=st.booleans(), kept_attention=st.booleans()
)
def test_a_longer_row_takes_more(*, one: int, other: int, offloaded: bool, kept_attention: bool) -> None:
    """Which the search for what fits relies on; offloading takes less of the GPU's memory, keeping attention more."""
    how = {"offloaded": offloaded, "kept_attention": kept_attention, "copies": 132}
    less, more = (long_row_bytes(SETUP, tokens, **how) for tokens in sorted((one, other)))
    assert less <= more
    assert long_row_bytes(SETUP, one, **how | {"offloaded": True}) <= long_row_bytes(SETUP, one, **how)


def test_the_first_place_in_which_all_fits() -> None:
    """By memory the base goes from the GPU to all GPUs together and to main memory; the last is taken at any rate."""

    def place(gib: float, *places: str, processes: int = 2) -> str:
        setup = replace(SETUP, processes=processes)

        def needs(there: Setup) -> int:
            return training_memory(there, 4096).total

        return choose_placement(setup, memory_bytes=int(gib * GIB), placements=places or PLACEMENTS, needs=needs)

    assert [place(gib) for gib in (24, 8, 7, 1)] == ["gpu", "gpu", "sharded", "host"]
    assert place(7, processes=1) == "host"  # a share of one is all of it
    assert place(6, "gpu") == place(24, "gpu") == "gpu"


def test_a_mixture_is_recorded_where_its_products_need_no_host() -> None:
    """In bf16 on Hopper and Blackwell; torch has no kernel of grouped products elsewhere. Others are recorded."""
    mixture = replace(SETUP, architecture=replace(MISTRAL_7B, experts=8, chosen=2))
    assert why_not_recorded(mixture, (9, 0)) is None
    assert why_not_recorded(mixture, (10, 0)) is None
    for capability, half in (((8, 0), "bfloat16"), ((12, 0), "bfloat16"), ((9, 0), "float16")):
        assert f"on the host in {half}" in str(why_not_recorded(mixture, capability, half=half))
        assert why_not_recorded(SETUP, capability, half=half) is None


@pytest.mark.parametrize("place", ["sharded", "host"])
def test_a_base_elsewhere_is_neither_kept_nor_recorded(place: str) -> None:
    """Whatever the memory: its addresses hold other layers from time to time. The reason says where it is."""
    setup = replace(SETUP, placement=place, processes=2)
    how: dict[str, Any] = {"sequence_tokens": 4096, "keep_base": None, "recorded": True}
    found = choose_plan(setup, free_bytes=200 * GIB, keep_activations=None, **how)
    assert (found.base_held, found.kept_base, found.kept_activations, found.recorded) == (place, False, True, False)
    assert {"sharded": "sharded over", "host": "in main memory"}[place] in found.reason
    assert not choose_plan(setup, free_bytes=4 * GIB, keep_activations=None, **how).kept_activations
