"""Requests to a loaded checkpoint and what is answered, as data: from `astra run`, here or by workers."""
