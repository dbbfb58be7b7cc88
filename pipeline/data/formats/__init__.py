"""Readers of the published dataset formats, one module each: `read(sources) -> Split`."""
