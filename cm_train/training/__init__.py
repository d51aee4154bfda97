"""The loop, and what it needs: state, saving, previews, precision, tracking."""
