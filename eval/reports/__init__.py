"""Pages of docs/ that are measured."""
