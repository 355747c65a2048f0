"""Hydra configs, one group per choice."""

if not __name__.startswith("seqzoo."):
    raise ImportError("import seqzoo.conf, not conf")
