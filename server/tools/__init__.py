"""Tool calls: from what a model writes, in its family's syntax, to calls with a name and arguments."""
