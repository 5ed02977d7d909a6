"""How one model is run: what is split, and what crosses the link."""
