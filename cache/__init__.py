"""The feature cache: Q-Former query features and question text on disk, and their writer and reader."""
