"""A model compiled for a mesh, and what is asked of it."""
