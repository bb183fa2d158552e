"""Requests at a server, and what came of them: workloads, arrivals, a client that keeps out of its own way, figures."""
