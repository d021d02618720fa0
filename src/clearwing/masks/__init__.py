"""From maps to masks."""
