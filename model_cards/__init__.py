"""One card per pretrained model."""

if not __name__.startswith("seqzoo."):
    raise ImportError("import seqzoo.model_cards, not model_cards")
