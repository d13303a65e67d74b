"""GGUF: llama.cpp's files and scores, compared with transformers on the same weights and the same tokenizer."""

from __future__ import annotations

import json
import os
import shutil
import signal
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from job.common import helper_process
from job.common.resources import MainMemory
from job.errors import Preempted, TrainingFailed
from job.export import gguf
from job.export.formats import DerivedInputs
from job.export.gguf import check_gguf, load_gguf, make_gguf, score_in_llama_cpp
from job.export.quantizable import CannotMake
from job.model.load_base import PLAIN, load_base
from job.model.packed_attention import use
from job.model.tokenizer import load_tokenizer
from job.records import ChoiceScore, Question
from tests import warm
from tests.families.models import make_model
from tests.helpers import make_base

QUESTIONS = [
    Question((0, 30, 41, 52, 263, 300), ((7, 8, 9), (310,), (1,), (44, 45))),
    Question((0, 30, 41, 60), ((200,), (201, 202))),
    Question((0, 399, 12, 13, 14, 15, 16, 17), ((5, 6), (5, 7), (90, 91, 92, 93), (188, 189, 190, 210), (151, 152))),
]
"""The last has tokens that are bytes of a character, its first and others."""
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"


def waited(**_: bool) -> None:
    """Nothing ends the job."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy base, in fp32, with a chat template."""
    folder = tmp_path_factory.mktemp("base") / "merged"
    make_base(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def files(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The toy base as 16-bit floats and as 8 bits."""
    folder = tmp_path_factory.mktemp("gguf")
    for kind in ("f16", "q8_0"):
        make_gguf(inputs(base, kind, folder / kind))
    return {kind: folder / kind / f"model-{kind}.gguf" for kind in ("f16", "q8_0")}


def inputs(merged: Path, kind: str, folder: Path) -> DerivedInputs:
    """To make a file of this type."""
    return DerivedInputs(merged, kind, folder, folder / "work", [], torch.device("cpu"), 0, waited)


def scored(file: Path, questions: list[Question], threads: int = 1) -> list[list[ChoiceScore]]:
    """By llama.cpp, loaded for these questions."""
    with load_gguf(file, max_length=64, threads=threads, check_stop=waited) as model:
        return [model.score(question) for question in questions]


def reference(model: Any, questions: list[Question]) -> list[list[ChoiceScore]]:
    """By the job's own scorer, a choice at a time, with transformers' plain attention in fp32."""
    from job.evaluation.scoring import score_sequence

    use(model, PLAIN)
    return score_sequence(model.eval(), questions)


def loaded(folder: Path) -> Any:
    """In fp32."""
    options: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu"), "max_length": 64}
    return load_base(folder, quantization="none", double_quantization=False, **options)


def values(file: Path) -> dict[str, Any]:
    """The keys and values of a file."""
    import gguf as package

    return {name: field.contents() for name, field in package.GGUFReader(file).fields.items()}


def furthest(found: list[list[ChoiceScore]], expected: list[list[ChoiceScore]]) -> float:
    """The greatest difference of a log-likelihood, a token of the choice."""
    return max(
        abs(one.log_likelihood - other.log_likelihood) / len(choice)
        for question, ones, others in zip(QUESTIONS, found, expected, strict=True)
        for choice, one, other in zip(question.choices, ones, others, strict=True)
    )


def test_llama_cpp_scores_as_transformers_does(base: Path, files: dict[str, Path]) -> None:
    """Log-likelihoods and greedy choices are transformers' own on 16 bits, and differ on 8 as the weights do."""
    expected = reference(loaded(base), QUESTIONS)
    found = {kind: scored(file, QUESTIONS) for kind, file in files.items()}
    assert furthest(found["f16"], expected) < 4e-3  # weights and cached keys in 16 bits
    assert 4e-3 < furthest(found["q8_0"], expected) < 0.1
    greedy = [[choice.greedy for choice in choices] for choices in expected]
    assert [[choice.greedy for choice in choices] for choices in found["f16"]] == greedy
    dequantized = AutoModelForCausalLM.from_pretrained(
        files["q8_0"].parent, gguf_file=files["q8_0"].name, dtype=torch.float32
    )
    assert furthest(found["q8_0"], reference(dequantized, QUESTIONS)) < 0.05  # activations in 8 bits


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {}) for family in ("granite", "llama", "olmo2", "qwen3", "smollm3")),
        ("qwen3_moe", {"norm_topk_prob": True}),
    ],
)
def test_llama_cpp_computes_other_families_as_transformers_does(
    base: Path, tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    """The families of the fused layers whose vocabulary may be the toy base's."""
    folder = Path(shutil.copytree(base, tmp_path / "merged"))
    (folder / "model.safetensors").unlink()
    make_model(family, folder, **changes)
    assert check_gguf(folder, waited) == ""
    make_gguf(inputs(folder, "f16", tmp_path / "f16"))
    found = scored(tmp_path / "f16" / "model-f16.gguf", QUESTIONS)
    assert furthest(found, reference(loaded(folder), QUESTIONS)) < 4e-3


def test_a_greedy_choice_is_found(base: Path, files: dict[str, Path]) -> None:
    """What the model would write itself is greedy, and the same with another last token is not."""
    model, context = loaded(base), list(QUESTIONS[0].context)
    use(model, PLAIN)
    ids = model.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False, eos_token_id=-1)[0].tolist()
    best = tuple(ids[len(context) :])
    other = (*best[:-1], best[-1] + 1)
    (found,) = scored(files["f16"], [Question(tuple(context), (best, other))])
    assert [choice.greedy for choice in found] == [True, False]
    assert found[0].log_likelihood > found[1].log_likelihood


def test_a_score_depends_on_its_question_alone(files: dict[str, Path]) -> None:
    """Whatever was asked before, and with any number of threads, a question's scores have the same bits."""
    together = scored(files["q8_0"], [*QUESTIONS, *reversed(QUESTIONS)])
    assert together[:3] == together[:2:-1]
    assert scored(files["q8_0"], QUESTIONS[2:], threads=2) == together[2:3]


def test_sequences_are_scored_by_number(files: dict[str, Path]) -> None:
    """As the job's scorer asks for it: numbers of sequences, in any order, each with its questions' scores."""
    with load_gguf(files["f16"], max_length=64, threads=1, check_stop=waited) as model:
        found = dict(score_in_llama_cpp(model, QUESTIONS, {4: range(2, 3), 1: range(2)}))
    expected = scored(files["f16"], QUESTIONS)
    assert found == {4: expected[2:], 1: expected[:2]}


def test_the_same_folder_gives_the_same_bytes(base: Path, files: dict[str, Path], tmp_path: Path) -> None:
    """A file does not depend on where it was made, so that a restart makes it again."""
    elsewhere = shutil.copytree(base, tmp_path / "other-7b-name")
    made = make_gguf(inputs(elsewhere, "q8_0", tmp_path / "out"))
    assert (tmp_path / "out/model-q8_0.gguf").read_bytes() == files["q8_0"].read_bytes()
    assert (made.method, made.scheme, made.bits, made.layers) == ("gguf", "Q8_0", 8, 16)
    assert made.gguf is not None
    assert set(made.gguf.types) == {"F32", "Q8_0"}
    assert 8.5 <= made.gguf.bits_per_weight < 8.6
    assert not made.gguf.tokenized_otherwise


def test_the_vocabulary_arrives(base: Path, files: dict[str, Path]) -> None:
    """Chat template, special tokens, and that a text begins with the token that the tokenizer puts there."""
    found, tokenizer = values(files["q8_0"]), load_tokenizer(base)
    assert found["tokenizer.chat_template"] == TEMPLATE == tokenizer.chat_template
    assert found["tokenizer.ggml.add_bos_token"] is True
    ids = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == ids
    assert found["general.name"] == "model"


def test_what_is_converted_is_tokenized_alike(base: Path) -> None:
    """Before training: llama.cpp finds a way to split words that gives the tokens of a tokenizer it does not know."""
    assert check_gguf(base, waited) == ""


@pytest.mark.parametrize(("family", "architecture"), [("mistral", "MistralForCausalLM"), ("phi3", "Phi3ForCausalLM")])
def test_a_vocabulary_of_sentencepiece_needs_no_sentencepiece(
    base: Path, tmp_path: Path, family: str, architecture: str
) -> None:
    """A tokenizer such as Mistral's, with bytes for unknown characters: llama.cpp joins in the order of its merges."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(strip)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=390, special_tokens=special, show_progress=False)
    text = "question which is the answer answer it is the one of them the then other"
    backend.train_from_iterator([f"▁{word}" for word in text.split()] * 5, trainer)
    made = json.loads(backend.to_str())
    made["added_tokens"] = made["added_tokens"][:3]  # bytes are tokens of the vocabulary, and no text makes them whole
    backend = Tokenizer.from_str(json.dumps(made))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder = shutil.copytree(base, tmp_path / "spm")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"bos_token_id": 1, "eos_token_id": 2, "model_type": family, "architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer.encode("the answer")) < 8
    assert check_gguf(folder, waited) == ""


class OtherWords:
    """A tokenizer that says of itself something else than what lies in the folder."""

    def __init__(self, tokenizer: Any, **changed: Any) -> None:
        self._tokenizer, self._changed = tokenizer, changed

    def __getattr__(self, name: str) -> Any:
        """What was changed, else the tokenizer's own."""
        return self._changed[name] if name in self._changed else getattr(self._tokenizer, name)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"encode": lambda text: [0, *reversed(text.encode())]}, "none of llama.cpp's pre-tokenizers"),
        ({"eos_token_id": 2}, "its eos token would be number 1, but the tokenizer's is 2"),
    ],
)
def test_another_tokenizer_is_refused_before_training(
    base: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], words: str
) -> None:
    """A tokenizer that llama.cpp does not follow, or another end of sequence, is refused in words."""
    other = OtherWords(load_tokenizer(base), **changed)
    monkeypatch.setattr(gguf, "load_tokenizer", lambda _: other)
    assert words in check_gguf(base, waited)


def test_an_unknown_family_is_refused_before_training(base: Path, tmp_path: Path) -> None:
    """A family that the converter does not know is named."""
    folder = shutil.copytree(base, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"architectures": ["OPTForCausalLM"], "model_type": "opt"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert check_gguf(folder, waited) == "llama.cpp's converter does not know the family OPTForCausalLM"


def test_a_broken_file_is_refused_in_words(tmp_path: Path) -> None:
    """llama.cpp's refusal to load a file ends the job with words."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(TrainingFailed, match=r"could not load model\.gguf: llama\.cpp does not load it"):
        scored(tmp_path / "model.gguf", QUESTIONS)


def test_weights_that_are_not_finite_are_refused(base: Path, tmp_path: Path) -> None:
    """No file is made of a model that diverged."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CannotMake, match="a weight is not finite"):
        make_gguf(inputs(folder, "q8_0", tmp_path / "out"))


def test_a_process_that_is_killed_is_an_error_in_words(files: dict[str, Path]) -> None:
    """llama.cpp may end its process: the job says how, and goes the way of its own errors."""
    with load_gguf(files["q8_0"], max_length=64, threads=1, check_stop=waited) as model:
        model.score(QUESTIONS[1])
        os.kill(warm.HelperProcess.last.pid, signal.SIGKILL)
        with pytest.raises(
            TrainingFailed, match=r"could not score a question: llama\.cpp's process was killed by SIGKILL"
        ):
            model.score(QUESTIONS[1])


def test_a_process_that_is_killed_for_its_memory_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The format is not left out of the results for that: with more main memory it can be made."""
    monkeypatch.setattr(helper_process, "main_memory", lambda: MainMemory(1, 1, oom_kills=2))
    process: Any = SimpleNamespace(wait=lambda: -signal.SIGKILL)
    helper = helper_process.HelperProcess(process, BytesIO(), BytesIO(), BytesIO(), kills=1)
    with pytest.raises(TrainingFailed, match=r"memory ran out while llama\.cpp was at work"):
        next(gguf._Answers(helper, waited))


def test_waiting_is_bounded_and_lets_the_job_end(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that answers nothing ends the job after some time, and a stop request ends the wait at once."""
    stopped = False

    def check_stop(*, progress: bool = True) -> None:
        if stopped and not progress:
            raise Preempted("stop")

    with load_gguf(files["q8_0"], max_length=64, threads=1, check_stop=check_stop) as model:
        monkeypatch.setattr(gguf, "_POLL_SECONDS", 0.05)
        monkeypatch.setattr(gguf, "_STALLED_SECONDS", 0.2)
        os.kill(warm.HelperProcess.last.pid, signal.SIGSTOP)
        with pytest.raises(TrainingFailed, match="has not answered for"):
            model.score(QUESTIONS[1])
        stopped = True
        with pytest.raises(Preempted):
            model.score(QUESTIONS[1])


def test_k_quants_are_mixed_as_llama_cpp_mixes_them(tmp_path: Path) -> None:
    """Four bits with more for sensitive tensors: the output layer has six, and so has every second value projection."""
    from transformers import MistralConfig, MistralForCausalLM

    make_base(tmp_path / "base")
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "head_dim": 64}
    config = MistralConfig(vocab_size=400, num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, **shape)
    MistralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    made = make_gguf(inputs(tmp_path / "base", "q4_k_m", tmp_path / "out")).gguf
    assert made is not None
    assert set(made.types) == {"F32", "Q4_K", "Q6_K"}
    assert made.types["Q4_K"] > made.types["Q6_K"]
    import gguf as package

    found = {t.name: t.tensor_type.name for t in package.GGUFReader(tmp_path / "out/model-q4_k_m.gguf").tensors}
    assert found["output.weight"] == "Q6_K"
    assert found["token_embd.weight"] == "Q4_K"
    sensitive = [found[f"blk.{layer}.attn_v.weight"] for layer in range(8)]
    assert sensitive == ["Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q6_K"]
    with load_gguf(tmp_path / "out/model-q4_k_m.gguf", max_length=64, threads=1, check_stop=waited) as model:
        assert model.score(QUESTIONS[1])[0].log_likelihood < 0
