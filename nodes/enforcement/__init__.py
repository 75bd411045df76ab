"""Server-wide enforcement."""
