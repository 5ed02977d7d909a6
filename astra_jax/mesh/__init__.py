"""The mesh, the split of tokens over it, and every collective."""
