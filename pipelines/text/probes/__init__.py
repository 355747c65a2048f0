"""Long-context probes: token tasks to train small models on, text tasks for any language model, their scores."""
