"""The run folder: its record, log, checkpoints, model card and report page."""
