"""The checkpoint doctor: what a folder holds, whether it is sound, how far it is from its parent, and a sound copy."""
