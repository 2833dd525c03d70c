"""Triton kernels: one file per operation, each with its device code and a launcher named like the operation.

Nothing is imported here, so that a machine without Triton can import the package around this folder.
"""
