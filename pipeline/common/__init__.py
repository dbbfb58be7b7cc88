"""Shared by all packages: errors, logging and progress, terminal, distributed runs, files and library names."""
