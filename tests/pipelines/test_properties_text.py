"""Properties of text: tokens there and back, documents cut and split without a loss, rows that ask everything once."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from examples import examples
from seqzoo.blocks.layers.ngrams import NGramEmbedding
from seqzoo.pipelines.documents.labelled import split_documents
from seqzoo.pipelines.documents.sets import DocumentBatches, LabelledSet
from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.text import writing
from seqzoo.pipelines.text.answers import Answer
from seqzoo.pipelines.text.corpus import SPLITS, Corpus, assign, load_corpus
from seqzoo.pipelines.text.masking import mask_tokens
from seqzoo.pipelines.text.rows import IGNORED, CarriedRows, PackedRows, SlidingRows
from seqzoo.pipelines.text.scores import positions
from seqzoo.pipelines.text.sources import read_documents
from seqzoo.pipelines.text.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, train_bpe

# Pieces that merge, the separator as it may stand in a text, marks, characters of every length in UTF-8, turned ones.
ODD = [*"ab \n\t\0é€😀\u0301\u200d\u202e\ufeff\ufffd\U0010ffff\u2028", "abab ", "<|separator|>"]
TEXTS = st.lists(st.sampled_from(ODD) | st.characters(codec="utf-8"), max_size=24).map("".join)
BYTES = st.binary(max_size=30) | TEXTS.map(str.encode)
RATIO = st.sampled_from(
    [(0.9, 0.05, 0.05), (0.8, 0.1, 0.1), (0.1, 0.1, 0.8), (0.5, 0.5, 0.0), (0.9, 0.0, 0.1), (1, 0, 0)]
)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> FileTokenizer:
    pytest.importorskip("tokenizers", reason="tokenizers (seqzoo[text]) is not installed")
    path = tmp_path_factory.mktemp("bpe") / "bpe.json"
    return train_bpe([b"ab ab abab STOP STOPS\n" * 9, "é€😀 é€😀".encode() * 9], path, vocab_size=300)


# tokenizers -----------------------------------------------------------------------------------------------------------


@examples(60)
@given(content=BYTES)
def test_bytes_there_and_back(content: bytes) -> None:
    tokens = ByteTokenizer().encode(content)
    assert len(tokens) == len(content) and ByteTokenizer().decode(tokens.tolist()) == content


@examples(80)
@given(content=BYTES)
@example(content=b"\xef\xbf\xbd\xff \xc0\xaf \xed\xa0\x80 \xf4\x90\x80\x80")  # U+FFFD itself, too long, half, too far
def test_texts_there_and_back_and_losses_are_counted(content: bytes, bpe: FileTokenizer) -> None:
    before = bpe.replaced
    tokens = bpe.encode(content)
    text = content.decode("utf-8", "replace")
    assert bpe.decode(tokens) == text.encode() and (tokens < bpe.vocab_size).all()
    assert bpe.replaced - before == text.count("\ufffd") - content.count("\ufffd".encode())
    if content == text.encode():
        assert bpe.replaced == before


@examples(60)
@given(content=TEXTS, size=st.integers(4, 12), edges=st.tuples(st.binary(max_size=3), st.binary(max_size=3)))
def test_parts_of_a_document_are_all_of_it(
    content: str, size: int, edges: tuple[bytes, bytes], bpe: FileTokenizer
) -> None:
    own = content.encode()
    document = writing.Document("a", edges[0] + own + edges[1], len(edges[0]), len(edges[0]) + len(own))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "_PIECE", size)
        parts = list(writing.parts(document))
    assert b"".join(parts) == own and all(0 < len(part) <= size for part in parts)
    assert b"".join(bpe.decode(bpe.encode(part)) for part in parts) == own  # no character is cut
    for part in parts[:-1]:
        assert part.endswith(b"\n") or b"\n" not in part[1:-1]


@examples(80)
@given(
    text=st.text("ab", max_size=12) | TEXTS, stops=st.lists(st.text("ab", max_size=3), max_size=4),
    kind=st.sampled_from(["bytes", "bpe"]), cuts=st.sets(st.integers(1, 29)),
)  # fmt: skip
@example(text="xxab", stops=["b", "ab"], kind="bytes", cuts=set())
def test_an_answer_is_the_text_before_the_first_stop(
    text: str, stops: list[str], kind: str, cuts: set[int], bpe: FileTokenizer
) -> None:
    tokenizer: Tokenizer = ByteTokenizer() if kind == "bytes" else bpe
    ends = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b].encode() for a, b in itertools.pairwise(ends)]
    content, found = text.encode(), [stop.encode() for stop in stops if stop]
    met = [(i + len(s), i) for s in found for i in range(len(content)) if content[i:].startswith(s)]
    expected = content[: min(met)[1]] if met else content
    answer, shown = Answer(tokenizer, [stop.encode() for stop in stops]), b""
    for token in itertools.chain.from_iterable(tokenizer.encode(piece).tolist() for piece in pieces):
        stopped = answer.add(token)
        shown += answer.take()
        assert expected.startswith(shown)
        if stopped:
            break
    answer.finish()
    assert shown + answer.take() == answer.text == expected and answer.stopped == bool(met)


# documents ------------------------------------------------------------------------------------------------------------


@examples(12)
@given(contents=st.lists(BYTES, min_size=1, max_size=8), ratio=RATIO, number=st.integers(0, 2**40))
@example(contents=[b"one line\n" * 30], ratio=(0.8, 0.1, 0.1), number=0)
@example(contents=["é".encode() * 50], ratio=(0.5, 0.5, 0.0), number=0)  # without a line
def test_a_corpus_is_its_documents(
    contents: list[bytes], ratio: tuple[float, ...], number: int, tmp_path: Path
) -> None:
    folder = tmp_path / f"{number} {len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    for place, content in enumerate(contents):
        (folder / f"{place}.txt").write_bytes(content)
    tokenizer = ByteTokenizer()
    kept = [content for content in contents if content]
    if not kept:
        with pytest.raises(UserError, match="holds no text"):
            load_corpus(str(folder), tokenizer, cache_dir=tmp_path / "cache")
        return
    found = load_corpus(str(folder), tokenizer, split_ratio=ratio, cache_dir=tmp_path / "cache")
    if len(kept) == 1 and len(found.bounds) > 2:
        assert [SPLITS[i] for i in found.split] == [s for s, part in zip(SPLITS, ratio, strict=True) if part]
        assert (
            b"".join(next(found.content(s, tokenizer)) for s, part in zip(SPLITS, ratio, strict=True) if part)
            == kept[0]
        )
    else:
        stages = [list(found.content(stage, tokenizer)) for stage in SPLITS]
        assert sorted(itertools.chain(*stages)) == sorted(kept)
        if len(kept) >= sum(part > 0 for part in ratio):
            assert [bool(stage) for stage in stages] == [part > 0 for part in ratio]
    edges = np.concatenate([found.bounds[:-1], found.bounds[1:] - 1])
    assert (found.tokens[edges] == tokenizer.separator).all() and found.sizes.sum() == sum(map(len, kept))


@examples(60)
@given(sizes=st.lists(st.integers(1, 1000) | st.integers(10**6, 10**9), min_size=1, max_size=12), ratio=RATIO)
@example(sizes=[1000, 10, 10], ratio=(0.9, 0.05, 0.05))  # val had none where small documents filled the test part
@example(sizes=[10, 10, 1000], ratio=(0.9, 0.05, 0.05))
def test_splits_of_documents(sizes: list[int], ratio: tuple[float, ...]) -> None:
    names = [f"document {i}" for i in range(len(sizes))]
    split = assign(names, sizes, ratio)
    wanted = [part for part in range(3) if ratio[part] > 0]
    assert set(split.tolist()) <= set(wanted) and 0 in split
    assert len(set(split.tolist())) == min(len(sizes), len(wanted))
    back = assign(names[::-1], sizes[::-1], ratio)
    assert (back[::-1] == split).all()
    # a part is reached to half of a document, but where the others needed theirs
    if len(sizes) > len(wanted):
        for part in wanted[1:]:
            share, most = sum(np.array(sizes)[split == part]) - ratio[part] / sum(ratio) * sum(sizes), max(sizes)
            assert share <= most / 2 or (split == part).sum() == 1


@examples(60)
@given(
    words=st.lists(st.tuples(st.integers(0, 12), st.sampled_from("xyz")), min_size=1, max_size=40),
    ratio=st.sampled_from([(0.8, 0.1, 0.1), (0.4, 0.3, 0.3), (0.8, 0.2, 0.0), (1.0, 0.0, 0.0)]),
    seed=st.integers(0, 5),
)
@example(words=[(i % 9, "xy"[i % 2]) for i in range(18)], ratio=(0.4, 0.3, 0.3), seed=0)  # each text has both labels
def test_no_text_is_in_two_splits(words: list[tuple[int, str]], ratio: tuple[float, ...], seed: int) -> None:
    keys, labels = [str(word) for word, _ in words], [label for _, label in words]
    wanted = {split for split, part in zip(SPLITS, ratio, strict=True) if part > 0}
    first = {key: min(label for other, label in zip(keys, labels, strict=True) if other == key) for key in keys}
    own = {label: {key for key in keys if first[key] == label} for label in labels}
    try:
        stage = split_documents(keys, labels, ratio, seed)
    except UserError:
        assert min(map(len, own.values())) < len(wanted)
        return
    assert all(len({s for k, s in zip(keys, stage, strict=True) if k == key}) == 1 for key in keys)
    for label in set(labels):
        assert {str(s) for o, s in zip(labels, stage, strict=True) if o == label} == wanted
    order = random.Random(seed).sample(range(len(keys)), len(keys))
    again = split_documents([keys[i] for i in order], [labels[i] for i in order], ratio, seed)
    assert (again == stage[order]).all()


@examples(50)
@given(pieces=st.lists(BYTES, max_size=6), mark=st.binary(min_size=1, max_size=3))
def test_a_separator_cuts_a_file_as_it_cuts_bytes(pieces: list[bytes], mark: bytes, tmp_path: Path) -> None:
    content = mark.join(pieces)
    (tmp_path / "a.txt").write_bytes(content)
    found = list(read_documents([tmp_path / "a.txt"], tmp_path, separator=mark))
    assert [d.content[d.begin : d.end] for d in found] == [part for part in content.split(mark) if part]
    assert [d.name for d in found] == [f"a.txt#{i}" for i in range(len(found))]


@examples(50)
@given(
    texts=st.lists(st.lists(st.sampled_from('aé\ud83d\ude00\0\n"') | TEXTS, max_size=6).map("".join), max_size=6),
    ascii_only=st.booleans(),
)
def test_lines_of_json_are_their_texts(texts: list[str], ascii_only: bool, tmp_path: Path) -> None:
    """Half characters (surrogates) too, which JSON may hold as escapes."""
    lines = [
        json.dumps({"n": i, "text": text}, ensure_ascii=ascii_only or not _encodes(text))
        for i, text in enumerate(texts)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = [d.content[d.begin : d.end] for d in read_documents([tmp_path / "a.jsonl"], tmp_path)]
    assert [content.decode("utf-8", "surrogatepass") for content in found] == [_joined(text) for text in texts if text]


def _encodes(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _joined(text: str) -> str:
    """Two halves of a character that follow each other are the character, as in JSON."""
    return json.loads(json.dumps(text))


# rows -----------------------------------------------------------------------------------------------------------------


def corpus_of(predictions: list[int]) -> Corpus:
    """Documents of so many predictions; every token is its place in the corpus."""
    bounds = np.concatenate([[0], np.cumsum(np.array(predictions) + 1)])
    number = len(predictions)
    split = np.zeros(number, np.uint8)
    return Corpus(np.arange(bounds[-1], dtype=np.uint16), bounds, np.ones(number), [""] * number, split)


@examples(100)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), seq_len=st.integers(1, 24),
    kind=st.sampled_from(["packed", "filled", "sliding", "carried"]), batch=st.integers(1, 5),
    draw=st.randoms(use_true_random=False),
)  # fmt: skip
@example(sizes=[4] * 6, seq_len=8, kind="packed", batch=1, draw=random.Random(19))  # of all, two to a row
def test_rows_ask_for_every_token_once_and_in_order(
    sizes: list[int], seq_len: int, kind: str, batch: int, draw: random.Random
) -> None:
    corpus = corpus_of(sizes)
    documents = np.array(sorted(draw.sample(range(len(sizes)), draw.randint(1, len(sizes)))))
    stride, seed = draw.randint(1, seq_len), draw.randint(0, 9)
    if kind == "sliding":
        rows = SlidingRows(corpus, documents, seq_len, stride)
    elif kind == "carried":
        rows, batch = CarriedRows(corpus, documents, seq_len, batch, shuffle=draw.random() < 0.5, seed=seed), 1
    else:
        rows = PackedRows(corpus, documents, seq_len, seed=seed, fill=kind == "filled")
    asked: list[tuple[int, int, int, int]] = []  # token, target, its place in the document, tokens of context
    for begin in range(0, len(rows), batch):
        found = rows[np.arange(begin, min(begin + batch, len(rows)))]
        tokens, targets, place = found["tokens"], found["targets"], positions(found).expand_as(found["tokens"])
        if kind in ("packed", "filled"):
            assert (targets != IGNORED).all() and "mask" not in found
        if "cu_seqlens" in found:
            bounds = found["cu_seqlens"].tolist()
            context = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(bounds)])[None]
            assert bounds[-1] == tokens.shape[1] and max(np.diff(bounds)) <= seq_len and min(np.diff(bounds)) > 0
            assert (tokens[0, bounds[:-1]] == found["first"]).all()
        else:
            context = torch.arange(tokens.shape[1]).expand_as(tokens)
            assert tokens.shape[1] <= seq_len
        if "mask" in found:
            assert (found["mask"].long().diff(dim=1) <= 0).all() and not (~found["mask"] & (targets != IGNORED)).any()
        keep = targets != IGNORED
        asked += zip(*(part[keep].tolist() for part in (tokens, targets, place, context)), strict=True)
    starts = corpus.bounds[documents].tolist()
    expected = [
        (first + i, first + i + 1, i) for first, d in zip(starts, documents, strict=True) for i in range(sizes[d])
    ]
    assert sorted(entry[:3] for entry in asked) == expected
    if kind == "sliding":
        assert all(context >= min(place, seq_len - stride) for *_, place, context in asked)
    if kind in ("sliding", "carried"):  # a document is read forwards
        for first, d in zip(starts, documents, strict=True):
            own = [place for token, _, place, _ in asked if first <= token < first + sizes[d]]
            assert own == sorted(own)
    if kind == "packed":  # a row is closed by what no longer fits
        lone = [rows[np.array([i])].get("cu_seqlens", torch.tensor([0, seq_len])) for i in range(len(rows))]
        shared = lone[sum(sizes[d] // seq_len for d in documents) :]
        assert all(a[-1] + b[1] > seq_len for a, b in itertools.pairwise(shared))
    if kind == "filled":
        ends = sum(sizes[d] % seq_len for d in documents)
        assert len(rows) == sum(sizes[d] // seq_len for d in documents) - (-ends // seq_len)


@examples(60)
@given(lengths=st.lists(st.integers(0, 70), min_size=1, max_size=10), by_length=st.booleans(), batch=st.integers(1, 6))
def test_batches_of_documents_are_the_documents(lengths: list[int], by_length: bool, batch: int) -> None:
    ends = np.cumsum([0, *lengths])
    flat = (np.arange(ends[-1]) % 250 + 1).astype(np.uint8)
    documents = LabelledSet(flat, ends[:-1, None], np.diff(ends)[:, None], np.arange(len(lengths)))
    batches, seen = DocumentBatches(documents, by_length=by_length), []
    for begin in range(0, len(batches), batch):
        found = batches[np.arange(begin, min(begin + batch, len(batches)))]
        mask = found.get("mask", torch.ones_like(found["tokens"], dtype=torch.bool))
        assert found["labels"].tolist() == found["document"].tolist() and not found["tokens"][~mask].any()
        for tokens, real, number in zip(found["tokens"], mask, found["document"].tolist(), strict=True):
            if lengths[number] or "mask" in found:
                assert tokens[real].tolist() == flat[ends[number] : ends[number + 1]].tolist()
            seen.append(number)
    assert sorted(seen) == list(range(len(lengths)))
    if by_length:
        assert [lengths[i] for i in seen] == sorted(lengths)


# masking and n-grams --------------------------------------------------------------------------------------------------


@examples(60)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 12)), share=st.sampled_from([0.0, 0.15, 0.7, 1.0]),
    placed=st.booleans(), draw=st.integers(0, 3), first=st.integers(0, 2**62), seed=st.integers(0, 99),
)  # fmt: skip
def test_masked_tokens_are_asked_and_no_others_change(
    shape: tuple[int, int], share: float, placed: bool, draw: int, first: int, seed: int
) -> None:
    made = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 7, shape, generator=made)
    real = torch.rand(shape, generator=made) < 0.8
    place = first + torch.arange(tokens.numel()).view(shape) if placed else None
    kept = tokens.clone()
    options = {"share": share, "mask_token": 7, "vocab_size": 7, "generator": made, "draw": draw}
    inputs, targets = mask_tokens(tokens, real=real, place=place, **options)
    chosen = targets != IGNORED
    assert torch.equal(tokens, kept) and not (chosen & ~real).any()
    assert torch.equal(inputs[~chosen], tokens[~chosen]) and torch.equal(targets[chosen], tokens[chosen])
    assert ((inputs >= 0) & (inputs <= 7)).all()
    assert share > 0 or not chosen.any()
    assert share < 1 or torch.equal(chosen, real)
    if place is not None:  # a token is hidden whatever stands beside it
        rows = torch.randperm(shape[0], generator=made)[:2]
        again = mask_tokens(tokens[rows], real=real[rows], place=place[rows], **options)
        assert torch.equal(again[0], inputs[rows]) and torch.equal(again[1], targets[rows])


@examples(30)
@given(
    orders=st.sampled_from([(2,), (3,), (2, 4), (3, 5)]), length=st.integers(1, 12),
    cuts=st.lists(st.integers(0, 12), max_size=4), reset=st.integers(0, 12), seed=st.integers(0, 99),
)  # fmt: skip
def test_n_grams_do_not_depend_on_chunks_rows_or_packing(
    orders: tuple[int, ...], length: int, cuts: list[int], reset: int, seed: int
) -> None:
    torch.manual_seed(seed)
    embedding = NGramEmbedding(5, 4, orders=orders, size=16, width=3).double()
    ids = torch.randint(0, 5, (2, length))
    whole_rows, (a, b) = embedding(ids), (min(reset, length), length)
    ends = [0, *sorted(min(cut, length) for cut in cuts), length]
    state, parts = embedding.init_state(2), []
    for begin, end in itertools.pairwise(ends):
        x, state = embedding.read(ids[:, begin:end], state=state)
        parts.append(x)
    torch.testing.assert_close(torch.cat(parts, 1), whole_rows, rtol=1e-12, atol=1e-12)
    flipped, last = embedding.read(ids.flip(0), state=embedding.init_state(2))
    torch.testing.assert_close(flipped, whole_rows.flip(0), rtol=1e-12, atol=1e-12)
    assert torch.equal(last, state.flip(0))
    if 0 < a < b:
        packed, _ = embedding.read(ids[:1], cu_seqlens=torch.tensor([0, a, b], dtype=torch.int32))
        alone = torch.cat((embedding(ids[:1, :a]), embedding(ids[:1, a:])), 1)
        torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)
