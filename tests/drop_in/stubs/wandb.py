"""Stands in for wandb where a script imports it and does not report to it."""
