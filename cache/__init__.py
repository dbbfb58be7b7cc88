"""The feature cache: Q-Former query features and question text on disk, with their writer and reader."""
