"""The optimizers a run can choose: one table, from which settings, trainer, checkpoints and memory estimates read.

To add one:
1. Add an entry to `OPTIMIZERS`. Its key is the value of `JOB_TRAIN__OPTIMIZER`, and a name that transformers'
   `TrainingArguments.optim` knows: the class and its betas come from there. Else it is `own`, as muon is, and
   `training.trainer` makes it, in `create_optimizer`.
2. List in `state` every tensor that its `state_dict()` holds for a parameter. A checkpoint with any other tensor, shape
   or dtype is refused, because the optimizers' kernels take sizes from the parameter and addresses from the state.
3. Give the devices on which it runs, and the optimizer that replaces it on others.
`tests/unit/common/test_optimizers.py` covers each entry: it steps the real optimizer and compares.

No torch: the choices are among the settings, which must answer before torch is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

LEVELS = 256
"""Numbers in the map by which an 8-bit state is quantized: one for each value of a byte."""
HIGHEST_RATE = 0.1
"""Highest learning rate that nothing is said about.

The rate is about the most by which a step changes a number of the adapter: with Adam (Kingma & Ba 2015, section 2.1),
with Lion, whose steps are signs, and with Muon, whose steps are scaled to the size of AdamW's; AdEMAMix adds a second
average, which may change it by several times as much. The initial numbers of LoRA's A are at most 1 / sqrt(in), such as
0.016 for 4,096 inputs.
"""
_BYTES = {"torch.uint8": 1, "torch.float32": 4}

Shape = Literal["parameter", "parameter_pair", "blocks", "block_pair", "levels", "scalar"]


@dataclass(frozen=True)
class StateTensor:
    """One tensor of an optimizer's state for a parameter of n numbers.

    `shape`: `parameter` (the parameter's own), `blocks` (ceil(n / block),), `levels` (256,), or `scalar` ();
    `parameter_pair` and `block_pair` are two of them in one tensor, (2, ...).
    `dtypes`: what it may be; the first is what a large parameter has.
    """

    shape: Shape
    dtypes: tuple[str, ...] = ("torch.float32",)


@dataclass(frozen=True)
class OptimizerSpec:
    """The properties of an optimizer that the job needs.

    `state` maps the last part of a tensor's name in `state_dict()` to what it is. `block` is how many neighbouring
    numbers of a parameter share one quantization constant; the adapter's tensors are laid out so that none of these
    blocks reaches over two of them (see `training/flat_parameters.py`). `on_cpu` replaces it where there is no GPU.
    """

    state: Mapping[str, StateTensor]
    block: int = 256
    devices: tuple[str, ...] = ("cuda", "cpu")
    on_cpu: str | None = None
    own: bool = False
    """Whether the job makes it, in `training/trainer.py`, because transformers has no name for it."""
    paged: bool = False
    """Whether its state is in memory that the driver moves between GPU and host."""

    @property
    def bytes_per_parameter(self) -> int:
        """Bytes of the tensors that are as large as the parameter, for each of its numbers."""
        return self._bytes({"parameter": 1, "parameter_pair": 2})

    def state_bytes(self, parameters: int) -> int:
        """Bytes of the state of `parameters` parameters, quantization constants included.

        Source: Dettmers et al. 2021, 8-bit Optimizers via Block-wise Quantization (arXiv:2110.02861). A paged optimizer
        holds the same; it may move to the host where the GPU is full.
        """
        constants = self._bytes({"blocks": 1, "block_pair": 2})
        return self.bytes_per_parameter * parameters + constants * -(-parameters // self.block)

    def _bytes(self, times: Mapping[str, int]) -> int:
        """Bytes of one number for each tensor of these shapes, by the number of tensors of each shape."""
        return sum(times[t.shape] * _BYTES[t.dtypes[0]] for t in self.state.values() if t.shape in times)


# bitsandbytes keeps the state of a small tensor (under 4,096 numbers) in fp32: then state1 and state2 are as large and
# there are no constants.
_ADAMW_8BIT: Mapping[str, StateTensor] = {
    **dict.fromkeys(("state1", "state2"), StateTensor("parameter", ("torch.uint8", "torch.float32"))),
    **dict.fromkeys(("absmax1", "absmax2"), StateTensor("blocks")),
    **dict.fromkeys(("qmap1", "qmap2"), StateTensor("levels")),
}

_ADAMW_TORCH: Mapping[str, StateTensor] = {
    **dict.fromkeys(("exp_avg", "exp_avg_sq"), StateTensor("parameter")),
    "step": StateTensor("scalar"),
}

OPTIMIZERS: Mapping[str, OptimizerSpec] = {
    "adamw_8bit": OptimizerSpec(_ADAMW_8BIT),
    "paged_adamw_8bit": OptimizerSpec(_ADAMW_8BIT, devices=("cuda",), on_cpu="adamw_8bit", paged=True),
    # It quantizes nothing; the same block gives the adapter the same layout with every optimizer.
    "adamw_torch": OptimizerSpec(_ADAMW_TORCH),
    "adamw_torch_fused": OptimizerSpec(_ADAMW_TORCH),
    "lion_8bit": OptimizerSpec({name: _ADAMW_8BIT[name] for name in ("state1", "absmax1", "qmap1")}),
    # state1 holds its fast and its slow average of the gradients.
    "ademamix_8bit": OptimizerSpec(
        {
            **_ADAMW_8BIT,
            "state1": StateTensor("parameter_pair", ("torch.uint8", "torch.float32")),
            "absmax1": StateTensor("block_pair"),
        }
    ),
    "muon": OptimizerSpec({"momentum_buffer": StateTensor("parameter")}, own=True),
}

if TYPE_CHECKING:
    OptimizerName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]
    """The type of the setting: the table's keys, which a type checker cannot see."""


def trainer_name(name: str) -> str:
    """The optimizer's name for `TrainingArguments`: its own, or any that transformers knows where the job makes it."""
    return "adamw_torch" if OPTIMIZERS[name].own else name


def too_high(rate: float) -> str | None:
    """Why a learning rate is likely a mistake with any optimizer of the table; None if it is not."""
    if rate <= HIGHEST_RATE:
        return None
    return (
        f"{rate:g} is likely a mistake: one step may change each number of the adapter by so much; the default is 2e-4"
    )


def substitute(name: str, device: str) -> tuple[str, str | None]:
    """The optimizer that runs on this device (`cuda` or `cpu`), and a sentence if it is not the requested one."""
    spec = OPTIMIZERS[name]
    if device in spec.devices or spec.on_cpu is None:
        return name, None
    return spec.on_cpu, f"optimizer {name} -> {spec.on_cpu}: paging needs a GPU"
