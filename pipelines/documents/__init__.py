"""The documents pipeline: long documents in classes, the user's own and those of Long Range Arena."""
