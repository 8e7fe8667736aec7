"""The machine of a job: its accelerators, JAX's devices and mesh, and the processes of a slice.

This room sets process-wide state (environment variables, JAX's configuration). It knows no model
and no data.
"""
