"""Recordings in classes: which label does a clip have."""
