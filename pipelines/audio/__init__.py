"""Long audio: recordings in, labels and time spans out."""
