"""Initial values of an adapter that are computed from the data or the unquantized base: once in a run, then stored.

So a restart before the first checkpoint begins with the same numbers. It could not compute them again: EVA's depend on
the machine in their last bits, and LoftQ's need the unquantized base, which a restart does not download.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from job import log
from job.data.batch_plan import Steps, micro_batches
from job.distributed.processes import Processes
from job.model.informed_init import init_eva, init_loftq
from job.model.lora import trainable
from job.model.packed_attention import is_packed
from job.model.placed_weights import taking_part
from job.records import Artifact, Example, FirstValues
from job.runs.attempt import Attempt, published_once
from job.runs.layout import FIRST_TENSORS, FIRST_VALUES
from job.stages.handoff import Sources
from job.training.packing import alone_inputs, packed_inputs

INFORMED = ("eva", "loftq")
"""Values of `JOB_LORA__INIT` that are computed here."""
EVA_TOKENS, EVA_BATCHES = 1024, 32
"""EVA reads the first sequences of the run, in this number of micro-batches of this many tokens. Fixed, since the
values must not depend on how a machine carries out training."""

NAME = "the adapter's first values"


def put_first_values(attempt: Attempt, init: str, sources: Sources, model: Any, steps: Steps) -> None:
    """Initializes a new adapter as `JOB_LORA__INIT` says; called in all processes, before layers are fused.

    Args:
        attempt: Where the values are published.
        init: `JOB_LORA__INIT`.
        sources: Sources of the run, with the folders of the base.
        model: The base with the adapter.
        steps: The run's batch plan.

    Raises:
        SettingsError: This adapter or base does not support these initial values.
        Preempted: The job was asked to stop.
    """
    if init in INFORMED:
        _put_informed(attempt, init, sources, model, steps)
    begin_alike(attempt.processes, model)


def begin_alike(processes: Processes, model: Any) -> None:
    """Gives the adapter in all processes the values of process 0, if those of any process differ.

    Every process computes them from the same seed and weights. PiSSA's and OLoRA's decompositions depend on the machine
    in their last bits, and gradients may be summed over the processes only if all have the same adapter.
    """
    parameters = [parameter.data for parameter in trainable(model).values()]
    digest = hashlib.sha256(b"".join(tensor.cpu().numpy().tobytes() for tensor in parameters)).hexdigest()
    if len(set(processes.gather("adapter's first values", digest))) == 1:
        return
    log.get_logger().warning("processes computed different initial adapters; that of process 0 is used")
    for parameter in parameters:
        value = parameter.cpu().clone()
        if not processes.leads:
            value.zero_()
        processes.all_reduce(value)
        parameter.copy_(value)


def _put_informed(attempt: Attempt, init: str, sources: Sources, model: Any, steps: Steps) -> None:
    """Copies the published values into the adapter; process 0 computes and publishes them if there are none."""
    from safetensors.torch import load_file

    processes = attempt.processes
    record = processes.broadcast(
        "first values that are known", lambda: published_once(attempt, FIRST_VALUES, FirstValues, NAME)
    )
    if not record:
        with taking_part(model):
            published = _publish(attempt, init, sources, model, steps) if processes.leads else ""
        record = processes.broadcast("first values", lambda: published)
    artifact = Artifact(**json.loads(record))
    path = processes.broadcast_on_machine("first values on this machine", lambda: str(attempt.fetch(artifact)))
    tensors = load_file(path)
    for name, parameter in trainable(model).items():
        parameter.data.copy_(tensors[name])


def _publish(attempt: Attempt, init: str, sources: Sources, model: Any, steps: Steps) -> str:
    """Computes, uploads and records them, in process 0."""
    from safetensors.torch import save_file

    log.get_logger().info(f"{NAME} are computed", init=init)
    if init == "eva":
        _init_by_eva(attempt, model, steps)
    else:
        init_loftq(model, sources.original or sources.folder, attempt.check_stop)
    path = attempt.work / FIRST_TENSORS
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: parameter.detach().contiguous() for name, parameter in trainable(model).items()}, path)
    artifact = attempt.publish(path, FIRST_TENSORS)
    attempt.write_record(FIRST_VALUES, json.dumps(asdict(FirstValues([artifact]))))
    return json.dumps(asdict(artifact))


def _init_by_eva(attempt: Attempt, model: Any, steps: Steps) -> None:
    """Gives the adapter EVA's values: the base computes the first sequences, packed if training packs them."""
    base = model.get_base_model()
    batches = eva_batches(steps, packed=is_packed(base))
    as_inputs: Callable[[list[Example]], dict[str, Any]] = (
        (lambda batch: packed_inputs(batch, model.device))
        if is_packed(base)
        else (lambda batch: alone_inputs(batch[0], model.device))
    )
    inputs = [as_inputs(batch) for batch in batches]

    def forward(number: int) -> None:
        attempt.check_stop()
        base(**{name: value for name, value in inputs[number].items() if name != "labels"}, use_cache=False)

    init_eva(model, [(batch_inputs["input_ids"], batch_inputs["labels"]) for batch_inputs in inputs], forward)


def eva_batches(steps: Steps, *, packed: bool) -> list[list[Example]]:
    """The first sequences of the run by its batch plan, in micro-batches; of one sequence each where none is packed."""
    batches = list[list[Example]]()
    for step in range(steps.total):
        sequences = [sequence for example in steps.of(step) for sequence in example.sequences]
        lengths = [len(sequence.input_ids) for sequence in sequences]
        groups = micro_batches(lengths, EVA_TOKENS) if packed else [[number] for number in range(len(sequences))]
        batches += [[sequences[number] for number in group] for group in groups]
        if len(batches) >= EVA_BATCHES:
            break
    return batches[:EVA_BATCHES]
