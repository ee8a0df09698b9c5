"""Models as files: load, export, merge, undo."""
