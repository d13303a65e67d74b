"""The process that makes GGUF files and scores them in llama.cpp, started by `job.export.gguf`.

A process of its own, because both run code that must not take the job with it: llama.cpp ends the process on a failed
assertion, and the converter reads files of a model with functions that differ from family to family. It has no network:
the hub's client is told that it is offline, and code that comes with a model is never run.

It reads JSON lines from stdin and answers on stdout. The first line says what to do:

    check   converts the vocabulary alone, and has llama.cpp tokenize texts with it
    make    converts a folder in Hugging Face's layout into one GGUF file
    score   loads a GGUF file; then each line is a question, and the answer its choices' scores

Three libraries do the work. The conversion is llama.cpp's own converter, which auto-round brings along
(`auto_round/export/export_to_gguf/conversion`). Which tensor gets which type is auto-round's `GGUFDTypeSelector`, which
follows llama.cpp's quantizer. The blocks are made by `ggml_quantize_chunk` of the llama.cpp that scores them.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from http.client import HTTPConnection
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from job.common.gguf_file import gguf_contents, quantized_tensors

PRE_TOKENIZERS = (
    *("gpt-2", "llama-bpe", "qwen2", "gpt-4o", "tekken", "smollm", "starcoder", "falcon", "falcon3", "olmo", "bloom"),
    *("deepseek-llm", "deepseek-coder", "deepseek-v3", "command-r", "stablelm2", "dbrx", "chatglm-bpe", "exaone"),
)
"""llama.cpp's splits of a text into words, tried in this order for a tokenizer that its converter does not know."""
NAME = "model"
"""What every file calls its model: the same weights give the same bytes."""
LEAST = math.log(np.finfo(np.float32).smallest_subnormal)
"""llama.cpp takes the logarithm of a probability in fp32; one that is zero there has this one, the least of all."""
_FORCED = 1e9
"""Added to the logit of the token to be sampled: more than any logit. It is not in the probabilities that are read."""
_ALL = 1 << 24
"""More tokens than any vocabulary has."""
_SECONDS = 60
"""How long llama.cpp may take for the tokens of a text."""
_TOLD_SECONDS = 5.0
_TRIAL = 32
"""Width of the model whose vocabulary alone is tried."""


class Refused(Exception):
    """What the libraries cannot do with this model, in words."""


Say = Callable[[Mapping[str, Any]], None]


def main() -> None:
    """Does what the first line asks for, and answers until stdin ends."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # libraries print: whatever they print is no answer

        def say(what: Mapping[str, Any]) -> None:
            answers.write(json.dumps(what) + "\n")
            answers.flush()

        asked = json.loads(sys.stdin.readline())
        do: Mapping[str, Callable[..., None]] = {"check": _check, "make": _make, "score": _score}
        try:
            do[asked.pop("do")](**asked, say=say)
        except Refused as error:
            say({"refused": str(error)})
        except Exception as error:  # noqa: BLE001 - a converter or llama.cpp may raise anything
            say({"refused": f"{type(error).__name__}: {error}"[:500]})


def _check(*, source: str, tokenizer: Mapping[str, Any], say: Say) -> None:
    """Whether a folder can be converted: its family is known, and llama.cpp tokenizes as the tokenizer does."""
    model = _convertible(Path(source), "f16", tokenizer, Path(tempfile.gettempdir()))
    say({"checked": _vocabulary(model, tokenizer)})


def _make(*, source: str, file: str, file_type: str, tokenizer: Mapping[str, Any], say: Say) -> None:
    """Writes the file, says now and then that it goes on, and in the end what the file holds."""
    model = _convertible(Path(source), file_type, tokenizer, Path(file))
    found = _vocabulary(model, tokenizer)
    with _told_while_it_grows(Path(file), say), tempfile.TemporaryDirectory() as place:
        # the converter guesses a name, a version and more from the folder's name, which must not decide the bytes
        model.dir_model_card = Path(place, NAME)
        model.dir_model_card.symlink_to(Path(source).absolute(), target_is_directory=True)
        model.write()
    # What llama.cpp does not load is told here, and not when it is scored. A server that is taken down before it has
    # answered anything may wait for itself forever, so it is asked something.
    Served(Path(file), threads=1, context=256).tokenize("a")
    say({"made": {**found, **gguf_contents(Path(file)), "quantized": quantized_tensors(Path(file))}})


@contextmanager
def _told_while_it_grows(file: Path, say: Say) -> Iterator[None]:
    """Says every few seconds that a file has grown: the converter says nothing, and may write for an hour."""
    done = threading.Event()

    def watch() -> None:
        before = -1
        while not done.wait(_TOLD_SECONDS):
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


# ---- conversion


def import_converter() -> Any:
    """llama.cpp's converter, a package of its own in auto-round's folder; that of auto-round is not imported.

    Raises:
        Refused: It is not installed.
    """
    found = find_spec("auto_round")
    if found is None or not found.submodule_search_locations:
        raise Refused("the package auto-round is not installed; install qlora-job[export]")
    place = str(Path(found.submodule_search_locations[0], "export", "export_to_gguf"))
    if place not in sys.path:
        sys.path.insert(0, place)
    return import_module("conversion")


def _run_no_code() -> None:
    """Takes away from the families' converters to run code that comes with a model, which some ask transformers for."""
    from transformers import AutoConfig, AutoTokenizer

    for loads in (AutoTokenizer, AutoConfig):
        loads.from_pretrained = partial(_without_code, loads.from_pretrained)


def _without_code(
    load: Any,
    *args: Any,
    trust_remote_code: object = None,  # noqa: ARG001 - what the converter asks for counts for nothing
    local_files_only: object = None,  # noqa: ARG001
    **options: Any,
) -> Any:
    """Loads a tokenizer or a configuration from local files, without code that comes with the model."""
    return load(*args, **options, trust_remote_code=False, local_files_only=True)


def _convertible(source: Path, file_type: str, tokenizer: Mapping[str, Any], file: Path) -> Any:
    """The converter's object for a folder, with what is added to it here.

    Raises:
        Refused: The converter does not know the family, or cannot read the folder.
    """
    import gguf

    conversion = import_converter()
    _run_no_code()
    hparams = conversion.ModelBase.load_hparams(source, is_mistral_format=False)
    family = conversion.get_model_architecture(hparams, conversion.ModelType.TEXT)
    try:
        known = conversion.get_model_class(family)
    except NotImplementedError:
        raise Refused(f"llama.cpp's converter does not know the family {family}") from None
    selector = _type_selector(hparams, file_type, known.model_arch)

    class Converted(known):  # type: ignore[misc, valid-type]
        """The family's own class, with three of its methods answered here."""

        model_arch = known.model_arch
        pre: str | None = None

        def get_vocab_base_pre(self, tokenizer: Any) -> str:
            return self.pre or str(super().get_vocab_base_pre(tokenizer))

        def _create_vocab_sentencepiece(self) -> Any:
            return _sentencepiece(self.dir_model, int(self.hparams["vocab_size"]))

        def modify_tensors(self, data_torch: Any, name: str, bid: int | None) -> Iterator[tuple[str, Any]]:
            for new_name, data in super().modify_tensors(data_torch, name, bid):
                self.columns = int(data.shape[-1]) if data.dim() else 1
                yield new_name, data

        def tensor_force_quant(self, name: str, new_name: str, bid: int | None, n_dims: int) -> Any:
            own = super().tensor_force_quant(name, new_name, bid, n_dims)
            if own is not False or selector is None or n_dims < 2 or not new_name.endswith(".weight"):  # noqa: PLR2004
                return own
            return _that_fits(selector.select_qtype(new_name, n_dims), self.columns)

        def set_vocab(self) -> None:
            super().set_vocab()
            template = tokenizer["chat_template"]
            pairs = self.gguf_writer.kv_data[0]
            pairs.pop(gguf.Keys.Tokenizer.CHAT_TEMPLATE, None)  # the converter may have read another of several files
            if template is not None:
                self.gguf_writer.add_chat_template(template)

    _blocks_by_ggml()
    return Converted(
        dir_model=source,
        ftype=_file_type(file_type),
        fname_out=file,
        hparams={key: value for key, value in hparams.items() if key != "quantization_config"},
        model_name=NAME,
    )


def _file_type(name: str) -> Any:
    import gguf

    prefix = "ALL" if name == "f32" else "MOSTLY"
    return gguf.LlamaFileType[f"{prefix}_{name.upper()}"]


def _type_selector(hparams: Mapping[str, Any], file_type: str, arch: Any) -> Any:
    """What gives each tensor its type; None where all get the same."""
    if file_type in {"f32", "f16", "bf16", "q8_0"}:
        return None
    # takes ten seconds of processor time
    selector = import_module("auto_round.export.export_to_gguf.gguf_dtype").GGUFDTypeSelector
    text = {**hparams, **hparams.get("text_config", {})}
    tied = bool(text.get("tie_word_embeddings"))
    return selector(text, _file_type(file_type), arch, has_tied_embeddings=tied)


def _that_fits(wanted: Any, columns: int) -> Any:
    """The type for rows of so many numbers, as llama.cpp's quantizer replaces one whose blocks do not divide them."""
    import gguf

    types = gguf.GGMLQuantizationType
    instead = {types.Q2_K: types.Q4_0, types.Q3_K: types.Q4_0, types.Q4_K: types.Q5_0}
    instead |= {types.Q5_K: types.Q5_1, types.Q6_K: types.Q8_0}
    for found in (wanted, instead.get(wanted, types.F16)):
        if columns % gguf.GGML_QUANT_SIZES[found][0] == 0:
            return found
    return types.F16


def _blocks_by_ggml() -> None:
    """Has the package gguf make its blocks by llama.cpp's own code; it cannot make those of k-quants itself.

    Blocks do not depend on each other, so any number of threads makes the same ones.
    """
    import gguf

    def blocks(kind: Any, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        values = np.ascontiguousarray(values, dtype=np.float32)
        if not np.isfinite(values).all():
            raise Refused("a weight is not finite")
        made = np.empty((len(values), kind.type_size), dtype=np.uint8)
        _ggml_quantize()(int(kind.qtype), values.ctypes.data, made.ctypes.data, 0, len(values), kind.block_size, None)
        return made

    for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"):
        kind: Any = gguf.quants._type_traits[gguf.GGMLQuantizationType[name]]  # noqa: SLF001 - the package's table of them
        kind.quantize_blocks = partial(blocks, kind)
    # its own takes 16 rows at a time, in one thread
    setattr(gguf.quants, "_apply_over_grouped_rows", _in_threads)  # noqa: B010 - a function of the package, replaced


def _in_threads(
    func: Callable[[Any], Any], arr: np.ndarray[Any, Any], otype: Any, oshape: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    """`gguf.quants._apply_over_grouped_rows`, in threads: what makes the blocks holds no lock of Python's."""
    rows = arr.reshape((-1, arr.shape[-1]))
    groups = np.array_split(rows, max(1, rows.size >> 20))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        made = np.concatenate([group.reshape(-1) for group in pool.map(func, groups)])
    return made.astype(otype, copy=False).reshape(oshape)


@cache
def _ggml_quantize() -> Any:
    """`ggml_quantize_chunk(type, source, target, start, rows, columns, importance) -> bytes` of llama.cpp's ggml.h."""
    function = ctypes.CDLL(str(import_module("xllamacpp.xllamacpp").__file__)).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    return function


def _sentencepiece(folder: Path, rows: int) -> tuple[list[bytes], list[float], list[int]]:
    """Tokens, scores and kinds of a vocabulary that SentencePiece made, from tokenizer.json.

    The converter would read tokenizer.model, with another package. llama.cpp joins the two neighbours first whose whole
    has the highest score; tokenizer.json lists in `merges` what is joined first. So a token's score is minus the rank
    of the first merge that makes it.

    Raises:
        FileNotFoundError: It was made otherwise; the converter then goes on to look for one of its other kinds.
    """
    import gguf

    try:
        vocabulary = gguf.LlamaHfVocab(folder)
    except TypeError as error:  # that of Llama 3
        raise FileNotFoundError(str(error)) from error
    merges = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    ranks: dict[bytes, int] = {}
    for rank, merge in enumerate(merges):
        pair = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault("".join(pair).encode(), rank)
    tokens, scores, kinds = [], [], []
    for text, _, kind in vocabulary.all_tokens():
        tokens.append(text)
        scores.append(-float(ranks.get(text, len(ranks))))
        kinds.append(int(kind))
    for number in range(len(tokens), rows):  # llama.cpp wants a token for each row of the embedding
        tokens.append(f"[PAD{number}]".encode())
        scores.append(-float(len(ranks)))
        kinds.append(int(gguf.TokenType.UNUSED))
    return tokens, scores, kinds


# ---- vocabulary


def _vocabulary(model: Any, tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """Tries the vocabulary in llama.cpp, and settles how it splits words where the converter does not know that.

    Args:
        model: From `_convertible`.
        tokenizer: What the job's own tokenizer says: `texts`, [text, its token ids] each; `chat_template`; `special`,
            by GGUF's name the id of a special token.

    Returns:
        `family`, `pre_tokenizer`, and `differing`: the texts that llama.cpp tokenizes otherwise.

    Raises:
        Refused: The converter does not know the tokenizer, and none of llama.cpp's ways gives the same tokens.
    """
    import gguf

    try:
        pairs = _vocabulary_pairs(model)
    except NotImplementedError:
        pairs = _first_that_agrees(model, tokenizer)
    differing = _differing(pairs, tokenizer["texts"])
    for key, wanted in tokenizer["special"].items():
        found = pairs.get(f"tokenizer.ggml.{key}_token_id")
        if found is not None and found.value != wanted:
            raise Refused(f"its {key} token would be number {found.value}, and the tokenizer's is {wanted}")
    pre = pairs.get(gguf.Keys.Tokenizer.PRE)
    return {
        "family": gguf.MODEL_ARCH_NAMES[model.model_arch],
        "pre_tokenizer": "" if pre is None else pre.value,
        "differing": differing,
    }


def _first_that_agrees(model: Any, tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    for name in PRE_TOKENIZERS:
        model.pre = name
        pairs = _vocabulary_pairs(model)
        if not _differing(pairs, tokenizer["texts"]):
            return pairs
    raise Refused("llama.cpp does not tokenize as its tokenizer does, in none of the ways that it knows")


def _vocabulary_pairs(model: Any) -> dict[str, Any]:
    """The keys and values about the vocabulary, as the converter writes them; `model` is left as it was."""
    import gguf

    writer = model.gguf_writer
    model.gguf_writer = gguf.GGUFWriter(path=None, arch="llama")
    try:
        model.set_vocab()
        return {key: value for key, value in model.gguf_writer.kv_data[0].items() if key.startswith("tokenizer.")}
    finally:
        model.gguf_writer = writer


def _differing(pairs: Mapping[str, Any], texts: Iterable[tuple[str, Sequence[int]]]) -> list[str]:
    """The texts that llama.cpp makes other tokens of, with this vocabulary in a model of one narrow layer."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "vocabulary.gguf")
        _write_trial(file, pairs)
        with_vocabulary = Served(file, threads=1, context=256)
        return [text for text, ids in texts if with_vocabulary.tokenize(text) != list(ids)]


def _write_trial(file: Path, pairs: Mapping[str, Any]) -> None:
    """A model of the family llama with this vocabulary: llama.cpp loads no vocabulary alone."""
    import gguf

    writer = gguf.GGUFWriter(file, arch="llama")
    writer.add_context_length(256)
    writer.add_embedding_length(_TRIAL)
    writer.add_block_count(1)
    writer.add_feed_forward_length(_TRIAL)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, pair in pairs.items():
        writer.add_key_value(key, pair.value, pair.type, pair.sub_type)
    rows = len(pairs[gguf.Keys.Tokenizer.LIST].value)
    writer.add_tensor("token_embd.weight", np.zeros((rows, _TRIAL), dtype=np.float16))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(_TRIAL, dtype=np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((_TRIAL, _TRIAL), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- llama.cpp


def _llama_cpp() -> Any:
    try:
        return import_module("xllamacpp")
    except ImportError as error:
        raise Refused(f"the package xllamacpp is missing ({error}); install qlora-job[export]") from error


class Served:
    """A GGUF file in llama.cpp's server, which answers one request at a time.

    Args:
        file: Of a model.
        threads: Of the processor.
        context: Most tokens of a question with a choice.

    Raises:
        Refused: llama.cpp does not load it.
    """

    def __init__(self, file: Path, *, threads: int, context: int) -> None:
        xllamacpp = _llama_cpp()
        self._key = token_hex(16)
        self._whole: int | None = None
        options = xllamacpp.CommonParams()
        options.model.path = str(file)
        options.api_keys = [self._key]  # the server listens, if only on this machine
        options.n_ctx = context
        options.n_parallel = 1
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
        # One request at a time, nothing kept of earlier ones, and attention whose sums do not depend on the number of
        # threads: a question's scores have the same bits whatever was asked before it.
        options.cache_ram_mib = 0
        options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.warmup = options.fit_params = False
        options.verbosity = 1
        try:
            self._server = xllamacpp.Server(options)
        except RuntimeError as error:
            raise Refused(f"llama.cpp does not load it: {error}") from error

    def tokenize(self, text: str) -> list[int]:
        """The token ids of a text, with what llama.cpp adds at its beginning and end."""
        place = urlsplit(self._server.listening_address)
        connection = HTTPConnection(str(place.hostname), place.port, timeout=_SECONDS)
        body = json.dumps({"content": text, "add_special": True, "parse_special": True})
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        connection.request("POST", "/tokenize", body, headers)
        return [int(token) for token in json.loads(connection.getresponse().read())["tokens"]]

    def score(self, context: Sequence[int], choice: Sequence[int], *, anew: bool) -> tuple[float, bool]:
        """Log-likelihood of a choice after a context (natural logarithm), and whether it is the greedy continuation.

        One request a token: the token is forced by a bias on its logit, and llama.cpp tells its probability before any
        bias, a softmax in fp32 over the logits of the whole vocabulary. It costs one token's forward pass, since the
        tokens before it are in llama.cpp's cache.

        Args:
            context: Token ids.
            choice: Token ids.
            anew: Whether to compute the context again. The first choice of a question does: what is left of another
                question's context would change how many tokens are computed together, and with it the last bits.

        Raises:
            Refused: llama.cpp answered something else.
        """
        total, greedy = 0.0, True
        for number, token in enumerate(choice):
            before = [*context, *choice[:number]]
            found = self._probabilities(before, token, most=1, cached=number > 0 or not anew)
            if not found:
                # llama.cpp tells nothing of a token that ends within a character: it is read among all, beside another
                found = self._probabilities(before, self._told(), most=_ALL, cached=True)
            total += max(found[token], LEAST)
            greedy = greedy and next(iter(found)) == token
        return total, greedy

    def _probabilities(self, before: Sequence[int], forced: int, *, most: int, cached: bool) -> dict[int, float]:
        """Log-probabilities after some tokens: of the most probable ones, in that order, and of the one that is forced.

        Empty if llama.cpp tells none, which is so for a forced token that ends within a character.

        Raises:
            Refused: llama.cpp answered something else.
        """
        answer = self._server.handle_completions(
            {
                "prompt": list(before),
                "n_predict": 1,
                "n_probs": most,
                "logit_bias": [[forced, _FORCED]],
                "samplers": ["top_k"],
                "top_k": 1,
                "cache_prompt": cached,
            }
        )
        try:
            told = answer["choices"][0]["logprobs"]
            if answer["usage"]["prompt_tokens"] != len(before):
                raise Refused(f"llama.cpp read {answer['usage']['prompt_tokens']} tokens instead of {len(before)}")
            if told is None:
                return {}
            (sampled,) = told["content"]
            found = {int(one["id"]): float(one["logprob"]) for one in sampled["top_logprobs"]}
            if sampled["id"] != forced:
                raise Refused(f"llama.cpp scored token {sampled['id']} instead of token {forced}")
        except (KeyError, IndexError, TypeError, ValueError):
            raise Refused(f"llama.cpp did not score a token: {json.dumps(answer)[:300]}") from None
        return {**found, forced: float(sampled["logprob"])} if forced not in found else found

    def _told(self) -> int:
        """A token of which llama.cpp tells the probability: a whole character."""
        if self._whole is None:
            self._whole = self.tokenize("a")[-1]
        return self._whole


def _score(*, file: str, threads: int, context: int, say: Say) -> None:
    """Loads a file, says so, and scores a question a line."""
    served = Served(Path(file), threads=threads, context=context)
    say({"loaded": _system()})
    for line in sys.stdin:
        question = json.loads(line)
        scores = []
        for number, choice in enumerate(question["choices"]):
            scores.append(served.score(question["context"], choice, anew=number == 0))
        say({"scores": scores})


def _system() -> str:
    """What llama.cpp says of the processor's instructions that it uses: they decide the last bits of a score."""
    return re.sub(r"\s+", " ", str(_llama_cpp().get_system_info())).strip(" |")
