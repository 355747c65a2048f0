"""Layers around the mixers: norms, feed-forwards, positions, embeddings, heads."""
