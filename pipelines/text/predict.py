"""Continue prompts with a trained model: text in, text out, shown while it comes."""

from __future__ import annotations

import codecs
import sys
from typing import Any

from ...zoo import generate_tokens
from ..errors import UserError
from .answers import Answer
from .module import LanguageModule
from .sources import name_bytes
from .tokenizer import saved_tokenizer

_OPTIONS = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def continue_prompts(module: LanguageModule, task: dict[str, Any], *, seed: int) -> list[dict[str, Any]]:
    """One record per prompt: prompt, continuation, tokens; where one is not UTF-8, its bytes in hexadecimal too. A
    single one is written to the terminal as it comes.

    Raises UserError, before anything is computed, for a prompt that the model cannot read and options out of range.
    """
    if module.task["objective"] == "masked":
        raise UserError("this model learned masked tokens; it cannot continue a text")
    tokenizer = saved_tokenizer(module.schema)
    given = task["prompt"]
    prompts = [name_bytes(p) for p in ([given or ""] if given is None or isinstance(given, str) else map(str, given))]
    encoded = [[tokenizer.separator, *tokenizer.encode(p).tolist()] for p in prompts]
    stops = [name_bytes(str(s)) for s in ([task["stop"]] if isinstance(task["stop"], str) else task["stop"])]
    answers = [Answer(tokenizer, stops, tokens) for tokens in encoded]
    options: dict[str, Any] = {key: task[key] for key in _OPTIONS}
    drawn, ended = [0] * len(prompts), [False] * len(prompts)

    def met(row: int, token: int) -> bool:
        drawn[row] += 1
        ended[row] = token == tokenizer.separator or answers[row].add(token)
        return ended[row]

    try:
        steps = generate_tokens(module.net, encoded, stop_when=met, seed=seed, **options)
    except ValueError as error:
        raise UserError(str(error)) from None
    shown = codecs.getincrementaldecoder("utf-8")("replace")
    for _ in steps:
        if len(prompts) == 1:
            if drawn[0] == 1:  # only now: what is logged while the prompt is read stands above it
                _write(prompts[0].decode("utf-8", "replace"))
            _write(shown.decode(answers[0].take()))
    for answer in answers:
        answer.finish()
    if len(prompts) == 1:
        _write(shown.decode(answers[0].take(), final=True))
    short = [i for i, number in enumerate(drawn) if number < options["max_new_tokens"] and not ended[i]]
    if short:
        which = "" if len(prompts) == 1 else f"; continuations {', '.join(map(str, short))} end there"
        _write(f"\n(the model has no positions for more than {max(drawn[i] for i in short)} new tokens{which})")
    return [_record(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def _record(prompt: bytes, answer: Answer) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, content in (("prompt", prompt), ("continuation", answer.text)):
        found[name] = content.decode("utf-8", "replace")
        if found[name].encode() != content:
            found[f"{name}_hex"] = content.hex()
    return {**found, "tokens": answer.tokens}


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
