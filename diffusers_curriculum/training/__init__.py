"""What the training scripts share and no training step needs."""
