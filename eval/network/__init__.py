"""Links: their model, traces, lost packets, and where the time of a pass went."""
