"""The size of questions in tokens: counted for a plan, and checked against what the model can read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from operator import itemgetter
from typing import Any

from job.errors import DataError, Problem
from job.evaluation.scorer import BATCH_TOKENS
from job.evaluation.scoring import reads_of, tokens_to_compute
from job.evaluation.task_metrics import generation_options
from job.evaluation.task_names import MULTIPLE_CHOICE
from job.evaluation.tasks import Tasks, compiled_once, question_id, restart_examples, text_parts
from job.records import Question

MAX_CHOICES = 1_000
"""Of one question."""
MAX_BYTES = 1 << 20
"""Of one question with its choices, as a row."""
_SLACK_BYTES = 512
"""What a task's template may add to a row, and a tokenizer to its bytes."""


@compiled_once()
def count_questions(tasks: Tasks, tokenizer: Any, limit: int | None) -> tuple[int, int, int, int, int]:
    """(questions, tokens in packed sequences, positions at which logits are needed), without scoring anything.

    Behind them: of the longest prompt with a generated answer its tokens, and with the answer; 0 where there is none.
    Of a generated answer the most tokens are counted.

    Raises:
        DataError: The tokenizer makes no tokens of a question or a choice.
    """
    count = tokens = reads = 0
    answered = (0, 0)
    questions: list[Question] = []
    for task in tasks.loaded["tasks"].values():
        restart_examples(task)
        for doc in islice(task.eval_docs, limit):
            if task.OUTPUT_TYPE != MULTIPLE_CHOICE:
                context, answer = _sizes(task, doc, tokenizer, _prompts(task, doc))
                count, tokens, reads = count + 1, tokens + context + answer, reads + answer
                if task.OUTPUT_TYPE == "generate_until":
                    answered = max(answered, (context, context + answer), key=itemgetter(1))
                continue
            scored = _scored(task, doc, tokenizer)
            if not all(question.context and all(question.choices) for question in scored):
                what = "the tokenizer returns no tokens for a part of it"
                raise DataError([Problem(f"question {question_id(doc, count)}", what)])
            count += 1
            questions += scored
    tokens += tokens_to_compute(questions, BATCH_TOKENS)
    return count, tokens, reads + sum(map(reads_of, questions)), *answered


@compiled_once()
def check_lengths(
    tasks: Tasks, tokenizer: Any, *, limit: int | None, max_length: int, cut: bool, vocabulary: int | None
) -> None:
    """Refuses questions that the model cannot score: too long with a choice, too many choices, unknown tokens.

    A token has at least one byte, so most questions are known to fit without being rendered.

    Args:
        tasks: From `load_tasks`.
        tokenizer: The model's.
        limit: Number of questions of each task, from the first; None for all.
        max_length: The most tokens of a question with one of its choices, which is also that of a training example.
        cut: Whether a longer question loses its beginning, as lm-eval has it, instead of being refused.
        vocabulary: Rows of the model's embedding; None if that is not known.

    Raises:
        DataError: With the first 20 of them, and their number.
    """
    problems: list[Problem] = []
    vocabulary_size = len(tokenizer) if vocabulary is None else vocabulary
    for name, task in tasks.loaded["tasks"].items():
        extra = len(str(task.config.description or "").encode()) + _SLACK_BYTES
        restart_examples(task)
        for number, doc in enumerate(islice(task.eval_docs, limit)):
            size = len(json.dumps(doc, default=str, ensure_ascii=False).encode(errors="surrogatepass"))
            message = None
            if task.OUTPUT_TYPE != MULTIPLE_CHOICE or task.config.num_fewshot:
                message = _too_large(task, doc, size) or _does_not_fit(
                    task, doc, tokenizer, max_length, vocabulary_size, cut=cut
                )
                if task.OUTPUT_TYPE == MULTIPLE_CHOICE:
                    message = message or _unknown_token(task, doc, tokenizer, vocabulary_size)
            elif size + extra > max_length or vocabulary_size < len(tokenizer):
                message = _too_large(task, doc, size) or _too_long(task, doc, tokenizer, max_length, cut=cut)
                message = message or _unknown_token(task, doc, tokenizer, vocabulary_size)
            if message is not None:
                problems.append(Problem(f"{tasks.sources[name]} question {question_id(doc, number)[:80]}", message))
    if problems:
        raise DataError(problems)


def _scored(task: Any, doc: Any, tokenizer: Any) -> list[Question]:
    """What is scored of a question with choices: one for each of its contexts."""
    contexts, endings = text_parts(task, doc)
    if task.config.num_fewshot or task.config.description or task.config.gen_prefix:
        contexts = _prompts(task, doc)  # elsewhere it would give the same, slower
    choices = tuple(_ending(tokenizer, ending) for ending in endings)
    return [Question(tuple(tokenizer.encode(context)), choices) for context in contexts]


def _ending(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The tokens of a choice, or of another text that is predicted behind a prompt."""
    return tuple(tokenizer.encode(f" {text}", add_special_tokens=False))


def _prompts(task: Any, doc: Any) -> list[str]:
    """What a question is asked with, its examples in front: one text, or one for each choice (see `text_parts`).

    Each call draws the next examples, so there must be one for each question, in order.
    """
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return [str(task.doc_to_target(doc))]
    prompt = task.fewshot_context(doc, num_fewshot=task.config.num_fewshot or 0)
    return [str(text) for text in prompt] if isinstance(prompt, list) else [str(prompt)]


def _sizes(task: Any, doc: Any, tokenizer: Any, prompts: Sequence[str]) -> tuple[int, int]:
    """Tokens of the longest prompt, and the most that are predicted after it."""
    context = max(len(tokenizer.encode(prompt)) for prompt in prompts)
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return 0, context
    if task.OUTPUT_TYPE == "generate_until":
        return context, generation_options(task.task_name, task.config.generation_kwargs or {}).max_new_tokens
    endings = text_parts(task, doc)[1] if task.OUTPUT_TYPE == MULTIPLE_CHOICE else [str(task.doc_to_target(doc))]
    return context, max(len(_ending(tokenizer, ending)) for ending in endings)


def _does_not_fit(task: Any, doc: Any, tokenizer: Any, max_length: int, vocabulary: int, *, cut: bool) -> str | None:
    """A message if a prompt with its answer is too long or empty, or has an unknown token, else None.

    A text whose perplexity is measured may have any length: it is read in windows.
    """
    prompts = _prompts(task, doc)
    tokens = [tokenizer.encode(prompt) for prompt in prompts]
    if not all(tokens) or not all(prompts):
        return "is empty"
    if (beyond := max(map(max, tokens))) >= vocabulary:
        return f"has the token number {beyond}, and the model has embeddings of {vocabulary} tokens"
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return None
    context, answer = _sizes(task, doc, tokenizer, prompts)
    if answer >= max_length:
        return f"may be answered with {answer} tokens, {max_length} are allowed with the prompt (JOB_TRAIN__MAX_LENGTH)"
    if context + answer <= max_length or cut:
        return None
    remedy = "JOB_EVAL__LONG_QUESTIONS=cut cuts off their beginning, as lm-eval does"
    what = f"is {context} tokens long and may be answered with {answer}, {max_length} are allowed in all"
    return f"{what} (JOB_TRAIN__MAX_LENGTH); {remedy}"


def _too_large(task: Any, doc: Any, size: int) -> str | None:
    """Why tokenizing a question would take minutes, as a message; None if it would not."""
    if size > MAX_BYTES:
        return f"has {size:,} bytes, {MAX_BYTES:,} are the most"
    count = len(task.doc_to_choice(doc)) if task.OUTPUT_TYPE == MULTIPLE_CHOICE else 0
    return f"has {count:,} choices, {MAX_CHOICES:,} are the most" if count > MAX_CHOICES else None


def _too_long(task: Any, doc: Any, tokenizer: Any, max_length: int, *, cut: bool) -> str | None:
    """A message if a question has more tokens than are allowed, else None."""
    contexts, endings = text_parts(task, doc)
    ending = max(endings, key=len)
    texts = [ending] if cut else [f"{context} {ending}" for context in contexts]
    longest = max(len(tokenizer.encode(text)) for text in texts)
    if longest <= max_length:
        return None
    remedy = "" if cut else "; JOB_EVAL__LONG_QUESTIONS=cut cuts off their beginning, as lm-eval does"
    return f"is {longest} tokens long with its longest choice, {max_length} are allowed (JOB_TRAIN__MAX_LENGTH){remedy}"


def _unknown_token(task: Any, doc: Any, tokenizer: Any, vocabulary: int) -> str | None:
    """A message if a question has a token without an embedding in the model, else None."""
    tokens = {token for texts in text_parts(task, doc) for text in texts for token in tokenizer.encode(text)}
    if (beyond := max(tokens, default=0)) < vocabulary:
        return None
    word = tokenizer.convert_ids_to_tokens(beyond)
    return f"has the token {word!r} (number {beyond}), and the model has embeddings of {vocabulary} tokens"
