"""Does a law of noise levels train better? Tasks x targets x methods x seeds, measured.

python -m benchmarks.evidence small --processes 2
python -m benchmarks.evidence report
"""
