"""The CPU benchmark: finial and every rival that is installed, interleaved in one run.

python -m benchmarks.cpu --quick
"""
