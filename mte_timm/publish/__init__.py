"""From a training to a plain timm model that others load.

Reading: `loading.py` opens a checkpoint without running its code, `search.py` finds the network in it, `codebases.py`
knows what its repository trains with, `conversion.py` gives its tensors timm's names and grid, `accounting.py` refuses
what would be lost; `checkpoints.py` puts them together. Writing: `export.py` to a folder, `hub.py` to the Hub.
"""
