"""Measuring: accuracy, bits, time."""
