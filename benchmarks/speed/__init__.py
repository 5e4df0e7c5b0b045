"""What MTE costs a training step: steps, parts, scaling. `python -m benchmarks.speed`."""
