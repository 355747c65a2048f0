"""Feature vectors of a user's own files from any trained model, as a Parquet table."""
