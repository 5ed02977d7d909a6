"""The command line: `astra VERB`."""
