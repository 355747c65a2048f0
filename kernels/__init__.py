"""The numerics: one folder per operation, pure functions on tensors."""

if not __name__.startswith("seqzoo."):
    raise ImportError("import seqzoo.kernels, not kernels")
