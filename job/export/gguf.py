"""GGUF: one file for llama.cpp, made from a merged folder and scored in llama.cpp itself.

How to add a type: an entry in `TYPES`, with llama.cpp's name of it, which is also its name in `JOB_EXPORT__FORMATS`.

The work is done by `job.export.llama_cpp_process`, a process that this module starts and sends requests to, with time
limits: it may crash or hang without the job. Why it is done like this:

- auto-round would make such a file too, from a model in memory, with blocks that differ from llama.cpp's in the last
  digits. The converter and the choice of types that it brings along are used here; the blocks are llama.cpp's own.
- Blocks are made as `llama-quantize` makes them without an importance matrix: nothing is calibrated, so no row of the
  training data decides what the file holds.
- llama.cpp's server reports probabilities of sampled tokens only, so each token of a choice is one request, which
  forces that token. That costs the same forward passes as generating the choice.
"""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job import log
from job.common.export_formats import GGUF
from job.common.hashing import code_hashes
from job.common.helper_process import HelperProcess, start_helper
from job.common.out_of_memory import ran_out
from job.errors import TrainingFailed
from job.export.exported_model import ExportedModel, ScoringOptions
from job.export.quantizable import CannotMake
from job.model.tokenizer import load_tokenizer
from job.records import ChoiceScore, GgufRecord, QuantizationRecord, Question

if TYPE_CHECKING:
    from job.export.formats import DerivedInputs


@dataclass(frozen=True)
class GgufType:
    """A file type of llama.cpp: bits of most weights without their scales, and how many weights share a scale."""

    bits: float
    block: int | None
    activations: str


_BLOCKS = "8-bit integers, by 32"
_K_BLOCKS = "8-bit integers, by 256"
TYPES: Mapping[str, GgufType] = {
    "f16": GgufType(16, None, "fp16"),
    "bf16": GgufType(16, None, "bf16"),
    "q8_0": GgufType(8, 32, _BLOCKS),
    "q6_k": GgufType(6, 256, _K_BLOCKS),
    "q5_k_m": GgufType(5, 256, _K_BLOCKS),
    "q5_k_s": GgufType(5, 256, _K_BLOCKS),
    "q4_k_m": GgufType(4, 256, _K_BLOCKS),
    "q4_k_s": GgufType(4, 256, _K_BLOCKS),
    "q4_0": GgufType(4, 32, _BLOCKS),
}
"""By llama.cpp's name. `activations` is what llama.cpp converts the inputs of layers to on a CPU."""
FILE = "model-{type}.gguf"
"""Name of the file of a type."""
_STALLED_SECONDS = 900.0
"""How long the process may say nothing: one tensor, loading a file, or one question takes less."""
_POLL_SECONDS = 1.0
_WITHOUT_NETWORK = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
_MARGIN = 8
"""Tokens of llama.cpp's context beyond the longest question: it needs room for the one that it samples."""
_PROBES = (
    "Hello, world!",
    " leading space",
    "  two spaces",
    "trailing space ",
    "a\nb\n\nc",
    "\ttab",
    "\n",
    "   ",
    "Question: What is 3 + 14,159?\nAnswer:",
    "I'll we'VE don't it's",
    "x=3.14; y = 'a' if b else \"c\"",
    "1234567890",
    "CamelCase snake_case ALLCAPS",
    "na\u00efve caf\u00e9 \u00fcber",
    "\u4f60\u597d\uff0c\u4e16\u754c",
    "\u041f\u0440\u0438\u0432\u0435\u0442",
    "\u0645\u0631\u062d\u0628\u0627",
    "\U0001f600 \U0001f469\u200d\U0001f680",
    "!!! ??? ...",
    "a  b   c    d",
    "https://example.org/a?b=c&d=1",
    "e\u0301",
)
"""Texts on which tokenizers differ: how they cut words, numbers, white space, and bytes that no token has."""


def check_gguf(source: Path, check_stop: Callable[..., None]) -> str:
    """Why llama.cpp does not run a model, in words; nothing if it does. Asked before training.

    Args:
        source: Folder of the base's own files.
        check_stop: Called while waiting; may raise what ends the job.

    Raises:
        DataError: The tokenizer cannot be loaded.
    """
    request = {"do": "check", "source": str(source.absolute()), "tokenizer": _described(load_tokenizer(source))}
    with _llama_cpp_process(request, check_stop) as answers:
        answer = next(answers)
    if "checked" not in answer:
        return _reason(answer)
    if differing := answer["checked"]["differing"]:
        log.get_logger().warning("llama.cpp tokenizes some texts differently from the tokenizer", texts=differing)
    if (window := answer["checked"]["lost_window"]) is not None:
        what = "llama.cpp has no sliding window for this family: beyond it, the GGUF file computes otherwise"
        log.get_logger().warning(what, window=window)
    return ""


def make_gguf(inputs: DerivedInputs) -> QuantizationRecord:
    """Writes the GGUF file of the merged model: the same model and versions give the same bytes.

    Raises:
        CannotMake: The libraries cannot, or llama.cpp does not load what they made.
    """
    inputs.folder.mkdir(parents=True)
    source, file = inputs.merged.absolute(), inputs.folder.absolute() / FILE.format(type=inputs.kind)
    request = {"do": "make", "source": str(source), "file": str(file), "file_type": inputs.kind}
    with _llama_cpp_process({**request, "tokenizer": _described(load_tokenizer(source))}, inputs.check_stop) as answers:
        answer = next(answer for answer in answers if "bytes" not in answer)
    if "made" not in answer:
        raise CannotMake(_reason(answer))
    contents = answer["made"]
    gguf_type = TYPES[inputs.kind]
    return QuantizationRecord(
        method=GGUF,
        scheme=inputs.kind.upper(),
        bits=gguf_type.bits,
        group_size=gguf_type.block,
        activations=gguf_type.activations,
        library="llama.cpp in xllamacpp",
        version=version("xllamacpp"),
        layers=contents["quantized"],
        kept=[],
        gguf=GgufRecord(
            architecture=contents["family"],
            pre_tokenizer=contents["pre_tokenizer"],
            converter=f"auto-round {version('auto-round')}",
            types=contents["types"],
            bits_per_weight=contents["bits_per_weight"],
            tokenized_otherwise=contents["differing"],
        ),
    )


def load_scored(folder: Path, scoring: ScoringOptions) -> ExportedModel:
    """Loads the file of a folder in llama.cpp, on the processor, to be scored a question at a time.

    Raises:
        TrainingFailed: llama.cpp does not load it.
    """
    (file,) = folder.glob("*.gguf")
    kind = file.stem.partition("-")[2]
    stack = ExitStack()
    threads = max(1, len(os.sched_getaffinity(0)) // scoring.processes)
    model = stack.enter_context(
        load_gguf(file, max_length=scoring.max_length, threads=threads, check_stop=scoring.check_stop)
    )
    facts = {
        "llama.cpp": version("xllamacpp"),
        "instructions": model.instructions,
        "context": scoring.max_length,
        "asked_by": code_hashes("job.export.llama_cpp_process", "job.export.llama_cpp_server"),
    }
    return ExportedModel(
        model,
        kind,
        TYPES[kind].activations,
        scoring=score_in_llama_cpp,
        facts=facts,
        close=stack.close,
        one_by_one=True,
    )


class LlamaCpp:
    """A GGUF file loaded in llama.cpp, to be scored; takes the place of a model in `scorer.ScoreSequences`.

    Attributes:
        instructions: The processor's instructions that llama.cpp uses, in its words.
    """

    def __init__(self, ask: Callable[[Mapping[str, Any]], Mapping[str, Any]], instructions: str) -> None:
        self._ask, self.instructions = ask, instructions

    def score(self, question: Question) -> list[ChoiceScore]:
        """Scores the choices of a question.

        Raises:
            TrainingFailed: llama.cpp answered something else, ended, or answered nothing for `_STALLED_SECONDS`.
        """
        answer = self._ask({"context": question.context, "choices": question.choices})
        if "scores" not in answer:
            raise TrainingFailed(f"llama.cpp could not score a question: {_reason(answer)}")
        scores = [ChoiceScore(float(total), bool(greedy)) for total, greedy in answer["scores"]]
        if len(scores) != len(question.choices) or not all(math.isfinite(score.log_likelihood) for score in scores):
            raise TrainingFailed(
                "llama.cpp's scores are not finite: the model diverged; lower JOB_TRAIN__LEARNING_RATE"
            )
        return scores


@contextmanager
def load_gguf(file: Path, *, max_length: int, threads: int, check_stop: Callable[..., None]) -> Iterator[LlamaCpp]:
    """Loads a file in llama.cpp while the context is open.

    Args:
        file: GGUF file.
        max_length: Most tokens of a question with its longest choice.
        threads: Number of CPU threads. Scores have the same bits with any number of them.
        check_stop: Called while waiting; may raise what ends the job.

    Raises:
        TrainingFailed: llama.cpp does not load it.
    """
    with _llama_cpp_process(
        {"do": "score", "file": str(file), "threads": threads, "context": max_length + _MARGIN}, check_stop
    ) as answers:
        answer = next(answers)
        if "loaded" not in answer:
            raise TrainingFailed(f"llama.cpp could not load {file.name}: {_reason(answer)}")

        def ask(question: Mapping[str, Any]) -> Mapping[str, Any]:
            answers.send_line(question)
            return next(answers)

        yield LlamaCpp(ask, answer["loaded"])


def score_in_llama_cpp(
    model: LlamaCpp, questions: Sequence[Question], sequences: Mapping[int, range]
) -> Iterator[tuple[int, list[list[ChoiceScore]]]]:
    """`scorer.ScoreSequences` by llama.cpp: one question after the other, of each sequence."""
    for number, sequence in sequences.items():
        yield number, [model.score(question) for question in questions[sequence.start : sequence.stop]]


def _described(tokenizer: Any) -> dict[str, Any]:
    """What the process compares llama.cpp's vocabulary with, as the job's tokenizer has it."""
    special = {
        name: getattr(tokenizer, f"{name}_token_id")
        for name in ("bos", "eos")
        if getattr(tokenizer, f"{name}_token_id") is not None
    }
    control = [
        token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special and token.content
    ][:64]
    texts = [*_PROBES, *control, *(f"a {token} b" for token in control), *(f"{token}{token}c" for token in control)]
    template = tokenizer.chat_template
    return {
        "texts": [(text, list(tokenizer.encode(text))) for text in texts],
        "special": special,
        "chat_template": template.get("default") if isinstance(template, dict) else template,
    }


def _reason(answer: Mapping[str, Any]) -> str:
    return str(answer.get("refused", answer))


class _Answers:
    """The process's answers, one JSON object a line; waiting for one is bounded, and lets the job end."""

    def __init__(self, helper: HelperProcess, check_stop: Callable[..., None]) -> None:
        self._helper, self._check_stop = helper, check_stop
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        # a thread reads, since a pipe cannot be waited for with a limit in every way that lines are buffered
        threading.Thread(target=self._read, name="llama-cpp-answers", daemon=True).start()

    def _read(self) -> None:
        for line in self._helper.stdout:
            self._lines.put(line)
        self._lines.put(b"")

    def __iter__(self) -> _Answers:
        return self

    def __next__(self) -> dict[str, Any]:
        waited = 0.0
        while True:
            try:
                line = self._lines.get(timeout=_POLL_SECONDS)
                break
            except queue.Empty:
                waited += _POLL_SECONDS
                self._check_stop(progress=False)
                if waited >= _STALLED_SECONDS:
                    return {"refused": f"llama.cpp's process has not answered for {_STALLED_SECONDS:.0f} s"}
        self._check_stop()
        if not line:
            return {"refused": self._end()}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def send_line(self, request: Mapping[str, Any]) -> None:
        """Asks; a process that has ended is noticed by the answer."""
        with suppress(OSError):
            self._helper.stdin.write(json.dumps(request).encode() + b"\n")
            self._helper.stdin.flush()

    def _end(self) -> str:
        """How the process ended, in words.

        Raises:
            TrainingFailed: It was killed because main memory was full.
        """
        if self._helper.killed_for_memory():
            raise ran_out("llama.cpp was at work", "leave GGUF out of JOB_EXPORT__FORMATS", MemoryError())
        code = self._helper.process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return f"llama.cpp's process {how}: {self._helper.last_error_line() or 'without a message'}"


@contextmanager
def _llama_cpp_process(request: Mapping[str, Any], check_stop: Callable[..., None]) -> Iterator[_Answers]:
    """Starts the process with its first line; it is killed when the context is left."""
    with start_helper("job.export.llama_cpp_process", environ=_WITHOUT_NETWORK) as helper:
        answers = _Answers(helper, check_stop)
        answers.send_line(request)
        yield answers
