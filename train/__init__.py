"""Calibration and finetuning of codebooks and models."""
