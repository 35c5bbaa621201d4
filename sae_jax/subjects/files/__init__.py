"""File formats that hold the weights of language models, one file each."""
