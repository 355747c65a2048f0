"""Temporal grounding: a query and a video to the spans in which it is seen."""
