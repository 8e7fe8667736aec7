"""Files outside this process: a local folder, a bucket or the Hugging Face Hub.

One `Store` interface, verified downloads, one retry policy, the lease of a single writer, and the
cache folder. What the files mean is not known here: runs, datasets and models are other rooms'.
"""
