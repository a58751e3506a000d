"""The comparison, `python -m benchmarks`: what is measured, by whom, and how it is shown."""
