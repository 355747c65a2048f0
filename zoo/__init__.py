"""Named models: registry, factory, saving and loading."""

if not __name__.startswith("seqzoo."):
    raise ImportError("import seqzoo.zoo, not zoo")
