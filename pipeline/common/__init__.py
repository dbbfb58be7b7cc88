"""What every room uses: errors, logging and progress, terminal, distributed, hub, files."""
