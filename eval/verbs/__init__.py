"""The verbs of the command line that run or measure."""
