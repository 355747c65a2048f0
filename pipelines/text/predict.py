"""Continue prompts with a trained model: text in, text out, shown while it comes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from ...zoo import generate_tokens
from ..errors import UserError
from .module import LanguageModule
from .tokenizer import Tokenizer, create_tokenizer

_OPTIONS = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def tokenizer_of(schema: dict[str, Any]) -> Tokenizer:
    """The tokenizer that a model was trained with. Raises UserError when the file is another one now."""
    tokenizer = create_tokenizer(schema["tokenizer"])
    if tokenizer.key != schema["tokenizer_key"]:
        raise UserError(
            f"data.tokenizer={schema['tokenizer']} is {tokenizer.key} now, "
            f"the model was trained with {schema['tokenizer_key']}"
        )
    return tokenizer


def continue_prompts(module: LanguageModule, task: dict[str, Any], *, seed: int) -> list[dict[str, Any]]:
    """One record per prompt: prompt, continuation, tokens. A single one is written to the terminal as it comes."""
    if module.task["objective"] == "masked":
        raise UserError("this model learned masked tokens; it cannot continue a text")
    tokenizer = tokenizer_of(module.schema)
    given = task["prompt"]
    prompts: Sequence[str] = [given or ""] if given is None or isinstance(given, str) else list(map(str, given))
    encoded = [[tokenizer.separator, *tokenizer.encode(_bytes(p)).tolist()] for p in prompts]
    stops = [tokenizer.encode(_bytes(s)).tolist() for s in task["stop"]]
    options = {key: task[key] for key in _OPTIONS}
    found: list[list[int]] = [[] for _ in prompts]
    shown, begun = 0, False
    try:
        steps = generate_tokens(
            module.net, encoded, stop=stops, stop_tokens=[tokenizer.separator], seed=seed, **options
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    for step in steps:
        for row, token in enumerate(step.tokens.tolist()):
            if token >= 0:
                found[row].append(token)
        for row, cut in enumerate(step.stop_len.tolist()):
            if cut:
                del found[row][-cut:]
        if len(prompts) == 1:
            if not begun:  # only now: what is logged while the prompt is read stands above it
                print(prompts[0], end="")
                begun = True
            shown = _show(tokenizer, found[0], shown)
    texts = [tokenizer.decode(tokens).decode("utf-8", "replace") for tokens in found]
    if len(prompts) == 1:
        sys.stdout.write(texts[0][shown:])
    return [
        {"prompt": prompt, "continuation": text, "tokens": len(tokens)}
        for prompt, text, tokens in zip(prompts, texts, found, strict=True)
    ]


def _show(tokenizer: Tokenizer, tokens: list[int], shown: int) -> int:
    """Write what is new of the text, up to its last whole character; returns the characters written so far."""
    text = tokenizer.decode(tokens).decode("utf-8", "replace").rstrip("\ufffd")
    sys.stdout.write(text[shown:])
    sys.stdout.flush()
    return max(shown, len(text))


def _bytes(text: str) -> bytes:
    """As typed: what the shell could not decode comes back as the bytes it was."""
    return text.encode("utf-8", "surrogateescape")
