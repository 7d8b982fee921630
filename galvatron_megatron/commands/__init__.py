"""The commands of the galvatron command line, one module each."""
