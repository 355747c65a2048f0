"""Recordings for a text, and texts for a recording: long-form contrastive audio and text."""
