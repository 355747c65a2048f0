"""The audio events pipeline: what sounds when in long recordings, trained on spans or on composed recordings."""
