"""A folder in Hugging Face's layout as a GGUF file: the conversion, and the trial of its vocabulary in llama.cpp.

Three libraries do the work. The conversion is llama.cpp's own converter, which auto-round brings along
(`auto_round/export/export_to_gguf/conversion`). Which tensor gets which type is auto-round's `GGUFDTypeSelector`, which
follows llama.cpp's quantizer. The blocks are made by `ggml_quantize_chunk` of the llama.cpp that scores them.

The converter changes classes of transformers and of gguf for good: only `llama_cpp_process` runs it.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from job.export.llama_cpp_server import LlamaCppServer, Refused

PRE_TOKENIZERS = (
    *("gpt-2", "llama-bpe", "qwen2", "gpt-4o", "tekken", "smollm", "starcoder", "falcon", "falcon3", "olmo", "bloom"),
    *("deepseek-llm", "deepseek-coder", "deepseek-v3", "command-r", "stablelm2", "dbrx", "chatglm-bpe", "exaone"),
)
"""llama.cpp's splits of a text into words, tried in this order for a tokenizer that its converter does not know."""
NAME = "model"
"""What every file calls its model: the same weights give the same bytes."""
_TRIAL = 32
"""Width of the model whose vocabulary alone is tried."""


def import_converter() -> Any:
    """llama.cpp's converter, a separate package in auto-round's folder; auto-round itself is not imported.

    Raises:
        Refused: It is not installed.
    """
    spec = find_spec("auto_round")
    if spec is None or not spec.submodule_search_locations:
        raise Refused("the package auto-round is not installed; run pip install '.[export]' in the repository")
    folder = Path(spec.submodule_search_locations[0], "export", "export_to_gguf")
    _add_new_names(folder / "conversion")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return import_module("conversion")


def _add_new_names(folder: Path) -> None:
    """Gives the package gguf the names of families and tensors that only the converter knows, which is newer.

    One file holds the classes of several families, and all of them fail if gguf lacks one name: without DFLASH, those
    of Qwen do. The names get no value, so that `converter_for` refuses the families that they belong to.
    """
    import gguf

    for file in folder.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        for kind, name in re.findall(r"\bgguf\.(MODEL_ARCH|MODEL_TENSOR)\.([A-Z0-9_]+)", text):
            if not hasattr(getattr(gguf, kind), name):
                setattr(getattr(gguf, kind), name, None)


def _run_no_code() -> None:
    """Keeps the families' converters from running code that comes with a model, which some ask transformers for."""
    from transformers import AutoConfig, AutoTokenizer

    for loads in (AutoTokenizer, AutoConfig):
        loads.from_pretrained = partial(_without_code, loads.from_pretrained)


def _without_code(
    load: Any,
    *args: Any,
    trust_remote_code: object = None,  # noqa: ARG001 - what the converter passes is ignored
    local_files_only: object = None,  # noqa: ARG001
    **options: Any,
) -> Any:
    """Loads a tokenizer or a configuration from local files, without code that comes with the model."""
    return load(*args, **options, trust_remote_code=False, local_files_only=True)


def _class_of(conversion: Any, hparams: dict[str, Any]) -> Any:
    """The converter's class for a configuration.

    Raises:
        Refused: It has none, or llama.cpp would compute another model.
    """
    family = conversion.get_model_architecture(hparams, conversion.ModelType.TEXT)
    try:
        known = conversion.get_model_class(family)
    except NotImplementedError:
        raise Refused(f"llama.cpp's converter does not know the family {family}") from None
    if known.model_arch is None:
        raise Refused(f"the package gguf {version('gguf')} does not know the family {family}; a later one may")
    if (why := why_computed_otherwise(family, {**hparams, **hparams.get("text_config", {})})) is not None:
        raise Refused(f"llama.cpp would compute another model: {why}")
    return known


def converter_for(source: Path, file_type: str, tokenizer: Mapping[str, Any], file: Path) -> Any:
    """The converter's object for a folder, with what is added to it here.

    Raises:
        Refused: The converter does not know the family, or cannot read the folder.
    """
    import gguf

    conversion = import_converter()
    _run_no_code()
    hparams = conversion.ModelBase.load_hparams(source, is_mistral_format=False)
    model_class = _class_of(conversion, hparams)
    selector = _type_selector(hparams, file_type, model_class.model_arch)

    class Converted(model_class):  # type: ignore[misc, valid-type]
        """The family's own class, with some of its methods replaced."""

        model_arch = model_class.model_arch
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
            return _fitting_type(selector.select_qtype(new_name, n_dims), self.columns)

        def set_vocab(self) -> None:
            try:
                super().set_vocab()
            except ModuleNotFoundError:  # that of Phi-3 reads tokenizer.model by itself, with the package sentencepiece
                self._set_vocab_sentencepiece()
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


_LARGE = {"Gemma2ForCausalLM": 46, "Gemma3ForCausalLM": 62, "Gemma3ForConditionalGeneration": 62}
"""Layers of the families' models of 27B, whose scale of the scores llama.cpp takes from the hidden size."""


def why_computed_otherwise(family: str, hparams: Mapping[str, Any]) -> str | None:
    """What a model does that llama.cpp does not do in this family, and that a file cannot tell it; None if nothing.

    Published models of these families follow these rules; a changed configuration may not.

    Args:
        family: The class of transformers.
        hparams: The configuration of the text part.
    """
    if family in _LARGE:
        layers, head = hparams["num_hidden_layers"], hparams.get("head_dim", 256)
        if layers == _LARGE[family]:
            head = hparams["hidden_size"] // hparams["num_attention_heads"]
        if (scale := hparams.get("query_pre_attn_scalar", head)) != head:
            return f"query_pre_attn_scalar is {scale}, and it divides scores by the square root of {head}"
        every = 2 if family == "Gemma2ForCausalLM" else 6
        kinds = ["sliding_attention" if number % every else "full_attention" for number in range(1, layers + 1)]
        if (hparams.get("layer_types") or kinds) != kinds:
            return f"layer_types differ from a full attention in every {every}th layer"
    if family == "Qwen3MoeForCausalLM" and not hparams.get("norm_topk_prob"):
        return "norm_topk_prob is false, and it normalizes the weights of the experts"
    return None


def _file_type(name: str) -> Any:
    import gguf

    return gguf.LlamaFileType[f"MOSTLY_{name.upper()}"]


def _type_selector(hparams: Mapping[str, Any], file_type: str, arch: Any) -> Any:
    """What gives each tensor its type; None where all get the same."""
    if file_type in {"f16", "bf16", "q8_0"}:
        return None
    # takes ten seconds of processor time
    selector = import_module("auto_round.export.export_to_gguf.gguf_dtype").GGUFDTypeSelector
    text = {**hparams, **hparams.get("text_config", {})}
    tied = bool(text.get("tie_word_embeddings"))
    return selector(text, _file_type(file_type), arch, has_tied_embeddings=tied)


def _fitting_type(gguf_type: Any, columns: int) -> Any:
    """The type for rows of `columns` numbers, as llama.cpp's quantizer replaces one whose blocks do not divide them."""
    import gguf

    types = gguf.GGMLQuantizationType
    fallbacks = {types.Q2_K: types.Q4_0, types.Q3_K: types.Q4_0, types.Q4_K: types.Q5_0}
    fallbacks |= {types.Q5_K: types.Q5_1, types.Q6_K: types.Q8_0}
    for candidate in (gguf_type, fallbacks.get(gguf_type, types.F16)):
        if columns % gguf.GGML_QUANT_SIZES[candidate][0] == 0:
            return candidate
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
        packed = np.empty((len(values), kind.type_size), dtype=np.uint8)
        _ggml_quantize()(int(kind.qtype), values.ctypes.data, packed.ctypes.data, 0, len(values), kind.block_size, None)
        return packed

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
        blocks = np.concatenate([group.reshape(-1) for group in pool.map(func, groups)])
    return blocks.astype(otype, copy=False).reshape(oshape)


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
    for number in range(len(tokens), rows):  # llama.cpp requires a token for each row of the embedding
        tokens.append(f"[PAD{number}]".encode())
        scores.append(-float(len(ranks)))
        kinds.append(int(gguf.TokenType.UNUSED))
    return tokens, scores, kinds


def try_vocabulary(model: Any, tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """Tries the vocabulary in llama.cpp, and settles how it splits words where the converter does not know that.

    Args:
        model: From `converter_for`.
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
        pairs = _pairs_that_agree(model, tokenizer)
    differing = _differing(pairs, tokenizer["texts"])
    for key, token_id in tokenizer["special"].items():
        pair = pairs.get(f"tokenizer.ggml.{key}_token_id")
        if pair is not None and pair.value != token_id:
            raise Refused(f"its {key} token would be number {pair.value}, but the tokenizer's is {token_id}")
    pre_tokenizer = pairs.get(gguf.Keys.Tokenizer.PRE)
    return {
        "family": gguf.MODEL_ARCH_NAMES[model.model_arch],
        "pre_tokenizer": "" if pre_tokenizer is None else pre_tokenizer.value,
        "differing": differing,
    }


def lost_window(model: Any) -> int | None:
    """The tokens of the model's sliding window, if the file does not have it; None if it does, or there is none.

    llama.cpp has no window for some families, such as Mistral: it attends to all earlier tokens.

    Args:
        model: From `converter_for`; the writer gets the family's parameters.
    """
    window, longest = (model.hparams.get(name) for name in ("sliding_window", "max_position_embeddings"))
    kinds = model.hparams.get("layer_types") or ["sliding_attention"]
    if not window or model.hparams.get("use_sliding_window") is False or "sliding_attention" not in kinds:
        return None
    model.set_gguf_parameters()
    written = any(key.endswith(".attention.sliding_window") for key in model.gguf_writer.kv_data[0])
    return None if written or (longest is not None and window >= longest) else int(window)


def _pairs_that_agree(model: Any, tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    for name in PRE_TOKENIZERS:
        model.pre = name
        pairs = _vocabulary_pairs(model)
        if not _differing(pairs, tokenizer["texts"]):
            return pairs
    raise Refused("none of llama.cpp's pre-tokenizers gives the same tokens as the model's tokenizer")


def _vocabulary_pairs(model: Any) -> dict[str, Any]:
    """The keys and values about the vocabulary, as the converter writes them; `model` is unchanged afterwards."""
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
        with_vocabulary = LlamaCppServer(file, threads=1, context=256)
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
