"""What a model is made of: the Mixer contract and registry, layers, Block, Backbone."""

if not __name__.startswith("seqzoo."):
    raise ImportError("import seqzoo.blocks, not blocks")
