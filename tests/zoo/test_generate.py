"""Generation: the stream equals the full forward, rows stay what they are alone, filters are those of the papers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from seqzoo import create_model, generate, generate_tokens
from seqzoo.blocks.protocol import state_elements
from seqzoo.blocks.registry import list_mixers, mixer_info
from seqzoo.blocks.sequence_model import SequenceOutput
from seqzoo.blocks.testing import find_subjects
from seqzoo.zoo import _sampling as sampling
from seqzoo.zoo._language import LanguageModel

STREAMING = list_mixers(pattern="causal", streaming=True)
FIRST = {name: next(s for s in find_subjects(name) if s.pattern == "causal") for name in STREAMING}
WINDOW = {"name": "softmax", "num_heads": 2, "position": "rope", "window_size": 5, "num_sinks": 2}
MAMBA = {"name": "mamba2", "d_state": 4, "head_dim": 8, "chunk_size": 4}
CASES = {name: {"name": name, **{k: v for k, v in s.options.items() if k != "causal"}} for name, s in FIRST.items()} | {
    "window": WINDOW,
    "hybrid": [MAMBA, WINDOW],
    "hybrid_full": ["gla", {"name": "softmax", "num_heads": 2, "position": "alibi"}],
}
GROWING = {"softmax", "bi_level_routing", "hybrid_full"}
LENGTHS = (11, 3, 6, 1)


def language_model(mixer, **options):
    """Random weights, away from the start, at which logits hardly depend on what was read."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = LanguageModel(
            **{
                "vocab_size": 40,
                "dim": 16,
                "depth": 2,
                "mixer": mixer,
                "tie_embeddings": False,
                "embedding_std": 0.5,
                **options,
            }
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def prompts(lengths=LENGTHS, vocab=40):
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(vocab, (n,), generator=generator) for n in lengths]


def rows_of(steps):
    return [[t for t in row if t >= 0] for row in torch.stack([s.tokens for s in steps], 1).tolist()]


class Counter(nn.Module):
    """After t comes t + 1, modulo the vocabulary, by a wide margin, else the lowest id. Notes the shapes it reads."""

    def __init__(self, vocab_size=10):
        super().__init__()
        self.vocab_size, self.shapes = vocab_size, []

    def init_state(self, batch_size, *, max_len=None, device=None, dtype=None):
        self.bound = max_len
        return torch.zeros(batch_size, dtype=torch.int64)

    def forward(self, tokens, *, mask=None, state=None):
        self.shapes.append(tuple(tokens.shape))
        logits = 40.0 * torch.nn.functional.one_hot((tokens + 1) % self.vocab_size, self.vocab_size)
        logits = logits + 5 - 0.1 * torch.arange(self.vocab_size)
        return SequenceOutput(logits, state + tokens.shape[1], {})


# --- the stream


@pytest.mark.parametrize("name", CASES)
def test_the_stream_is_the_full_forward(name):
    """Logits of every step against one forward over prompt and answer, for any chunks of the prompt."""
    model, prompt = language_model(CASES[name]), prompts((16,))[0]
    found = []
    for chunk in (1, 7, 2048):
        steps = list(generate_tokens(model, prompt, max_new_tokens=9, temperature=0, prefill_chunk=chunk))
        (new,) = rows_of(steps)
        with torch.no_grad():
            full = model(torch.cat((prompt, torch.tensor(new)))[None]).y[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(torch.cat([s.logits for s in steps]), full, atol=1e-4, rtol=0)
        assert new == full.argmax(-1).tolist() and len(new) == 9
        found.append(new)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("name", CASES)
def test_a_row_of_a_batch_is_what_it_is_alone(name):
    """Greedy and sampled, prompts of different lengths in chunks that some do not reach, a row that ends early."""
    model, batch = language_model(CASES[name]), prompts()
    for options in ({"temperature": 0.0}, {"temperature": 1.5, "top_p": 0.95, "repetition_penalty": 1.2}):
        options |= {"max_new_tokens": 7, "prefill_chunk": 4, "max_len": 12}
        together = generate(model, batch, seed=7, **options)
        alone = [generate(model, row, seed=7 + i, **options)[0] for i, row in enumerate(batch)]
        assert [r.tolist() for r in together] == [r.tolist() for r in alone]
        assert [len(r) for r in together] == [2, 7, 7, 7] and together[0].dtype == torch.int64


@pytest.mark.parametrize("name", [n for n in CASES if n not in GROWING])
def test_a_fixed_state_does_not_grow(name):
    model, sizes = language_model(CASES[name]), []
    model.backbone.register_forward_hook(lambda module, args, out: sizes.append(state_elements(out.state)))
    generate(model, prompts((40,)), max_new_tokens=30, prefill_chunk=8)
    assert len(sizes) == 5 + 29 and set(sizes) == {model.state_size(1)}


def test_every_growing_state_is_known():
    """So that a mixer whose state begins to grow is seen."""
    grow = {n for n in CASES if (m := language_model(CASES[n])).state_size(70) != m.state_size(1)}
    assert grow == GROWING


def test_the_registry_is_covered():
    assert {"softmax", "mamba2", "gla", "mega", "long_vq"} <= set(STREAMING) <= set(CASES)
    assert all("causal" in mixer_info(n).patterns for n in STREAMING)


def test_registered_hybrids_continue_bytes():
    model = create_model("hybrid_tiny", dim=32, depth=4)
    one = generate(model, [b"import os", b"x"], max_new_tokens=5, seed=0)
    assert [len(row) for row in one] == [5, 5] and all(0 <= t < 256 for row in one for t in row.tolist())


# --- batches, stops, ends


def test_a_stop_is_found_across_steps_and_cut():
    model = Counter()
    new = generate(model, [[3], [8], [5]], stop=[(6, 7), [0]], stop_tokens=[2], max_new_tokens=20)
    assert [row.tolist() for row in new] == [[4, 5], [9], []]
    # The third met 6, 7 in its second step, the second 0 in its second, the first 6, 7 in its fourth.
    steps = list(generate_tokens(model, [[3], [8], [5]], stop=[(6, 7), [0]], max_new_tokens=20))
    assert [s.tokens.tolist() for s in steps] == [[4, 9, 6], [5, 0, 7], [6, -1, -1], [7, -1, -1]]
    assert [s.running.tolist() for s in steps] == [[True] * 3, [True, False, False], [True, False, False], [False] * 3]
    assert [s.stop_len.tolist() for s in steps] == [[0, 0, 0], [0, 1, 2], [0, 0, 0], [2, 0, 0]]
    assert [tuple(s.logits.shape) for s in steps] == [(3, 10), (3, 10), (1, 10), (1, 10)]


def test_of_two_stops_the_longer_is_cut_and_a_prompt_holds_no_stop():
    model = Counter()
    assert generate(model, [3], stop=[(6,), (5, 6), (4, 6)])[0].tolist() == [4]
    assert generate(model, [3, 4], stop=[(4, 5)], max_new_tokens=3)[0].tolist() == [5, 6, 7]
    assert generate(model, [3], stop=[(5, 4)], max_new_tokens=4)[0].tolist() == [4, 5, 6, 7]  # never met


def test_rows_that_ended_are_not_computed():
    model = Counter()
    generate(model, [[1], [7], [8, 9, 0, 1, 2]], stop_tokens=[9, 5], max_new_tokens=4, prefill_chunk=2)
    # Three chunks of all rows (the state's size is unknown), then two rows after 8 -> 9 and 2 -> 3 ...
    assert model.shapes == [(3, 2), (3, 2), (3, 1), (3, 1), (2, 1), (1, 1)]


def test_prompts_that_ended_are_left_out_of_prefill_where_the_state_allows():
    for name, rows in (("gla", [4, 2, 1]), ("softmax", [4] * 3)):
        model, seen = language_model(CASES[name]), []
        model.backbone.register_forward_hook(lambda module, args, out, seen=seen: seen.append(args[0].shape[0]))
        generate(model, prompts(), max_new_tokens=1, prefill_chunk=4)
        assert seen == rows


def test_the_head_reads_last_tokens_only():
    model, shapes = language_model("gla"), []
    model.model.head.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    generate(model, prompts((9, 30)), max_new_tokens=3, prefill_chunk=8)
    assert shapes == [(2, 1, 40)] * 3


def test_rows_end_where_positions_do():
    """The last new token is not read: a table of 12 holds a prompt of 9 and three new tokens, and gives four."""
    model = language_model("softmax", position="learned", max_len=12)
    new = generate(model, prompts((9, 12, 4)), max_new_tokens=30)
    assert [len(row) for row in new] == [4, 1, 9]
    assert [len(row) for row in generate(model, prompts((9, 8)), max_new_tokens=30, max_len=9)] == [1, 2]
    with pytest.raises(
        ValueError, match=r"prompt 1 has 13 tokens, but the model's learned positions end at max_len=12"
    ):
        generate(model, prompts((9, 13)))
    full = language_model({"name": "mega", "chunk_size": None, "max_len": 12, "d_state": 2})
    assert [len(row) for row in generate(full, prompts((9, 4)), max_new_tokens=30)] == [4, 4]
    with pytest.raises(ValueError, match="prompt 0 has 13 tokens, but the model's relative bias ends at max_len=12"):
        generate(full, prompts((13,)))


def test_max_len_reaches_the_state_with_room_for_pads():
    """Row 1 may read 6, but stands beside a prompt of 5: its four steps end at slot 5 + 4 of a growing cache."""
    model = Counter()
    assert [len(r) for r in generate(model, [[1] * 5, [1, 2]], max_len=6, temperature=0)] == [2, 5]
    assert model.bound == 5 + 4
    assert [len(r) for r in generate(language_model("softmax"), prompts((5, 2)), max_len=6)] == [2, 5]


# --- seeds and modes


def test_seeds():
    model, batch = language_model("gla"), prompts((4, 4))
    batch[1] = batch[0]
    first, second = generate(model, batch, seed=3, max_new_tokens=20)
    again = generate(model, batch, seed=3, max_new_tokens=20)
    assert torch.equal(first, again[0]) and torch.equal(second, again[1]) and not torch.equal(first, second)
    other, same = generate(model, batch, seed=[9, 3], max_new_tokens=20)
    assert torch.equal(same, first) and not torch.equal(other, first)
    torch.manual_seed(5)
    free = [generate(model, batch[0], max_new_tokens=20)[0] for _ in range(2)]
    torch.manual_seed(5)
    assert torch.equal(free[0], generate(model, batch[0], max_new_tokens=20)[0]) and not torch.equal(*free)


def test_modes_are_restored_and_dropout_is_off():
    model = language_model("gla", proj_drop=0.5).train()
    model.backbone.blocks[1].eval()
    modes = [m.training for m in model.modules()]
    want = [r.tolist() for r in generate(model.eval(), prompts(), seed=0, max_new_tokens=6)]
    model.train()
    model.backbone.blocks[1].eval()
    found = []
    for step in generate_tokens(model, prompts(), seed=0, max_new_tokens=6):
        assert [m.training for m in model.modules()] == modes and torch.is_grad_enabled()
        assert not step.logits.requires_grad
        found.append(step)
    assert rows_of(found) == want


def test_bfloat16_weights():
    """Logits near those of the same weights in float32, and chosen from in float32."""
    model = create_model("hybrid_tiny").eval().bfloat16()
    wide = create_model("hybrid_tiny").eval()
    wide.load_state_dict(model.state_dict())
    steps = list(generate_tokens(model, [[1, 2, 3], [4]], max_new_tokens=4, prefill_chunk=2, seed=1, top_p=0.9))
    assert all(s.logits.dtype == torch.float32 for s in steps)
    new = torch.tensor(rows_of(steps)[0])
    with torch.no_grad():
        want = wide(torch.cat((torch.tensor([1, 2, 3]), new))[None]).y[0, 2:-1]
    got = torch.stack([s.logits[0] for s in steps])
    assert float((got - want).norm() / want.norm()) < 2e-2


# --- choosing a token

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [math.log(0.4), math.log(0.1), math.log(0.3), math.log(0.2)]])


def test_filters_by_hand():
    """The second row is 0.4, 0.1, 0.3, 0.2 in probabilities."""
    a, b = LOGITS
    assert sampling.keep_top_k(LOGITS, 2).isfinite().tolist() == [
        [True, True, False, False],
        [True, False, True, False],
    ]
    assert sampling.keep_top_k(torch.tensor([[1.0, 1.0, 0.0]]), 1).isfinite().tolist() == [[True, True, False]]
    assert torch.equal(sampling.keep_top_k(LOGITS, 9), LOGITS)
    for p, kept in ((0.39, "1000"), (0.41, "1010"), (0.69, "1010"), (0.71, "1011"), (0.91, "1111"), (1e-9, "1000")):
        assert sampling.keep_top_p(b[None], p).isfinite().tolist() == [[k == "1" for k in kept]]
    assert torch.equal(sampling.keep_top_p(LOGITS, 1), LOGITS)
    for p, kept in ((0.76, "1000"), (0.74, "1010"), (0.51, "1010"), (0.49, "1011"), (0.24, "1111"), (1.0, "1000")):
        assert sampling.keep_min_p(b[None], p).isfinite().tolist() == [[k == "1" for k in kept]]
    assert torch.equal(sampling.keep_min_p(LOGITS, 0), LOGITS)
    seen = torch.tensor([[True, False, False, True]])
    assert sampling.penalized(a[None], seen, 2.0).tolist() == [[1.0, 1.0, 0.0, -2.0]]
    torch.testing.assert_close(sampling.heated(a[None], 0.5), torch.tensor([[0.0, -2.0, -4.0, -6.0]]))
    assert sampling.heated(a[None], 1e-300).softmax(-1).tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_draws_follow_the_probabilities():
    """A grid of 1000 uniforms gives each token as often as its probability says, and none of probability 0."""
    uniform = (torch.arange(1000) + 0.5) / 1000
    logits = torch.tensor([0.0, 0.4, 0.1, 0.0, 0.5, 0.0]).log().expand(1000, 6)
    assert sampling.draw(logits, uniform).bincount(minlength=6).tolist() == [0, 400, 100, 0, 500, 0]
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert sampling.draw(logits[:2], ends).tolist() == [1, 4]


def test_a_parallel_sum_that_jitters_draws_nothing_impossible(monkeypatch):
    """As if rounding had left a gap in the sum where a filtered token stands."""
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda tensor, dim: torch.tensor([[0.5, 0.6, 1.0]]))
    logits = torch.tensor([[0.0, -math.inf, 0.1]])
    assert sampling.draw(logits, torch.tensor([0.55])).tolist() == [2]


def test_greedy_takes_the_likeliest_after_the_penalty():
    logits, seen = torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[False, True, False]])
    assert sampling.Sampling(0.0).choose(logits, None, None).tolist() == [1]
    assert sampling.Sampling(0.0, repetition_penalty=2.0).choose(logits, None, seen).tolist() == [2]
    model = Counter()
    assert generate(model, [3], temperature=0, max_new_tokens=2)[0].tolist() == [4, 5]
    assert generate(model, [3, 5, 4], temperature=0, repetition_penalty=1e9, max_new_tokens=1)[0].tolist() == [0]


def test_the_penalty_counts_prompt_and_answer():
    """Against a loop over full forwards that penalises the set of tokens so far; without it the row repeats itself."""
    model, prompt = language_model("gla"), prompts((23,))[0]
    row = prompt.tolist()
    for _ in range(9):
        with torch.no_grad():
            logits = model(torch.tensor([row])).y[0, -1]
        for token in set(row):
            logits[token] = logits[token] * 1.8 if logits[token] < 0 else logits[token] / 1.8
        row.append(int(logits.argmax()))
    beside = [prompt[:4], prompt]  # so that a row's tokens are not those of another
    assert generate(model, beside, temperature=0, repetition_penalty=1.8, max_new_tokens=9)[1].tolist() == row[23:]
    plain = generate(model, prompt, temperature=0, max_new_tokens=9)[0].tolist()
    assert len(set(plain)) < len(set(row[23:]))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8, "temperature": 1.7, "top_k": 20, "top_p": 0.7, "min_p": 0.05},
        {"repetition_penalty": 1.5, "temperature": 0.5, "top_k": 9, "top_p": 0.95, "min_p": 0.2},
    ],
)
def test_filters_are_those_of_transformers(options, monkeypatch):
    """Probabilities after all filters, in the order in which transformers' `generate` builds them."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.generation import logits_process as theirs

    logits, rows = 3 * torch.randn(64, 50), torch.randint(50, (64, 12))
    chain = [
        (theirs.RepetitionPenaltyLogitsProcessor, "repetition_penalty"),
        (theirs.TemperatureLogitsWarper, "temperature"),
        (theirs.TopKLogitsWarper, "top_k"),
        (theirs.TopPLogitsWarper, "top_p"),
        (theirs.MinPLogitsWarper, "min_p"),
    ]
    want = logits
    for step, name in chain:
        if name in options:
            want = step(options[name])(rows, want)
    found = []
    monkeypatch.setattr(sampling, "draw", lambda scores, uniform: found.append(scores))
    seen = torch.zeros(64, 50, dtype=torch.bool).scatter(1, rows, True)
    sampling.Sampling(**options).choose(logits, torch.zeros(64), seen)
    assert torch.equal(found[0].isfinite(), want.isfinite())
    torch.testing.assert_close(found[0].softmax(-1), want.softmax(-1), atol=1e-6, rtol=1e-5)


# --- bad input

MODELS = {
    "counter": Counter,
    "linear": lambda: nn.Linear(2, 2),
    "masked": lambda: create_model("prob_sparse_tiny"),
    "both sides": lambda: create_model("mamba_tiny", causal=False),
}


@pytest.mark.parametrize(
    ("model", "prompt", "options", "message"),
    [
        ("linear", [1], {}, "Linear is no language model: generate needs `vocab_size`"),
        ("masked", [1], {}, r"block 0 of this LanguageModel is ProbSparseAttention with the pattern 'self', .* gla,"),
        ("both sides", [1], {}, "block 0 of this LanguageModel is Mamba.* with the pattern 'self', which carries no"),
        ("counter", [], {}, "prompts is an empty list; give at least one prompt"),
        ("counter", [[1], []], {}, "prompt 1 is empty; give at least one token, such as the separator"),
        ("counter", torch.zeros(0, dtype=torch.int64), {}, "prompt 0 is empty"),
        ("counter", b"", {}, "prompt 0 is empty"),
        ("counter", "text", {}, "prompts is text; encode it first"),
        ("counter", [[1], "text"], {}, "prompt 1 is text; encode it first"),
        ("counter", 3, {}, "prompts=3 is one id; give a sequence of ids"),
        ("counter", [[1], [2, 10]], {}, r"prompt 1 has the id 10, outside the vocabulary 0 \.\. 9"),
        ("counter", [-1], {}, "prompt 0 has the id -1, outside the vocabulary"),
        ("counter", [1.5], {}, r"prompt 0 is torch.float32 \(1,\), expected integers \(L,\)"),
        ("counter", [[[1]]], {}, r"prompt 0 is torch.int64 \(1, 1\), expected integers \(L,\)"),
        ("counter", [[1], None], {}, "prompt 0 is no sequence of ids"),
        ("counter", [[1, 2, 3]], {"max_len": 2}, "prompt 0 has 3 tokens, but max_len=2; keep its last 2 or fewer"),
        ("counter", [1], {"max_len": 0}, "max_len=0 must be a positive integer, or None"),
        ("counter", [1], {"max_new_tokens": 0}, "max_new_tokens=0 must be a positive integer"),
        ("counter", [1], {"prefill_chunk": 1.5}, "prefill_chunk=1.5 must be a positive integer"),
        ("counter", [1], {"temperature": -0.1}, "temperature=-0.1 must be a number of at least 0"),
        ("counter", [1], {"temperature": math.inf}, "temperature=inf must be a number"),
        ("counter", [1], {"temperature": math.nan}, "temperature=nan must be a number"),
        ("counter", [1], {"top_k": 0}, "top_k=0 must be a positive integer, or None"),
        ("counter", [1], {"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ("counter", [1], {"top_p": 1.1}, r"top_p=1.1 must be in \(0, 1\]"),
        ("counter", [1], {"min_p": -0.1}, r"min_p=-0.1 must be in \[0, 1\]"),
        ("counter", [1], {"min_p": 2}, r"min_p=2 must be in \[0, 1\]"),
        ("counter", [1], {"repetition_penalty": 0}, "repetition_penalty=0 must be a positive number"),
        ("counter", [1], {"stop": b"ab"}, "stop=b'ab' is one sequence; give a list of sequences"),
        ("counter", [1], {"stop": ["ab"]}, r"stop\[0\] is text; encode it first"),
        ("counter", [1], {"stop": [4]}, r"stop\[0\]=4 is a single id, which goes into stop_tokens"),
        ("counter", [1], {"stop": [()]}, r"stop\[0\] is empty"),
        ("counter", [1], {"stop": [(1, 12)]}, r"stop\[0\] has the id 12, outside the vocabulary"),
        ("counter", [1], {"stop_tokens": [11]}, "stop_tokens has the id 11, outside the vocabulary"),
        ("counter", [1], {"seed": -1}, "seed=-1 must be an integer from 0"),
        ("counter", [1], {"seed": 1.5}, "seed=1.5 must be an integer from 0"),
        ("counter", [[1], [2]], {"seed": [1]}, "seed has 1 entries for 2 prompts"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(model, prompt, options, message):
    """By the call itself, of the stream too, before the model has read a token."""
    model = MODELS[model]()
    for function in (generate, generate_tokens):
        with pytest.raises(ValueError, match=message):
            function(model, prompt, **options)
    assert getattr(model, "shapes", []) == []


def test_logits_that_are_not_finite_are_an_error():
    model = language_model("gla")
    with torch.no_grad():
        model.model.embedding.weight[7] = math.nan
    with pytest.raises(ValueError, match="logits for prompt 1 that are not finite"):
        generate(model, [[1], [7]])
