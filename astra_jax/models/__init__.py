"""The model families, one readable file each.

To add one: a file here with its config and module, a key table in `checkpoints/tensor_maps.py`, a line in `FAMILIES`.
"""
