"""Hugging Face's names of every family's tensors and fields: a file of data for each."""
