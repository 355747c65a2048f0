"""Long Range Arena (arXiv:2011.04006): the data of its six tasks, offline where they can be, and its published table.

Each task has one function that gives the splits "train", "val" and "test" as `Split` arrays: `listops_splits`,
`pathfinder_splits`, `image_splits`, `text_splits`, `retrieval_splits`, and `citation_splits`, which is ours.
"""
