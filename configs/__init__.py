"""The example configs, packaged so that `pipe quickstart` finds its own wherever it is installed."""
