"""The process that makes GGUF files and scores them in llama.cpp, started by `job.export.gguf`.

A separate process, because both run code that must not end the job: llama.cpp ends its process on a failed
assertion, and the converter reads files of a model with functions that differ from family to family. It has no network:
the hub's client is set to offline mode, and code that comes with a model is never run.

It reads JSON lines from stdin and answers on stdout. The first line says what to do:

    check   converts the vocabulary alone, and has llama.cpp tokenize texts with it
    make    converts a folder in Hugging Face's layout into one GGUF file
    score   loads a GGUF file; then each line is a question, and the answer its choices' scores
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from job.common.gguf_file import gguf_contents, quantized_tensors
from job.export.gguf_conversion import NAME, converter_for, lost_window, try_vocabulary
from job.export.llama_cpp_server import LlamaCppServer, Refused, system_info

_REPORT_SECONDS = 5.0

Say = Callable[[Mapping[str, Any]], None]


def main() -> None:
    """Does what the first line of stdin requests, and answers until stdin ends."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # libraries print, and their output is no answer

        def say(message: Mapping[str, Any]) -> None:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

        request = json.loads(sys.stdin.readline())
        do: Mapping[str, Callable[..., None]] = {"check": _check, "make": _make, "score": _score}
        try:
            do[request.pop("do")](**request, say=say)
        except Refused as error:
            say({"refused": str(error)})
        except Exception as error:  # noqa: BLE001 - a converter or llama.cpp may raise anything
            say({"refused": f"{type(error).__name__}: {error}"[:500]})
    os._exit(0)  # without destructors, which may hang: see `llama_cpp_server._servers`


def _check(*, source: str, tokenizer: Mapping[str, Any], say: Say) -> None:
    """Whether a folder can be converted: its family is known, and llama.cpp tokenizes as the tokenizer does."""
    model = converter_for(Path(source), "f16", tokenizer, Path(tempfile.gettempdir()))
    say({"checked": {**try_vocabulary(model, tokenizer), "lost_window": lost_window(model)}})


def _make(*, source: str, file: str, file_type: str, tokenizer: Mapping[str, Any], say: Say) -> None:
    """Writes the file, reports progress periodically, and in the end what the file holds."""
    model = converter_for(Path(source), file_type, tokenizer, Path(file))
    vocabulary = try_vocabulary(model, tokenizer)
    with _reporting_growth(Path(file), say), tempfile.TemporaryDirectory() as folder:
        # the converter guesses a name, a version and more from the folder's name, which must not decide the bytes
        model.dir_model_card = Path(folder, NAME)
        model.dir_model_card.symlink_to(Path(source).absolute(), target_is_directory=True)
        model.write()
    # A file that llama.cpp cannot load fails here, and not when it is scored.
    LlamaCppServer(Path(file), threads=1, context=256).tokenize("a")
    say({"made": {**vocabulary, **gguf_contents(Path(file)), "quantized": quantized_tensors(Path(file))}})


@contextmanager
def _reporting_growth(file: Path, say: Say) -> Iterator[None]:
    """Says every few seconds that a file has grown: the converter says nothing, and may write for an hour."""
    done = threading.Event()

    def watch() -> None:
        before = -1
        while not done.wait(_REPORT_SECONDS):
            size = file.stat().st_size if file.exists() else 0
            if size != before:
                say({"bytes": size})
            before = size

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _score(*, file: str, threads: int, context: int, say: Say) -> None:
    """Loads a file, reports that it is loaded, and scores one question for each line."""
    server = LlamaCppServer(Path(file), threads=threads, context=context)
    say({"loaded": system_info()})
    for line in sys.stdin:
        question = json.loads(line)
        scores = []
        for number, choice in enumerate(question["choices"]):
            scores.append(server.score(question["context"], choice, anew=number == 0))
        say({"scores": scores})
