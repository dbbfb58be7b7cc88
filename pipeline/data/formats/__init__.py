"""The published forms of data sets, a module each: `read(sources) -> Split`."""
