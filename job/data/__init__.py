"""Training data: files to rows, checked examples, staged shards, and packed batches.

The room reads sources, checks and stages examples, splits them, and packs token ids into rows of
one shape. It knows nothing of runs and their stages: the pipeline says where files go.
"""
