"""Tells errors of a model's files from those of the machine or a library, where its weights are loaded."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from job.common.formatting import first_line
from job.errors import DataError, Problem
from job.model.files import readable

_OF_QUANTIZATION = ("transformers.integrations.", "transformers.quantizers.")


@contextmanager
def loading_weights(folder: Path, message: str = "has no model that can be loaded") -> Iterator[None]:
    """Like `readable`, for calls of transformers that load weights onto a device.

    A `RuntimeError` there may also come from torch or bitsandbytes, because of a driver, a missing library or a kernel.
    Such an error passes unchanged.

    Raises:
        DataError: The files hold no model that can be loaded.
    """
    from transformers import core_model_loading

    from job.model.placed_loading import replaced

    # transformers logs every error of an operation on weights, even full GPU memory, and raises another one instead.
    unchanged = replaced(core_model_loading, "log_conversion_errors", _naming_weights(folder, message))
    with readable(folder, message, is_of_files=is_of_files), unchanged:
        yield


def is_of_files(error: Exception) -> bool:
    """Whether an error that was raised while weights were loaded is about their files.

    Of the `RuntimeError`s only those are that a `raise` in transformers itself raises, as for shapes that differ from
    the model's; not those of torch, which transformers calls, nor those of its modules for quantization libraries.
    """
    if not isinstance(error, RuntimeError) or isinstance(error, NotImplementedError | RecursionError):
        return True
    if (last := error.__traceback__) is None:
        return False
    while last.tb_next is not None:
        last = last.tb_next
    code, module = last.tb_frame.f_code.co_code, str(last.tb_frame.f_globals.get("__name__"))
    raises = code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]  # else the last instruction calls a function in C
    return raises and module.startswith("transformers.") and not module.startswith(_OF_QUANTIZATION)


def _naming_weights(folder: Path, message: str) -> Any:
    """Replaces transformers' context for an operation on weights: errors pass, and one about files names the weight."""
    import torch
    from transformers import core_model_loading

    @contextmanager
    def naming_weights(name: str, _info: Any = None, _extras: Any = None, op: Any = None) -> Iterator[None]:
        try:
            yield
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except RuntimeError as error:
            # Operations of this module stack, split and transpose tensors of the files; others quantize.
            if type(op).__module__ != core_model_loading.__name__:
                raise
            first = first_line(error)
            raise DataError([Problem("JOB_MODEL__ID", f"{folder} {message}: {name}: {first}")]) from error

    return naming_weights
