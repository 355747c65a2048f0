"""The tasks: data in, LightningModule, metrics, results out; the command line."""

if not __name__.startswith("seqzoo."):
    raise ImportError("import seqzoo.pipelines, not pipelines")
