"""Other packages' models and tools. Each integration is imported by name: the package it serves is optional."""
