"""Load and speed measurements over HTTP. Imports neither the runtime nor the server: a server is what it answers."""
