"""The format's published claims, measured again at small scale: a script for each, a table of claim, protocol, ours."""
