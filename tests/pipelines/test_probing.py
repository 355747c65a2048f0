"""Token probes of a language model: scripted models that remember everything or nothing, rows checked by hand."""

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module

from seqzoo.blocks.sequence_model import SequenceOutput
from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.text import probing
from seqzoo.pipelines.text.probes.text_tasks import TEXT_TASKS
from seqzoo.pipelines.text.probes.token_grid import TokenCell, token_cells, token_rows
from seqzoo.pipelines.text.probes.token_tasks import TOKEN_TASKS
from seqzoo.pipelines.text.probing import check_probe, run_probes, run_token_probes
from seqzoo.pipelines.text.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


class Scripted(torch.nn.Module):
    """Says at every place the token that `rule(the tokens up to there)` gives, without a doubt."""

    def __init__(self, rule, sure=50.0, vocab_size=256):
        super().__init__()
        self.rule, self.sure, self.vocab_size, self.calls = rule, sure, vocab_size, 0
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens):
        self.calls += 1
        said = [[self.rule(row[: t + 1]) for t in range(len(row))] for row in tokens.tolist()]
        logits = self.sure * torch.nn.functional.one_hot(torch.tensor(said), self.vocab_size).float()
        return SequenceOutput(logits, None, {})


def look_back(row):
    """What followed the last earlier occurrence of the last token."""
    earlier = [t for t in range(len(row) - 1) if row[t] == row[-1]]
    return row[earlier[-1] + 1] if earlier else 0


def in_turn(row):
    """At the i-th marker 1, the i-th of the symbols from 2 on."""
    symbols, place = [token for token in row if token >= 2], row.count(1) - 1
    return symbols[place] if 0 <= place < len(symbols) else 0


RULES = {"mqar": look_back, "induction": look_back, "selective_copying": in_turn, "copying": in_turn}


@pytest.mark.parametrize("task", TOKEN_TASKS)
def test_a_model_that_remembers_everything_is_right_everywhere(task):
    cells = token_cells(task, [48, 100], 256)
    for row, cell in zip(run_token_probes(Scripted(RULES[task]), cells, rows=5), cells, strict=True):
        asked = {"mqar": cell.items, "induction": 1}.get(task, 16)
        assert (row["task"], row["length"], row["items"], row["depth"]) == (task, cell.length, cell.items, None)
        assert row["mean"] == 1 and row["count"] == 5 * asked and row["bits"] < 1e-6


@pytest.mark.parametrize(("task", "said"), [("mqar", 200), ("induction", 3), ("selective_copying", 3)])
def test_a_model_that_always_says_the_same_is_right_by_chance(task, said):
    (row,) = run_token_probes(Scripted(lambda _: said), token_cells(task, [40], 256), rows=3000)
    expected = {"mqar": 1 / 128, "induction": 1 / 15, "selective_copying": 1 / 14}[task]
    assert row["chance"] == expected
    assert abs(row["mean"] - expected) < 5 * (expected / row["count"]) ** 0.5


def test_a_model_without_preference_needs_the_bits_of_its_vocabulary():
    for row in run_token_probes(Scripted(lambda _: 0, sure=0.0), token_cells("mqar", [70], 256), rows=4):
        assert row["bits"] == pytest.approx(8, rel=1e-6)


def test_a_row_stands_behind_the_separator_and_asks_what_was_paired():
    for task in TOKEN_TASKS:
        for cell in token_cells(task, [70, 80], 256):
            tokens, targets = token_rows(cell, 6, start=7)
            assert tokens.shape == targets.shape == (6, cell.length) and tokens.dtype == targets.dtype == np.int64
            assert (tokens[:, 0] == 7).all() and (targets[:, 0] == -100).all()
            for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
                asked = [t for t, target in enumerate(wanted) if target != -100]
                assert len(asked) == (cell.items or 1)
                assert [RULES[task](row[1 : t + 1]) for t in asked] == [wanted[t] for t in asked]


def test_rows_depend_on_seed_split_index_and_cell_and_on_nothing_else():
    cell = TokenCell("mqar", 64, {"num_pairs": 8, "vocab_size": 256})
    first = token_rows(cell, 4)
    assert all((a == b).all() for a, b in zip(first, token_rows(cell, 4), strict=True))
    for other in ({"seed": 1}, {"split": "train"}, {"index": 1}):
        assert (token_rows(cell, 4, **other)[0] != first[0]).any()
    nine = TokenCell("mqar", 64, {"num_pairs": 9, "vocab_size": 256})
    assert (token_rows(nine, 4)[0][:, 1] != first[0][:, 1]).any()
    rows = run_token_probes(Scripted(lambda row: row[-1] // 2 + 128), [cell, nine], rows=9)
    back = run_token_probes(Scripted(lambda row: row[-1] // 2 + 128), [nine, cell], rows=9)
    assert rows == back[::-1]


def test_batches_do_not_change_the_score(monkeypatch):
    cells = token_cells("mqar", [40, 70], 256)
    rule = Scripted(lambda row: look_back(row) if row[-1] % 2 else 0)
    whole = run_token_probes(rule, cells, rows=7)
    assert 0 < whole[0]["mean"] < 1
    monkeypatch.setattr(probing, "_TOKENS", 80)
    for one, other in zip(whole, run_token_probes(rule, cells, rows=7), strict=True):
        assert {**one, "bits": None} == {**other, "bits": None} and one["bits"] == pytest.approx(other["bits"])


def test_pairs_are_those_that_fit_length_and_vocabulary():
    assert [(c.length, c.items) for c in token_cells("mqar", [512, 64, 65], 256)] == [
        *((64, 4), (65, 4), (65, 16)),
        *((512, 4), (512, 16), (512, 64)),
    ]
    assert {c.options["vocab_size"] for c in token_cells("mqar", [512], 256)} == {256}
    assert [c.items for c in token_cells("mqar", [512], 40)] == [4, 16]
    assert token_cells("mqar", [64], 50_000)[0].options["vocab_size"] == 8192
    assert token_cells("induction", [64], 256)[0].options == {"vocab_size": 16}
    assert token_cells("selective_copying", [64], 12)[0].options == {"vocab_size": 12, "num_symbols": 16}


def test_text_and_tokens_share_a_table_in_the_order_of_the_tasks():
    tasks = ["induction", "passkey", "mqar"]
    rows = run_probes(Scripted(look_back), BYTES, tasks, [400, 300], samples=1, seed=0)
    assert list(dict.fromkeys(row["task"] for row in rows)) == tasks
    assert len({tuple(row) for row in rows}) == 1  # the same columns
    found = [(r["length"], r["depth"], r["items"], r["count"]) for r in rows]
    assert found[:2] == [(300, None, None, 5), (400, None, None, 5)]
    assert found[2:12] == [(length, depth, None, 1) for length in (300, 400) for depth in (0, 0.25, 0.5, 0.75, 1)]
    assert found[12:] == [(length, None, n, 5 * n) for length in (300, 400) for n in (4, 16, 64)]
    assert all(r["mean"] == 1 for r in rows if r["task"] != "passkey")


@pytest.mark.parametrize(
    ("tasks", "lengths", "message"),
    [
        (["inducton"], [64], "no probe 'inducton'.*Did you mean induction"),
        (["pass_key"], [64], "no probe 'pass_key'.*passkey"),
        (["passkey", "selective_copying"], [400, 20], "length=19 is too short"),
        (["passkey", "mqar"], [400, 12], "needs a length of 16 or more, got length=11"),
    ],
)
def test_what_cannot_be_asked_is_said_before_the_model_reads(tasks, lengths, message):
    net = Scripted(look_back)
    with pytest.raises(UserError, match=message):
        run_probes(net, BYTES, tasks, lengths, samples=1, seed=0)
    assert net.calls == 0


def test_the_experiment_lists_probes_of_both_kinds():
    with initialize_config_module("seqzoo.conf", version_base="1.3"):
        cfg = compose("config", overrides=["experiment=text/probes"])
    names = list(cfg.task.probes)
    for name in names:
        check_probe(name)
    assert {"passkey", "needle"} <= set(names) & set(TEXT_TASKS)
    assert {"mqar", "induction", "selective_copying"} <= set(names) & set(TOKEN_TASKS)
