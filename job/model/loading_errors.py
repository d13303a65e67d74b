"""Which errors while a model's weights are loaded are about its files, and which are the machine's or a library's."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from job.errors import DataError, Problem
from job.model.files import readable

_OF_QUANTIZATION = ("transformers.integrations.", "transformers.quantizers.")


@contextmanager
def loading_weights(folder: Path, message: str = "has no model that can be loaded") -> Iterator[None]:
    """Like `readable`, for calls of transformers that load weights onto a device.

    A `RuntimeError` there may also be torch's or bitsandbytes': of a driver, a library that is missing, a kernel. Such
    an error passes unchanged.

    Raises:
        DataError: The files hold no model that can be loaded.
    """
    from transformers import core_model_loading

    from job.model.placed_loading import replaced

    # transformers logs every error of an operation on weights, also that the GPU's memory is full, and raises another.
    unchanged = replaced(core_model_loading, "log_conversion_errors", _naming_weights(folder, message))
    with readable(folder, message, is_of_files=is_of_files), unchanged:
        yield


def is_of_files(error: Exception) -> bool:
    """Whether an error that was raised while weights were loaded is about their files, by what raised it.

    A `RuntimeError` is if transformers itself raises it, which it does for shapes that differ from the model's. What
    torch raises, called by transformers, is not, nor is what transformers says of a library for quantization.
    """
    if not isinstance(error, RuntimeError) or isinstance(error, NotImplementedError | RecursionError):
        return True
    if (last := error.__traceback__) is None:
        return False
    while last.tb_next is not None:
        last = last.tb_next
    code, module = last.tb_frame.f_code.co_code, str(last.tb_frame.f_globals.get("__name__"))
    raises = code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]  # and not a call of what is written in C
    return raises and module.startswith("transformers.") and not module.startswith(_OF_QUANTIZATION)


def _naming_weights(folder: Path, message: str) -> Any:
    """In place of transformers' context for an operation on weights: errors pass, those about files with their name."""
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
            first = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise DataError([Problem("JOB_MODEL__ID", f"{folder} {message}: {name}: {first}")]) from error

    return naming_weights
