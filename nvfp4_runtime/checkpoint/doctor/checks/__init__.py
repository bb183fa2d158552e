"""What can be wrong with a checkpoint: one small function per check, each from a Case to findings."""
