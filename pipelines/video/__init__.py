"""Long video: footage in, moments, labels and vectors out."""
