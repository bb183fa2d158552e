"""How many replicas of which machine a load needs: a discrete-event simulation over the engine's own scheduler.

This is the one place of `loadtest` that imports the runtime: its scheduler, block pool and cost model, which need no
torch. A planner with a scheduler of its own would plan for another server.
"""
