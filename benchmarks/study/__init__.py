"""The paper's experiments, repeated at the size that the machine allows. `python -m benchmarks.study --help`."""
