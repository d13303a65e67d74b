"""llama.cpp's scores: what it returns for a probability of zero."""

from __future__ import annotations

from typing import Any

import pytest

from job.export.llama_cpp_server import MIN_LOG_LIKELIHOOD, LlamaCppServer


def test_a_probability_of_zero_is_the_least_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp tells the lowest number of fp32 for a probability that is zero in it; a score can still be compared."""

    class Server:
        """Answers as llama.cpp does."""

        def handle_completions(self, asked: dict[str, Any]) -> dict[str, Any]:
            """The forced token, of probability zero."""
            ((token, _),) = asked["logit_bias"]
            content = [{"id": token, "logprob": -3.4028234663852886e38, "top_logprobs": [{"id": 3, "logprob": -0.1}]}]
            usage = {"prompt_tokens": len(asked["prompt"])}
            return {"choices": [{"logprobs": {"content": content}}], "usage": usage}

    served = object.__new__(LlamaCppServer)
    monkeypatch.setattr(served, "_server", Server(), raising=False)
    total, greedy = served.score([0, 5], [7, 8], anew=True)
    assert total == 2 * MIN_LOG_LIKELIHOOD
    assert -104 < MIN_LOG_LIKELIHOOD < -103
    assert greedy is False
