"""The model families, one readable file each.

To add one: a file here with its config and module, and a key table in `checkpoints/families`.
"""
