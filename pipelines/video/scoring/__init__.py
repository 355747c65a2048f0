"""How well the frames of a video fit a query: vectors of frames and of queries, compared by their cosine."""
