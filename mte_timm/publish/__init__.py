"""From a training checkpoint to a plain timm model.

`networks.py` finds the networks in a file, `layouts.py` gives their tensors timm's names, `accounting.py` says what
would be lost, `grids.py` knows the image size of training, `codebases.py` what a repository trains with, `advice.py`
what to do; `checkpoints.py` puts them together.
"""
