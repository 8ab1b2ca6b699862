"""Steps per second of the training scripts here against those of diffusers, run in turn."""
