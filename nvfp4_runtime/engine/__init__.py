"""The engine: scheduling and running steps, in its own process or in this one."""
