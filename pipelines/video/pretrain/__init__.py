"""Videos without labels: a model is trained to put them in order, to fill in what is hidden, or to tell them apart."""
