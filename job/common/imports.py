"""Imports of libraries, without what they import too and the job does not use.

Libraries import an optional package at the top of a module if it is installed: TRL imports wandb, transformers' losses
for images import scipy. Each takes as long as TRL itself, and the job needs them later or never.

Each function here saves time and nothing else: where a newer library no longer fits one of them, what it leaves out is
imported as usual. `tests/unit/stages/test_preload.py` holds what is left out, so that this is noticed.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from threading import RLock
from types import ModuleType, SimpleNamespace
from typing import Any

MAX_READ_AHEAD = 64 << 20
"""Bytes. Of larger files, which are CUDA's libraries, imports read a part only."""
COMPILER = "torch._dynamo"
_APART = (f"{COMPILER}.config", f"{COMPILER}._trace_wrapped_higher_order_op")
"""Modules of the compiler that torch's checkpointing reads, and that transformers imports by name. They need nothing of
the package around them."""
_LOADING = RLock()


@contextmanager
def without(*packages: str) -> Iterator[None]:
    """Hides packages from imports inside the `with` block, as if they were not installed.

    A package that is imported already stays visible. Name also the packages that need a hidden one. This holds for all
    threads, so no other thread may import the packages meanwhile. The means is `None` in `sys.modules`, as Python's
    reference describes it.
    """
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextmanager
def distributions_read_when_needed() -> Iterator[None]:
    """Puts off what `importlib.metadata.packages_distributions` reads, if asked inside the `with` block, until used.

    It reads the metadata of every installed package. TRL asks for it on import and uses it only to find the version of
    vLLM or Liger, where they are installed.
    """
    read = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = lambda: _Distributions(read)
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = read


class _Distributions(Mapping[str, list[str]]):
    """The answer of `read`, which is called at the first use."""

    def __init__(self, read: Callable[[], Mapping[str, list[str]]]) -> None:
        self._read = cache(read)

    def __getitem__(self, name: str) -> list[str]:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())


@contextmanager
def later(module: str, *functions: str) -> Iterator[None]:
    """Lets `from module import function` succeed inside the `with` block without importing the module.

    What is imported so imports the module when it is called. Other names of the module cannot be imported inside the
    block. A module that is imported already is left as it is.
    """
    if module in sys.modules:
        yield
        return
    stand_in = ModuleType(module)
    for name in functions:
        setattr(stand_in, name, _calling(module, name))
    sys.modules[module] = stand_in
    try:
        yield
    finally:
        del sys.modules[module]


def _calling(module: str, name: str) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        return getattr(import_module(module), name)(*arguments, **named)

    return call


@contextmanager
def compiler_put_off(environ: Mapping[str, str]) -> Iterator[None]:
    """Puts off the import of torch's compiler until something needs more of it than to mark a function.

    torch's optimizers, its checkpointing, transformers and bitsandbytes import the compiler's 600 modules only to mark
    functions, as not to be compiled or as to be compiled. With TORCHDYNAMO_DISABLE it compiles nothing, so that every
    mark is the function itself. Any other use of `torch._dynamo`, or of a module in it, imports all of it as usual;
    `torch.compile` is torch's own again after the `with` block. Without that variable in `environ` nothing is put off.
    """
    if environ.get("TORCHDYNAMO_DISABLE") != "1" or COMPILER in sys.modules:
        yield
        return
    import torch

    module = module_from_spec(find_spec(COMPILER))  # type: ignore[arg-type]
    module.__class__ = _Deferred
    sys.modules[COMPILER] = torch._dynamo = module  # noqa: SLF001 - as an import would
    for name in _APART:
        with suppress(ImportError):
            import_module(name)
    if type(module) is _Deferred:
        del module.__path__  # modules in the package expect that it has been imported: the next one imports it
    compile_ = torch.compile
    torch.compile = _marked  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_


def _marked(fn: Any = None, *_: Any, **__: Any) -> Any:
    """The function as it is; without one, a decorator that returns it."""
    return (lambda function: function) if fn is None else fn


def imported_files() -> list[str]:
    """The files that the imports of this process have read, in that order: compiled modules, then native libraries."""
    specs = [getattr(module, "__spec__", None) for module in list(sys.modules.values())]
    of_modules = (place for spec in specs if spec is not None for place in (spec.cached, spec.origin))
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    mapped = (line.split(maxsplit=5)[5] for line in lines if line.count("/"))
    places = dict.fromkeys(place for place in (*of_modules, *mapped) if place and not place.endswith(".py"))
    return [place for place in places if Path(place).is_file() and Path(place).stat().st_size <= MAX_READ_AHEAD]


class _Compiled:
    """Stands for the class of compiled modules: none is one."""


class _Deferred(ModuleType):
    """`torch._dynamo` before it is imported, with those of its functions that libraries call in every run."""

    eval_frame = SimpleNamespace(OptimizedModule=_Compiled)
    disable = allow_in_graph = assume_constant_result = staticmethod(_marked)

    @staticmethod
    def graph_break(*_: Any, **__: Any) -> None:
        """Ends the part of a function that is compiled as a whole: of none, here."""

    def __getattr__(self, name: str) -> Any:
        with _LOADING:
            if type(self) is _Deferred:
                self.__class__ = ModuleType  # type: ignore[assignment]
                spec = self.__spec__
                self.__path__ = spec.submodule_search_locations  # type: ignore[union-attr, assignment]
                spec.loader.exec_module(self)  # type: ignore[union-attr]
        return getattr(self, name)
