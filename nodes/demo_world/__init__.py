"""The embedded demo model as nodes."""
